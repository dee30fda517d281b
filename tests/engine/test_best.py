"""Best checkpoint and early stop: the rule by brute force, restarts, and processes that agree."""

import contextlib
import json
import logging
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fiber_d2.engine.best import (
    BestCheckpoint,
    MetricHistory,
    check_best_metric,
    check_best_options,
)
from fiber_d2.engine.checkpointer import FiberCheckpointer
from fiber_d2.engine.errors import RunError
from fiber_d2.engine.hooks import CheckpointHook, EvaluationHook
from fiber_d2.engine.launch import launch
from fiber_d2.engine.step import StepTrainer

METRIC = "data/bbox/AP"


def original_rule(values, patience):
    """How the original decides: AP starts at 0, below it counts, a tie is a new best."""
    best, counter, saved = 0.0, 0, []
    for number, value in enumerate(values):
        if value < best:
            counter += 1
        else:
            counter, best = 0, value
            saved.append(number)
        if counter >= patience:
            return saved, number
    return saved, None


@given(st.lists(st.integers(0, 5).map(float), max_size=20), st.integers(1, 4))
def test_history_is_the_rule_of_the_original(values, patience):
    history = MetricHistory(METRIC, "max", patience)
    mirrored = MetricHistory(METRIC, "min", patience)
    saved, stopped = [], None
    for number, value in enumerate(values):
        is_best = history.add(number, value)
        assert mirrored.add(number, -value) == is_best
        assert mirrored.has_enough == history.has_enough
        if is_best:
            saved.append(number)
        if history.has_enough:
            stopped = number
            break
    assert (saved, stopped) == original_rule(values, patience)
    if saved:
        assert history.best == (saved[-1], max(values[: number + 1]))
    again = MetricHistory(METRIC, "max", patience)
    again.restart(history.evaluations)
    assert (again.best, again.num_worse) == (history.best, history.num_worse)


def test_what_is_no_number_is_never_the_best():
    history = MetricHistory(METRIC, "min", patience=3)
    assert not history.add(0, math.nan)
    assert history.best is None
    assert history.add(1, 2.0)
    assert [history.add(2, math.nan), history.add(3, -math.inf)] == [False, False]
    assert not history.has_enough
    history.add(4, math.inf)
    assert history.has_enough
    assert history.best == (1, 2.0)


@pytest.mark.parametrize(
    "options, message", [(("most", 3), "'most': give max or min"), (("max", 0), "at least 1")]
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MetricHistory(METRIC, *options)


@pytest.mark.parametrize(
    "options, message",
    [
        (({"metrics": METRIC}, None), "train.best has no key 'metrics', but metric, mode"),
        (({"mode": "max"}, None), "train.best lacks its metric"),
        ((None, {"patience": 3}), "train.early_stop needs a metric"),
        ((None, None, ["data"]), "train.test_best tests the best checkpoint"),
        (({"metric": METRIC, "mode": "up"}, None), "'up': give max or min"),
        (({"metric": METRIC}, {"patience": 0}), "patience is 0 evaluations"),
    ],
)
def test_options_that_make_no_sense_together(options, message):
    with pytest.raises(ValueError, match=message):
        check_best_options(*options)


def test_the_metric_has_to_be_of_a_test_set():
    best = {"metric": "data/bbox/AP"}
    check_best_metric(best, ["other", "data"])
    check_best_metric(None, [])
    with pytest.raises(ValueError, match="as data_val/bbox/AP does; there are data_val, x"):
        check_best_metric(best, ["data_val", "x"])
    with pytest.raises(ValueError, match="there is no test set"):
        check_best_metric(best, [])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, batch):
        return {"loss": (self.w * batch).sum()}


