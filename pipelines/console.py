"""What a person sees while a stage runs: progress with time left, the losses, and a summary."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import IO, Any, Self, cast

from rich.console import Console
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

LOG_EVERY_S = 10.0


class Output:
    """Standard output, as long as there is somebody who reads it.

    A closed pipe (`| head`) or terminal is no reason to end a run: what comes after goes nowhere.
    """

    def write(self, text: str) -> int:
        try:
            return sys.stdout.write(text)
        except OSError:
            return self._go_on(text)

    def flush(self) -> None:
        try:
            sys.stdout.flush()
        except OSError:
            self._go_on("")

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)

    def _go_on(self, text: str) -> int:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return len(text)


output = Output()
# What is printed holds paths and names of users, in which [brackets] and :colons: mean themselves.
console = Console(file=cast(IO[str], output), highlight=False, markup=False, emoji=False)


class Display:
    """Progress of one stage: a live bar in a terminal, a line every few seconds in a log."""

    def __init__(self, stage: str, total: int, *, done: int = 0):
        self.stage, self.total, self.done = stage, total, done
        self._first, self._began, self._said = done, time.monotonic(), 0.0
        self._bar = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}", markup=False),
            console=console,
            disable=not output.isatty(),
        )
        self._task = self._bar.add_task(stage, total=total, completed=done, losses="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, done: int, values: Mapping[str, float]) -> None:
        """`done` units in all, and what to show of them."""
        self.done = done
        losses = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._bar.update(self._task, completed=done, losses=losses)
        now = time.monotonic()
        if self._bar.disable and (now - self._said > LOG_EVERY_S or done == self.total):
            self._said = now
            speed = (done - self._first) / max(now - self._began, 1e-9)
            left = (self.total - done) / speed if speed else 0.0
            say(f"{self.stage}  {done}/{self.total}  {left / 60:.1f} min left  {losses}")


def say(text: str) -> None:
    """One line, printed above a running progress bar."""
    console.print(text, soft_wrap=True)


def summary(title: str, rows: Mapping[str, str]) -> None:
    """The last thing that a stage prints."""
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(Panel(table, title=title, expand=False))


@contextmanager
def progress(stage: str, total: int, done: int) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """The display of one stage, as what to report to."""
    if done:
        say(f"{stage}: resuming from {done}")
    with Display(stage, total, done=done) as display:
        yield display.update
