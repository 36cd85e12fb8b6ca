"""The real server process: what it answers, what it refuses, and that nothing a client does holds or breaks it."""

import asyncio
import base64
import concurrent.futures
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASS_NAMES, ROOT
from hostile_requests import attack, post, read_answer, send
from PIL import Image
from server_process import ServerProcess, export_classifier, instance, instances

from data.errors import EXIT_WRONG_INPUT, InputError
from models.application import create_app
from models.server import read_config
from models.server_config import ServerConfig
from models.service import Service
from pipeline.serving_process import make_png

MAX_BODY_BYTES = 2**20
LIMITS = ("--max-body-mib=1", "--max-pixels=1000000", "--max-queue=64", "--max-batch-size=8", "--poll-seconds=0.3")
LIMITS += ("--head-seconds=4", "--body-seconds=8", "--request-seconds=300")
MAX_CONNECTIONS = 100
LIMITS += (f"--max-connections={MAX_CONNECTIONS}",)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, transform_graph) -> dict[int, Path]:
    """Two classifiers, by seed, that answer the same images differently."""
    folder = tmp_path_factory.mktemp("exported")
    return {seed: export_classifier(folder / str(seed), transform_graph, seed=seed) for seed in (1, 2)}


@pytest.fixture(scope="module")
def server(tmp_path_factory, exported):
    folder = tmp_path_factory.mktemp("server")
    shutil.copytree(exported[1], folder / "serving_model" / "5")
    process = ServerProcess(folder / "log", f"--model={folder / 'serving_model'}", *LIMITS)
    yield process
    process.stop()


@pytest.fixture(scope="module")
def images(encode, photograph) -> list[bytes]:
    random = np.random.default_rng(0)
    noise = [encode(random.integers(0, 256, (40 + 3 * n, 40, 3), np.uint8), ("PNG", "JPEG")[n % 2]) for n in range(6)]
    return [*noise, photograph.read_bytes()]


@pytest.fixture(scope="module")
def expected(exported, images) -> dict[int, np.ndarray]:
    """The probabilities that `serving_default` gives, by seed."""
    found = {}
    for seed, folder in exported.items():
        model = tf.saved_model.load(str(folder))
        found[seed] = model.signatures["serving_default"](image_bytes=tf.constant(images))["probabilities"].numpy()
    assert np.abs(found[1] - found[2]).max() > 1e-3
    return found


