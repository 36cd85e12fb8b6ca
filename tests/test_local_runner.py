"""The whole pipeline on generated data: what runs, what is reused, what is refused."""

import contextlib
import fcntl
import html
import json
import os
import pty
import random
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import tensorflow as tf
from PIL import Image

import local_runner
from data.features import SPLITS

pytestmark = pytest.mark.end_to_end

COMPONENTS = [
    "ImportExampleGen",
    "StatisticsGen",
    "Schema",
    "ExampleValidator",
    "LatestBlessedStatistics",
    "DataGate",
    "Transform",
    "Trainer",
    "LatestBlessedModel",
    "Evaluator",
    "ServingCheck",
    "Pusher",
]
LOOKUPS = {"Schema", "LatestBlessedStatistics", "LatestBlessedModel"}  # they ask the metadata store and have nothing to reuse
ROOT = Path(local_runner.__file__).parent
# Larger valid and test splits, so that a few dozen images judge a model fairly.
SMOKE = ["--preset", "smoke", "--set", "data.valid_fraction=0.2", "--set", "data.test_fraction=0.3"]


def run(workspace: Path, *arguments: str) -> tuple[int, dict]:
    code = local_runner.main([*SMOKE, "--workspace", str(workspace), *arguments])
    path = workspace / "run.json"
    return code, json.loads(path.read_text()) if path.exists() else {}


def states(result: dict) -> dict[str, str]:
    """Component -> `ran`, `reused` or its state."""
    return {
        step["name"]: ("reused" if step["cached"] else "ran") if step["state"] == "done" else step["state"]
        for step in result["components"]
        if step["name"] in COMPONENTS
    }


def pushed_versions(workspace: Path) -> list[str]:
    folder = workspace / "serving_model"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.fixture(scope="module")
def images(make_images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="module")
def first_run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, dict]:
    workspace = tmp_path_factory.mktemp("runs") / "shapes"
    return workspace, *run(workspace, "--data", str(images))


@pytest.fixture
def workspace(first_run: tuple[Path, int, dict], tmp_path: Path) -> Path:
    """The first run's own folder, put back afterwards: the metadata store holds absolute paths."""
    original = first_run[0]
    backup = tmp_path / "backup"
    shutil.copytree(original, backup)
    yield original
    shutil.rmtree(original)
    shutil.copytree(backup, original)


def test_first_run_executes_every_component_and_pushes(first_run) -> None:
    workspace, code, result = first_run
    assert code == 0
    assert set(states(result)) == set(COMPONENTS)
    assert all(state == "ran" for state in states(result).values())
    assert result["blessed"] is True
    assert result["reasons"] == []
    # A few dozen images are too few to compare the splits, and there is no earlier data.
    assert [finding.split(" (")[0] for finding in result["data_findings"]] == ["skew: train", "skew: train"]
    assert all("was not compared with" in finding for finding in result["data_findings"])
    assert result["pipeline"] == "shapes"
    assert sum(result["counts"][split][label] for split in SPLITS for label in ("circle", "square")) == 80
    for name in ("report.html", "run.log", "tfrecords/labels.txt"):
        assert (workspace / name).stat().st_size > 0
    assert pushed_versions(workspace) == [Path(result["pushed_model"]).name]


def test_pushed_model_answers_with_the_class(first_run, images: Path) -> None:
    _, _, result = first_run
    serving = tf.saved_model.load(result["pushed_model"]).signatures["serving_default"]
    paths = sorted((images / "circle").iterdir()) + sorted((images / "square").iterdir())
    answer = serving(image_bytes=tf.constant([path.read_bytes() for path in paths]))
    labels = [label.decode() for label in answer["label"].numpy()]
    assert sum(label == path.parent.name for label, path in zip(labels, paths, strict=True)) / len(paths) > 0.85


