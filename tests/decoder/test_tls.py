"""TLS on both ports: who is let in by which certificate, whom a camera speaks for, and renewal while it runs."""

import contextlib
import logging
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path

import grpc
import numpy as np
import pytest
from cryptography import x509
from prometheus_client import generate_latest

from decoder.access import AccessError
from decoder.access.exposure import check_exposure
from decoder.access.keys import SERVER_DAYS, Authority, init
from decoder.settings import Settings
from encoder.link import ServerLink
from encoder.sampling import Operator
from encoder.sinks import ServerSink, SinkError
from encoder.tls import Tls, TlsError
from protos.v1 import veilcam_pb2 as pb
from tests.conftest import Service, StartService, hello_of
from tests.decoder.guarded import FILES, Keys, ready
from tests.decoder.peers import Camera
from tests.encoder.test_cli import ENCODE, encode
from tests.waiting import wait_for

DECODE = [sys.executable, "-m", "decoder"]


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    init(tmp_path / "keys", cameras=["porch", "yard"], programs=["nvr"])
    return Keys(tmp_path / "keys")


@pytest.fixture
def other(tmp_path: Path) -> Keys:
    """Another authority, with a camera of the same name."""
    init(tmp_path / "other", cameras=["porch"])
    return Keys(tmp_path / "other")


@pytest.fixture
def service(start_service: StartService, keys: Keys) -> Service:
    return start_service(keys.settings())


def publish(service: Service, operator: Operator, credentials: grpc.ChannelCredentials, name: str) -> Camera:
    channel = ready(service, credentials)
    assert channel is not None
    camera = Camera(channel)
    camera.say(hello=hello_of(operator, np.zeros((32, 32), np.uint8), name))
    return camera


def test_a_camera_speaks_for_the_name_in_its_certificate_and_no_other(
    service: Service, keys: Keys, operator: Operator
) -> None:
    camera = publish(service, operator, keys.credentials("cameras/porch"), "porch")
    assert camera.answer().HasField("accepted")
    for who, name in (("cameras/yard", "porch"), ("cameras/porch", "yard"), ("programs/nvr", "nvr")):
        code, told = publish(service, operator, keys.credentials(who), name).refusal()
        owner = "program:nvr" if who == "programs/nvr" else who.removeprefix("cameras/")
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert told.startswith(f"hello.camera: '{name}', its certificate is for '{owner}'")
    assert camera.call.is_active()
    camera.bye()


def test_who_shows_no_sound_certificate_is_not_let_in(service: Service, keys: Keys, other: Keys) -> None:
    refused: dict[str, Callable[[], grpc.ChannelCredentials]] = {
        "none": keys.credentials,
        "of another authority": lambda: keys.credentials("cameras/porch", other),
        "expired": lambda: keys.credentials(keys.expired("old")),
        "the server's own": lambda: keys.credentials("server"),
    }
    for which, credentials in refused.items():
        assert ready(service, credentials()) is None, which
    with pytest.raises(grpc.FutureTimeoutError):
        grpc.channel_ready_future(grpc.insecure_channel(service.address)).result(2)
    channel = ready(service, keys.credentials("cameras/porch"))
    assert channel is not None
    channel.close()


def test_a_public_certificate_needs_no_client_ca(start_service: StartService, keys: Keys) -> None:
    service = start_service(keys.settings(client_ca=None))
    channel = ready(service, keys.credentials())
    assert channel is not None
    channel.close()
    assert fetch(service, keys)[0] == 200


def fetch(service: Service, keys: Keys, client: str | None = None) -> tuple[int, str]:
    """The page's health, and until when the certificate that it showed is valid."""
    context = ssl.create_default_context(cafile=keys.folder / "ca.pem")
    if client is not None:
        context.load_cert_chain(keys.folder / f"{client}.pem", keys.folder / f"{client}.key")
    url = f"https://127.0.0.1:{service.server.http_port}/healthz"
    with urllib.request.urlopen(url, timeout=20, context=context) as answer:
        until = str(answer.fp.raw._sock.getpeercert()["notAfter"])
        return answer.status, until


@pytest.mark.parametrize("page", [True, False], ids=["page", "grpc"])
def test_renewed_certificates_are_taken_up_without_a_restart(
    service: Service, keys: Keys, page: bool, operator: Operator, caplog: pytest.LogCaptureFixture
) -> None:
    camera = publish(service, operator, keys.credentials("cameras/porch"), "porch")
    assert camera.answer().HasField("accepted")

    def shown() -> str:
        if page:
            return fetch(service, keys, "cameras/porch")[1]
        return ssl_shown(service.server.port, keys)

    first = shown()
    sound = (keys.folder / "server.pem").read_text()
    (keys.folder / "server.pem").write_text("half a file")
    assert shown() == first, "what can't be is not taken up"
    assert "certificates stay as they were" in caplog.text
    (keys.folder / "server.pem").write_text(sound)
    Authority.open(keys.folder).renew(now=datetime.now(UTC) - timedelta(days=1))
    assert shown() != first
    assert camera.call.is_active(), "who is there doesn't notice"
    camera.bye()


