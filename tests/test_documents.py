"""What the documents say is true: their commands run, their links lead somewhere, their messages and options exist.

A fenced command is executed here, in a temporary folder that looks like the project to a user, with small data and the preset
`smoke` from the environment. What is not: commands that need Google Cloud (a block after `<!-- cloud -->`, or a line with ☁) or
Docker (`<!-- docker -->`), whose options are compared all the same; and those of `ELSEWHERE`, which another test runs. A block
of `text` after commands is their output: its lines must come, in that order, whatever their numbers are. A reader has one
terminal: where a server runs in it, the text must say how to end it or ask for a second one, which is not in the environment.
"""

import ast
import contextlib
import functools
import importlib
import importlib.resources
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

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
    "tfx pipeline create --engine=vertex --pipeline_path=kubeflow_runner.py": (
        "test_kubeflow_runner.py::test_tfx_command_updates_compiles_lists_and_deletes"
    ),
}
SMOKE = {
    "TFX_VISION_PRESET": "smoke",  # whatever a document's own TOML says
    "TFX_VISION_DATA__VALID_FRACTION": "0.2",  # so that a few dozen images judge a model fairly
    "TFX_VISION_DATA__TEST_FRACTION": "0.3",
}
DEFAULT_DATA = "TFX_VISION_DATA__INPUT", "default/elpv.csv"  # in the place of the data set, whose name the workspace keeps
ENDS = {"data.prepare": (0,), "pipeline.predict": (0, 4)}  # exit codes; 4 where small data have drifted

_WITH_SUBCOMMANDS = {"pipeline.predict", "pipeline.deploy", "pipeline.runs"}
_OURS = re.compile(r"\bpython (?:-m )?((?:data|models|pipeline)\.\w+|\w+_runner\.py|tests/benchmarks/\w+\.py)(.*)")
_OF_A_MACHINE = re.compile(
    r"(?<![\w.$}])/(?:home|root|tmp|work|mnt|opt|Users)/|pypi|pythonhosted|--(?:extra-)?index-url|\d+(?:\.\d+){3}"
)
# Google Cloud's own, and one that the code puts together.
_NO_TEXT_OF_OURS = ("The following quota metrics exceed quota limits: ...", "Not blessed ... Refused by: Evaluator")

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
            elif re.match(r"--(?:preset|data|set) (?!section\.)\S", span):  # of a run, as in the table of results
                yield name_of(path), f"python local_runner.py {span}"


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
    from pipeline.config import load_config

    makefile, num_checked = read(ROOT / "Makefile"), 0
    for place, command in all_commands():
        assert unknown_options(command) == [], f"{place}: {command}"
        num_checked += bool(_OURS.search(command))
        if make := re.match(r"make ([a-z][\w-]*)", command):
            assert re.search(rf"^{make[1]}:", makefile, re.MULTILINE), f"{place}: {command}"
        for override in re.findall(r"--set ([a-z_]+(?:\.[a-z_]+)?=[^\s`\"]+)", command):
            load_config(overrides=[override], environment={})
        for target in re.findall(r"docker build .*--target (\w+)", command):
            assert f" AS {target}\n" in read(ROOT / "Dockerfile"), f"{place}: {command}"
        if arguments := re.search(r'ARGS="(--[^"]*)"', command):
            assert unknown_options(f"python local_runner.py {arguments[1]}") == [], f"{place}: {command}"
    assert num_checked > 40


def test_programs_of_the_environment_are_in_a_lock():
    for path in DOCUMENTS:
        for name in re.findall(r"\.venv/bin/(\w+)", read(path)):
            known = {"python": "pip==", "uv": "uv==", "jupyter": "jupyterlab==", "activate": ""}
            assert known[name] in read(ROOT / "requirements-tfx1.16.lock"), f"{name_of(path)}: {name}"


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("sys.version_info", "Expected Python 3.11. Received: "),
        ("ensurepip", "Expected Python 3.11 with venv."),
        ("Python.h", "Expected Python 3.11 with its headers"),
    ],
)
def test_setup_says_in_a_line_what_is_missing(missing: str, message: str, tmp_path: Path):
    done = set_up(tmp_path, f'*"{missing}"*) exit 1;;')
    assert done.stdout == ""
    assert message in done.stderr.splitlines()[0]
    assert done.stderr.startswith("error: ")


