"""Asks a server for the classes of images: many requests at once, repeated while the server is busy, answers in order.

It speaks TensorFlow Serving's REST API, which `models.server` speaks too; `pipeline.vertex_prediction` has the client for an
endpoint of Vertex AI. Images are made here what training makes of them (upright, PNG in place of other formats), so that a
photograph from a phone gets the answer that it would get in a batch. Called by `pipeline.predict`.
"""

import base64
import collections
import concurrent.futures
import dataclasses
import datetime
import email.utils
import io
import math
import random
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Protocol

import httpx
from PIL import Image

from data.errors import InputError
from data.inspection import ImageLimits, UnusableImageError, inspect_image, read_file
from pipeline.answers import Row, make_answer
from pipeline.inputs import InputImage, is_record_file, list_inputs, read_record_images

DEFAULT_CONCURRENCY = 16
DEFAULT_TIMEOUT_SECONDS = 60.0
_FIRST_DELAY_SECONDS = 0.25
_LONGEST_DELAY_SECONDS = 8.0
_BUSY_STATUSES = (408, 429, 502, 503, 504)
_CONFIGURATION_STATUSES = (401, 403, 404, 405)
_JPEG_QUALITY = 95
_MIN_SHRUNK_SIDE = 32  # pixels


class BusyError(RuntimeError):
    """The server may answer later.

    Attributes:
      retry_after: seconds that it asks to wait, or None.
    """

    def __init__(self, message: str, *, retry_after: float | None = None):
        super().__init__(message)
        self.retry_after = retry_after


class RefusedImageError(ValueError):
    """The server cannot use this image."""


class Client(Protocol):
    """A server: `max_image_bytes` that fit into a request, None for no limit, and how to ask it."""

    max_image_bytes: int | None

    def predict(self, encoded: bytes) -> Row:
        """Asks for one image, JPEG or PNG; returns label, probability and probabilities.

        Raises:
          BusyError: if it may answer later.
          RefusedImageError: if the image is at fault.
          InputError: if address, model or credentials are.
          RuntimeError: if the server is.
        """


@dataclasses.dataclass(frozen=True, slots=True)
class OnlineAnswer:
    """What came of one image.

    Attributes:
      row: file, label, probability, probabilities, and a note if the image was shrunk; or file and error.
      server_failed: the error is not the image's.
    """

    row: Row
    server_failed: bool = False


class ServingClient:
    """A server with TensorFlow Serving's REST API. It may be called from several threads."""

    max_image_bytes = None

    def __init__(self, url: str, *, name: str, timeout_seconds: float, concurrency: int = DEFAULT_CONCURRENCY):
        """Connects nothing yet.

        Args:
          url: http://host:port, or all of it up to /v1/models/NAME.
          name: of the model, where `url` has none.
          timeout_seconds: for one request.
          concurrency: connections.

        Raises:
          InputError: if `url` is no address.
        """
        url = url.rstrip("/").removesuffix(":predict")
        self._url = url if "/models/" in url else f"{url}/v1/models/{name}"
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        try:
            scheme = httpx.URL(self._url).scheme
        except httpx.InvalidURL as error:
            raise InputError(f"Expected --server to be http://host:port. Received: {url!r}: {error}.") from error
        if scheme not in ("http", "https"):
            raise InputError(f"Expected --server to be http://host:port. Received: {url!r}. Begin it with http://.")
        self._http = httpx.Client(timeout=timeout_seconds, limits=limits)

    def check(self) -> None:
        """Asks for the model's state, before images are read.

        Raises:
          InputError: if the server has no such model.
          RuntimeError: if there is no server.
        """
        try:
            response = self._http.get(self._url)
        except httpx.TransportError as error:
            raise RuntimeError(
                f"Expected a server at {self._url}. Received: {_describe(error)}. "
                "Start one by python -m models.server, or mend --server."
            ) from error
        if response.status_code in _CONFIGURATION_STATUSES:
            raise self._wrong_configuration(response)

    def predict(self, encoded: bytes) -> Row:
        """Asks for one image; see `Client`."""
        body = {"instances": [{"image_bytes": {"b64": base64.b64encode(encoded).decode()}}]}
        try:
            response = self._http.post(f"{self._url}:predict", json=body)
        except httpx.TransportError as error:  # refused, reset, timed out; a prediction changes nothing, so it may repeat
            raise BusyError(_describe(error)) from error
        status = response.status_code
        if status in _BUSY_STATUSES:
            retry_after = parse_retry_after(response.headers.get("Retry-After"))
            raise BusyError(f"{status}: {_message(response)}", retry_after=retry_after)
        if status in _CONFIGURATION_STATUSES:
            raise self._wrong_configuration(response)
        if 400 <= status < 500:
            raise RefusedImageError(_message(response))
        if status != 200:
            raise RuntimeError(f"the server failed with {status}: {_message(response)}")
        try:
            return read_prediction(response.json()["predictions"][0])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise RuntimeError(f"the server's answer is no prediction: {response.text[:100]!r}") from error

    def _wrong_configuration(self, response: httpx.Response) -> InputError:
        return InputError(
            f"Expected {self._url} to be a model that may be asked. Received: {response.status_code}: {_message(response)}. "
            "Mend --server or --name."
        )


