"""What a model must reach, as data: one limit a sentence, judged in one place.

A user writes `Threshold`s (and the plain settings of `pipeline.evaluation`); each becomes one `Limit` for each class that it
speaks of. Inside of TFMA `pipeline.metrics` asks each limit how far a slice misses it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pydantic

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
    Summary,
)

EVERY_CLASS = "*"

Metric = Literal[
    "accuracy",
    "macro_precision",
    "macro_recall",
    "macro_f1",
    "precision",
    "recall",
    "f1",
    "roc_auc",
    "pr_auc",
    "log_loss",
    "expected_calibration_error",
]
_OF_A_CLASS = (PRECISION, RECALL, F1)
_OF_ALL = (ACCURACY, MACRO_PRECISION, MACRO_RECALL, MACRO_F1, LOG_LOSS, CALIBRATION_ERROR)
_LOWER_IS_BETTER = (LOG_LOSS, CALIBRATION_ERROR)
_WITHOUT_CHANGE = (ROC_AUC, PR_AUC, CALIBRATION_ERROR)
_WORDS = {CALIBRATION_ERROR: "expected calibration error", LOG_LOSS: "log loss", ROC_AUC: "ROC-AUC", PR_AUC: "PR-AUC", F1: "F1"}


class Threshold(pydantic.BaseModel):
    """One threshold: `{metric = "recall", class = "defective", slice = "cell_type=mono", min = 0.75}`.

    Attributes:
      metric: accuracy, macro_precision, macro_recall, macro_f1, log_loss, expected_calibration_error; precision, recall, f1 of
        a class; roc_auc and pr_auc of a class or, without one, the macro average.
      class_name: `class` in the file; a class, or `*` for each.
      slice: empty for all test images, `column` for each of its values, `column=value` for one.
      min: the lowest value that passes.
      max: the highest value that passes.
      max_worsening: how much worse than the latest blessed model's it may be, beyond what is noise.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    metric: Metric
    class_name: str = pydantic.Field("", alias="class")
    slice: str = ""
    min: float | None = None
    max: float | None = None
    max_worsening: float | None = pydantic.Field(None, ge=0)

    @pydantic.model_validator(mode="after")
    def _say_what_passes(self) -> "Threshold":
        if self.min is None and self.max is None and self.max_worsening is None:
            raise ValueError(
                "Expected a threshold to have `min`, `max` or `max_worsening`. "
                f"Received: none of them for {self.metric}. Set what passes."
            )
        if self.metric in _OF_A_CLASS and not self.class_name:
            raise ValueError(
                f"Expected a threshold of {self.metric} to name its `class`, or `*` for each. Received: none. "
                f"Name one, or take {f'macro_{self.metric}'}."
            )
        if self.metric in _OF_ALL and self.class_name:
            raise ValueError(
                f"Expected a threshold of {self.metric} without a class. Received: class={self.class_name!r}. "
                "Take precision, recall or f1."
            )
        if self.metric in _WITHOUT_CHANGE and self.max_worsening is not None:
            raise ValueError(
                f"Expected `max_worsening` of a metric whose difference between two models has an interval here. "
                f"Received: {self.metric}. Take accuracy, precision, recall, f1, their macro averages or log_loss."
            )
        return self


