"""Puts models into use. `push`: a blessed SavedModel goes into a serving folder, local or gs://, as its next version.

    python -m pipeline.deploy push --model runs/elpv/pipeline/Trainer/model/8 --destination /srv/models/elpv
    python -m pipeline.deploy push --model gs://b/model --blessing gs://b/infra_blessing --destination gs://b/serving

Pusher does this inside of the pipeline; this command does it by hand, for another serving folder or for an earlier model, and
never for one without the blessings of the Evaluator and of the serving check that belong to its very files. A server that
polls the folder, such as TensorFlow Serving, never loads a part of a model from this machine's disk; a bucket cannot rename a
folder, so there `saved_model.pb` comes last. Ten seconds and the time of the copy. Exit codes: 0 pushed; 1 failed; 2 wrong
input; 3 not blessed, so nothing was pushed.
"""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

# Before TensorFlow is loaded, which is once the arguments are read, as it takes seconds.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from rich.console import Console
from rich.markup import escape
from rich.spinner import Spinner

from data.errors import EXIT_DONE, EXIT_NOT_BLESSED, InputError, report_error
from pipeline.console import live, output_to_log

_EXIT_TERMINATED = 128 + signal.SIGTERM  # as a shell has it


class NotBlessedError(RuntimeError):
    """The model lacks a blessing, so it is not pushed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    arguments = _parse_arguments(argv)
    earlier = signal.signal(signal.SIGTERM, _leave)
    terminal_options = {"force_terminal": Console().is_terminal, "width": Console().width}  # asked before output is redirected
    try:
        with tempfile.NamedTemporaryFile("r", suffix=".log") as log, output_to_log(Path(log.name)) as terminal:
            arguments.command(arguments, Console(file=terminal, **terminal_options))
    except NotBlessedError as error:
        report_error(error, debug=arguments.debug)
        return EXIT_NOT_BLESSED
    except Exception as error:
        return report_error(error, debug=arguments.debug)
    finally:
        signal.signal(signal.SIGTERM, earlier)
    return EXIT_DONE


def _leave(*unused: object) -> NoReturn:
    """Lets a command that is told to end, as by `kill`, clean up first."""
    raise SystemExit(_EXIT_TERMINATED)


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.deploy",
        description="Puts models into use.",
        epilog="Exit codes: 0 done; 1 failed; 2 wrong input; 3 not blessed, so nothing was pushed.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    push = commands.add_parser(
        "push",
        help="copy a blessed model into a serving folder, as its next version",
        description="Copies a SavedModel into a serving folder, as a version with a higher number than all others there, which "
        "servers then load. The Evaluator and the serving check must both have blessed this very model: its files are compared "
        "by their SHA-256 with the record of the workspace that made it. Otherwise nothing is pushed, and the exit code is 3.",
    )
    push.add_argument("--model", required=True, metavar="DIR", help="SavedModel, or the Trainer's model; local or gs://")
    push.add_argument("--destination", required=True, metavar="DIR", help="serving folder, made if missing; local or gs://")
    record = push.add_mutually_exclusive_group()
    record.add_argument("--workspace", metavar="DIR", help="that made the model (default: the one that the model lies in)")
    record.add_argument(
        "--blessing",
        metavar="DIR",
        help="folder with the serving check's verdict, serving_check.json, "
        "for a model that is away from its workspace; a later verdict is not known there",
    )
    push.add_argument("--debug", action="store_true", help="show the traceback of an error")
    push.set_defaults(command=_push)
    return parser.parse_args(argv)


def _push(arguments: argparse.Namespace, console: Console) -> None:
    with live(console, Spinner("dots", "Loading TensorFlow"), transient=True):
        from pipeline.blessing import (
            find_workspace,
            is_in_workspace,
            missing_blessing,
            open_metadata,
            saved_model_folder,
        )
        from pipeline.model_digest import model_digest
        from pipeline.versions import push_model

    model = saved_model_folder(os.path.expanduser(arguments.model))
    destination = _serving_folder(os.path.expanduser(arguments.destination), model)
    with live(console, Spinner("dots", "Looking for the model's blessings"), transient=True):
        digest = model_digest(model)
        if arguments.blessing:
            record = arguments.blessing
            missing = _missing_in_verdict(os.path.expanduser(record), digest)
        if not arguments.blessing or (not missing and is_in_workspace(model)):  # where a later verdict may be on record
            record = find_workspace(model, arguments.workspace)
            with open_metadata(record) as store:
                missing = missing_blessing(store, digest)
    if missing:
        raise NotBlessedError(
            f"Expected {model} to have both blessings, the Evaluator's and the serving check's. Received: {missing}"
        )
    with live(console, Spinner("dots", escape(f"Copying to {destination}")), transient=True):
        version = push_model(model, destination, digest=digest)
    console.print(f"Blessed by the Evaluator and the serving check, SHA-256 {digest[:16]}…", highlight=False, soft_wrap=True)
    console.print(f"Pushed  {escape(version)}", highlight=False, soft_wrap=True)


def _serving_folder(destination: str, model: str) -> str:
    """Checks that the destination is, or can become, a folder of versions."""
    import tensorflow as tf

    from data.inspection import is_remote
    from pipeline.versions import SAVED_MODEL_FILE

    destination = destination.rstrip("/") or "/"
    if tf.io.gfile.exists(destination) and not tf.io.gfile.isdir(destination):
        raise InputError(f"Expected --destination to be a folder. Received: {destination!r}, a file. Give a folder.")
    is_inside = not is_remote(destination) and Path(destination).resolve().is_relative_to(Path(model).resolve())
    if is_inside or tf.io.gfile.exists(f"{destination}/{SAVED_MODEL_FILE}"):
        raise InputError(
            f"Expected --destination to be a folder of versions. Received: {destination!r}, a model's own. "
            "Give the folder above it."
        )
    return destination


def _missing_in_verdict(folder: str, digest: str) -> str:
    """Returns what a serving check's own record lacks for a model to be pushed; empty if it lacks nothing."""
    import tensorflow as tf

    from pipeline.serving_check import INFRA_BLESSED_FILE, SERVING_CHECK_FILE, read_serving_check

    try:
        verdict = read_serving_check(folder)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"Expected {SERVING_CHECK_FILE} in {folder} to be JSON. Received: {error}.") from error
    if not isinstance(verdict, dict):
        raise InputError(f"Expected {SERVING_CHECK_FILE} in {folder} to be an object. Received: {type(verdict).__name__}.")
    if verdict.get("model_digest") != digest:
        return f"the verdict in {folder} is about another model, or this one was changed. Give the two of one run, unchanged."
    if verdict.get("blessed") is not True:
        reasons = verdict.get("reasons") or ["it gave no reason"]
        return f"the serving check refused this very model: {reasons[0]}. Mend it and run the pipeline again."
    if not tf.io.gfile.exists(os.path.join(folder, INFRA_BLESSED_FILE)):
        return f"there is no {INFRA_BLESSED_FILE} in {folder}, so the serving check did not finish. Run the pipeline again."
    if verdict.get("evaluator_blessed") is not True:
        return "the serving check blessed it, but the Evaluator refused this very model. Train a better one."
    return ""


if __name__ == "__main__":
    sys.exit(main())
