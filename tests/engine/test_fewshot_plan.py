"""The few-shot protocol without its trainings: data sets, choices of images, lengths, the table."""

import json
import math
import statistics

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fiber_d2.data.fewshot import few_shot_subset
from fiber_d2.engine.fewshot import parse_arguments
from fiber_d2.engine.fewshot_plan import (
    Splits,
    datasets_module,
    default_copies,
    find_splits,
    key_of_test_loader,
    plan_trainings,
    quoted,
)
from fiber_d2.engine.fewshot_runs import Run, execute
from fiber_d2.engine.fewshot_table import make_rows, markdown_table

SIZE = {"total_batch_size": 4}
CFG = OmegaConf.create({"dataloader": {"train": SIZE, "test": [{}]}, "train": {"accumulate": 2}})
# Of each image the classes; the class "rare" is in two of them.
IMAGES = [[0], [0], [0, 1], [1], [0], [1], [0, 0], [1, 2], [2], [0]]


@pytest.fixture
def registered():
    """``puffins``, ten images to train on; any other names on demand."""
    names = []

    def register(name, images=IMAGES, ground_truth="detection", **metadata):
        records = [
            {
                "image_id": number,
                "annotations": [
                    {"bbox": [0, 0, 9, 9], "bbox_mode": BoxMode.XYWH_ABS, "category_id": category}
                    for category in categories
                ],
            }
            for number, categories in enumerate(images)
        ]
        DatasetCatalog.register(name, lambda: records)
        MetadataCatalog.get(name).set(
            ground_truth=ground_truth, thing_classes=["puffin", "gull", "rare"], **metadata
        )
        names.append(name)
        return records

    register("puffins_train")
    register("puffins_val")
    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def values(training):
    parser = OverridesParser.create()
    return {
        override.key_or_group: override.value()
        for override in map(parser.parse_override, training.overrides)
    }


def test_splits_of_odinw_and_of_ones_own(registered):
    assert find_splits("Aquarium") == Splits(
        "odinw_Aquarium_train", "odinw_Aquarium_val", "odinw_Aquarium_test"
    )
    minivals = [
        name
        for name in DatasetCatalog.list()
        if name.startswith("odinw_") and name.endswith("_minival")
    ]
    assert minivals
    for name in minivals:
        assert find_splits(name[len("odinw_") : -len("_minival")]).val == name
    own = find_splits("puffins")
    assert own == Splits("puffins_train", "puffins_val", "puffins_val")
    assert own.tests_on_val
    registered("puffins_test")
    assert find_splits("puffins").test == "puffins_test"
    with pytest.raises(KeyError, match="Did you mean puffins.*Known: .*odinw_Aquarium.*--train-js"):
        find_splits("pufins")


def test_lengths_are_those_of_the_original():
    assert [default_copies(shots) for shots in (1, 3, 5, 10, 0)] == [8, 4, 2, 1, 1]


def test_a_training_is_recipe_plus_overrides(registered):
    splits = find_splits("puffins")
    first, other, everything = plan_trainings(CFG, splits, shots=[2], seeds=[3, 30]) + (
        plan_trainings(CFG, splits, shots=[0], seeds=[7], epochs=3)
    )
    records = DatasetCatalog.get("puffins_train")
    for training, seed in ((first, 3), (other, 30)):
        found = values(training)
        number = len(few_shot_subset(records, 2, seed=seed))
        assert training.num_images == number
        # 4 copies of each image, and 2 batches of 4 images in a step.
        assert found["train.max_iter"] == 200 * number * 4 // 8
        assert found["train.eval_period"] == number * 4 // 8
        assert found["dataloader.train.datasets"] == ["puffins_train"]
        assert found["dataloader.train.few_shot"] == 2
        assert found["dataloader.train.few_shot_seed"] == found["train.seed"] == seed
        assert found["dataloader.train.repeats"] == [4]
        assert found["train.best"] == {"metric": "puffins_val/bbox/AP", "mode": "max"}
        assert found["train.test_best"] == ["puffins_val"]
        assert found["dataloader.test.0.dataset"] == "puffins_val"
    found = values(everything)
    assert (found["dataloader.train.few_shot"], everything.num_images) == (0, 10)
    # 30 images in steps of 8, and an epoch has one whole step.
    assert (found["train.max_iter"], found["train.eval_period"]) == (3, 1)
    assert [first.name, everything.name] == ["2shot_seed3", "all_images_seed7"]


def test_published_choices_come_first_where_they_are(registered, tmp_path):
    splits = find_splits("puffins")
    missing, present = tmp_path / "missing.json", tmp_path / "present.json"
    present.touch()
    registered("puffins_train_shot1_seed3", IMAGES[7:], json_file=str(present))
    registered("puffins_train_shot1_seed30", IMAGES[7:], json_file=str(missing))

    def kinds(**options):
        trainings = plan_trainings(CFG, splits, shots=[1], seeds=[3, 30], **options)
        return [
            (t.selection, values(t)["dataloader.train.datasets"], t.num_images) for t in trainings
        ]

    drawn = kinds(selection="seeded")[1]
    assert kinds() == [("prepared", ["puffins_train_shot1_seed3"], 3), drawn]
    assert drawn[:2] == ("seeded", ["puffins_train"])
    with pytest.raises(FileNotFoundError, match="missing.json does not exist; --selection seeded"):
        kinds(selection="prepared")
    # As the original: the same images for all seeds.
    same = plan_trainings(CFG, splits, shots=[1], seeds=[3, 30], selection="first")
    assert [values(t)["dataloader.train.few_shot_seed"] for t in same] == [None, None]
    assert [values(t)["train.seed"] for t in same] == [3, 30]


