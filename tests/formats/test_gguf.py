"""The gguf format: raw blocks stay raw, rotary rows are put back, NVFP4 gets its outer scale."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from gguf_blocks import NAMES, random_blocks
from gguf_writing import GgufTensor, write_gguf
from lowbit.checkpoint.gguf_file import read_gguf_header
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.errors import LowbitError
from lowbit.formats import Notes, StoredLinear, StoredModule, detect
from lowbit.formats.gguf import FORMAT
from lowbit.layers.linear import Part
from lowbit.loading.names import Placed, row_order
from numerics.test_block_layouts import dequantized


def converters_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """What the converter does to q and k: half-split rows -> adjacent pairs, one row at a time."""
    size = len(weight) // heads
    moved = np.empty_like(weight)
    for head in range(heads):
        for row in range(size):
            half, place = divmod(row, size // 2)
            moved[head * size + 2 * place + half] = weight[head * size + row]
    return moved


def written(path: Path, *tensors: GgufTensor) -> CheckpointHeader:
    write_gguf(path / "m.gguf", {"general.architecture": "llama"}, tensors)
    return read_gguf_header(path / "m.gguf")


def block_tensor(name: str, kind: str, raw: np.ndarray, shape: tuple[int, ...]) -> GgufTensor:
    return GgufTensor(name, kind.upper(), shape, raw.tobytes())


def floats(name: str, values: np.ndarray) -> GgufTensor:
    kind = {"float32": "F32", "float16": "F16"}[values.dtype.name]
    return GgufTensor(name, kind, values.shape, values.tobytes())


def read(header: CheckpointHeader, shape: tuple[int, ...], rotary_heads: int = 0) -> StoredLinear:
    """Module ``blk.0.attn_q`` as the format reads it and loading puts its rows, detached from the file."""
    module = StoredModule("model.layers.0.self_attn.q_proj", "blk.0.attn_q", shape)
    with TensorData(header) as data:
        return in_order(header, module, opened(header).read(module, data), rotary_heads)


def opened(header: CheckpointHeader) -> FORMAT:
    return FORMAT(header, Notes())


def in_order(header: CheckpointHeader, module: StoredModule, found: StoredLinear, heads: int) -> StoredLinear:
    order = row_order(Placed(Part(module.name, module.shape), module, heads), header)
    if order is None:
        return found
    bias = None if found.bias is None else found.bias[order]
    return StoredLinear(found.weight.permute_rows(order), bias)


def columns_of(kind: str, raw: np.ndarray) -> int:
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    return raw.shape[-1] // size * weights


def test_it_claims_every_gguf_file_alone(tmp_path: Path) -> None:
    header = written(tmp_path, floats("a.weight", np.ones((2, 4), np.float32)))
    assert detect(header) is FORMAT
    other = CheckpointHeader(tmp_path, "safetensors", {})
    assert FORMAT.claims(other) is None


@pytest.mark.parametrize("kind", NAMES)
def test_blocks_stay_as_they_are(tmp_path: Path, kind: str) -> None:
    raw = random_blocks(kind, rows=12)
    shape = (12, columns_of(kind, raw))
    header = written(tmp_path, block_tensor("blk.0.attn_q.weight", kind, raw, shape))
    found = read(header, shape)
    assert found.bias is None and found.input is None
    assert found.weight.scheme.weight.name == f"gguf_{kind}" and found.weight.shape == shape
    assert found.weight.origin == "m.gguf: model.layers.0.self_attn.q_proj"
    assert np.array_equal(found.weight.codes.numpy(), raw)
    assert np.array_equal(found.weight.dequantize().numpy(), dequantized(kind, raw), equal_nan=True)


@pytest.mark.parametrize("kind", ["q4_1", "q6_k", "mxfp4"])
@pytest.mark.parametrize("heads", [1, 3, 6])
def test_rotary_rows_and_biases_are_put_back(tmp_path: Path, kind: str, heads: int) -> None:
    raw = random_blocks(kind, rows=24)
    shape = (24, columns_of(kind, raw))
    bias = np.random.default_rng(1).normal(size=24).astype(np.float32)
    header = written(
        tmp_path,
        block_tensor("blk.0.attn_q.weight", kind, converters_rows(raw, heads), shape),
        floats("blk.0.attn_q.bias", converters_rows(bias, heads)),
    )
    found = read(header, shape, rotary_heads=heads)
    assert np.array_equal(found.weight.codes.numpy(), raw)
    assert found.bias is not None and np.array_equal(found.bias.numpy(), bias)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_plain_matrices(tmp_path: Path, dtype: str) -> None:
    values = torch.randn(8, 5, generator=torch.Generator().manual_seed(2)).to(
        {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    )
    stored = torch.from_numpy(converters_rows(values.float().numpy(), 2)).to(values.dtype)
    data = stored.view(torch.uint8).numpy().tobytes()
    header = written(tmp_path, GgufTensor("blk.0.attn_q.weight", dtype.upper(), (8, 5), data))
    found = read(header, (8, 5), rotary_heads=2).weight
    assert found.scheme.is_dense and found.scheme.weight.name == dtype
    assert torch.equal(found.codes, values)


def test_unmoved_rows_are_the_mapped_bytes(tmp_path: Path) -> None:
    raw = random_blocks("q4_0", rows=4)
    shape = (4, columns_of("q4_0", raw))
    header = written(tmp_path, block_tensor("blk.0.attn_q.weight", "q4_0", raw, shape))
    module = StoredModule("q", "blk.0.attn_q", shape)
    with TensorData(header) as data:
        mapped = data.raw("blk.0.attn_q.weight").data_ptr()
        assert opened(header).read(module, data).weight.codes.data_ptr() == mapped


def test_stacked_experts(tmp_path: Path) -> None:
    raw = random_blocks("q5_k", rows=15)
    shape = (3, 5, columns_of("q5_k", raw))
    header = written(tmp_path, block_tensor("blk.0.attn_q.weight", "q5_k", raw, shape))
    found = read(header, shape).weight
    expected = dequantized("q5_k", raw).reshape(shape)
    assert np.array_equal(found.dequantize().numpy(), expected)
    assert np.array_equal(found.expand().dequantize().numpy(), expected)


@pytest.mark.parametrize("experts", [0, 4])
def test_nvfp4_with_an_outer_scale(tmp_path: Path, experts: int) -> None:
    """A number for the tensor, or one for each expert, all unlike."""
    raw = random_blocks("nvfp4", rows=24)
    shape = (24 // max(1, experts), columns_of("nvfp4", raw))
    stacked = (experts, *shape) if experts else shape
    outer = np.array([0.37, -1.9, 0.0, 113.0], np.float32)[: experts or 1]
    header = written(
        tmp_path,
        block_tensor("blk.0.attn_q.weight", "nvfp4", raw, stacked),
        floats("blk.0.attn_q.scale", outer),
        floats("blk.0.attn_q.input_scale", np.array([0.5], np.float32)),
    )
    wanted = dequantized("nvfp4", raw).reshape(max(experts, 1), *shape)
    for number in range(max(experts, 1)):
        expert = number if experts else None
        module = StoredModule("q", "blk.0.attn_q", shape, expert, experts)
        assert opened(header).tensors_of(module) == [
            "blk.0.attn_q.weight", "blk.0.attn_q.scale", "blk.0.attn_q.input_scale",
        ]  # fmt: skip
        with TensorData(header) as data:
            found = opened(header).read(module, data)
        assert found.weight.scheme == opened(header).scheme_of(module)
        assert found.weight.scales[0].dtype == torch.float8_e4m3fn
        expected = wanted[number] * outer[number]
        np.testing.assert_allclose(found.weight.dequantize().numpy(), expected, rtol=2e-7)


@pytest.mark.parametrize("kind", ["q4_k", "F32"])
def test_one_expert_of_a_stack(tmp_path: Path, kind: str) -> None:
    raw = random_blocks("q4_k", rows=12)
    shape = (4, columns_of("q4_k", raw))
    values = dequantized("q4_k", raw).reshape(3, *shape)
    stack = floats("blk.0.attn_q.weight", values)
    if kind == "q4_k":
        stack = block_tensor("blk.0.attn_q.weight", "q4_k", raw, (3, *shape))
    bias = np.arange(12, dtype=np.float32).reshape(3, 4)
    header = written(tmp_path, stack, floats("blk.0.attn_q.bias", bias))
    with TensorData(header) as data:
        for number in range(3):
            found = opened(header).read(StoredModule("q", "blk.0.attn_q", shape, number, 3), data)
            assert np.array_equal(found.weight.dequantize().numpy(), values[number])
            assert found.bias is not None and np.array_equal(found.bias.numpy(), bias[number])


def test_nvfp4_rows_move_with_their_scales(tmp_path: Path) -> None:
    raw = random_blocks("nvfp4", rows=8)
    shape = (8, columns_of("nvfp4", raw))
    header = written(
        tmp_path,
        block_tensor("blk.0.attn_q.weight", "nvfp4", converters_rows(raw, 2), shape),
        floats("blk.0.attn_q.scale", np.array([2.0], np.float32)),
    )
    found = read(header, shape, rotary_heads=2).weight
    assert np.array_equal(found.dequantize().numpy(), dequantized("nvfp4", raw) * 2)


@pytest.mark.parametrize("kind", ["q4_0", "F32"])
def test_a_scale_beside_another_type_is_left_over(tmp_path: Path, kind: str) -> None:
    """Not taken, so that loading refuses the file, and never read as NVFP4's."""
    raw = random_blocks("q4_0", rows=4)
    weight = block_tensor("blk.0.attn_q.weight", "q4_0", raw, (4, columns_of("q4_0", raw)))
    if kind == "F32":
        weight = floats("blk.0.attn_q.weight", np.ones((4, 8), np.float32))
    header = written(tmp_path, weight, floats("blk.0.attn_q.scale", np.array([2.0], np.float32)))
    module = StoredModule("q", "blk.0.attn_q", weight.shape)
    assert opened(header).tensors_of(module) == ["blk.0.attn_q.weight"]
    assert read(header, weight.shape).weight.scheme.weight.name in ("gguf_q4_0", "f32")


