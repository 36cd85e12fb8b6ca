"""What the model is judged by: metrics, slices and thresholds as TFMA's `EvalConfig`, and its verdict in words.

Called by `pipeline.pipeline` to configure the Evaluator and by `pipeline.results` to read what it found.
"""

import base64
import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import pydantic
import tensorflow_model_analysis as tfma
from google.protobuf import text_format
from tensorflow_model_analysis.proto import config_pb2, validation_result_pb2  # TFMA 0.52 does not carry them at its top

from data.errors import InputError
from data.features import LABEL_KEY, transformed_name
from models.signatures import EXAMPLES, PROBABILITIES, TRANSFORM_FEATURES
from pipeline.counts import (
    ACCURACY,
    CALIBRATION_ERROR,
    EXAMPLE_COUNT,
    F1,
    LOG_LOSS,
    MACRO_F1,
    MACRO_PRECISION,
    MACRO_RECALL,
    PR_AUC,
    PRECISION,
    RECALL,
    ROC_AUC,
    Counts,
    Interval,
    Summary,
    pr_auc_interval,
    roc_auc_interval,
)
from pipeline.extractors import BRIGHTNESS_GROUP, SIZE_GROUP
from pipeline.metrics import COUNTS, INCOMPARABLE, SUMMARIES, UNANSWERED, Judgement
from pipeline.thresholds import EVERY_CLASS, Limit, Threshold, expand

MAX_CLASSES_WITH_AREAS = 50  # TFMA keeps a histogram for each class and slice
TOP_K = 5
MIN_CLASSES_FOR_TOP_K = 11
_CONFUSION_MATRIX = "confusion_matrix"
_NUM_THRESHOLDS = 1_000  # of the areas' histograms; TFMA's own 10,000 take ten times the memory
_IN_CLASSES = (PRECISION, RECALL, F1)
_IN_SLICES = (ACCURACY, LOG_LOSS, CALIBRATION_ERROR)
_CHANGES = (ACCURACY, MACRO_F1, MACRO_PRECISION, MACRO_RECALL, LOG_LOSS)


class EvaluationConfig(pydantic.BaseModel):
    """What a model must reach on the test split to be blessed.

    Attributes:
      min_accuracy: of all test images, in [0, 1].
      min_class_accuracy: of the test images of each class (its recall), in [0, 1].
      min_slice_accuracy: of each value of each extra column, in [0, 1].
      max_calibration_error: highest expected calibration error over all test images, in [0, 1].
      max_accuracy_drop: how much less accurate than the latest blessed model it may be, in [0, 1]; more than that is refused
        where it is more than noise, that is, where the 95 % interval of the difference lies below 0.
      max_class_accuracy_drop: the same for each class.
      max_slice_accuracy_drop: the same for each value of each extra column.
      min_class_examples: test images that each class must have to be judged; with fewer the model is refused.
      rare_classes: classes that may have fewer; they are then not judged.
      min_slice_examples: test images that a value of a column must have to be judged; with fewer it is only listed.
      thresholds: further ones, for any metric, class and slice.
      compare_with: the latest blessed model, or nothing, for a run whose classes are meant to differ from it.
      dark_below: mean grey value in [0, 1] below which an image is sliced as dark.
      small_side: pixels below which an image's shorter side is sliced as small; 0 for the size that the network sees.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    min_accuracy: float = pydantic.Field(0.7, ge=0, le=1)
    min_class_accuracy: float = pydantic.Field(0.5, ge=0, le=1)
    min_slice_accuracy: float = pydantic.Field(0.6, ge=0, le=1)
    max_calibration_error: float = pydantic.Field(0.15, ge=0, le=1)
    max_accuracy_drop: float = pydantic.Field(0.01, ge=0, le=1)
    max_class_accuracy_drop: float = pydantic.Field(0.1, ge=0, le=1)
    max_slice_accuracy_drop: float = pydantic.Field(0.1, ge=0, le=1)
    min_class_examples: int = pydantic.Field(10, ge=1)
    rare_classes: tuple[str, ...] = ()
    min_slice_examples: int = pydantic.Field(20, ge=1)
    thresholds: tuple[Threshold, ...] = ()
    compare_with: Literal["latest_blessed", "nothing"] = "latest_blessed"
    dark_below: float = pydantic.Field(0.25, ge=0, le=1)
    small_side: int = pydantic.Field(0, ge=0)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What the Evaluator found, as `run.json` has it.

    Attributes:
      overall: metric -> value over the test split; `top_5_accuracy` where there are many classes, `roc_auc` and `pr_auc` as
        macro averages where there are not.
      classes: class -> precision, recall, f1, roc_auc, pr_auc, example_count.
      slices: `column=value` or `label=class` -> accuracy, log_loss, expected_calibration_error, example_count, and, except for
        a class, macro_f1; `column=value, label=class` -> accuracy and example_count.
      intervals: 95 % intervals in the same order: `overall`, `classes` and `slices`.
      confusion_matrix: int [true class, predicted class].
      calibration: for each bin of the top probability that has images: mean `confidence`, `accuracy`, `count`.
      mistakes: the most confident ones first: filename, label, predicted, probability.
      baseline: None for a model that was compared with none; else `problem`, why it could not be, and, where it could,
        `overall`, `classes` and `changes`, each with `change` and `interval`.
      reasons: a sentence for each threshold that was missed; empty if the model is good enough.
    """

    overall: dict[str, float]
    classes: dict[str, dict[str, float]]
    slices: dict[str, dict[str, float]]
    intervals: dict[str, Any]
    confusion_matrix: list[list[int]]
    calibration: list[dict[str, float]]
    mistakes: list[dict[str, Any]]
    baseline: dict[str, Any] | None
    reasons: list[str]

    @property
    def has_baseline(self) -> bool:
        """Whether a blessed model was there to compare with."""
        return self.baseline is not None


