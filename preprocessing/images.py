"""The one definition of decode and resize, shared by training, evaluation, serving and explanations. Pure TensorFlow."""

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
      image_size: side of the square input in pixels, a multiple of the backbone's stride of 32; the backbone's own where left
        out.
      interpolation: with which images are resized; the backbone's own where left out.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    image_size: int | None = pydantic.Field(None, ge=32, le=1024)
    interpolation: Interpolation | None = None

    @pydantic.field_validator("image_size")
    @classmethod
    def _fit_the_stride(cls, image_size: int | None) -> int | None:
        if image_size is not None and image_size % 32:
            lower = image_size // 32 * 32
            raise ValueError(
                "Expected `image_size` to be a multiple of 32, the backbone's stride. "
                f"Received: image_size={image_size}. Use {lower} or {lower + 32}."
            )
        return image_size

    def resolve(self, backbone: InputSpec) -> InputSpec:
        """Fills in what was left out from what the backbone was trained with."""
        return InputSpec(
            image_size=self.image_size or backbone.image_size, interpolation=self.interpolation or backbone.interpolation
        )


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
