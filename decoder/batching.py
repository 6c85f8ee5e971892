"""How many frames an engine takes at once, and how long it waits for them: measured where it runs, not guessed."""

import logging
from dataclasses import dataclass, field

from decoder.engines import Engine, EngineError

log = logging.getLogger("veilcam.decode")

_GAIN = 0.97
"""A larger batch must take less than so much of the time a frame; else it only adds latency."""
_REPEATS = 3
_LONGEST_MS = 250.0
"""A batch that may take longer isn't tried: it would hold up all other cameras for so long."""


@dataclass
class Batching:
    """For one engine and picture size. Learned step by step, between the batches of cameras, from one frame at once on.

    Attributes:
        sizes: frames at once that pay, each twice the one before.
        took_ms: milliseconds of a batch, by its size, as measured.
        trying: the size that is measured next; 0 once larger ones don't pay or don't work.
    """

    sizes: list[int] = field(default_factory=lambda: [1])
    took_ms: dict[int, float] = field(default_factory=dict)
    trying: int = 1
    _runs: list[float] = field(default_factory=list)

    def fitting(self, count: int) -> int:
        """The largest size that pays of at most so many frames. Others aren't run: an engine may compile for each."""
        return max((size for size in self.sizes if size <= count), default=0)

    @property
    def wait_s(self) -> float:
        """How long a frame may wait for others: what one more saves. To wait longer costs more than it gains."""
        return max(0.0, 2 * self.took_ms[1] - self.took_ms[2]) / 1e3 if len(self.sizes) > 1 else 0.0

    def learning(self, most: int) -> bool:
        """Whether there is more to measure up to so many frames at once."""
        return 0 < self.trying <= most

    def step(self, engine: Engine, grid: tuple[int, int]) -> None:
        """Run once what isn't measured yet; double it for as long as that makes a frame cheaper.

        Args:
            grid: blocks of a picture, down and across.
        """
        size = self.trying
        try:
            self._runs.append(engine.timed(size, grid))
        except EngineError as error:
            log.warning("%d frames at once are too many: %s", size, error)
            self.trying = 0
            return
        if len(self._runs) < _REPEATS:
            return
        took = self.took_ms[size] = min(self._runs[1:])  # the first may compile or allocate
        self._runs.clear()
        if size > 1 and took / size > _GAIN * self.took_ms[size // 2] / (size // 2):
            self.trying = 0
            return
        if size > 1:
            self.sizes.append(size)
        self.trying = 2 * size if 2 * took <= _LONGEST_MS else 0

    def __str__(self) -> str:
        """As a log tells it."""
        took = ", ".join(f"{size} in {ms:.1f} ms" for size, ms in self.took_ms.items())
        if len(self.sizes) == 1:
            return f"{took}: one frame at a time"
        return f"{took}: up to {self.sizes[-1]} frames at once, waiting up to {self.wait_s * 1e3:.1f} ms for them"
