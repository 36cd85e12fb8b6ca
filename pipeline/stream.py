"""Predicts images as they come, each exactly once: new files of a folder on this machine, Pub/Sub messages on Dataflow.

Here an unbounded source of Beam looks into the folder again and again, on Beam's in-process runner. What has been answered is
kept in a ledger, an SQLite file beside the answers, with the length of each file of answers: a stream that was killed begins by
cutting off what the ledger does not know, and then goes on. Answers go to `predictions-<day>.jsonl`; images that cannot be used
or come too late go to `dead_letter-<day>.jsonl`, with the reason. Each look asks the state of every file there, so move old
images away: 100,000 take about a second. Called by `pipeline.predict`; `pipeline.pubsub` has the stream for the cloud.
"""

import contextlib
import datetime
import fcntl
import gc
import hashlib
import json
import os
import signal
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import tensorflow as tf
from apache_beam.io.restriction_trackers import OffsetRange, OffsetRestrictionTracker
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.transforms.core import RestrictionProvider
from apache_beam.utils.timestamp import Duration

from data.errors import InputError
from data.inspection import ImageLimits, UnusableImageError, is_remote, read_file
from pipeline.answers import Row, to_json_line, without_facts
from pipeline.inference import BATCH_SIZE, Chunk, PredictImages, find_model, load_classifier
from pipeline.inputs import InputImage, walk_files
from pipeline.model_digest import model_digest

PREDICTIONS = "predictions"
DEAD_LETTER = "dead_letter"
LEDGER_FILE = ".ledger.sqlite"
# Beam's in-process runner keeps some 60 kB for each look until its pipeline ends, so that one is followed by another.
_LOOKS_PER_PIPELINE = 200
# Set by a signal, or when an idle stream is to end. Not handed to a step: the runner, in this process, would give it a copy.
_draining = threading.Event()

_TABLES = """
CREATE TABLE IF NOT EXISTS images (
  path BLOB PRIMARY KEY,
  size INTEGER, changed INTEGER,  -- when it was last looked at; nanoseconds
  answered_size INTEGER, answered_changed INTEGER, digest TEXT,  -- of what was answered
  chunk TEXT, next_digest TEXT  -- on its way to an answer
);
CREATE INDEX IF NOT EXISTS chunks ON images (chunk) WHERE chunk IS NOT NULL;
CREATE TABLE IF NOT EXISTS files (name TEXT PRIMARY KEY, length INTEGER);
"""


class Ledger:
    """What a stream has answered, and how long its files of answers are. One process at a time writes it."""

    def __init__(self, folder: str):
        """Opens the ledger, or begins one.

        Args:
          folder: of the answers.
        """
        self._folder = folder
        self._database = sqlite3.connect(os.path.join(folder, LEDGER_FILE), isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA journal_mode=WAL")
        # A note may be lost with the machine's power, and is then made again; the files of answers are synchronized before it.
        self._database.execute("PRAGMA synchronous=NORMAL")
        self._database.executescript(_TABLES)

    def close(self) -> None:
        """Closes the file."""
        self._database.close()

    def recover(self) -> None:
        """Cuts off what a killed stream wrote without noting it, and forgets what it had begun."""
        known = dict(self._database.execute("SELECT name, length FROM files"))
        for name in os.listdir(self._folder):
            if name.startswith((f"{PREDICTIONS}-", f"{DEAD_LETTER}-")) and name.endswith(".jsonl"):
                path = os.path.join(self._folder, name)
                if os.path.getsize(path) > known.get(name, 0):
                    os.truncate(path, known.get(name, 0))
        self._database.execute("UPDATE images SET chunk = NULL, next_digest = NULL WHERE chunk IS NOT NULL")

    def is_new(self, path: str, size: int, changed: int) -> bool | None:
        """Tells whether a file is to be read, as it rests since the last look and has no answer; None if it does not rest."""
        key = os.fsencode(path)
        row = self._database.execute(
            "SELECT size, changed, answered_size, answered_changed, chunk FROM images WHERE path = ?", (key,)
        ).fetchone()
        if row is None or row[:2] != (size, changed):
            self._database.execute(
                "INSERT INTO images (path, size, changed) VALUES (?, ?, ?) "
                "ON CONFLICT (path) DO UPDATE SET size = excluded.size, changed = excluded.changed",
                (key, size, changed),
            )
            return None
        return row[2:4] != (size, changed) and row[4] is None

    def begin(self, path: str, chunk: str, digest: str) -> bool:
        """Puts a file into a chunk; not if it has been answered with this very content, only touched since."""
        key = os.fsencode(path)
        (answered,) = self._database.execute("SELECT digest FROM images WHERE path = ?", (key,)).fetchone()
        if answered == digest:
            self._database.execute("UPDATE images SET answered_size = size, answered_changed = changed WHERE path = ?", (key,))
            return False
        self._database.execute("UPDATE images SET chunk = ?, next_digest = ? WHERE path = ?", (chunk, digest, key))
        return True

    def commit(self, chunk: str, rows: list[Row]) -> None:
        """Writes the answers for a chunk, and notes them; a second time, nothing.

        The files come first and the note second: lines without a note are cut off by `recover`.
        """
        if not self._database.execute("SELECT 1 FROM images WHERE chunk = ? LIMIT 1", (chunk,)).fetchone():
            return
        day = datetime.datetime.now(datetime.UTC).date()
        lengths = {}
        for name, some in (
            (f"{PREDICTIONS}-{day}.jsonl", [row for row in rows if "error" not in row]),
            (f"{DEAD_LETTER}-{day}.jsonl", [row for row in rows if "error" in row]),
        ):
            if some:
                with open(os.path.join(self._folder, name), "ab") as file:
                    file.write("".join(to_json_line(without_facts(row)) for row in some).encode())
                    file.flush()
                    os.fsync(file.fileno())
                    lengths[name] = file.tell()
        self._database.execute("BEGIN IMMEDIATE")
        self._database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?)", lengths.items())
        self._database.execute(
            "UPDATE images SET answered_size = size, answered_changed = changed, digest = next_digest, chunk = NULL, "
            "next_digest = NULL WHERE chunk = ?",
            (chunk,),
        )
        self._database.execute("COMMIT")


