"""Detection sets with images of COCO's and Objects365's: boxes with classes."""

from __future__ import annotations

from .entry import COCO, DETECTION, LVIS, TSV, BuiltinDataset


def _coco(json_file: str, images: str, archive: str, *, annotated: bool = True) -> BuiltinDataset:
    return BuiltinDataset(
        COCO,
        DETECTION,
        "coco",
        f"coco/annotations/{json_file}",
        f"coco/{images}",
        prepare=f"It is part of COCO's own archive {archive}.",
        annotated=annotated,
    )


_COCO_BOXES = "annotations_trainval2017.zip"
COCO_SETS = {
    "coco_grounding_train": _coco("instances_train2017.json", "train2017", _COCO_BOXES),
    "coco_grounding_val": _coco("instances_val2017.json", "val2017", _COCO_BOXES),
    "coco_grounding_test-dev": _coco(
        "image_info_test-dev2017.json", "test2017", "image_info_test2017.zip", annotated=False
    ),
}


def _lvis(json_file: str, prepare: str) -> BuiltinDataset:
    # The url of an image names its COCO folder, so one root serves all of them.
    return BuiltinDataset(LVIS, DETECTION, "lvis", f"lvis/{json_file}", "coco", prepare=prepare)


_OFFICIAL = "It is LVIS's own file, from its project page."
LVIS_SETS = {
    "lvis_grounding_train": _lvis("lvis_v1_train.json", _OFFICIAL),
    "lvis_evaluation_val": _lvis("lvis_v1_val.json", _OFFICIAL),
    "lvis_evaluation_mini_val": _lvis(
        "lvis_v1_minival_inserted_image_name.json",
        "datasets/prepare/lvis_v1.py makes it out of lvis_v1_val.json; the published file of that "
        "name serves as well.",
    ),
}


def _objects365(json_file: str, images: str) -> BuiltinDataset:
    return BuiltinDataset(
        COCO,
        DETECTION,
        "coco",
        f"Objects365/annotations/{json_file}",
        f"Objects365/{images}",
        prepare="It is Objects365's own file, from its project page.",
    )


OBJECTS365_SETS = {
    "objects365_train": _objects365("zhiyuan_objv2_train.json", "train"),
    "objects365_val": _objects365("zhiyuan_objv2_val.json", "val"),
    "object365_dt_train": BuiltinDataset(
        TSV,
        DETECTION,
        None,
        "Objects365/objects365_train_vgoiv6.cas2000.yaml",
        prepare="datasets/objects365_tsv.py writes TSV files and their yaml out of Objects365's "
        "json.",
    ),
}
