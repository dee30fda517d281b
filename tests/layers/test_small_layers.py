import torch
from torchvision.ops import sigmoid_focal_loss

from fiber_d2.layers import DropBlock2d, DyReLU, class_aware_nms, token_sigmoid_focal_loss


def test_focal_loss_agrees_with_torchvision_on_unmasked_tokens():
    logits = torch.randn(2, 7, 5) * 3
    targets = torch.rand(2, 7, 5) > 0.8
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    expected = sigmoid_focal_loss(logits, targets.float(), alpha=0.25, gamma=2.0)
    expected = sum(expected[image][:, mask[image]].sum() for image in range(2))
    found = token_sigmoid_focal_loss(logits, targets, mask)
    torch.testing.assert_close(found, expected)


def test_focal_loss_of_extreme_logits_is_finite():
    logits = torch.tensor([[[50000.0, -50000.0]]], requires_grad=True)
    loss = token_sigmoid_focal_loss(
        logits, torch.tensor([[[False, True]]]), torch.ones(1, 2, dtype=torch.bool)
    )
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def _brute_force_nms(boxes, scores, classes, threshold, plus_one):
    order = sorted(range(len(boxes)), key=lambda i: -scores[i])
    kept = []
    for i in order:
        suppressed = False
        for j in kept:
            if classes[i] != classes[j]:
                continue
            overlap_w = min(boxes[i][2], boxes[j][2]) - max(boxes[i][0], boxes[j][0]) + plus_one
            overlap_h = min(boxes[i][3], boxes[j][3]) - max(boxes[i][1], boxes[j][1]) + plus_one
            inter = max(overlap_w, 0) * max(overlap_h, 0)
            area = [
                (b[2] - b[0] + plus_one) * (b[3] - b[1] + plus_one) for b in (boxes[i], boxes[j])
            ]
            suppressed |= inter / (area[0] + area[1] - inter) > threshold
        if not suppressed:
            kept.append(i)
    return kept


def test_nms_agrees_with_brute_force():
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(60, 2, generator=generator) * 20
    boxes = torch.cat([corner, corner + torch.rand(60, 2, generator=generator) * 12], dim=1)
    scores = torch.rand(60, generator=generator)
    classes = torch.randint(0, 3, (60,), generator=generator)
    for legacy in (True, False):
        kept = class_aware_nms(boxes, scores, classes, 0.5, legacy=legacy)
        expected = _brute_force_nms(
            boxes.tolist(), scores.tolist(), classes.tolist(), 0.5, float(legacy)
        )
        assert kept.tolist() == expected
    assert class_aware_nms(boxes[:0], scores[:0], classes[:0], 0.5).tolist() == []


def test_nms_counts_pixels_inclusively():
    # Shifted by one of five pixels: IoU 16/24 plainly, 25/35 with inclusive corners.
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 5.0]])
    scores, classes = torch.tensor([0.9, 0.8]), torch.zeros(2, dtype=torch.int64)
    assert class_aware_nms(boxes, scores, classes, 0.82, legacy=True).tolist() == [0]
    assert class_aware_nms(boxes, scores, classes, 0.82, legacy=False).tolist() == [0, 1]


def test_drop_block_drops_blocks_and_keeps_the_mean():
    torch.manual_seed(0)
    layer = DropBlock2d(0.3, 3).train()
    x = torch.ones(8, 4, 40, 40)
    out = layer(x)
    torch.testing.assert_close(out.mean(), torch.tensor(1.0))
    kept = out > 0
    assert torch.equal(kept, kept[:, :1].expand_as(kept)), "one mask for all channels"
    # Every hole contains a whole 3x3 block (or its part at the border).
    holes = (~kept[:, :1]).float()
    eroded = -torch.nn.functional.max_pool2d(-holes, 3, 1, 1)
    reopened = torch.nn.functional.max_pool2d(eroded, 3, 1, 1)
    assert torch.equal(reopened[..., 2:-2, 2:-2], holes[..., 2:-2, 2:-2])
    assert 0.2 < holes.mean() < 0.3
    assert torch.equal(layer.eval()(x), x)


def test_dyrelu_follows_its_formula():
    torch.manual_seed(0)
    layer = DyReLU(8).double()
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    out = layer(x)
    for image in range(2):
        squeezed = x[image].mean(dim=(1, 2))
        theta = layer.fc2(layer.fc1(squeezed).clamp(min=0))
        theta = ((theta + 3).clamp(0, 6) / 6).view(4, 8)
        for channel in range(8):
            a1, b1, a2, b2 = theta[:, channel]
            value = x[image, channel]
            expected = torch.maximum(value * (2 * a1) + b1 - 0.5, value * (2 * a2 - 1) + b2 - 0.5)
            torch.testing.assert_close(out[image, channel], expected)
