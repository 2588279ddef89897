"""GGUF files: the header, read (the GGUF specification, versions 2 and 3).

    "GGUF" version u32 | tensor count u64 | metadata count u64 | metadata … | tensor infos … | pad | data

Everything little-endian. Every length is checked against the bytes that are left before anything is
allocated, every tensor against the real file size before one payload byte is touched, and what the header
becomes in memory stays below twice the file and 64 MiB. No torch.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lowbit.checkpoint.file_checks import check_regular_file, refuse_impostors, truncated
from lowbit.checkpoint.gguf_types import GGUF_TYPES, GgufType, refusal
from lowbit.checkpoint.header import CheckpointHeader, TensorEntry
from lowbit.errors import LowbitError, printable, thousands

MAX_STRING = 16 << 20
MAX_ARRAY = 64 << 20
MAX_DIMS = 4
MAX_NAME = 64
MAX_KEY = 1 << 16
MAX_METADATA = 1 << 16
MAX_TENSORS = 200_000
MAX_ARRAY_DEPTH = 4
MAX_PARTS = 10_000
MIN_METADATA_BYTES = 8 + 4 + 1  # an empty key, a type, the smallest value
MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # an empty name, one dimension

# What Python objects take: beside the characters of ASCII strings, which the file's own size bounds.
FREE_MEMORY = 64 << 20
STRING_OBJECT = 64  # header and list slot
NUMBER_OBJECT = 32
LIST_SLOT = 8
TENSOR_OBJECTS = 448

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SPLIT_NAME = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")

_SEES = "the part of a model that takes in pictures or sound (mmproj); name the file of the model itself"
# What files of other types, or in their place of these architectures, are.
_NO_MODELS = {
    "mmproj": _SEES,
    "clip": _SEES,
    "adapter": "a LoRA adapter, not a model; merge it into its model first (llama-export-lora)",
    "imatrix": "an importance matrix for llama-quantize, not a model; name the file of the model itself",
    "controlvector": "a control vector, not a model; name the file of the model itself",
}


def holds_model(name: str) -> bool:
    """Whether a GGUF file of that name may be a model's: the part that sees pictures lies beside it."""
    return not re.search(r"(?:^|[-_.])mmproj(?:[-_.]|$)", Path(name).name, re.I)


