import json
import logging
from pathlib import Path

import pytest
import torch

from fiber_d2.checkpoint import (
    convert_fiber_state_dict,
    export_fiber_state_dict,
    load_fiber_checkpoint,
)
from fiber_d2.checkpoint.convert import relative_position_index

FIXTURES = Path(__file__).parents[1] / "fixtures" / "model"
CLASS_WEIGHT = "rpn.head.cls_logits.weight"


def same(a, b):
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


def save(path, weights, **rest):
    torch.save({"model": weights, **rest}, path)
    return path


@pytest.mark.parametrize("query_norm", [False, True])
def test_round_trip_is_exact(build, export, query_norm):
    state = build(query_norm).state_dict()
    original = export(build(query_norm))
    assert same(convert_fiber_state_dict(original), dict(state))
    original[CLASS_WEIGHT] = torch.randn(80, 16, 1, 1)
    again = export_fiber_state_dict(
        convert_fiber_state_dict(original), carried=original, anchor_sizes=(32, 64, 128, 256, 512)
    )
    assert same(again, original)


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_full_size_names_shapes_and_types(version):
    """Conversion and export of tensors as the original's state dict lists them."""
    listed = json.loads((FIXTURES / f"state_dict_names_{version}.json").read_text())
    original = {
        name: torch.empty(1, dtype=getattr(torch, dtype)).expand(shape)
        for name, shape, dtype, _ in listed
    }
    exported = export_fiber_state_dict(convert_fiber_state_dict(original))
    assert {(n, tuple(t.shape), str(t.dtype)) for n, t in exported.items()} == {
        (name, tuple(shape), f"torch.{dtype}") for name, shape, dtype, _ in listed
    }


def test_constants_of_the_export(build, export):
    exported = export(build())
    body = "fusion_backbone.backbone.body.layers.0.blocks.0.attn."
    index = exported[f"{body}relative_position_index"]
    # Window 4: a token and itself are at displacement (0, 0), row 3 * 7 + 3 of the table.
    assert torch.equal(index.diagonal(), torch.full((16,), 24))
    assert index[0, 15] == 0 and index[15, 0] == 48
    assert torch.equal(
        index, build().backbone.swin.stages[0].blocks[0].attn.relative_position_index
    )
    positions = exported["fusion_backbone.language_backbone.body.model.embeddings.position_ids"]
    assert torch.equal(positions, torch.arange(34)[None])
    anchors = exported["rpn.anchor_generator.cell_anchors.0"]
    # 32 pixels around the centre 3.5 of the first 8.
    assert torch.equal(anchors, torch.tensor([[-12.0, -12.0, 19.0, 19.0]]))
    assert exported["rpn.head.scales.3.scale"].shape == (1,)
    assert not exported[CLASS_WEIGHT].any()
    with pytest.raises(ValueError, match="5 levels, but 2 anchor strides"):
        export_fiber_state_dict(build().state_dict(), anchor_strides=(8, 16))


