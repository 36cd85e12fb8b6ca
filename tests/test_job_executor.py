"""The executor of compiled jobs, on small jobs made by hand whose containers are Python one-liners."""

import copy
import dataclasses
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from container_steps import Image, image_folder
from job_executor import METADATA_STORE, Artifact, JobResult, execute_job, local_job
from tfx.orchestration.kubeflow.v2.container import kubeflow_v2_entrypoint_utils
from tfx.types import standard_artifacts

MODEL, BLESSING = ({"instanceSchema": f"title: tfx.{name}\ntype: object\n"} for name in ("Model", "ModelBlessing"))
# A container's program: `i` is its ExecutorInput, `outputs` its output artifacts; what it puts in `metadata` is written.
PROLOGUE = """
import json, os, sys
i = json.loads(sys.argv[1])
outputs = {key: value["artifacts"][0] for key, value in i["outputs"].get("artifacts", {}).items()}
metadata, values = {}, {}
"""
EPILOGUE = """
if metadata or values:
    artifacts = {key: {"artifacts": [outputs[key] | {"metadata": value}]} for key, value in metadata.items()}
    os.makedirs(os.path.dirname(i["outputs"]["outputFile"]), exist_ok=True)
    with open(i["outputs"]["outputFile"], "w") as file:
        json.dump({"artifacts": artifacts, "parameterValues": values}, file)
"""
TRAIN = "open(outputs['model']['uri'] + '/weights', 'w').write('7'); metadata['model'] = {'steps': 3}"
JUDGE = """
model = i["inputs"]["artifacts"]["model"]["artifacts"][0]
assert open(model["uri"] + "/weights").read() == "7" and model["metadata"] == {"steps": 3.0, "kind": "small"}
metadata["blessing"] = {"blessed": 1, "current_model_id": model["name"]}
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """An image with one module, `greeting`."""
    context = tmp_path_factory.mktemp("context")
    (context / "greeting.py").write_text("TEXT = 'hello'\n")
    (context / ".dockerignore").write_text("")
    (context / "Dockerfile").write_text(
        "FROM python AS pipeline\nENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app\nWORKDIR /app\nCOPY greeting.py ./\n"
    )
    return image_folder(context / "Dockerfile", context / ".dockerignore", context / "app")


def python(program: str) -> list[str]:
    return ["python", "-c", textwrap.dedent(PROLOGUE) + textwrap.dedent(program) + EPILOGUE, "{{$}}"]


def make_job(folder: Path, components: dict[str, dict[str, Any]], *, schema: str = "2.0.0", **root: Any) -> dict[str, Any]:
    """Makes a job of one task for each component.

    Args:
      folder: the pipeline root.
      components: task -> `run`, a program, or `executor`, a whole one; `inputs`: key -> (task, key, type); `outputs`: key ->
        type or a whole ArtifactSpec; `parameters`: key -> (declaration, value); `task`: more fields of its PipelineTaskSpec.
      schema: version of the PipelineSpec.
      root: `parameters` of the pipeline, and `given`, their values.
    """
    spec: dict[str, Any] = {
        "pipelineInfo": {"name": "shapes"},
        "schemaVersion": schema,
        "root": {"dag": {"tasks": {}}, "inputDefinitions": {"parameters": root.get("parameters", {})}},
        "components": {},
        "deploymentSpec": {"executors": {}},
    }
    for name, component in components.items():
        inputs, parameters = component.get("inputs", {}), component.get("parameters", {})
        outputs = {
            key: type_ if "artifactType" in type_ else {"artifactType": type_}
            for key, type_ in component.get("outputs", {}).items()
        }
        spec["components"][name] = {
            "executorLabel": f"{name}_executor",
            "inputDefinitions": {
                "artifacts": {key: {"artifactType": type_} for key, (_, _, type_) in inputs.items()},
                "parameters": {key: declaration for key, (declaration, _) in parameters.items()},
            },
            "outputDefinitions": {"artifacts": outputs, "parameters": component.get("output_parameters", {})},
        }
        spec["root"]["dag"]["tasks"][name] = {
            "taskInfo": {"name": name},
            "componentRef": {"name": name},
            "inputs": {
                "artifacts": {
                    key: {"taskOutputArtifact": {"producerTask": task, "outputArtifactKey": output}}
                    for key, (task, output, _) in inputs.items()
                },
                "parameters": {key: value for key, (_, value) in parameters.items()},
            },
            **component.get("task", {}),
        }
        container = {"container": {"image": "image", "command": python(component.get("run", ""))}}
        spec["deploymentSpec"]["executors"][f"{name}_executor"] = component.get("executor", container)
    values = "parameters" if schema == "2.0.0" else "parameterValues"
    return {"pipelineSpec": spec, "runtimeConfig": {"gcsOutputDirectory": str(folder), values: root.get("given", {})}}


@pytest.fixture
def execute(image: Image, tmp_path: Path) -> Callable[..., JobResult]:
    """Gives `execute(components, store=[], given..., **options)`: makes a job and executes it."""

    def run(
        components: dict, *, store: list[Artifact] | None = None, options: dict | None = None, **settings: Any
    ) -> JobResult:
        job = make_job(tmp_path / "root", components, **settings)
        return execute_job(
            job, image=image, folder=tmp_path, store=[] if store is None else store, timeout_seconds=60, **(options or {})
        )

    return run


def states(result: JobResult) -> dict[str, str]:
    return {name: task.state for name, task in result.tasks.items()}


def trainer_and_judge() -> dict[str, dict]:
    return {
        "Judge": {"run": JUDGE, "inputs": {"model": ("Trainer", "model", MODEL)}, "outputs": {"blessing": BLESSING}},
        "Trainer": {"run": TRAIN, "outputs": {"model": {"artifactType": MODEL, "metadata": {"kind": "small"}}}},
    }


def test_execute_job_hands_artifacts_and_their_metadata_from_task_to_task(execute: Callable, tmp_path: Path) -> None:
    store: list[Artifact] = []
    result = execute(trainer_and_judge(), store=store)
    assert (result.state, list(result.tasks)) == ("SUCCEEDED", ["Trainer", "Judge"]), result.tasks
    model, blessing = store
    assert model.name == f"{METADATA_STORE}/artifacts/1"
    assert model.metadata == {"kind": "small", "steps": 3.0}
    assert blessing.metadata == {"blessed": 1.0, "current_model_id": model.name}
    assert (model.schema_title, model.state) == ("tfx.Model", "LIVE")
    assert Path(model.uri).parent.parent == tmp_path / "root" / "123456789012" / result.job_id
    assert Path(model.uri).parent.name.startswith("Trainer_")
    assert json.loads((tmp_path / "job.json").read_text())["tasks"]["Judge"]["state"] == "SUCCEEDED"


def test_execute_job_without_an_output_file_keeps_the_metadata_as_planned(execute: Callable) -> None:
    trainer = {"Trainer": {"outputs": {"model": {"artifactType": MODEL, "metadata": {"kind": "small"}}}}}
    (model,) = execute(trainer).tasks["Trainer"].outputs["model"]
    assert model.metadata == {"kind": "small"}


def test_execute_job_after_a_failed_task_runs_only_what_does_not_depend_on_it(execute: Callable) -> None:
    components = trainer_and_judge()
    components["Trainer"]["run"] = "sys.exit('the loss is not a number')"
    components["Other"] = {"run": "pass"}
    components["After"] = {"task": {"dependentTasks": ["Judge"]}}
    components["Cleaner"] = {
        "task": {"dependentTasks": ["Trainer"], "triggerPolicy": {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}}
    }
    store: list[Artifact] = []
    result = execute(components, store=store)
    expected = {"Trainer": "FAILED", "Judge": "NOT_TRIGGERED", "After": "NOT_TRIGGERED"}
    assert states(result) == expected | {"Other": "SUCCEEDED", "Cleaner": "SUCCEEDED"}
    assert result.state == "FAILED"
    assert "exit code 1" in result.tasks["Trainer"].error
    assert result.tasks["Trainer"].error.endswith("the loss is not a number")
    assert [artifact.state for artifact in store] == ["PENDING"]


@pytest.mark.parametrize(("blessed", "state"), [(1, "SUCCEEDED"), (0, "NOT_TRIGGERED")])
def test_execute_job_triggers_a_task_by_its_condition(execute: Callable, blessed: int, state: str) -> None:
    condition = "(inputs.artifacts['blessing'].artifacts[0].metadata['blessed'] == 1.0)"
    result = execute(
        {
            "Judge": {"run": f"metadata['blessing'] = {{'blessed': {blessed}}}", "outputs": {"blessing": BLESSING}},
            "Pusher": {
                "inputs": {"blessing": ("Judge", "blessing", BLESSING)},
                "task": {"triggerPolicy": {"condition": condition}},
            },
            "Cleaner": {"task": {"dependentTasks": ["Pusher"]}},
        }
    )
    assert states(result) == {"Judge": "SUCCEEDED", "Pusher": state, "Cleaner": state}
    assert result.state == "SUCCEEDED"


RESOLVERS = {
    "Blessing": {
        "executor": {
            "resolver": {
                "outputArtifactQueries": {
                    "blessing": {
                        "filter": 'schema_title="tfx.ModelBlessing" AND state=LIVE AND metadata.blessed.number_value=1'
                    }
                }
            }
        },
        "outputs": {"blessing": BLESSING},
    },
    "Latest": {
        "executor": {
            "resolver": {
                "outputArtifactQueries": {
                    "model": {
                        "filter": 'schema_title="tfx.Model" AND state=LIVE AND '
                        "name=\"{{$.inputs.artifacts['input'].metadata['current_model_id']}}\""
                    }
                }
            }
        },
        "inputs": {"input": ("Blessing", "blessing", BLESSING)},
        "outputs": {"model": MODEL},
    },
    "Compare": {
        "run": "print(len(i['inputs']['artifacts']['baseline'].get('artifacts', [])), 'baselines')",
        "inputs": {"baseline": ("Latest", "model", MODEL)},
    },
}


def test_execute_job_resolves_the_blessed_model_of_an_earlier_execution_only(execute: Callable) -> None:
    store: list[Artifact] = []
    first = execute(trainer_and_judge() | RESOLVERS, store=store)
    assert first.tasks["Compare"].log.read_text() == "0 baselines\n"
    first.tasks["Compare"].log.unlink()
    second = execute(trainer_and_judge() | RESOLVERS, store=store)
    assert second.tasks["Latest"].outputs["model"] == first.tasks["Trainer"].outputs["model"]
    assert second.tasks["Compare"].log.read_text() == "1 baselines\n"
    third = execute(trainer_and_judge() | RESOLVERS, store=store)
    assert third.tasks["Latest"].outputs["model"] == second.tasks["Trainer"].outputs["model"]
    for index, artifact in enumerate(store):  # as if another pipeline had made them all
        store[index] = dataclasses.replace(artifact, contexts=("another",))
    fourth = execute(trainer_and_judge() | RESOLVERS, store=store)
    assert fourth.tasks["Compare"].log.read_text().endswith("0 baselines\n")


def importer(reimport: bool, fingerprint: str = "5e41") -> dict[str, dict]:
    executor = {
        "artifactUri": {"runtimeParameter": "artifact_uri"},
        "typeSchema": MODEL,
        "metadata": {"fingerprint": fingerprint},
        "reimport": reimport,
    }
    parameters = {"artifact_uri": ({"type": "STRING"}, {"componentInputParameter": "folder"})}
    return {"Importer": {"executor": {"importer": executor}, "outputs": {"result": MODEL}, "parameters": parameters}}


def test_execute_job_imports_anew_only_what_has_changed_or_is_asked_for(execute: Callable) -> None:
    store: list[Artifact] = []
    settings = {"store": store, "parameters": {"folder": {"type": "STRING"}}, "given": {"folder": {"stringValue": "/schema"}}}
    names = []
    for job in (importer(False), importer(False), importer(False, "0000"), importer(True, "0000")):
        (artifact,) = execute(job, **settings).tasks["Importer"].outputs["result"]
        names.append(artifact.name.rpartition("/")[2])
        assert (artifact.uri, artifact.state) == ("/schema", "LIVE")
    assert names == ["1", "1", "2", "3"]


def test_execute_job_runs_the_driver_before_the_executor_and_merges_what_both_write(execute: Callable) -> None:
    driver = "metadata['examples'] = {'fingerprint': 'abc', 'span': 4}"
    executor = """
        assert outputs["examples"]["metadata"] == {"fingerprint": "abc", "span": 4.0}
        assert json.load(open(i["outputs"]["outputFile"]))["artifacts"]["examples"]
        metadata["examples"] = {"span": 5}
    """
    container = {"image": "image", "command": python(executor), "lifecycle": {"preCacheCheck": {"command": python(driver)}}}
    result = execute({"ExampleGen": {"executor": {"container": container}, "outputs": {"examples": MODEL}}})
    (examples,) = result.tasks["ExampleGen"].outputs["examples"]
    assert examples.metadata == {"fingerprint": "abc", "span": 5.0}


@pytest.mark.parametrize("schema", ["2.0.0", "2.1.0"])
def test_execute_job_gives_parameters_in_the_form_of_the_schema(execute: Callable, schema: str) -> None:
    legacy = schema == "2.0.0"
    types = {"epochs": "INT", "rate": "DOUBLE", "name": "STRING"}
    if legacy:
        declared = {name: {"type": type_} for name, type_ in types.items()}
        given = {"epochs": {"intValue": "30"}, "rate": {"doubleValue": 0.5}, "name": {"stringValue": "a"}}
        expected = {"epochs": {"intValue": "40"}, "rate": {"doubleValue": 0.5}, "name": {"stringValue": "a"}}
    else:
        newer = {"INT": "NUMBER_INTEGER", "DOUBLE": "NUMBER_DOUBLE", "STRING": "STRING"}
        declared = {name: {"parameterType": newer[type_]} for name, type_ in types.items()}
        declared["name"]["defaultValue"] = "a"
        given = {"epochs": 30, "rate": 0.5}
        expected = {"epochs": 40.0, "rate": 0.5, "name": "a"}
    key = "parameters" if legacy else "parameterValues"
    parameters = {name: (type_, {"componentInputParameter": name}) for name, type_ in declared.items()}
    trainer = {"run": f"assert i['inputs'][{key!r}] == {expected!r}, i['inputs']", "parameters": parameters}
    overrides = {"epochs": "40" if legacy else 40}  # the tfx command's are strings
    result = execute({"Trainer": trainer}, schema=schema, parameters=declared, given=given, options={"parameters": overrides})
    assert result.state == "SUCCEEDED", result.tasks["Trainer"].error


def test_execute_job_hands_output_parameters_on(execute: Callable) -> None:
    value = {"taskOutputParameter": {"producerTask": "Counter", "outputParameterKey": "count"}}
    result = execute(
        {
            "Counter": {"run": "values['count'] = 5", "output_parameters": {"count": {"parameterType": "NUMBER_INTEGER"}}},
            "User": {
                "run": "assert i['inputs']['parameterValues'] == {'count': 5.0}",
                "parameters": {"count": ({"parameterType": "NUMBER_INTEGER"}, value)},
            },
        },
        schema="2.1.0",
    )
    assert states(result) == {"Counter": "SUCCEEDED", "User": "SUCCEEDED"}
    assert result.tasks["Counter"].parameters == {"count": 5}


INT = {"epochs": {"type": "INT"}}
NEWER_INT = {"epochs": {"parameterType": "NUMBER_INTEGER"}}


@pytest.mark.parametrize(
    ("settings", "overrides", "message"),
    [
        ({"parameters": INT}, {}, "a value for the pipeline parameter `epochs`"),
        ({"parameters": INT}, {"epochs": "many"}, "`epochs` of its type. Received: 'many'"),
        ({"parameters": INT, "given": {"epochs": {"stringValue": "30"}}}, {}, "`epochs` to be int. Received: '30'"),
        ({"parameters": INT, "given": {"epochs": {"intValue": "30"}}}, {"epoch": 3}, r"job declares. Received: \['epoch'\]"),
        ({"parameters": NEWER_INT, "schema": "2.1.0"}, {"epochs": "30"}, "`epochs` to be int. Received: '30'"),
        ({"parameters": NEWER_INT, "schema": "2.1.0"}, {"epochs": 1.5}, "`epochs` to be int. Received: 1.5"),
        ({"schema": "1.0.0"}, {}, "a known schemaVersion. Received: 1.0.0"),
    ],
)
def test_execute_job_refuses_wrong_parameters(execute: Callable, settings: dict, overrides: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        execute({"Trainer": {"run": "raise ValueError"}}, options={"parameters": overrides}, **settings)


def _producer(components: dict) -> None:
    components["Judge"]["inputs"]["model"] = ("Trainer_task", "model", MODEL)


def _output(components: dict) -> None:
    components["Judge"]["inputs"]["model"] = ("Trainer", "modle", MODEL)


def _type(components: dict) -> None:
    components["Judge"]["inputs"]["model"] = ("Trainer", "model", BLESSING)


def _cycle(components: dict) -> None:
    components["Trainer"]["task"] = {"dependentTasks": ["Judge"]}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_producer, "a task that Judge depends on. Received: Trainer_task"),
        (_output, "an output of Trainer"),
        (_type, "`model` of Judge to have its type"),
        (_cycle, "nodes are in a cycle"),
    ],
)
def test_execute_job_refuses_a_job_that_cannot_run(execute: Callable, tmp_path: Path, spoil: Callable, message: str) -> None:
    components = trainer_and_judge()
    spoil(components)
    with pytest.raises(ValueError, match=message):
        execute(components)
    assert not list(tmp_path.iterdir())


def test_execute_job_fails_a_task_whose_constant_is_not_of_its_type(execute: Callable) -> None:
    components = trainer_and_judge()
    constant = {"runtimeValue": {"constantValue": {"stringValue": "x"}}}
    components["Judge"]["parameters"] = {"kind": ({"type": "INT"}, constant)}
    assert "`Judge.kind` to be int. Received: 'x'" in execute(components).tasks["Judge"].error


def test_local_job_replaces_the_bucket_and_dataflow_and_nothing_else(tmp_path: Path) -> None:
    beam = ["--runner=DataflowRunner", "--temp_location=gs://bucket/tmp", "--experiments=use_runner_v2"]
    own = ["--executor_class_path", "a.Executor", "--json_serialized_invocation_args", "{{$}}"]
    newer = ["--json_serialized_inputs_spec_args", "{}"]
    container = {"args": [*own, *newer, *beam], "lifecycle": {"preCacheCheck": {"args": [*own[2:], *beam]}}}
    other = {"container": {"args": [*own, "--runner=FnApiRunner", "--direct_num_workers=2"]}}
    job = make_job(tmp_path, {"Step": {"executor": {"container": container}}, "Local": {"executor": other}})
    job["runtimeConfig"]["gcsOutputDirectory"] = "gs://bucket/root"
    job["displayName"] = 'gs://bucket2/a and {"cache": "gs://bucket"}'
    given = copy.deepcopy(job)
    local = local_job(json.dumps(job), bucket="gs://bucket/", folder=Path("/local"))
    changed = local["pipelineSpec"]["deploymentSpec"]["executors"]["Step_executor"]["container"]
    assert changed["args"] == [*own, *newer, "--runner=FnApiRunner", "--sdk_container_image=unused"]
    assert changed["lifecycle"]["preCacheCheck"]["args"] == [*own[2:], "--runner=FnApiRunner", "--sdk_container_image=unused"]
    assert local["runtimeConfig"]["gcsOutputDirectory"] == "/local/root"
    assert local["displayName"] == 'gs://bucket2/a and {"cache": "/local"}'
    executors = given["pipelineSpec"]["deploymentSpec"]["executors"]
    assert local["pipelineSpec"]["deploymentSpec"]["executors"]["Local_executor"] == executors["Local_executor"]


def test_artifacts_reach_a_tfx_component_with_the_properties_that_it_reads() -> None:
    metadata = {"blessed": 1.0, "current_model_id": f"{METADATA_STORE}/artifacts/7"}
    message = Artifact(f"{METADATA_STORE}/artifacts/9", BLESSING, "/blessing", metadata).message()
    blessing = kubeflow_v2_entrypoint_utils._parse_raw_artifact(message, {})
    assert isinstance(blessing, standard_artifacts.ModelBlessing)
    assert blessing.get_int_custom_property("blessed") == 1
    assert blessing.get_string_custom_property("current_model_id") == f"{METADATA_STORE}/artifacts/7"
    assert blessing.id > 2**32  # a hash of the name
