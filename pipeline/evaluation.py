"""What the model is judged by: metrics, slices and thresholds as TFMA's `EvalConfig`, and its verdict in words.

Called by `pipeline.pipeline` to configure the Evaluator and by `local_runner.py` to read what it found.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pydantic
import tensorflow_model_analysis as tfma
from google.protobuf import text_format
from tensorflow_model_analysis.proto import config_pb2  # TFMA 0.52 does not carry them at its top

from data.features import LABEL_KEY, transformed_name
from models.signatures import EXAMPLES, PROBABILITIES, TRANSFORM_FEATURES

ACCURACY = "accuracy"
LOSS = "loss"
EXAMPLE_COUNT = "example_count"
_CONFUSION_MATRIX = "confusion_matrix"
_PRECISION = "precision"
_RECALL = "recall"


class EvaluationConfig(pydantic.BaseModel):
    """What a model must reach on the test split to be blessed.

    Attributes:
      min_accuracy: of all test images, in [0, 1].
      min_class_accuracy: of the test images of each class (its recall), in [0, 1].
      min_slice_accuracy: of each value of each extra column, in [0, 1].
      max_accuracy_drop: how much less accurate than the latest blessed model it may be, in [0, 1].
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    min_accuracy: float = pydantic.Field(0.7, ge=0, le=1)
    min_class_accuracy: float = pydantic.Field(0.5, ge=0, le=1)
    min_slice_accuracy: float = pydantic.Field(0.6, ge=0, le=1)
    max_accuracy_drop: float = pydantic.Field(0.01, ge=0, le=1)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What the Evaluator found.

    Attributes:
      overall: metric -> value over the test split: accuracy, macro_f1, loss, example_count.
      classes: class -> precision, recall, f1, example_count.
      slices: `column=value` or `label=class` and their crossings -> accuracy, loss, example_count.
      confusion_matrix: int [true class, predicted class].
      reasons: a sentence for each threshold that was missed; empty if the model is good enough.
      has_baseline: whether a blessed model was there to compare with.
    """

    overall: dict[str, float]
    classes: dict[str, dict[str, float]]
    slices: dict[str, dict[str, float]]
    confusion_matrix: list[list[int]]
    reasons: list[str]
    has_baseline: bool


def eval_config(config: EvaluationConfig, class_names: Sequence[str], columns: Sequence[str]) -> config_pb2.EvalConfig:
    """Builds the Evaluator's configuration.

    Args:
      config: thresholds.
      class_names: the ordered class list.
      columns: extra columns to slice by, each alone and crossed with the class.
    """
    class_slices = [{LABEL_KEY: name} for name in class_names]
    metrics = [
        _accuracy_with_thresholds(config, class_slices, columns),
        config_pb2.MetricConfig(class_name="SparseCategoricalCrossentropy", config=f'"name": "{LOSS}"'),
        config_pb2.MetricConfig(class_name="ExampleCount"),
        config_pb2.MetricConfig(class_name="MultiClassConfusionMatrixPlot", config=f'"name": "{_CONFUSION_MATRIX}"'),
    ]
    slices = [[], [LABEL_KEY], *([column] for column in columns), *([column, LABEL_KEY] for column in columns)]
    return config_pb2.EvalConfig(
        model_specs=[
            config_pb2.ModelSpec(
                signature_name=EXAMPLES,
                preprocessing_function_names=[TRANSFORM_FEATURES],
                label_key=transformed_name(LABEL_KEY),
                prediction_key=PROBABILITIES,
            )
        ],
        metrics_specs=[config_pb2.MetricsSpec(metrics=metrics)],
        slicing_specs=[config_pb2.SlicingSpec(feature_keys=keys) for keys in slices],
    )


def _accuracy_with_thresholds(
    config: EvaluationConfig, class_slices: list[dict[str, str]], columns: Sequence[str]
) -> config_pb2.MetricConfig:
    def lower_bound(value: float) -> config_pb2.GenericValueThreshold:
        return config_pb2.GenericValueThreshold(lower_bound={"value": value})

    def per_slice(specs: list[config_pb2.SlicingSpec], value: float) -> config_pb2.PerSliceMetricThreshold:
        return config_pb2.PerSliceMetricThreshold(
            slicing_specs=specs, threshold=config_pb2.MetricThreshold(value_threshold=lower_bound(value))
        )

    return config_pb2.MetricConfig(
        class_name="SparseCategoricalAccuracy",
        config=f'"name": "{ACCURACY}"',
        threshold=config_pb2.MetricThreshold(
            value_threshold=lower_bound(config.min_accuracy),
            change_threshold=config_pb2.GenericChangeThreshold(
                direction=config_pb2.MetricDirection.HIGHER_IS_BETTER, absolute={"value": -config.max_accuracy_drop}
            ),
        ),
        # Each class by its name: a class that the test split lacks is then a missing slice, which fails.
        per_slice_thresholds=[
            per_slice([config_pb2.SlicingSpec(feature_values=values) for values in class_slices], config.min_class_accuracy),
            *(per_slice([config_pb2.SlicingSpec(feature_keys=[name])], config.min_slice_accuracy) for name in columns),
        ],
    )


def read_evaluation(path: str, class_names: Sequence[str]) -> Evaluation:
    """Reads what the Evaluator wrote.

    Args:
      path: folder of its `evaluation` artifact.
      class_names: the ordered class list.
    """
    # With a baseline TFMA writes results of both models, and loads none of the plots unless it is told whose.
    models = tfma.load_eval_result(path).config.model_specs
    result = tfma.load_eval_result(path, model_name=tfma.CANDIDATE_KEY if len(models) > 1 else None)
    slices = {_slice_name(key): _metrics(values) for key, values in result.slicing_metrics}
    (plots,) = (values for key, values in result.plots if not key)
    confusion = _confusion_matrix(plots, len(class_names))
    overall = slices.pop("")
    classes = {name: _class_metrics(confusion, index) for index, name in enumerate(class_names)}
    overall["macro_f1"] = float(np.mean([metrics["f1"] for metrics in classes.values()]))
    validation = tfma.load_validation_result(path)
    return Evaluation(
        overall=overall,
        classes=classes,
        slices=dict(sorted(slices.items())),
        confusion_matrix=confusion.tolist(),
        reasons=[] if validation.validation_ok else _reasons(validation, overall, slices),
        has_baseline=len(models) > 1,
    )


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    by_name = values[""][""]
    return {name: float(by_name[name]["doubleValue"]) for name in (ACCURACY, LOSS, EXAMPLE_COUNT) if name in by_name}


def _confusion_matrix(plots: dict[str, Any], num_classes: int) -> np.ndarray:
    """Adds up the entries of TFMA's plot at its one threshold; a prediction below it is class -1 and cannot occur."""
    matrix = np.zeros((num_classes, num_classes), int)
    data = plots[""][""]["multiClassConfusionMatrixAtThresholds"]["matrices"][0]["entries"]
    for entry in data:
        matrix[entry.get("actualClassId", 0), entry.get("predictedClassId", 0)] += round(float(entry["numWeightedExamples"]))
    return matrix


