"""How fast a camera is read: what it sends above its limits waits on its side of the connection.

A camera that is too fast isn't refused. It would come back at once and begin with a key frame, which costs both sides
more than what was too much; and one that is read no faster holds back by itself, since it drops what it has no room to
send. What it sends meanwhile fills no memory here: gRPC takes a message when it is asked for one, and no window more.
"""

import logging
import time
from collections.abc import Callable

from decoder.admission import Policy
from decoder.seldom import Seldom

log = logging.getLogger("veilcam.decode")

_BURST_S = 1.0
"""So much of a second's worth is taken at once, of a camera that was slower before."""


class Pace:
    """Of one camera, over all of its streams or all of its backlogs.

    Attributes:
        slowed_s: that it was made to wait, all in all.
    """

    def __init__(self, camera: str, policy: Policy) -> None:
        self.slowed_s = 0.0
        self._camera, self._policy = camera, policy
        self._frames_until = self._bytes_until = 0.0
        self._tell = Seldom()

    def wait_after(self, size: int, measured: Callable[[], tuple[float, float]]) -> float:
        """Seconds until the next frame may be read.

        Args:
            size: of the frame that was read, in bytes.
            measured: frames a second and kbit/s of late, for the log.
        """
        now, most_frames, most_bytes = time.monotonic(), self._policy.frame_rate, self._policy.byte_rate
        earliest = now - _BURST_S
        self._frames_until = max(earliest, self._frames_until) + (1 / most_frames if most_frames else 0.0)
        self._bytes_until = max(earliest, self._bytes_until) + (size / most_bytes if most_bytes else 0.0)
        wait = max(0.0, self._frames_until - now, self._bytes_until - now)
        if wait and self._tell.now():
            limit = (
                f"{most_frames:g} frames/s (max_frame_rate)"
                if self._frames_until > self._bytes_until
                else f"{most_bytes} bytes/s (max_byte_rate)"
            )
            log.warning(
                "camera %s sends %.0f frames/s, %.0f kbit/s; this server takes %s: it is read no faster",
                *(self._camera, *measured(), limit),
            )
        self.slowed_s += wait
        return wait
