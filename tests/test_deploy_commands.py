import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import vertex_stand_in
from conftest import ROOT
from endpoint_models import IMAGE_URI, PIPELINE, Shop, trained
from google.api_core import exceptions
from workspaces import Workspace

from data.errors import EXIT_DONE, EXIT_FAILED, EXIT_NOT_BLESSED, EXIT_WRONG_INPUT
from pipeline import canary, cloud_calls
from pipeline.deploy import main
from pipeline.model_digest import model_digest

pytestmark = pytest.mark.one_stack
google_cloud = vertex_stand_in.google_cloud


@pytest.fixture
def shop(google_cloud, monkeypatch):
    monkeypatch.setattr(cloud_calls, "RETRY", cloud_calls.RETRY.with_delay(0.01, 0.02).with_timeout(1.0))
    monkeypatch.setattr(cloud_calls, "POLLING", cloud_calls.POLLING.with_delay(0.02, 0.02).with_timeout(20))
    monkeypatch.setattr(canary, "_PATIENCE_SECONDS", 0.3)
    for name in [name for name in os.environ if name.startswith("TFX_VISION_")]:
        monkeypatch.delenv(name)
    return Shop(google_cloud)


@pytest.fixture
def config(shop, tmp_path) -> Path:
    """A TOML file as a user has it."""
    path = tmp_path / "vertex.toml"
    path.write_text(
        f'pipeline.name = "{PIPELINE}"\n[vertex]\nproject = "{shop.cloud.project}"\nbucket = "gs://{shop.bucket}"\n'
        f'image = "{IMAGE_URI}"\ncanary_images = 2\ntraffic_steps = [20, 50, 100]\n'
    )
    return path


def _bless(tmp_path: Path, number: int, **changes) -> list[str]:
    """Makes a run's folder with a model on this machine; returns the arguments that name it and its blessing."""
    run = tmp_path / f"run {number}"
    if not run.exists():
        shutil.copytree(trained(number), run)
    verdict = {
        "blessed": True,
        "reasons": [],
        "evaluator_blessed": True,
        "model_digest": model_digest(str(run / "model" / "Format-Serving")),
    }
    (run / "blessing").mkdir(exist_ok=True)
    (run / "blessing" / "serving_check.json").write_text(json.dumps(verdict | changes))
    (run / "blessing" / "INFRA_BLESSED").touch()
    return ["--model", str(run / "model"), "--blessing", str(run / "blessing")]


def _let_answer(shop: Shop, number: int, answer=None) -> None:
    """Has what is copied into the bucket answer; the stand-in looks for a folder above the model's, too."""
    shop.model(number, answer=answer)
    digest = model_digest(str(trained(number) / "model" / "Format-Serving"))
    uri = f"gs://{shop.bucket}/{PIPELINE}/deployed/{digest[:16]}"
    shop.cloud.answers[uri] = shop.cloud.answers[shop.model(number, answer=answer)]


def _line(text: str) -> str:
    """The only line of what a command wrote to standard error."""
    (line,) = text.splitlines()
    return line


def test_commands_bring_a_model_from_this_machine_into_use_and_back(shop, config, tmp_path, capfd):
    target = ["--config", str(config)]
    for number in (1, 2):
        _let_answer(shop, number)

    assert main(["canary", *_bless(tmp_path, 1), *target]) == EXIT_DONE
    assert shop.traffic == {"1": 100}
    assert main(["canary", *_bless(tmp_path, 2), *target, "--run", "Run 2"]) == EXIT_DONE

    assert shop.traffic == {"1": 80, "2": 20}
    out = capfd.readouterr().out
    assert "Blessed by the Evaluator and the serving check, SHA-256 " in out
    assert "Version 2 has 20 % of the traffic: 2 images are answered as expected: no probability differs by more than" in out
    assert re.search(
        r"Serves  projects/.*/models/tfx-vision-flowers@2, 20 % of the traffic\nat      projects/.*\nGo on with", out
    )
    upload = shop.cloud.sent("UploadModel")[1].model
    assert re.fullmatch(rf"gs://{shop.bucket}/flowers/deployed/[0-9a-f]{{16}}/model/\d+", upload.artifact_uri)
    assert model_digest(upload.artifact_uri) == model_digest(str(trained(2) / "model" / "Format-Serving"))
    assert re.fullmatch(r"run-2-[0-9a-f]{8}", upload.labels["tfx-vision-run"])
    assert re.fullmatch(r"[0-9a-f]{16}", upload.labels["tfx-vision-code"])

    assert main(["promote", *target, "--to", "50"]) == EXIT_DONE
    assert shop.traffic == {"1": 50, "2": 50}
    assert main(["promote", *target]) == EXIT_DONE  # the references were copied along
    assert shop.traffic == {"2": 100}
    assert main(["rollback", *target]) == EXIT_DONE
    assert shop.traffic == {"1": 100}
    assert main(["rollback", *target]) == EXIT_WRONG_INPUT
    assert main(["rollback", *target, "--version", "2"]) == EXIT_DONE
    assert shop.traffic == {"2": 100}
    assert len(shop.cloud.sent("UploadModel")) == 2


