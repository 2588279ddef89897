"""torchao: the tool's own files and values, what it may write into metadata, and what is written here."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from formats.helpers import check_values, expected, fixture_cases, header_of, read, reader_of, write_folder
from formats.mutations import Seed, leaves, verdict, with_leaf
from formats.writing_cases import convert_and_compare, cruel, fixtures_it_takes, round_trip, scheme
from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.tensor_data import TensorData
from lowbit.doctor import examine
from lowbit.errors import LowbitError
from lowbit.formats import Notes, StoredLinear, StoredModule, detect
from lowbit.formats.torchao_writer import TorchaoWriter as Writer
from lowbit.kernels.activation_quant import InputTransform
from lowbit.loading import load_model, plan_model
from lowbit.loading.saving import NamedTensor, save_checkpoint
from lowbit.loading.source_modules import ReadModule, SourceModel, SourceModule
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme
from lowbit.numerics.torchao_inputs import (
    MX_MODES,
    PER_ROW,
    PER_TENSOR,
    float8_inputs,
    int8_inputs,
    mx_inputs,
)
from lowbit.quantize.method import Module
from lowbit.quantize.specification import TORCHAO
from quantize.helpers import quantized, scheme_of

CASES = fixture_cases("torchao")
NAME = "model.layers.0.self_attn.q_proj"
WEIGHT = f"{NAME}.weight"
SHAPE = (32, 32)


def case(name: str) -> Path:
    return next(path for path in CASES if path.name == name)


def shape_of(folder: Path) -> tuple[int, int]:
    """The shape of the module NAME."""
    return {"float8dq_tensor": (64, 64), "int4_tiles": (24, 32)}.get(folder.name, SHAPE)


@pytest.mark.parametrize("folder", CASES, ids=lambda path: path.name)
def test_the_tools_own_values(folder: Path) -> None:
    check_values(folder)


def test_what_the_cases_cover() -> None:
    found = {path.name: str(read(path, NAME, shape_of(path)).weight.scheme) for path in CASES}
    assert found == {
        "int8wo": "int8 1xall f32",
        "int8wo_g16": "int8 1x16 f32",
        "int8dq": "int8 1xall f32 (input int8 1xall dynamic bf16)",
        "float8wo": "e4m3 1xall f32",
        "float8dq_row": "e4m3 1xall f32 (input e4m3 1xall dynamic bf16)",
        "float8dq_tensor": "e4m3 allxall f32 (input e4m3 allxall dynamic bf16)",
        "int4_plain": "int4 1x32 bf16 offset",
        "int4_tiles": "bf16",
        "intx4_g32_asym": "uint4 1xall bf16 asym",
        "8da4w": "uint4 1x16 bf16 asym (input int8 1xall dynamic asym)",
        "mxfp4": "e2m1 1x32 e8m0 (input e2m1 1x32 dynamic e8m0)",
        "mxfp6_e2m3": "e2m3 1x32 e8m0 (input e2m3 1x32 dynamic e8m0)",
        "mxfp6_e3m2": "e3m2 1x16 e8m0 (input e3m2 1x16 dynamic e8m0)",
        "mxfp8": "e4m3 1x32 e8m0 (input e4m3 1x32 dynamic e8m0)",
        "mxfp8_e5m2": "e5m2 1x32 e8m0 (input e5m2 1x32 dynamic e8m0)",
        "nvfp4_plain": "e2m1 1x16 e4m3",
        "nvfp4dq": "e2m1 1x16 e4m3 allxall f32",
        "nvfp4dq_static": "e2m1 1x16 e4m3 allxall f32 (input e2m1 1x16 dynamic e4m3)",
        "nvfp4wo": "e2m1 1x16 e4m3 allxall f32",
    }


@pytest.mark.parametrize(
    ("folder", "online"),
    [("int8dq", "int8dq"), ("float8dq_row", "fp8dq-per_row"), ("float8dq_tensor", "fp8dq-per_tensor"),
     ("int8wo", "int8wo"), ("float8wo", "fp8wo"), ("int4_plain", "int4wo-32")],
)  # fmt: skip
def test_a_checkpoint_is_what_its_online_name_makes(folder: str, online: str) -> None:
    """The same scheme, inputs included, as --torchao-config has it."""
    shape = shape_of(case(folder))
    assert read(case(folder), NAME, shape).weight.scheme == scheme_of(online, Module(NAME, shape))


@pytest.mark.parametrize("folder", CASES, ids=lambda path: path.name)
def test_every_tensor_has_a_use(folder: Path) -> None:
    used = set(reader_of(folder).tensors_of(StoredModule(NAME, NAME, shape_of(folder))))
    assert used == {name for name in header_of(folder).tensors if name.startswith(f"{NAME}.")}
    assert {module.scheme.is_dense for module in plan_model(header_of(folder)).modules} == {True, False}


def test_description() -> None:
    assert reader_of(case("int8dq")).describe() == (
        "torchao, Int8Tensor (Int8DynamicActivationInt8WeightConfig) in config.json"
    )


@pytest.mark.parametrize("name", ["int8wo", "nvfp4_plain"])
def test_logits_are_those_of_the_tools_weights(name: str, tmp_path: Path) -> None:
    """transformers in float32 on what torchao dequantized; here the checkpoint itself."""
    import transformers

    folder = case(name)
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    config.dtype = "float32"
    model = transformers.LlamaForCausalLM(config).eval()
    plain = {k: v.float() for k, v in load_file(folder / "model.safetensors").items() if "._weight" not in k}
    weights = {f"{name}.weight": values for name, values in expected(folder).items()}
    model.load_state_dict(plain | weights)
    tokens = [3, 1, 15, 7, 7, 0, 9]
    with torch.no_grad():
        theirs = model(torch.tensor([tokens])).logits[0]
    ours = prompt_logits(load_model(open_checkpoint(str(folder)), device="cpu"), [tokens])[0]
    near = 0.03 * float(theirs.abs().max())
    assert torch.allclose(ours, theirs, atol=near), (ours - theirs).abs().max()
    chosen = theirs.gather(1, ours.argmax(-1, keepdim=True))[:, 0]  # two may be as good as equal
    assert bool((chosen >= theirs.amax(-1) - near).all())


def test_tensors_that_transformers_renamed(tmp_path: Path) -> None:
    """Gemma 3's are language_model.model.… in the file, model.language_model.… in the metadata."""
    with safe_open(case("int8dq") / "model.safetensors", "pt") as file:
        texts = {
            name.replace("model.", "model.language_model.", 1): text for name, text in file.metadata().items()
        }
        tensors = {f"language_model.{name}": file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config = json.loads((case("int8dq") / "config.json").read_text())["quantization_config"]
    folder = write_folder(tmp_path, tensors, config, texts)
    found = read(folder, f"language_model.{NAME}", SHAPE).weight
    wanted = read(case("int8dq"), NAME, SHAPE).weight
    assert found.scheme == wanted.scheme and torch.equal(found.dequantize(), wanted.dequantize())


TILED = "model.layers.0.self_attn.k_proj"


@pytest.mark.parametrize(("inner", "columns"), [(2, 64), (4, 1024), (8, 1152)])
def test_tiles_of_every_depth(inner: int, columns: int, tmp_path: Path) -> None:
    """Against the layout written out: a word has 2 columns of each of 4 pairs of one row."""
    out, padded = 11, -(-columns // 1024) * 1024 if inner > 2 else columns
    codes = torch.randint(0, 16, (16, padded), generator=torch.Generator().manual_seed(3))
    words = torch.zeros(2, padded // (16 * inner), 32, inner // 2, dtype=torch.int64)
    for n, k, lane, w in torch.cartesian_prod(*(torch.arange(size) for size in words.shape)).tolist():
        column = 16 * inner * k + 32 * w + 2 * (lane % 4)
        columns_of_word = [column + step for step in (0, 8, 16, 24, 1, 9, 17, 25)]
        nibbles = codes[8 * n + lane // 4, columns_of_word].tolist()
        words[n, k, lane, w] = sum(code << 4 * nibble for nibble, code in enumerate(nibbles))
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    both = torch.rand(padded // 32, 16, 2).bfloat16() + 0.5
    data = {"block_size": [1, 32], "shape": [out, columns]}
    texts = {f"{TILED}.weight": json.dumps({"_type": "Int4TilePackedTo4dTensor", "_data": data})}
    tensors = {f"{TILED}._weight_qdata": words, f"{TILED}._weight_scale_and_zero": both}
    folder = write_folder(tmp_path, tensors, {"quant_method": "torchao"}, texts)
    scale, zero = (part.T.repeat_interleave(32, 1).float() for part in both.unbind(-1))
    wanted = ((codes - 8) * scale + zero)[:out, :columns]
    assert torch.equal(read(folder, TILED, (out, columns)).weight.dequantize(), wanted)


def test_tiles_of_another_size(tmp_path: Path) -> None:
    with safe_open(case("int4_tiles") / "model.safetensors", "pt") as file:
        texts, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for part, said in (("qdata", "I32 [2, 8, 32, 4]"), ("scale_and_zero", "BF16 [32, 16, 2]")):
        name = f"{TILED}._weight_{part}"
        changed = tensors | {name: tensors[name][:-1]}
        folder = write_folder(tmp_path / part, changed, {"quant_method": "torchao"}, texts)
        with pytest.raises(LowbitError, match=re.escape(said)) as caught:
            read(folder, TILED, (12, 32))
        assert caught.value.code == "E0213"


# ---- metadata and parts that are wrong


def changed(folder: Path, out: Path, change: dict | None = None, **parts: torch.Tensor | None) -> Path:
    """A copy of one module; ``change``: of its metadata's ``_data``; ``parts``: other tensors, None: gone."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith(NAME)}  # noqa: SIM118
    told = json.loads(metadata[WEIGHT])
    told["_type"] = (change or {}).pop("_type", told["_type"])
    told["_data"] |= change or {}
    for part, tensor in parts.items():
        tensors.pop(f"{NAME}._weight_{part}", None)
        if tensor is not None:
            tensors[f"{NAME}._weight_{part}"] = tensor
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return write_folder(out, tensors, config, {WEIGHT: json.dumps(told)})


def dtype(name: str) -> dict:
    return {"_type": "torch.dtype", "_data": name}


def kwargs(kind: str, **data: object) -> dict:
    return {"act_quant_kwargs": {"_type": kind, "_data": data}}


GROUP = {"_type": "PerGroup", "_data": {}}
ROW = {"_type": "PerRow", "_data": {"dim": -1}}
F8, I8 = "QuantizeTensorToFloat8Kwargs", "QuantizeTensorToInt8Kwargs"
MXK, NVK = "QuantizeTensorToMXKwargs", "QuantizeTensorToNVFP4Kwargs"
E4M3, E2M1 = dtype("float8_e4m3fn"), dtype("float4_e2m1fn_x2")
PLAIN = {"act_quant_kwargs": None}
FLOOR = {"_type": "ScaleCalculationMode", "_data": "FLOOR"}
SYM = {"_type": "MappingType", "_data": "SYMMETRIC"}
ASYM = {"_type": "MappingType", "_data": "ASYMMETRIC"}
NO_CLIPPING = {"_type": "MappingType", "_data": "SYMMETRIC_NO_CLIPPING_ERR"}
TENSOR = {"_type": "PerTensor", "_data": {}}
WRONG = [
    ("int8wo", {"block_size": [1, 33]}, "E0213", "two divisors of"),
    ("int8wo", {"block_size": None}, "E0213", "two divisors of"),
    ("int8wo", {"block_size": [True, 32]}, "E0213", "two divisors of"),
    ("int8wo", {"block_size": [1, 16]}, "E0213", "with block_size [1, 16] stores"),
    ("int8wo", {"_type": "Int4Tensor"}, "E0213", "a Int4Tensor of"),
    ("int8wo", {"_type": "Evil"}, "E0218", "class 'Evil' are not read"),
    ("int8wo", {"_type": "MXTensor"}, "E0213", "elem_dtype must be one of float8_e4m3fn"),
    ("int8wo", {"_type": "NVFP4Tensor"}, "E0213", "block_size must be a divisor of 32"),
    ("nvfp4wo", {"block_size": 32}, "E0213", "block_size must be 16"),
    ("nvfp4wo", {"is_swizzled_scales": None}, "E0213", "is_swizzled_scales must be true or false"),
    ("nvfp4wo", {"is_swizzled_scales": False}, "E0213", "stores F8_E4M3 [32, 2]"),
    ("nvfp4_plain", {"is_swizzled_scales": True}, "E0213", "stores F8_E4M3 [32, 16]"),
    ("nvfp4wo", {"_type": "MXTensor", "elem_dtype": E2M1}, "E0213", "stores F8_E8M0 [32, 16]"),
    ("mxfp4", {"_type": "NVFP4Tensor", "block_size": 16, **PLAIN}, "E0213", "stores F8_E4M3 [32, 16]"),
    ("mxfp8", {"elem_dtype": dtype("float8_e5m2")}, "E0213", "stores F8_E5M2 [32, 32]"),
    ("mxfp6_e2m3", {"elem_dtype": E2M1}, "E0213", "stores U8 [32, 16]"),
    ("mxfp6_e2m3", {"elem_dtype": "fp6_e4m1"}, "E0213", "elem_dtype must be one of"),
    ("mxfp8", {"block_size": [1, 32]}, "E0213", "block_size must be a divisor of 32"),
    ("mxfp8", kwargs(MXK, elem_dtype=E4M3, block_size=32), "E0213", "scaling_mode of floor, even"),
    ("mxfp8", kwargs(MXK, elem_dtype=E4M3, scaling_mode=FLOOR), "E0213", "a block_size that"),
    ("mxfp8", kwargs(MXK, elem_dtype="fp5", block_size=32, scaling_mode=FLOOR), "E0213", "elem_dtype of"),
    ("mxfp8", kwargs(F8), "E0213", "null or QuantizeTensorToMXKwargs"),
    ("nvfp4dq", kwargs(NVK, block_size=16), "E0213", "use_dynamic_per_tensor_scale true or false"),
    ("nvfp4dq", kwargs(NVK, block_size=8, use_dynamic_per_tensor_scale=True), "E0213", "block_size 16"),
    ("int8wo", {"_type": "AffineQuantizedTensor"}, "E0218", "torchao 0.15 or newer"),
    ("int8wo", {"_type": "Int4PlainInt32Tensor"}, "E0218", "int4_packing_format=PLAIN"),
    ("int8wo", {"_type": "AffineQuantizedTensor"}, "E0218", "torchao 0.15 or newer"),
    ("int8wo", {"_type": "Int4PlainInt32Tensor"}, "E0218", "XPU"),
    ("int8wo", kwargs("os.system"), "E0213", "act_quant_kwargs must be"),
    ("int8dq", kwargs(I8, granularity=TENSOR, mapping_type=ASYM), "E0218", "are computed per row"),
    ("int8dq", kwargs(I8, granularity=ROW, mapping_type=NO_CLIPPING), "E0218", "without clipping errors"),
    ("int8dq", kwargs(I8, granularity=ROW, mapping_type=SYM, reduce_range=True), "E0218", "reduced-range"),
    ("int8dq", kwargs(I8, granularity=GROUP, mapping_type=SYM), "E0218", "PerGroup"),
    ("float8wo", {"block_size": [32, 32]}, "E0213", "stores"),
    ("float8dq_row", kwargs(F8, float8_dtype=dtype("float8_e5m2"), granularity=ROW), "E0218", "float8_e5m2"),
    ("float8dq_row", kwargs(F8, float8_dtype=E4M3, granularity=ROW, hp_value_lb=1.0), "E0218", "lower bound"),
    ("float8dq_row", kwargs(F8, float8_dtype=E4M3, granularity=ROW, hp_value_ub=-1), "E0213", "hp_value_ub"),
    ("float8dq_row", kwargs(F8, float8_dtype=E4M3, granularity=None), "E0218", "None scales"),
    ("int4_plain", {"shape": [32, 64]}, "E0210", "[32, 64] but the config asks for [32, 32]"),
    ("int4_plain", {"activation_dtype": E4M3}, "E0218", "float8 inputs"),
    ("int4_plain", {"block_size": [2, 32]}, "E0213", "[1, group]"),
    ("intx4_g32_asym", {"target_dtype": dtype("int9")}, "E0213", "torch.int1 to torch.int8"),
    ("intx4_g32_asym", {"target_dtype": dtype("int2")}, "E0213", "has -2 to 1"),
    ("intx4_g32_asym", {"activation_quantization": "int8_sym"}, "E0213", "null or int8_asym_per_token"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "code", "words"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_attributes(name: str, change: dict, code: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(LowbitError) as caught:
        read(changed(case(name), tmp_path, dict(change)), NAME, SHAPE)
    message = str(caught.value)
    assert caught.value.code == code and words in message and "\n" not in message


def test_inputs_that_need_all_tokens_stay_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    assert read(case("nvfp4dq"), NAME, SHAPE).input is None
    assert "one scale for all tokens of a step; they are left as they are" in caplog.text


def test_outer_scales_of_inputs(tmp_path: Path) -> None:
    """A calibrated one, or none."""
    folder = case("nvfp4dq_static")
    stored = load_file(folder / "model.safetensors")[f"{NAME}._weight_act_per_tensor_scale"]
    found = read(folder, NAME, SHAPE).input
    assert found is not None and torch.equal(found.static_scale, stored) and float(stored) > 0
    asked = kwargs(NVK, block_size=16, use_dynamic_per_tensor_scale=False)
    without = read(changed(case("nvfp4_plain"), tmp_path / "a", asked), NAME, SHAPE)
    assert without.input is None and without.weight.scheme.activation is not None
    wrongs = (None, torch.ones(2), torch.ones(()).bfloat16(), torch.tensor(float("nan")))
    for number, wrong in enumerate(wrongs):
        with pytest.raises(LowbitError):
            read(changed(folder, tmp_path / str(number), act_per_tensor_scale=wrong), NAME, SHAPE)


MX_ELEMENTS = {"e4m3": 448.0, "e5m2": 57344.0, "e2m3": 7.5, "e3m2": 28.0, "e2m1": 6.0}


@pytest.mark.parametrize("code", MX_ELEMENTS)
@pytest.mark.parametrize("mode", MX_MODES)
def test_mx_inputs_by_hand(code: str, mode: str) -> None:
    """Largest |x| of 32 columns around each border of a mode; scales by their definitions."""
    largest, digits = MX_ELEMENTS[code], {"e4m3": 3, "e5m2": 2, "e2m3": 3, "e3m2": 2, "e2m1": 1}[code]
    sizes = torch.tensor([1.0, 1 + 2.0**-7, 1.5, 1.75, 1.8125, 1.875, 1.9375, 1.96875, 2 - 2.0**-7, 2.0])
    sizes = torch.cat((sizes, sizes * 2.0**-20, sizes * 2.0**9)).tolist()
    x = torch.rand(len(sizes), 32, generator=torch.Generator().manual_seed(3)) - 0.5
    x = x * torch.tensor(sizes)[:, None]
    x[:, 5] = torch.tensor(sizes)
    found, factor = InputTransform(mx_inputs(number_format(code), 32, mode))(x)
    assert factor is None
    table = number_format(code).table()
    table = table[table.isfinite()]
    for row, size in enumerate(sizes):
        power, top = math.floor(math.log2(size)), math.floor(math.log2(largest))
        mantissa = size / 2.0**power
        exponent = power - top
        if mode == "even":
            exponent += mantissa >= 2 - 2.0 ** -(digits + 1)
        elif mode == "ceil":
            exponent += mantissa > 1
        elif mode == "rceil":
            exponent = math.ceil(math.log2(size / largest))
        scale = 2.0**exponent
        distance = (found[row, :, None] / scale - table).abs().amin(1)
        assert bool((distance == 0).all()), "not a code times the scale"
        nearest = (x[row, :, None] / scale - table).abs().amin(1)
        assert torch.allclose((found[row] - x[row]).abs() / scale, nearest, rtol=0, atol=1e-6), (code, mode)


def test_codes_of_six_bits(tmp_path: Path) -> None:
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[3, 7] = 64
    with pytest.raises(LowbitError, match="has a byte of 64; codes of 6 bits are below 64") as caught:
        read(changed(case("mxfp6_e2m3"), tmp_path, qdata=codes), NAME, SHAPE)
    assert caught.value.code == "E0213"


def test_scales_that_are_not_numbers(tmp_path: Path) -> None:
    """In a tile's padding they are nothing."""
    stored = load_file(case("mxfp8") / "model.safetensors")[f"{NAME}._weight_scale"].view(torch.uint8)
    for place, code in (((0, 0), "E0215"), ((0, 1), "")):  # column 0 of row 0, column 1 of one that there is
        scale = stored.clone()
        scale[place] = 255
        folder = changed(case("mxfp8"), tmp_path / str(place[1]), scale=scale.view(torch.float8_e8m0fnu))
        if code:
            with pytest.raises(LowbitError) as caught:
                read(folder, NAME, SHAPE)
            assert caught.value.code == code
        else:
            read(folder, NAME, SHAPE)


@pytest.mark.slow
@pytest.mark.parametrize("code", MX_ELEMENTS)
@pytest.mark.parametrize("mode", MX_MODES)
def test_mx_inputs_are_the_tools(code: str, mode: str) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    named = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "e2m1": torch.float4_e2m1fn_x2}
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(3)).bfloat16()
    x = x * torch.logspace(-3, 3, 64)[:, None].bfloat16()
    x[0] = 0
    tool = MXTensor.to_mx(x, named.get(code, f"fp6_{code}"), 32, scaling_mode=ScaleCalculationMode(mode))
    found, _ = InputTransform(mx_inputs(number_format(code), 32, mode))(x.float())
    assert torch.equal(found, tool.dequantize(torch.float32))


def test_inputs_with_zero_points(tmp_path: Path) -> None:
    """8da4w, and Int8Tensor that asks for them, as torchao computes them in float32."""
    schemes = [
        read(case("8da4w"), NAME, SHAPE).weight.scheme,
        read(
            changed(case("int8dq"), tmp_path, kwargs(I8, granularity=ROW, mapping_type=ASYM)), NAME, SHAPE
        ).weight.scheme,
    ]
    assert str(schemes[0]) == "uint4 1x16 bf16 asym (input int8 1xall dynamic asym)"
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    x += torch.tensor([[0], [9], [-9], [1], [0]])
    x[4] = 0.0
    low, high = x.amin(1, True).clamp(max=0), x.amax(1, True).clamp(min=0)
    scale = ((high - low) / 255.0).clamp(min=torch.finfo(torch.float32).smallest_normal)
    zero = (-128 - (low / scale).round()).clamp(-128, 127)
    wanted = (((x * (1.0 / scale)).round() + zero).clamp(-128, 127) - zero) * scale
    for found in schemes:
        codes, factor = InputTransform(found.activation)(x)
        assert factor is not None and torch.allclose(codes * factor, wanted, rtol=0, atol=1e-6)


def test_damaged_parts(tmp_path: Path) -> None:
    nan = torch.ones(32, 1)
    nan[5] = float("nan")
    for number, (part, tensor, code) in enumerate(
        [
            ("scale", None, "E0209"),
            ("scale", nan, "E0215"),
            ("scale", torch.ones(1, 32), "E0213"),
            ("qdata", torch.zeros(32, 31, dtype=torch.int8), "E0213"),
            ("qdata", torch.zeros(32, 32), "E0213"),
            ("zero_point", torch.zeros(32, dtype=torch.int8), "E0213"),
            ("act_quant_scale", torch.ones(1), "E0218"),
            ("act_pre_scale", torch.ones(31), "E0213"),
            ("zero_point", None, "E0209"),
        ]
    ):
        folder = changed(case("int8wo"), tmp_path / str(number), None, **{part: tensor})
        with pytest.raises(LowbitError) as caught:
            read(folder, NAME, SHAPE)
        assert caught.value.code == code and "\n" not in str(caught.value), (part, str(caught.value))


def test_zero_points_and_pre_scale_of_the_data_count(tmp_path: Path) -> None:
    zeros = torch.arange(-16, 16, dtype=torch.int8).view(32, 1)
    pre = torch.linspace(0.5, 2, 32).bfloat16()
    linear = read(changed(case("int8wo"), tmp_path, None, zero_point=zeros, act_pre_scale=pre), NAME, SHAPE)
    plain = read(case("int8wo"), NAME, SHAPE).weight
    moved = plain.dequantize() - zeros.float() * plain.scales[0]
    assert str(linear.weight.scheme) == "uint8 1xall f32 asym"
    assert torch.allclose(linear.weight.dequantize(), moved, rtol=1e-6)
    assert linear.input is not None and torch.equal(linear.input.multiplier, pre.float())


def test_upper_bound_of_inputs(tmp_path: Path) -> None:
    told = kwargs(F8, float8_dtype=E4M3, granularity=ROW, hp_value_ub=1200)
    found = read(changed(case("float8dq_row"), tmp_path, told), NAME, SHAPE).weight
    assert found.scheme.activation == float8_inputs(PER_ROW, 1200.0)


def test_zero_divided_by_zero_is_zero(tmp_path: Path) -> None:
    scale = torch.ones(32, 1)
    scale[3] = 0
    codes = torch.full((32, 32), 0.5)
    codes[3] = float("nan")
    folder = changed(case("float8wo"), tmp_path, None, scale=scale, qdata=codes.to(torch.float8_e4m3fn))
    found = read(folder, NAME, SHAPE).weight.dequantize()
    assert found[3].eq(0).all() and found[4].eq(0.5).all()


@pytest.mark.parametrize("kept", [False, True])
def test_lost_metadata(kept: bool, tmp_path: Path) -> None:
    """A tool re-saved the file: nothing says what the tensors are."""
    folder = case("int8wo")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors = load_file(folder / "model.safetensors")
    text = json.dumps({"_type": "Int8Tensor", "_data": {"block_size": [1, 32]}})
    write_folder(tmp_path, tensors, config, {"model.x.weight": text} if kept else None)
    with pytest.raises(LowbitError, match="__metadata__") as caught:
        read(tmp_path, NAME, SHAPE)
    assert caught.value.code == "E0213"
    write_folder(tmp_path, tensors, None)
    with pytest.raises(LowbitError, match="part of a torchao weight but config.json names no quantization"):
        read(tmp_path, NAME, SHAPE)


def test_names_of_0_14_are_refused(tmp_path: Path) -> None:
    """It named every tensor so, plain ones too."""
    text = json.dumps({"_type": "Float8Tensor", "_data": {"block_size": [1, 32]}})
    tensors = {f"{WEIGHT}:qdata": torch.zeros(2, 2), "model.norm.weight:_data": torch.ones(2)}
    write_folder(tmp_path, tensors, {"quant_method": "torchao"}, {WEIGHT: text})
    with pytest.raises(LowbitError, match=r"torchao 0\.14") as caught:
        reader_of(tmp_path)
    assert caught.value.code == "E0218"


def test_stacks_of_experts_are_refused(tmp_path: Path) -> None:
    text = json.dumps({"_type": "Float8Tensor", "_data": {}})
    tensors = {"model.layers.0.mlp.experts._gate_up_proj_qdata": torch.zeros(2, 4, 4)}
    write_folder(
        tmp_path, tensors, {"quant_method": "torchao"}, {"model.layers.0.mlp.experts.gate_up_proj": text}
    )
    with pytest.raises(LowbitError, match="stack of experts as Float8Tensor .* or with MXTensor") as caught:
        reader_of(tmp_path)
    assert caught.value.code == "E0218"


EXPERTS = fixture_cases("torchao_experts")


def expert(folder: Path, leaf: str, number: int, **changed: Any) -> QuantizedTensor:
    """One of a stack of two."""
    shape = {"gate_up_proj": (128, 128), "down_proj": (128, 64)}[leaf]
    name = f"model.layers.0.mlp.experts.{leaf}"
    module = StoredModule(f"experts.{number}", name, shape, expert=number, experts=2)
    header = header_of(folder)
    with TensorData(header) as data:
        return detect(header)(header, Notes(True)).read(replace(module, **changed), data).weight


@pytest.mark.parametrize("folder", EXPERTS, ids=lambda path: path.name)
def test_the_tools_own_experts(folder: Path) -> None:
    """Every fourth row of each; the scales of each are tiles of their own."""
    for name, stack in load_file(folder / "expected.safetensors").items():
        for number, values in enumerate(stack):
            weight = expert(folder, name.rpartition(".")[2], number)
            assert torch.equal(weight.dequantize()[::4], values), (name, number)
    schemes = {
        "mxfp4": "e2m1 1x32 e8m0 (input e2m1 1x32 dynamic e8m0)",
        "nvfp4": "e2m1 1x16 e4m3 allxall f32",  # inputs under one scale for all tokens stay as they are
    }
    plan = plan_model(header_of(folder), device="cpu")
    experts = [module for module in plan.modules if ".experts." in module.name]
    assert len(experts) == 4 and {str(module.scheme) for module in experts} == {schemes[folder.name]}


def test_a_mixture_of_the_tools_experts() -> None:
    """Logits beside transformers' with the experts' numbers as they are read."""
    [folder] = [folder for folder in EXPERTS if folder.name == "nvfp4"]
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    config.dtype = torch.float32
    wanted = transformers.Qwen3MoeForCausalLM(config).eval()
    with TensorData(header_of(folder)) as data, torch.no_grad():
        for name, parameter in wanted.named_parameters():
            leaf = name.rpartition(".")[2]
            if ".experts." in name:
                parameter.copy_(torch.stack([expert(folder, leaf, i).dequantize() for i in range(2)]))
            else:
                parameter.copy_(data.tensor(name).float())
        tokens = [3, 7, 1, 15, 0, 9, 9, 2]
        logits = wanted(torch.tensor([tokens])).logits[0]
    model = load_model(header_of(folder), device="cpu", kv_cache_dtype="f32", linear_kernel="reference")
    found = prompt_logits(model, [tokens])[0]
    assert (found - logits).abs().max() <= 1e-2 * logits.abs().max()


def test_experts_that_cannot_be(tmp_path: Path) -> None:
    [folder] = [folder for folder in EXPERTS if folder.name == "nvfp4"]
    with pytest.raises(LowbitError, match=r"lies as \(experts, in, out\)") as caught:
        expert(folder, "down_proj", 0, transposed=True)
    assert caught.value.code == "E0218"
    with pytest.raises(LowbitError, match=r"stores .* \[3, 128, 32\]") as caught:
        expert(folder, "down_proj", 0, experts=3)
    assert caught.value.code == "E0213"
    seed = Seed.of(folder)
    name = "model.layers.0.mlp.experts._down_proj_per_tensor_scale"
    changed = seed.write(tmp_path, seed.config, seed.tensors | {name: torch.ones(2)})
    with pytest.raises(LowbitError, match=r"\[2, 1, 1\]") as caught:
        expert(changed, "down_proj", 0)
    assert caught.value.code == "E0213"
    one = seed.write(tmp_path / "one", seed.config, seed.tensors | {name: torch.tensor(2.0)})
    doubled = seed.tensors[name].flatten()[1] / 2
    assert torch.allclose(
        expert(one, "down_proj", 1).dequantize() * doubled, expert(folder, "down_proj", 1).dequantize()
    )
    few = {
        "model.layers.0.mlp.experts._down_proj_qdata": torch.zeros(2, 64, 32, dtype=torch.uint8),
        name: torch.tensor(1.0),
    }
    short = seed.write(tmp_path / "short", seed.config, seed.tensors | few)
    with pytest.raises(LowbitError, match="false for experts of 64 rows, no whole tiles") as caught:
        expert(short, "down_proj", 0, shape=(64, 64))
    assert caught.value.code == "E0213"


SEEDED = [
    "int8dq",
    "float8dq_row",
    "int4_plain",
    "intx4_g32_asym",
    "nvfp4dq_static",
    "nvfp4_plain",
    "mxfp4",
    "mxfp8",
]


@pytest.mark.parametrize("name", SEEDED)
@pytest.mark.parametrize("count", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_seeded_metadata(name: str, count: int, tmp_path: Path) -> None:
    """Every leaf of one weight's description made wrong: refused, or the same weights and inputs.

    But for whether inputs have a scale of all tokens, on which nothing stored depends. With the slow tests by
    all ten values; else by four, which are others for the same leaf of the next case.
    """
    seed = Seed.of(case(name))
    told = json.loads(seed.metadata[WEIGHT])
    values = (0, "nonsense", -1, None, 7, [], 2**40, True, 1.5, {})
    seen = set()
    for place, path in enumerate(leaves(told), SEEDED.index(name) * 4):
        for number in range(place, place + count):
            text = json.dumps(with_leaf(told, path, values[number % len(values)]))
            folder = tmp_path / f"{number}-{'-'.join(map(str, path))}"
            metadata = seed.metadata | {WEIGHT: text}
            found = verdict(seed, folder, seed.config, seed.tensors, metadata)
            if path[-1] != "use_dynamic_per_tensor_scale":
                seen.add(found)
    assert any(found.startswith("refused") for found in seen) and "equal" in seen
    assert not any(found.startswith("silent") for found in seen)


def test_another_prefix_is_read_but_not_corrected(tmp_path: Path) -> None:
    """The names in the metadata would have to be corrected too."""
    seed = Seed.of(case("int8wo"))

    def renamed(name: str) -> str:
        return name.replace("model.", "language_model.model.") if name.startswith("model.") else name

    tensors = {renamed(name): tensor for name, tensor in seed.tensors.items()}
    metadata = {renamed(name): text for name, text in seed.metadata.items()}
    folder = Seed("", seed.config, {}, {}, metadata).write(tmp_path, seed.config, tensors)
    [finding] = [found for found in examine(folder).report.findings if found.rule == "D112"]
    assert not finding.fix and finding.severity != "error"
    found = read(folder, renamed(NAME), SHAPE).weight
    assert torch.equal(found.dequantize(), read(case("int8wo"), NAME, SHAPE).weight.dequantize())


# ---- written


F32 = "f32"
SCHEMES = [
    scheme("int8", (1, 0), scales=F32),
    scheme("int8", (0, 0), scales=F32),
    scheme("int8", (1, 16), scales=F32),
    scheme("int8", (1, 0), scales=F32, activation=int8_inputs()),
    scheme("int8", (1, 0), scales=F32, activation=int8_inputs(PER_TENSOR)),
    scheme("e4m3", (1, 0), scales=F32),
    scheme("e4m3", (1, 0), scales=F32, activation=float8_inputs()),
    scheme("e4m3", (0, 0), scales=F32, activation=float8_inputs(PER_TENSOR, 1200.0)),
    scheme("e4m3", (8, 32), scales=F32),
    scheme("int4", (1, 32), scales="bf16", offset=True),
    *(scheme(f"int{bits}", (1, 32), scales="bf16") for bits in (2, 3, 4, 8)),
    *(scheme(f"uint{bits}", (1, 16), scales="f16", zero=True) for bits in (2, 4, 7, 8)),
    *(scheme(code, (1, 32), scales="e8m0") for code in ("e2m1", "e2m3", "e3m2", "e4m3", "e5m2")),
    *(
        scheme("e2m1", (1, 16), scales="e8m0", activation=mx_inputs(number_format("e4m3"), 32, mode))
        for mode in MX_MODES
    ),
    scheme("e2m1", (1, 16), scales="e4m3"),
]


@pytest.mark.parametrize("made", SCHEMES, ids=str)
def test_round_trip(made: Scheme, tmp_path: Path) -> None:
    names = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
    modules = {name: StoredLinear(cruel(made, (24, 64), n)) for n, name in enumerate(names)}
    round_trip(tmp_path, Writer, modules)


def test_mixed_kinds(tmp_path: Path) -> None:
    modules = {f"m{n}": StoredLinear(cruel(made, (24, 64), n)) for n, made in enumerate(SCHEMES)}
    round_trip(tmp_path, Writer, modules)


@pytest.mark.parametrize("name", sorted(TORCHAO))
def test_what_the_online_names_make_is_stored(name: str, tmp_path: Path) -> None:
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(3)).bfloat16()
    round_trip(tmp_path, Writer, {NAME: StoredLinear(quantized(name, weight))})


@pytest.mark.parametrize("folder", fixtures_it_takes(Writer, "torchao"), ids=lambda folder: folder.name)
def test_fixtures(folder: Path, tmp_path: Path) -> None:
    convert_and_compare(folder, "torchao", tmp_path / "out")


def test_takes_every_fixture() -> None:
    assert fixtures_it_takes(Writer, "torchao") == CASES


def test_shards_each_describe_their_own(tmp_path: Path) -> None:
    from lowbit.loading.convert import convert

    convert(open_checkpoint(str(case("int8dq"))), "torchao", tmp_path / "out", shard_bytes=4096)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    told = []
    for path in shards:
        with safe_open(path, "pt") as file:
            assert WEIGHT in json.loads(file.metadata()["tensor_names"])
            told += [name for name in file.metadata() if name.endswith(".weight")]
    assert len(told) == len(set(told)) == 7
    for name, values in expected(case("int8dq")).items():
        found = read(tmp_path / "out", name, (values.shape[0], values.shape[1])).weight
        assert torch.equal(found.dequantize(), values)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (scheme("int8", (1, 48), scales=F32), "blocks divide"),
        (scheme("int4", (1, 32), scales="bf16", reordered=True), "columns in their order"),
        (scheme("nf4", (1, 64), scales=F32), "none of its tensors"),
        (scheme("uint4", (1, 32), scales="bf16", offset=True), "none of its tensors"),
        (scheme("e4m3", (1, 0), scales="bf16"), "none of its tensors"),
        (scheme("int4", (1, 32), scales="bf16", activation=int8_inputs()), "none of its tensors"),
        (scheme("e2m1", (1, 16), scales="e8m0", activation=int8_inputs()), "none of its tensors"),
        (scheme("e2m1", (1, 32), scales="e4m3"), "none of its tensors"),
        (scheme("e2m1", (2, 32), scales="e8m0"), "none of its tensors"),
        (scheme("e2m1", (1, 48), scales="e8m0"), "blocks divide"),
    ],
    ids=str,
)  # fmt: skip
def test_refusals(made: Scheme, reason: str) -> None:
    assert reason in (Writer.refuses_to_write(made, (64, 128)) or "")


def loaded_by_torchao(folder: Path) -> dict[str, Any]:
    """The state dict that torchao puts together again, shards and all."""
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    tensors, metadata = {}, {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        with safe_open(path, "pt") as file:
            metadata |= file.metadata()
    found, plain = unflatten_tensor_state_dict(tensors, metadata)
    return plain | found


def test_odd_columns_and_inputs_without_a_scale_are_refused(tmp_path: Path) -> None:
    odd = Writer.refuses_to_write(scheme("e2m1", (1, 5), scales="e8m0"), (8, 15))
    assert odd is not None and "codes of two columns, not of one of 15" in odd
    static = case("nvfp4dq_static")
    found = read(static, NAME, SHAPE)
    module = StoredModule(NAME, NAME, SHAPE)
    with pytest.raises(LowbitError, match="no scale of the whole tensor") as caught:
        Writer({NAME: found.weight.scheme}).write(module, found.weight)
    assert caught.value.code == "E0450"


@pytest.mark.slow
@pytest.mark.parametrize("folder", CASES, ids=lambda path: path.name)
def test_the_tool_loads_them(folder: Path, tmp_path: Path) -> None:
    """transformers and torchao load what is written and dequantize it to the same weights."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    import transformers

    from lowbit.loading.convert import convert

    convert(open_checkpoint(str(folder)), "torchao", tmp_path / "out", shard_bytes=8192)
    if folder.name == "nvfp4dq_static":  # transformers 5.23 knows no act_per_tensor_scale, its own neither
        weights = loaded_by_torchao(tmp_path / "out")
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
        weights = dict(model.named_parameters())
    for name, values in expected(folder).items():
        weight = weights[f"{name}.weight"]
        if type(weight).__name__ == "Int4Tensor":
            codes = torch.stack((weight.qdata & 15, weight.qdata >> 4 & 15), -1).flatten(1)
            found = (codes ^ 8).float() - 8
            group = weight.block_size[1]
            scale, zero = (
                part.T.float().repeat_interleave(group, 1) for part in (weight.scale, weight.zero_point)
            )
            found = found * scale + zero
        elif type(weight).__name__ == "IntxUnpackedToInt8Tensor":
            assert torch.equal(weight.dequantize(), values.bfloat16())
            continue
        else:
            found = weight.dequantize(torch.float32)
        assert torch.equal(found, values), name


@pytest.mark.slow
def test_the_tool_loads_mixed_kinds(tmp_path: Path) -> None:
    """Every class in one model, asked for by FqnToConfig, in several shards."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    from transformers import LlamaForCausalLM

    kinds = [SCHEMES[n] for n in (0, 3, 6, 7, 9, 11, 15)]
    source, plan, parts, wanted = SourceModel(header_of(case("int8wo"))), {}, [], {}
    with TensorData(source.header) as data:
        for part in source.parts:
            if not isinstance(part, SourceModule):
                parts.append(NamedTensor(part.target, source.read_vector(part, data)))
                continue
            read_module, name = source.read(part, data), part.target.stored
            if not part.scheme.is_dense:
                made = cruel(kinds[len(wanted)], part.target.shape, len(wanted))
                read_module = ReadModule(part.target, made)
                wanted[name] = made
            plan[name] = read_module.weight.scheme
            parts.append(read_module)
        config = source.hf_config(data)
        out = tmp_path / "out"
        save_checkpoint(
            out,
            source.header,
            config,
            lambda known: parts,
            Writer(plan),
            nbytes=1 << 16,
            tensors=64,
            shard_bytes=4096,
        )
    assert len(list(out.glob("model-*.safetensors"))) > 1
    model = LlamaForCausalLM.from_pretrained(out, device_map="cpu")
    for name, made in wanted.items():
        weight = model.get_submodule(name).weight
        kind = type(weight).__name__
        if kind in ("Int8Tensor", "Float8Tensor"):
            assert torch.equal(weight.dequantize(torch.float32), made.dequantize()), name
        elif kind == "Int4Tensor":
            assert torch.equal(weight.scale.T, made.scales[0])
            assert torch.equal(weight.zero_point.T, made.offsets[0])
        else:
            half = 1 << int(made.scheme.weight.bits) - 1
            assert torch.equal(weight.qdata.short(), made.codes.short() - half), name
    assert len({type(model.get_submodule(name).weight) for name in wanted}) == 4


def test_a_single_row_is_a_row(tmp_path: Path) -> None:
    made = scheme("int8", (1, 0), scales=F32)
    weight = QuantizedTensor(made, (1, 64), torch.zeros(1, 64, dtype=torch.uint8), (torch.ones(1, 1),))
    round_trip(tmp_path, Writer, {NAME: StoredLinear(weight)})


def test_the_doctor_reads_them() -> None:
    """Without a tokenizer, so without its language canary; nothing else to say."""
    for folder in CASES:
        findings = examine(folder).report.findings
        assert all(finding.severity == "note" for finding in findings), (folder.name, findings)
