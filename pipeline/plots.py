"""The plots of the HTML report, as images that need nothing but the page.

Each is an SVG in a data URI: sharp in print, with a text alternative as any image, and cut off from the page, so that what is
drawn twice under one name, and a name that a user chose, can do no harm. Called by `pipeline.report`.
"""

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import markupsafe
import matplotlib
import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from data.report import make_visible
from models.curves import draw_curves

_PIXELS_PER_INCH = 96  # of CSS
_MAX_CELLS_WITH_NUMBERS = 15  # classes; numbers in more cells than their square cannot be read
_MAX_CLASSES_WITH_NAMES = 120
_MAX_NAME = 24  # characters
_MAX_INCHES = 9.6  # as wide as the page
# Text stays text: a browser has letters that matplotlib's font lacks, and draws them as small as they are.
_SVG = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.family": ["DejaVu Sans", "sans-serif"]}
_BLUE = "#0072B2"
_GREY = "0.35"


class Plot(NamedTuple):
    """An image for the page: its data URI, what it shows in words, and its size in CSS pixels."""

    uri: markupsafe.Markup
    alt: str
    width: int
    height: int


def plot_curves(history: Mapping[str, Sequence[Any]]) -> Plot:
    """Draws the training curves.

    Args:
      history: as for `models.curves.draw_curves`.
    """
    losses = np.asarray(history["val_loss"], float)
    best = f", lowest validation loss {np.nanmin(losses):.3f} after epoch {np.nanargmin(losses) + 1}"
    alt = f"Loss and accuracy of the train and valid splits over {len(losses)} epochs of training"
    return _plot(draw_curves(history), alt + (best if np.isfinite(losses).any() else ""))


def plot_confusion_matrix(counts: Sequence[Sequence[int]], class_names: Sequence[str]) -> Plot:
    """Draws the confusion matrix, each row shaded by its share of the row's class.

    Args:
      counts: int [num_classes, num_classes]; true classes are rows, predicted ones columns.
      class_names: in the same order.
    """
    matrix = np.asarray(counts, int)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    num_classes = len(class_names)
    side = float(np.clip(2.6 + 0.3 * num_classes, 3.6, _MAX_INCHES))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    has_numbers = num_classes <= _MAX_CELLS_WITH_NUMBERS
    # Without numbers, a share of some per cent has to be seen.
    axes.imshow(shares, cmap="Blues", norm=PowerNorm(1.0 if has_numbers else 0.5, vmin=0, vmax=1))
    if num_classes <= _MAX_CLASSES_WITH_NAMES:
        names = [_short(name) for name in class_names]
        # No mathematics in a class's name, whatever dollars it has.
        style = {"parse_math": False, "fontsize": float(np.clip(60 * side / num_classes, 5, 10))}
        axes.set_xticks(
            range(num_classes), names, rotation=45 if has_numbers else 90, ha="right", rotation_mode="anchor", **style
        )
        axes.set_yticks(range(num_classes), names, **style)
    axes.set(xlabel="predicted", ylabel="true")
    if has_numbers:
        for (row, column), count in np.ndenumerate(matrix):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=color)
    num_right, num_images = int(matrix.trace()), int(matrix.sum())
    return _plot(
        figure,
        f"Confusion matrix of {num_classes} classes: rows are true classes, columns predicted ones. "
        f"{num_right:,} of {num_images:,} test images are on the diagonal, classified rightly",
    )


def plot_calibration(bins: Sequence[Mapping[str, float]]) -> Plot:
    """Draws the reliability diagram, with the number of images in each bin below it.

    Args:
      bins: of the top probability, not empty: `confidence` (its mean) and `accuracy`, in [0, 1], and `count`.
    """
    confidence, accuracy, count = (np.asarray([one[key] for one in bins], float) for key in ("confidence", "accuracy", "count"))
    figure = Figure(figsize=(4.6, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    above.plot([0, 1], [0, 1], color=_GREY, linestyle=(0, (4, 1.5)), linewidth=1.2, label="as sure as right")
    above.plot(confidence, accuracy, color=_BLUE, marker="o", label="this model")
    above.set(ylabel="share that is right", ylim=(0, 1.02))
    above.legend(loc="lower right", framealpha=1, edgecolor="none", fontsize="small", handlelength=3)
    below.bar(confidence, count, width=0.03, color=_BLUE)
    lowest = float(confidence.min(initial=1.0))
    below.set(xlabel="probability of the predicted class", ylabel="images", xlim=(max(0.0, lowest - 0.06), 1.02))
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    gap = accuracy - confidence
    widest = int(np.abs(gap).argmax())
    tendency = "less" if gap[widest] < 0 else "more"
    return _plot(
        figure,
        f"Reliability diagram of {int(count.sum()):,} test images. The widest gap: of the {int(count[widest]):,} images with a "
        f"probability of about {confidence[widest]:.2f}, {accuracy[widest]:.2f} are right, {tendency} than the model says",
    )


def _short(name: str) -> str:
    name = make_visible(name) or "(empty)"
    return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 1]}…"


def _plot(figure: Figure, alt: str) -> Plot:
    buffer = io.BytesIO()
    with matplotlib.rc_context(_SVG), warnings.catch_warnings():
        # It measures letters that it lacks as boxes; the browser has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    width, height = (round(_PIXELS_PER_INCH * inches) for inches in figure.get_size_inches())
    uri = "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Plot(uri=markupsafe.Markup(uri), alt=alt, width=width, height=height)
