"""Training cases: assignment, targets, losses and gradients, under the file's array names.

Letters: B images, A anchors, T tokens, N boxes of all images of a case.
"""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F

from fiber_d2.checkpoint.convert import rename_to_fiber
from fiber_d2.layers import token_sigmoid_focal_loss
from fiber_d2.modeling import FIBER
from fiber_d2.modeling.boxes import box_centers, centerness_targets, encode_boxes
from fiber_d2.modeling.fiber import pad_stack

from .fixture import Fill, Fixture, FixtureError, pad_images

Arrays = dict[str, np.ndarray]

# The original's names of the losses.
LOSS_NAMES = {
    "loss_reg": "loss_box",
    "loss_centerness": "loss_centerness",
    "loss_dot_product_token": "loss_token",
}
# Multiplied by 0 there; the class convolution is frozen.
UNUSED_LOSS = "loss_cls"
SLICES = {
    "grad_dy2_conv0": ("rpn.head.dyhead_tower.2.DyConv.0.conv.weight", (32, 32)),
    "grad_dy2_offset": ("rpn.head.dyhead_tower.2.offset.weight", (1, 32)),
}


def train_arrays(
    fixture: Fixture, model: FIBER, fill: Fill, case: str, unused: dict[str, torch.Tensor]
) -> tuple[Arrays, list[str]]:
    """Everything of one training case, and remarks about accepted differences."""
    model.train()
    ids, mask = fixture.text(case)
    features = model.backbone(pad_images(fixture.images(fill)), ids, mask)
    outputs = model.head(features.pyramid, features.text, mask)
    per_image = fixture.boxes(case)
    boxes = pad_stack(per_image)
    valid = pad_stack([torch.ones(len(b), dtype=torch.bool) for b in per_image], False)
    rows = fixture.tensor(f"{case}/positive_map_binary")
    if len(rows) != sum(map(len, per_image)):
        raise FixtureError(f"{fixture.source}, case {case}: one row of the positive map per box.")
    rows = rows[:, : ids.shape[1]]
    binary = pad_stack([r.bool() for r in rows.split([len(b) for b in per_image])], False)
    normalised = binary.float() / (binary.sum(dim=-1, keepdim=True) + 1e-6)

    found: Arrays = {}
    assigned = model.head.loss.assigner(outputs.anchors, boxes, valid)
    remarks = []
    stored = fixture.tensor(f"{case}/assigned_gt").long()
    if stored.shape == assigned.shape and not torch.equal(stored, assigned):
        differing = (stored != assigned).sum().item()
        if only_ties_differ(outputs.anchors, boxes, assigned, stored):
            remarks.append(f"{case}: {differing} anchors at equal distances assigned otherwise")
            assigned = stored
    found[f"{case}/assigned_gt"] = assigned.numpy()
    anchors = torch.cat(outputs.anchors)
    image, anchor = (assigned >= 0).nonzero(as_tuple=True)
    target = boxes[image, assigned[image, anchor]] if len(image) else boxes.new_zeros(0, 4)
    found[f"{case}/pos_reg_targets"] = encode_boxes(target, anchors[anchor]).numpy()
    found[f"{case}/pos_centerness_targets"] = centerness_targets(target, anchors[anchor]).numpy()

    names = [str(name) for name in fixture.get(f"{case}/loss_names")]
    unknown = [name for name in names if name not in (*LOSS_NAMES, UNUSED_LOSS)]
    if unknown:
        raise FixtureError(f"{fixture.source}, case {case}: unknown losses {unknown}.")
    with given_assignment(model, assigned):
        losses = {
            kind: model.head.losses(outputs, mask, boxes, valid, positive_map)
            for kind, positive_map in (("binary", binary), ("normalised", normalised))
        }
    for kind, values in losses.items():
        found[f"{case}/{kind}_losses"] = np.array(
            [values[LOSS_NAMES[n]].item() if n in LOSS_NAMES else 0.0 for n in names]
        )
    found[f"{case}/raw_cls_loss_losses"] = class_loss(outputs.features, unused, assigned)

    binary_losses = losses["binary"]
    for kind, total in (
        ("regctr", binary_losses["loss_box"] + binary_losses["loss_centerness"]),
        ("binary", sum(binary_losses.values())),
    ):
        gradients = original_gradients(model, total, keep_graph=kind == "regctr")
        found[f"{case}/{kind}_grad_norm"] = np.array(
            [
                gradients[name].double().norm().item() if name in gradients else np.nan
                for name in map(str, fixture.get("param_names"))
            ]
        )
        for suffix, (name, steps) in SLICES.items():
            slices = tuple(slice(None, None, step) for step in steps)
            if name in gradients:
                found[f"{case}/{kind}_{suffix}"] = gradients[name][slices].numpy()
    return found, remarks


