"""Predictions as a user runs them: from a server, in a batch, in a stream; and what moved since the model was trained.

    python -m pipeline.predict online photo.jpg photos/ --server http://localhost:8501
    python -m pipeline.predict batch --input photos --model runs/elpv/serving_model --output answers.jsonl
    python -m pipeline.predict stream --input inbox --model runs/elpv/serving_model --output answers
    python -m pipeline.predict drift --statistics runs/elpv --serving answers.statistics.pb

All give the same answers as the model's `serving_default`. An image that cannot be used is an answer too, with its reason, and
never ends a command. Loading the libraries takes about ten seconds, of `online` about five.
"""

import logging
import os
import warnings

if __name__ == "__main__":  # before the libraries below speak on the terminal
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger().addHandler(logging.NullHandler())

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from data.errors import EXIT_DATA_GATE, EXIT_DONE, EXIT_FAILED, InputError, report_error
from pipeline.answers import printable, to_json_line

logger = logging.getLogger("tfx_vision")

_MODEL_NAME = "model"
_EXIT_CODES = "Exit codes: 0 done, also where images could not be used, each of which says why; 1 failed; 2 wrong input."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    beam_args = argv[argv.index("--") + 1 :] if "--" in argv else []
    arguments = _parse_arguments(argv[: argv.index("--")] if "--" in argv else argv)
    progress = logging.StreamHandler(sys.stderr)
    earlier_level = logger.level
    try:
        if beam_args and not arguments.takes_beam_options:
            raise InputError(f"Expected no options of Beam for this command. Received: {' '.join(beam_args)}. Leave them out.")
        logger.addHandler(progress)
        logger.setLevel(logging.INFO)
        return arguments.command(arguments, beam_args)
    except (Exception, KeyboardInterrupt) as error:
        return report_error(error, debug=arguments.debug)
    finally:
        logger.removeHandler(progress)
        logger.setLevel(earlier_level)


def _parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.predict", description="Predicts the classes of images.", epilog=_EXIT_CODES
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_online(commands)
    _add_batch(commands)
    _add_stream(commands)
    _add_drift(commands)
    return parser.parse_args(argv)


def _add_online(commands: Any) -> None:
    online = commands.add_parser(
        "online",
        help="ask a server or a Vertex AI endpoint",
        description="Asks a server for images, several at once, and again while it is busy. On a terminal the answers are a "
        'table, elsewhere a line of JSON for each image: {"file", "label", "probability", "probabilities": {class: p}} or '
        '{"file", "error"}.',
        epilog="Exit codes: 0 done, also where images could not be used; 1 the server failed for one image or more; "
        "2 wrong input.",
    )
    online.add_argument("inputs", nargs="+", metavar="FILE|FOLDER", help="images, folders, CSVs (path), TFRecords or patterns")
    target = online.add_mutually_exclusive_group()
    target.add_argument(
        "--server", metavar="URL", default="http://localhost:8501", help="address of the server (default: %(default)s)"
    )
    target.add_argument(
        "--endpoint",
        metavar="NAME",
        help="Vertex AI endpoint, projects/P/locations/L/endpoints/ID, asked with application default credentials; images are "
        "shrunk to fit into its requests of 1.5 MB, and a note says so",
    )
    online.add_argument("--name", default=_MODEL_NAME, help="of the model on the server (default: %(default)s)")
    online.add_argument(
        "--concurrency", type=_positive, default=16, metavar="N", help="requests at once (default: %(default)s)"
    )
    online.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="to go on asking a busy server (default: %(default)s)"
    )
    online.add_argument("--json", action="store_true", help="JSON lines on a terminal too")
    online.add_argument("--debug", action="store_true", help="show the traceback of an error")
    online.set_defaults(command=_online, takes_beam_options=False)


def _online(arguments: argparse.Namespace, beam_args: Sequence[str]) -> int:
    from pipeline.online import ServingClient, list_images, predict_online

    if arguments.endpoint:
        from pipeline.vertex_prediction import EndpointClient

        client = EndpointClient(arguments.endpoint, timeout_seconds=arguments.timeout)
    else:
        client = ServingClient(
            arguments.server, name=arguments.name, timeout_seconds=arguments.timeout, concurrency=arguments.concurrency
        )
        client.check()
    answers = predict_online(
        list_images(arguments.inputs), client, concurrency=arguments.concurrency, timeout_seconds=arguments.timeout
    )
    failed = 0
    rows = []
    as_table = sys.stdout.isatty() and not arguments.json
    for answer in _with_progress(answers, "images", is_shown=as_table or not sys.stdout.isatty()):
        failed += answer.server_failed
        if as_table:
            rows.append(answer.row)
        else:
            sys.stdout.write(to_json_line(answer.row))
            sys.stdout.flush()
    if as_table:
        Console().print(_table(rows))
    if failed:
        print(f"error: the server failed for {failed} images; their rows say why. Ask again for these.", file=sys.stderr)
    return EXIT_FAILED if failed else EXIT_DONE


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("file", overflow="fold")
    table.add_column("label")
    table.add_column("probability", justify="right")
    for row in rows:
        file = escape(printable(row["file"]))
        if "error" in row:
            table.add_row(file, f"[red]{escape(row['error'])}[/]", "")
        else:
            note = f" [dim]({escape(row['note'])})[/]" if "note" in row else ""
            table.add_row(file, escape(row["label"]) + note, f"{row['probability']:.1%}")
    return table


