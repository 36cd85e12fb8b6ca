"""Reads what a finished local run left in its metadata store: the evaluation, the blessing, the pushed model.

Called by `local_runner.py` after the last component.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_metadata as mlmd
from ml_metadata.proto import metadata_store_pb2
from tfx.components.evaluator import constants
from tfx.orchestration.metadata import sqlite_metadata_connection_config
from tfx.utils import path_utils

from models.trainer import HISTORY_FILE
from pipeline.evaluation import Evaluation, is_blessed, read_evaluation
from pipeline.model_digest import model_digest
from pipeline.serving_check import read_serving_check
from pipeline.versions import latest_version, push_model


@dataclasses.dataclass(frozen=True)
class Results:
    """What a run ended with.

    Attributes:
      evaluation: metrics and reasons.
      serving_check: what the serving check found.
      blessed: whether both the Evaluator and the serving check blessed the model.
      pushed_model: folder of the pushed SavedModel, or None.
      trained_model: folder of the SavedModel that was judged.
      baseline_model: where the latest blessed model lies, with which it was compared, or None.
      history: what the trainer left in `history.json`.
      data_findings: sentences of the data gate, which did not stop the run.
    """

    evaluation: Evaluation
    serving_check: dict[str, Any]
    blessed: bool
    pushed_model: str | None
    trained_model: str
    baseline_model: str | None
    history: dict[str, list]
    data_findings: list[str]

    def as_run(self) -> dict[str, Any]:
        """Returns this part of `run.json`."""
        metrics = dataclasses.asdict(self.evaluation) | {"has_baseline": self.evaluation.has_baseline}
        reasons = [*metrics.pop("reasons"), *self.serving_check["reasons"]]
        if metrics["baseline"] is not None:
            metrics["baseline"]["model"] = self.baseline_model
        return {
            "metrics": metrics,
            "serving_check": self.serving_check,
            "blessed": self.blessed,
            "reasons": [] if self.blessed else reasons,
            "pushed_model": self.pushed_model,
            "data_findings": self.data_findings,
        }


def read_results(metadata_path: Path, class_names: Sequence[str]) -> Results:
    """Reads the results of the latest run, whether its components ran or were cached.

    Args:
      metadata_path: the sqlite file of the metadata store.
      class_names: the ordered class list.
    """
    artifacts = _latest_run_artifacts(metadata_path)
    blessing, infra_blessing = artifacts["ModelBlessing"], artifacts["InfraBlessing"]
    blessed = is_blessed(blessing.uri) and _has_blessed_property(blessing) and _has_blessed_property(infra_blessing)
    serving_check = read_serving_check(infra_blessing.uri)
    history = json.loads(Path(artifacts["ModelRun"].uri, HISTORY_FILE).read_text())
    return Results(
        evaluation=read_evaluation(artifacts["ModelEvaluation"].uri, class_names),
        serving_check=serving_check,
        blessed=blessed,
        pushed_model=_pushed_model(artifacts.get("PushedModel"), digest=serving_check["model_digest"]) if blessed else None,
        trained_model=path_utils.serving_model_path(artifacts["Model"].uri),
        baseline_model=blessing.custom_properties[constants.ARTIFACT_PROPERTY_BASELINE_MODEL_URI_KEY].string_value or None,
        history=history,
        data_findings=json.loads(Path(artifacts["JsonValue"].uri).read_text(encoding="utf-8")),
    )


def _has_blessed_property(artifact: metadata_store_pb2.Artifact) -> bool:
    """Says what Pusher goes by."""
    return artifact.custom_properties[constants.ARTIFACT_PROPERTY_BLESSED_KEY].int_value == constants.BLESSED_VALUE


def _latest_run_artifacts(metadata_path: Path) -> dict[str, metadata_store_pb2.Artifact]:
    """Returns the latest run's output artifacts by type name; each type has one producer in this pipeline."""
    store = mlmd.MetadataStore(sqlite_metadata_connection_config(str(metadata_path)))
    run = max(store.get_contexts_by_type("pipeline_run"), key=lambda context: context.id)
    executions = store.get_executions_by_context(run.id)
    producers = {execution.id for execution in executions if "Resolver" not in execution.type}
    outputs = {
        event.artifact_id
        for event in store.get_events_by_execution_ids([execution.id for execution in executions])
        if event.type == metadata_store_pb2.Event.OUTPUT and event.execution_id in producers
    }
    return {artifact.type: artifact for artifact in store.get_artifacts_by_id(sorted(outputs))}


def _pushed_model(artifact: metadata_store_pb2.Artifact | None, *, digest: str) -> str | None:
    """Returns where the model was pushed to.

    A Pusher that was cached has pushed nothing in this run. Where its version is gone or changed, or a later one has taken its
    place at the servers, the model that it pushed is put there again, as the latest version.

    Args:
      artifact: of this run's Pusher.
      digest: of the model that this run blessed; no other is put there.
    """
    if artifact is None or artifact.custom_properties["pushed"].int_value != 1:
        return None
    destination = artifact.custom_properties["pushed_destination"].string_value
    folder, version = os.path.split(destination)
    if os.path.exists(destination) and model_digest(destination) != digest:
        shutil.rmtree(destination)  # whatever it is, nobody has blessed it
    if latest_version(folder) == version:
        return destination
    return push_model(artifact.uri, folder, digest=digest)