def test_canary_takes_the_share_that_it_is_told(shop, config, tmp_path):
    _let_answer(shop, 1)
    _let_answer(shop, 2)
    shop.deploy(1)

    assert main(["canary", *_bless(tmp_path, 2), "--config", str(config), "--share", "5"]) == EXIT_DONE

    assert shop.traffic == {"1": 95, "2": 5}


def test_push_to_an_endpoint_takes_all_steps(shop, config, tmp_path):
    _let_answer(shop, 2)
    shop.configure(endpoint="in use")
    shop.deploy(1)

    assert main(["push", *_bless(tmp_path, 2), "--endpoint", "in use", "--config", str(config)]) == EXIT_DONE

    assert shop.traffic == {"2": 100}
    splits = [sorted(request.endpoint.traffic_split.values()) for request in shop.cloud.sent("UpdateEndpoint")]
    assert splits == [[50, 50], [100]]


def test_canary_deploys_from_a_bucket_without_a_copy(shop, config):
    uri = shop.model(1)
    verdict = {"blessed": True, "evaluator_blessed": True, "model_digest": model_digest(uri)}
    (folder := shop.cloud.storage.path(f"gs://{shop.bucket}/blessing")).mkdir()
    (folder / "serving_check.json").write_text(json.dumps(verdict))
    (folder / "INFRA_BLESSED").touch()
    model = ["--model", uri.removesuffix("/Format-Serving"), "--blessing", f"gs://{shop.bucket}/blessing"]

    assert main(["canary", *model, "--config", str(config)]) == EXIT_DONE

    assert [request.model.artifact_uri for request in shop.cloud.sent("UploadModel")] == [uri]
    assert len(shop.cloud.sent("Predict")) == 2


def test_canary_finds_references_by_the_workspace(shop, config, tmp_path):
    workspace = Workspace(tmp_path / "runs" / PIPELINE)
    run = workspace.begin("first")
    trainer = workspace.folder / "pipeline" / "Trainer"
    shutil.copytree(trained(1) / "model", trainer / "model" / "7")
    shutil.copytree(trained(1) / "model_run", trainer / "model_run" / "7")
    (model,) = workspace.execute(run, "Trainer", outputs={"model": workspace.artifact("Model", trainer / "model" / "7")})
    workspace.evaluate(run, model, blessed=True)
    workspace.check(run, model, blessed=True)
    pushed = shutil.copytree(trainer / "model" / "7" / "Format-Serving", workspace.folder / "serving_model" / "17")
    _let_answer(shop, 1)

    assert main(["canary", "--model", str(pushed), "--config", str(config)]) == EXIT_DONE

    assert len(shop.cloud.sent("Predict")) == 2
    assert shop.traffic == {"1": 100}


@pytest.mark.parametrize("command", ["canary", "push"])
@pytest.mark.parametrize(
    "changes", [{"blessed": False, "reasons": ["too slow"]}, {"evaluator_blessed": False}, {"model_digest": "0" * 64}]
)
def test_nothing_is_deployed_without_both_blessings(shop, config, tmp_path, capfd, command, changes):
    model = _bless(tmp_path, 1, **changes)
    endpoint = ["--endpoint", "flowers", "--config", str(config)]

    assert main([command, *model, *endpoint]) == EXIT_NOT_BLESSED

    assert _line(capfd.readouterr().err).startswith(f"error: Expected {model[1]}/Format-Serving to have both blessings")
    assert shop.cloud.requests == []
    assert not any(shop.cloud.storage.path(f"gs://{shop.bucket}").iterdir())


