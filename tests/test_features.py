import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import text_format
from tensorflow_metadata.proto.v0 import schema_pb2

from data.features import FACT_KEYS, RECORD_KEYS, SPLITS, feature_spec, make_example, make_schema, transformed_name


def _example(**changes):
    settings = {
        "image": b"\x89PNG\xff",
        "label": "cät",
        "filename": "a, b/ü.png",
        "height": 3,
        "width": 5,
        "brightness": 0.25,
        "channels": 3,
        "columns": {"camera": "left"},
    }
    return make_example(**settings | changes)


def test_names_are_those_of_the_contract():
    assert RECORD_KEYS == ("image", "label", "filename", "height", "width", "aspect", "brightness", "channels")
    assert SPLITS == ("train", "valid", "test")
    assert transformed_name("label") == "label_xf"


def test_make_example_is_read_back_by_feature_spec():
    serialized = _example().SerializeToString()

    parsed = tf.io.parse_single_example(serialized, feature_spec(["camera"]))

    assert {key: value.numpy() for key, value in parsed.items()} == {
        "image": b"\x89PNG\xff",
        "label": "cät".encode(),
        "filename": "a, b/ü.png".encode(),
        "height": 3,
        "width": 5,
        "aspect": np.float32(5 / 3),
        "brightness": 0.25,
        "channels": 3,
        "camera": b"left",
    }
    assert parsed["height"].dtype == tf.int64
    assert all(value.shape == () for value in parsed.values())


def test_feature_spec_makes_a_dense_batch_in_tf_data():
    serialized = [_example(height=height).SerializeToString() for height in (1, 2, 3)]
    dataset = tf.data.Dataset.from_tensor_slices(serialized).batch(3)

    batch = next(iter(dataset.map(lambda records: tf.io.parse_example(records, feature_spec(["camera"])))))

    np.testing.assert_array_equal(batch["height"], [1, 2, 3])
    assert batch["camera"].shape == (3,)


def test_feature_spec_refuses_a_record_without_its_column():
    with pytest.raises(tf.errors.InvalidArgumentError, match="camera"):
        tf.io.parse_single_example(_example(columns={}).SerializeToString(), feature_spec(["camera"]))


def test_make_example_keeps_a_file_name_that_is_no_utf8():
    example = _example(filename=b"\xff.png".decode("utf-8", "surrogateescape"))

    assert example.features.feature["filename"].bytes_list.value[0] == b"\xff.png"


def test_make_schema_survives_its_text_form():
    schema = make_schema(["b", "a"], ["camera"])

    assert text_format.Parse(str(schema), schema_pb2.Schema()) == schema


def test_make_schema_describes_each_feature_of_a_record():
    schema = make_schema(["b", "a"], ["camera"])

    features = {feature.name: feature for feature in schema.feature}
    assert set(features) == {*RECORD_KEYS, "camera"}
    assert list(features["label"].string_domain.value) == ["b", "a"]
    assert features["height"].int_domain.min == features["width"].int_domain.min == 1
    assert features["height"].type == schema_pb2.INT
    assert features["camera"].type == schema_pb2.BYTES
    assert all((f.value_count.min, f.value_count.max) == (1, 1) for f in features.values())


def test_make_schema_demands_only_the_features_that_have_statistics():
    features = {feature.name: feature for feature in make_schema(["a", "b"], ["camera"]).feature}

    required = {name for name, feature in features.items() if feature.presence.min_count}
    assert required == {"label", *FACT_KEYS, "camera"}
    assert all(features[name].presence.min_fraction == 1.0 for name in required)


def test_make_schema_limits_skew_and_drift_of_every_feature_that_has_statistics():
    features = {feature.name: feature for feature in make_schema(["a", "b"], ["camera"]).feature}

    for comparator in ("skew_comparator", "drift_comparator"):
        limits = {
            name: getattr(feature, comparator).infinity_norm.threshold
            for name, feature in features.items()
            if feature.HasField(comparator)
        }
        assert limits == {"label": 0.2, "camera": 0.2} | dict.fromkeys(FACT_KEYS, 0.3)


def test_make_schema_makes_every_feature_a_dense_scalar():
    schema = make_schema(["a", "b"], ["camera"])

    tensors = schema.tensor_representation_group[""].tensor_representation
    assert set(tensors) == {feature.name for feature in schema.feature}
    for name, tensor in tensors.items():
        assert tensor.dense_tensor.column_name == name
        assert tensor.dense_tensor.HasField("shape")
        assert len(tensor.dense_tensor.shape.dim) == 0


def test_make_schema_finds_what_does_not_obey_it():
    import tensorflow_data_validation as tfdv

    schema = make_schema(["a", "b"], ["camera"])
    options = tfdv.StatsOptions(feature_allowlist=["label", *FACT_KEYS, "camera"])

    def anomalies(label, height, brightness=0.5, channels=3):
        import pyarrow

        facts = {
            "height": [[height]],
            "width": [[5]],
            "aspect": [[1.5]],
            "brightness": [[brightness]],
            "channels": [[channels]],
        }
        batch = pyarrow.RecordBatch.from_pydict({"label": [[label]], "camera": [[b"left"]], **facts})
        from tensorflow_data_validation.statistics import stats_impl

        statistics = stats_impl.generate_statistics_in_memory(batch, options)
        return set(tfdv.validate_statistics(statistics, schema).anomaly_info)

    assert anomalies(b"a", 3) == set()
    assert anomalies(b"c", 3) == {"label"}
    assert anomalies(b"b", 0) == {"height"}
    assert anomalies(b"b", 3, brightness=1.5) == {"brightness"}
    assert anomalies(b"b", 3, channels=5) == {"channels"}
