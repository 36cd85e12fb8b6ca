"""TFX's Trainer in a Vertex AI custom job, with the end of a job that failed in one line.

TFX submits the job, waits for it, and prints the whole of Google's answer where it fails. Called by `pipeline.engines`.
"""

import re
from typing import Any

from google.cloud import aiplatform_v1
from tfx.dsl.components.base import executor_spec
from tfx.extensions.google_cloud_ai_platform.trainer import executor
from tfx.extensions.google_cloud_ai_platform.trainer.component import Trainer

from pipeline.cloud_calls import explaining, repeated

_JOB = re.compile(r"Job '(?P<name>projects/[^/]+/locations/(?P<region>[^/]+)/customJobs/[^']+)' did not succeed")


class CustomJobExecutor(executor.GenericExecutor):
    """Submits the job in which TFX's own Trainer runs, and waits for its end."""

    def Do(  # noqa: N802 (TFX's name)
        self, input_dict: dict[str, list], output_dict: dict[str, list], exec_properties: dict[str, Any]
    ) -> None:
        """Trains; see TFX.

        Raises:
          InputError: if credentials, permissions, quota or a setting keep the job from being submitted.
          RuntimeError: if Vertex AI fails, or the job does.
        """
        with explaining("run the training job"):
            try:
                super().Do(input_dict, output_dict, exec_properties)
            except RuntimeError as error:
                match = _JOB.search(str(error))
                if not match:
                    raise
                raise RuntimeError(_why(match["name"], match["region"])) from error


def _why(name: str, region: str) -> str:
    """Says in one line how a job ended."""
    client = aiplatform_v1.JobServiceClient(client_options={"api_endpoint": f"{region}-aiplatform.googleapis.com"})
    job = client.get_custom_job(name=name, **repeated())
    message = " ".join(job.error.message.split()) or "no reason given"
    project, job_id = name.split("/")[1], name.rpartition("/")[2]
    page = f"https://console.cloud.google.com/vertex-ai/locations/{region}/training/{job_id}?project={project}"
    state = job.state.name.removeprefix("JOB_STATE_").lower()
    return f"Expected the training job {name} to succeed. Received: {state}: {message.rstrip('.')}. Its logs are at {page}"


class CustomJobTrainer(Trainer):
    """TFX's Trainer for Vertex AI."""

    EXECUTOR_SPEC = executor_spec.ExecutorClassSpec(CustomJobExecutor)
