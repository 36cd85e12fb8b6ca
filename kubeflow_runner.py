"""Compiles the same pipeline for Vertex AI Pipelines; nothing is submitted.

    tfx pipeline create --engine=vertex --pipeline_path=kubeflow_runner.py
    python kubeflow_runner.py                                  # writes pipeline.json here

The `tfx` command passes no arguments, so settings come from the file that TFX_VISION_CONFIG names and from the environment:
TFX_VISION_DATA__INPUT (records that `data.prepare` wrote, gs://), TFX_VISION_VERTEX__PROJECT, TFX_VISION_VERTEX__BUCKET,
TFX_VISION_VERTEX__IMAGE, and any other. Under a minute, nearly all of it imports. Exit codes: 0 compiled; 1 failed; 2 wrong
configuration.
"""

import os
import sys
from pathlib import Path

# The tfx command loads this file with its folder on the path only while it does so.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from data.errors import EXIT_DONE, InputError, report_error
from pipeline.config import CONFIG_VARIABLE, DEBUG_VARIABLE, Config, load_config

OUTPUT_FILE = "pipeline.json"


def main() -> int:
    """Compiles the pipeline; returns the exit code."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return EXIT_DONE
    try:
        config = load_config(os.environ.get(CONFIG_VARIABLE))
        _compile(config)
    except Exception as error:
        return report_error(error, debug=bool(os.environ.get(DEBUG_VARIABLE)))
    return EXIT_DONE


def _compile(config: Config) -> None:
    from tfx.orchestration.kubeflow.v2.kubeflow_v2_dag_runner import (
        KubeflowV2DagRunner,
        KubeflowV2DagRunnerConfig,
    )

    from pipeline.pipeline import Records, create_pipeline, read_records
    from pipeline.vertex import dataflow_args, require_settings

    require_settings(config.vertex)
    name, bucket = config.pipeline_name, config.vertex.bucket.rstrip("/")
    if not config.data.input.startswith("gs://"):
        raise InputError(
            "Expected `data.input` to be a gs:// folder of records, as the steps run in the cloud. "
            f"Received: {config.data.input!r}. Write them with `python -m data.prepare --output gs://...`."
        )
    if config.data.class_names and config.data.slice_columns is None:
        raise InputError(
            "Expected `data.slice_columns` beside `data.class_names`, as the records are not read. Received: nothing. "
            "Name the extra columns that the gate slices by; [] is for none."
        )
    if config.data.class_names:
        records = Records(
            folder=config.data.input.rstrip("/"),
            class_names=config.data.class_names,
            columns=config.data.slice_columns,
            schema_fingerprint="",
        )
    else:
        records = read_records(config.data.input, config.data)
    pipeline = create_pipeline(
        config,
        records,
        pipeline_root=f"{bucket}/pipeline_root/{name}",
        serving_model_dir=f"{bucket}/serving_model/{name}",
        beam_pipeline_args=dataflow_args(config.vertex, name),
        cache_dir=f"{bucket}/cache/{name}/embeddings",
        on_vertex=True,
    )
    runner = KubeflowV2DagRunner(
        config=KubeflowV2DagRunnerConfig(display_name=name, default_image=config.vertex.image),
        output_filename=OUTPUT_FILE,
    )
    runner.run(pipeline)


if __name__ == "__main__":
    sys.exit(main())
