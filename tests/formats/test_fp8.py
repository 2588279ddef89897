"""FP8: blocks with ragged edges, per tensor, per channel, stacked experts; inputs; damaged files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from formats.helpers import FIXTURES, header_of, read, reader_of, write_folder
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats import StoredModule
from lowbit.kernels.activation_quant import InputTransform
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import ActivationScheme

NAME = "model.layers.0.mlp.up_proj"
SHAPE = (70, 100)


def codes(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """Every code but NaN."""
    raw = torch.arange(torch.Size(shape).numel()) * 37 % 256
    raw[(raw & 0x7F) == 0x7F] = 0x7E
    if dtype is torch.float8_e5m2:
        raw = raw & 0x7B
    return raw.to(torch.uint8).view(shape).view(dtype)


def spread(scales: Tensor, block: tuple[int, int], shape: tuple[int, int] = SHAPE) -> Tensor:
    """float32: the scale of each weight, by plain indexing."""
    rows = torch.arange(shape[0]) // block[0]
    columns = torch.arange(shape[1]) // block[1]
    return scales.float()[rows][:, columns]


def config(**more: object) -> dict:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", **more}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("block", [(32, 32), (128, 128), (1, 32), (64, 16)])
def test_blocks_with_ragged_edges(block: tuple[int, int], dtype: torch.dtype, tmp_path: Path) -> None:
    grid = (-(-SHAPE[0] // block[0]), -(-SHAPE[1] // block[1]))
    scales = (torch.rand(grid) * 0.1 + 0.01).to(dtype)
    tensors = {f"{NAME}.weight": codes(), f"{NAME}.weight_scale_inv": scales}
    folder = write_folder(tmp_path, tensors, config(weight_block_size=list(block)))
    found = read(folder, NAME, SHAPE).weight
    assert torch.equal(found.dequantize(), codes().float() * spread(scales, block))
    assert found.scheme == reader_of(folder).scheme_of(StoredModule(NAME, NAME, SHAPE))
    assert found.scheme.blocks[0] == block
    activation = found.scheme.activation
    assert activation is not None and activation.block == (1, block[1])


def test_exponent_bytes(tmp_path: Path) -> None:
    scales = torch.randint(100, 140, (70, 4), dtype=torch.uint8)
    tensors = {f"{NAME}.weight": codes(), f"{NAME}.weight_scale_inv": scales}
    folder = write_folder(tmp_path, tensors, config(weight_block_size=[1, 32], scale_fmt="ue8m0"))
    found = read(folder, NAME, SHAPE).weight
    assert torch.equal(
        found.dequantize(), codes().float() * spread(torch.exp2(scales.float() - 127), (1, 32))
    )
    assert found.scheme.activation is not None and found.scheme.activation.scale.name == "e8m0"


@pytest.mark.parametrize("shape", [(), (1,), (70,), (70, 1)])
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
def test_per_tensor_and_per_channel(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    scales = torch.rand(shape) + 0.1
    tensors = {f"{NAME}.weight": codes(), f"{NAME}.{name}": scales}
    found = read(write_folder(tmp_path, tensors, config()), NAME, SHAPE).weight
    assert torch.equal(found.dequantize(), codes().float() * scales.reshape(-1, 1))


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fnuz])
def test_other_codes(dtype: torch.dtype, tmp_path: Path) -> None:
    raw = codes(dtype=dtype)
    if dtype is torch.float8_e4m3fnuz:
        raw = raw.view(torch.uint8).masked_fill(raw.view(torch.uint8) == 0x80, 0).view(dtype)
    tensors = {f"{NAME}.weight": raw, f"{NAME}.weight_scale": torch.tensor(0.5)}
    found = read(write_folder(tmp_path, tensors, config()), NAME, SHAPE).weight
    assert torch.equal(found.dequantize(), raw.float() * 0.5)


def test_static_inputs(tmp_path: Path) -> None:
    tensors = {
        f"{NAME}.weight": codes(),
        f"{NAME}.weight_scale": torch.tensor(0.5),
        f"{NAME}.input_scale": torch.tensor([0.25]),
    }
    found = read(write_folder(tmp_path, tensors, config(activation_scheme="static")), NAME, SHAPE)
    assert found.input is not None and float(found.input.static_scale) == 0.25
    del tensors[f"{NAME}.input_scale"]
    folder = write_folder(tmp_path / "b", tensors, config(activation_scheme="static"))
    with pytest.raises(LowbitError, match=r"input_scale.*static"):
        read(folder, NAME, SHAPE)


def test_mistrals_names(tmp_path: Path) -> None:
    """What its folders call the scales is met under transformers' names of modules too."""
    tensors = {
        f"{NAME}.weight": codes(),
        f"{NAME}.qscale_weight": torch.tensor(0.5),
        f"{NAME}.qscale_act": torch.tensor(0.25),
    }
    folder = write_folder(tmp_path, tensors, config(activation_scheme="static"))
    found = read(folder, NAME, SHAPE)
    assert torch.equal(found.weight.dequantize(), codes().float() * 0.5)
    assert found.input is not None and float(found.input.static_scale) == 0.25
    assert set(reader_of(folder).tensors_of(StoredModule(NAME, NAME, SHAPE))) == set(tensors)


