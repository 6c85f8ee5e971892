"""Recording: segments, retention, a slow or full disk, and a service that records what it shows."""

import logging
import os
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from decoder.recordings.ends import SegmentLimits
from decoder.recordings.recorder import Recorder
from decoder.recordings.store import Retention, Store
from decoder.settings import Settings
from encoder.packing import Packer
from encoder.sampling import Operator
from protos.segment import Segment, SegmentWriter, index_of
from protos.v1 import veilcam_pb2 as pb
from tests.conftest import StartService, frame_of, hello_of
from tests.decoder.peers import Camera
from tests.protos.segments import HELLO, frames, read
from tests.waiting import wait_for


def test_segments_end_at_a_key_frame_once_they_are_long_enough(tmp_path: Path) -> None:
    asked: list[None] = []
    recorder = Recorder(Store(tmp_path, Retention()), SegmentLimits(megabytes=0.001))
    recorder.begin(HELLO, lambda: asked.append(None))
    for frame in frames(60, size=200):
        assert recorder.offer("porch", frame, 1)
    recorder.close()
    segments = Store(tmp_path, Retention()).segments("porch")
    assert len(segments) > 3
    assert asked
    parts = [read(kept.path) for kept in segments]
    assert [frame for part in parts for frame in part] == frames(60, size=200)
    assert all(part[0].kind == pb.FRAME_KIND_KEY for part in parts)
    assert recorder.told()["porch"].frames == 60


def test_a_disk_that_is_too_slow_drops_counts_and_goes_on_with_a_key_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, awake = SegmentWriter.append, threading.Event()

    def once_awake(self: SegmentWriter, frame: pb.Frame, received_ns: int) -> None:
        assert awake.wait(20)
        append(self, frame, received_ns)

    monkeypatch.setattr(SegmentWriter, "append", once_awake)
    asked: list[None] = []
    recorder = Recorder(Store(tmp_path, Retention()), waiting=200)
    recorder.begin(HELLO, lambda: asked.append(None))
    taken = [frame for frame in frames(40)[:20] if recorder.offer("porch", frame, 1)]
    assert 0 < len(taken) < 20
    awake.set()
    wait_for(lambda: recorder.told()["porch"].frames == len(taken), "what was taken, on the disk")
    taken += [frame for frame in frames(40)[20:] if recorder.offer("porch", frame, 1)]
    assert taken[-1].sequence > 20
    recorder.close()
    told = recorder.told()["porch"]
    assert told.frames + told.dropped == 40
    assert asked
    (kept,) = Store(tmp_path, Retention()).segments()
    recorded = read(kept.path)
    assert recorded == taken
    for before, frame in zip([None, *recorded], recorded, strict=False):
        assert frame.kind == pb.FRAME_KIND_KEY or (before is not None and frame.base_sequence == before.sequence)


def test_a_disk_that_keeps_up_drops_nothing_however_much_passes_through(tmp_path: Path) -> None:
    """What waits is counted, and given back once it is written: far more than may wait goes through."""
    recorder = Recorder(Store(tmp_path, Retention()), waiting=3_000)
    recorder.begin(HELLO, lambda: None)
    for count, frame in enumerate(frames(20, size=1_000), 1):
        assert recorder.offer("porch", frame, 1)
        wait_for(lambda count=count: recorder.told()["porch"].frames == count, "the frame, on the disk")  # type: ignore[misc]
    recorder.close()
    assert recorder.told()["porch"].dropped == 0


def test_a_full_disk_deletes_the_oldest_and_recording_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A real file system of one megabyte."""
    caplog.set_level(logging.INFO)
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small]).returncode:
        pytest.skip("a small file system can't be mounted here")
    try:
        recorder = Recorder(Store(small, Retention(free_megabytes=0)), SegmentLimits(megabytes=0.2))
        recorder.begin(HELLO, lambda: None)
        for number, frame in enumerate(frames(1500, size=4000, every=2)):
            recorder.offer("porch", frame, 1)
            if number % 100 == 0:
                time.sleep(0.02)
        recorder.close()
        kept = [frame for each in Store(small, Retention()).segments() for frame in read(each.path)]
    finally:
        subprocess.run(["umount", small], check=True)
    told = recorder.told()["porch"]
    assert told.frames + told.dropped == 1500
    assert told.frames > 1000
    assert kept[-1].sequence > 1400
    assert "No space left on device; live pictures go on" in caplog.text
    assert "MiB of the disk were free" in caplog.text
    assert "recording of camera porch goes on" in caplog.text


@pytest.mark.parametrize(
    ("retention", "left", "reason"),
    [
        (Retention(hours=1.0, free_megabytes=0), [3, 4], "older than 1 h"),
        (Retention(megabytes=2, free_megabytes=0), [3, 4], "recordings take more than 2 MiB"),
        (Retention(free_megabytes=1 << 40), [2, 4], "of the disk were free"),
        (Retention(free_megabytes=0), [1, 2, 3, 4], ""),
    ],
)
def test_retention_deletes_the_oldest_and_says_why(
    retention: Retention, left: list[int], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Four segments of a megabyte, two older than an hour; 2 and 4 are being written in the third case."""
    caplog.set_level(logging.INFO)
    store, now = Store(tmp_path, retention), time.time_ns()
    ages = {1: 3.0, 2: 2.0, 3: 0.5, 4: 0.1}
    paths = {}
    for number, hours in ages.items():
        received_ns = now - int(hours * 3600e9)
        paths[number] = store.place("porch" if number % 2 else "yard", received_ns)
        paths[number].write_bytes(b"\0" * ((1 << 20) - 10))
        os.utime(paths[number], ns=(received_ns, received_ns))
        index_of(paths[number]).write_bytes(b"")
    writing = {paths[2], paths[4]} if left == [2, 4] else set()
    deleted = store.tidy(writing)
    assert sorted(kept.path for kept in deleted) == sorted(path for path in paths.values() if not path.exists())
    assert [number for number, path in paths.items() if path.exists()] == left
    assert [number for number, path in paths.items() if index_of(path).exists()] == left
    assert reason in caplog.text


def test_a_service_records_what_it_shows(
    tmp_path: Path, start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    """The frames on disk are those that were sent, to the byte; a second stream is a segment of its own."""
    service = start_service(Settings(port=0, http=0, record=tmp_path / "recordings"))
    sent = []
    for start in (0, 100):
        camera, packer = Camera(service.channel()), Packer(operator, 0.1)
        camera.say(hello=hello_of(operator, photographs[0]))
        for number, picture in enumerate(photographs[:4], 1):
            frame = packer.pack(frame_of(picture, start + number), number)[0]
            sent.append(frame)
            camera.say(frame=frame)
            camera.settled(number)
        camera.bye()
        wait_for(lambda: service.server.cameras.all()[0].stream is None, "the end of its stream")
    service.stop()
    segments = Store(tmp_path / "recordings", Retention()).segments("camera")
    assert len(segments) == 2
    assert [frame for kept in segments for frame in read(kept.path)] == sent
    assert Segment(segments[0].path).hello == hello_of(operator, photographs[0])
