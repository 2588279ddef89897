"""A folder, or a file, that appears under its name complete or not at all.

    OUT.partial/   written, one process at a time (a lock on the folder itself), every file synced
    OUT            the same folder renamed, its parent synced

A run that was broken off leaves ``OUT.partial`` behind, with the mark of its writer in it; the next run
clears it away, but for what a ``Journal`` says is finished. Something of that name without the mark
is somebody else's and is not touched. A single file is written in such a folder and moved out of it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lowbit.checkpoint.journal import JOURNAL, FileJournal, Journal
from lowbit.errors import LowbitError, printable, thousands

MARK = "lowbit-writes-here.json"


@contextmanager
def output_folder(
    out: Path, *, force: bool = False, source: Path | None = None, journal: Journal | None = None
) -> Iterator[Path]:
    """The folder to write into; leaving it without an error gives it the name ``out``.

    ``force``: a checkpoint that is there is replaced. ``source``: what is being read, never replaced.
    ``journal``: finished shards outlive a run that is broken off (but not one that cannot succeed).
    """
    out = out.absolute()
    with _partial_folder(out, force, source, journal) as partial:
        yield partial
        sync_folder(partial)
        _give_name(partial, out, force)
        (out / JOURNAL).unlink(missing_ok=True)
        (out / MARK).unlink()  # last: a folder that a broken run left must be known as such


@contextmanager
def output_file(
    out: Path, *, force: bool = False, source: Path | None = None, journal: FileJournal | None = None
) -> Iterator[Path]:
    """A path to write one file at, in a folder of its own; at the end it moves to ``out``.

    What was written beside it moves first. ``journal``: finished tensors outlive a run that is broken off.
    """
    out = out.absolute()
    with _partial_folder(out, force, source, journal) as partial:
        yield partial / out.name
        with open(partial / out.name, "rb") as file:
            os.fsync(file.fileno())
        check_output(out, force=force, source=source)
        for path in [path for path in partial.iterdir() if path.name not in (MARK, JOURNAL, out.name)]:
            os.replace(path, out.with_name(path.name))
        os.replace(partial / out.name, out)
        sync_folder(out.parent)
        _remove(partial)


@contextmanager
def _partial_folder(out: Path, force: bool, source: Path | None, journal: Journal | None) -> Iterator[Path]:
    """``OUT.partial``, locked and cleared; after an error it is removed, or kept where it can be gone on
    with."""
    check_output(out, force=force, source=source)
    partial = out.with_name(out.name + ".partial")
    with explained(out):
        partial.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(partial)
    try:
        with explained(out):
            _clear(partial, journal)
            yield partial
    except _NotOursError:
        raise
    except BaseException as error:
        if journal is None or not journal.lines or not _may_succeed(error):
            _remove(partial)
        elif isinstance(error, LowbitError) and error.code == "E0510":
            raise LowbitError(
                "E0511",
                f"{printable(out)}: the disk is full; {len(journal.lines)} finished {journal.pieces} are "
                "kept. Free some space and run the same command to go on",
            ) from None
        raise
    finally:
        os.close(lock)


def _may_succeed(error: BaseException) -> bool:
    """Whether the same command may get further: it was stopped, or the system refused something."""
    return not isinstance(error, LowbitError) or error.code in ("E0300", "E0301", "E0510")


def check_output(out: Path, *, force: bool, source: Path | None) -> None:
    """E0302 where ``out`` may not be written; in a folder's place an empty one may lie."""
    if not os.path.lexists(out):
        return
    if out.suffix != ".gguf" and _is_empty_folder(out):
        if os.path.samefile(out, os.curdir):  # whoever is in it would be in a folder that is gone
            raise LowbitError("E0302", f"{printable(out)} is where you are; name a folder in it")
        return
    if not force:
        raise LowbitError(
            "E0302", f"{printable(out)} is there already; name another place, or replace it with --force"
        )
    if source is not None and out.resolve() in (source.resolve(), *source.resolve().parents):
        raise LowbitError("E0302", f"{printable(out)} is what is being read; name another place")
    ours = out.is_file() if out.suffix == ".gguf" else (out / "config.json").is_file()
    if out.is_symlink() or not ours:
        raise LowbitError(
            "E0302", f"{printable(out)} is no checkpoint; --force replaces nothing else. Name another place"
        )


