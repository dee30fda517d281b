"""Ways to fine-tune: which parts of the model learn, and which stay as they are.

The data and evaluation specification, section 6.15.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from detectron2.config import CfgNode
from omegaconf import DictConfig, OmegaConf
from torch import nn

from fiber_d2.modeling import FIBER
from fiber_d2.modeling.roberta import PROMPT

from .overrides import takes_argument

logger = logging.getLogger(__name__)

# Rows of the learnt addition to the text, as many as the original's.
PROMPT_LENGTH = 1000

_VISION, _TEXT, _NECK, _HEAD = "backbone.swin", "backbone.text", "backbone.neck", "head"
_PROMPT = f"{_TEXT}.{PROMPT}"
_LAST_LAYERS = (
    "head.bbox_pred",
    "head.centerness",
    "head.text_projection",
    "head.log_scale",
    "head.text_bias",
    "head.prior_bias",
)
# What trains, by the beginnings of names; the rest stays as it was loaded. Each tower includes its
# side of the exchange. The versions of prompt tuning are the original's: v1 and v3 came to be the
# same, as did v2 and v4.
TUNING: dict[str, tuple[str, ...]] = {
    # Except for what `frozen_stages` of the image tower says.
    "full": (_VISION, _NECK, _TEXT, _HEAD),
    "freeze_text": (_VISION, _NECK, _HEAD),
    "linear_probe": _LAST_LAYERS,
    "language_prompt_v1": (_TEXT,),
    "language_prompt_v2": (_PROMPT,),
    "language_prompt_v3": (_TEXT,),
    "language_prompt_v4": (_PROMPT,),
}


def parts_that_train(mode: str) -> tuple[str, ...]:
    """Beginnings of the names of what the mode trains.

    Raises:
        ValueError: there is no such mode.
    """
    if mode not in TUNING:
        raise ValueError(
            f"train.tuning={mode} is not known; it may be {', '.join(TUNING)}, or null to train "
            "what the model's own settings do."
        )
    return TUNING[mode]


def needs_prompt(mode: str | None) -> bool:
    """Whether the mode trains an addition to the text that other models do not have."""
    return mode is not None and _PROMPT in parts_that_train(mode)


def configure_tuning(cfg: DictConfig | CfgNode) -> None:
    """Give the model of a configuration, in place, what its tuning mode trains.

    Args:
        cfg: a LazyConfig with ``train.tuning``, or a CfgNode with ``FIBER.TRAIN.TUNING``.

    Raises:
        ValueError: there is no such mode, or its model node is not FIBER's.
    """
    if isinstance(cfg, CfgNode):
        text = cfg.MODEL.FIBER.TEXT
        if needs_prompt(cfg.FIBER.TRAIN.TUNING or None) and not text.PROMPT_LENGTH:
            frozen = cfg.is_frozen()
            cfg.defrost()
            text.PROMPT_LENGTH = PROMPT_LENGTH
            if frozen:
                cfg.freeze()
            logger.info("MODEL.FIBER.TEXT.PROMPT_LENGTH=%d", PROMPT_LENGTH)
        return
    mode = cfg.train.get("tuning")
    if not needs_prompt(mode):
        return
    text = OmegaConf.select(cfg, "model.backbone.text")
    plain = OmegaConf.to_container(text, resolve=False) if OmegaConf.is_dict(text) else {}
    if not takes_argument(plain, "prompt_length"):
        raise ValueError(
            f"train.tuning={mode} trains an addition to the text, but model.backbone.text has no "
            "argument prompt_length: use fiber_d2.modeling.RobertaEncoder."
        )
    if not text.get("prompt_length"):
        text.prompt_length = PROMPT_LENGTH
        logger.info("train.tuning=%s: model.backbone.text.prompt_length=%d", mode, PROMPT_LENGTH)


def apply_tuning(model: nn.Module, mode: str | None) -> None:
    """Let only those parameters learn that the mode trains; to be called before the optimiser.

    What is frozen already (``frozen_stages`` of the image tower) stays frozen. Modules without any
    parameter that learns are kept in evaluation mode: no dropout, no drop path, no DropBlock.

    Args:
        model: a :class:`~fiber_d2.modeling.FIBER`.
        mode: one of :data:`TUNING`; None changes nothing.

    Raises:
        ValueError: there is no such mode, or the model lacks a part that it trains.
    """
    if mode is None:
        return
    trained = parts_that_train(mode)
    if not isinstance(model, FIBER):
        raise ValueError(
            f"train.tuning={mode} names parts of FIBER; a {type(model).__name__} has others: set "
            "requires_grad yourself and leave train.tuning out."
        )
    parameters = dict(model.named_parameters())
    for part in trained:
        if not any(_is_below(name, (part,)) for name in parameters):
            hint = (
                f": set model.backbone.text.prompt_length={PROMPT_LENGTH}"
                if part == _PROMPT
                else ""
            )
            raise ValueError(f"train.tuning={mode} trains {part}, which the model lacks{hint}.")
    for name, parameter in parameters.items():
        if not _is_below(name, trained):
            parameter.requires_grad_(False)
    model.keep_in_evaluation_mode(_frozen_modules(model))
    learning = [p.numel() for p in parameters.values() if p.requires_grad]
    logger.info(
        "train.tuning=%s: %.3f of %.2f M parameters learn (%s)",
        mode,
        sum(learning) / 1e6,
        sum(p.numel() for p in parameters.values()) / 1e6,
        ", ".join(trained),
    )


def _is_below(name: str, parts: Sequence[str]) -> bool:
    return any(name == part or name.startswith(part + ".") for part in parts)


def _frozen_modules(model: nn.Module, prefix: str = "") -> list[str]:
    """Names of the outermost modules none of whose parameters learns."""
    found = []
    for name, child in model.named_children():
        learns = [p.requires_grad for p in child.parameters()]
        if learns and not any(learns):
            found.append(prefix + name)
        else:
            found += _frozen_modules(child, f"{prefix}{name}.")
    return found
