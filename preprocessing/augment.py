"""Random changes of images and batches, for training only. Pure TensorFlow and stateless.

Every random choice is a function of a seed that the caller passes in, so a run that was killed and resumed sees exactly the
images that it would have seen. Keras' preprocessing layers can't promise that: their random state lives in variables that
advance with every call, so what an image gets depends on the order of the calls, which a parallel `map` does not keep and a
resumed run doesn't repeat.

The trainer's input calls `augment_image` on single images, and `mix_batch` on what it batched. No function relies on
autograph, so wrap them with `tf.autograph.experimental.do_not_convert` in `Dataset.map`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import pydantic
import tensorflow as tf

from preprocessing.images import NUM_CHANNELS

# Training images from which `auto` takes the next strength. Few images are seen in few steps, in which a network does not get
# over strong changes; many are worth RandAugment and CutMix. Orders of magnitude, not measured: compare on your data.
MIN_IMAGES_MEDIUM = 1_000
MIN_IMAGES_STRONG = 20_000

MAX_CROP_ASPECT = 4 / 3  # of a crop, relative to the image's; the least is its inverse
ERASED_AREA = (0.02, 1 / 3)  # least and greatest share of the image
MAX_ERASED_ASPECT = 1 / 0.3
GREY = 127.0  # where a moved image leaves a gap; what the backbone's rescaling turns into 0
# TensorFlow would choose by device otherwise, so a CPU and a TPU would draw different numbers from one seed.
RANDOM_ALGORITHM = "philox"


class AugmentationConfig(pydantic.BaseModel):
    """How training images are changed at random. What is None comes from `strength`.

    Attributes:
      strength: `none`, `light`, `medium` or `strong`, or `auto`, which chooses by the number of training images.
      horizontal_flip: whether an image mirrored left to right keeps its class. `none` does without flips all the same.
      vertical_flip: whether an image mirrored top to bottom does. `none` does without flips all the same.
      min_crop_area: least share of the image's area that a random crop keeps, in (0, 1]; 1 crops nothing.
      color_jitter: greatest relative change of brightness, contrast and saturation, in [0, 1].
      rand_augment_ops: operations of RandAugment on each image.
      rand_augment_magnitude: their strength, in [0, 10].
      erasing: probability that a random rectangle is erased, in [0, 1].
      mixup: parameter of the Beta distribution that mixes two images; 0 mixes none.
      cutmix: parameter of the Beta distribution that pastes part of an image into another; 0 pastes none.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    strength: Literal["auto", "none", "light", "medium", "strong"] = "auto"
    horizontal_flip: bool = True
    vertical_flip: bool = False
    min_crop_area: float | None = pydantic.Field(None, gt=0, le=1)
    color_jitter: float | None = pydantic.Field(None, ge=0, le=1)
    rand_augment_ops: int | None = pydantic.Field(None, ge=0)
    rand_augment_magnitude: float | None = pydantic.Field(None, ge=0, le=10)
    erasing: float | None = pydantic.Field(None, ge=0, le=1)
    mixup: float | None = pydantic.Field(None, ge=0, allow_inf_nan=False)
    cutmix: float | None = pydantic.Field(None, ge=0, allow_inf_nan=False)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What is done to training images: the attributes of `AugmentationConfig`, all decided."""

    horizontal_flip: bool
    vertical_flip: bool
    min_crop_area: float
    color_jitter: float
    rand_augment_ops: int
    rand_augment_magnitude: float
    erasing: float
    mixup: float
    cutmix: float


# The flips aren't a matter of strength but of the data, so the configuration decides them.
STRENGTHS = {
    name: Augmentation(False, False, *values)
    for name, values in {
        #          crop, color, RandAugment, erasing, mixup, cutmix
        "none": (1.0, 0.0, 0, 0.0, 0.0, 0.0, 0.0),
        "light": (0.8, 0.1, 0, 0.0, 0.0, 0.0, 0.0),
        "medium": (0.7, 0.15, 0, 0.0, 0.0, 0.2, 0.0),
        "strong": (0.3, 0.2, 2, 7.0, 0.1, 0.3, 1.0),
    }.items()
}


def resolve_augmentation(config: AugmentationConfig, *, num_images: int) -> Augmentation:
    """Decides what the configuration leaves open.

    Args:
      config: explicit settings, which win over their strength.
      num_images: number of training images.

    Returns:
      The augmentation, with no setting left open.
    """
    strength = config.strength
    if strength == "auto":
        strength = "light"
        if num_images >= MIN_IMAGES_MEDIUM:
            strength = "medium"
        if num_images >= MIN_IMAGES_STRONG:
            strength = "strong"
    settings = config.model_dump(exclude={"strength", "horizontal_flip", "vertical_flip"}, exclude_none=True)
    augmentation = dataclasses.replace(
        STRENGTHS[strength],
        horizontal_flip=config.horizontal_flip and strength != "none",
        vertical_flip=config.vertical_flip and strength != "none",
        **settings,
    )
    if augmentation.rand_augment_ops and not STRENGTHS[strength].rand_augment_ops and config.rand_augment_magnitude is None:
        # The operations were asked for on top of a strength that has none, hence no magnitude either.
        magnitude = STRENGTHS["strong"].rand_augment_magnitude
        augmentation = dataclasses.replace(augmentation, rand_augment_magnitude=magnitude)
    return augmentation


def augment_image(image: tf.Tensor, augmentation: Augmentation, *, seed: tf.Tensor) -> tf.Tensor:
    """Changes one image at random: crop, flips, colours, RandAugment, erased rectangle, in this order.

    Each operation has its own share of the seed, so what one does to an image doesn't depend on which others are on.

    Args:
      image: float32 [height, width, 3]; RGB in [0, 255], of a shape known beforehand.
      augmentation: what to do; with everything off the image is returned as it is.
      seed: int32 [2]; the same seed changes the same image in the same way.

    Returns:
      float32 [height, width, 3]; RGB in [0, 255].

    Raises:
      ValueError: if the shape or the type is another.

    Sources:
      crop: Szegedy et al., "Going deeper with convolutions", https://arxiv.org/abs/1409.4842
      RandAugment: Cubuk et al., https://arxiv.org/abs/1909.13719
      erasing: Zhong et al., "Random erasing data augmentation", https://arxiv.org/abs/1708.04896
    """
    _check_images(image, name="image", shape="height, width")
    crop_seed, flip_seed, color_seed, rand_augment_seed, erase_seed = _split(seed, 5)
    augmented = image
    if augmentation.min_crop_area < 1:
        augmented = _crop(augmented, min_area=augmentation.min_crop_area, seed=crop_seed)
    is_mirrored, is_upside_down = tf.unstack(_uniform(flip_seed, (2,)) < 0.5)
    if augmentation.horizontal_flip:
        augmented = _apply_if(is_mirrored, lambda image: tf.reverse(image, axis=(1,)), augmented)
    if augmentation.vertical_flip:
        augmented = _apply_if(is_upside_down, lambda image: tf.reverse(image, axis=(0,)), augmented)
    if augmentation.color_jitter:
        jitter = augmentation.color_jitter
        brightness, contrast, saturation = tf.unstack(_uniform(color_seed, (3,), minval=1 - jitter, maxval=1 + jitter))
        augmented = _brightness(augmented, brightness)
        augmented = _contrast(augmented, contrast)
        augmented = _saturation(augmented, saturation)
    if augmentation.rand_augment_ops:
        augmented = _rand_augment(
            augmented,
            num_ops=augmentation.rand_augment_ops,
            level=augmentation.rand_augment_magnitude / 10,
            seed=rand_augment_seed,
        )
    if augmentation.erasing:
        augmented = _erase(augmented, probability=augmentation.erasing, seed=erase_seed)
    if augmented is image:
        return image
    # Some arithmetic above leaves the range by rounding.
    return tf.ensure_shape(tf.clip_by_value(augmented, 0.0, 255.0), image.shape)


def mix_batch(
    images: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor, augmentation: Augmentation, *, seed: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Mixes each image of a batch with another one, by mixup or by CutMix; where both are on, a coin decides for the batch.

    The share of an image that is kept is drawn once for the batch. Its partner is drawn by a permutation, so it may be the
    image itself, as in a batch of one.

    Args:
      images: float32 [batch, height, width, 3]; RGB in [0, 255], of a height and width known beforehand.
      targets: float32 [batch, classes]; one-hot or soft.
      weights: float32 [batch]; of each image in the loss.
      augmentation: the parameters; with both 0 the batch is returned as it is.
      seed: int32 [2]; the same seed mixes the same batch in the same way.

    Returns:
      The same three, in the same shapes and ranges, all mixed by the same shares.

    Raises:
      ValueError: if the images' shape or type is another.

    Sources:
      mixup: Zhang et al., https://arxiv.org/abs/1710.09412
      CutMix: Yun et al., https://arxiv.org/abs/1905.04899
    """
    _check_images(images, name="images", shape="batch, height, width")
    if not augmentation.mixup and not augmentation.cutmix:
        return images, targets, weights
    coin_seed, partner_seed, share_seed, box_seed = _split(seed, 4)
    partners = tf.argsort(_uniform(partner_seed, tf.shape(images)[:1]))
    other_images = tf.gather(images, partners)

    def mixup() -> tuple[tf.Tensor, tf.Tensor]:
        share = _beta(augmentation.mixup, seed=share_seed)
        return _blend(other_images, images, share), share

    def cutmix() -> tuple[tf.Tensor, tf.Tensor]:
        is_pasted = _cutmix_mask(images, share=_beta(augmentation.cutmix, seed=share_seed), seed=box_seed)
        # The rectangle has whole pixels and ends at the border, so the share drawn is not the one that was kept.
        share = 1 - tf.reduce_mean(tf.cast(is_pasted, tf.float32))
        return tf.where(is_pasted[..., tf.newaxis], other_images, images), share

    if augmentation.mixup and augmentation.cutmix:
        mixed_images, share = tf.cond(_uniform(coin_seed, ()) < 0.5, mixup, cutmix)
    else:
        mixed_images, share = mixup() if augmentation.mixup else cutmix()
    return (
        tf.ensure_shape(mixed_images, images.shape),
        tf.ensure_shape(share * targets + (1 - share) * tf.gather(targets, partners), targets.shape),
        tf.ensure_shape(share * weights + (1 - share) * tf.gather(weights, partners), weights.shape),
    )


