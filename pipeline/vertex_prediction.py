"""Predictions by Vertex AI: the client for an endpoint, and a batch prediction job with a model of the registry.

Both go through the SDK's own service clients. Called by `pipeline.predict`.
"""

import base64
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import google.auth.exceptions
import tensorflow as tf
from google.api_core import exceptions
from google.cloud.aiplatform_v1 import JobServiceClient, PredictionServiceClient, types
from google.protobuf import json_format, struct_pb2

from data.errors import InputError
from data.inspection import ImageLimits, UnusableImageError, inspect_image, read_file
from pipeline.answers import Row, printable, to_json_line
from pipeline.inputs import InputImage
from pipeline.online import BusyError, RefusedImageError, fit_image, list_images, read_prediction

MAX_REQUEST_BYTES = (
    1_500_000  # of a public endpoint, https://cloud.google.com/vertex-ai/docs/predictions/get-online-predictions
)
MAX_IMAGE_BYTES = (MAX_REQUEST_BYTES - 4_096) * 3 // 4  # base64 makes four bytes of three; the rest is around it
KEY_FIELD = "file"
_ENDPOINT = re.compile(r"projects/[^/]+/locations/(?P<region>[^/]+)/endpoints/[^/]+")
_MODEL = re.compile(r"projects/[^/]+/locations/(?P<region>[^/]+)/models/[^/@]+(@[^/@]+)?")
_BUSY = (exceptions.ResourceExhausted, exceptions.ServiceUnavailable, exceptions.GatewayTimeout, exceptions.Aborted)
_WRONG_CONFIGURATION = (exceptions.NotFound, exceptions.Forbidden, exceptions.Unauthorized)
_NO_CREDENTIALS = (
    "Expected application default credentials. Received: none. Run `gcloud auth application-default login`, or set "
    "GOOGLE_APPLICATION_CREDENTIALS to a service account's key file."
)


class EndpointClient:
    """A public endpoint of Vertex AI. It may be called from several threads."""

    max_image_bytes = MAX_IMAGE_BYTES

    def __init__(self, endpoint: str, *, timeout_seconds: float):
        """Finds the credentials; sends nothing yet.

        Args:
          endpoint: projects/P/locations/L/endpoints/ID.
          timeout_seconds: for one request.

        Raises:
          InputError: if the name is none, or there are no credentials.
        """
        match = _ENDPOINT.fullmatch(endpoint)
        if not match:
            raise InputError(
                f"Expected --endpoint to be projects/P/locations/L/endpoints/ID. Received: {endpoint!r}. "
                "`gcloud ai endpoints list` shows the names."
            )
        self._endpoint = endpoint
        self._timeout_seconds = timeout_seconds
        self._service = _client(PredictionServiceClient, match["region"])

    def predict(self, encoded: bytes) -> Row:
        """Asks for one image; see `pipeline.online.Client`."""
        instance = json_format.ParseDict(_instance(encoded), struct_pb2.Value())
        try:
            response = self._service.predict(
                endpoint=self._endpoint, instances=[instance], retry=None, timeout=self._timeout_seconds
            )
        except _BUSY as error:
            raise BusyError(_message(error)) from error
        except exceptions.BadRequest as error:
            raise RefusedImageError(_message(error)) from error
        except _WRONG_CONFIGURATION as error:
            raise InputError(
                f"Expected {self._endpoint} to be an endpoint that may be asked. Received: {_message(error)}"
            ) from error
        except google.auth.exceptions.GoogleAuthError as error:
            raise InputError(f"Expected valid credentials. Received: {error}. Renew them.") from error
        except exceptions.GoogleAPICallError as error:
            raise RuntimeError(f"the endpoint failed: {_message(error)}") from error
        try:
            return read_prediction(json_format.MessageToDict(type(response).pb(response).predictions[0]))
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise RuntimeError(f"the endpoint's answer is no prediction: {str(response)[:100]!r}") from error


def predict_on_vertex(location: str, output: str, *, model: str) -> tuple[str, int]:
    """Writes the images as instances into a bucket and submits a batch prediction job for them.

    Args:
      location: what `pipeline.inputs.list_inputs` takes.
      output: gs:// folder for the instances, the errors of images that cannot be used, and the job's answers.
      model: projects/P/locations/L/models/ID, perhaps with @version.

    Returns:
      The name of the job, and how many images cannot be used.

    Raises:
      InputError: if a name is none, or there are no images or credentials.
    """
    if not output.startswith("gs://"):
        raise InputError(f"Expected --output to be a gs:// folder for a job on Vertex AI. Received: {output!r}. Name one.")
    _region_of_model(model)
    output = output.rstrip("/")
    instances = f"{output}/instances.jsonl"
    num_errors = write_instances(list_images([location]), instances, f"{output}/errors.jsonl")
    job = submit_batch_prediction(model, display_name="tfx-vision", instances=[instances], destination=output)
    return job, num_errors


