import json
import logging
import os
import re
import subprocess
import sys

import keras
import pytest
import tensorflow as tf
from conftest import ROOT, find_free_ports, messages_of

from data.errors import InputError, validate
from models import devices, gpu_diagnosis
from models.devices import (
    Cluster,
    DeviceConfig,
    choose_precision,
    choose_strategy,
    choose_xla,
    configure_devices,
    parse_tf_config,
)
from models.gpu_diagnosis import GpuFindings, describe_missing_gpu

HAS_GPU = bool(tf.config.list_physical_devices("GPU"))
without_gpu = pytest.mark.skipif(HAS_GPU, reason="the machine has a GPU")
with_gpu = pytest.mark.skipif(not HAS_GPU, reason="the machine has no GPU")

T4, V100, A100, H100 = (7, 5), (7, 0), (8, 0), (9, 0)
PROCESS_TIMEOUT_SECONDS = 600  # TensorFlow alone loads for up to 20 s on a busy machine
MISSING = f"Expected a GPU, as devices.accelerator is `gpu`. Received: none that TensorFlow {tf.__version__} can see"
WORKING = GpuFindings(
    build={"is_cuda_build": True, "cuda_version": "12.3", "cudnn_version": "8"},
    driver="535.104.05",
    driver_cuda=(12, 4),
    packages={
        "nvidia-cuda-runtime-cu12": "12.3.101",
        "nvidia-cublas-cu12": "12.3.4.1",
        "nvidia-cudnn-cu12": "8.9.7.29",
    },
    visible_devices=None,
)


@pytest.fixture(autouse=True)
def _restored_precision():
    before = keras.mixed_precision.dtype_policy()
    yield
    keras.mixed_precision.set_dtype_policy(before)


@pytest.fixture(autouse=True)
def _one_machine(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)


def _start(script: str, **environment: str) -> subprocess.Popen:
    """Starts a script in a fresh process, as TensorFlow sets up its devices once in each."""
    variables = {name: value for name, value in os.environ.items() if name != "TF_CONFIG"}
    variables |= {"CUDA_VISIBLE_DEVICES": "-1", "PYTHONWARNINGS": "ignore", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _finish(processes: list[subprocess.Popen]) -> list[dict]:
    """Returns the JSON of each process's last line; kills them all if one fails or hangs."""
    results = []
    try:
        for process in processes:
            output, errors = process.communicate(timeout=PROCESS_TIMEOUT_SECONDS)
            assert process.returncode == 0, errors[-3000:]
            results.append(json.loads(output.splitlines()[-1]))
    finally:
        for process in processes:
            # TensorFlow's workers catch SIGTERM.
            process.kill()
            process.communicate()
    return results


def _tf_config(cluster: dict, job: str, index: object = 0) -> str:
    return json.dumps({"cluster": cluster, "task": {"type": job, "index": index}})


@without_gpu
@pytest.mark.parametrize("accelerator", ["auto", "cpu"])
def test_configure_devices_takes_the_cpu_in_float32(accelerator, caplog):
    keras.mixed_precision.set_dtype_policy("mixed_bfloat16")

    with caplog.at_level(logging.INFO, "tfx_vision"):
        chosen = configure_devices(DeviceConfig(accelerator=accelerator))

    assert (chosen.local_device, chosen.precision, chosen.num_replicas) == ("/CPU:0", "float32", 1)
    assert (chosen.jit_compile, chosen.is_chief, chosen.deterministic) == (False, True, False)
    assert keras.mixed_precision.dtype_policy().name == "float32"
    assert messages_of(caplog) == ["computing on CPU in float32"]


@without_gpu
def test_configure_devices_keeps_variables_plain_on_one_device():
    with configure_devices(DeviceConfig()).strategy.scope():
        variable = tf.Variable(1.0)

    assert not isinstance(variable, tf.distribute.DistributedValues)
    assert variable.device.endswith("CPU:0")


@without_gpu
def test_configure_devices_refuses_to_go_on_without_the_gpu_asked_for(monkeypatch):
    monkeypatch.setattr(gpu_diagnosis, "_find_driver", lambda: None)
    monkeypatch.setattr(gpu_diagnosis, "_find_driver_cuda", lambda: None)

    with pytest.raises(RuntimeError, match=re.escape(MISSING)) as caught:
        configure_devices(DeviceConfig(accelerator="gpu"))

    assert str(caught.value).endswith("Install the driver and `tensorflow[and-cuda]`, or take `auto`.")


@without_gpu
@pytest.mark.parametrize("hidden", ["", "-1"])
def test_configure_devices_says_that_cuda_visible_devices_hides_the_gpus(hidden, monkeypatch):
    monkeypatch.setattr(gpu_diagnosis, "_find_driver", lambda: "535.104.05")
    monkeypatch.setattr(gpu_diagnosis, "_find_driver_cuda", lambda: (12, 4))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)

    with pytest.raises(RuntimeError, match=re.escape(MISSING)) as caught:
        configure_devices(DeviceConfig(num_gpus=1, accelerator="gpu"))

    assert f"CUDA_VISIBLE_DEVICES={hidden!r})" in str(caught.value)
    assert str(caught.value).endswith("CUDA_VISIBLE_DEVICES hides the GPUs. Unset it, or take `auto`.")


