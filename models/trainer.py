"""`run_fn`, the Trainer component's entry: embeds every image once, trains the head on the embeddings, exports.

The backbone is frozen, so an image's embedding never changes: 2,600 images take about 25 seconds on two CPU cores, after
which an epoch of the head takes a fraction of a second, where a plain training loop runs the backbone in every epoch.
"""

import json
import logging
import os
import tempfile
import time
from typing import Any

import keras
import numpy as np
import pydantic
import tensorflow as tf

from data.features import IMAGE_KEY, LABEL_KEY
from models.classifier import ModelConfig, build_embedding, build_head, class_weights, join
from models.devices import DeviceConfig, configure_devices
from models.signatures import ImageClassifier, export
from preprocessing.images import NUM_CHANNELS, PreprocessingConfig
from preprocessing.transform import TransformGraph

logger = logging.getLogger("tfx_vision")

HISTORY_FILE = "history.json"
_EMBEDDING_BATCH_SIZE = 32
_REPORT_SECONDS = 2.0


class TrainingConfig(pydantic.BaseModel):
    """How the head is trained.

    Attributes:
      epochs: passes over the training embeddings, at most.
      patience: epochs without a better validation loss after which training stops; the best weights are kept.
      batch_size: images a step.
      learning_rate: of AdamW, at its start; it falls to zero along a cosine.
      weight_decay: of AdamW.
      label_smoothing: share of the target spread over all classes, in [0, 1).
      balance_classes: weigh each class by the inverse of its frequency.
      seed: of the initialization, dropout and the order of the images.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    epochs: int = pydantic.Field(40, ge=1)
    patience: int = pydantic.Field(10, ge=1)
    batch_size: int = pydantic.Field(64, ge=1)
    learning_rate: float = pydantic.Field(1e-3, gt=0)
    weight_decay: float = pydantic.Field(1e-2, ge=0)
    label_smoothing: float = pydantic.Field(0.0, ge=0, lt=1)
    balance_classes: bool = True
    seed: int = pydantic.Field(0, ge=0)


class TrainerConfig(pydantic.BaseModel):
    """All that the trainer is told, as it crosses into the component as JSON.

    Attributes:
      class_names: the ordered class list.
      preprocessing: decode and resize.
      model: the network.
      training: the head's training.
      devices: what to compute on.
      code: fingerprint of the code behind `run_fn`, which TFX's cache would not see otherwise.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    class_names: tuple[str, ...]
    preprocessing: PreprocessingConfig
    model: ModelConfig
    training: TrainingConfig
    devices: DeviceConfig
    code: str


CONFIG_KEY = "trainer"