def test_canary_that_answers_otherwise_ends_in_one_line(shop, config, tmp_path, capfd):
    _let_answer(shop, 2)
    shop.deploy(1)

    def fail(instances):
        raise exceptions.FailedPrecondition("the container has crashed")

    _let_answer(shop, 2, fail)

    assert main(["canary", *_bless(tmp_path, 2), "--config", str(config)]) == EXIT_FAILED

    line = _line(capfd.readouterr().err)
    assert line.startswith("error: Expected version 2 to answer on the endpoint flowers as in training. Received: ")
    assert line.endswith("the container has crashed. It is refused and taken back. Version 1 has all of the traffic.")
    assert shop.traffic == {"1": 100}


def test_status_shows_what_there_is(shop, config, capfd):
    target = ["--config", str(config)]
    assert main(["status", *target]) == EXIT_DONE
    assert capfd.readouterr().out.split() == ["Endpoint", "none", "Nothing", "is", "deployed.", "Model", "none"]
    shop.deploy(1)
    shop.deploy(2, steps=(10,))

    assert main(["status", *target]) == EXIT_DONE

    out = capfd.readouterr().out
    assert re.search(r"^2 +on trial +n1-standard-4 +1 to 1 +\d{4}-\d\d-\d\d \d\d:\d\d +10 % *$", out, re.MULTILINE)
    assert re.search(r"^1 +default +n1-standard-4 .* 90 % *$", out, re.MULTILINE)
    digest = model_digest(str(trained(2) / "model" / "Format-Serving"))
    assert re.search(rf"^2 +canary +{digest[:16]} +\d{{4}}-\d\d-\d\d \d\d:\d\d +flowers-2025-2 *$", out, re.MULTILINE)

    assert main(["status", *target, "--json"]) == EXIT_DONE

    facts = json.loads(capfd.readouterr().out)
    assert facts["endpoint"] in shop.cloud.endpoints
    assert [(one["version"], one["aliases"], one["digest"]) for one in facts["versions"]] == [
        ("2", ["canary"], digest[:32]),
        ("1", ["default"], model_digest(str(trained(1) / "model" / "Format-Serving"))[:32]),
    ]
    assert [(one["version"], one["role"], one["traffic_percent"]) for one in facts["deployed"]] == [
        ("2", "on trial", 10),
        ("1", "default", 90),
    ]
    assert facts["under_way"] == []


def test_status_says_what_is_under_way(shop, config, capfd):
    shop.deploy(1)
    shop.cloud.operation_seconds["UndeployModel"] = 60
    (endpoint,) = shop.cloud.endpoints.values()
    rollout = shop.rollout()
    rollout.endpoint.find()
    rollout.endpoint._client.undeploy_model(endpoint=endpoint.name, deployed_model_id=endpoint.deployed_models[0].id)

    assert main(["status", "--config", str(config)]) == EXIT_DONE

    assert f"Under way  {endpoint.name}/operations/" in capfd.readouterr().out


def test_undeploy_wants_to_be_told_twice(shop, config, capfd):
    shop.deploy(1)
    target = ["--config", str(config)]

    assert main(["undeploy", *target, "--all"]) == EXIT_WRONG_INPUT

    assert "Expected --yes with --all where nobody can be asked." in _line(capfd.readouterr().err)
    assert main(["undeploy", *target]) == EXIT_DONE
    assert shop.traffic == {"1": 100}
    assert main(["undeploy", *target, "--all", "--yes", "--delete-endpoint"]) == EXIT_DONE
    assert not shop.cloud.endpoints
    assert main(["undeploy", *target, "--all", "--yes", "--delete-endpoint"]) == EXIT_DONE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status"], "Expected --project and --pipeline. Received: nothing."),
        (["status", "--project", "p"], "Expected --pipeline. Received: nothing."),
        (["promote", "--project", "p", "--pipeline", "x", "--config", "nowhere.toml"], "Expected --config to be a TOML file."),
        (["status", "--project", "p", "--pipeline", "x", "--set", "vertex.regoin=y"], "Did you mean `vertex.region`?"),
        (
            ["status", "--project", "other", "--pipeline", "x"],
            "Expected permission to list endpoints. Received: Permission denied",
        ),
        (
            ["promote", "--project", "test-project", "--pipeline", "x"],
            "Expected an endpoint 'x' in us-central1. Received: none.",
        ),
        (
            ["rollback", "--project", "test-project", "--pipeline", "x"],
            "Expected an endpoint 'x' in us-central1. Received: none.",
        ),
        (["push", "--model", "m", "--destination", "d", "--project", "p"], "Expected --project with --endpoint only."),
    ],
)
def test_commands_say_what_is_wrong_in_one_line(shop, capfd, arguments, message):
    assert main(arguments) == EXIT_WRONG_INPUT

    assert message in _line(capfd.readouterr().err)
    assert all(method.startswith("List") for method, _ in shop.cloud.requests)


