"""The REST APIs that `kubeflow_runner.py --check` asks, with answers in the JSON of the APIs' own documents.

A test module takes the fixtures by `google_cloud = vertex_stand_in.google_cloud` and `apis = cloud_apis.apis`.
"""

import dataclasses
import json
import re
import urllib.parse
from typing import Any

import pytest
import vertex_stand_in
from google_cloud_network import HttpsAnswer, HttpsRequest

from pipeline.config import Config, load_config

PROJECT, NUMBER, REGION = vertex_stand_in.PROJECT, vertex_stand_in.PROJECT_NUMBER, "us-central1"
ACCOUNT = f"steps@{PROJECT}.iam.gserviceaccount.com"
ME = f"serviceAccount:tfx-vision@{PROJECT}.iam.gserviceaccount.com"
REPOSITORY = f"projects/{PROJECT}/locations/us/repositories/images"
IMAGE = f"us-docker.pkg.dev/{PROJECT}/images/tfx/vision:1"
TRAINING_GPUS = "aiplatform.googleapis.com/custom_model_training_nvidia_t4_gpus"
SERVING_CPUS = "aiplatform.googleapis.com/custom_model_serving_cpus"
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
        }
    )
    accounts: set[str] = dataclasses.field(default_factory=lambda: {ACCOUNT})
    may_see_accounts: bool = True
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
            SERVING_CPUS: {"": 30},
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
        if host == "iam" and (refusal := self._account_refusal(path, verb)):
            return refusal
        if verb == "testIamPermissions":
            return self._permissions(request)
        if verb == "getIamPolicy":
            return self._policy(request, path)
        if host == "iam":
            return HttpsAnswer(body={"name": urllib.parse.unquote(path.removeprefix("/v1/"))})
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

    def _account_refusal(self, path: str, verb: str) -> HttpsAnswer | None:
        """The answer for an account that is not there, or may not be seen: 403 for the project `-`, as Google documents it."""
        _, project, _, account = urllib.parse.unquote(path).removeprefix("/v1/").rsplit("/", 3)
        is_there = account in self.accounts
        if is_there and (verb == "testIamPermissions" or self.may_see_accounts):
            return None
        if project == "-" or not self.may_see_accounts:
            return HttpsAnswer.error(403, "Permission 'iam.serviceAccounts.get' denied on resource (or it may not exist).")
        return HttpsAnswer.error(404, f"Unknown service account: {account}")

    def _permissions(self, request: HttpsRequest) -> HttpsAnswer:
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
