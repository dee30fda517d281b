import logging
import math

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from torch import nn

from fiber_d2.modeling.test_time_augmentation import RANGES, SCALES, FiberWithTTA
from fiber_d2.structures import Prompt


def make_prompt(num_tokens, targets, seed=0, first_id=0):
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


def make_input(height, width, seed=0, prompt=None):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    prompt = make_prompt(6, 3) if prompt is None else prompt
    return {"image": image, "height": height, "width": width, "prompt": prompt}


def resized(item, scale, max_size):
    """The input as a loader that resizes would give it."""
    image = item["image"].permute(1, 2, 0).numpy()
    image = T.ResizeShortestEdge(scale, max_size).get_transform(image).apply_image(image)
    return {**item, "image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))}


def assert_same(found, expected, **tolerance):
    assert found.image_size == expected.image_size
    assert len(found) == len(expected) > 0
    assert torch.equal(found.pred_classes, expected.pred_classes)
    torch.testing.assert_close(found.scores, expected.scores)
    boxes = found.pred_boxes.tensor, expected.pred_boxes.tensor
    torch.testing.assert_close(*boxes, **(tolerance or {"atol": 1e-3, "rtol": 1e-4}))


class Finder(nn.Module):
    """Finds what it is told, given in shares of the image; notes what it was shown.

    Scores and classes of a view are those of its prompt's first entry in ``answers``.
    """

    def __init__(self, answers):
        super().__init__()
        self.answers = answers
        self.calls = []
        self.eval()

    def forward(self, inputs):
        self.calls.append(inputs)
        outputs = []
        for item in inputs:
            height, width = item["image"].shape[-2:]
            assert (item["height"], item["width"]) == (height, width)
            boxes, scores, classes = self.answers(item)
            instances = Instances((height, width))
            scale = torch.tensor([width, height, width, height])
            instances.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4) * scale)
            instances.scores = torch.tensor(scores)
            instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
            outputs.append({"instances": instances})
        return outputs


def is_mirrored(item):
    """Whether the bright half of the image is on its right."""
    image = item["image"].float()
    half = image.shape[-1] // 2
    return bool(image[..., half:].mean() > image[..., :half].mean())


