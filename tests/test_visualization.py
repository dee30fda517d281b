from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from fiber_d2.text import build_detection_prompts, build_grounding_prompt, load_tokenizer
from fiber_d2.visualization import (
    PredictionDrawer,
    WordColors,
    colors_of_records,
    contact_sheet,
    draw_found,
    draw_predictions,
    draw_record,
    ground_truth_of,
    prompt_words,
    save_png,
)

CAPTION = "the small red circle left of the blue square"
RED, BLUE = (4, 20), (29, 44)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("shapes")


class _Metadata(SimpleNamespace):
    def get(self, key, default=None):
        return getattr(self, key, default)


def _output(boxes, scores, classes, size=(40, 60)):
    instances = Instances(size)
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.scores = torch.tensor(scores, dtype=torch.float32)
    instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
    return {"instances": instances}


def _item(prompt, image_id=1, **more):
    # The model sees the image at twice the size of the file.
    image = torch.full((3, 80, 120), 90, dtype=torch.uint8)
    return {
        "image": image,
        "prompt": prompt,
        "height": 40,
        "width": 60,
        "image_id": image_id,
        **more,
    }


def _difference(picture, other):
    """Bounding box (x1, y1, x2, y2) of where two pictures differ, None where nowhere."""
    rows, columns = np.nonzero((picture != other).any(axis=2))
    return (columns.min(), rows.min(), columns.max(), rows.max()) if len(rows) else None


def test_words_of_a_grounding_prompt(tokenizer):
    prompt = build_grounding_prompt(tokenizer, CAPTION, [[RED], [BLUE], [(10, 13), BLUE]])
    assert prompt_words(prompt, tokenizer) == [
        "small red circle",
        "the blue square",
        "red ... the blue square",
    ]


def test_words_of_detection_prompts_are_the_class_names(tokenizer):
    names = ["red circle", "Öl_kännchen (old)", "x"]
    (prompt,) = build_detection_prompts(tokenizer, names)
    assert prompt_words(prompt, tokenizer) == ["red circle", "Öl kännchen", "x"]


def test_words_by_another_tokenizer_are_an_error(tokenizer):
    other = load_tokenizer(Path(__file__).parent / "fixtures" / "data_eval" / "tokenizer.json")
    prompt = build_grounding_prompt(tokenizer, CAPTION, [[RED]])
    with pytest.raises(ValueError, match="did not make the tokens"):
        prompt_words(prompt, other)


def test_ground_truth_of_detection():
    metadata = _Metadata(ground_truth="detection", thing_classes=["cat", "hot_dog (food)"])
    box = {"bbox": [1, 2, 10, 20], "bbox_mode": BoxMode.XYWH_ABS, "iscrowd": 0}
    record = {
        "annotations": [
            {**box, "category_id": 1},
            {**box, "category_id": 0, "iscrowd": 1},
            {**box, "category_id": 0, "bbox_mode": BoxMode.XYXY_ABS},
        ]
    }
    boxes, words = ground_truth_of(record, metadata)
    assert boxes.tolist() == [[1, 2, 11, 22], [1, 2, 10, 20]]
    assert words == ["hot dog", "cat"]
    boxes, words = ground_truth_of({}, metadata)
    assert boxes.shape == (0, 4) and words == []


def test_ground_truth_of_grounding_and_expressions():
    box = {"bbox": [1, 2, 10, 20], "bbox_mode": BoxMode.XYXY_ABS, "iscrowd": 0}
    record = {
        "caption": CAPTION,
        "annotations": [
            {**box, "tokens_positive": [RED, BLUE]},
            {**box, "tokens_positive": [list(BLUE)]},
        ],
    }
    grounding = _Metadata(ground_truth="grounding")
    # Without phrases to evaluate, an annotation's spans are one target ...
    assert ground_truth_of(record, grounding)[1] == [
        "small red circle ... the blue square",
        "the blue square",
    ]
    # ... and with them, a box shared by two phrases comes once for each.
    record["tokens_positive_eval"] = [[list(RED)], [list(BLUE)]]
    boxes, words = ground_truth_of(record, grounding)
    assert words == ["small red circle", "the blue square", "the blue square"]
    assert boxes.shape == (3, 4)
    assert ground_truth_of(record, _Metadata(ground_truth="refexp"))[1] == [CAPTION] * 2
    with pytest.raises(ValueError, match="ground_truth in the metadata of 'odd' is None"):
        ground_truth_of(record, _Metadata(name="odd"))


