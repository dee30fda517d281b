"""Each check finds the damage it is for, in a file that is good otherwise."""

from __future__ import annotations

import base64
import copy
import json
from collections import Counter
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from fiber_d2.data import register_coco_json
from fiber_d2.data.tsv import load_tsv_dataset, write_tsv
from fiber_d2.data.validation import (
    CHECKS,
    Options,
    draw_samples,
    source_of_dataset,
    source_of_json,
    validate,
)
from fiber_d2.data.validation.values import mark_spans
from fiber_d2.text import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("shapes")


@pytest.fixture
def check(tmp_path, coco, tokenizer):
    """``check(content, kind, **options)`` -> findings; image files are not looked at."""
    root = coco[2]

    def check(content, kind, **options):
        path = tmp_path / "damaged.json"
        path.write_text(json.dumps(content))
        source = source_of_json(str(path), root, kind=kind)
        options = {"workers": 0, "read_images": False, **options}
        report = validate([source], Options(tokenizer, **options))
        assert report.stopped is None
        return report.findings

    return check


@pytest.fixture
def detection(coco):
    content = coco[0]
    content["annotations"][2]["bbox"] = [20, 10, 20, 20]
    return content


@pytest.fixture
def sentences(grounding):
    content = copy.deepcopy(grounding[0])
    content["annotations"][2]["bbox"] = [20, 10, 20, 20]
    return content


@pytest.fixture
def expressions(sentences):
    sentences["images"] = sentences["images"][1:5]
    sentences["annotations"] = sentences["annotations"][3:]
    return sentences


def put(kind, index, **values):
    """A damage: set, or (for None) delete values of an entry."""

    def damage(content):
        for key, value in values.items():
            if value is None:
                del content[kind][index][key]
            else:
                content[kind][index][key] = value

    return damage


def add(kind, entry):
    return lambda content: content[kind].append(entry)


IMAGE, BOX, CATEGORY = "images", "annotations", "categories"
NEW_CATEGORY = {"id": 20, "name": "dog"}
CROWD = "box-crowd"  # the good file has one

