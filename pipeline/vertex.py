"""The settings of a run on Google Cloud or Kubeflow, and what they become for each component.

Called by `kubeflow_runner.py`, `pipeline.pipeline`, and the commands that speak with Vertex AI.
"""

import re
from typing import Any, Literal

import pydantic

from data.errors import InputError
from pipeline.accelerators import accelerator_problem, step_accelerator_problem

Engine = Literal["vertex", "kubeflow"]

PREBUILT_SERVING_IMAGE = (
    "us-docker.pkg.dev/vertex-ai/prediction/tf2-cpu.2-15:latest"  # the newest TensorFlow that Vertex AI has
)
PREBUILT_GPU_SERVING_IMAGE = "us-docker.pkg.dev/vertex-ai/prediction/tf2-gpu.2-15:latest"
SERVER_COMMAND = ("python", "-m", "models.server")
# Of a compiled pipeline: a run's id has at most 128, and up to 22 are added to the name, by the SDK ("cloned-", "-" and a
# time of 14 digits) or by `pipeline.submission`.
MAX_NAME = 100
_NAME = re.compile(rf"[a-z][a-z0-9-]{{0,{MAX_NAME - 1}}}")
_KUBERNETES_GPU = "nvidia.com/gpu"
_LABEL_KEY = r"[a-z][a-z0-9_-]{0,62}"
_LABEL_VALUE = r"[a-z0-9_-]{0,63}"
_NETWORK = r"(projects/[^/]+/global/networks/[^/]+)?"
_TENSORBOARD = r"(projects/[^/]+/locations/[^/]+/tensorboards/[^/]+)?"


