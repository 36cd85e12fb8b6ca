from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from models.efficientnet_lite import (
    NUM_FEATURES,
    _fold,
    efficientnet_lite0,
    load_imagenet_classifier,
    load_imagenet_weights,
)
from preprocessing.images import decode_image

GOLDEN = Path(__file__).with_name("golden") / "efficientnet_lite0.npz"  # made by golden/make_efficientnet_lite0.py
STAGE_CHANNELS = (16, 24, 40, 80, 112, 192, 320)
MILITARY_UNIFORM = 652  # of ImageNet's 1,000 classes


@pytest.fixture(scope="module", params=[False, True], ids=["batch_norm", "folded"])
def network(request) -> keras.Model:
    """The network with its ImageNet weights, in both forms."""
    network = efficientnet_lite0(image_size=224, fold_batch_norm=request.param)
    load_imagenet_weights(network)
    return network


def _run(network: keras.Model, images: np.ndarray) -> list[np.ndarray]:
    return [np.asarray(feature_map) for feature_map in network(images.astype(np.float32), training=False)]


def test_efficientnet_lite0_agrees_with_pytorch_on_a_photograph(network):
    # The reference is in float64. In float32, with the sums in another order, 1e-3 is what 50 layers may lose.
    golden = np.load(GOLDEN)

    feature_maps = _run(network, golden["image"][np.newaxis])

    pooled = [feature_map.mean((1, 2))[0] for feature_map in feature_maps]
    names = [f"stage{stage}" for stage in range(7)] + ["head"]
    for name, features in zip(names, pooled, strict=True):
        np.testing.assert_allclose(features[: len(golden[name])], golden[name], atol=1e-3, err_msg=name)
    logits = load_imagenet_classifier()(pooled[-1][np.newaxis])
    np.testing.assert_allclose(logits[0], golden["logits"], atol=5e-3)


def test_efficientnet_lite0_sees_the_uniform_in_the_photograph(network, photograph):
    image = decode_image(tf.constant(photograph.read_bytes()), image_size=224).numpy()

    features = _run(network, image[np.newaxis])[-1].mean((1, 2))

    assert load_imagenet_classifier()(features).argmax() == MILITARY_UNIFORM


def test_efficientnet_lite0_folded_is_the_same_function():
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3))
    outputs = []
    for fold_batch_norm in (False, True):
        network = efficientnet_lite0(image_size=64, fold_batch_norm=fold_batch_norm)
        load_imagenet_weights(network)
        outputs.append(_run(network, images))

    for plain, folded in zip(*outputs, strict=True):
        assert plain.std() > 0.01
        np.testing.assert_allclose(folded, plain, atol=1e-3)


@pytest.mark.parametrize("fold_batch_norm", [False, True])
def test_efficientnet_lite0_gives_a_feature_map_of_each_stage(fold_batch_norm):
    network = efficientnet_lite0(image_size=96, fold_batch_norm=fold_batch_norm)

    assert network.input_shape == (None, 96, 96, 3)
    assert network.output_shape == [
        (None, size, size, channels)
        for size, channels in zip((48, 24, 12, 6, 6, 3, 3, 3), (*STAGE_CHANNELS, NUM_FEATURES), strict=True)
    ]


def test_efficientnet_lite0_has_the_published_number_of_parameters():
    # 4.65 million as published, with the classifier of 1,281,000.
    network = efficientnet_lite0(image_size=32)

    assert sum(np.prod(weight.shape) for weight in network.trainable_weights) == 4_652_008 - 1_281_000


def test_efficientnet_lite0_folded_has_no_batch_normalization():
    network = efficientnet_lite0(image_size=32, fold_batch_norm=True)

    assert not [layer for layer in network.layers if isinstance(layer, keras.layers.BatchNormalization)]


@pytest.mark.parametrize("fold_batch_norm", [False, True])
def test_load_imagenet_weights_sets_every_weight(fold_batch_norm):
    network = efficientnet_lite0(image_size=32, fold_batch_norm=fold_batch_norm)
    for weight in network.weights:
        weight.assign(np.full(weight.shape, np.nan, np.float32))

    load_imagenet_weights(network)

    assert all(np.isfinite(weight.numpy()).all() for weight in network.weights)


@pytest.mark.parametrize("is_depthwise", [False, True])
def test_fold_moves_the_normalization_into_the_convolution(is_depthwise):
    random = np.random.default_rng(0)
    gamma, beta, mean = random.normal(size=(3, 4))
    variance = random.uniform(0.5, 2.0, 4)
    x = random.normal(size=(1, 5, 5, 4))
    kernel = random.normal(size=(3, 3, 4, 1) if is_depthwise else (1, 1, 4, 4))
    convolve = keras.ops.depthwise_conv if is_depthwise else keras.ops.conv

    folded, bias = _fold(kernel, gamma, beta, mean, variance)

    expected = gamma * (np.asarray(convolve(x, kernel)) - mean) / np.sqrt(variance + 1e-3) + beta
    np.testing.assert_allclose(np.asarray(convolve(x, folded)) + bias, expected, atol=1e-9)
