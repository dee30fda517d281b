"""Blocks of the pages that are marked as Python run, those of a page one after the other."""

import json
import shutil
import sys

import pytest

from .conftest import PAGES, REPOSITORY, blocks_of

SNIPPETS = {
    page: [
        block
        for block in blocks_of((REPOSITORY / page).read_text(encoding="utf-8"))
        if block.language == "python"
    ]
    for page in PAGES
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """What the pages speak of: photographs, a json, a csv, and a model with random weights."""
    import torch
    from detectron2.config import LazyConfig, instantiate
    from PIL import Image

    folder = tmp_path_factory.mktemp("docs")
    (folder / "images").mkdir()
    Image.new("RGB", (96, 80), "white").save(folder / "photo.jpg")
    shutil.copy(folder / "photo.jpg", folder / "images" / "a.jpg")
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 96, "height": 80}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [5, 5, 30, 40]}],
        "categories": [{"id": 7, "name": "raccoon"}],
    }
    for name in ("train.json", "val.json"):
        (folder / name).write_text(json.dumps(content))
    (folder / "boxes.csv").write_text(
        "file,width,height,class,x1,y1,x2,y2\na.jpg,96,80,raccoon,5,5,35,45\n"
    )
    model = instantiate(LazyConfig.load(str(REPOSITORY / "configs/quickstart.py")).model)
    weights = folder / "output/quickstart/model_final.pth"
    weights.parent.mkdir(parents=True)
    torch.save({"model": model.state_dict()}, weights)
    return folder


@pytest.fixture
def catalogs():
    """What a page registers is forgotten after it."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from fiber_d2.evaluation.build import EVALUATORS

    before = set(DatasetCatalog), set(MetadataCatalog), dict(EVALUATORS)
    yield
    for catalog, names in zip((DatasetCatalog, MetadataCatalog), before):
        for name in set(catalog) - names:
            catalog.remove(name)
    EVALUATORS.clear()
    EVALUATORS.update(before[2])


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if SNIPPETS[page]])
def test_snippets(page, workplace, catalogs, tmp_path, monkeypatch):
    folder = tmp_path / "work"
    shutil.copytree(workplace, folder)
    monkeypatch.chdir(folder)
    # A module of its own, for what is defined in it and looked up by name.
    name = "docs_" + page.replace("/", "_")[:-3].replace("-", "_")
    module = type(sys)(name)
    monkeypatch.setitem(sys.modules, name, module)
    for block in SNIPPETS[page]:
        # Padded, so that a traceback names the line of the page.
        source = "\n" * (block.line - 1) + block.text
        exec(compile(source, str(REPOSITORY / page), "exec"), vars(module))


def test_there_are_snippets():
    pages = {page for page, blocks in SNIPPETS.items() if blocks}
    assert {"docs/extending.md", "docs/prompts.md", "docs/getting-started.md"} <= pages
