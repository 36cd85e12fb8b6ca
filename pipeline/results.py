"""Reads what a finished local run left in its metadata store: the evaluation, the blessing, the pushed model.

Called by `local_runner.py` after the last component.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_metadata as mlmd
from ml_metadata.proto import metadata_store_pb2
from tfx.orchestration.metadata import sqlite_metadata_connection_config

from models.trainer import HISTORY_FILE
from pipeline.evaluation import Evaluation, is_blessed, read_evaluation


@dataclasses.dataclass(frozen=True)
class Results:
    """What a run ended with.

    Attributes:
      evaluation: metrics and reasons.
      blessed: whether the Evaluator blessed the model.
      pushed_model: folder of the pushed SavedModel, or None.
      history: what the trainer left in `history.json`.
      data_findings: sentences of the data gate, which did not stop the run.
    """

    evaluation: Evaluation
    blessed: bool
    pushed_model: str | None
    history: dict[str, list]
    data_findings: list[str]

    def as_run(self) -> dict[str, Any]:
        """Returns this part of `run.json`."""
        evaluation = dataclasses.asdict(self.evaluation)
        reasons = evaluation.pop("reasons")
        return {
            "metrics": evaluation,
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
    history = json.loads(Path(artifacts["ModelRun"].uri, HISTORY_FILE).read_text())
    return Results(
        evaluation=read_evaluation(artifacts["ModelEvaluation"].uri, class_names),
        blessed=is_blessed(artifacts["ModelBlessing"].uri),
        pushed_model=_pushed_model(artifacts.get("PushedModel")),
        history=history,
        data_findings=json.loads(Path(artifacts["JsonValue"].uri).read_text(encoding="utf-8")),
    )


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


def _pushed_model(artifact: metadata_store_pb2.Artifact | None) -> str | None:
    """Returns where the model was pushed to.

    A Pusher that was cached has pushed nothing in this run. Where its version is gone, or a later one has taken its place at
    the servers, the model that it pushed is put there again, as the latest version.
    """
    if artifact is None or artifact.custom_properties["pushed"].int_value != 1:
        return None
    destination = Path(artifact.custom_properties["pushed_destination"].string_value)
    versions = [int(path.name) for path in destination.parent.glob("*") if path.name.isdigit()]
    if destination.exists() and max(versions) == int(destination.name):
        return str(destination)
    destination = destination.with_name(str(max(int(time.time()), *(version + 1 for version in versions), 0)))
    temporary = destination.with_suffix(".tmp")  # no version number, so a server does not look at it
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(artifact.uri, temporary)
    temporary.replace(destination)
    return str(destination)
