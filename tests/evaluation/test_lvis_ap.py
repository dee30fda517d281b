"""The rules of LVIS AP: against the ``lvis`` package on random data, and worked out by hand."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiber_d2.evaluation import score_lvis

# The package calls a method of loggers by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:The 'warn' method:DeprecationWarning")

# Sizes that give areas at the bounds (32 * 32, 96 * 96), none at all, and many equal overlaps.
SIDES = np.array([0.0, 8.0, 16.0, 32.0, 33.5, 64.0, 96.0, 144.0])
AREAS = [0.0, 1023.9, 1024.0, 1024.1, 9215.9, 9216.0, 9216.1]


def random_case(rng, num_images=7, num_classes=6, num_detections=120):
    image_ids = rng.permutation(90)[:num_images] + 5
    category_ids = rng.permutation(40)[:num_classes] + 1

    def box(side_from=1):
        return [*(8.0 * rng.integers(0, 6, 2)), *rng.choice(SIDES[side_from:], 2)]

    annotations = []
    for image_id in image_ids[1:]:  # one image shows nothing
        for category_id in category_ids[2:]:  # two classes have no object
            for _ in range(rng.choice([0, 0, 1, 2, 4])):
                x, y, w, h = box()
                annotation = {
                    "id": len(annotations) + 1,
                    "image_id": int(image_id),
                    "category_id": int(category_id),
                    "bbox": [x, y, w, h],
                    "area": float(rng.choice([w * h, 0.7 * w * h, *AREAS])),
                }
                if rng.random() < 0.1:
                    annotation["ignore"] = 1
                annotations.append(annotation)
    images = [
        {
            "id": int(image_id),
            "neg_category_ids": rng.choice(category_ids, rng.integers(0, 3), False).tolist(),
            "not_exhaustive_category_ids": rng.choice(
                category_ids, rng.integers(0, 3), False
            ).tolist(),
        }
        for image_id in image_ids
    ]
    categories = [
        {"id": int(category_id), "name": f"class {category_id}", "frequency": frequency}
        for category_id, frequency in zip(category_ids, rng.choice(list("rcf"), num_classes))
    ]
    detections = []
    for _ in range(rng.integers(1, num_detections)):
        if annotations and rng.random() < 0.6:
            near = annotations[rng.integers(len(annotations))]
            image_id, category_id = near["image_id"], near["category_id"]
            found = (np.array(near["bbox"]) + rng.choice([0, 0, 2, 5], 4)).tolist()
        else:
            image_id, category_id = int(rng.choice(image_ids)), int(rng.choice(category_ids))
            found = box(side_from=0)
        score = float(rng.choice([rng.random(), rng.integers(0, 5) / 4]))
        detections.append(
            {
                "image_id": image_id,
                "category_id": category_id,
                "bbox": [float(value) for value in found],
                "score": score,
            }
        )
    return {"images": images, "annotations": annotations, "categories": categories}, detections


def package_ap(truth, detections, max_dets=-1):
    lvis = pytest.importorskip("lvis")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "float", float, raising=False)
        path = Path(folder) / "truth.json"
        path.write_text(json.dumps(truth))
        ground_truth = lvis.LVIS(str(path))
        found = [dict(detection) for detection in detections]
        results = lvis.LVISResults(ground_truth, found, max_dets=max_dets)
        evaluation = lvis.LVISEval(ground_truth, results, "bbox")
        evaluation.run()
    return {key.split("@")[0]: value for key, value in evaluation.get_results().items()}


def best_of_classes(detections, topk):
    """What FixedAP counts, by the plain rule: equal scores in order of the images' ids."""
    kept = []
    for category_id in {d["category_id"] for d in detections}:
        mine = [d for d in detections if d["category_id"] == category_id]
        kept += sorted(mine, key=lambda d: (-d["score"], d["image_id"]))[:topk]
    return kept


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value == -1:
            assert np.isnan(found[name]), name
        else:
            assert found[name] == pytest.approx(value, abs=1e-9), name


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_same_as_the_package(seed):
    truth, detections = random_case(np.random.default_rng(seed))
    found = score_lvis(truth, detections)
    assert_same(found["bbox"], package_ap(truth, detections))
    assert_same(found["bbox_per_image"], package_ap(truth, detections, max_dets=300))
    found = score_lvis(truth, detections, topk_per_class=5, max_dets_per_image=4)
    assert_same(found["bbox"], package_ap(truth, best_of_classes(detections, 5)))
    assert_same(found["bbox_per_image"], package_ap(truth, detections, max_dets=4))


