import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASS_NAMES, TRANSFORM_IMAGE_SIZE

from models.classifier import ModelConfig, build_backbone
from models.embeddings import find_images
from models.fine_tuning import FineTuningConfig, ImageBatches, LayerwiseAdamW, make_optimizer, unfreeze
from models.loop import Stage
from preprocessing.augment import AugmentationConfig, resolve_augmentation
from preprocessing.transform import TransformGraph

NUM_IMAGES = 21
NONE = resolve_augmentation(AugmentationConfig(strength="none"), num_images=NUM_IMAGES)
LIGHT = resolve_augmentation(AugmentationConfig(strength="light"), num_images=NUM_IMAGES)
ALONE = tf.distribute.InputContext(num_input_pipelines=1, input_pipeline_id=0, num_replicas_in_sync=1)


def _stage(**settings) -> Stage:
    defaults = {"name": "s", "epochs": 3, "num_images": NUM_IMAGES, "global_batch_size": 4, "patience": 1}
    return Stage(**defaults | {"monitor": "val_loss", "label_smoothing": 0.0} | settings)


@pytest.fixture(scope="module")
def backbone() -> keras.Model:
    return build_backbone(ModelConfig(weights="random"), image_size=TRANSFORM_IMAGE_SIZE)


@pytest.fixture(scope="module")
def batches(tmp_path_factory, write_records, transform_graph) -> ImageBatches:
    """Grey images whose brightness is their number times ten, in two files."""
    folder = tmp_path_factory.mktemp("records")
    images = [np.full((TRANSFORM_IMAGE_SIZE, TRANSFORM_IMAGE_SIZE, 3), 10 * number, np.uint8) for number in range(NUM_IMAGES)]
    labels = [CLASS_NAMES[number % 2] for number in range(NUM_IMAGES)]
    write_records(folder / "train-0.gz", images[:12], labels[:12])
    write_records(folder / "train-1.gz", images[12:], labels[12:])
    found = find_images([str(folder / "train-*")], split="train")
    return ImageBatches(TransformGraph(transform_graph), found, found, [0.5, 2.0], batch_size=4, seed=0, is_deterministic=True)


def _numbers(dataset: tf.data.Dataset, num_batches: int) -> list[int]:
    """The images of the first batches, by their numbers."""
    images = np.concatenate([images for images, _, _ in dataset.take(num_batches).as_numpy_iterator()])
    return np.rint(images[:, 0, 0, 0] / 10).astype(int).tolist()


