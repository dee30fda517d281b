"""Training data before training: some images are read, and words are followed to tokens and back.

A positive map says which tokens stand for a class or a phrase. It is right where it can be
inverted: the tokens of a target, decoded, read as the target, and no other target has the same.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.utils import comm
from transformers import PreTrainedTokenizerFast

from fiber_d2.data.captions import DetectionPrompter
from fiber_d2.data.images import IMAGE_ERRORS
from fiber_d2.data.mapper import GroundingPrompter
from fiber_d2.data.training_set import TrainingPart, seeded
from fiber_d2.evaluation.saved import some_of
from fiber_d2.structures import Prompt

# Images of a data set that each process reads; records whose captions are followed.
MAX_READ = 4
MAX_FOLLOWED = 64


@dataclass
class DataReport:
    """What was found in a data set.

    Attributes:
        name: in the catalogue.
        summary: its size and what was looked at, in words.
        warnings: what is odd but can be trained with.
    """

    name: str
    summary: str = ""
    warnings: list[str] = field(default_factory=list)


def check_part(part: TrainingPart, *, seed: int = 0) -> DataReport:
    """Check a data set; every process looks at other images of it.

    Args:
        seed: of the augmentations. The random numbers of the process stay as they are.

    Raises:
        ValueError: a caption whose targets cannot be told from its tokens, no image that can be
            read, or a box that is not finite; names data set, image and words.
    """
    report = DataReport(part.name)
    try:
        with seeded(seed):
            classes = _check_classes(part, report)
            _check_captions(part, classes, report)
            num_read = _check_images(part, report)
    except ValueError as error:
        raise ValueError(f"Data set {part.name!r}: {error}") from error
    words = f"{len(classes)} classes" if classes else "phrases"
    report.summary = f"{len(part.records)} images, {words} to tokens and back, {num_read} read"
    return report


def check_targets(
    prompt: Prompt, texts: Sequence[str], tokenizer: PreTrainedTokenizerFast
) -> list[str]:
    """Follow the targets of a prompt to their tokens and back to words.

    Args:
        prompt: with K targets.
        texts: what the K targets are called in the caption. A target without text is not looked
            at, nor is one without token.
        tokenizer: the one the prompt was made with.

    Returns:
        Remarks on targets that share a token with their neighbours: "dog" of "dog.." has "dog..".

    Raises:
        ValueError: tokens that do not read as their target, that the tokenizer does not know, or
            that two targets have in common without a token that tells them apart.
    """
    remarks = []
    owner: dict[tuple[int, ...], str] = {}
    ids = prompt.input_ids.tolist()
    encoding = tokenizer(
        prompt.text, return_offsets_mapping=True, truncation=True, max_length=len(ids)
    )
    if encoding["input_ids"] != ids:
        raise ValueError(
            f"the tokens of the caption {prompt.text[:80]!r} are not this tokenizer's: use the one "
            "that the prompt was made with."
        )
    for text, row in zip(texts, (prompt.positive_map > 0).tolist()):
        tokens = tuple(place for place, marked in enumerate(row) if marked)
        if not tokens or not text.strip():
            continue
        own = [ids[place] for place in _whole_characters(tokens, encoding["offset_mapping"])]
        read = tokenizer.decode(own, clean_up_tokenization_spaces=False)
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in own:
            raise ValueError(
                f"{text!r} has characters that the tokenizer does not know, it reads {read!r} in "
                f"the caption {prompt.text[:80]!r}: write it differently, or use another tokenizer."
            )
        wanted, found = _letters(text), _letters(read)
        if wanted not in found:
            raise ValueError(
                f"the tokens of {text!r} read {read!r} in the caption {prompt.text[:80]!r}: its "
                "positive map is wrong."
            )
        if wanted != found:
            remarks.append(f"{text.strip()!r} shares tokens with its neighbours: {read.strip()!r}")
        other = owner.setdefault(tokens, text)
        if _letters(other) != wanted:
            raise ValueError(
                f"{other!r} and {text!r} have the same tokens in the caption "
                f"{prompt.text[:80]!r}: nothing could tell them apart. Put a space between them."
            )
    return remarks


def _whole_characters(tokens: Sequence[int], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """These tokens, and the further ones that their last characters take.

    A byte-level tokenizer may need several tokens for a character, of which a span has the first.
    """
    found = []
    for place in tokens:
        found.append(place)
        end = offsets[place][1]
        while place + 1 < len(offsets) and offsets[place + 1][0] < end <= offsets[place + 1][1]:
            place += 1
            if place not in tokens:
                found.append(place)
    return found


def _letters(text: str) -> str:
    """What tokenizers keep of a text: no spaces, no case, no accents."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return "".join(c for c in plain if not c.isspace() and not unicodedata.combining(c))


