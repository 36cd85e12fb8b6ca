"""Chooses what to compute on, and how, by what the machine has and what the configuration says.

Called once by the trainer, before it builds anything: one GPU, several of this machine, or several machines under
TF_CONFIG, each with the precision and the compiler that suit it.
"""

import dataclasses
import functools
import json
import logging
import os
from collections.abc import Sequence
from typing import Literal, Self

import keras
import pydantic
import tensorflow as tf

from data.errors import InputError
from models import gpu_diagnosis

logger = logging.getLogger("tfx_vision")

_BFLOAT16_COMPUTE_CAPABILITY = (8, 0)  # A100 and newer


class DeviceConfig(pydantic.BaseModel):
    """What to compute on.

    Attributes:
      accelerator: `auto` takes GPUs if there are any; `gpu` fails without one; `cpu` never looks.
      num_gpus: GPUs of this machine to use; 0 takes all that are there.
      strategy: `auto` is multi_worker under a TF_CONFIG of more than one worker, mirrored with several GPUs, else
        one_device, the first GPU or the CPU.
      precision: `auto` is float32 on a CPU, mixed_bfloat16 on an A100 or newer, mixed_float16 on older GPUs.
      xla: compiles the training step; `auto` does so on one GPU. On a CPU it is 25 times slower, measured, and Keras
        cannot compile a step that runs on several devices.
      deterministic: the same result bit for bit on every run on the same machine, in exchange for speed.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    accelerator: Literal["auto", "gpu", "cpu"] = "auto"
    num_gpus: int = pydantic.Field(0, ge=0)
    strategy: Literal["auto", "one_device", "mirrored", "multi_worker"] = "auto"
    precision: Literal["auto", "float32", "mixed_float16", "mixed_bfloat16"] = "auto"
    xla: Literal["auto", "on", "off"] = "auto"
    deterministic: bool = False

    @pydantic.model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if self.accelerator == "cpu" and self.num_gpus:
            raise ValueError(
                f"Expected no GPUs, as devices.accelerator is `cpu`. Received: num_gpus={self.num_gpus}. "
                "Set devices.num_gpus to 0, or take `auto`."
            )
        if self.deterministic and self.xla == "on":
            raise ValueError(
                "Expected devices.xla of `auto` or `off` with devices.deterministic, as not all that XLA makes is. "
                "Received: xla=on, deterministic=true. Set one of them otherwise."
            )
        if self.strategy == "one_device" and self.num_gpus > 1:
            raise ValueError(
                f"Expected one GPU, as devices.strategy is `one_device`. Received: num_gpus={self.num_gpus}. "
                "Set devices.num_gpus to 1, or take `mirrored`."
            )
        return self


@dataclasses.dataclass(frozen=True)
class Devices:
    """What the trainer computes on.

    Attributes:
      strategy: build the network and its optimizer in its `scope()`. Keras's `fit` does not run on several workers
        (https://github.com/keras-team/keras/issues/20585); a loop of one's own over `strategy.run` does.
      precision: name of Keras's dtype policy, which is set already.
      jit_compile: for `compile`, whether XLA compiles the training step; never with several replicas.
      is_chief: True on the one worker that writes the model; False on all the others of a cluster.
      local_device: `/GPU:0` or `/CPU:0` of this worker, where one-device work runs.
      deterministic: whether runs repeat bit for bit.
    """

    strategy: tf.distribute.Strategy
    precision: str
    jit_compile: bool
    is_chief: bool
    local_device: str
    deterministic: bool

    @property
    def num_replicas(self) -> int:
        """Copies of the network that train together, over all workers."""
        return self.strategy.num_replicas_in_sync

    def alone(self) -> "Devices":
        """Returns what one worker computes on without the others: one device, no strategy."""
        return dataclasses.replace(self, strategy=tf.distribute.get_strategy(), is_chief=True)

    def wait_for_all(self) -> None:
        """Waits until every worker of a cluster has come here; returns at once where there is one."""
        if isinstance(self.strategy, tf.distribute.MultiWorkerMirroredStrategy):
            self.strategy.reduce(tf.distribute.ReduceOp.SUM, self.strategy.run(tf.ones, args=([],)), axis=None)


@dataclasses.dataclass(frozen=True)
class _Environment:
    """The environment variables that decide, None where they are not set."""

    tf_config: str | None
    visible_devices: str | None  # CUDA_VISIBLE_DEVICES


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What TF_CONFIG says.

    Attributes:
      num_workers: machines that train, the chief among them.
      name: of this one, such as `worker 0`.
      is_chief: whether this one is the chief, or worker 0 where there is no chief.
    """

    num_workers: int = 1
    name: str = "chief 0"
    is_chief: bool = True


def configure_devices(config: DeviceConfig) -> Devices:
    """Sets memory growth, determinism and Keras's global precision, and makes the strategy.

    With several workers this must come before TensorFlow runs anything in the process, and waits for all of them.

    Raises:
      RuntimeError: if the GPUs or devices asked for are not there, or TensorFlow ran before the workers were set up.
      InputError: if TF_CONFIG is malformed or gives this process another part than training, or the settings ask for
        what the devices found cannot do.
    """
    environment = _read_environment()
    cluster = parse_tf_config(environment.tf_config)
    gpus = _find_gpus(config, environment)
    strategy_name = choose_strategy(config.strategy, num_workers=cluster.num_workers, num_gpus=len(gpus))
    if strategy_name == "one_device":
        gpus = gpus[:1]
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    precision = choose_precision(config.precision, [gpu.get("compute_capability", (0, 0)) for gpu in details])
    jit_compile = choose_xla(config.xla, strategy=strategy_name, has_gpu=bool(gpus), deterministic=config.deterministic)
    _claim(gpus)
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    strategy = _make_strategy(strategy_name, num_gpus=len(gpus))
    keras.mixed_precision.set_dtype_policy(precision)
    if strategy_name != "multi_worker" and cluster.num_workers > 1:
        logger.warning(
            "%d workers train the same model, each on its own, as devices.strategy is `%s`", cluster.num_workers, strategy_name
        )
    devices = Devices(
        strategy=strategy,
        precision=precision,
        jit_compile=jit_compile,
        is_chief=cluster.is_chief,
        local_device="/GPU:0" if gpus else "/CPU:0",
        deterministic=config.deterministic,
    )
    logger.info(
        "computing on %s in %s%s%s%s",
        _describe(
            [gpu.get("device_name", "unknown") for gpu in details],
            num_cpus=strategy.num_replicas_in_sync if strategy_name == "mirrored" else 1,
        ),
        precision,
        " with XLA" if jit_compile else "",
        ", deterministically" if config.deterministic else "",
        f", as {cluster.name} of {cluster.num_workers} workers" if strategy_name == "multi_worker" else "",
    )
    return devices


def _read_environment() -> _Environment:
    return _Environment(tf_config=os.environ.get("TF_CONFIG"), visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"))


def parse_tf_config(text: str | None) -> Cluster:
    """Reads the value of TF_CONFIG, with which Vertex AI and Kubeflow's training operator tell a machine its part.

    Args:
      text: JSON, such as `{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}`; None or
        blank for one machine.

    Raises:
      InputError: if it is malformed, or has a task that does not train.
    """
    if not (text or "").strip():
        return Cluster()
    remedy = "Unset TF_CONFIG to train on one machine, or give it a cluster of `worker` and one task of them."
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"Expected TF_CONFIG to be JSON. Received: {text!r}, {error}. {remedy}") from error
    jobs = value.get("cluster") if isinstance(value, dict) else None
    if not isinstance(jobs, dict) or not any(jobs.values()) or not all(isinstance(hosts, list) for hosts in jobs.values()):
        raise InputError(f"Expected TF_CONFIG with a `cluster` of lists of host:port. Received: {text!r}. {remedy}")
    task = value.get("task")
    job = str(task.get("type", "")) if isinstance(task, dict) else ""
    others = sorted({*jobs, job} - {"chief", "worker", ""})
    if others:
        raise InputError(
            f"Expected TF_CONFIG with the tasks `chief` and `worker` only, as all of them train. Received: `{others[0]}` in "
            f"{text!r}. Give the job no {others[0]}; the pipeline evaluates by itself."
        )
    if len(jobs.get("chief", [])) > 1:
        raise InputError(f"Expected TF_CONFIG with one chief at most. Received: {text!r}. Make the others workers.")
    hosts = jobs.get(job, [])
    try:
        index = int(task["index"])
    except (TypeError, KeyError, ValueError):
        index = -1
    if not 0 <= index < len(hosts):
        raise InputError(
            f"Expected TF_CONFIG with a `task` whose type is in its cluster and whose index is below the number of its hosts, "
            f"{len(hosts)}. Received: task={task!r} in {text!r}. {remedy}"
        )
    return Cluster(
        num_workers=sum(len(hosts) for hosts in jobs.values()),
        name=f"{job} {index}",
        is_chief=index == 0 and job == ("chief" if jobs.get("chief") else "worker"),
    )


def choose_strategy(setting: str, *, num_workers: int, num_gpus: int) -> Literal["one_device", "mirrored", "multi_worker"]:
    """Resolves `DeviceConfig.strategy`.

    Raises:
      InputError: if several workers were asked for and there are none.
    """
    if setting == "multi_worker" and num_workers < 2:
        raise InputError(
            "Expected TF_CONFIG with two workers or more, as devices.strategy is `multi_worker`. "
            f"Received: {num_workers}. Start the trainer on several machines, or take `auto`."
        )
    if setting != "auto":
        return setting
    if num_workers > 1:
        return "multi_worker"
    return "mirrored" if num_gpus > 1 else "one_device"


def choose_precision(setting: str, capabilities: Sequence[tuple[int, int]]) -> str:
    """Resolves `DeviceConfig.precision`.

    Args:
      setting: of the configuration.
      capabilities: compute capability of every GPU in use; the weakest decides. Empty for a CPU.

    Returns:
      The name of a Keras dtype policy.

    Source: https://developer.nvidia.com/cuda-gpus
    """
    if setting != "auto":
        return setting
    if not capabilities:
        return "float32"
    return "mixed_bfloat16" if min(capabilities) >= _BFLOAT16_COMPUTE_CAPABILITY else "mixed_float16"


def choose_xla(setting: str, *, strategy: str, has_gpu: bool, deterministic: bool) -> bool:
    """Resolves `DeviceConfig.xla`.

    XLA cannot reach the variables of one device from a function compiled for another, and not all its operations are
    deterministic. Keras's own `auto` leaves it out in both cases too.

    Raises:
      InputError: if it is asked for on several devices.

    Source: `_resolve_auto_jit_compile`, https://github.com/keras-team/keras/blob/master/keras/src/trainers/trainer.py
    """
    if setting == "on" and strategy != "one_device":
        raise InputError(
            f"Expected devices.xla of `auto` or `off` with several devices. Received: xla=on, strategy={strategy}. "
            "Take `auto`, or train on one device."
        )
    if setting == "auto":
        return has_gpu and strategy == "one_device" and not deterministic
    return setting == "on"


def _find_gpus(config: DeviceConfig, environment: _Environment) -> list[tf.config.PhysicalDevice]:
    if config.accelerator == "cpu":
        return []
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus and (config.accelerator == "gpu" or config.num_gpus):
        if config.accelerator == "gpu":
            wanted, escape = "a GPU, as devices.accelerator is `gpu`", "take `auto`"
        else:
            wanted, escape = f"a GPU, as devices.num_gpus is {config.num_gpus}", "set devices.num_gpus to 0"
        findings = gpu_diagnosis.find(environment.visible_devices)
        raise RuntimeError(gpu_diagnosis.describe_missing_gpu(findings, wanted=wanted, escape=escape))
    if config.num_gpus > len(gpus):
        hidden = environment.visible_devices
        raise RuntimeError(
            f"Expected {config.num_gpus} GPUs, as devices.num_gpus says. Received: {len(gpus)} that TensorFlow can see"
            f"{'' if hidden is None else f', with CUDA_VISIBLE_DEVICES={hidden!r}'}. "
            f"Take a machine with more, or set devices.num_gpus to {len(gpus)}, or to 0 for all."
        )
    return gpus[: config.num_gpus or None]


def _claim(gpus: Sequence[tf.config.PhysicalDevice]) -> None:
    """Leaves the other GPUs alone, and takes memory of these as it is needed."""
    try:
        tf.config.set_visible_devices(gpus, "GPU")
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
    except RuntimeError:
        # TensorFlow has been initialized in this process, by an earlier component; what it sees is settled.
        logger.debug("the GPUs that TensorFlow sees and the growth of their memory are settled already")


def _make_strategy(name: str, *, num_gpus: int) -> tf.distribute.Strategy:
    if name == "multi_worker":
        return _join_workers(has_gpu=num_gpus > 0)
    kind = "GPU" if num_gpus else "CPU"
    logical = tf.config.list_logical_devices(kind)
    if len(logical) < num_gpus:
        raise RuntimeError(
            f"Expected {num_gpus} GPUs. Received: {len(logical)}, as TensorFlow was initialized in this process with "
            "the others hidden. Run the trainer in a process of its own."
        )
    if name == "mirrored":
        if kind == "CPU" and len(logical) < 2:
            raise RuntimeError(
                "Expected a GPU or several CPU devices, as devices.strategy is `mirrored`. "
                f"Received: no GPU and {len(logical)} CPU. Take `auto`."
            )
        return tf.distribute.MirroredStrategy([device.name for device in logical[: num_gpus or None]])
    if kind == "CPU" and tf.config.list_logical_devices("GPU"):
        # A GPU that could not be hidden any more would attract every operation.
        return tf.distribute.OneDeviceStrategy("/CPU:0")
    # The default strategy: plain variables, on the first GPU if TensorFlow sees one.
    return tf.distribute.get_strategy()


# Once a process: after a second strategy on the same cluster, the collective operations of the first hang.
@functools.cache
def _join_workers(*, has_gpu: bool) -> tf.distribute.Strategy:
    # Nothing may ask for logical devices before: that would initialize TensorFlow without the other workers.
    implementation = tf.distribute.experimental.CommunicationImplementation
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=implementation.NCCL if has_gpu else implementation.RING
    )
    try:
        return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    except RuntimeError as error:
        raise RuntimeError(
            f"Expected to set up the workers before TensorFlow runs anything in this process. Received: {error}. "
            "Run the trainer in a process of its own."
        ) from error


def _describe(gpu_names: Sequence[str], *, num_cpus: int) -> str:
    """Names what is computed on, such as `2 GPUs (Tesla T4)`."""
    if not gpu_names:
        return "CPU" if num_cpus == 1 else f"{num_cpus} CPU devices"
    names = " and ".join(sorted(set(gpu_names)))
    return f"{'GPU' if len(gpu_names) == 1 else f'{len(gpu_names)} GPUs'} ({names})"
