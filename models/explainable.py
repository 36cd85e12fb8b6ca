"""An exported classifier with gradients of its answers, through its own signatures.

`explain_preprocess` and `explain_model` are the two halves of `serving_default`, and `explain_feature_maps` and `explain_head`
those of `explain_model`, so what is explained is what is served. Called by `models.attributions`, by the server and by the
report.
"""

import functools
import io
import posixpath
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf
from PIL import Image

from data.errors import InputError
from models.signatures import (
    EXPLAIN_FEATURE_MAPS,
    EXPLAIN_HEAD,
    EXPLAIN_MODEL,
    EXPLAIN_PREPROCESS,
    IMAGE_BYTES,
    IMAGES,
    LOGITS,
    PROBABILITIES,
    SERVING_DEFAULT,
    XAI_MODEL,
)

_SAVED_MODEL_FILE = "saved_model.pb"


class ExplainableModel:
    """An exported classifier, loaded by TensorFlow alone, with gradients of its answers.

    Attributes:
      folder: of the SavedModel.
      num_classes: how many probabilities it gives.
      on_gradients: called with the number of images after each batch of gradients, for a progress bar; None for nobody.
    """

    def __init__(self, folder: str):
        """Loads a SavedModel.

        Args:
          folder: of the SavedModel; local or gs://.

        Raises:
          InputError: if there is none that can be loaded, or it lacks the signatures.
        """
        expected = f"Expected a SavedModel with the signatures {EXPLAIN_PREPROCESS} and {EXPLAIN_MODEL}."
        remedy = "Take the folder of a model that this pipeline has trained or pushed."
        try:
            self._model = tf.saved_model.load(folder)  # kept, as its variables go with it
        except (OSError, ValueError, tf.errors.OpError) as error:
            reason = str(error).strip().split("\n")[0]
            raise InputError(f"{expected} Received: {folder!r}, which cannot be loaded: {reason} {remedy}") from error
        self._signatures = self._model.signatures
        if EXPLAIN_PREPROCESS not in self._signatures or EXPLAIN_MODEL not in self._signatures:
            raise InputError(f"{expected} Received: {folder!r} with {', '.join(self._signatures) or 'none'}. {remedy}")
        self.folder = folder
        self.on_gradients: Callable[[int], object] | None = None
        self._preprocess = self._signatures[EXPLAIN_PREPROCESS]
        self._predict = self._signatures[EXPLAIN_MODEL]
        images = self._predict.structured_input_signature[1][IMAGES]
        # Traced, as a gradient that is taken eagerly is three times as slow.
        self._differentiate = tf.function(
            self._gradients, input_signature=[images, tf.TensorSpec([], tf.int32)], autograph=False
        )
        self._differentiate_maps = tf.function(
            self._map_gradients, input_signature=[images, tf.TensorSpec([], tf.int32)], autograph=False
        )
        self.num_classes = int(self._predict.structured_outputs[PROBABILITIES].shape[-1])

    @functools.cached_property
    def class_names(self) -> list[str]:
        """The classes in the order of the probabilities, as `serving_default` names them."""
        black = io.BytesIO()
        Image.new("RGB", (8, 8)).save(black, "PNG")
        labels = self._signatures[SERVING_DEFAULT](**{IMAGE_BYTES: tf.constant([black.getvalue()])})["labels"]
        return [name.decode() for name in labels.numpy()[0]]

    @functools.cached_property
    def fingerprint(self) -> str | None:
        """TensorFlow's own fingerprint of the SavedModel, of its graph and of its weights; None where it has none."""
        try:
            return tf.saved_model.experimental.read_fingerprint(self.folder).singleprint()
        except (OSError, ValueError, RuntimeError, tf.errors.OpError):
            return None

    def _gradients(self, images: tf.Tensor, class_index: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(images)
            answers = self._predict(**{IMAGES: images})[PROBABILITIES][:, class_index]
        return tape.gradient(answers, images)

    def _map_gradients(self, images: tf.Tensor, class_index: tf.Tensor) -> dict[str, tuple[tf.Tensor, tf.Tensor]]:
        maps = self._signatures[EXPLAIN_FEATURE_MAPS](**{IMAGES: images})
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(maps)
            logits = self._signatures[EXPLAIN_HEAD](**maps)[LOGITS]
            # The logarithm of the odds: unlike a probability, its slope does not vanish where the model is certain, and unlike
            # one logit, it does not change with what is added to all of them.
            others = tf.where(tf.range(self.num_classes) == class_index, logits.dtype.min, logits)
            log_odds = logits[:, class_index] - tf.reduce_logsumexp(others, axis=-1)
        gradients = tape.gradient(log_odds, maps)
        return {name: (maps[name], gradients[name]) for name in maps}

    def preprocess(self, image_bytes: Sequence[bytes]) -> np.ndarray:
        """Decodes and resizes images as in serving.

        Args:
          image_bytes: encoded images, one or more.

        Returns:
          float32 [num_images, height, width, 3]; RGB in [0, 255], what the network sees.

        Raises:
          tf.errors.InvalidArgumentError: if one of them is no image.
        """
        return self._preprocess(**{IMAGE_BYTES: tf.constant(list(image_bytes))})[IMAGES].numpy()

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Gives float32 [num_images, num_classes] of float32 [num_images, height, width, 3] images in [0, 255]."""
        return self._predict(**{IMAGES: tf.constant(images, tf.float32)})[PROBABILITIES].numpy()

    def check_class(self, class_index: int) -> None:
        """Checks that there is such a class.

        Raises:
          InputError: if not.
        """
        if not 0 <= class_index < self.num_classes:
            raise InputError(
                f"Expected `class_index` in [0, {self.num_classes}). Received: class_index={class_index}. "
                "Take the class's place in labels.txt."
            )

    def gradients(self, images: np.ndarray, class_index: int) -> np.ndarray:
        """Differentiates the probability of one class by every pixel.

        Args:
          images: float32 [num_images, height, width, 3] in [0, 255].
          class_index: of the class, in [0, num_classes).

        Returns:
          float32 [num_images, height, width, 3]; probability per grey level.

        Raises:
          InputError: if there is no such class.
        """
        self.check_class(class_index)
        found = self._differentiate(tf.constant(images, tf.float32), tf.constant(class_index)).numpy()
        if self.on_gradients is not None:
            self.on_gradients(len(images))
        return found

    def feature_map_gradients(self, image: np.ndarray, class_index: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Differentiates the logarithm of the odds of one class by the feature maps that the head reads, each by itself.

        Args:
          image: float32 [height, width, 3] in [0, 255].
          class_index: of the class, in [0, num_classes).

        Returns:
          Name -> the map and its gradient, both float32 [map_height, map_width, channels].

        Raises:
          InputError: if the model has no such signatures, as an earlier version exported it or its backbone gives no maps, or
            if there is no such class.
        """
        self.check_class(class_index)
        if EXPLAIN_HEAD not in self._signatures:
            is_recent = XAI_MODEL in self._signatures  # which came with the signatures that are missing
            reason = "a model whose backbone gives no feature maps" if is_recent else "a model exported by an earlier version"
            remedy = "" if is_recent else "Train or export it again, or take "
            raise InputError(
                f"Expected a model with the signature {EXPLAIN_HEAD}, without which Grad-CAM is not available. "
                f"Received: {self.folder!r}, {reason}. {remedy or 'Take '}integrated_gradients or xrai."
            )
        found = self._differentiate_maps(tf.constant(image[np.newaxis], tf.float32), tf.constant(class_index))
        if self.on_gradients is not None:
            self.on_gradients(1)
        return {name: (values.numpy()[0], gradients.numpy()[0]) for name, (values, gradients) in found.items()}


def find_saved_model(folder: str) -> str:
    """Finds the SavedModel that a path means.

    Args:
      folder: of a SavedModel, or of versions of it, such as `serving_model`; local or gs://.

    Returns:
      The folder of the SavedModel; of versions, the highest.

    Raises:
      InputError: if there is none.
    """
    if tf.io.gfile.exists(posixpath.join(folder, _SAVED_MODEL_FILE)):
        return folder
    names = tf.io.gfile.listdir(folder) if tf.io.gfile.isdir(folder) else []
    versions = sorted((int(name.rstrip("/")) for name in names if name.rstrip("/").isdecimal()), reverse=True)
    for version in versions:
        path = posixpath.join(folder, str(version))
        if tf.io.gfile.exists(posixpath.join(path, _SAVED_MODEL_FILE)):
            return path
    raise InputError(
        f"Expected a SavedModel's folder, which holds {_SAVED_MODEL_FILE}, or a folder of its versions. Received: {folder!r}. "
        "Give the serving_model folder of a workspace."
    )
