"""The configuration: one TOML file for every runner, composed of what the parts declare.

Later ones win: the preset, the file, the environment (`TFX_VISION_SECTION__KEY=value`), `--set section.key=value`. Values of
the last two are TOML (`0.5`, `true`, `["a"]`); what is no TOML is taken as text. Called by both runners.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic

from data.errors import InputError, validate
from data.prepare import DataConfig
from models.backbones import BACKBONES
from models.classifier import ModelConfig
from models.devices import DeviceConfig
from models.fine_tuning import FineTuningConfig
from models.head import TrainingConfig
from models.tflite import ExportConfig
from models.tuner import TunerConfig
from pipeline.components import DataGateConfig
from pipeline.serving_check import ServingCheckConfig
from pipeline.thresholds import EvaluationConfig
from pipeline.vertex import MAX_NAME, Engine, VertexConfig
from preprocessing.augment import AugmentationConfig
from preprocessing.images import InputSpec, PreprocessingConfig

ENVIRONMENT_PREFIX = "TFX_VISION_"
CONFIG_VARIABLE = f"{ENVIRONMENT_PREFIX}CONFIG"  # the TOML file of a runner that gets no arguments
DEBUG_VARIABLE = f"{ENVIRONMENT_PREFIX}DEBUG"
_OWN_VARIABLES = (CONFIG_VARIABLE, DEBUG_VARIABLE)

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # Tests of the plumbing: a few dozen small images end to end in under a minute on two cores; the gate is wide open.
    "smoke": {
        "preprocessing": {"image_size": 64},
        "training": {"epochs": 30, "batch_size": 16},
        "evaluation": {
            "min_accuracy": 0.6,
            "min_class_accuracy": 0.3,
            "min_slice_accuracy": 0.3,
            "max_overconfidence": 0.5,
            "max_calibration_error": 0.5,
            "min_class_examples": 1,
        },
        "serving_check": {"measure_seconds": 0.2},
    },
    # Transfer learning on the frozen backbone: one to two minutes for 2,600 images on two cores; README has the accuracies.
    "default": {},
    # Then fine-tuning with augmentation; README has the minutes and the accuracies. A GPU's work, possible on a CPU.
    "accurate": {
        "fine_tuning": {"epochs": 10},
    },
}


class PipelineConfig(pydantic.BaseModel):
    """The pipeline itself.

    Attributes:
      name: of the pipeline and its workspace: lower case, digits and hyphens; the data's name where empty. To be compiled for
        Vertex AI or Kubeflow, it begins with a letter and has at most 100 characters.
      cache: reuse a component's result where nothing that it depends on has changed.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    name: str = pydantic.Field("", pattern=r"^([a-z0-9][a-z0-9-]{0,127})?$")
    cache: bool = True


