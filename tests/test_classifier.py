import keras
import numpy as np
import pytest
import tensorflow as tf

from models.classifier import (
    ModelConfig,
    StatisticsPooling,
    build_head,
    build_statistics,
    class_weights,
    fit_projection,
    join,
)

RANDOM = ModelConfig(weights="random")
IMAGE_SIZE = 32


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 255, (6, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def statistics() -> keras.Model:
    return build_statistics(ModelConfig(), image_size=IMAGE_SIZE)


def test_build_statistics_gives_a_row_for_each_image(statistics, images):
    rows = np.asarray(statistics([images], training=False))

    assert statistics.input_shape == (None, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert rows.shape == (6, statistics.output_shape[-1])
    assert rows.dtype == np.float32
    assert np.isfinite(rows).all()
    assert not np.allclose(rows[0], rows[1])


def test_build_statistics_is_frozen(statistics):
    assert statistics.trainable_weights == []
    assert statistics.weights


def test_build_statistics_gives_an_image_the_same_row_in_any_batch(statistics, images):
    together = np.asarray(statistics([images], training=False))
    alone = np.asarray(statistics([images[1:2]], training=False))

    # The signed square root makes much of a difference between values near zero.
    np.testing.assert_allclose(np.square(alone[0]), np.square(together[1]), atol=1e-3)


def test_build_statistics_pools_more_feature_maps_when_asked():
    widths = [
        build_statistics(ModelConfig(weights="random", num_feature_maps=number), image_size=IMAGE_SIZE).output_shape[-1]
        for number in (1, 2, 4)
    ]

    assert widths == sorted(set(widths))


def test_build_statistics_with_imagenet_weights_differs_from_random_ones(statistics, images):
    random = build_statistics(RANDOM, image_size=IMAGE_SIZE)

    assert random.output_shape == statistics.output_shape
    assert not np.allclose(random([images], training=False), statistics([images], training=False))


@pytest.mark.parametrize("covariance", [False, True])
def test_statistics_pooling_agrees_with_numpy(covariance):
    feature_map = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)

    pooled = np.asarray(StatisticsPooling(covariance=covariance)(feature_map))

    for row, positions in zip(pooled, feature_map.reshape(2, 12, 5).astype(np.float64), strict=True):
        statistics = [positions.mean(axis=0), positions.max(axis=0), positions.std(axis=0)]
        if covariance:
            statistics.append(np.cov(positions, rowvar=False, ddof=0)[np.triu_indices(5)])
        expected = np.concatenate(statistics)
        # A signed square root, but for values near zero.
        np.testing.assert_allclose(row, expected / np.sqrt(np.abs(expected) + 1e-3), rtol=1e-3, atol=1e-3)


def test_statistics_pooling_has_a_gradient_where_a_channel_never_changes():
    feature_map = tf.Variable(np.zeros((1, 3, 3, 2), np.float32))

    with tf.GradientTape() as tape:
        total = tf.reduce_sum(StatisticsPooling(covariance=True)(feature_map))
    gradient = tape.gradient(total, feature_map)

    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0


def test_statistics_pooling_does_not_look_at_the_order_of_the_positions():
    feature_map = np.random.default_rng(0).normal(size=(1, 3, 4, 5)).astype(np.float32)
    pooling = StatisticsPooling(covariance=True)

    flipped = pooling(feature_map[:, ::-1, ::-1])

    np.testing.assert_allclose(flipped, pooling(feature_map), atol=1e-3)


def test_fit_projection_gives_principal_components():
    # Two directions of variance 9 and 1 among five statistics, each on a scale of its own.
    random = np.random.default_rng(0)
    hidden = random.normal(size=(400, 2)) * [3.0, 1.0]
    mixing = random.normal(size=(2, 5))
    sample = (hidden @ mixing * [1, 10, 100, 0.1, 1] + [0, 5, -50, 1, 7]).astype(np.float32)

    components = fit_projection(sample, num_components=4)(sample)

    assert components.shape == (400, 2)  # the sample has no more directions
    np.testing.assert_allclose(components.mean(axis=0), 0.0, atol=1e-3)
    assert np.square(components).mean() == pytest.approx(1.0, abs=1e-3)
    assert np.corrcoef(components, rowvar=False)[0, 1] == pytest.approx(0.0, abs=1e-3)
    # Nothing is lost: distances between standardized rows are those between the components, but for one factor.
    standardized = (sample - sample.mean(axis=0)) / sample.std(axis=0)
    before = np.linalg.norm(standardized[:200] - standardized[200:], axis=1)
    after = np.linalg.norm(components[:200] - components[200:], axis=1)
    np.testing.assert_allclose(after / before, (after / before).mean(), rtol=1e-2)


def test_fit_projection_keeps_the_components_of_most_variance():
    random = np.random.default_rng(0)
    strong = random.normal(size=(100, 1))
    sample = np.concatenate([strong + 0.1 * random.normal(size=(100, 9)), random.normal(size=(100, 1))], axis=1)

    components = fit_projection(sample.astype(np.float32), num_components=1)(sample.astype(np.float32))

    assert components.shape == (100, 1)
    assert abs(np.corrcoef(components[:, 0], strong[:, 0])[0, 1]) > 0.99


def test_fit_projection_passes_over_a_statistic_that_never_changes():
    random = np.random.default_rng(0)
    sample = np.concatenate([random.normal(size=(20, 3)), np.full((20, 1), 0.3)], axis=1).astype(np.float32)
    projection = fit_projection(sample, num_components=3)
    changed = sample.copy()
    changed[:, 3] = 5.0

    np.testing.assert_allclose(projection(changed), projection(sample), atol=1e-3)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (np.ones((1, 3)), r"^Expected at least two images to fit the projection\. Received: 1\.$"),
        (np.ones((4, 3)), r"^Expected images that differ\. Received: a sample of images that are all the same\.$"),
    ],
)
def test_fit_projection_refuses_a_sample_without_differences(sample, message):
    with pytest.raises(ValueError, match=message):
        fit_projection(sample.astype(np.float32), num_components=2)