@with_gpu
@pytest.mark.parametrize("accelerator", ["auto", "gpu"])
def test_configure_devices_takes_the_gpu_in_half_precision(accelerator):
    chosen = configure_devices(DeviceConfig(accelerator=accelerator, num_gpus=1))

    assert (chosen.local_device, chosen.jit_compile, chosen.num_replicas) == ("/GPU:0", True, 1)
    assert keras.mixed_precision.dtype_policy().name in ("mixed_float16", "mixed_bfloat16")
    with chosen.strategy.scope():
        assert tf.Variable(1.0).device.endswith("GPU:0")


@with_gpu
def test_configure_devices_takes_the_cpu_where_the_gpu_is_not_wanted():
    tf.ones(1)  # from here on, the GPUs cannot be hidden any more

    chosen = configure_devices(DeviceConfig(accelerator="cpu"))

    assert (chosen.local_device, chosen.jit_compile) == ("/CPU:0", False)
    assert keras.mixed_precision.dtype_policy().name == "float32"
    with chosen.strategy.scope():
        assert tf.Variable(1.0).device.endswith("CPU:0")


@pytest.mark.parametrize("precision", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_configure_devices_obeys_a_precision(precision):
    assert configure_devices(DeviceConfig(precision=precision, num_gpus=int(HAS_GPU))).precision == precision

    assert keras.mixed_precision.dtype_policy().name == precision


@pytest.mark.parametrize(
    ("setting", "value"),
    [("accelerator", "tpu"), ("precision", "int8"), ("num_gpus", -1), ("strategy", "horovod"), ("xla", True)],
)
def test_device_config_refuses_what_it_does_not_know(setting, value):
    with pytest.raises(InputError, match=f"^Expected `{setting}` to be valid. Received: {setting}={value!r}. "):
        validate(DeviceConfig, {setting: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"accelerator": "cpu", "num_gpus": 2},
            "Expected no GPUs, as devices.accelerator is `cpu`. Received: num_gpus=2. "
            "Set devices.num_gpus to 0, or take `auto`.",
        ),
        (
            {"strategy": "one_device", "num_gpus": 2},
            "Expected one GPU, as devices.strategy is `one_device`. Received: num_gpus=2. "
            "Set devices.num_gpus to 1, or take `mirrored`.",
        ),
    ],
)
def test_device_config_refuses_settings_that_contradict_each_other(values, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        validate(DeviceConfig, values)


@pytest.mark.parametrize(
    ("setting", "capabilities", "expected"),
    [
        ("auto", [], "float32"),
        ("auto", [T4], "mixed_float16"),
        ("auto", [V100], "mixed_float16"),
        ("auto", [A100], "mixed_bfloat16"),
        ("auto", [H100, H100], "mixed_bfloat16"),
        ("auto", [H100, T4], "mixed_float16"),
        ("float32", [H100], "float32"),
        ("mixed_float16", [H100], "mixed_float16"),
        ("mixed_bfloat16", [], "mixed_bfloat16"),
    ],
)
def test_choose_precision_takes_what_the_weakest_gpu_computes_fast(setting, capabilities, expected):
    assert choose_precision(setting, capabilities) == expected


@pytest.mark.parametrize(
    ("setting", "num_workers", "num_gpus", "expected"),
    [
        ("auto", 1, 0, "one_device"),
        ("auto", 1, 1, "one_device"),
        ("auto", 1, 2, "mirrored"),
        ("auto", 2, 0, "multi_worker"),
        ("auto", 2, 4, "multi_worker"),
        ("one_device", 2, 4, "one_device"),
        ("mirrored", 1, 1, "mirrored"),
        ("multi_worker", 3, 1, "multi_worker"),
    ],
)
def test_choose_strategy_takes_all_that_is_there(setting, num_workers, num_gpus, expected):
    assert choose_strategy(setting, num_workers=num_workers, num_gpus=num_gpus) == expected


@pytest.mark.parametrize(
    ("setting", "strategy", "has_gpu", "deterministic", "expected"),
    [
        ("auto", "one_device", True, False, True),
        ("auto", "one_device", True, True, False),
        ("auto", "one_device", False, False, False),
        ("auto", "mirrored", True, False, False),
        ("auto", "multi_worker", True, False, False),
        ("on", "one_device", False, True, True),
        ("off", "one_device", True, False, False),
        ("off", "mirrored", True, False, False),
    ],
)
def test_choose_xla_compiles_on_one_gpu(setting, strategy, has_gpu, deterministic, expected):
    assert choose_xla(setting, strategy=strategy, has_gpu=has_gpu, deterministic=deterministic) is expected


@pytest.mark.parametrize("strategy", ["mirrored", "multi_worker"])
def test_choose_xla_refuses_several_devices(strategy):
    message = (
        "Expected devices.xla of `auto` or `off` with several devices. "
        f"Received: xla=on, strategy={strategy}. Take `auto`, or train on one device."
    )

    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        choose_xla("on", strategy=strategy, has_gpu=True, deterministic=False)


def _change(**changes: object) -> GpuFindings:
    return GpuFindings(**(vars(WORKING) | changes))


@pytest.mark.parametrize(
    ("findings", "found", "remedy"),
    [
        (
            _change(build={"is_cuda_build": False}),
            "(built for CUDA none, cuDNN none, ",
            "This TensorFlow is built without CUDA. "
            f"Install `tensorflow[and-cuda]=={tf.__version__}` on Linux, or take `auto`.",
        ),
        (
            _change(driver=None, driver_cuda=None, packages={}),
            "(built for CUDA 12.3, cuDNN 8, no driver, no nvidia-*-cu12 packages)",
            "Install the driver and `tensorflow[and-cuda]`, or take `auto`.",
        ),
        (
            _change(driver=None, driver_cuda=None, visible_devices="-1"),
            "no driver, ",  # unsetting the variable would not help yet
            "Install the driver and `tensorflow[and-cuda]`, or take `auto`.",
        ),
        (
            _change(visible_devices="-1"),
            "nvidia-cudnn-cu12 8.9.7.29, CUDA_VISIBLE_DEVICES='-1')",
            "CUDA_VISIBLE_DEVICES hides the GPUs. Unset it, or take `auto`.",
        ),
        (
            _change(driver_cuda=None),
            "driver 535.104.05, whose libcuda.so.1 does not load, ",
            "The driver's library is missing. In a container, start it with `--gpus all`; else reinstall the driver, "
            "or take `auto`.",
        ),
        (
            _change(driver="470.82.01", driver_cuda=(11, 4)),
            "driver 470.82.01, which runs CUDA 11.4 and older, ",
            "The driver is too old. Update it to one that runs CUDA 12.3, or take `auto`.",
        ),
        (
            _change(packages={}),
            "driver 535.104.05, which runs CUDA 12.4 and older, no nvidia-*-cu12 packages)",
            f"The CUDA libraries are missing. Install `tensorflow[and-cuda]=={tf.__version__}`, or take `auto`.",
        ),
        (
            _change(packages=WORKING.packages | {"nvidia-cudnn-cu12": "9.1.0.70"}),
            "nvidia-cuda-runtime-cu12 12.3.101, nvidia-cublas-cu12 12.3.4.1, nvidia-cudnn-cu12 9.1.0.70)",
            f"cuDNN 9.1.0.70 is not the 8 that TensorFlow needs. Install `tensorflow[and-cuda]=={tf.__version__}`, "
            "or take `auto`.",
        ),
        (
            _change(driver=None, visible_devices="3"),
            "driver of unknown version, which runs CUDA 12.4 and older, ",
            "See that `nvidia-smi` lists a GPU, read TensorFlow's log under TF_CPP_MIN_LOG_LEVEL=0, or take `auto`.",
        ),
    ],
)
def test_describe_missing_gpu_says_what_was_found_and_what_to_do(findings, found, remedy):
    message = describe_missing_gpu(findings, wanted="a GPU, as devices.accelerator is `gpu`", escape="take `auto`")

    assert message.startswith(f"{MISSING} (")
    assert found in message
    assert message.endswith(f" {remedy}")
    assert "\n" not in message


@without_gpu
def test_configure_devices_names_the_number_where_that_asked_for_a_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(gpu_diagnosis, "find", lambda visible_devices: _change(visible_devices=visible_devices))

    with pytest.raises(RuntimeError) as caught:
        configure_devices(DeviceConfig(num_gpus=2))

    assert str(caught.value).startswith("Expected a GPU, as devices.num_gpus is 2. Received: none ")
    assert str(caught.value).endswith("Unset it, or set devices.num_gpus to 0.")


@pytest.mark.parametrize(
    "text",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version:  gcc 12",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build  (root@host)",
    ],
)
def test_find_driver_reads_the_kernel_modules_version(text, tmp_path, monkeypatch):
    file = tmp_path / "version"
    file.write_text(text)
    monkeypatch.setattr(gpu_diagnosis, "_DRIVER_FILE", file)

    assert gpu_diagnosis._find_driver() == "550.54.15"