class Run:
    """A trainer whose metric after iteration ``i`` is ``values[i]``.

    Each step takes 1 off its only weight, which so tells the iteration.
    """

    def __init__(self, folder, values, *, period=1, killed_at=None, **options):
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        self.trainer = StepTrainer(model, optimizer, [torch.ones(1)] * 100, log_period=1)
        self.checkpointer = FiberCheckpointer(model, str(folder), trainer=self.trainer)
        self.heard = []

        def evaluate():
            iteration = round(-model.w.item()) - 1
            if iteration == killed_at:
                raise KeyboardInterrupt
            return {"data": {"bbox": {"AP": values[iteration], "note": "text"}}}

        self.evaluation = evaluation = EvaluationHook(period, evaluate)
        self.best = BestCheckpoint(
            evaluation,
            self.checkpointer,
            listeners=[self.heard.append],
            on_stop=lambda: self.checkpointer.save("model_final", iteration=self.trainer.iter),
            **{"metric": METRIC, **options},
        )
        checkpoint = CheckpointHook(self.checkpointer, 2)
        self.trainer.register_hooks([checkpoint, evaluation, self.best])

    def train(self, max_iter, *, resume=False):
        """Whether it was stopped early."""
        start = 0
        if resume and self.checkpointer.has_checkpoint():
            self.checkpointer.resume_or_load("", resume=True)
            start = self.trainer.iter + 1
        self.trainer.train(start, max_iter)
        return self.best.stopped


def weight(path):
    return torch.load(path, weights_only=True)["model"]["w"].item()


def test_weights_of_the_best_evaluation_are_kept(tmp_path):
    values = [1.0, 3.0, 2.0, 3.0, 1.0]
    run = Run(tmp_path, values)
    assert run.train(5) == ""
    assert weight(tmp_path / "model_best.pth") == -4
    stored = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert stored.keys() == {"model", "iteration"}
    content = json.loads((tmp_path / "best.json").read_text())
    assert content["best"] == {"iteration": 3, "value": 3.0}
    assert content["checkpoint"] == "model_best.pth"
    assert [row["value"] for row in content["evaluations"]] == values
    assert not content["stopped_early"]
    assert run.heard == values
    # It is not what a run is resumed from.
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_a_stalled_training_stops(tmp_path):
    run = Run(tmp_path, [1.0, 3.0, 2.0, math.nan, 2.5, 9.0], patience=3)
    assert "not reached its best in 3 evaluations" in run.train(6)
    assert run.trainer.iter == 4
    content = json.loads((tmp_path / "best.json").read_text())
    assert content["stopped_early"]
    assert content["best"] == {"iteration": 1, "value": 3.0}
    assert content["evaluations"][3]["value"] is None
    assert run.heard == [1.0, 3.0, 2.0, 2.5]
    assert weight(tmp_path / "model_best.pth") == -2
    assert weight(tmp_path / "model_final.pth") == -5


@pytest.mark.parametrize("patience, period", [(2, 1), (4, 1), (2, 3)])
@pytest.mark.parametrize("killed_at", [2, 3, 5, 8])
def test_an_interrupted_run_decides_as_if_it_had_not_been(tmp_path, killed_at, patience, period):
    """Killed within an evaluation, whose iteration a checkpoint may already be of."""
    values = [2.0, 3.0, 1.0, 3.5, 3.0, 2.0, 3.5, 1.0, 2.0, 2.0]
    options = {"patience": patience, "period": period}
    whole = Run(tmp_path / "whole", values, **options)
    whole.train(10)
    killed = Run(tmp_path / "killed", values, killed_at=killed_at, **options)
    with contextlib.suppress(KeyboardInterrupt):
        killed.train(10)
    # Killed once more, right after a checkpoint.
    for _ in range(2):
        resumed = Run(tmp_path / "killed", values, **options)
        resumed.train(10, resume=True)
        (tmp_path / "killed" / "last_checkpoint").write_text("model_0000001.pth")
        assert resumed.best.history.evaluations == whole.best.history.evaluations
        for name in ("best.json", "model_best.pth"):
            found, expected = (tmp_path / run / name for run in ("killed", "whole"))
            if name.endswith("json"):
                assert found.read_text() == expected.read_text()
            else:
                assert weight(found) == weight(expected)


