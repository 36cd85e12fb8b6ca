"""The HTTP connections of the server: none may be held by a client that is slow, silent or endless.

uvicorn bounds neither a request's head nor the time for it, and nobody's waiting for an answer that is not read. Called by
`models.server`.
"""

import asyncio
import functools
import json
import time
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from models.server_config import ServerConfig

_MAX_HEAD_BYTES = 32 * 1024
_CHECK_SECONDS = 0.5


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits; `cut_overdue_connections` enforces those of time."""

    def __init__(self, *args: Any, limits: ServerConfig, **options: Any):
        """Makes the protocol of one connection.

        Args:
          *args: of uvicorn.
          limits: of the server.
          **options: of uvicorn.
        """
        super().__init__(*args, **options)
        self._limits = limits
        self._since = time.monotonic()  # when what the connection waits for began
        self._is_exchange = False  # from the end of a request's head to the end of its answer
        self._head_bytes = 0
        self._num_answers = 0
        self._is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuses a connection beyond the limit."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            self._refuse(429, "Expected fewer open connections. Received: one too many. Wait and try again.")

    def data_received(self, data: bytes) -> None:
        """Counts the bytes of heads, and nothing more of a connection that was refused."""
        if self._is_refused or self.parser is None:
            return
        if not self._is_exchange:
            if not self._head_bytes:
                self._since = time.monotonic()
            self._head_bytes += len(data)
        super().data_received(data)
        if self._is_exchange:
            self._head_bytes = 0
        elif self._head_bytes > _MAX_HEAD_BYTES and (self.cycle is None or not self.cycle.more_body):
            self._refuse(431, f"Expected a request's head of {_MAX_HEAD_BYTES:,} bytes or fewer. Received: more. Send fewer.")

    def on_headers_complete(self) -> None:
        """Starts the time of the exchange."""
        self._since, self._is_exchange = time.monotonic(), True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Ends a body that nobody read, as it was refused: what follows is a new head."""
        super().on_message_complete()
        if not self._is_exchange:
            self._since, self._head_bytes = time.monotonic(), 0

    def on_response_complete(self) -> None:
        """Starts the time of the next request's head."""
        self._since, self._is_exchange, self._head_bytes = time.monotonic(), bool(self.pipeline), 0
        self._num_answers += 1
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP, in JSON like everything else."""
        self._refuse(400, "Expected an HTTP/1.1 request. Received: something else. Send a well-formed one.")

    def is_overdue(self, now: float) -> bool:
        """Tells whether the client, or its answer, took longer than it may."""
        if self._is_exchange:
            limit = self._limits.exchange_seconds
        elif self._head_bytes or not self._num_answers:
            limit = self._limits.head_seconds
        else:
            limit = self._limits.keep_alive_seconds
        return now - self._since > limit

    def _refuse(self, status: int, message: str) -> None:
        self._is_refused = True
        body = json.dumps({"error": message}).encode()
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n" % len(body)
        head += b"retry-after: 1\r\n" if status == 429 else b""
        if not self.transport.is_closing():
            self.transport.write(STATUS_LINE[status] + head + b"\r\n" + body)
            self.transport.close()


def limited_protocol(limits: ServerConfig) -> Any:
    """Returns the protocol's class with its limits, as uvicorn's `http` setting takes it."""
    return functools.partial(LimitedProtocol, limits=limits)


async def cut_overdue_connections(connections: set[Any]) -> None:
    """Looks at all connections again and again, and cuts those that took too long; runs until it is cancelled.

    Args:
      connections: uvicorn's own set.
    """
    while True:
        await asyncio.sleep(_CHECK_SECONDS)
        now = time.monotonic()
        for connection in [one for one in connections if one.is_overdue(now)]:
            connection.transport.abort()  # a polite end would wait until the client has read what is buffered