def _probabilities(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.array([row["probabilities"] for row in answer.json()["predictions"]])


def _wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("route", ["/v1/models/model:predict", "/v1/models/model/versions/5:predict", "/predict"])
def test_predict_answers_as_serving_default(server, images, expected, route):
    answer = server.post(instances(*images), route=route)

    np.testing.assert_allclose(_probabilities(answer), expected[1], atol=1e-5)
    for row, probabilities in zip(answer.json()["predictions"], expected[1], strict=True):
        assert row["labels"] == list(CLASS_NAMES)
        assert row["label"] == CLASS_NAMES[probabilities.argmax()]
        assert row["probability"] == max(row["probabilities"])


def test_predict_answers_columns(server, images, expected):
    answer = server.post({"inputs": {"image_bytes": [instance(image)["image_bytes"] for image in images]}})

    outputs = answer.json()["outputs"]
    assert set(outputs) == {"label", "probability", "labels", "probabilities"}
    np.testing.assert_allclose(outputs["probabilities"], expected[1], atol=1e-5)


def test_predict_answers_concurrent_clients_each_with_its_own(server, images, expected):
    def ask(number: int) -> float:
        position = number % len(images)
        return np.abs(_probabilities(server.post(instances(images[position])))[0] - expected[1][position]).max()

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert max(pool.map(ask, range(160))) <= 1e-5
    sizes = server.client.get("/metrics").text
    assert 'tfx_vision_batch_size_bucket{le="1.0"}' in sizes


def test_predict_reads_images_as_a_person_sees_them(server, encode, photograph):
    upright = Image.open(photograph).convert("RGB").crop((100, 0, 400, 500))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees to the right when it is shown
    turned = encode(upright.transpose(Image.Transpose.ROTATE_90), exif=exif.tobytes())
    others = [encode(upright, "WEBP", lossless=True), encode(upright, "BMP"), encode(upright, "TIFF")]

    first, *found = _probabilities(server.post(instances(encode(upright), turned)))
    for one in others:
        found.append(_probabilities(server.post(instances(one)))[0])

    np.testing.assert_allclose(found, [first] * 4, atol=1e-5)
    sideways = encode(upright.transpose(Image.Transpose.ROTATE_90))
    assert np.abs(_probabilities(server.post(instances(sideways)))[0] - first).max() > 1e-4


@pytest.mark.parametrize(
    ("body", "options", "status", "message"),
    [
        (b"{", {}, 400, "Expected a JSON object"),
        ({"instances": []}, {}, 400, "an empty list"),
        ({"instances": [{"b64": "AAAA"}] * 65}, {}, 400, "Expected 64 images or fewer. Received: 65"),
        (instances(make_png(1001, 1000)), {}, 400, "1001 x 1000 pixels; the limit is 1,000,000 in all"),
        (b"x" * (MAX_BODY_BYTES + 1), {}, 413, "Expected a body of 1,048,576 bytes or fewer"),
        ({}, {"route": "/v1/models/other:predict"}, 404, "Expected a path such as /v1/models/model:predict"),
        ({}, {"route": "/v1/models/model/versions/4:predict"}, 404, "Expected version 5, which is served. Received: 4"),
        ({}, {"route": "/v1/models/model/versions/x:predict"}, 404, "Expected a path"),
        ({}, {"route": f"/v1/models/model/versions/{'9' * 5000}:predict"}, 404, "Expected a path"),
        ({}, {"route": "/healthz"}, 405, "Expected GET for '/healthz'. Received: POST"),
        ({}, {"headers": {"content-type": "image/jpeg"}}, 415, "Expected JSON. Received: 'image/jpeg'"),
        ({}, {"headers": {"content-encoding": "gzip"}}, 415, "Expected a body as it is"),
        ({"instances": [{"b64": "AAAA"}], "parameters": 3}, {}, 400, "Expected `parameters`"),
    ],
)
def test_server_says_what_is_wrong(server, body, options, status, message):
    answer = server.post(body, **options)

    assert answer.status_code == status
    assert set(answer.json()) == {"error"}
    assert message in answer.json()["error"]


def test_predict_names_the_one_bad_image_and_answers_the_others_beside_it(server, images, expected):
    damaged = images[1][: len(images[1]) // 2]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        bad = [pool.submit(server.post, instances(images[0], damaged)) for _ in range(20)]
        good = [pool.submit(server.post, instances(images[2])) for _ in range(40)]

    for answer in bad:
        assert answer.result().status_code == 400
        assert "Expected `instances[1]` to be an image" in answer.result().json()["error"]
    for answer in good:
        np.testing.assert_allclose(_probabilities(answer.result())[0], expected[1][2], atol=1e-5)


def test_server_answers_the_routes_of_tensorflow_serving(server):
    status = server.client.get("/v1/models/model").json()
    assert status["model_version_status"] == [
        {"version": "5", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    ]
    assert server.client.get("/v1/models/model/versions/5").json() == status
    assert server.client.get("/v1/models/model/versions/6").status_code == 404
    metadata = server.client.get("/v1/models/model/metadata").json()
    assert metadata["model_spec"] == {"name": "model", "signature_name": "", "version": "5"}
    assert (
        metadata["metadata"]["signature_def"]["signature_def"]["serving_default"]["inputs"]["image_bytes"]["dtype"]
        == "DT_STRING"
    )
    assert server.client.get("/v1/models/model/versions/5/metadata").json() == metadata
    assert server.client.get("/healthz").status_code == 200
    for path in ("/docs", "/redoc"):  # they load from a CDN
        assert server.client.get(path).status_code == 404


def test_explain_answers_in_the_format_of_vertex(server, images, expected):
    photograph = images[-1]
    parameters = {"method": "integrated_gradients", "num_steps": 8}

    answer = server.post(instances(photograph, images[0], parameters=parameters), route="/v1/models/model:explain")

    assert answer.status_code == 200, answer.text
    found = answer.json()
    np.testing.assert_allclose([row["probabilities"] for row in found["predictions"]], expected[1][[-1, 0]], atol=1e-5)
    assert len(found["explanations"]) == 2
    (attribution,) = found["explanations"][0]["attributions"]
    best = int(expected[1][-1].argmax())
    assert attribution["outputIndex"] == [best]
    assert attribution["outputDisplayName"] == CLASS_NAMES[best]
    assert attribution["instanceOutputValue"] == pytest.approx(expected[1][-1][best], abs=1e-5)
    values = np.array(attribution["featureAttributions"]["image_bytes"])
    assert values.shape == (32, 32)
    change = attribution["instanceOutputValue"] - attribution["baselineOutputValue"]
    gap = abs(values.sum() - change)
    assert gap == pytest.approx(attribution["approximationError"] * max(abs(change), 1e-3), abs=1e-4)
    header, _, encoded = attribution["overlay"].partition(",")
    assert header == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == (512, 600)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parameters": {"method": "magic"}}, "Expected `parameters.method` to be valid. Received: 'magic'"),
        ({"parameters": {"label": "dog"}}, "Expected `parameters.label` to be one of circle, square. Received: 'dog'"),
        ({"parameters": {"num_steps": 1}}, "Expected `num_steps` in [2"),
        ({"parameters": {"num_steps": 257}}, "Expected 256 gradients or fewer. Received: 257"),
        ({"parameters": {"num_steps": 100, "num_noisy_copies": 3}}, "Received: 300"),
        ({"parameters": {"steps": 3}}, "Known are method, label"),
        ({"parameters": {"num_steps": "8"}}, "Expected `parameters.num_steps`"),
    ],
)
def test_explain_says_what_is_wrong(server, images, fields, message):
    answer = server.post(instances(images[0], **fields), route="/v1/models/model:explain")

    assert answer.status_code == 400
    assert message in answer.json()["error"]


def test_explain_takes_few_images(server, images):
    answer = server.post(instances(*[images[0]] * 9), route="/v1/models/model:explain")

    assert answer.status_code == 400
    assert "Expected 8 images or fewer to explain. Received: 9" in answer.json()["error"]


def test_server_refuses_what_does_not_fit_its_queue(server, images, expected):
    """Far more than 64 images at a time; those that are taken are answered right."""
    body = json.dumps(instances(*[images[1]] * 60)).encode()

    def ask(_: int) -> tuple[int, str | None]:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            answer = client.post("/predict", content=body)
        if answer.status_code == 200:
            np.testing.assert_allclose(_probabilities(answer), [expected[1][1]] * 60, atol=1e-5)
        return answer.status_code, answer.headers.get("retry-after")

    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        found = list(pool.map(ask, range(80)))

    assert set(found) == {(200, None), (429, "1")}
    assert server.post(instances(images[0])).status_code == 200


def test_slow_and_silent_clients_are_cut(server, images):
    raw = post(json.dumps(instances(images[0])).encode())
    connections = {}
    for name, part in {"silent": b"", "head": raw[:20], "body": raw[:-5]}.items():
        connections[name] = socket.create_connection(("127.0.0.1", server.port), timeout=300)
        connections[name].sendall(part)
    assert server.post(instances(images[0])).status_code == 200  # nobody waits for them

    answers = {name: read_answer(connection) for name, connection in connections.items()}

    assert answers["silent"][0] == answers["head"][0] == 0
    status, body = answers["body"]
    assert status == 408
    assert "Expected the body within 8 seconds" in json.loads(body)["error"]


def test_a_head_without_end_and_no_http_are_refused(server):
    status, body = send(server.port, b"GET / HTTP/1.1\r\nx: " + b"h" * 40_000)
    assert (status, "head of 32,768 bytes" in json.loads(body)["error"]) == (431, True)
    status, body = send(server.port, b"\x16\x03\x01\x02\x00 TLS?\r\n\r\n")
    assert (status, "HTTP/1.1" in json.loads(body)["error"]) == (400, True)


def test_a_client_that_sends_too_much_sees_the_answer(server):
    """Its connection is closed after the answer; closed before the body was read, it would lose the answer."""
    for _ in range(5):
        status, body = send(server.port, post(b"x" * (3 * MAX_BODY_BYTES)))
        assert status == 413
        assert "Expected a body of 1,048,576 bytes" in json.loads(body)["error"]


def test_connections_beyond_the_limit_are_refused(server, images):
    status, attempts = 0, 0
    while status != 429 and attempts < 10:  # on a slow machine, the first may have been cut before the last has come
        attempts += 1
        silent = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(MAX_CONNECTIONS)]
        status, body = send(server.port, b"")
        for connection in silent:
            connection.close()

    assert status == 429
    assert "open connections" in json.loads(body)["error"]
    raw = post(json.dumps(instances(images[0])).encode())
    _wait_until(lambda: send(server.port, raw)[0] == 200)  # soon, the server has seen that the others have gone


