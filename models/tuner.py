"""`tuner_fn`, the Tuner component's entry: searches the settings that matter most with KerasTuner.

A trial trains as the Trainer would, with a few settings changed. The embeddings are cached, so without fine-tuning a trial
takes seconds. The Trainer then takes the best values in the place of its own settings. The search lies beside the cache of
the embeddings, so that a killed one goes on, and a finished one found again gives its result at once.
"""

import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
from typing import Any, NamedTuple

import keras
import keras_tuner
import pydantic

from data.errors import InputError
from data.features import TRAIN_SPLIT, VALID_SPLIT
from models.devices import Devices, configure_devices
from models.embeddings import Images, find_images
from models.loop import CHECKPOINTS, DivergedError, remove_checkpoints
from models.trainer import CONFIG_KEY, TrainerConfig, train_classifier, with_hyperparameters
from preprocessing.augment import STRENGTHS, AugmentationConfig, resolve_augmentation
from preprocessing.transform import TransformGraph

logger = logging.getLogger("tfx_vision")

TUNER_CONFIG_KEY = "tuner"
SEARCH_FOLDER = "search"  # beside the cache of the embeddings
_PROJECT = "trials"
_RUN_FOLDER = "run"  # of a trial


class TunerConfig(pydantic.BaseModel):
    """The search for hyperparameters; off where `trials` is 0.

    The learning rate, weight decay and mixup of the head are searched, and its dropout where it has hidden units; where the
    backbone is fine-tuned, also its learning rate, how much of it is unfrozen, and the strength of the augmentation. A weight
    decay of 0 stays 0. Trials start from the weights of `model.weights`, whatever `training.warm_start` says.

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


class FatalInputError(InputError, keras_tuner.errors.FatalError):
    """An InputError that ends the search too, where KerasTuner would go on with the next trial."""


class _Oracle(keras_tuner.oracles.BayesianOptimizationOracle):
    """Tries the settings themselves first, so that a search cannot end with worse ones."""

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        if int(trial_id) > 0:
            return super().populate_space(trial_id)
        return {"status": keras_tuner.engine.trial.TrialStatus.RUNNING, "values": self.hyperparameters.values}


class Search(keras_tuner.engine.base_tuner.BaseTuner):
    """Runs the trials; killed and started anew in the same folder, it goes on with the trial that it was at.

    Only a loss that becomes NaN is a failed trial, after which the next one follows; every other error ends the search.
    """

    def __init__(self, job: _Job, settings: TunerConfig, *, folder: str):
        """Prepares the search.

        Args:
          job: what each trial trains on.
          settings: number of trials and the seed.
          folder: of the search; local or gs://.
        """
        monitor = job.config.training.monitor
        oracle = _Oracle(
            objective=keras_tuner.Objective(monitor, "min" if monitor == "val_loss" else "max"),
            max_trials=settings.trials,
            hyperparameters=search_space(job.config, num_images=job.train.num_images),
            seed=settings.seed,
            max_consecutive_failed_trials=settings.trials + 1,  # never: `get_best_hyperparameters` says it better
        )
        super().__init__(oracle, directory=folder, project_name=_PROJECT)
        self._job = job

    def search(self, *fit_args: Any, **fit_kwargs: Any) -> None:
        """Runs the trials that are left.

        Raises:
          FatalInputError: where a trial raises an InputError.
          keras_tuner.errors.FatalError: where it raises another error than of a loss that becomes NaN.
        """
        try:
            super().search(*fit_args, **fit_kwargs)
        except BaseException:
            if "KERASTUNER_ORACLE_IP" in os.environ:
                # On Vertex AI, TFX runs the oracle in a child of this process, which would wait for the trial's end for ever.
                for oracle in multiprocessing.active_children():
                    oracle.terminate()
            raise

    def run_trial(self, trial: keras_tuner.engine.trial.Trial, *fit_args: Any, **fit_kwargs: Any) -> dict[str, float]:
        """Trains with a trial's values; returns the metric that is watched, at its best in the last stage of training.

        Only the last stage's, as each stage's loss has its own label smoothing. Conservative where that is fine-tuning, which
        keeps the weights of stage one if none of its own are better.
        """
        job = self._job
        logger.info("trial %s of %d", trial.trial_id, self.oracle.max_trials)
        config = with_hyperparameters(job.config, trial.hyperparameters.values)
        folder = os.path.join(self.get_trial_dir(trial.trial_id), _RUN_FOLDER)
        try:
            classifier = train_classifier(config, job.devices, job.transform, job.train, job.valid, folder=folder)
        except DivergedError as error:
            raise keras_tuner.errors.FailedTrialError(str(error)) from error
        except InputError as error:
            raise FatalInputError(str(error)) from error
        except Exception as error:  # KerasTuner would swallow it
            raise keras_tuner.errors.FatalError(str(error) or type(error).__name__) from error
        monitor, stages = config.training.monitor, classifier.history["stage"]
        values = [value for value, stage in zip(classifier.history[monitor], stages, strict=True) if stage == stages[-1]]
        return {monitor: min(values) if monitor == "val_loss" else max(values)}

    def on_trial_end(self, trial: keras_tuner.engine.trial.Trial) -> None:
        """Writes down the trial, and removes what only its training needed."""
        super().on_trial_end(trial)
        remove_checkpoints(os.path.join(self.get_trial_dir(trial.trial_id), _RUN_FOLDER, CHECKPOINTS))
        keras.backend.clear_session()

    def get_best_hyperparameters(self, num_trials: int = 1) -> list[keras_tuner.HyperParameters]:
        """Returns the values of the best trials, the best one first; TFX calls it after the search.

        Raises:
          ValueError: if no trial has ended with a finite loss.
        """
        completed = keras_tuner.engine.trial.TrialStatus.COMPLETED
        best = [trial for trial in self.oracle.get_best_trials(num_trials) if trial.status == completed]
        if not best:
            raise ValueError(
                f"Expected one trial of {self.oracle.max_trials} to end with a finite loss. Received: none. Lower "
                "training.learning_rate and fine_tuning.backbone_learning_rate, or look for broken images."
            )
        return [trial.hyperparameters for trial in best]


def search_space(config: TrainerConfig, *, num_images: int) -> keras_tuner.HyperParameters:
    """Says what is searched, by the names of the settings, `section.key`; the settings' own values are tried first.

    Args:
      config: the settings; a range that one lies outside of is widened to it.
      num_images: of the training, which decide an augmentation of the strength `auto`.
    """
    space = keras_tuner.HyperParameters()

    def number(name: str, low: float, high: float, *, default: float, is_log: bool = False) -> None:
        sampling = "log" if is_log else "linear"
        space.Float(name, min(low, default), max(high, default), default=default, sampling=sampling)

    number("training.learning_rate", 1e-4, 1e-2, default=config.training.learning_rate, is_log=True)
    if config.training.weight_decay:  # 0 is on no logarithmic range
        number("training.weight_decay", 1e-3, 1e-1, default=config.training.weight_decay, is_log=True)
    number("training.mixup", 0.0, 0.8, default=config.training.mixup)
    if config.model.hidden_units:  # whose outputs are dropped
        number("model.dropout", 0.0, 0.7, default=config.model.dropout)
    if config.fine_tuning.epochs:
        rate = config.fine_tuning.backbone_learning_rate
        number("fine_tuning.backbone_learning_rate", 1e-5, 1e-3, default=rate, is_log=True)
        number("fine_tuning.unfrozen", 0.1, 1.0, default=config.fine_tuning.unfrozen)
        strength = resolve_strength(config.augmentation, num_images=num_images)
        space.Choice("augmentation.strength", list(STRENGTHS), default=strength)
    return space


def resolve_strength(augmentation: AugmentationConfig, *, num_images: int) -> str:
    """Returns the strength of an augmentation; for `auto`, one that does the same with that many training images."""
    if augmentation.strength != "auto":
        return augmentation.strength
    resolved = resolve_augmentation(augmentation, num_images=num_images)
    named = {name: augmentation.model_copy(update={"strength": name}) for name in STRENGTHS}
    return next(name for name, same in named.items() if resolve_augmentation(same, num_images=num_images) == resolved)


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
    return TunerFnResult(Search(job, settings, folder=_search_folder(job, settings) or fn_args.working_dir), {})


def _search_folder(job: _Job, settings: TunerConfig) -> str:
    """Names a folder that outlives the execution, where TFX removes its own `working_dir`; empty without a cache."""
    if not job.config.cache_dir:
        return ""
    parts = [job.config.model_dump(mode="json"), settings.model_dump(mode="json"), job.train.fingerprint, job.valid.fingerprint]
    fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    return os.path.join(os.path.dirname(job.config.cache_dir.rstrip("/")), SEARCH_FOLDER, fingerprint)
