"""Every annotation of the generated data, held against its COCO json by independent means."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections import Counter, defaultdict
from xml.etree import ElementTree

import pytest
from lvis import LVIS
from PIL import Image
from pycocotools.coco import COCO

from fiber_d2.data.shapes import generate_shapes

PARAMS = {"num_train": 80, "num_val": 40, "lvis_rare_max": 4, "lvis_common_max": 12}
SIZE = 128
SINGULAR = ("circle", "square", "triangle", "shape")
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
SPLITS = pytest.mark.parametrize("split", ["train", "val"])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    generate_shapes(folder, **PARAMS)
    return folder


def load(root, name):
    return json.loads((root / "annotations" / f"{name}.json").read_text())


def objects_of(coco):
    """Image id -> its objects as (attributes, xyxy box)."""
    found = defaultdict(list)
    for annotation in coco["annotations"]:
        x, y, w, h = annotation["bbox"]
        found[annotation["image_id"]].append((annotation["attributes"], (x, y, x + w, y + h)))
    return found


def fitting(words, objects):
    """Indices of the objects that bare words such as "small red circles" fit."""
    fits = list(range(len(objects)))
    for word in words:
        for singular in SINGULAR:
            if word in (singular, singular + "s"):
                word = singular
        if word == "shape":
            continue
        if word in SINGULAR:
            kind = "shape"
        else:
            kind = "size" if word in ("small", "large") else "color"
        fits = [i for i in fits if objects[i][0][kind] == word]
    return fits


def clear(words, objects):
    """No object of a middle size fits the words besides the size."""
    if not {"small", "large"} & set(words):
        return True
    rest = [word for word in words if word not in ("small", "large")]
    return all(objects[i][0]["size"] is not None for i in fitting(rest, objects))


def annotations_by_image(content):
    found = defaultdict(list)
    for annotation in content["annotations"]:
        found[annotation["image_id"]].append(annotation)
    return found


@SPLITS
def test_coco(root, split):
    with contextlib.redirect_stdout(io.StringIO()):
        api = COCO(str(root / "annotations" / f"instances_{split}.json"))
    assert len(api.imgs) == PARAMS[f"num_{split}"]
    assert [c["name"] for c in api.cats.values()][:4] == [
        "red circle",
        "red square",
        "red triangle",
        "green circle",
    ]
    for image in api.imgs.values():
        with Image.open(root / "images" / split / image["file_name"]) as opened:
            assert opened.size == (image["width"], image["height"]) == (SIZE, SIZE)
            assert opened.mode == "RGB"
    for annotation in api.anns.values():
        attributes = annotation["attributes"]
        name = api.cats[annotation["category_id"]]["name"]
        assert name == f"{attributes['color']} {attributes['shape']}"
        x, y, w, h = annotation["bbox"]
        assert 0 <= x and 0 <= y and x + w <= SIZE + 1e-6 and y + h <= SIZE + 1e-6
        mask = api.annToMask(annotation)
        columns, rows = mask.any(axis=0).nonzero()[0], mask.any(axis=1).nonzero()[0]
        edges = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert max(abs(a - b) for a, b in zip(edges, (x, y, x + w, y + h))) <= 1.25
        assert annotation["area"] == pytest.approx(mask.sum(), rel=0.08)
        assert annotation["iscrowd"] == 0


def test_image_ids_do_not_repeat_between_splits(root):
    train, val = ({i["id"] for i in load(root, f"instances_{s}")["images"]} for s in SPLITS.args[1])
    assert not train & val


def parse_entities(root, number):
    """Boxes per entity, and per sentence the words and its phrases: SPEC of the real files."""
    folder = root / "flickr30k_entities"
    boxes = defaultdict(list)
    for element in ElementTree.parse(folder / "Annotations" / f"{number}.xml").findall("object"):
        box = element.find("bndbox")
        if box is not None:
            corners = [int(box.find(k).text) for k in ("xmin", "ymin", "xmax", "ymax")]
            for name in element.findall("name"):
                boxes[name.text].append(corners)
    sentences = []
    for line in (folder / "Sentences" / f"{number}.txt").read_text().splitlines():
        words, phrases, current = [], [], None
        for token in line.split():
            if token.startswith("["):
                parts = token.split("/")
                assert parts[0] == "[" and parts[1].startswith("EN#")
                current = {"id": parts[1][3:], "types": parts[2:], "first": len(words)}
                continue
            words.append(token.rstrip("]"))
            if token.endswith("]"):
                phrases.append({**current, "last": len(words)})
                current = None
        sentences.append((words, phrases))
    return boxes, sentences


@SPLITS
def test_entities_files_agree_with_the_json(root, split):
    content = load(root, f"final_flickr_separateGT_{split}")
    listed = (root / "flickr30k_entities" / f"{split}.txt").read_text().split()
    images = {(i["original_img_id"], i["sentence_id"]): i for i in content["images"]}
    annotations = annotations_by_image(content)
    entities, seen, without_box = {}, 0, 0
    for number in map(int, listed):
        boxes, sentences = parse_entities(root, number)
        for entity, found in boxes.items():
            assert entities.setdefault(entity, number) == number
            assert len(set(map(tuple, found))) == len(found)
        for sentence_id, (words, phrases) in enumerate(sentences):
            image = images[number, sentence_id]
            assert image["caption"] == " ".join(words)
            evaluable = [phrase for phrase in phrases if boxes.get(phrase["id"])]
            without_box += len(phrases) - len(evaluable)
            assert len(evaluable) == len(image["tokens_positive_eval"]) > 0
            for phrase, spans in zip(evaluable, image["tokens_positive_eval"]):
                ((begin, end),) = spans
                text = " ".join(words[phrase["first"] : phrase["last"]])
                assert image["caption"][begin:end] == text
                assert len(" ".join(words[: phrase["first"]])) in (begin - 1, begin)
                tied = []
                for annotation in annotations[image["id"]]:
                    if [begin, end] in annotation["tokens_positive"]:
                        x, y, w, h = annotation["bbox"]
                        tied.append([x, y, x + w, y + h])
                assert sorted(tied) == sorted(boxes[phrase["id"]])
                seen += 1
    assert len(images) == len(content["images"]) == 2 * len(listed)
    assert seen > 2 * len(listed) and without_box > 0


@SPLITS
def test_phrases_are_true(root, split):
    objects = objects_of(load(root, f"instances_{split}"))
    content = load(root, f"final_flickr_separateGT_{split}")
    annotations = annotations_by_image(content)
    determiners, types = Counter(), Counter()
    for image in content["images"]:
        _, sentences = parse_entities(root, image["original_img_id"])
        listed = [p["types"] for p in sentences[image["sentence_id"]][1]]
        listed = [t for t in listed if t not in (["scene"], ["notvisual"])]
        own = objects[image["original_img_id"]]
        for ((begin, end),), kinds in zip(image["tokens_positive_eval"], listed):
            determiner, *words = image["caption"][begin:end].split()
            found = fitting(words, own)
            tied = [a for a in annotations[image["id"]] if [begin, end] in a["tokens_positive"]]
            corners = [(x, y, x + w, y + h) for x, y, w, h in (a["bbox"] for a in tied)]
            assert len(corners) == len(found) > 0
            for i in found:  # whole pixels in these files, hundredths in the COCO json
                assert any(
                    max(abs(u - v) for u, v in zip(own[i][1], box)) < 0.52 for box in corners
                )
            assert clear(words, own)
            plural = words[-1].endswith("s")
            assert plural == ("plural" in kinds)
            if plural:
                assert len(found) > 1 and len(found) == NUMBERS.get(determiner, len(found))
            else:
                assert determiner in ("a", "an") or (determiner == "the" and len(found) == 1)
            assert ("size" in kinds) == bool({"small", "large"} & set(words))
            assert ("colour" in kinds) == bool({"red", "green", "blue", "yellow"} & set(words))
            assert ("shape" in kinds) == (words[-1] not in ("shape", "shapes"))
            determiners[determiner] += 1
            types.update(kinds)
    assert {"a", "the", "two"} <= set(determiners)
    assert set(types) == {"colour", "shape", "size", "plural"}


def test_backgrounds_have_no_box(root):
    text = "".join(p.read_text() for p in (root / "flickr30k_entities/Sentences").iterdir())
    named = set(re.findall(r"\[/EN#(\d+)/scene an? \w+ background\]", text))
    assert named and "[/EN#0/notvisual a picture]" in text
    seen = set()
    for path in (root / "flickr30k_entities/Annotations").iterdir():
        for element in ElementTree.parse(path).findall("object"):
            if element.find("nobndbox") is not None:
                assert element.find("bndbox") is None
                seen.add(element.find("name").text)
    assert seen == named


def side_of(relation, box, other):
    """How far ``box`` lies on the named side of ``other``, between centres in pixels."""
    (x, y), (u, v) = (((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in (box, other))
    return {"left of": u - x, "right of": x - u, "above": v - y, "below": y - v}[relation]


def check_expressions(content, objects):
    """All expressions are true and fit one object alone; returns how many of each group."""
    annotations = annotations_by_image(content)
    groups = Counter()
    for image in content["images"]:
        own = objects[image["original_id"]]
        (annotation,) = annotations[image["id"]]
        x, y, w, h = annotation["bbox"]
        boxes = [[a, b, pytest.approx(c - a), pytest.approx(d - b)] for _, (a, b, c, d) in own]
        target = boxes.index([x, y, w, h])
        candidates = [boxes.index(box) for box in image["candidates"]]
        (begin, end), *further = annotation["tokens_positive"]
        caption = image["caption"]
        match = re.fullmatch(
            r"the ([a-z ]+?)(?: (left of|right of|above|below) the ([a-z ]+))?", caption
        )
        head, relation, other = match.groups()
        assert (begin, caption[begin:end]) == (0, f"the {head}")
        assert [caption[b:e] for b, e in further] == ([] if relation is None else [relation])
        head = head.split()
        groups[image["dataset_name"]] += 1
        assert clear(head, own) and target in fitting(head, own)
        if image["dataset_name"] == "shapes_attribute":
            assert relation is None
            assert fitting(head, own) == [target]
            assert candidates == list(range(len(own)))
            color, shape = (own[target][0][k] for k in ("color", "shape"))
            rivals = [o for i, (o, _) in enumerate(own) if i != target]
            assert any(o["color"] == color or o["shape"] == shape for o in rivals)
        else:
            assert image["dataset_name"] == "shapes_relation"
            assert candidates == fitting(head, own) and len(candidates) > 1
            other = other.split()
            (reference,) = fitting(other, own)
            assert clear(other, own) and reference not in candidates
            sides = {i: side_of(relation, own[i][1], own[reference][1]) for i in candidates}
            assert sides[target] > 0.119 * SIZE
            yield image, own, sides, target, reference, relation
    assert set(groups) == {"shapes_attribute", "shapes_relation"}


@SPLITS
def test_referring_expressions_fit_one_object(root, split):
    content = load(root, f"finetune_shapes_{split}")
    seen = set()
    for _, _, sides, target, _, relation in check_expressions(
        content, objects_of(load(root, f"instances_{split}"))
    ):
        assert all(side < -0.049 * SIZE for i, side in sides.items() if i != target)
        seen.add(relation)
    assert seen == {"left of", "right of", "above", "below"}
    pairs = [(i["original_id"], i["caption"]) for i in content["images"]]
    assert len(set(pairs)) == len(pairs)
    most = Counter((i["original_id"], i["dataset_name"]) for i in content["images"])
    assert all(n <= (4 if group == "shapes_attribute" else 6) for (_, group), n in most.items())


@SPLITS
def test_mixed_captions_hold_every_expression_once(root, split):
    """They say the same of the same boxes as the file with one expression per caption."""
    refexp, mixed = (
        load(root, f"finetune_shapes_{split}"),
        load(root, f"final_mixed_shapes_{split}"),
    )

    def said(content, image, start, end):
        """(words, box) of the spans within some characters of a caption."""
        return sorted(
            (image["caption"][b:e], b - start, a["bbox"])
            for a in annotations_by_image(content)[image["id"]]
            for b, e in a["tokens_positive"]
            if start <= b and e <= end
        )

    def key(image, text, found):
        return image["original_id"], text, json.dumps(found)

    alone = Counter(
        key(image, image["caption"], said(refexp, image, 0, len(image["caption"])))
        for image in refexp["images"]
    )
    together, several = Counter(), 0
    for image in mixed["images"]:
        start, texts = 0, image["caption"].split(". ")
        assert 1 <= len(texts) <= 4
        for text in texts:
            together[key(image, text, said(mixed, image, start, start + len(text)))] += 1
            start += len(text) + 2
        own = annotations_by_image(mixed)[image["id"]]
        boxes = [json.dumps(annotation["bbox"]) for annotation in own]
        assert len(set(boxes)) == len(boxes)
        several += any(len(a["tokens_positive"]) > 2 for a in own)
    assert together == alone and several
    captions = Counter(image["original_id"] for image in mixed["images"])
    expressions = Counter(image["original_id"] for image in refexp["images"])
    assert captions == {image: -(-count // 4) for image, count in expressions.items()}


def test_hard_relations_need_the_reference(tmp_path):
    """The answer is not what lies furthest in the named direction, and what does is off axis."""
    generate_shapes(tmp_path, num_train=150, num_val=0, hard_relations=True, twin_share=1.0)
    content = load(tmp_path, "finetune_shapes_train")
    count = 0
    for _, own, sides, target, reference, relation in check_expressions(
        content, objects_of(load(tmp_path, "instances_train"))
    ):
        assert max(sides, key=sides.get) != target
        turned = {"left of": "above", "right of": "above", "above": "left of", "below": "left of"}
        for i, side in sides.items():
            across = abs(side_of(turned[relation], own[i][1], own[reference][1]))
            if i == target:
                assert across <= side
            elif side > -0.049 * SIZE:
                assert across >= 1.39 * side
        count += 1
    assert count > 5


@pytest.mark.parametrize("share", [0.7, 0.2])
def test_share_of_relations_in_training(tmp_path, share):
    generate_shapes(tmp_path, num_train=40, num_val=20, train_relation_share=share)
    names = [i["dataset_name"] for i in load(tmp_path, "finetune_shapes_train")["images"]]
    assert names.count("shapes_relation") / len(names) == pytest.approx(share, abs=0.02)
    generate_shapes(tmp_path / "natural", num_train=1, num_val=20)
    natural = load(tmp_path / "natural", "finetune_shapes_val")
    assert load(tmp_path, "finetune_shapes_val") == natural


@SPLITS
def test_lvis(root, split):
    api = LVIS(str(root / "annotations" / f"lvis_{split}.json"))
    coco = load(root, f"instances_{split}")
    complete = Counter((a["image_id"], a["category_id"]) for a in coco["annotations"])
    kept = Counter((a["image_id"], a["category_id"]) for a in api.anns.values())
    assert Counter(c["frequency"] for c in api.cats.values()) == {"r": 4, "c": 4, "f": 4}
    for image in api.imgs.values():
        assert image["coco_url"].split("/")[-2:] == [split, image["file_name"]]
        present = {c for i, c in kept if i == image["id"]}
        partial = set(image["not_exhaustive_category_ids"])
        assert not present & set(image["neg_category_ids"])
        assert all((image["id"], c) not in complete for c in image["neg_category_ids"])
        assert partial <= present
        for category in present:
            whole, found = (n[image["id"], category] for n in (complete, kept))
            assert found == whole - (category in partial)
    assert any(i["neg_category_ids"] for i in api.imgs.values())
    assert any(i["not_exhaustive_category_ids"] for i in api.imgs.values())
    counts = Counter(category for _, category in kept)
    for category in api.cats.values():
        limit = {"r": 4, "c": 12, "f": PARAMS["num_train"]}[category["frequency"]]
        assert counts[category["id"]] <= limit and category["image_count"] <= limit
        if split == "train":
            assert counts[category["id"]] == category["image_count"]


def test_lvis_frequencies_come_from_training_counts(root):
    train, val = (load(root, f"lvis_{split}")["categories"] for split in ("train", "val"))
    assert train == val
