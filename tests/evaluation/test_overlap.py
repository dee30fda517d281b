import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torchvision.ops import generalized_box_iou

from fiber_d2.evaluation.overlap import NEVER, box_overlap, first_hit_ranks


def _boxes(count):
    corners = hnp.arrays(np.float64, (count, 2, 2), elements=st.integers(0, 20).map(float))
    return corners.map(lambda c: np.concatenate([c.min(1), c.max(1) + 1], axis=1))


@given(st.integers(0, 6).flatmap(lambda n: st.tuples(_boxes(n), _boxes(n))))
@settings(max_examples=50, deadline=None)
def test_giou_agrees_with_torchvision(pair):
    first, second = pair
    expected = generalized_box_iou(torch.as_tensor(first), torch.as_tensor(second)).diagonal()
    found = box_overlap(first, second, generalized=True)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-12)


def test_boxes_without_area_do_not_divide_by_zero():
    zero = np.zeros((1, 4))
    with np.errstate(all="raise"):
        assert box_overlap(zero, zero) == 0
        assert box_overlap(zero, zero, generalized=True) == 0


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_first_hit_is_the_one_a_plain_loop_finds(data):
    sizes = data.draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=5))
    predictions = [data.draw(_boxes(p)) for p, _ in sizes]
    targets = [data.draw(_boxes(g)) for _, g in sizes]
    expected = []
    for boxes, truth in zip(predictions, targets):
        rank = NEVER
        for place, box in enumerate(boxes):
            overlaps = [box_overlap(box[None], target[None])[0] for target in truth]
            if max(overlaps, default=0) >= 0.5:
                rank = place
                break
        expected.append(rank)
    assert first_hit_ranks(predictions, targets, threshold=0.5).tolist() == expected


def test_threshold_is_inclusive_and_coordinates_are_continuous():
    target = np.array([[0.0, 0.0, 10.0, 10.0]])
    half = np.array([[0.0, 0.0, 10.0, 5.0]])  # IoU 50/100; with "+1" widths 66/121
    assert first_hit_ranks([half], [target], threshold=0.5).tolist() == [0]
    assert first_hit_ranks([half], [target], threshold=0.501).tolist() == [NEVER]


@pytest.mark.parametrize("threshold", [0, -0.5, 1.5])
def test_threshold_outside_its_range_is_refused(threshold):
    with pytest.raises(ValueError, match="iou_thresh"):
        first_hit_ranks([], [], threshold=threshold)
