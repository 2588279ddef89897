"""SGLang's w8a8_int8, w8a8_fp8 and blockwise_int8 against numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from formats.helpers import header_of, read, reader_of, write_folder
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats import StoredModule, all_formats
from lowbit.kernels.activation_quant import limit_of
from oracles import w8a8 as oracle

NAME = "model.layers.0.mlp.up_proj"
STACK = "model.layers.0.mlp.experts.down_proj"
SHAPE = (70, 100)
METHODS = ("w8a8_int8", "w8a8_fp8", "blockwise_int8")
BLOCK = (32, 48)  # ragged both ways
NAN, INF = float("nan"), float("inf")


def stored(method: str, shape: tuple[int, int] = SHAPE, seed: int = 4) -> tuple[Tensor, Tensor, np.ndarray]:
    """(weight, scale, float32 values); every code the format has occurs, NaN left out."""
    rng = np.random.default_rng(seed)
    codes = np.resize(rng.permutation(256).astype(np.uint8), shape)
    block = BLOCK if method == "blockwise_int8" else (1, shape[1])
    grid = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    scales = (rng.uniform(0.5, 2, grid) * 10.0 ** rng.integers(-6, 3, grid)).astype(np.float32)
    scales.flat[:2] = 0, -0.25  # legal, both
    spread = oracle.spread(scales, block, shape)
    if method == "w8a8_fp8":
        codes = np.where(codes & 0x7F == 0x7F, 0, codes).astype(np.uint8)
        weight = torch.from_numpy(codes).view(torch.float8_e4m3fn)
        return weight, torch.from_numpy(scales), oracle.e4m3(codes) * spread
    signed = codes.view(np.int8)
    return torch.from_numpy(signed), torch.from_numpy(scales), signed.astype(np.float32) * spread


def scale_name(method: str) -> str:
    return "weight_scale_inv" if method == "blockwise_int8" else "weight_scale"


def config_of(method: str) -> dict:
    config: dict = {"quant_method": method}
    if method == "blockwise_int8":
        config |= {"weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}
    return config


def tensors_of(method: str) -> tuple[dict[str, Tensor], np.ndarray]:
    """(tensors of one module, float32 weight)."""
    weight, scale, values = stored(method)
    return {f"{NAME}.weight": weight, f"{NAME}.{scale_name(method)}": scale}, values


@pytest.mark.parametrize("method", METHODS)
def test_values(method: str, tmp_path: Path) -> None:
    tensors, wanted = tensors_of(method)
    folder = write_folder(tmp_path, tensors, config_of(method))
    found, reader = read(folder, NAME, SHAPE).weight, reader_of(folder)
    assert np.array_equal(found.dequantize().numpy(), wanted)
    assert found.scales[0].dtype == torch.float32
    assert reader.name == method and found.scheme == reader.scheme_of(StoredModule(NAME, NAME, SHAPE))


def test_schemes(tmp_path: Path) -> None:
    schemes = {}
    for method in METHODS:
        folder = write_folder(tmp_path / method, tensors_of(method)[0], config_of(method))
        schemes[method] = str(read(folder, NAME, SHAPE).weight.scheme)
        activation = read(folder, NAME, SHAPE).weight.scheme.activation
        assert activation is not None and limit_of(activation) == (448 if method == "w8a8_fp8" else 127)
        assert activation.outliers == 0 and activation.upper_bound == 0
    assert schemes == {
        "w8a8_int8": "int8 1xall f32 (input int8 1xall dynamic)",
        "w8a8_fp8": "e4m3 1xall f32 (input e4m3 1xall dynamic)",
        "blockwise_int8": "int8 32x48 f32 (input int8 1x48 dynamic)",
    }


@pytest.mark.parametrize("method", METHODS)
def test_canonical_codes(method: str, tmp_path: Path) -> None:
    tensors, _ = tensors_of(method)
    found = read(write_folder(tmp_path, tensors, config_of(method)), NAME, SHAPE).weight.codes
    weight = tensors[f"{NAME}.weight"]
    if method == "w8a8_fp8":
        assert torch.equal(found, weight.view(torch.uint8))
    else:
        assert torch.equal(found.to(torch.int16) - 128, weight.to(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_narrow_scales_stay_as_they_are(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors, _ = tensors_of(method)
    name = f"{NAME}.{scale_name(method)}"
    narrow = tensors[name].clamp(1e-4, 100).to(dtype)
    folder = write_folder(tmp_path, tensors | {name: narrow}, config_of(method))
    found = read(folder, NAME, SHAPE).weight
    assert found.scales[0].dtype == dtype and torch.equal(found.scales[0], narrow)


def test_flat_scales_float_modules_and_biases(tmp_path: Path) -> None:
    tensors, wanted = tensors_of("w8a8_int8")
    tensors[f"{NAME}.weight_scale"] = tensors[f"{NAME}.weight_scale"].flatten()
    tensors[f"{NAME}.bias"] = torch.randn(70)
    tensors["lm_head.weight"] = torch.randn(4, 6)
    config = config_of("w8a8_int8") | {"ignore": [NAME], "is_dynamic": True, "packed_modules_mapping": {}}
    folder = write_folder(tmp_path, tensors, config)
    linear = read(folder, NAME, SHAPE)
    assert np.array_equal(linear.weight.dequantize().numpy(), wanted)
    assert linear.bias is not None and torch.equal(linear.bias, tensors[f"{NAME}.bias"])
    assert torch.equal(read(folder, "lm_head", (4, 6)).weight.codes, tensors["lm_head.weight"])
    used = reader_of(folder).tensors_of(StoredModule(NAME, NAME, SHAPE))
    assert sorted(used) == sorted(name for name in tensors if name.startswith(NAME))


@pytest.mark.parametrize("method", METHODS)
def test_stacked_experts(method: str, tmp_path: Path) -> None:
    parts = [stored(method, seed=seed) for seed in range(3)]
    weights, scales = (torch.stack([part[i] for part in parts]) for i in (0, 1))
    suffix = scale_name(method).removeprefix("weight")
    folder = write_folder(tmp_path, {STACK: weights, STACK + suffix: scales}, config_of(method))
    reader = reader_of(folder)
    with TensorData(header_of(folder)) as data:
        for expert, (_, _, wanted) in enumerate(parts):
            module = StoredModule(f"{STACK}.{expert}", STACK, SHAPE, expert, 3)
            assert np.array_equal(reader.read(module, data).weight.dequantize().numpy(), wanted)
            assert reader.tensors_of(module) == [STACK, STACK + suffix]
        with pytest.raises(LowbitError) as caught:
            reader.read(StoredModule(STACK, STACK, SHAPE, 0, 4), data)
    assert caught.value.code == "E0213" and STACK in str(caught.value)


@pytest.mark.parametrize(
    ("method", "name", "value", "code"),
    [
        ("w8a8_int8", "weight", torch.zeros(70, 99, dtype=torch.int8), "E0213"),
        ("w8a8_int8", "weight", torch.zeros(SHAPE, dtype=torch.int32), "E0213"),
        ("w8a8_int8", "weight", torch.zeros(SHAPE, dtype=torch.float8_e4m3fn), "E0213"),
        ("w8a8_int8", "weight", None, "E0209"),
        ("w8a8_int8", "weight_scale", torch.ones(69, 1), "E0213"),
        ("w8a8_int8", "weight_scale", torch.ones(1, 70), "E0213"),
        ("w8a8_int8", "weight_scale", torch.ones(70, 1, dtype=torch.int32), "E0213"),
        ("w8a8_int8", "weight_scale", torch.full((70, 1), NAN), "E0215"),
        ("w8a8_int8", "weight_scale", None, "E0209"),
        ("w8a8_int8", "input_scale", torch.ones(1), "E0218"),
        ("w8a8_int8", "deq_scale", torch.ones(70), "E0218"),
        ("w8a8_fp8", "weight", torch.zeros(SHAPE, dtype=torch.int8), "E0213"),
        ("w8a8_fp8", "weight", torch.zeros(SHAPE, dtype=torch.float8_e5m2), "E0213"),
        ("w8a8_fp8", "weight_scale", torch.ones(3, 3), "E0213"),
        ("w8a8_fp8", "weight_scale", torch.full((70, 1), -INF), "E0215"),
        ("blockwise_int8", "weight", torch.zeros(100, 70, dtype=torch.int8), "E0213"),
        ("blockwise_int8", "weight_scale_inv", torch.ones(2, 3), "E0213"),
        ("blockwise_int8", "weight_scale_inv", torch.ones(3), "E0213"),
        ("blockwise_int8", "weight_scale_inv", torch.full((3, 3), NAN), "E0215"),
        ("blockwise_int8", "weight_scale_inv", None, "E0209"),
    ],
)
def test_damaged(method: str, name: str, value: Tensor | None, code: str, tmp_path: Path) -> None:
    tensors, _ = tensors_of(method)
    other = {name.replace(NAME, "other"): tensor.clone() for name, tensor in tensors.items()}  # stays whole
    changed = {**other, **tensors, f"{NAME}.{name}": value}
    kept = {key: tensor for key, tensor in changed.items() if tensor is not None}
    with pytest.raises(LowbitError) as caught:
        read(write_folder(tmp_path, kept, config_of(method)), NAME, SHAPE)
    message = str(caught.value)
    assert caught.value.code == code and f"{NAME}.{name}" in message, message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("method", "config", "said"),
    [
        ("blockwise_int8", {"weight_block_size": None}, "weight_block_size"),
        ("blockwise_int8", {"weight_block_size": [32]}, "weight_block_size"),
        ("blockwise_int8", {"weight_block_size": [0, 48]}, "weight_block_size"),
        ("blockwise_int8", {"weight_block_size": "32x48"}, "weight_block_size"),
        ("blockwise_int8", {"activation_scheme": "static"}, "activation_scheme"),
        ("w8a8_fp8", {"activation_scheme": ["dynamic"]}, "activation_scheme"),
    ],
)
def test_impossible_configs(method: str, config: dict, said: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, tensors_of(method)[0], config_of(method) | config)
    with pytest.raises(LowbitError) as caught:
        reader_of(folder)
    assert caught.value.code == "E0212" and said in str(caught.value)


def test_another_block_size_than_the_tensors(tmp_path: Path) -> None:
    config = config_of("blockwise_int8") | {"weight_block_size": [64, 48]}
    with pytest.raises(LowbitError) as caught:
        read(write_folder(tmp_path, tensors_of("blockwise_int8")[0], config), NAME, SHAPE)
    assert caught.value.code == "E0213" and "weight_scale_inv" in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_dequantized_model_that_kept_its_config(method: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {f"{NAME}.weight": torch.randn(SHAPE)}, config_of(method))
    with pytest.raises(LowbitError) as caught:
        reader_of(folder)
    assert caught.value.code == "E0213" and "remove the quantization config" in str(caught.value)


def test_claims_and_descriptions(tmp_path: Path) -> None:
    described = {}
    for method in METHODS:
        folder = write_folder(tmp_path / method, tensors_of(method)[0], config_of(method))
        header = header_of(folder)
        claiming = {fmt.name: fmt.claims(header) for fmt in all_formats() if fmt.claims(header)}
        assert list(claiming) == [method] and method in str(claiming[method])
        described[method] = reader_of(folder).describe()
    assert described == {
        "w8a8_int8": "w8a8_int8 in config.json",
        "w8a8_fp8": "w8a8_fp8 in config.json",
        "blockwise_int8": "blockwise_int8, blocks 32x48 in config.json",
    }
