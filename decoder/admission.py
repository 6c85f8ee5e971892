"""What is let in: limits, and the checks at the door, in order, each with its status and the field it is about."""

from dataclasses import dataclass

import grpc
import numpy as np
from numpy.typing import NDArray

from decoder.model import RENDITIONS
from protos.payload import (
    MAX_PLANES,
    Announcement,
    Payload,
    PayloadError,
    PayloadTooLargeError,
    PlaneKind,
    announcement,
)
from protos.rules import CAMERA_NAME, CAMERA_NAME_TOLD, MAX_LEVEL
from protos.v1 import veilcam_pb2 as pb

MAX_HELLO = 4096
"""Bytes; it is kept as long as its stream, and stands at the head of each of its recordings."""
MAX_SIDE = 65_500
"""Pixels; what a JPEG file can have."""


class Refusal(Exception):  # noqa: N818 - an answer that is expected, not a fault
    """What a peer is told instead of being served: a status, and a text that begins with the field."""

    def __init__(self, status: grpc.StatusCode, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.status = status


@dataclass
class Policy:
    """What one server takes and gives. All its parts look at the same one, and it may change while they run.

    Attributes:
        cameras: known at most.
        pixels: of a picture at most, padded to whole blocks.
        payload_bytes: of a frame at most.
        batch: frames in an engine at once, at most.
        allow_plain: plain pictures may be asked for; with users, by those whose role it is.
        frame_rate: at which a camera is read at most, in frames a second; 0 sets no limit.
        byte_rate: the same in bytes a second.
        silent_s: a camera that publishes nothing for so long is let go.
    """

    cameras: int
    pixels: int
    payload_bytes: int
    batch: int
    allow_plain: bool
    frame_rate: float = 0.0
    byte_rate: float = 0.0
    silent_s: float = 300.0

    @property
    def renditions(self) -> tuple[str, ...]:
        """What is given, first what everyone gets who doesn't ask."""
        return RENDITIONS if self.allow_plain else RENDITIONS[:1]


def invalid(field: str, problem: str) -> Refusal:
    """A refusal of something malformed."""
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, field, problem)


def check_hello(hello: pb.Hello) -> None:
    """Refuse a hello that is malformed, or of a picture that no viewer could be given."""
    if hello.ByteSize() > MAX_HELLO:
        raise invalid("hello", f"{hello.ByteSize()} bytes, expected {MAX_HELLO} at most")
    if not CAMERA_NAME.fullmatch(hello.camera):
        raise invalid("hello.camera", f"{hello.camera[:80]!r}, expected {CAMERA_NAME_TOLD}")
    if not hello.width or not hello.height:
        raise invalid("hello.width and hello.height", f"{hello.width}×{hello.height}, expected above 0")
    if max(hello.width, hello.height) > MAX_SIDE:
        problem = f"{hello.width}×{hello.height}, no side may have more than {MAX_SIDE} pixels"
        raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "hello.width and hello.height", problem)
    if not (np.isfinite(hello.frame_rate) and hello.frame_rate >= 0):
        raise invalid("hello.frame_rate", f"{hello.frame_rate}, expected 0 or more")


def check_frame(frame: pb.Frame, last_sequence: int, policy: Policy) -> None:
    """Refuse a frame whose own fields are malformed; its payload isn't looked into."""
    if frame.sequence <= last_sequence:
        raise invalid("frame.sequence", f"{frame.sequence} after {last_sequence}, expected to count up")
    if frame.capture_time_ns <= 0:
        raise invalid("frame.capture_time_ns", f"{frame.capture_time_ns}, expected nanoseconds since 1970")
    if frame.kind not in (pb.FRAME_KIND_KEY, pb.FRAME_KIND_DELTA):
        raise invalid("frame.kind", f"{frame.kind}, expected key or delta")
    if (frame.kind == pb.FRAME_KIND_DELTA) != (frame.base_sequence > 0):
        raise invalid("frame.base_sequence", f"{frame.base_sequence}, expected one for a delta and 0 for a key frame")
    if len(frame.planes) > MAX_PLANES:
        raise invalid("frame.planes", f"{len(frame.planes)} planes, expected {MAX_PLANES} at most")
    if len(frame.payload) > policy.payload_bytes:
        problem = f"{len(frame.payload)} bytes, this server allows {policy.payload_bytes}"
        raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "frame.payload", problem)


