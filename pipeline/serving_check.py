"""The serving check: whether the exported model answers as the trainer did, in a process of its own, fast and unharmed.

TFX's InfraValidator asks the same of a TensorFlow Serving container, which needs Docker or Kubernetes; this needs neither, and
judges the answers too. `pipeline.serving_process` tries the model and measures, this starts it and judges. A model that crashes
its process, hangs or does not load is refused with a reason; nothing that a model does raises an error here.

Called by `pipeline.components.ServingCheck`, and by whatever reads its verdict.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import pydantic
import tensorflow as tf

from data.errors import InputError
from models.reference import REFERENCE_FILE
from pipeline import serving_process
from pipeline.model_digest import model_digest

SERVING_CHECK_FILE = "serving_check.json"
INFRA_BLESSED_FILE, INFRA_NOT_BLESSED_FILE = "INFRA_BLESSED", "INFRA_NOT_BLESSED"  # as TFX's InfraValidator names them
_SMALL_BATCH, _BATCH = "1", "32"  # whose latency is measured
_MAX_NAMES = 5  # of labels or modules in a reason


class ServingCheckConfig(pydantic.BaseModel):
    """What an exported model must keep to in a server, on the CPU of the machine that checks it.

    The budgets are wide by default: they stop a model that no server could run, on any machine. Set them to what your service
    has promised. A latency above its budget is measured once more, and the better one counts.

    Attributes:
      max_difference: of a probability from the trainer's for the same image, in [0, 1]. Other kernels and batch sizes differ by
        about 1e-6, another resize by 1e-2 and more.
      max_latency_ms: of one image, the 99th percentile, in milliseconds.
      max_batch_latency_ms: of a batch of 32 images, the 99th percentile, in milliseconds.
      max_memory_mb: resident at its peak, which is while an image of 36 megapixels is decoded, in megabytes (1e6 bytes);
        TensorFlow itself takes about 600.
      measure_seconds: for how long each latency is measured, twice that where 20 calls take longer.
      timeout_seconds: for the whole check, loading TensorFlow and the model included.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    max_difference: float = pydantic.Field(1e-3, ge=0, le=1)
    max_latency_ms: float = pydantic.Field(2000, gt=0)
    max_batch_latency_ms: float = pydantic.Field(30_000, gt=0)
    max_memory_mb: float = pydantic.Field(4096, gt=0)
    measure_seconds: float = pydantic.Field(2, gt=0)
    timeout_seconds: int = pydantic.Field(300, ge=1)


def check_serving(model: str, model_run: str, config: ServingCheckConfig) -> dict[str, Any]:
    """Tries a model and judges it; 10 to 15 seconds on two CPU cores for the default network.

    Args:
      model: folder of the SavedModel; local or gs://.
      model_run: folder in which the trainer left its reference predictions; local or gs://.
      config: limits and budgets.

    Returns:
      The verdict, ready for JSON: `blessed`; `reasons`, a sentence for each limit that was missed; `model_digest`, of the files
      that were tried; `num_images`, that were compared; `max_difference` from the trainer's probabilities; `load_seconds`;
      `latency_ms`, batch size "1" and "32" -> `p50`, `p99` and `calls`; `memory_mb` at the peak; `images_per_second` at a batch
      of 32; `hostile`, for each hostile input its `name` and `outcome`. What is unknown, as the model did not get there, is
      null, and `hostile` then holds those that were tried.

    Raises:
      tf.errors.OpError: if a bucket cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="serving_check_") as folder:
        local_model = _fetch(model, os.path.join(folder, "model"))
        references = os.path.join(model_run, REFERENCE_FILE)
        digest, death = None, []
        try:
            digest = model_digest(local_model)
        except InputError:
            found = {"load_error": f"there is no file in {model}"}
        else:
            if tf.io.gfile.exists(references):
                local_references = _fetch(references, os.path.join(folder, REFERENCE_FILE))
                found, death = _run_process(local_model, local_references, folder=folder, config=config)
            else:
                found = {"references_error": f"there is no {references}"}
    reasons = [*_reasons(found, config), *death]
    latency = found.get("latency_ms", {})
    batch = latency.get(_BATCH)
    return {
        "blessed": not reasons,
        "reasons": reasons,
        "model_digest": digest,
        "num_images": found.get("num_images", 0),
        "max_difference": found.get("max_difference"),
        "load_seconds": found.get("load_seconds"),
        "latency_ms": {
            size: {key: latency[size][key] for key in ("p50", "p99", "calls")} if size in latency else None
            for size in (_SMALL_BATCH, _BATCH)
        },
        "memory_mb": found.get("memory_mb"),
        "images_per_second": int(_BATCH) * batch["calls"] / batch["seconds"] if batch else None,
        "hostile": [{"name": tried["name"], "outcome": tried["outcome"]} for tried in found.get("hostile", [])],
    }


def write_serving_check(folder: str, verdict: dict[str, Any]) -> None:
    """Writes a verdict into the folder of its blessing; local or gs://."""
    with tf.io.gfile.GFile(os.path.join(folder, SERVING_CHECK_FILE), "w") as file:
        json.dump(verdict, file, indent=2, allow_nan=False)


