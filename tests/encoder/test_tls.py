"""What a camera tells of its own files at the start, and of a server's name that isn't known; with a server that speaks
TLS: tests/decoder/test_tls.py."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from decoder.access.keys import init
from encoder.tls import Tls, TlsError
from tests.encoder.test_cli import encode
from tests.encoder.test_link import lines


def authority(days: float) -> bytes:
    """One that is valid for so long from now."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    until = datetime.now(UTC) + timedelta(days=days)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(until - timedelta(days=3650)).not_valid_after(until)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return made.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def test_an_authority_that_expires_is_told_before_and_after(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_bytes(authority(31))
    Tls(ca).check()
    assert not caplog.text
    ca.write_bytes(authority(29))
    Tls(ca).check()
    day = f"{datetime.now(UTC) + timedelta(days=29):%Y-%m-%d}"
    assert len(lines(caplog.text, f"--ca {ca}: valid until {day}")) == 1
    ca.write_bytes(authority(-1))
    for look in (Tls(ca).check, Tls(ca).credentials):
        with pytest.raises(TlsError, match=rf"--ca .*ca.pem: expired {datetime.now(UTC) - timedelta(days=1):%Y-%m-%d}"):
            look()
    ca.write_bytes(authority(-1) + authority(100))  # as while one takes the other's place
    Tls(ca).check()


def test_a_key_that_everyone_can_read_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    init(tmp_path / "keys", cameras=["porch"])
    pem = tmp_path / "keys" / "cameras" / "porch.pem"
    key = pem.with_suffix(".key")
    tls = Tls(tmp_path / "keys" / "ca.pem", pem, key)
    assert tls.check() == "porch"
    key.chmod(0o640)  # a group that keeps keys
    tls.check()
    assert not caplog.text
    key.chmod(0o644)
    tls.check()
    assert len(lines(caplog.text, f"--key {key}: every user of this machine can read", f"chmod 600 {key}")) == 1


@pytest.mark.parametrize("host", ["nosuchhost.invalid", "no..name"])
def test_a_name_that_is_not_known_is_told_apart_and_tried_again(host: str) -> None:
    done = encode("pattern:64x48@30#5", "--server", f"{host}:50051", "--give-up-seconds", "1")
    assert done.returncode == 1
    assert len(lines(done.stderr, "WARNING", f"{host}:50051: the name {host} can't be resolved (", "trying again")) == 1
    assert "no decoder service answers" not in done.stderr
