"""What a compiled job leaves open until a run is created: data, epochs, learning rate and thresholds, as runtime parameters.

TFX's components hold their settings as one JSON text each, in which no single value can be left open. So a component of ours
turns the training's values into the hyperparameters that the Trainer takes from a Tuner, and TFX's Evaluator is given its
thresholds as parameters beside its configuration. Called by `pipeline.engines`; local runs take their settings as they are.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import tensorflow_model_analysis as tfma
from google.protobuf import json_format
from tensorflow_model_analysis.proto import config_pb2
from tfx.components.evaluator import executor as evaluator_executor
from tfx.components.evaluator.component import Evaluator
from tfx.dsl.component.experimental.annotations import OutputArtifact, Parameter
from tfx.dsl.component.experimental.decorators import component
from tfx.dsl.components.base import executor_spec
from tfx.dsl.components.base.base_beam_component import BaseBeamComponent
from tfx.orchestration.data_types import RuntimeParameter
from tfx.types import Channel, component_spec, standard_artifacts, standard_component_specs
from tfx.utils import io_utils

from data.errors import validate
from data.features import SCHEMA_FOLDER
from pipeline.config import Config
from pipeline.evaluation import eval_config, judgement_settings
from pipeline.thresholds import EvaluationConfig

RECORDS = "records"
SCHEMA = "schema"
# Parameter -> setting of the Trainer.
TRAINING = {
    "epochs": "training.epochs",
    "learning_rate": "training.learning_rate",
    "fine_tuning_epochs": "fine_tuning.epochs",
    "fine_tuning_learning_rate": "fine_tuning.learning_rate",
}
# Parameters and settings of `EvaluationConfig` alike, all in [0, 1].
THRESHOLDS = (
    *("min_accuracy", "min_class_accuracy", "min_slice_accuracy", "max_overconfidence", "max_calibration_error"),
    *("max_accuracy_drop", "max_class_accuracy_drop", "max_slice_accuracy_drop"),
)
_HYPERPARAMETERS_FILE = "best_hyperparameters.txt"  # as TFX's Tuner names it


def parameter_values(config: Config, records_folder: str) -> dict[str, str | int | float]:
    """Returns the runtime parameters of a job with the values that the configuration gives them.

    Args:
      config: every setting.
      records_folder: that `data.prepare` wrote.
    """
    values: dict[str, str | int | float] = {
        RECORDS: records_folder,
        SCHEMA: os.path.join(records_folder, SCHEMA_FOLDER),
    }
    if not config.tuner.trials:  # which finds the training's values itself
        for parameter, setting in TRAINING.items():
            section, _, key = setting.partition(".")
            values[parameter] = getattr(getattr(config, section), key)
    return values | {name: getattr(config.evaluation, name) for name in THRESHOLDS}


def runtime_parameter(name: str, values: Mapping[str, Any]) -> RuntimeParameter:
    """Returns a parameter that is set when a run is created, with its value of now as the default."""
    return RuntimeParameter(name=name, ptype=type(values[name]), default=values[name])


@component
def TrainingParameters(  # noqa: N802 (a component's name is a class name to its users)
    epochs: Parameter[int],
    learning_rate: Parameter[float],
    fine_tuning_epochs: Parameter[int],
    fine_tuning_learning_rate: Parameter[float],
    hyperparameters: OutputArtifact[standard_artifacts.HyperParameters],
) -> None:
    """Hands runtime parameters to the Trainer, as the Tuner hands over what it found.

    Args:
      epochs: of stage one, at least 1.
      learning_rate: of stage one, above 0.
      fine_tuning_epochs: of stage two; 0 for none.
      fine_tuning_learning_rate: of stage two, above 0.
      hyperparameters: KerasTuner's JSON, with the settings' names.
    """
    given = {
        "epochs": epochs,
        "learning_rate": learning_rate,
        "fine_tuning_epochs": fine_tuning_epochs,
        "fine_tuning_learning_rate": fine_tuning_learning_rate,
    }
    values = {setting: given[name] for name, setting in TRAINING.items()}
    path = os.path.join(hyperparameters.uri, _HYPERPARAMETERS_FILE)
    io_utils.write_string_file(path, json.dumps({"space": [], "values": values}))


class _EvaluatorSpec(standard_component_specs.EvaluatorSpec):
    """TFX's own, with the thresholds beside it."""

    PARAMETERS = standard_component_specs.EvaluatorSpec.PARAMETERS | {
        name: component_spec.ExecutionParameter(type=float) for name in THRESHOLDS
    }


class EvaluatorExecutor(evaluator_executor.Executor):
    """TFX's Evaluator, after the thresholds of the run are put into its configuration."""

    def Do(  # noqa: N802 (TFX's name)
        self, input_dict: dict[str, list], output_dict: dict[str, list], exec_properties: dict[str, Any]
    ) -> None:
        """Evaluates; see TFX.

        Raises:
          InputError: if a threshold is none, such as one above 1.
        """
        key = standard_component_specs.EVAL_CONFIG_KEY
        properties = dict(exec_properties)
        thresholds = {name: properties.pop(name) for name in THRESHOLDS}
        properties[key] = json_format.MessageToJson(_with_thresholds(properties[key], thresholds))
        super().Do(input_dict, output_dict, properties)


def _with_thresholds(config_json: str, thresholds: Mapping[str, float]) -> config_pb2.EvalConfig:
    compiled = json_format.Parse(config_json, config_pb2.EvalConfig())
    settings = judgement_settings(compiled)
    return eval_config(
        validate(EvaluationConfig, settings["config"] | dict(thresholds)),
        settings["class_names"],
        settings["columns"],
        image_size=settings["small_side"],
        code=settings["code"],
    )


class ParametrizedEvaluator(Evaluator):
    """TFX's Evaluator with thresholds that are set when a run is created."""

    SPEC_CLASS = _EvaluatorSpec
    EXECUTOR_SPEC = executor_spec.BeamExecutorSpec(EvaluatorExecutor)

    def __init__(
        self,
        *,
        examples: Channel,
        model: Channel,
        baseline_model: Channel | None,
        schema: Channel,
        example_splits: list[str],
        eval_config: tfma.EvalConfig,
        module_path: str,
        thresholds: Mapping[str, RuntimeParameter],
    ):
        """Takes what TFX's Evaluator takes, and a parameter for each of `THRESHOLDS`."""
        spec = _EvaluatorSpec(
            examples=examples,
            model=model,
            baseline_model=baseline_model,
            schema=schema,
            example_splits=json.dumps(example_splits),
            fairness_indicator_thresholds="null",
            eval_config=eval_config,
            module_path=module_path,
            evaluation=Channel(type=standard_artifacts.ModelEvaluation),
            blessing=Channel(type=standard_artifacts.ModelBlessing),
            **thresholds,
        )
        BaseBeamComponent.__init__(self, spec=spec)
