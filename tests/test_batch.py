import json
import os
import signal
import subprocess
import sys
import time

import apache_beam as beam
import numpy as np
import pyarrow.parquet
import pytest
import tensorflow as tf
from apache_beam.options.pipeline_options import PipelineOptions
from conftest import ROOT
from PIL import Image
from serving_stand_in import CLASS_NAMES, OUTPUTS, lines_of_ours, save_classifier

from data.errors import EXIT_DONE, EXIT_FAILED, EXIT_WRONG_INPUT
from pipeline.answers import BIGQUERY_SCHEMA, bigquery_row
from pipeline.batch import build_bigquery_job, predict_batch
from pipeline.inference import BATCH_SIZE, Classifier
from pipeline.predict import main

pytestmark = pytest.mark.one_stack

NUM_MANY = 16 * BATCH_SIZE


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("model") / "1")


@pytest.fixture(scope="module")
def images(tmp_path_factory, make_images):
    """A folder of 100 good images, and of three that are none."""
    folder = make_images(tmp_path_factory.mktemp("images"), num_per_class=50, size=24)
    (folder / "circle" / "empty.jpg").touch()
    (folder / "square" / "words.png").write_text("no image")
    (folder / "square" / "half.jpg").write_bytes((folder / "square" / "001.jpg").read_bytes()[:400])
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory, encode):
    """A folder of images that take a batch some seconds."""
    folder = tmp_path_factory.mktemp("many")
    random = np.random.default_rng(0)
    for number in range(NUM_MANY):
        pixels = np.full((16, 16, 3), random.integers(0, 256, 3), np.uint8)
        (folder / f"{number:04d}.png").write_bytes(encode(pixels))
    return folder


def _serving_default(model, paths) -> dict[str, np.ndarray]:
    outputs = tf.saved_model.load(str(model)).signatures["serving_default"](
        image_bytes=tf.constant([path.read_bytes() for path in paths])
    )
    return {name: outputs[name].numpy() for name in OUTPUTS}


def _read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _bare(path):
    """A folder's names, without what is hidden."""
    return sorted(name for name in os.listdir(path) if not name.startswith("."))


def test_predict_batch_gives_the_answers_of_serving_default_in_the_order_of_the_input(model, images, tmp_path):
    summary = predict_batch(str(images), str(tmp_path / "out.jsonl"), model=str(model))

    rows = _read(tmp_path / "out.jsonl")
    assert [row["file"] for row in rows] == sorted(str(path) for path in images.rglob("*.*"))
    good = [row for row in rows if "error" not in row]
    expected = _serving_default(model, [images / row["file"] for row in good])
    assert len(good) == 100
    assert len(set(expected["label"])) > 1
    assert [row["label"] for row in good] == [label.decode() for label in expected["label"]]
    found = np.array([list(row["probabilities"].values()) for row in good])
    np.testing.assert_allclose(found, expected["probabilities"], atol=1e-5)
    np.testing.assert_allclose([row["probability"] for row in good], expected["probability"], atol=1e-5)
    assert all(set(row) == {"file", "label", "probability", "probabilities"} for row in good)
    assert tuple(good[0]["probabilities"]) == CLASS_NAMES
    assert (summary["images"], summary["errors"], summary["resumed"]) == (103, 3, 0)
    assert sum(summary["labels"].values()) == 100
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_predict_batch_reports_bad_images_in_their_rows(model, images, tmp_path):
    predict_batch(str(images), str(tmp_path / "out.jsonl"), model=str(model))

    errors = {os.path.basename(row["file"]): row["error"] for row in _read(tmp_path / "out.jsonl") if "error" in row}
    assert errors["empty.jpg"] == "the file is empty"
    assert errors["words.png"] == "it is no image of a known format"
    assert errors["half.jpg"].startswith("it is damaged")
    assert len(errors) == 3


def test_predict_batch_writes_parquet_with_the_same_rows(model, images, tmp_path):
    for name in ("out.jsonl", "out.parquet"):
        predict_batch(str(images), str(tmp_path / name), model=str(model))

    table = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    rows = _read(tmp_path / "out.jsonl")
    assert [(row["file"], row["label"], row["probability"]) for row in table] == [
        (row["file"], row.get("label"), row.get("probability")) for row in rows
    ]
    assert [dict(row["probabilities"] or ()) for row in table] == [row.get("probabilities", {}) for row in rows]
    assert [row["error"] for row in table] == [row.get("error") for row in rows]


def test_predict_batch_takes_a_csv_whose_files_may_be_missing(model, images, tmp_path):
    (tmp_path / "list.csv").write_text(f"id,path\n1,{images}/circle/000.png\n2,gone.jpg\n")

    predict_batch(str(tmp_path / "list.csv"), str(tmp_path / "out.jsonl"), model=str(model))

    first, second = _read(tmp_path / "out.jsonl")
    assert first["label"] in CLASS_NAMES
    assert second == {"file": f"{tmp_path}/gone.jpg", "error": "there is no such file"}


