import io
import logging
import os
import re
import subprocess
import sys

import pytest
from rich.console import Console

from pipeline.console import Progress, print_summary

RUN = {
    "blessed": True,
    "pushed_model": "/runs/[x]/serving_model/1",
    "reasons": [],
    "data_findings": [],
    "data_warnings": [],
    "counts": {"train": {"square": 300}, "quarantined": 0},
    "metrics": {
        "has_baseline": False,
        "overall": {"accuracy": 0.925, "macro_f1": 0.9, "example_count": 40.0},
        "classes": {
            "[red]": {"recall": 0.95, "precision": 0.5, "f1": 0.655, "example_count": 30.0},
            "square": {"recall": 0.85, "precision": 1.0, "f1": 0.919, "example_count": 10.0},
        },
    },
}


@pytest.fixture(autouse=True)
def _logs_of_every_step():
    """Lets records from INFO on through, as the runner does."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.INFO)
    yield
    root.setLevel(level)


def _console(*, is_terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=100)


def _run_component(name: str, *, cached: bool = False) -> None:
    """Logs what TFX's local runner logs around a component."""
    logging.info("Component %s is running.", name)
    if cached:
        logging.info("A cached execution 12 is used.")
    logging.info("Component %s is finished.", name)


def _states(progress: Progress) -> list[tuple[str, str, bool]]:
    return [(step.name, step.state, step.cached) for step in progress.steps]


def test_progress_follows_the_log_of_the_runner():
    with Progress(_console()) as progress:
        progress.plan(["Trainer", "Evaluator", "Pusher"])
        _run_component("Trainer", cached=True)
        logging.info("Component Evaluator is running.")

        assert _states(progress) == [
            ("Trainer", "done", True),
            ("Evaluator", "running", False),
            ("Pusher", "waiting", False),
        ]


def test_progress_shows_a_step_that_was_not_planned():
    with Progress(_console()) as progress:
        progress.plan(["Trainer"])
        _run_component("Resolver")

    assert _states(progress) == [("Trainer", "waiting", False), ("Resolver", "done", False)]


def test_progress_takes_the_detail_of_our_own_logger_alone():
    with Progress(_console()) as progress:
        logging.getLogger("tfx_vision").info("before any step")
        with progress.step("Trainer") as step:
            logging.getLogger("tfx_vision").info("embedded %d images", 32)
            logging.getLogger("absl").info("noise")

    assert step.detail == "embedded 32 images"


def test_progress_marks_the_step_that_failed():
    progress = Progress(_console())

    with pytest.raises(RuntimeError, match="broken"), progress, progress.step("Prepare data"):
        raise RuntimeError("broken")

    assert _states(progress) == [("Prepare data", "failed", False)]
    assert re.fullmatch(r"Prepare data +failed \d+\.\d s\n", progress._console.file.getvalue())


def test_progress_marks_the_component_that_failed():
    progress = Progress(_console())

    def run():
        with progress:
            progress.plan(["Trainer", "Pusher"])
            logging.info("Component Trainer is running.")
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        run()

    assert _states(progress) == [("Trainer", "failed", False), ("Pusher", "waiting", False)]


def test_progress_prints_a_line_for_each_step_where_there_is_no_terminal():
    console = _console()
    with Progress(console) as progress:
        progress.plan(["Trainer", "[bold]"])
        _run_component("Trainer", cached=True)
        _run_component("[bold]")

    lines = console.file.getvalue().splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"Trainer +done \(reused\)", lines[0])
    assert re.fullmatch(r"\[bold\] +done \d+\.\d s", lines[1])


def test_progress_shows_a_table_on_a_terminal():
    console = _console(is_terminal=True)
    with Progress(console) as progress:
        progress.plan(["Trainer", "Pusher"])
        _run_component("Trainer", cached=True)
        with progress.step("Report"):
            logging.getLogger("tfx_vision").info("[odd] detail")

    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    assert re.search(r"✓ +Trainer +\d+\.\d s +nothing changed: reused", shown)
    assert re.search(r"· +Pusher", shown)
    assert re.search(r"✓ +Report +\d+\.\d s +\[odd\] detail", shown)


