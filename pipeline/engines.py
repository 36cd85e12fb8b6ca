"""The components that are not the same on every engine: on this machine, on Vertex AI Pipelines, on Kubeflow Pipelines.

`pipeline.pipeline` asks here for each of them, so that its line of components stays one. What differs, and why:

- Vertex AI trains in a custom job, sends Beam steps to Dataflow and deploys to an endpoint. Of resolvers it knows TFX's own
  strategies only: its baseline is TFX's latest blessed model, and the data gate leaves drift out.
- Kubeflow Pipelines trains in the step itself and copies a model into the bucket. Its backend runs no resolver at all.
- Compiled jobs have runtime parameters.
"""

import dataclasses
import json
import os
from typing import Any

from tfx.components import Evaluator, Pusher, Trainer, Tuner
from tfx.dsl.components.base.base_component import BaseComponent
from tfx.dsl.components.common.resolver import Resolver
from tfx.dsl.input_resolution.strategies.latest_blessed_model_strategy import LatestBlessedModelStrategy
from tfx.orchestration.data_types import RuntimeParameter
from tfx.proto import pusher_pb2
from tfx.types import Channel, standard_artifacts

from data.errors import InputError
from data.features import SCHEMA_FOLDER
from data.fingerprint import code_fingerprint
from models.trainer import CONFIG_KEY
from models.tuner import TUNER_CONFIG_KEY
from pipeline.components import (
    LatestBlessedStatisticsStrategy,
    LatestOtherBlessedModelStrategy,
    VertexDeployer,
)
from pipeline.config import Config
from pipeline.parameters import (
    RECORDS,
    SCHEMA,
    THRESHOLDS,
    TRAINING,
    ParametrizedEvaluator,
    TrainingParameters,
    parameter_values,
    runtime_parameter,
)
from pipeline.records import Records
from pipeline.vertex import Engine, serving_args, serving_image, training_job, training_step

CODE_PACKAGES = ("tensorflow", "keras", "tensorflow-transform")


