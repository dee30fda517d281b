"""What a training leaves for those who watch it."""

import json
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import TrainerBase
from detectron2.utils.events import EventStorage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from fiber_d2.data import register_all_builtin
from fiber_d2.engine import watch
from fiber_d2.engine.step import StepTrainer
from fiber_d2.engine.training_hooks import TrainingOptions
from fiber_d2.engine.training_pictures import TrainingPictures, describe_item, evaluation_mode
from fiber_d2.engine.watch import WatchHook
from fiber_d2.engine.writers import TextLog, WandbWriter, build_writers
from fiber_d2.modeling.metrics import collected_metrics, record_metric
from fiber_d2.text import build_grounding_prompt, load_tokenizer

# ------------------------------------------------------------------ metrics beside the losses


def test_metrics_go_to_the_innermost_collector():
    record_metric("lost", torch.ones(()))
    with collected_metrics() as outer:
        record_metric("a", torch.ones((), requires_grad=True))
        with collected_metrics() as inner:
            record_metric("b", torch.zeros(()))
        record_metric("c", torch.ones(()))
    assert list(outer) == ["a", "c"] and list(inner) == ["b"]
    assert not outer["a"].requires_grad


class Counting(nn.Module):
    """Loss |w|^2, and the number of its images."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))

    def forward(self, batch):
        record_metric("images", torch.tensor(float(len(batch))))
        return {"loss": self.w.square().sum()}


def test_metrics_are_logged_but_not_minimised():
    model = Counting()
    batches = iter([[0] * 2, [0] * 4])
    step = StepTrainer(model, torch.optim.SGD(model.parameters(), lr=0.0), batches, accumulate=2)
    step.iter, step.max_iter = 0, 1
    with EventStorage() as step.storage:
        step.run_step()
        latest = {name: value for name, (value, _) in step.storage.latest().items()}
    assert latest["total_loss"] == latest["loss"] == 2
    assert latest["metrics/images"] == 3
    assert torch.equal(model.w.grad, 2 * model.w.detach())
    assert step.num_images == 6
    assert step.last_batch == [0] * 4


# ------------------------------------------------------------------ speed, and what is waited for


class Trainer(TrainerBase):
    """Steps of invented lengths: (seconds, of which it waited for data), one pair per iteration."""

    def __init__(self, clock, times, period, num_workers=2):
        super().__init__()
        self.clock, self.times, self.period = clock, times, period
        parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
        self.model = nn.ParameterDict({"bias": parameters[0], "weight": parameters[1]})
        groups = [{"params": [p], "lr": 0.1 * (n + 1)} for n, p in enumerate(parameters)]
        self.optimizer = torch.optim.SGD(groups)
        self.num_images = 0
        self.data_loader = SimpleNamespace(num_workers=num_workers)

    def run_step(self):
        seconds, waited = self.times[self.iter]
        self.clock.now += seconds
        self.num_images += 6
        self.storage.put_scalar("data_time", waited)


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(watch.time, "perf_counter", lambda: clock.now)
    return clock


def watched(clock, times, period=5, start=0, **kwargs):
    trainer = Trainer(clock, times, period)
    trainer.register_hooks([WatchHook(trainer, trainer.model, period=period, **kwargs)])
    trainer.train(start, len(times))
    return trainer.storage


def history(storage, name):
    return {iteration: value for value, iteration in storage.history(name).values()}


def test_speed_is_that_of_the_period(clock):
    times = [(2.0, 0.5)] * 5 + [(1.0, 0.5)] * 5 + [(3.0, 0.0)]
    storage = watched(clock, times)
    assert history(storage, "images_per_second") == {4: 3.0, 9: 6.0, 10: 2.0}
    assert history(storage, "data_time_share") == {4: 0.25, 9: 0.5, 10: 0.0}
    assert history(storage, "lr/head_bias") == dict.fromkeys([4, 9, 10], 0.1)
    assert history(storage, "lr/head") == dict.fromkeys([4, 9, 10], 0.2)
    assert min(history(storage, "host_memory_gib").values()) > 0


def test_a_step_that_was_left_out_waited_for_nothing(clock, monkeypatch):
    right = Trainer.run_step

    def run_step(self):
        right(self)
        if self.iter == 2:
            del self.storage.history("data_time").values()[-1]

    monkeypatch.setattr(Trainer, "run_step", run_step)
    storage = watched(clock, [(1.0, 0.5)] * 5)
    assert history(storage, "data_time_share") == {4: 0.4}


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.name == watch.__name__]


def test_waiting_for_data_is_a_warning_that_names_the_remedy(clock, caplog, monkeypatch):
    monkeypatch.setattr(watch, "_num_cores", lambda: 16)
    watched(clock, [(2.0, 0.8)] * 140, period=10)
    (message,) = warnings_of(caplog)
    assert "took 40 % of the last 100 iterations (0.8 of 2 seconds each)" in message
    assert "now 2 for each of 1 processes that share 16 CPU cores" in message
    assert "Raise num_workers (dataloader.train.num_workers" in message


@pytest.mark.parametrize("loaders", [16, 20])
def test_where_all_cores_load_more_workers_are_no_remedy(clock, caplog, monkeypatch, loaders):
    monkeypatch.setattr(watch, "_num_cores", lambda: 16)
    trainer = Trainer(clock, [(2.0, 0.8)] * 140, 10, num_workers=loaders)
    trainer.register_hooks([WatchHook(trainer, trainer.model, period=10)])
    trainer.train(0, 140)
    (message,) = warnings_of(caplog)
    assert "as many loading processes as this machine can use" in message
    assert "Raise" not in message


@pytest.mark.parametrize(
    "times, start",
    [
        # Below the share; too few iterations after the warm-up; slow while workers start only.
        ([(2.0, 0.59)] * 300, 0),
        ([(2.0, 1.9)] * 109, 0),
        ([(2.0, 0.0)] * 50 + [(2.0, 1.9)] * 109, 50),
        ([(100.0, 100.0)] * 10 + [(2.0, 0.1)] * 300, 0),
    ],
)
def test_no_warning(clock, caplog, times, start):
    watched(clock, times, period=1, start=start)
    assert warnings_of(caplog) == []


def test_the_warning_is_repeated_rarely(clock, caplog):
    watched(clock, [(2.0, 1.0)] * 10_120, period=20)
    assert len(warnings_of(caplog)) == 3  # after 120, 5120 and 10120 iterations


# ------------------------------------------------------------------ captions and pictures


def test_a_training_input_in_words():
    tokenizer = load_tokenizer("shapes")
    caption = "a red circle left of a dog"
    prompt = build_grounding_prompt(tokenizer, caption, [[(2, 12)], [(23, 26)]])
    rows = prompt.positive_map[[0, 0, 1]] > 0
    rows = torch.cat([rows, torch.zeros_like(rows[:1])])
    instances = SimpleNamespace(
        gt_positive_map=rows, gt_boxes=SimpleNamespace(tensor=torch.zeros(4, 4))
    )
    item = {"image_id": 7, "file_name": "7.jpg", "prompt": prompt, "instances": instances}
    assert describe_item(item, tokenizer).splitlines() == [
        "image 7 (7.jpg)",
        f"  caption ({prompt.num_tokens} tokens): {caption}",
        "  boxes (4): red circle x2, dog x1, (no word) x1",
    ]
    # A caption that was cut: what is beyond its tokens is tied to nothing.
    short = build_grounding_prompt(
        tokenizer, caption, [[(2, 12)]], max_tokens=6, on_overflow="truncate"
    )
    instances.gt_positive_map = short.positive_map > 0
    assert "boxes (1): red circle x1" in describe_item({**item, "prompt": short}, tokenizer)


def test_evaluation_mode_puts_every_module_back():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))
    model[1][1].eval()  # frozen
    modes = [m.training for m in model.modules()]
    with pytest.raises(KeyError), evaluation_mode(model):
        assert not any(m.training for m in model.modules())
        raise KeyError
    assert [m.training for m in model.modules()] == modes


@pytest.fixture
def cfg(dropout_config_file, datasets_root):
    register_all_builtin(str(datasets_root))
    yield LazyConfig.load(str(dropout_config_file))
    register_all_builtin()


def test_pictures_change_nothing(cfg, tmp_path):
    """Trained with and without them, a model with dropout has the same weights."""
    weights = []
    for period in (None, 2):
        torch.manual_seed(0)
        model = instantiate(cfg.model)
        loader = instantiate(cfg.dataloader.train)
        step = StepTrainer(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loader)
        if period:
            hook = TrainingPictures(
                step, model, "shapes", output_dir=str(tmp_path), period=period, texts=TextLog()
            )
            step.register_hooks([hook])
        step.train(0, 3)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    folder = tmp_path / "pictures" / "training"
    assert [path.name for path in folder.iterdir()] == ["iteration_0000001.png"]
    (name, picture, iteration) = step.storage._vis_data[0]
    assert (name, iteration, picture.shape[0], picture.dtype) == ("train/pictures", 1, 3, np.uint8)
    text = (tmp_path / "prompts.txt").read_text()
    # At the first iteration, and with the pictures: four images each.
    assert [line for line in text.splitlines() if line.startswith("It")] == [
        "Iteration 0",
        "Iteration 1",
    ]
    assert text.count("  caption (") == 8


# ------------------------------------------------------------------ wandb


class FakeWandb(types.ModuleType):
    """Remembers what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.calls = []
        self.rows = []
        self.finished = False
        self.id = "r1"

    def init(self, **kwargs):
        self.calls.append(kwargs)
        return self

    def log(self, row, step):
        self.rows.append((step, row))

    def finish(self):
        self.finished = True

    @staticmethod
    def Image(pixels):
        return pixels


