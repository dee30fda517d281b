"""The table of built-in data sets: each family loads from the tree of datasets/README.md."""

from __future__ import annotations

import base64
import io
import itertools
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.lvis import register_lvis_instances
from PIL import Image

from fiber_d2.data import (
    build_test_loader,
    build_train_loader,
    register_all_builtin,
    register_coco_json,
)
from fiber_d2.data.builtin import BUILTIN
from fiber_d2.data.catalog import ODINW35

README = Path(__file__).parents[2] / "datasets" / "README.md"
CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 3, "name": "fire_truck"}]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def coco_json(*names, **extra):
    """Two boxes in each image but the last, which has none."""
    images = [
        {"id": 5 + k, "file_name": name, "height": 30, "width": 40, **extra}
        for k, name in enumerate(names)
    ]
    annotations = [
        {
            "id": 2 * k + j,
            "image_id": 5 + k,
            "category_id": (18, 3)[j],
            "bbox": [1, 2, 10, 12],
            "iscrowd": 0,
            "area": 100,
            "segmentation": [[1, 2, 3, 4, 5, 6]],
        }
        for k in range(len(names) - 1)
        for j in range(2)
    ]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def mdetr_json(*images):
    """One box for each image, on the word dog."""
    full = [
        {"height": 30, "width": 40, "caption": "a dog", "id": k, **image}
        for k, image in enumerate(images)
    ]
    annotations = [
        {
            "id": k,
            "image_id": k,
            "category_id": 1,
            "bbox": [1, 2, 10, 12],
            "tokens_positive": [[2, 5]],
        }
        for k in range(len(images))
    ]
    return {"images": full, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}


def files(name):
    return [record["file_name"] for record in DatasetCatalog.get(name)]


def expand(text):
    """``a_{b,c}`` as a shell reads it."""
    parts = [part.split(",") for part in re.split(r"[{}]", text)]
    choices = [[",".join(part)] if k % 2 == 0 else part for k, part in enumerate(parts)]
    return {"".join(choice) for choice in itertools.product(*choices)}


def test_readme_names_exactly_what_is_registered():
    text = README.read_text()
    paragraphs = re.findall(r"^Registered as .*?\n\n", text, re.M | re.S)
    patterns = set().union(*(expand(p) for p in re.findall(r"`(.*?)`", "".join(paragraphs))))
    names = {p.replace("<set>", key) for p in patterns - {"odinw_<set>_minival"} for key in ODINW35}
    with_minival = re.search(r"These have one:\n(.*?)\.\n\n", text, re.S)[1]
    names |= {f"odinw_{key}_minival" for key in re.split(r",\s", with_minival)}
    assert names == set(BUILTIN)


def test_readme_shows_where_every_file_belongs():
    """Each annotation file of the table is drawn in one of the README's trees."""
    lines = [line.strip() for line in README.read_text().splitlines() if line.startswith("    ")]
    drawn = {name for line in lines for word in line.split() for name in expand(word)}
    for name, dataset in BUILTIN.items():
        base = os.path.basename(dataset.json_file)
        assert any(path == base or path.endswith("/" + base) for path in drawn), (name, base)


def test_every_entry_says_of_what_kind_it_is(root):
    for name, dataset in BUILTIN.items():
        metadata = MetadataCatalog.get(name)
        assert metadata.ground_truth in ("detection", "grounding", "refexp")
        assert metadata.evaluator_type in ("coco", "lvis", "flickr", "refexp", None)
        assert metadata.prepare
        if metadata.file_format == "tsv":
            assert metadata.yaml_file == str(root / dataset.json_file)
        else:
            assert metadata.json_file == str(root / dataset.json_file)
            assert metadata.image_root.startswith(str(root) + os.sep)