def test_classes_with_too_few_images_are_named(registered):
    splits = find_splits("puffins")
    with pytest.raises(
        ValueError, match="fewer than 3 images of 1 of its 3 classes: rare 2.*--all"
    ):
        plan_trainings(CFG, splits, shots=[3], seeds=[3])
    (training,) = plan_trainings(CFG, splits, shots=[3], seeds=[3], allow_fewer=True)
    assert training.num_images == len(
        few_shot_subset(DatasetCatalog.get("puffins_train"), 3, seed=3)
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shots": [1, 1], "seeds": [3]}, "--shots 1 1: give different numbers"),
        ({"shots": [1], "seeds": [-3]}, "--seeds -3"),
        ({"shots": [1], "seeds": [3], "epochs": 0}, "--epochs 0"),
        ({"shots": [1], "seeds": [3], "copies": 0}, "--copies 0"),
    ],
)
def test_numbers_that_make_no_protocol(registered, options, message):
    with pytest.raises(ValueError, match=message):
        plan_trainings(CFG, find_splits("puffins"), **options)


def test_data_without_classes_are_refused(registered):
    registered("texts_train", ground_truth="grounding")
    splits = Splits("texts_train", "puffins_val", "puffins_val")
    with pytest.raises(ValueError, match="'texts_train' is not one of detection"):
        plan_trainings(CFG, splits, shots=[1], seeds=[3])


def test_a_recipe_has_one_test_loader():
    for test, expected in (({"dataset": "a"}, "dataloader.test"), ([{}], "dataloader.test.0")):
        cfg = OmegaConf.create({"dataloader": {"test": test}})
        assert key_of_test_loader(cfg) == expected
    with pytest.raises(ValueError, match="this one has 2"):
        key_of_test_loader(OmegaConf.create({"dataloader": {"test": [{}, {}]}}))


@given(st.text(st.sampled_from("ab\\'\" ,:[]{}()=/.$é")) | st.text())
def test_any_name_survives_the_command_line(text):
    parsed = OverridesParser.create().parse_override(f"key=[{quoted(text)}]")
    assert parsed.value() == [text]


def test_overrides_may_follow_options_with_several_values():
    args = parse_arguments(
        ["--dataset", "a", "--shots", "1", "3", "--seeds", "3", "train.x=1", "+b.c={d: 2}"]
    )
    assert (args.shots, args.seeds) == ([1, 3], [3])
    assert args.overrides == ["train.x=1", "+b.c={d: 2}"]
    assert args.output.parts == ("output", "fewshot", "a")


def test_ones_own_files_become_a_module(tmp_path):
    text = datasets_module("it's", {"train": ("t.json", "images"), "val": ("v.json", "images")})
    names = {}

    def register_coco_json(name, json_file, image_root):
        names[name] = (json_file, image_root)

    lines = [line for line in text.splitlines() if line.startswith("register")]
    exec("\n".join(lines), {"register_coco_json": register_coco_json})
    assert list(names) == ["it's_train", "it's_val"]
    assert all(path.startswith("/") for paths in names.values() for path in paths)
    compile(text, "datasets.py", "exec")


def cell(ap, **more):
    return {"test": {"bbox/AP": ap, "bbox/AP50": 2 * ap if ap else None}, "images": 4, **more}


def test_the_table_has_means_and_deviations_of_the_sample():
    found = {(1, 3): cell(10.0, val=1.0), (1, 30): cell(14.0, val=3.0), (5, 3): cell(20.0, val=9.0)}
    found[0, 3] = cell(None, images=150, val=None)
    rows = make_rows({"bbox/AP": 2.0, "bbox/AP50": 4.0}, [1, 5, 0], found)
    assert [row["shots"] for row in rows] == ["zero-shot", 1, 5, "all"]
    ap = rows[1]["test"]["bbox/AP"]
    assert ap["mean"] == 12.0
    assert ap["std"] == pytest.approx(statistics.stdev([10, 14])) == pytest.approx(math.sqrt(8))
    assert rows[1]["test"]["bbox/AP50"]["values"] == [20.0, 28.0]
    assert rows[2]["test"]["bbox/AP"]["std"] is None
    json.dumps(rows, allow_nan=False)
    lines = [
        [part.strip() for part in line.strip("|").split("|")]
        for line in markdown_table(rows).splitlines()
    ]
    assert lines[2] == ["zero-shot", "0", "-", "2.0", "4.0", "-", ""]
    assert lines[3] == ["1", "4", "2", "12.0 ± 2.8", "24.0 ± 5.7", "2.0 ± 1.4", "3: 10.0, 30: 14.0"]
    assert lines[4][3] == "20.0"
    assert lines[5] == ["all images", "150", "1", "-", "-", "-", "3: -"]


def test_a_finished_run_counts_for_its_settings_only(tmp_path):
    run = Run("1-shot, seed 3", tmp_path, (), {"recipe": "a", "checkpoint": "b"})
    assert run.results is None
    (tmp_path / "run.json").write_text(
        json.dumps({"settings": run.settings, "results": {"seconds": 1}})
    )
    assert run.results == {"seconds": 1}
    other = Run(run.title, tmp_path, (), {"recipe": "a", "checkpoint": "c"})
    with pytest.raises(ValueError, match="other settings .another checkpoint.: choose another --o"):
        other.note()
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read .*delete the folder"):
        run.note()


def test_a_folder_of_another_training_is_left_alone(tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    with pytest.raises(ValueError, match="holds checkpoints of something else"):
        execute(Run("1-shot, seed 3", tmp_path, (), {}), lambda folder: {})
