import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT
from serving_stand_in import lines_of_ours, save_classifier

from data.errors import EXIT_DONE, EXIT_WRONG_INPUT
from pipeline.predict import main
from pipeline.stream import DEAD_LETTER, PREDICTIONS, Ledger, predict_stream, read_answers

pytestmark = pytest.mark.one_stack


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("model") / "1")


@pytest.fixture
def inbox(tmp_path, make_images):
    """A folder of six good images and one that is none."""
    folder = make_images(tmp_path / "inbox", num_per_class=3, size=24)
    (folder / "words.png").write_text("no image")
    return folder


def _stream(inbox, output, model, **options) -> dict[str, int]:
    return predict_stream(str(inbox), str(output), model=str(model), interval_seconds=0.05, once=True, **options)


def _files(output) -> Counter:
    return Counter(os.path.basename(row["file"]) for row in read_answers(str(output)))


def _written(output, kind: str) -> list[dict]:
    return [json.loads(line) for path in sorted(output.glob(f"{kind}-*.jsonl")) for line in path.read_text().splitlines()]


def test_stream_gives_the_answers_of_serving_default(model, inbox, tmp_path):
    assert _stream(inbox, tmp_path / "out", model) == {"predictions": 6, "dead_letters": 1}

    rows = _written(tmp_path / "out", PREDICTIONS)
    signature = tf.saved_model.load(str(model)).signatures["serving_default"]
    expected = signature(image_bytes=tf.constant([Path(row["file"]).read_bytes() for row in rows]))
    assert [row["label"] for row in rows] == [label.decode() for label in expected["label"].numpy()]
    found = [list(row["probabilities"].values()) for row in rows]
    np.testing.assert_allclose(found, expected["probabilities"].numpy(), atol=1e-5)
    assert all(set(row) == {"file", "label", "probability", "probabilities"} for row in rows)


def test_stream_puts_bad_images_into_the_dead_letters(model, inbox, tmp_path):
    _stream(inbox, tmp_path / "out", model)

    (row,) = _written(tmp_path / "out", DEAD_LETTER)
    assert row == {"file": str(inbox / "words.png"), "error": "it is no image of a known format"}


def test_stream_puts_late_images_into_the_dead_letters(model, inbox, tmp_path):
    os.utime(inbox / "circle" / "000.png", (0, time.time() - 1000))

    assert _stream(inbox, tmp_path / "out", model, max_age_seconds=600) == {"predictions": 5, "dead_letters": 2}

    late = [row for row in _written(tmp_path / "out", DEAD_LETTER) if row["file"].endswith("circle/000.png")]
    assert re.fullmatch(r"it came late: it is 1,\d{3} s old; the limit is 600", late[0]["error"])


def test_stream_answers_nothing_twice_after_a_restart(model, inbox, tmp_path):
    _stream(inbox, tmp_path / "out", model)
    shutil.copy(inbox / "circle" / "000.png", inbox / "new.png")

    assert _stream(inbox, tmp_path / "out", model) == {"predictions": 7, "dead_letters": 1}


def test_stream_answers_a_changed_image_again_and_a_touched_one_not(model, inbox, tmp_path):
    _stream(inbox, tmp_path / "out", model)
    os.utime(inbox / "circle" / "000.png")
    shutil.copy(inbox / "square" / "000.png", inbox / "circle" / "002.png")

    _stream(inbox, tmp_path / "out", model)

    rows = [row["file"] for row in _written(tmp_path / "out", PREDICTIONS)]
    assert rows.count(str(inbox / "circle" / "002.png")) == 2
    assert len(rows) == len(set(rows)) + 1


def test_stream_waits_until_a_file_is_written(model, inbox, tmp_path, monkeypatch):
    """The file grows after each look at it, and only the fourth finds it whole."""
    encoded, slow = (inbox / "circle" / "000.png").read_bytes(), inbox / "slow.png"
    is_new, quarter = Ledger.is_new, len(encoded) // 4
    rest = [encoded[quarter : 2 * quarter], encoded[2 * quarter : 3 * quarter], encoded[3 * quarter :]]
    slow.write_bytes(encoded[:quarter])

    def look_and_write(ledger, path, size, changed):
        found = is_new(ledger, path, size, changed)
        if path == str(slow) and rest:
            with open(slow, "ab") as file:
                file.write(rest.pop(0))
        return found

    monkeypatch.setattr(Ledger, "is_new", look_and_write)

    assert _stream(inbox, tmp_path / "out", model) == {"predictions": 7, "dead_letters": 1}

    assert not rest
    assert [row["label"] for row in read_answers(str(tmp_path / "out")) if row["file"].endswith("slow.png")] == [
        row["label"] for row in read_answers(str(tmp_path / "out")) if row["file"].endswith("circle/000.png")
    ]


