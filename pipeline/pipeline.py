"""`create_pipeline`: one straight line of components, the same for every runner.

Called by `local_runner.py` and `kubeflow_runner.py`. The modules of each component are imported by name, as `from tfx import
v1` also loads the Vertex AI SDK, for 12 seconds.
"""

import os
from collections.abc import Sequence

import tensorflow_data_validation as tfdv
from ml_metadata.proto import metadata_store_pb2
from tfx.components import ExampleValidator, ImportExampleGen, StatisticsGen, Transform
from tfx.dsl.components.common.importer import Importer
from tfx.orchestration.pipeline import Pipeline
from tfx.proto import example_gen_pb2, trainer_pb2
from tfx.types import standard_artifacts

from data.features import FACT_KEYS, LABEL_KEY, SPLITS, TEST_SPLIT, TRAIN_SPLIT, VALID_SPLIT
from data.fingerprint import code_fingerprint
from models.backbones import weights_fingerprint
from models.classifier import ModelConfig
from models.trainer import CONFIG_KEY, TrainerConfig
from pipeline.components import DataGate, ServingCheck
from pipeline.config import Config
from pipeline.drift import NUM_QUANTILES
from pipeline.engines import CODE_PACKAGES, Variants
from pipeline.evaluation import eval_config
from pipeline.records import Records
from pipeline.vertex import Engine

_EVALUATION_PACKAGES = ("tensorflow", "tensorflow-model-analysis", "numpy", "scipy")


def create_pipeline(
    config: Config,
    records: Records,
    *,
    pipeline_root: str,
    serving_model_dir: str,
    beam_pipeline_args: Sequence[str],
    metadata_connection_config: metadata_store_pb2.ConnectionConfig | None = None,
    cache_dir: str = "",
    engine: Engine | None = None,
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
      engine: Vertex AI Pipelines or Kubeflow Pipelines, which the pipeline is compiled for, with runtime parameters; None for a
        run on this machine.
    """
    variants = Variants(config, records, engine)

    # The beginning: records as they are, in the splits that `data.prepare` decided.
    example_gen = ImportExampleGen(
        input_base=variants.records_folder,
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
        source_uri=variants.schema_folder,
        artifact_type=standard_artifacts.Schema,
        custom_properties={"fingerprint": records.schema_fingerprint},
        reimport=not records.schema_fingerprint,
    ).with_id("Schema")

    # Whether it is, and whether it is like the data of the model in use.
    example_validator = ExampleValidator(statistics=statistics_gen.outputs["statistics"], schema=schema.outputs["result"])
    baseline_statistics = variants.baseline_statistics(statistics_gen)
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
            "code": code_fingerprint("preprocessing.transform", distributions=CODE_PACKAGES),
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
    tuner = variants.tuner(trainer_config, trainer_inputs) if config.tuner.trials else None
    parameters = None if tuner else variants.training_parameters()

    # The model to start from, where that is not the one of ImageNet.
    warm_start = variants.warm_start() if config.training.warm_start else None

    # The model.
    trainer = variants.trainer(
        run_fn="models.trainer.run_fn",
        hyperparameters=(tuner and tuner.outputs["best_hyperparameters"])
        or (parameters and parameters.outputs["hyperparameters"]),
        base_model=warm_start and warm_start.outputs["model"],
        custom_config={CONFIG_KEY: trainer_config},
        **trainer_inputs,
    )

    # The model in use, to compare with.
    baseline = variants.baseline(trainer) if config.evaluation.compare_with != "nothing" else None

    # Whether the model is good enough.
    evaluator = variants.evaluator(
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
    pusher = variants.pusher(
        model=trainer.outputs["model"],
        model_run=trainer.outputs["model_run"],
        model_blessing=evaluator.outputs["blessing"],
        infra_blessing=serving_check.outputs["infra_blessing"],
        serving_model_dir=serving_model_dir,
    )

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
            *(node for node in (tuner, parameters, warm_start) if node),
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
        code=code_fingerprint("models.trainer", distributions=CODE_PACKAGES) + _weights_fingerprint(config.model),
    )
    return trainer_config.model_dump(mode="json")


def _weights_fingerprint(config: ModelConfig) -> str:
    """Changes with weights of the user's that lie on this machine; those elsewhere count by their name alone."""
    local = config.weights_file or os.path.expanduser(config.backbone)
    if not os.path.exists(local):
        return ""
    return f"-{weights_fingerprint(config.backbone, config.weights_file)[:16]}"
