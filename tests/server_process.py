"""The real server in a process of its own, for the tests and the benchmark."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from conftest import ROOT

READY_SECONDS = 600


class ServerProcess:
    """`python -m models.server` on a free port; its log, JSON lines, is a file, as a pipe that nobody reads would fill."""

    def __init__(self, log: Path, *flags: str, environment: dict[str, str] | None = None, is_ready: bool = True):
        self.log = log
        command = [sys.executable, "-m", "models.server", "--port", "0", *flags]
        with open(log, "w") as file:
            self.process = subprocess.Popen(command, cwd=ROOT, stderr=file, env=os.environ | (environment or {}))
        listening = self.wait_for_line("listening")
        self.port, self.page = listening["port"], listening["page"]
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=300)
        if is_ready:
            self.wait_until_ready()

    def lines(self) -> list[dict[str, Any]]:
        found = []
        for line in self.log.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:  # half written
                continue
        return found

    def wait_for_line(self, message: str, *, seconds: float = READY_SECONDS) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for line in self.lines():
                if message in line["message"]:
                    return line
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"no line {message!r}; process {self.process.poll()}; log:\n{self.log.read_text()[-3000:]}")

    def wait_until_ready(self) -> None:
        self.wait_for_line("is served")

    def memory_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def post(self, body: Any, *, route: str = "/v1/models/model:predict", **options: Any) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.client.post(route, content=content, **options)

    def stop(self, *, seconds: float = 30) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self.client.close()


def instance(image: bytes) -> dict[str, Any]:
    return {"image_bytes": {"b64": base64.b64encode(image).decode()}}


def instances(*images: bytes, **fields: Any) -> dict[str, Any]:
    return {"instances": [instance(image) for image in images], **fields}


def export_classifier(folder: Path, transform_graph: str, *, seed: int) -> Path:
    """Exports a classifier of random weights, whose answers differ from image to image and from seed to seed."""
    import keras
    import numpy as np
    from conftest import CLASS_NAMES, TRANSFORM_IMAGE_SIZE

    from models.classifier import ModelConfig, build_head, build_statistics, fit_projection, join
    from models.signatures import ImageClassifier, export
    from preprocessing.transform import TransformGraph

    keras.utils.set_random_seed(seed)
    config = ModelConfig(weights="random", num_feature_maps=1, hidden_units=0)
    statistics = build_statistics(config, image_size=TRANSFORM_IMAGE_SIZE)
    noise = np.random.default_rng(0).uniform(0, 255, (8, TRANSFORM_IMAGE_SIZE, TRANSFORM_IMAGE_SIZE, 3))
    projection = fit_projection(np.asarray(statistics([noise.astype(np.float32)], training=False)), num_components=4)
    classifier = join(statistics, projection, build_head(config, num_components=4, num_classes=2))
    export(ImageClassifier(classifier, TransformGraph(transform_graph), CLASS_NAMES), str(folder))
    return folder