def test_predict_batch_takes_records_with_and_without_labels(model, tmp_path, write_records, encode):
    pixels = [np.full((20, 20, 3), value, np.uint8) for value in (0, 100, 255)]
    write_records(tmp_path / "train-00000-of-00001.tfrecord.gz", pixels, ["a", "b", "a"])
    with tf.io.TFRecordWriter(str(tmp_path / "more.tfrecord")) as writer:
        feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=[encode(pixels[2])]))
        writer.write(tf.train.Example(features=tf.train.Features(feature={"image": feature})).SerializeToString())
        writer.write(tf.train.Example().SerializeToString())
        writer.write(b"\xff\xff")
    with open(tmp_path / "more.tfrecord", "ab") as file:
        file.write(b"damaged " * 10)
    (tmp_path / "labels.txt").write_text("a\nb\n")

    summary = predict_batch(str(tmp_path), str(tmp_path / "out.jsonl"), model=str(model))

    rows = _read(tmp_path / "out.jsonl")
    assert summary["images"] == len(rows) == 7
    assert [row.get("label") for row in rows] == ["bright", None, None, None, "dark", rows[5]["label"], "bright"]
    place = f"{tmp_path}/more.tfrecord"
    assert [row["file"] for row in rows] == [*(f"{place}#{number}" for number in range(1, 5)), "0.png", "1.png", "2.png"]
    assert rows[1]["error"] == "the record has no encoded `image`"
    assert rows[2]["error"].startswith("the record is no tf.Example")
    assert rows[3]["error"].startswith("the file is damaged after record 3, and the rest of it is lost")


def test_predict_batch_takes_a_pattern_and_the_newest_version(model, images, tmp_path):
    save_classifier(model.parent / "1000", sharpness=0.0)
    try:
        predict_batch(f"{images}/circle/0[01]*.png", str(tmp_path / "out.jsonl"), model=str(model.parent))
    finally:
        tf.io.gfile.rmtree(str(model.parent / "1000"))

    rows = _read(tmp_path / "out.jsonl")
    assert len(rows) == 10
    np.testing.assert_allclose([row["probability"] for row in rows], 1 / 3, atol=1e-6)


def test_predict_batch_leaves_its_own_files_out_when_it_writes_beside_the_input(model, images, tmp_path):
    Image.open(images / "circle" / "000.png").save(tmp_path / "one.png")

    predict_batch(str(tmp_path), str(tmp_path / "out.jsonl"), model=str(model))

    assert [row["file"] for row in _read(tmp_path / "out.jsonl")] == [str(tmp_path / "one.png")]


def test_batch_that_is_killed_goes_on_where_it_was(model, many, tmp_path, capsys):
    output, parts = tmp_path / "out.jsonl", tmp_path / ".out.jsonl.partial" / "parts"
    command = [sys.executable, "-m", "pipeline.predict", "batch", "--input", str(many), "--model", str(model)]
    with subprocess.Popen([*command, "--output", str(output)], cwd=ROOT, stderr=subprocess.PIPE) as job:
        while job.poll() is None and not (parts.exists() and len(os.listdir(parts)) >= 3):
            time.sleep(0.002)
        job.send_signal(signal.SIGKILL)
        messages = lines_of_ours(job.stderr.read().decode())
    assert job.returncode == -signal.SIGKILL
    assert _bare(tmp_path) == []
    done = {path: path.stat().st_mtime_ns for path in parts.glob("*.jsonl")}
    assert 2 <= len(done) < NUM_MANY / BATCH_SIZE
    assert messages[0] == f"Predicting {many} ..."
    assert all(line.startswith("predicted ") for line in messages[1:])

    assert main([*command[3:], "--output", str(output)]) == EXIT_DONE

    assert f"{BATCH_SIZE * len(done)} of them answered by an earlier job" in capsys.readouterr().out
    predict_batch(str(many), str(tmp_path / "whole.jsonl"), model=str(model))
    assert _read(output) == _read(tmp_path / "whole.jsonl")
    assert len(_read(output)) == NUM_MANY
    assert sorted(os.listdir(tmp_path)) == ["out.jsonl", "whole.jsonl"]


