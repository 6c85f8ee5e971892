"""Recordings: what a kill at any byte leaves, retention, a slow or full disk, and a real service that records."""

import json
import os
import random
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import cv2
import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from benchmarks.fidelity import psnr
from decoder.catalogue import SHIPPED, Catalogue, load_catalogue
from decoder.engines.onnx_runtime import OnnxRuntimeEngine
from decoder.model import Model
from decoder.recordings.film import free_part, write_film
from decoder.recordings.playback import Playback, Recording, RecordingError, Shot
from decoder.recordings.recorder import Recorder, SegmentLimits
from decoder.recordings.store import Retention, Store
from decoder.settings import Settings
from encoder.packing import Packer
from encoder.sampling import Operator
from protos.segment import Entry, Segment, SegmentError, SegmentWriter, index_of
from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import ViewersStub
from tests.conftest import Service, StartService, frame_of, hello_of
from tests.decoder.test_service import Camera, Held, watch
from tests.decoder.test_settings import DECODE, Running
from tests.decoder.test_web import get

HELLO = pb.Hello(camera="porch", operator_id="0" * 16, width=64, height=48, frame_rate=10)


def frames(count: int, size: int = 60, every: int = 4) -> list[pb.Frame]:
    """Frames of random bytes, every so many a key frame."""
    draw = random.Random(count)
    made = []
    for number in range(1, count + 1):
        key = (number - 1) % every == 0
        kind = pb.FRAME_KIND_KEY if key else pb.FRAME_KIND_DELTA
        base = 0 if key else number - 1
        payload = draw.randbytes(draw.randint(1, size))
        made.append(
            pb.Frame(sequence=number, capture_time_ns=number * 1000, kind=kind, base_sequence=base, payload=payload)
        )
    return made


def written(path: Path, told: list[pb.Frame]) -> Path:
    writer = SegmentWriter(path, HELLO)
    for frame in told:
        writer.append(frame, frame.capture_time_ns + 7)
    writer.close()
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("whole") / "1.vcseg", frames(20))


def read(path: Path) -> list[pb.Frame]:
    return [frame for frame, _ in Segment(path).frames()]


def test_what_was_written_reads_back(whole: Path) -> None:
    segment = Segment(whole)
    assert segment.hello == HELLO
    assert [(frame, received) for frame, received in segment.frames()] == [
        (frame, frame.capture_time_ns + 7) for frame in frames(20)
    ]
    entries = segment.entries()
    assert [(entry.capture_time_ns, entry.key) for entry in entries] == [
        (frame.capture_time_ns, frame.kind == pb.FRAME_KIND_KEY) for frame in frames(20)
    ]
    assert next(segment.frames(entries[8].offset))[0] == frames(20)[8]
    assert whole.stat().st_mode & 0o077 == 0


