"""Where the time goes between capture and a viewer, stage by stage, and how many frames a second fit.

The camera is a process of its own; service and viewer share this one. Two passes over the source: at its own pace for
the stages, then as fast as every frame can be shown for the rate. OpenCV encodes each frame as JPEG in the camera's
process right after it was sent: the peer, in the same run.
"""

import asyncio
import itertools
import multiprocessing
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from grpc import aio
from rich.table import Table

from benchmarks.tables import table
from decoder.catalogue import Catalogue
from decoder.pictures import JPEG_QUALITY, Picture
from decoder.server import Server
from decoder.settings import Settings
from encoder.packing import Packer, StageTimes
from encoder.pipeline import Account, run
from encoder.sampling import Operator
from encoder.sinks import ServerSink
from encoder.sources import SourceError, masked, open_source
from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import ViewersStub

CAMERA = "latency"
STAGES = (
    *("capture", "sample", "quantise", "pack", "send", "unpack", "queue", "reconstruct", "encode for view", "shown"),
    "capture to shown",
)
"""``send`` ends when the server has the message, ``shown`` is from the JPEG's being ready to the viewer's having it."""
_WARM_UP_FRAMES = 5
_VIEWERS = 2


class LatencyError(Exception):
    """A run that gave nothing to measure."""


@dataclass(frozen=True)
class CameraRecord:
    """What the camera notes of one frame."""

    stages: StageTimes
    handed_on_ns: int
    payload_bytes: int
    jpeg_ms: float
    jpeg_bytes: int


@dataclass
class Pass:
    """One pass over the source: milliseconds by stage, one value a frame shown."""

    stages: dict[str, list[float]]
    jpeg_ms: list[float]
    payload_bytes: list[int]
    jpeg_bytes: list[int]
    captured: int
    shown: int
    seconds: float
    size: tuple[int, int]


def measure(source: str, operator_path: Path, ratio: float, catalogue: Catalogue) -> dict[str, Any]:
    """Stream a source twice through a real service to a real viewer: at full speed, and then at its own pace.

    By then the service has met the size: what it measures and compiles at the first frames isn't in the latencies.

    Raises:
        SourceError: the source can't be opened, or has no end.
        LatencyError: nothing was shown; the reason is in the text.
    """
    opened = open_source(source, paced=False)
    opened.close()
    if opened.live or re.fullmatch(r"pattern[^#]*", source):
        raise SourceError(f"{opened.name}: doesn't end; a file, a folder, or pattern:640x480@25#100")
    full, paced = asyncio.run(_passes(source, operator_path, ratio, catalogue))
    camera = [sum(took) for took in zip(*(paced.stages[name] for name in ("sample", "quantise", "pack")), strict=True)]
    return {
        "source": masked(source) if "://" in source else Path(source).name,
        "size": list(paced.size),
        "ratio": ratio,
        "stages_ms": {
            stage: {
                name: round(float(np.percentile(paced.stages[stage], q)), 2)
                for name, q in (("median", 50), ("p95", 95), ("p99", 99))
            }
            for stage in STAGES
        },
        "frames": {"captured": paced.captured, "shown": paced.shown},
        "full_speed_frames": {"captured": full.captured, "shown": full.shown},
        "paced_fps": round(paced.shown / paced.seconds, 2),
        "full_speed_fps": round(full.shown / full.seconds, 2),
        "camera_ms": round(float(np.median(camera)), 2),
        "payload_bytes": round(float(np.mean(paced.payload_bytes))),
        "jpeg": {
            "median": round(float(np.median(paced.jpeg_ms)), 2),
            "bytes": round(float(np.mean(paced.jpeg_bytes))),
        },
    }


def printed(result: dict[str, Any]) -> Iterator[Table | str]:
    """Each stage, then frames, and the camera's work beside JPEG's."""
    width, height = result["size"]
    names = ("median", "p95", "p99")
    rows = ([stage, *(f"{took[name]:.2f}" for name in names)] for stage, took in result["stages_ms"].items())
    title = f"{Path(result['source']).name}, {width}×{height}, r = {result['ratio']:g}, ms"
    yield table(title, ("stage", *names), rows, result["machine"])
    paced, full, jpeg = result["frames"], result["full_speed_frames"], result["jpeg"]
    yield (
        f"at its own pace: {paced['shown']} of {paced['captured']} frames shown, {result['paced_fps']} frames/s; "
        f"at full speed: {full['shown']} of {full['captured']} frames shown, {result['full_speed_fps']} frames/s"
    )
    yield (
        f"on the camera: sample + quantise + pack {result['camera_ms']} ms, {result['payload_bytes']} bytes a frame; "
        f"OpenCV JPEG of the same frames {jpeg['median']} ms, {jpeg['bytes']} bytes"
    )


async def _passes(source: str, operator_path: Path, ratio: float, catalogue: Catalogue) -> list[Pass]:
    server = Server(catalogue, Settings(port=0, http=0, max_frame_rate=0, max_byte_rate=0))
    await server.start()
    try:
        return [await _pass(server, source, operator_path, ratio, lossless) for lossless in (True, False)]
    finally:
        await server.stop(1.0)


