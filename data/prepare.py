"""Turns labelled images into checked, split, sharded TFRecords: a Beam job, on this machine or on Dataflow.

    python -m data.prepare --input flowers.csv --output records
    python -m data.prepare --input gs://b/photos --output gs://b/records -- --runner=DataflowRunner --project=p ...

Every image is read and decoded once. What cannot be used goes to a quarantine list and the job goes on; a share above
`max_quarantined_fraction` stops it. The bytes are stored as they came where training can use them. A hash of them decides the
split, so the same image always lands in the same one; images that look alike share one. 2,624 images take 10 to 20 seconds
on two cores. `local_runner.py` calls `prepare` too; the steps of the job are in `data.steps`.
"""

import logging
import os
import warnings

if __name__ == "__main__":  # before the libraries below speak on the terminal
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger().addHandler(logging.NullHandler())

import argparse
import concurrent.futures
import contextlib
import dataclasses
import difflib
import fcntl
import hashlib
import itertools
import json
import shutil
import socket
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import apache_beam as beam
import pydantic
import tensorflow as tf
from apache_beam.options.pipeline_options import PipelineOptions, PortableOptions, StandardOptions
from google.protobuf import text_format
from tensorflow_metadata.proto.v0 import schema_pb2

from data.errors import EXIT_DONE, InputError, report_error, validate
from data.features import LABELS_FILE, REPORT_FILE, SCHEMA_FILE, SCHEMA_FOLDER, SPLITS, make_schema
from data.fingerprint import code_fingerprint
from data.inspection import NO_FILE, ImageLimits, is_remote
from data.report import DATA_REPORT_FILE, write_data_report
from data.sources import ELPV, Source, is_prepared, open_source, read_lines
from data.splits import SplitConfig
from data.steps import PARTS_FOLDER, RESULTS, RESULTS_SUFFIX, build_job

logger = logging.getLogger("tfx_vision")

QUARANTINE_FILE = "quarantine.json"
MAX_COUNTED_VALUES = 20  # of an extra column, the most common first
MIN_EVALUATED = 10  # images of a class in a split, below which its accuracy says little
_IMAGES_PER_LISTING = 256  # the smallest piece of work that Beam gives to a worker
_NUM_STATUS_REQUESTS = 64
_LARGE_SIDE = 1_500  # pixels; decoding larger photographs at every epoch takes longer than training on them


