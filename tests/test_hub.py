import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_hub
from conftest import CLASS_NAMES, trainer_config

from data.errors import InputError
from models.backbones import Backbone, find_backbone, weights_fingerprint
from models.classifier import ModelConfig
from models.folding import fold_batch_norm
from models.trainer import run_fn

NUM_FEATURES = 5


class _FeatureVector(tf.Module):
    """Multiplies the mean colour, and adds a thousand in training; `size` None takes images of any."""

    def __init__(self, size: int | None = None):
        super().__init__()
        self.kernel = tf.Variable(np.arange(3 * NUM_FEATURES).reshape(3, NUM_FEATURES), dtype=tf.float32, name="kernel")
        self.spec = tf.TensorSpec((None, size, size, 3), tf.float32)

    def compute(self, images, training=False):
        return tf.reduce_mean(images, (1, 2)) @ self.kernel + (1000.0 if training else 0.0)


class _Callable(_FeatureVector):
    @tf.function
    def __call__(self, images, training=False):
        return self.compute(images, training)


def _save(module, path, **options) -> str:
    tf.saved_model.save(module, str(path), **options)
    return str(path)


def _save_callable(path, *, size=None) -> str:
    module = _Callable(size)
    for training in (False, True):
        module.__call__.get_concrete_function(module.spec, training)
    return _save(module, path)


def _save_signature(path, *, size=None, compute=None) -> str:
    module = _FeatureVector(size)
    compute = compute or (lambda images: {"features": module.compute(images)})
    signature = tf.function(compute, input_signature=[module.spec])
    return _save(module, path, signatures={"serving_default": signature})


@pytest.fixture(params=[_save_callable, _save_signature], ids=["callable", "signature"])
def save(request):
    return request.param


def _images(size=32) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 255, (2, size, size, 3)).astype(np.float32)


def _expected(images) -> np.ndarray:
    return (images / 255).mean((1, 2)) @ np.arange(3 * NUM_FEATURES).reshape(3, NUM_FEATURES)


def test_hub_gives_one_vector_an_image_in_inference_mode(save, tmp_path):
    backbone = find_backbone(save(tmp_path / "model"))

    network = backbone.build(image_size=32)

    assert isinstance(backbone, Backbone)
    assert (backbone.value_range, backbone.covariance_maps) == ((0.0, 1.0), ())
    assert network.input_shape == (None, 32, 32, 3)
    assert [output.shape for output in network.outputs] == [(None, NUM_FEATURES)]
    for training in (False, True):
        features = network(_images(), training=training)
        np.testing.assert_allclose(np.asarray(features), _expected(_images()), rtol=1e-5)
    assert not network.trainable_weights
    assert fold_batch_norm(network) is network
    backbone.load_imagenet(network, "")


def test_hub_is_exported_with_the_network(save, tmp_path):
    network = find_backbone(save(tmp_path / "model")).build(image_size=32)
    module = tf.Module()
    module.network = network
    serve = tf.function(lambda images: network(images, training=False), autograph=False)
    module.serve = serve
    tf.saved_model.save(
        module, str(tmp_path / "exported"), signatures=serve.get_concrete_function(tf.TensorSpec((None, 32, 32, 3)))
    )

    (tmp_path / "model").rename(tmp_path / "gone")
    loaded = tf.saved_model.load(str(tmp_path / "exported"))

    (features,) = loaded.signatures["serving_default"](tf.constant(_images())).values()
    np.testing.assert_allclose(features, _expected(_images()), rtol=1e-5)


def test_hub_takes_the_image_size_of_the_model(save, tmp_path):
    backbone = find_backbone(save(tmp_path / "model", size=48))

    assert backbone.image_size == 48
    assert backbone.build(image_size=48).output_shape == (None, NUM_FEATURES)
    with pytest.raises(InputError, match=r"Expected `image_size` to be 48, all that .* takes\. Received: image_size=32\."):
        backbone.build(image_size=32)


def test_hub_loads_a_model_once(tmp_path):
    path = _save_callable(tmp_path / "model")

    first, second = (find_backbone(path).build(image_size=32).get_layer("saved_model") for _ in range(2))

    assert first.loaded is second.loaded


def test_hub_takes_224_pixels_where_the_model_takes_any(save, tmp_path):
    assert find_backbone(save(tmp_path / "model")).image_size == 224


def test_hub_finds_a_path_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    _save_callable(tmp_path / "model")

    assert find_backbone("~/model").build(image_size=32).output_shape == (None, NUM_FEATURES)


def test_hub_resolves_a_handle(tmp_path, monkeypatch):
    path = _save_callable(tmp_path / "model")
    handle = "https://tfhub.dev/google/imagenet/efficientnet_v2_imagenet1k_b0/feature_vector/2"
    monkeypatch.setattr(tensorflow_hub, "resolve", {handle: path}.__getitem__)

    assert find_backbone(handle).build(image_size=32).output_shape == (None, NUM_FEATURES)


def test_hub_without_a_network_says_what_to_do(tmp_path, monkeypatch):
    def fail(handle):
        raise OSError("<urlopen error\n no route to host>")

    monkeypatch.setattr(tensorflow_hub, "resolve", fail)

    with pytest.raises(InputError) as raised:
        find_backbone("https://www.kaggle.com/models/google/efficientnet")

    assert str(raised.value) == (
        "Expected a SavedModel at https://www.kaggle.com/models/google/efficientnet. "
        "Received: <urlopen error no route to host>. "
        "Check the address; where there is no network, download it elsewhere and give its folder."
    )


def test_hub_refuses_what_does_not_exist(tmp_path):
    with pytest.raises(InputError, match=r"Expected a SavedModel at .*missing\. Received: .*does not exist"):
        find_backbone(str(tmp_path / "missing"))


