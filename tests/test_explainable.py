from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from two_objects import SIZE, export_network, make_picture

from data.errors import InputError
from models.explainable import ExplainableModel, find_saved_model
from preprocessing.images import decode_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return export_network(tmp_path_factory.mktemp("two_objects") / "model")


@pytest.fixture(scope="module")
def model(folder) -> ExplainableModel:
    return ExplainableModel(str(folder))


def test_gradients_are_those_of_small_changes(model):
    image = make_picture().astype(np.float32)

    gradient = model.gradients(image[np.newaxis], 1)[0]

    direction = 0.5 * gradient / np.linalg.norm(gradient)
    higher, lower = model.probabilities(np.stack([image + direction, image - direction]))[:, 1]
    assert np.linalg.norm(gradient) == pytest.approx(higher - lower, rel=0.05)
    assert higher > lower


def test_feature_map_gradients_are_those_of_the_logarithm_of_the_odds(model):
    image = make_picture().astype(np.float32)

    found = model.feature_map_gradients(image, 1)

    ((values, gradients),) = found.values()
    assert values.shape == gradients.shape == (SIZE, SIZE, 2)
    # The logits are the signed square roots of the means: x / sqrt(x + 0.001), of one class for and of the other against.
    means = values.mean(axis=(0, 1))
    slopes = ((means + 0.002) / 2 / (means + 1e-3) ** 1.5) * [-1, 1] / SIZE**2
    np.testing.assert_allclose(gradients, np.broadcast_to(slopes, gradients.shape), rtol=1e-4)


def test_on_gradients_hears_of_every_image(model):
    heard = []
    model.on_gradients = heard.append
    try:
        model.gradients(np.zeros((3, SIZE, SIZE, 3)), 0)
        model.feature_map_gradients(np.zeros((SIZE, SIZE, 3)), 0)
    finally:
        model.on_gradients = None

    assert heard == [3, 1]


def test_preprocess_is_that_of_serving(model, photograph):
    encoded = photograph.read_bytes()

    images = model.preprocess([encoded, encoded])

    np.testing.assert_allclose(images[1], decode_images(tf.constant([encoded]), image_size=SIZE)[0], atol=1e-3)
    assert images.shape == (2, SIZE, SIZE, 3)


def test_explainable_model_knows_its_classes_and_its_fingerprint(model, folder):
    assert model.class_names == ["circle", "square"]
    assert model.num_classes == 2
    assert model.fingerprint == tf.saved_model.experimental.read_fingerprint(str(folder)).singleprint()


def test_explainable_model_does_without_a_fingerprint(tmp_path):
    path = export_network(tmp_path / "model")
    (path / "fingerprint.pb").unlink()

    assert ExplainableModel(str(path)).fingerprint is None


def test_feature_map_gradients_say_what_a_model_lacks(tmp_path):
    model = ExplainableModel(str(export_network(tmp_path / "vectors", has_maps=False)))
    with pytest.raises(
        InputError, match=r"Received: .* a model whose backbone gives no feature maps\. Take integrated_gradients"
    ):
        model.feature_map_gradients(np.zeros((SIZE, SIZE, 3)), 0)

    loaded = tf.saved_model.load(str(tmp_path / "vectors"))
    earlier = {name: loaded.signatures[name] for name in ("serving_default", "explain_preprocess", "explain_model")}
    tf.saved_model.save(loaded, str(tmp_path / "earlier"), signatures=earlier)
    model = ExplainableModel(str(tmp_path / "earlier"))
    with pytest.raises(
        InputError, match=r"a model exported by an earlier version\. Train or export it again, or take integrated"
    ):
        model.feature_map_gradients(np.zeros((SIZE, SIZE, 3)), 0)


def test_explainable_model_refuses_what_is_no_such_model(tmp_path):
    with pytest.raises(InputError, match=r"Expected a SavedModel with .* Received: '.*nowhere', which cannot be loaded"):
        ExplainableModel(str(tmp_path / "nowhere"))
    (tmp_path / "saved_model.pb").write_bytes(b"no model")
    with pytest.raises(InputError, match="which cannot be loaded"):
        ExplainableModel(str(tmp_path))
    tf.saved_model.save(tf.Module(), str(tmp_path / "bare"))
    with pytest.raises(InputError, match=r"Received: '.*bare' with none\. Take the folder"):
        ExplainableModel(str(tmp_path / "bare"))


def test_find_saved_model_takes_the_highest_version(tmp_path):
    for version in ("9", "10", "11.pushing", "12"):
        (tmp_path / version).mkdir()
    for version in ("9", "10", "11.pushing"):
        (tmp_path / version / "saved_model.pb").touch()

    assert find_saved_model(str(tmp_path)) == str(tmp_path / "10")  # a server does not load the others
    assert find_saved_model(str(tmp_path / "9")) == str(tmp_path / "9")


def test_find_saved_model_refuses_a_folder_without_one(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"Expected a SavedModel's folder.* Received: .*Give the serving_model folder"):
            find_saved_model(str(path))
