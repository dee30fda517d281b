"""Optimisation: parameter groups, schedules, the training loop, averaged weights

SPEC_DATA_EVAL section 6, ``g_optimizer.json``. What a published run is optimised with is read from
this project's recipe of it.
"""

from __future__ import annotations

import fnmatch
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import HookBase
from detectron2.solver import LRMultiplier
from fvcore.common.param_scheduler import ParamScheduler
from omegaconf import DictConfig
from torch import nn

from fiber_d2.checkpoint.files import read_file
from fiber_d2.checkpoint.names import is_unused
from fiber_d2.engine.checkpointer import FiberCheckpointer
from fiber_d2.engine.ema import EMA_KEY, EmaHook, ModelEma
from fiber_d2.engine.hooks import CheckpointHook
from fiber_d2.engine.optimizer import original_name, published_param_groups
from fiber_d2.engine.schedule_hooks import WeightDecaySchedule, schedule_hook
from fiber_d2.engine.schedules import (
    PlateauSchedule,
    PublishedCosine,
    WarmupMultiStep,
    warmup_multistep,
)
from fiber_d2.engine.step import StepTrainer

from .common import Section, read_json

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# Rates, decays and factors are products of a few float64 numbers up to 1.
TOLERANCE = 1e-14
# Weights are float32.
WEIGHT_TOLERANCE = 1e-5
# The original leaves out batches with a larger share of images without boxes.
MAX_EMPTY_SHARE = 0.1

# What a fixture calls a run, and the recipe of it; the first that fits.
RECIPES = (
    ("*refexpclean*", "pretrain/mixed_flickr_objects365_refexpclean.py"),
    ("*pretrain_v3*", "pretrain/mixed_flickr_objects365_refexpclean.py"),
    ("*pretrain*", "pretrain/mixed_flickr_objects365.py"),
    ("*refcocoplus*", "refexp/refcocoplus.py"),
    ("*refcoco+*", "refexp/refcocoplus.py"),
    ("*refcocog*", "refexp/refcocog.py"),
    ("*refcoco*", "refexp/refcoco.py"),
    ("*lvis*", "finetune/lvis.py"),
    ("*coco*", "finetune/coco.py"),
    ("*odinw*", "finetune/odinw_full.py"),
    ("*aquarium*", "finetune/odinw_full.py"),
)
# Keys of the original that change nothing of what is compared.
NO_EFFECT = ("WEIGHT_DECAY_SCHEDULE", "WEIGHT_DECAY_SCHEDULE_RATIO", "IMS_PER_BATCH", "MODEL_EMA")
SCHEDULES = {
    "WarmupMultiStepLR": WarmupMultiStep,
    "WarmupCosineAnnealingLR": PublishedCosine,
    "WarmupReduceLROnPlateau": PlateauSchedule,
}


def check(directory: Path) -> Section:
    section = Section("g")
    content = read_json(directory, "g_optimizer.json")
    parts = {
        "parameter_groups": _check_groups,
        "lr_multiplier": _check_multiplier,
        "train_loop": _check_training,
        "plateau": _check_plateau,
    }
    for name, check_part in parts.items():
        for number, case in enumerate(content[name]):
            with section.case(f"{name}[{number}]"):
                check_part(section, case)
    return section