def _add_batch(commands: Any) -> None:
    batch = commands.add_parser(
        "batch",
        help="predict any number of images with the model itself, by Beam",
        description="Predicts images with a SavedModel in a Beam job, on this machine or on Dataflow. Each image has a row in "
        "the output, in the order of the input; one that cannot be used has an error in it. A job that was stopped goes on "
        "where it was when it is started again with the same model and input.",
        epilog=f"{_EXIT_CODES} Options of Beam follow after --, for example: -- --runner=DataflowRunner --project=P --region=R",
    )
    batch.add_argument(
        "--input", required=True, help="folder, CSV (path), TFRecords, one image or a pattern; local or gs://; or `elpv`"
    )
    batch.add_argument("--model", required=True, metavar="DIR", help="SavedModel or folder of its versions; local or gs://")
    batch.add_argument(
        "--output", required=True, help="FILE.jsonl or FILE.parquet, local or gs://, or bigquery:project.dataset.table"
    )
    batch.add_argument(
        "--job",
        choices=["beam", "vertex"],
        default="beam",
        help="vertex: a batch prediction job of Vertex AI instead, with --model projects/P/locations/L/models/ID and a gs:// "
        "folder as --output; images are shrunk to fit into its requests",
    )
    batch.add_argument("--overwrite", action="store_true", help="replace the output")
    batch.add_argument(
        "--statistics-output", default="", metavar="FILE", help="statistics of the images and predicted labels, for `drift`"
    )
    batch.add_argument(
        "--partial", default="", metavar="DIR", help="folder for the answers of an unfinished job (default: beside the output)"
    )
    batch.add_argument("--debug", action="store_true", help="show the traceback of an error")
    batch.set_defaults(command=_batch, takes_beam_options=True)


def _batch(arguments: argparse.Namespace, beam_args: Sequence[str]) -> int:
    print(f"Predicting {arguments.input} ...", file=sys.stderr, flush=True)
    if arguments.job == "vertex":
        if beam_args or arguments.partial or arguments.statistics_output:
            raise InputError(
                "Expected neither options of Beam nor --partial nor --statistics-output with --job vertex. "
                "Received: one of them. Leave it out."
            )
        from pipeline.vertex_prediction import predict_on_vertex

        job, num_errors = predict_on_vertex(arguments.input, arguments.output, model=arguments.model)
        print(f"Submitted {job}")
        if num_errors:
            print(f"warning: {num_errors} images could not be used; {arguments.output}/errors.jsonl says why.")
        return EXIT_DONE
    from pipeline.batch import predict_batch

    summary = predict_batch(
        arguments.input,
        arguments.output,
        model=arguments.model,
        beam_args=beam_args,
        overwrite=arguments.overwrite,
        statistics_output=arguments.statistics_output,
        partial=arguments.partial,
    )
    labels = ", ".join(f"{number} {label}" for label, number in summary["labels"].items())
    resumed = f", {summary['resumed']} of them answered by an earlier job" if summary["resumed"] else ""
    print(f"{summary['images']} images in, {summary['images']} rows out{resumed}: {labels or 'no label'}")
    if summary["errors"]:
        print(f"warning: {summary['errors']} images could not be used; their rows say why.")
    if arguments.statistics_output:
        print(f"Wrote {arguments.statistics_output}")
    print(f"Wrote {arguments.output}")
    return EXIT_DONE


