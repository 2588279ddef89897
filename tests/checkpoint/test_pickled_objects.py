"""Files of torchao's and HQQ's own objects, read as data, against the tools' own values."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from formats.helpers import FIXTURES, expected, read, reader_of
from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.folder import HQQ_PICKLED, PICKLED
from lowbit.checkpoint.hub import Reference, needed_files
from lowbit.checkpoint.pickle_stream import PickledObject, PickledTensor, Storage
from lowbit.checkpoint.pickled_file import read_pickled_header
from lowbit.checkpoint.pickled_objects import flatten
from lowbit.errors import LowbitError
from lowbit.loading import load_model, plan_model

HQQ, TORCHAO, MX = CASES = [FIXTURES / "pickled" / name for name in ("hqq", "torchao", "torchao_mx")]


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_the_tools_own_values(case: Path) -> None:
    values = expected(case)
    assert len(values) == 2 + (case != MX)
    for name, wanted in values.items():
        found = read(case, name, (wanted.shape[0], wanted.shape[1]), strict=True).weight
        assert not found.scheme.is_dense and torch.equal(found.dequantize(), wanted), name


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_every_tensor_has_a_use(case: Path) -> None:
    header = open_checkpoint(str(case))
    assert header.container == "pickle"
    planned = plan_model(header, strict=True)
    assert sum(not module.scheme.is_dense for module in planned.modules) == len(expected(case))
    logits = prompt_logits(load_model(header, device="cpu"), [[3, 1, 15, 7]])[0]
    assert bool(logits.isfinite().all())


def test_what_the_cases_cover() -> None:
    found = {
        str(read(case, name, (values.shape[0], values.shape[1])).weight.scheme)
        for case in CASES
        for name, values in expected(case).items()
    }
    assert found == {
        "int8 1xall f32 (input int8 1xall dynamic bf16)",
        "e4m3 1xall f32 (input e4m3 1xall dynamic bf16)",
        "int3 1x16 bf16",
        "e2m1 1x16 e4m3 allxall f32",
        "e2m3 1x32 e8m0 (input e2m3 1x32 dynamic e8m0)",
        "uint6 1x16 f16 float-zero",
        "uint4 1x32 f16 float-zero",
        "uint3 1x16 f16 float-zero",
    }


def test_description() -> None:
    hqq, torchao, mx = (reader_of(case).describe() for case in CASES)
    assert hqq == "hqq, 3-bit group 16 and 4-bit group 32 and 6-bit group 16 in qmodel.pt"
    assert torchao.startswith("torchao, Float8Tensor and Int8Tensor and IntxUnpackedToInt8Tensor")
    assert mx.startswith("torchao, MXTensor and NVFP4Tensor (")


def test_shards_of_objects_and_their_index(tmp_path: Path) -> None:
    """The index names the parameter, not the parts it was taken apart into."""
    folder = Path(shutil.copytree(TORCHAO, tmp_path / "torchao"))
    shard = folder / "pytorch_model-00001-of-00001.bin"
    (folder / PICKLED).rename(shard)
    tensors, texts = read_pickled_header(shard)
    names = {name for name in tensors if "._weight" not in name} | set(texts)
    index = {"weight_map": dict.fromkeys(names, shard.name)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert plan_model(open_checkpoint(str(folder)), strict=True).format == "torchao"


def test_the_hub_has_hqqs_file() -> None:
    names = ["config.json", "README.md", HQQ_PICKLED]
    assert needed_files(Reference("a/b"), names) == ["config.json", HQQ_PICKLED]


class Recipe:
    """Of a module that pretends to be torchao's."""

    __module__ = "torchao.evil"

    def __init__(self, values: object) -> None:
        self.values = values

    def __reduce__(self) -> tuple[object, ...]:
        return (Recipe, (self.values,), {"deep": self.values})


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """What pickle looks up when it writes."""
    for name in ("torchao", "torchao.evil"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(Recipe=Recipe))


def test_objects_of_endless_lists_stay_small(imported: None, tmp_path: Path) -> None:
    """Thirty lists of a hundred references to the one before."""
    deep: object = 0
    for _ in range(30):
        deep = [deep] * 100
    path = tmp_path / PICKLED
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", pickle.dumps({"a.weight": Recipe(deep)}, 2))
    tensors, texts = read_pickled_header(path)
    assert not tensors and len(str(texts["a.weight"])) < 100_000


def packed(path: Path, stream: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", stream)
    return path


@pytest.mark.parametrize(
    "values",
    [b"}X\x01\0\0\0k]q\x01h\x01as", b"}X\x01\0\0\0k" + b"]" * 3000 + b"a" * 2999 + b"s"],
    ids=["a list that holds itself", "3000 lists in each other"],
)
def test_objects_of_any_depth_stay_small(values: bytes, tmp_path: Path) -> None:
    start = b"\x80\x02}X\x08\0\0\0a.weightctorchao.x\nY\n)\x81"
    tensors, texts = read_pickled_header(packed(tmp_path / PICKLED, start + values + b"bs."))
    assert not tensors and len(str(texts["a.weight"])) < 200


def test_a_part_never_takes_another_tensors_place() -> None:
    storage = Storage("0", "F32", 4)
    tensor = PickledTensor(storage, "F32", 0, (4,), (1,))
    found = {"a._weight_scale": tensor, "a.weight": PickledObject("Y", (), {"scale": tensor})}
    with pytest.raises(ValueError, match="'a._weight_scale' is there twice"):
        flatten(found)


@pytest.mark.parametrize("name", ["torch.nn.Linear", "os.system", "torchaoevil.Tensor", "builtins.eval"])
def test_only_torchaos_names_are_taken_as_objects(name: str, tmp_path: Path) -> None:
    module, _, leaf = name.rpartition(".")
    path = tmp_path / PICKLED
    with zipfile.ZipFile(path, "w") as archive:
        stream = b"\x80\x02}X\x01\0\0\0ac" + f"{module}\n{leaf}\n".encode() + b")\x81s."
        archive.writestr("m/data.pkl", stream)
    with pytest.raises(LowbitError, match="asks for") as caught:
        read_pickled_header(path)
    assert caught.value.code == "E0231"


def test_getattr_is_for_members_of_torchaos_enums(tmp_path: Path) -> None:
    path = tmp_path / PICKLED
    stream = b"\x80\x02}X\x01\0\0\0ac__builtin__\ngetattr\nctorch\nSize\nX\x01\0\0\0b\x86Rs."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", stream)
    with pytest.raises(LowbitError, match="calls __builtin__.getattr") as caught:
        read_pickled_header(path)
    assert caught.value.code == "E0231"
