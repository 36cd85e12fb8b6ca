import typing

import keras
import numpy as np
import pytest

from models.backbones import BACKBONES
from models.classifier import ModelConfig

every_backbone = pytest.mark.parametrize("name", BACKBONES)


@every_backbone
def test_backbone_says_what_it_needs_and_where_it_is_from(name):
    backbone = BACKBONES[name]

    assert backbone.image_size % 32 == 0
    assert backbone.licence
    assert backbone.paper.startswith("https://")


@every_backbone
@pytest.mark.parametrize("fold_batch_norm", [False, True])
def test_backbone_turns_images_into_feature_maps_coarsest_last(name, fold_batch_norm):
    network = BACKBONES[name].build(image_size=64, fold_batch_norm=fold_batch_norm)

    assert network.input_shape == (None, 64, 64, 3)
    shapes = network.output_shape
    sizes = [height for _, height, _, _ in shapes]
    assert sizes == sorted(sizes, reverse=True)
    assert all(height == width for _, height, width, _ in shapes)
    assert sizes[-1] == 64 // 32

    images = np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 3)).astype(np.float32)
    for feature_map, shape in zip(network(images, training=False), shapes, strict=True):
        assert feature_map.shape == (2, *shape[1:])
        assert np.isfinite(np.asarray(feature_map)).all()


@every_backbone
def test_backbone_load_imagenet_changes_the_weights(name):
    network = BACKBONES[name].build(image_size=32, fold_batch_norm=True)
    before = [np.array(weight) for weight in network.weights]

    BACKBONES[name].load_imagenet(network)

    changed = [not np.array_equal(old, new) for old, new in zip(before, network.weights, strict=True)]
    assert all(changed)


def test_backbones_are_those_that_the_configuration_offers():
    assert set(typing.get_args(ModelConfig.model_fields["backbone"].annotation)) == set(BACKBONES)


def test_backbones_compute_with_any_keras_backend():
    # Only layers of Keras itself: no Lambda, nothing that names TensorFlow.
    for backbone in BACKBONES.values():
        for layer in backbone.build(image_size=32, fold_batch_norm=True).layers:
            assert type(layer).__module__.startswith("keras.src.layers")
            assert not isinstance(layer, keras.layers.Lambda)
