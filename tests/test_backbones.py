import keras
import numpy as np
import pytest

from data.errors import InputError
from models.backbones import BACKBONES, check_name, find_backbone, weights_fingerprint
from models.classifier import ModelConfig

IMAGE_SIZE = 64
TOO_SLOW_TO_RUN = {"efficientnet_b6", "efficientnet_b7", "efficientnet_v2_m", "efficientnet_v2_l"}  # these are only built

every_backbone = pytest.mark.parametrize("name", BACKBONES)


def _initialize_fast(self, shape, dtype=None, **_options):
    """Takes the place of an initializer that draws for longer than it takes to build the rest of the network."""
    draws = np.random.default_rng(0).normal(0, 1, 997)
    fan_out = np.prod(shape[:-2]) * shape[-1]
    return keras.ops.convert_to_tensor(np.resize(draws, shape) * np.sqrt(2 / fan_out), dtype)


@pytest.fixture(scope="module", params=BACKBONES)
def built(request):
    """The name of each backbone, and its network for 64 pixels, without trained weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.initializers.VarianceScaling, "__call__", _initialize_fast)
        return request.param, BACKBONES[request.param].build(image_size=IMAGE_SIZE)


@every_backbone
def test_backbone_says_what_it_needs_and_where_it_is_from(name):
    backbone = BACKBONES[name]

    # Not all are multiples of the stride of 32: the papers scaled sizes with the rest, and networks pad.
    assert backbone.image_size % 4 == 0
    assert 224 <= backbone.image_size <= 600
    assert backbone.interpolation in ("bicubic", "bilinear")
    assert backbone.licence
    assert backbone.paper.startswith("https://")


def test_backbone_turns_images_into_feature_maps_coarsest_last(built):
    name, network = built

    assert network.input_shape == (None, IMAGE_SIZE, IMAGE_SIZE, 3)
    shapes = network.output_shape
    assert len(shapes) >= 7
    sizes = [height for _, height, _, _ in shapes]
    assert sizes == sorted(sizes, reverse=True)
    assert all(height == width for _, height, width, _ in shapes)
    assert sizes[-1] == IMAGE_SIZE // 32
    at_stride_16 = tuple(index for index, size in enumerate(sizes) if size == IMAGE_SIZE // 16)
    assert BACKBONES[name].covariance_maps == at_stride_16
    if name in TOO_SLOW_TO_RUN:
        return
    images = np.random.default_rng(0).uniform(0, 255, (2, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32)
    for feature_map, shape in zip(network(images, training=False), shapes, strict=True):
        assert feature_map.shape == (2, *shape[1:])
        assert np.isfinite(np.asarray(feature_map)).all()
        assert np.ptp(feature_map) > 0


def test_backbone_maps_pixels_to_the_values_that_its_weights_expect(built):
    name, network = built
    first = [layer for layer in network.layers if isinstance(layer, keras.layers.Rescaling | keras.layers.Normalization)]
    normalized = keras.Model(network.inputs[0], first[-1].output)

    black, white = (np.asarray(normalized(np.full((1, IMAGE_SIZE, IMAGE_SIZE, 3), value, np.float32))) for value in (0, 255))

    np.testing.assert_allclose((black.min(), white.max()), BACKBONES[name].value_range, atol=1e-5)


def test_backbones_compute_with_any_keras_backend(built):
    # Only layers of Keras itself: no Lambda, nothing that names TensorFlow.
    _, network = built
    for layer in network.layers:
        assert type(layer).__module__.startswith("keras.src.layers")
        assert not isinstance(layer, keras.layers.Lambda)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"])
def test_backbone_load_imagenet_changes_the_weights(name):
    network = BACKBONES[name].build(image_size=32)
    before = [np.array(weight) for weight in network.weights]

    BACKBONES[name].load_imagenet(network, "")

    changed = [not np.array_equal(old, new) for old, new in zip(before, network.weights, strict=True)]
    assert all(changed)


def test_backbones_have_that_of_the_default_configuration():
    assert ModelConfig().backbone in BACKBONES


def test_backbones_have_the_sizes_of_the_papers():
    sizes = [backbone.image_size for backbone in BACKBONES.values()]

    assert sizes == [224, 240, 260, 224, 240, 260, 300, 380, 456, 528, 600, 224, 240, 260, 300, 384, 480, 480]


@every_backbone
def test_find_backbone_finds_each_by_its_name(name):
    assert find_backbone(name) is BACKBONES[name]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("efficientnet_lite3", "efficientnet_lite"),
        ("EfficientNetV2S", "efficientnet"),
        ("efficientnetb4", "efficientnet_b4"),
        ("efficientnet_v2_small", "efficientnet_v2_s"),
        ("", "efficientnet"),
    ],
)
@pytest.mark.parametrize("find", [check_name, find_backbone])
def test_find_backbone_of_another_name_says_what_there_is(find, name, nearest):
    with pytest.raises(InputError) as raised:
        find(name)

    message = str(raised.value)
    assert "\n" not in message
    for known in BACKBONES:
        assert known in message
    assert "handle of a TensorFlow Hub model" in message
    assert "path of a SavedModel" in message
    assert f"Received: model.backbone={name!r}. Did you mean {nearest}" in message


@pytest.mark.parametrize("name", ["efficientnet_b0", "https://tfhub.dev/x", "gs://bucket/x", "/x", "./x", "../x", "~/x"])
def test_check_name_takes_names_and_whatever_looks_like_a_handle_or_a_path(name):
    check_name(name)


def test_weights_fingerprint_is_that_of_the_file(tmp_path):
    path = tmp_path / "weights.h5"
    path.write_bytes(b"abc")

    assert weights_fingerprint("efficientnet_b0", "") == ""
    # https://csrc.nist.gov/csrc/media/projects/cryptographic-standards-and-guidelines/documents/examples/sha256.pdf
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert weights_fingerprint("efficientnet_b0", str(path)) == expected