class DataConfig(ImageLimits, SplitConfig):
    """Where the images come from and what becomes of them.

    Attributes:
      input: `elpv`, a folder per class, a CSV, or a folder of TFRecords; local or gs://.
      max_quarantined_fraction: share of unusable images, in [0, 1], above which nothing is written.
      num_readers: processes that will read the records side by side, each of which gets a shard at least.
      schema_file: a schema to take in place of the generated one, such as an edited copy of it; local or gs://.
      slice_columns: extra columns whose values become slices of the evaluation; None takes all of them.
      class_names: the ordered class list, for compiling a pipeline whose records cannot be read from here.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    input: str = ELPV
    max_quarantined_fraction: float = pydantic.Field(0.05, ge=0, le=1)
    num_readers: int = pydantic.Field(1, ge=1)
    schema_file: str = ""
    slice_columns: tuple[str, ...] | None = None
    class_names: tuple[str, ...] = ()


def prepare(config: DataConfig, output: str, *, beam_args: Sequence[str] = (), overwrite: bool = False) -> dict[str, Any]:
    """Writes the records of `config.input` to a folder, or keeps the ones there if nothing changed.

    Args:
      config: source and splits.
      output: folder to make: `{split}-{i}-of-{n}.tfrecord.gz`, `labels.txt`, `schema/schema.pbtxt`, `report.json`,
        `quarantine.json`, `report.html`.
      beam_args: options of Beam, such as `--runner=DataflowRunner`; without any, the job runs in this process.
      overwrite: replace a folder that holds other records.

    Returns:
      The report: `input`, `images` listed, `counts` {split: {class: images}}, `quarantined`, `duplicates`, `near_duplicates`,
      `warnings`, `converted`, `facts`, `column_counts`, `class_names`, `columns`, `shards` {file: SHA-256}, `schema` (its
      SHA-256), `fingerprint`, `reused`.

    Raises:
      InputError: if the source is unusable, too much of it is, `output` exists and `overwrite` is off, or the runner's workers
        could not reach a path.
    """
    _check_reach([output], beam_args, received=f"--output {output!r}")
    if is_remote(output):
        return _prepare(config, output.rstrip("/"), beam_args, overwrite=overwrite)
    output = os.path.realpath(output)  # a link stays one: what it points to is replaced
    with _locked(output):
        _recover(output)
        return _prepare(config, output, beam_args, overwrite=overwrite)


def _prepare(config: DataConfig, output: str, beam_args: Sequence[str], *, overwrite: bool) -> dict[str, Any]:
    source = open_source(config.input)
    paths = itertools.chain((reference.path for reference in source.references), source.record_files)
    _check_reach(paths, beam_args, received=f"the input {config.input!r}")
    fingerprint = _fingerprint(config, source)
    previous = read_report(output)
    needed = (LABELS_FILE, os.path.join(SCHEMA_FOLDER, SCHEMA_FILE), *(previous["shards"] if previous else ()))
    is_complete = previous and all(tf.io.gfile.exists(os.path.join(output, name)) for name in needed)
    if is_complete and previous["fingerprint"] == fingerprint:
        return previous | {"reused": True}
    _check_output(config, output, previous, overwrite=overwrite)
    _check_edits(config, source, output, previous)
    temporary = f"{output}.tmp-{_process_name()}"
    if tf.io.gfile.exists(temporary):
        tf.io.gfile.rmtree(temporary)
    tf.io.gfile.makedirs(temporary)
    try:
        report = _run(config, source, temporary, list(beam_args)) | {"fingerprint": fingerprint}
        _write_json(os.path.join(temporary, REPORT_FILE), report)
        write_data_report(temporary, report, _read_json(os.path.join(temporary, QUARANTINE_FILE)))
        if is_complete and previous["shards"] == report["shards"]:
            # The same records: the old files stay, so that nothing behind them in the pipeline has to run again.
            for name in (LABELS_FILE, os.path.join(SCHEMA_FOLDER, SCHEMA_FILE), QUARANTINE_FILE, DATA_REPORT_FILE, REPORT_FILE):
                tf.io.gfile.rename(os.path.join(temporary, name), os.path.join(output, name), overwrite=True)
            return report | {"reused": True}
        _replace(output, temporary)
    finally:
        if tf.io.gfile.exists(temporary):
            tf.io.gfile.rmtree(temporary)
    return report | {"reused": False}


def read_report(folder: str) -> dict[str, Any] | None:
    """Reads the report of a finished preparation; None if there is none."""
    path = os.path.join(folder, REPORT_FILE)
    if not tf.io.gfile.exists(path):
        return None
    try:
        with tf.io.gfile.GFile(path) as file:
            report = json.load(file)
    except json.JSONDecodeError:
        report = None
    # Another program's file of that name is no report of ours.
    return report if isinstance(report, dict) and {"fingerprint", "shards"} <= set(report) else None


def read_class_names(folder: str) -> tuple[str, ...]:
    """Reads the ordered class list that belongs to a folder of records."""
    return read_lines(os.path.join(folder, LABELS_FILE))


def _run(config: DataConfig, source: Source, folder: str, beam_args: list[str]) -> dict[str, Any]:
    schema = _schema(config, source)
    listings = _write_listings(source, os.path.join(folder, "listings"))
    results = os.path.join(folder, "results")

    # FnApiRunner is the in-process runner that neither looks for a Go binary on the network nor loses records.
    options = PipelineOptions(beam_args or ["--runner=FnApiRunner"], save_main_session=False)
    with beam.Pipeline(options=options) as pipeline:
        build_job(
            pipeline,
            listings,
            limits=ImageLimits(**config.model_dump(include=set(ImageLimits.model_fields))),
            splits=SplitConfig(**config.model_dump(include=set(SplitConfig.model_fields))),
            source=dataclasses.replace(source, references=()),
            num_readers=config.num_readers,
            folder=folder,
            results=results,
        )

    found = {name: _read_results(results, name) for name in RESULTS}
    for name in (results, os.path.join(folder, "listings"), os.path.join(folder, PARTS_FOLDER)):
        tf.io.gfile.rmtree(name)
    shards = sorted(found["shards"], key=lambda shard: shard["file"])
    quarantine = sorted(found["quarantine"], key=lambda row: (row["file"], row["line"] or 0))
    duplicates = sorted(found["duplicates"], key=lambda row: (row["file"], row["same_as"]))
    groups = sorted(found["groups"], key=lambda group: group["files"][0]["file"])
    counts = {split: dict.fromkeys(source.class_names, 0) for split in SPLITS}
    for shard in shards:
        for label, number in shard["counts"].items():
            counts[shard["split"]][label] += number
    num_images = _check_nothing_lost(source, listings, found["tallies"], counts, duplicates, quarantine)
    _check_straddling(found["straddling"])
    _check_quarantine(config, quarantine, num_images)
    _check_counts(counts)
    facts = {fact: _range(_merge(shards, "facts", fact)) for fact in ("height", "width", "brightness", "bytes")}
    schema_text = str(schema)
    tf.io.gfile.makedirs(os.path.join(folder, SCHEMA_FOLDER))
    _write_text(os.path.join(folder, SCHEMA_FOLDER, SCHEMA_FILE), schema_text)
    _write_text(os.path.join(folder, LABELS_FILE), "".join(f"{name}\n" for name in source.class_names))
    _write_json(os.path.join(folder, QUARANTINE_FILE), quarantine)
    return {
        "input": config.input,
        "images": num_images,
        "class_names": list(source.class_names),
        "columns": list(source.columns),
        "counts": counts,
        "quarantined": len(quarantine),
        "duplicates": duplicates,
        "near_duplicates": groups,
        "warnings": [*_losses(found["tallies"]), *_warnings(config, counts, groups, facts)],
        "converted": dict(sum((Counter(tally["conversions"]) for tally in found["tallies"]), Counter())),
        "facts": facts,
        "column_counts": {
            name: dict(_merge(shards, "column_counts", name).most_common(MAX_COUNTED_VALUES)) for name in source.columns
        },
        "shards": {shard["file"]: shard["sha256"] for shard in shards},
        "schema": _digest(schema_text),
    }


def _write_listings(source: Source, folder: str) -> list[str]:
    """Writes the images down in pieces, as a job's description must not grow with their number."""
    tf.io.gfile.makedirs(folder)
    rows = (
        (reference.path, reference.label, reference.split, reference.columns, reference.line) for reference in source.references
    )
    pieces: Iterator[Any] = iter(lambda: list(itertools.islice(rows, _IMAGES_PER_LISTING)), [])
    paths = []
    for number, content in enumerate(itertools.chain(pieces, source.record_files)):
        paths.append(os.path.join(folder, f"{number:06d}.json"))
        _write_text(paths[-1], json.dumps(content))
    return paths


