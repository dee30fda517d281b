import pytest
import torch
from detectron2.structures import Boxes, Instances

from fiber_d2.modeling.fiber import pad_stack
from fiber_d2.structures import Prompt


def make_prompt(num_tokens, targets, seed=0, first_id=0):
    """A prompt of random tokens; target k covers token k + 1."""
    generator = torch.Generator().manual_seed(seed)
    positive_map = torch.zeros(targets, num_tokens)
    positive_map[torch.arange(targets), torch.arange(targets) + 1] = 1
    return Prompt(
        text="words",
        input_ids=torch.randint(5, 50, (num_tokens,), generator=generator),
        attention_mask=torch.ones(num_tokens, dtype=torch.bool),
        positive_map=positive_map,
        target_ids=torch.arange(targets) + first_id,
    )


def make_image(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def assert_same_detections(found, expected):
    assert len(found) == len(expected) > 0
    assert torch.equal(found.pred_classes, expected.pred_classes)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        found.pred_boxes.tensor, expected.pred_boxes.tensor, atol=1e-2, rtol=1e-3
    )


def test_pad_stack():
    out = pad_stack([torch.ones(1, 2), torch.ones(2, 1)], 7)
    assert out.tolist() == [[[1, 1], [7, 7]], [[1, 7], [1, 7]]]


def test_captions_of_different_lengths_in_one_batch(small_model):
    image = make_image(64, 96)
    items = [
        {"image": image, "prompt": make_prompt(9, 4, seed=1)},
        {"image": image, "prompt": make_prompt(5, 2, seed=2)},
    ]
    together = small_model(items)
    for item, result in zip(items, together):
        (alone,) = small_model([item])
        assert_same_detections(result["instances"], alone["instances"])


def test_a_list_of_prompts_is_the_union_of_single_prompts(small_model):
    prompts = [make_prompt(6, 3, seed=1), make_prompt(8, 2, seed=2, first_id=3)]
    image = make_image(64, 64)
    (merged,) = small_model([{"image": image, "prompt": prompts}])
    singles = [small_model([{"image": image, "prompt": prompt}])[0] for prompt in prompts]
    scores = torch.cat([single["instances"].scores for single in singles])
    torch.testing.assert_close(
        merged["instances"].scores, scores.sort(descending=True).values, atol=1e-5, rtol=1e-4
    )
    classes = torch.cat([single["instances"].pred_classes for single in singles])
    assert sorted(merged["instances"].pred_classes.tolist()) == sorted(classes.tolist())
    assert classes.max() >= 3, "the second prompt's ids start at 3"
    # The number of pairs that pass together only bounds the memory.
    small_model.prompt_batch_size = 1
    (one_by_one,) = small_model([{"image": image, "prompt": prompts}])
    assert_same_detections(one_by_one["instances"], merged["instances"])


def test_boxes_come_back_in_the_original_image(small_model):
    item = {"image": make_image(64, 96), "prompt": make_prompt(6, 3)}
    (plain,) = small_model([item])
    (scaled,) = small_model([{**item, "height": 128, "width": 288}])
    assert scaled["instances"].image_size == (128, 288)
    torch.testing.assert_close(
        scaled["instances"].pred_boxes.tensor,
        plain["instances"].pred_boxes.tensor * torch.tensor([3.0, 2.0, 3.0, 2.0]),
    )


def test_text_changes_the_image_features_and_the_reverse(small_model):
    image = torch.randn(1, 3, 64, 64)
    mask = torch.ones(1, 6, dtype=torch.bool)
    first, second = (torch.full((1, 6), token) for token in (7, 9))
    backbone = small_model.backbone
    with torch.no_grad():
        one, other = backbone(image, first, mask), backbone(image, second, mask)
        assert torch.equal(one.stages[0], other.stages[0]), "stage 2 has not met the text"
        assert not torch.allclose(one.stages[1], other.stages[1])
        blank = backbone(torch.zeros_like(image), first, mask)
        assert not torch.allclose(one.text, blank.text)
        for name, parameter in backbone.named_parameters():
            if name.endswith("alpha"):
                parameter.zero_()
        one, other = backbone(image, first, mask), backbone(image, second, mask)
        assert torch.equal(one.stages[2], other.stages[2]), "alpha 0 shuts the exchange"


def test_training_reaches_every_parameter(small_model):
    small_model.train()
    items = []
    for boxes in ([[4.0, 4, 40, 36], [30, 20, 60, 60]], []):
        prompt = make_prompt(7, 2)
        instances = Instances((64, 64))
        instances.gt_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
        instances.gt_classes = torch.arange(len(boxes))
        instances.gt_positive_map = prompt.positive_map[: len(boxes)] > 0
        items.append({"image": make_image(64, 64), "prompt": prompt, "instances": instances})
    losses = small_model(items)
    assert set(losses) == {"loss_token", "loss_box", "loss_centerness"}
    sum(losses.values()).backward()
    # Stage 1's output has no norm; padding embeddings and unused rows have zero gradients but
    # every tensor is part of the graph.
    missing = [name for name, p in small_model.named_parameters() if p.grad is None]
    assert missing == []


def test_too_long_a_caption_is_refused(small_model):
    with pytest.raises(ValueError, match="33 tokens.*holds 32"):
        small_model([{"image": make_image(64, 64), "prompt": make_prompt(33, 1)}])


def test_image_batch_must_fit_the_strides(small_model):
    with pytest.raises(ValueError, match="multiples of 32"):
        small_model.backbone.image_prefix(torch.zeros(1, 3, 64, 50))
