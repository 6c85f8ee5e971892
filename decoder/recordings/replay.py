"""A recording as if its camera were live: its frames, at their own pace, into a decoder service."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence

import grpc
from grpc import aio

from decoder.recordings.playback import RecordingError, entries_of
from protos.segment import Segment, key_of, with_base
from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import CamerasStub

_LONGEST_PAUSE_S = 5.0
"""A gap in the recording isn't waited for longer."""


async def replay(
    segments: Sequence[Segment],
    address: str,
    speed: float,
    start_ns: int = 0,
    end_ns: int = 2**63 - 1,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Play segments into a service.

    Args:
        segments: of one camera, in order.
        address: of the service, HOST:PORT.
        speed: 2 plays twice as fast.
        start_ns: capture time to begin at; the frames that the first one is built on are sent too, without a pause.
        end_ns: capture time at which to end, left out.
        progress: called with each frame that is played.

    Raises:
        RecordingError: the service refuses the recording, or the disk does.
    """
    unread: list[OSError] = []
    async with aio.insecure_channel(address) as channel:
        for segment in segments:
            try:
                entries = entries_of(segment)
                asked = [entry.sequence for entry in entries if start_ns <= entry.capture_time_ns < end_ns]
                if not asked:
                    continue
                frames = _requests(segment, key_of(entries, asked[0]), speed, start_ns, asked[-1], progress)
                async for _ in CamerasStub(channel).Publish(_until_unread(frames, unread)):
                    pass
            except OSError as error:
                unread.append(error)
            except aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    return  # the service is stopping
                raise RecordingError(f"{segment.path}: {error.details()}") from None
            if unread:
                raise RecordingError(f"{segment.path}: {unread[0].strerror}")


async def _until_unread(
    requests: AsyncIterator[pb.PublishRequest], unread: list[OSError]
) -> AsyncIterator[pb.PublishRequest]:
    """Requests up to an error, which is kept: of what breaks a request iterator, gRPC tells nobody."""
    try:
        async for request in requests:
            yield request
    except OSError as error:
        unread.append(error)


async def _requests(
    segment: Segment, offset: int | None, speed: float, start_ns: int, last: int, progress: Callable[[], None]
) -> AsyncIterator[pb.PublishRequest]:
    hello = pb.Hello.FromString(segment.hello.SerializeToString())
    hello.epoch = 0  # it may be played again
    yield pb.PublishRequest(hello=hello)
    due, before_ns = time.monotonic(), 0
    for sent, frame in enumerate(with_base(segment.frames(offset)), 1):
        if frame.sequence > last:
            return
        # Numbered anew: it may begin in the middle, and the service counts from one.
        frame.sequence, frame.base_sequence = sent, sent - 1 if frame.base_sequence else 0
        frame.backlog_before = False
        if before_ns and frame.capture_time_ns > start_ns:
            due += min(_LONGEST_PAUSE_S, max(0, frame.capture_time_ns - before_ns) / 1e9 / speed)
            await asyncio.sleep(due - time.monotonic())
        before_ns = frame.capture_time_ns
        yield pb.PublishRequest(frame=frame)
        if frame.capture_time_ns >= start_ns:
            progress()
