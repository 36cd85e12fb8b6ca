import itertools
import math
from collections import Counter

import numpy as np
import pytest
import sklearn.metrics

from pipeline.counts import (
    ACCURACY,
    CALIBRATION_ERROR,
    EXAMPLE_COUNT,
    F1,
    LOG_LOSS,
    MACRO_F1,
    MACRO_PRECISION,
    MACRO_RECALL,
    MAX_MISTAKES,
    NO_ANSWER,
    PRECISION,
    RECALL,
    Counts,
    Summary,
    pr_auc_interval,
    roc_auc_interval,
    wilson_interval,
)

NUM_CLASSES = 3


def answer(label: int, candidate: int, baseline: int = NO_ANSWER, **values) -> dict:
    """What the extractor says of one image."""
    defaults = {"confidence": 0.9, "candidate_loss": 0.1, "baseline_loss": 0.2, "filename": "a.jpg"}
    problems = {"candidate_problem": "", "baseline_problem": ""}
    return {"label": label, "candidate": candidate, "baseline": baseline} | defaults | problems | values


def count(answers: list[dict], num_classes: int = NUM_CLASSES) -> Counts:
    counts = Counts(num_classes)
    for one in answers:
        counts.add(one)
    return counts


def predictions(size: int = 400, *, accuracy: float = 0.7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.choice(NUM_CLASSES, size, p=[0.6, 0.3, 0.1])
    predicted = np.where(random.random(size) < accuracy, labels, random.integers(0, NUM_CLASSES, size))
    return labels, predicted


def summarize(labels: np.ndarray, predicted: np.ndarray, baseline: np.ndarray | None = None) -> Summary:
    baseline = np.full(len(labels), NO_ANSWER) if baseline is None else baseline
    return Summary(count([answer(*classes) for classes in zip(labels, predicted, baseline, strict=True)]))


def test_summary_has_the_values_of_scikit_learn():
    labels, predicted = predictions()
    summary = summarize(labels, predicted)

    assert summary.value(ACCURACY) == pytest.approx(sklearn.metrics.accuracy_score(labels, predicted))
    precision, recall, f1, examples = sklearn.metrics.precision_recall_fscore_support(labels, predicted)
    for index in range(NUM_CLASSES):
        found = [summary.value(metric, index) for metric in (PRECISION, RECALL, F1, EXAMPLE_COUNT)]
        assert found == pytest.approx([precision[index], recall[index], f1[index], examples[index]])
    averages = sklearn.metrics.precision_recall_fscore_support(labels, predicted, average="macro")[:3]
    assert [summary.value(metric) for metric in (MACRO_PRECISION, MACRO_RECALL, MACRO_F1)] == pytest.approx(averages)
    assert summary.confusion_matrix().tolist() == sklearn.metrics.confusion_matrix(labels, predicted).tolist()


def test_summary_averages_over_the_classes_that_occur():
    # Class 2 is neither true nor predicted here.
    summary = summarize(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 0]))

    assert summary.value(MACRO_RECALL) == pytest.approx((1 + 0.5) / 2)
    assert summary.value(RECALL, 2) == 0.0


def test_summary_counts_an_image_without_an_answer_as_wrong():
    summary = summarize(np.array([0, 0, 1, 1]), np.array([0, NO_ANSWER, NO_ANSWER, 1]))

    assert summary.value(ACCURACY) == 0.5
    assert summary.value(RECALL, 0) == 0.5
    assert summary.value(PRECISION, 0) == 1.0
    assert summary.num_unanswered == 2
    assert summary.confusion_matrix().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_summary_of_no_images_has_no_values():
    summary = Summary(Counts(NUM_CLASSES))

    assert math.isnan(summary.value(ACCURACY))
    assert math.isnan(summary.value(LOG_LOSS))
    assert summary.interval(MACRO_F1) is None
    assert summary.value(EXAMPLE_COUNT) == 0


def calibrated(size: int, *, gap: float = 0.0, seed: int = 0) -> Summary:
    """Answers whose confidence is too high by `gap`."""
    random = np.random.default_rng(seed)
    confidence = random.uniform(0.5, 1, size)
    wrong = random.random(size) > confidence - gap
    return Summary(count([answer(0, int(one), confidence=value) for one, value in zip(wrong, confidence, strict=True)]))


