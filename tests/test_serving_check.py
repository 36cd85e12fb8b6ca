import ast
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASS_NAMES, TRANSFORM_IMAGE_SIZE
from tfx.components.util import model_utils
from tfx.types import standard_artifacts

from data.errors import InputError
from data.features import IMAGE_KEY, LABELS_FILE
from data.fingerprint import imported_modules
from models import signatures
from models.embeddings import find_images
from models.reference import NUM_REFERENCE_IMAGES, REFERENCE_FILE, write_reference_predictions
from models.signatures import ImageClassifier, export
from models.trained import EXTRA_FOLDER
from pipeline import serving_check, serving_process
from pipeline.components import MODEL_DIGEST_KEY, ServingCheck
from pipeline.model_digest import model_digest
from pipeline.serving_check import (
    SERVING_CHECK_FILE,
    ServingCheckConfig,
    check_serving,
    read_serving_check,
)
from preprocessing.images import decode_images
from preprocessing.transform import TransformGraph

MODEL_ID = 7


def _network(*, num_classes: int = 2) -> keras.Model:
    """A small network whose answers differ from image to image, and with the resize."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((TRANSFORM_IMAGE_SIZE, TRANSFORM_IMAGE_SIZE, 3)),
            layers.Rescaling(1 / 16),
            layers.Conv2D(8, 3, 2, activation="relu"),
            layers.GlobalMaxPooling2D(),
            layers.Dense(num_classes, activation="softmax"),
        ]
    )


def _save(classifier: ImageClassifier, folder: Path, class_names=CLASS_NAMES) -> str:
    export(classifier, str(folder))
    (folder / EXTRA_FOLDER).mkdir()
    (folder / EXTRA_FOLDER / LABELS_FILE).write_text("".join(f"{name}\n" for name in class_names))
    return str(folder)


class WithImageFunction:
    """A Transform graph whose images are made otherwise."""

    def __init__(self, graph: TransformGraph, images: Callable[[tf.Tensor], tf.Tensor]):
        function = tf.function(images, autograph=False)
        self.images = function.get_concrete_function(tf.TensorSpec([None], tf.string))
        self.labels = graph.labels


@pytest.fixture(scope="module")
def transform(transform_graph) -> TransformGraph:
    return TransformGraph(transform_graph)


@pytest.fixture(scope="module")
def model_run(tmp_path_factory, transform, shape_records) -> str:
    """The folder of a training run, with the network's own answers."""
    folder = str(tmp_path_factory.mktemp("model_run"))
    images = find_images([shape_records["valid"]], split="valid")
    write_reference_predictions(_network(), transform, images, folder=folder)
    return folder


@pytest.fixture(scope="module")
def good_model(tmp_path_factory, transform) -> Path:
    """A Trainer's model artifact, of which the SavedModel is part."""
    folder = tmp_path_factory.mktemp("model")
    _save(ImageClassifier(_network(), transform, CLASS_NAMES), folder / "Format-Serving")
    return folder


@pytest.fixture(scope="module")
def references(model_run) -> tuple[list[bytes], list[np.ndarray]]:
    return serving_process.read_references(str(Path(model_run, REFERENCE_FILE)))


def _run_component(folder: Path, model: Path, model_run: str, **settings) -> standard_artifacts.InfraBlessing:
    """Runs ServingCheck as TFX does."""
    artifacts = {
        "model": standard_artifacts.Model(),
        "model_run": standard_artifacts.ModelRun(),
        "model_blessing": standard_artifacts.ModelBlessing(),
        "infra_blessing": standard_artifacts.InfraBlessing(),
    }
    artifacts["model"].uri, artifacts["model"].id, artifacts["model_run"].uri = str(model), MODEL_ID, model_run
    artifacts["model_blessing"].set_int_custom_property("blessed", 1)
    artifacts["infra_blessing"].uri = str(folder)
    outputs = {"infra_blessing": [artifacts.pop("infra_blessing")]}
    properties = {"config": ServingCheckConfig(**settings).model_dump_json(), "code": ""}
    ServingCheck.EXECUTOR_SPEC.executor_class().Do({name: [value] for name, value in artifacts.items()}, outputs, properties)
    return outputs["infra_blessing"][0]


