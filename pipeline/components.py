"""Our own TFX components and resolvers, only where TFX has none.

Called by `pipeline.pipeline`.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Literal, TypedDict

import ml_metadata as mlmd
import pydantic
import tensorflow_data_validation as tfdv
from ml_metadata.proto import metadata_store_pb2
from tensorflow_metadata.proto.v0 import anomalies_pb2, statistics_pb2
from tfx import types
from tfx.components.evaluator import constants
from tfx.components.statistics_gen import stats_artifact_utils
from tfx.dsl.component.experimental.annotations import InputArtifact, OutputArtifact, Parameter
from tfx.dsl.component.experimental.decorators import component
from tfx.dsl.components.common.resolver import ResolverStrategy
from tfx.dsl.io import fileio
from tfx.types import artifact_utils, standard_artifacts
from tfx.types.standard_component_specs import EXAMPLES_KEY
from tfx.utils import io_utils, path_utils

from data.errors import DataAnomalyError
from data.features import LABELS_FILE, TRAIN_SPLIT
from data.sources import read_lines
from models.reference import REFERENCE_FILE
from models.trained import EXTRA_FOLDER
from pipeline import drift
from pipeline.model_digest import model_digest
from pipeline.serving_check import (
    INFRA_BLESSED_FILE,
    INFRA_NOT_BLESSED_FILE,
    ServingCheckConfig,
    check_serving,
    write_serving_check,
)
from pipeline.vertex import VertexConfig

logger = logging.getLogger("tfx_vision")

MODEL_DIGEST_KEY = "model_digest"  # custom properties of an InfraBlessing
_ANOMALIES_FILE = "SchemaDiff.pb"  # as ExampleValidator names it


class DataFindings(TypedDict):
    """What the data gate puts out.

    Attributes:
      findings: sentences, in an artifact of the type JsonValue; on Vertex, types of our own could not be loaded in a step, as
        their names have to be `module.Class`.
    """

    findings: list[str]


class DataGateConfig(pydantic.BaseModel):
    """What the data gate does with what it finds; the limits themselves are in the schema.

    Attributes:
      action: `stop` ends the run with exit code 4 where anything was found; `warn` goes on and lists it.
      min_examples: that both sides of a comparison need, at least 1; small splits differ by chance.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    action: Literal["stop", "warn"] = "stop"
    min_examples: int = pydantic.Field(100, ge=1)


@component
def DataGate(  # noqa: N802 (a component's name is a class name to its users)
    anomalies: InputArtifact[standard_artifacts.ExampleAnomalies],
    statistics: InputArtifact[standard_artifacts.ExampleStatistics],
    schema: InputArtifact[standard_artifacts.Schema],
    action: Parameter[str],
    min_examples: Parameter[int],
    code: Parameter[str],
    baseline_statistics: InputArtifact[standard_artifacts.ExampleStatistics] = None,
) -> DataFindings:
    """Stops the run where the data has anomalies, skew between its splits or drift; TFX itself would go on.

    Args:
      anomalies: what ExampleValidator wrote, a file for each split.
      statistics: of this run's data.
      schema: with the comparators that limit skew and drift.
      action: as in `DataGateConfig`.
      min_examples: as in `DataGateConfig`.
      code: fingerprint of this code, for the cache.
      baseline_statistics: of the data that the latest blessed model was trained on, if there is any other than this.

    Returns:
      What does not stop the run: findings that are only to warn, and what was not compared.

    Raises:
      DataAnomalyError: with a sentence for each finding.
    """
    limits = tfdv.load_schema_text(io_utils.get_only_uri_in_dir(schema.uri))
    splits = _load_statistics(statistics)
    found = _find_anomalies(anomalies)
    not_compared = []
    comparisons = [(drift.SKEW, name, splits[name]) for name in splits if name != TRAIN_SPLIT]
    if baseline_statistics is not None:
        earlier = _load_statistics(baseline_statistics)[TRAIN_SPLIT]
        comparisons.append((drift.DRIFT, "the train split of the latest blessed model", earlier))
    for kind, name, other in comparisons:
        if not drift.has_comparators(limits, kind):
            continue
        counts = drift.num_examples(splits[TRAIN_SPLIT]), drift.num_examples(other)
        if min(counts) < min_examples:
            not_compared.append(
                f"{kind}: train ({counts[0]} examples) was not compared with {name} ({counts[1]}): "
                f"both need {min_examples} (data_gate.min_examples), as few examples differ by chance"
            )
        else:
            found += drift.find_differences(splits[TRAIN_SPLIT], other, schema=limits, kind=kind, names=("train", name))
    if found and action == "stop":
        error = DataAnomalyError(*found)
        error.add_note(
            "Mend the data; or, where the data is right, edit its schema (domains, ranges, comparators); "
            'or set data_gate.action to "warn" to go on.'
        )
        raise error
    return {"findings": [*found, *not_compared]}


