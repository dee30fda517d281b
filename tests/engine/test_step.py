import copy
import logging
import math

import pytest
import torch
from detectron2.utils.events import EventStorage
from fvcore.common.history_buffer import HistoryBuffer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fiber_d2.engine.errors import NonFiniteError, RunError
from fiber_d2.engine.precision import choose_amp_dtype
from fiber_d2.engine.step import StepTrainer


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


def make_trainer(model=None, lr=0.01, batches=None, fused=None, **kwargs):
    model = model or Quadratic()
    batches = [torch.tensor([3.0, 4.0])] * 100 if batches is None else batches
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, fused=fused)
    return StepTrainer(model, optimizer, batches, **kwargs)


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

    trainer = make_trainer(log_period=3, clip_grad=100.0, fused=True)
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


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_is_named(fused, bad, caplog):
    good = torch.tensor([3.0, 4.0])

    def run(batches):
        model = Quadratic()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
        trainer = StepTrainer(model, optimizer, batches, log_period=4, clip_grad=1.0)
        trainer.train(0, len(batches))
        return trainer

    with caplog.at_level(logging.WARNING, "fiber_d2"):
        with_bad = run([good, good * bad, good * bad, good, good])
    without = run([good, good, good])
    assert torch.equal(with_bad.model.w, without.model.w)
    found, expected = (t.optimizer.state_dict()["state"][0] for t in (with_bad, without))
    assert {name: value.tolist() for name, value in found.items()} == {
        name: value.tolist() for name, value in expected.items()
    }
    told = [record.getMessage() for record in caplog.records]
    assert [message.split(" is left out")[0] for message in told] == ["Iteration 1", "Iteration 2"]
    assert f"loss_a = {bad}" in told[0]
    assert with_bad.storage.latest()["skipped_steps"] == (2, 4)
    recorded = [iteration for _, iteration in with_bad.storage.history("total_loss").values()]
    assert recorded == [0, 3, 4]


