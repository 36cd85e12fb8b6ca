import json
import os
import subprocess
import sys
import textwrap
import threading
import time

import grpc
import pytest
import requests
import vertex_stand_in
from google.api_core import exceptions
from google.cloud import aiplatform, aiplatform_v1, aiplatform_v1beta1, storage
from google.cloud.aiplatform_v1.types import ExplanationMetadata, ExplanationParameters
from google_cloud_network import HttpsAnswer
from vertex_stand_in import Fault, VertexStandIn

pytestmark = pytest.mark.one_stack
google_cloud = vertex_stand_in.google_cloud

REGION = "us-central1"
HOST = {"api_endpoint": f"{REGION}-aiplatform.googleapis.com"}
MACHINE = "n1-standard-4"
POOLS = [{"machine_spec": {"machine_type": MACHINE}, "replica_count": 1, "container_spec": {"image_uri": "image"}}]


@pytest.fixture
def vertex(google_cloud):
    """The stand-in with a bucket, models that answer with their folder's name, and the SDK set up."""
    google_cloud.storage.create_bucket("bucket")
    for name in ("a", "b"):
        (folder := google_cloud.storage.path(f"gs://bucket/{name}")).mkdir()
        (folder / "saved_model.pb").write_bytes(name.encode())
        google_cloud.answers[f"gs://bucket/{name}"] = lambda instances, name=name: [{"by": name, **one} for one in instances]
    aiplatform.init(project=google_cloud.project, location=REGION, staging_bucket="gs://bucket")
    return google_cloud


def _upload(name="a", **options):
    return aiplatform.Model.upload(
        display_name="flowers", artifact_uri=f"gs://bucket/{name}", serving_container_image_uri="image", **options
    )


def _endpoint(*traffic: int):
    """An endpoint with versions of one model, deployed in turn, each with the share of the traffic that it gets then."""
    endpoint, model = aiplatform.Endpoint.create(display_name="flowers"), None
    for number, share in enumerate(traffic):
        model = _upload("ab"[number], parent_model=model and model.resource_name)
        endpoint.deploy(model, machine_type=MACHINE, traffic_percentage=share)
    return endpoint


def test_upload_counts_versions_and_moves_aliases(vertex):
    first = _upload(version_aliases=["good"], labels={"pipeline": "flowers"})
    second = _upload("b", parent_model=first.resource_name, is_default_version=False, version_aliases=["good"])

    assert (first.version_id, second.version_id) == ("1", "2")
    assert first.resource_name == second.resource_name
    assert first.resource_name.startswith(f"projects/{vertex.number}/locations/{REGION}/models/")
    assert aiplatform.Model(f"{first.resource_name}@good").version_id == "2"
    assert aiplatform.Model(first.resource_name).version_id == "1"

    first.versioning_registry.add_version_aliases(["default"], version="2")

    assert aiplatform.Model(first.name).uri == "gs://bucket/b"
    aliases = {one.version_id: one.version_aliases for one in first.versioning_registry.list_versions()}
    assert aliases == {"1": [], "2": ["default", "good"]}
    assert [request.model.artifact_uri for request in vertex.sent("UploadModel")] == ["gs://bucket/a", "gs://bucket/b"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"parent_model": "77"}, exceptions.NotFound, "does not exist"),
        ({"artifact_uri": "gs://bucket/none"}, exceptions.InvalidArgument, "has no objects"),
        ({"version_aliases": ["7"]}, exceptions.InvalidArgument, "Invalid version alias"),
        ({"labels": {"code": "1.0"}}, exceptions.InvalidArgument, "Invalid label code=1.0"),
        ({"labels": {"Code": "1"}}, exceptions.InvalidArgument, "Invalid label Code=1"),
    ],
)
def test_upload_refuses_what_the_service_refuses(vertex, changes, error, message):
    options = {"display_name": "m", "artifact_uri": "gs://bucket/a", "serving_container_image_uri": "image"}

    with pytest.raises(error, match=message):
        aiplatform.Model.upload(**options | changes)

    assert not vertex.models


