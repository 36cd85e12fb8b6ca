"""What the server tells its operators: metrics for Prometheus, and a JSON line for each request on standard error.

Neither ever holds an image. Called by `models.application` and `models.server`.
"""

import datetime
import json
import logging
import math
import re
import sys
import time
import uuid
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, math.inf)
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, math.inf)
_REQUEST_ID = re.compile(rb"[\w.-]{1,64}")
_MAX_LOGGED_PATH = 200  # characters
_UNMATCHED = "unmatched"
_METHODS = ("GET", "POST", "HEAD", "OPTIONS")  # told apart; a client could name thousands
_FIELDS = "fields"  # of a log record, that go into its line


class Metrics:
    """The server's metrics, in a registry of their own."""

    def __init__(self, *, queue_length: Callable[[], int], buffered_bytes: Callable[[], int], version: Callable[[], int]):
        """Makes the metrics.

        Args:
          queue_length: gives the images that wait.
          buffered_bytes: gives the bytes of bodies in memory.
          version: gives the version that is served; 0 for none.
        """
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        prefix = {"namespace": "tfx_vision", "registry": self.registry}
        self.requests = Counter("requests", "Requests answered.", ("route", "method", "code"), **prefix)
        self.seconds = Histogram("request_seconds", "Time of a request.", ("route",), buckets=_SECONDS, **prefix)
        self.batch_size = Histogram("batch_size", "Images of a batch.", buckets=_BATCH_SIZES, **prefix)
        self.predictions = Counter("predictions", "Images by the class that was predicted.", ("label",), **prefix)
        self.disconnects = Counter("disconnects", "Clients that left before their answer.", **prefix)
        self.facts_dropped = Counter("facts_dropped", "Facts of answered images that were not written.", **prefix)
        Gauge("queue_length", "Images that wait for the network.", **prefix).set_function(queue_length)
        Gauge("buffered_bytes", "Bytes of request bodies in memory.", **prefix).set_function(buffered_bytes)
        Gauge("model_version", "Version that is served; 0 while there is none.", **prefix).set_function(version)


_logger = logging.getLogger(__name__)


class JsonFormatter(logging.Formatter):
    """One JSON object a line, with the names that Google Cloud Logging reads."""

    def format(self, record: logging.LogRecord) -> str:
        """Formats a record with its `fields`."""
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line = {"time": moment, "severity": record.levelname, "message": record.getMessage()}
        line |= getattr(record, _FIELDS, {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


def log_as_json() -> None:
    """Sends all log records from INFO on to standard error, as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.captureWarnings(True)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    for name in ("tensorflow", "absl"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
        logger.setLevel(logging.WARNING)
    # Its lines say less than ours, and a client's malformed request is no warning of ours.
    for name in ("uvicorn", "uvicorn.access", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.ERROR)


def log_event(logger: logging.Logger, message: str, **fields: Any) -> None:
    """Logs a line with fields."""
    logger.info(message, extra={_FIELDS: fields})


class ObservedApplication:
    """Counts and logs every request around the application, and answers what it raises."""

    def __init__(self, app: Any, metrics: Metrics):
        """Wraps an ASGI application."""
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        """Answers one request, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex.encode()
        state = scope.setdefault("state", {})
        code = 0

        async def send_with_id(message: dict[str, Any]) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:  # starlette has answered 500 already, and passes it on to be logged
            _logger.exception("request %s failed", request_id.decode())
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", _UNMATCHED)
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.requests.labels(route, method, code).inc()
            self._metrics.seconds.labels(route).observe(seconds)
            log_event(
                _logger,
                "request",
                id=request_id.decode(),
                method=scope["method"],
                path=scope["path"][:_MAX_LOGGED_PATH],
                code=code,
                milliseconds=round(1000 * seconds, 1),
                images=state.get("num_images", 0),
                version=state.get("version"),
                error=state.get("error"),
            )
