"""The page, in a real Chromium that streams from the real server."""

import base64
import io
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import av
import pytest
import requests
from selenium.webdriver import ActionChains, Chrome, ChromeOptions, ChromeService, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from orchestrator.serving.config import AccessConfig
from tests.orchestrator.serving.conftest import CONFIG, eventually, write_student

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="needs Chromium and its driver (Debian: chromium-driver)"
    ),
]
FPS = 16
TOKEN = "0123456789abcdef"
SOCKETS = """
window.sockets = [];
window.WebSocket = class extends WebSocket {
  constructor(...about) { super(...about); sockets.push(this); }
};
"""
"""So that a test can break a connection."""


@dataclass(frozen=True)
class Viewer:
    """One viewer on the page."""

    root: WebElement

    def part(self, name: str) -> WebElement:
        return self.root.find_element(By.CLASS_NAME, name)

    def field(self, name: str) -> WebElement:
        return self.root.find_element(By.NAME, name)

    def video(self, attribute: str) -> float:
        return self.root.parent.execute_script(
            f"return arguments[0].querySelector('video').{attribute}", self.root
        )

    @property
    def status(self) -> str:
        return self.part("status").text

    def start(self, frames: int | None = None) -> None:
        if frames is not None:
            self.field("frames").send_keys(str(frames))
        self.part("main").click()

    def moves(self) -> None:
        """Wait until what is shown has changed."""
        eventually(lambda: self.video("currentTime") > 0)
        video = self.root.find_element(By.TAG_NAME, "video")
        then, before = self.video("currentTime"), video.screenshot_as_png
        eventually(lambda: self.video("currentTime") > then and video.screenshot_as_png != before)

    def says(self, text: str) -> None:
        eventually(lambda: text in self.status)


@dataclass(frozen=True)
class Page:
    """The page in a browser."""

    browser: Chrome
    downloads: Path

    @property
    def viewers(self) -> list[Viewer]:
        return [Viewer(root) for root in self.browser.find_elements(By.CLASS_NAME, "viewer")]

    def add(self) -> Viewer:
        self.browser.find_element(By.ID, "add").click()
        return self.viewers[-1]

    def run(self, script: str) -> object:
        return self.browser.execute_script(script)

    def download(self, viewer: Viewer) -> tuple[str, list[float]]:
        """What the file says of its making, and the times of its frames in seconds."""
        eventually(lambda: viewer.part("download").is_enabled())
        viewer.part("download").click()
        # An empty file holds the name until the whole one is moved to its place.
        eventually(lambda: any(file.stat().st_size for file in self.downloads.glob("*.mp4")))
        (file,) = self.downloads.glob("*.mp4")
        return read(file.read_bytes())


def read(mp4: bytes) -> tuple[str, list[float]]:
    with av.open(io.BytesIO(mp4)) as container:
        times = [float(frame.pts * frame.time_base) for frame in container.decode(video=0)]
        return container.metadata["comment"], times


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(argument)
    with Chrome(options, ChromeService(DRIVER)) as browser:
        browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": SOCKETS})
        yield browser