def test_metrics_are_those_of_the_pushed_model_on_the_test_split(first_run) -> None:
    workspace, _, result = first_run
    examples = tf.saved_model.load(result["pushed_model"]).signatures["examples"]
    files = [str(path) for path in (workspace / "tfrecords").glob("test-*.gz")]
    records = [record.numpy() for record in tf.data.TFRecordDataset(files, "GZIP")]
    labels = [tf.train.Example.FromString(record).features.feature["label"].bytes_list.value[0] for record in records]
    answers = examples(examples=tf.constant(records))["label"].numpy()
    assert result["metrics"]["overall"]["example_count"] == len(records)
    assert result["metrics"]["overall"]["accuracy"] == pytest.approx(sum(answers == labels) / len(records))


def test_second_run_with_nothing_changed_reuses_everything(workspace: Path, images: Path) -> None:
    before = pushed_versions(workspace)
    code, result = run(workspace, "--data", str(images))
    assert code == 0
    assert {name for name, state in states(result).items() if state == "ran"} == LOOKUPS
    assert pushed_versions(workspace) == before
    assert Path(result["pushed_model"]).exists()


def test_deleted_push_is_put_back_by_a_cached_run(workspace: Path, images: Path) -> None:
    shutil.rmtree(workspace / "serving_model")
    code, result = run(workspace, "--data", str(images))
    assert code == 0
    assert states(result)["Pusher"] == "reused"
    assert (Path(result["pushed_model"]) / "saved_model.pb").exists()


@pytest.mark.one_stack
def test_training_setting_reruns_from_the_trainer(workspace: Path, images: Path) -> None:
    code, result = run(workspace, "--data", str(images), "--set", "training.epochs=31")
    assert code == 0
    ran = {name for name, state in states(result).items() if state == "ran"}
    assert ran - LOOKUPS == {"Trainer", "Evaluator", "ServingCheck", "Pusher"}
    assert result["metrics"]["has_baseline"] is True
    assert sum(map(sum, result["metrics"]["confusion_matrix"])) == result["metrics"]["overall"]["example_count"]
    assert len(pushed_versions(workspace)) == 2


@pytest.mark.one_stack
def test_settings_that_go_back_and_forth_serve_the_model_of_the_last_run(workspace: Path, images: Path) -> None:
    open_gate = ["--set", "evaluation.max_accuracy_drop=1"]
    for epochs in (30, 31, 30, 31):
        code, result = run(workspace, "--data", str(images), "--set", f"training.epochs={epochs}", *open_gate)
        assert code == 0
    assert states(result)["Trainer"] == "reused"
    assert Path(result["pushed_model"]).name == pushed_versions(workspace)[-1]
    model_runs = sorted((workspace / "pipeline" / "Trainer" / "model").iterdir(), key=lambda path: int(path.name))
    trained = (model_runs[-1] / "Format-Serving" / "fingerprint.pb").read_bytes()
    assert (Path(result["pushed_model"]) / "fingerprint.pb").read_bytes() == trained


@pytest.mark.one_stack
def test_added_class_is_refused_until_a_person_says_that_it_is_meant(
    workspace: Path, images: Path, make_images, tmp_path: Path
) -> None:
    before = pushed_versions(workspace)
    grown = shutil.copytree(images, tmp_path / images.name)
    make_images(grown, class_names=("circle", "square", "triangle"))
    code, result = run(workspace, "--data", str(grown))
    assert code == 3
    (reason,) = [reason for reason in result["reasons"] if "blessed model" in reason]
    assert "its classes are circle, square; those of the data are circle, square, triangle" in reason
    assert pushed_versions(workspace) == before

    # The two of a few dozen images that go wrong are no matter here.
    settings = ["evaluation.compare_with=nothing", "evaluation.min_accuracy=0.3", "evaluation.min_class_accuracy=0"]
    code, result = run(workspace, "--data", str(grown), *[part for setting in settings for part in ("--set", setting)])
    assert code == 0, result["reasons"]
    assert result["metrics"]["has_baseline"] is False
    assert set(result["metrics"]["classes"]) == {"circle", "square", "triangle"}
    assert len(pushed_versions(workspace)) == len(before) + 1


