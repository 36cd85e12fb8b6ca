"""Containers' commands without containers: what they see, and how they end."""

import json
import os
import time
from pathlib import Path

import pytest
from container_steps import ContainerError, Image, image_folder, run_container, run_custom_job, serving_container
from google.cloud import aiplatform_v1

from models.devices import parse_tf_config

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def project_image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """The image of this project."""
    return image_folder(ROOT / "Dockerfile", ROOT / ".dockerignore", tmp_path_factory.mktemp("image") / "app")


@pytest.fixture
def image(tmp_path: Path) -> Image:
    """An image with one module, `greeting`."""
    write_context(tmp_path / "context", "COPY greeting.py ./")
    return make_image(tmp_path / "context")


def write_context(folder: Path, copy: str, *, ignore: str = "", files: tuple[str, ...] = ("greeting.py",)) -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("TEXT = 'hello'\n")
    (folder / ".dockerignore").write_text(ignore)
    (folder / "Dockerfile").write_text(
        "FROM python AS build\nCOPY requirements.lock /\n"
        "FROM python AS pipeline\nCOPY --from=build /opt/venv /opt/venv\n"
        "ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app \\\n  # a remark\n  PYTHONUNBUFFERED=1\n"
        f"WORKDIR /app\n{copy}\nUSER tfx\nFROM pipeline AS dataflow\nCOPY boot.py /app/\n"
    )


def make_image(context: Path) -> Image:
    return image_folder(context / "Dockerfile", context / ".dockerignore", context.parent / "app")


def names(image: Image) -> set[str]:
    return {name for name in image.files() if "__pycache__" not in name}


def run(program: str, image: Image, folder: Path, **environment: str) -> str:
    """Runs a Python program as a container's; returns what it printed."""
    log = folder / "step.log"
    log.unlink(missing_ok=True)
    run_container(["python", "-c", program], image=image, log=log, environment=environment, timeout_seconds=600)
    return log.read_text()


@pytest.mark.parametrize(
    ("copy", "ignore", "expected"),
    [
        ("COPY greeting.py data/a.py ./", "", {"greeting.py", "a.py"}),
        ("COPY data data", "", {"data/a.py", "data/b.md", "data/deep/c.py"}),
        ("COPY --chown=tfx data/ lib/data/", "*\n!data/*.py", {"lib/data/a.py"}),
        ("COPY data data", "data/deep\n**/*.md", {"data/a.py"}),
        ("COPY data data", "# all but one\ndata\n!data/deep/**/c.py", {"data/deep/c.py"}),
        ("COPY greeting.py hello.py", "", {"hello.py"}),
    ],
)
def test_image_folder_holds_what_copy_takes_and_dockerignore_leaves(
    tmp_path: Path, copy: str, ignore: str, expected: set[str]
) -> None:
    files = ("greeting.py", "data/a.py", "data/b.md", "data/deep/c.py")
    write_context(tmp_path / "context", copy, ignore=ignore, files=files)
    image = make_image(tmp_path / "context")
    assert names(image) == expected
    assert image.environment["PYTHONPATH"] == str(image.folder)
    assert image.environment["PYTHONUNBUFFERED"] == "1"


def test_image_folder_refuses_what_docker_would(tmp_path: Path) -> None:
    write_context(tmp_path / "a", "COPY absent ./")
    with pytest.raises(ValueError, match="Expected COPY to find absent in the build context"):
        make_image(tmp_path / "a")
    write_context(tmp_path / "b" / "c", "COPY greeting.py ./", ignore="*.py")
    with pytest.raises(ValueError, match="or only what is ignored"):
        make_image(tmp_path / "b" / "c")
    write_context(tmp_path / "d" / "e", "COPY greeting.py /etc/")
    with pytest.raises(ValueError, match="Expected COPY into the working directory, /app"):
        make_image(tmp_path / "d" / "e")
    with pytest.raises(ValueError, match="to have a stage `serving`"):
        image_folder(ROOT / "Dockerfile", ROOT / ".dockerignore", tmp_path / "other", stage="serving")


def test_image_of_the_project_holds_its_four_packages_and_its_runners(project_image: Image) -> None:
    held = names(project_image)
    assert {"local_runner.py", "kubeflow_runner.py", "pipeline/pipeline.py", "pipeline/report.html.j2"} <= held
    assert {name.split("/")[0] for name in held if "/" in name} == {"data", "preprocessing", "models", "pipeline"}
    assert not [name for name in held if name.endswith((".md", ".toml", ".lock", ".ipynb"))]


@pytest.mark.parametrize("module", ["workspaces", "tests.workspaces", "conftest", "notebooks"])
def test_run_container_cannot_import_what_the_image_lacks(project_image: Image, tmp_path: Path, module: str) -> None:
    with pytest.raises(ContainerError, match=f"ended with exit code 1(.|\n)*ModuleNotFoundError: No module named '{module}"):
        run(f"import data.errors, {module}", project_image, tmp_path)


