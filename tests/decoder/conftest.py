"""What tests of the service share: frames to send, engines that are held, a recording, and people with roles."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from decoder.access.keys import init
from decoder.access.people import Person, hash_password, hash_token, write_people
from decoder.engines.onnx_runtime import OnnxRuntimeEngine
from decoder.settings import Settings
from encoder.packing import Packer
from encoder.sampling import Operator
from protos.segment import SegmentWriter
from protos.v1 import veilcam_pb2 as pb
from tests.conftest import Service, StartService, frame_of, hello_of
from tests.decoder.guarded import CAPTURED_MS, PASSWORD, PEOPLE, TOKENS, Guarded, Keys
from tests.decoder.peers import TIMEOUT, Camera


@pytest.fixture
def channel(service: Service) -> Iterator[grpc.Channel]:
    with service.channel() as channel:
        yield channel


@pytest.fixture
def camera(channel: grpc.Channel, operator: Operator, photographs: list[NDArray[np.uint8]]) -> Camera:
    """One named camera, 448×336, that the service has taken."""
    camera = Camera(channel)
    camera.say(hello=hello_of(operator, photographs[0]))
    camera.answer()
    return camera


@pytest.fixture
def messages(operator: Operator, photographs: list[NDArray[np.uint8]]) -> list[pb.Frame]:
    packer = Packer(operator, 0.1)
    return [packer.pack(frame_of(picture, time.time_ns()), i)[0] for i, picture in enumerate(photographs, 1)]


class Held:
    """Engines that begin, and go on when they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began, self._go, run = threading.Semaphore(0), threading.Semaphore(0), OnnxRuntimeEngine._run

        def held(engine: OnnxRuntimeEngine, measurements: NDArray[np.int8]) -> NDArray[np.uint8]:
            if measurements.any():  # else it is only timed
                self.began.release()
                assert self._go.acquire(timeout=TIMEOUT)
            return run(engine, measurements)

        monkeypatch.setattr(OnnxRuntimeEngine, "_run", held)

    def go(self, runs: int = 1) -> None:
        self._go.release(runs)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held = Held(monkeypatch)
    yield held
    held.go(1000)


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


@pytest.fixture(scope="session")
def hashed() -> str:
    return hash_password(PASSWORD)


@pytest.fixture
def guarded(
    start_service: StartService, tmp_path: Path, hashed: str, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> Iterator[Guarded]:
    init(tmp_path / "keys", cameras=["porch", "yard", "gate"], programs=["nvr", "ghost"])
    keys, users = Keys(tmp_path / "keys"), tmp_path / "users.toml"
    people = {
        name: Person(name, each.role, each.cameras, hashed, {"test": hash_token(TOKENS[name])})
        for name, each in PEOPLE.items()
    }
    write_people(users, people)
    settings = keys.settings(users=users, allow_plain=True, record=tmp_path / "recordings")
    guarded = Guarded(start_service(settings), keys, users, [])
    for name in ("porch", "yard"):
        camera = Camera(guarded.channel(f"cameras/{name}"))
        camera.say(hello=hello_of(operator, photographs[0], name))
        camera.say(frame=Packer(operator, 0.1).pack(frame_of(photographs[0], CAPTURED_MS * 10**6), 1)[0])
        camera.settled(1)
        guarded.cameras.append(camera)
    yield guarded
    for connection in guarded.connections:
        connection.close()


@pytest.fixture
def plain_door(start_service: StartService, tmp_path: Path) -> Guarded:
    """On loopback without TLS, with users of whom none can sign in."""
    write_people(tmp_path / "users.toml", PEOPLE)
    service = start_service(Settings(port=0, http=0, users=tmp_path / "users.toml"))
    return Guarded(service, Keys(tmp_path / "keys"), tmp_path / "users.toml", [], tls=False)
