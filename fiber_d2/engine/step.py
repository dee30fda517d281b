"""One training step, and the numbers it leaves behind."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import TrainerBase
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fiber_d2.modeling.metrics import collected_metrics

from .loading import Batches
from .nonfinite import (
    GRAD_NORM,
    METRICS,
    NonFiniteSteps,
    StepRecord,
    describe_steps,
    file_names,
)
from .precision import StepScaler
from .trouble import name_the_iteration

# How a group is updated is a matter of the machine, not of the checkpoint.
_IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")


@dataclass(frozen=True)
class _Pending:
    """A step that nobody has looked at; its metrics are scalars on the device."""

    iteration: int
    data_time: float
    metrics: dict[str, torch.Tensor]
    files: list[str]


class StepTrainer(TrainerBase):
    """Forward, backward, clip, update; losses are looked at only once per ``log_period``.

    Reading a loss stops the host until the device has computed it, so the values stay where they
    are until :meth:`flush_metrics` brings a whole period over at once.

    A step with a loss or a gradient that is not finite in any process changes no weight and no
    state of the optimiser in all of them. Nobody has to be asked for that: where a loss is not
    finite, it is multiplied by NaN, so that every gradient of that process is NaN, and with the
    gradients' average over the processes that of all others.

    With ``accumulate`` K above 1 a step takes K batches and minimises the mean of their losses. It
    equals a step with one batch K times as large where the loss is a mean over images. That of
    this project divides by the positive anchors of the batch, so the two differ as far as these
    are spread unevenly over the K batches; so it is in every detector with such a loss.

    Args:
        model: in training mode a function of a batch to a dict of scalar losses; their sum is
            minimised. May be wrapped for distributed training.
        optimizer: of ``model``'s parameters. Give it ``fused=True`` on a GPU, else the host waits
            in each step to learn whether the gradients are finite.
        data_loader: iterable of batches, at least as long as the training; may be set later.
        amp_dtype: the format of autocast, or None for full precision. float16 scales the loss.
        clip_grad: limit of the L2 norm of all gradients together, or None.
        log_period: iterations between two looks at the losses.
        accumulate: batches of a step.
        max_nonfinite: so many steps in a row that are not finite end the training.

    Attributes:
        num_images: that this process has trained on since it started.
        last_batch: what it was trained on last; None before.

    Raises:
        ValueError: settings that make no sense.
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
        accumulate: int = 1,
        max_nonfinite: int = 10,
    ) -> None:
        super().__init__()
        if clip_grad is not None and clip_grad <= 0:
            raise ValueError(
                f"The gradient norm cannot be clipped at {clip_grad}: give a positive "
                "number, or None for no clipping."
            )
        for name, number in (("log period", log_period), ("number of batches", accumulate)):
            if number < 1:
                raise ValueError(f"The {name} is {number}, but it has to be at least 1.")
        model.train()
        self.model = model
        self.optimizer = optimizer
        self.data_loader = data_loader
        self.amp_dtype = amp_dtype
        self.clip_grad = clip_grad
        self.log_period = log_period
        self.accumulate = accumulate
        self.device_type = next(model.parameters()).device.type
        self.grad_scaler = StepScaler(self.device_type, amp_dtype)
        self.nonfinite = NonFiniteSteps(max_nonfinite)
        self.num_images = 0
        self.last_batch: Any = None
        self._batches: Batches | None = None
        self._pending: list[_Pending] = []

    def start_loading(self) -> None:
        """Create the iterator of the loader, and with it the loader's worker processes."""
        if self.data_loader is None:
            raise ValueError("The trainer has no data loader: set data_loader before training.")
        self._batches = Batches(self.data_loader)

    def stop_loading(self) -> None:
        """End the loader's worker processes, and give back what they shared with this one."""
        self._batches = None

    def run_step(self) -> None:
        if self._batches is None:
            self.start_loading()
        self.optimizer.zero_grad(set_to_none=True)
        data_time, files = 0.0, []
        metrics: dict[str, torch.Tensor] = {}
        for index in range(self.accumulate):
            start = time.perf_counter()
            batch = self._batches.draw()
            data_time += time.perf_counter() - start
            files += file_names(batch)
            self.last_batch = batch
            self.num_images += len(batch)
            with self._gradients_stay_here(last=index == self.accumulate - 1):
                self._backward(batch, metrics)
        self.grad_scaler.unscale(self.optimizer)
        metrics[GRAD_NORM] = self._clip()
        self.grad_scaler.step(self.optimizer, metrics[GRAD_NORM])

        self._pending.append(_Pending(self.iter, data_time, metrics, files))
        if (self.iter + 1) % self.log_period == 0 or self.iter == self.max_iter - 1:
            self.flush_metrics()

    def _gradients_stay_here(self, *, last: bool) -> AbstractContextManager[None]:
        """Before the last batch of a step, gradients need not go to other processes."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def _backward(self, batch: Any, metrics: dict[str, torch.Tensor]) -> None:
        """Add the gradients of a batch, and its share of the step's losses to ``metrics``."""
        with (
            collected_metrics() as others,
            torch.autocast(
                self.device_type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
            ),
        ):
            losses = self.model(batch)
        total = sum(losses.values())
        # In all other cases a factor of one, which changes no bit.
        spoiler = torch.where(torch.isfinite(total.detach()), 1.0, math.nan)
        self.grad_scaler.scale(total * spoiler / self.accumulate).backward()
        others = {METRICS + name: value for name, value in others.items()}
        for name, loss in {**losses, **others}.items():
            share = loss.detach() / self.accumulate
            metrics[name] = metrics[name] + share if name in metrics else share

    def _clip(self) -> torch.Tensor:
        """The norm of all gradients, before they are clipped."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.clip_grad is not None:
            return nn.utils.clip_grad_norm_(parameters, self.clip_grad)
        # Clipping at infinity would write all gradients once more.
        gradients = [p.grad for p in parameters if p.grad is not None]
        if hasattr(nn.utils, "get_total_norm"):
            return nn.utils.get_total_norm(gradients)
        # Before torch 2.6.
        norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
        return torch.linalg.vector_norm(torch.stack(norms))

    def flush_metrics(self) -> None:
        """Average the losses since the last call over all processes and record them.

        All processes have to call it.

        Raises:
            NonFiniteError: too many steps in a row were not finite; in all processes at once.
        """
        if not self._pending:
            return
        steps, self._pending = self._pending, []
        names = list(steps[0].metrics)
        # P iterations by L metrics.
        own = torch.stack(
            [torch.stack([step.metrics[name].float() for name in names]) for step in steps]
        )
        values = own.clone()
        times = torch.tensor([step.data_time for step in steps], device=values.device)
        if comm.get_world_size() > 1:
            dist.all_reduce(values)
            values /= comm.get_world_size()
            # The slowest process is the one that everybody waited for.
            dist.all_reduce(times, op=dist.ReduceOp.MAX)

        def records(table: torch.Tensor) -> list[StepRecord]:
            return [
                StepRecord(step.iteration, dict(zip(names, row)), step.files)
                for step, row in zip(steps, table.tolist())
            ]

        averaged = records(values)
        bad = {step.iteration for step in averaged if self._is_bad(step)}
        told: dict[int, str] = {}
        if bad:
            told = describe_steps([r for r in records(own) if r.iteration in bad])
        for step, data_time in zip(averaged, times.tolist()):
            if step.iteration in bad:
                self.nonfinite.note_bad(step.iteration, told[step.iteration])
            else:
                self.nonfinite.note_good()
                self._record(step, data_time)
        self.storage.iter = self.iter

    def _is_bad(self, step: StepRecord) -> bool:
        if not math.isfinite(step.total_loss):
            return True
        if math.isfinite(step.metrics[GRAD_NORM]):
            return False
        # Scaled gradients overflow now and then, which lowers the scale; not so below 1.
        return not self.grad_scaler.adapts or self.grad_scaler.current_scale() < 1

    def _record(self, step: StepRecord, data_time: float) -> None:
        if not comm.is_main_process():
            return
        self.storage.iter = step.iteration
        finite = {name: value for name, value in step.metrics.items() if math.isfinite(value)}
        self.storage.put_scalars(data_time=data_time, total_loss=step.total_loss, **finite)
        if self.nonfinite.total:
            self.storage.put_scalar("skipped_steps", self.nonfinite.total, smoothing_hint=False)

    def train(self, start_iter: int, max_iter: int) -> None:
        """Train from ``start_iter`` up to, not including, ``max_iter``.

        Raises:
            NonFiniteError: too many steps in a row were not finite.
            RunError: anything else that went wrong, with the iteration.
        """
        try:
            with name_the_iteration(self, max_iter):
                super().train(start_iter, max_iter)
        finally:
            self.stop_loading()

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["optimizer"] = self.optimizer.state_dict()
        state["grad_scaler"] = self.grad_scaler.state_dict()
        state["nonfinite"] = self.nonfinite.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        chosen = [
            {name: group[name] for name in _IMPLEMENTATION if name in group}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state_dict["optimizer"])
        for group, options in zip(self.optimizer.param_groups, chosen):
            group.update(options)
        self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        if "nonfinite" in state_dict:
            self.nonfinite.load_state_dict(state_dict["nonfinite"])