def _load_statistics(artifact: types.Artifact) -> dict[str, statistics_pb2.DatasetFeatureStatisticsList]:
    """Reads StatisticsGen's output: split -> statistics."""
    names = artifact_utils.decode_split_names(artifact.split_names)
    return {name: stats_artifact_utils.load_statistics(artifact, name).proto() for name in names}


def _find_anomalies(artifact: types.Artifact) -> list[str]:
    """Returns a sentence for each anomaly that ExampleValidator found."""
    found = []
    for split in artifact_utils.decode_split_names(artifact.split_names):
        path = os.path.join(artifact_utils.get_split_uri([artifact], split), _ANOMALIES_FILE)
        with fileio.open(path, "rb") as file:
            anomalies = anomalies_pb2.Anomalies.FromString(file.read())
        if anomalies.data_missing:
            found.append(f"anomaly in {split}: there is no data")
        if anomalies.HasField("dataset_anomaly_info"):
            found.append(f"anomaly in {split}: {anomalies.dataset_anomaly_info.description.strip()}")
        for feature, anomaly in sorted(anomalies.anomaly_info.items()):
            found.append(f"anomaly in `{feature}` of {split}: {anomaly.description.strip()}")
    return found


@component
def ServingCheck(  # noqa: N802 (a component's name is a class name to its users)
    model: InputArtifact[standard_artifacts.Model],
    model_run: InputArtifact[standard_artifacts.ModelRun],
    model_blessing: InputArtifact[standard_artifacts.ModelBlessing],
    config: Parameter[str],
    code: Parameter[str],
    infra_blessing: OutputArtifact[standard_artifacts.InfraBlessing],
) -> None:
    """Tries the exported model in a process of its own, in the place of TFX's InfraValidator, and never raises for its fault.

    Args:
      model: what the Trainer exported.
      model_run: where the Trainer left its own answers to compare with.
      model_blessing: of the Evaluator, whose verdict is put on record; a model that it refused is tried all the same.
      config: a `ServingCheckConfig` as JSON.
      code: fingerprint of `pipeline.serving_check`, for the cache.
      infra_blessing: for Pusher: `INFRA_BLESSED` or `INFRA_NOT_BLESSED` and the property `blessed`, as InfraValidator leaves
        them; of which model; and the verdict in full, see `pipeline.serving_check`.
    """
    limits = ServingCheckConfig.model_validate_json(config)
    verdict = check_serving(path_utils.serving_model_path(model.uri), model_run.uri, limits)
    verdict["model"] = model.uri
    verdict["evaluator_blessed"] = _is_blessing(model_blessing)
    write_serving_check(infra_blessing.uri, verdict)
    is_blessed = verdict["blessed"]
    infra_blessing.set_int_custom_property(constants.ARTIFACT_PROPERTY_BLESSED_KEY, int(is_blessed))
    infra_blessing.set_int_custom_property(constants.ARTIFACT_PROPERTY_CURRENT_MODEL_ID_KEY, model.id)
    infra_blessing.set_string_custom_property(constants.ARTIFACT_PROPERTY_CURRENT_MODEL_URI_KEY, model.uri)
    infra_blessing.set_string_custom_property(MODEL_DIGEST_KEY, verdict["model_digest"] or "")
    # Last, and only one of them: what was cut off before it has blessed nothing.
    name = INFRA_BLESSED_FILE if is_blessed else INFRA_NOT_BLESSED_FILE
    io_utils.write_string_file(os.path.join(infra_blessing.uri, name), "")


