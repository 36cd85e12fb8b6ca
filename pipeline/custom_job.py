"""TFX's Trainer and Tuner in a Vertex AI custom job, which has the run's id as display name and ends with the step.

TFX submits the job, waits for it, and prints the whole of Google's answer where it fails; where the step itself is ended, as by
`python -m pipeline.runs cancel`, TFX would leave the job running. Called by `pipeline.engines`.
"""

import contextlib
import logging
import re
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from google.cloud import aiplatform_v1
from tfx.dsl.components.base import executor_spec
from tfx.extensions.google_cloud_ai_platform import constants
from tfx.extensions.google_cloud_ai_platform.trainer import executor
from tfx.extensions.google_cloud_ai_platform.trainer.component import Trainer
from tfx.extensions.google_cloud_ai_platform.tuner import executor as tuner_executor
from tfx.extensions.google_cloud_ai_platform.tuner.component import Tuner
from tfx.types.standard_component_specs import CUSTOM_CONFIG_KEY
from tfx.utils import json_utils

from pipeline.cloud_calls import explaining, repeated
from pipeline.training_jobs import cancel_training_jobs, state_of

logger = logging.getLogger("tfx_vision")

_JOB = re.compile(r"Job '(?P<name>projects/[^/]+/locations/(?P<region>[^/]+)/customJobs/[^']+)' did not succeed")
_SECOND_LOOK_SECONDS = 5.0  # well within the half minute between SIGTERM and SIGKILL


class _Ended(SystemExit):
    """The step has got SIGTERM."""

    def __init__(self):
        super().__init__(128 + signal.SIGTERM)  # as a shell has it


class CustomJobExecutor(executor.GenericExecutor):
    """Submits the job in which TFX's own Trainer runs, and waits for its end."""

    def Do(  # noqa: N802 (TFX's name)
        self, input_dict: dict[str, list], output_dict: dict[str, list], exec_properties: dict[str, Any]
    ) -> None:
        """Trains; see TFX.

        Raises:
          InputError: if credentials, permissions, quota or a setting keep the job from being submitted.
          RuntimeError: if Vertex AI fails, or the job does.
          SystemExit: after SIGTERM; the job is cancelled.
        """
        _run_job(super().Do, input_dict, output_dict, exec_properties, arguments_key=executor.TRAINING_ARGS_KEY)


class CustomJobTunerExecutor(tuner_executor.Executor):
    """Submits the job in which TFX's own Tuner runs, and waits for its end."""

    def Do(  # noqa: N802 (TFX's name)
        self, input_dict: dict[str, list], output_dict: dict[str, list], exec_properties: dict[str, Any]
    ) -> None:
        """Searches; see TFX, and `CustomJobExecutor` for what it raises."""
        _run_job(super().Do, input_dict, output_dict, exec_properties, arguments_key=tuner_executor.TUNING_ARGS_KEY)


def _run_job(
    do: Callable[..., None],
    input_dict: dict[str, list],
    output_dict: dict[str, list],
    exec_properties: dict[str, Any],
    *,
    arguments_key: str,
) -> None:
    """Lets TFX submit a job under the run's id and wait for it."""
    custom_config = json_utils.loads(exec_properties[CUSTOM_CONFIG_KEY])
    artifact = next(iter(output_dict.values()))[0]
    run_id = artifact.uri.rstrip("/").split("/")[-3]  # <root>/<project>/<run>/<task>/<output>
    place = f"projects/{custom_config[arguments_key]['project']}/locations/{custom_config[constants.VERTEX_REGION_KEY]}"
    named = custom_config | {executor.JOB_ID_KEY: run_id}  # of both components; on Vertex AI it is the display name
    exec_properties = exec_properties | {CUSTOM_CONFIG_KEY: json_utils.dumps(named)}
    with explaining("run the training job"), _cancelling_with_the_step(f"{place}/pipelineJobs/{run_id}"):
        try:
            do(input_dict, output_dict, exec_properties)
        except RuntimeError as error:
            match = _JOB.search(str(error))
            if not match:
                raise
            raise RuntimeError(_why(match["name"], match["region"])) from error


@contextlib.contextmanager
def _cancelling_with_the_step(run: str) -> Iterator[None]:
    """Makes SIGTERM, by which Vertex AI ends a step, cancel the run's jobs and end this process."""

    def end(*unused: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would interrupt the cancelling
        raise _Ended

    earlier = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except _Ended:
        names = cancel_training_jobs(run)
        if not names:  # a job that was asked for a moment ago may not be there yet
            time.sleep(_SECOND_LOOK_SECONDS)
            names = cancel_training_jobs(run)
        logger.warning("SIGTERM: cancelled %s", ", ".join(names) or "nothing, as no training job goes on")
        raise
    finally:
        signal.signal(signal.SIGTERM, earlier)


def _why(name: str, region: str) -> str:
    """Says in one line how a job ended."""
    client = aiplatform_v1.JobServiceClient(client_options={"api_endpoint": f"{region}-aiplatform.googleapis.com"})
    job = client.get_custom_job(name=name, **repeated())
    message = " ".join(job.error.message.split()) or "no reason given"
    project, job_id = name.split("/")[1], name.rpartition("/")[2]
    page = f"https://console.cloud.google.com/vertex-ai/locations/{region}/training/{job_id}?project={project}"
    return (
        f"Expected the training job {name} to succeed. Received: {state_of(job)}: {message.rstrip('.')}. Its logs are at {page}"
    )


class CustomJobTrainer(Trainer):
    """TFX's Trainer for Vertex AI."""

    EXECUTOR_SPEC = executor_spec.ExecutorClassSpec(CustomJobExecutor)


class CustomJobTuner(Tuner):
    """TFX's Tuner for Vertex AI."""

    EXECUTOR_SPEC = executor_spec.ExecutorClassSpec(CustomJobTunerExecutor)
