"""What an evaluation counts of a slice's images, and the metrics and intervals that follow from it.

A slice of any size becomes a few numbers, so that memory does not grow with the images, and everything else is computed from
those: values, their confidence intervals, and the difference between two models that answered the same images. Called by
`pipeline.metrics` inside of TFMA, and by `pipeline.evaluation`, which reads what TFMA wrote.
"""

import dataclasses
import functools
import heapq
import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse
import scipy.special
import scipy.stats

NO_ANSWER = -1  # the class of an image to which a model gave no probabilities
NUM_BINS = 15  # of the top probability, equally wide; as in Guo et al. 2017
MAX_MISTAKES = 24  # that are kept, the most confident ones
CONFIDENCE = 0.95  # of every interval

_NUM_DRAWS = 1_000
_SEED = 20170706
_Z = float(scipy.stats.norm.ppf(0.5 + CONFIDENCE / 2))

ACCURACY = "accuracy"
MACRO_PRECISION = "macro_precision"
MACRO_RECALL = "macro_recall"
MACRO_F1 = "macro_f1"
PRECISION = "precision"
RECALL = "recall"
F1 = "f1"
LOG_LOSS = "log_loss"
CALIBRATION_ERROR = "expected_calibration_error"
OVERCONFIDENCE = "overconfidence"  # the part of the calibration error by which probabilities are too high
CALIBRATIONS = (CALIBRATION_ERROR, OVERCONFIDENCE)
ROC_AUC = "roc_auc"
PR_AUC = "pr_auc"
EXAMPLE_COUNT = "example_count"

Interval = tuple[float, float]


@dataclasses.dataclass
class Counts:
    """What is counted of the images of one slice.

    Attributes:
      num_classes: length of the class list.
      outcomes: (true class, the candidate's class, the baseline's class) -> images. A class is an index, or `NO_ANSWER`;
        without a baseline its class is `NO_ANSWER` everywhere.
      bins: float64 [NUM_BINS, 3]; of the candidate's top probability: images, sum of the probability, right answers.
      losses: float64 [5]; sums over the images of: the candidate's log loss, its square, the baseline's, the difference
        (candidate minus baseline), its square.
      mistakes: the candidate's most confident ones: top probability, file name, true class, the candidate's class.
      candidate_problem: why the candidate could not answer; empty if it could.
      baseline_problem: the same of the baseline.
    """

    num_classes: int
    outcomes: Counter = dataclasses.field(default_factory=Counter)
    bins: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((NUM_BINS, 3)))
    losses: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(5))
    mistakes: list[tuple[float, str, int, int]] = dataclasses.field(default_factory=list)
    candidate_problem: str = ""
    baseline_problem: str = ""

    def add(self, answer: Mapping[str, Any]) -> None:
        """Counts one image.

        Args:
          answer: what `pipeline.extractors` says of it: `label`, `candidate` and `baseline` (classes), `confidence` (the
            candidate's top probability), `candidate_loss`, `baseline_loss`, `filename`, `candidate_problem` and
            `baseline_problem`.
        """
        label, candidate = int(answer["label"]), int(answer["candidate"])
        self.outcomes[label, candidate, int(answer["baseline"])] += 1
        confidence = float(answer["confidence"])
        if candidate != NO_ANSWER:
            self.bins[min(int(confidence * NUM_BINS), NUM_BINS - 1)] += (1, confidence, label == candidate)
        ours, theirs = float(answer["candidate_loss"]), float(answer["baseline_loss"])
        self.losses += (ours, ours**2, theirs, ours - theirs, (ours - theirs) ** 2)
        if candidate not in (label, NO_ANSWER):
            self._keep_mistake((confidence, answer["filename"], label, candidate))
        self.candidate_problem = self.candidate_problem or answer["candidate_problem"]
        self.baseline_problem = self.baseline_problem or answer["baseline_problem"]

    def merge(self, other: "Counts") -> None:
        """Adds the counts of other images of the slice."""
        self.outcomes.update(other.outcomes)
        self.bins = self.bins + other.bins
        self.losses = self.losses + other.losses
        for mistake in other.mistakes:
            self._keep_mistake(mistake)
        self.candidate_problem = self.candidate_problem or other.candidate_problem
        self.baseline_problem = self.baseline_problem or other.baseline_problem

    def _keep_mistake(self, mistake: tuple[float, str, int, int]) -> None:
        if len(self.mistakes) < MAX_MISTAKES:
            heapq.heappush(self.mistakes, mistake)
        else:
            heapq.heappushpop(self.mistakes, mistake)

    def to_json(self) -> str:
        """Writes the counts as TFMA keeps them, beside its metrics."""
        values = {
            "num_classes": self.num_classes,
            "outcomes": [[*classes, count] for classes, count in sorted(self.outcomes.items())],
            "bins": self.bins.tolist(),
            "losses": self.losses.tolist(),
            "mistakes": sorted(self.mistakes, reverse=True),
            "candidate_problem": self.candidate_problem,
            "baseline_problem": self.baseline_problem,
        }
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Counts":
        """Reads what `to_json` wrote."""
        values = json.loads(text)
        return cls(
            num_classes=values["num_classes"],
            outcomes=Counter({(label, ours, theirs): count for label, ours, theirs, count in values["outcomes"]}),
            bins=np.asarray(values["bins"]),
            losses=np.asarray(values["losses"]),
            mistakes=[tuple(mistake) for mistake in values["mistakes"]],
            candidate_problem=values["candidate_problem"],
            baseline_problem=values["baseline_problem"],
        )


