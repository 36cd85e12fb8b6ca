"""Our TFMA metric: counts of each slice, the metrics that TFMA lacks, and how many limits are missed.

TFMA itself has the areas under the curves, top-k accuracy, the confusion matrix and the number of examples. What it lacks is
the expected calibration error, precision and recall by the most probable class, and a comparison with the blessed model that
knows noise from a regression; its confidence intervals would compute every metric twenty times over (57 s in the place of 7 s
for 286 images when it was tried). Loaded by TFMA by its name in the `EvalConfig` that `pipeline.evaluation` makes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import apache_beam as beam
from tensorflow_model_analysis.metrics import metric_types, metric_util
from tensorflow_model_analysis.proto import config_pb2
from tensorflow_model_analysis.utils import model_util

from pipeline.counts import (
    ACCURACY,
    CALIBRATION_ERROR,
    CALIBRATIONS,
    LOG_LOSS,
    MACRO_F1,
    MACRO_PRECISION,
    MACRO_RECALL,
    OVERCONFIDENCE,
    PR_AUC,
    ROC_AUC,
    Counts,
    Summary,
)
from pipeline.thresholds import EvaluationConfig, Limit, limits_of

ANSWERS_KEY = "answers"  # of the extracts; see `pipeline.extractors`
COUNTS = "counts"  # the metric that holds `Counts` as JSON
UNANSWERED = "images without an answer"
INCOMPARABLE = "images without an answer of the latest blessed model"
SUMMARIES = (ACCURACY, MACRO_PRECISION, MACRO_RECALL, MACRO_F1, LOG_LOSS, CALIBRATION_ERROR, OVERCONFIDENCE)

MetricValues = dict[metric_types.MetricKey, Any]


def missed(slice_name: str) -> str:
    """Names the metric that counts the missed limits of a slice, or of each value of a column; all test images where empty."""
    return f"limits missed on {slice_name or 'all test images'}"


class Judgement(metric_types.Metric):
    """Counts the answers of a slice, and how many limits they miss, which TFMA compares with 0.

    Its arguments come as JSON in the `MetricConfig`, which the metadata store records: so the cache sees them.
    """

    def __init__(
        self,
        name: str = COUNTS,
        class_names: Sequence[str] = (),
        columns: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        **settings: Any,
    ):
        """Makes the metric.

        Args:
          name: of the metric that holds the counts.
          class_names: the ordered class list.
          columns: extra columns to slice by.
          config: an `EvaluationConfig` as JSON.
          **settings: for `pipeline.extractors`, and the code's fingerprint.
        """
        super().__init__(
            _computations, name=name, class_names=list(class_names), columns=list(columns), config=dict(config or {})
        )

    def compute_confidence_interval(self) -> bool:
        """Has its own."""
        return False


metric_types.register_metric(Judgement)


def _computations(
    name: str,
    class_names: Sequence[str],
    columns: Sequence[str],
    config: Mapping[str, Any],
    eval_config: config_pb2.EvalConfig,
    model_names: Iterable[str],
    output_names: Iterable[str] = ("",),
    sub_keys: Iterable[metric_types.SubKey] | None = None,
    example_weighted: bool = False,
) -> metric_types.MetricComputations:
    """Makes one computation for all models, as the comparison needs the answers of both to the same image."""
    del output_names, sub_keys, example_weighted
    baseline_spec = model_util.get_baseline_model_spec(eval_config)
    baseline = baseline_spec.name if baseline_spec else None
    (candidate,) = [model_name for model_name in model_names if model_name != baseline]
    private = metric_types.MetricKey(
        metric_util.generate_private_name_from_arguments(name=name), model_name=candidate, example_weighted=False
    )

    limits = limits_of(EvaluationConfig.model_validate(config), class_names, columns)

    def result(metrics: MetricValues) -> MetricValues:
        return _judge(
            metrics,
            private,
            name=name,
            class_names=class_names,
            limits=limits,
            baseline=baseline,
        )

    return [
        metric_types.MetricComputation(
            keys=[private],
            preprocessors=[
                metric_types.StandardMetricInputsPreprocessor(
                    include_filter={ANSWERS_KEY: {}}, include_default_inputs=False, name="answers"
                )
            ],
            combiner=_CountAnswers(private, len(class_names)),
        ),
        metric_types.DerivedMetricComputation(keys=[_public_key(name, candidate)], result=result),
    ]


class _CountAnswers(beam.CombineFn):
    """Adds up `Counts`."""

    def __init__(self, key: metric_types.MetricKey, num_classes: int):
        self._key = key
        self._num_classes = num_classes

    def create_accumulator(self) -> Counts:
        return Counts(self._num_classes)

    def add_input(self, counts: Counts, element: metric_types.StandardMetricInputs) -> Counts:
        counts.add({name: value.item() for name, value in element[ANSWERS_KEY].items()})  # arrays of one element each
        return counts

    def merge_accumulators(self, accumulators: Iterable[Counts]) -> Counts:
        merged = Counts(self._num_classes)
        for counts in accumulators:
            merged.merge(counts)
        return merged

    def extract_output(self, counts: Counts) -> MetricValues:
        return {self._key: counts}


def _judge(
    metrics: MetricValues,
    private: metric_types.MetricKey,
    *,
    name: str,
    class_names: Sequence[str],
    limits: Sequence[Limit],
    baseline: str | None,
) -> MetricValues:
    """Returns the public metrics of a slice, of the candidate and of the baseline."""
    counts, candidate = metrics[private], private.model_name
    summary = Summary(counts)
    areas = areas_of(summary, _read_areas(metrics, candidate, class_names), class_names)
    values: dict[str, Any] = {name: counts.to_json()}
    values |= {metric: summary.value(metric) for metric in SUMMARIES}
    values[UNANSWERED] = float(summary.num_unanswered)
    has_baseline = baseline is not None and not summary.num_unanswered_by_baseline
    values[INCOMPARABLE] = float(baseline is not None and not has_baseline)
    for limit in limits:
        # The first model has none to be worse than.
        is_judged = limit.kind != "max_worsening" or has_baseline
        key = missed(limit.slice)
        values[key] = values.get(key, 0.0) + float(is_judged and limit.is_missed(summary, class_names, areas))
    found = {_public_key(metric, candidate): value for metric, value in values.items()}
    if has_baseline:
        found |= {
            _public_key(metric, baseline): summary.baseline_value(metric) for metric in SUMMARIES if metric not in CALIBRATIONS
        }
    return found


def _public_key(name: str, model_name: str) -> metric_types.MetricKey:
    """Names a metric as TFMA does where it looks up a threshold by name alone: it then does not ask for weights."""
    return metric_types.MetricKey(name, model_name=model_name, example_weighted=None)


def _read_areas(metrics: MetricValues, model_name: str, class_names: Sequence[str]) -> dict[tuple[str, str], float]:
    """Finds TFMA's areas under the curves of a model: (roc_auc or pr_auc, class) -> value."""
    return {
        (key.name, class_names[key.sub_key.class_id]): float(value)
        for key, value in metrics.items()
        if key.name in (ROC_AUC, PR_AUC) and key.model_name == model_name and key.sub_key and not key.is_diff
    }


def areas_of(
    summary: Summary, of_classes: Mapping[tuple[str, str], float], class_names: Sequence[str]
) -> dict[tuple[str, str], float]:
    """Adds the macro averages to the areas under the curves of classes.

    Args:
      summary: of the slice, whose areas they are.
      of_classes: (roc_auc or pr_auc, class) -> value as TFMA has it, which is 0 for a class that the slice lacks.
      class_names: the ordered class list.

    Returns:
      (roc_auc or pr_auc, class) -> value, NaN for a class that none or all images of the slice are of; and with an empty class
      the average over the others.
    """
    areas = {}
    for metric in sorted({metric for metric, _ in of_classes}):
        found = []
        for index, name in enumerate(class_names):
            has_both_kinds = 0 < summary.examples_of(index) < summary.num_examples
            areas[metric, name] = of_classes[metric, name] if has_both_kinds else math.nan
            found += [areas[metric, name]] if has_both_kinds else []
        areas[metric, ""] = sum(found) / len(found) if found else math.nan
    return areas
