"""Small pictures of records, for the HTML reports: of the data set and of a run.

Called by `data.report` and by `pipeline.report`.
"""

import base64
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import markupsafe
import numpy as np
import tensorflow as tf
from PIL import Image, ImageOps

from data.features import FILENAME_KEY, IMAGE_KEY, LABEL_KEY
from data.inspection import FORMATS

SHEET_SIZE = (192, 96)  # pixels in width and height, at most, of a picture on a contact sheet
_SHEET_BYTES = 4_500
MAX_RECORDS_READ = 5_000  # for contact sheets
_MAX_PIXELS = 50_000_000  # that are really decoded; a JPEG is decoded at a fraction of its size


class Thumbnail(NamedTuple):
    """A small JPEG and the size at which the page shows it, in pixels; tiny images are shown enlarged."""

    uri: markupsafe.Markup
    width: int
    height: int
    is_enlarged: bool


def read_records(paths: Sequence[str], *, max_records: int) -> Iterator[tuple[str, str, bytes]]:
    """Yields label, file name and encoded image of the first records.

    Args:
      paths: of gzipped TFRecords; local or gs://.
      max_records: how many are read at most.
    """
    if not paths:
        return
    records = tf.data.TFRecordDataset(paths, compression_type="GZIP").take(max_records)
    for record in records.as_numpy_iterator():
        feature = tf.train.Example.FromString(record).features.feature
        label, filename, image = (feature[key].bytes_list.value[0] for key in (LABEL_KEY, FILENAME_KEY, IMAGE_KEY))
        yield label.decode(), filename.decode("utf-8", "surrogateescape"), image


def contact_sheets(paths: Sequence[str], num_wanted: Mapping[str, int]) -> dict[str, list[tuple[str, Thumbnail]]]:
    """Takes the first images of each class: records are in the order of a hash, so this is a sample that stays the same.

    Args:
      paths: of the records, of which the first `MAX_RECORDS_READ` are looked at.
      num_wanted: class -> how many pictures of it.

    Returns:
      class -> (file name, thumbnail), fewer than wanted where there are not so many that can be shown.
    """
    sheets: dict[str, list[tuple[str, Thumbnail]]] = {name: [] for name in num_wanted}
    missing = dict(num_wanted)
    for label, filename, encoded in read_records(paths, max_records=MAX_RECORDS_READ):
        if missing.get(label):
            thumbnail = make_thumbnail(encoded)
            if thumbnail:
                sheets[label].append((filename, thumbnail))
                missing[label] -= 1
        if not any(missing.values()):
            break
    return sheets


def make_thumbnail(encoded: bytes, *, is_upright: bool = False) -> Thumbnail | None:
    """Makes a thumbnail for a contact sheet; None if Pillow finds no image, or too large a one.

    Args:
      encoded: the bytes of the file.
      is_upright: turn the image as its EXIF data say, as viewers do; records are shown as the model sees them.
    """
    image = shrink(encoded, size=SHEET_SIZE, is_upright=is_upright)
    return image and encode_thumbnail(image, size=SHEET_SIZE, max_bytes=_SHEET_BYTES)


def shrink(encoded: bytes, *, size: tuple[int, int], is_upright: bool = False) -> Image.Image | None:
    """Decodes an image of unknown content at a small size; None if Pillow finds none, or too large a one.

    Args:
      encoded: the bytes of the file.
      size: width and height, in pixels, within which the image has to fit; it keeps its aspect and is never enlarged.
      is_upright: turn the image as its EXIF data say.

    Returns:
      An RGB image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata
            image = Image.open(io.BytesIO(encoded), formats=FORMATS)
            image.draft("RGB", (2 * max(size), 2 * max(size)))
            if image.width * image.height > _MAX_PIXELS:
                return None
            image = _to_rgb(ImageOps.exif_transpose(image) if is_upright else image)
            image.thumbnail(size)
            return image
    except Exception:  # a damaged file makes Pillow raise anything, and no thumbnail is worth a failed run
        return None


def encode_thumbnail(image: Image.Image, *, size: tuple[int, int], max_bytes: int) -> Thumbnail:
    """Encodes a small RGB image as a JPEG in a data URI.

    Args:
      image: as small as it is to be stored.
      size: width and height, in pixels, that the page gives it; a smaller image is shown enlarged.
      max_bytes: of the JPEG; the quality goes down until it fits, or no lower quality is left.
    """
    for quality in (80, 60, 40, 20):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= max_bytes:
            break
    scale = max(1.0, min(size[0] / image.width, size[1] / image.height))
    return Thumbnail(
        uri=markupsafe.Markup("data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()),
        width=round(scale * image.width),
        height=round(scale * image.height),
        is_enlarged=scale > 1,
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    """Brings 16 bits down to 8, and puts what is transparent on white."""
    if image.mode.startswith("I"):
        image = Image.fromarray(np.clip(np.asarray(image) // 257, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