def read_serving_check(folder: str) -> dict[str, Any]:
    """Reads the verdict in the folder of an `InfraBlessing`.

    Args:
      folder: of the artifact; local or gs://.

    Returns:
      What `check_serving` returned, with `model`, the URI of the model's artifact, and `evaluator_blessed`, whether the
      Evaluator blessed it.

    Raises:
      InputError: if there is none.
    """
    path = os.path.join(folder, SERVING_CHECK_FILE)
    if not tf.io.gfile.exists(path):
        raise InputError(
            f"Expected the serving check's verdict in {folder}. Received: no {SERVING_CHECK_FILE} there. Give the folder of an "
            "InfraBlessing that this pipeline's ServingCheck wrote."
        )
    with tf.io.gfile.GFile(path) as file:
        return json.load(file)


def _fetch(source: str, target: str) -> str:
    """Copies a file or a folder to this machine if it is elsewhere; returns where it lies here."""
    if "://" not in source:
        return source
    if not tf.io.gfile.isdir(source):
        tf.io.gfile.copy(source, target)
        return target
    for directory, _, files in tf.io.gfile.walk(source):
        to = os.path.join(target, directory.rstrip("/")[len(source.rstrip("/")) :].lstrip("/"))
        tf.io.gfile.makedirs(to)
        for name in files:
            tf.io.gfile.copy(os.path.join(directory, name), os.path.join(to, name))
    return target


def _run_process(model: str, references: str, *, folder: str, config: ServingCheckConfig) -> tuple[dict[str, Any], list[str]]:
    """Runs `pipeline.serving_process` on local files.

    Returns:
      What it found until its end, and a sentence on its end if that was not a good one.
    """
    job_path, answer_path = os.path.join(folder, "job.json"), os.path.join(folder, "answer.json")
    job = {
        "model": os.path.abspath(model),
        "references": os.path.abspath(references),
        "answer": answer_path,
        "latency_budgets_ms": {_SMALL_BATCH: config.max_latency_ms, _BATCH: config.max_batch_latency_ms},
        "measure_seconds": config.measure_seconds,
        "max_memory_mb": config.max_memory_mb,
        "timeout_seconds": config.timeout_seconds,
    }
    with open(job_path, "w", encoding="utf-8") as file:
        json.dump(job, file)
    # None of our code can be found there. GPUs are left to others: the trainer's answers were computed without, and another
    # step of this very process may hold their memory.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"CUDA_VISIBLE_DEVICES": "-1", "TF_ENABLE_ONEDNN_OPTS": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
    is_late = False
    with open(os.path.join(folder, "process.log"), "w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", serving_process.__file__, job_path],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(config.timeout_seconds)
        except subprocess.TimeoutExpired:
            is_late = True
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        lines = [line.strip() for line in log.read().splitlines() if line.strip()]
    found = {"stage": "loading TensorFlow"}
    if os.path.exists(answer_path):
        with open(answer_path, encoding="utf-8") as file:
            found = json.load(file)
    stage, last_line = found["stage"], lines[-1][-300:] if lines else "it said nothing"
    if is_late:
        limit = f"{config.timeout_seconds:,} s (serving_check.timeout_seconds)"
        return found, [f"the process that serves the model was still {stage} when its time was up; the limit is {limit}"]
    if process.returncode == serving_process.EXIT_MEMORY:
        budget = f"{config.max_memory_mb:,.0f} MB (serving_check.max_memory_mb)"
        return found, [f"the process that serves the model was stopped while {stage}: {last_line}; the budget is {budget}"]
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        return found, [f"the process that serves the model died of {name} while {stage}: {last_line}"]
    if process.returncode or stage != serving_process.DONE:
        code = process.returncode
        return found, [f"the process that serves the model ended with exit code {code} while {stage}: {last_line}"]
    return found, []