# (check, further checks that the damage entails, damage, part of the first offender)
SCHEMA = [
    ("lists", set(), lambda c: c.pop(BOX), BOX),
    ("lists", {"unknown-image"}, lambda c: c.pop(IMAGE), IMAGE),
    ("lists", set(), lambda c: c.pop(CATEGORY), CATEGORY),
    ("no-images", {"unknown-image"}, lambda c: c[IMAGE].clear(), "no usable"),
    ("no-categories", {"unknown-category"}, lambda c: c[CATEGORY].clear(), ""),
    ("image-entry", set(), add(IMAGE, 5), "entry 6"),
    ("image-entry", {"unknown-image"}, put(IMAGE, 1, id=1.5), "entry 1"),
    ("image-entry", set(), put(IMAGE, 1, file_name=7), "7"),
    ("image-entry", set(), put(IMAGE, 1, file_name="."), "'.'"),
    ("image-entry", set(), put(IMAGE, 1, file_name="a\0b"), "x00"),
    ("image-size-entry", set(), put(IMAGE, 1, width=None), "width None"),
    ("image-size-entry", set(), put(IMAGE, 1, height="30"), "'30'"),
    ("image-size-entry", set(), put(IMAGE, 1, height=0), "height 0"),
    ("image-id-repeated", {"unknown-image"}, put(IMAGE, 1, id=10), "entry 1"),
    ("image-ids-mixed", set(), put(IMAGE, 5, id="x"), "5 image ids are numbers, 1 are text"),
    ("image-path", set(), put(IMAGE, 1, file_name="a/../../x.png"), "leads out of"),
    ("image-path", set(), put(IMAGE, 1, file_name="/etc/x.png"), "leads out of"),
    ("annotation-entry", set(), add(BOX, "x"), "entry 7"),
    ("annotation-entry", set(), put(BOX, 1, image_id=None), "image_id is None"),
    ("annotation-id-missing", set(), put(BOX, 1, id=None), "entry 1"),
    ("annotation-id-repeated", set(), put(BOX, 1, id=1), "entries 0 and 1"),
    ("unknown-image", set(), put(BOX, 1, image_id=99), "99"),
    ("unknown-image", set(), put(BOX, 1, image_id="10"), "text and numbers are different"),
    ("unknown-category", set(), put(BOX, 1, category_id=8), "8"),
    ("unknown-category", set(), put(BOX, 1, category_id=[3]), "[3]"),
    ("category-entry", {"unknown-category"}, put(CATEGORY, 1, id=None), "entry 1"),
    ("category-entry", set(), put(CATEGORY, 1, name=4), "name 4"),
    ("category-id-repeated", {"unknown-category"}, put(CATEGORY, 1, id=7), "'hot_dog' and 'cat'"),
    ("category-name-repeated", set(), put(CATEGORY, 1, name="bus"), "categories 3 and 9"),
    ("category-background", set(), add(CATEGORY, {"id": 0, "name": "background"}), "background"),
    ("category-background", set(), put(CATEGORY, 1, name="__background__"), "background"),
    ("category-unused", set(), add(CATEGORY, NEW_CATEGORY), "'dog'"),
]
BOXES = [
    ("box-entry", set(), put(BOX, 0, bbox=[1, 2, 3]), "[1, 2, 3]"),
    ("box-entry", set(), put(BOX, 0, bbox=[1, 2, 3, float("nan")]), "nan"),
    ("box-entry", set(), put(BOX, 0, bbox=[1, 2, 3, "4"]), "'4'"),
    ("box-entry", set(), put(BOX, 0, bbox=None), "None"),
    ("box-empty", set(), put(BOX, 0, bbox=[1, 2, 0, 4]), "[1, 2, 0, 4]"),
    ("box-empty", set(), put(BOX, 0, bbox=[5, 2, -3, 4]), "-3"),
    ("box-outside", set(), put(BOX, 0, bbox=[40, 2, 3, 4]), "40 x 30"),
    ("box-outside", set(), put(BOX, 0, bbox=[2, -9, 3, 9]), "-9"),
    ("box-outside", set(), put(BOX, 0, bbox=[1e308, 0, 1e308, 9]), "1e+308"),
    ("box-beyond", set(), put(BOX, 0, bbox=[-1.5, 2, 3, 4]), "-1.5"),
    ("box-beyond", set(), put(BOX, 0, bbox=[38, 2, 3.5, 4]), "3.5"),
    ("box-area", set(), put(BOX, 0, area=-1), "area -1"),
    ("box-area", set(), put(BOX, 0, area=9), "area 9"),
    ("box-area", set(), put(BOX, 0, area=500, segmentation=[[1, 2, 3, 4, 5, 6]]), "area 500"),
]


def compare(found, before, expected, entailed, text):
    """Only the expected check, and what is entailed or a note, has found more than before."""
    counts = Counter(finding.check for finding in found)
    counts.subtract(Counter(finding.check for finding in before))
    new = {name for name, count in counts.items() if count > 0}
    notes = {name for name in new if CHECKS[name].level == "info"}
    assert expected in new and new - notes <= {expected, *entailed}, found
    offender = next(f for f in found if f.check == expected and f not in before)
    assert text in offender.message
    return offender


@pytest.mark.parametrize(("expected", "entailed", "damage", "text"), SCHEMA + BOXES)
def test_damaged_detection(expected, entailed, damage, text, detection, check):
    good = check(detection, "detection")
    assert {f.check for f in good} == {CROWD, "image-without-annotations", "class-captions"}
    damage(detection)
    # Captions are another matter: the classes are others now.
    found = [f for f in check(detection, "detection") if f.check != "class-captions"]
    offender = compare(found, good, expected, entailed, text)
    if (expected, damage) in [(row[0], row[2]) for row in BOXES]:
        assert (offender.image_id, offender.annotation_id, offender.file_name) == (10, 1, "0.png")


def test_a_pixel_of_overhang_and_fitting_areas_are_fine(detection, check):
    put(BOX, 0, bbox=[-1, -1, 42, 32], area=1300)(detection)
    put(BOX, 1, area=12, segmentation={"counts": "abc", "size": [30, 40]})(detection)
    assert not any(f.check.startswith("box") and f.check != CROWD for f in check(detection, None))


