"""The backbones by name, each with what it needs of its input, its licence and its paper.

Preprocessing and export derive from this data, so training and serving cannot drift apart. Called by
`models.classifier`.
"""

import dataclasses
import difflib
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import keras

from data.errors import InputError
from models import efficientnet_lite
from models.keras_efficientnet import keras_efficientnet, load_imagenet_weights


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A network that turns an image into feature maps.

    Attributes:
      build: makes the network without trained weights; takes `image_size` and `stochastic_depth`, which is 0 unless given,
        and returns a model from float32 [batch, image_size, image_size, 3], RGB in [0, 255], to a list of feature maps, one
        for each stage, coarsest last. A model of TensorFlow Hub gives one vector, [batch, features], as its only output. The
        network's first layers do all that the weights expect of the values; `models.folding` folds its BatchNormalization.
      load_imagenet: sets the ImageNet weights on such a network, from a file, or from the backbone's own source if that is "".
      covariance_maps: positions in that list of the maps whose channel covariances help; middle ones, of texture. Measured
        for EfficientNet-Lite0; for the others chosen by analogy: those of the last two stages at stride 16.
      image_size: side in pixels of the images it was trained on, or tested on where that is larger.
      interpolation: `bicubic` or `bilinear`; how those images were resized.
      value_range: lowest and highest value that the weights expect; what the network's first layers make of 0 and 255.
      licence: of the weights.
      paper: where it is described.
    """

    build: Callable[..., keras.Model]
    load_imagenet: Callable[[keras.Model, str], None]
    covariance_maps: tuple[int, ...]
    image_size: int
    interpolation: str
    value_range: tuple[float, float]
    licence: str
    paper: str


def _lite(variant: efficientnet_lite.Variant, *, image_size: int) -> Backbone:
    return Backbone(
        build=functools.partial(efficientnet_lite.efficientnet_lite, variant),
        load_imagenet=functools.partial(efficientnet_lite.load_imagenet_weights, variant),
        covariance_maps=(3, 4),
        image_size=image_size,
        interpolation="bicubic",
        value_range=(-127 / 128, 1.0),
        licence="Apache-2.0",
        paper="https://arxiv.org/abs/1905.11946",
    )


def _keras(
    application: Callable[..., keras.Model],
    *,
    image_size: int,
    paper: str,
    interpolation: str = "bicubic",
    value_range: tuple[float, float] = ((0 - 0.485) / 0.229, (1 - 0.406) / 0.225),  # of red and of blue, standardized
) -> Backbone:
    return Backbone(
        build=functools.partial(keras_efficientnet, application),
        load_imagenet=functools.partial(load_imagenet_weights, application),
        covariance_maps=(3, 4),
        image_size=image_size,
        interpolation=interpolation,
        value_range=value_range,
        licence="Apache-2.0",
        paper=paper,
    )


_b = functools.partial(_keras, paper="https://arxiv.org/abs/1905.11946")
_v2_b = functools.partial(_keras, paper="https://arxiv.org/abs/2104.00298")
# Trained with a preprocessing of their own: https://github.com/google/automl/blob/master/efficientnetv2/preprocessing.py
_v2 = functools.partial(_v2_b, interpolation="bilinear", value_range=(-1.0, 127 / 128))

BACKBONES = {
    "efficientnet_lite0": _lite(efficientnet_lite.LITE0, image_size=224),
    "efficientnet_lite1": _lite(efficientnet_lite.LITE1, image_size=240),
    "efficientnet_lite2": _lite(efficientnet_lite.LITE2, image_size=260),
    "efficientnet_b0": _b(keras.applications.EfficientNetB0, image_size=224),
    "efficientnet_b1": _b(keras.applications.EfficientNetB1, image_size=240),
    "efficientnet_b2": _b(keras.applications.EfficientNetB2, image_size=260),
    "efficientnet_b3": _b(keras.applications.EfficientNetB3, image_size=300),
    "efficientnet_b4": _b(keras.applications.EfficientNetB4, image_size=380),
    "efficientnet_b5": _b(keras.applications.EfficientNetB5, image_size=456),
    "efficientnet_b6": _b(keras.applications.EfficientNetB6, image_size=528),
    "efficientnet_b7": _b(keras.applications.EfficientNetB7, image_size=600),
    "efficientnet_v2_b0": _v2_b(keras.applications.EfficientNetV2B0, image_size=224),
    "efficientnet_v2_b1": _v2_b(keras.applications.EfficientNetV2B1, image_size=240),
    "efficientnet_v2_b2": _v2_b(keras.applications.EfficientNetV2B2, image_size=260),
    "efficientnet_v2_b3": _v2_b(keras.applications.EfficientNetV2B3, image_size=300),
    "efficientnet_v2_s": _v2(keras.applications.EfficientNetV2S, image_size=384),
    "efficientnet_v2_m": _v2(keras.applications.EfficientNetV2M, image_size=480),
    "efficientnet_v2_l": _v2(keras.applications.EfficientNetV2L, image_size=480),
}
_HANDLE_PREFIXES = ("https://", "gs://", "/", "./", "../", "~")


def check_name(name: str) -> None:
    """Checks that a name is one of `find_backbone`, by its spelling alone: nothing is downloaded or loaded.

    Raises:
      InputError: if it is neither in `BACKBONES` nor begins as a handle or a path does.
    """
    if name not in BACKBONES and not name.startswith(_HANDLE_PREFIXES):
        nearest = difflib.get_close_matches(name, BACKBONES, n=1, cutoff=0.0)[0]
        raise InputError(
            f"Expected `model.backbone` to be one of {', '.join(BACKBONES)}, the https:// handle of a TensorFlow Hub model, or "
            f"the path of a SavedModel, with a / in front. Received: model.backbone={name!r}. Did you mean {nearest}?"
        )


def find_backbone(name: str) -> Backbone:
    """Finds a backbone.

    Args:
      name: in `BACKBONES`; or a TensorFlow Hub handle (https://tfhub.dev/..., https://www.kaggle.com/models/...), a gs:// or
        a local path (it starts with /, ./, ../ or ~) of a SavedModel, which is downloaded where need be, and loaded.

    Raises:
      InputError: if there is no such name, or no such SavedModel.
    """
    check_name(name)
    if name in BACKBONES:
        return BACKBONES[name]
    # Here, as it is the only one that needs TensorFlow by name; the networks above compute with any backend of Keras.
    from models import hub

    loaded, fixed_image_size = hub.load_saved_model(name)
    return Backbone(
        build=functools.partial(hub.hub_network, name, loaded, fixed_image_size),
        load_imagenet=lambda network, weights_file: None,  # it brings its weights; `ModelConfig` refuses a file of others
        covariance_maps=(),
        image_size=fixed_image_size or hub.DEFAULT_IMAGE_SIZE,
        interpolation="bilinear",
        value_range=(0.0, 1.0),
        licence="of its publisher; see the model's page",
        paper=name,
    )


def weights_fingerprint(name: str, weights_file: str) -> str:
    """Names the files that a backbone's weights come from, where those are the user's own.

    Args:
      name: as `find_backbone` takes it.
      weights_file: `ModelConfig.weights_file`.

    Returns:
      Hexadecimal SHA-256 of a Hub model's files, or of the file of weights; "" for the published weights of a named backbone.

    Raises:
      InputError: if there is no such SavedModel.
      OSError: if there is no such file.
    """
    if name not in BACKBONES:
        from models import hub

        return hub.fingerprint(name)
    if not weights_file:
        return ""
    with Path(weights_file).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
