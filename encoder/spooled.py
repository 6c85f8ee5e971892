"""A link whose frames wait on disk until the server has them."""

from collections import Counter
from collections.abc import Sequence

import grpc

from encoder.backlog import Backlog
from encoder.link import ServerLink
from encoder.sinks import ServerSink, SinkError
from encoder.spool.spool import Spool
from encoder.tls import Tls
from protos.v1 import veilcam_pb2 as pb

STALLED_S = 1.0
"""A server that acknowledges nothing for so long, beside what the way needs for what is on it, takes no frames for now:
they are late, not dropped."""


class SpooledLink(ServerLink):
    """Streams to a decoder service; what it doesn't keep is sent again as a backlog, beside what is live.

    Args:
        address, hello, dropped, resizable, give_up_s, tls: as ``ServerLink`` has them.
        spool: the camera's; closed with the link.
        rate: frames of the backlog a second, at most.
    """

    away = False

    def __init__(
        self,
        address: str,
        hello: pb.Hello,
        dropped: Counter[str],
        spool: Spool,
        rate: float,
        resizable: bool = False,
        give_up_s: float = 0.0,
        tls: Tls | None = None,
    ) -> None:
        self.spool = spool
        self._sends = False
        self._held_back = False
        super().__init__(address, hello, dropped, resizable=resizable, give_up_s=give_up_s, tls=tls)
        self._backlog = Backlog(address, tls, spool, rate, self._flows)

    def wait_until_ready(self, timeout: float) -> bool:
        self._sends = super().wait_until_ready(0)
        sink = self._sink
        if not self._sends and sink is not None and not sink.is_silent(STALLED_S + sink.needs_s):
            self._sends = super().wait_until_ready(timeout)
            return self._sends or self._sink is None
        return True

    def take_changes(self) -> set[int]:
        changes = super().take_changes()
        key = self.spool.needs_key or (self._sends and self._held_back)
        return changes | {pb.CHANGE_SEND_KEY} if key else changes

    def send(self, message: pb.PublishRequest) -> bool:
        sends = self._sends and self._sink is not None
        message.frame.backlog_before = sends and self._held_back
        self.spool.append(self._hello, message.frame, sends)
        self._held_back = not sends
        return sends and super().send(message)

    def resize(self, width: int, height: int) -> bool:
        resized = super().resize(width, height)
        if resized:
            self._changes.add(pb.CHANGE_SEND_KEY)  # it begins a part of its own, also while the server is away
        return resized

    def close(self) -> None:
        """Wait until the last frame is kept, within a limit. What is late stays in the spool.

        Raises:
            SinkError: the server refused the camera.
        """
        self._backlog.close()
        try:
            super().close()
        except SinkError as error:
            if error.status is not None and error.status is not grpc.StatusCode.UNAVAILABLE:
                raise
        finally:
            self.spool.close()

    def _flows(self) -> bool:
        sink = self._sink
        return sink is not None and sink.has_room

    def _kept(self, kept: Sequence[pb.Sequences]) -> None:
        self.spool.keep(kept)

    def _lose(self, sink: ServerSink) -> None:
        self.spool.lose(sink.last_sent)

    def _also(self) -> str:
        return f"; {self.spool.told()}"
