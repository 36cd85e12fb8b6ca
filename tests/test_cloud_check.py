"""What `kubeflow_runner.py --check` asks Google Cloud, against the stand-in's REST APIs; roles and quotas are tested apart."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cloud_apis
import pytest
import vertex_stand_in
from cloud_apis import ACCOUNT, IMAGE, ME, NUMBER, PROJECT, REGION, REPOSITORY, ROLES, TENSORBOARD, lines, problems, settings
from conftest import ROOT
from google_cloud_network import HttpsAnswer, HttpsRequest

from data.errors import InputError
from pipeline.cloud_check import check_cloud

pytestmark = pytest.mark.one_stack
google_cloud = vertex_stand_in.google_cloud
apis = cloud_apis.apis

OBJECTS = {f"storage.objects.{verb}" for verb in ("create", "delete", "get", "list")}


def test_check_ends_with_zero_where_all_is_there(apis, google_cloud, capfd):
    assert check_cloud(settings()) == 0

    found = lines(capfd)
    assert {state for state, _, _ in found} == {"ok"}
    assert list(dict.fromkeys(subject for _, subject, _ in found)) == [
        *("credentials", "project", "APIs", "your permissions", "service account", "its roles"),
        *("bucket", "records", "image", "quota"),
    ]
    texts = {text for _, _, text in found}
    assert ME.partition(":")[2] in texts
    assert f"{PROJECT}, number {NUMBER}" in texts
    assert "gs://bucket in us-central1" in texts
    assert "gs://bucket/records, 2 classes" in texts
    assert f"{IMAGE} is there" in texts
    assert "1 NVIDIA_TESLA_T4 of training in us-central1; the quota has 2" in texts
    assert "8 CPUs of training in us-central1; the quota has 42" in texts
    assert "8 CPUs of serving in us-central1; the quota has 30" in texts
    assert "32 CPUs of Dataflow's workers in us-central1; the quota has 64" in texts
    assert google_cloud.network.refused == []


def test_check_only_asks(apis, google_cloud):
    check_cloud(settings())

    assert {request.method for request in apis.requests} == {"GET", "POST"}
    for request in apis.requests:
        if request.method == "POST":
            assert request.path.endswith((":testIamPermissions", ":getIamPolicy"))


@pytest.mark.parametrize("service", ["aiplatform", "dataflow", "artifactregistry"])
def test_check_names_an_api_that_is_not_enabled(apis, capfd, service):
    apis.services.remove(service)

    assert check_cloud(settings()) == 2
    name = f"{service}.googleapis.com"
    assert problems(capfd) == [
        ("missing", "APIs", f"{name} not enabled. Enable: gcloud services enable {name} --project={PROJECT}")
    ]


def test_check_needs_no_dataflow_api_where_steps_run_beam_themselves(apis, capfd):
    apis.services.remove("dataflow")
    apis.roles[ACCOUNT] = [role for role in ROLES if "dataflow" not in role and "serviceAccountUser" not in role]
    apis.compute = {}

    assert check_cloud(settings("vertex.dataflow=false")) == 0


def test_check_names_a_project_that_is_not_there(apis, capfd):
    apis.is_project = False

    assert check_cloud(settings()) == 2
    text = f"{PROJECT} is not there, or the account may not see it. Those that it sees: gcloud projects list"
    assert ("missing", "project", text) in problems(capfd)


def test_check_names_a_bucket_that_is_not_there(apis, capfd):
    assert check_cloud(settings("vertex.bucket=gs://other/folder")) == 2
    assert problems(capfd) == [
        (
            "missing",
            "bucket",
            "gs://other is not there. Create it: gcloud storage buckets create gs://other --location=us-central1 "
            f"--uniform-bucket-level-access --project={PROJECT}",
        )
    ]


@pytest.mark.parametrize(("location", "code"), [("EUROPE-WEST4", 2), ("EU", 2), ("US", 0), ("US-CENTRAL1", 0)])
def test_check_wants_the_bucket_near_the_run(apis, google_cloud, capfd, location, code):
    google_cloud.storage.locations["bucket"] = location

    assert check_cloud(settings()) == code
    states = [state for state, subject, _ in lines(capfd) if subject == "bucket"]
    assert states == [{"EUROPE-WEST4": "missing", "EU": "missing", "US": "note", "US-CENTRAL1": "ok"}[location], "ok"]


def test_check_wants_to_write_into_the_bucket(apis, google_cloud, capfd):
    google_cloud.storage.permissions["bucket"] = OBJECTS - {"storage.objects.create"} | {"storage.buckets.get"}

    assert check_cloud(settings()) == 2
    assert problems(capfd) == [
        (
            "missing",
            "bucket",
            "you lack storage.objects.create on gs://bucket. Give: gcloud storage buckets add-iam-policy-binding gs://bucket "
            f"--member={ME} --role=roles/storage.objectAdmin",
        )
    ]


def test_check_goes_on_where_the_bucket_s_location_may_not_be_seen(apis, google_cloud, capfd):
    google_cloud.storage.permissions["bucket"] = OBJECTS  # what roles/storage.objectAdmin has, and a run needs no more

    assert check_cloud(settings()) == 1
    found = [line for line in lines(capfd) if line[1] == "bucket"]
    assert found == [
        (
            "unknown",
            "bucket",
            "you may not ask where gs://bucket is. Give: gcloud storage buckets add-iam-policy-binding gs://bucket "
            f"--member={ME} --role=roles/storage.legacyBucketReader",
        ),
        ("ok", "bucket", "gs://bucket may be read and written"),
    ]


def test_check_names_what_a_person_without_any_role_on_the_bucket_lacks(apis, google_cloud, capfd):
    google_cloud.storage.permissions["bucket"] = set()

    assert check_cloud(settings()) == 2
    states = [(state, text.partition(".")[0]) for state, subject, text in lines(capfd) if subject == "bucket"]
    assert states == [("unknown", "you may not ask where gs://bucket is"), ("missing", "you lack storage")]


@pytest.mark.parametrize("file", ["labels.txt", "schema/schema.pbtxt", "train-00000-of-00001.tfrecord.gz"])
def test_check_wants_records(apis, google_cloud, capfd, file):
    google_cloud.storage.path(f"gs://bucket/records/{file}").unlink()

    assert check_cloud(settings()) == 2
    ((state, subject, text),) = problems(capfd)
    assert (state, subject) == ("missing", "records")
    assert text.endswith("Write them: python -m data.prepare --input PHOTOS --output gs://bucket/records")


def test_check_compares_the_classes(apis, capfd):
    assert check_cloud(settings('data.class_names=["rose", "daisy"]')) == 2
    assert problems(capfd) == [
        (
            "missing",
            "records",
            "gs://bucket/records has the classes ['daisy', 'rose'], `data.class_names` ['rose', 'daisy']. Make them the same",
        )
    ]


def test_check_wants_records_in_a_bucket(apis, capfd):
    assert check_cloud(settings("data.input=elpv")) == 2
    assert problems(capfd)[0][2].startswith("`data.input` is 'elpv', no gs:// folder.")


def test_check_names_an_image_or_a_repository_that_is_not_there(apis, capfd):
    apis.resources.remove(f"/v1/{REPOSITORY}/packages/tfx%2Fvision/tags/1")
    assert check_cloud(settings()) == 2
    ((_, subject, text),) = problems(capfd)
    assert subject == "image"
    assert text == f"{IMAGE} is not there. Build and push it: docker build -t {IMAGE} . && docker push {IMAGE}"

    apis.resources.remove(f"/v1/{REPOSITORY}")
    assert check_cloud(settings()) == 2
    ((_, _, text),) = problems(capfd)
    assert text == (
        "its repository images is not there. Create it: gcloud artifacts repositories create images --repository-format=docker "
        f"--location=us --project={PROJECT}"
    )


def test_check_finds_an_image_by_its_digest(apis):
    assert check_cloud(settings(f"vertex.image=us-docker.pkg.dev/{PROJECT}/images/tfx/vision@sha256:{'a' * 64}")) == 0
    assert check_cloud(settings(f"vertex.image=us-docker.pkg.dev/{PROJECT}/images/tfx/vision@sha256:{'b' * 64}")) == 2


def test_check_says_that_another_registry_is_not_looked_at(apis, capfd):
    assert check_cloud(settings("vertex.image=docker.io/me/tfx-vision:1")) == 0
    assert problems(capfd) == [
        ("note", "image", "docker.io/me/tfx-vision:1 is not in Artifact Registry, so it is not looked for")
    ]


def test_check_looks_at_the_serving_image_too(apis, capfd):
    other = f"us-docker.pkg.dev/{PROJECT}/images/server:2"

    assert check_cloud(settings(f"vertex.serving_image={other}")) == 2
    assert problems(capfd)[0][2].startswith(f"{other} is not there.")
    assert check_cloud(settings("vertex.serving_container=prebuilt")) == 0


def test_check_looks_for_the_tensorboard(apis, capfd):
    assert check_cloud(settings(f"vertex.tensorboard={TENSORBOARD}")) == 0
    assert ("ok", "TensorBoard", TENSORBOARD) in lines(capfd)
    assert check_cloud(settings(f"vertex.tensorboard={TENSORBOARD[:-1]}8")) == 2
    assert "gcloud ai tensorboards create --display-name=tfx-vision --region=us-central1" in problems(capfd)[0][2]


@pytest.mark.parametrize(
    ("subnetwork", "is_private", "code"),
    [
        (f"regions/{REGION}/subnetworks/inner", True, 0),
        (f"https://www.googleapis.com/compute/v1/projects/{PROJECT}/regions/{REGION}/subnetworks/inner", True, 0),
        (f"regions/{REGION}/subnetworks/inner", False, 2),
        (f"regions/{REGION}/subnetworks/outer", True, 2),
    ],
)
def test_check_wants_private_access_without_public_addresses(apis, capfd, subnetwork, is_private, code):
    apis.is_private_access = is_private
    config = settings("vertex.dataflow_public_ips=false", f"vertex.dataflow_subnetwork={subnetwork}")

    assert check_cloud(config) == code
    (found,) = [line for line in lines(capfd) if line[1] == "subnetwork"]
    assert found[0] == ("missing" if code else "ok")


def test_check_ends_with_one_where_something_may_not_be_asked(apis, capfd):
    apis.refusals["cloudresourcemanager"] = HttpsAnswer(
        403,
        {
            "error": {
                "code": 403,
                "message": "Cloud Resource Manager API has not been used in project 1 before or it is disabled.",
                "status": "PERMISSION_DENIED",
                "details": [
                    {
                        "@type": "type.googleapis.com/google.rpc.ErrorInfo",
                        "reason": "SERVICE_DISABLED",
                        "domain": "googleapis.com",
                        "metadata": {"service": "cloudresourcemanager.googleapis.com", "consumer": "projects/1"},
                    }
                ],
            }
        },
    )

    assert check_cloud(settings()) == 1
    found = problems(capfd)
    assert {subject for _, subject, _ in found} == {"project", "your permissions", "its roles"}
    for state, _, text in found:
        assert state == "unknown"
        assert text.endswith(f"Enable it: gcloud services enable cloudresourcemanager.googleapis.com --project={PROJECT}")


def test_check_says_why_something_may_not_be_asked(apis, capfd):
    apis.refusals["serviceusage"] = HttpsAnswer.error(403, "Permission denied to get service")

    assert check_cloud(settings()) == 1
    assert [(state, subject) for state, subject, _ in problems(capfd)] == [("unknown", "APIs"), ("unknown", "quota")]


def test_check_ends_with_two_where_something_is_missing_and_something_unknown(apis):
    apis.services.clear()
    apis.refusals["compute"] = HttpsAnswer.error(403, "no")

    assert check_cloud(settings()) == 2


@pytest.mark.parametrize(("num_failures", "code"), [(3, 0), (4, 1)])
def test_check_asks_again_where_an_api_is_busy(apis, google_cloud, num_failures, code):
    failures = iter(range(num_failures))

    def answer(request: HttpsRequest) -> HttpsAnswer:
        return apis.answer(request) if next(failures, None) is None else HttpsAnswer.error(503, "busy")

    google_cloud.network.https.append((r"iam\.googleapis\.com/.*testIamPermissions", answer))

    assert check_cloud(settings()) == code


def test_check_ends_with_one_where_nothing_answers(apis, google_cloud, capfd):
    google_cloud.network.is_down = True

    assert check_cloud(settings()) == 1
    ((state, subject, text),) = lines(capfd)
    assert (state, subject) == ("unknown", "connection")
    assert text.startswith("Google Cloud does not answer: ")


def test_check_says_that_credentials_are_no_longer_valid(apis, google_cloud, capfd):
    expired = {"error": "invalid_grant", "error_description": "Token has been expired or revoked."}
    google_cloud.network.https.append((r"oauth2\.googleapis\.com/token", lambda request: HttpsAnswer(400, expired)))

    assert check_cloud(settings()) == 2
    ((state, subject, text),) = lines(capfd)
    assert (state, subject) == ("missing", "credentials")
    assert text.startswith("no longer valid: ")
    assert text.endswith("Renew them: `gcloud auth application-default login`.")


def test_check_of_a_person_counts_requests_to_the_project(apis, google_cloud, capfd, monkeypatch, tmp_path):
    file = tmp_path / "adc.json"
    file.write_text(json.dumps({"type": "authorized_user", "client_id": "a", "client_secret": "b", "refresh_token": "c"}))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    token = {"access_token": "ya29.stand-in", "expires_in": 3600, "token_type": "Bearer"}
    google_cloud.network.https.append((r"oauth2\.googleapis\.com/token", lambda request: HttpsAnswer(body=token)))
    person = HttpsAnswer(body={"sub": "1", "email": "me@example.com", "email_verified": True})
    google_cloud.network.https.append((r"openidconnect\.googleapis\.com/v1/userinfo", lambda request: person))
    apis.permissions.remove("iam.serviceAccounts.actAs")

    assert check_cloud(settings()) == 2
    out = capfd.readouterr().out
    assert "credentials      me@example.com" in out
    assert "--member=user:me@example.com" in out
    assert {request.headers["x-goog-user-project"] for request in apis.requests} == {PROJECT}


def test_check_on_kubeflow_looks_at_what_it_takes(apis, capfd):
    config = settings("engine=kubeflow", "vertex.project=", "evaluation.compare_with=nothing")

    assert check_cloud(config) == 0
    assert list(dict.fromkeys(subject for _, subject, _ in lines(capfd))) == ["credentials", "bucket", "records", "image"]


def test_check_wants_the_settings_that_compiling_wants(apis):
    with pytest.raises(InputError, match=r"^Expected `vertex\.project` to be set\."):
        check_cloud(settings("vertex.project="))
    with pytest.raises(InputError, match=r"^Expected the name of a compiled pipeline to begin with a letter"):
        check_cloud(settings("pipeline.name=2024-flowers"))
    assert apis.requests == []


def test_runner_checks_in_a_process_of_its_own(apis, google_cloud, tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TFX_VISION_")}
    overrides = [
        "data.input=gs://bucket/records",
        f"vertex.project={PROJECT}",
        "vertex.bucket=gs://bucket",
        f"vertex.image={IMAGE}",
    ]
    command = [sys.executable, str(ROOT / "kubeflow_runner.py"), "--check"]
    command += [part for override in [*overrides, f"vertex.service_account={ACCOUNT}"] for part in ("--set", override)]

    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "gs://bucket/records, 2 classes" in done.stdout
    assert list(tmp_path.iterdir()) == [tmp_path / "google_cloud"]


def test_runner_without_credentials_says_so(tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TFX_VISION_", "GOOGLE_"))}
    environment |= {"HOME": str(tmp_path), "NO_GCE_CHECK": "true"}
    overrides = [f"vertex.project={PROJECT}", "vertex.bucket=gs://bucket", f"vertex.image={IMAGE}"]
    command = [sys.executable, str(ROOT / "kubeflow_runner.py"), "--check"]
    command += [part for override in overrides for part in ("--set", override)]

    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 2, done.stderr
    assert done.stderr == ""
    assert done.stdout == (
        "missing credentials      none found. Run `gcloud auth application-default login`, or set "
        "GOOGLE_APPLICATION_CREDENTIALS to a service account's key file.\n"
    )
