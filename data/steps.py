"""The steps of the Beam job: look at every image, sort out duplicates, join what looks alike, write shards.

Image bytes never pass through Beam's shuffle, which keeps them in memory where the job runs in one process. A worker puts the
records of the images that it has looked at into a file of its own, `parts/<random>`, behind each a thumbnail for the search for
near-duplicates, and passes on where they are. The worker that writes a shard fetches them from there. Called by `data.prepare`.
"""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import tensorflow as tf

from data.features import make_example
from data.inspection import THUMBNAIL_SIDE, ImageLimits, InspectedImage, UnusableImageError, inspect_image, is_remote, read_file
from data.sources import ImageReference, Source, read_records
from data.splits import SplitConfig, choose_group_split, choose_split, find_near_duplicates

logger = logging.getLogger("tfx_vision")

PARTS_FOLDER = "parts"
# A fixed camera or black frames make everything look alike; one split could not hold such a group.
LARGE_GROUP_SHARE = 0.02  # of the images
MIN_LARGE_GROUP = 20  # images
MAX_VALUES = 1_000  # of an extra column, counted for the report
TARGET_SHARD_BYTES = 150_000_000
RESULTS_SUFFIX = ".jsonl"
RESULTS = ("tallies", "quarantine", "duplicates", "straddling", "groups", "shards")
_CHUNK_BYTES = 1_000_000
_REPORT_SECONDS = 2.0
_NUM_THREADS = max(2, os.cpu_count() or 2)  # decoders let go of Python's lock
_IMAGES_AT_ONCE = 4 * _NUM_THREADS


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One usable image on its way to a shard; the record itself waits in a file.

    Attributes:
      digest: SHA-256 of the image's content, hexadecimal.
      split: given by the user, or None until it is chosen.
      label: class name.
      path: where the image came from.
      line: in the CSV, or None.
      columns: values of the extra columns.
      height: pixels.
      width: pixels.
      brightness: mean grey value, in [0, 1].
      perceptual_hash: packed bits.
      part: name of the file that the record waits in.
      offset: in `part`, in bytes.
      num_bytes: of the record; the thumbnail follows it.
    """

    digest: str
    split: str | None
    label: str
    path: str
    line: int | None
    columns: tuple[str, ...]
    height: int
    width: int
    brightness: float
    perceptual_hash: bytes
    part: str
    offset: int
    num_bytes: int


class InspectImages(beam.DoFn):
    """Reads and looks at the images of one listing; what cannot be used leaves by the output `quarantine`."""

    QUARANTINE = "quarantine"
    TALLY = "tally"

    def __init__(self, limits: ImageLimits, class_names: Sequence[str], columns: Sequence[str], folder: str, root: str):
        self._limits = limits
        self._class_names = frozenset(class_names)
        self._columns = tuple(columns)
        self._folder = os.path.join(folder, PARTS_FOLDER)
        self._root = root.rstrip("/") + "/" if root else ""

    def setup(self) -> None:
        """Starts the threads, and to count for the log."""
        self._threads = concurrent.futures.ThreadPoolExecutor(_NUM_THREADS)
        self._num_images = 0
        self._reported = time.monotonic()

    def teardown(self) -> None:
        """Stops the threads."""
        self._threads.shutdown()

    def process(self, listing: str) -> Iterator[Any]:
        """Yields a `Record` for each usable image; of each other one file, label, reason and line; and a tally.

        All but records are JSON, whose escapes get names that are not UTF-8 through Beam's coders.

        Args:
          listing: path of a JSON file: a list of image references, or the name of a file of TFRecords.
        """
        with tf.io.gfile.GFile(listing) as file:
            content = json.load(file)
        references = _references(content) if isinstance(content, list) else read_records(content, self._columns)
        tf.io.gfile.makedirs(self._folder)
        part = uuid.uuid4().hex
        tally = {"images": 0, "conversions": Counter(), "cut_off": []}
        offset = 0
        with tf.io.gfile.GFile(os.path.join(self._folder, part), "wb") as file:
            # A few at a time, so that no more than these are in memory.
            while some := list(itertools.islice(references, _IMAGES_AT_ONCE)):
                for reference, result in zip(some, self._threads.map(self._inspect, some), strict=True):
                    tally["images"] += 1
                    if reference.is_cut_off:
                        tally["cut_off"].append(reference.path)
                    if isinstance(result, str):
                        yield beam.pvalue.TaggedOutput(self.QUARANTINE, _quarantined(reference, result))
                        continue
                    digest, image = result
                    serialized = self._serialize(reference, image)
                    file.write(serialized + image.thumbnail)
                    tally["conversions"].update(image.conversions)
                    yield _record(reference, image, digest, part, offset, len(serialized))
                    offset += len(serialized) + len(image.thumbnail)
                self._log(len(some))
        yield beam.pvalue.TaggedOutput(self.TALLY, json.dumps(tally))

    def _inspect(self, reference: ImageReference) -> tuple[str, InspectedImage] | str:
        """Returns digest and image, or the reason why it cannot be used."""
        try:
            if reference.problem:
                raise UnusableImageError(reference.problem)
            if reference.label not in self._class_names:
                raise UnusableImageError(f"the label {reference.label!r} is not in the list of classes")
            encoded = read_file(reference.path) if reference.encoded is None else reference.encoded
            digest = reference.digest or hashlib.sha256(encoded).hexdigest()
            return digest, inspect_image(encoded, self._limits)
        except UnusableImageError as error:
            return str(error)

    def _serialize(self, reference: ImageReference, image: InspectedImage) -> bytes:
        example = make_example(
            image=image.encoded,
            label=reference.label,
            filename=reference.path.removeprefix(self._root),
            height=image.height,
            width=image.width,
            brightness=image.brightness,
            channels=image.channels,
            columns=dict(zip(self._columns, reference.columns, strict=True)),
        )
        return example.SerializeToString(deterministic=True)

    def _log(self, num_images: int) -> None:
        self._num_images += num_images
        if time.monotonic() - self._reported > _REPORT_SECONDS:
            logger.info("checked %s images", f"{self._num_images:,}")
            self._reported = time.monotonic()


class ResolveDuplicates(beam.DoFn):
    """Keeps one of the images with the same content; where their labels differ, none.

    What is left out leaves by the outputs `duplicates` and `quarantine`; an image that the user put into two splits by
    `straddling`, as a list of (split, path).
    """

    DUPLICATES = "duplicates"
    QUARANTINE = "quarantine"
    STRADDLING = "straddling"

    def process(self, keyed: tuple[str, Iterable[Record]]) -> Iterator[Any]:
        """Yields at most one `Record`."""
        records = sorted(keyed[1], key=lambda record: (record.label, record.path, record.line or 0))
        first = records[0]
        by_split = {record.split: record.path for record in reversed(records) if record.split}
        if len(by_split) > 1:
            yield beam.pvalue.TaggedOutput(self.STRADDLING, json.dumps(sorted(by_split.items())))
        if first.label != records[-1].label:
            for record in records:
                other = next(other for other in records if other.label != record.label)
                reason = f"the same image is labelled {other.label!r} in {other.path}"
                yield beam.pvalue.TaggedOutput(self.QUARANTINE, _quarantined(record, reason))
            return
        for record in records[1:]:
            duplicate = {"file": record.path, "label": record.label, "same_as": first.path}
            yield beam.pvalue.TaggedOutput(self.DUPLICATES, json.dumps(duplicate))
        yield dataclasses.replace(first, split=next(iter(by_split), None))


class JoinNearDuplicates(beam.DoFn):
    """Finds images that look alike, among all; yields (digest, split) for those that must go to another one's split.

    The groups leave by the output `groups`, as JSON of split and files.
    """

    GROUPS = "groups"

    def __init__(self, config: SplitConfig, folder: str):
        self._config = config
        self._folder = os.path.join(folder, PARTS_FOLDER)

    def process(self, keyed: tuple[None, Iterable[tuple]]) -> Iterator[Any]:
        """Takes of each image (digest, split, label, path in bytes, perceptual hash, part and offset of its thumbnail)."""
        images = sorted(keyed[1])  # by digest; no two have the same
        digests, given, labels, paths, hashes, parts, offsets = zip(*images, strict=True)
        hashes = np.frombuffer(b"".join(hashes), np.uint8).reshape(len(images), -1)
        thumbnails = np.empty((len(images), THUMBNAIL_SIDE**2), np.uint8)
        for index, thumbnail in _read_waiting(parts, offsets, itertools.repeat(THUMBNAIL_SIDE**2), self._folder):
            thumbnails[index] = np.frombuffer(thumbnail, np.uint8)
        largest = max(MIN_LARGE_GROUP, LARGE_GROUP_SHARE * len(images))
        for group in find_near_duplicates(hashes, thumbnails):
            splits = [given[index] for index in group]
            split = choose_group_split([digests[index] for index in group], splits, self._config)
            files = []
            for index in group:
                own = given[index] or choose_split(digests[index], self._config)
                is_moved = given[index] is None and own != split and len(group) <= largest
                if is_moved:
                    yield digests[index], split
                files.append(
                    {
                        "file": os.fsdecode(paths[index]),
                        "label": labels[index],
                        "split": split if is_moved else own,
                        "moved_from": own if is_moved else None,
                    }
                )
            yield beam.pvalue.TaggedOutput(
                self.GROUPS, json.dumps({"split": split, "files": files, "is_joined": len(group) <= largest})
            )


class WriteShard(beam.DoFn):
    """Writes one shard in the order of the content's hash, and tells what it wrote."""

    def __init__(self, folder: str, columns: Sequence[str]):
        self._folder = folder
        self._columns = tuple(columns)

    def process(self, keyed: tuple[tuple[str, int, int], Iterable[Record | None]]) -> Iterator[str]:
        """Yields as JSON a dict of file, its SHA-256, split, images per class, and counts of facts and columns.

        Args:
          keyed: (split, shard, shards of the split) and the records of the shard; None among them counts for nothing.
        """
        (split, shard, num_shards), records = keyed
        name = f"{split}-{shard:05d}-of-{num_shards:05d}.tfrecord.gz"
        path = os.path.join(self._folder, name)
        records = sorted(filter(None, records), key=lambda record: record.digest)
        with tf.io.TFRecordWriter(path, tf.io.TFRecordOptions(compression_type="GZIP", compression_level=1)) as writer:
            for serialized in _read_records(records, os.path.join(self._folder, PARTS_FOLDER)):
                writer.write(serialized)
        result = {
            "file": name,
            "sha256": _sha256(path),
            "split": split,
            "counts": Counter(record.label for record in records),
            "facts": {fact: sorted(Counter(map(get, records)).items()) for fact, get in _FACTS.items()},
            "column_counts": {
                column: dict(Counter(record.columns[index] for record in records).most_common(MAX_VALUES))
                for index, column in enumerate(self._columns)
            },
        }
        yield json.dumps(result)