def _schema(config: DataConfig, source: Source) -> schema_pb2.Schema:
    """Makes the schema, or reads the user's."""
    generated = make_schema(source.class_names, source.columns)
    if not config.schema_file:
        return generated
    try:
        with tf.io.gfile.GFile(config.schema_file) as file:
            schema = text_format.Parse(file.read(), schema_pb2.Schema())
    except (tf.errors.OpError, text_format.ParseError, UnicodeDecodeError) as error:
        reason = error.message if isinstance(error, tf.errors.OpError) else str(error)
        raise InputError(
            f"Expected `data.schema_file` to be a schema in text form. Received: {config.schema_file!r}: {reason}. "
            "Begin with a copy of the one that is written beside the records."
        ) from error
    lacks = {feature.name for feature in generated.feature} - {feature.name for feature in schema.feature}
    if lacks:
        raise InputError(
            f"Expected {config.schema_file} to describe every feature of the records. "
            f"Received: nothing of {', '.join(sorted(lacks))}. Copy them from the one that is written beside the records."
        )
    return schema


def _check_nothing_lost(
    source: Source,
    listings: list[str],
    tallies: list[dict[str, Any]],
    counts: dict[str, dict[str, int]],
    duplicates: list[dict[str, Any]],
    quarantine: list[dict[str, Any]],
) -> int:
    """Checks that every image came out somewhere; returns their number.

    Raises:
      RuntimeError: if the runner lost or doubled some.
    """
    num_images = sum(tally["images"] for tally in tallies)
    num_records = sum(sum(split.values()) for split in counts.values())
    expected = len(source.references) or num_images  # TFRecords are counted where they are read
    if len(tallies) != len(listings) or num_records + len(duplicates) + len(quarantine) != expected:
        raise RuntimeError(
            f"Expected every one of {expected} images as a record, a duplicate or in quarantine. Received: {num_records} + "
            f"{len(duplicates)} + {len(quarantine)}, from {len(tallies)} of {len(listings)} pieces. The runner lost records."
        )
    return expected


