"""What a run on Google Cloud needs, asked for before it begins: each thing as one line, with the command that provides it.

Nothing is changed and nothing costs. `kubeflow_runner.py --check` calls it; a run that it lets pass can still meet what no API
tells beforehand, such as a region that has no free GPU.
"""

import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from data.errors import EXIT_DONE, EXIT_FAILED, EXIT_WRONG_INPUT
from data.features import LABELS_FILE, SCHEMA_FILE, SCHEMA_FOLDER, TRAIN_SPLIT
from pipeline.cloud_access import (
    ARTIFACT_IMAGE,
    STORAGE_ROLE,
    bucket_name,
    check_permissions,
    check_roles,
    check_service_account,
    member_name,
    project_number,
    repository_name,
)
from pipeline.cloud_quota import Quota, dataflow_quotas, vertex_quotas
from pipeline.cloud_rest import Cloud, Finding, NoCredentialsError, RefusedError, UnreachableError, quoted
from pipeline.config import Config
from pipeline.console import output_to_log
from pipeline.vertex import require_name, require_settings, serving_image

_MARKS = {"ok": "[green]ok     [/]", "missing": "[red]missing[/]", "unknown": "[yellow]unknown[/]", "note": "[dim]note   [/]"}
_PUBLIC_IMAGES = "vertex-ai"  # project of Vertex AI's own containers, which anyone may pull
_MULTI_REGIONS = {"us": "us-", "eu": "europe-", "asia": "asia-"}  # of a bucket, and how the names of their regions begin
_BUCKET_ROLE = "roles/storage.legacyBucketReader"  # the least that has storage.buckets.get
_BUCKET_PERMISSIONS = [f"storage.objects.{verb}" for verb in ("create", "get", "list", "delete")]


def check_cloud(config: Config) -> int:
    """Checks what a run needs, prints a line for each thing, and returns the exit code.

    Args:
      config: every setting.

    Returns:
      0: all is there; 1: something could not be asked for; 2: something is missing.

    Raises:
      InputError: if a setting is missing or impossible, as when the pipeline is compiled.
    """
    require_settings(config.vertex, config.engine)
    require_name(config.pipeline_name)
    terminal_options = {"force_terminal": Console().is_terminal, "width": Console().width}  # asked before output is redirected
    # Google's libraries warn of each thing that is not there, which is what is to be found out.
    with tempfile.NamedTemporaryFile("r", suffix=".log") as log, output_to_log(Path(log.name)) as terminal:
        states = []
        for subject, finding in _all_findings(config):
            states.append(finding.state)
            line = f"{_MARKS[finding.state]} {escape(f'{subject:<16}')} {escape(finding.text)}"
            Console(file=terminal, **terminal_options).print(line, highlight=False, soft_wrap=True)
    if "missing" in states:
        return EXIT_WRONG_INPUT
    return EXIT_FAILED if "unknown" in states else EXIT_DONE


def _all_findings(config: Config) -> Iterator[tuple[str, Finding]]:
    """Yields what came out for each subject; nothing more once the credentials or the connection fail."""
    try:
        cloud = Cloud(config.vertex.project)
        yield "credentials", Finding("ok", cloud.account or "an account that does not tell its name")
        for subject, check in _checks(config):
            for finding in _findings(check, cloud, config):
                yield subject, finding
    except NoCredentialsError as error:
        yield "credentials", Finding("missing", str(error))
    except UnreachableError as error:
        yield "connection", Finding("unknown", f"Google Cloud does not answer: {error}")


_Check = Callable[[Cloud, Config], Iterator[Finding]]


def _checks(config: Config) -> Iterator[tuple[str, _Check]]:
    """The checks that the settings ask for; Kubeflow alone needs a bucket, records and an image only."""
    vertex = config.vertex
    has_dataflow = vertex.runs_on_dataflow(config.engine)
    if vertex.project and (config.engine == "vertex" or has_dataflow):
        yield "project", _check_project
        yield "APIs", _check_apis
        if config.engine == "vertex":
            yield "your permissions", check_permissions
        yield "service account", check_service_account
        yield "its roles", check_roles
    yield "bucket", _check_bucket
    yield "records", _check_records
    yield "image", _check_images
    if config.engine == "vertex":
        yield "quota", _check_vertex_quota
        if vertex.tensorboard:
            yield "TensorBoard", _check_tensorboard
    if has_dataflow:
        yield "quota", _check_dataflow_quota
        if not vertex.dataflow_public_ips:
            yield "subnetwork", _check_subnetwork


def _findings(check: _Check, cloud: Cloud, config: Config) -> Iterator[Finding]:
    try:
        yield from check(cloud, config)
    except RefusedError as error:
        if error.disabled_service:
            enable = f"gcloud services enable {error.disabled_service} --project={config.vertex.project}"
            yield Finding("unknown", f"cannot be asked for, as {error.disabled_service} is not enabled. Enable it: {enable}")
        else:
            yield Finding("unknown", f"{cloud.account or 'the account'} may not ask: {error}")


