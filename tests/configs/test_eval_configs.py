"""configs/eval: each recipe's protocol, and each recipe on small data in the true formats."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate

from fiber_d2.checkpoint import export_fiber_state_dict
from fiber_d2.engine.evaluate import build_test_sets
from fiber_d2.engine.overrides import load_config
from fiber_d2.engine.train import evaluate_only, run_lazy_config
from fiber_d2.evaluation.settings import describe_evaluator

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "configs" / "eval"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))

# Fusion v3, threshold, candidates per level, boxes per caption, classes per caption.
DETECTION = (False, 0.05, 1000, 100, None)
LVIS = (False, 0.05, 1000, 300, 40)
REFEXP = (True, 0.0, 3000, 100, None)
# Recipe: data set, protocol, and the result that is published.
ROWS = {
    "coco_zeroshot": ("coco_grounding_val", DETECTION, "bbox/AP"),
    "custom_coco": ("custom", DETECTION, "bbox/AP"),
    "flickr30k_test": ("flickr30k_test", DETECTION, "grounding/R@1"),
    "flickr30k_val": ("flickr30k_val", DETECTION, "grounding/R@1"),
    "lvis_minival": ("lvis_evaluation_mini_val", LVIS, "bbox/AP"),
    "lvis_val": ("lvis_evaluation_val", LVIS, "bbox/AP"),
    "refcoco_testA": ("refcoco_testA", REFEXP, "refexp/refcoco/P@1_giou"),
    "refcoco_testB": ("refcoco_testB", REFEXP, "refexp/refcoco/P@1_giou"),
    "refcoco_val": ("refcoco_val", REFEXP, "refexp/refcoco/P@1_giou"),
    "refcocog_test": ("refcocog_test", REFEXP, "refexp/refcocog/P@1_giou"),
    "refcocog_val": ("refcocog_val", REFEXP, "refexp/refcocog/P@1_giou"),
    "refcocoplus_testA": ("refcoco+_testA", REFEXP, "refexp/refcoco+/P@1_giou"),
    "refcocoplus_testB": ("refcoco+_testB", REFEXP, "refexp/refcoco+/P@1_giou"),
    "refcocoplus_val": ("refcoco+_val", REFEXP, "refexp/refcoco+/P@1_giou"),
    "odinw13": (13, DETECTION, "bbox/AP"),
    "odinw35": (35, DETECTION, "bbox/AP"),
}


def path_of(name):
    return str(FOLDER / f"{name}.py")


def custom_data(root):
    return [
        f"data.json={root}/shapes/annotations/instances_val.json",
        f"data.image_root={root}/shapes/images/val",
    ]


def load(name, root, *overrides):
    if name == "custom_coco":
        overrides = (*custom_data(root), *overrides)
    return load_config(path_of(name), list(overrides))


def register(cfg):
    for node in cfg.get("register", {}).values():
        instantiate(node)


def test_every_recipe_is_described():
    assert sorted(ROWS) == NAMES
    text = (REPOSITORY / "configs" / "README.md").read_text()
    for name in NAMES:
        assert f"`eval/{name}.py`" in text
        command = f"train_net.py --config-file configs/eval/{name}.py --eval-only"
        assert command in (FOLDER / f"{name}.py").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_loaders_and_evaluators(name, catalog, small, tmp_path):
    cfg = load(name, catalog, *small, f"train.output_dir={tmp_path}")
    register(cfg)
    test_sets = build_test_sets(cfg)
    dataset, (v3, threshold, topk, limit, classes), _ = ROWS[name]
    if isinstance(dataset, int):
        assert len(test_sets) == dataset
    else:
        assert [test_set.name for test_set in test_sets] == [dataset]
    vision, processor = cfg.model.backbone.vision, cfg.model.head.postprocessor
    assert vision.query_norm == v3
    assert (processor.score_thresh, processor.pre_nms_topk) == (threshold, topk)
    assert (processor.max_detections, processor.max_merged_detections) == (limit, 0)
    for test_set in test_sets:
        (item,) = next(iter(test_set.loader))
        assert min(item["image"].shape[1:]) == 64
        prompt = item["prompt"]
        prompts = prompt if isinstance(prompt, list) else [prompt]
        if classes:
            assert [part.num_targets for part in prompts] == [40, 5]
            assert prompts[1].text.startswith("brown circle. brown square")


@pytest.mark.parametrize("name", NAMES)
def test_the_published_sizes(name, catalog):
    cfg = load(name, catalog)
    nodes = cfg.dataloader.test if "odinw" in name else [cfg.dataloader.test]
    for node in nodes:
        assert (node.tokenizer, node.separator, node.max_tokens) == ("roberta-base", ". ", 256)
        (resize,) = instantiate(node.augmentations)
        # 640 / 427 * 800 = 1199.06, which is cut to whole pixels.
        assert resize.get_output_shape(427, 640, 800, resize.max_size) == (800, 1199)
        assert (resize.short_edge_length, resize.max_size) == ((800, 800), 1333)


def test_settings_reach_all_sets_of_a_recipe(catalog):
    cfg = load("odinw13", catalog, "protocol.tokenizer=shapes", "protocol.batch_size=3")
    assert {(node.tokenizer, node.batch_size) for node in cfg.dataloader.test} == {("shapes", 3)}


def small_model(cfg):
    """Random weights that find boxes: a token is as likely as not to be meant."""
    torch.manual_seed(0)
    model = instantiate(cfg.model).eval()
    torch.nn.init.zeros_(model.head.prior_bias)
    return model


@pytest.mark.parametrize(("merged", "expected"), [(0, [5, 5]), (7, 7)])
def test_lvis_limits_boxes_per_caption_or_per_image(catalog, small, merged, expected):
    name = "model.head.postprocessor"
    limits = [f"{name}.max_detections=5", f"{name}.max_merged_detections={merged}"]
    cfg = load("lvis_minival", catalog, *small, *limits)
    batch = next(iter(instantiate(cfg.dataloader.test)))
    classes = small_model(cfg)(batch)[0]["instances"].pred_classes
    if merged:
        assert len(classes) == expected
    else:
        assert [int((classes < 40).sum()), int((classes >= 40).sum())] == expected


@pytest.mark.parametrize(
    ("prompts", "caption"),
    [
        ("null", "red circle. red square"),
        ("'a photo of a {}'", "a photo of a red circle. a photo of a red square"),
        ("{red square: {name: box, suffix: ' in red'}}", "red circle. box in red. red triangle"),
    ],
)
def test_prompts_of_custom_data(prompts, caption, catalog, small):
    cfg = load("custom_coco", catalog, *small, f"data.prompts={prompts}")
    register(cfg)
    (item,) = next(iter(instantiate(cfg.dataloader.test)))
    first = item["prompt"][0] if isinstance(item["prompt"], list) else item["prompt"]
    assert first.text.startswith(caption)


def test_a_forgotten_option_is_named(catalog, small):
    with pytest.raises(ValueError, match="add --eval-only"):
        run_lazy_config(load("coco_zeroshot", catalog, *small))


def test_options_of_evaluators_are_arguments_of_their_node(catalog, small):
    cfg = load("coco_zeroshot", catalog, *small, "dataloader.evaluator.legacy_boxes=true")
    (test_set,) = build_test_sets(cfg)
    assert describe_evaluator(test_set.evaluator)["settings"]["legacy_boxes"] is True


TTA_RECIPE = """
from fiber_d2.engine.overrides import load_config
cfg = load_config("{recipe}", {overrides!r})
tta = load_config("{common}/tta.py", []).tta
model, dataloader, train = cfg.model, cfg.dataloader, cfg.train
train.tta = tta
train.tta.update(scales=[48, 64], ranges=None, max_size=128)
dataloader.test.augmentations = []
dataloader.test.mirrored_prompt = True
protocol = cfg.protocol
"""


@pytest.mark.slow
def test_with_test_time_augmentation(catalog, small, tmp_path, checkpoints):
    own = [*small, f"train.output_dir={tmp_path}", f"train.init_checkpoint={checkpoints}/v3.pth"]
    recipe = TTA_RECIPE.format(
        recipe=path_of("refcoco_val"), overrides=own, common=REPOSITORY / "configs" / "common"
    )
    (tmp_path / "tta.py").write_text(recipe)
    cfg = load_config(str(tmp_path / "tta.py"), [])
    results = evaluate_only(cfg)["refcoco_val"]["refexp"]
    assert 0 <= results["P@1"] <= 100
    content = results_in(tmp_path)["refcoco_val"]
    assert content["protocol"]["test_time_augmentation"]["scales"] == [48, 64]
    assert content["protocol"]["prompts_and_images"]["augmentations"] == []
    predictions = tmp_path / "inference" / "refcoco_val" / "refexp_predictions.json"
    assert any(record["boxes"] for record in json.loads(predictions.read_text()))


# The rest runs the program.

# Imports take longer than a small evaluation does, so that most runs share a process.
MANY = """
import json, sys
from fiber_d2.engine.main import main
runs, codes = json.load(sys.stdin), {}
for name, arguments in runs.items():
    try:
        main(arguments)
        codes[name] = 0
    except SystemExit as error:
        codes[name] = error.code
