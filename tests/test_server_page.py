"""The page at `/` in a real browser, driven by its own protocol: a photograph is chosen, sent, answered and explained.

Skipped where there is no Chromium.
"""

import base64
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASS_NAMES
from PIL import Image
from server_process import ServerProcess, export_classifier
from test_report_in_browser import BROWSER, OPTIONS, PHONE_WIDTH

websocket = pytest.importorskip("websocket", reason="the kubernetes client brings it")
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome is installed"),
    pytest.mark.one_stack,
]

WAIT_SECONDS = 60
MAX_BODY_BYTES = 2**18


class Browser:
    """A page of a headless Chromium, and what it complains about."""

    def __init__(self, profile: Path):
        options = [option for option in OPTIONS if "virtual-time" not in option and "logging" not in option]
        command = [BROWSER, *options, f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        address = profile / "DevToolsActivePort"
        wait_for(lambda: address.exists() and len(address.read_text().split()) == 2)
        port, path = address.read_text().split()
        self._socket = websocket.create_connection(f"ws://127.0.0.1:{port}{path}", timeout=WAIT_SECONDS, suppress_origin=True)
        self._number = 0
        self._session: str | None = None
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            received = json.loads(self._socket.recv())
            if received.get("id") == self._number:
                assert "error" not in received, received
                return received["result"]
            self._note(received)

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        is_console = event.get("method") == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning")
        if is_console or event.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(json.dumps(parameters)[:500])
        elif event.get("method") == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])

    def evaluate(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, url: str) -> None:
        self.complaints.clear()
        self.requests.clear()
        self.call("Page.navigate", url=url)
        wait_for(lambda: self.evaluate("document.readyState") == "complete" and self.evaluate("location.href") == url)

    def choose(self, *files: Path) -> None:
        """Chooses files as a person does in the browser's dialog."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector="#files")["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def press(self, key: str) -> None:
        code = {"Tab": 9, "Enter": 13}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def close(self) -> None:
        self._session = None
        self.call("Browser.close")
        self._process.wait(30)
        self._socket.close()


def wait_for(condition: Any, *, seconds: float = WAIT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, transform_graph) -> Path:
    return export_classifier(tmp_path_factory.mktemp("exported") / "1", transform_graph, seed=1)


@pytest.fixture(scope="module")
def server(tmp_path_factory, exported):
    process = ServerProcess(
        tmp_path_factory.mktemp("server") / "log", f"--model={exported}", f"--max-body-mib={MAX_BODY_BYTES / 2**20}"
    )
    yield process
    process.stop()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture
def page(browser, server):
    browser.open(server.page)
    return browser


def _results(page: Browser) -> list[str]:
    return page.evaluate("[...document.querySelectorAll('#results > li')].map(item => item.innerText)")


def test_page_classifies_and_explains_a_photograph(page, server, exported, photograph):
    model = tf.saved_model.load(str(exported))
    answer = model.signatures["serving_default"](image_bytes=tf.constant([photograph.read_bytes()]))
    (probabilities,) = answer["probabilities"].numpy()

    page.choose(photograph)
    wait_for(lambda: "1 of 1 classified" in page.evaluate("document.getElementById('status').textContent"))

    (text,) = _results(page)
    assert "grace_hopper.jpg" in text
    for name, probability in zip(CLASS_NAMES, probabilities, strict=True):
        assert f"{name}\n{100 * probability:.1f} %" in text
    widths = page.evaluate("[...document.querySelectorAll('.track div')].map(bar => bar.getBoundingClientRect().width)")
    assert widths[0] / sum(widths) == pytest.approx(probabilities.max(), abs=0.02)
    assert "Shrunk" not in text

    page.evaluate("document.querySelector('#results button').click()")
    wait_for(lambda: page.evaluate("!!document.querySelector('img.heat-map')?.naturalWidth"))
    assert page.evaluate("document.querySelector('img.heat-map').naturalHeight") == 600
    assert page.evaluate("document.querySelector('img.heat-map').alt").startswith("Heat map of what speaks for ")
    assert page.complaints == []
    assert {url.split(":")[0] for url in page.requests} <= {"http", "blob", "data"}
    assert all(url.startswith((server.page, "blob:", "data:")) for url in page.requests)


def test_page_shrinks_what_is_too_large_and_says_so(page, server, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (900, 1400, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size > 10 * MAX_BODY_BYTES

    page.choose(tmp_path / "large.png")
    wait_for(lambda: "1 of 1 classified" in page.evaluate("document.getElementById('status').textContent"))

    (text,) = _results(page)
    assert "Shrunk in this browser from 1400 × 900 pixels" in text
    assert page.complaints == []


def test_page_shows_each_of_several_images_and_what_is_wrong_with_one(page, photograph, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(photograph.read_bytes()[:3000])
    shutil.copy(photograph, tmp_path / "<b>name.jpg")

    page.choose(photograph, tmp_path / "broken.jpg", tmp_path / "<b>name.jpg")
    wait_for(lambda: "2 of 3 classified, 1 not" in page.evaluate("document.getElementById('status').textContent"))

    texts = _results(page)
    (broken,) = [text for text in texts if "broken.jpg" in text]
    assert "Expected `instances[0]` to be an image" in broken
    assert any("<b>name.jpg" in text for text in texts)


def test_page_takes_a_dropped_image(page, photograph):
    content = base64.b64encode(photograph.read_bytes()).decode()
    page.evaluate(f"""(() => {{
        const bytes = Uint8Array.from(atob("{content}"), letter => letter.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], "dropped.jpg", {{ type: "image/jpeg" }}));
        document.body.dispatchEvent(new DragEvent("drop", {{ dataTransfer: data, bubbles: true, cancelable: true }}));
    }})()""")
    wait_for(lambda: "1 of 1 classified" in page.evaluate("document.getElementById('status').textContent"))

    assert "dropped.jpg" in _results(page)[0]


def test_page_works_by_keyboard(page, photograph):
    page.press("Tab")
    assert page.evaluate("document.activeElement.id") == "files"
    page.choose(photograph)
    wait_for(lambda: page.evaluate("document.querySelectorAll('#results button').length") == 1)
    page.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Show why"
    page.press("Enter")

    wait_for(lambda: page.evaluate("!!document.querySelector('img.heat-map')"))


def test_page_is_no_wider_than_a_phone(page, photograph):
    page.call("Emulation.setDeviceMetricsOverride", width=PHONE_WIDTH, height=800, deviceScaleFactor=2, mobile=True)
    page.choose(photograph)
    wait_for(lambda: page.evaluate("document.querySelectorAll('#results button').length") == 1)

    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE_WIDTH
    page.call("Emulation.clearDeviceMetricsOverride")


def test_page_keeps_planted_scripts_from_running(page):
    """The policy is the server's header: what someone plants into the page is neither run nor loaded."""
    page.evaluate("""(() => {
        const script = document.createElement("script");
        script.textContent = "window.planted = true";
        document.body.append(script);
        const image = new Image();
        image.src = "http://203.0.113.1/x.png";
        document.body.append(image);
    })()""")
    wait_for(lambda: page.evaluate("1") == 1 and len(page.complaints) >= 2)

    assert page.evaluate("window.planted") is None
    assert all("Content Security Policy" in complaint for complaint in page.complaints)
