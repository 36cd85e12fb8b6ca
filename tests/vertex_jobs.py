"""Custom jobs, batch prediction jobs and pipeline jobs of `vertex_stand_in`, with the checks that Vertex AI makes."""

import logging
import re
import threading
from collections.abc import Callable
from typing import Any

from google.api_core import exceptions
from google.cloud.aiplatform_v1 import types
from google.cloud.resourcemanager_v3.types import Project
from google.protobuf import empty_pb2
from google.rpc import status_pb2
from vertex_serving import Models
from vertex_world import LongRunning, Message, World, find, list_page, now, require_new

_PIPELINE_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,127}")
_ENDED = ("SUCCEEDED", "FAILED", "CANCELLED", "PARTIALLY_SUCCEEDED", "EXPIRED", "SKIPPED")
_ERRORS = {"FAILED": 13, "CANCELLED": 1}  # google.rpc.Code INTERNAL and CANCELLED
Run = Callable[[Message], Any]


class _Jobs:
    """What all kinds of jobs do: each runs a function of the test in a thread, and its state follows.

    Attributes:
      finish_at_once: a job is created when it has run, for clients that sleep before they first ask.
      wait_seconds: an answer about a running job waits so long for its end, for clients that sleep between their questions.
    """

    is_locked = False  # a job's function may itself call the stand-in

    def __init__(self, world: World):
        self._world = world
        self._ended: dict[str, threading.Event] = {}
        self.finish_at_once = False
        self.wait_seconds = 2.0

    def _create(self, jobs: dict[str, Message], job: Message, run: Run | None) -> Message:
        job.create_time = job.update_time = now()
        jobs[job.name], self._ended[job.name] = job, threading.Event()
        _set_state(job, "PENDING")
        answer = type(job)(job)
        if run:
            thread = threading.Thread(target=self._run, args=(job, run), daemon=True)
            thread.start()
            if self.finish_at_once:
                thread.join()
                return self._shown(job)
        return answer

    def _shown(self, job: Message, *, wait_seconds: float = 0.0) -> Message:
        if not job.state.name.endswith(_ENDED):
            self._ended[job.name].wait(wait_seconds)
        with self._world.lock:
            return type(job)(job)

    def _run(self, job: Message, run: Run) -> None:
        self.move(job, "RUNNING")
        try:
            run(type(job)(job))
        except Exception as error:  # whatever the test's function raises is how the job failed
            logging.getLogger(__name__).info("The job %s failed", job.name, exc_info=True)
            self.move(job, "FAILED", error=str(error))
        else:
            self.move(job, "SUCCEEDED")

    def move(self, job: Message, state: str, *, error: str = "") -> None:
        """Gives a job its next state; one that has ended keeps its own."""
        with self._world.lock:
            if job.state.name.endswith(_ENDED):
                return
            _set_state(job, state)
            job.update_time = now()
            if state == "RUNNING":
                job.start_time = now()
            if state in _ENDED:
                job.end_time = now()
            if state in _ERRORS:
                job.error = status_pb2.Status(code=_ERRORS[state], message=error or state.lower())
            if state in _ENDED:
                self._ended[job.name].set()


