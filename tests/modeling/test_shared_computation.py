"""What is computed once: of an image for its captions, of a caption for all images."""

import copy
import pickle

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from fiber_d2.engine.ema import ModelEma
from fiber_d2.structures import Prompt

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def make_prompt(length, seed=0, first_id=0):
    generator = torch.Generator().manual_seed(seed)
    positive_map = torch.zeros(2, length)
    positive_map[0, 1], positive_map[1, 2] = 1, 1
    ids = torch.randint(3, 50, (length,), generator=generator)
    mask = torch.ones(length, dtype=torch.bool)
    return Prompt("", ids, mask, positive_map, torch.tensor([first_id, first_id + 1]))


def make_item(prompts, size=(64, 96), seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
    return {"image": image, "prompt": prompts}


def shapes_into(module):
    """Of the first input of each call."""
    shapes = []
    module.register_forward_hook(lambda _, inputs, output: shapes.append(tuple(inputs[0].shape)))
    return shapes


def assert_same(found, expected):
    found, expected = found["instances"], expected["instances"]
    assert len(found) == len(expected) > 0
    assert torch.equal(found.pred_classes, expected.pred_classes)
    torch.testing.assert_close(found.scores, expected.scores, **TOLERANCE)
    torch.testing.assert_close(
        found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=1e-3, atol=1e-2
    )


@pytest.mark.parametrize("index", [[0, 0, 0], [1, 0, 1], [1, 1, 0], [0, 1, 0]], ids=str)
@pytest.mark.parametrize("query_norm", [False, True], ids=["v2", "v3"])
def test_pairs_that_share_images_are_those_with_copies(build, query_norm, index):
    """Forward and backward."""
    index = torch.tensor(index)
    images = torch.randn(int(index.max()) + 1, 3, 64, 96)
    ids = torch.randint(3, 50, (3, 7))
    mask = torch.arange(7) < torch.tensor([[7], [4], [6]])
    ids[~mask] = 1
    found = []
    for shared in (True, False):
        backbone = build(query_norm).backbone
        if shared:
            features = backbone(images, ids, mask, index)
            assert len(features.stages[0]) == len(images) and len(features.stages[1]) == 3
        else:
            features = backbone(images[index], ids, mask)
        outputs = [*features.pyramid, *features.stages[1:], features.text]
        sum(x.sin().sum() for x in outputs).backward()
        found.append(
            (outputs, {n: p.grad for n, p in backbone.named_parameters() if p.grad is not None})
        )
    for one, other in zip(*(outputs for outputs, _ in found)):
        torch.testing.assert_close(one, other, **TOLERANCE)
    (_, gradients), (_, expected) = found
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() < 1e-4 * expected[name].norm() + 1e-4, name


def test_an_image_is_computed_once_for_its_captions(small_model):
    swin, text = small_model.backbone.swin, small_model.backbone.text
    first, second = swin.stages[2].blocks[1:3]
    keys = text.layers[text.num_text_only].image_attention.attention.key
    into = [
        shapes_into(module)
        for module in (
            first.attn.qkv,
            first.attn.text_attention.query,
            keys,
            small_model.backbone.neck.laterals[0],
            second.attn.qkv,
        )
    ]
    small_model(
        [make_item([make_prompt(5), make_prompt(6, 1), make_prompt(7, 2)]), make_item([], seed=1)][
            :1
        ]
    )
    assert [[shape[0] for shape in shapes] for shapes in into] == [[1], [1], [1], [1], [3]]


def test_captions_of_about_the_same_length_pass_together(small_model):
    prompts = [make_prompt(n, seed=n, first_id=2 * n) for n in (9, 4, 12, 5, 8)]
    item = make_item(prompts)
    (expected,) = small_model([item])
    small_model.prompt_batch_size = 2
    into = shapes_into(small_model.backbone.text.layers[-1])
    (found,) = small_model([item])
    assert [shape[:2] for shape in into] == [(2, 5), (2, 9), (1, 12)]
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("pixels", "together"), [(1, [1] * 5), (64 * 96, [1] * 5), (64 * 96 + 1, [2, 2, 1])]
)
def test_on_a_cpu_large_images_take_few_captions_at_a_time(
    small_model, monkeypatch, pixels, together
):
    item = make_item([make_prompt(n, seed=n, first_id=2 * n) for n in (9, 4, 12, 5, 8)])
    assert item["image"].shape[1:] == (64, 96)
    (expected,) = small_model([item])
    monkeypatch.setattr("fiber_d2.modeling.fiber.CPU_PIXELS", pixels)
    into = shapes_into(small_model.backbone.text.layers[-1])
    (found,) = small_model([item])
    assert [shape[0] for shape in into] == together
    assert_same(found, expected)


def test_images_and_captions_in_any_combination(small_model):
    """Chunks take some of the images; results come back to their own."""
    prompts = [make_prompt(n, seed=n, first_id=2 * n) for n in (9, 4, 12, 5)]
    items = [make_item(prompts[:3], seed=1), make_item(prompts[3], seed=2)]
    items.append(make_item(prompts[1:], seed=3))
    alone = [small_model([item])[0] for item in items]
    for size in (1, 3, 16):
        small_model.prompt_batch_size = size
        for found, expected in zip(small_model(items), alone):
            assert_same(found, expected)


