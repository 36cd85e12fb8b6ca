import pytest
from google.cloud.aiplatform_v1 import types
from google.protobuf import duration_pb2

from data.errors import InputError, validate
from pipeline.vertex import (
    MAX_NAME,
    PREBUILT_GPU_SERVING_IMAGE,
    PREBUILT_SERVING_IMAGE,
    VertexConfig,
    beam_args,
    require_name,
    require_settings,
    serving_args,
    serving_image,
    training_job,
    training_step,
)

COMPLETE = {"project": "p", "bucket": "gs://b/", "image": "host/image:1"}
STEP = {"train_on": "pipeline_step"}


def test_require_settings_takes_what_is_complete():
    require_settings(VertexConfig(**COMPLETE))


def test_require_settings_names_all_that_is_missing():
    with pytest.raises(InputError) as caught:
        require_settings(VertexConfig(project="p"))

    assert str(caught.value) == (
        "Expected `vertex.bucket`, `vertex.image` to be set. Received: nothing. "
        "Set it in the TOML file or as TFX_VISION_VERTEX__BUCKET, TFX_VISION_VERTEX__IMAGE."
    )


def test_require_settings_wants_a_bucket_on_google_cloud():
    with pytest.raises(InputError, match=r"^Expected `vertex.bucket` to begin with gs://. Received: 'b'\.$"):
        require_settings(VertexConfig(**COMPLETE | {"bucket": "b"}))


@pytest.mark.parametrize("settings", [{"accelerator_type": ""}, {"accelerator_count": 0}])
def test_vertex_config_wants_type_and_count_of_gpus_together(settings):
    with pytest.raises(InputError) as caught:
        validate(VertexConfig, settings)

    assert str(caught.value).startswith(
        "Expected `vertex.accelerator_type` and `vertex.accelerator_count` both set or both empty. Received: "
    )
    assert str(caught.value).endswith('For no GPU, set accelerator_type = "" and accelerator_count = 0.')


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": {"Team": "x"}}, "Expected `vertex.labels` in lower case"),
        ({"labels": {"team": "Ü"}}, "Expected `vertex.labels` in lower case"),
        ({"traffic_steps": [50, 10]}, "Expected `vertex.traffic_steps` to be growing percentages"),
        ({"traffic_steps": [0, 100]}, "Expected `vertex.traffic_steps` to be growing percentages"),
        ({"traffic_steps": [10, 101]}, "Expected `vertex.traffic_steps` to be growing percentages"),
        ({"traffic_steps": []}, "Expected `traffic_steps` to be valid"),
        ({"min_replicas": 3, "max_replicas": 2}, "Expected `vertex.max_replicas` of `vertex.min_replicas` (3) or more"),
        ({"explanations": "xrai"}, 'Expected `vertex.explanations` with `vertex.serving_container = "prebuilt"`'),
        ({"tensorboard": "mine"}, "Expected `tensorboard` to be valid"),
        ({"network": "default"}, "Expected `network` to be valid"),
    ],
)
def test_vertex_config_refuses_what_google_would(settings, message):
    with pytest.raises(InputError) as caught:
        validate(VertexConfig, settings)

    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accelerator_type": "NVIDIA_L4"}, "In `vertex.machine_type`: Expected a machine type that takes NVIDIA_L4"),
        ({"serving_accelerator_type": "NVIDIA_TESLA_T4", "serving_accelerator_count": 3}, "In `vertex.serving_machine_type`: "),
        ({"region": "europe-north1"}, "In `vertex.machine_type`: Expected a region that has NVIDIA_TESLA_T4"),
        ({"region": "us-central1-a"}, "Expected `vertex.region` to be a region"),
        ({"train_on": "pipeline_step", "spot": True}, "Expected `vertex.num_machines`, `vertex.spot` and"),
        (
            STEP | {"accelerator_type": "NVIDIA_BANANA"},
            "In `vertex.accelerator_type`: Expected a GPU that Vertex AI has: NVIDIA",
        ),
        (STEP | {"accelerator_count": 3}, "In `vertex.accelerator_type`: Expected 1, 2, 4 of NVIDIA_TESLA_T4, as machines"),
        (
            STEP | {"accelerator_type": "NVIDIA_B200"},
            "In `vertex.accelerator_type`: Expected 8 of NVIDIA_B200, as machines have",
        ),
        (STEP | {"region": "europe-north1"}, "In `vertex.accelerator_type`: Expected a region that has NVIDIA_TESLA_T4"),
        ({"tensorboard": "projects/1/locations/l/tensorboards/2"}, "Expected `vertex.service_account` beside"),
    ],
)
def test_require_settings_refuses_what_cannot_be(settings, message):
    with pytest.raises(InputError) as caught:
        require_settings(VertexConfig(**COMPLETE, **settings))

    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("where", [{}, STEP])
