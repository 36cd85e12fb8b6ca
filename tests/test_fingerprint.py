import importlib.metadata
from pathlib import Path

import pytest

from data import fingerprint
from data.fingerprint import code_fingerprint, imported_modules

MODULES = {
    "data/base.py": '"""Base."""\n\nSIZE = 3  # pixels\n',
    "data/helper.py": "from data.base import SIZE\n\n\ndef double():\n    return 2 * SIZE\n",
    "data/unused.py": "X = 1\n",
    "models/net.py": "import keras\n\n\ndef build():\n    from data import helper\n\n    return helper.double()\n",
}


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small copy of the project's layout, which the module under test takes for the project."""
    for name, text in MODULES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(fingerprint, "_ROOT", tmp_path)
    return tmp_path


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_imported_modules_finds_ours_at_the_top_and_inside_functions(code):
    assert imported_modules("models.net") == {"data.helper"}
    assert imported_modules("data.helper") == {"data.base"}
    assert imported_modules("data.base") == set()


def test_imported_modules_finds_each_way_to_import(code):
    (code / "models/net.py").write_text("import data.base\nfrom data import unused\nfrom data.helper import double\n")

    assert imported_modules("models.net") == {"data.base", "data.unused", "data.helper"}


def test_code_fingerprint_is_16_hexadecimal_digits_and_repeats(code):
    first = code_fingerprint("models.net")

    assert len(first) == 16
    assert int(first, 16) >= 0
    assert code_fingerprint("models.net") == first


@pytest.mark.parametrize(("old", "new"), [("  # pixels", "  # points"), ("SIZE = 3", "SIZE   =   3"), ("SIZE", "\n\nSIZE")])
def test_code_fingerprint_ignores_comments_and_layout(code, old, new):
    before = code_fingerprint("models.net")
    path = code / "data/base.py"
    _edit(path, old, new)

    assert code_fingerprint("models.net") == before


def test_code_fingerprint_sees_a_change_in_the_module_itself(code):
    before = code_fingerprint("models.net")
    _edit(code / "models/net.py", "double()", "double() + 1")

    assert code_fingerprint("models.net") != before


def test_code_fingerprint_sees_a_change_two_imports_away(code):
    before = code_fingerprint("models.net")
    _edit(code / "data/base.py", "SIZE = 3", "SIZE = 4")

    assert code_fingerprint("models.net") != before


def test_code_fingerprint_ignores_a_module_that_is_not_imported(code):
    before = code_fingerprint("models.net")
    _edit(code / "data/unused.py", "X = 1", "X = 2")

    assert code_fingerprint("models.net") == before


def test_code_fingerprint_survives_modules_that_import_each_other(code):
    (code / "data/base.py").write_text("def size():\n    from data.helper import double\n\n    return double\n")

    assert code_fingerprint("data.base") != code_fingerprint("data.unused")


def test_code_fingerprint_counts_the_version_of_a_named_package(code, monkeypatch):
    alone = code_fingerprint("models.net")
    with_numpy = code_fingerprint("models.net", distributions=["numpy"])
    assert with_numpy != alone

    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version(name) + ".post1")
    assert code_fingerprint("models.net", distributions=["numpy"]) != with_numpy
    assert code_fingerprint("models.net") == alone


def test_code_fingerprint_reaches_preprocessing_and_models_from_the_real_trainer():
    assert {"models.classifier", "models.signatures", "preprocessing.transform"} <= imported_modules("models.trainer")
    assert len(code_fingerprint("models.trainer", distributions=["tensorflow"])) == 16
