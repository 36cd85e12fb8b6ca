"""Which GPUs a machine type of Google Cloud takes, how many, and in which regions: what can be known before a job is submitted.

Called by `pipeline.vertex`. What a project may use is its quota, which `kubeflow_runner.py --check` asks for.

Sources: https://cloud.google.com/vertex-ai/docs/training/configure-compute (N1 machines and counts);
https://cloud.google.com/compute/docs/accelerator-optimized-machines (A2, A3, A4, G2, G4);
https://cloud.google.com/compute/docs/gpus/gpu-regions-zones. Regions are added all the
time: `vertex.check_accelerators = false` takes what this table does not know yet.
"""

import re
from collections.abc import Mapping

# Number of virtual CPUs of an N1 machine -> lowest number of GPUs that Vertex AI attaches, by type; all up to the highest.
_N1_HIGHEST = {"NVIDIA_TESLA_T4": 4, "NVIDIA_TESLA_P4": 4, "NVIDIA_TESLA_P100": 4, "NVIDIA_TESLA_V100": 8}
_N1_LOWEST = {16: 1, 32: 2, 64: 4, 96: 4}  # of machines up to so many virtual CPUs; twice as many of V100 from 16 on
_N1_COUNTS = (1, 2, 4, 8)
_N1 = re.compile(r"n1-(standard|highmem|highcpu)-(\d+)")

# Machines that bring their GPUs with them: name -> type and number.
_BUNDLED: dict[str, tuple[str, int]] = (
    {f"a2-highgpu-{count}g": ("NVIDIA_TESLA_A100", count) for count in (1, 2, 4, 8)}
    | {"a2-megagpu-16g": ("NVIDIA_TESLA_A100", 16)}
    | {f"a2-ultragpu-{count}g": ("NVIDIA_A100_80GB", count) for count in (1, 2, 4, 8)}
    | {f"a3-highgpu-{count}g": ("NVIDIA_H100_80GB", count) for count in (1, 2, 4, 8)}
    | {"a3-megagpu-8g": ("NVIDIA_H100_MEGA_80GB", 8), "a3-ultragpu-8g": ("NVIDIA_H200_141GB", 8)}
    | {"a4-highgpu-8g": ("NVIDIA_B200", 8)}
    | {f"g2-standard-{cpus}": ("NVIDIA_L4", count) for cpus, count in ((4, 1), (8, 1), (12, 1), (16, 1), (32, 1))}
    | {f"g2-standard-{cpus}": ("NVIDIA_L4", count) for cpus, count in ((24, 2), (48, 4), (96, 8))}
    | {f"g4-standard-{cpus}": ("NVIDIA_RTX_PRO_6000", count) for cpus, count in ((48, 1), (96, 2), (192, 4), (384, 8))}
)
ACCELERATOR_TYPES = (*_N1_HIGHEST, *dict.fromkeys(kind for kind, _ in _BUNDLED.values()))

# Where they are; the newest types, which spread quickly, are left out.
_REGIONS: Mapping[str, tuple[str, ...]] = {
    "NVIDIA_TESLA_T4": (
        *("us-central1", "us-east1", "us-east4", "us-west1", "us-west2", "us-west3", "us-west4", "northamerica-northeast1"),
        *("southamerica-east1", "europe-central2", "europe-west1", "europe-west2", "europe-west3", "europe-west4", "me-west1"),
        *(
            "asia-east1",
            "asia-east2",
            "asia-northeast1",
            "asia-northeast3",
            "asia-south1",
            "asia-southeast1",
            "asia-southeast2",
        ),
        "australia-southeast1",
    ),
    "NVIDIA_TESLA_P4": (
        *("us-central1", "us-east4", "us-west2", "northamerica-northeast1", "europe-west4", "asia-southeast1"),
        "australia-southeast1",
    ),
    "NVIDIA_TESLA_P100": (
        *("us-central1", "us-east1", "us-west1", "europe-west1", "europe-west4", "asia-east1", "australia-southeast1"),
    ),
    "NVIDIA_TESLA_V100": ("us-central1", "us-east1", "us-west1", "europe-west4", "asia-east1"),
    "NVIDIA_TESLA_A100": (
        *("us-central1", "us-east1", "us-west1", "us-west3", "us-west4", "europe-west4", "me-west1", "asia-northeast1"),
        *("asia-northeast3", "asia-southeast1"),
    ),
    "NVIDIA_A100_80GB": ("us-central1", "us-east4", "us-east5", "europe-west4", "asia-southeast1"),
    "NVIDIA_L4": (
        *("us-central1", "us-east1", "us-east4", "us-west1", "us-west4", "northamerica-northeast2", "europe-west1"),
        *("europe-west2", "europe-west3", "europe-west4", "europe-west6", "me-central2", "asia-east1", "asia-northeast1"),
        *("asia-northeast3", "asia-south1", "asia-southeast1", "australia-southeast1"),
    ),
}


