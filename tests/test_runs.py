"""Runs on Vertex AI Pipelines, with the real client against the stand-in and jobs that `kubeflow_runner.py` compiled."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import vertex_stand_in
from conftest import ROOT
from google.api_core import exceptions
from google.cloud.aiplatform_v1 import JobServiceClient, types
from google.protobuf import json_format
from rich.console import Console
from vertex_stand_in import Fault, VertexStandIn

import kubeflow_runner
from data.errors import InputError
from pipeline.run_display import Display, duration
from pipeline.run_state import read_run
from pipeline.runs import main
from pipeline.submission import CompiledJob, find_job, new_run_name, read_job, read_parameters, run_request

google_cloud = vertex_stand_in.google_cloud

PLACE = f"projects/{vertex_stand_in.PROJECT_NUMBER}/locations/us-central1"
HERE = ["--project", vertex_stand_in.PROJECT, "--region", "us-central1"]
SETTINGS = {
    "TFX_VISION_PIPELINE__NAME": "flowers",
    "TFX_VISION_DATA__INPUT": "gs://bucket/records",
    "TFX_VISION_DATA__CLASS_NAMES": '["daisy", "rose"]',
    "TFX_VISION_DATA__SLICE_COLUMNS": "[]",
    "TFX_VISION_VERTEX__PROJECT": vertex_stand_in.PROJECT,
    "TFX_VISION_VERTEX__BUCKET": "gs://bucket",
    "TFX_VISION_VERTEX__IMAGE": "us-docker.pkg.dev/test-project/images/tfx-vision:1",
    "TFX_VISION_VERTEX__SERVICE_ACCOUNT": "steps@test-project.iam.gserviceaccount.com",
    "TFX_VISION_VERTEX__NETWORK": "projects/123/global/networks/inner",
    "TFX_VISION_VERTEX__LABELS": '{team = "garden"}',
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled job, in a folder of its own."""
    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        patch.chdir(folder)
        assert kubeflow_runner.main([]) == 0
    return folder / "pipeline.json"


@pytest.fixture
def here(compiled: Path, google_cloud: VertexStandIn, monkeypatch: pytest.MonkeyPatch) -> VertexStandIn:
    """The cloud, with the settings in the environment and the compiled job in the working folder."""
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(compiled.parent)
    return google_cloud


@pytest.fixture
def run(compiled: Path, google_cloud: VertexStandIn) -> str:
    """The id of a run that has begun."""
    return start(google_cloud, compiled, "flowers-1")


def start(cloud: VertexStandIn, compiled: Path, run: str, *, pipeline: str = "flowers") -> str:
    from pipeline.runs import _Place
    from pipeline.submission import create_run

    job = json.loads(compiled.read_text())
    job["displayName"] = job["pipelineSpec"]["pipelineInfo"]["name"] = pipeline
    create_run(_Place(cloud.project, "us-central1").client(), f"projects/{cloud.project}/locations/us-central1", job, run)
    cloud.pipelines.set_pipeline(run, "RUNNING")
    return run


def put_out(cloud: VertexStandIn, run: str, task: str, properties: dict[str, Any], *, uri: str) -> None:
    """Ends a task with an artifact, whose numbers are as TFX's entry point writes them."""
    cloud.pipelines.set_task(run, task, "SUCCEEDED")
    job = cloud.pipeline_jobs[f"{PLACE}/pipelineJobs/{run}"]
    details = list(job.job_detail.task_details)
    (detail,) = [one for one in details if one.task_name == task]
    artifact = types.Artifact(uri=uri, metadata=properties)
    detail.outputs = {"output": types.PipelineTaskDetail.ArtifactList(artifacts=[artifact])}
    job.job_detail.task_details = details


def train(cloud: VertexStandIn, run: str, *, state: str = "RUNNING") -> str:
    """Makes a training job as the step of a run does; returns its name."""
    machine = types.MachineSpec(machine_type="n1-standard-8")
    pool = types.WorkerPoolSpec(machine_spec=machine, replica_count=1, container_spec=types.ContainerSpec(image_uri="image:1"))
    job = types.CustomJob(display_name=run, job_spec=types.CustomJobSpec(worker_pool_specs=[pool]))
    client = JobServiceClient(client_options={"api_endpoint": "us-central1-aiplatform.googleapis.com"})
    cloud.jobs.run_custom_job = None
    name = client.create_custom_job(parent=f"projects/{cloud.project}/locations/us-central1", custom_job=job).name
    cloud.jobs.move(cloud.custom_jobs[name], state)
    return name