class Jobs(_Jobs):
    """JobService."""

    def __init__(self, world: World, models: Models):
        super().__init__(world)
        self._models = models
        self.custom_jobs: dict[str, types.CustomJob] = {}
        self.batch_jobs: dict[str, types.BatchPredictionJob] = {}
        self.run_custom_job: Run | None = lambda job: None
        self.run_batch_job: Run | None = lambda job: None

    def create_custom_job(self, request: types.CreateCustomJobRequest) -> Message:
        job = types.CustomJob(request.custom_job)
        require_new(job, kind="CustomJob")
        _check_job_spec(job.job_spec)
        job.name = f"{self._world.canonical(request.parent)}/customJobs/{self._world.new_id()}"
        return self._create(self.custom_jobs, job, self.run_custom_job)

    def get_custom_job(self, request: types.GetCustomJobRequest) -> types.CustomJob:
        job = find(self.custom_jobs, self._world.canonical(request.name), kind="CustomJob")
        return self._shown(job, wait_seconds=self.wait_seconds)

    def list_custom_jobs(self, request: types.ListCustomJobsRequest) -> types.ListCustomJobsResponse:
        page, token = list_page(request, list(self.custom_jobs.values()), parent=self._world.canonical(request.parent))
        return types.ListCustomJobsResponse(custom_jobs=page, next_page_token=token)

    def cancel_custom_job(self, request: types.CancelCustomJobRequest) -> empty_pb2.Empty:
        self.move(find(self.custom_jobs, self._world.canonical(request.name), kind="CustomJob"), "CANCELLED")
        return empty_pb2.Empty()

    def create_batch_prediction_job(self, request: types.CreateBatchPredictionJobRequest) -> Message:
        job = types.BatchPredictionJob(request.batch_prediction_job)
        require_new(job, kind="BatchPredictionJob")
        model = self._models.find_version(job.model)
        if not job.input_config.gcs_source.uris and not job.input_config.bigquery_source.input_uri:
            raise exceptions.InvalidArgument("BatchPredictionJob.input_config has no source.")
        if not job.output_config.predictions_format or not job.input_config.instances_format:
            raise exceptions.InvalidArgument("BatchPredictionJob needs instances_format and predictions_format.")
        if not job.dedicated_resources.machine_spec.machine_type:
            raise exceptions.InvalidArgument("BatchPredictionJob.dedicated_resources must be set: the Model needs them.")
        job.model, job.model_version_id = model.name, model.version_id
        job.name = f"{self._world.canonical(request.parent)}/batchPredictionJobs/{self._world.new_id()}"
        return self._create(self.batch_jobs, job, self.run_batch_job)

    def get_batch_prediction_job(self, request: types.GetBatchPredictionJobRequest) -> types.BatchPredictionJob:
        job = find(self.batch_jobs, self._world.canonical(request.name), kind="BatchPredictionJob")
        return self._shown(job, wait_seconds=self.wait_seconds)

    def list_batch_prediction_jobs(self, request: types.ListBatchPredictionJobsRequest) -> Message:
        page, token = list_page(request, list(self.batch_jobs.values()), parent=self._world.canonical(request.parent))
        return types.ListBatchPredictionJobsResponse(batch_prediction_jobs=page, next_page_token=token)

    def cancel_batch_prediction_job(self, request: types.CancelBatchPredictionJobRequest) -> empty_pb2.Empty:
        self.move(find(self.batch_jobs, self._world.canonical(request.name), kind="BatchPredictionJob"), "CANCELLED")
        return empty_pb2.Empty()


class Pipelines(_Jobs):
    """PipelineService. A pipeline job waits for the test to move it, unless `run_pipeline_job` is set."""

    def __init__(self, world: World):
        super().__init__(world)
        self.wait_seconds = 0.0
        self.pipeline_jobs: dict[str, types.PipelineJob] = {}
        self.run_pipeline_job: Run | None = None

    def create_pipeline_job(self, request: types.CreatePipelineJobRequest) -> Message:
        job = types.PipelineJob(request.pipeline_job)
        require_new(job, kind="PipelineJob")
        if request.pipeline_job_id and not _PIPELINE_ID.fullmatch(request.pipeline_job_id):
            raise exceptions.InvalidArgument(f"Invalid pipeline_job_id: {request.pipeline_job_id}")
        if not job.runtime_config.gcs_output_directory.startswith("gs://"):
            raise exceptions.InvalidArgument("PipelineJob.runtime_config.gcs_output_directory must be a Cloud Storage URI.")
        if not job.template_uri and "pipelineInfo" not in dict(job.pipeline_spec or {}):
            raise exceptions.InvalidArgument("PipelineJob.pipeline_spec has no pipelineInfo.")
        parent = self._world.canonical(request.parent)
        job.name = f"{parent}/pipelineJobs/{request.pipeline_job_id or self._world.new_id()}"
        if job.name in self.pipeline_jobs:
            raise exceptions.AlreadyExists(f"The PipelineJob already exists: {job.name}")
        return self._create(self.pipeline_jobs, job, self.run_pipeline_job)

    def get_pipeline_job(self, request: types.GetPipelineJobRequest) -> types.PipelineJob:
        return self._shown(self._find(request.name), wait_seconds=self.wait_seconds)

    def list_pipeline_jobs(self, request: types.ListPipelineJobsRequest) -> types.ListPipelineJobsResponse:
        page, token = list_page(request, list(self.pipeline_jobs.values()), parent=self._world.canonical(request.parent))
        if request.read_mask.paths:
            page = [_masked(job, request.read_mask.paths) for job in page]
        return types.ListPipelineJobsResponse(pipeline_jobs=page, next_page_token=token)

    def cancel_pipeline_job(self, request: types.CancelPipelineJobRequest) -> empty_pb2.Empty:
        job = self._find(request.name)
        if job.state.name.endswith(_ENDED):
            raise exceptions.FailedPrecondition(f"The PipelineJob {job.name} is in the state {job.state.name}.")
        for task in job.job_detail.task_details:
            if not task.state.name.endswith(_ENDED):
                self.set_task(job.name, task.task_name, "CANCELLED")
        self.move(job, "CANCELLED")
        return empty_pb2.Empty()

    def delete_pipeline_job(self, request: types.DeletePipelineJobRequest) -> LongRunning:
        job = self._find(request.name)
        if not job.state.name.endswith(_ENDED):
            raise exceptions.FailedPrecondition(f"The PipelineJob {job.name} is in the state {job.state.name}.")

        def finish() -> empty_pb2.Empty:
            del self.pipeline_jobs[job.name]
            return empty_pb2.Empty()

        return LongRunning(job.name, finish=finish, is_exclusive=True)

    def set_pipeline(self, name: str, state: str, *, error: str = "") -> None:
        """Moves a job: "RUNNING", "SUCCEEDED", "FAILED", ...; `name` is the resource name or the job's id."""
        self.move(self._find_any(name), state, error=error)

    def set_task(self, name: str, task: str, state: str, *, error: str = "", custom_job: str = "") -> None:
        """Moves a task of a job, which is there from its first state on."""
        with self._world.lock:
            job = self._find_any(name)
            details = {one.task_name: one for one in job.job_detail.task_details}
            detail = details.get(task) or types.PipelineTaskDetail(
                task_id=int(self._world.new_id()), task_name=task, create_time=now(), start_time=now()
            )
            detail.state = types.PipelineTaskDetail.State[state]
            if state in _ENDED:
                detail.end_time = now()
            if error:
                detail.error = status_pb2.Status(code=_ERRORS["FAILED"], message=error)
            if custom_job:
                detail.executor_detail = types.PipelineTaskExecutorDetail(
                    container_detail=types.PipelineTaskExecutorDetail.ContainerDetail(main_job=custom_job)
                )
            job.job_detail.task_details = [*(one for key, one in details.items() if key != task), detail]

    def _find(self, name: str) -> types.PipelineJob:
        return find(self.pipeline_jobs, self._world.canonical(name), kind="PipelineJob")

    def _find_any(self, name: str) -> types.PipelineJob:
        if name.startswith("projects/"):
            return self._find(name)
        (found,) = [job for job in self.pipeline_jobs.values() if job.name.endswith(f"/{name}")]
        return found


