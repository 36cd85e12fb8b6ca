import gc
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASS_NAMES
from server_process import export_classifier

from data.errors import InputError
from data.inspection import UnusableImageError
from models.versions import ModelVersions, ServedModel, VersionState


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory, transform_graph) -> Path:
    return export_classifier(tmp_path_factory.mktemp("export") / "model", transform_graph, seed=1)


@pytest.fixture(scope="module")
def served(saved_model) -> ServedModel:
    model = ServedModel(str(saved_model), version=7)
    model.warm_up(4)
    return model


@pytest.fixture(scope="module")
def images(encode) -> list[bytes]:
    random = np.random.default_rng(0)
    return [encode(random.integers(0, 256, (20 + 3 * n, 40, 3), np.uint8), "JPEG" if n % 2 else "PNG") for n in range(6)]


def _put(source: Path, folder: Path, version: int) -> Path:
    shutil.copytree(source, folder / str(version))
    return folder / str(version)


def _save_constant(folder: Path, probabilities: list[float]) -> None:
    """Saves a model that always says the same."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="image_bytes")])
    def serving_default(image_bytes):
        rows = tf.tile(tf.constant([probabilities]), [tf.size(image_bytes), 1])
        labels = tf.tile(tf.constant([["a", "b"]]), [tf.size(image_bytes), 1])
        return {"label": labels[:, 0], "probability": rows[:, 0], "labels": labels, "probabilities": rows}

    module = tf.Module()
    module.serving_default = serving_default
    tf.saved_model.save(module, str(folder), signatures={"serving_default": serving_default})


def test_served_model_answers_as_serving_default(served, saved_model, images):
    model = tf.saved_model.load(str(saved_model))
    expected = model.signatures["serving_default"](image_bytes=tf.constant(images))

    answers = served.answer(images)

    assert served.labels == list(CLASS_NAMES)
    np.testing.assert_allclose([answer.probabilities for answer in answers], expected["probabilities"], atol=1e-6)
    np.testing.assert_allclose([answer.probability for answer in answers], expected["probability"], atol=1e-6)
    assert [answer.label for answer in answers] == [label.decode() for label in expected["label"].numpy()]
    assert np.ptp([answer.probability for answer in answers]) > 1e-4


def test_served_model_answers_the_good_images_beside_bad_ones(served, images):
    damaged = images[1][: len(images[1]) // 2]
    batch = [images[0], damaged, images[2], b"no image", images[4]]

    answers = served.answer(batch)

    assert [isinstance(answer, UnusableImageError) for answer in answers] == [False, True, False, True, False]
    alone = [served.answer([image])[0].probabilities for image in batch[::2]]
    np.testing.assert_allclose([answer.probabilities for answer in answers[::2]], alone, atol=1e-5)
    assert "damaged or cut off" in str(answers[1])
    assert all(isinstance(answer, UnusableImageError) for answer in served.answer([b"x", damaged]))


def test_served_model_describes_its_signatures(served):
    described = served.signature_defs["serving_default"]

    assert described["method_name"] == "tensorflow/serving/predict"
    assert described["inputs"]["image_bytes"] == {
        "dtype": "DT_STRING",
        "tensor_shape": {"dim": [{"size": "-1", "name": ""}], "unknown_rank": False},
        "name": "serving_default_image_bytes:0",
    }
    assert described["outputs"]["probabilities"]["dtype"] == "DT_FLOAT"
    assert described["outputs"]["probabilities"]["tensor_shape"]["dim"][1]["size"] == "2"


def test_served_model_refuses_what_is_no_classifier(tmp_path, saved_model):
    tf.saved_model.save(tf.Module(), str(tmp_path / "empty"))
    shutil.copytree(saved_model, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "variables")

    with pytest.raises(InputError, match=r"Expected .* to have a signature `serving_default` of `image_bytes`"):
        ServedModel(str(tmp_path / "empty"), version=1)
    with pytest.raises(InputError, match="Received: one that cannot be loaded"):
        ServedModel(str(tmp_path / "cut"), version=1)


@pytest.mark.parametrize("probabilities", [[float("nan"), 0.5], [0.9, 0.9], [float("inf"), 0.0]])
def test_warm_up_refuses_answers_of_no_classifier(tmp_path, probabilities):
    _save_constant(tmp_path / "model", probabilities)
    model = ServedModel(str(tmp_path / "model"), version=3)

    with pytest.raises(InputError, match="Expected version 3 to give a probability for each class, 1 in all"):
        model.warm_up(2)


def test_warm_up_passes_a_constant_classifier(tmp_path):
    """The one that the test above would pass if it refused every model of this making."""
    _save_constant(tmp_path / "model", [0.75, 0.25])
    model = ServedModel(str(tmp_path / "model"), version=3)
    model.warm_up(2)

    assert model.labels == ["a", "b"]


def test_served_model_is_copied_from_a_remote_folder(saved_model, images, served):
    remote = "ram://bucket/models/12"
    for parent, _, names in tf.io.gfile.walk(str(saved_model)):
        for name in names:
            target = f"{remote}{parent[len(str(saved_model)) :]}/{name}"
            tf.io.gfile.makedirs(target.rpartition("/")[0])
            tf.io.gfile.copy(f"{parent}/{name}", target)

    versions = ModelVersions("ram://bucket/models", max_batch_size=1)
    assert versions.poll()

    copy = Path(versions.current.folder)
    assert versions.current.version == 12
    assert copy.is_dir()
    assert versions.current.answer(images[:1])[0].probabilities == pytest.approx(served.answer(images[:1])[0].probabilities)
    versions.current = None
    gc.collect()
    assert not copy.exists()


def test_poll_takes_the_newest_version_and_then_a_newer_one(tmp_path, saved_model):
    changes = []
    _put(saved_model, tmp_path, 2)
    _put(saved_model, tmp_path, 10)  # not before 2, as text would be
    (tmp_path / "notes").mkdir()
    (tmp_path / "99").mkdir()  # half written: no saved_model.pb
    versions = ModelVersions(f"{tmp_path}/", max_batch_size=1, on_change=lambda model: changes.append(model.version))

    assert versions.poll()
    assert versions.current.version == 10
    assert not versions.poll()
    first = weakref.ref(versions.current)

    _put(saved_model, tmp_path, 11)
    assert versions.poll()
    assert versions.current.version == 11
    assert versions.states == {10: VersionState("END"), 11: VersionState("AVAILABLE")}
    assert changes == [10, 11]
    gc.collect()
    assert first() is None  # its memory is free

    shutil.rmtree(tmp_path / "11")
    assert not versions.poll()
    assert versions.current.version == 11


def test_poll_skips_a_broken_version_until_it_changes(tmp_path, saved_model, caplog):
    _put(saved_model, tmp_path, 1)
    versions = ModelVersions(str(tmp_path), max_batch_size=1)
    versions.poll()
    good = versions.current
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "saved_model.pb").write_bytes(b"garbage")
    _save_constant(tmp_path / "3", [float("nan"), 1.0])

    assert not versions.poll()
    assert not versions.poll()

    assert versions.current is good
    said = [record.message for record in caplog.records if (record.name, record.levelname) == ("models.versions", "ERROR")]
    assert sorted(message.split(":")[0] for message in said) == ["version 2 is skipped", "version 3 is skipped"]
    assert {number: state.state for number, state in versions.states.items()} == {1: "AVAILABLE", 2: "END", 3: "END"}
    assert "cannot be loaded" in versions.states[2].error

    shutil.rmtree(tmp_path / "2")
    _put(saved_model, tmp_path, 2)
    assert versions.poll()
    assert versions.current.version == 2
    shutil.rmtree(tmp_path / "3")
    assert not versions.poll()
    assert 3 not in versions.states


def test_poll_falls_back_to_an_older_version_at_the_start(tmp_path, saved_model):
    _put(saved_model, tmp_path, 1)
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "saved_model.pb").write_bytes(b"garbage")
    versions = ModelVersions(str(tmp_path), max_batch_size=1)

    assert versions.poll()
    assert versions.current.version == 1


def test_poll_takes_a_single_model(tmp_path, saved_model):
    versions = ModelVersions(str(saved_model), max_batch_size=1)

    assert versions.poll()
    assert versions.current.version == 1
    assert ModelVersions(str(_put(saved_model, tmp_path, 42)), max_batch_size=1).find() == {42: str(tmp_path / "42")}


def test_poll_without_any_model_says_so(tmp_path):
    with pytest.raises(InputError, match=r"Expected a SavedModel, or numbered folders with one each, in .*Received: none"):
        ModelVersions(str(tmp_path / "nowhere"), max_batch_size=1).poll()
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "saved_model.pb").write_bytes(b"garbage")
    with pytest.raises(InputError, match="Received: one that cannot be loaded"):
        ModelVersions(str(tmp_path), max_batch_size=1).poll()
