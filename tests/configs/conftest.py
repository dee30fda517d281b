"""Every data set of configs/eval in small, under its true names and formats; a model in small."""

import json
import shutil

import pytest

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
    """One image for each test split, with the classes that the published files have."""
    from fiber_d2.data.catalog import BUILTIN, ODINW35

    image = content["images"][0]
    boxes = [entry["bbox"] for entry in content["annotations"] if entry["image_id"] == image["id"]]
    for name in ODINW35:
        entry = BUILTIN[f"odinw_{name}_test"]
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
