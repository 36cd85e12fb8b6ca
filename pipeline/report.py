"""The HTML report: one self-contained file that a person opens after a run.

Called by `local_runner.py`.
"""

import datetime
import importlib.metadata
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from data.features import SPLITS
from models.curves import draw_curves
from pipeline.config import Config

_TEMPLATE = Path(__file__).with_name("report.html.j2")
_VERSIONS = ("tfx", "tensorflow", "keras", "apache-beam", "tensorflow-transform", "tensorflow-model-analysis")
_MAX_CELLS_WITH_NUMBERS = 15  # classes; numbers in more cells than their square cannot be read


def write_report(path: Path, run: dict[str, Any], history: dict[str, list], config: Config) -> None:
    """Writes the report of a finished run.

    Args:
      path: of the HTML file; written whole or not at all.
      run: what `run.json` holds.
      history: what the trainer left in `history.json`.
      config: every setting.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    html = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        run=run,
        config=config,
        splits=SPLITS,
        date=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        confusion=_confusion_matrix(run["metrics"]["confusion_matrix"], list(run["metrics"]["classes"])),
        curves=_svg(draw_curves(history)),
        settings=json.dumps(config.model_dump(mode="json"), indent=2),
        versions={name: importlib.metadata.version(name) for name in _VERSIONS},
    )
    temporary = path.with_suffix(".tmp")
    temporary.write_text(html, encoding="utf-8")
    temporary.replace(path)


def _confusion_matrix(counts: Sequence[Sequence[int]], class_names: Sequence[str]) -> str:
    matrix = np.asarray(counts)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(class_names))
    class_names = [name.replace("$", r"\$") for name in class_names]  # no mathematics in a class's name
    axes.set_xticks(ticks, class_names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, class_names)
    axes.set(xlabel="predicted", ylabel="true", title="Confusion matrix")
    if len(class_names) <= _MAX_CELLS_WITH_NUMBERS:
        for row in ticks:
            for column in ticks:
                color = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(matrix[row, column]), ha="center", va="center", color=color)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    with matplotlib.rc_context({"svg.fonttype": "path"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]
