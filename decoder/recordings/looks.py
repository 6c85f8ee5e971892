"""What was recorded before this process began, looked at beside the writer: its frames wait for that, all others go on.

One thread looks at a camera's newest segments, where a frame may be that is sent again live, one at all of them, where
late ones may be. What is live waits for some seconds at most.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from decoder.recordings.held import Held, Span, look
from decoder.recordings.store import Store
from decoder.recordings.track import FAULT, Offer, Track

log = logging.getLogger("veilcam.decode")

LOOKED_S = 2.0
"""Live frames wait so long for a look at their camera's newest segments, at most: then one may be recorded twice."""


@dataclass(frozen=True, eq=False)
class Looked:
    """What was found of the recordings of a track's camera, or why they couldn't be looked at."""

    track: Track
    found: list[tuple[int, Span]]
    problem: str | None


class Looks:
    """The two threads that look, and what waits for them. All but ``_look_on`` is for the writer's thread alone.

    Args:
        store: what they look at.
        held: learns what is found; the writer's thread's own.
        answer: takes what is found to the writer's thread, from theirs.
        do: does what is offered, once it needs to wait no more; in the writer's thread.

    Attributes:
        parked: what waits, in the order in which it was offered.
    """

    def __init__(
        self, store: Store, held: Held, answer: Callable[[Looked], object], do: Callable[[Offer], object]
    ) -> None:
        self._store, self._held, self._answer, self._do = store, held, answer, do
        self.parked: dict[Track, list[Offer]] = {}
        self._asked: dict[bool, queue.SimpleQueue[Track | None]] = {}
        for late, name in ((False, "recordings-newest"), (True, "recordings-all")):
            asked = self._asked[late] = queue.SimpleQueue()
            threading.Thread(target=self._look_on, args=(asked,), name=name, daemon=True).start()

    def park(self, offer: Offer) -> bool:
        """Let what is offered wait, if it isn't known what is recorded already; whether it waits."""
        track = offer.track
        if track in self.parked:
            self.parked[track].append(offer)
        elif offer.frame is None or self._held.knows(track.hello.camera, track.hello.epoch, track.late):
            return False
        else:
            self.parked[track], track.began = [offer], time.monotonic()
            self._asked[track.late].put(track)
        return True

    def unpark(self, looked: Looked) -> None:
        """It is known now what is recorded of a track's camera, or it can't be."""
        camera, late = looked.track.hello.camera, looked.track.late
        if looked.problem:
            log.error("recordings of camera %s can't be looked at: %s", camera, looked.problem)
        if looked.problem and late:
            for offer in self.parked.pop(looked.track, []):
                offer.done(looked.problem)
            return
        self._held.learn(camera, looked.found, late)
        known = [each for each in self.parked if each.hello.camera == camera and (late or not each.late)]
        for track in sorted(known, key=lambda each: each.late):  # a backlog's segments end where live ones begin
            for offer in self.parked.pop(track):
                self._do(offer)

    def tend(self, now: float) -> None:
        """Let nothing that is live wait for long."""
        for track in list(self.parked):
            if not track.late and now - track.began > LOOKED_S:
                camera = track.hello.camera
                log.warning("recordings of camera %s: looking at them takes long; what is live isn't held up", camera)
                self.unpark(Looked(track, [], None))

    def give_up(self) -> None:
        """The server ends: what is live is recorded all the same, a backlog is to come again."""
        while self.parked:
            track, offers = self.parked.popitem()
            for offer in offers:
                if track.late:
                    offer.done("the server is shutting down")
                else:
                    self._do(offer)

    def close(self) -> None:
        """End the threads, each when it is through with its look."""
        for asked in self._asked.values():
            asked.put(None)

    def _look_on(self, asked: "queue.SimpleQueue[Track | None]") -> None:
        """What each of the threads does."""
        while (track := asked.get()) is not None:
            found, problem = list[tuple[int, Span]](), None
            try:
                found = look(self._store, track.hello.camera, track.late)
            except OSError as error:
                problem = error.strerror or str(error)
            except Exception:  # frames wait for the answer, whatever it is
                log.exception("recordings of camera %s can't be looked at", track.hello.camera)
                problem = FAULT
            self._answer(Looked(track, found, problem))
