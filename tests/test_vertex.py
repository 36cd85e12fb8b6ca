import pytest

from data.errors import InputError, validate
from pipeline.vertex import VertexConfig, dataflow_args, require_settings, serving_args, training_job

COMPLETE = {"project": "p", "bucket": "gs://b/", "image": "host/image:1"}


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


def test_training_job_is_one_machine_with_a_gpu():
    assert training_job(VertexConfig(**COMPLETE)) == {
        "project": "p",
        "worker_pool_specs": [
            {
                "machine_spec": {
                    "machine_type": "n1-standard-8",
                    "accelerator_type": "NVIDIA_TESLA_T4",
                    "accelerator_count": 1,
                },
                "replica_count": 1,
                "container_spec": {"image_uri": "host/image:1"},
            }
        ],
    }


def test_training_job_without_a_gpu_names_none():
    config = VertexConfig(**COMPLETE, accelerator_type="", accelerator_count=0, service_account="me@p")

    job = training_job(config)

    assert job["worker_pool_specs"][0]["machine_spec"] == {"machine_type": "n1-standard-8"}
    assert job["service_account"] == "me@p"


@pytest.mark.parametrize(("endpoint", "name"), [("", "flowers"), ("shared", "shared")])
def test_serving_args_name_the_endpoint(endpoint, name):
    assert serving_args(VertexConfig(**COMPLETE, endpoint=endpoint), "flowers") == {
        "project_id": "p",
        "endpoint_name": name,
        "machine_type": "n1-standard-4",
    }


def test_dataflow_args_are_understood_by_beam():
    from apache_beam.options.pipeline_options import (
        GoogleCloudOptions,
        PipelineOptions,
        StandardOptions,
        WorkerOptions,
    )

    config = VertexConfig(
        **COMPLETE | {"bucket": "gs://b"}, region="europe-west4", service_account="me@p", dataflow_max_workers=3
    )

    options = PipelineOptions(dataflow_args(config, "flowers"))

    cloud, workers = options.view_as(GoogleCloudOptions), options.view_as(WorkerOptions)
    assert options.view_as(StandardOptions).runner == "DataflowRunner"
    assert (cloud.project, cloud.region, cloud.temp_location) == ("p", "europe-west4", "gs://b/tmp/flowers")
    assert cloud.service_account_email == "me@p"
    assert (workers.max_num_workers, workers.sdk_container_image) == (3, "host/image:1")


def test_dataflow_args_leave_the_service_account_to_the_project():
    assert not [arg for arg in dataflow_args(VertexConfig(**COMPLETE), "flowers") if "service_account" in arg]
