"""The check before a training: what it finds, and that the training never notices it."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.utils import comm
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from fiber_d2.data import register_all_builtin
from fiber_d2.data.captions import DetectionPrompter, SampledDetectionPrompter
from fiber_d2.data.training_set import TrainingPart
from fiber_d2.engine import start_check as module
from fiber_d2.engine.check_data import check_part, check_targets
from fiber_d2.engine.launch import launch
from fiber_d2.engine.start_check import RunPlan, start_check
from fiber_d2.engine.step import StepTrainer
from fiber_d2.text import build_detection_prompts, build_grounding_prompt, load_tokenizer

TOKENIZER = load_tokenizer("shapes")


# ------------------------------------------------------------------ words to tokens and back


@given(
    names=st.lists(
        st.text("abcxyzäß東 -'", min_size=1, max_size=12).filter(lambda name: name.strip()),
        min_size=1,
        max_size=8,
    )
)
def test_every_class_reads_as_itself(names):
    (prompt,) = build_detection_prompts(TOKENIZER, names, max_tokens=1000)
    assert check_targets(prompt, names, TOKENIZER) == []


@given(data=st.data())
def test_tokens_of_another_class_are_noticed(data):
    names = ["red circle", "blue square", "dog", "small triangle", "tv"]
    (prompt,) = build_detection_prompts(TOKENIZER, names)
    order = data.draw(st.permutations(range(len(names))))
    shuffled = replace(prompt, positive_map=prompt.positive_map[list(order)])
    if list(order) == sorted(order):
        assert check_targets(shuffled, names, TOKENIZER) == []
    else:
        with pytest.raises(ValueError, match="the tokens of '.*' read '.*' in the caption"):
            check_targets(shuffled, names, TOKENIZER)


def test_a_prompt_of_another_tokenizer():
    (prompt,) = build_detection_prompts(TOKENIZER, ["dog"])
    with pytest.raises(ValueError, match="are not this tokenizer's"):
        check_targets(replace(prompt, input_ids=prompt.input_ids + 1), ["dog"], TOKENIZER)


def test_part_of_a_word_shares_its_token_with_the_rest():
    caption = "a red circle"
    prompt = build_grounding_prompt(TOKENIZER, caption, [[(3, 12)]])
    (remark,) = check_targets(prompt, [caption[3:12]], TOKENIZER)
    assert "'ed circle' shares tokens with its neighbours: 'red circle'" in remark


def test_two_names_in_one_token_cannot_be_told_apart():
    caption = "a red circle"
    prompt = build_grounding_prompt(TOKENIZER, caption, [[(2, 4)], [(3, 5)]])
    assert torch.equal(prompt.positive_map[0], prompt.positive_map[1])
    with pytest.raises(ValueError, match="'re' and 'ed' have the same tokens"):
        check_targets(prompt, ["re", "ed"], TOKENIZER)


def test_characters_that_a_tokenizer_does_not_know():
    words = {"[UNK]": 0, "dog": 1, ".": 2}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    (prompt,) = build_detection_prompts(tokenizer, ["dog", "cat"])
    with pytest.raises(ValueError, match="'cat' has characters that the tokenizer does not know"):
        check_targets(prompt, ["dog", "cat"], tokenizer)


@pytest.mark.parametrize(
    "templates, expected",
    [
        (None, ["stop sign", "bow"]),
        ("a {} on a road", ["stop sign", "bow"]),
        ([{"name": "stop_board", "suffix": "s"}, {"prefix": "my "}], ["stop board", "bow"]),
    ],
)
def test_classes_are_spelled_out_as_training_words_them(templates, expected):
    names = ["stop_sign", "bow_(weapon)"]
    for prompter in (DetectionPrompter, SampledDetectionPrompter):
        found = prompter(TOKENIZER, names, templates=templates).spelled_out()
        assert [text.strip() for _, texts in found for text in texts] == expected
        for prompt, texts in found:
            assert check_targets(prompt, texts, TOKENIZER) == []


# ------------------------------------------------------------------ data sets


@pytest.fixture
def cfg(config_file, datasets_root):
    """The tiny configuration; its data sets are found."""
    register_all_builtin(str(datasets_root))
    yield LazyConfig.load(str(config_file))
    register_all_builtin()


@pytest.fixture
def loader(cfg):
    return instantiate(cfg.dataloader.train)


def test_data_sets_that_are_well(loader):
    detection, grounding = (check_part(part) for part in loader.dataset.parts)
    assert detection.name == "shapes_detection_train"
    assert detection.summary == "16 images, 12 classes to tokens and back, 4 read"
    assert grounding.summary == "32 images, phrases to tokens and back, 4 read"
    assert detection.warnings == grounding.warnings == []


def other_classes(part, names):
    """The data set with other names of its classes."""
    mapper = copy.copy(part.mapper)
    mapper.prompter = DetectionPrompter(TOKENIZER, names, on_empty="keep")
    return TrainingPart(part.name, part.records, mapper)


def test_classes_that_read_alike_are_named(loader):
    part = loader.dataset.parts[0]
    names = [f"kind {letter}" for letter in "abcdefghijkl"]
    names[3], names[7] = "bow_(weapon)", "bow_(ribbon)"
    (warning,) = check_part(other_classes(part, names)).warnings
    assert warning == "classes that no caption can tell apart: 'bow_(weapon)' = 'bow_(ribbon)'"


def test_a_class_without_words_is_named(loader):
    part = loader.dataset.parts[0]
    names = [f"kind {letter}" for letter in "abcdefghijkl"]
    names[5] = "(none)"
    with pytest.raises(ValueError, match=r"'shapes_detection_train': no token .* \(none\)"):
        check_part(other_classes(part, names))


def test_a_shifted_positive_map_names_image_and_phrase(loader):
    part = loader.dataset.parts[1]
    mapper = copy.copy(part.mapper)
    mapper.prompter = copy.copy(mapper.prompter)
    right = mapper.prompter.for_training

    def shifted(record):
        prompt, rows = right(record)
        return replace(prompt, positive_map=prompt.positive_map.roll(1, dims=1)), rows

    mapper.prompter.for_training = shifted
    with pytest.raises(ValueError, match=r"shapes_grounding_train': image 1: the tokens of"):
        check_part(TrainingPart(part.name, part.records, mapper))


def test_a_broken_image_is_a_warning_and_no_image_is_an_error(loader, tmp_path):
    part = loader.dataset.parts[0]
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    records = [dict(record) for record in part.records]
    records[4]["file_name"] = str(tmp_path / "broken.jpg")
    report = check_part(TrainingPart(part.name, records, part.mapper))
    assert "3 read" in report.summary
    assert "broken.jpg" in report.warnings[0]
    for record in records:
        record["file_name"] = str(tmp_path / "broken.jpg")
    with pytest.raises(ValueError, match=r"none of 4 images can be read. .*broken.jpg"):
        check_part(TrainingPart(part.name, records, part.mapper))


def test_the_generators_stay_where_they_are(loader):
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    check_part(loader.dataset.parts[0])
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()


# ------------------------------------------------------------------ a step that leaves no trace


class Noisy(nn.Module):
    """Draws random numbers and keeps statistics, as dropout and batch normalisation do."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.last = nn.Linear(4, 1)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, batch):
        x = torch.stack([item["image"].flatten() for item in batch])
        return {"loss_a": self.last(self.layers(x)).square().mean(), "loss_b": self.last.bias.sum()}


