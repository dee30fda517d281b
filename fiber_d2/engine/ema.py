"""Averaged weights: an exponential moving average over the steps of a training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from detectron2.engine import HookBase
from torch import nn

from fiber_d2.checkpoint.files import list_problems

# Under which name checkpoints hold them.
EMA_KEY = "ema"
WEIGHTS = ("model", EMA_KEY)


class ModelEma:
    """A second set of a model's weights, ``decay * average + (1 - decay) * weights`` at each step.

    The decay is constant, without warm-up, over all floating-point entries of the state dict, as
    in the published runs (SPEC_DATA_EVAL 6.8). Other entries are copied; the original averages
    integers too, and cuts what comes out.

    As a checkpointable it is stored like a model: a dict of names and tensors. All processes of a
    distributed run hold the same average, since they hold the same weights.

    Args:
        model: bare, not wrapped for distributed training; on its final device.
        decay: at least 0, below 1.

    Attributes:
        restored: whether a checkpoint has given the averages.

    Raises:
        ValueError: a decay out of its range.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(
                f"The decay of averaged weights (train.ema.decay) is {decay}, but it has to be at "
                "least 0 and below 1."
            )
        self.model = model
        self.decay = decay
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Begin again with the weights that the model has now."""
        self._averages = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.restored = False

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of the model; nothing waits for the device."""
        averages, weights = [], []
        for average, value in self._pairs():
            if average.is_floating_point():
                averages.append(average)
                weights.append(value)
            else:
                average.copy_(value)
        torch._foreach_mul_(averages, self.decay)
        torch._foreach_add_(averages, weights, alpha=1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the model has the averaged weights; afterwards, bit by bit, its own again.

        Its own are kept beside them for so long. Wherever a signal interrupts this, the averages
        are untouched and the weights come back.
        """
        with torch.no_grad():
            own = {name: value.clone() for name, value in self.model.state_dict().items()}
        try:
            self._fill(self._averages)
            yield
        finally:
            self._fill(own)

    @torch.no_grad()
    def _fill(self, source: Mapping[str, torch.Tensor]) -> None:
        for name, value in self.model.state_dict().items():
            value.copy_(source[name])

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for name, value in self.model.state_dict().items():
            yield self._averages[name], value

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averages, by the names of the model's state dict."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Go on from these averages.

        Raises:
            ValueError: they are of another model.
        """
        problems = list_problems(
            {
                "missing": [name for name in self._averages if name not in state_dict],
                "unexpected": [name for name in state_dict if name not in self._averages],
                "of another shape": [
                    f"{name} {tuple(state_dict[name].shape)} instead of {tuple(average.shape)}"
                    for name, average in self._averages.items()
                    if name in state_dict and state_dict[name].shape != average.shape
                ],
            }
        )
        if problems:
            raise ValueError(
                f"The averaged weights in the checkpoint belong to another model. Entries "
                f"{problems}. Use the configuration they were trained with."
            )
        for name, average in self._averages.items():
            average.copy_(state_dict[name])
        self.restored = True


class EmaHook(HookBase):
    """Updates averaged weights after each step; to be registered before what saves or evaluates.

    A run that resumes goes on with the averages of its checkpoint; any other begins with the
    weights it starts from.
    """

    def __init__(self, ema: ModelEma) -> None:
        self.ema = ema

    def before_train(self) -> None:
        if not self.ema.restored:
            self.ema.reset()

    def after_step(self) -> None:
        self.ema.update()


def build_ema(model: nn.Module, settings: Mapping[str, Any] | None) -> ModelEma | None:
    """The averages that ``train.ema`` asks for: None, or ``dict(decay=0.999)``."""
    return None if settings is None else ModelEma(model, **settings)


def weights_to_evaluate(weights: str, ema: ModelEma | None) -> AbstractContextManager[None]:
    """A context in which the model has the weights that ``train.weights`` names.

    Raises:
        ValueError: an unknown name, or "ema" without averages.
    """
    check_weights(weights, averaged=ema is not None)
    return ema.applied() if weights == EMA_KEY and ema is not None else nullcontext()


def check_weights(weights: str, *, averaged: bool = True) -> None:
    """That ``train.weights`` is known, and there if ``averaged`` says so.

    Raises:
        ValueError: it is not.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"train.weights is {weights!r}: choose {' or '.join(WEIGHTS)}.")
    if weights == EMA_KEY and not averaged:
        raise ValueError(
            f"train.weights is {EMA_KEY!r}, but this training averages no weights: set "
            "train.ema.decay=0.999, or train.weights=model."
        )
