import copy

import pytest
import torch
from detectron2.utils import comm
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from fiber_d2.engine.checkpointer import FiberCheckpointer
from fiber_d2.engine.ema import EMA_KEY, EmaHook, ModelEma, weights_to_evaluate
from fiber_d2.engine.launch import launch
from fiber_d2.engine.step import StepTrainer
from fiber_d2.engine.train import distribute
from fiber_d2.engine.training_hooks import TrainingOptions


class Net(nn.Module):
    """Has parameters, floating-point and integer buffers, and moves them in training."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("index", torch.arange(4))

    def forward(self, batch):
        if self.training:
            self.index += 1
        return {"loss": self.norm(self.linear(batch)).square().mean() + self.linear.weight.sum()}


def batches(count=20):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, generator=generator) for _ in range(count)]


def make_trainer(decay=0.9, start=0):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = StepTrainer(model, optimizer, batches()[start:])
    ema = ModelEma(model, decay)
    trainer.register_hooks([EmaHook(ema)])
    return trainer, ema


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_follows_the_formula_in_double_precision():
    trainer, ema = make_trainer()
    expected = {k: v.double() for k, v in trainer.model.state_dict().items()}
    for iteration in range(5):
        trainer.train(iteration, iteration + 1)
        # Each call of train begins anew with the weights, but for this: as if it were one run.
        ema.restored = True
        for name, value in trainer.model.state_dict().items():
            if value.is_floating_point():
                expected[name] = 0.9 * expected[name] + 0.1 * value.double()
    found = ema.state_dict()
    for name, value in expected.items():
        if found[name].is_floating_point():
            torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6)
    assert found["index"].tolist() == [5, 6, 7, 8]
    assert found["norm.num_batches_tracked"] == 5


def test_agrees_with_torch_on_parameters():
    model = Net()
    ema = ModelEma(model, 0.75)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    # Its first call copies; ours has begun with a copy already.
    theirs.update_parameters(model)
    for step in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += step + 1
        ema.update()
        theirs.update_parameters(model)
    found = ema.state_dict()
    for name, parameter in theirs.module.named_parameters():
        torch.testing.assert_close(found[name], parameter)


def test_nothing_waits_for_the_device():
    class HostReads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            HostReads.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    ema = ModelEma(Net(), 0.9)
    with HostReads():
        ema.update()
        with ema.applied():
            pass
        assert HostReads.count == 0
        torch.ones(()).item()
    assert HostReads.count == 1


def test_applied_and_taken_back_bit_by_bit():
    trainer, ema = make_trainer()
    trainer.train(0, 4)
    weights = copy.deepcopy(trainer.model.state_dict())
    averages = copy.deepcopy(ema.state_dict())
    assert not equal(weights, averages)
    with pytest.raises(RuntimeError, match="evaluation failed"), ema.applied():
        assert equal(trainer.model.state_dict(), averages)
        raise RuntimeError("evaluation failed")
    assert equal(trainer.model.state_dict(), weights)
    assert equal(ema.state_dict(), averages)


def test_training_is_the_same_with_it_and_with_its_evaluation():
    trainer, ema = make_trainer()
    trainer.train(0, 6)
    plain = StepTrainer(Net(), None, batches())
    plain.optimizer = torch.optim.SGD(plain.model.parameters(), lr=0.1, momentum=0.9)
    plain.train(0, 6)
    with ema.applied():
        trainer.model.eval()
        trainer.model(batches()[0])
        trainer.model.train()
    trainer.model.train()
    assert equal(trainer.model.state_dict(), plain.model.state_dict())


def test_checkpoints_hold_it_and_a_run_goes_on_bit_by_bit(tmp_path):
    whole, expected = make_trainer()
    whole.train(0, 9)

    first, ema = make_trainer()
    saving = FiberCheckpointer(first.model, str(tmp_path), trainer=first, ema=ema)
    first.train(0, 5)
    first.iter = 4
    saving.save("model_0000004")
    content = torch.load(tmp_path / "model_0000004.pth", weights_only=True)
    assert equal(content[EMA_KEY], ema.state_dict())

    second, again = make_trainer(start=5)
    loading = FiberCheckpointer(second.model, str(tmp_path), trainer=second, ema=again)
    loading.resume_or_load("", resume=True)
    second.train(second.iter + 1, 9)
    assert equal(second.model.state_dict(), whole.model.state_dict())
    assert equal(again.state_dict(), expected.state_dict())

    # As the start of another run they are weights only: averages begin with those.
    third, fresh = make_trainer()
    starting = FiberCheckpointer(third.model, str(tmp_path / "other"), trainer=third, ema=fresh)
    starting.resume_or_load(str(tmp_path / "model_0000004.pth"), resume=False)
    third.train(0, 0)
    assert equal(fresh.state_dict(), content["model"])


def test_averages_of_another_model():
    _, ema = make_trainer()
    state = ema.state_dict()
    state["extra"] = state.pop("linear.bias")
    state["index"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"1 missing: linear\.bias; 1 unexpected: extra; 1 of"):
        ema.load_state_dict(state)


def test_which_weights_to_evaluate():
    _, ema = make_trainer()
    ema.state_dict()["linear.bias"].fill_(7)
    with weights_to_evaluate("model", ema):
        assert (ema.model.linear.bias != 7).all()
    with weights_to_evaluate("ema", ema):
        assert (ema.model.linear.bias == 7).all()
    with pytest.raises(ValueError, match=r"averages no weights: set train\.ema\.decay"):
        weights_to_evaluate("ema", None)
    with pytest.raises(ValueError, match="train.weights is 'best'"):
        weights_to_evaluate("best", ema)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "ema"}, "averages no weights: set train.ema.decay=0.999"),
        ({"weights": "best"}, "train.weights is 'best': choose model or ema"),
    ],
)
def test_options_of_a_training(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingOptions(output_dir="out", max_iter=1, **options)


def test_a_checkpoint_without_averages(tmp_path):
    model = Net()
    FiberCheckpointer(model, str(tmp_path)).save("plain")
    checkpointer = FiberCheckpointer(model, str(tmp_path), weights="ema")
    with pytest.raises(ValueError, match=r"plain\.pth holds no averaged weights"):
        checkpointer.load(str(tmp_path / "plain.pth"))
    with pytest.raises(ValueError, match="train.weights is 'best'"):
        FiberCheckpointer(model, str(tmp_path), weights="best")


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_out_of_range(decay):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        ModelEma(Net(), decay)


def average_in_a_process(folder):
    torch.set_num_threads(1)
    rank = comm.get_rank()
    model = Net()
    model.norm = nn.Identity()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    # Each process sees a half of the batch; the loss is a mean, so the gradients are those of all.
    own = [batch[2 * rank : 2 * rank + 2] for batch in batches()]
    trainer = StepTrainer(distribute(model), optimizer, own)
    ema = ModelEma(model, 0.9)
    trainer.register_hooks([EmaHook(ema)])
    trainer.train(0, 6)
    torch.save(ema.state_dict(), f"{folder}/{rank}.pth")


@pytest.mark.slow
def test_two_processes_hold_the_average_of_one(tmp_path):
    launch(average_in_a_process, num_processes=2, args=(str(tmp_path),))
    found = [torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in (0, 1)]
    assert equal(*found)
    model = Net()
    model.norm = nn.Identity()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer, ema = StepTrainer(model, optimizer, batches()), ModelEma(model, 0.9)
    trainer.register_hooks([EmaHook(ema)])
    trainer.train(0, 6)
    for name, value in ema.state_dict().items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-5, atol=1e-6)