def test_evaluation_keeps_nothing_for_a_backward_pass(small_model):
    kept = []
    with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x), torch.enable_grad():
        (found,) = small_model([make_item([make_prompt(5), make_prompt(6)])])
    assert not kept
    assert not found["instances"].scores.requires_grad


class TestTextCache:
    @pytest.fixture
    def calls(self, small_model):
        """Shapes of what enters the text tower."""
        return shapes_into(small_model.backbone.text.embeddings)

    def test_a_data_set_with_the_same_captions(self, small_model, calls):
        prompts = [make_prompt(n, seed=n) for n in (5, 9, 7)]
        items = [make_item(prompts, seed=seed) for seed in range(3)]
        remembered = [small_model([item])[0] for item in items]
        assert calls == [(3, 9)]
        small_model.text_cache.max_bytes = 0
        for item, expected in zip(items, remembered):
            assert_same(small_model([item])[0], expected)
        assert len(calls) == 4

    def test_equal_captions_of_a_call_pass_once(self, small_model, calls):
        prompt, equal = make_prompt(5), make_prompt(5)
        small_model.text_cache.max_bytes = 0
        small_model([make_item(prompt), make_item([equal, make_prompt(8)], seed=1)])
        assert calls == [(2, 8)]

    def test_only_what_is_missing_is_computed(self, small_model, calls):
        first, second = make_prompt(9), make_prompt(5, seed=1)
        small_model([make_item(first)])
        small_model([make_item([second, first])])
        small_model([make_item([first, second])])
        assert calls == [(1, 9), (1, 5)]

    @pytest.mark.parametrize(
        "change",
        [
            "step",
            "load",
            "ema",
            "in place",
            "inference mode",
            "new parameter",
            "new data",
            "train",
            "clear",
        ],
    )
    def test_other_weights_are_noticed(self, small_model, calls, change):
        """And the results are those of a model that never knew the first ones."""
        model, item = small_model, make_item([make_prompt(6), make_prompt(9, 1)])
        before = model([item])[0]
        weight = model.backbone.text.layers[0].fc1.weight
        ema = ModelEma(model, decay=0.5)
        other = copy.deepcopy(model.state_dict())
        other["backbone.text.layers.0.fc1.weight"] *= 3
        if change == "step":
            weight.grad = torch.randn_like(weight)
            torch.optim.AdamW([weight], lr=0.1).step()
        elif change == "load":
            model.load_state_dict(other)
        elif change == "ema":
            ema.load_state_dict(other)
            with ema.applied():
                found = model([item])[0]
                assert not torch.equal(found["instances"].scores, before["instances"].scores)
        elif change == "in place":
            with torch.no_grad():
                weight.mul_(3)
        elif change == "inference mode":
            with torch.inference_mode():
                weight.mul_(3)
        elif change == "new parameter":
            model.backbone.text.layers[0].fc1.weight = torch.nn.Parameter(weight.detach() * 3)
        elif change == "new data":
            # Twice, so that memory could be used again.
            for factor in (2, 1.5):
                weight.data = weight.data * factor
        elif change == "train":
            weight.data.mul_(3)
            model.train().eval()
        else:
            weight.data.mul_(3)
            model.text_cache.clear()
        expected = copy.deepcopy(model)([item])[0]
        calls.clear()
        assert_same(model([item])[0], expected)
        assert len(calls) == 1
        same = torch.equal(expected["instances"].scores, before["instances"].scores)
        assert same == (change == "ema")

    def test_precision_is_part_of_it(self, small_model, calls):
        item = make_item(make_prompt(6))
        for dtype in (None, torch.bfloat16, torch.float16, None, torch.bfloat16):
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                small_model([item])
        assert len(calls) == 3

    def test_nothing_is_remembered_in_training(self, small_model, calls):
        item = make_item(make_prompt(6))
        small_model.backbone.text.layers[0].train()
        small_model([item]), small_model([item])
        assert len(calls) == 2 and not len(small_model.text_cache)

    def test_weights_that_torch_keeps_no_count_of(self, build):
        with torch.inference_mode():
            model = build().eval()
            calls = shapes_into(model.backbone.text.embeddings)
            model([make_item(make_prompt(6))]), model([make_item(make_prompt(6))])
        assert len(calls) == 2

    def test_the_least_recently_used_go_first(self, small_model, calls):
        one, two, three = (make_prompt(6, seed=seed) for seed in range(3))
        small_model.text_cache.max_bytes = 2 * 6 * 16 * 4  # two captions of 16 channels
        for prompt in (one, two, one, three, one):
            small_model([make_item(prompt)])
        assert len(calls) == 3 and len(small_model.text_cache) == 2
        small_model([make_item(two)])
        assert len(calls) == 4
        small_model([make_item(make_prompt(20))])  # larger than all
        assert len(small_model.text_cache) == 0

    def test_copies_are_empty(self, small_model):
        item = make_item(make_prompt(6))
        (expected,) = small_model([item])
        assert len(small_model.text_cache) == 1
        for other in (copy.deepcopy(small_model), pickle.loads(pickle.dumps(small_model))):
            assert len(other.text_cache) == 0
            assert other.text_cache.max_bytes == small_model.text_cache.max_bytes
            assert_same(other([item])[0], expected)
