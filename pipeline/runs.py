"""Runs of the compiled pipeline on Vertex AI Pipelines: what the tfx command leaves out there, as its `terminate`, `list` and
`delete` do nothing on Vertex AI, and its `create` neither checks parameters nor waits.

    python -m pipeline.runs submit --parameter epochs=20 --wait
    python -m pipeline.runs wait flowers-20260314-150926-5f3a
    python -m pipeline.runs status|cancel|delete flowers-20260314-150926-5f3a
    python -m pipeline.runs list

Project, region, service account, network and labels are those of the settings, as `kubeflow_runner.py` takes them. A run is
Vertex AI's: it goes on whatever becomes of this command. Ten seconds where the settings are read, two where --project and
--region are given. Exit codes: 0 done; 1 failed; 2 wrong input; 3 the run that was waited for succeeded, but its model was not
blessed, so nothing was pushed; 4 the data gate stopped the run that was waited for; 130 interrupted, whereupon a run goes on.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Before TensorFlow is loaded, which the settings do.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from rich.console import Console
from rich.markup import escape
from rich.spinner import Spinner

from data.errors import EXIT_DONE, EXIT_INTERRUPTED, InputError, report_error
from pipeline.console import live, output_to_log
from pipeline.submission import check_place, create_run, find_job, new_run_name, read_job, read_parameters, run_request

_RUN_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,127}")
_CALL_SECONDS = 30.0  # of one look at a run, after which another is taken
_LONGEST_PAUSE_SECONDS = 60.0  # between looks while there is no connection


@dataclasses.dataclass(frozen=True)
class _Place:
    """Project and region of runs."""

    project: str
    region: str

    @property
    def parent(self) -> str:
        return f"projects/{self.project}/locations/{self.region}"

    def client(self) -> Any:
        from google.cloud.aiplatform_v1 import PipelineServiceClient

        from pipeline.cloud_calls import explaining

        with explaining("speak with Vertex AI"):
            return PipelineServiceClient(client_options={"api_endpoint": f"{self.region}-aiplatform.googleapis.com"})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    arguments = _parse_arguments(argv)
    terminal_options = {"force_terminal": Console().is_terminal, "width": Console().width}  # asked before output is redirected
    try:
        with tempfile.NamedTemporaryFile("r", suffix=".log") as log, output_to_log(Path(log.name)) as terminal:
            return arguments.command(arguments, Console(file=terminal, **terminal_options))
    except Exception as error:
        return report_error(error, debug=arguments.debug)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.runs",
        description="Runs of the compiled pipeline on Vertex AI Pipelines.",
        epilog="Exit codes: 0 done; 1 failed; 2 wrong input; 3 the run succeeded, but its model was not blessed, so nothing "
        "was pushed; 4 the data gate stopped the run; 130 interrupted, whereupon a run goes on.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    submit = _add(commands, "submit", _submit, "run a compiled job")
    submit.add_argument(
        "--pipeline",
        metavar="FILE|NAME",
        help="compiled file, or a pipeline's name where the tfx command compiled it (default: ./pipeline.json, else the "
        "settings' pipeline)",
    )
    submit.add_argument(
        "--parameter", action="append", default=[], metavar="NAME=VALUE", help="in the place of a compiled value; repeatable"
    )
    submit.add_argument("--data", metavar="gs://...", help="records that data.prepare wrote; sets `records` and `schema`")
    submit.add_argument("--name", metavar="ID", help="of the run (default: the pipeline's with the time)")
    submit.add_argument("--wait", action="store_true", help="show its progress and end as the run does")
    wait = _add(commands, "wait", _wait, "show a run's progress, and end as the run does")
    for command in (submit, wait):
        command.add_argument(
            "--interval", type=_seconds, default=10.0, metavar="SECONDS", help="between two looks (default: %(default)s)"
        )
    status = _add(commands, "status", _status, "what a run is at")
    listing = _add(commands, "list", _list, "the pipeline's runs, newest first")
    pipelines = listing.add_mutually_exclusive_group()
    pipelines.add_argument("--pipeline", metavar="NAME", help="of which pipeline (default: the settings')")
    pipelines.add_argument("--all", action="store_true", help="of every pipeline")
    listing.add_argument("--limit", type=_count, default=20, metavar="N", help="at most so many (default: %(default)s)")
    for command in (status, listing):
        command.add_argument("--json", action="store_true", help="for programs")
    cancel = _add(
        commands,
        "cancel",
        _cancel,
        "end a run before its time, and the custom jobs that train for it, known by the run's id as display name; what still "
        "trains for a run that has ended is ended too",
    )
    delete = _add(commands, "delete", _delete, "remove a run that has ended from the list; its artifacts stay in the bucket")
    for command in (wait, status, cancel, delete):
        command.add_argument("name", metavar="NAME", help="of the run: its id, or projects/P/locations/L/pipelineJobs/ID")
    return parser.parse_args(argv)


def _add(commands: Any, name: str, function: Any, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.add_argument("--config", metavar="F.toml", help="settings (default: the file that TFX_VISION_CONFIG names)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="one setting; repeatable")
    parser.add_argument("--project", metavar="ID", help="in the place of vertex.project")
    parser.add_argument("--region", metavar="NAME", help="in the place of vertex.region")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(command=function)
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise ValueError(text)
    return seconds


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise ValueError(text)
    return count


def _submit(arguments: argparse.Namespace, console: Console) -> int:
    if arguments.data and not arguments.data.startswith("gs://"):
        raise InputError(
            f"Expected --data to be a gs:// folder of records. Received: {arguments.data!r}. "
            "Write them with `python -m data.prepare --output gs://...`."
        )
    if arguments.name and not _RUN_ID.fullmatch(arguments.name):
        raise InputError(
            f"Expected --name in lower case: letters, digits and hyphens, at most 128. Received: {arguments.name!r}. Change it."
        )
    job = read_job(find_job(arguments.pipeline, lambda: _settings(arguments, console).pipeline_name))
    parameters = read_parameters(job, arguments.parameter)  # what is wrong here needs no libraries
    with _loading(console):
        from data.features import SCHEMA_FOLDER
        from pipeline.parameters import RECORDS, SCHEMA, THRESHOLDS, TRAINING
    if arguments.data:
        folder = arguments.data.rstrip("/")
        given = [f"{RECORDS}={folder}", f"{SCHEMA}={folder}/{SCHEMA_FOLDER}"]
        parameters = read_parameters(job, given) | parameters
    settings = TRAINING | {name: f"evaluation.{name}" for name in THRESHOLDS}
    # As settings they have their ranges, which the job would only find out hours later.
    overrides = [f"{settings[name]}={value}" for name, value in parameters.items() if name in settings]
    vertex = _settings(arguments, console, overrides).vertex
    place = _place(arguments, console)
    check_place(job, project=place.project, region=place.region, bucket=vertex.bucket)
    request = run_request(job, parameters, labels=vertex.labels, service_account=vertex.service_account, network=vertex.network)
    run = arguments.name or new_run_name(job)
    # A short name is enough only where the settings will be found again.
    is_elsewhere = arguments.project or arguments.region or arguments.config or arguments.set
    known_as = f"{place.parent}/pipelineJobs/{run}" if is_elsewhere else run
    client = place.client()
    try:
        with live(console, Spinner("dots", escape(f"Submitting {run}")), transient=True):
            created = create_run(client, place.parent, request, run)
    except KeyboardInterrupt:
        _print(
            f"Interrupted before Vertex AI answered, so that {run} may be there or not. `python -m pipeline.runs status "
            f"{known_as}` tells, `python -m pipeline.runs cancel {known_as}` ends it.",
            console,
        )
        return EXIT_INTERRUPTED

    def follow() -> int:
        _print(f"Submitted {run}", console)
        _print(f"Console   {_read(created).console}", console)
        if arguments.wait:
            return _follow(client, created.name, console, arguments.interval)
        _print(f"Follow it with `python -m pipeline.runs wait {known_as}`.", console)
        return EXIT_DONE

    return _unless_interrupted(follow, known_as, console)


def _wait(arguments: argparse.Namespace, console: Console) -> int:
    place, name = _named(arguments, console)
    client = place.client()
    return _unless_interrupted(lambda: _follow(client, name, console, arguments.interval), arguments.name, console)


def _follow(client: Any, name: str, console: Console, interval: float) -> int:
    """Shows a run until its end, over lost connections too; returns the run's exit code."""
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError

    from pipeline.cloud_calls import explained
    from pipeline.run_display import Display, print_outcome

    _get(client, name, console)  # what is wrong with the name or the credentials ends here, and not as a lost connection
    num_lost = 0
    with Display(console) as display:
        while True:
            try:
                run = _read(client.get_pipeline_job(name=name, retry=None, timeout=_CALL_SECONDS))
            except (exceptions.GoogleAPIError, GoogleAuthError) as error:
                if not _is_lost(error):
                    raise explained(error, f"look at {name}") from error
                num_lost += 1
                display.note("no answer from Vertex AI; the run goes on, and it is asked again")
                time.sleep(min(interval * num_lost, _LONGEST_PAUSE_SECONDS))
                continue
            num_lost = 0
            display.show(run)
            if run.has_ended:
                break
            time.sleep(interval)
    print_outcome(run, console)
    return run.exit_code


