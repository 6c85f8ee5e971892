"""What a service does while things go wrong around it, and what one camera that nothing is wrong with notices of it.

One ``veilcam-decode``, one ``veilcam-encode`` and one viewer, each a process, run all along; the rest plays what goes
wrong, phase by phase. The engine is onnxruntime, since one phase has a reconstructor that fails in it on purpose.
"""

import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks import failing
from benchmarks.damage import KINDS, damaged
from benchmarks.faults_peers import (
    CALM,
    HEIGHT,
    PATIENCE_S,
    RATE,
    UNREAD,
    WIDTH,
    Frames,
    Line,
    Told,
    Viewer,
    filmed,
    stalled,
    viewing,
)
from benchmarks.processes import AS_FAST_AS_IT_CAN, Service, end, filming, serving
from benchmarks.tables import table
from decoder.catalogue import SHIPPED
from encoder.packing import Packer
from encoder.sources import Frame
from protos.v1 import veilcam_pb2 as pb

_SETTLE_S = 3.0
_LET_GO_S = 60.0
"""A viewer that is still served for longer, though it doesn't read, is never let go."""
_FAILURES = 40


def measure(damages: int, connects: int, seconds: float, seed: int, told: Callable[[str], None]) -> dict[str, Any]:
    """All phases.

    Args:
        damages: damaged messages.
        connects: connections that come and go.
        seconds: of each phase that lasts by the clock.
        seed: of what is damaged, and how.
        told: is told of each phase as it begins.

    Returns:
        ``rows``, one a phase; ``damage``, answers by what was damaged; ``stop``, how the service ended;
        ``problems``, one line each, empty if all went as it should.

    Raises:
        ProcessError: the service or the camera didn't start.
    """
    with ExitStack() as stack:
        model = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "failing.onnx"
        failing.write(model)
        given = [option for path in (SHIPPED, model) for option in ("--reconstructor", str(path))]
        service = stack.enter_context(serving("onnxruntime", *AS_FAST_AS_IT_CAN, *given))
        stack.enter_context(filming(CALM, f"pattern:{WIDTH}x{HEIGHT}@{RATE}", service.address))
        service.wait_for_cameras([CALM])
        viewer = stack.enter_context(viewing(service.address))
        time.sleep(_SETTLE_S)
        result: dict[str, Any] = {"size": [WIDTH, HEIGHT], "frame_rate": RATE, "damaged": damages, "connects": connects}
        result |= {"seconds": seconds, "seed": seed}
        result |= _phases(service, viewer, damages, connects, seconds, random.Random(seed), told)  # noqa: S311
        if service.process.poll() is None:
            told("stop, with viewers that don't read")
            with stalled(service):
                began = time.monotonic()
                result["stop"] = {"code": end(service.process), "seconds": round(time.monotonic() - began, 1)}
            if result["stop"]["code"]:
                result["problems"].append(f"stop: the service ended with {result['stop']['code']}")
        return result


def printed(result: dict[str, Any]) -> Iterator[Table | str]:
    """What the calm camera and the service noticed, what the others were answered, and how the service stopped."""
    held = ("memory_mb", "most_memory_mb", "threads", "open_files")
    rows = (
        [row["phase"], row["fps"], row["longest_gap_ms"], row["latency_ms"]["median"], row["latency_ms"]["p99"]]
        + [row.get(name) for name in held]
        for row in result["rows"]
    )
    columns = ("meanwhile", "fps", "gap, ms", "median", "p99", "MiB", "most", "threads", "files")
    title = f"a camera of {WIDTH}×{HEIGHT} at {RATE} frames/s, and the service"
    yield table(title, columns, rows, result["machine"])
    for row in result["rows"]:
        answers = "; ".join(f"{number} {answer}" for answer, number in row["answers"].items())
        if answers:
            yield f"{row['phase']}: {answers}; {row['endless']} waits without end"
    if "stop" in result:
        yield f"stopped within {result['stop']['seconds']} s, exit code {result['stop']['code']}"


