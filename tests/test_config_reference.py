import typing
from typing import Literal

import pydantic
import pytest
from conftest import ROOT

from pipeline.config import Config
from pipeline.config_reference import _section, reference

PAGE = ROOT / "docs" / "configuration.md"


def test_reference_is_as_committed():
    assert PAGE.read_text() == reference(), "run `make docs`"


def test_reference_has_every_setting():
    sections = reference().split("\n## ")
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel):
            (section,) = [one for one in sections if one.startswith(f"[{name}]\n")]
            for setting in field.annotation.model_fields:
                assert f"\n| `{setting}` | " in section, f"{name}.{setting}"


def test_reference_has_the_keys_of_a_threshold():
    (section,) = reference().split("\n### [[evaluation.thresholds]]\n")[1:]
    table = section.split("\n## ")[0]
    assert all(f"\n| `{key}` | " in table for key in ("metric", "class", "slice", "min", "max", "max_worsening"))
    assert '`"macro_recall"` or ' in table
    assert table.count("| required |") == 1


class _Base(pydantic.BaseModel):
    """The base.

    Attributes:
      first, second: share of something, in [0, 1), that
        needs two lines.
    """

    first: float = pydantic.Field(0.5, ge=0, lt=1)
    second: float | None = None


class _Settings(_Base):
    """Some settings.

    Attributes:
      third: a | b.
    """

    third: tuple[Literal["a", "b"], ...] = ("a",)


def test_section_takes_words_types_defaults_and_bounds_from_the_code():
    assert list(_section(_Settings)) == [
        "Some settings.",
        "",
        "| setting | type | default | |",
        "| --- | --- | --- | --- |",
        "| `first` | number ≥ 0 < 1 | `0.5` | share of something, in [0, 1), that needs two lines. |",
        "| `second` | number or nothing | `nothing` | share of something, in [0, 1), that needs two lines. |",
        '| `third` | list of `"a"` or `"b"` | `["a"]` | a \\| b. |',
    ]


def test_section_without_words_on_a_setting_is_found():
    undocumented = pydantic.create_model("Undocumented", __doc__="Nothing.", epochs=(int, 1))
    with pytest.raises(KeyError, match="epochs"):
        list(_section(typing.cast(type[pydantic.BaseModel], undocumented)))
