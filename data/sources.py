"""Where labelled images come from: a folder per class, a CSV, TFRecords, or the installed ELPV data set; local or gs://.

A source only lists: nothing is decoded here, and an image that cannot be read is the business of `data.prepare`, which
quarantines it. What makes the whole input unusable (a wrong path, a class without images) is an `InputError`.
"""

import csv
import dataclasses
import hashlib
import io
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
from google.protobuf import text_format
from tensorflow_metadata.proto.v0 import schema_pb2

from data.errors import InputError
from data.features import (
    FILENAME_KEY,
    IMAGE_KEY,
    LABEL_KEY,
    LABELS_FILE,
    RECORD_KEYS,
    REPORT_FILE,
    RESERVED_KEYS,
    SCHEMA_FILE,
    SCHEMA_FOLDER,
    SPLITS,
    TEST_SPLIT,
    TRAIN_SPLIT,
    VALID_SPLIT,
)
from data.inspection import encode_pixels, is_remote

logger = logging.getLogger("tfx_vision")

ELPV = "elpv"
ELPV_CLASS_NAMES = ("functional", "defective")
ELPV_DEFECT_PROBABILITY = 0.5
_CLASS_FILES = (LABELS_FILE, "dict.txt")  # the second is the name that the book's code gives it
_RECORD_FILE = re.compile(r"\.tfrec(ord)?s?(-\d+-of-\d+)?(\.gz)?$|^(train|valid|test)\b.*-\d+-of-\d+(\.gz)?$")
_SHAPE_KEY = "shape"  # of a decoded image in TFRecords of the book's kind
_GZIP_MAGIC = b"\x1f\x8b"
_SPLIT_NAMES = {"train": TRAIN_SPLIT, "valid": VALID_SPLIT, "validation": VALID_SPLIT, "val": VALID_SPLIT, "test": TEST_SPLIT}


@dataclasses.dataclass(frozen=True, slots=True)
class ImageReference:
    """One image as the user listed it.

    Attributes:
      path: local path or gs:// URL.
      label: class name.
      split: one of `SPLITS` where the user decided, None where the content's hash does.
      columns: values of the extra columns, in the order of `Source.columns`.
      line: line number in the CSV, None elsewhere.
      encoded: the image itself where it comes from a TFRecord, None elsewhere.
      digest: of the content where the bytes are not the ones that the user gave.
      problem: why a TFRecord cannot be used.
      is_cut_off: the rest of the file, of unknown length, cannot be read.
    """

    path: str
    label: str
    split: str | None = None
    columns: tuple[str, ...] = ()
    line: int | None = None
    encoded: bytes | None = None
    digest: str | None = None
    problem: str | None = None
    is_cut_off: bool = False


@dataclasses.dataclass(frozen=True)
class Source:
    """A labelled set of images.

    Attributes:
      class_names: every class, in the order of the model's outputs.
      columns: names of the extra columns, each a slice for the evaluation.
      references: the images, where they are files.
      record_files: the TFRecords that hold them, where they are not.
      root: folder that the names in the records are relative to, so that they are the same on every machine.
    """

    class_names: tuple[str, ...]
    columns: tuple[str, ...]
    references: tuple[ImageReference, ...]
    record_files: tuple[str, ...] = ()
    root: str = ""


def is_prepared(path: str) -> bool:
    """Tells whether a folder holds records that `data.prepare` wrote."""
    needed = (LABELS_FILE, os.path.join(SCHEMA_FOLDER, SCHEMA_FILE), REPORT_FILE)  # the last is moved in last
    return all(tf.io.gfile.exists(os.path.join(path, name)) for name in needed) and any(
        name.startswith(f"{TRAIN_SPLIT}-") and name.endswith(".tfrecord.gz") for name in tf.io.gfile.listdir(path)
    )