def test_a_running_service_tells_once_a_day_that_its_certificate_expires(
    keys: Keys, start_service: StartService, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("decoder.access.tls._LOOK_EVERY_S", 0.01)
    clock = Clock(datetime.now(UTC))
    monkeypatch.setattr("decoder.access.tls.datetime", clock)
    caplog.set_level(logging.INFO, "veilcam.decode")
    service = start_service(keys.settings())
    looks: list[int] = []
    certificates = service.server._certificates
    assert certificates is not None
    stamps = certificates._stamps

    def counted() -> object:
        looks.append(0)
        return stamps()

    monkeypatch.setattr(certificates, "_stamps", counted)

    def told(day: int, words: str) -> int:
        """Lines with these words, once it has been looked at on that day, several times."""
        clock.time, before = clock.start + timedelta(days=day), len(looks)
        wait_for(lambda: len(looks) > before + 5, "more looks at the files")
        return sum(words in line for line in caplog.messages)

    assert told(1, "renew it") == 0
    assert told(SERVER_DAYS - 29, "renew it soon") == 1
    assert told(SERVER_DAYS - 29, "renew it soon") == 1, "once a day"
    assert told(SERVER_DAYS - 20, "renew it soon") == 2
    assert told(SERVER_DAYS + 1, "nobody can connect any more") == 1
    told_at = generate_latest(service.server.metrics.registry).decode()
    (expires,) = re.findall(r"^veilcam_certificate_expires_seconds (\S+)$", told_at, re.MULTILINE)
    until = x509.load_pem_x509_certificate((keys.folder / "server.pem").read_bytes()).not_valid_after_utc
    assert float(expires) == until.timestamp()


class Clock:
    """Stands for ``datetime`` and shows the time that it is set to."""

    min = datetime.min

    def __init__(self, start: datetime) -> None:
        self.start = self.time = start

    def now(self, _: tzinfo) -> datetime:
        return self.time


def ssl_shown(port: int, keys: Keys) -> str:
    context = ssl.create_default_context(cafile=keys.folder / "ca.pem")
    context.load_cert_chain(keys.folder / "cameras/porch.pem", keys.folder / "cameras/porch.key")
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port), 20) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        told = connection.getpeercert()
        assert told is not None
        return str(told["notAfter"])


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "decoder.local"])
def test_nothing_listens_beyond_loopback_without_guards_unless_it_is_said(host: str, keys: Keys) -> None:
    with pytest.raises(AccessError, match="nothing listens beyond loopback without TLS and authentication") as error:
        check_exposure(Settings(host=host))
    told = str(error.value)
    assert "missing: --certificate, --key, --client-ca, --users" in told
    assert "veilcam-decode keys init DIR --host" in told
    assert "veilcam-decode users add" in told
    assert "--insecure" in told
    check_exposure(Settings(host=host, insecure=True))
    check_exposure(keys.settings(host=host, users="users.toml"))
    for name in (*FILES, "users"):
        with pytest.raises(AccessError):
            check_exposure(keys.settings(**{"host": host, "users": "users.toml", name: None}))
    for ours in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        check_exposure(Settings(host=ours))


