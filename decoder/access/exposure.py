"""Whether a service may listen where its settings say: beyond loopback only with TLS and authentication."""

from ipaddress import ip_address

from decoder.access import AccessError
from decoder.settings import Settings

GUARDS = ("certificate", "key", "client_ca", "users")
"""Settings without which nothing listens beyond loopback."""


def check_exposure(settings: Settings) -> None:
    """Refuse what would let anyone in.

    Raises:
        AccessError: it says how to do it right.
    """
    if (settings.certificate is None) != (settings.key is None):
        raise AccessError("--certificate and --key go together: give both")
    if settings.client_ca is not None and settings.certificate is None:
        raise AccessError("--client-ca needs --certificate and --key")
    if settings.trusted_proxy is not None and settings.users is None:
        raise AccessError("--trusted-proxy needs --users: whoever reaches the proxy would be let in")
    if is_loopback(settings.host) or settings.insecure:
        return
    if lacking := lacking_guards(settings):
        name = "NAME" if is_everywhere(settings.host) else settings.host
        options = ", ".join(f"--{name.replace('_', '-')}" for name in lacking)
        raise AccessError(
            f"--host {settings.host}: nothing listens beyond loopback without TLS and authentication; missing: "
            f"{options}\n"
            f"make certificates: veilcam-decode keys init DIR --host {name} --camera NAME\n"
            "add people: veilcam-decode users add NAME --role viewer --camera NAME --users users.toml\n"
            "then: --certificate DIR/server.pem --key DIR/server.key --client-ca DIR/ca.pem --users users.toml\n"
            "or say --insecure: everyone who reaches it can watch, or publish"
        )


def lacking_guards(settings: Settings) -> list[str]:
    """Settings that would be needed, and aren't there, to listen beyond loopback."""
    return [name for name in GUARDS if getattr(settings, name) is None]


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine alone; a name is, if it is ``localhost``."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def is_everywhere(host: str) -> bool:
    """Whether an address to listen on is all that this machine has: nobody calls it by that."""
    try:
        return ip_address(host).is_unspecified
    except ValueError:
        return False
