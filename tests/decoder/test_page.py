"""The page in a real browser: Debian's Chromium, driven by Playwright."""

import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from playwright.sync_api import Page, Route, expect, sync_playwright

from decoder.catalogue import SHIPPED, load_catalogue
from decoder.settings import Settings
from encoder.packing import Packer
from encoder.sampling import Operator
from tests.conftest import StartService, frame_of, hello_of
from tests.decoder.peers import Camera, known_of
from tests.waiting import wait_for

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
    """A camera that shows a photograph, twice a second, until it is told another or falls silent."""

    def __init__(self, address: str, operator: Operator, photographs: list[NDArray[np.uint8]], name: str) -> None:
        self.camera = Camera(grpc.insecure_channel(address))
        self.camera.say(hello=hello_of(operator, photographs[0], name))
        self._packer, self._photographs, self._sequence = Packer(operator, 0.1), photographs, 0
        self._lock, self._silent, self._shown = threading.Lock(), threading.Event(), 0
        threading.Thread(target=self._go_on, daemon=True).start()

    def show(self, index: int) -> None:
        with self._lock:
            self._shown = index
            self._send()

    def fall_silent(self) -> None:
        self._silent.set()

    def _go_on(self) -> None:
        while not self._silent.wait(0.5):
            with self._lock:
                if self._sequence:
                    self._send()

    def _send(self) -> None:
        self._sequence += 1
        frame = frame_of(self._photographs[self._shown], time.time_ns())
        self.camera.say(frame=self._packer.pack(frame, self._sequence)[0])


def pixels(page: Page) -> NDArray[np.float64]:
    """What the browser shows of the first camera, 48×64 grey."""
    shot = page.locator("figure img:visible").first.screenshot()
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
    expect(figure.locator(".facts")).to_contain_text(re.compile(r"ms since capture \(clock \+\d+ ms\)"))
    expect(figure.locator(".facts")).to_contain_text("(veiled)")
    wait_for_picture(page, photographs[0])
    film.show(6)
    wait_for_picture(page, photographs[6])

    film.fall_silent()
    expect(figure.locator(".state")).to_contain_text("silent, last picture", timeout=WAIT_MS)
    film.camera.bye()
    expect(figure.locator(".state")).to_contain_text("gone, last picture", timeout=WAIT_MS)


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
    expect(page.locator("figure .state")).to_have_text("no answer")

    again = start_service(Settings(port=0, http=service.server.http_port))
    film = Film(again.address, operator, photographs, "porch")
    film.show(6)
    expect(page.locator("figure .state")).to_have_text("live", timeout=WAIT_MS)
    wait_for_picture(page, photographs[6])


def test_a_name_is_text_and_never_markup(page: Page, start_service: StartService) -> None:
    service = start_service()
    page.route("**/cameras.json", lambda route: route.fulfill(json=[
        {"name": "<b>x</b>", "state": "live", "renditions": [], "silent_s": 0, "fps": 1, "latency_ms": 5, "sequence": 1,
         "size": None, "kbit_s": 7, "reconstructor": "abc"},
    ]))  # fmt: skip
    page.route("**/reconstructors.json", lambda route: route.fulfill(json=[
        {"id": "abc", "name": "<i>y</i>", "rendition": "veiled", "operator_id": "<i>o</i>", "rows": 1, "engine": "e",
         "device": "d", "precision": "float32", "measured": {"recognition": {"<i>r</i>": {"veiled": {"as is": 5.0}}}}},
    ]))  # fmt: skip
    page.goto(service.page)
    expect(page.locator("figure .name")).to_have_text("<b>x</b>", timeout=WAIT_MS)
    page.get_by_role("button", name="<i>y</i> (veiled)").click()
    expect(page.get_by_role("dialog")).to_contain_text("<i>r</i>")
    assert page.locator("b, i").count() == 0


