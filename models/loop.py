"""The training loop of both stages: epochs, validation, the best weights, and checkpoints that survive a machine's end.

A loop of our own and not `keras.Model.fit`, which in Keras 3 cannot train under MultiWorkerMirroredStrategy
(https://github.com/keras-team/keras/issues/20585), nor go on in the middle of an epoch. Optimizers, their loss scaling and
moving averages, and checkpoints are the libraries' own.

A run that is killed goes on at its last epoch; one that gets SIGTERM, as preemptible machines do before they are taken away,
saves first and goes on at that very step. Either ends with the model of an uninterrupted run, as every random choice is a
function of the seed, the epoch and the image, or is state in the checkpoint. Called by both stages.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from models.devices import Devices
from models.progress import Progress

logger = logging.getLogger("tfx_vision")

CHECKPOINTS = "checkpoints"  # folders in `model_run_dir`
LOGS = "logs"  # for TensorBoard, in the same
_TENSORBOARD_VARIABLE = "AIP_TENSORBOARD_LOG_DIR"  # of a Vertex AI job that has a TensorBoard instance
EXIT_PREEMPTED = 143  # as a shell has it for SIGTERM
Monitor = Literal["val_loss", "val_accuracy"]
Batches = Callable[[tf.distribute.InputContext], tf.data.Dataset]


def log_folder(folder: str, stage: str) -> str:
    """Returns where a stage's TensorBoard logs go: below the run's folder, or where Vertex AI's TensorBoard reads them.

    Args:
      folder: of the run; local or gs://.
      stage: name of the stage.
    """
    return os.path.join(os.environ.get(_TENSORBOARD_VARIABLE) or os.path.join(folder, LOGS), stage)


class Preempted(SystemExit):
    """The process was asked to end; its state is saved.

    No `Exception`, as TFX would remove the checkpoints of an execution that ends with one.
    """

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)

    def __str__(self) -> str:
        return "stopped by SIGTERM; a rerun goes on from here"


class DivergedError(ValueError):
    """The loss is no number any more."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """What the loop must know of a stage of training.

    Attributes:
      name: for the log and the folders.
      epochs: at most.
      num_images: that an epoch sees.
      global_batch_size: images a step, over all replicas.
      patience: epochs without a better value of `monitor` after which training stops.
      monitor: the validation metric by which the best weights are chosen.
      label_smoothing: share of the target spread over all classes, in [0, 1).
      keeps_start: whether the weights that the stage starts from may be the best, as where it goes on from another stage.
      advice: what to change where the loss becomes NaN.
    """

    name: str
    epochs: int
    num_images: int
    global_batch_size: int
    patience: int
    monitor: Monitor
    label_smoothing: float
    keeps_start: bool = False
    advice: str = ""

    @property
    def steps_per_epoch(self) -> int:
        """Steps that see every image once; the last one may see some again."""
        return math.ceil(self.num_images / self.global_batch_size)


@dataclasses.dataclass
class _Position:
    """Where training is; it travels in the checkpoint as JSON."""

    epoch: int = 0
    step: int = 0
    sums: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0.0, 0.0, 0.0])
    best: float | None = None
    best_epoch: int = -1
    is_finished: bool = False
    history: dict[str, list[float]] = dataclasses.field(default_factory=dict)


class Loop:
    """Trains one model through one stage.

    history = Loop(model, optimizer, stage, devices, folder=..., log_folder=...).run(train, valid)
    """

    def __init__(
        self,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        stage: Stage,
        devices: Devices,
        *,
        folder: str,
        log_folder: str,
    ):
        """Prepares the loop, and restores its state where an earlier run left one.

        Args:
          model: gives logits [batch, classes]; made in the scope of `devices.strategy`.
          optimizer: made there too; its moving average, where it keeps one, is what is validated and kept.
          stage: epochs, batch size, patience.
          devices: strategy and compilation.
          folder: of the checkpoints; local or gs://, and the same for all workers.
          log_folder: of the TensorBoard logs.
        """
        self._model, self._stage, self._devices = model, stage, devices
        self._strategy = devices.strategy
        self._log_folder = log_folder
        with self._strategy.scope():
            if devices.precision == "mixed_float16":
                optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
            optimizer.build(model.trainable_variables)
        self._optimizer = optimizer
        self._has_average = getattr(optimizer, "inner_optimizer", optimizer).use_ema
        self._position = _Position()
        self._best = [tf.Variable(variable.numpy(), trainable=False) for variable in self._trained()]
        self._encoded = tf.Variable("", dtype=tf.string, trainable=False)
        weights = {id(weight) for weight in model.weights}
        seeds = [variable.value for variable in model.variables if id(variable) not in weights]
        self._checkpoint = tf.train.Checkpoint(
            trained=self._trained(),
            optimizer=[variable.value for variable in optimizer.variables],
            seeds=seeds,
            best=self._best,
            position=self._encoded,
        )
        self._manager = tf.train.CheckpointManager(self._checkpoint, folder, max_to_keep=2)
        self._make_steps()
        if self._manager.latest_checkpoint:
            self._checkpoint.restore(self._manager.latest_checkpoint).assert_consumed()
            self._position = _Position(**json.loads(self._encoded.numpy()))
            where = "its end" if self._position.is_finished else f"epoch {self._position.epoch + 1}"
            logger.info("%s goes on from %s", stage.name, where)

    def run(self, train: Callable[[int, int], Batches], valid: Batches) -> dict[str, list[float]]:
        """Trains, and leaves the best weights in the model.

        Args:
          train: gives, for an epoch and the steps of it that are done, what makes one input pipeline of endless batches from
            there on: images or embeddings, targets float32 [batch, classes], weights float32 [batch].
          valid: makes one input pipeline of batches of the same kind, each image once; those of weight 0 do not count.

        Returns:
          Per epoch `loss`, `accuracy`, `val_loss`, `val_accuracy`, `learning_rate`, `images_per_second`.

        Raises:
          DivergedError: if the loss is no number.
          Preempted: after SIGTERM; the state is saved.
        """
        position = self._position
        if not position.is_finished:
            valid_data = self._strategy.distribute_datasets_from_function(valid)
            if self._stage.keeps_start and position.best is None:
                self._keep_if_better(self._validate(valid_data), epoch=-1)
            batches = iter(self._strategy.distribute_datasets_from_function(train(position.epoch, position.step)))
            writer = _summary_writer(self._log_folder, is_chief=self._devices.is_chief)
            with _sigterm() as is_preempted, writer.as_default():
                images_per_epoch = self._stage.steps_per_epoch * self._stage.global_batch_size
                done = position.epoch * images_per_epoch + position.step * self._stage.global_batch_size
                progress = Progress(self._stage.name, total=self._stage.epochs * images_per_epoch, done=done)
                while not position.is_finished:
                    self._train_epoch(batches, progress, is_preempted)
                    self._end_epoch(progress.images_per_second, valid_data)
        for variable, best in zip(self._trained(), self._best, strict=True):
            variable.assign(best)
        return position.history

    def _trained(self) -> list[tf.Variable]:
        return [variable.value for variable in self._model.trainable_variables]

    def _make_steps(self) -> None:
        model, optimizer, strategy, stage = self._model, self._optimizer, self._strategy, self._stage

        def sums(targets: tf.Tensor, weights: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
            """Returns the weighted loss, the weights, the hits and the images, summed: float32 [4]."""
            num_classes = tf.cast(tf.shape(targets)[1], tf.float32)
            smooth = targets * (1 - stage.label_smoothing) + stage.label_smoothing / num_classes
            losses = tf.nn.softmax_cross_entropy_with_logits(smooth, tf.cast(logits, tf.float32))
            counts = tf.cast(weights > 0, tf.float32)  # none for what fills up a batch
            hits = counts * tf.cast(tf.equal(tf.argmax(logits, axis=-1), tf.argmax(targets, axis=-1)), tf.float32)
            return tf.stack([tf.reduce_sum(values) for values in (weights * losses, weights, hits, counts)])

        @tf.function(autograph=False, jit_compile=self._devices.jit_compile or None)
        def gradients(inputs: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor]:
            with tf.GradientTape() as tape:
                found = sums(targets, weights, model(inputs, training=True))
                loss = optimizer.scale_loss(found[0] / stage.global_batch_size)  # replicas' gradients are added up
            return tape.gradient(loss, self._trained()), found

        def train_replica(inputs: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
            found_gradients, found = gradients(inputs, targets, weights)
            optimizer.apply(found_gradients, model.trainable_variables)
            return found

        def validate_replica(inputs: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
            return sums(targets, weights, model(inputs, training=False))

        def over_replicas(step: Callable[..., tf.Tensor]) -> Callable[[Any], tf.Tensor]:
            return tf.function(
                lambda batch: strategy.reduce(tf.distribute.ReduceOp.SUM, strategy.run(step, args=batch), axis=None),
                autograph=False,
                reduce_retracing=True,
            )

        self._train_step = over_replicas(train_replica)
        self._validate_step = over_replicas(validate_replica)

    def _train_epoch(self, batches: Iterator[Any], progress: Progress, is_preempted: Callable[[], bool]) -> None:
        """Trains to the end of the epoch."""
        position, stage = self._position, self._stage
        sums = tf.constant(position.sums)
        while position.step < stage.steps_per_epoch:
            sums = sums + self._train_step(next(batches))
            position.step += 1
            if progress.advance(stage.global_batch_size, note=self._latest()):
                self._require_number(float(sums[0]))
            # Of several workers the chief alone can save; without it, the others end at their next step.
            if self._devices.is_chief and is_preempted():
                position.sums = sums.numpy().tolist()
                self._save()
                logger.info("SIGTERM: %s is saved at epoch %d, step %d", stage.name, position.epoch + 1, position.step)
                raise Preempted
        position.sums = sums.numpy().tolist()
        self._require_number(position.sums[0])

    def _latest(self) -> str:
        history = self._position.history
        accuracy = f" · val accuracy {history['val_accuracy'][-1]:.3f}" if history else ""
        return f"epoch {self._position.epoch + 1} of {self._stage.epochs}{accuracy}"

    def _require_number(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise DivergedError(
                f"Expected a finite loss. Received: {loss} in epoch {self._position.epoch + 1} of {self._stage.name}. "
                f"{self._stage.advice}"
            )

    def _end_epoch(self, images_per_second: float, valid_data: Any) -> None:
        """Validates, keeps what is better, and saves."""
        position, stage = self._position, self._stage
        raw = [variable.numpy() for variable in self._trained()] if self._has_average else []
        if self._has_average:
            self._optimizer.finalize_variable_values(self._model.trainable_variables)
        values = _means(position.sums) | {f"val_{name}": value for name, value in self._validate(valid_data).items()}
        self._require_number(values["val_loss"])
        values["learning_rate"] = float(self._optimizer.learning_rate)
        values["images_per_second"] = images_per_second
        for name, value in values.items():
            position.history.setdefault(name, []).append(value)
            tf.summary.scalar(name, value, step=position.epoch)
        self._keep_if_better({name: values[f"val_{name}"] for name in ("loss", "accuracy")}, epoch=position.epoch)
        for variable, value in zip(self._trained(), raw, strict=bool(raw)):
            variable.assign(value)
        position.epoch, position.step, position.sums = position.epoch + 1, 0, [0.0] * 4
        has_patience = position.epoch - 1 - position.best_epoch < stage.patience
        position.is_finished = position.epoch >= stage.epochs or not has_patience
        self._save()

    def _validate(self, valid_data: Any) -> dict[str, float]:
        sums = np.zeros(4)
        for batch in valid_data:
            sums += self._validate_step(batch).numpy()
        return _means(sums.tolist())

    def _keep_if_better(self, values: dict[str, float], *, epoch: int) -> None:
        position = self._position
        value = values["accuracy"] if self._stage.monitor == "val_accuracy" else -values["loss"]
        if position.best is None or value > position.best:
            position.best, position.best_epoch = value, epoch
            for best, variable in zip(self._best, self._trained(), strict=True):
                best.assign(variable.numpy())

    def _save(self) -> None:
        if self._devices.is_chief:
            self._encoded.assign(json.dumps(dataclasses.asdict(self._position)))
            self._manager.save()


def _means(sums: list[float]) -> dict[str, float]:
    loss, weight, hits, count = sums
    return {"loss": loss / max(weight, 1e-9), "accuracy": hits / max(count, 1.0)}


def _summary_writer(folder: str, *, is_chief: bool) -> tf.summary.SummaryWriter:
    if not is_chief:
        return tf.summary.create_noop_writer()
    return tf.summary.create_file_writer(folder)


@contextlib.contextmanager
def _sigterm() -> Iterator[Callable[[], bool]]:
    """Turns SIGTERM into a flag for as long as the block runs; outside the main thread it stays what it was."""
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield received.is_set
        return
    earlier = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield received.is_set
    finally:
        signal.signal(signal.SIGTERM, earlier)


def remove_checkpoints(folder: str) -> None:
    """Removes a folder of checkpoints, if it is there."""
    if tf.io.gfile.exists(folder):
        tf.io.gfile.rmtree(folder)


def keep_checkpoints(folder: str) -> None:
    """Puts checkpoints aside, where the next execution finds them: TFX removes the folders of one that fails."""
    run_folder, name = os.path.split(folder)
    if tf.io.gfile.exists(folder):
        aside = f"{run_folder.rstrip('/')}-failed"
        remove_checkpoints(os.path.join(aside, name))
        tf.io.gfile.makedirs(aside)
        tf.io.gfile.rename(folder, os.path.join(aside, name))


def adopt_checkpoints(folder: str, *, fingerprint: str) -> None:
    """Takes over the checkpoints that a killed run of the same work left, so that this one goes on where that one was.

    TFX gives each execution a folder of its own beside the others' of that component.

    Args:
      folder: `checkpoints` in this execution's `model_run_dir`; local or gs://.
      fingerprint: of all that the work depends on.
    """
    marker = "fingerprint"
    run_folder, name = os.path.split(folder)
    if _read(os.path.join(folder, marker)) == fingerprint:
        return  # this very execution, started again
    others = tf.io.gfile.glob(os.path.join(os.path.dirname(run_folder), "*", name, marker))
    matching = [os.path.dirname(path) for path in others if _read(path) == fingerprint]
    remove_checkpoints(folder)
    if matching:
        latest = max(matching, key=lambda path: (len(path), path))  # of the highest execution number
        logger.info("going on from the checkpoints of %s", os.path.dirname(latest))
        tf.io.gfile.makedirs(run_folder)
        tf.io.gfile.rename(latest, folder)
    tf.io.gfile.makedirs(folder)
    with tf.io.gfile.GFile(os.path.join(folder, marker), "w") as file:
        file.write(fingerprint)


def _read(path: str) -> str:
    if not tf.io.gfile.exists(path):
        return ""
    with tf.io.gfile.GFile(path) as file:
        return file.read()
