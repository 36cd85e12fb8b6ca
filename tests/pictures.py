"""Makes the screenshots of the documents: the report, its mistakes, and the server's page, from a run of the default data.

    make pictures                                       # after `make run`; half a minute

Needs Chromium. Writes docs/pictures/report.png, mistakes.png and page.png.
"""

import argparse
import base64
import importlib.resources
import io
import tempfile
from pathlib import Path

from conftest import ROOT
from PIL import Image
from server_process import ServerProcess
from test_server_page import Browser, wait_for

FOLDER = ROOT / "docs" / "pictures"
WIDTH = 1000  # pixels
CELLS = ("cell1700.png", "cell0390.png")
NUM_MISTAKES = 4


def save(browser: Browser, name: str, *, top: str = "0", bottom: str) -> None:
    """Saves a part of the page, which two expressions of JavaScript bound in pixels of the window, in 256 colours."""
    y, end = browser.evaluate(f"[scrollY + {top}, scrollY + {bottom}]")
    clip = {"x": 0, "y": y, "width": WIDTH, "height": end - y, "scale": 1}
    shot = browser.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
    with Image.open(io.BytesIO(base64.b64decode(shot))) as image:
        image.convert("RGB").quantize(256).save(FOLDER / name, optimize=True)
    print(f"Wrote {(FOLDER / name).relative_to(ROOT)}")


def main() -> None:
    """Makes the pictures."""
    parser = argparse.ArgumentParser(description="Makes the screenshots of the documents from a run of the default data.")
    parser.add_argument("--workspace", type=Path, default=ROOT / "runs" / "elpv", help="of the run (default: runs/elpv)")
    workspace = parser.parse_args().workspace.resolve()
    cells = importlib.resources.files("elpv_dataset") / "data" / "images"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        report = folder / "report.html"  # with paths as a reader has them, below the project's folder
        text = (workspace / "report.html").read_text(encoding="utf-8")
        report.write_text(text.replace(str(workspace), "runs/elpv"), encoding="utf-8")
        browser = Browser(folder / "profile")
        server = ServerProcess(folder / "log", f"--model={workspace / 'serving_model'}")
        try:
            browser.call("Emulation.setDeviceMetricsOverride", width=WIDTH, height=800, deviceScaleFactor=1, mobile=False)
            browser.open(report.as_uri())
            box = "getBoundingClientRect()"
            save(browser, "report.png", bottom=f"document.getElementById('training').{box}.top - 16")
            last = f"[...document.querySelectorAll('ul.mistakes li')].slice(0, {NUM_MISTAKES}).pop()"
            heading = f"document.getElementById('mistakes').{box}.top - 16"
            save(browser, "mistakes.png", top=heading, bottom=f"{last}.{box}.bottom + 16")
            browser.open(server.page)
            browser.choose(*(cells / name for name in CELLS))
            wait_for(lambda: browser.evaluate("document.querySelectorAll('#results button').length") == len(CELLS))
            browser.evaluate("document.querySelectorAll('#results button').forEach(button => button.click())")
            shown = "[...document.querySelectorAll('img.heat-map')].filter(image => image.naturalWidth).length"
            wait_for(lambda: browser.evaluate(shown) == len(CELLS))
            save(browser, "page.png", bottom=f"document.querySelector('main').{box}.bottom + 16")
        finally:
            server.stop()
            browser.close()


if __name__ == "__main__":
    main()