def test_wandb_gets_numbers_and_pictures(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    writers = build_writers(str(tmp_path), 10, wandb={"project": "p", "mode": "offline"})
    picture = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
    with EventStorage() as storage:
        for iteration in (0, 1):
            storage.iter = iteration
            storage.put_scalar("loss", 2.0 + iteration, smoothing_hint=False)
            if iteration == 1:
                storage.put_image("train/pictures", picture)
            for writer in writers:
                writer.write()
        for writer in writers[1:]:
            writer.write()
            writer.close()
    assert fake.calls == [
        {"dir": str(tmp_path), "resume": "allow", "project": "p", "mode": "offline"}
    ]
    assert [step for step, _ in fake.rows] == [0, 1]
    assert fake.rows[0][1]["loss"] == 2 and fake.rows[1][1]["loss"] == 3
    assert np.array_equal(fake.rows[1][1]["train/pictures"], picture.transpose(1, 2, 0))
    assert fake.finished
    # A resumed training goes on with the same run; what the user says has the last word.
    WandbWriter(str(tmp_path), {"project": "p"})
    WandbWriter(str(tmp_path), {"id": "mine", "resume": "must"})
    assert fake.calls[1] == {"dir": str(tmp_path), "resume": "allow", "id": "r1", "project": "p"}
    assert fake.calls[2]["id"] == "mine" and fake.calls[2]["resume"] == "must"
    # TensorBoard has the picture as well.
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["images"] == ["train/pictures"]


def test_wandb_that_is_not_installed_is_noticed_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    TrainingOptions(output_dir="o", max_iter=1)
    with pytest.raises(ValueError, match="wandb is not installed: run `pip install wandb`"):
        TrainingOptions(output_dir="o", max_iter=1, wandb={"project": "p"})


def test_a_negative_period_of_pictures():
    with pytest.raises(ValueError, match="picture_period is -1"):
        TrainingOptions(output_dir="o", max_iter=1, picture_period=-1)


# ------------------------------------------------------------------ whole runs


def read_events(folder):
    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0}).Reload()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_what_a_run_writes(tmp_path, config_file, run, processes):
    code, _, err = run(
        *("--config-file", config_file, "--num-gpus", processes, "train.picture_period=2"),
        *("train.output_dir=out", "train.max_iter=4", "train.checkpointer.period=100"),
        "dataloader.test=null",
    )
    assert (code, err) == (0, "")
    out = tmp_path / "out"
    events = read_events(out)
    tags = events.Tags()
    expected = {
        *("total_loss", "loss_token", "loss_box", "loss_centerness", "grad_norm", "lr", "lr/all"),
        *("lr/all_bias", "metrics/positives_per_image", "images_per_second", "data_time"),
        *("data_time_share", "host_memory_gib", "time"),
    }
    assert expected <= set(tags["scalars"])
    rows = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    logged = {row["iteration"]: row for row in rows}
    for name in ("metrics/positives_per_image", "grad_norm", "images_per_second"):
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx({i: row[name] for i, row in logged.items()}, rel=1e-6)
        assert min(found.values()) > 0
    # The rates of the groups differ by the factor of biases, whatever the schedule does.
    assert logged[3]["lr/all_bias"] == pytest.approx(2 * logged[3]["lr/all"])

    assert [event.step for event in events.Images("train/pictures")] == [1, 3]
    texts = events.Tensors("train/prompts/text_summary")
    assert [event.step for event in texts] == [0, 1, 3]
    shown = texts[0].tensor_proto.string_val[0].decode()
    first = (out / "prompts.txt").read_text().split("Iteration 1\n")[0]
    images = [line for line in first.splitlines() if line.startswith("image ")]
    # Of the main process's share of the batch.
    assert len(images) == 4 // processes
    assert all(line in shown for line in images)
    assert len(list((out / "pictures" / "training").glob("*.png"))) == 2