def test_upload_refuses_a_model_without_a_container(vertex):
    client = aiplatform_v1.ModelServiceClient(client_options=HOST)

    with pytest.raises(exceptions.InvalidArgument, match="image_uri must be set"):
        client.upload_model(parent=f"projects/{vertex.project}/locations/{REGION}", model={"display_name": "m"})


def test_list_filters_orders_and_pages(vertex):
    for number in range(5):
        aiplatform.Endpoint.create(display_name=f"e{number}", labels={"parity": "even" if number % 2 == 0 else "odd"})

    found = aiplatform.Endpoint.list(filter='labels.parity="even" AND display_name!="e2"', order_by="display_name desc")

    assert [one.display_name for one in found] == ["e4", "e0"]
    assert [one.display_name for one in aiplatform.Endpoint.list()] == ["e4", "e3", "e2", "e1", "e0"]
    client = aiplatform_v1.EndpointServiceClient(client_options=HOST)
    parent = f"projects/{vertex.project}/locations/{REGION}"
    pages = list(client.list_endpoints({"parent": parent, "page_size": 2}).pages)
    assert [len(page.endpoints) for page in pages] == [2, 2, 1]
    with pytest.raises(exceptions.InvalidArgument, match="stand-in does not know"):
        aiplatform.Endpoint.list(filter='display_name="a" OR display_name="b"')


def test_predict_goes_by_the_traffic_split(vertex):
    endpoint = _endpoint(100, 10)
    first, second = (one.id for one in endpoint.list_models())
    assert endpoint.traffic_split == {first: 90, second: 10}

    answers = [endpoint.predict([{"x": 1.5}]) for _ in range(20)]

    assert [answer.predictions for answer in answers].count([{"by": "b", "x": 1.5}]) == 2
    assert {(one.deployed_model_id, one.model_version_id) for one in answers} == {(first, "1"), (second, "2")}
    endpoint.update(traffic_split={first: 0, second: 100})
    assert {endpoint.predict([{}]).model_version_id for _ in range(5)} == {"2"}


def test_raw_predict_answers_over_https(vertex):
    answer = _endpoint(100).raw_predict(b'{"instances": [{"x": 2}]}', {"Content-Type": "application/json"})

    assert answer.json() == {"predictions": [{"by": "a", "x": 2.0}]}


def test_explain_needs_a_specification_and_can_name_the_deployed_model(vertex):
    vertex.explanations[""] = lambda instances: [{"attributions": [{"output_index": [1]}]} for _ in instances]
    endpoint = _endpoint(100)
    with pytest.raises(exceptions.FailedPrecondition, match="no explanation spec"):
        endpoint.explain([{}])
    metadata = ExplanationMetadata(inputs={"x": {}}, outputs={"y": {}})
    parameters = ExplanationParameters(integrated_gradients_attribution={"step_count": 5})
    model = _upload("b", explanation_metadata=metadata, explanation_parameters=parameters)
    endpoint.deploy(model, machine_type=MACHINE, traffic_percentage=0)

    answer = endpoint.explain([{}], deployed_model_id=endpoint.list_models()[1].id)

    assert answer.predictions == [{"by": "b"}]
    assert list(answer.explanations[0].attributions[0].output_index) == [1]


def test_predict_refuses_what_the_service_refuses(vertex):
    endpoint = _endpoint()
    with pytest.raises(exceptions.FailedPrecondition, match="no deployed model with traffic"):
        endpoint.predict([{}])
    endpoint.deploy(_upload(), machine_type=MACHINE)
    with pytest.raises(exceptions.InvalidArgument, match="payload size exceeds"):
        endpoint.predict([{"image": "x" * 1_600_000}])
    del vertex.answers["gs://bucket/a"]
    with pytest.raises(exceptions.FailedPrecondition, match="The test gives no answers"):
        endpoint.predict([{}])


