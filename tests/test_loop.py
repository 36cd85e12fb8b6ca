import os
import signal
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.devices import Devices
from models.loop import (
    EXIT_PREEMPTED,
    DivergedError,
    Loop,
    Preempted,
    Stage,
    adopt_checkpoints,
    keep_checkpoints,
    remove_checkpoints,
)

NUM_IMAGES, BATCH_SIZE, EPOCHS = 40, 8, 4
STEPS = NUM_IMAGES // BATCH_SIZE


class KilledError(Exception):
    """Ends a run at once, with nothing saved; what a kill leaves on disk."""


@pytest.fixture(autouse=True)
def _restored_precision():
    before = keras.mixed_precision.dtype_policy()
    yield
    keras.mixed_precision.set_dtype_policy(before)


def _devices(precision: str = "float32", *, is_chief: bool = True) -> Devices:
    return Devices(
        strategy=tf.distribute.get_strategy(),
        precision=precision,
        jit_compile=False,
        is_chief=is_chief,
        local_device="/CPU:0",
        deterministic=True,
    )


def _data(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two clouds that a linear model tells apart: features, targets, weights."""
    random = np.random.default_rng(seed)
    labels = np.arange(NUM_IMAGES) % 2
    features = np.where(labels[:, np.newaxis] == 0, 1.0, -1.0) + random.normal(scale=0.5, size=(NUM_IMAGES, 4))
    return features.astype(np.float32), np.eye(2, dtype=np.float32)[labels], np.ones(NUM_IMAGES, np.float32)


def _train(epoch: int, step: int, *, do=None):
    """Batches of each epoch in an order of its own; `do(epoch, step)` is called before each."""

    def generate():
        for number in range(epoch, EPOCHS + 1):
            order = np.random.default_rng(number).permutation(NUM_IMAGES)
            for position in range(STEPS):
                if number == epoch and position < step:
                    continue
                if do:
                    do(number, position)
                rows = order[position * BATCH_SIZE : (position + 1) * BATCH_SIZE]
                yield tuple(values[rows] for values in _data(0))

    signature = tuple(tf.TensorSpec((None, *shape), tf.float32) for shape in ((4,), (2,), ()))
    return lambda context: tf.data.Dataset.from_generator(generate, output_signature=signature)


def _valid(context):
    return tf.data.Dataset.from_tensor_slices(_data(1)).batch(16)


@pytest.fixture
def make_loop(tmp_path):
    """Makes a loop over a network with dropout, whose optimizer has momentum and a moving average."""

    def make(
        *, folder: str = "run", learning_rate: float = 0.01, devices: Devices | None = None, average=True, **stage
    ) -> Loop:
        keras.utils.set_random_seed(0)
        devices = devices or _devices()
        keras.mixed_precision.set_dtype_policy(devices.precision)
        layers = [keras.layers.Dense(8, activation="relu"), keras.layers.Dropout(0.5), keras.layers.Dense(2)]
        model = keras.Sequential([keras.Input((4,)), *layers])
        optimizer = keras.optimizers.AdamW(learning_rate, use_ema=average, ema_momentum=0.8)
        settings = {"name": "stage", "epochs": EPOCHS, "num_images": NUM_IMAGES, "global_batch_size": BATCH_SIZE}
        settings |= {"patience": EPOCHS, "monitor": "val_loss", "label_smoothing": 0.0, "advice": "Rest."}
        stage = Stage(**settings | stage)
        loop = Loop(
            model,
            optimizer,
            stage,
            devices,
            folder=str(tmp_path / folder / "checkpoints"),
            log_folder=str(tmp_path / folder / "logs"),
        )
        loop.model = model
        return loop

    return make


def _weights(loop: Loop) -> np.ndarray:
    return np.concatenate([weight.ravel() for weight in loop.model.get_weights()])


def test_loop_learns_and_gives_its_history(make_loop):
    loop = make_loop(learning_rate=0.05)

    history = loop.run(_train, _valid)

    names = {"loss", "accuracy", "val_loss", "val_accuracy", "learning_rate", "images_per_second"}
    assert set(history) == names
    assert {len(values) for values in history.values()} == {EPOCHS}
    assert history["val_accuracy"][-1] > 0.9
    assert history["learning_rate"] == pytest.approx([0.05] * EPOCHS)


def test_loop_measures_what_keras_measures(make_loop):
    loop = make_loop()
    history = loop.run(_train, _valid)

    features, targets, _ = _data(1)
    loop.model.compile(loss=keras.losses.CategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    loss, accuracy = loop.model.evaluate(features, targets, verbose=0)

    assert min(history["val_loss"]) == pytest.approx(loss, rel=1e-5)
    assert history["val_accuracy"][int(np.argmin(history["val_loss"]))] == pytest.approx(accuracy)


def test_loop_leaves_images_of_no_weight_out_of_its_measures(make_loop):
    features, targets, weights = _data(1)
    filling = (np.full((8, 4), 9.0, np.float32), np.eye(2, dtype=np.float32)[[0] * 8], np.zeros(8, np.float32))
    filled = [np.concatenate(pair) for pair in zip((features, targets, weights), filling, strict=True)]

    expected = make_loop(folder="a").run(_train, _valid)
    found = make_loop(folder="b").run(_train, lambda context: tf.data.Dataset.from_tensor_slices(tuple(filled)).batch(16))

    np.testing.assert_allclose(found["val_loss"], expected["val_loss"], rtol=1e-5)
    np.testing.assert_allclose(found["val_accuracy"], expected["val_accuracy"])


@pytest.mark.one_stack
@pytest.mark.parametrize("precision", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("at", [(1, 0), (2, 3)])
def test_loop_that_was_killed_ends_with_the_same_model(make_loop, precision, at):
    whole = make_loop(folder="whole", devices=_devices(precision))
    expected = whole.run(_train, _valid)

    def kill(epoch, step):
        if (epoch, step) == at:
            raise KilledError

    with pytest.raises(tf.errors.OpError, match="KilledError"):
        make_loop(devices=_devices(precision)).run(lambda *start: _train(*start, do=kill), _valid)
    starts = []
    loop = make_loop(devices=_devices(precision))
    found = loop.run(lambda *start: _train(*start, do=lambda *position: starts.append(position)), _valid)

    assert starts[0] == (at[0], 0)  # the epochs before are not trained again
    np.testing.assert_allclose(_weights(loop), _weights(whole), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["val_loss"], expected["val_loss"], rtol=1e-5)


def test_loop_saves_before_it_is_preempted_and_goes_on_at_that_step(make_loop):
    whole = make_loop(folder="whole")
    expected = whole.run(_train, _valid)
    earlier = signal.getsignal(signal.SIGTERM)
    steps = []

    def preempt(epoch, step):
        steps.append((epoch, step))
        if (epoch, step) == (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted) as caught:
        make_loop().run(lambda *start: _train(*start, do=preempt), _valid)
    assert caught.value.code == EXIT_PREEMPTED
    assert signal.getsignal(signal.SIGTERM) is earlier
    interrupted_at = steps[-1]
    del steps[:]
    loop = make_loop()
    found = loop.run(lambda *start: _train(*start, do=lambda *position: steps.append(position)), _valid)

    assert steps[0] > (1, 0)
    assert steps[0] <= interrupted_at
    np.testing.assert_allclose(_weights(loop), _weights(whole), rtol=1e-5, atol=1e-6)
    for name in ("loss", "accuracy", "val_loss", "val_accuracy"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


def test_loop_that_is_finished_gives_its_result_again_without_training(make_loop):
    first = make_loop()
    history = first.run(_train, _valid)

    def fail(epoch, step):
        raise KilledError

    again = make_loop()

    assert again.run(lambda *start: _train(*start, do=fail), _valid) == history
    np.testing.assert_array_equal(_weights(again), _weights(first))


def test_loop_stops_when_patience_ends_and_keeps_the_best(make_loop):
    # The validation targets are the wrong way round: the first epoch is the best.
    features, targets, weights = _data(1)

    def valid(context):
        return tf.data.Dataset.from_tensor_slices((features, targets[:, ::-1], weights)).batch(16)

    loop = make_loop(learning_rate=0.1, patience=2)
    history = loop.run(_train, valid)

    assert len(history["val_loss"]) == 3
    logits = loop.model.predict(features, verbose=0)
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)(targets[:, ::-1], logits)
    assert float(loss) == pytest.approx(history["val_loss"][0], rel=1e-5)


@pytest.mark.parametrize("keeps_start", [False, True])
def test_loop_may_keep_the_weights_that_it_started_from(make_loop, keeps_start):
    features, targets, weights = _data(1)
    loop = make_loop(learning_rate=0.1, patience=1, keeps_start=keeps_start)
    start = _weights(loop)

    loop.run(_train, lambda context: tf.data.Dataset.from_tensor_slices((features, targets[:, ::-1], weights)).batch(16))

    assert np.array_equal(_weights(loop), start) == keeps_start


def test_loop_can_watch_accuracy(make_loop):
    # Confident and right about most: the accuracy is best where the loss is worst.
    features, targets, weights = _data(1)
    targets = targets.copy()
    targets[:4] = targets[:4, ::-1]
    features[:4] *= 50

    def valid(context):
        return tf.data.Dataset.from_tensor_slices((features, targets, weights)).batch(16)

    by_loss = make_loop(folder="a", learning_rate=0.05).run(_train, valid)
    loop = make_loop(folder="b", learning_rate=0.05, monitor="val_accuracy")
    by_accuracy = loop.run(_train, valid)

    assert np.argmin(by_loss["val_loss"]) != np.argmax(by_accuracy["val_accuracy"])
    hits = np.argmax(loop.model.predict(features, verbose=0), axis=1) == np.argmax(targets, axis=1)
    assert hits.mean() == pytest.approx(max(by_accuracy["val_accuracy"]))


def test_loop_validates_the_moving_average(make_loop):
    raw = make_loop(folder="raw", average=False, learning_rate=0.05).run(_train, _valid)
    averaged = make_loop(folder="averaged", learning_rate=0.05).run(_train, _valid)

    # The same steps, as the average does not change them.
    np.testing.assert_allclose(averaged["loss"], raw["loss"], rtol=1e-5)
    # In the first epoch the average is still near the start.
    assert averaged["val_loss"][0] > raw["val_loss"][0] * 1.01


def test_loop_stops_at_a_loss_that_is_no_number(make_loop):
    message = r"^Expected a finite loss. Received: (nan|inf) in epoch \d of stage. Rest.$"
    with pytest.raises(ValueError, match=message):
        make_loop(learning_rate=1e38).run(_train, _valid)


def test_loop_stops_where_validation_is_no_number(make_loop):
    features, targets, weights = _data(1)
    broken = np.full_like(targets, np.nan)

    with pytest.raises(DivergedError, match=r"^Expected a finite loss. Received: nan in epoch 1 of stage. Rest.$"):
        make_loop().run(_train, lambda context: tf.data.Dataset.from_tensor_slices((features, broken, weights)).batch(16))


def test_loop_smooths_the_labels(make_loop):
    plain = make_loop(folder="a").run(_train, _valid)
    smooth = make_loop(folder="b", label_smoothing=1.0 - 1e-6).run(_train, _valid)

    # Targets of one half each: nothing beats the logarithm of 2.
    assert min(smooth["loss"]) > np.log(2) - 1e-3
    assert min(plain["loss"]) < np.log(2)


def test_loop_writes_logs_for_tensorboard(make_loop, tmp_path):
    history = make_loop().run(_train, _valid)

    events = EventAccumulator(str(tmp_path / "run" / "logs"), size_guidance={"tensors": 0})
    events.Reload()
    losses = [float(tf.make_ndarray(event.tensor_proto)) for event in events.Tensors("val_loss")]
    np.testing.assert_allclose(losses, history["val_loss"], rtol=1e-6)


def test_loop_writes_nothing_where_it_is_not_the_chief(make_loop, tmp_path):
    make_loop(devices=_devices(is_chief=False)).run(_train, _valid)

    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_stage_counts_a_step_for_the_images_that_are_left():
    settings = {"name": "s", "epochs": 1, "patience": 1, "monitor": "val_loss", "label_smoothing": 0.0}
    assert Stage(num_images=40, global_batch_size=8, **settings).steps_per_epoch == 5
    assert Stage(num_images=41, global_batch_size=8, **settings).steps_per_epoch == 6


def _leave_checkpoints(folder: Path, fingerprint: str, content: str) -> None:
    folder.mkdir(parents=True)
    (folder / "fingerprint").write_text(fingerprint)
    (folder / "state").write_text(content)


def test_adopt_checkpoints_takes_those_of_a_killed_run_of_the_same_work(tmp_path):
    _leave_checkpoints(tmp_path / "9" / "checkpoints", "same", "older")
    _leave_checkpoints(tmp_path / "10" / "checkpoints", "same", "newer")
    _leave_checkpoints(tmp_path / "11" / "checkpoints", "another", "foreign")
    folder = tmp_path / "12" / "checkpoints"

    adopt_checkpoints(str(folder), fingerprint="same")

    assert (folder / "state").read_text() == "newer"
    assert (tmp_path / "11" / "checkpoints" / "state").read_text() == "foreign"
    adopt_checkpoints(str(folder), fingerprint="same")  # started again itself
    assert (folder / "state").read_text() == "newer"


def test_adopt_checkpoints_starts_anew_where_there_are_none(tmp_path):
    folder = tmp_path / "1" / "checkpoints"
    _leave_checkpoints(folder, "another", "of other work")

    adopt_checkpoints(str(folder), fingerprint="this")

    assert [path.name for path in folder.iterdir()] == ["fingerprint"]
    assert (folder / "fingerprint").read_text() == "this"


def test_keep_checkpoints_puts_them_where_the_next_execution_looks(tmp_path):
    folder = tmp_path / "7" / "checkpoints"
    for content in ("first", "second"):  # a run can fail twice
        _leave_checkpoints(folder, "same", content)
        keep_checkpoints(str(folder))
    (tmp_path / "7").rmdir()  # as TFX does with the outputs of what has failed

    adopt_checkpoints(str(tmp_path / "8" / "checkpoints"), fingerprint="same")

    assert (tmp_path / "8" / "checkpoints" / "state").read_text() == "second"


def test_remove_checkpoints_takes_what_is_there(tmp_path):
    _leave_checkpoints(tmp_path / "checkpoints", "", "")

    remove_checkpoints(str(tmp_path / "checkpoints"))
    remove_checkpoints(str(tmp_path / "checkpoints"))

    assert list(tmp_path.iterdir()) == []