def test_metrics_and_log_tell_what_happened(server, images):
    server.post(instances(images[0]), headers={"x-request-id": "bad id\t" + "x" * 100})
    answer = server.post(instances(images[0], images[1]), headers={"x-request-id": "find-me"})

    assert answer.headers["x-request-id"] == "find-me"
    _wait_until(lambda: any(line.get("id") == "find-me" for line in server.lines()))  # it comes after the answer
    (line,) = [line for line in server.lines() if line.get("id") == "find-me"]
    assert {name: line[name] for name in ("severity", "message", "method", "path", "code", "images", "version")} == {
        "severity": "INFO",
        "message": "request",
        "method": "POST",
        "path": "/v1/models/model:predict",
        "code": 200,
        "images": 2,
        "version": 5,
    }
    assert not any("bad id" in json.dumps(line) for line in server.lines())
    metrics = server.client.get("/metrics").text
    assert 'tfx_vision_requests_total{code="200",method="POST",route="/v1/models/model:predict"}' in metrics
    assert "tfx_vision_model_version 5.0" in metrics
    assert "tfx_vision_queue_length 0.0" in metrics
    assert any(f'tfx_vision_predictions_total{{label="{name}"}}' in metrics for name in CLASS_NAMES)


def test_server_stands_a_thousand_requests_of_which_a_third_are_hostile(server, images, expected):
    settings = {"max_body_bytes": MAX_BODY_BYTES, "num_requests": 500}
    _, wrong = attack(server.port, images, expected[1], seed=1, **settings)
    before = server.memory_mib()

    counts, more = attack(server.port, images, expected[1], seed=2, **settings)

    assert wrong + more == []
    assert counts["good", 200] == 333
    assert len(counts) > 30  # kinds of requests
    assert server.memory_mib() - before < 40
    for idle in ("tfx_vision_queue_length 0.0", "tfx_vision_buffered_bytes 0.0"):  # once all that left are forgotten
        _wait_until(lambda idle=idle: idle in server.client.get("/metrics").text)
    codes = {line["code"] for line in server.lines() if line["message"] == "request"}
    assert not any(code >= 500 for code in codes - {503})  # 503 while it was loading


