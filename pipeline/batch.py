"""Predicts any number of images in a Beam job, on this machine or on Dataflow, and goes on where a killed job stopped.

The images are listed in chunks. A worker reads a chunk, asks the model, and puts the answers into a file of their own, in a
hidden folder beside the output. Only once every image has its row is the output written, whole, and that folder goes. A job
that starts again with the same model and input skips the chunks whose answers are there. Called by `pipeline.predict`.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import apache_beam as beam
import pyarrow
import pyarrow.parquet
import tensorflow as tf
from apache_beam.options.pipeline_options import PipelineOptions

from data.errors import InputError
from data.inspection import ImageLimits, is_remote
from pipeline.answers import (
    BIGQUERY,
    BIGQUERY_SCHEMA,
    Row,
    bigquery_row,
    bigquery_table,
    printable,
    to_json_line,
    without_facts,
)
from pipeline.inference import BATCH_SIZE, Chunk, PredictImages, find_model
from pipeline.inputs import InputImage, is_record_file, list_inputs, read_record_images
from pipeline.model_digest import model_digest
from pipeline.serving_statistics import write_statistics

logger = logging.getLogger("tfx_vision")

_PARQUET_SCHEMA = pyarrow.schema(
    [
        pyarrow.field("file", pyarrow.string(), nullable=False),
        ("label", pyarrow.string()),
        ("probability", pyarrow.float64()),
        ("probabilities", pyarrow.map_(pyarrow.string(), pyarrow.float64())),
        ("error", pyarrow.string()),
    ]
)
_BIGQUERY_TABLE = re.compile(r"[a-z][-a-z0-9.:]{4,60}[a-z0-9]\.\w{1,1024}\.[-\w]{1,1024}")
_FORMAT = 1  # of what lies below `.partial`; another one begins anew
_FINGERPRINT_FILE = "fingerprint.json"
_REPORT_SECONDS = 2.0


def predict_batch(
    location: str,
    output: str,
    *,
    model: str,
    beam_args: Sequence[str] = (),
    overwrite: bool = False,
    statistics_output: str = "",
    partial: str = "",
    limits: ImageLimits | None = None,
) -> dict[str, Any]:
    """Predicts images and writes a row for each, in the order of the input.

    Args:
      location: what `pipeline.inputs.list_inputs` takes.
      output: `*.jsonl` or `*.parquet`, local or gs://, or `bigquery:project.dataset.table`. Rows have `file` and either
        `label`, `probability` and `probabilities`, or `error`. `probabilities` are {class: probability}, in Parquet a map, in
        BigQuery repeated records.
      model: folder of the SavedModel, or of its versions; local or gs://.
      beam_args: options of Beam, such as `--runner=DataflowRunner`; without any, the job runs in this process.
      overwrite: replace the output.
      statistics_output: file for the statistics of the images' facts and predicted labels, for `drift`.
      partial: folder for the unfinished answers; default `.<output>.partial` beside it; BigQuery needs one.
      limits: of the images; the default ones are those of `data.prepare`.

    Returns:
      `images`, `errors`, `labels` {class: images}, and `resumed`, the images that an earlier job had answered.

    Raises:
      InputError: if input, model or output is wrong.
      RuntimeError: if a row is missing, in which case nothing is written.
    """
    # Hidden, so that a job whose output lies in its input never takes it for images.
    partial = (partial or os.path.join(os.path.dirname(output), f".{os.path.basename(output)}.partial")).rstrip("/")
    _check_output(output, partial, statistics_output, beam_args, overwrite=overwrite)
    folder = find_model(model)
    with _locked(partial):
        settings = {"format": _FORMAT, "model": model_digest(folder), "limits": (limits or ImageLimits()).model_dump()}
        listings = _prepare_partial(location, partial, settings)
        resumed = sum(len(rows) for _, rows in _read_parts(partial))
        # FnApiRunner, as in `data.prepare`.
        options = PipelineOptions(list(beam_args) or ["--runner=FnApiRunner"], save_main_session=False)
        with beam.Pipeline(options=options) as pipeline:
            build_job(
                pipeline, listings, model=folder, digest=settings["model"], partial=partial, limits=limits or ImageLimits()
            )
        summary = _check_nothing_lost(listings, partial) | {"resumed": resumed}
        if statistics_output:
            write_statistics(_part_paths(partial), statistics_output, beam_args=beam_args)
        if output.startswith(BIGQUERY):
            with beam.Pipeline(options=options) as pipeline:
                build_bigquery_job(pipeline, _part_paths(partial), output, temporary=partial, overwrite=overwrite)
        else:
            _write_output(output, (row for _, rows in _read_parts(partial) for row in rows))
        tf.io.gfile.rmtree(partial)
    return summary


def build_job(
    pipeline: beam.Pipeline, listings: Sequence[str], *, model: str, digest: str, partial: str, limits: ImageLimits
) -> None:
    """Adds the steps: chunks, images, answers, files of answers.

    Args:
      pipeline: to add to.
      listings: files that `_prepare_partial` wrote.
      model: folder of the SavedModel.
      digest: of its files.
      partial: folder for the answers.
      limits: of the images.
    """
    _ = (
        pipeline
        | "List chunks" >> beam.Create(listings)
        | "Spread over workers" >> beam.Reshuffle()
        | "Skip what is done" >> beam.ParDo(ListChunks(partial))
        | "Predict" >> PredictImages(model, digest=digest, limits=limits)
        | "Write answers" >> beam.ParDo(WritePart(partial))
    )


def build_bigquery_job(pipeline: beam.Pipeline, parts: Sequence[str], output: str, *, temporary: str, overwrite: bool) -> None:
    """Adds the steps that load the answers into BigQuery, by one load job, which comes whole or not at all.

    Args:
      pipeline: to add to.
      parts: files of answers.
      output: `bigquery:project.dataset.table`.
      temporary: gs:// folder for the files that BigQuery loads.
      overwrite: replace the rows of the table; without, it must be empty or not exist.
    """
    write, create = beam.io.BigQueryDisposition.WRITE_TRUNCATE, beam.io.BigQueryDisposition.CREATE_IF_NEEDED
    _ = (
        pipeline
        | "List answers" >> beam.Create(parts)
        | "Spread over workers" >> beam.Reshuffle()
        | "Read answers" >> beam.FlatMap(_read_rows)
        | "As BigQuery has them" >> beam.Map(bigquery_row)
        | "Load into BigQuery"
        >> beam.io.WriteToBigQuery(
            bigquery_table(output),
            schema=BIGQUERY_SCHEMA,
            method=beam.io.WriteToBigQuery.Method.FILE_LOADS,
            custom_gcs_temp_location=f"{temporary}/bigquery",
            create_disposition=create,
            write_disposition=write if overwrite else beam.io.BigQueryDisposition.WRITE_EMPTY,
        )
    )


class ListChunks(beam.DoFn):
    """Reads a listing and yields the chunks of it that have no answers yet."""

    def __init__(self, partial: str):
        self._partial = partial

    def process(self, listing: str) -> Iterator[Chunk]:
        """Yields each `Chunk`; behind those of a TFRecord, of which nobody knew the length, leaves a note of it."""
        with tf.io.gfile.GFile(listing) as file:
            content = json.load(file)
        name = os.path.splitext(os.path.basename(listing))[0]
        is_records = isinstance(content, str)
        images = read_record_images(content) if is_records else map(InputImage, content)
        number = 0
        for position in itertools.count():
            some = tuple(itertools.islice(images, BATCH_SIZE))
            if not some:
                break
            number += len(some)
            chunk = Chunk(f"{name}-{position:08d}", some)
            if not tf.io.gfile.exists(_part_path(self._partial, chunk.name)):
                yield chunk
        if is_records:
            _write_json(_length_path(self._partial, name), number)


class WritePart(beam.DoFn):
    """Writes the answers for a chunk into a file, whole or not at all."""

    def __init__(self, partial: str):
        self._partial = partial

    def setup(self) -> None:
        """Begins to count for the log."""
        self._num_images = 0
        self._started = self._reported = time.monotonic()

    def process(self, chunk: tuple[str, list[Row]]) -> None:
        """Takes the name of the chunk and its rows."""
        name, rows = chunk
        _write_text(_part_path(self._partial, name), "".join(map(to_json_line, rows)))
        self._num_images += len(rows)
        now = time.monotonic()
        if now - self._reported > _REPORT_SECONDS:
            self._reported = now
            rate = self._num_images / (now - self._started)
            logger.info("predicted %s images, %.0f images/s", f"{self._num_images:,}", rate)


def _check_output(output: str, partial: str, statistics_output: str, beam_args: Sequence[str], *, overwrite: bool) -> None:
    """Refuses, before hours of work, to write where that would fail or lose something."""
    if output.startswith(BIGQUERY):
        if not _BIGQUERY_TABLE.fullmatch(output.removeprefix(BIGQUERY)):
            raise InputError(f"Expected --output to be {BIGQUERY}project.dataset.table. Received: {output!r}. Name all three.")
        if not partial.startswith("gs://"):
            raise InputError(
                "Expected --partial to be a gs:// folder, from which BigQuery loads the answers. "
                f"Received: {partial!r}. Name one in a bucket of the project."
            )
    elif not output.endswith((".jsonl", ".parquet")):
        raise InputError(
            f"Expected --output to end in .jsonl or .parquet, or to be {BIGQUERY}project.dataset.table. Received: {output!r}. "
            "Name such a file."
        )
    elif not is_remote(output) and not os.path.isdir(os.path.dirname(output) or "."):
        raise InputError(f"Expected the folder of --output to exist. Received: {output!r}. Make it.")
    if any("DataflowRunner" in argument for argument in beam_args) and not is_remote(partial):
        raise InputError(
            f"Expected --output or --partial to be in a bucket, as the workers of Dataflow write there. Received: {partial!r}. "
            "Name a gs:// path."
        )
    for path in filter(None, (statistics_output, "" if output.startswith(BIGQUERY) else output)):
        if tf.io.gfile.isdir(path):
            raise InputError(f"Expected a file to write to. Received: {path!r}, a folder. Name a file in it.")
        if tf.io.gfile.exists(path) and not overwrite:
            raise InputError(
                f"Expected an output that does not exist yet. Received: {path!r}. Name another, or replace it with --overwrite."
            )


def _prepare_partial(location: str, partial: str, settings: dict[str, Any]) -> list[str]:
    """Lists the input in chunks, and keeps the answers that an earlier job with the same settings and input has left."""
    listings = f"{partial}/listings-{uuid.uuid4().hex[:8]}"
    tf.io.gfile.makedirs(listings)
    digest = hashlib.sha256(json.dumps(settings).encode())
    paths = []
    pending: list[str] = []

    def flush(content: list[str] | str) -> None:
        if content:
            paths.append(f"{listings}/{len(paths):08d}.json")
            _write_json(paths[-1], content)

    for path in list_inputs(location):
        digest.update(f"{path!r} {_status(path)}\n".encode())
        if is_record_file(path):
            flush(pending)
            flush(path)
            pending = []
        else:
            pending.append(path)
            if len(pending) == BATCH_SIZE:
                flush(pending)
                pending = []
    flush(pending)
    fingerprint = digest.hexdigest()
    known = f"{partial}/{_FINGERPRINT_FILE}"
    if tf.io.gfile.exists(known) and _read_json(known) != fingerprint:
        logger.info("model or input is another than that of the unfinished job in %s: beginning anew", partial)
        for name in ("parts", "lengths"):
            if tf.io.gfile.exists(f"{partial}/{name}"):
                tf.io.gfile.rmtree(f"{partial}/{name}")
    _write_json(known, fingerprint)
    for name in ("parts", "lengths"):
        tf.io.gfile.makedirs(f"{partial}/{name}")
    for name in tf.io.gfile.listdir(partial):  # of a job that was killed
        if name.startswith("listings-") and not listings.endswith(name.rstrip("/")):
            tf.io.gfile.rmtree(f"{partial}/{name.rstrip('/')}")
    return paths


def _status(path: str) -> str:
    """Returns size and time of change of a file, as text."""
    try:
        if not is_remote(path):
            status = os.stat(path)
            return f"{status.st_size} {status.st_mtime_ns}"
        remote = tf.io.gfile.stat(path)
        return f"{remote.length} {remote.mtime_nsec}"
    except (OSError, ValueError, tf.errors.OpError):
        return "missing"  # its row says so


def _check_nothing_lost(listings: Sequence[str], partial: str) -> dict[str, Any]:
    """Counts rows against images, listing by listing, and what the rows say."""
    found: Counter = Counter()
    labels: Counter = Counter()
    errors = 0
    for name, rows in _read_parts(partial):
        found[name.partition("-")[0]] += len(rows)
        errors += sum("error" in row for row in rows)
        labels.update(row["label"] for row in rows if "error" not in row)
    for path in listings:
        name = os.path.splitext(os.path.basename(path))[0]
        content = _read_json(path)
        length = _read_json(_length_path(partial, name)) if isinstance(content, str) else len(content)
        if found[name] != length:
            raise RuntimeError(
                f"Expected a row for each of {length} images of {path}. Received: {found[name]}. Nothing was written; "
                "run the command again, which keeps what is there."
            )
    return {"images": sum(found.values()), "errors": errors, "labels": dict(sorted(labels.items()))}


def _part_path(partial: str, chunk: str) -> str:
    return f"{partial}/parts/{chunk}.jsonl"


def _length_path(partial: str, listing: str) -> str:
    return f"{partial}/lengths/{listing}.json"


def _part_paths(partial: str) -> list[str]:
    """Lists the files of answers in the order of the input."""
    names = sorted(name for name in tf.io.gfile.listdir(f"{partial}/parts") if name.endswith(".jsonl"))
    return [f"{partial}/parts/{name}" for name in names]


def _read_parts(partial: str) -> Iterator[tuple[str, list[Row]]]:
    for path in _part_paths(partial):
        yield os.path.basename(path).removesuffix(".jsonl"), list(_read_rows(path))


def _read_rows(path: str) -> Iterator[Row]:
    with tf.io.gfile.GFile(path) as file:
        yield from map(json.loads, file)


def _write_output(output: str, rows: Iterable[Row]) -> None:
    """Writes the file whole: under another name first, on this machine, as Parquet cannot be written to a bucket piecemeal."""
    beside = None if is_remote(output) else os.path.dirname(output) or "."
    with tempfile.TemporaryDirectory(prefix=".predictions-", dir=beside) as folder:
        path = os.path.join(folder, "output")
        if output.endswith(".parquet"):
            with pyarrow.parquet.ParquetWriter(path, _PARQUET_SCHEMA) as writer:
                while some := list(itertools.islice(rows, 10_000)):
                    writer.write_table(pyarrow.Table.from_pylist([_parquet_row(row) for row in some], _PARQUET_SCHEMA))
        else:
            with open(path, "w", encoding="utf-8") as file:
                file.writelines(to_json_line(without_facts(row)) for row in rows)
        if is_remote(output):
            tf.io.gfile.copy(path, output, overwrite=True)  # an object appears once it is complete
        else:
            os.replace(path, output)


def _parquet_row(row: Row) -> Row:
    pairs = list(row["probabilities"].items()) if "probabilities" in row else None
    return without_facts(row) | {"file": printable(row["file"]), "probabilities": pairs}


def _write_text(path: str, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    with tf.io.gfile.GFile(temporary, "w") as file:
        file.write(text)
    tf.io.gfile.rename(temporary, path, overwrite=True)


def _write_json(path: str, value: Any) -> None:
    _write_text(path, json.dumps(value))  # escapes get names that are not UTF-8 through


def _read_json(path: str) -> Any:
    with tf.io.gfile.GFile(path) as file:
        return json.load(file)


@contextlib.contextmanager
def _locked(partial: str) -> Iterator[None]:
    """Keeps a second job with the same output out; the lock goes with the process, however it ends."""
    if is_remote(partial):
        yield
        return
    os.makedirs(partial, exist_ok=True)
    with open(os.path.join(partial, ".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"Expected {partial} to be free. Received: another job at work. Wait for it.") from error
        try:
            yield
        finally:
            # Nothing is worth keeping where nothing was answered.
            if os.path.isdir(partial) and not any(files for _, _, files in os.walk(os.path.join(partial, "parts"))):
                shutil.rmtree(partial)
