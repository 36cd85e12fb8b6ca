"""Looks at one image before it becomes a record: whether it can be used, what it shows, what has to be converted.

What training and serving decode with TensorFlow is decoded with TensorFlow here, once. Pillow reads headers, before anything is
decoded, and what TensorFlow cannot decode. Called by `data.steps` for every image.
"""

import dataclasses
import errno
import io
import os
import stat

import imagehash
import numpy as np
import pydantic
import tensorflow as tf
from PIL import ExifTags, Image

from data.features import ASPECT_KEY, BRIGHTNESS_KEY, CHANNELS_KEY, HEIGHT_KEY, WIDTH_KEY

HASH_SIDE = 16  # the perceptual hash has HASH_SIDE ** 2 bits
THUMBNAIL_SIDE = 32  # pixels
_HASHED_SIDE = 4 * HASH_SIDE  # pixels that `imagehash.phash` looks at
_MAX_FILE_BYTES = 512 * 1024**2  # no photograph is larger, and it would be read into memory
_JPEG_QUALITY = 95
_MAX_REASON = 300  # characters
_TRANSPOSE = {  # by EXIF orientation, as `PIL.ImageOps.exif_transpose`
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# These fail the job, so that its runner tries again; of anything else the image is to blame, as of the remote errors below.
_TRANSIENT_ERRORS = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
_PERMANENT_REMOTE_ERRORS = (
    tf.errors.NotFoundError,
    tf.errors.InvalidArgumentError,
    tf.errors.PermissionDeniedError,
    tf.errors.FailedPreconditionError,
    tf.errors.UnimplementedError,
)

# Not all that Pillow knows: some, such as EPS, it hands to other programs, and of ICO it decodes what is inside before it
# tells the size. An older Pillow lacks some.
Image.init()
FORMATS = tuple(
    name for name in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "JPEG2000", "PPM", "TGA", "AVIF") if name in Image.OPEN
)
_JPEG = ("JPEG", "MPO")  # the second is a JPEG with further images behind it, as phones write
# The limit of `ImageLimits` is the one that counts, and is checked before anything is decoded.
Image.MAX_IMAGE_PIXELS = None
NO_FILE = "there is no such file"  # the reason of an image that is listed and not there


class ImageLimits(pydantic.BaseModel):
    """Which images can be used, and how large they are kept.

    Attributes:
      min_side: images with a shorter side, in pixels, are quarantined.
      max_side: images with a longer side, in pixels, are shrunk to it once, here, and encoded again; 0 keeps them as they are.
      max_pixels: images with more pixels are quarantined undecoded: decompression bombs.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    min_side: int = pydantic.Field(8, ge=1)
    max_side: int = pydantic.Field(0, ge=0)
    max_pixels: int = pydantic.Field(100_000_000, ge=1)


class UnusableImageError(ValueError):
    """Why an image goes to quarantine, in a clause."""


@dataclasses.dataclass(frozen=True, slots=True)
class InspectedImage:
    """One usable image.

    Attributes:
      encoded: JPEG or PNG bytes, of which TensorFlow decodes the upright image.
      height: pixels.
      width: pixels.
      channels: of the image as it was decoded, 1 to 4.
      brightness: mean grey value, in [0, 1].
      perceptual_hash: `HASH_SIDE` ** 2 bits, packed; nearly the same for images that look alike.
      thumbnail: uint8 [THUMBNAIL_SIDE, THUMBNAIL_SIDE] grey values, as bytes.
      conversions: what was done to it, each in a phrase; empty where the bytes are those of the file.
    """

    encoded: bytes
    height: int
    width: int
    channels: int
    brightness: float
    perceptual_hash: bytes
    thumbnail: bytes
    conversions: tuple[str, ...]

    @property
    def facts(self) -> dict[str, float]:
        """The facts that a record holds too, by `data.features.FACT_KEYS`."""
        return {
            HEIGHT_KEY: self.height,
            WIDTH_KEY: self.width,
            ASPECT_KEY: self.width / self.height,
            BRIGHTNESS_KEY: self.brightness,
            CHANNELS_KEY: self.channels,
        }


def is_remote(path: str) -> bool:
    """Tells a URL, such as gs://, from a path on this machine."""
    return "://" in path


