"""A file of stored numbers: its inputs, checked on reading, and the rest to compare with."""

from __future__ import annotations

import importlib.util
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

PUBLIC_FOLDER = Path(__file__).resolve().parents[2] / "tests" / "fixtures" / "model"
PAD_MULTIPLE = 32

# Inputs, or facts that other arrays refer to: read, not compared.
BOOKKEEPING = (
    r"image_seed",
    r"image_sizes_hw",
    r"dyconv_unit/(seed|shapes)",
    r"[^/]+/(input_ids|attention_mask|positive_map_json|positive_map_agg_json)",
    r"[^/]+/(positive_map_binary|loss_names|img\d+/gt_boxes)",
)


class FixtureError(ValueError):
    """The file is not one of this format; the message says why."""


class Fill(NamedTuple):
    """The generators of weights and inputs that belong to a file."""

    weights: Callable[[str, tuple[int, ...]], np.ndarray | None]
    image: Callable[[int, int, int], np.ndarray]


def load_fill(path: Path) -> Fill:
    """The functions of a ``reference_fill.py``."""
    if not path.is_file():
        raise FixtureError(f"{path} does not exist: name the generator with --reference-fill.")
    spec = importlib.util.spec_from_file_location("reference_fill", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return Fill(module.reference_fill, module.reference_image)
    except AttributeError as error:
        raise FixtureError(f"{path} is no reference_fill.py: {error}.") from error


def find_fill(fixture: Path, given: Path | None) -> Path:
    """The generator: as given, else next to the file, else the one of the tests."""
    if given is not None:
        return given
    beside = fixture.parent / "reference_fill.py"
    return beside if beside.is_file() else PUBLIC_FOLDER / "reference_fill.py"


class Fixture:
    """The arrays of a file, by name.

    Letters: B images of the file, T tokens of a case, N boxes of all images of a case.

    Attributes:
        arrays: everything in the file.
        eval_cases, train_cases: names of the cases, in the file's order.
    """

    def __init__(self, arrays: dict[str, np.ndarray], source: str) -> None:
        self.arrays = arrays
        self.source = source
        cases = [name.split("/")[0] for name in arrays if name.endswith("/input_ids")]
        self.train_cases = [c for c in cases if f"{c}/positive_map_binary" in arrays]
        self.eval_cases = [c for c in cases if c not in self.train_cases]
        if not cases:
            raise FixtureError(f"{source} has no case (no array NAME/input_ids).")
        self.image_sizes = [(int(h), int(w)) for h, w in self.get("image_sizes_hw")]

    @classmethod
    def read(cls, path: Path) -> Fixture:
        if not path.is_file():
            raise FixtureError(f"{path} does not exist.")
        try:
            with np.load(path, allow_pickle=False) as archive:
                return cls({name: archive[name] for name in archive.files}, str(path))
        except (OSError, zipfile.BadZipFile, EOFError, AttributeError) as error:
            raise FixtureError(f"{path} is no readable .npz file ({error}).") from error
        except ValueError as error:
            raise FixtureError(
                str(error) if str(path) in str(error) else f"{path}: {error}."
            ) from error

    def get(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise FixtureError(f"{self.source} lacks the array {name}.")
        return self.arrays[name]

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.get(name)))

    @property
    def variant(self) -> str:
        """``v3`` if the names of the parameters have the extra LayerNorm, else ``v2``."""
        return "v3" if any("norm_i2t_i" in str(n) for n in self.get("param_names")) else "v2"

    def images(self, fill: Fill) -> list[torch.Tensor]:
        """Normalised, unpadded ``(3, H, W)``."""
        seed = int(self.get("image_seed"))
        return [
            torch.from_numpy(fill.image(seed + i, h, w))
            for i, (h, w) in enumerate(self.image_sizes)
        ]

    def text(self, case: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids int64 and mask bool, ``(B, T)``."""
        ids, mask = self.tensor(f"{case}/input_ids"), self.tensor(f"{case}/attention_mask")
        if ids.shape != mask.shape or ids.shape[0] != len(self.image_sizes):
            raise FixtureError(
                f"{self.source}, case {case}: input_ids {tuple(ids.shape)} and attention_mask "
                f"{tuple(mask.shape)} must be ({len(self.image_sizes)}, T)."
            )
        return ids.long(), mask.bool()

    def positive_map(self, case: str, name: str, num_tokens: int) -> tuple[list[int], torch.Tensor]:
        """Labels and their rows ``(K, T)``, each of total weight 1."""
        content = json.loads(str(self.get(f"{case}/{name}")))
        labels = sorted(int(label) for label in content)
        rows = torch.zeros(len(labels), num_tokens)
        for row, label in zip(rows, labels):
            tokens = content[str(label)]
            if tokens:
                row[tokens] = 1 / len(tokens)
        return labels, rows

    def boxes(self, case: str) -> list[torch.Tensor]:
        """Ground truth of every image, ``(N_i, 4)``."""
        return [
            self.tensor(f"{case}/img{i}/gt_boxes").float().reshape(-1, 4)
            for i in range(len(self.image_sizes))
        ]

    def compared(self) -> list[str]:
        """Names of the arrays that have to agree."""
        return [
            name
            for name in self.arrays
            if not any(re.fullmatch(pattern, name) for pattern in BOOKKEEPING)
        ]


def pad_images(images: list[torch.Tensor]) -> torch.Tensor:
    """Zero-padded batch ``(B, 3, H, W)``, sides multiples of 32."""
    height, width = (
        -(-max(image.shape[axis] for image in images) // PAD_MULTIPLE) * PAD_MULTIPLE
        for axis in (1, 2)
    )
    batch = torch.zeros(len(images), 3, height, width)
    for row, image in zip(batch, images):
        row[:, : image.shape[1], : image.shape[2]] = image
    return batch
