"""`run_fn`, the Trainer component's entry: embeds every image once, trains the head on the embeddings, exports.

The backbone is frozen, so an image's embedding never changes: 2,600 images take about 30 seconds on two CPU cores, after
which an epoch of the head takes a fraction of a second, where a plain training loop runs the backbone in every epoch.
"""

import dataclasses
import itertools
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
import pydantic
import tensorflow as tf

from data.features import IMAGE_KEY, LABEL_KEY, LABELS_FILE, TRAIN_SPLIT, VALID_SPLIT
from models.classifier import (
    ModelConfig,
    Projection,
    build_head,
    build_statistics,
    class_weights,
    fit_projection,
    join,
)
from models.devices import DeviceConfig, configure_devices
from models.signatures import ImageClassifier, export
from preprocessing.images import NUM_CHANNELS, PreprocessingConfig
from preprocessing.transform import TransformGraph

logger = logging.getLogger("tfx_vision")

HISTORY_FILE = "history.json"
EXTRA_FOLDER = "assets.extra"
_EMBEDDING_BATCH_SIZE = 32
_REPORT_SECONDS = 2.0
PROJECTION_SAMPLE = 2048  # images; bounds the memory that the projection takes


class TrainingConfig(pydantic.BaseModel):
    """How the head is trained.

    Attributes:
      epochs: passes over the training embeddings, at most.
      patience: epochs without a better validation loss after which training stops; the best weights are kept.
      batch_size: images a step.
      learning_rate: of AdamW, at its start; it falls to zero along a cosine.
      weight_decay: of AdamW.
      label_smoothing: share of the target spread over all classes, in [0, 1).
      mixup: strength of mixup between embeddings, the parameter of its Beta distribution; 0 for none.
      class_balance: 0 weighs every image alike, 1 every class; between, a power of the inverse frequency.
      seed: of the initialization, dropout and the order of the images.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    epochs: int = pydantic.Field(40, ge=1)
    patience: int = pydantic.Field(10, ge=1)
    batch_size: int = pydantic.Field(64, ge=1)
    learning_rate: float = pydantic.Field(1e-3, gt=0)
    weight_decay: float = pydantic.Field(1e-2, ge=0)
    label_smoothing: float = pydantic.Field(0.1, ge=0, lt=1)
    mixup: float = pydantic.Field(0.2, ge=0)
    class_balance: float = pydantic.Field(0.5, ge=0, le=1)
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


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """The projected statistics of one split, on disk: memory does not grow with the number of images.

    Attributes:
      features: float32 [num_images, num_components], mapped from its file.
      labels: int64 [num_images].
    """

    features: np.ndarray
    labels: np.ndarray


class _Batches(keras.utils.PyDataset):
    """Batches of embeddings, soft targets and weights; shuffled and mixed where a random generator is given.

    Source of mixup: Zhang et al., https://arxiv.org/abs/1710.09412
    """

    def __init__(
        self,
        embeddings: Embeddings,
        weights: list[float],
        batch_size: int,
        *,
        mixup: float = 0.0,
        random: np.random.Generator | None = None,
    ) -> None:
        super().__init__()
        self._embeddings = embeddings
        self._weights = np.asarray(weights, np.float32)
        self._batch_size = batch_size
        self._mixup = mixup
        self._random = random
        self._order = np.arange(len(embeddings.labels))
        self.on_epoch_end()

    def __len__(self) -> int:
        return -(-len(self._order) // self._batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = np.sort(self._order[index * self._batch_size : (index + 1) * self._batch_size])
        labels = self._embeddings.labels[rows]
        batch = (
            np.asarray(self._embeddings.features[rows]),
            np.eye(len(self._weights), dtype=np.float32)[labels],
            self._weights[labels],
        )
        if self._random is None or not self._mixup:
            return batch
        share = self._random.beta(self._mixup, self._mixup, len(rows)).astype(np.float32)
        partner = self._random.permutation(len(rows))
        mixed = []
        for values in batch:
            shares = share.reshape(-1, *[1] * (values.ndim - 1))
            mixed.append(shares * values + (1 - shares) * values[partner])
        return tuple(mixed)

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
        statistics = build_statistics(config.model, image_size=config.preprocessing.image_size)
        train_statistics = compute_statistics(statistics, transform, fn_args.train_files, split=TRAIN_SPLIT)
        valid_statistics = compute_statistics(statistics, transform, fn_args.eval_files, split=VALID_SPLIT)
        # The records are in the order of a hash, so the first of them are a fair sample.
        sample = list(_take_images(train_statistics, PROJECTION_SAMPLE))
        logger.info("fitting the projection")
        projection = fit_projection(np.concatenate([batch for batch, _ in sample]), num_components=config.model.num_components)
        train = write_embeddings(os.path.join(folder, "train"), itertools.chain(sample, train_statistics), projection)
        valid = write_embeddings(os.path.join(folder, "valid"), valid_statistics, projection)
        head, history = train_head(config, train, valid)
    tf.io.gfile.makedirs(fn_args.model_run_dir)
    with tf.io.gfile.GFile(os.path.join(fn_args.model_run_dir, HISTORY_FILE), "w") as file:
        json.dump(history, file)
    logger.info("exporting the model")
    network = join(statistics, projection, head)
    export(ImageClassifier(network, transform, config.class_names), fn_args.serving_model_dir)
    # `assets.extra` is SavedModel's place for files of others; the baseline's resolver reads this one.
    extra = os.path.join(fn_args.serving_model_dir, EXTRA_FOLDER)
    tf.io.gfile.makedirs(extra)
    with tf.io.gfile.GFile(os.path.join(extra, LABELS_FILE), "w") as file:
        file.write("".join(f"{name}\n" for name in config.class_names))


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


def compute_statistics(
    statistics: keras.Model, transform: TransformGraph, file_patterns: list[str], *, split: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Runs every image through the frozen backbone, once.

    Args:
      statistics: image -> statistics.
      transform: the Transform graph.
      file_patterns: patterns of gzipped TFRecord files.
      split: its name, for the log.

    Yields:
      float32 [batch, num_statistics] and int64 labels [batch].

    Raises:
      ValueError: if there is no image, or a label is not in the class list.
    """
    images_spec = tf.TensorSpec(statistics.input_shape, tf.float32)
    compute = tf.function(lambda images: statistics(images, training=False), autograph=False)
    compute = compute.get_concrete_function(images_spec)
    started = reported = time.monotonic()
    num_images = 0
    for images, labels in read_images(transform, file_patterns):
        if tf.reduce_min(labels) < 0:
            raise ValueError("Expected labels of labels.txt only. Received: a record with another one. Prepare the data anew.")
        yield compute(images).numpy(), labels.numpy()
        num_images += len(labels)
        now = time.monotonic()
        if now - reported > _REPORT_SECONDS:
            rate = num_images / (now - started)
            logger.info("embedded %s %s images, %.0f images/s", f"{num_images:,}", split, rate)
            reported = now
    if not num_images:
        raise ValueError(f"Expected images in {', '.join(file_patterns)}. Received: none.")


