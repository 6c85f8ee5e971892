"""A link with a spool: kills of either side, damage, a full disk. Every frame is recorded once, or counted."""

import contextlib
import logging
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.processes import free_port
from decoder.settings import Settings
from encoder import backlog as backlog_module
from encoder.packing import Packer
from encoder.pipeline import REASONS
from encoder.sampling import Operator
from encoder.sources import Frame
from encoder.spool.spool import LEAST_BYTES, Spool
from protos.segment import Segment
from protos.v1 import veilcam_pb2 as pb
from tests.conftest import StartService, frame_of, hello_of
from tests.encoder.spools import Spooling, number, small_disk, spooled
from tests.encoder.test_cli import ENCODE, encode
from tests.encoder.test_link import endless, lines
from tests.waiting import wait_for


def recorded(folder: Path) -> list[pb.Frame]:
    """Every frame of a recording as it is played: segments by their names, each from its start.

    But for those that nothing was written to, as when the service was killed in that moment.
    """
    paths = sorted(path for path in (folder / "camera").glob("*.vcseg") if path.stat().st_size)
    return [frame for path in paths for frame, _ in Segment(path).frames()]


def whole(frames: list[pb.Frame]) -> bool:
    """Whether every difference follows its base."""
    before = 0
    for frame in frames:
        if frame.base_sequence not in (0, before):
            return False
        before = frame.sequence
    return True


def serve(port: int, folder: Path) -> "subprocess.Popen[bytes]":
    arguments = ["--port", str(port), "--http", "0", "--record", str(folder), "--engine", "onnxruntime"]
    command = [sys.executable, "-m", "decoder", *arguments]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def spooling(port: int, spool: Path, *more: str, source: str = "pattern:64x48@30") -> "subprocess.Popen[str]":
    arguments = [*ENCODE, source, "--server", f"127.0.0.1:{port}", "--spool", str(spool), "--spool-rate", "300", *more]
    return subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)


def dropped(summary: str) -> int:
    told = summary.split("dropped here: ")[1].split(";")[0]
    return sum(number(told, rf"(\d+) {reason}") for reason in REASONS)


def iter_until(stream: Iterator[str], words: str) -> Iterator[str]:
    for line in stream:
        yield line
        if words in line:
            return


def test_a_server_that_is_killed_costs_no_frame(tmp_path: Path) -> None:
    """Killed twice in mid-stream: every frame captured is recorded once, in order, or counted as dropped."""
    port, folder = free_port(), tmp_path / "recordings"
    with spooling(port, tmp_path / "spool") as camera:
        try:
            for _ in range(2):
                before = max((frame.sequence for frame in recorded(folder)), default=0)
                with serve(port, folder) as server:
                    try:
                        wait_for(
                            lambda least=before + 60: max((f.sequence for f in recorded(folder)), default=0) > least,  # type: ignore[misc]
                            "frames",
                            60,
                        )
                    finally:
                        server.kill()
            late = max(spooled(tmp_path / "spool"))
            with serve(port, folder) as server:
                try:
                    wait_for(lambda: min(spooled(tmp_path / "spool"), default=late) > late, "all that is late", 60)
                    camera.send_signal(signal.SIGTERM)
                    _, told = camera.communicate(timeout=30)
                finally:
                    server.terminate()
        finally:
            camera.kill()
    assert camera.returncode == 0, told
    summary = told.splitlines()[-1]
    frames = recorded(folder)
    sequences = [frame.sequence for frame in frames]
    assert sequences == sorted(set(sequences))
    assert [frame.capture_time_ns for frame in frames] == sorted(frame.capture_time_ns for frame in frames)
    assert whole(frames)
    there = set(sequences) | spooled(tmp_path / "spool")
    captured = number(summary, r"captured (\d+)")
    assert captured - 1 <= len(there) + dropped(summary) <= captured, summary  # one may have come at the very end
    assert late in sequences
    assert number(summary, r"sent late (\d+)") > 0
    assert lines(told, "frames flow again after", "in the spool")


def test_a_camera_that_is_killed_sends_its_spool_when_it_is_back(start_service: StartService, tmp_path: Path) -> None:
    port, spool, folder = free_port(), tmp_path / "spool", tmp_path / "recordings"
    with spooling(port, spool) as camera:
        wait_for(lambda: len(spooled(spool)) > 40, "frames")
        camera.kill()
    of_it = [frame for path in sorted(spool.glob("camera/*.vcseg")) for frame, _ in Segment(path).frames()]
    assert all(path.stat().st_mode & 0o077 == 0 for path in [spool, spool / "camera", *spool.glob("camera/*")])
    service = start_service(Settings(port=port, http=0, record=folder))
    with spooling(port, spool) as camera:
        try:
            line = "the backlog is through"
            assert camera.stderr is not None
            told = "".join(iter_until(camera.stderr, line))
            assert f"{len(of_it)} frames of runs before are to be sent" in told
            assert number(told, rf"{line}: (\d+) frames sent late") >= len(of_it)
        finally:
            camera.send_signal(signal.SIGTERM)
            camera.communicate(timeout=30)
    service.stop()
    (first, *_) = sorted((folder / "camera").glob("*.vcseg"))
    assert [frame for frame, _ in Segment(first).frames()] == of_it
    epochs = [Segment(path).hello.epoch for path in sorted((folder / "camera").glob("*.vcseg"))]
    assert epochs == sorted(epochs)
    assert epochs[0] < epochs[-1]


