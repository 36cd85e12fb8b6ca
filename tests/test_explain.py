from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASS_NAMES, TRANSFORM_IMAGE_SIZE
from PIL import Image

from data.errors import InputError
from models.classifier import ModelConfig, build_head, build_statistics, fit_projection, join
from models.explain import ExplainableModel, blurred, integrated_gradients, overlay
from models.signatures import ImageClassifier, export
from preprocessing.images import decode_images
from preprocessing.transform import TransformGraph

HEAD_SCALE = 2  # an untrained head is hardly moved by anything
SIZE = 28  # pixels; the baseline's blur has a standard deviation of one
WEIGHTS = np.linspace(-1, 1, SIZE * SIZE * 3).reshape(SIZE, SIZE, 3).astype(np.float32) / 1000


class _KnownFunctions(tf.Module):
    """Two functions in place of probabilities, whose attributions are known by hand."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def explain_preprocess(self, image_bytes):
        def decode(encoded):
            return tf.ensure_shape(tf.io.decode_png(encoded, channels=3), (SIZE, SIZE, 3))

        return {"images": tf.cast(tf.map_fn(decode, image_bytes, fn_output_signature=tf.uint8), tf.float32)}

    @tf.function(input_signature=[tf.TensorSpec([None, SIZE, SIZE, 3], tf.float32)])
    def explain_model(self, images):
        linear = tf.reduce_sum(images * WEIGHTS, axis=(1, 2, 3))
        product = images[:, 2, 3, 0] * images[:, 20, 9, 1]
        return {"probabilities": tf.stack([linear, product], axis=1)}


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> ExplainableModel:
    path = str(tmp_path_factory.mktemp("known") / "model")
    module = _KnownFunctions()
    signatures = {name: getattr(module, name).get_concrete_function() for name in ("explain_preprocess", "explain_model")}
    tf.saved_model.save(module, path, signatures=signatures)
    return ExplainableModel(path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, transform_graph, photograph) -> Path:
    """A whole classifier, exported as the trainer does; its head is random, and its answers differ from image to image."""
    config = ModelConfig(num_feature_maps=1, hidden_units=0)
    statistics = build_statistics(config, image_size=TRANSFORM_IMAGE_SIZE)
    photo = Image.open(photograph)
    parts = [
        photo.crop((x, y, x + 256, y + 256)).resize((TRANSFORM_IMAGE_SIZE, TRANSFORM_IMAGE_SIZE))
        for x in (0, 256)
        for y in (0, 150, 300)
    ]
    images = np.stack([np.asarray(part, np.float32) for part in parts])
    projection = fit_projection(np.asarray(statistics(images, training=False)), num_components=4)
    keras.utils.set_random_seed(4)
    head = build_head(config, num_components=4, num_classes=2)
    head.set_weights([HEAD_SCALE * weight for weight in head.get_weights()])
    classifier = join(statistics, projection, head)
    path = tmp_path_factory.mktemp("export") / "model"
    export(ImageClassifier(classifier, TransformGraph(transform_graph), CLASS_NAMES), str(path))
    return path


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def test_integrated_gradients_of_a_linear_function_are_its_weights_times_the_detail(known, noise, encode):
    image = noise.astype(np.float32)
    expected = (WEIGHTS * (image - blurred(image))).sum(axis=-1)

    for num_steps in (2, 7):
        found = integrated_gradients(known, encode(noise), 0, num_steps=num_steps)
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(expected).max() > 0.1


def test_integrated_gradients_of_a_product_share_it_between_its_two_factors(known, noise, encode):
    found = integrated_gradients(known, encode(noise), 1, num_steps=5)

    image = noise.astype(np.float32)
    baseline = blurred(image)
    (first, second), (first_before, second_before) = ((pixels[2, 3, 0], pixels[20, 9, 1]) for pixels in (image, baseline))
    # Each factor gets its own change, times the mean of the other along the straight way.
    assert found[2, 3] == pytest.approx((first - first_before) * (second + second_before) / 2, rel=1e-4)
    assert found[20, 9] == pytest.approx((second - second_before) * (first + first_before) / 2, rel=1e-4)
    assert np.count_nonzero(found) == 2
    assert found.sum() == pytest.approx(first * second - first_before * second_before, rel=1e-4)


def test_integrated_gradients_of_an_exported_model_add_up_to_the_change_of_the_probability(exported, photograph):
    model = ExplainableModel(str(exported))
    encoded = photograph.read_bytes()
    image = model.preprocess([encoded])[0]

    attributions = [integrated_gradients(model, encoded, index, num_steps=256) for index in (0, 1)]

    after, before = model.probabilities(np.stack([image, blurred(image)]))
    assert np.abs(after - before).max() > 0.5
    for index, attribution in enumerate(attributions):
        assert attribution.shape == (TRANSFORM_IMAGE_SIZE, TRANSFORM_IMAGE_SIZE)
        assert attribution.dtype == np.float32
        assert attribution.sum() == pytest.approx(after[index] - before[index], abs=0.05)
    np.testing.assert_allclose(attributions[0], -attributions[1], atol=1e-4)  # two probabilities that sum to one


def test_gradients_of_an_exported_model_are_those_of_small_changes(exported, photograph):
    model = ExplainableModel(str(exported))
    image = model.preprocess([photograph.read_bytes()])[0]

    gradient = model.gradients(image[np.newaxis], 1)[0]

    direction = gradient / np.linalg.norm(gradient)
    higher, lower = model.probabilities(np.stack([image + direction, image - direction]))[:, 1]
    assert np.linalg.norm(gradient) == pytest.approx((higher - lower) / 2, rel=0.05)


def test_preprocess_is_that_of_serving(exported, photograph):
    encoded = photograph.read_bytes()

    images = ExplainableModel(str(exported)).preprocess([encoded, encoded])

    np.testing.assert_allclose(images[1], decode_images(tf.constant([encoded]), image_size=TRANSFORM_IMAGE_SIZE)[0], atol=1e-3)
    assert images.shape == (2, TRANSFORM_IMAGE_SIZE, TRANSFORM_IMAGE_SIZE, 3)


def test_explainable_model_refuses_what_is_no_such_model(tmp_path):
    with pytest.raises(InputError, match=r"Expected a SavedModel with .* Received: '.*nowhere', which cannot be loaded"):
        ExplainableModel(str(tmp_path / "nowhere"))
    (tmp_path / "saved_model.pb").write_bytes(b"no model")
    with pytest.raises(InputError, match="which cannot be loaded"):
        ExplainableModel(str(tmp_path))
    tf.saved_model.save(tf.Module(), str(tmp_path / "bare"))
    with pytest.raises(InputError, match=r"Received: '.*bare' with none\. Take the folder"):
        ExplainableModel(str(tmp_path / "bare"))


def test_integrated_gradients_refuse_a_class_and_steps_that_there_are_not(known, noise, encode):
    for class_index in (-1, 2):
        with pytest.raises(ValueError, match=rf"Expected `class_index` in \[0, 2\)\. Received: class_index={class_index}"):
            integrated_gradients(known, encode(noise), class_index)
    with pytest.raises(ValueError, match="Received: num_steps=1"):
        integrated_gradients(known, encode(noise), 0, num_steps=1)


def test_overlay_colours_what_speaks_for_and_against_and_stretches_it():
    attribution = np.zeros((112, 112), np.float32)
    attribution[20:36, 20:36], attribution[76:92, 76:92] = 3e-4, -3e-4

    drawn = np.asarray(overlay(Image.new("RGB", (160, 80), (90, 90, 90)), attribution)).astype(int)

    assert drawn.shape == (80, 160, 3)
    red, _, blue = drawn[20, 40]
    assert red > blue + 90  # orange: up left, at a quarter of the height and of the width
    red, _, blue = drawn[60, 120]
    assert blue > red + 90
    np.testing.assert_array_equal(drawn[60, 30], (90, 90, 90))


def test_overlay_of_nothing_leaves_the_image_grey():
    drawn = overlay(Image.new("RGB", (9, 7), (255, 0, 0)), np.zeros((32, 32), np.float32))

    assert drawn.size == (9, 7)
    assert len(set(drawn.getpixel((4, 3)))) == 1


def test_overlay_refuses_what_is_not_finite():
    with pytest.raises(ValueError, match="Expected an attribution of finite values"):
        overlay(Image.new("RGB", (9, 7)), np.full((32, 32), np.nan, np.float32))
