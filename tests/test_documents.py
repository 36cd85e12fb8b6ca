"""What the documents say is true: their commands run, their links lead somewhere, their messages and options exist.

A fenced command is executed here, in a temporary folder that looks like the project to a user, with small data and the preset
`smoke` from the environment. What is not: commands that need Google Cloud (a block after `<!-- cloud -->`, or a line with ☁) or
Docker (`<!-- docker -->`), whose options are compared all the same; and those of `ELSEWHERE`, which another test runs. A block
of `text` after commands is their output: its lines must come, in that order, whatever their numbers are.
"""

import ast
import contextlib
import functools
import importlib
import io
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import ROOT
from documents import PROGRAMS, Block, blocks, code_spans, links, missing_links, missing_output, program, without_blocks
from PIL import Image
from server_process import ServerProcess

from data.sources import ELPV_CLASS_NAMES

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "data/README.md", "notebooks/README.md", "pipeline/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
PICTURES = sorted((ROOT / "docs" / "pictures").iterdir())
MAX_PICTURES_BYTES = 600_000
LANGUAGES = {"", "bash", "text", "toml", "python"}
# Command -> the test that runs it, as it takes long.
ELSEWHERE = {
    'make run ARGS="--data photos/"': "test_local_runner.py::test_first_run_executes_every_component_and_pushes",
    'make run ARGS="--data photos.csv"': "test_local_runner.py::test_extra_column_becomes_a_slice",
    'make run ARGS="--data tfrecords/"': "test_local_runner.py::test_data_gate_stops_records_that_disobey_the_schema",
    "tfx pipeline create --engine=vertex --pipeline_path=kubeflow_runner.py": (
        "test_kubeflow_runner.py::test_tfx_command_updates_compiles_lists_and_deletes"
    ),
}
SMOKE = {
    "TFX_VISION_PRESET": "smoke",  # whatever a document's own TOML says
    "TFX_VISION_DATA__VALID_FRACTION": "0.2",  # so that a few dozen images judge a model fairly
    "TFX_VISION_DATA__TEST_FRACTION": "0.3",
}
DEFAULT_DATA = "TFX_VISION_DATA__INPUT", "cells/elpv.csv"  # in the place of the data set, whose name the workspace keeps
ENDS = {"data.prepare": (0,), "pipeline.predict": (0, 4)}  # exit codes; 4 where small data have drifted

_WITH_SUBCOMMANDS = {"pipeline.predict", "pipeline.deploy", "pipeline.runs"}
_OURS = re.compile(r"\bpython (?:-m )?((?:data|models|pipeline)\.\w+|\w+_runner\.py|tests/benchmarks/\w+\.py)(.*)")
_OF_A_MACHINE = re.compile(
    r"(?<![\w.$}])/(?:home|root|tmp|work|mnt|opt|Users)/|pypi|pythonhosted|--(?:extra-)?index-url|\d+(?:\.\d+){3}"
)
_VERSION = re.compile(r"(?<=runs/elpv/serving_model/)\d+")

every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: name_of(path))
pytestmark = pytest.mark.one_stack


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@every_document
def test_documents_link_to_what_exists(path: Path):
    assert missing_links(read(path), path) == []


@pytest.mark.parametrize("link", ["nowhere.md", "#nowhere", "README.md#nowhere", "docs/nowhere.png"])
def test_missing_links_finds_what_does_not_exist(link: str):
    text = f"# Here it is: `x`\n[a](#here-it-is-x) [b](README.md#quick-start) `[c](d)`\n```text\n[e](f)\n```\n![g]({link})"
    assert missing_links(text, ROOT / "document.md") == [link]


@every_document
def test_documents_name_no_machine_and_no_host_of_packages(path: Path):
    assert _OF_A_MACHINE.findall(read(path).replace("0.0.0.0", "")) == []
    assert socket.gethostname() not in read(path)


def test_a_path_of_a_machine_is_found():
    assert _OF_A_MACHINE.search("wrote `/home/someone/x`")
    assert not _OF_A_MACHINE.search("docs/work/x, gs://bucket/tmp/x, $BUCKET/tmp/x")


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_pictures_are_linked_and_not_blank(path: Path):
    assert any(link.endswith(f"pictures/{path.name}") for document in DOCUMENTS for link in links(read(document)))
    if path.suffix == ".svg":
        texts = xml.etree.ElementTree.parse(path).getroot().iter("{http://www.w3.org/2000/svg}text")
        assert len([text.text for text in texts if text.text]) > 20
    else:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L"), np.float32)
        assert min(pixels.shape) >= 400
        assert pixels.std() > 20


