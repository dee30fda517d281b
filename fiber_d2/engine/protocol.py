"""The protocol of an evaluation: everything a number depends on, in one place."""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate
from torch import nn

from fiber_d2.evaluation.settings import describe_evaluator, library_versions, plain_attributes
from fiber_d2.modeling.postprocess import PostProcessor
from fiber_d2.structures import Prompt
from fiber_d2.text.prompts import shorten

logger = logging.getLogger(__name__)

# Of a loader's arguments, what changes no prediction.
_IRRELEVANT = ("_target_", "dataset", "num_workers", "augmentations")


def describe_prompts(prompts: Prompt | Sequence[Prompt]) -> dict[str, Any]:
    """What an image was asked: the captions, how many there are, and their tokens."""
    prompts = [prompts] if isinstance(prompts, Prompt) else list(prompts)
    return {
        "caption_of_first_image": " | ".join(prompt.text for prompt in prompts),
        "captions_of_first_image": len(prompts),
        "tokens_of_captions": [prompt.num_tokens for prompt in prompts],
    }


def describe_node(node: DictConfig) -> dict[str, Any]:
    """How a node of ``dataloader.test`` words its prompts and scales its images.

    Arguments that the node leaves at their defaults are told as well.
    """
    target = node.get("_target_")
    target = locate(target) if isinstance(target, str) else target
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        parameters = ()
    found = {p.name: p.default for p in parameters if p.default is not p.empty}
    # Nodes within nodes are left out: only this one is known to be plain.
    found.update({key: _plain(node[key]) for key in node})
    found = {key: value for key, value in found.items() if key not in _IRRELEVANT}
    if "augmentations" in node:
        found["augmentations"] = [str(instantiate(step)) for step in node.augmentations]
    return found


def describe_limits(model: Any) -> dict[str, Any]:
    """Thresholds and limits of a model's detections; empty where it has no PostProcessor."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    processor = next((m for m in modules if isinstance(m, PostProcessor)), None)
    if processor is None:
        return {}
    limits = plain_attributes(processor)
    limits.pop("training", None)
    merged = processor.max_merged_detections
    limits["scope"] = f"per image: {merged}" if merged else "per caption"
    return limits


def describe_precision(model: Any) -> str:
    """The number format of a model's detections."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    names = (getattr(module, "inference_precision", None) for module in modules)
    return next((name for name in names if name), "float32")


def describe_evaluation(
    *,
    dataset: str,
    evaluator: DatasetEvaluator,
    model: Any,
    loader_settings: Mapping[str, Any],
    prompts: Prompt | Sequence[Prompt] | None,
    num_images: int | None,
    checkpoint: str,
    weights: str,
    notes: Mapping[str, Any],
) -> dict[str, Any]:
    """The protocol, as JSON values.

    Args:
        loader_settings: of :func:`describe_node`.
        prompts: of the first image.
        checkpoint: where the weights are from.
        weights: their kind, such as "model" or "EMA".
        notes: further entries.
    """
    settings = dict(loader_settings)
    if "dataset_prompts" in settings and settings.get("templates") is None:
        used = MetadataCatalog.get(dataset).get("prompts") if settings["dataset_prompts"] else None
        settings["templates"] = used
    return {
        "dataset": dataset,
        "num_images": num_images,
        **describe_evaluator(evaluator),
        **(describe_prompts(prompts) if prompts is not None else {}),
        "prompts_and_images": settings,
        "limits": describe_limits(model),
        "precision": describe_precision(model),
        "checkpoint": checkpoint,
        "weights": weights,
        **notes,
        "versions": library_versions(),
    }


def fingerprint_of(protocol: Mapping[str, Any], digest: str) -> dict[str, Any]:
    """What the predictions, and not only their scores, depend on.

    Weights count by their content too, so that a file that was overwritten is noticed. How
    predictions are scored does not matter, nor how many images share a batch: what ran out of
    memory may go on with smaller ones.

    Args:
        digest: of :func:`weights_digest`.
    """
    left_out = ("versions", "metric", "evaluator", "settings")
    found = {key: value for key, value in protocol.items() if key not in left_out}
    settings = dict(found["prompts_and_images"])
    settings.pop("batch_size", None)
    found["prompts_and_images"] = settings
    found["weights"] = f"{protocol['weights']}, {digest}"
    found["annotations"] = _file_state(MetadataCatalog.get(protocol["dataset"]).get("json_file"))
    return found


def weights_digest(model: Any) -> str:
    """A digest of the names and values of all parameters and buffers."""
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(model, nn.Module):
        for name, tensor in model.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().contiguous().flatten().cpu()
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def log_protocol(protocol: Mapping[str, Any]) -> None:
    """A few lines that one can read."""
    settings, limits = protocol["prompts_and_images"], protocol["limits"]
    rows = [
        ("metric", protocol["metric"]),
        ("scored by", _listed(protocol["settings"])),
        ("images", protocol["num_images"]),
        ("captions per image", _captions(protocol)),
        ("prompts and images", _listed(settings)),
        ("limits", _listed(limits)),
        ("precision", protocol["precision"]),
        ("weights", f"{protocol['weights']} of {protocol['checkpoint'] or 'a random start'}"),
    ]
    table = tabulate([row for row in rows if row[1]], tablefmt="plain", disable_numparse=True)
    logger.info("Protocol of %s\n%s", protocol["dataset"], table)


def _captions(protocol: Mapping[str, Any]) -> str:
    if "captions_of_first_image" not in protocol:
        return ""
    tokens = protocol["tokens_of_captions"]
    text = protocol["caption_of_first_image"]
    return (
        f"{protocol['captions_of_first_image']}, at most {max(tokens)} tokens in the first image: "
        f"{shorten(repr(text))}"
    )


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {shorten(repr(value))}" for key, value in values.items())


def _plain(value: Any) -> Any:
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _file_state(path: Any) -> dict[str, Any] | None:
    """Size and time of a file, None where there is none."""
    if not isinstance(path, (str, os.PathLike)) or not os.path.isfile(path):
        return None
    state = os.stat(path)
    return {"size": state.st_size, "mtime_ns": state.st_mtime_ns}