class Config(pydantic.BaseModel):
    """Every setting, by section; and `engine`, which `kubeflow_runner.py` compiles for."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    preset: Literal["smoke", "default", "accurate"] = "default"
    engine: Engine = "vertex"
    pipeline: PipelineConfig = PipelineConfig()
    data: DataConfig = DataConfig()
    data_gate: DataGateConfig = DataGateConfig()
    preprocessing: PreprocessingConfig = PreprocessingConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    fine_tuning: FineTuningConfig = FineTuningConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    tuner: TunerConfig = TunerConfig()
    devices: DeviceConfig = DeviceConfig()
    export: ExportConfig = ExportConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    serving_check: ServingCheckConfig = ServingCheckConfig()
    vertex: VertexConfig = VertexConfig()

    @pydantic.model_validator(mode="after")
    def _fine_tune_only_what_can_be(self) -> "Config":
        if self.fine_tuning.epochs and self.model.backbone not in BACKBONES:
            raise ValueError(
                "Expected `fine_tuning.epochs` of 0 with a model of TensorFlow Hub, which stays frozen. "
                f"Received: fine_tuning.epochs={self.fine_tuning.epochs}. Set it to 0, or take a backbone by name."
            )
        return self

    @pydantic.model_validator(mode="after")
    def _fit_the_stride(self) -> "Config":
        size = self.preprocessing.image_size
        backbone = BACKBONES.get(self.model.backbone)  # a Hub model says what it takes once it is loaded
        if size and backbone and size % 32 and size != backbone.image_size:
            lower = size // 32 * 32
            raise ValueError(
                "Expected `image_size` to be a multiple of 32, the backbone's stride. "
                f"Received: image_size={size}. Use {lower} or {lower + 32}."
            )
        return self

    @property
    def input_spec(self) -> InputSpec:
        """What the network's images are like: as its backbone was trained, where `preprocessing` does not say otherwise.

        A Hub model is loaded to find out, unless `preprocessing` says both.
        """
        return self.preprocessing.resolve(lambda: self.model.input_spec)

    @property
    def pipeline_name(self) -> str:
        """The pipeline's name, as given or made of the data's."""
        stem = Path(self.data.input.rstrip("/")).name.removesuffix(".csv")
        derived = re.sub(r"[^a-z0-9]+", "-", stem.lower())[:MAX_NAME].strip("-")
        return self.pipeline.name or derived or "images"


def load_config(
    path: str | None = None,
    *,
    overrides: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Config:
    """Reads and validates the configuration.

    Args:
      path: TOML file, or None for the preset alone.
      overrides: `section.key=value` each, as given with `--set`.
      environment: variables to take `TFX_VISION_*` from; the process's own by default.

    Raises:
      InputError: if the file, a key or a value is wrong; one line that names it.
    """
    layers = [("the environment", _from_environment(os.environ if environment is None else environment))]
    layers.append(("--set", _from_overrides(overrides)))
    if path is not None:
        layers.insert(0, (path, _from_file(path)))
    merged: dict[str, Any] = {}
    for origin, values in layers:
        _check_keys(values, origin)
        merged = _merge(merged, values)
    preset = merged.get("preset", Config.model_fields["preset"].default)
    if not isinstance(preset, str) or preset not in PRESETS:
        raise InputError(f"Expected `preset` to be one of {', '.join(PRESETS)}. Received: {preset!r}.")
    return validate(Config, _merge(PRESETS[preset], merged))


def _from_file(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Expected --config to be a TOML file. Received: {path!r}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"Expected {path} to be TOML. Received: {error}.") from error


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, text in sorted(environment.items()):
        if name.startswith(ENVIRONMENT_PREFIX) and name not in _OWN_VARIABLES:
            keys = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
            values = _merge(values, _nest(keys, _parse(text)))
    return values


def _from_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not re.fullmatch(r"[a-z_]+(\.[a-z_]+)?", key.strip()):
            raise InputError(f"Expected --set section.key=value. Received: {override!r}.")
        values = _merge(values, _nest(key.strip().split("."), _parse(text.strip())))
    return values


def _parse(text: str) -> Any:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, bool | int | float | str | list | dict) else text  # a date is text


def _nest(keys: Sequence[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return value


def _merge(base: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in update.items():
        both = isinstance(merged.get(key), Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _check_keys(values: Mapping[str, Any], origin: str) -> None:
    """Names the nearest known key for one that does not exist."""
    known = {
        name: tuple(field.annotation.model_fields)
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel)
    }
    for section, settings in values.items():
        if section not in Config.model_fields:
            raise InputError(_unknown(section, list(Config.model_fields), origin))
        if section not in known:
            continue
        if not isinstance(settings, Mapping):
            raise InputError(f"Expected `{section}` in {origin} to be a section. Received: {settings!r}.")
        for key in settings:
            if key not in known[section]:
                raise InputError(_unknown(f"{section}.{key}", [f"{section}.{name}" for name in known[section]], origin))


def _unknown(key: str, known: list[str], origin: str) -> str:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"Expected a known setting in {origin}. Received: `{key}`. Did you mean `{nearest[0]}`? Known: {', '.join(known)}."
