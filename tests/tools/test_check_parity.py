"""The parity tool: on a small model's own numbers, on changed ones, and on the public files."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = REPOSITORY / "tools" / "check_parity.py"
FIXTURES = REPOSITORY / "tests" / "fixtures" / "model"


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool():
    """The tool as a module; its parts are importable through it."""
    before = list(sys.path)
    yield load("check_parity", TOOL)
    sys.path[:] = before


@pytest.fixture(scope="module")
def small(tool):
    """A small v3 model, its fill, and a file of its numbers with sizes of its own."""
    from parity.compare import bound_of
    from parity.fixture import Fixture

    from fiber_d2.checkpoint import export_fiber_state_dict

    conftest = load("small_model", REPOSITORY / "tests" / "modeling" / "conftest.py")
    model = conftest.build_small_model(query_norm=True)
    fill = tool.load_fill(FIXTURES / "reference_fill.py")
    sizes = {"anchor_sizes": model.head.anchors.sizes}
    names = [n for n in export_fiber_state_dict(model.state_dict(), **sizes) if "_ids" not in n]
    names = [n for n in names if "_index" not in n and "cell_anchors" not in n]
    ids = np.array([[0, 7, 8, 9, 11, 2, 1], [0, 5, 2, 1, 1, 1, 1]])
    maps = json.dumps({"2": [1], "5": [2, 3], "9": []})
    binary = np.zeros((3, 32), np.uint8)
    binary[0, 1], binary[1, 2:4], binary[2, 1] = 1, 1, 1
    arrays = {
        "image_sizes_hw": np.array([[64, 90], [50, 96]]),
        "image_seed": np.array(3),
        "padded_hw": None,
        "image_stats": None,
        "image_corner": None,
        "anchors": None,
        "anchors_per_level": None,
        "anchor_visibility": None,
        "param_names": np.array(names),
        "param_requires_grad": np.array(["cls_logits" not in name for name in names]),
        "dyconv_unit/seed": np.array(5),
        "dyconv_unit/shapes": np.array([[5, 7], [3, 4], [2, 2], [1, 1], [1, 1]]),
        "x1/input_ids": ids,
        "x1/attention_mask": (ids != 1).astype(np.int64),
        "x1/positive_map_json": np.array(maps),
        "x1/positive_map_agg_json": np.array(maps),
        "x1/det_th0_top50_d1000/img0/boxes": None,
        "x1/det_th005_agg100/img0/boxes": None,
        "x1/det_th0_max/img0/boxes": None,
        "y1/input_ids": np.pad(ids, ((0, 0), (0, 25)), constant_values=1),
        "y1/attention_mask": np.pad((ids != 1).astype(np.int64), ((0, 0), (0, 25))),
        "y1/positive_map_binary": binary,
        "y1/img0/gt_boxes": np.array([[5, 6, 40, 50], [20, 2, 80, 60], [1, 1, 30, 30]], np.float32),
        "y1/img1/gt_boxes": np.zeros((0, 4), np.float32),
        "y1/assigned_gt": np.zeros(0),
        "y1/loss_names": np.array(
            ["loss_reg", "loss_centerness", "loss_cls", "loss_dot_product_token"]
        ),
    }
    found, _ = tool.run_cases(Fixture(arrays, "small"), model, fill)
    for name, value in found.items():
        bound = bound_of(name)
        if bound and bound.slices:
            # As the second kind of case is stored: every n-th entry only.
            value = value[tuple(slice(None, None, step) for step in bound.slices[-1])]
        arrays[name] = value
    return model, fill, {name: np.asarray(value) for name, value in arrays.items()}


@pytest.fixture
def rows_of(tool, small):
    from parity.fixture import Fixture

    model, fill, _ = small

    def rows_of(arrays):
        fixture = Fixture(dict(arrays), "small")
        found, remarks = tool.run_cases(fixture, model, fill)
        return {row.array: row for row in tool.compare(fixture, found)}, remarks

    return rows_of


def test_a_model_agrees_with_its_own_numbers(small, rows_of):
    rows, remarks = rows_of(small[2])
    assert remarks == []
    assert [row.array for row in rows.values() if not row.ok] == []
    assert max(row.max_abs for row in rows.values()) < 1e-4
    for name in (
        "x1/c3_slice",
        "x1/dyhead_out_p7_stats",
        "x1/det_th0_max/img1",
        "dyconv_unit/out4",
        "y1/binary_losses",
        "y1/regctr_grad_norm",
        "param_requires_grad",
    ):
        assert name in rows


CHANGES = {
    "image_corner": lambda a: a + 1e-3,
    "anchors": lambda a: a + 1e-5 * (np.arange(a.size).reshape(a.shape) == 7),
    "param_requires_grad": lambda a: ~a,
    "x1/p3_slice": lambda a: a * (1 + 1e-4),
    "x1/p3_stats": lambda a: a * (1 + 1e-4),
    "x1/text_aggregate": lambda a: a + 1e-3,
    "x1/dyhead_out_p5": lambda a: a + 1e-2 * np.abs(a).max(),
    "x1/centerness_p4": lambda a: a + 2e-3,
    "x1/dot_product_logits_p3": lambda a: np.where(a == a.max(), np.nan, a),
    "x1/dot_product_logits_p7": lambda a: a[:1],
    "x1/det_th0_top50_d1000/img0/scores": lambda a: a + 2e-4,
    "x1/det_th0_top50_d1000/img0/boxes": lambda a: a + 0.3,
    "x1/det_th0_max/img1/labels": lambda a: a + 1,
    "dyconv_unit/out1": lambda a: -a,
    "y1/assigned_gt": lambda a: np.where(a == 2, -1, a),
    "y1/pos_reg_targets": lambda a: a + 1e-3,
    "y1/binary_losses": lambda a: a * (1 + 1e-3),
    "y1/raw_cls_loss_losses": lambda a: a * (1 + 1e-3),
    "y1/binary_grad_norm": lambda a: a * 1.01,
}


def test_changed_numbers_are_found(small, rows_of):
    changed = dict(small[2])
    for name, change in CHANGES.items():
        changed[name] = change(changed[name])
    changed["x1/new_array"] = np.zeros(3)
    changed["x1/det_th0_top50_d1000/img0/extra"] = np.zeros(3)
    rows, _ = rows_of(changed)
    bad = {name for name, row in rows.items() if not row.ok}
    expected = {name.rsplit("/", 1)[0] if "/det_" in name else name for name in CHANGES}
    assert bad == expected | {"x1/new_array", "x1/det_th0_top50_d1000/img0/extra"}
    assert "no check covers" in rows["x1/new_array"].note
    assert "unmatched" in rows["x1/det_th0_max/img1"].note


def test_setting_names(tool):
    from parity.compute import parse_setting
    from parity.fixture import FixtureError

    def parse(name):
        return tuple(parse_setting(name).values())

    assert parse("det_th0_top1000") == (0.0, 1000, 100, "mean")
    assert parse("det_th005_agg100") == (0.05, 1000, 100, "mean")
    assert parse("det_th05_top3000") == (0.5, 3000, 100, "mean")
    assert parse("det_th0_max") == (0.0, 1000, 100, "max")
    assert parse("det_th0_agg100_d300") == (0.0, 1000, 300, "mean")
    assert parse("det_th0_top50_d1000") == (0.0, 50, 1000, "mean")
    with pytest.raises(FixtureError, match="det_new"):
        parse_setting("det_new")


def test_only_anchors_at_equal_distances_may_differ(tool):
    from parity.training import only_ties_differ

    # Centres 0, 2, 4, ... in a row; a box around 9 is equally far from 8 and 10, from 6 and 12...
    x = torch.arange(0.0, 20, 2)
    level = torch.stack([x - 1, x * 0 - 1, x + 1, x * 0 + 1], dim=1)
    boxes = torch.tensor([[[5.0, -4.0, 13.0, 4.0]]])
    ours = torch.full((1, 10), -1)
    theirs = ours.clone()
    theirs[0, 3] = 0  # at distance 3, as anchor 6 is: the fourth place is shared
    assert only_ties_differ([level], boxes, ours, theirs, topk=4)
    assert only_ties_differ([level], boxes, ours, theirs, topk=3)
    assert not only_ties_differ([level], boxes, ours, theirs, topk=2)
    theirs[0, 9] = 0
    assert not only_ties_differ([level], boxes, ours, theirs, topk=4)


def test_gradient_criteria(tool):
    from parity.compare import _compare_gradients

    names = np.array([f"w{i}" for i in range(200)] + ["x.alpha_i2t", "k.bias"])
    stored = np.append(np.linspace(1, 2, 200), [0.5, 1e-6])
    assert _compare_gradients("g", stored, stored * 1.0015, names).ok
    assert not _compare_gradients("g", stored, stored * 1.003, names).ok
    scalar = stored.copy()
    scalar[-2] *= 1.09
    scalar[-1] = np.nan  # a key's bias: zero but for rounding
    assert _compare_gradients("g", stored, scalar, names).ok
    scalar[-2] *= 1.05
    assert not _compare_gradients("g", stored, scalar, names).ok
    kinks = stored.copy()
    kinks[:1] *= 1.05
    assert _compare_gradients("g", stored, kinks, names).ok
    kinks[1:5] *= 1.05
    assert not _compare_gradients("g", stored, kinks, names).ok
    missing = stored.copy()
    missing[:5] = np.nan
    assert not _compare_gradients("g", stored, missing, names).ok


def test_frozen_stages_follow_the_file(tool):
    from parity.fixture import Fixture
    from parity.model import frozen_stages

    body = "fusion_backbone.backbone.body."
    names = [f"{body}patch_embed.norm.bias", *(f"{body}layers.{i}.x" for i in range(4))]
    for flags, expected in (
        ((1, 1, 1, 1, 1), -1),
        ((0, 1, 1, 1, 1), 0),
        ((0, 0, 1, 1, 1), 2),
        ((0, 0, 0, 1, 1), 3),
    ):
        arrays = {
            "t/input_ids": np.zeros((0, 1)),
            "image_sizes_hw": np.zeros((0, 2), int),
            "param_names": np.array(names),
            "param_requires_grad": np.array(flags, bool),
        }
        assert frozen_stages(Fixture(arrays, "x")) == expected


def test_bad_input_is_one_message_and_status_2(tool, tmp_path, capsys):
    (tmp_path / "text.npz").write_text("no zip")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.savez(tmp_path / "objects.npz", **{"e/input_ids": np.array([{}], dtype=object)})
    public = dict(np.load(FIXTURES / "fiber_b_v2.npz"))
    for lacking in ("image_sizes_hw", "param_names"):
        part = {name: public[name] for name in ("e1/input_ids", "image_sizes_hw", "param_names")}
        del part[lacking]
        np.savez(tmp_path / f"no_{lacking}.npz", **part)
    for name, message in (
        ("none.npz", "does not exist"),
        ("text.npz", "text.npz"),
        ("other.npz", "has no case"),
        ("objects.npz", "objects.npz"),
        ("no_image_sizes_hw.npz", "lacks the array image_sizes_hw"),
        ("no_param_names.npz", "lacks the array param_names"),
    ):
        assert tool.main([str(tmp_path / name)]) == 2, name
        error = capsys.readouterr().err
        assert error.startswith("check_parity: error: ") and error.count("\n") == 1
        assert message in error
    fixture = str(FIXTURES / "fiber_b_v2.npz")
    assert tool.main([fixture, "--reference-fill", str(tmp_path / "none.py")]) == 2


@pytest.mark.slow
def test_the_public_files_agree(tmp_path):
    """Every number of the original, both variants at full size."""
    report = tmp_path / "report.json"
    files = [str(FIXTURES / f"fiber_b_{version}.npz") for version in ("v2", "v3")]
    done = subprocess.run(
        [sys.executable, str(TOOL), *files, "--json", str(report)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    content = json.loads(report.read_text())
    assert content["ok"] and [file["variant"] for file in content["files"]] == ["v2", "v3"]
    for file in content["files"]:
        assert all(row["ok"] for row in file["arrays"])
        # Ten settings of two images in two cases, and everything else.
        assert sum("/det_" in row["array"] for row in file["arrays"]) == 40
        assert len(file["arrays"]) > 150