def test_everything_is_collected(detection, check):
    for damage in (SCHEMA[6][2], SCHEMA[22][2], BOXES[0][2], BOXES[4][2]):
        damage(detection)
    put(BOX, 3, bbox=[99, 1, 2, 2])(detection)
    checks = Counter(f.check for f in check(detection, "detection"))
    assert checks["unknown-image"] >= 1 and checks["image-entry"] == 1
    assert checks["box-empty"] == 1


@pytest.mark.parametrize("text", ["hello", '{"images": [', "[" * 100_000, "[1, 2]", "\ufeff{}"])
def test_not_json(text, tmp_path, tokenizer):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    source = source_of_json(str(tmp_path / "a.json"), str(tmp_path))
    report = validate([source], Options(tokenizer))
    assert report.has_errors and report.findings[0].check in ("json", "lists")


KITE = "a red kite on the right side"  # the caption of image 11, which has annotation 4


def spans(value):
    return put(BOX, 3, tokens_positive=value)


def phrases(value):
    return put(IMAGE, 1, tokens_positive_eval=value)


# (check, damage, part of the message, the marked caption)
CAPTIONS = [
    ("caption-entry", put(IMAGE, 1, caption=None), "None", None),
    ("caption-entry", put(IMAGE, 1, caption="  "), "'  '", None),
    ("caption-entry", put(IMAGE, 1, caption="a \ud800"), "ud800", None),
    ("span-entry", spans(None), "None", KITE),
    ("span-entry", spans([0, 10]), "[0, 10]", KITE),
    ("span-entry", spans([[0, 1.5]]), "1.5", KITE),
    ("span-entry", phrases([[0, 5]]), "phrase 0", KITE),
    ("span-range", spans([[2, 99]]), "[2, 99)", "a [red kite on the right side]"),
    ("span-range", spans([[-2, 5]]), "[-2, 5)", "[a red] kite on the right side"),
    ("span-range", phrases([[[0, 5]], [[2, 99]]]), "phrase 1", "a [red kite on the right side]"),
    ("span-reversed", spans([[5, 2]]), "[5, 2)", None),
    ("span-empty", spans([[5, 5]]), "[5, 5)", "a red[] kite on the right side"),
    ("span-no-token", spans([[5, 6]]), "' '", "a red[ ]kite on the right side"),
    ("span-none", spans([]), "no span", KITE),
]


@pytest.mark.parametrize(("expected", "damage", "text", "caption"), CAPTIONS)
def test_damaged_captions(expected, damage, text, caption, sentences, check):
    good = check(sentences, "grounding")
    assert {f.check for f in good} == {CROWD, "image-without-annotations"}
    damage(sentences)
    offender = compare(check(sentences, "grounding"), good, expected, set(), text)
    assert offender.image_id == 11
    if expected != "caption-entry" and "phrase" not in text:
        assert offender.annotation_id == 4
    if caption is not None:
        assert offender.caption == caption


def test_token_limit(sentences, check, tokenizer):
    """A caption is too long by a token, then its last phrase is cut, the first is not."""
    put(IMAGE, 1, caption="a red kite")(sentences)
    tokens = len(tokenizer(sentences["images"][0]["caption"])["input_ids"])
    assert not [f for f in check(sentences, "grounding", max_tokens=tokens) if f.level == "error"]
    found = check(sentences, "grounding", max_tokens=tokens - 1)
    assert [(f.check, f.image_id) for f in found if f.check == "caption-long"] == [
        ("caption-long", 10)
    ]
    cut = [f for f in found if f.check == "span-cut"]
    assert {f.annotation_id for f in cut} == {3, None}
    assert cut[0].caption == "the dog left o[f a b]i[g cat]"
    assert "phrase 1" in next(f.message for f in cut if f.annotation_id is None)


def test_expressions(expressions, check):
    assert not check(expressions, "refexp")
    put(BOX, 0, tokens_positive=[])(expressions)  # stands for the whole
    assert not check(expressions, "refexp")
    assert [f.check for f in check(expressions, "grounding")] == ["span-none"]
    put(BOX, 0, tokens_positive=None)(expressions)
    put(BOX, 1, image_id=11, tokens_positive=[])(expressions)
    found = Counter((f.check, f.image_id) for f in check(expressions, "refexp"))
    assert found == {
        ("span-entry", 11): 1,
        ("expression-boxes", 11): 1,
        ("expression-boxes", 12): 1,
        ("image-without-annotations", 12): 1,
    }


