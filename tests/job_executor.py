"""Executes a compiled pipeline job as Vertex AI Pipelines does: task by task, each container's own command in a fresh process.

Called by `tests/test_compiled_job.py`. It reads the job that `kubeflow_runner.py` writes by the published protocol buffers of
PipelineSpec, gives every container the ExecutorInput that the service would, reads its ExecutorOutput, and keeps the artifacts
in a store that a second execution is handed. What the service does and this does not: a cache (the caller says what an earlier
execution has done), retries, tasks at the same time, iterators, and pipelines in pipelines. What differs for want of a bucket
and of Dataflow is in `local_job`, of a container in `tests/container_steps.py`.
"""

import dataclasses
import datetime
import graphlib
import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from container_steps import ContainerError, Image, run_container
from google.protobuf import json_format
from google.protobuf.message import Message
from job_expressions import (
    LEGACY_FIELDS,
    Artifact,
    artifact_filter,
    evaluate_condition,
    fill_placeholders,
    plain,
    python_type,
    require,
    typed,
)
from kfp.pipeline_spec import pipeline_spec_pb2 as pb

from local_runner import LOCAL_BEAM_ARGS

SUCCEEDED, FAILED = "SUCCEEDED", "FAILED"
NOT_TRIGGERED = "NOT_TRIGGERED"  # its condition is false, or a task that it depends on has not succeeded
PROJECT_NUMBER = "123456789012"
REGION = "us-central1"
METADATA_STORE = f"projects/{PROJECT_NUMBER}/locations/{REGION}/metadataStores/default"

_LEGACY_SCHEMA, _NEWER_SCHEMA = "2.0.0", "2.1.0"
_TFX_FLAGS = ("--executor_class_path", "--json_serialized_invocation_args", "--json_serialized_inputs_spec_args")
_FILE_TYPES = tuple(f"tfx.{name}" for name in ("Boolean", "Bytes", "Float", "Integer", "JsonValue", "String"))


@dataclasses.dataclass
class TaskResult:
    """What became of a task.

    Attributes:
      state: SUCCEEDED, FAILED or NOT_TRIGGERED.
      seconds: that it ran.
      log: of its container; None where it has none.
      outputs: key -> artifacts; none for a resolver that found nothing.
      parameters: output parameters.
      error: why it failed, with the tail of its log.
    """

    state: str
    seconds: float = 0.0
    log: Path | None = None
    outputs: dict[str, list[Artifact]] = dataclasses.field(default_factory=dict)
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str = ""


@dataclasses.dataclass
class JobResult:
    """What became of a job: SUCCEEDED, or FAILED as soon as one task did; the tasks stand in the order in which they ran."""

    job_id: str
    state: str
    tasks: dict[str, TaskResult]


def local_job(text: str, *, bucket: str = "", folder: Path | None = None) -> dict[str, Any]:
    """Reads a compiled job, and puts Beam in the step in the place of Dataflow, and a local folder in the place of its bucket.

    What is then different from Vertex: a step whose Beam options name DataflowRunner gets those of `local_runner.py` for all
    of them, so neither workers nor their image nor any Dataflow option is tried. With a folder, every gs:// URI of the bucket
    is a path, so another file system writes, and the folder of an output is there before its step begins; without one, the
    URIs stay, for steps that reach a stand-in of Cloud Storage.

    Args:
      text: the JSON file, or the YAML file for Kubeflow, which has the PipelineSpec alone.
      bucket: gs:// URL that is replaced.
      folder: that stands for it.

    Returns:
      A PipelineJob as JSON, for `execute_job`.
    """
    if folder:
        text = re.sub(rf"{re.escape(bucket.rstrip('/'))}(?=[/\"'\\\s]|$)", str(folder), text)
    job = json.loads(text) if text.lstrip().startswith("{") else yaml.safe_load(text)
    job = job if "pipelineSpec" in job else {"pipelineSpec": job, "runtimeConfig": {}}
    for executor in job["pipelineSpec"]["deploymentSpec"]["executors"].values():
        container = executor.get("container", {})
        for command in (container, container.get("lifecycle", {}).get("preCacheCheck", {})):
            arguments = command.get("args", [])
            if "--runner=DataflowRunner" in arguments:
                flags = (position for position in range(0, len(arguments), 2) if arguments[position] not in _TFX_FLAGS)
                command["args"] = [*arguments[: next(flags)], *LOCAL_BEAM_ARGS]
    return job


