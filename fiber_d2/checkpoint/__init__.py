"""Weights of others: the original's checkpoints in both directions, starts for the towers."""

from .convert import (
    convert_fiber_state_dict,
    export_fiber_state_dict,
    is_fiber_state_dict,
    load_fiber_checkpoint,
    read_fiber_checkpoint,
)
from .initialize import (
    Initialized,
    initialize_from_fiber,
    initialize_from_roberta,
    initialize_from_swin,
    interpolate_position_bias,
)

__all__ = [
    "Initialized",
    "convert_fiber_state_dict",
    "export_fiber_state_dict",
    "initialize_from_fiber",
    "initialize_from_roberta",
    "initialize_from_swin",
    "interpolate_position_bias",
    "is_fiber_state_dict",
    "load_fiber_checkpoint",
    "read_fiber_checkpoint",
]