class _Reader:
    """A cursor over the mapped file that never reads, or allocates for, what is not there."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path = path
        self.data = data
        self.size = size
        self.at = 0
        self.memory = FREE_MEMORY + size

    def fail(self, code: str, what: str) -> LowbitError:
        return LowbitError(code, f"{self.path.name}: {what}")

    def need(self, count: int) -> int:
        """The place of the next ``count`` bytes, which are now behind the cursor."""
        start = self.at
        if count > self.size - start:
            raise truncated(self.path, self.size, start + count)
        self.at = start + count
        return start

    def charge(self, nbytes: int) -> None:
        """Account for memory before it is taken."""
        self.memory -= nbytes
        if self.memory < 0:
            raise self.fail(
                "E0221",
                f"its header would take more than {thousands(FREE_MEMORY + 2 * self.size)} bytes of memory; "
                "the file is damaged or hostile",
            )

    def number(self, letter: str) -> int:
        (value,) = struct.unpack_from(f"<{letter}", self.data, self.need(struct.calcsize(f"<{letter}")))
        return int(value)

    def count(self, what: str, smallest: int, limit: int) -> int:
        """A 64-bit count of things that take at least ``smallest`` bytes each."""
        count = self.number("Q")
        fits = (self.size - self.at) // smallest
        if count > fits:
            raise self.fail(
                "E0221",
                f"header claims {thousands(count)} {what}; at most {thousands(fits)} fit in the file. "
                "The file is damaged or hostile",
            )
        if count > limit:
            raise self.fail("E0221", f"header claims {thousands(count)} {what}, limit {thousands(limit)}")
        return count

    def text(self, what: str, limit: int) -> str:
        length = self.number("Q")
        if length > limit:
            raise self.too_long(what, length, limit)
        start = self.need(length)
        raw = self.data[start : start + length]
        if not raw.isascii():
            self.charge(3 * length)  # up to four bytes a character
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.fail("E0221", f"{what} at byte {start} is not UTF-8; the file is damaged") from None

    def too_long(self, what: str, length: int, limit: int) -> LowbitError:
        told = f"{what} of {thousands(length)} bytes, limit {thousands(limit)}"
        return self.fail("E0221", f"{told}; the file is damaged")

    def name(self, what: str, limit: int) -> str:
        """A key or a tensor's name: printable, not empty."""
        name = self.text(what, limit)
        if not name or not name.isprintable():
            raise self.fail("E0221", f"{what} is '{printable(name)}'; the file is damaged")
        return name

    def value(self, kind: int, key: str, depth: int = 0) -> object:
        """One metadata value of type ``kind``."""
        if kind == _STRING:
            return self.text(f"the value of {key!r}", MAX_STRING)
        if kind == _ARRAY:
            return self._array(key, depth)
        if kind not in _SCALARS:
            raise self.fail("E0221", f"metadata {key!r} has unknown type {kind}; the file is damaged")
        letter = _SCALARS[kind]
        (value,) = struct.unpack_from(f"<{letter}", self.data, self.need(struct.calcsize(f"<{letter}")))
        if kind == _BOOL:
            if value > 1:
                raise self.fail("E0221", f"metadata {key!r} is a bool of value {value}; the file is damaged")
            return bool(value)
        return value

    def _array(self, key: str, depth: int) -> list[object]:
        if depth >= MAX_ARRAY_DEPTH:
            raise self.fail("E0221", f"metadata {key!r} nests arrays deeper than {MAX_ARRAY_DEPTH}")
        kind = self.number("I")
        if kind == _STRING:
            return self._strings(key)
        if kind == _ARRAY:
            count = self.count(f"arrays in {key!r}", 12, MAX_ARRAY)
            self.charge(count * STRING_OBJECT)
            return [self._array(key, depth + 1) for _ in range(count)]
        if kind not in _SCALARS:
            raise self.fail("E0221", f"array {key!r} has unknown type {kind}; the file is damaged")
        width = struct.calcsize(f"<{_SCALARS[kind]}")
        count = self.count(f"elements of {key!r}", width, MAX_ARRAY)
        start = self.need(count * width)
        self.charge(count * LIST_SLOT)
        # The bytes are copied: a view, alive in a traceback, would keep the map from closing.
        values = np.frombuffer(self.data[start : self.at], np.dtype(_SCALARS[kind]).newbyteorder("<"))
        if kind == _BOOL:
            if count and values.max() > 1:
                raise self.fail("E0221", f"array {key!r} holds a bool above 1; the file is damaged")
            values = values.astype(bool)
        elif values.dtype.kind == "f":
            self.charge(count * NUMBER_OBJECT)
        elif width > 1:  # Python keeps one object for each of -5 to 256
            self.charge(int(np.count_nonzero((values < -5) | (values > 256))) * NUMBER_OBJECT)
        listed: list[object] = values.tolist()
        return listed

    def _strings(self, key: str) -> list[object]:
        """A string array; tokenizers have 100,000 of them, so this loop is tight."""
        count = self.count(f"strings in {key!r}", 8, MAX_ARRAY)
        self.charge(count * STRING_OBJECT)
        data, size, at = self.data, self.size, self.at
        length_of = struct.Struct("<Q").unpack_from
        texts: list[object] = []
        try:
            for _ in range(count):
                (length,) = length_of(data, at)
                start = at + 8
                at = start + length
                if length > MAX_STRING:
                    raise self.too_long(f"a string of {key!r}", length, MAX_STRING)
                if at > size:
                    raise truncated(self.path, size, at)
                raw = data[start:at]
                if not raw.isascii():
                    self.charge(3 * length)
                texts.append(raw.decode())
        except struct.error:
            raise truncated(self.path, size, at + 8) from None
        except UnicodeDecodeError:
            raise self.fail("E0221", f"a string of {key!r} is not UTF-8; the file is damaged") from None
        self.at = at
        return texts


