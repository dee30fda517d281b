import logging
import re

import detectron2.data.transforms as T
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.data import MetadataCatalog
from omegaconf import OmegaConf
from torch import nn

from fiber_d2.data import build_test_loader
from fiber_d2.engine.protocol import (
    describe_evaluation,
    describe_limits,
    describe_node,
    fingerprint_of,
    log_protocol,
    weights_digest,
)
from fiber_d2.modeling.postprocess import PostProcessor
from fiber_d2.structures import Prompt


class Scorer:
    """Share of what is right.

    Of all things.
    """

    def __init__(self):
        self._topk = (1, 5)
        self._distributed = True


def prompt(tokens):
    return Prompt(
        text=f"{tokens} tokens",
        input_ids=torch.arange(tokens),
        attention_mask=torch.ones(tokens, dtype=torch.bool),
        positive_map=torch.ones(1, tokens) / tokens,
        target_ids=torch.zeros(1, dtype=torch.int64),
    )


def node(**options):
    config = OmegaConf.create({"side": 64}, flags={"allow_objects": True})
    resize = L(T.Resize)(shape=(64, "${side}"))
    config.test = L(build_test_loader)(
        dataset="shapes_detection_val", augmentations=[resize], tokenizer="shapes", **options
    )
    return config.test


def protocol(**changes):
    values = dict(
        dataset="a_protocol",
        evaluator=Scorer(),
        model=PostProcessor(score_thresh=0.25, max_merged_detections=300),
        loader_settings=describe_node(node()),
        prompts=[prompt(5), prompt(9)],
        num_images=7,
        checkpoint="a.pth",
        weights="EMA",
        notes={"more": 1},
    )
    return describe_evaluation(**{**values, **changes})


def test_it_holds_what_a_number_depends_on(caplog):
    found = protocol()
    assert found["captions_of_first_image"] == 2
    assert found["caption_of_first_image"] == "5 tokens | 9 tokens"
    assert found["tokens_of_captions"] == [5, 9]
    assert found["metric"] == "Share of what is right."
    assert found["settings"] == {"topk": [1, 5]}
    settings = found["prompts_and_images"]
    # Said in the configuration, and left at its default.
    assert settings["tokenizer"] == "shapes" and settings["separator"] == ". "
    assert settings["augmentations"] == ["Resize(shape=(64, 64))"]
    assert "num_workers" not in settings
    assert found["limits"]["score_thresh"] == 0.25
    assert found["precision"] == "float32"
    assert found["limits"]["scope"] == "per image: 300"
    assert found["more"] == 1 and found["weights"] == "EMA"
    with caplog.at_level(logging.INFO, logger="fiber_d2"):
        log_protocol(found)
    assert "2, at most 9 tokens in the first image" in caplog.text
    assert "EMA of a.pth" in caplog.text
    assert re.search("precision +float32", caplog.text)


def test_prompts_that_a_data_set_brings_along_are_told():
    MetadataCatalog.get("a_protocol").prompts = "a photo of a {}"
    try:
        assert protocol()["prompts_and_images"]["templates"] == "a photo of a {}"
        own = describe_node(node(templates="one {}"))
        assert protocol(loader_settings=own)["prompts_and_images"]["templates"] == "one {}"
        without = describe_node(node(dataset_prompts=False))
        assert protocol(loader_settings=without)["prompts_and_images"]["templates"] is None
    finally:
        MetadataCatalog.remove("a_protocol")


def test_the_precision_of_a_model_is_told_however_it_is_wrapped():
    model = nn.Linear(1, 1)
    model.inference_precision = "bfloat16"
    assert protocol(model=nn.Sequential(model))["precision"] == "bfloat16"
    model.inference_precision = None
    assert protocol(model=nn.Sequential(model))["precision"] == "float32"


def test_models_without_limits():
    assert describe_limits(nn.Linear(1, 1)) == {}
    assert describe_limits(lambda batch: []) == {}
    assert describe_limits(PostProcessor())["scope"] == "per caption"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_told_apart_by_their_values(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).to(dtype)
    before = weights_digest(model)
    assert weights_digest(model) == before
    with torch.no_grad():
        model[0].weight[1, 1] += 0.5
    assert weights_digest(model) != before


def test_fingerprints_are_of_predictions_not_of_scores():
    evaluator = Scorer()
    evaluator._topk = (3,)
    before = fingerprint_of(protocol(), "d")
    assert fingerprint_of(protocol(evaluator=evaluator), "d") == before
    batches = describe_node(node(batch_size=7))
    assert fingerprint_of(protocol(loader_settings=batches), "d") == before
    assert protocol(loader_settings=batches)["prompts_and_images"]["batch_size"] == 7
    other = describe_node(node(separator=", "))
    assert fingerprint_of(protocol(loader_settings=other), "d") != before
    assert fingerprint_of(protocol(), "e") != before
    assert fingerprint_of(protocol(prompts=[prompt(5), prompt(8)]), "d") != before
    assert fingerprint_of(protocol(model=PostProcessor()), "d") != before
