"""Turns labelled images into checked, split, sharded TFRecords: a Beam job, on this machine or on Dataflow.

    python -m data.prepare --input flowers.csv --output records
    python -m data.prepare --input gs://b/photos --output gs://b/records -- --runner=DataflowRunner --project=p ...

Every image is read and decoded once. What cannot be used goes to a quarantine list and the job goes on; a share above
`max_quarantined_fraction` stops it. The encoded bytes are stored as they are, and a hash of them decides the split, so the
same image always lands in the same one and exact duplicates never straddle two. 2,624 images take 10 to 20 seconds on two
cores. `local_runner.py` calls `prepare` too.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import apache_beam as beam
import pydantic
import tensorflow as tf
from apache_beam.options.pipeline_options import PipelineOptions

from data.errors import EXIT_DONE, InputError, report_error, validate
from data.features import (
    LABELS_FILE,
    SCHEMA_FILE,
    SCHEMA_FOLDER,
    SPLITS,
    TEST_SPLIT,
    TRAIN_SPLIT,
    VALID_SPLIT,
    make_example,
    make_schema,
)
from data.fingerprint import code_fingerprint
from data.sources import ELPV, ImageReference, Source, is_prepared, open_source, read_lines

logger = logging.getLogger("tfx_vision")

REPORT_FILE = "report.json"
QUARANTINE_FILE = "quarantine.json"
_REPORT_SECONDS = 2.0
_TARGET_SHARD_BYTES = 150_000_000
# What no retry would mend; anything else, such as a bucket out of reach, fails the job so that its runner tries again.
_PERMANENT_ERRORS = (
    tf.errors.NotFoundError,
    tf.errors.InvalidArgumentError,
    tf.errors.PermissionDeniedError,
    tf.errors.FailedPreconditionError,
    tf.errors.UnimplementedError,
)
_SAMPLED_SIZES = 200  # images whose size is looked up to choose the number of shards


class DataConfig(pydantic.BaseModel):
    """Where the images come from and how they are split.

    Attributes:
      input: `elpv`, a folder per class, a CSV, or a folder of records that `data.prepare` wrote; local or gs://.
      valid_fraction: share of the images that early stopping watches, in (0, 1).
      test_fraction: share of the images that the gate judges by, in (0, 1).
      split_salt: any text; another one draws another split.
      max_quarantined_fraction: share of unusable images, in [0, 1], above which nothing is written.
      slice_columns: extra columns whose values become slices of the evaluation; None takes all of them.
      class_names: the ordered class list, for compiling a pipeline whose records cannot be read from here.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    input: str = ELPV
    valid_fraction: float = pydantic.Field(0.1, gt=0, lt=1)
    test_fraction: float = pydantic.Field(0.1, gt=0, lt=1)
    split_salt: str = ""
    max_quarantined_fraction: float = pydantic.Field(0.05, ge=0, le=1)
    slice_columns: tuple[str, ...] | None = None
    class_names: tuple[str, ...] = ()

    @pydantic.model_validator(mode="after")
    def _leave_images_to_train_on(self) -> "DataConfig":
        if self.valid_fraction + self.test_fraction >= 1:
            raise ValueError(
                "Expected `valid_fraction` + `test_fraction` to be below 1, as the rest is trained on. Received: "
                f"{self.valid_fraction} + {self.test_fraction}. Take the defaults, 0.1 and 0.1."
            )
        return self


@dataclasses.dataclass(frozen=True)
class _Record:
    """One usable image on its way to a shard."""

    digest: str
    split: str
    label: str
    path: str
    serialized: bytes