@dataclasses.dataclass(frozen=True)
class Limit:
    """One threshold of one class.

    Attributes:
      metric: as in `Threshold`, or `example_count`.
      kind: `min`, `max` or `max_worsening`.
      value: the limit.
      class_name: of which class; empty for none.
      slice: as in `Threshold`.
      min_examples: images of the class, or of the slice, that it takes to judge.
      few: whether a limit with fewer images than that fails, or waits for more.
      setting: of the configuration, which a person may want to change.
    """

    metric: str
    kind: Literal["min", "max", "max_worsening"]
    value: float
    class_name: str = ""
    slice: str = ""
    min_examples: int = 0
    few: Literal["fail", "wait"] = "fail"
    setting: str = "evaluation.thresholds"

    @property
    def name(self) -> str:
        """Names the limit as TFMA's metric of how far it is missed."""
        words = {"min": "at least", "max": "at most", "max_worsening": "worse than the latest blessed model's by at most"}
        return f"missed: {self.subject(self.slice)} {words[self.kind]} {self.value:g}"

    def subject(self, slice_name: str) -> str:
        """Says what is judged: the metric, its class and the slice."""
        of_class = f" of `{self.class_name}`" if self.class_name else ""
        where = f" on `{slice_name}`" if slice_name else ("" if self.class_name else " over all test images")
        return f"{_WORDS.get(self.metric, self.metric.replace('_', ' '))}{of_class}{where}"

    def applies_to(self, slice_name: str) -> bool:
        """Says whether it judges a slice, by its name: `column=value`, or empty."""
        return slice_name == self.slice or ("=" not in self.slice and bool(self.slice) and self._is_value_of(slice_name))

    def _is_value_of(self, slice_name: str) -> bool:
        return slice_name.startswith(f"{self.slice}=")

    def shortfall(self, summary: Summary, class_names: Sequence[str], areas: Mapping[tuple[str, str], float]) -> float:
        """Returns by how much a slice misses the limit, which TFMA then compares with 0.

        Args:
          summary: of the slice.
          class_names: the ordered class list.
          areas: (roc_auc or pr_auc, class or empty) -> value.

        Returns:
          0 where it is met or not to be judged, more where it is not; NaN, which TFMA refuses too, where there is no value.
        """
        index = class_names.index(self.class_name) if self.class_name else None
        count = summary.num_examples if index is None else summary.examples_of(index)
        if self.metric != EXAMPLE_COUNT and count < self.min_examples:
            return 0.0 if self.few == "wait" else float(self.min_examples - count)
        if self.kind == "max_worsening":
            worsening, (low, _) = self.worsening(summary, index)
            return max(worsening - self.value, 0.0) if low > 0 else 0.0
        value = self.found(summary, index, areas)
        shortfall = self.value - value if self.kind == "min" else value - self.value
        return shortfall if math.isnan(shortfall) else max(shortfall, 0.0)

    def found(self, summary: Summary, index: int | None, areas: Mapping[tuple[str, str], float]) -> float:
        """Returns the value that is compared with the limit."""
        if self.metric in (ROC_AUC, PR_AUC):
            return areas.get((self.metric, self.class_name), math.nan)
        return summary.value(self.metric, index)

    def worsening(self, summary: Summary, index: int | None) -> tuple[float, tuple[float, float]]:
        """Returns by how much the candidate is worse than the baseline on the same images, and the interval of that."""
        change, (low, high) = summary.change(self.metric, index)
        return (change, (low, high)) if self.metric in _LOWER_IS_BETTER else (-change, (-high, -low))

    def reason(
        self, slice_name: str, summary: Summary, class_names: Sequence[str], areas: Mapping[tuple[str, str], float]
    ) -> str:
        """Says in a sentence how the limit was missed."""
        index = class_names.index(self.class_name) if self.class_name else None
        count = summary.num_examples if index is None else summary.examples_of(index)
        images = f"{count} example{'' if count == 1 else 's'}"
        if self.metric == EXAMPLE_COUNT:
            return (
                f"`{self.class_name}` has {count} test image{'' if count == 1 else 's'}, too few to judge it; at least "
                f"{self.value:g} are needed ({self.setting}; evaluation.rare_classes names exceptions)"
            )
        subject = self.subject(slice_name)
        if count < self.min_examples:
            return f"{subject} cannot be judged with {images}; at least {self.min_examples} are needed"
        if self.kind == "max_worsening":
            worsening, (low, high) = self.worsening(summary, index)
            direction = "higher" if self.metric in _LOWER_IS_BETTER else "lower"
            return (
                f"{subject} is {worsening:.3f} {direction} than the latest blessed model's (95 % interval {low:.3f} to "
                f"{high:.3f}), with {images}; the limit is {self.value:g} ({self.setting})"
            )
        value = self.found(summary, index, areas)
        found = "not a number" if math.isnan(value) else f"{value:.3f}"
        return f"{subject} is {found} with {images}; the limit is {self.value:g} ({self.setting})"

    def to_dict(self) -> dict[str, Any]:
        """Returns the limit as JSON takes it."""
        return dataclasses.asdict(self)


def expand(
    thresholds: Sequence[Threshold], class_names: Sequence[str], *, min_class_examples: int, min_slice_examples: int
) -> list[Limit]:
    """Makes a limit for each class and each bound that thresholds speak of.

    Where a threshold is for each value of a column, values with too few images wait for more; one that was named fails.

    Args:
      thresholds: as the user wrote them.
      class_names: the ordered class list.
      min_class_examples: images that it takes to judge a class over all test images.
      min_slice_examples: images that it takes to judge a slice, or a class in a slice.
    """
    limits = []
    for threshold in thresholds:
        classes = class_names if threshold.class_name == EVERY_CLASS else (threshold.class_name,)
        for name in classes:
            for kind in ("min", "max", "max_worsening"):
                if (value := getattr(threshold, kind)) is None:
                    continue
                limits.append(
                    Limit(
                        metric=threshold.metric,
                        kind=kind,
                        value=value,
                        class_name=name,
                        slice=threshold.slice,
                        min_examples=min_slice_examples if threshold.slice else min_class_examples if name else 1,
                        few="wait" if threshold.slice and "=" not in threshold.slice else "fail",
                    )
                )
    return limits
