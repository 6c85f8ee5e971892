"""Cameras on bad networks, each with a fault of its own: whether frames flow again by themselves, and what is said.

Each camera is a ``veilcam-encode`` that reaches one ``veilcam-decode`` through a ``Proxy``, or, where the system allows
it, out of a network namespace that ``tc`` makes bad. All run at the same time, each watched by one viewer who is near
the server.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from benchmarks.processes import ProcessError, Service, end, serving, usage
from benchmarks.proxy import Proxy
from benchmarks.tables import table
from benchmarks.viewer import LATELY, PATIENCE_S, viewing

_SMALL, _LARGE = "pattern:64x48@10", "pattern:320x240@15 --ratio 0.25"
"""What a narrow way carries is a fraction of the large one."""
_LATENCY_TIMES, _LATENCY_MS, _RATE = 3.0, 200.0, 0.5
"""Latency is back when it is no more than so many times what it was, or this more; the rate, at this share of it."""
_MEMORY_MB, _THREADS, _FILES = 64, 8, 8
"""What a process may hold more of at the end than at the start."""


@dataclass(frozen=True)
class Fault:
    """What happens to a network.

    Attributes:
        begin, end: do it to a camera's way, and undo it.
        seconds: how long it lasts.
        source: of the camera, and options.
        breaks: whether the connection breaks: then one line says so, and one that frames flow again.
        narrow: whether frames must be left out before they wait; how many depends on how busy the machine is.
    """

    begin: "Callable[[Way], None]"
    end: "Callable[[Way], None]"
    seconds: float
    source: str = _SMALL
    breaks: bool = False
    narrow: bool = False


@dataclass(frozen=True)
class Way:
    """Between one camera and the server.

    Attributes:
        proxy: that it goes through.
        namespace: of the network that the camera is in, with its device; None for this machine's own.
    """

    proxy: Proxy
    namespace: str | None = None

    def shape(self, *discipline: str) -> None:
        """Have ``tc`` make the camera's network bad; as it was, if nothing is given."""
        assert self.namespace is not None
        what = ["replace", "dev", _INSIDE, "root", *discipline] if discipline else ["del", "dev", _INSIDE, "root"]
        _run("ip", "netns", "exec", self.namespace, "tc", "qdisc", *what)


_INSIDE = "camera"
"""The device in a camera's namespace."""


def _set(**values: float) -> "Callable[[Way], None]":
    def to(way: Way) -> None:
        for name, value in values.items():
            setattr(way.proxy, name, value)

    return to


def _cut(seconds: float, breaks: bool = False) -> Fault:
    return Fault(lambda way: way.proxy.cut(), lambda way: way.proxy.mend(), seconds, breaks=breaks)


def _shaped(discipline: str, source: str = _SMALL, narrow: bool = False) -> Fault:
    return Fault(lambda way: way.shape(*discipline.split()), lambda way: way.shape(), 15, source, narrow=narrow)


FAULTS: dict[str, Fault] = {
    "delay of 200 ms": Fault(_set(delay_s=0.2), _set(delay_s=0), 8),
    "stalls, 5 % of packets": Fault(_set(loss=0.05), _set(loss=0), 8),
    "256 kbit/s": Fault(_set(bits_per_s=256_000), _set(bits_per_s=0), 15, _LARGE, narrow=True),
    "cut for 1 s": _cut(1),
    "cut for 10 s": _cut(10),
    "reset in mid-message": Fault(lambda way: way.proxy.reset(), lambda _: None, 0, breaks=True),
    "half-open": Fault(lambda way: way.proxy.vanish(), lambda _: None, 0, breaks=True),
    "black hole": Fault(
        lambda way: way.proxy.black_hole(True), lambda way: way.proxy.black_hole(False), 8, breaks=True
    ),
}
"""What a proxy can do."""
LONG_FAULTS = {"cut for 60 s": _cut(60, breaks=True)}
SHAPED_FAULTS = {
    "tbf 256 kbit/s": _shaped("tbf rate 256kbit burst 4kb latency 400ms", source=_LARGE, narrow=True),
    "netem delay 200 ms": _shaped("netem delay 200ms"),
    "netem loss 5 %": _shaped("netem loss 5%"),
}
"""What ``tc`` can do, where the kernel has it."""
ALL = FAULTS | LONG_FAULTS | SHAPED_FAULTS