def write_instances(images: Iterable[InputImage], path: str, errors_path: str, *, limits: ImageLimits | None = None) -> int:
    """Writes the input of a batch prediction job, and rows for the images that cannot be used.

    Args:
      images: to predict.
      path: file of JSON lines, each with `file` and `image_bytes`; local or gs://.
      errors_path: file of JSON lines, each with `file` and `error`.
      limits: of the images.

    Returns:
      How many images cannot be used.
    """
    num_errors = 0
    with tf.io.gfile.GFile(path, "w") as instances, tf.io.gfile.GFile(errors_path, "w") as errors:
        for image in images:
            file = printable(image.file)
            try:
                if image.problem:
                    raise UnusableImageError(image.problem)
                encoded = read_file(image.file) if image.encoded is None else image.encoded
                inspected = inspect_image(encoded, limits or ImageLimits())
                # The job sends each as a request to the model's container, under the same limit as an endpoint's.
                encoded, _ = fit_image(inspected.encoded, MAX_IMAGE_BYTES)
                instances.write(json.dumps({KEY_FIELD: file, **_instance(encoded)}) + "\n")
            except UnusableImageError as error:
                num_errors += 1
                errors.write(to_json_line({"file": file, "error": str(error)}))
    return num_errors


def submit_batch_prediction(
    model: str,
    *,
    display_name: str,
    instances: Sequence[str],
    destination: str,
    machine_type: str = "n1-standard-4",
) -> str:
    """Submits a batch prediction job.

    Args:
      model: projects/P/locations/L/models/ID, perhaps with @version.
      display_name: of the job.
      instances: gs:// files that `write_instances` wrote.
      destination: gs:// folder for the job's answers, or bq://project.dataset.
      machine_type: of the job's machines.

    Returns:
      The name of the job, projects/P/locations/L/batchPredictionJobs/ID.

    Raises:
      InputError: if the names are none, Vertex AI refuses them, or there are no credentials.
    """
    region = _region_of_model(model)
    job = types.BatchPredictionJob(
        display_name=display_name,
        model=model,
        input_config=types.BatchPredictionJob.InputConfig(
            instances_format="jsonl", gcs_source=types.GcsSource(uris=list(instances))
        ),
        # The answers carry the file's name in place of the image, which the model does not get the name of.
        instance_config=types.BatchPredictionJob.InstanceConfig(instance_type="object", key_field=KEY_FIELD),
        output_config=_output_config(destination),
        dedicated_resources=types.BatchDedicatedResources(
            machine_spec=types.MachineSpec(machine_type=machine_type), starting_replica_count=1, max_replica_count=10
        ),
    )
    parent = model.partition("/models/")[0]
    try:
        return _client(JobServiceClient, region).create_batch_prediction_job(parent=parent, batch_prediction_job=job).name
    except (exceptions.BadRequest, *_WRONG_CONFIGURATION) as error:
        raise InputError(f"Expected a job that Vertex AI takes. Received: {_message(error)}") from error
    except google.auth.exceptions.GoogleAuthError as error:
        raise InputError(f"Expected valid credentials. Received: {error}. Renew them.") from error
    except exceptions.GoogleAPICallError as error:
        raise RuntimeError(f"Vertex AI failed: {_message(error)}") from error


def _region_of_model(model: str) -> str:
    match = _MODEL.fullmatch(model)
    if not match:
        raise InputError(
            f"Expected --model to be projects/P/locations/L/models/ID for a job on Vertex AI. Received: {model!r}. "
            "`gcloud ai models list` shows the names."
        )
    return match["region"]


def _output_config(destination: str) -> types.BatchPredictionJob.OutputConfig:
    if destination.startswith("bq://"):
        table = types.BigQueryDestination(output_uri=destination)
        return types.BatchPredictionJob.OutputConfig(predictions_format="bigquery", bigquery_destination=table)
    folder = types.GcsDestination(output_uri_prefix=destination)
    return types.BatchPredictionJob.OutputConfig(predictions_format="jsonl", gcs_destination=folder)


def _instance(encoded: bytes) -> dict[str, Any]:
    return {"image_bytes": {"b64": base64.b64encode(encoded).decode()}}


def _client(service: type, region: str) -> Any:
    try:
        return service(client_options={"api_endpoint": f"{region}-aiplatform.googleapis.com"})
    except google.auth.exceptions.DefaultCredentialsError as error:
        raise InputError(_NO_CREDENTIALS) from error


def _message(error: exceptions.GoogleAPICallError) -> str:
    return " ".join(str(error.message).split())[:300]
