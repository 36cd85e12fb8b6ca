"""Where labelled images come from: a folder per class, a CSV, or the installed ELPV data set; local or gs://.

A source only lists: nothing is decoded here, and an image that cannot be read is the business of `data.prepare`, which
quarantines it. What makes the whole input unusable (a wrong path, a class without images) is an `InputError`.
"""

import csv
import dataclasses
import io
import os
from collections.abc import Iterator
from pathlib import Path

import tensorflow as tf

from data.errors import InputError
from data.features import LABELS_FILE, RECORD_KEYS, SCHEMA_FILE, SCHEMA_FOLDER, SPLITS, TRAIN_SPLIT

ELPV = "elpv"
ELPV_CLASS_NAMES = ("functional", "defective")
ELPV_DEFECT_PROBABILITY = 0.5
_CLASS_FILES = (LABELS_FILE, "dict.txt")  # the second is the original system's name


@dataclasses.dataclass(frozen=True, slots=True)
class ImageReference:
    """One image as the user listed it.

    Attributes:
      path: local path or gs:// URL.
      label: class name.
      split: one of `SPLITS` where the user decided, None where the content's hash does.
      columns: values of the extra columns, in the order of `Source.columns`.
      line: line number in the CSV, None elsewhere.
    """

    path: str
    label: str
    split: str | None = None
    columns: tuple[str, ...] = ()
    line: int | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """A labelled set of images.

    Attributes:
      class_names: every class, in the order of the model's outputs.
      columns: names of the extra columns, each a slice for the evaluation.
      references: the images.
    """

    class_names: tuple[str, ...]
    columns: tuple[str, ...]
    references: tuple[ImageReference, ...]


def is_prepared(path: str) -> bool:
    """Tells whether a folder holds records that `data.prepare` wrote."""
    return bool(
        tf.io.gfile.exists(os.path.join(path, LABELS_FILE))
        and tf.io.gfile.exists(os.path.join(path, SCHEMA_FOLDER, SCHEMA_FILE))
        and tf.io.gfile.glob(os.path.join(path, f"{TRAIN_SPLIT}-*.tfrecord.gz"))
    )


def open_source(location: str) -> Source:
    """Lists the images behind what the user gave as `--data` or `--input`.

    Args:
      location: `elpv`, a CSV file, or a folder with a folder per class.

    Raises:
      InputError: if there is nothing there, or what is there has no usable structure.
    """
    if location == ELPV:
        return _elpv()
    if not tf.io.gfile.exists(location):
        raise InputError(
            f"Expected `data.input` to be a folder with a folder per class, a CSV, or `{ELPV}`. "
            f"Received: {location!r}, which does not exist. Check the path (it is relative to {os.getcwd()})."
        )
    source = _folders(location) if tf.io.gfile.isdir(location) else _csv(location)
    _check_class_names(source.class_names, location)
    if len(source.class_names) < 2:
        raise InputError(
            f"Expected at least two classes in {location}. Received: {list(source.class_names)}. "
            "Put the images of each class into a folder of its own, or give each row of the CSV its label."
        )
    listed = {reference.label for reference in source.references}
    for name in source.class_names:
        if name not in listed:
            raise InputError(
                f"Expected images in every class of {location}. Received: class {name!r} without any. "
                "Add images or remove the class."
            )
    return source


def _folders(root: str) -> Source:
    """Lists a folder per class. Hidden entries are skipped; the class order is that of labels.txt or the alphabet."""
    entries = sorted(entry.rstrip("/") for entry in tf.io.gfile.listdir(root) if not entry.startswith("."))
    folders = [entry for entry in entries if tf.io.gfile.isdir(os.path.join(root, entry))]
    if not folders:
        raise InputError(
            f"Expected {root} to have one folder per class. Received: no folder in it. "
            "Put the images of each class into a folder of its own, or give a CSV of path,label."
        )
    # Every file, whatever its suffix: what is no image is quarantined, not passed over in silence.
    references = tuple(
        ImageReference(path=os.path.join(folder, name), label=label)
        for label in folders
        for folder, _, names in sorted(tf.io.gfile.walk(os.path.join(root, label)))
        for name in sorted(names)
        if not name.startswith(".")
    )
    return Source(_read_class_names(root) or tuple(folders), (), references)


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
    class_names = _read_class_names(folder) or tuple(sorted({reference.label for reference in references}))
    return Source(class_names, columns, tuple(references))


def _check_class_names(class_names: tuple[str, ...], location: str) -> None:
    """Refuses names that labels.txt, a line each, could not give back."""
    for index, name in enumerate(class_names):
        if not name or name != name.strip() or len(name.splitlines()) != 1 or name in class_names[:index]:
            raise InputError(
                f"Expected the classes of {location} to have different names without spaces around them. "
                f"Received: {name!r}. Rename it, or give each row of the CSV its label."
            )


def _csv_header(first_row: list[str], path: str) -> tuple[list[str], bool]:
    names = [cell.strip().lower() for cell in first_row]
    if "path" in names and "label" in names:
        names = [n if n in ("path", "label", "split") else c.strip() for n, c in zip(names, first_row, strict=True)]
        clash = [name for name in names if not name or (name in RECORD_KEYS and name != "label")]
        if clash or len(set(names)) != len(names):
            raise InputError(
                f"Expected the columns of {path} to have names of their own. Received: {','.join(first_row)}. "
                f"Rename what is empty, repeats or is one of {', '.join(RECORD_KEYS)}."
            )
        return names, True
    if len(names) > 3 or len(names) < 2 or "label" in names:
        raise InputError(
            f"Expected {path} to begin with a header that names `path` and `label`, or to have the columns "
            f"path,label[,split]. Received: {','.join(first_row)[:80]!r}."
        )
    return ["path", "label", "split"][: len(names)], False


def _csv_reference(row: dict[str, str], folder: str, csv_path: str, line: int) -> ImageReference:
    split = row.get("split", "").strip() or None
    if split is not None and split not in SPLITS:
        raise InputError(
            f"Expected the split in {csv_path}, line {line}, to be empty or one of {', '.join(SPLITS)}. Received: {split!r}."
        )
    is_absolute = "://" in row["path"] or os.path.isabs(row["path"])
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

    return Source(ELPV_CLASS_NAMES, ("cell_type",), tuple(references()))
