"""Before hours of compute: does the question reach the model, and could a perfect answer win?

Three things are checked: prompts (every class or phrase has tokens, within the limit), ids (what
the model is asked for, what the evaluator counts, and what the files say are the same classes and
images), and scoring (ground truth, handed in as predictions, gets the maximum).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from fiber_d2.data.catalog import DETECTION
from fiber_d2.data.records import ground_truth_kind, load_records
from fiber_d2.evaluation.perfect import CHECKS, MAX_SCORED, spread
from fiber_d2.evaluation.records import Record
from fiber_d2.evaluation.saved import some_of
from fiber_d2.structures import Prompt

logger = logging.getLogger(__name__)

# Images whose prompts are made, spread over the data set: their pixels are read, too.
MAX_PROMPTED = 16


def self_check(
    dataset_name: str,
    evaluator: DatasetEvaluator,
    *,
    dataset: Any = None,
    max_tokens: int | None = None,
    max_images: int = MAX_SCORED,
) -> list[str]:
    """Check a test set; every process may do so by itself.

    Args:
        dataset_name: in the catalogue.
        evaluator: of the data set. It is not changed.
        dataset: what the loader reads, a map-style dataset of model inputs with ``prompt``.
            Without it prompts are not checked.
        max_tokens: limit of a prompt's tokens.
        max_images: of those whose ground truth is scored.

    Returns:
        What was checked, in words; logged as well.

    Raises:
        ValueError: names the data set and the offenders.
    """
    records = load_records(dataset_name)
    done = []
    try:
        if dataset is not None and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
            done += check_prompts(
                (dataset[i] for i in spread(len(dataset), MAX_PROMPTED)),
                max_tokens=max_tokens,
                class_names=_class_names(dataset_name, records),
            )
        check = next((c for kind, c in CHECKS.items() if isinstance(evaluator, kind)), None)
        if check is None:
            done.append(f"ground truth not scored: unknown to {type(evaluator).__name__}")
        else:
            done += check(evaluator, records, max_images)
    except ValueError as error:
        raise ValueError(
            f"The self-check of {dataset_name!r} failed: {error} (--skip-self-check evaluates all "
            "the same.)"
        ) from error
    logger.info("Self-check of %s passed: %s", dataset_name, "; ".join(done))
    return done


def check_prompts(
    inputs: Iterable[Mapping[str, Any]],
    *,
    max_tokens: int | None = None,
    class_names: Sequence[str] | None = None,
) -> list[str]:
    """Check the prompts of some model inputs.

    Args:
        max_tokens: limit of a prompt's tokens, if any.
        class_names: of a detection data set: all of them have to be asked for.

    Raises:
        ValueError: a target without token, a prompt that is too long, a class that is not asked
            for or asked for twice.
    """
    count, longest = 0, 0
    for item in inputs:
        count += 1
        prompts = item["prompt"]
        prompts = [prompts] if isinstance(prompts, Prompt) else list(prompts)
        where = f"the prompt of image {item.get('image_id')!r}"
        asked: Counter[int] = Counter()
        for prompt in prompts:
            longest = max(longest, prompt.num_tokens)
            if max_tokens is not None and prompt.num_tokens > max_tokens:
                raise ValueError(
                    f"{where} has {prompt.num_tokens} tokens, more than the limit of {max_tokens}: "
                    f"{prompt.text[:80]!r}."
                )
            asked.update(prompt.target_ids.tolist())
            weight = (prompt.positive_map * prompt.attention_mask).sum(dim=1)
            mute = prompt.target_ids[weight <= 0].tolist()
            if mute:
                names = [class_names[i] for i in mute] if class_names else mute
                raise ValueError(f"{where} has no token for {some_of(names)}.")
        if class_names is not None:
            absent = [name for i, name in enumerate(class_names) if asked[i] != 1]
            foreign = [i for i in asked if not 0 <= i < len(class_names)]
            if absent or foreign:
                raise ValueError(
                    f"{where} has to ask for each of {len(class_names)} classes once, but does not "
                    f"for {some_of(absent or foreign)}."
                )
    what = "all phrases" if class_names is None else f"all {len(class_names)} classes"
    limit = "" if max_tokens is None else f" of {max_tokens}"
    return [f"{what} reach tokens in {count} images, at most {longest}{limit} per caption"]


def _class_names(dataset_name: str, records: Sequence[Record]) -> Sequence[str] | None:
    if ground_truth_kind(dataset_name, records) != DETECTION:
        return None
    return MetadataCatalog.get(dataset_name).get("thing_classes")
