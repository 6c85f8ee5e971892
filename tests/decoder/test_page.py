"""The page in a real browser: Debian's Chromium, driven by Playwright."""

import shutil
import time
from collections.abc import Iterator

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from playwright.sync_api import Page, expect, sync_playwright

from decoder.server import Settings
from encoder.packing import Packer
from encoder.sampling import Operator
from tests.conftest import StartService, frame_of, hello_of
from tests.decoder.test_service import Camera

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WAIT_MS = 20_000


@pytest.fixture
def page() -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser.new_page()
        browser.close()


class Film:
    """A camera that shows one photograph after the other."""

    def __init__(self, address: str, operator: Operator, photographs: list[NDArray[np.uint8]], name: str) -> None:
        import grpc

        self.camera = Camera(grpc.insecure_channel(address))
        self.camera.say(hello=hello_of(operator, photographs[0], name))
        self._packer, self._photographs, self._sequence = Packer(operator, 0.1), photographs, 0

    def show(self, index: int) -> None:
        self._sequence += 1
        frame = frame_of(self._photographs[index], time.time_ns())
        self.camera.say(frame=self._packer.pack(frame, self._sequence)[0])
        self.camera.settled(self._sequence)


def pixels(page: Page) -> NDArray[np.float64]:
    """What the browser shows of the first camera, 48×64 grey."""
    shot = page.locator("figure img").first.screenshot()
    picture = cv2.imdecode(np.frombuffer(shot, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert picture is not None
    return np.asarray(cv2.resize(picture, (64, 48), interpolation=cv2.INTER_AREA), np.float64)


def wait_for_picture(page: Page, picture: NDArray[np.uint8]) -> None:
    """Wait until the browser's own pixels are those of a photograph, and not of another."""
    small = picture.reshape(48, 7, 64, 7).mean((1, 3))
    deadline = time.monotonic() + WAIT_MS / 1000
    while (error := np.abs(pixels(page) - small).mean()) > 12:
        assert time.monotonic() < deadline, f"the picture differs by {error:.0f} grey levels"
        page.wait_for_timeout(100)


def test_pictures_arrive_and_change_and_a_dead_camera_is_shown_as_dead(
    page: Page, start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    service = start_service()
    page.goto(service.page)
    expect(page.locator("#problem")).to_contain_text("No camera has connected yet", timeout=WAIT_MS)

    film = Film(service.address, operator, photographs, "porch")
    film.show(0)
    figure = page.locator('figure[data-camera="porch"]')
    expect(figure.locator(".state")).to_have_text("live", timeout=WAIT_MS)
    expect(figure.locator(".name")).to_have_text("porch")
    expect(figure.locator(".facts")).to_contain_text("ms since capture")
    expect(figure.locator(".facts")).to_contain_text("(veiled)")
    wait_for_picture(page, photographs[0])
    film.show(6)
    wait_for_picture(page, photographs[6])

    expect(figure.locator(".state")).to_contain_text("silent, last picture", timeout=WAIT_MS)
    film.camera.bye()
    expect(figure.locator(".state")).to_contain_text("offline, last picture", timeout=WAIT_MS)


def test_the_page_comes_back_after_a_restart_of_the_server(
    page: Page, start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    service = start_service()
    film = Film(service.address, operator, photographs, "porch")
    film.show(0)
    page.goto(service.page)
    wait_for_picture(page, photographs[0])
    service.stop()
    expect(page.locator("#problem")).to_contain_text("does not answer", timeout=WAIT_MS)
    expect(page.locator("figure .state")).to_have_text("offline")

    again = start_service(Settings(port=0, http_port=service.server.http_port))
    film = Film(again.address, operator, photographs, "porch")
    film.show(6)
    expect(page.locator("figure .state")).to_have_text("live", timeout=WAIT_MS)
    wait_for_picture(page, photographs[6])


def test_a_name_is_text_and_never_markup(page: Page, start_service: StartService) -> None:
    service = start_service()
    page.route("**/cameras.json", lambda route: route.fulfill(json=[
        {"name": "<b>x</b>", "state": "live", "silent_s": 0, "fps": 1, "latency_ms": 5, "sequence": 1, "size": None,
         "reconstructor": "<i>y</i>"},
    ]))  # fmt: skip
    page.goto(service.page)
    expect(page.locator("figure .name")).to_have_text("<b>x</b>", timeout=WAIT_MS)
    assert page.locator("b, i").count() == 0
