"""The same pipeline compiles for Vertex AI and for Kubeflow, without credentials and without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from google.auth.credentials import AnonymousCredentials
from google.protobuf import json_format
from kfp import components as kfp_components
from kfp.pipeline_spec import pipeline_spec_pb2

import kubeflow_runner
from data.errors import EXIT_DONE, EXIT_WRONG_INPUT
from pipeline.submission import new_run_name, read_job
from pipeline.vertex import MAX_NAME

IMAGE = "us-docker.pkg.dev/my-project/images/tfx-vision:1"
SETTINGS = {
    "TFX_VISION_PIPELINE__NAME": "flowers",
    "TFX_VISION_DATA__INPUT": "gs://bucket/records",
    "TFX_VISION_DATA__CLASS_NAMES": '["daisy", "rose"]',
    "TFX_VISION_DATA__SLICE_COLUMNS": '["camera"]',
    "TFX_VISION_VERTEX__PROJECT": "my-project",
    "TFX_VISION_VERTEX__BUCKET": "gs://bucket",
    "TFX_VISION_VERTEX__IMAGE": IMAGE,
}
DIGIT_FIRST = {"TFX_VISION_PIPELINE__NAME": "", "TFX_VISION_DATA__INPUT": "gs://bucket/2024 Flowers"}  # a name from the data's
STEPS = {
    *("ImportExampleGen", "StatisticsGen", "Schema", "ExampleValidator", "DataGate", "Transform", "TrainingParameters"),
    *("Trainer", "LatestBlessedModel-model-blessing-resolver", "LatestBlessedModel-model-resolver", "Evaluator"),
    *("ServingCheck", "Pusher"),
}


def environment(home: Path) -> dict[str, str]:
    """Neither credentials nor settings, but those of this file."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("GOOGLE_", "TFX_VISION_"))}
    path = f"{Path(sys.executable).parent}:{kept['PATH']}"
    return kept | {"HOME": str(home), "PATH": path, "NO_GCE_CHECK": "true", **SETTINGS}


