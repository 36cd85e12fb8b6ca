import json

import keras
import numpy as np
import pytest

from models.classifier import ModelConfig, build_head
from models.devices import DeviceConfig, configure_devices
from models.embeddings import Embeddings
from models.head import HEAD, TrainingConfig, train_head


def _settings(**training) -> TrainingConfig:
    return TrainingConfig(**{"epochs": 20, "patience": 20, "batch_size": 32, "learning_rate": 0.02} | training)


@pytest.fixture
def run_head(tmp_path):
    """Trains a linear head of two classes; gives it and its history."""

    def run(settings: TrainingConfig, train: Embeddings, valid: Embeddings, *, folder: str = "run"):
        keras.utils.set_random_seed(settings.seed)
        head = build_head(ModelConfig(hidden_units=0), num_components=train.features.shape[1], num_classes=2)
        devices = configure_devices(DeviceConfig(accelerator="cpu"))
        return head, train_head(settings, head, train=train, valid=valid, devices=devices, folder=str(tmp_path / folder))

    return run


def _embeddings(path, features: np.ndarray, labels) -> Embeddings:
    features.astype(np.float32).tofile(path)
    return Embeddings(np.memmap(path, np.float32, mode="r", shape=features.shape), np.asarray(labels, np.int64))


def _separable(path, *, num_images: int, seed: int) -> Embeddings:
    """Two clouds that a linear head tells apart."""
    random = np.random.default_rng(seed)
    labels = np.arange(num_images) % 2
    centres = np.where(labels[:, np.newaxis] == 0, 1.0, -1.0)
    return _embeddings(path, centres + random.normal(scale=0.3, size=(num_images, 8)), labels)


def test_train_head_learns_to_tell_the_classes_apart(tmp_path, run_head):
    train = _separable(tmp_path / "train", num_images=64, seed=0)
    valid = _separable(tmp_path / "valid", num_images=32, seed=1)

    head, history = run_head(_settings(), train, valid)

    predictions = np.asarray(head(np.asarray(valid.features), training=False)).argmax(axis=-1)
    np.testing.assert_array_equal(predictions, valid.labels)
    assert history["val_accuracy"][-1] == 1.0
    assert history["val_loss"][-1] < history["val_loss"][0]
    # What the report draws, in numbers that JSON can hold.
    assert {"loss", "accuracy", "val_loss", "val_accuracy"} <= set(history)
    assert {len(values) for values in history.values()} == {20}
    assert set(history["stage"]) == {HEAD}
    assert json.loads(json.dumps(history)) == history


def test_train_head_repeats_with_the_same_seed(tmp_path, run_head):
    train = _separable(tmp_path / "train", num_images=32, seed=0)
    losses = [run_head(_settings(epochs=3, seed=3), train, train, folder=f"run{number}")[1]["loss"] for number in range(2)]

    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


def test_train_head_stops_early_and_keeps_the_best_weights(tmp_path, run_head):
    # The labels of the validation images are the wrong way round, so its first epoch is its best.
    train = _separable(tmp_path / "train", num_images=64, seed=0)
    valid = _separable(tmp_path / "valid", num_images=32, seed=1)
    valid = Embeddings(valid.features, 1 - valid.labels)

    head, history = run_head(_settings(patience=2, label_smoothing=0.0), train, valid)

    assert len(history["val_loss"]) == 3
    logits = np.asarray(head(np.asarray(valid.features), training=False), np.float64)
    likelihoods = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    loss = -likelihoods[np.arange(32), valid.labels].mean()
    assert loss == pytest.approx(min(history["val_loss"]), rel=1e-4)
    assert loss < history["val_loss"][-1]


def test_train_head_gives_a_rare_class_its_weight(tmp_path, run_head):
    # A feature that says nothing: the best answer is the frequency of each class, or one half where they are balanced.
    labels = np.array([1] * 8 + [0] * 56)
    train = _embeddings(tmp_path / "train", np.random.default_rng(0).normal(size=(64, 1)), labels)
    rare = {}
    for class_balance in (0.0, 1.0):
        settings = {"weight_decay": 0.0, "label_smoothing": 0.0, "mixup": 0.0, "class_balance": class_balance}
        settings = _settings(learning_rate=0.2, batch_size=64, **settings)
        head, _ = run_head(settings, train, train, folder=f"run{class_balance}")
        logits = np.asarray(head(np.zeros((1, 1), np.float32), training=False))[0]
        rare[class_balance] = 1 / (1 + np.exp(logits[0] - logits[1]))

    assert rare[0.0] == pytest.approx(8 / 64, abs=0.08)
    assert rare[1.0] == pytest.approx(0.5, abs=0.12)


def test_train_head_refuses_to_train_without_a_class(tmp_path, run_head):
    train = _embeddings(tmp_path / "train", np.ones((4, 2)), [0, 0, 0, 0])

    with pytest.raises(ValueError, match=r"^Expected training images of every class."):
        run_head(_settings(), train, train)


def test_train_head_stops_at_a_loss_that_is_no_number(tmp_path, run_head):
    train = _separable(tmp_path / "train", num_images=32, seed=0)

    with pytest.raises(
        ValueError, match=r"^Expected a finite loss. Received: (nan|inf) in epoch \d+ of head. Lower training.learning_rate.$"
    ):
        run_head(_settings(learning_rate=1e38), train, train)


@pytest.mark.parametrize("setting", ["epochs", "patience", "batch_size", "learning_rate"])
def test_training_config_refuses_zero(setting):
    with pytest.raises(ValueError, match=setting):
        TrainingConfig(**{setting: 0})
