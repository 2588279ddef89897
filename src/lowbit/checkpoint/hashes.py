"""Hash manifests: what is known of a checkpoint's files from outside, so that one flipped bit is seen.

Three kinds are understood: a ``SHA256SUMS`` file in the folder (as ``sha256sum`` writes and checks it), the
hub's own cache, where a large file is a link to a blob named by its SHA-256, and the certificate that
``lowbit convert`` leaves beside what it wrote.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from lowbit.checkpoint.documents import read_json, read_text
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError, printable

MANIFEST = "SHA256SUMS"
CERTIFICATE = "lowbit-conversion.json"
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
_BLOB = re.compile(r"[0-9a-f]{64}")
_PIECE = 8 << 20


def expected_hashes(header: CheckpointHeader) -> dict[Path, str]:
    """File -> SHA-256 in lower-case hexadecimal, for the files a manifest knows."""
    folder = header.folder
    files = {entry.file for entry in header.tensors.values()}
    found = {file: blob for file in files if (blob := _blob_name(file)) is not None}
    found |= _certified(header)
    text = read_text(header, MANIFEST)
    for number, line in enumerate((text or "").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise LowbitError(
                "E0227", f"{MANIFEST}: line {number} is no SHA-256 and file name: {printable(line, 60)!r}"
            )
        name = match[2]
        if "/" in name or name in ("..", "."):
            raise LowbitError(
                "E0208", f"{MANIFEST} names {printable(name)!r} outside the model directory; refused"
            )
        found[folder / name] = match[1].lower()
    return found


def _certified(header: CheckpointHeader) -> dict[Path, str]:
    """What the certificate says of the files beside it, or of the GGUF file it is named after."""
    name = f"{header.root.name}.{CERTIFICATE}" if header.container == "gguf" else CERTIFICATE
    values = read_json(header.folder, name)
    result = None if values is None else values.get("result")
    files = result.get("files") if isinstance(result, dict) else None
    if values is not None and not isinstance(files, dict):
        raise LowbitError("E0227", f"{name} does not say which files it is of; make it anew, or delete it")
    found = {}
    for file, told in (files or {}).items():
        digest = told.get("sha256") if isinstance(told, dict) else None
        if "/" in file or file in ("..", ".") or not isinstance(digest, str):
            raise LowbitError("E0227", f"{name}: no SHA-256 of a file beside it: {printable(file, 60)!r}")
        found[header.folder / file] = digest.lower()
    return found


def _blob_name(file: Path) -> str | None:
    if not file.is_symlink():
        return None
    name = file.resolve().name
    return name if _BLOB.fullmatch(name) else None


def check_hash(file: Path, expected: str, on_bytes: Callable[[int], None] | None = None) -> None:
    """E0206 where the file's SHA-256 is another, E0207 where there is no such file."""
    digest = hashlib.sha256()
    try:
        with open(file, "rb") as opened:
            while piece := opened.read(_PIECE):
                digest.update(piece)
                if on_bytes is not None:
                    on_bytes(len(piece))
    except FileNotFoundError:
        raise LowbitError("E0207", f"{file.name} is missing (its hash is known)") from None
    except OSError as error:
        raise LowbitError("E0301", f"{file.name}: cannot be read: {error.strerror or error}") from None
    found = digest.hexdigest()
    if found != expected:
        raise LowbitError(
            "E0206",
            f"{file.name}: sha256 {found[:8]}…{found[-4:]} does not match the known "
            f"{expected[:8]}…{expected[-4:]}; the file was changed or damaged. Delete it and run: lowbit "
            "pull MODEL",
        )
