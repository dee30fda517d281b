"""How much a visitor may ask for."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """
    Attributes:
        upload_bytes: of a picture's file.
        pixels: of a picture, width times height.
        characters: of a text.
        waiting: requests that may wait while one is answered.
        timeout: seconds from a request's arrival to its answer.

    Raises:
        ValueError: one of them is not positive (``waiting`` may be 0).
    """

    upload_bytes: int = 16 * 2**20
    pixels: int = 40_000_000
    characters: int = 1000
    waiting: int = 4
    timeout: float = 120.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 0 or (value == 0 and field.name != "waiting"):
                raise ValueError(f"The limit {field.name} is {value}, but has to be positive.")
