import logging
from pathlib import Path

import keras
import numpy as np
import pydantic
import pytest
import tensorflow as tf

from models.classifier import ModelConfig, build_head, build_statistics, fit_projection, join
from models.tflite import ExportConfig, compare_tflite, evaluate_tflite, export_tflite, integer_share

CLASS_NAMES = ("dark", "bright", "red")
IMAGE_SIZE = 32
KINDS = ("float16", "int8")


@pytest.fixture(scope="module")
def images() -> tuple[np.ndarray, np.ndarray]:
    """Noise of three kinds that a network tells apart, and its labels."""
    random = np.random.default_rng(0)
    labels = np.arange(36) % 3
    images = random.uniform(0, 90, (36, IMAGE_SIZE, IMAGE_SIZE, 3))
    images[labels == 1] += 150
    images[labels == 2, ..., 0] += 150
    return images.astype(np.float32), labels


@pytest.fixture(scope="module")
def network(images) -> keras.Model:
    """A classifier with statistics and covariances, whose head has learned the three kinds."""
    config = ModelConfig(num_feature_maps=4, hidden_units=0)
    statistics = build_statistics(config, image_size=IMAGE_SIZE)
    rows = np.asarray(statistics(images[0], training=False))
    projection = fit_projection(rows, num_components=8)
    head = build_head(config, num_components=8, num_classes=3)
    # Least squares in place of a training: the same numbers in every run.
    components = projection(rows)
    head.set_weights([np.linalg.pinv(components) @ (6 * np.eye(3)[images[1]] - 2), np.zeros(3)])
    return join(statistics, projection, head)


@pytest.fixture(scope="module")
def paths(tmp_path_factory, network, images) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tflite") / "models"
    return export_tflite(network, str(folder), kinds=KINDS, calibration_images=iter(images[0]), class_names=CLASS_NAMES)


@pytest.fixture(scope="module")
def batches(images) -> list[tuple[np.ndarray, np.ndarray]]:
    """In batches of unlike sizes."""
    return [(images[0][:20], images[1][:20]), (images[0][20:], images[1][20:])]


def _interpreter(path: str) -> tf.lite.Interpreter:
    interpreter = tf.lite.Interpreter(model_path=path)
    interpreter.allocate_tensors()
    return interpreter


def test_export_config_takes_known_kinds_and_none_unless_asked():
    assert ExportConfig().tflite == ()
    assert ExportConfig.model_validate({"tflite": ["int8"]}).tflite == ("int8",)
    with pytest.raises(pydantic.ValidationError, match="'float16' or 'int8'"):
        ExportConfig(tflite=("int4",))


def test_export_tflite_writes_a_file_for_each_kind_and_nothing_else(paths):
    folder = Path(paths["int8"]).parent

    assert sorted(file.name for file in folder.iterdir()) == ["model_float16.tflite", "model_int8.tflite"]
    assert {kind: Path(path).name for kind, path in paths.items()} == {kind: f"model_{kind}.tflite" for kind in KINDS}


@pytest.mark.parametrize(("kind", "dtype"), [("float16", np.float32), ("int8", np.uint8)])
def test_export_tflite_takes_one_image_and_gives_probabilities(paths, kind, dtype):
    runner = _interpreter(paths[kind]).get_signature_runner()

    (image,) = runner.get_input_details().items()
    (probabilities,) = runner.get_output_details().items()
    assert image[0] == "image"
    assert image[1]["dtype"] is dtype
    assert image[1]["shape"].tolist() == [1, IMAGE_SIZE, IMAGE_SIZE, 3]
    assert probabilities[0] == "probabilities"
    assert probabilities[1]["dtype"] is np.float32
    assert probabilities[1]["shape"].tolist() == [1, 3]


def test_export_tflite_makes_the_weights_smaller(paths, network):
    float32_size = 4 * network.count_params()
    sizes = {kind: Path(path).stat().st_size for kind, path in paths.items()}

    assert sizes["float16"] == pytest.approx(float32_size / 2, rel=0.1)
    assert sizes["int8"] == pytest.approx(float32_size / 4, rel=0.2)


@pytest.mark.parametrize(("kind", "tolerance"), [("float16", 0.02), ("int8", 0.3)])
def test_export_tflite_keeps_the_answers(paths, network, batches, kind, tolerance):
    accuracy, probabilities = evaluate_tflite(paths[kind], batches)

    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    expected = np.asarray(network(images, training=False))
    assert (expected.argmax(axis=-1) == labels).mean() == 1.0
    assert accuracy >= 0.97
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, expected, atol=tolerance)
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1.0, atol=0.02)


def test_export_tflite_computes_the_backbone_in_integers(paths):
    assert integer_share(Path(paths["int8"]).read_bytes()) > 0.95
    assert integer_share(Path(paths["float16"]).read_bytes()) == 0.0


