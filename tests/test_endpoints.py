import contextlib
import tempfile
import threading
from pathlib import Path

import pytest
import tensorflow as tf
import vertex_stand_in
from endpoint_models import IMAGE_URI, NUM_IMAGES, PIPELINE, Shop, answer_of
from google.api_core import exceptions
from google.api_core.gapic_v1.method import _GapicCallable
from google.cloud.aiplatform_v1 import EndpointServiceClient, types
from google.protobuf import json_format
from vertex_stand_in import Fault

from data.errors import InputError
from pipeline import canary, cloud_calls

pytestmark = pytest.mark.one_stack
google_cloud = vertex_stand_in.google_cloud

PARENT = "projects/test-project/locations/us-central1"
OURS = {"tfx-vision-pipeline": PIPELINE}
TRANSIENT = exceptions.ServiceUnavailable("try again")


@pytest.fixture
def shop(google_cloud, monkeypatch):
    """An endpoint's world in which nobody waits long."""
    monkeypatch.setattr(cloud_calls, "RETRY", cloud_calls.RETRY.with_delay(0.01, 0.02).with_timeout(1.0))
    monkeypatch.setattr(cloud_calls, "POLLING", cloud_calls.POLLING.with_delay(0.02, 0.02).with_timeout(20))
    monkeypatch.setattr(canary, "_PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(canary, "_PAUSE_SECONDS", 0.01)
    return Shop(google_cloud)


def _fields(message, *names):
    """The named fields of a request that are set, as JSON has them; all of them without names."""
    found = json_format.MessageToDict(type(message).pb(message), preserving_proto_field_name=True)
    return {name: found[name] for name in names if name in found} if names else found


def _changes(cloud, since=0):
    """The names of the requests that change something, in order."""
    reading = ("List", "Get", "Predict")
    return [method for method, _ in cloud.requests[since:] if not method.startswith(reading)]


def _refuse(instances):
    raise exceptions.FailedPrecondition("the container has crashed")


def _otherwise(number, change):
    """The answers of a model with a change of each row."""

    def answer(instances):
        rows = answer_of(number)(instances)
        return [row | change(row) for row in rows]

    return answer


def _shifted(row, by=0.002):
    first, *rest, last = row["probabilities"]
    return {"probabilities": [first + by, *rest, last - by]}


def test_deploy_model_gives_the_first_model_all_of_the_traffic(shop):
    deployment = shop.deploy(1)

    assert _changes(shop.cloud) == ["CreateEndpoint", "UploadModel", "DeployModel", "MergeVersionAliases"]
    assert deployment.model_version == f"{PARENT}/models/tfx-vision-flowers@1"
    assert deployment.endpoint in shop.cloud.endpoints
    assert (deployment.deployed_model_id,) == tuple(shop.deployed_ids)
    assert deployment.traffic_percent == 100
    assert (shop.traffic, shop.versions) == ({"1": 100}, [(["default"], "")])
    assert len(shop.cloud.sent("Predict")) == NUM_IMAGES


def test_deploy_model_sends_every_field(shop):
    shop.configure(
        labels={"team": "vision"}, endpoint="Flowers in use", service_account="me@p.iam", min_replicas=2, max_replicas=5
    )
    uri = shop.model(1)

    shop.deploy(1)

    (endpoint,) = shop.cloud.sent("CreateEndpoint")
    labels = {"team": "vision", **OURS}
    assert _fields(endpoint) == {
        "parent": PARENT,
        "endpoint": {"display_name": "Flowers in use", "labels": labels},
        "endpoint_id": "tfx-vision-flowers-in-use-917b8947",
    }
    (upload,) = shop.cloud.sent("UploadModel")
    sent = _fields(upload)
    made_of = {name: sent["model"]["labels"].pop(f"tfx-vision-{name}") for name in ("digest", "container")}
    assert sent == {
        "parent": PARENT,
        "model_id": "tfx-vision-flowers",
        "model": {
            "display_name": PIPELINE,
            "artifact_uri": uri,
            "version_aliases": ["canary"],
            "container_spec": {
                "image_uri": IMAGE_URI,
                "command": ["python", "-m", "models.server"],
                "ports": [{"container_port": 8080}],
                "predict_route": "/predict",
                "health_route": "/healthz",
            },
            "labels": labels | {"tfx-vision-run": "flowers-2025-1", "tfx-vision-code": "1e3173b93d5a176f"},
        },
    }
    assert {name: len(value) for name, value in made_of.items()} == {"digest": 32, "container": 16}
    (deploy,) = shop.cloud.sent("DeployModel")
    (name,) = shop.cloud.endpoints
    assert _fields(deploy) == {
        "endpoint": name,
        "deployed_model": {
            "model": f"{PARENT}/models/tfx-vision-flowers@1",
            "display_name": "flowers-1",
            "service_account": "me@p.iam",
            "dedicated_resources": {
                "machine_spec": {"machine_type": "n1-standard-4"},
                "min_replica_count": 2,
                "max_replica_count": 5,
            },
        },
        "traffic_split": {"0": 100},
    }


def test_deploy_model_takes_vertex_ai_s_own_container_with_gpus_and_explanations(shop):
    gpus = {"serving_accelerator_type": "NVIDIA_TESLA_T4", "serving_accelerator_count": 2}
    shop.configure(serving_container="prebuilt", explanations="integrated_gradients", **gpus)

    shop.deploy(1)

    model = shop.cloud.sent("UploadModel")[0].model
    assert _fields(model, "container_spec")["container_spec"] == {
        "image_uri": "us-docker.pkg.dev/vertex-ai/prediction/tf2-gpu.2-15:latest"
    }
    output = model.explanation_spec.metadata.outputs["probabilities"]
    assert list(output.index_display_name_mapping) == ["dark", "green", "bright"]
    assert model.explanation_spec.metadata.inputs["image"].input_tensor_name == "images"
    parameters = model.explanation_spec.parameters.integrated_gradients_attribution
    assert parameters.step_count == 50
    assert 0 < parameters.blur_baseline_config.max_blur_sigma < 32
    machine = shop.cloud.sent("DeployModel")[0].deployed_model.dedicated_resources.machine_spec
    assert (machine.accelerator_type.name, machine.accelerator_count) == ("NVIDIA_TESLA_T4", 2)


def test_deploy_model_promotes_the_next_version_by_steps(shop):
    shop.deploy(1)
    (first,), since = shop.deployed_ids, len(shop.cloud.requests)

    deployment = shop.deploy(2)

    updates = ["UpdateEndpoint"] * 2
    aliases = ["MergeVersionAliases"] * 2
    assert _changes(shop.cloud, since) == ["UploadModel", "DeployModel", *updates, *aliases, "UndeployModel"]
    upload = shop.cloud.sent("UploadModel")[1]
    assert _fields(upload, "parent_model", "model_id") == {"parent_model": f"{PARENT}/models/tfx-vision-flowers"}
    second = deployment.deployed_model_id
    assert dict(shop.cloud.sent("DeployModel")[1].traffic_split) == {"0": 10, first: 90}
    sent = shop.cloud.sent("UpdateEndpoint")
    assert [dict(request.endpoint.traffic_split) for request in sent] == [{second: 50, first: 50}, {second: 100}]
    assert all(list(request.update_mask.paths) == ["traffic_split"] and request.endpoint.etag for request in sent)
    merged = [
        (request.name.rpartition("@")[2], set(request.version_aliases)) for request in shop.cloud.sent("MergeVersionAliases")
    ]
    assert merged[1:] == [("1", {"previous"}), ("2", {"default", "-canary"})]
    (undeploy,) = shop.cloud.sent("UndeployModel")
    assert (undeploy.deployed_model_id, dict(undeploy.traffic_split)) == (first, {})
    assert shop.traffic == {"2": 100}
    assert shop.versions == [(["previous"], ""), (["default"], "")]
    assert deployment.model_version.endswith("@2")
    asked = [int(report.split(" requests")[0].rpartition("(")[2]) for report in shop.reports if " requests)" in report]
    assert asked[0] == NUM_IMAGES  # of the first model
    assert asked[1] > 5 * NUM_IMAGES  # at 10 %
    assert asked[3] == NUM_IMAGES  # at 100 %


def test_deploy_model_uploads_the_same_model_once(shop):
    shop.deploy(1)
    since = len(shop.cloud.requests)

    again = shop.deploy(1, run_name="another-run")

    assert _changes(shop.cloud, since) == []
    assert (again.model_version.rpartition("@")[2], again.deployed_model_id) == ("1", shop.deployed_ids[0])
    assert "Version 1 has all of the traffic already" in shop.reports


def test_deploy_model_uploads_the_same_model_again_for_another_container(shop):
    shop.deploy(1)
    shop.configure(image=IMAGE_URI.replace(":1", ":2"))

    shop.deploy(1)

    assert shop.traffic == {"2": 100}
    assert [request.model.container_spec.image_uri[-2:] for request in shop.cloud.sent("UploadModel")] == [":1", ":2"]


def test_deploy_model_leaves_a_model_on_trial_where_the_steps_end_before_100(shop):
    shop.deploy(1)
    shop.configure(traffic_steps=(5, 20))

    deployment = shop.deploy(2)

    assert deployment.traffic_percent == 20
    assert shop.traffic == {"1": 80, "2": 20}
    assert shop.versions == [(["default"], ""), (["canary"], "")]


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
    assert "UploadModel" not in _changes(shop.cloud, since)


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


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (_otherwise(2, _shifted), r"for \d.png it answers \w+ with 0\.\d+; expected was 0\.\d+, and the limit of a difference"),
        (_otherwise(2, lambda row: {"probabilities": [float("nan")] * 3}), "is no prediction"),
        (_otherwise(2, lambda row: {"labels": ["a", "b", "c"]}), "has the classes a, b, c; expected were dark, green, bright"),
        (_otherwise(2, lambda row: {"labels": row["labels"][::-1]}), "it answers"),
        (_otherwise(2, lambda row: {"label": row["labels"][0] if row["label"] != "dark" else "green"}), "its label is"),
        (lambda instances: [["no", "row"] for _ in instances], "is no prediction"),
        (lambda instances: [], "is no prediction"),
        (_refuse, "was answered with an error: the container has crashed"),
    ],
)
def test_deploy_model_takes_back_a_model_that_answers_otherwise(shop, answer, message):
    shop.deploy(1)

    with pytest.raises(RuntimeError, match=message) as caught:
        shop.deploy(2, answer=answer)

    text = str(caught.value)
    assert text.startswith("Expected version 2 to answer on the endpoint flowers as in training. Received: ")
    assert text.endswith(" It is refused and taken back. Version 1 has all of the traffic.")
    assert len(text.splitlines()) == 1
    assert not isinstance(caught.value, InputError)
    assert (shop.traffic, shop.versions) == ({"1": 100}, [(["default"], ""), ([], "refused")])
    (versions,) = shop.cloud.models.values()
    assert versions["2"].version_description.startswith("refused: ")
    assert versions["2"].labels["tfx-vision-run"] == "flowers-2025-2"


