"""What a file must be before anything is read of it: a regular file of this name, and not an impostor.

A missing git-LFS download, a hub's error page and a compressed file all arrive under the weights' name.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from lowbit.checkpoint.header import TensorEntry
from lowbit.errors import LowbitError, thousands

_PIECE = 4 << 20
_LFS_MARK = b"version https://git-lfs"


def check_regular_file(path: Path, what: str = "file") -> int:
    """The size of a regular file in bytes; a folder, pipe or device is refused (a link is followed)."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise LowbitError("E0201", f"{path.name}: no such {what} in {path.parent}") from None
    except OSError as error:
        raise LowbitError("E0301", f"{path.name}: cannot be read: {error.strerror or error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise LowbitError("E0202", f"{path.name} is no regular file; a {what} was expected")
    return status.st_size


def refuse_impostors(path: Path, start: bytes, size: int) -> None:
    """Refuse what is not weights at all, by the file's first bytes (at least 64 of them, or all)."""
    name = path.name
    if size == 0:
        raise LowbitError("E0203", f"{name} is empty (0 bytes): incomplete download; fetch it again")
    if start.startswith(_LFS_MARK):
        raise LowbitError(
            "E0204",
            f"{name} is a git-LFS pointer ({size} bytes), not the weights. Run 'git lfs pull' there, "
            "or: lowbit pull <repo>",
        )
    head = start.lstrip()[:15].lower()
    if head.startswith((b"<!doctype html", b"<html")):
        raise LowbitError(
            "E0205",
            f"{name} is an HTML page, not weights: the download was answered with a page. If the model is "
            "gated, log in with 'hf auth login' and accept its licence on the hub",
        )
    if start.startswith((b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd")):
        raise LowbitError("E0205", f"{name} is a compressed archive, not weights; unpack it first")


def truncated(path: Path, size: int, needed: int) -> LowbitError:
    """The file ends before what its header promises."""
    return LowbitError(
        "E0203",
        f"{path.name} is {thousands(size)} bytes but its header needs {thousands(needed)}: incomplete "
        "download. Fetch it again (lowbit pull <repo>)",
    )


def same_bytes(one: TensorEntry, other: TensorEntry) -> bool:
    """Whether two stored tensors are the same: dtype, shape and every byte; read up to where they differ."""
    if (one.dtype, one.shape, one.nbytes) != (other.dtype, other.shape, other.nbytes):
        return False
    with open(one.file, "rb") as first, open(other.file, "rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        for at in range(0, one.nbytes, _PIECE):
            count = min(_PIECE, one.nbytes - at)
            if first.read(count) != second.read(count):
                return False
    return True
