import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASS_NAMES, TRANSFORM_IMAGE_SIZE

from data.errors import InputError
from data.features import make_example
from models.classifier import ModelConfig, build_head, build_statistics, fit_projection, join
from models.explainable import ExplainableModel
from models.signatures import ImageClassifier, export
from preprocessing.images import decode_images
from preprocessing.transform import TransformGraph

# Runs where none of our code can be imported, as a server would.
LOAD_WITH_TENSORFLOW_ALONE = """
import json, sys
import tensorflow as tf
model = tf.saved_model.load(sys.argv[1])
answer = model.signatures["serving_default"](image_bytes=tf.io.read_file(sys.argv[2])[tf.newaxis])
ours = [name for name in sys.modules if name.split(".")[0] in ("data", "models", "preprocessing", "pipeline")]
json.dump({"ours": ours, "probabilities": answer["probabilities"].numpy().tolist()}, sys.stdout)
"""


@pytest.fixture(scope="module")
def classifier() -> keras.Model:
    """A classifier with a random head, whose answers differ from image to image."""
    config = ModelConfig(num_feature_maps=2, hidden_units=0)
    statistics = build_statistics(config, image_size=TRANSFORM_IMAGE_SIZE)
    noise = np.random.default_rng(0).uniform(0, 255, (8, TRANSFORM_IMAGE_SIZE, TRANSFORM_IMAGE_SIZE, 3))
    projection = fit_projection(np.asarray(statistics([noise.astype(np.float32)], training=False)), num_components=4)
    keras.utils.set_random_seed(4)
    return join(statistics, projection, build_head(config, num_components=4, num_classes=2))


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory, classifier, transform_graph) -> Path:
    path = tmp_path_factory.mktemp("export") / "model"
    export(ImageClassifier(classifier, TransformGraph(transform_graph), CLASS_NAMES), str(path))
    return path


@pytest.fixture(scope="module")
def signatures(saved_model):
    """The signatures of the loaded model; the model stays alive with them."""
    model = tf.saved_model.load(str(saved_model))
    yield model.signatures
    del model


@pytest.fixture(scope="module")
def encoded(encode, photograph) -> list[bytes]:
    """Images of several formats and sizes."""
    random = np.random.default_rng(0)
    return [
        photograph.read_bytes(),
        encode(random.integers(0, 256, (20, 50, 3), np.uint8)),
        encode(random.integers(0, 256, (40, 40), np.uint8), "JPEG"),
    ]


def _serialized(encoded: list[bytes], labels=("circle", "square", "circle")) -> tf.Tensor:
    return tf.constant(
        [
            make_example(
                image=image, label=label, filename="", height=1, width=1, brightness=0, channels=3, columns={"camera": "left"}
            ).SerializeToString()
            for image, label in zip(encoded, labels, strict=True)
        ]
    )


def test_signatures_are_those_of_the_contract(signatures):
    answer = {
        "label": (tf.string, [None]),
        "probability": (tf.float32, [None]),
        "labels": (tf.string, [None, None]),
        "probabilities": (tf.float32, [None, 2]),
    }
    size = TRANSFORM_IMAGE_SIZE
    image = (tf.float32, [None, size, size, 3])
    feature_maps = {"feature_map6": (tf.float32, [None, 1, 1, 320]), "feature_map7": (tf.float32, [None, 1, 1, 1280])}
    expected = {
        "serving_default": ({"image_bytes": (tf.string, [None])}, answer),
        "examples": ({"examples": (tf.string, [None])}, answer),
        "transform_features": ({"examples": (tf.string, [None])}, {"label_xf": (tf.int64, [None])}),
        "explain_preprocess": ({"image_bytes": (tf.string, [None])}, {"images": image}),
        "explain_model": ({"images": image}, {"probabilities": (tf.float32, [None, 2])}),
        "explain_feature_maps": ({"images": image}, feature_maps),
        "explain_head": (feature_maps, dict.fromkeys(("probabilities", "logits"), (tf.float32, [None, 2]))),
    }
    expected |= {f"xai_{half}": expected[f"explain_{half}"] for half in ("preprocess", "model")}

    assert set(signatures) == set(expected)
    for name, (inputs, outputs) in expected.items():
        function = signatures[name]
        found = {key: (spec.dtype, spec.shape.as_list()) for key, spec in function.structured_input_signature[1].items()}
        assert found == inputs, name
        assert set(function.structured_outputs) == set(outputs), name
        for key, (dtype, shape) in outputs.items():
            spec = function.structured_outputs[key]
            assert (spec.dtype, spec.shape.rank) == (dtype, len(shape)), (name, key)


def test_serving_default_answers_like_the_network_in_training(signatures, classifier, encoded):
    answer = signatures["serving_default"](image_bytes=tf.constant(encoded))

    images = decode_images(tf.constant(encoded), image_size=TRANSFORM_IMAGE_SIZE)
    expected = np.asarray(classifier([images], training=False))
    np.testing.assert_allclose(answer["probabilities"], expected, atol=1e-5)
    assert np.ptp(expected[:, 0]) > 0.01


