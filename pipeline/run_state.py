"""What a run on Vertex AI Pipelines is at, and how it ended, as the service's own record of it says.

Called by `pipeline.runs`.
"""

import dataclasses
import datetime
import graphlib
import re
import urllib.parse
from collections.abc import Mapping
from typing import Any

from google.cloud.aiplatform_v1 import types
from google.protobuf import json_format

from data.errors import EXIT_DATA_GATE, EXIT_DONE, EXIT_FAILED, EXIT_NOT_BLESSED

RUN_NAME = re.compile(r"projects/(?P<project>[^/]+)/locations/(?P<region>[^/]+)/pipelineJobs/(?P<run>[^/]+)")
_CONSOLE = "https://console.cloud.google.com"
_ENDED = ("SUCCEEDED", "FAILED", "CANCELLED")
_STATES = {
    "PENDING": "waiting",
    "RUNNING": "running",
    "SUCCEEDED": "done",
    "SKIPPED": "reused",  # its earlier result, from the cache
    "FAILED": "failed",
    "NOT_TRIGGERED": "not run",
    "CANCEL_PENDING": "cancelling",
    "CANCELLING": "cancelling",
    "CANCELLED": "cancelled",
}
_PUSHED = "pushed"  # property of a PushedModel, 0 or 1, of TFX's Pusher and of ours
_BLESSED = "blessed"  # property of a ModelBlessing and an InfraBlessing, 0 or 1
_PUSHED_TYPE = "PushedModel"
_GATE_TASK = "DataGate"
# Vertex AI's words where a step's process ended by itself, as Python does after an exception: "The replica workerpool0-0 exited
# with a non-zero status of 1." Where the image, the machine or the memory is at fault they are others.
_RAISED = re.compile(r"exited with a non-zero status of 1\b")


@dataclasses.dataclass(frozen=True)
class Output:
    """An artifact that a task put out: its place and its properties."""

    uri: str
    properties: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """One step of a run.

    Attributes:
      name: of the component.
      state: waiting, running, done, reused, failed, not run, cancelling or cancelled.
      seconds: that it took, or has taken so far; None before its start.
      error: what the service says of its failure; empty for nothing.
      job: resource name of the custom job that ran its container; empty where there is none.
      outputs: its artifacts.
    """

    name: str
    state: str
    seconds: float | None = None
    error: str = ""
    job: str = ""
    outputs: tuple[Output, ...] = ()

    @property
    def is_stopped_by_data(self) -> bool:
        """Whether this is the data gate, and it failed by what it found.

        The service keeps of a step its exit status only, so that an error in the gate's own code looks the same.
        """
        return self.name == _GATE_TASK and self.state == "failed" and _RAISED.search(self.error) is not None


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as the service knows it.

    Attributes:
      name: projects/P/locations/L/pipelineJobs/ID.
      pipeline: name of the pipeline.
      state: of the service, such as RUNNING or SUCCEEDED.
      created, started, ended: times, None for what has not come yet.
      error: of the run itself; empty for none.
      tasks: in the order in which they can run.
      pushes: whether the pipeline has a task that pushes a model.
    """

    name: str
    pipeline: str
    state: str
    created: datetime.datetime | None
    started: datetime.datetime | None
    ended: datetime.datetime | None
    error: str
    tasks: tuple[Task, ...]
    pushes: bool

    @property
    def short_name(self) -> str:
        """The run's id."""
        return self.name.rpartition("/")[2]

    @property
    def has_ended(self) -> bool:
        """Whether nothing more happens."""
        return self.state in _ENDED

    @property
    def seconds(self) -> float | None:
        """How long it took, or has taken so far; None before its start."""
        return _seconds(self.started, self.ended)

    @property
    def console(self) -> str:
        """The run's page on the console."""
        match = RUN_NAME.fullmatch(self.name)
        address = f"{_CONSOLE}/vertex-ai/locations/{match['region']}/pipelines/runs/{match['run']}"
        return f"{address}?project={match['project']}"

    @property
    def pushed(self) -> Output | None:
        """The model that the run put into use, if it did, or that an earlier run did, see `is_push_reused`."""
        pushed = [output for task in self.tasks for output in task.outputs if output.properties.get(_PUSHED) == 1]
        return pushed[0] if pushed else None

    @property
    def is_push_reused(self) -> bool:
        """Whether `pushed` is of the cache: what an earlier run did, and which may have been undone since."""
        return any(task.state == "reused" and self.pushed in task.outputs for task in self.tasks)

    @property
    def refusals(self) -> tuple[tuple[str, Output], ...]:
        """The tasks that did not bless the model, with their verdicts."""
        return tuple(
            (task.name, output) for task in self.tasks for output in task.outputs if output.properties.get(_BLESSED) == 0
        )

    @property
    def exit_code(self) -> int | None:
        """What a command that waited for the run ends with; None while it goes on.

        A run that succeeded without word of its pushed model counts as one that did not push.
        """
        if not self.has_ended:
            return None
        if self.state == "FAILED" and any(task.is_stopped_by_data for task in self.tasks):
            return EXIT_DATA_GATE
        if self.state != "SUCCEEDED":
            return EXIT_FAILED
        return EXIT_DONE if self.pushed or not self.pushes else EXIT_NOT_BLESSED

    def summary(self) -> dict[str, Any]:
        """Returns what a list says of the run, for programs."""
        return {
            "run": self.short_name,
            "name": self.name,
            "pipeline": self.pipeline,
            "state": self.state,
            "created": _iso(self.created),
            "started": _iso(self.started),
            "ended": _iso(self.ended),
            "seconds": self.seconds,
            "console": self.console,
        }

    def to_json(self) -> dict[str, Any]:
        """Returns the run with its tasks, for programs."""
        return self.summary() | {
            "exit_code": self.exit_code,
            "error": self.error,
            "refused_by": [name for name, _ in self.refusals],
            "pushed": {"uri": self.pushed.uri, **self.pushed.properties} if self.pushed else None,
            "push_reused": self.is_push_reused,
            "tasks": [
                {
                    "name": task.name,
                    "state": task.state,
                    "seconds": task.seconds,
                    "error": task.error,
                    "job": task.job,
                    "log": log_link(task),
                }
                for task in self.tasks
            ],
        }


