import math
from collections import Counter

import numpy as np
import pytest
from test_counts import answer, count

from data.errors import InputError, validate
from pipeline.counts import NO_ANSWER, Counts, Summary
from pipeline.thresholds import EvaluationConfig, Limit, Threshold, limits_of

CLASS_NAMES = ("cat", "dog", "owl")


def summarize(*groups: tuple[int, int, int, int]) -> Summary:
    """Makes a summary of groups: images, label, the candidate's class, the baseline's class."""
    return Summary(count([answer(*classes) for size, *classes in groups for _ in range(size)]))


def judge(limit: Limit, summary: Summary, slice_name: str = "", areas: dict | None = None) -> tuple[bool, str]:
    return (
        limit.is_missed(summary, CLASS_NAMES, areas or {}),
        limit.reason(slice_name, summary, CLASS_NAMES, areas or {}),
    )


# 74 dogs of which 53 are found, and 100 cats.
DOGS = summarize((53, 1, 1, NO_ANSWER), (21, 1, 0, NO_ANSWER), (100, 0, 0, NO_ANSWER))


def test_limit_says_metric_class_slice_value_limit_and_examples():
    limit = Limit("recall", "min", 0.75, "dog", "camera=left")

    is_missed, reason = judge(limit, DOGS, "camera=left")

    assert is_missed
    assert reason == ("recall of `dog` on `camera=left` is 0.716 with 74 examples; the limit is 0.75 (evaluation.thresholds)")


@pytest.mark.parametrize(
    ("limit", "subject"),
    [
        (Limit("accuracy", "min", 0.9), "accuracy over all test images is 0.879 with 174 examples"),
        (Limit("precision", "min", 0.9, "cat"), "precision of `cat` is 0.826 with 100 examples"),
        (Limit("log_loss", "max", 0.05), "log loss over all test images is 0.100 with 174 examples"),
    ],
)
def test_limit_that_is_missed_says_its_subject(limit, subject):
    is_missed, reason = judge(limit, DOGS)

    assert is_missed
    assert reason.startswith(subject)


def test_limit_of_overconfidence_refuses_a_model_that_is_too_sure_of_itself():
    answers = [answer(0, int(number % 10 == 0), confidence=0.999) for number in range(100)]
    limits = limits_of(EvaluationConfig(max_overconfidence=0.05), CLASS_NAMES, ())
    (limit,) = [limit for limit in limits if limit.metric == "overconfidence"]

    is_missed, reason = judge(limit, Summary(count(answers)))

    assert is_missed
    assert reason == (
        "overconfidence over all test images is 0.099 with 100 examples; the limit is 0.05 (evaluation.max_overconfidence)"
    )
    assert not judge(limit, Summary(count(answers[:40])))[0]  # too few to judge
    modest = Summary(count([answer(0, 0, confidence=0.8) for _ in range(100)]))  # as label smoothing makes them
    assert not judge(limit, modest)[0]
    assert modest.value("expected_calibration_error") == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize(
    "limit",
    [
        Limit("accuracy", "min", 0.85),
        Limit("recall", "min", 53 / 74, "dog"),
        Limit("log_loss", "max", 0.11),
        Limit("example_count", "min", 74, "dog"),
    ],
)
def test_limit_that_is_met_is_not_missed(limit):
    assert not judge(limit, DOGS)[0]


def test_limit_of_examples_fails_closed_and_names_the_setting():
    limit = Limit("example_count", "min", 10, "owl", setting="evaluation.min_class_examples")

    is_missed, reason = judge(limit, DOGS)

    assert is_missed
    assert reason == (
        "`owl` has 0 test images, too few to judge it; at least 10 are needed (evaluation.min_class_examples; "
        "evaluation.rare_classes names exceptions)"
    )


def test_limit_with_few_examples_waits_or_fails():
    few = summarize((1, 1, 1, NO_ANSWER), (4, 1, 0, NO_ANSWER))
    limit = {"metric": "recall", "kind": "min", "value": 0.5, "class_name": "dog", "slice": "camera", "min_examples": 20}

    assert not judge(Limit(**limit, few="wait"), few)[0]
    is_missed, reason = judge(Limit(**limit, few="fail"), few, "camera=left")
    assert is_missed
    assert reason == "recall of `dog` on `camera=left` cannot be judged with 5 examples; at least 20 are needed"


def test_limit_of_a_value_that_is_no_number_is_missed():
    limit = Limit("roc_auc", "min", 0.8, "dog")

    assert judge(limit, DOGS)[0]
    assert judge(limit, DOGS, areas={("roc_auc", "dog"): math.nan})[0]
    assert "ROC-AUC of `dog` is not a number" in judge(limit, DOGS)[1]
    assert not judge(limit, DOGS, areas={("roc_auc", "dog"): 0.9})[0]
    assert judge(limit, DOGS, areas={("roc_auc", "dog"): 0.7})[0]


# The candidate is wrong on `lost` images on which the baseline is right, and the reverse on `won`.
def compared(lost: int, won: int, both: int = 300) -> Summary:
    return summarize((both, 0, 0, 0), (lost, 0, 1, 0), (won, 0, 0, 1))


