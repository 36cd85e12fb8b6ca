"""What the model is judged by: metrics, slices and thresholds as TFMA's `EvalConfig`, and its verdict in words.

Called by `pipeline.pipeline` to configure the Evaluator and by `pipeline.results` to read what it found.
"""

import base64
import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tensorflow_model_analysis as tfma
from google.protobuf import text_format
from tensorflow_model_analysis.proto import config_pb2, validation_result_pb2  # TFMA 0.52 does not carry them at its top

from data.features import BRIGHTNESS_GROUP, LABEL_KEY, SIZE_GROUP, transformed_name
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
from pipeline.metrics import COUNTS, INCOMPARABLE, SUMMARIES, UNANSWERED, Judgement, areas_of, missed
from pipeline.thresholds import MAX_CLASSES_WITH_AREAS, EvaluationConfig, Limit, limits_of

TOP_K = 5
MIN_CLASSES_FOR_TOP_K = 11
_CONFUSION_MATRIX = "confusion_matrix"
_NUM_THRESHOLDS = 1_000  # of the areas' histograms; TFMA's own 10,000 take ten times the memory
_IN_CLASSES = (PRECISION, RECALL, F1)
_IN_SLICES = (ACCURACY, LOG_LOSS, CALIBRATION_ERROR)
_CHANGES = (ACCURACY, MACRO_F1, MACRO_PRECISION, MACRO_RECALL, LOG_LOSS)


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
        "columns": list(columns),
        "config": config.model_dump(mode="json"),
        "dark_below": config.dark_below,
        "small_side": config.small_side or image_size,
        "code": code,
    }
    judgement = config_pb2.MetricConfig(class_name=Judgement.__name__, module=Judgement.__module__, config=json.dumps(settings))
    specs = _standard_metrics(class_names)
    specs.append(config_pb2.MetricsSpec(metrics=[judgement]))  # the last, as it reads the others
    for name, slice_spec in _judged_slices(limits, compares=config.compare_with != "nothing").items():
        threshold = config_pb2.GenericValueThreshold(upper_bound={"value": 0.0})
        specs[-1].per_slice_thresholds[name].thresholds.append(
            config_pb2.PerSliceMetricThreshold(
                slicing_specs=[slice_spec], threshold=config_pb2.MetricThreshold(value_threshold=threshold)
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


def judgement_settings(config: config_pb2.EvalConfig) -> dict[str, Any]:
    """Returns what `eval_config` put into a configuration: class_names, columns, config, dark_below, small_side, code."""
    metrics = (metric for spec in config.metrics_specs for metric in spec.metrics)
    return json.loads(next(metric.config for metric in metrics if metric.class_name == Judgement.__name__))


def _standard_metrics(class_names: Sequence[str]) -> list[config_pb2.MetricsSpec]:
    """Returns what TFMA has itself."""
    overall = config_pb2.MetricsSpec(metrics=[config_pb2.MetricConfig(class_name="ExampleCount")])
    if len(class_names) >= MIN_CLASSES_FOR_TOP_K:
        overall.metrics.append(
            config_pb2.MetricConfig(
                class_name="SparseTopKCategoricalAccuracy", config=json.dumps({"name": f"top_{TOP_K}_accuracy", "k": TOP_K})
            )
        )
    if len(class_names) > MAX_CLASSES_WITH_AREAS:
        return [overall]
    # Its matrix is in our counts too; this is for those who look at the results with TFMA.
    overall.metrics.append(
        config_pb2.MetricConfig(class_name="MultiClassConfusionMatrixPlot", config=f'"name": "{_CONFUSION_MATRIX}"')
    )
    areas = config_pb2.MetricsSpec(
        metrics=[
            config_pb2.MetricConfig(class_name=name, config=json.dumps({"name": metric, "num_thresholds": _NUM_THRESHOLDS}))
            for name, metric in (("AUC", ROC_AUC), ("AUCPrecisionRecall", PR_AUC))
        ],
        binarize=config_pb2.BinarizationOptions(class_ids={"values": list(range(len(class_names)))}),
        aggregate=config_pb2.AggregationOptions(macro_average=True, class_weights=dict.fromkeys(range(len(class_names)), 1.0)),
    )
    return [overall, areas]


def _judged_slices(limits: Iterable[Limit], *, compares: bool) -> dict[str, config_pb2.SlicingSpec]:
    """Returns the names of what must be 0, each with the slice in which it must be."""
    found = dict.fromkeys([UNANSWERED, INCOMPARABLE] if compares else [UNANSWERED], config_pb2.SlicingSpec())
    for limit in limits:
        column, is_value, value = limit.slice.partition("=")
        if is_value:
            spec = config_pb2.SlicingSpec(feature_values={column: value})
        else:
            spec = config_pb2.SlicingSpec(feature_keys=[column] if column else [])
        found[missed(limit.slice)] = spec
    return found


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
    counts = {name: Counts.from_json(_bytes(values[""][COUNTS])) for name, values in metrics.items()}
    areas = {
        name: areas_of(Summary(counts[name]), _areas(values, class_names), class_names) for name, values in metrics.items()
    }
    validation = tfma.load_validation_result(path)
    judged = _Judged(class_names, counts, areas)
    return Evaluation(
        **judged.metrics(metrics[""][""]),
        baseline=judged.baseline() if has_baseline else None,
        reasons=[] if validation.validation_ok else judged.reasons(validation, _read_limits(config)),
    )


@dataclasses.dataclass(frozen=True)
class _Judged:
    """The slices of one evaluation."""

    class_names: Sequence[str]
    counts: Mapping[str, Counts]
    areas: Mapping[str, Mapping[tuple[str, str], float]]

    def metrics(self, of_tfma: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields of an `Evaluation` that are metrics."""
        summary, areas = Summary(self.counts[""]), self.areas[""]
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
        in_slices, slice_intervals = {}, {}
        for name, counts in self.counts.items():
            if name:
                values, intervals = self._slice(name, Summary(counts))  # what it draws is let go with it
                in_slices |= values
                slice_intervals |= intervals
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

    def _slice(self, name: str, summary: Summary) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, list[float]]]]:
        """Returns metrics and intervals of a slice, and of its classes where those are listed one by one."""
        # An average over classes says nothing where there is one class.
        metrics = _IN_SLICES if name.startswith(f"{LABEL_KEY}=") else (*_IN_SLICES, MACRO_F1)
        values = {name: {metric: summary.value(metric) for metric in (*metrics, EXAMPLE_COUNT)}}
        intervals = {name: _given({metric: summary.interval(metric) for metric in metrics})}
        if name.startswith(f"{LABEL_KEY}=") or len(self.class_names) > MAX_CLASSES_WITH_AREAS:
            return values, intervals
        for index, class_name in enumerate(self.class_names):
            if count := summary.examples_of(index):
                crossing = f"{name}, {LABEL_KEY}={class_name}"
                values[crossing] = {ACCURACY: summary.value(RECALL, index), EXAMPLE_COUNT: float(count)}
                intervals[crossing] = _given({ACCURACY: summary.interval(RECALL, index)})
        return values, intervals

    def baseline(self) -> dict[str, Any]:
        """Returns what is known of the latest blessed model on the same images."""
        summary = Summary(self.counts[""])
        if summary.num_unanswered_by_baseline:
            problem = summary.counts.baseline_problem
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

    def reasons(self, validation: validation_result_pb2.ValidationResult, limits: Sequence[Limit]) -> list[str]:
        """Turns TFMA's validation result into a sentence for each limit that was missed."""
        reasons = []
        slices = {
            _slice_name([(key.column, _slice_value(key)) for key in in_slice.slice_key.single_slice_keys]): in_slice
            for in_slice in validation.metric_validations_per_slice
        }
        for name, in_slice in sorted(slices.items()):  # all test images first; Beam's own order is any
            failed = {failure.metric_key.name for failure in in_slice.failures}
            if absent := [failure.metric_key.name for failure in in_slice.failures if failure.message]:
                return [f"the Evaluator did not compute `{absent[0]}`, so the model cannot be judged"]
            summary, areas = Summary(self.counts[name]), self.areas[name]
            if UNANSWERED in failed:
                return [_unanswered(summary)]  # nothing else means anything then
            if INCOMPARABLE in failed:
                reasons.append(_incomparable(summary.counts.baseline_problem))
            has_baseline = not summary.num_unanswered_by_baseline
            reasons += [
                limit.reason(name, summary, self.class_names, areas)
                for limit in limits
                if missed(limit.slice) in failed
                and (limit.kind != "max_worsening" or has_baseline)
                and limit.is_missed(summary, self.class_names, areas)
            ]
        for missing in validation.missing_slices:
            values = [*missing.feature_values.items(), *((key, "any") for key in missing.feature_keys)]
            reasons.append(f"no test image has `{_slice_name(values)}`, so it cannot be judged")
        reasons = list(dict.fromkeys(reasons))
        return reasons or [f"the Evaluator refused it: {text_format.MessageToString(validation, as_one_line=True)[:300]}"]


def _unanswered(summary: Summary) -> str:
    problem = summary.counts.candidate_problem
    return f"the model cannot be used: {problem} ({summary.num_unanswered} of {summary.num_examples} test images got no answer)"


def _incomparable(problem: str) -> str:
    return (
        f"the latest blessed model cannot be evaluated on this data: {problem}. Where that is meant to be, set "
        'evaluation.compare_with to "nothing" for one run, whose model then is judged by itself alone'
    )


def _read_limits(config: config_pb2.EvalConfig) -> list[Limit]:
    """Reads the limits back that `eval_config` wrote."""
    settings = judgement_settings(config)
    return limits_of(EvaluationConfig.model_validate(settings["config"]), settings["class_names"], settings["columns"])


def _areas(values: Mapping[str, Mapping[str, Any]], class_names: Sequence[str]) -> dict[tuple[str, str], float]:
    """Finds TFMA's areas under the curves of classes in a loaded result: (metric, class) -> value."""
    return {
        (metric, class_names[int(sub_key.partition(":")[2])]): float(metrics[metric]["doubleValue"])
        for sub_key, metrics in values.items()
        for metric in (ROC_AUC, PR_AUC)
        if sub_key.startswith("classId:") and metric in metrics
    }


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