def training_state(cloud: VertexStandIn, job: str) -> str:
    return cloud.custom_jobs[job].state.name.removeprefix("JOB_STATE_")


# What is sent.


def test_submit_sends_the_compiled_job_with_the_settings_and_typed_parameters(here, compiled, capfd):
    assert main(["submit", "--parameter", "epochs=20", "--parameter", "min_accuracy=0.9"]) == 0

    (request,) = here.sent("CreatePipelineJob")
    job, content = request.pipeline_job, json.loads(compiled.read_text())
    assert request.parent == f"projects/{here.project}/locations/us-central1"
    assert re.fullmatch(r"flowers-\d{8}-\d{6}-[0-9a-f]{4}", request.pipeline_job_id)
    assert json_format.MessageToDict(types.PipelineJob.pb(job).pipeline_spec) == content["pipelineSpec"]
    assert dict(job.labels) == content["labels"] | {"team": "garden"}
    assert job.service_account == SETTINGS["TFX_VISION_VERTEX__SERVICE_ACCOUNT"]
    assert job.network == SETTINGS["TFX_VISION_VERTEX__NETWORK"]
    assert job.runtime_config.gcs_output_directory == "gs://bucket/pipeline_root/flowers"
    assert job.runtime_config.parameters["epochs"] == types.Value(int_value=20)
    assert job.runtime_config.parameters["min_accuracy"] == types.Value(double_value=0.9)
    assert job.runtime_config.parameters["records"] == types.Value(string_value="gs://bucket/records")
    assert set(job.runtime_config.parameters) == set(content["runtimeConfig"]["parameters"])
    out = capfd.readouterr().out
    assert f"Submitted {request.pipeline_job_id}" in out
    console = "https://console.cloud.google.com/vertex-ai/locations/us-central1/pipelines/runs"
    assert f"{console}/{request.pipeline_job_id}?project={vertex_stand_in.PROJECT_NUMBER}" in out
    assert f"python -m pipeline.runs wait {request.pipeline_job_id}`" in out


def test_submit_sends_what_the_sdk_itself_sends(here, compiled):
    from google.cloud import aiplatform

    aiplatform.init(project=here.project, location="us-central1")
    sdk = aiplatform.PipelineJob(
        display_name="flowers", template_path=str(compiled), parameter_values={"epochs": 20, "records": "gs://bucket/b"}
    )
    here.storage.create_bucket("bucket")
    sdk.submit(service_account=SETTINGS["TFX_VISION_VERTEX__SERVICE_ACCOUNT"])

    assert main(["submit", "--parameter", "epochs=20", "--parameter", "records=gs://bucket/b"]) == 0

    theirs, ours = (request.pipeline_job for request in here.sent("CreatePipelineJob"))
    assert ours.runtime_config == theirs.runtime_config
    assert ours.pipeline_spec == theirs.pipeline_spec
    assert (ours.display_name, ours.service_account) == (theirs.display_name, theirs.service_account)


def test_submit_takes_settings_and_names_the_run_so_that_it_is_found_without_them(here, capfd):
    account = "other@test-project.iam.gserviceaccount.com"

    assert main(["submit", "--name", "flowers-1", "--set", f"vertex.service_account={account}"]) == 0

    assert here.sent("CreatePipelineJob")[0].pipeline_job.service_account == account
    name = f"projects/{here.project}/locations/us-central1/pipelineJobs/flowers-1"
    assert f"python -m pipeline.runs wait {name}`" in capfd.readouterr().out


