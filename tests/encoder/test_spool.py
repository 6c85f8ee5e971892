"""The spool: what a kill of either side leaves, its bounds, damage, and a full disk. Every frame is accounted for."""

import contextlib
import errno
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.processes import free_port
from decoder.settings import Settings
from encoder import backlog as backlog_module
from encoder import spool as spool_module
from encoder.packing import Packer
from encoder.pipeline import REASONS, Account, run
from encoder.sampling import Operator
from encoder.sources import Frame
from encoder.spool import LEAST_BYTES, Spool, SpoolError
from encoder.spooled import SpooledLink
from protos.segment import Segment, SegmentError, SegmentWriter, index_of
from protos.v1 import veilcam_pb2 as pb
from tests.conftest import StartService, frame_of, hello_of
from tests.encoder.test_cli import ENCODE, encode
from tests.encoder.test_link import endless, lines
from tests.waiting import wait_for

HELLO = pb.Hello(camera="camera", operator_id="0" * 16, width=64, height=48, epoch=1)


def recorded(folder: Path) -> list[pb.Frame]:
    """Every frame of a recording as it is played: segments by their names, each from its start.

    But for those that nothing was written to, as when the service was killed in that moment.
    """
    paths = sorted(path for path in (folder / "camera").glob("*.vcseg") if path.stat().st_size)
    return [frame for path in paths for frame, _ in Segment(path).frames()]


def spooled(folder: Path) -> set[int]:
    """Sequences of the frames in a spool that is written to."""
    found: set[int] = set()
    for path in folder.glob("camera/*.vcseg"):
        with contextlib.suppress(SegmentError, FileNotFoundError):  # not begun, or through
            found |= {entry.sequence for entry in Segment(path).entries()}
    return found


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


def number(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def dropped(summary: str) -> int:
    told = summary.split("dropped here: ")[1].split(";")[0]
    return sum(number(told, rf"(\d+) {reason}") for reason in REASONS)


def spooling(port: int, spool: Path, *more: str, source: str = "pattern:64x48@30") -> "subprocess.Popen[str]":
    arguments = [*ENCODE, source, "--server", f"127.0.0.1:{port}", "--spool", str(spool), "--spool-rate", "300", *more]
    return subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)


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


def iter_until(stream: Iterator[str], words: str) -> Iterator[str]:
    for line in stream:
        yield line
        if words in line:
            return


def frames(count: int, size: int = 60, every: int = 4, first: int = 1) -> list[pb.Frame]:
    made, now = [], time.time_ns()
    for sequence in range(first, first + count):
        key = (sequence - first) % every == 0
        kind = pb.FRAME_KIND_KEY if key else pb.FRAME_KIND_DELTA
        told = {"kind": kind, "base_sequence": 0 if key else sequence - 1, "payload": os.urandom(size)}
        made.append(pb.Frame(sequence=sequence, capture_time_ns=now + sequence, **told))  # type: ignore[arg-type]
    return made


def test_a_spool_is_bounded_and_drops_the_oldest(tmp_path: Path) -> None:
    dropped: Counter[str] = Counter()
    spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, dropped)
    for frame in frames(600, size=10_000):
        spool.append(HELLO, frame, sent=False)
        taken = sum(path.stat().st_size for path in (tmp_path / "camera").iterdir())
        assert taken <= LEAST_BYTES + 64
    assert dropped["spool full"] > 400
    assert dropped.total() == dropped["spool full"]
    assert spool.waiting + dropped["spool full"] == 600
    part = spool.take()
    assert part is not None
    assert min(part.pending) == dropped["spool full"] + 1
    assert taken > LEAST_BYTES / 2
    spool.close()


def test_a_file_that_cannot_be_deleted_does_not_lift_the_bound(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool, unlink = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, Counter()), Path.unlink

    def refused(path: Path, missing_ok: bool = False) -> None:
        if path.name.endswith("-000000000001.vcseg"):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    for frame in frames(600, size=10_000):
        spool.append(HELLO, frame, sent=False)
        assert sum(path.stat().st_size for path in (tmp_path / "camera").iterdir()) <= LEAST_BYTES + 64
    part = spool.take()
    assert part is not None
    assert spool.pending_of(part)[0] == 1, "its frames may yet be sent"
    assert len(lines(caplog.text, "can't be deleted (Operation not permitted")) == 1
    spool.close()


def test_a_group_larger_than_the_spool_is_dropped_and_the_next_key_frame_begins_anew(tmp_path: Path) -> None:
    dropped: Counter[str] = Counter()
    spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, dropped)
    needs = []
    for frame in frames(200, size=10_000, every=150):
        spool.append(HELLO, frame, sent=False)
        needs += [frame.sequence] if spool.needs_key else []
    assert 90 < needs[0] < 110
    assert needs == list(range(needs[0], 151))
    assert spool.waiting == 50
    assert dropped["spool full"] == 150
    spool.close()


