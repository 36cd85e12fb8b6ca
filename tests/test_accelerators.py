import pytest
from google.cloud.aiplatform_v1 import types

from pipeline.accelerators import ACCELERATOR_TYPES, accelerator_problem


@pytest.mark.parametrize(
    ("machine_type", "accelerator_type", "count", "region"),
    [
        ("n1-standard-8", "NVIDIA_TESLA_T4", 1, "us-central1"),
        ("n1-highmem-16", "NVIDIA_TESLA_T4", 4, "europe-west4"),
        ("n1-standard-32", "NVIDIA_TESLA_V100", 8, "us-west1"),
        ("g2-standard-24", "NVIDIA_L4", 2, "us-central1"),
        ("a2-highgpu-8g", "NVIDIA_TESLA_A100", 8, "us-central1"),
        ("a3-highgpu-8g", "NVIDIA_H100_80GB", 8, "nowhere1"),  # too new for a table of regions
        ("e2-standard-4", "", 0, "us-central1"),
        ("n1-standard-8", "", 0, "anywhere1"),
    ],
)
def test_accelerator_problem_finds_none_in_what_google_takes(machine_type, accelerator_type, count, region):
    assert accelerator_problem(machine_type, accelerator_type, count, region) == ""


@pytest.mark.parametrize(
    ("machine_type", "accelerator_type", "count", "region", "problem"),
    [
        ("n1-standard-8", "NVIDIA_L4", 1, "us-central1", "Expected a machine type that takes NVIDIA_L4."),
        ("e2-standard-8", "NVIDIA_TESLA_T4", 1, "us-central1", "Expected a machine type that takes NVIDIA_TESLA_T4."),
        ("n1-standard-8", "NVIDIA_TESLA_T4", 3, "us-central1", "Expected 1, 2, 4 of NVIDIA_TESLA_T4 on n1-standard-8."),
        ("n1-standard-32", "NVIDIA_TESLA_V100", 1, "us-central1", "Expected 4, 8 of NVIDIA_TESLA_V100 on n1-standard-32."),
        ("g2-standard-24", "NVIDIA_L4", 1, "us-central1", "Expected the GPUs of g2-standard-24, which are 2 x NVIDIA_L4."),
        ("a2-highgpu-1g", "", 0, "us-central1", "Expected the GPUs of a2-highgpu-1g, which are 1 x NVIDIA_TESLA_A100."),
        ("a2-highgpu-1g", "NVIDIA_TESLA_T4", 1, "us-central1", "Expected the GPUs of a2-highgpu-1g"),
        ("n1-standard-8", "NVIDIA_TESLA_T5", 1, "us-central1", "Expected a GPU that Vertex AI has: NVIDIA_TESLA_T4,"),
        ("n1-standard-8", "NVIDIA_TESLA_V100", 1, "europe-west1", "Expected a region that has NVIDIA_TESLA_V100: us-central1,"),
    ],
)
def test_accelerator_problem_says_what_to_take(machine_type, accelerator_type, count, region, problem):
    found = accelerator_problem(machine_type, accelerator_type, count, region)

    assert found.startswith(problem)
    assert "Received: " in found
    assert "\n" not in found


def test_accelerator_types_are_those_of_the_client():
    assert set(ACCELERATOR_TYPES) <= set(types.AcceleratorType.__members__)