def test_hub_refuses_a_folder_that_is_no_saved_model(tmp_path):
    (tmp_path / "notes.txt").write_text("no model")

    with pytest.raises(InputError, match=r"Expected a SavedModel of TensorFlow 2 in "):
        find_backbone(str(tmp_path))


def test_hub_refuses_a_damaged_saved_model(tmp_path):
    (tmp_path / "saved_model.pb").write_bytes(b"no model")

    with pytest.raises(InputError, match=r"Expected a SavedModel of TensorFlow 2 in "):
        find_backbone(str(tmp_path))


def test_hub_refuses_a_model_that_cannot_be_called(tmp_path):
    module = tf.Module()
    for name in ("one", "two"):  # of a single function TensorFlow makes the default signature
        setattr(module, name, tf.function(lambda x: x, input_signature=[tf.TensorSpec((None, 3))]))
    backbone = find_backbone(_save(module, tmp_path / "model"))

    with pytest.raises(
        InputError, match=r"Expected a SavedModel of TensorFlow 2 that can be called .*with the signatures \[\]"
    ):
        backbone.build(image_size=32)


def test_hub_refuses_a_module_of_tensorflow_1(tmp_path):
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        images = tf.compat.v1.placeholder(tf.float32, (None, 32, 32, 3))
        builder = tf.compat.v1.saved_model.Builder(str(tmp_path / "model"))
        info = [tf.compat.v1.saved_model.build_tensor_info(tensor) for tensor in (images, images[:, 0, 0] * 2.0)]
        signature = tf.compat.v1.saved_model.build_signature_def({"images": info[0]}, {"default": info[1]}, "")
        builder.add_meta_graph_and_variables(session, [], signature_def_map={"default": signature})
        builder.save()

    with pytest.raises(
        InputError, match=r"Expected a SavedModel of TensorFlow 2 that can be called .*signatures \['default'\]"
    ):
        find_backbone(str(tmp_path / "model")).build(image_size=32)


@pytest.mark.parametrize(
    ("compute", "received"),
    [
        (lambda images: {"map": images}, r"shape \(1, 32, 32, 3\)"),
        (lambda images: {"mean": tf.reduce_mean(images, (1, 2, 3))}, r"shape \(1,\)"),
        (lambda images: {"a": images[:, 0, 0], "b": images[:, 0, 1]}, "dict of several"),
    ],
)
def test_hub_refuses_a_model_that_gives_no_vector(compute, received, tmp_path):
    backbone = find_backbone(_save_signature(tmp_path / "model", compute=compute))

    with pytest.raises(InputError, match=rf"to give one vector an image, \[batch, features\]\. Received: {received}"):
        backbone.build(image_size=32)


def test_hub_takes_the_default_of_several_outputs(tmp_path):
    def compute(images):
        return {"default": images[:, 0, 0], "endpoint": images}

    network = find_backbone(_save_signature(tmp_path / "model", compute=compute)).build(image_size=32)

    assert network.output_shape == (None, 3)


def test_hub_refuses_a_model_of_something_else(tmp_path):
    module = tf.Module()
    text = tf.function(lambda text: {"length": tf.strings.length(text)}, input_signature=[tf.TensorSpec([None], tf.string)])
    path = _save(module, tmp_path / "model", signatures={"serving_default": text})

    with pytest.raises(InputError, match=r"to take images \[batch, height, width, 3\]\. Received: "):
        find_backbone(path)


def test_hub_refuses_what_a_frozen_model_cannot_do(tmp_path):
    backbone = find_backbone(_save_callable(tmp_path / "model"))

    with pytest.raises(InputError, match=r"Expected no stochastic depth .*Received: stochastic_depth=0\.2"):
        backbone.build(image_size=32, stochastic_depth=0.2)


def test_weights_fingerprint_changes_with_a_name_or_a_content_and_not_with_the_folder(tmp_path):
    path = _save_callable(tmp_path / "model")
    variables = Path(path, "variables", "variables.data-00000-of-00001")
    before = weights_fingerprint(path, "")

    shutil.copytree(path, tmp_path / "copy")
    assert weights_fingerprint(f"{tmp_path}/copy/", "") == before
    variables.write_bytes(variables.read_bytes()[:-1] + b"!")
    after = weights_fingerprint(path, "")
    variables.rename(variables.with_name("other"))

    assert len({before, after, weights_fingerprint(path, "")}) == 3


def test_hub_is_not_loaded_when_a_configuration_is_read():
    assert ModelConfig(backbone="/missing").backbone == "/missing"


def test_run_fn_trains_a_head_on_a_hub_model_and_exports_it(tmp_path, shape_records, transform_graph, encode):
    path = _save_callable(tmp_path / "hub")
    config = trainer_config(model={"backbone": path, "weights": "imagenet"}, fine_tuning={"epochs": 0})
    arguments = SimpleNamespace(
        custom_config={"trainer": config.model_dump(mode="json")},
        hyperparameters=None,
        transform_graph_path=transform_graph,
        train_files=[shape_records["train"]],
        eval_files=[shape_records["valid"]],
        model_run_dir=str(tmp_path / "model_run"),
        serving_model_dir=str(tmp_path / "served"),
        base_model=None,
    )

    run_fn(arguments)

    shutil.rmtree(path)
    serve = tf.saved_model.load(arguments.serving_model_dir).signatures["serving_default"]
    images = [encode(np.full((8, 8, 3), value, np.uint8)) for value in (0, 255)]
    (name,) = serve.structured_input_signature[1]
    probabilities = serve(**{name: tf.constant(images)})["probabilities"].numpy()
    assert probabilities.shape == (2, len(CLASS_NAMES))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    assert not np.allclose(*probabilities)
