import threading

import endpoint_models
import pytest
import vertex_stand_in
from endpoint_models import IMAGE_URI, NUM_IMAGES, PIPELINE, answer_of, changes, refuse
from google.api_core import exceptions
from google.cloud.aiplatform_v1 import EndpointServiceClient, types
from google.protobuf import json_format
from vertex_stand_in import Fault

from data.errors import InputError
from pipeline import cloud_calls

pytestmark = pytest.mark.one_stack
google_cloud = vertex_stand_in.google_cloud
shop = endpoint_models.shop

PARENT = "projects/test-project/locations/us-central1"
OURS = {"tfx-vision-pipeline": PIPELINE}
TRANSIENT = exceptions.ServiceUnavailable("try again")


def _fields(message, *names):
    """The named fields of a request that are set, as JSON has them; all of them without names."""
    found = json_format.MessageToDict(type(message).pb(message), preserving_proto_field_name=True)
    return {name: found[name] for name in names if name in found} if names else found


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

    assert changes(shop.cloud) == ["CreateEndpoint", "UploadModel", "DeployModel", "MergeVersionAliases"]
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
    assert changes(shop.cloud, since) == ["UploadModel", "DeployModel", *updates, *aliases, "UndeployModel"]
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

    assert changes(shop.cloud, since) == []
    assert (again.model_version.rpartition("@")[2], again.deployed_model_id) == ("1", shop.deployed_ids[0])
    assert "Version 1 has all of the traffic already" in shop.reports


def test_deploy_model_says_which_settings_wait_for_the_next_version(shop):
    shop.deploy(1)
    shop.configure(serving_machine_type="n1-highmem-8", max_replicas=3, service_account="me@p.iam")

    shop.deploy(1)

    assert (
        "Version 1 stays on 1 x n1-standard-4 as the default account; the settings, 1 to 3 x n1-highmem-8 as me@p.iam, hold "
        "for the next one"
    ) in shop.reports
    assert len(shop.cloud.sent("DeployModel")) == 1


def test_deploy_model_blames_no_model_for_a_lost_network(shop):
    shop.deploy(1)
    lost = exceptions.ServiceUnavailable("failed to connect to all addresses; last error: Network is unreachable")
    shop.cloud.faults.extend([("Predict", lost)] * 100)

    with pytest.raises(RuntimeError, match=r"Expected Vertex AI to ask the endpoint. Received: failed to connect.* Version 1"):
        shop.deploy(2)

    assert (shop.traffic, shop.versions) == ({"1": 100}, [(["default"], ""), ([], "")])


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
        (refuse, "was answered with an error: the container has crashed"),
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
        shop.deploy(2, answer=refuse)

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
    shop.deploy(1, references=None, answer=refuse)

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
def test_deploy_model_leaves_the_old_model_serving_after_a_failure(shop, monkeypatch, method, error, when, kind, message):
    shop.configure(canary_images=2, traffic_steps=(50, 100))
    shop.deploy(1)
    times = 1
    if isinstance(error, exceptions.ResourceExhausted) and when == "refused":  # not there at the second try either
        times = 200
        monkeypatch.setattr(cloud_calls, "RETRY", cloud_calls.RETRY.with_timeout(0.5))
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
