"""The two sides of a service, as a test tells them to be: a camera, and viewers."""

import queue
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from decoder.cameras import Camera as Known
from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import CamerasStub, ViewersStub
from tests.conftest import Service
from tests.waiting import wait_for

TIMEOUT = 20


def watched(channel: grpc.Channel, camera: str = "camera") -> Iterator[NDArray[np.uint8]]:
    """What a viewer of a camera is shown, pixel by pixel."""
    request = pb.WatchRequest(camera=camera, encoding=pb.ENCODING_GRAY8)
    for picture in ViewersStub(channel).Watch(request, timeout=60):
        yield np.frombuffer(picture.data, np.uint8).reshape(picture.height, picture.width).copy()


class Camera:
    """A camera that says exactly what a test tells it to."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._requests: queue.SimpleQueue[pb.PublishRequest | None] = queue.SimpleQueue()
        self.call = CamerasStub(channel).Publish(iter(self._requests.get, None), timeout=60)

    def say(self, *, hello: pb.Hello | None = None, frame: pb.Frame | None = None) -> None:
        self._requests.put(pb.PublishRequest(hello=hello, frame=frame))

    def bye(self) -> None:
        self._requests.put(None)

    def answer(self) -> pb.PublishResponse:
        response: pb.PublishResponse = next(self.call)
        return response

    def shown(self, sequence: int) -> pb.Acknowledgement:
        while (told := self.answer().acknowledgement).shown < sequence:
            pass
        return told

    def settled(self, sequence: int) -> pb.Acknowledgement:
        while (told := self.answer().acknowledgement).settled < sequence:
            pass
        return told

    def refusal(self) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as error:
            for _ in self.call:
                pass
        assert isinstance(error.value, grpc.Call)
        return error.value.code(), error.value.details() or ""


def watch(channel: grpc.Channel, known: Known, *renditions: str) -> list[Any]:
    """Viewers of renditions, once they are there."""
    numbers = {"veiled": pb.RENDITION_VEILED, "plain": pb.RENDITION_PLAIN}
    watching = [
        ViewersStub(channel).Watch(pb.WatchRequest(camera=known.name, rendition=numbers[each]), timeout=60)
        for each in renditions
    ]
    wait_for(lambda: all(known.relays[each].viewers for each in renditions), "the viewers")
    return watching


def known_of(service: Service, camera: str = "camera") -> Known:
    """What a service knows of a camera."""
    known = service.server.cameras.get(camera)
    assert known is not None
    return known


def altered(message: pb.Frame, **changes: object) -> pb.Frame:
    copy = pb.Frame()
    copy.CopyFrom(message)
    for name, value in changes.items():
        if name == "planes":
            del copy.planes[:]
            copy.planes.extend(value)  # type: ignore[arg-type]
        else:
            setattr(copy, name, value)
    return copy