@pytest.mark.parametrize("step", [50, 100])
def test_deploy_model_takes_back_a_model_that_fails_at_a_later_step(shop, step):
    shop.deploy(1)
    has_failed = threading.Event()

    def answer(instances):
        if max(shop.traffic.get("2", 0), 0) >= step:
            has_failed.set()
            return _otherwise(2, _shifted)(instances)
        return answer_of(2)(instances)

    with pytest.raises(RuntimeError, match=r"refused and taken back. Version 1 has all of the traffic"):
        shop.deploy(2, answer=answer)

    assert has_failed.is_set()
    assert (shop.traffic, shop.versions) == ({"1": 100}, [(["default"], ""), ([], "refused")])


def test_deploy_model_takes_a_dead_replica_back(shop):
    shop.deploy(1)

    def dead(instances):
        raise exceptions.ServiceUnavailable("no healthy upstream")

    with pytest.raises(RuntimeError, match="was answered with an error: no healthy upstream"):
        shop.deploy(2, answer=dead)

    assert shop.traffic == {"1": 100}


def test_deploy_model_takes_a_first_model_off_the_endpoint(shop):
    with pytest.raises(RuntimeError, match=r"It is refused and taken back. The endpoint serves no model now\."):
        shop.deploy(1, answer=_otherwise(1, _shifted))

    assert (shop.traffic, shop.versions) == ({}, [(["default"], "refused")])

    shop.deploy(2)

    assert (shop.traffic, shop.versions) == ({"2": 100}, [([], "refused"), (["default"], "")])


