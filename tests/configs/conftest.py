"""The data sets of the recipes in small, under their true names and formats; a model in small."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

# FIBER-B of few and narrow layers, images of 64 pixels, and no network for the tokenizer.
SMALL = [
    "model.backbone.vision.embed_dim=16",
    "model.backbone.vision.depths=[1,1,2,1]",
    "model.backbone.vision.num_heads=[1,1,2,2]",
    "model.backbone.vision.window=2",
    "model.backbone.vision.fused_blocks=[0,0,1,1]",
    "model.backbone.text.vocab_size=2000",
    "model.backbone.text.dim=32",
    "model.backbone.text.num_layers=2",
    "model.backbone.text.num_heads=2",
    "model.backbone.text.mlp_dim=64",
    "model.backbone.text.image_dims=[64,128]",
    "model.backbone.neck.in_channels=[32,64,128]",
    "model.backbone.neck.out_channels=16",
    "model.head.tower.num_blocks=1",
    "model.head.tower.norm_groups=4",
    "model.head.anchors.sizes=[16,24,32,48,64]",
    "protocol.tokenizer=shapes",
    "protocol.short_edge_length=64",
    "protocol.num_workers=0",
    "train.device=cpu",
    "train.pictures=0",
]
# The same for training: two iterations of two images.
SMALL_TRAINING = [
    *SMALL,
    "dataloader.train.total_batch_size=2",
    "dataloader.train.num_workers=0",
    "train.max_iter=2",
    "train.log_period=1",
    "train.threads=1",
]


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """A folder of all data sets, as datasets/README.md describes them."""
    from fiber_d2.data.shapes import prepare_shapes

    root = tmp_path_factory.mktemp("datasets")
    colors = ["red", "green", "blue", "yellow", "orange", "purple", "pink", "cyan", "brown"]
    # 45 classes, which is more than the 40 that a caption of LVIS holds.
    shapes = ["circle", "square", "triangle", "star", "cross"]
    prepare_shapes(
        root / "shapes", num_train=0, num_val=2, image_size=64, colors=colors, shapes=shapes
    )
    for folder in ("coco/val2017", "coco/train2014", "flickr30k/flickr30k_images"):
        shutil.copytree(root / "shapes" / "images" / "val", root / folder)
    source = root / "shapes" / "annotations"
    write(root / "coco/annotations/instances_val2017.json", read(source / "instances_val.json"))
    write_lvis(root, read(source / "lvis_val.json"))
    write_flickr30k(root, read(source / "final_flickr_separateGT_val.json"))
    write_refcoco(root, read(source / "finetune_shapes_val.json"))
    write_odinw(root, read(source / "instances_val.json"))
    write_training_splits(root, source)
    return root


def read(path):
    return json.loads(path.read_text())


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_lvis(root, content):
    for image in content["images"]:
        name = image.pop("file_name")
        image["coco_url"] = f"http://images.cocodataset.org/val2017/{name}"
    write(root / "lvis/lvis_v1_val.json", content)
    for image in content["images"]:
        image["file_name"] = "/".join(image["coco_url"].split("/")[-2:])
    write(root / "lvis/lvis_v1_minival_inserted_image_name.json", content)


def write_flickr30k(root, content):
    entities = root / "flickr30k" / "flickr30k"
    shutil.copytree(root / "shapes" / "flickr30k_entities", entities)
    shutil.copy(entities / "val.txt", entities / "test.txt")
    for split in ("val", "test"):
        write(root / f"mdetr_annotations/final_flickr_separateGT_{split}.json", content)


def write_refcoco(root, content):
    splits = {"refcoco": "val testA testB", "refcoco+": "val testA testB", "refcocog": "val test"}
    for name in splits:
        for image in content["images"]:
            image["dataset_name"] = name
            image.pop("candidates", None)
        for split in splits[name].split():
            write(root / f"mdetr_annotations/finetune_{name}_{split}.json", content)


def write_odinw(root, content):
    """One image for each split, with the classes that the published files have."""
    from fiber_d2.data.catalog import BUILTIN, ODINW35

    image = content["images"][0]
    boxes = [entry["bbox"] for entry in content["annotations"] if entry["image_id"] == image["id"]]
    names = [f"odinw_{name}_{split}" for name in ODINW35 for split in ("train", "val", "test")]
    for name in names:
        entry = BUILTIN[name]
        classes = entry.classes
        annotations = [
            {
                "id": number,
                "image_id": image["id"],
                "category_id": number % len(classes) + 1,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for number, box in enumerate(boxes, start=1)
        ]
        categories = [{"id": number, "name": text} for number, text in enumerate(classes, start=1)]
        write(
            root / entry.json_file,
            {"images": [image], "annotations": annotations, "categories": categories},
        )
        shutil.copy(root / "shapes/images/val" / image["file_name"], root / entry.image_root)


def write_training_splits(root, source):
    """Training files out of the same two images."""
    for folder in ("coco/train2017", "gqa/images"):
        shutil.copytree(root / "shapes" / "images" / "val", root / folder)
    write(root / "coco/annotations/instances_train2017.json", read(source / "instances_val.json"))
    lvis = read(source / "lvis_val.json")
    for image in lvis["images"]:
        name = image.pop("file_name")
        image["coco_url"] = f"http://images.cocodataset.org/train2017/{name}"
    write(root / "lvis/lvis_v1_train.json", lvis)
    phrases = read(source / "final_flickr_separateGT_val.json")
    write(root / "mdetr_annotations/final_flickr_separateGT_train.json", phrases)
    for number, image in enumerate(phrases["images"]):
        image["dataset_name"] = "mixed"
        image["data_source"] = "coco" if number % 2 else "vg"
    for name in ("no_coco", "no_coco_refexpclean"):
        write(root / f"mdetr_annotations/final_mixed_train_{name}.json", phrases)
    expressions = read(source / "finetune_shapes_val.json")
    for name in ("refcoco", "refcoco+", "refcocog"):
        for image in expressions["images"]:
            image["dataset_name"] = name
            image.pop("candidates", None)
        write(root / f"mdetr_annotations/finetune_{name}_train.json", expressions)
    write_objects365(root, source)


def write_objects365(root, source):
    path = REPOSITORY / "datasets" / "objects365_tsv.py"
    spec = importlib.util.spec_from_file_location("objects365_tsv", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    folder = root / "Objects365"
    arguments = {
        "--json": source / "instances_val.json",
        "--image-root": root / "shapes/images/val",
        "--output": folder,
        "--name": "objects365_train_vgoiv6",
        "--cas": 2,
    }
    assert script.main(["to-tsv", *(str(x) for pair in arguments.items() for x in pair)]) == 0
    name = "objects365_train_vgoiv6.cas{}.yaml"
    (folder / name.format(2)).rename(folder / name.format(2000))


@pytest.fixture
def catalog(data_root, monkeypatch):
    """The built-in data sets, read from ``data_root`` while a test runs."""
    from fiber_d2.data.builtin import register_all_builtin

    with monkeypatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(data_root))
        register_all_builtin()
        yield data_root
    register_all_builtin()


@pytest.fixture(scope="session")
def small():
    """Overrides that make a recipe small."""
    return list(SMALL)


@pytest.fixture(scope="session")
def small_training():
    """Overrides that make a training small."""
    return list(SMALL_TRAINING)
