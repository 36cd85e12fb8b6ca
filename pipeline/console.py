"""What a person sees of a run: live progress per step, and the verdict at the end.

TensorFlow, absl and Beam write to the process's own standard output and error, from Python and from C++ alike; both are sent
to the run's log, and the terminal is kept for what a person wants to know. Called by `local_runner.py`.
"""

import contextlib
import dataclasses
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import rich.box
from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table

_STARTED = re.compile(r"Component (\S+) is running\.")
_FINISHED = re.compile(r"Component (\S+) is finished\.")
_CACHED = re.compile(r"A cached execution \d+ is used\.")
_DETAIL_LOGGER = "tfx_vision"
_PLAIN_DETAIL_SECONDS = 10.0
_MARKS = {"waiting": "[dim]·[/]", "running": "[cyan]▶[/]", "done": "[green]✓[/]", "failed": "[red]✗[/]"}


@dataclasses.dataclass
class Step:
    """One line of the progress display.

    Attributes:
      name: of the component.
      state: waiting, running, done or failed.
      seconds: that it took, or has taken so far.
      cached: whether an earlier result was reused.
      detail: what it says of itself.
    """

    name: str
    state: str = "waiting"
    seconds: float = 0.0
    cached: bool = False
    detail: str = ""


@contextlib.contextmanager
def output_to_log(path: Path) -> Iterator[TextIO]:
    """Sends the process's standard output and error to a file, from C++ too, and yields the real standard output.

    Args:
      path: file to append to.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    terminal = os.fdopen(os.dup(1), "w", encoding=getattr(sys.stdout, "encoding", None) or "utf-8", errors="replace")
    python_streams = sys.stdout, sys.stderr
    with open(path, "a", encoding="utf-8", errors="replace", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = log
        try:
            yield terminal
        finally:
            sys.stdout, sys.stderr = python_streams
            terminal.flush()
            for target, descriptor in zip((1, 2), saved, strict=True):
                os.dup2(descriptor, target)
                os.close(descriptor)
            terminal.close()


def live(console: Console, renderable: RenderableType | None = None, **options: Any) -> Live:
    """Makes a live display that leaves the process's own output alone: that goes to the log, not to the terminal."""
    return Live(renderable, console=console, redirect_stdout=False, redirect_stderr=False, **options)


class Progress(logging.Handler):
    """Follows a run by its log messages and shows it: a live table on a terminal, a line for each step elsewhere."""

    def __init__(self, console: Console):
        super().__init__(logging.INFO)
        self.steps: list[Step] = []
        self._console = console
        self._current: Step | None = None
        self._started = 0.0
        self._detail_shown = 0.0
        self._steps_lock = threading.RLock()
        self._live = live(console, get_renderable=self._table, refresh_per_second=4)

    def __enter__(self) -> "Progress":
        logging.getLogger().addHandler(self)
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, exception_type: type | None, *unused: Any) -> None:
        logging.getLogger().removeHandler(self)
        with self._steps_lock:
            if self._current is not None:
                self._finish("failed" if exception_type else "done")
        if self._console.is_terminal:
            self._live.stop()

    def plan(self, names: Sequence[str]) -> None:
        """Announces steps to come."""
        with self._steps_lock:
            self.steps += [Step(name) for name in names]

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Shows a step of our own around a block of code."""
        self._start(name)
        yield self._current
        self._finish("done")

    def emit(self, record: logging.LogRecord) -> None:
        """Reads a log record; TFX's local runner says there what it is at."""
        message = record.getMessage()
        if record.name == _DETAIL_LOGGER:
            self._set_detail(message)
        elif match := _STARTED.fullmatch(message):
            self._start(match[1])
        elif _FINISHED.fullmatch(message):
            self._finish("done")
        elif _CACHED.fullmatch(message) and self._current is not None:
            self._current.cached = True
            self._current.detail = "nothing changed: reused"

    def _start(self, name: str) -> None:
        with self._steps_lock:
            if not any(step.name == name for step in self.steps):
                self.steps.append(Step(name))
            self._current = next(step for step in self.steps if step.name == name)
            self._current.state = "running"
            self._started = self._detail_shown = time.monotonic()

    def _finish(self, state: str) -> None:
        with self._steps_lock:
            step, self._current = self._current, None
            if step is None:
                return
            step.state, step.seconds = state, time.monotonic() - self._started
        if not self._console.is_terminal:
            suffix = " (reused)" if step.cached else f" {step.seconds:.1f} s"
            self._console.print(f"{step.name:<20} {state}{suffix}", highlight=False, markup=False)

    def _set_detail(self, message: str) -> None:
        if self._current is None:
            return
        self._current.detail = message
        now = time.monotonic()
        if not self._console.is_terminal and now - self._detail_shown > _PLAIN_DETAIL_SECONDS:
            self._detail_shown = now
            self._console.print(f"{self._current.name:<20} {message}", highlight=False, markup=False, soft_wrap=True)

    def _table(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(style="dim", no_wrap=True, overflow="ellipsis")
        with self._steps_lock:
            for step in self.steps:
                seconds = time.monotonic() - self._started if step is self._current else step.seconds
                table.add_row(
                    _MARKS[step.state],
                    step.name if step.state != "waiting" else f"[dim]{step.name}[/]",
                    "" if step.state == "waiting" else f"{seconds:.1f} s",
                    escape(step.detail),
                )
        return table


def print_summary(console: Console, run: dict[str, Any]) -> None:
    """Prints the verdict of a finished run: accuracy per class, what was found in the data, blessed or not and why, the model.

    Args:
      console: of the terminal.
      run: what `run.json` holds.
    """
    metrics = run["metrics"]
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("class")
    for name in ("test images", "accuracy", "precision", "F1"):
        table.add_column(name, justify="right")
    for name, values in metrics["classes"].items():
        table.add_row(
            escape(name),
            f"{values['example_count']:.0f}",
            f"{values['recall']:.1%}",
            f"{values['precision']:.1%}",
            f"{values['f1']:.3f}",
        )
    overall = metrics["overall"]
    table.add_section()
    table.add_row(
        "[bold]all[/]",
        f"{overall['example_count']:.0f}",
        f"[bold]{overall['accuracy']:.1%}[/]",
        "",
        f"[bold]{overall['macro_f1']:.3f}[/]",
    )
    console.print(table)
    noted = [*run["data_warnings"], *run["data_findings"]]
    if number := run["counts"].get("quarantined"):
        images = "image" if number == 1 else "images"
        noted.insert(0, f"{number:,} unusable {images} put aside; quarantine.json beside the records says why.")
    if noted:
        console.print("[bold yellow]Data[/]:", highlight=False)
        for finding in noted:
            console.print(f"  - {finding}", highlight=False, markup=False, soft_wrap=True)
    if run["blessed"]:
        console.print(f"[bold green]Blessed[/]: {_passed(run)}", highlight=False, soft_wrap=True)
        console.print(f"Model   {run['pushed_model']}", highlight=False, markup=False, soft_wrap=True)
    else:
        console.print("[bold red]Not blessed[/], so nothing was pushed:", highlight=False)
        for reason in run["reasons"]:
            console.print(f"  - {reason}", highlight=False, markup=False, soft_wrap=True)


def _passed(run: dict[str, Any]) -> str:
    """Says what a blessed model was measured by."""
    if run["metrics"]["has_baseline"]:
        return "the model passed every threshold, and is not worse than the latest blessed model."
    return "the model passed every threshold; it was compared with no earlier model."