def test_submit_with_data_sets_records_and_schema(here):
    assert main(["submit", "--data", "gs://bucket/newer/"]) == 0

    (request,) = here.sent("CreatePipelineJob")
    parameters = request.pipeline_job.runtime_config.parameters
    assert parameters["records"].string_value == "gs://bucket/newer"
    assert parameters["schema"].string_value == "gs://bucket/newer/schema"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parameter", "epoch=20"], "Received: `epoch`. Did you mean `epochs`?"),
        (["--parameter", "epochs"], "Expected --parameter name=value. Received: 'epochs'."),
        (["--parameter", "epochs=2.5"], "Expected the parameter `epochs` to be a whole number. Received: '2.5'."),
        (["--parameter", "min_accuracy=high"], "Expected the parameter `min_accuracy` to be a number. Received: 'high'."),
        (["--parameter", "min_accuracy=nan"], "Expected the parameter `min_accuracy` to be a number. Received: 'nan'."),
        (["--parameter", "epochs=0"], "Received: training.epochs=0."),
        (["--parameter", "min_accuracy=1.5"], "Received: evaluation.min_accuracy=1.5."),
        (["--data", "photos"], "Expected --data to be a gs:// folder of records. Received: 'photos'."),
        (["--name", "My run"], "Expected --name in lower case"),
        (["--project", "other"], "Expected project test-project, which pipeline.json was compiled for. Received: other."),
        (["--region", "europe-west4"], "Expected region us-central1, which pipeline.json was compiled for."),
        (["--pipeline", "nowhere.json"], "Expected --pipeline to be a compiled job. Received: 'nowhere.json'"),
        (["--pipeline", "pipeline.yaml"], "which is for Kubeflow Pipelines"),
    ],
)
def test_submit_finds_what_is_wrong_before_anything_is_sent(here, capfd, arguments, message):
    assert main(["submit", *arguments]) == 2

    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert here.requests == []


@pytest.mark.parametrize("bucket", ["gs://buckets", "gs://buck"])
def test_submit_refuses_a_job_of_another_bucket(here, capfd, monkeypatch, bucket):
    monkeypatch.setenv("TFX_VISION_VERTEX__BUCKET", bucket)

    assert main(["submit"]) == 2
    assert "Expected bucket gs://bucket/pipeline_root/flowers, which pipeline.json was compiled for." in capfd.readouterr().err
    assert here.requests == []


def test_submit_names_each_run_anew(compiled):
    job = read_job(compiled)

    assert new_run_name(job) != new_run_name(job)


def test_submit_refuses_a_name_that_is_there(here, compiled, capfd):
    start(here, compiled, "flowers-1")

    assert main(["submit", "--name", "flowers-1"]) == 2
    assert "Expected --name to be new. Received: flowers-1" in capfd.readouterr().err


@pytest.mark.parametrize("when", ["answer_lost", "refused"])
def test_submit_creates_one_run_whatever_answer_is_lost(here, capfd, when):
    here.faults.append(("CreatePipelineJob", Fault(exceptions.ServiceUnavailable("away"), when)))

    assert main(["submit"]) == 0
    assert len(here.sent("CreatePipelineJob")) == 2
    (name,) = here.pipeline_jobs
    assert f"Submitted {name.rpartition('/')[2]}" in capfd.readouterr().out


def test_submit_says_which_permission_is_missing(here, capfd):
    here.faults.append(("CreatePipelineJob", exceptions.PermissionDenied("aiplatform.pipelineJobs.create denied")))

    assert main(["submit", "--name", "flowers-1"]) == 2
    assert capfd.readouterr().err.startswith(
        "error: Expected permission to run flowers-1. Received: aiplatform.pipelineJobs.create denied. Give the account"
    )
    assert not here.pipeline_jobs


