"""The rows that the server writes of answered images, and what `drift` makes of them."""

import asyncio
import json
import logging
import resource
import threading
import time

import httpx
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from server_process import instances
from serving_stand_in import save_classifier

from data.errors import EXIT_DATA_GATE, EXIT_DONE, EXIT_WRONG_INPUT, InputError
from data.features import FACT_KEYS
from data.inspection import ImageLimits, inspect_image
from models import facts
from models.application import create_app
from models.facts import FactsWriter
from models.payloads import PreparedImage, prepare_image
from models.server import main as serve
from models.server_config import ServerConfig
from models.service import Service
from pipeline.answers import FACTS
from pipeline.predict import main as predict
from pipeline.serving_statistics import STATISTICS_FILE, write_statistics

pytestmark = pytest.mark.one_stack

NUM_IMAGES = 150
LIMITS = ImageLimits(min_side=1)
ROW = {"label": "dark", FACTS: {"height": 3, "width": 2, "aspect": 2 / 3, "brightness": 0.5, "channels": 3}}


def _write(path, images, *, labels=None, **settings) -> list[int]:
    """Writes rows of encoded images as the server does, and returns what was dropped."""
    dropped = []
    options = {"share": 1.0, "max_bytes": 10**8, "max_pixels": 10**6, "on_drop": dropped.append} | settings
    writer = FactsWriter(str(path), **options)
    writer.start()
    for number, encoded in enumerate(images):
        writer.offer(labels[number] if labels else "dark", prepare_image(encoded, max_pixels=10**6))
        while len(writer._queue) > facts._MAX_QUEUE // 2:
            time.sleep(0.001)
    writer.close()
    return dropped


def _rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _noise(encode, seed: int, *, brightness: float = 1.0) -> tuple[list[bytes], list[str]]:
    """Noise about a grey value that is drawn anew for each image, and a label that tells light from dark."""
    random = np.random.default_rng(seed)
    images = []
    for _ in range(NUM_IMAGES):
        pixels = np.clip(random.normal(random.uniform(60, 200), 20, (32, 32, 3)), 0, 255).astype(np.uint8)
        images.append(ImageEnhance.Brightness(Image.fromarray(pixels)).enhance(brightness))
    labels = ["dark" if np.asarray(image).mean() < 100 else "bright" for image in images]
    return [encode(image) for image in images], labels


