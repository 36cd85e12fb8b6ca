"""How far two data sets lie apart, by their statistics: skew between splits, drift against earlier data.

The limits are the comparators of the schema, for its user to edit. Called by `pipeline.components`.
"""

from collections.abc import Sequence

import numpy as np
import tensorflow_data_validation as tfdv
from tensorflow_metadata.proto.v0 import anomalies_pb2, schema_pb2, statistics_pb2

SKEW = "skew"
DRIFT = "drift"
NUM_QUANTILES = 100  # of a number, that the statistics need: its shares are then exact to 1 %, and with TFDV's ten to 10 %


def num_examples(statistics: statistics_pb2.DatasetFeatureStatisticsList) -> int:
    """Returns how many examples the statistics are of."""
    return int(statistics.datasets[0].num_examples)


def has_comparators(schema: schema_pb2.Schema, kind: str) -> bool:
    """Says whether a schema limits `skew` or `drift` at all."""
    return any(feature.HasField(f"{kind}_comparator") for feature in schema.feature)


def find_differences(
    current: statistics_pb2.DatasetFeatureStatisticsList,
    other: statistics_pb2.DatasetFeatureStatisticsList,
    *,
    schema: schema_pb2.Schema,
    kind: str,
    names: tuple[str, str],
) -> list[str]:
    """Finds the features whose distributions differ by more than the schema's comparators allow.

    An `infinity_norm` limits the largest difference of shares: of any one value's share of the examples where the feature is
    text, and of the share of the examples that are at most any one value where it is a number (the Kolmogorov-Smirnov
    distance; TFDV has none for numbers). A `jensen_shannon_divergence` is TFDV's.

    Args:
      current: statistics of one side.
      other: statistics of the other side.
      schema: with the comparators.
      kind: `skew` or `drift`, which of the comparators count.
      names: what to call the two sides.

    Returns:
      A sentence for each feature that differs too much: what differs, how much, and the limit.
    """
    features = [{item.path.step[0]: item for item in side.datasets[0].features} for side in (current, other)]
    differences = []
    for feature in schema.feature:
        comparator = getattr(feature, f"{kind}_comparator")
        sides = [by_name.get(feature.name) for by_name in features]
        if not comparator.HasField("infinity_norm") or None in sides:
            continue
        kinds_of_statistics = {side.WhichOneof("stats") for side in sides}
        if kinds_of_statistics == {"string_stats"}:
            shares, what = _text_shares(*sides)
        elif kinds_of_statistics == {"num_stats"}:
            shares, what = _number_shares(*sides)
        else:
            continue
        difference, limit = abs(shares[0] - shares[1]), comparator.infinity_norm.threshold
        if difference > limit:
            differences.append(
                f"{kind} in `{feature.name}`: {shares[0]:.1%} of {names[0]} and {shares[1]:.1%} of {names[1]} are {what}; "
                f"the difference is {difference:.3f}, the limit {limit:g}"
            )
    for name, measurement in _divergences(current, other, schema=schema, kind=kind):
        differences.append(
            f"{kind} in `{name}`: the Jensen-Shannon divergence between {names[0]} and {names[1]} is {measurement.value:.3f}, "
            f"the limit {measurement.threshold:g}"
        )
    return differences


def _text_shares(
    current: statistics_pb2.FeatureNameStatistics, other: statistics_pb2.FeatureNameStatistics
) -> tuple[tuple[float, float], str]:
    """Returns the two shares of the value whose shares differ most, and the value."""
    sides = [
        {
            bucket.label: bucket.sample_count / side.string_stats.common_stats.num_non_missing
            for bucket in side.string_stats.rank_histogram.buckets
        }
        for side in (current, other)
    ]
    if not all(sides):  # no values, of which presence is to say
        return (0.0, 0.0), ""
    shares = {value: (sides[0].get(value, 0.0), sides[1].get(value, 0.0)) for value in sides[0] | sides[1]}
    worst = max(shares, key=lambda value: abs(shares[value][0] - shares[value][1]))
    return shares[worst], f"'{worst}'"


def _number_shares(
    current: statistics_pb2.FeatureNameStatistics, other: statistics_pb2.FeatureNameStatistics
) -> tuple[tuple[float, float], str]:
    """Returns the two cumulative shares where they differ most, and the value there."""
    sides = [_quantiles(side) for side in (current, other)]
    if not all(len(side) for side in sides):  # no values, of which presence is to say
        return (0.0, 0.0), ""
    values = np.unique(np.concatenate([side[:, :2].ravel() for side in sides]))
    first, second = (_shares_at_most(values, side) for side in sides)
    worst = int(np.argmax(np.abs(first - second)))
    return (float(first[worst]), float(second[worst])), f"at most {values[worst]:.4g}"


def _quantiles(side: statistics_pb2.FeatureNameStatistics) -> np.ndarray:
    """Returns lower end, upper end and count of a number's quantile buckets, float64 [buckets, 3]."""
    buckets = [
        (bucket.low_value, bucket.high_value, bucket.sample_count)
        for histogram in side.num_stats.histograms
        if histogram.type == statistics_pb2.Histogram.QUANTILES
        for bucket in histogram.buckets
    ]
    return np.asarray(buckets, np.float64).reshape(-1, 3)


def _shares_at_most(values: np.ndarray, quantiles: np.ndarray) -> np.ndarray:
    """Returns which share of a number's examples is at most each value; a bucket's examples lie evenly in it."""
    lows, highs, counts = quantiles.T
    widths = highs - lows
    # A bucket without a width is one value, as most are where sizes repeat, and is passed in a step.
    inside = (values[:, None] - lows) / np.where(widths > 0, widths, 1)
    passed = np.where(widths > 0, np.clip(inside, 0, 1), values[:, None] >= lows)
    return passed @ counts / counts.sum()


def _divergences(
    current: statistics_pb2.DatasetFeatureStatisticsList,
    other: statistics_pb2.DatasetFeatureStatisticsList,
    *,
    schema: schema_pb2.Schema,
    kind: str,
) -> Sequence[tuple[str, anomalies_pb2.DriftSkewInfo.Measurement]]:
    """Returns TFDV's Jensen-Shannon divergences above their limits, by feature."""
    side = {"serving_statistics": other} if kind == SKEW else {"previous_statistics": other}
    return [
        (info.path.step[0], measurement)
        for info in tfdv.validate_statistics(current, schema, **side).drift_skew_info
        for measurement in getattr(info, f"{kind}_measurements")
        if measurement.type == anomalies_pb2.DriftSkewInfo.Measurement.JENSEN_SHANNON_DIVERGENCE
        and measurement.value > measurement.threshold
    ]
