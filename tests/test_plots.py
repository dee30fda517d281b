"""Curves and bars against the precision arrays of pycocotools and of the lvis package."""

import csv
import json

import matplotlib
import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from lvis import LVIS, LVISEval, LVISResults
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fiber_d2.data import register_coco_json
from fiber_d2.evaluation import build_evaluator
from fiber_d2.evaluation.curves import PrecisionCurves
from fiber_d2.evaluation.score import main
from fiber_d2.plots import class_ap_figure, precision_recall_figure
from fiber_d2.visualization import plot_class_ap, plot_precision_recall

NAMES = ["ant", "a $2 cat", "yak", "unicorn", "zebra"]  # no image shows a unicorn


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Ground truth that is COCO's as well as LVIS's, and predictions."""
    rng = np.random.default_rng(4)
    images = [
        {
            **{"id": i, "width": 200, "height": 200, "file_name": f"{i}.jpg"},
            **{"neg_category_ids": [1, 2, 3, 5, 8], "not_exhaustive_category_ids": []},
        }
        for i in range(12)
    ]
    ids = [3, 1, 8, 5, 2]
    categories = [{"id": i, "name": n, "frequency": f} for i, n, f in zip(ids, NAMES, "rccff")]
    annotations, found = [], []
    for image in images:
        for _ in range(6):
            x, y, w, h = (float(value) for value in rng.uniform(5, 90, 4))
            category = int(rng.choice([3, 1, 8, 2]))
            annotations.append(
                {
                    **{"id": len(annotations) + 1, "image_id": image["id"], "iscrowd": 0},
                    **{"category_id": category, "bbox": [x, y, w, h], "area": w * h},
                }
            )
            for _ in range(3):
                dx, dy, dw, dh = rng.normal(0, 6, 4)
                box = [x + dx, y + dy, max(w + dw, 1), max(h + dh, 1)]
                guess = category if rng.random() < 0.7 else int(rng.choice(ids))
                score = float(rng.random())
                found.append(
                    {"image_id": image["id"], "category_id": guess, "bbox": box, "score": score}
                )
    folder = tmp_path_factory.mktemp("plots")
    truth, predictions = folder / "truth.json", folder / "predictions.json"
    content = {"info": {}, "images": images, "categories": categories, "annotations": annotations}
    truth.write_text(json.dumps(content))
    predictions.write_text(json.dumps(found))
    return truth, predictions


@pytest.fixture
def evaluator(files):
    """``evaluator(type, **options)``, having scored the file."""
    names = []

    def scored(kind, **options):
        names.append(f"plots_{kind}_{len(names)}")
        register_coco_json(names[-1], str(files[0]), "", evaluator_type=kind)
        built = build_evaluator(names[-1], distributed=False, **options)
        return built, built.score_file(files[1])

    yield scored
    for name in names:
        MetadataCatalog.remove(name)


def test_curves_are_the_precision_of_pycocotools(files, evaluator):
    truth = COCO(str(files[0]))
    expected = COCOeval(truth, truth.loadRes(str(files[1])), "bbox")
    expected.evaluate()
    expected.accumulate()
    precision = expected.eval["precision"][:, :, :, 0, -1]
    names = [category["name"] for category in truth.loadCats(expected.params.catIds)]
    for faster in (False, True):
        built, results = evaluator("coco", use_faster=faster)
        curves = built.curves["bbox"]
        assert curves.names == names
        found = np.nan_to_num(curves.precision, nan=-1)
        np.testing.assert_allclose(found, precision, rtol=0, atol=1e-15 if faster else 0)
        np.testing.assert_array_equal(curves.recall, expected.params.recThrs)
        for name, iou in (("AP", None), ("AP50", 0.5), ("AP75", 0.75)):
            assert curves.ap(iou) == pytest.approx(results["bbox"][name], abs=1e-9)
        for name, value in zip(curves.names, curves.class_ap()):
            assert value == pytest.approx(results["bbox"].get(f"AP-{name}", np.nan), nan_ok=True)
        assert np.isnan(curves.class_ap()[names.index("unicorn")])


@pytest.mark.filterwarnings("ignore:The 'warn' method:DeprecationWarning")
def test_curves_are_the_precision_of_the_lvis_package(files, evaluator, monkeypatch):
    # The package uses a name that NumPy no longer has.
    monkeypatch.setattr(np, "float", float, raising=False)
    truth = LVIS(str(files[0]))
    expected = LVISEval(truth, LVISResults(truth, str(files[1])), "bbox")
    expected.evaluate()
    expected.accumulate()
    precision = expected.eval["precision"][:, :, :, 0]
    built, results = evaluator("lvis")
    names = [truth.cats[category_id]["name"] for category_id in expected.params.cat_ids]
    for kind, curves in built.curves.items():
        assert curves.names == names
        # Of so few detections each kind counts all.
        np.testing.assert_allclose(np.nan_to_num(curves.precision, nan=-1), precision, atol=1e-12)
        assert curves.ap() == pytest.approx(results[kind]["AP"], abs=1e-9)
        assert curves.ap(0.5) == pytest.approx(results[kind]["AP50"], abs=1e-9)
    assert list(built.curves) == ["bbox", "bbox_per_image"]


def test_descriptions_have_curves_too(evaluator):
    built, results = evaluator("description")
    assert built.curves["bbox"].ap() == pytest.approx(results["description"]["FULL"])


def test_what_is_drawn_is_the_curves(evaluator):
    curves = evaluator("coco")[0].curves["bbox"]
    (axes,) = precision_recall_figure(curves, title="a $ set").axes
    defined = curves.precision[:, :, curves.defined]
    for line, expected in zip(
        axes.lines, (defined[0].mean(axis=1), defined[5].mean(axis=1), defined.mean(axis=(0, 2)))
    ):
        np.testing.assert_array_equal(line.get_xdata(), curves.recall)
        np.testing.assert_allclose(line.get_ydata(), expected, atol=1e-12)
    assert [line.get_label() for line in axes.lines] == [
        f"IoU 0.50 (AP {curves.ap(0.5):.1f})",
        f"IoU 0.75 (AP {curves.ap(0.75):.1f})",
        f"mean of IoU 0.50 to 0.95 (AP {curves.ap():.1f})",
    ]
    (axes,) = class_ap_figure(curves).axes
    order = np.argsort(-np.where(curves.defined, curves.class_ap(), -1))[:4]
    assert [text.get_text() for text in axes.get_yticklabels()] == [curves.names[i] for i in order]
    ap50, ap = axes.containers
    assert [bar.get_width() for bar in ap] == curves.class_ap()[order].tolist()
    assert [bar.get_width() for bar in ap50] == curves.class_ap(0.5)[order].tolist()


def many(count):
    precision = np.random.default_rng(0).random((10, 101, count))
    names = [f"class {number}" for number in range(count)]
    return PrecisionCurves(names, np.linspace(0.5, 0.95, 10), np.linspace(0, 1, 101), precision)


def test_of_many_classes_the_best_and_the_worst():
    curves = many(1203)
    (axes,) = class_ap_figure(curves, title="lvis", limit=10).axes
    order = np.argsort(-curves.class_ap())
    shown = [text.get_text() for text in axes.get_yticklabels()]
    assert shown == [f"class {i}" for i in [*order[:5], *order[-5:]]]
    assert axes.get_title() == "lvis (the best 5 and the worst 5 of 1203)"
    assert plot_class_ap(curves).shape[0] < 1200


def test_pictures_leave_matplotlib_as_it_was():
    import matplotlib.pyplot as plt

    figures, backend, settings = plt.get_fignums(), matplotlib.get_backend(), dict(plt.rcParams)
    picture, again = (plot_precision_recall(many(5), title="x") for _ in range(2))
    assert picture.dtype == np.uint8 and picture.shape == (450, 600, 3)
    np.testing.assert_array_equal(picture, again)
    # Paper, and lines of the darkest blue.
    assert (picture == 255).all(axis=2).mean() > 0.5
    assert (picture == [0x08, 0x30, 0x6B]).all(axis=2).sum() > 200
    assert plt.get_fignums() == figures and matplotlib.get_backend() == backend
    assert dict(plt.rcParams) == settings


def test_no_ground_truth_and_no_such_threshold():
    nothing = many(3)
    nothing.precision[:] = np.nan
    for plot in (plot_precision_recall, plot_class_ap):
        with pytest.raises(ValueError, match="nothing to plot"):
            plot(nothing)
    assert np.isnan(nothing.ap())
    with pytest.raises(ValueError, match=r"no curve at IoU 0.3; there are: 0.50, 0.55"):
        many(3).class_ap(0.3)


def test_the_command_draws_and_tabulates(files, tmp_path, capsys):
    truth, predictions = map(str, files)
    name = "plots_command"
    arguments = ["score", predictions, "--dataset", name, "--json-file", truth]
    try:
        assert main([*arguments, "--plots", str(tmp_path / "plots")]) == 0
        written = [f"bbox_{name}" for name in ("precision_recall.png", "class_ap.png",
                                               "class_ap.csv")]  # fmt: skip
        assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(written)
        out = capsys.readouterr().out
        assert all(f"Plot: {tmp_path / 'plots' / file}\n" in out for file in written)
        results = build_evaluator(name, distributed=False).score_file(predictions)["bbox"]
        with open(tmp_path / "plots" / "bbox_class_ap.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert {row["class"] for row in rows} == set(NAMES) - {"unicorn"}
        for row in rows:
            assert float(row["AP"]) == pytest.approx(results[f"AP-{row['class']}"], abs=1e-4)
        assert [float(row["AP"]) for row in rows] == sorted(
            (float(row["AP"]) for row in rows), reverse=True
        )
    finally:
        MetadataCatalog.remove(name)
