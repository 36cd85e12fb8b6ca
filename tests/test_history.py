import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import apache_beam as beam
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_model_analysis as tfma
from apache_beam.options.pipeline_options import PipelineOptions
from conftest import CLASS_NAMES
from google.protobuf import json_format
from tfx_bsl.tfxio import tensor_adapter, tf_example_record
from workspaces import EXECUTION_TYPES, FINGERPRINT, Workspace, save_model, trainer_properties

from data.errors import EXIT_DONE, EXIT_WRONG_INPUT
from data.features import make_example, make_schema
from pipeline.evaluation import EvaluationConfig, eval_config
from pipeline.extractors import custom_extractors
from pipeline.history import main, read_history, read_serving
from pipeline.lineage import properties, read_lineage, write_images

pytestmark = pytest.mark.one_stack


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace(tmp_path / "runs" / "shapes")


def _add_run(
    workspace: Workspace,
    *,
    data: int = 100,
    gate: dict | None = None,
    settings: dict | None = None,
    limits: dict | None = None,
    budget: dict | None = None,
    baseline: int | None = None,
    preprocessing: dict | None = None,
    evaluator: bool = True,
    check: bool = True,
    until: str = "Pusher",
    state: str = "FAILED",
) -> int | None:
    """Records one whole run, or one up to the component `until`, which then has a `state`; returns the model's id."""
    run = workspace.begin(f"run {len(workspace.store.get_contexts_by_type('pipeline_run'))}")
    fingerprint = FINGERPRINT.format(data)
    examples = workspace.artifact("Examples", workspace.folder / "examples", input_fingerprint=fingerprint)
    (examples_id,) = workspace.execute(
        run, "ImportExampleGen", properties={"input_base": "tfrecords", "span": 0}, outputs={"examples": examples}
    )
    gate_properties = {"action": "stop", "min_examples": 100, "code": "948d"} | (gate or {})
    if until == "DataGate":
        workspace.execute(run, "DataGate", properties=gate_properties, state=state)
        return None
    workspace.execute(run, "DataGate", properties=gate_properties)
    transform = {"class_names": list(CLASS_NAMES), "code": "2204", "input": {"image_size": 64}} | (preprocessing or {})
    graph = workspace.artifact("TransformGraph", workspace.folder / "graph")
    (graph_id,) = workspace.execute(
        run,
        "Transform",
        properties={"custom_config": transform},
        inputs={"examples": examples_id},
        outputs={"transform_graph": graph},
    )
    inputs = {"examples": examples_id, "transform_graph": graph_id}
    if until == "Trainer":
        workspace.execute(run, "Trainer", properties=trainer_properties(**(settings or {})), inputs=inputs, state=state)
        return None
    model = workspace.train(run, inputs=inputs, **(settings or {}))
    workspace.execute(run, "LatestBlessedModel", outputs={"candidate": model})
    workspace.evaluate(run, model, blessed=evaluator, baseline=baseline, eval_config=_eval_config(**(limits or {})))
    workspace.check(run, model, blessed=check, reasons=[] if check else ["it is too slow", "it is too large"], **(budget or {}))
    workspace.push(run, model, str(1_000 + run) if evaluator and check else None)
    return model


def _eval_config(**settings) -> dict:
    config = eval_config(EvaluationConfig(**settings), CLASS_NAMES, ("camera",), image_size=64, code="e1")
    return json_format.MessageToDict(config, preserving_proto_field_name=True)


def _changes(workspace: Workspace) -> list[str]:
    return read_history(workspace.store)[0].changes


def test_read_history_of_a_first_run(workspace):
    model = _add_run(workspace)

    (run,) = read_history(workspace.store)

    assert (run.state, run.step, run.changes) == ("done", "", ["first run"])
    assert (run.model_id, run.blessed, run.reasons) == (model, True, [])
    assert run.pushed_version == "1001"
    assert run.evaluation == "gone"
    assert run.began.tzinfo is not None


