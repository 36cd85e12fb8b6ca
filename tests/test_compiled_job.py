"""The compiled job runs here as Vertex AI runs it, and comes to what `local_runner.py` comes to.

Every step is its container's own command in a fresh process with only what the image holds; gs:// URIs, the Trainer's custom
job and the endpoint go by the real clients to a stand-in of Google Cloud, which runs the job's and the endpoint's containers.
Six minutes on two cores, half of them TFX's imports in each step; what is marked `long` takes ten more.
"""

import contextlib
import functools
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import CLASS_NAMES, ROOT
from container_steps import Image, image_folder, run_custom_job, serving_container
from google.cloud.aiplatform_v1 import types
from job_executor import Artifact, JobResult, TaskResult, execute_job, local_job
from vertex_stand_in import VertexStandIn

import local_runner
from pipeline.evaluation import Evaluation, read_evaluation

pytestmark = [pytest.mark.end_to_end, pytest.mark.one_stack]

SETTINGS = {
    "TFX_VISION_PRESET": "smoke",
    "TFX_VISION_PIPELINE__NAME": "shapes",
    "TFX_VISION_DATA__INPUT": "gs://bucket/records",
    "TFX_VISION_VERTEX__BUCKET": "gs://bucket",
    "TFX_VISION_VERTEX__IMAGE": "us-docker.pkg.dev/test-project/images/tfx-vision:1",
}
SMOKE = ["--preset", "smoke", "--set", "data.valid_fraction=0.2", "--set", "data.test_fraction=0.3"]
SABOTAGE = {"epochs": 1, "learning_rate": 1e-9}  # the head stays as it was drawn


class Vertex:
    """Vertex AI: the stand-in of its services, the containers that they run, and a metadata store."""

    def __init__(self, cloud: VertexStandIn, image: Image, folder: Path):
        self.cloud, self.image, self.folder = cloud, image, folder
        self.store: list[Artifact] = []
        self.containers = contextlib.ExitStack()
        self.preempt_when: Callable[[], bool] | None = None  # takes the machines of the next custom job away, once
        self._predict: dict[str, Callable[[Sequence[Any]], list[Any]]] = {}
        self._lock = threading.Lock()
        cloud.jobs.run_custom_job = self._train
        self._get_custom_job = cloud.jobs.get_custom_job
        cloud.jobs.get_custom_job = self._look_at

    def _look_at(self, request: types.GetCustomJobRequest) -> types.CustomJob:
        """Shows a custom job as it is when it is first looked at, and then at its end: TFX sleeps 30 s between two looks."""
        is_first = len([one for one in self.cloud.sent("GetCustomJob") if one.name == request.name]) == 1
        self.cloud.jobs.wait_seconds = 0.0 if is_first else 1800.0
        return self._get_custom_job(request)

    def run(self, job: dict[str, Any], *, done: Mapping[str, TaskResult] | None = None, **parameters: Any) -> JobResult:
        """Runs a pipeline job, but for the tasks that are done already."""
        folder = self.folder / f"job{len(list(self.folder.glob('job*')))}"
        folder.mkdir()
        environment = self.cloud.environment
        return execute_job(
            job,
            image=self.image,
            folder=folder,
            store=self.store,
            done=done,
            parameters=parameters,
            environment=environment,
            path=self.cloud.storage.path,
        )

    def _train(self, job: Any) -> None:
        """Runs a custom job, and has endpoints answer for the model that it makes."""
        folder = self.folder / f"custom{len(list(self.folder.glob('custom*')))}"
        preempt_when, self.preempt_when = self.preempt_when, None
        environment = self.cloud.environment
        run_custom_job(job, image=self.image, folder=folder, environment=environment, preempt_when=preempt_when)
        command = list(job.job_spec.worker_pool_specs[0].container_spec.command)
        (model,) = json.loads(command[command.index("--outputs") + 1])["model"]
        uri = model["artifact"]["uri"]
        self.cloud.answers[uri] = functools.partial(self._answer, uri)

    def _answer(self, uri: str, instances: Sequence[Any]) -> list[Any]:
        with self._lock:
            if uri not in self._predict:
                versions = [one for versions in self.cloud.models.values() for one in versions.values()]
                (model,) = [one for one in versions if one.artifact_uri.startswith(uri)]
                container = serving_container(
                    model, image=self.image, log=self.folder / "server.log", environment=self.cloud.environment
                )
                self._predict[uri] = self.containers.enter_context(container)
        return self._predict[uri](instances)

    def evaluation(self, result: JobResult) -> Evaluation:
        """Reads what the Evaluator of a job wrote."""
        (artifact,) = result.tasks["Evaluator"].outputs["evaluation"]
        return read_evaluation(str(self.cloud.storage.path(artifact.uri)), CLASS_NAMES)


