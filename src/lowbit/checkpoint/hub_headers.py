"""Headers of a hub model by HTTP ranges: what ``lowbit inspect org/name`` needs, and no weight.

The result is a skeleton in a temporary folder: the small documents, and in place of each weight file a sparse
file of its true size that holds only the header's bytes. Every check against the real file size works on it,
and nothing of it takes room. A file that is in the local cache already is linked instead.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from lowbit.checkpoint import hub
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.source import Progress, hub_reference, open_checkpoint, read_local
from lowbit.errors import LowbitError, printable

_GGUF_FIRST = 4 << 20  # most GGUF headers are vocabularies of a few MiB
_LARGEST_HEADER = 256 << 20
_SAFETENSORS_LIMIT = 100 << 20


@contextmanager
def opened_headers(
    name: str,
    revision: str | None = None,
    on_progress: Progress | None = None,
    *,
    load_format: str = "auto",
) -> Iterator[CheckpointHeader]:
    """The header of the model called ``name``; of a hub model only header bytes are fetched.

    The header's files exist until the context ends; their payload is not there.
    """
    reference = hub_reference(name)
    if reference is None or hub.is_offline():
        yield open_checkpoint(name, revision, on_progress, load_format=load_format)
        return
    with tempfile.TemporaryDirectory(prefix="lowbit-headers-") as folder:
        path, commit = _skeleton(Path(folder), reference, revision, on_progress)
        yield replace(read_local(path, load_format), revision=commit)


def _skeleton(
    folder: Path, reference: hub.Reference, revision: str | None, on_progress: Progress | None
) -> tuple[Path, str]:
    """(folder or GGUF file, commit)."""
    found = hub.list_files(reference, revision)
    if found is None:  # no network, but a cached copy
        path, commit = hub.fetch(reference, revision, on_progress)
        return path, commit
    commit, sizes = found
    names = hub.needed_files(reference, list(sizes))
    for number, name in enumerate(names):
        if on_progress is not None:
            on_progress(number, len(names), f"{reference.repo}: header of {name}")
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if not name.endswith((".safetensors", ".gguf")):
            place.symlink_to(hub.download(reference, name, commit))
        elif (cached := hub.cached_file(reference, name, commit)) is not None:
            place.symlink_to(cached)
        else:
            _sparse_file(place, hub.Ranges(reference, name, commit), sizes[name])
    first = folder / names[0]
    return (first if first.suffix == ".gguf" else folder), commit


def _sparse_file(place: Path, remote: hub.Ranges, size: int) -> None:
    """A file of ``size`` bytes, most of them a hole."""
    if place.suffix == ".safetensors":
        head = remote.read(0, min(8, size))
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        # A length that cannot be is left for the reader to refuse.
        if 0 < length <= min(size - 8, _SAFETENSORS_LIMIT):
            head += remote.read(8, length)
        _write(place, head, size)
        return
    wanted = min(_GGUF_FIRST, size)
    while True:
        _write(place, remote.read(0, wanted), size)
        if wanted == size or _holds_header(place, wanted):
            return
        if wanted >= _LARGEST_HEADER:
            raise LowbitError(
                "E0221",
                f"{printable(place.name)}: its header is longer than {_LARGEST_HEADER} bytes; damaged",
            )
        wanted = min(2 * wanted, size)


def _holds_header(place: Path, fetched: int) -> bool:
    """Whether the header ends within the bytes fetched."""
    try:
        header = read_local(place)
    except LowbitError as error:
        # A part of a split is complete by itself; zeros where more of the header should be are not.
        return error.code in ("E0207", "E0220", "E0222")
    starts = [entry.start for entry in header.tensors.values() if entry.file.name == place.name]
    return bool(starts) and min(starts) <= fetched


def _write(place: Path, head: bytes, size: int) -> None:
    with open(place, "wb") as file:
        file.write(head)
        os.ftruncate(file.fileno(), max(size, len(head)))
