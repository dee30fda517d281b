"""Machines as threads; whole ones are in test_machines.py."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from fiber_d2.engine.errors import LostContactError
from fiber_d2.engine.rendezvous import (
    Address,
    Meeting,
    local_interface,
    open_process_store,
    parse_dist_url,
)

LONG = timedelta(seconds=120)


@pytest.fixture
def address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return Address("127.0.0.1", port)


def meet(address, rank, num_machines=2, timeout=LONG, facts=None):
    meeting = Meeting(address, machine_rank=rank, num_machines=num_machines, timeout=timeout)
    meeting.gather(**(facts or {}))
    return meeting


def meet_all(address, *everyones):
    """What became of each: a meeting, or the exception."""
    with ThreadPoolExecutor(len(everyones)) as pool:
        futures = [pool.submit(meet, address, **options) for options in everyones]
    return [future.exception() or future.result() for future in futures]


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("tcp://10.0.0.1:29500", "10.0.0.1", 29500),
        ("tcp://node-1.cluster:1", "node-1.cluster", 1),
        ("tcp://[fd00::1]:65535", "fd00::1", 65535),
    ],
)
def test_urls(url, host, port):
    address = parse_dist_url(url)
    assert (address.host, address.port) == (host, port)
    assert str(address) == url


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("10.0.0.1:29500", "has to be tcp://HOST:PORT"),
        ("http://10.0.0.1:29500", "has to be tcp://HOST:PORT"),
        ("tcp://:29500", "has to be tcp://HOST:PORT"),
        ("tcp://node", "port is missing, such as tcp://node:29500"),
        ("tcp://node:0", "port is missing"),
        ("tcp://node:65536", "from 1 to 65535"),
        ("tcp://node:port", "from 1 to 65535"),
        ("tcp://node:29500/file", "and nothing else"),
        ("tcp://node:29500?rank=0", "and nothing else"),
    ],
)
def test_urls_of_another_format(url, message):
    with pytest.raises(ValueError, match="--dist-url is") as raised:
        parse_dist_url(url)
    assert message in str(raised.value)


def test_machines_come_in_any_order_and_find_one_store(address):
    late, meetings = [], []
    thread = threading.Thread(target=lambda: late.append(meet(address, 1)))
    thread.start()  # before machine 0
    meetings.append(meet(address, 0))
    thread.join()
    meetings += late
    stores = [open_process_store(meeting.address, LONG) for meeting in meetings]
    stores[1].set("from", "1")
    assert stores[0].get("from") == b"1"
    assert [meeting.failure_elsewhere() for meeting in meetings] == [None, None]


def test_one_machine_takes_any_port():
    meeting = meet(Address("127.0.0.1", 0), 0, num_machines=1)
    assert meeting.address.port > 0
    meeting.leave()


def test_machines_that_do_not_come_are_named(address):
    short = timedelta(seconds=2)
    for outcome in meet_all(
        address, *({"rank": rank, "num_machines": 4, "timeout": short} for rank in (0, 2))
    ):
        assert isinstance(outcome, LostContactError)
        assert "2 of 4 machines did not come to tcp://127.0.0.1" in str(outcome)
        assert "within 2 s: machine rank 1, 3." in str(outcome)


def test_machine_0_that_gives_up(address):
    zero = Meeting(address, machine_rank=0, num_machines=3, timeout=LONG)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(meet, address, 1, num_machines=3)
        while not zero._store.check(["machine1"]):
            pass
        del zero  # as when its process ends
        with pytest.raises(LostContactError, match="ended before all machines had come"):
            waiting.result()


def test_machine_0_that_does_not_answer(address):
    with pytest.raises(LostContactError, match="Machine 0 did not answer at tcp://127.0.0.1") as e:
        meet(address, 1, timeout=timedelta(seconds=1))
    assert "within 1 s" in str(e.value)


def test_a_host_that_does_not_exist():
    with pytest.raises(LostContactError, match="does-not-exist.invalid its address"):
        meet(Address("does-not-exist.invalid", 29500), 1, timeout=timedelta(seconds=1))
    with pytest.raises(ValueError, match="host does-not-exist.invalid, which this machine"):
        meet(Address("does-not-exist.invalid", 29500), 0)


def test_a_port_in_use(address):
    with socket.socket() as other:
        other.bind((address.host, address.port))
        other.listen()
        with pytest.raises(ValueError, match=f"Port {address.port} of this machine is in use"):
            meet(address, 0)


def test_two_machines_with_one_rank(address):
    options = {"num_machines": 3, "timeout": timedelta(seconds=3)}
    outcomes = meet_all(address, *({"rank": rank, **options} for rank in (0, 1, 1)))
    refused = [str(outcome) for outcome in outcomes if isinstance(outcome, ValueError)]
    assert len(refused) == 1
    assert refused[0].startswith("Two machines are --machine-rank 1: ")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"--num-gpus": 4}, "agree on --num-gpus: it is 8 on machine 0"),
        ({"--num-gpus": 8, "device": "cpu"}, "agree on device: it is 'cuda' on machine 0"),
    ],
)
def test_options_have_to_agree_and_everybody_says_so(address, facts, message):
    outcomes = meet_all(
        address,
        {"rank": 0, "facts": {"--num-gpus": 8, "device": "cuda"}},
        {"rank": 1, "facts": {"device": "cuda", **facts}},
    )
    for outcome in outcomes:
        assert isinstance(outcome, ValueError)
        assert message in str(outcome)
        assert "on machine 1" in str(outcome)


def test_failures_reach_the_others_the_first_one_only(address):
    zero, one, two = meet_all(address, *({"rank": r, "num_machines": 3} for r in range(3)))
    one.report_failure("out of memory")
    zero.report_failure("lost contact")
    for meeting in (zero, two):
        assert meeting.failure_elsewhere() == (
            f"machine 1 ({socket.gethostname()}) stopped: out of memory"
        )
    assert one.failure_elsewhere() is None


def test_machine_0_waits_for_those_that_leave_later(address):
    zero, one = meet_all(address, {"rank": 0}, {"rank": 1})
    left = threading.Event()
    thread = threading.Thread(target=lambda: (zero.leave(120), left.set()))
    thread.start()
    assert not left.wait(0.5)
    one.leave()
    assert left.wait(120)
    thread.join()


def test_interface_that_leads_to_an_address():
    assert local_interface(Address("127.0.0.1", 29500)) == "lo"
    assert local_interface(Address("::1", 29500)) is None