def refusal(header: CheckpointHeader, shape: tuple[int, ...], rotary_heads: int = 0) -> LowbitError:
    with pytest.raises(LowbitError) as caught:
        read(header, shape, rotary_heads)
    assert "m.gguf" in caught.value.message and "blk.0.attn_q" in caught.value.message
    return caught.value


def test_missing_weight(tmp_path: Path) -> None:
    header = written(tmp_path, floats("other.weight", np.ones((2, 4), np.float32)))
    assert opened(header).tensors_of(StoredModule("q", "blk.0.attn_q", (2, 4))) == ["blk.0.attn_q.weight"]
    assert refusal(header, (2, 4)).code == "E0209"


def test_another_shape(tmp_path: Path) -> None:
    header = written(tmp_path, floats("blk.0.attn_q.weight", np.ones((2, 4), np.float32)))
    error = refusal(header, (4, 2))
    assert error.code == "E0210" and "[2, 4]" in error.message and "[4, 2]" in error.message


def test_integers_are_no_weights(tmp_path: Path) -> None:
    header = written(tmp_path, GgufTensor("blk.0.attn_q.weight", "I32", (2, 4), bytes(32)))
    error = refusal(header, (2, 4))
    assert error.code == "E0219" and "I32" in error.message


@pytest.mark.parametrize("bias", [np.ones(3, np.float32), np.ones((1, 2), np.float32)])
def test_another_bias(tmp_path: Path, bias: np.ndarray) -> None:
    weight = floats("blk.0.attn_q.weight", np.ones((2, 4), np.float32))
    header = written(tmp_path, weight, floats("blk.0.attn_q.bias", bias))
    error = refusal(header, (2, 4))
    assert error.code == "E0210" and str(list(bias.shape)) in error.message


