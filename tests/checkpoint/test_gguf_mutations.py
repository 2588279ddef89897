"""Damage to every number of a GGUF header: refused in one line, or read as exactly what the bytes now say.

Lengths and counts, truncation, flips and GGUF's own fields, on the header alone; what a damaged model comes
to when it is loaded is in ``test_mutations``. Each test goes over many cases and counts them.
"""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from checkpoint.gguf_mutations import ARRAY, ENTRIES, STRING, TENSORS, TYPES, plain_read, seed_file
from lowbit.checkpoint.gguf_file import FREE_MEMORY, read_gguf_header
from lowbit.errors import LowbitError

SEED = seed_file()
DATA = bytes(SEED.data)
NUMBERS = [0, 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
HEADER_END = min(start for _, _, start, _ in plain_read(DATA)[1].values())


@contextmanager
def little_memory(nbytes: int = 1 << 20) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < nbytes, f"{peak} bytes were allocated"


def outcome(path: Path, data: bytes) -> LowbitError | None:
    """The refusal, or None where the file was read as the plain reader reads it."""
    path.write_bytes(data)
    try:
        header = read_gguf_header(path)
    except LowbitError as error:
        assert error.code.startswith("E02"), error
        assert path.name in error.message and error.message.isprintable() and len(error.message) < 1000
        return error
    metadata, tensors = plain_read(data)
    assert repr(header.metadata) == repr(metadata)  # repr: NaN is NaN
    found = {name: (e.dtype, e.shape, e.start, e.nbytes) for name, e in header.tensors.items()}
    assert found == tensors
    return None


def put(place: int, letter: str, value: int) -> bytes:
    data = bytearray(DATA)
    struct.pack_into(f"<{letter}", data, place, value)
    return bytes(data)


def get(place: int, letter: str) -> int:
    return int(struct.unpack_from(f"<{letter}", DATA, place)[0])


def test_the_seed_itself_reads(tmp_path: Path) -> None:
    assert outcome(tmp_path / "x.gguf", DATA) is None
    assert {kind for _, kind, _, _ in ENTRIES} == set(range(13)), "every value type is there"
    assert len(SEED.counts) > 60


@pytest.mark.parametrize("change", [*NUMBERS, "less", "more", "double", "high bit"])
def test_m01_every_count_and_length(tmp_path: Path, change: int | str) -> None:
    """Each of the 64-bit counts, lengths and sizes."""
    cases = 0
    with little_memory():
        for place, what in SEED.counts:
            before = get(place, "Q")
            ways = {
                "less": before - 1,
                "more": before + 1,
                "double": 2 * before,
                "high bit": before | 1 << 63,
            }
            value = ways[change] if isinstance(change, str) else change
            if value in (before, -1):
                continue
            assert outcome(tmp_path / "x.gguf", put(place, "Q", value)) is not None, (what, before, value)
            cases += 1
    assert cases > 50


@pytest.mark.parametrize("change", [*NUMBERS, "less", "more", "wrap"])
def test_m01_every_offset(tmp_path: Path, change: int | str) -> None:
    for place, what in SEED.offsets:
        before = get(place, "Q")
        ways = {"less": before - 8, "more": before + 8, "wrap": before + (1 << 64) - (1 << 40)}
        value = ways[change] % (1 << 64) if isinstance(change, str) else change
        if value != before:
            assert outcome(tmp_path / "x.gguf", put(place, "Q", value)) is not None, (what, value)


@pytest.mark.parametrize("value", [0, 1, 2, 3, 4, 5, 64, 1 << 31, (1 << 32) - 1])
def test_m01_every_number_of_dimensions(tmp_path: Path, value: int) -> None:
    for place, what in SEED.dims:
        if value != get(place, "I"):
            assert outcome(tmp_path / "x.gguf", put(place, "I", value)) is not None, what


def test_m02_truncation_at_every_border(tmp_path: Path) -> None:
    """At each border of the header and a byte before and after it, and at random places of all."""
    draw = random.Random(2)
    cuts = {border + step for border in SEED.borders for step in (-1, 0, 1)}
    cuts |= {draw.randrange(len(DATA)) for _ in range(200)} | {len(DATA) - 1, len(DATA) - 8}
    cuts = {cut for cut in cuts if 0 <= cut < len(DATA)}
    assert len(cuts) > 400
    with little_memory():
        for cut in sorted(cuts):
            error = outcome(tmp_path / "x.gguf", DATA[:cut])
            assert error is not None and error.code in ("E0203", "E0221"), (cut, error)


@pytest.mark.parametrize("tail", [b"\0", bytes(7), bytes(8), bytes(4096), DATA])
def test_m02_a_longer_file(tmp_path: Path, tail: bytes) -> None:
    assert outcome(tmp_path / "x.gguf", DATA + tail) is not None


@pytest.mark.parametrize("seed", range(10))
def test_m03_flips(tmp_path: Path, seed: int) -> None:
    """1 to 16 flipped bits anywhere in the header: free numbers and texts read as they now are."""
    draw = random.Random(seed)
    refused = 0
    with little_memory():
        for _ in range(100):
            data = bytearray(DATA)
            for _ in range(draw.choice((1, 1, 2, 4, 16))):
                data[draw.randrange(HEADER_END)] ^= 1 << draw.randrange(8)
            refused += outcome(tmp_path / "x.gguf", bytes(data)) is not None
    assert 50 < refused < 100, "both verdicts should occur"


@pytest.mark.parametrize("value", [0, 1, 2, 4, 5, 99, 3 << 24, 2 << 24, 1 << 31, (1 << 32) - 1])
def test_m10_versions(tmp_path: Path, value: int) -> None:
    error = outcome(tmp_path / "x.gguf", put(4, "I", value))
    assert error is None if value == 2 else error is not None and error.code == "E0222"


@pytest.mark.parametrize("value", [0, 1, 2, 3, 4, 7, 9, 12, 13, 16, 24, 32, 64, 1 << 21, 1 << 31])
def test_m10_alignment(tmp_path: Path, value: int) -> None:
    error = outcome(tmp_path / "x.gguf", put(SEED.alignment_at, "I", value))
    assert error is not None and error.code == "E0221"


def test_m10_every_tensor_type(tmp_path: Path) -> None:
    """Ids 0 to 511: E0223 where lowbit does not know it, and nothing but a type of equal size is read."""
    before = [(-(-size // 8), start) for _, _, start, size in plain_read(DATA)[1].values()]
    for place, what in SEED.tensor_types:
        for value in [*range(512), 1 << 31, (1 << 32) - 1]:
            error = outcome(tmp_path / "x.gguf", put(place, "I", value))
            if value not in TYPES:
                assert error is not None and error.code == "E0223" and f"type {value}" in error.message
            elif error is None:
                after = plain_read(put(place, "I", value))[1].values()
                assert [(-(-size // 8), start) for _, _, start, size in after] == before, what


def test_m10_every_value_type(tmp_path: Path) -> None:
    refused = 0
    for place, what in SEED.value_types:
        for value in [*range(20), 255, 256, 1 << 31, (1 << 32) - 1]:
            error = outcome(tmp_path / "x.gguf", put(place, "I", value))
            assert value <= 12 or error is not None, what
            refused += error is not None
    assert refused > 500


# ---- One entry or tensor, made by hand ------------------------------------------------------------------


def packed(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def one_entry(value: bytes, kind: int, key: bytes = b"a") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + packed(key) + struct.pack("<I", kind) + value


def one_tensor(name: bytes = b"a", kind: int = 0, sizes: tuple[int, ...] = (8,), nbytes: int = 32) -> bytes:
    info = packed(name) + struct.pack("<I", len(sizes)) + struct.pack(f"<{len(sizes)}Q", *sizes)
    data = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + info + struct.pack("<IQ", kind, 0)
    return data + bytes(-len(data) % 32) + bytes(nbytes)


def nested(depth: int) -> bytes:
    return struct.pack("<IQ", ARRAY, 1) * (depth - 1) + struct.pack("<IQB", 0, 1, 5)


GOOD: dict[str, bytes] = {
    "name of 64 bytes": one_tensor(b"n" * 64),
    "four dimensions": one_tensor(sizes=(2, 2, 2, 1)),
    "arrays four deep": one_entry(nested(4), ARRAY),
    "empty array": one_entry(struct.pack("<IQ", STRING, 0), ARRAY),
    "empty text": one_entry(packed(b""), STRING),
    "no padding at the end": one_tensor(kind=24, nbytes=8),
}
BAD: dict[str, tuple[bytes, str]] = {
    "name of 65 bytes": (one_tensor(b"n" * 65), "limit 64"),
    "name of 64 characters in 65 bytes": (one_tensor(b"n" * 63 + "ü".encode()), "limit 64"),
    "empty name": (one_tensor(b""), "tensor name is ''"),
    "line break in a name": (one_tensor(b"a\nb"), r"a\nb"),
    "zero byte in a name": (one_tensor(b"a\0b"), r"a\x00b"),
    "escape in a key": (one_entry(b"\1", 7, b"\x1b[31m"), r"\x1b[31m"),
    "empty key": (one_entry(b"\1", 7, b""), "metadata key is ''"),
    "key of 65 537 bytes": (one_entry(b"\1", 7, b"k" * 65_537), "limit 65 536"),
    "key that is not UTF-8": (one_entry(b"\1", 7, b"\xff\xfe"), "not UTF-8"),
    "text that is not UTF-8": (one_entry(packed(b"a\xc3"), STRING), "not UTF-8"),
    "array text that is not UTF-8": (
        one_entry(struct.pack("<IQ", STRING, 1) + packed(b"\x80"), ARRAY), "not UTF-8"),
    "surrogate": (one_entry(packed(b"\xed\xa0\x80"), STRING), "not UTF-8"),
    "arrays five deep": (one_entry(nested(5), ARRAY), "deeper than 4"),
    "arrays 5 000 deep": (one_entry(nested(5_000), ARRAY), "deeper than 4"),
    "bool of 2": (one_entry(b"\2", 7), "bool of value 2"),
    "bool of 2 in an array": (one_entry(struct.pack("<IQ3B", 7, 3, 0, 1, 2), ARRAY), "bool above 1"),
    "five dimensions": (one_tensor(sizes=(2, 2, 2, 1, 1)), "5 dimensions"),
    "no dimension": (one_tensor(sizes=()), "0 dimensions"),
    "empty dimension": (one_tensor(sizes=(8, 0)), "[8, 0]"),
    "three elements where two fit": (
        one_entry(struct.pack("<IQII", 4, 3, 1, 2), ARRAY), "claims 3 elements of 'a'; at most 2 fit"),
    "rows of half a block": (one_tensor(kind=2, sizes=(48,), nbytes=27), "rows of 48, no multiple of 32"),
    "whole blocks over two rows": (one_tensor(kind=2, sizes=(48, 2), nbytes=54), "rows of 48, no multiple"),
    "product of 2^128": (one_tensor(sizes=(1 << 32,) * 4), "header needs"),
    "product that wraps to 8": (one_tensor(sizes=((1 << 61) + 1, 8)), "header needs"),
    "alignment that is text": (one_entry(packed(b"32"), STRING, b"general.alignment"), "no number"),
    "alignment that is a bool": (one_entry(b"\1", 7, b"general.alignment"), "no number"),
    "adapter": (one_entry(packed(b"adapter"), STRING, b"general.type"), "a LoRA adapter, not a model"),
    "mmproj": (one_entry(packed(b"mmproj"), STRING, b"general.type"), "name the file of the model itself"),
    "clip": (one_entry(packed(b"clip"), STRING, b"general.architecture"), "takes in pictures or sound"),
    "vocab": (one_entry(packed(b"vocab"), STRING, b"general.type"), "'vocab'"),
    "removed type": (one_tensor(kind=4, sizes=(32,)), "removed from GGUF in 2023"),
    "activation type": (one_tensor(kind=15, sizes=(256,)), "for activations"),
    "bitnet.cpp's type": (one_tensor(kind=36, sizes=(256,)), "I2_S"),
    "Q2_0": (one_tensor(kind=42, sizes=(128,)), "two layouts"),
    "fork's type": (one_tensor(kind=137, sizes=(256,)), "ik_llama.cpp"),
}  # fmt: skip


@pytest.mark.parametrize("case", GOOD)
def test_at_the_limit(tmp_path: Path, case: str) -> None:
    assert outcome(tmp_path / "x.gguf", GOOD[case]) is None


@pytest.mark.parametrize("case", BAD)
def test_beyond_it(tmp_path: Path, case: str) -> None:
    data, words = BAD[case]
    with little_memory(len(data) + (1 << 20)):
        error = outcome(tmp_path / "x.gguf", data)
    assert error is not None and words in error.message, error


def test_twice_the_same_key(tmp_path: Path) -> None:
    error = outcome(tmp_path / "x.gguf", DATA.replace(b"t.i8", b"t.u8"))
    assert error is not None and "metadata key 't.u8' is there twice" in error.message


def test_twice_the_same_tensor(tmp_path: Path) -> None:
    info = packed(b"a.weight") + struct.pack("<IQI", 1, 8, 0)
    data = b"GGUF" + struct.pack("<IQQ", 3, 2, 0) + info + bytes(8) + info + struct.pack("<Q", 32)
    error = outcome(tmp_path / "x.gguf", data + bytes(-len(data) % 32) + bytes(64))
    assert error is not None and "tensor 'a.weight' is there twice" in error.message


MIB = 1 << 20
SPARSE: dict[str, tuple[bytes, int, str]] = {  # header, size of the file, words
    "array of 64 Mi and one": (
        one_entry(struct.pack("<IQ", 0, 64 * MIB + 1), ARRAY), 80 * MIB, "67 108 865 elements of 'a', limit"),
    "text of 16 MiB and a byte": (
        one_entry(struct.pack("<Q", 16 * MIB + 1), STRING), 20 * MIB, "16 777 217 bytes, limit"),
    "array text of 16 MiB and a byte": (
        one_entry(struct.pack("<IQQ", STRING, 1, 16 * MIB + 1), ARRAY), 20 * MIB, "16 777 217 bytes, limit"),
    "200 001 tensors": (
        b"GGUF" + struct.pack("<IQQ", 3, 200_001, 0), 8 * MIB, "200 001 tensors, limit 200 000"),
    "65 537 entries": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 65_537), 8 * MIB, "65 537 metadata entries, limit 65 536"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPARSE)
def test_numbers_that_would_fit(tmp_path: Path, case: str) -> None:
    """In a large enough file only the limit stops a count or a length."""
    head, size, words = SPARSE[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(head)
    with open(path, "r+b") as file:
        file.truncate(size)
    with little_memory(), pytest.raises(LowbitError) as caught:
        read_gguf_header(path)
    assert caught.value.code == "E0221" and words in caught.value.message


def test_a_text_of_16_mib_is_read(tmp_path: Path) -> None:
    data = one_entry(packed(b"x" * (16 * MIB)), STRING)
    with little_memory(FREE_MEMORY + 2 * len(data)):
        assert outcome(tmp_path / "x.gguf", data) is None


MANY = 3_000_000
GREEDY: dict[str, Callable[[], bytes]] = {
    "numbers": lambda: one_entry(struct.pack("<IQ", 2, MANY) + b"\x39\x30" * MANY, ARRAY),
    "floats": lambda: one_entry(struct.pack("<IQ", 6, MANY) + b"\0\0\x80\x3f" * MANY, ARRAY),
    "short texts": lambda: one_entry(
        struct.pack("<IQ", STRING, MANY // 2) + packed(b"ab") * (MANY // 2), ARRAY
    ),
    "wide characters": lambda: one_entry(
        struct.pack("<IQ", STRING, 3) + packed(b"x" * (12 << 20) + "😀".encode()) * 3, ARRAY
    ),
    "empty arrays": lambda: one_entry(
        struct.pack("<IQ", ARRAY, MANY // 2) + struct.pack("<IQ", 4, 0) * (MANY // 2), ARRAY
    ),
    "tensors": lambda: b"GGUF" + struct.pack("<IQQ", 3, 199_000, 0) + bytes(199_000 * 32),
}


@pytest.mark.parametrize("case", GREEDY)
def test_memory_stays_in_proportion(tmp_path: Path, case: str) -> None:
    """Files whose Python objects would take many times their size: refused before they are made."""
    data = GREEDY[case]()
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    allowed = FREE_MEMORY + 2 * len(data)
    del data
    with little_memory(allowed), pytest.raises(LowbitError) as caught:
        read_gguf_header(path)
    assert caught.value.code == "E0221" and "of memory" in caught.value.message


def test_the_seed_holds_no_slack() -> None:
    """What the mutations rely on: sizes fill their padding, so that one step is always seen."""
    tensors = plain_read(DATA)[1]
    ends = [start + size for _, _, start, size in tensors.values()]
    assert max(ends) == len(DATA) and len(tensors) == len(TENSORS)
