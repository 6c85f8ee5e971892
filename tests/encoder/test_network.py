"""Bad networks between a camera and a server that are real processes: the stream comes back as it was, by itself."""

import logging
import socket
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from benchmarks.network import FAULTS, SHAPED_FAULTS, measure, why_not_shaped
from benchmarks.proxy import Proxy
from encoder.sampling import Operator
from encoder.sources import Frame
from tests.conftest import Service, frame_of
from tests.encoder.test_link import Running, lines
from tests.waiting import wait_for


@pytest.fixture(scope="module")
def shaped() -> dict[str, str]:
    """What this machine can't do with tc, and why."""
    return {name: why_not_shaped(name) for name in SHAPED_FAULTS}


@pytest.fixture(scope="module")
def result(shaped: dict[str, str]) -> dict[str, Any]:
    """All faults at the same time, since each takes a while: cameras of their own, one server."""
    possible = {name: fault for name, fault in SHAPED_FAULTS.items() if not shaped[name]}
    return measure(FAULTS | possible, logging.getLogger(__name__).info)


@pytest.mark.parametrize("name", [*FAULTS, *SHAPED_FAULTS])
def test_frames_flow_as_before_and_one_line_says_so(name: str, result: dict[str, Any], shaped: dict[str, str]) -> None:
    if why := shaped.get(name):
        pytest.skip(why)
    assert [row["fault"] for row in result["rows"]].count(name) == 1
    assert [problem for problem in result["problems"] if problem.startswith(f"{name}: ")] == []


def test_the_server_holds_no_more_than_before(result: dict[str, Any]) -> None:
    assert [problem for problem in result["problems"] if problem.startswith("the server")] == []


def test_the_proxy_hands_on_what_it_is_given_and_resets_in_mid_message() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as there,
        Proxy(f"127.0.0.1:{there.getsockname()[1]}") as proxy,
        socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as near,
        there.accept()[0] as far,
    ):
        near.sendall(b"x" * 100_000)
        assert far.recv(100_000, socket.MSG_WAITALL) == b"x" * 100_000
        proxy.reset()
        near.sendall(b"y" * 1000)
        assert far.recv(1000) == b"y" * 500
        with pytest.raises(ConnectionResetError):
            far.recv(1)
        with pytest.raises(ConnectionResetError):
            near.recv(1)


def noisy() -> Iterator[Frame]:
    """Frames that can't be coded in few bytes."""
    draw = np.random.default_rng(0)
    while True:
        yield frame_of(draw.integers(0, 256, (32, 32), np.uint8), time.time_ns())
        time.sleep(1 / 30)


def test_a_way_that_is_full_gets_fewer_frames_and_more_again(
    service: Service, operator: Operator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with Proxy(service.address) as proxy:
        proxy.bits_per_s = 20_000
        running = Running(operator, proxy.address, noisy())
        wait_for(lambda: "the way there is full" in caplog.text, "a lower rate")
        newer = running.account.dropped["newer frame"]
        proxy.bits_per_s = 0
        wait_for(lambda: "carries every frame again" in caplog.text, "every frame", 120)
        running.end()
    assert len(lines(caplog.text, "WARNING")) == 1
    assert running.account.dropped["rate lowered"] > newer
