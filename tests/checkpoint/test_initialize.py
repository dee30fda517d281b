"""Starting weights, from files made here with the naming schemes of their origins."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from transformers import RobertaConfig, RobertaForMaskedLM

from fiber_d2.checkpoint import (
    initialize_from_fiber,
    initialize_from_roberta,
    initialize_from_swin,
    interpolate_position_bias,
)
from fiber_d2.checkpoint.names import ROBERTA, SWIN


def timm_swin(window=4):
    torch.manual_seed(5)
    return timm.models.swin_transformer.SwinTransformer(
        img_size=128,
        patch_size=4,
        num_classes=3,
        embed_dim=8,
        depths=(1, 1, 3, 2),
        num_heads=(1, 1, 2, 2),
        window_size=window,
    ).eval()


def microsoft_names(state):
    """timm's weights under Microsoft's names: merging at the end of a stage, buffers, a mask."""
    renamed = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[2:3] == ["downsample"]:
            parts[1] = str(int(parts[1]) - 1)
        if parts[:2] == ["head", "fc"]:
            del parts[1]
        renamed[".".join(parts)] = tensor
    renamed["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(
        16, 16, dtype=torch.int64
    )
    renamed["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    return renamed


def roberta():
    torch.manual_seed(6)
    config = RobertaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=6,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=34,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    return RobertaForMaskedLM(config).eval()


@pytest.mark.parametrize("naming", ["timm", "microsoft"])
def test_swin_gives_the_same_features(build, tmp_path, naming):
    """With text switched off, the tower computes what timm's does."""
    source = timm_swin()
    state = source.state_dict()
    weights = state if naming == "timm" else {"model": microsoft_names(state)}
    torch.save(weights, tmp_path / "swin.pth")
    model = build()
    result = initialize_from_swin(model, tmp_path / "swin.pth")
    assert not result.resized
    assert all("text_attention" in name or "out_norms" in name for name in result.kept)
    assert any(name.startswith("head") for name in result.dropped)
    swin = model.backbone.swin
    with torch.no_grad():
        for name, parameter in swin.named_parameters():
            if name.endswith("alpha"):
                parameter.zero_()
        images = torch.randn(1, 3, 128, 128)
        expected = source.forward_features(images)  # (1, 4, 4, 64), after its last norm
        x = swin.patch_embed(images)
        text, mask = torch.zeros(1, 3, 16), torch.ones(1, 3, dtype=torch.bool)
        for stage in swin.stages:
            # timm shifts nothing where one window covers the map.
            if stage is swin.stages[-1]:
                for block in stage.blocks:
                    block.attn.shift = 0
            for block in stage.blocks:
                x = block(x, text, mask)
            x = x if stage.downsample is None else stage.downsample(x)
        found = F.layer_norm(x, (64,), source.norm.weight, source.norm.bias, 1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_swin_of_another_window_is_interpolated(build):
    model = build()
    result = initialize_from_swin(model, timm_swin(window=8).state_dict())
    # timm's windows never exceed the map: the last stage has window 4 there, too.
    assert len(result.resized) == 5
    name = "stages.0.blocks.0.attn.relative_position_bias_table"
    table = model.backbone.swin.state_dict()[name]
    assert table.shape == (49, 1)


def test_interpolation_keeps_constants_and_symmetry():
    assert torch.equal(
        interpolate_position_bias(torch.arange(9.0)[:, None], 2)[:, 0], torch.arange(9.0)
    )
    flat = interpolate_position_bias(torch.full((49, 3), 2.5), 7)
    torch.testing.assert_close(flat, torch.full((169, 3), 2.5))
    # A bump at displacement 0 stays there, and stays symmetric.
    bump = torch.zeros(7, 7)
    bump[3, 3] = 1
    wide = interpolate_position_bias(bump.reshape(-1, 1), 6).reshape(11, 11)
    assert divmod(int(wide.argmax()), 11) == (5, 5)
    torch.testing.assert_close(wide, wide.flip(0, 1))
    # Columns are heads: each is resized by itself.
    two = torch.stack([bump.flatten(), 2 * bump.flatten()], dim=1)
    resized = interpolate_position_bias(two, 6)
    torch.testing.assert_close(resized[:, 1], 2 * resized[:, 0])
    assert math.isqrt(len(resized)) == 11


def test_swin_that_does_not_fit(build):
    weights = timm_swin().state_dict()
    del weights["layers.1.downsample.reduction.weight"]
    weights["extra"] = torch.zeros(2)
    weights["layers.0.blocks.0.mlp.fc1.bias"] = torch.zeros(9)
    with pytest.raises(ValueError) as error:
        initialize_from_swin(build(), weights)
    message = str(error.value)
    assert "1 missing: backbone.swin.stages.0.downsample.reduction.weight (16, 32)" in message
    assert "1 unknown: extra (2,)" in message
    assert "fc1.bias (9,) instead of (32,)" in message


@pytest.mark.parametrize("form", ["prefixed", "bare", "safetensors", "folder"])
def test_roberta_gives_the_same_hidden_states(build, tmp_path, form):
    source = roberta()
    state = source.roberta.state_dict() if form == "bare" else source.state_dict()
    state = {name: tensor.clone() for name, tensor in state.items()}
    state["roberta.embeddings.position_ids" if form != "bare" else "embeddings.position_ids"] = (
        torch.arange(34)[None]
    )
    path = tmp_path / "pytorch_model.bin"
    if form == "safetensors":
        from safetensors.torch import save_file

        path = tmp_path / "model.safetensors"
        save_file(state, path)
    else:
        torch.save(state, path)
    model = build()
    result = initialize_from_roberta(model, tmp_path if form == "folder" else path)
    assert all("image_attention" in name for name in result.kept)
    assert form == "bare" or any(name.startswith("lm_head") for name in result.dropped)
    ids = torch.tensor([[0, 5, 6, 7, 2], [0, 9, 2, 1, 1]])
    mask = ids != 1
    tower = model.backbone.text
    with torch.no_grad():
        expected = source.roberta(ids, attention_mask=mask.long()).last_hidden_state
        x = tower.embeddings(ids)
        for layer in tower.layers:
            layer.image_attention = None
            x = layer(x, mask)
    torch.testing.assert_close(x[mask], expected[mask], rtol=1e-4, atol=1e-5)


def test_roberta_that_does_not_fit(build):
    state = roberta().state_dict()
    state["roberta.embeddings.word_embeddings.weight"] = torch.zeros(60, 16)
    with pytest.raises(ValueError, match=r"word.weight \(60, 16\) instead of \(50, 16\)"):
        initialize_from_roberta(build(), state)
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin"):
        initialize_from_roberta(build(), "/nowhere/pytorch_model.bin")


@pytest.mark.parametrize("stage", ["coarse", "fine"])
def test_fiber_towers(build, export, stage):
    source, model = build(seed=1), build(seed=2)
    weights = export(source)
    head = model.head.bbox_pred.weight.clone()
    if stage == "coarse":
        towers = {}
        for name, tensor in weights.items():
            if name.startswith(ROBERTA):
                towers["text_transformer." + name[len(ROBERTA) :]] = tensor
            elif name.startswith(SWIN + "norm"):
                continue
            elif name.startswith(SWIN):
                towers["vit_model." + name[len(SWIN) :]] = tensor
        towers["vit_model.norm.weight"] = torch.ones(64)
        towers["cross_modal_text_transform.weight"] = torch.ones(3)
        towers["mlm_score.bias"] = torch.ones(3)
        weights = towers
    result = initialize_from_fiber(model, weights)
    for name in (
        "backbone.swin.stages.2.blocks.1.attn.text_attention.alpha",
        "backbone.text.layers.5.image_attention.attention.key.weight",
    ):
        assert torch.equal(model.state_dict()[name], source.state_dict()[name])
    if stage == "coarse":
        assert torch.equal(model.head.bbox_pred.weight, head)
        assert "backbone.swin.out_norms.0.weight" in result.kept
        assert "mlm_score.bias" in result.dropped and "vit_model.norm.weight" in result.dropped
    else:
        assert not result.kept
    weights = dict(weights)
    del weights[next(name for name in weights if name.endswith("alpha_t2i"))]
    with pytest.raises(ValueError, match="1 missing.*image_attention.alpha"):
        initialize_from_fiber(model, weights)
