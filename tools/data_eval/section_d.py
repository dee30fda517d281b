"""Detection captions of evaluation and of training

SPEC_DATA_EVAL sections 4.2 to 4.5 and 5.3 to 5.5, ``d_prompts.json``. What the original draws at
random is compared by its rules and distributions, since our random numbers are others.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes
from transformers import PreTrainedTokenizerFast

from fiber_d2.data.captions import (
    DetectionPrompter,
    SampledDetectionPrompter,
    draw_num_negatives,
)
from fiber_d2.structures import Prompt
from fiber_d2.text import build_detection_prompts, clean_name, load_tokenizer
from fiber_d2.text.prompts import clean_templates, detection_caption
from fiber_d2.text.spans import spans_to_positive_map

from .common import Section, read_json

# Longer than any caption: what the original does beyond 256 tokens is compared as well.
LONG = 1_000_000
LEAD = "object detection : "
BACKGROUND = "__background__"
# Draws of each sampled caption.
DRAWS = 20


def check(directory: Path) -> Section:
    section = Section("d")
    content = read_json(directory, "d_prompts.json")
    tokenizer = load_tokenizer(Path(directory) / "tokenizer.json")
    for name, expected in content["clean_name"]:
        section.equal(f"clean_name({name!r})", clean_name(name), expected)
    for index, case in enumerate(content["eval_prompts"]):
        with section.case(f"eval_prompts[{index}]"):
            _check_evaluation(section, tokenizer, case)
    for index, case in enumerate(content["train_simple"]):
        with section.case(f"train_simple[{index}]"):
            _check_simple(section, tokenizer, case)
    for index, case in enumerate(content["train_simple_shuffled"]):
        with section.case(f"train_simple_shuffled[{index}]"):
            _check_shuffled(section, tokenizer, case)
    classes = content["train_od_classes"]
    for index, case in enumerate(content["train_od"]):
        with section.case(f"train_od[{index}]"):
            _check_sampled(section, tokenizer, classes, case)
    for index, case in enumerate(content["control_distribution"]):
        with section.case(f"control_distribution[{index}]"):
            _check_distribution(section, case, seed=index)
    if content["published_control_prob_raises_assertion"]:
        # The original refuses its own published values; ours takes them without the fourth.
        with section.case("published control probabilities"):
            _check_published(section, tokenizer, classes)
    return section


def _check_evaluation(
    section: Section, tokenizer: PreTrainedTokenizerFast, case: dict[str, Any]
) -> None:
    ids, names = case["category_ids"], case["category_names"]
    size = case["chunk_size"] if case["chunk_size"] > 0 else len(names)
    templates = case["caption_prompt"] if case["use_caption_prompt"] else None
    options = {
        "separator": case["separation_tokens"],
        "suppressed": case["suppress_query"] or (),
    }
    if templates is not None:
        # The original counts templates within each chunk, so that every chunk has the first ones;
        # ours counts them over all chunks. This is the list that makes ours do the same.
        templates = [templates[index % size] for index in range(len(names))]
    prompts = build_detection_prompts(
        tokenizer,
        names,
        max_tokens=LONG,
        max_classes=size,
        templates=templates,
        on_empty="keep",
        **options,
    )
    section.equal("number of captions", len(prompts), len(case["expected"]))
    for prompt, expected in zip(prompts, case["expected"]):
        targets = prompt.target_ids.tolist()
        caption, spans = detection_caption(
            [names[target] for target in targets],
            templates=templates and [templates[target] for target in targets],
            **options,
        )
        section.equal("caption", prompt.text, expected["caption"])
        section.equal("caption without tokens", caption, expected["caption"])
        section.equal("char_spans", [[list(span)] for span in spans], expected["char_spans"])
        section.equal("n_tokens", prompt.num_tokens, expected["n_tokens_untruncated"])
        section.equal("input_ids", prompt.input_ids, expected["input_ids"])
        section.true("attention_mask", prompt.attention_mask.all())
        found = [
            [ids[target], torch.nonzero(row).flatten().tolist()]
            for target, row in zip(targets, prompt.positive_map)
            if row.any()
        ]
        section.equal("label_to_tokens", found, expected["label_to_tokens"])
    # Beyond 256 tokens the original fails; ours starts another caption.
    limited = build_detection_prompts(
        tokenizer, names, templates=templates, on_empty="keep", **options
    )
    section.true("captions of at most 256 tokens", all(p.num_tokens <= 256 for p in limited))
    targets = torch.cat([prompt.target_ids for prompt in limited])
    section.equal("classes of all captions", targets, list(range(len(names))))


def _check_simple(
    section: Section, tokenizer: PreTrainedTokenizerFast, case: dict[str, Any]
) -> None:
    names, place = _classes(case["ind_to_class"])
    options = {
        "separator": case["separation_tokens"],
        "lead": LEAD if case["add_detection_prompt"] else "",
    }
    prompter = DetectionPrompter(
        tokenizer,
        names,
        templates=case["caption_prompt"],
        max_tokens=LONG,
        on_empty="keep",
        **options,
    )
    labels = [place[label] for label in case["labels"]]
    prompt, rows = prompter.for_training(_record(labels))
    expected = case["expected"]
    section.equal("caption", prompt.text, expected["caption"])
    section.equal("classes of the boxes", prompt.target_ids[rows], labels)
    templates = clean_templates(case["caption_prompt"])
    _, spans = detection_caption(names, templates=templates, **options)
    found = [[list(spans[label])] for label in labels]
    section.equal("box_spans", found, expected["box_spans"])
    _check_tokens(section, tokenizer, prompt, rows, expected["box_spans"])
    # The original counts the corners of a box as part of it; ours ends a box behind its last pixel.
    boxes = torch.tensor(case["boxes_xyxy"], dtype=torch.float64).reshape(-1, 4)
    areas = Boxes(boxes + torch.tensor([0.0, 0.0, 1.0, 1.0])).area()
    section.close("areas", areas, expected["areas"], 0.05)


def _check_shuffled(
    section: Section, tokenizer: PreTrainedTokenizerFast, case: dict[str, Any]
) -> None:
    names, place = _classes(case["ind_to_class"])
    separator = case["separation_tokens"]
    labels = [place[label] for label in case["labels"]]
    # The original's order, made by its rule; our caption of that order.
    order = list(range(len(names)))
    random.Random(case["seed"]).shuffle(order)
    caption, spans = detection_caption([names[i] for i in order], separator=separator)
    section.equal("caption in the order of the original", caption, case["expected"]["caption"])
    found = [[list(spans[order.index(label)])] for label in labels]
    section.equal("box_spans", found, case["expected"]["box_spans"])
    # Our own order: all classes, each once, boxes tied to their names.
    prompter = DetectionPrompter(
        tokenizer, names, separator=separator, max_tokens=LONG, shuffle=True, on_empty="keep"
    )
    with _seeded(case["seed"]):
        draws = [prompter.for_training(_record(labels)) for _ in range(DRAWS)]
    for prompt, rows in draws:
        targets = prompt.target_ids.tolist()
        section.equal("shuffled classes", sorted(targets), list(range(len(names))))
        _check_drawn(section, tokenizer, prompt, rows, names, labels, separator)
    if len(names) > 3:
        section.true("orders differ", len({prompt.text for prompt, _ in draws}) > 1)


def _check_sampled(
    section: Section,
    tokenizer: PreTrainedTokenizerFast,
    classes: Sequence[Sequence[Any]],
    case: dict[str, Any],
) -> None:
    names, place = _classes(classes)
    expected = case["expected"]
    budget = case["max_seq_length"]
    prompter = SampledDetectionPrompter(
        tokenizer,
        names,
        num_negatives=case["random_sample_negative"],
        control_probabilities=case["control_probabilities"],
        token_budget=budget,
        max_tokens=budget + tokenizer.num_special_tokens_to_add(),
        on_empty="keep",
    )
    labels = [place[label] for label in case["labels"]]
    in_image = sorted(set(labels))
    kept = sorted(place[label] for label in expected["kept_labels"])
    counts = prompter.token_counts
    _check_overflow(section, counts, in_image, kept, case)
    _check_original_caption(section, tokenizer, names, place, expected)

    with _seeded(case["seed"]):
        draws = [prompter.for_training(_record(labels)) for _ in range(DRAWS)]
    seen: set[int] = set()
    numbers = set()
    for prompt, rows in draws:
        targets = prompt.target_ids.tolist()
        positives = set(targets) & set(in_image)
        seen |= positives
        numbers.add(len(targets) - len(positives))
        section.equal("classes named once", len(set(targets)), len(targets))
        section.true("no background", BACKGROUND not in [names[target] for target in targets])
        text_tokens = prompt.num_tokens - tokenizer.num_special_tokens_to_add()
        section.true(f"at most {budget} tokens", text_tokens <= budget)
        if len(kept) == len(in_image):
            section.equal("classes of the image", sorted(positives), in_image)
        else:
            section.true("some classes of the image", 0 < len(positives) < len(in_image))
        _check_drawn(section, tokenizer, prompt, rows, names, labels, ". ")
    if len(kept) < len(in_image):
        section.true("classes that overflow rotate", len(seen) > len(kept))
    one, none, all_of_them = case["control_probabilities"][:3]
    # An image without any class still asks for one that is absent.
    at_least = int(not in_image)
    if none == 1:
        section.equal("numbers of absent classes", numbers, {at_least})
    elif one == 1:
        section.true("at most one absent class", numbers <= {0, 1})
    elif all_of_them == 1 and len(kept) == len(in_image):
        # Background, and what reads like a class of the image, is never asked for as absent.
        present = {clean_name(names[label]) for label in in_image}
        absent = [n for n in names if n != BACKGROUND and clean_name(n) not in present]
        most = min(case["random_sample_negative"], len(absent))
        left = budget - int(counts[in_image].sum())
        section.true("no more absent classes than asked for", max(numbers) <= max(most, at_least))
        # As many as fit even if all of them were as long as the longest.
        fitting = min(most, (left - 1) // int(counts.max()))
        section.true("absent classes fill the caption", min(numbers) >= fitting)


def _check_overflow(
    section: Section,
    token_counts: np.ndarray,
    in_image: list[int],
    kept: list[int],
    case: dict[str, Any],
) -> None:
    """What the original kept of the image's classes, by our counts of their tokens."""
    expected, budget = case["expected"], case["max_seq_length"]
    total = int(token_counts[kept].sum())
    section.true("kept classes within the budget", total <= budget)
    if token_counts[in_image].sum() <= budget:
        section.equal("kept_labels", kept, in_image)
        section.equal("positive_length", total, expected["positive_length"])
    else:
        # The length that the original returns includes the class that overflowed.
        dropped = token_counts[np.setdiff1d(in_image, kept)].tolist()
        section.true("positive_length", expected["positive_length"] - total in dropped)
        section.true("overflow", expected["positive_length"] > budget)
    kept_ids = set(expected["kept_labels"])
    boxes = [label for label in case["labels"] if label in kept_ids]
    section.equal("box_labels", expected["box_labels"], boxes)
    section.equal("n_boxes_kept", expected["n_boxes_kept"], len(boxes))


