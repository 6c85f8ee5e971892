"""A service for a long time at speed, with much that is wrong around it: whether anything grows, and how late it shows.

One ``veilcam-decode`` that records onto a small file system that is always full, and three ``veilcam-encode``: one that
is sound, one whose viewer is slow, and one whose source hangs again and again. What they hold, and how late the sound
one is shown, is sampled every few seconds; the samples at the end are held against those at the start.
"""

import contextlib
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
from rich.table import Table

from benchmarks.processes import filming, serving, usage
from benchmarks.tables import table
from benchmarks.viewer import Viewer, viewing

WIDTH, HEIGHT, RATE = 320, 240, 15
SAMPLE_S = 5.0
BOUNDS = {
    "memory_mb": (1.1, 32.0),
    "threads": (1.0, 4.0),
    "open_files": (1.0, 8.0),
    "median": (1.5, 50.0),
    "p99": (2.0, 250.0),
}
"""What there may be at the end: so many times what there was at the start, and so much more. Latencies in ms."""
_WARM_UP_S = 10.0
"""At the start, when memory still fills; a third of what is shorter than three times that."""
_SHARE = 0.2
"""Of the samples, first and last, that are held against each other."""
_DISK_MB = 4
_SILENCE_S, _HANGS_S = 2.0, 6.0


def measure(minutes: float, told: Callable[[str], None]) -> dict[str, Any]:
    """So many minutes.

    Args:
        told: is told now and then how far it is.

    Returns:
        ``samples``; ``start`` and ``end``, medians of the first and the last; ``small_disk``, why there was none, or
        nothing; ``problems``, one line for each thing that grew beyond its bound, and for what didn't work; ``log``,
        what the server said.

    Raises:
        ProcessError: the service or a camera didn't start.
    """
    seconds = minutes * 60
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        disk, no_disk = stack.enter_context(_small_disk(folder / "disk"))
        if no_disk:
            told(f"recordings are limited, and no disk is full: {no_disk}")
        limit = ("--record-megabytes", str(_DISK_MB)) if no_disk else ()
        recording = ("--record", str(disk), "--record-free", "0", *limit)
        service = stack.enter_context(serving("onnxruntime", *recording))
        pattern = f"pattern:{WIDTH}x{HEIGHT}@{RATE}"
        stuck = stack.enter_context(_stuck_source(folder / "stuck"))
        cameras = {
            "sound": stack.enter_context(filming("sound", pattern, service.address)),
            "slowly watched": stack.enter_context(filming("slow", pattern, service.address)),
            "stuck": stack.enter_context(
                filming("stuck", str(stuck), service.address, "--silence-seconds", f"{_SILENCE_S:g}")
            ),
        }
        service.wait_for_cameras(["sound", "slow", "stuck"])
        viewer = stack.enter_context(viewing(service.address, "sound"))
        stack.enter_context(viewing(service.address, "slow", pause_s=1.0))
        stack.enter_context(viewing(service.address, "stuck"))
        viewer.expect(lambda _: True, "it isn't shown")
        time.sleep(min(_WARM_UP_S, seconds / 3))
        processes = {"server": service.process.pid} | {name: camera.pid for name, camera in cameras.items()}
        samples = list(_samples(seconds, processes, viewer, told))
        kept: dict[str, float] = {}
        with contextlib.suppress(OSError):  # it died: that is a problem of its own below
            kept = service.counts()
        log = service.said()
    start, end = (_medians(part) for part in _ends(samples))
    ended = [f"{name}: it ended on the way" for name in processes if name not in samples[-1]["held"]]
    problems = [*ended, *_grown(start, end), *viewer.disorder()]
    return {
        "size": [WIDTH, HEIGHT],
        "frame_rate": RATE,
        "minutes": minutes,
        "bounds": BOUNDS,
        "small_disk": no_disk,
        "start": start,
        "end": end,
        "counts": {name: value for name, value in kept.items() if "_total" in name},
        "problems": problems,
        "samples": samples,
        "log": log,
    }