def test_a_stopped_run_stays_stopped(tmp_path):
    values = [3.0, 1.0, 1.0, 9.0]
    Run(tmp_path, values, patience=2).train(4)
    again = Run(tmp_path, values, patience=2)
    assert "in 2 evaluations" in again.train(4, resume=True)
    assert weight(tmp_path / "model_final.pth") == -3
    # With more patience it goes on.
    assert Run(tmp_path, values, patience=3).train(4, resume=True) == ""
    assert weight(tmp_path / "model_best.pth") == -4


@pytest.mark.parametrize("values", [[3.0, 1.0], [1.0, 3.0]])
def test_a_run_resumed_at_its_end_leaves_the_files_alone(tmp_path, values):
    """Its last checkpoint is older than the last evaluation, which has been noted all the same."""
    Run(tmp_path, values).train(2)
    best, weights = tmp_path / "best.json", tmp_path / "model_best.pth"
    # The final test adds its own.
    best.write_text(json.dumps({**json.loads(best.read_text()), "test": {"data": {}}}))
    before = best.read_text(), weights.stat().st_mtime_ns
    for _ in range(2):
        again = Run(tmp_path, values)
        again.checkpointer.resume_or_load("", resume=True)
        assert again.best.history.evaluations == [(0, values[0])]
        again.best.finish(1, {})
        assert (best.read_text(), weights.stat().st_mtime_ns) == before
        assert again.best.history.evaluations == list(enumerate(values))
        assert again.best.saved == again.best.history.best
    # Where it has not been noted, the results at hand are.
    best.unlink()
    again.best.history.restart([(0, values[0])])
    again.best.finish(1, {"data": {"bbox": {"AP": 9.0}}})
    assert json.loads(best.read_text())["best"] == {"iteration": 1, "value": 9.0}


def test_an_unknown_metric_is_an_error_that_lists_the_known_ones(tmp_path):
    run = Run(tmp_path, [1.0], metric="data/bbox/mAP")
    with pytest.raises(RunError, match=r"'data/bbox/mAP' for train.best.metric; there are: data/b"):
        run.train(3)
    assert not (tmp_path / "model_best.pth").exists()


def test_a_new_run_forgets_the_best_of_an_older_one(tmp_path):
    Run(tmp_path, [9.0, 9.0]).train(2)
    Run(tmp_path, [math.nan, math.nan]).train(2)
    content = json.loads((tmp_path / "best.json").read_text())
    assert content["best"] is None and content["checkpoint"] is None
    assert not (tmp_path / "model_best.pth").exists()


def test_another_metric_begins_to_count_anew(tmp_path, caplog):
    run = Run(tmp_path, [9.0, 9.0])
    run.train(2)
    other = BestCheckpoint(run.evaluation, run.checkpointer, metric="other/AP")
    with caplog.at_level(logging.WARNING):
        other.load_state_dict(run.best.state_dict())
    assert other.history.evaluations == []
    assert "looks at other/AP" in caplog.text


def decide(folder):
    """In one of two processes: only the first has results, both have to stop."""
    values = [2.0, 1.0, 1.0, 5.0]
    run = Run(folder, values, patience=2)
    run.checkpointer.save_to_disk = dist.get_rank() == 0
    if dist.get_rank() > 0:
        run.evaluation.evaluate = dict
    stopped = run.train(4)
    Path(folder, f"{dist.get_rank()}.json").write_text(
        json.dumps([stopped, run.trainer.iter, run.best.history.evaluations])
    )


@pytest.mark.slow
def test_processes_stop_together(tmp_path):
    launch(decide, num_processes=2, args=(str(tmp_path),))
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1]
    assert found[0][1:] == [2, [[0, 2.0], [1, 1.0], [2, 1.0]]]
    assert weight(tmp_path / "model_best.pth") == -1