def test_the_same_as_the_package_on_more_data():
    truth, detections = random_case(np.random.default_rng(7), 40, 12, 5000)
    assert len(detections) > 1000
    found = score_lvis(truth, detections, topk_per_class=150, max_dets_per_image=20)
    assert_same(found["bbox"], package_ap(truth, best_of_classes(detections, 150)))
    assert_same(found["bbox_per_image"], package_ap(truth, detections, max_dets=20))
    assert 0.02 < found["bbox"]["AP"] < 0.98


def case(annotations, *, negative=(), not_exhaustive=(), frequency="f"):
    """One image, classes 1 and 2; annotations are (class, box) or (class, box, more)."""
    image = {
        "id": 1,
        "neg_category_ids": list(negative),
        "not_exhaustive_category_ids": list(not_exhaustive),
    }
    return {
        "images": [image],
        "categories": [{"id": i, "name": f"class {i}", "frequency": frequency} for i in (1, 2)],
        "annotations": [
            {
                "id": number,
                "image_id": 1,
                "category_id": annotation[0],
                "bbox": annotation[1],
                "area": annotation[1][2] * annotation[1][3],
                **(annotation[2] if len(annotation) > 2 else {}),
            }
            for number, annotation in enumerate(annotations)  # the id 0, too, is an id
        ],
    }


def detection(category_id, box, score):
    return {"image_id": 1, "category_id": category_id, "bbox": box, "score": score}


BOX, OTHER, FAR = [0, 0, 40, 40], [100, 0, 40, 40], [300, 300, 40, 40]


def ap(truth, detections, metric="AP"):
    return score_lvis(truth, detections)["bbox"][metric]


def test_perfect_predictions_score_one():
    truth = case([(1, BOX), (1, OTHER), (2, FAR)])
    found = [detection(1, BOX, 0.9), detection(1, OTHER, 0.9), detection(2, FAR, 0.1)]
    results = score_lvis(truth, found)
    for metrics in results.values():
        defined = {name: value for name, value in metrics.items() if not np.isnan(value)}
        assert set(defined) == {"AP", "AP50", "AP75", "APm", "APf", "AR", "ARm"}
        assert list(defined.values()) == pytest.approx([1.0] * 7)


def test_a_better_false_box_halves_precision():
    truth = case([(1, BOX)])
    assert ap(truth, [detection(1, BOX, 0.5), detection(1, FAR, 0.9)]) == pytest.approx(0.5)
    assert ap(truth, [detection(1, BOX, 0.9), detection(1, FAR, 0.5)]) == pytest.approx(1.0)


def test_what_is_not_annotated_does_not_count():
    found = [detection(1, BOX, 0.5), detection(2, FAR, 0.9)]
    both = [(1, BOX), (2, OTHER)]
    # Class 2 is said to be absent: a false box, but without an object there is no AP of it.
    assert ap(case([(1, BOX)], negative=[2]), found) == pytest.approx(1.0)
    assert ap(case(both), [*found, detection(2, OTHER, 0.5)]) == pytest.approx(0.75)
    # There may be more objects of class 2 than the annotated one.
    truth = case(both, not_exhaustive=[2])
    assert ap(truth, [*found, detection(2, OTHER, 0.5)]) == pytest.approx(1.0)


def test_an_image_that_does_not_tell_of_a_class_is_left_out():
    truth = case([(1, BOX)])
    silent = {"id": 2, "neg_category_ids": [], "not_exhaustive_category_ids": []}
    absent = {"id": 2, "neg_category_ids": [1], "not_exhaustive_category_ids": []}
    found = [detection(1, BOX, 0.5), {**detection(1, FAR, 0.9), "image_id": 2}]
    for image, expected in ((silent, 1.0), (absent, 0.5)):
        assert ap({**truth, "images": [*truth["images"], image]}, found) == pytest.approx(expected)


