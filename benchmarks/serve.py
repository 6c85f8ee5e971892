"""A service under load: cameras in processes of their own, a viewer for each, and what a frame costs the server.

Everything is a process as a user would start it, on this machine: one ``veilcam-decode``, and a ``veilcam-encode`` for
each camera. Latency is from capture, by the same clock, until the viewer here has the JPEG.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from grpc import aio
from rich.table import Table

from benchmarks.processes import AS_FAST_AS_IT_CAN, ProcessError, Service, filming, serving
from benchmarks.tables import table
from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import ViewersStub

_SETTLE_S = 3.0
"""Before anything counts: engines are warmed up, and how large batches pay is measured."""


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
        ProcessError: the service or a camera didn't start or broke, or nothing was shown.
    """
    with ExitStack() as stack:
        service = stack.enter_context(serving(engine, *AS_FAST_AS_IT_CAN))
        for number in range(cameras):
            stack.enter_context(filming(f"camera{number}", f"pattern:{size}@{frame_rate:g}", service.address))
        return asyncio.run(_watch(service, [f"camera{number}" for number in range(cameras)], viewers, seconds))


def printed(result: dict[str, Any]) -> Iterator[Table]:
    """A row for each number of cameras and viewers."""
    counts = ("cameras", "viewers", "received", "made", "dropped", "fps")
    rows = (
        [row[name] for name in counts]
        + [row["latency_ms"]["median"], row["latency_ms"]["p99"]]
        + [row["batch"], row["server_cpu_ms_per_frame"], row["memory_mb"]]
        for row in result["rows"]
    )
    title = f"{result['size']} at {result['frame_rate']:g} frames/s, {result['seconds']:g} s each"
    columns = (*counts, "median ms", "p99 ms", "batch", "CPU ms/frame", "MiB")
    yield table(title, columns, rows, result["machine"], words=0)


async def _watch(service: Service, names: Sequence[str], viewers: int, seconds: float) -> dict[str, Any]:
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
                raise ProcessError(f"a viewer was let go: {task.exception()}")
            task.cancel()
    counted = {name: after.get(name, 0.0) - before.get(name, 0.0) for name in after}
    if viewers and not latency:
        raise ProcessError("nothing was shown")
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
