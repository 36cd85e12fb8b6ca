"""The HTML report of a data set: one self-contained file that a person opens to see whether the data can be trusted.

Called by `data.prepare` once the records are written. Nothing in it depends on the time or on chance, so the same records
give the same file.
"""

import itertools
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import tensorflow as tf

from data.features import SPLITS, TRAIN_SPLIT
from data.inspection import UnusableImageError, read_file
from data.thumbnails import MAX_RECORDS_READ, Thumbnail, contact_sheets, make_thumbnail

DATA_REPORT_FILE = "report.html"

_TEMPLATE = Path(__file__).with_name("report.html.j2")
_MAX_CHARACTERS = 400  # of one name or reason; a path may have 4,096

# Each limit below is said on the page where it cuts something off. Together they keep the page under 3 MB.
_MAX_SHEETS = 30  # classes with thumbnails
_MAX_THUMBNAILS_PER_SHEET = 8
_MAX_OPEN_CLASSES = 30  # above this, the table of all classes is folded and the smallest ones stand alone
_MAX_CLASSES = 2_000
_NUM_SMALLEST_CLASSES = 15
_MAX_COLUMNS = 40
_MAX_REASONS = 20
_MAX_QUARANTINE_ROWS = 200
_MAX_QUARANTINE_THUMBNAILS = 24
_MAX_QUARANTINE_FILES_TRIED = 60
_MAX_GROUPS = 20
_MAX_FILES_PER_GROUP = 6
_MAX_DUPLICATES = 100
_MAX_WARNINGS = 50

_MAX_FILE_BYTES = 20_000_000

_FACTS = {
    "height": "height, pixels",
    "width": "width, pixels",
    "brightness": "brightness, from 0 (black) to 1 (white)",
    "bytes": "size of the record",
}
_JOINERS = "\u200c\u200d"  # invisible, and part of correct Persian, Hindi and emoji
_MAYBE_INVISIBLE = re.compile(r"[^\x20-\x7e]")
_INVISIBLE_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")


def write_data_report(folder: str, report: dict[str, Any], quarantine: list[dict[str, Any]]) -> None:
    """Writes `report.html` into a folder of prepared records.

    Args:
      folder: of the records; local or gs://. The thumbnails of each class are read from its train shards.
      report: the finished report of `data.prepare`.
      quarantine: dicts of file, label, reason and line (or None), one for each image that could not be used.
    """
    totals = {name: sum(report["counts"][split][name] for split in SPLITS) for name in report["class_names"]}
    num_records = sum(totals.values())
    groups = _order_groups(report["near_duplicates"])
    shown_quarantine = quarantine[:_MAX_QUARANTINE_ROWS]
    shown_duplicates = report["duplicates"][:_MAX_DUPLICATES]
    root = _common_folder(
        [row["file"] for row in shown_quarantine]
        + [file["file"] for group in groups[:_MAX_GROUPS] for file in group["files"]]
        + [name for row in shown_duplicates for name in (row["file"], row["same_as"])],
        report["input"],
    )

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=make_visible
    )
    environment.filters.update(
        number=lambda value, noun=None: f"{value:,}" + (f" {_plural(noun, value)}" if noun else ""),
        measure=_measure,
        below=lambda file: file.removeprefix(root),
        breakable=_break_at_slashes,
        basename=lambda file: file.rstrip("/").rpartition("/")[2] or file,
    )
    html = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        splits=SPLITS,
        root=root,
        totals=totals,
        num_records=num_records,
        num_missing=report["images"] - num_records - len(report["duplicates"]) - report["quarantined"],
        warnings=report["warnings"][:_MAX_WARNINGS],
        smallest=sorted(totals, key=totals.get)[:_NUM_SMALLEST_CLASSES] if len(totals) > _MAX_OPEN_CLASSES else [],
        classes=list(totals)[:_MAX_CLASSES],
        sheets=_contact_sheets(folder, report),
        max_records_read=MAX_RECORDS_READ,
        facts=[(_FACTS.get(name, name), name, values) for name, values in report["facts"].items()],
        column_counts=dict(list(report["column_counts"].items())[:_MAX_COLUMNS]),
        reasons=Counter(row["reason"] for row in quarantine).most_common(),
        max_reasons=_MAX_REASONS,
        quarantine=list(zip(shown_quarantine, _quarantine_thumbnails(shown_quarantine), strict=True)),
        num_quarantine_rows=len(quarantine),
        groups=[_illustrate(group) for group in groups[:_MAX_GROUPS]],
        num_conflicts=sum(_has_conflict(group) for group in groups),
        num_moved=sum(bool(file["moved_from"]) for group in groups for file in group["files"]),
        duplicates=shown_duplicates,
    )
    with tf.io.gfile.GFile(os.path.join(folder, DATA_REPORT_FILE), "w") as file:
        file.write(html)


