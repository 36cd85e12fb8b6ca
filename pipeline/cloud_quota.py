"""Whether a project's quota lets a run begin: GPUs and CPUs of training and serving, and what Dataflow's workers take.

Called by `pipeline.cloud_check`.

Sources: https://cloud.google.com/vertex-ai/docs/quotas; https://cloud.google.com/dataflow/quotas;
https://cloud.google.com/service-usage/docs/reference/rest/v1beta1/services.consumerQuotaMetrics.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from pipeline.cloud_rest import Cloud, quoted
from pipeline.vertex import VertexConfig

_SERVICE = "aiplatform.googleapis.com"
_GPU_METRICS = {
    "NVIDIA_TESLA_T4": "nvidia_t4_gpus",
    "NVIDIA_TESLA_P4": "nvidia_p4_gpus",
    "NVIDIA_TESLA_P100": "nvidia_p100_gpus",
    "NVIDIA_TESLA_V100": "nvidia_v100_gpus",
    "NVIDIA_TESLA_A100": "nvidia_a100_gpus",
    "NVIDIA_A100_80GB": "nvidia_a100_80gb_gpus",
    "NVIDIA_L4": "nvidia_l4_gpus",
    "NVIDIA_H100_80GB": "nvidia_h100_gpus",
    "NVIDIA_H100_MEGA_80GB": "nvidia_h100_mega_gpus",
    "NVIDIA_RTX_PRO_6000": "nvidia_rtx_pro_6000_gpus",
}
_MACHINE = re.compile(r"(?P<series>[a-z]\d[a-z]?)-(standard|highmem|highcpu)-(?P<cpus>\d+)")
_COMMON_SERIES = ("n1", "e2")  # which share one quota, here and in Compute Engine
_UNLIMITED = -1


@dataclasses.dataclass(frozen=True)
class Quota:
    """One limit beside what a run takes of it.

    Attributes:
      what: is counted, for a person.
      needed: for a run to begin.
      wanted: for a run to be as quick as its settings say.
      available: of the limit; infinite for no limit, None where it cannot be known.
      link: the console's page where more is asked for.
    """

    what: str
    needed: int
    wanted: int
    available: float | None
    link: str


def vertex_quotas(cloud: Cloud, config: VertexConfig) -> Iterator[Quota]:
    """Yields what training and serving take of Vertex AI's quota.

    A canary is deployed beside the model that serves, so that serving takes twice its replicas.

    Raises:
      RefusedError: if the quota may not be read.
      UnreachableError: if there is no connection.
    """
    spot = "preemptible_" if config.spot else ""
    if config.accelerator_type:
        gpus = config.accelerator_count * config.num_machines
        yield _vertex_quota(cloud, config, f"training_{spot}{_gpu(config.accelerator_type)}", gpus, config.accelerator_type)
    if config.train_on == "custom_job" and (cpus := _common_cpus(config.machine_type)):
        yield _vertex_quota(cloud, config, f"training_{spot}cpus", cpus * config.num_machines, "CPUs")
    if config.deployer == "none":
        return
    machines = config.min_replicas * (2 if config.deployer == "canary" else 1)
    if config.serving_accelerator_type:
        gpus = config.serving_accelerator_count * machines
        metric = f"serving_{_gpu(config.serving_accelerator_type)}"
        yield _vertex_quota(cloud, config, metric, gpus, config.serving_accelerator_type)
    if cpus := _common_cpus(config.serving_machine_type):
        yield _vertex_quota(cloud, config, "serving_cpus", cpus * machines, "CPUs")


def dataflow_quotas(cloud: Cloud, config: VertexConfig) -> Iterator[Quota]:
    """Yields what Dataflow's workers take of Compute Engine's quota in the region.

    Raises:
      RefusedError: if the quota may not be read.
      UnreachableError: if there is no connection.
    """
    answer = cloud.get("compute", f"/compute/v1/projects/{quoted(config.project)}/regions/{config.region}")
    free = {one["metric"]: one.get("limit", 0) - one.get("usage", 0) for one in answer.get("quotas", [])}
    workers = config.dataflow_max_workers
    if match := _MACHINE.fullmatch(config.dataflow_machine_type):
        cpus = int(match["cpus"])
        metric = "CPUS" if match["series"] in _COMMON_SERIES else f"{match['series'].upper()}_CPUS"
        yield Quota(
            "CPUs of Dataflow's workers", cpus, cpus * workers, free.get(metric), _link(config, "compute.googleapis.com")
        )
    if config.dataflow_public_ips:
        what, available = "addresses of Dataflow's workers", free.get("IN_USE_ADDRESSES")
        yield Quota(what, 1, workers, available, _link(config, "compute.googleapis.com"))


def _gpu(accelerator_type: str) -> str:
    return _GPU_METRICS.get(accelerator_type, f"{accelerator_type.lower()}_gpus")


def _common_cpus(machine_type: str) -> int:
    """Virtual CPUs of a machine of the common quota; 0 for others, whose quotas have names of their own."""
    match = _MACHINE.fullmatch(machine_type)
    return int(match["cpus"]) if match and match["series"] in _COMMON_SERIES else 0


def _vertex_quota(cloud: Cloud, config: VertexConfig, name: str, needed: int, unit: str) -> Quota:
    metric = f"{_SERVICE}/custom_model_{name}"
    path = f"/v1beta1/projects/{quoted(config.project)}/services/{_SERVICE}/consumerQuotaMetrics/{quoted(metric)}"
    answer = cloud.find("serviceusage", path, view="FULL")
    available = None if answer is None else _limit(answer, config.region)  # a quota that has another name is not found
    kind = name.partition("_")[0] + (" on spot machines" if "preemptible" in name else "")
    return Quota(f"{unit} of {kind}", needed, needed, available, _link(config, metric))


def _limit(answer: dict[str, Any], region: str) -> float | None:
    """The limit that holds in a region: the region's own, or the one for all of them."""
    for limit in answer.get("consumerQuotaLimits", []):
        if "{region}" not in limit.get("unit", ""):
            continue
        buckets = limit.get("quotaBuckets", [])
        chosen = [one for one in buckets if one.get("dimensions", {}) == {"region": region}]
        chosen = chosen or [one for one in buckets if not one.get("dimensions")]
        if chosen:
            value = int(chosen[0].get("effectiveLimit", 0))  # JSON leaves a zero out
            return math.inf if value == _UNLIMITED else value
    return None


def _link(config: VertexConfig, metric: str) -> str:
    name = "metric" if "/" in metric else "service"
    return f"https://console.cloud.google.com/iam-admin/quotas?project={config.project}&{name}={quoted(metric)}"
