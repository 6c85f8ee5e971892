"""How many frames an engine takes at once, and how long it waits for them: measured where it runs, not guessed."""

from dataclasses import dataclass

from decoder.engines import Engine

_GAIN = 0.97
"""A larger batch must take less than so much of the time a frame; else it only adds latency."""
_REPEATS = 3


@dataclass(frozen=True)
class Batching:
    """For one reconstructor and picture size.

    Attributes:
        most: frames at once.
        wait_s: how long the first frame may wait for others: what one more in the batch saves. To wait longer costs
            more than it gains.
        took_ms: milliseconds of a batch, by its size, as measured.
    """

    most: int
    wait_s: float
    took_ms: dict[int, float]

    def __str__(self) -> str:
        """As a log tells it."""
        took = ", ".join(f"{size} in {ms:.1f} ms" for size, ms in self.took_ms.items())
        if self.most == 1:
            return f"{took}: one frame at a time"
        return f"{took}: up to {self.most} frames at once, waiting up to {self.wait_s * 1e3:.1f} ms for them"


def measure(engine: Engine, grid: tuple[int, int], most: int) -> Batching:
    """Double the batch for as long as that makes a frame cheaper.

    Args:
        engine: to measure; it is warm afterwards.
        grid: blocks of a picture, down and across.
        most: frames at once that are allowed.
    """
    took = {1: _time(engine, grid, 1)}
    best, size = 1, 2
    while size <= most:
        took[size] = _time(engine, grid, size)
        if took[size] / size > _GAIN * took[best] / best:
            break
        best, size = size, size * 2
    saved = max(0.0, 2 * took[1] - took[2]) / 1e3 if best > 1 else 0.0
    return Batching(best, saved, took)


def _time(engine: Engine, grid: tuple[int, int], size: int) -> float:
    """Least milliseconds of a few runs; the first, which may compile or allocate, doesn't count."""
    return min([engine.timed(size, grid) for _ in range(_REPEATS)][1:])
