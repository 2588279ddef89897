"""The GGUF reader and writer against the gguf package."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from checkpoint.tiny import METADATA, gguf_tensors, write_gguf_file
from gguf_writing import GgufTensor, write_gguf
from lowbit.checkpoint.gguf_file import read_gguf_header
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError, thousands


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


def split(tmp_path: Path, count: int = 3, **wrong: Any) -> list[Path]:
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
def test_parts_that_do_not_belong_together(tmp_path: Path, wrong: dict[str, Any], code: str) -> None:
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


def test_a_file_of_a_folder_names_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(100))
    with pytest.raises(LowbitError, match=rf"^error.E0220.: model.safetensors: .* in: {tmp_path}$"):
        read_gguf_header(path)


def test_a_truncated_file_says_how_long_it_should_be(tmp_path: Path) -> None:
    path = write_gguf_file(tmp_path / "x.gguf")
    whole = path.stat().st_size
    needed = max(tensor.start + tensor.nbytes for tensor in read_gguf_header(path).tensors.values())
    with open(path, "r+b") as file:
        file.truncate(whole // 2)
    with pytest.raises(LowbitError, match="its header needs") as caught:
        read_gguf_header(path)
    assert f"needs {thousands(needed)}: " in caught.value.message


def test_removed_types_are_refused_by_name(tmp_path: Path) -> None:
    path = write_gguf_file(tmp_path / "x.gguf")
    data = bytearray(path.read_bytes())
    name = b"blk.0.ffn_up.weight"
    struct.pack_into("<I", data, data.index(name) + len(name) + 4 + 16, 31)
    path.write_bytes(data)
    with pytest.raises(LowbitError, match=r"blk\.0\.ffn_up.*type 31.*removed.*supported: F32") as caught:
        read_gguf_header(path)
    assert caught.value.code == "E0223" and caught.value.exit_code == 4


def test_the_embedded_header_is_what_the_package_reads(embedded_path: Path) -> None:
    """Every key and every tensor of a real file."""
    header = read_gguf_header(embedded_path)
    reader = gguf.GGUFReader(embedded_path)
    fields = {key: value for key, value in reader.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata == {key: value.contents() for key, value in fields.items()}
    assert len(header.metadata["tokenizer.ggml.tokens"]) == 49152  # type: ignore[arg-type]
    found = {name: (e.dtype, e.shape, e.start, e.nbytes) for name, e in header.tensors.items()}
    assert found == {
        tensor.name: (
            tensor.tensor_type.name,
            tuple(int(n) for n in reversed(tensor.shape)),
            int(tensor.data_offset),
            int(tensor.n_bytes),
        )
        for tensor in reader.tensors
    }
    assert len(found) == 272


def test_the_embedded_header_reads_fast(embedded_path: Path) -> None:
    """About 35 ms; the bound only says that nobody made it ten times slower."""
    started = time.process_time()
    read_gguf_header(embedded_path)
    assert time.process_time() - started < 0.4


def test_a_file_nobody_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf_file(tmp_path / "x.gguf")

    def refuse(*arguments: object, **more: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(LowbitError, match=r"x\.gguf.*Permission denied") as caught:
        read_gguf_header(path)
    assert caught.value.code == "E0301"


@pytest.mark.parametrize("what", ["fifo", "directory", "device", "missing"])
def test_what_is_no_file(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x.gguf"
    match what:
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
    with pytest.raises(LowbitError, match=r"x\.gguf") as caught:
        read_gguf_header(path)
    assert caught.value.code == ("E0201" if what == "missing" else "E0202")


def test_a_part_without_its_name(tmp_path: Path) -> None:
    parts = split(tmp_path)
    alone = parts[0].rename(tmp_path / "model.gguf")
    with pytest.raises(LowbitError, match=r"model\.gguf is one part of 3") as caught:
        read_gguf_header(alone)
    assert caught.value.code == "E0224"


@pytest.mark.parametrize("name", ["m-00004-of-00003.gguf", "m-00000-of-00003.gguf", "m-00001-of-99999.gguf"])
def test_a_part_that_cannot_be(tmp_path: Path, name: str) -> None:
    split(tmp_path)[0].rename(tmp_path / name)
    with pytest.raises(LowbitError, match="is called part") as caught:
        read_gguf_header(tmp_path / name)
    assert caught.value.code == "E0224"


@pytest.mark.parametrize("name", ["model.gguf", "m-00001-of-00001.gguf"])
def test_a_merged_file(tmp_path: Path, name: str) -> None:
    """Merging leaves split.count 0."""
    write_gguf(tmp_path / name, {**METADATA, "split.no": 0, "split.count": 0}, gguf_tensors())
    assert len(read_gguf_header(tmp_path / name).tensors) == len(gguf_tensors())


def test_a_first_part_of_metadata_alone(tmp_path: Path) -> None:
    tensors = gguf_tensors()
    keys: dict[str, object] = {"split.count": 2, "split.tensors.count": len(tensors)}
    write_gguf(tmp_path / "m-00001-of-00002.gguf", {**METADATA, "split.no": 0, **keys}, [])
    write_gguf(tmp_path / "m-00002-of-00002.gguf", {"split.no": 1, **keys}, tensors)
    header = read_gguf_header(tmp_path / "m-00002-of-00002.gguf")
    assert len(header.tensors) == len(tensors)
    assert header.metadata["general.architecture"] == "llama"


def test_the_count_over_all_parts(tmp_path: Path) -> None:
    parts = split(tmp_path)
    write_gguf(parts[2], {"split.no": 2, "split.count": 3}, gguf_tensors()[2::3][:-1])
    with pytest.raises(LowbitError, match=r"split\.tensors\.count is 12, the parts hold 11") as caught:
        read_gguf_header(parts[0])
    assert caught.value.code == "E0224"


@pytest.mark.parametrize("alignment", [1, 4, 64, 4096])
def test_other_alignments(tmp_path: Path, alignment: int) -> None:
    """Also one that puts tensors at odd addresses."""
    path = tmp_path / "x.gguf"
    raw = np.random.default_rng(3).integers(0, 255, 17 * 3, dtype=np.uint8).tobytes()
    values = np.arange(6, dtype=np.float32)
    tensors = [GgufTensor("a", "MXFP4", (3, 32), raw), GgufTensor("b", "F32", (2, 3), values.tobytes())]
    write_gguf(path, {"general.name": "odd"}, tensors, alignment=alignment)
    ours = read_gguf_header(path)
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with TensorData(ours) as data:
        assert data.raw("a").numpy().tobytes() == raw == np.array(reader["a"].data).tobytes()
        assert data.tensor("b").flatten().tolist() == values.tolist()
        assert ours.tensors["b"].start == int(reader["b"].data_offset)


def test_values_the_writer_knows(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    metadata: dict[str, object] = {
        "a.u32": 4_294_967_295, "a.i64": -5, "a.wide": 1 << 40, "a.u64": (1 << 64) - 1, "a.f32": 0.75,
        "a.bool": False, "a.text": "é", "a.none": [], "a.ints": [1, -(1 << 40)], "a.small": [-1, 3],
        "a.floats": [0.5], "a.texts": ["x", ""], "a.bools": [True, False], "a.nested": [[1, 2], [3, 4]],
    }  # fmt: skip
    write_gguf(path, metadata, [])
    assert read_gguf_header(path).metadata == metadata
    with pytest.raises(TypeError, match="one type"):
        write_gguf(path, {"a": [1, "x"]}, [])
    with pytest.raises(TypeError, match="NoneType"):
        write_gguf(path, {"a": None}, [])
