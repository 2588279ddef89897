"""A hand-packed GGUF file that knows the place of each of its numbers, and a plain reader to compare with.

Nothing here imports lowbit. ``seed_file`` holds every metadata type and tensors of four kinds, chosen so that
no size can change by one step without moving a tensor behind it or the end of the file; ``plain_read`` takes
a file for what its bytes say, one ``struct`` at a time, and raises ValueError where they say nothing.
"""

from __future__ import annotations

import math
import random
import struct
from dataclasses import dataclass, field

ALIGNMENT = 8
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# id: (name, weights in a block, bytes of a block): what the seed uses, and what its ids may flip to
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1),
    25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip


@dataclass
class Seed:
    """The file, and where each number stands: (place, what it is)."""

    data: bytearray = field(default_factory=bytearray)
    counts: list[tuple[int, str]] = field(default_factory=list)  # 64-bit lengths, counts, sizes
    offsets: list[tuple[int, str]] = field(default_factory=list)  # 64-bit
    dims: list[tuple[int, str]] = field(default_factory=list)  # 32-bit
    value_types: list[tuple[int, str]] = field(default_factory=list)  # 32-bit
    tensor_types: list[tuple[int, str]] = field(default_factory=list)  # 32-bit
    borders: set[int] = field(default_factory=set)  # where a part of the header ends
    alignment_at: int = 0

    def number(self, letter: str, value: float) -> int:
        """Append a number; its place."""
        place = len(self.data)
        self.data += struct.pack(f"<{letter}", value)
        self.borders.add(len(self.data))
        return place

    def text(self, text: str, what: str) -> None:
        raw = text.encode()
        self.counts.append((self.number("Q", len(raw)), f"length of {what}"))
        self.data += raw
        self.borders.add(len(self.data))

    def value(self, kind: int, value: object, what: str) -> None:
        """``kind`` is a scalar's id, or STRING, or a list: the ids of nested arrays, the elements' last."""
        if kind == STRING:
            self.text(str(value), what)
        else:
            self.number(SCALARS[kind], value)  # type: ignore[arg-type]

    def array(self, kinds: list[int], values: list[object], what: str) -> None:
        self.value_types.append((self.number("I", kinds[0]), f"elements of {what}"))
        self.counts.append((self.number("Q", len(values)), f"count of {what}"))
        for value in values:
            if kinds[0] == ARRAY:
                assert isinstance(value, list)
                self.array(kinds[1:], value, what)
            else:
                self.value(kinds[0], value, what)

    def entry(self, key: str, kind: int, value: object, inner: list[int] | None = None) -> None:
        self.text(key, f"key {key}")
        self.value_types.append((self.number("I", kind), f"type of {key}"))
        if key == "general.alignment":
            self.alignment_at = len(self.data)
        if inner is None:
            self.value(kind, value, key)
        else:
            assert isinstance(value, list)
            self.array(inner, value, key)


ENTRIES: list[tuple[str, int, object, list[int] | None]] = [
    ("general.architecture", STRING, "llama", None),
    ("general.alignment", 4, ALIGNMENT, None),
    ("t.u8", 0, 200, None),
    ("t.i8", 1, -3, None),
    ("t.u16", 2, 60_000, None),
    ("t.i16", 3, -30_000, None),
    ("t.u32", 4, 4_000_000_000, None),
    ("t.i32", 5, -2_000_000_000, None),
    ("t.f32", 6, 0.5, None),
    ("t.bool", 7, True, None),
    ("t.text", STRING, "Größe 猫", None),
    ("t.u64", 10, 1 << 60, None),
    ("t.i64", 11, -(1 << 60), None),
    ("t.f64", 12, 1e-300, None),
    ("t.texts", ARRAY, ["a", "", "über", "<s>"], [STRING]),
    ("t.bytes", ARRAY, list(range(7)), [0]),
    ("t.bools", ARRAY, [True, False, True], [7]),
    ("t.words", ARRAY, [1, -2, 3_000, 70_000], [5]),
    ("t.floats", ARRAY, [0.25, -1.5], [6]),
    ("t.wide", ARRAY, [1 << 50, 2], [10]),
    ("t.nested", ARRAY, [[1, 2], [], [300]], [ARRAY, 4]),
    ("t.nested_texts", ARRAY, [["x", "y"], ["z"]], [ARRAY, STRING]),
    ("t.last", STRING, "end", None),
]
TENSORS: list[tuple[str, int, tuple[int, ...]]] = [  # name, type, dimensions as the file has them
    ("token_embd.weight", 8, (64, 5)),
    ("blk.0.attn_norm.weight", 28, (5,)),
    ("blk.0.attn_q.weight", 2, (64, 3)),
    ("blk.0.ffn_up_exps.weight", 0, (2, 5, 3)),
    ("output_norm.weight", 28, (16,)),
]


