import json
import logging

import pytest

import fiber_d2.evaluation.chance
from fiber_d2.engine.report import RunSummary, final_report

METRICS = {
    "detection/AP": ("boxes", "bbox/AP"),
    "refexp/P@1": ("expressions", "refexp/shapes/P@1"),
    "missing": ("expressions", "refexp/P@99"),
}


def summary(folder):
    return RunSummary(
        results={"boxes": {"bbox": {"AP": 51.25}}, "expressions": {"refexp": {"shapes/P@1": 80.0}}},
        output_dir=str(folder),
        checkpoint="model_final.pth",
        seed=3,
        num_parameters=5_400_000,
        iterations=100,
        train_seconds=61.04,
        total_seconds=90.0,
    )


@pytest.fixture
def chance(monkeypatch):
    levels = {"boxes": {"bbox": {"AP": 1.5}}, "expressions": {"refexp": {"shapes/P@1": 33.0}}}
    asked = []

    def chance_level(name, seed=0, repeats=5):
        asked.append((name, seed))
        return levels[name]

    monkeypatch.setattr(fiber_d2.evaluation.chance, "chance_level", chance_level)
    return asked


def test_numbers_beside_their_chance_level(tmp_path, chance, caplog):
    write = final_report(metrics=METRICS, chance_seed=7, next_steps=["take a longer run"])
    with caplog.at_level(logging.INFO):
        content = write(summary(tmp_path))
    assert json.loads((tmp_path / "metrics.json").read_text()) == content
    assert content == {
        "detection/AP": 51.25,
        "refexp/P@1": 80.0,
        "chance/detection/AP": 1.5,
        "chance/refexp/P@1": 33.0,
        "time/train_seconds": 61.0,
        "time/total_seconds": 90.0,
        "iterations": 100,
        "num_parameters": 5_400_000,
        "seed": 3,
    }
    assert chance == [("boxes", 7), ("expressions", 7)]
    rows = [line.split() for line in caplog.text.splitlines()]
    assert ["detection/AP", "51.2", "1.5", "boxes"] in rows
    assert ["missing", "-", "-", "expressions"] in rows
    assert "no result refexp/P@99 of expressions" in caplog.text
    for text in ("0:01:01", "5.4 M", "model_final.pth", "take a longer run"):
        assert text in caplog.text


def test_without_chance(tmp_path, chance):
    content = final_report(metrics=METRICS, chance=False)(summary(tmp_path))
    assert not any(name.startswith("chance/") for name in content)
    assert chance == []


def test_a_source_must_be_a_pair():
    with pytest.raises(ValueError, match=r"'a' needs a pair"):
        final_report(metrics={"a": "bbox/AP"})
