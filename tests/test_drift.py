import pyarrow
import pytest
import tensorflow_data_validation as tfdv
from tensorflow_data_validation.statistics import stats_impl
from tensorflow_metadata.proto.v0 import schema_pb2

from pipeline.drift import NUM_QUANTILES, find_differences, has_comparators, num_examples


def _statistics(**columns: list):
    batch = pyarrow.RecordBatch.from_pydict({name: [[value] for value in values] for name, values in columns.items()})
    options = tfdv.StatsOptions(num_quantiles_histogram_buckets=NUM_QUANTILES)
    return stats_impl.generate_statistics_in_memory(batch, options)


def _schema(limit: float = 0.0, **types: int) -> schema_pb2.Schema:
    schema = schema_pb2.Schema()
    for name, feature_type in types.items():
        feature = schema.feature.add(name=name, type=feature_type)
        feature.skew_comparator.infinity_norm.threshold = limit
        feature.drift_comparator.infinity_norm.threshold = limit
    return schema


def _differences(current, other, schema, kind: str = "skew") -> list[str]:
    return find_differences(current, other, schema=schema, kind=kind, names=("train", "test"))


def test_find_differences_of_text_names_the_value_and_both_shares():
    current = _statistics(label=[b"cat"] * 60 + [b"dog"] * 30 + [b"owl"] * 10)
    other = _statistics(label=[b"cat"] * 50 + [b"dog"] * 100 + [b"owl"] * 50)

    assert _differences(current, other, _schema(0.2, label=schema_pb2.BYTES)) == [
        "skew in `label`: 60.0% of train and 25.0% of test are 'cat'; the difference is 0.350, the limit 0.2"
    ]


def test_find_differences_counts_a_value_that_one_side_lacks():
    current, other = _statistics(label=[b"cat"] * 100), _statistics(label=[b"cat"] * 70 + [b"dog"] * 30)

    (sentence,) = _differences(current, other, _schema(0.2, label=schema_pb2.BYTES))

    assert "the difference is 0.300" in sentence


def test_find_differences_of_numbers_names_the_value_below_which_they_differ():
    current = _statistics(height=[100] * 80 + [400] * 20)
    other = _statistics(height=[100] * 20 + [400] * 80)

    assert _differences(current, other, _schema(0.3, height=schema_pb2.INT), "drift") == [
        "drift in `height`: 80.0% of train and 20.0% of test are at most 100; the difference is 0.600, the limit 0.3"
    ]


@pytest.mark.parametrize(("shift", "distance"), [(0, 0.0), (50, 0.25), (100, 0.5), (200, 1.0), (300, 1.0)])
def test_find_differences_of_numbers_is_the_kolmogorov_smirnov_distance(shift, distance):
    """Of two uniform distributions of width 200: their shift over the width."""
    current, other = (_statistics(height=[offset + value / 10 for value in range(2000)]) for offset in (0, shift))

    found = _differences(current, other, _schema(0.02, height=schema_pb2.FLOAT))

    assert [float(sentence.split("difference is ")[1].split(",")[0]) for sentence in found] == (
        [pytest.approx(distance, abs=0.02)] if distance else []
    )


@pytest.mark.parametrize("num_odd", [0, 1, 10])
def test_find_differences_takes_a_few_odd_images_for_a_few(num_odd):
    """TFDV's Jensen-Shannon divergence is 1.0 from the first of them on."""
    current = _statistics(channels=[3] * 1000, height=[300] * 1000)
    other = _statistics(channels=[1] * num_odd + [3] * (1000 - num_odd), height=[4000] * num_odd + [300] * (1000 - num_odd))

    schema = _schema(0.02, channels=schema_pb2.INT, height=schema_pb2.INT)
    assert _differences(current, other, schema) == _differences(other, current, schema) == []


def test_find_differences_of_a_column_of_many_values_is_low():
    current, other = (_statistics(camera=[b"%d" % value for value in range(start, start + 400)]) for start in (0, 400))

    assert _differences(current, other, _schema(0.01, camera=schema_pb2.BYTES)) == []


def test_find_differences_goes_by_the_comparator_of_its_kind():
    current, other = _statistics(label=[b"cat"] * 100), _statistics(label=[b"dog"] * 100)
    schema = _schema(label=schema_pb2.BYTES)
    schema.feature[0].ClearField("drift_comparator")

    assert len(_differences(current, other, schema, "skew")) == 1
    assert _differences(current, other, schema, "drift") == []
    assert has_comparators(schema, "skew")
    assert not has_comparators(schema, "drift")


@pytest.mark.parametrize("kind", ["skew", "drift"])
def test_find_differences_takes_the_jensen_shannon_divergence_of_a_schema_that_asks_for_it(kind):
    current, other = _statistics(label=[b"cat"] * 100), _statistics(label=[b"dog"] * 100)
    schema = schema_pb2.Schema()
    feature = schema.feature.add(name="label", type=schema_pb2.BYTES)
    getattr(feature, f"{kind}_comparator").jensen_shannon_divergence.threshold = 0.4

    assert _differences(current, other, schema, kind) == [
        f"{kind} in `label`: the Jensen-Shannon divergence between train and test is 1.000, the limit 0.4"
    ]
    getattr(feature, f"{kind}_comparator").jensen_shannon_divergence.threshold = 1.0
    assert _differences(current, other, schema, kind) == []


def test_find_differences_leaves_a_feature_that_one_side_lacks_to_the_schema():
    schema = _schema(label=schema_pb2.BYTES, height=schema_pb2.INT)

    assert _differences(_statistics(label=[b"cat"], height=[3]), _statistics(label=[b"cat"]), schema) == []
    assert _differences(_statistics(label=[b"cat"]), _statistics(label=[3]), schema) == []


def test_num_examples_counts_examples():
    assert num_examples(_statistics(label=[b"cat"] * 7)) == 7
