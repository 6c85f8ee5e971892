"""The trusted proxy speaks for many: the limit of one address isn't its own, over IPv4 and IPv6."""

import socket
from pathlib import Path

import pytest

from decoder.access.people import write_people
from decoder.settings import Settings
from tests.conftest import Service, StartService

MOST = 2


def answered(service: Service, host: str) -> list[bool]:
    """Whether each of some connections that are open at one time is answered."""
    made = [socket.create_connection((host, service.server.http_port), timeout=20) for _ in range(MOST + 3)]
    found = []
    for each in made:
        try:
            each.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            found.append(each.recv(12) == b"HTTP/1.1 200")
        except ConnectionError:
            found.append(False)
    for each in made:
        each.close()
    return found


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_proxy_alone_has_more_connections_than_one_address(
    host: str, start_service: StartService, tmp_path: Path
) -> None:
    try:
        socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError:
        pytest.skip(f"{host} isn't there")
    write_people(tmp_path / "users.toml", {})
    settings = {"port": 0, "http": 0, "host": host, "max_peer_streams": MOST, "users": tmp_path / "users.toml"}
    service = start_service(Settings.model_validate(settings | {"trusted_proxy": host}))
    assert answered(service, host) == [True] * (MOST + 3)
    service = start_service(Settings.model_validate(settings))
    assert answered(service, host) == [True] * MOST + [False] * 3
