"""Detections by numpy against the model's own post-processing."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from fiber_d2.export.detections import detections, level_sizes
from fiber_d2.modeling import AnchorGrid, PostProcessor
from fiber_d2.modeling.boxes import decode_boxes

PADDED, SIZE = (96, 160), (81, 150)


def head_outputs(seed, targets=3, tokens=7):
    """Random logits, deltas, centerness and positive map of one image."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=random)

    maps = [torch.zeros(1, 1, -(-PADDED[0] // s), -(-PADDED[1] // s)) for s in (8, 16, 32, 64, 128)]
    anchors = AnchorGrid()(maps)
    count = sum(map(len, anchors))
    positive = torch.rand(1, targets, tokens, generator=random)
    positive = positive / positive.sum(dim=-1, keepdim=True)
    return anchors, normal(1, count, tokens), normal(1, count, 4), normal(1, count), positive


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"score_thresh": 0.5, "pre_nms_topk": 40, "nms_thresh": 0.3, "max_detections": 5},
        {"score_thresh": 0.999},
    ],
)
def test_same_detections_as_the_post_processor(seed, limits):
    anchors, logits, deltas, centerness, positive = head_outputs(seed)
    (expected,) = PostProcessor(**limits)(anchors, logits, deltas, centerness, positive, [SIZE])
    boxes, scores, classes = detections(
        decode_boxes(deltas, torch.cat(list(anchors)))[0].numpy(),
        (logits.sigmoid() @ positive.transpose(1, 2))[0].numpy(),
        centerness.sigmoid()[0].numpy(),
        padded_size=PADDED,
        image_size=SIZE,
        **limits,
    )
    assert len(boxes) == len(expected)
    assert (len(boxes) == 0) == (limits.get("score_thresh") == 0.999)
    np.testing.assert_allclose(boxes, expected.pred_boxes.tensor.numpy(), atol=1e-4)
    np.testing.assert_allclose(scores, expected.scores.numpy(), atol=1e-6)
    assert classes.tolist() == expected.pred_classes.tolist()


def test_sizes_have_to_fit():
    assert level_sizes(96, 160) == [240, 60, 15, 6, 2]
    with pytest.raises(ValueError, match="96x160 pixels has 323 anchors, but there are 7 boxes"):
        detections(np.zeros((7, 4)), np.zeros((7, 1)), np.zeros(7), padded_size=PADDED,
                   image_size=SIZE)  # fmt: skip


def test_the_file_needs_numpy_alone():
    code = (
        "import runpy, sys; sys.modules.update(torch=None, fiber_d2=None);"
        "print(sorted(runpy.run_path(sys.argv[1]).keys() & {'detections', 'level_sizes'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, sys.modules[detections.__module__].__file__],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "['detections', 'level_sizes']\n", done.stderr
