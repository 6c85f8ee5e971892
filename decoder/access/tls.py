"""Certificates in use: read, checked, and taken up anew when their files change, without a restart."""

import asyncio
import logging
import ssl
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.x509.oid import NameOID
from grpc import aio

from decoder.access import AccessError
from decoder.settings import Settings

log = logging.getLogger("veilcam.decode")

_SOON = timedelta(days=30)
"""Before a certificate expires, whoever reads the log is told, once a day."""
_TOLD_EVERY = timedelta(days=1)
_LOOK_EVERY_S = 3600.0


@dataclass(frozen=True)
class _Pair:
    """A certificate with its key, and whose clients' certificates are taken, as PEM."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None
    page: ssl.SSLContext
    until: datetime


class Certificates:
    """The files that settings name. Each new connection gets what is in them by then.

    Files that don't fit one another, such as while they are being replaced, are told in the log and not taken up.

    Args:
        settings: with ``certificate`` and ``key``.

    Raises:
        AccessError: a file that can't be read or isn't what it should be, or a certificate that has expired.
    """

    def __init__(self, settings: Settings) -> None:
        assert settings.certificate is not None
        assert settings.key is not None
        self._certificate, self._key, self._client_ca = settings.certificate, settings.key, settings.client_ca
        self._lock = threading.Lock()
        self._told = datetime.min.replace(tzinfo=UTC)
        self._seen = self._stamps()
        self._now = self._read()

    def until(self) -> datetime:
        """When the certificate expires that new connections get."""
        return self.look().until

    async def keep_looking(self) -> None:
        """Look also when nobody connects, until cancelled: that it expires is told in time."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            await asyncio.to_thread(self.look)

    def for_grpc(self) -> grpc.ServerCredentials:
        """Of a port where cameras and programs show certificates of their own, if there is a ``client_ca``."""
        given = self._now

        def newer() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            if (now := self.look()) is given:
                return None
            given = now
            return _configuration(now)

        mutual = self._client_ca is not None
        return grpc.dynamic_ssl_server_credentials(_configuration(given), newer, mutual)  # type: ignore[arg-type]

    def for_page(self) -> ssl.SSLContext:
        """Of the page's port."""
        context = _page_context(self._certificate, self._key, self._client_ca)

        def newest(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
            connection.context = self.look().page

        # It is called for each connection, also for those that name no host.
        context.sni_callback = newest
        return context

    def look(self) -> _Pair:
        """What the files hold; if that can't be, what they held before."""
        with self._lock:
            stamps = self._stamps()
            if stamps != self._seen:
                self._seen = stamps
                try:
                    self._now = self._read()
                except AccessError as error:
                    log.error("certificates stay as they were: %s", error)
            if self._now.until - datetime.now(UTC) < _SOON and datetime.now(UTC) - self._told >= _TOLD_EVERY:
                self._tell(self._now.until)
            return self._now

    def _read(self) -> _Pair:
        certificate, key = _read(self._certificate, "certificate"), _read(self._key, "key")
        client_ca = _read(self._client_ca, "client-ca") if self._client_ca is not None else None
        try:
            read = x509.load_pem_x509_certificate(certificate)
        except ValueError:
            raise AccessError(f"--certificate {self._certificate}: not a certificate in PEM") from None
        until = read.not_valid_after_utc
        if until < datetime.now(UTC):
            hint = "veilcam-decode keys renew DIR, if keys init made it"
            raise AccessError(f"--certificate {self._certificate}: expired {until:%Y-%m-%d}; {hint}")
        context = _page_context(self._certificate, self._key, self._client_ca)
        try:
            loose = bool(self._key.stat().st_mode & 0o007)
        except OSError as error:
            raise AccessError(f"--key {self._key}: can't be read ({error.strerror})") from None
        self._tell(until)
        if loose:
            log.warning("--key %s: every user of this machine can read it (chmod 600 %s)", self._key, self._key)
        return _Pair(certificate, key, client_ca, context, until)

    def _tell(self, until: datetime) -> None:
        self._told = now = datetime.now(UTC)
        day = f"{until:%Y-%m-%d}"
        if until < now:
            log.error("certificate %s: expired %s; nobody can connect any more, renew it", self._certificate, day)
        elif until - now < _SOON:
            log.warning("certificate %s: valid until %s; renew it soon", self._certificate, day)
        else:
            log.info("certificate %s: valid until %s", self._certificate, day)

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        found: list[tuple[int, int, int] | None] = []
        for path in (self._certificate, self._key, self._client_ca):
            try:
                told = path.stat() if path is not None else None
            except OSError:
                told = None
            found.append((told.st_mtime_ns, told.st_size, told.st_ino) if told is not None else None)
        return found


def names_shown(context: "aio.ServicerContext[Any, Any]") -> Sequence[str]:
    """Whom the certificate names that a caller of gRPC has shown; empty if none was."""
    shown = list(context.auth_context().get("x509_pem_cert", []))
    return names_in(shown[0]) if shown else []


def names_in(certificate: bytes) -> Sequence[str]:
    """Whom a certificate in PEM names: its common name, or its other names if it has none."""
    read = x509.load_pem_x509_certificate(certificate)
    common = [str(each.value) for each in read.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if common:
        return common
    try:
        others = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return others.get_values_for_type(x509.DNSName)


def hosts_in(certificate: bytes) -> list[str]:
    """Names and addresses of hosts for which a certificate in PEM is, as a browser looks for them."""
    extensions = x509.load_pem_x509_certificate(certificate).extensions
    try:
        named = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(each.value) for each in named if isinstance(each, x509.DNSName | x509.IPAddress)]


def _configuration(pair: _Pair) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pair.key, pair.certificate)], pair.client_ca)


def _page_context(certificate: Path, key: Path, client_ca: Path | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, password=lambda: "")
    except ssl.SSLError as error:
        problem = f"not the unencrypted key, in PEM, of {certificate} ({error.reason or 'unreadable'})"
        raise AccessError(f"--key {key}: {problem}") from None
    except OSError as error:
        raise AccessError(f"--key {key}: can't be read ({error.strerror})") from None
    if client_ca is not None:
        try:
            context.load_verify_locations(client_ca)
        except (ssl.SSLError, OSError):
            raise AccessError(f"--client-ca {client_ca}: no certificates in PEM") from None
    return context


def _read(path: Path, option: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AccessError(f"--{option} {path}: can't be read ({error.strerror})") from None
