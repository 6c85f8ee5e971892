"""What is deleted of recordings goes by when it came to the server, however far off a camera's clock is."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from decoder.recordings.recorder import Recorder
from decoder.recordings.store import Retention, Store
from decoder.settings import Settings
from encoder.packing import Packer
from encoder.sampling import Operator
from protos.segment import index_of
from tests.conftest import StartService, frame_of, hello_of
from tests.decoder.peers import Camera
from tests.waiting import wait_for

YEAR_NS, HOUR_NS, MIB = 365 * 86_400 * 10**9, 3600 * 10**9, 1 << 20


def received(store: Store, camera: str, captured_ns: int, hours_ago: float) -> Path:
    """A segment of a megabyte, with its index, whose last frame came so long ago."""
    path = store.place(camera, captured_ns)
    path.write_bytes(b"\0" * MIB)
    index_of(path).write_bytes(b"")
    then_ns = time.time_ns() - int(hours_ago * HOUR_NS)
    os.utime(path, ns=(then_ns, then_ns))
    return path


@pytest.mark.parametrize(
    ("retention", "left"),
    [
        (Retention(hours=24, free_megabytes=0), [2, 3, 4]),
        (Retention(megabytes=2, free_megabytes=0), [3, 4]),
        (Retention(free_megabytes=1 << 40), []),
    ],
)
def test_the_order_is_that_of_receipt(retention: Retention, left: list[int], tmp_path: Path) -> None:
    """The first two cameras are decades ahead and decades behind, in turns; the third is right."""
    store, now = Store(tmp_path, retention), time.time_ns()
    paths = {
        1: received(store, "ahead", now + 30 * YEAR_NS, 30),
        2: received(store, "behind", 5, 20),
        3: received(store, "right", now - 10 * HOUR_NS, 10),
        4: received(store, "behind", 0, 1),
    }
    deleted = store.tidy(set())
    assert [paths[number] for number in sorted(set(paths) - set(left))] == [kept.path for kept in deleted]
    assert [number for number, path in paths.items() if path.exists()] == left


@pytest.mark.parametrize("years", [-56, 40], ids=["1970", "decades ahead"])
def test_what_a_camera_with_a_wrong_clock_films_is_kept_for_as_long_as_any(
    years: int, start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    """A recording that came yesterday goes, and with the same look the one that has just come stays."""
    store = Store(tmp_path, Retention())
    old = received(store, "camera", time.time_ns() + years * YEAR_NS - HOUR_NS, 30)
    service = start_service(Settings(port=0, http=0, record=tmp_path, record_hours=24, record_free=0))
    packer = Packer(operator, 0.1)
    for number in (1, 2):
        camera = Camera(service.channel())
        camera.say(hello=hello_of(operator, photographs[0]))
        captured_ns = time.time_ns() + years * YEAR_NS + number
        camera.say(frame=packer.pack(frame_of(photographs[0], captured_ns), 1, key=True)[0])
        camera.settled(1)
        camera.bye()
        wait_for(lambda: service.server.cameras.all()[0].stream is None, "the end of the stream")
    wait_for(lambda: not old.exists(), "the end of the old segment")
    service.stop()
    store.retention = Retention(hours=24, free_megabytes=0)
    assert store.tidy(set()) == []
    assert len(store.segments("camera")) == 2


def test_what_is_too_old_goes_at_the_start_and_later_though_no_camera_sends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("decoder.recordings.recorder._TIDY_EVERY_S", 0.1)
    store = Store(tmp_path, Retention(hours=24, free_megabytes=0))
    first = received(store, "camera", 1, 30)
    recorder = Recorder(store)
    wait_for(lambda: not first.exists(), "the end of what was too old at the start")
    later, new = received(store, "camera", 2, 30), received(store, "camera", 3, 1)
    wait_for(lambda: not later.exists(), "the end of what is too old now")
    recorder.close()
    assert new.exists()


def test_what_came_before_the_server_knew_the_time_counts_from_when_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a board without a battery: first it is 1970 for a day and more, then time comes over the network."""
    store, now_ns = Store(tmp_path, Retention(hours=24, free_megabytes=0)), time.time_ns()
    early, being_written = received(store, "camera", 1, 0), received(store, "camera", 2, 0)
    old, new = received(store, "camera", 3, 30), received(store, "camera", 4, 20)
    for path in (early, being_written):
        os.utime(path, (60, 60))
    with monkeypatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: 30 * HOUR_NS)
        assert store.tidy({being_written}) == []
    assert [kept.path for kept in store.tidy({being_written})] == [old]
    assert store.tidy({being_written}) == []
    assert being_written.stat().st_mtime == 60
    with monkeypatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: now_ns + 5 * HOUR_NS)
        assert [kept.path for kept in store.tidy(set())] == [new]
        patch.setattr(time, "time_ns", lambda: now_ns + 26 * HOUR_NS)
        assert [kept.path for kept in store.tidy(set())] == [early]


def test_no_more_is_deleted_than_makes_room_where_a_disk_shows_it_only_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As btrfs and ZFS do, which free what was deleted with their next commit."""
    store, now = Store(tmp_path, Retention(free_megabytes=100)), time.time_ns()
    paths = [received(store, "camera", now - n * HOUR_NS, n) for n in (4, 3, 2, 1)]
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=100 * MIB - 3 * MIB // 2))
    assert [kept.path for kept in store.tidy(set())] == paths[:2]


def test_what_can_not_be_deleted_is_told_once_and_others_go(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path, Retention(megabytes=1, free_megabytes=0))
    for hours_ago in (30, 20, 10):
        received(store, "camera", time.time_ns() - hours_ago * HOUR_NS, hours_ago)
    folder = tmp_path / "camera" / f"{1:020d}.vcseg"
    folder.mkdir()
    os.utime(folder, ns=(1_700_000_000 * 10**9,) * 2)
    assert len(store.tidy(set())) >= 2
    assert store.tidy(set()) == []
    assert folder.is_dir()
    assert caplog.text.count(f"recording {folder} can't be deleted, others go instead") == 1