@pytest.mark.one_stack
def test_code_change_behind_run_fn_reruns_the_trainer(workspace: Path, images: Path, monkeypatch) -> None:
    from data import fingerprint

    parse = fingerprint._parse

    def edited(module: str):
        tree = parse(module)
        if module == "models.trainer":
            tree.body.append(type(tree.body[0])(value=tree.body[0].value))
        return tree

    monkeypatch.setattr(fingerprint, "_parse", edited)
    code, result = run(workspace, "--data", str(images))
    assert code == 0
    ran = {name for name, state in states(result).items() if state == "ran"}
    assert "Trainer" in ran
    assert not ran & {"ImportExampleGen", "StatisticsGen", "ExampleValidator", "Transform"}


@pytest.mark.one_stack
def test_data_change_reruns_from_the_start(workspace: Path, images: Path, make_images, tmp_path: Path) -> None:
    grown = shutil.copytree(images, tmp_path / images.name)
    make_images(grown, num_per_class=44)
    code, result = run(workspace, "--data", str(grown), "--set", "pipeline.name=shapes")
    assert code in (0, 3)
    ran = {name for name, state in states(result).items() if state == "ran"}
    assert ran >= {"ImportExampleGen", "StatisticsGen", "ExampleValidator", "Transform", "Trainer", "Evaluator"}


@pytest.mark.one_stack
def test_shuffled_labels_are_refused_and_nothing_is_pushed(images: Path, tmp_path: Path, capfd) -> None:
    paths = sorted(images.glob("*/*"))
    labels = [path.parent.name for path in paths]
    random.Random(1).shuffle(labels)
    rows = "".join(f"{path},{label}\n" for path, label in zip(paths, labels, strict=True))
    (tmp_path / "shuffled.csv").write_text(rows)
    strict = ["--set", "evaluation.min_accuracy=0.8"]
    code, result = run(tmp_path / "ws", "--data", str(tmp_path / "shuffled.csv"), *strict)
    assert code == 3
    assert result["blessed"] is False
    assert result["pushed_model"] is None
    assert pushed_versions(tmp_path / "ws") == []
    assert any("accuracy over all test images is" in reason and "limit is 0.8 (" in reason for reason in result["reasons"])
    assert "Not blessed" in capfd.readouterr().out
    assert "Not blessed" in (tmp_path / "ws" / "report.html").read_text()


@pytest.mark.one_stack
def test_worse_model_than_the_blessed_one_is_refused(workspace: Path, images: Path, tmp_path: Path) -> None:
    before = pushed_versions(workspace)
    # Without ImageNet's weights the model is a guess, and absolute limits of zero would let it pass.
    open_gate = [f"evaluation.min_{name}=0" for name in ("accuracy", "class_accuracy", "slice_accuracy")]
    settings = [part for setting in [*open_gate, "model.weights=random"] for part in ("--set", setting)]
    code, result = run(workspace, "--data", str(images), *settings)
    assert code == 3
    assert pushed_versions(workspace) == before
    assert any("lower than the latest blessed model's" in reason for reason in result["reasons"])


@pytest.mark.one_stack
def test_crash_after_the_evaluator_pushes_nothing_until_the_serving_check_blesses_too(
    workspace: Path, images: Path, monkeypatch
) -> None:
    before = pushed_versions(workspace)
    settings = ["--data", str(images), "--set", "training.epochs=31"]

    def crash(*unused):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.components.check_serving", crash)
        code, result = run(workspace, *settings)
    assert code == 130
    assert states(result)["Evaluator"] == "ran"
    assert result["pushed_model"] is None
    assert pushed_versions(workspace) == before

    code, result = run(workspace, *settings, "--set", "serving_check.max_latency_ms=0.001")
    assert code == 3
    assert states(result)["Evaluator"] == "reused"
    (reason,) = result["reasons"]
    assert "serving_check.max_latency_ms" in reason
    assert pushed_versions(workspace) == before

    code, result = run(workspace, *settings)
    assert code == 0
    assert states(result)["Evaluator"] == "reused"
    assert len(pushed_versions(workspace)) == len(before) + 1


