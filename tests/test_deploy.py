import concurrent.futures
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_metadata as mlmd
import pytest
import tensorflow as tf
from conftest import ROOT
from vertex_stand_in import VertexStandIn
from workspaces import Workspace, save_model

from data.errors import EXIT_DONE, EXIT_NOT_BLESSED, EXIT_WRONG_INPUT, InputError
from pipeline.blessing import Blessing, find_blessing, missing_blessing, open_metadata
from pipeline.deploy import main
from pipeline.model_digest import model_digest
from pipeline.versions import latest_version, push_model

pytestmark = pytest.mark.one_stack


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace(tmp_path / "runs" / "shapes")


def _run(workspace: Workspace, *, evaluator: bool | None, check: bool | None, weight: float = 1.0) -> int:
    """Records a run with both verdicts; None for one that is missing. Returns the model's id."""
    run = workspace.begin(f"run {time.time_ns()}")
    model = workspace.train(run, weight=weight)
    if evaluator is not None:
        workspace.evaluate(run, model, blessed=evaluator)
    if check is not None:
        workspace.check(run, model, blessed=check)
    return model


def _push(model: Path, destination: Path, *arguments: str) -> int:
    return main(["push", "--model", str(model), "--destination", str(destination), *arguments])


def _answer(folder: Path) -> float:
    return float(tf.saved_model.load(str(folder)).signatures["serving_default"](tf.constant([2.0]))["output_0"][0])


def test_push_puts_a_blessed_model_under_the_next_version(workspace, tmp_path, capfd):
    model = _run(workspace, evaluator=True, check=True, weight=3.0)
    destination = tmp_path / "serving"
    before = int(time.time())

    assert _push(workspace.model_folder(model), destination) == EXIT_DONE

    (version,) = os.listdir(destination)
    assert before <= int(version) <= time.time()
    assert _answer(destination / version) == 6.0
    assert model_digest(str(destination / version)) == model_digest(str(workspace.model_folder(model)))
    assert f"Pushed  {destination}/{version}" in capfd.readouterr().out


def test_push_takes_a_number_above_all_others(workspace, tmp_path):
    model = _run(workspace, evaluator=True, check=True)
    destination = tmp_path / "serving"
    highest = int(time.time()) + 1_000
    (destination / str(highest)).mkdir(parents=True)
    (destination / "notes").mkdir()

    assert _push(workspace.model_folder(model), destination) == EXIT_DONE
    assert _push(workspace.model_folder(model), destination) == EXIT_DONE

    assert sorted(os.listdir(destination)) == [str(highest), str(highest + 1), str(highest + 2), "notes"]


def test_push_takes_the_trainer_s_folder_and_the_copy_that_pusher_made(workspace, tmp_path):
    model = _run(workspace, evaluator=True, check=True)
    pushed = workspace.folder / "serving_model" / "17"
    shutil.copytree(workspace.model_folder(model), pushed)

    assert _push(workspace.model_folder(model).parent, tmp_path / "a") == EXIT_DONE
    assert _push(pushed, workspace.folder / "serving_model") == EXIT_DONE
    elsewhere = shutil.copytree(pushed, tmp_path / "elsewhere")
    assert _push(elsewhere, tmp_path / "b", "--workspace", str(workspace.folder)) == EXIT_DONE

    assert len(os.listdir(workspace.folder / "serving_model")) == 2


@pytest.mark.parametrize(
    ("evaluator", "check", "message"),
    [
        (True, None, "no serving check of it is on record, though model 1 is this very one"),
        (None, True, "the serving check blessed it, but there is no verdict of the Evaluator on it"),
        (True, False, "the serving check refused this very model"),
        (False, True, "the serving check blessed it, but the Evaluator refused this very model"),
        (False, False, "the serving check refused this very model"),
        (None, None, "no serving check of it is on record"),
    ],
)
def test_push_refuses_a_model_without_both_blessings(workspace, tmp_path, capfd, evaluator, check, message):
    _run(workspace, evaluator=evaluator, check=check)
    (model,) = workspace.store.get_artifacts_by_type("Model")
    _run(workspace, evaluator=True, check=True, weight=2.0)  # of another model, whose blessings are its own

    assert _push(workspace.model_folder(model.id), tmp_path / "serving") == EXIT_NOT_BLESSED

    error = capfd.readouterr().err
    assert error.startswith(f"error: Expected {workspace.model_folder(model.id)} to have both blessings")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "serving").exists()


