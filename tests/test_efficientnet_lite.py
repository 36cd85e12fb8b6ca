import functools
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from data.errors import InputError
from models.efficientnet_lite import (
    LITE0,
    LITE1,
    LITE2,
    NUM_FEATURES,
    Variant,
    efficientnet_lite,
    load_imagenet_classifier,
    load_imagenet_weights,
)
from models.folding import fold_batch_norm
from preprocessing.images import decode_image

GOLDEN = Path(__file__).with_name("golden") / "efficientnet_lite0.npz"  # made by golden/make_efficientnet_lite0.py
STAGE_CHANNELS = (16, 24, 40, 80, 112, 192, 320)
MILITARY_UNIFORM = 652  # of ImageNet's 1,000 classes

IMAGE_SIZES = {"efficientnet_lite0": 224, "efficientnet_lite1": 240, "efficientnet_lite2": 260}


@functools.cache
def _pretrained(variant: Variant) -> keras.Model:
    """Returns the network with its ImageNet weights, and NaN wherever they were not set."""
    network = efficientnet_lite(variant, image_size=IMAGE_SIZES[variant.name])
    for weight in network.weights:
        weight.assign(np.full(weight.shape, np.nan, np.float32))
    load_imagenet_weights(variant, network)
    return network


@pytest.fixture(scope="module", params=[False, True], ids=["batch_norm", "folded"])
def network(request) -> keras.Model:
    """Lite0 with its ImageNet weights, in both forms."""
    return fold_batch_norm(_pretrained(LITE0)) if request.param else _pretrained(LITE0)


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
    logits = load_imagenet_classifier(LITE0)(pooled[-1][np.newaxis])
    np.testing.assert_allclose(logits[0], golden["logits"], atol=5e-3)


@pytest.mark.parametrize(
    ("variant", "logit"), [(LITE0, 7.992), (LITE1, 7.828), (LITE2, 5.900)], ids=["lite0", "lite1", "lite2"]
)
def test_efficientnet_lite_sees_the_uniform_in_the_photograph(variant, logit, photograph):
    # The logits are those of the package efficientnet-lite-pytorch on the same pixels, which agreed to 1e-5.
    image = decode_image(tf.constant(photograph.read_bytes()), image_size=IMAGE_SIZES[variant.name]).numpy().round()

    features = _run(_pretrained(variant), image[np.newaxis])[-1].mean((1, 2))

    logits = load_imagenet_classifier(variant)(features)
    assert logits.argmax() == MILITARY_UNIFORM
    np.testing.assert_allclose(logits.max(), logit, atol=5e-3)


def test_efficientnet_lite0_folded_is_the_same_function():
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3))
    outputs = [_run(network, images) for network in (_pretrained(LITE0), fold_batch_norm(_pretrained(LITE0)))]

    for plain, folded in zip(*outputs, strict=True):
        assert plain.std() > 0.01
        np.testing.assert_allclose(folded, plain, atol=1e-3)


def test_efficientnet_lite0_gives_a_feature_map_of_each_stage():
    network = efficientnet_lite(LITE0, image_size=96)

    assert network.input_shape == (None, 96, 96, 3)
    assert network.output_shape == [
        (None, size, size, channels)
        for size, channels in zip((48, 24, 12, 6, 6, 3, 3, 3), (*STAGE_CHANNELS, NUM_FEATURES), strict=True)
    ]


@pytest.mark.parametrize(
    ("variant", "num_parameters", "num_blocks", "channels"),
    # In millions, 4.65, 5.42 and 6.09 as published, with the classifier of 1,281,000.
    [
        (LITE0, 4_652_008, 16, STAGE_CHANNELS),
        (LITE1, 5_416_680, 21, STAGE_CHANNELS),
        (LITE2, 6_092_072, 21, (16, 24, 48, 88, 120, 208, 352)),
    ],
    ids=["lite0", "lite1", "lite2"],
)
def test_efficientnet_lite_has_the_published_size(variant, num_parameters, num_blocks, channels):
    network = efficientnet_lite(variant, image_size=32)

    assert sum(np.prod(weight.shape) for weight in network.trainable_weights) == num_parameters - 1_281_000
    assert sum(layer.name.endswith("_project_conv") for layer in network.layers) == num_blocks
    assert tuple(shape[-1] for shape in network.output_shape[:-1]) == channels


def test_efficientnet_lite0_folded_has_no_batch_normalization():
    network = fold_batch_norm(efficientnet_lite(LITE0, image_size=32))

    assert not [layer for layer in network.layers if isinstance(layer, keras.layers.BatchNormalization)]


def test_efficientnet_lite_leaves_deeper_blocks_out_more_often():
    network = efficientnet_lite(LITE0, image_size=32, stochastic_depth=0.3)

    rates = {layer.name: layer.rate for layer in network.layers if isinstance(layer, keras.layers.Dropout)}
    assert list(rates) == [layer.name.replace("_add", "_drop") for layer in network.layers if layer.name.endswith("_add")]
    # 16 blocks, of which the second stage's second is the third.
    np.testing.assert_allclose(rates["block2_drop"], 0.3 * 2 / 15)
    np.testing.assert_allclose(rates["block14_drop"], 0.3 * 14 / 15)
    assert not [layer for layer in efficientnet_lite(LITE0, image_size=32).layers if isinstance(layer, keras.layers.Dropout)]


def test_efficientnet_lite_stochastic_depth_keeps_or_leaves_out_a_whole_branch():
    network = efficientnet_lite(LITE0, image_size=32, stochastic_depth=0.9)
    drop = network.get_layer("block14_drop")
    branch = np.ones((64, 2, 2, 3), np.float32)

    kept = np.asarray(drop(branch, training=True))

    scale = 1 / (1 - drop.rate)
    per_image = kept.reshape(64, -1)
    np.testing.assert_allclose(per_image, np.where(per_image[:, :1] > 0, scale, 0) * np.ones_like(per_image), rtol=1e-6)
    assert 0 < (per_image[:, 0] == 0).sum() < 64
    np.testing.assert_array_equal(drop(branch, training=False), branch)
    # Its random state is a variable, so a traced step draws anew each time.
    assert drop.seed_generator.state in drop.non_trainable_variables


@pytest.mark.parametrize("variant", [LITE0, LITE1, LITE2], ids=["lite0", "lite1", "lite2"])
def test_load_imagenet_weights_sets_every_weight(variant):
    assert all(np.isfinite(weight.numpy()).all() for weight in _pretrained(variant).weights)


def test_load_imagenet_weights_of_a_file(tmp_path):
    trained = efficientnet_lite(LITE0, image_size=32)
    trained.save_weights(tmp_path / "trained.weights.h5")
    network = efficientnet_lite(LITE0, image_size=64)

    load_imagenet_weights(LITE0, network, str(tmp_path / "trained.weights.h5"))

    for received, expected in zip(network.get_weights(), trained.get_weights(), strict=True):
        np.testing.assert_array_equal(received, expected)


@pytest.mark.parametrize("variant", [LITE1, LITE2], ids=["fewer_layers", "other_shapes"])
def test_load_imagenet_weights_of_a_file_that_does_not_fit(variant, tmp_path):
    of_the_file = LITE0 if variant is LITE1 else LITE1
    efficientnet_lite(of_the_file, image_size=32).save_weights(tmp_path / "other.weights.h5")

    with pytest.raises(InputError, match=rf"Expected `weights_file` to hold the weights of {variant.name},.*Received: .*other"):
        load_imagenet_weights(variant, efficientnet_lite(variant, image_size=32), str(tmp_path / "other.weights.h5"))