@pytest.mark.parametrize(
    ("script", "expected"), [("echo 550.54.15; echo 550.54.15", "550.54.15"), ("echo broken; exit 9", None)]
)
def test_find_driver_asks_nvidia_smi_where_the_kernel_does_not_tell(script, expected, tmp_path, monkeypatch):
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu_diagnosis, "_DRIVER_FILE", tmp_path / "none")

    assert gpu_diagnosis._find_driver() == expected


def test_configure_devices_refuses_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [f"{kind}:0", f"{kind}:1"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    message = (
        "Expected 4 GPUs, as devices.num_gpus says. Received: 2 that TensorFlow can see, with CUDA_VISIBLE_DEVICES='0,1'. "
        "Take a machine with more, or set devices.num_gpus to 2, or to 0 for all."
    )

    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        configure_devices(DeviceConfig(num_gpus=4))


@pytest.mark.parametrize("strategy", ["auto", "one_device"])
def test_configure_devices_takes_the_gpus_asked_for(strategy, monkeypatch, caplog):
    # The decisions on a machine of four GPUs, as far as they go without them.
    claimed, made = [], []
    details = {"compute_capability": T4, "device_name": "Tesla T4"}
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [f"{kind}:{number}" for number in range(4)])
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu: details)
    monkeypatch.setattr(devices, "_claim", claimed.extend)

    def make_strategy(name, *, num_gpus):
        made.append((name, num_gpus))
        return tf.distribute.get_strategy()

    monkeypatch.setattr(devices, "_make_strategy", make_strategy)
    several = strategy == "auto"

    with caplog.at_level(logging.INFO, "tfx_vision"):
        chosen = configure_devices(DeviceConfig(strategy=strategy, num_gpus=2 if several else 0))

    assert claimed == (["GPU:0", "GPU:1"] if several else ["GPU:0"])
    assert made == [("mirrored", 2) if several else ("one_device", 1)]
    assert (chosen.local_device, chosen.jit_compile, chosen.precision) == ("/GPU:0", not several, "mixed_float16")
    assert messages_of(caplog) == [
        "computing on 2 GPUs (Tesla T4) in mixed_float16"
        if several
        else "computing on GPU (Tesla T4) in mixed_float16 with XLA"
    ]


