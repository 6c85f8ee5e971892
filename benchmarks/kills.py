"""A camera and a server that records are killed at random, again and again; then every frame is accounted for.

Each ``veilcam-encode`` and each ``veilcam-decode`` ends by SIGKILL at a random moment and is started again at once,
with the same name, port and folder. A frame is known by the run of the camera that its capture time falls into, and by
its number in that run. At the end each number up to the highest seen of its run is recorded, or still in the camera's
spool, or among those that the camera said it dropped; what is none of these is lost. Drops are told as counts, not as
numbers: a camera that counts a frame as lost on the way that was recorded after all hides one that was lost.
"""

import contextlib
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import headline
from benchmarks.processes import Service, end, free_port, serving
from benchmarks.viewer import PATIENCE_S, Viewer, viewing
from protos.segment import SUFFIX, Segment

CAMERA = "camera"
SOURCE = "pattern:64x48@10"
_LIVES_S = (0.2, 3.0)
"""How long nothing is killed once pictures are shown: between these, by chance."""
_CALM_S = 5.0
"""After the last kill: for what the camera still holds to arrive."""
_OUTAGE = re.compile(r"frames not sent meanwhile: (\d+), lost on the way: (\d+)")
_DROPPED = re.compile(r"dropped here:? (\d+)")
_SUMMARY = re.compile(r"dropped here: ([^;]*);")
_REASON = re.compile(r"(\d+) ([a-z ]+)")


@dataclass
class Run:
    """One run of the camera.

    Attributes:
        began_ns, ended_ns: by the clock.
        told: frames that it said it dropped or lost, by reason; as much as it had said when it was killed.
    """

    began_ns: int
    ended_ns: int = 2**63 - 1
    told: Counter[str] = field(default_factory=Counter)

    def note(self, message: str) -> None:
        """A line that it said."""
        if found := _OUTAGE.search(message):
            self.told += Counter({"server away": int(found[1]), "lost on the way": int(found[2])})
        elif message.startswith("server away"):
            pass  # said in full once it is back
        elif found := _SUMMARY.search(message):
            reasons = {reason: int(number) for number, reason in _REASON.findall(found[1])}
            self.told = Counter(reasons)
        elif found := _DROPPED.search(message):
            self.told["not said why"] = int(found[1]) - (self.told.total() - self.told["not said why"])


@dataclass(frozen=True)
class Frames:
    """Frames in a folder of segments, in the order in which they lie there: capture time and number."""

    found: list[list[tuple[int, int]]]

    @classmethod
    def of(cls, folder: Path) -> "Frames":
        """Of all segments, by their names."""
        paths = sorted(folder.rglob(f"*{SUFFIX}"), key=lambda path: path.name)
        return cls([[(frame.capture_time_ns, frame.sequence) for frame, _ in Segment(path).frames()] for path in paths])

    def during(self, run: Run) -> list[list[int]]:
        """Numbers of those captured in a run, segment by segment."""
        parts = ([n for at, n in part if run.began_ns <= at < run.ended_ns] for part in self.found)
        return [part for part in parts if part]


def measure(times: int, seed: int, told: Callable[[str], None]) -> dict[str, Any]:
    """Kill so many times, and account.

    Args:
        times: camera and server together.
        seed: of who is killed, and when.
        told: is told now and then how far it is.

    Returns:
        ``lost``, ``duplicated``, ``out_of_order``: frames; ``recorded``, ``spooled`` and ``dropped``, by reason;
        ``first_picture_s``, from a server's restart; ``problems``, one line each.

    Raises:
        ProcessError: a service or a camera didn't start.
    """
    draw = random.Random(seed)  # noqa: S311 - the same kills for the same seed
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        recordings, spool = folder / "recordings", folder / "spool"
        with ExitStack() as stack:
            server = _Server(recordings)
            stack.callback(server.end)
            camera = _Camera(server.address, spool)
            stack.callback(camera.end)
            viewer = stack.enter_context(viewing(server.address, CAMERA))
            kills, took = _kill(times, draw, server, camera, viewer, told)
            time.sleep(_CALM_S)
            camera.end()
            server.end()
        account = _account(camera.runs, Frames.of(recordings), Frames.of(spool))
    wrong = ("lost", "duplicated", "out_of_order")
    first = [round(each, 1) for each in took]
    return {
        "source": SOURCE,
        "seed": seed,
        "kills": kills,
        "runs": len(camera.runs),
        **account,
        "first_picture_s": {"median": median(first), "worst": max(first), "each": first} if first else None,
        "problems": [f"{name.replace('_', ' ')}: {account[name]} frames" for name in wrong if account[name]],
    }


