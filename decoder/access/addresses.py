"""From where someone calls."""

from ipaddress import IPv6Address, ip_address, ip_network
from urllib.parse import unquote

from starlette.requests import Request


def address_of(peer: str) -> str:
    """The address in what gRPC calls a peer, as in ``ipv4:192.0.2.1:40000`` or ``ipv6:%5B::1%5D:40000``."""
    _, _, rest = peer.partition(":")
    return unmapped(unquote(rest).rpartition(":")[0].strip("[]")) or peer


def unmapped(address: str) -> str:
    """``192.0.2.1`` for ``::ffff:192.0.2.1``: so a socket that listens on IPv6 and IPv4 names who comes by IPv4."""
    try:
        return str(IPv6Address(address).ipv4_mapped or address)
    except ValueError:
        return address


def caller_of(request: Request) -> str:
    """The address that a request of the page comes from."""
    return request.client.host if request.client is not None else "unknown"


def network_of(address: str) -> str:
    """What counts as one caller: whoever has IPv6 has 2⁶⁴ addresses."""
    try:
        found = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if not isinstance(found, IPv6Address):
        return address
    return str(found.ipv4_mapped or ip_network((found, 64), strict=False))
