"""What was recorded before the server began is looked at beside the recording: a slow disk holds up no camera's frames.

A pipe in place of a segment keeps whoever opens it, as a disk does that hangs.
"""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from decoder.recordings.held import Span, look
from decoder.recordings.recorder import Recorder
from decoder.recordings.store import Retention, Store
from decoder.settings import Settings
from encoder.packing import Packer
from encoder.sampling import Operator
from protos.rules import CLOCK_SET
from protos.segment import SegmentWriter
from protos.v1 import veilcam_pb2 as pb
from tests.conftest import StartService, frame_of
from tests.decoder.peers import Camera
from tests.decoder.test_backlog import backlog, kept, late, recorded, said
from tests.decoder.test_recorder_faults import Answer
from tests.waiting import wait_for

LEVELS = np.zeros((26, 21, 28), np.int8)


@pytest.fixture
def frames(operator: Operator, photographs: list[NDArray[np.uint8]]) -> list[pb.Frame]:
    packer = Packer(operator, 0.1)
    return [packer.pack(frame_of(p, n * 10**9), n, key=n % 2 == 1)[0] for n, p in enumerate(photographs[:6], 1)]


@pytest.fixture
def stuck(tmp_path: Path) -> Iterator[Path]:
    """Recordings of ``stuck``, whose only segment keeps whoever opens it."""
    pipe = tmp_path / "stuck" / f"{5:020d}.vcseg"
    pipe.parent.mkdir()
    os.mkfifo(pipe)
    yield tmp_path
    let_go(tmp_path)


def let_go(recordings: Path) -> None:
    """A pipe that kept whoever opened it ends, and is gone."""
    for pipe in recordings.glob("stuck/*.vcseg"):
        if pipe.is_fifo():
            end = os.open(pipe, os.O_RDWR)
            pipe.unlink()
            os.close(end)


def named(hello: pb.Hello, camera: str) -> pb.Hello:
    told = pb.Hello.FromString(hello.SerializeToString())
    told.camera = camera
    return told


def test_a_look_that_hangs_holds_up_nothing_that_is_live_and_no_other_backlog(
    stuck: Path,
    start_service: StartService,
    operator: Operator,
    photographs: list[NDArray[np.uint8]],
    frames: list[pb.Frame],
) -> None:
    service = start_service(Settings(port=0, http=0, record=stuck, record_free=0))
    cameras = Camera(service.channel()), Camera(service.channel())
    hello = said(operator, photographs[0])
    for camera, name in zip(cameras, ("stuck", "porch"), strict=True):
        camera.say(hello=named(hello, name))
        for frame in frames[:2]:
            camera.say(frame=frame)
            camera.settled(frame.sequence)
    assert [kept(camera, 2) for camera in cameras] == [[(1, 2)], [(1, 2)]]
    assert backlog(service, named(hello, "porch"), frames[4:]).recorded == 2
    for camera in cameras:
        camera.bye()
    service.stop()
    let_go(stuck)
    assert [frame.sequence for frame in recorded(stuck)] == [1, 2, 5, 6, 1, 2]


def test_what_is_live_does_not_wait_for_what_only_a_backlog_needs(
    stuck: Path,
    start_service: StartService,
    operator: Operator,
    photographs: list[NDArray[np.uint8]],
    frames: list[pb.Frame],
) -> None:
    """Of many recordings the oldest can't be read for now: the backlog is answered when it can."""
    (pipe,) = stuck.glob("stuck/*.vcseg")
    os.utime(pipe, (CLOCK_SET, CLOCK_SET))
    hello = named(said(operator, photographs[0]), "stuck")
    for number in range(12):
        before = named(said(operator, photographs[0], epoch=1), "stuck")
        writer = SegmentWriter(Store(stuck, Retention()).place("stuck", 10 + number), before)
        writer.append(frames[0], time.time_ns())
        writer.close()
    service = start_service(Settings(port=0, http=0, record=stuck, record_free=0))
    camera = Camera(service.channel())
    camera.say(hello=hello)
    camera.say(frame=frames[4])
    camera.settled(5)
    with ThreadPoolExecutor(1) as beside:
        answer = beside.submit(backlog, service, hello, frames[:4])
        camera.say(frame=frames[5])
        assert kept(camera, 6)
        assert not answer.done()
        let_go(stuck)
        assert answer.result(30) == pb.BacklogResponse(recorded=4, repeated=0)
    camera.bye()


