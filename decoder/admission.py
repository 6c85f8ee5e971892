"""What is let in: limits, and the checks at the door, in order, each with its status and the field it is about."""

import re
from dataclasses import dataclass

import grpc
import numpy as np
from numpy.typing import NDArray

from protos.payload import Payload, PayloadError, PayloadTooLargeError, PlaneKind
from protos.v1 import veilcam_pb2 as pb

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_LEVEL = 127


class Refusal(Exception):  # noqa: N818 - an answer that is expected, not a fault
    """What a peer is told instead of being served: a status, and a text that begins with the field."""

    def __init__(self, status: grpc.StatusCode, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.status = status


@dataclass(frozen=True)
class Limits:
    """How much one server takes."""

    cameras: int = 64
    pixels: int = 4096 * 2304
    payload_bytes: int = 8 << 20


def invalid(field: str, problem: str) -> Refusal:
    """A refusal of something malformed."""
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, field, problem)


def check_hello(hello: pb.Hello, limits: Limits) -> None:
    """Refuse a hello that is malformed or larger than allowed."""
    if not _NAME.fullmatch(hello.camera):
        allowed = "1 to 64 of letters, digits, '.', '_' and '-', a letter or digit first"
        raise invalid("hello.camera", f"{hello.camera[:80]!r}, expected {allowed}")
    if not hello.width or not hello.height:
        raise invalid("hello.width and hello.height", f"{hello.width}×{hello.height}, expected above 0")
    if hello.width * hello.height > limits.pixels:
        problem = f"{hello.width}×{hello.height} is more than the {limits.pixels} pixels that this server allows"
        raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "hello.width and hello.height", problem)
    if not (np.isfinite(hello.frame_rate) and hello.frame_rate >= 0):
        raise invalid("hello.frame_rate", f"{hello.frame_rate}, expected 0 or more")


def check_frame(frame: pb.Frame, last_sequence: int, limits: Limits) -> None:
    """Refuse a frame whose own fields are malformed; its payload isn't looked into."""
    if frame.sequence <= last_sequence:
        raise invalid("frame.sequence", f"{frame.sequence} after {last_sequence}, expected to count up")
    if frame.capture_time_ns <= 0:
        raise invalid("frame.capture_time_ns", f"{frame.capture_time_ns}, expected nanoseconds since 1970")
    if frame.kind not in (pb.FRAME_KIND_KEY, pb.FRAME_KIND_DELTA):
        raise invalid("frame.kind", f"{frame.kind}, expected key or delta")
    if (frame.kind == pb.FRAME_KIND_DELTA) != (frame.base_sequence > 0):
        raise invalid("frame.base_sequence", f"{frame.base_sequence}, expected one for a delta and 0 for a key frame")
    if len(frame.payload) > limits.payload_bytes:
        problem = f"{len(frame.payload)} bytes, this server allows {limits.payload_bytes}"
        raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "frame.payload", problem)


def unpack(frame: pb.Frame, hello: pb.Hello, block: int) -> NDArray[np.int16]:
    """The luma values of a frame, key or delta: int16 (rows, H/B, W/B).

    Raises:
        Refusal: a payload that is damaged, too large, or not what hello and frame announced.
    """
    grid = (-(-hello.height // block), -(-hello.width // block))
    try:
        payload = Payload.unpack(frame.payload, max_measurements=grid[0] * grid[1] * block**2)
    except PayloadTooLargeError as error:
        raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "frame.payload", str(error)) from None
    except PayloadError as error:
        raise invalid("frame.payload", str(error)) from None
    if payload.operator_id != hello.operator_id:
        raise invalid("frame.payload", f"operator_id: {payload.operator_id}, the hello said {hello.operator_id}")
    if payload.block != block:
        raise invalid("frame.payload", f"block: {payload.block}, operator {hello.operator_id} has {block}")
    kinds = [int(plane.kind) for plane in payload.planes]
    if kinds != list(frame.planes):
        raise invalid("frame.planes", f"{list(frame.planes)}, the payload has {kinds}")
    if kinds != [PlaneKind.LUMA]:
        raise invalid("frame.planes", f"{kinds}, this server reconstructs luma alone")
    plane = payload.planes[0]
    if plane.values.shape[1:] != grid:
        found, expected = ("×".join(map(str, shape)) for shape in (plane.values.shape[1:], grid))
        raise invalid("frame.payload", f"plane.grid: {found} blocks, a picture of the hello's size has {expected}")
    if plane.values.shape[0] > block**2:
        raise invalid("frame.payload", f"plane.rows: {plane.values.shape[0]}, a block has {block**2} pixels")
    if plane.quantiser == 1:
        return plane.values
    return np.clip(plane.values.astype(np.int32) * plane.quantiser, -(2**15), 2**15 - 1).astype(np.int16)


def checked_levels(values: NDArray[np.int16]) -> NDArray[np.int8]:
    """Quantised measurements as the reconstructor takes them; refused where they leave ±127."""
    if values.size and int(np.abs(values.astype(np.int32)).max()) > _MAX_LEVEL:
        raise invalid("frame.payload", f"plane.body: a measurement is outside ±{_MAX_LEVEL}")
    return values.astype(np.int8)
