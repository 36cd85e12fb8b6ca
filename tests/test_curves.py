import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from models.curves import draw_curves, save_curves

HISTORY = {
    "loss": [0.9, 0.6, 0.5, 0.3],
    "accuracy": [0.5, 0.7, 0.8, 0.9],
    "val_loss": [0.8, 0.7, 0.4, 0.6],
    "val_accuracy": [0.6, 0.65, 0.85, 0.8],
}
RATES = {"learning_rate": [1e-3, 5e-4, 1e-4, 5e-5]}
STAGES = {"stage": ["head", "head", "head", "fine_tuning"]}


def _line(figure: Figure, panel: int, label: str):
    (line,) = [line for line in figure.axes[panel].get_lines() if line.get_label().startswith(label)]
    return line


def _starts(figure: Figure) -> list[float | None]:
    """Where each panel's vertical line is."""
    found = []
    for axes in figure.axes:
        lines = [line.get_xdata() for line in axes.get_lines() if list(line.get_ydata()) == [0, 1]]
        found.append(lines[0][0] if lines else None)
    return found


def _texts(figure: Figure) -> str:
    return " ".join(text.get_text() for axes in figure.axes for text in axes.texts)


def test_draw_curves_draws_both_splits_over_the_epochs():
    figure = draw_curves(HISTORY)

    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "accuracy"]
    for panel, name in enumerate(("loss", "accuracy")):
        for label, key in (("train", name), ("valid", f"val_{name}")):
            np.testing.assert_array_equal(_line(figure, panel, label).get_xdata(), [1, 2, 3, 4])
            np.testing.assert_array_equal(_line(figure, panel, label).get_ydata(), HISTORY[key])


def test_draw_curves_tells_the_splits_apart_without_colour():
    figure = draw_curves(HISTORY)

    assert _line(figure, 0, "train").get_linestyle() != _line(figure, 0, "valid").get_linestyle()
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels[:2] == ["train", "valid"]


def test_draw_curves_marks_the_epoch_of_the_lowest_validation_loss():
    figure = draw_curves(HISTORY)

    for panel, name in enumerate(("val_loss", "val_accuracy")):
        ring = _line(figure, panel, "epoch 3")
        assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([3], [HISTORY[name][2]])


def test_draw_curves_marks_no_epoch_by_a_loss_that_is_no_number():
    figure = draw_curves(HISTORY | {"val_loss": [np.nan, 0.9, np.inf, 1.0]})
    without = draw_curves(HISTORY | {"val_loss": [np.nan] * 4})

    assert list(_line(figure, 0, "epoch 2").get_ydata()) == [0.9]
    assert not [line for line in without.axes[0].get_lines() if line.get_label().startswith("epoch")]


def test_draw_curves_draws_the_learning_rate_in_a_slim_panel_of_its_own():
    figure = draw_curves(HISTORY | RATES)

    figure.draw_without_rendering()
    heights = [axes.get_window_extent().height for axes in figure.axes]
    assert len(heights) == 3
    assert heights[2] < heights[0] / 2
    np.testing.assert_array_equal(figure.axes[2].get_lines()[0].get_ydata(), RATES["learning_rate"])
    assert [label.get_text() for label in figure.axes[2].get_yticklabels()] == ["0", "0.001"]


@pytest.mark.parametrize("history", [HISTORY, HISTORY | RATES])
def test_draw_curves_marks_where_fine_tuning_begins_in_all_panels(history):
    figure = draw_curves(history, fine_tuning_starts=1)

    assert _starts(figure) == [1.5] * len(figure.axes)
    assert "fine-tuning" in _texts(figure)


def test_draw_curves_finds_where_fine_tuning_begins_by_the_stages():
    assert _starts(draw_curves(HISTORY | STAGES)) == [3.5, 3.5]
    assert _starts(draw_curves(HISTORY | STAGES, fine_tuning_starts=2)) == [2.5, 2.5]


@pytest.mark.parametrize(("more", "starts"), [({}, None), ({"stage": ["head"] * 4}, None), ({}, 4)])
def test_draw_curves_marks_no_fine_tuning_where_there_was_none(more, starts):
    figure = draw_curves(HISTORY | more, fine_tuning_starts=starts)

    assert _starts(figure) == [None, None]
    assert "fine-tuning" not in _texts(figure)


def test_draw_curves_shows_a_single_epoch():
    figure = draw_curves({name: values[:1] for name, values in (HISTORY | RATES).items()})

    figure.draw_without_rendering()
    assert _line(figure, 0, "train").get_marker() == "."
    low, high = figure.axes[-1].get_xlim()
    assert [tick for tick in figure.axes[-1].get_xticks() if low <= tick <= high] == [1]


def test_draw_curves_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match=r"Expected a history with loss.* Received: loss, val_loss\. .*accuracy, val_acc"):
        draw_curves({"loss": [1.0], "val_loss": [1.0]})
    with pytest.raises(ValueError, match=r"Expected curves over the same epochs.*loss: 4, accuracy: 4, val_loss: 3"):
        draw_curves(HISTORY | {"val_loss": [0.8, 0.7, 0.4]})
    with pytest.raises(ValueError, match="at least one"):
        draw_curves({name: [] for name in HISTORY})


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_save_curves_writes_a_png_and_nothing_else(tmp_path: Path, prefix: str):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")

    save_curves(HISTORY | RATES, f"{prefix}{path}", fine_tuning_starts=2)

    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]
    image = Image.open(io.BytesIO(path.read_bytes()))
    assert image.format == "PNG"
    assert image.width == 690
    assert np.ptp(np.asarray(image.convert("L"))) > 200


def test_save_curves_leaves_the_old_file_where_it_fails(tmp_path: Path):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")

    with pytest.raises(ValueError, match="Expected a history"):
        save_curves({}, str(path))

    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]
