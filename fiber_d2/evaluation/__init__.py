"""Scores of what the model predicted, one evaluator per kind of data set."""

from fiber_d2.evaluation.build import build_evaluator
from fiber_d2.evaluation.chance import chance_level
from fiber_d2.evaluation.coco import GroundedCOCOEvaluator
from fiber_d2.evaluation.description import DescriptionEvaluator
from fiber_d2.evaluation.flickr import FlickrRecallEvaluator, phrase_recall
from fiber_d2.evaluation.generalized_refexp import GeneralizedRefExpEvaluator
from fiber_d2.evaluation.lvis_fixed_ap import LVISFixedAPEvaluator, score_lvis
from fiber_d2.evaluation.refexp import RefExpEvaluator, expression_precision

__all__ = [
    "DescriptionEvaluator",
    "FlickrRecallEvaluator",
    "GeneralizedRefExpEvaluator",
    "GroundedCOCOEvaluator",
    "LVISFixedAPEvaluator",
    "RefExpEvaluator",
    "build_evaluator",
    "chance_level",
    "expression_precision",
    "phrase_recall",
    "score_lvis",
]
