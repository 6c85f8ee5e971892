"""A service under load: cameras in processes of their own, a viewer for each, and what a frame costs the server.

Everything is a process as a user would start it, on this machine: one ``veilcam-decode``, and a ``veilcam-encode`` for
each camera. Latency is from capture, by the same clock, until the viewer here has the JPEG.
"""

import asyncio
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from grpc import aio
from prometheus_client.parser import text_string_to_metric_families

from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import ViewersStub

_START_S, _END_S = 120.0, 30.0
_SETTLE_S = 3.0
"""Before anything counts: engines are warmed up, and how large batches pay is measured."""
_TICKS = os.sysconf("SC_CLK_TCK")


class ServeError(Exception):
    """A service or a camera that didn't start, or nothing was shown."""


def measure(cameras: int, size: str, frame_rate: float, seconds: float, viewers: int, engine: str) -> dict[str, Any]:
    """Run so many cameras for a while.

    Args:
        cameras: each draws a moving pattern of its own.
        size: WIDTHxHEIGHT.
        frame_rate: frames a second of each.
        seconds: that count.
        viewers: of each camera, over gRPC as JPEG; none leaves cameras unwatched.
        engine: as for ``veilcam-decode``.

    Raises:
        ServeError: the service or a camera didn't start or broke, or nothing was shown.
    """
    with ExitStack() as stack:
        service = stack.enter_context(_service(engine))
        for number in range(cameras):
            stack.enter_context(_camera(f"camera{number}", f"pattern:{size}@{frame_rate:g}", service.address))
        return asyncio.run(_watch(service, [f"camera{number}" for number in range(cameras)], viewers, seconds))


async def _watch(service: "_Service", names: Sequence[str], viewers: int, seconds: float) -> dict[str, Any]:
    await asyncio.to_thread(service.wait_for_cameras, names)
    latency: list[float] = []
    async with aio.insecure_channel(service.address, [("grpc.max_receive_message_length", -1)]) as channel:
        stub = ViewersStub(channel)
        watching = [
            asyncio.create_task(_note(stub, name, latency if number == 0 else []))
            for name in names
            for number in range(viewers)
        ]
        await asyncio.sleep(_SETTLE_S)
        latency.clear()
        before, cpu, began = service.counts(), service.cpu_s(), time.monotonic()
        await asyncio.sleep(seconds)
        after, cpu, took = service.counts(), service.cpu_s() - cpu, time.monotonic() - began
        for task in watching:
            if task.done() and task.exception():
                raise ServeError(f"a viewer was let go: {task.exception()}")
            task.cancel()
    counted = {name: after.get(name, 0.0) - before.get(name, 0.0) for name in after}
    if viewers and not latency:
        raise ServeError("nothing was shown")
    received = counted["veilcam_frames_received_total"]
    batches = counted.get("veilcam_batch_frames_count", 0.0)
    return {
        "cameras": len(names),
        "viewers": viewers,
        "received": int(received),
        "made": int(counted["veilcam_pictures_shown_total"]),
        "dropped": int(counted["veilcam_frames_dropped_total newer"]),
        "fps": round(counted["veilcam_pictures_shown_total"] / took / len(names), 2),
        "latency_ms": {
            name: round(float(np.percentile(latency, q)), 1) if latency else None
            for name, q in (("median", 50), ("p95", 95), ("p99", 99))
        },
        "batch": round(counted.get("veilcam_batch_frames_sum", 0.0) / batches, 2) if batches else None,
        "server_cpu_ms_per_frame": round(cpu * 1e3 / max(1.0, received), 2),
        "server_cores": round(cpu / took, 2),
        "memory_mb": round(after["process_resident_memory_bytes"] / (1 << 20)),
        "engine": service.engine,
    }


async def _note(stub: ViewersStub, name: str, latency: list[float]) -> None:
    call: Any = stub.Watch(pb.WatchRequest(camera=name))
    async for picture in call:
        latency.append((time.time_ns() - picture.capture_time_ns) / 1e6)


class _Service:
    """A decoder service in a process of its own."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        told: dict[str, Any] = {}
        self.engine = ""
        deadline = time.monotonic() + _START_S
        while "grpc_port" not in told:
            try:
                told = json.loads(self._lines.get(timeout=max(0.1, deadline - time.monotonic())))
            except (queue.Empty, json.JSONDecodeError):
                raise ServeError("the decoder service didn't start") from None
            if found := re.match(r"reconstructor veil\S* .*engine (\S+) on", told["message"]):
                self.engine = found[1]
        self.address = f"127.0.0.1:{told['grpc_port']}"
        self._page = f"http://127.0.0.1:{told['http_port']}"

    def wait_for_cameras(self, names: Sequence[str]) -> None:
        """Until all are live."""
        deadline = time.monotonic() + _START_S
        while True:
            with urllib.request.urlopen(f"{self._page}/cameras.json", timeout=10) as answer:
                live = {each["name"] for each in json.load(answer) if each["state"] == "live"}
            if live >= set(names):
                return
            if time.monotonic() > deadline:
                raise ServeError(f"cameras didn't start: {', '.join(sorted(set(names) - live))}")
            time.sleep(0.2)

    def counts(self) -> dict[str, float]:
        """Metrics, summed over cameras and reconstructors; dropped frames by reason."""
        with urllib.request.urlopen(f"{self._page}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        counts: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name = " ".join([sample.name, *([sample.labels["reason"]] if "reason" in sample.labels else [])])
                counts[name] = counts.get(name, 0.0) + sample.value
        return counts

    def cpu_s(self) -> float:
        """Seconds of processor time so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.put(line)
        self._lines.put("")


@contextmanager
def _service(engine: str) -> Iterator[_Service]:
    command = [sys.executable, "-m", "decoder", "--port", "0", "--http", "0", "--log-json", "--engine", engine]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield _Service(process)
        finally:
            _end(process)


@contextmanager
def _camera(name: str, source: str, address: str) -> Iterator[None]:
    command = [sys.executable, "-m", "encoder", source, "--server", address, "--name", name]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            _end(process)


def _end(process: "subprocess.Popen[Any]") -> None:
    process.terminate()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