class _Looks(RestrictionProvider):
    """The looks into a folder, numbered."""

    def initial_restriction(self, element: Any) -> OffsetRange:
        return OffsetRange(0, _LOOKS_PER_PIPELINE)

    def create_tracker(self, restriction: OffsetRange) -> OffsetRestrictionTracker:
        return OffsetRestrictionTracker(restriction)

    def restriction_size(self, element: Any, restriction: OffsetRange) -> int:
        return 1


_LOOKS = beam.DoFn.RestrictionParam(_Looks())


class FindNewImages(beam.DoFn):
    """Looks into a folder again and again, and yields chunks of the images that have come; ends when the stream is drained.

    A file is taken once two looks have found it the same and an interval has passed since it was changed, so that none is read
    that is still being written.
    """

    def __init__(self, output: str, *, interval_seconds: float, max_age_seconds: float | None, once: bool):
        self._output = output
        self._interval_seconds = interval_seconds
        self._max_age_seconds = max_age_seconds
        self._once = once

    def setup(self) -> None:
        """Opens the ledger."""
        self._ledger = Ledger(self._output)

    def teardown(self) -> None:
        """Closes the ledger."""
        self._ledger.close()

    @beam.DoFn.unbounded_per_element()
    def process(self, folder: str, looks: Any = _LOOKS) -> Iterator[Chunk]:
        """Yields each `Chunk`."""
        look = looks.current_restriction().start
        if not looks.try_claim(look):
            return
        self._num_moving = self._num_found = 0
        yield from self._chunks(folder)  # each comes back once it has been answered, as all steps are one stage
        if self._once and not self._num_moving and not self._num_found:
            _draining.set()
        if look == _LOOKS_PER_PIPELINE - 1:
            _draining.wait(self._interval_seconds)  # before the first look of the next pipeline
        elif _draining.is_set():
            looks.try_claim(_LOOKS_PER_PIPELINE - 1)
        else:
            looks.defer_remainder(Duration(seconds=self._interval_seconds))

    def _chunks(self, folder: str) -> Iterator[Chunk]:
        name, images = uuid.uuid4().hex, []
        for path in walk_files(folder):
            if image := self._image(path, name):
                images.append(image)
            if len(images) == BATCH_SIZE:
                yield Chunk(name, tuple(images))
                name, images = uuid.uuid4().hex, []
            if _draining.is_set():  # what has been taken is answered, and nothing more is taken
                break
        if images:
            yield Chunk(name, tuple(images))

    def _image(self, path: str, chunk: str) -> InputImage | None:
        """Reads a file that is new and rests."""
        try:
            size, changed = _status(path)
        except (OSError, tf.errors.NotFoundError):
            return None  # it has gone again
        is_new = self._ledger.is_new(path, size, changed)
        age = time.time() - changed / 1e9
        if is_new and 0 <= age < self._interval_seconds:  # after a look that took long the next one may follow at once
            is_new = None
        self._num_moving += is_new is None
        if not is_new:
            return None
        encoded, problem = None, None
        try:
            encoded = read_file(path)
            digest = hashlib.sha256(encoded).hexdigest()
            if self._max_age_seconds is not None and age > self._max_age_seconds:
                problem = f"it came late: it is {age:,.0f} s old; the limit is {self._max_age_seconds:g}"
        except UnusableImageError as error:
            problem = str(error)
            digest = problem
        if not self._ledger.begin(path, chunk, digest):
            return None
        self._num_found += 1
        return InputImage(path, encoded=encoded, problem=problem)