@without_gpu
def test_configure_devices_refuses_to_mirror_on_one_cpu():
    message = (
        "Expected a GPU or several CPU devices, as devices.strategy is `mirrored`. Received: no GPU and 1 CPU. Take `auto`."
    )

    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        configure_devices(DeviceConfig(strategy="mirrored"))


def test_configure_devices_mirrors_on_two_cpu_devices_with_determinism():
    script = """
import json, tensorflow as tf
from tensorflow.python.framework.config import is_op_determinism_enabled
from models.devices import DeviceConfig, configure_devices
[cpu] = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
devices = configure_devices(DeviceConfig(strategy="mirrored", deterministic=True))
replicas = devices.strategy.run(lambda: tf.distribute.get_replica_context().replica_id_in_sync_group)
print(json.dumps({
    "replicas": [int(value) for value in devices.strategy.experimental_local_results(replicas)],
    "num_replicas": devices.num_replicas,
    "strategy": type(devices.strategy).__name__,
    "deterministic": devices.deterministic and is_op_determinism_enabled(),
    "is_chief": devices.is_chief,
}))
"""

    [result] = _finish([_start(script)])

    assert result == {
        "replicas": [0, 1],
        "num_replicas": 2,
        "strategy": "MirroredStrategy",
        "deterministic": True,
        "is_chief": True,
    }


