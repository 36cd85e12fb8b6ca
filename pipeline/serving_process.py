"""The process in which the serving check tries an exported model, with TensorFlow alone, as a server would.

    python -P pipeline/serving_process.py JOB.json

A script of its own, that imports nothing of ours: what the model needs and a server does not have must show here. It only
measures; `pipeline.serving_check` starts it, outlives it whatever the model does to it, and judges what it found. 10 to 15
seconds for the default network on two CPU cores, four of them to load TensorFlow.

JOB.json holds `model` (local folder of the SavedModel), `references` (local file that the trainer left), `answer` (where to
write what was found, as JSON), `latency_budgets_ms` (batch size -> milliseconds), `measure_seconds` (for each of them),
`max_memory_mb` and `timeout_seconds`. The answer is written anew before each stage, with the stage's name, so that of a process
that dies it is known what it died of.
"""

import json
import os
import resource
import signal
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

# TensorFlow loads Keras itself; what is loaded later is the model's doing.
_LOADED_BY_TENSORFLOW = frozenset(sys.modules)

# The contract of the exported model. Repeated here, as nothing of ours can be imported; the tests compare.
SERVING_DEFAULT = "serving_default"
IMAGE_BYTES = "image_bytes"
PROBABILITIES = "probabilities"
IMAGE_KEY = "image"
LABELS_PATH = "assets.extra/labels.txt"
OUTPUTS = {  # name -> dtype and rank
    "label": (tf.string, 1),
    "probability": (tf.float32, 1),
    "labels": (tf.string, 2),
    PROBABILITIES: (tf.float32, 2),
}
FOREIGN_MODULES = ("data", "preprocessing", "models", "pipeline", "tfx", "apache_beam", "keras", "tf_keras")

LARGE_BATCH = 64
DONE = "done"
EXIT_MEMORY = 3  # ended by itself, as it took far more memory than it may
_NUM_SINGLE_IMAGES = 16  # that are also sent in a batch of 1; a large network takes a second for each
_DISTRIBUTION_TOLERANCE = 1e-3  # of a sum of float32 probabilities

# Of a latency: calls for `measure_seconds`, or for up to twice as long where there are fewer than _MIN_CALLS by then.
_MIN_CALLS = 20
_MAX_CALLS = 200
_KEPT_ALIVE_SECONDS = 30  # after the parent's limit, where the parent is gone

# A model somewhat above its budget is measured to the end; one far above would take the machine down with it.
_MOST_MEMORY = 2  # times the budget
_MEMORY_POLL_SECONDS = 0.1
_LINUX_STATUS = "/proc/self/status"

Serve = Callable[[tf.Tensor], dict[str, np.ndarray]]


class Findings:
    """What was found so far, in a file that is always whole."""

    def __init__(self, path: str):
        self._path = path
        self.facts: dict[str, Any] = {}

    def start(self, stage: str) -> None:
        """Writes what is known, and what is tried next: a clause that follows "while"."""
        self.facts |= {"stage": stage, "memory_mb": _peak_memory_mb()}
        with open(f"{self._path}.tmp", "w", encoding="utf-8") as file:
            json.dump(self.facts, file)
        os.replace(f"{self._path}.tmp", self._path)


def main(job_path: str) -> None:
    """Tries the model; whatever it does wrong becomes a fact in the answer."""
    with open(job_path, encoding="utf-8") as file:
        job = json.load(file)
    signal.alarm(job["timeout_seconds"] + _KEPT_ALIVE_SECONDS)  # the parent kills a hanging process, if it still can
    threading.Thread(target=_watch_memory, args=[_MOST_MEMORY * job["max_memory_mb"]], daemon=True).start()
    findings = Findings(job["answer"])
    try_model(job, findings)
    foreign = [name for name in sys.modules if name.split(".")[0] in FOREIGN_MODULES and name not in _LOADED_BY_TENSORFLOW]
    findings.facts["foreign_modules"] = sorted(foreign)
    findings.start(DONE)


