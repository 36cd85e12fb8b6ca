"""The reference of every setting, made of the code: `make docs` writes it to docs/configuration.md.

    python -m pipeline.config_reference > docs/configuration.md

Names, types, defaults and bounds are pydantic's; the words are those of the `Attributes:` in the sections' docstrings.
"""

import dataclasses
import inspect
import logging
import re
import sys
import types
import typing
from collections.abc import Iterator
from typing import Any

if __name__ == "__main__":  # before a library below warns on the terminal
    logging.getLogger().addHandler(logging.NullHandler())

import annotated_types
import pydantic

from pipeline.config import PRESETS, Config

_ATTRIBUTE = re.compile(r"^  (\w+(?:, \w+)*): ", re.MULTILINE)  # one, or several that share their words
_BOUNDS = {
    annotated_types.Ge: "≥ {ge}",
    annotated_types.Gt: "> {gt}",
    annotated_types.Le: "≤ {le}",
    annotated_types.Lt: "< {lt}",
}
_INTRODUCTION = """# Configuration

Every setting, as `make docs` reads it from the code. A setting comes from a TOML file (`--config my.toml`, or the file that
`TFX_VISION_CONFIG` names), from `--set section.key=value`, or from the environment as `TFX_VISION_SECTION__KEY=value`; later
ones of preset, file, environment and `--set` win. Values are TOML; what is no TOML is taken as text. Unknown settings are
errors that name the nearest known one.

A new preset changes the defaults below:

| preset | changes |
| --- | --- |
"""


def reference() -> str:
    """Returns the page, in Markdown."""
    lines = [_INTRODUCTION.rstrip("\n")]
    for preset, sections in PRESETS.items():
        changes = [f"`{section}.{key} = {_toml(value)}`" for section, keys in sections.items() for key, value in keys.items()]
        lines.append(f"| `{preset}` | {', '.join(changes) or 'nothing'} |")
    lines += ["", "At the top of the file, outside of a section:", ""]
    for name, field in Config.model_fields.items():
        if not _is_section(field.annotation):
            lines.append(f"- `{name}`: {_type(field.annotation)}; `{_toml(field.default)}` by default")
    for name, field in Config.model_fields.items():
        if _is_section(field.annotation):
            lines += ["", f"## [{name}]", "", *_section(field.annotation)]
            for key, table in _tables(field.annotation):
                lines += ["", f"### [[{name}.{key}]]", "", *_section(table)]
    return "\n".join(lines) + "\n"


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel)


def _tables(section: type[pydantic.BaseModel]) -> Iterator[tuple[str, type[pydantic.BaseModel]]]:
    """Finds the settings that are lists of tables: their names, and what one table is."""
    for name, field in section.model_fields.items():
        yield from ((name, one) for one in typing.get_args(field.annotation) if _is_section(one))


def _section(section: type[pydantic.BaseModel]) -> Iterator[str]:
    summary, words = _docstring(section)
    yield from (summary, "", "| setting | type | default | |", "| --- | --- | --- | --- |")
    for name, field in section.model_fields.items():
        limits = " ".join(_bounds(field.metadata))
        kind = f"{_type(field.annotation)} {limits}".strip()
        description = words[name].replace("|", "\\|")
        default = "required" if field.is_required() else f"`{_toml(field.get_default(call_default_factory=True))}`"
        yield f"| `{field.alias or name}` | {kind} | {default} | {description} |"


def _docstring(section: type[pydantic.BaseModel]) -> tuple[str, dict[str, str]]:
    """Returns the text before the attributes, and the words on each of them, inherited ones too.

    Raises:
      KeyError: by whoever looks up a setting that has none.
    """
    words: dict[str, str] = {}
    for declared_in in reversed(section.__mro__):
        text, _, attributes = inspect.cleandoc(declared_in.__doc__ or "").partition("Attributes:\n")
        parts = _ATTRIBUTE.split(attributes)
        pairs = zip(parts[1::2], parts[2::2], strict=True)
        words |= {name: " ".join(part.split()) for names, part in pairs for name in names.split(", ")}
    return " ".join(text.split()), words


def _type(annotation: Any) -> str:
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return " or ".join(f"`{_toml(value)}`" for value in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("nothing" if argument is type(None) else _type(argument) for argument in arguments)
    if origin in (tuple, list):
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return "table of texts"
    if _is_section(annotation):
        return "table"
    names = {bool: "true or false", int: "whole number", float: "number", str: "text"}
    return names.get(annotation) or getattr(annotation, "__name__", str(annotation))


def _bounds(metadata: list[Any]) -> Iterator[str]:
    for bound in metadata:
        if template := _BOUNDS.get(type(bound)):
            yield template.format(**dataclasses.asdict(bound))


def _toml(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {_toml(item)}' for key, item in value.items())}}}"
    return f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.stdout.write(reference())
