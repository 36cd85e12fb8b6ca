"""What `kubeflow_runner.py --check` says of quotas, against the stand-in's REST APIs."""

import cloud_apis
import pytest
import vertex_stand_in
from cloud_apis import PROJECT, REGION, SERVING_CPUS, TRAINING_GPUS, lines, problems, settings

from pipeline.cloud_check import check_cloud

pytestmark = pytest.mark.one_stack
google_cloud = vertex_stand_in.google_cloud
apis = cloud_apis.apis


def test_check_compares_the_quota_of_gpus(apis, capfd):
    apis.limits[TRAINING_GPUS] = {REGION: 0, "": 8}

    assert check_cloud(settings()) == 2
    ((state, subject, text),) = problems(capfd)
    assert (state, subject) == ("missing", "quota")
    assert text == (
        "1 NVIDIA_TESLA_T4 of training in us-central1; the quota has 0. Ask for more: https://console.cloud.google.com/iam-admin/"
        f"quotas?project={PROJECT}&metric={TRAINING_GPUS.replace('/', '%2F')}"
    )


def test_check_counts_the_gpus_of_all_machines(apis, capfd):
    assert check_cloud(settings("vertex.num_machines=3")) == 2
    assert problems(capfd)[0][2].startswith("3 NVIDIA_TESLA_T4 of training in us-central1; the quota has 2.")


def test_check_looks_at_the_quota_of_spot_machines(apis, capfd):
    assert check_cloud(settings("vertex.spot=true")) == 2
    ((_, _, text),) = problems(capfd)
    assert text.startswith("8 CPUs of training on spot machines in us-central1; the quota has 1.")


@pytest.mark.parametrize(
    ("limit", "code", "text"),
    [
        ({"": -1}, 0, "the quota has no limit"),
        ({"": 2}, 0, "the quota has 2"),
        ({"": 1}, 2, "the quota has 1."),
        (None, 0, "no API tells the limit"),
    ],
)
def test_check_counts_a_canary_beside_the_model_that_serves(apis, capfd, limit, code, text):
    metric = "aiplatform.googleapis.com/custom_model_serving_nvidia_l4_gpus"
    del apis.limits[metric]
    if limit:
        apis.limits[metric] = limit
    serving = ["machine_type=g2-standard-8", "accelerator_type=NVIDIA_L4", "accelerator_count=1"]

    assert check_cloud(settings(*(f"vertex.serving_{one}" for one in serving))) == code
    (found,) = [line for _, _, line in lines(capfd) if "of serving" in line]
    assert found.startswith("2 NVIDIA_L4 of serving in us-central1")
    assert text in found


@pytest.mark.parametrize(
    ("compute", "state", "text"),
    [
        ({"CPUS": (12.0, 10.0)}, "missing", "4 CPUs of Dataflow's workers in us-central1; the quota has 2."),
        ({"CPUS": (16.0, 0.0)}, "note", "32 CPUs of Dataflow's workers in us-central1 would be used, the quota has 16:"),
        ({"IN_USE_ADDRESSES": (4.0, 4.0)}, "missing", "1 addresses of Dataflow's workers in us-central1; the quota has 0."),
        ({"IN_USE_ADDRESSES": (4.0, 0.0)}, "note", "8 addresses of Dataflow's workers in us-central1 would be used,"),
    ],
)
def test_check_compares_the_quota_of_dataflow(apis, capfd, compute, state, text):
    apis.compute |= compute

    assert check_cloud(settings()) == (2 if state == "missing" else 0)
    ((found, subject, line),) = problems(capfd)
    assert (found, subject) == (state, "quota")
    assert line.startswith(text)


def test_check_looks_at_the_quota_of_the_machines_own_series(apis, capfd):
    assert check_cloud(settings("vertex.dataflow_machine_type=n2-standard-8")) == 0
    assert problems(capfd)[0][2].startswith("64 CPUs of Dataflow's workers in us-central1 would be used, the quota has 8:")


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        ([], 8),
        (["vertex.min_replicas=3", "vertex.max_replicas=3"], 24),
        (["vertex.deployer=tfx"], 4),
        (["vertex.serving_accelerator_type=NVIDIA_TESLA_T4", "vertex.serving_accelerator_count=1"], 8),
    ],
)
def test_check_counts_the_cpus_of_serving(apis, capfd, overrides, needed):
    apis.limits[SERVING_CPUS] = {"": needed}
    assert check_cloud(settings(*overrides)) == 0
    assert f"{needed} CPUs of serving in us-central1; the quota has {needed}" in [text for _, _, text in lines(capfd)]

    apis.limits[SERVING_CPUS] = {"": needed - 1}
    assert check_cloud(settings(*overrides)) == 2
    assert [text.partition(".")[0] for state, _, text in lines(capfd) if state == "missing"] == [
        f"{needed} CPUs of serving in us-central1; the quota has {needed - 1}"
    ]


def test_check_looks_at_no_quota_of_serving_where_nothing_is_deployed(apis, capfd):
    assert check_cloud(settings("vertex.deployer=none")) == 0
    assert not [text for _, _, text in lines(capfd) if "of serving" in text]


def test_check_lives_with_a_quota_of_serving_that_has_another_name(apis, capfd):
    del apis.limits[SERVING_CPUS]

    assert check_cloud(settings()) == 0
    ((state, subject, text),) = problems(capfd)
    assert (state, subject) == ("note", "quota")
    assert text.startswith("8 CPUs of serving in us-central1: no API tells the limit.")
