"""safetensors headers against the library, folders, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from checkpoint.tiny import CONFIG, join_safetensors, split_safetensors, write_folder
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.folder import MAX_ALL_TENSORS, read_folder_header
from lowbit.checkpoint.safetensors_file import DTYPE_BITS, read_safetensors_header
from lowbit.checkpoint.tensor_data import DTYPES, TensorData
from lowbit.errors import LowbitError

TORCH_DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e8m0fnu),
]


def test_every_dtype_and_shape_reads_back(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for index, dtype in enumerate(TORCH_DTYPES):
        raw = torch.randint(0, 2, (index + 1, 3, 8), dtype=torch.uint8, generator=generator)
        tensors[f"t{index}"] = raw.view(dtype)
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    header = read_folder_header(tmp_path)
    assert header.metadata == {"format": "pt"}
    with TensorData(header) as data, safe_open(tmp_path / "model.safetensors", "pt") as theirs:
        assert set(header.tensors) == set(theirs.keys())
        for name in header.tensors:
            ours, expected = data.tensor(name), theirs.get_tensor(name)
            assert ours.dtype == expected.dtype and ours.shape == expected.shape
            assert ours.flatten().view(torch.uint8).equal(expected.flatten().view(torch.uint8))


def test_dtype_tables_agree() -> None:
    for name, dtype in DTYPES.items():
        assert DTYPE_BITS[name] == dtype.itemsize * 8


def test_sharded_equals_single(tmp_path: Path) -> None:
    single = read_folder_header(write_folder(tmp_path / "a"))
    sharded = read_folder_header(write_folder(tmp_path / "b", shards=3))
    assert single.config == sharded.config == CONFIG
    with TensorData(single) as one, TensorData(sharded) as three:
        for name in single.tensors:
            assert one.tensor(name).equal(three.tensor(name))
    assert len({entry.file for entry in sharded.tensors.values()}) == 3


def test_shards_without_an_index(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "b", shards=2)
    (folder / "model.safetensors.index.json").unlink()
    assert len(read_folder_header(folder).tensors) == 12


def test_the_limits_of_a_file_and_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture of hundreds of experts has more tensors in all its shards than one file may have."""
    assert MAX_ALL_TENSORS > 4 * 60 * 384 * 3, "Kimi K2's in NVFP4"
    folder = write_folder(tmp_path / "b", shards=3)
    monkeypatch.setattr("lowbit.checkpoint.safetensors_file.MAX_TENSORS", 5)
    assert len(read_folder_header(folder).tensors) == 12
    monkeypatch.setattr("lowbit.checkpoint.folder.MAX_ALL_TENSORS", 11)
    for told in ("E0227", "E0225"):
        with pytest.raises(LowbitError, match="12 tensors, limit 11") as caught:
            read_folder_header(folder)
        assert caught.value.code == told
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)


def change(folder: Path, key: str, value: object) -> None:
    file = folder / "model.safetensors"
    header, payload = split_safetensors(file.read_bytes())
    header["model.norm.weight"][key] = value
    file.write_bytes(join_safetensors(header, payload))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("dtype", "F17", "has unknown dtype 'F17'"),
        ("shape", [65], r"of F32 \[65\] needs 260 bytes, its offsets say 256"),
        ("shape", [-64], r"has shape \[-64\]"),
        ("data_offsets", [0], "has data_offsets"),
    ],
)
def test_a_bad_entry_is_named(tmp_path: Path, key: str, value: object, words: str) -> None:
    folder = write_folder(tmp_path / "a")
    change(folder, key, value)
    with pytest.raises(
        LowbitError, match=rf"model\.safetensors: tensor 'model\.norm\.weight' {words}"
    ) as caught:
        read_folder_header(folder)
    assert caught.value.code == "E0225"


def test_truncated_file_says_both_sizes(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a")
    file = folder / "model.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(LowbitError) as caught:
        read_folder_header(folder)
    assert caught.value.code == "E0203"
    for number in (size, size - 1000):
        assert f"{number:,}".replace(",", " ") in caught.value.message


def test_missing_shard_counts_its_tensors(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "b", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(LowbitError, match="model-00002-of-00003.* for 4 tensors, first") as caught:
        read_folder_header(folder)
    assert caught.value.code == "E0207"


@pytest.mark.parametrize(
    "names", [["output.safetensors"], ["output-00001-of-00002", "output-00002-of-00002"]]
)
def test_an_index_left_over_from_another_copy(names: list[str], tmp_path: Path) -> None:
    """ExLlama's tools write files of their own names and copy the original's index."""
    folder = write_folder(tmp_path / "b", shards=len(names))
    shards = sorted(folder.glob("*.safetensors"))
    for shard, name in zip(shards, names, strict=True):
        shard.rename(folder / f"{name.removesuffix('.safetensors')}.safetensors")
    index = folder / "model.safetensors.index.json"
    values = {"weight_map": {"model.norm.weight": "model-00001-of-00009.safetensors"}}
    index.write_text(json.dumps(values))
    header = read_folder_header(folder)
    assert header.tensors.keys() == read_folder_header(write_folder(tmp_path / "a")).tensors.keys()


def test_an_index_whose_files_are_still_to_come(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "b", shards=3)
    for name in ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"):
        (folder / name).unlink()
    last = folder / "model-00003-of-00003.safetensors"
    last.rename(folder / "output-00003-of-00003.safetensors")
    with pytest.raises(LowbitError, match="model-00001-of-00003.safetensors is missing") as caught:
        read_folder_header(folder)
    assert caught.value.code == "E0207"


def test_index_that_leads_outside(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "b", shards=2)
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.norm.weight"] = "../../other/model.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(LowbitError, match="outside the model directory") as caught:
        read_folder_header(folder)
    assert caught.value.code == "E0208"


@pytest.mark.parametrize("change_index", ["extra", "moved", "dropped"])
def test_index_and_shards_tell_one_story(tmp_path: Path, change_index: str) -> None:
    folder = write_folder(tmp_path / "b", shards=2)
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    mapping = values["weight_map"]
    shard = mapping["model.norm.weight"]
    (other,) = set(mapping.values()) - {shard}
    if change_index == "extra":
        mapping["ghost.weight"] = shard
        told = f"{index.name} puts tensor 'ghost.weight' in {shard}, but no shard holds it"
    elif change_index == "moved":
        mapping["model.norm.weight"] = other
        told = f"{index.name} puts tensor 'model.norm.weight' in {other}, but {shard} holds it"
    else:
        del mapping["model.norm.weight"]
        told = f"{shard}: tensor 'model.norm.weight' is not in {index.name}"
    index.write_text(json.dumps(values))
    with pytest.raises(LowbitError) as caught:
        read_folder_header(folder)
    assert caught.value.code == "E0226"
    assert caught.value.message.startswith(f"{told}; ") and "delete the index" in caught.value.message


def test_folder_of_other_pickles_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "optimizer.pt").write_bytes(b"PK")
    with pytest.raises(LowbitError, match="pickled") as caught:
        open_checkpoint(str(tmp_path))
    assert caught.value.code == "E0230"


def test_header_longer_than_anything(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((10**9).to_bytes(8, "little") + b"{" + bytes(100))
    with pytest.raises(LowbitError, match="1 000 000 000") as caught:
        read_safetensors_header(path)
    assert caught.value.code == "E0225"
