import math

import torch

from fiber_d2.modeling import AnchorGrid, ATSSAssigner


def _brute_force(anchors_per_level, boxes, topk):
    """ATSS for one image with Python loops and floats."""
    anchors = [a for level in anchors_per_level for a in level.tolist()]
    result, best = [-1] * len(anchors), [-math.inf] * len(anchors)
    for number, box in enumerate(boxes):
        center = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        candidates, start = [], 0
        for level in anchors_per_level:
            indices = range(start, start + len(level))
            start += len(level)

            def distance(i, center=center):
                a = anchors[i]
                return math.dist(((a[0] + a[2]) / 2, (a[1] + a[3]) / 2), center)

            candidates += sorted(indices, key=distance)[:topk]
        ious = []
        for i in candidates:
            a = anchors[i]
            w = min(a[2], box[2]) - max(a[0], box[0]) + 1
            h = min(a[3], box[3]) - max(a[1], box[1]) + 1
            inter = max(w, 0) * max(h, 0)
            areas = [(b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (a, box)]
            ious.append(inter / (sum(areas) - inter))
        mean = sum(ious) / len(ious)
        std = math.sqrt(sum((x - mean) ** 2 for x in ious) / (len(ious) - 1))
        for i, iou in zip(candidates, ious):
            a = anchors[i]
            x, y = (a[0] + a[2]) / 2, (a[1] + a[3]) / 2
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if iou >= mean + std and inside and iou > best[i]:
                result[i], best[i] = number, iou
    return result


def test_agrees_with_loops_on_random_boxes():
    generator = torch.Generator().manual_seed(0)
    levels = AnchorGrid(strides=(8, 16, 32), sizes=(32, 64, 128))(
        [torch.zeros(1, 1, 12, 16), torch.zeros(1, 1, 6, 8), torch.zeros(1, 1, 1, 1)]
    )
    images = []
    for count in (3, 0, 7):
        corner = torch.rand(count, 2, generator=generator) * 70
        size = 8 + torch.rand(count, 2, generator=generator) * 50
        images.append(torch.cat([corner, corner + size], dim=1))
    boxes = torch.zeros(3, 7, 4)
    valid = torch.zeros(3, 7, dtype=torch.bool)
    for image, given in enumerate(images):
        boxes[image, : len(given)], valid[image, : len(given)] = given, True
    found = ATSSAssigner(topk=9)(levels, boxes, valid)
    for image, given in enumerate(images):
        assert found[image].tolist() == _brute_force(levels, given.tolist(), 9)
    assert (found[0] >= 0).any() and (found[2] >= 0).any()


def test_no_boxes_at_all():
    levels = AnchorGrid(strides=(8,), sizes=(32,))([torch.zeros(1, 1, 2, 2)])
    found = ATSSAssigner()(levels, torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.bool))
    assert found.tolist() == [[-1] * 4] * 2


def test_contested_anchor_goes_to_the_larger_overlap_then_to_the_first():
    levels = AnchorGrid(strides=(8,), sizes=(32,))([torch.zeros(1, 1, 8, 8)])
    close, far = [10.0, 10.0, 41.0, 41.0], [2.0, 2.0, 33.0, 33.0]
    boxes = torch.tensor([[far, close, close]])
    found = ATSSAssigner()(levels, boxes, torch.ones(1, 3, dtype=torch.bool))[0]
    # The anchor around (27.5, 27.5) overlaps the close boxes most.
    assert found[3 * 8 + 3] == 1
    assert 2 not in found.tolist(), "of two equal boxes the first takes every anchor"
