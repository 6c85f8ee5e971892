"""TLS to a decoder service: the camera's files checked before they are used, and why a connection fails, in words.

Python's own ``ssl`` looks at files and at a failed connection, since gRPC says no more than that it isn't ready.
"""

import logging
import socket
import ssl
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import grpc

log = logging.getLogger("veilcam.encode")

_PROBE_S = 5.0
_NO_CHECK_TIME = ssl.VerifyFlags(0x200000)
"""OpenSSL's ``X509_V_FLAG_NO_CHECK_TIME``, which Python has no name for."""
_EARLY = "not yet valid"
"""What OpenSSL says of a certificate whose time is to come, by the clock here. It passes by itself."""
_SOON_S = 30 * 86400.0
"""An authority that expires within so long is told at the start."""
_ALERT_S = 1.0
"""With TLS 1.3 a server refuses a client's certificate after the handshake; so long that is waited for."""


class TlsError(Exception):
    """A file that is missing or isn't what it should be; the message begins with the option."""


_SPEAKS_TLS = "the server speaks TLS: give --ca, --certificate and --key"
_ASKS = "the server asks for a certificate of this camera: give --certificate and --key"


@dataclass(frozen=True)
class Tls:
    """What a camera shows and whom it trusts.

    Attributes:
        ca: authority of the server's certificate; the public ones, if none.
        certificate: the camera's own, with its ``key``, for servers that ask for one.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def check(self) -> str | None:
        """Look at the files, and tell of a key that others may read and of an authority that expires soon. Returns the
        name in the camera's certificate, if there is one.

        One that isn't valid yet is taken for sound: the clock of a camera without a battery is late until it is set.

        Raises:
            TlsError: what is wrong with which.
        """
        _, _, _, until = self._read()
        if until is not None and until - time.time() < _SOON_S:
            log.warning("--ca %s: valid until %s; get this camera a new one soon", self.ca, _day(until))
        if self.key is not None and _mode(self.key) & 0o007:
            log.warning("--key %s: every user of this machine can read or change it (chmod 600 %s)", self.key, self.key)
        return _name_in(self.certificate, self.key) if self.certificate and self.key else None

    def _read(self) -> tuple[bytes | None, bytes | None, bytes | None, float | None]:
        """What the files hold: authority, key and certificate, each read once, since it may be replaced meanwhile; and
        until when an authority is valid, in seconds since 1970."""
        if (self.certificate is None) != (self.key is None):
            raise TlsError("--certificate and --key go together: give both")
        certificate = _read(self.certificate, "certificate") if self.certificate else None
        ca, key = (_read(path, option) if path else None for path, option in ((self.ca, "ca"), (self.key, "key")))
        until = None
        if ca is not None:
            try:
                until = _valid_until(ca)
            except (ssl.SSLError, ValueError):
                raise TlsError(f"--ca {self.ca}: no certificate in PEM") from None
            if until is not None and until < time.time():
                how = "the server's keeper can make a new one: veilcam-decode keys init DIR"
                raise TlsError(f"--ca {self.ca}: expired {_day(until)} (is this camera's clock right?); {how}")
        return ca, key, certificate, until

    def credentials(self) -> grpc.ChannelCredentials:
        """For a channel, from what the files hold now.

        Raises:
            TlsError: they are gone, or aren't what they should be any more.
        """
        *read, _ = self._read()
        if self.certificate and self.key:
            _name_in(self.certificate, self.key)
        return grpc.ssl_channel_credentials(*read)


@dataclass(frozen=True)
class Finding:
    """Why no connection comes about.

    Attributes:
        passes: it may pass by itself.
    """

    why: str
    passes: bool = False


def why_not(address: str, tls: Tls | None) -> Finding | None:
    """Why no connection to HOST:PORT comes about, as far as TLS or the host's name is the reason."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        context = _probe_context(tls)
        with (
            socket.create_connection((host, int(port)), _PROBE_S) as plain,
            context.wrap_socket(plain, server_hostname=host) as connection,
        ):
            if tls is None:
                return Finding(_SPEAKS_TLS)
            connection.settimeout(_ALERT_S)
            try:
                taken = connection.recv(1) != b""
            except ConnectionResetError:
                taken = False
            if not taken:
                return _of_the_end(tls)
    except (socket.gaierror, UnicodeError) as error:
        why = error.strerror if isinstance(error, socket.gaierror) else "no name can be so"
        return Finding(f"the name {host} can't be resolved ({why})", passes=True)
    except ssl.SSLCertVerificationError as error:
        return _of_the_server(error, host, tls)
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
        pass  # cut, as a server that is ending cuts it
    except ssl.SSLError as error:
        told = _of_the_connection(error, tls)
        return Finding(told) if told else None
    except (OSError, ValueError):
        pass
    return None


