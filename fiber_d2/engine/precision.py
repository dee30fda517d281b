"""Number formats of mixed precision, and the scaler that keeps bad steps from the weights."""

from __future__ import annotations

from typing import Any

import torch

from fiber_d2.layers.precision import dtype_of


def choose_amp_dtype(device: str, name: str | None = None) -> torch.dtype:
    """The number format of mixed precision: ``name``, or bfloat16 where the device has it.

    Raises:
        ValueError: an unknown name.
    """
    if name is None:
        no_bf16 = device == "cuda" and not torch.cuda.is_bf16_supported()
        return torch.float16 if no_bf16 else torch.bfloat16
    return dtype_of(name)


class StepScaler:
    """torch's gradient scaler for every number format: updates with bad gradients do not happen.

    float16 needs scaled losses, and the scale adapts to what overflows. In other formats the
    scale is 1 for ever, and what is left of the scaler is that it looks at the gradients on their
    device and leaves out an update where one of them is not finite. An optimiser with
    ``fused=True`` finds that out by itself, without the host waiting for it; with another one the
    host waits once per step.

    Args:
        device_type: "cuda" or "cpu".
        amp_dtype: the format of autocast; None is full precision.

    Raises:
        ValueError: float16 on a CPU with a torch that cannot scale there (before 2.3).
    """

    def __init__(self, device_type: str, amp_dtype: torch.dtype | None) -> None:
        self.adapts = amp_dtype == torch.float16
        settings: dict[str, Any] = {} if self.adapts else {"init_scale": 1.0}
        self._scaler: Any = None
        if hasattr(torch.amp, "GradScaler"):
            self._scaler = torch.amp.GradScaler(device_type, **settings)
        elif device_type == "cuda":
            self._scaler = torch.cuda.amp.GradScaler(**settings)
        elif self.adapts:
            raise ValueError(
                "float16 on the CPU needs torch 2.3 or newer: choose bfloat16 (train.amp.dtype)."
            )

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """What to differentiate."""
        return loss if self._scaler is None else self._scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the gradients their true size; at most once before each update."""
        if self._scaler is not None:
            self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> None:
        """Update the weights, unless a gradient is not finite.

        Args:
            norm: of the unscaled gradients.
        """
        if self._scaler is None:
            if torch.isfinite(norm):
                optimizer.step()
            return
        self._scaler.step(optimizer)
        # A number given by hand stays; left to itself the scale adapts.
        self._scaler.update(None if self.adapts else 1.0)

    def current_scale(self) -> float:
        """Read from the device."""
        return self._scaler.get_scale() if self.adapts else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Empty where the scale does not adapt."""
        return self._scaler.state_dict() if self.adapts else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """An empty state, of a run that did not scale, leaves the scale at its start."""
        if self.adapts and state_dict:
            self._scaler.load_state_dict(state_dict)
