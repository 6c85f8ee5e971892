"""Waiting for what is to come."""

import time
from collections.abc import Callable


def wait_for(condition: Callable[[], object], what: str, seconds: float = 30.0) -> None:
    """Return once a condition holds, however slow the machine is; an AssertionError names what never came.

    Args:
        condition: asked again and again.
        what: the thing that is waited for, as a noun: ``"the second frame"``.
        seconds: after which it is taken to never come.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"never came in {seconds:g} s: {what}"
        time.sleep(0.01)
