"""One image at a time: what each format becomes, and why what cannot be used cannot."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import ExifTags, Image

from data.inspection import HASH_SIDE, THUMBNAIL_SIDE, ImageLimits, UnusableImageError, inspect_image, read_file

LIMITS = ImageLimits()
# By EXIF orientation: what a camera stores of an upright image, as rows and columns.
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright),
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.fixture(scope="module")
def smooth() -> np.ndarray:
    """uint8 [48, 64, 3]; colours that no JPEG spoils, different in every corner."""
    random = np.random.default_rng(3)
    return np.asarray(Image.fromarray(random.integers(0, 256, (3, 4, 3), np.uint8)).resize((64, 48), Image.Resampling.BICUBIC))


def decoded(encoded: bytes) -> np.ndarray:
    """What training and serving see: int [height, width, 3]."""
    return tf.io.decode_image(encoded, channels=3, expand_animations=False).numpy().astype(int)


def reason(encoded: bytes, **limits) -> str:
    with pytest.raises(UnusableImageError) as error:
        inspect_image(encoded, ImageLimits(**limits))
    return str(error.value)


@pytest.mark.parametrize(
    ("mode", "image_format", "options", "channels"),
    [
        ("RGB", "JPEG", {"quality": 95}, 3),
        ("RGB", "JPEG", {"progressive": True}, 3),
        ("RGB", "MPO", {}, 3),
        ("CMYK", "JPEG", {"quality": 95}, 3),
        ("L", "JPEG", {}, 1),
        ("RGB", "PNG", {}, 3),
        ("RGBA", "PNG", {}, 4),
        ("LA", "PNG", {}, 2),
        ("L", "PNG", {}, 1),
        ("P", "PNG", {}, 3),
        ("1", "PNG", {}, 1),
    ],
)
def test_inspect_image_keeps_the_bytes_that_training_can_use(encode, smooth, mode, image_format, options, channels):
    encoded = encode(Image.fromarray(smooth).convert(mode), image_format, **options)

    image = inspect_image(encoded, LIMITS)

    assert image.encoded is encoded
    assert image.conversions == ()
    assert (image.height, image.width, image.channels) == (48, 64, channels)
    luma = decoded(encoded) @ [0.299, 0.587, 0.114]
    assert image.brightness == pytest.approx(luma.mean() / 255, abs=0.01)


def test_inspect_image_takes_the_upper_byte_of_sixteen_bits(encode, smooth):
    grey = smooth[..., 0]
    encoded = encode(Image.fromarray(grey.astype(np.uint16) * 256 + 77))

    image = inspect_image(encoded, LIMITS)

    assert image.encoded is encoded
    np.testing.assert_array_equal(decoded(image.encoded)[..., 0], grey)
    assert image.brightness == pytest.approx(grey.mean() / 255, abs=0.01)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(("image_format", "tolerance"), [("JPEG", 3), ("PNG", 0), ("WEBP", 0), ("TIFF", 0)])
def test_inspect_image_applies_the_exif_rotation(encode, smooth, orientation, image_format, tolerance):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(image_format, {})
    encoded = encode(np.ascontiguousarray(STORED[orientation](smooth)), image_format, exif=exif, **options)

    image = inspect_image(encoded, LIMITS)

    assert (image.height, image.width) == (48, 64)
    assert np.abs(decoded(image.encoded) - smooth).mean() <= tolerance
    assert ("EXIF rotation was applied" in image.conversions) == (orientation != 1)


@pytest.mark.parametrize(
    ("mode", "image_format", "options"),
    [
        ("RGB", "BMP", {}),
        ("P", "BMP", {}),
        ("1", "BMP", {}),
        ("P", "GIF", {}),
        ("RGB", "WEBP", {"lossless": True}),
        ("RGB", "TIFF", {}),
        ("L", "TIFF", {"compression": "tiff_lzw"}),
        ("RGB", "PPM", {}),
        ("RGB", "TGA", {}),
        ("RGB", "JPEG2000", {}),
    ],
)
def test_inspect_image_makes_png_of_other_formats(encode, smooth, mode, image_format, options):
    original = Image.fromarray(smooth).convert(mode)
    encoded = encode(original, image_format, **options)

    image = inspect_image(encoded, LIMITS)

    assert image.encoded.startswith(b"\x89PNG")
    np.testing.assert_array_equal(decoded(image.encoded), np.asarray(original.convert("RGB")))
    (conversion,) = image.conversions
    assert conversion == f"{image_format} became PNG"


def test_inspect_image_takes_the_first_frame_of_a_moving_picture(encode, smooth):
    frames = [Image.fromarray(smooth), Image.fromarray(255 - smooth)]
    for image_format in ("GIF", "WEBP", "TIFF", "PNG"):
        encoded = encode(frames[0], image_format, save_all=True, append_images=frames[1:], **({"lossless": True}))
        shown = decoded(inspect_image(encoded, LIMITS).encoded)
        assert np.abs(shown - smooth).mean() < np.abs(shown - (255 - smooth)).mean(), image_format


def test_inspect_image_shrinks_what_is_larger_than_wanted(encode, photograph):
    limits = ImageLimits(max_side=300)

    image = inspect_image(photograph.read_bytes(), limits)

    assert (image.height, image.width) == (300, 256)  # of 600 by 512
    assert image.encoded.startswith(b"\xff\xd8")
    assert image.conversions == ("shrunk to 300 pixels",)
    with Image.open(photograph) as original:
        expected = np.asarray(original.resize((256, 300), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(decoded(image.encoded) - expected).mean() < 4
    assert inspect_image(image.encoded, limits).encoded is image.encoded


def test_inspect_image_gives_hash_and_thumbnail_of_its_looks(encode, photograph):
    with Image.open(photograph) as original:
        smaller = encode(original.resize((256, 300), Image.Resampling.LANCZOS), "JPEG", quality=70)
        other = encode(original.transpose(Image.Transpose.ROTATE_180))
    bits = [
        np.unpackbits(np.frombuffer(inspect_image(encoded, LIMITS).perceptual_hash, np.uint8))
        for encoded in (photograph.read_bytes(), smaller, other)
    ]

    assert len(bits[0]) == HASH_SIDE**2
    assert (bits[0] != bits[1]).sum() <= 8
    assert (bits[0] != bits[2]).sum() > 60
    assert len(inspect_image(smaller, LIMITS).thumbnail) == THUMBNAIL_SIDE**2


def test_inspect_image_refuses_what_is_too_small(encode):
    assert reason(encode(np.zeros((7, 90, 3), np.uint8))) == "it has 90 x 7 pixels; the shorter side must have 8"


def test_inspect_image_refuses_a_decompression_bomb_before_decoding_it():
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 1_000_000)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")

    assert reason(bomb) == "it has 50000 x 50000 pixels; the limit is 100,000,000 in all"


@pytest.mark.parametrize(
    "encoded",
    [
        b"text",
        b"\0" * 100,
        b"\xff\xd8\xff",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.4",
        b"%!PS-Adobe-3.0 EPSF-3.0",
    ],
)
def test_inspect_image_refuses_what_is_no_image(encoded):
    assert reason(encoded) == "it is no image of a known format"


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_inspect_image_refuses_what_is_cut_off(encode, image_format, share):
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    encoded = encode(noise, image_format)

    why = reason(encoded[: int(share * len(encoded))])

    assert why.startswith(("it is damaged", "it is no image of a known format")), why
    assert "\n" not in why
    assert "Op:" not in why


def test_inspect_image_refuses_pixels_of_32_bits(encode):
    floats = Image.fromarray(np.zeros((20, 20), np.float32))

    assert reason(encode(floats, "TIFF")) == "it has pixels of 32 bits; save it with 8 or 16"


def test_inspect_image_survives_flipped_bits(encode, smooth):
    """Whatever the damage: a usable image that TensorFlow decodes, or a reason in one line."""
    random = np.random.default_rng(1)
    reasons = []
    for image_format in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"):
        encoded = encode(smooth, image_format)
        for _ in range(60):
            damaged = bytearray(encoded)
            for position in random.integers(0, len(encoded), random.integers(1, 20)):
                damaged[position] ^= 1 << random.integers(0, 8)
            try:
                image = inspect_image(bytes(damaged), LIMITS)
            except UnusableImageError as error:
                reasons.append(str(error))
            else:
                assert decoded(image.encoded).shape == (image.height, image.width, 3)
    assert len(reasons) > 60
    assert not any("\n" in reason for reason in reasons)


def test_read_file_explains_what_cannot_be_read(tmp_path: Path):
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(600 * 1024**2)
    expected = {
        "missing": "there is no such file",
        "empty": "the file is empty",
        "": "it is a folder",
        "pipe": "it is no regular file",
        "circle": "it cannot be read: Too many levels of symbolic links",
        "a" * 300: "it cannot be read: File name too long",
        "empty/x": "it cannot be read: Not a directory",
        "nu\0l": "it cannot be read: embedded null byte",
        "huge": "it has 629,145,600 bytes; the limit is 536,870,912",
    }
    for name, why in expected.items():
        with pytest.raises(UnusableImageError) as error:
            read_file(os.path.join(tmp_path, name))
        assert str(error.value) == why