def execute_job(
    job: Mapping[str, Any],
    *,
    image: Image,
    folder: Path,
    store: list[Artifact],
    done: Mapping[str, TaskResult] | None = None,
    parameters: Mapping[str, Any] | None = None,
    pipeline_root: str = "",
    environment: Mapping[str, str] | None = None,
    path: Callable[[str], Path] = Path,
    timeout_seconds: float = 1800.0,
) -> JobResult:
    """Executes a job.

    Args:
      job: a PipelineJob as JSON, as `local_job` returns it.
      image: that every container runs.
      folder: for the logs, `<task>.log`, and the result, `job.json`.
      store: the metadata store; this job's artifacts are added to it.
      done: results of an earlier execution with the same store, by task, which are taken in the place of running these.
      parameters: values of pipeline parameters, over those of the job, as the SDK's `parameter_values`.
      pipeline_root: over that of the job.
      environment: variables for every container beside those of its image and of Vertex.
      path: gives the place on this machine of a URI under the pipeline root.
      timeout_seconds: of one container.

    Raises:
      ValueError: if the service would refuse the job; nothing has run then.
    """
    execution = _Execution(
        job, image=image, folder=folder, store=store, pipeline_root=pipeline_root, path=path, timeout_seconds=timeout_seconds
    )
    execution.done = dict(done or {})
    execution.check()
    execution.set_parameters(parameters or {})
    execution.environment = {"CLOUD_ML_PROJECT_ID": PROJECT_NUMBER, "CLOUD_ML_REGION": REGION, **(environment or {})}
    result = execution.run()
    (folder / "job.json").write_text(json.dumps(dataclasses.asdict(result), default=str, indent=2))
    return result


