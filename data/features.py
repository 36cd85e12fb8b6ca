"""The contract of one example: feature keys, split names and the schema that every record obeys.

Everything that writes, checks, reads or slices examples takes its names from here. Imports nothing of ours.
"""

from collections.abc import Sequence

import tensorflow as tf
from tensorflow_metadata.proto.v0 import schema_pb2

IMAGE_KEY = "image"  # bytes: the encoded image, as the user gave it
LABEL_KEY = "label"  # string: a line of labels.txt
FILENAME_KEY = "filename"  # string: where the image came from
HEIGHT_KEY = "height"  # int64: pixels
WIDTH_KEY = "width"  # int64: pixels
# Cheap facts of the image, for statistics, drift and slices.
ASPECT_KEY = "aspect"  # float: width / height
BRIGHTNESS_KEY = "brightness"  # float: mean grey value, in [0, 1]
CHANNELS_KEY = "channels"  # int64: as decoded; 1 grey, 2 grey and alpha, 3 colour, 4 colour and alpha
FACT_KEYS = (HEIGHT_KEY, WIDTH_KEY, ASPECT_KEY, BRIGHTNESS_KEY, CHANNELS_KEY)
RECORD_KEYS = (IMAGE_KEY, LABEL_KEY, FILENAME_KEY, *FACT_KEYS)
# Made of the facts by the Evaluator, to slice by; no column may have their names either.
BRIGHTNESS_GROUP = "brightness_group"  # dark or normal
SIZE_GROUP = "size_group"  # small or normal
RESERVED_KEYS = (*RECORD_KEYS, BRIGHTNESS_GROUP, SIZE_GROUP)

TRAIN_SPLIT = "train"
VALID_SPLIT = "valid"
TEST_SPLIT = "test"
SPLITS = (TRAIN_SPLIT, VALID_SPLIT, TEST_SPLIT)

LABELS_FILE = "labels.txt"
REPORT_FILE = "report.json"  # of a finished preparation
SCHEMA_FOLDER = "schema"
SCHEMA_FILE = "schema.pbtxt"

# How far two splits, or new data and old, may differ before the data gate speaks; a generated schema carries them, for its user
# to edit. By chance alone, 100 images against 2,000 differed by up to 0.15 in a label of two equal classes and by up to 0.2 in
# a fact, and the splits of the default data and of the flowers by up to 0.07 in either. A fact that moves by one standard
# deviation differs by 0.38. A column of many values stays low, as each has a small share.
MAX_SHARE_DIFFERENCE = 0.2  # of any one label's, or column value's, share of the images
MAX_FACT_DIFFERENCE = 0.3  # of the share of the images whose fact is at most any one value (Kolmogorov-Smirnov)


def transformed_name(key: str) -> str:
    """Names a feature after Transform, with TFX's own suffix."""
    return f"{key}_xf"


def make_example(
    *,
    image: bytes,
    label: str,
    filename: str,
    height: int,
    width: int,
    brightness: float,
    channels: int,
    columns: dict[str, str],
) -> tf.train.Example:
    """Builds the record of one image.

    Args:
      image: the encoded bytes.
      label: the class, a line of labels.txt.
      filename: where the image came from.
      height: pixels.
      width: pixels.
      brightness: mean grey value, in [0, 1].
      channels: of the file, 1 to 4.
      columns: extra column -> value, one string feature each.
    """

    def bytes_feature(value: bytes) -> tf.train.Feature:
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    def int_feature(value: int) -> tf.train.Feature:
        return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))

    def float_feature(value: float) -> tf.train.Feature:
        return tf.train.Feature(float_list=tf.train.FloatList(value=[value]))

    features = {
        IMAGE_KEY: bytes_feature(image),
        LABEL_KEY: bytes_feature(label.encode()),
        FILENAME_KEY: bytes_feature(filename.encode("utf-8", "surrogateescape")),
        HEIGHT_KEY: int_feature(height),
        WIDTH_KEY: int_feature(width),
        ASPECT_KEY: float_feature(width / height),
        BRIGHTNESS_KEY: float_feature(brightness),
        CHANNELS_KEY: int_feature(channels),
    }
    features.update({name: bytes_feature(value.encode()) for name, value in columns.items()})
    return tf.train.Example(features=tf.train.Features(feature=features))


