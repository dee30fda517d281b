"""Images with prompts: readers, built-in data sets, mappers and loaders."""

from .build import build_test_loader, build_train_loader
from .builtin import register_all_builtin, register_coco_json
from .captions import DetectionPrompter, SampledDetectionPrompter
from .mapper import FiberDatasetMapper, GroundingPrompter
from .readers import load_detection_json, load_grounding_json, load_lvis_json
from .transforms import ResizeShortestEdgeTruncated, swap_left_right_words

__all__ = [
    "DetectionPrompter",
    "FiberDatasetMapper",
    "GroundingPrompter",
    "ResizeShortestEdgeTruncated",
    "SampledDetectionPrompter",
    "build_test_loader",
    "build_train_loader",
    "load_detection_json",
    "load_grounding_json",
    "load_lvis_json",
    "register_all_builtin",
    "register_coco_json",
    "swap_left_right_words",
]

register_all_builtin()
