"""What the terminal commands share: a console, sizes in words, a progress line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from lowbit.errors import printable

COUNTED = ("CUDA graphs",)  # progress in numbers of things; all other is in bytes
PIPE_WIDTH = 160  # into a file or pipe there is no terminal width to keep to


def console() -> Console:
    """Standard output, as wide as the terminal or ``PIPE_WIDTH``."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def binary_size(nbytes: float) -> str:
    """12345678 as ``11.8 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


class _Amount(DownloadColumn):
    """Bytes, or how many where ``what`` is counted."""

    def render(self, task: Task) -> Text:
        if task.description not in COUNTED:
            return super().render(task)
        return Text(f"{task.completed:.0f}/{task.total or 0:.0f}", style="progress.download")


class _Speed(TransferSpeedColumn):
    def render(self, task: Task) -> Text:
        return Text("") if task.description in COUNTED else super().render(task)


@contextmanager
def progress_line() -> Iterator[Callable[[int, int, str], None]]:
    """A callback (done, all, what) that draws one bar for each ``what`` on stderr; in bytes unless COUNTED.

    Nothing is drawn where stderr is no terminal: a log gets no bars.
    """
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        _Amount(binary_units=True),
        _Speed(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )
    tasks: dict[str, TaskID] = {}

    def show(done: int, total: int, what: str) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(printable(what, 60), total=total or None)
        bars.update(tasks[what], completed=done, total=total or None)

    with bars:
        yield show
