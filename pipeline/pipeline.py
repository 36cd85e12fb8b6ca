"""`create_pipeline`: one straight line of components, the same for every runner.

Called by `local_runner.py` and `kubeflow_runner.py`. The modules of each component are imported by name, as `from tfx import
v1` also loads the Vertex AI SDK, for 12 seconds.
"""

import dataclasses
import hashlib
import os
from collections.abc import Sequence

import tensorflow as tf
import tensorflow_data_validation as tfdv
from google.protobuf import text_format
from ml_metadata.proto import metadata_store_pb2
from tensorflow_metadata.proto.v0 import schema_pb2
from tfx.components import (
    Evaluator,
    ExampleValidator,
    ImportExampleGen,
    Pusher,
    StatisticsGen,
    Trainer,
    Transform,
    Tuner,
)
from tfx.dsl.components.base.base_component import BaseComponent
from tfx.dsl.components.common.importer import Importer
from tfx.dsl.components.common.resolver import Resolver
from tfx.dsl.input_resolution.strategies.latest_blessed_model_strategy import LatestBlessedModelStrategy
from tfx.orchestration.pipeline import Pipeline
from tfx.proto import example_gen_pb2, pusher_pb2, trainer_pb2
from tfx.types import Channel, standard_artifacts

from data.errors import InputError
from data.features import (
    FACT_KEYS,
    LABEL_KEY,
    RECORD_KEYS,
    SCHEMA_FILE,
    SCHEMA_FOLDER,
    SPLITS,
    TEST_SPLIT,
    TRAIN_SPLIT,
    VALID_SPLIT,
)
from data.fingerprint import code_fingerprint
from data.prepare import DataConfig, read_class_names
from models.backbones import weights_fingerprint
from models.classifier import ModelConfig
from models.trainer import CONFIG_KEY, TrainerConfig
from models.tuner import TUNER_CONFIG_KEY
from pipeline.components import (
    DataGate,
    LatestBlessedStatisticsStrategy,
    LatestOtherBlessedModelStrategy,
    ServingCheck,
)
from pipeline.config import Config
from pipeline.drift import NUM_QUANTILES
from pipeline.evaluation import eval_config
from pipeline.vertex import serving_args, training_job

_CODE_PACKAGES = ("tensorflow", "keras", "tensorflow-transform")
_EVALUATION_PACKAGES = ("tensorflow", "tensorflow-model-analysis", "numpy", "scipy")


@dataclasses.dataclass(frozen=True)
class Records:
    """The prepared data that the pipeline starts from.

    Attributes:
      folder: that `data.prepare` wrote; local or gs://.
      class_names: the ordered class list.
      columns: extra columns to slice by.
      schema_fingerprint: changes with the schema file, so that another one is imported anew; empty where it cannot be read.
    """

    folder: str
    class_names: tuple[str, ...]
    columns: tuple[str, ...]
    schema_fingerprint: str


def read_records(folder: str, config: DataConfig) -> Records:
    """Reads what the pipeline must know of prepared records.

    Args:
      folder: that `data.prepare` wrote; local or gs://.
      config: which columns to slice by.

    Raises:
      InputError: if the records lack a column to slice by.
    """
    schema_path = os.path.join(folder, SCHEMA_FOLDER, SCHEMA_FILE)
    with tf.io.gfile.GFile(schema_path) as file:
        text = file.read()
    schema = text_format.Parse(text, schema_pb2.Schema())
    columns = tuple(feature.name for feature in schema.feature if feature.name not in RECORD_KEYS)
    if unknown := sorted(set(config.slice_columns or ()) - set(columns)):
        raise InputError(
            f"Expected `data.slice_columns` to name columns of the data ({', '.join(columns) or 'it has none'}). "
            f"Received: {', '.join(unknown)}."
        )
    return Records(
        folder=folder,
        class_names=read_class_names(folder),
        columns=columns if config.slice_columns is None else config.slice_columns,
        schema_fingerprint=hashlib.sha256(text.encode()).hexdigest()[:16],
    )


