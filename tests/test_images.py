import re

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from data.errors import InputError, validate
from preprocessing.images import InputSpec, PreprocessingConfig, decode_image, decode_images


def _decode_eagerly(encoded: bytes, image_size: int) -> np.ndarray:
    return decode_image(tf.constant(encoded), image_size=image_size).numpy()


def _decode_in_tf_data(encoded: bytes, image_size: int) -> np.ndarray:
    dataset = tf.data.Dataset.from_tensors(encoded).map(lambda image: decode_image(image, image_size=image_size))
    return next(iter(dataset)).numpy()


both_ways = pytest.mark.parametrize("decode", [_decode_eagerly, _decode_in_tf_data])


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)


@both_ways
@pytest.mark.parametrize("image_format", ["PNG", "BMP"])
def test_decode_image_leaves_an_image_that_fits_as_it_is(decode, encode, noise, image_format):
    image = decode(encode(noise, image_format), 32)

    assert image.dtype == np.float32
    assert image.shape == (32, 32, 3)
    np.testing.assert_allclose(image, noise, atol=1e-3)


@both_ways
def test_decode_image_repeats_a_grey_image_in_three_channels(decode, encode, noise):
    image = decode(encode(noise[..., 0]), 32)

    np.testing.assert_allclose(image, np.repeat(noise[..., :1], 3, axis=-1), atol=1e-3)


@both_ways
def test_decode_image_looks_a_palette_up(decode, encode, noise):
    palette = Image.fromarray(noise).quantize(16)

    np.testing.assert_allclose(decode(encode(palette), 32), np.asarray(palette.convert("RGB")), atol=1e-3)


@both_ways
def test_decode_image_leaves_the_alpha_channel_out(decode, encode, noise):
    alpha = np.full((32, 32, 1), 100, np.uint8)

    np.testing.assert_allclose(decode(encode(np.concatenate([noise, alpha], -1)), 32), noise, atol=1e-3)


@both_ways
def test_decode_image_reads_a_progressive_jpeg_like_a_plain_one(decode, encode, photograph):
    picture = Image.open(photograph)
    plain = encode(picture, "JPEG", quality=90)
    progressive = encode(picture, "JPEG", quality=90, progressive=True)
    assert plain != progressive

    np.testing.assert_array_equal(decode(progressive, 64), decode(plain, 64))


@both_ways
def test_decode_image_takes_the_first_frame_of_a_gif(decode, encode):
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))

    image = decode(encode(red, "GIF", save_all=True, append_images=[blue]), 32)

    np.testing.assert_allclose(image, np.broadcast_to([255.0, 0.0, 0.0], (32, 32, 3)), atol=1e-3)


@both_ways
def test_decode_image_resizes_a_photograph_like_pillow(decode, encode, photograph):
    # As a PNG, so that the resize alone is compared: JPEG decoders differ by a few levels.
    picture = Image.open(photograph)
    expected = np.asarray(picture.resize((96, 96), Image.Resampling.BICUBIC), np.float32)

    difference = np.abs(decode(encode(picture), 96) - expected)

    # Pillow's bicubic filter is antialiased too; it rounds and clips after each of its two passes.
    assert difference.mean() < 0.5
    assert difference.max() < 5


@both_ways
def test_decode_image_is_antialiased(decode, encode):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255

    image = decode(encode(stripes), 32)

    # Without a filter every output pixel would fall on a black or a white stripe.
    np.testing.assert_allclose(image[:, 2:-2], 127.5, atol=1.0)


@both_ways
def test_decode_image_keeps_the_sides_of_a_wide_image_and_stays_in_range(decode, encode):
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, :8, 0] = 255
    wide[:, 8:, 2] = 255

    image = decode(encode(wide), 64)

    np.testing.assert_allclose(image[:, :20], np.broadcast_to([255.0, 0.0, 0.0], (64, 20, 3)), atol=1e-3)
    np.testing.assert_allclose(image[:, -20:], np.broadcast_to([0.0, 0.0, 255.0], (64, 20, 3)), atol=1e-3)
    assert image.min() == 0.0
    assert image.max() == 255.0


@both_ways
@pytest.mark.parametrize("encoded", [b"", b"this is no image", b"\x89PNG\r\n\x1a\n"])
def test_decode_image_refuses_what_is_no_image(decode, encoded):
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode(encoded, 32)


def test_decode_image_does_the_same_eagerly_and_in_tf_data(photograph):
    encoded = photograph.read_bytes()

    np.testing.assert_array_equal(_decode_eagerly(encoded, 64), _decode_in_tf_data(encoded, 64))


def test_decode_images_decodes_each_image_of_a_batch(encode, noise, photograph):
    batch = [encode(noise), photograph.read_bytes(), encode(noise[:8, :20], "JPEG")]

    images = decode_images(tf.constant(batch), image_size=32)

    assert images.shape == (3, 32, 32, 3)
    for image, encoded in zip(images, batch, strict=True):
        np.testing.assert_array_equal(image, _decode_eagerly(encoded, 32))


def test_decode_images_knows_its_shape_before_it_runs():
    dataset = tf.data.Dataset.from_tensors([b""]).map(lambda batch: decode_images(batch, image_size=32))

    assert dataset.element_spec.shape[1:] == (32, 32, 3)
    assert dataset.element_spec.dtype == tf.float32


def test_decode_images_takes_an_empty_batch():
    assert decode_images(tf.constant([], tf.string), image_size=32).shape == (0, 32, 32, 3)


def test_decode_images_refuses_a_batch_with_one_bad_image(encode, noise):
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode_images(tf.constant([encode(noise), b"no image"]), image_size=32)


def test_preprocessing_config_explains_a_wrong_size():
    message = "Expected `image_size` to be valid. Received: image_size=16. Input should be greater than or equal to 32."

    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        validate(PreprocessingConfig, {"image_size": 16})


@pytest.mark.parametrize(
    ("given", "size", "interpolation"),
    [({}, 240, "bicubic"), ({"image_size": 64}, 64, "bicubic"), ({"interpolation": "bilinear"}, 240, "bilinear")],
)
def test_preprocessing_config_fills_in_what_is_left_out_from_the_backbone(given, size, interpolation):
    spec = PreprocessingConfig(**given).resolve(lambda: InputSpec(image_size=240, interpolation="bicubic"))

    assert spec == InputSpec(image_size=size, interpolation=interpolation)


def test_preprocessing_config_that_says_all_does_not_ask_the_backbone():
    def fail():
        raise AssertionError

    spec = PreprocessingConfig(image_size=64, interpolation="bilinear").resolve(fail)

    assert spec == InputSpec(image_size=64, interpolation="bilinear")
