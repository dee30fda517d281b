"""Section g of the fixture check: it passes on the reference and notices changes."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FIXTURES = REPOSITORY / "tests" / "fixtures" / "data_eval"


@pytest.fixture
def check(monkeypatch):
    """Checks a directory."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    return importlib.import_module("data_eval.section_g").check


@pytest.fixture
def change(tmp_path):
    """Writes a changed copy of the reference and returns its directory."""

    def edit(function):
        path = tmp_path / "g_optimizer.json"
        shutil.copy(FIXTURES / path.name, path)
        content = json.loads(path.read_text())
        function(content)
        path.write_text(json.dumps(content))
        return tmp_path

    return edit


@pytest.mark.slow
def test_reference_as_a_program(tmp_path):
    tool, report = REPOSITORY / "tools" / "check_fixtures.py", tmp_path / "report.json"
    command = [sys.executable, str(tool), str(FIXTURES), "--sections", "g", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    # What is not compared with the original's numbers is named.
    assert done.stdout.count("note: ") == 2
    found = json.loads(report.read_text())["g"]
    assert found["checked"] >= 800 and found["failures"] == []


def keep(content, **numbers):
    """Leave only these cases of each part."""
    for name in content:
        wanted = numbers.get(name, ())
        content[name] = [case for i, case in enumerate(content[name]) if i in wanted]


def test_every_kind_of_change_is_noticed(check, change):
    def edit(content):
        keep(content, parameter_groups=[0, 1], lr_multiplier=[2, 3], train_loop=[2], plateau=[0, 1])
        first, second = content["parameter_groups"]
        first["params"][1][1] *= 1.001
        first["params"][2][2] *= 1.001
        second["full_model_clipping"] = True
        second["betas"] = [0.9, 0.99]
        content["lr_multiplier"][0]["milestones"][0] -= 1
        content["lr_multiplier"][0]["multipliers"][4][1] *= 1.001
        content["lr_multiplier"][1]["class_name"] = "WarmupMultiStepLR"
        loop = content["train_loop"][0]
        loop["saves"][0][1] -= 1
        loop["optimizer_steps"] -= 1
        loop["final_w"][1] += 1e-3
        loop["ema_w"][0] += 1e-3
        next(value for key, value in loop.items() if key.startswith("steps_"))[7][2] *= 1.001
        content["plateau"][0]["log_eval_lr"][7][2] *= 10
        content["plateau"][1]["warmup_iters"] += 1

    failures = check(change(edit)).failures
    starts = (
        "parameter_groups[0], learning rate of fusion_backbone.backbone.body.patch_embed.proj.bias",
        "parameter_groups[0], weight decay of fusion_backbone.backbone.body.patch_embed.norm.weig",
        "parameter_groups[1], betas",
        "parameter_groups[1], limit of the gradients' norm",
        "lr_multiplier[0], milestones",
        "lr_multiplier[0], iteration 837",
        "lr_multiplier[1], WarmupMultiStepLR",
        "train_loop[0], iterations that are saved",
        "train_loop[0], optimiser steps",
        "train_loop[0], rates and decays of step 27",
        "train_loop[0], weight",
        "train_loop[0], averaged weight",
        "plateau[0], rate after evaluation 7",
        "plateau[1], rate after evaluation 0",
        "plateau[1], rate after evaluation 1",
    )
    assert [f for f in failures if not f.startswith(starts)] == []
    assert len(failures) == len(starts)


def test_other_names_values_and_overrides(check, change):
    def edit(content):
        keep(content, parameter_groups=[0], lr_multiplier=[0], train_loop=[1])
        case = content["parameter_groups"][0]
        case["overrides"] = ["SOLVER.OPTIMIZER", "SGD", "SOLVER.LANG_LR", 3e-5]
        case.update(optimizer="SGD", betas=None, eps=None, amsgrad=None)
        for row in case["params"]:
            if "language_backbone" in row[0]:
                row[1] *= 3
        case["params"] += [
            ["fusion_backbone.backbone.body.layers.9.attn.extra_bias_scale", 2e-4, 0.0],
            ["fusion_backbone.language_backbone.body.model.encoder.extra", 3e-5, 0.01],
        ]
        case["frozen"].append("rpn.head.extra.weight")
        # ODinW's recipe drops by a plateau only where it is told to; warm-up has none.
        case = content["lr_multiplier"][0]
        case.update(config="odinw/Aquarium.yaml", max_iter=10, milestones=[7, 9])
        case["multipliers"] = [[0, 1.0], [6, 1.0], [7, 0.1], [9, 0.1**2]]
        plateau = dict(case, class_name="WarmupReduceLROnPlateau", milestones=[])
        plateau["overrides"] = ["SOLVER.USE_AUTOSTEP", True]
        plateau["multipliers"] = [[0, 1.0], [9, 1.0]]
        content["lr_multiplier"].append(plateau)
        # The last batch is left out instead of another: the original then saves nothing.
        case = content["train_loop"][0]
        case["n_empty_targets_in_batch"] = [[6, 2], [7, 15], [299, 16], [51, 1]]
        case["saves"] = []

    section = check(change(edit))
    assert section.failures == [] and section.checked > 150


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["SOLVER.UNHEARD_OF", 1], "'UNHEARD_OF' has no counterpart"),
        (["SOLVER.BASE_LR", 2e-4], "learning rate of"),
    ],
)
def test_overrides_count(check, change, override, message):
    def edit(content):
        keep(content, parameter_groups=[0])
        content["parameter_groups"][0]["overrides"] = override

    failures = check(change(edit)).failures
    assert failures and message in failures[0]


def test_a_run_without_a_recipe(check, change):
    def edit(content):
        keep(content, lr_multiplier=[0])
        content["lr_multiplier"][0]["config"] = "imagenet.yaml"

    assert "no recipe here repeats the run 'imagenet.yaml'" in check(change(edit)).failures[0]


def test_missing_file(check, tmp_path):
    with pytest.raises(FileNotFoundError):
        check(tmp_path)
