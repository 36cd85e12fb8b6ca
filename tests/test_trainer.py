import json
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASS_NAMES, TRANSFORM_IMAGE_SIZE

from models.classifier import ModelConfig, build_embedding
from models.devices import DeviceConfig
from models.trainer import (
    CONFIG_KEY,
    HISTORY_FILE,
    Embeddings,
    TrainerConfig,
    TrainingConfig,
    embed,
    read_images,
    run_fn,
    train_head,
)
from preprocessing.images import PreprocessingConfig
from preprocessing.transform import TransformGraph


def _config(*, weights: str = "random", **training) -> TrainerConfig:
    return TrainerConfig(
        class_names=CLASS_NAMES,
        preprocessing=PreprocessingConfig(image_size=TRANSFORM_IMAGE_SIZE),
        model=ModelConfig(weights=weights, num_feature_maps=1),
        training=TrainingConfig(**{"epochs": 20, "patience": 20, "batch_size": 32, "learning_rate": 0.02} | training),
        devices=DeviceConfig(accelerator="cpu"),
        code="",
    )


def _embeddings(path, features: np.ndarray, labels) -> Embeddings:
    features.astype(np.float32).tofile(path)
    return Embeddings(str(path), features.shape[1], np.asarray(labels, np.int64))


def _separable(path, *, num_images: int, seed: int) -> Embeddings:
    """Two clouds that a linear head tells apart."""
    random = np.random.default_rng(seed)
    labels = np.arange(num_images) % 2
    centres = np.where(labels[:, np.newaxis] == 0, 1.0, -1.0)
    return _embeddings(path, 100 + 10 * (centres + random.normal(scale=0.3, size=(num_images, 8))), labels)


@pytest.fixture(scope="module")
def transform(transform_graph) -> TransformGraph:
    return TransformGraph(transform_graph)


@pytest.fixture(scope="module")
def embedding() -> keras.Model:
    keras.utils.set_random_seed(0)
    return build_embedding(ModelConfig(weights="random", num_feature_maps=1), image_size=TRANSFORM_IMAGE_SIZE)


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


def test_embed_keeps_the_features_of_every_image_on_disk(tmp_path, embedding, transform, records, colours):
    path = tmp_path / "train"

    found = embed(embedding, transform, records, str(path))

    assert isinstance(found.features, np.memmap)
    assert found.features.shape == (40, embedding.output_shape[-1])
    assert path.stat().st_size == found.features.size * 4
    np.testing.assert_array_equal(found.labels, [number % 2 for number in range(40)])
    expected = embedding(np.stack(colours[0]).astype(np.float32), training=False)
    np.testing.assert_allclose(found.features, expected, rtol=1e-3, atol=1e-4)


def test_embed_refuses_a_label_that_is_not_in_the_list(tmp_path, embedding, transform, write_records, colours):
    path = write_records(tmp_path / "records.gz", colours[0][:2], ["circle", "triangle"])

    with pytest.raises(ValueError, match=r"^Expected labels of labels.txt only. Received: a record with another one"):
        embed(embedding, transform, [path], str(tmp_path / "train"))


def test_embed_refuses_files_without_images(tmp_path, embedding, transform, write_records):
    path = write_records(tmp_path / "records.gz", [], [])

    with pytest.raises(ValueError, match=f"^Expected images in {path}. Received: none.$"):
        embed(embedding, transform, [path], str(tmp_path / "train"))


def test_embeddings_moments_agree_with_numpy(tmp_path):
    # More rows than are added up at a time, and a mean that is large beside the deviation.
    features = np.random.default_rng(0).normal(5.0, 0.5, (2500, 3)).astype(np.float32)
    embeddings = _embeddings(tmp_path / "train", features, np.zeros(2500))

    mean, variance = embeddings.moments()

    np.testing.assert_allclose(mean, features.astype(np.float64).mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(variance, features.astype(np.float64).var(axis=0), rtol=1e-7)


def test_embeddings_moments_of_a_constant_feature_have_no_variance(tmp_path):
    _, variance = _embeddings(tmp_path / "train", np.full((10, 2), 0.1), np.zeros(10)).moments()

    np.testing.assert_allclose(variance, [0.0, 0.0], atol=1e-12)
    assert (variance >= 0).all()


def test_train_head_learns_to_tell_the_classes_apart(tmp_path):
    train = _separable(tmp_path / "train", num_images=64, seed=0)
    valid = _separable(tmp_path / "valid", num_images=32, seed=1)

    head, history = train_head(_config(), train, valid)

    predictions = np.asarray(head(np.asarray(valid.features), training=False)).argmax(axis=-1)
    np.testing.assert_array_equal(predictions, valid.labels)
    assert history["val_accuracy"][-1] == 1.0
    assert history["val_loss"][-1] < history["val_loss"][0]


def test_train_head_gives_its_history_as_plain_numbers(tmp_path):
    train = _separable(tmp_path / "train", num_images=20, seed=0)

    _, history = train_head(_config(epochs=3), train, train)

    assert {"loss", "accuracy", "val_loss", "val_accuracy"} <= set(history)
    assert {len(values) for values in history.values()} == {3}
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
    valid.labels = 1 - valid.labels

    head, history = train_head(_config(patience=2), train, valid)

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
    for balance_classes in (False, True):
        config = _config(learning_rate=0.2, batch_size=64, weight_decay=0.0, balance_classes=balance_classes)
        head, _ = train_head(config, train, train)
        logits = np.asarray(head(np.zeros((1, 1), np.float32), training=False))[0]
        rare[balance_classes] = 1 / (1 + np.exp(logits[0] - logits[1]))

    assert rare[False] == pytest.approx(8 / 64, abs=0.08)
    assert rare[True] == pytest.approx(0.5, abs=0.12)


def test_train_head_refuses_to_train_without_a_class(tmp_path):
    train = _embeddings(tmp_path / "train", np.ones((4, 2)), [0, 0, 0, 0])

    with pytest.raises(ValueError, match=r"^Expected training images of every class."):
        train_head(_config(), train, train)


def test_train_head_stops_at_a_loss_that_is_no_number(tmp_path):
    train = _separable(tmp_path / "train", num_images=32, seed=0)

    with pytest.raises(ValueError, match=r"^Expected a finite loss. Received: NaN. Lower training.learning_rate.$"):
        train_head(_config(learning_rate=1e38), train, train)


def test_run_fn_trains_and_exports_what_it_is_told(tmp_path, transform_graph, records, colours, encode):
    fn_args = SimpleNamespace(
        custom_config={CONFIG_KEY: _config(weights="imagenet", epochs=10).model_dump(mode="json")},
        transform_graph_path=transform_graph,
        train_files=records,
        eval_files=records,
        model_run_dir=str(tmp_path / "run"),
        serving_model_dir=str(tmp_path / "model"),
    )

    run_fn(fn_args)

    history = json.loads((tmp_path / "run" / HISTORY_FILE).read_text())
    assert {"loss", "accuracy", "val_loss", "val_accuracy"} <= set(history)
    serve = tf.saved_model.load(tmp_path / "model").signatures["serving_default"]
    answer = serve(image_bytes=tf.constant([encode(image) for image in colours[0]]))
    labels = [label.decode() for label in answer["label"].numpy()]
    assert np.mean([found == label for found, label in zip(labels, colours[1], strict=True)]) > 0.9


@pytest.mark.parametrize("setting", ["epochs", "patience", "batch_size", "learning_rate"])
def test_training_config_refuses_zero(setting):
    with pytest.raises(ValueError, match=setting):
        TrainingConfig(**{setting: 0})
