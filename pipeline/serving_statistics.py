"""What a model in use is asked, as statistics like those of its training data, and what has moved between the two.

A row of facts and a predicted label for each image becomes a TFDV statistics file with the same features, options and quantiles
as StatisticsGen's. `find_drift` holds it against the training split's by the schema's drift comparators. Called by
`pipeline.batch` and `pipeline.predict`.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
import pyarrow
import tensorflow as tf
import tensorflow_data_validation as tfdv
from apache_beam.options.pipeline_options import PipelineOptions
from google.protobuf import text_format
from google.protobuf.message import DecodeError
from tensorflow_metadata.proto.v0 import schema_pb2, statistics_pb2

from data.errors import InputError
from data.features import (
    ASPECT_KEY,
    BRIGHTNESS_KEY,
    CHANNELS_KEY,
    FACT_KEYS,
    HEIGHT_KEY,
    LABEL_KEY,
    SCHEMA_FILE,
    SCHEMA_FOLDER,
    TRAIN_SPLIT,
    WIDTH_KEY,
    make_schema,
)
from pipeline.answers import FACTS
from pipeline.drift import DRIFT, NUM_QUANTILES, find_differences, num_examples

STATISTICS_FILE = "FeatureStats.pb"  # as TFX names it
MIN_IMAGES = 100  # below which chance alone moves shares by more than the schema's default limits
_ROWS_AT_ONCE = 4_096
_TYPES = {
    HEIGHT_KEY: pyarrow.int64(),
    WIDTH_KEY: pyarrow.int64(),
    ASPECT_KEY: pyarrow.float32(),
    BRIGHTNESS_KEY: pyarrow.float32(),
    CHANNELS_KEY: pyarrow.int64(),
}


def write_statistics(rows_paths: Sequence[str], output: str, *, beam_args: Sequence[str] = ()) -> None:
    """Computes the statistics of the facts and predicted labels of rows, and writes them whole.

    Args:
      rows_paths: files of JSON lines, each with `label` and `facts`; rows with `error` do not count.
      output: file to write, a serialized DatasetFeatureStatisticsList; local or gs://.
      beam_args: options of Beam.
    """
    temporary = f"{output}.tmp"
    options = PipelineOptions(list(beam_args) or ["--runner=FnApiRunner"], save_main_session=False)
    with beam.Pipeline(options=options) as pipeline:
        _ = (
            pipeline
            | "List answers" >> beam.Create(rows_paths)
            | "Spread over workers" >> beam.Reshuffle()
            | "Read facts" >> beam.FlatMap(_read_batches)
            | "Compute statistics" >> tfdv.GenerateStatistics(_options())
            | "Write statistics" >> beam.Map(_write, temporary)
        )
    tf.io.gfile.rename(temporary, output, overwrite=True)


def _options() -> tfdv.StatsOptions:
    """Returns the options of StatisticsGen in `pipeline.pipeline`; the extra columns of training are unknown in use."""
    return tfdv.StatsOptions(feature_allowlist=[LABEL_KEY, *FACT_KEYS], num_quantiles_histogram_buckets=NUM_QUANTILES)


def _write(statistics: statistics_pb2.DatasetFeatureStatisticsList, path: str) -> None:
    with tf.io.gfile.GFile(path, "wb") as file:
        file.write(statistics.SerializeToString())


def _read_batches(path: str) -> Iterator[pyarrow.RecordBatch]:
    """Yields the rows of a file as TFDV takes them: a list of one value for each feature of each example."""
    rows: list[dict[str, Any]] = []
    with tf.io.gfile.GFile(path) as file:
        for line in file:
            row = json.loads(line)
            if "error" not in row:
                rows.append(row)
            if len(rows) == _ROWS_AT_ONCE:
                yield _record_batch(rows)
                rows = []
    if rows:
        yield _record_batch(rows)


def _record_batch(rows: Sequence[dict[str, Any]]) -> pyarrow.RecordBatch:
    columns = {
        key: pyarrow.array([[row[FACTS][key]] for row in rows], pyarrow.list_(value_type)) for key, value_type in _TYPES.items()
    }
    columns[LABEL_KEY] = pyarrow.array([[row[LABEL_KEY].encode()] for row in rows], pyarrow.list_(pyarrow.binary()))
    return pyarrow.RecordBatch.from_pydict(columns)


def find_training_statistics(path: str) -> str:
    """Finds the statistics file of the training split.

    Args:
      path: the file itself, its folder, the `statistics` artifact above that, or a run's workspace, of which the newest count.

    Raises:
      InputError: if there is none.
    """
    path = path.rstrip("/")
    split = f"Split-{TRAIN_SPLIT}"
    artifacts = f"{path}/pipeline/StatisticsGen/statistics"
    numbers = [name.rstrip("/") for name in tf.io.gfile.listdir(artifacts)] if tf.io.gfile.isdir(artifacts) else []
    newest = sorted((name for name in numbers if name.isdecimal()), key=int, reverse=True)
    folders = [path, f"{path}/{split}", *(f"{artifacts}/{number}/{split}" for number in newest)]
    for candidate in (path, *(f"{folder}/{STATISTICS_FILE}" for folder in folders)):
        if tf.io.gfile.exists(candidate) and not tf.io.gfile.isdir(candidate):
            return candidate
    raise InputError(
        f"Expected --statistics to be a statistics file, its folder, or a run's workspace. Received: {path!r}, without "
        f"{STATISTICS_FILE}. Give runs/<pipeline name>, or <pipeline root>/StatisticsGen/statistics/<number>."
    )


def find_schema(path: str, statistics: statistics_pb2.DatasetFeatureStatisticsList, statistics_path: str) -> schema_pb2.Schema:
    """Reads the schema whose comparators limit drift: the given one, the workspace's, or the one that would be generated.

    Args:
      path: of a schema in text form; empty for one of the two others.
      statistics: of training.
      statistics_path: what the user gave for them, perhaps a workspace.

    Raises:
      InputError: if it cannot be read.
    """
    beside = os.path.join(statistics_path, "tfrecords", SCHEMA_FOLDER, SCHEMA_FILE)
    path = path or (beside if tf.io.gfile.exists(beside) else "")
    if not path:
        return make_schema(_labels(statistics), ())
    try:
        with tf.io.gfile.GFile(path) as file:
            return text_format.Parse(file.read(), schema_pb2.Schema())
    except (tf.errors.OpError, text_format.ParseError, UnicodeDecodeError) as error:
        reason = (error.message if isinstance(error, tf.errors.OpError) else str(error)).split("\n")[0]
        raise InputError(f"Expected a schema in text form. Received: {path!r}: {reason}. Name schema.pbtxt.") from error


def read_statistics(path: str) -> statistics_pb2.DatasetFeatureStatisticsList:
    """Reads a statistics file.

    Args:
      path: of a serialized DatasetFeatureStatisticsList.

    Raises:
      InputError: if it is none, or of no example.
    """
    statistics = statistics_pb2.DatasetFeatureStatisticsList()
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            statistics.ParseFromString(file.read())
    except (tf.errors.OpError, DecodeError) as error:
        reason = error.message if isinstance(error, tf.errors.OpError) else "it is no serialized statistics"
        raise InputError(f"Expected a statistics file. Received: {path!r}: {reason}. Name another one.") from error
    if not statistics.datasets or not num_examples(statistics):
        raise InputError(f"Expected statistics of one example at least. Received: {path!r}, of none. Predict images first.")
    return statistics


def read_serving(path: str) -> statistics_pb2.DatasetFeatureStatisticsList:
    """Reads what images in use were: a statistics file, or the rows of `models.server --facts`, of which it makes statistics.

    Args:
      path: of either; local or gs://. The content tells which it is.

    Raises:
      InputError: if it is none, or of no example; names the first line that is no row.
    """
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            is_rows = file.read(1) == b"{"
    except tf.errors.OpError:
        is_rows = False  # `read_statistics` says what is wrong
    if not is_rows:
        return read_statistics(path)
    _check_rows(path)
    with tempfile.TemporaryDirectory(prefix="serving_statistics_") as folder:
        output = os.path.join(folder, STATISTICS_FILE)
        write_statistics([path], output)
        return read_statistics(output)


def _check_rows(path: str) -> None:
    """Looks at each row before Beam does, whose errors name neither the file nor the line."""
    num_images = 0
    with tf.io.gfile.GFile(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                is_image = "error" not in row
                reason = _wrong_in(row) if is_image else ""
                num_images += is_image
            except KeyError as error:
                reason = f"without {error}"
            except (ValueError, TypeError, RecursionError):
                reason = "no JSON object of them"
            if reason:
                raise InputError(
                    f"Expected `{LABEL_KEY}` and `{FACTS}` in each line. Received: {path!r}, line {number}: {reason}. Name the "
                    "file of `models.server --facts`, or of `batch --statistics-output`."
                )
    if not num_images:
        raise InputError(f"Expected a row of one image at least. Received: {path!r}, of none. Predict images first.")


def _wrong_in(row: dict[str, Any]) -> str:
    """Says in a clause why a row cannot be used; empty where it can."""
    for key, value_type in _TYPES.items():
        value = row[FACTS][key]
        if type(value) is not int and not (type(value) is float and value_type == pyarrow.float32()):
            return f"{key}={value!r}"
    return "" if isinstance(row[LABEL_KEY], str) else f"{LABEL_KEY}={row[LABEL_KEY]!r}"


def find_drift(
    serving: statistics_pb2.DatasetFeatureStatisticsList,
    training: statistics_pb2.DatasetFeatureStatisticsList,
    schema: schema_pb2.Schema,
) -> tuple[list[str], list[str]]:
    """Compares what a model was asked in use with what it learned from.

    Args:
      serving: statistics of the images in use, with the predicted label.
      training: statistics of the training split, with the true label.
      schema: whose drift comparators are the limits.

    Returns:
      A sentence for each feature that has moved too far; and what a person should know before trusting the comparison.
    """
    findings = find_differences(serving, training, schema=schema, kind=DRIFT, names=("the images in use", "the training data"))
    # The label in use is the model's answer.
    findings = [re.sub(rf"^drift in `{LABEL_KEY}`", "drift in the predicted label", finding) for finding in findings]
    notes = []
    if num_examples(serving) < MIN_IMAGES:
        notes.append(f"{num_examples(serving)} images are few: below {MIN_IMAGES}, chance alone can look like drift.")
    in_use, trained = (_features(side) for side in (serving, training))
    if missing := sorted({feature.name for feature in schema.feature} & trained - in_use):
        notes.append(f"Not compared, as images in use have no such column: {', '.join(missing)}.")
    if not any(feature.HasField("drift_comparator") for feature in schema.feature):
        notes.append("Nothing was compared: the schema has no drift comparator.")
    return findings, notes


def _features(statistics: statistics_pb2.DatasetFeatureStatisticsList) -> set[str]:
    return {feature.path.step[0] for feature in statistics.datasets[0].features}


def _labels(statistics: statistics_pb2.DatasetFeatureStatisticsList) -> list[str]:
    for feature in statistics.datasets[0].features:
        if feature.path.step[0] == LABEL_KEY:
            return [bucket.label for bucket in feature.string_stats.rank_histogram.buckets]
    return []
