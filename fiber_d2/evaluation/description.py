"""Description detection: the classes are sentences, and an image is asked about some of them.

The measures of D3 (arXiv:2307.12813): COCO's AP, averaged over all descriptions (FULL), over those
of what is present (PRES), and over those of what is absent (ABS, "a person without a helmet").
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from fiber_d2.evaluation.coco import GroundedCOCOEvaluator, overall_ap
from fiber_d2.evaluation.records import Record

logger = logging.getLogger(__name__)

SCENARIOS = ("intra", "inter")


class DescriptionEvaluator(GroundedCOCOEvaluator):
    """COCO's AP with sentences for classes: all, those of presence, and those of absence.

    The categories of the json are sentences. Two fields beyond COCO's, both optional:

    - ``sentence_ids`` of an image: the ids of the categories it is evaluated on. Detections of
      other sentences on it are ignored. An image without the field is evaluated on all.
    - ``absence`` of a category: whether the sentence says that something is absent.

    Results, in percent: ``{"description": {"FULL", "PRES", "ABS", "FULL/AP50", "FULL/AP75",
    "PRES/AP50", ...}, "bbox": {"AP", ..., "AP-<sentence>"}}``. FULL and bbox/AP are the same; PRES
    and ABS are there if any category has ``absence``.

    Args:
        dataset_name: registered data set, as of ``GroundedCOCOEvaluator``.
        scenario: "intra" asks each image about its ``sentence_ids``, "inter" about all sentences.
        count_unasked_boxes: whether ground truth of sentences that its image is not asked about
            counts as missed. The published script has it so, if the file holds such boxes.
        output_dir, max_dets_per_image, use_faster, distributed: as of ``GroundedCOCOEvaluator``.

    Raises:
        ValueError: the file has other values in these fields.
        FileNotFoundError, ModuleNotFoundError: as of ``GroundedCOCOEvaluator``.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        scenario: str = "intra",
        count_unasked_boxes: bool = True,
        output_dir: str | os.PathLike[str] | None = None,
        max_dets_per_image: int = 100,
        use_faster: bool | None = None,
        distributed: bool = True,
    ) -> None:
        if scenario not in SCENARIOS:
            raise ValueError(f"scenario must be one of {', '.join(SCENARIOS)}, got {scenario!r}.")
        super().__init__(
            dataset_name,
            output_dir=output_dir,
            max_dets_per_image=max_dets_per_image,
            use_faster=use_faster,
            distributed=distributed,
        )
        self._scenario = scenario
        self._count_unasked_boxes = count_unasked_boxes
        self._groups = self._read_groups()
        self._asked = self._read_asked() if scenario == "intra" else {}
        self._warn_of_unasked_boxes()

    @property
    def ground_truth(self) -> list[Record]:
        """The annotations that count."""
        truth = super().ground_truth
        return truth if self._count_unasked_boxes else self.asked_about(truth)

    def score(
        self, detections: Sequence[Record], *, img_ids: Sequence[int] | None = None
    ) -> dict[str, dict[str, float]]:
        """Results of detections in COCO's result format; ``category_id`` is the sentence's id.

        Raises:
            ValueError: for a detection on an image that the json does not have.
        """
        evaluation = self._run_scorer(self.asked_about(detections), img_ids)
        bbox = {**overall_ap(evaluation), **self._class_ap(evaluation)}
        description: dict[str, float] = OrderedDict()
        for group, category_ids in self._groups.items():
            values = overall_ap(evaluation, category_ids)
            description[group] = values.pop("AP")
            description.update({f"{group}/{name}": value for name, value in values.items()})
        return OrderedDict(description=description, bbox=bbox)

    def asked_about(self, boxes: Sequence[Record]) -> list[Record]:
        """Those of the boxes whose sentence is evaluated on their image."""
        everything = frozenset(self.category_ids)
        return [
            box
            for box in boxes
            if box["category_id"] in self._asked.get(box["image_id"], everything)
        ]

    def _read_groups(self) -> dict[str, list[int]]:
        """The categories of FULL, PRES and ABS."""
        categories = self._coco_api.dataset["categories"]
        groups = {"FULL": [category["id"] for category in categories]}
        for category in categories:
            absence = category.get("absence", False)
            if not isinstance(absence, bool):
                raise ValueError(
                    f"{self._metadata.json_file}: the category {category['id']} has the absence "
                    f"{absence!r}; it must be true or false."
                )
        if any("absence" in category for category in categories):
            groups["PRES"] = [c["id"] for c in categories if not c.get("absence", False)]
            groups["ABS"] = [c["id"] for c in categories if c.get("absence", False)]
        return groups

    def _read_asked(self) -> dict[Any, frozenset[int]]:
        """The sentences of the images that name theirs."""
        known = frozenset(self.category_ids)
        asked = {}
        for image in self._coco_api.dataset["images"]:
            sentence_ids = image.get("sentence_ids")
            if sentence_ids is None:
                continue
            if not (isinstance(sentence_ids, list) and known.issuperset(sentence_ids)):
                raise ValueError(
                    f"{self._metadata.json_file}: the image {image['id']} has the sentence_ids "
                    f"{sentence_ids!r}, which is no list of ids of 'categories'."
                )
            asked[image["id"]] = frozenset(sentence_ids)
        if not asked:
            logger.info("No image names its sentence_ids: all are asked about all sentences.")
        return asked

    def _warn_of_unasked_boxes(self) -> None:
        truth = super().ground_truth
        unasked = len(truth) - len(self.asked_about(truth))
        if unasked:
            logger.warning(
                "%s has %d boxes of sentences that their images are not asked about; they are %s.",
                self._metadata.json_file,
                unasked,
                "counted as missed (count_unasked_boxes=False leaves them out)"
                if self._count_unasked_boxes
                else "left out",
            )

    def _log(self, results: dict[str, dict[str, float]]) -> None:
        values = results["description"]
        columns = ["AP50", "AP75", "APs", "APm", "APl"]
        rows = [
            [group, len(ids), values[group], *(values[f"{group}/{name}"] for name in columns)]
            for group, ids in self._groups.items()
        ]
        table = tabulate(
            rows, headers=["in %", "sentences", "AP", *columns], floatfmt=".2f", tablefmt="pipe"
        )
        logger.info("Descriptions, %s-scenario:\n%s", self._scenario, table)
