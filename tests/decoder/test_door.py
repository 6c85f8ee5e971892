"""At the door: how fast a camera is read, how many calls and connections are open, and how long one may say nothing."""

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from decoder.access.addresses import address_of, network_of
from decoder.access.keys import init
from decoder.access.people import write_people
from decoder.admission import Policy
from decoder.pace import Pace
from decoder.settings import Settings
from encoder.packing import Packer
from encoder.sampling import Operator
from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import ViewersStub
from tests.conftest import Service, StartService, frame_of, hello_of
from tests.decoder.guarded import Keys, ready
from tests.decoder.peers import Camera
from tests.decoder.test_web import get
from tests.waiting import wait_for

SMALL = np.zeros((32, 32), np.uint8)


def start(start_service: StartService, **changes: object) -> Service:
    return start_service(Settings.model_validate({"port": 0, "http": 0} | changes))


def channel_of(service: Service) -> grpc.Channel:
    """A connection of its own."""
    return grpc.insecure_channel(service.address, [("grpc.use_local_subchannel_pool", 1)])


def metric(service: Service, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(get(f"{service.page}/metrics")[1].decode())
    found = [s.value for family in families for s in family.samples if s.name == name and s.labels == labels]
    return sum(found)


@pytest.mark.parametrize("limit", [{"max_frame_rate": 50}, {"max_byte_rate": 4000}])
def test_a_camera_above_its_limit_is_read_no_faster_and_loses_nothing(
    start_service: StartService, operator: Operator, limit: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    service = start(start_service, **limit)
    with service.channel() as channel:
        camera, packer = Camera(channel), Packer(operator, 0.1)
        camera.say(hello=hello_of(operator, SMALL, "porch"))
        frames = [packer.pack(frame_of(SMALL, time.time_ns()), number, key=True)[0] for number in range(1, 101)]
        for frame in frames:
            camera.say(frame=frame)
        answers: list[pb.Acknowledgement] = []
        while not answers or answers[-1].settled < 100:
            answers.append(camera.answer().acknowledgement)
        camera.bye()
    assert answers[-1].received == 100
    assert any(pb.CHANGE_LOWER_RATE in answer.changes for answer in answers)
    assert metric(service, "veilcam_slowed_seconds_total", camera="porch") > 0
    ((name, value),) = limit.items()
    (told,) = [record.getMessage() for record in caplog.records if "read no faster" in record.getMessage()]
    assert f"{value} {'frames/s' if name == 'max_frame_rate' else 'bytes/s'} ({name})" in told
    measured = float(told.partition("camera porch sends ")[2].partition(" frames/s")[0])
    assert measured > 50, "what was measured is told"


@given(
    gaps=st.lists(st.floats(0, 0.5), min_size=1, max_size=200),
    size=st.integers(0, 5000),
    rate=st.floats(1, 500),
    byte_rate=st.integers(100, 100_000),
)
def test_no_second_has_more_than_two_seconds_worth(gaps: list[float], size: int, rate: float, byte_rate: int) -> None:
    """Of any length of time: so long at the limit, and one second's worth at once."""
    policy, now = Policy(1, 1, 1, 1, False, rate, byte_rate), [1000.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("decoder.pace.time.monotonic", lambda: now[0])
        pace, read = Pace("porch", policy), []
        for gap in gaps:
            now[0] += gap
            read.append(now[0])
            now[0] += pace.wait_after(size, lambda: (0.0, 0.0))
    for first, began in enumerate(read):
        for count, ended in enumerate(read[first:], 1):
            worth = ended - began + 1 + 1e-6
            assert count - 1 <= worth * rate
            assert (count - 1) * size <= worth * byte_rate


def test_a_camera_that_stays_too_fast_is_a_line_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    now = [1000.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("decoder.pace.time.monotonic", lambda: now[0])
        pace = Pace("porch", Policy(1, 1, 1, 1, False, 10, 0))
        for _ in range(3 * 60 * 20):
            now[0] += 0.05
            pace.wait_after(1, lambda: (20.0, 1.0))
    assert caplog.text.count("read no faster") == 3


def test_without_limits_nothing_waits() -> None:
    pace = Pace("porch", Policy(1, 1, 1, 1, False, 0, 0))
    assert {pace.wait_after(1 << 30, lambda: (0.0, 0.0)) for _ in range(1000)} == {0.0}


def test_a_camera_that_publishes_nothing_is_let_go(start_service: StartService, operator: Operator) -> None:
    service = start(start_service, silent_seconds=1)
    with service.channel() as channel:
        camera = Camera(channel)
        camera.say(hello=hello_of(operator, SMALL))
        assert camera.answer().HasField("accepted")
        assert camera.refusal() == (grpc.StatusCode.DEADLINE_EXCEEDED, "message: nothing came for 1 s")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda hello, frame: frame.planes.extend([1] * 100_000), "frame.planes: 100001 planes, expected 4 at most"),
        (lambda hello, frame: hello.MergeFromString(b"\xa2\x06\x90\x4e" + bytes(10_000)), "hello: 100"),
    ],
    ids=["planes", "hello"],
)
def test_what_no_camera_says_is_not_kept_nor_told_at_length(
    start_service: StartService, operator: Operator, change: Callable[[pb.Hello, pb.Frame], object], told: str
) -> None:
    service = start(start_service)
    hello, frame = hello_of(operator, SMALL), Packer(operator, 0.1).pack(frame_of(SMALL), 1)[0]
    change(hello, frame)
    with service.channel() as channel:
        camera = Camera(channel)
        camera.say(hello=hello)
        camera.say(frame=frame)
        code, text = camera.refusal()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert text.startswith(told)
    assert len(text) < 200


def test_one_address_has_so_many_calls_and_then_room_again(
    start_service: StartService, operator: Operator, caplog: pytest.LogCaptureFixture
) -> None:
    service = start(start_service, max_peer_streams=2)
    cameras = [Camera(channel_of(service)) for _ in range(2)]
    for number, camera in enumerate(cameras):
        camera.say(hello=hello_of(operator, SMALL, f"camera{number}"))
        camera.answer()
    code, told = Camera(channel_of(service)).refusal()  # opened by now, and not before both of the others
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert told == "peer: 2 calls of '127.0.0.1' are open, this server allows 2"
    with pytest.raises(grpc.RpcError, match="RESOURCE_EXHAUSTED"):
        next(ViewersStub(channel_of(service)).Watch(pb.WatchRequest(camera="camera0"), timeout=20))
    assert caplog.text.count("(max_peer_streams)") == 1, "not once for each"
    cameras[0].bye()
    assert list(cameras[0].call)[-1].HasField("acknowledgement")

    def again() -> bool:
        try:
            camera = Camera(channel_of(service))
            camera.say(hello=hello_of(operator, SMALL, "again"))
            return camera.answer().HasField("accepted")
        except grpc.RpcError:
            return False

    wait_for(again, "another call that is let in")


@pytest.mark.parametrize(
    "method", ["veilcam.v1.Viewers/Watch", "veilcam.v1.Viewers/Cameras", "grpc.health.v1.Health/Check"]
)
def test_a_call_that_asks_nothing_counts_and_is_ended(
    start_service: StartService, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Also of a method with a single request, for which gRPC itself would wait."""
    monkeypatch.setattr("decoder.server.FIRST_MESSAGE_S", 2.0)
    service, asked = start(start_service, max_peer_streams=2), threading.Event()

    def nothing() -> Iterator[bytes]:
        asked.wait(60)
        yield from ()

    with channel_of(service) as channel:
        calls = [channel.stream_stream(f"/{method}", bytes, bytes)(nothing(), timeout=60) for _ in range(3)]
        ended = sorted((call.code().name, call.details()) for call in calls)
        asked.set()
        assert ended == [
            *[("DEADLINE_EXCEEDED", "message: none within 2 s")] * 2,
            ("RESOURCE_EXHAUSTED", "peer: 2 calls of '127.0.0.1' are open, this server allows 2"),
        ]
        call = channel.stream_stream(f"/{method}", bytes, bytes)(iter(()), timeout=20)
        assert (call.code().name, call.details()) == ("INVALID_ARGUMENT", "message: none, this call has one")


def test_one_certificate_has_so_many_calls_and_others_have_theirs(
    start_service: StartService, operator: Operator, tmp_path: Path
) -> None:
    init(tmp_path / "keys", cameras=["porch", "yard"])
    keys = Keys(tmp_path / "keys")
    service = start_service(keys.settings(max_peer_streams=1))

    def camera(name: str) -> Camera:
        channel = ready(service, keys.credentials(f"cameras/{name}"))
        assert channel is not None
        made = Camera(channel)
        made.say(hello=hello_of(operator, SMALL, name))
        return made

    first = camera("porch")
    assert first.answer().HasField("accepted")
    code, told = camera("porch").refusal()
    assert (code, told.startswith("peer: 1 calls of 'porch'")) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
    other = camera("yard")
    assert other.answer().HasField("accepted")
    first.bye()
    other.bye()


def test_a_connection_without_a_call_or_without_a_handshake_is_ended(start_service: StartService) -> None:
    service = start(start_service, idle_seconds=1, request_seconds=1)
    idle = threading.Event()
    channel, ready_once = channel_of(service), threading.Event()

    def told(state: grpc.ChannelConnectivity) -> None:
        if state is grpc.ChannelConnectivity.READY:
            ready_once.set()
        if state is grpc.ChannelConnectivity.IDLE and ready_once.is_set():
            idle.set()

    channel.subscribe(told, try_to_connect=True)
    assert ready_once.wait(20)
    assert idle.wait(20)
    channel.close()
    with socket.create_connection(("127.0.0.1", service.server.port), 20) as silent:
        while silent.recv(1000):  # what the server says of itself first
            pass


@pytest.fixture
def hasty(start_service: StartService) -> Service:
    return start(start_service, request_seconds=1, idle_seconds=1)


@pytest.fixture
def hasty_door(start_service: StartService, tmp_path: Path) -> Service:
    write_people(tmp_path / "users.toml", {})
    return start(start_service, request_seconds=1, idle_seconds=1, users=tmp_path / "users.toml")


ASKED = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
POSTED = b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n"
SLOW = {
    "nothing": (b"", b""),
    "a head that never ends": (ASKED + b"X: ", b"a"),
    "a body that never ends": (b"POST /healthz" + POSTED, b"a"),
    "a body in chunks": (ASKED + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
    "a body that never begins, of a request behind another": (ASKED + b"\r\nPOST /login" + POSTED, b""),
}


@pytest.mark.parametrize(("head", "drip"), SLOW.values(), ids=SLOW)
def test_a_request_that_does_not_come_as_a_whole_is_ended_however_it_drips(
    hasty_door: Service, head: bytes, drip: bytes
) -> None:
    with socket.create_connection(("127.0.0.1", hasty_door.server.http_port), 20) as connection:
        connection.sendall(head)
        connection.settimeout(0.1)

        def ended() -> bool:
            try:
                with contextlib.suppress(TimeoutError):
                    if not connection.recv(1000):
                        return True
                connection.sendall(drip)
            except (BrokenPipeError, ConnectionResetError):
                return True
            return False

        wait_for(ended, "the end of the connection")
    assert get(f"{hasty_door.page}/healthz")[0] == 200


def test_a_connection_that_asks_nothing_more_is_ended_and_one_that_is_answered_for_long_is_not(
    hasty: Service, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    kept = http.client.HTTPConnection("127.0.0.1", hasty.server.http_port, timeout=20)
    for _ in range(2):
        kept.request("GET", "/healthz")
        assert kept.getresponse().read() == b"alive\n"
    assert kept.sock.recv(1000) == b"", "it is ended"
    kept.close()
    camera, packer = Camera(hasty.channel()), Packer(operator, 0.1)
    camera.say(hello=hello_of(operator, photographs[0]))
    camera.answer()
    with socket.create_connection(("127.0.0.1", hasty.server.http_port), 20) as connection:
        connection.sendall(b"GET /cameras/camera.mjpeg HTTP/1.1\r\nHost: localhost\r\n\r\n")
        began, number = time.monotonic(), 0
        while time.monotonic() - began < 1.5:
            number += 1
            camera.say(frame=packer.pack(frame_of(photographs[number % 8], time.time_ns()), number)[0])
            camera.shown(number)
            assert connection.recv(1 << 20)
    camera.bye()


@pytest.fixture
def crowded(start_service: StartService) -> Iterator[tuple[Service, list[socket.socket]]]:
    service = start(start_service, max_http=4, max_peer_streams=2)
    opened: list[socket.socket] = []
    yield service, opened
    for connection in opened:
        connection.close()


def test_more_connections_of_the_page_than_allowed_are_closed_as_they_come(
    crowded: tuple[Service, list[socket.socket]], caplog: pytest.LogCaptureFixture
) -> None:
    service, opened = crowded

    def served(source: str) -> bool:
        made = socket.create_connection(("127.0.0.1", service.server.http_port), 20, (source, 0))
        try:
            made.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            told = made.recv(1000)
        except (ConnectionResetError, BrokenPipeError):
            told = b""
        if told:
            opened.append(made)
        else:
            made.close()
        return told.startswith(b"HTTP/1.1 200")

    assert [served("127.0.0.1") for _ in range(3)] == [True, True, False], "of one address"
    assert [served("127.0.0.2") for _ in range(3)] == [True, True, False]
    assert "page: connections are refused: 2 are open from 127.0.0.1 (max_peer_streams)" in caplog.text
    assert not served("127.0.0.3"), "of all"
    assert caplog.text.count("connections are refused") == 1, "not once for each"
    opened.pop(0).close()
    wait_for(lambda: served("127.0.0.3"), "a connection that is served")
    assert not served("127.0.0.1")


@pytest.mark.parametrize(
    ("peer", "address", "network"),
    [
        ("ipv4:192.0.2.7:40000", "192.0.2.7", "192.0.2.7"),
        ("ipv6:%5B2001:db8:1:2:3::4%5D:40000", "2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("ipv6:[::ffff:192.0.2.7]:40000", "192.0.2.7", "192.0.2.7"),
        ("unix:", "unix:", "unix:"),
    ],
)
def test_who_counts_as_one(peer: str, address: str, network: str) -> None:
    assert address_of(peer) == address
    assert network_of(address) == network
