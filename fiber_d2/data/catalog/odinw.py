"""ODinW's 35 sets and the 13 among them that GLIP and FIBER report, from ``assets/odinw.json``.

Its entries have the set's ``folder``; ``classes``, as the published files name them; ``prompts``,
by class, where GLIP published other words to ask with (null: the class names); and what is
particular to few of them: ``one_folder`` (the splits share a folder and their json files are
called after them), ``minival`` (there is a smaller validation split, which is the one GLIP uses),
``test_is_val`` (there is no split to test on other than that for validation).

GLIP asks for the first class of ChessPieces by a blank, which no word can stand for; here its
class name is used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .entry import COCO, DETECTION, BuiltinDataset

FEWSHOT_SHOTS, FEWSHOT_SEEDS = (1, 3, 5, 10), (3, 30, 300)
_ASSET = Path(__file__).parents[1] / "assets" / "odinw.json"
_FOLDERS = {"train": "train", "val": "valid", "minival": "mini_val", "test": "test"}
_PREPARE = (
    "ODinW is distributed by GLIP's authors; datasets/prepare/roboflow.py makes the file out of an "
    "export of Roboflow's."
)


def _sets() -> dict[str, dict[str, Any]]:
    with _ASSET.open(encoding="utf-8") as file:
        return json.load(file)


def _entries(name: str, info: dict[str, Any]) -> dict[str, BuiltinDataset]:
    def entry(json_file: str, images: str) -> BuiltinDataset:
        return BuiltinDataset(
            COCO,
            DETECTION,
            "coco",
            json_file,
            images,
            prepare=_PREPARE,
            classes=tuple(info["classes"]) if info["classes"] else None,
            prompts=info["prompts"],
        )

    folder, in_one = f"odinw/{info['folder']}", info.get("one_folder", False)
    entries, images = {}, {}
    for split in _FOLDERS:
        if split == "minival" and not info.get("minival", False):
            continue
        source = "val" if split == "test" and info.get("test_is_val", False) else split
        images[split] = folder if in_one else f"{folder}/{_FOLDERS[source]}"
        json_name = f"{source}_annotations" if in_one else "annotations"
        entries[f"odinw_{name}_{split}"] = entry(
            f"{images[split]}/{json_name}_without_background.json", images[split]
        )
    for shots in FEWSHOT_SHOTS:
        for seed in FEWSHOT_SEEDS:
            choice = f"train_shot{shots}_seed{seed}"
            entries[f"odinw_{name}_{choice}"] = entry(
                f"{images['train']}/fewshot_{choice}.json", images["train"]
            )
    return entries


_SETS = _sets()
ODINW35 = tuple(_SETS)
ODINW13 = tuple(name for name, info in _SETS.items() if info["odinw13"])
ODINW_SETS = {
    name: entry for key, info in _SETS.items() for name, entry in _entries(key, info).items()
}
