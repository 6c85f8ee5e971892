"""From a source to a sink: a capture thread, the newest frame, sample, quantise, pack, send."""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from threadpoolctl import threadpool_limits

from encoder.clock import CaptureClock
from encoder.pace import Throttle
from encoder.packing import Packer, StageTimes
from encoder.sinks import Sink
from encoder.sources import Frame, SourceError
from protos.v1 import veilcam_pb2 as pb

_WINDOW = 200
_POLL_S = 0.25
_CAPTURE, _CAPTURE_END_S = "capture", 3.0


class NewestFrame:
    """Between the capture thread and the packer: holds one frame. A newer one replaces it, and that is counted.

    Args:
        lossless: ``put`` waits until the frame before was taken, instead of replacing it.
        dropped: counts the frames that were replaced, by the reason that ``reason`` then says.
    """

    def __init__(self, lossless: bool = False, dropped: Counter[str] | None = None) -> None:
        self._lossless = lossless
        self.dropped: Counter[str] = Counter() if dropped is None else dropped
        self.reason = "newer frame"
        self._changed = threading.Condition()
        self._frame: tuple[int, Frame] | None = None
        self._closed = False

    def put(self, sequence: int, frame: Frame) -> bool:
        """Offer a frame and its number; False once closed."""
        with self._changed:
            if self._lossless:
                self._changed.wait_for(lambda: self._frame is None or self._closed)
            if self._closed:
                return False
            self.dropped[self.reason] += self._frame is not None
            self._frame = sequence, frame
            self._changed.notify_all()
            return True

    def take(self, timeout: float) -> tuple[int, Frame] | None:
        """The newest frame and its number, or None when none comes in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._frame is not None or self._closed, timeout)
            frame, self._frame = self._frame, None
            self._changed.notify_all()
            return frame

    def close(self) -> None:
        """No more frames come; one that is held can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def over(self) -> bool:
        return self._closed and self._frame is None


REASONS = (
    *("newer frame", "rate lowered", "server away", "lost on the way", "size changed", "stopped"),
    *("spool full", "spool old", "spool damaged", "spool unwritable"),
)
"""Why a frame isn't sent, or was sent and never acknowledged; ``stopped`` are those at hand when it ended."""


@dataclass
class Account:
    """What happened to every frame of a run, and how long things took lately.

    Attributes:
        sent: frames; one that is sent again, since the server may not have had it, counts once.
        keys: messages, among them those that were sent again; so do ``bytes_sent``.
    """

    captured: int = 0
    sent: int = 0
    keys: int = 0
    bytes_sent: int = 0
    dropped: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(REASONS, 0)))
    """Frames lost here, by reason, one of ``REASONS``."""
    colour: bool = False
    colour_told: bool = False
    stages: deque[StageTimes] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    sent_times: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_WINDOW))

    def recent(self, seconds: float = 5.0) -> tuple[float, float]:
        """Frames a second and kbit/s over the last few seconds."""
        now = time.monotonic()
        times = [(t, size) for t, size in list(self.sent_times) if now - t <= seconds]
        if len(times) < 2:
            return 0.0, 0.0
        span = max(times[-1][0] - times[0][0], 1e-3)
        return (len(times) - 1) / span, sum(size for _, size in times[1:]) * 8 / span / 1000

    def stage_means(self) -> StageTimes:
        """Mean milliseconds of each stage, of late."""
        rows = list(self.stages) or [StageTimes(0, 0, 0, 0)]
        names = ("capture", "sample", "quantise", "pack")
        return StageTimes(*(sum(getattr(row, name) for row in rows) / len(rows) for name in names))


Observer = Callable[[pb.Frame, StageTimes, int], None]


