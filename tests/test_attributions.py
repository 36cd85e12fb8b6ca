import json
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASS_NAMES, TRANSFORM_IMAGE_SIZE
from PIL import Image
from two_objects import BLUE_BOX, RED_BOX, export_network, lies_on, make_picture

from data.errors import InputError
from models.attributions import (
    BLUR,
    METHODS,
    NOISE,
    blurred,
    explain,
    integrated_gradients,
    make_baseline,
)
from models.classifier import ModelConfig, build_head, build_statistics, fit_projection, join
from models.explainable import ExplainableModel
from models.signatures import ImageClassifier, export
from preprocessing.transform import TransformGraph

pytestmark = pytest.mark.one_stack

HEAD_SCALE = 2  # an untrained head is hardly moved by anything
SIZE = 28  # pixels; the baseline's blur has a standard deviation of one
WEIGHTS = np.linspace(-1, 1, SIZE * SIZE * 3).reshape(SIZE, SIZE, 3).astype(np.float32) / 1000
LINEAR, PRODUCT, CUBE = range(3)
PATH_METHODS = ("integrated_gradients", "guided_integrated_gradients", "blur_integrated_gradients")


class _KnownFunctions(tf.Module):
    """Functions in place of probabilities, whose attributions are known by hand."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def explain_preprocess(self, image_bytes):
        def decode(encoded):
            return tf.ensure_shape(tf.io.decode_png(encoded, channels=3), (SIZE, SIZE, 3))

        return {"images": tf.cast(tf.map_fn(decode, image_bytes, fn_output_signature=tf.uint8), tf.float32)}

    @tf.function(input_signature=[tf.TensorSpec([None, SIZE, SIZE, 3], tf.float32)])
    def explain_model(self, images):
        linear = tf.reduce_sum(images * WEIGHTS, axis=(1, 2, 3))
        product = images[:, 2, 3, 0] * images[:, 20, 9, 1]
        cube = (images[:, 4, 5, 2] / 100) ** 3
        return {"probabilities": tf.stack([linear, product, cube], axis=1)}

    @tf.function(input_signature=[tf.TensorSpec([None, SIZE, SIZE, 3], tf.float32)])
    def explain_feature_maps(self, images):
        return {"fine": images, "coarse": tf.nn.avg_pool2d(images, 2, 2, "VALID")}

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, SIZE // 2, SIZE // 2, 3], tf.float32, name="coarse"),
            tf.TensorSpec([None, SIZE, SIZE, 3], tf.float32, name="fine"),
        ]
    )
    def explain_head(self, coarse, fine):
        means = [tf.reduce_mean(maps, axis=(1, 2)) for maps in (fine, coarse)]
        first = 3 * means[0][:, 0] + 5 * means[1][:, 1] - 7 * means[1][:, 2]
        nothing = tf.zeros_like(first)
        # Infinitely far below the other, so that the logarithm of the odds of the first is its logit.
        logits = tf.stack([first, nothing, nothing - 1e9], axis=1)
        return {"logits": logits, "probabilities": tf.nn.softmax(logits)}


def _save(module: tf.Module, path: Path, names) -> ExplainableModel:
    tf.saved_model.save(module, str(path), signatures={name: getattr(module, name).get_concrete_function() for name in names})
    return ExplainableModel(str(path))


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> ExplainableModel:
    names = ("explain_preprocess", "explain_model", "explain_feature_maps", "explain_head")
    return _save(_KnownFunctions(), tmp_path_factory.mktemp("known") / "model", names)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, transform_graph, photograph) -> ExplainableModel:
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
    return ExplainableModel(str(path))


@pytest.fixture(scope="module")
def two_objects(tmp_path_factory) -> ExplainableModel:
    return ExplainableModel(str(export_network(tmp_path_factory.mktemp("two_objects") / "model")))


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def test_integrated_gradients_of_a_linear_function_are_its_weights_times_the_detail(known, noise, encode):
    image = noise.astype(np.float32)
    expected = (WEIGHTS * (image - blurred(image))).sum(axis=-1)

    for num_steps in (2, 7):
        found = integrated_gradients(known, encode(noise), LINEAR, num_steps=num_steps)
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize("method", ["integrated_gradients", "guided_integrated_gradients"])
@pytest.mark.parametrize("baseline", ["blurred", "black", "white", "mean"])
def test_explain_gives_a_linear_function_its_weights_times_the_change_by_any_way(known, noise, encode, method, baseline):
    found = explain(known, encode(noise), method=method, class_index=LINEAR, baseline=baseline, num_steps=9)

    image = noise.astype(np.float32)
    start = {"blurred": blurred(image), "black": 0 * image, "white": 0 * image + 255, "mean": image.mean(axis=(0, 1))}[baseline]
    np.testing.assert_allclose(found.attribution, WEIGHTS * (image - start), atol=1e-4)
    assert found.attribution.shape == (SIZE, SIZE, 3)
    assert found.attribution.dtype == np.float32
    assert found.baseline_probability == pytest.approx((WEIGHTS * np.broadcast_to(start, image.shape)).sum(), abs=1e-3)
    assert found.completeness_gap < 1e-3


def test_blur_integrated_gradients_of_a_linear_function_are_its_weights_times_the_detail(known, noise, encode):
    found = explain(known, encode(noise), method="blur_integrated_gradients", class_index=LINEAR, num_steps=400)

    image = noise.astype(np.float32)
    expected = WEIGHTS * (image - make_baseline(image, "blurred", method="blur_integrated_gradients"))
    # The way in small steps of blur, whose kernel grows by whole pixels, comes close to the change as a whole.
    np.testing.assert_allclose(found.attribution, expected, atol=0.05 * np.abs(expected).max())
    assert found.completeness_gap < 0.05 * np.abs(expected).sum()


def test_integrated_gradients_of_a_product_share_it_between_its_two_factors(known, noise, encode):
    found = integrated_gradients(known, encode(noise), PRODUCT, num_steps=5)

    image = noise.astype(np.float32)
    baseline = blurred(image)
    (first, second), (first_before, second_before) = ((pixels[2, 3, 0], pixels[20, 9, 1]) for pixels in (image, baseline))
    # Each factor gets its own change, times the mean of the other along the straight way.
    assert found[2, 3] == pytest.approx((first - first_before) * (second + second_before) / 2, rel=1e-4)
    assert found[20, 9] == pytest.approx((second - second_before) * (first + first_before) / 2, rel=1e-4)
    assert np.count_nonzero(found) == 2
    assert found.sum() == pytest.approx(first * second - first_before * second_before, rel=1e-4)


@pytest.mark.parametrize("method", PATH_METHODS)
def test_explain_finds_the_two_pixels_that_a_product_depends_on(known, noise, encode, method):
    found = explain(known, encode(noise), method=method, class_index=PRODUCT)

    assert {tuple(place) for place in np.argwhere(found.attribution)} == {(2, 3, 0), (20, 9, 1)}


def test_completeness_gap_is_what_two_steps_miss_of_a_cube(known, noise, encode):
    found = explain(known, encode(noise), method="integrated_gradients", class_index=CUBE, baseline="black", num_steps=2)

    # The mean of the slopes 0 and 3x^2 at the two ends, times x, is 1.5x^3 in place of x^3.
    value = (noise[4, 5, 2] / 100) ** 3
    assert found.probability == pytest.approx(value, rel=1e-4)
    assert found.completeness_gap == pytest.approx(0.5 * value, rel=1e-3)
    assert found.approximation_error == pytest.approx(0.5, rel=1e-3)


def test_integrated_gradients_of_an_exported_model_add_up_to_the_change_of_the_probability(exported, photograph):
    encoded = photograph.read_bytes()

    found = [explain(exported, encoded, method="integrated_gradients", class_index=index, num_steps=256) for index in (0, 1)]

    for explanation in found:
        change = explanation.probability - explanation.baseline_probability
        assert abs(change) > 0.5
        assert explanation.attribution.sum() == pytest.approx(change, abs=0.05)
        assert explanation.completeness_gap == pytest.approx(abs(explanation.attribution.sum() - change), abs=1e-4)
    np.testing.assert_allclose(found[0].attribution, -found[1].attribution, atol=1e-4)  # two probabilities that sum to one


@pytest.mark.parametrize("method", ["xrai", "xrai_fast"])
def test_xrai_gives_each_region_the_mean_of_its_integrated_gradients(exported, photograph, method):
    encoded = photograph.read_bytes()
    pixels = explain(exported, encoded, method="integrated_gradients", class_index=1)

    found = explain(exported, encoded, method=method, class_index=1)

    assert found.attribution.shape == found.regions.shape == pixels.heat_map.shape
    assert found.regions.max() > 2
    means = [pixels.heat_map[found.regions == rank].mean() for rank in range(1, found.regions.max() + 1)]
    np.testing.assert_allclose(
        [found.attribution[found.regions == rank].mean() for rank in range(1, found.regions.max() + 1)], means, atol=1e-6
    )
    assert found.attribution.sum() == pytest.approx(pixels.heat_map.sum(), abs=1e-4)
    assert found.completeness_gap == pytest.approx(pixels.completeness_gap, abs=1e-5)


def test_xrai_takes_a_picture_of_one_colour_for_one_region(two_objects, encode):
    found = explain(two_objects, encode(np.full((40, 40, 3), 90, np.uint8)), method="xrai", baseline="black")

    assert np.isfinite(found.attribution).all()
    assert found.regions.max() == 1


def test_grad_cam_adds_up_the_maps_by_their_mean_slopes(known, encode):
    picture = np.zeros((SIZE, SIZE, 3), np.uint8)
    picture[:14, :, 0] = np.arange(1, SIZE + 1)  # of the fine map
    picture[:, :, 1] = 40  # of the coarse map
    picture[14:, :, 2] = 250  # of the coarse map too, against the class

    found = explain(known, encode(picture), method="grad_cam", class_index=0)

    fine = 3 / SIZE**2 * picture[:, :, 0].astype(np.float32)
    coarse = np.where(np.arange(SIZE) < 14, 5 * 40, 0)[:, np.newaxis] / SIZE**2  # less than 0 below, which Grad-CAM leaves out
    inner = np.r_[0:12, 16:SIZE]  # where no pixel of a stretched map is between two of the coarse one
    np.testing.assert_allclose(found.attribution[inner], (fine + coarse)[inner], rtol=1e-4, atol=1e-6)
    assert found.baseline_probability is found.completeness_gap is found.approximation_error is found.regions is None


@pytest.mark.parametrize("method", METHODS)
def test_explain_finds_the_object_that_the_class_is_about(two_objects, encode, method):
    encoded = encode(make_picture())

    red, blue = (explain(two_objects, encoded, method=method, class_index=index).heat_map for index in (0, 1))

    assert lies_on(red, RED_BOX)
    assert lies_on(blue, BLUE_BOX)
    # From the other side: a map of the other object, or one that is mirrored, does not pass.
    assert not lies_on(blue, RED_BOX)
    assert not lies_on(red, BLUE_BOX)
    assert not lies_on(red[::-1], RED_BOX)


def test_explain_takes_the_most_probable_class(two_objects, encode):
    picture = make_picture()
    found = explain(two_objects, encode(picture), method="grad_cam")

    assert found.class_index == 1  # the blue object is the larger
    assert found.probability == found.probabilities.max()
    assert explain(two_objects, encode(picture[:, :, ::-1]), method="grad_cam").class_index == 0


def test_explain_averages_over_copies_with_noise(known, noise, encode):
    arguments = {"method": "integrated_gradients", "class_index": LINEAR, "baseline": "black", "num_steps": 3}
    found = explain(known, encode(noise), num_noisy_copies=10, **arguments)

    again = explain(known, encode(noise), num_noisy_copies=10, **arguments)
    np.testing.assert_array_equal(found.attribution, again.attribution)
    # Of a linear function it is the weight times the image and the mean of the noise.
    added = found.attribution / WEIGHTS - noise
    assert added.std() == pytest.approx(NOISE * 255 / np.sqrt(10), rel=0.1)
    assert abs(added.mean()) < 2


def test_explain_reports_its_parameters_as_json(known, noise, encode):
    found = explain(known, encode(noise), method="xrai", class_index=LINEAR, baseline="black", num_steps=4)

    assert json.loads(json.dumps(found.parameters)) == {"baseline": "black", "num_steps": 4, "num_noisy_copies": 0}


def test_make_baseline_blurs_by_a_share_of_the_side():
    image = np.zeros((56, 56, 3), np.float32)
    image[28, 28] = 1

    found = make_baseline(image, "blurred")

    # The peak of a Gaussian of two pixels, over the area.
    assert found[28, 28, 0] == pytest.approx(1 / (2 * np.pi * (BLUR * 56) ** 2), rel=0.02)
    assert found.sum() == pytest.approx(3, rel=1e-4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "lime"}, "Expected `method` to be one of integrated_gradients.* Received: method='lime'"),
        ({"baseline": "grey"}, "Expected `baseline` to be one of .* Received: baseline='grey'"),
        ({"method": "blur_integrated_gradients", "baseline": "black"}, "Expected `baseline` of blurred with blur_integrated"),
        ({"num_steps": 1}, r"Expected `num_steps` in \[2, 2000\]\. Received: num_steps=1"),
        ({"num_steps": 2001}, "Received: num_steps=2001"),
        ({"num_noisy_copies": 51}, r"Expected `num_noisy_copies` in \[0, 50\] .* Received: num_noisy_copies=51"),
        ({"method": "grad_cam", "num_noisy_copies": 1}, r"in \[0, 0\] with grad_cam"),
        ({"class_index": 3}, r"Expected `class_index` in \[0, 3\)\. Received: class_index=3"),
        ({"class_index": -1}, "Received: class_index=-1"),
    ],
)
def test_explain_refuses_what_it_cannot_do(known, noise, encode, changed, message):
    with pytest.raises(InputError, match=message):
        explain(known, encode(noise), **({"method": "integrated_gradients", "class_index": 0} | changed))


def test_explain_refuses_bytes_that_are_no_image(two_objects):
    with pytest.raises(InputError, match=r"Expected an image that TensorFlow decodes.* Received: 8 bytes that are none"):
        explain(two_objects, b"no image", method="grad_cam")
