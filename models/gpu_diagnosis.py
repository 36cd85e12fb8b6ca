"""Says why TensorFlow sees no GPU: what was found of the driver, the libraries and the environment, and what to do next.

Called by `models.devices` when a GPU was asked for.
"""

import ctypes
import dataclasses
import importlib.metadata
import pathlib
import re
import shutil
import subprocess
from collections.abc import Mapping

import tensorflow as tf

_DRIVER_FILE = pathlib.Path("/proc/driver/nvidia/version")
_DRIVER_TIMEOUT_SECONDS = 10
_CUDA_PACKAGES = ("nvidia-cuda-runtime-cu12", "nvidia-cublas-cu12", "nvidia-cudnn-cu12")
_HIDING = ("", "-1", "NoDevFiles")  # first entries of CUDA_VISIBLE_DEVICES that leave no GPU


@dataclasses.dataclass(frozen=True)
class GpuFindings:
    """What bears on a GPU that TensorFlow does not see.

    Attributes:
      build: `tf.sysconfig.get_build_info()`.
      driver: version of NVIDIA's driver, None if there is no trace of it.
      driver_cuda: newest CUDA (major, minor) that the driver supports, None if its library does not load.
      packages: version by name of the installed CUDA packages.
      visible_devices: CUDA_VISIBLE_DEVICES, None if it is not set.
    """

    build: Mapping[str, str | bool]
    driver: str | None
    driver_cuda: tuple[int, int] | None
    packages: Mapping[str, str]
    visible_devices: str | None


def find(visible_devices: str | None) -> GpuFindings:
    """Looks for the driver and the libraries.

    Args:
      visible_devices: CUDA_VISIBLE_DEVICES, None if it is not set.
    """
    return GpuFindings(
        build=tf.sysconfig.get_build_info(),
        driver=_find_driver(),
        driver_cuda=_find_driver_cuda(),
        packages=_find_packages(),
        visible_devices=visible_devices,
    )


def describe_missing_gpu(findings: GpuFindings, *, wanted: str, escape: str) -> str:
    """Says in one line that a GPU is missing, what was found instead and what to do next.

    Args:
      findings: of `find`.
      wanted: what was expected, and by which setting.
      escape: how to do without.
    """
    cuda, cudnn = (findings.build.get(key, "none") for key in ("cuda_version", "cudnn_version"))
    driver_cuda = findings.driver_cuda and ".".join(map(str, findings.driver_cuda))
    has_driver = bool(findings.driver or driver_cuda)
    found = [
        f"built for CUDA {cuda}, cuDNN {cudnn}",
        f"driver {findings.driver or 'of unknown version'}" if has_driver else "no driver",
    ]
    if driver_cuda:
        found.append(f"which runs CUDA {driver_cuda} and older")
    elif has_driver:
        found.append("whose libcuda.so.1 does not load")
    found += [f"{name} {version}" for name, version in findings.packages.items()] or ["no nvidia-*-cu12 packages"]
    if findings.visible_devices is not None:
        found.append(f"CUDA_VISIBLE_DEVICES={findings.visible_devices!r}")
    exact = f"`tensorflow[and-cuda]=={tf.__version__}`"
    cudnn_package = findings.packages.get("nvidia-cudnn-cu12")
    if not findings.build.get("is_cuda_build"):
        remedy = f"This TensorFlow is built without CUDA. Install {exact} on Linux"
    elif not has_driver:
        # A container sees the machine's driver only if it is started with GPUs.
        remedy = "In a container, start it with `--gpus all`. Install the driver and `tensorflow[and-cuda]`"
    elif findings.visible_devices is not None and findings.visible_devices.split(",")[0].strip() in _HIDING:
        remedy = "CUDA_VISIBLE_DEVICES hides the GPUs. Unset it"
    elif not driver_cuda:
        remedy = "The driver's library is missing. In a container, start it with `--gpus all`; else reinstall the driver"
    elif _major(cuda) and findings.driver_cuda[0] < _major(cuda):
        remedy = f"The driver is too old. Update it to one that runs CUDA {cuda}"
    elif len(findings.packages) < len(_CUDA_PACKAGES):
        remedy = f"The CUDA libraries are missing. Install {exact}"
    elif _major(cudnn) and _major(cudnn_package) != _major(cudnn):
        remedy = f"cuDNN {cudnn_package} is not the {cudnn} that TensorFlow needs. Install {exact}"
    else:
        remedy = "See that `nvidia-smi` lists a GPU, read TensorFlow's log under TF_CPP_MIN_LOG_LEVEL=0"
    received = f"none that TensorFlow {tf.__version__} can see ({', '.join(found)})"
    return f"Expected {wanted}. Received: {received}. {remedy}, or {escape}."


def _major(version: str) -> int:
    """Returns the leading number of a version, 0 if it has none."""
    found = re.match(r"\d+", version)
    return int(found[0]) if found else 0


def _find_driver() -> str | None:
    if _DRIVER_FILE.exists():
        # NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 ...
        # NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build ...
        found = re.search(r"Kernel Module(?: for \S+)?\s+([\d.]+)", _DRIVER_FILE.read_text())
        if found:
            return found[1]
    # WSL and some sandboxes have the driver without that file.
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    try:
        query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
        result = subprocess.run(query, capture_output=True, text=True, timeout=_DRIVER_TIMEOUT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(result.stdout.split()), None)


def _find_driver_cuda() -> tuple[int, int] | None:
    try:
        library = ctypes.CDLL("libcuda.so.1")
        version = ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


def _find_packages() -> dict[str, str]:
    packages = {}
    for name in _CUDA_PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return packages
