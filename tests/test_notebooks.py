"""The notebooks: each runs from top to bottom on a small data set and shows what it says; none defines code or has outputs.

They are executed in two groups, which run side by side where there are two workers. Within a group they share a workspace, as
they do for a user.
"""

import ast
import base64
import dataclasses
import importlib
import importlib.util
import io
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pydantic
import pytest
from conftest import ROOT
from matplotlib import pyplot
from PIL import Image, ImageEnhance

from data.prepare import prepare
from data.thumbnails import shrink
from pipeline.config import Config, load_config

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SETTINGS = ["preset=smoke", "data.valid_fraction=0.15", "data.test_fraction=0.2"]
CELL_SECONDS = 300
MIN_DEVIATION = 8  # of a figure's grey values, of 255; a blank one has 0

_LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
_PATH = re.compile(r"`((?:data|preprocessing|models|pipeline|notebooks|tests|docs)/[\w./-]+|\w+_runner\.py)`")
_MODULE = re.compile(r"python -m ([\w.]+)")
_SETTING = re.compile(r"`([a-z_]+)\.([a-z_]+)[` ]")


# The commands of ours that each notebook gives flags to, also where they are for the cloud and are not run by the tests.
COMMANDS = {
    "04_deployment_and_predictions": [
        ("local_runner",),
        ("models.server",),
        *(("pipeline.predict", name) for name in ("online", "batch", "stream")),
        *(("pipeline.deploy", name) for name in ("push", "status", "undeploy")),
    ],
    "05_explanations": [("local_runner",), ("models.explain",)],
    "06_pipeline": [("local_runner",), ("kubeflow_runner",), ("pipeline.runs", "submit")],
}
CURL_FLAGS = {"--silent", "--data"}


@dataclasses.dataclass(frozen=True)
class Shown:
    """What an executed notebook has on its page: its text, its warnings, its figures and its HTML."""

    text: str
    errors: str
    figures: Sequence[np.ndarray]
    html: str

    def number(self, pattern: str) -> float:
        """Returns the number that a pattern's only group finds in the text."""
        found = re.search(pattern, self.text)
        assert found, f"{pattern!r} is not in:\n{self.text}"
        return float(found[1])


def _execute(name: str, **parameters: str | list[str]) -> Shown:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    _parameter_cell(notebook.cells).source += "".join(f"\n{key} = {value!r}" for key, value in parameters.items())
    resources = {"metadata": {"path": str(FOLDER)}}
    nbclient.NotebookClient(notebook, timeout=CELL_SECONDS, resources=resources).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    data = [output.get("data", {}) for output in outputs]
    shown = Shown(
        text="".join(output.text for output in outputs if output.get("name") == "stdout"),
        errors="".join(output.text for output in outputs if output.get("name") == "stderr"),
        figures=[_decode(one["image/png"]) for one in data if "image/png" in one],
        html="".join(one["text/html"] for one in data if "text/html" in one),
    )
    assert not re.search(r"warning|^[WE]\d{4} |Traceback", shown.errors, re.MULTILINE | re.IGNORECASE), shown.errors
    for figure in shown.figures:
        assert figure.std() > MIN_DEVIATION
    return shown


def _decode(encoded: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("L"), np.float32)


def _parameter_cell(cells: Sequence[Mapping]) -> Mapping:
    return next(cell for cell in cells if "".join(cell["source"]).startswith("# Parameters"))


def _cells(path: Path) -> list[tuple[str, str]]:
    """Returns the kind and the source of each cell."""
    return [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text())["cells"]]


def _code(path: Path) -> str:
    return "\n".join(source for kind, source in _cells(path) if kind == "code")


