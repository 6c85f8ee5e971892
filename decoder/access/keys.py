"""A small certificate authority in a folder: one server, its cameras, and programs that watch.

```
DIR/ca.pem, ca.key               the authority; its key is needed to make certificates, by no server and no camera
DIR/server.pem, server.key       for the decoder service
DIR/cameras/NAME.pem, NAME.key   one pair for each camera; the certificate's name is the camera's
DIR/programs/NAME.pem, NAME.key  the same for programs; its name is "program:NAME", which no camera can have
```

All of it is readable by its owner alone. Use certificates of your own instead where there is an authority already.
"""

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from decoder.access import AccessError
from decoder.private import replace_file
from protos.rules import CAMERA_NAME, CAMERA_NAME_TOLD

AUTHORITY_DAYS = 3650
SERVER_DAYS = 397
"""More than 13 months, and browsers refuse it of public authorities; a year is what renewal can be remembered by."""
CLIENT_DAYS = 730
"""Someone has to carry the renewed file to a camera."""
PROGRAM = "program:"
"""Begins a program's name in its certificate. No camera's name has a colon."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")

_BACKDATED = timedelta(days=1)
"""Cameras' clocks are late, and those without a battery later."""
_HOST = re.compile(r"(?=.{1,253}\Z)(\*\.)?[a-zA-Z0-9_]([a-zA-Z0-9_-]{0,62})(\.[a-zA-Z0-9_-]{1,63})*")
_KINDS = {"cameras": "", "programs": PROGRAM}
"""Folder of a kind of client → what its certificates' names begin with."""

Key = ec.EllipticCurvePrivateKey


class KeysError(AccessError):
    """What can't be made or renewed."""


@dataclass(frozen=True)
class Made:
    """A certificate that was written.

    Attributes:
        path: of the certificate; its key has the same name with ``.key``.
        until: it is valid.
    """

    path: Path
    until: datetime

    @property
    def key(self) -> Path:
        return self.path.with_suffix(".key")


