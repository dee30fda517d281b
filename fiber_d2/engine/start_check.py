"""Seconds before a training: can it work, and is it the training that was meant?

Data, one forward and backward pass, memory and schedule are looked at in all processes, which
stop together where something is wrong. Nothing that the training does afterwards depends on it:
weights, buffers, gradients and random numbers stay as they are.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.utils import comm
from tabulate import tabulate
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from fiber_d2.data.training_set import TrainingSet
from fiber_d2.evaluation.saved import some_of
from fiber_d2.modeling.metrics import collected_metrics

from .check_data import DataReport, check_part
from .errors import message_of
from .memory import MemoryEstimate, estimate_memory, in_units, measured_activations
from .outlook import describe_rates, describe_schedule
from .randomness import preserved_random_state

logger = logging.getLogger(__name__)

SKIP_HINT = "--skip-start-check trains all the same."
# Of a device's memory; what is left is for fragments and for larger images than the first ones.
_ROOM = 0.95


@dataclass(frozen=True)
class RunPlan:
    """What of a training the check does not find in its trainer and loader.

    Attributes:
        start_iter, max_iter: the first iteration and the one at which training ends.
        schedule: of the learning rate, see :func:`~fiber_d2.engine.outlook.describe_schedule`.
        averaged: whether averaged weights (EMA) are kept.
        bucket_views: of several processes, whether gradients are views of exchanged buckets.
    """

    start_iter: int
    max_iter: int
    schedule: Any
    averaged: bool = False
    bucket_views: bool = True


@dataclass
class Trial:
    """A forward and a backward pass that changed nothing.

    Attributes:
        losses, metrics: their values by name.
        grad_norm: L2 norm of all gradients together.
        without_gradient: names of trainable parameters that no loss depends on.
        activations: bytes that the forward pass kept.
        seconds: of both passes.
        image_size: (height, width) of the padded batch.
    """

    losses: dict[str, float]
    metrics: dict[str, float]
    grad_norm: float = math.nan
    without_gradient: list[str] = field(default_factory=list)
    activations: int | None = None
    seconds: float = 0.0
    image_size: tuple[int, int] = (0, 0)


def start_check(step: Any, loader: Any, plan: RunPlan) -> None:
    """Check a training that is about to begin, and log one table of what it is going to be.

    All processes have to call it, before the workers of the loader are started.

    Args:
        step: a :class:`~fiber_d2.engine.step.StepTrainer`, its weights loaded.
        loader: of the training, see :func:`~fiber_d2.data.build_train_loader`. Of any other loader
            only what it shares with that one is checked.

    Raises:
        ValueError: something that would make the training fail or be in vain; the same message in
            all processes.
    """
    started = time.perf_counter()
    with preserved_random_state():
        reports, batch = _agree(lambda: _check_data(loader))
        trial = None
        if batch:
            trial = _agree(lambda: _try_step(step, batch))
    memory = estimate_memory(
        _bare(step.model),
        step.optimizer,
        averaged=plan.averaged,
        bucket_views=plan.bucket_views,
        activations=None if trial is None else trial.activations,
    )
    warnings = [
        f"{report.name}: {text}"
        for part in zip(*comm.all_gather(reports))
        for report in part
        for text in report.warnings
    ]
    warnings += _more_warnings(trial, memory, loader)
    if not comm.is_main_process():
        return
    for text in dict.fromkeys(warnings):
        logger.warning("Start-up check: %s", text)
    rows = [(f"data {report.name}", report.summary) for report in reports]
    rows += _describe_run(step, loader, plan, len(batch), trial, memory)
    logger.info(
        "Start-up check passed in %.1f seconds\n%s",
        time.perf_counter() - started,
        tabulate(rows, tablefmt="plain", maxcolwidths=[None, 100]),
    )


def _agree(check: Callable[[], Any]) -> Any:
    """The result of ``check``, or the first error of any process as the same one in all."""
    found, failure = None, None
    try:
        found = check()
    except (ValueError, KeyError, OSError) as error:
        failure = error
    message = None if failure is None else message_of(failure)
    for rank, other in enumerate(comm.all_gather(message)):
        if other is not None:
            where = "" if comm.get_world_size() == 1 else f" (process {rank})"
            text = f"The start-up check failed{where}: {other} ({SKIP_HINT})"
            raise ValueError(text) from failure
    return found


def _check_data(loader: Any) -> tuple[list[DataReport], list[Any]]:
    """Reports of the data sets, and this process's first batch, empty where it is not to be had."""
    if not isinstance(loader, DataLoader) or loader.batch_sampler is None:
        return [], []
    # A copy: what it counts (images drawn, images broken) is the training's.
    dataset = copy.copy(loader.dataset)
    reports = []
    if isinstance(dataset, TrainingSet):
        reports = [check_part(part, seed=dataset.seed) for part in dataset.parts]
    # Not through the loader, which would start its workers.
    places = next(iter(loader.batch_sampler), [])
    return reports, loader.collate_fn([dataset[place] for place in places])


