"""Activation checkpointing: the same numbers from less memory."""

import sys
from pathlib import Path

import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from torch.autograd.graph import saved_tensors_hooks

from fiber_d2.engine.launch import launch
from fiber_d2.layers import call_block
from fiber_d2.structures import Prompt

PARTS = [("vision",), ("text",), ("tower",), ("vision", "text", "tower")]
# Everything that draws random numbers in training.
RANDOM = {"drop_path": 0.4, "dropout": 0.3, "drop_block": 0.3}


def make_batch(size=(64, 64), length=7):
    generator = torch.Generator().manual_seed(0)
    items = []
    for number in range(2):
        tokens = length + number
        positive_map = torch.zeros(1, tokens)
        positive_map[0, 2] = 1
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.tensor([[5.0, 8.0, 50.0, 60.0]]))
        instances.gt_positive_map = positive_map > 0
        prompt = Prompt(
            "words",
            torch.randint(3, 50, (tokens,), generator=generator),
            torch.ones(tokens, dtype=torch.bool),
            positive_map,
            torch.arange(1),
        )
        image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
        items.append({"image": image, "prompt": prompt, "instances": instances})
    return items


def step(model, dtype=None, batch=None):
    """Losses, gradients by name, and the bytes that autograd kept between the passes."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    for parameter in model.parameters():
        kept[parameter.untyped_storage().data_ptr()] = 0
    torch.manual_seed(1)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            losses = model(batch or make_batch())
        for parameter in model.parameters():
            kept[parameter.untyped_storage().data_ptr()] = 0
        size = sum(kept.values())
        sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses, gradients, size


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: n + ": " + m
        )


@pytest.fixture(scope="module")
def without():
    """Results without checkpointing, by the type of autocast."""
    return {}


@pytest.mark.parametrize(
    "parts,dtype",
    [*((parts, None) for parts in PARTS), (PARTS[3], torch.bfloat16)],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else str(value),
)
def test_losses_and_gradients_are_those_without(build, without, parts, dtype):
    if dtype not in without:
        without[dtype] = step(build(True, **RANDOM), dtype)
    expected_losses, expected, size = without[dtype]
    losses, gradients, less = step(build(True, checkpoint=parts, **RANDOM), dtype)
    assert {k: v.item() for k, v in losses.items()} == {
        k: v.item() for k, v in expected_losses.items()
    }
    assert_same(gradients, expected)
    assert less < size


def test_the_steps_compared_are_random(build):
    first, second = (build(True, **RANDOM).train() for _ in range(2))
    torch.manual_seed(1)
    losses = first(make_batch())
    others = second(make_batch())
    assert all(losses[name].item() != others[name].item() for name in losses)


def test_all_parts_together_keep_little(build):
    small, large = (
        step(build(checkpoint=parts), batch=make_batch((128, 128)))[2] for parts in (PARTS[3], ())
    )
    assert small < 0.35 * large


def test_frozen_parts_and_evaluation(build):
    """Nothing is computed twice where there is no gradient to compute."""
    model = build(frozen_stages=2, checkpoint=PARTS[3], **RANDOM)
    expected = step(build(frozen_stages=2, **RANDOM))
    found = step(model)
    assert_same(found[1], expected[1])
    assert not any(name.startswith("backbone.swin.stages.0") for name in found[1])
    calls = []
    for block in model.backbone.swin.stages[1].blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    model.eval()(make_batch())
    assert len(calls) == model.backbone.swin.depths[1]


def test_only_inputs_are_kept():
    kept = []
    x = torch.randn(4, 5, requires_grad=True)

    def block(x):
        return (x.sin().cos().exp() * x).tanh()

    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = call_block(block, x, recompute=True)
        assert [t.data_ptr() for t in kept] == [x.data_ptr()]
        out.sum().backward()
    gradient, x.grad = x.grad, None
    block(x).sum().backward()
    assert torch.equal(gradient, x.grad)


def work(folder, static_graph):
    """A process of the test below: gradients with and without, in distributed training."""
    sys.path.insert(0, str(Path(__file__).parent))
    from conftest import build_small_model
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    rank = comm.get_rank()
    batch = make_batch()[rank : rank + 1]
    found = []
    for parts in ((), PARTS[3]):
        model = build_small_model(checkpoint=parts, frozen_stages=2, **RANDOM)
        wrapped = DistributedDataParallel(
            model, static_graph=static_graph, gradient_as_bucket_view=True
        )
        for _ in range(2):  # the second step of a static graph is another
            model.zero_grad()
            losses, gradients, _ = step(wrapped, batch=batch)
        found.append((losses, gradients))
    assert {k: v.item() for k, v in found[0][0].items()} == {
        k: v.item() for k, v in found[1][0].items()
    }
    assert_same(found[1][1], found[0][1])
    total = sum(gradient.abs().sum().item() for gradient in found[0][1].values())
    Path(folder, f"done_{rank}").write_text(str(total))


@pytest.mark.slow
@pytest.mark.parametrize("static_graph", [False, True], ids=["dynamic", "static"])
def test_two_processes(tmp_path, static_graph):
    launch(work, num_processes=2, args=(str(tmp_path), static_graph))
    # Averaged over processes, so the same in both.
    sums = [float((tmp_path / f"done_{rank}").read_text()) for rank in range(2)]
    assert sums[0] == pytest.approx(sums[1]) and sums[0] > 0
