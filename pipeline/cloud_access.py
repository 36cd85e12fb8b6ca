"""Who may do what: the permissions of the person who runs the pipeline, and the account and the roles that its steps have.

Called by `pipeline.cloud_check`.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.cloud_rest import Cloud, Finding, RefusedError, quoted
from pipeline.config import Config

ARTIFACT_IMAGE = re.compile(
    r"(?P<location>[a-z0-9-]+)-docker\.pkg\.dev/(?P<project>[^/]+)/(?P<repository>[^/]+)/(?P<name>[^:@]+)"
    r"(:(?P<tag>[\w.-]+))?(@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_USER_ACCOUNT = re.compile(r"(?P<name>[^@]+)@(?P<project>[^.@]+)\.iam\.gserviceaccount\.com")  # that somebody created
_RUN_PERMISSIONS = [f"aiplatform.pipelineJobs.{verb}" for verb in ("create", "get", "list", "cancel")]
# Role -> others that hold it too. The basic roles hold all of them, those of objects by a new bucket's own policy.
_AIPLATFORM, STORAGE_ROLE, REGISTRY_ROLE = "roles/aiplatform.user", "roles/storage.objectAdmin", "roles/artifactregistry.reader"
_DATAFLOW, _WORKER, _ACT_AS = "roles/dataflow.developer", "roles/dataflow.worker", "roles/iam.serviceAccountUser"
_HOLDERS = {
    _AIPLATFORM: ("roles/aiplatform.admin",),
    STORAGE_ROLE: ("roles/storage.admin", "roles/storage.objectUser"),
    REGISTRY_ROLE: tuple(f"roles/artifactregistry.{name}" for name in ("writer", "repoAdmin", "admin")),
    _DATAFLOW: ("roles/dataflow.admin",),
}
_BASIC_ROLES = ("roles/owner", "roles/editor")


def check_permissions(cloud: Cloud, config: Config) -> Iterator[Finding]:
    """Checks that the account may submit, see and cancel runs."""
    project = config.vertex.project
    answer = cloud.post(
        "cloudresourcemanager", f"/v3/projects/{quoted(project)}:testIamPermissions", {"permissions": _RUN_PERMISSIONS}
    )
    if lacking := sorted(set(_RUN_PERMISSIONS) - set(answer.get("permissions", []))):
        yield Finding("missing", f"{', '.join(lacking)}. {_grant(project, member_name(cloud.account), _AIPLATFORM)}")
    else:
        yield Finding("ok", "may submit, see and cancel runs")


def _grant(project: str, member: str, *roles: str) -> str:
    """The command that gives roles on the project."""
    bind = f"gcloud projects add-iam-policy-binding {project} --member={member} --condition=None --role="
    if len(roles) == 1:
        return f"Give: {bind}{roles[0]}"
    return f"Give: for role in {' '.join(roles)}; do {bind}$role; done"


def member_name(account: str) -> str:
    """Returns an account as a policy names it."""
    if not account:
        return "user:YOU"
    return f"serviceAccount:{account}" if account.endswith("gserviceaccount.com") else f"user:{account}"


def _steps_account(cloud: Cloud, config: Config) -> str:
    """The account that the steps act as."""
    if config.vertex.service_account:
        return config.vertex.service_account
    number = project_number(cloud.get("cloudresourcemanager", f"/v3/projects/{quoted(config.vertex.project)}"))
    return f"{number}-compute@developer.gserviceaccount.com"  # of Compute Engine, which Vertex AI takes then


def check_service_account(cloud: Cloud, config: Config) -> Iterator[Finding]:
    """Checks that the account of the steps is there, and that whoever runs the pipeline may use it."""
    account = _steps_account(cloud, config)
    path = _account_path(account, config)
    if _may_act_as(cloud, path):
        yield Finding("ok", f"{account}, which you may let steps act as")
        return
    member = member_name(cloud.account)
    bind = f"gcloud iam service-accounts add-iam-policy-binding {account} --role={_ACT_AS} --member={member}"
    try:
        is_there = cloud.find("iam", path) is not None
    except RefusedError as error:
        if error.disabled_service or error.status != 403:
            raise
        text = f"{account} is not there, or you may not let steps act as it; Google Cloud does not tell which. "
        show = f"gcloud iam service-accounts list --project={config.vertex.project}"
        yield Finding("missing", f"{text}Those that are there: {show}. Give: {bind}")
        return
    if is_there:
        yield Finding("missing", f"you may not let steps act as {account}. Give: {bind}")
    elif match := _USER_ACCOUNT.fullmatch(account):
        create = f"gcloud iam service-accounts create {match['name']} --project={match['project']}"
        yield Finding("missing", f"{account} is not there. Create it: {create}")
    else:
        yield Finding("missing", f"{account} is not there. Set `vertex.service_account` to one that is")


def _account_path(account: str, config: Config) -> str:
    """The path of an account in the IAM API.

    Where the e-mail does not tell the project, Google Cloud finds it, but says 403 and not 404 of an account that is not there.

    Source: https://cloud.google.com/iam/docs/reference/rest/v1/projects.serviceAccounts/get
    """
    match = _USER_ACCOUNT.fullmatch(account)
    project = match["project"] if match else "-" if config.vertex.service_account else config.vertex.project
    return f"/v1/projects/{quoted(project)}/serviceAccounts/{quoted(account)}"


def _may_act_as(cloud: Cloud, path: str) -> bool:
    permission = "iam.serviceAccounts.actAs"
    try:
        answer = cloud.post("iam", f"{path}:testIamPermissions", {"permissions": [permission]})
    except RefusedError as error:
        if error.disabled_service or error.status not in (403, 404):
            raise
        return False
    return permission in answer.get("permissions", [])


def check_roles(cloud: Cloud, config: Config) -> Iterator[Finding]:
    """Checks that the account of the steps has the roles that they need, on the project or on the thing itself.

    Steps write artifacts, train, deploy, start Dataflow's jobs and are their workers; all of them pull the image.
    """
    vertex, account = config.vertex, _steps_account(cloud, config)
    needed = [STORAGE_ROLE]
    if config.engine == "vertex":
        needed.append(_AIPLATFORM)
    if vertex.runs_on_dataflow(config.engine):
        needed += [_DATAFLOW, _WORKER, _ACT_AS]
    image = ARTIFACT_IMAGE.fullmatch(vertex.image)
    if image:
        needed.append(REGISTRY_ROLE)
    policy_request = {"options": {"requestedPolicyVersion": 3}}
    policies = [cloud.post("cloudresourcemanager", f"/v3/projects/{quoted(vertex.project)}:getIamPolicy", policy_request)]
    narrower: dict[str, Callable[[], dict[str, Any]]] = {
        STORAGE_ROLE: lambda: cloud.get("storage", f"/storage/v1/b/{bucket_name(config)}/iam"),
        _ACT_AS: lambda: cloud.post("iam", f"{_account_path(account, config)}:getIamPolicy", {}),
    }
    if image:
        narrower[REGISTRY_ROLE] = lambda: cloud.get("artifactregistry", f"/v1/{repository_name(image)}:getIamPolicy")
    hidden = set()
    for role, read in narrower.items():
        try:
            policies.append(read())
        except RefusedError as error:  # what is not known there may still be given on the project
            if error.status != 404:
                hidden.add(role)
    member = f"serviceAccount:{account}"
    given = {one["role"] for policy in policies for one in policy.get("bindings", []) if member in one.get("members", [])}
    not_seen = [role for role in needed if not given & {role, *_HOLDERS.get(role, ()), *_BASIC_ROLES}]
    if lacking := [role for role in not_seen if role not in hidden]:
        yield Finding(
            "missing",
            f"{account} has no {', '.join(lacking)} (one that it has by a group or folder is not seen here). "
            f"{_grant(vertex.project, member, *lacking)}",
        )
    if unknown := [role for role in not_seen if role in hidden]:
        yield Finding(
            "unknown",
            f"{account} has no {', '.join(unknown)} on the project, and you may not see whether it has on the bucket, on the "
            f"registry or on itself. If not: {_grant(vertex.project, member, *unknown)}",
        )
    if not not_seen:
        yield Finding("ok", ", ".join(needed))


def bucket_name(config: Config) -> str:
    """Returns the name of the settings' bucket, without a folder in it."""
    return config.vertex.bucket.removeprefix("gs://").partition("/")[0]


def repository_name(image: re.Match[str]) -> str:
    """Returns the resource name of the repository that an image is in."""
    return f"projects/{image['project']}/locations/{image['location']}/repositories/{image['repository']}"


def project_number(project: dict[str, Any]) -> str:
    """Returns the number of a project, as its record has it."""
    return project["name"].partition("/")[2]
