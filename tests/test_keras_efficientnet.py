import urllib.error

import keras
import numpy as np
import pytest
from keras.src.utils import file_utils

from data.errors import InputError
from models.keras_efficientnet import IMAGENET_MEAN, IMAGENET_STD, keras_efficientnet, load_imagenet_weights

B0 = keras.applications.EfficientNetB0
V2_B0 = keras.applications.EfficientNetV2B0
IMAGE_SIZE = 32


def _publish(application, path) -> str:
    """Writes random weights of the application without its top, as a file of the format of the published ones."""
    random = np.random.default_rng(0)
    network = application(include_top=False, weights=None, input_shape=(32, 32, 3))
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            gamma, *_ = layer.get_weights()
            layer.set_weights([*random.normal(1, 0.1, (3, *gamma.shape)), random.uniform(0.5, 1.5, gamma.shape)])
        elif isinstance(layer, keras.layers.Normalization) and layer.weights:
            layer.adapt(random.uniform(0, 1, (4, 8, 8, 3)) ** 2)
    network.save(path)
    return str(path)


@pytest.fixture(scope="module", params=[B0, V2_B0], ids=["b0", "v2_b0"])
def published(request, tmp_path_factory):
    """An application, and a file of weights for it."""
    return request.param, _publish(request.param, tmp_path_factory.mktemp("published") / "notop.h5")


def _images() -> np.ndarray:
    return np.random.default_rng(1).uniform(0, 255, (4, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32)


def _run(network, *, training: bool = False) -> list[np.ndarray]:
    return [np.asarray(output) for output in network(_images(), training=training)]


def _run_application(application, weights: str) -> list[np.ndarray]:
    """Returns the first stage's output, in which the input still shows, and the last of all."""
    network = application(include_top=False, weights=weights, input_shape=(IMAGE_SIZE, IMAGE_SIZE, 3))
    first = network.get_layer("block1a_project_bn" if application is B0 else "block1a_project_activation")
    return _run(keras.Model(network.inputs[0], [first.output, network.output]))


@pytest.fixture(scope="module")
def b0() -> keras.Model:
    """A network that no test changes."""
    return keras_efficientnet(B0, image_size=IMAGE_SIZE)


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_load_imagenet_weights_gives_the_function_of_keras_applications(published, monkeypatch):
    application, path = published
    network = keras_efficientnet(application, image_size=IMAGE_SIZE)
    load_imagenet_weights(application, network, path)
    of_a_file = _run(network)
    asked_for = []
    monkeypatch.setattr(file_utils, "get_file", lambda name, *_, **__: asked_for.append(name) or path)
    for weight in network.trainable_weights:
        weight.assign(np.full(weight.shape, np.nan))
    load_imagenet_weights(application, network)
    downloaded = _run(network)

    expected = _run_application(application, "imagenet")

    assert asked_for == [f"{network.name}_notop.h5"] * 2
    for feature_maps in (of_a_file, downloaded):
        for received, value in zip((feature_maps[0], feature_maps[-1]), expected, strict=True):
            np.testing.assert_allclose(received, value, atol=1e-4 * np.abs(value).max())
    if application is B0:
        # What the file alone would have given: the library divides once more with weights="imagenet" only.
        naive = _run_application(application, path)
        assert np.abs(naive[0] - expected[0]).max() > 0.1 * np.abs(expected[0]).max()


def test_keras_efficientnet_without_weights_standardizes_its_input(b0):
    normalization = next(layer for layer in b0.layers if isinstance(layer, keras.layers.Normalization))
    standardized = keras.Model(b0.inputs[0], normalization.output)

    expected = (_images() / 255 - IMAGENET_MEAN) / IMAGENET_STD
    np.testing.assert_allclose(np.asarray(standardized(_images())), expected, atol=1e-5)


def test_keras_efficientnet_gives_the_last_output_of_each_stage(b0):
    expected = ["block1a_project_bn", "block2b_add", "block3b_add", "block4c_add", "block5c_add", "block6d_add"]
    expected += ["block7a_project_bn", "top_activation"]

    assert all(output is b0.get_layer(name).output for output, name in zip(b0.outputs, expected, strict=True))


@pytest.mark.parametrize(("application", "last_block"), [(B0, ("block6d_drop", 14 / 15)), (V2_B0, ("block6h_drop", 1.0))])
def test_keras_efficientnet_leaves_deeper_blocks_out_more_often(application, last_block):
    network = keras_efficientnet(application, image_size=IMAGE_SIZE, stochastic_depth=0.4)

    drops = [layer for layer in network.layers if isinstance(layer, keras.layers.Dropout)]
    assert [layer.name for layer in drops] == [
        layer.name.replace("_add", "_drop") for layer in network.layers if layer.name.endswith("_add")
    ]
    rates = [layer.rate for layer in drops]
    assert rates == sorted(rates)
    name, share = last_block
    assert (drops[-1].name, drops[-1].rate) == (name, pytest.approx(0.4 * share))
    # In training, only what is left out makes two calls differ.
    first, second = (_run(network, training=True)[-1] for _ in range(2))
    assert np.abs(first - second).max() > 0


def test_keras_efficientnet_leaves_no_block_out_unless_asked(b0):
    assert {layer.rate for layer in b0.layers if isinstance(layer, keras.layers.Dropout)} == {0.0}


def test_load_imagenet_weights_without_a_network_says_what_to_do(b0, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(file_utils, "urlretrieve", fail)
    monkeypatch.setattr(file_utils.config, "keras_home", lambda: str(tmp_path))  # an empty cache

    with pytest.raises(InputError) as raised:
        load_imagenet_weights(B0, b0)

    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(
        "Expected to download the ImageNet weights of EfficientNetB0. Received: URL fetch failure on http"
    )
    assert "no route to host" in message
    assert message.endswith('Give a local file in model.weights_file, or take model.weights = "random".')


def _missing(path):
    return path / "missing.h5"


def _no_weights(path):
    (path / "text.h5").write_text("no weights")
    return path / "text.h5"


def _other():
    image = keras.Input((32, 32, 3))
    return keras.Model(image, keras.layers.Conv2D(32, 3, use_bias=False)(image))


def _of_another(path):
    _other().save(path / "other.h5")
    return path / "other.h5"


def _of_another_in_the_newer_format(path):
    _other().save_weights(path / "other.weights.h5")
    return path / "other.weights.h5"


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.parametrize("make", [_missing, _no_weights, _of_another, _of_another_in_the_newer_format])
def test_load_imagenet_weights_of_a_wrong_file_names_it(make, b0, tmp_path):
    path = make(tmp_path)

    with pytest.raises(InputError) as raised:
        load_imagenet_weights(B0, b0, str(path))

    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith("Expected `weights_file` to hold the weights of efficientnetb0")
    assert f"Received: weights_file='{path}'" in message
