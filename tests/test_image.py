"""The container image: what it holds is what its steps import. Docker is not needed; building is tried elsewhere."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from container_steps import Image, image_folder

DOCKERFILE = (ROOT / "Dockerfile").read_text()
PACKAGES = ("data", "preprocessing", "models", "pipeline")
TARGETS = ("cpu", "gpu")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """What a build would copy."""
    return image_folder(ROOT / "Dockerfile", ROOT / ".dockerignore", tmp_path_factory.mktemp("image") / "app")


def files(folder: Path) -> set[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if "__pycache__" not in path.parts}


def test_image_holds_the_packages_and_the_runners_and_nothing_else(image: Image) -> None:
    expected = {f"{package}/{name}" for package in PACKAGES for name in files(ROOT / package) if not name.endswith(".md")}
    assert files(image.folder) == expected | {"local_runner.py", "kubeflow_runner.py", "LICENSE"}


def test_every_module_of_the_image_can_be_imported_there(image: Image) -> None:
    names = [name for name in sorted(files(image.folder)) if name.endswith(".py")]
    modules = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in names]
    script = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *modules],
        cwd=image.folder,
        env=image.environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-2000:]


def test_image_copies_nothing_that_docker_is_told_to_ignore() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [
        source
        for line in DOCKERFILE.splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    ]
    assert copied
    for source in copied:
        assert (ROOT / source).exists(), source
        patterns = [pattern for pattern in allowed if pattern == source or pattern.startswith(f"{source}/")]
        patterns += [pattern for pattern in allowed if re.fullmatch(pattern.replace("*", ".*"), source)]
        assert patterns, source


def test_image_has_the_versions_of_its_locks() -> None:
    locks = re.findall(r"^COPY (requirements-\S+)", DOCKERFILE, re.MULTILINE)
    (beam,) = re.findall(r"^FROM apache/beam_python3.11_sdk:(\S+)", DOCKERFILE, re.MULTILINE)
    assert len(locks) == len(TARGETS)
    for lock in locks:
        assert f"\napache-beam=={beam} " in (ROOT / lock).read_text(), lock


def test_image_has_a_target_without_and_one_with_cuda_that_are_else_alike() -> None:
    for target in TARGETS:
        assert f"\nFROM pipeline AS {target}\nCOPY --from={target}-packages /opt/venv /opt/venv\n" in DOCKERFILE
    assert DOCKERFILE.rindex("FROM pipeline AS cpu") > DOCKERFILE.rindex("FROM pipeline AS gpu")  # the default is the last


@pytest.mark.parametrize("stage", ["pipeline", *TARGETS])
def test_image_runs_without_rights(stage: str) -> None:
    users = re.findall(r"^USER (\S+)", DOCKERFILE.split(f" AS {stage}\n")[1].split("\nFROM ")[0], re.MULTILINE)
    assert users == (["tfx"] if stage == "pipeline" else [])


def entrypoint(boot: Path, *arguments: str) -> str:
    """Runs the image's entry point with another program in the place of Beam's."""
    (line,) = re.findall(r"^ENTRYPOINT (.+)$", DOCKERFILE, re.MULTILINE)
    command = [part.replace("/opt/apache/beam/boot", str(boot)) for part in json.loads(line)]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (("echo", "a command", "--id=1"), "a command --id=1\n"),
        (("--id=1", "--provision_endpoint=localhost:1"), "boot --id=1 --provision_endpoint=localhost:1\n"),
    ],
)
def test_entrypoint_runs_commands_and_starts_workers_of_dataflow(arguments, printed: str, tmp_path: Path) -> None:
    boot = tmp_path / "boot"
    boot.write_text('#!/bin/sh\necho boot "$@"\n')
    boot.chmod(0o755)
    assert entrypoint(boot, *arguments) == printed


def test_image_with_cuda_differs_by_nvidia_packages_only() -> None:
    def pins(name: str) -> set[str]:
        return set(re.findall(r"^[\w.\[\],-]+==\S+", (ROOT / name).read_text(), re.MULTILINE))

    without, with_cuda = pins("requirements-tfx1.21.lock"), pins("requirements-tfx1.21-cuda.lock")
    assert without < with_cuda
    assert all(pin.startswith("nvidia-") for pin in with_cuda - without)