def run(
    frames: Iterator[Frame],
    packer: Packer,
    sink: Sink,
    account: Account,
    stop: threading.Event,
    lossless: bool = False,
    observer: Observer | None = None,
) -> None:
    """Send a source's frames until they end or ``stop`` is set. The sink is left open.

    Args:
        lossless: send every frame, as fast as the sink takes them, instead of the newest.
        observer: called for each message with what it took and when it was handed on, ns since 1970.

    Raises:
        SourceError: the source broke, or changed its size.
        SinkError: the sink broke.
    """
    newest = NewestFrame(lossless, account.dropped)
    problems: list[Exception] = []
    capture = threading.Thread(
        target=_capture, args=(frames, newest, account, stop, problems), name=_CAPTURE, daemon=True
    )
    capture.start()
    throttle, size = Throttle(sink.name), None
    key = waited = False
    # Sampling takes few milliseconds and gains nothing by threads; OpenBLAS' idle ones spin on cores that others need.
    single = threadpool_limits(limits=1, user_api="blas")
    try:
        while not stop.is_set():
            newest.reason = "server away" if sink.away else "newer frame"
            ready = sink.wait_until_ready(0)
            waited = not sink.away and (waited or not ready)
            if not (ready or sink.wait_until_ready(_POLL_S)):
                if sink.away and newest.closed and not lossless:
                    account.dropped["server away"] += newest.take(0) is not None
                    break
                continue
            changes = sink.take_changes()
            key = key or pb.CHANGE_SEND_KEY in changes
            if pb.CHANGE_LOWER_RATE in changes and not lossless:
                throttle.lower(account.recent()[0])
            if sink.take_lost():
                message = packer.again()
                sink.send(pb.PublishRequest(frame=message))
                _note_bytes(account, message)
                key = False
                continue
            if newest.over:
                break
            taken = newest.take(_POLL_S)
            if taken is None:
                continue
            sequence, frame = taken
            if size not in (None, frame.luma.shape):
                account.dropped["size changed"] += 1
                height, width = frame.luma.shape
                if not sink.resize(width, height):
                    raise SourceError(
                        f"the source changed its size from {_wxh(size)} to {_wxh(frame.luma.shape)} at frame "
                        f"{sequence}; one stream has one size"
                    )
                size = frame.luma.shape
                continue
            size = frame.luma.shape
            if not throttle.admits(sequence):
                account.dropped["rate lowered"] += 1
                continue
            message, stages = packer.pack(frame, sequence, key)
            key = False
            if sink.send(pb.PublishRequest(frame=message)):
                _note(account, message, stages)
            if not lossless:
                throttle.sent(waited)
            waited = False
            if observer:
                observer(message, stages, time.time_ns())
    finally:
        single.restore_original_limits()
        newest.close()
        # A thread that is still inside of OpenCV when the interpreter ends may abort the process; see ``capturing``.
        capture.join(_CAPTURE_END_S)
        account.dropped["stopped"] += newest.take(0) is not None
    if problems and not stop.is_set():
        raise problems[0]


def capturing() -> bool:
    """Whether a source is still being read: it hangs, if ``run`` is over."""
    return any(thread.name == _CAPTURE for thread in threading.enumerate())


def _capture(
    frames: Iterator[Frame], newest: NewestFrame, account: Account, stop: threading.Event, problems: list[Exception]
) -> None:
    clock = CaptureClock()
    try:
        for frame in frames:
            clock.note(frame.capture_time_ns)
            account.captured += 1
            account.colour = account.colour or frame.colour
            if stop.is_set() or not newest.put(account.captured, frame):
                account.dropped["stopped"] += 1
                return
    except Exception as error:  # noqa: BLE001 - a thread's exception has no other listener; ``run`` raises it
        problems.append(error)
    finally:
        newest.close()


def _note(account: Account, message: pb.Frame, stages: StageTimes) -> None:
    account.sent += 1
    _note_bytes(account, message)
    account.stages.append(stages)
    account.sent_times.append((time.monotonic(), len(message.payload)))


def _note_bytes(account: Account, message: pb.Frame) -> None:
    account.keys += message.kind == pb.FRAME_KIND_KEY
    account.bytes_sent += len(message.payload)


def _wxh(shape: tuple[int, ...] | None) -> str:
    return f"{shape[1]}×{shape[0]}" if shape else "nothing"
