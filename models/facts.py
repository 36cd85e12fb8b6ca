"""Writes a line for each answered image, of its predicted label and its cheap facts, to be held against the training data.

The facts are those that `data.prepare` puts into the records, by the same function. They never hold the image or its name.
`python -m pipeline.predict drift --serving FILE` compares them with a training split. Called by `models.service`.
"""

import io
import json
import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable

from data.errors import InputError
from data.features import LABEL_KEY
from data.inspection import ImageLimits, inspect_image, is_remote
from models.payloads import PreparedImage

FACTS = "facts"  # of a row, as the answers of a batch have it before it makes statistics of them
_MAX_QUEUE = 256  # rows that wait
_MAX_QUEUED_BYTES = 64 * 2**20  # of the images in them
_CLOSE_SECONDS = 5.0  # that what waits may take at the end, so that SIGTERM stays within a container's grace
_SECONDS_BETWEEN_WARNINGS = 60.0

_logger = logging.getLogger(__name__)


class FactsWriter:
    """A bounded queue and the thread that measures its images and appends the rows to a file.

    The thread decodes an image a second time, as the network's own decoding is inside its graph. A request never waits for it:
    what finds no place in the queue is dropped and counted.
    """

    def __init__(
        self, path: str, *, share: float, max_bytes: int, max_pixels: int, on_drop: Callable[[int], None] = lambda number: None
    ):
        """Opens the file; `start` starts the thread.

        Args:
          path: of the JSON lines, appended to; of this server only.
          share: of the images that are written, drawn at random, in (0, 1].
          max_bytes: of the file; before it would have more it becomes `<path>.1`, in the place of an earlier one.
          max_pixels: of an image.
          on_drop: is told how many rows were dropped, in either thread.

        Raises:
          InputError: if the file cannot be written.
        """
        self._path = path
        self._share = share
        self._max_bytes = max_bytes
        self._limits = ImageLimits(min_side=1, max_pixels=max_pixels)
        self._on_drop = on_drop
        self._queue: deque[tuple[str, PreparedImage]] = deque()
        self._queued_bytes = 0
        self._changed = threading.Condition()
        self._deadline: float | None = None  # set when the writer is to end
        self._warned = -_SECONDS_BETWEEN_WARNINGS
        self._thread: threading.Thread | None = None
        if is_remote(path):
            raise InputError(f"Expected --facts to be a file on this machine. Received: {path!r}. Give a local path.")
        try:
            self._file = self._open()
        except (OSError, ValueError) as error:  # the second, for a null character
            raise InputError(
                f"Expected --facts to be a file that can be written. Received: {path!r}: "
                f"{getattr(error, 'strerror', None) or error}. Give a file in a folder that exists and is writable."
            ) from error

    def _open(self) -> io.FileIO:
        if os.path.exists(self._path) and not os.path.isfile(self._path):  # opening a pipe would wait for ever
            raise ValueError("it is no regular file")
        file = io.FileIO(self._path, "ab")  # unbuffered: a row is one write, so whoever reads meanwhile sees whole rows
        self._num_bytes = file.seek(0, os.SEEK_END)
        return file

    def start(self) -> None:
        """Starts the thread."""
        self._thread = threading.Thread(target=self._work, name="facts", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Writes what is queued, for a few seconds at most, and ends the thread."""
        with self._changed:
            self._deadline = time.monotonic() + _CLOSE_SECONDS
            self._changed.notify()
        if self._thread:
            self._thread.join(2 * _CLOSE_SECONDS)  # a write to a share that hangs must not hold the server

    def offer(self, label: str, image: PreparedImage) -> None:
        """Queues an answered image, if it is drawn and there is a place; returns at once.

        Args:
          label: that was predicted.
          image: as the model was given it.
        """
        if random.random() >= self._share:
            return
        with self._changed:
            num_bytes = self._queued_bytes + len(image.encoded)
            has_place = len(self._queue) < _MAX_QUEUE and num_bytes <= _MAX_QUEUED_BYTES and self._deadline is None
            if has_place:
                self._queue.append((label, image))
                self._queued_bytes = num_bytes
                self._changed.notify()
        if not has_place:
            self._on_drop(1)

    def _work(self) -> None:
        while row := self._take():
            try:
                self._append(_make_line(*row, limits=self._limits))
            except Exception as error:  # a full disk, an image that only the model decodes; the thread must live on
                self._on_drop(1)
                self._warn(error)
            del row  # no image stays in memory while the thread waits
        self._file.close()

    def _take(self) -> tuple[str, PreparedImage] | None:
        """Waits for a row; None when the writer is to end."""
        with self._changed:
            while not self._queue:
                if self._deadline is not None:
                    return None
                self._changed.wait()
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._on_drop(len(self._queue))
                return None
            label, image = self._queue.popleft()
            self._queued_bytes -= len(image.encoded)
            return label, image

    def _append(self, line: bytes) -> None:
        if self._file.closed:  # a rotation failed
            self._file = self._open()
        if self._num_bytes and self._num_bytes + len(line) > self._max_bytes:
            self._file.close()
            os.replace(self._path, f"{self._path}.1")
            self._file = self._open()
        try:
            if self._file.write(line) != len(line):
                raise OSError("the disk took a part of a row")
        except OSError:
            self._file.truncate(self._num_bytes)  # half a row would make the next one unreadable
            raise
        self._num_bytes += len(line)

    def _warn(self, error: Exception) -> None:
        if time.monotonic() - self._warned >= _SECONDS_BETWEEN_WARNINGS:
            self._warned = time.monotonic()
            _logger.warning("facts of an image were not written: %s", error)


def _make_line(label: str, image: PreparedImage, *, limits: ImageLimits) -> bytes:
    """Returns the row of an image; `data.inspection` measures it unless it has done so on the way to the model."""
    facts = image.facts or inspect_image(image.encoded, limits).facts
    return (json.dumps({LABEL_KEY: label, FACTS: facts}, ensure_ascii=False) + "\n").encode("utf-8", "replace")
