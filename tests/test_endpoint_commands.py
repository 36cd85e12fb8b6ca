import endpoint_models
import pytest
import tensorflow as tf
import vertex_stand_in
from endpoint_models import changes, refuse
from google.api_core import exceptions
from vertex_stand_in import Fault

from data.errors import InputError

pytestmark = pytest.mark.one_stack
google_cloud = vertex_stand_in.google_cloud
shop = endpoint_models.shop


def test_promote_goes_on_from_the_share_that_the_canary_has(shop):
    shop.deploy(1)
    shop.deploy(2, steps=(10,))
    since = len(shop.cloud.requests)

    halfway = shop.rollout().promote(None, (30,))

    assert (halfway.traffic_percent, shop.traffic) == (30, {"1": 70, "2": 30})
    assert shop.rollout().promote(shop.references(2), (50, 100)).traffic_percent == 100
    assert (shop.traffic, shop.versions) == ({"2": 100}, [(["previous"], ""), (["default"], "")])
    splits = [sorted(request.endpoint.traffic_split.values()) for request in shop.cloud.sent("UpdateEndpoint")]
    assert splits == [[30, 70], [50, 50], [100]]
    checks = [report.split(" %")[0] for report in shop.reports if "answered as expected" in report]
    # The share that it has is checked again, as nobody knows whether it was.
    assert checks[1:] == [f"Version 2 has {share}" for share in (10, 10, 30, 30, 50, 100)]
    assert "UploadModel" not in changes(shop.cloud, since)


def test_promote_wants_a_version_on_trial(shop):
    with pytest.raises(InputError, match=r"Expected an endpoint 'flowers' in us-central1. Received: none"):
        shop.rollout().promote(None, (100,))
    shop.deploy(1)

    with pytest.raises(InputError, match=r"Expected one version on trial on .* flowers. Received: version 1 with 100 %\."):
        shop.rollout().promote(None, (100,))

    assert shop.traffic == {"1": 100}


def test_promote_wants_reference_predictions(shop):
    shop.deploy(1)
    shop.deploy(2, steps=(10,))
    tf.io.gfile.remove(shop.references(2))

    with pytest.raises(InputError, match=r"Expected reference predictions beside gs://.*Name the file with --references"):
        shop.rollout().promote(None, (100,))

    assert shop.traffic == {"1": 90, "2": 10}
    assert shop.rollout().promote(None, (100,), is_checked=False).traffic_percent == 100


def test_rollback_takes_a_canary_back(shop):
    shop.deploy(1)
    shop.deploy(2, steps=(10,))

    deployment = shop.rollout().rollback()

    assert deployment.model_version.endswith("@1")
    assert (shop.traffic, shop.versions) == ({"1": 100}, [(["default"], ""), ([], "withdrawn")])


def test_rollback_goes_back_to_the_previous_version(shop):
    shop.deploy(1)
    shop.deploy(2)
    since = len(shop.cloud.requests)

    deployment = shop.rollout().rollback()

    assert changes(shop.cloud, since) == [
        "DeployModel",
        "MergeVersionAliases",
        "UpdateModel",
        "MergeVersionAliases",
        "UndeployModel",
    ]
    assert dict(shop.cloud.sent("DeployModel")[-1].traffic_split) == {"0": 100}
    assert (deployment.model_version.rpartition("@")[2], deployment.traffic_percent) == ("1", 100)
    assert (shop.traffic, shop.versions) == ({"1": 100}, [(["default"], ""), (["previous"], "withdrawn")])
    with pytest.raises(
        InputError, match=r"Received: version 2, which was itself taken back\. Version 1 .* Name one with --version: 2"
    ):
        shop.rollout().rollback()
    shop.rollout().rollback("2")
    assert (shop.traffic, shop.versions) == ({"2": 100}, [(["previous"], "withdrawn"), (["default"], "")])


def test_rollback_goes_back_to_a_version_by_its_number(shop):
    for number in (1, 2, 3):
        shop.deploy(number)

    shop.rollout().rollback("1")

    assert (shop.traffic, shop.versions) == ({"1": 100}, [(["default"], ""), ([], ""), (["previous"], "withdrawn")])
    since = len(shop.cloud.requests)
    assert shop.rollout().rollback("1").traffic_percent == 100
    assert changes(shop.cloud, since) == []
    with pytest.raises(
        InputError, match=r"Expected a version to go back to. Received: version 9\. Version 1 has all .* --version: 2, 3"
    ):
        shop.rollout().rollback("9")