def test_one_camera_large_by_keyboard_with_what_its_veil_was_measured_to_leave(
    page: Page, start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    service = start_service()
    films = [Film(service.address, operator, photographs, name) for name in ("porch", "yard")]
    for film in films:
        film.show(0)
    page.goto(service.page)
    wait_for_picture(page, photographs[0])
    page.get_by_role("button", name="camera porch, show it large").focus()
    page.keyboard.press("Enter")
    expect(page.locator('figure[data-camera="yard"]')).to_be_hidden()
    expect(page.locator('figure[data-camera="porch"]')).to_be_visible()
    expect(page.get_by_role("button", name="All cameras")).to_be_focused()
    films[0].show(6)
    wait_for_picture(page, photographs[6])
    yard = known_of(service, "yard")
    wait_for(lambda: yard.relays["veiled"].viewers == 0, "the end of its viewers")  # nobody looks at it now

    with page.expect_download() as download:
        page.keyboard.press("s")
    assert re.fullmatch(r"porch-\d{4}-\d\d-\d\dT[\d-]+Z\.jpg", download.value.suggested_filename)
    snapshot = cv2.imread(str(download.value.path()), cv2.IMREAD_GRAYSCALE)
    assert snapshot is not None
    assert np.abs(snapshot.astype(float) - photographs[6]).mean() < 12

    page.get_by_role("button", name="what classifiers were measured to read").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("What classifiers read of veil-r10")
    expect(dialog.locator("tr")).to_have_count(1 + 5)
    expect(dialog).not_to_contain_text("float32 form")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    page.keyboard.press("Escape")
    expect(page.locator('figure[data-camera="yard"]')).to_be_visible()


def test_a_recording_is_played_with_a_time_line(
    page: Page, start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    service = start_service(Settings(port=0, http=0, record=tmp_path / "recordings"))
    film = Film(service.address, operator, photographs, "porch")
    wait_for(lambda: service.server.cameras.all(), "the cameras")
    porch = service.server.cameras.all()[0]
    for index in (0, 4, 7):
        before = porch.tally.received
        film.show(index)
        wait_for(lambda: porch.tally.received > before + 2, "more frames")  # noqa: B023
    page.goto(f"{service.page}/#porch")
    wait_for_picture(page, photographs[7])
    track = page.get_by_role("slider", name="Time in the recording")
    expect(track).to_be_visible(timeout=WAIT_MS)
    track.focus()
    page.keyboard.press("Home")
    wait_for_picture(page, photographs[0])
    page.get_by_role("button", name="Play").click()
    wait_for_picture(page, photographs[4])
    wait_for_picture(page, photographs[7])
    track.focus()
    page.keyboard.press("Home")
    wait_for_picture(page, photographs[0])
    page.get_by_role("button", name="Live").click()
    film.show(3)
    wait_for_picture(page, photographs[3])

    for _ in range(20):  # pictures of both kinds overtake one another
        page.evaluate("() => document.querySelector('.chosen .play').click()")
        page.evaluate("() => document.querySelector('.chosen .live').click()")
    film.show(6)
    wait_for_picture(page, photographs[6])
    end = track.get_attribute("max") or ""
    expect(track).not_to_have_attribute("max", end, timeout=WAIT_MS)
    page.get_by_role("button", name="Play").click()
    wait_for_picture(page, photographs[0])  # what was recorded of late, and all of this is

    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.evaluate("""() => {
        const slider = document.querySelector(".chosen input");
        for (let step = 100; step >= 0; step--) {
            slider.value = +slider.min + (slider.max - slider.min) * step / 100;
            slider.dispatchEvent(new Event("input"));
        }
    }""")
    wait_for_picture(page, photographs[0])
    leave(page)
    before = len([url for url in asked if "jpg?at=" in url])
    assert before < 20, "one at a time, and the newest"
    received = porch.tally.received
    wait_for(lambda: porch.tally.received > received + 3, "more frames")
    page.wait_for_timeout(0)  # what the browser has told since
    assert len([url for url in asked if "jpg?at=" in url]) <= before + 1, "a hidden tab plays nothing"


def test_plain_pictures_are_a_button_for_those_who_may_see_them(
    page: Page, start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    service = start_service(Settings(port=0, http=0, record=tmp_path / "recordings", allow_plain=True))
    Film(service.address, operator, photographs, "porch").show(0)
    wait_for(lambda: service.server.cameras.all(), "the camera")
    porch = known_of(service, "porch")
    wait_for(lambda: porch.tally.received > 3, "more frames")
    page.goto(service.page)
    wait_for_picture(page, photographs[0])
    plain = page.locator('figure[data-camera="porch"] .plain')
    expect(plain).to_be_hidden()
    page.get_by_role("button", name="camera porch, show it large").click()
    plain.click()
    expect(plain).to_have_attribute("aria-pressed", "true")
    model = page.locator('figure[data-camera="porch"] .model')
    expect(model).to_contain_text("(plain)", timeout=WAIT_MS)
    wait_for(lambda: porch.relays["veiled"].viewers == 0, "the end of the veiled pictures' viewers")

    track = page.get_by_role("slider", name="Time in the recording")
    expect(track).to_be_visible(timeout=WAIT_MS)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    track.focus()
    page.keyboard.press("Home")
    expect(page.locator(".chosen .state")).to_have_text("recording")
    wait_for_picture(page, photographs[0])
    plain.click()
    expect(plain).to_have_attribute("aria-pressed", "false")
    page.get_by_role("button", name="Live").click()
    expect(model).to_contain_text("(veiled)", timeout=WAIT_MS)
    recorded = [url for url in asked if "jpg?at=" in url]
    assert "rendition=plain" in recorded[0]
    assert "rendition" not in recorded[-1]

    plain.click()
    page.keyboard.press("Escape")
    wait_for(lambda: porch.relays["plain"].viewers == 0, "the end of plain pictures with the large one")


def test_where_plain_pictures_are_not_given_there_is_no_button_for_them(
    page: Page, start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    service = start_service()
    Film(service.address, operator, photographs, "porch").show(0)
    page.goto(f"{service.page}/#porch")
    wait_for_picture(page, photographs[0])
    expect(page.locator('figure[data-camera="porch"] .full')).to_be_visible()
    expect(page.locator('figure[data-camera="porch"] .plain')).to_be_hidden()
    answer = page.request.get(f"{service.page}/pictures?rendition=plain")
    assert (answer.status, "only veiled" in answer.text()) == (403, True)


def test_a_recording_that_is_not_given_says_why_and_its_time_line_comes_back(
    page: Page, start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    service = start_service(Settings(port=0, http=0, record=tmp_path / "recordings"))
    Film(service.address, operator, photographs, "porch").show(0)
    answers = ["<not json>", None]

    def at_first_none(route: Route) -> None:
        if (body := answers.pop(0) if answers else None) is None:
            route.fallback()
        else:
            route.fulfill(body=body)

    page.route("**/recordings/porch.json", at_first_none)
    page.goto(f"{service.page}/#porch")
    track, label = page.get_by_role("slider", name="Time in the recording"), page.locator(".chosen .time")
    expect(track).to_be_visible(timeout=WAIT_MS)

    told = "recordings: as many as may wait for the disk are waiting; ask again"
    page.route(
        "**/recordings/porch.jpg*", lambda route: route.fulfill(status=503, body=told, headers={"Retry-After": "0.1"})
    )
    track.focus()
    page.keyboard.press("Home")
    expect(label).to_have_text(told, timeout=WAIT_MS)
    page.unroute("**/recordings/porch.jpg*")
    wait_for_picture(page, photographs[0])
    expect(label).to_contain_text(":", timeout=WAIT_MS)
    expect(label).not_to_have_text(told, timeout=WAIT_MS)

    for path in (tmp_path / "recordings" / "porch").glob("*.vcseg"):
        path.write_bytes(b"not a segment at all")
    page.get_by_role("button", name="Live").click()
    track.focus()
    page.keyboard.press("Home")
    expect(label).to_contain_text("begins with b'not a', a segment with", timeout=WAIT_MS)


def leave(page: Page) -> None:
    """As if the tab were no longer looked at, until ``window.away`` is false."""
    page.evaluate("""() => {
        Object.defineProperty(document, "hidden", { get: () => window.away ?? true, configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
    }""")


def test_a_tab_that_nobody_looks_at_costs_nothing(
    page: Page, start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    service = start_service()
    film = Film(service.address, operator, photographs, "porch")
    film.show(0)
    page.goto(service.page)
    wait_for_picture(page, photographs[0])
    leave(page)
    porch = service.server.cameras.all()[0]
    wait_for(lambda: porch.relays["veiled"].viewers == 0, "the end of its viewers")
    shown, received = porch.tally.shown["veiled"], porch.tally.received
    film.show(4)
    wait_for(lambda: porch.tally.received > received + 3, "more frames")
    assert porch.tally.shown["veiled"] <= shown + 1, "at most what was in the engine when it left"
    page.evaluate("() => { window.away = false; document.dispatchEvent(new Event('visibilitychange')); }")
    wait_for_picture(page, photographs[4])


def test_a_camera_in_the_place_of_another(
    page: Page, start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    """One is forgotten when the other comes, between two looks of the page; the first was shown large."""
    service = start_service(Settings(port=0, http=0, max_cameras=1))
    porch = Film(service.address, operator, photographs, "porch")
    porch.show(0)
    page.goto(f"{service.page}/#porch")
    expect(page.get_by_role("button", name="All cameras")).to_be_visible(timeout=WAIT_MS)
    porch.fall_silent()
    porch.camera.bye()
    wait_for(lambda: service.server.cameras.all()[0].state == "gone", "a camera that is gone")
    yard = Film(service.address, operator, photographs, "yard")
    yard.show(6)
    expect(page.locator('figure[data-camera="yard"]')).to_be_visible(timeout=WAIT_MS)
    expect(page.locator('figure[data-camera="porch"]')).to_have_count(0)
    wait_for_picture(page, photographs[6])


def test_a_camera_that_the_page_does_not_know_yet_costs_one_picture(
    page: Page, start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    service = start_service()
    films = [Film(service.address, operator, photographs, name) for name in ("porch", "yard")]
    for film in films:
        film.show(0)
    films[1].fall_silent()
    wait_for(lambda: len(service.server.cameras.all()) == 2, "both cameras")
    porch = service.server.cameras.all()[0]

    def without_yard(route: Route) -> None:
        answer = route.fetch()
        route.fulfill(json=[camera for camera in answer.json() if camera["name"] != "yard"])

    page.route("**/cameras.json", without_yard)
    page.goto(f"{service.page}/#%")  # no name, and no reason to stop
    wait_for_picture(page, photographs[0])
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    received = porch.tally.received
    while porch.tally.received < received + 4:
        page.wait_for_timeout(100)
    assert 0 < len([url for url in asked if "/pictures" in url]) < 20
    page.unroute_all(behavior="ignoreErrors")  # one may be on its way
    expect(page.locator('figure[data-camera="yard"] .state')).to_contain_text("silent", timeout=WAIT_MS)
    expect(page.locator('figure[data-camera="yard"] img')).to_have_attribute("src", re.compile("blob:"))


def test_what_was_measured_of_another_form_is_said_to_be(
    page: Page, start_service: StartService, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> None:
    """Also when that form is taken up while the page is shown."""
    service = start_service(catalogue=load_catalogue([SHIPPED], "onnxruntime", 1))
    Film(service.address, operator, photographs, "porch").show(0)
    page.goto(service.page)
    model = page.get_by_role("button", name="what classifiers were measured to read")
    model.click(timeout=WAIT_MS)
    expect(page.get_by_role("dialog")).not_to_contain_text("float32 form", timeout=WAIT_MS)
    page.keyboard.press("Escape")
    integers = load_catalogue([SHIPPED], "onnxruntime-int8", 1)
    service.loop.call_soon_threadsafe(service.server.apply, service.server.settings, integers)
    model.click(timeout=WAIT_MS)
    expect(page.get_by_role("dialog")).to_contain_text("figures are of its float32 form. Through its int8 form")
    expect(page.get_by_role("dialog")).to_contain_text(re.compile(r"efficientnet_lite1 \d+\.\d \(\d+\.\d\)"))
