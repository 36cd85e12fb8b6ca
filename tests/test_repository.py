"""What the repository promises of its own files."""

import re

import pytest
from conftest import ROOT

LOCKS = sorted(ROOT.glob("*.lock"))
README = ROOT / "README.md"
# A path of ours in backticks or as a link's target; what a run writes, such as `report.html`, has no folder of ours.
_PATH = re.compile(
    r"(?:`|\]\()((?:(?:data|preprocessing|models|pipeline|notebooks|tests|docs)/[\w./-]+|\w+_runner\.py))(?:`|\)|#)"
)
_HOST = re.compile(r"\b(?:https?|ftp)://[^\s\"']+|--(?:extra-)?index-url|--find-links|--trusted-host")


def _missing_paths(text: str) -> list[str]:
    return [path for path in _PATH.findall(text) if not (ROOT / path).exists()]


@pytest.mark.skipif(not LOCKS, reason="there is no lock")
def test_locks_name_no_host():
    for lock in LOCKS:
        assert _HOST.findall(lock.read_text(encoding="utf-8")) == [], lock.name


@pytest.mark.skipif(not LOCKS, reason="there is no lock")
def test_locks_pin_every_package_with_its_hash():
    for lock in LOCKS:
        text = lock.read_text(encoding="utf-8").replace("\\\n", " ")
        requirements = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        assert requirements, lock.name
        for requirement in requirements:
            assert re.match(r"[\w.\[\],-]+==\S+ ", requirement), requirement[:80]
            assert "--hash=sha256:" in requirement, requirement[:80]


@pytest.mark.parametrize("line", ["a==1 @ https://example.org/a.whl", "--index-url http://example.org", "--find-links wheels"])
def test_a_host_in_a_lock_is_found(line):
    assert _HOST.search(line)


@pytest.mark.skipif(not README.exists(), reason="there is no README")
def test_readme_names_paths_that_exist():
    text = README.read_text(encoding="utf-8")

    assert _missing_paths(text) == []


def test_a_path_that_does_not_exist_is_found():
    assert _missing_paths("`data/nowhere.py`, [x](models/nowhere.py), `data/features.py`, `report.html`") == [
        "data/nowhere.py",
        "models/nowhere.py",
    ]
