"""TFX's Trainer and Tuner with the real SDK against the stand-in of Vertex AI: what they ask for, and how they end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import vertex_stand_in
from conftest import ROOT
from google.api_core import exceptions
from google.cloud.aiplatform_v1 import types
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2
from tfx.extensions.google_cloud_ai_platform import runner
from tfx.types import standard_artifacts
from vertex_stand_in import VertexStandIn

from data.errors import InputError
from pipeline.custom_job import CustomJobExecutor
from pipeline.vertex import VertexConfig, training_job

pytestmark = pytest.mark.one_stack
google_cloud = vertex_stand_in.google_cloud

SETTINGS = {
    "project": "test-project",
    "region": "europe-west4",
    "bucket": "gs://bucket",
    "image": "host/image:1",
    "service_account": "steps@test-project.iam.gserviceaccount.com",
    "network": "projects/123456789012/global/networks/vpc",
    "labels": {"team": "vision"},
    "num_machines": 3,
    "spot": True,
    "timeout_hours": 2,
}
RUN = "flowers-20260314-150926-5f3a"
RUN_ROOT = f"gs://bucket/pipeline_root/flowers/{vertex_stand_in.PROJECT_NUMBER}/{RUN}"


@pytest.fixture(autouse=True)
def quick(google_cloud: VertexStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """TFX looks at a job every 30 s."""
    monkeypatch.setattr(runner, "_POLLING_INTERVAL_IN_SECONDS", 0.1)


def train() -> None:
    """Runs the Trainer's step."""
    model, examples = standard_artifacts.Model(), standard_artifacts.Examples()
    model.uri, examples.uri = f"{RUN_ROOT}/Trainer_7/model", f"{RUN_ROOT}/ImportExampleGen_1/examples"
    properties = {"run_fn": "models.trainer.run_fn", "custom_config": custom_config("ai_platform_training_args")}
    CustomJobExecutor().Do({"examples": [examples]}, {"model": [model]}, properties)


def custom_config(arguments_key: str) -> str:
    config = VertexConfig(**SETTINGS)
    return json.dumps(
        {
            "ai_platform_enable_vertex": True,
            "ai_platform_vertex_region": config.region,
            arguments_key: training_job(config),
            "trainer": {"class_names": ["daisy", "rose"]},
        }
    )


def test_trainer_asks_for_the_whole_job(google_cloud: VertexStandIn):
    train()

    (request,) = google_cloud.sent("CreateCustomJob")
    assert request.parent == "projects/test-project/locations/europe-west4"
    job, spec = request.custom_job, request.custom_job.job_spec
    assert job.display_name == RUN
    assert job.labels["team"] == "vision"
    chief, workers = spec.worker_pool_specs
    assert (chief.replica_count, workers.replica_count) == (1, 2)
    for pool in (chief, workers):
        assert pool.machine_spec == types.MachineSpec(
            machine_type="n1-standard-8", accelerator_type="NVIDIA_TESLA_T4", accelerator_count=1
        )
        assert pool.container_spec.image_uri == "host/image:1"
        assert pool.disk_spec == types.DiskSpec(boot_disk_type="pd-ssd", boot_disk_size_gb=100)
    assert spec.scheduling.strategy == types.Scheduling.Strategy.SPOT
    assert spec.scheduling.restart_job_on_worker_restart
    assert types.Scheduling.pb(spec.scheduling).timeout.seconds == 7200
    assert spec.service_account == SETTINGS["service_account"]
    assert spec.network == SETTINGS["network"]
    assert google_cloud.unknown == []


def test_trainer_runs_tfx_in_every_container(google_cloud: VertexStandIn):
    train()

    pools = google_cloud.sent("CreateCustomJob")[0].custom_job.job_spec.worker_pool_specs
    commands = [list(pool.container_spec.command) for pool in pools]
    assert commands[0] == commands[1]
    assert commands[0][:3] == ["python", "-m", "tfx.scripts.run_executor"]
    given = dict(zip(commands[0][3::2], commands[0][4::2], strict=True))
    assert given["--executor_class_path"] == "tfx.components.trainer.executor.GenericExecutor"
    properties = json.loads(given["--exec-properties"])
    assert properties["run_fn"] == "models.trainer.run_fn"
    assert json.loads(properties["custom_config"])["trainer"] == {"class_names": ["daisy", "rose"]}
    assert f"{RUN_ROOT}/ImportExampleGen_1/examples" in given["--inputs"]
    assert f"{RUN_ROOT}/Trainer_7/model" in given["--outputs"]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            exceptions.ResourceExhausted("no T4 left"),
            InputError,
            "Expected enough quota to run the training job. Received: no",
        ),
        (exceptions.NotFound("no image"), InputError, "Expected all that it takes to run the training job."),
        (
            exceptions.PermissionDenied("no rights"),
            InputError,
            "Expected permission to run the training job.",
        ),
        (
            exceptions.InvalidArgument("a machine"),
            InputError,
            "Expected settings that Vertex AI takes to run the",
        ),
        (
            exceptions.ServiceUnavailable("not now"),
            RuntimeError,
            "Expected Vertex AI to run the training job.",
        ),
        (
            exceptions.DeadlineExceeded("too slow"),
            RuntimeError,
            "Expected Vertex AI to run the training job.",
        ),
    ],
)
def test_trainer_that_vertex_refuses_ends_in_one_line(google_cloud: VertexStandIn, error, kind: type, message: str):
    google_cloud.faults.append(("CreateCustomJob", error))

    with pytest.raises(kind) as caught:
        train()

    assert str(caught.value).startswith(message)
    assert f"Received: {error.message}. " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not google_cloud.custom_jobs


