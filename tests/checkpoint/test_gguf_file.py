"""The GGUF reader and writer against the gguf package."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from checkpoint.tiny import METADATA, gguf_tensors, write_gguf_file
from lowbit.checkpoint.gguf_file import read_gguf_header, write_gguf
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError


def written_by_gguf(path: Path) -> dict[str, object]:
    """A file with every value type, by the package's writer; the values that went in."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("t.u8", 200)
    writer.add_int8("t.i8", -3)
    writer.add_uint16("t.u16", 60000)
    writer.add_int16("t.i16", -30000)
    writer.add_uint32("t.u32", 4_000_000_000)
    writer.add_int32("t.i32", -2_000_000_000)
    writer.add_float32("t.f32", 0.5)
    writer.add_bool("t.bool", True)
    writer.add_string("t.text", "Größe 猫")
    writer.add_array("t.ints", [1, -2, 3])
    writer.add_array("t.floats", [0.25, -1.5])
    writer.add_array("t.texts", ["a", "", "ü"])
    writer.add_array("t.bools", [True, False])
    writer.add_uint64("t.u64", 1 << 60)
    writer.add_int64("t.i64", -(1 << 60))
    writer.add_float64("t.f64", 1e-300)
    rng = np.random.default_rng(0)
    writer.add_tensor("a.weight", rng.normal(size=(3, 5)).astype(np.float32))
    writer.add_tensor("b.weight", rng.normal(size=(7,)).astype(np.float16))
    blocks = rng.integers(0, 255, (4, 2 * 18), dtype=np.uint8)
    writer.add_tensor("c.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {
        "t.u8": 200, "t.i8": -3, "t.u16": 60000, "t.i16": -30000, "t.u32": 4_000_000_000,
        "t.i32": -2_000_000_000, "t.f32": 0.5, "t.bool": True, "t.text": "Größe 猫", "t.ints": [1, -2, 3],
        "t.floats": [0.25, -1.5], "t.texts": ["a", "", "ü"], "t.bools": [True, False], "t.u64": 1 << 60,
        "t.i64": -(1 << 60), "t.f64": 1e-300, "general.architecture": "llama",
    }  # fmt: skip


def test_metadata_and_tensors_as_the_package_wrote_them(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    expected = written_by_gguf(path)
    header = read_gguf_header(path)
    assert {key: header.metadata[key] for key in expected} == expected
    assert header.metadata["t.bool"] is True
    assert header.container == "gguf"
    reader = gguf.GGUFReader(path)
    with TensorData(header) as data:
        for tensor in reader.tensors:
            entry = header.tensors[tensor.name]
            assert entry.shape == tuple(int(n) for n in reversed(tensor.shape))
            assert entry.dtype == tensor.tensor_type.name
            assert data.raw(tensor.name).numpy().tobytes() == np.array(tensor.data).tobytes()
        assert data.tensor("c.weight").shape == (4, 36)
        assert data.tensor("b.weight").dtype.itemsize == 2


def test_what_we_write_the_package_reads(tmp_path: Path) -> None:
    path = write_gguf_file(tmp_path / "y.gguf")
    reader = gguf.GGUFReader(path)
    ours = {tensor.name: tensor for tensor in gguf_tensors()}
    assert {tensor.name for tensor in reader.tensors} == set(ours)
    for tensor in reader.tensors:
        assert np.array(tensor.data).tobytes() == ours[tensor.name].data
        assert tuple(int(n) for n in reversed(tensor.shape)) == ours[tensor.name].shape
    for key, value in METADATA.items():
        read = reader.fields[key].contents()
        assert read == pytest.approx(value) if isinstance(value, float) else read == value


def test_version_2_reads_the_same(tmp_path: Path) -> None:
    path = write_gguf_file(tmp_path / "z.gguf")
    before = read_gguf_header(path)
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, 4, 2)
    path.write_bytes(data)
    assert read_gguf_header(path) == before


