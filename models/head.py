"""Stage one: the head is trained on embeddings, on one device, in seconds. Called by the trainer and the tuner."""

import logging
import os
from collections.abc import Iterator

import keras
import numpy as np
import pydantic
import tensorflow as tf

from models.classifier import class_weights
from models.devices import Devices
from models.embeddings import Embeddings
from models.loop import CHECKPOINTS, Batches, Loop, Monitor, Stage, log_folder

logger = logging.getLogger("tfx_vision")

HEAD = "head"


class TrainingConfig(pydantic.BaseModel):
    """How the head is trained, in stage one.

    Attributes:
      epochs: passes over the training embeddings, at most.
      patience: epochs without a better validation metric after which training stops; the best weights are kept.
      monitor: the validation metric that is watched, in both stages: `val_loss` or `val_accuracy`.
      batch_size: images a step.
      learning_rate: of AdamW, at its start; it falls to zero along a cosine.
      weight_decay: of AdamW.
      label_smoothing: share of the target spread over all classes, in [0, 1).
      mixup: strength of mixup between embeddings, the parameter of its Beta distribution; 0 for none.
      class_balance: 0 weighs every image alike, 1 every class; between, a power of the inverse frequency. In both stages.
      warm_start: start from the latest blessed model, where there is one, in place of the ImageNet weights.
      seed: of the initialization, dropout, augmentation and the order of the images.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    epochs: int = pydantic.Field(40, ge=1)
    patience: int = pydantic.Field(10, ge=1)
    monitor: Monitor = "val_loss"
    batch_size: int = pydantic.Field(64, ge=1)
    learning_rate: float = pydantic.Field(1e-3, gt=0)
    weight_decay: float = pydantic.Field(1e-2, ge=0)
    label_smoothing: float = pydantic.Field(0.1, ge=0, lt=1)
    mixup: float = pydantic.Field(0.2, ge=0)
    class_balance: float = pydantic.Field(0.5, ge=0, le=1)
    warm_start: bool = False
    seed: int = pydantic.Field(0, ge=0)


def train_head(
    settings: TrainingConfig,
    head: keras.Model,
    *,
    train: Embeddings,
    valid: Embeddings,
    devices: Devices,
    folder: str,
) -> dict[str, list]:
    """Trains a head on embeddings and leaves its best weights in it.

    Args:
      settings: of the training.
      head: float32 [batch, num_components] -> logits float32 [batch, num_classes].
      train: the training embeddings.
      valid: the validation embeddings.
      devices: what to compute on.
      folder: of the checkpoints and the TensorBoard logs; local or gs://.

    Returns:
      Per epoch what `models.loop.Loop.run` returns, and `stage`, the name of the stage.

    Raises:
      ValueError: if a class has no image, or the loss becomes NaN.
    """
    label_counts = np.bincount(train.labels, minlength=head.output_shape[-1]).tolist()
    weights = class_weights(label_counts, balance=settings.class_balance)
    stage = Stage(
        name=HEAD,
        epochs=settings.epochs,
        num_images=len(train.labels),
        global_batch_size=settings.batch_size,
        patience=settings.patience,
        monitor=settings.monitor,
        label_smoothing=settings.label_smoothing,
        advice="Lower training.learning_rate.",
    )
    schedule = keras.optimizers.schedules.CosineDecay(settings.learning_rate, stage.epochs * stage.steps_per_epoch)
    logger.info("training the head on %s embeddings of %d components", f"{len(train.labels):,}", train.features.shape[1])
    loop = Loop(
        head,
        keras.optimizers.AdamW(schedule, weight_decay=settings.weight_decay),
        stage,
        devices.alone(),
        folder=os.path.join(folder, CHECKPOINTS, HEAD),
        log_folder=log_folder(folder, HEAD),
    )
    history = loop.run(
        lambda epoch, step: _shuffled_batches(train, weights, stage, settings, epoch=epoch, step=step),
        lambda context: _plain_batches(valid, weights, settings.batch_size),
    )
    return history | {"stage": [HEAD] * len(history["loss"])}


def _shuffled_batches(
    embeddings: Embeddings, weights: list[float], stage: Stage, settings: TrainingConfig, *, epoch: int, step: int
) -> Batches:
    """Makes endless batches of shuffled, mixed embeddings from a step of an epoch on.

    Source of mixup: Zhang et al., https://arxiv.org/abs/1710.09412
    """

    def generate() -> Iterator[tuple[np.ndarray, ...]]:
        for number in range(epoch, stage.epochs + 1):
            # A generator for each epoch, so that a run that goes on in the middle sees what the other one would have seen.
            random = np.random.default_rng([settings.seed, number])
            order = random.permutation(len(embeddings.labels))
            for position in range(stage.steps_per_epoch):
                rows = np.sort(order[position * settings.batch_size : (position + 1) * settings.batch_size])
                batch = _batch(embeddings, weights, rows)
                if settings.mixup:
                    batch = _mix(batch, settings.mixup, random)
                if number > epoch or position >= step:
                    yield batch

    return lambda context: tf.data.Dataset.from_generator(
        generate, output_signature=_batch_signature(embeddings, weights)
    ).prefetch(tf.data.AUTOTUNE)


def _plain_batches(embeddings: Embeddings, weights: list[float], batch_size: int) -> tf.data.Dataset:
    rows = np.arange(len(embeddings.labels))
    return tf.data.Dataset.from_generator(
        lambda: (_batch(embeddings, weights, rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)),
        output_signature=_batch_signature(embeddings, weights),
    )


def _batch(embeddings: Embeddings, weights: list[float], rows: np.ndarray) -> tuple[np.ndarray, ...]:
    labels = embeddings.labels[rows]
    targets = np.eye(len(weights), dtype=np.float32)[labels]
    return np.asarray(embeddings.features[rows]), targets, np.asarray(weights, np.float32)[labels]


def _batch_signature(embeddings: Embeddings, weights: list[float]) -> tuple[tf.TensorSpec, ...]:
    widths = [(embeddings.features.shape[1],), (len(weights),), ()]
    return tuple(tf.TensorSpec((None, *width), tf.float32) for width in widths)


def _mix(batch: tuple[np.ndarray, ...], strength: float, random: np.random.Generator) -> tuple[np.ndarray, ...]:
    num_rows = len(batch[0])
    share = random.beta(strength, strength, num_rows).astype(np.float32)
    partner = random.permutation(num_rows)
    mixed = []
    for values in batch:
        shares = share.reshape(-1, *[1] * (values.ndim - 1))
        mixed.append(shares * values + (1 - shares) * values[partner])
    return tuple(mixed)