def _is_empty_folder(out: Path) -> bool:
    return out.is_dir() and not out.is_symlink() and not any(out.iterdir())


def check_room(out: Path, needed: int) -> None:
    """E0510 where the disk of ``out`` has less than ``needed`` bytes free."""
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise LowbitError(
            "E0510",
            f"{printable(out)} needs {thousands(needed)} bytes, {thousands(free)} are free there; nothing "
            "was written. Name a place on another disk",
        )


@contextmanager
def explained(out: Path) -> Iterator[None]:
    """The system's refusals to write, as errors that name what was to be written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LowbitError(
                "E0510",
                f"{printable(out)}: the disk is full; nothing was kept. Free some space, or name a place on "
                "another disk",
            ) from None
        if error.errno == errno.EFBIG:
            raise LowbitError(
                "E0300",
                f"{printable(out)} cannot be written: no file may be so large there (a disk of format FAT, "
                "or a limit: ulimit -f). Name a place on another disk, or raise the limit",
            ) from None
        where = f" ({printable(os.fsdecode(error.filename))})" if error.filename else ""
        raise LowbitError(
            "E0300", f"{printable(out)} cannot be written: {error.strerror or error}{where}"
        ) from None


def _locked(partial: Path) -> int:
    """An open and locked descriptor of the folder, which is made; E0303 where another process has it."""
    while True:
        partial.mkdir(exist_ok=True)
        number = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(number)
            raise LowbitError(
                "E0303",
                f"{printable(partial)} is being written by process {_writer(partial)}; wait for it, or name "
                "another place",
            ) from None
        # The other writer may have renamed the folder between our open and our lock.
        if partial.exists() and os.path.samestat(os.fstat(number), os.stat(partial)):
            return number
        os.close(number)


def _writer(partial: Path) -> str:
    try:
        return printable(json.loads((partial / MARK).read_text())["pid"], 12)
    except (OSError, ValueError, KeyError, TypeError):
        return "(unknown)"


def _clear(partial: Path, journal: Journal | None = None) -> None:
    """Away with what a broken run left unfinished; E0302 where the folder is not such a one."""
    left = [path for path in partial.iterdir() if path.name != MARK]
    if left and not (partial / MARK).is_file():
        raise _NotOursError(
            "E0302", f"{printable(partial)} is there already, and not from lowbit; move it away"
        )
    (partial / MARK).write_text(json.dumps({"pid": os.getpid()}))  # before anything else lies there
    kept = set()
    if journal is not None:
        try:
            journal.open(partial)
        except LowbitError as error:
            raise _NotOursError(error.code, error.message) from None
        kept = journal.kept
    for path in left:
        if path.name in kept or not path.exists():
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _remove(partial: Path) -> None:
    """As far as possible; the mark goes last, so that what is left of it is known."""
    with suppress(OSError):
        for path in [path for path in partial.iterdir() if path.name != MARK]:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        (partial / MARK).unlink(missing_ok=True)
        partial.rmdir()


class _NotOursError(LowbitError):
    """The folder is somebody else's: not even to be removed."""


def sync_folder(folder: Path) -> None:
    """A folder's own entries on the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _give_name(partial: Path, out: Path, force: bool) -> None:
    aside = out.with_name(f"{out.name}.replaced-{os.getpid()}")
    if force and os.path.lexists(out):
        os.rename(out, aside)
    elif os.path.lexists(out) and not _is_empty_folder(out):
        raise LowbitError("E0302", f"{printable(out)} appeared meanwhile; nothing was overwritten")
    try:
        os.rename(partial, out)
    except OSError:
        if os.path.lexists(aside):
            os.rename(aside, out)
        raise
    sync_folder(out.parent)
    if os.path.lexists(aside):
        shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