def read_gguf_header(path: Path) -> CheckpointHeader:
    """The header of a GGUF model; any part of a split file stands for all of them."""
    split = _SPLIT_NAME.fullmatch(path.name)
    if split is None:
        header = _read_one(path)
        count = header.metadata.get("split.count", 1)
        if count not in (0, 1):  # merging writes 0
            raise LowbitError(
                "E0224",
                f"{path.name} is one part of {printable(count)} (split.count), but not called "
                "'<name>-00001-of-00002.gguf' or the like; give all parts their names back",
            )
        return header
    stem, number, count = split[1], int(split[2]), int(split[3])
    if not 1 <= number <= count <= MAX_PARTS:
        raise LowbitError(
            "E0224", f"{path.name} is called part {number} of {count}; 1 to {thousands(MAX_PARTS)} can be"
        )
    first = path.with_name(f"{stem}-00001-of-{split[3]}.gguf")
    return _join(first, [path.with_name(f"{stem}-{n:05}-of-{split[3]}.gguf") for n in range(1, count + 1)])


def _join(first: Path, parts: list[Path]) -> CheckpointHeader:
    """One header of all the parts of a split file; metadata is complete in the first."""
    for part in parts:
        if not part.exists():
            raise LowbitError("E0207", f"{part.name} is missing ({len(parts)} parts belong together)")
    metadata: dict[str, object] = {}
    tensors: dict[str, TensorEntry] = {}
    for number, part in enumerate(parts):
        header = _read_one(part)
        metadata = metadata or header.metadata
        told = (header.metadata.get("split.no", 0), header.metadata.get("split.count", 1))
        if told != (number, len(parts)) and not (told == (0, 0) and len(parts) == 1):
            raise LowbitError(
                "E0224",
                f"{part.name}: says split.no {printable(told[0])} and split.count {printable(told[1])}, its "
                f"name says {number} and {len(parts)}; files of different models are mixed",
            )
        for name, entry in header.tensors.items():
            if name in tensors:
                raise LowbitError(
                    "E0224", f"{part.name}: tensor {printable(name)!r} is in {tensors[name].file.name} too"
                )
            tensors[name] = entry
    total = metadata.get("split.tensors.count")
    if total is not None and total != len(tensors):
        raise LowbitError(
            "E0224",
            f"{first.name}: split.tensors.count is {printable(total)}, the parts hold {len(tensors)} tensors",
        )
    return CheckpointHeader(first, "gguf", tensors, metadata=metadata)


def _read_one(path: Path) -> CheckpointHeader:
    size = check_regular_file(path, "GGUF file")
    try:
        with open(path, "rb") as file:
            refuse_impostors(path, file.read(64), size)
            if size < 24:
                raise truncated(path, size, 24)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise LowbitError("E0301", f"{path.name}: cannot be read: {error}") from None
    with mapped as data:
        return _parse(_Reader(path, data, len(data)))


def _parse(reader: _Reader) -> CheckpointHeader:
    start = reader.need(4)
    magic = reader.data[start : start + 4]
    if magic != b"GGUF" and reader.path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        folder = printable(reader.path.absolute().parent)
        raise reader.fail(
            "E0220", f"not a GGUF file; other models are folders, name the one it lies in: {folder}"
        )
    if magic != b"GGUF":
        raise reader.fail("E0220", f"not a GGUF file (it starts with {magic!r}); is the name right?")
    version = reader.number("I")
    if version not in (2, 3):
        if version >> 16:
            raise reader.fail("E0222", "is big-endian; convert it with gguf_convert_endian.py")
        if version < 2:
            raise reader.fail("E0222", f"version {version} is too old (lowbit reads 2-3); convert it again")
        raise reader.fail("E0222", f"version {version} is newer than this lowbit (reads 2-3); update lowbit")
    tensor_count = reader.count("tensors", MIN_TENSOR_BYTES, MAX_TENSORS)
    metadata_count = reader.count("metadata entries", MIN_METADATA_BYTES, MAX_METADATA)
    reader.charge(tensor_count * TENSOR_OBJECTS)
    metadata: dict[str, object] = {}
    for _ in range(metadata_count):
        key = reader.name("a metadata key", MAX_KEY)
        if key in metadata:
            raise reader.fail("E0221", f"metadata key '{printable(key)}' is there twice")
        metadata[key] = reader.value(reader.number("I"), printable(key))
    kind = metadata.get("general.type", "model")
    if metadata.get("general.architecture") in _NO_MODELS:  # from before there were types
        kind = metadata["general.architecture"]
    if kind != "model":
        told = f"general.type is {printable(kind)!r}; lowbit serves files of type 'model'"
        raise reader.fail("E0220", _NO_MODELS.get(str(kind), told))
    infos = [_tensor_info(reader) for _ in range(tensor_count)]
    tensors = _place(reader, infos, _alignment(reader, metadata))
    return CheckpointHeader(reader.path, "gguf", tensors, metadata=metadata)


