"""Models that tests deploy to the stand-in of Vertex AI: real SavedModels, which answer there themselves, and their references.

`Shop` is an endpoint's world in one test: a bucket, models in it as the Trainer leaves them, and what is on Vertex AI now.
`Kill` ends a command anywhere.
"""

import base64
import functools
import io
import json
import shutil
import tempfile
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from google.api_core import exceptions
from google.api_core.gapic_v1.method import _GapicCallable
from google.longrunning import operations_pb2
from PIL import Image
from serving_stand_in import CLASS_NAMES, IMAGE_SIZE, save_classifier
from vertex_stand_in import VertexStandIn

from models.reference import REFERENCE_FILE
from pipeline import canary, cloud_calls
from pipeline.endpoints import Deployment, Rollout, deploy_model
from pipeline.model_digest import model_digest
from pipeline.vertex import VertexConfig

PIPELINE = "flowers"
IMAGE_URI = "us-docker.pkg.dev/project/images/tfx-vision:1"
NUM_IMAGES = 6
_LIST_OPERATIONS = "/google.longrunning.Operations/ListOperations"

Rows = list[dict[str, Any]]
Answer = Callable[[list[Any]], Rows]


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="endpoint-models-")  # as long as the process


@functools.cache
def trained(number: int) -> Path:
    """A run's folder with model/Format-Serving and model_run, made once for each number; other numbers answer otherwise."""
    run = Path(_folder().name, str(number))
    model = save_classifier(run / "model" / "Format-Serving", sharpness=0.02 * number)
    (extra := model / "assets.extra").mkdir()
    (extra / "labels.txt").write_text("".join(f"{name}\n" for name in CLASS_NAMES))
    (extra / "network.json").write_text(json.dumps({"class_names": CLASS_NAMES, "image_size": IMAGE_SIZE}))
    (run / "model_run").mkdir()
    write_references(run / "model_run" / REFERENCE_FILE, images(), _signature(number))
    return run


