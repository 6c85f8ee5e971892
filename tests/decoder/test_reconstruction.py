"""Engines at work: batches that pay, and what becomes of cameras whose engine fails or is replaced."""

import gc
import threading
import time
import weakref
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from decoder.catalogue import SHIPPED, Catalogue, load_catalogue
from decoder.engines.onnx_runtime import OnnxRuntimeEngine
from decoder.settings import Settings
from encoder.sampling import Operator
from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import ViewersStub
from tests.conftest import Service, StartService, hello_of
from tests.decoder.peers import TIMEOUT, Camera, altered, known_of, watch
from tests.waiting import wait_for


def test_an_engine_that_raises_is_rebuilt_and_if_that_does_not_help_its_cameras_are_told(
    start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]], messages: list[pb.Frame],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    service = start_service(catalogue=load_catalogue([SHIPPED], "onnxruntime", 1))
    failures = 0

    def broken(*_: object) -> None:
        nonlocal failures
        failures += 1
        raise RuntimeError("out of memory")

    with service.channel() as channel:
        camera = Camera(channel)
        camera.say(hello=hello_of(operator, photographs[0]))
        camera.answer()
        watching = ViewersStub(channel).Watch(pb.WatchRequest(camera="camera"), timeout=TIMEOUT)
        wait_for(lambda: bool((known := service.server.cameras.get("camera")) and known.watched), "the viewer")
        with monkeypatch.context() as patch:
            patch.setattr("decoder.engines.onnx_runtime.OnnxRuntimeEngine._run", broken)
            camera.say(frame=messages[0])
            assert camera.settled(1).shown == 0
            assert failures == 1
            camera.say(frame=messages[1])
            code, details = camera.refusal()
        assert code is grpc.StatusCode.INTERNAL
        assert details == "frame: the reconstructor failed, see the server's log"
        again = Camera(channel)
        again.say(hello=hello_of(operator, photographs[0]))
        again.say(frame=messages[0])
        assert again.shown(1).shown == 1
        assert next(watching).sequence == 1
        again.bye()


def test_a_frame_that_fails_in_one_rendition_is_shown_in_the_other(
    start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]], messages: list[pb.Frame],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = OnnxRuntimeEngine._run

    def broken(engine: OnnxRuntimeEngine, measurements: NDArray[np.int8]) -> NDArray[np.uint8]:
        if engine.model.told["rendition"] == "veiled":
            raise RuntimeError("out of memory")
        return run(engine, measurements)

    settings = Settings(port=0, http=0, allow_plain=True)
    service = start_service(settings, load_catalogue([SHIPPED], "onnxruntime", 1))
    with service.channel() as channel:
        camera = Camera(channel)
        camera.say(hello=hello_of(operator, photographs[0]))
        camera.answer()
        known = known_of(service)
        (veiled,) = watch(channel, known, "veiled")
        (plain,) = watch(channel, known, "plain")
        with monkeypatch.context() as patch:
            patch.setattr(OnnxRuntimeEngine, "_run", broken)
            camera.say(frame=messages[0])  # whoever was served longest ago is first: the veil
            assert camera.settled(1).shown == 1
            assert next(plain).sequence == 1
        assert known.tally.fates == {"shown": 1}
        camera.say(frame=messages[1])
        assert camera.shown(2).shown == next(veiled).sequence == next(plain).sequence == 2
        camera.bye()


def test_an_engine_that_cannot_be_rebuilt_ends_its_cameras_and_not_the_service(
    start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]], messages: list[pb.Frame],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def broken(*_: object) -> None:
        raise RuntimeError("device lost")

    service = start_service(catalogue=load_catalogue([SHIPPED], "onnxruntime", 1))
    with service.channel() as channel:
        camera = Camera(channel)
        camera.say(hello=hello_of(operator, photographs[0]))
        camera.answer()
        (watching,) = watch(channel, known_of(service), "veiled")
        with monkeypatch.context() as patch:
            patch.setattr(OnnxRuntimeEngine, "_run", broken)
            patch.setattr(OnnxRuntimeEngine, "__init__", broken)
            camera.say(frame=messages[0])
            assert camera.refusal() == (
                grpc.StatusCode.INTERNAL,
                "frame: the reconstructor failed, see the server's log",
            )
        again = Camera(channel)
        again.say(hello=hello_of(operator, photographs[0]))
        again.say(frame=messages[0])
        assert next(watching).sequence == again.shown(1).shown == 1
        again.bye()


