"""What was found in an image, and the forms it can be handed on in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances


class Prediction(dict[str, Any]):
    """Detections of one image, and the words that each is tied to.

    A plain dict, as models of Detectron2 return it, with further forms. Its entries:

    - ``instances``: Detectron2's, on the CPU, by descending score: ``pred_boxes`` (XYXY in pixels
      of the original image), ``scores`` in 0..1, ``pred_classes`` (positions in ``targets``);
    - ``words``: a text for each box;
    - ``targets``: the texts that were looked for: class names, phrases, or the expression.
    """

    def __init__(self, instances: Instances, targets: Sequence[str]) -> None:
        words = [targets[index] for index in instances.pred_classes.tolist()]
        super().__init__(instances=instances, words=words, targets=list(targets))

    @property
    def instances(self) -> Instances:
        return self["instances"]

    @property
    def words(self) -> list[str]:
        return self["words"]

    @property
    def targets(self) -> list[str]:
        return self["targets"]

    def best(self) -> Prediction:
        """Only the highest-scoring box of each target that has one, by descending score."""
        classes = self.instances.pred_classes.tolist()
        first = sorted({target: classes.index(target) for target in classes}.values())
        return Prediction(self.instances[torch.tensor(first, dtype=torch.int64)], self.targets)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, fit for json.

        Returns:
            ``height`` and ``width`` of the image, ``targets``, and ``detections``, a list of
            ``box`` (XYXY, pixels), ``score``, ``target`` (position in ``targets``), ``words``.
        """
        instances = self.instances
        height, width = instances.image_size
        rows = zip(
            instances.pred_boxes.tensor.tolist(),
            instances.scores.tolist(),
            instances.pred_classes.tolist(),
            self.words,
        )
        return {
            "height": height,
            "width": width,
            "targets": self.targets,
            "detections": [
                {"box": box, "score": score, "target": target, "words": words}
                for box, score, target, words in rows
            ],
        }

    def to_coco(
        self, image_id: int | str, *, category_ids: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """COCO results, as ``pycocotools``' ``loadRes`` takes them.

        Args:
            image_id: of the image in the annotation file.
            category_ids: of each target in that file; by default 1, 2, ... in order.

        Returns:
            A list of ``image_id``, ``category_id``, ``bbox`` (XYWH, pixels) and ``score``.

        Raises:
            ValueError: not as many ``category_ids`` as targets.
        """
        ids = range(1, len(self.targets) + 1) if category_ids is None else list(category_ids)
        if len(ids) != len(self.targets):
            raise ValueError(
                f"There are {len(ids)} category ids for {len(self.targets)} targets: give one each."
            )
        return [
            {**result, "category_id": ids[result["category_id"]]}
            for result in instances_to_coco_json(self.instances, image_id)
        ]

    def to_supervision(self) -> Any:
        """``supervision.Detections``, the words as ``data["class_name"]``.

        Raises:
            ImportError: the library is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise ImportError(
                "to_supervision() needs the library supervision, which is not installed: "
                "pip install supervision."
            ) from error
        instances = self.instances
        return supervision.Detections(
            xyxy=instances.pred_boxes.tensor.numpy(),
            confidence=instances.scores.numpy(),
            class_id=instances.pred_classes.numpy().astype(int),
            data={"class_name": np.array(self.words, dtype=str)},
        )


def coco_dataset(
    predictions: Mapping[str, Prediction], targets: Sequence[str] | None = None
) -> dict[str, Any]:
    """Predictions as a whole COCO file, which labelling tools and dataset readers can open.

    Args:
        predictions: by file name; images are numbered 1, 2, ... in order.
        targets: categories 1, 2, ...; by default the targets of all predictions.

    Returns:
        ``images``, ``categories`` and ``annotations``, which have a ``score`` each.
    """
    if targets is None:
        targets = [words for found in predictions.values() for words in found.targets]
    ids = {words: number for number, words in enumerate(dict.fromkeys(targets), start=1)}
    images, annotations = [], []
    for image_id, (file_name, found) in enumerate(predictions.items(), start=1):
        height, width = found.instances.image_size
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        results = found.to_coco(image_id, category_ids=[ids[words] for words in found.targets])
        for result in results:
            area = result["bbox"][2] * result["bbox"][3]
            annotations.append({"id": len(annotations) + 1, **result, "area": area, "iscrowd": 0})
    return {
        "images": images,
        "categories": [{"id": number, "name": words} for words, number in ids.items()],
        "annotations": annotations,
    }
