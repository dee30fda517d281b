"""What this project computes for the inputs of a file, under the file's array names.

Letters: B images, A anchors, T tokens, C channels, L levels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from fiber_d2.modeling import FIBER, PostProcessor

from .fixture import Fill, Fixture, FixtureError, pad_images

Arrays = dict[str, np.ndarray]

# Name of a detection setting: threshold, candidates per level, aggregation, limit.
_SETTING = re.compile(r"det_th(?P<th>\d+)(?:_top(?P<top>\d+)|_max|_agg\d+|_d(?P<limit>\d+))*")
DEFAULT_TOP, DEFAULT_LIMIT = 1000, 100


def statistics(tensor: torch.Tensor) -> np.ndarray:
    """float64 ``[mean, standard deviation, sum |x|, max |x|]``."""
    x = tensor.detach().double()
    return torch.stack([x.mean(), x.std(), x.abs().sum(), x.abs().max()]).numpy()


def general_arrays(fixture: Fixture, model: FIBER, fill: Fill) -> Arrays:
    """Inputs as generated, and anchors."""
    images = fixture.images(fill)
    batch = pad_images(images)
    maps = [
        torch.empty(1, 1, *size, device="meta")
        for size in level_sizes(batch.shape[-2:], len(model.head.anchors.strides))
    ]
    levels = model.head.anchors([torch.empty(m.shape) for m in maps])
    anchors = torch.cat(levels)
    visible = [
        (anchors[:, 0] >= 0) & (anchors[:, 1] >= 0) & (anchors[:, 2] < w) & (anchors[:, 3] < h)
        for h, w in fixture.image_sizes
    ]
    return {
        "padded_hw": np.array(batch.shape[-2:]),
        "image_stats": np.stack([statistics(image) for image in images]),
        "image_corner": batch[:, :, :8, :8].numpy(),
        "anchors": anchors.numpy(),
        "anchors_per_level": np.array([len(level) for level in levels]),
        "anchor_visibility": torch.stack(visible).numpy(),
    }


def level_sizes(padded: tuple[int, int], levels: int) -> list[tuple[int, int]]:
    """Height and width of p3, p4, ...: an eighth, then halves rounded up."""
    sizes = [(padded[0] // 8, padded[1] // 8)]
    while len(sizes) < levels:
        height, width = sizes[-1]
        sizes.append((-(-height // 2), -(-width // 2)))
    return sizes


class Recorder(NamedTuple):
    """What hooks saw of the dynamic head.

    Attributes:
        blocks: per block, its output levels.
        offsets: per block, the mean size of its offsets per level.
    """

    blocks: list[list[torch.Tensor]]
    offsets: list[list[float]]


@contextmanager
def recording(tower: nn.Sequential) -> Iterator[Recorder]:
    """Collect the outputs of every block of the dynamic head meanwhile."""
    recorder = Recorder([], [[] for _ in tower])
    handles = []
    for number, block in enumerate(tower):

        def on_offset(_m, _x, output, number=number):
            # Two offsets and one modulation per kernel position.
            displacements = output[:, : output.shape[1] // 3 * 2]
            recorder.offsets[number].append(displacements.abs().double().mean().item())

        handles.append(block.offset.register_forward_hook(on_offset))
        handles.append(block.register_forward_hook(lambda _m, _x, out: recorder.blocks.append(out)))
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def eval_arrays(fixture: Fixture, model: FIBER, fill: Fill, case: str) -> Arrays:
    """Every stage of one evaluation case, in full, and its detections."""
    model.eval()
    ids, mask = fixture.text(case)
    with recording(model.head.tower) as recorder:
        features = model.backbone(pad_images(fixture.images(fill)), ids, mask)
        outputs = model.head(features.pyramid, features.text, mask)
    found: Arrays = {}

    def put(name: str, tensor: torch.Tensor, *, stats: bool = False) -> None:
        found[f"{case}/{name}"] = tensor.numpy()
        if stats:
            found[f"{case}/{name.removesuffix('_slice')}_stats"] = statistics(tensor)

    for level, stage in enumerate(features.stages, start=3):
        put(f"c{level}_slice", stage, stats=True)
    for level, feature in enumerate(features.pyramid, start=3):
        put(f"p{level}_slice", feature, stats=True)
    embedded = features.text * mask[..., None]
    put("text_hidden", features.text, stats=True)
    put("text_embedded", embedded, stats=True)
    put("text_aggregate", embedded.sum(dim=1) / mask.sum(dim=1, keepdim=True))
    put(
        "dyhead_absmean",
        torch.tensor([[x.abs().double().mean() for x in block] for block in recorder.blocks]),
    )
    put("offset_absmean", torch.tensor(recorder.offsets, dtype=torch.float64))
    counts = [len(level) for level in outputs.anchors]
    split = zip(
        *(
            tensor.split(counts, dim=1)
            for tensor in (outputs.box_deltas, outputs.centerness, outputs.token_logits)
        )
    )
    for level, (deltas, centerness, logits) in enumerate(split, start=3):
        last = outputs.features[level - 3]
        put(f"dyblock0_out_p{level}", recorder.blocks[0][level - 3])
        put(f"dyhead_out_p{level}", last, stats=True)
        size = last.shape[-2:]
        put(f"bbox_reg_p{level}", deltas.transpose(1, 2).unflatten(2, size))
        put(f"centerness_p{level}", centerness.unflatten(1, size)[:, None])
        put(f"dot_product_logits_p{level}", logits, stats=True)
    for setting in settings_of(fixture, case):
        found.update(_detections(fixture, outputs, case, setting))
    return found


def settings_of(fixture: Fixture, case: str) -> list[str]:
    """Names of the detection settings that the file has for a case."""
    names = (n.split("/") for n in fixture.arrays if n.startswith(f"{case}/det_"))
    return list(dict.fromkeys(parts[1] for parts in names))


def parse_setting(name: str) -> dict[str, float | int | str]:
    """Thresholds and limits that a setting's name spells: ``det_th005_top50_d1000``."""
    match = _SETTING.fullmatch(name)
    if not match:
        raise FixtureError(f"The detection setting {name!r} is none that this tool can read.")
    digits = match["th"]
    return {
        "score_thresh": float(f"{digits[0]}.{digits[1:] or 0}"),
        "pre_nms_topk": int(match["top"] or DEFAULT_TOP),
        "max_detections": int(match["limit"] or DEFAULT_LIMIT),
        "score_aggregation": "max" if "_max" in name else "mean",
    }


