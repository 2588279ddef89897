"""Safetensors shards written as they come: no more of a model in memory than the tensor in hand.

    header length u64 | JSON header, blanks after it | tensors, one behind another

The format puts the header first and allows no holes, but what lies in a shard is only known at its end: room
is left in front, filled up with blanks as the format allows. A tensor must lie at a multiple of its
element's size, or others cannot view it: those of an odd number of bytes wait in memory for the shard's end,
wide elements first. A stack of experts gets its place once and is filled slice by slice. No torch.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

from lowbit.checkpoint.safetensors_file import DTYPE_BITS, INDEX

SHARD_BYTES = 4 << 30
_ALIGNMENT = 8
_ENTRY_BYTES = 128  # of JSON for one tensor, beside its name
_FRAME_BYTES = 64  # of JSON around tensors and metadata
_LEAST_ROOM = 1 << 12

Buffer = bytes | bytearray | memoryview


@dataclass
class _Place:
    """Where a tensor lies: ``begin`` counts from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


@dataclass
class _Waiting:
    """A tensor whose size is no multiple of the alignment: written at the shard's end."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytearray


class _Shard:
    """One open file: ``<name>.tmp`` until the writer gives it its own name."""

    def __init__(self, path: Path, room: int, metadata: dict[str, str]) -> None:
        self.path = path
        self.metadata = dict(metadata)
        own = len(json.dumps(metadata))
        self.room = -(-(room + own) // _ALIGNMENT) * _ALIGNMENT  # bytes of the JSON header
        self.file = open(path, "xb+")  # noqa: SIM115  # stays open until ``settle``
        self.places: dict[str, _Place] = {}
        self.waiting: list[_Waiting] = []
        self.end = 0
        self.header_bytes = self.least_bytes = _FRAME_BYTES + own
        self.unfilled = 0
        self.complete = False

    @property
    def payload(self) -> int:
        return self.end + sum(len(one.data) for one in self.waiting)

    def takes(self, header_bytes: int, nbytes: int, limit: int) -> bool:
        """Whether another tensor fits under the limit and its entry into the header's room."""
        first = self.header_bytes == self.least_bytes
        return first or (self.payload + nbytes <= limit and self.header_bytes + header_bytes <= self.room)

    def place(self, name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> _Place:
        self.places[name] = found = _Place(dtype, shape, self.end, nbytes)
        self.end += nbytes
        return found

    def pwrite(self, begin: int, data: Buffer) -> None:
        view, at = memoryview(data).cast("B"), 8 + self.room + begin
        while len(view):
            written = os.pwrite(self.file.fileno(), view[: 1 << 30], at)
            view, at = view[written:], at + written

    def settle(self) -> None:
        """The waiting tensors, the header, and everything on the disk."""
        self.waiting.sort(key=lambda one: -DTYPE_BITS[one.dtype])
        for one in self.waiting:
            self.pwrite(self.place(one.name, one.dtype, one.shape, len(one.data)).begin, one.data)
        parts: dict[str, object] = {"__metadata__": self.metadata}
        for name, place in sorted(self.places.items(), key=lambda item: item[1].begin):
            offsets = [place.begin, place.begin + place.nbytes]
            parts[name] = {"dtype": place.dtype, "shape": list(place.shape), "data_offsets": offsets}
        text = json.dumps(parts, separators=(",", ":")).encode()
        assert len(text) <= self.room, "every tensor's entry was counted"
        self.pwrite(-8 - self.room, struct.pack("<Q", self.room) + text.ljust(self.room))
        os.ftruncate(self.file.fileno(), 8 + self.room + self.end)
        os.fsync(self.file.fileno())
        self.file.close()
        self.complete = True


@dataclass
class ShardedWriter:
    """Tensors into ``folder``, a new shard after ``shard_bytes``; ``finish`` names the files.

    ``room``: bytes left for the tensors in a shard's header (``room_for``) and what ``describe`` adds;
    ``metadata``, which every shard has, come on top.
    """

    folder: Path
    shard_bytes: int = SHARD_BYTES
    room: int = 1 << 16
    metadata: dict[str, str] = field(default_factory=lambda: {"format": "pt"})
    _shards: list[_Shard] = field(default_factory=list)
    _owner: dict[str, _Shard] = field(default_factory=dict)
    _unfilled: dict[str, set[int]] = field(default_factory=dict)
    _described: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def room_for(names: int, longest: int) -> int:
        """Header bytes for so many tensors, at most 1 MiB: a shard with more is closed early."""
        wanted = _FRAME_BYTES + names * (_ENTRY_BYTES + longest)
        return min(1 << 20, max(_LEAST_ROOM, -(-wanted // 4096) * 4096))

    def describe(self, metadata: dict[str, str]) -> None:
        """More ``__metadata__``, for the shard of the next tensor."""
        self._described |= metadata

    def add(self, name: str, dtype: str, shape: tuple[int, ...], data: Buffer) -> None:
        """One whole tensor, its bytes row-major and little-endian."""
        nbytes = memoryview(data).nbytes
        assert nbytes == _nbytes(dtype, shape), f"{name}: {nbytes} bytes for {dtype} {shape}"
        shard = self._shard_for(name, nbytes)
        if nbytes % _ALIGNMENT:
            shard.waiting.append(_Waiting(name, dtype, shape, bytearray(data)))
        else:
            shard.pwrite(shard.place(name, dtype, shape, nbytes).begin, data)

    def add_slice(
        self, name: str, dtype: str, shape: tuple[int, ...], number: int, count: int, data: Buffer
    ) -> None:
        """Slice ``number`` of ``count`` along the first axis of a stack; ``shape`` is one slice's."""
        nbytes = memoryview(data).nbytes
        assert nbytes == _nbytes(dtype, shape), f"{name}: {nbytes} bytes for {dtype} {shape}"
        if name not in self._owner:
            self._open_stack(name, dtype, (count, *shape))
        shard = self._owner[name]
        if name in shard.places:
            assert shard.places[name].shape == (count, *shape), f"{name}: slices differ"
            shard.pwrite(shard.places[name].begin + number * nbytes, data)
        else:
            waiting = next(one for one in shard.waiting if one.name == name)
            waiting.data[number * nbytes : (number + 1) * nbytes] = memoryview(data).cast("B")
        self._unfilled[name].discard(number)
        if not self._unfilled[name]:
            del self._unfilled[name]
            shard.unfilled -= 1
            if shard is not self._shards[-1] and not shard.unfilled:
                shard.settle()

    def _open_stack(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        nbytes = _nbytes(dtype, shape)
        shard = self._shard_for(name, nbytes)
        if nbytes % _ALIGNMENT:
            shard.waiting.append(_Waiting(name, dtype, shape, bytearray(nbytes)))
        else:
            shard.place(name, dtype, shape, nbytes)
        shard.unfilled += 1
        self._unfilled[name] = set(range(shape[0]))

    def _shard_for(self, name: str, nbytes: int) -> _Shard:
        assert name not in self._owner, f"{name} is written twice"
        needed = _ENTRY_BYTES + len(json.dumps(name))
        needed += len(json.dumps(self._described)) if self._described else 0
        if not self._shards or not self._shards[-1].takes(needed, nbytes, self.shard_bytes):
            if self._shards and not self._shards[-1].unfilled:
                self._shards[-1].settle()
            path = self.folder / f"model-{len(self._shards) + 1:05}.safetensors.tmp"
            self._shards.append(_Shard(path, self.room, self.metadata))
        shard = self._shards[-1]
        shard.header_bytes += needed
        shard.metadata |= self._described
        self._described = {}
        self._owner[name] = shard
        return shard

    def finish(self) -> None:
        """Close and name the files, and write the index where there are several."""
        assert not self._unfilled, f"stacks without all their slices: {sorted(self._unfilled)}"
        weight_map: dict[str, str] = {}
        count = len(self._shards)
        for number, shard in enumerate(self._shards, 1):
            if not shard.complete:
                shard.settle()
            of = "" if count == 1 else f"-{number:05}-of-{count:05}"
            name = f"model{of}.safetensors"
            os.rename(shard.path, shard.path.with_name(name))
            weight_map.update(dict.fromkeys(shard.places, name))
        if count > 1:
            size = sum(shard.end for shard in self._shards)
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
            write_file(self.folder / INDEX, json.dumps(index, indent=2).encode() + b"\n")

    def close(self) -> None:
        """Let go of the files, finished or not."""
        for shard in self._shards:
            shard.file.close()


def write_file(path: Path, data: bytes) -> None:
    """A small file, on the disk before its name is there."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPE_BITS[dtype] // 8