class Summary:
    """Metrics, intervals and changes of one slice, computed from its counts.

    Precision, recall and F1 go by the most probable class, and are 0 where there is nothing to divide by. A macro average is
    over the classes that occur in the slice, true or predicted, as scikit-learn has it. An image without an answer counts as
    wrong everywhere. Intervals are of 95 %.
    """

    def __init__(self, counts: Counts):
        """Summarizes counts."""
        self.counts = counts
        self.num_examples = sum(counts.outcomes.values())
        classes = np.asarray(list(counts.outcomes), int).reshape(-1, 3)
        self._labels, self._candidate, self._baseline = classes.T
        self._images = np.asarray(list(counts.outcomes.values()), float)
        self._drawn_values: dict[tuple[str, str], np.ndarray] = {}

    @property
    def num_unanswered(self) -> int:
        """Images to which the candidate gave no probabilities."""
        return int(self._images[self._candidate == NO_ANSWER].sum())

    @property
    def num_unanswered_by_baseline(self) -> int:
        """Images to which the baseline gave none; all, where there is no baseline."""
        return int(self._images[self._baseline == NO_ANSWER].sum())

    def examples_of(self, class_index: int) -> int:
        """Returns how many images of a class there are."""
        return int(self._images[self._labels == class_index].sum())

    def confusion_matrix(self) -> np.ndarray:
        """Returns int64 [true class, the candidate's class]; images without an answer are left out."""
        matrix = np.zeros((self.counts.num_classes,) * 2, np.int64)
        answered = self._candidate != NO_ANSWER
        np.add.at(matrix, (self._labels[answered], self._candidate[answered]), self._images[answered].astype(np.int64))
        return matrix

    def calibration(self) -> list[dict[str, float]]:
        """Returns mean confidence, accuracy and count of each bin of the top probability that has images."""
        return [
            {"confidence": confidence / count, "accuracy": right / count, "count": int(count)}
            for count, confidence, right in self.counts.bins
            if count
        ]

    def value(self, metric: str, class_index: int | None = None) -> float:
        """Returns the candidate's value of a metric, of one class where one is given; NaN where there are no images."""
        return self._value_of(self._candidate, metric, class_index)

    def baseline_value(self, metric: str, class_index: int | None = None) -> float:
        """Returns the baseline's value; it has no calibration error."""
        return self._value_of(self._baseline, metric, class_index)

    def _value_of(self, predicted: np.ndarray, metric: str, class_index: int | None) -> float:
        if metric == EXAMPLE_COUNT:
            return float(self.num_examples if class_index is None else self.examples_of(class_index))
        if not self.num_examples:
            return math.nan
        if metric == LOG_LOSS:
            return float(self.counts.losses[0 if predicted is self._candidate else 2] / self.num_examples)
        if metric in CALIBRATIONS:
            return self._calibration_of(metric)[0]
        return float(_pick(self._from_outcomes(predicted, metric, self._images[None]), class_index)[0])

    def interval(self, metric: str, class_index: int | None = None) -> Interval | None:
        """Returns the candidate's 95 % interval of a metric.

        Shares have Wilson's interval; the log loss the normal one; the others are bootstrapped from the outcomes, which for
        metrics of outcomes is the same as drawing images.

        Returns:
          Low and high end, or None where the images say nothing of it.
        """
        if not self.num_examples or metric == EXAMPLE_COUNT:
            return None
        right = self._images * (self._labels == self._candidate)
        if metric == ACCURACY:
            return wilson_interval(right.sum(), self.num_examples)
        if metric == RECALL:
            return wilson_interval(right[self._labels == class_index].sum(), self.examples_of(class_index))
        if metric == PRECISION:
            predicted = self._images[self._candidate == class_index].sum()
            return wilson_interval(right[self._labels == class_index].sum(), predicted)
        if metric == LOG_LOSS:
            return _normal_interval(self.counts.losses[0], self.counts.losses[1], self.num_examples)
        if metric in CALIBRATIONS:
            return self._calibration_of(metric)[1]
        low, high = _percentiles(_pick(self._drawn("candidate", metric), class_index))
        return (low, high) if low < high else None  # of a few images that are all alike

    def change(self, metric: str, class_index: int | None = None) -> tuple[float, Interval]:
        """Returns the candidate's value less the baseline's, and the 95 % interval of that difference.

        Both answered the same images, so the interval is of the paired difference, which is much narrower than either model's:
        of shares that of Agresti and Min 2005 (https://doi.org/10.1002/sim.1781), of the log loss the normal one, of the others
        a bootstrap's.
        """
        if metric == LOG_LOSS:
            return (
                float(self.counts.losses[3] / self.num_examples),
                _normal_interval(self.counts.losses[3], self.counts.losses[4], self.num_examples),
            )
        change = self.value(metric, class_index) - self.baseline_value(metric, class_index)
        if metric in (ACCURACY, RECALL):
            won, lost, count = self._disagreements(class_index)
            if not count:
                return change, (math.nan, math.nan)
            # Half an image is added to each of the four outcomes.
            middle = (won - lost) / (count + 2)
            margin = _Z * math.sqrt(max((won + lost + 1) - (won - lost) ** 2 / (count + 2), 0)) / (count + 2)
            return change, (max(middle - margin, -1.0), min(middle + margin, 1.0))
        return change, _percentiles(self._drawn_change(metric, class_index))

    def chance_of_worse(self, metric: str, class_index: int | None = None) -> float:
        """Returns how likely a candidate as good as the baseline would look as much worse as this one, or more, by chance.

        Of shares it is McNemar's exact test on the images that one of the two has right, with half the weight for the observed
        number (mid-p; Fagerland et al. 2013, https://doi.org/10.1186/1471-2288-13-91); of the others by the normal distribution
        with the spread of the log loss, or of a bootstrap.
        """
        if metric in (ACCURACY, RECALL):
            won, lost, _ = self._disagreements(class_index)
            trials = int(won + lost)
            if not trials:
                return 1.0
            test = scipy.stats.binom(trials, 0.5)
            return float(test.sf(lost) + test.pmf(lost) / 2)
        if metric == LOG_LOSS:
            change, (low, high) = self.change(metric)
            spread = (high - low) / 2 / _Z
        else:
            change = self.baseline_value(metric, class_index) - self.value(metric, class_index)
            spread = float(self._drawn_change(metric, class_index).std())
        return float(scipy.stats.norm.sf(change / spread)) if spread else float(change <= 0)

    def _disagreements(self, class_index: int | None) -> tuple[float, float, float]:
        """Returns the images that the candidate alone has right, those that the baseline alone has right, and all."""
        chosen = self._labels == class_index if class_index is not None else np.ones_like(self._labels, bool)
        ours, theirs = self._labels == self._candidate, self._labels == self._baseline
        won, lost = (self._images[chosen & one & ~other].sum() for one, other in ((ours, theirs), (theirs, ours)))
        return float(won), float(lost), float(self._images[chosen].sum())

    def _drawn_change(self, metric: str, class_index: int | None) -> np.ndarray:
        ours, theirs = (_pick(self._drawn(model, metric), class_index) for model in ("candidate", "baseline"))
        return ours - theirs

    @functools.cached_property
    def _draws(self) -> np.ndarray:
        """Images of each outcome, float64 [draws, outcomes], when as many are drawn from them with replacement."""
        shares = self._images / self.num_examples
        return np.random.default_rng(_SEED).multinomial(self.num_examples, shares, _NUM_DRAWS).astype(float)

    def _drawn(self, model: str, metric: str) -> np.ndarray:
        """Returns a metric of each draw, as `_from_outcomes` does; kept, as each class is asked for by itself."""
        if (model, metric) not in self._drawn_values:
            predicted = self._candidate if model == "candidate" else self._baseline
            self._drawn_values[model, metric] = self._from_outcomes(predicted, metric, self._draws)
        return self._drawn_values[model, metric]

    def _from_outcomes(self, predicted: np.ndarray, metric: str, images: np.ndarray) -> np.ndarray:
        """Computes a metric for several sets of images at once.

        Args:
          predicted: int [outcomes], a model's class.
          metric: one that depends on the outcomes alone.
          images: float64 [sets, outcomes].

        Returns:
          float64 [sets], or [sets, classes] for a metric of a class.
        """
        right = _per_class(images, np.where(self._labels == predicted, self._labels, NO_ANSWER), self.counts.num_classes)
        if metric == ACCURACY:
            return right.sum(axis=1) / images.sum(axis=1)
        true = _per_class(images, self._labels, self.counts.num_classes)
        named = _per_class(images, predicted, self.counts.num_classes)
        numerator, denominator = {
            PRECISION: (right, named),
            RECALL: (right, true),
            F1: (2 * right, true + named),
        }[metric.removeprefix("macro_")]
        values = np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
        if not metric.startswith("macro_"):
            return values
        occurs = (true > 0) | (named > 0)
        return (values * occurs).sum(axis=1) / occurs.sum(axis=1)

    def _calibration_of(self, metric: str) -> tuple[float, Interval | None]:
        """Returns the expected calibration error or the overconfidence, and its interval, both less what chance adds to it.

        Noise makes gaps larger: a few dozen answers of a perfectly calibrated model have an error above 0.1. What a calibrated
        model with these probabilities would show is taken off as a square, as noise and gap add up like that; images that are
        drawn from these have the noise twice.
        """
        count, confidence, right = self.counts.bins.T
        if not count.sum():
            return math.nan, None
        random = np.random.default_rng(_SEED)
        means = np.divide(confidence, count, out=np.zeros(NUM_BINS), where=count > 0)

        def errors(images: np.ndarray, hits: np.ndarray) -> np.ndarray:
            return _calibration_error(np.stack(np.broadcast_arrays(images, images * means, hits), axis=-1), metric)

        hits_by_chance = random.binomial(count.astype(int), np.clip(means, 0, 1), (_NUM_DRAWS, NUM_BINS))
        noise = np.square(errors(count, hits_by_chance)).mean()
        cells = np.concatenate([right, count - right])
        drawn = random.multinomial(int(count.sum()), cells / cells.sum(), _NUM_DRAWS)
        hits, misses = drawn[:, :NUM_BINS], drawn[:, NUM_BINS:]
        value = math.sqrt(max(float(_calibration_error(self.counts.bins, metric)) ** 2 - noise, 0.0))
        low, high = _percentiles(np.sqrt(np.maximum(np.square(errors(hits + misses, hits)) - 2 * noise, 0)))
        return value, (min(low, value), max(high, value))