@pytest.mark.parametrize("check", [["--check-config"], []])
def test_the_refusal_is_exit_code_2_and_says_how_to_do_it_right(check: list[str]) -> None:
    done = subprocess.run([*DECODE, "--host", "0.0.0.0", *check], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "veilcam-decode keys init DIR --host NAME --camera NAME" in done.stderr
    assert "Traceback" not in done.stderr


def said_at_the_start(*options: str) -> list[str]:
    """What a service says that listens everywhere, up to where it is reached."""
    arguments = [*DECODE, "--host", "0.0.0.0", "--port", "0", "--http", "0", "--engine", "onnxruntime", *options]
    lines = []
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if "people: http" in line:
                break
        process.terminate()
    return lines


def test_insecure_said_aloud_is_told_aloud() -> None:
    lines = said_at_the_start("--insecure")
    assert any("WARNING --insecure: listening on 0.0.0.0 without" in line for line in lines)


@pytest.mark.parametrize(
    ("hosts", "told"),
    [
        (["decoder.local"], "decoder.local"),
        (["127.0.0.5", "*.example", "2001:db8::1", "decoder.local"], "decoder.local"),
        (["localhost"], socket.gethostname()),
    ],
)
def test_the_address_that_is_told_is_one_that_the_certificate_is_for(
    hosts: list[str], told: str, tmp_path: Path
) -> None:
    init(tmp_path, hosts=hosts)
    files = ("--certificate", str(tmp_path / "server.pem"), "--key", str(tmp_path / "server.key"))
    line = said_at_the_start("--insecure", *files)[-1]
    assert f"cameras and programs: {told}:" in line
    assert f"people: https://{told}:" in line


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"certificate": "absent.pem"}, "--certificate absent.pem: can't be read (No such file or directory)"),
        ({"key": None}, "--certificate and --key go together"),
        ({"certificate": None, "key": None}, "--client-ca needs --certificate and --key"),
        ({"key": "cameras/porch.key"}, "not the unencrypted key, in PEM, of"),
        ({"certificate": "server.key"}, "server.key: not a certificate in PEM"),
        ({"client_ca": "ca.key"}, "ca.key: no certificates in PEM"),
        ({"certificate": "cameras/old.pem", "key": "cameras/old.key"}, "old.pem: expired"),
    ],
)
def test_files_that_can_not_be_are_told_at_the_start(
    keys: Keys, start_service: StartService, change: dict[str, str | None], told: str
) -> None:
    keys.expired("old")
    given = {name: value and (value if "absent" in value else keys.folder / value) for name, value in change.items()}
    with pytest.raises(AccessError) as error:
        start_service(keys.settings(**given))
    assert told in str(error.value)


def shows(keys: Keys, camera: str, ca: Keys | None = None) -> list[str]:
    ours = [("--ca", (ca or keys).folder / "ca.pem"), ("--certificate", keys.folder / f"{camera}.pem")]
    ours += [("--key", keys.folder / f"{camera}.key")]
    return [str(word) for pair in ours for word in pair]


def test_the_camera_goes_by_the_name_in_its_certificate(service: Service, keys: Keys) -> None:
    arguments = ("pattern:64x48@50#5", "--as-fast-as-possible", "--server", service.address)
    done = encode(*arguments, *shows(keys, "cameras/porch"))
    assert done.returncode == 0, done.stderr
    assert service.server.cameras.get("porch") is not None
    done = encode(*arguments, *shows(keys, "cameras/porch"), "--name", "yard")
    assert done.returncode == 1
    assert "PERMISSION_DENIED, hello.camera: 'yard', its certificate is for 'porch'" in done.stderr


def test_what_a_camera_can_not_connect_with_is_told(
    service: Service, start_service: StartService, keys: Keys, other: Keys
) -> None:
    porch = "cameras/porch"
    plain, old, absent = start_service(), keys.expired("old"), "/nowhere/cam.pem"
    ca = ["--ca", str(keys.folder / "ca.pem")]
    passes = ["--give-up-seconds", "1"]  # it may: gRPC's server says nothing to whom it doesn't take
    cases = [
        (service, [], 1, "the server speaks TLS: give --ca"),
        (plain, shows(keys, porch), 1, "the server speaks no TLS there"),
        (service, shows(keys, porch, other), 1, "isn't from the authority of --ca"),
        (service, [*shows(other, porch, keys), *passes], 1, "is shutting down, or it doesn't take --certificate"),
        (service, [*ca, *passes], 1, "is shutting down, or it asks for a certificate of this camera"),
        (service, shows(keys, porch)[2:], 1, "give --ca"),
        (service, shows(keys, old), 2, "old.pem: certificate has expired"),
        (service, ["--certificate", absent, "--key", absent], 2, f"--certificate {absent}: can't be read"),
        (service, ["--certificate", absent], 2, "--certificate and --key go together"),
        (service, ["--ca", str(keys.folder / "ca.key")], 2, "ca.key: no certificate in PEM"),
        (service, [*shows(keys, porch)[:4], "--key", str(keys.folder / "server.key")], 2, "not the unencrypted key"),
        (service, shows(keys, "server"), 2, "unsuitable certificate purpose"),
    ]
    for server, arguments, code, told in cases:
        done = encode("pattern:64x48@50#5", "--server", server.address, *arguments)
        assert (done.returncode, told in done.stderr) == (code, True), (told, done.stderr)
        assert len([line for line in done.stderr.splitlines() if "ERROR" in line]) == 1
        assert "Traceback" not in done.stderr


