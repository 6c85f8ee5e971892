"""The service as a whole: what it offers, the ports it takes, and how it ends."""

import asyncio
import threading
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from numpy.typing import NDArray

from decoder.server import ServerError
from decoder.settings import Settings
from encoder.sampling import Operator
from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import ViewersStub
from tests.conftest import StartService, hello_of
from tests.decoder.conftest import Held
from tests.decoder.peers import TIMEOUT, Camera, known_of, watch
from tests.waiting import wait_for


def test_health_and_reflection(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", "veilcam.v1.Cameras", "veilcam.v1.Viewers"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=TIMEOUT)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    (answer,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(asked, timeout=TIMEOUT)
    names = {service.name for service in answer.list_services_response.service}
    assert {"veilcam.v1.Cameras", "veilcam.v1.Viewers", "grpc.health.v1.Health"} <= names


def test_shutdown_lets_viewers_and_cameras_go_within_its_limit(
    start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]], messages: list[pb.Frame]
) -> None:
    service = start_service()
    with service.channel() as channel:
        camera = Camera(channel)
        camera.say(hello=hello_of(operator, photographs[0]))
        camera.say(frame=messages[0])
        camera.settled(1)
        watching = ViewersStub(channel).Watch(pb.WatchRequest(camera="camera"), timeout=60)
        next(watching)
        stopping = threading.Thread(target=service.stop)
        stopping.start()
        with pytest.raises(grpc.RpcError) as error:
            next(watching)
        assert isinstance(error.value, grpc.Call)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert camera.refusal() == (grpc.StatusCode.UNAVAILABLE, "server: shutting down")
        stopping.join(20)
        assert not stopping.is_alive()


def test_an_engine_that_hangs_keeps_nothing_else_from_ending(
    start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]], messages: list[pb.Frame],
    held: Held, tmp_path: Path,
) -> None:  # fmt: skip
    """What was recorded is on the disk while the engine has most of its time to end left."""

    def recorders() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "recorder"}

    others = recorders()
    service = start_service(Settings(port=0, http=0, record=tmp_path))
    with service.channel() as channel:
        camera = Camera(channel)
        camera.say(hello=hello_of(operator, photographs[0]))
        camera.answer()
        (watching,) = watch(channel, known_of(service), "veiled")
        camera.say(frame=messages[0])
        assert held.began.acquire(timeout=TIMEOUT)
        assert recorders() > others
        stopping = asyncio.run_coroutine_threadsafe(service.server.stop(10 * TIMEOUT), service.loop)
        wait_for(lambda: recorders() == others, "the end of its recorder")
        assert not stopping.done()
        held.go()
        stopping.result(TIMEOUT)
        with pytest.raises(grpc.RpcError):
            list(watching)


def test_a_taken_port_is_told(start_service: StartService) -> None:
    first = start_service()
    with pytest.raises(ServerError, match=r"--port.*can't listen"):
        start_service(Settings(port=first.server.port, http=0))
    with pytest.raises(ServerError, match=r"--http.*can't listen"):
        start_service(Settings(port=0, http=first.server.http_port))