def printed(result: dict[str, Any]) -> Iterator[Table]:
    """What there was at the start and at the end."""
    end = result["end"]
    rows = (
        [name, figure, f"{before:g}", f"{end[name][figure]:g}" if figure in end.get(name, {}) else None]
        for name, figures in result["start"].items()
        for figure, before in figures.items()
    )
    title = f"{result['minutes']:g} minutes, {WIDTH}×{HEIGHT} at {RATE} frames/s"
    yield table(title, ("what", "figure", "at the start", "at the end"), rows, result["machine"], words=2)


def _samples(
    seconds: float, processes: Mapping[str, int], viewer: Viewer, told: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    began, every = time.monotonic(), min(SAMPLE_S, seconds / 10)
    said = began
    for number in range(1, round(seconds / every) + 1):
        since_ns = time.time_ns()
        time.sleep(max(0.0, began + number * every - time.monotonic()))
        took = [(each.seen_ns - each.captured_ns) / 1e6 for each in list(viewer.seen) if each.seen_ns >= since_ns]
        held = {}
        for name, process in processes.items():
            with contextlib.suppress(OSError):  # it died: the sample lacks it
                held[name] = usage(process)
        latency = {name: round(float(np.percentile(took, q)), 1) for name, q in (("median", 50), ("p99", 99)) if took}
        yield {"at_s": round(time.monotonic() - began, 1), "pictures": len(took), "latency_ms": latency, "held": held}
        if time.monotonic() - said > 60:
            said = time.monotonic()
            told(f"{(said - began) / 60:.0f} of {seconds / 60:g} minutes")


def _ends(samples: Sequence[dict[str, Any]]) -> tuple[Sequence[dict[str, Any]], Sequence[dict[str, Any]]]:
    share = max(1, round(len(samples) * _SHARE))
    return samples[:share], samples[-share:]


def _medians(samples: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each process and of the latency, by figure; a process that was dead in all samples is missing."""
    names = {name for sample in samples for name in sample["held"]}
    rows = {name: [sample["held"][name] for sample in samples if name in sample["held"]] for name in sorted(names)}
    rows["latency_ms"] = [sample["latency_ms"] for sample in samples if sample["latency_ms"]]
    return {
        name: {figure: median(each[figure] for each in row) for figure in BOUNDS if figure in row[0]}
        for name, row in rows.items()
        if row
    }


def _grown(start: Mapping[str, Mapping[str, float]], end: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    for name, figures in start.items():
        if name not in end:
            yield f"{name}: there is none any more at the end"
            continue
        for figure, before in figures.items():
            times, more = BOUNDS[figure]
            if end[name][figure] > before * times + more:
                yield f"{name}: {figure} {end[name][figure]:g} at the end, {before:g} at the start"


@contextmanager
def _small_disk(place: Path) -> Iterator[tuple[Path, str]]:
    """A folder on a file system of its own that is soon full; or any folder, and why it isn't one."""
    place.mkdir()
    if os.geteuid() != 0:
        yield place, "only root can mount a small file system"
        return
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MB}m", "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        yield place, done.stderr.strip()
        return
    try:
        yield place, ""
    finally:
        unmount = ["umount", "--lazy", str(place)]
        subprocess.run(unmount, check=True)


@contextmanager
def _stuck_source(pipe: Path) -> Iterator[Path]:
    """A named pipe into which a film is written, part of it, and then nothing for a while, again and again."""
    film = pipe.with_suffix(".avi")
    writer = cv2.VideoWriter(str(film), cv2.VideoWriter.fourcc(*"MJPG"), RATE, (WIDTH, HEIGHT))
    for index in range(10 * RATE):
        writer.write(np.full((HEIGHT, WIDTH, 3), index % 250, np.uint8))
    writer.release()
    data, over = film.read_bytes(), threading.Event()
    os.mkfifo(pipe)

    def write() -> None:
        while not over.is_set():
            with pipe.open("wb", buffering=0) as opened, contextlib.suppress(BrokenPipeError):
                for start in range(0, len(data) // 2, 4096):
                    if over.wait(4096 / len(data) * 10):
                        return
                    opened.write(data[start : start + 4096])
                over.wait(_HANGS_S)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        yield pipe
    finally:
        over.set()
        with contextlib.suppress(OSError):  # who waits for a reader is let go
            os.close(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK))
        thread.join(_HANGS_S)
