"""Initial weights: the published ones by default, others for training from scratch."""

import pytest
import torch

from fiber_d2.modeling.boxes import AnchorGrid
from fiber_d2.modeling.dyhead import DynamicHead
from fiber_d2.modeling.language_head import ATSSLanguageHead
from fiber_d2.modeling.losses import GroundingLoss
from fiber_d2.modeling.postprocess import PostProcessor
from fiber_d2.modeling.roberta import RobertaEncoder
from fiber_d2.modeling.swin import SwinTransformer


def make_swin(**options):
    torch.manual_seed(0)
    return SwinTransformer(
        embed_dim=32, depths=(2, 2), num_heads=(2, 4), window=8, fused_blocks=(0, 1), text_dim=64,
        **options,
    )  # fmt: skip


def make_roberta(**options):
    torch.manual_seed(0)
    return RobertaEncoder(
        vocab_size=500, dim=64, num_layers=2, num_heads=4, mlp_dim=256, max_positions=60,
        image_dims=(64,), **options,
    )  # fmt: skip


def make_head(**options):
    return ATSSLanguageHead(
        tower=DynamicHead(channels=16, num_blocks=1, norm_groups=4),
        anchors=AnchorGrid(),
        text_dim=64,
        loss=GroundingLoss(),
        postprocessor=PostProcessor(),
        **options,
    )


@pytest.mark.parametrize(("options", "linear", "bias"), [
    ({}, 0.02, 0.02),
    ({"init_std": 0.06, "position_bias_std": 1.0}, 0.06, 1.0),
])  # fmt: skip
def test_image_tower(options, linear, bias):
    swin = make_swin(**options)
    block = swin.stages[1].blocks[1]
    for layer in (block.attn.qkv, block.mlp.fc1, block.attn.text_attention.key_value):
        assert layer.weight.std().item() == pytest.approx(linear, rel=0.05)
        assert not layer.bias.any()
    assert block.attn.relative_position_bias_table.std().item() == pytest.approx(bias, rel=0.1)


@pytest.mark.parametrize(("options", "word", "place"), [
    ({}, 0.02, 0.02),
    ({"word_init_std": 0.1}, 0.1, 0.02),
    ({"position_init_std": 0.1}, 0.02, 0.1),
])  # fmt: skip
def test_text_tower(options, word, place):
    text = make_roberta(**options)
    embeddings = text.embeddings
    assert embeddings.word.weight.std().item() == pytest.approx(word, rel=0.05)
    assert embeddings.position.weight.std().item() == pytest.approx(place, rel=0.05)
    assert embeddings.token_type.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert text.layers[0].fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    # Padding stays at zero whatever the spread.
    assert not embeddings.word.weight[text.pad_token_id].any()
    assert not embeddings.position.weight[text.pad_token_id].any()


def test_head():
    published = make_head()
    assert published.scales.tolist() == [1.0] * 5
    assert published.log_scale.item() == 0
    changed = make_head(box_scale_init=8.0, log_scale_init=-1.0)
    assert changed.scales.tolist() == [8.0] * 5
    assert changed.log_scale.item() == -1.0
