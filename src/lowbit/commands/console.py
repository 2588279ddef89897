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
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from lowbit.errors import printable

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


@contextmanager
def progress_line() -> Iterator[Callable[[int, int, str], None]]:
    """A callback (done bytes, all bytes, what) that draws one bar for each ``what`` on stderr.

    Nothing is drawn where stderr is no terminal: a log gets no bars.
    """
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
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