class Items(torch.utils.data.Dataset):
    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return {"image": self.values[index].reshape(3, 1, 1), "file_name": f"{index}.jpg"}


def loader_of(values):
    return DataLoader(Items(values), batch_size=4, collate_fn=list)


def parts_of(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return state, {name: p.grad for name, p in model.named_parameters()}


PLAN = RunPlan(0, 10, schedule=lambda where: 1.0)


@pytest.fixture
def logged(caplog):
    """Messages of the check by level."""
    caplog.set_level("INFO", logger=module.__name__)

    def logged(level):
        return [r.getMessage() for r in caplog.records if r.levelname == level]

    return logged


def test_a_tried_step_is_the_first_step_and_leaves_no_trace(logged):
    torch.manual_seed(0)
    model = Noisy()
    values = torch.randn(8, 3)
    step = StepTrainer(model, torch.optim.AdamW(model.parameters()))
    state, gradients = parts_of(model)
    generator = torch.get_rng_state()
    start_check(step, loader_of(values), PLAN)
    assert torch.equal(generator, torch.get_rng_state())
    after, gradients_after = parts_of(model)
    assert all(torch.equal(state[name], after[name]) for name in state)
    assert state["layers.1.num_batches_tracked"] == 0
    assert gradients == gradients_after == dict.fromkeys(gradients)
    assert len(step.optimizer.state) == 0
    assert all(m.training for m in model.modules())

    # The same losses, and the norm of the same gradients.
    losses = model(Items(values)[i] for i in range(4))
    sum(losses.values()).backward()
    squares = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
    (table,) = logged("INFO")
    loss_a, loss_b = (float(loss.detach()) for loss in losses.values())
    assert f"loss {loss_a + loss_b:.4g}, loss_a {loss_a:.4g}, loss_b {loss_b:.4g}" in table
    assert f"gradient norm {squares.sqrt().item():.4g}" in table
    assert "4 per process x 1 processes x 1 accumulated = 4" in table


def test_parameters_without_gradient_are_named(logged):
    model = Noisy()
    step = StepTrainer(model, torch.optim.SGD(model.parameters()))
    start_check(step, loader_of(torch.randn(4, 3)), PLAN)
    (warning,) = logged("WARNING")
    assert "1 trainable parameters get no gradient: unused." in warning


def test_a_loss_that_is_not_finite_names_its_images():
    model = Noisy()
    values = torch.randn(8, 3)
    values[1] = torch.nan
    step = StepTrainer(model, torch.optim.SGD(model.parameters()))
    message = r"not finite: loss_a = nan. Its images: 0.jpg, 1.jpg, .*--skip-start-check"
    with pytest.raises(ValueError, match=message):
        start_check(step, loader_of(values), PLAN)
    # The statistics have not seen it.
    assert torch.isfinite(model.layers[1].running_mean).all()


class Root(nn.Module):
    """Its loss is finite at 0, its gradient is not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, batch):
        return {"loss": self.weight.sqrt().sum()}


def test_a_gradient_that_is_not_finite_names_its_parameter():
    model = Root()
    step = StepTrainer(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match="gradients that are not finite, of weight"):
        start_check(step, loader_of(torch.randn(4, 3)), PLAN)


def test_nothing_to_learn():
    model = Root()
    model.forward = lambda batch: {"loss": torch.zeros(())}
    step = StepTrainer(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match="no loss depends on a trainable parameter"):
        start_check(step, loader_of(torch.randn(4, 3)), PLAN)


def out_of_memory(batch):
    raise torch.cuda.OutOfMemoryError("Tried to allocate 2 GiB.")


def test_a_batch_that_does_not_fit_the_memory():
    model = Root()
    model.forward = out_of_memory
    step = StepTrainer(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match="a batch of 4 images, padded to 1 x 1, does") as caught:
        start_check(step, loader_of(torch.randn(4, 3)), PLAN)
    assert str(caught.value).count("start-up check failed") == 1
    assert "2 GiB. (--skip-start-check trains" in str(caught.value)


def check_where_one_has_less_memory(folder):
    """In one of two processes."""
    model = Noisy()
    if comm.get_rank() == 1:
        model.forward = out_of_memory
    step = StepTrainer(model, torch.optim.SGD(model.parameters()))
    try:
        start_check(step, loader_of(torch.randn(4, 3)), PLAN)
    except ValueError as error:
        Path(folder, f"{comm.get_rank()}.txt").write_text(str(error))


@pytest.mark.slow
def test_processes_stop_together_where_one_has_too_little_memory(tmp_path):
    launch(check_where_one_has_less_memory, num_processes=2, args=(str(tmp_path),))
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))
    assert first == second
    assert first.startswith("The start-up check failed (process 1): a batch of 4 images")


def test_another_kind_of_loader_is_left_alone(logged):
    model = Noisy()
    endless = iter(lambda: [{"image": torch.randn(3)}], None)
    start_check(StepTrainer(model, torch.optim.SGD(model.parameters())), endless, PLAN)
    (warning,) = logged("WARNING")
    assert "no step was tried" in warning


def test_too_little_memory_is_a_warning(monkeypatch, logged):
    monkeypatch.setattr("fiber_d2.engine.memory.device_bytes", lambda device: 100)
    model = nn.Sequential(nn.Linear(3, 4))
    model.forward = lambda batch: {
        "loss": nn.Sequential.forward(model, batch[0]["image"].flatten()).sum()
    }
    step = StepTrainer(model, torch.optim.SGD(model.parameters()))
    start_check(step, loader_of(torch.randn(4, 3)), PLAN)
    (warning,) = logged("WARNING")
    # 16 weights and 16 gradients of 4 bytes; the layer keeps the 3 numbers it was given, a view of
    # 12 that live in one storage.
    assert "about 0.0 MiB, but there are 0.0 MiB for this process" in warning


# ------------------------------------------------------------------ the real thing


def test_the_table_of_a_training_of_several_data_sets(cfg, logged):
    cfg.dataloader.train.weights = [1, 3]
    loader = instantiate(cfg.dataloader.train)
    drawn = loader.dataset.num_drawn
    model = instantiate(cfg.model)
    step = StepTrainer(model, torch.optim.AdamW(model.parameters()), accumulate=3)
    schedule = instantiate(cfg.lr_multiplier)
    start_check(step, loader, RunPlan(2, 40, schedule=schedule, averaged=True))
    assert loader.dataset.num_drawn == drawn
    (table,) = logged("INFO")
    table = " ".join(table.split())
    assert "images per step 4 per process x 1 processes x 3 accumulated = 12 " in table
    # 480 draws, a quarter of 16 images, the rest of 32.
    assert "length 40 iterations = 480 images = 7.5 epochs of shapes_detection_train, " in table
    assert "11.25 epochs of shapes_grounding_train, from iteration 2 on " in table
    assert "learning rate all 0.001; warm-up of " in table
    size = sum(p.numel() for p in model.parameters()) * 4
    assert f"optimizer {2 * size / 2**20:.1f} MiB" in table
    assert "positives_per_image" in table
    assert logged("WARNING") == []


@pytest.mark.slow
def test_a_training_does_not_notice_the_check(tmp_path, dropout_config_file, run):
    config = ("--config-file", dropout_config_file)
    overrides = ("dataloader.test=null", "train.max_iter=3")
    logs = {}
    for name, more in (("checked", []), ("unchecked", ["--skip-start-check"])):
        code, _, err = run(*config, *more, *overrides, f"train.output_dir={name}")
        assert (code, err) == (0, "")
        logs[name] = (tmp_path / name / "log.txt").read_text()
    assert "Start-up check passed in" in logs["checked"]
    assert "12 classes to tokens and back" in logs["checked"]
    assert "Start-up check" not in logs["unchecked"]
    first, second = (
        torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"] for name in logs
    )
    assert all(torch.equal(first[name], second[name]) for name in first)

    # A resumed training is checked where it goes on, and weights that were spoilt are noticed.
    path = tmp_path / "checked" / "model_final.pth"
    (tmp_path / "checked" / "last_checkpoint").write_text(path.name)
    spoilt = torch.load(path, weights_only=True)
    spoilt["model"]["head.bbox_pred.weight"][:] = torch.nan
    spoilt["iteration"] = spoilt["trainer"]["iteration"] = 1
    torch.save(spoilt, path)
    code, _, err = run(*config, "--resume", *overrides, "train.output_dir=checked")
    assert code == 2
    (line,) = err.splitlines()
    assert "The start-up check failed: the first batch has a loss that is not finite" in line
    assert "loss_box = nan" in line
    log = (tmp_path / "checked" / "log.txt").read_text()
    assert "Resuming after iteration 1" in log


BROKEN = """
import os

from detectron2.utils import comm
from fiber_d2.data import builtin, register_coco_json

root = os.environ["DETECTRON2_DATASETS"] + "/shapes"
images = root + "/images/train"
if os.environ.get("LOCAL_BROKEN") == "1" and comm.get_rank() == 1:
    images = os.environ["BROKEN_IMAGES"]
register_coco_json("mine", root + "/annotations/instances_train.json", images)
"""


@pytest.mark.slow
def test_processes_stop_together_where_one_cannot_read(tmp_path, config_file, run, datasets_root):
    (tmp_path / "mine.py").write_text(BROKEN)
    broken = tmp_path / "broken"
    shutil.copytree(datasets_root / "shapes" / "images" / "train", broken)
    for path in broken.iterdir():
        path.write_bytes(b"no image")
    arguments = [
        *("--config-file", config_file, "--num-gpus", 2, "--import", "mine.py"),
        *("dataloader.train.datasets=[mine]", "dataloader.test=null", "train.max_iter=1"),
    ]
    code, _, err = run(*arguments, LOCAL_BROKEN="1", BROKEN_IMAGES=str(broken))
    assert code == 2
    (line,) = err.splitlines()
    assert "The start-up check failed (process 1): Data set 'mine': none of 4 images" in line
    code, _, err = run(*arguments, LOCAL_BROKEN="0")
    assert (code, err) == (0, "")
    log = (tmp_path / "output" / "log.txt").read_text()
    assert "2 per process x 2 processes x 1 accumulated = 4" in log
