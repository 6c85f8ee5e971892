"""Every endpoint × every role: allowed or refused, and with which status; and what else stands at the door."""

import asyncio
import errno
import http.client
import json
import logging
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from decoder.access import AccessError
from decoder.access.audit import Audit
from decoder.access.door import SESSION_S, TRIES_BY_ADDRESS, TRIES_BY_NAME
from decoder.access.keys import Authority, init
from decoder.access.people import People, Person, hash_password, hash_token, read_people, write_people
from decoder.access.roles import ANYONE, TABLE, WHO, Role, Who
from decoder.access.tls import Certificates
from decoder.private import changed_by_one
from decoder.settings import Settings
from encoder.packing import Packer
from encoder.sampling import Operator
from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import CamerasStub, ViewersStub
from tests.conftest import Service, StartService, frame_of, hello_of
from tests.decoder.test_service import Camera
from tests.decoder.test_tls import Keys, ready
from tests.waiting import wait_for

CAPTURED_MS = 1_700_000_000_000
PASSWORD = "correct horse battery"
PEOPLE = {
    "vera": Person("vera", Role.VIEWER, frozenset({"porch"})),
    "tom": Person("tom", Role.TRUSTED, frozenset({"porch"})),
    "ada": Person("ada", Role.ADMIN),
    "nvr": Person("nvr", Role.VIEWER, frozenset({"porch"})),
}
TOKENS = {name: f"vc_{name}" for name in PEOPLE}


@pytest.fixture(scope="session")
def hashed() -> str:
    return hash_password(PASSWORD)