def seed_file() -> Seed:
    """The file of ``ENTRIES`` and ``TENSORS``, ending where its last tensor's padding ends."""
    seed = Seed(bytearray(b"GGUF"))
    seed.borders |= {0, 4}
    seed.number("I", 3)
    seed.counts.append((seed.number("Q", len(TENSORS)), "tensors"))
    seed.counts.append((seed.number("Q", len(ENTRIES)), "metadata entries"))
    for key, kind, value, inner in ENTRIES:
        seed.entry(key, kind, value, inner)
    offset, payload, draw = 0, bytearray(), random.Random(0)
    for name, kind, sizes in TENSORS:
        seed.text(name, f"name {name}")
        seed.dims.append((seed.number("I", len(sizes)), f"dimensions of {name}"))
        for axis, size in enumerate(sizes):
            seed.counts.append((seed.number("Q", size), f"size {axis} of {name}"))
        seed.tensor_types.append((seed.number("I", kind), f"type of {name}"))
        seed.offsets.append((seed.number("Q", offset), f"offset of {name}"))
        _, weights, width = TYPES[kind]
        raw = draw.randbytes(math.prod(sizes) // weights * width)
        payload += raw + bytes(-len(raw) % ALIGNMENT)
        offset = len(payload)
    seed.data += bytes(-len(seed.data) % ALIGNMENT) + payload
    return seed


class _Plain:
    """The plain reader's cursor."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, letter: str) -> float | int | bool:
        try:
            (value,) = struct.unpack_from(f"<{letter}", self.data, self.at)
        except struct.error:
            raise ValueError("the file ends") from None
        self.at += struct.calcsize(f"<{letter}")
        return value

    def text(self) -> str:
        length = int(self.number("Q"))
        if length > len(self.data) - self.at:
            raise ValueError("the file ends")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def value(self, kind: int) -> object:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            inner, count = int(self.number("I")), int(self.number("Q"))
            if count > len(self.data):
                raise ValueError("the file ends")
            return [self.value(inner) for _ in range(count)]
        if kind not in SCALARS:
            raise ValueError("no such type")
        return self.number(SCALARS[kind])


def plain_read(data: bytes) -> tuple[dict[str, object], dict[str, tuple[str, tuple[int, ...], int, int]]]:
    """(metadata, {name: (type, row-major shape, start, bytes)}) as the bytes have them."""
    plain = _Plain(data)
    tensor_count, entry_count = struct.unpack_from("<QQ", data, 8)
    plain.at = 24
    metadata = {}
    for _ in range(entry_count):
        key = plain.text()
        metadata[key] = plain.value(int(plain.number("I")))
    infos = []
    for _ in range(tensor_count):
        name = plain.text()
        sizes = [int(plain.number("Q")) for _ in range(int(plain.number("I")))]
        infos.append((name, sizes, TYPES[int(plain.number("I"))], int(plain.number("Q"))))
    alignment = metadata.get("general.alignment", 32)
    assert isinstance(alignment, int)
    base = -(-plain.at // alignment) * alignment
    return metadata, {
        name: (kind, tuple(reversed(sizes)), base + offset, math.prod(sizes) // weights * width)
        for name, sizes, (kind, weights, width), offset in infos
    }