def _check_original_caption(
    section: Section,
    tokenizer: PreTrainedTokenizerFast,
    names: list[str],
    place: dict[int, int],
    expected: dict[str, Any],
) -> None:
    """Our caption of the classes and the order that the original drew."""
    spans_of = sorted(expected["label_to_span"], key=lambda entry: entry[1])
    order = [place[label] for label, _ in spans_of]
    caption, spans = detection_caption([names[label] for label in order])
    section.equal("caption of the original's classes", caption, expected["caption"])
    section.equal("label_to_span", [list(s) for s in spans], [s for _, s in spans_of])
    (prompt,) = build_detection_prompts(
        tokenizer, [names[label] for label in order], max_tokens=LONG, on_empty="keep"
    )
    special = tokenizer.num_special_tokens_to_add()
    section.equal("caption_tokens", prompt.num_tokens - special, expected["caption_tokens"])
    rows = [order.index(place[label]) for label in expected["box_labels"]]
    section.equal("box_spans", [[list(spans[row])] for row in rows], expected["box_spans"])
    _check_tokens(section, tokenizer, prompt, rows, expected["box_spans"])


def _check_distribution(section: Section, case: dict[str, Any], *, seed: int) -> None:
    """Two-sample chi-square test of the numbers of negatives that ours and the original draw."""
    expected = Counter({number: count for number, count in case["histogram"]})
    section.equal("draws", sum(expected.values()), case["draws"])
    with _seeded(seed):
        found = Counter(
            draw_num_negatives(case["control_probabilities"], case["full_negative"])
            for _ in range(case["draws"])
        )
    bins = sorted(expected.keys() | found.keys())
    ours = np.array([found[number] for number in bins], dtype=np.float64)
    theirs = np.array([expected[number] for number in bins], dtype=np.float64)
    statistic = float(((ours - theirs) ** 2 / (ours + theirs)).sum())
    freedom = len(bins) - 1
    # Six standard deviations of the statistic, and more where its few bins give it a long tail.
    bound = freedom + 6 * np.sqrt(2 * freedom) + 20
    section.true(
        f"numbers of negatives (chi-square {statistic:.0f}, at most {bound:.0f})",
        statistic <= bound,
    )