def test_submit_takes_a_pipeline_of_the_tfx_command(here, compiled, tmp_path, monkeypatch):
    (folder := tmp_path / "flowers").mkdir()
    (folder / "pipeline.json").write_bytes(compiled.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VERTEX_HOME", str(tmp_path))

    assert main(["submit"]) == 0
    assert len(here.pipeline_jobs) == 1


def test_submit_and_wait_ends_as_the_run_does(here, capfd):
    def execute(job: types.PipelineJob) -> None:
        put_out(here, job.name.rpartition("/")[2], "Pusher", {"pushed": 1.0, "pushed_destination": "model@2"}, uri="gs://b/p")

    here.pipelines.run_pipeline_job = execute

    assert main(["submit", "--wait", "--interval", "0.05"]) == 0
    assert "Blessed and pushed: model@2" in capfd.readouterr().out


def test_submit_that_is_interrupted_before_the_answer_says_that_the_run_may_be_there(here, compiled):
    is_over = threading.Event()
    here.pipelines.run_pipeline_job = lambda job: is_over.wait()
    here.pipelines.finish_at_once = True  # the answer to its creation comes when it has ended
    process = run_in_a_process(here, "submit", "--name", "flowers-1", cwd=compiled.parent)
    try:
        follow(here, lambda: here.pipeline_jobs or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
        is_over.set()

    assert process.returncode == 130, error
    assert "Interrupted before Vertex AI answered, so that flowers-1 may be there or not." in out
    assert "`python -m pipeline.runs status flowers-1` tells" in out
    assert "the run goes on" not in out


# The compiled file.


def test_find_job_prefers_the_file_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment = {"VERTEX_HOME": str(tmp_path / "home")}
    (tmp_path / "home" / "flowers").mkdir(parents=True)
    known = tmp_path / "home" / "flowers" / "pipeline.json"
    known.write_text("{}")

    assert find_job(None, lambda: "flowers", environment) == known
    assert find_job("flowers", lambda: "other", environment) == known
    (tmp_path / "pipeline.json").write_text("{}")
    assert find_job(None, lambda: "flowers", environment) == Path("pipeline.json")
    with pytest.raises(InputError, match=r"^Expected a compiled job in .*/weeds/pipeline\.json\. Received: none\."):
        find_job("weeds", lambda: "flowers", environment)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"pipelineSpec": {"pipelineInfo": {"name": "x"}, "root": {}}}'])
def test_read_job_refuses_a_file_that_is_none(tmp_path, text):
    path = tmp_path / "pipeline.json"
    path.write_text(text)

    with pytest.raises(InputError, match=r"^Expected .*pipeline\.json to be a .* Compile it again\.$"):
        read_job(path)


def test_run_request_of_schema_2_1_has_values_without_their_types():
    spec = {
        "schemaVersion": "2.1.0",
        "pipelineInfo": {"name": "flowers"},
        "root": {
            "inputDefinitions": {
                "parameters": {
                    "epochs": {"parameterType": "NUMBER_INTEGER"},
                    "rate": {"parameterType": "NUMBER_DOUBLE"},
                    "deep": {"parameterType": "STRUCT"},
                }
            }
        },
    }
    runtime = {"gcsOutputDirectory": "gs://bucket/root", "parameterValues": {"epochs": 3, "rate": 0.5}}
    job = CompiledJob(Path("pipeline.json"), {"pipelineSpec": spec, "runtimeConfig": runtime})

    parameters = read_parameters(job, ["epochs=20"])
    request = run_request(job, parameters, labels={}, service_account="", network="")

    read = types.PipelineJob.from_json(json.dumps(request))
    assert dict(read.runtime_config.parameter_values) == {"epochs": 20, "rate": 0.5}
    assert not read.runtime_config.parameters
    with pytest.raises(InputError, match=r"^Expected a parameter that is a text or a number\. Received: `deep`"):
        read_parameters(job, ["deep={}"])


# A run's course and its end.


def test_wait_ends_with_zero_where_a_model_was_pushed(google_cloud, run, capfd):
    put_out(google_cloud, run, "Evaluator", {"blessed": 1.0}, uri="gs://b/blessing")
    properties = {"pushed": 1.0, "pushed_destination": f"{PLACE}/models/1@2", "endpoint": "e", "traffic_percent": 10.0}
    put_out(google_cloud, run, "Pusher", properties, uri="gs://b/pushed")
    google_cloud.pipelines.set_pipeline(run, "SUCCEEDED")

    assert main(["wait", run, *HERE]) == 0
    out = capfd.readouterr().out
    assert f"Blessed and pushed: {PLACE}/models/1@2" in out
    assert "Endpoint  e, 10 % of its traffic" in out


@pytest.mark.parametrize(
    ("properties", "lines"),
    [
        (
            {"pushed_destination": f"{PLACE}/models/1@2", "endpoint": "e", "traffic_percent": 100.0},
            [
                f"Blessed, and pushed by an earlier run: {PLACE}/models/1@2",
                "Endpoint  e, 100 % of its traffic, as that run left it",
                "Nothing was deployed anew; `python -m pipeline.deploy status` shows what serves now.",
            ],
        ),
        ({"pushed_destination": "gs://b/models/2"}, ["Blessed, and pushed by an earlier run: gs://b/models/2"]),
    ],
    ids=["endpoint", "bucket"],
)
def test_wait_says_of_a_reused_push_that_an_earlier_run_made_it(google_cloud, run, capfd, properties, lines):
    put_out(google_cloud, run, "Evaluator", {"blessed": 1.0}, uri="gs://b/blessing")
    put_out(google_cloud, run, "Pusher", {"pushed": 1.0} | properties, uri="gs://b/pushed")
    google_cloud.pipelines.set_task(run, "Pusher", "SKIPPED")
    google_cloud.pipelines.set_pipeline(run, "SUCCEEDED")

    assert main(["wait", run, *HERE]) == 0
    assert capfd.readouterr().out.splitlines()[-len(lines) :] == lines
    assert main(["status", run, *HERE, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["push_reused"] is True


def test_wait_ends_with_three_where_the_model_was_not_blessed(google_cloud, run, capfd):
    put_out(google_cloud, run, "Evaluator", {"blessed": 0.0}, uri="gs://b/blessing")
    put_out(google_cloud, run, "ServingCheck", {"blessed": 1.0}, uri="gs://b/infra")
    put_out(google_cloud, run, "Pusher", {"pushed": 0.0}, uri="gs://b/pushed")
    google_cloud.pipelines.set_pipeline(run, "SUCCEEDED")

    assert main(["wait", run, *HERE]) == 3
    out = capfd.readouterr().out
    assert "Not blessed, so nothing was pushed. Refused by:\n  - Evaluator: gs://b/blessing\n" in out
    assert "ServingCheck:" not in out


def test_wait_does_not_believe_in_a_push_without_word_of_it(google_cloud, run, capfd):
    google_cloud.pipelines.set_task(run, "Pusher", "SUCCEEDED")
    google_cloud.pipelines.set_pipeline(run, "SUCCEEDED")

    assert main(["wait", run, *HERE]) == 3
    assert "Not blessed, so nothing was pushed." in capfd.readouterr().out


def test_wait_names_the_step_that_failed_with_its_message_and_its_log(google_cloud, run, capfd):
    google_cloud.pipelines.set_task(run, "ImportExampleGen", "SUCCEEDED")
    job = f"{PLACE}/customJobs/77"
    google_cloud.pipelines.set_task(run, "Transform", "FAILED", error="exited with a\nnon-zero status of 1.", custom_job=job)
    google_cloud.pipelines.set_pipeline(run, "FAILED", error="The DAG failed")

    assert main(["wait", run, *HERE]) == 1
    out = capfd.readouterr().out
    assert f"Failed in Transform: exited with a non-zero status of 1.\nJob       {job}\nLog       https://" in out
    assert f"https://console.cloud.google.com/logs/viewer?project={vertex_stand_in.PROJECT_NUMBER}&resource=ml_job" in out
    assert "job_id%3D%2277%22" in out
    assert "It stops a run whose data breaks its schema" not in out


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ("The replica workerpool0-0 exited with a non-zero status of 1. To find out more, see its logs.", 4),
        ("The replica workerpool0-0 exited with a non-zero status of 137. Termination reason: OOMKilled.", 1),
        ("The following quota metrics exceed quota limits: aiplatform.googleapis.com/custom_model_training_cpus", 1),
        ("", 1),
    ],
    ids=["raised", "killed", "quota", "no word"],
)
def test_wait_ends_with_four_where_the_data_gate_itself_stopped_the_run(google_cloud, run, capfd, error, code):
    google_cloud.pipelines.set_task(run, "DataGate", "FAILED", error=error)
    google_cloud.pipelines.set_pipeline(run, "FAILED", error="The DAG failed")

    assert main(["wait", run, *HERE]) == code
    out = capfd.readouterr().out
    assert "Failed in DataGate" in out
    assert ("It stops a run whose data breaks its schema" in out) == (code == 4)
    assert main(["status", run, *HERE, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["exit_code"] == code


def test_wait_gives_the_run_s_own_error_where_no_step_has_one(google_cloud, run, capfd):
    google_cloud.pipelines.set_pipeline(run, "FAILED", error="The image cannot be pulled")

    assert main(["wait", run, *HERE]) == 1
    assert "Failed The image cannot be pulled" in capfd.readouterr().out


def test_wait_ends_with_one_where_the_run_was_cancelled(google_cloud, run, capfd):
    google_cloud.pipelines.set_pipeline(run, "CANCELLED")

    assert main(["wait", run, *HERE]) == 1
    assert "Cancelled" in capfd.readouterr().out


def test_wait_survives_lost_connections_and_says_so(google_cloud, run):
    lost = [exceptions.ServiceUnavailable("away"), exceptions.DeadlineExceeded("late"), exceptions.InternalServerError("oops")]
    process = wait_in_a_process(google_cloud, run)
    follow(google_cloud, lambda: len(google_cloud.sent("GetPipelineJob")) > 3)
    google_cloud.faults += [("GetPipelineJob", error) for error in lost]
    follow(google_cloud, lambda: not google_cloud.faults)
    google_cloud.pipelines.set_pipeline(run, "CANCELLED")

    out, error = process.communicate(timeout=60)

    assert process.returncode == 1, error
    assert out.count("no answer from Vertex AI; the run goes on, and it is asked again") == 1
    assert out.rstrip().endswith("Cancelled")


def test_wait_ends_where_permission_is_taken_away(google_cloud, run):
    process = wait_in_a_process(google_cloud, run)
    follow(google_cloud, lambda: len(google_cloud.sent("GetPipelineJob")) > 3)
    google_cloud.faults.append(("GetPipelineJob", exceptions.PermissionDenied("no longer")))

    _, error = process.communicate(timeout=60)

    assert process.returncode == 2
    assert "Expected permission to look at" in error


def test_wait_that_is_interrupted_leaves_the_run_running(google_cloud, run):
    process = wait_in_a_process(google_cloud, run)
    follow(google_cloud, lambda: len(google_cloud.sent("GetPipelineJob")) > 3)
    process.send_signal(signal.SIGINT)

    out, error = process.communicate(timeout=60)

    assert process.returncode == 130, error
    name = f"{PLACE}/pipelineJobs/{run}"
    assert f"Interrupted; the run goes on. `python -m pipeline.runs wait {name}` shows it again" in out
    assert google_cloud.pipeline_jobs[name].state.name == "PIPELINE_STATE_RUNNING"
    assert not google_cloud.sent("CancelPipelineJob")


def wait_in_a_process(cloud: VertexStandIn, run: str) -> subprocess.Popen:
    return run_in_a_process(cloud, "wait", f"{PLACE}/pipelineJobs/{run}", "--interval", "0.05", cwd=ROOT)


def run_in_a_process(cloud: VertexStandIn, *arguments: str, cwd: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "pipeline.runs", *arguments]
    environment = {**os.environ, **cloud.environment, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def follow(cloud: VertexStandIn, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, [name for name, _ in cloud.requests]
        time.sleep(0.02)


def test_display_shows_each_change_once_without_a_terminal(google_cloud, run):
    file = io.StringIO()
    google_cloud.pipelines.set_task(run, "ImportExampleGen", "RUNNING")
    with Display(Console(file=file, width=120)) as display:
        display.show(read_run(job_of(google_cloud, run)))
        display.show(read_run(job_of(google_cloud, run)))
        google_cloud.pipelines.set_task(run, "ImportExampleGen", "SKIPPED")
        display.show(read_run(job_of(google_cloud, run)))

    lines = file.getvalue().splitlines()
    assert [line.split()[:2] for line in lines] == [["ImportExampleGen", "running"], ["ImportExampleGen", "reused"]]


def test_display_shows_all_steps_in_their_order_on_a_terminal(google_cloud, run):
    file = io.StringIO()
    google_cloud.pipelines.set_task(run, "Trainer", "FAILED", error="[no] memory")
    with Display(Console(file=file, width=120, force_terminal=True)) as display:
        display.show(read_run(job_of(google_cloud, run)))
        display.note("no answer")

    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())
    names = ["ImportExampleGen", "StatisticsGen", "DataGate", "Transform", "Trainer", "Evaluator", "ServingCheck", "Pusher"]
    places = [text.index(f"  {name} ") for name in names]
    assert places == sorted(places)
    assert "✗  Trainer" in text
    assert "[no] memory" in text
    assert "no answer" in text


def job_of(cloud: VertexStandIn, run: str) -> types.PipelineJob:
    return cloud.pipeline_jobs[f"{PLACE}/pipelineJobs/{run}"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, ""), (8.06, "8.1 s"), (59.96, "1 min 00 s"), (245.4, "4 min 05 s"), (7620, "2 h 07 min")]
)
def test_duration_is_as_a_person_says_it(seconds, text):
    assert duration(seconds) == text


# Looking, ending, removing.


def test_status_shows_a_run_once(google_cloud, run, capfd):
    google_cloud.pipelines.set_task(run, "Schema", "SUCCEEDED")
    google_cloud.pipelines.set_task(run, "Trainer", "RUNNING")
    job = train(google_cloud, run)
    train(google_cloud, "flowers-2")

    assert main(["status", run, *HERE]) == 0
    out = capfd.readouterr().out
    assert out.startswith(f"{run} running")
    assert re.search(r"▶ +Trainer +\d+\.\d s", out)
    assert re.search(r"· +Pusher +waiting", out)
    assert f"pipelines/runs/{run}?project=" in out
    assert len(google_cloud.sent("GetPipelineJob")) == 1
    assert re.findall("Training .*", out) == [f"Training  {job}, running"]


def test_status_for_programs_has_every_step(google_cloud, run, capfd):
    job = train(google_cloud, run, state="FAILED")
    google_cloud.pipelines.set_task(run, "Trainer", "FAILED", error="boom", custom_job=f"{PLACE}/customJobs/77")
    google_cloud.pipelines.set_pipeline(run, "FAILED", error="The DAG failed")

    assert main(["status", f"{PLACE}/pipelineJobs/{run}", "--json"]) == 0
    status = json.loads(capfd.readouterr().out)
    assert status["run"] == run
    assert (status["state"], status["exit_code"], status["error"], status["pushed"]) == ("FAILED", 1, "The DAG failed", None)
    tasks = {task["name"]: task for task in status["tasks"]}
    assert (tasks["Trainer"]["state"], tasks["Trainer"]["error"]) == ("failed", "boom")
    assert tasks["Trainer"]["job"] == f"{PLACE}/customJobs/77"
    assert "77" in tasks["Trainer"]["log"]
    assert tasks["Pusher"] == {"name": "Pusher", "state": "not run", "seconds": None, "error": "", "job": "", "log": ""}
    assert status["training_jobs"] == [{"name": job, "state": "failed"}]


def test_status_of_a_running_run_has_no_exit_code(google_cloud, run, capfd):
    assert main(["status", run, *HERE, "--json"]) == 0
    status = json.loads(capfd.readouterr().out)
    assert status["exit_code"] is None
    assert status["ended"] is None


def test_list_shows_the_pipeline_s_runs_newest_first(here, compiled, capfd):
    for number in (1, 2, 3):
        start(here, compiled, f"flowers-{number}")
        time.sleep(0.01)
    start(here, compiled, "weeds-1", pipeline="weeds")

    assert main(["list", "--limit", "2"]) == 0
    assert re.findall(r"(?:flowers|weeds)-\d", capfd.readouterr().out) == ["flowers-3", "flowers-2"]
    assert main(["list", "--all", "--json", *HERE]) == 0
    runs = json.loads(capfd.readouterr().out)
    assert [(run["run"], run["pipeline"], run["state"]) for run in runs] == [
        ("weeds-1", "weeds", "RUNNING"),
        *((f"flowers-{number}", "flowers", "RUNNING") for number in (3, 2, 1)),
    ]


def test_list_goes_on_to_the_next_page(google_cloud, compiled, capfd):
    for number in range(103):
        start(google_cloud, compiled, f"flowers-{number}")

    assert main(["list", "--pipeline", "flowers", "--limit", "102", "--json", *HERE]) == 0
    assert len(json.loads(capfd.readouterr().out)) == 102
    assert len(google_cloud.sent("ListPipelineJobs")) == 2


def test_list_says_where_there_is_nothing(google_cloud, capfd):
    assert main(["list", "--pipeline", "flowers", *HERE]) == 0
    assert capfd.readouterr().out == ("No runs of flowers in test-project, us-central1. --all shows those of every pipeline.\n")


def test_cancel_ends_a_run_and_refuses_one_that_has_ended(google_cloud, run, capfd):
    assert main(["cancel", run, *HERE]) == 0
    assert job_of(google_cloud, run).state.name == "PIPELINE_STATE_CANCELLED"
    assert main(["cancel", run, *HERE]) == 2
    assert f"Expected a run that goes on. Received: {run}, which has ended: cancelled." in capfd.readouterr().err


def test_cancel_ends_what_trains_for_the_run_and_nothing_else(google_cloud, run, capfd):
    going_on = [train(google_cloud, run), train(google_cloud, run, state="PENDING")]
    others = [train(google_cloud, "flowers-2"), train(google_cloud, run, state="SUCCEEDED")]

    assert main(["cancel", run, *HERE]) == 0

    out = capfd.readouterr().out
    assert set(re.findall("Cancelling its training job (.*)", out)) == set(going_on)
    assert [training_state(google_cloud, job) for job in going_on] == ["CANCELLED", "CANCELLED"]
    assert [training_state(google_cloud, job) for job in others] == ["RUNNING", "SUCCEEDED"]
    cancelled = [name for name, _ in google_cloud.requests if name.startswith("Cancel")]
    assert cancelled == ["CancelPipelineJob", "CancelCustomJob", "CancelCustomJob"]  # the run first: it could ask for more


@pytest.mark.parametrize("method", ["ListCustomJobs", "CancelCustomJob"])
def test_cancel_that_could_not_end_the_training_is_repeated(google_cloud, run, capfd, method):
    job = train(google_cloud, run)
    google_cloud.faults.append((method, exceptions.PermissionDenied("not yours")))

    assert main(["cancel", run, *HERE]) == 2
    captured = capfd.readouterr()
    assert f"Cancelling {run}" in captured.out
    assert captured.err.startswith("error: Expected permission to ")
    assert "training job" in captured.err
    assert training_state(google_cloud, job) == "RUNNING"

    assert main(["cancel", run, *HERE]) == 0
    assert capfd.readouterr().out == f"Cancelling its training job {job}\n"
    assert training_state(google_cloud, job) == "CANCELLED"


def test_cancel_takes_a_training_that_has_just_ended_for_done(google_cloud, run):
    train(google_cloud, run)
    google_cloud.faults.append(("CancelCustomJob", exceptions.FailedPrecondition("it has ended")))

    assert main(["cancel", run, *HERE]) == 0


def test_cancel_asks_only_once_for_the_end_of_a_run(google_cloud, run):
    job = train(google_cloud, run)
    google_cloud.pipelines.set_pipeline(run, "CANCELLING")

    assert main(["cancel", run, *HERE]) == 0
    assert not google_cloud.sent("CancelPipelineJob")
    assert training_state(google_cloud, job) == "CANCELLED"


def test_delete_removes_a_run_that_has_ended_only(google_cloud, run, capfd):
    assert main(["delete", run, *HERE]) == 2
    assert f"Expected a run that has ended. Received: {run}, which is running." in capfd.readouterr().err
    assert not google_cloud.sent("DeletePipelineJob")
    google_cloud.pipelines.set_pipeline(run, "SUCCEEDED")

    assert main(["delete", run, *HERE]) == 0
    assert not google_cloud.pipeline_jobs


@pytest.mark.parametrize("command", ["wait", "status", "cancel", "delete"])
def test_run_that_is_not_there_is_one_clear_line(google_cloud, capfd, command):
    assert main([command, "flowers-9", *HERE]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: Expected the name of a run that is there. Received: projects/test-project/")
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["projects/p/locations/l/models/1", "Flowers 1", ""])
def test_name_that_cannot_be_a_run_is_not_asked_for(google_cloud, capfd, name):
    assert main(["status", name, *HERE]) == 2
    assert "Expected the name of a run" in capfd.readouterr().err
    assert google_cloud.requests == []


def test_runs_want_a_project(google_cloud, capfd, monkeypatch):
    monkeypatch.delenv("TFX_VISION_VERTEX__PROJECT", raising=False)

    assert main(["status", "flowers-1"]) == 2
    assert "Expected a project. Received: none. Give --project" in capfd.readouterr().err


def test_runs_want_credentials(google_cloud, capfd, monkeypatch, tmp_path):
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS")
    monkeypatch.setenv("HOME", str(tmp_path))

    assert main(["status", "flowers-1", *HERE]) == 2
    assert "Run `gcloud auth application-default login`" in capfd.readouterr().err