def _check_project(cloud: Cloud, config: Config) -> Iterator[Finding]:
    project = config.vertex.project
    try:
        answer = cloud.get("cloudresourcemanager", f"/v3/projects/{quoted(project)}")
    except RefusedError as error:
        if error.disabled_service or error.status not in (403, 404):
            raise
        yield Finding(
            "missing", f"{project} is not there, or the account may not see it. Those that it sees: gcloud projects list"
        )
        return
    if answer.get("state") != "ACTIVE":
        yield Finding("missing", f"{project} is {answer.get('state')}. Restore it: gcloud projects undelete {project}")
    else:
        yield Finding("ok", f"{project}, number {project_number(answer)}")


def _check_apis(cloud: Cloud, config: Config) -> Iterator[Finding]:
    project = config.vertex.project
    apis = ["storage.googleapis.com", "artifactregistry.googleapis.com", "compute.googleapis.com"]
    if config.engine == "vertex":
        apis.append("aiplatform.googleapis.com")
    if config.vertex.runs_on_dataflow(config.engine):
        apis.append("dataflow.googleapis.com")
    names = [f"projects/{project}/services/{api}" for api in apis]
    answer = cloud.get("serviceusage", f"/v1/projects/{quoted(project)}/services:batchGet", names=names)
    enabled = {one["name"].rpartition("/")[2] for one in answer.get("services", []) if one.get("state") == "ENABLED"}
    if disabled := [api for api in apis if api not in enabled]:
        enable = f"gcloud services enable {' '.join(disabled)} --project={project}"
        yield Finding("missing", f"{', '.join(disabled)} not enabled. Enable: {enable}")
    else:
        yield Finding("ok", f"{', '.join(apis)} enabled")


def _check_bucket(cloud: Cloud, config: Config) -> Iterator[Finding]:
    name, region, project = bucket_name(config), config.vertex.region, config.vertex.project
    on_project = f" --project={project}" if project else ""
    path = f"/storage/v1/b/{quoted(name)}/iam/testPermissions"
    answer = cloud.find("storage", path, permissions=_BUCKET_PERMISSIONS)  # which anyone may ask for
    if answer is None:
        create = f"gcloud storage buckets create gs://{name} --location={region} --uniform-bucket-level-access{on_project}"
        yield Finding("missing", f"gs://{name} is not there. Create it: {create}")
        return
    bind = f"gcloud storage buckets add-iam-policy-binding gs://{name} --member={member_name(cloud.account)} --role="
    try:
        yield _location_finding(cloud, config)
    except RefusedError as error:
        if error.status != 403:
            raise
        yield Finding("unknown", f"you may not ask where gs://{name} is. Give: {bind}{_BUCKET_ROLE}")
    if lacking := sorted(set(_BUCKET_PERMISSIONS) - set(answer.get("permissions", []))):
        yield Finding("missing", f"you lack {', '.join(lacking)} on gs://{name}. Give: {bind}{STORAGE_ROLE}")
    else:
        yield Finding("ok", f"gs://{name} may be read and written")


def _location_finding(cloud: Cloud, config: Config) -> Finding:
    name, region = bucket_name(config), config.vertex.region
    bucket = cloud.get("storage", f"/storage/v1/b/{quoted(name)}", fields="location,locationType")
    location = bucket["location"].lower()
    if config.engine != "vertex" or location == region:
        return Finding("ok", f"gs://{name} in {location}")
    is_around = location in _MULTI_REGIONS and region.startswith(_MULTI_REGIONS[location])
    if is_around or bucket.get("locationType") == "dual-region":
        return Finding("note", f"gs://{name} is in {location}, the run in {region}; a bucket of that region costs less")
    return Finding("missing", f"gs://{name} is in {location}, the run in {region}. Take a bucket or a region that fit")


def _check_records(cloud: Cloud, config: Config) -> Iterator[Finding]:
    folder = config.data.input.rstrip("/")
    output = folder if folder.startswith("gs://") else "gs://..."
    prepare = f"Write them: python -m data.prepare --input PHOTOS --output {output}"
    if not folder.startswith("gs://"):
        yield Finding("missing", f"`data.input` is {folder!r}, no gs:// folder. {prepare}")
        return
    bucket, _, prefix = folder.removeprefix("gs://").partition("/")
    prefix = f"{prefix}/" if prefix else ""
    objects = f"/storage/v1/b/{quoted(bucket)}/o"
    schema = f"{prefix}{SCHEMA_FOLDER}/{SCHEMA_FILE}"
    if any(
        cloud.find("storage", f"{objects}/{quoted(name)}", fields="name") is None for name in (prefix + LABELS_FILE, schema)
    ):
        yield Finding("missing", f"{folder} has no {LABELS_FILE} or no {SCHEMA_FOLDER}/{SCHEMA_FILE}. {prepare}")
        return
    labels = cloud.read("storage", f"{objects}/{quoted(prefix + LABELS_FILE)}", alt="media").splitlines()
    if not cloud.get("storage", objects, prefix=f"{prefix}{TRAIN_SPLIT}-", maxResults="1", fields="items(name)").get("items"):
        yield Finding("missing", f"{folder} has no {TRAIN_SPLIT}-* records. {prepare}")
        return
    expected = list(config.data.class_names)
    if expected and labels != expected:
        yield Finding("missing", f"{folder} has the classes {labels}, `data.class_names` {expected}. Make them the same")
    else:
        yield Finding("ok", f"{folder}, {len(labels)} classes")


