"""The custom jobs that train for a run on Vertex AI Pipelines, which ends without them, as it does not know them for its own.

A step of the run asks for each and gives it the run's id as display name. Called by `pipeline.custom_job`, which is that step,
and by `pipeline.runs`.
"""

import contextlib

from google.api_core import exceptions
from google.cloud.aiplatform_v1 import JobServiceClient, types

from pipeline.cloud_calls import explaining, repeated
from pipeline.run_state import RUN_NAME

_GOING_ON = ("queued", "pending", "running", "paused", "updating")


def state_of(job: types.CustomJob) -> str:
    """Returns a job's state in lower case, such as `running` or `succeeded`."""
    return job.state.name.removeprefix("JOB_STATE_").lower()


def find_training_jobs(run: str) -> list[types.CustomJob]:
    """Finds the jobs of a run, those that have ended too.

    Args:
      run: projects/P/locations/L/pipelineJobs/ID.

    Raises:
      InputError, RuntimeError: if Vertex AI does not answer.
    """
    place, _, run_id = run.rpartition("/pipelineJobs/")
    with explaining(f"look for the training jobs of {run_id}"):
        return list(
            _client(run).list_custom_jobs(request={"parent": place, "filter": f'display_name="{run_id}"'}, **repeated())
        )


def cancel_training_jobs(run: str) -> list[str]:
    """Cancels the jobs of a run that go on.

    Args:
      run: projects/P/locations/L/pipelineJobs/ID.

    Returns:
      Their resource names.

    Raises:
      InputError, RuntimeError: if Vertex AI does not answer, or refuses.
    """
    names = [job.name for job in find_training_jobs(run) if state_of(job) in _GOING_ON]
    for name in names:
        with explaining(f"cancel the training job {name}"), contextlib.suppress(exceptions.FailedPrecondition):  # it has ended
            _client(run).cancel_custom_job(name=name, **repeated())
    return names


def _client(run: str) -> JobServiceClient:
    region = RUN_NAME.fullmatch(run)["region"]
    return JobServiceClient(client_options={"api_endpoint": f"{region}-aiplatform.googleapis.com"})