@pytest.mark.parametrize("noted", [True, False])
def test_ledger_cuts_off_what_it_does_not_know(tmp_path, noted):
    ledger = Ledger(str(tmp_path))
    ledger.is_new("a.png", 1, 1)
    assert ledger.is_new("a.png", 1, 1)
    assert ledger.begin("a.png", "chunk", "digest")
    if noted:
        ledger.commit("chunk", [{"file": "a.png", "label": "x"}])
    (path,) = tmp_path.glob("predictions-*.jsonl") if noted else [tmp_path / "predictions-2026-01-01.jsonl"]
    with open(path, "a") as file:
        file.write('{"file": "b.png", "lab')

    ledger.recover()

    assert path.read_text() == ('{"file": "a.png", "label": "x"}\n' if noted else "")
    assert ledger.is_new("a.png", 1, 1) is not noted


def test_ledger_commits_a_chunk_once(tmp_path):
    ledger = Ledger(str(tmp_path))
    ledger.is_new("a.png", 1, 1)
    ledger.begin("a.png", "chunk", "digest")

    for _ in range(2):
        ledger.commit("chunk", [{"file": "a.png", "label": "x"}])

    assert len(list(read_answers(str(tmp_path)))) == 1


# Predicts, and is killed when it has written answers for the fourth time and has not noted them.
KILLED = """
import os, signal, sys
from pipeline import predict, stream

num_synchronized = 0

def synchronize_and_die(file):
    global num_synchronized
    num_synchronized += 1
    if num_synchronized == 4:
        os.kill(os.getpid(), signal.SIGKILL)

stream.os.fsync = synchronize_and_die
predict.main(sys.argv[1:])
"""


def _start(inbox, output, model, *, is_killed: bool = False) -> subprocess.Popen:
    program = ["-c", KILLED] if is_killed else ["-m", "pipeline.predict"]
    arguments = ["stream", "--interval", "0.1", "--input", str(inbox), "--output", str(output), "--model", str(model)]
    command = [sys.executable, *program, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _wait_for(output, number: int, process: subprocess.Popen) -> None:
    until = time.monotonic() + 600
    while not output.exists() or len(_half_read(output)) < number:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < until
        time.sleep(0.005)


def _half_read(output) -> list[bytes]:
    return [line for path in output.glob("*.jsonl") for line in path.read_bytes().splitlines(keepends=True)]


def test_stream_is_exactly_once_over_a_kill_and_a_drain(model, tmp_path, encode):
    inbox, output = tmp_path / "inbox", tmp_path / "out"
    inbox.mkdir()
    random = np.random.default_rng(0)

    def bring(first: int, last: int) -> None:
        for number in range(first, last):
            encoded = encode(np.full((16, 16, 3), random.integers(0, 256, 3), np.uint8))
            (inbox / f"{number:04d}.png").write_bytes(encoded if number % 50 else b"no image")

    bring(0, 1000)
    with _start(inbox, output, model, is_killed=True) as first:
        _, errors = first.communicate(timeout=600)
    assert first.returncode == -signal.SIGKILL, errors.decode()
    assert 0 < len(_half_read(output)) < 1000
    with _start(inbox, output, model) as second:
        _wait_for(output, 1000, second)
        bring(1000, 1400)
        _wait_for(output, 1050, second)
        second.send_signal(signal.SIGTERM)
        out, errors = second.communicate(timeout=600)

    assert second.returncode == EXIT_DONE, errors.decode()
    assert lines_of_ours(errors.decode()) == [f"Watching {inbox} ... Stop with Ctrl+C."]
    lines = _half_read(output)
    assert all(line.endswith(b"\n") for line in lines)
    assert f"{len(lines)} images" in out.decode()
    assert (
        main(["stream", "--input", str(inbox), "--output", str(output), "--model", str(model), "--interval", "0.05", "--once"])
        == EXIT_DONE
    )
    files = _files(output)
    assert len(files) == 1400
    assert set(files.values()) == {1}
    assert len(_written(output, DEAD_LETTER)) == 28


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"--input": "{tmp}/none"}, "Expected --input to be a folder"),
        ({"--output": "{tmp}/inbox/out"}, "Expected --output to lie outside of the input"),
        ({"--output": "gs://bucket/out"}, "Expected --output to be a folder on this machine"),
        ({"--model": "{tmp}"}, "Expected the model to be a SavedModel or a folder of versions"),
    ],
)
def test_stream_says_what_is_wrong_in_one_line(model, inbox, tmp_path, capsys, arguments, message):
    given = {"--input": str(inbox), "--output": f"{tmp_path}/out", "--model": str(model)} | arguments

    code = main(["stream", *(text.format(tmp=tmp_path) for pair in given.items() for text in pair)])

    assert code == EXIT_WRONG_INPUT
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")