def test_facts_of_any_format_are_those_of_the_training_data(tmp_path, encode):
    random = np.random.default_rng(0)
    colour = Image.fromarray(random.integers(0, 256, (30, 20, 3), np.uint8))
    with_alpha = Image.fromarray(random.integers(0, 256, (30, 20, 4), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees to the right when it is shown
    images = [
        encode(colour),
        encode(colour, "JPEG"),
        encode(colour.convert("L")),
        encode(with_alpha),
        encode(with_alpha, exif=exif.tobytes()),  # the model is given it upright and without alpha
        encode(colour, "BMP"),
    ]

    assert _write(tmp_path / "facts.jsonl", images, labels=list("abcdeé")) == []

    rows = _rows(tmp_path / "facts.jsonl")
    assert rows == [
        {"label": label, FACTS: inspect_image(encoded, LIMITS).facts} for label, encoded in zip("abcdeé", images, strict=True)
    ]
    assert all(set(row) == {"label", FACTS} and set(row[FACTS]) == set(FACT_KEYS) for row in rows)
    assert [(row[FACTS]["height"], row[FACTS]["width"], row[FACTS]["channels"]) for row in rows] == [
        *((30, 20, 3), (30, 20, 3), (30, 20, 1), (30, 20, 4), (20, 30, 4), (30, 20, 3))
    ]


def test_writer_appends_and_rotates(tmp_path, encode):
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    image = encode(np.full((8, 8, 3), 51, np.uint8))

    _write(path, [image] * 2)
    assert [row[FACTS]["height"] for row in _rows(path)] == [3, 8, 8]

    max_bytes = 5 * len(path.read_bytes().splitlines(keepends=True)[-1])
    path.unlink()
    _write(path, [image] * 17, labels=[str(number + 10) for number in range(17)], max_bytes=max_bytes)
    older = tmp_path / "facts.jsonl.1"
    assert max(path.stat().st_size, older.stat().st_size) <= max_bytes
    labels = [row["label"] for row in _rows(older) + _rows(path)]
    assert labels == [str(number + 10) for number in range(17)][-len(labels) :]
    assert len(_rows(older)) >= 4
    assert sorted(one.name for one in tmp_path.iterdir()) == ["facts.jsonl", "facts.jsonl.1"]


def test_writer_draws_a_share(tmp_path, encode):
    image = encode(np.zeros((2, 2, 3), np.uint8))

    assert _write(tmp_path / "facts.jsonl", [image] * 1000, share=0.3) == []

    assert 200 < len(_rows(tmp_path / "facts.jsonl")) < 400  # beyond six standard deviations


def test_offer_never_waits_and_counts_what_it_drops(tmp_path, monkeypatch):
    """The thread stands still, as on a disk that hangs."""
    holds = threading.Event()
    make_line = facts._make_line
    monkeypatch.setattr(facts, "_make_line", lambda *row, limits: holds.wait(60) and make_line(*row, limits=limits))
    dropped = []
    writer = FactsWriter(str(tmp_path / "facts.jsonl"), share=1.0, max_bytes=10**6, max_pixels=100, on_drop=dropped.append)
    writer.start()
    image = PreparedImage(b"x" * 1000, 6, ROW[FACTS])
    large = PreparedImage(b"x" * (facts._MAX_QUEUED_BYTES + 1), 6, ROW[FACTS])
    started = time.monotonic()
    for _ in range(1000):
        writer.offer("dark", image)
    writer.offer("dark", large)
    seconds = time.monotonic() - started
    holds.set()
    writer.close()

    assert seconds < 60  # of the thread
    written = len(_rows(tmp_path / "facts.jsonl"))
    assert facts._MAX_QUEUE <= written <= facts._MAX_QUEUE + 1  # one is with the thread
    assert sum(dropped) == 1001 - written


def test_writer_outlives_what_it_cannot_measure(tmp_path, encode):
    good = encode(np.zeros((2, 2, 3), np.uint8))
    damaged = encode(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))[:2000]

    assert _write(tmp_path / "facts.jsonl", [good, damaged, good]) == [1]

    assert len(_rows(tmp_path / "facts.jsonl")) == 2


def test_writer_leaves_whole_rows_where_the_disk_is_full(tmp_path, encode):
    path = tmp_path / "facts.jsonl"
    line = json.dumps(ROW) + "\n"
    path.write_text(line * (10**6 // len(line)))
    before = path.stat().st_size
    image = encode(np.zeros((2, 2, 3), np.uint8))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before + 30, limits[1]))  # a part of a row fits
    try:
        dropped = _write(path, [image] * 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert dropped == [1] * 3
    assert path.stat().st_size == before
    assert _write(path, [image]) == []
    assert len(_rows(path)) == before // len(line) + 1


@pytest.mark.parametrize("name", ["missing/facts.jsonl", ".", "gs://bucket/facts.jsonl", "a\0b"])
def test_writer_refuses_a_file_that_cannot_be_written(tmp_path, name):
    path = name if "://" in name else str(tmp_path / name)
    with pytest.raises(InputError, match=r"^Expected --facts to be a file .* Received: .*\. Give .*\.$") as caught:
        FactsWriter(path, share=1.0, max_bytes=1000, max_pixels=100)

    assert "\n" not in str(caught.value)


def test_server_ends_with_2_where_the_file_cannot_be_written(tmp_path, capsys):
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    try:
        code = serve(["--model", str(tmp_path), "--port", "0", "--facts", str(tmp_path / "missing" / "facts.jsonl")])
    finally:  # what `log_as_json` did to this process
        root.handlers = handlers
        root.setLevel(level)
        logging.captureWarnings(False)

    assert code == EXIT_WRONG_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: Expected --facts to be a file that can be written. Received: ")


def test_service_writes_a_row_for_each_answered_image_and_no_other(tmp_path, encode):
    """The whole application around a real model, without a socket."""
    path = tmp_path / "facts.jsonl"
    save_classifier(tmp_path / "serving_model" / "1")
    config = ServerConfig(model=str(tmp_path / "serving_model"), max_batch_size=2, poll_seconds=0.05, facts=str(path))
    service = Service(config, on_failure=print)
    dark, bright = (encode(np.full((16, 24, 3), value, np.uint8)) for value in (20, 230))

    async def ask() -> list[httpx.Response]:
        app = create_app(config, service)
        async with service.run(), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            while (await client.get("/healthz")).status_code != 200:
                await asyncio.sleep(0.05)
            answers = [await client.post("/predict", json=instances(*images)) for images in ((dark, bright), (bright,))]
            refused = await client.post("/predict", json=instances(dark, b"no image"))
            return [*answers, refused, await client.get("/metrics")]

    *answers, refused, metrics = asyncio.run(ask())

    labels = [row["label"] for answer in answers for row in answer.json()["predictions"]]
    assert labels == ["dark", "bright", "bright"]
    assert refused.status_code == 400
    assert [row["label"] for row in _rows(path)] == labels
    assert [row[FACTS] for row in _rows(path)] == [inspect_image(image, LIMITS).facts for image in (dark, bright, bright)]
    assert "tfx_vision_facts_dropped_total 0.0" in metrics.text


@pytest.fixture(scope="module")
def training(tmp_path_factory, encode):
    """The statistics of training images."""
    folder = tmp_path_factory.mktemp("training")
    images, labels = _noise(encode, 0)
    assert _write(folder / "rows.jsonl", images, labels=labels) == []
    write_statistics([str(folder / "rows.jsonl")], str(folder / STATISTICS_FILE))
    return folder


def test_drift_of_the_servers_rows_finds_darkened_images_and_nothing_else(training, tmp_path, encode, capsys):
    codes, reports = {}, {}
    for name, seed, brightness in (("fresh", 1, 1.0), ("dark", 2, 0.4)):
        images, labels = _noise(encode, seed, brightness=brightness)
        path = tmp_path / f"{name}.jsonl.1"  # a full one, too
        assert _write(path, images, labels=labels) == []
        codes[name] = predict(["drift", "--statistics", str(training), "--serving", str(path), "--json"])
        reports[name] = json.loads(capsys.readouterr().out)

    assert codes == {"fresh": EXIT_DONE, "dark": EXIT_DATA_GATE}
    assert reports["fresh"]["images"] == NUM_IMAGES
    assert reports["fresh"]["drift"] == []
    found = sorted(reports["dark"]["drift"])
    assert len(found) == 2
    assert "`brightness`" in found[0]
    assert "the predicted label" in found[1]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"label": "dark", "probability": 0.9}', "line 2: without 'facts'"),
        (json.dumps({FACTS: ROW[FACTS]}), "line 2: without 'label'"),
        (json.dumps(ROW | {FACTS: ROW[FACTS] | {"height": 3.5}}), "line 2: height=3.5"),
        (json.dumps(ROW | {FACTS: 5}), "line 2: no JSON object of them"),
        (json.dumps(ROW)[:40], "line 2: no JSON object of them"),
        ("5", "line 2: no JSON object of them"),
    ],
)
def test_drift_names_the_line_that_is_no_row(training, tmp_path, capsys, line, reason):
    path = tmp_path / "facts.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{line}\n")

    assert predict(["drift", "--statistics", str(training), "--serving", str(path)]) == EXIT_WRONG_INPUT

    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: Expected `label` and `facts` in each line.")
    assert reason in error


@pytest.mark.parametrize("content", ["", '{"error": "it is no image"}\n'])
def test_drift_needs_one_image(training, tmp_path, capsys, content):
    path = tmp_path / "facts.jsonl"
    path.write_text(content)

    assert predict(["drift", "--statistics", str(training), "--serving", str(path)]) == EXIT_WRONG_INPUT

    (error,) = capsys.readouterr().err.splitlines()
    assert "at least. Received: '" + str(path) + "', of none" in error
