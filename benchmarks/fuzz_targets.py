"""What is fuzzed: every reader of something that may come damaged or hostile, and sound inputs to begin with.

A target takes any bytes and reads them as its reader would meet them. The reader's own documented error is an answer;
any other exception goes through. Checksums are mended on the way, or nothing behind them would ever be reached.
"""

import io
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError

from decoder.access import AccessError
from decoder.access.people import read_people
from decoder.admission import Policy, Refusal, check_frame, check_hello, next_levels
from decoder.settings import SettingsError, read_settings
from encoder.sampling import Operator, OperatorError, finest_steps
from protos.payload import Payload, PayloadError, Plane
from protos.segment import Segment, SegmentError, SegmentWriter, index_of, key_of, last_entry, with_base
from protos.v1 import veilcam_pb2 as pb
from train import settings as runs

_CRC = struct.Struct("<I")
_OPERATOR_ID = "0123456789abcdef"
_BLOCK, _GRID = 4, (2, 3)
_POLICY = Policy(cameras=1, pixels=1 << 16, payload_bytes=1 << 16, batch=1, allow_plain=False)
_HELLO = pb.Hello(camera="porch", operator_id=_OPERATOR_ID, width=12, height=8, frame_rate=10)
_MEMBERS = ("format", "block", "phi", "steps")


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        read: given any bytes, and a folder of its own for files.
        seeds: the sound inputs that fuzzing begins with, the same in every run.
    """

    read: Callable[[bytes, Path], None]
    seeds: Callable[[], list[bytes]]


def _payload(data: bytes, _: Path) -> None:
    for each in (data, _sealed(data)):
        with suppress(PayloadError):
            Payload.unpack(each, max_measurements=1 << 16)


def _payloads() -> list[bytes]:
    return [frame.payload for frame in _frames()]


def _message(data: bytes, _: Path) -> None:
    with suppress(DecodeError, Refusal):
        check_hello(pb.Hello.FromString(data))
    with suppress(DecodeError, Refusal):
        frame = pb.Frame.FromString(data)
        frame.payload = _sealed(frame.payload)
        check_frame(frame, 0, _POLICY)
        next_levels(frame, _HELLO, _BLOCK, np.zeros((2, *_GRID), np.int8))


def _messages() -> list[bytes]:
    return [each.SerializeToString() for each in (_HELLO, *_frames())]


def _segment(data: bytes, folder: Path) -> None:
    """First two bytes: how long the index is, which comes last, and by the lowest bit whether to mend checksums."""
    (told,) = struct.unpack("<H", data[:2].ljust(2, b"\0"))
    content, rows = (data[2 : len(data) - told // 2], data[len(data) - told // 2 :]) if told // 2 else (data[2:], b"")
    path = folder / "1.vcseg"
    path.write_bytes(_mended(content) if told & 1 else content)
    index_of(path).write_bytes(rows)
    with suppress(SegmentError):
        segment = Segment(path)
        entries = segment.entries()
        for start in (None, *[entry.offset for entry in entries if entry.key][:3]):
            for _ in with_base(segment.frames(start)):
                pass
        for entry in entries[:3]:
            key_of(entries, entry.sequence)
        last_entry(path)


def _segments() -> list[bytes]:
    seeds = []
    with tempfile.TemporaryDirectory() as folder:
        for count in (0, 1, 4):
            path = Path(folder) / f"{count}.vcseg"
            writer = SegmentWriter(path, _HELLO)
            for frame in _frames()[:count]:
                writer.append(frame, frame.capture_time_ns + 5)
            writer.close()
            rows = index_of(path).read_bytes()
            seeds += [
                struct.pack("<H", len(rows) << 1 | mend) + path.read_bytes() + rows for mend in (0, 1)
            ]  # fmt: skip
    return seeds


def _operator(data: bytes, folder: Path) -> None:
    """First byte: whether a whole file follows, or the arrays in it, each after its length in two bytes."""
    path = folder / "1.npz"
    path.write_bytes(_archive(data[1:]) if data[:1] == b"\1" else data[1:])
    with suppress(OperatorError):
        Operator.load(path)


def _operators() -> list[bytes]:
    phi = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 3)))[0].T.astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "1.npz"
        Operator(phi, finest_steps(phi), 2).save(path)
        with zipfile.ZipFile(path) as archive:
            arrays = [archive.read(f"{name}.npy") for name in _MEMBERS]
        return [b"\0" + path.read_bytes(), b"\1" + b"".join(struct.pack("<H", len(a)) + a for a in arrays)]


def _settings(data: bytes, folder: Path) -> None:
    path = folder / "settings.toml"
    path.write_bytes(data)
    with suppress(SettingsError):
        read_settings(path, {}, {})


def _settings_files() -> list[bytes]:
    return [
        b'host = "127.0.0.1"\nport = 50051\nhttp = 8080\nthreads = 4\nallow_plain = true\n',
        b'record = "/r"\nrecord_hours = 1.5\nrecord_megabytes = 100\nreconstructor = ["a", "b"]\nlog_json = false\n',
        b'certificate = "c.pem"\nkey = "k.pem"\nclient_ca = """\nx"""\nusers = \'u\'\nmax_pixels = 0x10_00\n',
        b"[engine]\na = 1979-05-27T07:32:00Z\nb = [1, 2.0e3, {c = inf}]\n[[x]]\ny.z = nan\n",
    ]


def _people(data: bytes, folder: Path) -> None:
    path = folder / "users.toml"
    path.touch(0o600)
    path.write_bytes(data)
    with suppress(AccessError):
        read_people(path)


def _people_files() -> list[bytes]:
    token = "0" * 64
    return [
        b'[users."anna"]\nrole = "viewer"\ncameras = ["porch", "*"]\npassword = "$argon2id$v=19$m=8,t=3,p=4$YQ$YQ"\n',
        f'[users.bob]\nrole = "admin"\n[users.bob.tokens]\n"phone" = "{token}"\n'.encode(),
    ]


def _run(data: bytes, folder: Path) -> None:
    path = folder / "run.toml"
    path.write_bytes(data)
    for read in (runs.read_run, runs.read_measurement):
        with suppress(runs.SettingsError):
            read(path)


def _run_files() -> list[bytes]:
    return [
        b'kind = "plain"\nratio = 0.1\nblock = 16\niterations = 100\nextends = ""\n',
        b'kind = "veil"\nextends = "plain"\nreaders = ["mobilenet_v2"]\nalpha = 1e2\nwarm_up = 50\n',
        b'kind = "ensemble"\ndata = "mnist"\nsurrogates = ["a", "b"]\npurified = false\ntarget = "uniform"\n',
        b'kind = "csnet"\ndrops = [10, 20]\nstart = "principal"\nseed = 3\n',
        b'kind = "measurement"\npurified = ["*"]\nretrained = ["csnet-*"]\nscratch = true\n',
    ]


TARGETS = {
    "payload": Target(_payload, _payloads),
    "message": Target(_message, _messages),
    "segment": Target(_segment, _segments),
    "operator": Target(_operator, _operators),
    "settings": Target(_settings, _settings_files),
    "users": Target(_people, _people_files),
    "run": Target(_run, _run_files),
}


def _frames() -> list[pb.Frame]:
    frames = []
    for index in range(4):
        values = (np.arange(2 * _GRID[0] * _GRID[1]).reshape(2, *_GRID) * (7 + index) % 23 - 11).astype(np.int16)
        values[0, 0, 0] = (100, -128, 0, 300)[index]
        frame = pb.Frame(sequence=index + 1, capture_time_ns=10**18 + index, planes=[pb.PLANE_KIND_LUMA])
        frame.kind = pb.FRAME_KIND_DELTA if index % 2 else pb.FRAME_KIND_KEY
        frame.base_sequence = index if index % 2 else 0
        frame.payload = Payload(_OPERATOR_ID, _BLOCK, (Plane(values, quantiser=1 + index % 2),)).pack()
        frames.append(frame)
    return frames


def _sealed(data: bytes) -> bytes:
    return data[: -_CRC.size] + _CRC.pack(zlib.crc32(data[: -_CRC.size]))


def _mended(content: bytes) -> bytes:
    """A segment whose checksums fit wherever its lengths do."""
    mended = bytearray(content)
    for place, covered, told in _checked_parts(content):
        mended[place : place + _CRC.size] = _CRC.pack(zlib.crc32(told, zlib.crc32(covered)))
    return bytes(mended)


def _checked_parts(content: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Of head and records: where its checksum stands, and the two parts that it covers."""
    if len(content) < 14:
        return
    (length,) = struct.unpack_from("<I", content, 6)
    yield 10, b"", content[14 : 14 + length]
    at = 14 + length
    while at + 16 <= len(content):
        (length,) = struct.unpack_from("<I", content, at)
        yield at + 4, content[at : at + 4] + content[at + 8 : at + 16], content[at + 16 : at + 16 + length]
        at += 16 + length


def _archive(data: bytes) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name in _MEMBERS:
            (length,) = struct.unpack("<H", data[:2].ljust(2, b"\0"))
            file.writestr(zipfile.ZipInfo(f"{name}.npy"), data[2 : 2 + length])
            data = data[2 + length :]
    return archive.getvalue()
