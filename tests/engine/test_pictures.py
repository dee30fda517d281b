import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.events import EventStorage
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fiber_d2.data.captions import DetectionPrompter
from fiber_d2.data.mapper import FiberDatasetMapper
from fiber_d2.drawing import save_png
from fiber_d2.engine.pictures import (
    OVERVIEW_CELL_WIDTH,
    make_picture_evaluators,
    match_image,
    truth_targets,
    write_overview,
)
from fiber_d2.text import load_tokenizer


def drawn(folder, colors):
    """What an evaluator leaves behind that drew pictures of one colour each, and their sheet."""
    paths = []
    for number, color in enumerate(colors):
        paths.append(folder / f"{number}.png")
        save_png(paths[-1], np.full((40, 600, 3), color, np.uint8))
    paths.append(folder / "contact_sheet.png")
    save_png(paths[-1], np.full((90, 90, 3), 7, np.uint8))
    return SimpleNamespace(paths=paths)


def test_the_overview_holds_the_pictures_of_all_sets_once(tmp_path):
    first = drawn(tmp_path / "pictures" / "a", [[255, 0, 0], [0, 255, 0]])
    second = drawn(tmp_path / "pictures" / "b", [[0, 0, 255]])
    path = write_overview(str(tmp_path), [first, SimpleNamespace(paths=[]), second])
    assert path == tmp_path / "pictures" / "contact_sheet.png"
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB")).reshape(-1, 3)
    area = OVERVIEW_CELL_WIDTH * round(40 * OVERVIEW_CELL_WIDTH / 600)
    for color in ([255, 0, 0], [0, 255, 0], [0, 0, 255]):
        assert (pixels == color).all(axis=1).sum() == area
    # The sheets of the single sets are not pictures of their own.
    assert not (pixels == [7, 7, 7]).all(axis=1).any()


def test_no_overview_without_pictures(tmp_path):
    assert write_overview(str(tmp_path), [SimpleNamespace(paths=[])]) is None
    assert not (tmp_path / "pictures").exists()


def instances_of(boxes, scores, classes):
    instances = Instances((64, 64))
    instances.pred_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.scores = torch.as_tensor(scores, dtype=torch.float32)
    instances.pred_classes = torch.as_tensor(classes, dtype=torch.int64)
    return instances


def test_the_quality_of_an_image_by_hand():
    truth = np.array([[0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50]], float)
    found = instances_of(
        # Of the second box: a good one of another class, half a one of its own.
        [[0, 0, 10, 10], [0, 0, 10, 5], [20, 20, 30, 30], [20, 20, 30, 25]],
        [0.25, 0.9, 0.8, 0.6],
        [3, 3, 3, 5],
    )
    quality, overlaps, matched = match_image(truth, [3, 5, 3], found)
    # IoU 0.5 at 0.9 beats IoU 1 at 0.25.
    assert matched.tolist() == [1, 3, -1]
    assert overlaps == pytest.approx([0.5, 0.5, 0])
    assert quality == pytest.approx((0.45 + 0.3 + 0) / 3)
    nothing = match_image(truth, [3, 5, 3], instances_of([], [], []))
    assert nothing[0] == 0 and nothing[2].tolist() == [-1, -1, -1]


def test_targets_are_numbered_as_prompts_number_them():
    def box(category_id, spans, **more):
        mode = BoxMode.XYWH_ABS
        return {
            **{"bbox": [1, 2, 3, 4], "bbox_mode": mode, "category_id": category_id},
            **{"tokens_positive": spans, **more},
        }

    record = {
        "annotations": [box(7, [[5, 9]], iscrowd=1), box(2, [[0, 3]]), box(1, [[5, 9], [0, 3]])],
        "tokens_positive_eval": [[[5, 9]], [[0, 3], [20, 22]]],
    }
    boxes, targets = truth_targets(record, "detection")
    assert boxes.tolist() == [[1, 2, 4, 6]] * 2 and targets == [2, 1]
    assert truth_targets(record, "grounding")[1] == [1, 0, 1]
    assert truth_targets(record, "refexp")[1] == [0, 0]
    del record["tokens_positive_eval"]
    # Targets are then the different sets of spans, that of the crowd too; a box is of each that
    # it shares a span with.
    assert truth_targets(record, "grounding")[1] == [1, 2, 0, 1, 2]