def test_run_container_sees_the_image_and_a_clean_environment(
    image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TFX_VISION_PRESET", "GOOGLE_APPLICATION_CREDENTIALS", "PYTHONSTARTUP"):
        monkeypatch.setenv(name, "here")
    seen = "dict(os.environ), sys.prefix, os.getcwd(), os.listdir(os.environ['HOME'])"
    program = f"import greeting, json, os, sys; print(json.dumps([{seen}]))"
    variables, prefix, folder, home = json.loads(run(program, image, tmp_path, GIVEN="by the caller"))
    expected = {"PATH", "LANG", "HOME", "TMPDIR", "PYTHONPATH", "PYTHONUNBUFFERED", "GIVEN"}
    assert set(variables) - {"LC_CTYPE"} == expected
    assert Path(prefix).resolve() == Path(os.sys.prefix).resolve()
    assert (folder, home) == (str(image.folder), [])
    assert variables["GIVEN"] == "by the caller"


def test_run_container_fails_with_the_tail_of_the_log(image: Image, tmp_path: Path) -> None:
    with pytest.raises(ContainerError) as caught:
        run("import sys\nfor n in range(100): print('line', n)\nsys.exit('no space left')", image, tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[-2:] == ["line 99", "no space left"]
    assert "line 50" not in lines


def test_run_container_ends_the_process_and_its_children_in_time(image: Image, tmp_path: Path) -> None:
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    command = ["python", "-c", f"import subprocess, sys, time; print({child}.pid, flush=True); time.sleep(600)"]
    log = tmp_path / "step.log"
    for seconds in (2, 20, 200):  # a slow machine may need more than the first to start them
        with pytest.raises(ContainerError, match=f"python ran for more than {seconds} s"):
            run_container(command, image=image, log=log, environment={}, timeout_seconds=seconds)
        if log.read_text():
            break
    assert has_ended(int(log.read_text()))


def has_ended(process_id: int) -> bool:
    """Whether a process ends within a minute; a killed one that nobody waits for is a zombie."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_run_container_refuses_a_step_that_writes_into_the_image(image: Image, tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match=r"as its user may not. Received: \['model.keras'\]"):
        run("open('model.keras', 'w').write('x')", image, tmp_path)


REPORT = (
    "import json, os; print(json.dumps({k: v for k, v in os.environ.items() if k.startswith(('AIP', 'CL', 'TF', 'MODE'))}))"
)


def custom_job(*pools: tuple[int, str], directory: str = "") -> aiplatform_v1.CustomJob:
    """Makes a job of worker pools, each a number of replicas and the program that they run."""
    return aiplatform_v1.CustomJob(
        name="projects/1/locations/us-central1/customJobs/77",
        job_spec={
            "worker_pool_specs": [
                {
                    "replica_count": count,
                    "container_spec": {
                        "image_uri": "image",
                        "command": ["python", "-c"],
                        "args": [program],
                        "env": [{"name": "MODE", "value": "job"}],
                    },
                }
                if count
                else {}
                for count, program in pools
            ],
            "base_output_directory": {"output_uri_prefix": directory},
        },
    )


def test_run_custom_job_tells_a_single_replica_of_itself(image: Image, tmp_path: Path) -> None:
    run_custom_job(custom_job((1, REPORT), directory="gs://bucket/job"), image=image, folder=tmp_path / "job")
    variables = json.loads((tmp_path / "job" / "workerpool0-0.log").read_text())
    cluster = json.loads(variables.pop("CLUSTER_SPEC"))
    assert cluster["task"] == {"type": "workerpool0", "index": 0}
    assert cluster["job"]["worker_pool_specs"][0]["container_spec"]["args"] == [REPORT]
    assert variables == {
        "AIP_MODEL_DIR": "gs://bucket/job/model/",
        "AIP_CHECKPOINT_DIR": "gs://bucket/job/checkpoints/",
        "AIP_TENSORBOARD_LOG_DIR": "gs://bucket/job/logs/",
        "CLOUD_ML_JOB_ID": "77",
        "MODE": "job",
    }


def test_run_custom_job_starts_every_replica_with_its_part_of_the_cluster(image: Image, tmp_path: Path) -> None:
    # The chief waits until the workers and the evaluator have written their logs.
    logs = [f"{tmp_path}/job/workerpool{number}.log" for number in ("1-0", "1-1", "3-0")]
    is_written = "os.path.exists(log) and os.path.getsize(log)"
    wait = f"import time\nwhile not all({is_written} for log in {logs}): time.sleep(0.1)"
    job = custom_job((1, f"{REPORT}\n{wait}"), (2, REPORT), (0, ""), (1, REPORT))
    run_custom_job(job, image=image, folder=tmp_path / "job", environment={"TF_EXTRA": "1"})
    logs = {log.stem: json.loads(log.read_text()) for log in (tmp_path / "job").glob("*.log")}
    assert set(logs) == {"workerpool0-0", "workerpool1-0", "workerpool1-1", "workerpool3-0"}
    configs = {name: json.loads(variables["TF_CONFIG"]) for name, variables in logs.items()}
    specs = {name: json.loads(variables["CLUSTER_SPEC"]) for name, variables in logs.items()}
    assert configs["workerpool1-1"]["task"] == {"type": "worker", "index": 1}
    assert configs["workerpool3-0"]["task"] == {"type": "evaluator", "index": 0}
    assert {name: len(hosts) for name, hosts in configs["workerpool0-0"]["cluster"].items()} == {"chief": 1, "worker": 2}
    assert specs["workerpool0-0"]["cluster"]["workerpool1"] == configs["workerpool0-0"]["cluster"]["worker"]
    assert {name: len(hosts) for name, hosts in specs["workerpool1-0"]["cluster"].items()} == {
        "workerpool0": 1,
        "workerpool1": 2,
        "workerpool3": 1,
    }
    chief, worker = (parse_tf_config(logs[name]["TF_CONFIG"]) for name in ("workerpool0-0", "workerpool1-1"))
    assert (chief.num_workers, chief.is_chief, worker.name, worker.is_chief) == (3, True, "worker 1", False)
    assert logs["workerpool3-0"]["TF_EXTRA"] == "1"


def test_run_custom_job_fails_with_any_replica_and_ends_the_others(image: Image, tmp_path: Path) -> None:
    sleep = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    wait = f"import os, time\nwhile not os.path.getsize('{tmp_path}/job/workerpool0-0.log'): time.sleep(0.1)"
    fail = f"{wait}\nraise OSError('no GPU')"
    with pytest.raises(ContainerError, match=r"workerpool1-0 ended with exit code 1(.|\n)*no GPU"):
        run_custom_job(custom_job((1, sleep), (1, fail)), image=image, folder=tmp_path / "job")
    assert has_ended(int((tmp_path / "job" / "workerpool0-0.log").read_text()))


def test_run_custom_job_is_done_with_its_chief(image: Image, tmp_path: Path) -> None:
    started = time.monotonic()
    run_custom_job(custom_job((1, "pass"), (1, "import time; time.sleep(600)")), image=image, folder=tmp_path / "job")
    assert time.monotonic() - started < 600


def test_run_custom_job_of_a_spot_machine_is_ended_and_started_anew(image: Image, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    program = f"""
import os, signal, sys, time
if os.path.exists({str(checkpoint)!r}):
    sys.exit(print('resumed at', open({str(checkpoint)!r}).read()))
def save(number, frame):
    open({str(checkpoint)!r}, 'w').write('epoch 3')
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print('begun', flush=True)
time.sleep(600)
"""
    log = tmp_path / "job" / "workerpool0-0.log"
    run_custom_job(
        custom_job((1, program)),
        image=image,
        folder=tmp_path / "job",
        timeout_seconds=600,
        preempt_when=lambda: "begun" in log.read_text(),
    )
    assert log.read_text() == "begun\nresumed at epoch 3\n"


SERVER = """
import http.server, json, os
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == os.environ["AIP_HEALTH_ROUTE"] else 404)
        self.end_headers()
    def do_POST(self):
        instances = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["instances"]
        answer = [f"{one} by {os.environ['AIP_STORAGE_URI']} at {self.path}" for one in instances]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"predictions": answer}).encode())
http.server.HTTPServer(("localhost", int(os.environ["AIP_HTTP_PORT"])), Handler).serve_forever()
"""


def served_model(program: str) -> aiplatform_v1.Model:
    container = {"image_uri": "image", "command": ["python", "-c", program], "predict_route": "/ask", "health_route": "/alive"}
    return aiplatform_v1.Model(artifact_uri="gs://bucket/model", container_spec=container)


def test_serving_container_answers_from_when_it_is_healthy_until_its_end(image: Image, tmp_path: Path) -> None:
    with serving_container(served_model(SERVER), image=image, log=tmp_path / "server.log", environment={}) as predict:
        assert predict([1, "two"]) == ["1 by gs://bucket/model at /ask", "two by gs://bucket/model at /ask"]
    with pytest.raises(OSError, match="refused"):
        predict([1])


def test_serving_container_that_ends_fails_with_its_log(image: Image, tmp_path: Path) -> None:
    container = serving_container(
        served_model("raise OSError('no model')"), image=image, log=tmp_path / "a.log", environment={}
    )
    with pytest.raises(ContainerError, match=r"did not become healthy(.|\n)*no model"), container:
        pass