def test_deploy_model_tries_a_refused_model_again_when_it_is_asked_to(shop):
    shop.deploy(1)
    with pytest.raises(RuntimeError, match="is refused"):
        shop.deploy(2, answer=_refuse)

    shop.deploy(2)

    assert len(shop.cloud.sent("UploadModel")) == 2
    assert (shop.traffic, shop.versions) == ({"2": 100}, [(["previous"], ""), (["default"], "")])


def _deploy_by_hand(shop, version):
    """Deploys a version without traffic, as what fails half-way leaves it; returns its id."""
    (endpoint,), (model,) = shop.cloud.endpoints, shop.cloud.models
    deployed = types.DeployedModel(
        model=f"{model}@{version}",
        dedicated_resources={"machine_spec": {"machine_type": "n1-standard-4"}, "min_replica_count": 1},
    )
    client = EndpointServiceClient(client_options={"api_endpoint": "us-central1-aiplatform.googleapis.com"})
    return client.deploy_model(endpoint=endpoint, deployed_model=deployed).result().deployed_model.id


def test_deploy_model_replaces_what_a_failed_deployment_has_left(shop):
    shop.deploy(1)
    shop.deploy(2, steps=(10,))
    shop.rollout().rollback()
    left = _deploy_by_hand(shop, 2)

    deployment = shop.deploy(2, steps=(10,))

    assert deployment.deployed_model_id != left
    assert left not in shop.deployed_ids
    assert (shop.traffic, shop.versions) == ({"1": 90, "2": 10}, [(["default"], ""), (["canary"], "withdrawn")])