def measure(faults: Mapping[str, Fault], told: Callable[[str], None]) -> dict[str, Any]:
    """All faults at the same time, each to a camera of its own.

    Args:
        faults: of this module, by name.
        told: is told of each as it is over.

    Returns:
        ``rows``, one a fault, where ``during`` is empty if nothing came meanwhile; ``server``, what it held when all
        were sound, before and after; ``problems``, one line each, empty if all went as it should.

    Raises:
        ProcessError: the service or a camera didn't start.
    """
    with serving("onnxruntime") as service, ThreadPoolExecutor(len(faults)) as pool:
        started, over = threading.Barrier(len(faults) + 1), threading.Barrier(len(faults) + 1)

        def one(number: int, name: str) -> dict[str, Any]:
            try:
                row = _one(service, f"camera{number}", name, faults[name], started, over)
            except BaseException:
                started.abort()
                over.abort()
                raise
            told(name)
            return row

        rows = [pool.submit(one, number, name) for number, name in enumerate(faults)]
        held = []
        with contextlib.suppress(threading.BrokenBarrierError):  # one of them says why, below
            for barrier in (started, over):
                barrier.wait()
                held.append(service.usage())
                barrier.wait()
        failures = (row.exception() for row in rows)
        for failure in failures:
            if failure is not None and not isinstance(failure, threading.BrokenBarrierError):  # these only waited
                raise failure
        done = [row.result() for row in rows]
    problems = [f"{row['fault']}: {problem}" for row in done for problem in row.pop("problems")]
    problems += [f"the server holds {more}" for more in _grown(*held)]
    return {"rows": done, "server": held, "problems": problems}


def printed(result: dict[str, Any]) -> Iterator[Table]:
    """A row for each fault."""
    columns = ("fault", "flows again, s", "as before, s", "ms before", "ms after", "fps before", "fps after", "said")
    rows = (
        [row["fault"], row["flows_again_s"], row["as_before_s"]]
        + [row[when][name] for name in ("latency_ms", "fps") for when in ("before", "after")]
        + [len(row["said"])]
        for row in result["rows"]
    )
    yield table("cameras on bad networks", columns, rows, result["machine"])


def _one(
    service: Service, camera: str, name: str, fault: Fault, started: threading.Barrier, over: threading.Barrier
) -> dict[str, Any]:
    with ExitStack() as stack:
        way = stack.enter_context(_way(service.address, camera, shaped=name in SHAPED_FAULTS))
        filming = stack.enter_context(_filming(camera, fault.source, way))
        viewer = stack.enter_context(viewing(service.address, camera))
        viewer.expect(lambda came: len(came) >= 2 * LATELY, "it isn't seen from the start")
        _twice(started)
        before, lines_before = viewer.lately(), len(filming.lines)
        held = usage(filming.process.pid)
        began_ns = time.time_ns()
        fault.begin(way)
        time.sleep(fault.seconds)
        during = viewer.lately(began_ns)
        fault.end(way)
        ended, ended_ns = time.monotonic(), time.time_ns()
        flows = viewer.wait(lambda came: came[-1].captured_ns > ended_ns)
        flowed_s = time.monotonic() - ended
        sound = flows and viewer.wait(lambda _: _is_back(viewer.lately(), before))
        after, sound_s = viewer.lately(), time.monotonic() - ended
        problems = [] if flows else ["frames don't flow again"]
        if flows and not sound:
            problems.append(f"latency and rate don't come back: {before} before, {after} after")
        problems += [f"the camera holds {more}" for more in _grown(held, usage(filming.process.pid))]
        _twice(over)
        problems += viewer.disorder()
        lines, summary = filming.lines[lines_before:], filming.stop()
        problems += _misreported(fault, lines, summary)
    return {
        "fault": name,
        "flows_again_s": round(flowed_s, 1) if flows else None,
        "as_before_s": round(sound_s, 1) if sound else None,
        "before": before,
        "during": during,
        "after": after,
        "said": [line["message"] for line in lines],
        "summary": summary,
        "problems": problems,
    }


def _is_back(now: dict[str, float], before: dict[str, float]) -> bool:
    most = max(_LATENCY_TIMES * before["latency_ms"], before["latency_ms"] + _LATENCY_MS)
    return now["latency_ms"] <= most and now["fps"] >= _RATE * before["fps"]