class Watched:
    """Cameras that are watched, and an engine for which a larger batch costs little more: how many frames it got."""

    def __init__(
        self, service: Service, catalogue: Catalogue, channel: grpc.Channel, hellos: list[pb.Hello], frame: pb.Frame
    ) -> None:
        self._frame, self._sequence = frame, 0
        self.service, self.catalogue, self.cameras = service, catalogue, [Camera(channel) for _ in hellos]
        self.calls: list[tuple[int, bool]] = []
        for camera, hello in zip(self.cameras, hellos, strict=True):
            camera.say(hello=hello)
            camera.answer()
        stub = ViewersStub(channel)
        self._watching = [stub.Watch(pb.WatchRequest(camera=hello.camera), timeout=60) for hello in hellos]
        wait_for(lambda: all(known.watched for known in service.server.cameras.all()), "the viewers")

    def run(self, engine: OnnxRuntimeEngine, measurements: NDArray[np.int8]) -> NDArray[np.uint8]:
        count, _, height, width = measurements.shape
        self.calls.append((count, bool(measurements.any())))
        time.sleep(0.02 + 0.001 * count)
        return np.zeros((count, height * engine.block, width * engine.block), np.uint8)

    def frames_at_once(self) -> list[int]:
        """Each sends a frame: the batches that they went through."""
        self._sequence += 1
        self.calls.clear()
        for camera in self.cameras:
            camera.say(frame=altered(self._frame, sequence=self._sequence))
        for camera in self.cameras:
            camera.settled(self._sequence)
        return [count for count, real in self.calls if real]

    def apply(self, catalogue: Catalogue | None = None, **changes: object) -> None:
        settings, applied = self.service.server.settings.model_copy(update=changes), threading.Event()
        self.service.loop.call_soon_threadsafe(self.service.server.apply, settings, catalogue)
        self.service.loop.call_soon_threadsafe(applied.set)
        assert applied.wait(TIMEOUT)


@pytest.fixture
def five(
    start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]], messages: list[pb.Frame],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Watched]:  # fmt: skip
    catalogue = load_catalogue([SHIPPED / "veil-r10.onnx"], "onnxruntime", 1)
    service = start_service(catalogue=catalogue)
    hellos = [hello_of(operator, photographs[0], f"camera{number}") for number in range(5)]
    with service.channel() as channel:
        watched = Watched(service, catalogue, channel, hellos, messages[0])
        monkeypatch.setattr(OnnxRuntimeEngine, "_run", lambda *given: watched.run(*given))
        yield watched


def test_batches_grow_between_the_pictures_of_cameras_and_are_of_sizes_that_were_measured(five: Watched) -> None:
    assert five.frames_at_once() == [1] * 5, "nobody waits until it is known how many at once pay"
    wait_for(lambda: 4 in five.frames_at_once(), "batches of four")
    for _ in range(10):
        assert set(five.frames_at_once()) <= {1, 2, 4}
    five.apply(batch=2)
    assert set(five.frames_at_once()) <= {1, 2}
    five.apply(batch=16)
    wait_for(lambda: 4 in five.frames_at_once(), "batches of four again")


def test_a_batch_setting_that_is_raised_holds_for_sizes_that_are_measured_already(five: Watched) -> None:
    five.apply(batch=1)
    for _ in range(3):
        assert five.frames_at_once() == [1] * 5
    five.apply(batch=16)
    wait_for(lambda: 4 in five.frames_at_once(), "batches of four")


def test_more_frames_at_once_than_an_engine_takes_are_no_failure(
    five: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(engine: OnnxRuntimeEngine, measurements: NDArray[np.int8]) -> NDArray[np.uint8]:
        if len(measurements) > 2:
            raise RuntimeError("out of memory")
        return five.run(engine, measurements)

    monkeypatch.setattr(OnnxRuntimeEngine, "_run", out_of_memory)
    (reconstructor,) = five.catalogue.reconstructors
    engine = reconstructor.engine
    wait_for(lambda: 2 in five.frames_at_once(), "batches of two")
    for _ in range(10):
        assert set(five.frames_at_once()) <= {1, 2}
    assert reconstructor.engine is engine, "it was not rebuilt"
    assert all(not camera.tally.fates["failed"] for camera in five.service.server.cameras.all())


def test_an_engine_that_is_replaced_is_let_go(five: Watched) -> None:
    five.frames_at_once()
    before = weakref.ref(five.catalogue.reconstructors[0].engine)
    five.apply(load_catalogue([SHIPPED / "veil-r10.onnx"], "onnxruntime", 1))
    five.frames_at_once()
    wait_for(lambda: gc.collect() >= 0 and before() is None, "the end of the engine")