def _check_images(images: tf.Tensor, *, name: str, shape: str) -> None:
    # A batch may be of any size; the last one of an epoch is smaller.
    rank = shape.count(",") + 2
    is_known = images.shape.rank == rank and images.shape[-3:].is_fully_defined() and images.shape[-1] == NUM_CHANNELS
    if not is_known or images.dtype != tf.float32:
        raise ValueError(
            f"Expected `{name}` to be float32 [{shape}, {NUM_CHANNELS}], of a height and width known beforehand. "
            f"Received: {name}.dtype={images.dtype.name}, {name}.shape={images.shape}. Decode with `decode_image` first."
        )


def _split(seed: tf.Tensor, num: int) -> list[tf.Tensor]:
    return tf.unstack(tf.random.split(seed, num=num, alg=RANDOM_ALGORITHM))


def _uniform(
    seed: tf.Tensor, shape: Sequence[int] | tf.Tensor, *, minval: float | tf.Tensor = 0.0, maxval: float | tf.Tensor = 1.0
) -> tf.Tensor:
    return tf.random.stateless_uniform(shape, seed, minval=minval, maxval=maxval, alg=RANDOM_ALGORITHM)


def _beta(parameter: float, *, seed: tf.Tensor) -> tf.Tensor:
    """Draws float32 [] from Beta(parameter, parameter), as the share of one of two Gamma variables in their sum.

    In logarithms, as with a small parameter both variables are usually too small for a float.

    Source: Marsaglia and Tsang, "A simple method for generating gamma variables" (section 6, parameters below 1),
      https://doi.org/10.1145/358407.358414
    """
    gamma_seed, power_seed = _split(seed, 2)
    gammas = tf.random.stateless_gamma((2,), gamma_seed, alpha=parameter + 1)
    powers = _uniform(power_seed, (2,), minval=1e-37)  # a 0 has no logarithm
    logarithms = tf.math.log(gammas) + tf.math.log(powers) / parameter
    return tf.sigmoid(logarithms[0] - logarithms[1])


