"""The pictures of the HTML report: of each class, and of what the model got wrong, with heat maps that say why.

Called by `pipeline.report`. Whatever cannot be read or explained is left out and said: a report without pictures is better than
none.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from data.features import TEST_SPLIT, TRAIN_SPLIT
from data.thumbnails import Thumbnail, contact_sheets, encode_thumbnail, read_records, shrink
from models.attributions import integrated_gradients
from models.explainable import ExplainableModel
from models.overlay import overlay

logger = logging.getLogger("tfx_vision")

MAX_SHEETS = 12  # classes with a contact sheet; the report of the data has more
_NUM_PER_SHEET = 6
MAX_HEAT_MAPS = 8
_MAX_RECORDS_READ = 20_000  # of the test split, to find the mistakes
_SIZE = (160, 160)  # pixels
_MAX_BYTES = 9_000  # of a picture
# No heat map is begun after this; a large network on a CPU takes minutes for each.
_MAX_SECONDS = 20.0


class Mistake(NamedTuple):
    """One test image that was classified wrongly.

    Attributes:
      filename: where it came from.
      label: its true class.
      predicted: the model's class.
      probability: of the predicted class, in [0, 1].
      picture: the image, or None where it was not found.
      heat_map: what speaks for the predicted class, drawn on the image, or None.
    """

    filename: str
    label: str
    predicted: str
    probability: float
    picture: Thumbnail | None
    heat_map: Thumbnail | None


def illustrate_classes(records: str | None, train_counts: Mapping[str, int]) -> dict[str, list[tuple[str, Thumbnail]]]:
    """Makes a contact sheet of each of the first classes, of their train images.

    Args:
      records: folder of the prepared records, or None.
      train_counts: class -> number of train images.

    Returns:
      class -> (file name, thumbnail), of the classes that have any.
    """
    if records is None:
        return {}
    wanted = {name: min(_NUM_PER_SHEET, count) for name, count in list(train_counts.items())[:MAX_SHEETS]}
    try:
        sheets = contact_sheets(_shards(records, TRAIN_SPLIT), wanted)
    except (tf.errors.OpError, ValueError, LookupError) as error:
        logger.warning("no contact sheets in the report: %s", error)
        return {}
    return {name: images for name, images in sheets.items() if images}


def illustrate_mistakes(
    mistakes: Sequence[Mapping[str, Any]], class_names: Sequence[str], *, records: str | None, model: str | None
) -> tuple[list[Mistake], str]:
    """Finds the pictures of the mistakes, and explains the first ones.

    Args:
      mistakes: dicts of filename, label, predicted and probability, in the order of the page.
      class_names: in the order of the model's outputs.
      records: folder of the prepared records, or None.
      model: folder of the SavedModel, or None.

    Returns:
      The mistakes, and a sentence why heat maps are missing; empty if none is.
    """
    encoded = _find_images(mistakes, records)
    heat_maps, problem = _heat_maps(mistakes, class_names, encoded, model) if encoded and model else ({}, "")
    found = []
    for index, mistake in enumerate(mistakes):
        image = shrink(encoded[index], size=_SIZE) if index in encoded else None
        facts = {key: mistake[key] for key in ("filename", "label", "predicted", "probability")}
        picture = heat_map = None
        if image is not None:
            picture = encode_thumbnail(image, size=_SIZE, max_bytes=_MAX_BYTES)
            if index in heat_maps:
                heat_map = encode_thumbnail(overlay(image, heat_maps[index]), size=_SIZE, max_bytes=_MAX_BYTES)
        found.append(Mistake(**facts, picture=picture, heat_map=heat_map))
    return found, problem


def _find_images(mistakes: Sequence[Mapping[str, Any]], records: str | None) -> dict[int, bytes]:
    """Returns the encoded images by the mistakes' indices, of those that are found."""
    missing = {(mistake["label"], mistake["filename"]): index for index, mistake in enumerate(mistakes)}
    found = {}
    if records is None or not missing:
        return found
    try:
        for label, filename, encoded in read_records(_shards(records, TEST_SPLIT), max_records=_MAX_RECORDS_READ):
            index = missing.pop((label, filename), None)
            if index is not None:
                found[index] = encoded
            if not missing:
                break
    except (tf.errors.OpError, ValueError, LookupError) as error:
        logger.warning("not all mistakes have pictures in the report: %s", error)
    return found


def _shards(records: str, split: str) -> list[str]:
    return sorted(tf.io.gfile.glob(f"{tf.io.gfile.join(_literal(records), split)}-*.tfrecord.gz"))


def _literal(folder: str) -> str:
    """Keeps what a folder's name has of a pattern's characters from being one."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in folder)


def _heat_maps(
    mistakes: Sequence[Mapping[str, Any]], class_names: Sequence[str], encoded: Mapping[int, bytes], folder: str
) -> tuple[dict[int, Any], str]:
    """Explains the first mistakes: index -> float32 [height, width], and a sentence why some are missing."""
    heat_maps = {}
    started = time.monotonic()
    wanted = [index for index in sorted(encoded) if mistakes[index]["predicted"] in class_names][:MAX_HEAT_MAPS]
    try:
        model = ExplainableModel(folder)
        for index in wanted:
            if time.monotonic() - started > _MAX_SECONDS:
                return heat_maps, f"Heat maps of {len(heat_maps)} of {len(wanted)} images: more would take too long here."
            heat_map = integrated_gradients(model, encoded[index], class_names.index(mistakes[index]["predicted"]))
            if not _is_finite(heat_map):
                return heat_maps, "No heat maps: the model's gradients are no numbers."
            heat_maps[index] = heat_map
    except Exception as error:  # a model that the gate refused may fail in any way, and the report has to say that it was
        logger.warning("no heat maps in the report: %s", error)
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        return heat_maps, f"No heat maps: the model cannot be explained ({reason})"
    return heat_maps, ""


def _is_finite(heat_map: Any) -> bool:
    return bool(tf.reduce_all(tf.math.is_finite(heat_map)))
