"""The HTML report: one self-contained file that a person opens after a run, and shows to colleagues.

    python -m pipeline.report --history --workspace runs/elpv        # the runs of a workspace
    python -m pipeline.report --lineage runs/elpv/serving_model/17   # where a model comes from

Ten seconds, nearly all of them imports. Called by `local_runner.py`. Everything that comes from the user's data is hostile
text: it is escaped where it is written.
"""

import logging
import os
import warnings

if __name__ == "__main__":  # before the libraries below speak on the terminal
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger().addHandler(logging.NullHandler())

import datetime
import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import markupsafe
import numpy as np

from data.features import SPLITS, TRAIN_SPLIT
from data.report import make_visible
from pipeline.config import Config
from pipeline.mistakes import MAX_SHEETS, illustrate_classes, illustrate_mistakes
from pipeline.plots import plot_calibration, plot_confusion_matrix, plot_curves

_TEMPLATE = Path(__file__).with_name("report.html.j2")
_VERSIONS = ("tfx", "tensorflow", "keras", "apache-beam", "tensorflow-transform", "tensorflow-model-analysis")
# Longer tables are folded, and their worst rows stand alone.
_MAX_OPEN_ROWS = 20
_NUM_WORST_ROWS = 10
_MAX_ROWS = 1_000  # of one table; together with the pictures they keep the page under 3 MB
_NUM_CONFUSIONS = 15
_MAX_NAME = 80  # characters

_NAMES = {
    "macro_precision": "macro precision",
    "macro_recall": "macro recall",
    "macro_f1": "macro F1",
    "f1": "F1",
    "roc_auc": "ROC-AUC",
    "pr_auc": "PR-AUC",
    "log_loss": "log loss",
    "expected_calibration_error": "expected calibration error",
    "example_count": "test images",
    "top_5_accuracy": "top-5 accuracy",
}
_EXAMPLE_COUNT = "example_count"
_LOWER_IS_BETTER = ("log_loss", "expected_calibration_error")
_CLASS_METRICS = ("precision", "recall", "f1", "roc_auc", "pr_auc")
_SLICE_METRICS = ("accuracy", "macro_f1", "log_loss", "expected_calibration_error")


class _Table(NamedTuple):
    """Rows of metrics: all of them (up to a limit), and the worst ones where all are too many to be read at once."""

    metrics: Sequence[str]
    rows: dict[str, dict[str, float]]
    worst: dict[str, dict[str, float]]
    num_rows: int


class _Change(NamedTuple):
    """One row of the comparison with the latest blessed model."""

    metric: str
    now: float | None
    before: float | None
    change: float | None
    interval: Sequence[float] | None
    words: str


def write_report(
    path: Path,
    run: Mapping[str, Any],
    history: Mapping[str, Sequence[Any]],
    config: Config,
    *,
    records: str | None = None,
    model: str | None = None,
) -> None:
    """Writes the report of a finished run.

    Args:
      path: of the HTML file; written whole or not at all.
      run: what `run.json` holds.
      history: what the trainer left in `history.json`.
      config: every setting.
      records: folder of the prepared records, for the pictures; none are shown without it.
      model: folder of the candidate's SavedModel, for the heat maps. It may be of any quality: what cannot be loaded or
        explained is said on the page.
    """
    metrics = run["metrics"]
    class_names = list(metrics["classes"])
    mistakes, heat_map_problem = illustrate_mistakes(metrics.get("mistakes", ()), class_names, records=records, model=model)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=make_visible
    )
    environment.filters.update(
        decimal=_decimal,
        quantity=_quantity,
        signed=_signed,
        shorten=_shorten,
        metric=lambda name: _NAMES.get(name, name.replace("_", " ")),
    )
    html = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        run=run,
        metrics=metrics,
        class_names=class_names,
        config=config,
        date=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        intervals={"overall": {}, "classes": {}, "slices": {}} | (metrics.get("intervals") or {}),
        baseline=metrics.get("baseline"),
        changes=_changes(metrics),
        class_changes=_class_changes(metrics),
        counts=_class_counts(run["counts"], class_names),
        splits=[split for split in SPLITS if split in run["counts"]],
        sheets=illustrate_classes(records, run["counts"].get(TRAIN_SPLIT, {})),
        max_sheets=MAX_SHEETS,
        max_rows=_MAX_ROWS,
        curves=plot_curves(history) if history else None,
        confusion=plot_confusion_matrix(metrics["confusion_matrix"], class_names),
        confusions=_confusions(metrics["confusion_matrix"], class_names),
        classes=_table(metrics["classes"], _CLASS_METRICS, worst_by="f1"),
        slices=_table(metrics["slices"], _SLICE_METRICS, worst_by="accuracy"),
        calibration=plot_calibration(metrics["calibration"]) if metrics.get("calibration") else None,
        num_mistakes=_num_mistakes(metrics["confusion_matrix"]),
        mistakes=mistakes,
        heat_map_problem=heat_map_problem,
        check=run.get("serving_check"),
        components=[component for component in run["components"] if component["name"] != "Report"],
        fingerprints=run.get("fingerprints") or {},
        settings=markupsafe.escape(json.dumps(config.model_dump(mode="json"), indent=2)),  # not shortened, as other text is
        versions={"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _VERSIONS},
    )
    temporary = path.with_suffix(".tmp")
    temporary.write_text(html, encoding="utf-8")
    temporary.replace(path)


