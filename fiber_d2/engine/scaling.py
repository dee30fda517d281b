"""Lengths and learning rates for other numbers of images than a recipe was written for.

A recipe notes its number of images per step, ``train.scaling.reference_batch_size``. Another one
makes another optimisation: nothing is changed on its own, a warning says so, and
``train.scaling.rule`` (for a CfgNode ``FIBER.TRAIN.SCALING.RULE``) adapts the rest.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from detectron2.config import CfgNode, instantiate
from omegaconf import DictConfig, OmegaConf

logger = logging.getLogger(__name__)

# Of a training whose length is given in epochs, so that an interruption costs a twentieth of it:
# epochs of small data can be shorter than the time that it takes to write a checkpoint.
_MAX_CHECKPOINTS = 20
# Factor of the learning rates by the factor of the batch.
RULES = {
    # For SGD (arXiv:1706.02677), and what most fine-tunings with AdamW do.
    "linear": lambda factor: factor,
    # For optimisers that divide by the gradient's size (arXiv:2205.10287).
    "sqrt": math.sqrt,
}
_RATES = ("optimizer.lr", "optimizer.params.base_lr")
# Those that train.epochs replaces.
_RUN_LENGTHS = ("train.max_iter", "train.eval_period", "train.checkpointer.period")
_LENGTHS = (
    "lr_multiplier.max_iter",
    "lr_multiplier.warmup_iters",
    "lr_multiplier.milestones",
    "train.weight_decay_schedule.milestones",
)
_SOLVER_RATES = ("SOLVER.BASE_LR",)
_SOLVER_LENGTHS = (
    "SOLVER.MAX_ITER",
    "SOLVER.WARMUP_ITERS",
    "SOLVER.STEPS",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.EVAL_PERIOD",
)


def iterations(*, epochs: float, num_images: int, batch_size: int) -> int:
    """Steps of ``batch_size`` images that show ``num_images`` images ``epochs`` times, at least 1.

    What is left of the last batch is not counted, as in the original (section 5.12 of the data and
    evaluation specification).

    Raises:
        ValueError: one of the numbers is not positive.
    """
    if epochs <= 0 or num_images <= 0 or batch_size <= 0:
        raise ValueError(
            f"{epochs} epochs of {num_images} images in batches of {batch_size} are no training."
        )
    return max(1, math.floor(epochs * num_images / batch_size))


def checkpoint_period(max_iter: int, eval_period: int) -> int:
    """The shortest multiple of ``eval_period`` that makes at most twenty checkpoints."""
    return eval_period * math.ceil(max_iter / (eval_period * _MAX_CHECKPOINTS))


def images_per_step(cfg: DictConfig | CfgNode) -> int:
    """Images that an optimiser step sees over all processes."""
    if isinstance(cfg, CfgNode):
        return cfg.SOLVER.IMS_PER_BATCH * cfg.FIBER.TRAIN.ACCUMULATE
    return cfg.dataloader.train.total_batch_size * cfg.train.get("accumulate", 1)


def scale_to_batch_size(cfg: DictConfig | CfgNode) -> dict[str, tuple[Any, Any]]:
    """Adapt a configuration, in place, to its number of images per step.

    With a rule, rates are multiplied by what it makes of ``f``, the factor between the images per
    step and the recipe's, and lengths counted in steps are divided by ``f``: training sees as many
    images as before. The text tower's rate follows, being a factor of the other. What is counted
    in images, in epochs or as a share of the training stays, as do the averaging of weights
    (``train.ema.decay``) and weight decay. The new numbers are logged; the configuration then
    notes its own batch size and no rule, so that it may be used again as it is.

    Without a rule nothing changes, and a warning tells of a batch size that is not the recipe's.

    Returns:
        Key to old and new value of all that changed.

    Raises:
        ValueError: an unknown rule, or a rule without a reference.
    """
    lazy = not isinstance(cfg, CfgNode)
    if lazy:
        node = cfg.train.get("scaling") or {}
        reference, rule = node.get("reference_batch_size"), node.get("rule")
        key, rule_key = "train.scaling", "train.scaling.rule"
    else:
        node = cfg.FIBER.TRAIN.SCALING
        reference, rule = node.REFERENCE_BATCH_SIZE or None, node.RULE or None
        key, rule_key = "FIBER.TRAIN.SCALING", "FIBER.TRAIN.SCALING.RULE"
    if rule is not None and rule not in RULES:
        raise ValueError(f"{key}: the rule {rule!r} is not known; it may be {', '.join(RULES)}.")
    if reference is None:
        if rule is not None:
            raise ValueError(
                f"{key} has the rule {rule}, but the recipe does not say which batch size its "
                "rates are for: give the reference_batch_size, too."
            )
        return {}
    size = images_per_step(cfg)
    if size == reference:
        return {}
    if rule is None:
        logger.warning(
            "An optimiser step sees %d images, but the learning rate and the lengths of this "
            "recipe are those of %d. They are used as they are; %s=%s would adapt them.",
            size,
            reference,
            rule_key,
            " or ".join(RULES),
        )
        return {}
    factor = size / reference
    if lazy:
        changes = _scale_lazy(cfg, RULES[rule](factor), 1 / factor)
        cfg.train.scaling.update(reference_batch_size=size, rule=None)
    else:
        changes = _scale_cfg_node(cfg, RULES[rule](factor), 1 / factor, size)
    logger.info(
        "%d images per step instead of %d, rule %s: %s",
        size,
        reference,
        rule,
        ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changes.items()),
    )
    return changes


def _scale_lazy(cfg: DictConfig, rates: float, lengths: float) -> dict[str, tuple[Any, Any]]:
    changes: dict[str, tuple[Any, Any]] = {}
    run_lengths = _RUN_LENGTHS if cfg.train.get("epochs") is None else ()
    for keys, factor, whole in (
        (_RATES, rates, False),
        (run_lengths + _LENGTHS, lengths, True),
    ):
        for key in keys:
            parent_key, name = key.rsplit(".", 1)
            parent = OmegaConf.select(cfg, parent_key)
            # Interpolations follow what they point at.
            if not OmegaConf.is_dict(parent) or OmegaConf.is_interpolation(parent, name):
                continue
            old = parent.get(name)
            new = _scaled_lengths(old, factor) if whole else old and old * factor
            if new != old:
                parent[name] = new
                changes[key] = (old, new)
    train = cfg.dataloader.train
    weights = train.get("weights")
    if OmegaConf.is_dict(weights):
        # They change after a number of batches, which accumulation makes smaller than a step.
        per_batch = cfg.train.scaling.reference_batch_size / train.total_batch_size
        train.weights = {round(step * per_batch): shares for step, shares in weights.items()}
        changes["dataloader.train.weights"] = (list(weights), list(train.weights))
    return changes


def _scale_cfg_node(
    cfg: CfgNode, rates: float, lengths: float, size: int
) -> dict[str, tuple[Any, Any]]:
    frozen = cfg.is_frozen()
    cfg.defrost()
    changes: dict[str, tuple[Any, Any]] = {}
    for keys, factor, whole in ((_SOLVER_RATES, rates, False), (_SOLVER_LENGTHS, lengths, True)):
        for key in keys:
            section, name = key.split(".")
            old = cfg[section][name]
            new = _scaled_lengths(old, factor) if whole else old * factor
            if new != old:
                cfg[section][name] = tuple(new) if isinstance(new, list) else new
                changes[key] = (old, new)
    cfg.FIBER.TRAIN.SCALING.REFERENCE_BATCH_SIZE, cfg.FIBER.TRAIN.SCALING.RULE = size, ""
    if frozen:
        cfg.freeze()
    return changes


def _scaled_lengths(value: Any, factor: float) -> Any:
    """Iterations times ``factor``, at least 1; shares of the training (below 1) stay."""
    if isinstance(value, (int, float)):
        return max(1, round(value * factor)) if value >= 1 else value
    if value is None or isinstance(value, str):
        return value
    return [_scaled_lengths(item, factor) for item in value]


def lengths_from_epochs(cfg: DictConfig) -> None:
    """Set ``train.max_iter``, and the periods, in place, where the length is given in epochs.

    An epoch is a pass of the training loader: the usable images of its data sets, few-shot
    choices and repeats included, as counted in the files at hand. ``train.eval_epochs`` says how
    many of them lie between two evaluations; checkpoints to go on from are written at every so
    many of these that there are at most twenty in all.

    Raises:
        ValueError: ``train.eval_epochs`` without ``train.epochs``, or a loader without passes.
    """
    train = cfg.train
    epochs, eval_epochs = train.get("epochs"), train.get("eval_epochs")
    if epochs is None:
        if eval_epochs is not None:
            raise ValueError("train.eval_epochs needs train.epochs, the length of the training.")
        return
    loader = instantiate(cfg.dataloader.train)
    stream = getattr(getattr(loader, "batch_sampler", None), "stream", None)
    if stream is None or len(stream.images_per_pass) != 1:
        raise ValueError(
            "train.epochs needs a loader that goes through its images in passes, which one with "
            "weights does not: give train.max_iter instead, and leave train.epochs out."
        )
    images, size = stream.images_per_pass[0], images_per_step(cfg)
    train.max_iter = iterations(epochs=epochs, num_images=images, batch_size=size)
    if eval_epochs is not None:
        period = iterations(epochs=eval_epochs, num_images=images, batch_size=size)
        train.eval_period = period
        train.checkpointer.period = checkpoint_period(train.max_iter, period)
    logger.info(
        "%g epochs of %g images, %d per step: %d iterations, evaluation after every %d",
        epochs,
        images,
        size,
        train.max_iter,
        train.eval_period or train.max_iter,
    )