@dataclass
class Answer:
    """What the page said; of a stream without an end, its beginning."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes


@dataclass
class Guarded:
    """A service that tells people and cameras apart, with cameras porch and yard that have shown a frame."""

    service: Service
    keys: Keys
    users: Path
    cameras: list[Camera]
    tls: bool = True
    connections: list[http.client.HTTPConnection] = field(default_factory=list)

    def ask(
        self, path: str, headers: dict[str, str] | None = None, body: dict[str, str] | None = None,
        source: str = "127.0.0.1",
    ) -> Answer:  # fmt: skip
        connection, answer = self._request(path, headers, body, source)
        endless = "multipart" in answer.headers.get("Content-Type", "")
        told = Answer(answer.status, answer.headers, answer.read(1000) if endless else answer.read())
        answer.close()
        connection.close()
        return told

    def open(self, path: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        connection, answer = self._request(path, headers, None, "127.0.0.1")
        self.connections.append(connection)
        return answer

    def _request(
        self, path: str, headers: dict[str, str] | None, body: dict[str, str] | None, source: str
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        port = self.service.server.http_port
        if self.tls:
            context = ssl.create_default_context(cafile=self.keys.folder / "ca.pem")
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                "127.0.0.1", port, timeout=20, context=context, source_address=(source, 0)
            )
        else:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20, source_address=(source, 0))
        form = {"Content-Type": "application/x-www-form-urlencoded"} if body is not None else {}
        data = urlencode(body) if body is not None else None
        connection.request("GET" if body is None else "POST", path, data, form | (headers or {}))
        return connection, connection.getresponse()

    def sign_in(
        self, name: str, password: str = PASSWORD, source: str = "127.0.0.1", **headers: str
    ) -> Answer:  # fmt: skip
        return self.ask("/login", headers, {"name": name, "password": password}, source)

    def session(self, name: str) -> dict[str, str]:
        answer = self.sign_in(name)
        assert (answer.status, answer.headers["Location"]) == (303, "/")
        return {"Cookie": answer.headers["Set-Cookie"].partition(";")[0]}

    def channel(self, certificate: str) -> grpc.Channel:
        channel = ready(self.service, self.keys.credentials(certificate))
        assert channel is not None
        return channel

    def change(self, name: str, person: Person | None) -> None:
        people = {each.name: each for each in read_people(self.users).values() if each.name != name}
        write_people(self.users, people | ({name: person} if person else {}))


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


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


AT = f"?at={CAPTURED_MS}"
PAGE: list[tuple[str, str, tuple[int, int, int, int]]] = [
    # route in the table, what is asked, and the status for: nobody, viewer, trusted (both of porch), admin
    ("/", "/", (303, 200, 200, 200)),
    ("/login", "/login", (200, 200, 200, 200)),
    ("/cameras.json", "/cameras.json", (401, 200, 200, 200)),
    ("/reconstructors.json", "/reconstructors.json", (401, 200, 200, 200)),
    ("/pictures", "/pictures", (401, 200, 200, 200)),
    ("/pictures", "/pictures?camera=porch", (401, 200, 200, 200)),
    ("/cameras/{name}.jpg", "/cameras/porch.jpg", (401, 200, 200, 200)),
    ("/cameras/{name}.jpg", "/cameras/porch.jpg?rendition=plain", (401, 403, 200, 200)),
    ("/cameras/{name}.jpg", "/cameras/yard.jpg", (401, 403, 403, 200)),
    ("/cameras/{name}.jpg", "/cameras/yard.jpg?rendition=plain", (401, 403, 403, 200)),
    ("/cameras/{name}.jpg", "/cameras/nowhere.jpg", (401, 403, 403, 404)),
    ("/cameras/{name}.mjpeg", "/cameras/porch.mjpeg", (401, 200, 200, 200)),
    ("/cameras/{name}.mjpeg", "/cameras/porch.mjpeg?rendition=plain", (401, 403, 200, 200)),
    ("/cameras/{name}.mjpeg", "/cameras/yard.mjpeg", (401, 403, 403, 200)),
    ("/recordings/{name}.json", "/recordings/porch.json", (401, 200, 200, 200)),
    ("/recordings/{name}.json", "/recordings/yard.json", (401, 403, 403, 200)),
    ("/recordings/{name}.jpg", f"/recordings/porch.jpg{AT}", (401, 200, 200, 200)),
    ("/recordings/{name}.jpg", f"/recordings/porch.jpg{AT}&rendition=plain", (401, 403, 200, 200)),
    ("/recordings/{name}.jpg", f"/recordings/yard.jpg{AT}", (401, 403, 403, 200)),
    ("/metrics", "/metrics", (401, 403, 403, 200)),
    ("/healthz", "/healthz", (200, 200, 200, 200)),
    ("/readyz", "/readyz", (200, 200, 200, 200)),
    ("/nothing", "/nothing", (401, 404, 404, 404)),
    ("/nothing", "//metrics", (401, 404, 404, 404)),
    ("/nothing", "/cameras/../metrics", (401, 404, 404, 404)),
]


@pytest.mark.parametrize(("route", "path", "expected"), PAGE, ids=[path for _, path, _ in PAGE])
def test_the_page_row_by_row(guarded: Guarded, route: str, path: str, expected: tuple[int, ...]) -> None:
    if path.startswith("/recordings"):
        admin = bearer(TOKENS["ada"])
        wait_for(lambda: guarded.ask(f"/recordings/yard.jpg{AT}", admin).status == 200, "the yard's recording")
        wait_for(lambda: guarded.ask(f"/recordings/porch.jpg{AT}", admin).status == 200, "the porch's recording")
    nobody, *roles = expected
    forged = [{}, bearer("vc_forged"), bearer(""), {"Authorization": "Basic dmVyYTp4"}]
    forged += [{"Cookie": "__Host-veilcam=forged"}, {"Cookie": f"__Host-veilcam={TOKENS['ada']}"}]
    for headers in forged:
        assert guarded.ask(path, headers).status == nobody, (path, headers)
    for name, status in zip(("vera", "tom", "ada"), roles, strict=True):
        for headers in (bearer(TOKENS[name]), guarded.session(name)):
            assert guarded.ask(path, headers).status == status, (path, name)


OK, UNKNOWN, DENIED, ABSENT = "OK", "UNAUTHENTICATED", "PERMISSION_DENIED", "NOT_FOUND"
UNTOLD = "let in, and not told of that camera"
AWAY = "FAILED_PRECONDITION"
"""Of a camera that may, and isn't publishing now."""
CALLERS = ("stranger", "camera gate", "camera yard", "viewer", "trusted", "admin", "forged token", "program")
CALLS: list[tuple[str, str, tuple[str, ...]]] = [
    # method, what is asked, and the status for each of the above; viewer, trusted and program are of porch
    ("Publish", "gate", (UNKNOWN, OK, DENIED, DENIED, DENIED, DENIED, UNKNOWN, DENIED)),
    ("Publish", "nvr", (UNKNOWN, DENIED, DENIED, DENIED, DENIED, DENIED, UNKNOWN, DENIED)),
    ("Backlog", "gate", (UNKNOWN, AWAY, DENIED, DENIED, DENIED, DENIED, UNKNOWN, DENIED)),
    ("Backlog", "nvr", (UNKNOWN, DENIED, DENIED, DENIED, DENIED, DENIED, UNKNOWN, DENIED)),
    ("Watch", "porch", (UNKNOWN, DENIED, DENIED, OK, OK, OK, UNKNOWN, OK)),
    ("Watch", "porch plain", (UNKNOWN, DENIED, DENIED, DENIED, OK, OK, UNKNOWN, DENIED)),
    ("Watch", "yard", (UNKNOWN, DENIED, DENIED, DENIED, DENIED, OK, UNKNOWN, DENIED)),
    ("Watch", "nowhere", (UNKNOWN, DENIED, DENIED, DENIED, DENIED, ABSENT, UNKNOWN, DENIED)),
    ("Cameras", "porch", (UNKNOWN, DENIED, DENIED, OK, OK, OK, UNKNOWN, OK)),
    ("Cameras", "yard", (UNKNOWN, DENIED, DENIED, UNTOLD, UNTOLD, OK, UNKNOWN, UNTOLD)),
    ("Check", "", (OK,) * 8),
    ("List", "", (OK,) * 8),
    ("HealthWatch", "", (OK,) * 8),
    ("ServerReflectionInfo", "", (UNKNOWN, DENIED, DENIED, OK, OK, OK, UNKNOWN, OK)),
]


