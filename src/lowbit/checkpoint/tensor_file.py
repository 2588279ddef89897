"""One file of tensors whose places are known beforehand, written in their order: GGUF.

    head | tensor | zeros up to the alignment | tensor | …

What a ``FileJournal`` says is there stays as it is; the file then ends there, and goes on. No torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from lowbit.checkpoint.journal import FileJournal, Json, Place

Buffer = bytes | bytearray | memoryview


def aligned(size: int, alignment: int) -> int:
    """The next multiple of ``alignment``."""
    return -(-size // alignment) * alignment


def places_after(head: int, sizes: Iterable[tuple[str, int]], alignment: int) -> list[Place]:
    """Where tensors of these names and sizes lie behind ``head`` bytes."""
    found, at = [], aligned(head, alignment)
    for name, nbytes in sizes:
        found.append(Place(name, at, nbytes))
        at = aligned(at + nbytes, alignment)
    return found


class TensorFile:
    """The file at ``path``, its journal opened; ``left``: the places that are still to be written."""

    def __init__(self, path: Path, head: Buffer, journal: FileJournal, alignment: int) -> None:
        self.journal, self.alignment = journal, alignment
        done = len(journal.lines)
        self.left = list(journal.places[done:])
        self._file = open(path, "r+b" if done else "xb")  # noqa: SIM115  # open until ``close``
        ends = [len(head), *(place.offset + place.nbytes for place in journal.places[:done])]
        os.ftruncate(self._file.fileno(), aligned(ends[-1], alignment))
        self._pwrite(0, head)
        for end in ends:  # what is between tensors has no digest
            self._pwrite(end, bytes(aligned(end, alignment) - end))

    def add(self, data: Buffer, parts: dict[str, Json]) -> None:
        """The next tensor. ``parts``: what is known of what it is made of."""
        place, view = self.left[0], memoryview(data).cast("B")
        assert view.nbytes == place.nbytes, f"{place.name}: {view.nbytes} bytes for {place.nbytes}"
        self._pwrite(place.offset, view)
        os.ftruncate(self._file.fileno(), aligned(place.offset + place.nbytes, self.alignment))
        self.journal.add_tensor(place, view, parts)
        del self.left[0]

    def close(self) -> None:
        """Let go of the file, finished or not."""
        self._file.close()

    def _pwrite(self, at: int, data: Buffer) -> None:
        view = memoryview(data)
        while len(view):
            written = os.pwrite(self._file.fileno(), view[: 1 << 30], at)
            view, at = view[written:], at + written
