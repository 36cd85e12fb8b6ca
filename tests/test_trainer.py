import json

import keras
import numpy as np
import pytest
from conftest import CLASS_NAMES, TRANSFORM_IMAGE_SIZE

from models.classifier import ModelConfig, build_statistics, fit_projection
from models.devices import DeviceConfig
from models.trainer import (
    Embeddings,
    TrainerConfig,
    TrainingConfig,
    compute_statistics,
    read_images,
    train_head,
    write_embeddings,
)
from preprocessing.images import PreprocessingConfig
from preprocessing.transform import TransformGraph


def _config(**training) -> TrainerConfig:
    return TrainerConfig(
        class_names=CLASS_NAMES,
        preprocessing=PreprocessingConfig(image_size=TRANSFORM_IMAGE_SIZE),
        model=ModelConfig(weights="random", hidden_units=0),
        training=TrainingConfig(**{"epochs": 20, "patience": 20, "batch_size": 32, "learning_rate": 0.02} | training),
        devices=DeviceConfig(accelerator="cpu"),
        code="",
    )


def _embeddings(path, features: np.ndarray, labels) -> Embeddings:
    features.astype(np.float32).tofile(path)
    return Embeddings(np.memmap(path, np.float32, mode="r", shape=features.shape), np.asarray(labels, np.int64))


def _separable(path, *, num_images: int, seed: int) -> Embeddings:
    """Two clouds that a linear head tells apart."""
    random = np.random.default_rng(seed)
    labels = np.arange(num_images) % 2
    centres = np.where(labels[:, np.newaxis] == 0, 1.0, -1.0)
    return _embeddings(path, centres + random.normal(scale=0.3, size=(num_images, 8)), labels)


@pytest.fixture(scope="module")
def transform(transform_graph) -> TransformGraph:
    return TransformGraph(transform_graph)


@pytest.fixture(scope="module")
def statistics() -> keras.Model:
    keras.utils.set_random_seed(0)
    return build_statistics(ModelConfig(weights="random", num_feature_maps=1), image_size=TRANSFORM_IMAGE_SIZE)


@pytest.fixture(scope="module")
def colours() -> tuple[list[np.ndarray], list[str]]:
    """Forty images of 32 pixels whose classes are dark and bright noise."""
    random = np.random.default_rng(0)
    bounds = [(0, 90) if number % 2 else (150, 256) for number in range(40)]
    return (
        [random.integers(*limits, (32, 32, 3), np.uint8) for limits in bounds],
        [CLASS_NAMES[number % 2] for number in range(40)],
    )


@pytest.fixture(scope="module")
def records(tmp_path_factory, write_records, colours) -> list[str]:
    """Two files of records; the second one is short."""
    folder = tmp_path_factory.mktemp("records")
    images, labels = colours
    write_records(folder / "train-00001-of-00002.tfrecord.gz", images[35:], labels[35:])
    write_records(folder / "train-00000-of-00002.tfrecord.gz", images[:35], labels[:35])
    return [str(folder / "train-*.gz")]


def test_read_images_gives_the_records_in_their_order(transform, records, colours):
    batches = list(read_images(transform, records))

    images = np.concatenate([images for images, _ in batches])
    labels = np.concatenate([labels for _, labels in batches])
    np.testing.assert_allclose(images, np.stack(colours[0]), atol=1e-3)
    np.testing.assert_array_equal(labels, [number % 2 for number in range(40)])


def test_compute_statistics_gives_a_row_for_every_image(statistics, transform, records, colours):
    batches = list(compute_statistics(statistics, transform, records, split="train"))

    rows = np.concatenate([rows for rows, _ in batches])
    expected = np.asarray(statistics([np.stack(colours[0]).astype(np.float32)], training=False))
    assert len(batches) > 1
    # Squared, as a square root makes much of a difference between values near zero.
    np.testing.assert_allclose(np.square(rows), np.square(expected), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), np.arange(40) % 2)


def test_compute_statistics_refuses_a_label_that_is_not_in_the_list(tmp_path, statistics, transform, write_records, colours):
    path = write_records(tmp_path / "records.gz", colours[0][:2], ["circle", "triangle"])

    with pytest.raises(ValueError, match=r"^Expected labels of labels.txt only. Received: a record with another one"):
        list(compute_statistics(statistics, transform, [path], split="train"))


def test_compute_statistics_refuses_files_without_images(tmp_path, statistics, transform, write_records):
    path = write_records(tmp_path / "records.gz", [], [])

    with pytest.raises(ValueError, match=f"^Expected images in {path}. Received: none.$"):
        list(compute_statistics(statistics, transform, [path], split="train"))


