"""What `pipeline/README.md` promises: its settings are valid, its commands are known, and it names what the code asks for."""

import re
import shlex

import pytest
from conftest import ROOT

from pipeline import cloud_access, cloud_quota, deploy, predict, runs
from pipeline.config import load_config
from pipeline.vertex import require_settings

pytestmark = pytest.mark.one_stack

PAGE = ROOT / "pipeline" / "README.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
# A command each, with its continued lines; a here-document's lines are no commands.
COMMANDS = [
    " ".join(command.split())
    for kind, block in BLOCKS
    if not kind
    for command in re.sub(r"<<END\n.*?^END$", "", block, flags=re.MULTILINE | re.DOTALL).replace("\\\n", " ").splitlines()
    if command
]
PARSERS = {"runs": runs._parse_arguments, "deploy": deploy._parse_arguments, "predict": predict._parse_arguments}


def test_readme_settings_are_complete(tmp_path):
    (settings,) = [block for kind, block in BLOCKS if kind == "toml"]
    path = tmp_path / "vertex.toml"
    path.write_text(settings, encoding="utf-8")

    config = load_config(str(path), environment={})

    require_settings(config.vertex)
    assert config.pipeline_name == "flowers"


@pytest.mark.parametrize("command", [one for one in COMMANDS if one.startswith("python -m pipeline.")])
def test_readme_commands_are_known(command):
    words = shlex.split(command, comments=True)

    PARSERS[words[2].removeprefix("pipeline.")](words[3:])


@pytest.mark.parametrize("command", [one for one in COMMANDS if re.match(r"(gcloud|docker push|python -m pipeline)\b", one)])
def test_readme_marks_what_needs_the_cloud(command):
    assert "☁" in command


def test_readme_gives_the_roles_that_are_checked():
    table = re.findall(r"^\| `(roles/[\w.]+)` \|", TEXT, re.MULTILINE)

    assert set(table) == {
        *(cloud_access._AIPLATFORM, cloud_access.STORAGE_ROLE, cloud_access.REGISTRY_ROLE),
        *(cloud_access._DATAFLOW, cloud_access._WORKER, cloud_access._ACT_AS),
    }


def test_readme_names_quotas_that_are_checked():
    names = set(re.findall(r"`custom_model_(?:training|serving)_(?:preemptible_)?(\w+)`", TEXT))

    assert "cpus" in names
    assert names - {"cpus"} <= set(cloud_quota._GPU_METRICS.values())


def test_readme_links_to_files_that_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in link]

    assert links
    for link in links:
        assert (PAGE.parent / link).is_file(), link
