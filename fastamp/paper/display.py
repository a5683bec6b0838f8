"""The progress of many runs, on a terminal or as lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastamp.paper.runner import Display, Progress


def duration(seconds: float) -> str:
    """As one says it: "40 s", "12 min", "2 h 05 min"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def overview(progress: Progress) -> str:
    """Runs done and the time left."""
    parts = [f"{progress.done} of {progress.total} runs"]
    if progress.failed:
        parts.append(f"{progress.failed} failed")
    left = progress.total - progress.done
    if left and progress.unknown == left:
        parts.append("time left not known yet")
    elif left:
        more = f" and {progress.unknown} runs of unknown length" if progress.unknown else ""
        parts.append(f"about {duration(progress.seconds_left)}{more} left")
    return ", ".join(parts)


def outcome(line: Mapping[str, Any]) -> str:
    """What a run came to."""
    if line["status"] == "failed":
        return f"{line['key']}: failed: {line['error']}"
    result = line["result"]
    return f"{line['key']}: test error {result['test_error']:.2f}% (dev {result['best_dev_error']:.2f}%)"


class RunsDisplay(Display):
    """A bar and a line for each run under way on a terminal; elsewhere a line for each run that has ended.

    Args:
        console: where to; the standard output by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._live = Live(console=self._console, refresh_per_second=2, transient=True)

    def __enter__(self) -> RunsDisplay:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def on_poll(self, progress: Progress) -> None:
        """Draws the runs under way."""
        if not self._console.is_terminal:
            return
        steps = sum(run.step / run.steps for run in progress.active)
        bar, runs = Table.grid(padding=(0, 1)), Table.grid(padding=(0, 2))
        bar.add_row(ProgressBar(total=progress.total, completed=progress.done + steps, width=40), overview(progress))
        runs.add_column(no_wrap=True, overflow="fold")  # a key is whole, and what stands beside it breaks
        for run in progress.active:
            error = "" if run.dev_error is None else f"dev error {run.dev_error:.2f}%"
            runs.add_row(Text(f"  {run.run.key}"), f"step {run.step}/{run.steps}", error)
        self._live.update(Group(bar, runs))

    def on_end(self, line: Mapping[str, Any], progress: Progress) -> None:
        """Says what a run came to."""
        if self._console.is_terminal:
            self._console.print(Text(outcome(line)))
        else:
            click.echo(f"{outcome(line)}; {overview(progress)}")