def half_bright(height, width):
    item = make_input(height, width)
    item["image"].zero_()[..., : width // 2] = 200
    return item


@pytest.mark.parametrize("several", [False, True], ids=["one prompt", "two prompts"])
@pytest.mark.parametrize("view_nms", [False, True], ids=["all candidates", "view_nms"])
def test_one_view_is_the_plain_model(small_model, view_nms, several):
    prompt = make_prompt(6, 3)
    if several:
        prompt = [prompt, make_prompt(8, 2, seed=2, first_id=3)]
        # The plain model has a limit per prompt, several views one for the image.
        small_model.head.postprocessor.max_detections = 500
    limit = small_model.head.postprocessor.max_detections
    item = make_input(80, 120, prompt=prompt)
    if not view_nms:
        # Suppression, then, happens in the original's pixels, and these are to be the view's.
        item.update(height=64, width=96)
    wrapped = FiberWithTTA(
        small_model,
        scales=[64],
        max_size=1000,
        flip=False,
        ranges=None,
        view_nms=view_nms,
        max_detections=limit,
    )
    (expected,) = small_model([resized(item, 64, 1000)])
    (found,) = wrapped([item])
    if several:
        assert found["instances"].pred_classes.max() >= 3
    assert_same(found["instances"], expected["instances"])


def test_the_model_is_left_as_it_was(small_model):
    before = dict(vars(small_model.head.postprocessor))
    wrapped = FiberWithTTA(small_model, scales=[64], ranges=None)
    wrapped([make_input(64, 64)])
    with pytest.raises(ValueError, match="holds 32"):
        wrapped([make_input(64, 64, prompt=make_prompt(33, 1))])
    assert vars(small_model.head.postprocessor) == before


def test_all_candidates_are_merged(small_model):
    """Without suppression in the view there is more to average."""
    item = make_input(64, 96)
    settings = dict(scales=[64], ranges=None, flip=False, method="vote", max_detections=0)
    model = small_model
    given = []
    model.register_forward_hook(lambda module, inputs, outputs: given.append(outputs[0]))
    FiberWithTTA(model, **settings)([item])
    FiberWithTTA(model, **settings, max_candidates=30)([item])
    FiberWithTTA(model, **settings, view_nms=True)([item])
    every, some, few = (len(output["instances"]) for output in given)
    assert every > some >= 30 > few


def test_batches_of_different_images_give_their_own_results(small_model):
    prompts = [make_prompt(6, 3), make_prompt(8, 2, seed=2, first_id=3)]
    items = [
        make_input(61, 90, 1, prompts),
        make_input(96, 50, 2),
        make_input(64, 64, 3, prompts[1]),
    ]
    wrapped = FiberWithTTA(small_model, scales=[48, 64], ranges=[(0, 40), (10, 1e4)])
    together = wrapped(items)
    for item, expected in zip(items, together):
        (alone,) = wrapped([item])
        assert_same(alone["instances"], expected["instances"], atol=0, rtol=0)
        assert alone["instances"].image_size == (item["height"], item["width"])
    wrapped.batch_views = 2
    for one, other in zip(wrapped(items), together):
        assert_same(one["instances"], other["instances"])


def test_every_view_is_mapped_back():
    """A model that sees the same box in every size and in the mirror: one box remains."""

    def answers(item):
        left, right = (0.5, 0.75) if is_mirrored(item) else (0.25, 0.5)
        return [[left, 0.125, right, 0.5]], [0.5 + item["image"].shape[1] / 1e4], [7]

    model = Finder(answers)
    wrapped = FiberWithTTA(
        model, scales=[40, 80, 120, 160], max_size=200, view_nms=True, ranges=None
    )
    (found,) = wrapped([half_bright(64, 96)])
    found = found["instances"]
    assert found.image_size == (64, 96)
    torch.testing.assert_close(found.pred_boxes.tensor, torch.tensor([[24.0, 8, 48, 32]]))
    assert found.pred_classes.tolist() == [7]
    shown = [tuple(item["image"].shape[1:]) for items in model.calls for item in items]
    sizes = [(40, 60), (80, 120), (120, 180), (133, 200)]
    assert shown == [size for size in sizes for _ in range(2)]
    mirrored = [is_mirrored(item) for items in model.calls for item in items]
    assert mirrored == [False, True] * 4
    assert found.scores.tolist() == pytest.approx([0.5133])


def test_inclusive_corners_in_the_mirror():
    model = Finder(lambda item: ([[0.25, 0.5, 0.5, 0.75]], [0.9], [0]))
    settings = dict(scales=[64], view_nms=True, ranges=None, threshold=1.0)
    for legacy, mirrored in ((False, [48.0, 32, 72, 48]), (True, [47.0, 32, 71, 48])):
        (found,) = FiberWithTTA(model, legacy_boxes=legacy, **settings)([make_input(64, 96)])
        boxes = found["instances"].pred_boxes.tensor.tolist()
        assert sorted(boxes) == [[24.0, 32, 48, 48], mirrored]


def test_a_scale_gives_only_boxes_of_its_range():
    """Sizes are measured in the resized image, here one and two times the original."""
    shares = [[0.0, 0, 0.25, 0.25], [0.5, 0, 1, 0.5], [0, 0.5, 0.125, 0.625]]
    model = Finder(lambda item: (shares, [0.9, 0.8, 0.7], [0, 0, 0]))
    settings = dict(scales=[64, 128], flip=False, view_nms=True)
    sizes = {}
    for ranges in ([(20, 1e4), (0, 20)], [(0, 10), (60, 1e4)], [(1e4, 1e5), (1e4, 1e5)]):
        (found,) = FiberWithTTA(model, ranges=ranges, **settings)([make_input(64, 64)])
        sizes[ranges[0]] = [box[2] - box[0] for box in found["instances"].pred_boxes]
    assert sizes == {(20, 1e4): [32, 8], (0, 10): [32, 8], (1e4, 1e5): []}


def test_nothing_found():
    model = Finder(lambda item: ([], [], []))
    (found,) = FiberWithTTA(model, scales=[64], view_nms=True, ranges=None)([make_input(64, 96)])
    assert len(found["instances"]) == 0 and found["instances"].image_size == (64, 96)


def test_prompts_of_mirror_images():
    plain, mirrored = [make_prompt(6, 3)], [make_prompt(7, 3)]
    model = Finder(lambda item: ([[0.0, 0, 1, 1]], [0.9], [0]))
    wrapped = FiberWithTTA(model, scales=[64], view_nms=True, ranges=None, batch_views=2)
    wrapped([{**make_input(64, 64, prompt=plain), "mirrored_prompt": mirrored}])
    wrapped([make_input(64, 64, prompt=plain)])
    asked = [[item["prompt"] for item in items] for items in model.calls]
    assert asked == [[plain, mirrored], [plain, plain]]


def test_method_and_limit_are_those_of_merging():
    """Mean of two views, weighted by score."""
    model = Finder(
        lambda item: (
            [[0.0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]
            if item["height"] == 64
            else [[0.0, 0, 0.5, 0.625]],
            [0.5, 0.25] if item["height"] == 64 else [0.75],
            [3, 4] if item["height"] == 64 else [3],
        )
    )
    settings = dict(scales=[64, 128], flip=False, view_nms=True, ranges=None, method="vote")
    (found,) = FiberWithTTA(model, **settings)([make_input(64, 64)])
    boxes = found["instances"].pred_boxes.tensor
    torch.testing.assert_close(boxes[0], torch.tensor([0, 0, 32, (0.5 * 32 + 0.75 * 40) / 1.25]))
    assert found["instances"].scores.tolist() == [0.75, 0.25]
    assert found["instances"].pred_classes.tolist() == [3, 4]
    (found,) = FiberWithTTA(model, max_detections=1, **settings)([make_input(64, 64)])
    assert found["instances"].pred_classes.tolist() == [3]


def test_defaults_of_the_original():
    wrapped = FiberWithTTA(nn.Identity())
    assert wrapped.scales == SCALES and wrapped.max_size == 2500 and wrapped.flip
    assert len(RANGES) == len(SCALES) == 12
    assert dict(zip(SCALES, RANGES))[900] == (0, 10000)
    assert FiberWithTTA(nn.Identity(), ranges=None).ranges == ((0, math.inf),) * 12


def test_mistakes_are_found_early(small_model):
    with pytest.raises(ValueError, match="2 scales but 12 ranges: give one"):
        FiberWithTTA(small_model, scales=[400, 600])
    with pytest.raises(ValueError, match="scales is empty"):
        FiberWithTTA(small_model, scales=[], ranges=[])
    with pytest.raises(ValueError, match="must be one of"):
        FiberWithTTA(small_model, method="best")
    with pytest.raises(ValueError, match="for evaluation"):
        FiberWithTTA(small_model).train()([make_input(64, 64)])


def test_image_that_the_loader_resized_is_reported_once(caplog):
    logger = logging.getLogger("fiber_d2.modeling.test_time_augmentation")
    logger.addHandler(caplog.handler)
    model = Finder(lambda item: ([[0.25, 0.25, 0.5, 0.5]], [0.9], [0]))
    wrapped = FiberWithTTA(model, scales=[32], view_nms=True, ranges=None)
    item = make_input(64, 96)
    wrapped([item])
    assert not caplog.messages
    (found, _) = wrapped([{**item, "height": 128, "width": 192}] * 2)
    logger.removeHandler(caplog.handler)
    (message,) = set(caplog.messages)
    assert "128 x 192 pixels comes as 64 x 96" in message and "augmentations=[]" in message
    assert found["instances"].image_size == (128, 192)
    boxes = found["instances"].pred_boxes.tensor
    torch.testing.assert_close(boxes, torch.tensor([[48.0, 32, 96, 64], [96, 32, 144, 64]]))


def test_from_a_config(small_model):
    node = LazyConfig.load_rel("../../configs/common/tta.py", "tta")
    assert node.resize(400, 2500).short_edge_length == (400, 400)
    node.update(model=small_model, scales=[64], ranges=[[0, 1000]], method="soft-vote")
    node.soft_vote_min_score = 0.01
    wrapped = instantiate(node)
    assert wrapped.model is small_model and not wrapped.training
    (found,) = wrapped([make_input(64, 96)])
    assert len(found["instances"]) > 0