def make_schema(class_names: Sequence[str], columns: Sequence[str]) -> schema_pb2.Schema:
    """Builds the schema of the records: each feature present once, labels in their domain, sizes positive.

    It is generated once for the user to edit: domains, presence, ranges, and the comparators that limit skew between the
    splits and drift against earlier data.

    The comparators of numbers are infinity norms too, of the cumulative shares, and not TFDV's Jensen-Shannon divergence. That
    one compares histograms of ten equally wide buckets, and finds 1.0, wholly different, between 1,000 colour images and 999
    with a grey one: the values of sizes and channels are few and far apart.

    Args:
      class_names: the lines of labels.txt, in order.
      columns: names of the extra columns.
    """
    schema = schema_pb2.Schema()
    # Every feature is a scalar, dense [batch] in every reader.
    tensors = schema.tensor_representation_group[""].tensor_representation

    def add(name: str, feature_type: int, *, is_counted: bool = True) -> schema_pb2.Feature:
        feature = schema.feature.add(name=name, type=feature_type)
        feature.value_count.min = feature.value_count.max = 1
        if is_counted:
            feature.presence.min_fraction = 1.0
            feature.presence.min_count = 1
            limit = MAX_FACT_DIFFERENCE if name in FACT_KEYS else MAX_SHARE_DIFFERENCE
            feature.skew_comparator.infinity_norm.threshold = limit
            feature.drift_comparator.infinity_norm.threshold = limit
        tensors[name].dense_tensor.column_name = name
        tensors[name].dense_tensor.shape.SetInParent()
        return feature

    # Statistics leave the bytes and the names out, and would miss them otherwise.
    add(IMAGE_KEY, schema_pb2.BYTES, is_counted=False)
    add(FILENAME_KEY, schema_pb2.BYTES, is_counted=False)
    add(LABEL_KEY, schema_pb2.BYTES).string_domain.value.extend(class_names)
    add(HEIGHT_KEY, schema_pb2.INT).int_domain.min = 1
    add(WIDTH_KEY, schema_pb2.INT).int_domain.min = 1
    add(ASPECT_KEY, schema_pb2.FLOAT).float_domain.min = 0
    brightness = add(BRIGHTNESS_KEY, schema_pb2.FLOAT).float_domain
    brightness.min, brightness.max = 0, 1
    channels = add(CHANNELS_KEY, schema_pb2.INT).int_domain
    channels.min, channels.max = 1, 4
    for name in columns:
        add(name, schema_pb2.BYTES)
    return schema


def feature_spec(columns: Sequence[str] = ()) -> dict[str, tf.io.FixedLenFeature]:
    """Returns the parsing specification of a record, for `tf.io.parse_example`: scalars, dense [batch]."""
    spec = {
        IMAGE_KEY: tf.io.FixedLenFeature([], tf.string),
        LABEL_KEY: tf.io.FixedLenFeature([], tf.string),
        FILENAME_KEY: tf.io.FixedLenFeature([], tf.string),
        HEIGHT_KEY: tf.io.FixedLenFeature([], tf.int64),
        WIDTH_KEY: tf.io.FixedLenFeature([], tf.int64),
        ASPECT_KEY: tf.io.FixedLenFeature([], tf.float32),
        BRIGHTNESS_KEY: tf.io.FixedLenFeature([], tf.float32),
        CHANNELS_KEY: tf.io.FixedLenFeature([], tf.int64),
    }
    return spec | {name: tf.io.FixedLenFeature([], tf.string) for name in columns}