def test_trainer_says_in_one_line_why_its_job_failed(google_cloud: VertexStandIn, tmp_path: Path):
    def fail(job) -> None:
        raise RuntimeError("The replica workerpool0-0 exited with a non-zero status of 1.")

    google_cloud.jobs.run_custom_job = fail

    with pytest.raises(RuntimeError) as caught:
        train()

    line = str(caught.value)
    (name,) = google_cloud.custom_jobs
    assert line.startswith(f"Expected the training job {name} to succeed. Received: failed: ")
    assert "The replica workerpool0-0 exited with a non-zero status of 1." in line
    assert "https://console.cloud.google.com/vertex-ai/locations/europe-west4/training/" in line
    assert "\n" not in line


def test_trainer_leaves_sigterm_as_it_was(google_cloud: VertexStandIn):
    before = signal.getsignal(signal.SIGTERM)

    train()

    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("executor", "is_answered"),
    [("CustomJobExecutor", True), ("CustomJobTunerExecutor", False)],
    ids=["while it waits for the job", "while it asks for the job"],
)
def test_step_that_is_ended_cancels_its_job(google_cloud: VertexStandIn, tmp_path: Path, executor: str, is_answered: bool):
    is_over = threading.Event()
    google_cloud.jobs.run_custom_job = lambda job: is_over.wait()
    google_cloud.jobs.finish_at_once = not is_answered
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            step_command(executor, tmp_path), cwd=ROOT, env={**os.environ, **google_cloud.environment}, stderr=log, stdout=log
        )
    try:
        waited_for = "GetCustomJob" if is_answered else "CreateCustomJob"
        follow(process, lambda: google_cloud.sent(waited_for) and google_cloud.custom_jobs)
        process.send_signal(signal.SIGTERM)
        code = process.wait(120)
    finally:
        process.kill()
        is_over.set()

    output = (tmp_path / "log").read_text()
    (job,) = google_cloud.custom_jobs.values()
    assert job.display_name == RUN, output
    assert job.state.name == "JOB_STATE_CANCELLED", output
    assert code == 128 + signal.SIGTERM, output
    assert f"SIGTERM: cancelled {job.name}" in output


def step_command(executor: str, folder: Path) -> list[str]:
    """Makes the command that Vertex AI Pipelines starts for a step, with what it puts in the place of `{{$}}`."""
    output, title, function, arguments_key = {
        "CustomJobExecutor": ("model", "tfx.Model", "run_fn", "ai_platform_training_args"),
        "CustomJobTunerExecutor": ("best_hyperparameters", "tfx.HyperParameters", "tuner_fn", "ai_platform_tuning_args"),
    }[executor]
    invocation = pipeline_spec_pb2.ExecutorInput()
    invocation.outputs.output_file = str(folder / "output.json")
    artifact = invocation.outputs.artifacts[output].artifacts.add(name="1", uri=f"{RUN_ROOT}/Step_7/{output}")
    artifact.type.instance_schema = f"title: {title}\ntype: object\n"
    invocation.inputs.parameters[function].string_value = "module.function"
    invocation.inputs.parameters["custom_config"].string_value = custom_config(arguments_key)
    return [
        *(sys.executable, "-m", "tfx.orchestration.kubeflow.v2.container.kubeflow_v2_run_executor"),
        *("--executor_class_path", f"pipeline.custom_job.{executor}"),
        *("--json_serialized_invocation_args", json_format.MessageToJson(invocation)),
    ]


def follow(process: subprocess.Popen, condition: Callable[[], object]) -> None:
    while not condition():
        assert process.poll() is None, process.args
        time.sleep(0.05)
