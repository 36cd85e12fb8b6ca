import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASS_NAMES, TRANSFORM_IMAGE_SIZE
from endpoint_models import NUM_IMAGES, images, trained, write_references
from serving_stand_in import CLASS_NAMES as COLOURS

from data.errors import InputError
from models.embeddings import find_images
from models.reference import REFERENCE_FILE, write_reference_predictions
from pipeline.canary import find_references, read_references
from pipeline.vertex_prediction import MAX_IMAGE_BYTES
from preprocessing.images import decode_images
from preprocessing.transform import TransformGraph

pytestmark = pytest.mark.one_stack


@pytest.fixture
def run(tmp_path):
    """A run's folder with a model and its reference predictions, to be changed."""
    return shutil.copytree(trained(1), tmp_path / "run")


def _read(run, *, max_images=64):
    return read_references(
        str(run / "model_run" / REFERENCE_FILE), str(run / "model" / "Format-Serving"), max_images=max_images
    )


def test_read_references_gives_images_and_probabilities_by_class(run):
    references = _read(run)

    assert [reference.encoded for reference in references] == images()
    assert [reference.name for reference in references] == [f"{number}.png" for number in range(NUM_IMAGES)]
    model = tf.saved_model.load(str(run / "model" / "Format-Serving"))
    expected = model.signatures["serving_default"](image_bytes=tf.constant(images()))["probabilities"].numpy()
    for reference, row in zip(references, expected, strict=True):
        assert tuple(reference.probabilities) == COLOURS
        np.testing.assert_allclose(list(reference.probabilities.values()), row, atol=1e-6)
    assert len(_read(run, max_images=2)) == 2


def test_read_references_reads_what_the_trainer_writes(transform_graph, shape_records, tmp_path):
    keras.utils.set_random_seed(0)
    network = keras.Sequential(
        [
            keras.Input((TRANSFORM_IMAGE_SIZE, TRANSFORM_IMAGE_SIZE, 3)),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )
    found = find_images([shape_records["valid"]], split="valid")
    path = write_reference_predictions(network, TransformGraph(transform_graph), found, folder=str(tmp_path))
    (tmp_path / "assets.extra").mkdir()
    (tmp_path / "assets.extra" / "labels.txt").write_text("circle\nsquare\n")

    references = read_references(path, str(tmp_path), max_images=5)

    assert [reference.name for reference in references] == [f"{number}.png" for number in range(5)]
    encoded = tf.constant([reference.encoded for reference in references])
    expected = network(decode_images(encoded, image_size=TRANSFORM_IMAGE_SIZE), training=False)
    assert {tuple(reference.probabilities) for reference in references} == {CLASS_NAMES}
    np.testing.assert_allclose([list(one.probabilities.values()) for one in references], expected, atol=1e-6)


def test_read_references_passes_over_images_that_do_not_fit_into_a_request(run):
    small, noise = images(), np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)
    large = tf.io.encode_png(noise).numpy()
    assert len(large) > MAX_IMAGE_BYTES
    signature = tf.saved_model.load(str(run / "model" / "Format-Serving")).signatures["serving_default"]
    path = run / "model_run" / REFERENCE_FILE
    write_references(path, [large, small[0], large, small[1]], signature)

    assert [reference.name for reference in _read(run)] == ["1.png", "3.png"]

    write_references(path, [large], signature)
    with pytest.raises(InputError, match=r"to have an image of 1,121,928 bytes or less, the most .* Received: none\."):
        _read(run)


def test_read_references_says_what_is_wrong_with_the_files(run):
    labels = run / "model" / "Format-Serving" / "assets.extra" / "labels.txt"
    labels.write_text("only\none\n")
    with pytest.raises(InputError, match=r"to be the reference predictions of .*Received: zip.*Give the two of one run\."):
        _read(run)

    labels.unlink()
    with pytest.raises(InputError, match=r"labels.txt, to know what the model must answer. Received: no such file"):
        _read(run)

    (run / "model_run" / REFERENCE_FILE).write_bytes(b"no records")
    labels.write_text("".join(f"{name}\n" for name in COLOURS))
    with pytest.raises(InputError, match=r"Expected .*reference_predictions.* to be the reference predictions of"):
        _read(run)


@pytest.mark.parametrize(
    ("model", "references"),
    [
        ("Trainer/model/8/Format-Serving", "Trainer/model_run/8"),
        ("Trainer/model/8", "Trainer/model_run/8"),
        ("Trainer_-123/model/Format-Serving", "Trainer_-123/model_run"),  # as on Vertex AI
        ("Trainer_-123/model/", "Trainer_-123/model_run"),
        ("deployed/0123abcd/model/1700000000", "deployed/0123abcd/model_run/1700000000"),
    ],
)
def test_find_references_looks_where_the_trainer_leaves_them(tmp_path, model, references):
    (tmp_path / references).mkdir(parents=True)
    assert find_references(f"{tmp_path}/{model}") == ""

    (tmp_path / references / REFERENCE_FILE).touch()

    assert find_references(f"{tmp_path}/{model}") == f"{tmp_path}/{references}/{REFERENCE_FILE}"
    assert find_references(f"{tmp_path}/elsewhere") == ""
    assert find_references("model") == ""