@given(data=st.data())
def test_a_kill_at_any_byte_loses_nothing_but_the_tail(
    whole: Path, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Cut the segment, and its index, at any two bytes: every record that is whole is read, and nothing else."""
    content, index = whole.read_bytes(), index_of(whole).read_bytes()
    entries = Segment(whole).entries()
    cut = data.draw(st.integers(entries[0].offset, len(content)))
    path = tmp_path_factory.mktemp("cut") / "1.vcseg"
    path.write_bytes(content[:cut])
    index_of(path).write_bytes(index[: data.draw(st.integers(0, len(index)))])
    ends = [entry.offset for entry in entries[1:]] + [len(content)]
    expected = sum(end <= cut for end in ends)
    assert read(path) == frames(20)[:expected]
    assert Segment(path).entries() == entries[:expected]


@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_byte_costs_no_more_than_the_frames_up_to_the_next_key_frame(
    whole: Path, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(whole.read_bytes())
    entries = Segment(whole).entries()
    place = data.draw(st.integers(entries[0].offset, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("damaged") / "1.vcseg"
    path.write_bytes(content)
    index_of(path).write_bytes(index_of(whole).read_bytes())
    hit = max(number for number, entry in enumerate(entries) if entry.offset <= place)
    following = next((n for n in range(hit + 1, 20) if entries[n].key), 20)
    assert read(path) == frames(20)[:hit] + frames(20)[following:]


@given(content=st.binary(max_size=100))
def test_any_bytes_are_a_segment_or_told(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("any") / "1.vcseg"
    path.write_bytes(content)
    with pytest.raises(SegmentError, match=r"1\.vcseg: "):
        Segment(path)


@given(rows=st.binary(max_size=200))
def test_an_index_that_does_not_fit_is_left_aside(
    whole: Path, rows: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("index") / "1.vcseg"
    path.write_bytes(whole.read_bytes())
    index_of(path).write_bytes(rows)
    entries: list[Entry] = Segment(path).entries()
    assert entries == Segment(whole).entries()
    assert read(path) == frames(20)


_WRITER = """
import sys
from pathlib import Path
from protos.segment import SegmentWriter
from tests.decoder.test_recordings import HELLO, frames
writer = SegmentWriter(Path(sys.argv[1]), HELLO)
for frame in frames(100_000, size=4000):
    writer.append(frame, 1)
    print(frame.sequence, flush=True)
"""


def test_what_a_killed_writer_had_written_is_there(tmp_path: Path) -> None:
    """SIGKILL at random moments, many times: every frame whose writing had returned is read."""
    draw = random.Random(1)
    for attempt in range(8):
        path = tmp_path / f"{attempt}.vcseg"
        process = subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        time.sleep(draw.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        told = [1, *(int(line) for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n"))]
        process.wait(10)
        process.stdout.close()
        kept = read(path)
        assert len(kept) in (told[-1], told[-1] + 1)
        assert [frame.sequence for frame in kept] == list(range(1, len(kept) + 1))
        assert len(Segment(path).entries()) == len(kept)


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_segments_end_at_a_key_frame_once_they_are_long_enough(tmp_path: Path) -> None:
    asked: list[None] = []
    recorder = Recorder(Store(tmp_path, Retention()), SegmentLimits(megabytes=0.001))
    recorder.begin(HELLO, lambda: asked.append(None))
    for frame in frames(60, size=200):
        assert recorder.offer("porch", frame, 1)
    recorder.close()
    segments = Store(tmp_path, Retention()).segments("porch")
    assert len(segments) > 3
    assert asked
    parts = [read(kept.path) for kept in segments]
    assert [frame for part in parts for frame in part] == frames(60, size=200)
    assert all(part[0].kind == pb.FRAME_KIND_KEY for part in parts)
    assert recorder.told()["porch"].frames == 60


def test_a_disk_that_is_too_slow_drops_counts_and_goes_on_with_a_key_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = SegmentWriter.append

    def slowly(self: SegmentWriter, frame: pb.Frame, received_ns: int) -> None:
        time.sleep(0.05)
        append(self, frame, received_ns)

    monkeypatch.setattr(SegmentWriter, "append", slowly)
    asked: list[None] = []
    recorder = Recorder(Store(tmp_path, Retention()), waiting=200)
    recorder.begin(HELLO, lambda: asked.append(None))
    taken = []
    for frame in frames(40):
        if recorder.offer("porch", frame, 1):
            taken.append(frame)
        time.sleep(0.01)
    recorder.close()
    told = recorder.told()["porch"]
    assert told.dropped > 0
    assert told.frames + told.dropped == 40
    assert asked
    (kept,) = Store(tmp_path, Retention()).segments()
    recorded = read(kept.path)
    assert recorded == taken
    for before, frame in zip([None, *recorded], recorded, strict=False):
        assert frame.kind == pb.FRAME_KIND_KEY or (before is not None and frame.base_sequence == before.sequence)


def test_a_full_disk_deletes_the_oldest_and_recording_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A real file system of one megabyte."""
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small]).returncode:
        pytest.skip("a small file system can't be mounted here")
    try:
        recorder = Recorder(Store(small, Retention(free_megabytes=0)), SegmentLimits(megabytes=0.2))
        recorder.begin(HELLO, lambda: None)
        for number, frame in enumerate(frames(1500, size=4000, every=2)):
            recorder.offer("porch", frame, 1)
            if number % 100 == 0:
                time.sleep(0.02)
        recorder.close()
        kept = [frame for each in Store(small, Retention()).segments() for frame in read(each.path)]
    finally:
        subprocess.run(["umount", small], check=True)
    told = recorder.told()["porch"]
    assert told.frames + told.dropped == 1500
    assert told.frames > 1000
    assert kept[-1].sequence > 1400
    assert "No space left on device; live pictures go on" in caplog.text
    assert "MiB of the disk are free" in caplog.text
    assert "recording goes on" in caplog.text or told.dropped < 1500


