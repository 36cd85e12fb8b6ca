import numpy as np
import pytest
import tensorflow_model_analysis as tfma
from google.protobuf import text_format
from tensorflow_model_analysis.proto import config_pb2, validation_result_pb2

from data.errors import InputError, validate
from pipeline.evaluation import (
    EvaluationConfig,
    _class_metrics,
    _confusion_matrix,
    _reasons,
    eval_config,
    is_blessed,
)

CONFIG = EvaluationConfig(min_accuracy=0.8, min_class_accuracy=0.6, min_slice_accuracy=0.7, max_accuracy_drop=0.02)
OVERALL = {"accuracy": 0.75, "loss": 0.5, "example_count": 40.0}
SLICES = {"label=cat": {"accuracy": 0.5, "example_count": 8.0}, "camera=3": {"accuracy": 0.4, "example_count": 5.0}}


def _reasons_of(text: str) -> list[str]:
    return _reasons(text_format.Parse(text, validation_result_pb2.ValidationResult()), OVERALL, SLICES)


def _value_failure(slice_key: str, value: str, limit: float) -> str:
    return f"""
    metric_validations_per_slice {{
      slice_key {{ {slice_key} }}
      failures {{
        metric_key {{ name: "accuracy" }}
        metric_value {{ double_value {{ value: {value} }} }}
        metric_threshold {{ value_threshold {{ lower_bound {{ value: {limit} }} }} }}
      }}
    }}
    """


def test_reasons_name_the_metric_its_value_and_the_limit():
    assert _reasons_of(_value_failure("", "0.75", 0.8)) == [
        "accuracy over all test images is 0.750 with 40 examples; the limit is 0.800"
    ]


def test_reasons_name_the_slice_and_its_number_of_examples():
    key = 'single_slice_keys { column: "label" bytes_value: "cat" }'

    assert _reasons_of(_value_failure(key, "0.5", 0.6)) == [
        "accuracy of `label=cat` is 0.500 with 8 examples; the limit is 0.600"
    ]


def test_reasons_name_a_slice_by_number():
    key = 'single_slice_keys { column: "camera" int64_value: 3 }'

    assert _reasons_of(_value_failure(key, "0.4", 0.7)) == [
        "accuracy of `camera=3` is 0.400 with 5 examples; the limit is 0.700"
    ]


def test_reasons_say_that_a_metric_is_no_number():
    assert _reasons_of(_value_failure("", "nan", 0.8)) == [
        "accuracy over all test images is not a number with 40 examples; the limit is 0.800"
    ]


def test_reasons_compare_with_the_latest_blessed_model():
    text = """
    metric_validations_per_slice {
      failures {
        metric_key { name: "accuracy" is_diff: true }
        metric_value { double_value { value: -0.05 } }
        metric_threshold {
          value_threshold { lower_bound { value: 0.8 } }
          change_threshold { absolute { value: -0.02 } direction: HIGHER_IS_BETTER }
        }
      }
    }
    """

    assert _reasons_of(text) == [
        "accuracy over all test images is 0.050 lower than the latest blessed model's, with 40 examples; the limit is 0.020"
    ]


def test_reasons_give_a_sentence_for_each_failure_in_order():
    key = 'single_slice_keys { column: "label" bytes_value: "cat" }'

    reasons = _reasons_of(_value_failure("", "0.75", 0.8) + _value_failure(key, "0.5", 0.6))

    assert [reason.split(" is ")[0] for reason in reasons] == [
        "accuracy over all test images",
        "accuracy of `label=cat`",
    ]


def test_reasons_name_a_slice_that_no_test_image_is_in():
    text = """
    missing_slices { feature_values { key: "label" value: "dog" } }
    missing_slices { feature_keys: "camera" }
    """

    assert _reasons_of(text) == [
        "no test image has `label=dog`, so it cannot be judged",
        "no test image has `camera=any`, so it cannot be judged",
    ]


def test_reasons_are_never_empty():
    assert _reasons_of("validation_ok: false rubber_stamp: true") == ["the Evaluator refused it: rubber_stamp: true"]


def _accuracy(columns=("camera",)) -> config_pb2.MetricConfig:
    (specs,) = eval_config(CONFIG, ["cat", "dog"], columns).metrics_specs
    (accuracy,) = [metric for metric in specs.metrics if '"accuracy"' in metric.config]
    return accuracy