def test_a_source_that_ends_while_the_server_is_away_leaves_its_frames_to_the_next_run(tmp_path: Path) -> None:
    done = encode("pattern:64x48@30#20", "--server", f"127.0.0.1:{free_port()}", "--spool", str(tmp_path))
    assert done.returncode == 0, done.stderr
    summary = done.stderr.splitlines()[-1]
    assert number(summary, r"in the spool (\d+)") + dropped(summary) == 20
    assert len(spooled(tmp_path)) == number(summary, r"in the spool (\d+)") > 0


def test_a_server_that_records_nothing_takes_no_backlog_and_one_that_records_does(
    start_service: StartService,
    operator: Operator,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backlog_module, "REFUSED_WAIT_S", 0.5)
    port = free_port()
    running = Spooling(operator, f"127.0.0.1:{port}", tmp_path / "spool", endless(30))
    wait_for(lambda: running.spool.waiting > 20, "frames in the spool")
    first = min(spooled(tmp_path / "spool"))  # the one before it may have been left out for a newer one
    service = start_service(Settings(port=port, http=0))
    wait_for(lambda: "nothing is recorded here" in caplog.text, "a refusal")
    assert running.spool.waiting > 20
    service.stop()
    service = start_service(Settings(port=port, http=0, record=tmp_path / "recordings"))
    wait_for(lambda: running.spool.late > 20, "a backlog")
    running.end()
    service.stop()
    told = [record.getMessage() for record in caplog.records if record.message.startswith("backlog: 127")]
    assert len(told) == 1
    assert recorded(tmp_path / "recordings")[0].sequence == first


def test_damage_in_a_spool_is_told_counted_and_stepped_over(
    start_service: StartService, operator: Operator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    packer = Packer(operator, 0.1)
    spool = Spool(tmp_path / "spool", "camera", LEAST_BYTES, 1.0, Counter())
    hello = hello_of(operator, np.zeros((32, 32), np.uint8))
    hello.epoch = spool.epoch
    for sequence in range(1, 13):
        picture = np.full((32, 32), sequence, np.uint8)
        frame, _ = packer.pack(frame_of(picture, time.time_ns()), sequence, key=sequence % 4 == 1)
        spool.append(hello, frame, sent=False)
    spool.close()
    (path,) = (tmp_path / "spool").glob("camera/*.vcseg")
    content = bytearray(path.read_bytes())
    content[Segment(path).entries()[5].offset + 20] ^= 1  # the sixth, and with it the two built on it
    path.write_bytes(content)
    bad = path.with_name("0" * 20 + "-" + "0" * 12 + ".vcseg")
    bad.write_bytes(b"no segment")
    service = start_service(Settings(port=0, http=0, record=tmp_path / "recordings"))
    running = Spooling(operator, service.address, tmp_path / "spool", endless(30))
    wait_for(lambda: running.spool.late >= 9, "the backlog")
    running.end()
    service.stop()
    assert running.account.dropped["spool damaged"] == 3
    assert "is damaged: 3 frames are lost" in caplog.text
    assert f"{bad.name}: 10 bytes are too few for a segment; how many frames are lost with it isn't" in caplog.text
    assert [frame.sequence for frame in recorded(tmp_path / "recordings")][:9] == [1, 2, 3, 4, 5, 9, 10, 11, 12]


def test_pictures_of_another_size_begin_a_part_of_their_own_while_the_server_is_away(
    operator: Operator, tmp_path: Path
) -> None:
    """Also if they have as many blocks, so that they could be coded as differences to those of before."""
    changed, captured = threading.Event(), []

    def resized() -> Iterator[Frame]:
        while True:
            captured.append(30 if changed.is_set() else 32)
            yield frame_of(np.full((captured[-1], 32), 90, np.uint8), 10**18 + len(captured))
            time.sleep(0.01)

    running = Spooling(operator, f"127.0.0.1:{free_port()}", tmp_path, resized())
    try:
        wait_for(lambda: running.spool.waiting > 10, "frames that wait")
        changed.set()
        before = running.spool.waiting
        wait_for(lambda: running.spool.waiting > before + 10, "more of them")
    finally:
        running.end()
    parts = [Segment(path) for path in sorted(tmp_path.glob("camera/*.vcseg"))]
    assert [part.hello.height for part in parts] == [32, 30]
    for part in parts:
        sizes = {captured[frame.sequence - 1] for frame, _ in part.frames()}
        assert sizes == {part.hello.height}


def test_a_full_disk_under_the_spool_does_not_stop_the_live_stream(
    start_service: StartService, operator: Operator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A real file system with no room but for its folders."""
    caplog.set_level(logging.INFO)
    service = start_service(Settings(port=0, http=0))
    noise, filled = np.random.default_rng(1), threading.Event()

    def busy() -> Iterator[Frame]:
        assert filled.wait(30)
        while True:
            yield frame_of(noise.integers(0, 255, (96, 96), np.uint8), time.time_ns())
            time.sleep(0.02)

    with small_disk(tmp_path / "small", "64k") as small:
        running, filler = Spooling(operator, service.address, small, busy(), 96), small / "filler"
        try:
            with contextlib.suppress(OSError):
                filler.write_bytes(b"\0" * (64 << 10))
            filled.set()
            wait_for(lambda: "No space left on device; the live stream goes on" in caplog.text, "a full disk")
            sent = running.account.sent
            wait_for(lambda: running.account.sent > sent + 50, "live frames")
            filler.unlink()
            wait_for(lambda: "frames are kept again" in caplog.text, "room")
        finally:
            running.end()
    assert len(lines(caplog.text, "No space left on device")) <= 3
