"""A TensorFlow Hub model of image features, or any SavedModel of that kind, as a backbone.

It is the one backbone that is TensorFlow only, and that gives one vector an image in place of feature maps; it stays as it was
trained, in inference mode. A SavedModel is a program: take it from whom you trust. Called by `models.backbones`, for a handle
or a path in place of a name.

Source: https://www.tensorflow.org/hub/common_signatures/images#image_feature_vector
"""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
import tensorflow_hub

from data.errors import InputError

DEFAULT_IMAGE_SIZE = 224
_NUM_CHANNELS = 3
_SERVING_DEFAULT = "serving_default"
_CHUNK_BYTES = 2**20


class SavedModelFeatures(keras.layers.Layer):
    """Applies the function of a SavedModel, in inference mode and without training it."""

    def __init__(self, loaded: tf.Module, features: Callable[[tf.Tensor], tf.Tensor], num_features: int) -> None:
        """Makes the layer.

        Args:
          loaded: the SavedModel; the layer holds it, so that its variables are exported with the layer.
          features: float32 [batch, height, width, 3] in [0, 1] -> float32 [batch, num_features].
          num_features: length of the vectors.
        """
        super().__init__(trainable=False, dtype="float32", name="saved_model")
        self.loaded = loaded
        self.features = features
        self.num_features = num_features

    def call(self, images: tf.Tensor) -> tf.Tensor:
        """Maps float32 [batch, height, width, 3] in [0, 1] to float32 [batch, num_features]."""
        return tf.ensure_shape(self.features(images), (None, self.num_features))

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        """Returns the shape of the vectors."""
        return input_shape[0], self.num_features


@functools.lru_cache(maxsize=1)  # a configuration is asked for its backbone many times, and loading takes seconds
def load_saved_model(handle: str) -> tuple[tf.Module, int | None]:
    """Finds a SavedModel, downloads it where need be, and loads it.

    Args:
      handle: address at tfhub.dev or kaggle.com, gs:// or local path. A download is kept in TFHUB_CACHE_DIR.

    Returns:
      The SavedModel, and the side in pixels of the images that it takes; None where it takes any.

    Raises:
      InputError: if it can't be downloaded, doesn't exist, or is no TensorFlow 2 SavedModel of images.
    """
    folder = _resolve(handle)
    try:
        loaded = tf.saved_model.load(folder)
    except (OSError, ValueError, tf.errors.OpError) as error:
        raise InputError(f"Expected a SavedModel of TensorFlow 2 in {folder}. Received: {_one_line(error)}.") from error
    return loaded, _fixed_image_size(loaded, handle)


def hub_network(
    handle: str,
    loaded: tf.Module,
    fixed_image_size: int | None,
    *,
    image_size: int,
    stochastic_depth: float = 0.0,
) -> keras.Model:
    """Builds the network around a SavedModel, with the weights that it brings.

    Args:
      handle: where it is from, for errors.
      loaded: the SavedModel.
      fixed_image_size: side in pixels of the images that it takes; None where it takes any.
      image_size: side of the input in pixels.
      stochastic_depth: 0, as a SavedModel stays as it is.

    Returns:
      A model from float32 [batch, image_size, image_size, 3], RGB in [0, 255], to one vector an image: float32
      [batch, num_features], the only one of its `outputs`.

    Raises:
      InputError: if the SavedModel doesn't take such images, or doesn't give one vector an image.
    """
    if stochastic_depth:
        raise InputError(
            f"Expected no stochastic depth for {handle}, a SavedModel that stays as it was trained. "
            f"Received: stochastic_depth={stochastic_depth}. Use 0, or a backbone by its name."
        )
    if fixed_image_size not in (None, image_size):
        raise InputError(
            f"Expected `image_size` to be {fixed_image_size}, all that {handle} takes. Received: image_size={image_size}."
        )
    features = _features_function(loaded, handle)
    try:
        # One image is worth its while: a SavedModel needn't say what it takes and gives, and says nothing of what it can't do.
        result = features(tf.zeros((1, image_size, image_size, _NUM_CHANNELS)))
    except (TypeError, ValueError, tf.errors.OpError) as error:
        raise InputError(
            f"Expected {handle} to take float32 images [batch, {image_size}, {image_size}, 3]. Received: {_one_line(error)}."
        ) from error
    if not isinstance(result, tf.Tensor) or result.shape.rank != 2:
        received = f"shape {tuple(result.shape)}" if isinstance(result, tf.Tensor) else f"{type(result).__name__} of several"
        raise InputError(
            f"Expected {handle} to give one vector an image, [batch, features]. Received: {received}. "
            "Take the model's feature-vector variant."
        )
    image = keras.Input((image_size, image_size, _NUM_CHANNELS), name="image")
    scaled = keras.layers.Rescaling(1 / 255, name="rescaling")(image)
    vector = SavedModelFeatures(loaded, features, result.shape[1])(scaled)
    network = keras.Model(image, vector, name="hub")
    network.trainable = False
    return network


