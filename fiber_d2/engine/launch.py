"""Start the processes of a run: on CPUs or GPUs, on one machine or on several."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm

from .interrupts import hear_and_die, hear_no_more, hear_once, held_back
from .processes import Reports, notice_lost_contact, wait_for_processes
from .rendezvous import Address, Meeting, local_interface, open_process_store, parse_dist_url

DEFAULT_TIMEOUT = timedelta(minutes=30)

_LOCAL_HOST = "127.0.0.1"


def choose_device(requested: str, num_gpus: int, *, option: str = "--num-gpus") -> tuple[str, int]:
    """What a run gets: the kind of device, and how many processes on this machine.

    ``num_gpus`` 0, or a machine without a GPU, means the CPU; a number above 1 then is the number
    of CPU processes.

    Args:
        requested: "cuda" or "cpu", from the configuration.
        num_gpus: of ``--num-gpus``.
        option: what the number is called in messages.

    Raises:
        ValueError: a negative number, more processes than GPUs, or a device named with an index.
    """
    if num_gpus < 0:
        raise ValueError(f"{option} is {num_gpus}, but it cannot be negative.")
    if requested not in ("cuda", "cpu"):
        raise ValueError(
            f"The device is {requested!r}, but it has to be 'cuda' or 'cpu'; choose among several "
            "GPUs with CUDA_VISIBLE_DEVICES."
        )
    if requested == "cpu" or num_gpus == 0 or not torch.cuda.is_available():
        return "cpu", max(num_gpus, 1)
    if num_gpus > torch.cuda.device_count():
        raise ValueError(
            f"{option} is {num_gpus}, but this machine has {torch.cuda.device_count()} GPU(s); "
            "lower it, or set the device to cpu."
        )
    return "cuda", num_gpus


@dataclass(frozen=True)
class Placement:
    """Which process this is, among those that torchrun or another launcher has started."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def read_placement(environment: Mapping[str, str]) -> Placement | None:
    """What torchrun's variables say; None where no launcher has started this process.

    ``RANK`` and ``WORLD_SIZE`` mark such a process.

    Raises:
        ValueError: some variables are missing, or do not fit together.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    needed = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in environment]
    if missing:
        raise ValueError(
            f"RANK and WORLD_SIZE are set, as torchrun does, but {', '.join(missing)} not: set "
            "all of torchrun's variables, or unset RANK and WORLD_SIZE."
        )
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    shown = ", ".join(f"{name}={environment[name]}" for name in names)
    try:
        rank, world_size, local_rank, local_world_size = (int(environment[name]) for name in names)
    except ValueError:
        raise ValueError(f"The variables of the launcher are not all numbers: {shown}.") from None
    if not (
        0 <= rank < world_size
        and 0 <= local_rank < local_world_size
        and world_size % local_world_size == 0
    ):
        raise ValueError(
            f"The variables of the launcher do not fit together: {shown}. Every machine has to "
            "have the same number of processes."
        )
    return Placement(rank, world_size, local_rank, local_world_size)


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
    placement: Placement | None = None,
) -> None:
    """Call ``main_func(*args)`` in every process of this machine, and wait for all of them.

    One process in all runs in the caller's own; otherwise processes are spawned (so ``main_func``
    and ``args`` must be picklable) and joined in a process group: nccl on GPUs, gloo on CPUs. The
    machines meet first, and what does not fit together shows before a process is started.

    Args:
        num_processes: on this machine.
        machine_rank: this machine's place, 0-based; machine 0 must be reachable at ``dist_url``.
        dist_url: ``tcp://host:port``, the same on all machines; "auto" finds a free local port.
        timeout: of collective operations, and of waiting for other machines.
        placement: of this process, where a launcher has started all of them: none is spawned.

    Raises:
        ValueError: the machine numbers do not fit together, the port is in use.
        LostContactError: machines that did not come, or a process that ended without a word.
        torch.multiprocessing.ProcessExitedException: a process ended with a non-zero exit code.
        torch.multiprocessing.ProcessRaisedException: a process raised.
    """
    if placement is not None:
        _run_placed(placement, main_func, args, device, timeout)
        return
    if num_machines < 1 or not 0 <= machine_rank < num_machines:
        raise ValueError(
            f"--machine-rank is {machine_rank} of --num-machines {num_machines}: ranks go from 0 "
            "to one below the number of machines."
        )
    if dist_url != "auto":
        address = parse_dist_url(dist_url)
    elif num_machines == 1:
        address = Address(_LOCAL_HOST, 0)
    else:
        raise ValueError(
            "Several machines need --dist-url tcp://HOST:PORT, the address of machine 0; "
            "'auto' works on one machine only."
        )
    if num_machines * num_processes == 1:
        main_func(*args)
        return
    meeting = Meeting(
        address, machine_rank=machine_rank, num_machines=num_machines, timeout=timeout
    )
    meeting.gather(**{"--num-gpus": num_processes, "the device": device})
    reports = Reports()
    with held_back():
        context = mp.spawn(
            _process,
            nprocs=num_processes,
            args=(
                main_func,
                args,
                Placement(0, num_machines * num_processes, 0, num_processes),
                machine_rank,
                meeting.address,
                device,
                timeout,
                reports,
                multiprocessing.get_start_method(),
            ),
            join=False,
        )
    wait_for_processes(
        context.processes,
        first_rank=machine_rank * num_processes,
        reports=reports,
        meeting=meeting if num_machines > 1 else None,
        timeout=timeout,
    )


def _process(
    local_rank: int,
    main_func: Callable[..., Any],
    args: tuple[Any, ...],
    first: Placement,
    machine_rank: int,
    address: Address,
    device: str,
    timeout: timedelta,
    reports: Reports,
    start_method: str,
) -> None:
    """A spawned process.

    Args:
        first: the placement of the one with both ranks 0.
        start_method: of the processes that load its data. By itself a spawned process spawns, too:
            each of those would load all modules anew and get a copy of its data set.
    """
    multiprocessing.set_start_method(start_method, force=True)
    with reports.of(local_rank):
        hear_and_die()
        _choose_interface(address)
        rank = machine_rank * first.local_world_size + local_rank
        placement = replace(first, rank=rank, local_rank=local_rank)
        store = open_process_store(address, timeout)
        with _process_group(placement, device, timeout, store=store):
            hear_once()
            main_func(*args)
        hear_no_more()


def _run_placed(
    placement: Placement,
    main_func: Callable[..., Any],
    args: tuple[Any, ...],
    device: str,
    timeout: timedelta,
) -> None:
    if placement.world_size == 1:
        main_func(*args)
        return
    hear_and_die()
    _choose_interface(Address(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
    with _process_group(placement, device, timeout, init_method="env://"):
        # torchrun passes interrupts on.
        hear_once()
        main_func(*args)
    hear_no_more()


@contextmanager
def _process_group(
    placement: Placement, device: str, timeout: timedelta, **where: Any
) -> Iterator[None]:
    """Join the other processes, and part from them when all are done.

    Args:
        where: ``store`` or ``init_method``, where they meet.
    """
    if device == "cuda":
        torch.cuda.set_device(placement.local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        # Every process would otherwise start as many threads as there are cores.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // placement.local_world_size))
    with notice_lost_contact():
        dist.init_process_group(
            backend="nccl" if device == "cuda" else "gloo",
            world_size=placement.world_size,
            rank=placement.rank,
            timeout=timeout,
            **where,
        )
        _create_local_groups(placement)
        comm.synchronize()
    yield
    with notice_lost_contact():
        # Nobody leaves before all are done, and nothing may hold a group, whose threads must end
        # while the interpreter still runs: left to its end, they can abort the process. Detectron2
        # remembers two: of this machine's processes, and that through which objects go.
        comm.synchronize()
    comm._LOCAL_PROCESS_GROUP = None
    comm._get_global_gloo_group.cache_clear()
    gc.collect()
    dist.destroy_process_group()


def _choose_interface(address: Address) -> None:
    """Let gloo use the network that leads to machine 0.

    By itself it takes the one that this machine's name stands for, which may be the loopback.
    """
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        name = local_interface(address)
        if name is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = name


def _create_local_groups(placement: Placement) -> None:
    """Tell Detectron2 which processes share this machine."""
    size = placement.local_world_size
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(size)
        return
    # Detectron2 0.6 has no function for it: its launcher, which demands GPUs, sets the variable.
    for first in range(0, placement.world_size, size):
        group = dist.new_group(list(range(first, first + size)))
        if first <= placement.rank < first + size:
            comm._LOCAL_PROCESS_GROUP = group
