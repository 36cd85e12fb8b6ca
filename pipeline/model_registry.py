"""The model of one pipeline in Vertex AI's registry, and its versions: each deployed SavedModel is one.

The model's id is made of the pipeline's name, so that two requests cannot make two models. A version is found again by two
labels, the digest of its SavedModel and of what serves it: the same in both is never uploaded twice. Called by
`pipeline.endpoints`.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

from google.api_core import exceptions
from google.cloud.aiplatform_v1 import ModelServiceClient, types

from data.errors import InputError
from pipeline.cloud_calls import explaining, finish, once, repeated, until_made, wait_for_operations
from pipeline.vertex import SERVER_COMMAND, VertexConfig, serving_image
from pipeline.vertex_state import (
    CANARY_ALIAS,
    CODE_LABEL,
    CONTAINER_LABEL,
    DIGEST_LABEL,
    PIPELINE_LABEL,
    RUN_LABEL,
    VERDICT_LABEL,
    label_value,
    last_part,
    resource_id,
)

_DIGEST_DIGITS, _CONTAINER_DIGITS = 32, 16
_SERVER_PORT, _PREDICT_ROUTE, _HEALTH_ROUTE = 8080, "/predict", "/healthz"
_MAX_DESCRIPTION = 500  # characters


class ModelRegistry:
    """The versions of the model of one pipeline; `model_name` is its name, projects/P/locations/L/models/ID."""

    def __init__(self, config: VertexConfig, *, pipeline_name: str, report: Callable[[str], None]):
        """Finds the credentials; asks for nothing yet.

        Args:
          config: where, and what serves.
          pipeline_name: of the pipeline.
          report: takes a sentence on what is being done.

        Raises:
          InputError: without credentials.
        """
        self._config = config
        self._pipeline_name = pipeline_name
        self._report = report
        self._parent = f"projects/{config.project}/locations/{config.region}"
        self.model_name = f"{self._parent}/models/{resource_id(pipeline_name)}"
        with explaining("speak with Vertex AI"):
            self._client = ModelServiceClient(client_options={"api_endpoint": f"{config.region}-aiplatform.googleapis.com"})

    def versions(self) -> dict[str, types.Model]:
        """Asks for the versions by their number, the oldest first; none where there is no model.

        Raises:
          InputError: if the model is another pipeline's.
        """
        with explaining("list the versions of the model"):
            try:
                versions = list(self._client.list_model_versions(name=self.model_name, **repeated()))
            except exceptions.NotFound:
                return {}
        label = label_value(self._pipeline_name)
        if any(version.labels.get(PIPELINE_LABEL) != label for version in versions):
            raise InputError(
                f"Expected {self.model_name} to be the model of the pipeline {self._pipeline_name}. Received: a version of it "
                f"without the label {PIPELINE_LABEL}={label}. Label that one, or delete it."
            )
        return {version.version_id: version for version in sorted(versions, key=lambda one: int(one.version_id))}

    def ensure_version(
        self, model: str, *, digest: str, run_name: str, code: str, explanation: types.ExplanationSpec | None
    ) -> types.Model:
        """Finds the version of a SavedModel, or uploads it.

        Args:
          model: gs:// folder of the SavedModel.
          digest: as `pipeline.model_digest` gives it.
          run_name: of the pipeline's run, as a label of a new version.
          code: fingerprint of the code, likewise.
          explanation: how Vertex AI's own container explains it; None for no explanations.

        Returns:
          The version. A new one has the alias `canary`, and no other unless it is the first, which Vertex AI makes `default`.
        """
        container = self._container()
        fingerprint = hashlib.sha256(types.ModelContainerSpec.to_json(container, sort_keys=True).encode())
        if explanation is not None:
            fingerprint.update(types.ExplanationSpec.to_json(explanation, sort_keys=True).encode())
        identity = {
            DIGEST_LABEL: digest[:_DIGEST_DIGITS],
            CONTAINER_LABEL: fingerprint.hexdigest()[:_CONTAINER_DIGITS],
        }
        labels = {RUN_LABEL: run_name, CODE_LABEL: code, PIPELINE_LABEL: self._pipeline_name}
        content = types.Model(
            display_name=self._pipeline_name,
            artifact_uri=model,
            container_spec=container,
            explanation_spec=explanation,
            version_aliases=[CANARY_ALIAS],
            labels={**self._config.labels, **{key: label_value(value) for key, value in labels.items()}, **identity},
        )
        with explaining(f"upload {model}"):
            return until_made(lambda: self._find(identity) or self._upload(content))

    def _find(self, labels: Mapping[str, str]) -> types.Model | None:
        """Returns the latest version with labels, once nothing is being uploaded."""
        wait_for_operations(self._client, self.model_name, self._report)
        for version in reversed(self.versions().values()):
            if all(version.labels.get(key) == value for key, value in labels.items()):
                self._report(f"Version {version.version_id} of {self._pipeline_name} is this model")
                return version
        return None

    def _upload(self, content: types.Model) -> types.Model:
        self._report(f"Uploading {content.artifact_uri}")
        request = types.UploadModelRequest(parent=self._parent, model=content)
        if self.versions():
            request.parent_model = self.model_name
        else:
            request.model_id = last_part(self.model_name)
        uploaded = finish(self._client.upload_model(request, **once()), f"upload {content.artifact_uri}")
        return self._client.get_model(name=f"{self.model_name}@{uploaded.model_version_id}", **repeated())

    def _container(self) -> types.ModelContainerSpec:
        """Returns what serves: our server, with its routes, or an image of Vertex AI's, which knows its own."""
        container = types.ModelContainerSpec(image_uri=serving_image(self._config))
        if self._config.serving_container == "server":
            container.command = list(SERVER_COMMAND)
            container.ports = [types.Port(container_port=_SERVER_PORT)]
            container.predict_route, container.health_route = _PREDICT_ROUTE, _HEALTH_ROUTE
        return container

    def merge_aliases(self, version: str, *aliases: str) -> None:
        """Gives aliases to a version, which leave the version that had them; one with a `-` before it is taken from it."""
        with explaining(f"give version {version} the alias {', '.join(aliases)}"):
            self._client.merge_version_aliases(name=f"{self.model_name}@{version}", version_aliases=aliases, **repeated())

    def set_verdict(self, version: types.Model, verdict: str, description: str = "") -> None:
        """Writes a verdict on a version into its labels, and the reason into its description; empty takes both away."""
        kept: dict[str, Any] = {key: value for key, value in version.labels.items() if key != VERDICT_LABEL}
        changed = types.Model(
            name=f"{self.model_name}@{version.version_id}",
            labels=kept | ({VERDICT_LABEL: verdict} if verdict else {}),
            version_description=description[:_MAX_DESCRIPTION],
        )
        request = types.UpdateModelRequest(model=changed, update_mask={"paths": ["labels", "version_description"]})
        with explaining(f"label version {version.version_id}"):
            self._client.update_model(request, **repeated())


def explanation_spec(model: str, method: Literal["integrated_gradients", "xrai"]) -> types.ExplanationSpec:
    """Says how Vertex AI's own container explains a model, by what lies beside the SavedModel.

    Args:
      model: folder of the SavedModel; local or gs://.
      method: of Vertex AI.

    Raises:
      InputError: if the model does not say what its network is.
    """
    import tensorflow as tf  # only here, so that commands without explanations answer sooner

    from models.explanation_spec import explanation_metadata, explanation_parameters
    from models.trained import EXTRA_FOLDER, NETWORK_FILE

    path = os.path.join(model, EXTRA_FOLDER, NETWORK_FILE)
    if not tf.io.gfile.exists(path):
        raise InputError(
            f"Expected {path}, as `vertex.explanations` is set. Received: no such file. Train the model anew, or set "
            '`vertex.explanations = ""`.'
        )
    with tf.io.gfile.GFile(path) as file:
        network = json.load(file)
    return types.ExplanationSpec(
        metadata=types.ExplanationMetadata(explanation_metadata(network["class_names"], method=method, baseline="blurred")),
        parameters=types.ExplanationParameters(
            explanation_parameters(method=method, baseline="blurred", image_size=network["image_size"])
        ),
    )