def caller(guarded: Guarded, who: str) -> tuple[grpc.Channel, tuple[tuple[str, str], ...]]:
    certificates = {"camera gate": "cameras/gate", "camera yard": "cameras/yard", "program": "programs/nvr"}
    tokens = {"viewer": TOKENS["vera"], "trusted": TOKENS["tom"], "admin": TOKENS["ada"], "forged token": "vc_forged"}
    # A forged token isn't made good by the certificate beside it.
    beside = "programs/nvr" if who == "forged token" else "programs/ghost"
    metadata = (("authorization", f"Bearer {tokens[who]}"),) if who in tokens else ()
    return guarded.channel(certificates.get(who, beside)), metadata


def called(guarded: Guarded, method: str, asked: str, who: str, operator: Operator) -> str:
    channel, metadata = caller(guarded, who)
    name, _, rendition = asked.partition(" ")
    health = health_pb2_grpc.HealthStub(channel)
    try:
        if method == "Publish":
            hello = pb.PublishRequest(hello=hello_of(operator, np.zeros((32, 32), np.uint8), name))
            call = channel.stream_stream(
                "/veilcam.v1.Cameras/Publish",
                pb.PublishRequest.SerializeToString,
                pb.PublishResponse.FromString,
            )(iter([hello]), metadata=metadata, timeout=20)
            assert next(call).HasField("accepted")
        elif method == "Backlog":
            hello = pb.PublishRequest(hello=hello_of(operator, np.zeros((32, 32), np.uint8), name))
            hello.hello.epoch = 1
            CamerasStub(channel).Backlog(iter([hello]), metadata=metadata, timeout=20)
        elif method == "Watch":
            number = pb.RENDITION_PLAIN if rendition else pb.RENDITION_UNSPECIFIED
            request = pb.WatchRequest(camera=name, rendition=number)
            picture = next(ViewersStub(channel).Watch(request, metadata=metadata, timeout=20))
            assert picture.rendition == (number or pb.RENDITION_VEILED)
        elif method == "Cameras":
            states = ViewersStub(channel).Cameras(pb.CamerasRequest(), metadata=metadata, timeout=20)
            # In order of their names, and after porch comes yard.
            told = {next(states).camera}
            if who == "admin":
                told |= {next(states).camera}
            assert "porch" in told
            return OK if name in told else UNTOLD
        elif method == "HealthWatch":
            next(health.Watch(health_pb2.HealthCheckRequest(), metadata=metadata, timeout=20))
        elif method == "List":
            health.List(health_pb2.HealthListRequest(), metadata=metadata, timeout=20)
        elif method == "Check":
            health.Check(health_pb2.HealthCheckRequest(), metadata=metadata, timeout=20)
        else:
            services = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            next(stub.ServerReflectionInfo(services, metadata=metadata, timeout=20))
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        return error.code().name
    finally:
        channel.close()
    return OK


@pytest.mark.parametrize(("method", "asked", "expected"), CALLS, ids=[f"{call[0]} {call[1]}" for call in CALLS])
def test_grpc_row_by_row(
    guarded: Guarded, method: str, asked: str, expected: tuple[str, ...], operator: Operator
) -> None:
    if method == "List" and not hasattr(health_pb2, "HealthListRequest"):
        pytest.skip("this grpcio-health-checking has no List")
    told = {who: called(guarded, method, asked, who, operator) for who in CALLERS}
    assert told == dict(zip(CALLERS, expected, strict=True))


def methods(guarded: Guarded) -> set[str]:
    """All that the service itself says can be called."""
    channel, metadata = caller(guarded, "admin")
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    (told,) = stub.ServerReflectionInfo(asked, metadata=metadata, timeout=20)
    channel.close()
    pool = descriptor_pool.Default()
    services = [pool.FindServiceByName(each.name) for each in told.list_services_response.service]
    return {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}


@pytest.mark.parametrize("who", ["nobody", *PEOPLE])
def test_anyone_may_sign_out(guarded: Guarded, who: str) -> None:
    headers = guarded.session(who) if who in ("vera", "tom", "ada") else {}
    answer = guarded.ask("/logout", headers, {})
    assert (answer.status, answer.headers["Location"]) == (303, "/login")
    assert guarded.ask("/cameras.json", headers).status == 401