def read_file(path: str, *, max_bytes: int = _MAX_FILE_BYTES) -> bytes:
    """Reads a file, local or gs://.

    Args:
      path: of the file.
      max_bytes: more would not fit into memory.

    Raises:
      UnusableImageError: if it cannot be read and no retry would mend that.
    """
    try:
        encoded = _read_remote(path, max_bytes) if is_remote(path) else _read_local(path, max_bytes)
    except FileNotFoundError as error:
        raise UnusableImageError(NO_FILE) from error
    except OSError as error:
        if error.errno in _TRANSIENT_ERRORS:
            raise
        raise UnusableImageError(f"it cannot be read: {error.strerror}") from error
    except ValueError as error:  # a null character in the name
        if isinstance(error, UnusableImageError):
            raise
        raise UnusableImageError(f"it cannot be read: {error}") from error
    if not encoded:
        raise UnusableImageError("the file is empty")
    return encoded


def _read_local(path: str, max_bytes: int) -> bytes:
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise UnusableImageError("it is a folder")
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
        raise UnusableImageError("it is no regular file")
    _check_bytes(status.st_size, max_bytes)
    with open(path, "rb") as file:
        return file.read()


def _read_remote(path: str, max_bytes: int) -> bytes:
    try:
        _check_bytes(tf.io.gfile.stat(path).length, max_bytes)
        with tf.io.gfile.GFile(path, "rb") as file:
            return file.read()
    except tf.errors.NotFoundError as error:
        raise UnusableImageError(NO_FILE) from error
    except _PERMANENT_REMOTE_ERRORS as error:
        raise UnusableImageError(f"it cannot be read: {shorten(error.message)}") from error


