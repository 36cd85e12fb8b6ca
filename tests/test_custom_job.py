"""TFX's Trainer with the real SDK against the stand-in of Vertex AI: what it asks for, and how it ends."""

import json
from pathlib import Path

import pytest
import vertex_stand_in
from google.api_core import exceptions
from google.cloud.aiplatform_v1 import types
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


@pytest.fixture(autouse=True)
def quick(google_cloud: VertexStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """TFX looks at a job every 30 s."""
    monkeypatch.setattr(runner, "_POLLING_INTERVAL_IN_SECONDS", 0.1)


def train(**settings) -> None:
    """Runs the Trainer's step."""
    config = VertexConfig(**SETTINGS | settings)
    model, examples = standard_artifacts.Model(), standard_artifacts.Examples()
    model.uri, examples.uri = "gs://bucket/pipeline_root/Trainer/model", "gs://bucket/pipeline_root/ImportExampleGen/examples"
    custom_config = {
        "ai_platform_enable_vertex": True,
        "ai_platform_vertex_region": config.region,
        "ai_platform_training_args": training_job(config),
        "trainer": {"class_names": ["daisy", "rose"]},
    }
    properties = {"run_fn": "models.trainer.run_fn", "custom_config": json.dumps(custom_config)}
    CustomJobExecutor().Do({"examples": [examples]}, {"model": [model]}, properties)


def test_trainer_asks_for_the_whole_job(google_cloud: VertexStandIn):
    train()

    (request,) = google_cloud.sent("CreateCustomJob")
    assert request.parent == "projects/test-project/locations/europe-west4"
    job, spec = request.custom_job, request.custom_job.job_spec
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
    assert "gs://bucket/pipeline_root/ImportExampleGen/examples" in given["--inputs"]
    assert "gs://bucket/pipeline_root/Trainer/model" in given["--outputs"]


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
