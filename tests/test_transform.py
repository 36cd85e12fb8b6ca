import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASS_NAMES, TRANSFORM_IMAGE_SIZE

from preprocessing.images import InputSpec, decode_image
from preprocessing.transform import TransformGraph, preprocessing_fn, write_transform_graph

CONFIG = {"input": {"image_size": 32, "interpolation": "bicubic"}, "class_names": ["zebra", "ant", "cät"]}


def _inputs(encode, labels):
    images = [encode(np.full((8, 8, 3), 10 * number, np.uint8)) for number in range(len(labels))]
    return {"image": tf.constant(images), "label": tf.constant(labels)}


def test_preprocessing_fn_gives_labels_their_place_in_the_class_list(encode):
    outputs = preprocessing_fn(_inputs(encode, ["ant", "cät", "zebra", "ant"]), CONFIG)

    np.testing.assert_array_equal(outputs["label_xf"], [1, 2, 0, 1])
    assert outputs["label_xf"].dtype == tf.int64


@pytest.mark.parametrize("label", ["bee", "", "Ant", "ant "])
def test_preprocessing_fn_marks_an_unknown_label(encode, label):
    outputs = preprocessing_fn(_inputs(encode, ["ant", label]), CONFIG)

    np.testing.assert_array_equal(outputs["label_xf"], [1, -1])


def test_preprocessing_fn_decodes_and_resizes_the_images(encode):
    inputs = _inputs(encode, ["ant", "ant"])

    outputs = preprocessing_fn(inputs, CONFIG)

    assert set(outputs) == {"image_xf", "label_xf"}
    assert outputs["image_xf"].dtype == tf.float32
    np.testing.assert_allclose(outputs["image_xf"][1], np.full((32, 32, 3), 10.0), atol=1e-3)


def test_preprocessing_fn_runs_in_tf_data(encode):
    inputs = _inputs(encode, ["cät", "bee"])
    dataset = tf.data.Dataset.from_tensors(inputs).map(lambda batch: preprocessing_fn(batch, CONFIG))

    outputs = next(iter(dataset))

    np.testing.assert_array_equal(outputs["label_xf"], [2, -1])
    np.testing.assert_array_equal(outputs["image_xf"], preprocessing_fn(inputs, CONFIG)["image_xf"])


def test_transform_graph_does_what_preprocessing_fn_does(transform_graph, photograph):
    graph = TransformGraph(transform_graph)
    encoded = photograph.read_bytes()

    images = graph.images(tf.constant([encoded, encoded]))
    labels = graph.labels(tf.constant([CLASS_NAMES[1], "bee", CLASS_NAMES[0]]))

    np.testing.assert_array_equal(labels, [1, -1, 0])
    expected = decode_image(tf.constant(encoded), image_size=TRANSFORM_IMAGE_SIZE)
    assert images.shape == (2, *expected.shape)
    np.testing.assert_array_equal(images[0], expected)


def test_transform_graph_runs_in_tf_data(transform_graph, photograph):
    graph = TransformGraph(transform_graph)
    batch = tf.constant([photograph.read_bytes()])
    dataset = tf.data.Dataset.from_tensors((batch, tf.constant([CLASS_NAMES[1]])))

    images, labels = next(iter(dataset.map(lambda images, labels: (graph.images(images), graph.labels(labels)))))

    np.testing.assert_array_equal(labels, [1])
    np.testing.assert_array_equal(images, graph.images(batch))


def test_transform_graph_takes_each_input_without_the_other(transform_graph):
    # The Evaluator asks for labels alone, a server for images alone.
    graph = TransformGraph(transform_graph)

    assert graph.labels.structured_input_signature[0][0].shape.as_list() == [None]
    assert len(graph.labels.inputs) == 1
    assert len(graph.images.inputs) == 1


def test_write_transform_graph_writes_what_the_component_writes(transform_graph, photograph, tmp_path):
    spec = InputSpec(image_size=TRANSFORM_IMAGE_SIZE, interpolation="bicubic")
    batch = tf.constant([photograph.read_bytes()])

    write_transform_graph(str(tmp_path / "graph"), spec=spec, class_names=CLASS_NAMES)

    written, expected = TransformGraph(str(tmp_path / "graph")), TransformGraph(transform_graph)
    np.testing.assert_array_equal(written.images(batch), expected.images(batch))
    np.testing.assert_array_equal(written.labels(tf.constant([CLASS_NAMES[1], "bee"])), [1, -1])