def test_calibration_error_of_many_images_is_that_computed_by_hand():
    # 1,000 answers at 0.95 of which 600 are right, 1,000 at 0.55 of which 500 are: 0.5 * 0.35 + 0.5 * 0.05.
    answers = [answer(0, 0 if number < 600 else 1, confidence=0.95) for number in range(1_000)]
    answers += [answer(0, 0 if number < 500 else 1, confidence=0.55) for number in range(1_000)]
    summary = Summary(count(answers))

    assert summary.value(CALIBRATION_ERROR) == pytest.approx(0.5 * 0.35 + 0.5 * 0.05, abs=2e-3)
    assert summary.calibration() == [
        {"confidence": pytest.approx(0.55), "accuracy": 0.5, "count": 1_000},
        {"confidence": pytest.approx(0.95), "accuracy": 0.6, "count": 1_000},
    ]
    low, high = summary.interval(CALIBRATION_ERROR)
    assert 0 <= low < summary.value(CALIBRATION_ERROR) < high < 1


def test_calibration_error_is_less_what_chance_adds():
    for size, most in ((50, 0.07), (300, 0.03), (3_000, 0.01)):
        found = [calibrated(size, seed=seed).value(CALIBRATION_ERROR) for seed in range(20)]
        assert np.mean(found) < most
    found = [calibrated(300, gap=0.2, seed=seed).value(CALIBRATION_ERROR) for seed in range(20)]
    assert np.mean(found) == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("gap", [0.0, 0.1, 0.3])
def test_interval_of_the_calibration_error_holds_the_true_one(gap):
    held = 0
    for seed in range(60):
        low, high = calibrated(300, gap=gap, seed=seed).interval(CALIBRATION_ERROR)
        held += low <= gap <= high
    assert held >= 50


def test_confidence_of_one_is_in_the_last_bin():
    assert Summary(count([answer(0, 0, confidence=1.0)])).calibration() == [{"confidence": 1.0, "accuracy": 1.0, "count": 1}]


def test_log_loss_has_the_normal_interval():
    losses = np.random.default_rng(0).exponential(size=200)
    summary = Summary(count([answer(0, 0, candidate_loss=loss) for loss in losses]))

    margin = 1.959964 * losses.std() / np.sqrt(200)
    assert summary.value(LOG_LOSS) == pytest.approx(losses.mean())
    assert summary.interval(LOG_LOSS) == pytest.approx((losses.mean() - margin, losses.mean() + margin), rel=1e-4)


def test_wilson_interval_is_the_published_one():
    # Newcombe 1998, table I: 81 of 263 and 0 of 20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson_interval(0, 0) is None


def test_roc_auc_interval_is_the_published_one():
    # Hanley and McNeil 1982: an area of 0.893 with 51 and 58 images has a standard error of 0.032.
    low, high = roc_auc_interval(0.893, 51, 58)
    assert (high - low) / 2 / 1.96 == pytest.approx(0.032, abs=1e-3)
    assert roc_auc_interval(0.9, 0, 5) is None


@pytest.mark.parametrize("value", [0.0, 1e-12, 0.03, 0.5, 0.97, 1 - 1e-12, 1.0])
def test_pr_auc_interval_holds_its_value_and_stays_within_0_and_1(value):
    for num_positive in (1, 2, 30, 3_000):
        low, high = pr_auc_interval(value, num_positive)
        assert 0 <= low <= value <= high <= 1
        assert low < high


def test_pr_auc_interval_is_narrower_with_more_images():
    # By hand: the logit of 0.9 is 2.197, its margin 1.96 / sqrt(100 * 0.09) = 0.653.
    assert pr_auc_interval(0.9, 100) == pytest.approx((0.824, 0.945), abs=1e-3)


@pytest.mark.parametrize("metric", [ACCURACY, MACRO_F1, MACRO_RECALL])
def test_intervals_hold_the_true_value_as_often_as_they_say(metric):
    labels, predicted = predictions(200_000)
    true = summarize_fast(labels, predicted).value(metric)
    random = np.random.default_rng(1)
    held = 0
    for _ in range(100):
        chosen = random.integers(0, len(labels), 300)
        low, high = summarize_fast(labels[chosen], predicted[chosen]).interval(metric)
        held += low <= true <= high
    assert 88 <= held <= 100


def summarize_fast(labels: np.ndarray, predicted: np.ndarray) -> Summary:
    counts = Counts(NUM_CLASSES)
    counts.outcomes = Counter(zip(labels.tolist(), predicted.tolist(), itertools.repeat(NO_ANSWER)))
    return Summary(counts)


def test_change_is_paired():
    # The two differ on 6 of 400 images only: each interval is 9 points wide, that of the difference about 2.
    labels, predicted = predictions()
    baseline = predicted.copy()
    wrong = np.flatnonzero(predicted != labels)[:6]
    baseline[wrong] = labels[wrong]
    summary = summarize(labels, predicted, baseline)

    change, (low, high) = summary.change(ACCURACY)

    assert change == pytest.approx(-6 / 400)
    assert low < change < high < 0
    assert high - low < 0.03
    assert np.diff(summary.interval(ACCURACY))[0] > 0.07