def limits_of(config: EvaluationConfig, class_names: Sequence[str], columns: Sequence[str]) -> list[Limit]:
    """Makes every limit that a model is judged by.

    Args:
      config: thresholds.
      class_names: the ordered class list.
      columns: extra columns to slice by.

    Raises:
      InputError: if a threshold speaks of a class or a slice that the data does not have.
    """
    _check_names(config, class_names, columns)
    judged = [name for name in class_names if name not in config.rare_classes]
    limits = [
        Limit(EXAMPLE_COUNT, "min", config.min_class_examples, name, setting="evaluation.min_class_examples") for name in judged
    ]
    limits.append(Limit(ACCURACY, "min", config.min_accuracy, setting="evaluation.min_accuracy"))
    limits.append(Limit(CALIBRATION_ERROR, "max", config.max_calibration_error, setting="evaluation.max_calibration_error"))
    limits.append(Limit(ACCURACY, "max_worsening", config.max_accuracy_drop, setting="evaluation.max_accuracy_drop"))
    for kind, value, setting in (
        ("min", config.min_class_accuracy, "evaluation.min_class_accuracy"),
        ("max_worsening", config.max_class_accuracy_drop, "evaluation.max_class_accuracy_drop"),
    ):
        # A class with too few images is refused once, by their number.
        limits += [
            Limit(RECALL, kind, value, name, min_examples=config.min_class_examples, few="wait", setting=setting)
            for name in class_names
        ]
    for kind, value, setting in (
        ("min", config.min_slice_accuracy, "evaluation.min_slice_accuracy"),
        ("max_worsening", config.max_slice_accuracy_drop, "evaluation.max_slice_accuracy_drop"),
    ):
        limits += [
            Limit(ACCURACY, kind, value, "", column, config.min_slice_examples, few="wait", setting=setting)
            for column in columns
        ]
    limits += expand(
        config.thresholds,
        class_names,
        min_class_examples=config.min_class_examples,
        min_slice_examples=config.min_slice_examples,
    )
    if config.compare_with == "nothing":
        limits = [limit for limit in limits if limit.kind != "max_worsening"]
    return list({limit.name: limit for limit in limits}.values())


def _check_names(config: EvaluationConfig, class_names: Sequence[str], columns: Sequence[str]) -> None:
    named = [threshold.class_name for threshold in config.thresholds if threshold.class_name not in ("", EVERY_CLASS)]
    if unknown := sorted({*named, *config.rare_classes} - set(class_names)):
        raise InputError(
            f"Expected `evaluation.thresholds` and `evaluation.rare_classes` to name classes of the data "
            f"({', '.join(class_names)}). Received: {', '.join(unknown)}."
        )
    sliced = {threshold.slice.partition("=")[0] for threshold in config.thresholds if threshold.slice}
    known = (*columns, LABEL_KEY, BRIGHTNESS_GROUP, SIZE_GROUP)
    if unknown := sorted(sliced - set(known)):
        raise InputError(
            f"Expected the `slice` of `evaluation.thresholds` to be one of {', '.join(known)}, or one with a value "
            f"(`{known[0]}=...`). Received: {', '.join(unknown)}."
        )
    if len(class_names) > MAX_CLASSES_WITH_AREAS and any(
        threshold.metric in (ROC_AUC, PR_AUC) for threshold in config.thresholds
    ):
        raise InputError(
            f"Expected thresholds of roc_auc and pr_auc with at most {MAX_CLASSES_WITH_AREAS} classes, as they are not "
            f"computed for more. Received: {len(class_names)} classes. Take f1."
        )