@pytest.mark.parametrize("who", ["rollback", "the check"])
def test_rollback_goes_no_further_back_than_what_was_taken_back_last(shop, who):
    shop.deploy(1)
    shop.deploy(2)
    if who == "rollback":
        shop.deploy(3, steps=(10,))
        shop.rollout().rollback()
    else:
        with pytest.raises(RuntimeError, match="is refused"):
            shop.deploy(3, answer=refuse)

    for _ in range(2):
        with pytest.raises(InputError, match=r"version 3, which was itself taken back. Version 2 has all .* --version: 1, 3"):
            shop.rollout().rollback()

    verdict = "withdrawn" if who == "rollback" else "refused"
    assert (shop.traffic, shop.versions) == ({"2": 100}, [(["previous"], ""), (["default"], ""), ([], verdict)])
    shop.rollout().rollback("1")
    assert shop.traffic == {"1": 100}


def test_rollback_wants_a_version_to_go_back_to(shop):
    shop.deploy(1)

    with pytest.raises(
        InputError,
        match=r"Expected a version to go back to. Received: none\. Version 1 has all of the traffic\. There is no other",
    ):
        shop.rollout().rollback()

    assert shop.traffic == {"1": 100}


def test_rollback_leaves_the_present_version_serving_after_a_failure(shop):
    shop.deploy(1)
    shop.deploy(2)
    shop.cloud.faults.append(("DeployModel", Fault(exceptions.InternalServerError("exited"), "half_way")))

    with pytest.raises(RuntimeError, match=r"Expected Vertex AI to deploy version 1.* Version 2 has all of the traffic"):
        shop.rollout().rollback()

    assert (shop.traffic, shop.versions) == ({"2": 100}, [(["previous"], ""), (["default"], "")])


def test_undeploy_takes_what_has_no_traffic(shop):
    shop.deploy(1)
    shop.cloud.faults.append(("UndeployModel", exceptions.InternalServerError("oops")))
    with pytest.raises(RuntimeError):
        shop.deploy(2)
    assert shop.traffic == {"1": 0, "2": 100}

    shop.rollout().undeploy(everything=False, delete_endpoint=False)

    assert shop.traffic == {"2": 100}
    with pytest.raises(InputError, match="Expected --all with --delete-endpoint, as the endpoint flowers has traffic"):
        shop.rollout().undeploy(everything=False, delete_endpoint=True)


def test_undeploy_takes_everything_and_may_be_repeated(shop):
    shop.deploy(1)
    shop.deploy(2, steps=(10,))

    shop.rollout().undeploy(everything=True, delete_endpoint=False)

    assert (shop.traffic, len(shop.cloud.endpoints)) == ({}, 1)
    for _ in range(2):
        shop.rollout().undeploy(everything=True, delete_endpoint=True)
        assert not shop.cloud.endpoints
    assert shop.reports[-1] == "There is no endpoint flowers"
    assert len(shop.versions) == 2


def _fail(shop, method, command):
    shop.cloud.faults.append((method, exceptions.InternalServerError("oops")))
    with pytest.raises(RuntimeError, match=r"Received: .*oops") as caught:
        command()
    assert (shop.cloud.faults, len(str(caught.value).splitlines())) == ([], 1)


@pytest.mark.parametrize("method", ["UpdateEndpoint", "Predict", "MergeVersionAliases", "UndeployModel"])
def test_promote_leaves_one_model_serving_after_a_failure(shop, method):
    shop.deploy(1)
    shop.deploy(2, steps=(10,))

    _fail(shop, method, lambda: shop.rollout().promote(None, (100,)))

    serving = "2" if method == "UndeployModel" else "1"  # it had been accepted, or is taken back
    assert {version: share for version, share in shop.traffic.items() if share} == {serving: 100}


@pytest.mark.parametrize("method", ["DeployModel", "MergeVersionAliases", "UpdateModel", "UndeployModel"])
def test_rollback_may_be_repeated_after_a_failure(shop, method):
    shop.deploy(1)
    shop.deploy(2)

    _fail(shop, method, shop.rollout().rollback)

    assert sum(shop.traffic.values()) == 100
    shop.rollout().rollback()
    assert (shop.traffic, shop.versions) == ({"1": 100}, [(["default"], ""), (["previous"], "withdrawn")])


@pytest.mark.parametrize("method", ["UpdateEndpoint", "UndeployModel", "DeleteEndpoint"])
def test_undeploy_may_be_repeated_after_a_failure(shop, method):
    shop.deploy(1)

    _fail(shop, method, lambda: shop.rollout().undeploy(everything=True, delete_endpoint=True))

    assert len(shop.cloud.endpoints) == 1
    shop.rollout().undeploy(everything=True, delete_endpoint=True)
    assert not shop.cloud.endpoints