def _check_published(
    section: Section, tokenizer: PreTrainedTokenizerFast, classes: Sequence[Sequence[Any]]
) -> None:
    names, _ = _classes(classes)
    texts = []
    for probabilities in ((0.05, 0.05, 0.5, 0.2), (0.05, 0.05, 0.5)):
        prompter = SampledDetectionPrompter(
            tokenizer, names, control_probabilities=probabilities, on_empty="keep"
        )
        with _seeded(0):
            texts.append([prompter.for_training(_record([1]))[0].text for _ in range(DRAWS)])
    section.equal("a fourth value has no effect", texts[0], texts[1])


def _check_drawn(
    section: Section,
    tokenizer: PreTrainedTokenizerFast,
    prompt: Prompt,
    rows: Sequence[int],
    names: Sequence[str],
    labels: Sequence[int],
    separator: str,
) -> None:
    """A drawn caption: it spells its classes, and every box is tied to its own or left out."""
    targets = prompt.target_ids.tolist()
    caption, spans = detection_caption([names[t] for t in targets], separator=separator)
    section.equal("drawn caption", prompt.text, caption)
    section.equal(
        "spans spell the names",
        [prompt.text[begin:end] for begin, end in spans],
        [clean_name(names[target]) for target in targets],
    )
    row_of = {target: row for row, target in enumerate(targets)}
    section.equal("rows of the boxes", rows, [row_of.get(label, -1) for label in labels])
    _check_tokens(
        section, tokenizer, prompt, list(range(len(targets))), [[list(span)] for span in spans]
    )


def _check_tokens(
    section: Section,
    tokenizer: PreTrainedTokenizerFast,
    prompt: Prompt,
    rows: Sequence[int],
    spans: Sequence[Sequence[Sequence[int]]],
) -> None:
    """The rows of a prompt mark the tokens of the given characters of its caption."""
    offsets = tokenizer(prompt.text, return_offsets_mapping=True)["offset_mapping"]
    marked = spans_to_positive_map(offsets, spans) > 0
    section.equal("tokens of the boxes", prompt.positive_map[list(rows)] > 0, marked)


def _classes(pairs: Sequence[Sequence[Any]]) -> tuple[list[str], dict[int, int]]:
    """Names in ascending order of their ids, and the place of each id among them."""
    ordered = sorted((int(index), name) for index, name in pairs)
    return [name for _, name in ordered], {index: i for i, (index, _) in enumerate(ordered)}


def _record(labels: Sequence[int]) -> dict[str, Any]:
    return {"image_id": 0, "annotations": [{"category_id": label} for label in labels]}


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
