import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps

from data.errors import InputError, validate
from preprocessing.augment import (
    ERASED_AREA,
    GREY,
    MAX_CROP_ASPECT,
    MAX_ERASED_ASPECT,
    MIN_IMAGES_MEDIUM,
    MIN_IMAGES_STRONG,
    RAND_AUGMENT_OPS,
    STRENGTHS,
    Augmentation,
    AugmentationConfig,
    augment_image,
    mix_batch,
    resolve_augmentation,
)

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]
OFF = Augmentation(
    horizontal_flip=False,
    vertical_flip=False,
    min_crop_area=1.0,
    color_jitter=0.0,
    rand_augment_ops=0,
    rand_augment_magnitude=0.0,
    erasing=0.0,
    mixup=0.0,
    cutmix=0.0,
)
IMAGE_SETTINGS = {
    "crop": {"min_crop_area": 0.3},
    "horizontal_flip": {"horizontal_flip": True},
    "vertical_flip": {"vertical_flip": True},
    "color_jitter": {"color_jitter": 0.5},
    "rand_augment": {"rand_augment_ops": 1, "rand_augment_magnitude": 10.0},
    "erasing": {"erasing": 0.8},
}
IMAGE_SETTINGS["everything"] = {name: value for settings in IMAGE_SETTINGS.values() for name, value in settings.items()}
each_setting = pytest.mark.parametrize("setting", IMAGE_SETTINGS)
NUM_SEEDS = 40


def _on(**settings) -> Augmentation:
    return dataclasses.replace(OFF, **settings)


def _augment_eagerly(image: np.ndarray, augmentation: Augmentation, num_seeds: int) -> np.ndarray:
    seeds = [tf.constant((number, 7)) for number in range(num_seeds)]
    return np.stack([augment_image(tf.constant(image), augmentation, seed=seed).numpy() for seed in seeds])


def _in_tf_data(image: np.ndarray, augmentation: Augmentation, num_seeds: int) -> tf.data.Dataset:
    @tf.autograph.experimental.do_not_convert
    def augment(number: tf.Tensor) -> tf.Tensor:
        seed = tf.stack((tf.cast(number, tf.int32), 7))
        return augment_image(tf.constant(image), augmentation, seed=seed)

    return tf.data.Dataset.range(num_seeds).map(augment)


def _augment_in_tf_data(image: np.ndarray, augmentation: Augmentation, num_seeds: int) -> np.ndarray:
    return np.stack(list(_in_tf_data(image, augmentation, num_seeds).as_numpy_iterator()))


def _mix_eagerly(batch: Batch, augmentation: Augmentation, seeds: Sequence[int]) -> list[list[np.ndarray]]:
    tensors = [tf.constant(array) for array in batch]
    mixed = [mix_batch(*tensors, augmentation, seed=tf.constant((seed, 7))) for seed in seeds]
    return [[tensor.numpy() for tensor in tensors] for tensors in mixed]


def _mix_in_tf_data(batch: Batch, augmentation: Augmentation, seeds: Sequence[int]) -> list[list[np.ndarray]]:
    @tf.autograph.experimental.do_not_convert
    def mix(seed: tf.Tensor, tensors: tuple[tf.Tensor, ...]) -> tuple[tf.Tensor, ...]:
        return mix_batch(*tensors, augmentation, seed=tf.stack((seed, 7)))

    # Batched here, so that the batch's size isn't known beforehand, as in training.
    batches = tf.data.Dataset.from_tensor_slices(batch).batch(100).repeat()
    seeds = tf.data.Dataset.from_tensor_slices(np.array(seeds, np.int32))
    return [list(mixed) for mixed in tf.data.Dataset.zip((seeds, batches)).map(mix).as_numpy_iterator()]


both_ways = pytest.mark.parametrize("mix", [_mix_eagerly, _mix_in_tf_data])


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 24, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def ramp() -> np.ndarray:
    """An image of 40 by 60 that says where each pixel comes from: its row in red and its column in green."""
    rows, columns = np.meshgrid(np.arange(40), np.arange(60), indexing="ij")
    return np.stack((rows, columns, np.zeros_like(rows)), axis=-1).astype(np.float32)