class Steep(nn.Module):
    """A finite loss with an infinite gradient, where the batch is 0."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, batch):
        return {"loss": (self.w * batch).abs().sqrt().sum()}


def test_a_gradient_that_is_not_finite_changes_nothing(caplog):
    one, zero = torch.ones(1), torch.zeros(1)
    trainer = make_trainer(Steep(), batches=[one, zero, one], log_period=3)
    expected = make_trainer(Steep(), batches=[one, one])
    trainer.train(0, 3)
    expected.train(0, 2)
    assert torch.equal(trainer.model.w, expected.model.w)
    assert "the losses are finite, but their gradients are not" in caplog.text


def test_too_many_steps_in_a_row_end_the_training():
    def images(number, value=1.0):
        return [{"file_name": f"{number}.jpg", "value": torch.full((2,), value)}]

    class Model(Quadratic):
        def forward(self, batch):
            return super().forward(batch[0]["value"])

    values = [1.0, math.nan, math.nan, 1.0, math.nan, math.nan, math.nan, 1.0]
    batches = [images(number, value) for number, value in enumerate(values)]
    trainer = make_trainer(Model(), batches=batches, log_period=4, max_nonfinite=3)
    with pytest.raises(NonFiniteError, match=r"3 steps in a row, up to iteration 6.*6\.jpg"):
        trainer.train(0, 8)
    # Steps 0, 3 and 7: what was not finite has left no trace.
    assert trainer.nonfinite.total == 5
    expected = make_trainer(batches=[torch.ones(2)] * 3)
    expected.train(0, 3)
    assert torch.equal(trainer.model.w, expected.model.w)


def test_the_count_of_bad_steps_survives_a_restart():
    nan = [torch.full((2,), math.nan)] * 4
    first = make_trainer(batches=nan, max_nonfinite=5, log_period=1)
    first.train(0, 3)
    first.iter = 2
    second = make_trainer(batches=nan, max_nonfinite=5, log_period=1)
    second.load_state_dict(first.state_dict())
    with pytest.raises(NonFiniteError, match="5 steps in a row, up to iteration 4"):
        second.train(3, 8)


class Mean(nn.Module):
    """A loss that is a mean over images, and one that divides by the positives of the batch."""

    def __init__(self, normalised=False):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)
        self.normalised = normalised

    def forward(self, batch):
        out = self.layer(batch[:, :3]).square().sum(1)
        if self.normalised:
            return {"loss": (out * batch[:, 3]).sum() / batch[:, 3].sum()}
        return {"loss": out.mean()}


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
def test_accumulated_batches_equal_one_big_batch(amp_dtype):
    data = torch.randn(4, 6, 4, generator=torch.Generator().manual_seed(1))
    options = {"clip_grad": 0.5, "amp_dtype": amp_dtype, "log_period": 1}
    small = make_trainer(Mean(), lr=0.1, batches=list(data.view(12, 2, 4)), accumulate=3, **options)
    big = make_trainer(Mean(), lr=0.1, batches=list(data), **options)
    for trainer in (small, big):
        trainer.train(0, 4)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if amp_dtype is None else {"rtol": 0.02, "atol": 1e-3}
    for found, expected in zip(small.model.parameters(), big.model.parameters()):
        torch.testing.assert_close(found, expected, **tolerance)
    for name in ("loss", "total_loss", "grad_norm"):
        found, expected = (
            [value for value, _ in trainer.storage.history(name).values()]
            for trainer in (small, big)
        )
        assert found == pytest.approx(expected, rel=tolerance["rtol"])


def test_what_accumulation_equals_where_losses_are_divided_by_positives():
    data = torch.rand(1, 6, 4, generator=torch.Generator().manual_seed(1)) + 0.1

    def weights(positives, **options):
        data[0, :, 3] = torch.tensor(positives)
        batches = list(data.view(3, 2, 4)) if options else list(data)
        trainer = make_trainer(Mean(normalised=True), lr=0.1, batches=batches, **options)
        trainer.train(0, 1)
        return trainer.model.layer.weight

    even, uneven = [2.0, 1.0, 0.0, 3.0, 2.0, 1.0], [2.0, 1.0, 0.0, 1.0, 5.0, 1.0]
    torch.testing.assert_close(weights(even, accumulate=3), weights(even))
    # Each batch counts a third, however many positives it has.
    assert not torch.allclose(weights(uneven, accumulate=3), weights(uneven), rtol=1e-3)


def test_one_bad_batch_of_several_leaves_out_the_step():
    good, bad = torch.ones(2), torch.full((2,), math.nan)
    trainer = make_trainer(batches=[good, good, bad, good, good, good], accumulate=2)
    trainer.train(0, 3)
    expected = make_trainer(batches=[good, good])
    expected.train(0, 2)
    assert torch.equal(trainer.model.w, expected.model.w)


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

    dtypes = [None, torch.bfloat16, torch.float16]
    for dtype in dtypes:
        make_trainer(Recorder(2, 2), amp_dtype=dtype).train(0, 1)
    assert seen == [torch.float32, *dtypes[1:]]
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


def test_float16_scales_and_goes_on_where_it_was():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 4)

        def forward(self, batch):
            # Scaled by 65536, gradients overflow in the first steps.
            return {"loss": self.layer(batch).float().square().sum() * 10}

    batches = list(torch.randn(12, 3, 4, generator=torch.Generator().manual_seed(1)))

    def make(batches):
        return make_trainer(
            Model(), lr=1e-4, batches=batches, amp_dtype=torch.float16, clip_grad=1.0, log_period=1
        )

    whole, first, second = make(batches), make(batches), make(batches[5:])
    whole.train(0, 12)
    assert 0 < whole.grad_scaler.current_scale() < 65536
    # An overflow lowers the scale and is no failure.
    assert whole.nonfinite.total == 0
    # Clipped is what the gradients really are, not what they are scaled to.
    norms = [value for value, _ in whole.storage.history("grad_norm").values()]
    exact = make_trainer(Model(), lr=0.0, batches=batches, log_period=1)
    exact.train(0, 12)
    truth = dict((i, v) for v, i in exact.storage.history("grad_norm").values())
    last = whole.storage.history("grad_norm").values()[-1][1]
    assert norms[-1] == pytest.approx(truth[last], rel=0.05)

    first.train(0, 5)
    first.iter = 4
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.train(5, 12)
    assert second.grad_scaler.state_dict() == whole.grad_scaler.state_dict()
    for found, expected in zip(second.model.parameters(), whole.model.parameters()):
        assert torch.equal(found, expected)


def test_how_an_update_is_computed_is_not_taken_from_a_checkpoint():
    fused, plain = make_trainer(fused=True), make_trainer(fused=False)
    fused.train(0, 1)
    plain.load_state_dict(fused.state_dict())
    assert plain.optimizer.param_groups[0]["fused"] is False


@pytest.mark.parametrize(
    "arguments",
    [
        {"clip_grad": 0.0},
        {"clip_grad": -1},
        {"log_period": 0},
        {"accumulate": 0},
        {"max_nonfinite": 0},
    ],
)
def test_settings_that_make_no_sense(arguments):
    with pytest.raises(ValueError, match="but|cannot"):
        make_trainer(**arguments)