def _phases(
    service: Service,
    viewer: Viewer,
    damages: int,
    connects: int,
    seconds: float,
    draw: random.Random,
    told: Callable[[str], None],
) -> dict[str, Any]:
    frames = Frames()
    phases: dict[str, Callable[[Told], None]] = {
        "quiet": lambda _: time.sleep(seconds),
        "another camera, sound": lambda came: _sound(service, frames, seconds, came),
        "another camera, damaged": lambda came: _damage(service, Frames(), damages, draw, came),
        "cameras and viewers come and go": lambda came: _come_and_go(service, frames, connects, came),
        "an engine that raises": lambda came: _engine_raises(service, came),
        "viewers that don't read": lambda came: _unread(service, seconds, came),
        "quiet again": lambda _: time.sleep(seconds),
    }
    rows, problems = [], []
    damage: dict[str, dict[str, int]] = {}
    for name, phase in phases.items():
        told(name)
        service.forget_peak()
        came, began_ns = Told(), time.time_ns()
        try:
            phase(came)
        except OSError as error:
            came.problems.append(f"the service's page doesn't answer ({error})")
        died = service.process.poll()
        row = {"phase": name} | viewer.noted(began_ns, time.time_ns())
        row |= service.usage() if died is None else {}
        rows.append(row | {"answers": dict(came.answers.most_common()), "endless": came.endless})
        rows[-1]["errors"] = service.errors()
        damage |= {kind: dict(answers.most_common()) for kind, answers in came.by_damage.items()}
        problems += [f"{name}: {problem}" for problem in came.problems]
        if came.endless:
            problems.append(f"{name}: {came.endless} waits without end")
        if died is not None:
            problems.append(f"{name}: the service died, exit code {died}")
            break
        if viewer.let_go:
            problems.append(f"{name}: the viewer of the calm camera was let go ({viewer.let_go})")
            break
    return {"rows": rows, "damage": damage, "problems": problems}


def _sound(service: Service, frames: Frames, seconds: float, came: Told) -> None:
    """A camera that sends as fast as its pictures are shown: what it costs the other that there is one at all."""
    with filmed(service, "other", came) as line:
        over = time.monotonic() + seconds
        while time.monotonic() < over:
            came.answers[line.exchange(frames.next())] += 1


def _damage(service: Service, frames: Frames, damages: int, draw: random.Random, came: Told) -> None:
    """That camera again, and of three of its messages one is damaged.

    Args:
        frames: its own from the first on, so that one seed damages the same messages in every run.
    """
    with filmed(service, "other", came) as line:
        for number in range(damages):
            kind = list(KINDS)[number % len(KINDS)]
            before, hurt, after = frames.next(), frames.next(key=draw.random() < 0.5), frames.next()
            answer = line.exchange(before, after, between=damaged(hurt, kind, draw))
            came.answers[answer] += 1
            came.by_damage.setdefault(kind, Counter())[answer] += 1
        if _shown_again(line, frames.next) != "shown":
            came.problems.append("sound frames of the damaged camera are no longer shown")


def _come_and_go(service: Service, frames: Frames, connects: int, came: Told) -> None:
    """A connection each, with a camera that is watched; every other is cut in the middle of its stream."""
    for number in range(connects):
        with filmed(service, f"passing{number}", came) as line:
            shown = _shown_again(line, frames.next)
            left = line.cut() if number % 2 else line.close()
            came.answers[f"{shown}, {left}"] += 1
    over = time.monotonic() + PATIENCE_S
    while (held := _held(service)) and time.monotonic() < over:
        time.sleep(0.1)
    if held:
        came.problems.append(f"{held} viewers who have left are still counted")


def _engine_raises(service: Service, came: Told) -> None:
    """A camera whose reconstructor fails on every other of its frames, and every fourth time twice in a row."""
    operator = failing.operator()
    packer, sequence = Packer(operator, failing.ROWS / failing.BLOCK**2), count(1)

    def frame(level: int) -> pb.Frame:
        picture = np.full((HEIGHT, WIDTH), level, np.uint8)
        return packer.pack(Frame(picture, time.time_ns(), 0.0, False), next(sequence), key=True)[0]

    with filmed(service, "failing", came, operator.id) as line:
        for number in range(_FAILURES):
            for level in (100, 255, 255) if number % 4 == 3 else (100, 255):
                came.answers[line.exchange(frame(level))] += 1
        if _shown_again(line, lambda: frame(100)) != "shown":
            came.problems.append("frames that its engine can take are no longer shown")


def _unread(service: Service, seconds: float, came: Told) -> None:
    """Until the service has let them go, but not for ever."""
    most = 0
    with stalled(service) as stills:
        began = time.monotonic()
        while (held := _held(service, stills)) or time.monotonic() - began < seconds:
            most = max(most, held)
            if time.monotonic() - began > max(seconds, _LET_GO_S):
                break
            time.sleep(0.5)
    # Who asks for stills is counted twice now and then: as a viewer too, while one is made.
    came.answers["let go"] = min(most, 4 * UNREAD) - held
    came.endless += held


def _held(service: Service, stills: Sequence[int] = ()) -> int:
    """Viewers besides the one that reads: those that are counted as such, and those who asked for stills."""
    return int(service.counts()["veilcam_viewers"]) - 1 + service.connected(stills)


def _shown_again(line: Line, frame: Callable[[], pb.Frame]) -> str:
    """Of three frames, the last: the first may meet a stream that is over, or come before the viewer."""
    return [line.exchange(frame()) for _ in range(3)][-1]