def printed(result: dict[str, Any]) -> Iterator[str]:
    """How often who was killed, and what became of the frames."""
    kills, took = result["kills"], result["first_picture_s"]
    dropped = ", ".join(f"{number} {reason}" for reason, number in result["dropped"].items()) or "none"
    yield headline(result["machine"])
    yield f"killed: the camera {kills['camera']} times, the server {kills['server']} times"
    yield f"recorded {result['recorded']}, still spooled {result['spooled']}, dropped by the camera: {dropped}"
    yield f"lost {result['lost']}, duplicated {result['duplicated']}, out of order {result['out_of_order']}"
    if took:
        yield f"first picture after a server's start: median {took['median']} s, worst {took['worst']} s"


def _kill(
    times: int, draw: random.Random, server: "_Server", camera: "_Camera", viewer: Viewer, told: Callable[[str], None]
) -> tuple[dict[str, int], list[float]]:
    """How often who was killed, and what it took until a picture that was captured after a server's restart."""
    kills, took = {"camera": 0, "server": 0}, []
    _wait_for_picture(viewer, time.time_ns())
    for number in range(times):
        time.sleep(draw.uniform(*_LIVES_S))
        who = draw.choice(sorted(kills))
        kills[who] += 1
        victim = server if who == "server" else camera
        victim.kill()
        began, began_ns = time.monotonic(), time.time_ns()
        victim.start()
        # Half of the time, the next kill comes while this one is still being got over.
        if draw.random() < 0.5 or number == times - 1:
            _wait_for_picture(viewer, began_ns)
            if who == "server":
                took.append(time.monotonic() - began)
        if number % 20 == 19:
            told(f"{number + 1} of {times} kills")
    return kills, took


def _wait_for_picture(viewer: Viewer, after_ns: int) -> None:
    viewer.expect(lambda seen: seen[-1].captured_ns > after_ns, "no picture came any more")


def _account(runs: Iterable[Run], recorded: Frames, spooled: Frames) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    by_run = []
    for run in runs:
        parts = recorded.during(run)
        numbers = Counter(number for part in parts for number in part)
        waiting = {number for part in spooled.during(run) for number in part} - set(numbers)
        highest = max([*numbers, *waiting], default=0)
        missing = highest - len(numbers) - len(waiting)
        row = {
            "recorded": len(numbers),
            "spooled": len(waiting),
            "lost": max(0, missing - run.told.total()),
            "duplicated": numbers.total() - len(numbers),
            "out_of_order": sum(b < a for a, b in pairwise(number for part in parts for number in part)),
        }
        counts.update(row)
        # What it dropped after the last frame that is anywhere has no number here to be missing.
        dropped += run.told if missing else Counter()
        by_run.append(row | {"highest": highest, "missing": missing, "told": dict(run.told)})
    names = ("recorded", "spooled", "lost", "duplicated", "out_of_order")
    return {name: counts[name] for name in names} | {"dropped": dict(dropped), "by_run": by_run}


class _Server:
    """A decoder service that records, on one port, whatever happens to it."""

    def __init__(self, recordings: Path) -> None:
        self._port = free_port()
        self._options = ("--port", str(self._port), "--record", str(recordings), "--record-free", "0")
        self.address = f"127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        self._stack = ExitStack()
        self._service: Service = self._stack.enter_context(serving("onnxruntime", *self._options))

    def kill(self) -> None:
        self._service.process.kill()
        self._service.process.wait()
        self._stack.close()

    def end(self) -> None:
        self._stack.close()


class _Camera:
    """A camera, run after run, and what each said."""

    def __init__(self, address: str, spool: Path) -> None:
        self._command = [sys.executable, "-m", "encoder", SOURCE, "--server", address, "--name", CAMERA, "--log-json"]
        self._command += ["--spool", str(spool)]
        self.runs: list[Run] = []
        self.start()

    def start(self) -> None:
        self.runs.append(Run(time.time_ns()))
        self._process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True)
        self._reading = threading.Thread(target=self._read, args=(self.runs[-1],), daemon=True)
        self._reading.start()

    def kill(self) -> None:
        self._process.kill()
        self._over()

    def end(self) -> None:
        if self._process.poll() is None:
            end(self._process)
            self._over()

    def _over(self) -> None:
        self._process.wait()
        self._reading.join(PATIENCE_S)
        self.runs[-1].ended_ns = time.time_ns()

    def _read(self, run: Run) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            with contextlib.suppress(ValueError):  # a line that was being written when it was killed
                run.note(json.loads(line)["message"])