@pytest.mark.parametrize(
    ("retention", "left", "reason"),
    [
        (Retention(hours=1.0, free_megabytes=0), [3, 4], "older than 1 h"),
        (Retention(megabytes=2, free_megabytes=0), [3, 4], "recordings take more than 2 MiB"),
        (Retention(free_megabytes=1 << 40), [2, 4], "of the disk are free"),
        (Retention(free_megabytes=0), [1, 2, 3, 4], ""),
    ],
)
def test_retention_deletes_the_oldest_and_says_why(
    retention: Retention, left: list[int], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Four segments of a megabyte, two older than an hour; 2 and 4 are being written in the third case."""
    store, now = Store(tmp_path, retention), time.time_ns()
    ages = {1: 3.0, 2: 2.0, 3: 0.5, 4: 0.1}
    paths = {}
    for number, hours in ages.items():
        received_ns = now - int(hours * 3600e9)
        paths[number] = store.place("porch" if number % 2 else "yard", received_ns)
        paths[number].write_bytes(b"\0" * ((1 << 20) - 10))
        os.utime(paths[number], ns=(received_ns, received_ns))
        index_of(paths[number]).write_bytes(b"")
    writing = {paths[2], paths[4]} if left == [2, 4] else set()
    deleted = store.tidy(writing)
    assert sorted(kept.path for kept in deleted) == sorted(path for path in paths.values() if not path.exists())
    assert [number for number, path in paths.items() if path.exists()] == left
    assert [number for number, path in paths.items() if index_of(path).exists()] == left
    assert reason in caplog.text


def test_a_service_records_what_it_shows(
    tmp_path: Path, start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    """The frames on disk are those that were sent, to the byte; a second stream is a segment of its own."""
    service = start_service(Settings(port=0, http=0, record=tmp_path / "recordings"))
    sent = []
    for start in (0, 100):
        camera, packer = Camera(service.channel()), Packer(operator, 0.1)
        camera.say(hello=hello_of(operator, photographs[0]))
        for number, picture in enumerate(photographs[:4], 1):
            frame = packer.pack(frame_of(picture, start + number), number)[0]
            sent.append(frame)
            camera.say(frame=frame)
            camera.settled(number)
        camera.bye()
        until(lambda: service.server.cameras.all()[0].stream is None)
    service.stop()
    segments = Store(tmp_path / "recordings", Retention()).segments("camera")
    assert len(segments) == 2
    assert [frame for kept in segments for frame in read(kept.path)] == sent
    assert Segment(segments[0].path).hello == hello_of(operator, photographs[0])


# Back into pictures


@pytest.fixture(scope="module")
def recorded(
    tmp_path_factory: pytest.TempPathFactory, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> Path:
    """Eight pictures of one camera, one a second from 1970-01-01T00:00:01 on, in two segments."""
    folder = tmp_path_factory.mktemp("recorded") / "camera"
    folder.mkdir()
    for part, start in ((photographs[:4], 1), (photographs[4:], 5)):
        packer, writer = (
            Packer(operator, 0.1),
            SegmentWriter(folder / f"{start * 1_000_000_000:020d}.vcseg", hello_of(operator, part[0])),
        )
        for number, picture in enumerate(part):
            time_ns = (start + number) * 1_000_000_000
            writer.append(packer.pack(frame_of(picture, time_ns), number + 1)[0], time_ns)
        writer.close()
    return folder


def test_a_recording_plays_the_pictures_that_were_live(
    recorded: Path, catalogue: Catalogue, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    shots = list(Recording(recorded, catalogue, "plain").shots())
    assert [shot.capture_time_ns // 1_000_000_000 for shot in shots] == list(range(1, 9))
    for shot, picture in zip(shots, photographs, strict=True):
        assert shot.pixels.shape == picture.shape
        assert psnr(shot.pixels, picture) > 25
    part = list(Recording(recorded, catalogue, "plain").shots(3_000_000_000, 6_000_000_000))
    assert [shot.capture_time_ns for shot in part] == [shot.capture_time_ns for shot in shots[2:5]]
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(part, shots[2:5], strict=True))
    assert not np.array_equal(next(Recording(recorded, catalogue, "veiled").shots()).pixels, shots[0].pixels)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(times=st.lists(st.integers(0, 10_500), min_size=1, max_size=12))
def test_any_moment_in_any_order_is_what_was_live_then(
    recorded: Path, catalogue: Catalogue, operator: Operator, photographs: list[NDArray[np.uint8]], times: list[int]
) -> None:
    playback = Playback(Store(recorded.parent, Retention()), catalogue)
    for time_ms in times:
        moment = playback.at("camera", time_ms * 1_000_000)
        assert moment is not None
        second = min(8, max(1, time_ms // 1000))
        assert moment.capture_time_ns == second * 1_000_000_000
        assert moment.next_ns == (None if second == 8 else (second + 1) * 1_000_000_000)
        picture = photographs[second - 1]
        assert np.array_equal(moment.levels, operator.quantise(operator.sample(picture, 26), (21, 28)))


def test_a_recording_by_url(recorded: Path, start_service: StartService, catalogue: Catalogue) -> None:
    service = start_service(Settings(port=0, http=0, record=recorded.parent))
    told = json.loads(get(f"{service.page}/recordings/camera.json")[1])
    assert told == {"segments": [{"start_ms": 1000, "end_ms": 8000}]}
    shots = list(Recording(recorded, catalogue, "veiled").shots())
    at, seen = 1000, []
    while at:
        status, body, headers = get(f"{service.page}/recordings/camera.jpg?at={at}")
        assert (status, headers["Content-Type"], headers["X-Time-Ms"]) == (200, "image/jpeg", str(at))
        picture = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_GRAYSCALE)
        seen.append(np.asarray(picture, np.uint8))
        at = int(headers["X-Next-Ms"] or 0)
    assert all(psnr(picture, shot.pixels) > 30 for picture, shot in zip(seen, shots, strict=True))


@pytest.mark.parametrize(
    ("asked", "status", "told"),
    [
        ("camera.jpg", 400, b"at: ''"),
        ("camera.jpg?at=soon", 400, b"at: 'soon', expected milliseconds"),
        ("camera.jpg?at=-5", 400, b"at: '-5'"),
        ("camera.jpg?at=99999999999999999999", 400, b"at: '9999"),
        ("nobody.jpg?at=5", 404, b"nothing of a camera 'nobody'"),
        ("..%2Fcamera.jpg?at=5", 404, b""),
        ("camera.jpg?at=5&rendition=plain", 403, b"only veiled"),
        ("camera.jpg?at=5&rendition=sharp", 400, b"rendition: expected"),
        ("nobody.json", 200, b'{"segments":[]}'),
    ],
)
def test_a_recording_that_is_not_given(
    asked: str, status: int, told: bytes, recorded: Path, start_service: StartService
) -> None:
    service = start_service(Settings(port=0, http=0, record=recorded.parent))
    code, body, _ = get(f"{service.page}/recordings/{asked}")
    assert code == status
    assert body.startswith(told) or told in body


@pytest.fixture
def stuck(recorded: Path, tmp_path: Path) -> Iterator[Path]:
    """Recordings of two cameras; a pipe in place of the only segment of ``stuck`` keeps whoever opens it."""
    shutil.copytree(recorded, tmp_path / "recordings" / "camera")
    pipe = tmp_path / "recordings" / "stuck" / f"{10**9:020d}.vcseg"
    pipe.parent.mkdir()
    os.mkfifo(pipe)
    yield pipe.parent.parent
    let_go(pipe.parent.parent)


def let_go(recordings: Path) -> None:
    """A segment that kept whoever opened it ends, and is gone."""
    for pipe in recordings.glob("stuck/*.vcseg"):
        end = os.open(pipe, os.O_RDWR)
        pipe.unlink()
        os.close(end)


class Askers:
    """Those who ask for something of the page, each on a connection of their own, and haven't got an answer yet."""

    def __init__(self, service: Service) -> None:
        self.address, self.waiting = ("127.0.0.1", service.server.http_port), list[socket.socket]()

    def ask(self, path: str, seconds: float = 0.1) -> list[bytes]:
        """One more asks; what was answered, to whomever, within a while after it."""
        asking = socket.create_connection(self.address)
        asking.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        self.waiting.append(asking)
        return self.answers(seconds)

    def answers(self, seconds: float = 0.0) -> list[bytes]:
        answers = []
        for each in select.select(self.waiting, [], [], seconds)[0]:
            answers.append(each.makefile("rb").read())
            self.go(each)
        return answers

    def go(self, *gone: socket.socket) -> None:
        for each in gone:
            self.waiting.remove(each)
            each.close()


def test_a_disk_that_hangs_holds_up_recordings_alone(
    stuck: Path, start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    """More ask for what hangs than the server has connections, and are told; those who have gone make room."""
    service = start_service(Settings(port=0, http=0, record=stuck, max_connections=16))
    camera, askers = Camera(service.channel()), Askers(service)
    try:
        for number in range(40):
            for answer in askers.ask("/recordings/camera.json" if number % 2 else "/recordings/stuck.jpg?at=5"):
                assert answer.startswith(b"HTTP/1.1 503")
                assert b"retry-after: 1" in answer
                assert answer.endswith(b"recordings: as many as may wait for the disk are waiting; ask again\n")
        until(lambda: not askers.answers() and len(askers.waiting) == 9)
        camera.say(hello=hello_of(operator, photographs[0], "porch"))
        camera.say(frame=Packer(operator, 0.1).pack(frame_of(photographs[0], time.time_ns()), 1)[0])
        camera.settled(1)
        assert get(f"{service.page}/cameras/porch.jpg")[0] == 200
        askers.go(*askers.waiting[4:])
        until(lambda: not askers.ask("/recordings/camera.jpg?at=1000", 1.0))
        assert len(askers.waiting) == 5
        let_go(stuck)
        assert get(f"{service.page}/recordings/camera.jpg?at=1000")[0] == 200
    finally:
        askers.go(*askers.waiting)
    camera.bye()


def test_a_service_whose_disk_hangs_ends_when_it_is_told_to(stuck: Path) -> None:
    arguments = [*DECODE, "--log-json", "--port", "0", "--http", "0", "--engine", "onnxruntime", "--record", str(stuck)]
    (pipe,), held = stuck.glob("stuck/*.vcseg"), list[int]()

    def is_read() -> bool:
        """Whether someone opened it to read, who then waits for what isn't written."""
        try:
            held.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            return False
        return True

    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        service = Running(process)
        host, _, port = service.page.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as asking:
            asking.sendall(b"GET /recordings/stuck.jpg?at=5 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            until(is_read)
            process.send_signal(signal.SIGTERM)
            service.until("stopped")
            try:
                assert process.wait(20) == 0
            finally:
                process.kill()
                os.close(held[0])


def test_a_recording_that_grows_is_played_to_its_new_end(
    recorded: Path, tmp_path: Path, catalogue: Catalogue, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    store, packer = Store(tmp_path, Retention()), Packer(operator, 0.1)
    writer = SegmentWriter(store.place("camera", 10**9), hello_of(operator, photographs[0]))
    playback = Playback(store, catalogue)
    for second, picture in enumerate(photographs, 1):
        writer.append(packer.pack(frame_of(picture, second * 10**9), second)[0], second)
        for asked in (second, 1):
            moment = playback.at("camera", asked * 10**9)
            assert moment is not None
            assert moment.capture_time_ns == asked * 10**9
            assert moment.next_ns == (None if asked == second else 2 * 10**9)
    writer.close()


def test_a_recording_that_cannot_be_shown_says_why(
    recorded: Path, tmp_path: Path, start_service: StartService, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(recorded, tmp_path / "camera")
    (tmp_path / "foreign").mkdir()
    written(tmp_path / "foreign" / "1.vcseg", frames(3))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "1.vcseg").write_bytes(b"not a segment at all")
    catalogue = load_catalogue([SHIPPED], "onnxruntime", 1)
    service = start_service(Settings(port=0, http=0, record=tmp_path), catalogue)
    code, body, _ = get(f"{service.page}/recordings/foreign.jpg?at=5")
    assert (code, b"no reconstructor for operator 0000000000000000 here" in body) == (404, True)
    code, body, _ = get(f"{service.page}/recordings/broken.jpg?at=5")
    assert (code, b"begins with" in body) == (500, True)

    def out_of_memory(*_: object) -> None:
        raise RuntimeError("out of memory")

    for each in catalogue.reconstructors:
        monkeypatch.setattr(type(each.engine), "_run", out_of_memory)
    code, body, _ = get(f"{service.page}/recordings/camera.jpg?at=1000")
    assert (code, body) == (503, b"the reconstructor failed, see the server's log\n")


def test_a_rebuilt_engine_is_not_judged_by_what_was_on_its_way_to_the_one_before(
    recorded: Path,
    start_service: StartService,
    monkeypatch: pytest.MonkeyPatch,
    operator: Operator,
    photographs: list[NDArray[np.uint8]],
) -> None:
    """A frame is queued for the engine that failed, while that is being rebuilt."""
    catalogue = load_catalogue([SHIPPED / "veil-r10.onnx"], "onnxruntime", 1)
    service = start_service(Settings(port=0, http=0, record=recorded.parent), catalogue)
    engines, run, opened = {each.engine for each in catalogue.reconstructors}, OnnxRuntimeEngine._run, threading.Event()
    begun, packer, make = threading.Event(), Packer(operator, 0.1), OnnxRuntimeEngine.__init__

    def failing(engine: OnnxRuntimeEngine, measurements: NDArray[np.int8]) -> NDArray[np.uint8]:
        if engine in engines:
            raise RuntimeError("device lost")
        return run(engine, measurements)

    def slowly(engine: OnnxRuntimeEngine, name: str, model: Model, threads: int) -> None:
        begun.set()
        assert opened.wait(20)
        make(engine, name, model, threads)

    monkeypatch.setattr(OnnxRuntimeEngine, "_run", failing)
    monkeypatch.setattr(OnnxRuntimeEngine, "__init__", slowly)
    with ThreadPoolExecutor(1) as pool, service.channel() as channel:
        camera = Camera(channel)
        camera.say(hello=hello_of(operator, photographs[0], "porch"))
        camera.answer()
        porch = service.server.cameras.all()[0]
        (watching,) = watch(channel, porch, "veiled")
        still = pool.submit(get, f"{service.page}/recordings/camera.jpg?at=1000")
        assert begun.wait(20)
        camera.say(frame=packer.pack(frame_of(photographs[0], 1), 1)[0])
        until(lambda: porch.newest is not None and not porch.wanted())
        opened.set()
        assert still.result(20)[0] == 503
        assert camera.settled(1).shown == 0
        camera.say(frame=packer.pack(frame_of(photographs[1], 2), 2)[0])
        assert camera.shown(2).shown == next(watching).sequence == 2
    camera.bye()


def test_what_an_engine_took_and_the_one_in_its_place_does_not_is_refused(
    recorded: Path, start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    """A camera that is connected, and a recording."""
    before = load_catalogue([SHIPPED / "veil-r10.onnx"], "onnxruntime", 1)
    service = start_service(Settings(port=0, http=0, record=recorded.parent), before)
    after = load_catalogue([SHIPPED / "veil-r10.onnx"], "onnxruntime", 1)
    after.reconstructors[0].engine.most_blocks = 20
    problem = "hello.width and hello.height: 448×336, an engine here takes no side of more than 320"
    with service.channel() as channel:
        camera = Camera(channel)
        camera.say(hello=hello_of(operator, photographs[0], "porch"))
        camera.say(frame=Packer(operator, 0.1).pack(frame_of(photographs[0], 1), 1)[0])
        camera.settled(1)
        assert get(f"{service.page}/recordings/camera.jpg?at=1000")[0] == 200
        service.loop.call_soon_threadsafe(service.server.apply, service.server.settings, after)
        assert camera.refusal() == (grpc.StatusCode.RESOURCE_EXHAUSTED, problem)
        assert get(f"{service.page}/recordings/camera.jpg?at=1000")[:2] == (404, f"{problem}\n".encode())
        assert get(f"{service.page}/cameras/porch.jpg")[0] == 404
    with pytest.raises(RecordingError, match=f"vcseg: {problem}"):
        Recording(recorded, after, "veiled")


def test_a_recorded_still_that_is_no_longer_allowed_when_the_engine_has_it_ready_is_not_given(
    recorded: Path, start_service: StartService, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    service = start_service(Settings(port=0, http=0, record=recorded.parent, allow_plain=True))
    with ThreadPoolExecutor(1) as pool:
        still = pool.submit(get, f"{service.page}/recordings/camera.jpg?at=1000&rendition=plain")
        assert held.began.acquire(timeout=20)
        service.loop.call_soon_threadsafe(service.server.apply, Settings(port=0, http=0, record=recorded.parent))
        assert get(f"{service.page}/healthz")[0] == 200
        held.go()
        assert still.result(20)[:2] == (403, b"rendition: plain pictures are no longer given\n")


def test_spans_join_segments_and_show_gaps(tmp_path: Path, catalogue: Catalogue) -> None:
    store = Store(tmp_path, Retention())
    for start in (1, 3, 60):
        writer = SegmentWriter(store.place("porch", start * 10**9), HELLO)
        for number, frame in enumerate(frames(3)):
            frame.capture_time_ns = (start + number) * 10**9
            writer.append(frame, 1)
        writer.close()
    playback = Playback(store, catalogue)
    assert playback.spans("porch") == [(10**9, 5 * 10**9), (60 * 10**9, 62 * 10**9)]
    assert playback.spans("nobody") == []
    assert playback.at("nobody", 5) is None
    with pytest.raises(RecordingError, match="no reconstructor for operator 0000000000000000"):
        playback.at("porch", 5 * 10**9)


def told(*arguments: object) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "decoder", *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stderr


def test_a_film_has_every_picture_at_its_time(recorded: Path, tmp_path: Path, catalogue: Catalogue) -> None:
    code, output = told("export", recorded, tmp_path / "film.mp4", "--from", "1970-01-01T00:00:02")
    assert code == 0, output
    assert "7 veiled pictures" in output
    with av.open(str(tmp_path / "film.mp4")) as container:
        (stream,) = container.streams.video
        assert stream.codec_context.name == "h264"
        film = [(float(frame.time or 0), frame.to_ndarray(format="gray")) for frame in container.decode(stream)]
    assert [time for time, _ in film] == pytest.approx(range(7), abs=0.01)
    shots = list(Recording(recorded, catalogue, "veiled").shots(2_000_000_000))
    assert all(psnr(np.asarray(seen, np.uint8), shot.pixels) > 33 for (_, seen), shot in zip(film, shots, strict=True))


def test_a_recording_is_replayed_as_if_it_were_live(
    recorded: Path, catalogue: Catalogue, photographs: list[NDArray[np.uint8]]
) -> None:
    arguments = [
        *DECODE,
        "--log-json",
        "replay",
        str(recorded),
        "--speed",
        "10",
        "--loop",
        "--from",
        "1970-01-01T00:00:03",
    ]
    arguments += ["--engine", "onnxruntime"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        service = Running(process)
        request = pb.WatchRequest(camera="camera", encoding=pb.ENCODING_GRAY8)
        service.until("played 6 frames; again")
        with grpc.insecure_channel(service.address) as channel:
            seen = {}
            for picture in ViewersStub(channel).Watch(request, timeout=60):
                pixels = np.frombuffer(picture.data, np.uint8).reshape(picture.height, picture.width)
                seen[picture.capture_time_ns] = pixels
                if len(seen) >= 4:
                    break
        process.send_signal(signal.SIGINT)
        service.until("stopped")
    assert process.returncode == 0
    shots = {shot.capture_time_ns: shot.pixels for shot in Recording(recorded, catalogue, "veiled").shots()}
    assert all(np.array_equal(pixels, shots[time_ns]) for time_ns, pixels in seen.items())


def test_a_replay_of_a_single_frame_takes_its_time(recorded: Path) -> None:
    """And is of the veil alone, though plain pictures are allowed: there is no other reconstructor."""
    arguments = [*DECODE, "--log-json", "replay", str(recorded), "--loop", "--allow-plain", "--engine", "onnxruntime"]
    arguments += ["--to", "1970-01-01T00:00:02", "--reconstructor", str(SHIPPED / "veil-r10.onnx")]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        service = Running(process)
        service.until("played 1 frames; again")
        began = time.monotonic()
        for _ in range(2):
            service.until("played 1 frames; again")
        assert time.monotonic() - began > 1
        with grpc.insecure_channel(service.address) as channel:
            request = pb.WatchRequest(camera="camera")
            assert next(ViewersStub(channel).Watch(request, timeout=60)).rendition == pb.RENDITION_VEILED
        process.send_signal(signal.SIGINT)
        service.until("stopped")
    assert process.returncode == 0


def test_a_segment_that_a_kill_left_empty_is_left_out(
    recorded: Path, tmp_path: Path, catalogue: Catalogue, caplog: pytest.LogCaptureFixture
) -> None:
    """The service had made its file, and nothing was in it yet."""
    folder = shutil.copytree(recorded, tmp_path / "camera")
    empty = folder / "99999999999999999999.vcseg"
    empty.touch()
    assert Recording(folder, catalogue, "veiled").times() == Recording(recorded, catalogue, "veiled").times()
    assert f"left out: {empty}: 0 bytes are too few" in caplog.text
    with pytest.raises(RecordingError, match="0 bytes are too few"):
        Recording(empty, catalogue, "veiled")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["nowhere.vcseg", "film.mp4"], "nowhere.vcseg: No such file"),
        (["RECORDED", "film.avi"], "film.avi: expected a name that ends in .mp4"),
        (["RECORDED", "film.mp4", "--from", "1980-01-01"], "no pictures in that range of time"),
        (["EMPTY", "film.mp4"], "no segments (*.vcseg) there"),
        (["RECORDED", "film.mp4", "--reconstructor", "EMPTY"], "no reconstructor (*.onnx) there"),
    ],
)
def test_an_export_that_cannot_be_is_one_line(
    arguments: list[str], problem: str, recorded: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"RECORDED": recorded, "EMPTY": tmp_path / "empty", "film.mp4": tmp_path / "film.mp4"}
    code, output = told("export", *(places.get(argument, argument) for argument in arguments))
    assert code == 2
    lines = [line for line in output.splitlines() if "ERROR" in line]
    assert len(lines) == 1
    assert problem in lines[0]
    assert "Traceback" not in output
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["nowhere.vcseg"], "nowhere.vcseg: No such file"),
        (["EMPTY"], "no segments (*.vcseg) there"),
        (["RECORDED", "--from", "1980-01-01"], "no pictures in that range of time"),
        (["RECORDED", "--from", "1970-01-01T00:00:04", "--to", "1970-01-01T00:00:03"], "no pictures in that range"),
        (["ODD"], "1.vcseg: frame.payload: "),
    ],
)
def test_a_replay_that_cannot_be_is_one_line(
    arguments: list[str], problem: str, recorded: Path, tmp_path: Path, operator: Operator
) -> None:
    """The last one is only known to be odd by the service that it is played into."""
    (tmp_path / "empty").mkdir()
    writer = SegmentWriter(tmp_path / "1.vcseg", hello_of(operator, np.zeros((48, 64), np.uint8)))
    for frame in frames(2):
        writer.append(frame, 1)
    writer.close()
    places = {"RECORDED": recorded, "EMPTY": tmp_path / "empty", "ODD": tmp_path / "1.vcseg"}
    code, output = told(
        "replay", *(places.get(argument, argument) for argument in arguments), "--engine", "onnxruntime"
    )
    assert code == 2, output
    lines = [line for line in output.splitlines() if "ERROR" in line]
    assert len(lines) == 1
    assert problem in lines[0]
    assert "Traceback" not in output


def test_a_replay_whose_disk_goes_away_ends_with_one_line(recorded: Path, tmp_path: Path) -> None:
    shutil.copytree(recorded, tmp_path / "camera")
    arguments = [*DECODE, "--log-json", "replay", str(tmp_path / "camera"), "--speed", "8", "--loop"]
    with subprocess.Popen([*arguments, "--engine", "onnxruntime"], stderr=subprocess.PIPE, text=True) as process:
        service = Running(process)
        service.until("played 8 frames; again")
        shutil.rmtree(tmp_path / "camera")
        assert "vcseg: No such file or directory" in str(service.until("No such file")["message"])
    assert process.returncode == 2


def test_what_the_environment_tells_the_service_is_not_for_a_replay(recorded: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    environment = {**os.environ, "VEILCAM_RECORD": str(blocked), "VEILCAM_SAVE": str(blocked), "VEILCAM_BATCH": "0"}
    environment |= {"VEILCAM_HOST": "192.0.2.1", "VEILCAM_ENGINE": "onnxruntime"}
    arguments = [*DECODE, "--log-json", "replay", str(recorded), "--speed", "100"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=environment) as process:
        Running(process).until("played 8 frames")
        process.send_signal(signal.SIGINT)
    assert process.returncode == 0


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory, operator: Operator, photographs: list[NDArray[np.uint8]]) -> Path:
    """A hundred and twenty pictures, 30 a second, in a folder whose name a shell would take apart."""
    packer = Packer(operator, 0.1)
    path = tmp_path_factory.mktemp("it's long") / "1.vcseg"
    writer = SegmentWriter(path, hello_of(operator, photographs[0]))
    for number in range(120):
        time_ns = 10**9 + number * 33_333_333
        writer.append(packer.pack(frame_of(photographs[number // 15], time_ns), number + 1)[0], time_ns)
    writer.close()
    return path


def started(*arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "decoder", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def pictures(film: Path) -> list[tuple[int, NDArray[np.uint8]]]:
    """Of a film: milliseconds since its first one, and pixels."""
    with av.open(str(film)) as container:
        frames = list(container.decode(video=0))
    return [
        (round(float(each.time or 0) * 1000), np.asarray(each.to_ndarray(format="gray"), np.uint8)) for each in frames
    ]


def midway(folder: Path) -> None:
    """Return while a film is being written into a folder."""
    until(lambda: bool(list(folder.glob("*.partial"))), 30)
    time.sleep(0.1)


def test_a_film_that_is_stopped_again_from_its_beginning_is_another_part(long: Path, tmp_path: Path) -> None:
    written = b""
    for count in (1, 2):
        with started("export", long, tmp_path / "film.mp4", "--engine", "onnxruntime", "--threads", "1") as process:
            midway(tmp_path)
            process.send_signal(signal.SIGTERM)
            assert process.stderr is not None
            output = process.stderr.read()
        assert f"film.part{count}.mp4: " in output
        assert f"film.part{count + 1}.mp4 --from" in output
        written = written or (tmp_path / "film.part1.mp4").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.part1.mp4", "film.part2.mp4"]
    assert (tmp_path / "film.part1.mp4").read_bytes() == written


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_film_that_is_stopped_goes_on_with_the_command_that_is_told(
    number: signal.Signals, long: Path, tmp_path: Path, catalogue: Catalogue
) -> None:
    """Stopped twice: the three parts have every picture once, at its time, and no film is there that isn't whole."""
    options = ["--to", "1970-01-01T00:00:03.500000", "--engine", "onnxruntime", "--threads", "1"]
    arguments = ["export", str(long), str(tmp_path / "my film.mp4"), *options]
    parts = [tmp_path / f"my film.part{part}.mp4" for part in (1, 2, 3)]
    for count in (1, 2):
        with started(*arguments) as process:
            midway(tmp_path)
            process.send_signal(number)
            assert process.stderr is not None
            output = process.stderr.read()
        assert process.returncode == 1, output
        assert sorted(tmp_path.iterdir()) == parts[:count]
        (line,) = [line for line in output.splitlines() if "ERROR" in line]
        name, *arguments = shlex.split(line.partition("to go on: ")[2])
        assert (name, arguments[:4]) == ("veilcam-decode", ["export", str(long), str(parts[count]), "--from"])
        assert arguments[5:] == options
    code, output = told(*arguments)
    assert code == 0, output
    assert sorted(tmp_path.iterdir()) == parts
    films = [pictures(part) for part in parts]
    shots = list(Recording(long, catalogue, "veiled").shots(0, 3_500_000_000))
    assert sum(map(len, films)) == len(shots) == 76
    rest = iter(shots)
    for film in films:
        of_film = [next(rest) for _ in film]
        for (time_ms, seen), shot in zip(film, of_film, strict=True):
            since_ns = shot.capture_time_ns - of_film[0].capture_time_ns
            assert time_ms == pytest.approx(since_ns / 1e6, abs=1.1)
            assert psnr(seen, shot.pixels) > 33


def test_a_film_whose_writing_was_killed_is_not_there_and_can_be_written_again(long: Path, tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    arguments = ("export", long, film, "--engine", "onnxruntime", "--to", "1970-01-01T00:00:03")
    with started(*arguments) as process:
        midway(tmp_path)
        process.kill()
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4.partial"]
    code, output = told(*arguments)
    assert code == 0, output
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]
    assert len(pictures(film)) == 61


def test_a_film_that_is_interrupted_twice_leaves_nothing(long: Path, tmp_path: Path) -> None:
    with started("export", long, tmp_path / "film.mp4", "--engine", "onnxruntime") as process:
        midway(tmp_path)
        assert process.stderr is not None
        while list(tmp_path.glob("*.partial")):
            process.send_signal(signal.SIGINT)
            time.sleep(0.005)
        output = process.stderr.read()
    assert process.returncode == 1
    assert "interrupted; nothing was written" in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "there", "expected"),
    [
        ("a.mp4", [], "a.part1.mp4"),
        ("a.mp4", ["a.mp4", "a.part1.mp4", "a.part2.mp4", "a.part4.mp4"], "a.part3.mp4"),
        ("a.part2.mp4", [], "a.part2.mp4"),
        ("a.part9.mp4", ["a.part9.mp4"], "a.part10.mp4"),
        (".part1.mp4", [".part1.part1.mp4"], ".part1.part2.mp4"),
    ],
)
def test_parts_are_counted_and_none_is_written_over(name: str, there: list[str], expected: str, tmp_path: Path) -> None:
    for each in there:
        (tmp_path / each).touch()
    assert free_part(tmp_path / name) == tmp_path / expected


def test_a_camera_that_changes_its_size_is_told_with_the_time_to_part_the_film_at(tmp_path: Path) -> None:
    shots = [
        Shot(1_000_000_000, np.zeros((32, 48), np.uint8)),
        Shot(61_500_000_999, np.zeros((48, 32), np.uint8)),
    ]
    when = "1970-01-01T00:01:01.500000"
    with pytest.raises(
        RecordingError, match=f"from 48×32 to 32×48 at {when}; export a film --to {when}, and one --from"
    ):
        write_film(shots, tmp_path / "film.mp4")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="No such file or directory"):
        write_film(shots[:1], tmp_path / "nowhere" / "film.mp4")
