import logging
import os
import signal

import pytest
import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.utils.data import DataLoader

from fiber_d2.engine import inference
from fiber_d2.engine.inference import EvaluationInterrupted, is_resumable, run_inference
from fiber_d2.engine.partial import SavedPredictions

IMAGES = [{"image_id": 100 + i, "image": torch.full((3, 2, 2), i)} for i in range(11)]


class Model(nn.Module):
    """One box per image, different in every batch of another make-up."""

    def __init__(self, interrupt_at=None, error=None):
        super().__init__()
        self.interrupt_at, self.error = interrupt_at, error
        self.batches = []

    def forward(self, batch):
        assert not self.training and not torch.is_grad_enabled()
        ids = [item["image_id"] for item in batch]
        self.batches.append(ids)
        if len(self.batches) - 1 == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)
            if self.error:
                raise self.error
        outputs = []
        for image_id in ids:
            instances = Instances((2, 2))
            instances.pred_boxes = Boxes(torch.tensor([[0, 0, image_id / 3, sum(ids) / 7]]))
            instances.scores = torch.tensor([1 / image_id])
            outputs.append({"instances": instances})
        return outputs


class Recorder(DatasetEvaluator):
    def reset(self):
        self.calls = []

    def process(self, inputs, outputs):
        for item, output in zip(inputs, outputs):
            box = output["instances"].pred_boxes.tensor.tolist()
            self.calls.append((item["image_id"], box, output["instances"].scores.tolist()))

    def evaluate(self):
        return {"calls": self.calls}


def loader(batch_size=3, num_workers=0):
    return DataLoader(IMAGES, batch_size=batch_size, num_workers=num_workers, collate_fn=list)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("error", [None, RuntimeError("a worker ended")])
def test_an_interrupted_evaluation_goes_on_and_counts_the_same(tmp_path, num_workers, error):
    whole = run_inference(Model(), loader(), Recorder())
    assert [call[0] for call in whole["calls"]] == [100 + i for i in range(11)]

    saved = SavedPredictions(tmp_path, {})
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(EvaluationInterrupted, match="--resume-eval"):
        run_inference(Model(2, error), loader(num_workers=num_workers), Recorder(), saved=saved)
    assert signal.getsignal(signal.SIGINT) is before
    saved.close()

    saved = SavedPredictions(tmp_path, {}, resume=True)
    # The batch at work is finished and saved, but where it failed.
    assert len(saved) == (6 if error else 9)
    model = Model()
    again = run_inference(model, loader(num_workers=num_workers), Recorder(), saved=saved)
    assert again == whole
    rest = [[109, 110]] if error is None else [[106, 107, 108], [109, 110]]
    assert model.batches == rest
    saved.close()

    saved = SavedPredictions(tmp_path, {}, resume=True)
    model = Model()
    assert run_inference(model, loader(), Recorder(), saved=saved) == whole
    assert model.batches == []
    saved.close()


def test_batches_that_are_saved_in_part_are_done_again(tmp_path):
    saved = SavedPredictions(tmp_path, {})
    with pytest.raises(EvaluationInterrupted):
        run_inference(Model(0), loader(batch_size=4), Recorder(), saved=saved)
    saved.close()
    saved = SavedPredictions(tmp_path, {}, resume=True)
    model = Model()
    found = run_inference(model, loader(batch_size=3), Recorder(), saved=saved)
    assert model.batches[0] == [103, 104, 105]
    assert [call[0] for call in found["calls"]] == [100 + i for i in range(11)]
    saved.close()


def test_without_a_place_to_save_interrupts_and_errors_are_as_ever():
    with pytest.raises(KeyboardInterrupt) as caught:
        run_inference(Model(1), loader(), Recorder())
    assert not isinstance(caught.value, EvaluationInterrupted)

    class Broken(Recorder):
        def process(self, inputs, outputs):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        run_inference(Model(), loader(), Broken())


def test_a_second_interrupt_a_moment_later_ends_at_once(tmp_path, monkeypatch):
    class Insistent(Model):
        def forward(self, batch):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            clock[0] += 10
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("not reached")

    clock = [0.0]
    monkeypatch.setattr(inference.time, "monotonic", lambda: clock[0])
    saved = SavedPredictions(tmp_path, {})
    with pytest.raises(KeyboardInterrupt) as caught:
        run_inference(Insistent(), loader(), Recorder(), saved=saved)
    assert not isinstance(caught.value, EvaluationInterrupted)
    saved.close()


def test_progress_tells_rate_and_time_left(caplog, monkeypatch):
    monkeypatch.setattr(inference, "PROGRESS_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, logger="fiber_d2"):
        model = Model()
        model.train()
        run_inference(model, loader(), Recorder())
    assert model.training
    assert "Evaluated 3 of 4 batches of this process" in caplog.text
    assert "images/s, ETA 0:00:0" in caplog.text
    assert "Evaluated 11 images in 0:00:0" in caplog.text


def test_only_loaders_that_tell_their_batches_are_resumable():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(IMAGES)

    assert is_resumable(loader())
    assert not is_resumable([IMAGES])
    assert not is_resumable(DataLoader(IMAGES, batch_size=None))
    assert not is_resumable(DataLoader(Stream(), batch_size=2))