def create_pipeline(
    config: Config,
    records: Records,
    *,
    pipeline_root: str,
    serving_model_dir: str,
    beam_pipeline_args: Sequence[str],
    metadata_connection_config: metadata_store_pb2.ConnectionConfig | None = None,
    cache_dir: str = "",
    on_vertex: bool = False,
) -> Pipeline:
    """Composes the pipeline.

    Args:
      config: every setting.
      records: the data.
      pipeline_root: where the components keep their artifacts.
      serving_model_dir: where the local Pusher puts a blessed model, under its version.
      beam_pipeline_args: runner and options of the Beam steps.
      metadata_connection_config: the metadata store of a local run.
      cache_dir: local or gs:// folder in which the Trainer keeps embeddings for later runs; empty for none.
      on_vertex: train as a Vertex AI custom job, push to a Vertex AI endpoint.
    """
    # The beginning: records as they are, in the splits that `data.prepare` decided.
    example_gen = ImportExampleGen(
        input_base=records.folder,
        input_config=example_gen_pb2.Input(
            splits=[example_gen_pb2.Input.Split(name=name, pattern=f"{name}-*.tfrecord.gz") for name in SPLITS]
        ),
    )

    # What the data is: over labels, columns and cheap facts of the images, never over their bytes.
    statistics_gen = StatisticsGen(
        examples=example_gen.outputs["examples"],
        stats_options=tfdv.StatsOptions(
            feature_allowlist=[LABEL_KEY, *FACT_KEYS, *records.columns], num_quantiles_histogram_buckets=NUM_QUANTILES
        ),
    )

    # What the data must be: written beside the records. Without a fingerprint the file may have changed, so it is read anew.
    schema = Importer(
        source_uri=os.path.join(records.folder, SCHEMA_FOLDER),
        artifact_type=standard_artifacts.Schema,
        custom_properties={"fingerprint": records.schema_fingerprint},
        reimport=not records.schema_fingerprint,
    ).with_id("Schema")

    # Whether it is, and whether it is like the data of the model in use.
    example_validator = ExampleValidator(statistics=statistics_gen.outputs["statistics"], schema=schema.outputs["result"])
    baseline_statistics = _baseline_statistics_resolver(statistics_gen, records, on_vertex)
    data_gate = DataGate(
        anomalies=example_validator.outputs["anomalies"],
        statistics=statistics_gen.outputs["statistics"],
        schema=schema.outputs["result"],
        action=config.data_gate.action,
        min_examples=config.data_gate.min_examples,
        code=code_fingerprint("pipeline.components"),
        baseline_statistics=baseline_statistics and baseline_statistics.outputs["baseline_statistics"],
    )

    # One preprocessing for training, evaluation and serving: traced only, as without analyzers there is nothing to compute.
    transform = Transform(
        examples=example_gen.outputs["examples"],
        schema=schema.outputs["result"],
        preprocessing_fn="preprocessing.transform.preprocessing_fn",
        materialize=False,
        disable_statistics=True,
        disable_analyzer_cache=True,
        custom_config={
            "input": config.input_spec.model_dump(mode="json"),
            "class_names": list(records.class_names),
            "code": code_fingerprint("preprocessing.transform", distributions=_CODE_PACKAGES),
        },
    )
    transform.add_upstream_node(data_gate)

    # The best hyperparameters, where a search is asked for.
    trainer_inputs = {
        "examples": example_gen.outputs["examples"],
        "transform_graph": transform.outputs["transform_graph"],
        "schema": schema.outputs["result"],
        "train_args": trainer_pb2.TrainArgs(splits=[TRAIN_SPLIT]),
        "eval_args": trainer_pb2.EvalArgs(splits=[VALID_SPLIT]),
    }
    trainer_config = _trainer_config(config, records, cache_dir)
    tuner = _tuner(config, trainer_config, trainer_inputs, on_vertex) if config.tuner.trials else None

    # The model to start from, where that is not the one of ImageNet.
    warm_start = _warm_start_resolver() if config.training.warm_start else None

    # The model.
    trainer = _trainer(on_vertex)(
        run_fn="models.trainer.run_fn",
        hyperparameters=tuner and tuner.outputs["best_hyperparameters"],
        base_model=warm_start and warm_start.outputs["model"],
        custom_config={CONFIG_KEY: trainer_config} | _vertex_training(config, on_vertex),
        **trainer_inputs,
    )

    # The model in use, to compare with.
    baseline = _baseline_resolver(trainer, on_vertex) if config.evaluation.compare_with != "nothing" else None

    # Whether the model is good enough.
    evaluator = Evaluator(
        examples=example_gen.outputs["examples"],
        example_splits=[TEST_SPLIT],
        schema=schema.outputs["result"],
        model=trainer.outputs["model"],
        baseline_model=baseline and baseline.outputs["model"],
        eval_config=eval_config(
            config.evaluation,
            records.class_names,
            records.columns,
            image_size=config.input_spec.image_size,
            code=code_fingerprint("pipeline.extractors", distributions=_EVALUATION_PACKAGES),
        ),
        module_path="pipeline.extractors",
    )

    # Whether a server can use it.
    serving_check = ServingCheck(
        model=trainer.outputs["model"],
        model_run=trainer.outputs["model_run"],
        model_blessing=evaluator.outputs["blessing"],
        config=config.serving_check.model_dump_json(),
        code=code_fingerprint("pipeline.components", distributions=("tensorflow",)),
    )

    # Into use, if both say so.
    pusher = _pusher(config, trainer, evaluator, serving_check, serving_model_dir=serving_model_dir, on_vertex=on_vertex)

    return Pipeline(
        pipeline_name=config.pipeline_name,
        pipeline_root=pipeline_root,
        components=[
            example_gen,
            statistics_gen,
            schema,
            example_validator,
            *([baseline_statistics] if baseline_statistics else []),
            data_gate,
            transform,
            *(node for node in (tuner, warm_start) if node),
            trainer,
            *([baseline] if baseline else []),
            evaluator,
            serving_check,
            pusher,
        ],
        enable_cache=config.pipeline.cache,
        beam_pipeline_args=list(beam_pipeline_args),
        metadata_connection_config=metadata_connection_config,
    )


