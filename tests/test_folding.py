import keras
import numpy as np
import pytest

from models.backbones import BACKBONES
from models.folding import _fold, fold_batch_norm


def _randomize(network: keras.Model) -> keras.Model:
    """Gives every BatchNormalization statistics and parameters that it could have learnt."""
    random = np.random.default_rng(0)
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            gamma, beta, mean, variance = layer.get_weights()
            layer.set_weights(
                [
                    random.uniform(0.8, 1.2, gamma.shape),
                    random.normal(0, 0.1, beta.shape),
                    random.normal(0, 0.1, mean.shape),
                    random.uniform(0.5, 1.5, variance.shape),
                ]
            )
    return network


def _batch_norms(network: keras.Model) -> list[str]:
    return [layer.name for layer in network.layers if isinstance(layer, keras.layers.BatchNormalization)]


def _assert_same_function(folded: keras.Model, network: keras.Model, *, batch_size: int = 2) -> None:
    images = np.random.default_rng(1).uniform(0, 255, (batch_size, *network.input_shape[1:])).astype(np.float32)
    outputs = [keras.tree.flatten(model(images, training=False)) for model in (folded, network)]
    for received, expected in zip(*outputs, strict=True):
        expected = np.asarray(expected)
        assert expected.std() > 0
        np.testing.assert_allclose(np.asarray(received), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_b0", "efficientnet_v2_b0"])
def test_fold_batch_norm_keeps_the_function_of_a_backbone(name):
    network = _randomize(BACKBONES[name].build(image_size=64))
    before = [np.array(weight) for weight in network.weights]

    folded = fold_batch_norm(network)

    assert _batch_norms(folded) == []
    assert len(_batch_norms(network)) > 40
    assert {layer.name for layer in folded.layers} < {layer.name for layer in network.layers}
    assert folded.name == network.name
    assert folded.output_shape == network.output_shape
    _assert_same_function(folded, network)
    for weight, value in zip(network.weights, before, strict=True):
        np.testing.assert_array_equal(weight, value)


def _network(join) -> keras.Model:
    image = keras.Input((8, 8, 4), name="image")
    return _randomize(keras.Model(image, join(image)))


def _norm(x, **options):
    return keras.layers.BatchNormalization(name="norm", **options)(x)


CONV = {"filters": 6, "kernel_size": 3, "padding": "same", "name": "conv", "bias_initializer": "random_normal"}


@pytest.mark.parametrize(
    "join",
    [
        lambda image: _norm(keras.layers.Conv2D(**CONV, use_bias=False)(image)),
        lambda image: _norm(keras.layers.Conv2D(**CONV)(image)),
        lambda image: _norm(keras.layers.Conv2D(**CONV, groups=2)(image)),
        lambda image: _norm(keras.layers.DepthwiseConv2D(3, depth_multiplier=2, bias_initializer="random_normal")(image)),
        lambda image: keras.ops.relu(_norm(keras.layers.Conv2D(**CONV)(image))),
        lambda image: keras.layers.Add()([_norm(keras.layers.Conv2D(4, 1)(image)), image]),
    ],
    ids=["no_bias", "bias", "groups", "depthwise", "operation", "shortcut"],
)
def test_fold_batch_norm_folds(join):
    network = _network(join)

    folded = fold_batch_norm(network)

    assert _batch_norms(folded) == []
    _assert_same_function(folded, network)


def test_fold_batch_norm_folds_without_scale_and_center():
    image = keras.Input((8, 8, 4))
    network = keras.Model(image, _norm(keras.layers.Conv2D(**CONV)(image), scale=False, center=False))
    network.get_layer("norm").set_weights([np.full(6, 0.3), np.full(6, 4.0)])

    folded = fold_batch_norm(network)

    assert _batch_norms(folded) == []
    _assert_same_function(folded, network)


def _norm_of_an_output(image):
    x = keras.layers.Conv2D(**CONV)(image)
    return [x, _norm(x)]


def _read_twice(image):
    x = keras.layers.Conv2D(**CONV)(image)
    return keras.layers.Add()([x, _norm(x)])


def _read_by_an_operation(image):
    x = keras.layers.Conv2D(**CONV)(image)
    return keras.ops.relu(x) + _norm(x)


def _shared_convolution(image):
    conv = keras.layers.Conv2D(**CONV)
    return keras.layers.Add()([_norm(conv(image)), conv(image)])


def _shared_norm(image):
    norm = keras.layers.BatchNormalization(name="norm")
    return [norm(keras.layers.Conv2D(6, 1)(image)), norm(keras.layers.Conv2D(6, 3)(image))]


@pytest.mark.parametrize(
    "join",
    [
        _norm,
        lambda image: _norm(keras.layers.Conv2D(**CONV, activation="relu")(image)),
        lambda image: _norm(keras.layers.Conv2D(**CONV)(image), axis=1),
        _norm_of_an_output,
        _read_twice,
        _read_by_an_operation,
        _shared_convolution,
        _shared_norm,
    ],
    ids=["first", "activation", "axis", "output", "read_twice", "read_by_an_operation", "shared_convolution", "shared_norm"],
)
def test_fold_batch_norm_leaves_what_cannot_be_folded(join):
    network = _network(join)

    folded = fold_batch_norm(network)

    assert _batch_norms(folded) == ["norm"]
    _assert_same_function(folded, network)


def test_fold_batch_norm_keeps_other_layers_and_their_weights():
    # The second convolution has nothing to fold, and a Normalization computes with what its weights were when it was set up.
    image = keras.Input((8, 8, 4))
    normalization = keras.layers.Normalization()
    x = keras.layers.Conv2D(3, 1, name="last")(_norm(keras.layers.Conv2D(**CONV)(normalization(image))))
    network = _randomize(keras.Model(image, x))
    normalization.adapt(np.random.default_rng(0).uniform(0, 255, (4, 8, 8, 4)))

    _assert_same_function(fold_batch_norm(network), network)


def test_fold_batch_norm_without_any_gives_the_network_itself():
    image = keras.Input((8, 8, 4))
    network = keras.Model(image, keras.layers.Conv2D(**CONV)(image))

    assert fold_batch_norm(network) is network


def test_fold_batch_norm_of_a_frozen_network_is_frozen():
    network = _network(lambda image: _norm(keras.layers.Conv2D(**CONV)(image)))
    assert fold_batch_norm(network).trainable_weights
    network.trainable = False

    assert not fold_batch_norm(network).trainable_weights


@pytest.mark.parametrize("is_depthwise", [False, True])
def test_fold_moves_the_normalization_into_the_convolution(is_depthwise):
    random = np.random.default_rng(0)
    gamma, beta, mean = random.normal(size=(3, 4))
    variance = random.uniform(0.5, 2.0, 4)
    x = random.normal(size=(1, 5, 5, 4))
    kernel = random.normal(size=(3, 3, 4, 1) if is_depthwise else (1, 1, 4, 4))
    layer = (
        keras.layers.DepthwiseConv2D(3, use_bias=False, dtype="float64")
        if is_depthwise
        else keras.layers.Conv2D(4, 1, use_bias=False, dtype="float64")
    )
    layer.build(x.shape)
    layer.set_weights([kernel])
    norm = keras.layers.BatchNormalization(epsilon=1e-3, dtype="float64")
    norm.build(x.shape)
    norm.set_weights([gamma, beta, mean, variance])
    convolve = keras.ops.depthwise_conv if is_depthwise else keras.ops.conv

    folded, bias = _fold(layer, norm)

    expected = gamma * (np.asarray(convolve(x, kernel)) - mean) / np.sqrt(variance + 1e-3) + beta
    np.testing.assert_allclose(np.asarray(convolve(x, folded)) + bias, expected, atol=1e-9)
