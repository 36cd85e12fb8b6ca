import keras
import pytest

from models.classifier import ModelConfig, Projection, build_head, build_statistics, join
from models.efficientnet_lite import LITE0, efficientnet_lite
from models.network_table import count_multiply_adds, describe_network


def _rows(table: str) -> dict[str, list[str]]:
    """Splits the table's rows into the name and the last three columns."""
    lines = [line for line in table.splitlines() if line.strip("-")]
    return {line.split("  ")[0]: line.split()[-3:] for line in lines}


@pytest.fixture(scope="module")
def lite0() -> keras.Model:
    """EfficientNet-Lite0 as it was published, with its classifier."""
    backbone = efficientnet_lite(LITE0, image_size=224)
    pooled = keras.layers.GlobalAveragePooling2D(name="pool")(backbone.outputs[-1])
    return keras.Model(backbone.inputs[0], keras.layers.Dense(1000, name="logits")(pooled))


def _tiny() -> keras.Model:
    image = keras.Input((8, 6, 3), name="image")
    x = keras.layers.Conv2D(4, 3, strides=2, padding="same", name="stem_conv")(image)
    x = keras.layers.BatchNormalization(name="stem_bn")(x)
    x = keras.layers.Conv2D(8, 1, groups=2, use_bias=False, name="block0_expand_conv")(x)
    x = keras.layers.DepthwiseConv2D((3, 1), depth_multiplier=2, name="block0_depthwise_conv")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    logits = keras.layers.Dense(5, name="logits")
    network = keras.Model(image, logits(x))
    logits.trainable = False
    return network


# By hand: rows x columns x kernel x channels x filters.
STEM = 4 * 3 * 3 * 3 * 3 * 4
EXPAND = 4 * 3 * (4 // 2) * 8
DEPTHWISE = 2 * 3 * (3 * 1) * 8 * 2
LOGITS = (2 * 3 * 16) * 5


def test_count_multiply_adds_of_a_tiny_network_is_what_a_hand_counts():
    assert count_multiply_adds(_tiny()) == STEM + EXPAND + DEPTHWISE + LOGITS


def test_count_multiply_adds_counts_a_one_dimensional_and_a_repeated_dense_layer():
    sequence = keras.Input((10, 3))
    x = keras.layers.Conv1D(4, 5)(sequence)
    network = keras.Model(sequence, keras.layers.Dense(2)(x))

    assert count_multiply_adds(network) == 6 * 5 * 3 * 4 + 6 * 4 * 2


def test_count_multiply_adds_reaches_into_networks_inside():
    image = keras.Input((8, 6, 3))
    network = keras.Model(image, keras.layers.Dense(7)(_tiny()(image)))

    assert count_multiply_adds(network) == STEM + EXPAND + DEPTHWISE + LOGITS + 5 * 7


def test_describe_network_has_a_row_for_each_block():
    table = describe_network(_tiny())

    parameters = {"stem": 112 + 16, "block0": 16 + 64, "logits": 485}
    rows = _rows(table)
    assert list(rows) == ["layers", "image", "stem", "block0", "flatten", "logits", "total", *list(rows)[-2:]]
    assert rows["stem"] == ["128", "120", "0.00"]  # the moving mean and variance are not trained
    assert rows["block0"] == ["80", "80", "0.00"]
    assert rows["logits"] == ["485", "0", "0.00"]
    assert rows["total"] == [str(sum(parameters.values())), "200", "0.00"]
    assert "4 x 3 x 4" in table
    assert "2 x 3 x 16" in table
    assert "two FLOPs" in table
    assert table.isascii()


def test_describe_network_lines_are_of_one_width():
    lines = describe_network(_tiny()).splitlines()[:-2]

    assert len({len(line) for line in lines}) == 1
    assert len(lines[0]) <= 100


def test_describe_network_of_lite0_agrees_with_its_publication(lite0):
    # Published: 407 million multiply-adds and 4.7 million parameters,
    # https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite. It does not say what it counts; ours is
    # 5% less, about what normalization and ReLU6 take (13 million values).
    rows = _rows(describe_network(lite0))

    assert rows["total"][1] == "4,652,008"
    assert float(rows["total"][2]) == pytest.approx(407, rel=0.06)
    assert count_multiply_adds(lite0) == 385_187_552
    assert {f"block{number}" for number in range(16)} < set(rows)
    assert len(rows) < 30


def test_describe_network_of_our_classifier_keeps_the_head_apart():
    config = ModelConfig(weights="random", num_feature_maps=2, covariance=False, hidden_units=4)
    statistics = build_statistics(config, image_size=32)
    width = statistics.output_shape[-1]
    kernel = keras.ops.convert_to_numpy(keras.ops.zeros((width, 3)))
    network = join(statistics, Projection(kernel, kernel[0]), build_head(config, num_components=3, num_classes=2))

    rows = _rows(describe_network(network))

    assert rows["head (network)"][:2] == ["26", "26"]
    assert rows["projection"][:2] == [f"{3 * width + 3:,}", "0"]
    assert rows["head"][0] == f"{320 * 1280 + 1280:,}"  # the backbone's last convolution, its normalization folded
    assert {"feature_map6_pool", "feature_map7_pool", "statistics", "probabilities"} < set(rows)


def test_describe_network_shows_the_blocks_of_a_network_inside():
    image = keras.Input((8, 6, 3))
    network = keras.Model(image, keras.layers.Dense(7, name="top")(_tiny()(image)))

    assert {"stem", "block0", "top"} < set(_rows(describe_network(network)))


def test_describe_network_counts_what_is_used_twice_once():
    image = keras.Input((4,))
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)], name="inner")

    network = keras.Model(image, inner(inner(image)))

    assert _rows(describe_network(network))["total"][0] == "20"
    assert count_multiply_adds(network) == 16


def test_describe_network_refuses_what_it_cannot_count():
    image = keras.Input((None, None, 3))
    with pytest.raises(ValueError, match=r"Expected a network with an input of a fixed size.*image_size"):
        describe_network(keras.Model(image, keras.layers.Conv2D(2, 3, name="conv")(image)))
