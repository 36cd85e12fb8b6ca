"""The runs of a workspace, as its metadata store has them: when, what changed, how good, blessed or not, what is serving now.

    python -m pipeline.report --history --workspace runs/elpv
    python -m pipeline.report --lineage runs/elpv/serving_model/1795624516 --images images.csv

Ten seconds, most of them for loading TensorFlow. `pipeline.report` calls `main`; whatever puts a model in place calls
`find_blessing`.
"""

import argparse
import dataclasses
import datetime
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_metadata as mlmd
import rich.box
from ml_metadata.proto import metadata_store_pb2
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from data.errors import EXIT_DONE, InputError, report_error
from models.trainer import CONFIG_KEY
from pipeline.blessing import (
    METADATA_FILE,
    find_blessing,
    find_model,
    find_workspace,
    is_blessing,
    model_id_of,
    open_metadata,
    saved_model_folder,
)
from pipeline.changes import describe_changes, read_facts
from pipeline.console import live, output_to_log
from pipeline.evaluation import read_evaluation
from pipeline.lineage import output_artifacts, print_lineage, producer, properties, read_lineage, write_images
from pipeline.model_digest import model_digest
from pipeline.serving_check import read_serving_check
from pipeline.versions import latest_version

_ALWAYS_RUN = ("Resolver", "Importer")
_STATE = metadata_store_pb2.Execution


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of the pipeline.

    Attributes:
      began: when, in local time.
      state: `done`; `failed`; `interrupted`, by a person or a crash; `running`.
      step: where it failed or is; empty where it is done.
      changes: what differs from the run before, in words; empty where nothing does.
      ran: components that did not reuse an earlier result.
      model_id: of the Model artifact; None without one.
      metrics: accuracy and macro_f1 over the test split; empty where they cannot be read.
      evaluation: `read`, `gone` or `unreadable`; empty without one.
      evaluator_blessed: the Evaluator's verdict; None without one.
      serving_check_blessed: the serving check's verdict; None without one.
      reasons: why a verdict is against the model, a sentence each.
      pushed_version: folder that Pusher made, or had made when it was reused; None where nothing was pushed.
    """

    began: datetime.datetime
    state: str
    step: str
    changes: list[str]
    ran: list[str]
    model_id: int | None
    metrics: dict[str, float]
    evaluation: str
    evaluator_blessed: bool | None
    serving_check_blessed: bool | None
    reasons: list[str]
    pushed_version: str | None

    @property
    def blessed(self) -> bool:
        """Whether both verdicts are for the model."""
        return bool(self.evaluator_blessed and self.serving_check_blessed)


@dataclasses.dataclass(frozen=True)
class Serving:
    """What the latest version of a serving folder is.

    Attributes:
      version: number of its folder.
      model_id: of the Model artifact with the same content; None for no model of this workspace.
      run_began: when the run that made it began, in local time; None without a model.
      blessed: whether both verdicts on it are for it.
      note: what is wrong with it, a sentence; empty where nothing is.
    """

    version: str
    model_id: int | None
    run_began: datetime.datetime | None
    blessed: bool
    note: str


def read_history(store: mlmd.MetadataStore, *, limit: int | None = None, is_running: bool = False) -> list[Run]:
    """Reads the runs of a store, newest first.

    Args:
      store: the metadata store.
      limit: of the number of runs, the newest; None for all.
      is_running: whether a process is working on the newest run, if that is not finished.
    """
    contexts = sorted(store.get_contexts_by_type("pipeline_run"), key=lambda context: context.id)
    nodes = {
        execution.id: context.name.rpartition(".")[-1]
        for context in store.get_contexts_by_type("node")
        for execution in store.get_executions_by_context(context.id)
    }
    runs: list[Run] = []
    known: dict[str, dict[str, Any]] = {}  # the latest facts of each component, also of those that the run before did not reach
    evaluations: dict[int, tuple[dict[str, float], list[str], str]] = {}
    last_done: set[str] = set()
    for number, context in enumerate(contexts):
        executions = sorted(store.get_executions_by_context(context.id), key=lambda execution: execution.id)
        steps = {nodes.get(execution.id, execution.type.rpartition(".")[-1]): execution for execution in executions}
        facts = {node: read_facts(store, node, execution) for node, execution in steps.items()}
        state, step = _state(steps, is_running=is_running and number == len(contexts) - 1)
        changes = describe_changes(facts, known) if runs else ["first run"]
        if state == "done":
            changes += [f"new step {node}" for node in steps if last_done and node not in last_done]
            changes += [f"without {node}" for node in sorted(last_done - set(steps))]
            last_done = set(steps)
        known |= facts
        is_shown = limit is None or number >= len(contexts) - limit
        results = _results(store, steps, evaluations) if is_shown else _no_results()
        runs.append(
            Run(
                began=_local_time(context.create_time_since_epoch),
                state=state,
                step=step,
                changes=changes,
                ran=[
                    node
                    for node, execution in steps.items()
                    if execution.last_known_state != _STATE.CACHED and not execution.type.endswith(_ALWAYS_RUN)
                ],
                **results,
            )
        )
    return runs[::-1][:limit]


def _state(steps: Mapping[str, metadata_store_pb2.Execution], *, is_running: bool) -> tuple[str, str]:
    """Returns the state of a run, and at which component it is or ended early."""
    for node, execution in steps.items():
        if execution.last_known_state in (_STATE.FAILED, _STATE.CANCELED):
            return "failed", node
    last = list(steps)[-1] if steps else ""
    if last == "Pusher" and steps[last].last_known_state in (_STATE.COMPLETE, _STATE.CACHED):
        return "done", ""
    return ("running" if is_running else "interrupted"), last


def _no_results() -> dict[str, Any]:
    verdicts = {"evaluator_blessed": None, "serving_check_blessed": None, "reasons": [], "pushed_version": None}
    return {"model_id": None, "metrics": {}, "evaluation": ""} | verdicts


def _results(
    store: mlmd.MetadataStore,
    steps: Mapping[str, metadata_store_pb2.Execution],
    evaluations: dict[int, tuple[dict[str, float], list[str], str]],
) -> dict[str, Any]:
    """Returns what a run put out, as attributes of a `Run`; `evaluations` keeps what was read for runs that reused it."""
    producers = [execution.id for execution in steps.values() if not execution.type.endswith(_ALWAYS_RUN)]
    artifacts = {artifact.type: artifact for artifact in output_artifacts(store, producers)}
    results = _no_results()
    reasons: list[str] = []
    if "Model" in artifacts:
        results["model_id"] = artifacts["Model"].id
    if evaluation := artifacts.get("ModelEvaluation"):
        if evaluation.id not in evaluations:
            class_names = ((properties(steps["Trainer"]).get("custom_config") or {}).get(CONFIG_KEY) or {}).get("class_names")
            evaluations[evaluation.id] = _read_metrics(evaluation.uri, class_names or [])
        results["metrics"], reasons, results["evaluation"] = evaluations[evaluation.id]
    if verdict := artifacts.get("ModelBlessing"):
        results["evaluator_blessed"] = is_blessing(verdict)
        if not is_blessing(verdict):
            results["reasons"] += reasons or [f"the Evaluator refused it; what it wrote is {results['evaluation'] or 'gone'}"]
    if verdict := artifacts.get("InfraBlessing"):
        results["serving_check_blessed"] = is_blessing(verdict)
        if not is_blessing(verdict):
            results["reasons"] += _serving_check_reasons(verdict.uri)
    if pushed := artifacts.get("PushedModel"):
        results["pushed_version"] = pushed.custom_properties["pushed_version"].string_value or None
    return results


def _read_metrics(uri: str, class_names: Sequence[str]) -> tuple[dict[str, float], list[str], str]:
    """Reads metrics and reasons of an evaluation, and says whether it could be: one of other code, or a part of one, cannot."""
    if not Path(uri).exists():
        return {}, [], "gone"
    try:
        evaluation = read_evaluation(uri, class_names)
        return {name: evaluation.overall[name] for name in ("accuracy", "macro_f1")}, list(evaluation.reasons), "read"
    except Exception:
        return {}, [], "unreadable"


def _serving_check_reasons(uri: str) -> list[str]:
    try:
        return list(read_serving_check(uri).get("reasons", []))
    except (InputError, ValueError):
        return ["the serving check refused it; what it wrote is gone"]


def _local_time(milliseconds: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(milliseconds / 1000).astimezone()


def read_serving(store: mlmd.MetadataStore, folder: Path) -> Serving | None:
    """Says what a serving folder serves: the version with the highest number; None where there is none.

    Args:
      store: the metadata store.
      folder: with a folder for each version.
    """
    version = latest_version(str(folder))
    if version is None:
        return None
    digest = model_digest(str(folder / version))
    model = find_model(store, digest)
    if model is None:
        note = "its files are those of no model of this workspace: they were changed by hand, or come from elsewhere"
        return Serving(version, None, None, False, note)
    is_blessed = find_blessing(store, digest) is not None
    note = "" if is_blessed else _why_not(store, model.id)
    return Serving(version, model.id, _run_began(store, model.id), is_blessed, note)


def _why_not(store: mlmd.MetadataStore, model_id: int) -> str:
    verdicts = {
        kind: [is_blessing(artifact) for artifact in store.get_artifacts_by_type(kind) if model_id_of(artifact) == model_id]
        for kind in ("ModelBlessing", "InfraBlessing")
    }
    if all(any(given) for given in verdicts.values()):
        return "it was blessed once, and a later run with other limits refused it"
    if any(verdicts["ModelBlessing"]) and not verdicts["InfraBlessing"]:
        return "the Evaluator blessed it, but no serving check of it is on record"
    return "this model was never blessed: it was put there by hand"


def _run_began(store: mlmd.MetadataStore, artifact_id: int) -> datetime.datetime:
    """Returns when the run began that made an artifact; runs that reused it came later."""
    contexts = store.get_contexts_by_execution(producer(store, artifact_id).id)
    return _local_time(min(context.create_time_since_epoch for context in contexts if context.type == "pipeline_run"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    arguments = _parse_arguments(argv)
    terminal_options = {"force_terminal": Console().is_terminal, "width": Console().width}  # asked before output is redirected
    try:
        with tempfile.NamedTemporaryFile("r", suffix=".log") as log, output_to_log(Path(log.name)) as terminal:
            console = Console(file=terminal, **terminal_options)
            if arguments.history:
                _history(arguments, console)
            else:
                _lineage(arguments, console)
    except Exception as error:
        return report_error(error, debug=arguments.debug)
    return EXIT_DONE


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.report",
        description="Shows the runs of a workspace, or what a model was made of, from the metadata store of the pipeline.",
        epilog="Exit codes: 0 done; 1 failed; 2 wrong input.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--history", action="store_true", help="the runs: when, what changed, metrics, blessed, serving now")
    what.add_argument("--lineage", metavar="MODEL", help="folder of a pushed model, or the Trainer's: back to the images")
    parser.add_argument("--workspace", help="folder of the runs (default: the one in runs/, or the one that the model lies in)")
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="with --history, the newest N runs (default: 20)")
    parser.add_argument("--images", metavar="FILE.csv", help="with --lineage, list the images: filename, label, split")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    if arguments.images and not arguments.lineage:
        parser.error("--images needs --lineage MODEL")
    if arguments.limit < 1:
        parser.error("--limit needs to be at least 1")
    return arguments


def _history(arguments: argparse.Namespace, console: Console) -> None:
    workspace = Path(arguments.workspace).expanduser() if arguments.workspace else _only_workspace()
    with open_metadata(workspace) as store, live(console, Spinner("dots", "Reading the runs"), transient=True):
        runs = read_history(store, limit=arguments.limit, is_running=_is_running(workspace))
        serving = read_serving(store, workspace / "serving_model")
    if arguments.json:
        found = {
            "workspace": str(workspace.resolve()),
            "runs": [dataclasses.asdict(run) | {"blessed": run.blessed} for run in runs],
        }
        found["serving"] = dataclasses.asdict(serving) if serving else None
        _print_json(console, found)
    else:
        _print_history(console, runs, serving)


def _only_workspace() -> Path:
    """Returns the one workspace below `runs/`."""
    found = sorted(path.parent.parent for path in Path("runs").glob(f"*/{METADATA_FILE}"))
    if len(found) != 1:
        names = ", ".join(str(path) for path in found) or "no workspace in runs/"
        raise InputError(f"Expected --workspace, as runs/ does not hold exactly one. Received: {names}. Name one.")
    return found[0]


def _is_running(workspace: Path) -> bool:
    """Tells whether the process that last took the workspace, `local_runner.py`, lives; without touching its lock."""
    try:
        os.kill(int((workspace / ".lock").read_text()), 0)
    except PermissionError:  # it lives, and is another user's
        return True
    except (OSError, ValueError):
        return False
    return True


def _print_json(console: Console, found: Any) -> None:
    """Prints JSON, with null for what is not a number."""
    console.file.write(f"{json.dumps(_without_nan(found), indent=2)}\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    if isinstance(value, datetime.datetime):
        return value.isoformat(timespec="seconds")
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_history(console: Console, runs: Sequence[Run], serving: Serving | None) -> None:
    # What changed may be long, so it stands below its run, in the full width.
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(_row("run", "verdict", "accuracy", "macro F1", "pushed"), overflow="fold")
    for run in runs:
        metrics = [f"{run.metrics['accuracy']:.1%}", f"{run.metrics['macro_f1']:.3f}"] if run.metrics else ["", ""]
        table.add_row(_row(f"{run.began:%Y-%m-%d %H:%M}", _verdict(run), *metrics, run.pushed_version or ""))
        ran = f"nothing; ran again: {', '.join(run.ran)}" if run.ran else "nothing"
        notes = [f"changed: {'; '.join(run.changes) or ran}"]
        if run.reasons:
            more = f" (and {len(run.reasons) - 1} more)" if len(run.reasons) > 1 else ""
            notes.append(f"why not: {run.reasons[0]}{more}")
        elif run.evaluation not in ("", "read"):
            notes.append(f"its evaluation is {run.evaluation}")
        for note in notes:
            table.add_row(Padding(Text(note, style="dim"), (0, 0, 0, 2)))
    console.print(table)
    if serving is None:
        console.print("Serving now: nothing", highlight=False)
        return
    came_from = f", model {serving.model_id} of the run of {serving.run_began:%Y-%m-%d %H:%M}" if serving.run_began else ""
    console.print(f"Serving now: version {serving.version}{came_from}", highlight=False, soft_wrap=True)
    if serving.note:
        console.print(f"[bold yellow]Beware[/]: {serving.note}.", highlight=False, soft_wrap=True)


def _row(run: str, verdict: str, accuracy: str, macro_f1: str, pushed: str) -> Text:
    color = {"verdict": "bold", "blessed": "green", "not blessed": "red"}.get(verdict, "yellow")
    return Text.assemble(f"{run:<16}  ", (f"{verdict:<24}", color), f"  {accuracy:>8}  {macro_f1:>8}  {pushed}")


def _verdict(run: Run) -> str:
    if run.state == "failed":
        return "stopped by the data gate" if run.step == "DataGate" else f"failed in {run.step}"
    if run.state != "done":
        return f"{run.state} in {run.step}" if run.step else run.state
    if run.evaluator_blessed and run.serving_check_blessed is None:
        return "no serving check"
    return "blessed" if run.blessed else "not blessed"


def _lineage(arguments: argparse.Namespace, console: Console) -> None:
    folder = saved_model_folder(os.path.expanduser(arguments.lineage))
    workspace = find_workspace(folder, arguments.workspace)
    with open_metadata(workspace) as store, live(console, Spinner("dots", "Reading the records"), transient=True):
        digest = model_digest(folder)
        model = find_model(store, digest)
        if model is None:
            raise InputError(
                f"Expected a model that {workspace} made. Received: {folder}, whose files are those of none of its models. "
                "Name its workspace with --workspace; a model that was changed has no lineage."
            )
        chain = read_lineage(store, model.id)
        counts = write_images(chain, arguments.images)
        is_blessed = find_blessing(store, digest) is not None
    if arguments.json:
        found = {"digest": digest, "blessed": is_blessed, "models": [dataclasses.asdict(lineage) for lineage in chain]}
        _print_json(console, found | {"counts": counts})
        return
    console.print(f"[bold]Model {model.id}[/] {escape(folder)}", highlight=False, soft_wrap=True)
    console.print(f"SHA-256 {digest}, {'blessed' if is_blessed else 'not blessed'}", highlight=False, soft_wrap=True)
    print_lineage(console, chain, counts)
    if arguments.images:
        console.print(f"Images  {escape(arguments.images)}", highlight=False, soft_wrap=True)
