"""Ranges hold what a set would."""

from hypothesis import given
from hypothesis import strategies as st

from encoder.spool.ranges import Ranges

ENDS = st.tuples(st.integers(0, 60), st.integers(0, 60))
"""Of what is removed; often the wrong way round, as a server may say it."""
RUNS = st.lists(ENDS, max_size=3).map(lambda runs: {n for run in runs for n in range(min(run), max(run) + 1)})


@given(numbers=RUNS | st.sets(st.integers(0, 60)), removed=st.lists(ENDS, max_size=6))
def test_ranges_hold_what_a_set_would(numbers: set[int], removed: list[tuple[int, int]]) -> None:
    ranges, expected = Ranges(), set(numbers)
    for number in sorted(numbers):
        ranges.add(number)
    for first, last in removed:
        ranges.remove(first, last)
        expected -= set(range(first, last + 1))
        assert list(ranges) == sorted(expected)
        assert len(ranges) == len(expected)
    ranges.add(100)
    assert list(ranges) == [*sorted(expected), 100]
    ranges.clear()
    assert not ranges


def test_a_day_of_frames_takes_few_bytes() -> None:
    ranges = Ranges()
    for number in range(1, 100_001):
        ranges.add(number)
    ranges.remove(50_000, 50_000)
    assert len(ranges) == 99_999
    assert len(ranges._firsts) == len(ranges._lasts) == 2