def test_boxes_are_drawn_on_their_side_where_they_belong():
    image = np.full((100, 100, 3), 90, np.uint8)
    box = [[20, 40, 50, 80]]
    empty = draw_record(image, [], [], [], [])
    # Two halves of 448 pixels between margins of 10, so a pixel of the image is 4.48 wide.
    for x_start, arguments in ((10, (box, ["a"], [], [])), (468, ([], [], box, ["a"]))):
        picture = draw_record(image, *arguments)
        assert picture.shape == empty.shape
        top = picture.shape[0] - 448 - 10
        x1, y1, x2, y2 = _difference(picture[top:], empty[top:])
        assert abs(x1 - (x_start + 20 * 4.48)) < 6
        assert abs(x2 - (x_start + 50 * 4.48)) < 6
        assert abs(y2 - 80 * 4.48) < 6
        assert y1 < 40 * 4.48  # the label stands above the box


def test_ground_truth_alone():
    image = np.full((60, 80, 3), 90, np.uint8)
    both = draw_record(image, [[5, 5, 40, 40]], ["a cat"], [], [])
    alone = draw_record(image, [[5, 5, 40, 40]], ["a cat"])
    height, width = alone.shape[:2]
    assert both.shape[0] == height and both.shape[1] > 1.9 * width
    # The same half, but for the margin at its right.
    np.testing.assert_array_equal(alone[:, : width - 20], both[:, : width - 20])
    with pytest.raises(ValueError, match="its words"):
        draw_record(image, [], [], pred_words=["a cat"])


def test_same_words_have_the_same_colour_on_both_sides():
    image = np.full((64, 64, 3), 90, np.uint8)
    boxes = [[4, 20, 28, 60], [34, 20, 60, 60]]
    picture = draw_record(image, boxes, ["a", "b"], boxes[::-1], ["b", "a"])
    top = picture.shape[0] - 448 - 10
    left, right = picture[top : top + 448, 10:458], picture[top : top + 448, 468:916]
    bottom = slice(60 * 7 - 2, 60 * 7 + 2)
    assert (left[bottom] == right[bottom]).all()
    first, second = left[60 * 7, 16 * 7], left[60 * 7, 47 * 7]
    assert (first != second).any() and (first != 90).any() and (second != 90).any()


def test_words_of_a_data_set_keep_their_colours():
    def record(*classes):
        box = {"bbox": [1, 2, 10, 20], "bbox_mode": BoxMode.XYXY_ABS}
        return {"annotations": [{**box, "category_id": i} for i in classes]}

    names = [f"class_{number}" for number in range(60)]
    rng = np.random.default_rng(0)
    records = [record(*rng.choice(60, 6, replace=False)) for _ in range(20)]
    metadata = _Metadata(ground_truth="detection", thing_classes=names)
    colors = colors_of_records(records, metadata)
    everywhere = colors.of([name.replace("_", " ") for name in names])
    for one in records:
        words = ground_truth_of(one, metadata)[1]
        assert colors.of(words) == {word: everywhere[word] for word in words}
        assert len(set(colors.of(words).values())) == 6
    few = _Metadata(ground_truth="detection", thing_classes=names[:16])
    assert (
        len({*colors_of_records([], few).of([n.replace("_", " ") for n in names[:16]]).values()})
        == 16
    )