@component
def VertexDeployer(  # noqa: N802 (a component's name is a class name to its users)
    model: InputArtifact[standard_artifacts.Model],
    model_run: InputArtifact[standard_artifacts.ModelRun],
    model_blessing: InputArtifact[standard_artifacts.ModelBlessing],
    infra_blessing: InputArtifact[standard_artifacts.InfraBlessing],
    config: Parameter[str],
    pipeline_name: Parameter[str],
    code: Parameter[str],
    pushed_model: OutputArtifact[standard_artifacts.PushedModel],
) -> None:
    """Deploys a model with both blessings to a Vertex AI endpoint, step by step, in the place of TFX's Pusher.

    Args:
      model: what the Trainer exported.
      model_run: where the Trainer left its own answers, which the endpoint's are compared with.
      model_blessing: of the Evaluator; without it nothing is deployed.
      infra_blessing: of the serving check, likewise.
      config: a `VertexConfig` as JSON.
      pipeline_name: of which the model is a version.
      code: fingerprint of this code, for the cache and as a label of the version.
      pushed_model: `pushed`, `pushed_destination` and `pushed_version`, as Pusher has them; the endpoint and its traffic.

    Raises:
      InputError: if Vertex AI refuses what it is asked; the earlier model serves on.
      RuntimeError: if the model answers otherwise on the endpoint than in training; it has been taken back then.
    """
    from pipeline.endpoints import deploy_model  # brings Vertex AI's client, which no other component has a use for

    pushed_model.set_int_custom_property("pushed", 0)
    if not (_is_blessing(model_blessing) and _is_blessing(infra_blessing)):
        logger.info("not blessed, so nothing is deployed")
        return
    folder = path_utils.serving_model_path(model.uri)
    digest = model_digest(folder)
    checked = infra_blessing.get_string_custom_property(MODEL_DIGEST_KEY)
    if digest != checked:
        raise RuntimeError(
            f"Expected {folder} to be as the serving check blessed it, SHA-256 {checked[:16]}. Received: {digest[:16]}. "
            "Something changed it since; run the pipeline again."
        )
    deployment = deploy_model(
        VertexConfig.model_validate_json(config),
        pipeline_name=pipeline_name,
        run_name=pushed_model.uri.rstrip("/").split("/")[-3],  # <root>/<project>/<run>/<task>/pushed_model
        code=code,
        model=folder,
        references=os.path.join(model_run.uri, REFERENCE_FILE),
        digest=digest,
        report=logger.info,
    )
    pushed_model.set_int_custom_property("pushed", 1)
    pushed_model.set_string_custom_property("pushed_destination", deployment.model_version)
    pushed_model.set_string_custom_property("pushed_version", deployment.model_version.rpartition("@")[2])
    pushed_model.set_string_custom_property("endpoint", deployment.endpoint)
    pushed_model.set_int_custom_property("traffic_percent", deployment.traffic_percent)


def _blessed(
    store: mlmd.MetadataStore, blessings: Sequence[types.Artifact], infra_blessings: Sequence[types.Artifact]
) -> Iterator[tuple[types.Artifact, int]]:
    """Yields the Evaluator's blessing of each model that the serving check has not refused, latest first, with the model's id.

    Of several verdicts on a model the latest counts, and one that a later run reused is as late as that run. A model without a
    serving check, of a run that was killed before it or of an earlier version, counts as one to compare with.
    """
    evaluations, checks = (_latest_verdicts(store, artifacts) for artifacts in (blessings, infra_blessings))
    for model_id, blessing in evaluations.items():
        if _is_blessing(blessing) and (model_id not in checks or _is_blessing(checks[model_id])):
            yield blessing, model_id


def _latest_verdicts(store: mlmd.MetadataStore, artifacts: Sequence[types.Artifact]) -> dict[int, types.Artifact]:
    """Returns the latest verdict on each model, by the model's id, latest first."""
    put_out: dict[int, int] = {}
    for event in store.get_events_by_artifact_ids([artifact.id for artifact in artifacts]):
        if event.type == metadata_store_pb2.Event.OUTPUT:
            put_out[event.artifact_id] = max(event.execution_id, put_out.get(event.artifact_id, 0))
    verdicts: dict[int, types.Artifact] = {}
    for artifact in sorted(artifacts, key=lambda artifact: put_out.get(artifact.id, 0), reverse=True):
        verdicts.setdefault(_model_id(artifact), artifact)
    return verdicts


def _is_blessing(artifact: types.Artifact) -> bool:
    return artifact.get_int_custom_property(constants.ARTIFACT_PROPERTY_BLESSED_KEY) == constants.BLESSED_VALUE


def _model_id(blessing: types.Artifact) -> int:
    return blessing.get_int_custom_property(constants.ARTIFACT_PROPERTY_CURRENT_MODEL_ID_KEY)