def test_serving_check_blesses_a_good_model(good_model, model_run, tmp_path):
    blessing = _run_component(tmp_path, good_model, model_run)

    verdict = read_serving_check(str(tmp_path))
    assert verdict["reasons"] == []
    assert verdict["blessed"] is True
    assert model_utils.is_infra_validated(blessing)  # what Pusher asks
    assert {path.name for path in tmp_path.iterdir()} == {"INFRA_BLESSED", SERVING_CHECK_FILE}
    assert blessing.get_int_custom_property("current_model_id") == MODEL_ID
    assert blessing.get_string_custom_property("current_model") == verdict["model"] == str(good_model)
    digest = model_digest(str(good_model / "Format-Serving"))
    assert blessing.get_string_custom_property(MODEL_DIGEST_KEY) == verdict["model_digest"] == digest
    assert verdict["evaluator_blessed"] is True
    assert verdict["num_images"] == 18
    assert 0 <= verdict["max_difference"] < 1e-5
    assert verdict["load_seconds"] > 0
    assert set(verdict["latency_ms"]) == {"1", "32"}
    for latency in verdict["latency_ms"].values():
        assert 0 < latency["p50"] <= latency["p99"]
        assert latency["calls"] >= 1
    assert 100 < verdict["memory_mb"] < 4096
    assert verdict["images_per_second"] > 0
    outcomes = {tried["name"]: tried["outcome"] for tried in verdict["hostile"]}
    assert outcomes.pop("huge image").startswith("answered in ")
    assert outcomes.pop("empty batch")  # answered or refused, by TensorFlow's version
    assert outcomes["not an image"].startswith("refused: InvalidArgumentError: Unknown image file format")
    assert len(outcomes) == 7
    assert {outcome.split(":")[0] for outcome in outcomes.values()} == {"refused"}


def test_serving_check_refuses_another_resize_and_another_class_list(transform, model_run, tmp_path):
    def bilinear(encoded: tf.Tensor) -> tf.Tensor:
        return decode_images(encoded, image_size=TRANSFORM_IMAGE_SIZE, interpolation="bilinear")

    classifier = ImageClassifier(_network(), WithImageFunction(transform, bilinear), CLASS_NAMES)
    model = tmp_path / "model"
    _save(classifier, model / "Format-Serving", class_names=reversed(CLASS_NAMES))
    (tmp_path / "blessing").mkdir()

    blessing = _run_component(tmp_path / "blessing", model, model_run)

    verdict = read_serving_check(str(tmp_path / "blessing"))
    names, difference = verdict["reasons"]
    assert names == "`labels` of the answers are circle, square; the class list has other names or another order"
    assert difference == (
        f"the exported model's answers differ from the trainer's by up to {verdict['max_difference']:.3g} on 18 images; the "
        "limit is 0.001 (serving_check.max_difference): training and serving do not see the same image, or do not have the "
        "same weights"
    )
    assert verdict["max_difference"] > 0.001
    assert not model_utils.is_infra_validated(blessing)
    assert blessing.get_int_custom_property("blessed") == 0
    assert {path.name for path in (tmp_path / "blessing").iterdir()} == {"INFRA_NOT_BLESSED", SERVING_CHECK_FILE}


def test_serving_check_refuses_answers_that_are_not_numbers(transform, model_run, tmp_path):
    network = _network()
    network.set_weights([np.full_like(weight, np.nan) for weight in network.get_weights()])
    model = _save(ImageClassifier(network, transform, CLASS_NAMES), tmp_path / "model")

    verdict = check_serving(model, model_run, ServingCheckConfig())

    assert verdict["reasons"] == ["the answers to 18 of 18 images are not numbers"]
    assert verdict["max_difference"] is None
    json.dumps(verdict, allow_nan=False)


def test_serving_check_refuses_another_number_of_classes(transform, model_run, tmp_path):
    names = (*CLASS_NAMES, "triangle")
    model = _save(ImageClassifier(_network(num_classes=3), transform, names), tmp_path / "model", class_names=CLASS_NAMES)

    verdict = check_serving(model, model_run, ServingCheckConfig())

    assert verdict["reasons"] == [
        "the model answers with 3 probabilities; its class list has 2",
        "the model answers with 3 probabilities; the trainer with 2",
    ]


def _upload(folder: Path, bucket: str) -> str:
    """Copies a folder to TensorFlow's file system in memory, which stands for a bucket."""
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        copy = f"{bucket}/{path.relative_to(folder).as_posix()}"
        tf.io.gfile.makedirs(copy.rpartition("/")[0])
        tf.io.gfile.copy(str(path), copy, overwrite=True)
    return bucket