def _alignment(reader: _Reader, metadata: dict[str, object]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if isinstance(alignment, bool) or not isinstance(alignment, int):
        raise reader.fail("E0221", f"general.alignment is {printable(alignment)}, no number")
    if not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise reader.fail("E0221", f"general.alignment is {alignment}; a power of two up to 2^20 is expected")
    return alignment


@dataclass(frozen=True, slots=True)
class _Info:
    name: str
    type: GgufType
    shape: tuple[int, ...]  # row-major: the file's dimensions reversed
    offset: int
    nbytes: int


def _tensor_info(reader: _Reader) -> _Info:
    name = reader.name("a tensor name", MAX_NAME)
    shown = printable(name)
    dims = reader.number("I")
    if not 1 <= dims <= MAX_DIMS:
        raise reader.fail("E0221", f"tensor '{shown}' has {dims} dimensions; 1 to {MAX_DIMS} are expected")
    sizes = [reader.number("Q") for _ in range(dims)]
    type_id = reader.number("I")
    offset = reader.number("Q")
    kind = GGUF_TYPES.get(type_id)
    if kind is None:
        names = ", ".join(entry.name for entry in GGUF_TYPES.values())
        raise reader.fail(
            "E0223", f"tensor '{shown}' uses type {type_id}, {refusal(type_id)}; supported: {names}"
        )
    if min(sizes) < 1:
        raise reader.fail("E0221", f"tensor '{shown}' has an empty dimension {sizes}; the file is damaged")
    if sizes[0] % kind.weights:
        raise reader.fail(
            "E0221",
            f"tensor '{shown}' is {kind.name} with rows of {sizes[0]}, no multiple of {kind.weights}; "
            "the file is damaged",
        )
    nbytes = math.prod(sizes) // kind.weights * kind.bytes  # Python integers do not overflow
    if nbytes > reader.size:
        raise truncated(reader.path, reader.size, reader.at + nbytes)
    return _Info(name, kind, tuple(reversed(sizes)), offset, nbytes)


def _place(reader: _Reader, infos: list[_Info], alignment: int) -> dict[str, TensorEntry]:
    """Absolute places of the tensors.

    They follow one another in the order of their infos, each padded to ``alignment``: ggml reads nothing
    else, and so overlaps, holes and tails cannot be.
    """

    def aligned(place: int) -> int:
        return -(-place // alignment) * alignment

    base = end = aligned(reader.at)
    needed = reader.at
    tensors: dict[str, TensorEntry] = {}
    for info in infos:
        shown, offset = printable(info.name), end - base
        if info.name in tensors:
            raise reader.fail("E0221", f"tensor '{shown}' is there twice")
        if info.offset != offset:
            raise reader.fail(
                "E0221",
                f"tensor '{shown}' lies at {thousands(info.offset)} of the data, {thousands(offset)} was "
                f"expected from the sizes before it and alignment {alignment}; the file is damaged",
            )
        needed = end + info.nbytes
        tensors[info.name] = TensorEntry(info.name, reader.path, info.type.name, info.shape, end, info.nbytes)
        end = aligned(needed)
    if needed > reader.size:
        raise truncated(reader.path, reader.size, needed)
    if reader.size > end:
        raise reader.fail(
            "E0221", f"has {thousands(reader.size)} bytes, its tensors end at {thousands(end)}; it is damaged"
        )
    return tensors
