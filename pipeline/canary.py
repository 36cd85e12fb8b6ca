"""Whether a model on trial answers on its endpoint as it did in training: real images, sent until it has answered itself.

Vertex AI divides requests by the traffic split and lets nobody choose a model, but each answer says whose it is. So an image is
sent again until the model on trial was the one to answer; what other models answer is looked at for errors only. With 10 % of
the traffic, 32 images take about 320 requests. Called by `pipeline.endpoints`.
"""

import base64
import concurrent.futures
import dataclasses
import math
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from google.api_core import exceptions
from google.cloud.aiplatform_v1 import PredictionServiceClient, types
from google.protobuf import json_format, struct_pb2

from data.errors import InputError
from data.features import FILENAME_KEY, IMAGE_KEY, LABELS_FILE
from models.reference import REFERENCE_FILE
from models.signatures import IMAGE_BYTES, PROBABILITIES
from models.trained import EXTRA_FOLDER
from pipeline.cloud_calls import explained, explaining, is_transient, is_unreachable, once
from pipeline.online import read_prediction
from pipeline.vertex_prediction import MAX_IMAGE_BYTES
from pipeline.vertex_state import CanaryError

_CONCURRENCY = 8  # requests at once
_TRIES = 20  # times as many as an image takes on average; by chance, one in 500 million takes more
_PATIENCE_SECONDS = 120.0  # in which a change of the traffic comes into effect, at least
_PAUSE_SECONDS = 1.0  # between tries beyond the limit, and after the first error that may pass
_MAX_BUSY = 5  # errors that may pass, for one image; the next request may go to another model, and hide a dead one
_OUR_FAULT = (exceptions.Forbidden, exceptions.Unauthorized, exceptions.NotFound)


@dataclasses.dataclass(frozen=True)
class Reference:
    """One image and what the model answers for it.

    Attributes:
      name: of the image.
      encoded: its bytes.
      probabilities: class -> probability, in [0, 1].
    """

    name: str
    encoded: bytes
    probabilities: dict[str, float]


def find_references(model: str) -> str:
    """Returns the path of the reference predictions beside a SavedModel, as the Trainer leaves the two; empty without any.

    Args:
      model: .../model[/ID][/Format-Serving], local or gs://; the file is in .../model_run[/ID].
    """
    parts = model.rstrip("/").removesuffix("/Format-Serving").split("/")
    for position in (len(parts) - 1, len(parts) - 2):
        if position > 0 and parts[position] == "model":
            path = "/".join([*parts[:position], "model_run", *parts[position + 1 :], REFERENCE_FILE])
            if tf.io.gfile.exists(path):
                return path
    return ""


def read_references(path: str, model: str, *, max_images: int) -> list[Reference]:
    """Reads reference predictions, of images that fit into a request as they are.

    Larger ones would have to be shrunk, which changes the answer.

    Args:
      path: of the file that `models.reference` writes; local or gs://.
      model: folder of the SavedModel, for its class list.
      max_images: at most so many.

    Raises:
      InputError: if there is no file, no class list, or no image that fits.
    """
    labels_path = os.path.join(model, EXTRA_FOLDER, LABELS_FILE)
    for needed in (path, labels_path):
        if not tf.io.gfile.exists(needed):
            raise InputError(
                f"Expected {needed}, to know what the model must answer. Received: no such file. Give a model that this "
                "pipeline trained, and its reference predictions."
            )
    with tf.io.gfile.GFile(labels_path) as file:
        class_names = file.read().splitlines()
    references = []
    try:
        for record in tf.data.TFRecordDataset(path, "GZIP").as_numpy_iterator():
            features = tf.train.Example.FromString(record).features.feature
            (encoded,), probabilities = features[IMAGE_KEY].bytes_list.value, features[PROBABILITIES].float_list.value
            if len(encoded) > MAX_IMAGE_BYTES:
                continue
            names = features[FILENAME_KEY].bytes_list.value or [b"an image"]
            expected = dict(zip(class_names, probabilities, strict=True))
            references.append(Reference(names[0].decode("utf-8", "replace"), encoded, expected))
            if len(references) == max_images:
                break
    except (tf.errors.OpError, ValueError) as error:
        raise InputError(
            f"Expected {path} to be the reference predictions of {model}. Received: {str(error).splitlines()[0]}. Give the "
            "two of one run."
        ) from error
    if not references:
        raise InputError(
            f"Expected {path} to have an image of {MAX_IMAGE_BYTES:,} bytes or less, the most that an endpoint takes. "
            "Received: none. Prepare the data with smaller images."
        )
    return references