def test_server_keeps_to_its_openapi_document(server):
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json", "--no-color"]
    command += ["--checks", "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"]
    command += ["--max-examples", "20", "--seed", "1", "--phases", "examples,coverage,fuzzing"]
    command += ["--suppress-health-check", "all", "--generation-database", "none"]
    done = subprocess.run(command, cwd=server.log.parent, capture_output=True, text=True, timeout=900)

    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


class _WaitingModel(tf.Module):
    """A classifier that answers nothing, its warm-up neither, until there is a file; then it answers every image alike."""

    def __init__(self, file: Path):
        super().__init__()
        self._file = str(file)

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None], tf.string, name="image_bytes")])
    def serve(self, image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        def is_missing(count: tf.Tensor) -> tf.Tensor:
            # The count is in it, as TensorFlow looks once for a file of a constant name.
            pattern = tf.strings.join([self._file, tf.where(count < 0, "x", "")])
            return tf.equal(tf.size(tf.io.matching_files(pattern)), 0)

        waited = tf.while_loop(is_missing, lambda count: [count + 1], [0])
        with tf.control_dependencies(waited):
            num_images = tf.shape(image_bytes)[0]
        return {
            "label": tf.fill([num_images], CLASS_NAMES[0]),
            "probability": tf.fill([num_images], 0.75),
            "labels": tf.tile([CLASS_NAMES], [num_images, 1]),
            "probabilities": tf.tile([[0.75, 0.25]], [num_images, 1]),
        }


class _Load:
    """Clients that ask again and again, each answer with the version that it must come from."""

    def __init__(self, server: ServerProcess, image: bytes, num_clients: int = 4):
        self._server = server
        self._body = json.dumps(instances(image)).encode()
        self._ends = threading.Event()
        self.answers: list[httpx.Response | Exception] = []
        self._threads = [threading.Thread(target=self._work) for _ in range(num_clients)]

    def _work(self) -> None:
        with httpx.Client(base_url=self._server.url, timeout=60) as client:
            while not self._ends.is_set():
                try:
                    self.answers.append(client.post("/predict", content=self._body))
                except httpx.HTTPError as error:
                    self.answers.append(error)
                    return

    def wait_for(self, number: int) -> None:
        """Waits until so many more answers have come."""
        wanted = len(self.answers) + number
        _wait_until(lambda: len(self.answers) >= wanted)

    def __enter__(self) -> "_Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join()


def test_server_is_ready_with_its_model_takes_new_versions_under_load_and_ends_with_sigterm(
    tmp_path, exported, images, expected
):
    """One test, as each part needs the process as the one before it has left it."""
    folder, file = tmp_path / "serving_model", tmp_path / "go"
    waiting = _WaitingModel(file)
    tf.saved_model.save(waiting, str(folder / "1"), signatures={"serving_default": waiting.serve})
    server = ServerProcess(
        tmp_path / "log",
        *LIMITS,
        "--body-seconds=300",
        "--drain-seconds=300",
        environment={"AIP_STORAGE_URI": str(folder)},
        is_ready=False,
    )
    try:
        _check_that_it_is_not_ready(server, images[0])
        file.touch()
        server.wait_for_line("version 1 is served")
        assert server.client.get("/healthz").status_code == 200
        _check_that_versions_are_replaced(server, folder, exported, images[0], expected)
        _check_that_sigterm_lets_requests_end(server, images[0])
    finally:
        server.stop()


def _check_that_it_is_not_ready(server: ServerProcess, image: bytes) -> None:
    assert server.client.get("/healthz").status_code == 503
    early = server.post(instances(image))
    assert early.status_code == 503
    assert early.headers["retry-after"] == "1"


def _push(model: Path, folder: Path) -> None:
    """Puts a version in its place whole, as it is pushed."""
    copy = folder.with_name("copy")
    shutil.copytree(model, copy)
    os.rename(copy, folder)


def _check_that_versions_are_replaced(
    server: ServerProcess, folder: Path, exported: dict[int, Path], image: bytes, expected: dict[int, np.ndarray]
) -> None:
    _push(exported[1], folder / "2")
    server.wait_for_line("version 2 is served")
    with _Load(server, image) as load:
        load.wait_for(20)
        (folder / "4").mkdir()
        (folder / "4" / "saved_model.pb").write_bytes(b"garbage")
        server.wait_for_line("version 4 is skipped")
        _push(exported[2], folder / "3")
        server.wait_for_line("version 3 is served")
        load.wait_for(20)
        shutil.rmtree(folder / "3")
        time.sleep(1.0)  # three looks for versions
        load.wait_for(20)

    found = np.array([_probabilities(answer)[0] for answer in load.answers])
    of_first, of_second = (np.abs(found - expected[seed][0]).max(axis=1) <= 1e-5 for seed in (1, 2))
    assert (of_first | of_second).all()
    assert of_first.any()
    assert of_second.any()
    states = server.client.get("/v1/models/model").json()["model_version_status"]
    assert [(state["version"], state["state"], state["status"]["error_code"]) for state in states] == [
        ("4", "END", "UNKNOWN"),
        ("3", "AVAILABLE", "OK"),
        ("2", "END", "OK"),
        ("1", "END", "OK"),
    ]
    assert sum("version 4 is skipped" in line["message"] for line in server.lines()) == 1


def _check_that_sigterm_lets_requests_end(server: ServerProcess, image: bytes) -> None:
    def is_refused() -> bool:
        try:
            socket.create_connection(("127.0.0.1", server.port), timeout=60).close()
        except ConnectionRefusedError:
            return True
        return False

    raw = post(json.dumps(instances(image)).encode())
    with socket.create_connection(("127.0.0.1", server.port), timeout=300) as connection:
        connection.sendall(raw[:-1])
        _wait_until(lambda: "tfx_vision_buffered_bytes 0.0" not in server.client.get("/metrics").text)
        server.process.send_signal(signal.SIGTERM)
        _wait_until(is_refused)
        connection.sendall(raw[-1:])
        status, answer = read_answer(connection)

    assert status == 200
    assert len(json.loads(answer)["predictions"]) == 1
    assert server.process.wait(300) == 0
    assert server.lines()[-1]["message"] == "stopped"


def test_health_route_may_be_that_of_the_status():
    """As deployments beside TensorFlow Serving have it: not ready is 503 there, too."""
    config = ServerConfig(model="m", health_route="/v1/models/model")
    app = create_app(config, Service(config, on_failure=print))

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.get("/v1/models/model")

    assert asyncio.run(ask()).status_code == 503


def test_read_config_prefers_flags_to_the_environment():
    environment = {
        "AIP_STORAGE_URI": "gs://bucket/model",
        "AIP_HTTP_PORT": "8080",
        "AIP_HEALTH_ROUTE": "/h",
        "AIP_PREDICT_ROUTE": "/p",
    }

    config = read_config({"port": "9000"}, environment)

    assert config == ServerConfig(model="gs://bucket/model", host="0.0.0.0", port=9000, health_route="/h", predict_route="/p")
    assert read_config({"model": "m"}, {}).host == "127.0.0.1"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "Expected --model DIR. Received: none"),
        ({"model": "m", "port": "x"}, "Expected `port` to be valid. Received: port='x'"),
        ({"model": "m", "max_batch_size": "0"}, "Expected `max_batch_size`"),
        ({"model": "m", "name": "a/b"}, "Expected `name`"),
        ({"model": "m", "max_queue": "3"}, "Expected `max_queue` of `max_instances` (64) or more"),
        ({"model": "m", "health_route": "/predict"}, "Expected two routes. Received: /predict"),
    ],
)
def test_read_config_names_what_is_wrong(flags, message):
    with pytest.raises(InputError) as caught:
        read_config(flags, {})

    assert message in str(caught.value)


def test_command_ends_with_2_where_there_is_no_model(tmp_path):
    command = [sys.executable, "-m", "models.server", "--port=0", f"--model={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)

    assert done.returncode == EXIT_WRONG_INPUT
    assert done.stderr.splitlines()[-1].startswith("error: Expected a SavedModel, or numbered folders with one each")


def test_command_ends_with_2_where_the_port_is_taken(server):
    command = [sys.executable, "-m", "models.server", f"--port={server.port}", "--model=x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)

    assert done.returncode == EXIT_WRONG_INPUT
    assert "Expected --host and --port that are free" in done.stderr
    assert "Traceback" not in done.stderr
