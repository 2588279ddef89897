"""safetensors files: headers only.

    header length u64 | JSON {"name": {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__"} | data

Offsets are relative to the data; tensors must cover it without hole or overlap, as the specification says.
Everything is checked against the size of the very file that was opened. No torch.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from lowbit.checkpoint.documents import parse_json
from lowbit.checkpoint.file_checks import check_regular_file, refuse_impostors, truncated
from lowbit.checkpoint.header import TensorEntry
from lowbit.errors import LowbitError, printable, thousands

MAX_HEADER = 100_000_000
MAX_TENSORS = 200_000
MAX_NAME = 1024
MAX_DIMS = 8
INDEX = "model.safetensors.index.json"

# Bits of one element. F4 and the 6-bit floats are packed, their shapes count elements.
DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


def read_safetensors_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """(tensors, metadata) of one file."""
    check_regular_file(path, "safetensors file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(64)
        refuse_impostors(path, start, size)
        if size < 10:
            raise truncated(path, size, 10)
        (length,) = struct.unpack("<Q", start[:8])
        if length > MAX_HEADER or length < 2:
            raise LowbitError(
                "E0225",
                f"{path.name}: header of {thousands(length)} bytes (2 to {thousands(MAX_HEADER)} are "
                "possible); no safetensors file, or a damaged one",
            )
        if 8 + length > size:
            raise truncated(path, size, 8 + length)
        file.seek(8)
        text = file.read(length)
    if not text.startswith(b"{"):
        raise LowbitError("E0225", f"{path.name}: its header is no JSON object; the file is damaged")
    parsed = parse_json(text, path.name)
    if not isinstance(parsed, dict):
        raise LowbitError("E0225", f"{path.name}: its header is no JSON object; the file is damaged")
    metadata = _metadata(path, parsed.pop("__metadata__", {}))
    if len(parsed) > MAX_TENSORS:
        raise LowbitError("E0225", f"{path.name}: {len(parsed)} tensors, limit {MAX_TENSORS}")
    entries = [_entry(path, name, value, 8 + length) for name, value in parsed.items()]
    _check_cover(path, entries, 8 + length, size)
    return {entry.name: entry for entry in entries}, metadata


def _metadata(path: Path, value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise LowbitError("E0225", f"{path.name}: __metadata__ must map strings to strings")
    return value


def _whole(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62  # True is one, too


def _entry(path: Path, name: str, value: object, base: int) -> TensorEntry:
    def damaged(what: str) -> LowbitError:
        return LowbitError("E0225", f"{path.name}: tensor {printable(name)!r} {what}; the file is damaged")

    if not name or len(name.encode()) > MAX_NAME or (not name.isprintable() and min(name) < " "):
        raise damaged("has no usable name")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise damaged("needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise damaged(f"has unknown dtype {printable(dtype)!r}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(_whole, shape)):
        raise damaged(f"has shape {printable(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_whole, offsets)):
        raise damaged(f"has data_offsets {printable(offsets)}")
    begin, end = offsets
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
    if bits % 8 or end - begin != bits // 8:
        raise damaged(f"of {dtype} {shape} needs {bits / 8:g} bytes, its offsets say {end - begin}")
    return TensorEntry(name, path, dtype, tuple(shape), base + begin, end - begin)


def _check_cover(path: Path, entries: list[TensorEntry], base: int, size: int) -> None:
    """No overlap, no hole, nothing behind the last tensor."""
    end = base
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.nbytes)):
        if entry.start != end:
            what = "overlaps the one before it" if entry.start < end else "leaves a hole before it"
            raise LowbitError(
                "E0225",
                f"{path.name}: tensor {printable(entry.name)!r} at byte {entry.start} {what} "
                f"({end} expected); the file is damaged",
            )
        end = entry.start + entry.nbytes
    if end > size:
        raise truncated(path, size, end)
    if end < size:
        raise LowbitError(
            "E0225",
            f"{path.name} is {thousands(size)} bytes, but its last tensor ends at {thousands(end)}; "
            "the file is damaged",
        )
