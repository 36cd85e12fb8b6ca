"""Every notebook runs from top to bottom on a small data set, and is committed without outputs."""

import json
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_without_outputs(path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


@pytest.mark.end_to_end
def test_pipeline_notebook_shows_the_verdict_and_the_answers(make_images, tmp_path: Path) -> None:
    notebook = nbformat.read(ROOT / "notebooks" / "01_pipeline.ipynb", as_version=4)
    parameters = next(cell for cell in notebook.cells if cell.source.startswith("# Parameters"))
    parameters.source += (
        f"\nDATA = {str(make_images(tmp_path / 'shapes'))!r}\nWORKSPACE = {str(tmp_path / 'ws')!r}\n"
        'SETTINGS = ["preset=smoke", "data.valid_fraction=0.2", "data.test_fraction=0.3"]'
    )
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs)
    assert "exit code 0" in text
    assert "accuracy" in text
    assert "PushedModel" in text
    assert "predicted circle" in text
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
