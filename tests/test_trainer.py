import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASS_NAMES, ROOT, find_free_ports, trainer_config
from PIL import Image

from models import trainer
from models.classifier import ModelConfig
from models.devices import DeviceConfig
from models.fine_tuning import FINE_TUNING, FineTuningConfig
from models.head import HEAD, TrainingConfig
from models.loop import EXIT_PREEMPTED
from models.tflite import ExportConfig
from models.trainer import TrainerConfig, run_fn, with_hyperparameters
from preprocessing.augment import AugmentationConfig

TIMEOUT_SECONDS = 900


@pytest.fixture(scope="session")
def make_arguments(shape_records, transform_graph):
    """Makes what TFX passes to `run_fn`; executions of one pipeline lie beside each other."""

    def make(
        root: Path, config: TrainerConfig, *, execution: int = 1, base_model: str | None = None, hyperparameters=None
    ) -> dict:
        run_dir = root / "model_run" / str(execution)
        run_dir.mkdir(parents=True, exist_ok=True)
        return {
            "custom_config": {"trainer": config.model_dump(mode="json")},
            "hyperparameters": hyperparameters,
            "transform_graph_path": transform_graph,
            "train_files": [shape_records["train"]],
            "eval_files": [shape_records["valid"]],
            "model_run_dir": str(run_dir),
            "serving_model_dir": str(root / "model" / str(execution) / "Format-Serving"),
            "base_model": base_model,
        }

    return make


# Trains, and gets a signal when it has saved the state of a stage for the first time, at its first epoch's end.
KILLED = """
import os, runpy, sys
import tensorflow as tf

script, stage, sign = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1))
save = tf.train.CheckpointManager.save

def save_and_die(manager, *arguments, **options):
    saved = save(manager, *arguments, **options)
    if os.path.basename(manager.directory) == stage:
        tf.train.CheckpointManager.save = save
        os.kill(os.getpid(), sign)
    return saved

tf.train.CheckpointManager.save = save_and_die
runpy.run_path(script, run_name="__main__")
"""


def _start(path: Path, arguments: dict, *, num_devices: int = 1, killed: tuple = (), **environment: str) -> subprocess.Popen:
    """Starts a training; `killed` are the stage in which it gets a signal, and the signal."""
    path.write_text(json.dumps(arguments | {"num_devices": num_devices}))
    script = str(ROOT / "tests" / "training_process.py")
    program = ["-c", KILLED, script, killed[0], str(int(killed[1]))] if killed else [script]
    command = [sys.executable, *program, str(path)]
    log = open(path.with_suffix(".log"), "w")  # noqa: SIM115 (the process writes to it)
    return subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT)


def _finish(path: Path, process: subprocess.Popen) -> None:
    try:
        code = process.wait(TIMEOUT_SECONDS)
    finally:
        process.kill()
    assert code == 0, path.with_suffix(".log").read_text()[-3000:]


def _history(arguments: dict) -> dict[str, list]:
    return json.loads(Path(arguments["model_run_dir"], "history.json").read_text())


def _probabilities(arguments: dict, shape_records: dict[str, str]) -> np.ndarray:
    model = tf.saved_model.load(arguments["serving_model_dir"])
    serialized = list(tf.data.TFRecordDataset(sorted(tf.io.gfile.glob(shape_records["valid"])), "GZIP"))
    return model.signatures["examples"](tf.stack(serialized))["probabilities"].numpy()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, make_arguments):
    """A whole run of both stages in this process; gives its arguments."""
    root = tmp_path_factory.mktemp("uninterrupted")
    arguments = make_arguments(root, trainer_config(str(root / "cache")))
    run_fn(SimpleNamespace(**arguments))
    return arguments


def test_run_fn_trains_both_stages_and_leaves_what_a_person_and_a_server_need(uninterrupted):
    history = _history(uninterrupted)
    assert history["stage"] == [HEAD] * 2 + [FINE_TUNING] * 3
    assert {len(values) for values in history.values()} == {5}
    run_dir = Path(uninterrupted["model_run_dir"])
    assert {"history.json", "curves.png", "logs", "reference_predictions.tfrecord.gz"} == {
        path.name for path in run_dir.iterdir()
    }
    assert Image.open(run_dir / "curves.png").size[0] > 300
    assert {path.name for path in (run_dir / "logs").iterdir()} == {HEAD, FINE_TUNING}
    model = Path(uninterrupted["serving_model_dir"])
    assert (model / "assets.extra" / "labels.txt").read_text().split() == list(CLASS_NAMES)
    assert "serving_default" in tf.saved_model.load(str(model)).signatures


