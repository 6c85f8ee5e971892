"""The whole way in one command: a clip or camera → Φ → gRPC → G → a page in the browser, with figures at the end.

The decoder service is a process of its own. This one is the camera, and two viewers: of the veiled pictures, as people
watch them, and of the plain ones, to compare.
"""

import itertools
import json
import logging
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import grpc
import numpy as np
from numpy.typing import NDArray

from benchmarks.fidelity import psnr
from encoder.packing import Packer
from encoder.pipeline import Account, run
from encoder.sampling import Operator
from encoder.sinks import ServerSink
from encoder.sources import Frame, open_source
from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import ViewersStub

log = logging.getLogger("veilcam.demo")

CAMERA = "demo"
_START_TIMEOUT_S = 60.0
_LAST_PICTURE_TIMEOUT_S = 3.0
_KEPT_FRAMES = 90
_LIVE_EVERY_S = 1.0


class DemoError(Exception):
    """The demo can't run; the message says why."""


@dataclass
class Seen:
    """What the viewers of one rendition saw, compared with the frames as they were captured."""

    psnr: list[float] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)
    last: int = 0
    reconstructor: str = ""


class Comparison:
    """Captured frames and the pictures that came of them; keeps the sharpest triple that has all three."""

    def __init__(self) -> None:
        self.seen = {"plain": Seen(), "veiled": Seen()}
        self._lock = threading.Lock()
        self._frames: dict[int, NDArray[np.uint8]] = {}
        self._pictures: dict[tuple[int, str], NDArray[np.uint8]] = {}
        self._best = -1.0
        self.triple: list[NDArray[np.uint8]] = []

    def captured(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        """Pass frames on, remembering each."""
        for sequence, frame in enumerate(frames, 1):
            with self._lock:
                self._frames[sequence] = frame.luma
                self._frames.pop(sequence - _KEPT_FRAMES, None)
            yield frame

    def pictured(self, rendition: str, picture: pb.Picture, now_ns: int) -> None:
        """Compare a picture with its frame."""
        pixels = np.frombuffer(picture.data, np.uint8).reshape(picture.height, picture.width)
        seen = self.seen[rendition]
        seen.latency_ms.append((now_ns - picture.capture_time_ns) / 1e6)
        seen.last, seen.reconstructor = picture.sequence, picture.reconstructor_id
        with self._lock:
            frame = self._frames.get(picture.sequence)
            if frame is None:
                return
            seen.psnr.append(psnr(pixels, frame))
            self._pictures[picture.sequence, rendition] = pixels
            for key in [key for key in self._pictures if key[0] < picture.sequence - _KEPT_FRAMES // 10]:
                del self._pictures[key]
            pair = [self._pictures.get((picture.sequence, name)) for name in ("plain", "veiled")]
            detail = float(cv2.Laplacian(frame, cv2.CV_32F).std())
            if detail > self._best and pair[0] is not None and pair[1] is not None:
                self._best, self.triple = detail, [frame, pair[0], pair[1]]


def demo(source: str, seconds: float, out: Path, ratio: float, stop: threading.Event) -> dict[str, Any]:
    """Run it and write ``summary.json`` and ``demo.png`` into ``out``; returns what the JSON says.

    Args:
        source: as for ``veilcam-encode``.
        seconds: end after so long; 0 plays the source to its end.

    Raises:
        DemoError: the service didn't start, or nothing was shown.
        SourceError: the source can't be opened or broke.
        SinkError: the service went away.
    """
    from encoder.cli import DEFAULT_OPERATOR

    packer = Packer(Operator.load(DEFAULT_OPERATOR), ratio)
    opened = open_source(source)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--out {out}: can't be written ({error.strerror})") from None
    comparison, account = Comparison(), Account()
    with _service(out / "decoder.log") as (address, page):
        log.info("watch it: %s", page)
        frames = opened.frames()
        first = next(frames, None)
        if first is None:
            raise DemoError(f"{source}: gives no frames")
        height, width = first.luma.shape
        hello = pb.Hello(camera=CAMERA, operator_id=packer.operator.id, width=width, height=height)
        hello.frame_rate = opened.frame_rate
        sink = ServerSink(address, hello)
        viewers = [_Viewer(address, rendition, comparison) for rendition in ("veiled", "plain")]
        reporter = threading.Thread(target=_tell, args=(account, comparison, stop), daemon=True)
        reporter.start()
        ending = threading.Timer(seconds, stop.set) if seconds else None
        if ending:
            ending.start()
        began = time.monotonic()
        try:
            run(comparison.captured(itertools.chain([first], frames)), packer, sink, account, stop)
            elapsed = time.monotonic() - began
            sink.close()
            _wait_for_last(comparison, sink.progress.shown)
        finally:
            stop.set()
            if ending:
                ending.cancel()
            for viewer in viewers:
                viewer.close()
            opened.close()
    return _summary(source, account, comparison, elapsed, out)


class _Viewer:
    """A thread that watches one rendition through the service's ``Watch``."""

    def __init__(self, address: str, rendition: str, comparison: Comparison) -> None:
        numbers = {"veiled": pb.RENDITION_VEILED, "plain": pb.RENDITION_PLAIN}
        self._channel = grpc.insecure_channel(address, [("grpc.max_receive_message_length", -1)])
        request = pb.WatchRequest(camera=CAMERA, rendition=numbers[rendition], encoding=pb.ENCODING_GRAY8)
        self._call = ViewersStub(self._channel).Watch(request)
        self._thread = threading.Thread(target=self._watch, args=(rendition, comparison), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._call.cancel()
        self._thread.join()
        self._channel.close()

    def _watch(self, rendition: str, comparison: Comparison) -> None:
        try:
            for picture in self._call:
                comparison.pictured(rendition, picture, time.time_ns())
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            if error.code() is not grpc.StatusCode.CANCELLED:
                log.warning("viewer of %s pictures: %s", rendition, error.details())


@contextmanager
def _service(log_file: Path) -> Iterator[tuple[str, str]]:
    """A decoder service on free ports: its gRPC address and the page's."""
    command = [sys.executable, "-m", "decoder", "--port", "0", "--http", "0", "--allow-plain", "--log-json"]
    with (
        log_file.open("w+") as output,
        subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True) as process,
    ):
        try:
            ports = _ports(process, log_file)
            yield f"127.0.0.1:{ports['grpc_port']}", f"http://127.0.0.1:{ports['http_port']}/"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()


def _ports(process: "subprocess.Popen[bytes]", log_file: Path) -> dict[str, int]:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        found = re.search(r'"grpc_port": (\d+), "http_port": (\d+)', log_file.read_text())
        if found:
            return {"grpc_port": int(found[1]), "http_port": int(found[2])}
        time.sleep(0.05)
    raise DemoError(f"the decoder service didn't start: see {log_file}")


def _wait_for_last(comparison: Comparison, shown: int) -> None:
    deadline = time.monotonic() + _LAST_PICTURE_TIMEOUT_S
    while comparison.seen["veiled"].last < shown and time.monotonic() < deadline:
        time.sleep(0.02)


def _tell(account: Account, comparison: Comparison, stop: threading.Event) -> None:
    while not stop.wait(_LIVE_EVERY_S):
        rate, kbit_s = account.recent()
        latency = comparison.seen["veiled"].latency_ms[-30:]
        shown = len(comparison.seen["veiled"].latency_ms)
        ms = f"{np.median(latency):.0f} ms" if latency else "–"
        log.info(
            "%5.1f fps · %5.0f kbit/s · %s since capture · sent %d, shown %d", rate, kbit_s, ms, account.sent, shown
        )


def _summary(source: str, account: Account, comparison: Comparison, elapsed: float, out: Path) -> dict[str, Any]:
    veiled, plain = comparison.seen["veiled"], comparison.seen["plain"]
    if not veiled.psnr or not plain.psnr or not comparison.triple:
        raise DemoError(f"no picture came back (sent {account.sent}): see {out / 'decoder.log'}")
    picture = out / "demo.png"
    if not cv2.imwrite(str(picture), side_by_side(comparison.triple, ("original", "plain", "veiled"))):
        raise DemoError(f"{picture}: can't be written")
    latency = {"median": 50, "p95": 95, "p99": 99}
    result = {
        "source": source,
        "frames_captured": account.captured,
        "frames_sent": account.sent,
        "frames_shown": len(veiled.latency_ms),
        "frames_dropped": account.sent - len(veiled.latency_ms),
        "frames_not_sent": {reason: count for reason, count in account.dropped.items() if count},
        "latency_ms": {name: round(float(np.percentile(veiled.latency_ms, q)), 1) for name, q in latency.items()},
        "kbit_s": round(account.bytes_sent * 8 / 1000 / elapsed, 1),
        "psnr_plain": round(float(np.mean(plain.psnr)), 2),
        "psnr_veiled": round(float(np.mean(veiled.psnr)), 2),
        "reconstructors": {"plain": plain.reconstructor, "veiled": veiled.reconstructor},
        "picture": str(picture),
    }
    (out / "summary.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def printed(result: dict[str, Any]) -> Iterator[str]:
    """What became of the frames, and how they were seen."""
    ms = result["latency_ms"]
    unsent = ", ".join(f"{count} {reason}" for reason, count in result["frames_not_sent"].items())
    captured = f"{result['frames_captured']} captured{f' (not sent: {unsent})' if unsent else ''}"
    yield (
        f"\nframes: {captured}, {result['frames_sent']} sent, {result['frames_shown']} shown, "
        f"{result['frames_dropped']} dropped"
    )
    yield f"latency from capture to shown: median {ms['median']} ms, 99th percentile {ms['p99']} ms"
    yield f"measurements: {result['kbit_s']} kbit/s"
    yield f"PSNR against the frames: plain {result['psnr_plain']} dB, veiled {result['psnr_veiled']} dB"
    yield f"original | plain | veiled: {result['picture']}"


def side_by_side(pictures: list[NDArray[np.uint8]], names: tuple[str, ...]) -> NDArray[np.uint8]:
    """Gray pictures (H, W) of one size in a row, each under its name."""
    columns = []
    for picture, name in zip(pictures, names, strict=True):
        head = np.full((28, picture.shape[1]), 255, np.uint8)
        cv2.putText(head, name, (6, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.6, 0, 1, cv2.LINE_AA)
        columns.append(np.vstack([head, picture]))
        columns.append(np.full((columns[0].shape[0], 6), 255, np.uint8))
    return np.asarray(np.hstack(columns[:-1]), np.uint8)
