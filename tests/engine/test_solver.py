import pytest
import torch
from detectron2.config import get_cfg
from torch import nn

from fiber_d2.config import add_fiber_config
from fiber_d2.engine.schedules import PlateauScheduler
from fiber_d2.engine.solver import build_param_groups, build_schedule, build_scheduler


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleDict({"text": nn.LayerNorm(2), "swin": nn.Linear(2, 2)})
        self.text_bias = nn.Parameter(torch.zeros(1))


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_fiber_config(cfg)
    cfg.SOLVER.BASE_LR = 1.0
    cfg.SOLVER.WEIGHT_DECAY = 0.1
    cfg.SOLVER.MAX_ITER = 100
    cfg.SOLVER.STEPS = (0.5, 80)
    cfg.SOLVER.WARMUP_ITERS = 10
    cfg.SOLVER.WARMUP_FACTOR = 0.2
    return cfg


def settings(cfg):
    model = Tower()
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = build_param_groups(cfg, model)
    return {names[p]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


def rates(cfg, iterations):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_scheduler(cfg, optimizer)
    found = []
    for _ in range(max(iterations) + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return [found[iteration] for iteration in iterations]


def test_published_rules_by_default(cfg):
    cfg.FIBER.TRAIN.PARAM_GROUPS.TEXT_LR_FACTOR = 0.1
    assert settings(cfg) == {
        "text_bias": (2.0, 0.0),
        "backbone.text.weight": (0.1, 0.1),
        "backbone.text.bias": (0.2, 0.0),
        "backbone.swin.weight": (1.0, 0.1),
        "backbone.swin.bias": (2.0, 0.0),
    }
    cfg.SOLVER.WEIGHT_DECAY_BIAS = None
    assert settings(cfg)["text_bias"] == (2.0, 0.1)


def test_rules_by_kind(cfg):
    cfg.FIBER.TRAIN.PARAM_GROUPS.RULES = "by_kind"
    # Detectron2's default of WEIGHT_DECAY_NORM is 0.
    assert settings(cfg) == {
        "text_bias": (1.0, 0.1),
        "backbone.text.weight": (1.0, 0.0),
        "backbone.text.bias": (2.0, 0.0),
        "backbone.swin.weight": (1.0, 0.1),
        "backbone.swin.bias": (2.0, 0.0),
    }
    cfg.FIBER.TRAIN.PARAM_GROUPS.RULES = "by_name"
    with pytest.raises(ValueError, match="'by_name': choose published or by_kind"):
        settings(cfg)


def test_steps_in_iterations_or_fractions(cfg):
    assert rates(cfg, [0, 5, 10, 49, 50, 79, 80]) == pytest.approx([0.2, 0.6, 1, 1, 0.1, 0.1, 0.01])


def test_cosines(cfg):
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupCosineLR"
    assert rates(cfg, [0, 50]) == pytest.approx([0.2, 0.5])
    cfg.SOLVER.LR_SCHEDULER_NAME = "PublishedCosineLR"
    cfg.FIBER.TRAIN.PLATEAU.MIN_LR = 0.2
    assert rates(cfg, [0, 10, 60]) == pytest.approx([0.2, 1.0, 0.6])


def test_plateau(cfg):
    cfg.SOLVER.LR_SCHEDULER_NAME = "PlateauLR"
    cfg.FIBER.TRAIN.PLATEAU.PATIENCE = 5
    cfg.FIBER.TRAIN.BEST.MODE = "min"
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_scheduler(cfg, optimizer)
    assert isinstance(scheduler, PlateauScheduler)
    assert (scheduler.mode, scheduler.schedule.patience, scheduler.schedule.gamma) == (
        "min",
        5,
        0.1,
    )
    assert scheduler.describe() == (
        "warm-up of 10 iterations from x0.2; x0.1 after 6 evaluations in a row without a new best, "
        "down to 1e-06"
    )


def test_detectron2_has_another_warmup(cfg):
    cfg.SOLVER.WARMUP_METHOD = "constant"
    cfg.SOLVER.STEPS = (50, 80)
    assert rates(cfg, [0, 9, 10, 50]) == pytest.approx([0.2, 0.2, 1, 0.1])


def test_unknown_schedule(cfg):
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupPolyLR"
    with pytest.raises(ValueError, match="'WarmupPolyLR': choose WarmupMultiStepLR, "):
        build_schedule(cfg)