def test_configure_devices_joins_two_workers_of_which_one_is_chief():
    script = """
import json, tensorflow as tf
from models.devices import DeviceConfig, configure_devices
devices = configure_devices(DeviceConfig(accelerator="cpu"))
again = configure_devices(DeviceConfig(accelerator="cpu"))
with tf.device(devices.local_device):
    place = (tf.ones(2) + 1).device
@tf.function
def total():
    return devices.strategy.reduce("SUM", devices.strategy.run(lambda: tf.ones(())), axis=None)
print(json.dumps({
    "num_replicas": devices.num_replicas,
    "is_chief": devices.is_chief,
    "multi_worker": isinstance(devices.strategy, tf.distribute.MultiWorkerMirroredStrategy),
    "same": again.strategy is devices.strategy,
    "task": place.split("/")[3],
    "total": float(total()),
}))
"""
    hosts = [f"127.0.0.1:{port}" for port in find_free_ports(2)]
    workers = [_start(script, TF_CONFIG=_tf_config({"worker": hosts}, "worker", index)) for index in range(2)]

    results = _finish(workers)

    common = {"num_replicas": 2, "multi_worker": True, "same": True, "total": 2.0}
    assert results == [
        common | {"is_chief": True, "task": "task:0"},
        common | {"is_chief": False, "task": "task:1"},
    ]


@without_gpu
def test_configure_devices_refuses_workers_after_tensorflow_ran(monkeypatch):
    tf.ones(1)
    monkeypatch.setenv("TF_CONFIG", _tf_config({"worker": ["127.0.0.1:1", "127.0.0.1:2"]}, "worker"))

    with pytest.raises(RuntimeError, match=r"^Expected to set up the workers before TensorFlow .* in a process of its own\.$"):
        configure_devices(DeviceConfig())


