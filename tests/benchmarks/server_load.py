"""Measures the server under load against a bare loop over the same SavedModel, paired in one run; then overload and an attack.

    python tests/benchmarks/server_load.py --model runs/solar/serving_model       # about ten minutes on two idle cores

The loop is one process that does nothing but call `serving_default` on batches of the size that is fastest here. The server
gets the same images, one a request, from a process of its own that holds 1, 8 and 64 connections. Loop and server take turns,
and the ratio of each turn counts, so that other work on the machine hits both. Clients share the machine's cores with the
server, which the loop has for itself: beside images a second stands what processor time an image costs in the server, in the
clients and in the loop, in which other work shows little. Then 256 clients ask a server with a queue of 64 images, and a third
of 10,000 requests is hostile; memory must not grow.
"""

import argparse
import asyncio
import base64
import collections
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
_ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(_ROOT), str(_ROOT / "tests")]

_BATCH_SIZES = (1, 4, 8, 16, 32, 64)
_NUM_IMAGES = 64
_OVERLOAD_CLIENTS, _OVERLOAD_QUEUE = 256, 64
_MAX_BODY_BYTES = 2**20


def main() -> None:
    """Runs the benchmark and prints its tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder of versions, or one SavedModel")
    parser.add_argument("--seconds", type=float, default=8, help="of a measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--requests", type=int, default=10_000, help="of the attack; 0 leaves it out")
    parser.add_argument("--flags", nargs="*", default=[], help="of the server, without their two dashes")
    parser.add_argument("--worker", choices=("loop", "client"), help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker == "loop":
        _loop(*arguments.rest)
    elif arguments.worker == "client":
        asyncio.run(_client(*arguments.rest))
    elif not arguments.model:
        parser.error("--model is missing")
    else:
        with tempfile.TemporaryDirectory() as folder:
            _compare(Path(folder), arguments)


def _compare(folder: Path, arguments: argparse.Namespace) -> None:
    from server_process import ServerProcess

    from data.sources import open_source
    from models.versions import ModelVersions

    references = open_source("elpv").references
    paths = [reference.path for reference in references[:: len(references) // _NUM_IMAGES][:_NUM_IMAGES]]
    (folder / "images.json").write_text(json.dumps(paths))
    found = ModelVersions(arguments.model, max_batch_size=1).find()
    model = found[max(found)]
    flags = [f"--{flag}" for flag in arguments.flags]
    loop = subprocess.Popen(
        [sys.executable, __file__, "--worker", "loop", model, str(folder / "images.json")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    batch_size, rates = json.loads(loop.stdout.readline())
    print(f"bare loop, images a second by batch size: {rates}; batches of {batch_size} from here on", flush=True)
    server = ServerProcess(folder / "log", f"--model={model}", *flags)
    titles = f"{'clients':>8}{'server/s':>10}{'loop/s':>8}{'ratio':>7}{'p50 ms':>8}{'p99 ms':>8}{'batch':>7}"
    print(f"{titles}  milliseconds of processor an image", flush=True)
    for num_clients in arguments.clients:
        turns = []
        for _ in range(arguments.rounds):
            bare = _ask_loop(loop, arguments.seconds)
            turns.append((_ask_clients(server, num_clients, arguments.seconds, folder), bare))
        _print_turns(num_clients, turns)
    server.stop()
    loop.stdin.close()
    loop.wait()
    _overload(folder, model, arguments.seconds)
    if arguments.requests:
        _attack(folder, model, paths, arguments.requests)


def _print_turns(num_clients: int, turns: list[tuple[dict[str, Any], dict[str, float]]]) -> None:
    for served, _ in turns:
        if set(served["statuses"]) != {"200"}:
            raise RuntimeError(f"Expected only good answers. Received: {served['statuses']}.")
    served = {name: statistics.median(one[name] for one, _ in turns) for name in turns[0][0] if name != "statuses"}
    bare = {name: statistics.median(one[name] for _, one in turns) for name in turns[0][1]}
    ratios = sorted(one["rate"] / other["rate"] for one, other in turns)
    print(
        f"{num_clients:8}{served['rate']:10.1f}{bare['rate']:8.1f}{statistics.median(ratios):7.2f}"
        f"{served['p50']:8.0f}{served['p99']:8.0f}{served['batch']:7.1f}"
        f"  server {served['server_ms']:.1f} + clients {served['client_ms']:.1f} against {bare['cpu_ms']:.1f} of the loop"
        f"  (ratios {', '.join(f'{ratio:.2f}' for ratio in ratios)})",
        flush=True,
    )


def _ask_loop(loop: subprocess.Popen, seconds: float) -> dict[str, float]:
    print(seconds, file=loop.stdin, flush=True)
    return json.loads(loop.stdout.readline())


def _ask_clients(server: Any, num_clients: int, seconds: float, folder: Path) -> dict[str, Any]:
    before = _counters(server)
    command = [sys.executable, __file__, "--worker", "client", str(server.port), str(num_clients), str(seconds)]
    command.append(str(folder / "images.json"))
    served = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    after = _counters(server)
    num_batches, num_images, cpu_seconds = (after[name] - before[name] for name in ("batches", "images", "cpu"))
    return served | {"batch": num_images / num_batches, "server_ms": 1000 * cpu_seconds / num_images}


def _counters(server: Any) -> dict[str, float]:
    lines = dict(line.rsplit(" ", 1) for line in server.client.get("/metrics").text.splitlines() if not line.startswith("#"))
    names = {
        "batches": "tfx_vision_batch_size_count",
        "images": "tfx_vision_batch_size_sum",
        "cpu": "process_cpu_seconds_total",
    }
    return {name: float(lines[metric]) for name, metric in names.items()}


def _overload(folder: Path, model: str, seconds: float) -> None:
    """Asks more than the queue takes, for some time, and again: the second time memory must not grow."""
    from server_process import ServerProcess

    flags = (f"--max-queue={_OVERLOAD_QUEUE}", f"--max-instances={_OVERLOAD_QUEUE}")
    server = ServerProcess(folder / "overload.log", f"--model={model}", *flags)
    memory = []
    for _ in range(3):
        served = _ask_clients(server, _OVERLOAD_CLIENTS, seconds, folder)
        memory.append(round(server.memory_mib()))
    print(
        f"overload: {_OVERLOAD_CLIENTS} clients, queue of {_OVERLOAD_QUEUE}: {served['rate']:.1f} images/s answered, p99 of "
        f"those {served['p99']:.0f} ms, statuses {served['statuses']}, memory after each turn {memory} MiB",
        flush=True,
    )
    server.stop()


def _attack(folder: Path, model: str, paths: list[str], num_requests: int) -> None:
    import tensorflow as tf
    from hostile_requests import attack
    from server_process import ServerProcess

    images = [Path(path).read_bytes() for path in paths[:16]]
    loaded = tf.saved_model.load(model)
    expected = loaded.signatures["serving_default"](image_bytes=tf.constant(images))["probabilities"].numpy()
    flags = ("--max-body-mib=1", "--max-pixels=1000000", "--head-seconds=2", "--body-seconds=2")
    server = ServerProcess(folder / "attack.log", f"--model={model}", *flags)
    memory, counts, wrong = [], collections.Counter(), []
    for part in range(5):
        more, failures = attack(
            server.port, images, expected, num_requests=num_requests // 5, max_body_bytes=_MAX_BODY_BYTES, seed=part
        )
        counts.update(more)
        wrong += failures
        memory.append(round(server.memory_mib()))
    statuses = collections.Counter()
    for (_, status), count in counts.items():
        statuses[status] += count
    print(
        f"attack: {counts.total():,} requests, {counts['good', 200]:,} good ones answered right, statuses {dict(statuses)} "
        f"(0: cut off or left), {len(wrong)} wrong, memory after each fifth {memory} MiB"
    )
    print(*wrong[:20], sep="\n")
    codes = collections.Counter(line["code"] for line in server.lines() if line["message"] == "request")
    print(f"the server's own log: {dict(sorted(codes.items()))} (499: the client had left)")
    server.stop()


def _loop(model: str, images: str) -> None:
    """Finds the best batch size, then measures for as many seconds as each line says."""
    import tensorflow as tf

    encoded = [Path(path).read_bytes() for path in json.loads(Path(images).read_text())]
    loaded = tf.saved_model.load(model)
    function = loaded.signatures["serving_default"]

    def measure(batch_size: int, seconds: float) -> dict[str, float]:
        stream = itertools.cycle(encoded)
        started, cpu, count, fastest = time.perf_counter(), time.process_time(), 0, float("inf")
        while (elapsed := time.perf_counter() - started) < seconds:
            call = time.perf_counter()
            batch = tf.constant(list(itertools.islice(stream, batch_size)))
            _ = {name: value.numpy() for name, value in function(image_bytes=batch).items()}
            count += batch_size
            fastest = min(fastest, time.perf_counter() - call)
        return {
            "rate": count / elapsed,
            "best_rate": batch_size / fastest,
            "cpu_ms": 1000 * (time.process_time() - cpu) / count,
        }

    # By the fastest call of several seconds: other work on the machine comes and goes.
    rates = {batch_size: round(measure(batch_size, 4)["best_rate"], 1) for batch_size in _BATCH_SIZES}
    best = max(rates, key=rates.get)
    print(json.dumps([best, rates]), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(best, float(line))), flush=True)


async def _client(port: str, num_clients: str, seconds: str, images: str) -> None:
    """Keeps connections busy, one request at a time on each, and prints what it saw."""
    raws = []
    for path in json.loads(Path(images).read_text()):
        text = base64.b64encode(Path(path).read_bytes()).decode()
        body = json.dumps({"instances": [{"image_bytes": {"b64": text}}]}).encode()
        head = f"POST /v1/models/model:predict HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        raws.append(head.encode() + body)
    stream = itertools.cycle(raws)
    statuses: collections.Counter = collections.Counter()
    latencies: list[float] = []
    ends = time.perf_counter() + float(seconds)

    async def work() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
        while (started := time.perf_counter()) < ends:
            writer.write(next(stream))
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            status = head[9:12].decode()
            statuses[status] += 1
            if status == "200":
                latencies.append(time.perf_counter() - started)
            else:  # as it is asked to, but sooner, so that the pressure stays
                await asyncio.sleep(0.1)
        writer.close()

    began, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(work() for _ in range(int(num_clients))))
    elapsed, cpu = time.perf_counter() - began, time.process_time() - cpu
    percentiles = statistics.quantiles(latencies, n=100)
    report = {"rate": statuses["200"] / elapsed, "p50": 1000 * percentiles[49], "p99": 1000 * percentiles[98]}
    print(json.dumps(report | {"statuses": statuses, "client_ms": 1000 * cpu / statuses.total()}))


if __name__ == "__main__":
    main()