def _apply_if(condition: tf.Tensor, change: Callable[[tf.Tensor], tf.Tensor], image: tf.Tensor) -> tf.Tensor:
    return tf.ensure_shape(tf.cond(condition, lambda: change(image), lambda: image), image.shape)


def _random_box(
    image: tf.Tensor, *, area: tuple[float, float], max_aspect: float, seed: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Draws a rectangle inside an image: its top, left, height and width, int32 [] in pixels.

    Its share of the image's area is uniform between the bounds, and the logarithm of its aspect ratio, relative to the
    image's, is uniform in what `max_aspect` and the image leave room for. Sides are rounded up.
    """
    height, width, _ = image.shape
    area_draw, aspect_draw, top_draw, left_draw = tf.unstack(_uniform(seed, (4,)))
    share = area[0] + (area[1] - area[0]) * area_draw
    # A box with this share fits if its aspect ratio is between the share and its inverse.
    log_aspect = tf.minimum(math.log(max_aspect), -tf.math.log(share)) * (2 * aspect_draw - 1)
    sides = tf.sqrt(share) * tf.exp(tf.stack((-log_aspect, log_aspect)) / 2) * (height, width)
    box_height, box_width = tf.unstack(tf.minimum(tf.cast(tf.math.ceil(sides), tf.int32), (height, width)))
    top = tf.cast(top_draw * tf.cast(height - box_height + 1, tf.float32), tf.int32)
    left = tf.cast(left_draw * tf.cast(width - box_width + 1, tf.float32), tf.int32)
    return top, left, box_height, box_width


def _crop(image: tf.Tensor, *, min_area: float, seed: tf.Tensor) -> tf.Tensor:
    top, left, height, width = _random_box(image, area=(min_area, 1.0), max_aspect=MAX_CROP_ASPECT, seed=seed)
    cropped = tf.slice(image, tf.stack((top, left, 0)), tf.stack((height, width, NUM_CHANNELS)))
    # It only ever grows, so there is nothing to antialias.
    return tf.image.resize(cropped, image.shape[:2], method="bilinear")


def _mask(image: tf.Tensor, top: tf.Tensor, left: tf.Tensor, bottom: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    """Returns bool [height, width] of an image [..., height, width, 3]: what is inside of a rectangle."""
    rows, columns = tf.range(image.shape[-3]), tf.range(image.shape[-2])
    is_row, is_column = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return is_row[:, tf.newaxis] & is_column[tf.newaxis]


def _erase(image: tf.Tensor, *, probability: float, seed: tf.Tensor) -> tf.Tensor:
    coin_seed, box_seed, noise_seed = _split(seed, 3)

    def erase(image: tf.Tensor) -> tf.Tensor:
        top, left, height, width = _random_box(image, area=ERASED_AREA, max_aspect=MAX_ERASED_ASPECT, seed=box_seed)
        is_erased = _mask(image, top, left, top + height, left + width)
        return tf.where(is_erased[..., tf.newaxis], _uniform(noise_seed, image.shape, maxval=255.0), image)

    return _apply_if(_uniform(coin_seed, ()) < probability, erase, image)


def _cutmix_mask(images: tf.Tensor, *, share: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Returns bool [height, width]: a rectangle with the image's proportions, cut off at its border as in the paper."""
    size = images.shape[1:3].as_list()
    half = tf.sqrt(1 - share) * size / 2
    center = _uniform(seed, (2,)) * size
    top, left = tf.unstack(tf.cast(tf.round(center - half), tf.int32))
    bottom, right = tf.unstack(tf.cast(tf.round(center + half), tf.int32))
    return _mask(images, top, left, bottom, right)


def _blend(start: tf.Tensor | float, end: tf.Tensor, factor: tf.Tensor | float) -> tf.Tensor:
    """Goes from `start` at factor 0 to `end` at 1, and beyond it, though not out of [0, 255]."""
    return tf.clip_by_value(start + factor * (end - start), 0.0, 255.0)


def _brightness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    return _blend(0.0, image, factor)


def _contrast(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    return _blend(tf.reduce_mean(tf.image.rgb_to_grayscale(image)), image, factor)


def _saturation(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    return _blend(tf.image.rgb_to_grayscale(image), image, factor)


def _sharpness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blends with a smoothed image, save for the border of one pixel, as Pillow does."""
    kernel = tf.constant((1.0, 1.0, 1.0, 1.0, 5.0, 1.0, 1.0, 1.0, 1.0), shape=(3, 3, 1, 1)) / 13
    kernel = tf.repeat(kernel, NUM_CHANNELS, axis=2)
    smooth = tf.nn.depthwise_conv2d(image[tf.newaxis], kernel, strides=(1, 1, 1, 1), padding="VALID")[0]
    detail = tf.pad(image[1:-1, 1:-1] - smooth, ((1, 1), (1, 1), (0, 0)))
    return _blend(image - detail, image, factor)


def _autocontrast(image: tf.Tensor) -> tf.Tensor:
    """Stretches each channel to [0, 255], unless it has a single value."""
    low, high = tf.reduce_min(image, axis=(0, 1)), tf.reduce_max(image, axis=(0, 1))
    return tf.where(high > low, (image - low) * tf.math.divide_no_nan(255.0, high - low), image)


def _equalize(image: tf.Tensor) -> tf.Tensor:
    """Makes each channel's histogram of 256 values flat, as Pillow does."""
    values = tf.cast(image, tf.int32) + tf.range(NUM_CHANNELS) * 256
    counts = tf.reshape(tf.math.bincount(tf.reshape(values, (-1,)), minlength=256 * NUM_CHANNELS), (NUM_CHANNELS, 256))
    last = tf.reduce_max(tf.where(counts > 0, tf.range(256), 0), axis=1)
    step = (image.shape[0] * image.shape[1] - tf.gather(counts, last, batch_dims=1)) // 255
    before = tf.cumsum(counts, axis=1, exclusive=True)
    table = tf.minimum((before + step[:, tf.newaxis] // 2) // tf.maximum(step, 1)[:, tf.newaxis], 255)
    equalized = tf.cast(tf.gather(tf.reshape(table, (-1,)), values), tf.float32)
    return tf.where(step > 0, equalized, image)


def _solarize(image: tf.Tensor, level: tf.Tensor) -> tf.Tensor:
    return tf.where(image < 256 * (1 - level), image, 255 - image)


def _posterize(image: tf.Tensor, level: tf.Tensor) -> tf.Tensor:
    """Leaves 8 to 4 bits of each value."""
    step = 2 ** tf.round(4 * level)
    return tf.floor(image / step) * step


def _warp(image: tf.Tensor, *, linear: Sequence[tf.Tensor | float], shift: Sequence[tf.Tensor | float] = (0, 0)) -> tf.Tensor:
    """Maps an image about its centre.

    Args:
      image: float32 [height, width, 3].
      linear: xx, xy, yx, yy of the matrix that takes a place in the output to the one in the input where it is read.
      shift: x and y that are added to it, in pixels.
    """
    xx, xy, yx, yy = (tf.cast(value, tf.float32) for value in linear)
    x, y = (image.shape[1] - 1) / 2, (image.shape[0] - 1) / 2
    transform = (xx, xy, x - xx * x - xy * y + shift[0], yx, yy, y - yx * x - yy * y + shift[1], 0.0, 0.0)
    warped = tf.raw_ops.ImageProjectiveTransformV3(
        images=image[tf.newaxis],
        transforms=tf.stack(transform)[tf.newaxis],
        output_shape=image.shape[:2],
        fill_value=GREY,
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )
    return warped[0]


def _rotate(image: tf.Tensor, level: tf.Tensor) -> tf.Tensor:
    """Turns by up to 30 degrees, counterclockwise where the level is positive."""
    sine, cosine = tf.sin(level * math.pi / 6), tf.cos(level * math.pi / 6)
    return _warp(image, linear=(cosine, -sine, sine, cosine))


# What each does to an image at a level in [-1, 1]: a tenth of RandAugment's magnitude, with a random sign where it has a
# direction. Ranges are the paper's; all grow from no change at 0, save for the first three, which have no level. Solarize
# and posterize also grow, as in timm, where the authors' own code weakens them.
RAND_AUGMENT_OPS: dict[str, Callable[[tf.Tensor, tf.Tensor], tf.Tensor]] = {
    "identity": lambda image, level: image,
    "autocontrast": lambda image, level: _autocontrast(image),
    "equalize": lambda image, level: _equalize(image),
    "rotate": _rotate,
    "solarize": lambda image, level: _solarize(image, tf.abs(level)),
    "color": lambda image, level: _saturation(image, 1 + 0.9 * level),
    "posterize": lambda image, level: _posterize(image, tf.abs(level)),
    "contrast": lambda image, level: _contrast(image, 1 + 0.9 * level),
    "brightness": lambda image, level: _brightness(image, 1 + 0.9 * level),
    "sharpness": lambda image, level: _sharpness(image, 1 + 0.9 * level),
    "shear_x": lambda image, level: _warp(image, linear=(1, 0.3 * level, 0, 1)),
    "shear_y": lambda image, level: _warp(image, linear=(1, 0, 0.3 * level, 1)),
    "translate_x": lambda image, level: _warp(image, linear=(1, 0, 0, 1), shift=(0.45 * level * image.shape[1], 0)),
    "translate_y": lambda image, level: _warp(image, linear=(1, 0, 0, 1), shift=(0, 0.45 * level * image.shape[0])),
}


def _rand_augment(image: tf.Tensor, *, num_ops: int, level: float, seed: tf.Tensor) -> tf.Tensor:
    for op_seed in _split(seed, num_ops):
        op_draw, sign_draw = tf.unstack(_uniform(op_seed, (2,)))
        signed_level = tf.where(sign_draw < 0.5, -level, level)
        branches = [functools.partial(change, image, signed_level) for change in RAND_AUGMENT_OPS.values()]
        changed = tf.switch_case(tf.cast(op_draw * len(branches), tf.int32), branches)
        image = tf.ensure_shape(changed, image.shape)
    return image