class Projects:
    """The one method of Resource Manager that the SDK calls, to turn the project's number into its id."""

    is_locked = True

    def __init__(self, world: World):
        self._world = world

    def get_project(self, request: Any) -> Project:
        if request.name.removeprefix("projects/") not in (self._world.project, self._world.number):
            raise exceptions.PermissionDenied(f"The caller may not see {request.name}.")
        return Project(name=f"projects/{self._world.number}", project_id=self._world.project, state=Project.State.ACTIVE)


def _set_state(job: Message, state: str) -> None:
    prefix = "PIPELINE_STATE_" if isinstance(job, types.PipelineJob) else "JOB_STATE_"
    job.state = type(job.state)[prefix + state]


def _masked(job: types.PipelineJob, paths: list[str]) -> types.PipelineJob:
    masked = types.PipelineJob()
    for path in paths:
        setattr(masked, path, getattr(job, path))
    return masked


def _check_job_spec(spec: types.CustomJobSpec) -> None:
    if not spec.worker_pool_specs:
        raise exceptions.InvalidArgument("CustomJobSpec.worker_pool_specs must not be empty.")
    for pool in spec.worker_pool_specs:
        machine = pool.machine_spec
        if not pool.replica_count:
            continue  # an empty pool keeps the place of the parameter servers
        if not machine.machine_type:
            raise exceptions.InvalidArgument("WorkerPoolSpec.machine_spec.machine_type must be set.")
        if bool(machine.accelerator_type) != bool(machine.accelerator_count):
            raise exceptions.InvalidArgument("accelerator_type and accelerator_count must be set together.")
        if not pool.container_spec.image_uri and not pool.python_package_spec.executor_image_uri:
            raise exceptions.InvalidArgument("WorkerPoolSpec needs container_spec.image_uri or python_package_spec.")
    if spec.worker_pool_specs[0].replica_count != 1:
        raise exceptions.InvalidArgument("The first worker pool is the chief: replica_count must be 1.")
    if spec.tensorboard and not spec.service_account:
        raise exceptions.InvalidArgument("CustomJobSpec.service_account must be set with tensorboard.")
    directory = spec.base_output_directory.output_uri_prefix
    if directory and not directory.startswith("gs://"):
        raise exceptions.InvalidArgument(f"base_output_directory is no Cloud Storage URI: {directory}")