def test_deploy_model_does_not_go_back_to_what_never_served(shop):
    shop.deploy(1)
    shop.deploy(2, steps=(10,))
    shop.rollout().undeploy(everything=True, delete_endpoint=False)
    _deploy_by_hand(shop, 2)

    shop.deploy(1)

    assert (shop.traffic, shop.versions) == ({"1": 100}, [(["default"], ""), ([], "")])


def test_deploy_model_checks_a_first_model_again_where_it_was_killed_meanwhile(shop, monkeypatch):
    """It is the default version from the beginning and has all of the traffic, so that nothing else tells."""
    with pytest.raises(RuntimeError, match="is refused"):
        shop.deploy(1, answer=_refuse)
    kill = _Kill(monkeypatch)
    kill.on_answer = lambda: setattr(kill, "at", kill.count if shop.traffic == {"1": 100} else None)
    with pytest.raises(_KilledError):
        shop.deploy(1)
    kill.start()
    since = len(shop.cloud.sent("Predict"))

    shop.deploy(1)

    assert len(shop.cloud.sent("Predict")) == since + NUM_IMAGES
    assert shop.versions == [(["default"], "")]


def test_deploy_model_gives_up_on_a_model_that_gets_no_requests(shop):
    """As where another deployer's traffic split has replaced this one's."""
    shop.deploy(1)
    first, answer = shop.deployed_ids[0], answer_of(1)

    def steal(instances):
        for endpoint in shop.cloud.endpoints.values():
            endpoint.traffic_split = {first: 100}
        return answer(instances)

    shop.cloud.answers[shop.model(1)] = steal
    uri = shop.model(1, answer=steal)
    assert shop.cloud.answers[uri] is steal

    with pytest.raises(RuntimeError, match="other models answered all of 200 requests for"):
        shop.deploy(2)

    assert shop.traffic == {"1": 100}


def test_deploy_model_compares_nothing_without_references(shop):
    shop.deploy(1, references=None, answer=_refuse)

    assert shop.cloud.sent("Predict") == []
    assert "There are no reference predictions, so the answers are not compared" in shop.reports


def test_deploy_model_reads_references_before_it_asks_for_anything(shop):
    with pytest.raises(
        InputError, match=r"Expected gs://.*nowhere, to know what the model must answer. Received: no such file"
    ):
        shop.deploy(1, references=f"gs://{shop.bucket}/nowhere")

    assert shop.cloud.requests == []


