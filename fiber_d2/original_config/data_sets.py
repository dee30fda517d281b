"""The original's names of data sets in ours, and those that a yaml file registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fiber_d2.data.catalog import BUILTIN, BuiltinDataset

from .files import literal

NAMES = {
    "coco_2017_val": "coco_grounding_val",
    "coco_2017_test": "coco_grounding_test-dev",
    "refcoco_real_val": "refcoco_val",
}


@dataclass(frozen=True)
class RegisteredData:
    """Arguments of :func:`~fiber_d2.data.register_coco_json`."""

    name: str
    json_file: str
    image_root: str
    class_names: dict[int, str] | None = None
    prompts: list[dict[str, str]] | None = None

    def arguments(self) -> dict[str, Any]:
        """Those that are given, by name."""
        return {key: value for key, value in vars(self).items() if value is not None}


class DataSets:
    """Looks up data sets of the original.

    Args:
        original: merged files.

    Attributes:
        registered: data sets that are not built in, by our names.
        notes: fields of the files that are not carried over, with the reason.
    """

    def __init__(self, original: Any) -> None:
        self._original = original
        self._entries: dict[str, dict[str, str]] = {}
        for key, value in original.given.items():
            if key.startswith("DATASETS.REGISTER."):
                name, _, field = key[len("DATASETS.REGISTER.") :].rpartition(".")
                self._entries.setdefault(name, {})[field] = value
        self._by_file: dict[str, str] = {}
        for name, entry in BUILTIN.items():
            self._by_file.setdefault(entry.json_file, name)
        self.registered: dict[str, RegisteredData] = {}
        self.notes: dict[str, str] = {}
        named = {*original["DATASETS.TRAIN"], *original["DATASETS.TEST"]}
        for name in self._entries.keys() - named:
            self.notes[f"DATASETS.REGISTER.{name}"] = "neither DATASETS.TRAIN nor TEST names it"

    def ours(self, name: str) -> str:
        """
        Raises:
            ValueError: no built-in data set, and no file is registered under the name.
        """
        known = NAMES.get(name, name)
        if known == "mixed_train_no_coco" and (
            self._original["MODEL.BACKBONE.FUSION_VERSION"] == "v3"
        ):
            # The original's two pre-trainings name the same set and mean different files.
            return "mixed_train_no_coco_refexpclean"
        entry = self._entries.get(name, {})
        if known in BUILTIN:
            if entry:
                self.notes[f"DATASETS.REGISTER.{name}"] = (
                    f"{known} is built in; its file is {BUILTIN[known].json_file} in "
                    "DETECTRON2_DATASETS"
                )
            return known
        if "ann_file" not in entry:
            raise ValueError(
                f"{name} is no built-in data set (datasets/README.md lists them), and "
                "DATASETS.REGISTER does not say where it is."
            )
        class_names, prompts = self._words()
        known = self._by_file.get(entry["ann_file"], "")
        if known and _has_words(BUILTIN[known], class_names, prompts):
            return known
        data = RegisteredData(
            f"custom_{name}", entry["ann_file"], entry.get("img_dir", ""), class_names, prompts
        )
        self.registered[data.name] = data
        return data.name

    def _words(self) -> tuple[dict[int, str] | None, list[dict[str, str]] | None]:
        original, found = self._original, []
        for name in ("OVERRIDE_CATEGORY", "CAPTION_PROMPT"):
            value, used = original[f"DATASETS.{name}"], original[f"DATASETS.USE_{name}"]
            value = literal(value) if used else None
            if value and not isinstance(value, (list, tuple)):
                raise ValueError(f"DATASETS.{name} is no list of mappings: {value!r}.")
            if original[f"DATASETS.{name}"] and not used:
                self.notes[f"DATASETS.{name}"] = f"DATASETS.USE_{name} is False"
            found.append(list(value) if value else None)
        categories, prompts = found
        try:
            names = categories and {entry["id"]: entry["name"] for entry in categories}
        except (KeyError, TypeError) as error:
            raise ValueError("DATASETS.OVERRIDE_CATEGORY needs id and name of each.") from error
        return names, prompts


def _has_words(
    entry: BuiltinDataset,
    class_names: dict[int, str] | None,
    prompts: list[dict[str, str]] | None,
) -> bool:
    """Whether a built-in data set asks by these names and prompts, too."""
    classes = list(entry.classes or ())
    if class_names and [class_names[key] for key in sorted(class_names)] != classes:
        return False
    of_entry = [_parts({"name": name, **(entry.prompts or {}).get(name, {})}) for name in classes]
    return not prompts or [_parts(prompt) for prompt in prompts] == of_entry


def _parts(prompt: dict[str, str]) -> tuple[str, ...]:
    return tuple(prompt.get(key, "") for key in ("prefix", "name", "suffix"))