def prepare(config: DataConfig, output: str, *, beam_args: Sequence[str] = (), overwrite: bool = False) -> dict[str, Any]:
    """Writes the records of `config.input` to a folder, or keeps the ones there if nothing changed.

    Args:
      config: source and splits.
      output: folder to make: `{split}-{i}-of-{n}.tfrecord.gz`, `labels.txt`, `schema/schema.pbtxt`, `report.json`,
        `quarantine.json`.
      beam_args: options of Beam, such as `--runner=DataflowRunner`; without any, the job runs in this process.
      overwrite: replace a folder that holds other records.

    Returns:
      The report: `input`, `images` listed, `counts` {split: {class: images}}, `quarantined`, `duplicates`, `class_names`,
      `columns`, `shards` {file: SHA-256}, `fingerprint`, `reused`.

    Raises:
      InputError: if the source is unusable, too much of it is, or `output` exists and `overwrite` is off.
    """
    output = output.rstrip("/")
    _recover(output)
    source = open_source(config.input)
    fingerprint = _fingerprint(config, source)
    previous = read_report(output)
    is_complete = previous and all(tf.io.gfile.exists(os.path.join(output, name)) for name in previous["shards"])
    if is_complete and previous["fingerprint"] == fingerprint:
        return previous | {"reused": True}
    _check_output(config, output, previous, overwrite=overwrite)
    temporary = f"{output}.tmp-{_process_name()}"
    if tf.io.gfile.exists(temporary):
        tf.io.gfile.rmtree(temporary)
    tf.io.gfile.makedirs(temporary)
    try:
        report = _run(config, source, temporary, list(beam_args)) | {"fingerprint": fingerprint}
        _write_json(os.path.join(temporary, REPORT_FILE), report)
        if is_complete and previous["shards"] == report["shards"]:
            # The same records: the old files stay, so that nothing behind them in the pipeline has to run again.
            for name in (LABELS_FILE, os.path.join(SCHEMA_FOLDER, SCHEMA_FILE), QUARANTINE_FILE, REPORT_FILE):
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


def choose_split(digest: str, config: DataConfig) -> str:
    """Chooses the split of an image by the SHA-256 digest of its encoded bytes.

    Args:
      digest: hexadecimal digest.
      config: fractions and salt.
    """
    if config.split_salt:
        digest = hashlib.sha256(f"{config.split_salt}{digest}".encode()).hexdigest()
    position = int(digest[:8], 16) / 16**8
    if position < config.test_fraction:
        return TEST_SPLIT
    if position < config.test_fraction + config.valid_fraction:
        return VALID_SPLIT
    return TRAIN_SPLIT


class ReadImage(beam.DoFn):
    """Reads, decodes and hashes one image; what cannot be used leaves by the output `quarantine`."""

    QUARANTINE = "quarantine"

    def __init__(self, config: DataConfig, class_names: Sequence[str], columns: Sequence[str]):
        self._config = config
        self._class_names = frozenset(class_names)
        self._columns = tuple(columns)

    def setup(self) -> None:
        """Starts to count, for the log."""
        self._num_images = 0
        self._reported = time.monotonic()

    def process(self, reference: ImageReference) -> Iterator[Any]:
        """Yields a `_Record`, or a dict of file, label, reason and line."""
        self._num_images += 1
        if time.monotonic() - self._reported > _REPORT_SECONDS:
            logger.info("checked %s images", f"{self._num_images:,}")
            self._reported = time.monotonic()
        try:
            yield self._read(reference)
        except (*_PERMANENT_ERRORS, ValueError) as error:
            reason = error.message if isinstance(error, tf.errors.OpError) else str(error)
            rejected = {
                "file": reference.path,
                "label": reference.label,
                "reason": reason.split("\n")[0][:300],
                "line": reference.line,
            }
            yield beam.pvalue.TaggedOutput(self.QUARANTINE, rejected)

    def _read(self, reference: ImageReference) -> _Record:
        if reference.label not in self._class_names:
            raise ValueError(f"the label {reference.label!r} is not in the list of classes")
        try:
            with tf.io.gfile.GFile(reference.path, "rb") as file:
                encoded = file.read()
        except tf.errors.NotFoundError as error:
            raise ValueError("there is no such file") from error
        if not encoded:
            raise ValueError("the file is empty")
        try:
            pixels = tf.io.decode_image(encoded, expand_animations=False).numpy()
        except tf.errors.InvalidArgumentError as error:
            raise ValueError(f"it cannot be decoded: {error.message.split('[Op:')[0].strip()}") from error
        height, width, channels = pixels.shape
        digest = hashlib.sha256(encoded).hexdigest()
        example = make_example(
            image=encoded,
            label=reference.label,
            filename=reference.path,
            height=height,
            width=width,
            brightness=float(pixels.mean()) / 255,
            channels=channels,
            columns=dict(zip(self._columns, reference.columns, strict=True)),
        )
        return _Record(
            digest=digest,
            split=reference.split or choose_split(digest, self._config),
            label=reference.label,
            path=reference.path,
            serialized=example.SerializeToString(deterministic=True),
        )


