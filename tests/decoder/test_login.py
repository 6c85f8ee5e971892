"""Signing in: sessions, forms and origins of any kind, guesses, and behind a proxy."""

import http.client
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from decoder.access import AccessError
from decoder.access.door import SESSION_S, TRIES_BY_ADDRESS, TRIES_BY_NAME
from decoder.access.people import Person, write_people
from decoder.access.roles import Role
from decoder.settings import Settings
from tests.conftest import StartService
from tests.decoder.guarded import PASSWORD, TOKENS, Guarded, Keys, bearer


def test_a_session_is_a_cookie_that_scripts_and_other_sites_never_get(guarded: Guarded) -> None:
    told = guarded.sign_in("vera").headers["Set-Cookie"]
    name, _, attributes = told.partition("=")
    assert name == "__Host-veilcam"
    parts = {part.strip().lower() for part in attributes.split(";")[1:]}
    assert parts == {"httponly", "secure", "samesite=strict", "path=/", f"max-age={SESSION_S:.0f}"}
    session = guarded.session("vera")
    assert session != guarded.session("vera"), "each is new"
    assert guarded.ask("/cameras.json", session).status == 200
    assert guarded.ask("/logout", session | {"Origin": "https://evil.example"}, {}).status == 403
    assert guarded.ask("/cameras.json", session).status == 200
    assert guarded.ask("/logout", session, {}).status == 303
    assert guarded.ask("/cameras.json", session).status == 401
    assert guarded.sign_in("vera", Origin="https://evil.example").status == 403


@pytest.mark.parametrize("origin", ["http://[x", "http://[::1", "http://x]", "null", "http://a\u212a.example"])
def test_an_origin_that_is_none_is_foreign(plain_door: Guarded, origin: str, caplog: pytest.LogCaptureFixture) -> None:
    headers = {"Origin": origin.encode("utf-8").decode("latin-1")}
    assert plain_door.ask("/login", headers, {"name": "x"}).status == 403
    assert plain_door.ask("/logout", headers, {}).status == 403
    assert "Traceback" not in caplog.text


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    origin=st.none()
    | st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=30).map(str.strip)
    | st.text("[]:/@.x1%", max_size=12).map("http://".__add__),
    body=st.binary(max_size=200) | st.lists(st.sampled_from([b"name=a", b"password=", b"&", b"=", b"%", b";"])).map(
        b"&".join
    ),
)  # fmt: skip
def test_whatever_is_sent_to_sign_in_with_is_answered(plain_door: Guarded, origin: str | None, body: bytes) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", plain_door.service.server.http_port, timeout=20)
    headers = {"Origin": origin} if origin is not None else {}
    connection.request("POST", "/login", body, headers | {"Content-Type": "application/x-www-form-urlencoded"})
    status = connection.getresponse().status
    connection.close()
    assert status in ({400, 401, 429} if origin is None else {403})


def test_a_form_with_too_many_fields_is_none(plain_door: Guarded) -> None:
    answer = plain_door.ask("/login", None, {f"field{index}": "x" for index in range(11)})
    assert answer.status == 400
    assert b"isn't this form" in answer.body.replace(b"&#x27;", b"'")


@pytest.mark.parametrize(
    ("name", "password", "status"),
    [
        ("vera", "wrong", 401),
        ("vera", "", 401),
        ("nobody", PASSWORD, 401),
        ("", "", 401),
        ("vera", PASSWORD + "x", 401),
        ("<script>", "x" * 1000, 401),
        ("vera", "x" * 5000, 413),
    ],
)
def test_a_wrong_password(guarded: Guarded, name: str, password: str, status: int) -> None:
    answer = guarded.sign_in(name, password)
    assert (answer.status, answer.headers["Set-Cookie"]) == (status, None)
    assert b"<script>" not in answer.body