def test_pictures_are_small_to_load():
    assert sum(path.stat().st_size for path in PICTURES) <= MAX_PICTURES_BYTES


@every_document
def test_blocks_have_a_known_language_and_known_programs(path: Path):
    for block in blocks(read(path)):
        assert block.language in LANGUAGES, f"line {block.line}"
        assert block.language or path.parent.name in ("pipeline", "notebooks"), f"line {block.line}: a block without a language"
        if block.has_commands:
            assert {program(command) for command in block.commands} <= PROGRAMS, f"line {block.line}"
        elif block.language == "python":
            compile("\n".join(block.lines), name_of(path), "exec")


def test_commands_of_a_block_are_whole():
    lines = ("cat > x <<END", "python x \\", "END", "for a in b; do", "  c  # ☁", "done", "", "make \\", "  run")
    block = Block(1, "", "", lines)
    assert block.commands == ["cat > x <<END\npython x \\\nEND", "for a in b; do\n  c  # ☁\ndone", "make \\\n  run"]
    assert block.has_commands
    assert not Block(1, "", "", ("run = fee + hours",)).has_commands


def all_commands() -> Iterator[tuple[str, str]]:
    """Every command of every document with its place: fenced, also those for the cloud and Docker, and in a line of text."""
    for path in DOCUMENTS:
        text = read(path)
        for block in blocks(text):
            if block.has_commands:
                for command in block.commands:
                    yield f"{name_of(path)}:{block.line}", command.replace("\\\n", " ")
        for span in code_spans(text):
            if re.match(r"(\.venv/bin/)?python |make |tfx ", span):
                yield name_of(path), span


@functools.cache
def usage(program: str, subcommand: str) -> str:
    """The help text of a command of ours; of a benchmark its source."""
    if program.startswith("tests/"):
        return read(ROOT / program)
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
        importlib.import_module(program.removesuffix(".py")).main([*filter(None, [subcommand]), "--help"])
    return printed.getvalue()


def unknown_options(command: str) -> list[str]:
    """The options in a command of ours that it does not have; a module that does not exist raises."""
    unknown = []
    for line in command.splitlines():
        if not (match := _OURS.search(line)):
            continue
        program, arguments = match[1], match[2].split(" -- ")[0].split(" #")[0]
        first = re.match(r" ([a-z]+)", arguments)
        text = usage(program, first[1] if first and program in _WITH_SUBCOMMANDS else "")
        options = re.findall(r"(?<=\s)--[a-z][\w-]*", arguments)
        unknown += [option for option in options if not re.search(rf"{option}(?![\w-])", text)]
    return unknown


@pytest.mark.end_to_end
def test_documented_options_and_targets_exist():
    makefile, num_checked = read(ROOT / "Makefile"), 0
    for place, command in all_commands():
        assert unknown_options(command) == [], f"{place}: {command}"
        num_checked += bool(_OURS.search(command))
        if make := re.match(r"make ([a-z][\w-]*)", command):
            assert re.search(rf"^{make[1]}:", makefile, re.MULTILINE), f"{place}: {command}"
        for target in re.findall(r"docker build .*--target (\w+)", command):
            assert f" AS {target}\n" in read(ROOT / "Dockerfile"), f"{place}: {command}"
        if arguments := re.search(r'ARGS="(--[^"]*)"', command):
            assert unknown_options(f"python local_runner.py {arguments[1]}") == [], f"{place}: {command}"
    assert num_checked > 40


def test_unknown_options_finds_one_that_does_not_exist():
    assert unknown_options("docker run x python -m pipeline.runs submit --wait --await # --no") == ["--await"]
    assert unknown_options("python -m data.prepare --input x --output=y -- --runner=z") == []
    with pytest.raises(ModuleNotFoundError):
        unknown_options("python -m pipeline.nowhere")


