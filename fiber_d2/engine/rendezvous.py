"""How the machines of one job find each other, and learn that one of them has failed."""

from __future__ import annotations

import fcntl
import json
import logging
import socket
import struct
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist

from .errors import LostContactError

logger = logging.getLogger(__name__)

_PREFIX = "fiber_d2"
_FAILURE = "failure"
_POLL_SECONDS = 0.2
# Of a single question to the store; its answers take milliseconds.
_ANSWER_SECONDS = 20.0
_REMIND_SECONDS = 60.0
# Errors of a store; torch before 2.2 has no class for them.
_STORE_ERROR = getattr(dist, "DistError", RuntimeError)
_SIOCGIFADDR = 0x8915  # Linux: the address of a network interface


@dataclass(frozen=True)
class Address:
    """Of machine 0: a name or an IP address, and a TCP port."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}"


def parse_dist_url(url: str) -> Address:
    """The parts of ``tcp://HOST:PORT``.

    Raises:
        ValueError: another format, or a port that does not exist.
    """
    mistake = f"--dist-url is {url!r}, but it has to be tcp://HOST:PORT"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{mistake}, with a port from 1 to 65535: {error}.") from error
    if parts.scheme != "tcp" or not parts.hostname:
        raise ValueError(f"{mistake}, such as tcp://10.0.0.1:29500.")
    if not port:
        raise ValueError(f"{mistake}: the port is missing, such as tcp://{parts.hostname}:29500.")
    if parts.path.strip("/") or parts.query or parts.username:
        raise ValueError(f"{mistake} and nothing else.")
    return Address(parts.hostname, port)


class Meeting:
    """The machines of a job, around a store that machine 0 offers.

    It is held by the process that starts the others, one on each machine: what does not fit
    together shows before anything else is started, and the failure of a machine reaches those
    that wait for it in a collective operation.

    Args:
        address: of machine 0; port 0 takes any free one, which only machine 0 then knows.
        machine_rank: this machine's place, 0-based.
        num_machines: of the job.
        timeout: how long to wait for machine 0, and then for the others.

    Attributes:
        address: where the store answers.

    Raises:
        ValueError: the port is in use, the host does not exist.
        LostContactError: machine 0 did not answer in time.
    """

    def __init__(
        self, address: Address, *, machine_rank: int, num_machines: int, timeout: timedelta
    ) -> None:
        self.machine_rank = machine_rank
        self.num_machines = num_machines
        self.timeout = timeout
        self._deadline = time.monotonic() + timeout.total_seconds()
        if machine_rank:
            self._await_machine_0(address)
        else:
            _check_host(address)
        store = _open_store(address, offer=machine_rank == 0)
        self.address = Address(address.host, store.port)
        self._store = dist.PrefixStore(_PREFIX, store)

    def gather(self, **facts: Any) -> None:
        """Wait until all machines are here, and compare what they were started with.

        Args:
            facts: options by name, in plain values; they have to be equal on all machines.

        Raises:
            ValueError: two machines with the same rank, or with different options.
            LostContactError: some did not come in time; the message names them.
        """
        facts = {"--num-machines": self.num_machines, **facts}
        me = json.dumps({"host": socket.gethostname(), "id": uuid.uuid4().hex, "facts": facts})
        try:
            seated = self._store.compare_set(_seat(self.machine_rank), "", me).decode()
            if seated != me:
                raise ValueError(
                    f"Two machines are --machine-rank {self.machine_rank}: "
                    f"{json.loads(seated)['host']} and {socket.gethostname()}. Give each a number "
                    f"of its own, from 0 to {self.num_machines - 1}."
                )
            self._await_others()
            found = [
                json.loads(self._store.get(_seat(rank)).decode())
                for rank in range(self.num_machines)
            ]
            # Nobody may find the store gone before it could read what does not fit together.
            self._wait_for_all("read", _ANSWER_SECONDS)
        except _STORE_ERROR as error:
            raise LostContactError(
                f"Machine 0, which all meet at ({self.address}), ended before all machines had "
                "come; see its messages."
            ) from error
        self._compare(found)

    def _await_machine_0(self, address: Address) -> None:
        """Knock until it answers: torch's own attempts fill the terminal with warnings."""
        reminder = time.monotonic() + _REMIND_SECONDS
        while True:
            try:
                socket.create_connection((address.host, address.port), timeout=5).close()
                return
            except OSError as error:
                if time.monotonic() > self._deadline:
                    raise LostContactError(
                        f"Machine 0 did not answer at {address} within {_shown(self.timeout)} "
                        f"({error}). Is it started, is {address.host} its address, and does no "
                        "firewall stand between?"
                    ) from error
            if time.monotonic() > reminder:
                logger.warning("Still waiting for machine 0 at %s", address)
                reminder += _REMIND_SECONDS
            time.sleep(_POLL_SECONDS)

    def _await_others(self) -> None:
        reminder = time.monotonic() + _REMIND_SECONDS
        while True:
            missing = [r for r in range(self.num_machines) if not self._store.check([_seat(r)])]
            if not missing:
                return
            names = ", ".join(map(str, missing))
            if time.monotonic() > self._deadline:
                raise LostContactError(
                    f"{len(missing)} of {self.num_machines} machines did not come to "
                    f"{self.address} within {_shown(self.timeout)}: machine rank {names}. Start "
                    "the same command there with its --machine-rank; wait longer with "
                    "--dist-timeout SECONDS."
                )
            if time.monotonic() > reminder:
                logger.warning("Still waiting for machine rank %s at %s", names, self.address)
                reminder += _REMIND_SECONDS
            time.sleep(_POLL_SECONDS)

    def _compare(self, found: list[dict[str, Any]]) -> None:
        first = found[0]
        for rank, other in enumerate(found):
            for name, value in first["facts"].items():
                if other["facts"].get(name) != value:
                    raise ValueError(
                        f"Machines have to agree on {name}: it is {value!r} on machine 0 "
                        f"({first['host']}) and {other['facts'].get(name)!r} on machine {rank} "
                        f"({other['host']})."
                    )

    def _wait_for_all(self, key: str, seconds: float) -> None:
        """Until all machines have come to the point ``key``, at most so long."""
        count = self._store.add(key, 1)
        until = time.monotonic() + seconds
        while count < self.num_machines and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
            count = self._store.add(key, 0)

    def leave(self, seconds: float = _ANSWER_SECONDS) -> None:
        """Part from the others; machine 0 waits for them, since the store ends with it."""
        try:
            if self.machine_rank:
                self._store.add("left", 1)
            else:
                self._wait_for_all("left", seconds)
        except _STORE_ERROR:
            logger.debug("machine 0 is gone already")

    def report_failure(self, message: str) -> None:
        """Tell the other machines; the first failure of the job is the one that stays."""
        try:
            self._store.compare_set(
                _FAILURE,
                "",
                f"machine {self.machine_rank} ({socket.gethostname()}) stopped: {message}",
            )
        except _STORE_ERROR:
            logger.debug("machine 0 is gone, nobody to tell")

    def failure_elsewhere(self) -> str | None:
        """What stopped another machine, or None while all is well."""
        try:
            if not self._store.check([_FAILURE]):
                return None
            message = self._store.get(_FAILURE).decode()
        except _STORE_ERROR:
            return f"machine 0 ({self.address}) does not answer any more"
        return None if message.startswith(f"machine {self.machine_rank} ") else message


