"""Soak and kills, in short: that they measure, and that what they look for would be found."""

import json
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import kills, network, report, soak
from benchmarks.kills import Frames, Run
from benchmarks.processes import ProcessError, usage
from tests.benchmarks.test_benchmarks import CLI
from tests.waiting import wait_for

S = 1_000_000_000


def test_a_short_soak_samples_server_and_cameras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = tmp_path / "soak.json"
    done = subprocess.run([*CLI, "soak", "--minutes", "0.2", "--json", str(result)], capture_output=True, text=True)
    told = json.loads(result.read_text())
    assert done.returncode == (1 if told["problems"] else 0), done.stderr
    # On a machine that is busy otherwise, latency may well grow in seconds; nothing else does.
    assert [problem for problem in told["problems"] if "latency_ms" not in problem] == []
    assert len(told["samples"]) == 10
    assert set(told["samples"][-1]["held"]) == {"server", "sound", "slowly watched", "stuck"}
    assert told["start"]["latency_ms"]["median"] > 0
    assert told["counts"]["veilcam_recorded_frames_total"] > 0
    assert any("camera sound connected" in line for line in told["log"])
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    page = report.document()
    assert "## 0.2 minutes at speed" in page
    for name in ("server", "sound camera", "camera whose viewer is slow", "camera that hangs"):
        assert f"| {name}: memory, MiB |" in page
    before, after = (told[when]["server"]["threads"] for when in ("start", "end"))
    assert f"| server: threads | {before:.0f} | {after:.0f} | {before + 4:.0f} |" in page
    assert f"{told['counts']['veilcam_recorded_frames_total']:.0f} were recorded" in page


def test_what_has_grown_is_told() -> None:
    before = {"server": {"memory_mb": 100.0, "threads": 10.0}, "stuck": {"threads": 10.0}, "gone": {"threads": 1.0}}
    after = {"server": {"memory_mb": 143.0, "threads": 14.0}, "stuck": {"threads": 15.0}}
    assert list(soak._grown(before, after)) == [
        "server: memory_mb 143 at the end, 100 at the start",
        "stuck: threads 15 at the end, 10 at the start",
        "gone: there is none any more at the end",
    ]


def test_what_breaks_one_network_is_told_and_not_that_the_others_waited() -> None:
    def no_tc(_: network.Way) -> None:
        raise ProcessError("tc qdisc: no such thing")

    faults = {"sound": network.Fault(lambda _: None, lambda _: None, 0), "broken": network.Fault(no_tc, no_tc, 0)}
    with pytest.raises(ProcessError, match="no such thing"):
        network.measure(faults, print)


def test_a_process_that_has_ended_holds_nothing_whether_it_was_asked_after_or_not() -> None:
    with subprocess.Popen(["sleep", "60"]) as ended:
        assert usage(ended.pid)["threads"] == 1
        ended.kill()
        wait_for(lambda: "Z" in Path(f"/proc/{ended.pid}/stat").read_text(), "its end", 20)
        with pytest.raises(ProcessLookupError):
            usage(ended.pid)
    with pytest.raises(OSError, match="No such file"):
        usage(ended.pid)


def test_kills_account_for_every_frame(tmp_path: Path) -> None:
    result = tmp_path / "kills.json"
    done = subprocess.run([*CLI, "kills", "--times", "3", "--json", str(result)], capture_output=True, text=True)
    told = json.loads(result.read_text())
    assert done.returncode == (1 if told["problems"] else 0), done.stderr
    assert told["lost"] == 0, told["problems"]
    assert "lost 0, duplicated 0, out of order 0" in done.stdout
    assert sum(told["kills"].values()) == 3
    assert told["runs"] == told["kills"]["camera"] + 1
    assert told["recorded"] > 10
    for row in told["by_run"]:
        assert row["recorded"] + row["spooled"] + row["missing"] == row["highest"]


@pytest.mark.parametrize(
    ("parts", "spooled", "expected"),
    [
        ([[1, 2, 3], [4, 5]], [], (0, 0, 0)),
        ([[1, 2], [5]], [3, 4], (0, 0, 0)),
        ([[1, 2], [5]], [], (1, 0, 0)),
        ([[1, 2], [2, 3]], [], (0, 1, 0)),
        ([[1, 3, 2]], [], (0, 0, 1)),
        ([[3], [1, 2]], [], (0, 0, 1)),
        ([[1]], [1, 2, 3, 6], (1, 0, 0)),
    ],
)
def test_what_is_lost_twice_or_out_of_order_is_found(
    parts: list[list[int]], spooled: list[int], expected: tuple[int, int, int]
) -> None:
    """One number was told to be dropped."""
    run = Run(10 * S, 20 * S, Counter({"server away": 1}))
    recorded = Frames([[(10 * S + n, n) for n in part] for part in [*parts]])
    account = kills._account([run], recorded, Frames([[(10 * S + n, n) for n in spooled]]))
    assert (account["lost"], account["duplicated"], account["out_of_order"]) == expected


def test_what_a_camera_said_is_counted_once() -> None:
    run = Run(0)
    run.note("10.0 fps · 5 kbit/s · ms: capture 0.1 · sent 9, dropped here 2, at the server 0")
    run.note("server away since 2026-01-01, dropped here 30")
    run.note("a:1: frames flow again after 3.0 s (since x); frames not sent meanwhile: 30, lost on the way: 4")
    run.note("10.0 fps · 5 kbit/s · ms: capture 0.1 · sent 99, dropped here 37, at the server 0")
    assert run.told.total() == 37
    run.note("9.0 s: captured 99, sent 50 (1 key), 5 kbit/s; dropped here: 6 newer frame, 32 server away; in x")
    assert run.told == Counter({"newer frame": 6, "server away": 32})
