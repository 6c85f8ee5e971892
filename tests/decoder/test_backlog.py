"""A backlog: recorded once whatever comes twice, in order of capture, after a restart too; never shown; checked."""

import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from decoder.admission import next_levels
from decoder.catalogue import Catalogue
from decoder.recordings.ends import SegmentLimits
from decoder.recordings.playback import Playback
from decoder.recordings.recorder import Recorder
from decoder.recordings.store import Retention, Store
from decoder.settings import Settings
from encoder.packing import Packer
from encoder.sampling import Operator
from protos.segment import Segment, SegmentWriter, index_of
from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import CamerasStub
from tests.conftest import Service, StartService, frame_of, hello_of
from tests.decoder.peers import Camera, known_of
from tests.decoder.test_web import get
from tests.waiting import wait_for


def said(operator: Operator, picture: NDArray[np.uint8], epoch: int = 5) -> pb.Hello:
    hello = hello_of(operator, picture)
    hello.epoch = epoch
    return hello


def backlog(service: Service, hello: pb.Hello, frames: list[pb.Frame]) -> pb.BacklogResponse:
    def requests() -> Iterator[pb.PublishRequest]:
        yield pb.PublishRequest(hello=hello)
        yield from (pb.PublishRequest(frame=frame) for frame in frames)

    with service.channel() as channel:
        response: pb.BacklogResponse = CamerasStub(channel).Backlog(requests(), timeout=30)
        return response


def recorded(folder: Path) -> list[pb.Frame]:
    paths = sorted(folder.glob("*/*.vcseg"))
    return [frame for path in paths for frame, _ in Segment(path).frames()]


def kept(camera: Camera, sequence: int) -> list[tuple[int, int]]:
    """What a camera is told to be kept, until this frame is."""
    told: list[tuple[int, int]] = []
    while not any(first <= sequence <= last for first, last in told):
        told += [(each.first, each.last) for each in camera.answer().acknowledgement.kept]
    return told


@pytest.fixture
def alike(operator: Operator, photographs: list[NDArray[np.uint8]]) -> list[pb.Frame]:
    """Four frames, each but the first a difference to the one before, and a key frame after them."""
    packer = Packer(operator, 0.1)
    made = [
        packer.pack(frame_of(picture, number * 10**9), number, key=number == 5)[0]
        for number, picture in enumerate([*photographs[:4], photographs[0]], 1)
    ]
    assert [frame.base_sequence for frame in made] == [0, 1, 2, 3, 0]
    return made


def test_what_comes_twice_is_recorded_once_and_plays(
    start_service: StartService,
    operator: Operator,
    catalogue: Catalogue,
    photographs: list[NDArray[np.uint8]],
    alike: list[pb.Frame],
    tmp_path: Path,
) -> None:
    """Two frames live, all four late, twice, and once more after a restart: the third is built on one that isn't
    in its segment, and plays all the same."""
    hello = said(operator, photographs[0])
    service = start_service(Settings(port=0, http=0, record=tmp_path))
    camera = Camera(service.channel())
    camera.say(hello=hello)
    for frame in alike[:2]:
        camera.say(frame=frame)
        camera.settled(frame.sequence)
    assert kept(camera, 2) == [(1, 2)]
    assert backlog(service, hello, alike[:4]) == pb.BacklogResponse(recorded=2, repeated=2)
    assert backlog(service, hello, alike[:4]) == pb.BacklogResponse(recorded=0, repeated=4)
    known = known_of(service)
    assert known.tally.received == 2
    told = get(f"{service.page}/metrics")[1].decode()
    assert 'veilcam_backlog_frames_total{camera="camera"} 2.0' in told
    assert 'veilcam_repeated_frames_total{camera="camera"} 6.0' in told
    camera.bye()
    service.stop()
    service = start_service(Settings(port=0, http=0, record=tmp_path))
    camera = Camera(service.channel())
    camera.say(hello=hello)
    camera.say(frame=alike[4])
    camera.settled(5)
    assert backlog(service, hello, alike[:4]) == pb.BacklogResponse(recorded=0, repeated=4)
    camera.bye()
    assert kept(camera, 5) == [(5, 5)]
    service.stop()
    assert [(frame.sequence, frame.base_sequence) for frame in recorded(tmp_path)] == [
        (1, 0), (2, 1), (3, 0), (4, 3), (5, 0)
    ]  # fmt: skip
    playback = Playback(Store(tmp_path, Retention()), catalogue)
    for number, picture in enumerate(photographs[:4], 1):
        moment = playback.at("camera", number * 10**9)
        assert moment is not None
        assert np.array_equal(moment.levels, operator.quantise(operator.sample(picture, 26), (21, 28)))


