import math

import pytest
import torch
from torch import nn

from fiber_d2.engine.optimizer import get_param_groups, warmup_cosine, warmup_multistep


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleDict(
            {
                "swin": nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)),
                "text": nn.Linear(2, 2),
                # Begins like the text tower's name, but is not in it.
                "text_like": nn.Linear(2, 2, bias=False),
            }
        )
        self.head = nn.Linear(2, 2)
        self.again = self.head
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def settings(model, **kwargs):
    """Parameter name -> (lr, weight decay)."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = get_param_groups(model, base_lr=1.0, weight_decay=0.1, **kwargs)
    found = {names[p]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(found)
    return groups, found


def test_rates_and_decays_by_tower_and_kind():
    _, found = settings(
        Towers(),
        text_lr_factor=0.5,
        vision_lr_factor=2.0,
        bias_lr_factor=3.0,
        weight_decay_norm=0.0,
        weight_decay_bias=0.01,
    )
    assert found == {
        "backbone.swin.0.weight": (2.0, 0.1),
        "backbone.swin.0.bias": (6.0, 0.01),
        "backbone.swin.1.weight": (2.0, 0.0),
        "backbone.swin.1.bias": (6.0, 0.01),
        "backbone.text.weight": (0.5, 0.1),
        "backbone.text.bias": (1.5, 0.01),
        "backbone.text_like.weight": (1.0, 0.1),
        "head.weight": (1.0, 0.1),
        "head.bias": (3.0, 0.01),
    }


def test_equal_settings_share_one_group():
    groups, _ = settings(Towers())
    assert len(groups) == 1
    torch.optim.AdamW(groups, lr=1.0)


def test_nothing_to_optimise():
    with pytest.raises(ValueError, match="no trainable parameter"):
        get_param_groups(nn.Linear(1, 1).requires_grad_(False), base_lr=1.0, weight_decay=0.0)


def test_cosine_with_warmup():
    factor = warmup_cosine(max_iter=100, warmup_iters=10, warmup_factor=0.1, end_factor=0.0)
    at_ten = 0.5 * (1 + math.cos(math.pi * 0.1))
    assert factor(0.0) == pytest.approx(0.1)
    assert factor(0.05) == pytest.approx(0.1 + 0.5 * (at_ten - 0.1))
    assert factor(0.55) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.55)))
    assert factor(1.0) == pytest.approx(0.0)


def test_steps_with_and_without_warmup():
    factor = warmup_multistep(max_iter=100, milestones=[0.67, 0.89], gamma=0.1)
    found = [factor(it / 100) for it in (0, 66, 67, 88, 89, 99)]
    assert found == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    factor = warmup_multistep(max_iter=100, warmup_iters=10, warmup_factor=0.0)
    assert [factor(it / 100) for it in (0, 5, 10, 67)] == pytest.approx([0, 0.5, 1, 0.1])


def test_impossible_schedule():
    with pytest.raises(ValueError, match="0 iterations"):
        warmup_cosine(max_iter=0)