@pytest.mark.parametrize("side", [64, 300, 4000])
def test_pictures_of_the_images_own_size(side):
    image = np.full((side, side // 2, 3), 90, np.uint8)
    boxes = [[side * 0.1, side * 0.2, side * 0.4, side * 0.9]]
    picture = draw_found(image, boxes, ["a cat"], [0.5], caption="a cat " * 100, panel_side=None)
    # At least as large as labels need.
    assert max(side, 448) < picture.shape[0] < 1.4 * max(side, 448)
    color = WordColors().of(["a cat"])["a cat"]
    found = (picture == color).all(axis=2).any(axis=0)
    x1, x2 = np.flatnonzero(found)[[0, -1]]
    scale = max(side, 448) / side
    assert abs(x1 - (10 + 0.1 * side * scale)) < 0.02 * side * scale + 3
    assert abs(x2 - (10 + 0.4 * side * scale)) < 0.02 * side * scale + 3


def test_captions_and_extreme_shapes_fit():
    wide, tall = np.zeros((8, 400, 3), np.uint8), np.zeros((400, 8, 3), np.uint8)
    for image in (wide, tall):
        short, long = (
            draw_record(image, [[1, 1, 7, 7]], ["word " * 30], [], [], caption=text)
            for text in ("", "word " * 200)
        )
        assert short.shape[1] == long.shape[1] >= 448
        assert 40 < long.shape[0] - short.shape[0] < 100  # three lines, not thirty


def test_unequal_counts_are_an_error():
    image = np.zeros((10, 10, 3), np.uint8)
    box = [[1, 1, 5, 5]]
    for arguments in ((box, [], [], []), ([], [], box, []), ([], [], box, ["a"], [0.1, 0.2])):
        with pytest.raises(ValueError, match="Every box needs its words"):
            draw_record(image, *arguments)


def test_contact_sheet_holds_every_picture():
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    pictures = [np.full((50 + 10 * i, 80, 3), c, np.uint8) for i, c in enumerate(colors)]
    sheet = contact_sheet(pictures, columns=3)
    for picture, color in zip(pictures, colors):
        assert (sheet == color).all(axis=2).sum() == picture.shape[0] * 80
    small = contact_sheet(pictures, columns=3, cell_width=40)
    assert small.shape[1] == 3 * 40 + 4 * 10
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([])


def test_save_png_is_lossless_and_leaves_nothing_else(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    save_png(tmp_path / "new" / "a.png", image)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.png"]
    assert (np.asarray(Image.open(tmp_path / "new" / "a.png")) == image).all()


def _record_calls(monkeypatch):
    calls = []

    def _draw(image, *args, **kwargs):
        calls.append((image, *args, kwargs))
        return np.zeros((20, 20, 3), np.uint8)

    monkeypatch.setattr("fiber_d2.visualization.draw_record", _draw)
    return calls


def test_grounding_draws_the_best_box_of_each_phrase(tokenizer, monkeypatch):
    calls = _record_calls(monkeypatch)
    item = _item(build_grounding_prompt(tokenizer, CAPTION, [[RED], [BLUE]]), caption=CAPTION)
    item["image"][0] = 200  # blue, in BGR
    output = _output(
        [[0, 0, 9, 9], [1, 1, 5, 5], [2, 2, 6, 6], [3, 3, 7, 7]], [0.9, 0.8, 0.2, 0.1], [1, 1, 0, 0]
    )
    truth = (np.array([[1.0, 2.0, 3.0, 4.0]]), ["small red circle"])
    draw_predictions([item], [output], [truth], tokenizer=tokenizer)
    ((image, gt_boxes, gt_words, boxes, words, scores, options),) = calls
    assert image[0, 0].tolist() == [90, 90, 200]  # RGB
    assert gt_boxes.tolist() == [[2, 4, 6, 8]] and gt_words == ["small red circle"]
    assert boxes.tolist() == [[4, 4, 12, 12], [0, 0, 18, 18]]
    assert words == ["small red circle", "the blue square"]
    assert scores == pytest.approx([0.2, 0.9])
    assert options["caption"] == CAPTION


def test_detection_draws_all_boxes_above_the_threshold(tokenizer, monkeypatch):
    calls = _record_calls(monkeypatch)
    prompts = build_detection_prompts(tokenizer, ["red circle", "cat", "dog"], max_classes=2)
    assert len(prompts) == 2
    output = _output([[0, 0, 9, 9]] * 4, [0.9, 0.5, 0.45, 0.1], [2, 0, 0, 1])
    draw_predictions(
        [_item(prompts)], [output], [(np.zeros((0, 4)), [])], tokenizer=tokenizer, score_thresh=0.45
    )
    assert calls[0][4] == ["dog", "red circle", "red circle"]


def test_an_expression_tied_to_its_head_noun_is_named_by_the_whole(tokenizer, monkeypatch):
    calls = _record_calls(monkeypatch)
    item = _item(build_grounding_prompt(tokenizer, CAPTION, [[(14, 20)]]), caption=CAPTION)
    truth = (np.array([[1.0, 2.0, 3.0, 4.0]]), [CAPTION])
    draw_predictions([item], [_output([[0, 0, 9, 9]], [0.3], [0])], [truth], tokenizer=tokenizer)
    assert calls[0][4] == [CAPTION]


def test_drawer_writes_the_first_images_and_a_sheet(tokenizer, tmp_path):
    prompt = build_grounding_prompt(tokenizer, CAPTION, [[RED], [BLUE]])
    drawer = PredictionDrawer(tmp_path, limit=4, tokenizer=tokenizer)
    truth = (np.array([[1.0, 2.0, 30.0, 20.0]]), ["small red circle"])
    output = _output([[0, 0, 9, 9]], [0.9], [1])
    for batch in range(3):
        assert drawer.full == (batch == 2)
        items = [
            _item(prompt, image_id=f"{batch}/{i}", caption=CAPTION, file_name=f"{batch}.png")
            for i in range(3)
        ]
        # The second image of the batch has no prediction at all.
        drawer.process(items, [output, _output([], [], []), output], [truth] * 3)
    paths = drawer.finish()
    assert [path.name for path in paths] == [
        "000_0_0.png",
        "001_0_1.png",  # and the third of the same file is left out
        "002_1_0.png",
        "003_1_1.png",
        "contact_sheet.png",
    ]
    assert sorted(tmp_path.iterdir()) == paths
    assert Image.open(paths[0]).size == (2 * 448 + 30, Image.open(paths[0]).size[1])


def test_drawer_without_images_writes_nothing(tokenizer, tmp_path):
    assert PredictionDrawer(tmp_path / "none", tokenizer=tokenizer).finish() == []
    assert not (tmp_path / "none").exists()