def test_serving_check_refuses_a_model_in_a_bucket_that_does_not_load(good_model, model_run, tmp_path):
    model = shutil.copytree(good_model / "Format-Serving", tmp_path / "model")
    graph = model / "saved_model.pb"
    graph.write_bytes(graph.read_bytes()[:1000])
    remote = _upload(model, "ram://serving_check/model"), _upload(Path(model_run), "ram://serving_check/run")

    verdict = check_serving(*remote, ServingCheckConfig())

    (reason,) = verdict["reasons"]
    assert reason.startswith("the SavedModel does not load: ")
    assert verdict["latency_ms"] == {"1": None, "32": None}
    assert [verdict[name] for name in ("load_seconds", "max_difference", "images_per_second")] == [None] * 3
    assert verdict["hostile"] == []
    assert verdict["num_images"] == 18
    assert verdict["model_digest"] == model_digest(str(model))


@pytest.mark.one_stack
def test_serving_check_refuses_a_model_above_its_budgets(good_model, model_run):
    budgets = ServingCheckConfig(max_latency_ms=1e-3, max_batch_latency_ms=1e-3, max_memory_mb=500)

    verdict = check_serving(str(good_model / "Format-Serving"), model_run, budgets)

    small, batch = verdict["latency_ms"]["1"], verdict["latency_ms"]["32"]
    assert [reason.partition(" takes ")[0] for reason in verdict["reasons"]] == [
        "a batch of 1",
        "a batch of 32",
        "the process that serves the model",
    ]
    assert f"(99th percentile of {small['calls']} calls); the budget is 0.001 ms (serving_check.max_latency_ms)" in str(verdict)
    assert f"of {batch['calls']} calls); the budget is 0.001 ms (serving_check.max_batch_latency_ms)" in str(verdict)
    assert verdict["reasons"][2].endswith(" MB at its peak; the budget is 500 MB (serving_check.max_memory_mb)")


def test_serving_check_stops_a_process_far_above_its_memory(good_model, model_run):
    verdict = check_serving(str(good_model / "Format-Serving"), model_run, ServingCheckConfig(max_memory_mb=100))

    (reason,) = verdict["reasons"]
    assert reason.startswith("the process that serves the model was stopped while ")
    assert reason.endswith(" MB; the budget is 100 MB (serving_check.max_memory_mb)")


def test_serving_check_refuses_a_model_that_kills_its_process(transform, model_run, tmp_path):
    def crash(encoded: tf.Tensor) -> tf.Tensor:
        # TensorFlow aborts the process where its optimizer finds a tensor of more than 254 dimensions.
        dims = tf.fill([300 + 0 * tf.size(encoded)], 1)
        image = decode_images(encoded, image_size=TRANSFORM_IMAGE_SIZE)
        return image + tf.reduce_sum(tf.reshape(tf.fill(dims, 0.0), [-1]))

    classifier = ImageClassifier(_network(), WithImageFunction(transform, crash), CLASS_NAMES)
    model = _save(classifier, tmp_path / "model")

    verdict = check_serving(model, model_run, ServingCheckConfig())

    (reason,) = verdict["reasons"]
    assert reason.startswith("the process that serves the model died of SIGABRT while answering real images in a batch of 1: ")
    assert verdict["load_seconds"] > 0
    assert verdict["max_difference"] is None


@pytest.mark.one_stack
def test_serving_check_refuses_a_model_that_hangs(transform, model_run, tmp_path):
    def hang(encoded: tf.Tensor) -> tf.Tensor:
        image = decode_images(encoded, image_size=TRANSFORM_IMAGE_SIZE)
        (count,) = tf.while_loop(lambda count: count >= 0, lambda count: [1 - count], [0])
        return image + tf.cast(count, tf.float32)

    classifier = ImageClassifier(_network(), WithImageFunction(transform, hang), CLASS_NAMES)
    model = _save(classifier, tmp_path / "model")
    started = time.monotonic()

    verdict = check_serving(model, model_run, ServingCheckConfig(timeout_seconds=12))

    assert time.monotonic() - started >= 12
    (reason,) = verdict["reasons"]
    assert reason.startswith("the process that serves the model was still ")
    assert reason.endswith(" when its time was up; the limit is 12 s (serving_check.timeout_seconds)")


def test_serving_check_refuses_a_model_without_references(good_model, tmp_path):
    verdict = check_serving(str(good_model / "Format-Serving"), str(tmp_path), ServingCheckConfig())

    assert verdict["reasons"] == [
        "the trainer's answers cannot be read, so the model cannot be compared with it: "
        f"there is no {tmp_path / REFERENCE_FILE}"
    ]
    assert verdict["num_images"] == 0
    assert verdict["memory_mb"] is None