def test_endpoint_checks_traffic_and_deployed_models(vertex):
    endpoint = _endpoint(100, 50)
    first, second = (one.id for one in endpoint.list_models())
    client, name = aiplatform_v1.EndpointServiceClient(client_options=HOST), endpoint.resource_name

    def update(split):
        client.update_endpoint(
            {"endpoint": {"name": name, "traffic_split": split}, "update_mask": {"paths": ["traffic_split"]}}
        )

    deployed = {"model": vertex.sent("DeployModel")[0].deployed_model.model}
    resources = {"dedicated_resources": {"machine_spec": {"machine_type": MACHINE}, "min_replica_count": 1}}
    for call, error, message in [
        (lambda: update({first: 50, second: 49}), exceptions.InvalidArgument, "must sum to 100"),
        (lambda: update({first: 50, "7": 50}), exceptions.InvalidArgument, "not there: ..7"),
        (lambda: client.undeploy_model(endpoint=name, deployed_model_id="7"), exceptions.NotFound, "no deployed model 7"),
        (lambda: client.undeploy_model(endpoint=name, deployed_model_id=first), exceptions.FailedPrecondition, "has 50%"),
        (lambda: client.delete_endpoint(name=name), exceptions.FailedPrecondition, "has deployed models"),
        (
            lambda: client.deploy_model(endpoint=name, deployed_model=deployed),
            exceptions.InvalidArgument,
            "dedicated_resources",
        ),
        (
            lambda: client.deploy_model(endpoint=name, deployed_model=deployed | resources, traffic_split={"0": 10, first: 80}),
            exceptions.InvalidArgument,
            "must sum to 100",
        ),
    ]:
        with pytest.raises(error, match=message):
            call()
    assert dict(vertex.endpoints[name].traffic_split) == {first: 50, second: 50}

    endpoint.undeploy(first, traffic_split={second: 100})
    endpoint.undeploy(second)

    assert not vertex.endpoints[name].deployed_models
    assert not vertex.endpoints[name].traffic_split
    endpoint.delete()
    assert not vertex.endpoints


def test_update_endpoint_refuses_an_old_etag(vertex):
    endpoint = _endpoint(100)
    other = aiplatform.Endpoint(endpoint.resource_name)
    other.list_models()  # the SDK looks when it first needs the endpoint
    endpoint.update(description="new")

    with pytest.raises(exceptions.Aborted, match="etag"):
        other.update(description="old")


def test_delete_model_refuses_while_it_is_deployed(vertex):
    endpoint = _endpoint(100, 100)
    model = aiplatform.Model.list()[0]
    assert {one.endpoint for one in model.gca_resource.deployed_models} == {endpoint.resource_name}
    with pytest.raises(exceptions.FailedPrecondition, match="is deployed at"):
        model.delete()
    endpoint.undeploy_all()
    with pytest.raises(exceptions.FailedPrecondition, match="default version"):
        model.versioning_registry.delete_version("default")

    model.versioning_registry.delete_version("1")

    assert list(vertex.models[model.resource_name]) == ["2"]
    model.delete()
    assert not vertex.models


@pytest.mark.parametrize(
    ("when", "deployed", "has_traffic"),
    [("refused", 0, False), ("operation", 0, False), ("half_way", 1, False), ("answer_lost", 1, True)],
)
@pytest.mark.parametrize(
    "error", [exceptions.ResourceExhausted("quota of T4"), exceptions.ServiceUnavailable("later"), exceptions.NotFound("gone")]
)
def test_faults_come_once_and_leave_what_they_say(vertex, when, deployed, has_traffic, error):
    endpoint, model = _endpoint(), _upload()
    vertex.faults.append(("DeployModel", Fault(error, when)))

    with pytest.raises(type(error), match=error.message):
        endpoint.deploy(model, machine_type=MACHINE)

    (stored,) = vertex.endpoints.values()
    assert len(stored.deployed_models) == deployed
    assert bool(stored.traffic_split) == has_traffic
    assert not vertex.faults
    aiplatform.Endpoint(endpoint.resource_name).deploy(model, machine_type=MACHINE, traffic_percentage=100)
    assert len(stored.deployed_models) == deployed + 1


