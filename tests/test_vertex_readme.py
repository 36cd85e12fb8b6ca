"""What `pipeline/README.md` promises beyond what `test_documents.py` asks of each document.

Its settings are complete, its commands have all of their arguments, and it names what the code asks for.
"""

import re
import shlex

import pytest
from conftest import ROOT
from documents import blocks

from pipeline import cloud_access, cloud_quota, deploy, predict, runs
from pipeline.config import load_config
from pipeline.vertex import require_settings

pytestmark = pytest.mark.one_stack

TEXT = (ROOT / "pipeline" / "README.md").read_text(encoding="utf-8")
BLOCKS = blocks(TEXT)
COMMANDS = [command.replace("\\\n", " ") for block in BLOCKS if block.has_commands for command in block.commands]
PARSERS = {"runs": runs._parse_arguments, "deploy": deploy._parse_arguments, "predict": predict._parse_arguments}


def test_readme_settings_are_complete(tmp_path):
    (settings,) = [block for block in BLOCKS if block.language == "toml"]
    path = tmp_path / "vertex.toml"
    path.write_text("\n".join(settings.lines), encoding="utf-8")

    config = load_config(str(path), environment={})

    require_settings(config.vertex)
    assert config.pipeline_name == "flowers"


@pytest.mark.parametrize("command", [one for one in COMMANDS if one.startswith("python -m pipeline.")])
def test_readme_commands_have_all_arguments(command):
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