class WriteShard(beam.DoFn):
    """Writes one shard in the order of the content's hash, each image once, and tells what it wrote."""

    def __init__(self, folder: str, num_shards: dict[str, int]):
        self._folder = folder
        self._num_shards = num_shards

    def process(self, keyed: tuple[tuple[str, int], Iterable[_Record]]) -> Iterator[dict[str, Any]]:
        """Yields a dict of file, its SHA-256, split, images per class and duplicates left out."""
        (split, shard), records = keyed
        name = f"{split}-{shard:05d}-of-{self._num_shards[split]:05d}.tfrecord.gz"
        counts: Counter[str] = Counter()
        duplicates = []
        last = None
        path = os.path.join(self._folder, name)
        with tf.io.TFRecordWriter(path, tf.io.TFRecordOptions(compression_type="GZIP", compression_level=1)) as writer:
            for record in sorted(records, key=lambda record: (record.digest, record.label, record.path)):
                if last is not None and record.digest == last.digest:
                    duplicates.append({"file": record.path, "label": record.label, "same_as": last.path})
                    continue
                writer.write(record.serialized)
                counts[record.label] += 1
                last = record
        with tf.io.gfile.GFile(path, "rb") as file:
            digest = hashlib.sha256(file.read()).hexdigest()
        yield {"file": name, "sha256": digest, "split": split, "counts": dict(counts), "duplicates": duplicates}