def test_faults_take_no_error_without_a_code():
    with pytest.raises(ValueError, match="with a gRPC code"):
        Fault(exceptions.BadRequest("no gRPC error"))


def test_answer_seconds_let_a_deadline_pass_after_the_work(vertex):
    vertex.answer_seconds["CreateEndpoint"] = 600.0

    seconds = 0.3
    while not vertex.endpoints and seconds < 100:  # on a slow machine, the first deadlines pass before the request has come
        with pytest.raises(exceptions.DeadlineExceeded):
            aiplatform.Endpoint.create(display_name="late", create_request_timeout=seconds)
        seconds *= 3

    assert {one.display_name for one in vertex.endpoints.values()} == {"late"}


def test_operation_seconds_keep_the_endpoint_busy(vertex):
    endpoint, model = _endpoint(), _upload()
    vertex.operation_seconds["DeployModel"] = 600.0
    thread = threading.Thread(target=endpoint.deploy, args=(model,), kwargs={"machine_type": MACHINE}, daemon=True)
    thread.start()
    while not vertex.sent("GetOperation"):  # by then the operation has begun
        time.sleep(0.01)

    with pytest.raises(exceptions.FailedPrecondition, match="other operations running"):
        aiplatform.Endpoint(endpoint.resource_name).deploy(model, machine_type=MACHINE)

    assert not vertex.endpoints[endpoint.resource_name].deployed_models
    vertex.end_operations()
    thread.join(300)
    assert not thread.is_alive()
    assert len(vertex.endpoints[endpoint.resource_name].deployed_models) == 1


def test_operations_are_done_in_their_first_answer(vertex):
    _endpoint(100, 50)

    assert not vertex.sent("GetOperation")


def test_custom_job_runs_the_test_s_function(vertex):
    ran = []

    def run(job):
        ran.append(job.job_spec.worker_pool_specs[0].container_spec.image_uri)
        time.sleep(0.3)

    vertex.jobs.run_custom_job = run
    job = aiplatform.CustomJob("train", worker_pool_specs=POOLS, labels={"a": "b"})

    job.run(timeout=3600, service_account="me@project", restart_job_on_worker_restart=True)

    assert ran == ["image"]
    assert job.state.name == "JOB_STATE_SUCCEEDED"
    (sent,) = vertex.sent("CreateCustomJob")
    assert sent.custom_job.job_spec.scheduling.timeout.total_seconds() == 3600
    (stored,) = vertex.custom_jobs.values()
    assert stored.create_time <= stored.start_time <= stored.end_time


def test_custom_job_fails_with_the_function_s_message(vertex):
    def run(job):
        raise RuntimeError("out of memory")

    vertex.jobs.run_custom_job = run

    with pytest.raises(RuntimeError, match="out of memory"):
        aiplatform.CustomJob("train", worker_pool_specs=POOLS).run()