def check_size(hello: pb.Hello, block: int, policy: Policy) -> None:
    """Refuse a picture that is larger than allowed, counted as it is sampled: padded to whole blocks.

    Args:
        block: side of a block in pixels.
    """
    height, width = (blocks * block for blocks in _grid(hello, block))
    if height * width > policy.pixels:
        problem = f"{hello.width}×{hello.height} is more than the {policy.pixels} pixels that this server allows"
        raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "hello.width and hello.height", problem)


def check_sides(hello: pb.Hello, block: int, most_blocks: int) -> None:
    """Refuse a picture that is too large for an engine.

    Args:
        block: side of a block in pixels.
        most_blocks: that the engines take, down or across.
    """
    if max(_grid(hello, block)) > most_blocks:
        problem = f"{hello.width}×{hello.height}, an engine here takes no side of more than {most_blocks * block}"
        raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "hello.width and hello.height", problem)


def unpack(frame: pb.Frame, hello: pb.Hello, block: int) -> NDArray[np.int16]:
    """The luma values of a frame, key or delta: int16 (rows, H/B, W/B).

    Nothing is unpacked, and nothing allocated for it, before the payload has announced just the blocks expected.

    Raises:
        Refusal: a payload that is damaged, too large, or not what hello and frame announced.
    """
    grid = _grid(hello, block)
    try:
        announced = announcement(frame.payload, max_measurements=grid[0] * grid[1] * block**2)
        _check_announced(announced, frame, hello, block, grid)
        plane = Payload.unpack(frame.payload).planes[0]
    except PayloadTooLargeError as error:
        raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "frame.payload", str(error)) from None
    except PayloadError as error:
        raise invalid("frame.payload", str(error)) from None
    if plane.quantiser == 1:
        return plane.values
    return np.clip(plane.values.astype(np.int32) * plane.quantiser, -(2**15), 2**15 - 1).astype(np.int16)


def next_levels(frame: pb.Frame, hello: pb.Hello, block: int, before: NDArray[np.int8] | None) -> NDArray[np.int8]:
    """A frame's quantised measurements, int8 (rows, H/B, W/B), of a delta those of the frame before plus its own.

    Args:
        before: what the frame before it had; the base of a delta.

    Raises:
        Refusal: a payload that is damaged, too large, or not what hello and frame announced.
    """
    values = unpack(frame, hello, block)
    if frame.kind == pb.FRAME_KIND_DELTA:
        if before is None or values.shape != before.shape:
            raise invalid("frame.payload", "a delta of another shape than its base")
        # In 32 bits: a hostile difference must not wrap around into something that looks sound.
        values = np.clip(values.astype(np.int32) + before, -(2**15), 2**15 - 1).astype(np.int16)
    return checked_levels(values)


def _check_announced(
    announced: Announcement, frame: pb.Frame, hello: pb.Hello, block: int, grid: tuple[int, int]
) -> None:
    if announced.operator_id != hello.operator_id:
        raise invalid("frame.payload", f"operator_id: {announced.operator_id}, the hello said {hello.operator_id}")
    if announced.block != block:
        raise invalid("frame.payload", f"block: {announced.block}, operator {hello.operator_id} has {block}")
    kinds = [int(plane.kind) for plane in announced.planes]
    if kinds != list(frame.planes):
        raise invalid("frame.planes", f"{list(frame.planes)}, the payload has {kinds}")
    if kinds != [PlaneKind.LUMA]:
        raise invalid("frame.planes", f"{kinds}, this server reconstructs luma alone")
    rows, *blocks = announced.planes[0].shape
    if tuple(blocks) != grid:
        found, expected = ("×".join(map(str, shape)) for shape in (blocks, grid))
        raise invalid("frame.payload", f"plane.grid: {found} blocks, a picture of the hello's size has {expected}")
    if rows > block**2:
        raise invalid("frame.payload", f"plane.rows: {rows}, a block has {block**2} pixels")


def _grid(hello: pb.Hello, block: int) -> tuple[int, int]:
    return -(-hello.height // block), -(-hello.width // block)


def checked_levels(values: NDArray[np.int16]) -> NDArray[np.int8]:
    """Quantised measurements as the reconstructor takes them; refused where they leave ±127."""
    if values.size and int(np.abs(values.astype(np.int32)).max()) > MAX_LEVEL:
        raise invalid("frame.payload", f"plane.body: a measurement is outside ±{MAX_LEVEL}")
    return values.astype(np.int8)