def eval_config(
    config: EvaluationConfig, class_names: Sequence[str], columns: Sequence[str], *, image_size: int, code: str
) -> config_pb2.EvalConfig:
    """Builds the Evaluator's configuration.

    Args:
      config: thresholds.
      class_names: the ordered class list.
      columns: extra columns to slice by.
      image_size: pixels that the network sees.
      code: fingerprint of the code behind the metrics, for the cache.

    Raises:
      InputError: if a threshold speaks of a class or a slice that the data does not have.
    """
    limits = limits_of(config, class_names, columns)
    settings = {
        "name": COUNTS,
        "class_names": list(class_names),
        "limits": [limit.to_dict() for limit in limits],
        "dark_below": config.dark_below,
        "small_side": config.small_side or image_size,
        "code": code,
    }
    judgement = config_pb2.MetricConfig(class_name=Judgement.__name__, module=Judgement.__module__, config=json.dumps(settings))
    specs = _standard_metrics(class_names)
    specs.append(config_pb2.MetricsSpec(metrics=[judgement]))  # the last, as it reads the others
    for name, slice_spec in _judged_slices(limits, compares=config.compare_with != "nothing"):
        thresholds = specs[-1].per_slice_thresholds[name].thresholds
        thresholds.append(
            config_pb2.PerSliceMetricThreshold(
                slicing_specs=[slice_spec],
                threshold=config_pb2.MetricThreshold(
                    value_threshold=config_pb2.GenericValueThreshold(upper_bound={"value": 0.0})
                ),
            )
        )
    by_class = [[LABEL_KEY]] if len(class_names) <= MAX_CLASSES_WITH_AREAS else []
    slices = [[], *by_class, *([column] for column in columns), [BRIGHTNESS_GROUP], [SIZE_GROUP]]
    return config_pb2.EvalConfig(
        model_specs=[
            config_pb2.ModelSpec(
                signature_name=EXAMPLES,
                preprocessing_function_names=[TRANSFORM_FEATURES],
                label_key=transformed_name(LABEL_KEY),
                prediction_key=PROBABILITIES,
            )
        ],
        metrics_specs=specs,
        slicing_specs=[config_pb2.SlicingSpec(feature_keys=keys) for keys in slices],
    )


def _standard_metrics(class_names: Sequence[str]) -> list[config_pb2.MetricsSpec]:
    """Returns what TFMA has itself."""
    overall = config_pb2.MetricsSpec(
        metrics=[
            config_pb2.MetricConfig(class_name="ExampleCount"),
            config_pb2.MetricConfig(class_name="MultiClassConfusionMatrixPlot", config=f'"name": "{_CONFUSION_MATRIX}"'),
        ]
    )
    if len(class_names) >= MIN_CLASSES_FOR_TOP_K:
        overall.metrics.append(
            config_pb2.MetricConfig(
                class_name="SparseTopKCategoricalAccuracy", config=json.dumps({"name": f"top_{TOP_K}_accuracy", "k": TOP_K})
            )
        )
    if len(class_names) > MAX_CLASSES_WITH_AREAS:
        return [overall]
    areas = config_pb2.MetricsSpec(
        metrics=[
            config_pb2.MetricConfig(class_name=name, config=json.dumps({"name": metric, "num_thresholds": _NUM_THRESHOLDS}))
            for name, metric in (("AUC", ROC_AUC), ("AUCPrecisionRecall", PR_AUC))
        ],
        binarize=config_pb2.BinarizationOptions(class_ids={"values": list(range(len(class_names)))}),
        aggregate=config_pb2.AggregationOptions(macro_average=True, class_weights=dict.fromkeys(range(len(class_names)), 1.0)),
    )
    return [overall, areas]


def _judged_slices(limits: Iterable[Limit], *, compares: bool) -> Iterable[tuple[str, config_pb2.SlicingSpec]]:
    """Yields the names of what must be 0, each with the slice in which it must be."""
    everything = config_pb2.SlicingSpec()
    yield UNANSWERED, everything
    if compares:
        yield INCOMPARABLE, everything
    for limit in limits:
        column, is_value, value = limit.slice.partition("=")
        if not column:
            yield limit.name, everything
        elif is_value:
            yield limit.name, config_pb2.SlicingSpec(feature_values={column: value})
        else:
            yield limit.name, config_pb2.SlicingSpec(feature_keys=[column])


