"""Collects images of many requests into batches for the network, which computes several at once in less time each.

One thread runs TensorFlow. While it computes, images queue; what has queued is the next batch, so a busy server batches by
itself and an idle one answers at once. Called by `models.application`.
"""

import asyncio
import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from models.payloads import PreparedImage

Run = Callable[[list[bytes]], Sequence[Any]]  # encoded images -> an answer, or an exception, for each

_logger = logging.getLogger(__name__)


class QueueFullError(Exception):
    """There is no place in the queue."""


@dataclasses.dataclass(slots=True, eq=False)
class _Entry:
    """One image that waits; `run` is the model that was served when it came."""

    image: PreparedImage
    run: Run
    future: asyncio.Future
    arrived: float


class Batcher:
    """A bounded queue and the thread that empties it."""

    def __init__(
        self,
        *,
        max_batch_size: int,
        max_latency_seconds: float,
        max_queue: int,
        max_pixels: int,
        on_batch: Callable[[int], None] = lambda size: None,
    ):
        """Makes the queue; `start` starts the thread.

        Args:
          max_batch_size: images of a batch.
          max_latency_seconds: that an image waits for others; only where the batch before had more than are waiting.
          max_queue: images that wait at most.
          max_pixels: of a batch together, as all of it is decoded at once; one image may have more.
          on_batch: is told the size of each batch, in the thread.
        """
        self._max_batch_size = max_batch_size
        self._max_latency_seconds = max_latency_seconds
        self._max_queue = max_queue
        self._max_pixels = max_pixels
        self._on_batch = on_batch
        self._queue: deque[_Entry] = deque()
        self._changed = threading.Condition()
        self._expected = 1
        self._is_closed = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Starts the thread; answers go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answers what is queued, and ends the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread:
            self._thread.join()

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def is_full(self) -> bool:
        """Whether not even one image more has a place."""
        return len(self._queue) >= self._max_queue

    async def answer(self, images: Sequence[PreparedImage], run: Run) -> list[Any]:
        """Queues the images of one request and waits for their answers.

        If the caller is cancelled, those of its images that still wait leave the queue.

        Args:
          images: of the request.
          run: answers encoded images; only images with the same one share a batch.

        Returns:
          What `run` gave for each image: an answer or an exception.

        Raises:
          QueueFullError: if not all of them have a place.
        """
        loop = asyncio.get_running_loop()
        now = time.monotonic()
        entries = [_Entry(image, run, loop.create_future(), now) for image in images]
        with self._changed:
            if len(self._queue) + len(entries) > self._max_queue:
                raise QueueFullError
            self._queue.extend(entries)
            self._changed.notify()
        try:
            return [await entry.future for entry in entries]
        except asyncio.CancelledError:
            with self._changed:
                mine = set(map(id, entries))
                self._queue = deque(entry for entry in self._queue if id(entry) not in mine)
            for entry in entries:
                entry.future.cancel()
            raise

    def _work(self) -> None:
        while batch := self._take():
            try:
                self._on_batch(len(batch))
                answers = batch[0].run([entry.image.encoded for entry in batch])
                if len(answers) != len(batch):
                    raise RuntimeError(f"{len(batch)} images got {len(answers)} answers")
            except Exception as error:  # of the model or the machine; the thread must live on
                _logger.exception("a batch of %d failed", len(batch))
                answers = [error] * len(batch)
            self._loop.call_soon_threadsafe(_deliver, batch, answers)
            del batch, answers  # no image stays in memory while the thread waits

    def _take(self) -> list[_Entry]:
        """Waits for a batch; empty when the queue is closed."""
        with self._changed:
            while True:
                while not self._queue:
                    if self._is_closed:
                        return []
                    self._changed.wait()
                # Clients that wait for an answer before they send more come back together: as many as were answered last.
                deadline = self._queue[0].arrived + self._max_latency_seconds
                while 0 < len(self._queue) < self._expected and not self._is_closed:
                    remaining = deadline - time.monotonic()
                    if remaining <= 0 or not self._changed.wait(remaining):
                        break
                if self._queue:  # they may have been cancelled meanwhile
                    break
            run, num_pixels = self._queue[0].run, 0
            batch: list[_Entry] = []
            while self._queue and len(batch) < self._max_batch_size and self._queue[0].run == run:
                num_pixels += self._queue[0].image.num_pixels
                if batch and num_pixels > self._max_pixels:
                    break
                batch.append(self._queue.popleft())
            self._expected = min(self._max_batch_size, len(batch))
            return batch


def _deliver(batch: Sequence[_Entry], answers: Sequence[Any]) -> None:
    """Hands out answers, in the event loop."""
    for entry, answer in zip(batch, answers, strict=True):
        if not entry.future.done():  # cancelled
            entry.future.set_result(answer)
