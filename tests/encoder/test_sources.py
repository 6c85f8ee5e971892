import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.draw_clip import CLIP
from encoder.sources import SOURCES, Frame, Source, SourceError, masked, open_source, scheme_of
from encoder.sources.capture import Capture, live_frames

FRAMES = 12


def write_pictures(folder: Path) -> str:
    for index in range(FRAMES):
        picture = np.full((48, 64, 3), 10 * index, np.uint8)
        picture[:, :, 2] = 200
        cv2.imwrite(str(folder / f"{index:03d}.png"), picture)
    return str(folder)


def write_video(folder: Path) -> str:
    path = folder / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 20, (64, 48))
    for index in range(FRAMES):
        writer.write(np.full((48, 64, 3), 10 * index, np.uint8))
    writer.release()
    return str(path)


def drawn(folder: Path) -> str:
    return f"pattern:64x48@20#{FRAMES}"


FINITE = pytest.mark.parametrize("write", [write_pictures, write_video, drawn])


@FINITE
def test_every_frame_comes_once_in_order_with_its_time(write: Callable[[Path], str], tmp_path: Path) -> None:
    source = open_source(write(tmp_path), paced=False)
    before = time.time_ns()
    frames = list(source.frames())
    source.close()
    assert len(frames) == FRAMES
    assert all(frame.luma.shape == (48, 64) and frame.luma.dtype == np.uint8 for frame in frames)
    times = [frame.capture_time_ns for frame in frames]
    assert before <= times[0]
    assert times == sorted(times)
    assert times[-1] <= time.time_ns()
    assert all(frame.capture_ms > 0 for frame in frames)
    assert not np.array_equal(frames[0].luma, frames[-1].luma)


@FINITE
def test_paced_frames_are_captured_at_the_rate_that_is_told(write: Callable[[Path], str], tmp_path: Path) -> None:
    source: Source = open_source(write(tmp_path), paced=True)
    times = [frame.capture_time_ns for frame in source.frames()]
    # Never faster than the rate: on a busy machine only slower.
    assert (times[-1] - times[0]) / 1e9 >= (FRAMES - 1) / source.frame_rate - 0.05


def test_luma_is_that_of_the_picture_and_colour_is_told(tmp_path: Path) -> None:
    colour, gray = tmp_path / "colour", tmp_path / "gray"
    for folder, pixel in ((colour, (0, 0, 255)), (gray, (90, 90, 90))):
        folder.mkdir()
        cv2.imwrite(str(folder / "a.png"), np.full((20, 20, 3), pixel, np.uint8))
    red, grey = (next(open_source(str(folder)).frames()) for folder in (colour, gray))
    assert (red.colour, int(red.luma[0, 0])) == (True, 76)
    assert (grey.colour, int(grey.luma[0, 0])) == (False, 90)


def test_the_shipped_clip_is_whole_and_moves() -> None:
    source = open_source(str(CLIP), paced=False)
    frames = list(source.frames())
    assert len(frames) / source.frame_rate > 5
    assert CLIP.stat().st_size < 2_000_000
    assert all(not np.array_equal(a.luma, b.luma) for a, b in pairwise(frames[:20]))


def test_rtsp(rtsp_url: str) -> None:
    source = open_source(rtsp_url)
    frames: list[Frame] = []
    for frame in source.frames():
        frames.append(frame)
        if len(frames) == 5:
            break
    source.close()
    assert all(frame.luma.shape == (240, 320) for frame in frames)
    assert not np.array_equal(frames[0].luma, frames[-1].luma)


OWN = ("/dev/stdin", "/dev/fd/0", "//dev/../dev/fd/63", "/proc/self/fd/0", "/proc/thread-self/fd/0")


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("absent.mp4", "absent.mp4: no such video file or folder"),
        ("gopher://host/x", "gopher://host/x: unknown scheme gopher://, expected one of device, pipe, folder"),
        ("rtsp://user:secret@127.0.0.1:9/x", r"rtsp://user:\*\*\*@127.0.0.1:9/x: nothing there gives video"),
        ("http:///x", "no host"),
        ("/dev/video77", "/dev/video77: no such camera"),
        ("/dev/null", "/dev/null: opens, but isn't a camera"),
        ("pattern:1x1", "sides of 16 to"),
        ("pattern:64x64@0", "a rate above 0"),
        ("pattern:wide", "expected pattern"),
        *((spec, f"{spec}: only this process could open it.*; give a named pipe: mkfifo") for spec in OWN),
    ],
)
def test_a_source_that_cannot_be_opened_says_why(spec: str, problem: str) -> None:
    with pytest.raises(SourceError, match=problem):
        open_source(spec)