def wilson_interval(successes: float, trials: float) -> Interval | None:
    """Returns Wilson's 95 % interval of a share; None without trials.

    Source: Wilson 1927, as in `scipy.stats`.
    """
    if not trials:
        return None
    interval = scipy.stats.binomtest(int(successes), int(trials)).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def roc_auc_interval(value: float, num_positive: int, num_negative: int) -> Interval | None:
    """Returns the 95 % interval of an area under the ROC curve; None without images of both kinds.

    Source: Hanley and McNeil 1982, https://doi.org/10.1148/radiology.143.1.7063747
    """
    if not num_positive or not num_negative or math.isnan(value):
        return None
    q1, q2 = value / (2 - value), 2 * value**2 / (1 + value)
    variance = value * (1 - value) + (num_positive - 1) * (q1 - value**2) + (num_negative - 1) * (q2 - value**2)
    margin = _Z * math.sqrt(max(variance, 0.0) / (num_positive * num_negative))
    return max(value - margin, 0.0), min(value + margin, 1.0)


def pr_auc_interval(value: float, num_positive: int) -> Interval | None:
    """Returns the 95 % interval of an area under the precision-recall curve, by its logit; None without images of the class.

    Source: Boyd, Eng and Page 2013, https://doi.org/10.1007/978-3-642-40994-3_29
    """
    if not num_positive or math.isnan(value):
        return None
    # An area of 1 has no logit; with few images it is no more certain than this.
    clipped = min(max(value, 1 / (2 * num_positive)), 1 - 1 / (2 * num_positive)) if num_positive > 1 else 0.5
    logit = scipy.special.logit(clipped)
    margin = _Z / math.sqrt(num_positive * clipped * (1 - clipped))
    low, high = scipy.special.expit([logit - margin, logit + margin])
    return min(float(low), value), max(float(high), value)


