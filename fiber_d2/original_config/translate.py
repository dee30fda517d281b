"""What fields of the original's yaml files are in a recipe of ours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fiber_d2.data.catalog import BUILTIN

from .data_sets import DataSets, RegisteredData
from .fields import DEFAULTS, FIXED, INERT, SAME, SAME_IN_TRAINING

# By the first training set, and by the test set, in our names.
TRAININGS = {
    "coco_grounding_train": "finetune/coco.py",
    "lvis_grounding_train": "finetune/lvis.py",
    "refcoco_train": "refexp/refcoco.py",
    "refcoco+_train": "refexp/refcocoplus.py",
    "refcocog_train": "refexp/refcocog.py",
}
EVALUATIONS = {
    "coco_grounding_val": "eval/coco_zeroshot.py",
    "lvis_evaluation_mini_val": "eval/lvis_minival.py",
    "lvis_evaluation_val": "eval/lvis_val.py",
    "flickr30k_val": "eval/flickr30k_val.py",
    "flickr30k_test": "eval/flickr30k_test.py",
    **{f"refcoco_{split}": f"eval/refcoco_{split}.py" for split in ("val", "testA", "testB")},
    **{f"refcoco+_{split}": f"eval/refcocoplus_{split}.py" for split in ("val", "testA", "testB")},
    **{f"refcocog_{split}": f"eval/refcocog_{split}.py" for split in ("val", "test")},
}
# Epochs and images per step that the lengths of these recipes, in steps, were counted from.
LENGTHS = {"finetune/coco.py": (24, 32), "finetune/lvis.py": (24, 32)}
LENGTHS.update({name: (20, 16) for name in TRAININGS.values() if name.startswith("refexp/")})
COPIES = {"flickr": "FLICKR_COPY", "mixed": "MIXED_COPY", "coco": "COCO_COPY", "lvis": "LVIS_COPY"}


@dataclass
class Translation:
    """What the files amount to here.

    Attributes:
        recipe: below configs/.
        needed: overrides that the recipe cannot be read without, by key.
        wanted: values that the run should have, by key. The augmentations ``RandomFlip`` and
            ``ResizeShortestEdge`` stand for their places in the recipe.
        notes: fields that are not carried over as they are, with the reason.
        inert: fields without effect, with the reason.
        unknown: fields that nobody knows.
        registered: data sets that are not built in.
    """

    recipe: str
    needed: dict[str, Any] = field(default_factory=dict)
    wanted: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    inert: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    registered: list[RegisteredData] = field(default_factory=list)


def translate(original: Any, *, eval_only: bool = False) -> Translation:
    """Recipe, values and notes.

    Args:
        original: see :class:`~fiber_d2.original_config.Original`.
        eval_only: a recipe that evaluates. Files that train on their test set mean that anyway.

    Raises:
        ValueError: data sets are missing, or nobody knows where they are.
    """
    sets = DataSets(original)
    train = [sets.ours(name) for name in original["DATASETS.TRAIN"]]
    test = [sets.ours(name) for name in original["DATASETS.TEST"]]
    eval_only = eval_only or (bool(train) and train == test)
    names = test if eval_only else train
    if not names:
        raise ValueError(f"DATASETS.{'TEST' if eval_only else 'TRAIN'} names no data set.")
    result = Translation(_recipe(original, names, eval_only), notes=sets.notes)
    used = {*test[:1], *(() if eval_only else train)}
    result.registered = [data for name, data in sets.registered.items() if name in used]
    _model(result, original)
    if not all(re.match("refcoco|flickr|mixed", name) for name in used):
        # Sentences have no separators.
        result.wanted["protocol.separator"] = original["DATASETS.SEPARATION_TOKENS"]
    if test:
        result.wanted["dataloader.test.dataset"] = test[0]
        _evaluation(result, original, test[0], eval_only)
    if len(test) > 1:
        result.notes["DATASETS.TEST"] = f"one run evaluates one of these: {', '.join(test)}"
    if not eval_only:
        _training(result, original, train, test)
    if "OUTPUT_DIR" in original.given:
        result.wanted["train.output_dir"] = original["OUTPUT_DIR"]
    _note_the_rest(result, original, eval_only)
    return result


def _recipe(original: Any, names: Sequence[str], eval_only: bool) -> str:
    if eval_only:
        return EVALUATIONS.get(names[0], "eval/custom_coco.py")
    if names[0] in TRAININGS:
        return TRAININGS[names[0]]
    if names[0] not in BUILTIN or names[0].startswith("odinw_"):
        shots = original["DATASETS.FEW_SHOT"]
        return f"finetune/odinw_{f'{shots}shot' if shots in (1, 3, 5, 10) else 'full'}.py"
    clean = "_refexpclean" if original["MODEL.BACKBONE.FUSION_VERSION"] == "v3" else ""
    return f"pretrain/mixed_flickr_objects365{clean}.py"


def _model(result: Translation, original: Any) -> None:
    wanted, notes = result.wanted, result.notes
    wanted.update({ours: original[key] for key, ours in SAME.items()})
    wanted["model.backbone.vision.query_norm"] = original["MODEL.BACKBONE.FUSION_VERSION"] == "v3"
    wanted["model.backbone.neck.in_channels"] = original["MODEL.SWINT.OUT_CHANNELS"][1:]
    aggregation = original["MODEL.DYHEAD.SCORE_AGG"]
    if aggregation in ("MEAN", "MAX"):
        wanted["model.head.postprocessor.score_aggregation"] = aggregation.lower()
    else:
        notes["MODEL.DYHEAD.SCORE_AGG"] = f"there is mean and max, not {aggregation}"
    weight = str(original["MODEL.WEIGHT"])
    if weight and "swin" not in Path(weight).name:
        wanted["train.init_checkpoint"] = weight
    elif weight:
        notes["MODEL.WEIGHT"] = (
            "give a checkpoint by train.init_checkpoint; one that starts from Swin and RoBERTa is "
            "made by `fiber-d2 convert initialize`"
        )


def _evaluation(result: Translation, original: Any, test: str, eval_only: bool) -> None:
    chunk = original["TEST.CHUNKED_EVALUATION"]
    if eval_only or "TEST.CHUNKED_EVALUATION" in original.given:
        result.wanted["protocol.max_classes"] = chunk if chunk > 0 else None
    if test.startswith("odinw_"):
        result.wanted["protocol.dataset_prompts"] = bool(original["DATASETS.USE_CAPTION_PROMPT"])
    if test.startswith("flickr") and original["DATASETS.FLICKR_GT_TYPE"] != "separate":
        result.wanted["dataloader.evaluator.protocol"] = original["DATASETS.FLICKR_GT_TYPE"]


def _training(
    result: Translation, original: Any, train: Sequence[str], test: Sequence[str]
) -> None:
    wanted = result.wanted
    fewshot = result.recipe.startswith("finetune/odinw")
    wanted.update({ours: original[key] for key, ours in SAME_IN_TRAINING.items()})
    wanted["dataloader.train.datasets"] = list(train)
    if fewshot:
        _small_data(result, original, train[0])
    if train[0] == "coco_grounding_train" or fewshot:
        wanted["dataloader.train.shuffle_classes"] = not original["DATASETS.DISABLE_SHUFFLE"]
    if any(name.endswith("_dt_train") for name in train):
        sampled = "dataloader.train.sampled_classes"
        wanted[f"{sampled}.num_negatives"] = original["DATASETS.RANDOM_SAMPLE_NEG"]
        wanted[f"{sampled}.control_probabilities"] = original["DATASETS.CONTROL_PROB"]
    repeats = [_copies(original, name) for name in train]
    wanted["dataloader.train.repeats"] = repeats if max(repeats) > 1 else None
    sizes = original["AUGMENT.MULT_MIN_SIZE_TRAIN"] or original["INPUT.MIN_SIZE_TRAIN"]
    original.read.add("INPUT.MIN_SIZE_TRAIN")
    wanted["ResizeShortestEdge.short_edge_length"] = (
        list(sizes) if isinstance(sizes, (tuple, list)) else [sizes]
    )
    wanted["ResizeShortestEdge.max_size"] = original["INPUT.MAX_SIZE_TRAIN"]
    wanted["RandomFlip.prob"] = original["AUGMENT.FLIP_PROB_TRAIN"]
    drop = original["MODEL.FPN.DROP_PROB"] if original["MODEL.FPN.DROP_BLOCK"] else 0.0
    wanted["model.backbone.neck.drop_block"] = drop
    tuning = original["SOLVER.TUNING_HIGHLEVEL_OVERRIDE"]
    if original["MODEL.LANGUAGE_BACKBONE.FREEZE"]:
        wanted["train.tuning"] = "freeze_text"
    elif tuning or fewshot:
        wanted["train.tuning"] = {"linear_prob": "linear_probe"}.get(tuning, tuning)
    _optimisation(result, original)
    _schedule(result, original)


def _small_data(result: Translation, original: Any, train: str) -> None:
    """The recipes for ODinW, which one's own data take, too."""
    match = re.fullmatch("odinw_(.+)_train", train)
    result.needed["data.name"] = match[1] if match else train
    if not match:
        result.wanted["train.test_best"] = []
        if not original["DATASETS.TEST"]:
            result.notes["DATASETS.TEST"] = (
                "names no data set, but one chooses the best checkpoint: dataloader.test.dataset"
            )
    shots = original["DATASETS.FEW_SHOT"]
    if shots:
        result.wanted["dataloader.train.few_shot"] = shots
        result.wanted["dataloader.train.few_shot_seed"] = None
    patience = original["SOLVER.AUTO_TERMINATE_PATIENCE"]
    result.wanted["train.early_stop"] = {"patience": patience} if patience > 0 else None