def read_evaluation(path: str, class_names: Sequence[str]) -> Evaluation:
    """Reads what the Evaluator wrote.

    Args:
      path: folder of its `evaluation` artifact.
      class_names: the ordered class list.
    """
    # With a baseline TFMA writes results of both models, and needs to be told whose.
    config = tfma.load_eval_result(path).config
    has_baseline = len(config.model_specs) > 1
    result = tfma.load_eval_result(path, model_name=tfma.CANDIDATE_KEY if has_baseline else None)
    metrics = {_slice_name(key): values[""] for key, values in result.slicing_metrics}
    summaries = {name: Summary(Counts.from_json(_bytes(values[""][COUNTS]))) for name, values in metrics.items()}
    areas = {name: _areas(values, class_names) for name, values in metrics.items()}
    limits = _read_limits(config)
    validation = tfma.load_validation_result(path)
    judged = _Judged(class_names, summaries, areas, limits)
    return Evaluation(
        **judged.metrics(metrics[""][""]),
        baseline=judged.baseline() if has_baseline else None,
        reasons=[] if validation.validation_ok else judged.reasons(validation),
    )


@dataclasses.dataclass(frozen=True)
class _Judged:
    """The slices of one evaluation."""

    class_names: Sequence[str]
    summaries: Mapping[str, Summary]
    areas: Mapping[str, Mapping[tuple[str, str], float]]
    limits: Mapping[str, Limit]

    def metrics(self, of_tfma: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields of an `Evaluation` that are metrics."""
        summary, areas = self.summaries[""], self.areas[""]
        overall = {metric: summary.value(metric) for metric in SUMMARIES}
        overall |= {metric: value for (metric, name), value in areas.items() if not name}
        top_k = f"top_{TOP_K}_accuracy"
        if top_k in of_tfma:
            overall[top_k] = float(of_tfma[top_k]["doubleValue"])
        overall[EXAMPLE_COUNT] = float(summary.num_examples)
        classes, class_intervals = {}, {}
        for index, name in enumerate(self.class_names):
            count = summary.examples_of(index)
            classes[name] = {metric: summary.value(metric, index) for metric in _IN_CLASSES}
            classes[name] |= {metric: value for (metric, of), value in areas.items() if of == name}
            classes[name][EXAMPLE_COUNT] = float(count)
            found = {metric: summary.interval(metric, index) for metric in _IN_CLASSES}
            if ROC_AUC in classes[name]:
                found[ROC_AUC] = roc_auc_interval(classes[name][ROC_AUC], count, summary.num_examples - count)
                found[PR_AUC] = pr_auc_interval(classes[name][PR_AUC], count)
            class_intervals[name] = _given(found)
        slices = {name: of for name, of in sorted(self.summaries.items()) if name}
        in_slices = {
            name: {metric: of.value(metric) for metric in (*_in_slice(name), EXAMPLE_COUNT)} for name, of in slices.items()
        }
        slice_intervals = {
            name: _given({metric: of.interval(metric) for metric in _in_slice(name)}) for name, of in slices.items()
        }
        for name, of in slices.items():
            for index, class_name in enumerate(self.class_names if _is_crossed(name, self.class_names) else ()):
                if count := of.examples_of(index):
                    crossing = f"{name}, {LABEL_KEY}={class_name}"
                    in_slices[crossing] = {ACCURACY: of.value(RECALL, index), EXAMPLE_COUNT: float(count)}
                    slice_intervals[crossing] = _given({ACCURACY: of.interval(RECALL, index)})
        return {
            "overall": overall,
            "classes": classes,
            "slices": dict(sorted(in_slices.items())),
            "intervals": {
                "overall": _given({metric: summary.interval(metric) for metric in SUMMARIES}),
                "classes": class_intervals,
                "slices": slice_intervals,
            },
            "confusion_matrix": summary.confusion_matrix().tolist(),
            "calibration": summary.calibration(),
            "mistakes": [
                {
                    "filename": filename,
                    "label": self.class_names[label],
                    "predicted": self.class_names[predicted],
                    "probability": probability,
                }
                for probability, filename, label, predicted in summary.counts.mistakes
            ],
        }

    def baseline(self) -> dict[str, Any]:
        """Returns what is known of the latest blessed model on the same images."""
        summary = self.summaries[""]
        if problem := summary.counts.baseline_problem:
            return {"problem": problem, "overall": {}, "classes": {}, "changes": {}}
        changes = {metric: summary.change(metric) for metric in _CHANGES}
        changes |= {f"{RECALL} of {name}": summary.change(RECALL, index) for index, name in enumerate(self.class_names)}
        return {
            "problem": "",
            "overall": {metric: summary.baseline_value(metric) for metric in _CHANGES},
            "classes": {
                name: {metric: summary.baseline_value(metric, index) for metric in _IN_CLASSES}
                for index, name in enumerate(self.class_names)
            },
            "changes": {name: {"change": change, "interval": list(interval)} for name, (change, interval) in changes.items()},
        }

    def reasons(self, validation: validation_result_pb2.ValidationResult) -> list[str]:
        """Turns TFMA's validation result into a sentence for each threshold that was missed."""
        reasons = []
        slices = {
            _slice_name([(key.column, _slice_value(key)) for key in in_slice.slice_key.single_slice_keys]): in_slice
            for in_slice in validation.metric_validations_per_slice
        }
        for name, in_slice in sorted(slices.items()):  # all test images first; Beam's own order is any
            failed = {failure.metric_key.name for failure in in_slice.failures}
            if absent := [failure.metric_key.name for failure in in_slice.failures if failure.message]:
                return [f"the Evaluator did not compute `{absent[0]}`, so the model cannot be judged"]
            summary = self.summaries[name]
            if UNANSWERED in failed:
                return [_unanswered(summary)]  # nothing else means anything then
            if INCOMPARABLE in failed:
                reasons.append(_incomparable(summary.counts.baseline_problem))
            reasons += [
                limit.reason(name, summary, self.class_names, self.areas[name])
                for limit_name, limit in self.limits.items()
                if limit_name in failed
            ]
        for missing in validation.missing_slices:
            values = [*missing.feature_values.items(), *((key, "any") for key in missing.feature_keys)]
            reasons.append(f"no test image has `{_slice_name(values)}`, so it cannot be judged")
        return reasons or [f"the Evaluator refused it: {text_format.MessageToString(validation, as_one_line=True)[:300]}"]


def _in_slice(name: str) -> tuple[str, ...]:
    """Returns the metrics of a slice; an average over classes says nothing where there is one class."""
    return _IN_SLICES if name.startswith(f"{LABEL_KEY}=") else (*_IN_SLICES, MACRO_F1)


def _is_crossed(name: str, class_names: Sequence[str]) -> bool:
    """Says whether a slice's classes are listed one by one too: not a class's own, nor where there would be too many."""
    return not name.startswith(f"{LABEL_KEY}=") and len(class_names) <= MAX_CLASSES_WITH_AREAS


def _unanswered(summary: Summary) -> str:
    problem = summary.counts.candidate_problem
    return f"the model cannot be used: {problem} ({summary.num_unanswered} of {summary.num_examples} test images got no answer)"


def _incomparable(problem: str) -> str:
    return (
        f"the latest blessed model cannot be evaluated on this data: {problem}. Where that is meant to be, set "
        'evaluation.compare_with to "nothing" for one run, whose model then is judged by itself alone'
    )


def _read_limits(config: config_pb2.EvalConfig) -> dict[str, Limit]:
    """Reads the limits back that `eval_config` wrote."""
    (settings,) = [
        json.loads(metric.config)
        for spec in config.metrics_specs
        for metric in spec.metrics
        if metric.class_name == Judgement.__name__
    ]
    limits = [Limit(**limit) for limit in settings["limits"]]
    return {limit.name: limit for limit in limits}


def _areas(values: Mapping[str, Mapping[str, Any]], class_names: Sequence[str]) -> dict[tuple[str, str], float]:
    """Finds TFMA's areas under the curves in a loaded result: (metric, class or empty) -> value."""
    areas = {}
    for sub_key, metrics in values.items():
        name = class_names[int(sub_key.partition(":")[2])] if sub_key.startswith("classId:") else ""
        for key, value in metrics.items():
            metric = key.rpartition("\n_")[2]  # TFMA puts the aggregation before the name of a macro average
            if metric in (ROC_AUC, PR_AUC):
                areas[metric, name] = float(value["doubleValue"])
    return areas


def _bytes(value: Mapping[str, Any]) -> bytes:
    return base64.b64decode(value["bytesValue"])


def _given(intervals: Mapping[str, Interval | None]) -> dict[str, list[float]]:
    return {name: list(interval) for name, interval in intervals.items() if interval is not None}


def _slice_name(key: Sequence[tuple[str, Any]]) -> str:
    return ", ".join(f"{column}={value}" for column, value in key)


def _slice_value(key: Any) -> Any:
    value = getattr(key, key.WhichOneof("kind"))
    return value.decode() if isinstance(value, bytes) else value


def is_blessed(path: str) -> bool:
    """Tells whether a `blessing` artifact's folder holds the Evaluator's blessing."""
    return os.path.exists(os.path.join(path, "BLESSED"))