def _pick(values: np.ndarray, class_index: int | None) -> np.ndarray:
    return values if class_index is None else values[:, class_index]


def _per_class(images: np.ndarray, classes: np.ndarray, num_classes: int) -> np.ndarray:
    """Adds up images [sets, outcomes] by the class of each outcome, [sets, classes]."""
    chosen = np.flatnonzero(classes != NO_ANSWER)
    one_hot = scipy.sparse.csr_matrix((np.ones(len(chosen)), (chosen, classes[chosen])), shape=(len(classes), num_classes))
    return images @ one_hot


def _calibration_error(bins: np.ndarray, metric: str) -> np.ndarray:
    """Returns the calibration error, or the overconfidence, of bins [..., NUM_BINS, 3], in [0, 1]; 0 without images."""
    count, confidence, right = np.moveaxis(bins, -1, 0)
    gaps = np.abs(confidence - right) if metric == CALIBRATION_ERROR else np.maximum(confidence - right, 0)
    return gaps.sum(axis=-1) / np.maximum(count.sum(axis=-1), 1)


def _normal_interval(total: float, squares: float, count: int) -> Interval:
    mean = total / count
    margin = _Z * math.sqrt(max(squares / count - mean**2, 0.0) / count)
    return float(mean - margin), float(mean + margin)


def _percentiles(draws: np.ndarray) -> Interval:
    low, high = np.quantile(draws, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return float(low), float(high)