def test_another_run_of_the_same_camera_is_not_taken_for_this_one(
    start_service: StartService,
    operator: Operator,
    photographs: list[NDArray[np.uint8]],
    alike: list[pb.Frame],
    tmp_path: Path,
) -> None:
    service = start_service(Settings(port=0, http=0, record=tmp_path))
    camera = Camera(service.channel())
    camera.say(hello=said(operator, photographs[0], 6))
    camera.say(frame=alike[4])
    camera.settled(5)
    assert backlog(service, said(operator, photographs[0], 5), alike).recorded == 5
    camera.bye()


def test_a_frame_that_is_sent_again_is_neither_shown_nor_recorded_twice(
    start_service: StartService,
    operator: Operator,
    photographs: list[NDArray[np.uint8]],
    alike: list[pb.Frame],
    tmp_path: Path,
) -> None:
    service = start_service(Settings(port=0, http=0, record=tmp_path, save=tmp_path / "saved"))
    for frames in (alike[:1], alike[:2]):
        camera = Camera(service.channel())
        camera.say(hello=said(operator, photographs[0]))
        for frame in frames:
            camera.say(frame=frame)
            camera.settled(frame.sequence)
        camera.bye()
        wait_for(lambda: service.server.cameras.all()[0].stream is None, "the end of its stream")
    known = service.server.cameras.all()[0]
    assert (known.tally.received, known.tally.fates["repeated"], known.tally.fates["shown"]) == (3, 1, 2)
    service.stop()
    assert [(f.sequence, f.base_sequence) for f in recorded(tmp_path)] == [(1, 0), (2, 0)]


def test_where_nothing_is_recorded_what_was_received_is_kept(
    start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]], alike: list[pb.Frame]
) -> None:
    service = start_service()
    camera = Camera(service.channel())
    camera.say(hello=said(operator, photographs[0]))
    camera.say(frame=alike[0])
    assert kept(camera, 1) == [(1, 1)]
    with pytest.raises(grpc.RpcError, match="server: nothing is recorded here"):
        backlog(service, said(operator, photographs[0]), alike[:1])
    camera.bye()


@pytest.mark.parametrize(
    ("change", "status", "told"),
    [
        ("nothing", None, ""),
        ("no run", "INVALID_ARGUMENT", "hello.epoch: 0"),
        ("not publishing", "FAILED_PRECONDITION", "hello.camera: 'yard' isn't publishing"),
        ("operator", "NOT_FOUND", "hello.operator_id: 'ffff"),
        ("no base", "INVALID_ARGUMENT", "frame.base_sequence: 1 isn't the frame before"),
        ("out of order", "INVALID_ARGUMENT", "frame.sequence: 1 after 5"),
        ("large", "RESOURCE_EXHAUSTED", "frame.payload: 52000 bytes, this server allows 50000"),
        ("damaged", "INVALID_ARGUMENT", "frame.payload: crc"),
        ("size", "RESOURCE_EXHAUSTED", "hello.width and hello.height"),
    ],
)
def test_a_backlog_is_checked_as_what_is_live(
    change: str,
    status: str | None,
    told: str,
    start_service: StartService,
    operator: Operator,
    photographs: list[NDArray[np.uint8]],
    alike: list[pb.Frame],
    tmp_path: Path,
) -> None:
    service = start_service(Settings(port=0, http=0, record=tmp_path, max_payload=50_000))
    camera = Camera(service.channel())
    hello, frames = said(operator, photographs[0]), alike
    camera.say(hello=hello)
    camera.answer()
    if change == "no run":
        hello.epoch = 0
    elif change == "not publishing":
        hello.camera = "yard"
    elif change == "operator":
        hello.operator_id = "f" * 16
    elif change == "size":
        hello.width = 60_000
    elif change == "no base":
        frames = alike[1:]
    elif change == "out of order":
        frames = [alike[4], alike[0]]
    elif change == "large":
        frames[0].payload = b"\0" * 52_000
    elif change == "damaged":
        frames[0].payload = frames[0].payload[:-1] + bytes([frames[0].payload[-1] ^ 1])
    if status is None:
        assert backlog(service, hello, frames).recorded == 5
    else:
        with pytest.raises(grpc.RpcError) as error:
            backlog(service, hello, frames)
        assert isinstance(error.value, grpc.Call)
        assert error.value.code().name == status
        assert told in (error.value.details() or "")
        assert len(recorded(tmp_path)) == (change == "out of order")
    camera.bye()