FAILURES = [
    ("UploadModel", exceptions.PermissionDenied("no"), "refused", InputError, "Expected permission to upload gs://"),
    ("UploadModel", exceptions.ResourceExhausted("quota"), "refused", InputError, "Expected enough quota to upload"),
    ("UploadModel", exceptions.NotFound("no image"), "operation", InputError, "Expected all that it takes to upload"),
    ("UploadModel", exceptions.InternalServerError("oops"), "half_way", RuntimeError, "Expected Vertex AI to upload gs://"),
    ("DeployModel", exceptions.ResourceExhausted("quota of n1"), "refused", InputError, "Expected enough quota to deploy"),
    ("DeployModel", exceptions.ResourceExhausted("quota of n1"), "operation", InputError, "Expected enough quota to deploy"),
    ("DeployModel", exceptions.NotFound("no model"), "refused", InputError, "Expected all that it takes to deploy version 2"),
    (
        "DeployModel",
        exceptions.DeadlineExceeded("too slow"),
        "operation",
        RuntimeError,
        "Expected Vertex AI to deploy version 2",
    ),
    ("DeployModel", exceptions.ServiceUnavailable("down"), "operation", RuntimeError, "Expected Vertex AI to deploy version 2"),
    (
        "DeployModel",
        exceptions.InternalServerError("exited"),
        "half_way",
        RuntimeError,
        "Expected Vertex AI to deploy version 2",
    ),
    ("DeployModel", exceptions.InvalidArgument("machine"), "refused", InputError, "Expected settings that Vertex AI takes to"),
    ("DeployModel", exceptions.Unauthenticated("expired"), "refused", InputError, "Expected valid credentials to deploy"),
    ("UpdateEndpoint", exceptions.PermissionDenied("no"), "refused", InputError, "Expected permission to change the traffic"),
    (
        "UpdateEndpoint",
        exceptions.InternalServerError("oops"),
        "answer_lost",
        RuntimeError,
        "Expected Vertex AI to change the traffic",
    ),
    ("MergeVersionAliases", exceptions.PermissionDenied("no"), "refused", InputError, "Expected permission to give version"),
    (
        "MergeVersionAliases",
        exceptions.InternalServerError("oops"),
        "answer_lost",
        RuntimeError,
        "Expected Vertex AI to give version",
    ),
    ("Predict", exceptions.PermissionDenied("no"), "refused", InputError, "Expected permission to ask the endpoint"),
    (
        "Predict",
        exceptions.InternalServerError("oops"),
        "refused",
        RuntimeError,
        "Expected version 2 to answer on the endpoint flowers",
    ),
    ("GetEndpoint", exceptions.InternalServerError("oops"), "refused", RuntimeError, "Expected Vertex AI to read the endpoint"),
    ("ListModelVersions", exceptions.PermissionDenied("no"), "refused", InputError, "Expected permission to list the versions"),
    ("ListEndpoints", exceptions.PermissionDenied("no"), "refused", InputError, "Expected permission to list endpoints"),
]


@pytest.mark.parametrize(("method", "error", "when", "kind", "message"), FAILURES)
def test_deploy_model_leaves_the_old_model_serving_after_a_failure(shop, method, error, when, kind, message):
    shop.configure(canary_images=2, traffic_steps=(50, 100))
    shop.deploy(1)
    # A quota is not there at the second try either.
    times = 200 if isinstance(error, exceptions.ResourceExhausted) and when == "refused" else 1
    shop.cloud.faults.extend([(method, Fault(error, when))] * times)

    with pytest.raises(kind) as caught:
        shop.deploy(2)

    assert type(caught.value) is kind
    assert str(caught.value).startswith(message)
    assert ". Received: " in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert shop.traffic == {"1": 100}
    assert ["default" in aliases for aliases, _ in shop.versions] == [True, False][: len(shop.versions)]
    shop.cloud.faults.clear()
    shop.deploy(2)
    assert shop.traffic == {"2": 100}
    assert shop.versions == [(["previous"], ""), (["default"], "")]
    assert len(shop.deployed_ids) == 1


def test_deploy_model_gives_the_alias_back_with_the_traffic(shop, monkeypatch):
    """Where the new model got the alias and the answer was an error: who serves and who is the default must be one."""
    shop.deploy(1)
    num_before, once_more = (
        len(shop.cloud.sent("MergeVersionAliases")),
        Fault(exceptions.InternalServerError("oops"), "answer_lost"),
    )

    def on_answer():
        if len(shop.cloud.sent("MergeVersionAliases")) == num_before + 1 and not shop.cloud.faults:  # `previous` is given
            shop.cloud.faults.append(("MergeVersionAliases", once_more))

    kill = _Kill(monkeypatch)
    kill.on_answer = on_answer

    with pytest.raises(
        RuntimeError, match=r"Expected Vertex AI to give version 2 the alias -canary, default. .* Version 1 has"
    ):
        shop.deploy(2)

    assert (shop.traffic, shop.versions) == ({"1": 100}, [(["default", "previous"], ""), ([], "")])


