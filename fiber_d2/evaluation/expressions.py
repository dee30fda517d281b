"""What the evaluators of referring expressions share: files, records, gathering, re-scoring."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode

from fiber_d2.evaluation.records import Record, gather_records, keep_first
from fiber_d2.evaluation.saved import foreign_error, read_records, some_of
from fiber_d2.files import save_json

logger = logging.getLogger(__name__)

T = TypeVar("T")


def read_ground_truth(json_file: str | os.PathLike[str], parse: Callable[[Any], T]) -> T:
    """``parse`` of a json file, with errors that name it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no json, or ``parse`` cannot use it.
    """
    path = Path(json_file)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: it should hold the referring expressions to evaluate."
        )
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except KeyError as error:
        raise ValueError(f"{path}: an entry lacks {error}.") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def xywh_corners(boxes: Sequence[Sequence[float]]) -> np.ndarray:
    """XYWH to continuous XYXY, float64 ``(n, 4)``."""
    array = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    return BoxMode.convert(array, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)


def match_records(
    ids: Sequence[Hashable], records: Sequence[Record], *, consequence: str
) -> list[Record | None]:
    """The record of each expression, None where there is none.

    Args:
        ids: of the expressions.
        records: with ``image_id``, in any order; of repeated ones the first counts, unknown ones
            do not. A warning tells of both.
        consequence: what becomes of expressions without a record, for the warning.
    """
    by_id, repeats = keep_first(records, lambda record: record["image_id"])
    if repeats:
        logger.info("%d repeated expressions: the first prediction of each counts.", repeats)
    unknown = len(set(by_id) - set(ids))
    if unknown:
        logger.warning("Ignored the predictions of %d unknown expressions.", unknown)
    missing = sum(image_id not in by_id for image_id in ids)
    if missing:
        logger.warning(
            "%d of %d expressions have no prediction; %s.", missing, len(ids), consequence
        )
    return [by_id.get(image_id) for image_id in ids]


def arrays_of(record: Record, score_dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Boxes float32 ``(n, 4)`` and scores ``(n,)`` of a record.

    Raises:
        ValueError: there are not as many of both.
    """
    boxes = np.asarray(record["boxes"], dtype=np.float32).reshape(-1, 4)
    scores = np.asarray(record["scores"], dtype=score_dtype)
    if len(boxes) != len(scores):
        raise ValueError(
            f"Expression {record['image_id']} has {len(boxes)} boxes but {len(scores)} scores."
        )
    return boxes, scores


class ExpressionEvaluator(DatasetEvaluator):
    """Collects, saves and re-reads the boxes of expressions; subclasses say how they are scored.

    A subclass sets ``file_name``, of its predictions, and ``empty_entry``, what the entry of an
    expression without a box means; it implements ``parse``, ``score`` and ``log``. Its ground
    truth has ``ids``, ``datasets`` and ``dataset_names``.
    """

    file_name: ClassVar[str]
    empty_entry: ClassVar[str]

    def __init__(
        self,
        dataset_name: str | None,
        json_file: str | os.PathLike[str] | None,
        output_dir: str | os.PathLike[str] | None,
        distributed: bool,
    ) -> None:
        if json_file is None and dataset_name is not None:
            json_file = MetadataCatalog.get(dataset_name).get("json_file")
        if json_file is None:
            raise ValueError(
                f"Evaluation of referring expressions of {dataset_name!r} needs json_file, as an "
                "argument or in the data set's metadata."
            )
        self.json_file = Path(json_file)
        self.expressions = read_ground_truth(json_file, self.parse)
        self._output_dir = output_dir
        self._distributed = distributed
        self._records: list[Record] = []

    @staticmethod
    def parse(content: Any) -> Any:
        """Ground truth of a parsed json file."""
        raise NotImplementedError

    def score(self, records: Sequence[Record]) -> dict[str, dict[str, float]]:
        """Results of records of ``image_id``, ``boxes`` (n, 4) XYXY and ``scores`` (n,)."""
        raise NotImplementedError

    def log(self, results: dict[str, dict[str, float]]) -> None:
        """A table of the results."""
        raise NotImplementedError

    def reset(self) -> None:
        self._records = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for item, output in zip(inputs, outputs):
            instances = output["instances"].to("cpu")
            self._records.append(
                {
                    "image_id": item["image_id"],
                    "boxes": instances.pred_boxes.tensor.detach().tolist(),
                    "scores": instances.scores.detach().tolist(),
                }
            )

    def evaluate(self) -> dict[str, dict[str, float]]:
        records = gather_records(self._records, distributed=self._distributed)
        if records is None:
            return {}
        if self._output_dir is not None:
            save_json(records, Path(self._output_dir) / self.file_name)
        results = self.score(records)
        self.log(results)
        return results

    def score_file(self, path: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
        """Results of saved predictions, a file as ``evaluate`` writes it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is of another form or data set, or lacks expressions.
        """
        records = read_records(path, ("image_id", "boxes", "scores"))
        predicted = dict.fromkeys(record["image_id"] for record in records)
        known = dict.fromkeys(self.expressions.ids)
        foreign = [image_id for image_id in predicted if image_id not in known]
        if foreign:
            raise foreign_error(path, foreign, self.json_file)
        missing = [image_id for image_id in known if image_id not in predicted]
        if missing:
            raise ValueError(
                f"{path} lacks {len(missing)} of {len(known)} expressions: {some_of(missing)}. "
                f"{self.empty_entry}"
            )
        return self.score(records)

    def groups(self) -> list[tuple[str, np.ndarray]]:
        """Prefix of the metrics and members, bool ``(N,)``: all, then each data set by its name."""
        datasets = self.expressions.datasets
        return [("", np.ones(len(datasets), dtype=bool))] + [
            (f"{name}/", datasets == name) for name in self.expressions.dataset_names
        ]