def test_custom_job_can_be_done_when_it_is_created_or_be_cancelled(vertex):
    client, parent = aiplatform_v1.JobServiceClient(client_options=HOST), f"projects/{vertex.project}/locations/{REGION}"
    job = {"display_name": "train", "job_spec": {"worker_pool_specs": POOLS}}
    vertex.jobs.finish_at_once = True
    assert client.create_custom_job(parent=parent, custom_job=job).state.name == "JOB_STATE_SUCCEEDED"
    vertex.jobs.finish_at_once, vertex.jobs.wait_seconds = False, 0.0
    held = threading.Event()
    vertex.jobs.run_custom_job = lambda job: held.wait(600)
    created = client.create_custom_job(parent=parent, custom_job=job)
    assert created.state.name == "JOB_STATE_PENDING"

    client.cancel_custom_job(name=created.name)
    held.set()

    assert client.get_custom_job(name=created.name).state.name == "JOB_STATE_CANCELLED"


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"machine_spec": {"machine_type": MACHINE, "accelerator_type": "NVIDIA_TESLA_T4"}}, {}, "must be set together"),
        ({"machine_spec": {}}, {}, "machine_type must be set"),
        ({"container_spec": {}}, {}, "needs container_spec.image_uri"),
        ({"replica_count": 2}, {}, "replica_count must be 1"),
        ({}, {"tensorboard": "projects/p/locations/l/tensorboards/1"}, "service_account must be set"),
    ],
)
def test_custom_job_refuses_what_the_service_refuses(vertex, changes, options, message):
    client = aiplatform_v1.JobServiceClient(client_options=HOST)
    job = {"display_name": "train", "job_spec": {"worker_pool_specs": [POOLS[0] | changes], **options}}

    with pytest.raises(exceptions.InvalidArgument, match=message):
        client.create_custom_job(parent=f"projects/{vertex.project}/locations/{REGION}", custom_job=job)


def test_batch_prediction_job_runs_the_test_s_function(vertex):
    vertex.jobs.run_batch_job = lambda job: vertex.storage.path("gs://bucket/done").touch()

    job = _upload().batch_predict(
        job_display_name="batch",
        gcs_source="gs://bucket/in.jsonl",
        gcs_destination_prefix="gs://bucket/out",
        instances_format="jsonl",
        machine_type=MACHINE,
    )

    assert job.state.name == "JOB_STATE_SUCCEEDED"
    assert storage.Client().bucket("bucket").blob("done").exists()
    (stored,) = vertex.batch_jobs.values()
    assert stored.model_version_id == "1"


@pytest.fixture
def template(tmp_path):
    spec = {"pipelineInfo": {"name": "flowers"}, "schemaVersion": "2.1.0", "root": {"dag": {"tasks": {}}}}
    spec |= {"sdkVersion": "tfx-1.16.0", "components": {}, "deploymentSpec": {}}
    path = tmp_path / "pipeline.json"
    path.write_text(json.dumps({"displayName": "flowers", "pipelineSpec": spec, "runtimeConfig": {"parameterValues": {}}}))
    return path


def _pipeline(template, job_id="flowers-1"):
    return aiplatform.PipelineJob("flowers", str(template), job_id=job_id, pipeline_root="gs://bucket/root")


def test_pipeline_job_moves_as_the_test_says(vertex, template):
    job = _pipeline(template)
    job.submit(service_account="me@project")
    assert job.state.name == "PIPELINE_STATE_PENDING"
    vertex.pipelines.set_pipeline("flowers-1", "RUNNING")
    vertex.pipelines.set_task("flowers-1", "Trainer", "RUNNING", custom_job="projects/1/locations/l/customJobs/2")
    vertex.pipelines.set_task("flowers-1", "Trainer", "FAILED", error="out of memory")
    vertex.pipelines.set_pipeline("flowers-1", "FAILED", error="The task Trainer failed.")

    (task,) = job.task_details

    assert (task.task_name, task.state.name, task.error.message) == ("Trainer", "FAILED", "out of memory")
    assert task.executor_detail.container_detail.main_job == "projects/1/locations/l/customJobs/2"
    with pytest.raises(RuntimeError, match="The task Trainer failed"):
        job.wait()
    with pytest.raises(exceptions.AlreadyExists):
        _pipeline(template).submit()
    assert vertex.sent("CreatePipelineJob")[0].pipeline_job.service_account == "me@project"


def test_pipeline_job_is_listed_cancelled_and_deleted(vertex, template):
    jobs = [_pipeline(template, f"flowers-{number}") for number in range(2)]
    for job in jobs:
        job.submit()
    vertex.pipelines.set_task("flowers-0", "Trainer", "RUNNING")
    with pytest.raises(exceptions.FailedPrecondition, match="PIPELINE_STATE_PENDING"):
        aiplatform_v1.PipelineServiceClient(client_options=HOST).delete_pipeline_job(name=jobs[0].resource_name)

    jobs[0].cancel()

    assert [one.name for one in aiplatform.PipelineJob.list(filter='state="PIPELINE_STATE_CANCELLED"')] == ["flowers-0"]
    assert jobs[0].task_details[0].state.name == "CANCELLED"
    jobs[0].delete()
    assert [name.rsplit("/")[-1] for name in vertex.pipeline_jobs] == ["flowers-1"]