@pytest.mark.parametrize("file", ["saved_model.pb", "variables/variables.data-00000-of-00001"])
def test_push_refuses_a_model_with_one_changed_byte(workspace, tmp_path, capfd, file):
    model = workspace.model_folder(_run(workspace, evaluator=True, check=True))
    content = bytearray((model / file).read_bytes())
    content[-1] ^= 1
    (model / file).write_bytes(content)

    assert _push(model, tmp_path / "serving") == EXIT_NOT_BLESSED

    assert "its files are those of no model that this workspace made" in capfd.readouterr().err
    assert not (tmp_path / "serving").exists()


def test_push_refuses_a_model_with_one_more_file(workspace, tmp_path):
    model = workspace.model_folder(_run(workspace, evaluator=True, check=True))
    (model / "assets" / "labels.txt").write_text("square\ncircle\n")

    assert _push(model, tmp_path / "serving") == EXIT_NOT_BLESSED


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({}, EXIT_DONE, ""),
        ({"blessed": False, "reasons": ["it is too slow"]}, EXIT_NOT_BLESSED, "refused this very model: it is too slow. "),
        ({"blessed": 1}, EXIT_NOT_BLESSED, "refused this very model"),
        ({"evaluator_blessed": False}, EXIT_NOT_BLESSED, "but the Evaluator refused this very model"),
        ({"model_digest": "0" * 64}, EXIT_NOT_BLESSED, "is about another model"),
        ({"model_digest": None}, EXIT_NOT_BLESSED, "is about another model"),
        ({"is_cut_off": True}, EXIT_NOT_BLESSED, "there is no INFRA_BLESSED in"),
    ],
)
def test_push_takes_the_serving_check_s_own_record(tmp_path, capfd, changes, code, message):
    model = save_model(tmp_path / "model")
    verdict = {"blessed": True, "reasons": [], "evaluator_blessed": True, "model_digest": model_digest(str(model))} | changes
    (tmp_path / "blessing").mkdir()
    (tmp_path / "blessing" / "serving_check.json").write_text(json.dumps(verdict))
    if "is_cut_off" not in changes:
        (tmp_path / "blessing" / "INFRA_BLESSED").touch()

    assert _push(model, tmp_path / "serving", "--blessing", str(tmp_path / "blessing")) == code

    assert message in capfd.readouterr().err
    assert (tmp_path / "serving").exists() == (code == EXIT_DONE)


def test_push_knows_a_later_verdict_than_the_record_that_is_named(workspace, tmp_path, capfd):
    model = workspace.model_folder(_run(workspace, evaluator=False, check=True))
    verdict = {"blessed": True, "reasons": [], "evaluator_blessed": True, "model_digest": model_digest(str(model))}
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "serving_check.json").write_text(json.dumps(verdict))
    (tmp_path / "earlier" / "INFRA_BLESSED").touch()

    assert _push(model, tmp_path / "serving", "--blessing", str(tmp_path / "earlier")) == EXIT_NOT_BLESSED

    assert "the Evaluator refused this very model" in capfd.readouterr().err
    assert not (tmp_path / "serving").exists()


@pytest.mark.parametrize("content", ["{", "[]"])
def test_push_explains_a_damaged_record(tmp_path, capfd, content):
    (tmp_path / "serving_check.json").write_text(content)

    assert _push(save_model(tmp_path / "model"), tmp_path / "serving", "--blessing", str(tmp_path)) == EXIT_WRONG_INPUT

    assert "Expected serving_check.json in" in capfd.readouterr().err


def test_push_explains_wrong_paths(workspace, tmp_path, capfd):
    model = workspace.model_folder(_run(workspace, evaluator=True, check=True))
    (tmp_path / "file").write_text("")
    elsewhere = save_model(tmp_path / "elsewhere")
    for arguments, message in [
        ((tmp_path / "nowhere", tmp_path / "serving"), "Expected a SavedModel's folder, which holds saved_model.pb"),
        ((model.parent.parent, tmp_path / "serving"), "Expected a SavedModel's folder, which holds saved_model.pb"),
        ((model, tmp_path / "file"), "Expected --destination to be a folder. Received:"),
        ((model, tmp_path / "file" / "serving"), "to be a folder, or a place for one. Received:"),
        ((model, elsewhere), "Expected --destination to be a folder of versions. Received:"),
        ((model, model / "versions"), "Expected --destination to be a folder of versions. Received:"),
        ((elsewhere, tmp_path / "serving"), "to lie in a workspace"),
        (
            (model, tmp_path / "serving", "--workspace", str(tmp_path)),
            "Expected a workspace, a folder with pipeline/metadata.db",
        ),
        ((model, tmp_path / "serving", "--blessing", str(tmp_path)), "Expected the serving check's verdict in"),
    ]:
        assert _push(*arguments) == EXIT_WRONG_INPUT, message
        error = capfd.readouterr().err
        assert message in error
        assert error.count("\n") == 1, error
    assert not (tmp_path / "serving").exists()
    assert not (model / "versions").exists()