@pytest.fixture
def pictured(tmp_path):
    """A data set of five images, one without ground truth, and perfect or worse predictions."""
    records = []
    for number in range(5):
        path = tmp_path / f"{number}.png"
        save_png(path, np.full((64, 64, 3), 40 * number, np.uint8))
        annotations = [{"bbox": [8, 8, 30, 30], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}]
        records.append(
            {
                **{"file_name": str(path), "height": 64, "width": 64, "image_id": number},
                "annotations": annotations if number != 3 else [],
            }
        )
    name = f"pictures_{tmp_path.name}"
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(thing_classes=["cat", "red dog"], ground_truth="detection")
    tokenizer = load_tokenizer("shapes")
    mapper = FiberDatasetMapper(
        is_train=False,
        prompter=DetectionPrompter(tokenizer, ["cat", "red dog"]),
        augmentations=[],
    )
    inputs = [mapper(record) for record in records]
    # Qualities 0.9, 0.3, 0, none, 0.6.
    scores = [[0.9], [0.3], [], [0.8], [0.6]]
    outputs = [
        {"instances": instances_of([[8, 8, 38, 38]] * len(s), s, [1] * len(s))} for s in scores
    ]
    yield name, inputs, outputs
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def drawn_names(pictured, folder, kind, limit, with_pixels=True):
    name, inputs, outputs = pictured
    (evaluator,) = make_picture_evaluators(
        name, "shapes", output_dir=str(folder), limit=limit, kind=kind
    )
    evaluator.reset()
    for item, output in zip(inputs, outputs):
        item = dict(item) if with_pixels else {k: v for k, v in item.items() if k != "image"}
        evaluator.process([item], [output])
    evaluator.evaluate()
    return [path.name for path in evaluator.paths], evaluator


@pytest.mark.parametrize("with_pixels", [True, False])
def test_the_best_and_the_worst_images(pictured, tmp_path, with_pixels):
    names, _ = drawn_names(pictured, tmp_path, "best_worst", 1, with_pixels)
    assert names == ["worst_000_2.png", "best_000_0.png", "contact_sheet.png"]
    names, evaluator = drawn_names(pictured, tmp_path, "best_worst", 3, with_pixels)
    # Four images have ground truth; none is drawn twice.
    assert names[:-1] == [
        *("worst_000_2.png", "worst_001_1.png"),
        *("best_000_0.png", "best_001_4.png"),
    ]
    folder = tmp_path / "pictures" / pictured[0]
    assert all((folder / name).exists() for name in names)
    evaluator.log_to(str(tmp_path / "tensorboard"), "sheet")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    # The sheet, and the two worst and the two best pictures by themselves.
    singles = ["worst_000", "worst_001", "best_000", "best_001"]
    assert events.Tags()["images"] == ["sheet", *(f"sheet/{single}" for single in singles)]
    for single, name in zip(singles, names):
        (event,) = events.Images(f"sheet/{single}")
        with Image.open(folder / name) as picture:
            assert (event.width, event.height) == picture.size
            shown = Image.open(io.BytesIO(event.encoded_image_string))
            assert (np.asarray(shown) == np.asarray(picture)).all()


@pytest.mark.parametrize("limit", [2, 5])
def test_a_training_gets_a_few_single_pictures(pictured, tmp_path, limit):
    names, evaluator = drawn_names(pictured, tmp_path, "spread", limit)
    assert len(names) == limit + 1
    with EventStorage(7) as storage:
        evaluator.show(storage, "set/pictures")
    shown = [f"set/pictures/{number:03d}" for number in range(min(limit, 4))]
    assert [tag for tag, _, _ in storage._vis_data] == ["set/pictures", *shown]
    for (_, image, iteration), name in zip(storage._vis_data[1:], names):
        assert iteration == 7
        with Image.open(tmp_path / "pictures" / pictured[0] / name) as picture:
            assert (image.transpose(1, 2, 0) == np.asarray(picture)).all()


def test_a_class_has_one_colour_in_all_pictures_of_a_data_set(pictured, tmp_path):
    _, evaluator = drawn_names(pictured, tmp_path, "best_worst", 2)
    colors = evaluator._colors.of(["cat", "red dog"])
    assert len(set(colors.values())) == 2
    for number in (0, 2):
        (path,) = (tmp_path / "pictures" / pictured[0]).glob(f"*_{number}.png")
        with Image.open(path) as picture:
            pixels = np.asarray(picture)
        assert (pixels == colors["red dog"]).all(axis=2).sum() > 500
        assert not (pixels == colors["cat"]).all(axis=2).any()


def test_many_images_keep_the_extremes_only(pictured, tmp_path):
    name, inputs, outputs = pictured
    repeated = (name, inputs * 6, outputs * 6)
    names, evaluator = drawn_names(repeated, tmp_path, "best_worst", 1)
    # An image that processes show twice is one.
    assert names == ["worst_000_2.png", "best_000_0.png", "contact_sheet.png"]
    assert len(evaluator._kept) <= 4


@pytest.mark.parametrize("with_pixels", [True, False])
def test_the_first_images(pictured, tmp_path, with_pixels):
    names, _ = drawn_names(pictured, tmp_path, "spread", 2, with_pixels)
    assert names == ["000_0.png", "001_1.png", "contact_sheet.png"]


def test_kinds_of_pictures(pictured, tmp_path):
    options = {"output_dir": str(tmp_path), "limit": 0}
    assert make_picture_evaluators(pictured[0], "shapes", **options) == []
    with pytest.raises(ValueError, match="pictures_of is 'all'.*'spread' or 'best_worst'"):
        make_picture_evaluators(pictured[0], "shapes", kind="all", **options)
