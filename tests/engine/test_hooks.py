import os
import random

import pytest
import torch
from detectron2.engine import HookBase
from torch import nn

from fiber_d2.engine.checkpointer import FiberCheckpointer
from fiber_d2.engine.errors import NonFiniteError, RunError
from fiber_d2.engine.hooks import CheckpointHook, EvaluationHook, TrainingClock
from fiber_d2.engine.step import StepTrainer


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, batch):
        return {"loss": (self.w * batch).sum()}


def make_trainer(batches=None, log_period=100, **options):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [torch.ones(1)] * 100 if batches is None else batches
    return StepTrainer(model, optimizer, batches, log_period=log_period, **options)


def files(folder):
    return sorted(name for name in os.listdir(folder) if name.endswith(".pth"))


def test_only_the_newest_checkpoints_stay_also_after_a_restart(tmp_path):
    for start, end in ((0, 6), (4, 10)):
        trainer = make_trainer()
        checkpointer = FiberCheckpointer(trainer.model, str(tmp_path), trainer=trainer)
        trainer.register_hooks([CheckpointHook(checkpointer, 2, max_to_keep=2)])
        trainer.train(start, end)
    assert files(tmp_path) == ["model_0000007.pth", "model_0000009.pth", "model_final.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_a_new_run_leaves_checkpoints_of_an_older_one_alone(tmp_path):
    FiberCheckpointer(Model(), str(tmp_path)).save("model_0000999")
    trainer = make_trainer()
    checkpointer = FiberCheckpointer(trainer.model, str(tmp_path), trainer=trainer)
    trainer.register_hooks([CheckpointHook(checkpointer, 1, max_to_keep=1)])
    trainer.train(0, 3)
    assert files(tmp_path) == ["model_0000002.pth", "model_0000999.pth", "model_final.pth"]


def test_weights_of_a_failed_run_do_not_replace_good_ones(tmp_path):
    batches = [torch.ones(1)] * 4 + [torch.full((1,), torch.nan)] * 4
    trainer = make_trainer(batches, max_nonfinite=2)
    checkpointer = FiberCheckpointer(trainer.model, str(tmp_path), trainer=trainer)
    trainer.register_hooks([CheckpointHook(checkpointer, 3)])
    with pytest.raises(NonFiniteError, match="iteration 5"):
        trainer.train(0, 8)
    assert files(tmp_path) == ["model_0000002.pth"]


def test_evaluation_comes_by_period_and_once_at_the_end():
    trainer = make_trainer()
    seen = []
    hook = EvaluationHook(2, lambda: seen.append(trainer.iter) or {"a": {"b": {"AP": 1.5}}})
    trainer.register_hooks([hook])
    trainer.train(0, 6)
    assert seen == [1, 3, 5]
    assert trainer.storage.latest()["a/b/AP"] == (1.5, 5)
    assert hook.results == {"a": {"b": {"AP": 1.5}}}


def test_no_evaluation_after_a_failure_in_the_last_iteration():
    trainer = make_trainer(batches=[torch.ones(1)] * 2)
    seen = []
    trainer.register_hooks([EvaluationHook(0, lambda: seen.append(1) or {})])
    with pytest.raises(RunError):
        trainer.train(0, 3)
    assert seen == []


def test_evaluation_does_not_change_the_random_numbers_of_training():
    class Record(HookBase):
        def __init__(self):
            self.numbers = []

        def after_step(self):
            self.numbers.append((random.random(), torch.rand(()).item()))

    records = []
    for period in (0, 1):
        random.seed(3)
        torch.manual_seed(3)
        trainer = make_trainer()
        record = Record()
        draws = EvaluationHook(period, lambda: {"x": random.random() + torch.rand(()).item()})
        trainer.register_hooks([draws, record])
        trainer.train(0, 4)
        records.append(record.numbers)
    assert records[0] == records[1]


def test_the_clock_goes_on_after_a_restart():
    trainer = make_trainer()
    clock = TrainingClock()
    trainer.register_hooks([clock])
    trainer.train(0, 2)
    assert clock.seconds > 0
    other = TrainingClock()
    restarted = make_trainer()
    restarted.register_hooks([other])
    restarted.load_state_dict(trainer.state_dict())
    assert other.seconds == clock.seconds
