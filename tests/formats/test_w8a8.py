"""SGLang's w8a8_int8, w8a8_fp8 and blockwise_int8 against numpy; no tool writes them on a CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from formats.helpers import read, reader_of, write_folder
from lowbit.errors import LowbitError
from lowbit.formats import StoredModule
from oracles import w8a8 as oracle

NAME = "model.layers.0.mlp.up_proj"
SHAPE = (70, 100)
RNG = np.random.default_rng(4)
INT8 = RNG.integers(-128, 128, SHAPE).astype(np.int8)
FP8 = np.where(INT8.view(np.uint8) & 0x7F == 0x7F, 0, INT8.view(np.uint8)).astype(np.uint8)


def tensors(method: str) -> tuple[dict[str, Tensor], np.ndarray, dict]:
    """(tensors, float32 weight, config)."""
    config: dict = {"quant_method": method}
    block = (32, 48) if method == "blockwise_int8" else (1, SHAPE[1])
    grid = (-(-SHAPE[0] // block[0]), -(-SHAPE[1] // block[1]))
    scales = RNG.uniform(0.001, 0.1, grid).astype(np.float32)
    values = oracle.e4m3(FP8) if method == "w8a8_fp8" else INT8.astype(np.float32)
    codes = (
        torch.from_numpy(FP8).view(torch.float8_e4m3fn) if method == "w8a8_fp8" else torch.from_numpy(INT8)
    )
    name = "weight_scale_inv" if method == "blockwise_int8" else "weight_scale"
    if method == "blockwise_int8":
        config |= {"weight_block_size": list(block), "activation_scheme": "dynamic"}
    stored = {f"{NAME}.weight": codes, f"{NAME}.{name}": torch.from_numpy(scales)}
    return stored, values * oracle.spread(scales, block, SHAPE), config


@pytest.mark.parametrize("method", ["w8a8_int8", "w8a8_fp8", "blockwise_int8"])
def test_values(method: str, tmp_path: Path) -> None:
    stored, wanted, config = tensors(method)
    folder = write_folder(tmp_path, stored, config)
    found = read(folder, NAME, SHAPE).weight
    assert np.array_equal(found.dequantize().numpy(), wanted)
    reader = reader_of(folder)
    assert reader.name == method and found.scheme == reader.scheme_of(StoredModule(NAME, NAME, SHAPE))
    activation = found.scheme.activation
    assert activation is not None and activation.block == (1, 48 if method == "blockwise_int8" else 0)
    assert activation.limit == (448 if method == "w8a8_fp8" else 127)


def test_flat_scales_and_float_modules(tmp_path: Path) -> None:
    stored, wanted, config = tensors("w8a8_int8")
    stored[f"{NAME}.weight_scale"] = stored[f"{NAME}.weight_scale"].flatten()
    stored["lm_head.weight"] = torch.randn(4, 6)
    folder = write_folder(tmp_path, stored, config)
    assert np.array_equal(read(folder, NAME, SHAPE).weight.dequantize().numpy(), wanted)
    assert torch.equal(read(folder, "lm_head", (4, 6)).weight.codes, stored["lm_head.weight"])


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("weight", torch.zeros(70, 99, dtype=torch.int8), "E0213"),
        ("weight", torch.zeros(SHAPE, dtype=torch.int32), "E0213"),
        ("weight_scale", torch.ones(69, 1), "E0213"),
        ("weight_scale", torch.ones(70, 1, dtype=torch.int32), "E0213"),
        ("weight_scale", torch.full((70, 1), float("nan")), "E0215"),
    ],
)
def test_damaged(name: str, value: Tensor, code: str, tmp_path: Path) -> None:
    stored, _, config = tensors("w8a8_int8")
    folder = write_folder(tmp_path, stored | {f"{NAME}.{name}": value}, config)
    with pytest.raises(LowbitError) as caught:
        read(folder, NAME, SHAPE)
    assert caught.value.code == code and name in str(caught.value), caught.value


def test_blocks_need_a_size(tmp_path: Path) -> None:
    stored, _, config = tensors("blockwise_int8")
    del config["weight_block_size"]
    with pytest.raises(LowbitError, match="weight_block_size"):
        reader_of(write_folder(tmp_path, stored, config))


def test_dequantized_model_that_kept_its_config(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {f"{NAME}.weight": torch.randn(SHAPE)}, {"quant_method": "w8a8_int8"})
    with pytest.raises(LowbitError, match="remove the quantization config"):
        reader_of(folder)
