"""bitsandbytes written: read back as it was, and against the tool's own stored tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from formats.helpers import FIXTURES, read, write_folder
from formats.writing_cases import convert_and_compare, cruel, fixtures_it_takes, round_trip, scheme
from lowbit.errors import LowbitError
from lowbit.formats import StoredLinear, StoredModule
from lowbit.formats.bitsandbytes_writer import BitsAndBytesWriter as Writer
from lowbit.numerics.llm_int8 import INT8_STEP, llm_int8_inputs
from lowbit.numerics.nested_scales import NestedScales, dynamic_table
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

INT8 = scheme("int8", (1, 0), scales="f32", activation=llm_int8_inputs(5.0))


def linear(made: Scheme, shape: tuple[int, int], seed: int) -> StoredLinear:
    weight = cruel(made, shape, seed)
    if made == INT8:
        maxima = torch.rand(shape[0], 1, generator=torch.Generator().manual_seed(seed)) + 0.1
        weight = QuantizedTensor(made, shape, weight.codes, (maxima * INT8_STEP,))
    bias = torch.arange(shape[0], dtype=torch.bfloat16) if seed % 2 else None
    return StoredLinear(weight, bias)


@pytest.mark.parametrize("codes", ["nf4", "fp4_bnb"])
@pytest.mark.parametrize(
    ("shape", "size"), [((24, 128), 64), ((13, 96), 64), ((5, 7), 16), ((3, 4096), 4096)]
)
def test_four_bits(codes: str, shape: tuple[int, int], size: int, tmp_path: Path) -> None:
    made = scheme(codes, (1, size), scales="f32", flattened=shape[1] % size != 0)
    modules = {f"model.layers.{n}.mlp.up_proj": linear(made, shape, n) for n in range(2)}
    round_trip(tmp_path, Writer, modules)


@pytest.mark.parametrize(
    ("plain", "told"), [("f16", "float16"), ("bf16", "bfloat16"), ("f32", "float32"), ("", "bfloat16")]
)
def test_computes_in_the_models_own_type(plain: str, told: str) -> None:
    """bfloat16 has three bits fewer than the numbers of a float16 model."""
    made = scheme("nf4", (1, 64), scales="f32")
    others = {f"model.layers.{n}.mlp.gate": Scheme(number_format(plain)) for n in range(2) if plain}
    up, router = "model.layers.0.mlp.up_proj", {"model.layers.2.mlp.gate": Scheme(number_format("f32"))}
    writer = Writer({up: made, **others, **(router if plain else {})})
    assert writer.quantization_config()["bnb_4bit_compute_dtype"] == told
    written = writer.write(StoredModule(up, up, (4, 64)), cruel(made, (4, 64), 0))
    state = json.loads(bytes(written[f"{up}.weight.quant_state.bitsandbytes__nf4"].tolist()))
    assert state["dtype"] == told


def test_int8(tmp_path: Path) -> None:
    modules = {f"model.layers.{n}.mlp.up_proj": linear(INT8, (33, 40), n) for n in range(2)}
    round_trip(tmp_path, Writer, modules)


def test_table_is_the_tools() -> None:
    stored = load_file(FIXTURES / "bitsandbytes" / "nf4_double" / "model.safetensors")
    name = next(name for name in stored if name.endswith("nested_quant_map"))
    assert torch.equal(dynamic_table(), stored[name])


def test_double_quantization(tmp_path: Path) -> None:
    """Scales that were quantized again are stored so, and read as what they stand for."""
    made = scheme("nf4", (1, 64), scales="f32")
    weight = cruel(made, (40, 1024))  # 640 scales: two whole blocks and a rest
    nested = NestedScales.of(weight.scales[0])
    distance = (nested.values() - weight.scales[0].flatten()).abs().max()
    assert 0 < distance <= 0.02
    rounded = QuantizedTensor(made, weight.shape, weight.codes, (nested.values().view(40, -1),))
    writer = Writer({"x": made})
    writer.nested["x"] = nested
    tensors = writer.write(StoredModule("x", "x", (40, 1024)), rounded)
    assert tensors["x.weight.absmax"].dtype == torch.uint8 and tensors["x.weight.nested_absmax"].shape == (3,)
    config = writer.quantization_config()
    assert config["bnb_4bit_use_double_quant"] is True
    found = read(write_folder(tmp_path, tensors, config), "x", (40, 1024), strict=True).weight
    assert torch.equal(found.scales[0], rounded.scales[0]) and torch.equal(found.codes, rounded.codes)
    with pytest.raises(LowbitError, match="not those that were quantized again"):
        writer.write(StoredModule("x", "x", (40, 1024)), weight)


@pytest.mark.slow
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("codes", ["nf4", "fp4_bnb"])
def test_the_tool_dequantizes_them(codes: str, double: bool) -> None:
    """bitsandbytes' QuantState from the written tensors, and its own double quantization beside ours."""
    tool = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").functional
    made, kind = scheme(codes, (1, 64), scales="f32"), codes.removesuffix("_bnb")
    weight = cruel(made, (40, 1024))
    writer = Writer({"x": made}, "float32")
    if double:
        matrix = torch.randn(40, 1024, generator=torch.Generator().manual_seed(2))
        _, state = tool.quantize_4bit(matrix, quant_type=kind, compress_statistics=True)
        _, plain = tool.quantize_4bit(matrix, quant_type=kind)
        nested = NestedScales.of(plain.absmax)
        # Its CPU kernel multiplies by a reciprocal: now and then a neighbouring entry.
        apart = (nested.codes.int() - state.absmax.int()).abs()
        assert int(apart.max()) <= 1 and int((apart > 0).sum()) <= 6
        assert torch.allclose(nested.steps, state.state2.absmax, rtol=2e-7, atol=0)
        assert nested.offset == float(state.offset)
        weight = QuantizedTensor(made, weight.shape, weight.codes, (nested.values().view(40, -1),))
        writer.nested["x"] = nested
    tensors = writer.write(StoredModule("x", "x", (40, 1024)), weight)
    parts = {name.removeprefix("x."): tensor for name, tensor in tensors.items() if name != "x.weight"}
    state = tool.QuantState.from_dict(parts, device=torch.device("cpu"))
    found = tool.dequantize_4bit(tensors["x.weight"], state)
    assert found.dtype == torch.float32
    assert torch.equal(found, weight.dequantize())