def test_progress_is_off_the_log_once_it_has_ended():
    before = list(logging.getLogger().handlers)
    with Progress(_console()) as progress:
        assert progress in logging.getLogger().handlers

    assert logging.getLogger().handlers == before


def test_output_to_log_takes_what_every_layer_writes(tmp_path):
    # A process of its own, as pytest has descriptors 1 and 2 in hand itself.
    code = """
import os, subprocess, sys
from pathlib import Path
from pipeline.console import output_to_log
print("before")
with output_to_log(Path(sys.argv[1])) as terminal:
    print("python out")
    print("python err", file=sys.stderr)
    os.write(1, b"descriptor out\\n")
    os.write(2, b"descriptor err\\n")
    subprocess.run(["echo", "child"], check=True)
    terminal.write("to the person\\n")
print("after")
"""
    log = tmp_path / "run.log"
    log.write_text("kept\n")

    run = subprocess.run([sys.executable, "-c", code, str(log)], capture_output=True, text=True, check=True, env=_environment())

    assert run.stdout == "before\nto the person\nafter\n"
    assert run.stderr == ""
    assert sorted(log.read_text().splitlines()) == sorted(
        ["kept", "python out", "python err", "descriptor out", "descriptor err", "child"]
    )


def test_output_to_log_gives_the_output_back_after_an_error(tmp_path):
    code = """
import sys
from pathlib import Path
from pipeline.console import output_to_log
try:
    with output_to_log(Path(sys.argv[1])):
        raise RuntimeError("broken")
except RuntimeError as error:
    print(f"caught {error}")
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run.log")],
        capture_output=True,
        text=True,
        check=True,
        env=_environment(),
    )

    assert run.stdout == "caught broken\n"


def _environment() -> dict[str, str]:
    from conftest import ROOT

    return dict(os.environ) | {"PYTHONPATH": str(ROOT)}


def test_print_summary_shows_the_classes_and_where_the_model_is():
    console = _console()

    print_summary(console, RUN)

    shown = console.file.getvalue()
    assert re.search(r"\[red\] +30 +95\.0% +50\.0% +0\.655", shown)
    assert re.search(r"square +10 +85\.0% +100\.0% +0\.919", shown)
    assert re.search(r"all +40 +92\.5% +0\.900", shown)
    assert "Blessed: the model passed every threshold; it was compared with no earlier model." in shown
    assert "Model   /runs/[x]/serving_model/1\n" in shown
    assert "Not blessed" not in shown


def test_print_summary_says_why_a_model_is_refused():
    console = _console()
    reason = "accuracy of `label=[red]` is 0.100 with 30 examples; the limit is 0.500" + " and on" * 20

    print_summary(console, RUN | {"blessed": False, "pushed_model": None, "reasons": [reason, "another"]})

    shown = console.file.getvalue()
    assert "Not blessed, so nothing was pushed:" in shown
    assert f"  - {reason}\n  - another\n" in shown
    assert "Model " not in shown


@pytest.mark.parametrize(("number", "said"), [(1, "1 unusable image put"), (1200, "1,200 unusable images put")])
def test_print_summary_says_how_many_images_were_put_aside(number, said):
    console = _console()

    print_summary(console, RUN | {"counts": {"quarantined": number}})

    assert f"Data:\n  - {said} aside; quarantine.json beside the records says why.\n" in console.file.getvalue()


def test_print_summary_lists_what_the_data_gate_found():
    console, silent = _console(), _console()
    finding = "skew in `label`: 50.0% of train and 80.0% of test are '[red]'" + " and on" * 20

    print_summary(console, RUN | {"data_warnings": [finding], "data_findings": ["another"]})
    print_summary(silent, RUN)

    assert f"Data:\n  - {finding}\n  - another\n" in console.file.getvalue()
    assert "Data:" not in silent.file.getvalue()
