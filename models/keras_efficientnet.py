"""EfficientNet B0 to B7 and EfficientNetV2 of `keras.applications`, as backbones that give a feature map of each stage.

The library owns the architectures, and the addresses and digests of the weights; what is added is the list of feature maps,
a stochastic depth of one's choice, and the same normalisation of the input with and without the weights. Called by
`models.backbones`, which says what each network needs of its input.

Source: Tan and Le, "EfficientNet", https://arxiv.org/abs/1905.11946, and "EfficientNetV2", https://arxiv.org/abs/2104.00298
"""

import re
import warnings
from collections.abc import Callable

import keras
import numpy as np

from data.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_BLOCK = re.compile(r"(block(\d+).)_")  # block2a_expand_conv: the second stage's first block
_SCRATCH_SIZE = 32  # pixels; the smallest that the library takes, as weights don't depend on it


def keras_efficientnet(
    application: Callable[..., keras.Model], *, image_size: int, stochastic_depth: float = 0.0
) -> keras.Model:
    """Builds the network up to its last activation, without pooling and without weights of ImageNet.

    Args:
      application: of `keras.applications`, such as `keras.applications.EfficientNetB0`.
      image_size: side of the input in pixels, at least 32; any size works, one that isn't a multiple of the network's stride
        of 32 is padded.
      stochastic_depth: rate at which the last block is left out in training, in [0, 1); earlier ones less, in proportion to
        their depth. 0 leaves none out.

    Returns:
      A model from float32 [batch, image_size, image_size, 3], RGB in [0, 255], to a list of feature maps, one for each
      stage and the head last: float32 [batch, height, width, channels].
    """
    image = keras.Input((image_size, image_size, 3), name="image")
    network = application(include_top=False, weights=None, input_tensor=image, input_shape=(image_size, image_size, 3))
    _set_stochastic_depth(network, stochastic_depth)
    for layer in network.layers:
        if _is_adapted(layer):
            _set_normalization(layer, np.asarray(IMAGENET_MEAN), np.square(IMAGENET_STD))
    # Layers come in the order of the computation, so a stage's last one gives its feature map.
    stages = {match[2]: layer.output for layer in network.layers if (match := _BLOCK.match(layer.name))}
    feature_maps = [*stages.values(), network.get_layer("top_activation").output]
    return keras.Model(image, feature_maps, name=network.name)


def load_imagenet_weights(application: Callable[..., keras.Model], network: keras.Model, weights_file: str = "") -> None:
    """Sets the published ImageNet weights on a network of `keras_efficientnet`.

    The network is then the function that `application(weights="imagenet", include_top=False)` is.

    Args:
      application: that the network was built from.
      network: to set the weights on.
      weights_file: a file of the application without its top, such as `efficientnetb0_notop.h5`; empty to download it or to
        take it from Keras's cache, `~/.keras/models`.

    Raises:
      InputError: if the weights can't be downloaded, or the file doesn't exist or doesn't fit.
    """
    shape = (_SCRATCH_SIZE, _SCRATCH_SIZE, 3)
    if weights_file:
        published = application(include_top=False, weights=None, input_shape=shape)
        load_weights_file(published, weights_file)
    else:
        try:
            published = application(include_top=False, weights="imagenet", input_shape=shape)
        except Exception as error:  # Keras raises Exception itself when a download fails
            raise InputError(
                f"Expected to download the ImageNet weights of {application.__name__}. Received: {_one_line(error)}. "
                'Give a local file in model.weights_file, or take model.weights = "random".'
            ) from error
    for layer, source in zip(_layers_with_weights(network), _layers_with_weights(published), strict=True):
        if _is_adapted(layer):
            # The published network divides once more by the root of the standard deviation, with a Rescaling that the library
            # adds for weights="imagenet" only, as it holds deviations where variances belong
            # (https://github.com/tensorflow/tensorflow/issues/49930). Here the variance takes that up.
            mean, variance = (np.asarray(value) for value in (source.adapt_mean, source.adapt_variance))
            _set_normalization(layer, mean, variance * IMAGENET_STD)
        else:
            layer.set_weights(source.get_weights())


def load_weights_file(network: keras.Model, weights_file: str) -> None:
    """Loads a file of Keras weights (`.weights.h5`, `.h5` or `.keras`) into a network of the same layers.

    Raises:
      InputError: if it doesn't exist or doesn't fit; the network's weights are of no use then.
    """
    # Keras only warns of some layers that a file lacks, of files that have them under another name too; NaN tells which it set.
    for weight in network.weights:
        if keras.backend.is_float_dtype(weight.dtype):
            weight.assign(np.full(weight.shape, np.nan))
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            network.load_weights(weights_file)
        missing = [weight.path for weight in network.weights if np.isnan(np.asarray(weight)).any()]
        if missing:
            raise ValueError(f"It has no values for {len(missing)} weights, {missing[0]} first")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"Expected `weights_file` to hold the weights of {network.name}, as Keras writes them and without a classifier. "
            f"Received: weights_file={weights_file!r}. {_one_line(error)}."
        ) from error


def _set_stochastic_depth(network: keras.Model, stochastic_depth: float) -> None:
    """Sets the rates of the library's Dropout layers, of which each leaves out a block."""
    blocks = list(dict.fromkeys(match[1] for layer in network.layers if (match := _BLOCK.match(layer.name))))
    for layer in network.layers:
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = stochastic_depth * blocks.index(_BLOCK.match(layer.name)[1]) / (len(blocks) - 1)


def _is_adapted(layer: keras.layers.Layer) -> bool:
    """Whether it is a Normalization whose statistics are weights, as in B0 to B7; V2 has them in its configuration."""
    return isinstance(layer, keras.layers.Normalization) and bool(layer.weights)


def _set_normalization(layer: keras.layers.Normalization, mean: np.ndarray, variance: np.ndarray) -> None:
    layer.adapt_mean.assign(mean)
    layer.adapt_variance.assign(variance)
    layer.finalize_state()  # it computes with constants made from these


def _layers_with_weights(network: keras.Model) -> list[keras.layers.Layer]:
    return [layer for layer in network.layers if layer.weights]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
