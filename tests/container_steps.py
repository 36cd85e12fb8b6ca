"""Runs a container's command without a container: in a fresh process that sees only what the image would hold.

Called by `tests/job_executor.py` for the steps of a pipeline, and by tests for the custom jobs and the serving containers that
a step asks Vertex AI for. What differs from a container: the system and the installed packages are this machine's, nothing
limits memory or network, and the process runs as this user; that it writes nothing beside the code, where the image's user may
not, is checked afterwards.
"""

import compileall
import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from conftest import find_free_ports
from google.protobuf import json_format

_VENV_IN_IMAGE = "/opt/venv"
_SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"
_TAIL_LINES = 40
_GRACE_SECONDS = 30  # between SIGTERM and SIGKILL
_CLUSTER_JOBS = ("chief", "worker", "ps", "evaluator")  # of the worker pools, in their order


class ContainerError(RuntimeError):
    """A container's command failed; the message ends with the tail of its log."""


@dataclasses.dataclass(frozen=True)
class Image:
    """What an image holds of the project.

    Attributes:
      folder: stands for the image's working directory.
      environment: what the Dockerfile sets, with this machine's folders in the place of the image's.
    """

    folder: Path
    environment: Mapping[str, str]

    def files(self) -> dict[str, tuple[int, int]]:
        """Returns the size in bytes and the modification time in nanoseconds of every file, by its relative path."""
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return {str(path.relative_to(self.folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def image_folder(dockerfile: Path, dockerignore: Path, destination: Path, *, stage: str = "pipeline") -> Image:
    """Copies what a stage's COPY lines take from the build context, which is the Dockerfile's folder, and compiles it.

    Args:
      dockerfile: of which COPY, ENV and WORKDIR of the one stage count; what it copies from other stages is installed packages,
        for which this interpreter's stand.
      dockerignore: what the build context leaves out.
      destination: a folder to make.
      stage: the name after AS.

    Raises:
      ValueError: if the Dockerfile has no such stage, copies outside the working directory, or names what is not there.
    """
    context, destination = dockerfile.parent, destination.resolve()
    destination.mkdir(parents=True)
    patterns = _ignore_patterns(dockerignore)
    workdir, environment = "/", {}
    for instruction, value in _stage_instructions(dockerfile, stage):
        if instruction == "WORKDIR":
            workdir = value
        elif instruction == "ENV":
            environment |= dict(word.split("=", 1) for word in shlex.split(value))
        elif instruction == "COPY" and "--from=" not in value:
            *sources, target = [word for word in shlex.split(value) if not word.startswith("--")]
            place = Path(os.path.normpath(os.path.join(workdir, target)))
            if not place.is_relative_to(workdir):
                raise ValueError(f"Expected COPY into the working directory, {workdir}. Received: COPY {value}.")
            for source in sources:
                into_folder = target.endswith("/") or len(sources) > 1
                _copy(context, source, destination / place.relative_to(workdir), patterns=patterns, into_folder=into_folder)
    compileall.compile_dir(destination, quiet=2)
    substitutes = {_VENV_IN_IMAGE: sys.prefix, "$PATH": _SYSTEM_PATH, workdir: str(destination)}
    pattern = "|".join(rf"{re.escape(name)}(?=[/:]|$)" for name in substitutes)
    return Image(
        folder=destination,
        environment={
            name: re.sub(pattern, lambda match: substitutes[match.group()], value) for name, value in environment.items()
        },
    )


def _stage_instructions(dockerfile: Path, stage: str) -> list[tuple[str, str]]:
    """Returns the instructions of one stage, each with its arguments."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    found: list[tuple[str, str]] = []
    is_stage = False
    for line in filter(None, map(str.strip, lines)):
        instruction, _, value = line.partition(" ")
        if instruction.upper() == "FROM":
            is_stage = re.search(rf"\sAS\s+{re.escape(stage)}$", value, re.IGNORECASE) is not None
        if is_stage:
            found.append((instruction.upper(), value.strip()))
    if not found:
        raise ValueError(f"Expected {dockerfile} to have a stage `{stage}`. Received: none of that name.")
    return found


def _ignore_patterns(dockerignore: Path) -> list[tuple[bool, re.Pattern[str]]]:
    """Returns each pattern, and whether what it matches is ignored; a later one wins over an earlier one."""
    lines = [line.strip() for line in dockerignore.read_text().splitlines()]
    patterns = []
    for line in lines:
        if line and not line.startswith("#"):
            parts = re.split(r"(\*\*/?|\*|\?)", line.removeprefix("!").strip("/"))
            wildcards = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
            expression = "".join(wildcards.get(part) or re.escape(part) for part in parts)
            patterns.append((not line.startswith("!"), re.compile(rf"{expression}(?:/.*)?")))  # a folder's means all below it
    return patterns


def _copy(
    context: Path, source: str, place: Path, *, patterns: Sequence[tuple[bool, re.Pattern[str]]], into_folder: bool
) -> None:
    """Copies a file or what a folder holds, as COPY does."""
    path = context / source
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    taken = 0
    for file in files:
        name = str(file.relative_to(context))
        ignored = [ignore for ignore, pattern in patterns if pattern.fullmatch(name)]
        if file.exists() and not (ignored and ignored[-1]):
            target = place / file.relative_to(path) if path.is_dir() else place / file.name if into_folder else place
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, target)
            taken += 1
    if not taken:
        raise ValueError(f"Expected COPY to find {source} in the build context. Received: nothing, or only what is ignored.")


def run_container(
    command: Sequence[str], *, image: Image, log: Path, environment: Mapping[str, str], timeout_seconds: float
) -> None:
    """Runs a container's command to its end.

    Args:
      command: with its arguments.
      image: in whose folder it runs.
      log: file that its output is appended to; beside it come an empty HOME and a folder for temporary files.
      environment: variables beside those of the image; none of this process's own are passed on.
      timeout_seconds: after which the process and its children are killed.

    Raises:
      ContainerError: if it ends with another code than 0, runs too long, or changes files of the image.
    """
    before = image.files()
    process = _start(command, image=image, log=log, environment=environment)
    try:
        code = process.wait(timeout_seconds)
    except subprocess.TimeoutExpired as error:
        raise ContainerError(f"{command[0]} ran for more than {timeout_seconds:.0f} s\n{_tail(log)}") from error
    finally:
        _kill(process)
    if code:
        raise ContainerError(f"{' '.join(command[:3])} ended with exit code {code}\n{_tail(log)}")
    _require_unchanged(image, before)


def run_custom_job(
    job: Any,
    *,
    image: Image,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    timeout_seconds: float = 1800.0,
    preempt_when: Callable[[], bool] | None = None,
) -> None:
    """Runs the containers of a Vertex AI custom job, every replica at once on this machine, and returns when the chief is done.

    Each replica gets CLUSTER_SPEC; TF_CONFIG only where there are several; AIP_* where the job has a base output directory.

    Args:
      job: a `CustomJob`, as the SDK's or a plain protocol buffer.
      image: that every worker pool runs.
      folder: for a log of each replica, `workerpool0-0.log` and so on.
      environment: variables for every replica beside those of Vertex and of the job.
      timeout_seconds: of the whole job.
      preempt_when: asked several times a second; once it is true, every replica gets SIGTERM, and SIGKILL 30 s later, and is
        started anew, as a spot machine that was taken away is.

    Raises:
      ContainerError: if a replica fails, or the job runs too long; with the tail of the log.

    Source: https://cloud.google.com/vertex-ai/docs/training/distributed-training
    """
    message = type(job).pb(job) if hasattr(type(job), "pb") else job
    replicas = _replicas(message)
    folder.mkdir(parents=True, exist_ok=True)
    before = image.files()
    deadline = time.monotonic() + timeout_seconds

    def start() -> dict[str, subprocess.Popen]:
        return {
            name: _start(command, image=image, log=folder / f"{name}.log", environment={**variables, **(environment or {})})
            for name, (command, variables) in replicas.items()
        }

    processes = start()
    primary = next(iter(processes))
    try:
        while processes[primary].poll() != 0:
            for name, process in processes.items():
                if process.poll():
                    raise ContainerError(f"{name} ended with exit code {process.returncode}\n{_tail(folder / f'{name}.log')}")
            if time.monotonic() > deadline:
                raise ContainerError(f"the job ran for more than {timeout_seconds:.0f} s\n{_tail(folder / f'{primary}.log')}")
            if preempt_when and preempt_when():
                preempt_when = None
                for process in processes.values():
                    process.terminate()
                for process in processes.values():
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(_GRACE_SECONDS)
                    _kill(process)
                processes = start()
            time.sleep(0.1)
    finally:
        for process in processes.values():
            _kill(process)
    _require_unchanged(image, before)


def _replicas(job: Any) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Returns each replica's command and variables by its name; the primary comes first."""
    spec = job.job_spec
    pools = [(index, pool) for index, pool in enumerate(spec.worker_pool_specs) if pool.replica_count]
    num_replicas = sum(pool.replica_count for _, pool in pools)
    hosts = iter([f"localhost:{port}" for port in find_free_ports(num_replicas)])
    cluster = {index: [next(hosts) for _ in range(pool.replica_count)] for index, pool in pools}
    shared = {"environment": "cloud", "job": json_format.MessageToDict(spec, preserving_proto_field_name=True)}
    base = {"CLOUD_ML_JOB_ID": job.name.rpartition("/")[2]}
    if prefix := spec.base_output_directory.output_uri_prefix:
        places = {"AIP_MODEL_DIR": "model", "AIP_CHECKPOINT_DIR": "checkpoints", "AIP_TENSORBOARD_LOG_DIR": "logs"}
        base |= {name: f"{prefix.rstrip('/')}/{place}/" for name, place in places.items()}
    replicas = {}
    for pool_index, pool in pools:
        container = pool.container_spec
        command = [*container.command, *container.args]
        for index in range(pool.replica_count):
            task = {"type": f"workerpool{pool_index}", "index": index}
            pool_hosts = {f"workerpool{number}": names for number, names in cluster.items()}
            variables = {variable.name: variable.value for variable in container.env} | base
            variables["CLUSTER_SPEC"] = json.dumps({"cluster": pool_hosts, "task": task, **shared})
            if num_replicas > 1:
                jobs = {_CLUSTER_JOBS[number]: names for number, names in cluster.items() if number < 3}  # no evaluators
                task = {"type": _CLUSTER_JOBS[pool_index], "index": index}
                variables["TF_CONFIG"] = json.dumps({"cluster": jobs, "task": task, **shared})
            replicas[f"workerpool{pool_index}-{index}"] = command, variables
    return replicas


@contextlib.contextmanager
def serving_container(
    model: Any, *, image: Image, log: Path, environment: Mapping[str, str], timeout_seconds: float = 600.0
) -> Iterator[Callable[[Sequence[Any]], list[Any]]]:
    """Runs the container of a Vertex AI model as an endpoint does, and waits until its health route answers.

    Args:
      model: a `Model`, with a command, routes and an artifact URI.
      image: that it runs.
      log: file for its output.
      environment: variables beside those of Vertex.
      timeout_seconds: in which it has to become healthy.

    Yields:
      A function from instances to predictions, both as JSON values.

    Raises:
      ContainerError: if it ends, or does not become healthy.
    """
    spec = model.container_spec
    (port,) = find_free_ports(1)
    variables = {
        "AIP_HTTP_PORT": str(port),
        "AIP_HEALTH_ROUTE": spec.health_route,
        "AIP_PREDICT_ROUTE": spec.predict_route,
        "AIP_STORAGE_URI": model.artifact_uri,
        "AIP_MODE": "PREDICTION",
    }
    variables |= {variable.name: variable.value for variable in spec.env}
    process = _start([*spec.command, *spec.args], image=image, log=log, environment={**variables, **environment})
    address = f"http://localhost:{port}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a stand-in's proxy is for its own hosts

    def predict(instances: Sequence[Any]) -> list[Any]:
        body = json.dumps({"instances": list(instances)}).encode()
        request = urllib.request.Request(address + spec.predict_route, body, {"Content-Type": "application/json"})
        return json.load(opener.open(request, timeout=timeout_seconds))["predictions"]

    deadline = time.monotonic() + timeout_seconds
    try:
        while True:
            with contextlib.suppress(OSError):
                opener.open(address + spec.health_route, timeout=5).close()
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise ContainerError(f"{' '.join(spec.command)} did not become healthy\n{_tail(log)}")
            time.sleep(0.1)
        yield predict
    finally:
        _kill(process)


def _start(command: Sequence[str], *, image: Image, log: Path, environment: Mapping[str, str]) -> subprocess.Popen:
    home, temporary = (log.with_suffix(suffix) for suffix in (".home", ".tmp"))
    for folder in (home, temporary):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    variables = {"PATH": _SYSTEM_PATH, "LANG": "C.UTF-8", "HOME": str(home), "TMPDIR": str(temporary)}
    with open(log, "ab") as output:
        return subprocess.Popen(
            list(command),
            cwd=image.folder,
            env={**variables, **image.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _kill(process: subprocess.Popen) -> None:
    """Ends a process and all that it started, also where the process itself has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _require_unchanged(image: Image, before: Mapping[str, tuple[int, int]]) -> None:
    after = image.files()
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        raise ContainerError(f"Expected no step to write into the image's folder, as its user may not. Received: {changed}.")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:])