def test_deploy_model_keeps_the_new_model_where_the_old_one_cannot_be_undeployed(shop):
    shop.deploy(1)
    shop.cloud.faults.append(("UndeployModel", exceptions.InternalServerError("oops")))

    with pytest.raises(RuntimeError, match=r"Expected Vertex AI to undeploy version 1. Received: oops. Repeat the command"):
        shop.deploy(2)

    assert (shop.traffic, shop.versions) == ({"1": 0, "2": 100}, [(["previous"], ""), (["default"], "")])
    shop.deploy(2)
    assert shop.traffic == {"2": 100}


@pytest.mark.parametrize(("when", "times"), [("refused", 1), ("refused", 2), ("answer_lost", 1)])
@pytest.mark.parametrize(
    "method",
    [
        "ListEndpoints",
        "GetEndpoint",
        "CreateEndpoint",
        "ListModelVersions",
        "UploadModel",
        "GetModel",
        "DeployModel",
        "UpdateEndpoint",
        "MergeVersionAliases",
        "UndeployModel",
        "Predict",
        "ListOperations",
    ],
)
def test_deploy_model_asks_again_after_a_transient_error(shop, method, when, times):
    """Also where all was done and only the answer was lost: nothing is made twice."""
    shop.configure(canary_images=2, traffic_steps=(50, 100))
    shop.cloud.faults.extend([(method, Fault(TRANSIENT, when))] * times)

    shop.deploy(1)
    shop.deploy(2)

    assert shop.cloud.faults == []
    assert (shop.traffic, shop.versions) == ({"2": 100}, [(["previous"], ""), (["default"], "")])
    assert len(shop.cloud.endpoints) == 1


def test_deploy_model_waits_for_operations_that_take_their_time(shop):
    for method in ("CreateEndpoint", "UploadModel", "DeployModel", "UndeployModel"):
        shop.cloud.operation_seconds[method] = 0.2

    shop.deploy(1)
    shop.deploy(2)

    assert (shop.traffic, len(shop.cloud.sent("DeployModel"))) == ({"2": 100}, 2)


def test_deploy_model_says_where_there_are_no_credentials(shop, monkeypatch, tmp_path):
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))

    with pytest.raises(InputError, match=r"Expected valid credentials to speak with Vertex AI. Received: .*gcloud auth"):
        shop.deploy(1, references=None)


def test_deploy_model_wants_a_project(shop):
    shop.configure(project="")

    with pytest.raises(InputError, match=r"Expected a Google Cloud project. Received: none. Give --project"):
        shop.deploy(1, references=None)


def test_deploy_model_takes_one_version_on_trial_at_a_time(shop):
    shop.deploy(1)
    shop.deploy(2, steps=(10,))
    message = r"Expected no other version on trial on the endpoint flowers. Received: version 2 with 10 %. End that first"

    for number in (3, 1):
        with pytest.raises(InputError, match=message):
            shop.deploy(number)

    assert shop.traffic == {"1": 90, "2": 10}
    assert shop.versions[:2] == [(["default"], ""), (["canary"], "") if len(shop.versions) == 2 else ([], "")]


def test_deploy_model_gives_way_to_somebody_else_s_traffic(shop):
    shop.deploy(1)
    shop.cloud.answers[shop.model(2)] = answer = answer_of(2)

    def interfere(instances):
        (endpoint,) = shop.cloud.endpoints.values()
        endpoint.traffic_split = {key: 25 if value in (10, 25) else 75 for key, value in endpoint.traffic_split.items()}
        endpoint.etag += "1"
        return answer(instances)

    with pytest.raises(RuntimeError, match=r"to be as this command left it, .*Received: .*somebody else is changing it"):
        shop.deploy(2, answer=interfere)

    assert shop.traffic == {"1": 100}


def test_deploy_model_of_two_at_once_leaves_one_that_serves(shop):
    shop.deploy(1)
    shop.cloud.operation_seconds["DeployModel"] = 0.1
    results = {}

    def run(number):
        try:
            results[number] = shop.deploy(number)
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    done = [number for number, result in results.items() if not isinstance(result, Exception)]
    (versions,) = shop.cloud.models.values()
    (serving,) = [version for version, share in shop.traffic.items() if share == 100]
    assert shop.traffic == {serving: 100}, results
    assert "default" in versions[serving].version_aliases
    assert len(done) == (serving != "1") or len(done) == 2  # one after the other


