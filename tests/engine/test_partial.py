import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st

from fiber_d2.engine.partial import SavedPredictions, check_fingerprint
from fiber_d2.structures import Prompt

FINGERPRINT = {"dataset": "a", "limits": {"score_thresh": 0.05}, "augmentations": ["Resize"]}


def prompt(text="a red circle", tokens=6):
    return Prompt(
        text=text,
        input_ids=torch.arange(tokens),
        attention_mask=torch.ones(tokens, dtype=torch.bool),
        positive_map=torch.eye(2, tokens) / 3,
        target_ids=torch.tensor([4, 9]),
    )


def output(boxes, scores, classes):
    instances = Instances((30, 40))
    instances.pred_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.scores = torch.as_tensor(scores, dtype=torch.float32)
    instances.pred_classes = torch.as_tensor(classes, dtype=torch.int64)
    return {"instances": instances}


def item(image_id, **more):
    return {"image_id": image_id, "height": 30, "image": torch.zeros(3, 4, 4), **more}


def assert_same(found, expected):
    found, expected = found["instances"], expected["instances"]
    assert found.image_size == expected.image_size
    assert set(found.get_fields()) == set(expected.get_fields())
    for name in ("scores", "pred_classes"):
        assert found.get(name).dtype == expected.get(name).dtype
        assert torch.equal(found.get(name), expected.get(name))
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=0, max_size=12
    )
)
def test_predictions_come_back_to_the_last_bit(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("saved")
    count = len(values)
    boxes = np.repeat(np.asarray(values, np.float32)[:, None], 4, axis=1)
    expected = output(boxes, values, range(count))
    saved = SavedPredictions(folder, FINGERPRINT)
    saved.add([3], [item(7, prompt=prompt(), spans=(1, [2.5, None]))], [expected])
    saved.close()
    again = SavedPredictions(folder, FINGERPRINT, resume=True)
    inputs, outputs = again.load([3])
    assert_same(outputs[0], expected)
    assert inputs[0]["spans"] == (1, [2.5, None])
    assert "image" not in inputs[0]
    for name in ("input_ids", "attention_mask", "positive_map", "target_ids"):
        assert torch.equal(getattr(inputs[0]["prompt"], name), getattr(prompt(), name))
    again.close()


def test_a_prompt_that_images_share_is_written_once(tmp_path):
    saved = SavedPredictions(tmp_path, FINGERPRINT)
    for position in range(5):
        shared = [prompt(), prompt("other words")]
        saved.add([position], [item(position, prompt=shared)], [output([], [], [])])
    saved.close()
    text = (tmp_path / "partial_rank0.jsonl").read_text()
    assert text.count("other words") == 1
    again = SavedPredictions(tmp_path, FINGERPRINT, resume=True)
    (first,), _ = again.load([4])
    assert [part.text for part in first["prompt"]] == ["a red circle", "other words"]
    again.close()


def test_a_torn_line_costs_its_batch_only(tmp_path):
    path = tmp_path / "partial_rank0.jsonl"
    saved = SavedPredictions(tmp_path, FINGERPRINT)
    for batch in ([0, 1], [2, 3]):
        saved.add(
            batch, [item(i) for i in batch], [output([[0, 0, i, 1]], [1], [i]) for i in batch]
        )
    saved.close()
    path.write_bytes(path.read_bytes()[:-10])
    again = SavedPredictions(tmp_path, FINGERPRINT, resume=True)
    assert again.has([0, 1]) and not again.has([2]) and len(again) == 2
    again.add([2, 3], [item(2), item(3)], [output([], [], [])] * 2)
    again.close()
    third = SavedPredictions(tmp_path, FINGERPRINT, resume=True)
    assert third.has([0, 1, 2, 3])
    # Images of different batches, in another order.
    _, outputs = third.load([3, 0])
    assert [len(o["instances"]) for o in outputs] == [0, 1]
    third.close()


def test_files_of_more_processes_than_before_are_read(tmp_path):
    saved = SavedPredictions(tmp_path, FINGERPRINT)
    saved.add([0], [item(0)], [output([], [], [])])
    saved.close()
    (tmp_path / "partial_rank0.jsonl").rename(tmp_path / "partial_rank5.jsonl")
    again = SavedPredictions(tmp_path, FINGERPRINT, resume=True)
    assert again.has([0])
    again.close()
    again.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_new_start_says_what_it_deletes(tmp_path, caplog):
    saved = SavedPredictions(tmp_path, FINGERPRINT)
    saved.add([0], [item(0)], [output([], [], [])])
    saved.close()
    again = SavedPredictions(tmp_path, FINGERPRINT)
    assert "--resume-eval would have gone on" in caplog.text
    assert not again.has([0])
    again.close()


def test_other_evaluations_are_refused(tmp_path):
    SavedPredictions(tmp_path, FINGERPRINT).close()
    other = {**FINGERPRINT, "limits": {"score_thresh": 0.3}}
    with pytest.raises(ValueError, match=r"limits.score_thresh was 0.05 and is 0.3.*--resume-eval"):
        SavedPredictions(tmp_path, other, resume=True)
    check_fingerprint(FINGERPRINT, FINGERPRINT, tmp_path)
    path = tmp_path / "partial_rank0.jsonl"
    path.write_text(path.read_text() + "{no json\n")
    with pytest.raises(ValueError, match="Line 2 of .*partial_rank0.jsonl is damaged"):
        SavedPredictions(tmp_path, FINGERPRINT, resume=True)
    path.write_text('{"format": "mine"}\n')
    with pytest.raises(ValueError, match="no file of saved predictions"):
        SavedPredictions(tmp_path, FINGERPRINT, resume=True)


def test_what_cannot_be_stored_is_not_resumable_but_evaluated(tmp_path, caplog):
    saved = SavedPredictions(tmp_path, FINGERPRINT)
    saved.add([0], [item(0, odd=object())], [output([], [], [])])
    assert "a object among inputs or outputs cannot be stored" in caplog.text
    saved.add([1], [item(1)], [output([], [], [])])
    saved.close()
    again = SavedPredictions(tmp_path, FINGERPRINT, resume=True)
    assert len(again) == 0
    again.close()
