"""Segments of random bytes, for what writes, keeps and reads them."""

import random
from pathlib import Path

from protos.segment import Segment, SegmentWriter
from protos.v1 import veilcam_pb2 as pb

HELLO = pb.Hello(camera="porch", operator_id="0" * 16, width=64, height=48, frame_rate=10)


def frames(count: int, size: int = 60, every: int = 4) -> list[pb.Frame]:
    """Frames of random bytes, every so many a key frame."""
    draw = random.Random(count)
    made = []
    for number in range(1, count + 1):
        key = (number - 1) % every == 0
        kind = pb.FRAME_KIND_KEY if key else pb.FRAME_KIND_DELTA
        base = 0 if key else number - 1
        payload = draw.randbytes(draw.randint(1, size))
        made.append(
            pb.Frame(sequence=number, capture_time_ns=number * 1000, kind=kind, base_sequence=base, payload=payload)
        )
    return made


def written(path: Path, told: list[pb.Frame]) -> Path:
    writer = SegmentWriter(path, HELLO)
    for frame in told:
        writer.append(frame, frame.capture_time_ns + 7)
    writer.close()
    return path


def read(path: Path) -> list[pb.Frame]:
    return [frame for frame, _ in Segment(path).frames()]
