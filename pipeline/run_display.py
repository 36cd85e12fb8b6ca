"""How a run on Vertex AI Pipelines looks on the terminal: its steps while it goes on, and its verdict at the end.

Called by `pipeline.runs`.
"""

from typing import Any

import rich.box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from pipeline.console import live
from pipeline.run_state import Run, Task, log_link

_MARKS = {
    "running": "[cyan]▶[/]",
    "done": "[green]✓[/]",
    "reused": "[green]✓[/]",
    "failed": "[red]✗[/]",
}
_PLAIN_NOTE_LOOKS = 6  # between two lines about a lost connection where there is no terminal


class Display:
    """A run's progress: a live table on a terminal, a line for each change of a step elsewhere."""

    def __init__(self, console: Console):
        self._console = console
        self._run: Run | None = None
        self._note = ""
        self._num_notes = 0
        self._states: dict[str, str] = {}
        self._live = live(console, get_renderable=self._render, refresh_per_second=2)

    def __enter__(self) -> "Display":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *unused: Any) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def show(self, run: Run) -> None:
        """Shows what the run is at now."""
        self._run, self._note, self._num_notes = run, "", 0
        for task in run.tasks:
            if task.state == self._states.get(task.name, "waiting"):
                continue
            self._states[task.name] = task.state
            if not self._console.is_terminal:
                self._print(f"{task.name:<{_width(run)}} {task.state} {duration(task.seconds)}".rstrip())

    def note(self, text: str) -> None:
        """Says why nothing new can be shown."""
        if not self._console.is_terminal and self._num_notes % _PLAIN_NOTE_LOOKS == 0:
            self._print(text)
        self._note = text
        self._num_notes += 1

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        note = f"[yellow]{escape(self._note)}[/]" if self._note else ""
        return Group(*([run_table(self._run)] if self._run else []), *([note] if note else []))


def run_table(run: Run) -> RenderableType:
    """Makes the table of a run's steps, under its name and state."""
    table = Table.grid(padding=(0, 2))
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim", no_wrap=True, overflow="ellipsis")
    for task in run.tasks:
        is_quiet = task.state in ("waiting", "not run")
        table.add_row(
            _MARKS.get(task.state, "[dim]·[/]"),
            f"[dim]{escape(task.name)}[/]" if is_quiet else escape(task.name),
            duration(task.seconds),
            escape(task.error if task.state == "failed" else "" if task.state in ("running", "done") else task.state),
        )
    took = f", {duration(run.seconds)}" if run.seconds is not None else ""
    return Group(f"[bold]{escape(run.short_name)}[/] {run.state.lower()}{took}", table)


def runs_table(runs: list[Run]) -> Table:
    """Makes the table of several runs, with times of this machine's zone."""
    table = Table("run", "state", "created", "took", box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for run in runs:
        created = run.created.astimezone().strftime("%Y-%m-%d %H:%M") if run.created else ""
        table.add_row(escape(run.short_name), run.state.lower(), created, duration(run.seconds))
    return table


def print_outcome(run: Run, console: Console) -> None:
    """Prints how a run ended: what was pushed, who refused the model, or which step failed and where its log is."""
    for line in _outcome(run):
        console.print(line, highlight=False, soft_wrap=True)


def duration(seconds: float | None) -> str:
    """Writes a time as a person says it: `8.1 s`, `4 min 05 s`, `2 h 07 min`; empty for None."""
    if seconds is None:
        return ""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left:02} min" if hours else f"{minutes} min {rest:02} s"


def _outcome(run: Run) -> list[str]:
    if run.state == "CANCELLED":
        return ["[bold yellow]Cancelled[/]"]
    if run.state == "FAILED":
        failed = [task for task in run.tasks if task.state == "failed"]
        lines = [line for task in failed for line in _failure(task)]
        return lines or [f"[bold red]Failed[/] {escape(run.error or 'the service gives no reason')}"]
    if run.pushed:
        properties = run.pushed.properties
        destination = str(properties.get("pushed_destination") or run.pushed.uri)
        endpoint, percent = properties.get("endpoint"), properties.get("traffic_percent", 100)
        traffic = [f"Endpoint  {escape(str(endpoint))}, {percent:.0f} % of its traffic"] if endpoint else []
        if not run.is_push_reused:
            return [f"[bold green]Blessed and pushed[/]: {escape(destination)}", *traffic]
        lines = [f"[bold green]Blessed[/], and pushed by an earlier run: {escape(destination)}"]
        lines += [f"{line}, as that run left it" for line in traffic]
        if not destination.startswith("gs://"):
            lines.append("Nothing was deployed anew; `python -m pipeline.deploy status` shows what serves now.")
        return lines
    if not run.pushes:
        return ["[bold green]Succeeded[/]; this pipeline pushes no model."]
    lines = [f"  - {escape(name)}: {escape(verdict.uri)}" for name, verdict in run.refusals]
    return ["[bold red]Not blessed[/], so nothing was pushed" + (". Refused by:" if lines else "."), *lines]


def _failure(task: Task) -> list[str]:
    lines = [f"[bold red]Failed[/] in {escape(task.name)}: {escape(task.error or 'the service gives no reason')}"]
    if task.job:
        lines += [f"Job       {escape(task.job)}", f"Log       {escape(log_link(task))}"]
    if task.is_stopped_by_data:
        lines.append("It stops a run whose data breaks its schema; the log says what was found.")
    return lines


def _width(run: Run) -> int:
    return max(len(task.name) for task in run.tasks)