def open_source(location: str) -> Source:
    """Lists the images behind what the user gave as `--data` or `--input`.

    Args:
      location: `elpv`, a CSV file, a folder with a folder per class, or a folder of TFRecords.

    Raises:
      InputError: if there is nothing there, or what is there has no usable structure.
    """
    if location == ELPV:
        return _elpv()
    if not tf.io.gfile.exists(location):
        raise InputError(
            f"Expected `data.input` to be a folder with a folder per class, a CSV, a folder of TFRecords, or `{ELPV}`. "
            f"Received: {location!r}, which does not exist. Check the path (it is relative to {os.getcwd()})."
        )
    source = _folder(location) if tf.io.gfile.isdir(location) else _csv(location)
    _check_class_names(source.class_names, location)
    if len(source.class_names) < 2:
        raise InputError(
            f"Expected at least two classes in {location}. Received: {list(source.class_names)}. "
            "Put the images of each class into a folder of its own, or give each row of the CSV its label."
        )
    if source.record_files:
        return source
    listed = {reference.label for reference in source.references}
    for name in source.class_names:
        if name not in listed:
            raise InputError(
                f"Expected images in every class of {location}. Received: class {name!r} without any. "
                "Add images or remove the class."
            )
    return source


def _folder(root: str) -> Source:
    names = sorted(tf.io.gfile.listdir(root)) if is_remote(root) else _list_folder(root)
    entries = [name.rstrip("/") for name in names if not name.startswith(".")]
    record_files = tuple(os.path.join(root, name) for name in entries if _RECORD_FILE.search(name))
    if record_files:
        return _record_source(root, record_files)
    folders = [name for name in entries if _is_folder(os.path.join(root, name))]
    if not folders:
        raise InputError(
            f"Expected {root} to have one folder per class. Received: no folder in it. "
            "Put the images of each class into a folder of its own, or give a CSV of path,label."
        )
    # Every file, whatever its suffix: what is no image is quarantined, not passed over in silence.
    references = tuple(
        ImageReference(path=path, label=label) for label in folders for path in _files(os.path.join(root, label))
    )
    # The class order is that of labels.txt or the alphabet.
    return Source(_read_class_names(root) or tuple(folders), (), references, root=root)


def _list_folder(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))  # not TensorFlow's, which fails on a name that is not UTF-8
    except PermissionError as error:
        raise InputError(f"Expected {folder} to be readable. Received: {error.strerror}. Mend its permissions.") from error


def _is_folder(path: str) -> bool:
    return tf.io.gfile.isdir(path) if is_remote(path) else os.path.isdir(path)


def _files(folder: str) -> Iterator[str]:
    """Yields the files below a folder, in order. Hidden ones are skipped; links are followed, but not in circles."""
    if is_remote(folder):
        for parent, _, names in sorted(tf.io.gfile.walk(folder)):
            yield from (os.path.join(parent, name) for name in sorted(names) if not name.startswith("."))
        return
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise InputError(f"Expected {error.filename} to be readable. Received: {error.strerror}. Mend its permissions.")

    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        seen.add(os.path.realpath(parent))
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and os.path.realpath(os.path.join(parent, name)) not in seen
        )
        yield from (os.path.join(parent, name) for name in sorted(names) if not name.startswith("."))


def _record_source(root: str, record_files: tuple[str, ...]) -> Source:
    """Lists TFRecords: those that `data.prepare` writes, others with the same keys, or the decoded images of the book."""
    columns: tuple[str, ...] = ()
    if is_prepared(root):
        with tf.io.gfile.GFile(os.path.join(root, SCHEMA_FOLDER, SCHEMA_FILE)) as file:
            schema = text_format.Parse(file.read(), schema_pb2.Schema())
        columns = tuple(feature.name for feature in schema.feature if feature.name not in RECORD_KEYS)
    class_names = _read_class_names(root)
    if not class_names:
        logger.info("looking for the class names in %d files, as there is no %s", len(record_files), LABELS_FILE)
        labels = (reference.label for path in record_files for reference in read_records(path, columns, decode=False))
        class_names = tuple(sorted(set(labels) - {""}))
    return Source(class_names, columns, (), record_files, root=root)


def read_records(path: str, columns: Sequence[str], *, decode: bool = True) -> Iterator[ImageReference]:
    """Reads the images of a TFRecord file, with or without GZIP.

    A record holds `label` and either `image` as encoded bytes, or `image` as floats in [0, 1] with their `shape`, as the book
    *Practical Machine Learning for Computer Vision* publishes them; those become PNG, without loss. A file whose name begins
    with a split's puts its images into that split.

    Args:
      path: of the file.
      columns: extra columns to take over.
      decode: False leaves the images out.
    """
    split = _SPLIT_NAMES.get(re.match(r"[a-z]*", os.path.basename(path).lower())[0])
    number = 0
    try:
        for number, serialized in enumerate(tf.data.TFRecordDataset(path, _compression(path)).as_numpy_iterator(), 1):
            yield _record_reference(serialized, f"{path}#{number}", split, columns, decode=decode)
    except tf.errors.DataLossError as error:  # any other goes up: a bucket out of reach is tried again
        problem = f"the file is damaged after record {number}: {error.message.split('[Op:')[0].strip()[:200]}"
        place = f"{path}#{number + 1}"
        yield ImageReference(place, "", split, ("",) * len(columns), encoded=b"", problem=problem, is_cut_off=True)