def _check_bytes(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise UnusableImageError(f"it has {num_bytes:,} bytes; the limit is {max_bytes:,}")


def inspect_image(encoded: bytes, limits: ImageLimits) -> InspectedImage:
    """Decodes an image once and converts what training could not use as it is.

    EXIF rotation is applied; what is neither JPEG nor PNG becomes PNG (of a moving picture the first frame); too large a
    photograph is shrunk. JPEG stays JPEG, at quality 95 where it has to be encoded again.

    Args:
      encoded: the bytes of the file.
      limits: of size.

    Raises:
      UnusableImageError: if it is no image, is damaged, or exceeds the limits.
    """
    try:
        header = Image.open(io.BytesIO(encoded), formats=FORMATS)
        orientation = read_orientation(header)
    except Image.UnidentifiedImageError as error:
        raise UnusableImageError("it is no image of a known format") from error
    except Exception as error:  # hostile bytes raise anything in a parser of fifty formats
        raise UnusableImageError(f"it is damaged: {shorten(str(error) or type(error).__name__)}") from error
    _check_size(header, limits)
    pixels = _decode(header, encoded)
    upright, conversions = _convert(header, pixels, orientation, limits)
    if conversions:
        encoded = _encode(upright, "JPEG" if header.format in _JPEG else "PNG")
    grey = upright.convert("L")
    small = grey.resize((_HASHED_SIDE, _HASHED_SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return InspectedImage(
        encoded=encoded,
        height=upright.height,
        width=upright.width,
        channels=pixels.shape[2],
        brightness=float(np.asarray(small).mean()) / 255,
        perceptual_hash=np.packbits(imagehash.phash(small, hash_size=HASH_SIDE).hash).tobytes(),
        thumbnail=small.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX).tobytes(),
        conversions=tuple(conversions),
    )


def encode_pixels(pixels: np.ndarray) -> bytes:
    """Encodes uint8 [height, width, 1 or 3] losslessly, as PNG."""
    return _encode(_as_image(pixels), "PNG")


def shorten(message: str) -> str:
    """Takes the first line of a library's message, without the name of its operation."""
    return message.split("[Op:")[0].strip().split("\n")[0][:_MAX_REASON]


def read_orientation(header: Image.Image) -> int:
    """Returns how an image is turned or mirrored, by EXIF: 2 to 8; 1 where it is upright, or says nothing that is known.

    Args:
      header: as Pillow has opened it; its pixels are not decoded.
    """
    # The base class's own method: that of PNG would decode the whole image to look for a late chunk.
    orientation = Image.Image.getexif(header).get(ExifTags.Base.Orientation, 1)
    return orientation if orientation in _TRANSPOSE else 1


def _check_size(header: Image.Image, limits: ImageLimits) -> None:
    width, height = header.size
    if width * height > limits.max_pixels:
        raise UnusableImageError(f"it has {width} x {height} pixels; the limit is {limits.max_pixels:,} in all")
    if min(width, height) < limits.min_side:
        raise UnusableImageError(f"it has {width} x {height} pixels; the shorter side must have {limits.min_side}")


def _decode(header: Image.Image, encoded: bytes) -> np.ndarray:
    """Returns uint8 [height, width, channels]."""
    try:
        if header.format in _JPEG:
            return tf.io.decode_jpeg(encoded).numpy()
        if header.format == "PNG":
            return tf.io.decode_png(encoded).numpy()
    except tf.errors.InvalidArgumentError as error:
        reason = shorten(error.message.rpartition("}}")[2])
        raise UnusableImageError(f"it is damaged or cut off: {reason}") from error
    if header.mode in ("I", "F"):
        raise UnusableImageError("it has pixels of 32 bits; save it with 8 or 16")
    try:
        if header.mode.startswith("I;16"):
            return (np.asarray(header).astype(np.uint16) >> 8).astype(np.uint8)[..., np.newaxis]
        grey_or_colour = header.convert("L" if header.mode in ("1", "L") else "RGB")
    except Exception as error:  # as above: anything
        raise UnusableImageError(f"it is damaged or cut off: {shorten(str(error) or type(error).__name__)}") from error
    return np.asarray(grey_or_colour).reshape(header.height, header.width, -1)


def _convert(header: Image.Image, pixels: np.ndarray, orientation: int, limits: ImageLimits) -> tuple[Image.Image, list[str]]:
    """Returns the upright image, grey or RGB, and what had to be done."""
    image = _as_image(pixels)
    conversions = []
    remaining = read_orientation(header)  # Pillow turns a TIFF upright by itself while it decodes it
    if header.format not in (*_JPEG, "PNG"):
        conversions.append(f"{header.format} became PNG")
    if remaining in _TRANSPOSE:
        image = image.transpose(_TRANSPOSE[remaining])
    if orientation in _TRANSPOSE:
        conversions.append("EXIF rotation was applied")
    if limits.max_side and max(image.size) > limits.max_side:
        scale = limits.max_side / max(image.size)
        size = tuple(max(1, round(side * scale)) for side in image.size)
        if min(size) < limits.min_side:
            raise UnusableImageError(
                f"it would have {size[0]} x {size[1]} pixels; the shorter side must have {limits.min_side}"
            )
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
        conversions.append(f"shrunk to {limits.max_side} pixels")
    return image, conversions


def _as_image(pixels: np.ndarray) -> Image.Image:
    """Leaves the alpha channel out, as TensorFlow's decoder does in training and serving."""
    if pixels.shape[2] <= 2:
        return Image.fromarray(np.ascontiguousarray(pixels[..., 0]))
    return Image.fromarray(np.ascontiguousarray(pixels[..., :3]))


def _encode(image: Image.Image, image_format: str) -> bytes:
    buffer = io.BytesIO()
    options = {"quality": _JPEG_QUALITY, "subsampling": 0} if image_format == "JPEG" else {"compress_level": 3}
    image.save(buffer, image_format, **options)
    return buffer.getvalue()