@pytest.fixture(scope="module")
def picture(photograph) -> Image.Image:
    # Of little contrast, so that none of the operations leaves it as it is.
    small = np.asarray(Image.open(photograph).resize((48, 56)), np.float32)
    return Image.fromarray((40 + 0.7 * small).astype(np.uint8))


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Six images, each of a single value of its own, so that a mixed pixel says what it was mixed of."""
    values = np.array((0, 40, 80, 120, 160, 240), np.float32)
    images = np.broadcast_to(values[:, np.newaxis, np.newaxis, np.newaxis], (6, 16, 10, 3)).copy()
    return images, np.eye(6, dtype=np.float32), np.array((1, 2, 3, 4, 5, 6), np.float32)


def _apply(name: str, image: Image.Image | np.ndarray, level: float) -> np.ndarray:
    changed = RAND_AUGMENT_OPS[name](tf.constant(np.asarray(image, np.float32)), tf.constant(level, tf.float32))
    return changed.numpy()


@pytest.fixture(scope="module")
def datasets(noise) -> dict[str, tf.data.Dataset]:
    """For each of `IMAGE_SETTINGS`, the noise changed by one seed after the other; made once, as tracing takes the time."""
    return {name: _in_tf_data(noise, _on(**settings), NUM_SEEDS) for name, settings in IMAGE_SETTINGS.items()}


@each_setting
def test_augment_image_does_the_same_eagerly_and_in_tf_data(noise, datasets, setting):
    eagerly = _augment_eagerly(noise, _on(**IMAGE_SETTINGS[setting]), 6)

    np.testing.assert_allclose(eagerly, list(datasets[setting].take(6).as_numpy_iterator()), atol=1e-2)


@each_setting
def test_augment_image_depends_on_the_seed_alone(datasets, setting):
    images = list(datasets[setting].as_numpy_iterator())

    # As a run that is resumed from its sixth image.
    np.testing.assert_array_equal(list(datasets[setting].skip(5).as_numpy_iterator()), images[5:])
    assert len({image.tobytes() for image in images}) > 1


@each_setting
def test_augment_image_keeps_shape_type_and_range(datasets, setting):
    assert datasets[setting].element_spec == tf.TensorSpec((20, 24, 3), tf.float32)

    images = np.stack(list(datasets[setting].as_numpy_iterator()))

    assert images.shape == (NUM_SEEDS, 20, 24, 3)
    assert images.min() >= 0
    assert images.max() <= 255
    assert np.ptp(images) > 200  # values in [0, 1] would pass otherwise


def test_augment_image_keeps_the_range_in_spite_of_rounding():
    image = np.zeros((4, 4, 3), np.float32)
    image[:2] = 21
    assert _apply("autocontrast", image, 0.0).max() > 255  # 21 * (255 / 21), in float32

    images = _augment_eagerly(image, _on(rand_augment_ops=1, rand_augment_magnitude=5.0), 40)

    assert images.max() == 255
    assert any(np.array_equal(changed, image / 21 * 255) for changed in images)


def test_augment_image_with_everything_off_changes_nothing(noise):
    image = tf.constant(noise)

    assert augment_image(image, OFF, seed=tf.constant((1, 2))) is image


@pytest.mark.parametrize(("setting", "axis"), [("horizontal_flip", 1), ("vertical_flip", 0)])
def test_augment_image_flips_every_other_image(noise, setting, axis):
    images = _augment_in_tf_data(noise, _on(**{setting: True}), NUM_SEEDS)

    is_flipped = [np.array_equal(image, np.flip(noise, axis)) for image in images]
    is_kept = [np.array_equal(image, noise) for image in images]
    assert sum(is_flipped) + sum(is_kept) == NUM_SEEDS
    assert NUM_SEEDS / 4 < sum(is_flipped) < NUM_SEEDS * 3 / 4


def test_augment_image_flips_both_ways_independently(noise):
    images = _augment_in_tf_data(noise, _on(horizontal_flip=True, vertical_flip=True), NUM_SEEDS)

    expected = {noise[::down, ::right].tobytes() for down in (1, -1) for right in (1, -1)}
    assert {image.tobytes() for image in images} == expected


@pytest.mark.parametrize("min_area", [0.1, 0.5, 0.9])
def test_augment_image_crops_boxes_of_the_area_and_aspect_asked_for(ramp, min_area):
    images = _augment_in_tf_data(ramp, _on(min_crop_area=min_area), 5 * NUM_SEEDS)

    # The crop only grows, so its outermost pixels stay as they are.
    (tops, bottoms), (lefts, rights) = ((images[:, 0, 0, axis], images[:, -1, -1, axis]) for axis in (0, 1))
    heights, widths = bottoms - tops + 1, rights - lefts + 1
    areas = heights * widths / (40 * 60)
    assert min_area <= areas.min() < min_area + (1 - min_area) / 4
    assert areas.max() > 1 - (1 - min_area) / 4
    log_aspects = np.log((widths / 60) / (heights / 40))
    rounding = math.log((1 + 1 / heights.min()) * (1 + 1 / widths.min()))
    assert np.abs(log_aspects).max() < math.log(MAX_CROP_ASPECT) + rounding
    assert log_aspects.min() < 0 < log_aspects.max()
    # Crops come from everywhere.
    assert tops[heights < 40].min() == lefts[widths < 60].min() == 0
    assert bottoms[heights < 40].max() == 39
    assert rights[widths < 60].max() == 59
    # In between, the ramp is still a ramp.
    middles = images[:, 20, 30]
    np.testing.assert_allclose(middles[:, 0], tops + 20.5 * heights / 40 - 0.5, atol=1e-3)
    np.testing.assert_allclose(middles[:, 1], lefts + 30.5 * widths / 60 - 0.5, atol=1e-3)


def test_augment_image_with_a_crop_of_everything_changes_nothing(noise):
    # Through the crop's own arithmetic: the setting of 1 leaves the crop out.
    image = _augment_eagerly(noise, _on(min_crop_area=math.nextafter(1, 0)), 1)[0]

    np.testing.assert_allclose(image, noise, atol=1e-3)
    np.testing.assert_array_equal(_augment_eagerly(noise, _on(min_crop_area=1.0), 1)[0], noise)


def test_augment_image_jitters_brightness_within_bounds():
    grey = np.full((4, 4, 3), 100, np.float32)  # neither contrast nor saturation to change

    values = _augment_in_tf_data(grey, _on(color_jitter=0.2), 5 * NUM_SEEDS)[:, 0, 0, 0]

    assert 80 <= values.min() < 85
    assert 115 < values.max() <= 120.001


def test_augment_image_jitters_contrast_within_bounds():
    image = np.zeros((2, 2, 3), np.float32)
    image[0] += 110
    image[1] += 90

    images = _augment_in_tf_data(image, _on(color_jitter=0.2), 5 * NUM_SEEDS)

    contrasts = (images[:, 0, 0, 0] - images[:, 1, 0, 0]) / images.mean(axis=(1, 2, 3)) / 0.2
    assert 0.799 <= contrasts.min() < 0.85
    assert 1.15 < contrasts.max() <= 1.201


def test_augment_image_jitters_saturation_within_bounds():
    image = np.broadcast_to(np.array((120, 100, 80), np.float32), (2, 2, 3)).copy()

    pixels = _augment_in_tf_data(image, _on(color_jitter=0.2), 5 * NUM_SEEDS)[:, 0, 0]

    # Of one colour, so contrast changes its saturation too; the product of both has these bounds.
    luma = np.array((0.2989, 0.587, 0.114))
    saturations = (pixels[:, 0] - pixels[:, 2]) / (pixels @ luma) / (40 / (image[0, 0] @ luma))
    assert 0.639 <= saturations.min() < 0.75
    assert 1.3 < saturations.max() <= 1.441


def test_augment_image_erases_a_rectangle_of_noise():
    images = _augment_in_tf_data(np.full((40, 60, 3), 77.25, np.float32), _on(erasing=1.0), 3 * NUM_SEEDS)

    is_erased = (images != 77.25).any(axis=-1)
    areas = []
    for mask, image in zip(is_erased, images, strict=True):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.all()
        assert np.ptp(image[mask]) > 100
        height, width = box.shape
        areas.append(box.size / mask.size)
        rounding = (1 + 1 / height) * (1 + 1 / width)
        assert ERASED_AREA[0] <= areas[-1] < ERASED_AREA[1] * rounding
        assert 1 / MAX_ERASED_ASPECT / rounding < (width / 60) / (height / 40) < MAX_ERASED_ASPECT * rounding
    assert min(areas) < 0.08
    assert max(areas) > 0.28
    # All over the image, up to its borders.
    is_ever_erased = is_erased.any(axis=0)
    assert is_ever_erased.mean() > 0.95
    assert is_ever_erased.any(axis=1).all()
    assert is_ever_erased.any(axis=0).all()


def test_augment_image_erases_as_often_as_asked(noise):
    images = _augment_in_tf_data(noise, _on(erasing=0.25), 10 * NUM_SEEDS)

    share = np.mean([not np.array_equal(image, noise) for image in images])
    assert 0.18 < share < 0.32


def test_augment_image_draws_each_operation_apart(noise):
    # Else a run with one operation more would differ from the one before in all of them.
    mirrored = _augment_eagerly(noise, _on(horizontal_flip=True), 8)
    together = _augment_eagerly(noise, _on(horizontal_flip=True, erasing=1.0), 8)

    is_kept = (mirrored == together).all(axis=-1)
    assert is_kept.mean(axis=(1, 2)).min() > 0.6


@pytest.mark.parametrize(
    ("image", "received"),
    [
        (tf.zeros((8, 8, 3), tf.uint8), "image.dtype=uint8, image.shape=(8, 8, 3)"),
        (tf.zeros((8, 8, 1)), "image.dtype=float32, image.shape=(8, 8, 1)"),
        (tf.zeros((2, 8, 8, 3)), "image.dtype=float32, image.shape=(2, 8, 8, 3)"),
    ],
)
def test_augment_image_refuses_what_is_no_decoded_image(image, received):
    message = (
        "Expected `image` to be float32 [height, width, 3], of a height and width known beforehand. "
        f"Received: {received}. Decode with `decode_image` first."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        augment_image(image, OFF, seed=tf.constant((0, 0)))


def test_rand_augment_draws_every_operation_in_both_directions(picture):
    image = np.asarray(picture, np.float32)
    images = _augment_in_tf_data(image, _on(rand_augment_ops=1, rand_augment_magnitude=5.0), 5 * NUM_SEEDS)

    expected = {(name, sign): _apply(name, image, sign * 0.5) for name in RAND_AUGMENT_OPS for sign in (-1, 1)}
    drawn = [{key for key, candidate in expected.items() if np.allclose(changed, candidate, atol=1e-2)} for changed in images]
    assert all(drawn)
    assert set.union(*drawn) == set(expected)
    assert {name for (name, _), *others in drawn if not others} >= {"rotate", "color", "shear_x", "translate_y"}


def test_rand_augment_applies_as_many_operations_as_asked(picture):
    image = np.asarray(picture, np.float32)
    augmentation = _on(rand_augment_ops=2, rand_augment_magnitude=5.0)
    images = _augment_in_tf_data(image, augmentation, NUM_SEEDS)

    singles = [_apply(name, image, sign * 0.5) for name in RAND_AUGMENT_OPS for sign in (-1, 1)]
    is_single = [any(np.allclose(changed, single, atol=1e-2) for single in singles) for changed in images]
    assert np.mean(is_single) < 0.5  # one of the two is the identity in 27 of 196


@pytest.mark.parametrize("name", RAND_AUGMENT_OPS)
def test_rand_augment_ops_do_the_same_eagerly_and_in_tf_data(picture, name):
    image = np.asarray(picture, np.float32)
    change = tf.autograph.experimental.do_not_convert(lambda image: RAND_AUGMENT_OPS[name](image, tf.constant(0.6)))
    dataset = tf.data.Dataset.from_tensors(image).map(change)

    np.testing.assert_allclose(next(dataset.as_numpy_iterator()), _apply(name, image, 0.6), atol=1e-2)


@pytest.mark.parametrize("name", sorted(RAND_AUGMENT_OPS.keys() - {"autocontrast", "equalize"}))
def test_rand_augment_ops_at_level_0_change_nothing(picture, name):
    np.testing.assert_allclose(_apply(name, picture, 0.0), picture, atol=1e-2)


@pytest.mark.parametrize("name", sorted(RAND_AUGMENT_OPS.keys() - {"identity"}))
def test_rand_augment_ops_change_much_at_the_top(picture, name):
    image = np.asarray(picture, np.float32)

    assert np.abs(_apply(name, image, 1.0) - image).mean() > 3


@pytest.mark.parametrize(
    ("name", "enhance"),
    [
        ("color", ImageEnhance.Color),
        ("contrast", ImageEnhance.Contrast),
        ("brightness", ImageEnhance.Brightness),
        ("sharpness", ImageEnhance.Sharpness),
    ],
)
@pytest.mark.parametrize("level", [-1.0, -0.5, 0.5, 1.0])
def test_rand_augment_ops_enhance_like_pillow(picture, name, enhance, level):
    expected = np.asarray(enhance(picture).enhance(1 + 0.9 * level), np.float32)

    np.testing.assert_allclose(_apply(name, picture, level), expected, atol=2.0)  # Pillow rounds, between steps too


@pytest.mark.parametrize(
    ("name", "level", "pillow", "tolerance"),
    [
        ("autocontrast", 0.0, ImageOps.autocontrast, 1.0),
        ("equalize", 0.0, ImageOps.equalize, 0.0),
        ("solarize", 0.5, lambda image: ImageOps.solarize(image, 128), 0.0),
        ("solarize", -1.0, lambda image: ImageOps.solarize(image, 0), 0.0),
        ("posterize", 0.5, lambda image: ImageOps.posterize(image, 6), 0.0),
        ("posterize", -1.0, lambda image: ImageOps.posterize(image, 4), 0.0),
    ],
)
def test_rand_augment_ops_map_values_like_pillow(picture, name, level, pillow, tolerance):
    expected = np.asarray(pillow(picture), np.float32)
    assert not np.array_equal(expected, np.asarray(picture))

    np.testing.assert_allclose(_apply(name, picture, level), expected, atol=tolerance)


@pytest.mark.parametrize("name", ["autocontrast", "equalize"])
def test_rand_augment_ops_leave_an_image_of_one_value_as_it_is(name):
    image = np.full((8, 8, 3), 90, np.float32)

    np.testing.assert_array_equal(_apply(name, image, 1.0), image)


@pytest.mark.parametrize("level", [-1.0, 0.4, 1.0])
def test_rand_augment_rotates_like_pillow(picture, level):
    grey = (round(GREY),) * 3
    expected = np.asarray(picture.rotate(30 * level, Image.Resampling.BILINEAR, fillcolor=grey), np.float32)

    difference = np.abs(_apply("rotate", picture, level) - expected)[4:-4, 4:-4]

    # Pillow fills where we blend with the fill, so pixels at the turned image's edge differ.
    assert np.median(difference) < 1
    assert np.quantile(difference, 0.9) < 1.5


def test_rand_augment_rotates_about_the_centre():
    image = np.random.default_rng(1).integers(0, 256, (7, 7, 3)).astype(np.float32)

    np.testing.assert_allclose(_apply("rotate", image, 3.0), np.rot90(image), atol=1e-2)


def test_rand_augment_shears_about_the_centre():
    square = np.arange(75, dtype=np.float32).reshape(5, 5, 3)

    # At this level each row is moved by one pixel against the next.
    sheared_x, sheared_y = (_apply(name, square, 1 / 0.3) for name in ("shear_x", "shear_y"))

    expected = np.full_like(square, GREY)
    expected[0, 2:] = square[0, :3]
    expected[1, 1:] = square[1, :4]
    expected[2] = square[2]
    expected[3, :4] = square[3, 1:]
    expected[4, :3] = square[4, 2:]
    np.testing.assert_allclose(sheared_x, expected, atol=1e-2)
    # The same about the diagonal.
    expected = _apply("shear_x", square.transpose(1, 0, 2), 1 / 0.3).transpose(1, 0, 2)
    np.testing.assert_allclose(sheared_y, expected, atol=1e-2)


def test_rand_augment_translates_and_fills_with_grey():
    image = np.arange(20 * 40 * 3, dtype=np.float32).reshape(20, 40, 3) / 10

    left, down = _apply("translate_x", image, 0.5), _apply("translate_y", image, -1.0)

    np.testing.assert_allclose(left[:, :31], image[:, 9:], atol=1e-2)  # 0.5 * 0.45 * 40 pixels
    np.testing.assert_array_equal(left[:, 31:], GREY)
    np.testing.assert_allclose(down[9:], image[:11], atol=1e-2)  # 0.45 * 20 pixels
    np.testing.assert_array_equal(down[:9], GREY)


@both_ways
@pytest.mark.parametrize("parameter", [0.2, 1.0])
def test_mixup_is_the_convex_combination_with_one_partner(mix, batch, parameter):
    images, _, weights = batch

    mixed_images, mixed_targets, mixed_weights = mix(batch, _on(mixup=parameter), [3])[0]

    np.testing.assert_allclose(mixed_targets.sum(axis=1), 1, atol=1e-6)
    # The targets were one-hot, so they say who was mixed with whom, and how much.
    shares = mixed_targets.diagonal()
    is_other = (mixed_targets > 0) & ~np.eye(6, dtype=bool)
    assert (is_other.sum(axis=1) <= 1).all()
    assert is_other.any()
    assert len(np.unique(shares[is_other.any(axis=1)].round(5))) == 1
    assert 0 < shares.min() < 1
    expected = np.einsum("bp,phwc->bhwc", mixed_targets, images)
    np.testing.assert_allclose(mixed_images, expected, atol=1e-3)
    np.testing.assert_allclose(mixed_weights, mixed_targets @ weights, atol=1e-5)


@both_ways
def test_cutmix_pastes_one_rectangle_and_shares_by_its_pixels(mix, batch):
    images, _, weights = batch

    mixed_images, mixed_targets, mixed_weights = mix(batch, _on(cutmix=1.0), [3])[0]

    np.testing.assert_allclose(mixed_targets.sum(axis=1), 1, atol=1e-6)
    values = images[:, 0, 0, 0]
    num_mixed = 0
    for row, (image, target) in enumerate(zip(mixed_images, mixed_targets, strict=True)):
        # Every pixel is one of the six images', and the target is how many are whose.
        np.testing.assert_allclose([(image[..., 0] == value).mean() for value in values], target, atol=1e-6)
        is_pasted = image[..., 0] != values[row]
        if is_pasted.any():
            num_mixed += 1
            rows, columns = np.flatnonzero(is_pasted.any(axis=1)), np.flatnonzero(is_pasted.any(axis=0))
            assert is_pasted[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    assert num_mixed >= 2
    np.testing.assert_allclose(mixed_weights, mixed_targets @ weights, atol=1e-5)


def test_cutmix_pastes_from_the_same_place(batch):
    images = np.arange(6 * 16 * 10 * 3, dtype=np.float32).reshape(6, 16, 10, 3) / 12

    mixed_images, mixed_targets, _ = _mix_eagerly((images, *batch[1:]), _on(cutmix=1.0), [3])[0]

    for image, target in zip(mixed_images, mixed_targets, strict=True):
        is_whose = (image == images).all(axis=-1)
        np.testing.assert_allclose(is_whose.mean(axis=(1, 2))[target > 0], target[target > 0], atol=1e-6)


@both_ways
def test_mix_batch_chooses_mixup_or_cutmix_by_a_coin(mix, batch):
    values = set(batch[0][:, 0, 0, 0].tolist())
    num_mixup = num_cutmix = 0
    for images, _, _ in mix(batch, _on(mixup=1.0, cutmix=1.0), range(40)):
        is_uniform = (images == images[:, :1, :1]).all()
        num_cutmix += not is_uniform
        num_mixup += is_uniform and not set(images[:, 0, 0, 0].tolist()) <= values

    assert num_mixup + num_cutmix >= 37  # a tiny rectangle may paste nothing
    assert min(num_mixup, num_cutmix) >= 12


@pytest.mark.parametrize("settings", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_mix_batch_does_the_same_eagerly_and_in_tf_data(batch, settings):
    eagerly, in_tf_data = (mix(batch, _on(**settings), range(6)) for mix in (_mix_eagerly, _mix_in_tf_data))

    for one, other in zip(eagerly, in_tf_data, strict=True):
        for eager, graph in zip(one, other, strict=True):
            np.testing.assert_allclose(eager, graph, atol=1e-3)


def test_mix_batch_depends_on_the_seed(batch):
    first, again, other = (targets for _, targets, _ in _mix_eagerly(batch, _on(mixup=1.0), [1, 1, 2]))

    np.testing.assert_array_equal(first, again)
    assert abs(first.diagonal().min() - other.diagonal().min()) > 1e-3
    assert not np.array_equal(first > 0, other > 0)  # other partners, not only another share


@pytest.mark.parametrize("parameter", [1e-3, 0.2, 1.0, 8.0])
def test_mixup_draws_shares_of_a_beta_distribution(parameter):
    batch = (np.zeros((8, 1, 1, 3), np.float32), np.eye(8, dtype=np.float32), np.ones(8, np.float32))

    mixed = _mix_in_tf_data(batch, _on(mixup=parameter), range(600))

    # Images that are their own partners keep a target of 1; that all eight are is too rare to matter.
    shares = np.array([targets.diagonal().min() for _, targets, _ in mixed])
    assert np.isfinite(shares).all()
    assert abs(shares.mean() - 0.5) < 0.05
    variance = 1 / (4 * (2 * parameter + 1))
    assert abs(shares.var() / variance - 1) < 0.15


def test_cutmix_draws_shares_of_a_beta_distribution():
    batch = (np.zeros((8, 50, 50, 3), np.float32), np.eye(8, dtype=np.float32), np.ones(8, np.float32))

    mixed = _mix_in_tf_data(batch, _on(cutmix=1.0), range(200))

    # Of a rectangle with the share 1 - s of the image, its border leaves 1 - s/2 of each side at the most, where s is the
    # rectangle's side, and (1 - s/4) of it on average: the mean pasted share is that of (s * (1 - s/4))^2, s^2 uniform.
    pasted = 1 - np.array([targets.diagonal().min() for _, targets, _ in mixed])
    sides = np.sqrt(np.linspace(0, 1, 10_001))
    assert abs(pasted.mean() - np.mean((sides * (1 - sides / 4)) ** 2)) < 0.05


@both_ways
@pytest.mark.parametrize("settings", [{"mixup": 1.0}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0}])
def test_mix_batch_of_one_changes_nothing(mix, batch, settings):
    one = tuple(array[2:3] for array in batch)

    for mixed, original in zip(mix(one, _on(**settings), [5])[0], one, strict=True):
        np.testing.assert_allclose(mixed, original, atol=1e-3)


def test_mix_batch_with_both_off_changes_nothing(batch):
    tensors = [tf.constant(array) for array in batch]

    mixed = mix_batch(*tensors, OFF, seed=tf.constant((1, 2)))

    assert all(after is before for after, before in zip(mixed, tensors, strict=True))


@pytest.mark.parametrize("settings", [{"mixup": 1.0}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0}])
def test_mix_batch_knows_its_shapes_before_it_runs(batch, settings):
    mix = tf.autograph.experimental.do_not_convert(
        lambda *tensors: mix_batch(*tensors, _on(**settings), seed=tf.constant((1, 2)))
    )
    dataset = tf.data.Dataset.from_tensor_slices(batch).batch(6, drop_remainder=True)

    assert dataset.map(mix).element_spec == dataset.element_spec


def test_mix_batch_mixes_soft_targets(batch):
    images, _, weights = batch
    soft = np.full((6, 2), 0.5, np.float32)
    soft[:3] = 0.9, 0.1

    _, mixed, _ = _mix_eagerly((images, soft, weights), _on(mixup=1.0), [3])[0]

    _, pairs, _ = _mix_eagerly(batch, _on(mixup=1.0), [3])[0]
    np.testing.assert_allclose(mixed, pairs @ soft, atol=1e-6)


def test_mix_batch_refuses_a_single_image():
    message = "Expected `images` to be float32 [batch, height, width, 3], of a height and width known beforehand. Received: "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        mix_batch(tf.zeros((8, 8, 3)), tf.zeros((8, 2)), tf.zeros(8), OFF, seed=tf.constant((0, 0)))


@pytest.mark.parametrize(
    ("num_images", "strength"),
    [
        (1, "light"),
        (MIN_IMAGES_MEDIUM - 1, "light"),
        (MIN_IMAGES_MEDIUM, "medium"),
        (MIN_IMAGES_STRONG - 1, "medium"),
        (MIN_IMAGES_STRONG, "strong"),
        (10_000_000, "strong"),
    ],
)
def test_resolve_augmentation_chooses_by_the_number_of_images(num_images, strength):
    resolved = resolve_augmentation(AugmentationConfig(), num_images=num_images)

    assert resolved == resolve_augmentation(AugmentationConfig(strength=strength), num_images=1)
    assert resolved == dataclasses.replace(STRENGTHS[strength], horizontal_flip=True)


def test_resolve_augmentation_grows_with_the_strength():
    light, medium, strong = (
        resolve_augmentation(AugmentationConfig(strength=strength), num_images=1) for strength in ("light", "medium", "strong")
    )

    assert 1 > light.min_crop_area > medium.min_crop_area > strong.min_crop_area > 0
    assert (light.mixup, light.cutmix, light.rand_augment_ops) == (0, 0, 0)
    assert 0 < medium.mixup < strong.mixup
    assert (medium.cutmix, medium.rand_augment_ops) == (0, 0)
    assert min(strong.cutmix, strong.rand_augment_ops, strong.rand_augment_magnitude, strong.erasing) > 0


def test_resolve_augmentation_of_none_is_nothing():
    assert resolve_augmentation(AugmentationConfig(strength="none", vertical_flip=True), num_images=10**6) == OFF


@pytest.mark.parametrize("strength", ["auto", "none", "light", "medium", "strong"])
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("min_crop_area", 0.42),
        ("min_crop_area", 1.0),
        ("color_jitter", 0.0),
        ("rand_augment_ops", 0),
        ("rand_augment_ops", 5),
        ("rand_augment_magnitude", 3.0),
        ("erasing", 0.0),
        ("mixup", 0.0),
        ("cutmix", 0.7),
    ],
)
def test_resolve_augmentation_prefers_what_was_set(strength, setting, value):
    plain = resolve_augmentation(AugmentationConfig(strength=strength), num_images=1)

    resolved = resolve_augmentation(AugmentationConfig(strength=strength, **{setting: value}), num_images=1)

    assert getattr(resolved, setting) == value
    if setting != "rand_augment_ops":
        assert resolved == dataclasses.replace(plain, **{setting: value})


@pytest.mark.parametrize("strength", ["none", "light", "medium", "strong"])
def test_resolve_augmentation_gives_operations_a_magnitude(strength):
    config = AugmentationConfig(strength=strength, rand_augment_ops=1)

    assert resolve_augmentation(config, num_images=1).rand_augment_magnitude == 7
    config = config.model_copy(update={"rand_augment_magnitude": 0.0})
    assert resolve_augmentation(config, num_images=1).rand_augment_magnitude == 0


@pytest.mark.parametrize("horizontal", [False, True])
@pytest.mark.parametrize("vertical", [False, True])
def test_resolve_augmentation_flips_as_the_data_allows(horizontal, vertical):
    config = AugmentationConfig(horizontal_flip=horizontal, vertical_flip=vertical)

    resolved = resolve_augmentation(config, num_images=1)

    assert (resolved.horizontal_flip, resolved.vertical_flip) == (horizontal, vertical)


def test_augmentation_config_survives_json():
    config = AugmentationConfig(strength="strong", mixup=0.0, rand_augment_ops=1)

    assert AugmentationConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("strength", "heavy"),
        ("min_crop_area", 0.0),
        ("min_crop_area", 1.1),
        ("color_jitter", -0.1),
        ("color_jitter", 1.1),
        ("rand_augment_ops", -1),
        ("rand_augment_ops", 1.5),
        ("rand_augment_magnitude", -1.0),
        ("rand_augment_magnitude", 10.5),
        ("erasing", -0.1),
        ("erasing", 1.1),
        ("mixup", -0.1),
        ("min_crop_area", float("nan")),
        ("erasing", float("nan")),
        ("mixup", float("inf")),
        ("cutmix", float("inf")),
        ("cutmix", -0.1),
        ("cutmix", float("nan")),
        ("rotation", 10),
    ],
)
def test_augmentation_config_refuses_what_is_out_of_range(setting, value):
    with pytest.raises(InputError, match=f"^Expected `{setting}` to be valid. Received: {setting}={re.escape(repr(value))}. "):
        validate(AugmentationConfig, {setting: value})


@pytest.mark.parametrize(
    ("setting", "value"),
    [("min_crop_area", 1e-3), ("min_crop_area", 1), ("color_jitter", 1), ("rand_augment_magnitude", 10), ("erasing", 1)],
)
def test_augmentation_config_takes_the_bounds(setting, value):
    assert getattr(validate(AugmentationConfig, {setting: value}), setting) == value
