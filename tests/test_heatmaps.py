"""Heat maps against what the detector computes, and against bilinear interpolation by hand."""

import numpy as np
import pytest
import torch
from PIL import Image

from fiber_d2.heatmaps import TokenHeatmaps, query_for_words
from fiber_d2.predictor import Caption, Classes, Expression, Predictor
from fiber_d2.visualization import draw_heatmaps

CLASSES = ["red circle", "blue cross", "green triangle"]
CAPTION = "a red circle left of the blue cross"
STRIDES = (8, 16, 32, 64, 128)


@pytest.fixture(scope="module")
def predictor(tiny):
    return Predictor(tiny.config, tiny.weights, device="cpu")


def outputs_of(predictor, image, question):
    """What the head gives while the predictor answers, and the prompts."""
    seen = []
    hook = predictor.model.head.register_forward_hook(lambda _, inputs, out: seen.append(out))
    found = predictor(image, question)
    hook.remove()
    return seen, found


@pytest.mark.parametrize("question", [CLASSES, CAPTION, Expression(CAPTION)], ids=str)
def test_maps_are_the_probabilities_that_the_detector_forms_its_scores_of(
    predictor, tiny, question
):
    (outputs,), _ = outputs_of(predictor, tiny.images[0], question)
    heatmaps = predictor.token_heatmaps(tiny.images[0], question)
    query, targets = query_for_words(
        Classes(question) if isinstance(question, list) else
        Caption(question) if isinstance(question, str) else question, None
    )  # fmt: skip
    assert heatmaps.words == query.words and heatmaps.strides == STRIDES
    (prompt,) = predictor._prompts(query)
    anchor = 0
    for level, stride, anchors in zip(heatmaps.levels, STRIDES, outputs.anchors):
        assert level.dtype == torch.float32 and level.shape[0] == len(targets)
        height, width = level.shape[1:]
        assert height * width == len(anchors)
        for i in range(height):
            for j in range(width):
                logits = outputs.token_logits[0, anchor]
                expected = [logits.sigmoid()[row > 0].mean().item() for row in prompt.positive_map]
                assert level[:, i, j].tolist() == pytest.approx(expected, rel=1e-5)
                # And it is the place that the stride says.
                box = anchors[i * width + j]
                center = (box[:2] + box[2:]) / 2
                assert center.tolist() == [(j + 0.5) * stride - 0.5, (i + 0.5) * stride - 0.5]
                anchor += 1


def test_scores_of_boxes_are_those_of_their_places_times_centerness(predictor, tiny):
    (outputs,), found = outputs_of(predictor, tiny.images[0], CLASSES)
    heatmaps = predictor.token_heatmaps(tiny.images[0], CLASSES)
    flat = torch.cat([level.flatten(1) for level in heatmaps.levels], dim=1)
    scores = (flat * outputs.centerness[0].sigmoid()).sqrt()
    for score, target in zip(found.instances.scores, found.instances.pred_classes):
        assert (scores[target] - score).abs().min() < 1e-6
    # The best box is not suppressed.
    assert found.instances.scores[0].item() == pytest.approx(scores.max().item(), abs=1e-6)


def test_chosen_words_have_the_maps_of_all_words(predictor, tiny):
    names = [f"{c} {s}" for c in ("red", "blue", "green", "grey") for s in ("circle", "cross")]
    assert len(predictor._prompts(Classes(names))) > 1
    every = predictor.token_heatmaps(tiny.images[0], names)
    some = predictor.token_heatmaps(tiny.images[0], names, [names[7], names[0]])
    assert some.words == [names[7], names[0]]
    for all_words, chosen in zip(every.levels, some.levels):
        assert torch.equal(all_words[[7, 0]], chosen)


def test_any_words_of_a_caption(predictor, tiny):
    spans = [
        (CAPTION.index(word), CAPTION.index(word) + len(word)) for word in ("blue cross", "red")
    ]
    expected = predictor.token_heatmaps(tiny.images[0], Caption(CAPTION, spans))
    for question in (CAPTION, Expression(CAPTION)):
        found = predictor.token_heatmaps(tiny.images[0], question, ["Blue  cross", "red"])
        assert found.words == ["Blue  cross", "red"]
        for one, other in zip(found.levels, expected.levels):
            assert torch.equal(one, other)


def test_whole_words_come_before_parts_of_words():
    text = "scattered cat, cat"
    query, targets = query_for_words(Caption(text), ["cat", "scat"])
    assert query.spans == (((10, 13),), ((0, 4),)) and targets == {0: "cat", 1: "scat"}


def test_words_that_are_not_asked_for(predictor, tiny):
    image = tiny.images[0]
    for question, words, message in (
        (CLASSES, ["cat"], "'cat' is not among the classes"),
        (CAPTION, ["green"], "'green' is not in the text 'a red circle"),
        (CAPTION, [" "], "' ' is not in the text"),
        (CLASSES, [], "one text or more"),
        (CLASSES, "red", "one text or more"),
    ):
        with pytest.raises(ValueError, match=message):
            predictor.token_heatmaps(image, question, words)