def test_gptqmodels_inputs_are_left_as_they_are() -> None:
    """Its layers multiply dequantized weights by x; nothing in the config says so."""
    folder, name = FIXTURES / "fp8/gptqmodel_row", "model.layers.0.self_attn.k_proj"
    found = read(folder, name, (32, 64), strict=True)
    assert str(found.weight.scheme) == "e4m3 1xall f32" and found.input is None
    x = torch.linspace(-1, 1, 64).unsqueeze(0)
    wanted = load_file(folder / "outputs.safetensors")[name]
    assert (x @ found.weight.dequantize().T - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    rounded = InputTransform(ActivationScheme(number_format("e4m3"), (1, 0)))(x)
    assert rounded[1] is not None
    far = (rounded[0] * rounded[1]) @ found.weight.dequantize().T - wanted
    assert far.abs().max() > 1e-3 * wanted.abs().max()
    assert reader_of(folder).describe() == "fp8, per tensor or channel, plain inputs in config.json"
    assert (
        reader_of(FIXTURES / "fp8/gptqmodel_block").scheme_of(StoredModule(name, name, (32, 64))).activation
        is None
    )


def test_fbgemm_bounds_its_scales(tmp_path: Path) -> None:
    tensors = {f"{NAME}.weight": codes(), f"{NAME}.weight_scale": torch.rand(70, 1)}
    written = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
    activation = read(write_folder(tmp_path, tensors, written), NAME, SHAPE).weight.scheme.activation
    assert activation is not None and activation.upper_bound == 1200.0


def test_plain_matrix_with_a_stray_scale(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = torch.randn(SHAPE, dtype=torch.bfloat16)
    tensors = {
        f"{NAME}.weight": plain,
        f"{NAME}.weight_scale_inv": torch.full((3, 4), float("nan")),
        "other.weight": codes(),
    }
    folder = write_folder(tmp_path, tensors, config())
    assert torch.equal(read(folder, NAME, SHAPE).weight.codes, plain)
    named = reader_of(folder).tensors_of(StoredModule(NAME, NAME, SHAPE))
    assert named == [f"{NAME}.weight", f"{NAME}.weight_scale_inv"]
    assert "E0214" in caplog.text and f"{NAME}.weight_scale_inv" in caplog.text
    with pytest.raises(LowbitError) as caught:
        read(folder, NAME, SHAPE, strict=True)
    assert caught.value.code == "E0214"


def test_stacked_experts(tmp_path: Path) -> None:
    stem = "model.layers.0.mlp.experts.gate_up_proj"
    weight, scales = codes((3, *SHAPE)), torch.rand(3, 3, 4)
    folder = write_folder(
        tmp_path, {stem: weight, f"{stem}_scale_inv": scales}, config(weight_block_size=[32, 32])
    )
    module = StoredModule("e", stem, SHAPE, expert=2, experts=3)
    with TensorData(header_of(folder)) as data:
        found = reader_of(folder).read(module, data).weight
    assert torch.equal(found.dequantize(), weight[2].float() * spread(scales[2], (32, 32)))


def test_fp4_experts(tmp_path: Path) -> None:
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    nibbles = torch.randint(0, 16, (8, 64))
    packed = (nibbles[:, ::2] | nibbles[:, 1::2] << 4).to(torch.uint8).view(torch.int8)
    scales = torch.randint(120, 130, (8, 2), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    tensors = {f"{NAME}.weight": packed, f"{NAME}.weight_scale_inv": scales}
    folder = write_folder(tmp_path, tensors, config(weight_block_size=[128, 128], expert_dtype="fp4"))
    found = read(folder, NAME, (8, 64)).weight
    assert torch.equal(found.dequantize(), values[nibbles] * spread(scales, (1, 32), (8, 64)))


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"activation_scheme": "sometimes"}, "E0212", "activation_scheme"),
        ({"weight_block_size": [128]}, "E0212", "weight_block_size"),
        ({"weight_block_size": [0, 128]}, "E0212", "weight_block_size"),
        ({"weight_block_size": "128x128"}, "E0212", "weight_block_size"),
        ({"weight_block_size": [64, 64]}, "E0213", "weight_scale_inv"),
        ({"fmt": "e3m4"}, "E0212", "fmt"),
    ],
)
def test_impossible_config(change: dict, code: str, said: str, tmp_path: Path) -> None:
    tensors = {f"{NAME}.weight": codes(), f"{NAME}.weight_scale_inv": torch.ones(3, 4)}
    folder = write_folder(tmp_path, tensors, config(**{"weight_block_size": [32, 32], **change}))
    with pytest.raises(LowbitError) as caught:
        read(folder, NAME, SHAPE)
    assert caught.value.code == code and said in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("weight", codes((70, 101)), "E0213"),
        ("weight", torch.zeros(SHAPE, dtype=torch.int64), "E0213"),
        ("weight", None, "E0209"),
        ("weight_scale_inv", torch.ones(4, 4), "E0213"),
        ("weight_scale_inv", torch.ones(3, 4, dtype=torch.int32), "E0213"),
        ("weight_scale_inv", torch.full((3, 4), float("inf")), "E0215"),
        ("weight_scale_inv", None, "E0209"),
    ],
)
def test_damaged_tensors(name: str, value: Tensor | None, code: str, tmp_path: Path) -> None:
    tensors: dict[str, Tensor | None] = {
        f"{NAME}.weight": codes(),
        f"{NAME}.weight_scale_inv": torch.ones(3, 4),
        "other.weight": codes(),
        f"{NAME}.{name}": value,
    }
    present = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    folder = write_folder(tmp_path, present, config(weight_block_size=[32, 32]))
    with pytest.raises(LowbitError) as caught:
        read(folder, NAME, SHAPE)
    assert caught.value.code == code and name in str(caught.value), caught.value


def test_dequantized_model_that_kept_its_config(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {f"{NAME}.weight": torch.randn(SHAPE)}, config())
    with pytest.raises(LowbitError, match="remove the quantization config"):
        read(folder, NAME, SHAPE)