OTHER = pb.Hello(camera="camera", width=1, epoch=1)
"""It begins another part."""


def test_what_is_too_old_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: Counter[str] = Counter()
    spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, dropped)
    spool.append(HELLO, frames(1)[0], sent=False)
    later = time.monotonic() + 3601
    monkeypatch.setattr(time, "monotonic", lambda: later)
    spool.append(OTHER, frames(1, first=2)[0], sent=False)
    spool.tend()
    assert (spool.waiting, dropped) == (1, Counter({"spool old": 1}))
    spool.close()


def test_a_clock_that_is_set_makes_nothing_old(tmp_path: Path) -> None:
    """Not what a camera without a battery saw in 1970, in this run or in the one before."""
    dropped: Counter[str] = Counter()
    for runs in (1, 2):
        spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, dropped)
        hello = pb.Hello(camera="camera", epoch=spool.epoch)
        (frame,) = frames(1)
        frame.capture_time_ns = 5_000_000_000
        spool.append(hello, frame, sent=False)
        spool.append(pb.Hello(camera="camera", epoch=spool.epoch, width=1), frames(1, first=2)[0], sent=False)
        spool.tend()
        assert spool.waiting == 2 * runs
        spool.close()
        for path in (tmp_path / "camera").glob("*.vcseg"):
            os.utime(path, (5, 5))
    assert not +dropped


def test_an_error_that_more_room_would_not_mend_drops_nothing_older(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: Counter[str] = Counter()
    spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, dropped)
    spool.append(HELLO, frames(1)[0], sent=False)
    with monkeypatch.context() as broken:
        broken.setattr(spool_module, "SegmentWriter", unwritable)
        for number in range(2, 12):
            spool.append(OTHER, frames(1, first=number)[0], sent=False)
    assert (spool.waiting, dropped) == (1, Counter({"spool unwritable": 10}))
    spool.close()


def test_a_part_of_another_version_stays_for_a_program_that_reads_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, Counter())
    spool.append(HELLO, frames(1)[0], sent=False)
    spool.close()
    (part,) = (tmp_path / "camera").glob("*.vcseg")
    content = bytearray(part.read_bytes())
    content[5] += 1  # the version, after the magic
    part.write_bytes(content)
    dropped: Counter[str] = Counter()
    spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, dropped)
    assert (spool.waiting, part.read_bytes(), +dropped) == (0, bytes(content), Counter())
    assert "this program reads 1; it stays where it is" in caplog.text
    spool.close()


def failing(path: Path) -> Path:
    """The file opens, and its first read is an EIO, as on a worn card; what it held is in the file that is returned."""
    kept = path.rename(path.with_suffix(".kept"))
    path.symlink_to("/proc/self/mem")
    return kept


def test_a_part_that_cannot_be_read_at_the_start_stays_and_is_read_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, Counter())
    for number in (1, 31):
        for frame in frames(30, first=number):
            spool.append(pb.Hello(camera="camera", width=number, epoch=1), frame, sent=False)
    spool.close()
    parts = sorted((tmp_path / "camera").glob("*.vcseg"))
    kept = [failing(part) for part in parts]
    dropped: Counter[str] = Counter()
    spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, dropped)
    assert [part.is_symlink() for part in parts] == [True, True]
    assert (spool.waiting, +dropped) == (0, Counter())
    assert len(lines(caplog.text, "what can't be read for now stays")) == 1
    kept[1].replace(parts[1])
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for seconds, waits in ((30, 0), (35, 0), (2, 30), (61, 30)):  # the one that still can't be is looked at first
        now += seconds
        spool.tend()
        assert spool.waiting == waits
    kept[0].replace(parts[0])
    now += 61
    spool.tend()
    part = spool.take()
    assert part is not None
    assert (part.path, len(part.pending), spool.waiting) == (parts[0], 30, 60)
    assert not +dropped
    spool.close()


def test_parts_that_cannot_be_read_are_bounded_too(tmp_path: Path) -> None:
    """Their frames are counted by the index, which can be read."""
    spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, Counter())
    for frame in frames(80, size=10_000):
        spool.append(HELLO, frame, sent=False)
    spool.close()
    for part in (tmp_path / "camera").glob("*.vcseg"):
        part.unlink()
        part.symlink_to("/proc/self/mem")
        os.truncate(index_of(part), 8 + 4 * 24)
    parts, dropped = len(list((tmp_path / "camera").glob("*.vcseg"))), Counter[str]()
    assert parts > 1
    spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, dropped)
    spool._size = 0
    for frame in frames(1, first=81):
        spool.append(HELLO, frame, sent=False)
    assert dropped["spool full"] == parts * 4 + 1
    spool.close()


