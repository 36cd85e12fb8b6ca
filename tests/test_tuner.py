import json
from types import SimpleNamespace

import pytest
from conftest import trainer_config

from models.tuner import Search, TunerConfig, search_space, tuner_fn


@pytest.fixture
def arguments(tmp_path, shape_records, transform_graph):
    """What TFX passes to `tuner_fn`, for a search of two trials over the head's training."""
    config = trainer_config(str(tmp_path / "cache"), fine_tuning={"epochs": 0}, training={"epochs": 2})
    return SimpleNamespace(
        custom_config={"trainer": config.model_dump(mode="json"), "tuner": {"trials": 2}},
        transform_graph_path=transform_graph,
        train_files=[shape_records["train"]],
        eval_files=[shape_records["valid"]],
        working_dir=str(tmp_path / "search"),
    )


def test_search_space_begins_with_the_settings_themselves():
    config = trainer_config(training={"learning_rate": 2e-3, "mixup": 0.1}, fine_tuning={"epochs": 0})

    values = search_space(config).values

    assert values["training.learning_rate"] == pytest.approx(2e-3)
    assert values["training.mixup"] == pytest.approx(0.1)
    assert not any(name.startswith(("fine_tuning", "augmentation")) for name in values)


def test_search_space_has_the_backbone_where_that_is_trained():
    config = trainer_config(fine_tuning={"epochs": 3, "unfrozen": 0.7}, augmentation={"strength": "strong"})

    values = search_space(config).values

    assert values["fine_tuning.unfrozen"] == pytest.approx(0.7)
    assert values["augmentation.strength"] == "strong"
    assert "fine_tuning.backbone_learning_rate" in values


def test_tuner_fn_finds_values_that_the_trainer_takes(arguments):
    result = tuner_fn(arguments)
    result.tuner.search(**result.fit_kwargs)

    trials = result.tuner.oracle.get_best_trials(2)
    assert [trial.status for trial in trials] == ["COMPLETED"] * 2
    assert trials[0].score <= trials[1].score
    assert trials[0].hyperparameters.values != trials[1].hyperparameters.values
    by_id = {trial.trial_id: trial for trial in trials}
    assert by_id["0"].hyperparameters.values == pytest.approx(search_space(result.tuner._job.config).values)
    # As TFX writes them down, and the Trainer reads them.
    best = json.loads(json.dumps(result.tuner.get_best_hyperparameters()[0].get_config()))
    assert best["values"] == trials[0].hyperparameters.values


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
    result = tuner_fn(arguments)
    result.tuner.search()

    assert len(run) == 2
    assert run[1] != run[0]
    assert len(result.tuner.oracle.get_best_trials(3)) == 2


def test_tuner_fn_shortens_the_fine_tuning_of_a_trial(arguments):
    config = trainer_config(fine_tuning={"epochs": 9})
    arguments.custom_config = {"trainer": config.model_dump(mode="json"), "tuner": {"trials": 1, "fine_tuning_epochs": 2}}

    assert tuner_fn(arguments).tuner._job.config.fine_tuning.epochs == 2


def test_tuner_config_is_off_by_default():
    assert TunerConfig().trials == 0
