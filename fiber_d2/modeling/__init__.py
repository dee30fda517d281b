"""The model; importing this package fills Detectron2's registries."""

from .assigner import ATSSAssigner
from .boxes import AnchorGrid
from .dyhead import DynamicHead
from .fiber import FIBER
from .fpn import FeaturePyramid
from .fusion import FusionBackbone, build_fiber_fusion_backbone
from .language_head import ATSSLanguageHead
from .losses import GroundingLoss
from .merging import in_size_range, merge_detections
from .postprocess import PostProcessor
from .roberta import RobertaEncoder
from .swin import SwinTransformer
from .test_time_augmentation import FiberWithTTA

__all__ = [
    "ATSSAssigner",
    "ATSSLanguageHead",
    "AnchorGrid",
    "DynamicHead",
    "FIBER",
    "FeaturePyramid",
    "FiberWithTTA",
    "FusionBackbone",
    "GroundingLoss",
    "PostProcessor",
    "RobertaEncoder",
    "SwinTransformer",
    "build_fiber_fusion_backbone",
    "in_size_range",
    "merge_detections",
]
