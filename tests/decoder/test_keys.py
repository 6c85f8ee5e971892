"""Certificates: what ``veilcam-decode keys`` makes, as OpenSSL sees it, and that it never overwrites."""

import ssl
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from decoder.access.keys import AUTHORITY_DAYS, CLIENT_DAYS, SERVER_DAYS, Authority, KeysError, init

KEYS = [sys.executable, "-m", "decoder", "keys"]


def keys(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*KEYS, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def common_name(read: x509.Certificate) -> str:
    (attribute,) = read.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(attribute.value)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def handshake(folder: Path, client: Path, name: str) -> str:
    """A TLS connection in memory, each side checking the other; the name that the server reads."""
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=folder / "ca.pem")
    server.verify_mode = ssl.CERT_REQUIRED
    server.load_cert_chain(folder / "server.pem", folder / "server.key")
    camera = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=folder / "ca.pem")
    camera.load_cert_chain(client, client.with_suffix(".key"))
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [camera.wrap_bio(down, up, server_hostname=name), server.wrap_bio(up, down, server_side=True)]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    told = ends[1].getpeercert(binary_form=True)
    assert told is not None
    return common_name(x509.load_der_x509_certificate(told))


def test_one_command_makes_all_that_mutual_tls_needs(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    done = keys(
        "init", folder, "--host", "decoder.local", "--host", "192.0.2.7", "--camera", "porch", "--camera", "b.2"
    )
    assert done.returncode == 0, done.stderr
    for name in ("decoder.local", "192.0.2.7", "localhost", "127.0.0.1", "::1"):
        assert handshake(folder, folder / "cameras" / "porch.pem", name) == "porch"
    assert handshake(folder, folder / "cameras" / "b.2.pem", "localhost") == "b.2"
    with pytest.raises(ssl.SSLCertVerificationError, match="elsewhere"):
        handshake(folder, folder / "cameras" / "porch.pem", "elsewhere")
    assert keys("camera", folder, "yard").returncode == 0
    assert handshake(folder, folder / "cameras" / "yard.pem", "localhost") == "yard"
    assert keys("program", folder, "nvr").returncode == 0
    assert handshake(folder, folder / "programs" / "nvr.pem", "localhost") == "program:nvr", "no camera's name"
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in (folder, *folder.rglob("*")) if path.is_dir()} == {0o700}


def test_what_serves_can_not_pass_for_a_camera_nor_a_camera_for_what_serves(tmp_path: Path) -> None:
    init(tmp_path, cameras=["porch"])
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        handshake(tmp_path, tmp_path / "server.pem", "localhost")


def test_how_long_they_are_valid_is_sensible_and_told(tmp_path: Path) -> None:
    done = keys("init", tmp_path, "--camera", "porch")
    expected = {"ca": AUTHORITY_DAYS, "server": SERVER_DAYS, "cameras/porch": CLIENT_DAYS}
    for name, days in expected.items():
        path = tmp_path / f"{name}.pem"
        until = certificate(path).not_valid_after_utc
        assert abs(until - datetime.now(UTC) - timedelta(days=days)) < timedelta(hours=1)
        assert f"{path}: valid until {until:%Y-%m-%d}" in done.stderr
        assert certificate(path).not_valid_before_utc < datetime.now(UTC) - timedelta(hours=23), (
            "cameras' clocks are late"
        )


@pytest.mark.parametrize("there", ["ca.pem", "ca.key", "server.key", "cameras/porch.key"])
def test_nothing_is_ever_overwritten(tmp_path: Path, there: str) -> None:
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_text("mine")
    done = keys("init", tmp_path, "--camera", "porch")
    assert (done.returncode, f"{tmp_path / there}: is there already" in done.stderr) == (2, True)
    assert contents(tmp_path) == {tmp_path / there: b"mine"}, "and nothing else is written"


def test_a_camera_has_one_certificate(tmp_path: Path) -> None:
    init(tmp_path, cameras=["porch"])
    before = contents(tmp_path)
    done = keys("camera", tmp_path, "porch")
    assert (done.returncode, "porch.key: is there already" in done.stderr or "porch.pem" in done.stderr) == (2, True)
    assert contents(tmp_path) == before


def test_renewal_keeps_names_and_keys_and_begins_anew(tmp_path: Path) -> None:
    init(tmp_path, ["decoder.local"], ["porch"], ["nvr"])
    before = contents(tmp_path)
    later = datetime.now(UTC) + timedelta(days=300)
    made = Authority.open(tmp_path).renew(now=later)
    renewed = {tmp_path / name for name in ("server.pem", "cameras/porch.pem", "programs/nvr.pem")}
    assert {each.path for each in made} == renewed
    after = contents(tmp_path)
    assert {path for path in after if after[path] != before.get(path)} == renewed
    assert certificate(tmp_path / "server.pem").not_valid_after_utc > later + timedelta(days=SERVER_DAYS - 1)
    assert keys("renew", tmp_path).returncode == 0
    assert handshake(tmp_path, tmp_path / "cameras" / "porch.pem", "decoder.local") == "porch"
    assert keys("renew", tmp_path, "--host", "moved.local").returncode == 0
    assert handshake(tmp_path, tmp_path / "cameras" / "porch.pem", "moved.local") == "porch"
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path, tmp_path / "cameras" / "porch.pem", "decoder.local")
    assert common_name(certificate(tmp_path / "programs" / "nvr.pem")) == "program:nvr"


def test_no_certificate_outlives_its_authority(tmp_path: Path) -> None:
    init(tmp_path, cameras=["porch"])
    authority = Authority.open(tmp_path)
    end = authority.certificate.not_valid_after_utc
    made = authority.renew(now=end - timedelta(days=10))
    assert {each.until for each in made} == {end}
    with pytest.raises(KeysError, match=r"ca\.pem: expired"):
        authority.renew(now=end)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("init", "DIR", "--camera", "../up"), "--camera '../up': expected 1 to 64"),
        (("init", "DIR", "--program", "x" * 60), "expected 1 to 64"),
        (("init", "DIR", "--host", "http://x"), "--host 'http://x': expected a host name or an address"),
        (("init", "DIR", "--host", "two words"), "--host 'two words'"),
        (("init", "DIR", "--host", "ü.example"), "--host 'ü.example'"),
        (("init", "/proc/nowhere"), "can't be made"),
        (("camera", "DIR", "porch"), "veilcam-decode keys init makes it"),
        (("renew", "DIR"), "veilcam-decode keys init makes it"),
    ],
)
def test_what_can_not_be_done_is_a_line_and_an_exit_code(tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    done = keys(*(str(tmp_path / "keys") if word == "DIR" else word for word in arguments))
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert told in done.stderr
    assert not (tmp_path / "keys").exists()


@pytest.mark.parametrize("name", ["ca.pem", "ca.key", "cameras/porch.pem"])
def test_a_damaged_file_is_named_and_nothing_is_renewed(tmp_path: Path, name: str) -> None:
    init(tmp_path, cameras=["porch"])
    (tmp_path / name).write_bytes(b"-----BEGIN CERTIFICATE-----\nxx\n")
    before = contents(tmp_path)
    done = keys("renew", tmp_path)
    assert (done.returncode, f"{tmp_path / name}: not " in done.stderr) == (2, True)
    assert contents(tmp_path) == before
