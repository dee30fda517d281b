"""Yaml files of the original's form become recipes that have the published numbers."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from omegaconf import OmegaConf

from fiber_d2 import cli
from fiber_d2.data.catalog import BUILTIN
from fiber_d2.engine.overrides import load_config
from fiber_d2.engine.resolve import config_text
from fiber_d2.original_config import as_command, as_recipe, read_files, translate
from fiber_d2.original_config.fields import DEFAULTS, FIXED, INERT, SAME, SAME_IN_TRAINING
from fiber_d2.predictor_settings import find_config

REPOSITORY = Path(__file__).parents[2]

# SPEC_DATA_EVAL 8: common to all of FIBER's files, written as they are, tuples as text.
MODEL = {
    "META_ARCHITECTURE": "GeneralizedVLRCNN",
    "WEIGHT": "swin_base_patch4_window12_384_22k.pth",
    "RPN_ONLY": True,
    "RPN_ARCHITECTURE": "VLDYHEAD",
    "BACKBONE": {
        "FUSION_VERSION": "v2",
        "CONV_BODY": "SWINT-FPN-RETINANET",
        "OUT_CHANNELS": 256,
        "USE_CHECKPOINT": True,
        "FREEZE_CONV_BODY_AT": -1,
    },
    "SWINT": {
        "VERSION": "fusion",
        "EMBED_DIM": 128,
        "DEPTHS": "(2, 2, 18, 2)",
        "NUM_HEADS": "(4, 8, 16, 32)",
        "WINDOW_SIZE": 12,
        "OUT_CHANNELS": "(128, 256, 512, 1024)",
        "DROP_PATH_RATE": 0.4,
    },
    "LANGUAGE_BACKBONE": {
        "FREEZE": False,
        "MODEL_TYPE": "roberta-fused-v2",
        "MASK_SPECIAL": False,
        "TOKENIZER_TYPE": "roberta-base",
        "USE_CHECKPOINT": False,
    },
    "RPN": {
        "USE_FPN": True,
        "ANCHOR_SIZES": "(64, 128, 256, 512, 1024)",
        "ANCHOR_STRIDE": "(8, 16, 32, 64, 128)",
        "ASPECT_RATIOS": "(1.0,)",
        "SCALES_PER_OCTAVE": 1,
    },
    "DYHEAD": {
        "CHANNELS": 256,
        "NUM_CONVS": 6,
        "USE_GN": True,
        "USE_DYRELU": True,
        "USE_DFCONV": True,
        "USE_DYFUSE": True,
        "TOPK": 9,
        "SCORE_AGG": "MEAN",
        "USE_CHECKPOINT": True,
        "FUSE_CONFIG": {
            "TYPE": "NONE",
            "USE_DOT_PRODUCT_TOKEN_LOSS": True,
            "CLAMP_DOT_PRODUCT": True,
        },
    },
}
COMMON = {
    "MODEL": MODEL,
    "INPUT": {"PIXEL_MEAN": [103.53, 116.28, 123.675], "PIXEL_STD": [57.375, 57.12, 58.395]},
    "AUGMENT": {"MULT_MIN_SIZE_TRAIN": "(480,560,640,720,800)"},
    "DATALOADER": {"SIZE_DIVISIBILITY": 32},
    "SOLVER": {
        "OPTIMIZER": "ADAMW",
        "BASE_LR": 0.00001,
        "LANG_LR": 0.00001,
        "WEIGHT_DECAY": 0.0001,
        "STEPS": "(0.67, 0.89)",
        "WARMUP_ITERS": 2000,
        "WARMUP_FACTOR": 0.001,
        "FIND_UNUSED_PARAMETERS": False,
        "USE_AMP": True,
        "MODEL_EMA": 0.999,
        "CLIP_GRADIENTS": {"ENABLED": False, "CLIP_TYPE": "full_model", "CLIP_VALUE": 1.0},
    },
    "TEST": {"IMS_PER_BATCH": 16},
}
# Sections 6.16 and 8: what each differs by.
PRETRAIN = {
    "MODEL": {"BACKBONE": {"USE_CHECKPOINT": False, "FREEZE_CONV_BODY_AT": 2}},
    "DATASETS": {
        "TRAIN": '("mixed_train_no_coco", "flickr30k_train", "object365_dt_train", )',
        "TEST": '("coco_2017_val", )',
        "RANDOM_SAMPLE_NEG": 85,
        "CONTROL_PROB": "(0.05, 0.05, 0.5, 0.2)",
        "SEPARATION_TOKENS": ". ",
    },
    "SOLVER": {
        "BASE_LR": 0.0001,
        "WEIGHT_DECAY": 0.01,
        "WEIGHT_DECAY_SCHEDULE": True,
        "MAX_ITER": 800000,
        "IMS_PER_BATCH": 64,
        "CLIP_GRADIENTS": {"ENABLED": True},
    },
}
COCO = {
    "DATASETS": {
        "TRAIN": '("coco_grounding_train", )',
        "TEST": '("coco_2017_val", )',
        "DISABLE_SHUFFLE": False,
        "SEPARATION_TOKENS": ". ",
    },
    "SOLVER": {"MAX_EPOCH": 24, "IMS_PER_BATCH": 32},
    "TEST": {"EVAL_TASK": "detection", "DURING_TRAINING": True},
}
LVIS = {
    **COCO,
    "DATASETS": {
        "TRAIN": '("lvis_grounding_train",)',
        "SPECIAL_SAFEGUARD_FOR_COCO_GROUNDING": True,
        "SEPARATION_TOKENS": ". ",
    },
}


def refcoco(name):
    return {
        "MODEL": {
            "BACKBONE": {"FUSION_VERSION": "v3"},
            "ATSS": {"PRE_NMS_TOP_N": 3000, "DETECTIONS_PER_IMG": 100, "INFERENCE_TH": 0.0},
        },
        "DATASETS": {"TRAIN": f'("{name}_train", )', "TEST": f'("{name}_val", )'},
        "AUGMENT": {"FLIP_PROB_TRAIN": 0.0},
        "SOLVER": {"MAX_EPOCH": 20, "IMS_PER_BATCH": 16},
        "TEST": {"EVAL_TASK": "grounding"},
    }


V3 = {"MODEL": {"BACKBONE": {"FUSION_VERSION": "v3"}}, "SOLVER": {"WARMUP_ITERS": 5000}}
PLACEHOLDERS = {name: {"NUM_CLASSES": 8} for name in ("ATSS", "DYHEAD", "FCOS", "ROI_BOX_HEAD")}
AQUARIUM = "odinw/Aquarium/Aquarium Combined.v2-raw-1024.coco"


def aquarium(prompts=None):
    """Section 4.11. The prompts are those of the data set, unless others are given."""
    entry = BUILTIN["odinw_Aquarium_train"]
    prompts = prompts or [
        {"prefix": "", "suffix": "", **(entry.prompts.get(name) or {}), "name": name}
        for name in entry.classes
    ]
    folders = {"train": "train", "val": "valid", "test": "test"}
    return {
        "MODEL": PLACEHOLDERS,
        "DATASETS": {
            "GENERAL_COPY": 16,
            "CAPTION_PROMPT": repr(prompts),
            "REGISTER": {
                split: {
                    "ann_file": f"{AQUARIUM}/{folder}/annotations_without_background.json",
                    "img_dir": f"{AQUARIUM}/{folder}",
                }
                for split, folder in folders.items()
            },
            "TRAIN": '("train",)',
            "TEST": '("val",)',
        },
        "DATALOADER": {"ASPECT_RATIO_GROUPING": False},
        "SOLVER": {"CHECKPOINT_PERIOD": 100, "MAX_EPOCH": 12, "WARMUP_ITERS": 0},
    }


# Section 6.16 and 6.14: the command of the original for ODinW.
ODINW = (
    "SOLVER.IMS_PER_BATCH 4 SOLVER.WEIGHT_DECAY 0.05 TEST.EVAL_TASK detection "
    "DATASETS.TRAIN_DATASETNAME_SUFFIX _grounding MODEL.BACKBONE.FREEZE_CONV_BODY_AT 2 "
    "SOLVER.USE_AUTOSTEP True SOLVER.SEED 10 DATASETS.SHUFFLE_SEED 3 "
    "DATASETS.USE_CAPTION_PROMPT True DATASETS.DISABLE_SHUFFLE True SOLVER.STEP_PATIENCE 3 "
    "SOLVER.CHECKPOINT_PER_EPOCH 1.0 SOLVER.AUTO_TERMINATE_PATIENCE 8 SOLVER.MODEL_EMA 0.0 "
    "SOLVER.TUNING_HIGHLEVEL_OVERRIDE full SOLVER.WEIGHT_DECAY_SCHEDULE False "
    "SOLVER.MAX_EPOCH 200 DATASETS.GENERAL_COPY 1"
).split()
TASK = {"MODEL": PLACEHOLDERS, "DATALOADER": {"ASPECT_RATIO_GROUPING": False}}


def task(train, test=None):
    return {**TASK, "DATASETS": {"TRAIN": f'("{train}",)', "TEST": f'("{test or train}",)'}}


LVIS_TASK = task("lvis_evaluation_mini_val")
LVIS_TASK["DATASETS"]["REGISTER"] = {
    "lvis_evaluation_mini_val": {
        "ann_file": "coco/annotations/lvis_v1_minival_inserted_image_name.json",
        "img_dir": "coco",
    }
}
LVIS_TEST = "TEST.CHUNKED_EVALUATION 40 MODEL.ATSS.DETECTIONS_PER_IMG 300".split()
LVIS_TEST += "TEST.MDETR_STYLE_AGGREGATE_CLASS_NUM 3000".split()
# Recipe: files as differences to COMMON or as tasks, pairs, overrides of ours that are left over.
PUBLISHED = {
    "pretrain/mixed_flickr_objects365.py": ([PRETRAIN], [], []),
    "pretrain/mixed_flickr_objects365_refexpclean.py": ([PRETRAIN, V3], [], []),
    "finetune/coco.py": ([COCO], [], []),
    # The original evaluates LVIS by another command, which has the limit of 300.
    "finetune/lvis.py": ([LVIS], ["MODEL.ATSS.DETECTIONS_PER_IMG", "300"], []),
    "refexp/refcoco.py": ([refcoco("refcoco")], [], []),
    "refexp/refcocoplus.py": ([refcoco("refcoco+")], [], []),
    "refexp/refcocog.py": ([refcoco("refcocog")], [], []),
    "finetune/odinw_full.py": ([PRETRAIN, aquarium()], ODINW, []),
    "finetune/odinw_3shot.py": (
        [PRETRAIN, aquarium()],
        [*ODINW, "DATASETS.FEW_SHOT", "3", "DATASETS.GENERAL_COPY", "4"],
        # The seed has no effect in the original: the first images are taken.
        ["dataloader.train.few_shot_seed=null"],
    ),
    "eval/lvis_minival.py": ([PRETRAIN, LVIS_TASK], LVIS_TEST, []),
    "eval/flickr30k_test.py": ([PRETRAIN, task("flickr30k_test")], [], []),
    "eval/refcocoplus_testA.py": ([refcoco("refcoco+"), task("refcoco+_testA")], [], []),
}


def merged(base, changes):
    result = copy.deepcopy(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if nested else value
    return result


def keys_of(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@pytest.fixture
def write(tmp_path):
    """Write files as the original has them: ``write(*contents) -> paths``, the first one whole."""

    def write(*contents):
        paths = []
        for number, content in enumerate(contents):
            content = content if number else merged(COMMON, content)
            paths.append(tmp_path / f"{number}.yaml")
            paths[-1].write_text(yaml.safe_dump(content))
        return [str(path) for path in paths]

    return write


def load_recipe(result, tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(as_recipe(result, "some.yaml"))
    return load_config(str(path), [])


# One of each kind is quick.
OTHERS = (
    "pretrain/mixed_flickr_objects365_refexpclean.py",
    "refexp/refcocoplus.py",
    "refexp/refcocog.py",
    "finetune/odinw_full.py",
    "eval/flickr30k_test.py",
    "eval/refcocoplus_testA.py",
)


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in OTHERS)) for name in PUBLISHED],
)
def test_published_files_are_the_recipes(recipe, write, tmp_path):
    files, pairs, left = PUBLISHED[recipe]
    original = read_files(write(*files), pairs)
    result = translate(original)
    assert result.recipe == recipe and not result.registered and not result.unknown
    name = ["data.name=Aquarium"] if "odinw" in recipe else []
    expected = config_text(load_config(find_config(recipe), [*name, *left]))
    assert config_text(load_recipe(result, tmp_path)) == expected
    command = as_command(result).split("\n\n#")[0].replace("\\\n", "").replace("'", "").split()
    weights = "train.init_checkpoint=FILE.pth"
    assert command[:4] == ["python", "train_net.py", "--config-file", f"configs/{recipe}"]
    assert command[4:] == [*(["--eval-only"] if "eval/" in recipe else []), *name, *left, weights]


def test_a_published_recipe_builds(write, tmp_path):
    cfg = load_recipe(translate(read_files(write(COCO))), tmp_path)
    with torch.device("meta"):
        model = instantiate(cfg.model)
    assert sum(parameter.numel() for parameter in model.parameters()) > 2e8


RESIZE = "dataloader.train.augmentations.1"
# A field, a value, and what it is here.
CHANGES = [
    ("MODEL.WEIGHT", "MODEL/model.pth", "train.init_checkpoint", "MODEL/model.pth"),
    ("MODEL.BACKBONE.FUSION_VERSION", "v3", "model.backbone.vision.query_norm", True),
    ("MODEL.DYHEAD.SCORE_AGG", "MAX", "model.head.postprocessor.score_aggregation", "max"),
    ("MODEL.DYHEAD.NUM_CONVS", "4", "model.head.tower.num_blocks", 4),
    ("MODEL.SWINT.DEPTHS", "(2, 2, 6, 2)", "model.backbone.vision.depths", [2, 2, 6, 2]),
    ("MODEL.SWINT.OUT_CHANNELS", "(9, 6, 5, 4)", "model.backbone.neck.in_channels", [6, 5, 4]),
    ("MODEL.FPN.DROP_BLOCK", "False", "model.backbone.neck.drop_block", 0.0),
    ("DATASETS.TEST", "('lvis_evaluation_val',)", "dataloader.test.dataset", "lvis_evaluation_val"),
    ("DATASETS.SEPARATION_TOKENS", " ; ", "protocol.separator", " ; "),
    ("DATASETS.DISABLE_SHUFFLE", "True", "dataloader.train.shuffle_classes", False),
    ("DATASETS.COCO_COPY", "2", "dataloader.train.repeats", [2]),
    ("AUGMENT.FLIP_PROB_TRAIN", "0.25", "dataloader.train.augmentations.0.prob", 0.25),
    ("AUGMENT.MULT_MIN_SIZE_TRAIN", "()", f"{RESIZE}.short_edge_length", [800]),
    ("INPUT.MAX_SIZE_TRAIN", "999", f"{RESIZE}.max_size", 999),
    ("INPUT.MIN_SIZE_TEST", "600", "protocol.short_edge_length", 600),
    ("SOLVER.BASE_LR", "0.00002", "optimizer.lr", 2e-5),
    ("SOLVER.LANG_LR", "0.000005", "optimizer.params.text_lr_factor", 0.25),
    ("SOLVER.BIAS_LR_FACTOR", "1.0", "optimizer.params.bias_lr_factor", 1.0),
    ("SOLVER.IMS_PER_BATCH", "8", "dataloader.train.total_batch_size", 8),
    ("SOLVER.IMS_PER_BATCH", "8", "train.scaling.reference_batch_size", 8),
    ("SOLVER.MAX_EPOCH", "12", "train.epochs", 12),
    ("SOLVER.CHECKPOINT_PER_EPOCH", "0.5", "train.eval_epochs", 0.5),
    ("SOLVER.STEPS", "(0.5,)", "lr_multiplier.milestones", [0.5]),
    ("SOLVER.CLIP_GRADIENTS.ENABLED", "True", "train.clip_grad", 1.0),
    ("SOLVER.MODEL_EMA", "0.0", "train.ema", None),
    ("SOLVER.TUNING_HIGHLEVEL_OVERRIDE", "linear_prob", "train.tuning", "linear_probe"),
    ("TEST.CHUNKED_EVALUATION", "20", "protocol.max_classes", 20),
    ("OUTPUT_DIR", "OUTPUT/a b", "train.output_dir", "OUTPUT/a b"),
]  # fmt: skip


def test_changed_fields_change_their_keys(write, tmp_path):
    pairs = [text for key, value, *_ in CHANGES for text in (key, value)]
    result = translate(read_files(write(COCO), pairs))
    cfg, command = load_recipe(result, tmp_path), as_command(result)
    for key, _, ours, expected in CHANGES:
        found = OmegaConf.select(cfg, ours)
        found = OmegaConf.to_container(found) if OmegaConf.is_config(found) else found
        assert found == (pytest.approx(expected) if type(expected) is float else expected), key
        assert f"{ours}=" in command, key
    assert not result.unknown


def test_nothing_is_dropped_in_silence(write):
    """Every given field is read, or has its default or the only value there is, or is named."""
    content = merged(COCO, aquarium())
    content["FOO"] = {"BAR": 1}
    content["MODEL"] = {**content["MODEL"], "ATSSS": {"TOPK": 3}, "RPN": {"ASPECT_RATIOS": "(2,)"}}
    paths, pairs = write(content), ["SOLVER.BASE_LRR", "1", "SOLVER.USE_COSINE", "True"]
    for eval_only in (False, True):
        original = read_files(paths, pairs)
        result = translate(original, eval_only=eval_only)
        assert result.unknown == ["FOO.BAR", "MODEL.ATSSS.TOPK", "SOLVER.BASE_LRR"]
        assert "only what FIBER was published with" in result.notes["MODEL.RPN.ASPECT_RATIOS"]
        named = {key for names in result.notes for key in names.split(", ")}
        for key, value in original.given.items():
            ours = (SAME, SAME_IN_TRAINING, named, result.inert, result.unknown, original.read)
            default = FIXED.get(key, DEFAULTS.get(key, object()))
            assert (
                any(key in place for place in ours)
                or value == default
                or (key.startswith("DATASETS.REGISTER."))
            ), key
        text = as_command(result)
        for key in (*result.unknown, *result.inert, *named):
            assert key in text
    assert result.inert["SOLVER.WEIGHT_DECAY"] == "of trainings"
    assert "neither DATASETS.TRAIN nor TEST" in result.notes["DATASETS.REGISTER.test"]


def test_tables_do_not_contradict_each_other():
    assert not FIXED.keys() & DEFAULTS.keys() - {"SOLVER.OPTIMIZER"}
    assert not INERT.keys() & (DEFAULTS.keys() | FIXED.keys())
    assert {*SAME, *SAME_IN_TRAINING} <= DEFAULTS.keys()


def test_frozen_text(write):
    result = translate(read_files(write(COCO), ["MODEL.LANGUAGE_BACKBONE.FREEZE", "True"]))
    assert result.wanted["train.tuning"] == "freeze_text"


def test_other_schedules_are_said(write):
    result = translate(read_files(write(COCO), ["SOLVER.USE_COSINE", "True"]))
    (note,) = (note for keys, note in result.notes.items() if "SOLVER.STEPS" in keys)
    assert "published_cosine" in note
    result = translate(read_files(write(PRETRAIN), ["MODEL.DYHEAD.SCORE_AGG", "POWER"]))
    assert "not POWER" in result.notes["MODEL.DYHEAD.SCORE_AGG"]


CATEGORIES = [{"id": 4, "name": "big fish", "supercategory": "x"}, {"id": 9, "name": "eel"}]
WORDS = [{"prefix": "", "name": "fish", "suffix": " that swims"}, {"name": "eel"}]


def test_own_data_are_registered(write, tmp_path):
    """REGISTER, OVERRIDE_CATEGORY and CAPTION_PROMPT, as a recipe and as a module to import."""
    content = aquarium()
    for name, folder in (("train", "t"), ("val", "v")):
        content["DATASETS"]["REGISTER"][name] = {"ann_file": f"{folder}.json", "img_dir": folder}
    content["DATASETS"]["OVERRIDE_CATEGORY"] = repr(CATEGORIES)
    content["DATASETS"]["CAPTION_PROMPT"] = repr(WORDS)
    pairs = [*ODINW, "DATASETS.USE_OVERRIDE_CATEGORY", "True"]
    result = translate(read_files(write(PRETRAIN, content), pairs))
    cfg = load_recipe(result, tmp_path)
    assert cfg.dataloader.train.datasets == ["custom_train"]
    assert (cfg.dataloader.test.dataset, cfg.train.test_best) == ("custom_val", [])
    assert cfg.train.best.metric == "custom_val/bbox/AP"
    assert cfg.train.output_dir == "output/odinw/custom_train/full"
    module = tmp_path / "my_datasets.py"
    module.write_text(as_command(result).split("\npython train_net.py")[0])
    spec = importlib.util.spec_from_file_location("my_datasets", module)
    check_and_forget(lambda: [instantiate(node) for node in cfg.register.values()])
    check_and_forget(lambda: spec.loader.exec_module(importlib.util.module_from_spec(spec)))


def check_and_forget(register):
    register()
    for name, folder in (("custom_train", "t"), ("custom_val", "v")):
        loader = DatasetCatalog.pop(name)
        assert MetadataCatalog.pop(name).evaluator_type == "coco"
        assert (loader.json_file, loader.image_root) == (f"{folder}.json", folder)
        assert loader.options["class_names"] == {4: "big fish", 9: "eel"}
        assert loader.prompts == WORDS


def test_other_words_make_a_data_set_of_ones_own(write):
    files = write(PRETRAIN, aquarium([{"prefix": "x", "name": "fish", "suffix": ""}]))
    result = translate(read_files(files, ODINW))
    assert [data.name for data in result.registered] == ["custom_train", "custom_val"]
    # They are not used.
    result = translate(read_files(files, [*ODINW, "DATASETS.USE_CAPTION_PROMPT", "False"]))
    assert not result.registered and result.wanted["protocol.dataset_prompts"] is False
    assert "DATASETS.CAPTION_PROMPT" in result.notes


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = cli.main(["convert", "config", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_on_the_command_line(run, write, tmp_path):
    base, tasks = write(PRETRAIN, task("flickr30k_val"))
    code, out, err = run(base, "--eval-only", "TEST.SUBSET", "-1", "MODEL.WEIGHT", "w.pth")
    assert code == 0 and err == ""
    assert out.startswith("python train_net.py --config-file configs/eval/coco_zeroshot.py")
    assert "train.init_checkpoint=w.pth" in out
    code, out, _ = run(base, tasks, "--output", "new/recipe.py", "NO.SUCH_FIELD", 3)
    assert code == 0 and "NO.SUCH_FIELD" in out
    cfg = load_config(str(tmp_path / "new/recipe.py"), [])
    assert cfg.dataloader.test.dataset == "flickr30k_val"


def test_mistakes_are_one_line(run, write, tmp_path):
    base, tasks = write(PRETRAIN, task("flickr30k_val"))
    (tmp_path / "unsafe.yaml").write_text("MODEL: !!python/object/apply:os.getcwd []\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "glip.yaml").write_text("MODEL: {META_ARCHITECTURE: GeneralizedVLRCNN}\n")
    for arguments, message in (
        (("SOLVER.SEED", "1"), "Name a .yaml file"),
        (("absent.yaml",), "absent.yaml does not exist"),
        (("unsafe.yaml",), "not plain yaml"),
        (("list.yaml",), "no sections"),
        (("glip.yaml",), "another model than FIBER"),
        ((tasks,), "nothing is said of the model"),
        ((base, "SOLVER.SEED"), "SOLVER.SEED has no value"),
        ((base, "MODEL.BACKBONE.FUSION_VERSION", "v1"), "only v2 and v3"),
        ((base, "DATASETS.TRAIN", "('mine',)"), "mine is no built-in data set"),
        ((base, "DATASETS.TRAIN", "()"), "DATASETS.TRAIN names no data set"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "") and err.startswith("fiber-d2 convert config: error: ")
        assert message in err.replace("\n", " "), err


def test_the_script_is_the_same():
    spec = importlib.util.spec_from_file_location(
        "convert_config", REPOSITORY / "tools" / "convert_config.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from fiber_d2.original_config import main

    assert module.main is main