def _text(path: Path) -> str:
    return "\n".join(source for kind, source in _cells(path) if kind == "markdown")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_without_outputs(path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_defines_no_function_and_no_class(path: Path) -> None:
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    assert [node.name for node in ast.walk(ast.parse(_code(path))) if isinstance(node, definitions)] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_begins_with_a_title_and_its_parameters(path: Path) -> None:
    (first, title), (second, parameters), *_ = _cells(path)
    values = {}
    exec(parameters, values)

    assert (first, second) == ("markdown", "code")
    assert title.startswith("# ")
    assert parameters.startswith("# Parameters")
    assert (values["DATA"], values["WORKSPACE"], values["SETTINGS"]) == ("elpv", "runs/notebooks", [])
    assert values.get("PROJECT", "") == values.get("BUCKET", "") == ""  # nothing costs money unless it is asked for


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_says_before_each_cell_of_code_what_it_does(path: Path) -> None:
    cells = _cells(path)[2:]  # but for the parameters and the setup below them
    assert [cells[number][1] for number in range(1, len(cells)) if cells[number][0] == cells[number - 1][0] == "code"] == []


@pytest.mark.parametrize("path", [*NOTEBOOKS, FOLDER / "README.md"], ids=lambda path: path.stem)
def test_notebook_names_only_what_exists(path: Path) -> None:
    text = path.read_text() if path.suffix == ".md" else _text(path)
    sections = {
        name: field.annotation.model_fields
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel)
    }
    settings = [(section, key) for section, key in _SETTING.findall(text) if section in sections]

    assert [target for target in _LINK.findall(text) if "://" not in target and not (FOLDER / target).exists()] == []
    assert [target for target in _PATH.findall(text) if not (ROOT / target).exists()] == []
    assert [module for module in _MODULE.findall(text) if importlib.util.find_spec(module) is None] == []
    assert [f"{section}.{key}" for section, key in settings if key not in sections[section]] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_notebook_gives_commands_only_flags_that_they_have(name: str, capsys) -> None:
    constants = [node.value for node in ast.walk(ast.parse(_code(FOLDER / f"{name}.ipynb"))) if isinstance(node, ast.Constant)]
    flags = {value for value in constants if isinstance(value, str) and re.fullmatch(r"--[a-z-]+", value)}
    known = set(CURL_FLAGS)
    for module, *command in COMMANDS[name]:
        with pytest.raises(SystemExit):
            importlib.import_module(module).main([*command, "--help"])
        known |= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))

    assert flags - known == set()


def test_readme_lists_every_notebook_in_order() -> None:
    listed = [name for name in _LINK.findall((FOLDER / "README.md").read_text()) if name.endswith(".ipynb")]
    assert listed == [path.name for path in NOTEBOOKS]


def _run_cell(name: str, code: str, **names: object) -> dict[str, object]:
    """Runs the one cell that has the code, among the given names; returns these and those that it has made."""
    (cell,) = [source for kind, source in _cells(FOLDER / f"{name}.ipynb") if kind == "code" and code in source]
    exec(cell, names)
    return names


def test_datasets_show_each_image_under_its_whole_name(make_images, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    rows = []
    for number, path in enumerate(sorted(make_images(tmp_path / "shapes", num_per_class=15, size=64).rglob("*.*"))):
        Image.open(path).save(photos / f"{number}.png")
        rows.append(f"{number}.png,{path.parent.name}\n")
    for name in ("11", "13"):  # 111.png ends with 11.png and with 1.png, which are other pictures
        ImageEnhance.Brightness(Image.open(photos / f"{name}.png")).enhance(0.95).save(photos / f"1{name}.png")
        rows.append(f"1{name}.png,circle\n")
    (photos / "list.csv").write_text("".join(rows))
    fractions = ["data.valid_fraction=0.3", "data.test_fraction=0.3"]
    config = load_config(overrides=[*fractions, f"data.input={json.dumps(str(photos / 'list.csv'))}"])
    report = prepare(config.data, str(tmp_path / "records"))
    paths = {split: sorted(map(str, (tmp_path / "records").glob(f"{split}-*"))) for split in report["counts"]}

    found = _run_cell("02_datasets", 'sorted(report["near_duplicates"]', config=config, report=report, paths=paths, plt=pyplot)
    pyplot.close("all")

    assert {"11.png", "13.png", "111.png", "113.png"} <= set(found["pictures"])
    for name, picture in found["pictures"].items():
        np.testing.assert_array_equal(picture, shrink((photos / name).read_bytes(), size=(300, 300)), name)


def test_datasets_prepare_what_is_on_this_machine_without_dataflow(make_images, tmp_path: Path, capsys) -> None:
    data = str(make_images(tmp_path / "shapes", num_per_class=15, size=16))
    fractions = ["data.valid_fraction=0.3", "data.test_fraction=0.3"]
    config = load_config(overrides=[*fractions, f"data.input={json.dumps(data)}"])
    cloud = {"PROJECT": "project", "REGION": "region", "BUCKET": str(tmp_path), "IMAGE": "image"}

    _run_cell("02_datasets", "DataflowRunner", DATA=data, config=config, prepare=prepare, **cloud)

    assert (tmp_path / "records" / "labels.txt").read_text() == "circle\nsquare\n"
    assert f"{tmp_path}/records" in capsys.readouterr().out


def test_pipeline_is_not_submitted_after_a_failed_check(tmp_path: Path, capsys) -> None:
    failing = [sys.executable, "-c", "raise SystemExit(2)"]
    names = {"compile_command": failing, "subprocess": subprocess, "sys": sys, "work": tmp_path}

    _run_cell("06_pipeline", '"--check"', PROJECT="project", REGION="region", **names)

    # A submission would have its own line, as there is no compiled job.
    assert re.findall("exit code .*", capsys.readouterr().out) == ["exit code 2"]


@pytest.mark.end_to_end
@pytest.mark.one_stack
@pytest.mark.parametrize("name", ["04_deployment_and_predictions", "05_explanations"])
def test_notebook_stops_where_the_pipeline_did(name: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"pushed_model": "of an earlier run"}))

    with pytest.raises(nbclient.exceptions.CellExecutionError, match=r"Expected a blessed model .* Received: exit code 2 "):
        _execute(name, DATA="elpv", WORKSPACE=str(tmp_path), SETTINGS=["trainning.epochs=80"])