def test_nothing_is_served_that_is_not_in_the_table_and_every_row_is_tested(guarded: Guarded) -> None:
    app = guarded.service.server._web.config.app
    routes = {route.path for route in app.routes}  # type: ignore[union-attr]
    assert routes == {endpoint for endpoint in TABLE if not re.match(r"/(veilcam|grpc)\.", endpoint)}
    assert routes - {"/logout"} == {route for route, _, _ in PAGE} - {"/nothing"}
    absent = set() if hasattr(health_pb2, "HealthListRequest") else {"/grpc.health.v1.Health/List"}
    assert methods(guarded) == set(TABLE) - routes - absent
    assert {method.rpartition("/")[2] for method in methods(guarded) | absent} == {
        method.replace("HealthWatch", "Watch") for method, _, _ in CALLS
    }
    assert not any(Who("x", role).may(endpoint) for role in Role for endpoint in ("/else", "", None))


def test_a_viewer_is_told_of_its_cameras_alone(guarded: Guarded) -> None:
    def names(name: str) -> list[str]:
        answer = guarded.ask("/cameras.json", bearer(TOKENS[name]))
        assert answer.headers["X-User"] == name
        return [each["name"] for each in json.loads(answer.body)]

    assert (names("vera"), names("ada")) == (["porch"], ["porch", "yard"])
    body = guarded.ask("/pictures?camera=yard&camera=porch", bearer(TOKENS["vera"])).body
    assert b'"porch"' in body
    assert b'"yard"' not in body


def test_plain_alone_goes_to_no_viewer_also_where_there_is_nothing_else(
    guarded: Guarded, caplog: pytest.LogCaptureFixture
) -> None:
    """A camera whose operator has only a plain reconstructor gives plain ones, to trusted people alone."""
    for camera in guarded.service.server.cameras.all():
        guarded.service.loop.call_soon_threadsafe(camera.offer, ("plain",))
    wait_for(
        lambda: all(camera.renditions == ("plain",) for camera in guarded.service.server.cameras.all()),
        "the other renditions",
    )
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(guarded.ask, "/pictures", bearer(TOKENS["vera"]))
        assert guarded.ask("/cameras/porch.jpg", bearer(TOKENS["vera"])).status == 403
        assert guarded.ask("/pictures", bearer(TOKENS["tom"])).status == 200
        assert asked.result(30).status == 204
    channel, metadata = caller(guarded, "viewer")
    with pytest.raises(grpc.RpcError, match="only veiled"):
        next(ViewersStub(channel).Watch(pb.WatchRequest(camera="porch"), metadata=metadata, timeout=20))
    channel.close()


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


def test_a_session_is_a_cookie_that_scripts_and_other_sites_never_get(guarded: Guarded) -> None:
    told = guarded.sign_in("vera").headers["Set-Cookie"]
    name, _, attributes = told.partition("=")
    assert name == "__Host-veilcam"
    parts = {part.strip().lower() for part in attributes.split(";")[1:]}
    assert parts == {"httponly", "secure", "samesite=strict", "path=/", f"max-age={SESSION_S:.0f}"}
    session = guarded.session("vera")
    assert session != guarded.session("vera"), "each is new"
    assert guarded.ask("/cameras.json", session).status == 200
    assert guarded.ask("/logout", session | {"Origin": "https://evil.example"}, {}).status == 403
    assert guarded.ask("/cameras.json", session).status == 200
    assert guarded.ask("/logout", session, {}).status == 303
    assert guarded.ask("/cameras.json", session).status == 401
    assert guarded.sign_in("vera", Origin="https://evil.example").status == 403


@pytest.fixture
def plain_door(start_service: StartService, tmp_path: Path) -> Guarded:
    """On loopback without TLS, with users of whom none can sign in."""
    write_people(tmp_path / "users.toml", PEOPLE)
    service = start_service(Settings(port=0, http=0, users=tmp_path / "users.toml"))
    return Guarded(service, Keys(tmp_path / "keys"), tmp_path / "users.toml", [], tls=False)


@pytest.mark.parametrize("origin", ["http://[x", "http://[::1", "http://x]", "null", "http://a\u212a.example"])
def test_an_origin_that_is_none_is_foreign(plain_door: Guarded, origin: str, caplog: pytest.LogCaptureFixture) -> None:
    headers = {"Origin": origin.encode("utf-8").decode("latin-1")}
    assert plain_door.ask("/login", headers, {"name": "x"}).status == 403
    assert plain_door.ask("/logout", headers, {}).status == 403
    assert "Traceback" not in caplog.text


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    origin=st.none()
    | st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=30).map(str.strip)
    | st.text("[]:/@.x1%", max_size=12).map("http://".__add__),
    body=st.binary(max_size=200) | st.lists(st.sampled_from([b"name=a", b"password=", b"&", b"=", b"%", b";"])).map(
        b"&".join
    ),
)  # fmt: skip
def test_whatever_is_sent_to_sign_in_with_is_answered(plain_door: Guarded, origin: str | None, body: bytes) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", plain_door.service.server.http_port, timeout=20)
    headers = {"Origin": origin} if origin is not None else {}
    connection.request("POST", "/login", body, headers | {"Content-Type": "application/x-www-form-urlencoded"})
    status = connection.getresponse().status
    connection.close()
    assert status in ({400, 401, 429} if origin is None else {403})