def test_a_session_ends(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    lasting = guarded.session("vera")
    monkeypatch.setattr("decoder.access.door.SESSION_S", 0.0)
    over = guarded.session("vera")
    assert [guarded.ask("/cameras.json", session).status for session in (lasting, over)] == [200, 401]


def test_a_thousand_wrong_passwords(
    guarded: Guarded, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed_in = guarded.session("tom")
    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(lambda number: guarded.sign_in("vera", f"guess {number}").status, range(1000)))
    assert told.count(401) == TRIES_BY_ADDRESS, "no more are looked at, however many come at one time"
    assert told.count(429) == 1000 - TRIES_BY_ADDRESS
    answer = guarded.sign_in("vera")
    assert answer.status == 429, "the right one isn't looked at either"
    assert 0 < int(answer.headers["Retry-After"]) <= 601
    assert guarded.ask("/cameras.json", signed_in).status == 200, "who is in stays in"
    assert guarded.ask("/cameras.json", bearer(TOKENS["vera"])).status == 200
    assert guarded.sign_in("tom").status == 429, "of that address nobody is let in"
    assert [guarded.sign_in(name, source="127.0.0.2").status for name in ("tom", "vera")] == [303, 303]
    assert "guess" not in caplog.text
    monkeypatch.setattr("decoder.access.door.TRY_WINDOW_S", 0.0)
    assert guarded.sign_in("vera").status == 303


def test_guesses_from_many_addresses_are_limited_by_name(guarded: Guarded) -> None:
    told = [guarded.sign_in("vera", "guess", source=f"127.0.1.{each}").status for each in range(1, 51)]
    assert (told.count(401), told.count(429)) == (TRIES_BY_NAME, 50 - TRIES_BY_NAME)
    assert guarded.session("tom"), "others aren't kept out"


def test_right_passwords_are_never_too_many(guarded: Guarded) -> None:
    for _ in range(TRIES_BY_ADDRESS + 3):
        assert guarded.sign_in("vera").status == 303


def test_what_anyone_says_of_whom_they_forward_for_is_not_believed(guarded: Guarded) -> None:
    told = [guarded.sign_in("vera", "guess", **{"X-Forwarded-For": f"192.0.2.{each}"}).status for each in range(50)]
    assert (told.count(401), told.count(429)) == (TRIES_BY_ADDRESS, 50 - TRIES_BY_ADDRESS)


@pytest.fixture
def proxied(start_service: StartService, tmp_path: Path, hashed: str) -> Guarded:
    """Without TLS on loopback, behind a proxy that calls from 127.0.0.9 and passes the host's name on."""
    people = {"tom": Person("tom", Role.TRUSTED, frozenset({"*"}), hashed)}
    write_people(tmp_path / "users.toml", people)
    settings = {"port": 0, "http": 0, "users": tmp_path / "users.toml", "trusted_proxy": "127.0.0.9"}
    service = start_service(Settings.model_validate(settings | {"allow_plain": True, "max_peer_streams": 3}))
    return Guarded(service, Keys(tmp_path / "keys"), tmp_path / "users.toml", [], tls=False)


PROXY = {"source": "127.0.0.9", "Host": "cameras.example", "Origin": "https://cameras.example"}


def test_a_trusted_proxy_says_who_asks_and_nobody_else(proxied: Guarded) -> None:
    def tries(count: int, **said: str) -> int:
        return [proxied.sign_in("tom", "guess", **said).status for _ in range(count)].count(401)

    assert tries(12, **PROXY, **{"X-Forwarded-For": "192.0.2.1"}) == TRIES_BY_ADDRESS
    assert tries(3, **PROXY, **{"X-Forwarded-For": "198.51.100.1, 192.0.2.1"}) == 0, "what a client wrote before it"
    assert tries(3, **PROXY, **{"X-Forwarded-For": "192.0.2.2"}) == 3
    assert tries(12, **{"X-Forwarded-For": "192.0.2.3"}) == TRIES_BY_ADDRESS, "who isn't the proxy"
    answer = proxied.sign_in("tom", **PROXY, **{"X-Forwarded-For": "192.0.2.4", "X-Forwarded-Proto": "https"})
    assert (answer.status, "secure" in answer.headers["Set-Cookie"].lower()) == (303, True)


def test_a_trusted_proxy_is_known_over_ipv4_where_ipv6_listens_for_both(
    start_service: StartService, proxied: Guarded
) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 that listens for IPv4 too")
    settings = {"port": 0, "http": 0, "users": proxied.users, "host": "::", "insecure": True}
    service = start_service(Settings.model_validate(settings | {"trusted_proxy": "127.0.0.9"}))
    everywhere = Guarded(service, proxied.keys, proxied.users, [], tls=False)
    for each in range(TRIES_BY_ADDRESS + 2):
        assert everywhere.sign_in("vera", "guess", **PROXY, **{"X-Forwarded-For": f"192.0.2.{each}"}).status == 401
    with socket.create_connection(("::1", service.server.http_port), 20) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 200"
    with service.channel() as channel:
        grpc.channel_ready_future(channel).result(20)


def test_a_proxy_has_connections_for_many(proxied: Guarded) -> None:
    """Its limit is that of all, not that of one address."""
    made = []
    for _ in range(8):
        port = proxied.service.server.http_port
        made.append(http.client.HTTPConnection("127.0.0.1", port, timeout=20, source_address=("127.0.0.9", 0)))
        made[-1].request("GET", "/healthz")
        assert made[-1].getresponse().read() == b"alive\n"
    for connection in made:
        connection.close()


def test_a_proxy_without_users_would_let_everyone_in(start_service: StartService) -> None:
    with pytest.raises(AccessError, match="--trusted-proxy needs --users"):
        start_service(Settings.model_validate({"port": 0, "http": 0, "trusted_proxy": "::1"}))


@pytest.fixture
def opened(guarded: Guarded) -> Iterator[Callable[[], str]]:
    """The page in a browser, signed out."""
    from playwright.sync_api import sync_playwright

    from tests.decoder.test_page import CHROMIUM, FLAGS

    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(ignore_https_errors=True)
        page.goto(f"https://127.0.0.1:{guarded.service.server.http_port}/")

        def story() -> str:
            page.fill("#name", "vera")
            page.fill("#password", PASSWORD)
            page.click("text=Sign in")
            page.wait_for_selector("figure[data-camera=porch]", timeout=20_000)
            assert page.locator("figure").count() == 1
            page.click("text=Sign out")
            page.wait_for_selector("#password", timeout=20_000)
            return page.url

        yield story
        browser.close()


def test_signing_in_and_out_in_a_browser(opened: Callable[[], str]) -> None:
    assert opened().endswith("/login")
