"""Could a perfect answer win? Ground truth, handed in as predictions, for each evaluator.

Every check also compares ids: the images that the model is shown, the classes it is asked for, and
those that the evaluator counts have to be the same.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, Instances

from fiber_d2.evaluation.coco import GroundedCOCOEvaluator
from fiber_d2.evaluation.description import DescriptionEvaluator
from fiber_d2.evaluation.entities import EntityImage, image_key
from fiber_d2.evaluation.expressions import xywh_corners
from fiber_d2.evaluation.flickr import FlickrRecallEvaluator
from fiber_d2.evaluation.generalized_refexp import GeneralizedRefExpEvaluator
from fiber_d2.evaluation.lvis_data import LVISDetections
from fiber_d2.evaluation.lvis_fixed_ap import FIXED, LVISFixedAPEvaluator
from fiber_d2.evaluation.records import Record
from fiber_d2.evaluation.refexp import RefExpEvaluator
from fiber_d2.evaluation.saved import some_of

logger = logging.getLogger(__name__)

# Images whose ground truth is scored, spread over the data set; fewer where there are many classes.
MAX_SCORED = 500
# Images times classes.
_MAX_WORK = 100_000
# Percent. Perfect answers lose that much to rounding, and no more.
_TOLERANCE = 0.01
# Boxes that are smaller, in pixels, are not found again after a change of coordinates.
_MIN_SIDE = 0.1


def spread(count: int, limit: int) -> range | list[int]:
    """At most ``limit`` of the indices below ``count``, evenly spread."""
    if count <= limit:
        return range(count)
    return [i * count // limit for i in range(limit)]


def check_coco(
    evaluator: GroundedCOCOEvaluator, records: Sequence[Record], max_images: int
) -> list[str]:
    """COCO: categories are mapped completely, and ground truth has AP 100."""
    contiguous = {json_id: index for index, json_id in evaluator._json_ids.items()}
    _check_images(records, set(evaluator._coco_api.getImgIds()))
    annotations = evaluator.ground_truth
    if isinstance(evaluator, DescriptionEvaluator):
        # An image that is not asked about a sentence gets no box of it, however good the answer.
        annotations = evaluator.asked_about(annotations)
    _check_categories(
        {c["id"]: c["name"] for c in evaluator._coco_api.dataset["categories"]},
        Counter(a["category_id"] for a in annotations),
        contiguous,
    )
    _check_mapping(evaluator._metadata, contiguous)
    done = [f"{len(records)} images and {len(contiguous)} categories known to the evaluator"]
    if not annotations:
        return [*done, "no annotations to score"]
    images = sorted(evaluator._coco_api.getImgIds())
    limit = _bounded(max_images, len(contiguous))
    chosen = {images[i] for i in spread(len(images), limit)}
    countable, notes = _countable(
        [a for a in annotations if a["image_id"] in chosen], evaluator._max_dets
    )
    if not any(not a.get("iscrowd", 0) for a in countable):
        return [*done, "no annotations among the chosen images"]
    quiet = _quiet_copy(evaluator)
    quiet._legacy_boxes = False
    quiet._coco_api = _subset(evaluator._coco_api, chosen, countable)
    detections: dict[Any, list[Record]] = {image_id: [] for image_id in chosen}
    for annotation in countable:
        if not annotation.get("iscrowd", 0):
            detections[annotation["image_id"]].append(annotation)
    for image_id, of_image in detections.items():
        boxes = xywh_corners([a["bbox"] for a in of_image])
        classes = [contiguous[a["category_id"]] for a in of_image]
        quiet.process([{"image_id": image_id}], [_perfect(boxes, classes)])
    flat = [d for prediction in quiet._predictions for d in prediction["instances"]]
    results = quiet.score(flat)["bbox"]
    per_class = {name[3:]: value for name, value in results.items() if name.startswith("AP-")} or {
        "all": results["AP"]
    }
    _check_maximum(per_class, "AP")
    return [*done, f"ground truth of {len(chosen)} images scores AP {results['AP']:.1f}", *notes]


def check_lvis(
    evaluator: LVISFixedAPEvaluator, records: Sequence[Record], max_images: int
) -> list[str]:
    """LVIS: categories are mapped completely, and ground truth has FixedAP 100."""
    truth = evaluator.ground_truth
    _check_images(records, set(truth.image_ids))
    used = np.unique(truth.category)
    unmapped = np.setdiff1d(used, evaluator._categories)
    if len(unmapped):
        names = [truth.category_ids[i] for i in unmapped]
        raise ValueError(f"no class of the data set stands for the category ids {some_of(names)}.")
    done = [f"{len(records)} images and {len(truth.category_ids)} categories known"]
    if not truth.annotated or not len(truth.image):
        return [*done, "no annotations to score"]
    limit = _bounded(max_images, len(truth.category_ids))
    chosen = np.asarray(spread(len(truth.image_ids), limit))
    kept = np.isin(truth.image, chosen) & ~truth.ignore
    kept &= truth.boxes[:, 2:].min(axis=1) > _MIN_SIDE
    per_object = ("image", "category", "boxes", "area", "ignore")
    part = replace(truth, **{name: getattr(truth, name)[kept] for name in per_object})
    if not kept.any():
        return [*done, "no annotations among the chosen images"]
    quiet = copy.copy(evaluator)
    quiet.ground_truth = part
    detections = LVISDetections(
        part.image.astype(np.int32),
        part.category.astype(np.int32),
        part.boxes,
        np.ones(len(part.image)),
    )
    results = quiet.score(detections)[FIXED]
    _check_maximum({"all classes": results["AP"]}, "FixedAP")
    return [*done, f"ground truth of {len(chosen)} images scores FixedAP {results['AP']:.1f}"]


def check_flickr(
    evaluator: FlickrRecallEvaluator, records: Sequence[Record], max_images: int
) -> list[str]:
    """Flickr30k: every sentence is there with its phrases, and ground truth has recall 100."""
    images = evaluator.images
    asked = {}
    for record in records:
        missing = [k for k in ("original_img_id", "sentence_id") if k not in record]
        if missing:
            raise ValueError(f"the image {record['image_id']!r} lacks {' and '.join(missing)}.")
        key = (image_key(record["original_img_id"]), int(record["sentence_id"]))
        asked[key] = record
    absent, uneven = [], []
    for key, image in images.items():
        for sentence in range(len(image.sentences)):
            phrases = image.evaluable(sentence)
            record = asked.get((key, sentence))
            if phrases and record is None:
                absent.append(f"{key}_{sentence}")
            elif phrases and len(record.get("tokens_positive_eval", ())) != len(phrases):
                uneven.append(f"{key}_{sentence}")
    if absent:
        raise ValueError(f"the json lacks the sentences {some_of(absent)} of the Entities files.")
    if uneven:
        raise ValueError(
            f"tokens_positive_eval of the sentences {some_of(uneven)} has another number of "
            "phrases than the Entities files have with boxes."
        )
    flat = sum(
        _areas(image.boxes[phrase.entity]).max() <= _MIN_SIDE**2
        for image in images.values()
        for sentence in range(len(image.sentences))
        for phrase in image.evaluable(sentence)
    )
    total = sum(
        len(image.evaluable(sentence))
        for image in images.values()
        for sentence in range(len(image.sentences))
    )
    for protocol in evaluator._protocols:
        quiet = _quiet_copy(evaluator)
        quiet._protocols = (protocol,)
        results = quiet.score(_perfect_phrases(images, merged=protocol == "merged"))["grounding"]
        # The first is that of all kinds of phrases.
        name, value = next(iter(results.items()))
        _check_maximum({name: value}, f"recall ({protocol})", 100 * (1 - flat / total))
    return [f"{len(asked)} sentences have their phrases; ground truth scores {value:.1f}"]


def check_refexp(
    evaluator: RefExpEvaluator, records: Sequence[Record], max_images: int
) -> list[str]:
    """Referring expressions: all are asked for, and ground truth has P@1 100."""
    expressions = evaluator.expressions
    _check_images(records, set(expressions.ids))
    absent = sorted(set(expressions.ids) - {record["image_id"] for record in records}, key=str)
    if absent:
        raise ValueError(f"the expressions {some_of(absent)} have ground truth, but are not asked.")
    quiet = _quiet_copy(evaluator)
    for image_id, box in zip(expressions.ids, expressions.boxes):
        quiet.process([{"image_id": image_id}], [_perfect(box[None], [0])])
    results = quiet.score(quiet._records)["refexp"]
    # Boxes without area cannot be met.
    maximum = 100 * float((_areas(expressions.boxes) > _MIN_SIDE**2).mean())
    name, value = next(iter(results.items()))
    _check_maximum({name: value}, "precision", maximum)
    return [f"{len(expressions.ids)} expressions are asked; ground truth scores {value:.1f}"]


def check_generalized(
    evaluator: GeneralizedRefExpEvaluator, records: Sequence[Record], max_images: int
) -> list[str]:
    """Expressions with any number of targets: ground truth is right about all of them."""
    expressions = evaluator.expressions
    _check_images(records, set(expressions.ids))
    answers = [
        {"image_id": image_id, "boxes": boxes, "scores": np.ones(len(boxes))}
        for image_id, boxes in zip(expressions.ids, expressions.targets)
    ]
    results = evaluator.score(answers)["grefexp"]
    limit = evaluator._topk or np.inf
    findable = [
        len(b) <= limit and bool((_areas(b) > _MIN_SIDE**2).all()) for b in expressions.targets
    ]
    name, value = next(iter(results.items()))
    _check_maximum({name: value}, "precision", 100 * float(np.mean(findable)))
    return [f"{len(expressions.ids)} expressions; ground truth scores {value:.1f}"]


CHECKS: dict[type[DatasetEvaluator], Callable[..., list[str]]] = {
    GroundedCOCOEvaluator: check_coco,
    LVISFixedAPEvaluator: check_lvis,
    FlickrRecallEvaluator: check_flickr,
    RefExpEvaluator: check_refexp,
    GeneralizedRefExpEvaluator: check_generalized,
}


def _check_images(records: Sequence[Record], known: set[Any]) -> None:
    # Of records that are read when asked for, some will do.
    indices = range(len(records)) if isinstance(records, list) else spread(len(records), 1000)
    shown = [records[i]["image_id"] for i in indices]
    foreign = [image_id for image_id in shown if image_id not in known]
    if foreign:
        raise ValueError(
            f"the images {some_of(foreign)} are shown to the model, but the evaluator's file does "
            "not have them."
        )


def _check_categories(
    names: Mapping[int, str], used: Mapping[int, int], contiguous: Mapping[int, int]
) -> None:
    unknown = sorted(set(used) - set(names))
    if unknown:
        raise ValueError(
            f"annotations name the category ids {some_of(unknown)}, which do not exist."
        )
    unmapped = [names[category_id] for category_id in sorted(used) if category_id not in contiguous]
    if unmapped:
        raise ValueError(
            f"annotations are of {some_of(unmapped)}, for which the data set has no class: its AP "
            "would always be 0. Remove them from the json, or name the class."
        )


def _check_mapping(metadata: Any, contiguous: Mapping[int, int]) -> None:
    stated = metadata.get("thing_dataset_id_to_contiguous_id") or contiguous
    otherwise = [
        category_id for category_id in stated if contiguous.get(category_id) != stated[category_id]
    ]
    if otherwise:
        raise ValueError(
            f"the evaluator takes the category ids {some_of(otherwise)} for other classes than the "
            "data set: make it after the data set was read."
        )


def _check_maximum(values: Mapping[str, float], metric: str, maximum: float = 100) -> None:
    low = [
        f"{name} ({value:.2f})"
        for name, value in values.items()
        if np.isfinite(value) and value < maximum - _TOLERANCE
    ]
    if low:
        raise ValueError(
            f"ground truth handed in as predictions scores less {metric} than {maximum:.2f}: "
            f"{some_of(low)}. Files and evaluator do not fit together."
        )


def _countable(annotations: Sequence[Record], max_dets: int) -> tuple[list[Record], list[str]]:
    """The annotations that a perfect answer could find, and words on those left out."""
    with_area = [a for a in annotations if min(a["bbox"][2:]) > _MIN_SIDE]
    notes = []
    if len(with_area) < len(annotations):
        notes.append(f"{len(annotations) - len(with_area)} boxes without area cannot be found")
    groups = Counter(
        (a["image_id"], a["category_id"]) for a in with_area if not a.get("iscrowd", 0)
    )
    crowded = {group for group, count in groups.items() if count > max_dets}
    if crowded:
        logger.warning(
            "%d times an image has more boxes of a class than the %d that count: they cannot all "
            "be found.",
            len(crowded),
            max_dets,
        )
        notes.append(f"{len(crowded)} classes of images with more boxes than count left out")
    kept = [a for a in with_area if (a["image_id"], a["category_id"]) not in crowded]
    return kept, notes


def _subset(api: Any, images: set[Any], annotations: Sequence[Record]) -> Any:
    """A COCO index of these images and annotations."""
    part = type(api)()
    part.dataset = {
        **{key: value for key, value in api.dataset.items() if key != "annotations"},
        "images": [image for image in api.dataset["images"] if image["id"] in images],
        "annotations": list(annotations),
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it tells of every index
        part.createIndex()
    return part


def _quiet_copy(evaluator: DatasetEvaluator) -> Any:
    """An evaluator of the same settings and ground truth that writes and gathers nothing."""
    quiet = copy.copy(evaluator)
    quiet._output_dir, quiet._distributed = None, False
    quiet.reset()
    return quiet


def _perfect(boxes: np.ndarray, classes: Sequence[int]) -> dict[str, Instances]:
    instances = Instances((1, 1))
    tensor = torch.as_tensor(np.asarray(boxes, dtype=np.float32).reshape(-1, 4))
    instances.pred_boxes = Boxes(tensor)
    instances.scores = torch.ones(len(tensor))
    instances.pred_classes = torch.as_tensor(list(classes), dtype=torch.int64)
    return {"instances": instances}


def _perfect_phrases(images: Mapping[str, EntityImage], *, merged: bool) -> list[Record]:
    records = []
    for key, image in images.items():
        boxes = (image.merged() if merged else image).boxes
        for sentence in range(len(image.sentences)):
            phrases = image.evaluable(sentence)
            if phrases:
                found = [_largest_first(boxes[phrase.entity]) for phrase in phrases]
                records.append({"image_id": key, "sentence_id": sentence, "boxes": found})
    return records


def _largest_first(boxes: np.ndarray) -> np.ndarray:
    return boxes[np.argsort(-_areas(boxes), kind="stable")]


def _areas(boxes: np.ndarray) -> np.ndarray:
    return np.prod(np.clip(boxes[:, 2:] - boxes[:, :2], 0, None), axis=1)


def _bounded(max_images: int, num_classes: int) -> int:
    return max(1, min(max_images, _MAX_WORK // max(num_classes, 1)))