def test_run_fn_gives_the_probabilities_of_training_on_every_road(uninterrupted, shape_records):
    """The exported network is folded; the one that was trained is not, and validated with the last history's loss."""
    history = _history(uninterrupted)
    probabilities = _probabilities(uninterrupted, shape_records)
    labels = np.tile([0, 1], 9)
    smooth = np.eye(2)[labels] * 0.9 + 0.05

    loss = -(smooth * np.log(probabilities)).sum(axis=1).mean()

    # The best of fine-tuning, or what it started from.
    assert loss == pytest.approx(min(history["val_loss"]), rel=1e-3)


@pytest.mark.one_stack
def test_run_fn_repeats_with_the_same_seed_and_embeddings(uninterrupted, shape_records, make_arguments, tmp_path, caplog):
    root = Path(uninterrupted["model_run_dir"]).parents[1]
    arguments = make_arguments(tmp_path, trainer_config(str(root / "cache")))

    with caplog.at_level("INFO", logger="tfx_vision"):
        run_fn(SimpleNamespace(**arguments))

    assert "fitting the projection" not in caplog.text
    np.testing.assert_allclose(_history(arguments)["val_loss"], _history(uninterrupted)["val_loss"], rtol=1e-4)
    np.testing.assert_allclose(
        _probabilities(arguments, shape_records), _probabilities(uninterrupted, shape_records), atol=1e-4
    )


@pytest.mark.one_stack
def test_run_fn_of_another_seed_gives_another_model(uninterrupted, shape_records, make_arguments, tmp_path):
    arguments = make_arguments(tmp_path, trainer_config(training={"seed": 1}, fine_tuning={"epochs": 1}))

    run_fn(SimpleNamespace(**arguments))

    assert not np.allclose(_probabilities(arguments, shape_records), _probabilities(uninterrupted, shape_records), atol=1e-4)


STAGES = {HEAD: {"training": {"epochs": 6, "patience": 6}, "fine_tuning": {"epochs": 0}}, FINE_TUNING: {}}


@pytest.mark.one_stack
@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("stage", "sign"),
    [
        (HEAD, signal.SIGKILL),
        pytest.param(FINE_TUNING, signal.SIGKILL, marks=pytest.mark.long),
        (FINE_TUNING, signal.SIGTERM),
    ],
)
def test_run_fn_goes_on_where_it_was_killed_and_ends_with_the_same_model(
    uninterrupted, shape_records, make_arguments, tmp_path, stage, sign
):
    config = trainer_config(**STAGES[stage])
    if stage == HEAD:
        uninterrupted = make_arguments(tmp_path / "uninterrupted", config)
        run_fn(SimpleNamespace(**uninterrupted))
    path = tmp_path / "killed.json"
    killed = make_arguments(tmp_path, config)
    code = _start(path, killed, killed=(stage, sign)).wait(TIMEOUT_SECONDS)
    assert code == (EXIT_PREEMPTED if sign == signal.SIGTERM else -signal.SIGKILL), path.with_suffix(".log").read_text()[-3000:]
    assert not Path(killed["serving_model_dir"]).exists()

    rerun = make_arguments(tmp_path, config, execution=2)
    path = tmp_path / "rerun.json"
    _finish(path, _start(path, rerun))

    assert f"{stage} goes on from epoch" in path.with_suffix(".log").read_text()
    expected = _history(uninterrupted)
    for name in ("loss", "val_loss"):
        np.testing.assert_allclose(_history(rerun)[name], expected[name], rtol=1e-3)
    np.testing.assert_allclose(_probabilities(rerun, shape_records), _probabilities(uninterrupted, shape_records), atol=1e-3)
    # Nothing of the killed run is left to weigh on the disk.
    assert list((tmp_path / "model_run").rglob("ckpt-*")) == []


@pytest.mark.one_stack
@pytest.mark.parametrize("step", ["fine_tune", "_export"])
def test_run_fn_that_fails_goes_on_after_the_failure_is_mended(make_arguments, tmp_path, monkeypatch, caplog, step):
    arguments = make_arguments(tmp_path, trainer_config())

    def fail(*arguments, **options):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(trainer, step, fail)
        with pytest.raises(OSError, match="no space left"):
            run_fn(SimpleNamespace(**arguments))
    shutil.rmtree(arguments["model_run_dir"])  # as TFX does
    with caplog.at_level("INFO", logger="tfx_vision"):
        run_fn(SimpleNamespace(**make_arguments(tmp_path, trainer_config(), execution=2)))

    assert "the head is trained already" in caplog.text