def _add_stream(commands: Any) -> None:
    stream = commands.add_parser(
        "stream",
        help="predict images as they come",
        description="Predicts the images that come into a folder, each exactly once, also over restarts with the same "
        "--output; on the cloud, those of a Pub/Sub subscription. Images that cannot be used or come late go to the dead "
        "letters. Ctrl+C or SIGTERM ends it once what it has begun is written.",
        epilog=f"{_EXIT_CODES} Options of Beam for --subscription follow after --, for example: -- --runner=DataflowRunner "
        "--project=P --region=R --temp_location=gs://B/tmp",
    )
    source = stream.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", metavar="DIR", help="folder to look into, with all below it; local or gs://")
    source.add_argument(
        "--subscription", metavar="NAME", help="projects/P/subscriptions/S: images, paths gs://..., or a bucket's notifications"
    )
    stream.add_argument("--model", required=True, metavar="DIR", help="SavedModel or folder of its versions; local or gs://")
    stream.add_argument(
        "--output",
        required=True,
        help="folder on this machine; for --subscription gs://folder, projects/P/topics/T or bigquery:project.dataset.table",
    )
    stream.add_argument(
        "--dead-letter", default="", help="for --subscription: where images without an answer go, as --output (default: there)"
    )
    stream.add_argument(
        "--interval",
        type=float,
        default=2.0,
        metavar="SECONDS",
        help="between two looks into the folder (default: %(default)s)",
    )
    stream.add_argument(
        "--max-age", type=float, metavar="SECONDS", help="older images are late: dead letters (default: any age will do)"
    )
    stream.add_argument("--once", action="store_true", help="end once everything in the folder has been answered")
    stream.add_argument("--debug", action="store_true", help="show the traceback of an error")
    stream.set_defaults(command=_stream, takes_beam_options=True)


def _stream(arguments: argparse.Namespace, beam_args: Sequence[str]) -> int:
    if arguments.subscription:
        from pipeline.pubsub import predict_subscription

        print(f"Reading {arguments.subscription} ...", file=sys.stderr, flush=True)
        job = predict_subscription(
            arguments.subscription,
            arguments.output,
            model=arguments.model,
            dead_letter=arguments.dead_letter,
            max_age_seconds=arguments.max_age,
            beam_args=beam_args,
        )
        print(f"Runs as {job}; drain it to end it.")
        return EXIT_DONE
    if beam_args:
        raise InputError(f"Expected no options of Beam with --input. Received: {' '.join(beam_args)}. Leave them out.")
    print(f"Watching {arguments.input} ... Stop with Ctrl+C.", file=sys.stderr, flush=True)
    from pipeline.stream import predict_stream

    counts = predict_stream(
        arguments.input,
        arguments.output,
        model=arguments.model,
        interval_seconds=arguments.interval,
        max_age_seconds=arguments.max_age,
        once=arguments.once,
    )
    total = counts["predictions"] + counts["dead_letters"]
    print(f"{total} images in all: {counts['predictions']} answered, {counts['dead_letters']} dead letters")
    print(f"Wrote {arguments.output}")
    return EXIT_DONE


def _add_drift(commands: Any) -> None:
    drift = commands.add_parser(
        "drift",
        help="compare the images in use with the training data",
        description="Compares the statistics of images in use, and of their predicted labels, with those of the training "
        "split, and says what has moved by more than the drift comparators of the schema allow.",
        epilog="Exit codes: 0 nothing moved; 1 failed; 2 wrong input; 4 something moved.",
    )
    drift.add_argument(
        "--statistics", required=True, metavar="DIR|FILE", help="of training: a run's workspace, or StatisticsGen's output"
    )
    drift.add_argument(
        "--serving",
        required=True,
        metavar="FILE",
        help="of use: what batch --statistics-output wrote, or models.server --facts",
    )
    drift.add_argument(
        "--schema", default="", metavar="FILE", help="schema.pbtxt with the limits (default: the workspace's, or generated)"
    )
    drift.add_argument("--json", action="store_true", help="one JSON object instead of sentences")
    drift.add_argument("--debug", action="store_true", help="show the traceback of an error")
    drift.set_defaults(command=_drift, takes_beam_options=False)


def _drift(arguments: argparse.Namespace, beam_args: Sequence[str]) -> int:
    from pipeline.drift import num_examples
    from pipeline.serving_statistics import find_drift, find_schema, find_training_statistics, read_serving, read_statistics

    training_path = find_training_statistics(arguments.statistics)
    training, serving = read_statistics(training_path), read_serving(arguments.serving)
    schema = find_schema(arguments.schema, training, arguments.statistics)
    findings, notes = find_drift(serving, training, schema)
    numbers = {"images": num_examples(serving), "training_images": num_examples(training)}
    if arguments.json:
        print(json.dumps({**numbers, "drift": findings, "notes": notes}, ensure_ascii=False))
    else:
        print(f"{numbers['images']:,} images in use against {numbers['training_images']:,} of training")
        for note in notes:
            print(f"note: {note}")
        print(*(findings or ["Nothing has moved by more than its limit."]), sep="\n")
    return EXIT_DATA_GATE if findings else EXIT_DONE


def _with_progress(items: Iterable[Any], what: str, *, is_shown: bool) -> Iterator[Any]:
    """Counts items on the terminal as they pass; standard output is left alone."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.completed:,} {task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not (is_shown and console.is_terminal)) as progress:
        task = progress.add_task(what, total=None)
        for item in items:
            yield item
            progress.advance(task)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


if __name__ == "__main__":
    sys.exit(main())