def test_deploy_model_leaves_other_models_of_the_endpoint_their_share(shop):
    shop.deploy(1)
    (name,) = shop.cloud.endpoints
    endpoint = shop.cloud.endpoints[name]
    foreign = types.DeployedModel(id="7", model=endpoint.deployed_models[0].model.replace("tfx-vision-flowers", "other"))
    endpoint.deployed_models.append(foreign)
    endpoint.traffic_split = {endpoint.deployed_models[0].id: 60, "7": 40}
    shop.cloud.models[foreign.model] = {"": types.Model(name=foreign.model, artifact_uri=shop.model(1))}

    shop.deploy(2, steps=(10,))

    assert dict(endpoint.traffic_split)["7"] == 36
    shop.rollout().rollback()
    assert dict(endpoint.traffic_split) == {endpoint.deployed_models[0].id: 60, "7": 40}


def test_find_wants_one_endpoint_of_the_pipeline(shop):
    for number in (1, 2):
        name = f"projects/{shop.cloud.number}/locations/us-central1/endpoints/{number}"
        shop.cloud.endpoints[name] = types.Endpoint(name=name, display_name=PIPELINE)

    with pytest.raises(
        InputError, match=r"to have the label tfx-vision-pipeline=flowers. Received: .*endpoints/[12], .*without"
    ):
        shop.deploy(1)

    for endpoint in shop.cloud.endpoints.values():
        endpoint.labels = OURS
    with pytest.raises(InputError, match=r"Expected one endpoint 'flowers' of this pipeline. Received: .*/1, .*/2|.*/2, .*/1"):
        shop.deploy(1)

    shop.cloud.endpoints.popitem()
    assert shop.deploy(1).endpoint in shop.cloud.endpoints


def test_ensure_says_where_its_endpoint_was_renamed(shop):
    shop.deploy(1)
    for endpoint in shop.cloud.endpoints.values():
        endpoint.display_name = "roses"

    with pytest.raises(InputError, match=r"to have the name 'flowers' still. Received: 'roses'. Give --endpoint that name"):
        shop.deploy(2)


def test_versions_are_of_this_pipeline_only(shop):
    shop.deploy(1)
    for versions in shop.cloud.models.values():
        versions["1"].labels = {}

    with pytest.raises(InputError, match=r"to be the model of the pipeline flowers. Received: a version of it without"):
        shop.deploy(2)


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

    assert _changes(shop.cloud, since) == [
        "DeployModel",
        "MergeVersionAliases",
        "UpdateModel",
        "MergeVersionAliases",
        "UndeployModel",
    ]
    assert dict(shop.cloud.sent("DeployModel")[-1].traffic_split) == {"0": 100}
    assert (deployment.model_version.rpartition("@")[2], deployment.traffic_percent) == ("1", 100)
    assert (shop.traffic, shop.versions) == ({"1": 100}, [(["default"], ""), (["previous"], "withdrawn")])
    with pytest.raises(InputError, match=r"Received: version 2, which was itself taken back. Name one with --version: 2"):
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
    assert _changes(shop.cloud, since) == []
    with pytest.raises(
        InputError, match=r"Expected a version to go back to. Received: version 9. Name one with --version: 2, 3"
    ):
        shop.rollout().rollback("9")


def test_rollback_wants_a_version_to_go_back_to(shop):
    shop.deploy(1)

    with pytest.raises(InputError, match=r"Expected a version to go back to. Received: none. There is no other\."):
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


class _KilledError(BaseException):
    """As by `kill -9`: nothing catches it."""


class _Kill:
    """Counts the answers of Google's libraries, and ends the work with one of them.

    Attributes:
      at: the number of the answer to end with; None for none.
      count: answers until now.
    """

    def __init__(self, monkeypatch):
        self.at, self.count, self.on_answer = None, 0, lambda: None
        call = _GapicCallable.__call__

        def counting(callable_, *arguments, **options):
            answer = call(callable_, *arguments, **options)
            self.count += 1
            self.on_answer()
            if self.count == self.at:
                raise _KilledError
            return answer

        monkeypatch.setattr(_GapicCallable, "__call__", counting)

    def start(self, at=None):
        self.at, self.count, self.on_answer = at, 0, lambda: None

    def find_changes(self, cloud, command):
        """Runs a command; returns the numbers of the answers after which something was changed, and of the first one."""
        found, known = [1], len(_changes(cloud))
        self.start()

        def on_answer():
            nonlocal known
            if (now := len(_changes(cloud))) > known:
                found.append(self.count)
                known = now

        self.on_answer = on_answer
        command()
        self.start()
        return found


