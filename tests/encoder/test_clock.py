"""A clock that is set while a camera films: nothing is lost or stuck, figures recover, and it is told."""

import itertools
import json
import logging
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decoder.settings import Settings
from encoder.sampling import Operator
from encoder.sources import Frame
from protos.segment import Segment
from tests.conftest import Service, StartService, frame_of
from tests.encoder.test_link import Running, lines
from tests.waiting import wait_for

HOUR_NS = 3_600_000_000_000
FRAMES = 30
"""Before each step of the clock."""


def figures(service: Service) -> dict[str, Any]:
    with urllib.request.urlopen(f"{service.page}/cameras.json", timeout=10) as answer:
        (camera,) = json.load(answer)
        return dict(camera)


@pytest.mark.parametrize(("step_ns", "word"), [(HOUR_NS, "forward"), (-HOUR_NS, "back")])
def test_a_clock_that_is_set_loses_nothing_and_is_told(
    step_ns: int,
    word: str,
    start_service: StartService,
    operator: Operator,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    # What is saved is watched, and so reconstructed.
    service = start_service(Settings(port=0, http=0, record=tmp_path / "recorded", save=tmp_path / "saved"))
    stepped = False

    def frames() -> Iterator[Frame]:
        for index in itertools.count():
            picture = np.full((32, 32), index % 200, np.uint8)
            yield frame_of(picture, time.time_ns() + (step_ns if stepped else 0))
            time.sleep(0.03)

    running = Running(operator, service.address, frames())
    sent = 0
    for stepped in (False, True, False):
        wait_for(lambda least=sent + FRAMES: running.account.sent >= least, "frames")  # type: ignore[misc]
        shown = running.link.progress.shown
        wait_for(lambda least=shown: running.link.progress.shown > least, "pictures")  # type: ignore[misc]
        ahead_ms = -step_ns / 1e6 if stepped else 0.0
        wait_for(lambda off=ahead_ms: abs(figures(service)["latency_ms"] - off) < 60_000, "latency")  # type: ignore[misc]
        sent = running.account.sent
    running.end()
    service.stop()
    told = lines(caplog.text, "WARNING", "the clock of captured frames was set")
    other = "back" if word == "forward" else "forward"
    assert [word in told[0], other in told[1], len(told)] == [True, True, 2]
    assert not lines(caplog.text, "ERROR")
    assert running.link.outages == 0
    recorded = [
        frame.sequence for path in (tmp_path / "recorded").rglob("*.vcseg") for frame, _ in Segment(path).frames()
    ]
    assert len(recorded) == running.account.sent
    assert len(set(recorded)) == len(recorded)