@pytest.mark.parametrize(
    "outer", [np.ones(2, np.float32), np.ones((1, 1), np.float32), np.ones(1, np.float16)]
)
def test_another_outer_scale(tmp_path: Path, outer: np.ndarray) -> None:
    raw = random_blocks("nvfp4", rows=4)
    shape = (4, columns_of("nvfp4", raw))
    weight = block_tensor("blk.0.attn_q.weight", "nvfp4", raw, shape)
    error = refusal(written(tmp_path, weight, floats("blk.0.attn_q.scale", outer)), shape)
    assert error.code == "E0210" and str(list(outer.shape)) in error.message


def test_heads_that_do_not_divide_the_rows(tmp_path: Path) -> None:
    header = written(tmp_path, floats("blk.0.attn_q.weight", np.ones((6, 4), np.float32)))
    error = refusal(header, (6, 4), rotary_heads=2)
    assert error.code == "E0210" and "6 rows" in error.message and "2 heads" in error.message


def test_the_embedded_models_first_layer(embedded_path: Path) -> None:
    """q and k in the model's row order, v as it lies: what the converter makes of them is in the file."""
    header = read_gguf_header(embedded_path)
    with TensorData(header) as data:
        for name, heads in (("attn_q", 9), ("attn_k", 3), ("attn_v", 0)):
            entry = header.tensors[f"blk.0.{name}.weight"]
            module = StoredModule(name, f"blk.0.{name}", entry.shape)
            stored = opened(header).read(module, data)
            found = in_order(header, module, stored, heads).weight.dequantize().numpy()
            expected = dequantized(entry.dtype.lower(), data.tensor(entry.name).numpy())
            assert np.array_equal(converters_rows(found, heads) if heads else found, expected)