def read_prediction(prediction: Row) -> Row:
    """Reads one entry of `predictions`, whatever the server's number of digits.

    Args:
      prediction: label, probability, labels and probabilities.

    Raises:
      KeyError, TypeError, ValueError: if it is none.
    """
    names = ("label", "probability", "labels", "probabilities")
    return make_answer(*(prediction[name] for name in names))


def list_images(locations: Iterable[str]) -> Iterator[InputImage]:
    """Lists the images of files, folders, CSVs, TFRecords or patterns.

    Raises:
      InputError: if one of them does not exist or holds nothing.
    """
    for location in locations:
        for path in list_inputs(location):
            if is_record_file(path):
                yield from read_record_images(path)
            else:
                yield InputImage(path)


def predict_online(
    images: Iterable[InputImage],
    client: Client,
    *,
    concurrency: int = DEFAULT_CONCURRENCY,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    limits: ImageLimits | None = None,
) -> Iterator[OnlineAnswer]:
    """Asks for images, several at once, and yields the answers in the order of the images; no more than a few are in memory.

    Args:
      images: to ask for.
      client: of the server.
      concurrency: requests at once.
      timeout_seconds: how long a busy server is asked again; once it has answered nobody for so long, images are tried once.
      limits: of the images.

    Raises:
      InputError: if address, model or credentials are wrong.
    """
    asker = _Asker(client, timeout_seconds, limits or ImageLimits())
    waiting: collections.deque[concurrent.futures.Future[OnlineAnswer]] = collections.deque()
    threads = concurrent.futures.ThreadPoolExecutor(concurrency)
    try:
        for image in images:
            waiting.append(threads.submit(asker.ask, image))
            if len(waiting) >= 2 * concurrency:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        asker.stop()
        threads.shutdown(cancel_futures=True)


class _Asker:
    """Asks for one image after the other, in several threads, and remembers when the server last answered."""

    def __init__(self, client: Client, timeout_seconds: float, limits: ImageLimits):
        self._client = client
        self._timeout_seconds = timeout_seconds
        self._limits = limits
        self._answered = time.monotonic()
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Lets nobody wait any longer."""
        self._stopped.set()

    def ask(self, image: InputImage) -> OnlineAnswer:
        try:
            if image.problem:
                raise UnusableImageError(image.problem)
            encoded = read_file(image.file) if image.encoded is None else image.encoded
            inspected = inspect_image(encoded, self._limits)
            encoded, note = fit_image(inspected.encoded, self._client.max_image_bytes)
            row = {"file": image.file, **self._repeat(encoded)}
            return OnlineAnswer(row | {"note": note} if note else row)
        except InputError:
            raise
        except (UnusableImageError, RefusedImageError) as error:
            return OnlineAnswer({"file": image.file, "error": str(error)})
        except RuntimeError as error:
            return OnlineAnswer({"file": image.file, "error": str(error)}, server_failed=True)

    def _repeat(self, encoded: bytes) -> Row:
        """Asks until there is an answer, or there has been none for anybody for too long."""
        for attempt in range(1_000_000):
            try:
                answer = self._client.predict(encoded)
            except BusyError as error:
                ceiling = min(_FIRST_DELAY_SECONDS * 2 ** min(attempt, 10), _LONGEST_DELAY_SECONDS)
                # Where all come back after the same time, all are refused again.
                delay = (error.retry_after or 0) + random.uniform(0.5, 1) * ceiling
                if time.monotonic() + delay - self._answered > self._timeout_seconds or self._stopped.wait(delay):
                    raise RuntimeError(f"the server gave no answer, asked {attempt + 1} times: {error}") from error
                continue
            self._answered = time.monotonic()
            return answer
        raise RuntimeError("the server was busy for ever")


def fit_image(encoded: bytes, max_bytes: int | None) -> tuple[bytes, str]:
    """Shrinks an image until it fits into a request.

    Args:
      encoded: JPEG or PNG, upright.
      max_bytes: that fit; None for no limit.

    Returns:
      The bytes, as they came if they fit, otherwise a smaller JPEG; and what was done, empty if nothing.
    """
    if max_bytes is None or len(encoded) <= max_bytes:
        return encoded, ""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    original = image.size
    scale = 1.0
    while True:
        width, height = (max(1, round(side * scale)) for side in original)
        buffer = io.BytesIO()
        shrunk = image if scale == 1 else image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
        shrunk.save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
        if buffer.tell() <= max_bytes:
            how = "encoded as JPEG" if scale == 1 else f"shrunk from {original[0]} x {original[1]} to {width} x {height} pixels"
            return buffer.getvalue(), f"{how} to fit into a request of {max_bytes:,} bytes"
        if max(width, height) <= _MIN_SHRUNK_SIDE:
            raise UnusableImageError(f"it does not fit into a request of {max_bytes:,} bytes, however small")
        # Bytes go about with the area; a little less, so that one more step is seldom needed.
        scale *= min(0.9, 0.95 * math.sqrt(max_bytes / buffer.tell()))


def parse_retry_after(value: str | None) -> float | None:
    """Reads the header Retry-After, seconds or a date; None if there is none that can be read."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return max(0.0, (moment - datetime.datetime.now(datetime.UTC)).total_seconds())


def _message(response: httpx.Response) -> str:
    """Returns the server's own message, in one line."""
    try:
        message = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        message = response.text or response.reason_phrase
    return " ".join(str(message).split())[:300]


def _describe(error: httpx.TransportError) -> str:
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    return str(error) or type(error).__name__
