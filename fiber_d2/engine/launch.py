"""Start the processes of a run: on CPUs or GPUs, on one machine or on several."""

from __future__ import annotations

import gc
import logging
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm

DEFAULT_TIMEOUT = timedelta(minutes=30)


def choose_device(requested: str, num_gpus: int) -> tuple[str, int]:
    """What a run gets: the kind of device, and how many processes on this machine.

    ``num_gpus`` 0, or a machine without a GPU, means the CPU; a number above 1 then is the number
    of CPU processes.

    Args:
        requested: "cuda" or "cpu", from the configuration.
        num_gpus: of ``--num-gpus``.

    Raises:
        ValueError: a negative number, more processes than GPUs, or a device named with an index.
    """
    if num_gpus < 0:
        raise ValueError(f"--num-gpus is {num_gpus}, but it cannot be negative.")
    if requested not in ("cuda", "cpu"):
        raise ValueError(
            f"The device is {requested!r}, but it has to be 'cuda' or 'cpu'; choose among several "
            "GPUs with CUDA_VISIBLE_DEVICES."
        )
    if requested == "cpu" or num_gpus == 0 or not torch.cuda.is_available():
        return "cpu", max(num_gpus, 1)
    if num_gpus > torch.cuda.device_count():
        raise ValueError(
            f"--num-gpus is {num_gpus}, but this machine has {torch.cuda.device_count()} GPU(s); "
            "lower it, or set the device to cpu."
        )
    return "cuda", num_gpus


def find_free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listened on a moment ago."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(
    main_func: Callable[..., Any],
    *,
    num_processes: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    device: str = "cpu",
    args: tuple[Any, ...] = (),
    timeout: timedelta = DEFAULT_TIMEOUT,
) -> None:
    """Call ``main_func(*args)`` in every process of this machine, and wait for all of them.

    One process in all runs in the caller's own; otherwise processes are spawned (so ``main_func``
    and ``args`` must be picklable) and joined in a process group: nccl on GPUs, gloo on CPUs.

    Args:
        num_processes: on this machine.
        machine_rank: this machine's place, 0-based; machine 0 must be reachable at ``dist_url``.
        dist_url: ``tcp://host:port``, the same on all machines; "auto" finds a free local port.
        timeout: of collective operations.

    Raises:
        ValueError: where the machine numbers do not fit together.
        torch.multiprocessing.ProcessExitedException: a process ended with a non-zero exit code.
        torch.multiprocessing.ProcessRaisedException: a process raised.
    """
    if num_machines < 1 or not 0 <= machine_rank < num_machines:
        raise ValueError(
            f"--machine-rank is {machine_rank} of --num-machines {num_machines}: ranks go from 0 "
            "to one below the number of machines."
        )
    world_size = num_machines * num_processes
    if world_size == 1:
        main_func(*args)
        return
    if dist_url == "auto":
        if num_machines > 1:
            raise ValueError(
                "Several machines need --dist-url tcp://HOST:PORT, the address of machine 0; "
                "'auto' works on one machine only."
            )
        dist_url = f"tcp://127.0.0.1:{find_free_port()}"
    # It announces each process that it ends after another one failed; that one has said why.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    mp.spawn(
        _process,
        nprocs=num_processes,
        args=(main_func, world_size, num_processes, machine_rank, dist_url, device, args, timeout),
    )


def _process(
    local_rank: int,
    main_func: Callable[..., Any],
    world_size: int,
    num_processes: int,
    machine_rank: int,
    dist_url: str,
    device: str,
    args: tuple[Any, ...],
    timeout: timedelta,
) -> None:
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        # Every process would otherwise start as many threads as there are cores.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_processes))
    dist.init_process_group(
        backend="nccl" if device == "cuda" else "gloo",
        init_method=dist_url,
        world_size=world_size,
        rank=machine_rank * num_processes + local_rank,
        timeout=timeout,
    )
    _create_local_groups(num_processes, machine_rank)
    comm.synchronize()
    main_func(*args)
    # Nobody leaves before all are done, and nothing may hold a group, whose threads must end while
    # the interpreter still runs: left to its end, they can abort the process.
    comm.synchronize()
    comm._LOCAL_PROCESS_GROUP = None
    gc.collect()
    dist.destroy_process_group()


def _create_local_groups(num_processes: int, machine_rank: int) -> None:
    """Tell Detectron2 which processes share this machine."""
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(num_processes)
        return
    # Detectron2 0.6 has no function for it: its launcher, which demands GPUs, sets the variable.
    for machine in range(dist.get_world_size() // num_processes):
        first = machine * num_processes
        group = dist.new_group(list(range(first, first + num_processes)))
        if machine == machine_rank:
            comm._LOCAL_PROCESS_GROUP = group
