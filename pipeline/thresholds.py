"""What a model must reach, as data: each limit is judged here and gives a sentence where it is missed.

A user writes settings and `Threshold`s; each becomes one `Limit` for each class that it speaks of. `pipeline.metrics` judges
them inside of TFMA, and `pipeline.evaluation` asks those that were missed for their reason.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import pydantic

from data.errors import InputError
from data.features import BRIGHTNESS_GROUP, LABEL_KEY, SIZE_GROUP
from pipeline.counts import (
    ACCURACY,
    CALIBRATION_ERROR,
    CALIBRATIONS,
    EXAMPLE_COUNT,
    F1,
    LOG_LOSS,
    MACRO_F1,
    MACRO_PRECISION,
    MACRO_RECALL,
    OVERCONFIDENCE,
    PR_AUC,
    PRECISION,
    RECALL,
    ROC_AUC,
    Summary,
)

EVERY_CLASS = "*"
NUM_COLUMN_VALUES = 10  # that a column is taken to have, where many comparisons at once ask for a stricter one each
_MIN_EXAMPLES_OF_CALIBRATION = 50
_CHANCE = 0.025  # of a candidate that is as good as the baseline to be taken for worse, over all limits of a kind

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
    "overconfidence",
]
MAX_CLASSES_WITH_AREAS = 50  # TFMA keeps a histogram for each class and slice
_OF_A_CLASS = (PRECISION, RECALL, F1)
_OF_ALL = (ACCURACY, MACRO_PRECISION, MACRO_RECALL, MACRO_F1, LOG_LOSS, *CALIBRATIONS)
_LOWER_IS_BETTER = (LOG_LOSS, *CALIBRATIONS)
_WITHOUT_CHANGE = (ROC_AUC, PR_AUC, *CALIBRATIONS)
_WORDS = {CALIBRATION_ERROR: "expected calibration error", LOG_LOSS: "log loss", ROC_AUC: "ROC-AUC", PR_AUC: "PR-AUC", F1: "F1"}


class Threshold(pydantic.BaseModel):
    """One threshold: `{metric = "recall", class = "defective", slice = "cell_type=mono", min = 0.75}`.

    Attributes:
      metric: accuracy, macro_precision, macro_recall, macro_f1, log_loss, expected_calibration_error, overconfidence;
        precision, recall, f1 of a class; roc_auc and pr_auc of a class or, without one, the macro average.
      class_name: a class, or `*` for each.
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
        bounds = [bound for bound in (self.min, self.max, self.max_worsening) if bound is not None]
        highest = math.inf if self.metric == LOG_LOSS else 1.0
        if not all(math.isfinite(bound) and 0 <= bound <= highest for bound in bounds):
            raise ValueError(
                f"Expected the bounds of a threshold of {self.metric} in [0, {highest:g}]. "
                f"Received: {', '.join(f'{bound:g}' for bound in bounds)}. Give shares, not percentages."
            )
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(
                f"Expected `min` of a threshold of {self.metric} to be at most its `max`. "
                f"Received: min={self.min:g}, max={self.max:g}. Nothing could pass."
            )
        if self.metric in _WITHOUT_CHANGE and self.max_worsening is not None:
            raise ValueError(
                f"Expected `max_worsening` of a metric whose difference between two models has an interval here. "
                f"Received: {self.metric}. Take accuracy, precision, recall, f1, their macro averages or log_loss."
            )
        return self


