from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import TRANSFORM_IMAGE_SIZE, trainer_config

from models.embeddings import find_images
from models.reference import NUM_REFERENCE_IMAGES, REFERENCE_FILE, write_reference_predictions
from models.trainer import run_fn
from preprocessing.images import decode_images
from preprocessing.transform import TransformGraph


@pytest.fixture(scope="module")
def network() -> keras.Model:
    """A small network whose answers differ from image to image."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((TRANSFORM_IMAGE_SIZE, TRANSFORM_IMAGE_SIZE, 3)),
            layers.Rescaling(1 / 32),
            layers.Conv2D(8, 3, 2, activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(2, activation="softmax"),
        ]
    )


def _read(path: str) -> list[tuple[bytes, str, list[float]]]:
    """Reads references: image, filename and probabilities of each."""
    read = []
    for record in tf.data.TFRecordDataset(path, "GZIP").as_numpy_iterator():
        features = tf.train.Example.FromString(record).features.feature
        assert set(features) == {"image", "filename", "probabilities"}
        read.append(
            (
                features["image"].bytes_list.value[0],
                features["filename"].bytes_list.value[0].decode(),
                list(features["probabilities"].float_list.value),
            )
        )
    return read


def test_write_reference_predictions_keeps_the_records_and_what_the_network_answers(
    network, transform_graph, shape_records, tmp_path
):
    images = find_images([shape_records["valid"]], split="valid")

    path = write_reference_predictions(network, TransformGraph(transform_graph), images, folder=str(tmp_path))

    assert [entry.name for entry in tmp_path.iterdir()] == [REFERENCE_FILE] == [Path(path).name]
    encoded, filenames, probabilities = zip(*_read(path), strict=True)
    records = tf.data.TFRecordDataset(list(images.files), "GZIP").as_numpy_iterator()
    examples = [tf.train.Example.FromString(record).features.feature for record in records]
    assert list(encoded) == [example["image"].bytes_list.value[0] for example in examples]
    assert filenames == tuple(f"{number}.png" for number in range(9)) * 2
    expected = np.asarray(network(decode_images(tf.constant(encoded), image_size=TRANSFORM_IMAGE_SIZE), training=False))
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)
    assert np.ptp(expected[:, 0]) > 0.01


def test_write_reference_predictions_takes_the_first_images_of_many(network, transform_graph, write_records, tmp_path):
    random = np.random.default_rng(0)
    pictures = list(random.integers(0, 256, (NUM_REFERENCE_IMAGES + 5, 8, 8, 3), np.uint8))
    records = write_records(tmp_path / "valid.tfrecord.gz", pictures, ["circle"] * len(pictures))

    path = write_reference_predictions(
        network, TransformGraph(transform_graph), find_images([records], split="valid"), folder=str(tmp_path)
    )

    assert [filename for _, filename, _ in _read(path)] == [f"{number}.png" for number in range(NUM_REFERENCE_IMAGES)]


def test_run_fn_leaves_references_that_the_exported_model_agrees_with(shape_records, transform_graph, tmp_path):
    (tmp_path / "run").mkdir()
    arguments = {
        "custom_config": {"trainer": trainer_config(fine_tuning={"epochs": 0}).model_dump(mode="json")},
        "hyperparameters": None,
        "transform_graph_path": transform_graph,
        "train_files": [shape_records["train"]],
        "eval_files": [shape_records["valid"]],
        "model_run_dir": str(tmp_path / "run"),
        "serving_model_dir": str(tmp_path / "model"),
        "base_model": None,
    }

    run_fn(SimpleNamespace(**arguments))

    encoded, _, probabilities = zip(*_read(str(tmp_path / "run" / REFERENCE_FILE)), strict=True)
    assert len(encoded) == 18
    model = tf.saved_model.load(str(tmp_path / "model"))
    served = model.signatures["serving_default"](image_bytes=tf.constant(encoded))["probabilities"]
    np.testing.assert_allclose(served, probabilities, atol=1e-5)