def _check_straddling(straddling: list[list[tuple[str, str]]]) -> None:
    if straddling:
        first = sorted(straddling)[0]
        raise InputError(
            "Expected every image in one split. Received: "
            + " and ".join(f"{path} in {split}" for split, path in first)
            + f", the same image{f' (and {len(straddling) - 1} more)' if len(straddling) > 1 else ''}. "
            "A model would be tested on what it was trained on: mend the split column."
        )


def _losses(tallies: list[dict[str, Any]]) -> list[str]:
    return [
        f"{place.rpartition('#')[0]} is damaged: what follows its record {int(place.rpartition('#')[2]) - 1} is lost."
        for tally in tallies
        for place in tally["cut_off"]
    ]


def _warnings(
    config: DataConfig, counts: dict[str, dict[str, int]], groups: list[dict[str, Any]], facts: dict[str, dict[str, float]]
) -> list[str]:
    """Says in sentences what a person should know before trusting the data."""
    warnings = []
    for split in SPLITS[1:]:
        if small := {label: number for label, number in counts[split].items() if number < MIN_EVALUATED}:
            names = ", ".join(f"{label} ({number})" for label, number in itertools.islice(small.items(), 10))
            who = "1 class has" if len(small) == 1 else f"{len(small)} classes have"
            warnings.append(
                f"{who} fewer than {MIN_EVALUATED} {split} images, too few to judge by: "
                f"{names}{' ...' if len(small) > 10 else ''}."
            )
    if moved := sum(any(file["moved_from"] for file in group["files"]) for group in groups):
        warnings.append(f"{moved} groups of images that look alike would have straddled splits; each is in one split now.")
    if straddling := sum(len({file["split"] for file in group["files"]}) > 1 for group in groups if group["is_joined"]):
        warnings.append(
            f"{straddling} groups of images that look alike straddle splits, as the split column says so: "
            "the test is easier than it looks."
        )
    if large := [len(group["files"]) for group in groups if not group["is_joined"]]:
        warnings.append(
            f"{max(large)} images look alike, too many for one split; they stay where they are. A fixed camera does that, "
            "or frames with nothing in them."
        )
    if mixed := sum(len({file["label"] for file in group["files"]}) > 1 for group in groups if group["is_joined"]):
        warnings.append(f"{mixed} groups of images that look alike have different labels: one of them may be wrong.")
    if not config.max_side and max(facts["height"]["median"], facts["width"]["median"]) > _LARGE_SIDE:
        warnings.append(
            f"Half of the images are larger than {_LARGE_SIDE} pixels; data.max_side = 1024 would shrink them once, "
            "where every epoch decodes them anew."
        )
    return warnings


def _merge(shards: list[dict[str, Any]], kind: str, name: str) -> Counter:
    """Adds up what the shards counted."""
    total: Counter = Counter()
    for shard in shards:
        total.update(dict(shard[kind][name]))
    return total


