"""`tuner_fn`, the Tuner component's entry: searches the settings that matter most with KerasTuner.

A trial trains as the Trainer would, with a few settings changed. The embeddings are cached, so without fine-tuning a trial
takes seconds. The Trainer then takes the best values in the place of its own settings.
"""

import dataclasses
import logging
import os
from typing import Any, NamedTuple

import keras_tuner
import pydantic

from data.features import TRAIN_SPLIT, VALID_SPLIT
from models.devices import Devices, configure_devices
from models.embeddings import Images, find_images
from models.trainer import CONFIG_KEY, TrainerConfig, train_classifier, with_hyperparameters
from preprocessing.transform import TransformGraph

logger = logging.getLogger("tfx_vision")

TUNER_CONFIG_KEY = "tuner"
_PROJECT = "search"


class TunerConfig(pydantic.BaseModel):
    """The search for hyperparameters; off where `trials` is 0.

    The learning rate, weight decay and mixup of the head are searched, and its dropout; where the backbone is fine-tuned, also
    its learning rate, how much of it is unfrozen, and the strength of the augmentation.

    Attributes:
      trials: settings to try.
      fine_tuning_epochs: of a trial, at most; fewer than the Trainer's make the search cheaper.
      seed: of the search.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    trials: int = pydantic.Field(0, ge=0)
    fine_tuning_epochs: int = pydantic.Field(3, ge=1)
    seed: int = pydantic.Field(0, ge=0)


class TunerFnResult(NamedTuple):
    """What TFX's Tuner expects of `tuner_fn`: its own class of this name would bring TFX with it."""

    tuner: keras_tuner.engine.base_tuner.BaseTuner
    fit_kwargs: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Job:
    """What each trial trains on."""

    config: TrainerConfig
    devices: Devices
    transform: TransformGraph
    train: Images
    valid: Images


class _Oracle(keras_tuner.oracles.BayesianOptimizationOracle):
    """Tries the settings themselves first, so that a search cannot end with worse ones."""

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        if int(trial_id) > 0:
            return super().populate_space(trial_id)
        return {"status": keras_tuner.engine.trial.TrialStatus.RUNNING, "values": self.hyperparameters.values}


class Search(keras_tuner.engine.base_tuner.BaseTuner):
    """Runs the trials; killed and started anew in the same folder, it goes on with the trial that it was at."""

    def __init__(self, job: _Job, settings: TunerConfig, *, folder: str):
        """Prepares the search.

        Args:
          job: what each trial trains on.
          settings: number of trials and the seed.
          folder: of the search; local.
        """
        monitor = job.config.training.monitor
        oracle = _Oracle(
            objective=keras_tuner.Objective(monitor, "min" if monitor == "val_loss" else "max"),
            max_trials=settings.trials,
            hyperparameters=search_space(job.config),
            seed=settings.seed,
        )
        super().__init__(oracle, directory=folder, project_name=_PROJECT)
        self._job = job

    def run_trial(self, trial: keras_tuner.engine.trial.Trial, *fit_args: Any, **fit_kwargs: Any) -> dict[str, float]:
        """Trains with a trial's values; returns the metric that is watched, at its best."""
        job = self._job
        logger.info("trial %s of %d", trial.trial_id, self.oracle.max_trials)
        config = with_hyperparameters(job.config, trial.hyperparameters.values)
        folder = os.path.join(self.get_trial_dir(trial.trial_id), "run")
        classifier = train_classifier(config, job.devices, job.transform, job.train, job.valid, folder=folder)
        monitor = config.training.monitor
        values = classifier.history[monitor]
        return {monitor: min(values) if monitor == "val_loss" else max(values)}


def search_space(config: TrainerConfig) -> keras_tuner.HyperParameters:
    """Says what is searched, by the names of the settings, `section.key`; the settings' own values are tried first."""
    space = keras_tuner.HyperParameters()

    def number(name: str, low: float, high: float, *, default: float, is_log: bool = False) -> None:
        space.Float(name, low, high, default=min(max(default, low), high), sampling="log" if is_log else "linear")

    number("training.learning_rate", 1e-4, 1e-2, default=config.training.learning_rate, is_log=True)
    number("training.weight_decay", 1e-3, 1e-1, default=config.training.weight_decay, is_log=True)
    number("training.mixup", 0.0, 0.8, default=config.training.mixup)
    number("model.dropout", 0.0, 0.7, default=config.model.dropout)
    if config.fine_tuning.epochs:
        rate = config.fine_tuning.backbone_learning_rate
        number("fine_tuning.backbone_learning_rate", 1e-5, 1e-3, default=rate, is_log=True)
        number("fine_tuning.unfrozen", 0.1, 1.0, default=config.fine_tuning.unfrozen)
        strengths = ["light", "medium", "strong"]
        strength = config.augmentation.strength
        space.Choice("augmentation.strength", strengths, default=strength if strength in strengths else "medium")
    return space


def tuner_fn(fn_args: Any) -> TunerFnResult:
    """Prepares the search; TFX calls it.

    Args:
      fn_args: `tfx.components.FnArgs`; its `custom_config` holds a `TrainerConfig` under `trainer` and a `TunerConfig` under
        `tuner`, as JSON.
    """
    config = TrainerConfig.model_validate(fn_args.custom_config[CONFIG_KEY])
    settings = TunerConfig.model_validate(fn_args.custom_config[TUNER_CONFIG_KEY])
    epochs = min(config.fine_tuning.epochs, settings.fine_tuning_epochs)
    config = config.model_copy(update={"fine_tuning": config.fine_tuning.model_copy(update={"epochs": epochs})})
    job = _Job(
        config,
        configure_devices(config.devices),
        TransformGraph(fn_args.transform_graph_path),
        find_images(fn_args.train_files, split=TRAIN_SPLIT),
        find_images(fn_args.eval_files, split=VALID_SPLIT),
    )
    return TunerFnResult(Search(job, settings, folder=fn_args.working_dir), {})
