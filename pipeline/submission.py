"""A job that `kubeflow_runner.py` has compiled, and the request by which Vertex AI Pipelines runs it.

Everything that can be wrong with a run's parameters is found here, before anything is sent. Called by `pipeline.runs`.
"""

import dataclasses
import datetime
import difflib
import itertools
import json
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.errors import InputError

JOB_FILE = "pipeline.json"
_HOME_VARIABLE = "VERTEX_HOME"  # of the tfx command
_YAML = (".yaml", ".yml")
# Schema 2.0 has the first names, 2.1 the second; each with the key of a value in schema 2.0.
_TYPES = {"INT": "intValue", "DOUBLE": "doubleValue", "STRING": "stringValue"}
_NEW_TYPES = {"NUMBER_INTEGER": "INT", "NUMBER_DOUBLE": "DOUBLE", "STRING": "STRING"}
# Where the JSON of the Trainer and the deployers has project and region; keys of TFX, which takes seconds to load.
_PLACES = {
    ("project",): "project",
    ("region",): "region",
    ("ai_platform_vertex_region",): "region",
    ("ai_platform_training_args", "project"): "project",
    ("ai_platform_serving_args", "project_id"): "project",
}
_CREATE_TRIES = 4
_INTEGER = re.compile(r"[+-]?\d+")


@dataclasses.dataclass(frozen=True)
class CompiledJob:
    """What a compiled file holds.

    Attributes:
      path: of the file.
      content: a PipelineJob as JSON.
    """

    path: Path
    content: Mapping[str, Any]

    @property
    def pipeline_name(self) -> str:
        """The pipeline's name."""
        return self.content["pipelineSpec"]["pipelineInfo"]["name"]

    @property
    def pipeline_root(self) -> str:
        """The gs:// folder of all runs' artifacts."""
        return self.content["runtimeConfig"].get("gcsOutputDirectory", "")

    @property
    def parameter_types(self) -> dict[str, str]:
        """The type of each parameter: INT, DOUBLE, STRING, or another that cannot be set here."""
        definitions = self.content["pipelineSpec"]["root"].get("inputDefinitions", {}).get("parameters", {})
        kinds = {name: one.get("parameterType") or one.get("type", "") for name, one in definitions.items()}
        return {name: _NEW_TYPES.get(kind, kind) for name, kind in kinds.items()}


def find_job(given: str | None, pipeline_name: Callable[[], str], environment: Mapping[str, str] | None = None) -> Path:
    """Finds the compiled file.

    Args:
      given: a file, or the name of a pipeline that the tfx command knows; None for the file here or the settings' pipeline.
      pipeline_name: gives that of the settings, which is asked for last, as reading them takes seconds.
      environment: the process's own by default.

    Raises:
      InputError: if there is none.
    """
    environment = os.environ if environment is None else environment
    home = Path(environment.get(_HOME_VARIABLE) or Path("~/tfx/vertex").expanduser())
    if given and (Path(given).suffix or os.sep in given):
        return Path(given).expanduser()
    here = Path(JOB_FILE)
    if not given and here.is_file():
        return here
    known = home / (given or pipeline_name()) / JOB_FILE
    if known.is_file():
        return known
    candidates = [known] if given else [here, known]
    raise InputError(
        f"Expected a compiled job in {' or '.join(map(str, candidates))}. Received: none. "
        "Compile one with `python kubeflow_runner.py`, or name it with --pipeline."
    )