def _copies(original: Any, name: str) -> int:
    field_name = COPIES.get(re.split("[_0-9]", name)[0], "GENERAL_COPY")
    return max(1, original[f"DATASETS.{field_name}"])


def _optimisation(result: Translation, original: Any) -> None:
    wanted = result.wanted
    # A rate of 0 has no factor; the text tower's is then its own recipe's.
    if original["SOLVER.BASE_LR"]:
        factor = original["SOLVER.LANG_LR"] / original["SOLVER.BASE_LR"]
        wanted["optimizer.params.text_lr_factor"] = factor
    clips, limit = (original[f"SOLVER.CLIP_GRADIENTS.{key}"] for key in ("ENABLED", "CLIP_VALUE"))
    wanted["train.clip_grad"] = limit if clips and limit else None
    decay = original["SOLVER.MODEL_EMA"]
    wanted["train.ema"] = {"decay": decay} if decay else None
    if original["SOLVER.USE_AMP"]:
        result.notes["SOLVER.USE_AMP"] = (
            "bfloat16 where the GPU has it; the original's float16 is train.amp.dtype=float16"
        )


def _schedule(result: Translation, original: Any) -> None:
    wanted = result.wanted
    kind = "multistep"
    if original["SOLVER.USE_AUTOSTEP"]:
        kind = "plateau"
    elif original["SOLVER.USE_COSINE"]:
        kind = "published_cosine"
    of_recipe = "plateau" if result.recipe.startswith("finetune/odinw") else "multistep"
    if kind == of_recipe:
        wanted["lr_multiplier.gamma"] = original["SOLVER.GAMMA"]
        wanted["lr_multiplier.warmup_iters"] = original["SOLVER.WARMUP_ITERS"]
        if kind == "plateau":
            wanted["lr_multiplier.patience"] = original["SOLVER.STEP_PATIENCE"]
            wanted["lr_multiplier.min_lr"] = original["SOLVER.MIN_LR"]
        else:
            wanted["lr_multiplier.milestones"] = list(original["SOLVER.STEPS"])
            wanted["lr_multiplier.warmup_factor"] = original["SOLVER.WARMUP_FACTOR"]
    else:
        names = [name for name in _OF_SCHEDULES if name in original.given]
        result.notes[", ".join(names) or "SOLVER.USE_AUTOSTEP"] = (
            f"the schedule is `{kind}` of configs/common/optim.py, the recipe's is `{of_recipe}`: "
            "give it to lr_multiplier in a recipe of your own"
        )
        original.read.update(names)
    decay = None
    if original["SOLVER.WEIGHT_DECAY_SCHEDULE"]:
        decay = {
            "milestones": list(original["SOLVER.STEPS"]),
            "ratio": original["SOLVER.WEIGHT_DECAY_SCHEDULE_RATIO"],
            "gamma": original["SOLVER.GAMMA"],
        }
    wanted["train.weight_decay_schedule"] = decay
    epochs, batch = original["SOLVER.MAX_EPOCH"], original["SOLVER.IMS_PER_BATCH"]
    wanted["dataloader.train.total_batch_size"] = batch
    # Rates and lengths of a file are for its batch.
    wanted["train.scaling.reference_batch_size"] = batch
    if not epochs:
        wanted["train.epochs"] = None
        wanted["train.max_iter"] = original["SOLVER.MAX_ITER"]
    elif LENGTHS.get(result.recipe) != (epochs, batch):
        wanted["train.epochs"] = epochs
    per_epoch = original["SOLVER.CHECKPOINT_PER_EPOCH"]
    if epochs and per_epoch > 0:
        wanted["train.eval_epochs"] = per_epoch