def test_serving_check_refuses_what_is_no_model_at_all(model_run, tmp_path):
    verdict = check_serving(str(tmp_path / "nowhere"), model_run, ServingCheckConfig())

    assert verdict["reasons"] == [f"the SavedModel does not load: there is no file in {tmp_path / 'nowhere'}"]
    assert verdict["model_digest"] is None


def test_read_serving_check_says_where_there_is_none(tmp_path):
    with pytest.raises(InputError, match=rf"Expected the serving check's verdict .* Received: no {SERVING_CHECK_FILE} there"):
        read_serving_check(str(tmp_path))


@pytest.mark.parametrize("settings", [{"max_latency_ms": 0}, {"max_difference": 1.5}, {"max_latency": 5}])
def test_serving_check_config_refuses_what_is_out_of_range(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        ServingCheckConfig(**settings)


def test_serving_process_imports_tensorflow_alone():
    imported = set()
    for node in ast.walk(ast.parse(Path(serving_process.__file__).read_bytes())):
        if isinstance(node, ast.Import):
            imported.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])

    assert imported - set(sys.stdlib_module_names) == {"numpy", "tensorflow"}


def test_serving_process_has_the_names_of_the_contract():
    assert serving_process.SERVING_DEFAULT == signatures.SERVING_DEFAULT
    assert serving_process.IMAGE_BYTES == signatures.IMAGE_BYTES
    assert serving_process.PROBABILITIES == signatures.PROBABILITIES
    assert serving_process.IMAGE_KEY == IMAGE_KEY
    assert f"{EXTRA_FOLDER}/{LABELS_FILE}" == serving_process.LABELS_PATH
    assert serving_process.LARGE_BATCH == NUM_REFERENCE_IMAGES


def test_fingerprint_of_the_serving_check_covers_the_process():
    assert "pipeline.serving_process" in imported_modules("pipeline.serving_check")


def _try(model: str, references: str, folder: Path) -> dict:
    """Tries a model in this process, as none of these is dangerous; returns the facts."""
    findings = serving_process.Findings(str(folder / "answer.json"))
    job = {"model": model, "references": references, "latency_budgets_ms": {}}
    serving_process.try_model(job, findings)
    return findings.facts


def test_try_model_reports_references_that_are_damaged(good_model, tmp_path):
    (tmp_path / REFERENCE_FILE).write_bytes(b"no records")

    facts = _try(str(good_model / "Format-Serving"), str(tmp_path / REFERENCE_FILE), tmp_path)

    assert facts["references_error"].startswith("DataLossError: ")


