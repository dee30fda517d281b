"""Characters to tokens: positive maps

SPEC_DATA_EVAL sections 0.4 and 5.7, ``e_positive_map.json``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from fiber_d2.text import build_grounding_prompt, load_tokenizer
from fiber_d2.text.spans import spans_to_positive_map

from .common import Section, read_json

# The original cuts captions here where it truncates.
MAX_TOKENS = 256
# Its rows are divided by (number of tokens + 1e-6), ours by the number.
TOLERANCE = 5e-6
# A list of greenlight spans with this entry says that nothing may be masked.
NOTHING_MASKABLE = [-1, -1, -1]


def check(directory: Path) -> Section:
    section = Section("e")
    content = read_json(directory, "e_positive_map.json")
    tokenizer = load_tokenizer(Path(directory) / "tokenizer.json")
    for index, case in enumerate(content["cases"]):
        with section.case(f"cases[{index}]"):
            _check_case(section, tokenizer, case, content["width"])
    return section


def _check_case(
    section: Section, tokenizer: PreTrainedTokenizerFast, case: dict[str, Any], width: int
) -> None:
    caption, spans = case["caption"], case["tokens_positive"]
    encoded = tokenizer(
        caption,
        return_offsets_mapping=True,
        truncation=case["truncated_to_256"],
        max_length=MAX_TOKENS if case["truncated_to_256"] else None,
    )
    offsets = encoded["offset_mapping"]
    section.equal("n_tokens", len(offsets), case["n_tokens"])

    expected = np.zeros(case["expected"]["shape"])
    for row, column, value in case["expected"]["nnz"]:
        expected[row, column] = value
    positive_map = spans_to_positive_map(offsets, spans, width)
    section.close("positive map", positive_map, expected, TOLERANCE)
    marked = positive_map > 0
    section.equal("row sums", marked.sum(dim=1), case["collated_binary_row_sums"])
    found = [[row + 1, _places(tokens)] for row, tokens in enumerate(marked)]
    section.equal("label_to_token_plus1", found, case["label_to_token_plus1"])

    if all(0 <= begin <= end <= len(caption) for target in spans for begin, end in target):
        prompt = build_grounding_prompt(
            tokenizer,
            caption,
            spans,
            max_tokens=MAX_TOKENS if case["truncated_to_256"] else max(len(offsets), 1),
            on_empty="keep",
            on_overflow="truncate",
        )
        section.equal("prompt's tokens", prompt.input_ids, encoded["input_ids"])
        whole = spans_to_positive_map(offsets, spans)
        section.equal("prompt's positive map", prompt.positive_map, whole)

    # Maps for masked language modelling and for detection labels of tokens: off, or read by
    # nothing, in the original, so that this project has neither. They follow from the same rule of
    # characters and tokens, which is checked once more by them.
    greenlight = case["greenlight_spans"]
    if NOTHING_MASKABLE in greenlight:
        values = np.full(width, -1.0)
    else:
        values = (spans_to_positive_map(offsets, [greenlight], width)[0] > 0).numpy()
    section.close("greenlight_nonzero", values, _dense(case["greenlight_nonzero"], width, 0.0), 0.0)
    labels = np.full(width, -1.0)
    rows = spans_to_positive_map(offsets, [[span] for _, span in case["od_label_spans"]], width)
    for (label, _), row in zip(case["od_label_spans"], rows.numpy()):
        labels[row > 0] = label  # of several labels of a token the last one counts
    section.close("od_label_map", labels, _dense(case["od_label_map_not_minus1"], width, -1.0), 0.0)


def _places(marked: torch.Tensor) -> list[int]:
    return torch.nonzero(marked).flatten().tolist()


def _dense(pairs: list[list[float]], width: int, default: float) -> np.ndarray:
    values = np.full(width, default)
    for token, value in pairs:
        values[int(token)] = value
    return values
