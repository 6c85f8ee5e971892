"""What the runs before have left, cut, damaged or unreadable, is found; and whose the folder is."""

import logging
import os
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from encoder.spool.spool import LEAST_BYTES, Spool, SpoolError
from protos.segment import Segment, index_of
from protos.v1 import veilcam_pb2 as pb
from tests.encoder.spools import HELLO, failing, frames
from tests.encoder.test_cli import encode
from tests.encoder.test_link import lines


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


def test_a_spool_that_is_partly_roots_loses_nothing_and_says_which_file(caplog: pytest.LogCaptureFixture) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files to root")
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        spool = Spool(folder / "spool", "camera", LEAST_BYTES, 1.0, Counter())
        spool.close()
        damaged = folder / "spool" / "camera" / f"{0:020d}-{0:012d}.vcseg"
        damaged.write_bytes(b"no segment")
        for path in (folder, folder / "spool", folder / "spool" / "camera", damaged):
            shutil.chown(path, 65534)
        (folder / "spool" / "camera" / "epoch.new").touch(0o600)  # a run of root's that was killed in that moment
        for file in ("lock", "epoch", "epoch.new"):
            os.seteuid(65534)
            try:
                with pytest.raises(SpoolError, match=rf"camera/{file}: can't be used \(Permission denied; give it to"):
                    Spool(folder / "spool", "camera", LEAST_BYTES, 1.0, Counter())
            finally:
                os.seteuid(0)
            assert damaged.exists()
            shutil.chown(folder / "spool" / "camera" / file, 65534)
        assert np.all([line.levelno < logging.WARNING for line in caplog.records])


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


def test_frames_under_a_former_name_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    former = Spool(tmp_path, "porch", LEAST_BYTES, 1.0, Counter())
    former.append(HELLO, frames(1, size=200_000)[0], sent=False)
    spool = Spool(tmp_path, "door", LEAST_BYTES, 1.0, Counter())
    assert not caplog.text, "that one runs"
    spool.close()
    former.close()
    spool = Spool(tmp_path, "door", LEAST_BYTES, 1.0, Counter())
    assert len(lines(caplog.text, "0.2 MB of camera porch wait there, and only veilcam-encode --name porch")) == 1
    assert "delete" not in caplog.text, "it may not have been started yet"
    Spool(tmp_path, "porch", LEAST_BYTES, 1.0, Counter()).close()
    spool.close()
