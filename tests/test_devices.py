import re

import keras
import pytest
import tensorflow as tf

from data.errors import InputError, validate
from models.devices import DeviceConfig, configure_devices

HAS_GPU = bool(tf.config.list_physical_devices("GPU"))
without_gpu = pytest.mark.skipif(HAS_GPU, reason="the machine has a GPU")
with_gpu = pytest.mark.skipif(not HAS_GPU, reason="the machine has no GPU")


@pytest.fixture(autouse=True)
def _restored_precision():
    before = keras.mixed_precision.dtype_policy()
    yield
    keras.mixed_precision.set_dtype_policy(before)


@without_gpu
@pytest.mark.parametrize("accelerator", ["auto", "cpu"])
def test_configure_devices_takes_the_cpu_in_float32(accelerator):
    keras.mixed_precision.set_dtype_policy("mixed_bfloat16")

    assert configure_devices(DeviceConfig(accelerator=accelerator)) == "/CPU:0"

    assert keras.mixed_precision.dtype_policy().name == "float32"


@without_gpu
def test_configure_devices_refuses_to_go_on_without_the_gpu_asked_for():
    message = f"Expected a GPU, as devices.accelerator is `gpu`. Received: none that TensorFlow {tf.__version__} can see"

    with pytest.raises(RuntimeError, match=re.escape(message)) as caught:
        configure_devices(DeviceConfig(accelerator="gpu"))

    assert str(caught.value).endswith("Install the driver and `tensorflow[and-cuda]`, or take `auto`.")


@with_gpu
@pytest.mark.parametrize("accelerator", ["auto", "gpu"])
def test_configure_devices_takes_the_gpu_in_half_precision(accelerator):
    assert configure_devices(DeviceConfig(accelerator=accelerator)) == "/GPU:0"

    assert keras.mixed_precision.dtype_policy().name in ("mixed_float16", "mixed_bfloat16")


@with_gpu
def test_configure_devices_takes_the_cpu_where_the_gpu_is_not_wanted():
    assert configure_devices(DeviceConfig(accelerator="cpu")) == "/CPU:0"

    assert keras.mixed_precision.dtype_policy().name == "float32"


@pytest.mark.parametrize("precision", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_configure_devices_obeys_a_precision(precision):
    configure_devices(DeviceConfig(precision=precision))

    assert keras.mixed_precision.dtype_policy().name == precision


@pytest.mark.parametrize(("setting", "value"), [("accelerator", "tpu"), ("precision", "int8")])
def test_device_config_refuses_what_it_does_not_know(setting, value):
    with pytest.raises(InputError, match=f"^Expected `{setting}` to be valid. Received: {setting}='{value}'. "):
        validate(DeviceConfig, {setting: value})
