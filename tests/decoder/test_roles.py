"""Every endpoint × every role: allowed or refused, and with which status."""

import http.client
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from numpy.typing import NDArray

from decoder.access.keys import Authority, init
from decoder.access.people import Person, hash_password, write_people
from decoder.access.roles import ANYONE, TABLE, WHO, Role, Who
from decoder.settings import Settings
from encoder.packing import Packer
from encoder.sampling import Operator
from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import ViewersStub
from tests.conftest import StartService, frame_of, hello_of
from tests.decoder.guarded import (
    ABSENT,
    AT,
    DENIED,
    OK,
    PEOPLE,
    TOKENS,
    UNKNOWN,
    UNTOLD,
    Guarded,
    Keys,
    bearer,
    called,
    caller,
    ready,
)
from tests.decoder.peers import Camera
from tests.decoder.test_web import read_part
from tests.waiting import wait_for

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


def stream(guarded: Guarded, headers: dict[str, str]) -> http.client.HTTPResponse:
    answer = guarded.open("/cameras/porch.mjpeg", headers)
    assert answer.status == 200
    assert answer.readline() == b"--picture\r\n"
    assert read_part(answer, "picture")
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
    assert read_part(other, "picture"), "the frame after the change"
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
            (policy,) = headers.get_all("Content-Security-Policy") or [""]
            assert "frame-ancestors 'none'" in policy, path
            assert headers["Strict-Transport-Security"] == strict, path