def _take_images(batches: Iterator[tuple[np.ndarray, np.ndarray]], num_images: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Takes batches off an iterator until they hold enough images."""
    taken = 0
    while taken < num_images and (batch := next(batches, None)) is not None:
        yield batch
        taken += len(batch[1])


def write_embeddings(path: str, batches: Iterable[tuple[np.ndarray, np.ndarray]], projection: Projection) -> Embeddings:
    """Projects statistics and keeps them on disk.

    Args:
      path: file to write.
      batches: float32 [batch, num_statistics] and int64 labels [batch].
      projection: of the statistics.
    """
    labels = []
    with open(path, "wb") as file:
        for statistics, batch_labels in batches:
            file.write(projection(statistics).astype(np.float32).tobytes())
            labels.append(batch_labels)
    all_labels = np.concatenate(labels)
    return Embeddings(np.memmap(path, np.float32, mode="r", shape=(len(all_labels), len(projection.bias))), all_labels)


def train_head(config: TrainerConfig, train: Embeddings, valid: Embeddings) -> tuple[keras.Model, dict[str, list]]:
    """Trains the head and keeps its best weights by validation loss.

    Returns:
      The head, and per epoch `loss`, `accuracy`, `val_loss`, `val_accuracy`.

    Raises:
      ValueError: if the loss becomes NaN.
    """
    settings = config.training
    num_classes = len(config.class_names)
    head = build_head(config.model, num_components=train.features.shape[1], num_classes=num_classes)
    counts = np.bincount(train.labels, minlength=num_classes)
    weights = class_weights(counts.tolist(), balance=settings.class_balance)
    random = np.random.default_rng(settings.seed)
    train_batches = _Batches(train, weights, settings.batch_size, mixup=settings.mixup, random=random)
    schedule = keras.optimizers.schedules.CosineDecay(settings.learning_rate, settings.epochs * len(train_batches))
    head.compile(
        optimizer=keras.optimizers.AdamW(schedule, weight_decay=settings.weight_decay),
        loss=keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=settings.label_smoothing),
        metrics=["accuracy"],
        jit_compile=False,  # XLA on a CPU is many times slower
    )
    logger.info("training the head on %s embeddings of %d components", f"{len(train.labels):,}", train.features.shape[1])
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
