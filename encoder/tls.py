"""TLS to a decoder service: the camera's files checked before they are used, and why a connection fails, in words.

Python's own ``ssl`` looks at files and at a failed connection, since gRPC says no more than that it isn't ready.
"""

import socket
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import grpc

_PROBE_S = 5.0
_ALERT_S = 1.0
"""With TLS 1.3 a server refuses a client's certificate after the handshake; so long that is waited for."""


class TlsError(Exception):
    """A file that is missing or isn't what it should be; the message begins with the option."""


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
        """Look at the files. Returns the name in the camera's certificate, if there is one.

        Raises:
            TlsError: what is wrong with which.
        """
        if (self.certificate is None) != (self.key is None):
            raise TlsError("--certificate and --key go together: give both")
        for path, option in ((self.ca, "ca"), (self.certificate, "certificate"), (self.key, "key")):
            if path is not None:
                _read(path, option)
        if self.ca is not None:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(self.ca)
            except ssl.SSLError:
                raise TlsError(f"--ca {self.ca}: no certificate in PEM") from None
        if self.certificate is None or self.key is None:
            return None
        return _name_in(self.certificate, self.key)

    def credentials(self) -> grpc.ChannelCredentials:
        """For a channel, from what the files hold now.

        Raises:
            TlsError: they are gone, or aren't what they should be any more.
        """
        self.check()
        named = ((self.ca, "ca"), (self.key, "key"), (self.certificate, "certificate"))
        return grpc.ssl_channel_credentials(*(_read(path, option) if path else None for path, option in named))


def why_not(address: str, tls: Tls | None) -> str | None:
    """Why no connection to HOST:PORT comes about, as far as TLS is the reason."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        context = _probe_context(tls)
        with (
            socket.create_connection((host, int(port)), _PROBE_S) as plain,
            context.wrap_socket(plain, server_hostname=host) as connection,
        ):
            if tls is None:
                return "the server speaks TLS: give --ca, --certificate and --key"
            connection.settimeout(_ALERT_S)
            try:
                taken = connection.recv(1) != b""
            except ConnectionResetError:
                taken = False
            if not taken and tls.certificate is not None:
                return f"the server doesn't take --certificate {tls.certificate} (of another authority, or expired?)"
            if not taken:
                return _ASKS
    except ssl.SSLCertVerificationError as error:
        return _of_the_server(error, host, tls)
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
        pass  # cut, as a server that is ending cuts it
    except ssl.SSLError as error:
        return _of_the_connection(error, tls)
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


def _of_the_server(error: ssl.SSLCertVerificationError, host: str, tls: Tls | None) -> str:
    told = error.verify_message
    if "expired" in told or "not yet valid" in told:
        return f"the server's {told} (is this camera's clock right?)"
    if "mismatch" in told or "match" in told:
        return f"the server's certificate isn't for {host} (veilcam-decode keys renew DIR --host {host})"
    whom = f"of --ca {tls.ca}" if tls is not None and tls.ca is not None else "that this machine knows; give --ca"
    return f"the server's certificate isn't from the authority {whom} ({told})"


def _of_the_connection(error: ssl.SSLError, tls: Tls | None) -> str | None:
    reason = (error.reason or "").lower().replace("_", " ")
    if "wrong version number" in reason or "record layer failure" in reason:
        return "the server speaks no TLS there" if tls is not None else None
    if "certificate required" in reason or (tls is not None and tls.certificate is None and "alert" in reason):
        return _ASKS
    if tls is None:
        return "the server speaks TLS: give --ca, --certificate and --key"
    if "alert" in reason:
        return f"the server doesn't take --certificate {tls.certificate} ({reason.rpartition('alert ')[2]})"
    return f"no TLS with the server ({reason})"


def _name_in(certificate: Path, key: Path) -> str | None:
    """The name in a certificate that is sound, has this key, and that a server may take today.

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
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    shows, looks = camera.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True)
    for end in (shows, looks, shows, looks):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLError as error:
            told = getattr(error, "verify_message", "") or error.reason
            hint = "; the server's keeper can make it anew: veilcam-decode keys renew DIR" if "expired" in told else ""
            raise TlsError(f"--certificate {certificate}: {told}{hint}") from None
    subject = cast("Iterable[Iterable[tuple[str, str]]]", (looks.getpeercert() or {}).get("subject", ()))
    return next((value for part in subject for kind, value in part if kind == "commonName"), None)


def _read(path: Path, option: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TlsError(f"--{option} {path}: can't be read ({error.strerror})") from None