class EvaluationConfig(pydantic.BaseModel):
    """What a model must reach on the test split to be blessed.

    Attributes:
      min_accuracy: of all test images, in [0, 1].
      min_class_accuracy: of the test images of each class (its recall), in [0, 1].
      min_slice_accuracy: of each value of each extra column, in [0, 1].
      max_overconfidence: by how much the probability of the predicted class may be higher than the share of right answers, on
        average over all test images, in [0, 1]; judged from 50 images on.
      max_calibration_error: highest expected calibration error, which counts probabilities that are too low as well; label
        smoothing and mixup make them so.
      max_accuracy_drop: how much less accurate than the latest blessed model it may be, in [0, 1]; more than that is refused
        where it is more than noise: where as good a model would look that much worse in less than 1 of 40 runs, over all
        comparisons of a kind.
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
    max_overconfidence: float = pydantic.Field(0.1, ge=0, le=1)
    max_calibration_error: float = pydantic.Field(0.25, ge=0, le=1)
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
      num_comparisons: how many such limits are judged at once, one of which may look missed by chance.
    """

    metric: str
    kind: Literal["min", "max", "max_worsening"]
    value: float
    class_name: str = ""
    slice: str = ""
    min_examples: int = 0
    few: Literal["fail", "wait"] = "fail"
    setting: str = "evaluation.thresholds"
    num_comparisons: int = 1

    def subject(self, slice_name: str) -> str:
        """Says what is judged: the metric, its class and the slice."""
        of_class = f" of `{self.class_name}`" if self.class_name else ""
        where = f" on `{slice_name}`" if slice_name else ("" if self.class_name else " over all test images")
        return f"{_WORDS.get(self.metric, self.metric.replace('_', ' '))}{of_class}{where}"

    def is_missed(self, summary: Summary, class_names: Sequence[str], areas: Mapping[tuple[str, str], float]) -> bool:
        """Says whether a slice misses the limit; where there is no value, it does.

        Args:
          summary: of the slice.
          class_names: the ordered class list.
          areas: (roc_auc or pr_auc, class or empty) -> value.
        """
        index = class_names.index(self.class_name) if self.class_name else None
        count = summary.num_examples if index is None else summary.examples_of(index)
        if self.metric != EXAMPLE_COUNT and count < self.min_examples:
            return self.few == "fail"
        if self.kind == "max_worsening":
            worsening = summary.baseline_value(self.metric, index) - summary.value(self.metric, index)
            if self.metric in _LOWER_IS_BETTER:
                worsening = -worsening
            if worsening <= self.value:  # before anything is drawn
                return False
            return not summary.chance_of_worse(self.metric, index) > _CHANCE / self.num_comparisons
        value = self.found(summary, index, areas)
        return not (value >= self.value if self.kind == "min" else value <= self.value)

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
    for metric, value, setting in (
        (OVERCONFIDENCE, config.max_overconfidence, "evaluation.max_overconfidence"),
        (CALIBRATION_ERROR, config.max_calibration_error, "evaluation.max_calibration_error"),
    ):
        limits.append(Limit(metric, "max", value, min_examples=_MIN_EXAMPLES_OF_CALIBRATION, few="wait", setting=setting))
    limits.append(Limit(ACCURACY, "max_worsening", config.max_accuracy_drop, setting="evaluation.max_accuracy_drop"))
    for kind, value, setting in (
        ("min", config.min_class_accuracy, "evaluation.min_class_accuracy"),
        ("max_worsening", config.max_class_accuracy_drop, "evaluation.max_class_accuracy_drop"),
    ):
        # A class with too few images is refused once, by their number.
        limits += [
            Limit(
                RECALL,
                kind,
                value,
                name,
                min_examples=config.min_class_examples,
                few="wait",
                setting=setting,
                num_comparisons=len(class_names),
            )
            for name in class_names
        ]
    for kind, value, setting in (
        ("min", config.min_slice_accuracy, "evaluation.min_slice_accuracy"),
        ("max_worsening", config.max_slice_accuracy_drop, "evaluation.max_slice_accuracy_drop"),
    ):
        limits += [
            Limit(
                ACCURACY,
                kind,
                value,
                slice=column,
                min_examples=config.min_slice_examples,
                few="wait",
                setting=setting,
                num_comparisons=NUM_COLUMN_VALUES,
            )
            for column in columns
        ]
    limits += _expand(
        config.thresholds,
        class_names,
        min_class_examples=config.min_class_examples,
        min_slice_examples=config.min_slice_examples,
    )
    return [limit for limit in limits if limit.kind != "max_worsening" or config.compare_with != "nothing"]


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


def _expand(
    thresholds: Sequence[Threshold], class_names: Sequence[str], *, min_class_examples: int, min_slice_examples: int
) -> list[Limit]:
    """Makes a limit for each class and each bound that thresholds speak of.

    A threshold for each value of a column, or for each class, waits where there are too few images; one that names what it
    judges fails.

    Args:
      thresholds: as the user wrote them.
      class_names: the ordered class list.
      min_class_examples: images that it takes to judge a class over all test images.
      min_slice_examples: images that it takes to judge a slice, or a class in a slice.
    """
    limits = []
    for threshold in thresholds:
        classes = class_names if threshold.class_name == EVERY_CLASS else (threshold.class_name,)
        values = NUM_COLUMN_VALUES if threshold.slice and "=" not in threshold.slice else 1
        num_comparisons = len(classes) * values
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
                        few="fail" if _is_named(threshold) else "wait",
                        num_comparisons=num_comparisons,
                    )
                )
    return limits


def _is_named(threshold: Threshold) -> bool:
    return threshold.class_name != EVERY_CLASS and (not threshold.slice or "=" in threshold.slice)
