"""A tiny real SavedModel with our `serving_default`, and a real HTTP server of TensorFlow Serving's protocol that runs it."""

import base64
import binascii
import collections
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import tensorflow as tf

from preprocessing.images import decode_images

CLASS_NAMES = ("dark", "green", "bright")
IMAGE_SIZE = 32  # pixels
OUTPUTS = ("label", "probability", "labels", "probabilities")


def save_classifier(folder: Path, *, sharpness: float = 0.05) -> Path:
    """Saves a model that tells images by their mean colour; returns its folder."""
    module = tf.Module()
    module.weights = tf.Variable([[-1.0, -0.5, 1.0], [-1.0, 1.5, 1.0], [-1.0, -0.5, 1.0]])
    class_names = tf.constant(CLASS_NAMES)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="image_bytes")])
    def serving_default(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        images = decode_images(image_bytes, image_size=IMAGE_SIZE)
        probabilities = tf.nn.softmax(sharpness * (tf.reduce_mean(images, (1, 2)) - 128) @ module.weights)
        best = tf.argmax(probabilities, axis=-1)
        return {
            "label": tf.gather(class_names, best),
            "probability": tf.reduce_max(probabilities, axis=-1),
            "labels": tf.tile(class_names[tf.newaxis], [tf.shape(probabilities)[0], 1]),
            "probabilities": probabilities,
        }

    tf.saved_model.save(module, str(folder), signatures={"serving_default": serving_default})
    return folder


class StandIn(ThreadingHTTPServer):
    """The server. `faults` are played first, one for a request: a status, (status, headers), or `reset`."""

    daemon_threads = True
    request_queue_size = 64  # with five, a busy machine drops the connections of the sixteen that `predict online` opens

    def __init__(self, model: Path, name: str = "model"):
        super().__init__(("localhost", 0), _Handler)
        self.signature = tf.saved_model.load(str(model)).signatures["serving_default"]
        self.path = f"/v1/models/{name}"
        self.url = f"http://localhost:{self.server_address[1]}"
        self.faults: collections.deque = collections.deque()
        self.num_requests = self.num_at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    def __enter__(self) -> "StandIn":
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *unused: Any) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *unused: Any) -> None:
        """Says nothing of a client that has gone."""

    def predict(self, body: bytes) -> tuple[int, dict[str, Any]]:
        try:
            images = [base64.b64decode(one["image_bytes"]["b64"], validate=True) for one in json.loads(body)["instances"]]
        except (ValueError, KeyError, TypeError, binascii.Error) as error:
            return 400, {"error": f"bad request: {error}"}
        try:
            outputs = {name: value.numpy() for name, value in self.signature(image_bytes=tf.constant(images)).items()}
        except tf.errors.InvalidArgumentError:
            return 400, {"error": "an image cannot be decoded"}
        rows = range(len(images))
        names = [[name.decode() for name in outputs["labels"][i]] for i in rows]
        return 200, {
            "predictions": [
                {
                    "label": outputs["label"][i].decode(),
                    "probability": float(outputs["probability"][i]),
                    "labels": names[i],
                    "probabilities": outputs["probabilities"][i].tolist(),
                }
                for i in rows
            ]
        }


class _Handler(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == self.server.path:
            self._answer(200, {"model_version_status": [{"version": "1", "state": "AVAILABLE"}]})
        else:
            self._answer(404, {"error": "no such model"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.num_requests += 1
            self.server.num_at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.num_at_once)
            fault = self.server.faults.popleft() if self.server.faults else None
        try:
            if fault == "reset":
                self.connection.shutdown(2)
                self.close_connection = True
            elif fault:
                status, headers = fault if isinstance(fault, tuple) else (fault, {})
                self._answer(status, {"error": "as the test says"}, headers)
            elif self.path != f"{self.server.path}:predict":
                self._answer(404, {"error": "no such model"})
            else:
                self._answer(*self.server.predict(body))
        finally:
            with self.server.lock:
                self.server.num_at_once -= 1

    def _answer(self, status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        encoded = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(encoded)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, *unused: Any) -> None:
        """Says nothing."""


def lines_of_ours(text: str) -> list[str]:
    """Returns what a command wrote itself; newer TensorFlow writes to standard error whatever its log level."""
    of_tensorflow = re.compile(
        r"WARNING: All log messages before absl|[IWEF]\d{4} \d\d:\d\d|To enable the following instructions"
    )
    return [line for line in text.splitlines() if not of_tensorflow.match(line)]
