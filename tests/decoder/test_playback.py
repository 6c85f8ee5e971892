"""Recordings back into pictures: any moment, spans and gaps, and segments that grow or were left empty."""

import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from benchmarks.fidelity import psnr
from decoder.catalogue import Catalogue
from decoder.recordings.playback import Moment, Playback, Recording, RecordingError, find, segments_of
from decoder.recordings.store import Retention, Store
from encoder.packing import Packer
from encoder.sampling import Operator
from protos.segment import Entry, Segment, SegmentWriter, index_of
from tests.conftest import frame_of, hello_of
from tests.protos.segments import HELLO, frames


def test_a_recording_plays_the_pictures_that_were_live(
    recorded: Path, catalogue: Catalogue, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    shots = list(Recording(segments_of(recorded), catalogue, "plain").shots())
    assert [shot.capture_time_ns // 1_000_000_000 for shot in shots] == list(range(1, 9))
    for shot, picture in zip(shots, photographs, strict=True):
        assert shot.pixels.shape == picture.shape
        assert psnr(shot.pixels, picture) > 25
    part = list(Recording(segments_of(recorded), catalogue, "plain").shots(3_000_000_000, 6_000_000_000))
    assert [shot.capture_time_ns for shot in part] == [shot.capture_time_ns for shot in shots[2:5]]
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(part, shots[2:5], strict=True))
    assert not np.array_equal(
        next(Recording(segments_of(recorded), catalogue, "veiled").shots()).pixels, shots[0].pixels
    )


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(times=st.lists(st.integers(0, 10_500), min_size=1, max_size=12))
def test_any_moment_in_any_order_is_what_was_live_then(
    recorded: Path, catalogue: Catalogue, operator: Operator, photographs: list[NDArray[np.uint8]], times: list[int]
) -> None:
    playback = Playback(Store(recorded.parent, Retention()), catalogue)
    for time_ms in times:
        moment = playback.at("camera", time_ms * 1_000_000)
        assert moment is not None
        second = min(8, max(1, time_ms // 1000))
        assert moment.capture_time_ns == second * 1_000_000_000
        assert moment.next_ns == (None if second == 8 else (second + 1) * 1_000_000_000)
        picture = photographs[second - 1]
        assert np.array_equal(moment.levels, operator.quantise(operator.sample(picture, 26), (21, 28)))


def test_a_recording_that_grows_is_played_to_its_new_end(
    recorded: Path, tmp_path: Path, catalogue: Catalogue, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    store, packer = Store(tmp_path, Retention()), Packer(operator, 0.1)
    writer = SegmentWriter(store.place("camera", 10**9), hello_of(operator, photographs[0]))
    playback = Playback(store, catalogue)
    for second, picture in enumerate(photographs, 1):
        writer.append(packer.pack(frame_of(picture, second * 10**9), second)[0], second)
        for asked in (second, 1):
            moment = playback.at("camera", asked * 10**9)
            assert moment is not None
            assert moment.capture_time_ns == asked * 10**9
            assert moment.next_ns == (None if asked == second else 2 * 10**9)
    writer.close()


def test_spans_join_segments_and_show_gaps(tmp_path: Path, catalogue: Catalogue) -> None:
    store = Store(tmp_path, Retention())
    for start in (1, 3, 60):
        writer = SegmentWriter(store.place("porch", start * 10**9), HELLO)
        for number, frame in enumerate(frames(3)):
            frame.capture_time_ns = (start + number) * 10**9
            writer.append(frame, 1)
        writer.close()
    playback = Playback(store, catalogue)
    assert playback.spans("porch") == [(10**9, 5 * 10**9), (60 * 10**9, 62 * 10**9)]
    assert playback.spans("nobody") == []
    assert playback.at("nobody", 5) is None
    with pytest.raises(RecordingError, match="no reconstructor for operator 0000000000000000"):
        playback.at("porch", 5 * 10**9)


def test_a_segment_that_is_deleted_after_the_first_look_is_left_out(
    recorded: Path, catalogue: Catalogue, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Between the look and the first picture engines are measured, and retention goes on."""
    segments, times = find(shutil.copytree(recorded, tmp_path / "camera"))
    segments[0].path.unlink()
    shots = Recording(segments, catalogue, "plain").shots()
    assert [shot.capture_time_ns for shot in shots] == times[4:]
    assert f"{segments[0].path} was deleted meanwhile" in caplog.text


def test_reconstructors_may_change_while_a_recording_is_read(
    recorded: Path, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a reload does, on a disk that is slow."""
    own, entries = Catalogue(catalogue.reconstructors), Segment.entries

    def slowly(self: Segment) -> list[Entry]:
        own.reconstructors = ()
        return entries(self)

    monkeypatch.setattr(Segment, "entries", slowly)
    playback = Playback(Store(recorded.parent, Retention()), own)
    moment = playback.at("camera", 3 * 10**9)
    assert moment is not None
    assert moment.capture_time_ns == 3 * 10**9
    with pytest.raises(RecordingError, match="no reconstructor for operator"):
        playback.at("camera", 3 * 10**9)


def test_a_segment_that_is_deleted_while_it_is_looked_for_is_left_out(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def deleted_then(path: Path) -> list[Segment]:
        segments = segments_of(path)
        segments[0].path.unlink()
        return segments

    _, times = find(recorded)
    monkeypatch.setattr("decoder.recordings.playback.segments_of", deleted_then)
    assert find(shutil.copytree(recorded, tmp_path / "camera"))[1] == times[4:]
    assert "was deleted meanwhile" in caplog.text


def test_a_segment_that_is_deleted_while_it_plays_plays_to_its_end(recorded: Path, tmp_path: Path) -> None:
    segment = segments_of(shutil.copytree(recorded, tmp_path / "camera"))[0]
    frames = segment.frames()
    first = next(frames)
    segment.path.unlink()
    index_of(segment.path).unlink()
    assert len([first, *frames]) == 4


@pytest.mark.parametrize(
    ("damaged", "expected"),
    [
        (1, {1: 5, 2: 5, 3: 5, 4: 5, 5: 5, 6: 6}),
        (3, {1: 1, 2: 2, 3: 2, 4: 2, 5: 5, 6: 6}),
        (5, {1: 1, 2: 2, 3: 3, 4: 4, 5: 4, 6: 4}),
        (6, {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 5}),
    ],
)
def test_where_a_frame_is_damaged_the_one_before_stays(
    damaged: int,
    expected: dict[int, int],
    tmp_path: Path,
    catalogue: Catalogue,
    operator: Operator,
    photographs: list[NDArray[np.uint8]],
) -> None:
    """Also where it is a key frame; only where nothing is left before it, what comes first is shown."""
    store, packer = Store(tmp_path, Retention()), Packer(operator, 0.1)
    writer = SegmentWriter(store.place("camera", 10**9), hello_of(operator, photographs[0]))
    for second, picture in enumerate(photographs[:6], 1):
        writer.append(packer.pack(frame_of(picture, second * 10**9), second, key=second in (1, 5))[0], second)
    writer.close()
    (segment,) = segments_of(tmp_path / "camera")
    content = bytearray(segment.path.read_bytes())
    content[segment.entries()[damaged - 1].offset + 40] ^= 1
    segment.path.write_bytes(content)
    for order in ((1, 2, 3, 4, 5, 6), (4, 3, 6, 5, 2, 1)):
        playback = Playback(store, catalogue)
        shown = {}
        for second in order:
            moment = playback.at("camera", second * 10**9)
            assert moment is not None
            shown[second] = moment.capture_time_ns // 10**9
        assert shown == expected


def test_a_segment_that_a_kill_left_empty_is_left_out(
    recorded: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The service had made its file, and nothing was in it yet."""
    folder = shutil.copytree(recorded, tmp_path / "camera")
    empty = folder / "99999999999999999999.vcseg"
    empty.touch()
    assert find(folder)[1] == find(recorded)[1]
    assert f"left out: {empty}: 0 bytes are too few" in caplog.text
    with pytest.raises(RecordingError, match="0 bytes are too few"):
        segments_of(empty)


def test_a_moment_opens_no_more_segments_than_it_takes(recorded: Path, tmp_path: Path, catalogue: Catalogue) -> None:
    """A pipe in place of the segment before keeps whoever opens it, as a disk does that hangs."""
    folder = shutil.copytree(recorded, tmp_path / "camera")
    pipe = folder / f"{5:020d}.vcseg"
    os.mkfifo(pipe)
    playback, answer = Playback(Store(tmp_path, Retention()), catalogue), list[Moment | None]()
    asking = threading.Thread(target=lambda: answer.append(playback.at("camera", 3 * 10**9)), daemon=True)
    asking.start()
    asking.join(20)
    assert [moment and moment.capture_time_ns for moment in answer] == [3 * 10**9]