def test_export_tflite_says_what_runs_in_integers(tmp_path, network, images, caplog):
    with caplog.at_level(logging.INFO, logger="tfx_vision"):
        path = export_tflite(network, f"file://{tmp_path}", kinds=["float16"], calibration_images=[], class_names=CLASS_NAMES)

    assert path == {"float16": f"file://{tmp_path}/model_float16.tflite"}
    assert "0.0% of the multiply-adds in integers" in caplog.text
    assert [file.name for file in tmp_path.iterdir()] == ["model_float16.tflite"]


def test_export_tflite_takes_variables_that_keras_does_not_know(tmp_path):
    # As of a SavedModel from TensorFlow Hub; variables abort the converter of TensorFlow 2.16.
    class Scale(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.module = tf.Module()
            self.module.scale = tf.Variable([1.0, 2.0, 4.0])

        def call(self, x):
            return x * self.module.scale

    image = keras.Input((4, 4, 3))
    x = keras.layers.DepthwiseConv2D(3, depthwise_initializer="ones")(image)
    x = keras.layers.GlobalAveragePooling2D()(x)
    network = keras.Model(image, Scale()(x))

    path = export_tflite(network, str(tmp_path), kinds=["float16"], calibration_images=[], class_names=CLASS_NAMES)["float16"]

    _, values = evaluate_tflite(path, [(np.ones((1, 4, 4, 3), np.float32), np.zeros(1))])
    np.testing.assert_allclose(values, [[9, 18, 36]])


@pytest.mark.parametrize(
    ("kinds", "class_names", "message"),
    [
        (["int4"], CLASS_NAMES, r"Expected kinds of float16, int8\. Received: int4"),
        (["float16"], CLASS_NAMES[:2], r"Expected a class name for each output of the network, 3\. Received: 2 class names"),
        (["int8"], CLASS_NAMES, r"Expected calibration images for `int8`\. Received: none"),
    ],
)
def test_export_tflite_refuses(tmp_path, network, kinds, class_names, message):
    with pytest.raises(ValueError, match=message):
        export_tflite(network, str(tmp_path), kinds=kinds, calibration_images=[], class_names=class_names)
    assert list(tmp_path.iterdir()) == []


def test_compare_tflite_counts_what_differs(paths, network, images, batches):
    wrong = [(batch, (labels + (batch[:, 0, 0, 0] > 200)) % 3) for batch, labels in batches]

    report = compare_tflite(network, paths, iter(wrong))

    labels = np.concatenate([labels for _, labels in wrong])
    expected = np.asarray(network(images[0], training=False))
    assert set(report) == set(KINDS)
    for kind, values in report.items():
        accuracy, probabilities = evaluate_tflite(paths[kind], wrong)
        assert values["num_images"] == 36
        assert values["accuracy"] == pytest.approx(accuracy)
        assert values["network_accuracy"] == pytest.approx((expected.argmax(axis=-1) == labels).mean())
        assert 0 < values["network_accuracy"] < 1
        assert values["agreement"] == pytest.approx((probabilities.argmax(axis=-1) == expected.argmax(axis=-1)).mean())
        assert values["max_difference"] == pytest.approx(np.abs(probabilities - expected).max(), abs=1e-4)
        assert values["bytes"] == Path(paths[kind]).stat().st_size
    assert report["int8"]["max_difference"] > report["float16"]["max_difference"] > 0


def test_compare_tflite_warns_of_a_model_of_another_network(paths, network, batches, caplog):
    # The network's outputs turned round: every answer is another class.
    turned = keras.Model(network.input, network.output[:, ::-1])

    report = compare_tflite(turned, {"float16": paths["float16"]}, batches)["float16"]

    assert report["agreement"] == pytest.approx(1 / 3)  # of the class in the middle
    assert report["network_accuracy"] == pytest.approx(1 / 3)
    assert report["accuracy"] == 1.0
    assert report["max_difference"] > 0.3
    assert "another answer than the network for 66.7% of 36 images" in caplog.text
    caplog.clear()
    compare_tflite(network, {"float16": paths["float16"]}, batches)
    assert "another answer" not in caplog.text


def test_evaluating_and_comparing_refuse_no_images(paths, network):
    with pytest.raises(ValueError, match="Expected images to evaluate on"):
        evaluate_tflite(paths["float16"], [])
    with pytest.raises(ValueError, match="Expected images to compare on"):
        compare_tflite(network, paths, [])


@pytest.mark.parametrize("transposed", [False, True])
def test_integer_share_counts_by_multiply_adds(transposed):
    # A float dense layer of 6 * 4 and a product of [5, 6] by [6, 7]: nothing is in integers, whatever their sizes.
    function = tf.function(
        lambda x: tf.matmul(tf.reshape(x, (1, 5, 6)), tf.ones((1, 7, 6) if transposed else (1, 6, 7)), transpose_b=transposed)
    ).get_concrete_function(tf.TensorSpec((5, 6), tf.float32))
    content = tf.lite.TFLiteConverter.from_concrete_functions([function], tf.Module()).convert()

    assert integer_share(content) == 0.0