def _check_images(cloud: Cloud, config: Config) -> Iterator[Finding]:
    images = [config.vertex.image]
    if config.engine == "vertex" and config.vertex.deployer != "none":
        images.append(serving_image(config.vertex))
    for name in dict.fromkeys(images):
        image = ARTIFACT_IMAGE.fullmatch(name)
        if not image:
            yield Finding("note", f"{name} is not in Artifact Registry, so it is not looked for")
        elif image["project"] != _PUBLIC_IMAGES:
            yield from _check_image(cloud, name, image)


def _check_image(cloud: Cloud, name: str, image: re.Match[str]) -> Iterator[Finding]:
    repository = repository_name(image)
    version = f"versions/{quoted(image['digest'])}" if image["digest"] else f"tags/{quoted(image['tag'] or 'latest')}"
    if cloud.find("artifactregistry", f"/v1/{repository}") is None:
        create = (
            f"gcloud artifacts repositories create {image['repository']} --repository-format=docker "
            f"--location={image['location']} --project={image['project']}"
        )
        yield Finding("missing", f"its repository {image['repository']} is not there. Create it: {create}")
        return
    if cloud.find("artifactregistry", f"/v1/{repository}/packages/{quoted(image['name'])}/{version}") is None:
        yield Finding("missing", f"{name} is not there. Build and push it: docker build -t {name} . && docker push {name}")
    else:
        yield Finding("ok", f"{name} is there")  # whether the steps may pull it is among their account's roles


def _check_vertex_quota(cloud: Cloud, config: Config) -> Iterator[Finding]:
    yield from (_quota_finding(quota, config.vertex.region) for quota in vertex_quotas(cloud, config.vertex))


def _check_dataflow_quota(cloud: Cloud, config: Config) -> Iterator[Finding]:
    yield from (_quota_finding(quota, config.vertex.region) for quota in dataflow_quotas(cloud, config.vertex))


def _quota_finding(quota: Quota, region: str) -> Finding:
    if quota.available is None:
        return Finding("note", f"{quota.needed} {quota.what} in {region}: no API tells the limit. Look: {quota.link}")
    has = f"{quota.available:g}" if quota.available < float("inf") else "no limit"
    if quota.available < quota.needed:
        return Finding("missing", f"{quota.needed} {quota.what} in {region}; the quota has {has}. Ask for more: {quota.link}")
    if quota.available < quota.wanted:
        return Finding("note", f"{quota.wanted} {quota.what} in {region} would be used, the quota has {has}: {quota.link}")
    return Finding("ok", f"{quota.wanted} {quota.what} in {region}; the quota has {has}")


def _check_tensorboard(cloud: Cloud, config: Config) -> Iterator[Finding]:
    name, region = config.vertex.tensorboard, config.vertex.region
    if cloud.find(f"{region}-aiplatform", f"/v1/{name}") is None:
        create = f"gcloud ai tensorboards create --display-name=tfx-vision --region={region} --project={config.vertex.project}"
        yield Finding("missing", f"{name} is not there. Create one: {create}")
    else:
        yield Finding("ok", name)


def _check_subnetwork(cloud: Cloud, config: Config) -> Iterator[Finding]:
    vertex = config.vertex
    given = vertex.dataflow_subnetwork or f"regions/{vertex.region}/subnetworks/default"
    path = given[given.index("projects/") :] if "projects/" in given else f"projects/{vertex.project}/{given}"
    name = path.rpartition("/")[2]
    answer = cloud.find("compute", f"/compute/v1/{path}")
    if answer is None:
        yield Finding("missing", f"{path} is not there. Those that are: gcloud compute networks subnets list")
    elif answer.get("privateIpGoogleAccess"):
        yield Finding("ok", f"{name} has Private Google Access")
    else:
        mend = f"gcloud compute networks subnets update {name} --region={vertex.region} --enable-private-ip-google-access"
        yield Finding("missing", f"{name} lacks Private Google Access, as workers without addresses need it. Mend: {mend}")