def _grown(before: Mapping[str, int], after: Mapping[str, int]) -> Iterator[str]:
    for name, more in (("memory_mb", _MEMORY_MB), ("threads", _THREADS), ("open_files", _FILES)):
        if after[name] > before[name] + more:
            yield f"{after[name]} {name} at the end, {before[name]} at the start"


def _misreported(fault: Fault, lines: list[dict[str, str]], summary: str) -> Iterator[str]:
    """Of what breaks, one line, and one when it is over; of a narrow way, that frames were left out before they waited.

    Where the server is slower than the way, no line says that the way is full.
    """
    warned = [line["message"] for line in lines if line["levelname"] != "INFO"]
    again = [line["message"] for line in lines if "frames flow again" in line["message"]]
    if fault.breaks and (len(warned) != 1 or len(again) != 1):
        yield f"expected one line that it is away and one that it is back: {[*warned, *again]}"
    if len(warned) > 1:
        yield f"expected one line: {warned}"
    if fault.narrow and not re.search(r"\d+ rate lowered", summary):
        yield f"the camera left out no frame before it waited: {summary}"


class _Filming:
    """A camera, and what it says."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.lines: list[dict[str, str]] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def stop(self) -> str:
        """End it as a user does: its last line."""
        self.process.send_signal(signal.SIGINT)
        self._thread.join(PATIENCE_S)
        return self.lines[-1]["message"] if self.lines else ""

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            said = json.loads(line)
            if not _STATUS.search(said["message"]):
                self.lines.append(said)


_STATUS = re.compile(r" fps · |^server away since ")
"""The line that comes every few seconds, whatever happens."""


@contextmanager
def _filming(camera: str, source: str, way: Way) -> Iterator[_Filming]:
    inside = ["ip", "netns", "exec", way.namespace] if way.namespace else []
    command = [*inside, sys.executable, "-m", "encoder", *source.split(), "--server", way.proxy.address]
    with subprocess.Popen([*command, "--name", camera, "--log-json"], stderr=subprocess.PIPE, text=True) as process:
        try:
            yield _Filming(process)
        finally:
            end(process)


@contextmanager
def _way(server: str, camera: str, shaped: bool) -> Iterator[Way]:
    if not shaped:
        with Proxy(server) as proxy:
            yield Way(proxy)
        return
    name = f"veilcam-{os.getpid()}-{camera}"
    device, subnet = f"vc{os.getpid() % 65536:04x}{camera[-2:]}", f"10.213.{int(camera.removeprefix('camera'))}"
    _run("ip", "netns", "add", name)
    try:
        _run("ip", "link", "add", device, "type", "veth", "peer", "name", _INSIDE, "netns", name)
        _run("ip", "address", "add", f"{subnet}.1/30", "dev", device)
        _run("ip", "link", "set", device, "up")
        _run("ip", "-n", name, "address", "add", f"{subnet}.2/30", "dev", _INSIDE)
        _run("ip", "-n", name, "link", "set", _INSIDE, "up")
        with Proxy(server, f"{subnet}.1") as proxy:
            yield Way(proxy, name)
    finally:
        _run("ip", "netns", "delete", name)


def why_not_shaped(fault: str) -> str:
    """Why ``tc`` can't do one of ``SHAPED_FAULTS`` on this machine; empty if it can."""
    if shutil.which("tc") is None or shutil.which("ip") is None:
        return "no tc (Debian's iproute2)"
    name = f"veilcam-{os.getpid()}-try"
    try:
        _run("ip", "netns", "add", name)
    except ProcessError as error:
        return f"no network namespaces for this user ({error})"
    try:
        _run("ip", "-n", name, "link", "add", _INSIDE, "type", "veth", "peer", "name", "other")
        with Proxy("127.0.0.1:1") as proxy:
            SHAPED_FAULTS[fault].begin(Way(proxy, name))
    except ProcessError as error:
        return str(error)
    finally:
        _run("ip", "netns", "delete", name)
    return ""


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ProcessError(f"{' '.join(command[:4])} …: {(done.stderr or done.stdout).strip()}")


def _twice(barrier: threading.Barrier) -> None:
    """Until all are here, and then until what all hold was looked at."""
    barrier.wait()
    barrier.wait()