def _check_classes(part: TrainingPart, report: DataReport) -> dict[int, str]:
    """What each class of a detection data set is called, by its id; all are followed."""
    prompter = part.mapper.prompter
    if not isinstance(prompter, DetectionPrompter):
        return {}
    called: dict[int, str] = {}
    remarks: list[str] = []
    for prompt, texts in prompter.spelled_out():
        # A prompter may have been told to keep classes without tokens.
        mute = prompt.target_ids[prompt.positive_map.sum(dim=1) <= 0].tolist()
        if mute:
            raise ValueError(
                f"no token stands for {some_of([prompter.class_names[i] for i in mute])}: rename "
                "or remove them."
            )
        remarks += check_targets(prompt, texts, prompter.tokenizer)
        called.update(zip(prompt.target_ids.tolist(), texts))
    if remarks:
        report.warnings.append(f"classes: {some_of(remarks)}")
    alike: dict[str, list[str]] = defaultdict(list)
    for label, text in called.items():
        alike[_letters(text)].append(prompter.class_names[label])
    same = [" = ".join(map(repr, names)) for names in alike.values() if len(names) > 1]
    if same:
        report.warnings.append(f"classes that no caption can tell apart: {some_of(same)}")
    return called


def _check_captions(part: TrainingPart, classes: Mapping[int, str], report: DataReport) -> None:
    prompter = part.mapper.prompter
    if not isinstance(prompter, (DetectionPrompter, GroundingPrompter)):
        report.warnings.append(f"the captions of {type(prompter).__name__} are not followed")
        return
    remarks: list[str] = []
    mute: list[str] = []
    for record in _spread(part.records, MAX_FOLLOWED):
        boxes = [a for a in record.get("annotations", ()) if not a.get("iscrowd", 0)]
        try:
            prompt, rows = prompter.for_training({**record, "annotations": boxes})
            if isinstance(prompter, DetectionPrompter):
                texts = [classes[label] for label in prompt.target_ids.tolist()]
            else:
                texts = [""] * prompt.num_targets
                for row, annotation in zip(rows, boxes):
                    texts[row] = _phrase(record["caption"], annotation, prompter.whole_caption)
            remarks += check_targets(prompt, texts, prompter.tokenizer)
        except ValueError as error:
            raise ValueError(f"image {record.get('image_id')!r}: {error}") from error
        reached = (prompt.positive_map.sum(dim=1) > 0).tolist()
        mute += [repr(text) for text, found in zip(texts, reached) if text.strip() and not found]
    if mute:
        report.warnings.append(
            f"phrases without a token, whose boxes are tied to no word: {some_of(mute)}"
        )
    if remarks and not isinstance(prompter, DetectionPrompter):
        report.warnings.append(f"phrases: {some_of(remarks)}")


def _phrase(caption: str, annotation: Mapping[str, Any], whole_caption: bool) -> str:
    """The characters that an annotation is tied to, in the order of the caption."""
    spans = list(annotation.get("tokens_positive", ()))
    if not spans:
        return caption if whole_caption else ""
    places = sorted({place for begin, end in spans for place in range(begin, end)})
    return "".join(caption[place] for place in places)


def _check_images(part: TrainingPart, report: DataReport) -> int:
    """How many images were read; they pass the mapper as in training."""
    failures, num_read = [], 0
    for record in _spread(part.records, MAX_READ):
        try:
            item = part.mapper(record)
        except IMAGE_ERRORS as error:
            failures.append(str(error))
            continue
        num_read += 1
        boxes = item["instances"].gt_boxes.tensor
        if not torch.isfinite(boxes).all():
            raise ValueError(
                f"image {record.get('image_id')!r} has a box that is not finite: correct its "
                "annotations."
            )
    if failures and not num_read:
        raise ValueError(f"none of {len(failures)} images can be read. {failures[0]}")
    report.warnings += failures
    return num_read


def _spread(records: Sequence[dict[str, Any]], limit: int) -> Iterator[dict[str, Any]]:
    """Evenly spread records, others in every process."""
    count = min(limit, len(records))
    shift = comm.get_rank() / comm.get_world_size()
    for i in range(count):
        yield records[int((i + shift) * len(records) / count)]
