"""Chooses the accelerator and the precision by what the machine has and what the configuration says.

Called once by the trainer, before it builds anything.
"""

import logging
from typing import Literal

import keras
import pydantic
import tensorflow as tf

logger = logging.getLogger("tfx_vision")

_BFLOAT16_COMPUTE_CAPABILITY = (8, 0)  # A100 and newer


class DeviceConfig(pydantic.BaseModel):
    """What to compute on.

    Attributes:
      accelerator: `auto` takes a GPU if there is one; `gpu` fails without one; `cpu` never looks.
      precision: `auto` is float32 on a CPU, mixed_bfloat16 on an A100 or newer, mixed_float16 on older GPUs.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    accelerator: Literal["auto", "gpu", "cpu"] = "auto"
    precision: Literal["auto", "float32", "mixed_float16", "mixed_bfloat16"] = "auto"


def configure_devices(config: DeviceConfig) -> str:
    """Sets memory growth and Keras's global precision.

    Returns:
      The name of the device to compute on, `/GPU:0` or `/CPU:0`.

    Raises:
      RuntimeError: if a GPU was asked for and TensorFlow sees none.
    """
    gpus = [] if config.accelerator == "cpu" else tf.config.list_physical_devices("GPU")
    if config.accelerator == "gpu" and not gpus:
        build = tf.sysconfig.get_build_info()
        raise RuntimeError(
            "Expected a GPU, as devices.accelerator is `gpu`. Received: none that TensorFlow "
            f"{tf.__version__} can see (built for CUDA {build.get('cuda_version', 'none')}, cuDNN "
            f"{build.get('cudnn_version', 'none')}). Install the driver and `tensorflow[and-cuda]`, or take `auto`."
        )
    for gpu in gpus:
        try:
            tf.config.experimental.set_memory_growth(gpu, True)
        except RuntimeError:
            # TensorFlow has been initialized in this process, by an earlier component; its memory is growing already.
            logger.debug("memory growth of %s is settled already", gpu.name)
    policy = config.precision if config.precision != "auto" else _choose_precision(gpus)
    keras.mixed_precision.set_dtype_policy(policy)
    device = "/GPU:0" if gpus else "/CPU:0"
    logger.info("computing on %s in %s", device.strip("/"), policy)
    return device


def _choose_precision(gpus: list[tf.config.PhysicalDevice]) -> str:
    if not gpus:
        return "float32"
    capability = tf.config.experimental.get_device_details(gpus[0]).get("compute_capability", (0, 0))
    return "mixed_bfloat16" if capability >= _BFLOAT16_COMPUTE_CAPABILITY else "mixed_float16"