def test_relative_position_index_of_a_window_of_two():
    expected = [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    assert relative_position_index(2).tolist() == expected


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
def test_containers_and_prefixes(tmp_path, build, export, prefix):
    source, model = build(seed=1), build(seed=2)
    weights = {prefix + name: tensor for name, tensor in export(source).items()}
    path = save(tmp_path / "x.pth", weights, iteration=3, optimizer={"state": {}}, scheduler={})
    load_fiber_checkpoint(model, path)
    assert same(dict(model.state_dict()), dict(source.state_dict()))
    torch.save(weights, tmp_path / "bare.pth")
    other = build(seed=3)
    load_fiber_checkpoint(torch.nn.ModuleDict({"module": other})["module"], tmp_path / "bare.pth")
    assert same(dict(other.state_dict()), dict(source.state_dict()))


def test_averaged_weights_only_when_asked_for(tmp_path, build, export):
    plain, average = build(seed=1), build(seed=2)
    ema = {f"module.{name}": tensor for name, tensor in export(average).items()}
    path = save(tmp_path / "x.pth", export(plain), model_ema=ema)
    model = build(seed=3)
    load_fiber_checkpoint(model, path)
    assert torch.equal(model.head.scales, plain.head.scales)
    load_fiber_checkpoint(model, path, use_ema=True)
    assert torch.equal(model.head.scales, average.head.scales)
    with pytest.raises(ValueError, match="no averaged weights"):
        load_fiber_checkpoint(model, save(tmp_path / "y.pth", export(plain)), use_ema=True)


@pytest.mark.parametrize("named", ["x.pth", "/gone/OUTPUT/x.pth", "OUTPUT/x.pth\n"])
def test_last_checkpoint_names_a_file_beside_it(tmp_path, build, export, named):
    source = build(seed=1)
    save(tmp_path / "x.pth", export(source))
    (tmp_path / "last_checkpoint").write_text(named)
    for path in (tmp_path / "last_checkpoint", tmp_path):
        model = build(seed=2)
        load_fiber_checkpoint(model, path)
        assert torch.equal(model.head.scales, source.head.scales)
    (tmp_path / "last_checkpoint").write_text("y.pth")
    with pytest.raises(FileNotFoundError, match="y.pth"):
        load_fiber_checkpoint(build(), tmp_path / "last_checkpoint")


@pytest.mark.parametrize("v3", [False, True])
def test_the_other_variant_is_named(tmp_path, build, export, v3):
    path = save(tmp_path / "x.pth", export(build(query_norm=v3)))
    found = "v3" if v3 else "v2"
    with pytest.raises(ValueError, match=rf"fusion {found} .*query_norm={v3}"):
        load_fiber_checkpoint(build(query_norm=not v3), path)


def test_unused_entries_are_reported_and_dropped(build, export, caplog):
    weights = export(build())
    body = "fusion_backbone.backbone.body.layers.0.blocks.0."
    weights["fusion_backbone.language_backbone.body.model.pooler.dense.weight"] = torch.ones(2)
    weights[f"{body}attn_mask"] = torch.ones(2)
    with caplog.at_level(logging.INFO):
        converted = convert_fiber_state_dict(weights)
    assert converted.keys() == build().state_dict().keys()
    # Seven index buffers, position ids, two of the class convolution, five anchors, and two here.
    assert "Dropped 17 entries" in caplog.text


def test_misfits_are_listed_with_shapes_and_nothing_is_loaded(tmp_path, build, export):
    weights = export(build(seed=1))
    del weights["rpn.head.log_scale"]
    weights["rpn.head.bbox_pred.bias"] = torch.zeros(5)
    weights["fusion_backbone.backbone.fpn.fpn_inner9.bias"] = torch.zeros(7)
    model = build(seed=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_fiber_checkpoint(model, save(tmp_path / "x.pth", weights))
    message = str(error.value)
    assert r"1 missing: head.log_scale (1,)" in message
    assert r"1 unexpected: backbone.neck.laterals.7.bias (7,)" in message
    assert r"1 of another shape: head.bbox_pred.bias (5,) instead of (4,)" in message
    assert same(before, dict(model.state_dict()))


def test_unknown_names_gaps_and_doubles(build, export):
    weights = export(build())
    with pytest.raises(ValueError, match=r"rpn.head.new \(3,\)"):
        convert_fiber_state_dict({**weights, "rpn.head.new": torch.zeros(3)})
    gap = {name: t for name, t in weights.items() if name != "rpn.head.scales.1.scale"}
    with pytest.raises(ValueError, match="count from 0"):
        convert_fiber_state_dict(gap)
    with pytest.raises(ValueError, match="with and without a prefix"):
        convert_fiber_state_dict({**weights, "module.rpn.head.bias0": torch.zeros(1)})
    with pytest.raises(ValueError, match="head.new"):
        export_fiber_state_dict({"head.new": torch.zeros(1)})