def test_serving_default_names_the_most_probable_class(signatures, encoded):
    answer = {name: value.numpy() for name, value in signatures["serving_default"](tf.constant(encoded)).items()}

    names = np.array([name.encode() for name in CLASS_NAMES])
    np.testing.assert_array_equal(answer["labels"], np.tile(names, (3, 1)))
    np.testing.assert_array_equal(answer["label"], names[answer["probabilities"].argmax(axis=-1)])
    np.testing.assert_array_equal(answer["probability"], answer["probabilities"].max(axis=-1))
    np.testing.assert_allclose(answer["probabilities"].sum(axis=-1), 1.0, atol=1e-5)


def test_every_road_through_the_model_gives_the_same_probabilities(signatures, encoded):
    served = signatures["serving_default"](image_bytes=tf.constant(encoded))["probabilities"]
    evaluated = signatures["examples"](examples=_serialized(encoded))["probabilities"]
    images = signatures["explain_preprocess"](image_bytes=tf.constant(encoded))["images"]
    explained = signatures["explain_model"](images=images)["probabilities"]

    np.testing.assert_allclose(evaluated, served, atol=1e-5)
    np.testing.assert_allclose(explained, served, atol=1e-5)


def test_serving_default_gives_an_image_the_same_answer_in_any_batch(signatures, encoded):
    serve = signatures["serving_default"]
    together = serve(image_bytes=tf.constant(encoded))["probabilities"]

    for position, image in enumerate(encoded):
        alone = serve(image_bytes=tf.constant([image]))["probabilities"]
        np.testing.assert_allclose(alone[0], together[position], atol=1e-5)


def test_serving_default_refuses_what_is_no_image(signatures):
    with pytest.raises(tf.errors.InvalidArgumentError):
        signatures["serving_default"](image_bytes=tf.constant([b"no image"]))


def test_transform_features_gives_labels_without_looking_at_the_image(signatures):
    serialized = _serialized([b"", b"no image", b""], ["square", "circle", "triangle"])

    np.testing.assert_array_equal(signatures["transform_features"](examples=serialized)["label_xf"], [1, 0, -1])


def test_explain_model_has_a_gradient_with_respect_to_the_image(signatures, encoded):
    images = signatures["explain_preprocess"](image_bytes=tf.constant(encoded))["images"]

    with tf.GradientTape() as tape:
        tape.watch(images)
        probability = signatures["explain_model"](images=images)["probabilities"][:, 0]
    gradient = tape.gradient(probability, images)

    assert gradient.shape == images.shape
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0


def test_halves_of_the_network_give_its_answers(signatures, classifier, encoded):
    images = decode_images(tf.constant(encoded), image_size=TRANSFORM_IMAGE_SIZE)

    maps = signatures["explain_feature_maps"](images=images)
    answer = signatures["explain_head"](**maps)

    expected = np.asarray(classifier([images], training=False))
    assert np.ptp(expected[:, 0]) > 0.01
    np.testing.assert_allclose(answer["probabilities"], expected, atol=1e-5)
    np.testing.assert_allclose(tf.nn.softmax(answer["logits"]), expected, atol=1e-5)
    for name in maps:  # each is read
        without = signatures["explain_head"](**(maps | {name: tf.zeros_like(maps[name])}))
        assert np.abs(without["probabilities"] - expected).max() > 1e-4, name


class _MeanColour(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec([None, TRANSFORM_IMAGE_SIZE, TRANSFORM_IMAGE_SIZE, 3], tf.float32)])
    def __call__(self, images):
        return tf.reduce_mean(images, axis=(1, 2))


def test_signatures_of_a_hub_model_are_without_halves(tmp_path, transform_graph, encoded):
    tf.saved_model.save(_MeanColour(), str(tmp_path / "hub"))
    config = ModelConfig(backbone=str(tmp_path / "hub"), hidden_units=0)
    statistics = build_statistics(config, image_size=TRANSFORM_IMAGE_SIZE)
    images = decode_images(tf.constant(encoded), image_size=TRANSFORM_IMAGE_SIZE)
    projection = fit_projection(np.asarray(statistics([images], training=False)), num_components=2)
    network = join(statistics, projection, build_head(config, num_components=2, num_classes=2))
    export(ImageClassifier(network, TransformGraph(transform_graph), CLASS_NAMES), str(tmp_path / "model"))

    model = ExplainableModel(str(tmp_path / "model"))

    np.testing.assert_allclose(model.probabilities(images), np.asarray(network([images], training=False)), atol=1e-5)
    with pytest.raises(
        InputError, match=r"Received: .* a model whose backbone gives no feature maps\. Take integrated_gradients"
    ):
        model.feature_map_gradients(images[0].numpy(), 0)


def test_saved_model_runs_in_a_process_with_tensorflow_alone(saved_model, signatures, photograph, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-c", LOAD_WITH_TENSORFLOW_ALONE, str(saved_model), str(photograph)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["ours"] == []
    expected = signatures["serving_default"](image_bytes=tf.constant([photograph.read_bytes()]))["probabilities"]
    np.testing.assert_allclose(found["probabilities"], expected, atol=1e-5)