def try_model(job: dict[str, Any], findings: Findings) -> None:
    """Goes from one stage to the next; returns early where the rest cannot be tried."""
    facts = findings.facts
    findings.start("reading the trainer's reference answers")
    try:
        images, expected = read_references(job["references"])
    except tf.errors.OpError as error:
        facts["references_error"] = first_line(error)
        return
    facts["num_images"] = len(images)
    if not images:
        return

    findings.start("loading the SavedModel")
    started = time.monotonic()
    try:
        model = tf.saved_model.load(job["model"])  # its signatures do not keep it alive
        signatures = dict(model.signatures)
    except Exception as error:
        facts["load_error"] = first_line(error)
        return
    facts["load_seconds"] = time.monotonic() - started
    if signature_error := find_signature_error(signatures):
        facts["signature_error"] = signature_error
        return
    serve = _make_serve(signatures[SERVING_DEFAULT])

    batches = {}
    for size, count in ((1, _NUM_SINGLE_IMAGES), (LARGE_BATCH, LARGE_BATCH)):
        findings.start(f"answering real images in a batch of {size}")
        chosen = cycle(images, count if size > 1 else min(count, len(images)))
        try:
            parts = [serve(tf.constant(chosen[start : start + size])) for start in range(0, len(chosen), size)]
        except Exception as error:
            facts["call_error"] = {"batch": size, "error": first_line(error)}
            return
        batches[size] = {name: np.concatenate([part[name] for part in parts]) for name in OUTPUTS}
    answers = {name: values[: len(images)] for name, values in batches[LARGE_BATCH].items()}
    facts |= compare(answers, expected, read_labels(job["model"]))
    singles = batches[1][PROBABILITIES]
    facts["batch_difference"] = max_difference(singles, answers[PROBABILITIES][: len(singles)])

    facts["hostile"] = []
    for name, batch in hostile_inputs(images[0]).items():
        findings.start(f"answering the hostile input `{name}`")
        outcome = _outcome(serve, batch)
        try:
            after = max_difference(serve(tf.constant(images[:1]))[PROBABILITIES], singles[:1])
        except Exception as error:
            after = first_line(error)
        facts["hostile"].append({"name": name, "outcome": outcome, "after": after})

    facts["latency_ms"] = {}
    for size, budget in job["latency_budgets_ms"].items():
        findings.start(f"measuring the latency of a batch of {size}")
        batch = tf.constant(cycle(images, int(size)))
        facts["latency_ms"][size] = measure_latency(serve, batch, budget_ms=budget, measure_seconds=job["measure_seconds"])


def read_references(path: str) -> tuple[list[bytes], list[np.ndarray]]:
    """Reads the encoded images and the trainer's probabilities for each, float32 [classes]."""
    images, probabilities = [], []
    for record in tf.data.TFRecordDataset(path, "GZIP").as_numpy_iterator():
        features = tf.train.Example.FromString(record).features.feature
        images.append(features[IMAGE_KEY].bytes_list.value[0])
        probabilities.append(np.array(features[PROBABILITIES].float_list.value, np.float32))
    return images, probabilities


def read_labels(model: str) -> list[str]:
    """Reads the class list beside a model; empty where there is none."""
    path = os.path.join(model, LABELS_PATH)
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [line.strip() for line in file.read().splitlines() if line.strip()]  # as the rest of the project reads it


def find_signature_error(signatures: dict[str, Any]) -> str | None:
    """Says, in a sentence without its full stop, in what `serving_default` is not as the contract has it."""
    if SERVING_DEFAULT not in signatures:
        return f"the model has no signature `{SERVING_DEFAULT}`; it has {', '.join(sorted(signatures)) or 'none'}"
    function = signatures[SERVING_DEFAULT]
    inputs = function.structured_input_signature[1]
    if set(inputs) != {IMAGE_BYTES} or inputs[IMAGE_BYTES].dtype != tf.string or inputs[IMAGE_BYTES].shape.rank != 1:
        found = ", ".join(f"`{name}` {spec.dtype.name} {spec.shape}" for name, spec in sorted(inputs.items()))
        return f"`{SERVING_DEFAULT}` takes {found or 'nothing'}; a request is `{IMAGE_BYTES}` string [batch]"
    outputs = function.structured_outputs
    for name, (dtype, rank) in OUTPUTS.items():
        if name not in outputs:
            return f"`{SERVING_DEFAULT}` answers without `{name}`; it has {', '.join(sorted(outputs))}"
        spec = outputs[name]
        if spec.dtype != dtype or spec.shape.rank not in (None, rank):
            return (
                f"`{name}` of `{SERVING_DEFAULT}` is {spec.dtype.name} of rank {spec.shape.rank}; "
                f"the contract has {dtype.name} of rank {rank}"
            )
    return None