def _detections(fixture: Fixture, outputs, case: str, setting: str) -> Arrays:
    postprocessor = PostProcessor(**parse_setting(setting))
    table = "positive_map_agg_json" if "_agg" in setting else "positive_map_json"
    labels, rows = fixture.positive_map(case, table, outputs.token_logits.shape[-1])
    results = postprocessor(
        outputs.anchors,
        outputs.token_logits,
        outputs.box_deltas,
        outputs.centerness,
        rows.expand(len(fixture.image_sizes), -1, -1),
        fixture.image_sizes,
    )
    found: Arrays = {}
    for i, result in enumerate(results):
        prefix = f"{case}/{setting}/img{i}"
        found[f"{prefix}/boxes"] = result.pred_boxes.tensor.numpy()
        found[f"{prefix}/scores"] = result.scores.numpy()
        found[f"{prefix}/labels"] = np.array(labels, dtype=np.int32)[result.pred_classes.numpy()]
    return found


@torch.no_grad()
def unit_arrays(fixture: Fixture, model: FIBER) -> Arrays:
    """The first block of the dynamic head alone, on random levels."""
    model.eval()
    rng = np.random.Generator(np.random.PCG64(int(fixture.get("dyconv_unit/seed"))))
    channels = model.head.tower.channels
    levels = [
        torch.from_numpy(rng.standard_normal((2, channels, int(h), int(w)), dtype=np.float32))
        for h, w in fixture.get("dyconv_unit/shapes")
    ]
    outputs = model.head.tower[0](levels)
    return {f"dyconv_unit/out{i}": output.numpy() for i, output in enumerate(outputs)}
