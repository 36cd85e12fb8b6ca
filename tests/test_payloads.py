import base64
import io
import json

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from data.inspection import FORMATS, UnusableImageError
from models.payloads import PreparedImage, RequestError, parse_body, prepare_image
from pipeline.serving_process import make_png

B64 = base64.b64encode(make_png(5, 3)).decode()
ROW = {"image_bytes": {"b64": B64}}


def _parse(document, **limits):
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return parse_body(body, **{"max_instances": 3, "max_pixels": 1000} | limits)


@pytest.mark.parametrize(
    ("document", "by_column", "num_images"),
    [
        ({"instances": [ROW, {"b64": B64}]}, False, 2),
        ({"instances": [ROW], "signature_name": "serving_default"}, False, 1),
        ({"instances": [ROW], "signature_name": "", "parameters": None}, False, 1),
        ({"inputs": {"image_bytes": [{"b64": B64}] * 3}}, True, 3),
        ({"inputs": {"image_bytes": {"b64": B64}}}, True, 1),
        ({"inputs": [{"b64": B64}]}, True, 1),
        ({"inputs": {"b64": B64}}, True, 1),
    ],
)
def test_parse_body_reads_rows_and_columns(document, by_column, num_images):
    payload = _parse(document)

    assert payload.by_column is by_column
    assert payload.images == [PreparedImage(make_png(5, 3), 15)] * num_images
    assert payload.parameters == {}


def test_parse_body_passes_parameters_on():
    assert _parse({"instances": [ROW], "parameters": {"method": "xrai"}}).parameters == {"method": "xrai"}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b"", r"Expected a JSON object. Received: 0 bytes, no JSON"),
        (b'{"instances": [', "no JSON"),
        (b"\xff\xfe\x00\xd8", "no JSON"),
        (b"\x80abc", "no UTF-8"),
        (b"1" * 5000, "no JSON"),
        (b"[" * 100_000, "few levels"),
        ([1, 2], r"Expected a JSON object. Received: \[1, 2\]"),
        ({}, "Expected `instances` or `inputs`. Received: neither"),
        ({"instances": [ROW], "inputs": []}, "Received: both"),
        (
            {"instances": [ROW], "signature_name": "examples"},
            "Expected `signature_name` to be serving_default. Received: 'examples'",
        ),
        ({"instances": [ROW], "signature_name": 7}, "Received: 7"),
        ({"instances": [ROW], "parameters": [1]}, "Expected `parameters` to be an object"),
        ({"instances": {}}, "Expected `instances` to be a list. Received: an object with nothing"),
        ({"instances": "x" * 100}, r"Received: 'x{60}'\.\.\."),
        ({"instances": []}, "an empty list"),
        ({"instances": [ROW] * 4}, "Expected 3 images or fewer. Received: 4"),
        ({"instances": [ROW, 3]}, r"Expected `instances\[1\]` to be .* Received: 3"),
        ({"instances": [{"image_bytes": "abc"}]}, r"Expected `instances\[0\]`"),
        ({"instances": [{"b64": 3}]}, r"Expected `instances\[0\]`"),
        ({"instances": [{"b64": B64, "url": "http://example.org"}]}, "an object with 'b64', 'url'"),
        ({"instances": [{"url": "file:///etc/passwd"}]}, "an object with 'url'"),
        ({"instances": [{"b64": "not base64!"}]}, r"Expected `instances\[0\]` to be base64"),
        ({"instances": [{"b64": B64[:-1]}]}, "to be base64"),
        ({"instances": [{"b64": "é" * 8}]}, "to be base64"),
        ({"instances": [{"b64": ""}]}, r"Expected `instances\[0\]` to be an image. Received: one that cannot be used"),
        ({"instances": [{"b64": "AAAA"}]}, "no image of a known format"),
        ({"inputs": {"other": []}}, r"Expected `inputs` to have `image_bytes` alone. Received: \['other'\]"),
        ({"inputs": {"image_bytes": 3}}, "Expected `inputs` to be a list. Received: 3"),
        ({"inputs": [{"b64": "AAAA"}]}, r"Expected `inputs\[0\]` to be an image"),
    ],
)
def test_parse_body_names_what_is_wrong(document, message):
    with pytest.raises(RequestError, match=message) as caught:
        _parse(document)

    assert caught.value.status == 400
    assert len(caught.value.message) < 500
    assert "\n" not in caught.value.message


def test_prepare_image_passes_jpeg_and_png_bytes_through(encode):
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    for encoded in (
        encode(noise, "JPEG"),
        encode(noise),
        encode(noise[..., 0]),
        encode(Image.fromarray(noise).convert("CMYK"), "JPEG"),
    ):
        assert prepare_image(encoded, max_pixels=600) == PreparedImage(encoded, 600)


def test_prepare_image_leaves_damage_to_the_model(encode):
    """The pixels are decoded once, by the model, which finds it."""
    encoded = encode(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), "JPEG")[:-200]

    assert prepare_image(encoded, max_pixels=10_000).encoded == encoded


@pytest.mark.parametrize("orientation", range(1, 9))
def test_prepare_image_turns_upright(encode, orientation):
    grid = np.zeros((16, 32, 3), np.uint8)
    grid[:8, :8] = 255  # top left
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(grid, exif=exif.tobytes())

    prepared = prepare_image(encoded, max_pixels=1000)

    turned = Image.open(io.BytesIO(encoded))
    turned.load()
    np.testing.assert_array_equal(tf.io.decode_image(prepared.encoded, channels=3), np.asarray(ImageOps.exif_transpose(turned)))
    assert (prepared.encoded == encoded) is (orientation == 1)


@pytest.mark.parametrize(
    "image_format", [name for name in ("WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "JPEG2000") if name in FORMATS]
)
def test_prepare_image_makes_png_of_other_formats(encode, image_format):
    colours = np.kron(np.array([[10, 200], [90, 255]], np.uint8), np.ones((16, 16), np.uint8))
    options = {"lossless": True} if image_format == "WEBP" else {}
    encoded = encode(colours if image_format == "GIF" else np.stack([colours] * 3, axis=-1), image_format, **options)

    prepared = prepare_image(encoded, max_pixels=2000)

    assert Image.open(io.BytesIO(prepared.encoded)).format == "PNG"
    np.testing.assert_array_equal(tf.io.decode_image(prepared.encoded, channels=1)[..., 0], colours)


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (make_png(60_000, 60_000, num_rows=1), "60000 x 60000 pixels; the limit is 1,000"),
        (make_png(40, 40), "40 x 40 pixels"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "no image of a known format"),
        (b"\x89PNG\r\n\x1a\n", "no image|damaged"),
        (b"", "no image"),
    ],
)
def test_prepare_image_refuses_bombs_and_what_is_no_image(encoded, reason):
    with pytest.raises(UnusableImageError, match=reason):
        prepare_image(encoded, max_pixels=1000)
