import datetime
import json

import apache_beam as beam
import numpy as np
import pytest
import tensorflow as tf
from apache_beam.io.gcp.pubsub import PubsubMessage
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability.api import beam_runner_api_pb2
from serving_stand_in import save_classifier

from data.errors import EXIT_WRONG_INPUT
from data.inspection import ImageLimits
from pipeline.model_digest import model_digest
from pipeline.predict import main
from pipeline.pubsub import ReadMessages, build_subscription_job, predict_messages, write_rows

pytestmark = pytest.mark.one_stack

SUBSCRIPTION = "projects/our-project/subscriptions/images"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("model") / "1")


def _message(data: bytes, *, age_seconds: float = 0.0, message_id: str = "7", **attributes: str) -> PubsubMessage:
    published = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age_seconds)
    return PubsubMessage(data, attributes, message_id, published)


def _read(message: PubsubMessage, *, max_age_seconds: float | None = None) -> list[tuple]:
    chunks = list(ReadMessages(max_age_seconds).process(message))
    return [(image.file, image.encoded, image.problem) for chunk in chunks for image in chunk.images]


@pytest.mark.parametrize(
    ("message", "images"),
    [
        (_message(b"gs://b/a.jpg\n"), [("gs://b/a.jpg", None, None)]),
        (_message(b"{}", bucketId="b", objectId="c/a.jpg", eventType="OBJECT_FINALIZE"), [("gs://b/c/a.jpg", None, None)]),
        (_message(b"{}", bucketId="b", objectId="c/a.jpg", eventType="OBJECT_DELETE"), []),
        (_message(b"\xff\xd8", file="camera-3"), [("camera-3", b"\xff\xd8", None)]),
        (_message(b"\xff\xd8"), [("7", b"\xff\xd8", None)]),
        (_message(b"/etc/passwd"), [("7", b"/etc/passwd", None)]),
        (_message(b"file:///etc/passwd"), [("7", b"file:///etc/passwd", None)]),
        (_message(b""), [("7", None, "the message is empty")]),
    ],
)
def test_read_messages_finds_the_image(message, images):
    assert _read(message) == images


def test_read_messages_marks_late_ones():
    assert _read(_message(b"x", age_seconds=50), max_age_seconds=60) == [("7", b"x", None)]
    ((_, _, problem),) = _read(_message(b"x", age_seconds=100), max_age_seconds=60)
    assert problem == "it came late: it is 100 s old; the limit is 60"


def test_predict_messages_gives_the_answers_of_serving_default(model, tmp_path, encode):
    random = np.random.default_rng(0)
    encoded = [encode(np.full((20, 20, 3), random.integers(0, 256, 3), np.uint8)) for _ in range(5)]
    messages = [_message(image, message_id=f"m{number}") for number, image in enumerate(encoded)]
    messages += [_message(b"no image", message_id="bad"), _message(encoded[0], message_id="old", age_seconds=1000)]

    with beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"])) as pipeline:
        answered, dead = predict_messages(
            pipeline | beam.Create(messages),
            model=str(model),
            digest=model_digest(str(model)),
            limits=ImageLimits(),
            max_age_seconds=600,
        )
        write_rows(answered, str(tmp_path), name="answers")
        write_rows(dead, str(tmp_path), name="dead_letters")

    def rows(name: str) -> dict[str, dict]:
        found = [json.loads(line) for path in tmp_path.glob(f"{name}-*.jsonl") for line in path.read_text().splitlines()]
        return {row["file"]: row for row in found}

    expected = tf.saved_model.load(str(model)).signatures["serving_default"](image_bytes=tf.constant(encoded))
    answers = rows("answers")
    assert set(answers) == {f"m{number}" for number in range(5)}
    assert [answers[f"m{i}"]["label"] for i in range(5)] == [label.decode() for label in expected["label"].numpy()]
    found = [list(answers[f"m{i}"]["probabilities"].values()) for i in range(5)]
    np.testing.assert_allclose(found, expected["probabilities"].numpy(), atol=1e-5)
    errors = {name: row["error"] for name, row in rows("dead_letters").items()}
    assert errors["bad"] == "it is no image of a known format"
    assert errors["old"].startswith("it came late")
    assert set(errors) == {"bad", "old"}


@pytest.mark.parametrize(
    ("output", "step"),
    [
        ("gs://bucket/answers", "Write answers"),
        ("projects/our-project/topics/answers", "Publish answers"),
        ("bigquery:our-project.set.answers", "Insert answers/"),
    ],
)
def test_subscription_job_reads_the_subscription_and_writes_where_it_is_told(model, output, step):
    # Built with a runner that asks no bucket, of the same steps.
    pipeline = beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner", "--streaming"]))
    build_subscription_job(
        pipeline,
        SUBSCRIPTION,
        output,
        dead_letter="projects/our-project/topics/dead",
        model=str(model),
        digest="",
        limits=ImageLimits(),
    )

    graph = pipeline.to_runner_api()

    names = {transform.unique_name for transform in graph.components.transforms.values()}
    assert any(step in name for name in names)
    assert any("Publish dead_letters" in name for name in names)
    unbounded = beam_runner_api_pb2.IsBounded.UNBOUNDED
    assert {one.is_bounded for name, one in graph.components.pcollections.items() if "Predict" in one.unique_name} == {
        unbounded
    }
    assert SUBSCRIPTION.encode() in graph.SerializeToString()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--subscription", "images", "--output", "gs://b/x"], "Expected --subscription to be projects/P/subscriptions/S"),
        (["--subscription", SUBSCRIPTION, "--output", "out"], "Expected --output to be gs://folder, projects/P/topics/T or"),
        (
            ["--subscription", SUBSCRIPTION, "--output", "gs://b/x", "--dead-letter", "out"],
            "Expected --dead-letter to be gs://folder",
        ),
        (["--subscription", SUBSCRIPTION, "--output", "gs://b/x"], "Expected the options of Beam for a subscription"),
    ],
)
def test_stream_of_a_subscription_says_what_is_wrong_in_one_line(model, capsys, arguments, message):
    assert main(["stream", "--model", str(model), *arguments]) == EXIT_WRONG_INPUT
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")