def read_run(job: types.PipelineJob) -> Run:
    """Reads the service's record of a run.

    Args:
      job: as Vertex AI gives it; of a list without its tasks.
    """
    spec = json_format.MessageToDict(type(job).pb(job).pipeline_spec)
    details: dict[str, types.PipelineTaskDetail] = {}
    for detail in job.job_detail.task_details:  # of a task that was tried again, the last
        details[detail.task_name] = detail
    state = job.state.name.removeprefix("PIPELINE_STATE_")
    tasks = [_task(name, details.get(name)) for name in _order(spec)]
    if state in _ENDED:  # what waits then waits for nothing
        tasks = [dataclasses.replace(task, state="not run") if task.state == "waiting" else task for task in tasks]
    return Run(
        name=job.name,
        pipeline=spec.get("pipelineInfo", {}).get("name", "") or job.display_name,
        state=state,
        created=job.create_time,
        started=job.start_time,
        ended=job.end_time,
        error=_one_line(job.error.message) if job.error else "",
        tasks=tuple(tasks),
        pushes=_PUSHED_TYPE in str([component.get("outputDefinitions") for component in spec.get("components", {}).values()]),
    )


def log_link(task: Task) -> str:
    """Returns the console's page with a task's log; empty where it had no container of its own."""
    if not task.job:
        return ""
    project, job = task.job.split("/")[1], task.job.rpartition("/")[2]
    # The form that Vertex AI's own error messages have.
    query = urllib.parse.quote(f'resource.type="ml_job"\nresource.labels.job_id="{job}"')
    return f"{_CONSOLE}/logs/viewer?project={project}&resource=ml_job%2Fjob_id%2F{job}&advancedFilter={query}"


def _order(spec: Mapping[str, Any]) -> list[str]:
    """The tasks, each after those that it depends on."""
    tasks = spec.get("root", {}).get("dag", {}).get("tasks", {})
    graph = {name: task.get("dependentTasks", []) for name, task in tasks.items()}
    return [name for name in graphlib.TopologicalSorter(graph).static_order() if name in graph]


def _task(name: str, detail: types.PipelineTaskDetail | None) -> Task:
    if detail is None:
        return Task(name, "waiting")
    container, custom = detail.executor_detail.container_detail, detail.executor_detail.custom_job_detail
    failed = [*container.failed_main_jobs, *custom.failed_jobs]
    outputs = tuple(
        Output(artifact.uri, _properties(artifact)) for artifacts in detail.outputs.values() for artifact in artifacts.artifacts
    )
    return Task(
        name=name,
        state=_STATES.get(detail.state.name, "waiting"),
        seconds=_seconds(detail.start_time, detail.end_time),
        error=_one_line(detail.error.message) if detail.error else "",
        job=container.main_job or custom.job or (failed[-1] if failed else ""),
        outputs=outputs,
    )


def _properties(artifact: types.Artifact) -> dict[str, Any]:
    return json_format.MessageToDict(type(artifact).pb(artifact).metadata)


def _seconds(started: datetime.datetime | None, ended: datetime.datetime | None) -> float | None:
    if started is None:
        return None
    return max(0.0, ((ended or datetime.datetime.now(datetime.UTC)) - started).total_seconds())


def _iso(moment: datetime.datetime | None) -> str | None:
    return moment and moment.isoformat()


def _one_line(text: str) -> str:
    return " ".join(text.split())
