"""What is called at a change and doesn't end: its children end with it, it holds up nothing, and the log has it."""

import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from encoder.sampling import Operator
from tests.conftest import StartService
from tests.decoder.test_states import Called, Film, hooked
from tests.waiting import wait_for


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Command:
    """A command that hangs at a camera's first change; it writes whom it has begun, and then each state."""

    def __init__(self, folder: Path) -> None:
        self._pids, self._states = folder / "pids", folder / "states"
        program = f"""
import os, subprocess, sys
if sys.argv[2] == "connecting":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open({str(self._pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}} ")
    child.wait()
open({str(self._states)!r}, "a").write(sys.argv[2] + " ")
"""
        self.told = shlex.join([sys.executable, "-c", program])

    @property
    def pids(self) -> list[int]:
        return [int(each) for each in self._pids.read_text().split()] if self._pids.exists() else []

    @property
    def states(self) -> list[str]:
        return self._states.read_text().split() if self._states.exists() else []

    def end(self) -> None:
        for process in self.pids:
            if alive(process):
                os.kill(process, signal.SIGKILL)
        wait_for(lambda: not any(map(alive, self.pids)), "the end of the processes")


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    monkeypatch.setattr("decoder.viewers.hook.TIMEOUT_S", 3.0)
    made = Command(tmp_path)
    yield made
    made.end()


def test_a_command_that_hangs_ends_with_all_that_it_began(
    command: Command, start_service: StartService, operator: Operator, caplog: pytest.LogCaptureFixture
) -> None:
    film = Film(hooked(start_service, command.told), operator)
    wait_for(lambda: len(command.pids) == 2, "both processes")
    wait_for(lambda: "not through within 3 s, and ended" in caplog.text, "the line that says so")
    wait_for(lambda: not any(map(alive, command.pids)), "the end of the processes")
    film.bye()


@pytest.fixture
def unendable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands can't be ended, as those that run as another user."""

    def refuse(*_: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("decoder.viewers.hook.os.killpg", refuse)


@pytest.mark.usefixtures("unendable")
def test_a_command_that_can_not_be_ended_is_left_and_the_next_change_told(
    command: Command, start_service: StartService, operator: Operator, caplog: pytest.LogCaptureFixture
) -> None:
    film = Film(hooked(start_service, command.told), operator)
    film.send()
    wait_for(lambda: command.states[:1] == ["live"], "the first call")
    assert "and it can't be ended (Operation not permitted): it is left running; camera porch is conn" in caplog.text
    assert all(map(alive, command.pids))
    command.end()
    film.bye()
    wait_for(lambda: command.states[-1] == "gone", "the last call")


@pytest.mark.usefixtures("unendable")
def test_commands_that_can_not_be_ended_do_not_pile_up(
    command: Command, start_service: StartService, operator: Operator, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("decoder.viewers.hook._LEFT", 1)
    film = Film(hooked(start_service, command.told), operator)
    film.send()
    wait_for(
        lambda: "1 that can't be ended are still running, and it isn't run beside them" in caplog.text,
        "the line that says so",
    )
    assert not command.states
    command.end()
    film.bye()
    wait_for(lambda: command.states[-1:] == ["gone"], "the last call")


def test_changes_that_are_not_told_at_the_end_are_a_line(
    start_service: StartService, operator: Operator, caplog: pytest.LogCaptureFixture
) -> None:
    go_on = threading.Event()
    hook = Called(hangs=go_on)
    try:
        service = hooked(start_service, f"http://user:secret@{hook.place}/")
        film = Film(service, operator)
        film.send()
        film.bye()
        wait_for(lambda: service.server.cameras.all()[0].stream is None, "the end of the stream")
        service.stop()
        ends = f"on_change http://{hook.place}/…: the service ends before 2 changes were told (porch is gone)"
        assert f"{ends}, and one is being told" in caplog.text
        assert "secret" not in caplog.text
    finally:
        go_on.set()
        hook.close()
