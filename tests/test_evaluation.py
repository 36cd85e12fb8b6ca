import dataclasses
import json
import math
from pathlib import Path

import apache_beam as beam
import numpy as np
import pytest
import sklearn.metrics
import tensorflow as tf
import tensorflow_model_analysis as tfma
from apache_beam.options.pipeline_options import PipelineOptions
from conftest import CLASS_NAMES
from tensorflow_model_analysis.proto import config_pb2
from tfx_bsl.tfxio import tensor_adapter, tf_example_record

from data.errors import InputError, validate
from data.features import make_example, make_schema
from pipeline.evaluation import EvaluationConfig, eval_config, is_blessed, limits_of, read_evaluation
from pipeline.extractors import custom_extractors
from pipeline.metrics import INCOMPARABLE, UNANSWERED

CONFIG = EvaluationConfig(min_accuracy=0.8, min_class_accuracy=0.6, min_slice_accuracy=0.7, max_accuracy_drop=0.02)
COLUMNS = ("camera",)
NUM_IMAGES = 120


def make_config(config: EvaluationConfig = CONFIG, class_names=CLASS_NAMES, columns=COLUMNS) -> config_pb2.EvalConfig:
    return eval_config(config, class_names, columns, image_size=32, code="code")


def specs_of(limit_name: str, config: config_pb2.EvalConfig) -> list[tuple[list[str], dict[str, str]]]:
    thresholds = config.metrics_specs[-1].per_slice_thresholds[limit_name].thresholds
    assert {threshold.threshold.value_threshold.upper_bound.value for threshold in thresholds} == {0.0}
    return [
        (list(spec.feature_keys), dict(spec.feature_values)) for threshold in thresholds for spec in threshold.slicing_specs
    ]


def test_limits_are_those_of_the_settings():
    limits = limits_of(CONFIG, CLASS_NAMES, COLUMNS)

    assert [(limit.subject(limit.slice), limit.kind, limit.value) for limit in limits] == [
        ("example count of `circle`", "min", 10),
        ("example count of `square`", "min", 10),
        ("accuracy over all test images", "min", 0.8),
        ("overconfidence over all test images", "max", 0.1),
        ("expected calibration error over all test images", "max", 0.25),
        ("accuracy over all test images", "max_worsening", 0.02),
        ("recall of `circle`", "min", 0.6),
        ("recall of `square`", "min", 0.6),
        ("recall of `circle`", "max_worsening", 0.1),
        ("recall of `square`", "max_worsening", 0.1),
        ("accuracy on `camera`", "min", 0.7),
        ("accuracy on `camera`", "max_worsening", 0.1),
    ]
    assert [limit.num_comparisons for limit in limits if limit.kind == "max_worsening"] == [1, 2, 2, 10]


def test_limits_without_a_comparison_are_absolute_ones():
    config = EvaluationConfig(compare_with="nothing", thresholds=({"metric": "log_loss", "max_worsening": 0.1},))

    assert {limit.kind for limit in limits_of(config, CLASS_NAMES, COLUMNS)} == {"min", "max"}
    assert INCOMPARABLE in make_config().metrics_specs[-1].per_slice_thresholds
    assert INCOMPARABLE not in make_config(config).metrics_specs[-1].per_slice_thresholds


def test_limits_leave_the_number_of_images_of_rare_classes_out():
    limits = limits_of(EvaluationConfig(rare_classes=("square",)), CLASS_NAMES, ())

    judged = {(limit.metric, limit.class_name) for limit in limits}
    assert ("example_count", "circle") in judged
    assert ("example_count", "square") not in judged
    assert ("recall", "square") in judged  # once there are enough


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"thresholds": [{"metric": "recall", "class": "cirle", "min": 0.5}]}, r"to name classes .* Received: cirle\."),
        ({"rare_classes": ["triangle"]}, r"to name classes .* Received: triangle\."),
        ({"thresholds": [{"metric": "accuracy", "slice": "lens=a", "min": 0.5}]}, r"to be one of camera, .* Received: lens\."),
    ],
)
def test_limits_of_what_the_data_does_not_have_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        make_config(EvaluationConfig.model_validate(settings))


