"""Safetensors shards written as they come: no more of a model in memory than the tensor in hand.

    header length u64 | JSON header, blanks after it | tensors, one behind another

The format puts the header first and allows no holes, but what lies in a shard is only known at its end: room
is left in front, filled up with blanks as the format allows. A tensor must lie at a multiple of its
element's size, or others cannot view it: those of an odd number of bytes wait in memory for the shard's end,
wide elements first. A stack of experts gets its place once and is filled slice by slice. Shards that an
earlier run finished are taken over: a tensor that lies in one is not written again, and all else goes where
it would have gone. No torch.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lowbit.checkpoint.safetensors_file import DTYPE_BITS, INDEX, read_safetensors_header

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


class _Finished:
    """A shard of an earlier run."""

    complete = True
    unfilled = 0

    def __init__(self, path: Path) -> None:
        self.path = path
        found, _ = read_safetensors_header(path)
        begin = min((entry.start for entry in found.values()), default=0)
        self.places = {
            name: _Place(entry.dtype, entry.shape, entry.start - begin, entry.nbytes)
            for name, entry in found.items()
        }
        self.end = sum(entry.nbytes for entry in found.values())

    def close(self) -> None:
        """Nothing is open."""


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

    def close(self) -> None:
        self.file.close()

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
    ``metadata``, which every shard has, come on top. ``on_finished`` is told of each shard (its number from 0
    and its file) once it and all before it are on the disk.
    """

    folder: Path
    shard_bytes: int = SHARD_BYTES
    room: int = 1 << 16
    metadata: dict[str, str] = field(default_factory=lambda: {"format": "pt"})
    on_finished: Callable[[int, Path], None] | None = None
    _shards: list[_Shard | _Finished] = field(default_factory=list)
    _owner: dict[str, int] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)
    _told: int = 0
    _unfilled: dict[str, set[int]] = field(default_factory=dict)
    _described: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def room_for(names: int, longest: int) -> int:
        """Header bytes for so many tensors, at most 1 MiB: a shard with more is closed early."""
        wanted = _FRAME_BYTES + names * (_ENTRY_BYTES + longest)
        return min(1 << 20, max(_LEAST_ROOM, -(-wanted // 4096) * 4096))

    def take_over(self, names: Iterable[str]) -> None:
        """Shards in the folder that an earlier run finished, the first ones of all."""
        for number, name in enumerate(names):
            shard = _Finished(self.folder / name)
            self._shards.append(shard)
            self._owner.update(dict.fromkeys(shard.places, number))
        self._taken = set(self._owner)
        self._told = len(self._shards)

    def shard_of(self, name: str) -> int:
        """The number of the shard, from 0, that a tensor went into."""
        return self._owner[name]

    def describe(self, metadata: dict[str, str]) -> None:
        """More ``__metadata__``, for the shard of the next tensor."""
        self._described |= metadata

    def add(self, name: str, dtype: str, shape: tuple[int, ...], data: Buffer) -> None:
        """One whole tensor, its bytes row-major and little-endian."""
        nbytes = memoryview(data).nbytes
        assert nbytes == _nbytes(dtype, shape), f"{name}: {nbytes} bytes for {dtype} {shape}"
        if self._is_taken(name):
            return
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
        if self._is_taken(name):
            return
        if name not in self._owner:
            self._open_stack(name, dtype, (count, *shape))
        shard = self._shards[self._owner[name]]
        assert isinstance(shard, _Shard), "finished shards have no open stacks"
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
                self._settle(shard)

    def _is_taken(self, name: str) -> bool:
        """Whether an earlier run wrote it; what was described with it is there too."""
        if name in self._taken:
            self._described = {}
        return name in self._taken

    def _settle(self, shard: _Shard) -> None:
        shard.settle()
        while self._told < len(self._shards) and self._shards[self._told].complete:
            if self.on_finished is not None:
                self.on_finished(self._told, self._shards[self._told].path)
            self._told += 1

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
        shard = self._shards[-1] if self._shards else None
        if not isinstance(shard, _Shard) or not shard.takes(needed, nbytes, self.shard_bytes):
            if isinstance(shard, _Shard) and not shard.unfilled:
                self._settle(shard)
            path = self.folder / f"model-{len(self._shards) + 1:05}.safetensors.tmp"
            shard = _Shard(path, self.room, self.metadata)
            self._shards.append(shard)
        shard.header_bytes += needed
        shard.metadata |= self._described
        self._described = {}
        self._owner[name] = len(self._shards) - 1
        return shard

    def finish(self) -> None:
        """Close and name the files, and write the index where there are several."""
        assert not self._unfilled, f"stacks without all their slices: {sorted(self._unfilled)}"
        weight_map: dict[str, str] = {}
        count = len(self._shards)
        for shard in self._shards:
            if isinstance(shard, _Shard) and not shard.complete:
                self._settle(shard)
        for number, shard in enumerate(self._shards, 1):
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
            shard.close()


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
