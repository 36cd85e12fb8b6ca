import json
import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from two_objects import BLUE_BOX, RED_BOX, SIZE, export_network, make_picture

from models.attributions import METHODS, explain
from models.explain import main
from models.explainable import ExplainableModel

pytestmark = pytest.mark.one_stack


@pytest.fixture(scope="module")
def serving_model(tmp_path_factory) -> Path:
    """A folder of two versions, of which the earlier cannot be loaded."""
    folder = tmp_path_factory.mktemp("serving_model")
    (folder / "9").mkdir()
    (folder / "9" / "saved_model.pb").write_bytes(b"no model")
    export_network(folder / "10")
    return folder


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "two objects.png"
    Image.fromarray(make_picture()).save(path)
    return path


def _run(serving_model, images, output, *options) -> int:
    return main(["--model", str(serving_model), "--image", *map(str, images), "--output", str(output), *options])


def _refused(capsys) -> str:
    """Returns the one line that the command says about what is wrong."""
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("loading the model")]
    (line,) = lines
    return line


@pytest.mark.parametrize("method", METHODS)
def test_main_writes_a_picture_and_its_numbers(serving_model, picture, tmp_path, capsys, method):
    output = tmp_path / "why.png"

    assert _run(serving_model, [picture], output, "--method", method) == 0

    page = np.asarray(Image.open(output)).astype(int)
    side = 256  # a small picture is enlarged
    assert page.shape[1] == 2 * side + 36
    left, right = page[-side - 12 : -12, 12 : 12 + side], page[-side - 12 : -12, 24 + side : 24 + 2 * side]
    scale = side / SIZE
    rows, columns = (slice(round(scale * part.start), round(scale * part.stop)) for part in BLUE_BOX)
    assert left[rows, columns, 2].mean() > left[rows, columns, 0].mean() + 50  # the picture is in its colours
    orange = (right[..., 0] - right[..., 2]).clip(min=0)
    assert orange[rows, columns].mean() > 2 * orange.mean()
    document = json.loads((tmp_path / "why.json").read_text())
    assert document["model"]["version"] == "10"
    assert document["model"]["folder"] == str(serving_model / "10")
    assert document["model"]["fingerprint"]
    (entry,) = document["explanations"]
    expected = explain(ExplainableModel(str(serving_model / "10")), picture.read_bytes(), method=method)
    assert (entry["method"], entry["class"]) == (method, "square")
    assert entry["image"] == str(picture)
    assert entry["probability"] == entry["probabilities"]["square"] == pytest.approx(expected.probability)
    assert sum(entry["probabilities"].values()) == pytest.approx(1)
    assert entry["completeness_gap"] == pytest.approx(expected.completeness_gap)
    assert entry["sum_for"] + entry["sum_against"] == pytest.approx(expected.attribution.sum(), abs=1e-4)
    assert "square" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two objects.png", "why.json", "why.png"]


@pytest.mark.parametrize("method", ["integrated_gradients", "xrai", "grad_cam"])
def test_main_finds_the_regions_of_the_class(serving_model, picture, tmp_path, method):
    options = () if method == "grad_cam" else ("--baseline", "black")
    for name, (rows, columns) in (("circle", RED_BOX), ("square", BLUE_BOX)):
        assert _run(serving_model, [picture], tmp_path / "why.png", "--class", name, "--method", method, *options) == 0

        (entry,) = json.loads((tmp_path / "why.json").read_text())["explanations"]
        assert entry["class"] == name
        left, top, right, bottom = (SIZE * share for share in entry["regions"][0]["box"])
        assert columns.start < (left + right) / 2 < columns.stop
        assert rows.start < (top + bottom) / 2 < rows.stop
        assert entry["regions"][0]["attribution"] > 0
        assert 0 < entry["regions"][0]["area"] < 0.5