@pytest.mark.parametrize(
    ("lost", "won", "expected"),
    [
        (0, 0, False),
        (8, 8, False),  # equal
        (4, 30, False),  # better
        (9, 4, False),  # worse by 1.6 %, which is noise: the interval holds 0
        (30, 4, True),  # worse by 7.8 %
        (2, 0, False),  # within the limit
    ],
)
def test_limit_of_worsening_knows_noise_from_a_regression(lost, won, expected):
    is_missed, reason = judge(Limit("accuracy", "max_worsening", 0.01), compared(lost, won))

    assert is_missed is expected
    if expected:
        assert reason == (
            "accuracy over all test images is 0.078 lower than the latest blessed model's (95 % interval 0.044 to 0.111), "
            "with 334 examples; the limit is 0.01 (evaluation.thresholds)"
        )


def test_limit_of_worsening_within_its_value_passes_even_where_it_is_no_noise():
    # Two classes of equal size; the candidate takes 30 cats for dogs that the baseline knows, and knows 4 that it does not.
    summary = summarize((150, 0, 0, 0), (30, 0, 1, 0), (4, 0, 0, 1), (184, 1, 1, 1))

    assert not judge(Limit("accuracy", "max_worsening", 0.1), summary)[0]
    assert judge(Limit("macro_f1", "max_worsening", 0.01), summary)[0]


def test_limit_of_worsening_is_stricter_where_many_are_judged_at_once():
    summary = compared(12, 2)  # by chance once in 280 times

    assert judge(Limit("accuracy", "max_worsening", 0.01, num_comparisons=1), summary)[0]
    assert not judge(Limit("accuracy", "max_worsening", 0.01, num_comparisons=50), summary)[0]


@pytest.mark.parametrize(("num_classes", "per_class"), [(2, 100), (10, 30), (50, 20)])
def test_equal_models_are_rarely_refused_however_many_classes_there_are(num_classes, per_class):
    class_names = [f"class{number}" for number in range(num_classes)]
    limits = [limit for limit in limits_of(EvaluationConfig(), class_names, ()) if limit.kind == "max_worsening"]
    refused = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        labels = np.repeat(np.arange(num_classes), per_class)
        models = [np.where(random.random(len(labels)) < 0.85, labels, (labels + 1) % num_classes) for _ in range(2)]
        counts = Counts(num_classes)
        counts.outcomes = Counter(zip(labels.tolist(), *(model.tolist() for model in models), strict=True))
        summary = Summary(counts)
        refused += any(limit.is_missed(summary, class_names, {}) for limit in limits)
    assert refused <= 7  # of 60; 2.5 % over all images and as much over the classes are 3


def test_limit_of_worsening_goes_up_for_a_loss():
    losses = np.random.default_rng(0).normal(0.5, 0.1, 100)
    answers = [answer(0, 0, 0, candidate_loss=loss + 0.3, baseline_loss=loss) for loss in losses]
    limit = Limit("log_loss", "max_worsening", 0.1)

    is_missed, reason = judge(limit, Summary(count(answers)))

    assert is_missed
    assert reason.startswith("log loss over all test images is 0.300 higher than the latest blessed model's")


def limits_from(thresholds: list[Threshold]) -> list[Limit]:
    """The limits of the user's own thresholds."""
    config = EvaluationConfig(thresholds=thresholds)
    return [limit for limit in limits_of(config, CLASS_NAMES, ("camera",)) if limit.setting == "evaluation.thresholds"]


def test_limits_of_make_a_limit_for_each_class_and_bound():
    threshold = Threshold.model_validate({"metric": "f1", "class": "*", "min": 0.5, "max_worsening": 0.1})

    limits = limits_from([threshold])

    assert [(limit.class_name, limit.kind, limit.value) for limit in limits] == [
        (name, kind, value) for name in CLASS_NAMES for kind, value in (("min", 0.5), ("max_worsening", 0.1))
    ]
    assert {limit.min_examples for limit in limits} == {10}


def test_limits_of_each_value_wait_but_not_that_of_a_named_one():
    thresholds = [Threshold(metric="accuracy", slice=name, min=0.5) for name in ("camera", "camera=left")]

    limits = limits_from(thresholds)

    assert [(limit.slice, limit.few, limit.min_examples) for limit in limits] == [
        ("camera", "wait", 20),
        ("camera=left", "fail", 20),
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"metric": "accuracy"}, "Expected a threshold to have `min`, `max` or `max_worsening`"),
        ({"metric": "recall", "min": 0.5}, "Expected a threshold of recall to name its `class`"),
        ({"metric": "accuracy", "class": "cat", "min": 0.5}, "Expected a threshold of accuracy without a class"),
        ({"metric": "roc_auc", "max_worsening": 0.1}, "Expected `max_worsening` of a metric whose difference"),
        ({"metric": "accuracy", "min": 75}, r"Expected the bounds of a threshold of accuracy in \[0, 1\]. Received: 75"),
        ({"metric": "log_loss", "max": math.nan}, "Expected the bounds of a threshold of log_loss"),
        ({"metric": "accuracy", "min": 0.9, "max": 0.8}, "Nothing could pass"),
        ({"metric": "speed", "min": 1}, "metric"),
        ({"metric": "accuracy", "minimum": 1}, "minimum"),
    ],
)
def test_threshold_that_means_nothing_is_refused_in_a_line(values, message):
    with pytest.raises(InputError, match=message) as caught:
        validate(Threshold, values)
    assert "\n" not in str(caught.value)