@every_document
def test_settings_in_documents_are_valid(path: Path, tmp_path: Path):
    from pipeline.config import load_config

    for block in blocks(read(path)):
        if block.language == "toml":
            (tmp_path / "settings.toml").write_text("\n".join(block.lines), encoding="utf-8")
            load_config(str(tmp_path / "settings.toml"), environment={})


@functools.cache
def texts_of_the_code() -> str:
    """Every text in the code, with a zero in the place of each value; and the Makefile."""
    found = [read(ROOT / "Makefile")]
    for path in (path for folder in ("data", "preprocessing", "models", "pipeline") for path in (ROOT / folder).glob("*.py")):
        for node in ast.walk(ast.parse(read(path))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join([*found, read(ROOT / "local_runner.py")])


def unknown_messages(text: str) -> list[str]:
    """The messages in the first column of tables that no part of the code has; `...` stands for a value."""
    first_cells = re.findall(r"^\| (`.+?`) \|", without_blocks(text), re.MULTILINE)
    spans = [span for cell in first_cells for span in code_spans(cell) if re.search(r"Expected |Received: |^to ", span)]
    parts = [part.strip() for span in spans for part in span.split("...") if len(part.strip()) > 3]
    return [part for part in parts if part not in texts_of_the_code()]


def test_messages_in_documents_are_those_of_the_code():
    for path in DOCUMENTS:
        assert unknown_messages(read(path)) == [], name_of(path)
    assert len(re.findall(r"^\| `+ ?Expected", read(ROOT / "docs" / "troubleshooting.md"), re.MULTILINE)) > 15
    assert unknown_messages("| `Expected ... to dance. Received: ...` | x |") == ["to dance. Received:"]


def test_commands_that_run_elsewhere_do():
    documented = {_bare(command) for _, command in all_commands()}
    for command, place in ELSEWHERE.items():
        file, test = place.split("::")
        assert command in documented, "no document has it any more"
        assert f"def {test}(" in read(ROOT / "tests" / file)


def _bare(command: str) -> str:
    return " ".join(command.replace("\\\n", " ").split(" #")[0].split())


def test_missing_output_finds_a_line_that_was_not_printed():
    printed = 'Wrote /a/b.json\ntrain: 12 roses\n{"file": "x.png", "p": 0.5}\nSHA-256 0123456789abcdef…\n'
    line = '{"file": "y", "p": 1.25, …'
    assert missing_output(("train: 7 roses", line, "SHA-256 ffffffffffffffff…"), printed) == [line]
    assert missing_output(("Wrote …/b.json", "train: 7 roses", '{"file": "y", "p": …', "SHA-256 …"), printed) == []
    assert missing_output(("train: 7 roses", "Wrote …/b.json", "train: 7 daisies"), printed) == [
        "Wrote …/b.json",
        "train: 7 daisies",
    ]


class Reader:
    """A user who does what a document says, in the folder of the project."""

    def __init__(self, folder: Path, printed: Callable[[], str], monkeypatch: pytest.MonkeyPatch):
        self._folder, self._printed, self._monkeypatch = folder, printed, monkeypatch
        self._server: ServerProcess | None = None

    def do(self, command: str) -> str:
        """Runs a command and returns what it prints; AssertionError if it fails."""
        command = self._here(_bare(command) if "<<" not in command else command)
        if program(command) == "export":
            self._export(command)
            return ""
        if program(command) == "make":
            command = self._recipe(command)
        if program(command) != "python" or "$" in command:
            return self._shell(command)
        _, *arguments = shlex.split(command)
        module = arguments.pop(0).removesuffix(".py")
        module = arguments.pop(0) if module == "-m" else module
        if module == "models.server":
            self._serve(arguments)
            return ""
        return self._call(module, arguments)

    def _here(self, command: str) -> str:
        """Puts in what differs from run to run: the version that was pushed, and the port of the server."""
        if versions := sorted(self._folder.glob("runs/elpv/serving_model/*")):
            command = _VERSION.sub(versions[-1].name, command)
        return command.replace("localhost:8501", f"localhost:{self._server.port}") if self._server else command

    def _export(self, command: str) -> None:
        script = f"{command}\nenv -0"
        done = subprocess.run(["bash", "-c", script], cwd=self._folder, capture_output=True, text=True, check=True)
        for name, _, value in (line.partition("=") for line in done.stdout.split("\0")):
            if name and os.environ.get(name) != value and name not in ("_", "SHLVL"):
                self._monkeypatch.setenv(name, value)

    def _recipe(self, command: str) -> str:
        """What a target of the Makefile does once the environment is there."""
        lines = self._shell(f"{command} --dry-run --no-print-directory").splitlines()
        return lines[-1].replace(".venv/bin/python", "python")

    def _shell(self, command: str) -> str:
        environment = os.environ | {"PATH": f"{self._folder / '.venv' / 'bin'}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", "-euc", command], cwd=self._folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    def _serve(self, arguments: list[str]) -> None:
        if self._server is None:
            assert arguments[0] == "--model"
            self._server = ServerProcess(
                self._folder / "server.log", "--model", str(self._folder / arguments[1]), *arguments[2:]
            )
        assert "Classify images" in httpx.get(f"{self._server.url}/").text

    def _call(self, module: str, arguments: list[str]) -> str:
        if arguments[:1] == ["stream"]:
            arguments.append("--once")  # it would not end
        if arguments[:1] == ["online"]:
            arguments += ["--server", self._server.url]
        with self._monkeypatch.context() as patch:
            if module == "local_runner" and not {"--data", "--config"} & {*arguments}:
                patch.setenv(*DEFAULT_DATA)
            self._printed()
            code = importlib.import_module(module).main(arguments)
        printed = self._printed()
        assert code in ENDS.get(module, (0,)), printed[-2000:]
        return printed

    def leave(self) -> None:
        if self._server:
            self._server.stop()


@pytest.fixture
def project(tmp_path: Path, make_images, make_csv) -> Path:
    """A folder like a clone of the project with its environment, beside it the data that the documents speak of."""
    folder = tmp_path / "tfx-vision"
    folder.mkdir()
    for name in ("data", "preprocessing", "models", "pipeline", "Makefile", "local_runner.py", "kubeflow_runner.py"):
        (folder / name).symlink_to(ROOT / name)
    for lock in ROOT.glob("*.lock"):
        (folder / lock.name).symlink_to(lock)
    (folder / ".venv").symlink_to(sys.prefix)
    cells = make_images(folder / "cells", class_names=ELPV_CLASS_NAMES)
    listing = make_csv(cells / "elpv.csv", cells)
    listing.write_text(read(listing).replace("camera", "cell_type", 1))
    (cells / "labels.txt").write_text("\n".join(ELPV_CLASS_NAMES))
    photos = make_images(folder / "photos", num_per_class=40, class_names=("daisy", "roses", "tulips"), seed=6)
    make_csv(folder / "photos.csv", photos, cameras=("north",))
    shutil.copytree(photos / "daisy", folder / "inbox")
    shutil.copy(photos / "daisy" / "000.png", folder / "cell.png")
    return folder


@pytest.mark.end_to_end
def test_documented_commands_do_what_the_documents_say(project: Path, monkeypatch, capfd) -> None:
    for name, value in SMOKE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(project)
    own = {path.name for path in project.iterdir()} | {"runs"}
    num_done = 0
    for path in DOCUMENTS:
        with monkeypatch.context() as patch:
            reader = Reader(project, lambda: "".join(capfd.readouterr()), patch)
            try:
                num_done += _follow(path, reader, project)
            finally:
                reader.leave()
        for made in {made.name for made in project.iterdir()} - own:
            shutil.rmtree(made) if Path(made).is_dir() else Path(made).unlink()
    assert num_done > 20


def _follow(path: Path, reader: Reader, project: Path) -> int:
    """Does what a document says, from top to bottom; returns how many commands that were."""
    num_done, printed = 0, None
    for block in blocks(read(path)):
        if block.language == "toml" and "[vertex]" in block.lines:
            (project / "vertex.toml").write_text("\n".join(block.lines), encoding="utf-8")
        if block.language == "text" and printed is not None:
            assert missing_output(block.lines, printed) == [], f"{name_of(path)}:{block.line}: {printed}"
        printed = None
        if not block.has_commands or block.mark:
            continue
        printed = ""
        for command in block.commands:
            if "☁" in command or _bare(command) in ELSEWHERE:
                continue
            try:
                printed += reader.do(command)
            except Exception as error:
                raise AssertionError(f"{name_of(path)}:{block.line}: {command}: {error}") from error
            num_done += 1
    return num_done