@pytest.fixture(scope="module")
def drawn(operator: Operator) -> list[NDArray[np.uint8]]:
    noise = np.random.default_rng(3)
    steady = noise.integers(60, 180, (32, 32))
    return [np.asarray(steady + noise.integers(0, 9, (32, 32)), np.uint8) for _ in range(16)]


def refusing(monkeypatch: pytest.MonkeyPatch) -> list[OSError]:
    """Errors that the disk answers with, one each time that data is to be brought onto it; none are left at first."""
    refuses: list[OSError] = []

    def fsync(descriptor: int) -> None:
        if refuses:
            raise refuses.pop()

    monkeypatch.setattr("protos.segment.os.fsync", fsync)
    return refuses


def late(recorder: Recorder, hello: pb.Hello, frames: list[pb.Frame]) -> str | None:
    """Offer a backlog as the service does: each frame once the one before is done, then flush; what that tells."""
    track, levels, told = recorder.begin_late(hello), None, queue.SimpleQueue[str | None]()
    for frame in frames:
        levels = next_levels(frame, hello, 16, levels)
        recorder.offer_late(track, frame, levels, 1, told.put)
        assert told.get(timeout=20) is None
    recorder.flush_late(track, told.put)
    return told.get(timeout=20)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_was_live_and_comes_late_again_and_again_is_recorded_once_in_order_and_whole(
    operator: Operator,
    drawn: list[NDArray[np.uint8]],
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Any frames are sent live, the others held back; backlogs come in any order, over again, and after restarts."""
    folder = tmp_path_factory.mktemp("recordings")
    packer, hello = Packer(operator, 0.1), said(operator, drawn[0])
    assert packer.operator.block == 16
    live = data.draw(st.lists(st.booleans(), min_size=16, max_size=16))
    frames = []
    for number, picture in enumerate(drawn, 1):
        resumes = live[number - 1] and number > 1 and not live[number - 2]
        frame, _ = packer.pack(frame_of(picture, number * 1000), number, key=resumes or number % 5 == 0)
        frame.backlog_before = resumes
        frames.append(frame)
    keys = [place for place, frame in enumerate(frames) if not frame.base_sequence]
    recorder = Recorder(Store(folder, Retention()))
    recorder.begin(hello, lambda: None)
    first_late = data.draw(st.integers(0, 16))
    for place, frame in enumerate(frames):
        if live[place]:
            recorder.offer("camera", frame, 1)
        if place == first_late:
            late(recorder, hello, frames[: place + 1])
    for _ in range(data.draw(st.integers(0, 3))):
        if data.draw(st.booleans()):
            recorder.close()
            recorder = Recorder(Store(folder, Retention()))
            recorder.begin(hello, lambda: None)
        begin = data.draw(st.sampled_from(keys))
        late(recorder, hello, frames[begin : data.draw(st.integers(begin + 1, 16))])
    late(recorder, hello, frames)
    recorder.close()
    told = recorded(folder)
    assert [frame.sequence for frame in told] == list(range(1, 17))
    levels = None
    for before, frame, picture in zip([None, *told], told, drawn, strict=False):
        assert not frame.base_sequence or (before is not None and frame.base_sequence == before.sequence)
        levels = next_levels(frame, hello, 16, levels)
        assert np.array_equal(levels, operator.quantise(operator.sample(picture, 26), (2, 2)))
    for path in folder.glob("*/*.vcseg"):
        assert next(Segment(path).frames())[0].kind == pb.FRAME_KIND_KEY
        assert index_of(path).exists()


def test_backlogs_from_before_and_after_what_was_live_lie_on_both_sides_of_it(
    operator: Operator, drawn: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    packer, hello = Packer(operator, 0.1), said(operator, drawn[0])
    frames = [packer.pack(frame_of(p, n * 1000), n, key=n % 4 == 1)[0] for n, p in enumerate(drawn, 1)]
    recorder = Recorder(Store(tmp_path, Retention()))
    recorder.begin(hello, lambda: None)
    for frame in frames[4:8]:
        recorder.offer("camera", frame, 1)
    for part in (frames[:4], frames[8:12], frames[12:]):
        late(recorder, hello, part)
    recorder.close()
    assert [frame.sequence for frame in recorded(tmp_path)] == list(range(1, 17))
    assert len(list(tmp_path.glob("*/*.vcseg"))) == 3


def test_frames_that_a_slow_disk_dropped_come_late_and_lie_where_they_belong(
    operator: Operator, drawn: list[NDArray[np.uint8]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packer, hello = Packer(operator, 0.1), said(operator, drawn[0])
    frames = [packer.pack(frame_of(p, n * 1000), n, key=n % 4 == 1)[0] for n, p in enumerate(drawn, 1)]
    told: list[int] = []
    recorder = Recorder(Store(tmp_path, Retention()), waiting=2 * len(frames[0].payload))
    recorder.begin(hello, lambda: None, told.extend)
    with monkeypatch.context() as slowly:
        taken = Recorder._take

        def take(self: Recorder, offer: object) -> None:
            time.sleep(0.03)
            taken(self, offer)  # type: ignore[arg-type]

        slowly.setattr(Recorder, "_take", take)
        for frame in frames:
            recorder.offer("camera", frame, 1)
            time.sleep(0.01)
    assert recorder.told()["camera"].dropped > 0
    late(recorder, hello, frames)
    recorder.close()
    assert [frame.sequence for frame in recorded(tmp_path)] == list(range(1, 17))
    assert told == sorted(told)
    assert len(told) < 16


def test_what_the_disk_refused_is_recorded_anew_before_it_is_called_kept(
    operator: Operator, drawn: list[NDArray[np.uint8]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells once that data didn't reach the disk; nothing later proves that it did."""
    synced: list[int] = []
    refuses = [OSError(5, "Input/output error")]

    def fsync(descriptor: int) -> None:
        if refuses:
            raise refuses.pop()
        synced.append(descriptor)

    monkeypatch.setattr("protos.segment.os.fsync", fsync)
    hello, kept = said(operator, drawn[0]), list[int]()
    recorder = Recorder(Store(tmp_path, Retention(free_megabytes=0)))
    recorder.begin(hello, lambda: None, kept.extend)
    frame = Packer(operator, 0.1).pack(frame_of(drawn[0]), 1)[0]
    recorder.offer(hello.camera, frame, 1)
    ended = threading.Event()
    recorder.end(hello.camera, lambda _: ended.set())
    assert ended.wait(20)
    assert not kept
    recorder.begin(hello, lambda: None, kept.extend)
    late(recorder, hello, [frame])
    assert synced
    assert len(recorded(tmp_path)) == 2, "what was refused may be there all the same"
    recorder.close()


def test_what_the_disk_refused_while_a_backlog_was_flushed_is_not_called_kept(
    operator: Operator, drawn: list[NDArray[np.uint8]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backlog repeats a frame of the live segment, and so flushes that too."""
    refuses = refusing(monkeypatch)
    refuses.append(OSError(5, "Input/output error"))
    hello, kept = said(operator, drawn[0]), list[int]()
    recorder = Recorder(Store(tmp_path, Retention(free_megabytes=0)))
    recorder.begin(hello, lambda: None, kept.extend)
    frame = Packer(operator, 0.1).pack(frame_of(drawn[0]), 1)[0]
    recorder.offer(hello.camera, frame, 1)
    late(recorder, hello, [frame])
    assert not refuses
    ended = threading.Event()
    recorder.end(hello.camera, lambda _: ended.set())
    assert ended.wait(20)
    recorder.close()
    assert not kept


def test_a_backlog_of_which_the_disk_refused_a_segment_is_not_called_kept(
    operator: Operator, drawn: list[NDArray[np.uint8]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first segment ends, and is refused, while the backlog goes on; sent again, all of it is there."""
    refuses = refusing(monkeypatch)
    refuses.append(OSError(5, "Input/output error"))
    packer, hello = Packer(operator, 0.1), said(operator, drawn[0])
    frames = [packer.pack(frame_of(p, n * 10**9), n, key=n % 4 == 1)[0] for n, p in enumerate(drawn[:8], 1)]
    recorder = Recorder(Store(tmp_path, Retention(free_megabytes=0)), SegmentLimits(seconds=2.0))
    recorder.begin(hello, lambda: None)
    assert late(recorder, hello, frames) == "Input/output error"
    assert not refuses
    assert late(recorder, hello, frames) is None
    recorder.close()
    for path in tmp_path.glob("*/*.vcseg"):  # what was refused may be there all the same, twice then
        times = [frame.sequence for frame, _ in Segment(path).frames()]
        assert times in ([1, 2, 3, 4], [5, 6, 7, 8])
    assert {frame.sequence for frame in recorded(tmp_path)} == set(range(1, 9))
    assert len(recorded(tmp_path)) == 12


def test_what_the_disk_refused_of_a_live_stream_comes_late_and_lies_where_it_belongs(
    operator: Operator, drawn: list[NDArray[np.uint8]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second frame fails while a key frame waits behind it, and another is refused at the door after that."""
    packer, hello = Packer(operator, 0.1), said(operator, drawn[0])
    frames = [packer.pack(frame_of(p, n * 1000), n, key=n in (1, 3, 5))[0] for n, p in enumerate(drawn[:8], 1)]
    offered, append, refuses = threading.Event(), SegmentWriter.append, [OSError(5, "Input/output error")]

    def failing(self: SegmentWriter, frame: pb.Frame, received_ns: int) -> None:
        if frame.sequence == 2 and refuses:
            assert offered.wait(20)
            raise refuses.pop()
        append(self, frame, received_ns)

    monkeypatch.setattr(SegmentWriter, "append", failing)
    recorder = Recorder(Store(tmp_path, Retention(free_megabytes=0)))
    recorder.begin(hello, lambda: None)
    assert all(recorder.offer("camera", frame, 1) for frame in frames[:3])
    offered.set()
    wait_for(lambda: recorder.told()["camera"].frames == 2, "the key frame after the one that failed")
    assert [recorder.offer("camera", frame, 1) for frame in frames[3:]] == [False, True, True, True, True]
    again = Packer(operator, 0.1)
    keys = [again.pack(frame_of(drawn[n - 1], n * 1000), n, key=True)[0] for n in (2, 4)]
    assert late(recorder, hello, keys) is None
    recorder.close()
    assert [frame.sequence for frame in recorded(tmp_path)] == list(range(1, 9))


def test_a_backlog_that_repeats_live_frames_which_the_disk_then_refused_is_not_called_kept(
    operator: Operator, drawn: list[NDArray[np.uint8]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The live segment is flushed by itself, and refused, between the backlog's frames and its own flush."""
    refuses = refusing(monkeypatch)
    hello, told = said(operator, drawn[0]), queue.SimpleQueue[str | None]()
    recorder = Recorder(Store(tmp_path, Retention(free_megabytes=0)))
    recorder.begin(hello, lambda: None)
    frame = Packer(operator, 0.1).pack(frame_of(drawn[0]), 1)[0]
    recorder.offer("camera", frame, 1)
    track = recorder.begin_late(hello)
    recorder.offer_late(track, frame, next_levels(frame, hello, 16, None), 1, told.put)
    assert told.get(timeout=20) is None
    refuses.append(OSError(5, "Input/output error"))
    recorder.end("camera")
    recorder.flush_late(track, told.put)
    assert told.get(timeout=20) == "Input/output error"
    recorder.begin(hello, lambda: None)
    assert late(recorder, hello, [frame]) is None
    recorder.close()
