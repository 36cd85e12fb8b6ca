import json
import multiprocessing
import os
import time
from pathlib import Path
from types import SimpleNamespace

import keras_tuner
import pytest
from conftest import trainer_config

import models.tuner
from data.errors import InputError, exit_code
from models.loop import DivergedError
from models.tuner import Search, TunerConfig, resolve_strength, search_space, tuner_fn
from preprocessing.augment import MIN_IMAGES_MEDIUM, MIN_IMAGES_STRONG, AugmentationConfig


@pytest.fixture
def arguments(tmp_path, shape_records, transform_graph):
    """What TFX passes to `tuner_fn`, for a search of two trials over the head's training."""
    config = trainer_config(str(tmp_path / "cache" / "embeddings"), fine_tuning={"epochs": 0}, training={"epochs": 2})
    return SimpleNamespace(
        custom_config={"trainer": config.model_dump(mode="json"), "tuner": {"trials": 2}},
        transform_graph_path=transform_graph,
        train_files=[shape_records["train"]],
        eval_files=[shape_records["valid"]],
        working_dir=str(tmp_path / "execution"),
    )


def replace_training(monkeypatch, train):
    """Puts `train(config)`, which returns a history or raises, in the place of a trial's training."""
    monkeypatch.setattr(
        models.tuner, "train_classifier", lambda config, *rest, **options: SimpleNamespace(history=train(config))
    )


def test_search_space_begins_with_the_settings_themselves():
    config = trainer_config(training={"learning_rate": 2e-3, "mixup": 0.1}, fine_tuning={"epochs": 0})

    values = search_space(config, num_images=44).values

    assert values["training.learning_rate"] == pytest.approx(2e-3)
    assert values["training.mixup"] == pytest.approx(0.1)
    assert not any(name.startswith(("fine_tuning", "augmentation")) for name in values)


def test_search_space_has_the_backbone_where_that_is_trained():
    config = trainer_config(fine_tuning={"epochs": 3, "unfrozen": 0.7}, augmentation={"strength": "strong"})

    values = search_space(config, num_images=44).values

    assert values["fine_tuning.unfrozen"] == pytest.approx(0.7)
    assert values["augmentation.strength"] == "strong"
    assert "fine_tuning.backbone_learning_rate" in values


def test_search_space_is_widened_to_the_settings():
    config = trainer_config(
        training={"learning_rate": 0.1, "weight_decay": 1e-5, "mixup": 1.0},
        model={"hidden_units": 8, "dropout": 0.9},
        fine_tuning={"epochs": 1, "backbone_learning_rate": 1e-6, "unfrozen": 0.05},
        augmentation={"strength": "none"},
    )

    space = search_space(config, num_images=44)

    assert space.values == {
        "training.learning_rate": 0.1,
        "training.weight_decay": 1e-5,
        "training.mixup": 1.0,
        "model.dropout": 0.9,
        "fine_tuning.backbone_learning_rate": 1e-6,
        "fine_tuning.unfrozen": 0.05,
        "augmentation.strength": "none",
    }
    ranges = {parameter.name: parameter for parameter in space.space}
    assert (ranges["training.learning_rate"].min_value, ranges["training.learning_rate"].max_value) == (1e-4, 0.1)
    assert (ranges["training.weight_decay"].min_value, ranges["training.weight_decay"].max_value) == (1e-5, 1e-1)
    assert ranges["augmentation.strength"].values == ["none", "light", "medium", "strong"]


def test_search_space_leaves_out_a_weight_decay_of_zero():
    assert "training.weight_decay" not in search_space(trainer_config(training={"weight_decay": 0.0}), num_images=44).values


def test_search_space_has_dropout_only_with_hidden_units():
    assert "model.dropout" in search_space(trainer_config(model={"hidden_units": 8}), num_images=44).values
    assert "model.dropout" not in search_space(trainer_config(model={"hidden_units": 0}), num_images=44).values


@pytest.mark.parametrize(
    ("num_images", "strength"), [(44, "light"), (MIN_IMAGES_MEDIUM, "medium"), (MIN_IMAGES_STRONG, "strong")]
)
def test_resolve_strength_decides_auto_by_the_number_of_images(num_images, strength):
    assert resolve_strength(AugmentationConfig(strength="auto"), num_images=num_images) == strength
    assert resolve_strength(AugmentationConfig(strength="none"), num_images=num_images) == "none"


