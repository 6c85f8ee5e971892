"""Numbers of frames, as ranges: those of a spool's part are nearly contiguous, and there may be millions."""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class Ranges:
    """A set of numbers, each added greater than all that were added before.

    Two arrays hold the ends: 16 bytes a range, however many numbers are in it.
    """

    def __init__(self) -> None:
        self._firsts, self._lasts = array("Q"), array("Q")
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        for first, last in zip(self._firsts, self._lasts, strict=True):
            yield from range(first, last + 1)

    def add(self, number: int) -> None:
        """Add one that is greater than all before."""
        if self._lasts and self._lasts[-1] == number - 1:
            self._lasts[-1] = number
        else:
            self._firsts.append(number)
            self._lasts.append(number)
        self._count += 1

    def remove(self, first: int, last: int) -> None:
        """Take out whatever is in it from ``first`` to ``last``, both included; nothing if ``last`` is the smaller."""
        begin, end = bisect_left(self._lasts, first), bisect_right(self._firsts, last)
        if first > last or begin >= end:
            return
        lowest, highest = self._firsts[begin], self._lasts[end - 1]
        self._count -= sum(self._lasts[at] - self._firsts[at] + 1 for at in range(begin, end))
        left = [(lowest, first - 1)] if lowest < first else []
        left += [(last + 1, highest)] if last < highest else []
        self._count += sum(high - low + 1 for low, high in left)
        self._firsts[begin:end] = array("Q", [low for low, _ in left])
        self._lasts[begin:end] = array("Q", [high for _, high in left])

    def clear(self) -> None:
        """Take out all."""
        self._firsts, self._lasts, self._count = array("Q"), array("Q"), 0