def _range(counts: Counter) -> dict[str, float]:
    """Returns minimum, median and maximum of counted values."""
    values = sorted(counts)
    middle = sum(counts.values()) / 2
    seen = itertools.accumulate(counts[value] for value in values)
    return {"min": values[0], "median": next(v for v, n in zip(values, seen, strict=True) if n >= middle), "max": values[-1]}


def _check_reach(paths: Iterable[str], beam_args: Sequence[str], *, received: str) -> None:
    """Refuses paths of this machine where the runner's workers have other disks, before anything is paid for."""
    options = PipelineOptions(list(beam_args))
    runner = options.view_as(StandardOptions).runner or ""
    name = runner.rpartition(".")[2].lower().removesuffix("runner")  # Beam too takes `flink` for FlinkRunner
    environment = options.view_as(PortableOptions).environment_type or "DOCKER"  # as Beam has it
    is_elsewhere = "dataflow" in name or (name in ("flink", "portable", "spark") and "docker" in environment.lower())
    local = next((path for path in paths if not is_remote(path)), None) if is_elsewhere else None
    if local is not None:
        remedy = (
            "" if "dataflow" in name else " If its workers do share the disk, say so by --environment_type=PROCESS or LOOPBACK."
        )
        raise InputError(
            f"Expected images and records in a bucket, as the workers of {runner} cannot read this machine's disk. "
            f"Received: {received}{f', with {local}' if local not in received else ''}. "
            f"Copy them there and give gs:// paths, or leave --runner out.{remedy}"
        )


def _check_output(config: DataConfig, output: str, previous: dict[str, Any] | None, *, overwrite: bool) -> None:
    """Refuses to write where something would be lost."""
    if not tf.io.gfile.exists(output) or (tf.io.gfile.isdir(output) and not tf.io.gfile.listdir(output)):
        return
    if not overwrite:
        raise InputError(
            f"Expected `--output` to be a folder that does not exist yet. Received: {output!r}. "
            "Name another one, or replace its records with --overwrite."
        )
    if previous is None and not is_prepared(output):
        raise InputError(
            f"Expected to overwrite records that data.prepare wrote. Received: {output!r}, which holds something else. "
            "Name another folder."
        )
    own = {LABELS_FILE, SCHEMA_FOLDER, QUARANTINE_FILE, REPORT_FILE, DATA_REPORT_FILE}
    names = (name.rstrip("/") for name in tf.io.gfile.listdir(output))
    if foreign := sorted(name for name in names if name not in own and not name.endswith(".tfrecord.gz")):
        raise InputError(
            f"Expected {output} to hold records and nothing else, as all of it is replaced. "
            f"Received: {', '.join(foreign[:3])}{' ...' if len(foreign) > 3 else ''}. Move that, or name another folder."
        )


def _check_edits(config: DataConfig, source: Source, output: str, previous: dict[str, Any] | None) -> None:
    """Refuses to lose a schema that a person has edited where it was written."""
    path = os.path.join(output, SCHEMA_FOLDER, SCHEMA_FILE)
    if config.schema_file or not previous or not tf.io.gfile.exists(path):
        return
    generated = _digest(str(make_schema(source.class_names, source.columns)))  # a killed update has written it already
    if _digest(_read_text(path)) not in (previous.get("schema"), generated):
        raise InputError(
            f"Expected {path} to be as it was written, as the records must be written anew. Received: an edited one. "
            "Copy it to a place of your own and name that in data.schema_file; it then counts for later data too. Or delete it."
        )


def _check_quarantine(config: DataConfig, quarantine: list[dict[str, Any]], num_images: int) -> None:
    if len(quarantine) > config.max_quarantined_fraction * num_images:
        reasons = Counter(row["reason"] for row in quarantine).most_common(3)
        first = quarantine[0]
        raise InputError(
            f"Expected at most {config.max_quarantined_fraction:.0%} of the images to be unusable. "
            f"Received: {len(quarantine)} of {num_images}: "
            + "; ".join(f"{number} x {reason}" for reason, number in reasons)
            + f" (first: {first['file']}"
            + (f", line {first['line']}" if first["line"] else "")
            + "). Mend them, or raise data.max_quarantined_fraction."
            + (" Paths in a CSV are relative to its folder." if NO_FILE in dict(reasons) and first["line"] else "")
        )


