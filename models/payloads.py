"""What a client sends, before anything of it reaches the network: JSON, base64, images; each mistake answered by name.

Bytes only: nothing here opens a file or a URL. Called by `models.application`, in a thread, as large bodies take milliseconds.
"""

import base64
import binascii
import dataclasses
import io
import json
from collections.abc import Callable
from typing import Any

from PIL import Image

from data.inspection import FORMATS, ImageLimits, UnusableImageError, inspect_image, read_orientation
from models.signatures import IMAGE_BYTES, SERVING_DEFAULT

# What TensorFlow decodes as it stands; the second is a JPEG with further images behind it, as phones write.
_PASSED_THROUGH = ("JPEG", "MPO", "PNG")
_EXAMPLE = f'{{"{IMAGE_BYTES}": {{"b64": "<base64 of a JPEG or PNG file>"}}}}'
_MAX_SHOWN = 60  # characters of what a client sent, in a message


class RequestError(Exception):
    """What a client did wrong, or has to wait for; the message is its answer's `error`."""

    def __init__(self, status: int, message: str, *, headers: dict[str, str] | None = None):
        """Makes an answer.

        Args:
          status: HTTP status code.
          message: one line.
          headers: of the answer.
        """
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers or {}


@dataclasses.dataclass(frozen=True, slots=True)
class PreparedImage:
    """An image that the model can be given.

    Attributes:
      encoded: JPEG or PNG bytes, upright.
      num_pixels: that it decodes to.
      facts: of the image as it was sent, where it had to be decoded to prepare it.
    """

    encoded: bytes
    num_pixels: int
    facts: dict[str, float] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Payload:
    """A request's body, understood.

    Attributes:
      images: at least one.
      by_column: whether it came as `inputs`, and is to be answered as `outputs`.
      parameters: whatever else it asks for.
    """

    images: list[PreparedImage]
    by_column: bool
    parameters: dict[str, Any]


def parse_body(
    body: bytes, *, max_instances: int, max_pixels: int, convert: Callable[[bytes], PreparedImage] | None = None
) -> Payload:
    """Reads the body of `:predict`, `:explain` or Vertex AI's route.

    Args:
      body: JSON, as TensorFlow Serving's REST API has it.
      max_instances: images that it may have.
      max_pixels: that an image may have.
      convert: prepares one image; `prepare_image` where left out.

    Raises:
      RequestError: 400 or 413; the message names what is wrong and where.
    """
    document = _load_json(body)
    if not isinstance(document, dict):
        raise RequestError(400, f"Expected a JSON object. Received: {_shown(document)}. Send {_request_example()}.")
    signature = document.get("signature_name") or SERVING_DEFAULT
    if signature != SERVING_DEFAULT:
        raise RequestError(
            400,
            f"Expected `signature_name` to be {SERVING_DEFAULT}. Received: {_shown(signature)}. Leave it out; other "
            "signatures are for the pipeline.",
        )
    parameters = document.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise RequestError(400, f"Expected `parameters` to be an object. Received: {_shown(parameters)}. Leave it out.")
    if ("instances" in document) == ("inputs" in document):
        received = "both" if "inputs" in document else "neither"
        raise RequestError(400, f"Expected `instances` or `inputs`. Received: {received}. Send {_request_example()}.")
    by_column = "inputs" in document
    field = "inputs" if by_column else "instances"
    values = document[field]
    if by_column and isinstance(values, dict) and "b64" not in values:
        if set(values) != {IMAGE_BYTES}:
            raise RequestError(
                400, f"Expected `inputs` to have `{IMAGE_BYTES}` alone. Received: {_shown(sorted(values))}. Send that one."
            )
        values = values[IMAGE_BYTES]
    if by_column and isinstance(values, dict):  # a column of one row
        values = [values]
    if not isinstance(values, list):
        raise RequestError(400, f"Expected `{field}` to be a list. Received: {_shown(values)}. Send {_request_example()}.")
    if not values:
        raise RequestError(400, f"Expected `{field}` to have one image or more. Received: an empty list. Send an image.")
    if len(values) > max_instances:
        raise RequestError(
            400, f"Expected {max_instances} images or fewer. Received: {len(values):,}. Send them in several requests."
        )
    # All of the base64 before the first image is decoded: the cheap mistakes first.
    encoded = [_decode_base64(value, f"{field}[{position}]") for position, value in enumerate(values)]
    del document, values
    prepare = convert or (lambda one: prepare_image(one, max_pixels=max_pixels))
    images = []
    for position, one in enumerate(encoded):
        try:
            images.append(prepare(one))
        except UnusableImageError as error:
            raise bad_image(position, str(error), field=field) from error
    return Payload(images, by_column, parameters or {})