def test_eval_config_judges_each_limit_in_its_slices():
    config = make_config(EvaluationConfig(thresholds=({"metric": "accuracy", "slice": "camera=left", "min": 0.5},)))

    assert specs_of("limits missed on all test images", config) == [([], {})]
    assert specs_of("limits missed on camera", config) == [(["camera"], {})]
    assert specs_of("limits missed on camera=left", config) == [([], {"camera": "left"})]
    assert specs_of(UNANSWERED, config) == specs_of(INCOMPARABLE, config) == [([], {})]
    assert len(config.metrics_specs[-1].per_slice_thresholds) == 5


def test_eval_config_slices_by_class_column_and_facts():
    specs = make_config(columns=("camera", "site")).slicing_specs

    assert [list(spec.feature_keys) for spec in specs] == [
        [],
        ["label"],
        ["camera"],
        ["site"],
        ["brightness_group"],
        ["size_group"],
    ]


def test_eval_config_of_many_classes_leaves_out_what_grows_with_their_square():
    config = make_config(class_names=[f"class{number}" for number in range(51)])

    names = [metric.class_name for spec in config.metrics_specs for metric in spec.metrics]
    assert names == ["ExampleCount", "SparseTopKCategoricalAccuracy", "Judgement"]
    # TFX passes it to a step as an argument, which Linux limits to 128 KB.
    assert len(config.SerializeToString()) < 10_000
    assert ["label"] not in [list(spec.feature_keys) for spec in config.slicing_specs]
    with pytest.raises(InputError, match="Expected thresholds of roc_auc"):
        make_config(
            EvaluationConfig(thresholds=({"metric": "roc_auc", "min": 0.5},)), [f"class{number}" for number in range(51)]
        )


def test_eval_config_names_the_signatures_of_the_exported_model():
    (spec,) = make_config().model_specs

    assert spec.signature_name == "examples"
    assert list(spec.preprocessing_function_names) == ["transform_features"]
    assert (spec.label_key, spec.prediction_key) == ("label_xf", "probabilities")


@pytest.mark.parametrize("has_baseline", [False, True])
def test_eval_config_is_accepted_with_and_without_a_blessed_model(has_baseline):
    config = tfma.utils.update_eval_config_with_defaults(make_config(), has_baseline=has_baseline, rubber_stamp=True)

    tfma.utils.verify_eval_config(config)

    assert [spec.name for spec in config.model_specs] == (["candidate", "baseline"] if has_baseline else [""])


@pytest.mark.parametrize("value", [-0.1, 1.1])
@pytest.mark.parametrize("name", ["min_accuracy", "min_class_accuracy", "max_accuracy_drop", "max_calibration_error"])
def test_evaluation_config_takes_shares_only(name, value):
    with pytest.raises(InputError, match=f"^Expected `{name}` to be valid. Received: {name}={value}. "):
        validate(EvaluationConfig, {name: value})


class _ByBrightness(tf.Module):
    """A model with the real signatures' names: the brighter the image, the more likely a square."""

    def __init__(self, steepness: float = 20.0, *, num_outputs: int = 2):
        super().__init__()
        self.steepness = tf.constant(steepness)
        self.num_outputs = num_outputs

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="examples")])
    def examples(self, examples: tf.Tensor) -> dict[str, tf.Tensor]:
        brightness = tf.io.parse_example(examples, {"brightness": tf.io.FixedLenFeature([], tf.float32)})["brightness"]
        square = tf.sigmoid(self.steepness * (brightness - 0.5))
        return {"probabilities": tf.stack([1 - square, square, *[square] * (self.num_outputs - 2)], axis=1)}


class _OtherSignature(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="records")])
    def examples(self, records: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"scores": tf.zeros([tf.shape(records)[0], 2])}


