"""The one definition of decode and resize, shared by training, evaluation, serving and explanations. Pure TensorFlow."""

from collections.abc import Callable
from typing import Literal

import pydantic
import tensorflow as tf

NUM_CHANNELS = 3
Interpolation = Literal["bicubic", "bilinear"]


class InputSpec(pydantic.BaseModel):
    """What a network needs of its input; each backbone carries its own.

    Attributes:
      image_size: side of the square input in pixels.
      interpolation: with which images are resized to it.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    image_size: int = pydantic.Field(ge=32, le=1024)
    interpolation: Interpolation


class PreprocessingConfig(pydantic.BaseModel):
    """How an encoded image becomes the network's input, where that is not as the backbone was trained.

    Attributes:
      image_size: side of the square input in pixels: a multiple of the backbone's stride of 32, or the backbone's own, which
        it is where left out.
      interpolation: with which images are resized; the backbone's own where left out.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    image_size: int | None = pydantic.Field(None, ge=32, le=1024)
    interpolation: Interpolation | None = None

    def resolve(self, backbone: Callable[[], InputSpec]) -> InputSpec:
        """Fills in what was left out.

        Args:
          backbone: gives what the backbone was trained with; only called where something is left out, as it may load a model.
        """
        given = self.model_dump(exclude_none=True)
        if len(given) < len(InputSpec.model_fields):
            given = backbone().model_dump() | given
        return InputSpec(**given)


def decode_image(encoded: tf.Tensor, *, image_size: int, interpolation: Interpolation = "bicubic") -> tf.Tensor:
    """Decodes one image and resizes it to a square.

    Antialiased, as the backbones' own preprocessing was; the aspect ratio is not kept.

    Args:
      encoded: string []; JPEG, PNG, BMP or GIF (its first frame).
      image_size: side of the output, in pixels.
      interpolation: of the resizing.

    Returns:
      float32 [image_size, image_size, 3]; RGB in [0, 255].

    Raises:
      tf.errors.InvalidArgumentError: when run, if the bytes are no image.

    Source: the EfficientNet-Lite preprocessing,
      https://github.com/tensorflow/tpu/blob/master/models/official/efficientnet/preprocessing.py
    """
    image = tf.io.decode_image(encoded, channels=NUM_CHANNELS, expand_animations=False)
    size = tf.constant((image_size, image_size))

    def resize() -> tf.Tensor:
        resized = tf.image.resize(image, size, method=interpolation, antialias=True)
        return tf.clip_by_value(resized, 0.0, 255.0)  # bicubic overshoots at edges

    fits = tf.reduce_all(tf.shape(image)[:2] == size)
    resized = tf.cond(fits, lambda: tf.cast(image, tf.float32), resize)
    return tf.ensure_shape(resized, (image_size, image_size, NUM_CHANNELS))


def decode_images(encoded: tf.Tensor, *, image_size: int, interpolation: Interpolation = "bicubic") -> tf.Tensor:
    """Decodes a batch of images.

    Args:
      encoded: string [batch]; encoded images of any sizes.
      image_size: side of the output, in pixels.
      interpolation: of the resizing.

    Returns:
      float32 [batch, image_size, image_size, 3]; RGB in [0, 255].

    Raises:
      tf.errors.InvalidArgumentError: when run, if one of them is no image.
    """
    return tf.map_fn(
        lambda image: decode_image(image, image_size=image_size, interpolation=interpolation),
        encoded,
        fn_output_signature=tf.TensorSpec((image_size, image_size, NUM_CHANNELS), tf.float32),
    )