def test_main_draws_a_row_for_each_picture_upright(serving_model, tmp_path):
    # 40 wide and 80 high on the screen, where the EXIF data turn it; red is on the top.
    lying = np.zeros((40, 80, 3), np.uint8)
    lying[:, :40, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(lying).save(tmp_path / "lying.jpg", exif=exif, quality=95)
    Image.fromarray(make_picture()).save(tmp_path / "other.webp", lossless=True)

    code = _run(serving_model, [tmp_path / "lying.jpg", tmp_path / "other.webp"], tmp_path / "why.png", "--method", "grad_cam")

    assert code == 0
    page = np.asarray(Image.open(tmp_path / "why.png")).astype(int)
    second = page.shape[0] // 2
    assert page.shape == (2 * second, 2 * 256 + 36, 3)
    first = page[second - 12 - 256 : second - 12, 12 : 12 + 128]
    assert first[20, 64, 0] > 200
    assert first[236, 64, 0] < 50
    entries = json.loads((tmp_path / "why.json").read_text())["explanations"]
    assert [Path(entry["image"]).name for entry in entries] == ["lying.jpg", "other.webp"]


def test_main_passes_its_settings_on(serving_model, picture, tmp_path):
    options = ("--steps", "5", "--baseline", "mean", "--noisy-copies", "2", "--method", "xrai_fast")

    assert _run(serving_model, [picture], tmp_path / "why.png", *options) == 0

    (entry,) = json.loads((tmp_path / "why.json").read_text())["explanations"]
    assert entry["parameters"] == {"baseline": "mean", "num_steps": 5, "num_noisy_copies": 2}


def test_main_shows_progress(serving_model, picture, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("models.progress._REPORT_SECONDS", 0.0)

    assert _run(serving_model, [picture, picture], tmp_path / "why.png", "--steps", "4") == 0

    shown = re.findall(r"integrated_gradients, gradients .* +(\d+)%", capsys.readouterr().err)
    assert shown == ["50", "100"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--class", "triangle"), "Expected --class to be one of the model's 2 classes, circle, square. Received: 'triangle'."),
        (("--steps", "1"), "Expected `num_steps` in [2, 2000]. Received: num_steps=1."),
        (("--method", "blur_integrated_gradients", "--baseline", "white"), "Expected `baseline` of blurred"),
        (("--method", "grad_cam", "--noisy-copies", "3"), "Expected `num_noisy_copies` in [0, 0] with grad_cam."),
    ],
)
def test_main_refuses_wrong_settings_in_one_line(serving_model, picture, tmp_path, capsys, options, message):
    assert _run(serving_model, [picture], tmp_path / "why.png", *options) == 2

    assert _refused(capsys).startswith(f"error: {message}")
    assert [path.name for path in tmp_path.iterdir()] == [picture.name]


def test_main_refuses_wrong_files_in_one_line(serving_model, picture, tmp_path, capsys):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:400])
    cases = [
        (serving_model, [picture, tmp_path / "text.jpg"], "why.png", "text.jpg'; it is no image of a known format"),
        (serving_model, [tmp_path / "cut.png"], "why.png", "cut.png'; it is damaged"),
        (serving_model, [tmp_path / "nowhere.png"], "why.png", "nowhere.png'; there is no such file"),
        (serving_model, [picture], "why.jpg", "Expected --output to be a .png file"),
        (serving_model, [picture], "nowhere/why.png", "Expected --output to be a .png file in a folder"),
        (serving_model, [picture], picture.name, "Expected --output to be another file than the pictures"),
        (serving_model, [picture] * 51, "why.png", "Expected at most 50 pictures, which go into one PNG. Received: 51"),
        (tmp_path, [picture], "why.png", "Expected a SavedModel's folder"),
        (serving_model / "9", [picture], "why.png", "which cannot be loaded"),
    ]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for model, images, output, message in cases:
        assert _run(model, images, tmp_path / output) == 2, message
        assert message in _refused(capsys)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_main_says_that_an_earlier_model_has_no_grad_cam(serving_model, picture, tmp_path, capsys):
    loaded = tf.saved_model.load(str(serving_model / "10"))
    earlier = {name: loaded.signatures[name] for name in ("serving_default", "explain_preprocess", "explain_model")}
    tf.saved_model.save(loaded, str(tmp_path / "earlier"), signatures=earlier)

    assert _run(tmp_path / "earlier", [picture], tmp_path / "why.png", "--method", "grad_cam") == 2

    assert "without which Grad-CAM is not available" in _refused(capsys)
    assert not list(tmp_path.glob("why.*"))


def test_main_writes_both_files_or_neither(serving_model, picture, tmp_path, capsys):
    (tmp_path / "why.png").write_bytes(b"before")
    (tmp_path / "why.json").mkdir()  # nothing can take its place

    assert _run(serving_model, [picture], tmp_path / "why.png", "--method", "grad_cam") == 2

    assert "Expected to write" in capsys.readouterr().err
    assert (tmp_path / "why.png").read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == [picture.name, "why.json", "why.png"]
