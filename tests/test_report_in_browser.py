"""The report as a browser shows it: no error on its console, nothing loaded, nothing wider than a phone.

Skipped where there is no Chromium.
"""

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_report import BASELINE, HISTORY, RUN

from pipeline.config import Config
from pipeline.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE_WIDTH = 390  # pixels
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--v=0",
    "--virtual-time-budget=5000",  # milliseconds
)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome is installed")

# A browser's own window is not narrower than some 500 pixels; a frame is.
_FRAME = """<!doctype html><meta charset="utf-8"><title>frame</title>
<iframe style="width: {width}px; height: 800px; border: 0" srcdoc="{page}"></iframe>
<script>
  document.querySelector("iframe").onload = event => {{
    const page = event.target.contentDocument;
    const images = [...page.images];
    page.querySelectorAll("details").forEach(details => details.open = true);
    document.title = JSON.stringify({{
      "width": page.documentElement.scrollWidth, "visible": page.documentElement.clientWidth,
      "broken": images.filter(image => !image.complete || !image.naturalWidth).length, "images": images.length,
    }});
  }};
</script>"""


def _open(page: Path, profile: Path) -> tuple[str, list[str]]:
    """Opens a file in the browser; returns the document that it makes of it, and what it writes to its console."""
    command = [BROWSER, *OPTIONS, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def _measure(page: str, tmp_path: Path, *, width: int) -> dict[str, int]:
    """Lays a page out at a width in pixels, everything unfolded: how wide it is, and how many of its images are broken."""
    frame = tmp_path / "frame.html"
    frame.write_text(_FRAME.format(width=width, page=html.escape(page)), encoding="utf-8")
    document, _ = _open(frame, tmp_path / "profile")
    (title,) = re.findall(r"<title>(\{.*?\})</title>", document)
    return {name: int(value) for name, value in re.findall(r'"(\w+)":(\d+)', title)}


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> str:
    """A report with all of its parts but photographs, and with names that are hard to lay out."""
    name = "a_class_of_a_name_without_a_place_to_break_it_" * 4
    run = RUN | {"metrics": RUN["metrics"] | {"has_baseline": True, "baseline": BASELINE}}
    run["metrics"]["slices"] = RUN["metrics"]["slices"] | {f"label={name}": RUN["metrics"]["slices"]["label=cat"]}
    run["metrics"]["mistakes"] = [{"filename": f"/{name}/1.png", "label": name, "predicted": name, "probability": 0.9}]
    run["reasons"] = [f"recall of `{name}` is 0.1"]
    run["blessed"] = False
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, run, HISTORY, Config())
    return path.read_text(encoding="utf-8")


def test_report_leaves_the_console_empty_and_loads_nothing(report, tmp_path):
    page = tmp_path / "report.html"
    page.write_text(report, encoding="utf-8")

    document, console = _open(page, tmp_path / "profile")

    assert console == []  # its content security policy writes there of whatever it keeps from being loaded
    assert "Against the latest blessed model" in document


@pytest.mark.parametrize(
    ("planted", "complaint"),
    [
        ("<script>alert(1)</script>", "Content Security Policy"),
        ('<img src="http://203.0.113.1/x.png" alt="x">', "Content Security Policy"),
        ("<style>@import url(http://203.0.113.1/x.css);</style>", "Content Security Policy"),
    ],
)
def test_what_a_report_must_not_hold_is_found(report, tmp_path, planted, complaint):
    page = tmp_path / "report.html"
    page.write_text(report.replace("</main>", f"{planted}</main>"), encoding="utf-8")

    _, console = _open(page, tmp_path / "profile")

    assert any(complaint in line for line in console)


def test_a_script_error_is_found(tmp_path):
    page = tmp_path / "error.html"
    page.write_text("<!doctype html><script>throw Error('planted')</script>")

    _, console = _open(page, tmp_path / "profile")

    assert any("planted" in line for line in console)


@pytest.mark.parametrize("width", [PHONE_WIDTH, 1280])
def test_report_is_no_wider_than_its_screen(report, tmp_path, width):
    found = _measure(report, tmp_path, width=width)

    assert found["width"] == found["visible"] <= width
    assert found["images"] == 3
    assert found["broken"] == 0


def test_a_page_that_is_too_wide_is_found(report, tmp_path):
    wide = report.replace("</main>", '<div style="width: 500px">x</div><img src="data:image/jpeg;base64,AAAA" alt="x"></main>')

    found = _measure(wide, tmp_path, width=PHONE_WIDTH)

    assert found["width"] >= 500 > found["visible"]
    assert found["broken"] == 1