def test_write_embeddings_keeps_the_projected_statistics_on_disk(tmp_path):
    rows = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    labels = np.arange(50) % 3
    projection = fit_projection(rows, num_components=4)
    path = tmp_path / "train"

    found = write_embeddings(
        str(path), ((rows[start : start + 20], labels[start : start + 20]) for start in (0, 20, 40)), projection
    )

    assert isinstance(found.features, np.memmap)
    assert found.features.shape == (50, 4)
    assert path.stat().st_size == 50 * 4 * 4
    np.testing.assert_allclose(found.features, projection(rows), atol=1e-5)
    np.testing.assert_array_equal(found.labels, labels)


def test_train_head_learns_to_tell_the_classes_apart(tmp_path):
    train = _separable(tmp_path / "train", num_images=64, seed=0)
    valid = _separable(tmp_path / "valid", num_images=32, seed=1)

    head, history = train_head(_config(), train, valid)

    predictions = np.asarray(head(np.asarray(valid.features), training=False)).argmax(axis=-1)
    np.testing.assert_array_equal(predictions, valid.labels)
    assert history["val_accuracy"][-1] == 1.0
    assert history["val_loss"][-1] < history["val_loss"][0]
    # What the report draws, in numbers that JSON can hold.
    assert {"loss", "accuracy", "val_loss", "val_accuracy"} <= set(history)
    assert {len(values) for values in history.values()} == {20}
    assert json.loads(json.dumps(history)) == history


def test_train_head_repeats_with_the_same_seed(tmp_path):
    train = _separable(tmp_path / "train", num_images=32, seed=0)
    losses = []
    for _ in range(2):
        keras.utils.set_random_seed(3)
        losses.append(train_head(_config(epochs=3, seed=3), train, train)[1]["loss"])

    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


def test_train_head_stops_early_and_keeps_the_best_weights(tmp_path):
    # The labels of the validation images are the wrong way round, so its first epoch is its best.
    train = _separable(tmp_path / "train", num_images=64, seed=0)
    valid = _separable(tmp_path / "valid", num_images=32, seed=1)
    valid = Embeddings(valid.features, 1 - valid.labels)

    head, history = train_head(_config(patience=2, label_smoothing=0.0), train, valid)

    assert len(history["val_loss"]) == 3
    logits = np.asarray(head(np.asarray(valid.features), training=False), np.float64)
    likelihoods = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    loss = -likelihoods[np.arange(32), valid.labels].mean()
    assert loss == pytest.approx(min(history["val_loss"]), rel=0.05)
    assert loss < history["val_loss"][-1]


def test_train_head_gives_a_rare_class_its_weight(tmp_path):
    # A feature that says nothing: the best answer is the frequency of each class, or one half where they are balanced.
    labels = np.array([1] * 8 + [0] * 56)
    train = _embeddings(tmp_path / "train", np.random.default_rng(0).normal(size=(64, 1)), labels)
    rare = {}
    for class_balance in (0.0, 1.0):
        settings = {"weight_decay": 0.0, "label_smoothing": 0.0, "mixup": 0.0, "class_balance": class_balance}
        config = _config(learning_rate=0.2, batch_size=64, **settings)
        head, _ = train_head(config, train, train)
        logits = np.asarray(head(np.zeros((1, 1), np.float32), training=False))[0]
        rare[class_balance] = 1 / (1 + np.exp(logits[0] - logits[1]))

    assert rare[0.0] == pytest.approx(8 / 64, abs=0.08)
    assert rare[1.0] == pytest.approx(0.5, abs=0.12)


def test_train_head_refuses_to_train_without_a_class(tmp_path):
    train = _embeddings(tmp_path / "train", np.ones((4, 2)), [0, 0, 0, 0])

    with pytest.raises(ValueError, match=r"^Expected training images of every class."):
        train_head(_config(), train, train)


def test_train_head_stops_at_a_loss_that_is_no_number(tmp_path):
    train = _separable(tmp_path / "train", num_images=32, seed=0)

    with pytest.raises(ValueError, match=r"^Expected a finite loss. Received: NaN. Lower training.learning_rate.$"):
        train_head(_config(learning_rate=1e38), train, train)


@pytest.mark.parametrize("setting", ["epochs", "patience", "batch_size", "learning_rate"])
def test_training_config_refuses_zero(setting):
    with pytest.raises(ValueError, match=setting):
        TrainingConfig(**{setting: 0})