class _Execution:
    """One job while it is executed."""

    def __init__(
        self,
        job: Mapping[str, Any],
        *,
        image: Image,
        folder: Path,
        store: list[Artifact],
        pipeline_root: str,
        path: Callable[[str], Path],
        timeout_seconds: float,
    ):
        self.image, self.folder, self.store, self.path, self.timeout_seconds = image, folder, store, path, timeout_seconds
        self.environment: dict[str, str] = {}
        self.done: dict[str, TaskResult] = {}
        self.parameters: dict[str, Any] = {}
        self.tasks: dict[str, TaskResult] = {}
        self.order: graphlib.TopologicalSorter[str] = graphlib.TopologicalSorter()
        self.spec = json_format.ParseDict(job["pipelineSpec"], pb.PipelineSpec())
        self.runtime_config = json_format.ParseDict(job.get("runtimeConfig", {}), pb.PipelineJob.RuntimeConfig())
        deployment = json_format.MessageToDict(self.spec.deployment_spec)
        self.executors = json_format.ParseDict(deployment, pb.PipelineDeploymentConfig()).executors
        self.root = pipeline_root or self.runtime_config.gcs_output_directory
        self.job_id = f"{self.spec.pipeline_info.name}-{datetime.datetime.now():%Y%m%d%H%M%S%f}"

    @property
    def is_legacy(self) -> bool:
        return self.spec.schema_version == _LEGACY_SCHEMA

    def check(self) -> None:
        """Checks what the service does before anything runs.

        Raises:
          ValueError: if the job is not executable.
        """
        require(self.spec.schema_version in (_LEGACY_SCHEMA, _NEWER_SCHEMA), "a known schemaVersion", self.spec.schema_version)
        require(self.root, "a gcsOutputDirectory", "none")
        tasks = self.spec.root.dag.tasks
        for name, task in tasks.items():
            require(task.component_ref.name in self.spec.components, f"a component of {name}", task.component_ref.name)
            component = self.spec.components[task.component_ref.name]
            require(component.executor_label in self.executors, f"an executor of {name}", component.executor_label or "a DAG")
            for dependency in _dependencies(task):
                require(dependency in tasks, f"a task that {name} depends on", dependency)
            for key, artifact in task.inputs.artifacts.items():
                require(key in component.input_definitions.artifacts, f"a declared input of {name}", key)
                producer = artifact.task_output_artifact
                outputs = self.spec.components[tasks[producer.producer_task].component_ref.name].output_definitions.artifacts
                require(producer.output_artifact_key in outputs, f"an output of {producer.producer_task}", producer)
                given, wanted = outputs[producer.output_artifact_key], component.input_definitions.artifacts[key]
                require(given.artifact_type == wanted.artifact_type, f"`{key}` of {name} to have its type", given)
            for key in task.inputs.parameters:
                require(key in component.input_definitions.parameters, f"a declared parameter of {name}", key)
            for key, declared in component.input_definitions.parameters.items():
                is_needed = not (declared.is_optional or declared.HasField("default_value"))
                require(key in task.inputs.parameters or not is_needed, f"a value for `{key}` of {name}", "none")
            self.order.add(name, *_dependencies(task))
        self.order.prepare()  # refuses a cycle

    def set_parameters(self, overrides: Mapping[str, Any]) -> None:
        """Takes the values of the pipeline's parameters from the job and, over them, from `overrides`.

        Raises:
          ValueError: for an unknown one, one without a value, and a value of another type.
        """
        declared = self.spec.root.input_definitions.parameters
        config = self.runtime_config
        given = {
            name: plain(value) for name, value in (config.parameters if self.is_legacy else config.parameter_values).items()
        }
        unknown = sorted({*config.parameters, *config.parameter_values, *overrides} - set(declared))
        require(not unknown, "pipeline parameters that the job declares", unknown)
        for name, parameter in declared.items():
            if name in overrides and self.is_legacy:  # as the SDK sends it, so that "5" is a number for an INT
                try:
                    field = json_format.ParseDict({LEGACY_FIELDS[python_type(parameter)]: overrides[name]}, pb.Value())
                except json_format.ParseError as error:
                    raise ValueError(f"Expected `{name}` of its type. Received: {overrides[name]!r}.") from error
                given[name] = plain(field)
            elif name in overrides:
                given[name] = overrides[name]
            elif name not in given and not self.is_legacy and parameter.HasField("default_value"):
                given[name] = plain(parameter.default_value)
            require(name in given, f"a value for the pipeline parameter `{name}`", "none")
            self.parameters[name] = typed(given[name], parameter, name)

    def run(self) -> JobResult:
        """Runs every task; what does not depend on a failed one goes on."""
        while self.order.is_active():
            # All that are ready before any that become so, as the service starts them at the same time.
            ready = sorted(self.order.get_ready())
            for name in ready:
                self.tasks[name] = self._run_task(name, self.spec.root.dag.tasks[name])
            self.order.done(*ready)
        failed = any(task.state == FAILED for task in self.tasks.values())
        return JobResult(self.job_id, FAILED if failed else SUCCEEDED, self.tasks)

    def _run_task(self, name: str, task: pb.PipelineTaskSpec) -> TaskResult:
        if name in self.done:
            return self.done[name]
        started = time.monotonic()
        waits_for_all = task.trigger_policy.strategy == pb.PipelineTaskSpec.TriggerPolicy.ALL_UPSTREAM_TASKS_COMPLETED
        if not waits_for_all and any(self.tasks[other].state != SUCCEEDED for other in _dependencies(task)):
            return TaskResult(NOT_TRIGGERED)
        component = self.spec.components[task.component_ref.name]
        executor = self.executors[component.executor_label]
        result = TaskResult(SUCCEEDED)
        try:
            inputs = self._executor_input(name, task, component)
            if task.trigger_policy.condition and not evaluate_condition(task.trigger_policy.condition, inputs):
                return TaskResult(NOT_TRIGGERED)
            match executor.WhichOneof("spec"):
                case "container":
                    result.log = self.folder / f"{name}.log"
                    self._run_container(executor.container, component, inputs, result)
                case "importer":
                    self._run_importer(executor.importer, component, inputs, result)
                case "resolver":
                    self._run_resolver(executor.resolver, inputs, result)
                case other:
                    raise ValueError(f"Expected a container, an importer or a resolver. Received: {other}.")
        except (ContainerError, ValueError, json_format.ParseError) as error:
            result.state, result.error = FAILED, str(error)
        result.seconds = round(time.monotonic() - started, 2)
        return result

    def _executor_input(self, name: str, task: pb.PipelineTaskSpec, component: pb.ComponentSpec) -> pb.ExecutorInput:
        inputs = pb.ExecutorInput()
        for key, spec in task.inputs.artifacts.items():
            producer = spec.task_output_artifact
            found = self.tasks[producer.producer_task].outputs.get(producer.output_artifact_key, [])
            inputs.inputs.artifacts[key].artifacts.extend(artifact.message() for artifact in found)
        for key, declared in component.input_definitions.parameters.items():
            if key in task.inputs.parameters:
                value = typed(self._parameter(task.inputs.parameters[key]), declared, f"{name}.{key}")
            elif declared.HasField("default_value"):
                value = plain(declared.default_value)
            else:
                continue
            if self.is_legacy:
                setattr(inputs.inputs.parameters[key], LEGACY_FIELDS[python_type(declared)], value)
            else:
                json_format.ParseDict(value, inputs.inputs.parameter_values[key])
        number = int.from_bytes(hashlib.sha256(f"{self.job_id}/{name}".encode()).digest()[:8], signed=True)
        task_root = f"{self.root.rstrip('/')}/{PROJECT_NUMBER}/{self.job_id}/{name}_{number}"
        inputs.outputs.output_file = f"{task_root}/executor_output.json"
        for key in component.output_definitions.parameters:
            inputs.outputs.parameters[key].output_file = f"{task_root}/{key}"
        for key, spec in component.output_definitions.artifacts.items():
            planned = pb.RuntimeArtifact(type=spec.artifact_type, uri=f"{task_root}/{key}", metadata=spec.metadata)
            inputs.outputs.artifacts[key].artifacts.append(planned)
        return inputs

    def _parameter(self, spec: pb.TaskInputsSpec.InputParameterSpec) -> Any:
        kind = spec.WhichOneof("kind")
        if kind == "component_input_parameter":
            return self.parameters[spec.component_input_parameter]
        if kind == "task_output_parameter":
            producer = spec.task_output_parameter
            return self.tasks[producer.producer_task].parameters[producer.output_parameter_key]
        require(kind == "runtime_value", "a parameter of a value, the pipeline or another task", kind)
        return self._value(spec.runtime_value, self.parameters)

    @staticmethod
    def _value(value: pb.ValueOrRuntimeParameter, parameters: Mapping[str, Any]) -> Any:
        kind = value.WhichOneof("value")
        return parameters[value.runtime_parameter] if kind == "runtime_parameter" else plain(getattr(value, kind))

    def _new_artifact(self, schema: Message, uri: str, metadata: Message) -> Artifact:
        contexts = (self.spec.pipeline_info.name, self.job_id)
        return Artifact(
            name=f"{METADATA_STORE}/artifacts/{len(self.store) + 1}",
            schema=plain(schema),
            uri=uri,
            metadata=plain(metadata),
            contexts=tuple(map(self._context, contexts)),
        )

    def _run_container(
        self,
        spec: pb.PipelineDeploymentConfig.PipelineContainerSpec,
        component: pb.ComponentSpec,
        inputs: pb.ExecutorInput,
        result: TaskResult,
    ) -> None:
        planned: dict[str, Artifact] = {}
        for key, artifacts in inputs.outputs.artifacts.items():
            (message,) = artifacts.artifacts
            planned[key] = self._new_artifact(message.type, message.uri, message.metadata)
            self.store.append(planned[key])
            message.name = planned[key].name
            if "://" not in message.uri:  # a bucket needs no folders
                is_file = planned[key].schema_title in _FILE_TYPES
                (Path(message.uri).parent if is_file else Path(message.uri)).mkdir(parents=True, exist_ok=True)
        environment = {variable.name: variable.value for variable in spec.env} | self.environment
        commands = [spec.lifecycle.pre_cache_check] if spec.lifecycle.HasField("pre_cache_check") else []
        for command in [*commands, spec]:
            words = [fill_placeholders(word, inputs) for word in [*command.command, *command.args]]
            run_container(
                words, image=self.image, log=result.log, environment=environment, timeout_seconds=self.timeout_seconds
            )
            output_file = self.path(inputs.outputs.output_file)
            output = pb.ExecutorOutput()
            if output_file.exists():
                json_format.Parse(output_file.read_text(), output)
            for key, artifacts in output.artifacts.items():
                (message,) = artifacts.artifacts
                planned[key].uri = message.uri or planned[key].uri
                planned[key].metadata |= plain(message.metadata)
                inputs.outputs.artifacts[key].artifacts[0].CopyFrom(planned[key].message())
        for key, artifact in planned.items():
            artifact.state = "LIVE"
            result.outputs[key] = [artifact]
        for key, declared in component.output_definitions.parameters.items():
            values = output.parameter_values if key in output.parameter_values else output.parameters
            require(key in values, f"the output parameter `{key}`", "none")
            result.parameters[key] = typed(plain(values[key]), declared, key)

    def _run_importer(
        self,
        spec: pb.PipelineDeploymentConfig.ImporterSpec,
        component: pb.ComponentSpec,
        inputs: pb.ExecutorInput,
        result: TaskResult,
    ) -> None:
        values = inputs.inputs.parameters if self.is_legacy else inputs.inputs.parameter_values
        uri = self._value(spec.artifact_uri, {key: plain(value) for key, value in values.items()})
        (key,) = component.output_definitions.artifacts
        new = self._new_artifact(spec.type_schema, uri, spec.metadata)
        facts = (new.schema, new.uri, new.metadata, "LIVE")
        same = [old for old in self.store if (old.schema, old.uri, old.metadata, old.state) == facts]
        if spec.reimport or not same:
            new.state = "LIVE"
            self.store.append(new)
            same.append(new)
        result.outputs[key] = same[-1:]

    @staticmethod
    def _context(name: str) -> str:
        return f"{METADATA_STORE}/contexts/{name}"

    def _run_resolver(
        self, spec: pb.PipelineDeploymentConfig.ResolverSpec, inputs: pb.ExecutorInput, result: TaskResult
    ) -> None:
        if any(not artifacts.artifacts for artifacts in inputs.inputs.artifacts.values()):
            return
        for key, query in spec.output_artifact_queries.items():
            text = fill_placeholders(query.filter, inputs)
            if "in_context(" not in text:  # as the specification of a resolver says
                text += f' AND in_context("{self._context(self.spec.pipeline_info.name)}")'
            matches = artifact_filter(text)
            found = [artifact for artifact in reversed(self.store) if matches(artifact)]
            result.outputs[key] = found[: query.limit or 1]


def _dependencies(task: pb.PipelineTaskSpec) -> set[str]:
    artifacts = {spec.task_output_artifact.producer_task for spec in task.inputs.artifacts.values()}
    parameters = {spec.task_output_parameter.producer_task for spec in task.inputs.parameters.values()} - {""}
    return {*task.dependent_tasks, *artifacts, *parameters}
