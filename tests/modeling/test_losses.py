import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import generalized_box_iou, sigmoid_focal_loss

from fiber_d2.modeling import AnchorGrid, GroundingLoss
from fiber_d2.modeling.boxes import centerness_targets, decode_boxes
from fiber_d2.modeling.metrics import collected_metrics


def _inputs(tokens=6, batch=2):
    torch.manual_seed(0)
    levels = AnchorGrid(strides=(8, 16), sizes=(32, 64))(
        [torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 4, 4)]
    )
    count = sum(len(level) for level in levels)
    return (
        levels,
        torch.randn(batch, count, tokens, requires_grad=True),
        torch.randn(batch, count, 4, requires_grad=True),
        torch.randn(batch, count, requires_grad=True),
    )


def test_agrees_with_a_loop_over_images():
    levels, logits, deltas, centerness = _inputs()
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    boxes = torch.tensor([[[4.0, 4, 30, 34], [20, 20, 60, 60]], [[10.0, 8, 40, 50], [0, 0, 0, 0]]])
    valid = torch.tensor([[True, True], [True, False]])
    positive_map = torch.zeros(2, 2, 6, dtype=torch.bool)
    positive_map[0, 0, 1:3] = positive_map[0, 1, 4] = positive_map[1, 0, 2] = True
    objective = GroundingLoss()
    with collected_metrics() as metrics:
        found = objective(levels, logits, deltas, centerness, mask, boxes, valid, positive_map)

    assigned = objective.assigner(levels, boxes, valid)
    anchors = torch.cat(levels)
    total = int((assigned >= 0).sum())
    assert total > 3
    assert metrics == {"positives_per_image": total / 2}
    token = box = center = weights = 0.0
    for image in range(2):
        positive = assigned[image] >= 0
        target = torch.zeros(len(anchors), 6)
        target[positive] = positive_map[image][assigned[image][positive]].float()
        loss = sigmoid_focal_loss(logits[image], target, alpha=0.25, gamma=2.0)
        token += loss[:, mask[image]].sum()
        target_box = boxes[image][assigned[image][positive]]
        weight = centerness_targets(target_box, anchors[positive])
        decoded = decode_boxes(deltas[image][positive], anchors[positive])
        box += ((1 - generalized_box_iou(decoded, target_box).diagonal()) * weight).sum()
        weights += weight.sum()
        center += F.binary_cross_entropy_with_logits(
            centerness[image][positive], weight, reduction="sum"
        )
    torch.testing.assert_close(found["loss_token"], token / total)
    torch.testing.assert_close(found["loss_box"], 2 * box / weights, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["loss_centerness"], center / total)


def test_without_boxes_the_losses_keep_a_gradient_path():
    levels, logits, deltas, centerness = _inputs()
    mask = torch.ones(2, 6, dtype=torch.bool)
    for boxes in (torch.zeros(2, 0, 4), torch.zeros(2, 1, 4)):
        losses = GroundingLoss()(
            levels,
            logits,
            deltas,
            centerness,
            mask,
            boxes,
            torch.zeros(boxes.shape[:2], dtype=torch.bool),
            torch.zeros(*boxes.shape[:2], 6, dtype=torch.bool),
        )
        assert losses["loss_box"] == 0 and losses["loss_centerness"] == 0
        gradients = torch.autograd.grad(sum(losses.values()), (logits, deltas, centerness))
        assert gradients[0].abs().sum() > 0
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_negatives_claim_the_last_column_only_of_full_captions():
    levels, logits, deltas, centerness = _inputs(batch=1)
    nothing = torch.zeros(1, 0, 4), torch.zeros(1, 0, dtype=torch.bool)
    positive_map = torch.zeros(1, 0, 6, dtype=torch.bool)
    mask = torch.ones(1, 6, dtype=torch.bool)

    def token_loss(column, mask=mask):
        objective = GroundingLoss(no_object_column=column)
        losses = objective(levels, logits, deltas, centerness, mask, *nothing, positive_map)
        return losses["loss_token"]

    target = torch.zeros_like(logits)
    plain = sigmoid_focal_loss(logits, target, alpha=0.25, gamma=2.0).sum()
    torch.testing.assert_close(token_loss(255), plain)
    target[..., 5] = 1
    claimed = sigmoid_focal_loss(logits, target, alpha=0.25, gamma=2.0).sum()
    torch.testing.assert_close(token_loss(5), claimed)
    short = torch.tensor([[True] * 5 + [False]])
    torch.testing.assert_close(token_loss(5, short), token_loss(255, short))


class _Watch(TorchDispatchMode):
    """Notes what the host would have to wait for: numbers and shapes from data, and copies."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        devices = {x.device.type for x in (*args, out) if isinstance(x, torch.Tensor) and x.dim()}
        if len(devices) > 1 or "scalar_dense" in str(function) or "nonzero" in str(function):
            self.found.append(str(function))
        return out


def _batch(device):
    levels, *predictions = _inputs()
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    boxes = torch.tensor([[[4.0, 4, 30, 34], [20, 20, 60, 60]], [[10.0, 8, 40, 50], [0, 0, 0, 0]]])
    valid = torch.tensor([[True, True], [True, False]])
    positive_map = torch.rand(2, 2, 6) > 0.5
    given = [*predictions, mask, boxes, valid, positive_map]
    learns = [x.requires_grad and torch.is_grad_enabled() for x in given]
    moved = [x.detach().to(device).requires_grad_(yes) for x, yes in zip(given, learns)]
    return [level.to(device) for level in levels], *moved


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nothing_depends_on_numbers_that_the_host_would_wait_for(device):
    """On tensors without numbers, also those of a GPU that is not there."""
    # There is no backward pass for the devices of other machines.
    with FakeTensorMode(), torch.set_grad_enabled(device == "cpu"):
        batch = _batch(device)
        with _Watch() as watch:
            losses = GroundingLoss(no_object_column=5)(*batch)
    assert watch.found == []
    assert {loss.device.type for loss in losses.values()} == {device}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_host_does_not_wait_for_the_gpu():
    batch = _batch("cuda")
    objective = GroundingLoss(no_object_column=5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = objective(*batch)
        gradients = torch.autograd.grad(sum(losses.values()), batch[1:4])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = objective(*_batch("cpu"))
    for name, loss in losses.items():
        torch.testing.assert_close(loss.cpu(), expected[name], rtol=1e-4, atol=1e-5)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