def test_read_history_says_nothing_changed_where_all_was_reused(workspace):
    _add_run(workspace)
    run = workspace.begin("again")
    (before,) = workspace.store.get_contexts_by_type("pipeline_run")[:1]
    for execution in sorted(workspace.store.get_executions_by_context(before.id), key=lambda execution: execution.id):
        (node,) = [node for node, type_ in EXECUTION_TYPES.items() if type_ == execution.type]
        events = workspace.store.get_events_by_execution_ids([execution.id])
        outputs = {event.path.steps[0].key: event.artifact_id for event in events if event.type == event.OUTPUT}
        workspace.execute(run, node, properties=properties(execution), outputs=outputs, state="CACHED")

    newest, first = read_history(workspace.store)

    assert (newest.state, newest.changes) == ("done", [])
    assert newest.ran == []
    assert newest.model_id == first.model_id
    assert newest.pushed_version == first.pushed_version
    assert newest.blessed


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"data": 101}, ["data (train)"]),
        ({"gate": {"action": "warn"}}, ["data_gate.action stop -> warn"]),
        ({"gate": {"code": "new"}}, ["data gate code"]),
        ({"preprocessing": {"code": "new"}}, ["preprocessing code"]),
        ({"preprocessing": {"input": {"image_size": 96}}}, ["input.image_size 64 -> 96"]),
        ({"settings": {"epochs": 10}}, ["training.epochs 40 -> 10"]),
        ({"settings": {"warm_start": True}}, ["training.warm_start not set -> true"]),
        ({"limits": {"min_accuracy": 0.9}}, ["evaluation.min_accuracy 0.7 -> 0.9"]),
        (
            {"limits": {"thresholds": [{"metric": "recall", "class": "circle", "slice": "camera=a", "min": 0.75}]}},
            ["evaluation.thresholds (recall circle camera=a min) not set -> 0.75"],
        ),
        ({"limits": {"dark_below": 0.3}}, ["evaluation.dark_below 0.25 -> 0.3"]),
        ({"budget": {"max_memory_mb": 5000}}, ["serving_check.max_memory_mb 4096 -> 5000"]),
        ({"baseline": 3}, ["model to compare with not set -> 3"]),
        ({}, []),
    ],
)
def test_read_history_names_what_changed(workspace, options, changes):
    _add_run(workspace)
    _add_run(workspace, **options)

    assert _changes(workspace) == changes


def test_read_history_compares_with_the_latest_run_that_came_so_far(workspace):
    _add_run(workspace)
    _add_run(workspace, gate={"action": "warn"}, until="DataGate")
    _add_run(workspace, gate={"action": "warn"}, settings={"epochs": 10})

    assert _changes(workspace) == ["training.epochs 40 -> 10"]


def test_read_history_names_new_and_missing_steps(workspace):
    _add_run(workspace)
    run = workspace.begin("short")
    workspace.execute(run, "Transform", properties={})
    workspace.push(run, 1, None)

    assert "without Trainer" in _changes(workspace)
    _add_run(workspace)
    assert "new step Trainer" in _changes(workspace)


@pytest.mark.parametrize(
    ("until", "state", "is_running", "expected"),
    [
        ("DataGate", "FAILED", False, ("failed", "DataGate")),
        ("Trainer", "FAILED", True, ("failed", "Trainer")),
        ("Trainer", "RUNNING", True, ("running", "Trainer")),
        ("Trainer", "RUNNING", False, ("interrupted", "Trainer")),
        ("Trainer", "COMPLETE", False, ("interrupted", "Trainer")),
    ],
)
def test_read_history_tells_failed_running_and_interrupted_runs(workspace, until, state, is_running, expected):
    _add_run(workspace, until=until, state=state)
    _add_run(workspace, until=until, state=state)

    newest, older = read_history(workspace.store, is_running=is_running)

    assert (newest.state, newest.step) == expected
    assert (older.state, older.step) == ("interrupted" if expected[0] == "running" else expected[0], expected[1])
    assert (newest.model_id, newest.evaluator_blessed, newest.blessed) == (None, None, False)


def test_read_history_gives_the_reasons_of_both_verdicts(workspace):
    _add_run(workspace, evaluator=False, check=False)
    _add_run(workspace, check=False)
    shutil.rmtree(workspace.store.get_artifacts_by_type("InfraBlessing")[-1].uri)

    newest, older = read_history(workspace.store)

    assert older.reasons == ["the Evaluator refused it; what it wrote is gone", "it is too slow", "it is too large"]
    assert newest.reasons == ["the serving check refused it; what it wrote is gone"]
    assert (newest.evaluator_blessed, newest.serving_check_blessed, newest.blessed) == (True, False, False)
    assert newest.pushed_version is None


def test_read_history_takes_the_newest_ones(workspace):
    models = [_add_run(workspace, settings={"seed": number}) for number in range(3)]

    assert [run.model_id for run in read_history(workspace.store, limit=2)] == models[:0:-1]
    assert [run.changes for run in read_history(workspace.store, limit=1)] == [["training.seed 1 -> 2"]]