def bad_image(position: int, reason: str, *, field: str = "instances") -> RequestError:
    """Gives the answer to an image that cannot be used.

    Args:
      position: of the image in its request.
      reason: a clause.
      field: of the request that has it.
    """
    return RequestError(400, f"Expected `{field}[{position}]` to be an image. Received: one that cannot be used: {reason}.")


def prepare_image(encoded: bytes, *, max_pixels: int) -> PreparedImage:
    """Looks at an image's header, and converts what the model would not read as a person sees it.

    The model reads no EXIF rotation and few formats. As in the preparation of training data, a rotated image is turned upright
    and what is neither JPEG nor PNG becomes PNG, of a moving picture the first frame. All others pass as they are; whether
    their pixels can be decoded, the model finds.

    Args:
      encoded: the bytes of the file.
      max_pixels: more are refused undecoded: decompression bombs.

    Raises:
      UnusableImageError: if it is no image, is too large, or is damaged as far as that was looked at.
    """
    try:
        header = Image.open(io.BytesIO(encoded), formats=FORMATS)
        num_pixels = header.width * header.height
        if header.format in _PASSED_THROUGH and num_pixels <= max_pixels and read_orientation(header) == 1:
            return PreparedImage(encoded, num_pixels)
    except Exception:  # hostile bytes raise anything; the inspection below says what is wrong with them
        pass
    inspected = inspect_image(encoded, ImageLimits(min_side=1, max_pixels=max_pixels))
    return PreparedImage(inspected.encoded, inspected.width * inspected.height, inspected.facts)


def _load_json(body: bytes | bytearray) -> Any:
    try:
        return json.loads(body)
    except RecursionError as error:
        raise RequestError(400, "Expected JSON of few levels. Received: too many. Send " + _request_example() + ".") from error
    except ValueError as error:  # also bytes that are no UTF-8, and integers of thousands of digits
        reason = f"at byte {error.start}: no UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise RequestError(
            400,
            f"Expected a JSON object. Received: {len(body):,} bytes, no JSON: {reason[:200]}. Send {_request_example()}.",
        ) from error


def _decode_base64(value: Any, place: str) -> bytes:
    if isinstance(value, dict) and set(value) == {IMAGE_BYTES}:
        value = value[IMAGE_BYTES]
    if not isinstance(value, dict) or set(value) != {"b64"} or not isinstance(value["b64"], str):
        raise RequestError(400, f"Expected `{place}` to be {_EXAMPLE}. Received: {_shown(value)}. Send bytes in base64.")
    try:
        # Lenient in line breaks, which tools put in, and in nothing else.
        return base64.b64decode(value["b64"].replace("\n", "").replace("\r", ""), validate=True)
    except (binascii.Error, ValueError) as error:  # the second, for characters outside ASCII
        raise RequestError(
            400,
            f"Expected `{place}` to be base64 (RFC 4648, section 4). Received: {_shown(value['b64'])}: {error}. "
            "Encode the bytes of the file with the standard alphabet.",
        ) from error


def _shown(value: Any) -> str:
    """Shows a client what it sent, shortened without making the whole of it into text."""
    if isinstance(value, dict):
        return "an object with " + (", ".join(repr(str(key)[:20]) for key in list(value)[:3]) or "nothing")
    if isinstance(value, list) and len(value) > 3:
        return f"a list of {len(value):,}"
    if isinstance(value, str):
        return repr(value[:_MAX_SHOWN]) + ("..." if len(value) > _MAX_SHOWN else "")
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def _request_example() -> str:
    return f'{{"instances": [{_EXAMPLE}]}}'
