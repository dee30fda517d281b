import math

import pytest
import torch
from detectron2.utils.events import EventStorage
from fvcore.common.history_buffer import HistoryBuffer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fiber_d2.engine.errors import RunError
from fiber_d2.engine.step import StepTrainer, choose_amp_dtype


class Quadratic(nn.Module):
    """Loss a = |w - x|^2, loss b = 2 a: the gradient by w is 6 (w - x)."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))

    def forward(self, batch):
        a = ((self.w - batch) ** 2).sum()
        return {"loss_a": a, "loss_b": 2 * a}


class HostReads(TorchDispatchMode):
    """Counts the operations that wait for a value to reach the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def make_trainer(model=None, lr=0.01, batches=None, **kwargs):
    model = model or Quadratic()
    batches = [torch.tensor([3.0, 4.0])] * 100 if batches is None else batches
    return StepTrainer(model, torch.optim.SGD(model.parameters(), lr=lr), batches, **kwargs)


def test_a_step_follows_the_summed_gradient():
    trainer = make_trainer()
    trainer.train(0, 1)
    # w <- 0 - 0.01 * 6 * (0 - x)
    torch.testing.assert_close(trainer.model.w.detach(), torch.tensor([0.18, 0.24]))


def test_clipping_bounds_the_norm_of_all_gradients():
    trainer = make_trainer(lr=1.0, clip_grad=0.5)
    trainer.train(0, 1)
    # The gradient is -6 * (3, 4), of norm 30; clipped to norm 0.5 it is -(0.3, 0.4).
    torch.testing.assert_close(trainer.model.w.detach(), torch.tensor([0.3, 0.4]))
    assert trainer.storage.latest()["grad_norm"][0] == pytest.approx(30)


def test_losses_are_looked_at_once_per_period():
    with HostReads() as reads:
        torch.ones(()).item()
    assert reads.count == 1

    trainer = make_trainer(log_period=3, clip_grad=100.0)
    trainer.iter, trainer.max_iter = 0, 100
    known = []
    with EventStorage() as trainer.storage, HostReads() as reads:
        for trainer.iter in range(6):
            trainer.run_step()
            known.append(len(trainer.storage.histories().get("loss_a", HistoryBuffer()).values()))
    assert reads.count == 0
    assert known == [0, 0, 3, 3, 3, 6]
    values = trainer.storage.history("loss_a").values()
    assert [iteration for _, iteration in values] == list(range(6))
    # x - w shrinks by the factor 1 - 0.06 in each step.
    expected = [25 * 0.94 ** (2 * step) for step in range(6)]
    assert [value for value, _ in values] == pytest.approx(expected, rel=1e-5)
    assert trainer.storage.latest()["total_loss"][0] == pytest.approx(3 * expected[-1], rel=1e-5)


def test_a_loss_that_is_not_finite_stops_with_its_iteration_and_name():
    batches = [torch.ones(2)] * 4 + [torch.full((2,), math.nan)] + [torch.ones(2)] * 9
    trainer = make_trainer(batches=batches, log_period=5)
    with pytest.raises(FloatingPointError, match=r"iteration 4: loss_a = nan, loss_b = nan"):
        trainer.train(0, 10)
    assert trainer.iter == 4


def test_an_error_in_the_loop_names_the_iteration_and_keeps_its_cause():
    def broken():
        yield torch.ones(2)
        yield torch.ones(2)
        raise OSError("image 7 is damaged")

    trainer = make_trainer(batches=broken())
    with pytest.raises(RunError, match=r"iteration 2 of 10: OSError: image 7") as caught:
        trainer.train(0, 10)
    assert isinstance(caught.value.__cause__, OSError)


def test_a_loader_that_ends_is_named():
    with pytest.raises(RunError, match="iteration 2 of 3: RuntimeError: the training loader"):
        make_trainer(batches=[torch.ones(2)] * 2).train(0, 3)


def test_autocast_runs_on_the_cpu():
    seen = []

    class Recorder(nn.Linear):
        def forward(self, batch):
            out = super().forward(batch)
            seen.append(out.dtype)
            return {"loss": out.float().sum()}

    for dtype in (None, torch.bfloat16):
        make_trainer(Recorder(2, 2), amp_dtype=dtype).train(0, 1)
    assert seen == [torch.float32, torch.bfloat16]
    assert choose_amp_dtype("cpu") == torch.bfloat16
    with pytest.raises(ValueError, match="float8"):
        choose_amp_dtype("cpu", "float8")


def test_state_goes_on_where_it_was():
    def adam():
        model = Quadratic()
        return StepTrainer(
            model, torch.optim.AdamW(model.parameters(), lr=0.1), [torch.ones(2)] * 20
        )

    whole, first, second = adam(), adam(), adam()
    whole.train(0, 8)
    first.train(0, 5)
    first.iter = 4
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    second.train(second.iter + 1, 8)
    assert torch.equal(whole.model.w, second.model.w)


@pytest.mark.parametrize("arguments", [{"clip_grad": 0.0}, {"clip_grad": -1}, {"log_period": 0}])
def test_settings_that_make_no_sense(arguments):
    with pytest.raises(ValueError, match="but|cannot"):
        make_trainer(**arguments)
