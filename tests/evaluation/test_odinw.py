import json
import logging
import math
import os

import pytest
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data import transforms as T
from omegaconf import OmegaConf
from PIL import Image

from fiber_d2.data import register_all_builtin
from fiber_d2.data.catalog import BUILTIN, ODINW13, ODINW35
from fiber_d2.evaluation.odinw import (
    find_odinw_sets,
    odinw_table,
    odinw_test_nodes,
    save_odinw_summary,
    summarize_odinw,
)

DEFAULT_ROOT = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
RACCOON, POTHOLE = "odinw_Raccoon_test", "odinw_pothole_test"


@pytest.fixture
def root(tmp_path):
    """Two of the 13 sets, and one more of the 35, with one image each."""
    for name in (RACCOON, POTHOLE, "odinw_BCCD_test"):
        entry = BUILTIN[name]
        (tmp_path / entry.image_root).mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(tmp_path / entry.image_root / "a.png")
        content = {
            "images": [{"id": 1, "file_name": "a.png", "height": 30, "width": 40}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}],
            "categories": [{"id": i, "name": c} for i, c in enumerate(entry.classes, start=1)],
        }
        (tmp_path / entry.json_file).write_text(json.dumps(content))
    yield tmp_path
    register_all_builtin(DEFAULT_ROOT)


def test_sets_on_disk_and_missing_ones(root):
    found, missing = find_odinw_sets(13, str(root))
    assert sorted(found) == [RACCOON, POTHOLE]
    assert sorted(found + missing) == sorted(f"odinw_{key}_test" for key in ODINW13)
    found, missing = find_odinw_sets("35", str(root))
    assert sorted(found) == ["odinw_BCCD_test", RACCOON, POTHOLE]
    assert len(missing) == len(ODINW35) - 3
    assert find_odinw_sets(35, str(root), split="val")[0] == []
    # Without a root, where they are registered.
    register_all_builtin(str(root))
    assert len(find_odinw_sets(35)[0]) == 3
    for options in ({"which": 12}, {"split": "minival"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be one of"):
            find_odinw_sets(root=str(root), **options)


def test_loaders_of_the_sets_found(root, caplog):
    resize = L(T.ResizeShortestEdge)(short_edge_length="${size}", max_size=64)
    with caplog.at_level(logging.WARNING):
        nodes = odinw_test_nodes(
            13, root=str(root), tokenizer="${words}", augmentations=[resize], num_workers=0
        )
    assert "11 of the 13 sets of ODinW-13" in caplog.text and "odinw_Aquarium_test" in caplog.text
    cfg = OmegaConf.create({"size": 15, "words": "shapes", "test": nodes})
    texts = {}
    for node in cfg.test:
        ((item,),) = instantiate(node)
        assert tuple(item["image"].shape) == (3, 15, 20)
        texts[node.dataset] = item["prompt"].text
    assert texts == {RACCOON: "raccoon", POTHOLE: "there are some holes on the road"}


def test_none_on_disk_is_an_error_that_names_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="None of the 13 sets of ODinW-13") as raised:
        odinw_test_nodes(13, root=str(tmp_path))
    for key in ODINW13:
        assert f"odinw_{key}_test" in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def _results(keys):
    return {f"odinw_{key}_test": {"bbox": {"AP": 10.0 + i}} for i, key in enumerate(keys)}


def test_the_average_is_called_one_only_if_it_is(tmp_path, caplog):
    full = summarize_odinw({**_results(ODINW13), "coco_grounding_val": {"bbox": {"AP": 1.0}}})
    assert full["title"] == "ODinW-13 average"
    assert full["mean"] == pytest.approx(16)
    assert full["missing"] == []
    assert list(full["sets"]) == list(ODINW13)

    results = _results(ODINW13[:4])
    # Without a box to find there is no AP: NaN, or null where it was read from json.
    results[f"odinw_{ODINW13[0]}_test"]["bbox"]["AP"] = math.nan
    results[f"odinw_{ODINW13[3]}_test"]["bbox"]["AP"] = None
    part = summarize_odinw(results, "13")
    assert part["title"] == "average of 2 of 13"
    assert part["mean"] == pytest.approx(11.5)
    assert part["missing"] == [ODINW13[0], *ODINW13[3:]]
    assert summarize_odinw(results, 35)["title"] == "average of 2 of 35"

    with caplog.at_level(logging.INFO):
        path = save_odinw_summary(part, tmp_path / "out")
    assert json.loads(path.read_text()) == part
    table = odinw_table(part)
    assert table in caplog.text
    assert "average of 2 of 13" in table and "11.50" in table
    assert table.count("missing") == 11

    for results in ({}, {"coco_grounding_val": {"bbox": {"AP": 1.0}}}):
        with pytest.raises(ValueError, match="no AP of any set of ODinW-13"):
            summarize_odinw(results)
