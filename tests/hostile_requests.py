"""Requests as a server on the open network gets them, a third of them hostile; for the test and the benchmark.

By raw sockets, as a client library sends nothing that is wrong.
"""

import base64
import collections
import contextlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from server_process import instance, instances

from pipeline.serving_process import make_png

PATH = "/v1/models/model:predict"
TIMEOUT_SECONDS = 60
DROPPED = 0  # in the place of a status: the hostile client did not wait for one, or was cut off


def send(port: int, raw: bytes) -> tuple[int, bytes]:
    """Sends bytes and reads one answer; status 0 if there is none."""
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_SECONDS) as connection:
        with contextlib.suppress(OSError):  # refused before it was read to its end; the answer may still be there
            connection.sendall(raw)
        return read_answer(connection)


def read_answer(connection: socket.socket) -> tuple[int, bytes]:
    received = b""
    try:
        while b"\r\n\r\n" not in received:
            if not (part := connection.recv(65536)):
                return DROPPED, b""
            received += part
        head, _, body = received.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        length = int(fields.get(b"content-length", b"0"))
        while len(body) < length and (part := connection.recv(65536)):
            body += part
    except ConnectionResetError:
        return DROPPED, b""
    return int(head.split(b" ", 2)[1]), body


def post(body: bytes, *, path: str = PATH, headers: Sequence[str] = ()) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: x", "connection: close", f"content-length: {len(body)}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


def _drop(port: int, raw: bytes, *, reset: bool) -> tuple[int, bytes]:
    """Leaves in the middle."""
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_SECONDS) as connection:
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(raw)
    return DROPPED, b""


def _stall(port: int, raw: bytes) -> tuple[int, bytes]:
    """Sends a part and waits until the server has had enough."""
    return send(port, raw)


