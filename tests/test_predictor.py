"""The predictor against the evaluation pipeline, its inputs, questions, limits and threads."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from fiber_d2.config import add_fiber_config
from fiber_d2.predictions import coco_dataset
from fiber_d2.predictor import (
    Caption,
    Classes,
    Expression,
    Predictor,
    find_config,
    shipped_configs,
)
from fiber_d2.queries import as_query, find_noun_phrases

CLASSES = ["red circle", "blue cross", "green triangle"]
CAPTION = "a red circle left of the blue cross"


@pytest.fixture(scope="module")
def predictor(tiny):
    return Predictor(tiny.config, tiny.weights, device="cpu")


@pytest.fixture
def data_set(tiny):
    """``data_set(**metadata and record entries) -> name`` of a data set of the two images."""
    name = "predictor_test"

    def register(metadata, **entries):
        records = []
        for path in tiny.images:
            width, height = Image.open(path).size
            records.append(
                {
                    "file_name": str(path),
                    "image_id": path.stem,
                    "height": height,
                    "width": width,
                    "annotations": [],
                    **entries,
                }
            )
        DatasetCatalog.register(name, lambda: records)
        MetadataCatalog.get(name).set(**metadata)
        return name

    yield register
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def same(one, other):
    return all(
        torch.equal(a, b)
        for a, b in (
            (one.pred_boxes.tensor, other.pred_boxes.tensor),
            (one.scores, other.scores),
            (one.pred_classes, other.pred_classes),
        )
    )


@pytest.mark.parametrize(
    "question, metadata, entries",
    [
        (CLASSES, {"ground_truth": "detection", "thing_classes": CLASSES}, {}),
        (
            Classes(CLASSES, templates="a {} on paper"),
            {
                "ground_truth": "detection",
                "thing_classes": CLASSES,
                "prompts": "a {} on paper",
            },
            {},
        ),
        (
            Caption(CAPTION, spans=[(0, 12), [(21, 25), (30, 35)]]),
            {"ground_truth": "grounding"},
            {"caption": CAPTION, "tokens_positive_eval": [[(0, 12)], [(21, 25), (30, 35)]]},
        ),
        (Expression(CAPTION), {"ground_truth": "refexp"}, {"caption": CAPTION}),
    ],
    ids=["classes", "templates", "caption", "expression"],
)
def test_equals_the_evaluation_pipeline_to_the_last_bit(
    tiny, predictor, data_set, question, metadata, entries
):
    cfg = LazyConfig.load(str(tiny.config))
    cfg.dataloader.test.dataset = data_set(metadata, **entries)
    model = instantiate(cfg.model).eval()
    model.load_state_dict(torch.load(tiny.weights, weights_only=True)["model"])
    for batch, path in zip(instantiate(cfg.dataloader.test), tiny.images):
        with torch.no_grad():
            expected = model(batch)[0]["instances"]
        found = predictor(path, question)
        assert len(expected) and same(found["instances"], expected)
        assert found["instances"].image_size == expected.image_size


def test_precision(tiny, predictor):
    image = tiny.images[0]
    plain = predictor(image, CLASSES)["instances"]
    low = Predictor(tiny.config, tiny.weights, device="cpu", precision="bfloat16")
    found = low(image, CLASSES)["instances"]
    with torch.autocast("cpu", torch.bfloat16):
        expected = predictor(image, CLASSES)["instances"]
    assert same(found, expected) and not same(found, plain)
    maps = low.token_heatmaps(image, CLASSES).levels
    exact = predictor.token_heatmaps(image, CLASSES).levels
    for ours, theirs in zip(maps, exact):
        assert ours.dtype == torch.float32 and not torch.equal(ours, theirs)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)

    override = ["model.inference_precision=bfloat16"]
    by_name = Predictor(tiny.config, tiny.weights, device="cpu", overrides=override)
    assert same(by_name(image, CLASSES)["instances"], expected)
    back = Predictor(
        tiny.config, tiny.weights, device="cpu", precision="float32", overrides=override
    )
    assert same(back(image, CLASSES)["instances"], plain)
    with pytest.raises(ValueError, match="'int8' is not known"):
        Predictor(tiny.config, tiny.weights, precision="int8")


def test_more_classes_than_a_caption_holds(predictor, tiny):
    names = [f"{c} {s}" for c in ("red", "blue", "green", "grey") for s in ("circle", "cross")]
    found = predictor(tiny.images[0], names)
    assert len(predictor._prompts(as_query(names))) > 1
    assert found["words"] == [names[i] for i in found["instances"].pred_classes.tolist()]
    assert found["instances"].pred_classes.max() > 4


def test_all_kinds_of_images_are_one_image(predictor, tiny):
    path = tiny.images[0]
    pil = Image.open(path)
    rgb = np.array(pil)
    bgr = np.ascontiguousarray(rgb[:, :, ::-1])
    expected = predictor(str(path), CLASSES)["instances"]
    for image, order in [
        (path, "BGR"),
        (pil, "RGB"),
        (rgb, "RGB"),
        (bgr, "BGR"),
        (torch.from_numpy(bgr).permute(2, 0, 1), "BGR"),
        (torch.from_numpy(rgb).permute(2, 0, 1), "RGB"),
    ]:
        assert same(predictor(image, CLASSES, image_format=order)["instances"], expected)
    assert not same(predictor(rgb, CLASSES)["instances"], expected)
    assert (rgb == np.array(Image.open(path))).all()
    grey = predictor(rgb[:, :, 0], CLASSES)["instances"]
    assert same(grey, predictor(np.repeat(rgb[:, :, :1], 3, 2), CLASSES)["instances"])


def test_pil_images_are_turned_as_their_files_say(predictor, tiny, tmp_path):
    image = Image.open(tiny.images[0])
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    path = tmp_path / "turned.png"
    image.save(path, exif=exif)
    turned = predictor(path, CLASSES)["instances"]
    assert turned.image_size == image.size  # height is now what was the width
    assert same(predictor(Image.open(path), CLASSES)["instances"], turned)


def test_lists_of_images_with_one_question_or_one_each(predictor, tiny):
    questions = [Classes(CLASSES), Expression(CAPTION)]
    found = predictor(tiny.images, questions)
    for path, question, one in zip(tiny.images, questions, found):
        assert same(one["instances"], predictor(path, question)["instances"])
    assert [len(f["targets"]) for f in predictor(tiny.images * 5, CLASSES)] == [3] * 10
    assert predictor([], CLASSES) == []
    with pytest.raises(ValueError, match="2 questions are asked about 1 images"):
        predictor(tiny.images[:1], questions)
    with pytest.raises(ValueError, match="2 questions are asked about one image"):
        predictor(tiny.images[0], questions)


def test_limits_of_a_call_do_not_outlive_it(predictor, tiny):
    path = tiny.images[0]
    everything = predictor(path, CLASSES)["instances"]
    middle = everything.scores[7].item()
    assert same(predictor(path, CLASSES, threshold=middle)["instances"], everything[:8])
    assert same(predictor(path, CLASSES, max_detections=3)["instances"], everything[:3])
    crowded = predictor(path, CLASSES, nms_thresh=1.0)["instances"]
    assert not same(crowded, everything)
    assert same(predictor(path, CLASSES)["instances"], everything)
    for wrong in ({"threshold": 40}, {"nms_thresh": -1}, {"max_detections": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            predictor(path, CLASSES, **wrong)


def test_a_low_threshold_is_honoured(tiny):
    """The configuration would cut candidates that the call asks for."""
    strict = Predictor(
        tiny.config,
        tiny.weights,
        device="cpu",
        overrides=["model.head.postprocessor.score_thresh=0.99"],
    )
    assert not len(strict(tiny.images[0], CLASSES)["instances"])
    free = Predictor(tiny.config, tiny.weights, device="cpu", threshold=0.01)
    expected = free(tiny.images[0], CLASSES)["instances"]
    assert len(expected)
    assert same(strict(tiny.images[0], CLASSES, threshold=0.01)["instances"], expected)


def test_threads_get_what_one_alone_gets(tiny):
    predictor = Predictor(tiny.config, tiny.weights, device="cpu")
    jobs = [
        (path, question, threshold)
        for path in tiny.images
        for question in (CLASSES, CAPTION, Expression(CAPTION))
        for threshold in (None, 0.05)
    ]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: predictor(*job[:2], threshold=job[2]), jobs))
    alone = Predictor(tiny.config, tiny.weights, device="cpu")
    for (path, question, threshold), one in zip(jobs, found):
        assert same(one["instances"], alone(path, question, threshold=threshold)["instances"])


def test_a_text_is_tokenised_once(predictor, tiny, monkeypatch):
    made = []
    make = Expression.prompts
    monkeypatch.setattr(
        Expression, "prompts", lambda self, *args: made.append(self.text) or make(self, *args)
    )
    for text in ("a blue thing", "a red thing", "a blue thing"):
        predictor(tiny.images[0], Expression(text))
    assert made == ["a blue thing", "a red thing"]


def test_forms_of_a_result(predictor, tiny, monkeypatch):
    found = predictor(tiny.images[0], CLASSES, max_detections=5)
    instances = found["instances"]
    plain = json.loads(json.dumps(found.to_dict()))
    assert (plain["width"], plain["height"]) == (80, 70) and plain["targets"] == CLASSES
    assert [d["words"] for d in plain["detections"]] == found["words"]
    assert [d["box"] for d in plain["detections"]] == instances.pred_boxes.tensor.tolist()
    coco = found.to_coco(17, category_ids=[4, 9, 2])
    for result, box, target in zip(coco, instances.pred_boxes, instances.pred_classes.tolist()):
        x, y, w, h = result["bbox"]
        assert [x, y, x + w, y + h] == pytest.approx(box.tolist(), abs=1e-4)
        assert (result["image_id"], result["category_id"]) == (17, [4, 9, 2][target])
    with pytest.raises(ValueError, match="2 category ids for 3 targets"):
        found.to_coco(17, category_ids=[4, 9])
    best = predictor(tiny.images[0], CLASSES).best()
    assert len(set(best["words"])) == len(best["words"]) == len(best["instances"])
    assert best["instances"].scores[0] == instances.scores[0]
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        found.to_supervision()


def test_supervision_gets_arrays(predictor, tiny, monkeypatch):
    """Only what is handed over: the library itself is no requirement."""
    library = type(sys)("supervision")
    library.Detections = lambda **arrays: arrays
    monkeypatch.setitem(sys.modules, "supervision", library)
    found = predictor(tiny.images[0], CLASSES)
    arrays = found.to_supervision()
    assert arrays["xyxy"].shape == (len(found["words"]), 4)
    assert arrays["class_id"].tolist() == found["instances"].pred_classes.tolist()
    assert arrays["data"]["class_name"].tolist() == found["words"]


def test_coco_file_is_read_by_pycocotools(predictor, tiny, tmp_path):
    from pycocotools.coco import COCO

    found = {path.name: predictor(path, CLASSES[::step]) for path, step in
             zip(tiny.images, (1, -1))}  # fmt: skip
    path = tmp_path / "found.json"
    path.write_text(json.dumps(coco_dataset(found)))
    coco = COCO(str(path))
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == CLASSES
    for image in coco.loadImgs(coco.getImgIds()):
        rows = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
        names = [coco.cats[row["category_id"]]["name"] for row in rows]
        assert names == found[image["file_name"]]["words"]


@pytest.mark.parametrize(
    "caption, phrases",
    [
        ("a dog chases a cat", ["a dog", "a cat"]),
        ("the cup left of the plate", ["the cup", "the plate"]),
        ("the left cup", ["the left cup"]),
        ("A man in a blue shirt is riding a horse.", ["A man", "a blue shirt", "a horse"]),
        ("cat. dog. traffic light.", ["cat", "dog", "traffic light"]),
        ("all the people near their tall house", ["all the people", "their tall house"]),
        ("a T-shirt, l'été and ein Käfer", ["a T-shirt", "l'été", "ein Käfer"]),
        ("  running  ", ["running"]),
        ("?!", ["?!"]),
    ],
)
def test_noun_phrases(caption, phrases):
    spans = find_noun_phrases(caption)
    assert [caption[begin:end] for ((begin, end),) in spans] == phrases
    assert Caption(caption).words == phrases


def test_yaml_configuration(tmp_path, tiny):
    """Both kinds of configuration describe one pipeline."""
    cfg = get_cfg()
    add_fiber_config(cfg)
    fiber = cfg.MODEL.FIBER
    tiny_model = LazyConfig.load(str(tiny.config)).model
    for node, values in (
        (fiber.VISION, tiny_model.backbone.vision),
        (fiber.TEXT, tiny_model.backbone.text),
        (fiber.NECK, tiny_model.backbone.neck),
        (fiber.TOWER, tiny_model.head.tower),
        (fiber.ANCHORS, tiny_model.head.anchors),
        (fiber.POSTPROCESS, tiny_model.head.postprocessor),
    ):
        for key, value in values.items():
            if key.upper() in node:
                node[key.upper()] = list(value) if hasattr(value, "append") else value
    cfg.FIBER.TOKENIZER, cfg.FIBER.MAX_TOKENS = "shapes", 24
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 96
    cfg.MODEL.WEIGHTS = str(tiny.weights)
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    expected = Predictor(tiny.config, tiny.weights, device="cpu")(tiny.images[1], CLASSES)
    for given in (cfg, path):
        found = Predictor(given, device="cpu")(tiny.images[1], CLASSES)
        assert same(found["instances"], expected["instances"])


def test_configurations_that_come_with_the_package():
    names = shipped_configs()
    assert {"quickstart", "FIBER-B", "eval/coco_zeroshot"} <= set(names)
    assert not [name for name in names if name.startswith("common")]
    assert find_config("quickstart").endswith("configs/quickstart.py")
    with pytest.raises(FileNotFoundError, match="quickstop is neither a file .* quickstart"):
        find_config("quickstop")


def test_mistakes_have_plain_messages(predictor, tiny, tmp_path):
    with pytest.raises(ValueError, match="no weights"):
        Predictor(tiny.config)
    with pytest.raises(FileNotFoundError, match="absent.pth does not exist"):
        Predictor(tiny.config, tmp_path / "absent.pth")
    with pytest.raises(ValueError, match="type int is not known"):
        Predictor(3, tiny.weights)
    with pytest.raises(ValueError, match="not known to torch"):
        Predictor(tiny.config, tiny.weights, device="abacus")
    image = np.zeros((8, 8, 3), np.uint8)
    for wrong, message in (
        (tmp_path / "absent.png", "does not exist"),
        (tiny.config, "no image"),
        (image / 255, "uint8"),
        (image[None], "no image"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"has to be \(3, H, W\)"),
        (3, "type int"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            predictor(wrong, CLASSES)
    with pytest.raises(ValueError, match="'BGR' or 'RGB'"):
        predictor(image, CLASSES, image_format="rgb")
    for wrong, message in (
        ("", "text with words"),
        ([], "one name or more"),
        (["cat", 3], "there is 3"),
        (7, "list of class names"),
        (Expression("a red circle " * 20), "tokens"),
        (["(x)"], "no token"),
    ):
        with pytest.raises(ValueError, match=message):
            predictor(image, wrong)
    with pytest.raises(ValueError, match="characters"):
        Caption("a cat", spans=[3])
    with pytest.raises(ValueError, match="outside of the caption"):
        predictor(image, Caption("a cat", spans=[(0, 99)]))
