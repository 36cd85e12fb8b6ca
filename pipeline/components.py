"""Our own TFX components and resolver, only where TFX has none.

Called by `pipeline.pipeline`.
"""

import os

import ml_metadata as mlmd
from tensorflow_metadata.proto.v0 import anomalies_pb2
from tfx import types
from tfx.components.evaluator import constants
from tfx.dsl.component.experimental.annotations import InputArtifact, Parameter
from tfx.dsl.component.experimental.decorators import component
from tfx.dsl.components.common.resolver import ResolverStrategy
from tfx.dsl.io import fileio
from tfx.types import artifact_utils, standard_artifacts
from tfx.utils import path_utils

from data.errors import DataAnomalyError
from data.features import LABELS_FILE
from data.sources import read_lines
from models.trainer import EXTRA_FOLDER

_ANOMALIES_FILE = "SchemaDiff.pb"  # as ExampleValidator names it


@component
def DataGate(  # noqa: N802 (a component's name is a class name to its users)
    anomalies: InputArtifact[standard_artifacts.ExampleAnomalies],
    code: Parameter[str],
) -> None:
    """Stops the run where ExampleValidator found anomalies; TFX itself would go on.

    Args:
      anomalies: what ExampleValidator wrote, a file for each split.
      code: fingerprint of this code, for the cache.

    Raises:
      DataAnomalyError: naming every anomaly of every split.
    """
    found = []
    for split in artifact_utils.decode_split_names(anomalies.split_names):
        path = os.path.join(artifact_utils.get_split_uri([anomalies], split), _ANOMALIES_FILE)
        with fileio.open(path, "rb") as file:
            anomalies_of_split = anomalies_pb2.Anomalies.FromString(file.read())
        if anomalies_of_split.data_missing:
            found.append(f"{split}: there is no data")
        if anomalies_of_split.HasField("dataset_anomaly_info"):
            found.append(f"{split}: {anomalies_of_split.dataset_anomaly_info.description}")
        for feature, anomaly in sorted(anomalies_of_split.anomaly_info.items()):
            found.append(f"{split}: {feature}: {anomaly.description}")
    if found:
        raise DataAnomalyError("\n".join(found))


def _class_names(model: types.Artifact) -> tuple[str, ...]:
    """Reads the class list that the trainer left beside the exported model."""
    path = os.path.join(path_utils.serving_model_path(model.uri), EXTRA_FOLDER, LABELS_FILE)
    if not fileio.exists(path):
        raise RuntimeError(
            f"Expected the blessed model {model.uri} to be where it was trained, as new ones are compared with it. "
            "Received: no class list there. Put the workspace back to its place, or start a new one with --workspace."
        )
    return read_lines(path)


class LatestOtherBlessedModelStrategy(ResolverStrategy):
    """Resolves the baseline: the latest blessed model, but never the candidate itself.

    In a rerun with nothing changed the latest blessed model is the candidate. TFX's own strategy would then compare the model
    with itself, and as its Evaluator has another input than the first time, evaluate and push it again. Here such a candidate
    gets the baseline back against which it was blessed, so that the rerun is all cache.

    A blessed model of another class list cannot be compared with; it is passed over.
    """

    def resolve_artifacts(
        self, store: mlmd.MetadataStore, input_dict: dict[str, list[types.Artifact]]
    ) -> dict[str, list[types.Artifact]]:
        """Resolves `model` and `model_blessing` among all of the pipeline's; `candidate` is this run's model."""
        del store  # the artifacts carry all that is needed
        (candidate,) = input_dict["candidate"]
        models = {model.id: model for model in input_dict["model"]}
        blessings = [
            blessing
            for blessing in sorted(input_dict["model_blessing"], key=lambda artifact: artifact.id, reverse=True)
            if blessing.get_int_custom_property(constants.ARTIFACT_PROPERTY_BLESSED_KEY) == constants.BLESSED_VALUE
        ]
        for blessing in blessings:
            model_id = blessing.get_int_custom_property(constants.ARTIFACT_PROPERTY_CURRENT_MODEL_ID_KEY)
            if model_id == candidate.id:
                baseline_id = blessing.get_int_custom_property(constants.ARTIFACT_PROPERTY_BASELINE_MODEL_ID_KEY)
                baseline = [models[baseline_id]] if baseline_id in models else []
                return {"model": baseline, "model_blessing": [], "candidate": [candidate]}
            if model_id in models and _class_names(models[model_id]) == _class_names(candidate):
                return {"model": [models[model_id]], "model_blessing": [blessing], "candidate": [candidate]}
        return {"model": [], "model_blessing": [], "candidate": [candidate]}
