"""Real components for every test: a decoder service on loopback, photographs from the shipped clip, an RTSP server."""

import asyncio
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import grpc
import hypothesis
import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.draw_clip import CLIP
from decoder.catalogue import SHIPPED, Catalogue, load_catalogue
from decoder.server import Server
from decoder.settings import Settings
from encoder.cli import DEFAULT_OPERATOR
from encoder.sampling import Operator
from encoder.sources import Frame
from protos.v1 import veilcam_pb2 as pb

# Machines differ in speed, and a test must not fail for that.
hypothesis.settings.register_profile("veilcam", deadline=None)
hypothesis.settings.load_profile("veilcam")


@pytest.fixture(scope="session")
def operator() -> Operator:
    return Operator.load(DEFAULT_OPERATOR)


@pytest.fixture(scope="session")
def catalogue() -> Catalogue:
    return load_catalogue([SHIPPED], "onnxruntime", 2)


@pytest.fixture(scope="session")
def photographs() -> list[NDArray[np.uint8]]:
    """Eight gray frames of the clip, 336×448, some alike and some not."""
    capture = cv2.VideoCapture(str(CLIP))
    read = (capture.read() for _ in range(120))
    frames = [np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY), np.uint8) for sound, picture in read if sound]
    return [frames[index] for index in (0, 1, 2, 3, 40, 41, 80, 110)]


@dataclass
class Service:
    """A decoder service that runs in a thread of its own."""

    server: Server
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread = field(repr=False)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    @property
    def page(self) -> str:
        return f"http://127.0.0.1:{self.server.http_port}"

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(self.address, [("grpc.max_receive_message_length", -1)])

    def stop(self) -> None:
        if self.thread.is_alive():
            asyncio.run_coroutine_threadsafe(self.server.stop(2.0), self.loop).result(20)
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(10)
            self.loop.close()


StartService = Callable[..., Service]


@pytest.fixture
def start_service(catalogue: Catalogue) -> Iterator[StartService]:
    """Start a service by its settings; it ends with the test."""
    started: list[Service] = []

    def start(settings: Settings | None = None, catalogue: Catalogue = catalogue) -> Service:
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()

        async def make() -> Server:
            server = Server(catalogue, settings or Settings(port=0, http=0))
            await server.start()
            return server

        try:
            server = asyncio.run_coroutine_threadsafe(make(), loop).result(30)
        except BaseException:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)
            loop.close()
            raise
        service = Service(server, loop, thread)
        started.append(service)
        return service

    yield start
    for service in started:
        service.stop()


@pytest.fixture
def service(start_service: StartService) -> Service:
    return start_service(Settings(port=0, http=0, allow_plain=True))


def hello_of(operator: Operator, picture: NDArray[np.uint8], camera: str = "camera") -> pb.Hello:
    height, width = picture.shape
    return pb.Hello(camera=camera, operator_id=operator.id, width=width, height=height, frame_rate=10)


def frame_of(picture: NDArray[np.uint8], capture_time_ns: int = 1) -> Frame:
    return Frame(picture, capture_time_ns, 0.0, False)


_RTSP_SERVER = """
import sys, gi
gi.require_version("Gst", "1.0"); gi.require_version("GstRtspServer", "1.0")
from gi.repository import Gst, GstRtspServer, GLib
Gst.init(None)
server = GstRtspServer.RTSPServer(); server.set_address("127.0.0.1"); server.set_service("0")
factory = GstRtspServer.RTSPMediaFactory(); factory.set_shared(True)
factory.set_launch("( videotestsrc is-live=true pattern=ball ! video/x-raw,width=320,height=240,framerate=15/1 "
                   "! x264enc tune=zerolatency speed-preset=ultrafast key-int-max=15 ! rtph264pay name=pay0 pt=96 )")
server.get_mount_points().add_factory("/cam", factory); server.attach(None)
print(server.get_bound_port(), flush=True)
GLib.MainLoop().run()
"""


@pytest.fixture(scope="session")
def rtsp_url() -> Iterator[str]:
    """Debian's GStreamer RTSP server with a moving ball, 320×240."""
    python = Path("/usr/bin/python3")
    probe = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import GstRtspServer"
    if not python.exists() or subprocess.run([python, "-c", probe], capture_output=True).returncode:
        pytest.skip("Debian's gir1.2-gst-rtsp-server-1.0 and python3-gi aren't installed")
    with subprocess.Popen([python, "-c", _RTSP_SERVER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"rtsp://127.0.0.1:{process.stdout.readline().strip()}/cam"
        process.kill()