def save_model(path: Path, model: tf.Module | None = None, class_names=CLASS_NAMES) -> Path:
    model = model or _ByBrightness()
    tf.saved_model.save(model, str(path), signatures={"examples": model.examples})
    (path / "assets.extra").mkdir()
    (path / "assets.extra" / "labels.txt").write_text("".join(f"{name}\n" for name in class_names))
    return path


@pytest.fixture(scope="module")
def facts() -> list[dict]:
    """Label, brightness, height and camera of each record; labels follow the brightness, with noise."""
    random = np.random.default_rng(0)
    brightness = random.random(NUM_IMAGES)
    noisy = brightness + random.normal(0, 0.15, NUM_IMAGES) > 0.5
    return [
        {
            "label": CLASS_NAMES[int(noisy[number])],
            "brightness": float(brightness[number]),
            "height": 16 if number % 10 == 0 else 64,
            "camera": "left" if number % 3 else "right",
        }
        for number in range(NUM_IMAGES)
    ]


@pytest.fixture(scope="module")
def records(facts, tmp_path_factory, encode) -> str:
    path = str(tmp_path_factory.mktemp("records") / "test-0.gz")
    image = encode(np.zeros((4, 4, 3), np.uint8))
    with tf.io.TFRecordWriter(path, "GZIP") as writer:
        for number, fact in enumerate(facts):
            example = make_example(
                image=image,
                label=fact["label"],
                filename=f"{number}.png",
                height=fact["height"],
                width=64,
                brightness=fact["brightness"],
                channels=3,
                columns={"camera": fact["camera"]},
            )
            writer.write(example.SerializeToString())
    return path


@pytest.fixture(scope="module")
def evaluate(records, tmp_path_factory):
    """Evaluates a model, and a baseline, as TFX's Evaluator does; gives the folder of the results."""

    def run(model: Path, baseline: Path | None = None, config: EvaluationConfig = CONFIG) -> str:
        output = str(tmp_path_factory.mktemp("evaluation"))
        settings = tfma.utils.update_eval_config_with_defaults(
            make_config(config), has_baseline=baseline is not None, rubber_stamp=True
        )
        paths = [str(path) for path in (model, baseline) if path is not None]
        models = [
            tfma.default_eval_shared_model(eval_saved_model_path=path, model_name=spec.name, eval_config=settings)
            for path, spec in zip(paths, settings.model_specs, strict=True)
        ]
        reader = tf_example_record.TFExampleRecord(
            records, schema=make_schema(CLASS_NAMES, COLUMNS), raw_record_column_name=tfma.constants.ARROW_INPUT_COLUMN
        )
        adapter = tensor_adapter.TensorAdapterConfig(reader.ArrowSchema(), reader.TensorRepresentations())
        shared = models if baseline is not None else models[0]
        with beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"])) as pipeline:
            _ = (
                pipeline
                | reader.BeamSource()
                | tfma.ExtractEvaluateAndWriteResults(
                    eval_shared_model=shared,
                    eval_config=settings,
                    output_path=output,
                    extractors=custom_extractors(shared, settings, adapter),
                    tensor_adapter_config=adapter,
                )
            )
        return output

    return run


@pytest.fixture(scope="module")
def alone(evaluate, tmp_path_factory) -> str:
    return evaluate(save_model(tmp_path_factory.mktemp("models") / "good"))


@pytest.fixture(scope="module")
def answers(facts) -> tuple[np.ndarray, np.ndarray]:
    """The true classes, and the model's probability of a square."""
    labels = np.array([CLASS_NAMES.index(fact["label"]) for fact in facts])
    return labels, 1 / (1 + np.exp(-20 * (np.array([fact["brightness"] for fact in facts]) - 0.5)))


