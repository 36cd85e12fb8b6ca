"""A model that one TFX stack trained is evaluated and served by the other.

`make test-newest` names the other stack's interpreter in OTHER_STACK; it has to run on this system's C library too.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

OTHER_STACK = os.environ.get("OTHER_STACK", "")
SMOKE = ["--preset", "smoke", "--set", "data.valid_fraction=0.2", "--set", "data.test_fraction=0.3"]
# A server's view: TensorFlow and the exported model, nothing of ours.
SERVE = """
import json, sys
import tensorflow as tf
serve = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
answer = serve(image_bytes=tf.constant([open(path, "rb").read() for path in sys.argv[2:]]))
print(json.dumps({"tensorflow": tf.__version__, "labels": [label.decode() for label in answer["label"].numpy()],
                  "probabilities": answer["probabilities"].numpy().tolist()}))
"""
# TensorFlow 2.16 and 2.21 gave the same bits on one CPU; another may choose other kernels.
TOLERANCE = 1e-4

pytestmark = [
    pytest.mark.end_to_end,
    pytest.mark.skipif(not OTHER_STACK, reason="OTHER_STACK names no interpreter of another TFX stack"),
]


def train(python: str, images: Path, workspace: Path, *arguments: str) -> dict:
    command = [python, "local_runner.py", *SMOKE, "--data", str(images), "--workspace", str(workspace), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((workspace / "run.json").read_text())


def serve(python: str, model: str, images: list[Path], folder: Path) -> dict:
    done = subprocess.run([python, "-c", SERVE, model, *images], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def images(make_images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="module")
def runs(images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Three runs in one workspace: by this stack, by the other, and by this one again."""
    workspace = tmp_path_factory.mktemp("runs") / "shapes"
    return [
        train(sys.executable, images, workspace),
        train(OTHER_STACK, images, workspace),
        train(sys.executable, images, workspace, "--set", "training.epochs=31"),
    ]


# One test, so that the runs are made once and not by every worker.
def test_model_of_one_stack_is_the_baseline_on_the_other_and_is_served_by_it(
    runs: list[dict], images: Path, make_images, tmp_path: Path
):
    for run, evaluated_by in ((1, "the other stack"), (2, "this stack")):
        assert runs[run]["metrics"]["has_baseline"] is True, f"{evaluated_by} did not find the model of the run before"
        assert runs[run]["blessed"] is True
        states = {step["name"]: step["cached"] for step in runs[run]["components"]}
        assert states["Trainer"] is False  # another TensorFlow trains anew
        assert states["ImportExampleGen"] is True  # and the data stays

    # Shapes that it knows, then shapes that it does not, for probabilities away from 0 and 1.
    strange = make_images(tmp_path / "strange", class_names=("triangle", "cross"), num_per_class=4)
    chosen = [path for folder in ("circle", "square") for path in sorted((images / folder).iterdir())[:4]]
    chosen += sorted(strange.glob("*/*"))
    for run in (0, 1):
        here = serve(sys.executable, runs[run]["pushed_model"], chosen, tmp_path)
        there = serve(OTHER_STACK, runs[run]["pushed_model"], chosen, tmp_path)
        assert here["tensorflow"] != there["tensorflow"], "OTHER_STACK is this stack"
        assert here["labels"][:8] == there["labels"][:8] == ["circle"] * 4 + ["square"] * 4
        np.testing.assert_allclose(here["probabilities"], there["probabilities"], rtol=0, atol=TOLERANCE)
