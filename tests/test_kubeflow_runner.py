"""The same pipeline compiles for Vertex AI, without credentials and without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "TFX_VISION_PIPELINE__NAME": "flowers",
    "TFX_VISION_DATA__INPUT": "gs://bucket/records",
    "TFX_VISION_DATA__CLASS_NAMES": '["daisy", "rose"]',
    "TFX_VISION_DATA__SLICE_COLUMNS": '["camera"]',
    "TFX_VISION_VERTEX__PROJECT": "my-project",
    "TFX_VISION_VERTEX__BUCKET": "gs://bucket",
    "TFX_VISION_VERTEX__IMAGE": "us-docker.pkg.dev/my-project/images/tfx-vision:1",
}


def run(command: list[str], folder: Path, **settings: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("GOOGLE_", "TFX_VISION_"))}
    environment |= {
        "HOME": str(folder),
        "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",
        "NO_GCE_CHECK": "true",
        **SETTINGS,
        **settings,
    }
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The job that the tfx command writes."""
    folder = tmp_path_factory.mktemp("home")
    command = ["tfx", "pipeline", "create", "--engine=vertex", f"--pipeline_path={ROOT / 'kubeflow_runner.py'}"]
    done = run(command, folder)
    assert done.returncode == 0, done.stderr
    assert 'Pipeline "flowers" created successfully' in done.stdout
    return json.loads((folder / "tfx" / "vertex" / "flowers" / "pipeline.json").read_text())


def executor_args(compiled: dict, component: str) -> list[str]:
    executors = compiled["pipelineSpec"]["deploymentSpec"]["executors"]
    return executors[f"{component}_executor"]["container"]["args"]


def test_compiled_job_is_a_pipeline_spec_of_every_component(compiled: dict) -> None:
    spec = json_format.ParseDict(compiled["pipelineSpec"], pipeline_spec_pb2.PipelineSpec())
    assert spec.pipeline_info.name == "flowers"
    assert {task.replace("-model-resolver", "").replace("-model-blessing-resolver", "") for task in spec.root.dag.tasks} == {
        "ImportExampleGen",
        "StatisticsGen",
        "Schema",
        "ExampleValidator",
        "DataGate",
        "Transform",
        "Trainer",
        "LatestBlessedModel",
        "Evaluator",
        "ServingCheck",
        "Pusher",
    }
    assert "DataGate" in spec.root.dag.tasks["Transform"].dependent_tasks
    blessings = spec.root.dag.tasks["Pusher"].inputs.artifacts
    assert blessings["model_blessing"].task_output_artifact.producer_task == "Evaluator"
    assert blessings["infra_blessing"].task_output_artifact.producer_task == "ServingCheck"


def test_every_step_runs_in_the_given_image(compiled: dict) -> None:
    executors = compiled["pipelineSpec"]["deploymentSpec"]["executors"]
    images = {spec["container"]["image"] for spec in executors.values() if "container" in spec}
    assert images == {SETTINGS["TFX_VISION_VERTEX__IMAGE"]}


def test_trainer_is_a_custom_job_with_a_gpu(compiled: dict) -> None:
    parameters = compiled["pipelineSpec"]["root"]["dag"]["tasks"]["Trainer"]["inputs"]["parameters"]
    custom_config = json.loads(parameters["custom_config"]["runtimeValue"]["constantValue"]["stringValue"])
    job = custom_config["ai_platform_training_args"]
    assert custom_config["ai_platform_enable_vertex"] is True
    assert job["project"] == "my-project"
    (pool,) = job["worker_pool_specs"]
    assert pool["machine_spec"] == {
        "machine_type": "n1-standard-8",
        "accelerator_type": "NVIDIA_TESLA_T4",
        "accelerator_count": 1,
    }
    assert pool["container_spec"]["image_uri"] == SETTINGS["TFX_VISION_VERTEX__IMAGE"]
    assert custom_config["trainer"]["class_names"] == ["daisy", "rose"]


@pytest.mark.parametrize("component", ["ImportExampleGen", "StatisticsGen", "Transform", "Evaluator"])
def test_beam_steps_go_to_dataflow(compiled: dict, component: str) -> None:
    args = executor_args(compiled, component)
    assert "--runner=DataflowRunner" in args
    assert f"--sdk_container_image={SETTINGS['TFX_VISION_VERTEX__IMAGE']}" in args


def test_pusher_pushes_to_an_endpoint(compiled: dict) -> None:
    parameters = compiled["pipelineSpec"]["root"]["dag"]["tasks"]["Pusher"]["inputs"]["parameters"]
    custom_config = json.loads(parameters["custom_config"]["runtimeValue"]["constantValue"]["stringValue"])
    assert custom_config["ai_platform_serving_args"]["endpoint_name"] == "flowers"
    assert "model_blessing" in compiled["pipelineSpec"]["root"]["dag"]["tasks"]["Pusher"]["inputs"]["artifacts"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"TFX_VISION_VERTEX__PROJECT": ""}, "Expected `vertex.project` to be set"),
        ({"TFX_VISION_VERTEX__BUCKET": "bucket"}, "Expected `vertex.bucket` to begin with gs://"),
        ({"TFX_VISION_DATA__INPUT": "photos"}, "to be a gs:// folder of records"),
        ({"TFX_VISION_VERTEX__ACCELERATOR_COUNT": "0"}, "both set or both empty"),
        ({"TFX_VISION_VERTEX__REGOIN": "x"}, "Did you mean `vertex.region`"),
    ],
)
def test_wrong_setting_ends_in_one_clear_line(settings: dict, message: str, tmp_path: Path) -> None:
    done = run([sys.executable, str(ROOT / "kubeflow_runner.py")], tmp_path, **settings)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "pipeline.json").exists()


def test_search_and_warm_start_compile_too(tmp_path: Path) -> None:
    settings = {"TFX_VISION_TUNER__TRIALS": "3", "TFX_VISION_TRAINING__WARM_START": "true"}
    done = run([sys.executable, str(ROOT / "kubeflow_runner.py")], tmp_path, **settings)
    assert done.returncode == 0, done.stderr
    tasks = json.loads((tmp_path / "pipeline.json").read_text())["pipelineSpec"]["root"]["dag"]["tasks"]
    inputs = tasks["Trainer"]["inputs"]["artifacts"]
    assert inputs["hyperparameters"]["taskOutputArtifact"]["producerTask"] == "Tuner"
    assert inputs["base_model"]["taskOutputArtifact"]["producerTask"] == "WarmStartModel-model-resolver"
    parameters = tasks["Trainer"]["inputs"]["parameters"]
    custom_config = json.loads(parameters["custom_config"]["runtimeValue"]["constantValue"]["stringValue"])
    assert custom_config["trainer"]["cache_dir"] == "gs://bucket/cache/flowers/embeddings"
