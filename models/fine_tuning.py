"""Stage two: the top of the backbone, or all of it, is trained together with the head, on augmented images.

BatchNormalization stays frozen, as the batches of a fine-tuning are too small and too few to measure its statistics anew.
Called by the trainer, after stage one has given the head its start.
"""

import dataclasses
import logging
import math
import os
from collections.abc import Sequence

import keras
import pydantic
import tensorflow as tf

from models.classifier import class_weights, join, logits_of, pool_statistics
from models.devices import Devices
from models.embeddings import Images, parse_record
from models.head import TrainingConfig
from models.loop import CHECKPOINTS, Batches, Loop, Stage, log_folder
from models.network_table import describe_network
from models.trained import TrainedClassifier
from preprocessing.augment import Augmentation, AugmentationConfig, augment_image, mix_batch, resolve_augmentation
from preprocessing.transform import TransformGraph

logger = logging.getLogger("tfx_vision")

FINE_TUNING = "fine-tuning"
_SHUFFLE_WINDOW = 2048  # encoded images; records are in the order of a hash already
_LARGE_PRIME = 1_000_003  # keeps the seeds of epochs and windows apart
_READERS = 8  # files read at once
_VALID_BATCH_SIZE = 64


class FineTuningConfig(pydantic.BaseModel):
    """How the backbone is fine-tuned; off where `epochs` is 0.

    Attributes:
      epochs: passes over the training images, at most.
      patience: epochs without a better validation metric after which it stops; the best weights are kept, those of stage one
        among them.
      unfrozen: share of the backbone's stages that is trained, counted from the top, in (0, 1].
      batch_size: images a step on each replica (GPU).
      learning_rate: of the head, at its peak, for one replica; with more it is multiplied by their number.
      backbone_learning_rate: of the backbone's last stage, likewise.
      layer_decay: factor on the learning rate of each stage before the last, in (0, 1].
      warmup_epochs: over which the learning rate rises; after it, it falls to zero along a cosine.
      weight_decay: of AdamW, on kernels only.
      label_smoothing: share of the target spread over all classes, in [0, 1).
      stochastic_depth: chance that the last block is left out of a step, where the backbone has residual blocks; it grows from
        0 at the first block. In [0, 1).
      gradient_clip_norm: largest norm of all gradients together; 0 for no limit.
      average_epochs: span of the exponential moving average of the weights, in epochs; 0 for none.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    epochs: int = pydantic.Field(0, ge=0)
    patience: int = pydantic.Field(5, ge=1)
    unfrozen: float = pydantic.Field(0.6, gt=0, le=1)
    batch_size: int = pydantic.Field(32, ge=1)
    learning_rate: float = pydantic.Field(3e-4, gt=0)
    backbone_learning_rate: float = pydantic.Field(1e-4, gt=0)
    layer_decay: float = pydantic.Field(1.0, gt=0, le=1)
    warmup_epochs: float = pydantic.Field(0.5, ge=0)
    weight_decay: float = pydantic.Field(1e-2, ge=0)
    label_smoothing: float = pydantic.Field(0.1, ge=0, lt=1)
    stochastic_depth: float = pydantic.Field(0.1, ge=0, lt=1)
    gradient_clip_norm: float = pydantic.Field(1.0, ge=0)
    average_epochs: float = pydantic.Field(1.0, ge=0)


class LayerwiseAdamW(keras.optimizers.Adam):
    """AdamW with a learning rate and a decay for each variable; Keras's own decays all of them at the same rate.

    Source: Clark et al., "ELECTRA", https://arxiv.org/abs/2003.10555, for layer-wise learning rates; Loshchilov and Hutter,
    "Decoupled weight decay regularization", https://arxiv.org/abs/1711.05101
    """

    def __init__(self, *args: object, factors: Sequence[float], decays: Sequence[float], **kwargs: object):
        """Makes the optimizer.

        Args:
          *args: of Adam.
          factors: on the learning rate of each variable, in the order of `build`.
          decays: share of each variable that a step takes away, before the learning rate.
          **kwargs: of Adam.
        """
        super().__init__(*args, **kwargs)
        self._factors = tuple(factors)
        self._decays = tuple(decays)

    def update_step(self, gradient: tf.Tensor, variable: tf.Variable, learning_rate: tf.Tensor) -> None:
        """Updates one variable."""
        index = self._get_variable_index(variable)
        rate = tf.cast(learning_rate, variable.dtype) * self._factors[index]
        if self._decays[index]:
            self.assign_sub(variable, variable * rate * self._decays[index])
        super().update_step(gradient, variable, rate)


def fine_tune(
    settings: FineTuningConfig,
    classifier: TrainedClassifier,
    *,
    training: TrainingConfig,
    augmentation: AugmentationConfig,
    transform: TransformGraph,
    train: Images,
    valid: Images,
    devices: Devices,
    folder: str,
) -> TrainedClassifier:
    """Trains the top of the backbone together with the head, under the strategy of the devices.

    Args:
      settings: of this stage.
      classifier: of stage one.
      training: what both stages share: monitor, class balance, seed.
      augmentation: of the training images.
      transform: the Transform graph.
      train: the training images.
      valid: the validation images.
      devices: what to compute on.
      folder: of the checkpoints and the TensorBoard logs; local or gs://, and the same for all workers.

    Returns:
      The classifier with the best weights of both stages.

    Raises:
      InputError: if the backbone cannot be trained.
      ValueError: if the loss becomes NaN.
    """
    keras.utils.set_random_seed(training.seed + 1)
    batch_size = min(settings.batch_size, train.num_images)
    stage = Stage(
        name=FINE_TUNING,
        epochs=settings.epochs,
        num_images=train.num_images,
        global_batch_size=batch_size * devices.num_replicas,
        patience=settings.patience,
        monitor=training.monitor,
        label_smoothing=settings.label_smoothing,
        keeps_start=True,
        advice="Lower fine_tuning.learning_rate and fine_tuning.backbone_learning_rate.",
    )
    with devices.strategy.scope():
        backbone = classifier.build_backbone(stochastic_depth=settings.stochastic_depth)
        depths = unfreeze(backbone, share=settings.unfrozen)
        head = classifier.build_head()
        model = logits_of(join(pool_statistics(classifier.spec.model, backbone), classifier.projection, head))
        optimizer = make_optimizer(settings, model, depths, stage=stage, num_replicas=devices.num_replicas)
    loop = Loop(
        model,
        optimizer,
        stage,
        devices,
        folder=os.path.join(folder, CHECKPOINTS, FINE_TUNING),
        log_folder=log_folder(folder, FINE_TUNING),
    )
    logger.getChild("network").info("the network in fine-tuning:\n%s", describe_network(model))
    batches = ImageBatches(
        transform=transform,
        train=train,
        valid=valid,
        class_weights=class_weights(classifier.label_counts, balance=training.class_balance),
        batch_size=batch_size,
        seed=training.seed,
        # On a CPU the order costs nothing; a GPU would wait for the one batch that is late.
        is_deterministic=devices.deterministic or "GPU" not in devices.local_device,
    )
    resolved = resolve_augmentation(augmentation, num_images=train.num_images)
    logger.info("fine-tuning on %s images", f"{train.num_images:,}")
    history = loop.run(lambda epoch, step: batches.train_from(stage, resolved, epoch=epoch, step=step), batches.valid_once)
    history |= {"stage": [FINE_TUNING] * len(history["loss"])}
    return dataclasses.replace(
        classifier,
        backbone=backbone.get_weights(),
        head=head.get_weights(),
        history={name: [*values, *history[name]] for name, values in classifier.history.items()},
    )


def unfreeze(network: keras.Model, *, share: float) -> dict[str, int]:
    """Makes the top of a backbone trainable, but no BatchNormalization.

    Args:
      network: the backbone, its outputs one feature map a stage, coarsest last.
      share: of its stages, counted from the top, in (0, 1].

    Returns:
      The path of each trainable variable and how many stages it is below the last.
    """
    ends = {output._keras_history.operation.name for output in network.outputs}
    num_unfrozen = max(1, round(share * len(ends)))
    depth = len(ends) - 1
    depths = {}
    for layer in network.layers:
        layer.trainable = depth < num_unfrozen and not isinstance(layer, keras.layers.BatchNormalization)
        depths |= {variable.path: depth for variable in layer.trainable_variables}
        depth -= layer.name in ends
    return depths


def make_optimizer(
    config: FineTuningConfig, model: keras.Model, depths: dict[str, int], *, stage: Stage, num_replicas: int
) -> keras.optimizers.Optimizer:
    """Makes the optimizer: warm-up and cosine decay, a learning rate for each stage of the backbone, clipping, moving average.

    Args:
      config: the settings.
      model: the classifier, unfrozen as far as it will be.
      depths: of `unfreeze`.
      stage: gives the number of steps.
      num_replicas: the learning rates are multiplied by it, as the batch is.
    """
    steps = stage.epochs * stage.steps_per_epoch
    warmup = min(round(config.warmup_epochs * stage.steps_per_epoch), steps - 1)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - warmup, warmup_target=config.learning_rate * num_replicas, warmup_steps=warmup
    )
    if not warmup:
        schedule = keras.optimizers.schedules.CosineDecay(config.learning_rate * num_replicas, steps)
    backbone_factor = config.backbone_learning_rate / config.learning_rate
    paths = [variable.path for variable in model.trainable_variables]
    span = config.average_epochs * stage.steps_per_epoch
    return LayerwiseAdamW(
        schedule,
        factors=[backbone_factor * config.layer_decay ** depths[path] if path in depths else 1.0 for path in paths],
        decays=[config.weight_decay if path.endswith("kernel") else 0.0 for path in paths],
        # Keras clips each replica's gradients before it adds them up.
        global_clipnorm=config.gradient_clip_norm / num_replicas or None,
        use_ema=span > 0,
        ema_momentum=span / (1 + span) if span else 0.99,
    )


@dataclasses.dataclass(frozen=True)
class ImageBatches:
    """Makes the input pipelines of images: read, shuffled, decoded, augmented and mixed in parallel.

    Every random choice is a function of the seed, the epoch and the image's place in it, whatever thread makes it; only which
    batch comes first is left to the threads, where `is_deterministic` is False.

    Attributes:
      transform: the Transform graph.
      train: the training images.
      valid: the validation images.
      class_weights: of each class.
      batch_size: on each replica.
      seed: of the order and the augmentation.
      is_deterministic: keep the order of the batches where a later one is ready first.
    """

    transform: TransformGraph
    train: Images
    valid: Images
    class_weights: Sequence[float]
    batch_size: int
    seed: int
    is_deterministic: bool

    def train_from(self, stage: Stage, augmentation: Augmentation, *, epoch: int, step: int) -> Batches:
        """Gives the batches from a step of an epoch on, endlessly: float32 [batch, size, size, 3], targets, weights."""
        images_per_epoch = stage.steps_per_epoch * stage.global_batch_size

        def read_epoch(number: tf.Tensor) -> tf.data.Dataset:
            # Stateless, in windows: `Dataset.shuffle` would also depend on the global seed, which others may set.
            seed = tf.stack([tf.constant(self.seed, tf.int64), number])
            files = tf.random.experimental.stateless_shuffle(tf.constant(self.train.files), seed)
            records = tf.data.Dataset.from_tensor_slices(files).interleave(
                lambda file: tf.data.TFRecordDataset(file, "GZIP"),
                cycle_length=min(_READERS, len(self.train.files)),
                num_parallel_calls=tf.data.AUTOTUNE,
                deterministic=True,
            )
            windows = records.batch(_SHUFFLE_WINDOW).enumerate()
            records = windows.map(
                lambda index, window: tf.random.experimental.stateless_shuffle(window, seed + index * _LARGE_PRIME)
            ).unbatch()
            # The last batch is filled up with images of the start, so that no image is left out.
            return records.repeat().take(images_per_epoch).enumerate(number * images_per_epoch)

        def augment(indices: tf.Tensor, records: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            images, targets, weights = self._examples(records)
            seeds = tf.cast(tf.stack([tf.fill(tf.shape(indices), tf.constant(self.seed, tf.int64)), indices], axis=1), tf.int32)
            images = tf.map_fn(
                lambda pair: augment_image(pair[0], augmentation, seed=pair[1]),
                (images, seeds),
                fn_output_signature=tf.TensorSpec(images.shape[1:], tf.float32),
            )
            return mix_batch(images, targets, weights, augmentation, seed=seeds[0])

        def batches(context: tf.distribute.InputContext) -> tf.data.Dataset:
            epochs = tf.data.Dataset.range(epoch, stage.epochs + 1)
            records = epochs.flat_map(read_epoch).skip(step * stage.global_batch_size)
            records = records.shard(context.num_input_pipelines, context.input_pipeline_id)
            dataset = records.batch(self.batch_size, drop_remainder=True)
            return self._finish(dataset, augment)

        return batches

    def valid_once(self, context: tf.distribute.InputContext) -> tf.data.Dataset:
        """Gives the images of the split once, as they are; images of weight 0 fill up the last batch of every replica."""
        num_images, num_replicas = self.valid.num_images, context.num_replicas_in_sync
        batch_size = min(_VALID_BATCH_SIZE, math.ceil(num_images / num_replicas))
        total = math.ceil(num_images / (batch_size * num_replicas)) * batch_size * num_replicas
        records = tf.data.TFRecordDataset(list(self.valid.files), "GZIP").repeat().take(total).enumerate()
        records = records.shard(context.num_input_pipelines, context.input_pipeline_id).batch(batch_size, drop_remainder=True)

        def examples(indices: tf.Tensor, records: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            images, targets, weights = self._examples(records)
            return images, targets, tf.where(indices < num_images, weights, 0.0)

        return self._finish(records, examples)

    def _examples(self, records: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        images, labels = parse_record(records, self.transform)
        targets = tf.one_hot(labels, len(self.class_weights))
        return images, targets, tf.gather(tf.constant(self.class_weights, tf.float32), labels)

    def _finish(self, dataset: tf.data.Dataset, function: object) -> tf.data.Dataset:
        options = tf.data.Options()
        options.deterministic = self.is_deterministic
        function = tf.autograph.experimental.do_not_convert(function)
        return dataset.map(function, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE).with_options(options)