def test_tuner_fn_finds_values_that_the_trainer_takes(arguments):
    result = tuner_fn(arguments)
    result.tuner.search(**result.fit_kwargs)

    trials = result.tuner.oracle.get_best_trials(2)
    assert [trial.status for trial in trials] == ["COMPLETED"] * 2
    assert trials[0].score <= trials[1].score
    assert trials[0].hyperparameters.values != trials[1].hyperparameters.values
    by_id = {trial.trial_id: trial for trial in trials}
    assert by_id["0"].hyperparameters.values == pytest.approx(search_space(result.tuner._job.config, num_images=44).values)
    # As TFX writes them down, and the Trainer reads them.
    best = json.loads(json.dumps(result.tuner.get_best_hyperparameters()[0].get_config()))
    assert best["values"] == trials[0].hyperparameters.values


@pytest.mark.one_stack
def test_search_goes_on_where_it_was_stopped(arguments, monkeypatch):
    class Stopped(BaseException):
        """As a kill ends it."""

    run_trial = Search.run_trial
    run = []

    def stop_at_the_second(self, trial, *rest, **options):
        if run:
            raise Stopped
        run.append(trial.trial_id)
        return run_trial(self, trial, *rest, **options)

    monkeypatch.setattr(Search, "run_trial", stop_at_the_second)
    tuner = tuner_fn(arguments).tuner
    with pytest.raises(Stopped):
        tuner.search()

    def count(self, trial, *rest, **options):
        run.append(trial.trial_id)
        return run_trial(self, trial, *rest, **options)

    monkeypatch.setattr(Search, "run_trial", count)
    arguments.working_dir += "-2"  # as TFX gives each execution another
    result = tuner_fn(arguments)
    result.tuner.search()

    assert len(run) == 2
    assert run[1] != run[0]
    assert len(result.tuner.oracle.get_best_trials(3)) == 2


def test_search_that_is_finished_gives_its_result_at_once(arguments, monkeypatch):
    replace_training(monkeypatch, lambda config: {"val_loss": [config.training.mixup], "stage": ["head"]})
    first = tuner_fn(arguments).tuner
    first.search()

    def never(config):
        raise AssertionError("a trial was run")

    replace_training(monkeypatch, never)
    second = tuner_fn(arguments).tuner
    second.search()

    assert second.get_best_hyperparameters()[0].values == first.get_best_hyperparameters()[0].values


def test_search_lies_beside_the_cache_by_what_it_depends_on(arguments, tmp_path):
    def folder(**changes):
        arguments.__dict__.update(changes)
        return tuner_fn(arguments).tuner.directory

    first = folder()
    assert os.path.dirname(first) == str(tmp_path / "cache" / "search")
    assert folder() == first
    trainer = arguments.custom_config["trainer"]
    others = [
        folder(custom_config={"trainer": trainer, "tuner": {"trials": 3}}),
        folder(custom_config={"trainer": trainer | {"code": "other"}, "tuner": {"trials": 2}}),
        folder(eval_files=arguments.train_files),
    ]
    assert len({first, *others}) == 4
    assert folder(custom_config={"trainer": trainer | {"cache_dir": ""}, "tuner": {"trials": 2}}) == arguments.working_dir


def test_search_keeps_no_checkpoint(arguments):
    tuner = tuner_fn(arguments).tuner
    tuner.search()

    folder = Path(tuner.project_dir)
    assert len(list(folder.glob("trial_*/run/logs"))) == 2
    assert not list(folder.glob("trial_*/run/checkpoints"))


def test_search_ends_with_a_wrong_input(arguments, monkeypatch):
    run = []

    def fail(config):
        run.append(config)
        raise InputError("Expected a backbone. Received: none.")

    replace_training(monkeypatch, fail)

    with pytest.raises(InputError, match="Expected a backbone") as caught:
        tuner_fn(arguments).tuner.search()

    assert exit_code(caught.value) == 2
    assert len(run) == 1


def test_search_ends_with_any_other_error(arguments, monkeypatch):
    def fail(config):
        raise ValueError("Expected an image of every class.")

    replace_training(monkeypatch, fail)

    with pytest.raises(keras_tuner.errors.FatalError, match="an image of every class"):
        tuner_fn(arguments).tuner.search()


