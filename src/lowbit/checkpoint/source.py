"""From what a person types to a checkpoint: a folder, a GGUF file, ``smollm2``, or a hub id."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lowbit.checkpoint import hub
from lowbit.checkpoint.folder import read_folder_header
from lowbit.checkpoint.gguf_file import holds_model, read_gguf_header
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError, printable

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, what

EMBEDDED_NAME = "smollm2"


def open_checkpoint(
    name: str,
    revision: str | None = None,
    on_progress: Progress | None = None,
    *,
    load_format: str = "auto",
) -> CheckpointHeader:
    """The header of the model called ``name``; a hub model is fetched first if it is not in the cache.

    ``load_format``: what its files must be, as ``read_local`` has it.
    """
    path, resolved = resolve(name, revision, on_progress)
    return replace(read_local(path, load_format), revision=resolved)


def resolve(
    name: str, revision: str | None = None, on_progress: Progress | None = None
) -> tuple[Path, str | None]:
    """(folder or GGUF file, hub commit or None)."""
    if name == EMBEDDED_NAME:
        from lowbit.checkpoint.embedded import embedded_model

        return embedded_model(on_progress), None
    path = Path(name).expanduser()
    if path.exists():
        return path, None
    if (reference := hub_reference(name)) is not None:
        return hub.fetch(reference, revision, on_progress)
    raise LowbitError("E0201", _nothing_there(name, path))


def hub_reference(name: str) -> hub.Reference | None:
    """The hub model ``name`` stands for, or None: something local has the name, or it is no reference."""
    if name == EMBEDDED_NAME or _looks_like_path(name) or Path(name).expanduser().exists():
        return None
    return hub.parse_reference(name)


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or (name.endswith((".gguf", os.sep)) and ":" not in name)


def _nothing_there(name: str, path: Path) -> str:
    shown = printable(name)
    candidates = [EMBEDDED_NAME]
    if path.parent.is_dir():
        candidates += [str(path.parent / entry.name) for entry in path.parent.iterdir()]
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    guess = f"; did you mean {printable(close[0])!r}?" if close else ""
    return (
        f"no model {shown!r}: not a folder, not a GGUF file, not a hub id (org/name), not "
        f"{EMBEDDED_NAME!r}{guess}"
    )


def read_local(path: Path, load_format: str = "auto") -> CheckpointHeader:
    """The header of a folder or a GGUF file on this machine.

    ``load_format`` safetensors, pt, mistral or gguf: E0406 where it is something else, and gguf chooses
    where a folder holds others too; anything else takes what is there, GGUF last.
    """
    header = _read_folder(path, load_format) if path.is_dir() else read_gguf_header(path)
    found = "pt" if header.container == "pickle" else header.container
    if header.rotary_pairs and load_format == "mistral":
        return header
    if load_format in ("safetensors", "pt", "mistral", "gguf") and found != load_format:
        raise LowbitError(
            "E0406",
            f"--load-format {load_format}: {printable(path.name)} is {found}; use --load-format {found} or "
            f"auto, or name the {load_format} files",
        )
    return header


def _read_folder(path: Path, load_format: str) -> CheckpointHeader:
    ggufs = sorted(path.glob("*.gguf"))
    described = (path / "config.json").exists() or (path / "params.json").exists()
    complete = described and (any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin")))
    if not ggufs or (complete and load_format != "gguf"):
        return read_folder_header(path)
    models = [file for file in ggufs if holds_model(file.name)] or ggufs
    models = [file for file in models if "-of-" not in file.name or "-00001-of-" in file.name]
    if len(models) != 1:
        listed = ", ".join(printable(file.name) for file in ggufs[:8])
        raise LowbitError("E0201", f"{path.name} holds {len(ggufs)} GGUF files; name one of: {listed}")
    return read_gguf_header(models[0])
