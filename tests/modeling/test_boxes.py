import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.ops import generalized_box_iou

from fiber_d2.modeling import boxes as module
from fiber_d2.modeling.boxes import (
    AnchorGrid,
    centerness_targets,
    decode_boxes,
    encode_boxes,
    generalized_iou,
    pairwise_iou_inclusive,
)


def _boxes(count, seed):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 50
    return torch.cat([corner, corner + 1 + torch.rand(count, 2, generator=generator) * 40], dim=1)


def test_anchors_in_the_inclusive_convention():
    grid = AnchorGrid(strides=(8, 16), sizes=(64, 128))
    first, second = grid([torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 1, 2)])
    # Centre (3.5, 3.5), half a side of 31.5: 64 pixels from -28 to 35.
    assert first.shape == (6, 4)
    assert first[0].tolist() == [-28.0, -28.0, 35.0, 35.0]
    assert first[1].tolist() == [-20.0, -28.0, 43.0, 35.0]
    assert first[3].tolist() == [-28.0, -20.0, 35.0, 43.0]
    assert second[1].tolist() == [-40.0, -56.0, 87.0, 71.0]


def test_anchors_of_the_last_sizes_are_kept(monkeypatch):
    monkeypatch.setattr(module, "KEPT_GRIDS", 2)
    grid = AnchorGrid(strides=(8,), sizes=(64,))
    sizes = [(2, 3), (3, 2), (2, 2)]
    maps = [torch.zeros(1, 1, *size) for size in sizes]
    with torch.inference_mode():
        first = grid(maps[:1])[0]
    assert grid([torch.ones(5, 2, 2, 3)])[0] is first
    assert torch.equal(grid(maps[1:2])[0][2], first[3])
    grid(maps[:1])
    grid(maps[2:])  # (3, 2) has not been asked for the longest time
    assert [key[1] for key in grid._kept] == [(2, 3), (2, 2)]
    assert not grid.state_dict() and not copy.deepcopy(grid)._kept
    # Made in inference mode, and used in training all the same.
    deltas = torch.zeros(6, 4, requires_grad=True)
    decode_boxes(deltas, grid(maps[:1])[0]).sum().backward()
    assert deltas.grad.abs().sum() > 0


def test_what_is_traced_makes_its_own_anchors():
    grid = AnchorGrid(strides=(8,), sizes=(64,))
    expected = grid([torch.zeros(1, 1, 2, 3)])
    with FakeTensorMode():
        fakes = grid([torch.zeros(1, 1, 2, 3)]), grid([torch.zeros(1, 1, 4, 4)])
    assert [len(levels[0]) for levels in fakes] == [6, 16]
    traced = torch.jit.trace(lambda x: grid([x])[0], torch.zeros(1, 1, 4, 5), check_trace=False)
    assert len(traced(torch.zeros(1, 1, 4, 5))) == 20
    program = torch.export.export(_Anchors(grid), (torch.zeros(1, 1, 2, 3),), strict=False)
    assert torch.equal(program.module()(torch.zeros(1, 1, 2, 3)), expected[0])
    assert len(grid._kept) == 1
    assert type(grid([torch.zeros(1, 1, 2, 3)])[0]) is torch.Tensor


class _Anchors(torch.nn.Module):
    def __init__(self, grid):
        super().__init__()
        self.grid = grid

    def forward(self, x):
        return self.grid([x])[0]


def test_encoding_is_the_inverse_of_decoding():
    anchors, targets = _boxes(20, 0), _boxes(20, 1)
    code = encode_boxes(targets, anchors)
    for row, box, anchor in zip(code, targets, anchors):
        assert row.tolist() == pytest.approx(_encode(box.tolist(), anchor.tolist()), abs=1e-3)
    torch.testing.assert_close(decode_boxes(code, anchors), targets, atol=1e-4, rtol=1e-5)


def _encode(box, anchor):
    """The inclusive box code in plain Python floats."""
    width, height = anchor[2] - anchor[0] + 1, anchor[3] - anchor[1] + 1
    box_w, box_h = box[2] - box[0] + 1, box[3] - box[1] + 1
    return [
        10 * ((box[0] + box[2]) - (anchor[0] + anchor[2])) / 2 / width,
        10 * ((box[1] + box[3]) - (anchor[1] + anchor[3])) / 2 / height,
        5 * math.log(box_w / width),
        5 * math.log(box_h / height),
    ]


coordinate = st.floats(0, 500)


@settings(max_examples=50, deadline=None)
@given(coordinate, coordinate, st.floats(1, 300), st.floats(1, 300))
def test_decoding_inverts_the_encoding(x, y, width, height):
    box, anchor = [x, y, x + width, y + height], [-28.0, -20.0, 35.0, 43.0]
    deltas = torch.tensor(_encode(box, anchor), dtype=torch.float64)
    decoded = decode_boxes(deltas, torch.tensor(anchor, dtype=torch.float64))
    torch.testing.assert_close(decoded, torch.tensor(box, dtype=torch.float64))


def test_decoding_limits_the_growth():
    decoded = decode_boxes(torch.tensor([0.0, 0.0, 1e4, 1e4]), torch.tensor([0.0, 0.0, 15.0, 15.0]))
    assert math.isclose(float(decoded[2] - decoded[0] + 1), 1000.0, rel_tol=1e-5)


def test_inclusive_overlaps():
    found = pairwise_iou_inclusive(
        torch.tensor([[0.0, 0.0, 9.0, 9.0]]),
        torch.tensor([[0.0, 0.0, 9.0, 9.0], [5.0, 0.0, 14.0, 9.0], [10.0, 0.0, 19.0, 9.0]]),
    )
    torch.testing.assert_close(found, torch.tensor([[1.0, 50 / 150, 0.0]]))


def test_generalized_iou_agrees_with_torchvision():
    boxes, targets = _boxes(40, 0), _boxes(40, 1)
    expected = generalized_box_iou(boxes, targets).diagonal()
    torch.testing.assert_close(generalized_iou(boxes, targets), expected, atol=1e-5, rtol=1e-5)


def test_generalized_iou_raises_inverted_corners():
    found = generalized_iou(
        torch.tensor([5.0, 5.0, 1.0, 2.0]), torch.tensor([0.0, 0.0, 10.0, 10.0])
    )
    torch.testing.assert_close(found, torch.tensor(0.0), atol=1e-6, rtol=0)


def test_centerness_by_hand():
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [-5.0, 0.0, 5.0, 10.0], [80.0, 0, 90, 10]])
    box = torch.tensor([0.0, 0.0, 20.0, 10.0]).expand(3, 4)
    # Centres (5, 5): sides 5, 15, 5, 5. (0, 5): on the border. (85, 5): outside.
    expected = torch.tensor([math.sqrt(5 / 15), 0.0, 0.0])
    torch.testing.assert_close(centerness_targets(box, anchors), expected)
