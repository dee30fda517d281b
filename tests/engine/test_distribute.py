"""Options of DistributedDataParallel with activation checkpointing and accumulated gradients."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.utils import comm
from torch import nn

from fiber_d2.engine.train import distribute

REPOSITORY = Path(__file__).parents[2]

PROGRAM = """
import itertools
import json
import sys
from contextlib import nullcontext

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.utils import comm

from fiber_d2.engine.launch import launch
from fiber_d2.engine.train import build_train_loader, distribute


def train(config_file, checkpoint, accumulate, **options):
    cfg = LazyConfig.load(config_file)
    for part in (cfg.model.backbone.vision, cfg.model.backbone.text, cfg.model.head.tower):
        part.checkpoint = checkpoint
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    wrapped = distribute(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    batches = iter(build_train_loader(cfg, 0))
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        for part in range(accumulate):
            last = part == accumulate - 1
            with nullcontext() if last else wrapped.no_sync():
                loss = sum(wrapped(next(batches)).values())
                loss.backward()
            losses.append(loss.item())
        optimizer.step()
    return losses


def main(config_file, result):
    found = []
    for checkpoint, accumulate, static, views in itertools.product(
        (False, True), (1, 2), (False, True), (False, True)
    ):
        if static and accumulate > 1:
            continue  # refused, see below
        losses = train(
            config_file,
            checkpoint,
            accumulate,
            static_graph=static,
            gradient_as_bucket_view=views,
        )
        found.append([[checkpoint, accumulate, static, views], losses])
    if comm.is_main_process():
        with open(result, "w") as file:
            json.dump(found, file)


if __name__ == "__main__":
    launch(main, num_processes=2, args=tuple(sys.argv[1:]))
"""


@pytest.mark.slow
def test_options_change_nothing_but_memory_and_time(tmp_path, config_file, datasets_root):
    (tmp_path / "program.py").write_text(PROGRAM)
    variables = {
        "PYTHONPATH": str(REPOSITORY),
        "DETECTRON2_DATASETS": str(datasets_root),
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run(
        [sys.executable, "program.py", str(config_file), "found.json"],
        cwd=tmp_path,
        env={**os.environ, **variables},
        check=True,
    )
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 12
    for (checkpoint, accumulate, static, views), losses in found:
        _, expected = next(x for x in found if x[0] == [False, accumulate, False, False])
        assert len(set(expected)) == 3 * accumulate
        case = f"{checkpoint=} {accumulate=} {static=} {views=}"
        assert losses == pytest.approx(expected, rel=1e-5), case


def test_accumulation_is_no_static_graph(monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="static_graph does not go with accumulate = 2"):
        distribute(nn.Linear(1, 1), accumulate=2, static_graph=True)


def test_one_process_needs_no_wrapper():
    model = nn.Linear(1, 1)
    assert distribute(model, accumulate=2, static_graph=True) is model