def test_an_ignored_object_is_taken_only_where_there_is_no_other():
    shifted = [4, 0, 40, 40]
    truth = case([(1, BOX, {"ignore": 1}), (1, shifted)])
    # The first fits the ignored object better, yet takes the other one.
    assert ap(truth, [detection(1, BOX, 0.9)], "AP50") == pytest.approx(1.0)
    # A second one finds the ignored object, and is no false box.
    twice = [detection(1, BOX, 0.9), detection(1, BOX, 0.95)]
    assert ap(truth, twice, "AP50") == pytest.approx(1.0)
    thrice = [detection(1, BOX, 0.9), detection(1, BOX, 0.95), detection(1, BOX, 0.97)]
    assert ap(truth, thrice, "AP50") == pytest.approx(1.0)
    worse = [detection(1, FAR, 0.99), *thrice]
    assert ap(truth, worse, "AP50") == pytest.approx(0.5)


def test_equal_overlaps_go_to_the_later_object():
    left, right, middle = [0, 0, 40, 40], [20, 0, 40, 40], [10, 0, 40, 40]
    # The middle box overlaps both by 0.6; the second box fits the left object alone.
    found = [detection(1, middle, 0.9), detection(1, left, 0.8)]
    assert ap(case([(1, left), (1, right)]), found, "AR") > ap(
        case([(1, right), (1, left)]), found, "AR"
    )
    assert ap(case([(1, left), (1, right)]), found, "AP50") == pytest.approx(1.0)


def test_bounds_of_areas_belong_to_both_ranges():
    truth = case([(1, [0, 0, 32, 32]), (2, [100, 0, 96, 96])])
    results = score_lvis(truth, [])["bbox"]
    assert results["APs"] == results["APm"] == results["APl"] == 0
    assert results["ARs"] == results["AR"] == 0
    small = score_lvis(case([(1, [0, 0, 31, 32])]), [])["bbox"]
    assert small["APs"] == 0 and np.isnan(small["APm"]) and np.isnan(small["APl"])


def test_nothing_at_all():
    truth = case([])
    for detections in ([], [detection(1, BOX, 0.5)]):
        results = score_lvis(truth, detections)
        assert all(np.isnan(v) for metrics in results.values() for v in metrics.values())


def test_classes_by_frequency():
    truth = case([(1, BOX), (2, OTHER)])
    truth["categories"][0]["frequency"] = "r"
    del truth["categories"][1]["frequency"]
    results = score_lvis(truth, [detection(2, OTHER, 0.5)])["bbox"]
    assert results["APr"] == 0 and results["AP"] == pytest.approx(0.5)
    assert np.isnan(results["APc"]) and np.isnan(results["APf"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["images"][0].pop("neg_category_ids"), "image 1 lacks neg_category_ids"),
        (lambda t: t["annotations"][0].pop("area"), "annotation 0 lacks area"),
        (lambda t: t["annotations"][0].update(bbox=[1, 2, 3]), "4 numbers as bbox"),
        (lambda t: t["annotations"][0].update(area="big"), "one as area"),
        (lambda t: t["annotations"][0].update(category_id=9), "annotation 0 .* category_id 9"),
        (lambda t: t["annotations"][0].update(image_id=9), "annotation 0 .* image_id 9"),
        (lambda t: t["images"].append(t["images"][0]), "repeats the id 1 of images"),
        (lambda t: t.pop("categories"), "lacks the list 'categories'"),
        (lambda t: t.pop("annotations"), "no annotations"),
    ],
)
def test_faulty_ground_truth_is_named(change, message):
    truth = case([(1, BOX)])
    change(truth)
    with pytest.raises(ValueError, match=message):
        score_lvis(truth, [])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image_id": 8}, "1 of 2 .* image_id .* for example 8"),
        ({"category_id": 8}, "1 of 2 .* category_id .* for example 8"),
        ({"bbox": [1, 2, 3]}, "bbox"),
        ({"score": "high"}, "score"),
    ],
)
def test_faulty_detections_are_named(entry, message):
    found = [detection(1, BOX, 0.5), {**detection(1, BOX, 0.5), **entry}]
    with pytest.raises(ValueError, match=message):
        score_lvis(case([(1, BOX)]), found)


def test_files_that_are_missing_or_no_json(tmp_path):
    truth, broken = tmp_path / "truth.json", tmp_path / "broken.json"
    truth.write_text(json.dumps(case([(1, BOX)])))
    broken.write_text("[{")
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        score_lvis(tmp_path / "nowhere.json", [])
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        score_lvis(truth, tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="broken.json is not JSON"):
        score_lvis(truth, broken)
    with pytest.raises(ValueError, match="truth.json must hold a list"):
        score_lvis(truth, truth)
    with pytest.raises(ValueError, match="must be positive"):
        score_lvis(truth, [], topk_per_class=0)