@without_gpu
def test_configure_devices_warns_of_workers_that_train_each_on_its_own(monkeypatch, caplog):
    monkeypatch.setenv("TF_CONFIG", _tf_config({"worker": ["a:1", "b:1"]}, "worker", 1))

    chosen = configure_devices(DeviceConfig(strategy="one_device"))

    assert (chosen.num_replicas, chosen.is_chief) == (1, False)
    assert messages_of(caplog)[0] == "2 workers train the same model, each on its own, as devices.strategy is `one_device`"


def test_configure_devices_refuses_several_workers_without_tf_config():
    message = "Expected TF_CONFIG with two workers or more, as devices.strategy is `multi_worker`. Received: 1. "

    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        configure_devices(DeviceConfig(strategy="multi_worker"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, Cluster()),
        (" ", Cluster()),
        (_tf_config({"worker": ["a:1"]}, "worker"), Cluster(1, "worker 0", True)),
        (_tf_config({"chief": ["a:1"]}, "chief", "0"), Cluster(1, "chief 0", True)),
        (_tf_config({"worker": ["a:1", "b:1"]}, "worker", 0), Cluster(2, "worker 0", True)),
        (_tf_config({"worker": ["a:1", "b:1"]}, "worker", 1), Cluster(2, "worker 1", False)),
        (_tf_config({"chief": ["a:1"], "worker": ["b:1", "c:1"]}, "chief", 0), Cluster(3, "chief 0", True)),
        (_tf_config({"chief": ["a:1"], "worker": ["b:1", "c:1"]}, "worker", 0), Cluster(3, "worker 0", False)),
    ],
)
def test_parse_tf_config_finds_the_one_chief(text, expected):
    assert parse_tf_config(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{worker", "Expected TF_CONFIG to be JSON. Received: '{worker', "),
        ("[]", "Expected TF_CONFIG with a `cluster` of lists of host:port. Received: '[]'. "),
        ('{"task": {"type": "worker", "index": 0}}', "Expected TF_CONFIG with a `cluster` of lists of host:port. "),
        (_tf_config({}, "worker"), "Expected TF_CONFIG with a `cluster` of lists of host:port. "),
        (_tf_config({"worker": "a:1"}, "worker"), "Expected TF_CONFIG with a `cluster` of lists of host:port. "),
        (_tf_config({"worker": ["a:1", "b:1"]}, "worker", 2), "Expected TF_CONFIG with a `task` whose type is in its cluster "),
        (_tf_config({"worker": ["a:1"]}, "worker", -1), "Expected TF_CONFIG with a `task` whose type is in its cluster "),
        (_tf_config({"worker": ["a:1"]}, "worker", None), "Expected TF_CONFIG with a `task` whose type is in its cluster "),
        (_tf_config({"worker": ["a:1"]}, "chief"), "Expected TF_CONFIG with a `task` whose type is in its cluster "),
        ('{"cluster": {"worker": ["a:1"]}}', "Expected TF_CONFIG with a `task` whose type is in its cluster "),
        (_tf_config({"chief": ["a:1", "b:1"]}, "chief"), "Expected TF_CONFIG with one chief at most. "),
        (
            _tf_config({"worker": ["a:1", "b:1"]}, "evaluator"),
            "Expected TF_CONFIG with the tasks `chief` and `worker` only, as all of them train. Received: `evaluator` in ",
        ),
        (
            _tf_config({"worker": ["a:1", "b:1"], "ps": ["c:1"]}, "worker"),
            "Expected TF_CONFIG with the tasks `chief` and `worker` only, as all of them train. Received: `ps` in ",
        ),
    ],
)
def test_parse_tf_config_refuses_what_it_cannot_use(text, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        parse_tf_config(text)


def test_configure_devices_refuses_a_malformed_tf_config(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", "{worker")

    with pytest.raises(ValueError, match=r"^Expected TF_CONFIG to be JSON\. "):
        configure_devices(DeviceConfig())