def init(
    folder: Path, hosts: Sequence[str] = (), cameras: Sequence[str] = (), programs: Sequence[str] = ()
) -> list[Made]:
    """Make an authority, a server's certificate and one for each camera and program. Nothing is overwritten.

    Args:
        folder: made if it isn't there.
        hosts: names and addresses by which cameras and people reach the server; loopback's are always among them.

    Raises:
        KeysError: a name that can't be, or a file that is there already; then nothing was written.
    """
    now = datetime.now(UTC)
    names = [_host(name) for name in dict.fromkeys([*hosts, *LOOPBACK])]
    clients = [("cameras", name) for name in dict.fromkeys(cameras)]
    clients += [("programs", name) for name in dict.fromkeys(programs)]
    paths = [folder / "ca.pem", folder / "server.pem", *(_client_path(folder, *client) for client in clients)]
    for path in paths:
        _check_absent(path)
    for place in (folder, *(path.parent for path in paths)):
        _make_folder(place)
    key = ec.generate_private_key(ec.SECP256R1())
    name = _named(f"VeilCam authority of {os.uname().nodename}"[:64])
    until = now + timedelta(days=AUTHORITY_DAYS)
    certificate = (
        _builder(name, name, key.public_key(), now, until)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    made = [_write(paths[0], certificate, key)]
    authority = Authority(folder, certificate, key)
    made.append(authority.server(names, now))
    return made + [authority.client(kind, name, now) for kind, name in clients]


@dataclass(frozen=True)
class Authority:
    """What signs certificates."""

    folder: Path
    certificate: x509.Certificate
    signing: Key

    @staticmethod
    def open(folder: Path) -> "Authority":
        """The one that ``init`` made.

        Raises:
            KeysError: it isn't there, or its files are damaged.
        """
        return Authority(folder, _read_certificate(folder / "ca.pem"), _read_key(folder / "ca.key"))

    def server(self, names: Sequence[x509.GeneralName], now: datetime) -> Made:
        """A server's certificate, with a key of its own."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject, usage = _named("VeilCam decoder service"), ExtendedKeyUsageOID.SERVER_AUTH
        certificate = self._issue(subject, key.public_key(), names, usage, SERVER_DAYS, now)
        return _write(self.folder / "server.pem", certificate, key)

    def client(self, kind: str, name: str, now: datetime | None = None, days: float = CLIENT_DAYS) -> Made:
        """A client's certificate, with a key of its own.

        Args:
            kind: ``cameras`` or ``programs``.
            name: of the camera, or of the program, which is a user by that name.
            now: its validity begins; else the present.
            days: it is valid.

        Raises:
            KeysError: a name that can't be, or one that has a certificate already.
        """
        path = _client_path(self.folder, kind, name)
        _check_absent(path)
        _make_folder(path.parent)
        key, subject = ec.generate_private_key(ec.SECP256R1()), _named(_KINDS[kind] + name)
        usage, now = ExtendedKeyUsageOID.CLIENT_AUTH, now or datetime.now(UTC)
        return _write(path, self._issue(subject, key.public_key(), [], usage, days, now), key)

    def renew(self, hosts: Sequence[str] = (), now: datetime | None = None) -> list[Made]:
        """New certificates in place of all there are, for the same names and keys: no ``.key`` file changes.

        Args:
            hosts: that the server's certificate is to name from now on, beside loopback's; those it has, if none.

        Raises:
            KeysError: the authority's own time is over, or a file is damaged.
        """
        now = now or datetime.now(UTC)
        if now >= self.certificate.not_valid_after_utc:
            problem = f"expired {_day(self.certificate.not_valid_after_utc)}; make a new authority in another folder"
            raise KeysError(f"{self.folder / 'ca.pem'}: {problem}")
        names = [_host(name) for name in dict.fromkeys([*hosts, *LOOPBACK])] if hosts else None
        paths = [self.folder / "server.pem"] if (self.folder / "server.pem").exists() else []
        paths += [path for kind in _KINDS for path in sorted((self.folder / kind).glob("*.pem"))]
        old = [_read_certificate(path) for path in paths]
        made = []
        for path, before in zip(paths, old, strict=True):
            serves = path.parent == self.folder
            usage = ExtendedKeyUsageOID.SERVER_AUTH if serves else ExtendedKeyUsageOID.CLIENT_AUTH
            kept = names if serves and names else _names_of(before)
            public = before.public_key()
            assert isinstance(public, ec.EllipticCurvePublicKey)
            days = SERVER_DAYS if serves else CLIENT_DAYS
            made.append(_replace(path, self._issue(before.subject, public, kept, usage, days, now)))
        return made

    def _issue(
        self, subject: x509.Name, public: ec.EllipticCurvePublicKey, names: Sequence[x509.GeneralName],
        usage: x509.ObjectIdentifier, days: float, now: datetime,
    ) -> x509.Certificate:  # fmt: skip
        # What outlives its authority would fail on that day anyway, with less of a reason.
        until = min(now + timedelta(days=days), self.certificate.not_valid_after_utc)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.signing.public_key())
        builder = (
            _builder(subject, self.certificate.subject, public, now, until)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(issuer, critical=False)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self.signing, hashes.SHA256())


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, now: datetime, until: datetime
) -> x509.CertificateBuilder:
    start = now - _BACKDATED
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(start, until - timedelta(seconds=1)))
        .not_valid_after(until)
    )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        pass
    if not _HOST.fullmatch(name):
        raise KeysError(f"--host {name[:80]!r}: expected a host name or an address, without a port")
    return x509.DNSName(name.lower())


def _names_of(certificate: x509.Certificate) -> list[x509.GeneralName]:
    try:
        return list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return []


def _client_path(folder: Path, kind: str, name: str) -> Path:
    # With its "program:" a name must still fit a certificate's 64 characters.
    if not CAMERA_NAME.fullmatch(name) or len(_KINDS[kind] + name) > 64:
        raise KeysError(f"--{kind.removesuffix('s')} {name[:80]!r}: expected {CAMERA_NAME_TOLD}")
    return folder / kind / f"{name}.pem"


def _day(time: datetime) -> str:
    return time.strftime("%Y-%m-%d")


def _check_absent(path: Path) -> None:
    for each in (path, path.with_suffix(".key")):
        if each.exists() or each.is_symlink():
            raise KeysError(f"{each}: is there already; nothing was written")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise KeysError(f"{folder}: can't be made ({error.strerror})") from None


def _write(path: Path, certificate: x509.Certificate, key: Key) -> Made:
    """A new pair of files, the key first: a certificate that is there has its key."""
    unencrypted = serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, unencrypted)
    _create(path.with_suffix(".key"), pem)
    _create(path, certificate.public_bytes(serialization.Encoding.PEM))
    return Made(path, certificate.not_valid_after_utc)


def _replace(path: Path, certificate: x509.Certificate) -> Made:
    """In one step, with the owner and mode that it had: a running service that could read it still can."""
    try:
        replace_file(path, certificate.public_bytes(serialization.Encoding.PEM))
    except OSError as error:
        raise KeysError(f"{path}: can't be written ({error.strerror})") from None
    return Made(path, certificate.not_valid_after_utc)


def _create(path: Path, data: bytes) -> None:
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise KeysError(f"{path}: can't be written ({error.strerror})") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        hint = "; veilcam-decode keys init makes it" if isinstance(error, FileNotFoundError) else ""
        raise KeysError(f"{path}: can't be read ({error.strerror}{hint})") from None


def _read_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(_read(path))
    except ValueError:
        raise KeysError(f"{path}: not a certificate in PEM") from None


def _read_key(path: Path) -> Key:
    try:
        key = serialization.load_pem_private_key(_read(path), None)
    except (ValueError, TypeError):
        raise KeysError(f"{path}: not an unencrypted private key in PEM") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise KeysError(f"{path}: not a key that veilcam-decode keys init made")
    return key
