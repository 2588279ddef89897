"""bitsandbytes: the tool's own files and values, rows that are no whole blocks, damaged files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from formats.helpers import expected, fixture_cases, header_of, read, reader_of, write_folder
from lowbit.errors import LowbitError
from lowbit.formats import StoredModule

CASES = fixture_cases("bitsandbytes")
NAME = "model.layers.0.self_attn.q_proj"
WEIGHT = f"{NAME}.weight"


def case(name: str) -> Path:
    return next(path for path in CASES if path.name == name)


@pytest.mark.parametrize("folder", CASES, ids=lambda path: path.name)
def test_the_tools_own_values(folder: Path) -> None:
    """Bit-equal in float32; int8 to its last bit, as the tool multiplies code and row first."""
    for name, values in expected(folder).items():
        found = read(folder, name, tuple(values.shape)).weight
        tolerance = 2.0**-23 if folder.name == "int8" else 0.0
        assert ((found.dequantize() - values).abs() <= tolerance * values.abs()).all(), name
        assert found.scheme == reader_of(folder).scheme_of(StoredModule(name, name, tuple(values.shape)))


def test_what_the_cases_cover() -> None:
    schemes = {path.name: str(read(path, NAME, shape_of(path)).weight.scheme) for path in CASES}
    assert schemes["nf4"] == schemes["nf4_double"] == schemes["nf4_storage_bf16"] == "nf4 1x64 f32"
    assert schemes["fp4"] == "fp4_bnb 1x64 f32" and schemes["fp4_double_odd"] == "fp4_bnb 1x64 f32 flat"
    assert schemes["int8"] == "int8 1xall f32 (input int8 1xall dynamic outliers 5)"


def shape_of(folder: Path) -> tuple[int, int]:
    rows, columns = expected(folder)[NAME].shape
    return rows, columns


def test_every_tensor_has_a_use() -> None:
    for folder in CASES:
        header, reader = header_of(folder), reader_of(folder)
        used = set(reader.tensors_of(StoredModule(NAME, NAME, shape_of(folder))))
        mine = {name for name in header.tensors if name.startswith(NAME)}
        assert mine - used <= {f"{NAME}.weight_format"}


def changed(
    folder: Path, name: str, change: Callable[[dict[str, Tensor]], None], config: dict | None = None
) -> Path:
    """A copy of a case with its tensors, and perhaps its config, changed."""
    tensors = load_file(case(name) / "model.safetensors")
    change(tensors)
    folder.mkdir(exist_ok=True)
    written = json.loads((case(name) / "config.json").read_text())
    written["quantization_config"] |= config or {}
    (folder / "config.json").write_text(json.dumps(written))
    save_file(tensors, folder / "model.safetensors")
    return folder


def put(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, value)


def drop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def state(**change: object) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        name = next(key for key in tensors if key.startswith(f"{WEIGHT}.quant_state"))
        said = {**json.loads(bytes(tensors[name].tolist())), **change}
        tensors[name] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

    return edit


NAN = float("nan")
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("name", "change", "code", "said"),
    [
        ("nf4", put(WEIGHT, torch.zeros(2047, 1, dtype=torch.uint8)), "E0213", "2047 bytes"),
        ("nf4", put(WEIGHT, torch.zeros(2048, 1, dtype=torch.int64)), "E0213", "I64"),
        ("nf4", put(f"{WEIGHT}.absmax", torch.ones(63)), "E0213", "absmax"),
        ("nf4", put(f"{WEIGHT}.absmax", torch.full((64,), NAN)), "E0215", "absmax"),
        ("nf4", drop(f"{WEIGHT}.absmax"), "E0209", "absmax"),
        ("nf4", put(f"{WEIGHT}.quant_map", torch.linspace(-1, 1, 16)), "E0218", "code 1"),
        ("nf4", put(f"{WEIGHT}.quant_map", torch.ones(15)), "E0213", "quant_map"),
        ("nf4", drop(f"{WEIGHT}.quant_map"), "E0209", "quant_map"),
        ("nf4", state(shape=[32, 128]), "E0210", "32, 128"),
        ("nf4", state(blocksize=128), "E0213", "blocksize 128"),
        ("nf4", put(STATE, torch.tensor([1, 2], dtype=torch.uint8)), "E0213", "JSON"),
        ("nf4", put(STATE, torch.zeros(70000, dtype=torch.uint8)), "E0213", "70000"),
        ("nf4_double", drop(f"{WEIGHT}.nested_absmax"), "E0209", "nested_absmax"),
        ("nf4_double", put(f"{WEIGHT}.nested_absmax", torch.ones(3)), "E0213", "nested_absmax"),
        ("nf4_double", put(f"{WEIGHT}.nested_quant_map", torch.ones(255)), "E0213", "nested_quant_map"),
        ("nf4_double", put(f"{WEIGHT}.nested_absmax", torch.full((1,), NAN)), "E0215", "nested_absmax"),
        ("nf4_double", state(nested_offset="x"), "E0213", "nested_offset"),
        ("int8", put(f"{NAME}.SCB", torch.ones(63)), "E0213", "SCB"),
        ("int8", put(f"{NAME}.SCB", torch.full((64,), float("inf"))), "E0215", "SCB"),
        ("int8", put(WEIGHT, torch.zeros(64, 63, dtype=torch.int8)), "E0213", "weight"),
        ("int8", put(f"{NAME}.weight_format", torch.tensor(2, dtype=torch.uint8)), "E0218", "column-tiled"),
    ],
)
def test_damaged_files(
    name: str, change: Callable[[dict[str, Tensor]], None], code: str, said: str, tmp_path: Path
) -> None:
    folder = changed(tmp_path, name, change)
    with pytest.raises(LowbitError) as caught:
        read(folder, NAME, (64, 64))
    assert caught.value.code == code and said in str(caught.value), caught.value


def test_threshold_is_a_number(tmp_path: Path) -> None:
    folder = changed(tmp_path, "int8", lambda tensors: None, {"llm_int8_threshold": "6"})
    with pytest.raises(LowbitError, match="llm_int8_threshold"):
        reader_of(folder)


def test_plain_floats_under_the_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = torch.randn(64, 64)
    folder = write_folder(tmp_path, {WEIGHT: plain}, {"load_in_4bit": True})
    assert torch.equal(read(folder, NAME, (64, 64)).weight.codes, plain)
    assert "E0214" in caplog.text
    with pytest.raises(LowbitError):
        read(folder, NAME, (64, 64), strict=True)


def test_files_of_2023_name_no_method(tmp_path: Path) -> None:
    shutil.copytree(case("nf4"), tmp_path / "m")
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    del written["quantization_config"]["quant_method"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(written))
    assert reader_of(tmp_path / "m").name == "bitsandbytes"