def _table(rows: Mapping[str, dict[str, float]], metrics: Sequence[str], *, worst_by: str) -> _Table:
    """Chooses the columns that some row has, and the rows to show first; a value that is no number is the worst."""

    def badness(name: str) -> float:
        value = rows[name].get(worst_by)
        return -math.inf if value is None or math.isnan(value) else value

    worst = sorted(rows, key=badness)[:_NUM_WORST_ROWS] if len(rows) > _MAX_OPEN_ROWS else ()
    return _Table(
        metrics=[metric for metric in metrics if any(metric in row for row in rows.values())],
        rows=dict(list(rows.items())[:_MAX_ROWS]),
        worst={name: rows[name] for name in worst},
        num_rows=len(rows),
    )


def _changes(metrics: Mapping[str, Any]) -> list[_Change]:
    """Lines up every metric of both models, in the order of the candidate's."""
    baseline = metrics.get("baseline")
    if not baseline or baseline.get("problem"):
        return []
    now, before = metrics["overall"], baseline.get("overall") or {}
    rows = []
    for metric in now:
        if metric == _EXAMPLE_COUNT or metric not in before:
            continue
        found = (baseline.get("changes") or {}).get(metric) or {}
        change, interval = found.get("change"), found.get("interval")
        if change is None and None not in (now[metric], before[metric]):
            change = now[metric] - before[metric]
        words = _in_words(change, interval, lower_is_better=metric in _LOWER_IS_BETTER)
        rows.append(_Change(metric, now[metric], before[metric], change, interval, words))
    return rows


def _in_words(change: float | None, interval: Sequence[float] | None, *, lower_is_better: bool) -> str:
    if change is None or math.isnan(change):
        return "not a number"
    if not _is_interval(interval):
        return "no interval"
    low, high = interval
    if low <= 0 <= high:
        return "within the noise"
    return "better" if (change < 0) == lower_is_better else "worse"


def _is_interval(interval: Sequence[float | None] | None) -> bool:
    return bool(interval) and all(bound is not None and math.isfinite(bound) for bound in interval)


def _class_changes(metrics: Mapping[str, Any]) -> dict[str, tuple[dict[str, float], dict[str, float]]]:
    """Pairs the metrics of each class that both models have: class -> (now, before)."""
    before = (metrics.get("baseline") or {}).get("classes") or {}
    return {name: (now, before[name]) for name, now in list(metrics["classes"].items())[:_MAX_ROWS] if name in before}


def _class_counts(counts: Mapping[str, Any], class_names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Turns the counts of splits and classes round: class -> split -> number of images, and `all`."""
    by_class = {}
    for name in class_names:
        row = {split: counts[split].get(name, 0) for split in SPLITS if split in counts}
        by_class[name] = row | {"all": sum(row.values())}
    return by_class


def _confusions(counts: Sequence[Sequence[int]], class_names: Sequence[str]) -> list[tuple[str, str, int, int]]:
    """Finds the most frequent mistakes: true class, predicted class, images, all images of the true class."""
    matrix = np.array(counts, int)
    totals = matrix.sum(axis=1)
    np.fill_diagonal(matrix, 0)
    order = np.argsort(-matrix, axis=None, kind="stable")[:_NUM_CONFUSIONS]
    cells = (np.unravel_index(index, matrix.shape) for index in order)
    return [
        (class_names[row], class_names[column], int(matrix[row, column]), int(totals[row]))
        for row, column in cells
        if matrix[row, column]
    ]


def _num_mistakes(counts: Sequence[Sequence[int]]) -> int:
    matrix = np.asarray(counts, int)
    return int(matrix.sum() - matrix.trace())


def _shorten(name: str) -> str:
    """Cuts the middle out of a long name, such as a path; its end tells most."""
    return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME // 2]}…{name[-_MAX_NAME // 2 :]}"


def _decimal(value: float | None, interval: Sequence[float] | None = None, digits: int = 3) -> str | markupsafe.Markup:
    """Writes a metric, with its interval behind it."""
    text = _quantity(value, digits)
    if not _is_interval(interval):
        return text
    low, high = (f"{bound:.{digits}f}".replace("-", "−") for bound in interval)
    return markupsafe.Markup('{}<span class="interval"> {} to {}</span>').format(text, low, high)


def _quantity(value: float | None, digits: int = 0) -> str:
    if value is None:
        return "not measured"
    if math.isnan(value):
        return "not a number"
    return f"{value:,.{digits}f}" if math.isfinite(value) else "infinite"


def _signed(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return _quantity(value)
    return f"{value:+.3f}".replace("-", "−")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `--history` or `--lineage` of `pipeline.history`; returns its exit code."""
    from pipeline import history  # for the command only: it reads the metadata store, which a report does not

    return history.main(argv)


if __name__ == "__main__":
    raise SystemExit(main())