@pytest.fixture(scope="module")
def local_run(make_images: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The records that a run on this machine made, and its `run.json`."""
    workspace = tmp_path_factory.mktemp("local") / "shapes"
    images = make_images(tmp_path_factory.mktemp("images") / "shapes")
    level = logging.getLogger().level
    assert local_runner.main([*SMOKE, "--data", str(images), "--workspace", str(workspace)]) == 0
    assert logging.getLogger().level == level
    return workspace / "tfrecords", json.loads((workspace / "run.json").read_text())


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return image_folder(ROOT / "Dockerfile", ROOT / ".dockerignore", tmp_path_factory.mktemp("image") / "app")


@pytest.fixture(scope="module")
def vertex(local_run: tuple[Path, dict], image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vertex]:
    """Vertex AI with the records in a bucket."""
    with VertexStandIn(tmp_path_factory.mktemp("cloud")) as cloud:
        shutil.copytree(local_run[0], cloud.storage.create_bucket("bucket") / "records")
        vertex = Vertex(cloud, image, tmp_path_factory.mktemp("vertex"))
        with vertex.containers:
            yield vertex


def compile_job(folder: Path, environment: dict[str, str], **settings: str) -> str:
    """Compiles the pipeline in a folder; returns the text of the job."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("GOOGLE_", "TFX_VISION_"))}
    project = {"TFX_VISION_VERTEX__PROJECT": "test-project", "HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "kubeflow_runner.py")],
        cwd=folder,
        env=kept | environment | project | SETTINGS | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (job,) = folder.glob("pipeline.*")
    return job.read_text()


@pytest.fixture(scope="module")
def job(vertex: Vertex, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The job for Vertex AI; its runner read the records in the bucket."""
    return local_job(compile_job(tmp_path_factory.mktemp("home"), vertex.cloud.environment))


def metadata(result: JobResult, task: str, key: str) -> dict[str, Any]:
    (artifact,) = result.tasks[task].outputs[key]
    return artifact.metadata


def require_success(result: JobResult) -> None:
    assert result.state == "SUCCEEDED", [f"{name}: {task.error}" for name, task in result.tasks.items() if task.error]
    assert {task.state for task in result.tasks.values()} == {"SUCCEEDED"}


# One test, so that no second process repeats the first run for the others' sake.
def test_compiled_job_deploys_a_good_model_keeps_a_bad_one_out_and_stops_at_the_data_gate(
    vertex: Vertex, job: dict[str, Any], local_run: tuple[Path, dict]
) -> None:
    good = vertex.run(job)
    require_success(good)
    here, there = local_run[1]["metrics"], vertex.evaluation(good)
    assert there.confusion_matrix == here["confusion_matrix"]
    assert there.overall == pytest.approx(here["overall"], abs=1e-4)
    assert there.slices.keys() == here["slices"].keys()
    assert (there.reasons, there.has_baseline) == ([], False)
    (request,) = vertex.cloud.sent("CreateCustomJob")
    assert len(vertex.cloud.sent("GetCustomJob")) == 2  # while it ran, and at its end
    (pool,) = request.custom_job.job_spec.worker_pool_specs
    assert pool.container_spec.image_uri == SETTINGS["TFX_VISION_VERTEX__IMAGE"]
    facts = metadata(good, "Pusher", "pushed_model")
    assert (facts["pushed"], facts["pushed_version"], facts["traffic_percent"]) == (1.0, "1", 100.0)
    assert len(vertex.cloud.sent("Predict")) >= 10  # images of the canary's check, answered by the model's own container
    (endpoint,) = vertex.cloud.endpoints.values()
    assert list(endpoint.traffic_split.values()) == [100]
    before = type(endpoint).to_dict(endpoint)

    bad = vertex.run(job, **SABOTAGE)
    require_success(bad)
    assert vertex.evaluation(bad).reasons
    assert vertex.evaluation(bad).has_baseline
    (model,) = good.tasks["Trainer"].outputs["model"]
    blessing = metadata(bad, "Evaluator", "blessing")
    assert (blessing["blessed"], blessing["baseline_model_id"]) == (0.0, model.name)
    assert metadata(bad, "Pusher", "pushed_model")["pushed"] == 0.0
    (endpoint,) = vertex.cloud.endpoints.values()
    assert type(endpoint).to_dict(endpoint) == before
    assert len(vertex.cloud.sent("UploadModel")) == 1

    check_data_gate(vertex, job, done={name: good.tasks[name] for name in ("ImportExampleGen", "StatisticsGen")})


def check_data_gate(vertex: Vertex, job: dict[str, Any], *, done: Mapping[str, TaskResult]) -> None:
    bucket = vertex.cloud.storage.path("gs://bucket")
    schema = (bucket / "records" / "schema" / "schema.pbtxt").read_text()
    (bucket / "strict").mkdir()
    (bucket / "strict" / "schema.pbtxt").write_text(schema.replace('"circle"', '"triangle"'))
    result = vertex.run(job, done=done, schema="gs://bucket/strict")
    assert result.tasks["DataGate"].state == "FAILED"
    assert "DataAnomalyError" in result.tasks["DataGate"].error
    later = {name: task.state for name, task in result.tasks.items() if name in ("Transform", "Trainer", "Pusher")}
    assert set(later.values()) == {"NOT_TRIGGERED"}
    assert result.state == "FAILED"


@pytest.mark.long
def test_compiled_job_on_two_spot_machines_goes_on_where_they_were_taken_away(vertex: Vertex, tmp_path: Path) -> None:
    settings = {
        "TFX_VISION_PIPELINE__NAME": "spot",
        "TFX_VISION_VERTEX__SPOT": "true",
        "TFX_VISION_VERTEX__NUM_MACHINES": "2",
        "TFX_VISION_TRAINING__EPOCHS": "3",
        "TFX_VISION_FINE_TUNING__EPOCHS": "3",
    }
    job = local_job(compile_job(tmp_path, vertex.cloud.environment, **settings))
    for task in ("Evaluator", "ServingCheck", "Pusher"):
        del job["pipelineSpec"]["root"]["dag"]["tasks"][task]
    bucket = vertex.cloud.storage.path("gs://bucket")
    first_epoch = "pipeline_root/spot/*/*/Trainer_*/model_run/checkpoints/fine-tuning/ckpt-1.index"
    vertex.preempt_when = lambda: any(bucket.glob(first_epoch))
    require_success(vertex.run(job))
    spec = vertex.cloud.sent("CreateCustomJob")[-1].custom_job.job_spec
    assert spec.scheduling.strategy.name == "SPOT"
    assert len(spec.worker_pool_specs) == 2
    logs = [log.read_text() for log in max(vertex.folder.glob("custom*")).glob("*.log")]
    assert len(logs) == 2
    for log in logs:
        assert log.count("of 2 workers") == 2  # each was started twice
        assert "fine-tuning goes on from epoch 2" in log


@pytest.mark.long
def test_compiled_job_for_kubeflow_comes_to_the_same_metrics(
    vertex: Vertex, image: Image, local_run: tuple, tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    settings = {"TFX_VISION_ENGINE": "kubeflow", "TFX_VISION_EVALUATION__COMPARE_WITH": "nothing"}
    settings |= {"TFX_VISION_DATA__CLASS_NAMES": json.dumps(CLASS_NAMES), "TFX_VISION_DATA__SLICE_COLUMNS": "[]"}
    text = compile_job(tmp_path / "home", {}, **settings)
    bucket = tmp_path / "bucket"
    shutil.copytree(local_run[0], bucket / "records")
    job = local_job(text, bucket="gs://bucket", folder=bucket)
    result = execute_job(job, image=image, folder=tmp_path, store=[], pipeline_root=str(bucket / "root"))
    require_success(result)
    (artifact,) = result.tasks["Evaluator"].outputs["evaluation"]
    there = read_evaluation(artifact.uri, CLASS_NAMES)
    assert there.overall == pytest.approx(local_run[1]["metrics"]["overall"], abs=1e-4)
    assert Path(metadata(result, "Pusher", "pushed_model")["pushed_destination"], "saved_model.pb").exists()