def original_gradients(
    model: FIBER, loss: torch.Tensor, *, keep_graph: bool
) -> dict[str, torch.Tensor]:
    """Gradients of the parameters that have one, under the original's names."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(
        loss, list(trained.values()), retain_graph=keep_graph, allow_unused=True
    )
    return rename_to_fiber({n: g for n, g in zip(trained, gradients) if g is not None})


def requires_grad_array(fixture: Fixture, model: FIBER) -> np.ndarray:
    """Which of the original's parameters are trained, in the file's order."""
    flags = {
        name: torch.full_like(p, float(p.requires_grad))
        if name == "head.scales"
        else torch.tensor(float(p.requires_grad))
        for name, p in model.named_parameters()
    }
    trained = {name: bool(flag.item()) for name, flag in rename_to_fiber(flags).items()}
    # The class convolution, which only the original builds, is frozen there.
    return np.array([trained.get(str(n), False) for n in fixture.get("param_names")])


@contextmanager
def given_assignment(model: FIBER, assigned: torch.Tensor):
    """Let the losses use ``assigned`` meanwhile."""
    loss = model.head.loss
    assigner = loss.assigner
    loss.assigner = lambda *_: assigned
    try:
        yield
    finally:
        loss.assigner = assigner


def only_ties_differ(
    anchors_per_level: list[torch.Tensor],
    boxes: torch.Tensor,
    ours: torch.Tensor,
    theirs: torch.Tensor,
    topk: int = 9,
) -> bool:
    """Whether two assignments differ only in anchors that are equally far at the last place.

    Which of them torch.topk takes is unspecified, so either is right.
    """
    for image, anchor in (ours != theirs).nonzero().tolist():
        claimed = {int(side[image, anchor]) for side in (ours, theirs)} - {-1}
        start = 0
        for level in anchors_per_level:
            if anchor < start + len(level):
                break
            start += len(level)
        centers = box_centers(level)
        for box in claimed:
            distance = (box_centers(boxes[image, box]) - centers).pow(2).sum(dim=-1).sqrt()
            place = min(topk, len(level))
            last = distance.sort().values[place - 1]
            tied = (distance == last).sum().item() > 1
            if not tied or distance[anchor - start] != last:
                return False
    return True


def class_loss(
    features: list[torch.Tensor], unused: dict[str, torch.Tensor], assigned: torch.Tensor
) -> np.ndarray:
    """The focal loss of the class convolution, which the original multiplies by 0.

    The label of a positive anchor is 1 + the index of its box, of a negative one 0; channel c is
    about label c + 1.
    """
    weight, bias = (unused[f"rpn.head.cls_logits.{leaf}"] for leaf in ("weight", "bias"))
    with torch.no_grad():
        logits = torch.cat(
            [F.conv2d(x, weight, bias).flatten(2).transpose(1, 2) for x in features], dim=1
        )  # (B, A, channels)
        target = F.one_hot(assigned.clamp(min=0), logits.shape[-1]) * (assigned >= 0)[..., None]
        every_channel = torch.ones_like(logits[:, 0], dtype=torch.bool)
        total = token_sigmoid_focal_loss(logits, target > 0, every_channel)
        positives = max(1, int((assigned >= 0).sum()))
    return np.array([total.item() / positives])