def test_a_form_with_too_many_fields_is_none(plain_door: Guarded) -> None:
    answer = plain_door.ask("/login", None, {f"field{index}": "x" for index in range(11)})
    assert answer.status == 400
    assert b"isn't this form" in answer.body.replace(b"&#x27;", b"'")


def test_what_the_guards_have_not_seen_is_nobodys(plain_door: Guarded) -> None:
    """A thread that answers for someone has no context of theirs."""
    with ThreadPoolExecutor(1) as pool:
        who = pool.submit(WHO.get).result()
    assert not any(who.may(endpoint) for endpoint, roles in TABLE.items() if roles != ANYONE)
    assert not who.sees("porch")


def test_no_other_site_may_embed_what_is_answered(
    start_service: StartService, plain_door: Guarded, tmp_path: Path
) -> None:
    init(tmp_path / "keys")
    keys = Keys(tmp_path / "keys")
    open_door = Guarded(start_service(Settings(port=0, http=0)), keys, Path(), [], tls=False)
    public = start_service(keys.settings(host="0.0.0.0", users=tmp_path / "users.toml"))
    for each, strict in ((plain_door, None), (open_door, None), (Guarded(public, keys, Path(), []), "max-age=2592000")):
        for path in ("/", "/login", "/cameras.json", "/cameras/porch.jpg", "/nothing", "/healthz"):
            headers = each.ask(path).headers
            assert headers["Cross-Origin-Resource-Policy"] == "same-origin", path
            assert headers.get_all("X-Content-Type-Options") == ["nosniff"], path
            assert headers["Strict-Transport-Security"] == strict, path


@pytest.mark.parametrize(
    ("name", "password", "status"),
    [
        ("vera", "wrong", 401),
        ("vera", "", 401),
        ("nobody", PASSWORD, 401),
        ("", "", 401),
        ("vera", PASSWORD + "x", 401),
        ("<script>", "x" * 1000, 401),
        ("vera", "x" * 5000, 413),
    ],
)
def test_a_wrong_password(guarded: Guarded, name: str, password: str, status: int) -> None:
    answer = guarded.sign_in(name, password)
    assert (answer.status, answer.headers["Set-Cookie"]) == (status, None)
    assert b"<script>" not in answer.body


