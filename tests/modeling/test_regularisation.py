"""Drop path, dropout, DropBlock and frozen stages: where they act, and in training only.

The model specification, sections 2, 3 and 9; frozen stages as FREEZE_CONV_BODY_AT of the original.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fiber_d2.modeling.fpn import FeaturePyramid
from fiber_d2.modeling.roberta import RobertaEmbeddings, RobertaLayer
from fiber_d2.modeling.swin import SwinBlock, SwinTransformer, TextToWindowAttention

SMALL = {
    "embed_dim": 8,
    "num_heads": (1, 1, 2, 2),
    "window": 4,
    "text_dim": 16,
    "fused_blocks": (0, 0, 1, 1),
}


def test_rates_of_drop_path_grow_over_all_blocks():
    depths = (2, 2, 18, 2)
    tower = SwinTransformer(depths=depths, drop_path=0.4, **SMALL)
    rates = [block.drop_path.drop_prob for stage in tower.stages for block in stage.blocks]
    assert rates == pytest.approx([0.4 * i / 23 for i in range(24)])


def test_drop_path_drops_whole_branches_of_a_sample():
    """The attention branch goes with its text, the MLP branch on its own; both are rescaled."""
    torch.manual_seed(0)
    text_attention = TextToWindowAttention(
        dim=8, text_dim=16, num_heads=2, query_norm=False, alpha_init=0.7
    )
    block = SwinBlock(
        dim=8, num_heads=2, window=4, shift=2, drop_path=0.25, text_attention=text_attention
    )
    samples = 64
    x = torch.randn(1, 4, 8, 8).expand(samples, -1, -1, -1)
    text = torch.randn(1, 5, 16).expand(samples, -1, -1)
    mask = torch.ones(samples, 5, dtype=torch.bool)
    attended = block.eval()(x[:1], text[:1], mask[:1])
    block.mlp.register_forward_hook(lambda module, inputs, output: output * 0)
    attention = block(x[:1], text[:1], mask[:1]) - x[:1]
    block.mlp._forward_hooks.clear()
    assert (attended - x[:1] - attention).abs().max() > 1e-3

    def mlp(tensor):
        return block.mlp(block.norm2(tensor))

    outcomes = []
    for first in (0, 1 / 0.75):
        middle = x[:1] + first * attention
        outcomes += [middle, middle + mlp(middle) / 0.75]
    found = block.train()(x, text, mask)
    difference = torch.stack(
        [(found - outcome).abs().amax(dim=(1, 2, 3)) for outcome in outcomes], dim=1
    )
    assert (difference.min(dim=1).values < 1e-5).all()
    counts = (difference < 1e-5).sum(dim=0).tolist()
    assert sum(counts) == samples and all(counts), "every combination occurs"


def test_places_of_dropout_in_the_text_tower(monkeypatch):
    """After each softmax, after each dense output, after the embeddings."""
    calls = []
    attention, dropout = F.scaled_dot_product_attention, F.dropout

    def spy_attention(query, key, value, attn_mask=None, dropout_p=0.0):
        calls.append(("softmax", key.shape[-2], dropout_p))
        return attention(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p)

    def spy_dropout(tensor, p, training):
        calls.append(("output", tensor.shape[-1], p if training else 0.0))
        return dropout(tensor, p, training)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy_attention)
    monkeypatch.setattr(F, "dropout", spy_dropout)
    layer = RobertaLayer(
        dim=16, num_heads=2, mlp_dim=32, dropout=0.2, norm_eps=1e-5, image_dim=24, alpha_init=0.7
    )
    x, mask, image = (
        torch.randn(2, 5, 16),
        torch.ones(2, 5, dtype=torch.bool),
        torch.randn(2, 9, 24),
    )
    for mode, rate in ((True, 0.2), (False, 0.0)):
        calls.clear()
        layer.train(mode)(x, mask, image)
        assert calls == [
            ("softmax", 5, rate),
            ("output", 16, rate),
            ("softmax", 9, rate),
            ("output", 16, rate),
            ("output", 16, rate),
        ]
    embeddings = RobertaEmbeddings(
        vocab_size=50, dim=16, max_positions=34, pad_token_id=1, dropout=0.2, norm_eps=1e-5
    )
    calls.clear()
    embeddings(torch.randint(3, 50, (2, 5)))
    assert calls == [("output", 16, 0.2)]


def test_drop_block_acts_on_the_two_merged_maps():
    neck = FeaturePyramid(in_channels=(8, 8, 8), out_channels=8, drop_block=0.3)
    assert (neck.drop_block.drop_prob, neck.drop_block.block_size) == (0.3, 3)
    maps = [torch.randn(1, 8, side, side) for side in (16, 8, 4)]
    plain = neck.eval()(maps)

    class Nothing(nn.Module):
        def forward(self, x):
            return x * 0

    neck.drop_block = Nothing()
    found = neck(maps)
    for level in (0, 1):
        bias = neck.outputs[level].bias[None, :, None, None]
        torch.testing.assert_close(found[level], bias.expand_as(found[level]))
    for level in (2, 3, 4):
        assert torch.equal(found[level], plain[level])


@torch.no_grad()
def test_evaluation_is_without(build):
    rates = {"drop_path": 0.5, "dropout": 0.5, "drop_block": 0.5}
    dropping, plain = build(**rates), build()
    dropping.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 64, 64)
    ids, mask = torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4, dtype=torch.bool)

    def run(model):
        features = model.backbone(images, ids, mask)
        return model.head(features.pyramid, features.text, mask).token_logits

    expected = run(plain.train())
    assert torch.equal(run(plain.eval()), expected)
    assert torch.equal(run(dropping.eval()), expected)
    assert not torch.equal(run(dropping.train()), expected)


@pytest.mark.parametrize(
    "frozen_stages,embedding,stages", [(-1, 0, 0), (0, 1, 0), (1, 1, 0), (2, 1, 1), (3, 1, 2)]
)
def test_frozen_stages_count_as_in_the_original(frozen_stages, embedding, stages):
    """n >= 0 freezes the patch embedding, n >= 2 also the stages 0..n-2 with their merging."""
    tower = SwinTransformer(depths=(1, 1, 2, 1), frozen_stages=frozen_stages, **SMALL).train()
    frozen = [tower.patch_embed] * embedding + list(tower.stages[:stages])
    learning = [tower.patch_embed] * (1 - embedding) + list(tower.stages[stages:])
    learning.append(tower.out_norms)
    for module in frozen:
        assert not any(part.training for part in module.modules())
        assert not any(parameter.requires_grad for parameter in module.parameters())
    for module in learning:
        assert all(part.training for part in module.modules())
        assert all(parameter.requires_grad for parameter in module.parameters())