def test_what_a_server_never_keeps_becomes_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It acknowledges frames, and its disk is full: nothing more is remembered of what is on the way than a while's."""
    monkeypatch.setattr(spool_module, "_MOST_ON_WAY", 5)
    spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, Counter())
    spool.append(HELLO, frames(1)[0], sent=True)
    spool.append(OTHER, frames(1, first=2)[0], sent=True)
    assert spool.take() is None, "the server may yet keep it"
    for frame in frames(4, first=3):
        spool.append(OTHER, frame, sent=True)
    part = spool.take()
    assert part is not None
    assert list(part.pending) == [1]
    spool.put_back(part)
    spool.close()


def unwritable(path: Path, hello: pb.Hello) -> SegmentWriter:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_what_is_kept_is_deleted_and_what_is_passed_over_or_lost_is_late(tmp_path: Path) -> None:
    dropped: Counter[str] = Counter()
    spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, dropped)
    for frame in frames(4):
        spool.append(HELLO, frame, sent=True)
    assert spool.take() is None
    spool.keep([pb.Sequences(first=1, last=1), pb.Sequences(first=3, last=3)])
    assert spool.waiting == 2  # 2 was passed over, 4 is on the way
    (key,) = frames(1, first=5)
    spool.append(HELLO, key, sent=True)
    assert spool.take() is None
    spool.lose(5)
    part = spool.take()
    assert part is not None
    assert list(part.pending) == [2, 4]
    spool.done(part, 4, {1, 2, 3, 4}, 2)
    assert spool.late == 2
    spool.keep([pb.Sequences(first=5, last=5)])  # told too late, and yet
    spool.close()
    assert not list(tmp_path.glob("camera/*.vcseg"))
    assert not list(tmp_path.glob("camera/*.index"))
    assert not dropped.total()


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The only part of a spool that a killed camera left: 20 frames."""
    folder = tmp_path_factory.mktemp("left")
    spool = Spool(folder, "camera", LEAST_BYTES, 1.0, Counter())
    for frame in frames(20):
        spool.append(HELLO, frame, sent=False)
    spool.close()
    (path,) = folder.glob("camera/*.vcseg")
    return path


def opened(left: Path, content: bytes, index: bytes, folder: Path) -> tuple[Spool, Counter[str]]:
    (folder / "camera").mkdir()
    (folder / "camera" / left.name).write_bytes(content)
    (folder / "camera" / index_of(left).name).write_bytes(index)
    dropped: Counter[str] = Counter()
    return Spool(folder, "camera", LEAST_BYTES, 1.0, dropped), dropped


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_spool_cut_at_any_byte_opens(
    left: Path, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Segment and index cut at any two bytes: every frame that is whole waits, and nothing else."""
    content, index = left.read_bytes(), index_of(left).read_bytes()
    ends = [*[entry.offset for entry in Segment(left).entries()][1:], len(content)]
    cut = data.draw(st.integers(0, len(content)))
    folder = tmp_path_factory.mktemp("cut")
    spool, _ = opened(left, content[:cut], index[: data.draw(st.integers(0, len(index)))], folder)
    assert spool.waiting == sum(end <= cut for end in ends)
    assert spool.epoch > 1
    for frame in frames(4, first=21):
        spool.append(HELLO, frame, sent=False)
    spool.close()


def test_a_spool_of_another_process_a_file_in_its_place_and_what_it_cannot_be_with(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, Counter())
    done = encode("pattern:64x48@30#5", "--spool", str(tmp_path))
    assert (done.returncode, "another veilcam-encode has it" in done.stderr) == (2, True)
    spool.close()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SpoolError, match=r"file: can't be used \(File exists\)"):
        Spool(tmp_path / "file", "camera", LEAST_BYTES, 1.0, Counter())
    for more in (["--out", str(tmp_path / "out")], ["--as-fast-as-possible"]):
        done = encode("pattern:64x48@30#5", "--spool", str(tmp_path), *more)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


def test_runs_are_numbered_upwards_also_when_the_clock_goes_back(tmp_path: Path) -> None:
    ahead = time.time_ns() // 1_000_000 + 10**9
    (tmp_path / "camera").mkdir()
    (tmp_path / "camera" / "epoch").write_text(f"{ahead}\n")
    for later in (1, 2):
        spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, Counter())
        assert spool.epoch == ahead + later
        spool.close()
    (tmp_path / "camera" / "epoch").write_text("what?")
    spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, Counter())
    assert spool.epoch >= time.time_ns() // 1_000_000 - 10_000
    spool.close()


