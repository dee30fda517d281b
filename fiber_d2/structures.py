"""The one small type that every part of the project shares: the prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, eq=False)
class Prompt:
    """A caption, its tokens, and which tokens belong to which target.

    Letters: ``T`` tokens (special tokens included, padding never), ``K`` targets. A target is a
    class of a detection caption, a phrase of a sentence, or a whole referring expression.

    Attributes:
        text: the caption.
        input_ids: int64 ``(T,)``, vocabulary indices.
        attention_mask: bool ``(T,)``, True for tokens the model may attend to.
        positive_map: float32 ``(K, T)``; row ``k`` spreads a total weight of 1 evenly over the
            tokens of target ``k``, or is all zero where the target has no token.
        target_ids: int64 ``(K,)``, what a prediction of row ``k`` is reported as: the contiguous
            0-based class id, or the index of the phrase.

    Raises:
        ValueError: where the shapes do not fit together.
    """

    text: str
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    positive_map: torch.Tensor
    target_ids: torch.Tensor

    def __post_init__(self) -> None:
        num_tokens = self.input_ids.shape[0]
        expected = {
            "input_ids": (num_tokens,),
            "attention_mask": (num_tokens,),
            "positive_map": (self.positive_map.shape[0], num_tokens),
            "target_ids": (self.positive_map.shape[0],),
        }
        for name, shape in expected.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise ValueError(
                    f"Prompt {self.text!r}: {name} has shape {found}, but {shape} is needed to "
                    "agree with input_ids (T,) and positive_map (K, T)."
                )

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_targets(self) -> int:
        return self.positive_map.shape[0]

    def to(self, device: torch.device | str) -> Prompt:
        """The same prompt with its tensors on ``device``."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            positive_map=self.positive_map.to(device),
            target_ids=self.target_ids.to(device),
        )