def test_a_long_expression_is_cut_as_a_whole(expressions, check):
    put(IMAGE, 0, caption="a red kite " * 30)(expressions)
    put(BOX, 0, tokens_positive=[])(expressions)
    found = check(expressions, "refexp", max_tokens=40)
    assert {f.check for f in found if f.image_id == 11} == {"caption-long", "span-cut"}


CLASSES = [
    ("class-no-token", "(thing)", {}, "(thing)"),
    ("class-no-token", "  ", {}, "'  '"),
    ("class-alike", "hot dog", {}, "'hot_dog'"),
    ("class-long", "bus " * 20, {"max_tokens": 20}, "limit is 20"),
    ("category-entry", "a \ud800", {}, "ud800"),
]


@pytest.mark.parametrize(("expected", "name", "options", "text"), CLASSES)
def test_damaged_classes(expected, name, options, text, detection, check):
    before = check(detection, "detection", **options)
    put(CATEGORY, 2, name=name)(detection)
    found = [f for f in check(detection, "detection", **options) if f.check != "class-captions"]
    compare(found, before, expected, {"unknown-category"}, text)


def test_number_of_captions(detection, check):
    (note,) = [f for f in check(detection, "detection") if f.check == "class-captions"]
    assert "classes: 3, captions: 1" in note.message
    detection["categories"] += [{"id": 100 + i, "name": f"thing {i}"} for i in range(50)]
    found = check(detection, "detection", max_tokens=60)
    (note,) = [f for f in found if f.check == "class-captions"]
    assert "classes: 53" in note.message and "captions: 1," not in note.message


def test_lvis_names_files_by_url(detection, check):
    for image in detection["images"]:
        image["coco_url"] = "http://host/data/" + image.pop("file_name")
        image.update(neg_category_ids=[], not_exhaustive_category_ids=[])
    assert not [f for f in check(detection, None) if f.level == "error"]
    detection["images"][1]["coco_url"] = "nowhere"
    (error,) = [f for f in check(detection, None) if f.level == "error"]
    assert error.check == "image-entry" and "nowhere" in error.message


def test_every_check_has_a_level():
    assert {row.level for row in CHECKS.values()} == {"error", "warning", "info"}


@pytest.mark.parametrize(
    ("marked_spans", "marked"),
    [
        ([(2, 12)], "a [red circle] and"),
        ([(0, 1), (13, 16)], "[a] red circle [and]"),
        ([(0, 12), (2, 5)], "[a [red] circle] and"),
        ([(2, 5), (5, 12)], "a [red][ circle] and"),
        ([(-4, 1), (13, 99)], "[a] red circle [and]"),
        ([(5, 5)], "a red[] circle and"),
        ([], "a red circle and"),
    ],
)
def test_marking(marked_spans, marked):
    assert mark_spans("a red circle and", marked_spans) == marked


@pytest.fixture
def registered():
    names = []

    def register(records, **metadata):
        name = f"validation_test_{len(names)}"
        names.append(name)
        DatasetCatalog.register(name, lambda: records)
        MetadataCatalog.get(name).set(**metadata)
        return name

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


class LazyRecords:
    """A sequence that is no list, one of whose records is broken."""

    def __init__(self, records, broken=None):
        self.records, self.broken = records, broken

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        if index == self.broken:
            raise ValueError(f"row {index} of labels.tsv is damaged")
        return copy.deepcopy(self.records[index])


def make_records(content, root):
    records = []
    for image in content["images"]:
        boxes = [a["bbox"] for a in content["annotations"] if a["image_id"] == image["id"]]
        record = {**image, "file_name": f"{root}/{image['file_name']}", "image_id": image["id"]}
        del record["id"]
        record["annotations"] = [
            {
                "bbox": [x, y, x + w, y + h],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": 0,
                "iscrowd": 0,
            }
            for x, y, w, h in boxes
        ]
        records.append(record)
    return records