async def _pass(server: Server, source: str, operator_path: Path, ratio: float, lossless: bool) -> Pass:
    began_ns = time.time_ns()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = (source, operator_path, ratio, f"127.0.0.1:{server.port}", lossless, theirs)
    process = context.Process(target=film, args=arguments, daemon=True)
    process.start()
    viewed: dict[int, int] = {}
    pictures: dict[int, Picture] = {}
    watching = asyncio.create_task(_watch(server, viewed, pictures))
    both = asyncio.create_task(_wait_for_viewers(server))
    both.add_done_callback(lambda task: None if task.cancelled() else ours.send("go"))
    try:
        answer = await asyncio.to_thread(_received, ours, process)
        await asyncio.sleep(0.5)
    finally:
        both.cancel()
        watching.cancel()
        process.join(5)
    if isinstance(answer, str):
        raise LatencyError(answer)
    records, captured, seconds = answer
    # A viewer's first picture is the newest there is: the last of the pass before.
    of_this = {sequence: each for sequence, each in pictures.items() if each.capture_time_ns >= began_ns}
    return _joined(records, captured, seconds, viewed, of_this)


def film(source: str, operator_path: Path, ratio: float, address: str, lossless: bool, answer: Connection) -> None:
    """The camera's process: stream, then send back its records, or a text that says what went wrong."""
    try:
        packer = Packer(Operator.load(operator_path), ratio)
        opened = open_source(source, paced=not lossless)
        frames = opened.frames()
        first = next(frames)
        height, width = first.luma.shape
        hello = pb.Hello(camera=CAMERA, operator_id=packer.operator.id, width=width, height=height)
        sink = ServerSink(address, hello, lossless)
        answer.recv()
    except Exception as error:  # noqa: BLE001 - whatever it is, the other process must hear of it
        answer.send(str(error) or type(error).__name__)
        return
    records: dict[int, CameraRecord] = {}
    recent: dict[int, Any] = {}

    def remembered() -> Any:
        for sequence, frame in enumerate(itertools.chain([first], frames), 1):
            recent[sequence] = frame.luma
            recent.pop(sequence - 20, None)
            yield frame

    def observe(message: pb.Frame, stages: StageTimes, handed_on_ns: int) -> None:
        began = time.perf_counter()
        _, jpeg = cv2.imencode(".jpg", recent[message.sequence], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        jpeg_ms = (time.perf_counter() - began) * 1e3
        records[message.sequence] = CameraRecord(stages, handed_on_ns, len(message.payload), jpeg_ms, jpeg.size)

    account, began = Account(), time.monotonic()
    try:
        run(remembered(), packer, sink, account, threading.Event(), lossless, observe)
        sink.close()
    except Exception as error:  # noqa: BLE001 - as above
        answer.send(str(error) or type(error).__name__)
        return
    answer.send((records, account.captured, time.monotonic() - began))


async def _wait_for_viewers(server: Server) -> None:
    """Wait until both viewers are there, so that no frame passes by unwatched."""
    await server.cameras.connected.wait()
    while (camera := server.cameras.get(CAMERA)) is None or camera.relays["veiled"].viewers < _VIEWERS:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def _watch(server: Server, viewed: dict[int, int], pictures: dict[int, Picture]) -> None:
    """A viewer over gRPC, once the camera is there; and the pictures' own times, from inside of the service."""
    await server.cameras.connected.wait()
    camera = server.cameras.get(CAMERA)
    assert camera is not None

    async def note() -> None:
        with camera.relays["veiled"].watch() as shown:
            async for picture in shown:
                pictures[picture.sequence] = picture

    noting = asyncio.create_task(note())
    try:
        async with aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            async for picture in ViewersStub(channel).Watch(pb.WatchRequest(camera=CAMERA)):
                viewed[picture.sequence] = time.time_ns()
    except aio.AioRpcError:
        pass  # the service is stopping
    finally:
        noting.cancel()


def _received(connection: Connection, process: Any) -> Any:
    while not connection.poll(0.2):
        if not process.is_alive() and not connection.poll(0):
            return f"the camera's process ended with code {process.exitcode}"
    return connection.recv()


def _joined(
    records: dict[int, CameraRecord],
    captured: int,
    seconds: float,
    viewed: dict[int, int],
    pictures: dict[int, Picture],
) -> Pass:
    whole = sorted(set(records) & set(viewed) & set(pictures))[_WARM_UP_FRAMES:]
    if not whole:
        raise LatencyError("no frame was shown after the warm-up; is the source longer than a few frames?")
    stages: dict[str, list[float]] = {name: [] for name in STAGES}
    for sequence in whole:
        camera, picture = records[sequence], pictures[sequence]
        times = picture.times
        ready_ns = picture.shown_time_ns + round(times.encode * 1e6)
        values: Sequence[float] = (
            *(camera.stages.capture, camera.stages.sample, camera.stages.quantise, camera.stages.pack),
            (times.received_ns - camera.handed_on_ns) / 1e6,
            *(times.unpack, times.queue, times.reconstruct, times.encode),
            (viewed[sequence] - ready_ns) / 1e6,
            (viewed[sequence] - picture.capture_time_ns) / 1e6,
        )
        for name, value in zip(STAGES, values, strict=True):
            stages[name].append(value)
    height, width = pictures[whole[0]].pixels.shape
    return Pass(
        stages,
        [records[s].jpeg_ms for s in whole],
        [records[s].payload_bytes for s in whole],
        [records[s].jpeg_bytes for s in whole],
        captured,
        len(set(viewed)),
        seconds,
        (width, height),
    )
