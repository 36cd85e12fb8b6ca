"""Runs the whole pipeline on this machine: from images to a gated, pushed model and a report.

    python local_runner.py                                     # the default data set, ELPV
    python local_runner.py --data photos/                      # a folder with a folder for each class
    python local_runner.py --data photos.csv --set training.epochs=80

One to two minutes for 2,600 images on two cores. The workspace, `runs/<pipeline name>/` by default, then holds
`serving_model/<version>/`, `report.html`, `run.json` and `run.log`. Exit codes: 0 blessed and pushed; 1 failed; 2 wrong input
or configuration; 3 not blessed, nothing pushed; 4 stopped by the data gate.
"""

import argparse
import contextlib
import fcntl
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Before TensorFlow is loaded: off by default on CPUs without AVX-512, where it makes the backbone 2.5 times as fast.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
# Transform runs TensorFlow in this process before the Trainer can set it.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")

try:
    from rich.console import Console
except ModuleNotFoundError:  # the first package that is no part of Python
    print(
        f"error: Expected the project's environment. Received: {sys.executable}. Run `make setup`, then "
        "`source .venv/bin/activate`; or `make run`.",
        file=sys.stderr,
    )
    sys.exit(2)

from rich.markup import escape
from rich.spinner import Spinner

from data.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_NOT_BLESSED,
    DataAnomalyError,
    InputError,
    exit_code,
    report_error,
)
from pipeline.console import Progress, live, output_to_log, print_summary


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    arguments = _parse_arguments(argv)
    overrides = list(arguments.set)
    if arguments.preset:
        overrides.insert(0, f"preset={arguments.preset}")
    if arguments.data:
        overrides.append(f"data.input={json.dumps(os.path.expanduser(arguments.data), ensure_ascii=False)}")
    started = time.monotonic()
    terminal_options = {"force_terminal": Console().is_terminal, "width": Console().width}  # asked before output is redirected
    try:
        with tempfile.NamedTemporaryFile("r", suffix=".log") as early_log:
            with output_to_log(Path(early_log.name)) as terminal:
                console = Console(file=terminal, **terminal_options)
                with live(console, Spinner("dots", "Loading TensorFlow"), transient=True):
                    config, workspace = _load(arguments, overrides)
            log = workspace / "run.log"
            with _locked(workspace):
                log.write_text(early_log.read(), encoding="utf-8")
                with output_to_log(log) as terminal, _logging_to_standard_error():
                    console = Console(file=terminal, **terminal_options)
                    return _run(config, workspace, console, started)
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept and reused", file=sys.stderr)
        return EXIT_INTERRUPTED
    except SystemExit as error:  # the trainer's, whose state is saved
        print(error, file=sys.stderr)
        return error.code
    except Exception as error:
        return report_error(error, debug=arguments.debug)


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python local_runner.py",
        description="Runs the whole pipeline on this machine: from images to a gated, pushed model and a report.",
        epilog="Exit codes: 0 blessed and pushed; 1 failed; 2 wrong input or configuration; 3 not blessed, nothing "
        "pushed; 4 stopped by the data gate.",
    )
    parser.add_argument("--data", help="folder with a folder per class, CSV (path,label), prepared records, or `elpv`")
    parser.add_argument("--config", help="TOML file with the settings (default: the file that TFX_VISION_CONFIG names)")
    parser.add_argument("--preset", help="settings to start from: default, accurate or smoke")
    parser.add_argument("--workspace", help="folder for everything the run makes (default: runs/<pipeline name>)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="one setting; repeatable")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def _load(arguments: argparse.Namespace, overrides: list[str]) -> tuple[Any, Path]:
    """Reads the configuration and makes the workspace."""
    from pipeline.config import CONFIG_VARIABLE, load_config

    config = load_config(arguments.config or os.environ.get(CONFIG_VARIABLE) or None, overrides=overrides)
    if "://" in (arguments.workspace or ""):
        raise InputError(
            f"Expected --workspace to be a folder on this machine. Received: {arguments.workspace!r}. "
            "For runs in the cloud, compile the pipeline with kubeflow_runner.py."
        )
    workspace = Path(arguments.workspace or Path("runs") / config.pipeline_name).expanduser()
    try:
        workspace.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"Expected --workspace to be a folder. Received: {workspace}: {error.strerror}.") from error
    return config, workspace.resolve()


