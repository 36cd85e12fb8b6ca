"""Workspaces that the tests make without a run: a metadata store with the records that TFX writes, and tiny real models."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_metadata as mlmd
import tensorflow as tf
from ml_metadata.proto import metadata_store_pb2 as mlmd_pb2

from pipeline.blessing import METADATA_FILE
from pipeline.model_digest import model_digest

# As TFX names them.
EXECUTION_TYPES = {
    "ImportExampleGen": "tfx.components.example_gen.import_example_gen.component.ImportExampleGen",
    "DataGate": "pipeline.components.DataGate",
    "Transform": "tfx.components.transform.component.Transform",
    "Trainer": "tfx.components.trainer.component.Trainer",
    "LatestBlessedModel": "tfx.dsl.components.common.resolver.Resolver",
    "Evaluator": "tfx.components.evaluator.component.Evaluator",
    "ServingCheck": "pipeline.components.ServingCheck",
    "Pusher": "tfx.components.pusher.component.Pusher",
}
FINGERPRINT = (
    "split:train,num_files:1,total_bytes:{0}\nsplit:valid,num_files:1,total_bytes:10\nsplit:test,num_files:1,total_bytes:10"
)


def save_model(folder: Path, *, weight: float = 1.0) -> Path:
    """Saves a SavedModel that multiplies by a weight; returns its folder."""
    module = tf.Module()
    module.weight = tf.Variable(weight)
    module.multiply = tf.function(lambda x: x * module.weight, input_signature=[tf.TensorSpec([None], tf.float32)])
    tf.saved_model.save(module, str(folder), signatures=module.multiply)
    return folder


class Workspace:
    """A workspace with an empty metadata store, to which runs are added."""

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / METADATA_FILE
        path.parent.mkdir(parents=True)
        config = mlmd_pb2.ConnectionConfig()
        config.sqlite.filename_uri = str(path)
        config.sqlite.connection_mode = mlmd_pb2.SqliteMetadataSourceConfig.READWRITE_OPENCREATE
        self.store = mlmd.MetadataStore(config)

    def begin(self, name: str) -> int:
        """Begins a run; returns the id of its context."""
        return self._context("pipeline_run", name)

    def execute(
        self,
        run: int,
        node: str,
        *,
        properties: Mapping[str, Any] | None = None,
        inputs: Mapping[str, int] | None = None,
        outputs: Mapping[str, int | mlmd_pb2.Artifact] | None = None,
        state: str = "COMPLETE",
    ) -> list[int]:
        """Records one execution of a component; returns the ids of its outputs, in their order.

        Args:
          run: as `begin` returns it.
          node: a key of `EXECUTION_TYPES`.
          properties: its parameters; dictionaries are recorded as JSON, as TFX does.
          inputs: key -> id of an artifact.
          outputs: key -> a new artifact, or the id of one that is reused.
          state: COMPLETE, CACHED, FAILED or RUNNING.
        """
        execution = mlmd_pb2.Execution(
            type_id=self.store.put_execution_type(mlmd_pb2.ExecutionType(name=EXECUTION_TYPES[node])),
            last_known_state=mlmd_pb2.Execution.State.Value(state),
        )
        _set(execution.custom_properties, properties or {})
        event_type = mlmd_pb2.Event.INTERNAL_OUTPUT if "Resolver" in EXECUTION_TYPES[node] else mlmd_pb2.Event.OUTPUT
        pairs = [(self._artifact(id_), _event(mlmd_pb2.Event.INPUT, key)) for key, id_ in (inputs or {}).items()]
        pairs += [(self._artifact(value), _event(event_type, key)) for key, value in (outputs or {}).items()]
        contexts = self.store.get_contexts_by_id([run, self._context("node", f"shapes.{node}")])
        _, ids, _ = self.store.put_execution(execution, pairs, contexts)
        return list(ids)[len(inputs or {}) :]

    def artifact(self, type_name: str, uri: Path | str, **properties: Any) -> mlmd_pb2.Artifact:
        """Makes an artifact, for `execute` to put out."""
        type_ = mlmd_pb2.ArtifactType(name=type_name)
        if type_name == "Examples":
            type_.properties["split_names"] = mlmd_pb2.STRING
        type_id = self.store.put_artifact_type(type_)
        artifact = mlmd_pb2.Artifact(type_id=type_id, uri=str(uri), state=mlmd_pb2.Artifact.LIVE)
        if type_name == "Examples":
            artifact.properties["split_names"].string_value = json.dumps(["train", "valid", "test"])
        _set(artifact.custom_properties, properties)
        return artifact

    def _artifact(self, value: int | mlmd_pb2.Artifact) -> mlmd_pb2.Artifact:
        return value if isinstance(value, mlmd_pb2.Artifact) else self.store.get_artifacts_by_id([value])[0]

    def _context(self, type_name: str, name: str) -> int:
        known = self.store.get_context_by_type_and_name(type_name, name)
        if known:
            return known.id
        type_id = self.store.put_context_type(mlmd_pb2.ContextType(name=type_name))
        return self.store.put_contexts([mlmd_pb2.Context(type_id=type_id, name=name)])[0]

    def train(self, run: int, *, weight: float = 1.0, inputs: Mapping[str, int] | None = None, **settings: Any) -> int:
        """Records a Trainer that exported a real model; returns the id of the Model artifact."""
        number = len(list((self.folder / "pipeline").glob("Trainer/model/*"))) + 1
        folder = self.folder / "pipeline" / "Trainer" / "model" / str(number)
        save_model(folder / "Format-Serving", weight=weight)
        outputs = {"model": self.artifact("Model", folder)}
        (model,) = self.execute(run, "Trainer", properties=trainer_properties(**settings), inputs=inputs, outputs=outputs)
        return model

    def model_folder(self, model: int) -> Path:
        """Returns the SavedModel of a Model artifact."""
        return Path(self._artifact(model).uri, "Format-Serving")

    def evaluate(
        self,
        run: int,
        model: int,
        *,
        blessed: bool,
        baseline: int | None = None,
        evaluation: Path | str | None = None,
        eval_config: Mapping[str, Any] | None = None,
    ) -> int:
        """Records the Evaluator's verdict, with the folder of its evaluation, if any; returns the id of the ModelBlessing."""
        blessing = self.artifact("ModelBlessing", self.folder / "gone", blessed=int(blessed), current_model_id=model)
        outputs = {"blessing": blessing, "evaluation": self.artifact("ModelEvaluation", evaluation or self.folder / "gone")}
        inputs = {"model": model} | ({"baseline_model": baseline} if baseline else {})
        properties = {"eval_config": eval_config or {}}
        return self.execute(run, "Evaluator", properties=properties, inputs=inputs, outputs=outputs)[0]

    def check(self, run: int, model: int, *, blessed: bool, reasons: Sequence[str] = (), max_memory_mb: int = 4096) -> int:
        """Records the serving check's verdict, with its file; returns the id of the InfraBlessing."""
        digest = model_digest(str(self.model_folder(model)))
        folder = self.folder / "pipeline" / "ServingCheck" / str(run)
        folder.mkdir(parents=True)
        verdict = {"blessed": blessed, "reasons": list(reasons), "evaluator_blessed": True, "model_digest": digest}
        (folder / "serving_check.json").write_text(json.dumps(verdict))
        facts = {"blessed": int(blessed), "current_model_id": model, "model_digest": digest}
        outputs = {"infra_blessing": self.artifact("InfraBlessing", folder, **facts)}
        properties = {"config": {"max_memory_mb": max_memory_mb}, "code": "5e41"}
        return self.execute(run, "ServingCheck", properties=properties, inputs={"model": model}, outputs=outputs)[0]

    def push(self, run: int, model: int, version: str | None, *, state: str = "COMPLETE") -> None:
        """Records a Pusher; None for one that pushed nothing."""
        facts = {"pushed": 1, "pushed_version": version} if version else {"pushed": 0}
        outputs = {"pushed_model": self.artifact("PushedModel", self.folder / "gone", **facts)}
        self.execute(run, "Pusher", inputs={"model": model}, outputs=outputs, state=state)


def trainer_properties(**settings: Any) -> dict[str, Any]:
    """Returns the parameters of a Trainer; `settings` go into the section `training`."""
    trainer = {
        "class_names": ["circle", "square"],
        "code": "1e3173b93d5a176f",
        "cache_dir": "cache",
        "training": {"epochs": 40, "seed": 0} | settings,
    }
    return {
        "custom_config": {"trainer": trainer},
        "train_args": {"splits": ["train"]},
        "eval_args": {"splits": ["valid"]},
        "run_fn": "models.trainer.run_fn",
    }


def _set(properties: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, int):
            properties[name].int_value = value
        else:
            properties[name].string_value = value if isinstance(value, str) else json.dumps(value)


def _event(event_type: int, key: str) -> mlmd_pb2.Event:
    event = mlmd_pb2.Event(type=event_type)
    event.path.steps.add().key = key
    event.path.steps.add().index = 0
    return event