def _probe_context(tls: Tls | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=tls.ca if tls else None)
    context.set_alpn_protocols(["h2"])
    if tls is None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    elif tls.certificate is not None:
        context.load_cert_chain(tls.certificate, tls.key, password=lambda: "")
    return context


def _of_the_end(tls: Tls) -> Finding:
    """Of a server that ends the connection after the handshake and says nothing: many refuse a certificate so."""
    refuses = f"doesn't take --certificate {tls.certificate} (of another authority, or expired?)"
    asks = "asks for a certificate of this camera: give --certificate and --key"
    what = "the server ends each connection at once: it is shutting down, or it"
    return Finding(f"{what} {refuses if tls.certificate is not None else asks}", passes=True)


def _of_the_server(error: ssl.SSLCertVerificationError, host: str, tls: Tls | None) -> Finding:
    told = error.verify_message
    if _EARLY in told or "expired" in told:
        return Finding(f"the server's {told} (is this camera's clock right?)", passes=_EARLY in told)
    if "mismatch" in told or "match" in told:
        return Finding(f"the server's certificate isn't for {host} (veilcam-decode keys renew DIR --host {host})")
    whom = f"of --ca {tls.ca}" if tls is not None and tls.ca is not None else "that this machine knows; give --ca"
    return Finding(f"the server's certificate isn't from the authority {whom} ({told})")


def _of_the_connection(error: ssl.SSLError, tls: Tls | None) -> str | None:
    reason = (error.reason or "").lower().replace("_", " ")
    if "wrong version number" in reason or "record layer failure" in reason:
        return "the server speaks no TLS there" if tls is not None else None
    if "certificate required" in reason or (tls is not None and tls.certificate is None and "alert" in reason):
        return _ASKS
    if tls is None:
        return _SPEAKS_TLS
    if "alert" in reason:
        return f"the server doesn't take --certificate {tls.certificate} ({reason.rpartition('alert ')[2]})"
    return f"no TLS with the server ({reason})"


def _name_in(certificate: Path, key: Path) -> str | None:
    """The name in a certificate that is sound, has this key, and that a server may take today, or later.

    Python shows what is in a certificate only when someone shows it in a handshake: so here is one, in memory, with a
    server that trusts just this certificate.
    """
    camera, server = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    camera.check_hostname, camera.verify_mode = False, ssl.CERT_NONE
    server.verify_mode = ssl.CERT_REQUIRED
    server.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        for context in (camera, server):
            context.load_cert_chain(certificate, key, password=lambda: "")
        server.load_verify_locations(certificate)
    except ssl.SSLError as error:
        problem = f"not the unencrypted key, in PEM, of --certificate {certificate} ({error.reason or 'unreadable'})"
        raise TlsError(f"--key {key}: {problem}") from None
    except OSError as error:  # it was there a moment ago: it is being replaced
        raise TlsError(f"--certificate {certificate}, --key {key}: can't be read ({error.strerror})") from None
    try:
        return _shown(camera, server)
    except ssl.SSLError as error:
        told = getattr(error, "verify_message", "") or error.reason
        if _EARLY not in told:
            hint = "; the server's keeper can make it anew: veilcam-decode keys renew DIR" if "expired" in told else ""
            raise TlsError(f"--certificate {certificate}: {told}{hint}") from None
    server.verify_flags |= _NO_CHECK_TIME
    return _shown(camera, server)


def _shown(camera: ssl.SSLContext, server: ssl.SSLContext) -> str | None:
    """The common name that a server is shown.

    Raises:
        ssl.SSLError: it doesn't take it.
    """
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    shows, looks = camera.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True)
    for end in (shows, looks, shows, looks):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
    subject = cast("Iterable[Iterable[tuple[str, str]]]", (looks.getpeercert() or {}).get("subject", ()))
    return next((value for part in subject for kind, value in part if kind == "commonName"), None)


def _valid_until(pem: bytes) -> float | None:
    """When the last of these authorities expires, in seconds since 1970; None if Python takes none for an authority.

    Raises:
        ssl.SSLError, ValueError: there is no certificate in it.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=pem.decode("ascii", errors="ignore"))  # beside PEM, what is said of it
    ends = [ssl.cert_time_to_seconds(str(told["notAfter"])) for told in context.get_ca_certs()]
    return max(ends, default=None)


def _day(moment: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(moment))


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError as error:  # it was there a moment ago: it is being replaced
        raise TlsError(f"--key {path}: can't be read ({error.strerror})") from None


def _read(path: Path, option: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TlsError(f"--{option} {path}: can't be read ({error.strerror})") from None