class VertexConfig(pydantic.BaseModel):
    """Where and on what the pipeline runs on Google Cloud.

    Attributes:
      project: id of the Google Cloud project.
      region: of Vertex AI and Dataflow.
      bucket: gs:// URL under which the pipeline keeps its artifacts.
      image: container image of this project, which every step, Dataflow's workers and the server run in.
      service_account: email address that the steps, the training job, Dataflow and the endpoint act as; the project's default
        where empty.
      network: of a VPC that the training job is peered with, projects/NUMBER/global/networks/NAME.
      labels: of the run, the training job, Dataflow's jobs, the model and the endpoint, for the bill.
      check_accelerators: compare GPUs with the machine type and the region before anything is written.
      train_on: a Vertex AI custom job, or the pipeline's own step with a GPU, which is one machine.
      machine_type: of the custom job.
      accelerator_type: GPU of the training; empty for none.
      accelerator_count: GPUs a machine.
      step_cpus: of the training's step, where it trains itself.
      step_memory_gb: of the same, in gigabytes.
      num_machines: of the custom job; several train together, synchronously.
      disk_gb: boot disk of a machine, in gigabytes.
      spot: machines that cost less and may be taken away; the training then goes on from its last checkpoint.
      timeout_hours: of running, after which the custom job is ended; the wait for a machine is Vertex AI's matter.
      tensorboard: Vertex AI TensorBoard instance, projects/P/locations/L/tensorboards/ID; wants a service account.
      dataflow: run Beam steps on Dataflow, else inside of their steps; empty for Dataflow on Vertex AI only.
      dataflow_max_workers: workers that a Beam step may grow to.
      dataflow_machine_type: of these workers.
      dataflow_subnetwork: regions/R/subnetworks/NAME, or its URL.
      dataflow_public_ips: give these workers public addresses; without them the subnetwork needs Private Google Access.
      deployer: `canary` deploys step by step and checks answers, `tfx` is TFX's own Pusher to an endpoint, `none` only copies
        the model into the bucket, under serving_model/<pipeline>.
      endpoint: display name of the endpoint; the pipeline's name where empty.
      serving_container: `server` is this project's server in `image`, `prebuilt` is Vertex AI's own TensorFlow container.
      serving_image: in the place of that choice's image.
      serving_machine_type: of the endpoint.
      serving_accelerator_type: GPU of the endpoint; empty for none.
      serving_accelerator_count: GPUs a machine.
      min_replicas: machines that the endpoint always has.
      max_replicas: machines that it may grow to.
      traffic_steps: percentages that a new model gets one after the other; without 100 at the end it waits there for
        `pipeline.deploy promote`.
      canary_images: validation images whose answers are compared at each step.
      max_canary_difference: largest difference of a probability between the endpoint's answer and the expected one.
      explanations: method of Vertex AI's explanations, with the prebuilt container only; empty for none.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    project: str = ""
    region: str = "us-central1"
    bucket: str = ""
    image: str = ""
    service_account: str = ""
    network: str = pydantic.Field("", pattern=f"^{_NETWORK}$")
    labels: dict[str, str] = {}
    check_accelerators: bool = True

    train_on: Literal["custom_job", "pipeline_step"] = "custom_job"
    machine_type: str = "n1-standard-8"
    accelerator_type: str = "NVIDIA_TESLA_T4"
    accelerator_count: int = pydantic.Field(1, ge=0, le=16)
    step_cpus: float = pydantic.Field(8.0, gt=0)
    step_memory_gb: float = pydantic.Field(30.0, gt=0)
    num_machines: int = pydantic.Field(1, ge=1)
    disk_gb: int = pydantic.Field(100, ge=100, le=64_000)
    spot: bool = False
    timeout_hours: float = pydantic.Field(24.0, gt=0, le=24 * 30)
    tensorboard: str = pydantic.Field("", pattern=f"^{_TENSORBOARD}$")

    dataflow: bool | None = None
    dataflow_max_workers: int = pydantic.Field(8, ge=1)
    dataflow_machine_type: str = "n1-standard-4"
    dataflow_subnetwork: str = ""
    dataflow_public_ips: bool = True

    deployer: Literal["canary", "tfx", "none"] = "canary"
    endpoint: str = ""
    serving_container: Literal["server", "prebuilt"] = "server"
    serving_image: str = ""
    serving_machine_type: str = "n1-standard-4"
    serving_accelerator_type: str = ""
    serving_accelerator_count: int = pydantic.Field(0, ge=0, le=16)
    min_replicas: int = pydantic.Field(1, ge=1)
    max_replicas: int = pydantic.Field(1, ge=1)
    traffic_steps: tuple[int, ...] = pydantic.Field((10, 50, 100), min_length=1)
    canary_images: int = pydantic.Field(32, ge=1, le=64)
    max_canary_difference: float = pydantic.Field(0.001, gt=0, le=1)
    explanations: Literal["", "integrated_gradients", "xrai"] = ""

    @pydantic.model_validator(mode="after")
    def _give_type_and_count_together(self) -> "VertexConfig":
        for prefix in ("", "serving_"):
            kind, count = getattr(self, f"{prefix}accelerator_type"), getattr(self, f"{prefix}accelerator_count")
            if bool(kind) != bool(count):
                raise ValueError(
                    f"Expected `vertex.{prefix}accelerator_type` and `vertex.{prefix}accelerator_count` both set or both empty."
                    f" Received: {prefix}accelerator_type={kind!r}, {prefix}accelerator_count={count}. "
                    f'For no GPU, set {prefix}accelerator_type = "" and {prefix}accelerator_count = 0.'
                )
        return self

    @pydantic.model_validator(mode="after")
    def _label_as_google_does(self) -> "VertexConfig":
        for key, value in self.labels.items():
            if not re.fullmatch(_LABEL_KEY, key) or not re.fullmatch(_LABEL_VALUE, value):
                raise ValueError(
                    "Expected `vertex.labels` in lower case: letters, digits, _ and -, at most 63 of them, a letter first. "
                    f"Received: {key}={value!r}. Rename it."
                )
        return self

    @pydantic.model_validator(mode="after")
    def _serve_step_by_step(self) -> "VertexConfig":
        steps = self.traffic_steps
        if list(steps) != sorted(set(steps)) or not (steps[0] >= 1 and steps[-1] <= 100):
            raise ValueError(
                "Expected `vertex.traffic_steps` to be growing percentages in [1, 100]. "
                f"Received: {list(steps)}. The default is [10, 50, 100]."
            )
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"Expected `vertex.max_replicas` of `vertex.min_replicas` ({self.min_replicas}) or more. "
                f"Received: {self.max_replicas}. Raise it."
            )
        if self.explanations and self.serving_container != "prebuilt":
            raise ValueError(
                'Expected `vertex.explanations` with `vertex.serving_container = "prebuilt"`, as Vertex AI\'s own container '
                f"explains. Received: explanations={self.explanations!r}. This project's server does so by itself, at :explain."
            )
        return self

    def runs_on_dataflow(self, engine: Engine) -> bool:
        """Whether Beam steps go to Dataflow."""
        return engine == "vertex" if self.dataflow is None else self.dataflow


def require_settings(config: VertexConfig, engine: Engine = "vertex") -> None:
    """Checks what has no default, and what cannot be together, before anything is written.

    Raises:
      InputError: with the first thing that is missing or impossible.
    """
    on_google = engine == "vertex" or config.runs_on_dataflow(engine)
    missing = [name for name in (["project"] if on_google else []) + ["bucket", "image"] if not getattr(config, name)]
    if missing:
        raise InputError(
            f"Expected {', '.join(f'`vertex.{name}`' for name in missing)} to be set. Received: nothing. "
            f"Set it in the TOML file or as {', '.join(f'TFX_VISION_VERTEX__{name.upper()}' for name in missing)}."
        )
    if not config.bucket.startswith("gs://"):
        raise InputError(f"Expected `vertex.bucket` to begin with gs://. Received: {config.bucket!r}.")
    if engine == "kubeflow":
        _require_of_kubeflow(config)
        return
    if not re.fullmatch(r"[a-z]+-[a-z]+\d+", config.region):
        raise InputError(
            f"Expected `vertex.region` to be a region, such as us-central1. Received: {config.region!r}. "
            "A zone has a letter more."
        )
    if config.train_on == "pipeline_step" and (config.num_machines > 1 or config.spot or config.tensorboard):
        raise InputError(
            "Expected `vertex.num_machines`, `vertex.spot` and `vertex.tensorboard` with a custom job only. "
            'Received: train_on="pipeline_step". Set train_on = "custom_job", or leave them out.'
        )
    if config.tensorboard and not config.service_account:
        raise InputError(
            "Expected `vertex.service_account` beside `vertex.tensorboard`, which Vertex AI asks for. Received: nothing. "
            "Name one that may write to the bucket and to Vertex AI."
        )
    if config.check_accelerators:
        _check_accelerators(config)


def require_name(pipeline_name: str) -> None:
    """Checks that runs can be named after a compiled pipeline.

    Raises:
      InputError: if they cannot.
    """
    if not _NAME.fullmatch(pipeline_name):
        raise InputError(
            f"Expected the name of a compiled pipeline to begin with a letter and to have at most {MAX_NAME} characters, as "
            f"its runs are named after it. Received: {pipeline_name!r}. Set `pipeline.name`, or TFX_VISION_PIPELINE__NAME."
        )


def _require_of_kubeflow(config: VertexConfig) -> None:
    if config.deployer != "none" and "deployer" in config.model_fields_set:
        raise InputError(
            'Expected `vertex.deployer = "none"` on Kubeflow, which has no endpoints: the model goes into the bucket. '
            f"Received: {config.deployer!r}. Leave it out, and deploy with `python -m pipeline.deploy`."
        )
    if config.num_machines > 1 or config.spot:
        raise InputError(
            "Expected one machine on Kubeflow, where the training is a step of the pipeline. "
            f"Received: num_machines={config.num_machines}, spot={str(config.spot).lower()}. Leave both out."
        )


def _check_accelerators(config: VertexConfig) -> None:
    machines = [("serving_", config.serving_machine_type)] if config.deployer != "none" else []
    if config.train_on == "custom_job":
        machines.append(("", config.machine_type))
    for prefix, machine_type in machines:
        kind, count = getattr(config, f"{prefix}accelerator_type"), getattr(config, f"{prefix}accelerator_count")
        if problem := accelerator_problem(machine_type, kind, count, config.region):
            raise InputError(f"In `vertex.{prefix}machine_type`: {problem}")
    problem = step_accelerator_problem(config.accelerator_type, config.accelerator_count, config.region)
    if problem and config.train_on == "pipeline_step":
        raise InputError(f"In `vertex.accelerator_type`: {problem}")


def training_job(config: VertexConfig) -> dict[str, Any]:
    """Returns the Vertex AI custom job in which the Trainer runs, as TFX's Trainer takes it: a `CustomJob` and the project.

    One machine is the chief; further ones are a second pool, and Vertex AI tells all of them of each other. On spot machines a
    worker that was taken away starts anew, with the same arguments, so that the Trainer finds its checkpoint.

    Source: https://cloud.google.com/vertex-ai/docs/training/create-custom-job
    """
    machine: dict[str, Any] = {"machine_type": config.machine_type}
    if config.accelerator_type:
        machine["accelerator_type"] = config.accelerator_type
        machine["accelerator_count"] = config.accelerator_count
    pool = {
        "machine_spec": machine,
        "replica_count": 1,
        "disk_spec": {"boot_disk_type": "pd-ssd", "boot_disk_size_gb": config.disk_gb},
        "container_spec": {"image_uri": config.image},
    }
    pools = [pool]
    if config.num_machines > 1:
        pools.append(pool | {"replica_count": config.num_machines - 1, "container_spec": {"image_uri": config.image}})
    timeout = {"seconds": round(config.timeout_hours * 3600)}
    scheduling: dict[str, Any] = {"timeout": timeout, "restart_job_on_worker_restart": config.spot}
    if config.spot:
        scheduling["strategy"] = "SPOT"
    spec: dict[str, Any] = {"worker_pool_specs": pools, "scheduling": scheduling}
    if config.service_account:
        spec["service_account"] = config.service_account
    if config.network:
        spec["network"] = config.network
    if config.tensorboard:
        spec["tensorboard"] = config.tensorboard
        spec["base_output_directory"] = {"output_uri_prefix": f"{config.bucket.rstrip('/')}/tensorboard"}
    return {"project": config.project, "job_spec": spec, "labels": dict(config.labels)}


def training_step(config: VertexConfig, engine: Engine) -> Any:
    """Returns what the Trainer's own step asks for, where it trains itself: a `ResourceSpec` of the pipeline's container."""
    from kfp.pipeline_spec import pipeline_spec_pb2  # with all of kfp, which a local run has no use for

    resources = pipeline_spec_pb2.PipelineDeploymentConfig.PipelineContainerSpec.ResourceSpec(
        cpu_limit=config.step_cpus, memory_limit=config.step_memory_gb
    )
    if config.accelerator_type:
        resources.accelerator.type = _KUBERNETES_GPU if engine == "kubeflow" else config.accelerator_type
        resources.accelerator.count = config.accelerator_count
    return resources


def serving_image(config: VertexConfig) -> str:
    """Returns the container image that serves the model."""
    if config.serving_image:
        return config.serving_image
    if config.serving_container == "server":
        return config.image
    return PREBUILT_GPU_SERVING_IMAGE if config.serving_accelerator_type else PREBUILT_SERVING_IMAGE


def serving_args(config: VertexConfig, pipeline_name: str) -> dict[str, Any]:
    """Returns what TFX's own Pusher passes to the endpoint's deployment."""
    arguments: dict[str, Any] = {
        "project_id": config.project,
        "endpoint_name": config.endpoint or pipeline_name,
        "machine_type": config.serving_machine_type,
        "min_replica_count": config.min_replicas,
        "max_replica_count": config.max_replicas,
    }
    if config.serving_accelerator_type:
        arguments["accelerator_type"] = config.serving_accelerator_type
        arguments["accelerator_count"] = config.serving_accelerator_count
    if config.service_account:
        arguments["service_account"] = config.service_account
    return arguments


def beam_args(config: VertexConfig, pipeline_name: str, engine: Engine) -> list[str]:
    """Returns the Beam options of a step: Dataflow with this project's image on its workers, or the step itself."""
    if not config.runs_on_dataflow(engine):
        # The second keeps TFX from building its own package in each step.
        return ["--runner=FnApiRunner", f"--sdk_container_image={config.image}"]
    args = [
        "--runner=DataflowRunner",
        f"--project={config.project}",
        f"--region={config.region}",
        f"--temp_location={config.bucket.rstrip('/')}/tmp/{pipeline_name}",
        f"--sdk_container_image={config.image}",
        "--experiments=use_runner_v2",
        f"--max_num_workers={config.dataflow_max_workers}",
        f"--worker_machine_type={config.dataflow_machine_type}",
    ]
    if config.service_account:
        args.append(f"--service_account_email={config.service_account}")
    if config.dataflow_subnetwork:
        args.append(f"--subnetwork={config.dataflow_subnetwork}")
    if not config.dataflow_public_ips:
        args.append("--no_use_public_ips")
    return args + [f"--labels={key}={value}" for key, value in sorted(config.labels.items())]