@pytest.mark.parametrize("hidden_units", [0, 8])
def test_build_head_gives_logits_of_each_class(hidden_units):
    head = build_head(ModelConfig(hidden_units=hidden_units), num_components=7, num_classes=4)

    logits = np.asarray(head(np.random.default_rng(1).normal(size=(50, 7)), training=False))

    assert logits.shape == (50, 4)
    assert logits.dtype == np.float32
    assert (logits < 0).any()
    assert logits.std() > 0


@pytest.mark.parametrize("hidden_units", [0, 8])
def test_join_is_the_statistics_then_the_projection_then_the_head(statistics, images, hidden_units):
    rows = np.asarray(statistics([images], training=False))
    projection = fit_projection(rows, num_components=4)
    head = build_head(ModelConfig(hidden_units=hidden_units), num_components=4, num_classes=3)

    classifier = join(statistics, projection, head)
    probabilities = np.asarray(classifier([images], training=False))

    logits = np.asarray(head(projection(rows), training=False))
    exponents = np.exp(logits - logits.max(axis=-1, keepdims=True))
    np.testing.assert_allclose(probabilities, exponents / exponents.sum(axis=-1, keepdims=True), atol=1e-4)
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1.0, atol=1e-5)
    assert np.ptp(probabilities[:, 0]) > 1e-3
    assert classifier.input_shape == (None, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert classifier.output_shape == (None, 3)
    assert len(classifier.trainable_weights) == len(head.trainable_weights)


@pytest.mark.parametrize(
    ("label_counts", "balance", "weights"),
    [
        ([5, 5], 1.0, [1.0, 1.0]),
        ([30, 10], 1.0, [40 / 60, 40 / 20]),
        ([1, 2, 3], 1.0, [2.0, 1.0, 2 / 3]),
        ([30, 10], 0.0, [1.0, 1.0]),
        # Frequencies of 9 to 1: with one half, weights of 1 to 3, scaled to a mean of 1 over (9 * 1 + 1 * 3) / 10.
        ([9, 1], 0.5, [1 / 1.2, 3 / 1.2]),
    ],
)
def test_class_weights_are_a_power_of_the_inverse_frequencies(label_counts, balance, weights):
    found = class_weights(label_counts, balance=balance)

    assert found == pytest.approx(weights)
    # The mean over the images is 1, so the learning rate means the same with and without weights.
    assert np.dot(found, label_counts) / sum(label_counts) == pytest.approx(1.0)


def test_class_weights_refuses_a_class_without_images():
    message = r"^Expected training images of every class\. Received: label_counts=\[3, 0\]\.$"
    with pytest.raises(ValueError, match=message):
        class_weights([3, 0], balance=0.5)
