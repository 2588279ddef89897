"""A small writer of GGUF files, version 3, for tests: by the specification, not by the reader."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lowbit.checkpoint.gguf_types import GGUF_TYPES_BY_NAME

BOOL, STRING, ARRAY = 7, 8, 9  # types of metadata


@dataclass(frozen=True)
class GgufTensor:
    """A tensor to write: ``data`` are its bytes, row-major, in blocks of ``type_name``."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    data: bytes

    def __post_init__(self) -> None:
        kind = GGUF_TYPES_BY_NAME[self.type_name]
        assert self.shape[-1] % kind.weights == 0, f"{self.name}: rows of {self.shape[-1]} in {kind.name}"
        nbytes = math.prod(self.shape) // kind.weights * kind.bytes
        assert len(self.data) == nbytes, f"{self.name}: {len(self.data)} bytes, {kind.name} takes {nbytes}"


def write_gguf(
    path: Path, metadata: dict[str, object], tensors: Iterable[GgufTensor], alignment: int = 32
) -> None:
    """Write a version 3 file. Python ints become u32, i64 or u64, the first that holds them; floats f32."""
    listed = list(tensors)
    if alignment != 32:
        metadata = {**metadata, "general.alignment": alignment}
    out = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(listed), len(metadata)))
    for key, value in metadata.items():
        out += _packed_text(key) + _packed_value(value)
    offset = 0
    for tensor in listed:
        kind = GGUF_TYPES_BY_NAME[tensor.type_name]
        out += _packed_text(tensor.name) + struct.pack("<I", len(tensor.shape))
        out += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
        out += struct.pack("<IQ", kind.id, offset)
        offset += -(-len(tensor.data) // alignment) * alignment
    out += bytes(-len(out) % alignment)
    with open(path, "wb") as file:
        file.write(out)
        for tensor in listed:
            file.write(tensor.data)
            file.write(bytes(-len(tensor.data) % alignment))


def _packed_text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _packed_value(value: object) -> bytes:
    kind, body = _kind_and_body(value)
    return struct.pack("<I", kind) + body


def _kind_and_body(value: object) -> tuple[int, bytes]:
    match value:
        case bool():
            return BOOL, struct.pack("<B", value)
        case int() if 0 <= value < 1 << 32:
            return 4, struct.pack("<I", value)
        case int() if value < 1 << 63:
            return 11, struct.pack("<q", value)
        case int():
            return 10, struct.pack("<Q", value)
        case float():
            return 6, struct.pack("<f", value)
        case str():
            return STRING, _packed_text(value)
        case list():
            return ARRAY, _packed_array(value)
    raise TypeError(f"GGUF metadata cannot hold a {type(value).__name__}")


def _packed_array(values: list[object]) -> bytes:
    whole = [value for value in values if isinstance(value, int) and not isinstance(value, bool)]
    if len(whole) == len(values):
        letter, kind = ("i", 5) if all(-(1 << 31) <= value < 1 << 31 for value in whole) else ("q", 11)
        return struct.pack("<IQ", kind, len(whole)) + struct.pack(f"<{len(whole)}{letter}", *whole)
    parts = [_kind_and_body(value) for value in values]
    kinds = {kind for kind, _ in parts}
    if len(kinds) != 1:
        raise TypeError("a GGUF array holds values of one type")
    return struct.pack("<IQ", kinds.pop(), len(values)) + b"".join(body for _, body in parts)
