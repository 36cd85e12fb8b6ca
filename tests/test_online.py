import datetime
import email.utils
import io
import json
import threading
import time

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from serving_stand_in import StandIn, save_classifier

from data.errors import EXIT_DONE, EXIT_FAILED, EXIT_WRONG_INPUT
from data.inspection import ImageLimits, UnusableImageError, inspect_image
from pipeline.inputs import InputImage
from pipeline.online import ServingClient, fit_image, list_images, parse_retry_after, predict_online
from pipeline.predict import main
from pipeline.vertex_prediction import write_instances

pytestmark = pytest.mark.one_stack

ENDPOINT = "projects/p/locations/europe-west4/endpoints/7"
MODEL = "projects/p/locations/europe-west4/models/9"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("model") / "1")


@pytest.fixture
def server(model):
    with StandIn(model) as stand_in:
        yield stand_in


@pytest.fixture(scope="module")
def images(tmp_path_factory, make_images):
    """A folder of ten good images and two that are none."""
    folder = make_images(tmp_path_factory.mktemp("images"), num_per_class=5, size=40)
    (folder / "circle" / "empty.jpg").touch()
    (folder / "square" / "words.png").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def expected(model, images):
    """Label and probabilities of each good image by the model itself."""
    signature = tf.saved_model.load(str(model)).signatures["serving_default"]
    paths = sorted(path for path in images.rglob("*.*") if path.stat().st_size > 10)
    outputs = signature(image_bytes=tf.constant([path.read_bytes() for path in paths]))
    labels, probabilities = outputs["label"].numpy(), outputs["probabilities"].numpy()
    return {str(path): (labels[i].decode(), probabilities[i]) for i, path in enumerate(paths)}


def _client(server: StandIn, **options) -> ServingClient:
    return ServingClient(server.url, **{"name": "model", "timeout_seconds": 60.0, **options})


def _ask(images, client, **options):
    return list(predict_online(list_images([str(images)]), client, **{"timeout_seconds": 60.0, **options}))


def test_online_gives_the_answers_of_serving_default_in_order(server, images, expected, capsys):
    assert main(["online", str(images), "--server", server.url]) == EXIT_DONE

    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["file"] for row in rows] == sorted(str(path) for path in images.rglob("*.*"))
    answered = {row["file"]: row for row in rows if "error" not in row}
    assert set(answered) == set(expected)
    for file, (label, probabilities) in expected.items():
        assert answered[file]["label"] == label
        assert answered[file]["probability"] == max(answered[file]["probabilities"].values())
        np.testing.assert_allclose(list(answered[file]["probabilities"].values()), probabilities, atol=1e-5)


def test_online_tells_what_is_wrong_with_an_image_without_asking(server, images):
    (answer,) = _ask(images / "circle" / "empty.jpg", _client(server))

    assert answer.row["error"] == "the file is empty"
    assert not answer.server_failed
    assert server.num_requests == 0


@pytest.mark.parametrize("fault", [429, 503, "reset", (429, {"Retry-After": "0"})])
def test_online_asks_again_when_the_server_is_busy(server, images, expected, fault):
    server.faults.extend([fault] * 3)

    answers = _ask(images, _client(server))

    assert {answer.row["file"] for answer in answers if "error" not in answer.row} == set(expected)
    assert server.num_requests == len(expected) + 3


def test_online_waits_as_long_as_the_server_says(server, images):
    server.faults.append((429, {"Retry-After": "1"}))
    began = time.monotonic()

    (answer,) = _ask(next(iter((images / "circle").glob("*.png"))), _client(server))

    assert "label" in answer.row
    assert time.monotonic() - began > 1.0


def test_predict_online_gives_up_on_a_server_that_stays_busy(server, images):
    server.faults.extend([503] * 100)

    failed = [answer for answer in _ask(images, _client(server), timeout_seconds=0.6) if answer.server_failed]

    assert len(failed) == 10
    for answer in failed:
        assert answer.row["error"].startswith("the server gave no answer, asked ")
        assert answer.row["error"].endswith(" times: 503: as the test says")


def test_online_says_that_the_server_stayed_busy(server, images, capsys):
    server.faults.extend([503] * 1000)

    code = main(["online", str(images), "--server", server.url, "--timeout", "8"])  # for each request, too

    captured = capsys.readouterr()
    errors = [json.loads(line)["error"] for line in captured.out.splitlines()]
    assert code == EXIT_FAILED
    assert len(errors) == 12
    assert sum("the server gave no answer" in error and "503: as the test says" in error for error in errors) == 10
    assert captured.err.startswith("error: the server failed for 10 images")


def test_online_does_not_repeat_what_the_server_cannot_do(server, images):
    server.faults.append(500)

    answers = _ask(images, _client(server), concurrency=1)

    failed = [answer for answer in answers if answer.server_failed]
    assert [answer.row["error"] for answer in failed] == ["the server failed with 500: as the test says"]
    assert server.num_requests == 10


def test_online_takes_a_refused_image_as_the_image_s_fault(server, images):
    server.faults.append(400)

    answers = _ask(images, _client(server), concurrency=1)

    assert sum(answer.row.get("error") == "as the test says" for answer in answers) == 1
    assert not any(answer.server_failed for answer in answers)


def test_online_asks_several_at_once_but_no_more_than_it_may(server, images, monkeypatch):
    many = list(list_images([str(images)] * 5))
    predict, has_two = server.predict, threading.Event()

    def predict_beside_another(body):
        if server.num_at_once > 1:
            has_two.set()
        assert has_two.wait(60)
        return predict(body)

    monkeypatch.setattr(server, "predict", predict_beside_another)

    list(predict_online(many, _client(server, concurrency=3), concurrency=3))

    assert 1 < server.most_at_once <= 3