def test_what_no_waiting_mends_is_not_waited_for(
    service: Service, start_service: StartService, keys: Keys, other: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("encoder.sinks.CONNECT_TIMEOUT_S", 250.0)  # longer than a test may take, both together
    ours, theirs = keys.folder, other.folder
    porch = (ours / "cameras/porch.pem", ours / "cameras/porch.key")
    foreign = (theirs / "cameras/porch.pem", theirs / "cameras/porch.key")
    cases = [
        (service, None, "speaks TLS"),
        (start_service(), Tls(ours / "ca.pem", *porch), "speaks no TLS"),
        (service, Tls(theirs / "ca.pem", *porch), "isn't from the authority"),
        (service, Tls(ours / "ca.pem", *foreign), "doesn't take --certificate"),
        (service, Tls(ours / "ca.pem"), "asks for a certificate"),
    ]
    for server, tls, told in cases:
        with pytest.raises(SinkError, match=told):
            ServerSink(server.address, pb.Hello(camera="porch"), tls=tls)


def test_a_server_by_another_name_is_not_trusted(start_service: StartService, keys: Keys) -> None:
    service = start_service(keys.settings(host="127.0.0.2"))
    done = encode("pattern:64x48", "--server", f"127.0.0.2:{service.server.port}", *shows(keys, "cameras/porch"))
    assert done.returncode == 1
    assert "the server's certificate isn't for 127.0.0.2" in done.stderr


def test_a_camera_whose_clock_is_late_waits_for_the_time(service: Service, keys: Keys) -> None:
    """To it neither its own certificate nor the server's is valid yet; then its clock is set."""
    authority = Authority.open(keys.folder)
    authority.renew(now=datetime.now(UTC) + timedelta(days=1000))
    arguments = [*ENCODE, "pattern:64x48@30", "--server", service.address, *shows(keys, "cameras/porch")]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as camera:
        try:
            assert camera.stderr is not None
            told = camera.stderr.readline()
            while "WARNING" not in told:
                told = camera.stderr.readline()
                assert told, camera.wait()
            authority.renew()
            wait_for(lambda: service.server.cameras.get("porch") is not None, "the camera")
            camera.send_signal(signal.SIGINT)
            assert camera.wait(30) == 0
        finally:
            camera.kill()
    assert "not yet valid (is this camera's clock right?)" in told


@pytest.mark.parametrize("certificate", [True, False])
def test_a_server_that_ends_after_the_handshake_may_come_back(keys: Keys, certificate: bool) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys.folder / "server.pem", keys.folder / "server.key")
    context.set_alpn_protocols(["h2"])
    porch = (keys.folder / "cameras/porch.pem", keys.folder / "cameras/porch.key") if certificate else ()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=end_each, args=(listening, context), daemon=True).start()
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(SinkError, match="is shutting down, or it") as error:
            ServerSink(address, pb.Hello(camera="porch"), tls=Tls(keys.folder / "ca.pem", *porch))
    assert error.value.status is None, "nothing that only people can mend"


def end_each(listening: socket.socket, context: ssl.SSLContext) -> None:
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:
            return
        with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True) as shaken:
            shaken.unwrap()


@pytest.mark.parametrize("gone", ["ca.pem", "cameras/porch.pem", "cameras/porch.key"])
def test_files_that_are_being_replaced_while_they_are_looked_at(
    keys: Keys, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    """They are read anew at each try, for years: sooner or later one goes between two looks at it."""
    ca, *porch = (keys.folder / name for name in ("ca.pem", "cameras/porch.pem", "cameras/porch.key"))
    tls = Tls(ca, *porch)
    read = Path.read_bytes

    def reading(path: Path) -> bytes:
        data = read(path)
        if path == keys.folder / gone:
            path.unlink()
        return data

    monkeypatch.setattr(Path, "read_bytes", reading)
    if gone == "ca.pem":
        assert isinstance(tls.credentials(), grpc.ChannelCredentials)
    else:
        with pytest.raises(TlsError, match=r"can't be read \(No such file"):
            tls.credentials()


def test_a_certificate_that_expires_while_the_server_is_away_is_told(
    service: Service, keys: Keys, operator: Operator, caplog: pytest.LogCaptureFixture
) -> None:
    """That the server is away was told before; this is why the camera isn't back when the server is."""
    porch = keys.folder / "cameras" / "porch"
    tls = Tls(keys.folder / "ca.pem", porch.with_suffix(".pem"), porch.with_suffix(".key"))
    link = ServerLink(service.address, hello_of(operator, np.zeros((32, 32), np.uint8), "porch"), Counter(), tls=tls)
    wait_for(lambda: link.wait_until_ready(0.1), "a connection")
    old = keys.folder / keys.expired("old")
    service.stop()
    for suffix in (".pem", ".key"):
        shutil.copy(old.with_suffix(suffix), porch.with_suffix(suffix))
    wait_for(lambda: link.wait_until_ready(0.1) or "certificate has expired" in caplog.text, "a refusal")
    assert "went away" in caplog.text
    assert not link.wait_until_ready(0)
    with pytest.raises(SinkError, match="is away since"):
        link.close()
