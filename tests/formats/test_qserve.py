"""QServe: the engine's own packing, numpy's definition of it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from formats.helpers import expected, fixture_cases, header_of, read, reader_of, write_folder
from forward_helpers import prompt_logits
from lowbit.errors import LowbitError
from lowbit.loading import load_model, plan_model

NAME = "model.layers.0.mlp.up_proj"
OUT, COLUMNS, GROUP = 64, 256, 128
CASES = [pytest.param(folder, id=folder.name) for folder in fixture_cases("qserve")]


def packed(codes: np.ndarray) -> Tensor:
    """The layout, weight by weight."""
    out, columns = codes.shape
    made = np.zeros((out // 32, columns // 32, 8, 4, 2, 2, 4), np.uint8)
    for row in range(out):
        a, b, c, d = row // 32, row // 16 % 2, row // 8 % 2, row % 8
        for column in range(columns):
            e, f, g, h = column // 32, column // 16 % 2, column // 4 % 4, column % 4
            made[a, e, d, g, f, c, h] |= codes[row, column] << 4 * b
    return torch.from_numpy(made.reshape(out, columns // 2).view(np.int8))


def in_kernel_order(values: np.ndarray) -> Tensor:
    """(out, groups) -> I8 (groups, out): rows 0, 8, 16, 24, 1, … of each 32."""
    order = [32 * tile + 8 * q + d for tile in range(len(values) // 32) for d in range(8) for q in range(4)]
    return torch.from_numpy(values[order].T.astype(np.int8).copy())


def module(grouped: bool) -> tuple[dict[str, Tensor], np.ndarray]:
    """Tensors of one module, and the weight they mean."""
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 16, (OUT, COLUMNS)).astype(np.uint8)
    s1 = rng.uniform(1e-4, 0.02, OUT).astype(np.float16)
    tensors = {f"{NAME}.qweight": packed(codes), f"{NAME}.s1_scales": torch.from_numpy(s1)}
    if not grouped:
        szeros = (rng.integers(0, 16, OUT) * s1).astype(np.float16)
        tensors[f"{NAME}.s1_szeros"] = torch.from_numpy(szeros)
        wide = s1.astype(np.float32)[:, None]
        return tensors, codes.astype(np.float32) * wide - szeros.astype(np.float32)[:, None]
    s2, zeros = rng.integers(1, 9, (OUT, 2)), rng.integers(0, 16, (OUT, 2))
    tensors |= {f"{NAME}.s2_scales": in_kernel_order(s2), f"{NAME}.s2_zeros": in_kernel_order(-zeros * s2)}
    inner = (codes - zeros.repeat(GROUP, 1)) * s2.repeat(GROUP, 1)
    return tensors, inner.astype(np.float32) * s1.astype(np.float32)[:, None]


@pytest.mark.parametrize("folder", CASES)
def test_what_the_engines_packer_was_given(folder: Path) -> None:
    for name, values in expected(folder).items():
        found = read(folder, name, (values.shape[0], values.shape[1])).weight.dequantize()
        # Per channel zero * scale, below a quarter, is stored rounded to a float16.
        step = 2.0**-13 if folder.name == "per_channel" else 0.0
        assert ((found.half() - values).abs().float() <= step).all(), name


@pytest.mark.parametrize("folder", CASES)
def test_a_model_answers_on_native_kernels(folder: Path) -> None:
    plan = plan_model(header_of(folder), device="cpu")
    quantized = [module for module in plan.modules if not module.scheme.is_dense]
    assert len(quantized) == 7 and all("int8 1xall dynamic" in str(one.scheme) for one in quantized)
    assert {one.kernel for one in quantized} <= {"cpu_blocks", "reference"}
    logits = prompt_logits(load_model(header_of(folder), device="cpu"), [[1, 2, 3, 4, 5]])[0]
    assert logits.isfinite().all()


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("config", [None, {"quant_method": "qoq", "wbits": 4}])
def test_values(grouped: bool, config: dict | None, tmp_path: Path) -> None:
    tensors, weight = module(grouped)
    folder = write_folder(tmp_path, tensors, config)
    assert np.array_equal(read(folder, NAME, (OUT, COLUMNS)).weight.dequantize().numpy(), weight)
    assert ("group 128" in reader_of(folder).describe()) == grouped


def test_its_own_config_file_and_pickled_weights(tmp_path: Path) -> None:
    tensors, weight = module(True)
    folder = write_folder(tmp_path, tensors, None)
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "quant_config.json").write_text(json.dumps({"wbits": 4, "group_size": 128}))
    assert np.array_equal(read(folder, NAME, (OUT, COLUMNS)).weight.dequantize().numpy(), weight)
    (folder / "quant_config.json").write_text(json.dumps({"wbits": 4, "group_size": -1}))
    with pytest.raises(LowbitError, match="groups of 128 columns; quant_config.json says group_size -1"):
        read(folder, NAME, (OUT, COLUMNS))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"qweight": torch.zeros(OUT, COLUMNS, dtype=torch.int8)}, "E0213"),
        ({"qweight": torch.zeros(OUT, COLUMNS // 2)}, "E0213"),
        ({"s1_scales": torch.full((OUT,), float("inf"), dtype=torch.float16)}, "E0215"),
        ({"s1_scales": torch.ones(OUT)}, "E0213"),
        ({"s2_scales": torch.ones(3, OUT, dtype=torch.int8)}, "E0213"),
        ({"s2_scales": torch.full((2, OUT), 11, dtype=torch.int8)}, "E0213"),
        ({"s2_zeros": torch.full((2, OUT), 7, dtype=torch.int8)}, "E0213"),
        ({"s2_zeros": torch.zeros(1, OUT, dtype=torch.int8)}, "E0213"),
        ({"s2_zeros": None}, "E0209"),
    ],
)
def test_damaged(change: dict[str, Tensor | None], code: str, tmp_path: Path) -> None:
    tensors, _ = module(True)
    for suffix, value in change.items():
        if value is None:
            del tensors[f"{NAME}.{suffix}"]
        else:
            tensors[f"{NAME}.{suffix}"] = value
    with pytest.raises(LowbitError) as caught:
        read(write_folder(tmp_path, tensors, None), NAME, (OUT, COLUMNS))
    assert caught.value.code == code and NAME in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [{"wbits": 8}, {"group_size": 64}, {"group_size": "x"}])
def test_configs_that_cannot_be(config: dict, tmp_path: Path) -> None:
    with pytest.raises(LowbitError) as caught:
        reader_of(write_folder(tmp_path, module(True)[0], {"quant_method": "qserve", **config}))
    assert caught.value.code == "E0212"


def test_tiles_need_multiples_of_32(tmp_path: Path) -> None:
    tensors = {f"{NAME}.qweight": torch.zeros(40, 16, dtype=torch.int8)}
    tensors |= {f"{NAME}.s1_scales": torch.ones(40).half(), f"{NAME}.s1_szeros": torch.ones(40).half()}
    with pytest.raises(LowbitError, match="tiles of 32 x 32"):
        read(write_folder(tmp_path, tensors, None), NAME, (40, 32))