def _is_lost(error: Exception) -> bool:
    """Tells whether the connection is at fault, so that asking again helps."""
    from google.api_core import exceptions

    from pipeline.cloud_calls import NO_CONNECTION, is_transient

    failures = (exceptions.InternalServerError, exceptions.Unknown)
    return is_transient(error) or isinstance(error, failures) or any(words in str(error) for words in NO_CONNECTION)


def _unless_interrupted(command: Callable[[], int], run: str, console: Console) -> int:
    """Says, where the user interrupts, that the run goes on and how to go on with it."""
    try:
        return command()
    except KeyboardInterrupt:
        _print(
            f"Interrupted; the run goes on. `python -m pipeline.runs wait {run}` shows it again, "
            f"`python -m pipeline.runs cancel {run}` ends it.",
            console,
        )
        return EXIT_INTERRUPTED


def _status(arguments: argparse.Namespace, console: Console) -> int:
    place, name = _named(arguments, console)
    run = _read(_get(place.client(), name, console))
    from pipeline.training_jobs import find_training_jobs, state_of

    training = [{"name": job.name, "state": state_of(job)} for job in find_training_jobs(name)]
    if arguments.json:
        _print(json.dumps(run.to_json() | {"training_jobs": training}, indent=2), console)
        return EXIT_DONE
    from pipeline.run_display import print_outcome, run_table

    console.print(run_table(run))
    if run.has_ended:
        print_outcome(run, console)
    for job in training:
        _print(f"Training  {job['name']}, {job['state']}", console)
    _print(f"Console   {run.console}", console)
    return EXIT_DONE