def test_pipeline_job_runs_the_test_s_function(vertex, template):
    def run(job):
        vertex.pipelines.set_task(job.name, "Trainer", "SUCCEEDED")

    vertex.pipelines.run_pipeline_job, vertex.pipelines.wait_seconds = run, 2.0
    job = _pipeline(template)

    job.run()

    assert [task.state.name for task in job.task_details] == ["SUCCEEDED"]
    assert job.state.name == "PIPELINE_STATE_SUCCEEDED"


def test_stand_in_serves_the_beta_version_as_well(vertex):
    client = aiplatform_v1beta1.EndpointServiceClient(client_options=HOST)
    parent = f"projects/{vertex.project}/locations/{REGION}"

    created = client.create_endpoint(parent=parent, endpoint={"display_name": "beta"}).result()

    assert isinstance(created, aiplatform_v1beta1.Endpoint)
    assert isinstance(vertex.sent("CreateEndpoint")[0], aiplatform_v1beta1.CreateEndpointRequest)
    assert aiplatform.Endpoint(created.name).display_name == "beta"


def test_stand_in_says_what_it_does_not_know(vertex, caplog):
    with pytest.raises(exceptions.MethodNotImplemented, match="DatasetService/ListDatasets"):
        aiplatform.ImageDataset.list()
    answer = storage.Client()._http.get("https://compute.googleapis.com/compute/v1/regions")

    assert answer.status_code == 501
    assert vertex.network.refused == ["GET https://compute.googleapis.com/compute/v1/regions"]
    assert vertex.unknown == ["/google.cloud.aiplatform.v1.DatasetService/ListDatasets"]
    assert "does not know /google.cloud.aiplatform.v1.DatasetService/ListDatasets" in caplog.text


def test_stand_in_takes_further_answers_over_https(vertex):
    def answer(request):
        assert request.parameters == {"filter": "a b"}
        return HttpsAnswer(body={"services": [request.path]})

    vertex.network.https.append((r"serviceusage\.googleapis\.com/v1/", answer))

    found = storage.Client()._http.get("https://serviceusage.googleapis.com/v1/projects/p/services?filter=a+b")

    assert found.json() == {"services": ["/v1/projects/p/services"]}


def test_stand_in_refuses_other_projects_regions_and_strangers(vertex):
    client = aiplatform_v1.EndpointServiceClient(client_options=HOST)
    with pytest.raises(exceptions.PermissionDenied, match="Permission denied on resource"):
        client.get_endpoint(name=f"projects/other/locations/{REGION}/endpoints/1")
    with pytest.raises(exceptions.InvalidArgument, match="not in the region of"):
        client.get_endpoint(name=f"projects/{vertex.project}/locations/europe-west4/endpoints/1")
    channel = grpc.secure_channel(HOST["api_endpoint"], grpc.ssl_channel_credentials())
    stranger = aiplatform_v1.services.endpoint_service.transports.EndpointServiceGrpcTransport(channel=channel)
    with pytest.raises(exceptions.Unauthenticated):
        aiplatform_v1.EndpointServiceClient(transport=stranger).get_endpoint(
            name=f"projects/{vertex.project}/locations/{REGION}/endpoints/1"
        )


def test_network_refuses_hosts_outside_google_cloud(vertex):
    with pytest.raises(requests.exceptions.ProxyError):
        requests.get("https://pypi.org/", timeout=60)

    assert vertex.network.refused == ["CONNECT pypi.org:443"]