@pytest.mark.parametrize("folder", fixtures_it_takes(Writer, "*"), ids=lambda f: f"{f.parent.name}-{f.name}")
def test_fixtures(folder: Path, tmp_path: Path) -> None:
    """All but int8 with scales that are no row's largest weight times the tool's constant."""
    try:
        convert_and_compare(folder, "bitsandbytes", tmp_path / "out")
    except LowbitError as error:
        assert folder.name == "w8a8_int8" and "no float32 times 0.00787" in error.message, error.message


def test_takes_all_it_should() -> None:
    taken = {folder.name for folder in fixtures_it_takes(Writer, "bitsandbytes")}
    assert taken >= {"nf4", "nf4_double", "fp4_double_odd", "int8", "nf4_odd", "nf4_storage_bf16"}


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (scheme("nf4", (1, 64), scales="f16"), "float32 scales"),
        (scheme("nf4", (1, 48), scales="f32"), "a power of two"),
        (scheme("nf4", (1, 64), scales="f32", flattened=True), "blocks run over the flat weight"),
        (scheme("int8", (1, 0), scales="f32"), "LLM.int8"),
        (scheme("int4", (1, 64), scales="f32"), "nf4, fp4 or int8"),
    ],
    ids=str,
)
def test_refusals(made: Scheme, reason: str) -> None:
    assert reason in (Writer.refuses_to_write(made, (64, 128)) or "")


def test_one_kind_a_checkpoint_and_scales_that_are_products() -> None:
    nf4 = scheme("nf4", (1, 64), scales="f32")
    with pytest.raises(LowbitError, match="int8 in b, nf4 in a; a checkpoint has one kind"):
        Writer({"a": nf4, "b": INT8})
    weight = cruel(INT8, (512, 8))  # random scales: some are between two products
    with pytest.raises(LowbitError, match=r"of its 512 scales are no float32 times 0\.00787"):
        Writer({"x": INT8}).write(StoredModule("x", "x", (512, 8)), weight)
