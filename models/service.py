"""What the routes of the server share: the model, the queue, the threads, the limits.

A body is read with limits and understood in a thread; its images wait in the batcher's queue. Called by `models.application`.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import tensorflow as tf
from fastapi import Request

from data.inspection import UnusableImageError
from models.batching import Batcher, QueueFullError
from models.explanation_response import explain_images, read_parameters
from models.facts import FactsWriter
from models.payloads import Payload, RequestError, bad_image, parse_body
from models.server_config import ServerConfig
from models.telemetry import Metrics
from models.versions import Answer, ModelVersions, ServedModel

_T = TypeVar("_T")

_NUM_PARSERS = 2  # threads that read bodies; Python runs one at a time, but decoding of images is outside of it
_MAX_DISCARDED = 4  # times the limit of a body: what is read of one that is refused
_RETRY = {"Retry-After": "1"}  # seconds
_REFUSED_CONTENT_TYPES = ("multipart/", "image/", "video/", "audio/", "application/octet-stream", "application/x-protobuf")

_logger = logging.getLogger(__name__)


class Service:
    """What the routes share: the model, the queue, the threads and the counts."""

    def __init__(self, config: ServerConfig, *, on_failure: Callable[[Exception], None]):
        """Makes the parts; `run` starts them.

        Args:
          config: of the server.
          on_failure: is given the error if there is no model to begin with.

        Raises:
          InputError: if the file of facts cannot be written.
        """
        self.config = config
        self._on_failure = on_failure
        self.versions = ModelVersions(config.model, max_batch_size=config.max_batch_size)
        self.metrics = Metrics(
            queue_length=lambda: len(self.batcher),
            buffered_bytes=lambda: self._buffered_bytes,
            version=lambda: self.versions.current.version if self.versions.current else 0,
        )
        self.batcher = Batcher(
            max_batch_size=config.max_batch_size,
            max_latency_seconds=config.max_latency_ms / 1000,
            max_queue=config.max_queue,
            max_pixels=config.max_pixels,
            on_batch=self.metrics.batch_size.observe,
        )
        self._parsers = ThreadPoolExecutor(_NUM_PARSERS, thread_name_prefix="parser")
        self._explainers = ThreadPoolExecutor(1, thread_name_prefix="explainer")
        self._num_explanations = 0
        self._buffered_bytes = 0
        self._facts = None
        if config.facts:
            self._facts = FactsWriter(
                config.facts,
                share=config.facts_share,
                max_bytes=config.facts_max_bytes,
                max_pixels=config.max_pixels,
                on_drop=self.metrics.facts_dropped.inc,
            )

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Loads the model in the background and looks for new versions, while the server runs."""
        self.batcher.start()
        if self._facts:
            self._facts.start()
        watcher = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watcher.cancel()
            await asyncio.to_thread(self.batcher.close)
            if self._facts:
                await asyncio.to_thread(self._facts.close)

    async def _watch(self) -> None:
        while True:
            try:
                if await asyncio.to_thread(self.versions.poll):
                    self._explainers.submit(self._prepare_explainer, self.versions.current)
            except Exception as error:
                if self.versions.current is None:
                    self._on_failure(error)
                    return
                _logger.exception("looking for a new version failed")
            await asyncio.sleep(self.config.poll_seconds)

    def _prepare_explainer(self, model: ServedModel) -> None:
        """Loads what explains before someone waits for it, or the version's folder is removed."""
        try:
            model.explainer()
        except Exception as error:  # it can answer nevertheless
            _logger.warning("version %d cannot be explained: %s", model.version, error)

    def model(self, version: str | None) -> ServedModel:
        """Returns the model that is served.

        Raises:
          RequestError: 404, if it is another version; 503, if it is not ready yet.
        """
        current = self.versions.current
        if current is None:
            raise RequestError(503, "Expected a model to be ready. Received: one that is loading. Try again.", headers=_RETRY)
        if version is not None and int(version) != current.version:
            raise RequestError(
                404, f"Expected version {current.version}, which is served. Received: {version}. Leave the version out."
            )
        return current

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[Payload]:
        """Reads and understands the body of a request; until the context ends, its bytes count as in memory.

        Raises:
          RequestError: whatever is wrong with it.
        """
        body = await self._read_body(request)
        num_bytes = len(body)
        try:
            payload = await asyncio.get_running_loop().run_in_executor(self._parsers, self._parse, body)
            del body
            yield payload
        finally:
            self._buffered_bytes -= num_bytes

    async def _read_body(self, request: Request) -> bytearray:
        """Reads a body, whose bytes count as in memory unless it is refused."""
        config = self.config
        refusal = self._refuse_head(request)
        if refusal and "expect" in request.headers:  # the client sends the body only if it is asked to
            raise refusal
        body, num_bytes, is_complete = bytearray(), 0, False
        try:
            async with asyncio.timeout(config.body_seconds):
                async for chunk in request.stream():
                    num_bytes += len(chunk)
                    if refusal is None:
                        body += chunk
                        self._buffered_bytes += len(chunk)
                        refusal = self._refuse_size(len(body))
                    elif num_bytes > _MAX_DISCARDED * config.max_body_bytes:
                        raise refusal
                    elif body:
                        self._buffered_bytes -= len(body)
                        body.clear()
            if refusal:
                raise refusal
            is_complete = True
            return body
        except TimeoutError as error:
            raise refusal or RequestError(
                408,
                f"Expected the body within {config.body_seconds:g} seconds. Received: {num_bytes:,} bytes. Send it faster.",
                headers={"Connection": "close"},
            ) from error
        finally:
            if not is_complete:
                self._buffered_bytes -= len(body)

    def _refuse_head(self, request: Request) -> RequestError | None:
        """Gives the answer to a request whose body need not be understood.

        It is read to its end nevertheless, if that is near: a client that is still sending would not see the answer.
        """
        content_type = request.headers.get("content-type", "").strip().lower()
        if content_type.startswith(_REFUSED_CONTENT_TYPES):
            return RequestError(415, f"Expected JSON. Received: {content_type[:60]!r}. Send the images in base64, in JSON.")
        if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            return RequestError(415, "Expected a body as it is. Received: a compressed one. Leave Content-Encoding out.")
        length = request.headers.get("content-length", "")
        if length.isdecimal():
            return self._refuse_size(int(length[:18]))
        return self._too_many() if self.batcher.is_full else None

    def _refuse_size(self, num_bytes: int) -> RequestError | None:
        limit = self.config.max_body_bytes
        if num_bytes > limit:
            return RequestError(
                413, f"Expected a body of {limit:,} bytes or fewer. Received: more. Shrink the images, or send fewer."
            )
        return self._too_many() if self.batcher.is_full or self._buffered_bytes > self.config.max_buffered_bytes else None

    def _parse(self, body: bytearray) -> Payload:
        return parse_body(body, max_instances=self.config.max_instances, max_pixels=self.config.max_pixels)

    async def predict(self, payload: Payload, model: ServedModel, request: Request) -> list[Answer]:
        """Answers the images of a request.

        Raises:
          RequestError: 400 for an image that cannot be decoded, 429, 504.
        """
        try:
            answers = await self._wait(self.batcher.answer(payload.images, model.answer), request)
        except QueueFullError as error:
            raise self._too_many() from error
        for position, answer in enumerate(answers):
            if isinstance(answer, UnusableImageError):
                raise bad_image(position, str(answer), field="inputs" if payload.by_column else "instances")
            if isinstance(answer, tf.errors.ResourceExhaustedError | MemoryError):
                raise RequestError(503, "Expected enough memory. Received: too little. Try again, with less.", headers=_RETRY)
            if isinstance(answer, Exception):
                raise answer
        for answer, image in zip(answers, payload.images, strict=True):
            self.metrics.predictions.labels(answer.label).inc()
            if self._facts:
                self._facts.offer(answer.label, image)
        request.state.num_images, request.state.version = len(answers), model.version
        return answers

    async def explain(self, payload: Payload, model: ServedModel, request: Request) -> list[dict[str, Any]]:
        """Explains the images of a request, in their order, after the requests that came before.

        Raises:
          RequestError: 400, 429, 504.
        """
        parameters = read_parameters(payload.parameters, model.labels, max_gradients=self.config.max_gradients)
        images = [image.encoded for image in payload.images]
        limit = self.config.max_explanations
        if len(images) > limit:
            raise RequestError(400, f"Expected {limit} images or fewer to explain. Received: {len(images)}. Send fewer.")
        if self._num_explanations + len(images) > limit:
            raise self._too_many()
        abandoned = threading.Event()

        def work() -> list[dict[str, Any]]:
            return explain_images(model, images, parameters, is_abandoned=abandoned.is_set)

        self._num_explanations += len(images)
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._explainers, work)
        # It counts until the thread has let go of it, not only until the client has.
        future.add_done_callback(lambda done: self._end_explanation(done, len(images)))
        try:
            return await self._wait(asyncio.shield(future), request)
        finally:
            abandoned.set()

    def _end_explanation(self, future: asyncio.Future, num_images: int) -> None:
        self._num_explanations -= num_images
        if not future.cancelled():
            future.exception()  # is logged as never retrieved otherwise, when its client has left

    async def _wait(self, work: Awaitable[_T], request: Request) -> _T:
        """Waits for work as long as its client does, and no longer than it may take."""
        task = asyncio.ensure_future(work)
        gone = asyncio.create_task(_until_disconnected(request))
        try:
            await asyncio.wait((task, gone), timeout=self.config.request_seconds, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                self.metrics.disconnects.inc()
                raise ClientGoneError
            raise RequestError(
                504,
                f"Expected an answer within {self.config.request_seconds:g} seconds. Received: none. Send less, or later.",
            )
        finally:
            gone.cancel()
            if not task.done():
                task.cancel()

    @staticmethod
    def _too_many() -> RequestError:
        return RequestError(429, "Expected fewer requests. Received: more than fit the queue. Try again later.", headers=_RETRY)


class ClientGoneError(Exception):
    """The client has closed its connection."""


async def _until_disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