def _similar(label: str, labels: Iterable[str]) -> str:
    """Asks whether another class was meant, where a name is nearly the same."""
    others = {other.casefold(): other for other in labels if other != label}
    found = difflib.get_close_matches(label.casefold(), others, n=1, cutoff=0.8)
    return f" Did you mean {others[found[0]]!r}?" if found else ""


def _check_counts(counts: dict[str, dict[str, int]]) -> None:
    for split in SPLITS:
        for label, number in counts[split].items():
            if number == 0:
                raise InputError(
                    f"Expected images of every class in every split. Received: none of class {label!r} in "
                    f"{split!r} ({sum(c[label] for c in counts.values())} in all).{_similar(label, counts[split])} "
                    "Add images of it, remove the class, or raise data.valid_fraction and data.test_fraction."
                )


def _fingerprint(config: DataConfig, source: Source) -> str:
    """Fingerprints the listed images, with size and time of change, the settings and this code."""
    digest = hashlib.sha256(code_fingerprint(__spec__.name if __name__ == "__main__" else __name__).encode())
    settings = config.model_dump(exclude={"slice_columns", "class_names"})
    digest.update(json.dumps([settings, source.class_names, source.columns]).encode())
    if config.schema_file and tf.io.gfile.exists(config.schema_file):
        digest.update(_read_text(config.schema_file).encode())
    for reference in source.references:
        digest.update(repr(reference).encode("utf-8", "surrogateescape"))
    paths = [*(reference.path for reference in source.references), *source.record_files]
    with concurrent.futures.ThreadPoolExecutor(_NUM_STATUS_REQUESTS) as threads:  # a bucket takes its time for each
        for status in threads.map(_status, paths) if any(map(is_remote, paths)) else map(_status, paths):
            digest.update(status.encode())
    return digest.hexdigest()


def _status(path: str) -> str:
    """Returns size and time of change of a file, as text."""
    try:
        if not is_remote(path):
            status = os.stat(path)
            return f"{status.st_size} {status.st_mtime_ns} {status.st_mode}"
        status = tf.io.gfile.stat(path)
        return f"{status.length} {status.mtime_nsec}"
    except (OSError, ValueError, tf.errors.OpError):
        return "missing"  # the job quarantines it with its reason


def _read_results(folder: str, name: str) -> list[Any]:
    path = os.path.join(folder, f"{name}{RESULTS_SUFFIX}")
    return [json.loads(line) for line in read_lines(path)] if tf.io.gfile.exists(path) else []


def _read_text(path: str) -> str:
    with tf.io.gfile.GFile(path) as file:
        return file.read()


def _read_json(path: str) -> Any:
    return json.loads(_read_text(path))


def _write_text(path: str, text: str) -> None:
    with tf.io.gfile.GFile(path, "wb") as file:
        file.write(text.encode("utf-8", "backslashreplace"))  # in JSON, the escape of a byte of a name that is not UTF-8


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _write_json(path: str, value: Any) -> None:
    _write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _locked(output: str) -> Iterator[None]:
    """Keeps a second preparation of the same folder out; the lock goes with the process, however it ends."""
    folder, name = os.path.split(output)
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f".{name}.lock")
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"Expected {output} to be free. Received: another preparation at work. Wait for it.") from error
        try:
            yield
        finally:
            os.unlink(path)


def _recover(output: str) -> None:
    """Clears up after a preparation that was killed; under the lock, nobody else is at work here."""
    folder, name = os.path.split(output)
    for found in sorted(os.listdir(folder)):
        path = os.path.join(folder, found)
        if found.startswith(f"{name}.old-") and not os.path.exists(output):
            os.rename(path, output)  # it was killed between the two renames
        elif found.startswith((f"{name}.old-", f"{name}.tmp-")):
            shutil.rmtree(path)


