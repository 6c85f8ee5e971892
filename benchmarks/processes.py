"""A decoder service and cameras as a user would start them: each a process of its own, on this machine."""

import contextlib
import json
import os
import queue
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

AS_FAST_AS_IT_CAN = ("--max-frame-rate", "0", "--max-byte-rate", "0")
"""Options of a service whose limits a benchmark's cameras aren't to be measured by."""
_START_S, _END_S = 120.0, 30.0
_TICKS = os.sysconf("SC_CLK_TCK")


class ProcessError(Exception):
    """A service or a camera that didn't start, or nothing was shown."""


class Service:
    """A decoder service in a process of its own."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        told: dict[str, Any] = {}
        self.engine = ""
        deadline = time.monotonic() + _START_S
        while "grpc_port" not in told:
            try:
                told = json.loads(self._lines.get(timeout=max(0.1, deadline - time.monotonic())))
            except (queue.Empty, json.JSONDecodeError):
                raise ProcessError("the decoder service didn't start") from None
            if found := re.match(r"reconstructor veil\S* .*engine (\S+) on", told["message"]):
                self.engine = found[1]
        self.address = f"127.0.0.1:{told['grpc_port']}"
        self.page = f"http://127.0.0.1:{told['http_port']}"

    def wait_for_cameras(self, names: Sequence[str]) -> None:
        """Until all are live."""
        deadline = time.monotonic() + _START_S
        while True:
            with urllib.request.urlopen(f"{self.page}/cameras.json", timeout=10) as answer:
                live = {each["name"] for each in json.load(answer) if each["state"] == "live"}
            if live >= set(names):
                return
            if time.monotonic() > deadline:
                raise ProcessError(f"cameras didn't start: {', '.join(sorted(set(names) - live))}")
            time.sleep(0.2)

    def counts(self) -> dict[str, float]:
        """Metrics, summed over cameras and reconstructors; dropped frames by reason."""
        with urllib.request.urlopen(f"{self.page}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        counts: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name = " ".join([sample.name, *([sample.labels["reason"]] if "reason" in sample.labels else [])])
                counts[name] = counts.get(name, 0.0) + sample.value
        return counts

    def cpu_s(self) -> float:
        """Seconds of processor time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def usage(self) -> dict[str, int]:
        """What it holds now: MiB of memory and the most there was, threads, open files."""
        return usage(self.process.pid)

    def connected(self, ports: Sequence[int]) -> int:
        """Connections of its page that are established with these ports of this machine."""
        ours = int(self.page.rpartition(":")[2])
        count = 0
        for line in Path(f"/proc/{self.process.pid}/net/tcp").read_text().splitlines()[1:]:
            local, remote, state = (field.rpartition(":")[2] for field in line.split()[1:4])
            count += state == "01" and int(local, 16) == ours and int(remote, 16) in ports
        return count

    def forget_peak(self) -> None:
        """The most memory is counted from now on."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def said(self) -> list[str]:
        """Lines that it logged since this was asked last: time, level and message."""
        lines = []
        while not self._lines.empty():
            # A runtime may write lines of its own between those that are JSON.
            with contextlib.suppress(json.JSONDecodeError):
                line = json.loads(self._lines.get())
                lines.append(f"{line['asctime']} {line['levelname']} {line['message'].strip()}")
        return lines

    def errors(self) -> dict[str, int]:
        """What it logged as errors since this was asked last, and how often."""
        found = (line.split(" ERROR ", 1) for line in self.said() if re.match(r"\S+ \S+ ERROR ", line))
        return dict(Counter(message for _, message in found))

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.put(line)
        self._lines.put("")


@contextmanager
def serving(engine: str, *options: str) -> Iterator[Service]:
    """A service while the context lasts.

    Args:
        engine: as for ``veilcam-decode``.
        options: more of its.

    Raises:
        ProcessError: it didn't start.
    """
    command = [sys.executable, "-m", "decoder", "--port", "0", "--http", "0", "--log-json", "--engine", engine]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as process:
        try:
            yield Service(process)
        finally:
            end(process)


@contextmanager
def filming(name: str, source: str, address: str, *options: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A camera while the context lasts."""
    command = [sys.executable, "-m", "encoder", source, "--server", address, "--name", name, *options]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            end(process)


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def end(process: "subprocess.Popen[Any]") -> int:
    """Ask a process to end, and see to it: its exit code."""
    process.terminate()
    try:
        return process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def usage(process: int) -> dict[str, int]:
    """What a process holds now: MiB of memory and the most there was, threads, open files.

    Raises:
        OSError: there is none, or it has ended and nobody has asked after it yet.
    """
    place = Path(f"/proc/{process}")
    told = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
    if "VmRSS" not in told:
        raise ProcessLookupError(process)
    files = sum(1 for _ in (place / "fd").iterdir())
    return {
        "memory_mb": round(int(told["VmRSS"].split()[0]) / 1024),
        "most_memory_mb": round(int(told["VmHWM"].split()[0]) / 1024),
        "threads": int(told["Threads"]),
        "open_files": files,
    }
