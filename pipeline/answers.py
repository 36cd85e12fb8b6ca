"""A row for each image, the same from a server, a batch and a stream, and how it is written: JSON lines, BigQuery.

A row has `file` and either `label`, `probability` and `probabilities` {class: probability}, or `error`, a clause. Called by
everything that predicts.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]

FACTS = "facts"  # what the statistics of images in use are made of; on the way only, in no output
BIGQUERY = "bigquery:"
BIGQUERY_SCHEMA = {
    "fields": [
        {"name": "file", "type": "STRING", "mode": "REQUIRED"},
        {"name": "label", "type": "STRING", "mode": "NULLABLE"},
        {"name": "probability", "type": "FLOAT", "mode": "NULLABLE"},
        {
            "name": "probabilities",
            "type": "RECORD",
            "mode": "REPEATED",
            "fields": [
                {"name": "label", "type": "STRING", "mode": "NULLABLE"},
                {"name": "probability", "type": "FLOAT", "mode": "NULLABLE"},
            ],
        },
        {"name": "error", "type": "STRING", "mode": "NULLABLE"},
    ]
}


def make_answer(label: str, probability: float, labels: Sequence[str], probabilities: Sequence[float]) -> Row:
    """Makes the answer for an image out of the model's or a server's outputs.

    Args:
      label: of the most probable class.
      probability: of that class, in [0, 1].
      labels: every class, in the model's order.
      probabilities: of every class, in [0, 1].

    Raises:
      ValueError: if there are not as many labels as probabilities.
    """
    return {
        "label": label,
        "probability": _shortest(probability),
        "probabilities": {name: _shortest(value) for name, value in zip(labels, probabilities, strict=True)},
    }


def without_facts(row: Row) -> Row:
    """Returns the row as a user sees it."""
    return {name: value for name, value in row.items() if name != FACTS}


def to_json_line(row: Row) -> str:
    """Returns a row as a line of JSON; a byte of a name that is not UTF-8 becomes its escape."""
    return printable(json.dumps(row, ensure_ascii=False)) + "\n"


def printable(text: str) -> str:
    """Returns text with escapes for what is not UTF-8, as a file's name may be."""
    return text.encode("utf-8", "backslashreplace").decode()


def bigquery_table(output: str) -> str:
    """Returns `project:dataset.table`, as Beam has it, of `bigquery:project.dataset.table`."""
    return output.removeprefix(BIGQUERY).replace(".", ":", 1)


def bigquery_row(row: Row) -> Row:
    """Turns a row into one for `BIGQUERY_SCHEMA`, whose columns cannot have the names of classes."""
    pairs = [{"label": name, "probability": value} for name, value in row.get("probabilities", {}).items()]
    return without_facts(row) | {"file": printable(row["file"]), "probabilities": pairs}


def _shortest(value: float) -> float:
    """Returns a float32 as the float with the fewest digits that is the same float32."""
    return float(str(np.float32(value)))
