import json
from pathlib import Path

import pytest
from google.protobuf import json_format
from tfx.types import standard_artifacts, standard_component_specs

from data.errors import InputError
from models.trainer import TrainerConfig
from pipeline.config import Config, load_config
from pipeline.evaluation import eval_config, judgement_settings
from pipeline.parameters import (
    THRESHOLDS,
    TRAINING,
    EvaluatorExecutor,
    TrainingParameters,
    parameter_values,
)
from pipeline.thresholds import EvaluationConfig

CLASS_NAMES = ("daisy", "rose")


def test_parameter_values_are_those_of_the_settings():
    config = load_config(overrides=["training.epochs=7", "fine_tuning.learning_rate=0.5", "evaluation.min_accuracy=0.9"])

    values = parameter_values(config, "gs://b/records")

    assert (values["records"], values["schema"]) == ("gs://b/records", "gs://b/records/schema")
    assert (values["epochs"], values["fine_tuning_learning_rate"], values["min_accuracy"]) == (7, 0.5, 0.9)


def test_parameter_values_leave_the_training_to_the_tuner():
    values = parameter_values(load_config(overrides=["tuner.trials=2"]), "gs://b/records")

    assert not set(values) & set(TRAINING)
    assert set(THRESHOLDS) < set(values)


def test_parameters_name_settings_that_exist():
    config = Config()
    for setting in TRAINING.values():
        section, _, key = setting.partition(".")
        assert key in type(getattr(config, section)).model_fields
        assert section in TrainerConfig.model_fields
    assert set(THRESHOLDS) < set(EvaluationConfig.model_fields)


def test_training_parameters_writes_what_the_trainer_reads(tmp_path: Path):
    hyperparameters = standard_artifacts.HyperParameters()
    hyperparameters.uri = str(tmp_path)
    given = {"epochs": 3, "learning_rate": 0.01, "fine_tuning_epochs": 0, "fine_tuning_learning_rate": 0.002}

    executor = TrainingParameters.EXECUTOR_SPEC.executor_class()
    executor.Do({}, {"hyperparameters": [hyperparameters]}, given)

    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["values"] == {
        "training.epochs": 3,
        "training.learning_rate": 0.01,
        "fine_tuning.epochs": 0,
        "fine_tuning.learning_rate": 0.002,
    }


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch):
    """Runs the executor up to TFX's own; gives the configuration that TFX gets."""
    got = {}
    parent = EvaluatorExecutor.__mro__[1]
    monkeypatch.setattr(parent, "Do", lambda self, inputs, outputs, properties: got.update(properties))

    def run(config: EvaluationConfig, **thresholds: float) -> dict:
        compiled = eval_config(config, CLASS_NAMES, ("camera",), image_size=224, code="abc")
        values = {name: getattr(config, name) for name in THRESHOLDS} | thresholds
        key = standard_component_specs.EVAL_CONFIG_KEY
        EvaluatorExecutor().Do({}, {}, {key: json_format.MessageToJson(compiled), "example_splits": '["test"]', **values})
        assert set(got) == {key, "example_splits"}  # TFX knows no other
        return json_format.Parse(got[key], type(compiled)())

    return run


def test_evaluator_is_as_compiled_where_no_threshold_changes(evaluated):
    config = EvaluationConfig(min_accuracy=0.8, rare_classes=("rose",))

    assert evaluated(config) == eval_config(config, CLASS_NAMES, ("camera",), image_size=224, code="abc")


def test_evaluator_takes_the_thresholds_of_the_run(evaluated):
    config = EvaluationConfig(small_side=100, thresholds=[{"metric": "recall", "class": "rose", "min": 0.5}])

    settings = judgement_settings(evaluated(config, min_accuracy=0.95, max_accuracy_drop=0.0))

    assert settings["config"]["min_accuracy"] == 0.95
    assert settings["config"]["max_accuracy_drop"] == 0.0
    assert settings["config"]["min_class_accuracy"] == config.min_class_accuracy
    assert settings["config"]["thresholds"][0]["min"] == 0.5
    assert settings["small_side"] == 100


def test_evaluator_refuses_a_threshold_that_is_none(evaluated):
    with pytest.raises(InputError, match=r"^Expected `min_accuracy` to be valid. Received: min_accuracy=1.5"):
        evaluated(EvaluationConfig(), min_accuracy=1.5)
