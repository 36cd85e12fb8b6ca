import keras
import numpy as np
import pytest

from models.classifier import ModelConfig, build_embedding, build_head, class_weights, join

RANDOM = ModelConfig(weights="random")
IMAGE_SIZE = 32


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 255, (3, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def embedding() -> keras.Model:
    keras.utils.set_random_seed(0)
    return build_embedding(RANDOM, image_size=IMAGE_SIZE)


def _head(num_features: int, num_classes: int) -> keras.Model:
    """A head whose weights are all random, so that its outputs differ."""
    random = np.random.default_rng(0)
    head = build_head(
        RANDOM,
        mean=random.normal(size=num_features),
        variance=random.uniform(0.5, 2.0, num_features),
        num_classes=num_classes,
    )
    for weight in head.trainable_weights:
        weight.assign(random.normal(scale=0.05, size=weight.shape))
    return head


def test_build_embedding_gives_a_row_of_features_for_each_image(embedding, images):
    features = np.asarray(embedding(images, training=False))

    assert embedding.input_shape == (None, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert features.shape == (3, embedding.output_shape[-1])
    assert features.dtype == np.float32
    assert np.isfinite(features).all()
    assert not np.allclose(features[0], features[1])


def test_build_embedding_is_frozen(embedding):
    assert embedding.trainable_weights == []
    assert embedding.weights


def test_build_embedding_gives_an_image_the_same_features_in_any_batch(embedding, images):
    together = np.asarray(embedding(images, training=False))
    alone = np.asarray(embedding(images[1:2], training=False))

    np.testing.assert_allclose(alone[0], together[1], rtol=1e-4, atol=1e-5)


def test_build_embedding_pools_the_feature_maps_asked_for():
    widths = [
        build_embedding(ModelConfig(weights="random", num_feature_maps=number), image_size=IMAGE_SIZE).output_shape[-1]
        for number in (1, 2)
    ]

    # The average and the maximum of each channel: the head's 1,280, then the last stage's 320.
    assert widths == [2 * 1280, 2 * (1280 + 320)]


def test_build_embedding_takes_averages_and_maxima_of_the_network(images):
    from models.backbones import BACKBONES

    config = ModelConfig(weights="imagenet", num_feature_maps=1)
    network = BACKBONES[config.backbone].build(image_size=IMAGE_SIZE, fold_batch_norm=True)
    BACKBONES[config.backbone].load_imagenet(network)
    last = np.asarray(network(images, training=False)[-1])

    features = build_embedding(config, image_size=IMAGE_SIZE)(images, training=False)

    expected = np.concatenate([last.mean((1, 2)), last.max((1, 2))], axis=-1)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4)


def test_build_head_gives_logits_of_each_class():
    head = _head(7, 4)

    logits = np.asarray(head(np.random.default_rng(1).normal(size=(5, 7)), training=False))

    assert logits.shape == (5, 4)
    assert logits.dtype == np.float32
    assert (logits < 0).any()
    assert logits.std() > 0


def test_build_head_does_not_care_for_the_scale_of_the_embeddings():
    # Each feature is measured in standard deviations from its mean.
    mean, variance = np.array([1.0, -2.0]), np.array([4.0, 0.25])
    heads = []
    for scale in (1.0, 100.0):
        head = build_head(RANDOM, mean=mean * scale, variance=variance * scale**2, num_classes=2)
        for position, weight in enumerate(head.trainable_weights):
            weight.assign(np.random.default_rng(position).normal(size=weight.shape))
        heads.append(np.asarray(head(np.array([[3.0, -1.0], [0.0, 0.0]]) * scale, training=False)))

    np.testing.assert_allclose(heads[1], heads[0], rtol=1e-3, atol=1e-3)


def test_join_is_the_embedding_then_the_head(embedding, images):
    head = _head(embedding.output_shape[-1], 3)
    classifier = join(embedding, head)

    probabilities = np.asarray(classifier(images, training=False))

    logits = np.asarray(head(embedding(images, training=False), training=False))
    exponents = np.exp(logits - logits.max(axis=-1, keepdims=True))
    np.testing.assert_allclose(probabilities, exponents / exponents.sum(axis=-1, keepdims=True), atol=1e-5)
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1.0, atol=1e-5)
    assert classifier.input_shape == (None, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert classifier.output_shape == (None, 3)


@pytest.mark.parametrize(
    ("label_counts", "weights"),
    [
        ([5, 5], [1.0, 1.0]),
        ([30, 10], [40 / 60, 40 / 20]),
        ([1, 2, 3], [2.0, 1.0, 2 / 3]),
    ],
)
def test_class_weights_are_the_inverse_frequencies(label_counts, weights):
    found = class_weights(label_counts)

    assert found == pytest.approx(weights)
    # The mean over the images is 1, so the learning rate means the same with and without weights.
    assert np.dot(found, label_counts) / sum(label_counts) == pytest.approx(1.0)


def test_class_weights_refuses_a_class_without_images():
    message = r"^Expected training images of every class. Received: label_counts=\[3, 0\].$"
    with pytest.raises(ValueError, match=message):
        class_weights([3, 0])
