"""A way that takes seconds for a large frame: the connection stays, and pictures come through as it carries them."""

import logging
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from benchmarks.proxy import Proxy
from encoder import sinks
from encoder.link import ServerLink
from encoder.packing import KEY_INTERVAL_FRAMES, Packer
from encoder.pipeline import Account, run
from encoder.sampling import Operator
from encoder.sinks import ServerSink
from encoder.sources import Frame
from protos.v1 import veilcam_pb2 as pb
from tests.conftest import Service, frame_of, hello_of
from tests.encoder.test_link import lines
from tests.waiting import wait_for

SIDE = 512
"""Of pictures of noise whose frames are some 40 kB each."""


def noise() -> Iterator[Frame]:
    draw = np.random.default_rng(0)
    while True:
        yield frame_of(draw.integers(0, 256, (SIDE, SIDE), np.uint8), time.time_ns())
        time.sleep(1 / 15)


def test_frames_that_take_longer_than_a_mute_server_is_given_come_through_one_by_one(
    service: Service, operator: Operator, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "UNANSWERED_S", 0.5)
    caplog.set_level(logging.INFO)
    account, stop, came = Account(), threading.Event(), set[int]()
    with Proxy(service.address) as proxy:
        proxy.bits_per_s = 290_000
        hello = hello_of(operator, np.zeros((SIDE, SIDE), np.uint8))
        link = ServerLink(proxy.address, hello, account.dropped)
        arguments = (noise(), Packer(operator, 0.25), link, account, stop)
        running = threading.Thread(target=run, args=arguments)
        running.start()

        def some() -> bool:
            came.add(link.progress.received)
            return len(came) > 5 and "the way there is full" in caplog.text

        wait_for(some, "pictures", 60)
        stop.set()
        running.join(10)
        proxy.bits_per_s = 0
        link.close()
    assert [line for line in lines(caplog.text, "WARNING") if "the way there is full" not in line] == []
    assert len(lines(caplog.text, "WARNING")) == 1
    assert link.outages == 0
    assert account.dropped["newer frame"] > 20
    assert account.captured == account.sent + account.dropped.total()
    assert not account.dropped["lost on the way"]


def test_a_way_that_nothing_is_known_of_gets_no_second_large_frame_before_the_first_is_there(
    service: Service, operator: Operator
) -> None:
    """And one that carried it at once gets several."""
    picture = np.random.default_rng(0).integers(0, 256, (1024, 1024), np.uint8)
    packer, sequence = Packer(operator, 0.25), 0
    with Proxy(service.address) as proxy:
        sink = ServerSink(proxy.address, hello_of(operator, picture))
        proxy.cut()

        def send() -> None:
            nonlocal sequence
            sequence += 1
            sink.send(pb.PublishRequest(frame=packer.pack(frame_of(picture, sequence), sequence, key=True)[0]))

        send()
        assert not sink.has_room
        proxy.mend()
        wait_for(lambda: sink.progress.received == 1, "the first")
        for number in (2, 3, 4, 5):
            wait_for(lambda: sink.has_room, "room")
            send()
            wait_for(lambda least=number: sink.progress.received >= least, "the next")  # type: ignore[misc]
        proxy.cut()
        for _ in range(2):
            assert sink.has_room
            send()
        wait_for(lambda: not sink.has_room, "nothing more goes where nothing arrives")
        proxy.mend()
        sink.close()


def test_a_way_with_a_long_round_trip_takes_a_key_frame_and_others_after_it(
    service: Service, operator: Operator
) -> None:
    """What was sent on it lately is no measure of what it carries, nor does a frame wait there that is on its way."""
    flat, noise = np.full((256, 256), 90, np.uint8), np.random.default_rng(0).integers(0, 256, (256, 256), np.uint8)
    packer, sequence = Packer(operator, 0.25), 0
    with Proxy(service.address) as proxy:
        sink = ServerSink(proxy.address, hello_of(operator, flat))

        def send(picture: np.ndarray, key: bool = False) -> None:
            nonlocal sequence
            sequence += 1
            sink.send(pb.PublishRequest(frame=packer.pack(frame_of(picture, sequence), sequence, key=key)[0]))

        proxy.delay_s = 0.6
        for _ in range(2):
            send(flat)
            wait_for(lambda: sink.progress.received == sequence, "it is there")
        send(noise, key=True)
        for _ in range(3):
            assert sink.has_room
            send(noise)
        assert sink.needs_s > 1, "it isn't mute"
        rooms = set[bool]()

        def there() -> bool:
            rooms.add(sink.has_room)
            return sink.progress.received >= sequence

        wait_for(there, "all are there")
        sink.close()
    assert rooms == {True}


def test_a_way_that_was_mute_is_not_taken_for_one_that_carries_next_to_nothing(
    service: Service, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        ahead = 0.0

        def monotonic(self) -> float:
            return time.monotonic() + self.ahead

    clock = Clock()
    monkeypatch.setattr(sinks, "time", clock)
    packer, sequence = Packer(operator, 0.25), 0
    with Proxy(service.address) as proxy:
        sink = ServerSink(proxy.address, hello_of(operator, np.zeros((512, 512), np.uint8)))
        draw = np.random.default_rng(0)

        def send(side: int) -> None:
            nonlocal sequence
            sequence += 1
            picture = np.zeros((512, 512), np.uint8)
            picture[:side, :side] = draw.integers(0, 256, (side, side), np.uint8)
            sink.send(pb.PublishRequest(frame=packer.pack(frame_of(picture, sequence), sequence, key=True)[0]))

        proxy.cut()
        send(64)
        assert sink.has_room
        clock.ahead += 15
        assert not sink.has_room
        proxy.mend()
        wait_for(lambda: sink.progress.received == 1, "the first")
        proxy.cut()
        send(64)
        assert sink.needs_s < 7
        send(512)
        assert sink.needs_s <= 10
        proxy.mend()
        sink.close()


def test_where_few_frames_are_sent_most_are_differences(operator: Operator) -> None:
    picture, packer, start = np.full((32, 32), 90, np.uint8), Packer(operator, 0.1), 10**18
    step = 5_000_000_000
    kinds = [packer.pack(frame_of(picture, start + step * n), n + 1)[0].kind for n in range(2 * KEY_INTERVAL_FRAMES)]
    keys = [index for index, kind in enumerate(kinds) if kind == pb.FRAME_KIND_KEY]
    assert keys == [0, KEY_INTERVAL_FRAMES]
    late = frame_of(picture, start + step * len(kinds) + 61_000_000_000)
    assert packer.pack(late, 100)[0].kind == pb.FRAME_KIND_KEY