def test_a_frame_that_is_sent_again_to_a_server_that_began_anew_is_recorded_once(
    start_service: StartService,
    operator: Operator,
    photographs: list[NDArray[np.uint8]],
    frames: list[pb.Frame],
    tmp_path: Path,
) -> None:
    """As of a file that is sent losslessly: what came last before a kill comes again, live."""
    for part in (frames[:3], frames[2:4]):
        service = start_service(Settings(port=0, http=0, record=tmp_path))
        camera = Camera(service.channel())
        camera.say(hello=said(operator, photographs[0]))
        for frame in part:
            camera.say(frame=frame)
            camera.settled(frame.sequence)
        assert kept(camera, part[-1].sequence)[0] == (part[0].sequence, part[-1].sequence)
        camera.bye()
        wait_for(lambda: service.server.cameras.all()[0].stream is None, "the end of the stream")  # noqa: B023 - called at once
        service.stop()
    assert [frame.sequence for frame in recorded(tmp_path)] == [1, 2, 3, 4]


def test_at_the_end_what_waits_for_a_look_that_hangs_is_recorded_and_a_backlog_told(
    stuck: Path, operator: Operator, photographs: list[NDArray[np.uint8]], frames: list[pb.Frame]
) -> None:
    hello, answer = named(said(operator, photographs[0]), "stuck"), Answer()
    recorder = Recorder(Store(stuck, Retention(free_megabytes=0)))
    recorder.begin(hello, lambda: None)
    for frame in frames:
        assert recorder.offer("stuck", frame, 1)
    recorder.offer_late(recorder.begin_late(hello), frames[0], LEVELS, 1, answer)
    recorder.close()
    assert answer.problem == "the server is shutting down"
    let_go(stuck)
    assert [frame.sequence for frame in recorded(stuck)] == [1, 2, 3, 4, 5, 6]


def test_recordings_that_can_not_be_looked_at_refuse_a_backlog_for_now_and_nothing_live(
    operator: Operator, photographs: list[NDArray[np.uint8]], frames: list[pb.Frame], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    hello, kept_live, answer = said(operator, photographs[0]), list[int](), Answer()
    recorder = Recorder(Store(tmp_path, Retention(free_megabytes=0)))

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "segments", broken)
        recorder.begin(hello, lambda: None, kept_live.extend)
        recorder.offer("camera", frames[4], 1)
        recorder.offer_late(recorder.begin_late(hello), frames[0], LEVELS, 1, answer)
        assert answer.problem == "Input/output error"
        wait_for(lambda: kept_live == [5], "the frame that is kept")
    assert "recordings of camera camera can't be looked at: Input/output error" in caplog.text
    late(recorder, hello, frames[:4])
    recorder.close()
    assert [frame.sequence for frame in recorded(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_backlog_lies_between_live_frames_that_waited_longer_for_their_look(
    operator: Operator, photographs: list[NDArray[np.uint8]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def slow(store: Store, camera: str, late: bool) -> list[tuple[int, Span]]:
        assert late or go_on.wait(20)
        return look(store, camera, late)

    monkeypatch.setattr("decoder.recordings.looks.look", slow)
    packer, hello = Packer(operator, 0.1), said(operator, photographs[0])
    frames = [packer.pack(frame_of(photographs[0], n * 1000), n, key=True)[0] for n in range(1, 8)]
    recorder = Recorder(Store(tmp_path, Retention(free_megabytes=0)))
    recorder.begin(hello, lambda: None)
    frames[2].backlog_before = True
    for frame in (frames[0], *frames[2:4]):
        recorder.offer("camera", frame, 1)
    for part in (frames[:2], frames[5:6], frames):
        late(recorder, hello, part)
    go_on.set()
    recorder.close()
    assert [frame.sequence for frame in recorded(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
