"""The generated data, in every format that the true ones come in."""

from __future__ import annotations

from .entry import COCO, DETECTION, GROUNDING, LVIS, MDETR, REFEXP, BuiltinDataset


def _shapes(split: str) -> dict[str, BuiltinDataset]:
    images, annotations = f"shapes/images/{split}", "shapes/annotations"
    prepare = "python -m fiber_d2.data.shapes writes the generated sets."
    return {
        f"shapes_detection_{split}": BuiltinDataset(
            COCO,
            DETECTION,
            "coco",
            f"{annotations}/instances_{split}.json",
            images,
            prepare=prepare,
        ),
        f"shapes_lvis_{split}": BuiltinDataset(
            LVIS,
            DETECTION,
            "lvis",
            f"{annotations}/lvis_{split}.json",
            "shapes/images",
            prepare=prepare,
        ),
        f"shapes_grounding_{split}": BuiltinDataset(
            MDETR,
            GROUNDING,
            "flickr",
            f"{annotations}/final_flickr_separateGT_{split}.json",
            images,
            prepare=prepare,
            entities_root="shapes/flickr30k_entities",
            split=split,
        ),
        f"shapes_mixed_{split}": BuiltinDataset(
            MDETR,
            GROUNDING,
            None,
            f"{annotations}/final_mixed_shapes_{split}.json",
            images,
            prepare=prepare,
        ),
        f"shapes_refexp_{split}": BuiltinDataset(
            MDETR,
            REFEXP,
            "refexp",
            f"{annotations}/finetune_shapes_{split}.json",
            images,
            prepare=prepare,
        ),
    }


SHAPES_SETS = {**_shapes("train"), **_shapes("val")}