class CanaryCheck:
    """Sends images to an endpoint and compares the answers of one deployed model."""

    def __init__(self, references: Sequence[Reference], *, region: str, max_difference: float):
        """Finds the credentials; sends nothing yet.

        Args:
          references: images and expected answers.
          region: of the endpoint.
          max_difference: of a probability, in (0, 1].
        """
        self._references = references
        self._max_difference = max_difference
        self._stopped = threading.Event()
        with explaining("ask an endpoint"):
            self._client = PredictionServiceClient(client_options={"api_endpoint": f"{region}-aiplatform.googleapis.com"})

    def run(self, endpoint: str, deployed_id: str, share: int) -> str:
        """Asks for every image until the deployed model has answered it; a minute at most where it does answer.

        Args:
          endpoint: projects/P/locations/L/endpoints/ID.
          deployed_id: of the model on trial.
          share: percentage of the traffic that it gets.

        Returns:
          What was found, a sentence.

        Raises:
          CanaryError: if one answer is wrong or an error, or the model does not answer.
          InputError: if the endpoint may not be asked.
          RuntimeError: if it cannot be reached from here.
        """
        self._stopped.clear()
        max_tries, patience = math.ceil(_TRIES * 100 / share), time.monotonic() + _PATIENCE_SECONDS
        with concurrent.futures.ThreadPoolExecutor(_CONCURRENCY) as threads:
            try:
                asked = [
                    threads.submit(self._ask, reference, endpoint, deployed_id, max_tries, patience)
                    for reference in self._references
                ]
                results = [future.result() for future in concurrent.futures.as_completed(asked)]
            finally:  # after an error nobody asks on
                self._stopped.set()
                threads.shutdown(cancel_futures=True)
        largest, num_requests = max(difference for difference, _ in results), sum(tries for _, tries in results)
        return (
            f"{len(results)} images are answered as expected: no probability differs by more than {largest:.2g} "
            f"({num_requests} requests)"
        )

    def _ask(self, reference: Reference, endpoint: str, deployed_id: str, max_tries: int, patience: float) -> tuple[float, int]:
        """Returns the largest difference of an answer, and after how many requests it came."""
        instance = {IMAGE_BYTES: {"b64": base64.b64encode(reference.encoded).decode()}}
        request = types.PredictRequest(endpoint=endpoint)
        types.PredictRequest.pb(request).instances.append(json_format.ParseDict(instance, struct_pb2.Value()))
        tries = num_busy = 0
        while not self._stopped.is_set():
            tries += 1
            try:
                response = self._client.predict(request, **once())
            except _OUR_FAULT as error:
                raise explained(error, "ask the endpoint") from error
            except exceptions.GoogleAPICallError as error:
                # Vertex AI does not say which model failed; an endpoint that fails is none to go on with.
                num_busy += 1
                if not is_transient(error) or num_busy > _MAX_BUSY:
                    if is_unreachable(error):  # which is not the model's fault
                        raise explained(error, "ask the endpoint") from error
                    message = " ".join(str(error.message).split())[:300].rstrip(".")
                    raise CanaryError(f"{reference.name} was answered with an error: {message}") from error
                self._stopped.wait(_PAUSE_SECONDS * 2 ** (num_busy - 1))
                continue
            if response.deployed_model_id == deployed_id:
                return self._compare(reference, response), tries
            if tries >= max_tries:
                if time.monotonic() > patience:
                    raise CanaryError(f"other models answered all of {tries} requests for {reference.name}")
                self._stopped.wait(_PAUSE_SECONDS)
        return 0.0, tries

    def _compare(self, reference: Reference, response: Any) -> float:
        """Returns the largest difference of a probability from the expected one."""
        try:
            answer = read_prediction(json_format.MessageToDict(type(response).pb(response).predictions[0]))
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise CanaryError(f"the answer for {reference.name} is no prediction: {str(response)[:100]!r}") from error
        found, expected = answer["probabilities"], reference.probabilities
        if set(found) != set(expected):
            raise CanaryError(
                f"the answer for {reference.name} has the classes {', '.join(found)}; expected were {', '.join(expected)}"
            )
        worst = max(expected, key=lambda name: _difference(found[name], expected[name]))
        difference = _difference(found[worst], expected[worst])
        if difference > self._max_difference:
            raise CanaryError(
                f"for {reference.name} it answers {worst} with {found[worst]:.6f}; expected was {expected[worst]:.6f}, and the "
                f"limit of a difference is {self._max_difference:g} (vertex.max_canary_difference)"
            )
        if found.get(answer["label"]) != max(found.values()):
            raise CanaryError(f"for {reference.name} its label is {answer['label']}, which is not the most probable class")
        return difference


def _difference(found: float, expected: float) -> float:
    """Returns how far two probabilities are apart; what is no number is as far as can be."""
    difference = abs(found - expected)
    return math.inf if math.isnan(difference) else difference
