"""configs/pretrain, finetune and refexp: published hyper-parameters, and two iterations of each."""

import ast
import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import get_cfg, instantiate
from detectron2.data import transforms as T
from omegaconf import DictConfig
from torch import nn

from fiber_d2.data import ResizeShortestEdgeTruncated
from fiber_d2.data.catalog import BUILTIN, ODINW35
from fiber_d2.engine.main import main
from fiber_d2.engine.optimizer import published_param_groups
from fiber_d2.engine.overrides import load_config
from fiber_d2.engine.resolve import config_text
from fiber_d2.engine.schedule_hooks import WeightDecaySchedule
from fiber_d2.engine.schedules import PlateauSchedule
from fiber_d2.engine.train import build_optimizer, run_lazy_config

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"
# They go on from the quickstart, and have no published numbers.
OURS = ("custom_coco", "fewshot_small")
NAMES = sorted(
    f"{folder}/{path.stem}"
    for folder in ("pretrain", "finetune", "refexp")
    for path in (CONFIGS / folder).glob("*.py")
    if path.stem not in OURS
)


def path_of(name):
    return str(CONFIGS / f"{name}.py")


# SPEC_DATA_EVAL 6.16, the table: images per step, rates, weight decay, limit of gradients, EMA.
PRETRAIN = {"batch": 64, "lr": 1e-4, "text_lr": 1e-5, "decay": 1e-2, "clip": 1.0, "ema": 0.999}
FINETUNE = {"batch": 32, "lr": 1e-5, "text_lr": 1e-5, "decay": 1e-4, "clip": None, "ema": 0.999}
REFEXP = {**FINETUNE, "batch": 16}
ODINW = {"batch": 4, "lr": 1e-4, "text_lr": 1e-5, "decay": 0.05, "clip": 1.0, "ema": None}
# Section 6.10 and 8: frozen stages, fusion v3; 6.9 and 8: checkpointing of Swin (DyHead always).
PRETRAIN.update(frozen=2, swin_checkpoint=False)
FINETUNE.update(frozen=-1, swin_checkpoint=True)
REFEXP.update(frozen=-1, swin_checkpoint=True)
ODINW.update(frozen=2, swin_checkpoint=False)
# Section 8: v3 for referring expressions.
V3 = {"pretrain/mixed_flickr_objects365_refexpclean", *(n for n in NAMES if "refexp/" in n)}
# Sections 6.16 and 8: warm-up and steps. 24 or 20 epochs of the images that the headers name.
LENGTHS = {
    "pretrain/mixed_flickr_objects365": (2000, 800_000),
    "pretrain/mixed_flickr_objects365_refexpclean": (5000, 800_000),
    "finetune/coco": (2000, 24 * 117_266 // 32),
    "finetune/lvis": (2000, 24 * 100_170 // 32),
    "refexp/refcoco": (2000, 20 * 120_624 // 16),
    "refexp/refcocoplus": (2000, 20 * 120_191 // 16),
    "refexp/refcocog": (2000, 20 * 80_512 // 16),
}
# Section 8 and 5.15.
DATASETS = {
    "pretrain/mixed_flickr_objects365": (
        ["mixed_train_no_coco", "flickr30k_train", "object365_dt_train"],
        "coco_grounding_val",
    ),
    "pretrain/mixed_flickr_objects365_refexpclean": (
        ["mixed_train_no_coco_refexpclean", "flickr30k_train", "object365_dt_train"],
        "coco_grounding_val",
    ),
    "finetune/coco": (["coco_grounding_train"], "coco_grounding_val"),
    "finetune/lvis": (["lvis_grounding_train"], "lvis_evaluation_mini_val"),
    "refexp/refcoco": (["refcoco_train"], "refcoco_val"),
    "refexp/refcocoplus": (["refcoco+_train"], "refcoco+_val"),
    "refexp/refcocog": (["refcocog_train"], "refcocog_val"),
}
# Section 5.11: shots and repeats.
SHOTS = {"odinw_full": (0, 1), "odinw_1shot": (1, 8), "odinw_3shot": (3, 4)}
SHOTS.update({"odinw_5shot": (5, 2), "odinw_10shot": (10, 1)})


def published(name):
    folder, stem = name.split("/")
    if "odinw" in stem:
        return ODINW
    return {"pretrain": PRETRAIN, "finetune": FINETUNE, "refexp": REFEXP}[folder]


def test_every_recipe_is_described():
    text = (CONFIGS / "README.md").read_text()
    assert NAMES == sorted([*LENGTHS, *(f"finetune/{stem}" for stem in SHOTS)])
    for name in NAMES:
        assert f"`{name}.py`" in text
        header = ast.get_docstring(ast.parse(Path(path_of(name)).read_text()))
        assert f"train_net.py --config-file configs/{name}.py" in header


@pytest.mark.parametrize("name", NAMES)
def test_arithmetic_of_the_header(name):
    """What it says is what the configuration has."""
    cfg = load_config(path_of(name), [])
    header = ast.get_docstring(ast.parse(Path(path_of(name)).read_text()))
    numbers = {int(text.replace(",", "")) for text in re.findall(r"\b\d[\d,]*\b", header)}
    assert cfg.dataloader.train.total_batch_size in numbers
    if "odinw" in name:
        assert cfg.train.epochs in numbers
    else:
        assert cfg.train.max_iter in numbers
        match = re.search(r"(\d+) epochs x ([\d,]+) / (\d+) = ([\d,]+) steps", header)
        if "pretrain" not in name:
            epochs, images, batch, steps = (int(x.replace(",", "")) for x in match.groups())
            assert steps == epochs * images // batch == cfg.train.max_iter


@pytest.mark.parametrize("name", NAMES)
def test_published_optimisation(name):
    cfg = load_config(path_of(name), [])
    expected = published(name)
    train, optimizer = cfg.train, cfg.optimizer
    assert cfg.dataloader.train.total_batch_size == expected["batch"]
    assert train.scaling == {"reference_batch_size": expected["batch"], "rule": None}
    assert train.accumulate == 1
    # Section 6.2.
    made = build_optimizer(cfg, nn.Linear(1, 1))
    assert isinstance(made, torch.optim.AdamW) and not made.defaults["amsgrad"]
    assert (tuple(made.defaults["betas"]), made.defaults["eps"]) == ((0.9, 0.999), 1e-8)
    assert optimizer.lr == optimizer.params.base_lr == expected["lr"]
    assert optimizer.lr * optimizer.params.text_lr_factor == pytest.approx(expected["text_lr"])
    assert optimizer.weight_decay == optimizer.params.weight_decay == expected["decay"]
    # Section 6.1.
    assert optimizer.params._target_ in (
        published_param_groups,
        "fiber_d2.engine.optimizer.published_param_groups",
    )
    assert (optimizer.params.vision_lr_factor, optimizer.params.bias_lr_factor) == (1.0, 2.0)
    assert optimizer.params.weight_decay_bias == 0
    assert optimizer.params.weight_decay_norm_factor == 1.0
    assert train.clip_grad == expected["clip"]
    assert train.ema == (None if expected["ema"] is None else {"decay": expected["ema"]})
    # Section 6.7.
    assert train.amp.enabled


@pytest.mark.parametrize("name", sorted(LENGTHS))
def test_published_schedule(name):
    cfg = load_config(path_of(name), [])
    warmup, length = LENGTHS[name]
    assert (cfg.train.max_iter, cfg.train.epochs) == (length, None)
    schedule = instantiate(cfg.lr_multiplier)
    assert schedule.milestones == [round(0.67 * length), round(0.89 * length)]
    factors = {i: schedule(i / length) for i in (0, warmup // 2, warmup)}
    assert factors == pytest.approx({0: 1e-3, warmup // 2: 0.5005, warmup: 1.0})
    first, second = schedule.milestones
    assert schedule((first - 1) / length) == pytest.approx(1.0)
    assert schedule(first / length) == pytest.approx(0.1)
    assert schedule(second / length) == pytest.approx(0.01)
    assert cfg.train.best is None and cfg.train.early_stop is None
    # Section 6.6.
    falling = cfg.train.weight_decay_schedule
    if "pretrain" in name:
        hook = WeightDecaySchedule(max_iter=length, **falling)
        assert ([math.ceil(i) for i in hook.thresholds], hook.gamma) == ([357_512, 474_904], 0.1)
    else:
        assert falling is None


@pytest.mark.parametrize("name", [name for name in NAMES if "odinw" in name])
def test_published_plateau(name):
    """Sections 6.11, 6.13, 6.16, 5.11."""
    cfg = load_config(path_of(name), ["data.name=Raccoon"])
    schedule = instantiate(cfg.lr_multiplier)
    assert isinstance(schedule, PlateauSchedule)
    assert (schedule.gamma, schedule.patience, schedule.threshold) == (0.1, 3, 1e-4)
    assert (schedule.min_lr, schedule.mode, schedule.warmup_iters) == (1e-6, "max", 0)
    assert cfg.train.early_stop == {"patience": 8}
    assert cfg.train.best == {"metric": "odinw_Raccoon_val/bbox/AP", "mode": "max"}
    # Section 6.14: the best one is tested once.
    assert cfg.train.test_best == ["odinw_Raccoon_test"]
    assert (cfg.train.epochs, cfg.train.eval_epochs) == (200, 1)
    shots, repeats = SHOTS[name.split("/")[1]]
    loader = cfg.dataloader.train
    assert (loader.get("few_shot", 0), loader.get("repeats", [1])) == (shots, [repeats])
    assert loader.datasets == ["odinw_Raccoon_train"]
    assert cfg.dataloader.test.dataset == "odinw_Raccoon_val"
    assert cfg.train.tuning == "full"
    assert cfg.train.weight_decay_schedule is None


@pytest.mark.parametrize("name", NAMES)
def test_published_model(name):
    cfg = load_config(path_of(name), [])
    expected = published(name)
    vision, head = cfg.model.backbone.vision, cfg.model.head
    assert vision.query_norm == (name in V3)
    # Section 8: embed 128, depths 2/2/18/2, heads 4/8/16/32, window 12; 6.16: drop path.
    assert (vision.embed_dim, vision.window, vision.drop_path) == (128, 12, 0.4)
    assert (list(vision.depths), list(vision.num_heads)) == ([2, 2, 18, 2], [4, 8, 16, 32])
    assert (vision.frozen_stages, vision.checkpoint) == (
        expected["frozen"],
        expected["swin_checkpoint"],
    )
    assert head.tower.checkpoint and not cfg.model.backbone.text.checkpoint
    assert (head.tower.num_blocks, head.tower.channels) == (6, 256)
    # Section 2.2; 3 for LVIS; 4.6 else.
    found = head.postprocessor
    limits = (found.score_thresh, found.pre_nms_topk, found.max_detections)
    assert limits == {
        "refexp": (0.0, 3000, 100),
        "finetune/lvis": (0.05, 1000, 300),
    }.get("refexp" if "refexp/" in name else name, (0.05, 1000, 100))


@pytest.mark.parametrize("name", NAMES)
def test_published_images_and_captions(name):
    cfg = load_config(path_of(name), [])
    loader = cfg.dataloader.train
    if name in DATASETS:
        assert (loader.datasets, cfg.dataloader.test.dataset) == DATASETS[name]
    assert all(dataset in BUILTIN for dataset in loader.datasets)
    # Section 5.1: multi-scale, mirrored but for RefCOCO.
    *flips, resize = instantiate(loader.augmentations)
    assert isinstance(resize, ResizeShortestEdgeTruncated) and not resize.is_range
    assert tuple(resize.short_edge_length) == (480, 560, 640, 720, 800)
    assert resize.max_size == 1333
    if "refexp/" in name:
        assert flips == []
    else:
        (flip,) = flips
        assert isinstance(flip, T.RandomFlip)
        assert (flip.prob, flip.horizontal, flip.vertical) == (0.5, True, False)
    assert (loader.tokenizer, loader.separator, loader.max_tokens) == ("roberta-base", ". ", 256)
    # Section 5.12, 4.11.
    assert loader.aspect_ratio_grouping == ("odinw" not in name)
    assert cfg.dataloader.test.separator == ". "
    # Section 5.3, 8: COCO is shuffled, ODinW is not; 5.5: the others draw classes.
    sampled = loader.get("sampled_classes")
    assert loader.get("shuffle_classes", False) == (name == "finetune/coco")
    if "pretrain" in name:
        assert sampled == {
            "num_negatives": 85,
            "control_probabilities": [0.05, 0.05, 0.5, 0.2],
        }
    elif name == "finetune/lvis":
        # Section 5.5 g.
        assert sampled == {"num_negatives": 85, "control_probabilities": [0.0, 0.0, 1.0]}
        assert cfg.protocol.max_classes == 40
    else:
        assert sampled is None


def test_evaluation_is_that_of_the_recipes_for_it():
    """A model that is tested in training is tested as by configs/eval."""
    for name, other in {
        "finetune/coco": "coco_zeroshot",
        "finetune/lvis": "lvis_minival",
        "refexp/refcocoplus": "refcocoplus_val",
    }.items():
        trained, evaluated = (load_config(path_of(x), []) for x in (name, f"eval/{other}"))
        assert trained.protocol == evaluated.protocol
        assert trained.dataloader.test == evaluated.dataloader.test
        for cfg in (trained, evaluated):
            cfg.model.backbone.vision.checkpoint = cfg.model.head.tower.checkpoint = False
            cfg.model.backbone.vision.frozen_stages = -1
        assert trained.model == evaluated.model


def test_all_sets_of_odinw_can_be_named():
    cfg = load_config(path_of("finetune/odinw_3shot"), [])
    for name in ODINW35:
        cfg.data.name = name
        cfg.data.validation = "minival" if f"odinw_{name}_minival" in BUILTIN else "val"
        datasets = [*cfg.dataloader.train.datasets, cfg.dataloader.test.dataset]
        assert all(dataset in BUILTIN for dataset in [*datasets, *cfg.train.test_best])
        assert cfg.train.output_dir == f"output/odinw/{name}/3shot_seed3"


def test_print_config(capsys):
    name = "pretrain/mixed_flickr_objects365"
    overrides = ["dataloader.train.total_batch_size=16", "train.scaling.rule=linear"]
    main(["--config-file", path_of(name), "--print-config", *overrides])
    tree = yaml.safe_load(capsys.readouterr().out)
    assert tree["optimizer"]["params"]["base_lr"] == 2.5e-5
    assert tree["train"]["max_iter"] == tree["lr_multiplier"]["max_iter"] == 3_200_000
    assert tree["dataloader"]["train"]["tokenizer"] == "roberta-base"
    assert tree["model"]["_target_"] == "fiber_d2.modeling.fiber.FIBER"


def test_values_that_yaml_does_not_know_are_named():
    values = {"resize": ResizeShortestEdgeTruncated, "path": Path("a"), "sides": (1, 2)}
    cfg = DictConfig(values, flags={"allow_objects": True})
    assert yaml.safe_load(config_text(cfg)) == {
        "resize": "fiber_d2.data.transforms.ResizeShortestEdgeTruncated",
        "path": repr(Path("a")),
        "sides": [1, 2],
    }


def test_print_config_of_a_yaml_file(capsys):
    main(["--config-file", str(CONFIGS / "FIBER-B.yaml"), "--print-config", "SEED=7"])
    text = capsys.readouterr().out
    cfg = get_cfg().load_cfg(text)
    assert (cfg.SEED, cfg.MODEL.FIBER.TEXT.DIM) == (7, 768)


def test_print_config_names_what_is_wrong(capsys, tmp_path, monkeypatch):
    # An error leaves its log in the output folder.
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.py"
    path.write_text("train = dict(device='cpu', output_dir='out', max_iter='${no.such.key}')\n")
    with pytest.raises(SystemExit) as stopped:
        main(["--config-file", str(path), "--print-config"])
    assert stopped.value.code == 2
    assert "no.such.key" in capsys.readouterr().err


def overrides_of(name, small_training, folder):
    found = [*small_training, f"train.output_dir={folder}", "model.backbone.text.dropout=0.1"]
    place = len(load_config(path_of(name), []).dataloader.train.augmentations) - 1
    resize = f"dataloader.train.augmentations.{place}"
    found += [f"{resize}.short_edge_length=[48,64]", f"{resize}.max_size=64"]
    if "odinw" in name:
        # One image, so many times in a pass; 2 per step.
        epochs = 4 / SHOTS[name.split("/")[1]][1]
        found += [f"train.epochs={epochs}", f"train.eval_epochs={epochs / 2}"]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_image_can_be_learned_from(name, catalog, small_training, tmp_path):
    cfg = load_config(path_of(name), overrides_of(name, small_training, tmp_path))
    loader = instantiate(cfg.dataloader.train)
    seen = set()
    for index in range(len(loader.dataset)):
        item = loader.dataset[index, index]
        assert min(item["image"].shape[1:]) in (48, 64)
        assert len(item["instances"]) and item["instances"].gt_positive_map.any(dim=1).all()
        assert item["prompt"].num_tokens <= 256
        seen.add(Path(item["file_name"]).parts[-2] if "file_name" in item else "tsv")
    if "pretrain" in name:
        assert [part.name for part in loader.dataset.parts] == DATASETS[name][0]
        assert {"images", "train2014", "flickr30k_images"} < seen
    if name == "finetune/lvis":
        assert item["prompt"].num_targets == 45, "all others, being fewer than 85"


def test_a_set_whose_names_fill_more_than_a_caption(catalog, small_training, tmp_path):
    """The header says what to do, as does the error."""
    name = "finetune/odinw_full"
    overrides = [*overrides_of(name, small_training, tmp_path), "data.name=OxfordPets_by_breed"]
    with pytest.raises(ValueError, match="train with sampled classes"):
        instantiate(load_config(path_of(name), overrides).dataloader.train)
    remedy = "dataloader.train.sampled_classes={control_probabilities:[0,0,1]}"
    assert remedy in Path(path_of(name)).read_text()
    loader = instantiate(load_config(path_of(name), [*overrides, remedy]).dataloader.train)
    assert 20 < loader.dataset[0, 0]["prompt"].num_targets < 37


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_iterations(name, catalog, small_training, tmp_path):
    cfg = load_config(path_of(name), overrides_of(name, small_training, tmp_path))
    run_lazy_config(cfg)
    assert cfg.train.max_iter == 2
    rows = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    losses = {row["iteration"]: row["total_loss"] for row in rows if "total_loss" in row}
    assert sorted(losses) == [0, 1] and all(map(math.isfinite, losses.values()))
    # Two images are not what the recipe is for.
    assert "train.scaling.rule=linear or sqrt" in (tmp_path / "log.txt").read_text()
    results = tmp_path / "inference" / cfg.dataloader.test.dataset / "results.json"
    assert json.loads(results.read_text())["results"]
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert ("ema" in saved) == (cfg.train.ema is not None)
    assert (tmp_path / "model_best.pth").exists() == ("odinw" in name)