def test_a_second_registration_changes_nothing_and_another_root_moves_all(root, tmp_path_factory):
    before = {name: DatasetCatalog[name] for name in BUILTIN}
    register_all_builtin(str(root))
    assert all(DatasetCatalog[name] is before[name] for name in BUILTIN)
    other = tmp_path_factory.mktemp("other")
    register_all_builtin(str(other))
    assert MetadataCatalog.get("mixed_train").coco_image_roots[1] == str(
        other / "refcoco/train2014"
    )
    for name in BUILTIN:
        assert str(root) not in repr(DatasetCatalog[name])


def test_names_that_others_took_before_stay_theirs(root, caplog):
    DatasetCatalog.remove("mixed_train")
    MetadataCatalog.remove("mixed_train")
    DatasetCatalog.register("mixed_train", lambda: ["theirs"])
    try:
        with caplog.at_level(logging.WARNING):
            register_all_builtin(str(root))
        assert "'mixed_train' is taken" in caplog.text
        assert DatasetCatalog.get("mixed_train") == ["theirs"]
    finally:
        DatasetCatalog.remove("mixed_train")
        MetadataCatalog.remove("mixed_train")


IMPORT = """
import os, sys
root = os.environ["DETECTRON2_DATASETS"]
touched = []
def hook(event, args):
    if event in ("open", "os.listdir", "os.scandir") and str(args[0]).startswith(root):
        touched.append((event, args))
sys.addaudithook(hook)
import fiber_d2
from detectron2.data import DatasetCatalog
assert not touched, touched
assert len(DatasetCatalog.get("coco_grounding_val")) == 1
assert touched, "the hook sees nothing"
"""


@pytest.mark.slow
def test_importing_reads_no_data_set(tmp_path):
    for dataset in BUILTIN.values():
        write(tmp_path / dataset.json_file, coco_json("1.jpg"))
    environment = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORT],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("shapes_lvis_val", "python -m fiber_d2.data.shapes"),
        ("coco_grounding_test-dev", "image_info_test2017.zip"),
        ("lvis_evaluation_mini_val", "datasets/prepare/lvis_v1.py"),
        ("objects365_val", "Objects365's own file"),
        ("object365_dt_train", "datasets/objects365_tsv.py"),
        ("flickr30k_test", "datasets/prepare/flickr30k_entities.py"),
        ("mixed_train_no_coco", "datasets/prepare/mixed.py"),
        ("mixed_train_refexpclean", "datasets/prepare/refexp_clean.py"),
        ("refcoco+_testA", "datasets/prepare/refcoco.py"),
        ("odinw_Aquarium_train_shot5_seed30", "datasets/prepare/roboflow.py"),
    ],
)
def test_a_missing_file_says_where_it_belongs_and_what_makes_it(root, name, remedy):
    path = root / BUILTIN[name].json_file
    with pytest.raises(FileNotFoundError) as caught:
        DatasetCatalog.get(name)
    for part in (str(path), repr(name), remedy, "datasets/README.md", "DETECTRON2_DATASETS"):
        assert part in str(caught.value)


def test_scripts_that_messages_name_exist():
    named = {
        script
        for dataset in BUILTIN.values()
        for script in re.findall(r"datasets/[\w/]+\.py", dataset.prepare)
    }
    named |= {
        f"datasets/{script}"
        for script in re.findall(r"`(?:datasets/)?(\w*/?\w+\.py)", README.read_text())
        if not script.startswith(("configs", "fiber_d2"))
    }
    assert len(named) > 6
    missing = [script for script in named if not (README.parents[1] / script).is_file()]
    assert not missing


@pytest.mark.parametrize("split", ["train", "val"])
def test_coco(root, split):
    name = f"coco_grounding_{split}"
    write(root / f"coco/annotations/instances_{split}2017.json", coco_json("1.jpg", "2.jpg"))
    assert files(name) == [str(root / f"coco/{split}2017" / n) for n in ("1.jpg", "2.jpg")]
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["dog", "fire_truck"]
    assert metadata.thing_dataset_id_to_contiguous_id == {18: 0, 3: 1}
    assert (metadata.ground_truth, metadata.evaluator_type) == ("detection", "coco")