YAML = """
MODEL:
  DEVICE: cpu
  FIBER:
    VISION: {EMBED_DIM: 16, DEPTHS: [1, 1, 2, 1], NUM_HEADS: [1, 1, 2, 2], WINDOW: 2,
             FUSED_BLOCKS: [0, 0, 1, 1]}
    TEXT: {VOCAB_SIZE: 2048, DIM: 32, NUM_LAYERS: 2, NUM_HEADS: 2, MLP_DIM: 64}
    NECK: {OUT_CHANNELS: 16}
    TOWER: {NUM_BLOCKS: 1, NORM_GROUPS: 4}
FIBER:
  TOKENIZER: shapes
  TRAIN: {LOG_PERIOD: 1, PICTURE_PERIOD: 2}
DATASETS:
  TRAIN: ("shapes_detection_train",)
DATALOADER: {NUM_WORKERS: 0}
SOLVER:
  IMS_PER_BATCH: 2
  MAX_ITER: 2
  STEPS: (1,)
INPUT:
  MIN_SIZE_TRAIN: (64,)
  MAX_SIZE_TRAIN: 64
OUTPUT_DIR: out
SEED: 1
VERSION: 2
"""


@pytest.mark.slow
def test_what_a_run_of_a_yaml_file_writes(tmp_path, run):
    path = tmp_path / "config.yaml"
    path.write_text(YAML)
    code, _, err = run("--config-file", path)
    assert (code, err) == (0, "")
    out = tmp_path / "out"
    log = (out / "log.txt").read_text()
    assert "Start-up check passed" in log
    assert "2 per process x 1 processes x 1 accumulated = 2" in log
    events = read_events(out)
    assert "metrics/positives_per_image" in events.Tags()["scalars"]
    assert [event.step for event in events.Images("train/pictures")] == [1]
    assert (out / "prompts.txt").exists()

    code, _, err = run("--config-file", path, "--skip-start-check", "OUTPUT_DIR", "unchecked")
    assert (code, err) == (0, "")
    assert "Start-up check" not in (tmp_path / "unchecked" / "log.txt").read_text()
    code, _, err = run("--config-file", path, "FIBER.TRAIN.WANDB.ENABLED", "True")
    assert code == 2
    assert "wandb is not installed" in err