def tfx(home: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs the tfx command."""
    command = ["tfx", "pipeline", *arguments]
    return subprocess.run(command, cwd=home, env=environment(home), capture_output=True, text=True, check=False)


@pytest.fixture
def compile_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs the runner in a folder of its own; gives the exit code."""

    def run(*arguments: str, **settings: str) -> int:
        for name in list(os.environ):
            if name.startswith(("GOOGLE_", "TFX_VISION_")):
                monkeypatch.delenv(name)
        for name, value in {**SETTINGS, **settings}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
        return kubeflow_runner.main(list(arguments))

    return run


@pytest.fixture(scope="module")
def created(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of a user who ran `tfx pipeline create`."""
    home = tmp_path_factory.mktemp("home")
    done = tfx(home, "create", "--engine=vertex", f"--pipeline_path={ROOT / 'kubeflow_runner.py'}")
    assert done.returncode == 0, done.stderr
    assert 'Pipeline "flowers" created successfully' in done.stdout
    return home


@pytest.fixture(scope="module")
def compiled(created: Path) -> dict[str, Any]:
    """The job that the tfx command wrote."""
    return json.loads((created / "tfx" / "vertex" / "flowers" / "pipeline.json").read_text())


def parameters_of(compiled: dict[str, Any], task: str) -> dict[str, Any]:
    return compiled["pipelineSpec"]["root"]["dag"]["tasks"][task]["inputs"]["parameters"]


def custom_config(compiled: dict[str, Any], task: str) -> dict[str, Any]:
    return json.loads(parameters_of(compiled, task)["custom_config"]["runtimeValue"]["constantValue"]["stringValue"])


def executor_args(compiled: dict[str, Any], component: str) -> list[str]:
    executors = compiled["pipelineSpec"]["deploymentSpec"]["executors"]
    return executors[f"{component}_executor"]["container"]["args"]


def test_compiled_job_is_a_pipeline_spec_of_every_component(compiled: dict[str, Any]) -> None:
    spec = json_format.ParseDict(compiled["pipelineSpec"], pipeline_spec_pb2.PipelineSpec())
    assert spec.pipeline_info.name == "flowers"
    assert set(spec.root.dag.tasks) == STEPS
    assert "DataGate" in spec.root.dag.tasks["Transform"].dependent_tasks
    blessings = spec.root.dag.tasks["Pusher"].inputs.artifacts
    assert blessings["model_blessing"].task_output_artifact.producer_task == "Evaluator"
    assert blessings["infra_blessing"].task_output_artifact.producer_task == "ServingCheck"


def test_every_step_runs_in_the_given_image(compiled: dict[str, Any]) -> None:
    executors = compiled["pipelineSpec"]["deploymentSpec"]["executors"]
    images = {spec["container"]["image"] for spec in executors.values() if "container" in spec}
    assert images == {IMAGE}


def test_trainer_is_a_custom_job_with_a_gpu(compiled: dict[str, Any]) -> None:
    settings = custom_config(compiled, "Trainer")
    job = settings["ai_platform_training_args"]
    assert settings["ai_platform_enable_vertex"] is True
    assert job["project"] == "my-project"
    (pool,) = job["job_spec"]["worker_pool_specs"]
    assert pool["machine_spec"] == {
        "machine_type": "n1-standard-8",
        "accelerator_type": "NVIDIA_TESLA_T4",
        "accelerator_count": 1,
    }
    assert pool["container_spec"]["image_uri"] == IMAGE
    assert settings["trainer"]["class_names"] == ["daisy", "rose"]


@pytest.mark.parametrize("component", ["ImportExampleGen", "StatisticsGen", "Transform", "Evaluator"])
def test_beam_steps_go_to_dataflow(compiled: dict[str, Any], component: str) -> None:
    args = executor_args(compiled, component)
    assert "--runner=DataflowRunner" in args
    assert f"--sdk_container_image={IMAGE}" in args


def test_every_runtime_parameter_has_a_value(compiled: dict[str, Any]) -> None:
    values = compiled["runtimeConfig"]["parameters"]
    assert set(values) == set(compiled["pipelineSpec"]["root"]["inputDefinitions"]["parameters"])
    assert values["records"] == {"stringValue": "gs://bucket/records"}
    assert values["schema"] == {"stringValue": "gs://bucket/records/schema"}
    assert values["epochs"] == {"intValue": "40"}
    assert values["learning_rate"] == {"doubleValue": 0.001}
    assert values["min_accuracy"] == {"doubleValue": 0.7}


@pytest.mark.parametrize(
    ("task", "parameter", "name"),
    [
        ("ImportExampleGen", "input_base", "records"),
        ("Schema", "artifact_uri", "schema"),
        ("TrainingParameters", "epochs", "epochs"),
        ("TrainingParameters", "learning_rate", "learning_rate"),
        ("Evaluator", "min_accuracy", "min_accuracy"),
        ("Evaluator", "max_accuracy_drop", "max_accuracy_drop"),
    ],
)
def test_runtime_parameters_reach_the_steps(compiled: dict[str, Any], task: str, parameter: str, name: str) -> None:
    assert parameters_of(compiled, task)[parameter] == {"componentInputParameter": name}


def test_pusher_deploys_step_by_step(compiled: dict[str, Any]) -> None:
    config = json.loads(parameters_of(compiled, "Pusher")["config"]["runtimeValue"]["constantValue"]["stringValue"])
    assert (config["project"], config["traffic_steps"], config["image"]) == ("my-project", [10, 50, 100], IMAGE)
    assert "pipeline.components.VertexDeployer_Executor" in executor_args(compiled, "Pusher")


def test_job_loads_in_the_client_of_vertex(created: Path) -> None:
    from google.cloud import aiplatform

    job = aiplatform.PipelineJob(
        display_name="flowers",
        template_path=str(created / "tfx" / "vertex" / "flowers" / "pipeline.json"),
        parameter_values={"epochs": "5", "learning_rate": "0.01"},  # texts, as `tfx run create` passes them
        project="my-project",
        location="us-central1",
        credentials=AnonymousCredentials(),
    )
    parameters = job._gca_resource.runtime_config.parameters  # which it would send
    assert (parameters["epochs"].int_value, parameters["learning_rate"].double_value) == (5, 0.01)
    assert parameters["min_accuracy"].double_value == 0.7


@pytest.mark.parametrize(("name", "is_taken"), [("f" * MAX_NAME, True), ("f" * 128, False), ("2024-flowers", False)])
def test_names_that_compile_make_ids_that_the_client_of_vertex_takes(compiled, tmp_path, name, is_taken) -> None:
    from google.cloud import aiplatform

    path = tmp_path / "pipeline.json"
    path.write_text(json.dumps(compiled | {"pipelineSpec": compiled["pipelineSpec"] | {"pipelineInfo": {"name": name}}}))
    settings = {"template_path": str(path), "project": "my-project", "location": "us-central1"}
    if not is_taken:
        with pytest.raises(ValueError, match="is illegal as a Vertex pipelines job ID"):
            aiplatform.PipelineJob(display_name=name, credentials=AnonymousCredentials(), **settings)
        return
    job = aiplatform.PipelineJob(display_name=name, credentials=AnonymousCredentials(), **settings)
    ids = [job.job_id, job.clone().job_id, new_run_name(read_job(path))]
    assert all(one.find(name) >= 0 and len(one) <= 128 for one in ids)


def test_job_compiles_to_the_same_bytes_twice(compile_job, created: Path, tmp_path: Path) -> None:
    assert compile_job() == EXIT_DONE
    first = (tmp_path / "pipeline.json").read_bytes()
    assert compile_job() == EXIT_DONE
    assert (tmp_path / "pipeline.json").read_bytes() == first
    assert (created / "tfx" / "vertex" / "flowers" / "pipeline.json").read_bytes() == first  # in another process
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline.json"]


def test_tfx_command_updates_compiles_lists_and_deletes(created: Path) -> None:
    # In one process, as each `tfx` imports for ten seconds.
    script = """
import sys
from tfx.tools.cli.cli_main import cli_group
for arguments in sys.argv[1:]:
    try:
        cli_group(["pipeline", *arguments.split()], standalone_mode=False)
    except SystemExit as error:
        print("ended with", error.code)
"""
    path = f"--pipeline_path={ROOT / 'kubeflow_runner.py'}"
    commands = [
        f"create --engine=vertex {path}",
        f"update --engine=vertex {path}",
        f"compile --engine=vertex {path}",
        "list --engine=vertex",
        "delete --engine=vertex --pipeline_name=flowers",
        "list --engine=vertex",
    ]
    folder = created / "elsewhere"
    folder.mkdir()
    home = environment(created)
    stored = created / "tfx" / "vertex" / "flowers"
    first = (stored / "pipeline.json").read_bytes()

    done = subprocess.run(
        [sys.executable, "-c", script, *commands], cwd=folder, env=home, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    lines = done.stdout
    assert 'ended with Pipeline "flowers" already exists.' in lines
    assert 'Pipeline "flowers" updated successfully.' in lines
    assert "Pipeline flowers compiled successfully." in lines
    assert "Pipeline flowers deleted successfully." in lines
    before, after = lines.split("Pipeline flowers deleted successfully.")
    assert "flowers\n" in before.split("Listing all pipelines")[1]
    assert "flowers\n" not in after
    assert (folder / "pipeline.json").read_bytes() == first
    assert not stored.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"TFX_VISION_VERTEX__PROJECT": ""}, "Expected `vertex.project` to be set"),
        ({"TFX_VISION_VERTEX__BUCKET": "bucket"}, "Expected `vertex.bucket` to begin with gs://"),
        ({"TFX_VISION_DATA__INPUT": "photos"}, "to be a gs:// folder of records"),
        ({"TFX_VISION_DATA__SLICE_COLUMNS": "photos"}, "Expected `data.slice_columns`"),
        ({"TFX_VISION_VERTEX__ACCELERATOR_COUNT": "0"}, "both set or both empty"),
        ({"TFX_VISION_VERTEX__ACCELERATOR_TYPE": "NVIDIA_L4"}, "Expected a machine type that takes NVIDIA_L4"),
        ({"TFX_VISION_VERTEX__REGION": "europe-north1"}, "Expected a region that has NVIDIA_TESLA_T4"),
        ({"TFX_VISION_PIPELINE__NAME": "My_Flowers"}, "Expected `pipeline.name` to be valid"),
        ({"TFX_VISION_PIPELINE__NAME": "2024-flowers"}, "Expected the name of a compiled pipeline to begin with a letter"),
        (DIGIT_FIRST | {"TFX_VISION_ENGINE": "vertex"}, "Received: '2024-flowers'. Set `pipeline.name`"),
        (DIGIT_FIRST | {"TFX_VISION_ENGINE": "kubeflow"}, "Received: '2024-flowers'. Set `pipeline.name`"),
        ({"TFX_VISION_PIPELINE__NAME": "f" * 101}, "to have at most 100 characters"),
        ({"TFX_VISION_VERTEX__REGOIN": "x"}, "Did you mean `vertex.region`"),
        ({"TFX_VISION_ENGINE": "airflow"}, "Expected `engine` to be valid"),
        ({"TFX_VISION_ENGINE": "kubeflow"}, 'Expected `evaluation.compare_with = "nothing"` on Kubeflow'),
    ],
)
def test_wrong_setting_ends_in_one_clear_line(compile_job, settings: dict, message: str, tmp_path: Path, capfd) -> None:
    assert compile_job(**settings) == EXIT_WRONG_INPUT
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_search_and_warm_start_compile_too(compile_job, tmp_path: Path) -> None:
    settings = ["--set", "tuner.trials=3", "--set", "training.warm_start=true"]
    assert compile_job(*settings) == EXIT_DONE
    compiled = json.loads((tmp_path / "pipeline.json").read_text())
    tasks = compiled["pipelineSpec"]["root"]["dag"]["tasks"]
    inputs = tasks["Trainer"]["inputs"]["artifacts"]
    assert inputs["hyperparameters"]["taskOutputArtifact"]["producerTask"] == "Tuner"
    assert inputs["base_model"]["taskOutputArtifact"]["producerTask"] == "WarmStartModel-model-resolver"
    assert "epochs" not in compiled["runtimeConfig"]["parameters"]  # the Tuner finds the training's values
    assert custom_config(compiled, "Trainer")["trainer"]["cache_dir"] == "gs://bucket/cache/flowers/embeddings"


def test_training_in_the_step_itself_asks_for_its_gpu(compile_job, tmp_path: Path) -> None:
    settings = ["--set", "vertex.train_on=pipeline_step", "--set", "vertex.deployer=tfx", "--set", "vertex.dataflow=false"]
    assert compile_job(*settings) == EXIT_DONE
    compiled = json.loads((tmp_path / "pipeline.json").read_text())
    container = compiled["pipelineSpec"]["deploymentSpec"]["executors"]["Trainer_executor"]["container"]
    assert container["resources"]["accelerator"] == {"count": "1", "type": "NVIDIA_TESLA_T4"}
    assert "tfx.components.trainer.executor.GenericExecutor" in container["args"]
    assert "--runner=FnApiRunner" in executor_args(compiled, "Evaluator")
    pusher = custom_config(compiled, "Pusher")
    assert pusher["ai_platform_serving_args"]["endpoint_name"] == "flowers"
    assert pusher["ai_platform_vertex_container_image_uri"] == IMAGE


def test_kubeflow_gets_a_file_that_its_client_loads(compile_job, tmp_path: Path, capfd) -> None:
    settings = ["--set", "engine=kubeflow", "--set", "evaluation.compare_with=nothing"]
    assert compile_job(*settings) == EXIT_DONE
    assert capfd.readouterr().out == "Compiled flowers for kubeflow: pipeline.yaml\n"
    text = (tmp_path / "pipeline.yaml").read_text()
    spec = json_format.ParseDict(yaml.safe_load(text), pipeline_spec_pb2.PipelineSpec())
    assert (spec.schema_version, spec.default_pipeline_root) == ("2.1.0", "gs://bucket/pipeline_root/flowers")
    executors = yaml.safe_load(text)["deploymentSpec"]["executors"]
    assert not [name for name, executor in executors.items() if "resolver" in executor]
    assert executors["Trainer_executor"]["container"]["resources"]["accelerator"]["type"] == "nvidia.com/gpu"
    loaded = kfp_components.load_component_from_text(text).component_spec
    assert {name: value.default for name, value in loaded.inputs.items()}["epochs"] == 40
    assert all(value.optional for value in loaded.inputs.values())


def test_kubeflow_cannot_start_from_an_earlier_model(compile_job, capfd) -> None:
    settings = ["engine=kubeflow", "evaluation.compare_with=nothing", "training.warm_start=true"]
    assert compile_job(*(part for setting in settings for part in ("--set", setting))) == EXIT_WRONG_INPUT
    assert "Expected `training.warm_start = false` on Kubeflow" in capfd.readouterr().err
