"""What the tests of online methods share.

``agrees`` is the proof against a tool: every bit of its dequantized weight. Where a method promises less, its
codes are still equal and the function says how much less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme
from lowbit.quantize.method import Module, build_method
from lowbit.quantize.specification import parse_method

DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
NAME = "model.layers.0.mlp.up_proj"
ORIGIN = f"model.safetensors: {NAME}"


def module_of(weight: Tensor) -> Module:
    """The module a weight belongs to."""
    return Module(NAME, (weight.shape[0], weight.shape[1]), DTYPES[weight.dtype])


def scheme_of(method: str, module: Module) -> Scheme:
    """What planning says the module will get."""
    return build_method(parse_method(method)).scheme_of(module)


def quantized(method: str, weight: Tensor) -> QuantizedTensor:
    """The weight by a method, as ``--quantization`` spells it; its scheme and shapes are as promised."""
    built, module, before = build_method(parse_method(method)), module_of(weight), weight.clone()
    assert built.refuses(module) is None
    found = built.quantize(weight, module, ORIGIN).weight
    assert found.scheme == built.scheme_of(module) and found.origin == ORIGIN
    assert found.codes.dtype == torch.uint8 and found.codes.shape == found.shape == weight.shape
    for scale, fmt in zip(found.scales, found.scheme.scales, strict=True):
        assert scale.dtype == fmt.dtype and scale.float().isfinite().all()
    assert torch.equal(weight.nan_to_num(), before.nan_to_num()), "the source weight is not ours to change"
    return found


def agrees(case: str, method: str, made: dict[str, Tensor]) -> None:
    """Our weight against a tool's, ``made`` as tools.py and the golden files have it. ``case``: tool/name."""
    found = quantized(method, made["weight"])
    assert found.dequantize().isfinite().all()
    if case.startswith("hqq/"):
        _agrees_hqq(found, made)
    elif "int8" in case and case.startswith("bitsandbytes/"):
        _agrees_llm_int8(found, made)
    else:
        _agrees(case, method, found, made)


def _agrees(case: str, method: str, found: QuantizedTensor, made: dict[str, Tensor]) -> None:
    """Every bit."""
    ours, tools, weight = found.dequantize(), _dequantized(found, made), made["weight"].float()
    same = ours == tools
    if method.startswith("fp8"):  # torchao divides zeros by a scale of zero
        same |= tools.isnan() & (ours == 0)
    if case.startswith("compressed_tensors/"):
        # A scale that float16 rounds to 0 is the smallest float16 here; the tool makes zeros of its weights.
        vanished = (tools == 0) & (weight.abs() < 2.0**-17)
        assert ((ours - weight).abs() <= weight.abs().clamp(min=2.0**-25))[vanished].all()
        same |= vanished
    rows = (~same).any(1).nonzero().flatten().tolist()
    assert same.all(), f"{int((~same).sum())} of {same.numel()} differ, in rows {rows[:10]}"
    assert len(ours[weight.abs().amax(1) > 1e-3].unique()) > 8, "the case tests nothing"


def _dequantized(found: QuantizedTensor, made: dict[str, Tensor]) -> Tensor:
    """The tool's weight: as it dequantized it, or from its codes and scales where only those were kept."""
    if "expected" in made:
        return made["expected"]
    rows, columns = made["weight"].shape
    if "packed" in made:
        codes = torch.stack((made["packed"] >> 4, made["packed"] & 15), 1).flatten()[: rows * columns]
        scale = made["absmax"].repeat_interleave(64)[: rows * columns]
        return (found.scheme.weight.table()[codes.long()] * scale).view(rows, columns)
    scale = made["scale"].repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return made["codes"].view(torch.float8_e4m3fn).float() * scale


def _agrees_llm_int8(found: QuantizedTensor, made: dict[str, Tensor]) -> None:
    """Codes and scales; the tool multiplies by its two numbers one after the other, which rounds twice."""
    assert torch.equal(found.codes.view(torch.int8) ^ -128, made["codes"])
    assert torch.equal(found.scales[0].flatten(), made["SCB"] * 7.874015718698502e-3)
    torch.testing.assert_close(found.dequantize(), made["expected"], rtol=2.0**-22, atol=0)


def _agrees_hqq(found: QuantizedTensor, made: dict[str, Tensor]) -> None:
    """Codes; scale and zero point are the tool's float32 numbers rounded to float16 once."""
    assert torch.equal(found.codes, made["codes"])
    assert torch.equal(found.scales[0], made["scale"].half())
    assert found.zeros is not None and torch.equal(found.zeros, made["zero"].half())
    group = found.scheme.blocks[0][1]
    terms = [(made["codes"] * made["scale"].repeat_interleave(group, 1)).abs()]
    terms.append((made["zero"] * made["scale"]).abs().repeat_interleave(group, 1))
    last_bit = torch.maximum(*terms).clamp(min=2.0**-14) * 2.0**-10
    assert ((found.dequantize() - made["expected"]).abs() <= last_bit).all()