@pytest.fixture(scope="module")
def url(deploy: Callable, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An application at a pace that a person can watch."""
    model = write_student(tmp_path_factory.mktemp("page") / "model", fps=FPS)
    with deploy("page", replace(CONFIG, model=str(model))) as url:
        yield url


def streams(url: str) -> int:
    health = requests.get(f"{url}/healthz", timeout=30).json()
    return health["streams"] + health["queue"]


@pytest.fixture
def page(browser: Chrome, url: str, tmp_path: Path) -> Iterator[Page]:
    """The page just opened; when it is left, so are its streams."""
    behavior = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", behavior)
    browser.get(f"{url}/")
    yield Page(browser, tmp_path)
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []
    browser.get("about:blank")
    eventually(lambda: streams(url) == 0)


def test_frames_move_and_the_prompt_changes_while_they_do(page: Page) -> None:
    (viewer,) = page.viewers
    viewer.start()
    viewer.moves()
    assert viewer.status == "Streaming." and "version 1" in viewer.part("made").text
    eventually(lambda: viewer.part("rate").text != "–" and int(viewer.part("shown").text) > FPS)
    assert float(viewer.part("first").text.removesuffix(" s")) > 0
    viewer.field("prompt").clear()
    viewer.field("prompt").send_keys("a two drifting up", Keys.ENTER)
    viewer.says("New prompt since chunk")
    viewer.field("prompt").send_keys(" a two" * 9, Keys.ENTER)
    viewer.says("shorten it")
    viewer.moves()
    viewer.part("stop").click()
    assert viewer.status == "Stopped." and viewer.video("paused")


@pytest.mark.by_hand
def test_two_viewers_stream_at_once_and_a_third_waits(page: Page, url: str) -> None:
    first, second = page.viewers[0], page.add()
    assert first.field("seed").get_attribute("value") != second.field("seed").get_attribute("value")
    for viewer in (first, second):
        viewer.start()
    for viewer in (first, second):
        viewer.moves()
    assert streams(url) == 2
    third, fourth = page.add(), page.add()
    third.start()
    third.says("place 1 in the queue")
    fourth.start()
    fourth.says("all 2 slots are taken")
    fourth.part("remove").click()
    assert len(page.viewers) == 3
    first.part("stop").click()
    third.moves()
    second.moves()


@pytest.mark.by_hand
def test_a_pause_holds_the_picture_and_loses_nothing(page: Page) -> None:
    (viewer,) = page.viewers
    viewer.start(48)
    viewer.moves()
    viewer.part("pause").click()
    assert viewer.status == "Paused." and viewer.video("paused")
    viewer.part("pause").click()
    viewer.says("Ended.")
    assert page.download(viewer)[1] == pytest.approx([frame / FPS for frame in range(48)])


def test_what_was_seen_is_a_file_that_says_what_made_it(page: Page) -> None:
    (viewer,) = page.viewers
    viewer.start(12)
    viewer.says("Ended.")
    comment, times = page.download(viewer)
    assert comment == "generated by a model: self-forcing, version 1"
    assert times == pytest.approx([frame / FPS for frame in range(12)])
    assert viewer.video("currentTime") == pytest.approx(12 / FPS)
    assert page.downloads.joinpath("a-seven-drifting-left-0.mp4").exists()


def test_a_recording_keeps_five_minutes_and_still_plays(page: Page) -> None:
    (viewer,) = page.viewers
    viewer.start(2)
    viewer.says("Ended.")
    file = page.run("""
        const { header, fragments: [{ data }] } = [...viewers][0].recording, long = new Recording();
        const first = new Blob([header, data]);
        return first.arrayBuffer().then((bytes) => {
          long.add(bytes, 70);
          for (let i = 0; i < 9; i++) long.add(data.slice(), 70);
          return new Promise((done) => {
            const reader = new FileReader();
            reader.onload = () => done(reader.result.split(",")[1]);
            reader.readAsDataURL(long.file());
          });
        });
    """)
    times = read(base64.b64decode(str(file)))[1]
    assert times == pytest.approx([start + frame / FPS for start in (0, 70, 140, 210) for frame in (0, 1)])


def test_the_keyboard_is_enough(page: Page) -> None:
    def press(*keys: str) -> None:
        ActionChains(page.browser).send_keys(*keys).perform()

    def tab_to(element: WebElement) -> None:
        for _ in range(12):
            if page.browser.switch_to.active_element == element:
                return
            press(Keys.TAB)
        pytest.fail("the Tab key does not lead there")

    (viewer,) = page.viewers
    tab_to(viewer.field("prompt"))
    press(Keys.ENTER)
    viewer.moves()
    for text, state in (("Pause", "Paused."), ("Resume", "Streaming.")):
        tab_to(viewer.part("pause"))
        assert viewer.part("pause").text == text
        press(Keys.ENTER)
        viewer.says(state)
    tab_to(viewer.part("stop"))
    press(Keys.ENTER)
    viewer.says("Stopped.")
    # Where one would go on, and not lost with the button that is disabled now.
    assert page.browser.switch_to.active_element == viewer.part("main")
    tab_to(page.browser.find_element(By.ID, "add"))
    press(Keys.ENTER)
    assert page.browser.switch_to.active_element == page.viewers[1].field("prompt")


def test_a_phone_need_not_scroll_sideways(page: Page) -> None:
    size = {"width": 320, "height": 640, "deviceScaleFactor": 2, "mobile": True}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.add().start()
        page.viewers[-1].moves()
        assert page.run("return [innerWidth, document.documentElement.scrollWidth]") == [320, 320]
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.by_hand
def test_a_broken_connection_is_taken_up_again(page: Page) -> None:
    (viewer,) = page.viewers
    viewer.start(64)
    viewer.moves()
    page.run("sockets.at(-1).close()")
    viewer.says("nothing is missed")
    viewer.says("Ended.")
    assert page.download(viewer)[1] == pytest.approx([frame / FPS for frame in range(64)])


@pytest.mark.by_hand
def test_a_session_that_the_server_lost_starts_again_from_its_seed(page: Page) -> None:
    (viewer,) = page.viewers
    viewer.start(64)
    viewer.moves()
    # The server is asked for a session that it does not have.
    page.run("""
        [...viewers][0].session.requestId = "gone";
        sockets.at(-1).close();
    """)
    viewer.says("Started again from the seed, at frame ")
    viewer.says("Ended.")
    assert page.download(viewer)[1] == pytest.approx([frame / FPS for frame in range(64)])


@pytest.mark.by_hand
def test_a_token_leads_to_a_stream(browser: Chrome, deploy: Callable, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(TOKEN)
    with deploy("tokens", replace(CONFIG, access=AccessConfig(tokens=str(tmp_path / "tokens")))) as url:
        browser.get(url)
        page = Page(browser, tmp_path)
        dialog, field = (browser.find_element(By.ID, name) for name in ("access", "token"))
        (viewer,) = page.viewers
        viewer.start()
        eventually(lambda: "asks for a token" in dialog.text)
        field.send_keys("something else", Keys.ESCAPE)
        viewer.says("a valid token is needed")
        viewer.start()
        eventually(lambda: "asks for a token" in dialog.text)
        field.send_keys("something-else", Keys.ENTER)
        eventually(lambda: "does not know that token" in dialog.text)
        field.send_keys(TOKEN, Keys.ENTER)
        viewer.moves()
        # It is good for the whole tab, and stands in no address and no storage that lasts.
        another = page.add()
        another.start()
        another.moves()
        urls = page.run("return [location.href, ...sockets.map(({ url }) => url), localStorage.length]")
        assert TOKEN not in str(urls) and str(urls).endswith("0]")
        browser.get("about:blank")