def test_read_evaluation_has_the_values_of_scikit_learn(alone, answers):
    labels, square = answers
    predicted = (square > 0.5).astype(int)

    found = read_evaluation(alone, CLASS_NAMES)

    assert found.overall["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, predicted))
    assert found.overall["macro_f1"] == pytest.approx(sklearn.metrics.f1_score(labels, predicted, average="macro"))
    assert found.overall["log_loss"] == pytest.approx(sklearn.metrics.log_loss(labels, square), abs=1e-5)
    assert found.overall["roc_auc"] == pytest.approx(sklearn.metrics.roc_auc_score(labels, square), abs=2e-3)
    assert found.classes["square"]["roc_auc"] == pytest.approx(found.overall["roc_auc"])
    expected = sklearn.metrics.average_precision_score(labels, square)
    assert found.classes["square"]["pr_auc"] == pytest.approx(expected, abs=0.01)
    assert found.classes["square"]["recall"] == pytest.approx(sklearn.metrics.recall_score(labels, predicted))
    assert found.confusion_matrix == sklearn.metrics.confusion_matrix(labels, predicted).tolist()
    assert sum(one["count"] for one in found.calibration) == found.overall["example_count"] == NUM_IMAGES


def test_read_evaluation_has_every_slice_with_its_intervals(alone, answers, facts):
    labels, square = answers
    right = (square > 0.5) == labels

    found = read_evaluation(alone, CLASS_NAMES)

    members = {
        "camera=left": [fact["camera"] == "left" for fact in facts],
        "camera=right": [fact["camera"] == "right" for fact in facts],
        "label=circle": labels == 0,
        "label=square": labels == 1,
        "brightness_group=dark": [fact["brightness"] < 0.25 for fact in facts],
        "brightness_group=normal": [fact["brightness"] >= 0.25 for fact in facts],
        "size_group=small": [fact["height"] < 32 for fact in facts],
        "size_group=normal": [fact["height"] >= 32 for fact in facts],
    }
    assert {name for name in found.slices if ", " not in name} == set(members)
    for column in ("camera=left", "brightness_group=dark"):
        crossed = np.array(members[column]) & (labels == 0)
        assert found.slices[f"{column}, label=circle"] == {
            "accuracy": pytest.approx(right[crossed].mean()),
            "example_count": crossed.sum(),
        }
    for name, mask in members.items():
        assert found.slices[name]["example_count"] == np.sum(mask)
        assert found.slices[name]["accuracy"] == pytest.approx(right[np.array(mask)].mean())
        low, high = found.intervals["slices"][name]["accuracy"]
        assert low <= found.slices[name]["accuracy"] <= high
    assert set(found.intervals["classes"]["square"]) == {"precision", "recall", "f1", "roc_auc", "pr_auc"}


def test_read_evaluation_lists_the_most_confident_mistakes(alone, answers):
    labels, square = answers
    confidence = np.maximum(square, 1 - square)
    wrong = np.flatnonzero((square > 0.5) != labels)

    mistakes = read_evaluation(alone, CLASS_NAMES).mistakes

    expected = sorted(wrong, key=lambda number: -confidence[number])[:24]
    assert [mistake["filename"] for mistake in mistakes] == [f"{number}.png" for number in expected]
    assert mistakes[0]["probability"] == pytest.approx(confidence[expected[0]], abs=1e-5)
    assert {mistake["label"] for mistake in mistakes} <= set(CLASS_NAMES)


def test_read_evaluation_of_a_first_model_has_nothing_to_compare_with(alone):
    found = read_evaluation(alone, CLASS_NAMES)

    assert found.reasons == []
    assert found.baseline is None
    assert not found.has_baseline
    json.dumps(dataclasses.asdict(found), allow_nan=False)


def test_read_evaluation_compares_on_the_same_images(evaluate, tmp_path):
    baseline = save_model(tmp_path / "baseline", _ByBrightness(-20.0))  # wrong wherever the other is right

    found = read_evaluation(evaluate(save_model(tmp_path / "candidate"), baseline), CLASS_NAMES)

    assert found.reasons == []
    assert found.baseline["problem"] == ""
    assert found.baseline["overall"]["accuracy"] == pytest.approx(1 - found.overall["accuracy"])
    change = found.baseline["changes"]["accuracy"]
    assert change["change"] == pytest.approx(2 * found.overall["accuracy"] - 1)
    assert 0 < change["interval"][0] < change["change"] < change["interval"][1]


def test_read_evaluation_maps_a_baseline_whose_classes_come_in_another_order(evaluate, tmp_path):
    baseline = save_model(tmp_path / "baseline", _ByBrightness(-20.0), class_names=CLASS_NAMES[::-1])

    found = read_evaluation(evaluate(save_model(tmp_path / "candidate"), baseline), CLASS_NAMES)

    change = found.baseline["changes"]["accuracy"]
    assert change["change"] == 0.0
    assert -0.05 < change["interval"][0] < 0 < change["interval"][1] < 0.05


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda path: save_model(path, class_names=("circle", "triangle")), "its classes are circle, triangle; those of"),
        (lambda path: path, "it is gone from its place"),
        (
            lambda path: save_model(path, _OtherSignature()),
            "its signature `examples` takes records and gives scores; it has to take examples and give probabilities",
        ),
    ],
)
def test_read_evaluation_says_why_a_baseline_cannot_be_evaluated(evaluate, tmp_path, make, problem):
    found = read_evaluation(evaluate(save_model(tmp_path / "candidate"), make(tmp_path / "baseline")), CLASS_NAMES)

    (reason,) = found.reasons
    assert reason.startswith(f"the latest blessed model cannot be evaluated on this data: {problem}")
    assert reason.endswith('set evaluation.compare_with to "nothing" for one run, whose model then is judged by itself alone')
    assert found.overall["accuracy"] > 0.8  # the candidate is measured all the same
    assert problem in found.baseline["problem"]