def _compression(path: str) -> str:
    with tf.io.gfile.GFile(path, "rb") as file:
        if file.read(2) != _GZIP_MAGIC:
            return ""
    try:  # the length of a first record can look like the mark of GZIP; its checksum cannot
        next(iter(tf.data.TFRecordDataset(path).take(1)), None)
    except tf.errors.DataLossError:
        return "GZIP"
    return ""


def _record_reference(
    serialized: bytes, place: str, split: str | None, columns: Sequence[str], *, decode: bool
) -> ImageReference:
    label, problem, encoded, digest = "", None, b"", None
    values = ("",) * len(columns)
    try:
        features = tf.train.Example.FromString(serialized).features.feature
        label = _text(features, LABEL_KEY)
        place = _text(features, FILENAME_KEY) or place
        values = tuple(_text(features, name) for name in columns)
        if not label:
            problem = f"the record has no `{LABEL_KEY}`"
        elif features[IMAGE_KEY].float_list.value:
            if decode:
                pixels = _pixels(features)
                encoded = encode_pixels(pixels)
                digest = hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()
        elif features[IMAGE_KEY].bytes_list.value:
            encoded = features[IMAGE_KEY].bytes_list.value[0]
        else:
            problem = f"the record has no `{IMAGE_KEY}`"
    except ValueError as error:  # of `_pixels`, and UnicodeDecodeError
        problem = str(error)
    except Exception as error:  # protobuf's DecodeError, whose class has moved between its versions
        problem = f"the record is no tf.Example: {error}"
    return ImageReference(place, label, split, values, encoded=encoded, digest=digest, problem=problem)


def _text(features: dict[str, tf.train.Feature], name: str) -> str:
    values = features[name].bytes_list.value if name in features else ()
    return values[0].decode("utf-8", "surrogateescape" if name == FILENAME_KEY else "strict") if values else ""


def _pixels(features: dict[str, tf.train.Feature]) -> np.ndarray:
    """Returns uint8 [height, width, 1 or 3] of floats in [0, 1]."""
    values = np.array(features[IMAGE_KEY].float_list.value, np.float32)
    shape = tuple(features[_SHAPE_KEY].int64_list.value) if _SHAPE_KEY in features else ()
    if len(shape) != 3 or shape[2] not in (1, 3) or min(shape) < 1 or np.prod(shape, dtype=object) != len(values):
        raise ValueError(f"the record has {len(values)} floats and the `{_SHAPE_KEY}` {list(shape)}")
    if not (values.min() >= 0 and values.max() <= 1):  # nor NaN
        raise ValueError(f"the record's floats lie in [{values.min():g}, {values.max():g}], not in [0, 1]")
    return np.rint(values * 255).astype(np.uint8).reshape(shape)


def _csv(path: str) -> Source:
    """Reads `path,label[,split][,more columns]`, with or without a header; more columns need one for their names."""
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"Expected {path} to be a CSV in UTF-8. Received: {error}. Save it as UTF-8.") from error
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    folder = os.path.dirname(path)
    header: list[str] | None = None
    references = []
    try:
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            if header is None:
                header, is_header = _csv_header(row, path)
                if is_header:
                    continue
            if len(row) != len(header):
                raise InputError(
                    f"Expected {len(header)} columns ({','.join(header)}) in {path}, line {rows.line_num}. "
                    f"Received: {len(row)}: {','.join(row)[:80]!r}. Quote a name that has a comma in it."
                )
            references.append(_csv_reference(dict(zip(header, row, strict=True)), folder, path, rows.line_num))
    except csv.Error as error:
        raise InputError(f"Expected {path} to be a CSV. Received: {error} in line {rows.line_num}.") from error
    if not references:
        raise InputError(f"Expected rows of path,label in {path}. Received: none.")
    columns = tuple(name for name in header if name not in ("path", "label", "split"))
    class_names = _read_class_names(folder) or tuple(sorted({reference.label for reference in references} - {""}))
    return Source(class_names, columns, tuple(references), root=folder)