def _labels_path(model: types.Artifact) -> str:
    """Returns where the trainer left the class list, beside the exported model."""
    return os.path.join(path_utils.serving_model_path(model.uri), EXTRA_FOLDER, LABELS_FILE)


class LatestBlessedStatisticsStrategy(ResolverStrategy):
    """Resolves the statistics of the data that the latest blessed model was trained on, but never those of this run's data.

    Where that model was trained on this run's data there is nothing to compare, as in a pipeline's first run, so that a rerun
    of it is all cache. An older model's data is not taken in its place: this data has been accepted since, with whatever drift.

    Data of another class list is meant to differ; it is passed over. So is a model that is gone, or its statistics.
    """

    def __init__(self, class_names: Sequence[str]):
        self._class_names = tuple(class_names)

    def resolve_artifacts(
        self, store: mlmd.MetadataStore, input_dict: dict[str, list[types.Artifact]]
    ) -> dict[str, list[types.Artifact]]:
        """Resolves `baseline_statistics` among all of the pipeline's, by `model` and both blessings, also all of them.

        `statistics` are those of this run's data.
        """
        (current,) = input_dict["statistics"]
        current_examples = _examples_of(store, current)
        models = {model.id: model for model in input_dict["model"]}
        for _, model_id in _blessed(store, input_dict["model_blessing"], input_dict["infra_blessing"]):
            if model_id not in models or not self._has_class_names(models[model_id]):
                continue
            examples = _examples_of(store, models[model_id])
            if examples == current_examples:
                break
            for statistics in sorted(input_dict["baseline_statistics"], key=lambda artifact: artifact.id, reverse=True):
                if _examples_of(store, statistics) == examples and fileio.exists(statistics.uri):
                    return self._resolved(current, [statistics])
        return self._resolved(current, [])

    def _has_class_names(self, model: types.Artifact) -> bool:
        path = _labels_path(model)
        return fileio.exists(path) and tuple(read_lines(path)) == self._class_names

    @staticmethod
    def _resolved(current: types.Artifact, baseline: list[types.Artifact]) -> dict[str, list[types.Artifact]]:
        unused = {"model": [], "model_blessing": [], "infra_blessing": []}
        return {"statistics": [current], "baseline_statistics": baseline} | unused


def _examples_of(store: mlmd.MetadataStore, artifact: types.Artifact) -> set[int]:
    """Returns the ids of the examples from which a component made an artifact: Trainer a model, StatisticsGen statistics."""
    executions = {
        event.execution_id
        for event in store.get_events_by_artifact_ids([artifact.id])
        if event.type == metadata_store_pb2.Event.OUTPUT
    }
    return {
        event.artifact_id
        for event in store.get_events_by_execution_ids(sorted(executions))
        if event.type == metadata_store_pb2.Event.INPUT and event.path.steps[0].key == EXAMPLES_KEY
    }


class LatestOtherBlessedModelStrategy(ResolverStrategy):
    """Resolves the baseline: the latest model with both blessings, but never the candidate itself.

    In a rerun with nothing changed the latest blessed model is the candidate. TFX's own strategy would then compare the model
    with itself, and as its Evaluator has another input than the first time, evaluate and push it again. Here such a candidate
    gets the baseline back against which it was blessed, so that the rerun is all cache.

    A baseline that cannot be evaluated any more, as its classes are others or its files gone, is resolved all the same: the
    Evaluator then refuses the candidate and says so. To pass it over would be to bless a model that was compared with none.
    """

    def resolve_artifacts(
        self, store: mlmd.MetadataStore, input_dict: dict[str, list[types.Artifact]]
    ) -> dict[str, list[types.Artifact]]:
        """Resolves `model` among all of the pipeline's, by both blessings; `candidate` is this run's model."""
        (candidate,) = input_dict["candidate"]
        models = {model.id: model for model in input_dict["model"]}
        baseline = []
        for blessing, model_id in _blessed(store, input_dict["model_blessing"], input_dict["infra_blessing"]):
            if model_id == candidate.id:
                model_id = blessing.get_int_custom_property(constants.ARTIFACT_PROPERTY_BASELINE_MODEL_ID_KEY)
                baseline = [models[model_id]] if model_id in models else []
                break
            if model_id in models:
                baseline = [models[model_id]]
                break
        return {"model": baseline, "model_blessing": [], "infra_blessing": [], "candidate": [candidate]}