def make_hostile(image: bytes, *, max_body_bytes: int) -> dict[str, tuple[Callable[[int], tuple[int, bytes]], tuple[int, ...]]]:
    """Gives, by name, what sends a hostile request to a port, and the statuses that may answer it.

    Args:
      image: a good one, of a few kilobytes.
      max_body_bytes: that the server takes.
    """
    good = json.dumps(instances(image)).encode()
    noise = np.random.default_rng(0).bytes(2000)
    text = base64.b64encode(image).decode()

    def sends(raw: bytes, *statuses: int) -> tuple[Callable[[int], tuple[int, bytes]], tuple[int, ...]]:
        return (lambda port: send(port, raw)), statuses

    def document(value: Any) -> bytes:
        return post(json.dumps(value).encode())

    huge = b'{"instances": ["' + b"x" * max_body_bytes + b'"]}'
    chunked = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    chunked += (b"10000\r\n" + b"y" * 0x10000 + b"\r\n") * (max_body_bytes // 0x10000 + 2) + b"0\r\n\r\n"
    return {
        "no JSON": sends(post(b"{'instances': [1]}"), 400),
        "cut JSON": sends(post(good[: len(good) // 2]), 400),
        "binary": sends(post(noise), 400),
        "empty": sends(post(b""), 400),
        "deep": sends(post(b"[" * 50_000), 400),
        "long number": sends(post(b'{"instances": ' + b"9" * 10_000 + b"}"), 400),
        "wrong base64": sends(document({"instances": [{"b64": "%%%%" + text}]}), 400),
        "url-safe base64": sends(document({"instances": [{"b64": "-_-_" + text}]}), 400),
        "cut base64": sends(document({"instances": [{"b64": text[:-3]}]}), 400),
        "truncated": sends(document(instances(image[: len(image) // 2])), 400),
        "truncated among good": sends(document(instances(image, image[: len(image) // 2])), 400),
        "not an image": sends(document(instances(noise)), 400),
        "empty image": sends(document(instances(b"")), 400),
        "bomb of pixels": sends(document(instances(make_png(20_000, 20_000))), 400),
        "bomb of a header": sends(document(instances(make_png(2**31 - 1, 2**31 - 1, num_rows=1))), 400),
        "numbers": sends(document({"instances": [1, 2, 3]}), 400),
        "text": sends(document({"instances": ["a", None, True]}), 400),
        "list of lists": sends(document({"instances": [[instance(image)]]}), 400),
        "a file": sends(document({"instances": [{"image_bytes": "/etc/passwd"}]}), 400),
        "a URL": sends(document({"instances": [{"image_bytes": {"url": "http://169.254.169.254/"}}]}), 400),
        "no instances": sends(document({"instances": []}), 400),
        "many instances": sends(document({"instances": [{"b64": "AAAA"}] * 5000}), 400),
        "signature": sends(document(instances(image, signature_name="../../x")), 400),
        "huge": sends(post(huge), 413, DROPPED),
        "huge by length": sends(post(b"", headers=("content-length: 99999999999999999999",)), 400, 413, DROPPED),
        "huge in chunks": sends(chunked, 413, DROPPED),
        "compressed": sends(post(good, headers=("content-encoding: gzip",)), 415),
        "multipart": sends(post(good, headers=("content-type: multipart/form-data; boundary=x",)), 415),
        "other model": sends(post(good, path="/v1/models/other:predict"), 404),
        "other version": sends(post(good, path="/v1/models/model/versions/999:predict"), 404),
        "path": sends(post(good, path="/../../etc/passwd%00"), 404),
        "method": sends(f"DELETE {PATH} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode(), 405),
        "no HTTP": sends(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + noise, 400, DROPPED),
        "endless head": sends(b"GET / HTTP/1.1\r\nx: " + b"h" * 200_000, 431, DROPPED),
        "slow head": (lambda port: _stall(port, b"POST /v1/models/model:predict HTTP/1.1\r\nhost:"), (DROPPED,)),
        "slow body": (lambda port: _stall(port, post(good)[:-20]), (408, DROPPED)),
        "silent": (lambda port: _stall(port, b""), (DROPPED,)),
        "leaves in the body": (lambda port: _drop(port, post(good)[:-20], reset=False), (DROPPED,)),
        "leaves before the answer": (lambda port: _drop(port, post(good), reset=False), (DROPPED,)),
        "resets before the answer": (lambda port: _drop(port, post(good), reset=True), (DROPPED,)),
    }


def attack(
    port: int,
    images: Sequence[bytes],
    expected: Sequence[Sequence[float]],
    *,
    num_requests: int,
    max_body_bytes: int,
    num_threads: int = 12,
    rare: Sequence[str] = ("slow head", "slow body", "silent"),
    seed: int = 0,
) -> tuple[collections.Counter, list[str]]:
    """Sends requests from several threads, two good ones for each hostile one, and checks every answer.

    Args:
      port: of the server.
      images: good ones.
      expected: probabilities of each.
      num_requests: in all.
      max_body_bytes: that the server takes.
      num_threads: that send.
      rare: hostile requests that take seconds; each is sent a tenth as often as the others.
      seed: of the order.

    Returns:
      How many requests of which name got which status, and what went wrong, a line each.
    """
    hostile = make_hostile(images[0], max_body_bytes=max_body_bytes)
    names = [name for name in hostile for _ in range(1 if name in rare else 10)]
    random = np.random.default_rng(seed)
    order = [names[random.integers(len(names))] if number % 3 == 0 else "" for number in range(num_requests)]
    random.shuffle(order)
    good = [post(json.dumps(instances(image)).encode()) for image in images]
    waiting = collections.deque(enumerate(order))
    counts: collections.Counter = collections.Counter()
    wrong: list[str] = []
    lock = threading.Lock()

    def work() -> None:
        while True:
            try:
                number, name = waiting.popleft()
            except IndexError:
                return
            problem = None
            try:
                if name:
                    ask, allowed = hostile[name]
                    status, body = ask(port)
                    if status not in allowed:
                        problem = f"{name}: {status} {body[:200]!r}"
                    elif status != DROPPED and not isinstance(json.loads(body).get("error"), str):
                        problem = f"{name}: no message in {body[:200]!r}"
                else:
                    position = number % len(images)
                    status, body = send(port, good[position])
                    found = json.loads(body)["predictions"][0]["probabilities"] if status == 200 else None
                    if found is None or np.abs(np.subtract(found, expected[position])).max() > 1e-5:
                        problem = f"good image {position}: {status} {body[:200]!r}"
            except Exception as error:
                status, problem = -1, f"{name or 'good'}: {type(error).__name__}: {error}"
            with lock:
                counts[name or "good", status] += 1
                if problem:
                    wrong.append(problem)

    threads = [threading.Thread(target=work) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts, wrong