def _check_class_names(class_names: tuple[str, ...], location: str) -> None:
    """Refuses names that labels.txt, a line each, could not give back."""
    for index, name in enumerate(class_names):
        is_text = name.isascii() or name.encode("utf-8", "replace").decode() == name  # a folder's name may be any bytes
        if not name or name != name.strip() or len(name.splitlines()) != 1 or name in class_names[:index] or not is_text:
            raise InputError(
                f"Expected the classes of {location} to have different names, in UTF-8, without spaces around them. "
                f"Received: {name!r}. Rename it, or give each row of the CSV its label."
            )


# Words that head a column of another name: no image is called so, and no class of a photograph.
_LIKE_A_HEADER = {"label", "labels", "class", "category", "target", "filename", "file", "filepath", "image_path", "image"}


def _csv_header(first_row: list[str], path: str) -> tuple[list[str], bool]:
    names = [cell.strip().lower() for cell in first_row]
    if "path" in names and "label" in names:
        names = [n if n in ("path", "label", "split") else c.strip() for n, c in zip(names, first_row, strict=True)]
        clash = [name for name in names if not name or "=" in name or (name in RESERVED_KEYS and name != "label")]
        if clash or len(set(names)) != len(names):
            raise InputError(
                f"Expected the columns of {path} to have names of their own. Received: {','.join(first_row)}. "
                f"Rename what is empty, repeats, has a `=` or is one of {', '.join(RESERVED_KEYS)}."
            )
        return names, True
    is_header = bool(_LIKE_A_HEADER & set(names))
    if len(names) > 3 or len(names) < 2 or is_header:
        if len(names) == 1 and any(separator in names[0] for separator in ";\t|"):
            remedy = " Save it with commas between the columns."
        else:
            remedy = " Rename the columns of its header." if is_header else ""
        raise InputError(
            f"Expected {path} to begin with a header that names `path` and `label`, or to have the columns "
            f"path,label[,split]. Received: {','.join(first_row)[:80]!r}.{remedy}"
        )
    return ["path", "label", "split"][: len(names)], False


def _csv_reference(row: dict[str, str], folder: str, csv_path: str, line: int) -> ImageReference:
    split = row.get("split", "").strip() or None
    if split is not None and split not in SPLITS:
        raise InputError(
            f"Expected the split in {csv_path}, line {line}, to be empty or one of {', '.join(SPLITS)}. Received: {split!r}. "
            "Correct it, or leave the column out to have the images split by their content."
        )
    is_absolute = is_remote(row["path"]) or os.path.isabs(row["path"])
    return ImageReference(
        path=row["path"] if is_absolute else os.path.join(folder, row["path"]),
        label=row["label"].strip(),
        split=split,
        columns=tuple(value for name, value in row.items() if name not in ("path", "label", "split")),
        line=line,
    )


def _read_class_names(folder: str) -> tuple[str, ...]:
    """Reads the class order from labels.txt or dict.txt where the user gives one."""
    for name in _CLASS_FILES:
        path = os.path.join(folder, name)
        if tf.io.gfile.exists(path):
            return read_lines(path)
    return ()


def read_lines(path: str) -> tuple[str, ...]:
    """Reads the lines of a text file, without the empty ones."""
    with tf.io.gfile.GFile(path) as file:
        return tuple(line.strip() for line in file.read().splitlines() if line.strip())


def _elpv() -> Source:
    """Lists the ELPV data set of the installed package: functional or defective solar cells, mono- or polycrystalline.

    Source: Buerhop-Lutz et al. 2018, Deitsch et al. 2019, https://github.com/zae-bayern/elpv-dataset
    """
    import elpv_dataset  # only where it is wanted: it loads scientific packages

    folder = Path(elpv_dataset.__file__).parent / "data"

    def references() -> Iterator[ImageReference]:
        for line in (folder / "labels.csv").read_text().splitlines():
            path, probability, cell_type = line.split()
            label = ELPV_CLASS_NAMES[float(probability) > ELPV_DEFECT_PROBABILITY]
            yield ImageReference(path=str(folder / path), label=label, columns=(cell_type,))

    return Source(ELPV_CLASS_NAMES, ("cell_type",), tuple(references()), root=str(folder))