def accelerator_problem(machine_type: str, accelerator_type: str, accelerator_count: int, region: str) -> str:
    """Says why Vertex AI would refuse a machine with GPUs, and what to take; empty if nothing is known against it.

    Args:
      machine_type: such as n1-standard-8.
      accelerator_type: one of `ACCELERATOR_TYPES`; empty for no GPU.
      accelerator_count: GPUs of the machine; 0 for none.
      region: of Vertex AI.
    """
    received = f"{accelerator_count} x {accelerator_type} on {machine_type} in {region}" if accelerator_type else machine_type
    bundled = _BUNDLED.get(machine_type)
    if bundled and (accelerator_type, accelerator_count) != bundled:
        return (
            f"Expected the GPUs of {machine_type}, which are {bundled[1]} x {bundled[0]}. Received: "
            f"{received if accelerator_type else 'none'}. Set its accelerator_type and accelerator_count so, or take another "
            "machine type."
        )
    if not accelerator_type:
        return ""
    if problem := _type_problem(accelerator_type):
        return problem
    if not bundled:
        counts = _n1_counts(machine_type, accelerator_type)
        if not counts:
            machines = [name for name, (kind, _) in _BUNDLED.items() if kind == accelerator_type] or ["n1-standard-8"]
            return (
                f"Expected a machine type that takes {accelerator_type}. Received: {machine_type}. "
                f"Take {' or '.join(dict.fromkeys((machines[0], machines[-1])))}."
            )
        if accelerator_count not in counts:
            return (
                f"Expected {', '.join(map(str, counts))} of {accelerator_type} on {machine_type}. "
                f"Received: {accelerator_count}. Set accelerator_count to one of these, or take another machine type."
            )
    return _region_problem(accelerator_type, region)


def step_accelerator_problem(accelerator_type: str, accelerator_count: int, region: str) -> str:
    """Says why Vertex AI would find no machine for a pipeline's step with GPUs, and what to take; empty if nothing is known.

    It chooses the step's machine itself, by the GPUs, the CPUs and the memory that are asked for.

    Args:
      accelerator_type: one of `ACCELERATOR_TYPES`; empty for no GPU.
      accelerator_count: GPUs of the step; 0 for none.
      region: of Vertex AI.

    Source: https://cloud.google.com/vertex-ai/docs/pipelines/machine-types
    """
    if not accelerator_type:
        return ""
    if problem := _type_problem(accelerator_type):
        return problem
    counts = [count for count in _N1_COUNTS if count <= _N1_HIGHEST.get(accelerator_type, 0)]
    counts = counts or sorted({count for kind, count in _BUNDLED.values() if kind == accelerator_type})
    if accelerator_count not in counts:
        return (
            f"Expected {', '.join(map(str, counts))} of {accelerator_type}, as machines have them. "
            f"Received: {accelerator_count}. Set accelerator_count to one of these."
        )
    return _region_problem(accelerator_type, region)


def _type_problem(accelerator_type: str) -> str:
    if accelerator_type in ACCELERATOR_TYPES:
        return ""
    return f"Expected a GPU that Vertex AI has: {', '.join(ACCELERATOR_TYPES)}. Received: {accelerator_type!r}. Take one."


def _region_problem(accelerator_type: str, region: str) -> str:
    regions = _REGIONS.get(accelerator_type)
    if regions and region not in regions:
        return (
            f"Expected a region that has {accelerator_type}: {', '.join(regions)}. Received: {region}. Take one of "
            "these or another GPU; where it has come to this region since, set vertex.check_accelerators = false."
        )
    return ""


def _n1_counts(machine_type: str, accelerator_type: str) -> list[int]:
    """Returns how many GPUs of a type an N1 machine may have; nothing for other machines and types."""
    match = _N1.fullmatch(machine_type)
    if not match or accelerator_type not in _N1_HIGHEST:
        return []
    cpus = int(match[2])
    lowest = next((count for limit, count in _N1_LOWEST.items() if cpus <= limit), None)
    if lowest is None:
        return []
    if accelerator_type == "NVIDIA_TESLA_V100" and cpus >= 16:
        lowest *= 2
    return [count for count in _N1_COUNTS if lowest <= count <= _N1_HIGHEST[accelerator_type]]
