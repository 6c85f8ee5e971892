"""What a camera is told to be kept is there, and on the disk itself; what late frames leave behind."""

import errno
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from decoder.recordings.recorder import Recorder
from decoder.recordings.store import Retention, Store
from decoder.settings import Settings
from encoder.packing import Packer
from encoder.sampling import Operator
from protos.segment import SegmentWriter
from protos.v1 import veilcam_pb2 as pb
from tests.conftest import Service, StartService, frame_of
from tests.decoder.peers import Camera
from tests.decoder.test_backlog import backlog, kept, late, recorded, said
from tests.decoder.test_recorder_faults import Answer
from tests.waiting import wait_for


@pytest.fixture
def frames(operator: Operator, photographs: list[NDArray[np.uint8]]) -> list[pb.Frame]:
    packer = Packer(operator, 0.1)
    return [packer.pack(frame_of(p, n * 10**9), n, key=n % 2 == 1)[0] for n, p in enumerate(photographs[:6], 1)]


def publish(service: Service, hello: pb.Hello, frames: list[pb.Frame]) -> Camera:
    """A camera whose frames are kept."""
    camera = Camera(service.channel())
    camera.say(hello=hello)
    for frame in frames:
        camera.say(frame=frame)
        camera.settled(frame.sequence)
    kept(camera, frames[-1].sequence)
    return camera


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> set[Path]:
    """Files and folders that this process has brought onto the disk itself."""
    found, fsync = set[Path](), os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        found.add(Path(f"/proc/self/fd/{descriptor}").readlink())

    monkeypatch.setattr(os, "fsync", noted)
    return found


def opened(folder: Path) -> set[Path]:
    """Files of a folder that this process has open."""
    found = set[Path]()
    for each in Path("/proc/self/fd").iterdir():
        try:
            found.add(each.readlink())
        except FileNotFoundError:
            continue
    return {path for path in found if folder in path.parents}


@pytest.mark.parametrize("restarts", [False, True], ids=["of this process", "of the one before"])
def test_frames_of_a_recording_that_someone_deleted_are_not_called_kept(
    restarts: bool,
    start_service: StartService,
    operator: Operator,
    photographs: list[NDArray[np.uint8]],
    frames: list[pb.Frame],
    tmp_path: Path,
) -> None:
    service = start_service(Settings(port=0, http=0, record=tmp_path, record_free=0))
    camera = publish(service, said(operator, photographs[0]), frames[:2])
    camera.bye()
    cameras = service.server.cameras
    wait_for(lambda: cameras.all()[0].stream is None, "the end of the stream")
    if restarts:
        service.stop()
        service = start_service(Settings(port=0, http=0, record=tmp_path, record_free=0))
    camera = publish(service, said(operator, photographs[0]), frames[4:])
    assert backlog(service, said(operator, photographs[0]), frames[:2]).repeated == 2
    (first, *_) = sorted(tmp_path.glob("camera/*.vcseg"))
    first.unlink()
    assert backlog(service, said(operator, photographs[0]), frames[:2]) == pb.BacklogResponse(recorded=2, repeated=0)
    camera.bye()


def test_a_backlog_that_repeats_a_live_frame_is_done_when_that_is_on_the_disk_itself(
    operator: Operator,
    photographs: list[NDArray[np.uint8]],
    frames: list[pb.Frame],
    synced: set[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the name of its segment, and that of its folder."""
    monkeypatch.setattr("decoder.recordings.writer._FLUSH_EVERY_S", 3600.0)
    hello = said(operator, photographs[0])
    recorder = Recorder(Store(tmp_path, Retention(free_megabytes=0)))
    recorder.begin(hello, lambda: None)
    for frame in frames[:2]:
        recorder.offer("camera", frame, 1)
    wait_for(lambda: recorder.told()["camera"].frames == 2, "both frames")
    (live,) = tmp_path.glob("camera/*.vcseg")
    assert not synced
    late(recorder, hello, frames[:2])
    assert synced == {live, live.parent, tmp_path}
    recorder.close()


def test_a_frame_that_a_killed_process_left_is_called_kept_when_it_is_on_the_disk_itself(
    operator: Operator,
    photographs: list[NDArray[np.uint8]],
    frames: list[pb.Frame],
    synced: set[Path],
    tmp_path: Path,
) -> None:
    """Killed when it had written them and flushed nothing; the camera sends them again."""
    hello = said(operator, photographs[0])
    killed = SegmentWriter(Store(tmp_path, Retention()).place("camera", 10**9), hello)
    for frame in frames:
        killed.append(frame, 1)
    killed.close()
    synced.clear()
    at_kept: list[set[Path]] = []
    recorder = Recorder(Store(tmp_path, Retention(free_megabytes=0)))
    recorder.begin(hello, lambda: None, lambda _: at_kept.append(set(synced)))
    for frame in frames:
        recorder.offer("camera", frame, 1)
    recorder.end("camera")
    wait_for(lambda: at_kept, "the frames that are kept")
    recorder.close()
    assert at_kept[0] == {killed.path, killed.path.parent, tmp_path}
    assert recorder.told()["camera"].repeated == len(frames)


@pytest.mark.parametrize(("number", "fine"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)], ids=str)
def test_a_file_system_that_brings_no_names_to_a_disk_keeps_frames_all_the_same(
    number: int, fine: bool, frames: list[pb.Frame], operator: Operator, photographs: list[NDArray[np.uint8]],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As some of a network, and of FUSE; one of a disk that is broken keeps none."""
    fsync = os.fsync

    def refused(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refused)
    recorder, told, answer = Recorder(Store(tmp_path, Retention(free_megabytes=0))), list[int](), Answer()
    recorder.begin(said(operator, photographs[0]), lambda: None, told.extend)
    for frame in frames:
        recorder.offer("camera", frame, 1)
    recorder.end("camera", answer)
    assert answer.problem == (None if fine else os.strerror(number))
    assert told == ([frame.sequence for frame in frames] if fine else [])
    recorder.close()


def test_a_segment_of_a_backlog_ends_when_nothing_comes(
    operator: Operator,
    photographs: list[NDArray[np.uint8]],
    frames: list[pb.Frame],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("decoder.recordings.writer._LATE_IDLE_S", 0.2)
    hello = said(operator, photographs[0])
    recorder = Recorder(Store(tmp_path, Retention(free_megabytes=0)))
    recorder.begin(hello, lambda: None)
    late(recorder, hello, frames[:2])
    wait_for(lambda: not opened(tmp_path), "the end of the segments")
    late(recorder, hello, frames[2:4])
    assert len(list(tmp_path.glob("camera/*.vcseg"))) == 2
    recorder.close()
    assert [frame.sequence for frame in recorded(tmp_path)] == [1, 2, 3, 4]


def test_backlogs_of_many_runs_leave_few_segments_open(
    operator: Operator, photographs: list[NDArray[np.uint8]], frames: list[pb.Frame], tmp_path: Path
) -> None:
    """A call of each with a frame or two, then all of them go on; each frame is recorded once."""
    recorder = Recorder(Store(tmp_path, Retention(free_megabytes=0)))
    recorder.begin(said(operator, photographs[0]), lambda: None)
    runs = range(10, 30)
    for part in (frames[:2], frames[2:4]):
        for epoch in runs:
            late(recorder, said(operator, photographs[0], epoch), part)
        assert len(opened(tmp_path)) <= 8, "two files a segment"
    recorder.close()
    assert sorted(frame.sequence for frame in recorded(tmp_path)) == sorted([1, 2, 3, 4] * len(runs))
