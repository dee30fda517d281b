from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from torch import nn

from fiber_d2.engine import optimizer, schedules
from fiber_d2.engine.optimizer import get_param_groups, original_name, published_param_groups

CONFIGS = Path(__file__).parents[2] / "configs" / "common"


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


def test_schedules_are_found_where_older_runs_name_them():
    for name in ("warmup_cosine", "warmup_multistep"):
        assert getattr(optimizer, name) is getattr(schedules, name)


def test_equal_settings_share_one_group():
    groups, _ = settings(Towers())
    assert len(groups) == 1
    torch.optim.AdamW(groups, lr=1.0)


def test_nothing_to_optimise():
    with pytest.raises(ValueError, match="no trainable parameter"):
        get_param_groups(nn.Linear(1, 1).requires_grad_(False), base_lr=1.0, weight_decay=0.0)


def test_published_rules_by_names():
    """Each rule of the specification, on names of ours, as worked out by hand."""
    names = {
        "backbone.swin.patch_embed.proj.weight": (2.0, 0.1),
        "backbone.swin.stages.2.blocks.17.norm1.weight": (2.0, 0.05),
        # The bias rule's reach, and the norm rule after it.
        "backbone.swin.stages.2.blocks.17.norm1.bias": (6.0, 0.005),
        "backbone.swin.stages.0.blocks.0.attn.relative_position_bias_table": (6.0, 0.01),
        # Each side of the exchange belongs to its tower; the norm there is called norm_i2t_i.
        "backbone.swin.stages.3.blocks.1.attn.text_attention.key_value.bias": (6.0, 0.01),
        "backbone.swin.stages.3.blocks.1.attn.text_attention.alpha": (2.0, 0.1),
        "backbone.swin.stages.3.blocks.1.attn.text_attention.norm.weight": (2.0, 0.05),
        "backbone.text.embeddings.norm.weight": (0.5, 0.05),
        "backbone.text.layers.7.image_attention.alpha": (0.5, 0.1),
        "backbone.text.layers.7.image_attention.attention.dense.bias": (1.5, 0.01),
        # The addition to the text is none of the text tower's there.
        "backbone.text.embeddings.prompt": (1.0, 0.1),
        "backbone.neck.laterals.0.weight": (1.0, 0.1),
        "head.text_bias": (3.0, 0.01),
        "head.prior_bias": (3.0, 0.01),
        "head.log_scale": (1.0, 0.1),
        "head.scales": (1.0, 0.1),
        # Called "bn" there, so no norm.
        "head.tower.3.same_level.norm.weight": (1.0, 0.1),
        "head.tower.3.same_level.norm.bias": (3.0, 0.01),
        # Not the original's: by the place and the pieces of the name.
        "backbone.swin.stages.0.adapter.weight": (2.0, 0.1),
        "backbone.text.layers.0.adapter.norm.weight": (0.5, 0.05),
        "other.bias_of_something": (3.0, 0.01),
    }
    model = nn.Module()
    for name in names:
        *path, leaf = name.split(".")
        module = model
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.register_parameter(leaf, nn.Parameter(torch.zeros(())))
    groups = published_param_groups(
        model,
        base_lr=1.0,
        weight_decay=0.1,
        text_lr_factor=0.5,
        vision_lr_factor=2.0,
        bias_lr_factor=3.0,
        weight_decay_bias=0.01,
        weight_decay_norm_factor=0.5,
    )
    known = {parameter: name for name, parameter in model.named_parameters()}
    found = {known[p]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found == names
    assert len(groups) == len(set(names.values()))


def test_published_rules_by_default():
    groups = published_param_groups(Towers(), base_lr=1.0, weight_decay=0.1)
    # Weights and biases; frozen and shared ones as in get_param_groups.
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1.0, 0.1), (2.0, 0.0)]
    assert [len(g["params"]) for g in groups] == [5, 4]


@pytest.mark.parametrize("function", [get_param_groups, published_param_groups])
def test_a_saved_state_fits_a_model_that_is_built_again(function):
    def make():
        model = Towers()
        return model, torch.optim.AdamW(
            function(model, base_lr=0.1, weight_decay=0.1, text_lr_factor=0.5)
        )

    model, optimizer = make()
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(number))
    optimizer.step()
    again, other = make()
    other.load_state_dict(optimizer.state_dict())
    names = {p: n for n, p in model.named_parameters()}
    for name, parameter in again.named_parameters():
        if parameter.requires_grad:
            known = next(p for p, n in names.items() if n == name)
            assert torch.equal(other.state[parameter]["exp_avg"], optimizer.state[known]["exp_avg"])


def test_all_parameters_of_fiber_b_have_names_of_the_original():
    node = LazyConfig.load(str(CONFIGS / "models" / "fiber_b.py")).model
    node.backbone.vision.query_norm = True
    with torch.device("meta"):
        model = instantiate(node)
    names = [original_name(name) for name, _ in model.named_parameters()]
    assert all(name.startswith(("fusion_backbone.", "rpn.head.")) for name in names)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["AdamW", "AdamW_by_kind", "SGD"])
def test_the_optimisers_of_the_common_config(name):
    node = LazyConfig.load(str(CONFIGS / "optim.py"))[name]
    node.params.model = Towers()
    optimizer = instantiate(node)
    assert type(optimizer).__name__ == name.partition("_")[0]
    factors = {group["lr"] / node.lr for group in optimizer.param_groups}
    assert factors == ({1.0} if name == "AdamW_by_kind" else {1.0, 2.0})