def test_search_that_fails_on_vertex_leaves_no_oracle_waiting(arguments, monkeypatch):
    def fail(config):
        raise InputError("Expected a backbone.")

    replace_training(monkeypatch, fail)
    tuner = tuner_fn(arguments).tuner
    for name, value in {"ORACLE_IP": "localhost", "ORACLE_PORT": "1", "TUNER_ID": "tfx-tuner-workerpool0-0"}.items():
        monkeypatch.setenv(f"KERASTUNER_{name}", value)
    oracle = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    oracle.start()
    try:
        with pytest.raises(InputError):
            tuner.search()
        oracle.join(30)
        assert not oracle.is_alive()
    finally:
        oracle.kill()


def test_search_goes_on_after_a_loss_that_is_no_number(arguments, monkeypatch):
    rates = []

    def diverge_first(config):
        rates.append(config.training.learning_rate)
        if len(rates) == 1:
            raise DivergedError("Expected a finite loss.")
        return {"val_loss": [0.5], "stage": ["head"]}

    replace_training(monkeypatch, diverge_first)
    tuner = tuner_fn(arguments).tuner
    tuner.search()

    (best,) = tuner.get_best_hyperparameters(2)
    assert best.values["training.learning_rate"] == rates[1]


@pytest.mark.one_stack
@pytest.mark.parametrize("trials", [1, 4])
def test_search_says_that_every_trial_diverged(arguments, monkeypatch, trials):
    def diverge(config):
        raise DivergedError("Expected a finite loss.")

    replace_training(monkeypatch, diverge)
    arguments.custom_config["tuner"] = {"trials": trials}
    tuner = tuner_fn(arguments).tuner
    tuner.search()

    with pytest.raises(ValueError, match=f"Expected one trial of {trials} to end with a finite loss. Received: none. Lower"):
        tuner.get_best_hyperparameters()


@pytest.mark.parametrize(("monitor", "score"), [("val_loss", 0.7), ("val_accuracy", 0.6)])
def test_search_judges_by_the_last_stage(arguments, monkeypatch, monitor, score):
    stages = ["head", "head", "fine-tuning", "fine-tuning"]
    history = {"val_loss": [0.5, 0.4, 0.8, 0.7], "val_accuracy": [0.8, 0.9, 0.5, 0.6], "stage": stages}
    replace_training(monkeypatch, lambda config: history)
    arguments.custom_config["trainer"]["training"]["monitor"] = monitor
    tuner = tuner_fn(arguments).tuner
    tuner.search()

    assert tuner.oracle.get_best_trials()[0].score == score


def test_tuner_is_a_custom_job_with_a_gpu_on_vertex():
    from tfx.types import Channel, standard_artifacts

    from pipeline.config import Config
    from pipeline.engines import Variants
    from pipeline.records import Records

    config = Config.model_validate(
        {"tuner": {"trials": 2}, "vertex": {"project": "my-project", "bucket": "gs://bucket", "image": "image:1"}}
    )
    inputs = {"examples": Channel(type=standard_artifacts.Examples)}

    records = Records(folder="gs://bucket/records", class_names=("a", "b"), columns=(), schema_fingerprint="")

    local, on_vertex = (Variants(config, records, engine).tuner({"code": "weights-1"}, inputs) for engine in (None, "vertex"))

    assert local.executor_spec.class_path == "tfx.components.tuner.executor.Executor"
    assert "ai_platform_tuning_args" not in json.loads(local.exec_properties["custom_config"])
    assert on_vertex.id == "Tuner"
    assert on_vertex.executor_spec.class_path == "pipeline.custom_job.CustomJobTunerExecutor"
    settings = json.loads(on_vertex.exec_properties["custom_config"])
    assert settings["ai_platform_enable_vertex"] is True
    assert settings["ai_platform_vertex_region"] == config.vertex.region
    (pool,) = settings["ai_platform_tuning_args"]["job_spec"]["worker_pool_specs"]
    assert pool["machine_spec"]["accelerator_type"] == "NVIDIA_TESLA_T4"
    assert settings["tuner"]["trials"] == 2
    assert settings["trainer"]["code"].startswith("weights-1-")


def test_tuner_fn_shortens_the_fine_tuning_of_a_trial(arguments):
    config = trainer_config(fine_tuning={"epochs": 9})
    arguments.custom_config = {"trainer": config.model_dump(mode="json"), "tuner": {"trials": 1, "fine_tuning_epochs": 2}}

    assert tuner_fn(arguments).tuner._job.config.fine_tuning.epochs == 2


def test_tuner_config_is_off_by_default():
    assert TunerConfig().trials == 0