class CommitAnswers(beam.DoFn):
    """Writes the answers for each chunk, exactly once."""

    def __init__(self, output: str):
        self._output = output

    def setup(self) -> None:
        """Opens the ledger."""
        self._ledger = Ledger(self._output)

    def teardown(self) -> None:
        """Closes the ledger."""
        self._ledger.close()

    def process(self, chunk: tuple[str, list[Row]]) -> None:
        """Takes the name of the chunk and its rows."""
        self._ledger.commit(*chunk)


def predict_stream(
    folder: str,
    output: str,
    *,
    model: str,
    interval_seconds: float = 2.0,
    max_age_seconds: float | None = None,
    once: bool = False,
    limits: ImageLimits | None = None,
) -> dict[str, int]:
    """Predicts the images of a folder as they come, until a signal (SIGINT, SIGTERM) ends it; it then finishes its chunk.

    Args:
      folder: to look into, with all below it; local or gs://.
      output: local folder for the answers, made if missing; the same one goes on after a restart.
      model: folder of the SavedModel, or of its versions, of which the newest now is taken.
      interval_seconds: between two looks.
      max_age_seconds: images that changed longer ago when they are found go to the dead letters; None for any age.
      once: end once everything there has been answered.
      limits: of the images.

    Returns:
      `predictions` and `dead_letters`: rows that this and earlier runs have written.

    Raises:
      InputError: if folder, model or output is wrong.
      RuntimeError: if another stream writes there.
    """
    if not tf.io.gfile.isdir(folder):
        raise InputError(f"Expected --input to be a folder. Received: {folder!r}. Make it, or name another.")
    if is_remote(output):
        raise InputError(f"Expected --output to be a folder on this machine. Received: {output!r}. The ledger needs locks.")
    if not is_remote(folder) and os.path.realpath(output).startswith(os.path.realpath(folder).rstrip("/") + "/"):
        raise InputError(f"Expected --output to lie outside of the input. Received: {output!r}. Name a folder beside it.")
    found = find_model(model)
    os.makedirs(output, exist_ok=True)
    with _locked(output):
        ledger = Ledger(output)
        ledger.recover()
        ledger.close()
        digest = model_digest(found)
        load_classifier(found, digest)  # before anything is taken
        finder = FindNewImages(output, interval_seconds=interval_seconds, max_age_seconds=max_age_seconds, once=once)
        options = PipelineOptions(["--runner=FnApiRunner", "--streaming"], save_main_session=False)
        with _drain_on_signal():
            while not _draining.is_set():
                with beam.Pipeline(options=options) as pipeline:
                    _ = (
                        pipeline
                        | "The folder" >> beam.Create([folder])
                        | "Find new images" >> beam.ParDo(finder)
                        | "Predict" >> PredictImages(found, digest=digest, limits=limits or ImageLimits())
                        | "Commit answers" >> beam.ParDo(CommitAnswers(output))
                    )
                gc.collect()  # a pipeline is a ring of references, a large one after many looks
        return {"predictions": _count(output, PREDICTIONS), "dead_letters": _count(output, DEAD_LETTER)}


def read_answers(output: str) -> Iterator[Row]:
    """Yields the rows that a stream has written, of both kinds."""
    for name in sorted(os.listdir(output)):
        if name.startswith((f"{PREDICTIONS}-", f"{DEAD_LETTER}-")):
            with open(os.path.join(output, name), encoding="utf-8") as file:
                yield from map(json.loads, file)


def _count(output: str, kind: str) -> int:
    number = 0
    for name in os.listdir(output):
        if name.startswith(f"{kind}-"):
            with open(os.path.join(output, name), "rb") as file:
                number += sum(1 for _ in file)
    return number


def _status(path: str) -> tuple[int, int]:
    """Returns size in bytes and time of change in nanoseconds."""
    if is_remote(path):
        remote = tf.io.gfile.stat(path)
        return remote.length, remote.mtime_nsec
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def _drain_on_signal() -> Iterator[None]:
    """Lets the first SIGINT or SIGTERM end the stream after its chunk, and the second at once."""
    _draining.clear()
    earlier: dict[signal.Signals, Any] = {}

    def drain(number: int, frame: Any) -> None:
        _draining.set()
        signal.signal(number, earlier[signal.Signals(number)])

    try:
        if threading.current_thread() is threading.main_thread():
            earlier.update({number: signal.signal(number, drain) for number in (signal.SIGINT, signal.SIGTERM)})
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _locked(output: str) -> Iterator[None]:
    """Keeps a second stream with the same answers out; the lock goes with the process, however it ends."""
    with open(os.path.join(output, ".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"Expected {output} to be free. Received: another stream at work. Stop that.") from error
        yield
