"""What a user sees of a run: steps with their time, progress of long work, tables at the end.

Goes to standard error, so that standard output stays free for JSON. On a terminal, work in progress is shown as
bars; elsewhere as plain lines. GitHub's folded groups are used where ``GITHUB_ACTIONS`` says they are understood.
``NO_COLOR`` is honoured (by rich), ``CI`` turns bars off.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .errors import HarnessError

_LOG_WIDTH = 140  # columns of a table in a log, which has no edge of its own

Advance = Callable[[int], None]
"""Told how much more of a piece of work is done."""


@dataclass
class Step:
    """One step of a run, with its wall time in seconds and what came of it."""

    title: str
    outcome: str = ""
    seconds: float = 0.0

    def note(self, outcome: str) -> None:
        """Say in a few words what came of the step: ``up to date``, ``5 modules``."""
        self.outcome = outcome


def _console() -> Console:
    # Without emoji=False the place of an error, nv-pci.c:100:5, would get a picture for its :100:.
    console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
    if not console.is_terminal:
        console.width = _LOG_WIDTH
    return console


@dataclass
class Reporter:
    """Where a run reports to. Passed to whatever has something to say; there is no global one."""

    console: Console = field(default_factory=_console)
    steps: list[Step] = field(default_factory=list)

    @property
    def live(self) -> bool:
        """Whether bars can be drawn."""
        return self.console.is_terminal and not os.environ.get("CI")

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line."""
        self.console.print(text, style=style, markup=False)

    def fail(self, error: HarnessError) -> None:
        """Print an error: its first line stands out."""
        first, *rest = str(error).split("\n")
        self.console.print(f"error: {first}", style="bold red", markup=False)
        for line in rest:
            self.console.print(f"  {line}", markup=False)

    @contextmanager
    def group(self, title: str) -> Iterator[None]:
        """Fold what is printed meanwhile, where the CI system can."""
        folding = os.environ.get("GITHUB_ACTIONS") == "true"
        self.console.print(f"::group::{title}" if folding else title, style=None if folding else "bold", markup=False)
        try:
            yield
        finally:
            if folding:
                self.console.print("::endgroup::", markup=False)

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Time a step and print how it ended, right-aligned: ``compile open … 5 modules ✓ 84.1 s``."""
        step = Step(title)
        if not self.live:
            self.say(f"  {title} …", style="dim")
        began = time.monotonic()
        try:
            yield step
        except BaseException:
            step.seconds = time.monotonic() - began
            self._ended(step, "✗", "red")
            raise
        step.seconds = time.monotonic() - began
        self.steps.append(step)
        self._ended(step, "✓", "green")

    def _ended(self, step: Step, mark: str, style: str) -> None:
        left = f"  {step.title}" + (f": {step.outcome}" if step.outcome else "")
        right = f"{mark} {step.seconds:.1f} s"
        width = min(self.console.width, 100)
        self.console.print(f"{left}{right:>{max(width - len(left), len(right) + 1)}}", style=style, markup=False)

    @contextmanager
    def bytes(self, title: str, total: int | None) -> Iterator[Advance]:
        """Show the progress of moving ``total`` bytes."""
        columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with self._progress(title, total, columns) as advance:
            yield advance

    @contextmanager
    def units(self, title: str, total: int | None) -> Iterator[Advance]:
        """Show the progress of ``total`` pieces of work: compile units, checks."""
        with self._progress(title, total, (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())) as advance:
            yield advance

    @contextmanager
    def _progress(self, title: str, total: int | None, columns: Sequence[object]) -> Iterator[Advance]:
        if not self.live:
            yield _plain(self, title, total)
            return
        progress = Progress(TextColumn("    {task.description}"), *columns, console=self.console, transient=True)  # type: ignore[arg-type]
        with progress:
            task = progress.add_task(title, total=total)
            yield lambda done: progress.advance(task, done)

    def table(self, title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print a table."""
        table = Table(title=Text(title, "bold"), title_justify="left")
        for name in header:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        self.console.print(table)


_PLAIN_INTERVAL = 20.0  # seconds between two lines where no bar can be drawn


def _plain(reporter: Reporter, title: str, total: int | None) -> Advance:
    """Progress where no bar can be drawn: a line now and then, for work that takes long."""
    done, said = 0, time.monotonic()

    def advance(more: int) -> None:
        nonlocal done, said
        done += more
        if time.monotonic() - said > _PLAIN_INTERVAL:
            said = time.monotonic()
            share = f"{100 * done // total} %" if total else f"{done}"
            reporter.say(f"    {title}: {share}", style="dim")

    return advance


def human_size(size: int) -> str:
    """A number of bytes for people: ``137.6 MB`` (decimal, as registries count)."""
    value = float(size)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def human_time(seconds: float) -> str:
    """A duration for people: ``4 min 05 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


def shorten(value: object, width: int = 300) -> str:
    """A JSON value for people: strings as they are, anything long cut off."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= width else text[:width] + " …"