@pytest.mark.parametrize(("what", "resumed"), [("nothing", 103), ("model", 0), ("image", 0)])
def test_predict_batch_keeps_answers_only_of_the_same_model_and_images(images, tmp_path, what, resumed):
    """The first job ends just before its output is written, as the folder of that cannot be written to."""
    folder = tmp_path / "images"
    tf.io.gfile.makedirs(str(folder))
    for path in images.rglob("*.*"):
        (folder / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    model = save_classifier(tmp_path / "model")
    output, partial = tmp_path / "out" / "out.jsonl", tmp_path / "partial"
    output.parent.mkdir()
    arguments = {"model": str(model), "partial": str(partial)}
    statistics = str(tmp_path / "out" / "nowhere" / "statistics.pb")
    with pytest.raises(Exception, match="nowhere"):
        predict_batch(str(folder), str(output), statistics_output=statistics, **arguments)
    assert not output.exists()
    if what == "model":
        save_classifier(model, sharpness=0.01)
    elif what == "image":
        (folder / "circle-000.png").write_bytes((folder / "circle-002.png").read_bytes())

    assert predict_batch(str(folder), str(output), **arguments)["resumed"] == resumed

    paths = sorted(path for path in folder.iterdir() if "error" not in _row(output, path))
    expected = _serving_default(model, paths)["probability"]
    np.testing.assert_allclose([_row(output, path)["probability"] for path in paths], expected, atol=1e-5)


def _row(output, path):
    (row,) = [row for row in _read(output) if row["file"] == str(path)]
    return row


def test_predict_batch_does_not_write_when_a_row_is_missing(model, many, tmp_path, monkeypatch):
    from pipeline import batch

    def lose(pipeline, listings, **options):
        build(pipeline, listings[1:], **options)

    build = batch.build_job
    monkeypatch.setattr(batch, "build_job", lose)

    with pytest.raises(RuntimeError, match=f"Expected a row for each of {BATCH_SIZE} images .* Received: 0"):
        predict_batch(str(many), str(tmp_path / "out.jsonl"), model=str(model))

    assert _bare(tmp_path) == []


def test_classifier_keeps_the_good_answers_of_a_batch_with_bad_images(model, images):
    good = (images / "circle" / "000.png").read_bytes()

    first, second, third = Classifier(str(model)).predict([good, b"no image", good])

    assert first == third
    assert "label" in first
    assert second["error"].startswith("the model cannot take it: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"--input": "{tmp}/none"}, "Expected the input to be an image"),
        ({"--input": "{tmp}/*.none"}, "Expected images in the input. Received: "),
        ({"--output": "{tmp}/out.txt"}, "Expected --output to end in .jsonl or .parquet"),
        ({"--output": "{tmp}/none/out.jsonl"}, "Expected the folder of --output to exist"),
        ({"--output": "{tmp}/there.jsonl"}, "Name another, or replace it with --overwrite."),
        ({"--output": "bigquery:dataset.table"}, "Expected --output to be bigquery:project.dataset.table"),
        ({"--output": "bigquery:our-project.dataset.table"}, "Expected --partial to be a gs:// folder"),
        ({"--model": "{tmp}"}, "Expected the model to be a SavedModel or a folder of versions"),
        ({"--model": "{tmp}/other"}, "of {tmp}/other to take `image_bytes`"),
        ({"--": "--runner=DataflowRunner"}, "as the workers of Dataflow write there"),
    ],
)
def test_batch_says_what_is_wrong_in_one_line(model, images, tmp_path, capsys, arguments, message):
    (tmp_path / "there.jsonl").touch()
    module = tf.Module()
    module.double = tf.function(lambda x: 2 * x, input_signature=[tf.TensorSpec([None])])
    tf.saved_model.save(module, str(tmp_path / "other"), signatures=module.double)
    given = {"--input": str(images), "--output": f"{tmp_path}/out.jsonl", "--model": str(model)} | arguments
    argv = [text.format(tmp=tmp_path) for pair in given.items() for text in pair]

    assert main(["batch", *argv]) == EXIT_WRONG_INPUT

    *progress, error = capsys.readouterr().err.splitlines()
    assert message.format(tmp=tmp_path) in error
    assert error.startswith("error: ")
    assert len(progress) == 1
    assert _bare(tmp_path) == ["other", "there.jsonl"]


def test_batch_refuses_to_run_beside_another_of_the_same_output(model, images, tmp_path, capsys):
    import fcntl

    (tmp_path / ".out.jsonl.partial").mkdir()
    with open(tmp_path / ".out.jsonl.partial" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        code = main(["batch", "--input", str(images), "--model", str(model), "--output", str(tmp_path / "out.jsonl")])

    assert code == EXIT_FAILED
    assert "another job at work" in capsys.readouterr().err


def test_bigquery_job_loads_the_answers_at_once():
    pipeline = beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"]))
    output = "bigquery:our-project.answers.cells"
    build_bigquery_job(pipeline, ["gs://b/parts/0.jsonl"], output, temporary="gs://b/tmp", overwrite=True)

    names = [transform.unique_name for transform in pipeline.to_runner_api().components.transforms.values()]

    assert any("Load into BigQuery/BigQueryBatchFileLoads" in name for name in names)


def test_bigquery_row_has_the_fields_of_the_schema():
    answered = {"file": "a", "label": "x", "probability": 0.75, "probabilities": {"x": 0.75, "y": 0.25}, "facts": {}}
    fields = {field["name"] for field in BIGQUERY_SCHEMA["fields"]}

    assert bigquery_row(answered) == {
        "file": "a",
        "label": "x",
        "probability": 0.75,
        "probabilities": [{"label": "x", "probability": 0.75}, {"label": "y", "probability": 0.25}],
    }
    assert bigquery_row({"file": "b", "error": "why"}) == {"file": "b", "error": "why", "probabilities": []}
    assert set(bigquery_row(answered)) | {"error"} == fields