def test_find_blessing_names_the_records_of_the_very_model(workspace):
    run = workspace.begin("a")
    model = workspace.train(run)
    evaluation = workspace.evaluate(run, model, blessed=True)
    check = workspace.check(run, model, blessed=True)
    _run(workspace, evaluator=False, check=False, weight=2.0)
    digest = model_digest(str(workspace.model_folder(model)))

    assert find_blessing(workspace.store, digest) == Blessing(digest, model, evaluation, check)
    assert missing_blessing(workspace.store, digest) == ""
    assert find_blessing(workspace.store, "0" * 64) is None


def test_find_blessing_finds_none_without_a_digest_on_record(workspace):
    """A check of a model that did not load has no digest; no model matches it."""
    run = workspace.begin("a")
    model = workspace.train(run)
    workspace.evaluate(run, model, blessed=True)
    facts = {"blessed": 1, "current_model_id": model}
    workspace.execute(run, "ServingCheck", outputs={"infra_blessing": workspace.artifact("InfraBlessing", "gone", **facts)})

    assert find_blessing(workspace.store, model_digest(str(workspace.model_folder(model)))) is None


def test_find_blessing_goes_by_the_latest_verdict_also_by_one_that_was_reused(workspace):
    model = _run(workspace, evaluator=True, check=True)
    (first,) = workspace.store.get_artifacts_by_type("ModelBlessing")
    digest = model_digest(str(workspace.model_folder(model)))

    workspace.evaluate(workspace.begin("stricter"), model, blessed=False)
    assert find_blessing(workspace.store, digest) is None

    workspace.execute(workspace.begin("as before"), "Evaluator", outputs={"blessing": first.id}, state="CACHED")
    assert find_blessing(workspace.store, digest).evaluation_id == first.id


def test_open_metadata_writes_nothing_and_does_not_keep_a_writer_out(workspace):
    _run(workspace, evaluator=True, check=True)
    path = workspace.folder / "pipeline" / "metadata.db"
    before = path.read_bytes(), path.stat().st_mtime_ns, sorted(os.listdir(path.parent))

    with open_metadata(workspace.folder) as store:
        assert len(store.get_contexts_by_type("pipeline_run")) == 1
        with pytest.raises(mlmd.errors.InternalError, match="readonly"):
            store.put_context_type(mlmd.proto.ContextType(name="new"))
        assert before == (path.read_bytes(), path.stat().st_mtime_ns, sorted(os.listdir(path.parent)))
        workspace.begin("while it is open")
        assert len(store.get_contexts_by_type("pipeline_run")) == 1

    with open_metadata(workspace.folder) as store:
        assert len(store.get_contexts_by_type("pipeline_run")) == 2


def test_open_metadata_rolls_back_half_a_transaction_in_its_copy(workspace):
    """A run that was killed while it wrote leaves a journal; only a writer may roll it back."""
    _run(workspace, evaluator=True, check=True)
    path = workspace.folder / "pipeline" / "metadata.db"
    code = (
        "import os, sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); "
        "c.execute('PRAGMA cache_size = 1'); c.execute('PRAGMA cache_spill = 1'); c.execute('BEGIN IMMEDIATE'); "
        "c.execute('DELETE FROM Artifact'); c.execute('CREATE TABLE t AS WITH RECURSIVE n(i) AS "
        "(SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000) SELECT i, randomblob(100) FROM n'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 9
    journal = path.with_name("metadata.db-journal")
    assert journal.stat().st_size > 0
    before = path.read_bytes()

    with open_metadata(workspace.folder) as store:
        assert len(store.get_artifacts_by_type("Model")) == 1

    assert path.read_bytes() == before
    assert journal.exists()


@pytest.mark.parametrize("content", [b"", b"no database" * 1000])
def test_open_metadata_explains_what_is_no_store(tmp_path, content):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "metadata.db").write_bytes(content)

    with (
        pytest.raises(InputError, match=r"Expected .*metadata.db to be the metadata store of a pipeline. Received: .+"),
        open_metadata(tmp_path),
    ):
        pass


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_push_model_leaves_nothing_where_the_model_changes_meanwhile(tmp_path, scheme):
    """`file://` takes the road of gs://, object by object."""
    model = save_model(tmp_path / "model")

    with pytest.raises(RuntimeError, match="to stay as it was while it was copied"):
        push_model(str(model), f"{scheme}{tmp_path}/serving", digest="0" * 64)

    assert os.listdir(tmp_path / "serving") == []


