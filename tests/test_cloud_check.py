"""What `kubeflow_runner.py --check` asks Google Cloud, against answers in the JSON of the APIs' own documents."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import vertex_stand_in
from conftest import ROOT
from google_cloud_network import HttpsAnswer, HttpsRequest

from data.errors import InputError
from pipeline.cloud_check import check_cloud
from pipeline.config import Config, load_config

pytestmark = pytest.mark.one_stack
google_cloud = vertex_stand_in.google_cloud

PROJECT, NUMBER, REGION = vertex_stand_in.PROJECT, vertex_stand_in.PROJECT_NUMBER, "us-central1"
ACCOUNT = f"steps@{PROJECT}.iam.gserviceaccount.com"
ME = f"serviceAccount:tfx-vision@{PROJECT}.iam.gserviceaccount.com"
REPOSITORY = f"projects/{PROJECT}/locations/us/repositories/images"
IMAGE = f"us-docker.pkg.dev/{PROJECT}/images/tfx/vision:1"
TRAINING_GPUS = "aiplatform.googleapis.com/custom_model_training_nvidia_t4_gpus"
TENSORBOARD = f"projects/{PROJECT}/locations/{REGION}/tensorboards/7"
ROLES = (
    *("roles/storage.objectAdmin", "roles/aiplatform.user", "roles/dataflow.developer", "roles/dataflow.worker"),
    *("roles/iam.serviceAccountUser", "roles/artifactregistry.reader"),
)


@dataclasses.dataclass
class Apis:
    """The REST APIs beside storage: a project in which all is there, until a test takes something away."""

    is_project: bool = True
    services: set[str] = dataclasses.field(
        default_factory=lambda: {"storage", "artifactregistry", "compute", "aiplatform", "dataflow"}
    )
    permissions: set[str] = dataclasses.field(
        default_factory=lambda: {
            *(f"aiplatform.pipelineJobs.{verb}" for verb in ("create", "get", "list", "cancel")),
            "iam.serviceAccounts.actAs",
            "artifactregistry.repositories.downloadArtifacts",
        }
    )
    accounts: set[str] = dataclasses.field(default_factory=lambda: {ACCOUNT})
    roles: dict[str, list[str]] = dataclasses.field(default_factory=lambda: {ACCOUNT: list(ROLES)})
    account_roles: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # on the account itself
    resources: set[str] = dataclasses.field(
        default_factory=lambda: {
            f"/v1/{REPOSITORY}",
            f"/v1/{REPOSITORY}/packages/tfx%2Fvision/tags/1",
            f"/v1/{REPOSITORY}/packages/tfx%2Fvision/versions/sha256%3A{'a' * 64}",
            f"/v1/{TENSORBOARD}",
        }
    )
    limits: dict[str, dict[str, int]] = dataclasses.field(
        default_factory=lambda: {
            TRAINING_GPUS: {REGION: 2, "": 0},
            "aiplatform.googleapis.com/custom_model_training_cpus": {"": 42},
            "aiplatform.googleapis.com/custom_model_training_preemptible_nvidia_t4_gpus": {REGION: 1},
            "aiplatform.googleapis.com/custom_model_training_preemptible_cpus": {"": 1},
            "aiplatform.googleapis.com/custom_model_serving_nvidia_l4_gpus": {"": -1},
        }
    )
    compute: dict[str, tuple[float, float]] = dataclasses.field(
        default_factory=lambda: {"CPUS": (72.0, 8.0), "N2_CPUS": (8.0, 0.0), "IN_USE_ADDRESSES": (23.0, 0.0)}
    )
    is_private_access: bool = True
    refusals: dict[str, HttpsAnswer] = dataclasses.field(default_factory=dict)  # by host
    requests: list[HttpsRequest] = dataclasses.field(default_factory=list)

    def answer(self, request: HttpsRequest) -> HttpsAnswer:
        self.requests.append(request)
        assert request.headers["authorization"] == "Bearer ya29.stand-in"
        host = request.host.removesuffix(".googleapis.com")
        if host in self.refusals:
            return self.refusals[host]
        path, _, verb = request.path.rpartition(":") if re.search(r":[a-zA-Z]+$", request.path) else (request.path, "", "")
        if verb == "testIamPermissions":
            return self._permissions(request, path)
        if verb == "getIamPolicy":
            return self._policy(request, path)
        if host == "cloudresourcemanager" and path == f"/v3/projects/{PROJECT}":
            if not self.is_project:
                return HttpsAnswer.error(403, "The caller does not have permission")
            return HttpsAnswer(body={"name": f"projects/{NUMBER}", "projectId": PROJECT, "state": "ACTIVE"})
        if host == "serviceusage" and verb == "batchGet":
            return HttpsAnswer(body={"services": [self._service(name) for name in _values(request, "names")]})
        if host == "serviceusage":
            return self._quota(path)
        if host == "compute" and path == f"/compute/v1/projects/{PROJECT}/regions/{REGION}":
            quotas = [{"metric": name, "limit": limit, "usage": usage} for name, (limit, usage) in self.compute.items()]
            return HttpsAnswer(body={"kind": "compute#region", "name": REGION, "quotas": quotas})
        if host == "compute" and path == f"/compute/v1/projects/{PROJECT}/regions/{REGION}/subnetworks/inner":
            return HttpsAnswer(body={"kind": "compute#subnetwork", "privateIpGoogleAccess": self.is_private_access})
        if path in self.resources:
            return HttpsAnswer(body={"name": path.removeprefix("/v1/")})
        return HttpsAnswer.error(404, f"Requested entity was not found: {path}")

    def _service(self, name: str) -> dict[str, Any]:
        service = name.rpartition("/")[2]
        state = "ENABLED" if service.removesuffix(".googleapis.com") in self.services else "DISABLED"
        return {"name": f"projects/{NUMBER}/services/{service}", "parent": f"projects/{NUMBER}", "state": state}

    def _permissions(self, request: HttpsRequest, path: str) -> HttpsAnswer:
        if request.host.startswith("iam.") and path.rpartition("/")[2].replace("%40", "@") not in self.accounts:
            return HttpsAnswer.error(404, "Unknown service account")
        asked = set(json.loads(request.body)["permissions"])
        granted = sorted(asked & self.permissions)
        return HttpsAnswer(body={"permissions": granted} if granted else {})

    def _policy(self, request: HttpsRequest, path: str) -> HttpsAnswer:
        given = self.roles if "/projects/" in path and request.host.startswith("cloudresourcemanager") else {}
        given = self.account_roles if request.host.startswith("iam.") else given
        bindings = [
            {"role": role, "members": ["user:else@example.com", f"serviceAccount:{account}"]}
            for account, roles in given.items()
            for role in roles
        ]
        return HttpsAnswer(body={"version": 1, "bindings": bindings, "etag": "BwX="})

    def _quota(self, path: str) -> HttpsAnswer:
        metric = path.rpartition("/")[2].replace("%2F", "/")
        if metric not in self.limits:
            return HttpsAnswer.error(404, f"Metric {metric} not found")
        buckets = [
            {"effectiveLimit": str(limit), **({"dimensions": {"region": region}} if region else {})}
            for region, limit in sorted(self.limits[metric].items())
        ]
        for bucket in buckets:
            if bucket["effectiveLimit"] == "0":
                del bucket["effectiveLimit"]
        limits = [
            {"metric": metric, "unit": "1/{project}", "quotaBuckets": [{"effectiveLimit": "1000"}]},
            {"metric": metric, "unit": "1/{project}/{region}", "quotaBuckets": buckets},
        ]
        return HttpsAnswer(body={"metric": metric, "consumerQuotaLimits": limits})


def _values(request: HttpsRequest, name: str) -> list[str]:
    import urllib.parse

    return urllib.parse.parse_qs(request.query)[name]


@pytest.fixture
def apis(google_cloud) -> Apis:
    """The APIs; and a bucket with records."""
    apis = Apis()
    hosts = "cloudresourcemanager|serviceusage|iam|artifactregistry|compute|openidconnect|us-central1-aiplatform"
    google_cloud.network.https.append((rf"({hosts})\.googleapis\.com", apis.answer))
    records = google_cloud.storage.create_bucket("bucket") / "records"
    (records / "schema").mkdir(parents=True)
    (records / "labels.txt").write_text("daisy\nrose\n")
    (records / "schema" / "schema.pbtxt").write_text("")
    (records / "train-00000-of-00001.tfrecord.gz").write_bytes(b"x")
    return apis


def settings(*overrides: str) -> Config:
    values = [
        "pipeline.name=flowers",
        "data.input=gs://bucket/records",
        'data.class_names=["daisy", "rose"]',
        f"vertex.project={PROJECT}",
        "vertex.bucket=gs://bucket",
        f"vertex.image={IMAGE}",
        f"vertex.service_account={ACCOUNT}",
    ]
    return load_config(overrides=[*values, *overrides], environment={})


def lines(capfd: pytest.CaptureFixture[str]) -> list[tuple[str, str, str]]:
    """State, subject and text of each line."""
    out = capfd.readouterr().out
    return [(line[:7].strip(), line[8:24].strip(), line[25:]) for line in out.splitlines()]


def problems(capfd: pytest.CaptureFixture[str]) -> list[tuple[str, str, str]]:
    return [line for line in lines(capfd) if line[0] != "ok"]


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
    assert f"{IMAGE} is there and may be pulled" in texts
    assert "1 NVIDIA_TESLA_T4 of training in us-central1; the quota has 2" in texts
    assert "8 CPUs of training in us-central1; the quota has 42" in texts
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


@pytest.mark.parametrize(
    ("permission", "subject", "command"),
    [
        (
            "aiplatform.pipelineJobs.create",
            "your permissions",
            f"gcloud projects add-iam-policy-binding {PROJECT} --member={ME} --condition=None --role=roles/aiplatform.user",
        ),
        (
            "iam.serviceAccounts.actAs",
            "service account",
            f"gcloud iam service-accounts add-iam-policy-binding {ACCOUNT} --role=roles/iam.serviceAccountUser --member={ME}",
        ),
        (
            "artifactregistry.repositories.downloadArtifacts",
            "image",
            f"gcloud artifacts repositories add-iam-policy-binding images --location=us --project={PROJECT} --member={ME} "
            "--role=roles/artifactregistry.reader",
        ),
    ],
)
def test_check_gives_the_command_for_a_permission(apis, capfd, permission, subject, command):
    apis.permissions.remove(permission)

    assert check_cloud(settings()) == 2
    ((state, where, text),) = problems(capfd)
    assert (state, where) == ("missing", subject)
    assert text.endswith(f"Give: {command}")


def test_check_names_an_account_that_is_not_there(apis, capfd):
    apis.accounts.clear()

    assert check_cloud(settings()) == 2
    assert problems(capfd) == [
        (
            "missing",
            "service account",
            f"{ACCOUNT} is not there. Create it: gcloud iam service-accounts create steps --project={PROJECT}",
        )
    ]


@pytest.mark.parametrize("role", ROLES)
def test_check_names_a_role_that_the_steps_lack(apis, capfd, role):
    apis.roles[ACCOUNT].remove(role)

    assert check_cloud(settings()) == 2
    ((state, subject, text),) = problems(capfd)
    assert (state, subject) == ("missing", "its roles")
    assert text.startswith(f"{ACCOUNT} has no {role} (")
    assert text.endswith(
        f"gcloud projects add-iam-policy-binding {PROJECT} --member=serviceAccount:{ACCOUNT} --condition=None --role={role}"
    )


def test_check_gives_one_command_for_several_roles(apis, capfd):
    apis.roles.clear()

    assert check_cloud(settings()) == 2
    ((_, _, text),) = problems(capfd)
    assert set(re.search(r"for role in (.*?);", text)[1].split()) == set(ROLES)
    assert text.endswith("--role=$role; done")


@pytest.mark.parametrize("role", ["roles/editor", "roles/owner"])
def test_check_takes_a_basic_role_for_all_of_them(apis, role):
    apis.roles = {ACCOUNT: [role]}

    assert check_cloud(settings()) == 0


def test_check_takes_a_role_on_the_account_itself(apis):
    apis.roles[ACCOUNT].remove("roles/iam.serviceAccountUser")
    apis.account_roles = {ACCOUNT: ["roles/iam.serviceAccountUser"]}

    assert check_cloud(settings()) == 0


def test_check_without_a_service_account_looks_at_compute_engine_s(apis, capfd):
    default = f"{NUMBER}-compute@developer.gserviceaccount.com"
    apis.accounts, apis.roles = {default}, {default: ["roles/editor"]}

    assert check_cloud(settings("vertex.service_account=")) == 0
    assert ("ok", "service account", f"{default}, which you may let steps act as") in lines(capfd)


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
    google_cloud.storage.permissions["bucket"] = {"storage.objects.get", "storage.objects.list", "storage.objects.delete"}

    assert check_cloud(settings()) == 2
    assert problems(capfd) == [
        (
            "missing",
            "bucket",
            "you lack storage.objects.create on gs://bucket. Give: gcloud storage buckets add-iam-policy-binding gs://bucket "
            f"--role=roles/storage.objectAdmin --member={ME}",
        )
    ]


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