@pytest.mark.parametrize(
    ("setting", "options", "message"),
    [
        ("vertex.image=''", [], "Expected the container image that serves. Received: none. Set `vertex.image`"),
        ("vertex.bucket=''", [], "Expected a bucket to copy"),
        ("vertex.bucket='gs://no-bucket'", [], "Expected `vertex.bucket` to exist. Received: gs://no-bucket."),
        ("vertex.canary_images=1", ["--references", "nowhere"], "Expected --references to be a file. Received: 'nowhere'."),
    ],
)
def test_canary_says_which_setting_is_missing(shop, config, tmp_path, capfd, setting, options, message):
    arguments = ["canary", *_bless(tmp_path, 1), "--config", str(config), "--set", setting, *options]

    assert main(arguments) == EXIT_WRONG_INPUT

    assert message in _line(capfd.readouterr().err)
    assert not shop.cloud.requests


def test_canary_wants_references_unless_it_is_told_not_to(shop, config, tmp_path, capfd):
    _let_answer(shop, 1)
    model = _bless(tmp_path, 1)
    shutil.rmtree(tmp_path / "run 1" / "model_run")

    assert main(["canary", *model, "--config", str(config)]) == EXIT_WRONG_INPUT
    assert "Name the file with --references, or compare no answers: --unchecked." in _line(capfd.readouterr().err)
    assert main(["canary", *model, "--config", str(config), "--unchecked"]) == EXIT_DONE

    assert shop.cloud.sent("Predict") == []
    assert shop.traffic == {"1": 100}


def test_settings_come_from_the_environment_too(shop, monkeypatch, capfd):
    shop.configure(endpoint="in use")
    shop.deploy(1)
    monkeypatch.setenv("TFX_VISION_VERTEX__PROJECT", shop.cloud.project)
    monkeypatch.setenv("TFX_VISION_VERTEX__ENDPOINT", "not this one")
    monkeypatch.setenv("TFX_VISION_PIPELINE__NAME", PIPELINE)

    assert main(["status", "--endpoint", "in use", "--json"]) == EXIT_DONE

    assert json.loads(capfd.readouterr().out)["endpoint"] in shop.cloud.endpoints


def test_commands_end_with_a_line_when_they_are_interrupted(shop, monkeypatch, capfd):
    def interrupt(*unused):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.deploy_vertex.read_settings", interrupt)

    assert main(["status", "--project", "p", "--pipeline", "x"]) == 130

    assert _line(capfd.readouterr().err) == "error: interrupted. Repeat the command; it goes on from what is there."


def test_status_answers_in_a_process_of_its_own_without_tensorflow(shop):
    """With a word to say, and nothing on standard error, where Google's libraries like to speak."""
    shop.deploy(1)
    code = (
        "import sys; from pipeline.deploy import main; code = main(sys.argv[1:]); "
        "assert not {'tensorflow', 'tfx', 'keras'} & set(sys.modules); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "status", "--project", shop.cloud.project, "--pipeline", PIPELINE]
    environment = {**os.environ, **shop.cloud.environment}

    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)

    assert (done.returncode, done.stderr) == (EXIT_DONE, "")
    assert re.search(r"^1 +default +n1-standard-4 .* 100 %", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("command", ["push", "canary", "promote", "rollback", "undeploy", "status"])
def test_help_loads_no_heavy_library(command):
    code = (
        "import sys; from pipeline.deploy import main\ntry: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not {'tensorflow', 'google.api_core'} & set(sys.modules); raise"
    )

    done = subprocess.run([sys.executable, "-c", code, command, "--help"], cwd=ROOT, capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")
    assert "--pipeline NAME" in done.stdout
