"""The images that a prediction is asked for: files, a folder, a CSV, TFRecords or a pattern, local or gs://, none with a label.

`data.sources` lists labelled images to learn from; here nobody knows the label yet. Nothing is decoded. Called by
`pipeline.batch`, `pipeline.online` and `pipeline.stream`.
"""

import csv
import dataclasses
import io
import os
import re
from collections.abc import Iterable, Iterator

import tensorflow as tf

from data.errors import InputError
from data.features import FILENAME_KEY, IMAGE_KEY
from data.inspection import is_remote
from data.sources import ELPV, open_source

PATTERN_CHARACTERS = frozenset("*?[")
_RECORD_FILE = re.compile(r"\.tfrec(ord)?s?(-\d+-of-\d+)?(\.gz)?$|-\d+-of-\d+(\.gz)?$")
_GZIP_MAGIC = b"\x1f\x8b"


@dataclasses.dataclass(frozen=True, slots=True)
class InputImage:
    """One image to predict.

    Attributes:
      file: where it comes from, as the answer will name it.
      encoded: the bytes of a record's image; None where they are to be read from `file`.
      problem: why it cannot be used, where that is known already.
    """

    file: str
    encoded: bytes | None = None
    problem: str | None = None


def list_inputs(location: str) -> Iterator[str]:
    """Lists the images, or the TFRecords that hold them, behind what the user gave as input.

    Args:
      location: an image, a TFRecord, a folder (searched to its bottom, hidden files left out), a CSV with a column `path` or
        whose first column is the path, a pattern such as gs://b/2024/*.jpg, or `elpv`. A folder with TFRecords at its top is a
        folder of these and of nothing else.

    Yields:
      Paths. A file that a CSV names may be missing.

    Raises:
      InputError: if there is nothing there.
    """
    if location == ELPV:
        yield from (reference.path for reference in open_source(ELPV).references)
        return
    is_pattern = not tf.io.gfile.exists(location) and PATTERN_CHARACTERS & set(location)
    if not is_pattern and not tf.io.gfile.exists(location):
        raise InputError(
            f"Expected the input to be an image, a folder, a CSV, a TFRecord or a pattern. Received: {location!r}, which does "
            f"not exist. Check the path (it is relative to {os.getcwd()})."
        )
    if is_pattern:
        paths: Iterable[str] = sorted(path for path in tf.io.gfile.glob(location) if not tf.io.gfile.isdir(path))
    elif tf.io.gfile.isdir(location):
        top = (os.path.join(location, name) for name in sorted(tf.io.gfile.listdir(location)))
        paths = [path for path in top if is_record_file(path)] or walk_files(location)
    else:
        paths = _csv(location) if location.lower().endswith(".csv") else [location]
    is_empty = True
    for path in paths:
        is_empty = False
        yield path
    if is_empty:
        raise InputError(f"Expected images in the input. Received: {location!r}, without any file. Name another one.")


def is_record_file(path: str) -> bool:
    """Tells a TFRecord from an image by its name."""
    return _RECORD_FILE.search(path) is not None


def read_record_images(path: str) -> Iterator[InputImage]:
    """Reads the encoded images of a TFRecord file, with or without GZIP; a label is not needed.

    What cannot be used is an image with a problem; the part of a damaged file that cannot be read is one such, at its end.

    Args:
      path: of the file.
    """
    number = 0
    try:
        for number, serialized in enumerate(tf.data.TFRecordDataset(path, _compression(path)).as_numpy_iterator(), 1):
            yield _record_image(serialized, f"{path}#{number}")
    except tf.errors.DataLossError as error:  # any other goes up: a bucket out of reach is tried again
        reason = error.message.split("[Op:")[0].strip().split("\n")[0][:200]
        problem = f"the file is damaged after record {number}, and the rest of it is lost: {reason}"
        yield InputImage(f"{path}#{number + 1}", problem=problem)


def _record_image(serialized: bytes, place: str) -> InputImage:
    try:
        features = tf.train.Example.FromString(serialized).features.feature
    except Exception as error:  # protobuf's DecodeError, whose class has moved between its versions
        return InputImage(place, problem=f"the record is no tf.Example: {error}")
    names = features[FILENAME_KEY].bytes_list.value if FILENAME_KEY in features else ()
    file = names[0].decode("utf-8", "surrogateescape") if names else place
    images = features[IMAGE_KEY].bytes_list.value if IMAGE_KEY in features else ()
    if not images:
        return InputImage(file, problem=f"the record has no encoded `{IMAGE_KEY}`")
    return InputImage(file, encoded=images[0])


def _compression(path: str) -> str:
    with tf.io.gfile.GFile(path, "rb") as file:
        if file.read(2) != _GZIP_MAGIC:
            return ""
    try:  # the length of a first record can look like the mark of GZIP; its checksum cannot
        next(iter(tf.data.TFRecordDataset(path).take(1)), None)
    except tf.errors.DataLossError:
        return "GZIP"
    return ""


def walk_files(folder: str) -> Iterator[str]:
    """Yields the files below a folder, in order, without the hidden ones.

    Raises:
      InputError: if a folder cannot be read.
    """
    if is_remote(folder):
        for parent, _, names in tf.io.gfile.walk(folder):
            if "/." not in parent.removeprefix(folder):
                yield from (os.path.join(parent, name) for name in sorted(names) if not name.startswith("."))
        return

    def refuse(error: OSError) -> None:
        raise InputError(f"Expected {error.filename} to be readable. Received: {error.strerror}. Mend its permissions.")

    # Python's, as TensorFlow's fails on a name that is not UTF-8.
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(parent, name) for name in sorted(names) if not name.startswith("."))


def _csv(path: str) -> Iterator[str]:
    """Yields the paths of a CSV; relative ones are relative to its folder."""
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            text = file.read().decode("utf-8-sig")
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if any(cell.strip() for cell in row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"Expected {path} to be a CSV in UTF-8. Received: {error}. Save it as one.") from error
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    column = header.index("path") if "path" in header else 0
    for row in rows["path" in header :]:
        if len(row) <= column:
            raise InputError(f"Expected column {column + 1} of every row in {path} to be a path. Received: {','.join(row)!r}.")
        is_absolute = is_remote(row[column]) or os.path.isabs(row[column])
        yield row[column] if is_absolute else os.path.join(os.path.dirname(path), row[column])