def _contact_sheets(folder: str, report: dict[str, Any]) -> dict[str, list[tuple[str, Thumbnail]]]:
    """Takes the first images of each class from the train shards: class -> (file name, thumbnail)."""
    names = report["class_names"][:_MAX_SHEETS]
    num_wanted = {name: min(_MAX_THUMBNAILS_PER_SHEET, report["counts"][TRAIN_SPLIT][name]) for name in names}
    shards = sorted(name for name in report["shards"] if name.startswith(f"{TRAIN_SPLIT}-"))
    return contact_sheets([os.path.join(folder, name) for name in shards], num_wanted)


def _quarantine_thumbnails(rows: Sequence[dict[str, Any]]) -> Iterator[Thumbnail | None]:
    """Yields a thumbnail for each row that has an image after all, such as one of a format that TensorFlow cannot read."""
    num_thumbnails = 0
    for index, row in enumerate(rows):
        thumbnail = None
        if num_thumbnails < _MAX_QUARANTINE_THUMBNAILS and index < _MAX_QUARANTINE_FILES_TRIED:
            thumbnail = _read_thumbnail(row["file"])
        num_thumbnails += thumbnail is not None
        yield thumbnail


def _order_groups(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Puts the groups with several labels first: what looks alike and is called differently is most likely a mistake."""
    return sorted(groups, key=lambda group: not _has_conflict(group))


def _has_conflict(group: dict[str, Any]) -> bool:
    return len({file["label"] for file in group["files"]}) > 1


def _illustrate(group: dict[str, Any]) -> dict[str, Any]:
    """Adds thumbnails to the first files of a group, at least one of each label."""
    by_label = defaultdict(list)
    for file in group["files"]:
        by_label[file["label"]].append(file)
    firsts = [files.pop(0) for files in by_label.values()]
    files = (firsts + [file for files in by_label.values() for file in files])[:_MAX_FILES_PER_GROUP]
    rest = len(group["files"]) - len(files)
    return {
        "split": group["split"],
        "is_joined": group.get("is_joined", True),
        "has_conflict": _has_conflict(group),
        # A bucket is left alone: a hundred downloads would hold the data set up.
        "files": [(file, None if "://" in file["file"] else _read_thumbnail(file["file"])) for file in files],
        "num_files": len(group["files"]),
        "num_more": rest,
        "num_moved": sum(bool(file["moved_from"]) for file in group["files"]),
    }


def _read_thumbnail(path: str) -> Thumbnail | None:
    """Makes a thumbnail of a file of unknown content; None if there is no image in it, or too large a one."""
    try:
        return make_thumbnail(read_file(path, max_bytes=_MAX_FILE_BYTES), is_upright=True)
    except (UnusableImageError, OSError, tf.errors.OpError):
        return None


def _common_folder(files: Sequence[str], location: str) -> str:
    """Finds what the shown names begin with and the page says once: the input's folder, or else that of all of them."""
    for folder in (location.rstrip("/"), os.path.dirname(location)):
        if folder and any(file.startswith(f"{folder}/") for file in files):
            return f"{folder}/"
    if not files:
        return ""
    # What the first and the last name of the alphabet share, all share.
    first, last = (name.split("/")[:-1] for name in (min(files), max(files)))
    same = itertools.takewhile(lambda parts: parts[0] == parts[1], zip(first, last, strict=False))
    prefix = "".join(f"{part}/" for part, _ in same)
    return "" if prefix in ("/", "gs://") else prefix


def make_visible(value: Any) -> Any:
    """Prepares every text that the template writes: shows what cannot be seen or encoded as an escape, and shortens it.

    A name may hold a line break, a mark that turns the direction of writing, or bytes that are not UTF-8.
    """
    if not isinstance(value, str) or isinstance(value, markupsafe.Markup):
        return value
    if len(value) > _MAX_CHARACTERS:
        value = f"{value[: _MAX_CHARACTERS // 2]}…{value[-_MAX_CHARACTERS // 2 :]}"
    return _MAYBE_INVISIBLE.sub(_escape, value)


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    if character in _JOINERS or unicodedata.category(character) not in _INVISIBLE_CATEGORIES:
        return character
    return character.encode("unicode_escape").decode()


def _break_at_slashes(path: str) -> markupsafe.Markup:
    """Lets a long path be broken between its folders."""
    return markupsafe.Markup("/<wbr>").join(make_visible(path).split("/"))


def _plural(noun: str, number: int) -> str:
    if number == 1:
        return noun
    return noun.removesuffix("s") + "ses" if noun.endswith("s") else f"{noun}s"


def _measure(value: float, name: str) -> str:
    """Writes one of the facts of an image."""
    if name == "bytes":
        for unit in ("bytes", "kB", "MB"):
            if value < 1000 or unit == "MB":
                return f"{value:,.0f} {unit}" if unit == "bytes" or value >= 100 else f"{value:.1f} {unit}"
            value /= 1000
    return f"{value:.2f}" if name == "brightness" else f"{value:,.6g}"