def _make_serve(function: Any) -> Serve:
    def serve(batch: tf.Tensor) -> dict[str, np.ndarray]:
        answer = {name: value.numpy() for name, value in function(**{IMAGE_BYTES: batch}).items()}
        for name in OUTPUTS:
            if len(answer[name]) != len(batch):
                raise ValueError(f"{len(batch)} images get {len(answer[name])} rows of `{name}`")
        return answer

    return serve


def compare(answers: dict[str, np.ndarray], expected: Sequence[np.ndarray], labels: Sequence[str]) -> dict[str, Any]:
    """Compares answers with the trainer's, with the class list and with each other.

    Args:
      answers: of `serving_default` to the reference images, in their order.
      expected: the trainer's probabilities, float32 [classes] for each image.
      labels: the class list.

    Returns:
      `num_classes`, `num_labels`, `num_reference_classes`; `labels`, the names that differ from the class list, or None;
      `num_not_finite`, `num_not_distributions`, `num_wrong_labels`, numbers of images; `max_difference`, the largest absolute
      difference of a probability from the trainer's, None where they cannot be compared.
    """
    probabilities = answers[PROBABILITIES]
    num_classes = probabilities.shape[1]
    facts = {
        "num_classes": num_classes,
        "num_labels": len(labels),
        "num_reference_classes": len(expected[0]),
        "labels": None,
        "max_difference": None,
    }
    rows = [[name.decode("utf-8", "replace") for name in row] for row in answers["labels"]]
    facts["labels"] = next((row for row in rows if row != list(labels)), None)
    is_finite = np.isfinite(probabilities).all(axis=-1) & np.isfinite(answers["probability"])
    is_distribution = (np.abs(probabilities.sum(axis=-1) - 1) <= _DISTRIBUTION_TOLERANCE) & (probabilities >= 0).all(axis=-1)
    facts["num_not_finite"] = int(np.sum(~is_finite))
    facts["num_not_distributions"] = int(np.sum(is_finite & ~is_distribution))
    wrong = 0
    for row, names, label, probability in zip(
        probabilities, answers["labels"], answers["label"], answers["probability"], strict=True
    ):
        by_name = dict(zip(names, row, strict=False))
        # By value, as two classes may be equally probable.
        is_right = by_name.get(label) == row.max(initial=-np.inf) == probability
        wrong += bool(np.isfinite(row).all() and not is_right)
    facts["num_wrong_labels"] = wrong
    if is_finite.all() and all(len(row) == num_classes for row in expected):
        facts["max_difference"] = max_difference(probabilities, np.stack(expected))
    return facts


def max_difference(first: np.ndarray, second: np.ndarray) -> float | None:
    """Returns the largest absolute difference; None where one of them is not a number or of another shape."""
    if first.shape != second.shape:
        return None
    difference = float(np.abs(first.astype(np.float64) - second).max(initial=0.0))
    return difference if np.isfinite(difference) else None


