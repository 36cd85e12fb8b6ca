"""Puts models into use: in a serving folder, or on a Vertex AI endpoint.

    python -m pipeline.deploy push --model runs/elpv/pipeline/Trainer/model/8 --destination /srv/models/elpv
    python -m pipeline.deploy push --model gs://b/model --blessing gs://b/infra_blessing --destination gs://b/serving
    python -m pipeline.deploy canary --model runs/elpv/pipeline/Trainer/model/8 --config vertex.toml
    python -m pipeline.deploy promote --config vertex.toml

Pusher and VertexDeployer do this inside of the pipeline; these commands do it by hand, for another place or for an earlier
model, and never for one without the blessings of the Evaluator and of the serving check that belong to its very files.

`push --destination`: the model becomes the next version of a serving folder, local or gs://. A server that polls the folder,
such as TensorFlow Serving, never loads a part of a model from this machine's disk; a bucket cannot rename a folder, so there
`saved_model.pb` comes last. Ten seconds and the time of the copy. `push --endpoint` does what the pipeline does on Vertex AI;
`canary`, `promote`, `rollback`, `undeploy` and `status` do it in steps, see `pipeline.endpoints`. A deployment takes Vertex AI
5 to 15 minutes. Exit codes: 0 done; 1 failed; 2 wrong input; 3 not blessed, so nothing was pushed.
"""

import argparse
import dataclasses
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

# Before TensorFlow is loaded, which is once the arguments are read, as it takes seconds.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from rich.console import Console
from rich.markup import escape
from rich.spinner import Spinner

from data.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_NOT_BLESSED, InputError, report_error
from pipeline import deploy_vertex
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
    except KeyboardInterrupt:
        print("error: interrupted. Repeat the command; it goes on from what is there.", file=sys.stderr)
        return EXIT_INTERRUPTED
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
    _add_push(commands)
    _add_canary(commands)
    deploy_vertex.add_commands(commands)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def _add_push(commands: Any) -> None:
    push = commands.add_parser(
        "push",
        help="copy a blessed model into a serving folder, as its next version; or bring it to an endpoint, with all steps",
        description="Copies a SavedModel into a serving folder, as a version with a higher number than all others there, which "
        "servers then load; or brings it to a Vertex AI endpoint by steps of the traffic, with a check of its answers at each, "
        "as the pipeline does. The Evaluator and the serving check must both have blessed this very model: its files are "
        "compared by their SHA-256 with the record of the workspace that made it. Otherwise nothing is pushed, and the exit "
        "code is 3.",
    )
    _add_model_arguments(push)
    place = push.add_mutually_exclusive_group(required=True)
    place.add_argument("--destination", metavar="DIR", help="serving folder, made if missing; local or gs://")
    place.add_argument("--endpoint", metavar="NAME", help="display name of a Vertex AI endpoint, made if missing")
    deploy_vertex.add_model_arguments(push)
    push.set_defaults(command=_push)


def _add_canary(commands: Any) -> None:
    canary = commands.add_parser(
        "canary",
        help="bring a blessed model to a Vertex AI endpoint with a first share of the traffic",
        description="Uploads a SavedModel as a new version, deploys it with a small share of the traffic, and compares its "
        "answers to real images with those of training. If one differs the model is taken back and the exit code is 1; else "
        "`promote` goes on. The first model of an endpoint gets all of the traffic. Both blessings are needed, as for `push`.",
    )
    _add_model_arguments(canary)
    deploy_vertex.add_model_arguments(canary)
    canary.add_argument("--endpoint", metavar="NAME", help=deploy_vertex.ENDPOINT_HELP)
    canary.add_argument(
        "--share", type=deploy_vertex.percentage, metavar="PERCENT", help="of the traffic (default: the first of traffic_steps)"
    )
    canary.set_defaults(command=_canary)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="SavedModel, or the Trainer's model; local or gs://")
    record = parser.add_mutually_exclusive_group()
    record.add_argument("--workspace", metavar="DIR", help="that made the model (default: the one that the model lies in)")
    record.add_argument(
        "--blessing",
        metavar="DIR",
        help="folder with the serving check's verdict, serving_check.json, "
        "for a model that is away from its workspace; a later verdict is not known there",
    )


def _push(arguments: argparse.Namespace, console: Console) -> None:
    if arguments.endpoint:
        _deploy(arguments, console)
        return
    deploy_vertex.refuse_arguments(arguments)
    with live(console, Spinner("dots", "Loading TensorFlow"), transient=True):
        from pipeline.blessing import saved_model_folder
        from pipeline.versions import push_model

    model = saved_model_folder(os.path.expanduser(arguments.model))
    destination = _serving_folder(os.path.expanduser(arguments.destination), model)
    blessed = _find_blessed(arguments, model, console)
    with live(console, Spinner("dots", escape(f"Copying to {destination}")), transient=True):
        version = push_model(model, destination, digest=blessed.digest)
    _say_blessed(console, blessed)
    console.print(f"Pushed  {escape(version)}", highlight=False, soft_wrap=True)


def _canary(arguments: argparse.Namespace, console: Console) -> None:
    _deploy(arguments, console, is_canary=True)


def _deploy(arguments: argparse.Namespace, console: Console, *, is_canary: bool = False) -> None:
    settings = deploy_vertex.read_settings(arguments, console)  # first, as what is wrong there shows at once
    with live(console, Spinner("dots", "Loading TensorFlow"), transient=True):
        from pipeline.blessing import saved_model_folder

    blessed = _find_blessed(arguments, saved_model_folder(os.path.expanduser(arguments.model)), console)
    _say_blessed(console, blessed)
    steps = settings.config.traffic_steps
    if is_canary:
        steps = (arguments.share or steps[0],)
    deploy_vertex.deploy(
        settings, arguments, console, model=blessed.model, digest=blessed.digest, workspace=blessed.workspace, steps=steps
    )


@dataclasses.dataclass(frozen=True)
class _Blessed:
    """A model with both blessings: its folder, its digest, and the workspace that says so, if one does."""

    model: str
    digest: str
    workspace: Path | None


def _find_blessed(arguments: argparse.Namespace, model: str, console: Console) -> _Blessed:
    """Looks for both blessings of a SavedModel.

    Raises:
      NotBlessedError: if it lacks one.
    """
    from pipeline.blessing import find_workspace, is_in_workspace, missing_blessing, open_metadata
    from pipeline.model_digest import model_digest

    workspace = None
    with live(console, Spinner("dots", "Looking for the model's blessings"), transient=True):
        digest = model_digest(model)
        if arguments.blessing:
            missing = _missing_in_verdict(os.path.expanduser(arguments.blessing), digest)
        if not arguments.blessing or (not missing and is_in_workspace(model)):  # where a later verdict may be on record
            workspace = find_workspace(model, arguments.workspace)
            with open_metadata(workspace) as store:
                missing = missing_blessing(store, digest)
    if missing:
        raise NotBlessedError(
            f"Expected {model} to have both blessings, the Evaluator's and the serving check's. Received: {missing}"
        )
    return _Blessed(model, digest, workspace)


def _say_blessed(console: Console, blessed: _Blessed) -> None:
    text = f"Blessed by the Evaluator and the serving check, SHA-256 {blessed.digest[:16]}…"
    console.print(text, highlight=False, soft_wrap=True)


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
