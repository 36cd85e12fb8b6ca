"""Compiles the same pipeline for Vertex AI Pipelines or for Kubeflow Pipelines; nothing is submitted.

    tfx pipeline create --engine=vertex --pipeline_path=kubeflow_runner.py
    python kubeflow_runner.py                                  # writes pipeline.json here
    python kubeflow_runner.py --set engine=kubeflow            # writes pipeline.yaml here
    python kubeflow_runner.py --check                          # asks Google Cloud whether a run could begin

The `tfx` command passes no arguments, so settings come from the file that TFX_VISION_CONFIG names and from the environment:
TFX_VISION_DATA__INPUT (records that `data.prepare` wrote, gs://), TFX_VISION_VERTEX__PROJECT, TFX_VISION_VERTEX__BUCKET,
TFX_VISION_VERTEX__IMAGE, and any other. Under a minute, nearly all of it imports. Exit codes: 0 compiled; 1 failed; 2 wrong
configuration.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# The tfx command loads this file with its folder on the path only while it does so.
sys.path.insert(0, str(Path(__file__).resolve().parent))

# Before TensorFlow is loaded.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from rich.console import Console
from rich.spinner import Spinner

from data.errors import EXIT_DONE, InputError, report_error
from pipeline.console import live, output_to_log

_CONFIG_VARIABLE, _DEBUG_VARIABLE = "TFX_VISION_CONFIG", "TFX_VISION_DEBUG"  # as pipeline.config has them
OUTPUT_FILES = {"vertex": "pipeline.json", "kubeflow": "pipeline.yaml"}


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles the pipeline; returns the exit code."""
    arguments = _parse_arguments(argv)
    terminal_options = {"force_terminal": Console().is_terminal, "width": Console().width}  # asked before output is redirected
    try:
        with tempfile.NamedTemporaryFile("r", suffix=".log") as log, output_to_log(Path(log.name)) as terminal:
            console = Console(file=terminal, **terminal_options)
            with live(console, Spinner("dots", "Loading TFX"), transient=True):
                from pipeline.config import load_config

                config = load_config(arguments.config or os.environ.get(_CONFIG_VARIABLE), overrides=arguments.set)
                written = None if arguments.check else _compile(config)
            if written:
                line = f"Compiled {config.pipeline_name} for {config.engine}: {written}"
                console.print(line, highlight=False, soft_wrap=True)
        if arguments.check:
            from pipeline.cloud_check import check_cloud

            return check_cloud(config)
    except (Exception, KeyboardInterrupt) as error:
        return report_error(error, debug=arguments.debug or bool(os.environ.get(_DEBUG_VARIABLE)))
    return EXIT_DONE


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python kubeflow_runner.py",
        description="Compiles the pipeline for Vertex AI Pipelines (pipeline.json) or Kubeflow Pipelines (pipeline.yaml).",
        epilog="Settings also come from the environment, as TFX_VISION_SECTION__KEY=value. "
        "Exit codes: 0 done; 1 failed; 2 wrong configuration.",
    )
    parser.add_argument("--config", metavar="F.toml", help=f"settings (default: the file that {_CONFIG_VARIABLE} names)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="one setting; repeatable")
    parser.add_argument("--check", action="store_true", help="compile nothing, but ask Google Cloud whether a run could begin")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def _compile(config: Any) -> str | None:
    """Writes the compiled job here and returns its name; None where the tfx command wrote it elsewhere."""
    from tfx.orchestration.kubeflow.v2.kubeflow_v2_dag_runner import (
        KubeflowV2DagRunner,
        KubeflowV2DagRunnerConfig,
    )

    from pipeline.parameters import parameter_values
    from pipeline.pipeline import create_pipeline
    from pipeline.vertex import beam_args, require_name, require_settings

    engine, name = config.engine, config.pipeline_name
    require_settings(config.vertex, engine)
    require_name(name)
    records = _records(config)
    bucket = config.vertex.bucket.rstrip("/")
    pipeline_root = f"{bucket}/pipeline_root/{name}"
    pipeline = create_pipeline(
        config,
        records,
        pipeline_root=pipeline_root,
        serving_model_dir=f"{bucket}/serving_model/{name}",
        beam_pipeline_args=beam_args(config.vertex, name, engine),
        cache_dir=f"{bucket}/cache/{name}/embeddings",
        engine=engine,
    )
    parameters = parameter_values(config, records.folder)
    with tempfile.TemporaryDirectory() as folder:
        runner = KubeflowV2DagRunner(
            config=KubeflowV2DagRunnerConfig(
                display_name=name,
                default_image=config.vertex.image,
                # Kubeflow's backend reads 2.1 only; `tfx run create` can give numbers to 2.0 only, as it passes texts.
                use_pipeline_spec_2_1=engine == "kubeflow",
            ),
            output_dir=folder,
            output_filename=OUTPUT_FILES[engine],
        )
        runner.run(pipeline, parameter_values=parameters)
        compiled = Path(folder, OUTPUT_FILES[engine])
        if not compiled.exists():
            return None
        if engine == "kubeflow":
            _complete_for_kubeflow(compiled, parameters, pipeline_root)
        temporary = Path(f"{OUTPUT_FILES[engine]}.tmp")
        temporary.write_bytes(compiled.read_bytes())
        temporary.replace(OUTPUT_FILES[engine])
    return OUTPUT_FILES[engine]


def _records(config: Any) -> Any:
    from pipeline.records import Records, read_records

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
    if not config.data.class_names:
        return read_records(config.data.input, config.data)
    return Records(
        folder=config.data.input.rstrip("/"),
        class_names=config.data.class_names,
        columns=config.data.slice_columns,
        schema_fingerprint="",
    )


def _complete_for_kubeflow(path: Path, parameters: Mapping[str, Any], pipeline_root: str) -> None:
    """Adds what TFX leaves out of a YAML file: the parameters' default values, and where the artifacts go."""
    import yaml

    text = path.read_text(encoding="utf-8")
    spec = yaml.safe_load(text)
    spec["defaultPipelineRoot"] = pipeline_root
    definitions = spec["root"]["inputDefinitions"]["parameters"]
    for name, definition in definitions.items():
        definition["defaultValue"] = parameters[name]
        definition["isOptional"] = True
    comments = [line for line in text.splitlines() if line.startswith("#")]
    path.write_text("\n".join([*comments, yaml.safe_dump(spec, sort_keys=True)]), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