def test_require_settings_takes_gpus_that_the_table_does_not_know_when_told_so(where):
    require_settings(VertexConfig(**COMPLETE, **where, region="europe-north1", check_accelerators=False))


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("", 0),
        ("NVIDIA_TESLA_T4", 4),
        ("NVIDIA_TESLA_V100", 8),
        ("NVIDIA_L4", 2),
        ("NVIDIA_TESLA_A100", 16),
        ("NVIDIA_B200", 8),
    ],
)
def test_require_settings_asks_no_machine_type_of_a_step(kind, count):
    settings = {"accelerator_type": kind, "accelerator_count": count, "machine_type": "e2-standard-4"}

    require_settings(VertexConfig(**COMPLETE, **STEP, **settings))


@pytest.mark.parametrize("name", ["f", "flowers-2024", "f" * MAX_NAME])
def test_require_name_takes_names_that_runs_can_be_named_after(name):
    require_name(name)


@pytest.mark.parametrize("name", ["2024-flowers", "f" * (MAX_NAME + 1), "-flowers"])
def test_require_name_refuses_what_no_run_can_be_named_after(name):
    with pytest.raises(InputError) as caught:
        require_name(name)

    assert str(caught.value) == (
        "Expected the name of a compiled pipeline to begin with a letter and to have at most 100 characters, as its runs are "
        f"named after it. Received: {name!r}. Set `pipeline.name`, or TFX_VISION_PIPELINE__NAME."
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image": ""}, "Expected `vertex.image` to be set"),
        ({"dataflow": True, "project": ""}, "Expected `vertex.project` to be set"),
        ({"deployer": "canary"}, 'Expected `vertex.deployer = "none"` on Kubeflow'),
        ({"num_machines": 2}, "Expected one machine on Kubeflow"),
    ],
)
def test_require_settings_refuses_what_kubeflow_cannot(settings, message):
    with pytest.raises(InputError) as caught:
        require_settings(VertexConfig(**COMPLETE | settings), "kubeflow")

    assert str(caught.value).startswith(message)


def test_require_settings_asks_for_no_project_on_kubeflow():
    require_settings(VertexConfig(bucket="gs://b", image="i", machine_type="my-node"), "kubeflow")


def custom_job(config: VertexConfig) -> types.CustomJob:
    """What TFX makes of a training job, as Vertex AI's own message."""
    job = training_job(config)
    assert job.pop("project") == "p"
    return types.CustomJob(display_name="training", **job)


def test_training_job_is_one_machine_with_a_gpu():
    job = custom_job(VertexConfig(**COMPLETE, labels={"team": "vision"}))

    (pool,) = job.job_spec.worker_pool_specs
    assert (pool.machine_spec.machine_type, pool.replica_count) == ("n1-standard-8", 1)
    assert pool.machine_spec.accelerator_type == types.AcceleratorType.NVIDIA_TESLA_T4
    assert pool.machine_spec.accelerator_count == 1
    assert pool.container_spec.image_uri == "host/image:1"
    assert pool.disk_spec.boot_disk_size_gb == 100
    assert job.job_spec.scheduling.strategy == types.Scheduling.Strategy.STRATEGY_UNSPECIFIED
    assert not job.job_spec.scheduling.restart_job_on_worker_restart
    assert types.Scheduling.pb(job.job_spec.scheduling).timeout == duration_pb2.Duration(seconds=24 * 3600)
    assert not job.job_spec.service_account
    assert dict(job.labels) == {"team": "vision"}


def test_training_job_of_several_machines_has_a_chief_and_workers():
    settings = {"machine_type": "a2-highgpu-4g", "accelerator_type": "NVIDIA_TESLA_A100", "accelerator_count": 4}

    job = custom_job(VertexConfig(**COMPLETE, **settings, num_machines=4))

    chief, workers = job.job_spec.worker_pool_specs
    assert (chief.replica_count, workers.replica_count) == (1, 3)
    assert chief.machine_spec == workers.machine_spec
    assert workers.container_spec.image_uri == "host/image:1"


def test_training_job_pools_have_containers_of_their_own():
    chief, workers = training_job(VertexConfig(**COMPLETE, num_machines=2))["job_spec"]["worker_pool_specs"]

    assert chief["container_spec"] is not workers["container_spec"]  # TFX writes the command into each


def test_training_job_on_spot_machines_starts_a_lost_worker_anew():
    scheduling = custom_job(VertexConfig(**COMPLETE, spot=True, timeout_hours=1.5)).job_spec.scheduling

    assert scheduling.strategy == types.Scheduling.Strategy.SPOT
    assert scheduling.restart_job_on_worker_restart
    assert types.Scheduling.pb(scheduling).timeout.seconds == 5400
    assert not types.Scheduling.pb(scheduling).HasField("max_wait_duration")  # of another strategy