def _run(config: DataConfig, source: Source, folder: str, beam_args: list[str]) -> dict[str, Any]:
    num_shards = _num_shards(config, source)
    results = os.path.join(folder, "results")

    def key_by_shard(record: _Record) -> tuple[tuple[str, int], _Record]:
        return (record.split, int(record.digest[8:16], 16) % num_shards[record.split]), record

    # FnApiRunner is the in-process runner that neither looks for a Go binary on the network nor loses records.
    options = PipelineOptions(beam_args or ["--runner=FnApiRunner"], save_main_session=False)
    with beam.Pipeline(options=options) as pipeline:
        read = (
            pipeline
            | "List images" >> beam.Create(source.references)
            | "Spread over workers" >> beam.Reshuffle()
            | "Read and check"
            >> beam.ParDo(ReadImage(config, source.class_names, source.columns)).with_outputs(
                ReadImage.QUARANTINE, main="records"
            )
        )
        straddling = (
            read.records
            | "Pair content with split" >> beam.Map(lambda record: (record.digest, (record.split, record.path)))
            | "Group by content" >> beam.GroupByKey()
            | "Keep what straddles splits" >> beam.FlatMap(_straddling)
        )
        for name, lines in (
            ("straddling", straddling),
            (
                "shards",
                read.records
                | "Choose shard" >> beam.Map(key_by_shard)
                | "Group by shard" >> beam.GroupByKey()
                | "Write shard" >> beam.ParDo(WriteShard(folder, num_shards)),
            ),
            ("quarantine", read[ReadImage.QUARANTINE]),
        ):
            _ = (
                lines
                | f"Encode {name}" >> beam.Map(json.dumps)
                | f"Report {name}" >> beam.io.WriteToText(os.path.join(results, name), num_shards=1)
            )

    shards = sorted(_read_results(results, "shards"), key=lambda shard: shard["file"])
    quarantine = sorted(_read_results(results, "quarantine"), key=lambda row: (row["file"], row["line"] or 0))
    straddling = sorted(_read_results(results, "straddling"), key=str)
    tf.io.gfile.rmtree(results)
    if straddling:
        raise InputError(
            "Expected every image in one split. Received: "
            + " and ".join(f"{path} in {split}" for split, path in straddling[0])
            + f", the same image{f' (and {len(straddling) - 1} more)' if len(straddling) > 1 else ''}. "
            "A model would be tested on what it was trained on: mend the split column."
        )
    counts = {split: dict.fromkeys(source.class_names, 0) for split in SPLITS}
    duplicates = []
    for shard in shards:
        duplicates += shard["duplicates"]
        for label, number in shard["counts"].items():
            counts[shard["split"]][label] += number
    num_records = sum(sum(split.values()) for split in counts.values())
    num_images = len(source.references)
    if num_records + len(duplicates) + len(quarantine) != num_images:
        raise RuntimeError(
            f"Expected every one of {num_images} images as a record, a duplicate or in quarantine. "
            f"Received: {num_records} + {len(duplicates)} + {len(quarantine)}. The Beam runner lost records."
        )
    _check_quarantine(config, quarantine, num_images)
    _check_counts(config, counts)
    tf.io.gfile.makedirs(os.path.join(folder, SCHEMA_FOLDER))
    _write_text(os.path.join(folder, SCHEMA_FOLDER, SCHEMA_FILE), str(make_schema(source.class_names, source.columns)))
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
        "shards": {shard["file"]: shard["sha256"] for shard in shards},
    }


def _straddling(keyed: tuple[str, Iterable[tuple[str, str]]]) -> Iterator[list[tuple[str, str]]]:
    """Yields one (split, path) for each split of an image that the user put into several."""
    by_split = dict(sorted(keyed[1], reverse=True))
    if len(by_split) > 1:
        yield sorted(by_split.items())


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


def _num_shards(config: DataConfig, source: Source) -> dict[str, int]:
    """Chooses shards of about 150 MB from a sample of file sizes; never from anything that varies between runs."""
    step = max(1, len(source.references) // _SAMPLED_SIZES)
    sizes = []
    for reference in source.references[::step]:
        try:
            sizes.append(tf.io.gfile.stat(reference.path).length)
        except tf.errors.OpError:
            continue  # a missing file: the job quarantines it with its reason
    num_bytes = len(source.references) * sum(sizes) / max(1, len(sizes))
    shares = {VALID_SPLIT: config.valid_fraction, TEST_SPLIT: config.test_fraction}
    shares[TRAIN_SPLIT] = 1 - sum(shares.values())
    return {split: max(1, round(num_bytes * share / _TARGET_SHARD_BYTES)) for split, share in shares.items()}


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
        )


def _check_counts(config: DataConfig, counts: dict[str, dict[str, int]]) -> None:
    for split in SPLITS:
        for label, number in counts[split].items():
            if number == 0:
                raise InputError(
                    f"Expected images of every class in every split. Received: none of class {label!r} in "
                    f"{split!r} ({sum(c[label] for c in counts.values())} in all). Add images of it, remove the class, "
                    "or raise data.valid_fraction and data.test_fraction."
                )


