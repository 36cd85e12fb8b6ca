"""Why a model says so: heat maps of the exported SavedModel, through its own signatures.

`explain_preprocess` and `explain_model` are the two halves of `serving_default`, so what is explained is what is served.
Called by `pipeline.report`.
"""

from collections.abc import Sequence

import numpy as np
import saliency.core as saliency
import tensorflow as tf
from PIL import Image
from scipy import ndimage

from data.errors import InputError
from models.signatures import EXPLAIN_MODEL, EXPLAIN_PREPROCESS, IMAGE_BYTES, PROBABILITIES

IMAGES = "images"  # input of `explain_model` and output of `explain_preprocess`

# The baseline of the integrated gradients is the picture itself, blurred: as bright and as colourful, and without detail.
# Tested on the default data's eight most confident mistakes, by blurring the tenth of the picture that a map of 32 steps marks:
# the probability fell by 0.64 (by 0.28 where a random tenth was blurred). With a black baseline it fell by 0.25, no more than
# by chance: on the way from black the contrast is so low that the network's answers are erratic, and the sum does not converge.
BLUR = 1 / 28  # standard deviation, as a share of the image's side: 8 of 224 pixels
DEFAULT_STEPS = 32
_MAX_PIXELS_PER_BATCH = 16 * 224**2  # of the images that are in memory at once with all of the network's activations

_SMOOTHING = 1 / 56  # standard deviation, as a share of the map's side; single pixels of a gradient are noise to the eye
_PERCENTILE = 99.5  # of the absolute values: drawn with the full colour, as are those above
_MAX_OPACITY = 0.8
# Of the palette of Okabe and Ito, which colour-blind people tell apart.
_FOR_COLOR = (213, 94, 0)
_AGAINST_COLOR = (0, 114, 178)


class ExplainableModel:
    """An exported classifier, loaded by TensorFlow alone, with gradients of its answers."""

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
        signatures = self._model.signatures
        if EXPLAIN_PREPROCESS not in signatures or EXPLAIN_MODEL not in signatures:
            raise InputError(f"{expected} Received: {folder!r} with {', '.join(signatures) or 'none'}. {remedy}")
        self._preprocess = signatures[EXPLAIN_PREPROCESS]
        self._predict = signatures[EXPLAIN_MODEL]
        images = self._predict.structured_input_signature[1][IMAGES]
        # Traced, as a gradient that is taken eagerly is three times as slow.
        self._differentiate = tf.function(
            self._gradients, input_signature=[images, tf.TensorSpec([], tf.int32)], autograph=False
        )
        self.num_classes = int(self._predict.structured_outputs[PROBABILITIES].shape[-1])

    def _gradients(self, images: tf.Tensor, class_index: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(images)
            answers = self._predict(**{IMAGES: images})[PROBABILITIES][:, class_index]
        return tape.gradient(answers, images)

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

    def gradients(self, images: np.ndarray, class_index: int) -> np.ndarray:
        """Differentiates the probability of one class by every pixel.

        Args:
          images: float32 [num_images, height, width, 3] in [0, 255].
          class_index: of the class, in [0, num_classes).

        Returns:
          float32 [num_images, height, width, 3]; probability per grey level.

        Raises:
          ValueError: if there is no such class.
        """
        if not 0 <= class_index < self.num_classes:
            raise ValueError(
                f"Expected `class_index` in [0, {self.num_classes}). Received: class_index={class_index}. "
                "Take the class's place in labels.txt."
            )
        return self._differentiate(tf.constant(images, tf.float32), tf.constant(class_index)).numpy()


def integrated_gradients(
    model: ExplainableModel, image_bytes: bytes, class_index: int, *, num_steps: int = DEFAULT_STEPS
) -> np.ndarray:
    """Shares the probability of a class out among the pixels of an image: what each added to it, or took from it.

    The values add up to the difference between the probability for the image and that for its blurred copy, the baseline; how
    closely, depends on `num_steps`. On the default data's eight most confident mistakes the median gap was 0.05 with 32 steps
    (the largest 0.68) and 0.09 with 64 (0.17).

    Args:
      model: the classifier.
      image_bytes: an encoded image.
      class_index: of the class to be explained, in [0, num_classes).
      num_steps: images between the baseline and the image, both included, at which the gradient is taken; at least 2.

    Returns:
      float32 [height, width] of the network's input; positive where a pixel speaks for the class.

    Raises:
      ValueError: if there is no such class, or `num_steps` is below 2.
      tf.errors.InvalidArgumentError: if the bytes are no image.

    Source: Sundararajan et al., "Axiomatic attribution for deep networks", https://arxiv.org/abs/1703.01365
    """
    if num_steps < 2:
        raise ValueError(f"Expected `num_steps` of 2 or more. Received: num_steps={num_steps}. Use {DEFAULT_STEPS}.")
    (image,) = model.preprocess([image_bytes])

    def differentiate(images: np.ndarray, call_model_args: None, expected_keys: Sequence[str]) -> dict[str, np.ndarray]:
        return {saliency.INPUT_OUTPUT_GRADIENTS: model.gradients(images, class_index)}

    attribution = saliency.IntegratedGradients().GetMask(
        image,
        differentiate,
        x_baseline=blurred(image),
        x_steps=num_steps,
        batch_size=max(1, min(num_steps, _MAX_PIXELS_PER_BATCH // (image.shape[0] * image.shape[1]))),
    )
    return attribution.sum(axis=-1).astype(np.float32)


def blurred(image: np.ndarray) -> np.ndarray:
    """Blurs float32 [height, width, 3] as the baseline of the integrated gradients is, by `BLUR` of each side."""
    height, width, _ = image.shape
    return ndimage.gaussian_filter(image, (BLUR * height, BLUR * width, 0), mode="nearest")


def overlay(image: Image.Image, attribution: np.ndarray) -> Image.Image:
    """Draws an attribution over its image: orange speaks for the class, blue against it.

    The image becomes grey, as colours would mix. It may have another size and aspect than the attribution, as the network
    squeezes its input into a square; the map is stretched back.

    Args:
      image: RGB.
      attribution: float32 [height, width], any range.

    Returns:
      An RGB image of the size of `image`.

    Raises:
      ValueError: if a value of the attribution is not finite.
    """
    if not np.isfinite(attribution).all():
        raise ValueError("Expected an attribution of finite values. Received: some that are not. Check the model's weights.")
    smooth = ndimage.gaussian_filter(attribution, [_SMOOTHING * side for side in attribution.shape])
    scale = np.percentile(np.abs(smooth), _PERCENTILE)
    strength = np.clip(smooth / scale, -1, 1) if scale > 0 else np.zeros_like(smooth)
    stretched = Image.fromarray(strength.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    strength = np.asarray(stretched)[..., np.newaxis]
    color = np.where(strength > 0, _FOR_COLOR, _AGAINST_COLOR)
    grey = np.asarray(image.convert("L").convert("RGB"), np.float32)
    opacity = _MAX_OPACITY * np.abs(strength)
    return Image.fromarray((grey * (1 - opacity) + color * opacity).round().astype(np.uint8))