def _reasons(found: dict[str, Any], config: ServingCheckConfig) -> Iterator[str]:
    """Yields a sentence for each limit that what was found misses; what was not found out is passed over."""
    if error := found.get("references_error"):
        yield f"the trainer's answers cannot be read, so the model cannot be compared with it: {error}"
    if "references_error" not in found and found.get("num_images") == 0:
        yield "the trainer left no answers, so the model cannot be compared with it"
    if error := found.get("load_error"):
        yield f"the SavedModel does not load: {error}"
    if error := found.get("signature_error"):
        yield error
    if error := found.get("call_error"):
        yield f"real images in a batch of {error['batch']} are not answered: {error['error']}"
    if "num_classes" in found:
        yield from _answer_reasons(found, config)
    for tried in found.get("hostile", ()):
        after = tried["after"]
        # TensorFlow's own errors for an input are fine; what matters is that the next request does not suffer.
        if isinstance(after, str):
            yield f"after the hostile input `{tried['name']}` a good image is no longer answered: {after}"
        elif after is None:
            if not found["num_not_finite"]:
                yield f"after the hostile input `{tried['name']}` the answer to a good image is no longer a number"
        elif after > config.max_difference:
            yield (
                f"after the hostile input `{tried['name']}` the answer to a good image differs by {after:.3g}; "
                f"the limit is {config.max_difference:g} (serving_check.max_difference)"
            )
    budgets = {
        _SMALL_BATCH: (config.max_latency_ms, "max_latency_ms"),
        _BATCH: (config.max_batch_latency_ms, "max_batch_latency_ms"),
    }
    for size, latency in found.get("latency_ms", {}).items():
        budget, name = budgets[size]
        if latency["p99"] > budget:
            yield (
                f"a batch of {size} takes {_milliseconds(latency['p99'])} (99th percentile of {latency['calls']} calls); "
                f"the budget is {_milliseconds(budget)} (serving_check.{name})"
            )
    if found.get("stage") == serving_process.DONE and found["memory_mb"] > config.max_memory_mb:
        yield (
            f"the process that serves the model takes {found['memory_mb']:,.0f} MB at its peak; "
            f"the budget is {config.max_memory_mb:,.0f} MB (serving_check.max_memory_mb)"
        )
    if modules := found.get("foreign_modules"):
        yield f"the model was not served by TensorFlow alone, its process also loaded {_names(modules)}"


def _answer_reasons(found: dict[str, Any], config: ServingCheckConfig) -> Iterator[str]:
    """Yields a sentence for each way in which the answers to the real images are wrong."""
    num_images, num_classes, num_labels = found["num_images"], found["num_classes"], found["num_labels"]
    limit = f"the limit is {config.max_difference:g} (serving_check.max_difference)"
    if not num_labels:
        yield f"the model has no class list ({serving_process.LABELS_PATH})"
    elif num_classes != num_labels:
        yield f"the model answers with {num_classes} probabilities; its class list has {num_labels}"
    elif found["labels"] is not None:
        yield f"`labels` of the answers are {_names(found['labels'])}; the class list has other names or another order"
    if num_classes != found["num_reference_classes"]:
        yield f"the model answers with {num_classes} probabilities; the trainer with {found['num_reference_classes']}"
    if count := found["num_not_finite"]:
        yield f"the answers to {count} of {num_images} images are not numbers"
    if count := found["num_not_distributions"]:
        yield f"the probabilities of {count} of {num_images} images are negative or do not sum to 1"
    if count := found["num_wrong_labels"]:
        yield f"`label` and `probability` of {count} of {num_images} answers are not those of the highest of `probabilities`"
    difference = found["max_difference"]
    if difference is None:
        if not found["num_not_finite"] and num_classes == found["num_reference_classes"]:
            yield "the trainer's answers are not numbers, or not all of one length, so the model cannot be compared with it"
    elif difference > config.max_difference:
        yield (
            f"the exported model's answers differ from the trainer's by up to {difference:.3g} on {num_images} images; "
            f"{limit}: training and serving do not see the same image, or do not have the same weights"
        )
    between = found["batch_difference"]
    if between is None:
        if not found["num_not_finite"]:
            yield "the answers in a batch of 1 are not numbers"
    elif between > config.max_difference:
        yield (
            f"the same image is answered differently, by up to {between:.3g}, in a batch of 1 and of "
            f"{serving_process.LARGE_BATCH}; {limit}"
        )


def _milliseconds(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 10 else f"{value:.3g} ms"


def _names(names: Sequence[str]) -> str:
    """Lists names, the first few if they are many."""
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more