_FACTS = {
    "height": lambda record: record.height,
    "width": lambda record: record.width,
    "brightness": lambda record: round(record.brightness, 2),
    "bytes": lambda record: -(-record.num_bytes // 1000) * 1000,
}


def _quarantined(image: ImageReference | Record, reason: str) -> str:
    return json.dumps({"file": image.path, "label": image.label, "reason": reason, "line": image.line})


def _references(rows: Sequence[Sequence[Any]]) -> Iterator[ImageReference]:
    for path, label, split, columns, line in rows:
        yield ImageReference(path=path, label=label, split=split, columns=tuple(columns), line=line)


def _record(reference: ImageReference, image: InspectedImage, digest: str, part: str, offset: int, num_bytes: int) -> Record:
    return Record(
        digest=digest,
        split=reference.split,
        label=reference.label,
        path=reference.path,
        line=reference.line,
        columns=reference.columns,
        height=image.height,
        width=image.width,
        brightness=image.brightness,
        perceptual_hash=image.perceptual_hash,
        part=part,
        offset=offset,
        num_bytes=num_bytes,
    )


def _read_records(records: Sequence[Record], folder: str) -> Iterator[bytes]:
    """Yields the waiting records, in the order given."""
    if not records:
        return
    places = zip(*((record.part, record.offset, record.num_bytes) for record in records), strict=True)
    waiting = _read_waiting(*places, folder)
    if is_remote(folder):  # they come by file, and the shard is put in order in memory
        waiting = sorted(waiting)
    yield from (serialized for _, serialized in waiting)


def _read_waiting(
    parts: Sequence[str], offsets: Sequence[int], sizes: Iterable[int], folder: str
) -> Iterator[tuple[int, bytes]]:
    """Yields what waits at the given places, with its number: in the order given on this machine, by file in a bucket.

    A bucket answers slowly and sends much at once: there each file is read from its beginning to its end.
    """
    places = [
        (part, offset, size, index) for index, (part, offset, size) in enumerate(zip(parts, offsets, sizes, strict=False))
    ]
    if not is_remote(folder):
        for part, offset, size, index in places:
            with open(os.path.join(folder, part), "rb") as file:
                file.seek(offset)
                yield index, file.read(size)
        return
    for part, waiting in itertools.groupby(sorted(places), key=lambda place: place[0]):
        with tf.io.gfile.GFile(os.path.join(folder, part), "rb") as file:
            for _, offset, size, index in waiting:
                file.seek(offset)
                yield index, file.read(size)


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with tf.io.gfile.GFile(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def build_job(
    pipeline: beam.Pipeline,
    listings: Sequence[str],
    *,
    limits: ImageLimits,
    splits: SplitConfig,
    source: Source,
    num_readers: int,
    folder: str,
    results: str,
) -> None:
    """Composes the job.

    Args:
      pipeline: to add the steps to.
      listings: what `InspectImages` takes, a piece of work each.
      limits: of the images.
      splits: fractions and salt.
      source: for its class names and columns.
      num_readers: shards that each split gets at least.
      folder: for the shards.
      results: folder in which each step of `RESULTS` leaves what it has to tell, as lines of JSON.
    """
    read = (
        pipeline
        | "List images" >> beam.Create(listings)
        | "Spread over workers" >> beam.Reshuffle()
        | "Read and check"
        >> beam.ParDo(InspectImages(limits, source.class_names, source.columns, folder, source.root)).with_outputs(
            InspectImages.QUARANTINE, InspectImages.TALLY, main="records"
        )
    )
    distinct = (
        read.records
        | "Take content" >> beam.Map(lambda record: (record.digest, record))
        | "Group by content" >> beam.GroupByKey()
        | "Resolve duplicates"
        >> beam.ParDo(ResolveDuplicates()).with_outputs(
            ResolveDuplicates.DUPLICATES, ResolveDuplicates.QUARANTINE, ResolveDuplicates.STRADDLING, main="records"
        )
    )
    looks = distinct.records if splits.join_near_duplicates else pipeline | "Join nothing" >> beam.Create([])
    near = (
        looks
        | "Take looks" >> beam.Map(_looks)
        | "Bring all looks together" >> beam.GroupByKey()
        | "Join near-duplicates"
        >> beam.ParDo(JoinNearDuplicates(splits, folder)).with_outputs(JoinNearDuplicates.GROUPS, main="moves")
    )
    split = (
        {"record": distinct.records | "Key records" >> beam.Map(_key_by_digest), "moved": near.moves}
        | "Meet moves" >> beam.CoGroupByKey()
        | "Choose split" >> beam.FlatMap(_choose_split, splits)
    )
    num_bytes = split | "Take sizes" >> beam.Map(_size) | "Add sizes up" >> beam.CombinePerKey(sum)
    # Every shard once without a record, so that one which no image falls into is written too.
    all_shards = num_bytes | "Name shards" >> beam.FlatMap(_name_shards, num_readers)
    by_shard = split | "Choose shard" >> beam.Map(_key_by_shard, beam.pvalue.AsDict(num_bytes), num_readers)
    shards = (
        (by_shard, all_shards)
        | "Join shards" >> beam.Flatten()
        | "Group by shard" >> beam.GroupByKey()
        | "Write shard" >> beam.ParDo(WriteShard(folder, source.columns))
    )
    rejected = (read[InspectImages.QUARANTINE], distinct[ResolveDuplicates.QUARANTINE]) | "Join rejects" >> beam.Flatten()
    told = {
        "tallies": read[InspectImages.TALLY],
        "quarantine": rejected,
        "duplicates": distinct[ResolveDuplicates.DUPLICATES],
        "straddling": distinct[ResolveDuplicates.STRADDLING],
        "groups": near[JoinNearDuplicates.GROUPS],
        "shards": shards,
    }
    for name in RESULTS:
        _ = (
            told[name]
            | f"Key {name}" >> beam.Map(lambda line: (None, line))
            | f"Group {name}" >> beam.GroupByKey()
            | f"Report {name}" >> beam.Map(_write_lines, results, name)
        )


def _write_lines(keyed: tuple[None, Iterable[str]], folder: str, name: str) -> None:
    """Writes lines to a file; not Beam's own writer, which takes a folder's brackets for a pattern."""
    tf.io.gfile.makedirs(folder)
    with tf.io.gfile.GFile(os.path.join(folder, f"{name}{RESULTS_SUFFIX}"), "w") as file:
        for line in keyed[1]:
            file.write(f"{line}\n")


def _looks(record: Record) -> tuple[None, tuple]:
    place = (record.part, record.offset + record.num_bytes)
    return None, (record.digest, record.split, record.label, os.fsencode(record.path), record.perceptual_hash, *place)


def _key_by_digest(record: Record) -> tuple[str, Record]:
    # Looks have done their work; without them the rest of the job is lighter.
    return record.digest, dataclasses.replace(record, perceptual_hash=b"")


def _choose_split(keyed: tuple[str, dict[str, Any]], config: SplitConfig) -> Iterator[Record]:
    digest, found = keyed
    for record in found["record"]:
        moved = next(iter(found["moved"]), None)
        yield dataclasses.replace(record, split=moved or record.split or choose_split(digest, config))


def _key_by_shard(record: Record, num_bytes: dict[str, int], num_readers: int) -> tuple[tuple[str, int, int], Record]:
    num_shards = _num_shards(num_bytes[record.split], num_readers)
    return (record.split, int(record.digest[8:16], 16) % num_shards, num_shards), record


def _size(record: Record) -> tuple[str, int]:
    return record.split, record.num_bytes


def _name_shards(sized: tuple[str, int], num_readers: int) -> Iterator[tuple[tuple[str, int, int], None]]:
    split, num_bytes = sized
    num_shards = _num_shards(num_bytes, num_readers)
    for shard in range(num_shards):
        yield (split, shard, num_shards), None


def _num_shards(num_bytes: int, num_readers: int) -> int:
    return max(num_readers, round(num_bytes / TARGET_SHARD_BYTES))