def test_records(detection, coco, registered, tokenizer):
    records = make_records(detection, coco[2])
    name = registered(LazyRecords(records), thing_classes=["hot dog"])
    report = validate([source_of_dataset(name)], Options(tokenizer, workers=0))
    assert {f.check for f in report.findings} == {"image-without-annotations", "class-captions"}
    assert report.contents[0].num_annotations == 7

    records[0]["annotations"][0]["bbox"] = [50, 2, 53, 6]
    records[0]["annotations"][1]["bbox"] = [5, 2, 3, 6]
    records[0]["annotations"][2]["category_id"] = 1
    records[1]["file_name"] += ".gone"
    records[2]["image_id"] = records[3]["image_id"]
    del records[4]["height"]
    name = registered(LazyRecords(records, broken=5), thing_classes=["hot dog"])
    report = validate([source_of_dataset(name)], Options(tokenizer, workers=0))
    errors = {(f.check, f.image_id, f.annotation_id) for f in report.findings if f.level == "error"}
    assert errors == {
        ("box-outside", 10, "#0"),
        ("box-empty", 10, "#1"),
        ("unknown-category", 10, "#2"),
        ("image-missing", 11, None),
        ("image-id-repeated", 13, None),
        ("image-size-entry", 14, None),
        ("image-entry", None, None),
    }
    assert any("row 5 of labels.tsv" in f.message for f in report.findings)


def test_tsv(coco, registered, tokenizer, tmp_path):
    """Rows instead of files: some shown repeatedly, one damaged."""
    root = Path(coco[2])
    rows = [(str(k), base64.b64encode((root / f"{k}.png").read_bytes()).decode()) for k in (0, 1)]
    rows.append(("2", rows[0][1][:80]))
    boxes = json.dumps([{"rect": [1, 2, 9, 9], "class": "dog"}])
    write_tsv(rows, str(tmp_path / "images.tsv"))
    write_tsv([(key, boxes) for key, _ in rows], str(tmp_path / "labels.tsv"))
    sizes = [("0", "30 40"), ("1", "40 31"), ("2", "29 29")]  # of the second a pixel too high
    write_tsv(sizes, str(tmp_path / "sizes.tsv"))
    (tmp_path / "classes.json").write_text('{"dog": 1}')
    (tmp_path / "lines.tsv").write_text("0\n1\n0\n2\n")
    (tmp_path / "data.yaml").write_text(
        "img: images.tsv\nlabel: labels.tsv\nhw: sizes.tsv\nlabelmap: classes.json\n"
        "linelist: lines.tsv\n"
    )
    records = load_tsv_dataset(str(tmp_path / "data.yaml"))
    name = registered(records, ground_truth="detection", thing_classes=records.class_names)
    report = validate([source_of_dataset(name)], Options(tokenizer, workers=1))
    errors = {(f.check, f.image_id) for f in report.findings if f.level == "error"}
    assert errors == {("image-size", 1), ("image-unreadable", 2)}
    assert any(f.file_name.endswith("images.tsv, row 2") for f in report.findings if f.file_name)
    paths = draw_samples(report.sources[0], report.contents[0], 2, tmp_path / "pictures")
    assert [path.name for path in paths] == ["000_0.png", "001_0.png", "contact_sheet.png"]


def test_records_without_classes_and_with_captions(grounding, registered, tokenizer):
    content, _, root = grounding
    records = make_records(content, root)
    assert validate(
        [source_of_dataset(registered(records, ground_truth="detection"))],
        Options(tokenizer, read_images=False),
    ).counts()["no-categories"]
    for record in records:
        for annotation in record["annotations"]:
            annotation["tokens_positive"] = [[0, 99]]
    report = validate([source_of_dataset(registered(records))], Options(tokenizer, workers=0))
    assert report.sources[0].kind == "grounding" and report.counts()["span-range"] == 7


def test_registered_names(coco, tokenizer):
    register_coco_json("validation_own", *coco[1:], class_names=["a", "b", "(c)"])
    try:
        report = validate([source_of_dataset("validation_own")], Options(tokenizer, workers=0))
        assert {f.check for f in report.findings if f.level == "error"} == {"class-no-token"}
        assert report.sources[0].label == "validation_own"
    finally:
        DatasetCatalog.remove("validation_own")
        MetadataCatalog.remove("validation_own")
    with pytest.raises(KeyError, match="not registered"):
        source_of_dataset("validation_own")
    with pytest.raises(ValueError, match="none of detection"):
        source_of_json(coco[1], coco[2], kind="boxes")