class _ByBrightness(tf.Module):
    """The brighter the image, the more likely a square."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="examples")])
    def examples(self, examples: tf.Tensor) -> dict[str, tf.Tensor]:
        brightness = tf.io.parse_example(examples, {"brightness": tf.io.FixedLenFeature([], tf.float32)})["brightness"]
        return {"probabilities": tf.stack([1 - brightness, brightness], axis=1)}


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory, encode) -> str:
    """What TFMA writes of a model that is right on 3 circles and on 1 of 2 squares."""
    folder = tmp_path_factory.mktemp("evaluation")
    model = _ByBrightness()
    tf.saved_model.save(model, str(folder / "model"), signatures={"examples": model.examples})
    (folder / "model" / "assets.extra").mkdir()
    (folder / "model" / "assets.extra" / "labels.txt").write_text("circle\nsquare\n")
    image = encode(np.zeros((4, 4, 3), np.uint8))
    with tf.io.TFRecordWriter(str(folder / "test.gz"), "GZIP") as writer:
        for label, brightness in (("circle", 0.1), ("circle", 0.2), ("circle", 0.3), ("square", 0.9), ("square", 0.4)):
            facts = {"height": 64, "width": 64, "brightness": brightness, "channels": 3, "columns": {}}
            writer.write(make_example(image=image, label=label, filename=label, **facts).SerializeToString())
    settings = eval_config(EvaluationConfig(min_class_examples=1), CLASS_NAMES, (), image_size=32, code="")
    settings = tfma.utils.update_eval_config_with_defaults(settings, has_baseline=False, rubber_stamp=True)
    model = tfma.default_eval_shared_model(eval_saved_model_path=str(folder / "model"), eval_config=settings)
    reader = tf_example_record.TFExampleRecord(
        str(folder / "test.gz"), schema=make_schema(CLASS_NAMES, ()), raw_record_column_name=tfma.constants.ARROW_INPUT_COLUMN
    )
    adapter = tensor_adapter.TensorAdapterConfig(reader.ArrowSchema(), reader.TensorRepresentations())
    with beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"])) as pipeline:
        _ = (
            pipeline
            | reader.BeamSource()
            | tfma.ExtractEvaluateAndWriteResults(
                eval_shared_model=model,
                eval_config=settings,
                output_path=str(folder / "results"),
                extractors=custom_extractors(model, settings, adapter),
                tensor_adapter_config=adapter,
            )
        )
    return str(folder / "results")


def test_read_history_has_the_metrics_of_the_evaluation(workspace, evaluation, tmp_path):
    run = workspace.begin("a")
    model = workspace.train(run)
    workspace.evaluate(run, model, blessed=True, evaluation=evaluation)
    run = workspace.begin("b")
    (tmp_path / "damaged").mkdir()
    workspace.evaluate(run, workspace.train(run), blessed=False, evaluation=tmp_path / "damaged")

    damaged, read = read_history(workspace.store)

    assert read.evaluation == "read"
    assert read.metrics["accuracy"] == pytest.approx(4 / 5)
    assert read.metrics["macro_f1"] == pytest.approx((6 / 7 + 2 / 3) / 2)
    assert (damaged.evaluation, damaged.metrics) == ("unreadable", {})
    assert damaged.reasons == ["the Evaluator refused it; what it wrote is unreadable"]


def _serve(workspace: Workspace, model: int, version: str) -> Path:
    return shutil.copytree(workspace.model_folder(model), workspace.folder / "serving_model" / version)


def test_read_serving_names_the_model_and_its_run(workspace):
    first = _add_run(workspace)
    second = _add_run(workspace, settings={"epochs": 10})
    assert read_serving(workspace.store, workspace.folder / "serving_model") is None
    _serve(workspace, second, "9")
    _serve(workspace, first, "10")

    serving = read_serving(workspace.store, workspace.folder / "serving_model")

    assert (serving.version, serving.model_id, serving.blessed, serving.note) == ("10", first, True, "")
    assert serving.run_began == read_history(workspace.store)[1].began


def test_read_serving_knows_a_checked_model_whose_own_folder_is_gone(workspace):
    model = _add_run(workspace)
    _serve(workspace, model, "10")
    shutil.rmtree(workspace.model_folder(model).parent)

    assert read_serving(workspace.store, workspace.folder / "serving_model").model_id == model


def test_read_serving_says_what_was_done_by_hand(workspace):
    good = _add_run(workspace)
    bad = _add_run(workspace, evaluator=False)
    folder = workspace.folder / "serving_model"

    _serve(workspace, bad, "11")
    serving = read_serving(workspace.store, folder)
    assert (serving.model_id, serving.blessed) == (bad, False)
    assert serving.note == "this model was never blessed: it was put there by hand"

    changed = _serve(workspace, good, "12") / "saved_model.pb"
    changed.write_bytes(changed.read_bytes()[:-1] + b"\0")
    serving = read_serving(workspace.store, folder)
    assert (serving.version, serving.model_id, serving.blessed) == ("12", None, False)
    assert "no model of this workspace: they were changed by hand" in serving.note

    _serve(workspace, good, "13")
    workspace.evaluate(workspace.begin("stricter"), good, blessed=False)
    assert "a later run with other limits refused it" in read_serving(workspace.store, folder).note


def test_read_serving_says_that_a_model_was_never_checked(workspace):
    run = workspace.begin("before there was a serving check")
    model = workspace.train(run)
    workspace.evaluate(run, model, blessed=True)
    _serve(workspace, model, "10")

    serving = read_serving(workspace.store, workspace.folder / "serving_model")

    assert (serving.model_id, serving.blessed) == (model, False)
    assert serving.note == "the Evaluator blessed it, but no serving check of it is on record"


IMAGES = {"train": ["circle", "square", "circle"], "valid": ["square"], "test": []}


def _write_examples(folder: Path) -> None:
    for split, labels in IMAGES.items():
        (folder / f"Split-{split}").mkdir(parents=True)
        for number, label in enumerate(labels):
            facts = {"height": 1, "width": 1, "brightness": 0.5, "channels": 3, "columns": {}}
            example = make_example(image=b"x", label=label, filename=f"{split}/{number},\udcff.png", **facts)
            with tf.io.TFRecordWriter(str(folder / f"Split-{split}" / f"data-{number}.gz"), "GZIP") as writer:
                writer.write(example.SerializeToString())


def test_read_lineage_goes_back_to_the_records(workspace):
    model = _add_run(workspace, settings={"epochs": 10})
    run = workspace.begin("reused later")
    workspace.execute(run, "Trainer", properties=trainer_properties(epochs=99), outputs={"model": model}, state="CACHED")

    (lineage,) = read_lineage(workspace.store, model)

    assert lineage.settings["training"] == {"epochs": 10, "seed": 0}
    assert lineage.settings["code"] == "1e3173b93d5a176f"
    assert (lineage.splits_trained, lineage.splits_watched) == (["train"], ["valid"])
    assert lineage.preprocessing["code"] == "2204"
    assert lineage.transform_graph == str(workspace.folder / "graph")
    assert lineage.examples == str(workspace.folder / "examples")
    assert lineage.splits == ["train", "valid", "test"]
    assert lineage.records == "tfrecords"
    assert lineage.fingerprint == FINGERPRINT.format(100)
    assert lineage.started_from is None


def test_read_lineage_follows_a_warm_start(workspace):
    first = _add_run(workspace)
    run = workspace.begin("warm")
    examples = workspace.store.get_artifacts_by_type("Examples")[0].id
    second = workspace.train(run, inputs={"examples": examples, "base_model": first}, epochs=5)

    chain = read_lineage(workspace.store, second)

    assert [lineage.model_id for lineage in chain] == [second, first]
    assert [lineage.settings["training"]["epochs"] for lineage in chain] == [5, 40]


def test_write_images_lists_every_image_once(workspace, tmp_path):
    _write_examples(workspace.folder / "examples")
    first = _add_run(workspace)
    run = workspace.begin("warm")
    examples = workspace.store.get_artifacts_by_type("Examples")[0].id
    second = workspace.train(run, inputs={"examples": examples, "base_model": first})

    counts = write_images(read_lineage(workspace.store, second), str(tmp_path / "images.csv"))

    assert counts == {"train": {"circle": 2, "square": 1}, "valid": {"square": 1}, "test": None}
    with open(tmp_path / "images.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["filename", "label", "split"]
    assert rows[1:] == [
        ["train/0,\udcff.png", "circle", "train"],
        ["train/1,\udcff.png", "square", "train"],
        ["train/2,\udcff.png", "circle", "train"],
        ["valid/0,\udcff.png", "square", "valid"],
    ]
    assert [path.name for path in tmp_path.glob("images*")] == ["images.csv"]


def test_main_shows_the_history(workspace, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _serve(workspace, _add_run(workspace), "10")
    _add_run(workspace, settings={"epochs": 10}, check=False)
    _add_run(workspace, gate={"action": "warn"}, until="DataGate")

    assert main(["--history", "--workspace", str(workspace.folder)]) == EXIT_DONE

    lines = [line.strip() for line in capfd.readouterr().out.splitlines() if line.strip()]
    assert lines[0].split() == ["run", "verdict", "accuracy", "macro", "F1", "pushed"]
    assert lines[2].endswith("stopped by the data gate")
    assert lines[3] == "changed: data_gate.action stop -> warn"
    assert lines[4].endswith("  not blessed")
    assert lines[5] == "changed: training.epochs 40 -> 10"
    assert lines[6] == "why not: it is too slow (and 1 more)"
    assert lines[7].split()[2:] == ["blessed", "1001"]
    assert lines[8:10] == ["changed: first run", "its evaluation is gone"]
    assert lines[10].startswith("Serving now: version 10, model")


def test_main_gives_the_history_as_json(workspace, capfd):
    model = _add_run(workspace)
    _serve(workspace, model, "10")

    assert main(["--history", "--json", "--workspace", str(workspace.folder)]) == EXIT_DONE

    found = json.loads(capfd.readouterr().out)
    assert found["workspace"] == str(workspace.folder)
    assert found["runs"][0]["model_id"] == model
    assert found["runs"][0]["blessed"] is True
    assert found["serving"]["version"] == "10"


def test_main_shows_the_lineage_of_a_copy(workspace, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    _write_examples(workspace.folder / "examples")
    model = _add_run(workspace)
    served = _serve(workspace, model, "10")

    assert main(["--lineage", str(served), "--images", str(tmp_path / "images.csv")]) == EXIT_DONE

    output = capfd.readouterr().out
    assert f"Model {model} {served}" in output
    assert ", blessed" in output
    assert "epochs=40 seed=0" in output
    assert "graph (gone); code 2204" in output
    assert ["circle", "2", "0"] in [line.split() for line in output.splitlines()]
    assert len((tmp_path / "images.csv").read_bytes().splitlines()) == 5

    assert main(["--lineage", str(workspace.model_folder(model).parent), "--json"]) == EXIT_DONE
    found = json.loads(capfd.readouterr().out)
    assert found["models"][0]["model_id"] == model
    assert found["counts"]["train"] == {"circle": 2, "square": 1}


def test_main_explains_wrong_input(workspace, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = workspace.model_folder(_add_run(workspace))
    other = save_model(workspace.folder / "other", weight=2.0)
    for arguments, message in [
        (
            ["--history", "--workspace", "nowhere"],
            "Expected a workspace, a folder with pipeline/metadata.db. Received: 'nowhere'",
        ),
        (["--lineage", "nowhere"], "Expected a SavedModel's folder"),
        (["--lineage", str(save_model(tmp_path / "elsewhere"))], "to lie in a workspace"),
        (["--lineage", str(other)], "whose files are those of none of its models"),
        (["--lineage", str(model), "--images", "no/images.csv"], "Expected --images to be a file that can be written"),
    ]:
        assert main(arguments) == EXIT_WRONG_INPUT
        error = capfd.readouterr().err
        assert message in error
        assert error.count("\n") == 1, error


def test_main_takes_the_one_workspace_in_runs(workspace, tmp_path, capfd, monkeypatch):
    _add_run(workspace)
    monkeypatch.chdir(tmp_path)
    assert main(["--history"]) == EXIT_DONE

    Workspace(tmp_path / "runs" / "flowers")
    assert main(["--history"]) == EXIT_WRONG_INPUT
    assert "Received: runs/flowers, runs/shapes. Name one." in capfd.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["--history", "--lineage", "x"], ["--history", "--images", "x"], ["--history", "--limit", "0"]]
)
def test_main_refuses_options_that_do_not_go_together(arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == EXIT_WRONG_INPUT


def test_main_says_that_a_run_is_going_on(workspace, capfd):
    _add_run(workspace, until="Trainer", state="RUNNING")
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        (workspace.folder / ".lock").write_text(str(process.pid))
        main(["--history", "--json", "--workspace", str(workspace.folder)])
        assert json.loads(capfd.readouterr().out)["runs"][0]["state"] == "running"
    finally:
        process.communicate(b"\n")

    main(["--history", "--json", "--workspace", str(workspace.folder)])
    assert json.loads(capfd.readouterr().out)["runs"][0]["state"] == "interrupted"
    assert os.listdir(workspace.folder / "pipeline") == ["metadata.db"]