def test_data_gate_stops_records_that_disobey_the_schema(first_run, tmp_path: Path, capfd) -> None:
    records = shutil.copytree(first_run[0] / "tfrecords", tmp_path / "records")
    schema = records / "schema" / "schema.pbtxt"
    schema.write_text(schema.read_text().replace('value: "square"', 'value: "triangle"'))
    code, result = run(tmp_path / "ws", "--data", str(records))
    assert code == 4
    assert states(result)["DataGate"] == "failed"
    assert states(result)["Trainer"] == "waiting"
    assert len(result["reasons"]) == len(SPLITS)
    assert all(reason.startswith("anomaly in `label` of ") and "square" in reason for reason in result["reasons"])
    assert result["data_findings"] == result["reasons"]
    *printed, hint = capfd.readouterr().err.splitlines()
    assert "\n".join(printed) == "error: " + "\n".join(result["reasons"])
    assert "edit its schema" in hint


@pytest.mark.one_stack
def test_data_that_drifts_from_the_blessed_models_stops_the_run_unless_it_is_only_to_warn(
    workspace: Path, make_images, tmp_path: Path, capfd
) -> None:
    images = make_images(tmp_path / "shapes", size=96)
    settings = ["--data", str(images), "--set", "data_gate.min_examples=30", "--set", "evaluation.max_accuracy_drop=1"]
    warn = ["--set", "data_gate.action=warn"]

    code, stopped = run(workspace, *settings)
    assert code == 4
    assert states(stopped)["Trainer"] == "waiting"
    assert {reason.split(":")[0] for reason in stopped["reasons"]} == {"drift in `height`", "drift in `width`"}
    capfd.readouterr()

    code, warned = run(workspace, *settings, *warn)
    assert code == 0
    assert warned["data_findings"][:2] == stopped["reasons"]
    report, shown = html.unescape((workspace / "report.html").read_text()), capfd.readouterr().out
    assert all(finding in report and finding in shown for finding in warned["data_findings"])

    # The blessed model is now of this data.
    code, accepted = run(workspace, *settings)
    assert code == 0
    assert {name for name, state in states(accepted).items() if state == "ran"} == {*LOOKUPS, "DataGate"}
    assert not any("drift" in finding for finding in accepted["data_findings"])