@pytest.mark.parametrize(("share", "num_stages"), [(0.01, 1), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_unfreeze_trains_the_top_stages_but_no_batch_normalization(backbone, share, num_stages):
    depths = unfreeze(backbone, share=share)

    assert set(depths.values()) == set(range(num_stages))
    assert depths["head_conv/kernel"] == 0
    assert set(depths) == {variable.path for variable in backbone.trainable_variables}
    assert not any(layer.trainable for layer in backbone.layers if isinstance(layer, keras.layers.BatchNormalization))
    assert ("stem_conv/kernel" in depths) == (share == 1.0)


def test_unfreeze_can_be_undone_by_a_smaller_share(backbone):
    unfreeze(backbone, share=1.0)

    assert set(unfreeze(backbone, share=0.01).values()) == {0}


def _optimizer_of(config: FineTuningConfig, stage: Stage, *, num_replicas: int = 1, depth: int | None = None):
    """A dense layer and its optimizer; with a depth, the layer is one of the backbone's, that many stages below the last."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    depths = {} if depth is None else {variable.path: depth for variable in model.trainable_variables}
    optimizer = make_optimizer(config, model, depths, stage=stage, num_replicas=num_replicas)
    optimizer.build(model.trainable_variables)
    return model, optimizer


@pytest.mark.parametrize("num_replicas", [1, 4])
def test_make_optimizer_warms_up_and_falls_along_a_cosine(num_replicas):
    stage = _stage(epochs=10, num_images=40)  # 100 steps
    config = FineTuningConfig(learning_rate=0.01, warmup_epochs=2)

    _, optimizer = _optimizer_of(config, stage, num_replicas=num_replicas)
    rates = []
    for step in (0, 10, 20, 60, 100):
        optimizer.iterations.assign(step)
        rates.append(float(optimizer.learning_rate))

    peak = 0.01 * num_replicas
    np.testing.assert_allclose(rates, [0, peak / 2, peak, peak / 2, 0], atol=1e-6)


def test_make_optimizer_goes_without_a_warm_up():
    _, optimizer = _optimizer_of(FineTuningConfig(learning_rate=0.01, warmup_epochs=0), _stage())

    assert float(optimizer.learning_rate) == pytest.approx(0.01)


def test_make_optimizer_gives_each_stage_its_learning_rate():
    config = FineTuningConfig(
        learning_rate=0.1, backbone_learning_rate=0.01, layer_decay=0.5, warmup_epochs=0, weight_decay=0, gradient_clip_norm=0
    )
    moved = {}
    for depth in (None, 0, 2):
        model, optimizer = _optimizer_of(config, _stage(), depth=depth)
        before = model.get_weights()[0]
        optimizer.apply([tf.ones_like(variable) for variable in model.trainable_variables])
        moved[depth] = np.abs(model.get_weights()[0] - before).mean()

    assert moved == pytest.approx({None: 0.1, 0: 0.01, 2: 0.0025}, rel=1e-3)


def test_make_optimizer_decays_kernels_only():
    config = FineTuningConfig(learning_rate=0.1, warmup_epochs=0, weight_decay=0.5)
    model, optimizer = _optimizer_of(config, _stage())
    model.set_weights([np.ones((2, 2)), np.ones(2)])

    optimizer.apply([tf.zeros_like(variable) for variable in model.trainable_variables])

    kernel, bias = model.get_weights()
    np.testing.assert_allclose(kernel, 0.95, rtol=1e-5)
    np.testing.assert_allclose(bias, 1.0, rtol=1e-6)


def test_make_optimizer_limits_the_gradients_of_all_replicas_together():
    _, optimizer = _optimizer_of(FineTuningConfig(gradient_clip_norm=2.0), _stage(), num_replicas=4)

    assert optimizer.global_clipnorm == pytest.approx(0.5)
    assert _optimizer_of(FineTuningConfig(gradient_clip_norm=0), _stage())[1].global_clipnorm is None


@pytest.mark.parametrize(("average_epochs", "momentum"), [(0, None), (1.0, 10 / 11), (3.0, 30 / 31)])
def test_make_optimizer_averages_over_epochs(average_epochs, momentum):
    _, optimizer = _optimizer_of(FineTuningConfig(average_epochs=average_epochs), _stage(num_images=40))

    assert (optimizer.ema_momentum if optimizer.use_ema else None) == (momentum and pytest.approx(momentum))


def test_layerwise_adamw_decays_at_the_rate_of_each_variable():
    optimizer = LayerwiseAdamW(0.1, factors=[1.0, 0.5], decays=[0.2, 0.2])
    variables = [keras.Variable([1.0]), keras.Variable([1.0])]
    optimizer.build(variables)

    optimizer.apply([tf.zeros(1), tf.zeros(1)], variables)

    np.testing.assert_allclose([float(variable.numpy()[0]) for variable in variables], [0.98, 0.99], rtol=1e-6)


def test_layerwise_adamw_is_adamw_where_all_factors_are_one():
    results = []
    for optimizer in (
        keras.optimizers.AdamW(0.1, weight_decay=0.1),
        LayerwiseAdamW(0.1, factors=[1.0, 1.0], decays=[0.1, 0.1]),
    ):
        variables = [keras.Variable([1.0, 2.0]), keras.Variable([3.0])]
        optimizer.build(variables)
        for _ in range(3):
            optimizer.apply([tf.constant([0.5, -0.1]), tf.constant([2.0])], variables)
        results.append(np.concatenate([variable.numpy() for variable in variables]))

    np.testing.assert_allclose(results[0], results[1], rtol=1e-6)


def test_image_batches_show_every_image_in_every_epoch(batches):
    stage = _stage()
    dataset = batches.train_from(stage, NONE, epoch=0, step=0)(ALONE)

    numbers = _numbers(dataset, 2 * stage.steps_per_epoch)

    epochs = [numbers[:24], numbers[24:]]
    for epoch in epochs:
        assert len(epoch) == 24  # the last batch is filled up
        assert set(epoch) == set(range(NUM_IMAGES))
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])


def test_image_batches_give_targets_and_weights_of_the_label(batches):
    images, targets, weights = next(batches.train_from(_stage(), NONE, epoch=0, step=0)(ALONE).as_numpy_iterator())

    labels = np.rint(images[:, 0, 0, 0] / 10).astype(int) % 2
    np.testing.assert_array_equal(targets, np.eye(2)[labels])
    np.testing.assert_array_equal(weights, np.where(labels == 0, 0.5, 2.0))


@pytest.mark.parametrize(("epoch", "step"), [(0, 3), (1, 0), (1, 5)])
def test_image_batches_go_on_as_if_nothing_had_been(batches, epoch, step):
    stage = _stage()
    whole = list(batches.train_from(stage, LIGHT, epoch=0, step=0)(ALONE).take(15).as_numpy_iterator())
    first = epoch * stage.steps_per_epoch + step

    resumed = list(batches.train_from(stage, LIGHT, epoch=epoch, step=step)(ALONE).take(15 - first).as_numpy_iterator())

    for found, expected in zip(resumed, whole[first:], strict=True):
        for left, right in zip(found, expected, strict=True):
            np.testing.assert_array_equal(left, right)


def test_image_batches_augment_an_image_anew_in_each_epoch(batches):
    stage = _stage()
    images = [images for images, _, _ in batches.train_from(stage, LIGHT, epoch=0, step=0)(ALONE).take(12).as_numpy_iterator()]

    first, second = np.concatenate(images[:6]), np.concatenate(images[6:])

    assert not np.isclose(first.mean(axis=(1, 2, 3))[:, np.newaxis], second.mean(axis=(1, 2, 3)), atol=1e-4).all(axis=1).any()
    assert first.min() >= 0
    assert first.max() <= 255


def test_image_batches_are_shared_out_among_workers(batches):
    stage = _stage(global_batch_size=8, epochs=1)
    found = []
    for index in (0, 1):
        worker = tf.distribute.InputContext(num_input_pipelines=2, input_pipeline_id=index, num_replicas_in_sync=2)
        found += _numbers(batches.train_from(stage, NONE, epoch=0, step=0)(worker), 3)
    alone = _numbers(batches.train_from(stage, NONE, epoch=0, step=0)(ALONE), 6)

    assert sorted(found) == sorted(alone)
    assert set(found) == set(range(NUM_IMAGES))


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_image_batches_validate_each_image_once_on_as_many_batches_everywhere(batches, num_workers):
    counted, lengths = [], []
    for index in range(num_workers):
        context = tf.distribute.InputContext(num_workers, index, num_workers)
        found = list(batches.valid_once(context).as_numpy_iterator())
        lengths.append([len(weights) for _, _, weights in found])
        for images, _, weights in found:
            counted += np.rint(images[weights > 0, 0, 0, 0] / 10).astype(int).tolist()

    assert sorted(counted) == list(range(NUM_IMAGES))
    assert all(length == lengths[0] for length in lengths)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("unfrozen", 0), ("unfrozen", 1.1), ("learning_rate", 0), ("layer_decay", 0), ("stochastic_depth", 1), ("epochs", -1)],
)
def test_fine_tuning_config_refuses_what_makes_no_sense(setting, value):
    with pytest.raises(ValueError, match=setting):
        FineTuningConfig(**{setting: value})