def test_a_network_camera_leaves_no_options_that_lose_a_frame_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nothing there gives video"):
        open_source("rtsp://127.0.0.1:9/x")
    assert len(list(open_source(write_video(tmp_path), paced=False).frames())) == FRAMES


def test_files_that_are_no_video_and_folders_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no pictures in this folder"):
        open_source(str(tmp_path))
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(SourceError, match="not a video file"):
        open_source(str(tmp_path / "text.mp4"))
    (tmp_path / "broken.png").write_text("not a picture")
    with pytest.raises(SourceError, match=r"broken\.png: not a picture"):
        list(open_source(str(tmp_path)).frames())


@pytest.mark.parametrize(
    ("spec", "scheme"),
    [
        ("0", "device"),
        ("/dev/video1", "device"),
        ("RTSP://host/path", "rtsp"),
        ("https://host/x.mjpeg", "https"),
        ("pattern", "pattern"),
        ("pattern:64x64", "pattern"),
        ("pattern#100", "pattern"),
        ("patterns.mp4", "file"),
        ("/dev/null", "device"),
        ("/dev/shm/clip.mp4", "file"),
        ("clip.mp4", "file"),
        (".", "folder"),
        ("²", "file"),
    ],
)
def test_the_scheme_of_what_a_user_writes(spec: str, scheme: str) -> None:
    assert scheme_of(spec) == scheme
    assert scheme in SOURCES


@given(st.text(max_size=60) | st.text(max_size=30).map("rtsp://".__add__))
def test_masking_never_fails_and_leaves_what_has_no_password(spec: str) -> None:
    assert isinstance(masked(spec), str)
    if "://" not in spec:
        assert masked(spec) == spec


@given(st.text(st.characters(blacklist_categories=["Cs"]), min_size=6, max_size=12))
def test_a_password_is_masked_whatever_is_in_it(password: str) -> None:
    assert masked(f"rtsp://me:{password}@camera.example:554/live") == "rtsp://me:***@camera.example:554/live"


def test_values_of_a_query_are_masked() -> None:
    assert masked("http://camera/video?user=me&pwd=secret") == "http://camera/video?user=***&pwd=***"
    assert masked("http://camera/video") == "http://camera/video"


def test_paths_that_cannot_be_looked_at_are_told() -> None:
    for spec in ("x" * 5000, "a\0b"):
        with pytest.raises(SourceError, match="can't be read"):
            open_source(spec)
    with pytest.raises(SourceError, match="no host in this URL"):
        open_source("rtsp://[::1/x")


def test_damaged_frames_are_passed_over_and_too_many_end_the_source() -> None:
    class Camera:
        """The third and fourth frame can't be decoded; after the tenth none can."""

        count = 0

        def grab(self) -> bool:
            self.count += 1
            return True

        def retrieve(self) -> tuple[bool, object]:
            sound = self.count <= 10 and self.count not in (3, 4)
            return sound, np.full((16, 16, 3), self.count, np.uint8)

    capture = Capture.__new__(Capture)
    capture._name, capture._damaged, capture._colour = "camera", 0, False
    capture._capture = Camera()  # type: ignore[assignment]
    seen: list[int] = []
    with pytest.raises(SourceError, match="camera: 51 frames in a row can't be decoded"):
        seen.extend(int(frame.luma[0, 0]) for frame in live_frames(capture))
    frames = live_frames(capture)
    capture._damaged, capture._capture = 0, Camera()  # type: ignore[assignment]
    assert [int(next(frames).luma[0, 0]) for _ in range(8)] == [1, 2, 5, 6, 7, 8, 9, 10]