@dataclasses.dataclass(frozen=True)
class Variants:
    """Makes the components of one engine.

    Attributes:
      config: every setting.
      records: the data.
      engine: None for this machine.
    """

    config: Config
    records: Records
    engine: Engine | None

    def __post_init__(self):
        """Checks what the engine cannot do.

        Raises:
          InputError: if it is asked for on Kubeflow.
        """
        if self.engine != "kubeflow":
            return
        if self.config.evaluation.compare_with != "nothing":
            raise InputError(
                'Expected `evaluation.compare_with = "nothing"` on Kubeflow, whose backend runs no resolver, so that no '
                f"earlier model can be found. Received: {self.config.evaluation.compare_with!r}. Set it, and the thresholds "
                "that a model must reach by itself; or run on Vertex AI."
            )
        if self.config.training.warm_start:
            raise InputError(
                "Expected `training.warm_start = false` on Kubeflow, whose backend runs no resolver. Received: true. "
                "Leave it out, or run on Vertex AI."
            )

    @property
    def records_folder(self) -> str | RuntimeParameter:
        """The folder of the records."""
        return self._parameter(RECORDS) if self.engine else self.records.folder

    @property
    def schema_folder(self) -> str | RuntimeParameter:
        """The folder of the schema, beside the records."""
        return self._parameter(SCHEMA) if self.engine else os.path.join(self.records.folder, SCHEMA_FOLDER)

    def _parameter(self, name: str) -> RuntimeParameter:
        return runtime_parameter(name, parameter_values(self.config, self.records.folder))

    def baseline_statistics(self, statistics_gen: BaseComponent) -> Resolver | None:
        """Makes the resolver of the data of the model in use, to find drift; None where the engine has no such resolver."""
        if self.engine:
            return None
        resolver = Resolver(
            strategy_class=LatestBlessedStatisticsStrategy,
            config={"class_names": list(self.records.class_names)},
            statistics=statistics_gen.outputs["statistics"],
            baseline_statistics=Channel(type=standard_artifacts.ExampleStatistics),
            model=Channel(type=standard_artifacts.Model),
            model_blessing=Channel(type=standard_artifacts.ModelBlessing),
            infra_blessing=Channel(type=standard_artifacts.InfraBlessing),
        )
        return resolver.with_id("LatestBlessedStatistics")

    def training_parameters(self) -> BaseComponent | None:
        """Makes the component that hands runtime parameters to the Trainer; None where there are none."""
        if not self.engine:
            return None
        return TrainingParameters(**{name: self._parameter(name) for name in TRAINING})

    def tuner(self, trainer_config: dict, inputs: dict) -> BaseComponent:
        """Makes the Tuner."""
        code = f"{trainer_config['code']}-{code_fingerprint('models.tuner', distributions=CODE_PACKAGES)}"
        custom_config = {
            CONFIG_KEY: trainer_config | {"code": code},
            TUNER_CONFIG_KEY: self.config.tuner.model_dump(mode="json"),
        }
        if not self._has_custom_job:
            tuner = Tuner(tuner_fn="models.tuner.tuner_fn", custom_config=custom_config, **inputs)
            return self._on_its_step(tuner)
        from tfx.extensions.google_cloud_ai_platform.tuner import executor

        from pipeline.custom_job import CustomJobTuner

        custom_config |= self._custom_job(executor.TUNING_ARGS_KEY)
        tuner = CustomJobTuner(tuner_fn="models.tuner.tuner_fn", custom_config=custom_config, **inputs)
        return tuner.with_id(Tuner.__name__)

    def warm_start(self) -> Resolver:
        """Makes the resolver of the model to start from."""
        resolver = Resolver(
            strategy_class=LatestBlessedModelStrategy,
            model=Channel(type=standard_artifacts.Model),
            model_blessing=Channel(type=standard_artifacts.ModelBlessing),
        )
        return resolver.with_id("WarmStartModel")

    def trainer(self, *, custom_config: dict, **arguments: Any) -> BaseComponent:
        """Makes the Trainer."""
        if not self._has_custom_job:
            return self._on_its_step(Trainer(custom_config=custom_config, **arguments))
        from tfx.extensions.google_cloud_ai_platform.trainer import executor

        from pipeline.custom_job import CustomJobTrainer

        custom_config = custom_config | self._custom_job(executor.TRAINING_ARGS_KEY)
        return CustomJobTrainer(custom_config=custom_config, **arguments).with_id(Trainer.__name__)

    @property
    def _has_custom_job(self) -> bool:
        return self.engine == "vertex" and self.config.vertex.train_on == "custom_job"

    def _custom_job(self, arguments_key: str) -> dict[str, Any]:
        from tfx.extensions.google_cloud_ai_platform import constants

        return {
            constants.ENABLE_VERTEX_KEY: True,
            constants.VERTEX_REGION_KEY: self.config.vertex.region,
            arguments_key: training_job(self.config.vertex),
        }

    def _on_its_step(self, node: BaseComponent) -> BaseComponent:
        """Gives a compiled step the machine that trains."""
        return node.with_platform_config(training_step(self.config.vertex, self.engine)) if self.engine else node

    def baseline(self, trainer: BaseComponent) -> Resolver:
        """Makes the resolver of the model to compare with."""
        channels = {
            "model": Channel(type=standard_artifacts.Model),
            "model_blessing": Channel(type=standard_artifacts.ModelBlessing),
        }
        if self.engine:
            resolver = Resolver(strategy_class=LatestBlessedModelStrategy, **channels)
        else:
            resolver = Resolver(
                strategy_class=LatestOtherBlessedModelStrategy,
                candidate=trainer.outputs["model"],
                infra_blessing=Channel(type=standard_artifacts.InfraBlessing),
                **channels,
            )
        return resolver.with_id("LatestBlessedModel")

    def evaluator(self, **arguments: Any) -> BaseComponent:
        """Makes the Evaluator."""
        if not self.engine:
            return Evaluator(**arguments)
        thresholds = {name: self._parameter(name) for name in THRESHOLDS}
        return ParametrizedEvaluator(thresholds=thresholds, **arguments).with_id(Evaluator.__name__)

    def pusher(self, *, model_run: Channel, serving_model_dir: str, **inputs: Channel) -> BaseComponent:
        """Makes what puts a model with both blessings into use.

        Args:
          model_run: with the Trainer's own answers, which an endpoint's are compared with.
          serving_model_dir: where a model is copied to that no endpoint gets.
          **inputs: model, model_blessing and infra_blessing.
        """
        vertex = self.config.vertex
        if self.engine != "vertex" or vertex.deployer == "none":
            destination = pusher_pb2.PushDestination.Filesystem(base_directory=serving_model_dir)
            return Pusher(push_destination=pusher_pb2.PushDestination(filesystem=destination), **inputs)
        if vertex.deployer == "canary":
            deployer = VertexDeployer(
                model_run=model_run,
                config=json.dumps(vertex.model_dump(mode="json"), sort_keys=True),
                pipeline_name=self.config.pipeline_name,
                code=code_fingerprint("pipeline.components"),
                **inputs,
            )
            return deployer.with_id(Pusher.__name__)
        from tfx.extensions.google_cloud_ai_platform import constants
        from tfx.extensions.google_cloud_ai_platform.pusher.component import Pusher as VertexPusher

        return VertexPusher(
            custom_config={
                constants.ENABLE_VERTEX_KEY: True,
                constants.VERTEX_REGION_KEY: vertex.region,
                constants.VERTEX_CONTAINER_IMAGE_URI_KEY: serving_image(vertex),
                constants.SERVING_ARGS_KEY: serving_args(vertex, self.config.pipeline_name),
            },
            **inputs,
        )