def _list(arguments: argparse.Namespace, console: Console) -> int:
    pipeline = arguments.pipeline
    if not arguments.all and not pipeline:
        pipeline = _settings(arguments, console).pipeline_name
    place = _place(arguments, console)
    client = place.client()
    from pipeline.cloud_calls import explaining, repeated

    request = {
        "parent": place.parent,
        "filter": f'pipeline_name="{pipeline}"' if pipeline else "",
        "order_by": "create_time desc",
        "page_size": min(arguments.limit, 100),
        "read_mask": {"paths": ["name", "display_name", "state", "create_time", "start_time", "end_time"]},
    }
    with explaining("list the runs"), live(console, Spinner("dots", "Asking Vertex AI"), transient=True):
        found = client.list_pipeline_jobs(request=request, **repeated())
        runs = [_read(job) for job in itertools.islice(found, arguments.limit)]
    if arguments.json:
        _print(json.dumps([run.summary() for run in runs], indent=2), console)
    elif not runs:
        of = f"of {pipeline} " if pipeline else ""
        hint = " --all shows those of every pipeline." if pipeline else ""
        _print(f"No runs {of}in {place.project}, {place.region}.{hint}", console)
    else:
        from pipeline.run_display import runs_table

        console.print(runs_table(runs))
    return EXIT_DONE