def test_coco_test_dev_has_no_annotations(root):
    content = coco_json("1.jpg")
    del content["annotations"]
    write(root / "coco/annotations/image_info_test-dev2017.json", content)
    assert files("coco_grounding_test-dev") == [str(root / "coco/test2017/1.jpg")]
    write(root / "coco/annotations/instances_val2017.json", content)
    with pytest.raises(ValueError, match="lacks annotations"):
        DatasetCatalog.get("coco_grounding_val")


@pytest.mark.parametrize(
    ("name", "json_name"),
    [
        ("lvis_grounding_train", "lvis_v1_train.json"),
        ("lvis_evaluation_val", "lvis_v1_val.json"),
        ("lvis_evaluation_mini_val", "lvis_v1_minival_inserted_image_name.json"),
    ],
)
def test_lvis(root, name, json_name):
    content = coco_json("wrong.jpg", "wrong.jpg", neg_category_ids=[3])
    for image, folder in zip(content["images"], ("train2017", "val2017")):
        image["coco_url"] = f"http://images.cocodataset.org/{folder}/{image['id']:012d}.jpg"
    content["categories"] = [{**c, "frequency": "f"} for c in CATEGORIES]
    write(root / "lvis" / json_name, content)
    records = DatasetCatalog.get(name)
    assert [record["file_name"] for record in records] == [
        str(root / "coco/train2017/000000000005.jpg"),
        str(root / "coco/val2017/000000000006.jpg"),
    ]
    assert records[0]["neg_category_ids"] == [3] and not records[1]["annotations"]
    metadata = MetadataCatalog.get(name)
    assert (metadata.ground_truth, metadata.evaluator_type) == ("detection", "lvis")
    assert metadata.thing_classes == ["dog", "fire_truck"]
    assert metadata.class_frequency == ["f", "f"]


def test_objects365_json(root):
    content = coco_json("images/v1/patch8/objects365_v1_00420917.jpg", "images/v2/patch16/2.jpg")
    write(root / "Objects365/annotations/zhiyuan_objv2_val.json", content)
    assert files("objects365_val") == [
        str(root / "Objects365/val/images/v1/patch8/objects365_v1_00420917.jpg"),
        str(root / "Objects365/val/images/v2/patch16/2.jpg"),
    ]


def test_objects365_tsv(root):
    folder = root / "Objects365"
    folder.mkdir()
    png = io.BytesIO()
    Image.new("RGB", (40, 30)).save(png, "PNG")
    objects = [{"class": "dog", "rect": [1, 2, 10, 12]}]
    rows = {
        "images": ["17", base64.b64encode(png.getvalue()).decode()],
        "train.label": ["17", json.dumps(objects)],
        "train.hw": ["17", json.dumps([{"height": 30, "width": 40}])],
    }
    for stem, row in rows.items():
        (folder / f"{stem}.tsv").write_text("\t".join(row) + "\n")
        (folder / f"{stem}.lineidx").write_text("0\n")
    write(folder / "classes.json", {"dog": 1, "cat": 2})
    (folder / "objects365_train_vgoiv6.cas2000.yaml").write_text(
        "img: images.tsv\nlabel: train.label.tsv\nhw: train.hw.tsv\nlabelmap: classes.json\n"
    )
    records = DatasetCatalog.get("object365_dt_train")
    assert len(records) == 1 and records[0]["image_id"] == 17
    assert records[0]["annotations"][0]["category_id"] == 0
    metadata = MetadataCatalog.get("object365_dt_train")
    assert metadata.thing_classes == ["dog", "cat"]
    assert (metadata.ground_truth, metadata.evaluator_type) == ("detection", None)


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("flat", [True, False])
def test_flickr30k(root, split, flat):
    images = root / "flickr30k/flickr30k_images"
    (images if flat else images / split).mkdir(parents=True)
    image = {
        "file_name": "36979.jpg",
        "sentence_id": 3,
        "original_img_id": 36979,
        "tokens_positive_eval": [[[2, 5]]],
    }
    write(root / f"mdetr_annotations/final_flickr_separateGT_{split}.json", mdetr_json(image))
    name = f"flickr30k_{split}"
    (record,) = DatasetCatalog.get(name)
    assert record["file_name"] == str((images if flat else images / split) / "36979.jpg")
    assert record["caption"] == "a dog" and record["sentence_id"] == 3
    assert record["tokens_positive_eval"] == [[[2, 5]]]
    metadata = MetadataCatalog.get(name)
    assert (metadata.ground_truth, metadata.evaluator_type) == ("grounding", "flickr")
    assert metadata.entities_root == str(root / "flickr30k/flickr30k")
    assert metadata.split == split