def _try_step(step: Any, batch: Sequence[Any]) -> Trial:
    """Losses and gradients of a batch. The gradients go nowhere: not to ``grad``, not to others.

    Raises:
        ValueError: what makes training pointless, or impossible in the memory of the GPU.
    """
    model = _bare(step.model)
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    started = time.perf_counter()
    try:
        with collected_metrics() as metrics, measured_activations(model) as activations:
            with torch.autocast(
                step.device_type, dtype=step.amp_dtype, enabled=step.amp_dtype is not None
            ):
                losses = model(batch)
        total = sum(losses.values())
        gradients: Sequence[Any] = [None] * len(trainable)
        if total.requires_grad:
            gradients = torch.autograd.grad(total, list(trainable.values()), allow_unused=True)
    except torch.cuda.OutOfMemoryError as error:
        height, width = _padded_size(batch)
        raise ValueError(
            f"a batch of {len(batch)} images, padded to {height} x {width}, does not fit the "
            "memory of the GPU. Lower the batch size (and raise train.accumulate), train in mixed "
            "precision (train.amp.enabled), or recompute activations "
            f"(model.backbone.vision.checkpoint and its like). {error}"
        ) from error
    trial = Trial(_values(losses), _values(metrics), image_size=_padded_size(batch))
    trial.activations = activations.num_bytes
    known = {name: g for name, g in zip(trainable, gradients) if g is not None}
    trial.without_gradient = [name for name in trainable if name not in known]
    problems = _problems(trial, known, batch)
    if known:
        norms = torch.stack([g.float().norm() for g in known.values()])
        trial.grad_norm = float(norms.norm())
    trial.seconds = time.perf_counter() - started
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    if step.device_type == "cuda":
        del gradients, known, losses, total
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if problems:
        raise ValueError(" ".join(problems))
    return trial


def _values(scalars: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in scalars.items()}


def _problems(trial: Trial, gradients: dict[str, torch.Tensor], batch: Sequence[Any]) -> list[str]:
    files = some_of([item.get("file_name", item.get("image_id")) for item in batch])
    wrong = [name for name, value in trial.losses.items() if not math.isfinite(value)]
    if wrong:
        shown = ", ".join(f"{name} = {trial.losses[name]:g}" for name in wrong)
        return [
            f"the first batch has a loss that is not finite: {shown}. Its images: {files}. Check "
            "the weights to start from, and train in float32 or bfloat16."
        ]
    if not gradients:
        return ["no loss depends on a trainable parameter: there is nothing to learn."]
    finite = torch.stack([torch.isfinite(g).all() for g in gradients.values()]).tolist()
    broken = [name for name, ok in zip(gradients, finite) if not ok]
    if broken:
        return [
            f"the first batch has gradients that are not finite, of {some_of(broken)}. Its images: "
            f"{files}. Check the weights to start from, and train in float32 or bfloat16."
        ]
    return []


def _more_warnings(trial: Trial | None, memory: MemoryEstimate, loader: Any) -> list[str]:
    found = []
    if trial is None:
        found.append(
            f"no step was tried, since a {type(loader).__name__} cannot be looked into without "
            "disturbing it"
        )
    elif trial.without_gradient:
        found.append(
            f"{len(trial.without_gradient)} trainable parameters get no gradient: "
            f"{some_of(trial.without_gradient)}. Freeze them (requires_grad=False)"
            + (
                ", or training in several processes will stop at them"
                if comm.get_world_size() > 1
                else " if that is meant"
            )
        )
    if memory.available is not None and memory.total > _ROOM * memory.available:
        found.append(
            f"training needs about {in_units(memory.total)}, but there are "
            f"{in_units(memory.available)} for this process: lower the batch size (and raise "
            "train.accumulate), or recompute activations"
        )
    return found


def _describe_run(
    step: Any,
    loader: Any,
    plan: RunPlan,
    per_process: int,
    trial: Trial | None,
    memory: MemoryEstimate,
) -> list[tuple[str, str]]:
    world = comm.get_world_size()
    rows = []
    if per_process:
        per_step = per_process * world * step.accumulate
        rows.append(
            (
                "images per step",
                f"{per_process} per process x {world} processes x {step.accumulate} accumulated "
                f"= {per_step}",
            )
        )
        rows.append(("length", _describe_length(loader, plan, per_step)))
    rows.append(
        (
            "learning rate",
            f"{describe_rates(_bare(step.model), step.optimizer)}; "
            f"{describe_schedule(plan.schedule, plan.max_iter)}",
        )
    )
    if trial is not None:
        numbers = {"loss": sum(trial.losses.values()), **trial.losses, **trial.metrics}
        numbers["gradient norm"] = trial.grad_norm
        shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        rows.append(("one step tried", f"{shown}; {trial.seconds:.1f} s"))
    rows.append(("memory", _describe_memory(memory, trial, per_process)))
    return rows


def _describe_length(loader: Any, plan: RunPlan, per_step: int) -> str:
    text = f"{plan.max_iter} iterations = {plan.max_iter * per_step} images"
    stream = getattr(loader.batch_sampler, "stream", None)
    if stream is not None:
        epochs = stream.passes_after(plan.max_iter * per_step)
        names = [""] if len(epochs) == 1 else [f" of {part.name}" for part in loader.dataset.parts]
        text += " = " + ", ".join(f"{n:.4g} epochs{name}" for n, name in zip(epochs, names))
    return text + (f", from iteration {plan.start_iter} on" if plan.start_iter else "")


def _describe_memory(memory: MemoryEstimate, trial: Trial | None, per_process: int) -> str:
    parts = {
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "averaged weights": memory.averaged,
    }
    if trial is not None:
        height, width = trial.image_size
        parts[f"activations of {per_process} x {height} x {width} pixels"] = memory.activations
    shown = " + ".join(f"{name} {in_units(value)}" for name, value in parts.items() if value != 0)
    of = "" if memory.available is None else f" of {in_units(memory.available)}"
    return f"{shown} = about {in_units(memory.total)}{of} per process"


def _padded_size(batch: Sequence[Any]) -> tuple[int, int]:
    sizes = [tuple(item["image"].shape[-2:]) for item in batch if "image" in item]
    return tuple(map(max, zip(*sizes))) if sizes else (0, 0)


def _bare(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model