def _cancel(arguments: argparse.Namespace, console: Console) -> int:
    from pipeline.cloud_calls import explaining, repeated
    from pipeline.training_jobs import cancel_training_jobs

    place, name = _named(arguments, console)
    client = place.client()
    run = _read(_get(client, name, console))
    if not run.has_ended:
        if run.state != "CANCELLING":
            with explaining(f"cancel {run.short_name}"):
                client.cancel_pipeline_job(name=name, **repeated())
        _print(f"Cancelling {run.short_name}; `python -m pipeline.runs wait {arguments.name}` shows its end.", console)
    # After the run, so that it asks for no further one. A run that has ended may have left one, where its step was killed.
    jobs = cancel_training_jobs(name)
    if run.has_ended and not jobs:
        raise InputError(f"Expected a run that goes on. Received: {run.short_name}, which has ended: {run.state.lower()}.")
    for job in jobs:
        _print(f"Cancelling its training job {job}", console)
    return EXIT_DONE


def _delete(arguments: argparse.Namespace, console: Console) -> int:
    from pipeline.cloud_calls import POLLING, explaining, once

    place, name = _named(arguments, console)
    client = place.client()
    run = _read(_get(client, name, console))
    if not run.has_ended:
        raise InputError(
            f"Expected a run that has ended. Received: {run.short_name}, which is {run.state.lower()}. "
            f"End it first: `python -m pipeline.runs cancel {run.short_name}`."
        )
    with explaining(f"delete {run.short_name}"), live(console, Spinner("dots", "Deleting"), transient=True):
        client.delete_pipeline_job(name=name, **once()).result(polling=POLLING)
    _print(f"Deleted {run.short_name}; its artifacts are still in the bucket.", console)
    return EXIT_DONE


def _settings(arguments: argparse.Namespace, console: Console, overrides: Sequence[str] = ()) -> Any:
    with _loading(console):
        from pipeline.config import CONFIG_VARIABLE, load_config
    return load_config(arguments.config or os.environ.get(CONFIG_VARIABLE), overrides=[*arguments.set, *overrides])


@contextlib.contextmanager
def _loading(console: Console) -> Iterator[None]:
    with live(console, Spinner("dots", "Loading TensorFlow and TFX, to read the settings"), transient=True):
        yield


def _place(arguments: argparse.Namespace, console: Console) -> _Place:
    """Returns project and region as given; the settings are read only for what is not."""
    project, region = arguments.project, arguments.region
    if not (project and region):
        vertex = _settings(arguments, console).vertex
        project, region = project or vertex.project, region or vertex.region
    if not project:
        raise InputError(
            "Expected a project. Received: none. Give --project, or set `vertex.project` in the TOML file or as "
            "TFX_VISION_VERTEX__PROJECT."
        )
    return _Place(project, region)


def _named(arguments: argparse.Namespace, console: Console) -> tuple[_Place, str]:
    """Returns the place and the whole name of the run that a user named."""
    from pipeline.run_state import RUN_NAME

    if match := RUN_NAME.fullmatch(arguments.name):
        return _Place(match["project"], match["region"]), arguments.name
    if not _RUN_ID.fullmatch(arguments.name):
        raise InputError(
            f"Expected the name of a run, its id or projects/P/locations/L/pipelineJobs/ID. Received: {arguments.name!r}. "
            "`python -m pipeline.runs list` shows them."
        )
    place = _place(arguments, console)
    return place, f"{place.parent}/pipelineJobs/{arguments.name}"


def _get(client: Any, name: str, console: Console) -> Any:
    from google.api_core import exceptions

    from pipeline.cloud_calls import explaining, repeated

    with explaining(f"look at {name}"), live(console, Spinner("dots", "Asking Vertex AI"), transient=True):
        try:
            return client.get_pipeline_job(name=name, **repeated())
        except exceptions.NotFound as error:
            raise InputError(
                f"Expected the name of a run that is there. Received: {name}. `python -m pipeline.runs list` shows them; also "
                "compare project and region."
            ) from error


def _read(job: Any) -> Any:
    from pipeline.run_state import read_run

    return read_run(job)


def _print(line: str, console: Console) -> None:
    """Prints a line as it is."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
