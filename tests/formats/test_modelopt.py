"""ModelOpt: its own exports and values; blocks, MX and mixed files from their description; damaged files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from formats.helpers import expected, fixture_cases, header_of, read, reader_of, write_folder
from lowbit.errors import LowbitError
from lowbit.formats import StoredModule
from oracles import mxfp4 as mx
from oracles import w8a8 as oracle

CASES = fixture_cases("modelopt")
NAME = "model.layers.0.mlp.up_proj"
SHAPE = (140, 288)


@pytest.mark.parametrize("folder", CASES, ids=lambda path: path.name)
def test_the_tools_own_values(folder: Path) -> None:
    for name, values in expected(folder).items():
        module = StoredModule(name, name, tuple(values.shape))
        found = read(folder, name, tuple(values.shape)).weight
        if folder.name == "int4_awq":
            # The tool only simulates int4, with scales in bf16: codes may differ by one, and scale bits.
            step = found.scales[0].abs().repeat_interleave(128, 1)
            difference = (found.dequantize() - values.float()).abs()
            assert (difference <= 1.05 * step).all() and (difference <= 0.1 * step).float().mean() > 0.9
        else:
            assert torch.equal(found.dequantize(), values), name
        reader = reader_of(folder)
        assert found.scheme == reader.scheme_of(module)
        mine = {tensor for tensor in header_of(folder).tensors if tensor.startswith(f"{name}.")}
        assert mine == set(reader.tensors_of(module))


def test_what_the_cases_ask_of_their_inputs() -> None:
    inputs = {}
    for folder in CASES:
        name, values = next(iter(expected(folder).items()))
        found = read(folder, name, tuple(values.shape))
        multiplier = found.input is not None and found.input.multiplier is not None
        inputs[folder.name] = (str(found.weight.scheme.activation), multiplier)
    assert inputs == {
        "fp8": ("e4m3 allxall static", False),
        "fp8_pc_pt": ("e4m3 1xall dynamic", False),
        "nvfp4_w4a16": ("None", False),
        "int4_awq": ("None", True),
        "int8_sq": ("int8 allxall static", True),
    }


FP8 = (np.arange(SHAPE[0] * SHAPE[1]) * 31 % 127).astype(np.uint8).reshape(SHAPE)
PACKED = torch.randint(0, 256, (SHAPE[0], SHAPE[1] // 2), dtype=torch.uint8)


def nibbles() -> np.ndarray:
    raw = PACKED.numpy()
    return mx.E2M1[np.stack((raw & 15, raw >> 4), -1).reshape(SHAPE)]


def made(folder: Path, algorithm: str, tensors: dict[str, Tensor], **more: object) -> Path:
    """A folder as ModelOpt wrote it before 2025: the config in a file of its own."""
    write_folder(folder, {f"{NAME}.{name}": tensor for name, tensor in tensors.items()}, None)
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": algorithm, **more}}
    (folder / "hf_quant_config.json").write_text(json.dumps(said))
    return folder


def test_blocks(tmp_path: Path) -> None:
    scales = torch.rand(2, 1, 3, 1)
    codes = torch.from_numpy(FP8).view(torch.float8_e4m3fn)
    found = read(made(tmp_path, "FP8_PB_WO", {"weight": codes, "weight_scale": scales}), NAME, SHAPE).weight
    wanted = oracle.e4m3(FP8) * oracle.spread(scales.view(2, 3).numpy(), (128, 128), SHAPE)
    assert np.array_equal(found.dequantize().numpy(), wanted)


def test_nvfp4_inputs(tmp_path: Path) -> None:
    tensors = {
        "weight": PACKED,
        "weight_scale": torch.rand(140, 18).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(0.3),
        "input_scale": torch.tensor(0.01),
    }
    found = read(made(tmp_path, "NVFP4", tensors), NAME, SHAPE)
    inner = oracle.spread(tensors["weight_scale"].float().numpy(), (1, 16), SHAPE)
    assert np.array_equal(found.weight.dequantize().numpy(), nibbles() * (inner * np.float32(0.3)))
    activation = found.weight.scheme.activation
    assert activation is not None and activation.block == (1, 16) and activation.scale.name == "e4m3"
    assert found.input is not None and float(found.input.static_scale) == pytest.approx(0.01)


@pytest.mark.parametrize("algorithm", ["MXFP4", "MXFP8"])
def test_mx(algorithm: str, tmp_path: Path) -> None:
    exponents = torch.randint(110, 130, (140, 9), dtype=torch.uint8)
    weight = PACKED if algorithm == "MXFP4" else torch.from_numpy(FP8).view(torch.float8_e4m3fn)
    values = nibbles() if algorithm == "MXFP4" else oracle.e4m3(FP8)
    found = read(made(tmp_path, algorithm, {"weight": weight, "weight_scale": exponents}), NAME, SHAPE).weight
    powers = np.exp2(exponents.float().numpy() - 127)
    assert np.array_equal(found.dequantize().numpy(), values * oracle.spread(powers, (1, 32), SHAPE))


def test_mixed_layers(tmp_path: Path) -> None:
    codes = torch.from_numpy(FP8).view(torch.float8_e4m3fn)
    tensors = {"weight": codes, "weight_scale": torch.tensor(0.5), "input_scale": torch.tensor(2.0)}
    layers = {NAME: {"quant_algo": "FP8"}, "other": {"quant_algo": "NVFP4"}}
    folder = made(tmp_path, "MIXED_PRECISION", tensors, quantized_layers=layers)
    activation = read(folder, NAME, SHAPE).weight.scheme.activation
    assert activation is not None and activation.mode == "static"


def test_config_in_config_json(tmp_path: Path) -> None:
    codes = torch.from_numpy(FP8).view(torch.float8_e4m3fn)
    tensors = {f"{NAME}.weight": codes, f"{NAME}.weight_scale": torch.tensor(0.5)}
    folder = write_folder(tmp_path, tensors, {"quant_method": "modelopt", "quant_algo": "FP8"})
    assert reader_of(folder).name == "modelopt"
    activation = read(folder, NAME, SHAPE).weight.scheme.activation
    assert activation is not None and activation.mode == "dynamic"  # no input_scale in the file


@pytest.mark.parametrize("algorithm", ["NVFP4_SVD", "W4A8_AWQ"])
def test_refused_by_name(algorithm: str, tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match=algorithm) as caught:
        reader_of(made(tmp_path, algorithm, {"weight_scale": torch.ones(1)}))
    assert caught.value.code == "E0218"


def test_kv_cache_with_zero_points(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match="NVFP4_AFFINE"):
        reader_of(made(tmp_path, "FP8", {"weight_scale": torch.ones(1)}, kv_cache_quant_algo="NVFP4_AFFINE"))


CODES = torch.from_numpy(FP8).view(torch.float8_e4m3fn)
E4M3 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("algorithm", "tensors", "code", "said"),
    [
        ("FP9", {"weight": CODES, "weight_scale": torch.ones(1)}, "E0212", "FP9"),
        ("FP8", {"weight": CODES[:1], "weight_scale": torch.ones(1)}, "E0213", "weight"),
        ("FP8", {"weight": CODES, "weight_scale": torch.ones(139)}, "E0213", "weight_scale"),
        ("FP8", {"weight": CODES, "weight_scale": torch.tensor(float("nan"))}, "E0215", "weight_scale"),
        ("FP8", {"weight": CODES, "x.weight_scale": torch.ones(1)}, "E0209", "weight_scale"),
        (
            "FP8",
            {"weight": CODES, "weight_scale": torch.ones(1), "input_scale": torch.ones(2)},
            "E0213",
            "input_scale",
        ),
        ("NVFP4", {"weight": PACKED, "weight_scale": torch.ones(140, 17).to(E4M3)}, "E0213", "weight_scale"),
        ("NVFP4", {"weight": PACKED[:, 1:], "weight_scale": torch.ones(140, 18).to(E4M3)}, "E0213", "weight"),
        (
            "NVFP4",
            {"weight": PACKED, "weight_scale": torch.full((140, 18), float("nan")).to(E4M3)},
            "E0215",
            "weight_scale",
        ),
        (
            "FP8",
            {"weight": CODES, "weight_scale": torch.ones(1), "pre_quant_scale": torch.ones(9)},
            "E0213",
            "pre_quant_scale",
        ),
        ("FP8", {"weight": torch.ones(SHAPE)}, "E0213", "remove the quantization config"),
    ],
)
def test_damaged(algorithm: str, tensors: dict[str, Tensor], code: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(LowbitError) as caught:
        read(made(tmp_path, algorithm, tensors), NAME, SHAPE)
    assert caught.value.code == code and said in str(caught.value), caught.value