def fingerprint(handle: str) -> str:
    """Returns the hexadecimal SHA-256 of a SavedModel's files, by their names and contents; downloads it where need be.

    Raises:
      InputError: if it can't be downloaded, or doesn't exist.
    """
    folder = _resolve(handle).rstrip("/")
    paths = [f"{parent.rstrip('/')}/{name}" for parent, _, names in tf.io.gfile.walk(folder) for name in names]
    digest = hashlib.sha256()
    for path in sorted(paths):
        content = hashlib.sha256()
        with tf.io.gfile.GFile(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                content.update(chunk)
        digest.update(f"{path.removeprefix(folder)} {content.hexdigest()}\n".encode())
    return digest.hexdigest()


def _resolve(handle: str) -> str:
    """Returns the local or gs:// folder of a SavedModel, downloaded where need be."""
    path = str(Path(handle).expanduser()) if handle.startswith("~") else handle
    try:
        return tensorflow_hub.resolve(path)
    except (OSError, ValueError, tf.errors.OpError) as error:
        raise InputError(
            f"Expected a SavedModel at {handle}. Received: {_one_line(error)}. Check the address; where there is no network, "
            "download it elsewhere and give its folder."
        ) from error


def _features_function(loaded: tf.Module, handle: str) -> Callable[[tf.Tensor], Any]:
    """Returns the SavedModel's function; its result is a tensor where it gives one, or several under one usual name."""
    signature = loaded.signatures.get(_SERVING_DEFAULT)
    if callable(loaded):
        function = loaded  # its argument `training`, where it has one, is False unless given, by the rules of TensorFlow Hub
    elif signature is not None:
        function = functools.partial(_call_signature, signature)
    else:
        raise InputError(
            f"Expected a SavedModel of TensorFlow 2 that can be called or has the signature {_SERVING_DEFAULT}. Received: "
            f"{handle}, with the signatures {sorted(loaded.signatures)}. Take a TF2 version of the model."
        )

    def features(images: tf.Tensor) -> Any:
        result = function(images)
        if isinstance(result, dict):
            result = result.get("default", next(iter(result.values())) if len(result) == 1 else result)
        return result

    return features


def _call_signature(signature: Callable[..., Any], images: tf.Tensor) -> Any:
    """Calls a signature, which takes its one input by name only."""
    _, inputs = signature.structured_input_signature
    (name,) = inputs
    return signature(**{name: images})


def _fixed_image_size(loaded: tf.Module, handle: str) -> int | None:
    """Returns the side of the images that every way to call the SavedModel takes; None where one takes any."""
    function = loaded.__call__ if callable(loaded) else loaded.signatures.get(_SERVING_DEFAULT)
    shapes = {
        tuple(spec.shape)
        for concrete in getattr(function, "concrete_functions", [function] if function else [])
        for spec in tf.nest.flatten(concrete.structured_input_signature)
        if isinstance(spec, tf.TensorSpec) and spec.shape.rank
    }
    if not all(len(shape) == 4 and shape[3] in (None, _NUM_CHANNELS) for shape in shapes):
        raise InputError(f"Expected {handle} to take images [batch, height, width, 3]. Received: {sorted(map(str, shapes))}.")
    sizes = {shape[1:3] for shape in shapes}
    if len(sizes) != 1 or None in (size := sizes.pop()):
        return None
    if size[0] != size[1]:
        raise InputError(f"Expected {handle} to take square images. Received: {size[0]} by {size[1]} pixels.")
    return size[0]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