def test_a_session_ends(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decoder.access.door.SESSION_S", 0.3)
    session = guarded.session("vera")
    assert guarded.ask("/cameras.json", session).status == 200
    time.sleep(0.4)
    assert guarded.ask("/cameras.json", session).status == 401


def test_a_thousand_wrong_passwords(
    guarded: Guarded, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed_in = guarded.session("tom")
    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(lambda number: guarded.sign_in("vera", f"guess {number}").status, range(1000)))
    assert told.count(401) == TRIES_BY_ADDRESS, "no more are looked at, however many come at one time"
    assert told.count(429) == 1000 - TRIES_BY_ADDRESS
    answer = guarded.sign_in("vera")
    assert answer.status == 429, "the right one isn't looked at either"
    assert 0 < int(answer.headers["Retry-After"]) <= 601
    assert guarded.ask("/cameras.json", signed_in).status == 200, "who is in stays in"
    assert guarded.ask("/cameras.json", bearer(TOKENS["vera"])).status == 200
    assert guarded.sign_in("tom").status == 429, "of that address nobody is let in"
    assert [guarded.sign_in(name, source="127.0.0.2").status for name in ("tom", "vera")] == [303, 303]
    assert "guess" not in caplog.text
    monkeypatch.setattr("decoder.access.door.TRY_WINDOW_S", 0.0)
    assert guarded.sign_in("vera").status == 303


def test_guesses_from_many_addresses_are_limited_by_name(guarded: Guarded) -> None:
    told = [guarded.sign_in("vera", "guess", source=f"127.0.1.{each}").status for each in range(1, 51)]
    assert (told.count(401), told.count(429)) == (TRIES_BY_NAME, 50 - TRIES_BY_NAME)
    assert guarded.session("tom"), "others aren't kept out"


def test_what_anyone_says_of_whom_they_forward_for_is_not_believed(guarded: Guarded) -> None:
    told = [guarded.sign_in("vera", "guess", **{"X-Forwarded-For": f"192.0.2.{each}"}).status for each in range(50)]
    assert (told.count(401), told.count(429)) == (TRIES_BY_ADDRESS, 50 - TRIES_BY_ADDRESS)


@pytest.fixture
def proxied(start_service: StartService, tmp_path: Path, hashed: str) -> Guarded:
    """Without TLS on loopback, behind a proxy that calls from 127.0.0.9 and passes the host's name on."""
    people = {"tom": Person("tom", Role.TRUSTED, frozenset({"*"}), hashed)}
    write_people(tmp_path / "users.toml", people)
    settings = {"port": 0, "http": 0, "users": tmp_path / "users.toml", "trusted_proxy": "127.0.0.9"}
    service = start_service(Settings.model_validate(settings | {"allow_plain": True, "max_peer_streams": 3}))
    return Guarded(service, Keys(tmp_path / "keys"), tmp_path / "users.toml", [], tls=False)


PROXY = {"source": "127.0.0.9", "Host": "cameras.example", "Origin": "https://cameras.example"}


def test_a_trusted_proxy_says_who_asks_and_nobody_else(proxied: Guarded) -> None:
    def tries(count: int, **said: str) -> int:
        return [proxied.sign_in("tom", "guess", **said).status for _ in range(count)].count(401)

    assert tries(12, **PROXY, **{"X-Forwarded-For": "192.0.2.1"}) == TRIES_BY_ADDRESS
    assert tries(3, **PROXY, **{"X-Forwarded-For": "198.51.100.1, 192.0.2.1"}) == 0, "what a client wrote before it"
    assert tries(3, **PROXY, **{"X-Forwarded-For": "192.0.2.2"}) == 3
    assert tries(12, **{"X-Forwarded-For": "192.0.2.3"}) == TRIES_BY_ADDRESS, "who isn't the proxy"
    answer = proxied.sign_in("tom", **PROXY, **{"X-Forwarded-For": "192.0.2.4", "X-Forwarded-Proto": "https"})
    assert (answer.status, "secure" in answer.headers["Set-Cookie"].lower()) == (303, True)


def test_a_proxy_has_connections_for_many(proxied: Guarded) -> None:
    """Its limit is that of all, not that of one address."""
    made = []
    for _ in range(8):
        port = proxied.service.server.http_port
        made.append(http.client.HTTPConnection("127.0.0.1", port, timeout=20, source_address=("127.0.0.9", 0)))
        made[-1].request("GET", "/healthz")
        assert made[-1].getresponse().read() == b"alive\n"
    for connection in made:
        connection.close()


def test_a_proxy_without_users_would_let_everyone_in(start_service: StartService) -> None:
    with pytest.raises(AccessError, match="--trusted-proxy needs --users"):
        start_service(Settings.model_validate({"port": 0, "http": 0, "trusted_proxy": "::1"}))


def test_right_passwords_are_never_too_many(guarded: Guarded) -> None:
    for _ in range(TRIES_BY_ADDRESS + 3):
        assert guarded.sign_in("vera").status == 303


def stream(guarded: Guarded, headers: dict[str, str]) -> http.client.HTTPResponse:
    answer = guarded.open("/cameras/porch.mjpeg", headers)
    assert answer.status == 200
    answer.read(100)
    return answer


def test_changed_users_are_taken_up_at_once_and_whom_it_concerns_is_let_go(
    guarded: Guarded, hashed: str, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    session, token = guarded.session("vera"), bearer(TOKENS["vera"])
    watched = [stream(guarded, headers) for headers in (session, token)]
    channel, metadata = caller(guarded, "viewer")
    call = ViewersStub(channel).Watch(pb.WatchRequest(camera="porch"), metadata=metadata, timeout=30)
    next(call)
    other = stream(guarded, bearer(TOKENS["tom"]))

    guarded.change("vera", Person("vera", Role.VIEWER, frozenset({"yard"}), hashed))
    packer = Packer(operator, 0.1)
    guarded.cameras[0].say(frame=packer.pack(frame_of(photographs[1]), 2, key=True)[0])
    for answer in watched:
        answer.read()  # to its end
    with pytest.raises(grpc.RpcError) as error:
        next(call)
    assert isinstance(error.value, grpc.Call)
    assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert other.read(1000)
    assert guarded.ask("/cameras/porch.jpg", token).status == 401, "the token is no longer there"
    assert guarded.ask("/cameras/porch.jpg", session).status == 403
    assert guarded.ask("/cameras/yard.jpg", session).status == 200

    guarded.change("vera", Person("vera", Role.VIEWER, frozenset({"yard"}), hash_password("another password")))
    assert guarded.ask("/cameras/yard.jpg", session).status == 401, "whoever knew the old password is out"
    guarded.change("vera", None)
    assert guarded.sign_in("vera", "another password").status == 401
    guarded.users.write_text("half a")
    assert guarded.ask("/cameras.json", bearer(TOKENS["tom"])).status == 200, "what can't be is not taken up"
    channel.close()


def test_expired_and_foreign_certificates_do_not_get_as_far_as_a_role(guarded: Guarded, tmp_path: Path) -> None:
    init(tmp_path / "other", cameras=["porch"], programs=["nvr"])
    other = Keys(tmp_path / "other")
    assert ready(guarded.service, guarded.keys.credentials(guarded.keys.expired("old"))) is None
    for client in ("cameras/porch", "programs/nvr"):
        assert ready(guarded.service, guarded.keys.credentials(client, other)) is None
    assert ready(guarded.service, guarded.keys.credentials()) is None, "without one"


def test_a_program_that_could_pass_for_a_user_needs_that_name_in_the_file(guarded: Guarded) -> None:
    """A camera may be called as a user is: it is a camera all the same."""
    made = Authority.open(guarded.keys.folder).client("cameras", "ada")
    assert made.path.name == "ada.pem"
    channel = guarded.channel("cameras/ada")
    with pytest.raises(grpc.RpcError, match="PERMISSION_DENIED"):
        next(ViewersStub(channel).Watch(pb.WatchRequest(camera="porch"), timeout=20))
    channel.close()


def test_without_users_on_loopback_everyone_is_let_in(start_service: StartService, operator: Operator) -> None:
    service = start_service(Settings(port=0, http=0))
    guarded = Guarded(service, Keys(Path()), Path(), [], tls=False)
    for path in ("/", "/cameras.json", "/metrics", "/healthz"):
        assert guarded.ask(path).status == 200
    assert guarded.ask("/login").status == 404
    assert guarded.ask("/cameras.json").headers["X-User"] is None


def test_users_without_client_ca_let_no_camera_in(
    start_service: StartService, tmp_path: Path, operator: Operator
) -> None:
    write_people(tmp_path / "users.toml", {})
    service = start_service(Settings(port=0, http=0, users=tmp_path / "users.toml"))
    camera = Camera(service.channel())
    camera.say(hello=hello_of(operator, np.zeros((32, 32), np.uint8)))
    assert camera.refusal()[0] is grpc.StatusCode.UNAUTHENTICATED


def users(file: Path, *arguments: str, given: str = "") -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "decoder", "users", *arguments, "--users", str(file)]
    return subprocess.run(command, input=given, capture_output=True, text=True, timeout=60)


def test_the_commands_write_what_the_service_reads(tmp_path: Path) -> None:
    file = tmp_path / "users.toml"
    done = users(file, "add", "anna", "--role", "viewer", "--camera", "porch", "--camera", "b.2", given=PASSWORD + "\n")
    assert done.returncode == 0, done.stderr
    assert file.stat().st_mode & 0o777 == 0o600
    anna = read_people(file)["anna"]
    assert (anna.role, set(anna.cameras), dict(anna.tokens)) == (Role.VIEWER, {"porch", "b.2"}, {})
    assert PASSWORD not in file.read_text()
    token = users(file, "token", "anna", "--label", "phone").stdout.strip()
    assert re.fullmatch(r"vc_[\w-]{43}", token)
    assert token not in file.read_text()
    assert read_people(file)["anna"].tokens == {"phone": hash_token(token)}
    assert users(file, "add", "anna", "--role", "trusted", "--camera", "*").returncode == 0, (
        "no password is asked again"
    )
    changed = read_people(file)["anna"]
    assert (changed.role, changed.seen, changed.password) == (Role.TRUSTED, None, anna.password)
    assert users(file, "password", "anna", given="another password\n").returncode == 0
    assert read_people(file)["anna"].password != anna.password
    assert users(file, "add", "prometheus", "--role", "admin", "--no-password").returncode == 0
    told = users(file, "list").stdout
    assert told.splitlines() == [
        "anna: trusted; cameras *; password, token phone",
        "prometheus: admin; cameras *; no password, no token",
    ]
    assert users(file, "token", "anna", "--label", "phone", "--revoke").returncode == 0
    assert users(file, "remove", "prometheus").returncode == 0
    assert list(read_people(file)) == ["anna"]
    assert read_people(file)["anna"].tokens == {}


@pytest.fixture
def as_service() -> Callable[[], AbstractContextManager[None]]:
    """Be the user of a service, who isn't root."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to another user")

    @contextmanager
    def being() -> Iterator[None]:
        os.seteuid(SERVICE)
        try:
            yield
        finally:
            os.seteuid(0)

    return being


SERVICE = 65534


def test_what_root_changes_the_services_user_can_still_read(
    as_service: Callable[[], AbstractContextManager[None]],
) -> None:
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own are root's alone
    try:
        os.chown(folder, SERVICE, SERVICE)
        file = folder / "users.toml"
        write_people(file, PEOPLE)
        init(folder / "keys", cameras=["porch"])
        for path in (file, folder / "keys", *(folder / "keys").rglob("*")):
            os.chown(path, SERVICE, SERVICE)
        (folder / "keys" / "server.pem").chmod(0o640)
        with as_service():
            people, certificates = People(file), Certificates(Keys(folder / "keys").settings())
            before = certificates.look().certificate
        assert users(file, "remove", "vera").returncode == 0
        command = [sys.executable, "-m", "decoder", "keys", "renew", str(folder / "keys")]
        assert subprocess.run(command, timeout=60).returncode == 0
        for path, mode in ((file, 0o600), (folder / "keys" / "server.pem", 0o640)):
            told = path.stat()
            assert (told.st_uid, told.st_gid, told.st_mode & 0o777) == (SERVICE, SERVICE, mode)
        with as_service():
            assert people.get("vera") is None
            assert people.get("tom") is not None
            assert certificates.look().certificate != before
    finally:
        shutil.rmtree(folder)


def test_who_may_not_give_a_file_to_its_owner_is_told_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "users.toml"
    write_people(file, PEOPLE)

    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("decoder.private.os.fchown", refused)
    owned, real = file.stat(), Path.stat
    others = os.stat_result((*owned[:4], owned.st_uid + 1, *owned[5:]))
    monkeypatch.setattr(Path, "stat", lambda path, **how: others if path == file else real(path, **how))
    with pytest.raises(
        AccessError, match=r"users\.toml: can't be written \(it belongs to user \d+, group \d+: do this as"
    ):
        write_people(file, {})
    monkeypatch.undo()
    assert set(read_people(file)) == set(PEOPLE)
    assert list(tmp_path.iterdir()) == [file], "nothing is left behind"


def waits_for_a_lock(pid: int) -> bool:
    waiting = (line.split() for line in Path("/proc/locks").read_text().splitlines() if "->" in line)
    return str(pid) in (words[5] for words in waiting)


def test_commands_that_run_at_one_time_lose_nothing_of_each_other(tmp_path: Path) -> None:
    """One waits while another has read the file and hasn't written it yet."""
    file = tmp_path / "users.toml"
    write_people(file, PEOPLE)
    command = [sys.executable, "-m", "decoder", "users", "remove", "vera", "--users", str(file)]
    with changed_by_one(tmp_path):
        people = read_people(file)
        removing = subprocess.Popen(command)
        wait_for(lambda: waits_for_a_lock(removing.pid), "the second command, which waits for the first")
        write_people(file, {name: each for name, each in people.items() if name != "tom"})
    assert removing.wait(60) == 0
    assert set(read_people(file)) == {"ada", "nvr"}


@pytest.mark.parametrize(
    ("arguments", "given", "told"),
    [
        (("add", "x", "--role", "king"), "", "--role 'king': expected one of viewer, trusted, admin"),
        (("add", "x", "--role", "camera"), "", "veilcam-decode keys camera"),
        (("add", "a b", "--role", "admin"), "", "NAME 'a b'"),
        (("add", "x", "--role", "viewer"), "", "--camera: a viewer sees those cameras that are given"),
        (("add", "x", "--role", "viewer", "--camera", 'a"b'), "", "--camera 'a\"b'"),
        (("add", "x", "--role", "admin"), "short\n", "password: expected 10 to 512 characters"),
        (("token", "x"), "", "can't be read"),
        (("remove", "x"), "", "veilcam-decode users add makes it"),
    ],
)
def test_what_the_commands_can_not_do(tmp_path: Path, arguments: tuple[str, ...], given: str, told: str) -> None:
    done = users(tmp_path / "users.toml", *arguments, given=given)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert told in done.stderr
    assert not (tmp_path / "users.toml").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("users = 3", "users: "),
        ('[users.x]\nrole = "camera"', "users.x.role"),
        ('[users.x]\nrole = "viewer"\npassword = "plain text"', "users.x.password"),
        ('[users.x]\nrole = "viewer"\nroll = 1', "users.x.roll"),
        ('[users."a b"]\nrole = "viewer"', "users.a b"),
        ("[users", "not TOML"),
    ],
)
def test_a_file_of_users_that_can_not_be(start_service: StartService, tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "users.toml"
    file.write_text(text)
    with pytest.raises(AccessError, match="others may read"):
        start_service(Settings(port=0, http=0, users=file))
    file.chmod(0o600)
    with pytest.raises(AccessError) as error:
        start_service(Settings(port=0, http=0, users=file))
    assert str(file) in str(error.value)
    assert told in str(error.value)
    assert "plain text" not in str(error.value), "what may be a secret isn't told"


@pytest.fixture
def opened(guarded: Guarded) -> Iterator[Callable[[], str]]:
    """The page in a browser, signed out."""
    from playwright.sync_api import sync_playwright

    from tests.decoder.test_page import CHROMIUM, FLAGS

    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(ignore_https_errors=True)
        page.goto(f"https://127.0.0.1:{guarded.service.server.http_port}/")

        def story() -> str:
            page.fill("#name", "vera")
            page.fill("#password", PASSWORD)
            page.click("text=Sign in")
            page.wait_for_selector("figure[data-camera=porch]", timeout=20_000)
            assert page.locator("figure").count() == 1
            page.click("text=Sign out")
            page.wait_for_selector("#password", timeout=20_000)
            return page.url

        yield story
        browser.close()


def test_signing_in_and_out_in_a_browser(opened: Callable[[], str]) -> None:
    assert opened().endswith("/login")