def test_the_tree_of_flickr30k_is_looked_for_once(root, monkeypatch):
    from fiber_d2.data import coco_json as module

    looked = []
    monkeypatch.setattr(module.PathManager, "isdir", lambda path: looked.append(path) or False)
    images = [{"file_name": f"{k}.jpg"} for k in range(20)]
    write(root / "mdetr_annotations/final_flickr_separateGT_val.json", mdetr_json(*images))
    assert len(DatasetCatalog.get("flickr30k_val")) == 20
    assert len(looked) == len(set(looked)) == 2


@pytest.mark.parametrize(
    "name",
    [
        "mixed_train",
        "mixed_train_no_coco",
        "mixed_train_refexpclean",
        "mixed_train_no_coco_refexpclean",
    ],
)
@pytest.mark.parametrize("coco", ["coco", "refcoco"])
def test_mixed(root, name, coco):
    (root / coco / "train2014").mkdir(parents=True)
    images = [
        {"file_name": "COCO_train2014_000000000009.jpg", "data_source": "coco"},
        {"file_name": "2370799.jpg", "data_source": "vg"},
    ]
    write(root / f"mdetr_annotations/final_{name}.json", mdetr_json(*images))
    assert files(name) == [
        str(root / coco / "train2014/COCO_train2014_000000000009.jpg"),
        str(root / "gqa/images/2370799.jpg"),
    ]
    sources = [record["data_source"] for record in DatasetCatalog.get(name)]
    assert sources == ["coco", "vg"]
    assert MetadataCatalog.get(name).evaluator_type is None
    assert MetadataCatalog.get(name).ground_truth == "grounding"


@pytest.mark.parametrize("source", ["coco", "vg"])
def test_mixed_images_do_not_leave_their_folders(root, source):
    image = {"file_name": "../secret.jpg", "data_source": source}
    write(root / "mdetr_annotations/final_mixed_train.json", mdetr_json(image))
    with pytest.raises(ValueError, match="leads out of"):
        DatasetCatalog.get("mixed_train")


@pytest.mark.parametrize("name", [n for n in BUILTIN if n.startswith("refcoco")])
@pytest.mark.parametrize("coco", ["coco", "refcoco"])
def test_refcoco(root, name, coco):
    (root / coco / "train2014").mkdir(parents=True)
    image = {
        "file_name": "COCO_train2014_000000000009.jpg",
        "original_id": 9,
        "dataset_name": name.split("_")[0],
    }
    write(root / f"mdetr_annotations/finetune_{name}.json", mdetr_json(image))
    (record,) = DatasetCatalog.get(name)
    assert record["file_name"] == str(root / coco / "train2014" / image["file_name"])
    assert record["dataset_name"] == image["dataset_name"] and record["original_id"] == 9
    metadata = MetadataCatalog.get(name)
    assert (metadata.ground_truth, metadata.evaluator_type) == ("refexp", "refexp")


def test_refcoco_has_all_published_splits():
    names = [n for n in BUILTIN if n.startswith("refcoco")]
    assert sorted(names) == sorted(
        [f"{d}_{s}" for d in ("refcoco", "refcoco+") for s in ("train", "val", "testA", "testB")]
        + [f"refcocog_{s}" for s in ("train", "val", "test")]
    )