def heatmaps_of(levels, input_size, image_size, words=("a",), strides=(8,)):
    levels = [torch.from_numpy(np.asarray(level, np.float32)) for level in levels]
    return TokenHeatmaps(list(words), levels, strides, input_size, image_size)


def test_upsampling_is_bilinear_between_centres_by_hand():
    rng = np.random.default_rng(0)
    # 21 x 30 pixels of input in 4 x 4 places of 8 pixels; the image is 2.5 times as large.
    values, (height, width) = rng.random((2, 4, 4)).astype(np.float32), (52, 75)
    found = heatmaps_of([values], (21, 30), (height, width), "ab").upsampled().numpy()
    assert found.shape == (2, height, width)
    for y, x in [(0, 0), (51, 74), (20, 33), (31, 3), (7, 70)]:
        # Where the middle of the pixel is, counted in centres of places.
        v = np.clip((y + 0.5) * 21 / height / 8 - 0.5, 0, 3)
        u = np.clip((x + 0.5) * 30 / width / 8 - 0.5, 0, 3)
        i, j = min(int(v), 2), min(int(u), 2)
        dv, du = v - i, u - j
        expected = (
            values[:, i, j] * (1 - dv) * (1 - du)
            + values[:, i, j + 1] * (1 - dv) * du
            + values[:, i + 1, j] * dv * (1 - du)
            + values[:, i + 1, j + 1] * dv * du
        )
        np.testing.assert_allclose(found[:, y, x], expected, atol=1e-5)


def test_the_largest_value_of_all_levels_counts():
    fine, coarse = np.zeros((1, 8, 8)), np.zeros((1, 4, 4))
    fine[0, 2, 5], coarse[0, 2, 1] = 0.9, 0.4
    maps = heatmaps_of([fine, coarse], (64, 64), (64, 64), strides=(8, 16))
    both = maps.upsampled()
    assert torch.equal(both, torch.maximum(maps.upsampled(0), maps.upsampled(1)))
    # Pixels 19.5 and 43.5 are the middle of place 2, 5; its four pixels are nearly there.
    assert both[0, 19:21, 43:45].flatten().tolist() == pytest.approx([0.9 * (15 / 16) ** 2] * 4)
    assert both[0, 39:41, 23:25].flatten().tolist() == pytest.approx([0.4 * (31 / 32) ** 2] * 4)
    assert both.argmax().item() in {y * 64 + x for y in (19, 20) for x in (43, 44)}


def test_a_picture_is_hot_where_the_map_is():
    image = np.full((64, 96, 3), 90, np.uint8)
    hot, cold = np.zeros((8, 12)), np.zeros((8, 12))
    hot[2, 9] = 0.8
    maps = heatmaps_of([[hot, cold]], (64, 96), (64, 96), ("dog", "cat"))
    picture = draw_heatmaps(image, maps, panel_side=192, caption="a dog and a cat").astype(int)
    assert 2 * 192 < picture.shape[1] < 2 * 192 + 40
    # The second word is nowhere: its panel has one colour.
    blocks = [picture[y : y + 128, 212:404] for y in range(100)]
    top = next(y for y, block in enumerate(blocks) if (block == block[0, 0]).all())
    dog, cat = picture[top : top + 128, 10:202], picture[top : top + 128, 212:404]
    # The first one is in one place, whose middle is at 9.5 * 16 and 2.5 * 16.
    warmth = dog.sum(axis=2)
    y, x = np.unravel_index(warmth.argmax(), warmth.shape)
    assert abs(y - 40) <= 2 and abs(x - 152) <= 2
    assert (dog[:, :96] == cat[:, :96]).all()
    levels = draw_heatmaps(
        image,
        heatmaps_of([[hot, cold], np.ones((2, 4, 6))], (64, 96), (64, 96), "ab", (8, 16)),
        per_level=True,
        panel_side=192,
    )
    # Two words below each other, two levels beside each other.
    assert levels.shape[1] == picture.shape[1] and levels.shape[0] > 2 * 128
    with pytest.raises(ValueError, match="96 x 64 pixels high and wide, the heat maps"):
        draw_heatmaps(image.transpose(1, 0, 2), maps)


def test_maps_have_the_size_of_the_image(predictor, tiny):
    image = Image.open(tiny.images[1])
    maps = predictor.token_heatmaps(image, CLASSES)
    assert maps.upsampled().shape == (3, image.height, image.width)
    assert maps.upsampled().max() <= max(level.max() for level in maps.levels)
    assert draw_heatmaps(np.asarray(image.convert("RGB")), maps).ndim == 3