class StatefulModel(tf.Module):
    """Answers by the contract until a request goes wrong, and then with other probabilities, or not at all."""

    def __init__(self, *, after: str):
        super().__init__()
        self._after = after
        self.requests = tf.Variable(0)

    @tf.function(autograph=False)
    def serve(self, image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        is_good = tf.reduce_all(tf.strings.length(image_bytes) > 0)
        self.requests.assign_add(tf.where(is_good, 0, 1))
        if self._after == "error":
            check = tf.debugging.assert_equal(self.requests, 0, "out of order")
            with tf.control_dependencies([check]):
                image_bytes = tf.identity(image_bytes)
        first = 0.75 - 0.5 * tf.cast(tf.minimum(self.requests, 1), tf.float32)
        num_images = tf.shape(image_bytes)[0]
        return {
            "label": tf.fill([num_images], tf.where(first > 0.5, "circle", "square")),
            "probability": tf.fill([num_images], tf.maximum(first, 1 - first)),
            "labels": tf.tile([["circle", "square"]], [num_images, 1]),
            "probabilities": tf.tile([[first, 1 - first]], [num_images, 1]),
        }


@pytest.mark.parametrize("after", ["error", "other"])
def test_try_model_sees_that_a_hostile_input_spoils_the_next_answer(tmp_path, model_run, after):
    module = StatefulModel(after=after)
    spec = tf.TensorSpec([None], tf.string, name="image_bytes")
    model = tmp_path / "model"
    tf.saved_model.save(module, str(model), signatures={"serving_default": module.serve.get_concrete_function(spec)})

    facts = _try(str(model), str(Path(model_run, REFERENCE_FILE)), tmp_path)

    first = facts["hostile"][0]
    assert first["name"] == "empty"
    if after == "error":
        assert first["after"].startswith("InvalidArgumentError: ")
        assert "out of order" in first["after"]
    else:
        assert first["after"] == 0.5
    assert facts["batch_difference"] == 0.0


def _signature(inputs: dict[str, tf.TensorSpec], **outputs: tf.TensorSpec) -> SimpleNamespace:
    return SimpleNamespace(structured_input_signature=((), inputs), structured_outputs=outputs)


@pytest.mark.parametrize(
    ("found", "error"),
    [
        ({"examples": None}, "the model has no signature `serving_default`; it has examples"),
        (
            {"serving_default": _signature({"images": tf.TensorSpec([None, 32], tf.float32)})},
            "`serving_default` takes `images` float32 (None, 32); a request is `image_bytes` string [batch]",
        ),
        (
            {"serving_default": _signature({"image_bytes": tf.TensorSpec([None], tf.string)}, scores=None)},
            "`serving_default` answers without `label`; it has scores",
        ),
        (
            {
                "serving_default": _signature(
                    {"image_bytes": tf.TensorSpec([None], tf.string)}, label=tf.TensorSpec([None], tf.int64)
                )
            },
            "`label` of `serving_default` is int64 of rank 1; the contract has string of rank 1",
        ),
    ],
)
def test_find_signature_error_names_what_differs(found, error):
    assert serving_process.find_signature_error(found) == error


def _answers(probabilities: list[list[float]]) -> dict[str, np.ndarray]:
    array = np.array(probabilities, np.float32)
    names = np.array([[b"circle", b"square"]] * len(array), object)
    return {
        "label": names[0][array.argmax(axis=-1)],
        "probability": array.max(axis=-1),
        "labels": names,
        "probabilities": array,
    }


def test_compare_counts_the_answers_that_are_wrong():
    expected = [np.array([0.25, 0.75], np.float32)] * 4
    answers = _answers([[0.25, 0.75], [0.5, 0.5], [0.75, 0.75], [1.25, -0.25]])

    assert serving_process.compare(answers, expected, CLASS_NAMES) == {
        "num_classes": 2,
        "num_labels": 2,
        "num_reference_classes": 2,
        "labels": None,
        "num_not_finite": 0,
        "num_not_distributions": 2,
        "num_wrong_labels": 0,
        "max_difference": 1.0,
    }
    answers["label"] = answers["label"][::-1]
    answers["probability"] = answers["probability"] + np.array([0, 0, 0, 0.125], np.float32)
    # The first of four is now `circle`, the last has another probability and the tie is right both ways.
    assert serving_process.compare(answers, expected, CLASS_NAMES)["num_wrong_labels"] == 2
    answers["probabilities"][0] = np.nan
    facts = serving_process.compare(answers, expected, ["square", "circle"])
    assert (facts["num_not_finite"], facts["max_difference"]) == (1, None)
    assert facts["labels"] == ["circle", "square"]


@pytest.mark.parametrize(
    "expected",
    [
        [np.array([np.nan, 0.75], np.float32)] * 2,
        [np.array([0.25, 0.75], np.float32), np.array([0.25, 0.5, 0.25], np.float32)],
    ],
)
def test_serving_check_refuses_a_model_that_it_cannot_compare(expected):
    facts = serving_process.compare(_answers([[0.25, 0.75]] * 2), expected, CLASS_NAMES)
    facts |= {"num_images": 2, "batch_difference": 0.0}

    assert list(serving_check._answer_reasons(facts, ServingCheckConfig())) == [
        "the trainer's answers are not numbers, or not all of one length, so the model cannot be compared with it"
    ]


def test_measure_latency_measures_again_where_the_first_was_slow():
    remaining = iter([0.02] * 30)

    def serve(batch: tf.Tensor) -> dict[str, np.ndarray]:
        if seconds := next(remaining, 0):
            time.sleep(seconds)
        return {}

    latency = serving_process.measure_latency(serve, tf.constant([b""]), budget_ms=15, measure_seconds=2)

    assert latency["p99"] < 15
    assert latency["calls"] == 200


def test_make_png_is_an_image_that_is_small_in_bytes():
    encoded = serving_process.make_png(6000, 6000)

    assert len(encoded) < 10_000
    assert tf.io.decode_png(encoded, channels=1).shape == (6000, 6000, 1)
    with pytest.raises(tf.errors.InvalidArgumentError):
        tf.io.decode_png(serving_process.make_png(60_000, 60_000, num_rows=1))