json.dump(codes, open("codes.json", "w"))
"""

MY_DATASETS = """
from detectron2.data.datasets import register_coco_instances
register_coco_instances("mine", {{}}, "{root}/shapes/annotations/instances_val.json",
                        "{root}/shapes/images/val")
"""


def start(command, folder, root, **options):
    """Run Python in ``folder``, with data below ``root``."""
    variables = {"DETECTRON2_DATASETS": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **variables},
        capture_output=True,
        text=True,
        timeout=240,
        **options,
    )


def results_in(folder):
    """Data set name -> content of its results.json."""
    return {
        path.parent.name: json.loads(path.read_text())
        for path in folder.glob("inference/*/results.json")
    }


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, small):
    """Weights of both fusion versions in the original's format, and of v2 in ours."""
    folder = tmp_path_factory.mktemp("weights")
    for name, variant in (("coco_zeroshot", "v2"), ("refcoco_val", "v3")):
        state = small_model(load_config(path_of(name), small)).state_dict()
        original = {f"module.{key}": x for key, x in export_fiber_state_dict(state).items()}
        torch.save({"model": original, "iteration": 7}, folder / f"{variant}.pth")
        if variant == "v2":
            torch.save({"model": state}, folder / "v2_ours.pth")
    return folder


@pytest.fixture(scope="module")
def all_runs(tmp_path_factory, data_root, small, checkpoints):
    """Every recipe, and some of them in other ways: the folder with a folder of each, exit codes
    and what went to stderr."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "my_datasets.py").write_text(MY_DATASETS.format(root=data_root))

    def arguments(name, weights, *overrides, options=()):
        weights = f"train.init_checkpoint={checkpoints}/{weights}.pth"
        config = ["--config-file", path_of(name), "--eval-only"]
        return [*config, *options, *small, weights, f"train.output_dir={name}", *overrides]

    runs = {}
    for name in NAMES:
        own = custom_data(data_root) if name == "custom_coco" else []
        runs[name] = arguments(name, "v3" if ROWS[name][1] is REFEXP else "v2", *own)
    pairs = ["protocol.batch_size=2", "train.output_dir=pairs", "train.pictures=1"]
    runs["pairs"] = arguments("lvis_minival", "v2", *pairs)
    mine = ["dataloader.test.dataset=mine", "train.output_dir=mine"]
    runs["mine"] = arguments("coco_zeroshot", "v2", *mine, options=["--import", "my_datasets.py"])
    # The last, since the log of a run goes on with those of the runs after it.
    runs["ours"] = arguments("coco_zeroshot", "v2_ours", "train.output_dir=ours")
    done = start(["-c", MANY], folder, data_root, input=json.dumps(runs))
    assert (folder / "codes.json").exists(), done.stderr
    return folder, json.loads((folder / "codes.json").read_text()), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs(name, all_runs):
    folder, codes, err = all_runs
    assert codes[name] == 0, err
    found = results_in(folder / name)
    dataset, _, key = ROWS[name]
    if isinstance(dataset, int):
        assert len(found) == dataset
    else:
        assert list(found) == [dataset]
    task, metric = key.split("/", 1)
    for content in found.values():
        assert 0 <= content["results"][task][metric] <= 100
        assert content["protocol"]["checkpoint"].endswith(".pth")
    if isinstance(dataset, int):
        summary = json.loads((folder / name / "odinw.json").read_text())
        every = [content["results"][task][metric] for content in found.values()]
        assert summary["mean"] == pytest.approx(sum(every) / dataset)
        assert (summary["title"], summary["missing"]) == (f"ODinW-{dataset} average", [])


@pytest.mark.slow
def test_images_of_one_size_may_share_a_batch(all_runs):
    folder, codes, err = all_runs
    assert codes["pairs"] == 0, err
    alone, pairs = (
        results_in(folder / name)["lvis_evaluation_mini_val"]["results"]
        for name in ("lvis_minival", "pairs")
    )
    assert alone["bbox"]["AP"] > 0
    for task in ("bbox", "bbox_per_image"):
        assert pairs[task] == pytest.approx(alone[task])
    assert (folder / "pairs" / "pictures" / "contact_sheet.png").exists()


@pytest.mark.slow
def test_both_kinds_of_checkpoints_give_the_same_numbers(all_runs):
    folder, codes, err = all_runs
    assert codes["ours"] == 0, err
    theirs, ours = (
        results_in(folder / name)["coco_grounding_val"]["results"]
        for name in ("coco_zeroshot", "ours")
    )
    assert theirs == ours
    assert theirs["bbox"]["AP"] > 0
    words = "original FIBER's names: converting"
    assert words in (folder / "coco_zeroshot" / "log.txt").read_text()
    assert words not in (folder / "ours" / "log.txt").read_text()


@pytest.mark.slow
def test_data_that_a_user_registered(all_runs):
    folder, codes, err = all_runs
    assert codes["mine"] == 0, err
    found = results_in(folder / "mine")
    assert list(found) == ["mine"]
    # The same images under another name.
    assert found["mine"]["results"]["bbox"]["AP"] > 0


@pytest.mark.slow
def test_the_command_of_the_documentation(tmp_path, data_root, small, checkpoints):
    (tmp_path / "my_datasets.py").write_text(MY_DATASETS.format(root=data_root))
    command = [REPOSITORY / "train_net.py", "--config-file", path_of("custom_coco"), "--eval-only"]
    command += ["--import", "my_datasets.py", f"train.init_checkpoint={checkpoints}/v2.pth"]
    done = start([*command, "dataloader.test.dataset=mine", *small], tmp_path, data_root)
    assert done.returncode == 0, done.stderr
    assert list(results_in(tmp_path / "output" / "eval" / "mine")) == ["mine"]
