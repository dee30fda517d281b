"""Sets of captions and expressions: boxes with the words that name them."""

from __future__ import annotations

from .entry import GROUNDING, MDETR, REFEXP, BuiltinDataset

# The original keeps the images of 2014 a second time beside the expressions.
COCO_2014 = ("coco/train2014", "refcoco/train2014")
_ARCHIVE = "MDETR's archive mdetr_annotations has it"


def _flickr30k(split: str) -> BuiltinDataset:
    images = "flickr30k/flickr30k_images"
    return BuiltinDataset(
        MDETR,
        GROUNDING,
        "flickr",
        f"mdetr_annotations/final_flickr_separateGT_{split}.json",
        (f"{images}/{split}", images),
        prepare="datasets/prepare/flickr30k_entities.py makes it out of Flickr30k Entities; "
        f"{_ARCHIVE}, too.",
        entities_root="flickr30k/flickr30k",
        split=split,
    )


FLICKR30K_SETS = {f"flickr30k_{split}": _flickr30k(split) for split in ("train", "val", "test")}


def _mixed(json_name: str, prepare: str) -> BuiltinDataset:
    return BuiltinDataset(
        MDETR,
        GROUNDING,
        None,
        f"mdetr_annotations/{json_name}.json",
        "gqa/images",
        coco_image_root=COCO_2014,
        prepare=prepare,
    )


_MIXED = "datasets/prepare/mixed.py makes it out of Visual Genome's regions"
_CLEAN = (
    "datasets/prepare/refexp_clean.py makes it out of {}.json, by leaving out the images that "
    "RefCOCO, RefCOCO+ and RefCOCOg test on."
)
MIXED_SETS = {
    "mixed_train": _mixed("final_mixed_train", f"{_MIXED}; {_ARCHIVE}, too."),
    "mixed_train_no_coco": _mixed("final_mixed_train_no_coco", f"{_MIXED}."),
    "mixed_train_refexpclean": _mixed(
        "final_mixed_train_refexpclean", _CLEAN.format("final_mixed_train")
    ),
    "mixed_train_no_coco_refexpclean": _mixed(
        "final_mixed_train_no_coco_refexpclean", _CLEAN.format("final_mixed_train_no_coco")
    ),
}


def _refcoco(name: str, split: str) -> BuiltinDataset:
    return BuiltinDataset(
        MDETR,
        REFEXP,
        "refexp",
        f"mdetr_annotations/finetune_{name}_{split}.json",
        COCO_2014,
        prepare=f"datasets/prepare/refcoco.py makes it out of REFER's files; {_ARCHIVE}, too.",
    )


REFCOCO_SPLITS = {
    "refcoco": ("train", "val", "testA", "testB"),
    "refcoco+": ("train", "val", "testA", "testB"),
    "refcocog": ("train", "val", "test"),
}
REFCOCO_SETS = {
    f"{name}_{split}": _refcoco(name, split)
    for name, splits in REFCOCO_SPLITS.items()
    for split in splits
}