_ALL, _HALF = (100,), (50,)
# What is deployed before, with its steps; the command; and its error, if it ends in one.
SCENARIOS = {
    "first model": ([], lambda shop: shop.deploy(1), None),
    "next version": ([(1, _ALL)], lambda shop: shop.deploy(2), None),
    "canary": ([(1, _ALL)], lambda shop: shop.deploy(2, steps=_HALF), None),
    "refused canary": ([(1, _ALL)], lambda shop: shop.deploy(2, answer=_refuse), RuntimeError),
    "refused first model": ([], lambda shop: shop.deploy(1, answer=_refuse), RuntimeError),
    "promotion": ([(1, _ALL), (2, _HALF)], lambda shop: shop.rollout().promote(None, _ALL), None),
    "rollback of a canary": ([(1, _ALL), (2, _HALF)], lambda shop: shop.rollout().rollback(), None),
    "rollback": ([(1, _ALL), (2, _ALL)], lambda shop: shop.rollout().rollback(), None),
    "rollback to a version": ([(1, _ALL), (2, _ALL), (3, _ALL)], lambda shop: shop.rollout().rollback("1"), None),
    "clean-up": (
        [(1, _ALL), (2, _HALF)],
        lambda shop: shop.rollout().undeploy(everything=True, delete_endpoint=True),
        None,
    ),
}


@pytest.fixture
def make_shop(tmp_path, monkeypatch):
    """Gives `make_shop()`, one world after the other."""
    monkeypatch.setattr(cloud_calls, "POLLING", cloud_calls.POLLING.with_delay(0.01, 0.01).with_timeout(20))
    monkeypatch.setattr(cloud_calls, "RETRY", cloud_calls.RETRY.with_delay(0.01, 0.02).with_timeout(2.0))
    with contextlib.ExitStack() as stack:

        def make():
            stack.close()
            folder = Path(tempfile.mkdtemp(dir=tmp_path))
            cloud = stack.enter_context(vertex_stand_in.VertexStandIn(folder))
            for name, value in cloud.environment.items():
                monkeypatch.setenv(name, value)
            shop = Shop(cloud)
            shop.configure(canary_images=1, traffic_steps=(50, 100))
            return shop

        yield make


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_command_may_be_killed_after_every_change_and_repeated(make_shop, monkeypatch, scenario):
    """A request that only reads changes nothing, so that a kill after it is one after the change before."""
    before, command, error = SCENARIOS[scenario]
    kill = _Kill(monkeypatch)

    def prepare():
        shop = make_shop()
        for number, steps in before:
            shop.deploy(number, steps=steps, references=None)
        return shop, len(shop.cloud.sent("UploadModel"))

    def run(shop):
        with pytest.raises(error) if error else contextlib.nullcontext():
            command(shop)

    def find(shop, num_uploads):
        num_uploads = len(shop.cloud.sent("UploadModel")) - num_uploads
        return shop.traffic, shop.versions, len(shop.cloud.endpoints), num_uploads

    shop, num_uploads = prepare()
    answers = kill.find_changes(shop.cloud, lambda: run(shop))
    final = find(shop, num_uploads)
    assert len(answers) >= 3
    for at in answers:
        shop, num_uploads = prepare()
        kill.start(at)
        with pytest.raises(_KilledError):
            command(shop)
        kill.start()
        # After the last change there may be nothing left to do, which a command says.
        with contextlib.suppress(*[InputError] if at == answers[-1] else []):
            run(shop)
        assert find(shop, num_uploads) == final, f"killed after answer {at} of {answers}"


@pytest.mark.parametrize("method", ["CreateEndpoint", "UploadModel", "DeployModel", "UndeployModel"])
def test_a_command_waits_for_what_a_killed_one_has_begun(make_shop, monkeypatch, method):
    shop, kill = make_shop(), _Kill(monkeypatch)
    if method != "CreateEndpoint":
        shop.deploy(1)
    num_before = len(shop.cloud.sent(method))
    shop.cloud.operation_seconds[method] = 2.0
    kill.on_answer = lambda: setattr(kill, "at", kill.count if len(shop.cloud.sent(method)) > num_before else None)
    with pytest.raises(_KilledError):
        shop.deploy(2)
    kill.start()

    shop.deploy(2)

    assert [report for report in shop.reports if report.startswith("Waiting for what is under way already: projects/")]
    assert (list(shop.traffic.values()), len(shop.cloud.endpoints)) == ([100], 1)
    assert len(shop.cloud.sent(method)) == num_before + 1
