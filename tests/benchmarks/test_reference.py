"""The plain model agrees with the product, so that their times can be compared."""

from __future__ import annotations

import pytest
import torch
from detectron2.structures import Boxes, Instances

from fiber_d2.structures import Prompt

TOLERANCE = 1e-4  # of the largest number, as the benchmarks demand before they time anything


def make_prompt(num_tokens, targets, seed=0, first_id=0):
    """Target k owns tokens 1 + 2k and 2 + 2k; the last target none."""
    generator = torch.Generator().manual_seed(seed)
    positive_map = torch.zeros(targets, num_tokens)
    for target in range(targets - 1):
        positive_map[target, 1 + 2 * target : 3 + 2 * target] = 0.5
    return Prompt(
        "words",
        torch.randint(5, 50, (num_tokens,), generator=generator),
        torch.ones(num_tokens, dtype=torch.bool),
        positive_map,
        torch.arange(targets) + first_id,
    )


def make_image(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def make_batch():
    batch = []
    for seed, (size, num_tokens) in enumerate((((64, 90), 20), ((70, 64), 32))):
        prompt = make_prompt(num_tokens, 4, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        low = torch.rand(5, 2, generator=generator) * 30
        instances = Instances(size)
        sides = 10 + 20 * torch.rand(5, 2, generator=generator)
        instances.gt_boxes = Boxes(torch.cat([low, low + sides], dim=1))
        instances.gt_positive_map = prompt.positive_map[torch.arange(5) % 3] > 0
        batch.append({"image": make_image(*size, seed), "prompt": prompt, "instances": instances})
    return batch


def assert_agree(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.fixture
def pair(load, build, request):
    """A product of either version and the plain model of the same weights."""
    model = build(query_norm=getattr(request, "param", False)).eval()
    return model, load("reference").ReferenceFIBER(model, text_length=32)


@pytest.mark.parametrize("pair", [False, True], indirect=True, ids=["v2", "v3"])
def test_outputs_agree(pair):
    model, reference = pair
    image, prompt = make_image(70, 90), make_prompt(20, 5)
    with torch.no_grad():
        images = model.preprocess_images([{"image": image}])
        ids, mask = model.pad_prompts([prompt])
        features = model.backbone(images.tensor, ids, mask)
        expected = model.head(features.pyramid, features.text, mask)
        found = reference(*reference.prepare([image], [prompt]))
    assert_agree(found.token_logits[..., :20], expected.token_logits)
    assert_agree(found.box_deltas, expected.box_deltas)
    assert_agree(found.centerness, expected.centerness)
    assert torch.equal(torch.cat(found.anchors), torch.cat(expected.anchors))


@pytest.mark.parametrize("pair", [False, True], indirect=True, ids=["v2", "v3"])
def test_losses_and_gradients_agree(pair, load):
    model, reference = pair
    batch = make_batch()
    expected = model._losses(batch)
    found = load("reference_tasks").reference_losses(reference, batch)
    assert found.keys() == expected.keys()
    for name in expected:
        assert_agree(found[name], expected[name])
        assert expected[name] > 0
    sum(expected.values()).backward()
    sum(found.values()).backward()
    parameters = dict(reference.named_parameters())
    largest = max(p.grad.abs().max() for p in model.parameters())
    for name, parameter in model.named_parameters():
        difference = (parameters[name].grad - parameter.grad).abs().max()
        assert difference <= TOLERANCE * largest, name


def test_detections_agree(pair, load):
    model, reference = pair
    with torch.no_grad():  # so that classes compete and the threshold decides
        model.head.prior_bias.fill_(-3.0)
        model.head.text_projection.weight.mul_(30)
    model.head.postprocessor.score_thresh = 0.05
    image = make_image(70, 90)
    prompts = [make_prompt(20, 5), make_prompt(32, 4, seed=1, first_id=5)]
    expected = model([{"image": image, "prompt": prompts}])[0]["instances"]
    found = load("reference_tasks").reference_detect(reference, image, prompts)
    assert len(expected) == len(found.scores) == 40
    assert torch.equal(found.classes, expected.pred_classes)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.boxes, expected.pred_boxes.tensor, atol=1e-2, rtol=1e-3)


def test_weights_are_shared_but_gradients_are_not(pair):
    model, reference = pair
    ours, theirs = model.head.bbox_pred.weight, reference.head["bbox_pred"].weight
    assert ours.data_ptr() == theirs.data_ptr()
    theirs.sum().backward()
    assert ours.grad is None


def test_regularisation_has_the_products_rates(load, build):
    model = build(drop_path=0.3, dropout=0.2, drop_block=0.25)
    reference = load("reference").ReferenceFIBER(model, text_length=32)
    last = reference.backbone["swin"]["stages"][-1]["blocks"][-1]
    assert last.drop_path.p == pytest.approx(0.3)
    assert reference.backbone["neck"].drop == 0.25
    assert reference.backbone["text"]["layers"][0].dropout.p == 0.2
    tasks, batch = load("reference_tasks"), make_batch()
    torch.manual_seed(0)
    first, second = (tasks.reference_losses(reference, batch)["loss_token"] for _ in range(2))
    assert first != second, "training mode drops at random"
