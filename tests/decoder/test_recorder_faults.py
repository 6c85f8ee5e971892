"""Whatever fails while a frame is recorded, the only writer goes on, whoever waits is told, and the log has it."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from decoder.recordings.held import Span, look
from decoder.recordings.recorder import Recorder
from decoder.recordings.store import Retention, Store
from protos.segment import Segment, SegmentWriter
from protos.v1 import veilcam_pb2 as pb
from tests.protos.segments import HELLO, frames
from tests.waiting import wait_for


class Answer:
    """What a recorder says when it is done."""

    def __init__(self) -> None:
        self._came = threading.Event()

    def __call__(self, problem: str | None) -> None:
        self._told = problem
        self._came.set()

    @property
    def problem(self) -> str | None:
        assert self._came.wait(20)
        return self._told


def hello_of(camera: str) -> pb.Hello:
    hello = pb.Hello.FromString(HELLO.SerializeToString())
    hello.camera, hello.epoch = camera, 3
    return hello


def fails(
    monkeypatch: pytest.MonkeyPatch, method: str, error: Exception, matches: Callable[[SegmentWriter], bool]
) -> None:
    """What a writer does fails after it is done, for those that match."""
    real = getattr(SegmentWriter, method)

    def failing(self: SegmentWriter, *given: object) -> None:
        real(self, *given)
        if matches(self):
            raise error

    monkeypatch.setattr(SegmentWriter, method, failing)


@pytest.mark.parametrize("method", ["close", "flush", "append"])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), RuntimeError("a fault")], ids=["disk", "fault"])
def test_the_writer_goes_on_and_whoever_waits_is_told(
    method: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Everything that is written of ``porch`` fails; ``yard`` is recorded as if it were alone."""
    fails(monkeypatch, method, error, lambda writer: writer.path.parent.name == "porch")
    recorder, kept, asked = Recorder(Store(tmp_path, Retention(free_megabytes=0))), list[int](), list[None]()
    recorder.begin(hello_of("porch"), lambda: asked.append(None))
    recorder.begin(hello_of("yard"), lambda: None, kept.extend)
    told = frames(40)
    for frame in told[:20]:
        recorder.offer("porch", frame, 1)
        recorder.offer("yard", frame, 1)
    late = Answer()
    recorder.offer_late(recorder.begin_late(hello_of("porch")), told[36], np.zeros((1, 3, 4), np.int8), 1, late)
    ended = Answer()
    recorder.end("porch", ended)
    for frame in told[20:]:
        recorder.offer("yard", frame, 1)
    last = Answer()
    recorder.end("yard", last)
    assert last.problem is None
    assert kept == [frame.sequence for frame in told]
    paths = sorted(tmp_path.glob("yard/*.vcseg"))
    assert [frame for path in paths for frame, _ in Segment(path).frames()] == told
    problem = "Input/output error" if isinstance(error, OSError) else "the server failed, see its log"
    if method == "append":
        assert late.problem == problem
        assert asked
    else:
        assert late.problem is None
        assert ended.problem == problem
    assert ("Input/output error" if isinstance(error, OSError) else "RuntimeError: a fault") in caplog.text
    recorder.close()


def test_a_camera_that_can_not_be_recorded_is_told_once_beside_one_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where its folder should be is a file; each frame is a key frame, and what was told isn't told with each."""
    caplog.set_level("INFO", "veilcam.decode")
    monkeypatch.setattr("decoder.recordings.writer._ASK_AGAIN_S", 3600.0)
    (tmp_path / "porch").write_text("no folder")
    recorder, asked = Recorder(Store(tmp_path, Retention(free_megabytes=0))), list[None]()
    recorder.begin(hello_of("porch"), lambda: asked.append(None))
    recorder.begin(hello_of("yard"), lambda: None)
    told = frames(60, every=1)
    for frame in told[:40]:
        for camera in ("porch", "yard"):
            recorder.offer(camera, frame, 1)
    wait_for(lambda: recorder.told()["porch"].dropped == 40, "the last frame that can't be recorded")
    (tmp_path / "porch").unlink()
    for frame in told[40:]:
        recorder.offer("porch", frame, 1)
    recorder.close()
    assert recorder.told()["porch"].frames == 20
    lines = [line for line in caplog.messages if "recording of camera" in line]
    problem = "it is a file, not a folder; live pictures go on"
    assert lines == [f"recording of camera porch: {problem}", "recording of camera porch goes on"]
    assert len(asked) == 1


def test_of_what_waited_for_a_look_a_fault_takes_one_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whom a frame that fails would be asked for anew, that fails as well; the frames after it are recorded."""
    go_on, told = threading.Event(), frames(40, every=1)

    def slow(store: Store, camera: str, late: bool) -> list[tuple[int, Span]]:
        assert go_on.wait(20)
        return look(store, camera, late)

    def broken() -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr("decoder.recordings.looks.look", slow)
    failing = iter([True])
    fails(monkeypatch, "append", RuntimeError("a fault"), lambda _: next(failing, False))
    recorder = Recorder(Store(tmp_path, Retention(free_megabytes=0)))
    recorder.begin(hello_of("porch"), broken)
    for frame in told:
        assert recorder.offer("porch", frame, 1)
    ended = Answer()
    recorder.end("porch", ended)
    go_on.set()
    assert ended.problem is None
    recorder.close()
    assert recorder.told()["porch"].frames == 39
