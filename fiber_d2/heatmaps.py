"""Where in an image the model sees a word: token probabilities of all levels, as heat maps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

from fiber_d2.drawing import PANEL_SIDE, compose
from fiber_d2.labels import font, letter_size, line_height
from fiber_d2.modeling.postprocess import aggregate_token_scores
from fiber_d2.queries import Caption, Classes, Query
from fiber_d2.structures import Prompt

# The ground is as good as gone where a word is certain, and nearly untouched where it is not.
_FAINTEST, _STRONGEST = 0.25, 0.85


@dataclass(frozen=True)
class TokenHeatmaps:
    """How well each place of an image fits each of K words.

    Attributes:
        words: K texts.
        levels: for each level of the pyramid float32 ``(K, H_l, W_l)``, probabilities in 0..1, on
            the CPU. Place ``[i, j]`` is about the ``stride x stride`` pixels of the network input
            from ``(j * stride, i * stride)`` on; the last ones may lie in its padding.
        strides: pixels of the network input, for each level.
        input_size: (height, width) of the resized image, without padding.
        image_size: (height, width) of the image itself.
    """

    words: list[str]
    levels: list[torch.Tensor]
    strides: tuple[int, ...]
    input_size: tuple[int, int]
    image_size: tuple[int, int]

    def upsampled(self, level: int | None = None) -> torch.Tensor:
        """Probabilities at every pixel of the image, bilinear between the centres of the places.

        Args:
            level: which one; by default the largest value of all levels.

        Returns:
            float32 ``(K, height, width)``.
        """
        if level is not None:
            return self._sampled(self.levels[level], self.strides[level])
        out = self._sampled(self.levels[0], self.strides[0])
        for values, stride in zip(self.levels[1:], self.strides[1:]):
            out = torch.maximum(out, self._sampled(values, stride))
        return out

    def _sampled(self, values: torch.Tensor, stride: int) -> torch.Tensor:
        grids = []
        for places, size, wanted in zip(values.shape[1:], self.input_size, self.image_size):
            # Centres of the pixels of the image, in pixels of the network input.
            centers = (torch.arange(wanted, dtype=torch.float32) + 0.5) * (size / wanted)
            grids.append(centers / (places * stride) * 2 - 1)
        y, x = torch.meshgrid(*grids, indexing="ij")
        grid = torch.stack([x, y], dim=-1)[None]
        return F.grid_sample(
            values[None], grid, mode="bilinear", padding_mode="border", align_corners=False
        )[0]


@torch.no_grad()
def token_probabilities(
    model: nn.Module, item: Mapping[str, Any]
) -> Iterator[tuple[Prompt, list[torch.Tensor]]]:
    """Probabilities of all tokens, as the detector of a model has them before it forms scores.

    Args:
        model: FIBER, in evaluation mode.
        item: a model input: ``image`` (``(3, h, w)``) and ``prompt``, one or a list.

    Yields:
        Each prompt, and for each level of the pyramid float32 ``(T, H_l, W_l)``, on the CPU.
    """
    prompts = [item["prompt"]] if isinstance(item["prompt"], Prompt) else item["prompt"]
    with model.inference_autocast():
        prefix = model.backbone.image_prefix(model.preprocess_images([item]).tensor)
    for prompt in prompts:
        ids, mask = model.pad_prompts([prompt])
        with model.inference_autocast():
            features = model.backbone.exchange(prefix, model.backbone.text_prefix(ids, mask), mask)
            outputs = model.head(features.pyramid, features.text, mask)
        probabilities = outputs.token_logits[0].float().sigmoid().T.cpu()  # (T, A)
        sizes = [feature.shape[-2:] for feature in outputs.features]
        per_level = probabilities.split([h * w for h, w in sizes], dim=1)
        yield prompt, [x.unflatten(1, tuple(size)) for x, size in zip(per_level, sizes)]


def token_heatmaps(
    model: nn.Module, item: Mapping[str, Any], words: Mapping[int, str]
) -> TokenHeatmaps:
    """Heat maps of some targets of a model input.

    The probability of a target is formed of those of its tokens as the detector forms it
    (``score_aggregation``, by default their mean); its scores are the square root of it times the
    centerness of the place.

    Args:
        model: FIBER, in evaluation mode.
        item: ``image``, ``prompt``, and ``height`` and ``width`` before it was resized.
        words: by target id, in the order wanted.

    Raises:
        ValueError: the prompts do not ask for a target.
    """
    prompts = [item["prompt"]] if isinstance(item["prompt"], Prompt) else item["prompt"]
    ids = torch.tensor(list(words), dtype=torch.int64)
    asked = [prompt for prompt in prompts if torch.isin(prompt.target_ids.cpu(), ids).any()]
    found: dict[int, list[torch.Tensor]] = {}
    how = model.head.postprocessor.score_aggregation
    for prompt, levels in token_probabilities(model, {**item, "prompt": asked}):
        rows = torch.isin(prompt.target_ids.cpu(), ids).nonzero()[:, 0]
        positive = prompt.positive_map.cpu()[None, rows]  # (1, k, T)
        aggregated = [
            aggregate_token_scores(level.flatten(1).T[None], positive, how)[0].T.unflatten(
                1, level.shape[1:]
            )
            for level in levels
        ]
        for place, target in enumerate(prompt.target_ids[rows].tolist()):
            found[target] = [level[place] for level in aggregated]
    absent = [word for target, word in words.items() if target not in found]
    if absent:
        raise ValueError(f"The prompts do not ask for {', '.join(map(repr, absent))}.")
    strides = model.head.anchors.strides
    size = tuple(item["image"].shape[-2:])
    return TokenHeatmaps(
        list(words.values()),
        [torch.stack([found[target][i] for target in words]) for i in range(len(strides))],
        strides,
        size,
        (item.get("height", size[0]), item.get("width", size[1])),
    )


def query_for_words(query: Query, words: Sequence[str] | None) -> tuple[Query, dict[int, str]]:
    """The question that has these words as targets, and their target ids.

    Args:
        query: classes; or a caption or expression, which stays the same text.
        words: some of the classes; of a text any stretches of it, whose first occurrence is meant.
            None stands for all that the query asks for.

    Raises:
        ValueError: a word that is not among the classes or in the text, or no word.
    """
    if words is None:
        return query, dict(enumerate(query.words))
    if isinstance(words, str) or not len(words):
        raise ValueError(f"words is a list of one text or more, not {words!r}.")
    if isinstance(query, Classes):
        for word in words:
            if word not in query.words:
                raise ValueError(f"{word!r} is not among the classes that are asked for.")
        return query, {query.words.index(word): word for word in words}
    spans = [_span_of(word, query.text) for word in words]
    return Caption(query.text, spans), dict(enumerate(words))


def draw_heatmaps(
    image_rgb: np.ndarray,
    heatmaps: TokenHeatmaps,
    *,
    per_level: bool = False,
    caption: str = "",
    panel_side: int = PANEL_SIDE,
    columns: int = 3,
    peak: float | None = None,
) -> np.ndarray:
    """Heat maps over the grey image: a panel for each word, titled by it and its largest value.

    Args:
        image_rgb: uint8 ``(H, W, 3)``, the image that was asked about.
        heatmaps: of K words.
        per_level: a row for each word, with a panel for each level, instead of their maximum.
        caption: what was asked, at most three lines of it.
        panel_side: longer side of a panel, in pixels.
        columns: panels in a row, where levels are not apart.
        peak: probability that gets the last colour; by default the largest of this picture, so
            that the words of one picture can be compared.

    Returns:
        uint8 RGB picture with a scale of the colours at the bottom.

    Raises:
        ValueError: the image has another size.
    """
    if image_rgb.shape[:2] != tuple(heatmaps.image_size):
        raise ValueError(
            f"The image is {image_rgb.shape[0]} x {image_rgb.shape[1]} pixels high and wide, the "
            f"heat maps are of one of {heatmaps.image_size[0]} x {heatmaps.image_size[1]}."
        )
    scale = panel_side / max(image_rgb.shape[:2])
    height, width = (max(1, round(side * scale)) for side in image_rgb.shape[:2])
    # At the size that is shown: what is computed in between may be large.
    shown = TokenHeatmaps(
        heatmaps.words, heatmaps.levels, heatmaps.strides, heatmaps.input_size, (height, width)
    )
    titled: list[tuple[str, torch.Tensor]] = []
    if per_level:
        maps = [shown.upsampled(level) for level in range(len(shown.levels))]
        for place, word in enumerate(shown.words):
            for values, stride in zip(maps, shown.strides):
                titled.append((f"{word}, stride {stride}", values[place]))
        columns = len(shown.strides)
    else:
        titled = list(zip(shown.words, shown.upsampled()))
    top = max(float(values.max()) for _, values in titled) if peak is None else peak
    small = Image.fromarray(image_rgb).resize((width, height), Image.Resampling.LANCZOS)
    ground = np.asarray(small.convert("L"), dtype=np.float64)[..., None]
    panels = [
        (f"{title}: {float(values.max()):.2f}", _overlay(ground, values.numpy(), top))
        for title, values in titled
    ]
    return _with_scale(compose(panels, caption, columns=columns), top, letter_size(panel_side))


def _span_of(word: str, text: str) -> tuple[int, int]:
    """Where a word is in a text, as whole words if it can be; case does not matter."""
    pattern = r"\s+".join(map(re.escape, word.split()))
    found = pattern and (
        re.search(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE)
        or re.search(pattern, text, re.IGNORECASE)
    )
    if not found:
        raise ValueError(f"{word!r} is not in the text {text!r}.")
    return found.span()


def _overlay(ground: np.ndarray, values: np.ndarray, peak: float) -> np.ndarray:
    """uint8 RGB of a grey image ``(H, W, 1)`` under the colours of ``(H, W)`` in 0..peak."""
    shares = np.clip(values / max(peak, 1e-12), 0, 1)
    strength = (_FAINTEST + (_STRONGEST - _FAINTEST) * shares)[..., None]
    mixed = (1 - strength) * ground + strength * 255 * _colors(shares)
    return np.rint(mixed).astype(np.uint8)


def _colors(shares: np.ndarray) -> np.ndarray:
    return matplotlib.colormaps["inferno"](shares)[..., :3]


def _with_scale(picture: np.ndarray, peak: float, letters: int) -> np.ndarray:
    """The picture with a strip below that says which colour is which probability."""
    margin = 10
    width = min(picture.shape[1] - 2 * margin, 20 * letters)
    bar = np.tile(_colors(np.linspace(0, 1, width)), (letters, 1, 1))
    paper = Image.new("RGB", (picture.shape[1], letters + line_height(letters) + margin), "white")
    paper.paste(Image.fromarray(np.rint(255 * bar).astype(np.uint8)), (margin, 0))
    pen = ImageDraw.Draw(paper)
    for text, x, anchor in (("0", margin, "la"), (f"{peak:.2f}", margin + width, "ra")):
        pen.text((x, letters + 2), text, fill=(70, 70, 70), font=font(letters), anchor=anchor)
    return np.concatenate([picture, np.asarray(paper)])