@pytest.fixture
def own(coco):
    """Registers the six images of the fixture ``coco`` and takes the entry back in the end."""
    _, path, image_root = coco
    yield lambda **options: register_coco_json("own_data", path, image_root, **options)
    if "own_data" in DatasetCatalog.list():
        DatasetCatalog.remove("own_data")
        MetadataCatalog.remove("own_data")


def load_own():
    DatasetCatalog.get("own_data")
    return MetadataCatalog.get("own_data")


def test_own_class_names(own):
    own(class_names={"3": "kitten"})  # ids are text where they come from json
    assert load_own().thing_classes == ["hot_dog", "kitten", "bus"]
    own(class_names=("a", "b", "c"))  # replaces the former registration
    assert load_own().thing_classes == ["a", "b", "c"]
    own()
    assert load_own().thing_classes == ["hot_dog", "cat", "bus"]
    for wrong in (["a", "b", 3], "abc", {3: None}):
        with pytest.raises(ValueError, match="class_names must be a list of texts"):
            own(class_names=wrong)


def test_own_prompts(own):
    own(prompts="a photo of a {}")
    assert load_own().prompts == "a photo of a {}"
    in_order = [{"prefix": "a "}, {"name": "tabby"}, {"suffix": " on the road"}]
    own(prompts=in_order)
    assert load_own().prompts == in_order
    own(prompts={"cat": {"name": "tabby"}})
    assert load_own().prompts == [{}, {"name": "tabby"}, {}]
    own(class_names={3: "kitten"}, prompts={"kitten": {"prefix": "a "}})
    assert load_own().prompts == [{}, {"prefix": "a "}, {}]
    own()
    assert load_own().get("prompts") is None


def test_own_prompts_that_do_not_fit(own):
    own(prompts=[{"name": "tabby"}])
    with pytest.raises(ValueError, match="'own_data' has 1 prompts for 3 classes"):
        load_own()
    own(prompts={"dog": {"name": "tabby"}})
    with pytest.raises(ValueError, match=r"prompts for \['dog'\], but its classes are"):
        load_own()
    for wrong in ([{"text": "x"}], [{"name": 3}], ["x"], {"cat": "x"}):
        with pytest.raises(ValueError, match="must be a mapping with any of prefix, name, suffix"):
            own(prompts=wrong)


LOADER = {"tokenizer": "shapes", "augmentations": [], "num_workers": 0}


def shown(name):
    """What a test loader makes of all images."""
    return [item for batch in build_test_loader(dataset=name, **LOADER) for item in batch]


@pytest.fixture
def own_v1():
    """A name for a data set that is forgotten afterwards; Detectron2 takes it for LVIS v1."""
    yield "own_v1"
    DatasetCatalog.remove("own_v1")
    MetadataCatalog.remove("own_v1")


def test_detectron2s_own_registration_serves_as_well(coco, own_v1):
    _, path, image_root = coco
    register_coco_instances(own_v1, {}, path, image_root)
    items = shown(own_v1)
    assert len(items) == 6 and items[0]["prompt"].text == "cat. hot dog. bus"
    batch = next(iter(build_train_loader(datasets=[own_v1], total_batch_size=2, **LOADER)))
    assert all(len(item["instances"]) for item in batch)


def test_detectron2s_own_lvis_serves_as_well(coco, own_v1):
    pytest.importorskip("lvis")
    content, path, image_root = coco
    for index, image in enumerate(content["images"]):
        image.update(
            coco_url=f"http://x/images/{index}.png",
            neg_category_ids=[3],
            not_exhaustive_category_ids=[],
        )
    for annotation in content["annotations"]:
        annotation.update(area=9.0, segmentation=[[1.0, 1.0, 9.0, 1.0, 9.0, 9.0]])
    Path(path).write_text(json.dumps(content))
    register_lvis_instances(own_v1, {}, path, str(Path(image_root).parent) + os.sep)
    items = shown(own_v1)
    assert len(items) == 6 and items[0]["neg_category_ids"] == [3]
    assert sum(len(prompt.target_ids) for prompt in items[0]["prompt"]) == 1203
