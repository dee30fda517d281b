"""One training step, and the numbers it leaves behind."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import TrainerBase
from detectron2.utils import comm
from torch import nn

from .errors import RunError

AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_amp_dtype(device: str, name: str | None = None) -> torch.dtype:
    """The number format of mixed precision: ``name``, or bfloat16 where the device has it.

    Raises:
        ValueError: an unknown name.
    """
    if name is None:
        no_bf16 = device == "cuda" and not torch.cuda.is_bf16_supported()
        return torch.float16 if no_bf16 else torch.bfloat16
    if name not in AMP_DTYPES:
        raise ValueError(
            f"Mixed precision in {name!r} is not known; choose {' or '.join(AMP_DTYPES)}."
        )
    return AMP_DTYPES[name]


class StepTrainer(TrainerBase):
    """Forward, backward, clip, update; losses are looked at only once per ``log_period``.

    Reading a loss stops the host until the device has computed it, so the values stay where they
    are until :meth:`flush_metrics` brings a whole period over at once.

    Args:
        model: in training mode a function of a batch to a dict of scalar losses; their sum is
            minimised. May be wrapped for distributed training.
        optimizer: of ``model``'s parameters.
        data_loader: iterable of batches, at least as long as the training; may be set later.
        amp_dtype: the format of autocast, or None for full precision. float16 on a GPU scales the
            loss; on a CPU use bfloat16.
        clip_grad: limit of the L2 norm of all gradients together, or None.
        log_period: iterations between two looks at the losses.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: Iterable[Any] | None = None,
        *,
        amp_dtype: torch.dtype | None = None,
        clip_grad: float | None = None,
        log_period: int = 20,
    ) -> None:
        super().__init__()
        if clip_grad is not None and clip_grad <= 0:
            raise ValueError(
                f"The gradient norm cannot be clipped at {clip_grad}: give a positive "
                "number, or None for no clipping."
            )
        if log_period < 1:
            raise ValueError(f"The log period is {log_period}, but it has to be at least 1.")
        model.train()
        self.model = model
        self.optimizer = optimizer
        self.data_loader = data_loader
        self.amp_dtype = amp_dtype
        self.clip_grad = clip_grad
        self.log_period = log_period
        self.device_type = next(model.parameters()).device.type
        self.grad_scaler = _grad_scaler(self.device_type, amp_dtype)
        self._batches: Iterator[Any] | None = None
        self._pending: list[tuple[int, float, dict[str, torch.Tensor]]] = []

    def start_loading(self) -> None:
        """Create the iterator of the loader, and with it the loader's worker processes."""
        if self.data_loader is None:
            raise ValueError("The trainer has no data loader: set data_loader before training.")
        self._batches = iter(self.data_loader)

    def run_step(self) -> None:
        if self._batches is None:
            self.start_loading()
        start = time.perf_counter()
        batch = next(self._batches, None)
        if batch is None:
            raise RuntimeError("the training loader has ended, but it has to be endless")
        data_time = time.perf_counter() - start

        with torch.autocast(
            self.device_type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
        ):
            losses = self.model(batch)
        self.optimizer.zero_grad(set_to_none=True)
        self.grad_scaler.scale(sum(losses.values())).backward()
        metrics = {name: loss.detach() for name, loss in losses.items()}
        if self.clip_grad is not None:
            self.grad_scaler.unscale_(self.optimizer)
            metrics["grad_norm"] = self._clip()
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

        self._pending.append((self.iter, data_time, metrics))
        if (self.iter + 1) % self.log_period == 0 or self.iter == self.max_iter - 1:
            self.flush_metrics()

    def _clip(self) -> torch.Tensor:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return nn.utils.clip_grad_norm_(parameters, self.clip_grad)

    def flush_metrics(self) -> None:
        """Average the losses since the last call over all processes and record them.

        All processes have to call it.

        Raises:
            FloatingPointError: where a loss is not finite; in all processes at once.
        """
        if not self._pending:
            return
        iterations, data_times, rows = zip(*self._pending)
        self._pending = []
        names = list(rows[0])
        # P iterations by L metrics.
        values = torch.stack([torch.stack([row[name].float() for name in names]) for row in rows])
        times = torch.tensor(data_times, device=values.device)
        if comm.get_world_size() > 1:
            dist.all_reduce(values)
            values /= comm.get_world_size()
            # The slowest process is the one that everybody waited for.
            dist.all_reduce(times, op=dist.ReduceOp.MAX)
        table = values.tolist()
        for iteration, data_time, row in zip(iterations, times.tolist(), table):
            self._record(iteration, data_time, dict(zip(names, row)))
        self.storage.iter = self.iter

    def _record(self, iteration: int, data_time: float, metrics: dict[str, float]) -> None:
        losses = {name: value for name, value in metrics.items() if name != "grad_norm"}
        # A sum is not finite where one of its terms is not.
        total = sum(losses.values())
        if not math.isfinite(total):
            shown = ", ".join(f"{name} = {value:.4g}" for name, value in losses.items())
            raise FloatingPointError(
                f"A loss is not finite at iteration {iteration}: {shown}. Lower the learning rate "
                "or clip gradients (train.clip_grad)."
            )
        if comm.is_main_process():
            self.storage.iter = iteration
            self.storage.put_scalars(data_time=data_time, total_loss=total, **metrics)

    def train(self, start_iter: int, max_iter: int) -> None:
        """Train from ``start_iter`` up to, not including, ``max_iter``.

        Raises:
            FloatingPointError: a loss is not finite.
            RunError: anything else that went wrong, with the iteration.
        """
        with name_the_iteration(self, max_iter):
            super().train(start_iter, max_iter)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["optimizer"] = self.optimizer.state_dict()
        state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.optimizer.load_state_dict(state_dict["optimizer"])
        # Empty where the run that was saved did not scale its loss.
        if self.grad_scaler.is_enabled() and state_dict["grad_scaler"]:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


@contextmanager
def name_the_iteration(trainer: TrainerBase, max_iter: int) -> Iterator[None]:
    """Turn what escapes a training loop into an error that says in which iteration it rose."""
    try:
        yield
    except FloatingPointError:
        # Its message names the iteration of the loss, which may be some before this one.
        raise
    except Exception as error:
        raise RunError(
            f"Training stopped at iteration {trainer.iter} of {max_iter}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _grad_scaler(device_type: str, amp_dtype: torch.dtype | None) -> Any:
    enabled = device_type == "cuda" and amp_dtype == torch.float16
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(device_type, enabled=enabled)
    # Before torch 2.3 there was the CUDA one only.
    return torch.cuda.amp.GradScaler(enabled=enabled)