def test_online_keeps_only_a_few_images_in_memory(server, images):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield from list_images([str(next((images / "circle").glob("*.png")))])

    answers = predict_online(endless(), _client(server), concurrency=2)
    next(answers)
    answers.close()

    assert taken <= 5


def test_online_turns_a_photograph_upright(server, tmp_path, encode):
    pixels = np.zeros((30, 60, 3), np.uint8)
    pixels[:, :30, 1] = 255
    exif = Image.Exif()
    exif[274] = 6
    (tmp_path / "phone.jpg").write_bytes(encode(pixels, "JPEG", exif=exif))
    (tmp_path / "upright.jpg").write_bytes(inspect_image((tmp_path / "phone.jpg").read_bytes(), ImageLimits()).encoded)

    phone, upright = _ask(tmp_path, _client(server))

    assert phone.row["probabilities"] == upright.row["probabilities"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "other"], "Expected {url}/v1/models/other to be a model that may be asked. Received: 404: no such model"),
        (["--server", "localhost:1"], "Expected --server to be http://host:port"),
        (["--endpoint", "7"], "Expected --endpoint to be projects/P/locations/L/endpoints/ID. Received: '7'"),
    ],
)
def test_online_says_what_is_wrong_with_the_address(server, images, capsys, arguments, message):
    if arguments[0] == "--name":
        arguments = [*arguments, "--server", server.url]

    assert main(["online", str(images), *arguments]) == EXIT_WRONG_INPUT

    error = capsys.readouterr().err
    assert message.format(url=server.url) in error
    assert len(error.splitlines()) == 1


def test_online_says_that_there_is_no_server(images, capsys):
    assert main(["online", str(images), "--server", "http://localhost:1"]) == EXIT_FAILED

    error = capsys.readouterr().err
    assert error.startswith("error: Expected a server at http://localhost:1/v1/models/model. Received: ")
    assert len(error.splitlines()) == 1


def test_online_says_that_there_are_no_images(server, tmp_path, capsys):
    assert main(["online", str(tmp_path / "none"), "--server", server.url]) == EXIT_WRONG_INPUT
    assert "which does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "seconds"), [("3", 3.0), ("-1", 0.0), ("soon", None), (None, None), ("", None)])
def test_parse_retry_after_reads_seconds(value, seconds):
    assert parse_retry_after(value) == seconds


def test_parse_retry_after_reads_a_date():
    moment = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)

    assert parse_retry_after(email.utils.format_datetime(moment, usegmt=True)) == pytest.approx(3600, abs=60)


def test_fit_image_keeps_what_fits(photograph):
    encoded = photograph.read_bytes()

    assert fit_image(encoded, len(encoded)) == (encoded, "")
    assert fit_image(encoded, None) == (encoded, "")


@pytest.mark.parametrize("share", [0.9, 0.3, 0.05])
def test_fit_image_shrinks_what_does_not(photograph, share):
    encoded = photograph.read_bytes()
    max_bytes = int(share * len(encoded))

    shrunk, note = fit_image(encoded, max_bytes)

    image = Image.open(io.BytesIO(shrunk))
    original = Image.open(io.BytesIO(encoded))
    assert 0.4 * max_bytes < len(shrunk) <= max_bytes
    assert image.width / image.height == pytest.approx(original.width / original.height, rel=0.03)
    coarse = [np.asarray(one.resize((16, 16), Image.Resampling.BOX), float) for one in (original, image)]
    assert np.abs(coarse[0] - coarse[1]).mean() < 8
    assert f"to fit into a request of {max_bytes:,} bytes" in note


def test_fit_image_refuses_the_impossible(photograph):
    with pytest.raises(UnusableImageError, match="however small"):
        fit_image(photograph.read_bytes(), 100)


def test_endpoint_client_says_that_there_are_no_credentials(images, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))  # the home of credentials
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # no look for the metadata server of a machine of Google's

    assert main(["online", str(images), "--endpoint", ENDPOINT]) == EXIT_WRONG_INPUT

    error = capsys.readouterr().err
    assert error.startswith("error: Expected application default credentials. Received: none.")
    assert len(error.splitlines()) == 1


def test_write_instances_writes_what_the_server_takes(server, images, expected, tmp_path):
    path, errors = tmp_path / "in.jsonl", tmp_path / "errors.jsonl"

    assert write_instances(list_images([str(images)]), str(path), str(errors)) == 2

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row.pop("file") for row in rows} == set(expected)
    status, content = server.predict(json.dumps({"instances": rows}).encode())
    assert status == 200
    assert [row["label"] for row in content["predictions"]] == [label for label, _ in expected.values()]
    assert [json.loads(line)["error"] for line in errors.read_text().splitlines()] == [
        "the file is empty",
        "it is no image of a known format",
    ]


def test_predict_online_reports_a_record_that_has_no_image(server):
    (answer,) = predict_online([InputImage("a#1", problem="the record has no encoded `image`")], _client(server))

    assert answer.row == {"file": "a#1", "error": "the record has no encoded `image`"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "7", "--output", "gs://b/out"], "Expected --model to be projects/P/locations/L/models/ID"),
        (["--model", MODEL, "--output", "out"], "Expected --output to be a gs:// folder"),
        (["--model", MODEL, "--output", "gs://b/out", "--", "--runner=X"], "Expected neither options of Beam"),
    ],
)
def test_batch_on_vertex_says_what_is_wrong_in_one_line(images, capsys, arguments, message):
    assert main(["batch", "--job", "vertex", "--input", str(images), *arguments]) == EXIT_WRONG_INPUT
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")
