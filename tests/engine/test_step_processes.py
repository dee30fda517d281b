"""The training step in two processes on CPUs: what all have to decide alike."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from torch import nn

from fiber_d2.engine.errors import NonFiniteError
from fiber_d2.engine.launch import launch
from fiber_d2.engine.step import StepTrainer
from fiber_d2.engine.train import distribute
from fiber_d2.text import build_grounding_prompt, load_tokenizer

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def enter(folder):
    torch.set_num_threads(1)
    rank = comm.get_rank()
    torch.save({case.__name__: case(rank) for case in CASES}, f"{folder}/{rank}.pth")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """``outcome(case)``: what it returned in each of two processes, started once for all."""
    folder = tmp_path_factory.mktemp("processes")
    launch(enter, num_processes=2, args=(str(folder),))
    found = [torch.load(folder / f"{rank}.pth", weights_only=True) for rank in (0, 1)]
    return lambda case: [results[case.__name__] for results in found]


def small_fiber():
    node = LazyConfig.load(str(REPOSITORY / "configs/common/models/fiber_tiny.py")).model
    node.backbone.vision.update(embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 1, 2, 2], window=2)
    node.backbone.vision.fused_blocks = [0, 0, 1, 1]
    node.backbone.text.update(
        dim=32, num_layers=2, num_heads=2, mlp_dim=64, image_dims=[64, 128], dropout=0.0
    )
    node.backbone.neck.update(in_channels=[32, 64, 128], out_channels=16)
    node.head.tower.update(num_blocks=1, norm_groups=4)
    torch.manual_seed(0)
    return instantiate(node)


def image(name, boxes, seed=0):
    caption = "a red circle"
    prompt = build_grounding_prompt(load_tokenizer("shapes"), caption, [[(2, 12)]])
    instances = Instances((64, 64))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).view(-1, 4))
    instances.gt_positive_map = prompt.positive_map.bool().expand(len(boxes), -1)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (3, 64, 64), generator=generator, dtype=torch.uint8)
    return {"file_name": name, "image": pixels, "prompt": prompt, "instances": instances}


def train_fiber(batches, **options):
    model = small_fiber()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = StepTrainer(distribute(model), optimizer, batches, log_period=1, **options)
    trainer.train(0, len(batches) // trainer.accumulate)
    untouched = [name for name, p in model.named_parameters() if p.grad is None]
    losses = {name: value for name, (value, _) in trainer.storage.latest().items()}
    return {"weights": model.state_dict(), "untouched": untouched, "losses": losses}


BOX = [[8.0, 8.0, 40.0, 40.0]]


def without_boxes_in_one(rank):
    return train_fiber([[image("a.jpg", BOX if rank == 0 else [])]] * 2)


def without_any_boxes(rank):
    return train_fiber([[image("a.jpg", [])]] * 2)


@pytest.mark.parametrize("case", [without_boxes_in_one, without_any_boxes])
def test_images_without_boxes_touch_every_parameter(outcome, case):
    first, second = outcome(case)
    assert first["untouched"] == second["untouched"] == []
    for name, value in first["weights"].items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(value, second["weights"][name]), name
    assert all(math.isfinite(value) for value in first["losses"].values())
    if case is without_any_boxes:
        assert first["losses"]["loss_box"] == first["losses"]["loss_centerness"] == 0
    assert first["losses"]["loss_token"] > 0


class Quadratic(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))

    def forward(self, batch):
        values = torch.stack([item["value"] for item in batch])
        return {"loss": (self.w - values).square().sum(1).mean()}


def items(rank, values):
    return [
        [{"file_name": f"{rank}-{step}.jpg", "value": torch.full((2,), value)}]
        for step, value in enumerate(values)
    ]


def nan_in_one(rank):
    """Steps 1 and 3 to 5 are bad in process 1 only."""
    nan = math.nan
    values = [2.0, nan, 3.0, nan, nan, nan, 4.0] if rank else [2.0] * 7
    model = Quadratic()
    # Process 0 has a fused optimiser, process 1 one that asks the host: both must agree.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=rank == 0)
    trainer = StepTrainer(
        distribute(model), optimizer, items(rank, values), log_period=2, max_nonfinite=3
    )
    message = ""
    try:
        trainer.train(0, 7)
    except NonFiniteError as error:
        message = str(error)
    step = optimizer.state_dict()["state"][0]["step"].item()
    return {"w": model.w.detach(), "step": step, "message": message, "iteration": trainer.iter}


def test_a_loss_that_is_not_finite_in_one_process_is_left_out_in_all(outcome):
    first, second = outcome(nan_in_one)
    assert torch.equal(first["w"], second["w"])
    assert torch.isfinite(first["w"]).all()
    # Both end at the same moment, with the same words; good were the steps 0 and 2.
    assert first["step"] == second["step"] == 2
    assert first["iteration"] == second["iteration"] == 5
    assert first["message"] == second["message"]
    assert "3 steps in a row, up to iteration 5" in first["message"]
    assert "loss = nan" in first["message"]
    assert "in process 1, images 1-5.jpg" in first["message"]
    assert "0-5.jpg" not in first["message"]


def accumulated(rank):
    values = torch.randn(8, generator=torch.Generator().manual_seed(3)).tolist()
    model = Quadratic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    wrapped = distribute(model)
    trainer = StepTrainer(wrapped, optimizer, items(rank, values[rank::2]), accumulate=2)
    exchanges = []
    wrapped.register_comm_hook(None, lambda _, bucket: counted(exchanges, bucket))
    trainer.train(0, 2)
    return {"w": model.w.detach(), "exchanges": len(exchanges)}


def counted(exchanges, bucket):
    exchanges.append(1)
    mean = bucket.buffer() / dist.get_world_size()
    work = dist.all_reduce(mean, async_op=True).get_future()
    return work.then(lambda done: done.value()[0])


def test_accumulation_in_two_processes_equals_one_big_batch(outcome):
    first, second = outcome(accumulated)
    assert torch.equal(first["w"], second["w"])
    # Gradients are exchanged once per step, not once per batch.
    assert first["exchanges"] == 2
    values = torch.randn(8, generator=torch.Generator().manual_seed(3)).tolist()
    single = [item for batch in items(0, values) for item in batch]
    model = Quadratic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    StepTrainer(model, optimizer, [single[:4], single[4:]]).train(0, 2)
    torch.testing.assert_close(first["w"], model.w.detach())


CASES = (without_boxes_in_one, without_any_boxes, nan_in_one, accumulated)