def test_setup_leaves_no_half_made_environment(tmp_path: Path):
    done = set_up(tmp_path, f'*"-m venv"*) mkdir -p {tmp_path}/venv/bin; touch {tmp_path}/venv/bin/python; exit 1;;')
    assert done.returncode == 2
    assert "Setting up" in done.stdout
    assert not (tmp_path / "venv").exists()


def set_up(folder: Path, case: str) -> subprocess.CompletedProcess[str]:
    """`make setup` into a new folder with a Python 3.11 that fails in a case of bash's `case "$*" in`."""
    python = folder / "python"
    python.write_text(f'#!/bin/bash\ncase "$*" in {case} esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "TFX")}
    command = ["make", "setup", f"PYTHON={python}", f"VENV={folder / 'venv'}"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


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
    return re.sub(r"\[(?:/|bold(?: \w+)?)\]", "", "\n".join([*found, read(ROOT / "local_runner.py")]))  # without rich's markup


def unknown_messages(text: str) -> list[str]:
    """The messages in the first column of tables of messages that no part of the code has; `...` stands for a value."""
    tables = re.findall(r"^\| message \|.*\n((?:\|.*\n)*)", f"{without_blocks(text)}\n", re.MULTILINE)
    first_cells = [cell for table in tables for cell in re.findall(r"^\| (`.+?`) \|", table, re.MULTILINE)]
    spans = [span for cell in first_cells for span in code_spans(cell) if span not in _NO_TEXT_OF_OURS]
    parts = [part.strip() for span in spans for part in span.split("...") if len(part.strip()) > 3]
    return [part for part in parts if not _is_said(part)]


def _is_said(message: str) -> bool:
    """Whether a text of the code has a message in it, at most one of whose words is a value."""
    words = message.split(" ")
    with_value = (" ".join([*words[:place], "\0", *words[place + 1 :]]) for place in range(len(words)) if len(words) > 2)
    return any(known in texts_of_the_code() for known in (message, *with_value))


def test_messages_in_documents_are_those_of_the_code():
    for path in DOCUMENTS:
        assert unknown_messages(read(path)) == [], name_of(path)
    assert len(re.findall(r"^\| `+ ?Expected", read(ROOT / "docs" / "troubleshooting.md"), re.MULTILINE)) > 15
    table = "| message | remedy |\n| --- | --- |\n"
    assert unknown_messages(f"{table}| `Expected ... to dance. Received: ...` | x |") == ["to dance. Received:"]
    assert unknown_messages(f"{table}| `Dance with it.` | x |\n| no message | `x` |") == ["Dance with it."]


def test_commands_that_run_elsewhere_do():
    documented = {_bare(command) for _, command in all_commands()}
    for command, place in ELSEWHERE.items():
        file, test = place.split("::")
        assert command in documented, "no document has it any more"
        (found,) = (node for node in ast.parse(read(ROOT / "tests" / file)).body if getattr(node, "name", "") == test)
        source = ast.unparse(found)
        assert re.search(r"assert (?:code|done\.returncode) == 0\b", source), "a reader's command succeeds"


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

    servers: ClassVar[dict[tuple[str, ...], ServerProcess]] = {}  # kept, though a user ended them, as a start takes ten seconds

    def __init__(self, folder: Path, printed: Callable[[], str], monkeypatch: pytest.MonkeyPatch, *, in_environment: bool):
        self._folder, self._printed, self._monkeypatch = folder, printed, monkeypatch
        self._in_environment, self._holds_terminal = in_environment, False
        self._server: ServerProcess | None = None

    def take_in(self, text: str) -> None:
        """Does what the text between two blocks says."""
        if "Ctrl-C ends the server" in text:
            self._server, self._holds_terminal = None, False
        if "second terminal" in text:
            self._in_environment = self._holds_terminal = False
        if "source .venv/bin/activate" in text:
            self._in_environment = True

    def do(self, command: str) -> str:
        """Runs a command and returns what it prints; AssertionError if it fails."""
        assert not self._holds_terminal, "the server still runs in this terminal"
        command = self._here(_bare(command) if "<<" not in command else command)
        assert self._in_environment or program(command) != "python", "this terminal is not in the environment"
        self.take_in(command)
        if program(command) == "export":
            self._export(command)
            return ""
        if program(command) == "make":
            command = self._recipe(command)
        if program(command) != "python":
            return self._shell(command)
        _, *arguments = self._shell(f"printf '%s\\0' {command}").split("\0")[:-1]
        module = arguments.pop(0).removesuffix(".py")
        module = arguments.pop(0) if module == "-m" else module
        if module == "models.server":
            self._serve(arguments)
            return ""
        return self._call(module, arguments)

    def _here(self, command: str) -> str:
        """Puts in what differs from run to run: the port of the server."""
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
        option, model, *rest = arguments
        assert option == "--model"
        flags = (option, str(self._folder / model), *rest)
        if flags not in self.servers:
            self.servers[flags] = ServerProcess(self._folder.parent / "server.log", *flags)
        self._server, self._holds_terminal = self.servers[flags], True
        assert "Classify images" in httpx.get(self._server.page).text

    def _call(self, module: str, arguments: list[str]) -> str:
        if arguments[:1] == ["online"]:
            assert self._server, "no server runs"
            arguments += ["--server", self._server.url]
        with self._monkeypatch.context() as patch:
            if module == "local_runner" and not {"--data", "--config"} & {*arguments}:
                patch.setenv(*DEFAULT_DATA)
            self._printed()
            code = importlib.import_module(module).main(arguments)
        printed = self._printed()
        assert code in ENDS.get(module, (0,)), printed[-2000:]
        return printed


def test_reader_has_one_terminal_that_begins_outside_of_the_environment(tmp_path: Path, monkeypatch):
    reader = Reader(tmp_path, str, monkeypatch, in_environment=False)
    with pytest.raises(AssertionError, match="not in the environment"):
        reader.do("python -m data.prepare")
    reader._holds_terminal = True  # as a server does
    with pytest.raises(AssertionError, match="still runs in this terminal"):
        reader.do("mkdir -p inbox")
    reader.take_in("Ask it from a second terminal:")
    reader.do("mkdir -p inbox")
    assert (tmp_path / "inbox").is_dir()
    with pytest.raises(AssertionError, match="not in the environment"):
        reader.do("python -m data.prepare")


@pytest.fixture
def project(tmp_path: Path, make_images, make_csv) -> Iterator[Path]:
    """A folder like a clone of the project with its environment, and in it the reader's own photographs."""
    folder = tmp_path / "tfx-vision"
    folder.mkdir()
    for name in ("data", "preprocessing", "models", "pipeline", "Makefile", "local_runner.py", "kubeflow_runner.py"):
        (folder / name).symlink_to(ROOT / name)
    for lock in ROOT.glob("*.lock"):
        (folder / lock.name).symlink_to(lock)
    (folder / ".venv").symlink_to(sys.prefix)
    write_default_data(folder / "default")
    photos = make_images(folder / "photos", num_per_class=40, class_names=("daisy", "roses", "tulips"), seed=6)
    make_csv(folder / "photos.csv", photos, cameras=("north",))
    yield folder
    while Reader.servers:
        Reader.servers.popitem()[1].stop()


def write_default_data(folder: Path) -> None:
    """Lists 120 images of the default data: the surest of each class among the monocrystalline cells."""
    package = importlib.resources.files("elpv_dataset") / "data"
    cells = [line.split() for line in (package / "labels.csv").read_text().splitlines()]
    folder.mkdir()
    (folder / "labels.txt").write_text("\n".join(ELPV_CLASS_NAMES))
    rows = ["path,label,cell_type"]
    for name, of_defect in zip(ELPV_CLASS_NAMES, (0.0, 1.0), strict=True):
        surest = [path for path, probability, cell_type in cells if (float(probability), cell_type) == (of_defect, "mono")]
        rows += [
            f"{package / path},{name},{('a', 'b')[place % 2]}" for place, path in enumerate(surest[:: len(surest) // 60][:60])
        ]
    (folder / "elpv.csv").write_text("\n".join(rows))


@pytest.mark.end_to_end
def test_documented_commands_do_what_the_documents_say(project: Path, monkeypatch, capfd) -> None:
    for name, value in SMOKE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(project)
    own = {path.name for path in project.iterdir()} | {"runs"}
    num_done = 0
    for path in DOCUMENTS:
        with monkeypatch.context() as patch:
            is_first = path == ROOT / "README.md"  # which says that the pages are read in the environment
            reader = Reader(project, lambda: "".join(capfd.readouterr()), patch, in_environment=not is_first)
            num_done += _follow(path, reader, project)
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
        reader.take_in(block.before)
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