def test_change_between_models_of_equal_quality_is_within_the_noise():
    labels, predicted = predictions(accuracy=0.8)
    _, baseline = predictions(accuracy=0.8, seed=0)
    random = np.random.default_rng(5)
    for model in (predicted, baseline):
        flipped = random.choice(len(labels), 30, replace=False)
        model[flipped] = random.integers(0, NUM_CLASSES, 30)

    for metric in (ACCURACY, MACRO_F1):
        change, (low, high) = summarize(labels, predicted, baseline).change(metric)
        assert low < 0 < high
        assert low < change < high


def test_chance_of_worse_is_that_of_mc_nemar():
    # 4 lost and none won: 1/16 one-sided, half of which is that of the observed number.
    summary = Summary(count([answer(0, 1, 0)] * 4 + [answer(0, 0, 0)] * 16))

    assert summary.chance_of_worse(ACCURACY) == pytest.approx(1 / 32)
    assert summary.chance_of_worse(RECALL, 0) == pytest.approx(1 / 32)
    assert summary.chance_of_worse(RECALL, 1) == 1.0
    assert Summary(count([answer(0, 0, 1)] * 4)).chance_of_worse(ACCURACY) == pytest.approx(31 / 32)


@pytest.mark.parametrize("metric", [ACCURACY, MACRO_F1, LOG_LOSS])
def test_chance_of_worse_is_rarely_small_for_equal_models(metric):
    small = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        labels, predicted = predictions(150, seed=seed)
        baseline = predicted.copy()
        for model in (predicted, baseline):
            model[random.choice(150, 15, replace=False)] = random.integers(0, NUM_CLASSES, 15)
        losses = random.exponential(size=(150, 2))
        rows = zip(labels, predicted, baseline, losses, strict=True)
        answers = [answer(*row[:3], candidate_loss=row[3][0], baseline_loss=row[3][1]) for row in rows]
        small += Summary(count(answers)).chance_of_worse(metric) < 0.025
    assert small <= 12


def test_chance_of_worse_is_small_for_a_worse_model():
    labels, predicted = predictions(accuracy=0.6)
    summary = summarize(labels, predicted, labels)

    assert all(summary.chance_of_worse(metric) < 1e-6 for metric in (ACCURACY, MACRO_F1))


def test_change_of_the_log_loss_is_the_mean_difference():
    answers = [answer(0, 0, 0, candidate_loss=ours, baseline_loss=theirs) for ours, theirs in ((0.5, 0.1), (0.3, 0.1))]

    change, (low, high) = Summary(count(answers)).change(LOG_LOSS)

    assert change == pytest.approx(0.3)
    assert low < 0.3 < high


def test_counts_are_the_same_in_one_piece_and_in_parts():
    random = np.random.default_rng(0)
    answers = [
        answer(*random.integers(0, NUM_CLASSES, 3), confidence=random.random(), filename=f"{number}.jpg")
        for number in range(200)
    ]
    whole, merged = count(answers), Counts(NUM_CLASSES)
    for start in range(0, 200, 37):
        merged.merge(count(answers[start : start + 37]))

    assert merged.outcomes == whole.outcomes
    assert np.allclose(merged.bins, whole.bins)
    assert np.allclose(merged.losses, whole.losses)
    assert sorted(merged.mistakes) == sorted(whole.mistakes)


def test_counts_keep_the_most_confident_mistakes():
    answers = [answer(0, 1, confidence=number / 100, filename=f"{number}") for number in range(100)]
    answers += [answer(0, 0, confidence=1.0), answer(0, NO_ANSWER, confidence=1.0)]

    kept = sorted(count(answers).mistakes, reverse=True)

    assert [filename for _, filename, _, _ in kept] == [str(number) for number in range(99, 99 - MAX_MISTAKES, -1)]


def test_counts_come_back_from_json():
    counts = count([answer(0, 1, 2, candidate_problem="it is broken"), answer(2, 2, NO_ANSWER, filename="ü\u2028.jpg")])

    back = Counts.from_json(counts.to_json())

    assert back.outcomes == counts.outcomes
    assert back.candidate_problem == "it is broken"
    assert np.allclose(back.bins, counts.bins)
    assert sorted(back.mistakes) == sorted(counts.mistakes)
    assert Counts.from_json(back.to_json().encode()).to_json() == counts.to_json()