def _baseline_statistics_resolver(statistics_gen: BaseComponent, records: Records, on_vertex: bool) -> Resolver | None:
    if on_vertex:  # which knows TFX's own strategies only, and none finds a model's data: the data gate leaves drift out
        return None
    resolver = Resolver(
        strategy_class=LatestBlessedStatisticsStrategy,
        config={"class_names": list(records.class_names)},
        statistics=statistics_gen.outputs["statistics"],
        baseline_statistics=Channel(type=standard_artifacts.ExampleStatistics),
        model=Channel(type=standard_artifacts.Model),
        model_blessing=Channel(type=standard_artifacts.ModelBlessing),
        infra_blessing=Channel(type=standard_artifacts.InfraBlessing),
    )
    return resolver.with_id("LatestBlessedStatistics")


def _tuner(config: Config, trainer_config: dict, inputs: dict, on_vertex: bool) -> BaseComponent:
    code = f"{trainer_config['code']}-{code_fingerprint('models.tuner', distributions=_CODE_PACKAGES)}"
    custom_config = {
        CONFIG_KEY: trainer_config | {"code": code},
        TUNER_CONFIG_KEY: config.tuner.model_dump(mode="json"),
    }
    if not on_vertex:
        return Tuner(tuner_fn="models.tuner.tuner_fn", custom_config=custom_config, **inputs)
    from tfx.extensions.google_cloud_ai_platform import constants
    from tfx.extensions.google_cloud_ai_platform.tuner import executor
    from tfx.extensions.google_cloud_ai_platform.tuner.component import Tuner as VertexTuner

    custom_config |= {
        constants.ENABLE_VERTEX_KEY: True,
        constants.VERTEX_REGION_KEY: config.vertex.region,
        executor.TUNING_ARGS_KEY: training_job(config.vertex),
    }
    return VertexTuner(tuner_fn="models.tuner.tuner_fn", custom_config=custom_config, **inputs)