def _fingerprint(config: DataConfig, source: Source) -> str:
    """Fingerprints the listed images, with size and time of change, the settings and this code."""
    digest = hashlib.sha256(code_fingerprint(__spec__.name if __name__ == "__main__" else __name__).encode())
    settings = config.model_dump(exclude={"slice_columns", "class_names"})
    digest.update(json.dumps([settings, source.class_names, source.columns]).encode())
    for reference in source.references:
        digest.update(repr(reference).encode("utf-8", "surrogateescape"))
        try:
            status = tf.io.gfile.stat(reference.path)
            digest.update(f"{status.length} {status.mtime_nsec}".encode())
        except tf.errors.OpError:
            digest.update(b"missing")
    return digest.hexdigest()


def _read_results(folder: str, name: str) -> Iterator[dict[str, Any]]:
    for path in tf.io.gfile.glob(os.path.join(folder, f"{name}-*")):
        yield from (json.loads(line) for line in read_lines(path))


def _write_text(path: str, text: str) -> None:
    with tf.io.gfile.GFile(path, "w") as file:
        file.write(text)


def _write_json(path: str, value: Any) -> None:
    _write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _host_name() -> str:
    return socket.gethostname().replace(".", "-")


def _process_name() -> str:
    return f"{_host_name()}-{os.getpid()}"


def _recover(output: str) -> None:
    """Clears up after a preparation that was killed: its folders carry the names of its machine and process."""
    for path in tf.io.gfile.glob(f"{output}.tmp-*") + tf.io.gfile.glob(f"{output}.old-*"):
        host, _, process = path.rpartition(".")[2].removeprefix("tmp-").removeprefix("old-").rpartition("-")
        if "://" in path or host != _host_name() or os.path.exists(f"/proc/{process}"):
            continue  # a bucket or another machine's, of which nobody here knows whether it is still at work
        if ".old-" in path.removeprefix(output) and not tf.io.gfile.exists(output):
            tf.io.gfile.rename(path, output)  # it was killed between the two renames
        else:
            tf.io.gfile.rmtree(path)


def _replace(output: str, temporary: str) -> None:
    """Puts a finished folder in place; an older one goes only once the new one is there."""
    old = f"{output}.old-{_process_name()}"
    if tf.io.gfile.exists(output):
        tf.io.gfile.rename(output, old)
    tf.io.gfile.rename(temporary, output)
    if tf.io.gfile.exists(old):
        tf.io.gfile.rmtree(old)


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
    parser.add_argument("--input", required=True, help="folder per class, CSV (path,label[,split][,...]) or `elpv`")
    parser.add_argument("--output", required=True, help="folder for the records; local or gs://")
    parser.add_argument("--valid-fraction", type=float, default=fields["valid_fraction"].default)
    parser.add_argument("--test-fraction", type=float, default=fields["test_fraction"].default)
    parser.add_argument("--split-salt", default=fields["split_salt"].default, help="another text draws another split")
    parser.add_argument("--max-quarantined-fraction", type=float, default=fields["max_quarantined_fraction"].default)
    parser.add_argument("--overwrite", action="store_true", help="replace the records in --output")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv[: argv.index("--")] if "--" in argv else argv)
    progress = logging.StreamHandler(sys.stdout)
    try:
        settings = {name: value for name, value in vars(arguments).items() if name in fields}
        config = validate(DataConfig, settings)
        print(f"Preparing {config.input} ...", flush=True)
        logger.addHandler(progress)
        logger.setLevel(logging.INFO)
        report = prepare(config, arguments.output, beam_args=beam_args, overwrite=arguments.overwrite)
    except Exception as error:
        return report_error(error, debug=arguments.debug)
    finally:
        logger.removeHandler(progress)
    for split, counts in report["counts"].items():
        print(f"{split:>6}: " + ", ".join(f"{number} {label}" for label, number in counts.items()))
    print(
        f"{report['images']} images in, {sum(sum(c.values()) for c in report['counts'].values())} records out, "
        f"{len(report['duplicates'])} exact duplicates left out, {report['quarantined']} in quarantine"
    )
    print(f"{'Nothing changed; kept' if report['reused'] else 'Wrote'} {arguments.output}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
