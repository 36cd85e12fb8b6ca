"""The training curves, drawn once for both who show them: the trainer's `curves.png` and the HTML report.

The lines differ by their dashes and not by colour alone, so that the plot can be read in grey print and by people who do not
tell its colours apart.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

LEARNING_RATE = "learning_rate"
STAGE = "stage"
_CURVES = ("loss", "accuracy", "val_loss", "val_accuracy")
# Of the palette of Okabe and Ito, which colour-blind people tell apart; dark and light enough to differ in grey print too.
_TRAIN_COLOR = "#0072B2"
_VALID_COLOR = "#D55E00"
_VALID_DASHES = (0, (4, 1.5))
_LINE_COLOR = "0.35"
_DPI = 150


def draw_curves(history: Mapping[str, Sequence[Any]], *, fine_tuning_starts: int | None = None) -> Figure:
    """Draws loss and accuracy of both splits over the epochs, and the learning rate below where it is known.

    A ring marks the epoch with the lowest validation loss; a vertical line, where fine-tuning begins.

    Args:
      history: per epoch `loss`, `accuracy`, `val_loss`, `val_accuracy` and maybe `learning_rate` and `stage`, all of the same
        length. Accuracies are in [0, 1]; a value that is not finite leaves a gap. Other curves are left out.
      fine_tuning_starts: number of epochs before fine-tuning; where `stage`, the name of each epoch's stage, changes, if left
        out.

    Returns:
      A figure of 4.6 inches in width; the caller saves it as it needs.

    Raises:
      ValueError: if a curve is missing, they differ in length, or there is no epoch.
    """
    missing = [name for name in _CURVES if name not in history]
    if missing:
        raise ValueError(
            f"Expected a history with {', '.join(_CURVES)}. Received: {', '.join(history) or 'an empty one'}. "
            f"Train with validation data and the metric `accuracy`, which give {', '.join(missing)}."
        )
    names = [*_CURVES, LEARNING_RATE] if LEARNING_RATE in history else _CURVES
    curves = {name: np.asarray(history[name], float) for name in names}
    num_epochs = len(curves["loss"])
    if not num_epochs or any(len(curve) != num_epochs for curve in curves.values()):
        lengths = ", ".join(f"{name}: {len(curve)}" for name, curve in curves.items())
        raise ValueError(f"Expected curves over the same epochs, at least one. Received epochs of {lengths}. Train anew.")
    if fine_tuning_starts is None:
        fine_tuning_starts = _first_change(history.get(STAGE, ()))

    height_ratios = [3, 3, 1.2] if LEARNING_RATE in curves else [3, 3]
    figure = Figure(figsize=(4.6, 0.6 + 0.6 * sum(height_ratios)), layout="constrained")
    panels = figure.subplots(len(height_ratios), 1, sharex=True, height_ratios=height_ratios)
    epochs = np.arange(1, num_epochs + 1)
    finite = np.where(np.isfinite(curves["val_loss"]), curves["val_loss"], np.inf)
    best = int(finite.argmin())
    marker = "." if num_epochs == 1 else ""  # one epoch makes no line
    for axes, name in zip(panels, ("loss", "accuracy"), strict=False):
        axes.plot(epochs, curves[name], color=_TRAIN_COLOR, label="train", marker=marker)
        axes.plot(epochs, curves[f"val_{name}"], color=_VALID_COLOR, label="valid", linestyle=_VALID_DASHES, marker=marker)
        if np.isfinite(finite[best]):
            ring = {
                "marker": "o",
                "markerfacecolor": "white",
                "color": _VALID_COLOR,
                "linestyle": "",
                "zorder": 3,
                "clip_on": False,
            }
            axes.plot(epochs[best], curves[f"val_{name}"][best], label=f"epoch {epochs[best]}: lowest valid loss", **ring)
        axes.set_ylabel(name)
    if LEARNING_RATE in curves:
        # Of each epoch at its end: steps, as a slope between two stages would be one that nobody trained with.
        panels[2].step(epochs, curves[LEARNING_RATE], where="mid", color="black", linewidth=1.2, marker=marker)
        panels[2].set_ylabel("learning\nrate")
        highest = max(curves[LEARNING_RATE][np.isfinite(curves[LEARNING_RATE])], default=0.0)
        panels[2].set_ylim(bottom=0)
        panels[2].set_yticks([0.0, highest], ["0", f"{highest:.2g}"])
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if fine_tuning_starts is not None and 0 <= fine_tuning_starts < num_epochs:
        _mark_fine_tuning(panels, fine_tuning_starts + 0.5, has_room_right=fine_tuning_starts < num_epochs / 2)
    panels[0].legend(framealpha=1, edgecolor="none", fontsize="small", handlelength=3)
    panels[-1].set_xlabel("epoch")
    panels[-1].set_xlim(0.5, num_epochs + 0.5)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=10))
    figure.align_ylabels()
    return figure


def _first_change(stages: Sequence[str]) -> int | None:
    """Returns the number of epochs of the first stage, or None where it is the only one."""
    return next((epoch for epoch, stage in enumerate(stages) if stage != stages[0]), None)


def _mark_fine_tuning(panels: Sequence[Axes], epoch: float, *, has_room_right: bool) -> None:
    """Draws the line through all panels, with its label above them, where no curve runs."""
    for axes in panels:
        axes.axvline(epoch, color=_LINE_COLOR, linestyle=":", linewidth=1.2)
    panels[0].annotate(
        "fine-tuning \N{RIGHTWARDS ARROW}" if has_room_right else "head \N{LEFTWARDS ARROW} \N{RIGHTWARDS ARROW} fine-tuning",
        (epoch, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="left" if has_room_right else "center",
        fontsize="small",
        color=_LINE_COLOR,
    )


def save_curves(history: Mapping[str, Sequence[Any]], path: str, *, fine_tuning_starts: int | None = None) -> None:
    """Draws the curves as a PNG; written whole or not at all.

    Args:
      history: as for `draw_curves`.
      path: of the PNG; local or gs://. Its folder exists.
      fine_tuning_starts: as for `draw_curves`.

    Raises:
      ValueError: as `draw_curves`.
    """
    buffer = io.BytesIO()
    draw_curves(history, fine_tuning_starts=fine_tuning_starts).savefig(buffer, format="png", dpi=_DPI)
    temporary = f"{path}.tmp"
    with tf.io.gfile.GFile(temporary, "wb") as file:
        file.write(buffer.getvalue())
    tf.io.gfile.rename(temporary, path, overwrite=True)
