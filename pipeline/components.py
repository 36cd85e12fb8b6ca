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

from data.errors import DataAnomalyError

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
        for feature, anomaly in sorted(anomalies_of_split.anomaly_info.items()):
            found.append(f"{split}: {feature}: {anomaly.description}")
    if found:
        raise DataAnomalyError("\n".join(found))


class LatestOtherBlessedModelStrategy(ResolverStrategy):
    """Resolves the baseline: the latest blessed model, but never the candidate itself.

    In a rerun with nothing changed the latest blessed model is the candidate. TFX's own strategy would then compare the model
    with itself, and as its Evaluator has another input than the first time, evaluate and push it again. Here such a candidate
    gets the baseline back against which it was blessed, so that the rerun is all cache.
    """

    def resolve_artifacts(
        self, store: mlmd.MetadataStore, input_dict: dict[str, list[types.Artifact]]
    ) -> dict[str, list[types.Artifact]]:
        """Resolves `model` and `model_blessing` among all of the pipeline's; `candidate` is this run's model."""
        del store  # the artifacts carry all that is needed
        models = {model.id: model for model in input_dict["model"]}
        blessings = {
            blessing.get_int_custom_property(constants.ARTIFACT_PROPERTY_CURRENT_MODEL_ID_KEY): blessing
            for blessing in sorted(input_dict["model_blessing"], key=lambda artifact: artifact.id)
            if blessing.get_int_custom_property(constants.ARTIFACT_PROPERTY_BLESSED_KEY) == constants.BLESSED_VALUE
        }
        blessings = {model_id: blessing for model_id, blessing in blessings.items() if model_id in models}
        candidates = {artifact.id for artifact in input_dict["candidate"]}
        baseline_id = max(blessings, key=lambda model_id: blessings[model_id].id, default=None)
        if baseline_id in candidates:
            baseline_id = blessings[baseline_id].get_int_custom_property(constants.ARTIFACT_PROPERTY_BASELINE_MODEL_ID_KEY)
        if baseline_id not in blessings:
            return {"model": [], "model_blessing": [], "candidate": input_dict["candidate"]}
        return {
            "model": [models[baseline_id]],
            "model_blessing": [blessings[baseline_id]],
            "candidate": input_dict["candidate"],
        }