def read_job(path: Path) -> CompiledJob:
    """Reads a compiled file.

    Raises:
      InputError: if it is none for Vertex AI.
    """
    if path.suffix in _YAML:
        raise InputError(
            f"Expected a job for Vertex AI, {JOB_FILE}. Received: {path}, which is for Kubeflow Pipelines. Give it to the kfp "
            "client, or compile with engine=vertex."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Expected --pipeline to be a compiled job. Received: {str(path)!r}: {error.strerror}.") from error
    except ValueError as error:
        raise InputError(f"Expected {path} to be a compiled job, JSON. Received: {error}. Compile it again.") from error
    job = CompiledJob(path, content)
    try:
        complete = bool(job.pipeline_name and job.pipeline_root and content["pipelineSpec"]["root"])
    except (KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise InputError(
            f"Expected {path} to be a job that kubeflow_runner.py compiled for Vertex AI. Received: one without a pipeline, or "
            "without a folder for its artifacts. Compile it again."
        )
    return job


def check_place(job: CompiledJob, *, project: str, region: str, bucket: str) -> None:
    """Checks that a job goes where it was compiled for, as project, region and bucket are also inside of its steps.

    Args:
      job: the compiled job.
      project: to run it in.
      region: to run it in.
      bucket: of the settings; empty for the compiled one.

    Raises:
      InputError: if it was compiled for another place.
    """
    wanted = {"project": project, "region": region}
    compiled = {name: value for name, value in _compiled_places(job) if value != wanted[name]}
    different = list(compiled)
    if bucket and not f"{job.pipeline_root}/".startswith(f"{bucket.rstrip('/')}/"):
        different.append("bucket")
        compiled["bucket"], wanted["bucket"] = job.pipeline_root, bucket
    if different:
        raise InputError(
            f"Expected {' and '.join(f'{name} {compiled[name]}' for name in different)}, which {job.path} was compiled for. "
            f"Received: {', '.join(wanted[name] for name in different)}. Compile it again with these settings."
        )


def _compiled_places(job: CompiledJob) -> Iterator[tuple[str, str]]:
    """Yields `project` or `region` with its value, from each place of the job that has it: Beam, training, deployment."""
    spec = job.content["pipelineSpec"]
    for executor in spec.get("deploymentSpec", {}).get("executors", {}).values():
        for argument in executor.get("container", {}).get("args", []):
            name, _, value = argument.partition("=")
            if name in ("--project", "--region"):
                yield name.removeprefix("--"), value
    for task in spec["root"].get("dag", {}).get("tasks", {}).values():
        for parameter in ("config", "custom_config"):
            settings = _constant(task, parameter)
            for keys, name in _PLACES.items():
                value: Any = settings
                for key in keys:
                    value = value.get(key) if isinstance(value, Mapping) else None
                if isinstance(value, str):
                    yield name, value


def _constant(task: Mapping[str, Any], parameter: str) -> Any:
    """The value of a task's parameter that is JSON, compiled in; None for none."""
    value = task.get("inputs", {}).get("parameters", {}).get(parameter, {}).get("runtimeValue", {})
    try:
        return json.loads(value.get("constantValue", {}).get("stringValue") or value.get("constant") or "null")
    except ValueError:
        return None


def read_parameters(job: CompiledJob, assignments: Sequence[str]) -> dict[str, str | int | float]:
    """Reads a run's parameters as a user writes them.

    Args:
      job: the compiled job, which has their types.
      assignments: `name=value` each.

    Raises:
      InputError: if a name is unknown, or a value is not of its type; one line.
    """
    types = job.parameter_types
    values: dict[str, str | int | float] = {}
    for assignment in assignments:
        name, separator, text = (part.strip() for part in assignment.partition("="))
        if not separator or not name:
            raise InputError(f"Expected --parameter name=value. Received: {assignment!r}.")
        if name not in types:
            nearest = difflib.get_close_matches(name, types, n=1, cutoff=0.0)
            hint = f"Did you mean `{nearest[0]}`? Known: {', '.join(sorted(types))}." if nearest else "It has none."
            raise InputError(f"Expected --parameter to name one of {job.path}. Received: `{name}`. {hint}")
        values[name] = _typed(name, text, types[name])
    return values


def _typed(name: str, text: str, kind: str) -> str | int | float:
    if kind == "STRING":
        return text
    if kind == "INT":
        if _INTEGER.fullmatch(text):
            return int(text)
        raise InputError(f"Expected the parameter `{name}` to be a whole number. Received: {text!r}.")
    if kind == "DOUBLE":
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
        raise InputError(f"Expected the parameter `{name}` to be a number. Received: {text!r}.")
    raise InputError(f"Expected a parameter that is a text or a number. Received: `{name}`, of type {kind}. Compile it in.")


def run_request(
    job: CompiledJob,
    parameters: Mapping[str, str | int | float],
    *,
    labels: Mapping[str, str],
    service_account: str,
    network: str,
) -> dict[str, Any]:
    """Returns the PipelineJob that runs a compiled job, as JSON.

    Args:
      job: the compiled job.
      parameters: in the place of the compiled values.
      labels: beside the compiled ones.
      service_account: that the steps act as; empty for the project's default.
      network: of a VPC that they are peered with; empty for none.
    """
    runtime = dict(job.content["runtimeConfig"])
    if _is_old_schema(job.content["pipelineSpec"].get("schemaVersion", "")):
        given = {name: {_TYPES[job.parameter_types[name]]: value} for name, value in parameters.items()}
        runtime["parameters"] = runtime.get("parameters", {}) | given
    else:
        runtime["parameterValues"] = runtime.get("parameterValues", {}) | dict(parameters)
    request = {
        "displayName": job.content.get("displayName") or job.pipeline_name,
        "labels": dict(job.content.get("labels", {})) | dict(labels),
        "pipelineSpec": job.content["pipelineSpec"],
        "runtimeConfig": runtime,
    }
    if service_account:
        request["serviceAccount"] = service_account
    if network:
        request["network"] = network
    return request


def new_run_name(job: CompiledJob) -> str:
    """Returns a name that says which pipeline and when, and that no other run has."""
    now = datetime.datetime.now(datetime.UTC)
    return f"{job.pipeline_name[:100]}-{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def create_run(client: Any, parent: str, request: Mapping[str, Any], run: str) -> Any:
    """Creates a run, and no second one where an answer is lost and it must be asked again: the name tells whether it is there.

    Args:
      client: a PipelineServiceClient.
      parent: projects/P/locations/L.
      request: of `run_request`.
      run: id of the new run.

    Returns:
      The PipelineJob as Vertex AI has it.

    Raises:
      InputError: if there was a run of that name, or Vertex AI refuses this one.
      RuntimeError: if Vertex AI fails.
    """
    from google.api_core import exceptions
    from google.cloud.aiplatform_v1 import types

    from pipeline.cloud_calls import explaining, is_transient, once, repeated

    job = types.PipelineJob.from_json(json.dumps(request))
    with explaining(f"run {run}"):
        for attempt in itertools.count(1):
            try:
                return client.create_pipeline_job(parent=parent, pipeline_job=job, pipeline_job_id=run, **once())
            except exceptions.AlreadyExists as error:
                if attempt == 1:
                    raise InputError(f"Expected --name to be new. Received: {run}, which is there. Take another.") from error
                return client.get_pipeline_job(name=f"{parent}/pipelineJobs/{run}", **repeated())
            except exceptions.GoogleAPICallError as error:
                if attempt == _CREATE_TRIES or not is_transient(error):
                    raise
                time.sleep(2.0 ** (attempt - 1))


def _is_old_schema(version: str) -> bool:
    """Whether parameters have a key for each type, as up to schema 2.0."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2]) <= (2, 0)