def _process_name() -> str:
    return f"{socket.gethostname().replace('.', '-')}-{os.getpid()}"


def _replace(output: str, temporary: str) -> None:
    """Puts a finished folder in place; an older one goes only once the new one is there.

    A bucket has no folders: its objects move one by one, and the report, by which records are known as such, last.
    """
    old = f"{output}.old-{_process_name()}"
    if tf.io.gfile.exists(output):
        tf.io.gfile.rename(output, old)
    if is_remote(output):
        report = os.path.join(temporary, REPORT_FILE)
        paths = [os.path.join(folder, name) for folder, _, names in tf.io.gfile.walk(temporary) for name in names]
        for path in [*sorted(set(paths) - {report}), report]:
            target = output + path.removeprefix(temporary)
            tf.io.gfile.makedirs(os.path.dirname(target))
            tf.io.gfile.rename(path, target)
    else:
        tf.io.gfile.rename(temporary, output)
    if tf.io.gfile.exists(old):
        tf.io.gfile.rmtree(old)


_OPTIONS = {
    "valid_fraction": "share of the images that early stopping watches (default: %(default)s)",
    "test_fraction": "share of the images that the model is judged by (default: %(default)s)",
    "split_salt": "any text; another one draws another split",
    "join_near_duplicates": "bring images that look alike into one split",
    "min_side": "shortest side of a usable image, in pixels (default: %(default)s)",
    "max_side": "shrink larger images to this side, in pixels (default: keep them)",
    "max_pixels": "most pixels of a usable image (default: %(default)s)",
    "max_quarantined_fraction": "share of unusable images that is accepted (default: %(default)s)",
    "num_readers": "shards that each split gets at least (default: %(default)s)",
    "schema_file": "schema to take in place of the generated one",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    beam_args = argv[argv.index("--") + 1 :] if "--" in argv else []
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare",
        description="Turns labelled images into checked, split, sharded TFRecords.",
        epilog="Options of Beam follow after --, for example: -- --runner=DataflowRunner --project=P --region=R",
    )
    fields = DataConfig.model_fields
    parser.add_argument(
        "--input", required=True, help="folder per class, CSV (path,label[,split][,...]), folder of TFRecords, or `elpv`"
    )
    parser.add_argument("--output", required=True, help="folder for the records; local or gs://")
    for name, help_text in _OPTIONS.items():
        field = fields[name]
        option = {"action": argparse.BooleanOptionalAction} if field.annotation is bool else {"type": field.annotation}
        parser.add_argument(f"--{name.replace('_', '-')}", default=field.default, help=help_text, **option)
    parser.add_argument("--overwrite", action="store_true", help="replace the records in --output")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv[: argv.index("--")] if "--" in argv else argv)
    progress, earlier_level = logging.StreamHandler(sys.stdout), logger.level
    try:
        settings = {name: value for name, value in vars(arguments).items() if name in fields}
        config = validate(DataConfig, settings)
        print(f"Preparing {config.input} ...", flush=True)
        logger.addHandler(progress)
        logger.setLevel(logging.INFO)
        report = prepare(config, arguments.output, beam_args=beam_args, overwrite=arguments.overwrite)
    except (Exception, KeyboardInterrupt) as error:
        return report_error(error, debug=arguments.debug)
    finally:
        logger.removeHandler(progress)
        logger.setLevel(earlier_level)
    for split, counts in report["counts"].items():
        print(f"{split:>6}: " + ", ".join(f"{number} {label}" for label, number in counts.items()))
    print(
        f"{report['images']} images in, {sum(sum(c.values()) for c in report['counts'].values())} records out, "
        f"{len(report['duplicates'])} exact duplicates left out, {report['quarantined']} in quarantine"
    )
    for warning in report["warnings"]:
        print(f"warning: {warning}")
    if report["quarantined"]:
        print(f"Why     {os.path.join(arguments.output, QUARANTINE_FILE)}")
    print(f"Report  {os.path.join(arguments.output, DATA_REPORT_FILE)}")
    print(f"{'Nothing changed; kept' if report['reused'] else 'Wrote'} {arguments.output}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