@contextlib.contextmanager
def _locked(workspace: Path) -> Iterator[None]:
    """Keeps a second run out of the workspace; the lock goes with the process, however it ends."""
    with open(workspace / ".lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise RuntimeError(
                f"Expected {workspace} to be free. Received: a run (process {lock.read().strip() or 'unknown'}) that is "
                "using it. Wait for it, or give --workspace another folder."
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _run(config: Any, workspace: Path, console: Console, started: float) -> int:
    """Prepares the data, runs the components, and writes what they found."""
    where = f"data {escape(config.data.input)} · log {escape(str(workspace / 'run.log'))}"
    console.print(f"[bold]{config.pipeline_name}[/] · {where}", highlight=False, soft_wrap=True)
    run: dict[str, Any] = {"pipeline": config.pipeline_name, "exit_code": EXIT_FAILED, "seconds": 0.0, "counts": {}}
    run |= {"components": [], "metrics": {}, "blessed": False, "reasons": [], "pushed_model": None, "data_findings": []}
    run |= {"data_warnings": [], "serving_check": None, "fingerprints": {}}
    for name in ("run.json", "report.html"):  # of an earlier run, which they would still speak of if this one were killed
        (workspace / name).unlink(missing_ok=True)
    progress = Progress(console)
    try:
        with progress:
            with progress.step("Load libraries"):
                from tfx.orchestration.local.local_dag_runner import LocalDagRunner
                from tfx.orchestration.metadata import sqlite_metadata_connection_config

                from data.fingerprint import code_fingerprint
                from pipeline.pipeline import create_pipeline
                from pipeline.records import small_slices
                from pipeline.report import write_report
                from pipeline.results import read_results
            with progress.step("Prepare data") as step:
                records, report = _prepare(config, workspace, step)
                run["counts"] = _counts(report)
                small = small_slices(records, report, min_examples=config.evaluation.min_slice_examples)
                run["data_warnings"] = [*report.get("warnings", []), *small]
                run["fingerprints"] = {
                    "code": code_fingerprint("models.trainer"),
                    "records": report.get("fingerprint", ""),
                }
            pipeline = create_pipeline(
                config,
                records,
                pipeline_root=str(workspace / "pipeline"),
                serving_model_dir=str(workspace / "serving_model"),
                beam_pipeline_args=LOCAL_BEAM_ARGS,
                metadata_connection_config=sqlite_metadata_connection_config(str(workspace / "pipeline" / "metadata.db")),
                cache_dir=str(workspace / "cache" / "embeddings"),
            )
            _remove_half_pushed(workspace / "serving_model")
            progress.plan([component.id for component in pipeline.components])
            LocalDagRunner().run(pipeline)
            with progress.step("Report"):
                found = read_results(workspace / "pipeline" / "metadata.db", records.class_names)
                run |= found.as_run()
                run["fingerprints"]["model"] = run["serving_check"]["model_digest"]
                run["exit_code"] = EXIT_DONE if run["blessed"] and run["pushed_model"] else EXIT_NOT_BLESSED
                run["components"] = _components(progress)
                run["seconds"] = round(time.monotonic() - started, 1)
                write_report(
                    workspace / "report.html",
                    run,
                    found.history,
                    config,
                    records=records.folder,
                    model=found.trained_model,
                )
    except BaseException as error:
        logging.getLogger().error("the run ended", exc_info=error)
        run["reasons"] = [str(error).strip() or type(error).__name__]
        if isinstance(error, DataAnomalyError):
            run["reasons"] = run["data_findings"] = list(error.args)
        run["exit_code"] = error.code if isinstance(error, SystemExit) else exit_code(error)
        raise
    finally:
        run["components"] = _components(progress)
        run["seconds"] = round(time.monotonic() - started, 1)
        _write_json(workspace / "run.json", run)
    print_summary(console, run)
    console.print(f"Report  {workspace / 'report.html'}", highlight=False, markup=False, soft_wrap=True)
    return run["exit_code"]


# FnApiRunner runs in this process and neither looks for a Go binary on the network nor loses records. TFX packs itself into a
# source distribution for every Beam step unless some dependency is named; an image's name is one, and nothing reads it here.
LOCAL_BEAM_ARGS = ("--runner=FnApiRunner", "--sdk_container_image=unused")


def _prepare(config: Any, workspace: Path, step: Any) -> tuple[Any, dict[str, Any]]:
    """Makes the records, or takes the ones that `--data` names; returns them and the report of their preparation."""
    from data.prepare import prepare, read_report
    from data.sources import is_prepared
    from pipeline.records import read_records

    if is_prepared(config.data.input):
        folder, report = config.data.input, read_report(config.data.input) or {}
        step.detail = "records given"
    else:
        folder = str(workspace / "tfrecords")
        report = prepare(config.data, folder, overwrite=True)
        step.cached = report["reused"]
        step.detail = f"{report['images']:,} images, {report['quarantined']} in quarantine"
    return read_records(folder, config.data), report


def _counts(report: dict[str, Any]) -> dict[str, Any]:
    counts = dict(report.get("counts", {})) | {"quarantined": report.get("quarantined", 0)}
    return counts | {"duplicates": len(report.get("duplicates", []))}


def _components(progress: Progress) -> list[dict[str, Any]]:
    return [
        {"name": step.name, "state": step.state, "seconds": round(step.seconds, 2), "cached": step.cached}
        for step in progress.steps
    ]


def _remove_half_pushed(folder: Path) -> None:
    """Removes versions that a killed Pusher left: it copies `saved_model.pb` last."""
    for version in folder.glob("*/"):
        if version.name.isdecimal() and not (version / "saved_model.pb").exists():
            shutil.rmtree(version)


@contextlib.contextmanager
def _logging_to_standard_error() -> Iterator[None]:
    """Sends log records from INFO on to standard error, which is the run's log; TFX's own go there by absl."""
    from absl import logging as absl_logging

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(name)s: %(message)s"))
    root = logging.getLogger()
    earlier, root.handlers = root.handlers, [handler]
    earlier_level, earlier_verbosity = root.level, absl_logging.get_verbosity()
    root.setLevel(logging.INFO)
    absl_logging.set_verbosity(absl_logging.INFO)
    try:
        yield
    finally:
        root.handlers = earlier
        root.setLevel(earlier_level)
        absl_logging.set_verbosity(earlier_verbosity)


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".tmp")
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files need not be UTF-8
    temporary.replace(path)


def _finite(value: Any) -> Any:
    """Puts null in the place of what is no number, for which JSON has no word."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # TensorFlow's own way out takes a second and complains on standard error
