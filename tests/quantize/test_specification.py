"""Names and options of online methods: all of them build, quantize to a stated error and refuse in words."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.quantize.method import Method, Module, build_method
from lowbit.quantize.specification import (
    _ELSEWHERE,
    _NOTHING,
    _OF_CHECKPOINTS,
    METHODS,
    TORCHAO,
    MethodSpec,
    method_spec,
    parse_method,
    parse_torchao,
)
from quantize.helpers import NAME, ORIGIN, module_of, quantized

# Root mean square error over that of the weight, for normally distributed weights: the most there may be.
LARGEST_ERROR = {
    "fp8": 0.03,
    "w8a8_fp8": 0.03,
    "mxfp8": 0.03,
    "w8a8_int8": 0.01,
    "blockwise_int8": 0.035,
    "mxfp4": 0.13,
    "nvfp4": 0.115,
    "bitsandbytes": 0.11,
    "nf4": 0.11,
    "fp4": 0.15,
    "hqq": 0.11,
    "rtn": 0.13,
    "int2": 0.65,
    "int3": 0.3,
    "int4": 0.13,
    "int5": 0.06,
    "int6": 0.03,
    "int7": 0.015,
    "int8": 0.008,
    "int8wo": 0.01,
    "int8dq": 0.01,
    "fp8wo": 0.03,
    "fp8dq-per_row": 0.03,
    "fp8dq-per_tensor": 0.03,
    "int4wo-32": 0.09,
    "int4wo-64": 0.11,
    "int4wo-128": 0.12,
    "int4wo-256": 0.145,
}
HERE = [name for name in METHODS if name in LARGEST_ERROR]
OPTIONS = [
    (name, option, value)
    for name in HERE
    for option, choice in METHODS[name].options.items()
    for value in (choice.choices or {bool: ("true", "false"), int: ("1", "64")}.get(choice.kind, ()))
]


def weight(rows: int = 32, columns: int = 256) -> Tensor:
    """As a model's: normal, each row of its own size."""
    generator = torch.Generator().manual_seed(1)
    size = torch.rand(rows, 1, generator=generator) * 0.03 + 0.01
    return (torch.randn(rows, columns, generator=generator) * size).bfloat16()


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative root mean square error, the largest of any row."""
    wanted = wanted.float()
    return float(((found - wanted).pow(2).mean(1) / wanted.pow(2).mean(1)).sqrt().max())


def build(text: str) -> Method:
    return build_method(parse_method(text))


def test_every_data_free_method_of_these_modules_has_a_bound() -> None:
    modules = {METHODS[name].module for name in HERE}
    assert modules == {"floats", "integers", "bitsandbytes", "hqq", "torchao"}
    assert set(HERE) == {name for name, entry in METHODS.items() if entry.module in modules}
    assert set(HERE) == set(LARGEST_ERROR)


@pytest.mark.parametrize("name", HERE)
def test_every_method_quantizes_to_its_error(name: str) -> None:
    found = error(quantized(name, weight()).dequantize(), weight())
    assert LARGEST_ERROR[name] / 4 < found < LARGEST_ERROR[name]


@pytest.mark.parametrize("name", HERE)
def test_rows_are_not_swapped(name: str) -> None:
    """Rows in another order give the same rows in that order."""
    order = torch.randperm(32, generator=torch.Generator().manual_seed(2))
    mixed = quantized(name, weight()[order]).dequantize()
    straight = quantized(name, weight()).dequantize()[order]
    if name == "hqq":  # how often it iterates depends on a mean over all rows
        torch.testing.assert_close(mixed, straight, atol=1e-3, rtol=0)
    else:
        assert torch.equal(mixed, straight)


@pytest.mark.parametrize(("name", "option", "value"), OPTIONS)
def test_every_choice_of_every_option(name: str, option: str, value: str, tmp_path: Path) -> None:
    text = f"{name}:{option}={value}"
    if option == "group_size" and value == "1":
        text = text.replace("=1", "=-1" if name != "hqq" else "=8")
    if value == "static":
        save_file({f"{NAME}.input_scale": torch.tensor(0.5)}, tmp_path / "scales.safetensors")
        text += f",scales={tmp_path / 'scales.safetensors'}"
    spec = parse_method(text)
    assert str(spec.options[option]).lower() in text and spec.text == text
    found = build_method(spec).quantize(weight(), module_of(weight()), ORIGIN)
    assert error(found.weight.dequantize(), weight()) < 0.9
    assert (found.static_scale is not None) == (value == "static")
    assert found.weight.scheme == build_method(spec).scheme_of(module_of(weight()))


def test_options_decide_the_scheme() -> None:
    module = module_of(weight())
    for text, words in {
        "fp8": "e4m3 1xall f32 (input e4m3 1xall dynamic)",
        "fp8:weights=tensor,activation=tensor": "e4m3 allxall f32 (input e4m3 allxall dynamic)",
        "fp8:weights=block": "e4m3 128x128 f32 (input e4m3 1x128 dynamic)",
        "fp8:activation=none": "e4m3 1xall f32",
        "fp8:activation=delayed": "e4m3 1xall f32 (input e4m3 allxall delayed)",
        "w8a8_fp8:activation=none": "e4m3 1xall f32",
        "w8a8_int8": "int8 1xall f32 (input int8 1xall dynamic)",
        "blockwise_int8": "int8 128x128 f32 (input int8 1x128 dynamic)",
        "mxfp4:activation=group": "e2m1 1x32 e8m0 (input e2m1 1x32 dynamic e8m0)",
        "mxfp8": "e4m3 1x32 e8m0",
        "nvfp4": "e2m1 1x16 e4m3 allxall f32",
        "rtn:bits=3,group_size=64": "uint3 1x64 f16 asym",
        "int8:symmetric=true,group_size=-1": "int8 1xall f16",
        "int4": "uint4 1x128 f16 asym",
        "hqq:bits=2": "uint2 1x64 f16 float-zero",
        "fp4:double_quant=true": "fp4_bnb 1x64 f32",
        "bitsandbytes:type=int8": "int8 1xall f32 (input int8 1xall dynamic outliers 6)",
        "int4wo-32": "int4 1x32 bf16 offset",
        "int8dq": "int8 1xall f32 (input int8 1xall dynamic bf16)",
        "fp8dq-per_tensor": "e4m3 allxall f32 (input e4m3 allxall dynamic bf16)",
    }.items():
        assert str(build(text).scheme_of(module)) == words, text


def test_the_same_numerics_have_the_same_key() -> None:
    assert parse_method("fp8").key == parse_method("fp8:weights=channel").key
    assert parse_method("fp8").key != parse_method("fp8:weights=tensor").key
    assert parse_method("int4").key != parse_method("int3").key
    assert method_spec("rtn", {"bits": 3, "symmetric": True}, "recipe.json").key == (
        parse_method("rtn:symmetric=TRUE,bits=3").key
    )


def test_names_of_other_engines_lead_to_methods() -> None:
    assert set(_ELSEWHERE.values()) <= set(METHODS)
    assert not set(METHODS) & {*_ELSEWHERE, *_OF_CHECKPOINTS, *_NOTHING}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fp9", r"unknown quantization method 'fp9'; did you mean 'fp\d'\? Known: fp8, "),
        ("", "unknown quantization method ''. Known: "),
        ("zzzzzz", "unknown quantization method 'zzzzzz'. Known: "),
        ("Q4_K_M", "'Q4_K_M' is a type of GGUF files; write gguf:type=q4_k_m"),
        ("iq4_nl", "'iq4_nl' is a type of GGUF files; write gguf:type=iq4_nl"),
        ("modelopt_fp4", "'modelopt_fp4' is another engine's name; use nvfp4"),
        ("auto-round", "'auto-round' is another engine's name; use gptq"),
        (
            "compressed-tensors",
            "'compressed-tensors' names checkpoints, which say themselves what they are; ",
        ),
        ("none", "'none' is no method; drop it, and the model stays as it is stored"),
        ("fp8:weight=row", "fp8 has no option 'weight'; it has: weights, activation, "),
        ("nvfp4:group_size=16", "nvfp4 has no option 'group_size'; it has: none"),
        ("fp8:weights=row", "fp8:weights must be channel, tensor, block, got 'row'"),
        ("fp8:weights", "'weights' is no option=value; write fp8:option=value"),
        ("fp8:weights=block,weights=tensor", "option weights of fp8 stands there twice"),
        ("int4:bits=3", "int4 fixes bits at 4"),
        ("nf4:type=fp4", "nf4 fixes type at nf4"),
        ("rtn:bits=9", "rtn:bits must be 2, 3, 4, 5, 6, 7, 8, got '9'"),
        ("rtn:group_size=-2", "rtn:group_size must be a whole number from -1, got '-2'"),
        ("rtn:group_size=many", "rtn:group_size must be a whole number from -1, got 'many'"),
        ("hqq:group_size=4", "hqq:group_size must be a whole number from 8, got '4'"),
        ("rtn:symmetric=yes", "rtn:symmetric must be true or false, got 'yes'"),
        ("fp8:history=0", "fp8:history must be a whole number from 1, got '0'"),
    ],
)
def test_what_is_wrong_is_said(text: str, says: str) -> None:
    with pytest.raises(
        LowbitError, match=f"--quantization: {says}" if "\\" in says else re.escape(says)
    ) as it:
        parse_method(text)
    assert it.value.code == "E0402" and "\n" not in str(it.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("int4wo", "unknown 'int4wo'; int4wo needs a group size; choices: int8dq, int8wo, "),
        ("int4wo-", "unknown 'int4wo-'; int4wo needs a group size"),
        ("int4wo-16", "unknown 'int4wo-16'; did you mean 'int4wo-"),
        ("fp8dq", "unknown 'fp8dq'; did you mean 'fp8"),
        ("fp8", "unknown 'fp8'"),
    ],
)
def test_torchao_names(text: str, says: str) -> None:
    with pytest.raises(LowbitError, match=re.escape(f"--torchao-config: {says}")) as it:
        parse_torchao(text)
    assert it.value.code == "E0402"
    assert all(name in str(it.value) for name in TORCHAO)


def test_torchao_has_nine_names_and_no_options() -> None:
    assert len(TORCHAO) == 9
    for name in TORCHAO:
        assert parse_torchao(name) == MethodSpec(name, {}, name)


@pytest.mark.parametrize(
    ("text", "shape", "reason"),
    [
        ("mxfp4", (32, 100), "needs in % 32 == 0, got 100"),
        ("mxfp8", (32, 48), "needs in % 32 == 0, got 48"),
        ("nvfp4", (32, 40), "needs in % 16 == 0, got 40"),
        ("hqq", (32, 96), "needs in % 64 == 0, got 96"),
        ("int4:group_size=128", (8, 192), "group size 128 does not divide its 192 columns; 64, 32, 16 would"),
        ("int4:group_size=64", (8, 100), "group size 64 does not divide its 100 columns"),
        ("int4wo-128", (32, 192), "torchao leaves it in floats: needs in % 128 == 0, got 192"),
        (
            "fp8dq-per_row",
            (30, 64),
            "torchao leaves it in floats: needs out % 16 == 0 and in % 16 == 0, got 30 x 64",
        ),
        (
            "fp8dq-per_tensor",
            (32, 72),
            "torchao leaves it in floats: needs out % 16 == 0 and in % 16 == 0, got 32 x 72",
        ),
    ],
)
def test_refusals(text: str, shape: tuple[int, int], reason: str) -> None:
    assert build(text).refuses(Module(NAME, shape)) == reason


def test_static_scales_are_looked_up(tmp_path: Path) -> None:
    path = tmp_path / "scales.safetensors"
    save_file({"other.input_scale": torch.tensor(0.5), f"{NAME}.input_scale": torch.tensor(-1.0)}, path)
    built = build(f"fp8:activation=static,scales={path}")
    assert built.refuses(Module("model.layers.1.mlp.up_proj", (8, 8))) == (
        "scales.safetensors has no model.layers.1.mlp.up_proj.input_scale"
    )
    with pytest.raises(LowbitError, match=r"up_proj.input_scale' must be one positive number") as it:
        built.quantize(weight(), module_of(weight()), ORIGIN)
    assert it.value.code == "E0215"
    with pytest.raises(LowbitError, match="needs scales=FILE"):
        build("fp8:activation=static").refuses(module_of(weight()))
    with pytest.raises(LowbitError, match="none.safetensors"):
        build(f"fp8:activation=static,scales={tmp_path / 'none.safetensors'}").refuses(module_of(weight()))


def test_every_module_that_a_method_names_can_be_imported() -> None:
    for name in HERE:
        assert importlib.util.find_spec(f"lowbit.quantize.{METHODS[name].module}") is not None