def open_process_store(address: Address, timeout: timedelta) -> dist.Store:
    """The store of a meeting, for a process group that is to be made.

    Args:
        timeout: of the questions that processes put to it.
    """
    store = _open_store(address, offer=False)
    store.set_timeout(timeout)
    return dist.PrefixStore("processes", store)


def local_interface(address: Address) -> str | None:
    """Name of the network interface that leads to ``address``; None where it cannot be told."""
    family, kind, protocol, _, target = socket.getaddrinfo(
        address.host, address.port, type=socket.SOCK_DGRAM
    )[0]
    if family != socket.AF_INET:
        return None
    with socket.socket(family, kind, protocol) as probe:
        # Nothing is sent; the kernel chooses the way.
        probe.connect(target)
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue  # an interface without an IPv4 address
            if socket.inet_ntoa(answer[20:24]) == own:
                return name
    return None


def _check_host(address: Address) -> None:
    try:
        socket.getaddrinfo(address.host, address.port or None)
    except OSError as error:
        raise ValueError(
            f"--dist-url names the host {address.host}, which this machine, machine 0, cannot "
            f"find ({error})."
        ) from error


def _open_store(address: Address, *, offer: bool) -> dist.TCPStore:
    try:
        return dist.TCPStore(
            address.host,
            address.port,
            is_master=offer,
            timeout=timedelta(seconds=_ANSWER_SECONDS),
            wait_for_workers=False,
        )
    except _STORE_ERROR as error:
        if "EADDRINUSE" in str(error):
            raise ValueError(
                f"Port {address.port} of this machine is in use, perhaps by a run that is still "
                "going: give --dist-url another port, the same on all machines."
            ) from error
        raise LostContactError(
            f"{address} cannot be reached from this machine, machine 0 or a process of it: is "
            f"{address.host} its address? ({str(error).splitlines()[0]})"
        ) from error


def _seat(machine_rank: int) -> str:
    return f"machine{machine_rank}"


def _shown(timeout: timedelta) -> str:
    return f"{timeout.total_seconds():g} s"
