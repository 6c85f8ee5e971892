"""From a frame to the message that carries it: sample, quantise, key or delta, pack."""

import time
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from encoder.sampling import Operator
from encoder.sources import Frame
from protos.payload import Payload, Plane
from protos.v1 import veilcam_pb2 as pb

KEY_INTERVAL_NS, KEY_INTERVAL_FRAMES = 4_000_000_000, 8
"""A key frame once both have passed, so that a recording can be entered anywhere near. Where few frames are sent, since
the way carries no more, most are to be differences: it carries several of them in the time of a key frame."""
LONGEST_KEY_INTERVAL_NS = 60_000_000_000
"""A key frame after so long at the latest."""


@dataclass(frozen=True)
class StageTimes:
    """Milliseconds that one frame took in each stage on the camera."""

    capture: float
    sample: float
    quantise: float
    pack: float


class Packer:
    """Packs the frames of one stream, in order.

    A frame is sent as differences to the one before whenever that has the smaller sum of magnitudes; a key frame comes
    first, on request, and every few seconds and frames.
    """

    def __init__(self, operator: Operator, ratio: float) -> None:
        self.operator = operator
        self.rows = operator.rows_for(ratio)
        self._sequence = 0
        self._last: NDArray[np.int8] | None = None
        self._capture_time_ns = 0
        self._last_key_ns = 0
        self._since_key = 0

    def pack(self, frame: Frame, sequence: int, key: bool = False) -> tuple[pb.Frame, StageTimes]:
        """The message of a frame, and what it took.

        Args:
            sequence: its number among the frames captured, from 1; gaps are frames that weren't sent.
            key: asks for a key frame.
        """
        began = time.perf_counter()
        side = self.operator.block
        grid = (-(-frame.luma.shape[0] // side), -(-frame.luma.shape[1] // side))
        levels = self.operator.sample(frame.luma, self.rows)
        sampled = time.perf_counter()
        quantised = self.operator.quantise(levels, grid)
        rounded = time.perf_counter()
        values, base = self._key_or_delta(quantised, frame.capture_time_ns, key)
        self._sequence, self._capture_time_ns, self._last = sequence, frame.capture_time_ns, quantised
        message = self._message(values, base)
        stages = (began, sampled, rounded, time.perf_counter())
        sample_ms, quantise_ms, pack_ms = ((b - a) * 1e3 for a, b in pairwise(stages))
        return message, StageTimes(frame.capture_ms, sample_ms, quantise_ms, pack_ms)

    def again(self) -> pb.Frame:
        """The frame that was packed last, as a key frame: for a server that may not have had it."""
        assert self._last is not None
        return self._message(self._last.astype(np.int16), 0)

    def _message(self, values: NDArray[np.int16], base: int) -> pb.Frame:
        return pb.Frame(
            sequence=self._sequence,
            capture_time_ns=self._capture_time_ns,
            planes=[pb.PLANE_KIND_LUMA],
            kind=pb.FRAME_KIND_DELTA if base else pb.FRAME_KIND_KEY,
            base_sequence=base,
            payload=Payload(self.operator.id, self.operator.block, (Plane(values),)).pack(),
        )

    def _key_or_delta(self, quantised: NDArray[np.int8], now_ns: int, key: bool) -> tuple[NDArray[np.int16], int]:
        values = quantised.astype(np.int16)
        self._since_key += 1
        interval_ns = KEY_INTERVAL_NS if self._since_key >= KEY_INTERVAL_FRAMES else LONGEST_KEY_INTERVAL_NS
        due = not 0 <= now_ns - self._last_key_ns < interval_ns
        if not (key or due or self._last is None or self._last.shape != quantised.shape):
            delta = values - self._last
            if np.abs(delta).sum() < np.abs(values).sum():
                return delta, self._sequence
        self._last_key_ns, self._since_key = now_ns, 0
        return values, 0