@pytest.mark.one_stack
@pytest.mark.end_to_end
def test_run_fn_trains_alike_on_one_device_on_two_and_on_two_machines(make_arguments, shape_records, tmp_path):
    # Without chance: dropout, depth and mixing draw for each replica on its own. The learning rates are for one replica.
    still = {"epochs": 2, "stochastic_depth": 0.0, "gradient_clip_norm": 0.0}
    rates = {"learning_rate": 3e-4, "backbone_learning_rate": 1e-4}
    one = {"fine_tuning": still | rates | {"batch_size": 8}, "augmentation": {"strength": "none"}, "model": {"dropout": 0.0}}
    two = one | {"fine_tuning": still | {name: rate / 2 for name, rate in rates.items()} | {"batch_size": 4}}
    alone = make_arguments(tmp_path / "alone", trainer_config(**one))
    mirrored = make_arguments(tmp_path / "mirrored", trainer_config(**two | {"devices": {"strategy": "mirrored"}}))
    workers = make_arguments(tmp_path / "workers", trainer_config(**two))
    addresses = [f"127.0.0.1:{port}" for port in find_free_ports(2)]
    environments = [
        {"TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})}
        for index in (0, 1)
    ]

    for name, arguments, num_devices in (("alone", alone, 1), ("mirrored", mirrored, 2)):
        path = tmp_path / f"{name}.json"
        _finish(path, _start(path, arguments, num_devices=num_devices))
    # Each worker is told another folder for the model: only the chief may fill it.
    other = workers | {"serving_model_dir": str(tmp_path / "not_the_chief")}
    paths = [tmp_path / f"worker{index}.json" for index in (0, 1)]
    processes = [
        _start(path, arguments, **environment)
        for path, arguments, environment in zip(paths, (workers, other), environments, strict=True)
    ]
    for path, process in zip(paths, processes, strict=True):
        _finish(path, process)

    expected = _history(alone)
    for arguments in (mirrored, workers):
        for name in ("loss", "val_loss"):
            np.testing.assert_allclose(_history(arguments)[name], expected[name], rtol=2e-3)
        np.testing.assert_allclose(_probabilities(arguments, shape_records), _probabilities(alone, shape_records), atol=5e-3)
    assert not Path(other["serving_model_dir"]).exists()


def test_run_fn_starts_from_an_exported_model(uninterrupted, shape_records, make_arguments, tmp_path, caplog):
    # So slow that it stays where it starts.
    slow = {"learning_rate": 1e-9, "backbone_learning_rate": 1e-9, "epochs": 1}
    config = trainer_config(training={"learning_rate": 1e-9, "epochs": 1, "seed": 5}, fine_tuning=slow)
    arguments = make_arguments(tmp_path, config, base_model=uninterrupted["serving_model_dir"])

    with caplog.at_level("INFO", logger="tfx_vision"):
        run_fn(SimpleNamespace(**arguments))

    assert f"starting from the blessed model {uninterrupted['serving_model_dir']}" in caplog.text
    np.testing.assert_allclose(
        _probabilities(arguments, shape_records), _probabilities(uninterrupted, shape_records), atol=1e-4
    )


def test_run_fn_refuses_to_start_from_another_network(uninterrupted, make_arguments, tmp_path):
    config = trainer_config(model={"num_components": 8})
    arguments = make_arguments(tmp_path, config, base_model=uninterrupted["serving_model_dir"])

    with pytest.raises(ValueError, match=r"Received: another num_components. Take the settings that it was trained with"):
        run_fn(SimpleNamespace(**arguments))


def test_run_fn_takes_what_the_tuner_found(make_arguments, tmp_path):
    found = {"space": [], "values": {"training.epochs": 1, "fine_tuning.epochs": 0}}
    arguments = make_arguments(tmp_path, trainer_config(), hyperparameters=found)

    run_fn(SimpleNamespace(**arguments))

    assert _history(arguments)["stage"] == [HEAD]


def test_with_hyperparameters_checks_the_values():
    config = with_hyperparameters(trainer_config(), {"model.dropout": 0.25, "augmentation.strength": "strong"})
    assert (config.model.dropout, config.augmentation.strength) == (0.25, "strong")

    with pytest.raises(ValueError, match="dropout"):
        with_hyperparameters(trainer_config(), {"model.dropout": 1.5})


def test_trainer_config_survives_json():
    config = trainer_config(fine_tuning={"unfrozen": 0.5}, export={})

    assert TrainerConfig.model_validate(json.loads(config.model_dump_json())) == config
    assert isinstance(config.fine_tuning, FineTuningConfig)
    assert isinstance(config.model, ModelConfig)
    assert isinstance(config.devices, DeviceConfig)
    assert isinstance(config.training, TrainingConfig)
    assert isinstance(config.augmentation, AugmentationConfig)
    assert isinstance(config.export, ExportConfig)


@pytest.fixture(autouse=True)
def _clear_session():
    yield
    keras.backend.clear_session()