def _recipe(case: dict[str, Any]) -> DictConfig:
    """The recipe of the case's run, with the case's overrides of the original's keys."""
    name = case["config"].lower()
    path = next((path for pattern, path in RECIPES if fnmatch.fnmatch(name, pattern)), None)
    if path is None:
        raise ValueError(f"no recipe here repeats the run {case['config']!r}")
    cfg = LazyConfig.load(str(CONFIGS / path))
    overrides = case["overrides"]
    given = {
        key[len("SOLVER.") :] if key.startswith("SOLVER.") else key: value
        for key, value in zip(overrides[::2], overrides[1::2])
    }
    common = LazyConfig.load(str(CONFIGS / "common" / "optim.py"))
    if given.pop("OPTIMIZER", "ADAMW").upper() == "SGD":
        kept = {key: cfg.optimizer[key] for key in ("lr", "weight_decay", "params")}
        cfg.optimizer = common.SGD
        cfg.optimizer.update(kept)
    _choose_schedule(cfg, common, given)
    optimizer, params, schedule = cfg.optimizer, cfg.optimizer.params, cfg.lr_multiplier
    # An absolute rate of the text tower there, a factor here.
    text_lr = given.pop("LANG_LR", optimizer.lr * params.text_lr_factor)
    # Clipping is at a norm here, or off.
    limit = given.pop("CLIP_GRADIENTS.CLIP_VALUE", cfg.train.clip_grad or 1.0)
    enabled = given.pop("CLIP_GRADIENTS.ENABLED", cfg.train.clip_grad is not None)
    cfg.train.clip_grad = limit if enabled else None
    places = {
        "BASE_LR": (optimizer, "lr"),
        "WEIGHT_DECAY": (optimizer, "weight_decay"),
        "BACKBONE_BODY_LR_FACTOR": (params, "vision_lr_factor"),
        "BIAS_LR_FACTOR": (params, "bias_lr_factor"),
        "WEIGHT_DECAY_BIAS": (params, "weight_decay_bias"),
        "WEIGHT_DECAY_NORM_FACTOR": (params, "weight_decay_norm_factor"),
        "MOMENTUM": (optimizer, "momentum"),
        "STEPS": (schedule, "milestones"),
        "GAMMA": (schedule, "gamma"),
        "WARMUP_ITERS": (schedule, "warmup_iters"),
        "WARMUP_FACTOR": (schedule, "warmup_factor"),
        "MIN_LR": (schedule, "min_lr"),
        "STEP_PATIENCE": (schedule, "patience"),
        "MAX_ITER": (cfg.train, "max_iter"),
    }
    for key, value in given.items():
        if key in NO_EFFECT:
            continue
        if key not in places:
            raise ValueError(f"the override {key!r} has no counterpart here that is known")
        node, field = places[key]
        node[field] = list(value) if isinstance(value, (list, tuple)) else value
    params.text_lr_factor = text_lr / optimizer.lr
    return cfg


def _choose_schedule(cfg: DictConfig, common: DictConfig, given: dict[str, Any]) -> None:
    """The kind of schedule; the original's recipes of ODinW choose theirs by an override."""
    cosine, plateau = given.pop("USE_COSINE", False), given.pop("USE_AUTOSTEP", False)
    node = common.published_cosine if cosine else common.plateau if plateau else common.multistep
    names = ("warmup_iters", "warmup_factor")
    kept = {name: cfg.lr_multiplier[name] for name in names if name in cfg.lr_multiplier}
    if node["_target_"] != cfg.lr_multiplier["_target_"]:
        cfg.lr_multiplier = node
        cfg.lr_multiplier.update(kept)


# Parameter groups


def _check_groups(section: Section, case: dict[str, Any]) -> None:
    cfg = _recipe(case)
    model = _fiber_b()
    names = {_name_there(name): name for name in dict(model.named_parameters())}
    # Parameters that FIBER-B does not have are tried by themselves.
    others = [name for name, *_ in case["params"] if _name_there(name) not in names]
    frozen = [name for name in case["frozen"] if not is_unused(name)]
    settings = _settings(cfg, _tree([*others, "some.weight"], frozen))
    stray = [name for name in frozen if name in settings]
    section.equal("frozen parameters in a group", stray, [])
    settings.update(_settings(cfg, model))
    wanted = [names.get(_name_there(name), name) for name, *_ in case["params"]]
    found = [settings.get(name) for name in wanted]
    missing = [name for name, setting in zip(wanted, found) if setting is None]
    section.equal("parameters in no group", missing, [])
    for (name, lr, decay), setting in zip(case["params"], found):
        if setting is not None:
            section.close(f"learning rate of {name}", setting[0], lr, TOLERANCE)
            section.close(f"weight decay of {name}", setting[1], decay, TOLERANCE)

    optimizer = _optimizer(cfg, model)
    section.equal("optimizer", type(optimizer).__name__, case["optimizer"])
    for name in ("betas", "eps", "amsgrad"):
        if case.get(name) is not None and name in optimizer.defaults:
            section.equal(name, _listed(optimizer.defaults[name]), _listed(case[name]))
    clip = case["clip_value"] if case["full_model_clipping"] else None
    section.equal("limit of the gradients' norm", cfg.train.clip_grad, clip)