def _class_metrics(confusion: np.ndarray, index: int) -> dict[str, float]:
    hits = confusion[index, index]
    num_true, num_predicted = confusion[index].sum(), confusion[:, index].sum()
    precision = hits / num_predicted if num_predicted else 0.0
    recall = hits / num_true if num_true else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {
        _PRECISION: float(precision),
        _RECALL: float(recall),
        "f1": float(f1),
        EXAMPLE_COUNT: float(num_true),
    }


def _slice_name(key: Sequence[tuple[str, Any]]) -> str:
    return ", ".join(f"{column}={value}" for column, value in key)


def _slice_value(key: Any) -> Any:
    value = getattr(key, key.WhichOneof("kind"))
    return value.decode() if isinstance(value, bytes) else value


def _reasons(validation: Any, overall: dict[str, float], slices: dict[str, dict[str, float]]) -> list[str]:
    """Turns TFMA's validation result into a sentence for each threshold that was missed."""
    reasons = []
    for in_slice in validation.metric_validations_per_slice:
        name = _slice_name([(key.column, _slice_value(key)) for key in in_slice.slice_key.single_slice_keys])
        metrics = slices.get(name, overall) if name else overall
        count = int(metrics.get(EXAMPLE_COUNT, 0))
        where = f"of `{name}`" if name else "over all test images"
        for failure in in_slice.failures:
            metric = failure.metric_key.name
            if failure.metric_threshold.HasField("change_threshold") and failure.metric_key.is_diff:
                limit = -failure.metric_threshold.change_threshold.absolute.value
                change = failure.metric_value.double_value.value
                reasons.append(
                    f"{metric} {where} is {-change:.3f} lower than the latest blessed model's, with {count} examples; "
                    f"the limit is {limit:.3f}"
                )
            else:
                value = failure.metric_value.double_value.value
                limit = failure.metric_threshold.value_threshold.lower_bound.value
                found = "not a number" if math.isnan(value) else f"{value:.3f}"
                reasons.append(f"{metric} {where} is {found} with {count} examples; the limit is {limit:.3f}")
    for missing in validation.missing_slices:
        values = itertools.chain(missing.feature_values.items(), ((key, "any") for key in missing.feature_keys))
        reasons.append(f"no test image has `{_slice_name(list(values))}`, so it cannot be judged")
    return reasons or [f"the Evaluator refused it: {text_format.MessageToString(validation, as_one_line=True)[:300]}"]


def is_blessed(path: str) -> bool:
    """Tells whether a `blessing` artifact's folder holds the Evaluator's blessing."""
    return os.path.exists(os.path.join(path, "BLESSED"))
