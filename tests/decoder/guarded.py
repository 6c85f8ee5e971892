"""A service that tells people, programs and cameras apart, and those who ask it."""

import http.client
import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlencode

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from decoder.access.keys import Authority
from decoder.access.people import Person, read_people, write_people
from decoder.access.roles import Role
from decoder.settings import Settings
from encoder.sampling import Operator
from protos.v1 import veilcam_pb2 as pb
from protos.v1.veilcam_pb2_grpc import CamerasStub, ViewersStub
from tests.conftest import Service, hello_of
from tests.decoder.peers import Camera

CAPTURED_MS = 1_700_000_000_000
PASSWORD = "correct horse battery"
PEOPLE = {
    "vera": Person("vera", Role.VIEWER, frozenset({"porch"})),
    "tom": Person("tom", Role.TRUSTED, frozenset({"porch"})),
    "ada": Person("ada", Role.ADMIN),
    "nvr": Person("nvr", Role.VIEWER, frozenset({"porch"})),
}
TOKENS = {name: f"vc_{name}" for name in PEOPLE}
AT = f"?at={CAPTURED_MS}"
OK, UNKNOWN, DENIED, ABSENT = "OK", "UNAUTHENTICATED", "PERMISSION_DENIED", "NOT_FOUND"
UNTOLD = "let in, and not told of that camera"
FILES = {"certificate": "server.pem", "key": "server.key", "client_ca": "ca.pem"}


@dataclass
class Keys:
    """An authority's folder."""

    folder: Path

    def settings(self, **changes: object) -> Settings:
        files = {name: self.folder / file for name, file in FILES.items()}
        return Settings.model_validate({"port": 0, "http": 0} | files | changes)

    def credentials(self, client: str | None = None, of: "Keys | None" = None) -> grpc.ChannelCredentials:
        ca = (self.folder / "ca.pem").read_bytes()
        if client is None:
            return grpc.ssl_channel_credentials(ca)
        pem = (of or self).folder / f"{client}.pem"
        return grpc.ssl_channel_credentials(ca, pem.with_suffix(".key").read_bytes(), pem.read_bytes())

    def expired(self, name: str) -> str:
        """A camera's certificate whose time is over."""
        past = datetime.now(UTC) - timedelta(days=3)
        Authority.open(self.folder).client("cameras", name, past, days=1)
        return f"cameras/{name}"


def ready(service: Service, credentials: grpc.ChannelCredentials) -> grpc.Channel | None:
    channel = grpc.secure_channel(service.address, credentials)
    try:
        grpc.channel_ready_future(channel).result(3)
    except grpc.FutureTimeoutError:
        channel.close()
        return None
    return channel


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


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


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
