"""Operators the model is made of; every one has a pure PyTorch path."""

from .deform_conv import flat_offset_view, modulated_deform_conv2d, resampled_offset_view
from .drop_block import DropBlock2d
from .dyrelu import DyReLU, hard_sigmoid
from .focal_loss import assigned_token_focal_loss, token_sigmoid_focal_loss
from .layer_norm import LayerNorm
from .linear import Linear, linear
from .nms import class_aware_nms
from .recompute import call_block

__all__ = [
    "DropBlock2d",
    "DyReLU",
    "LayerNorm",
    "Linear",
    "assigned_token_focal_loss",
    "call_block",
    "class_aware_nms",
    "flat_offset_view",
    "hard_sigmoid",
    "linear",
    "modulated_deform_conv2d",
    "resampled_offset_view",
    "token_sigmoid_focal_loss",
]