def cut(path: Path) -> Path:
    file = save_model(path) / "saved_model.pb"
    file.write_bytes(file.read_bytes()[:-200])
    return path


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (cut, "it does not load: "),
        (lambda path: save_model(path, _ByBrightness(math.nan)), "its answers are not numbers"),
        (lambda path: save_model(path, _ByBrightness(num_outputs=3)), "it answers with 3 probabilities; its class list has 2"),
        (lambda path: save_model(path, class_names=("a", "b")), "its classes are a, b; those of the data are circle, square"),
    ],
)
def test_read_evaluation_says_why_a_model_cannot_be_used(evaluate, tmp_path, make, problem):
    found = read_evaluation(evaluate(make(tmp_path / "model")), CLASS_NAMES)

    (reason,) = found.reasons
    assert reason.startswith(f"the model cannot be used: {problem}")
    assert reason.endswith(f"({NUM_IMAGES} of {NUM_IMAGES} test images got no answer)")
    assert found.overall["accuracy"] == 0.0


def test_read_evaluation_says_that_a_named_slice_has_no_image(evaluate, tmp_path):
    config = EvaluationConfig(thresholds=({"metric": "accuracy", "slice": "camera=up", "min": 0.5},))

    found = read_evaluation(evaluate(save_model(tmp_path / "model"), config=config), CLASS_NAMES)

    assert found.reasons == ["no test image has `camera=up`, so it cannot be judged"]


def test_read_evaluation_gives_a_sentence_for_each_limit_that_was_missed(evaluate, tmp_path):
    thresholds = (
        {"metric": "recall", "class": "square", "slice": "camera=left", "min": 0.99},
        {"metric": "roc_auc", "min": 0.999},
        {"metric": "log_loss", "max": 0.01},
    )
    config = EvaluationConfig(thresholds=thresholds, min_slice_examples=5)

    reasons = read_evaluation(evaluate(save_model(tmp_path / "model"), config=config), CLASS_NAMES).reasons

    assert len(reasons) == 3
    assert any(reason.startswith("recall of `square` on `camera=left` is 0.") for reason in reasons)
    assert any(reason.startswith("ROC-AUC over all test images is 0.") for reason in reasons)
    assert all(reason.endswith("(evaluation.thresholds)") for reason in reasons)


def test_is_blessed_wants_the_evaluator_s_file(tmp_path):
    assert not is_blessed(str(tmp_path))
    (tmp_path / "NOT_BLESSED").touch()
    assert not is_blessed(str(tmp_path))
    (tmp_path / "BLESSED").touch()
    assert is_blessed(str(tmp_path))