def images(*, size: int = 24) -> list[bytes]:
    """PNG images of one colour and some noise each."""
    random, encoded = np.random.default_rng(0), []
    for colour in np.linspace(40, 220, NUM_IMAGES):
        pixels = np.clip(random.normal(colour, 20, (size, size, 3)) * [1, 0.9, 1.1], 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
        encoded.append(buffer.getvalue())
    return encoded


def write_references(path: Path, encoded: Sequence[bytes], signature: Callable[..., dict[str, tf.Tensor]]) -> None:
    """Writes what `models.reference` writes; `tests/test_canary.py` compares the two."""
    answers = signature(image_bytes=tf.constant(list(encoded)))["probabilities"].numpy()
    with tf.io.TFRecordWriter(str(path), tf.io.TFRecordOptions(compression_type="GZIP")) as writer:
        for number, (image, probabilities) in enumerate(zip(encoded, answers, strict=True)):
            example = tf.train.Example()
            example.features.feature["image"].bytes_list.value.append(image)
            example.features.feature["filename"].bytes_list.value.append(f"{number}.png".encode())
            example.features.feature["probabilities"].float_list.value.extend(probabilities)
            writer.write(example.SerializeToString())


@functools.cache
def _signature(number: int) -> Callable[..., dict[str, tf.Tensor]]:
    model = tf.saved_model.load(str(Path(_folder().name, str(number), "model", "Format-Serving")))
    signature = model.signatures["serving_default"]
    signature.model = model  # which owns its variables
    return signature


def answer_of(number: int) -> Answer:
    """What a container that serves the model answers: its own `serving_default`."""

    def answer(instances: list[Any]) -> Rows:
        encoded = [base64.b64decode(one["image_bytes"]["b64"]) for one in instances]
        outputs = {name: value.numpy() for name, value in _signature(number)(image_bytes=tf.constant(encoded)).items()}
        return [
            {
                "label": outputs["label"][row].decode(),
                "probability": float(outputs["probability"][row]),
                "labels": [name.decode() for name in outputs["labels"][row]],
                "probabilities": outputs["probabilities"][row].tolist(),
            }
            for row in range(len(encoded))
        ]

    return answer


def refuse(instances: list[Any]) -> Rows:
    """What a container answers that does not run."""
    raise exceptions.FailedPrecondition("the container has crashed")


def changes(cloud: VertexStandIn, since: int = 0) -> list[str]:
    """The names of the requests that change something, in order."""
    reading = ("List", "Get", "Predict")
    return [method for method, _ in cloud.requests[since:] if not method.startswith(reading)]


class Shop:
    """One pipeline's endpoint in one test.

    Attributes:
      cloud: the stand-in.
      config: of the pipeline; steps of 10, 50 and 100 percent.
      reports: what was reported.
      bucket: of its own name, as TensorFlow remembers what it has seen in a bucket.
    """

    def __init__(self, cloud: VertexStandIn):
        self.cloud = cloud
        self.bucket = f"bucket-{uuid.uuid4().hex[:12]}"
        self.config = VertexConfig(project=cloud.project, image=IMAGE_URI, bucket=f"gs://{self.bucket}")
        self.reports: list[str] = []
        cloud.storage.create_bucket(self.bucket)
        # The stand-in's own, where it has one.
        cloud.rpcs.setdefault(_LIST_OPERATIONS, (operations_pb2.ListOperationsRequest, self._list_operations))

    def _list_operations(self, request: operations_pb2.ListOperationsRequest) -> operations_pb2.ListOperationsResponse:
        prefix = f"{self.cloud._world.canonical(request.name)}/operations/"
        operations = list(self.cloud._operations.items())  # another thread adds to them
        found = [one.proto for name, one in operations if name.startswith(prefix)]
        return operations_pb2.ListOperationsResponse(operations=found)

    def model(self, number: int, *, answer: Answer | None = None) -> str:
        """Puts a model into the bucket; returns its gs:// folder. It answers on an endpoint as it does itself, or as told."""
        folder = self.cloud.storage.path(f"gs://{self.bucket}/runs/{number}")
        if not folder.exists():
            shutil.copytree(trained(number), folder)
        uri = f"gs://{self.bucket}/runs/{number}/model/Format-Serving"
        self.cloud.answers[uri] = answer or answer_of(number)
        return uri

    def references(self, number: int) -> str:
        """The path of a model's reference predictions, in the bucket."""
        return f"gs://{self.bucket}/runs/{number}/model_run/{REFERENCE_FILE}"

    def deploy(self, number: int, *, answer: Answer | None = None, **options: Any) -> Deployment:
        """Deploys a model as the pipeline does; options win over what it passes."""
        given = {
            "pipeline_name": PIPELINE,
            "run_name": f"flowers-2025-{number}",
            "code": "1e3173b93d5a176f",
            "model": self.model(number, answer=answer),
            "references": self.references(number),
            "digest": model_digest(str(trained(number) / "model" / "Format-Serving")),
            "report": self.reports.append,
        }
        return deploy_model(options.pop("config", self.config), **given | options)

    def rollout(self) -> Rollout:
        """What the commands work with."""
        return Rollout(self.config, pipeline_name=PIPELINE, report=self.reports.append)

    def configure(self, **settings: Any) -> None:
        """Changes settings."""
        self.config = VertexConfig.model_validate(self.config.model_dump() | settings)

    @property
    def traffic(self) -> dict[str, int]:
        """Version -> share of what is deployed on the only endpoint; nothing without one."""
        endpoints = list(self.cloud.endpoints.values())
        assert len(endpoints) <= 1
        return {
            one.model_version_id: endpoint.traffic_split.get(one.id, 0)
            for endpoint in endpoints
            for one in endpoint.deployed_models
        }

    @property
    def versions(self) -> list[tuple[list[str], str]]:
        """Aliases and verdict of each version of the only model, the first first."""
        assert len(self.cloud.models) <= 1
        return [
            (sorted(version.version_aliases), version.labels.get("tfx-vision-verdict", ""))
            for versions in self.cloud.models.values()
            for _, version in sorted(versions.items(), key=lambda one: int(one[0]))
        ]

    @property
    def deployed_ids(self) -> list[str]:
        """The ids of all deployed models, which tell a deployment from a second one of the same version."""
        return [one.id for endpoint in self.cloud.endpoints.values() for one in endpoint.deployed_models]


@pytest.fixture
def shop(google_cloud, monkeypatch):
    """An endpoint's world in which nobody waits long."""
    monkeypatch.setattr(cloud_calls, "RETRY", cloud_calls.RETRY.with_delay(0.01, 0.02).with_timeout(60.0))
    monkeypatch.setattr(cloud_calls, "POLLING", cloud_calls.POLLING.with_delay(0.02, 0.02).with_timeout(20))
    monkeypatch.setattr(canary, "_PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(canary, "_PAUSE_SECONDS", 0.01)
    return Shop(google_cloud)


class KilledError(BaseException):
    """As by `kill -9`: nothing catches it."""


class Kill:
    """Counts the answers of Google's libraries, and ends the work with one of them.

    Attributes:
      at: the number of the answer to end with; None for none.
      count: answers until now.
    """

    def __init__(self, monkeypatch):
        self.at, self.count, self.on_answer = None, 0, lambda: None
        call = _GapicCallable.__call__

        def counting(callable_, *arguments, **options):
            answer = call(callable_, *arguments, **options)
            self.count += 1
            self.on_answer()
            if self.count == self.at:
                raise KilledError
            return answer

        monkeypatch.setattr(_GapicCallable, "__call__", counting)

    def start(self, at=None):
        self.at, self.count, self.on_answer = at, 0, lambda: None

    def find_changes(self, cloud, command):
        """Runs a command; returns the numbers of the answers after which something was changed, and of the first one."""
        found, known = [1], len(changes(cloud))
        self.start()

        def on_answer():
            nonlocal known
            if (now := len(changes(cloud))) > known:
                found.append(self.count)
                known = now

        self.on_answer = on_answer
        command()
        self.start()
        return found
