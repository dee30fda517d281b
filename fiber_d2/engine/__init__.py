"""Training and evaluation: processes, steps, hooks, checkpoints, reports."""

from .checkpointer import FiberCheckpointer
from .default_trainer import FiberTrainer
from .ema import ModelEma
from .evaluate import build_test_sets, do_test, evaluate_test_sets
from .optimizer import (
    get_param_groups,
    published_param_groups,
    warmup_cosine,
    warmup_multistep,
)
from .report import RunSummary, final_report
from .schedules import PlateauSchedule, PublishedCosine
from .step import StepTrainer
from .train import do_train

__all__ = [
    "FiberCheckpointer",
    "FiberTrainer",
    "ModelEma",
    "PlateauSchedule",
    "PublishedCosine",
    "RunSummary",
    "StepTrainer",
    "build_test_sets",
    "do_test",
    "do_train",
    "evaluate_test_sets",
    "final_report",
    "get_param_groups",
    "published_param_groups",
    "warmup_cosine",
    "warmup_multistep",
]