@pytest.mark.one_stack
def test_broken_images_are_quarantined_and_the_run_goes_on(make_images, tmp_path: Path) -> None:
    folder = make_images(tmp_path / "shapes")
    (folder / "circle" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (folder / "square" / "empty.jpg").write_bytes(b"")
    code, result = run(tmp_path / "ws", "--data", str(folder))
    assert code == 0
    assert result["counts"]["quarantined"] == 2
    quarantine = json.loads((tmp_path / "ws" / "tfrecords" / "quarantine.json").read_text())
    assert {Path(row["file"]).name for row in quarantine} == {"broken.png", "empty.jpg"}


@pytest.mark.one_stack
def test_extra_column_becomes_a_slice(images: Path, tmp_path: Path) -> None:
    rows = ["path,label,camera,photo"]
    for index, path in enumerate(sorted(images.glob("*/*"))):
        rows.append(f"{path},{path.parent.name},{'left' if index % 2 else 'right'},{index}")
    (tmp_path / "shapes.csv").write_text("\n".join(rows))
    code, result = run(tmp_path / "ws", "--data", str(tmp_path / "shapes.csv"))
    assert code == 0
    slices = result["metrics"]["slices"]
    assert {"camera=left", "camera=right", "camera=left, label=circle"} <= set(slices)
    assert (
        sum(slices[f"camera={side}"]["example_count"] for side in ("left", "right"))
        == (result["metrics"]["overall"]["example_count"])
    )
    (warning,) = (warning for warning in result["data_warnings"] if "data.slice_columns" in warning)
    assert warning.startswith("photo has 20 values or more")


def test_runner_outside_of_the_environment_says_how_to_enter_it(tmp_path: Path) -> None:
    command = [sys.executable, "-S", str(ROOT / "local_runner.py")]  # without site-packages
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: Expected the project's environment. Received: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "no/such/folder"], "which does not exist"),
        (["--set", "training.epoch=3"], "Did you mean `training.epochs`"),
        (["--set", "training.epochs=none"], "`training.epochs`"),
        (["--set", "preprocessing.image_size=225"], "Use 224 or 256"),
        (["--config", "no/such.toml"], "No such file"),
        (["--preset", "huge"], "one of smoke, default"),
    ],
)
def test_wrong_input_ends_in_one_clear_line(arguments: list[str], message: str, tmp_path: Path, capfd) -> None:
    assert local_runner.main(["--workspace", str(tmp_path / "ws"), *arguments]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: Expected ")
    assert message in error
    assert error.count("\n") == 1


def test_settings_come_from_the_file_that_the_environment_names(tmp_path: Path, monkeypatch, capfd) -> None:
    (tmp_path / "own.toml").write_text("[training]\nepoch = 3\n")
    monkeypatch.setenv("TFX_VISION_CONFIG", str(tmp_path / "own.toml"))
    assert local_runner.main(["--workspace", str(tmp_path / "ws")]) == 2
    assert f"{tmp_path / 'own.toml'}. Received: `training.epoch`" in capfd.readouterr().err
    assert local_runner.main(["--workspace", str(tmp_path / "ws"), "--config", "no/such.toml"]) == 2
    assert "no/such.toml" in capfd.readouterr().err


def test_empty_class_ends_in_one_clear_line(images: Path, tmp_path: Path, capfd) -> None:
    folder = shutil.copytree(images, tmp_path / "shapes")
    (folder / "hexagon").mkdir()
    assert run(tmp_path / "ws", "--data", str(folder))[0] == 2
    error = capfd.readouterr().err
    assert "class 'hexagon' without any" in error
    assert error.count("\n") == 1


@pytest.mark.one_stack
def test_failed_run_leaves_no_verdict_of_an_earlier_one(workspace: Path, first_run, tmp_path: Path) -> None:
    records = shutil.copytree(first_run[0] / "tfrecords", tmp_path / "records")
    (records / "labels.txt").write_text("circle\nhexagon\n")  # the trainer meets a label that is not in the list
    code, result = run(workspace, "--data", str(records))
    assert code == 1
    assert result["exit_code"] == 1
    assert not (workspace / "report.html").exists()
    assert "Traceback" in (workspace / "run.log").read_text()


def test_second_run_at_once_is_kept_out(tmp_path: Path, capfd) -> None:
    (tmp_path / "ws").mkdir()
    with open(tmp_path / "ws" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(tmp_path / "ws", "--data", str(tmp_path))[0] == 1
    assert "that is using it" in capfd.readouterr().err


def test_command_line_prints_progress_and_nothing_of_tensorflow(images: Path, tmp_path: Path) -> None:
    command = [sys.executable, "local_runner.py", *SMOKE, "--data", str(images), "--workspace", str(tmp_path / "ws")]
    environment = {key: value for key, value in os.environ.items() if key != "TF_CPP_MIN_LOG_LEVEL"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for name in COMPONENTS:
        assert name in done.stdout
    assert "Blessed" in done.stdout
    assert "tensorflow" not in done.stdout.lower()


@pytest.mark.one_stack
def test_terminal_shows_live_progress_and_nothing_of_tensorflow(images: Path, tmp_path: Path) -> None:
    command = [sys.executable, "local_runner.py", *SMOKE, "--data", str(images), "--workspace", str(tmp_path / "ws")]
    environment = {key: value for key, value in os.environ.items() if key != "TF_CPP_MIN_LOG_LEVEL"} | {"TERM": "xterm"}
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=terminal, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):  # how a pseudo-terminal says that its other end is closed
            while chunk := os.read(main, 65536):
                shown += chunk
        assert process.wait() == 0
    os.close(main)
    text = shown.decode()
    assert "\x1b[" in text
    assert "▶" in text  # the mark of a step at work, which only the live table has
    assert "✓" in text
    assert "Blessed" in text
    assert "tensorflow" not in text.lower().replace("loading tensorflow", "")
    assert "warning" not in text.lower()


def test_image_that_the_model_has_never_seen_keeps_its_split(first_run, images: Path, tmp_path: Path) -> None:
    """Another order of the input and another folder give the same records in the same splits."""
    from data.prepare import DataConfig, prepare

    moved = shutil.copytree(images, tmp_path / "elsewhere")
    report = prepare(DataConfig(input=str(moved), valid_fraction=0.2, test_fraction=0.3), str(tmp_path / "records"))
    assert report["counts"] == {split: first_run[2]["counts"][split] for split in SPLITS}
    with Image.open(next(moved.glob("*/*"))) as image:
        assert image.size == (72, 72)


def _log(workspace: Path) -> str:
    return (workspace / "run.log").read_text()


@pytest.mark.one_stack
def test_fine_tuning_a_search_and_a_warm_start_run_through(images: Path, tmp_path: Path) -> None:
    settings = ["--data", str(images), "--set", "training.epochs=5", "--set", "training.warm_start=true"]
    code, result = run(
        tmp_path / "run",
        *settings,
        *("--set", "fine_tuning.epochs=1", "--set", "tuner.trials=1", "--set", 'export.tflite=["float16"]'),
    )
    assert code == 0
    names = [step["name"] for step in result["components"]]
    assert names.index("Tuner") < names.index("Trainer")
    assert names.index("WarmStartModel") < names.index("Trainer")
    log = _log(tmp_path / "run")
    assert "hyperparameters: " in log
    assert "starting from the blessed model" not in log  # there is none yet
    pushed = Path(result["pushed_model"])
    assert json.loads((pushed / "assets.extra" / "tflite" / "tflite.json").read_text())["float16"]["agreement"] > 0.9
    assert list((tmp_path / "run" / "cache" / "embeddings").iterdir())
    (history,) = (tmp_path / "run" / "pipeline" / "Trainer" / "model_run").glob("*/history.json")
    assert json.loads(history.read_text())["stage"][-1] == "fine-tuning"

    code, again = run(tmp_path / "run", *settings)

    assert code == 0
    assert f"starting from the blessed model {tmp_path / 'run' / 'pipeline' / 'Trainer' / 'model'}" in _log(tmp_path / "run")
    assert again["pushed_model"] != result["pushed_model"]


@pytest.mark.one_stack
@pytest.mark.parametrize(("sign", "code"), [pytest.param(signal.SIGKILL, -9, marks=pytest.mark.long), (signal.SIGTERM, 143)])
def test_run_that_was_stopped_in_the_trainer_goes_on_there(
    images: Path, tmp_path: Path, sign: signal.Signals, code: int
) -> None:
    workspace = tmp_path / "run"
    command = [sys.executable, "local_runner.py", *SMOKE, "--data", str(images), "--workspace", str(workspace)]
    command += ["--set", "training.epochs=120", "--set", "training.patience=120"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    checkpoints = workspace / "pipeline" / "Trainer" / "model_run"
    while not list(checkpoints.glob("*/checkpoints/head/checkpoint")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(sign)
    _, said = process.communicate()
    assert process.returncode == code
    if sign == signal.SIGTERM:
        assert said == "stopped by SIGTERM; a rerun goes on from here\n"
        assert json.loads((workspace / "run.json").read_text())["exit_code"] == code
    assert pushed_versions(workspace) == []

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    log = _log(workspace)
    assert "going on from the checkpoints of" in log
    assert "head goes on from epoch" in log
    assert len(pushed_versions(workspace)) == 1
