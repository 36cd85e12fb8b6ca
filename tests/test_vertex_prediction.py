"""Online and batch predictions of Vertex AI: the commands and the real SDK against the stand-in."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import vertex_stand_in
from conftest import ROOT
from google.api_core import exceptions
from google.cloud import aiplatform
from PIL import Image
from serving_stand_in import StandIn, save_classifier
from vertex_stand_in import VertexStandIn

from data.errors import EXIT_DONE, EXIT_FAILED, EXIT_WRONG_INPUT
from pipeline.predict import main
from pipeline.vertex_prediction import MAX_IMAGE_BYTES, MAX_REQUEST_BYTES

pytestmark = pytest.mark.one_stack
google_cloud = vertex_stand_in.google_cloud

REGION = "us-central1"
ANSWER = {"label": "a", "probability": 1.0, "labels": ["a"], "probabilities": [1.0]}


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("model") / "1")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, make_images) -> Path:
    """A folder of ten good images and one that is none."""
    folder = make_images(tmp_path_factory.mktemp("images"), num_per_class=5, size=40)
    (folder / "circle" / "empty.jpg").touch()
    return folder


def good_images(images: Path) -> list[Path]:
    return sorted(path for path in images.glob("*/*") if path.stat().st_size)


@pytest.fixture
def model(google_cloud: VertexStandIn) -> aiplatform.Model:
    """A model in the registry, which answers by `google_cloud.answers`."""
    google_cloud.storage.create_bucket("bucket")
    google_cloud.storage.path("gs://bucket/model").mkdir()
    google_cloud.storage.path("gs://bucket/model/saved_model.pb").touch()
    google_cloud.answers[""] = lambda instances: [ANSWER for _ in instances]
    aiplatform.init(project=google_cloud.project, location=REGION)
    return aiplatform.Model.upload(display_name="shapes", artifact_uri="gs://bucket/model", serving_container_image_uri="image")


@pytest.fixture
def endpoint(model: aiplatform.Model) -> str:
    """The name of an endpoint that serves the model."""
    endpoint = aiplatform.Endpoint.create(display_name="shapes")
    endpoint.deploy(model, machine_type="n1-standard-4")
    return endpoint.resource_name


@pytest.fixture
def predict(endpoint: str, capsys: pytest.CaptureFixture):
    """Runs the command for images; gives its rows."""

    def run(images: Path) -> list[dict]:
        code = main(["online", str(images), "--endpoint", endpoint])
        assert code in (EXIT_DONE, EXIT_FAILED)
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def test_endpoint_gives_the_answers_of_serving_default(google_cloud: VertexStandIn, predict, saved_model: Path, images: Path):
    serving = tf.saved_model.load(str(saved_model)).signatures["serving_default"]
    with StandIn(saved_model) as server:  # what a container answers

        def answer(instances: list[dict]) -> list[dict]:
            _, content = server.predict(json.dumps({"instances": instances}).encode())
            return content["predictions"]

        google_cloud.answers[""] = answer
        rows = {row["file"]: row for row in predict(images)}

    good = good_images(images)
    answers = serving(image_bytes=tf.constant([path.read_bytes() for path in good]))
    assert len(rows) == len(good) + 1
    for index, path in enumerate(good):
        row = rows[str(path)]
        assert row["label"] == answers["label"][index].numpy().decode()
        np.testing.assert_allclose(list(row["probabilities"].values()), answers["probabilities"][index], atol=1e-5)
    assert rows[str(images / "circle" / "empty.jpg")]["error"] == "the file is empty"
    assert len(google_cloud.sent("Predict")) == len(good)


def test_endpoint_gets_an_image_that_fits_its_request(google_cloud: VertexStandIn, predict, tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), np.uint8)
    (folder := tmp_path / "images").mkdir()
    Image.fromarray(noise).save(folder / "large.png")
    sizes = []

    def answer(instances: list[dict]) -> list[dict]:
        sizes.append(len(json.dumps(instances)))
        return [ANSWER]

    google_cloud.answers[""] = answer
    (row,) = predict(folder)

    assert MAX_REQUEST_BYTES / 2 < sizes[0] < MAX_REQUEST_BYTES
    assert row["label"] == "a"
    assert f"to fit into a request of {MAX_IMAGE_BYTES:,} bytes" in row["note"]


@pytest.mark.parametrize(
    ("error", "times", "outcome"),
    [
        (exceptions.ResourceExhausted, 2, "label"),
        (exceptions.ServiceUnavailable, 2, "label"),
        (exceptions.InvalidArgument, 1, "error"),
        (exceptions.InternalServerError, 1, "error"),
    ],
)
def test_endpoint_that_is_busy_is_asked_again_and_one_that_is_broken_is_not(
    google_cloud: VertexStandIn, predict, images: Path, error, times: int, outcome: str
):
    google_cloud.faults += [("Predict", error("as the test says"))] * times
    image = next((images / "circle").glob("*.png"))

    (row,) = predict(image)

    assert outcome in row
    assert "as the test says" in row.get("error", "as the test says")
    assert len(google_cloud.sent("Predict")) == times + (outcome == "label")


@pytest.mark.parametrize("error", [exceptions.PermissionDenied, exceptions.NotFound])
def test_endpoint_that_may_not_be_asked_is_wrong_input(google_cloud: VertexStandIn, endpoint: str, images: Path, capsys, error):
    google_cloud.faults.append(("Predict", error("as the test says")))
    image = next((images / "circle").glob("*.png"))

    assert main(["online", str(image), "--endpoint", endpoint]) == EXIT_WRONG_INPUT

    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: Expected {endpoint} to be an endpoint that may be asked. Received: as the test says")


def test_batch_job_gets_every_image_by_its_name(google_cloud: VertexStandIn, model: aiplatform.Model, images: Path):
    # In a process of its own, whose TensorFlow writes to gs:// as it would in the cloud.
    command = [sys.executable, "-m", "pipeline.predict", "batch", "--job", "vertex", "--input", str(images)]
    command += ["--model", model.resource_name, "--output", "gs://bucket/out"]

    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | google_cloud.environment, capture_output=True, text=True, check=False
    )

    assert done.returncode == EXIT_DONE, done.stderr
    (request,) = google_cloud.sent("CreateBatchPredictionJob")
    job = request.batch_prediction_job
    assert request.parent == f"projects/{google_cloud.number}/locations/{REGION}"
    assert (job.model, list(job.input_config.gcs_source.uris)) == (model.resource_name, ["gs://bucket/out/instances.jsonl"])
    assert (job.input_config.instances_format, job.instance_config.key_field) == ("jsonl", "file")
    assert job.output_config.gcs_destination.output_uri_prefix == "gs://bucket/out"
    assert job.dedicated_resources.machine_spec.machine_type == "n1-standard-4"
    instances = google_cloud.storage.path("gs://bucket/out/instances.jsonl").read_text().splitlines()
    assert {json.loads(line)["file"] for line in instances} == {str(path) for path in good_images(images)}
    (error,) = google_cloud.storage.path("gs://bucket/out/errors.jsonl").read_text().splitlines()
    assert json.loads(error)["error"] == "the file is empty"
    (name,) = google_cloud.batch_jobs
    assert name in done.stdout


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (exceptions.ResourceExhausted("quota of n1-standard-4"), EXIT_FAILED, "error: Vertex AI failed: quota of n1"),
        (
            exceptions.PermissionDenied("no rights"),
            EXIT_WRONG_INPUT,
            "error: Expected a job that Vertex AI takes. Received: no",
        ),
        (exceptions.ServiceUnavailable("not now"), EXIT_FAILED, "error: Vertex AI failed: not now"),
    ],
)
def test_batch_job_that_vertex_refuses_ends_in_one_line(
    google_cloud: VertexStandIn, model: aiplatform.Model, images: Path, capsys, monkeypatch, error, code: int, message: str
):
    monkeypatch.setattr("pipeline.vertex_prediction.write_instances", lambda *unused: 0)  # to gs://, see above
    google_cloud.faults.append(("CreateBatchPredictionJob", error))
    command = [
        "batch",
        "--job",
        "vertex",
        "--input",
        str(images),
        "--model",
        model.resource_name,
        "--output",
        "gs://bucket/out",
    ]

    assert main(command) == code

    assert capsys.readouterr().err.splitlines()[-1].startswith(message)