_OF_SCHEDULES = tuple(
    f"SOLVER.{name}"
    for name in "USE_AUTOSTEP USE_COSINE STEPS GAMMA STEP_PATIENCE MIN_LR WARMUP_ITERS "
    "WARMUP_FACTOR".split()
)


def _note_the_rest(result: Translation, original: Any, eval_only: bool) -> None:
    """A word on every given field that nothing above has looked at."""
    unread = [key for key in original.given if key not in original.read]
    noted = {name for names in result.notes for name in names.split(", ")}
    for key in unread:
        value = original.given[key]
        section = next((name for name in INERT if name[-1] == "." and key.startswith(name)), key)
        if key in noted or key.startswith("DATASETS.REGISTER."):
            continue
        if key in FIXED:
            if not equal(FIXED[key], value):
                result.notes[key] = (
                    f"is {value}; only what FIBER was published with is here: {FIXED[key]}"
                )
        elif key in DEFAULTS:
            if not equal(DEFAULTS[key], value):
                result.inert[key] = (
                    "of trainings" if eval_only else "decides nothing in this training"
                )
        elif key in INERT or section in INERT:
            result.inert[key] = INERT.get(key, INERT.get(section, ""))
        else:
            result.unknown.append(key)


def equal(a: Any, b: Any) -> bool:
    """Whether two plain values are the same; lists are tuples, 1 is 1.0 and True is not 1."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return abs(a - b) <= 1e-9 * max(abs(a), abs(b))
    return bool(a == b)