def test_network_can_be_down(vertex):
    vertex.network.is_down = True

    with pytest.raises(exceptions.ServiceUnavailable):
        aiplatform.Endpoint.create(display_name="e", create_request_timeout=60)

    assert not vertex.requests


def test_storage_keeps_objects_in_the_bucket_s_folder(vertex):
    client = storage.Client()
    bucket, content = client.bucket("bucket"), bytes(range(256)) * 20_000
    bucket.blob("c/whole").upload_from_string(content)
    parts = bucket.blob("c/parts")
    parts.chunk_size = 1 << 20
    parts.upload_from_string(content)

    assert vertex.storage.path("gs://bucket/c/whole").read_bytes() == content
    assert bucket.blob("c/parts").download_as_bytes() == content
    assert bucket.blob("c/parts").download_as_bytes(start=10, end=19) == content[10:20]
    assert [blob.name for blob in client.list_blobs("bucket", prefix="c/")] == ["c/parts", "c/whole"]
    bucket.blob("c/both").compose([bucket.blob("c/whole"), bucket.blob("c/parts")])
    assert bucket.copy_blob(bucket.blob("c/both"), bucket, "d/copy with blanks").size == 2 * len(content)
    assert bucket.get_blob("none") is None
    assert bucket.exists()
    assert not client.bucket("none").exists()
    vertex.storage.permissions["bucket"] = {"storage.objects.get"}
    assert bucket.test_iam_permissions(["storage.objects.get", "storage.objects.create"]) == ["storage.objects.get"]


def test_storage_fails_as_the_test_says(vertex):
    vertex.storage.fault = HttpsAnswer.error(403, "no access to the bucket")

    with pytest.raises(exceptions.Forbidden, match="no access to the bucket"):
        storage.Client().bucket("bucket").exists()


def test_environment_leads_a_child_process_here(tmp_path):
    """The SDK, TensorFlow's own file system and Beam's, in a process that knows nothing but the variables."""
    script = """
        from google.cloud import aiplatform
        import tensorflow as tf
        from apache_beam.io.filesystems import FileSystems

        aiplatform.init(project="test-project", location="us-central1")
        module = tf.Module()
        module.weight = tf.Variable(3.0)
        module.call = tf.function(lambda x: module.weight * x, input_signature=[tf.TensorSpec([])])
        tf.saved_model.save(module, "gs://bucket/model/1")
        loaded = tf.saved_model.load("gs://bucket/model/1")
        assert loaded.call(2.0) == 6.0
        with tf.io.gfile.GFile("gs://bucket/a.txt", "w") as file:
            file.write("one")
        with tf.io.gfile.GFile("gs://bucket/a.txt", "a") as file:
            file.write(" two")
        assert tf.io.gfile.glob("gs://bucket/*.txt") == ["gs://bucket/a.txt"]
        tf.io.gfile.rename("gs://bucket/a.txt", "gs://bucket/b.txt")
        assert not tf.io.gfile.exists("gs://bucket/a.txt") and tf.io.gfile.isdir("gs://bucket/model")
        FileSystems.rename(["gs://bucket/b.txt"], ["gs://bucket/c.txt"])
        assert FileSystems.open("gs://bucket/c.txt").read() == b"one two"
        tf.io.gfile.rmtree("gs://bucket/model/1/variables")
        model = aiplatform.Model.upload(
            display_name="m", artifact_uri="gs://bucket/model/1", serving_container_image_uri="image"
        )
        print(model.resource_name)
    """
    with VertexStandIn(tmp_path) as stand_in:
        stand_in.storage.create_bucket("bucket")
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
            env={**os.environ, **stand_in.environment, "TF_CPP_MIN_LOG_LEVEL": "3"},
            capture_output=True,
            text=True,
            timeout=600,
        )

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == next(iter(stand_in.models))
    assert stand_in.storage.path("gs://bucket/c.txt").read_text() == "one two"
    assert not stand_in.storage.path("gs://bucket/model/1/variables/variables.index").exists()
    assert not stand_in.network.refused
    assert not stand_in.unknown
