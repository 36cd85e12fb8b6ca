"""The settings of a run on Google Cloud, and what they become for each component.

Called by `kubeflow_runner.py` and `pipeline.pipeline`.
"""

from typing import Any

import pydantic

from data.errors import InputError


class VertexConfig(pydantic.BaseModel):
    """Where and on what the pipeline runs on Google Cloud.

    Attributes:
      project: id of the Google Cloud project.
      region: of Vertex AI and Dataflow.
      bucket: gs:// URL under which the pipeline keeps its artifacts.
      image: container image of this project, which every step runs in.
      service_account: that the training job and Dataflow act as; the project's default where empty.
      machine_type: of the training job.
      accelerator_type: GPU of the training job; empty for none.
      accelerator_count: GPUs a machine.
      dataflow_max_workers: workers that a Beam step may grow to.
      endpoint: display name of the endpoint that a blessed model is pushed to.
      serving_image: container that serves the pushed model.
      serving_machine_type: of the endpoint.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    project: str = ""
    region: str = "us-central1"
    bucket: str = ""
    image: str = ""
    service_account: str = ""
    machine_type: str = "n1-standard-8"
    accelerator_type: str = "NVIDIA_TESLA_T4"
    accelerator_count: int = pydantic.Field(1, ge=0, le=16)
    dataflow_max_workers: int = pydantic.Field(8, ge=1)
    endpoint: str = ""
    serving_image: str = "us-docker.pkg.dev/vertex-ai/prediction/tf2-cpu.2-15:latest"
    serving_machine_type: str = "n1-standard-4"

    @pydantic.model_validator(mode="after")
    def _give_type_and_count_together(self) -> "VertexConfig":
        if bool(self.accelerator_type) != bool(self.accelerator_count):
            raise ValueError(
                "Expected `vertex.accelerator_type` and `vertex.accelerator_count` both set or both empty. Received: "
                f"accelerator_type={self.accelerator_type!r}, accelerator_count={self.accelerator_count}. "
                'For no GPU, set accelerator_type = "" and accelerator_count = 0.'
            )
        return self


def require_settings(config: VertexConfig) -> None:
    """Checks what has no default.

    Raises:
      InputError: if one is missing.
    """
    missing = [name for name in ("project", "bucket", "image") if not getattr(config, name)]
    if missing:
        raise InputError(
            f"Expected {', '.join(f'`vertex.{name}`' for name in missing)} to be set. Received: nothing. "
            f"Set it in the TOML file or as {', '.join(f'TFX_VISION_VERTEX__{name.upper()}' for name in missing)}."
        )
    if not config.bucket.startswith("gs://"):
        raise InputError(f"Expected `vertex.bucket` to begin with gs://. Received: {config.bucket!r}.")


def training_job(config: VertexConfig) -> dict[str, Any]:
    """Returns the Vertex AI custom job in which the Trainer runs: one machine, with a GPU by default."""
    machine: dict[str, Any] = {"machine_type": config.machine_type}
    if config.accelerator_type:
        machine["accelerator_type"] = config.accelerator_type
        machine["accelerator_count"] = config.accelerator_count
    job: dict[str, Any] = {
        "project": config.project,
        "worker_pool_specs": [{"machine_spec": machine, "replica_count": 1, "container_spec": {"image_uri": config.image}}],
    }
    if config.service_account:
        job["service_account"] = config.service_account
    return job


def serving_args(config: VertexConfig, pipeline_name: str) -> dict[str, Any]:
    """Returns what the Pusher passes to the endpoint's deployment."""
    return {
        "project_id": config.project,
        "endpoint_name": config.endpoint or pipeline_name,
        "machine_type": config.serving_machine_type,
    }


def dataflow_args(config: VertexConfig, pipeline_name: str) -> list[str]:
    """Returns the Beam options that send a step to Dataflow, with this project's image on the workers."""
    args = [
        "--runner=DataflowRunner",
        f"--project={config.project}",
        f"--region={config.region}",
        f"--temp_location={config.bucket.rstrip('/')}/tmp/{pipeline_name}",
        f"--sdk_container_image={config.image}",
        "--experiments=use_runner_v2",
        f"--max_num_workers={config.dataflow_max_workers}",
    ]
    if config.service_account:
        args.append(f"--service_account_email={config.service_account}")
    return args