def test_training_job_logs_to_a_tensorboard_instance():
    tensorboard = "projects/1/locations/l/tensorboards/2"
    settings = {"tensorboard": tensorboard, "service_account": "me@p", "network": "projects/1/global/networks/n"}

    spec = custom_job(VertexConfig(**COMPLETE, **settings)).job_spec

    assert (spec.tensorboard, spec.service_account, spec.network) == tuple(settings.values())
    assert spec.base_output_directory.output_uri_prefix == "gs://b/tensorboard"


def test_training_job_without_a_gpu_names_none():
    job = training_job(VertexConfig(**COMPLETE, accelerator_type="", accelerator_count=0))

    assert job["job_spec"]["worker_pool_specs"][0]["machine_spec"] == {"machine_type": "n1-standard-8"}


@pytest.mark.parametrize(("engine", "gpu"), [("vertex", "NVIDIA_TESLA_T4"), ("kubeflow", "nvidia.com/gpu")])
def test_training_step_asks_for_a_gpu_in_the_words_of_its_engine(engine, gpu):
    resources = training_step(VertexConfig(**COMPLETE, step_cpus=4, step_memory_gb=15), engine)

    assert (resources.cpu_limit, resources.memory_limit) == (4, 15)
    assert (resources.accelerator.type, resources.accelerator.count) == (gpu, 1)


def test_training_step_without_a_gpu_asks_for_none():
    resources = training_step(VertexConfig(**COMPLETE, accelerator_type="", accelerator_count=0), "vertex")

    assert not resources.HasField("accelerator")


@pytest.mark.parametrize(
    ("settings", "image"),
    [
        ({}, "host/image:1"),
        ({"serving_image": "host/other:2"}, "host/other:2"),
        ({"serving_container": "prebuilt"}, PREBUILT_SERVING_IMAGE),
        (
            {"serving_container": "prebuilt", "serving_accelerator_type": "NVIDIA_TESLA_T4", "serving_accelerator_count": 1},
            PREBUILT_GPU_SERVING_IMAGE,
        ),
    ],
)
def test_serving_image_follows_the_choice_of_container(settings, image):
    assert serving_image(VertexConfig(**COMPLETE, **settings)) == image


@pytest.mark.parametrize(("endpoint", "name"), [("", "flowers"), ("shared", "shared")])
def test_serving_args_name_the_endpoint(endpoint, name):
    assert serving_args(VertexConfig(**COMPLETE, endpoint=endpoint, max_replicas=2), "flowers") == {
        "project_id": "p",
        "endpoint_name": name,
        "machine_type": "n1-standard-4",
        "min_replica_count": 1,
        "max_replica_count": 2,
    }


def test_beam_args_are_understood_by_beam():
    from apache_beam.options.pipeline_options import (
        GoogleCloudOptions,
        PipelineOptions,
        StandardOptions,
        WorkerOptions,
    )

    config = VertexConfig(
        **COMPLETE | {"bucket": "gs://b"},
        region="europe-west4",
        service_account="me@p",
        dataflow_max_workers=3,
        dataflow_machine_type="n2-standard-2",
        dataflow_subnetwork="regions/r/subnetworks/s",
        dataflow_public_ips=False,
        labels={"team": "vision", "cost": "7"},
    )

    options = PipelineOptions(beam_args(config, "flowers", "vertex"))

    cloud, workers = options.view_as(GoogleCloudOptions), options.view_as(WorkerOptions)
    assert options.view_as(StandardOptions).runner == "DataflowRunner"
    assert (cloud.project, cloud.region, cloud.temp_location) == ("p", "europe-west4", "gs://b/tmp/flowers")
    assert cloud.service_account_email == "me@p"
    assert cloud.labels == ["cost=7", "team=vision"]
    assert (workers.max_num_workers, workers.sdk_container_image) == (3, "host/image:1")
    assert (workers.machine_type, workers.subnetwork) == ("n2-standard-2", "regions/r/subnetworks/s")
    assert workers.use_public_ips is False


def test_beam_args_leave_the_service_account_to_the_project():
    assert not [arg for arg in beam_args(VertexConfig(**COMPLETE), "flowers", "vertex") if "service_account" in arg]


@pytest.mark.parametrize(
    ("engine", "dataflow", "runner"),
    [
        ("vertex", None, "DataflowRunner"),
        ("vertex", False, "FnApiRunner"),
        ("kubeflow", None, "FnApiRunner"),
        ("kubeflow", True, "DataflowRunner"),
    ],
)
def test_beam_args_go_to_dataflow_on_vertex_by_default(engine, dataflow, runner):
    assert f"--runner={runner}" in beam_args(VertexConfig(**COMPLETE, dataflow=dataflow), "flowers", engine)