@pytest.mark.end_to_end
@pytest.mark.one_stack
def test_notebooks_of_data_and_training_show_what_they_say(make_images, tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    parameters = {
        "DATA": str(make_images(tmp_path / "shapes", num_per_class=70)),
        "WORKSPACE": str(workspace),
        "SETTINGS": SETTINGS,
    }

    _check_transfer_learning(_execute("01_transfer_learning", **parameters))
    _check_datasets(_execute("02_datasets", **parameters), workspace)
    _check_training(_execute("03_training_and_export", **parameters), workspace)


def _check_transfer_learning(shown: Shown) -> None:
    assert len(shown.figures) == 8
    assert re.search(r"train +\d+ circle, \d+ square", shown.text)
    assert "efficientnet_lite0: images of 64 pixels, Apache-2.0" in shown.text
    assert "15,760 statistics of an image" in shown.text
    by_chance = shown.number(r"always \w+: ([\d.]+)%")
    assert shown.number(r"a linear head: ([\d.]+)%") > by_chance + 20
    # Shapes of random colours on random grounds, of which a network with random weights makes little.
    transferred, untrained = (
        re.search(rf"{name}: .*?([\d.]+)% by \d+$", shown.text, re.MULTILINE)
        for name in ("weights of ImageNet", "random weights")
    )
    assert float(transferred[1]) > float(untrained[1]) + 20


def _check_datasets(shown: Shown, workspace: Path) -> None:
    assert len(shown.figures) == 4
    assert "140 images listed, 0 in quarantine" in shown.text
    assert "Expected at most 5% of the images to be unusable. Received: 8 of " in shown.text
    assert re.search(r"\d+ listed: \d+ records, 1 duplicate, 8 in quarantine", shown.text)
    quarantine = json.loads((workspace / "notebooks" / "02_datasets" / "records" / "quarantine.json").read_text())
    assert sorted(Path(row["file"]).stem for row in quarantine) == [
        "cut_off", "empty", "missing", "notes", "seen_as_another", "seen_as_one", "tiny", "typo"]  # fmt: skip
    assert re.search(r"\w+\.png is the same file as copy\.png", shown.text)
    assert re.search(r"alike, in one split: .*saved_again\.jpg", shown.text)
    assert "EXIF rotation was applied, 1 x WEBP became PNG" in shown.text
    assert "as written: nothing wrong" in shown.text
    assert "edited: Unexpectedly low values" in shown.text
    assert "- drift in `brightness`" in shown.text
    assert "cut_off.png" in shown.html
    assert shown.text.count("Left out, as PROJECT is empty") == 1


def _check_training(shown: Shown, workspace: Path) -> None:
    assert len(shown.figures) == 3
    assert shown.number(r"best validation accuracy ([\d.]+)%") > 70
    assert "checkpoints/head.npz" in shown.text
    assert re.search(r"val_loss +\d+ epochs", shown.text)
    assert shown.text.count("the head is trained already") == 1
    for signature in ("serving_default", "examples", "explain_head"):
        assert f"\n{signature}\n" in shown.text
    assert shown.number(r"largest difference of a probability ([\d.e+-]+)") < 1e-4
    assert shown.number(r"(\d+) of \d+ are right") > 0
    assert shown.number(r"float16: accuracy ([\d.]+)%") > 70
    assert (workspace / "notebooks" / "03_training_and_export" / "model" / "saved_model.pb").exists()


@pytest.mark.end_to_end
@pytest.mark.one_stack
def test_notebooks_of_a_pushed_model_show_what_they_say(make_images, tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    parameters = {
        "DATA": str(make_images(tmp_path / "shapes", num_per_class=70)),
        "WORKSPACE": str(workspace),
        "SETTINGS": SETTINGS,
    }

    _check_predictions(_execute("04_deployment_and_predictions", **parameters))
    _check_explanations(_execute("05_explanations", **parameters), workspace)
    _check_pipeline(_execute("06_pipeline", **parameters))


def _check_predictions(shown: Shown) -> None:
    assert shown.figures
    assert "Blessed: the model passed every threshold" in shown.text
    assert "'state': 'AVAILABLE'" in shown.text
    assert '{"predictions": [{"label": "' in shown.text
    assert len(re.findall(r"^400 Expected ", shown.text, re.MULTILINE)) == 3
    num_images = shown.number(r"(?m)^(\d+) images in [\d.]+ s$")
    assert shown.number(r"(\d+) of \d+ are right") > 0.6 * num_images
    assert 'tfx_vision_requests_total{code="200",method="POST"' in shown.text
    assert f"online and batch: the same class for {num_images:.0f} of {num_images:.0f}" in shown.text
    assert shown.number(r"largest difference of a probability ([\d.e+-]+)") < 1e-4
    assert "3 images and a text have come, 4 rows are there" in shown.text
    assert "5 images and a text have come, 6 rows are there" in shown.text
    assert re.search(r"^4\.png (circle|square) [\d.]+%$", shown.text, re.MULTILINE)
    assert "notes.txt it is no image of a known format" in shown.text
    assert "- nothing has moved" in shown.text
    assert "exit code 0" in shown.text
    assert shown.text.count("Left out, as PROJECT is empty") == 3


def _check_explanations(shown: Shown, workspace: Path) -> None:
    assert len(shown.figures) == 8
    assert re.search(r"serving_model/\d+: accuracy [\d.]+%", shown.text)
    assert len(re.findall(r"true: \w+: the gap is 0\.\d+ at 4 steps", shown.text)) == 3
    assert all(float(gap) < 0.1 for gap in re.findall(r"([\d.]+) at 64 steps", shown.text))
    for method in ("integrated_gradients", "guided_integrated_gradients", "xrai", "grad_cam"):
        assert re.search(rf"\b{method} \d+\.\d", shown.text)
    assert len(re.findall(r"correlation -?\d\.\d+, smoothed -?\d\.\d+", shown.text)) == 6
    assert "exit code 0" in shown.text
    assert (workspace / "notebooks" / "05_explanations" / "why.png").exists()


def _check_pipeline(shown: Shown) -> None:
    assert len(shown.figures) == 2
    assert re.search(r"^exit code 0$.*^exit code 3$", shown.text, re.MULTILINE | re.DOTALL)
    assert re.search(r"Trainer +done \(reused\)", shown.text)
    assert shown.number(r"accuracy ([\d.]+)% \([\d.]+% to [\d.]+%\) and macro F1") > 60
    assert re.search(r"label=circle +accuracy +[\d.]+% of \d+", shown.text)
    assert re.search(r"PushedModel +by Pusher", shown.text)
    assert "records" in shown.text
    assert "the budget is 1 ms (serving_check.max_latency_ms)" in shown.text
    assert "ran: Load libraries" in shown.text
    assert "ServingCheck, Pusher, Report" in shown.text
    assert "changed: serving_check.max_latency_ms 2000.0 -> 1.0" in shown.text
    assert "Compiled shapes for vertex: pipeline.json" in shown.text
    assert re.search(r"Pusher +after Evaluator, ServingCheck, Trainer", shown.text)
    assert '"accelerator_type": "NVIDIA_TESLA_T4"' in shown.text
    assert shown.text.count("Left out, as PROJECT is empty") == 1
    plots = [base64.b64decode(one).decode() for one in re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", shown.html)]
    assert "circle" in plots[0]
    assert "share that is right" in plots[1]
    assert "&lt;h2" in shown.html