def _warm_start_resolver() -> Resolver:
    resolver = Resolver(
        strategy_class=LatestBlessedModelStrategy,
        model=Channel(type=standard_artifacts.Model),
        model_blessing=Channel(type=standard_artifacts.ModelBlessing),
    )
    return resolver.with_id("WarmStartModel")


def _trainer(on_vertex: bool) -> type[BaseComponent]:
    if not on_vertex:
        return Trainer
    from tfx.extensions.google_cloud_ai_platform.trainer.component import Trainer as VertexTrainer

    return VertexTrainer


def _trainer_config(config: Config, records: Records, cache_dir: str) -> dict:
    trainer_config = TrainerConfig(
        class_names=records.class_names,
        input=config.input_spec,
        model=config.model,
        training=config.training,
        fine_tuning=config.fine_tuning,
        augmentation=config.augmentation,
        devices=config.devices,
        export=config.export,
        cache_dir=cache_dir,
        code=code_fingerprint("models.trainer", distributions=_CODE_PACKAGES) + _weights_fingerprint(config.model),
    )
    return trainer_config.model_dump(mode="json")


def _weights_fingerprint(config: ModelConfig) -> str:
    """Changes with weights of the user's that lie on this machine; those elsewhere count by their name alone."""
    local = config.weights_file or os.path.expanduser(config.backbone)
    if not os.path.exists(local):
        return ""
    return f"-{weights_fingerprint(config.backbone, config.weights_file)[:16]}"


def _vertex_training(config: Config, on_vertex: bool) -> dict:
    if not on_vertex:
        return {}
    from tfx.extensions.google_cloud_ai_platform import constants
    from tfx.extensions.google_cloud_ai_platform.trainer import executor

    return {
        constants.ENABLE_VERTEX_KEY: True,
        constants.VERTEX_REGION_KEY: config.vertex.region,
        executor.TRAINING_ARGS_KEY: training_job(config.vertex),
    }


def _baseline_resolver(trainer: BaseComponent, on_vertex: bool) -> Resolver:
    channels = {
        "model": Channel(type=standard_artifacts.Model),
        "model_blessing": Channel(type=standard_artifacts.ModelBlessing),
    }
    if on_vertex:  # which knows TFX's own strategies only
        resolver = Resolver(strategy_class=LatestBlessedModelStrategy, **channels)
    else:
        resolver = Resolver(
            strategy_class=LatestOtherBlessedModelStrategy,
            candidate=trainer.outputs["model"],
            infra_blessing=Channel(type=standard_artifacts.InfraBlessing),
            **channels,
        )
    return resolver.with_id("LatestBlessedModel")


def _pusher(
    config: Config,
    trainer: BaseComponent,
    evaluator: BaseComponent,
    serving_check: BaseComponent,
    *,
    serving_model_dir: str,
    on_vertex: bool,
) -> BaseComponent:
    inputs = {
        "model": trainer.outputs["model"],
        "model_blessing": evaluator.outputs["blessing"],
        "infra_blessing": serving_check.outputs["infra_blessing"],
    }
    if not on_vertex:
        destination = pusher_pb2.PushDestination.Filesystem(base_directory=serving_model_dir)
        return Pusher(push_destination=pusher_pb2.PushDestination(filesystem=destination), **inputs)
    from tfx.extensions.google_cloud_ai_platform import constants
    from tfx.extensions.google_cloud_ai_platform.pusher.component import Pusher as VertexPusher

    return VertexPusher(
        custom_config={
            constants.ENABLE_VERTEX_KEY: True,
            constants.VERTEX_REGION_KEY: config.vertex.region,
            constants.VERTEX_CONTAINER_IMAGE_URI_KEY: config.vertex.serving_image,
            constants.SERVING_ARGS_KEY: serving_args(config.vertex, config.pipeline_name),
        },
        **inputs,
    )
