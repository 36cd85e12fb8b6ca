"""The prepared data that a pipeline starts from, as far as the pipeline must know it before it runs.

Called by both runners.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from typing import Any

import tensorflow as tf
from google.protobuf import text_format
from tensorflow_metadata.proto.v0 import schema_pb2

from data.errors import InputError
from data.features import RECORD_KEYS, SCHEMA_FILE, SCHEMA_FOLDER
from data.prepare import MAX_COUNTED_VALUES, DataConfig, read_class_names


@dataclasses.dataclass(frozen=True)
class Records:
    """The prepared data that the pipeline starts from.

    Attributes:
      folder: that `data.prepare` wrote; local or gs://.
      class_names: the ordered class list.
      columns: extra columns to slice by.
      schema_fingerprint: changes with the schema file, so that another one is imported anew; empty where it cannot be read.
    """

    folder: str
    class_names: tuple[str, ...]
    columns: tuple[str, ...]
    schema_fingerprint: str


def read_records(folder: str, config: DataConfig) -> Records:
    """Reads what the pipeline must know of prepared records.

    Args:
      folder: that `data.prepare` wrote; local or gs://.
      config: which columns to slice by.

    Raises:
      InputError: if the records lack a column to slice by.
    """
    schema_path = os.path.join(folder, SCHEMA_FOLDER, SCHEMA_FILE)
    with tf.io.gfile.GFile(schema_path) as file:
        text = file.read()
    schema = text_format.Parse(text, schema_pb2.Schema())
    columns = tuple(feature.name for feature in schema.feature if feature.name not in RECORD_KEYS)
    if unknown := sorted(set(config.slice_columns or ()) - set(columns)):
        raise InputError(
            f"Expected `data.slice_columns` to name columns of the data ({', '.join(columns) or 'it has none'}). "
            f"Received: {', '.join(unknown)}."
        )
    return Records(
        folder=folder,
        class_names=read_class_names(folder),
        columns=columns if config.slice_columns is None else config.slice_columns,
        schema_fingerprint=hashlib.sha256(text.encode()).hexdigest()[:16],
    )


def small_slices(records: Records, report: Mapping[str, Any], *, min_examples: int) -> list[str]:
    """Says which columns, as one of dates or of serial numbers, make many slices that nobody can judge by.

    Args:
      records: which columns are sliced by.
      report: that `data.prepare` returned; empty where there is none.
      min_examples: images that a slice must have to be judged.

    Returns:
      A sentence for each such column.
    """
    counts = report.get("column_counts", {})
    return [
        f"{column} has {MAX_COUNTED_VALUES} values or more, some with too few images to judge by; data.slice_columns names the "
        "columns to slice by."
        for column in records.columns
        if len(counts.get(column, ())) == MAX_COUNTED_VALUES and min(counts[column].values()) < min_examples
    ]
