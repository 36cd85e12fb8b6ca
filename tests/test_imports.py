"""Who may import whom: data -> preprocessing -> models -> pipeline -> runners, and who may know TFX and TensorFlow."""

import ast
import shutil
from pathlib import Path

import pytest
from conftest import ROOT

FOLDERS = ("data", "preprocessing", "models", "pipeline")
RUNNERS = ("local_runner.py", "kubeflow_runner.py")
NETWORKS = (
    "models/network_table.py",
    "models/efficientnet_lite.py",
    "models/keras_efficientnet.py",
    "models/folding.py",
    "models/backbones.py",
    "models/classifier.py",
)
NOBODY_IMPORTS = ("tests", "notebooks", "conftest", "local_runner", "kubeflow_runner")


def _imported(path: Path) -> set[str]:
    """Top-level names of everything that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # A relative import stays inside its own folder.
            names.add(path.parent.name if node.level else node.module.split(".")[0])
    return names


def _violations(root: Path) -> list[str]:
    found = []
    files = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]
    files += [root / name for name in RUNNERS if (root / name).exists()]
    for path in files:
        name = path.relative_to(root).as_posix()
        folder = name.split("/")[0]
        forbidden = set(NOBODY_IMPORTS)
        if folder in FOLDERS:
            forbidden.update(FOLDERS[FOLDERS.index(folder) + 1 :])
            if folder != "pipeline":
                forbidden.add("tfx")
        if name in NETWORKS:
            forbidden.update(("tensorflow", "tf_keras"))
        found += [f"{name} imports {module}" for module in sorted(_imported(path) & forbidden)]
    return found


def test_imports_go_one_way():
    assert _violations(ROOT) == []


def test_imports_are_checked_in_every_module():
    for name in NETWORKS:
        assert (ROOT / name).is_file()
    for folder in FOLDERS:
        assert list((ROOT / folder).glob("[a-z]*.py"))
        assert "" not in {module for path in (ROOT / folder).glob("*.py") for module in _imported(path)}


@pytest.mark.parametrize(
    ("file", "statement", "violation"),
    [
        ("data/features.py", "import preprocessing.images", "data/features.py imports preprocessing"),
        ("data/features.py", "def f():\n    from models import trainer", "data/features.py imports models"),
        ("preprocessing/images.py", "from models.trainer import run_fn", "preprocessing/images.py imports models"),
        ("models/trainer.py", "from pipeline.config import Config", "models/trainer.py imports pipeline"),
        ("models/trainer.py", "import tfx.v1", "models/trainer.py imports tfx"),
        ("data/prepare.py", "from tfx import v1", "data/prepare.py imports tfx"),
        ("pipeline/report.py", "from tests import conftest", "pipeline/report.py imports tests"),
        ("pipeline/report.py", "import local_runner", "pipeline/report.py imports local_runner"),
        ("local_runner.py", "from notebooks import tour", "local_runner.py imports notebooks"),
        ("models/classifier.py", "import tensorflow as tf", "models/classifier.py imports tensorflow"),
        ("models/backbones.py", "from tensorflow import nn", "models/backbones.py imports tensorflow"),
    ],
)
def test_imports_that_go_the_wrong_way_are_found(tmp_path, file, statement, violation):
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "local_runner.py", tmp_path)
    before = _violations(tmp_path)

    with open(tmp_path / file, "a") as planted:
        planted.write(f"\n\n{statement}\n")

    assert sorted(set(_violations(tmp_path)) - set(before)) == [violation]