class Embeddings:
    """The embeddings of one split, on disk: memory does not grow with the number of images.

    Attributes:
      features: float32 [num_images, num_features], mapped from its file.
      labels: int64 [num_images].
    """

    def __init__(self, path: str, num_features: int, labels: np.ndarray):
        self.labels = labels
        self.features = np.memmap(path, np.float32, mode="r", shape=(len(labels), num_features))

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns mean and variance of each feature, float64 [num_features]."""
        total = np.zeros(self.features.shape[1])
        squares = np.zeros(self.features.shape[1])
        for start in range(0, len(self.labels), 1024):
            chunk = self.features[start : start + 1024].astype(np.float64)
            total += chunk.sum(axis=0)
            squares += np.square(chunk).sum(axis=0)
        mean = total / len(self.labels)
        return mean, np.maximum(squares / len(self.labels) - np.square(mean), 0.0)


class _Batches(keras.utils.PyDataset):
    """Batches of embeddings with one-hot labels and weights, in a new order every epoch where a seed is given."""

    def __init__(self, embeddings: Embeddings, weights: list[float], batch_size: int, seed: int | None = None):
        super().__init__()
        self._embeddings = embeddings
        self._weights = np.asarray(weights, np.float32)
        self._batch_size = batch_size
        self._random = None if seed is None else np.random.default_rng(seed)
        self._order = np.arange(len(embeddings.labels))
        self.on_epoch_end()

    def __len__(self) -> int:
        return -(-len(self._order) // self._batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = np.sort(self._order[index * self._batch_size : (index + 1) * self._batch_size])
        labels = self._embeddings.labels[rows]
        targets = np.eye(len(self._weights), dtype=np.float32)[labels]
        return self._embeddings.features[rows], targets, self._weights[labels]

    def on_epoch_end(self) -> None:
        if self._random is not None:
            self._random.shuffle(self._order)


def run_fn(fn_args: Any) -> None:
    """Trains and exports; TFX calls it.

    Args:
      fn_args: `tfx.components.FnArgs`; its `custom_config` holds a `TrainerConfig` as JSON under `trainer`.
    """
    config = TrainerConfig.model_validate(fn_args.custom_config[CONFIG_KEY])
    keras.utils.set_random_seed(config.training.seed)
    device = configure_devices(config.devices)
    transform = TransformGraph(fn_args.transform_graph_path)
    with tf.device(device), tempfile.TemporaryDirectory() as folder:
        embedding = build_embedding(config.model, image_size=config.preprocessing.image_size)
        train = embed(embedding, transform, fn_args.train_files, os.path.join(folder, "train"))
        valid = embed(embedding, transform, fn_args.eval_files, os.path.join(folder, "valid"))
        head, history = train_head(config, train, valid)
    tf.io.gfile.makedirs(fn_args.model_run_dir)
    with tf.io.gfile.GFile(os.path.join(fn_args.model_run_dir, HISTORY_FILE), "w") as file:
        json.dump(history, file)
    logger.info("exporting the model")
    export(ImageClassifier(join(embedding, head), transform, config.class_names), fn_args.serving_model_dir)


def read_images(transform: TransformGraph, file_patterns: list[str]) -> tf.data.Dataset:
    """Reads, decodes and resizes records in their own order.

    Args:
      transform: the Transform graph, so that training sees what serving will.
      file_patterns: patterns of gzipped TFRecord files.

    Returns:
      Batches of float32 [batch, image_size, image_size, 3] in [0, 255] and int64 labels [batch].
    """
    spec = {key: tf.io.FixedLenFeature([], tf.string) for key in (IMAGE_KEY, LABEL_KEY)}

    def parse(serialized: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        parsed = tf.io.parse_example(serialized, spec)
        images = tf.ensure_shape(transform.images(parsed[IMAGE_KEY]), (None, None, None, NUM_CHANNELS))
        return images, transform.labels(parsed[LABEL_KEY])

    files = sorted(path for pattern in file_patterns for path in tf.io.gfile.glob(pattern))
    return (
        tf.data.TFRecordDataset(files, compression_type="GZIP")
        .batch(_EMBEDDING_BATCH_SIZE)
        .map(tf.autograph.experimental.do_not_convert(parse), num_parallel_calls=tf.data.AUTOTUNE)
        .prefetch(tf.data.AUTOTUNE)
    )


def embed(embedding: keras.Model, transform: TransformGraph, file_patterns: list[str], path: str) -> Embeddings:
    """Runs every image through the frozen backbone, once, and keeps the result on disk.

    Args:
      embedding: image -> features.
      transform: the Transform graph.
      file_patterns: patterns of gzipped TFRecord files.
      path: file to write.

    Raises:
      ValueError: if there is no image, or a label is not in the class list.
    """
    images_spec = tf.TensorSpec(embedding.input_shape, tf.float32)
    compute = tf.function(lambda images: embedding(images, training=False), autograph=False).get_concrete_function(
        images_spec
    )
    labels = []
    started = reported = time.monotonic()
    num_images = 0
    with open(path, "wb") as file:
        for images, batch_labels in read_images(transform, file_patterns):
            file.write(compute(images).numpy().astype(np.float32).tobytes())
            labels.append(batch_labels.numpy())
            num_images += len(labels[-1])
            now = time.monotonic()
            if now - reported > _REPORT_SECONDS:
                rate = num_images / (now - started)
                logger.info("embedded %s %s images, %.0f images/s", f"{num_images:,}", os.path.basename(path), rate)
                reported = now
    if not labels:
        raise ValueError(f"Expected images in {', '.join(file_patterns)}. Received: none.")
    all_labels = np.concatenate(labels)
    if all_labels.min() < 0:
        raise ValueError(
            "Expected labels of labels.txt only. Received: a record with another one. Prepare the data anew."
        )
    return Embeddings(path, embedding.output_shape[-1], all_labels)


def train_head(config: TrainerConfig, train: Embeddings, valid: Embeddings) -> tuple[keras.Model, dict[str, list]]:
    """Trains the head and keeps its best weights by validation loss.

    Returns:
      The head, and per epoch `loss`, `accuracy`, `val_loss`, `val_accuracy`.

    Raises:
      ValueError: if the loss becomes NaN.
    """
    settings = config.training
    num_classes = len(config.class_names)
    mean, variance = train.moments()
    head = build_head(config.model, mean=mean, variance=variance, num_classes=num_classes)
    counts = np.bincount(train.labels, minlength=num_classes)
    weights = class_weights(counts.tolist()) if settings.balance_classes else [1.0] * num_classes
    train_batches = _Batches(train, weights, settings.batch_size, settings.seed)
    schedule = keras.optimizers.schedules.CosineDecay(settings.learning_rate, settings.epochs * len(train_batches))
    head.compile(
        optimizer=keras.optimizers.AdamW(schedule, weight_decay=settings.weight_decay),
        loss=keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=settings.label_smoothing),
        metrics=["accuracy"],
        jit_compile=False,  # XLA on a CPU is many times slower
    )
    logger.info("training the head on %s embeddings of %d features", f"{len(train.labels):,}", len(mean))
    history = head.fit(
        train_batches,
        validation_data=_Batches(valid, weights, settings.batch_size),
        epochs=settings.epochs,
        verbose=0,
        callbacks=[
            keras.callbacks.TerminateOnNaN(),
            keras.callbacks.EarlyStopping(patience=settings.patience, restore_best_weights=True),
        ],
    ).history
    if not np.isfinite(history["loss"]).all():
        raise ValueError("Expected a finite loss. Received: NaN. Lower training.learning_rate.")
    return head, {name: [float(value) for value in values] for name, values in history.items()}
