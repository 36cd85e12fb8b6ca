"""The small languages of a compiled job, against what TFX's compiler writes."""

import json
from collections.abc import Callable

import pytest
from job_executor import METADATA_STORE, Artifact
from job_expressions import artifact_filter, evaluate_condition, fill_placeholders
from kfp.pipeline_spec import pipeline_spec_pb2 as pb
from tfx.dsl.compiler import compiler_utils as tfx_compiler_utils
from tfx.dsl.placeholder import placeholder as ph
from tfx.orchestration.kubeflow.v2 import compiler_utils
from tfx.types import channel_utils, standard_artifacts
from tfx.types.channel import OutputChannel


@pytest.fixture
def blessed() -> pb.ExecutorInput:
    """An ExecutorInput with a blessing, as a container gets it."""
    inputs = pb.ExecutorInput()
    artifact = inputs.inputs.artifacts["blessing"].artifacts.add(uri="/blessing", name="artifacts/3")
    artifact.metadata.update({"blessed": 1, "stage": "canary", "note": "a && !b"})
    inputs.inputs.artifacts["_Judge.blessing"].artifacts.append(artifact)  # as TFX names what only a condition reads
    inputs.inputs.parameters["epochs"].int_value = 30
    inputs.outputs.artifacts["model"].artifacts.add(uri="/model")
    return inputs


def predicate(make: Callable) -> str:
    """Returns the condition to which TFX itself compiles a predicate over a channel."""
    channel = OutputChannel(standard_artifacts.ModelBlessing, producer_component=_Producer(), output_key="blessing")
    to_key = tfx_compiler_utils.build_channel_to_key_fn({})
    encoded = channel_utils.encode_placeholder_with_channels(make(channel.future()[0]), to_key)
    return compiler_utils.placeholder_to_cel(encoded)


class _Producer:
    id = "Judge"


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda artifact: artifact.property("blessed") == 1, True),
        (lambda artifact: artifact.property("blessed") < 1, False),
        (lambda artifact: artifact.uri == "/blessing", True),
        (lambda artifact: artifact.property("stage") != "canary", False),
        (lambda artifact: ph.logical_and(artifact.uri + "!" == "/blessing!", artifact.property("blessed") > 0.5), True),
        (lambda artifact: ph.logical_or(artifact.property("blessed") == 0, artifact.property("stage") == "live"), False),
        (lambda artifact: artifact.property("note") == "a && !b", True),
    ],
)
def test_evaluate_condition_agrees_with_the_predicate_that_tfx_compiled(
    blessed: pb.ExecutorInput, make: Callable, expected: bool
) -> None:
    assert evaluate_condition(predicate(make), blessed) is expected


@pytest.mark.parametrize(
    "condition",
    [
        "inputs.artifacts['blessing'].artifacts[0].metadata['blessed'] == '1'",
        "inputs.artifacts['blessing'].artifacts[1].uri == '/blessing'",
        "inputs.artifacts['blessing'].artifacts[0].metadata['absent'] == 1.0",
        "inputs.artifacts['blessing'].artifacts[0].uri",
        "size(inputs.artifacts['blessing'].artifacts) > 0",
        "1.0 < 2.0 < 3.0",
    ],
)
def test_evaluate_condition_refuses_what_cel_does(blessed: pb.ExecutorInput, condition: str) -> None:
    with pytest.raises(ValueError, match="Expected "):
        evaluate_condition(condition, blessed)


def test_fill_placeholders_puts_in_uris_parameters_and_the_whole_input(blessed: pb.ExecutorInput) -> None:
    assert fill_placeholders("{{$.outputs.artifacts['model'].uri}}:{{$.inputs.parameters['epochs']}}", blessed) == "/model:30"
    assert fill_placeholders("{{$.inputs.artifacts['blessing'].metadata['stage']}}", blessed) == "canary"
    whole = json.loads(fill_placeholders("{{$}}", blessed))
    assert whole["inputs"]["artifacts"]["blessing"]["artifacts"][0]["metadata"]["blessed"] == 1.0
    for wrong in ("{{$.inputs.artifacts['absent'].uri}}", "{{$.inputs.artifacts['blessing'].size}}", "{{$.pipeline_job_name}}"):
        with pytest.raises(ValueError, match="Expected "):
            fill_placeholders(wrong, blessed)


CONTEXT = f"{METADATA_STORE}/contexts/shapes"


@pytest.mark.parametrize(
    ("query", "matches"),
    [
        ('schema_title="tfx.ModelBlessing" AND state=LIVE AND metadata.blessed.number_value=1', True),
        ("metadata.blessed.number_value = 1.0", True),
        ("metadata.blessed.number_value=0", False),
        ('metadata.blessed.string_value="1.0"', False),
        ("metadata.version.number_value=1.0", False),
        ('state=LIVE AND metadata.stage.string_value="canary"', True),
        ("metadata.absent.number_value=1", False),
        ('uri="/blessing"', True),
        ('name=""', False),
        (f'state=LIVE AND in_context("{CONTEXT}")', True),
        (f'in_context("{CONTEXT}s")', False),
    ],
)
def test_artifact_filter_matches_fields_metadata_and_contexts(query: str, matches: bool) -> None:
    metadata = {"blessed": 1.0, "stage": "canary", "version": "1.0"}
    artifact = Artifact("a/3", {"schemaTitle": "tfx.ModelBlessing"}, "/blessing", metadata, contexts=(CONTEXT,), state="LIVE")
    assert artifact_filter(query)(artifact) is matches


@pytest.mark.parametrize(
    "query", ["state=LIVE OR state=PENDING", "display_name=x", "metadata.a.bool_value=true", "NOT state=LIVE"]
)
def test_artifact_filter_refuses_other_queries(query: str) -> None:
    with pytest.raises(ValueError, match="Expected "):
        artifact_filter(query)
