"""What may share a batch without changing numbers, and maps of awkward sizes.

Padding of images is not masked (the model specification, section 2), so an image gives the same
numbers alone and in a batch only where both are padded to the same size. Training pads a batch to
its largest image; inference lets only images of the same padded size pass together.
"""

import pytest
import torch

from fiber_d2.layers import flat_offset_view, resampled_offset_view
from fiber_d2.structures import Prompt

SIZES = [(64, 96), (96, 64)]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def make_text(lengths, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.ones(len(lengths), width, dtype=torch.int64)
    for row, length in zip(ids, lengths):
        row[:length] = torch.randint(3, 50, (length,), generator=generator)
    return ids, ids != 1


def run(model, images, ids, mask):
    features = model.backbone(images, ids, mask)
    return features, model.head(features.pyramid, features.text, mask)


@pytest.fixture(params=[False, True], ids=["v2", "v3"])
def model(request, build):
    return build(query_norm=request.param).eval()


@torch.no_grad()
def test_padding_of_text_does_not_matter(model):
    images = torch.randn(2, 3, 64, 96)
    ids, mask = make_text([5, 9], 9)
    short = run(model, images, ids, mask)
    wide_ids = torch.cat([ids, torch.ones(2, 23, dtype=torch.int64)], dim=1)
    wide = run(model, images, wide_ids, wide_ids != 1)
    for a, b in zip(short[0].pyramid, wide[0].pyramid):
        torch.testing.assert_close(a, b, **TOLERANCE)
    torch.testing.assert_close(short[1].box_deltas, wide[1].box_deltas, **TOLERANCE)
    logits, wide_logits = short[1].token_logits, wide[1].token_logits[..., :9]
    real = mask[:, None, :].expand_as(logits)
    torch.testing.assert_close(logits[real], wide_logits[real], **TOLERANCE)
    # What the pairs of a prompt are scored by does not change either.
    text, wide_text = short[0].text, wide[0].text[:, :9]
    torch.testing.assert_close(text[mask], wide_text[mask], **TOLERANCE)


@torch.no_grad()
def test_an_image_alone_and_in_a_batch_of_the_same_padded_size(model):
    """The pairs of a batch do not touch each other: not their images, not their captions."""
    images = torch.randn(3, 3, 96, 96)
    images[1, :, 64:] = 0  # a smaller image, padded
    ids, mask = make_text([5, 9, 3], 9)
    together = run(model, images, ids, mask)[1]
    for i in range(3):
        length = int(mask[i].sum())
        alone = run(model, images[i : i + 1], ids[i : i + 1, :length], mask[i : i + 1, :length])[1]
        torch.testing.assert_close(together.box_deltas[i], alone.box_deltas[0], **TOLERANCE)
        torch.testing.assert_close(together.centerness[i], alone.centerness[0], **TOLERANCE)
        torch.testing.assert_close(
            together.token_logits[i, :, :length], alone.token_logits[0], **TOLERANCE
        )


@torch.no_grad()
def test_padding_of_images_does_matter(model):
    """Known and kept: the published weights were trained and evaluated with it."""
    image = torch.randn(1, 3, 64, 64)
    ids, mask = make_text([5], 5)
    small = run(model, image, ids, mask)[0].pyramid[0]
    padded = torch.zeros(1, 3, 64, 96)
    padded[..., :64] = image
    large = run(model, padded, ids, mask)[0].pyramid[0]
    assert (small - large[..., :8]).abs().max() > 1e-3


def make_input(height, width, length, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (length,), generator=generator)
    positive_map = torch.zeros(2, length)
    positive_map[0, 1], positive_map[1, 2:4] = 1, 0.5
    prompt = Prompt(
        text="",
        input_ids=ids,
        attention_mask=torch.ones(length, dtype=torch.bool),
        positive_map=positive_map,
        target_ids=torch.tensor([3, 8]),
    )
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    return {"image": image, "height": height, "width": width, "prompt": prompt}


def test_batches_of_any_sizes_and_prompts_give_the_numbers_of_single_images(model):
    inputs = [
        make_input(61, 90, 6, 1),
        make_input(96, 50, 9, 2),
        make_input(64, 96, 4, 3),  # padded to the size of the first one
        make_input(96, 90, 12, 4),
    ]
    inputs[1]["prompt"] = [inputs[1]["prompt"], make_input(1, 1, 5, 5)["prompt"]]
    sizes = []
    model.backbone.swin.patch_embed.register_forward_hook(
        lambda module, args, output: sizes.append(tuple(args[0].shape))
    )
    together = model(inputs)
    assert sizes == [(2, 3, 64, 96), (1, 3, 96, 64), (1, 3, 96, 96)]
    for item, expected in zip(inputs, together):
        (found,) = model([item])
        found, expected = found["instances"], expected["instances"]
        assert found.image_size == expected.image_size == (item["height"], item["width"])
        assert len(found) == len(expected) > 0
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=1e-3, atol=1e-2
        )
        assert torch.equal(found.pred_classes, expected.pred_classes)
        assert set(found.pred_classes.tolist()) <= {3, 8}


@pytest.mark.parametrize(
    "height,width", [(32, 32), (32, 96), (96, 32), (64, 64), (96, 160), (160, 224), (32, 288)]
)
@pytest.mark.parametrize("addressing", ["flat", "resampled"])
def test_sizes_whose_levels_do_not_halve_exactly(build, height, width, addressing):
    """Every side is the ceiling of half the one before, down to maps of one pixel."""
    model = build().train()
    for block in model.head.tower:
        block.offset_view = flat_offset_view if addressing == "flat" else resampled_offset_view
    ids, mask = make_text([5, 8], 8)
    features, outputs = run(model, torch.randn(2, 3, height, width), ids, mask)
    sizes = [tuple(level.shape[-2:]) for level in features.pyramid]
    assert sizes[0] == (height // 8, width // 8)
    for finer, coarser in zip(sizes, sizes[1:]):
        assert coarser == (-(-finer[0] // 2), -(-finer[1] // 2))
    assert [tuple(level.shape[-2:]) for level in outputs.features] == sizes
    assert outputs.token_logits.shape == (2, sum(h * w for h, w in sizes), 8)
    boxes = torch.tensor([[[2.0, 3.0, 25.0, 28.0]], [[0.0, 0.0, 31.0, 31.0]]])
    positive = torch.zeros(2, 1, 8, dtype=torch.bool)
    positive[:, :, 1] = True
    losses = model.head.losses(outputs, mask, boxes, torch.ones(2, 1, dtype=torch.bool), positive)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_flat_addressing_never_runs_past_the_end():
    """The coarser map has at most as many positions, and one pixel reads itself."""
    for height in range(1, 12):
        for width in range(1, 12):
            half = -(-height // 2), -(-width // 2)
            tensor = torch.arange(18.0 * height * width).view(1, 18, height, width)
            view = flat_offset_view(tensor, *half)
            assert view.shape == (1, 18, *half)
            assert torch.equal(view.flatten(), torch.arange(18.0 * half[0] * half[1]))
    one = torch.randn(2, 18, 1, 1)
    assert torch.equal(flat_offset_view(one, 1, 1), one)


@torch.no_grad()
def test_flat_addressing_takes_logical_order_whatever_the_memory_format():
    tensor = torch.randn(2, 18, 4, 6)
    other = tensor.to(memory_format=torch.channels_last)
    assert torch.equal(flat_offset_view(tensor, 2, 3), flat_offset_view(other, 2, 3))