def test_eval_config_has_the_thresholds_over_all_images():
    threshold = _accuracy().threshold

    assert threshold.value_threshold.lower_bound.value == 0.8
    assert threshold.change_threshold.absolute.value == -0.02
    assert threshold.change_threshold.direction == config_pb2.MetricDirection.HIGHER_IS_BETTER


def test_eval_config_has_a_threshold_for_each_class_and_column():
    per_slice = _accuracy().per_slice_thresholds

    found = [
        (
            [(list(spec.feature_keys), dict(spec.feature_values)) for spec in slices.slicing_specs],
            slices.threshold.value_threshold.lower_bound.value,
        )
        for slices in per_slice
    ]
    assert found == [
        ([([], {"label": "cat"}), ([], {"label": "dog"})], 0.6),
        ([(["camera"], {})], 0.7),
    ]


def test_eval_config_slices_by_class_and_column_and_both():
    specs = eval_config(CONFIG, ["cat", "dog"], ["camera", "site"]).slicing_specs

    assert [list(spec.feature_keys) for spec in specs] == [
        [],
        ["label"],
        ["camera"],
        ["site"],
        ["camera", "label"],
        ["site", "label"],
    ]


def test_eval_config_names_the_signatures_of_the_exported_model():
    (spec,) = eval_config(CONFIG, ["cat", "dog"], []).model_specs

    assert spec.signature_name == "examples"
    assert list(spec.preprocessing_function_names) == ["transform_features"]
    assert (spec.label_key, spec.prediction_key) == ("label_xf", "probabilities")


@pytest.mark.parametrize("has_baseline", [False, True])
def test_eval_config_is_accepted_with_and_without_a_blessed_model(has_baseline):
    # As TFX's Evaluator calls it: without a model to compare with, the change threshold falls away.
    config = tfma.utils.update_eval_config_with_defaults(
        eval_config(CONFIG, ["cat", "dog"], ["camera"]), has_baseline=has_baseline, rubber_stamp=True
    )

    tfma.utils.verify_eval_config(config)

    assert [spec.name for spec in config.model_specs] == (["candidate", "baseline"] if has_baseline else [""])


@pytest.mark.parametrize("name", EvaluationConfig.model_fields)
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_evaluation_config_takes_shares_only(name, value):
    with pytest.raises(InputError, match=f"^Expected `{name}` to be valid. Received: {name}={value}. "):
        validate(EvaluationConfig, {name: value})


def test_class_metrics_are_those_computed_by_hand():
    # Rows are true classes. Class 0: 6 of 8 found, 6 of 9 predictions right.
    confusion = np.array([[6, 2], [3, 9]])

    first, second = _class_metrics(confusion, 0), _class_metrics(confusion, 1)

    assert first == {
        "precision": pytest.approx(6 / 9),
        "recall": pytest.approx(6 / 8),
        "f1": pytest.approx(2 * 6 / (8 + 9)),
        "example_count": 8.0,
    }
    assert second == {
        "precision": pytest.approx(9 / 11),
        "recall": pytest.approx(9 / 12),
        "f1": pytest.approx(2 * 9 / (12 + 11)),
        "example_count": 12.0,
    }


@pytest.mark.parametrize("index", [0, 1])
def test_class_metrics_are_zero_where_there_is_nothing_to_divide_by(index):
    # Class 0 has no image and class 1 is never predicted.
    metrics = _class_metrics(np.array([[0, 0], [4, 0]]), index)

    assert (metrics["precision"], metrics["recall"], metrics["f1"]) == (0.0, 0.0, 0.0)


def test_confusion_matrix_has_true_classes_in_its_rows():
    # TFMA leaves zeros out, and writes numbers as JSON does protos: some of them as text.
    entries = [
        {"numWeightedExamples": 5.0},
        {"predictedClassId": 1, "numWeightedExamples": "2"},
        {"actualClassId": 1, "predictedClassId": 1, "numWeightedExamples": 7.0},
    ]
    plots = {"": {"": {"multiClassConfusionMatrixAtThresholds": {"matrices": [{"entries": entries}]}}}}

    assert _confusion_matrix(plots, 2).tolist() == [[5, 2], [0, 7]]


def test_is_blessed_wants_the_evaluator_s_file(tmp_path):
    assert not is_blessed(str(tmp_path))
    (tmp_path / "NOT_BLESSED").touch()
    assert not is_blessed(str(tmp_path))
    (tmp_path / "BLESSED").touch()
    assert is_blessed(str(tmp_path))