def test_push_model_goes_the_road_of_buckets(tmp_path):
    model = save_model(tmp_path / "model", weight=5.0)
    digest = model_digest(str(model))

    version = push_model(f"file://{model}", f"file://{tmp_path}/serving", digest=digest)

    (name,) = [name for name in os.listdir(tmp_path / "serving") if name.isdecimal()]
    assert version == f"file://{tmp_path}/serving/{name}"
    assert _answer(tmp_path / "serving" / name) == 10.0
    assert os.listdir(tmp_path / "serving") == [name]
    assert latest_version(f"file://{tmp_path}/serving") == name


def test_push_model_removes_what_a_killed_push_left(tmp_path):
    left = tmp_path / "serving" / "abc.pushing"
    left.mkdir(parents=True)
    (left / "fingerprint.pb").write_bytes(b"x")
    model = save_model(tmp_path / "model")

    push_model(str(model), str(tmp_path / "serving"), digest=model_digest(str(model)))

    assert not left.exists()


def test_push_model_waits_for_another_push(tmp_path):
    """Else it would take the other one's unfinished copy for one that was left."""
    model = save_model(tmp_path / "model")
    serving = tmp_path / "serving"
    (serving / "abc.pushing").mkdir(parents=True)
    other = os.open(serving, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        pushed = pool.submit(push_model, str(model), str(serving), digest=model_digest(str(model)))
        with pytest.raises(concurrent.futures.TimeoutError):
            pushed.result(timeout=1)
        assert os.listdir(serving) == ["abc.pushing"]
        os.close(other)
        assert pushed.result(timeout=60) == str(serving / os.listdir(serving)[0])


def test_push_model_cleans_up_after_a_copy_that_fails(tmp_path):
    model = save_model(tmp_path / "model")
    digest = model_digest(str(model))
    (model / "assets" / "gone").symlink_to(tmp_path / "nowhere")

    with pytest.raises(tf.errors.NotFoundError):
        push_model(str(model), str(tmp_path / "serving"), digest=digest)

    assert os.listdir(tmp_path / "serving") == []


def test_latest_version_passes_over_half_models_and_other_names(tmp_path):
    assert latest_version(str(tmp_path / "nowhere")) is None
    save_model(tmp_path / "9")
    save_model(tmp_path / "10")
    (tmp_path / "11").mkdir()
    save_model(tmp_path / "12.pushing")

    assert latest_version(str(tmp_path)) == "10"


def test_a_server_that_polls_never_sees_half_a_model(tmp_path):
    """While pushes go on, every folder with a version's name holds the whole model; the last one is cut off by SIGTERM."""
    model = save_model(tmp_path / "model")
    (model / "assets" / "large").write_bytes(os.urandom(1 << 24))
    names = {str(path.relative_to(model)) for path in model.rglob("*")}
    code = (
        "import sys; from pipeline.versions import push_model; from pipeline.model_digest import model_digest; "
        "from pipeline.deploy import _leave; import signal; signal.signal(signal.SIGTERM, _leave); m, d = sys.argv[1:]\n"
        "while True: push_model(m, d, digest=model_digest(m))"
    )
    command = [sys.executable, "-c", code, str(model), str(tmp_path / "serving")]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stderr=log)
    try:
        seen: set[str] = set()
        deadline = time.monotonic() + 120
        while len(seen) < 5 and time.monotonic() < deadline and process.poll() is None:
            for version in (tmp_path / "serving").glob("[0-9]*[0-9]"):
                if version.name not in seen:
                    assert {str(path.relative_to(version)) for path in version.rglob("*")} == names
                    assert (version / "assets" / "large").stat().st_size == 1 << 24
                    seen.add(version.name)
        assert len(seen) >= 5
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)

    assert code == 128 + signal.SIGTERM, (tmp_path / "log").read_text()[-3000:]
    assert [name for name in os.listdir(tmp_path / "serving") if not name.isdecimal()] == []


def test_main_without_a_command_or_with_two_records_explains_itself(capfd):
    for arguments in ([], ["push", "--model", "m", "--destination", "d", "--workspace", "w", "--blessing", "b"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == EXIT_WRONG_INPUT
    assert "not allowed with argument" in capfd.readouterr().err


def test_push_model_says_that_a_bucket_is_missing(tmp_path):
    # In a process of its own, as TensorFlow asks for gs:// by the environment that it was started with.
    script = "import sys; from pipeline.versions import push_model; push_model(sys.argv[1], 'gs://missing/serving', digest='')"
    with VertexStandIn(tmp_path) as cloud:
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)],
            cwd=ROOT,
            env=os.environ | cloud.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert "InputError: Expected the bucket of 'gs://missing/serving' to exist. Received: no gs://missing." in line
