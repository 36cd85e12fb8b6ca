import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import trainer_config

from models.classifier import Projection, join, logits_of, pool_statistics
from models.trained import TrainedClassifier, read_classifier, read_exported_model, write_network_file


@pytest.fixture(autouse=True)
def _restored_precision():
    before = keras.mixed_precision.dtype_policy()
    yield
    keras.mixed_precision.set_dtype_policy(before)


@pytest.fixture(scope="module")
def classifier() -> TrainedClassifier:
    """ImageNet's backbone, whose BatchNormalization has something to fold, under a random head."""
    keras.utils.set_random_seed(0)
    spec = trainer_config(model={"weights": "imagenet"}).spec
    random = np.random.default_rng(0)
    backbone = spec.build_backbone()
    num_statistics = pool_statistics(spec.model, backbone).output_shape[-1]
    projection = Projection(random.normal(size=(num_statistics, 16)).astype(np.float32) / 30, np.zeros(16, np.float32))
    head = spec.build_head(num_components=16)
    return TrainedClassifier(spec, backbone.get_weights(), projection, head.get_weights(), [3, 4], {"loss": [1.0]})


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    brightness = np.array([10, 60, 150, 255]).reshape(4, 1, 1, 1)
    return (np.random.default_rng(1).uniform(size=(4, 32, 32, 3)) * brightness).astype(np.float32)


def test_trained_classifier_survives_a_file(classifier, tmp_path):
    path = f"file://{tmp_path}/head.npz"

    classifier.write(path)
    found = read_classifier(path, classifier.spec)

    for name in ("backbone", "head"):
        for left, right in zip(getattr(found, name), getattr(classifier, name), strict=True):
            np.testing.assert_array_equal(left, right)
    np.testing.assert_array_equal(found.projection.kernel, classifier.projection.kernel)
    np.testing.assert_array_equal(found.projection.bias, classifier.projection.bias)
    assert (found.label_counts, found.history) == ([3, 4], {"loss": [1.0]})
    assert [path.name for path in tmp_path.iterdir()] == ["head.npz"]


def test_build_for_inference_computes_what_was_trained(classifier, images):
    """What is exported has BatchNormalization folded; what fine-tuning trains has not."""
    statistics = pool_statistics(classifier.spec.model, classifier.build_backbone(stochastic_depth=0.2))
    trained = logits_of(join(statistics, classifier.projection, classifier.build_head()))

    found = np.asarray(classifier.build_for_inference()(images, training=False))

    expected = tf.nn.softmax(trained(images, training=False)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(expected[:, 0]) > 1e-3


@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16"])
def test_build_for_inference_is_in_float32_whatever_trained_it(classifier, images, precision):
    expected = np.asarray(classifier.build_for_inference()(images, training=False))
    keras.mixed_precision.set_dtype_policy(precision)

    network = classifier.build_for_inference()

    assert {layer.compute_dtype for layer in network.layers} == {"float32"}
    np.testing.assert_allclose(network(images, training=False), expected, atol=1e-6)
    assert keras.mixed_precision.dtype_policy().name == precision


def test_write_network_file_says_what_shapes_the_weights(classifier, tmp_path):
    (tmp_path / "assets.extra").mkdir()

    write_network_file(classifier.spec, str(tmp_path))

    found = json.loads((tmp_path / "assets.extra" / "network.json").read_text())
    assert found["class_names"] == ["circle", "square"]
    assert found["backbone"] == "efficientnet_lite0"
    assert found["image_size"] == 32
    assert "weights" not in found


def test_read_exported_model_refuses_one_that_does_not_say_what_it_is(classifier, tmp_path):
    with pytest.raises(ValueError, match=r"Received: no assets.extra/network.json, as in models of an earlier version\."):
        read_exported_model(str(tmp_path), classifier.spec)