def split(tmp_path: Path, count: int = 3, **wrong: object) -> list[Path]:
    """The tiny model in ``count`` parts; ``wrong`` overrides the last part's split keys."""
    paths = []
    tensors = gguf_tensors()
    for number in range(count):
        path = tmp_path / f"m-{number + 1:05}-of-{count:05}.gguf"
        keys: dict[str, object] = {"split.no": number, "split.count": count}
        metadata = {**METADATA, **keys, "split.tensors.count": len(tensors)} if number == 0 else keys
        if number == count - 1:
            metadata = {**metadata, **{key.replace("__", "."): value for key, value in wrong.items()}}
        write_gguf(path, metadata, tensors[number::count])
        paths.append(path)
    return paths


def test_split_files_are_one_model(tmp_path: Path) -> None:
    parts = split(tmp_path)
    headers = [read_gguf_header(part) for part in parts]
    assert headers[0] == headers[1] == headers[2]
    assert headers[0].root == parts[0]
    assert set(headers[0].tensors) == {tensor.name for tensor in gguf_tensors()}
    assert len({entry.file for entry in headers[0].tensors.values()}) == 3


@pytest.mark.parametrize(
    ("wrong", "code"),
    [({"split__no": 0}, "E0224"), ({"split__count": 4}, "E0224")],
)
def test_parts_that_do_not_belong_together(tmp_path: Path, wrong: dict[str, object], code: str) -> None:
    parts = split(tmp_path, **wrong)
    with pytest.raises(LowbitError) as caught:
        read_gguf_header(parts[1])
    assert caught.value.code == code


def test_missing_part_is_named(tmp_path: Path) -> None:
    parts = split(tmp_path)
    parts[1].unlink()
    with pytest.raises(LowbitError, match="m-00002-of-00003") as caught:
        read_gguf_header(parts[0])
    assert caught.value.code == "E0207"


def test_a_tensor_in_two_parts(tmp_path: Path) -> None:
    parts = split(tmp_path)
    write_gguf(parts[2], {"split.no": 2, "split.count": 3}, gguf_tensors()[0::3])
    with pytest.raises(LowbitError, match=r"is in m-00001") as caught:
        read_gguf_header(parts[0])
    assert caught.value.code == "E0224"


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (b"", "E0203", "empty"),
        (b"GGUF\3\0", "E0203", "incomplete"),
        (b"version https://git-lfs.github.com/spec/v1\n", "E0204", "git lfs pull"),
        (b"<!DOCTYPE html><html>Access restricted", "E0205", "HTML"),
        (b"PK\3\4" + bytes(100), "E0205", "archive"),
        (b"GGML" + bytes(100), "E0220", "not a GGUF file"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(100), "E0222", "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 1 << 63) + bytes(100), "E0221", "9 223 372 036 854 775 808"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0) + bytes(100), "E0222", "newer"),
    ],
)
def test_what_is_no_model(tmp_path: Path, content: bytes, code: str, words: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(LowbitError) as caught:
        read_gguf_header(path)
    assert caught.value.code == code and words in caught.value.message and "x.gguf" in caught.value.message


def test_removed_types_are_refused_by_name(tmp_path: Path) -> None:
    path = write_gguf_file(tmp_path / "x.gguf")
    data = bytearray(path.read_bytes())
    name = b"blk.0.ffn_up.weight"
    struct.pack_into("<I", data, data.index(name) + len(name) + 4 + 16, 31)
    path.write_bytes(data)
    with pytest.raises(LowbitError, match=r"blk\.0\.ffn_up.*type 31.*removed.*supported: F32") as caught:
        read_gguf_header(path)
    assert caught.value.code == "E0223" and caught.value.exit_code == 4


def test_the_embedded_header_reads_fast(embedded_path: Path) -> None:
    header = read_gguf_header(embedded_path)
    assert len(header.tensors) == 272
    assert len(header.metadata["tokenizer.ggml.tokens"]) == 49152  # type: ignore[arg-type]
