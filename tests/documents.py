"""Reads the project's documents for `tests/test_documents.py`: their blocks, commands, links, headings and printed output."""

import dataclasses
import re
from pathlib import Path

PROGRAMS = {
    "bash",
    "cat",
    "cp",
    "curl",
    "docker",
    "export",
    "for",
    "gcloud",
    "head",
    "make",
    "mkdir",
    "python",
    "source",
    "tfx",
}

_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|<img[^>]* src=\"([^\"]+)\"")
_INLINE = re.compile(r"(?<!`)(`{1,2})(?!`)(.+?)(?<!`)\1(?!`)")
_VARYING = re.compile(r"(\s+|…|(?<=: )\"[^\"]*\"|[0-9a-f]{16,}|\d[\d,.:]*)")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
      line: of the document, at which it begins.
      language: as written behind the fence.
      mark: `cloud` or `docker` where a comment of that word stands before it.
      lines: what is in it.
      before: the text between it and the block before it.
    """

    line: int
    language: str
    mark: str
    lines: tuple[str, ...]
    before: str = ""

    @property
    def has_commands(self) -> bool:
        """Whether commands are in it; without a language, whether a line begins with a program."""
        return self.language == "bash" or (not self.language and any(program(line) in PROGRAMS for line in self.lines))

    @property
    def commands(self) -> list[str]:
        """Its commands, each whole: with the lines that it goes on in, up to `done` or the end of a here-document."""
        found, lines = [], iter(self.lines)
        for line in lines:
            if not line.strip() or line.startswith("#"):
                continue
            whole, here_document = line, re.search(r"<<\s*'?(\w+)", line)
            ending = here_document[1] if here_document else "done" if line.startswith("for ") else ""
            while ending or whole.rstrip().endswith("\\"):
                following = next(lines)
                whole += f"\n{following}"
                ending = "" if following.strip() == ending else ending
            found.append(whole)
        return found


def blocks(text: str) -> list[Block]:
    """Returns the fenced blocks of a document."""
    found: list[Block] = []
    mark, start, language, lines, before = "", 0, "", [], []
    for number, line in enumerate(text.splitlines(), 1):
        if start and line.strip() == "```":
            found.append(Block(start, language, mark, tuple(lines), " ".join(before)))
            mark, start, lines, before = "", 0, [], []
        elif start:
            lines.append(line)
        elif line.startswith("```"):
            start, language = number, line[3:].strip()
        elif line.strip():
            match = re.fullmatch(r"<!-- (cloud|docker) -->", line.strip())
            mark = match[1] if match else ""
            before.append(line.strip())
    if start:
        raise ValueError(f"Expected an end of the block of line {start}. Received: none.")
    return found


def program(command: str) -> str:
    """Returns the first word of a command."""
    return command.split()[0] if command.strip() else ""


def without_blocks(text: str) -> str:
    """Empties the lines of fenced blocks."""
    fenced = {number for block in blocks(text) for number in range(block.line - 1, block.line + len(block.lines) + 1)}
    return "\n".join("" if number in fenced else line for number, line in enumerate(text.splitlines()))


def code_spans(text: str) -> list[str]:
    """Returns what stands between backticks in a line of text."""
    return [span for _, span in _INLINE.findall(without_blocks(text))]


def links(text: str) -> list[str]:
    """Returns the targets of links and pictures."""
    prose = _INLINE.sub(lambda span: "" if "](" in span[2] else span[0], without_blocks(text))
    return [match[1] or match[2] for match in _LINK.finditer(prose)]


def anchors(text: str) -> set[str]:
    """Returns the anchors that GitHub gives the headings of a document."""
    titles = re.findall(r"^#+ (.+)$", without_blocks(text), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).strip().lower() for title in titles)
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}


def missing_links(text: str, path: Path) -> list[str]:
    """Returns the links of a document to files or headings that do not exist; other hosts are not asked."""
    missing = []
    for link in links(text):
        target, _, anchor = link.partition("#")
        if re.match(r"https?://|mailto:", link):
            continue
        file = (path.parent / target).resolve() if target else path
        is_missing = bool(target) and not file.exists()
        if is_missing or (anchor and anchor not in anchors(file.read_text(encoding="utf-8") if target else text)):
            missing.append(link)
    return missing


def missing_output(expected: tuple[str, ...], printed: str) -> list[str]:
    """Returns the lines that a document shows as output and that were not printed in their order.

    Numbers, digests, quoted values and … stand for any. Lines with a bar, and those that depend on the data altogether, may be
    missing.
    """
    missing, rest = [], printed
    for line in expected:
        if not line.strip() or "━" in line or "──" in line or line.startswith(("  - ", "elpv · ", "Nothing has moved")):
            continue
        if match := re.search(_pattern(line), rest):
            rest = rest[match.end() :]
        else:
            missing.append(line)
    return missing


def _pattern(line: str) -> str:
    return "".join(
        _pattern_of_varying(part) if number % 2 else re.escape(part) for number, part in enumerate(_VARYING.split(line.strip()))
    )


def _pattern_of_varying(part: str) -> str:
    if part == "…":
        return ".*"
    if part.isspace():
        return r"\s+"
    return r'"[^"]*"' if part.startswith('"') else r"[\w,.:]+"
