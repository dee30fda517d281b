"""Character spans of a caption -> the tokens they cover -> the positive map."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

Span = Sequence[int]
"""``(begin, end)`` in characters of the caption; ``end`` is not part of the span."""

# How far a border may be moved inwards where the character on it belongs to no token (a space).
_BORDER_SLACK = 3


def character_tokens(offsets: Sequence[Sequence[int]] | np.ndarray, length: int) -> np.ndarray:
    """The first token that covers each character.

    Args:
        offsets: ``(T, 2)``, begin and end character of each token. Special tokens and those that
            stand for a space alone have begin == end.
        length: number of characters of the caption.

    Returns:
        int64 ``(length,)``, -1 where no token covers the character.
    """
    offsets = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    begin = offsets[:, 0].clip(0, length)
    count = (offsets[:, 1].clip(0, length) - begin).clip(0)
    token = np.repeat(np.arange(len(offsets)), count)
    # Position of every covered character: the token's begin plus 0, 1, ... count - 1.
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    first = np.full(length, len(offsets), dtype=np.int64)
    np.minimum.at(first, np.repeat(begin, count) + within, token)
    first[first == len(offsets)] = -1
    return first


def _first_found(tokens: np.ndarray, positions: np.ndarray, step: int) -> np.ndarray:
    """``tokens`` at each position, or up to two characters further where there is none."""
    found = np.full(len(positions), -1, dtype=np.int64)
    for move in range(_BORDER_SLACK):
        at = positions + move * step
        inside = (at >= 0) & (at < len(tokens))
        here = np.full(len(positions), -1, dtype=np.int64)
        here[inside] = tokens[at[inside]]
        found = np.where(found >= 0, found, here)
    return found


def spans_to_positive_map(
    offsets: Sequence[Sequence[int]] | np.ndarray,
    spans: Iterable[Iterable[Span]],
    num_tokens: int | None = None,
) -> torch.Tensor:
    """Mark the tokens of each target, each row summing to one.

    A span covers all tokens from the one its first character is in to the one its last character
    is in. A border on a character without a token (RoBERTa's tokens leave spaces out) moves up to
    two characters: the begin to the right, the end to the left. Where it still meets none, the
    whole span is left out, so one that is cut by truncation marks nothing.

    Args:
        offsets: ``(T, 2)``, begin and end character of each token.
        spans: for each of ``K`` targets, its ``(begin, end)`` character spans.
        num_tokens: width of the map, ``T`` by default. Tokens beyond it are cut off.

    Returns:
        float32 ``(K, num_tokens)``: equal weights on the tokens of a target, which sum to one, or
        zeros where a target has none.
    """
    offsets = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    width = len(offsets) if num_tokens is None else num_tokens
    per_target = [list(target) for target in spans]
    rows = np.repeat(np.arange(len(per_target)), [len(target) for target in per_target])
    flat = np.asarray([span for target in per_target for span in target], dtype=np.int64)
    flat = flat.reshape(-1, 2)

    tokens = character_tokens(offsets, int(offsets[:, 1].max(initial=0)))
    first = _first_found(tokens, flat[:, 0], 1)
    last = _first_found(tokens, flat[:, 1] - 1, -1)
    good = (first >= 0) & (last >= first)

    # +1 where a run of tokens begins, -1 behind its end: the running sum counts covering spans.
    edges = np.zeros((len(per_target), max(width, len(offsets)) + 1), dtype=np.int64)
    np.add.at(edges, (rows[good], first[good]), 1)
    np.add.at(edges, (rows[good], last[good] + 1), -1)
    marked = torch.from_numpy(edges.cumsum(axis=1)[:, :width] > 0)
    return marked.float() / marked.sum(dim=1, keepdim=True).clamp(min=1)