@cache
def _fiber_b() -> nn.Module:
    """Of fusion v3, with an addition to the text: a superset of parameters; without storage."""
    node = LazyConfig.load(str(CONFIGS / "common" / "models" / "fiber_b.py")).model
    node.backbone.vision.query_norm = True
    node.backbone.text.prompt_length = 1000
    with torch.device("meta"):
        return instantiate(node)


def _name_there(name: str) -> str:
    """The original's name of a parameter that has ours or its own."""
    # One vector here, a number per level there.
    scales = "rpn.head.scales"
    name = original_name(name)
    return scales if name.startswith(f"{scales}.") else name


def _tree(names: list[str], frozen: list[str]) -> nn.Module:
    """A model of parameters with these names."""
    root = nn.Module()
    for name in [*names, *frozen]:
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.register_parameter(leaf, nn.Parameter(torch.zeros(()), name not in frozen))
    return root


def _settings(cfg: DictConfig, model: nn.Module) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay that the optimiser has for each parameter."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in _optimizer(cfg, model).param_groups
        for parameter in group["params"]
    }


def _optimizer(cfg: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    del cfg.optimizer.params["model"]
    return optimizer


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


# Learning rates


def _check_multiplier(section: Section, case: dict[str, Any]) -> None:
    cfg = _recipe(case)
    cfg.train.max_iter = case["max_iter"]
    schedule = instantiate(cfg.lr_multiplier)
    section.true(case["class_name"], isinstance(schedule, SCHEDULES[case["class_name"]]))
    section.equal("milestones", getattr(schedule, "milestones", []), case["milestones"])
    for iteration, factor in case["multipliers"]:
        found = _rate_in(schedule, iteration, case["max_iter"])
        section.close(f"iteration {iteration}", found, factor, TOLERANCE)


def _rate_in(schedule: Any, iteration: int, max_iter: int) -> float:
    """The rate of a run that resumes with ``iteration``, of an optimiser with the rate 1."""
    optimizer = _one_parameter(1.0)
    optimizer.param_groups[0]["initial_lr"] = 1.0
    if isinstance(schedule, ParamScheduler):
        LRMultiplier(optimizer, schedule, max_iter, last_iter=iteration - 1)
    elif isinstance(schedule, PlateauSchedule):
        scheduler = schedule.attach(optimizer)
        for _ in range(min(iteration, schedule.warmup_iters)):
            scheduler.step()
    else:
        schedule.attach(optimizer, iteration - 1)
    return optimizer.param_groups[0]["lr"]


def _one_parameter(lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=lr)


def _check_plateau(section: Section, case: dict[str, Any]) -> None:
    optimizer = _one_parameter(case["base_lr"])
    names = ("patience", "warmup_iters", "min_lr", "gamma")
    scheduler = PlateauSchedule(**{name: case[name] for name in names}).attach(optimizer)
    for number, metric, lr in case["log_eval_lr"]:
        for _ in range(case["iters_per_eval"]):
            scheduler.step()
        scheduler.step(metric)
        found = optimizer.param_groups[0]["lr"]
        section.close(f"rate after evaluation {number}", found, lr, TOLERANCE)


# The training loop


class _Toy(nn.Module):
    """The loss is the sum of ``weight ** 2`` and ``bias``, whatever the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.bias = nn.Parameter(torch.tensor([0.5]))
        self.register_buffer("index", torch.arange(5))

    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        return {"loss": self.weight.square().sum() + self.bias.sum()}


class _Recorder(HookBase):
    """Rates and decays that each step is made with."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = (model.weight, model.bias)
        self.rows: list[list[float]] = []

    def before_step(self) -> None:
        row: list[float] = []
        for parameter in self.parameters:
            for group in self.trainer.optimizer.param_groups:
                if any(parameter is other for other in group["params"]):
                    row += [group["lr"], group["weight_decay"]]
        self.rows.append(row)


class _Training:
    """What our loop makes of the case's run: ``num_steps`` steps, rates as of the whole run."""

    def __init__(self, case: dict[str, Any], num_steps: int, folder: str) -> None:
        self.model = _Toy()
        groups = published_param_groups(
            self.model, base_lr=case["base_lr"], weight_decay=case["weight_decay"]
        )
        optimizer = torch.optim.AdamW(groups, lr=case["base_lr"])
        shared = {"max_iter": case["max_iter"], "milestones": case["steps"]}
        schedule = warmup_multistep(
            **shared, gamma=case["gamma"], warmup_iters=case["warmup_iters"], warmup_factor=1e-3
        )
        self.milestones = schedule.milestones
        self.scheduler = LRMultiplier(optimizer, schedule, case["max_iter"])
        self.recorder = _Recorder(self.model)
        trainer = StepTrainer(self.model, optimizer, [[]] * num_steps, clip_grad=1.0)
        checkpointer = FiberCheckpointer(self.model, folder, trainer=trainer)
        hooks: list[HookBase] = [
            schedule_hook(self.scheduler),
            WeightDecaySchedule(**shared, ratio=case["wd_ratio"], gamma=case["gamma"]),
            self.recorder,
        ]
        if "ema_decay" in case:
            ema = ModelEma(self.model, case["ema_decay"])
            checkpointer.add_checkpointable(EMA_KEY, ema)
            hooks.append(EmaHook(ema))
        periods = [iteration for name, iteration in case["saves"] if name != "model_final"]
        hooks.append(CheckpointHook(checkpointer, period=min([*periods, case["max_iter"] + 1])))
        trainer.register_hooks(hooks)
        trainer.train(0, num_steps)
        self.files = {path.stem: read_file(path) for path in Path(folder).glob("*.pth")}
        # Iterations done, the last of which the checkpoint knows.
        self.saved = sorted(content["trainer"]["iteration"] + 1 for content in self.files.values())


def _check_training(section: Section, case: dict[str, Any]) -> None:
    empty = dict(map(tuple, case["n_empty_targets_in_batch"]))
    size, max_iter = case["batch_size_per_gpu"], case["max_iter"]
    left_out = {
        batch
        for batch, count in empty.items()
        if batch < max_iter and (count == size or count / size > MAX_EMPTY_SHARE)
    }
    with tempfile.TemporaryDirectory() as folder:
        whole = _Training(case, max_iter, folder)
    section.equal("milestones", whole.milestones, case["milestones"])
    section.true("there is a final checkpoint", "model_final" in whole.files)
    if not left_out:
        section.equal("iterations that are saved", whole.saved, sorted(i for _, i in case["saves"]))
        _check_steps(section, case, whole)
        return
    section.note(
        "batches with many images without boxes, which the original leaves out: ours learns from "
        "them, which is checked; the expected weights are those after as many steps as it makes"
    )
    section.equal("steps, every batch one", len(whole.recorder.rows), max_iter)
    section.equal("scheduler, every batch a step", whole.scheduler.last_epoch, max_iter)
    section.equal("iterations of the final checkpoint", whole.saved[-1], max_iter)
    with tempfile.TemporaryDirectory() as folder:
        _check_steps(section, case, _Training(case, max_iter - len(left_out), folder))


def _check_steps(section: Section, case: dict[str, Any], run: _Training) -> None:
    section.equal("optimiser steps", len(run.recorder.rows), case["optimizer_steps"])
    section.equal("scheduler's last step", run.scheduler.last_epoch, case["final_last_epoch"])
    changes = next(value for key, value in case.items() if key.startswith("steps_changes"))
    for step, *expected in changes:
        found = run.recorder.rows[step]
        section.close(f"rates and decays of step {step}", found, expected, TOLERANCE)
    section.close("weight", run.model.weight.detach(), case["final_w"], WEIGHT_TOLERANCE)
    section.close("bias", run.model.bias.detach(), case["final_bias"], WEIGHT_TOLERANCE)
    if "ema_decay" not in case:
        return
    average = run.files["model_final"][EMA_KEY]
    section.close("averaged weight", average["weight"], case["ema_w"], WEIGHT_TOLERANCE)
    section.note(
        "averages of integer buffers, which the original cuts to integers: ours copies them, which "
        "is checked"
    )
    section.equal("buffer beside the averages", average["index"], run.model.index)