def hostile_inputs(image: bytes) -> dict[str, tf.Tensor]:
    """Makes what a server on the open network is sent sooner or later.

    Args:
      image: a good one, encoded.

    Returns:
      Name -> what to send in the place of a batch of image bytes.
    """
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    jpeg = tf.io.encode_jpeg(noise).numpy()
    return {
        "empty": tf.constant([b""]),
        "truncated": tf.constant([jpeg[: len(jpeg) // 2]]),
        "not an image": tf.constant([b"<html><body>413 Request Entity Too Large</body></html>"]),
        "huge image": tf.constant([make_png(6000, 6000)]),
        "huge header": tf.constant([make_png(60_000, 60_000, num_rows=1)]),
        "one bad among good": tf.constant([image, b"not an image", image]),
        "empty batch": tf.constant([], tf.string),
        "numbers": tf.constant([1, 2, 3]),
        "rank 2": tf.constant([[image, image]]),
    }


def make_png(width: int, height: int, *, num_rows: int | None = None) -> bytes:
    """Encodes a black PNG of one bit a pixel: few bytes that decode to many.

    Args:
      width: pixels.
      height: pixels that the header claims.
      num_rows: pixels that are there; all where left out.
    """
    row = bytes(1 + (width + 7) // 8)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(row * (height if num_rows is None else num_rows))),
        (b"IEND", b""),
    )
    encoded = b"\x89PNG\r\n\x1a\n"
    for kind, content in chunks:
        encoded += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return encoded


def _outcome(serve: Serve, batch: tf.Tensor) -> str:
    started = time.monotonic()
    try:
        serve(batch)
    except Exception as error:
        return f"refused: {first_line(error)}"
    return f"answered in {time.monotonic() - started:.1f} s"


def measure_latency(serve: Serve, batch: tf.Tensor, *, budget_ms: float, measure_seconds: float) -> dict[str, float]:
    """Measures calls after one to warm up; once more where the 99th percentile is above its budget.

    Another process may have had the machine, and a good model is not stopped for that: the better measurement counts.

    Returns:
      `p50` and `p99`, milliseconds; `calls`, how many were measured; `seconds`, all of them together.
    """
    serve(batch)
    latency = _measure_calls(serve, batch, measure_seconds)
    if latency["p99"] > budget_ms:
        latency = min(latency, _measure_calls(serve, batch, measure_seconds), key=lambda found: found["p99"])
    return latency


def _measure_calls(serve: Serve, batch: tf.Tensor, measure_seconds: float) -> dict[str, float]:
    seconds: list[float] = []
    total = 0.0
    while len(seconds) < _MAX_CALLS and total < measure_seconds * (1 if len(seconds) >= _MIN_CALLS else 2):
        started = time.perf_counter()
        serve(batch)
        seconds.append(time.perf_counter() - started)
        total += seconds[-1]
    p50, p99 = np.percentile(seconds, [50, 99]) * 1e3
    return {"p50": float(p50), "p99": float(p99), "calls": len(seconds), "seconds": total}


def cycle(images: Sequence[bytes], count: int) -> list[bytes]:
    """Takes so many images, from the first again after the last."""
    return [images[number % len(images)] for number in range(count)]


def first_line(error: Exception) -> str:
    """Returns an error's type and the line that says what is wrong, at most 300 characters.

    That is its first line; where a graph was running, TensorFlow tells the operation first and names its node below.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    node = next((number for number, line in enumerate(lines) if line.startswith("[[")), 0)
    return f"{type(error).__name__}: {lines[max(node - 1, 0)]}"[:300]


def _peak_memory_mb() -> float:
    """Returns the largest resident memory of this process so far.

    Linux's `ru_maxrss` starts with that of the process that started this one (`setmax_mm_hiwater_rss` in its `exec`), which may
    well be larger; VmHWM is of this program alone.
    """
    if os.path.exists(_LINUX_STATUS):
        with open(_LINUX_STATUS, encoding="ascii", errors="replace") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS counts bytes


def _watch_memory(limit_mb: float) -> None:
    """Ends the process where it takes more memory than that."""
    while _peak_memory_mb() <= limit_mb:
        time.sleep(_MEMORY_POLL_SECONDS)
    print(f"it took {_peak_memory_mb():,.0f} MB", file=sys.stderr, flush=True)
    os._exit(EXIT_MEMORY)


if __name__ == "__main__":
    main(sys.argv[1])
