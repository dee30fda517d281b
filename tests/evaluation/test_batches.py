"""Batches of images of different sizes and prompts score what single images score."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from fiber_d2.data import ResizeShortestEdgeTruncated, build_test_loader, register_coco_json
from fiber_d2.evaluation import build_evaluator

REPOSITORY = Path(__file__).parents[2]
# Width and height of the images; made 32 pixels high or wide, they need five padded sizes.
SIZES = [(64, 64), (64, 40), (40, 64), (64, 64), (90, 30), (30, 90), (64, 44)]
CLASSES = ["red circle", "green square", "blue star", "yellow cross", "pink triangle"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sizes")
    generator = torch.Generator().manual_seed(0)
    images, annotations = [], []
    for number, (width, height) in enumerate(SIZES, start=1):
        name = f"{number}.png"
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / name)
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for category in range(1, len(CLASSES) + 1):
            box = [4 * category, 3, width / 3, height / 2]
            entry = {"image_id": number, "category_id": category, "bbox": box, "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, "area": box[2] * box[3], **entry})
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "val.json").write_text(json.dumps(content))
    register_coco_json("images_of_different_sizes", str(folder / "val.json"), str(folder))
    yield "images_of_different_sizes"
    DatasetCatalog.remove("images_of_different_sizes")
    MetadataCatalog.remove("images_of_different_sizes")


@pytest.fixture(scope="module")
def model():
    config = LazyConfig.load(str(REPOSITORY / "configs/common/models/fiber_tiny.py")).model
    config.backbone.vision.update(embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 1, 2, 2])
    config.backbone.vision.update(window=4, fused_blocks=[0, 0, 1, 1])
    config.backbone.text.update(dim=32, num_layers=2, num_heads=2, mlp_dim=64)
    config.backbone.text.image_dims = [64, 128]
    config.backbone.neck.update(in_channels=[32, 64, 128], out_channels=16)
    config.head.tower.update(num_blocks=1, norm_groups=4)
    config.head.anchors.sizes = [16, 24, 32, 48, 64]
    config.head.postprocessor.update(score_thresh=0.0, max_detections=30)
    torch.manual_seed(0)
    model = instantiate(config).eval()
    torch.nn.init.zeros_(model.head.prior_bias)
    return model


@torch.no_grad()
def run(model, dataset, batch_size, folder, merged):
    """Results, and per image what was found, best first."""
    model.head.postprocessor.max_merged_detections = merged
    loader = build_test_loader(
        dataset=dataset,
        tokenizer="shapes",
        augmentations=[ResizeShortestEdgeTruncated(short_edge_length=32, max_size=96)],
        max_classes=2,  # three prompts per image
        batch_size=batch_size,
        num_workers=0,
    )
    evaluator = build_evaluator(dataset, output_dir=str(folder))
    evaluator.reset()
    for batch in loader:
        assert all(len(item["prompt"]) == 3 for item in batch)
        evaluator.process(batch, model(batch))
    results = evaluator.evaluate()
    found = json.loads((folder / dataset / "coco_instances_results.json").read_text())
    numbers = range(1, len(SIZES) + 1)
    return results, {number: [d for d in found if d["image_id"] == number] for number in numbers}


@pytest.mark.parametrize("merged", [0, 20], ids=["limit per prompt", "limit per image"])
def test_batches_score_what_single_images_score(model, dataset, tmp_path, merged):
    expected, single = run(model, dataset, 1, tmp_path / "1", merged)
    assert expected["bbox"]["AP"] > 0
    results, found = run(model, dataset, len(SIZES), tmp_path / "all", merged)
    assert results["bbox"] == pytest.approx(expected["bbox"], abs=1e-6, nan_ok=True)
    for number, detections in single.items():
        assert len(detections) == len(found[number])
        # Boxes that are flat within the image are left out.
        assert 10 < len(detections) <= (merged or 90)
        for key in ("score", "bbox"):
            torch.testing.assert_close(
                torch.tensor([d[key] for d in found[number]]),
                torch.tensor([d[key] for d in detections]),
                rtol=1e-4,
                atol=1e-3,
            )
        classes = [d["category_id"] for d in detections]
        assert [d["category_id"] for d in found[number]] == classes
