"""A compiled job goes where it was compiled for: project and region are found in it, whichever steps have them."""

import json
from pathlib import Path

import pytest

import kubeflow_runner
from data.errors import InputError
from pipeline.submission import CompiledJob, check_place, read_job

PLACE = {"project": "my-project", "region": "us-central1", "bucket": "gs://bucket"}
SETTINGS = [
    "pipeline.name=flowers",
    "data.input=gs://bucket/records",
    'data.class_names=["daisy", "rose"]',
    "data.slice_columns=[]",
    "vertex.project=my-project",
    "vertex.bucket=gs://bucket",
    "vertex.image=us-docker.pkg.dev/my-project/images/tfx-vision:1",
]
IN_ITS_STEPS = ["vertex.train_on=pipeline_step", "vertex.dataflow=false", "vertex.deployer=none"]
# One thing each that knows project and region.
WITH_A_PLACE = {
    "Dataflow": [*IN_ITS_STEPS, "vertex.dataflow=true"],
    "training job": [*IN_ITS_STEPS, "vertex.train_on=custom_job"],
    "canary": [*IN_ITS_STEPS, "vertex.deployer=canary"],
    "TFX's deployer": [*IN_ITS_STEPS, "vertex.deployer=tfx"],
}


@pytest.fixture
def compile_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Compiles with settings; gives the job."""

    def run(*overrides: str) -> CompiledJob:
        monkeypatch.chdir(tmp_path)
        assert kubeflow_runner.main([part for one in [*SETTINGS, *overrides] for part in ("--set", one)]) == 0
        return read_job(Path("pipeline.json"))

    return run


@pytest.mark.parametrize("what", WITH_A_PLACE)
def test_check_place_refuses_another_project_or_region_than_that_of_a_step(compile_job, what):
    job = compile_job(*WITH_A_PLACE[what])

    check_place(job, **PLACE)
    with pytest.raises(InputError) as caught:
        check_place(job, **PLACE | {"project": "other"})
    assert str(caught.value) == (
        "Expected project my-project, which pipeline.json was compiled for. Received: other. "
        "Compile it again with these settings."
    )
    with pytest.raises(InputError, match=r"^Expected region us-central1, which pipeline.json was compiled for\."):
        check_place(job, **PLACE | {"region": "europe-west4"})
    with pytest.raises(InputError, match=r"^Expected .*project my-project.* Received: .*other"):
        check_place(job, **PLACE | {"region": "europe-west4", "project": "other"})


def test_check_place_takes_any_project_for_a_job_that_has_none_in_its_steps(compile_job):
    job = compile_job(*IN_ITS_STEPS)

    check_place(job, **PLACE | {"project": "other", "region": "europe-west4"})
    with pytest.raises(InputError, match=r"^Expected bucket gs://bucket/pipeline_root/flowers, which pipeline.json"):
        check_place(job, **PLACE | {"bucket": "gs://other"})


def test_check_place_reads_the_values_of_schema_2_1_too():
    settings = json.dumps({"project": "my-project", "region": "us-central1"})
    tasks = {
        "Pusher": {"inputs": {"parameters": {"config": {"runtimeValue": {"constant": settings}}}}},
        "Other": {"inputs": {"parameters": {"config": {"runtimeValue": {"constant": "no JSON"}}}}},
        "Another": {"inputs": {"parameters": {"config": {"componentInputParameter": "x"}}}},
        "None": {},
    }
    content = {"pipelineSpec": {"root": {"dag": {"tasks": tasks}}}, "runtimeConfig": {"gcsOutputDirectory": "gs://bucket/x"}}

    with pytest.raises(InputError, match=r"^Expected project my-project"):
        check_place(CompiledJob(Path("job.json"), content), **PLACE | {"project": "other"})