class Spooling:
    """The pipeline into a spooled link, in a thread."""

    def __init__(self, operator: Operator, address: str, folder: Path, source: Iterator[Frame], side: int = 32) -> None:
        self.account, self.stop = Account(), threading.Event()
        self.spool = Spool(folder, "camera", LEAST_BYTES, 1.0, self.account.dropped)
        hello = hello_of(operator, np.zeros((side, side), np.uint8))
        hello.epoch = self.spool.epoch
        self.link = SpooledLink(address, hello, self.account.dropped, self.spool, 1000.0)
        arguments = (source, Packer(operator, 0.1), self.link, self.account, self.stop)
        self.thread = threading.Thread(target=run, args=arguments)
        self.thread.start()

    def end(self) -> None:
        self.stop.set()
        self.thread.join(20)
        self.link.close()


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


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own, of so many bytes."""
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]).returncode:
        pytest.skip("a small file system can't be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)  # what failed may have a file open there


def test_on_a_full_disk_the_oldest_frames_make_room_a_few_at_a_time_and_that_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is away, and the disk has a hundredth of what the spool may take."""
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    dropped: Counter[str] = Counter()
    made = frames(400, size=10_000)
    for frame in made:
        frame.capture_time_ns = (1_700_000_000 + frame.sequence) * 10**9
    with small_disk(tmp_path / "small", "2m") as small:
        spool, most = Spool(small, "camera", 200 << 20, 1.0, dropped), 0
        for frame in made:
            before = dropped["spool full"]
            spool.append(HELLO, frame, sent=False)
            most = max(most, dropped["spool full"] - before)
        assert dropped == Counter({"spool full": 400 - spool.waiting})
        assert 0 < most <= 32, "an eighth of what fits, and a group"
        assert spool.waiting > 130
        kept = [frame for path in sorted(small.glob("camera/*.vcseg")) for frame, _ in Segment(path).frames()]
        assert kept == made[-spool.waiting :]
        (told,) = lines(caplog.text, "WARNING", f"spool {small}/camera", "the disk is full")
        first = number(told, r"frames dropped: (\d+)")
        assert f"captured from {told_second(1)} to {told_second(first)}" in told
        now += 61
        spool.tend()
        _, told = lines(caplog.text, "WARNING", f"spool {small}/camera", "the disk is full")
        rest = dropped["spool full"] - first
        assert f"frames dropped: {rest}, captured from {told_second(first + 1)} to {told_second(first + rest)}" in told
        spool.close()
    assert "No space left" not in caplog.text


def told_second(sequence: int) -> str:
    return datetime.fromtimestamp(1_700_000_000 + sequence).astimezone().isoformat(" ")


def test_what_a_spool_drops_is_told_at_most_once_a_minute(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its size, of its age, and the last at the end."""
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    dropped: Counter[str] = Counter()
    spool = Spool(tmp_path, "camera", LEAST_BYTES, 1.0, dropped)
    for frame in frames(600, size=10_000):
        spool.append(HELLO, frame, sent=False)
    full = "no more fits into --spool-size"
    assert len(lines(caplog.text, full)) == 1
    spool.append(OTHER, frames(1, first=601)[0], sent=False)
    now += 3601
    spool.append(HELLO, frames(1, first=602)[0], sent=False)
    spool.tend()
    assert len(lines(caplog.text, full)) == 2
    assert not lines(caplog.text, "it was older than --spool-hours")
    spool.close()
    assert len(lines(caplog.text, "it was older than --spool-hours")) == 1
    told = [number(line, r"frames dropped: (\d+)") for line in lines(caplog.text, "frames dropped:")]
    assert sum(told) == dropped.total() == 601


def test_a_spool_that_others_may_write_or_look_into_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "spool"
    for mode, of_camera, told in [
        (0o755, 0o700, []),
        (0o1777, 0o700, []),
        (0o775, 0o700, [f"spool {folder}: others may write into it (mode 775)"]),
        (0o700, 0o750, [f"spool {folder}/camera: others may look into it (mode 750)"]),
    ]:
        caplog.clear()
        Spool(folder, "camera", LEAST_BYTES, 1.0, Counter()).close()
        assert not caplog.text, "it is made for its owner alone"
        folder.chmod(mode)
        (folder / "camera").chmod(of_camera)
        Spool(folder, "camera", LEAST_BYTES, 1.0, Counter()).close()
        assert [line for words in told for line in lines(caplog.text, words)] == lines(caplog.text, "others may")
        assert len(lines(caplog.text, "others may")) == len(told)
        folder.chmod(0o700)
        (folder / "camera").chmod(0o700)
