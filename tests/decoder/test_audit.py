"""Who was given plain pictures is in the log: each once, and none untold."""

import asyncio
import logging
import re

import pytest

from decoder.access.audit import Audit
from decoder.access.roles import Role, Who
from encoder.sampling import Operator
from tests.decoder.guarded import (
    AT,
    OK,
    TOKENS,
    Guarded,
    bearer,
    called,
)
from tests.waiting import wait_for


def test_who_was_given_plain_pictures_is_in_the_audit_log_and_veiled_ones_are_not(
    guarded: Guarded, operator: Operator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "veilcam.audit")
    wait_for(lambda: guarded.ask(f"/recordings/porch.jpg{AT}", bearer(TOKENS["tom"])).status == 200, "the recording")
    for path in ("/cameras/porch.jpg", "/pictures", "/cameras/porch.jpg?rendition=veiled"):
        guarded.ask(path, bearer(TOKENS["tom"]))
    guarded.ask("/cameras/porch.jpg?rendition=plain", bearer(TOKENS["vera"]))
    assert "plain picture" not in caplog.text

    def lines() -> list[str]:
        found = re.findall(r"plain picture of camera (\S+), captured (\S+), given to (.+) at \S+ by (\w+)", caplog.text)
        assert all(captured == "2023-11-14T22:13:20.000+00:00" for _, captured, _, _ in found)
        return [f"{camera} {who} {way}" for camera, _, who, way in found]

    for name, role in (("tom", "trusted"), ("ada", "admin")):
        guarded.ask("/cameras/porch.jpg?rendition=plain", bearer(TOKENS[name]))
        guarded.ask("/cameras/porch.mjpeg?rendition=plain", bearer(TOKENS[name]))
        guarded.ask(f"/recordings/porch.jpg{AT}&rendition=plain", bearer(TOKENS[name]))
        assert called(guarded, "Watch", "porch plain", role, operator) == OK
        expected = [f"porch {name} ({role}) {way}" for way in ("still", "MJPEG", "recording", "Watch")]
        assert lines()[-4:] == expected
    assert len(lines()) == 8


TOM = Who("tom", Role.TRUSTED)


def test_a_long_look_is_a_line_a_minute(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO, "veilcam.audit")
    audit, now = Audit(), [1000.0]
    monkeypatch.setattr("decoder.access.audit.time.monotonic", lambda: now[0])
    for second in range(150):
        audit.gave("still", TOM, "::1", "porch", "plain", second * 10**9)
        now[0] += 1
    audit.close()
    captured = "captured 1970-01-01T00:0"
    assert [record.getMessage() for record in caplog.records] == [
        f"plain picture of camera porch, {captured}0:00.000+00:00, given to tom (trusted) at ::1 by still",
        *(
            f"{count} more plain pictures of camera porch, {captured}{first}.000+00:00 to 1970-01-01T00:0{last}.000"
            "+00:00, given to tom (trusted) at ::1 by still"
            for count, first, last in ((59, "0:01", "0:59"), (60, "1:00", "1:59"), (30, "2:00", "2:29"))
        ),
    ]


def test_no_picture_stays_untold(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if there is no room for all who look, and however they are mixed."""
    monkeypatch.setattr("decoder.access.audit._MOST", 2)
    caplog.set_level(logging.INFO, "veilcam.audit")
    audit = Audit()
    for camera in ("porch", "yard", "gate", "porch", "porch", "yard", "yard", "yard", "gate"):
        audit.gave("recording", TOM, "::1", camera, "plain", 1)
    audit.close()
    told = [getattr(record, "pictures") for record in caplog.records]  # noqa: B009 - no attribute that mypy knows
    assert sum(told) == 9
    audit.close()
    assert len(caplog.records) == len(told), "each once"


@pytest.mark.parametrize("stopped", [False, True], ids=["quiet", "stopped"])
def test_what_was_given_in_a_moment_is_told_when_it_is_quiet_and_at_the_end(
    guarded: Guarded, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    caplog.set_level(logging.INFO, "veilcam.audit")
    wait_for(lambda: guarded.ask(f"/recordings/porch.jpg{AT}", bearer(TOKENS["tom"])).status == 200, "the recording")
    for _ in range(4):
        guarded.ask(f"/recordings/porch.jpg{AT}&rendition=plain", bearer(TOKENS["tom"]))
    assert "3 more plain pictures" not in caplog.text
    if stopped:
        guarded.service.stop()
    else:
        monkeypatch.setattr("decoder.access.audit.EVERY_S", 0.0)
        audit = guarded.service.server._audit
        guarded.service.loop.call_soon_threadsafe(
            lambda: asyncio.ensure_future(audit.keep_telling(), loop=guarded.service.loop)
        )
        wait_for(lambda: "3 more plain pictures" in caplog.text, "the line for the others")
    at = "2023-11-14T22:13:20.000+00:00"
    who = "tom (trusted) at 127.0.0.1 by recording"
    assert f"3 more plain pictures of camera porch, captured {at} to {at}, given to {who}" in caplog.messages
