"""What the real quantizers make of a weight: each method of ours beside the tool it must agree with.

The golden files are made with these functions and the slow tests call them. Nothing here comes from lowbit;
each tool is imported where it is used, on a CPU. A function takes the weight (out, in) and gives
``expected``, the tool's own dequantized weight in float32, and what else is worth keeping: codes, scales.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

Made = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """``method``: lowbit's spelling. ``make``: the tool. ``shape``, ``dtype``: of the golden weight."""

    method: str
    make: Callable[[Tensor], Made]
    shape: tuple[int, int] = (16, 128)
    dtype: torch.dtype = torch.float32


# ---- torchao


def torchao_config(name: str) -> Callable[[Tensor], Made]:
    """Through ``quantize_`` with the configuration of the name."""

    def make(weight: Tensor) -> Made:
        from torchao import quantization as ao

        configs = {
            "int8wo": ao.Int8WeightOnlyConfig,
            "int8dq": ao.Int8DynamicActivationInt8WeightConfig,
            "fp8wo": ao.Float8WeightOnlyConfig,
        }
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        ao.quantize_(layer, configs[name]())
        return {"expected": layer.weight.dequantize(torch.float32)}

    return make


def torchao_float8(granularity: str) -> Callable[[Tensor], Made]:
    """What the dynamic fp8 configuration calls for its weight; the configuration itself asks for a GPU."""

    def make(weight: Tensor) -> Made:
        from torchao import quantization as ao
        from torchao.quantization.quantize_.workflows import Float8Tensor

        quantized = Float8Tensor.from_hp(weight, granularity=getattr(ao, granularity)())
        return {"expected": quantized.dequantize(torch.float32)}

    return make


def torchao_int4(group: int) -> Callable[[Tensor], Made]:
    """Its tinygemm primitives, called as Int4TilePackedTo4dTensor calls them."""

    def make(weight: Tensor) -> Made:
        from torchao.quantization import quant_primitives as primitives

        block, bf16 = (1, group), torch.bfloat16
        scale, zero = primitives._choose_qparams_affine_tinygemm(
            weight, primitives.MappingType.ASYMMETRIC, block, torch.int32, 0, 15, None, bf16, bf16
        )
        codes = primitives._quantize_affine_tinygemm(weight, block, scale, zero, torch.int32, 0, 15)
        expected = primitives._dequantize_affine_tinygemm(
            codes, block, scale.float(), zero.float(), torch.int32, 0, 15, output_dtype=torch.float32
        )
        return {"expected": expected}

    return make


def torchao_activation(kind: str, granularity: str) -> Callable[[Tensor], Made]:
    """Inputs: what its dynamic schemes make of x (tokens, in)."""

    def make(x: Tensor) -> Made:
        from torchao import quantization as ao
        from torchao.quantization.quantize_.workflows import Float8Tensor, Int8Tensor

        tensor = {"int8": Int8Tensor, "float8": Float8Tensor}[kind]
        quantized = tensor.from_hp(x, granularity=getattr(ao, granularity)())
        return {"expected": quantized.dequantize(torch.float32)}

    return make


# ---- bitsandbytes


def bitsandbytes_4bit(kind: str, double: bool = False) -> Callable[[Tensor], Made]:
    """Quantized and dequantized by the tool's own plain torch code; its CPU kernels differ.

    The CPU dequantizer is wrong where rows are no whole blocks; the 8-bit CPU quantizer looks up one of
    65,536 steps. The latter's path for other dtypes, here float64, takes the nearest number.
    """

    def make(weight: Tensor) -> Made:
        from bitsandbytes import functional
        from bitsandbytes.backends.default import ops as plain

        packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
        absmax = state.absmax
        if double:
            offset = absmax.mean()
            table = functional.create_dynamic_map()
            codes, outer = torch.ops.bitsandbytes.quantize_blockwise.default(
                (absmax - offset).double(), table, 256
            )
            absmax = (
                plain._dequantize_blockwise_compute(codes.flatten(), outer, table, 256, torch.float32)
                + offset
            )
        expected = plain._dequantize_4bit_compute(
            packed.flatten(), absmax, state.code, 64, weight.shape, torch.float32
        )
        return {"expected": expected, "absmax": absmax, "packed": packed.flatten()}

    return make


def bitsandbytes_int8(weight: Tensor) -> Made:
    """As its Linear8bitLt quantizes at load."""
    from bitsandbytes import functional

    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    return {"expected": functional.int8_vectorwise_dequant(codes, scales), "codes": codes, "SCB": scales}


# ---- hqq


def hqq(bits: int, group: int) -> Callable[[Tensor], Made]:
    """Its Quantizer with the parameters of its own configuration."""

    def make(weight: Tensor) -> Made:
        from hqq.core.quantize import BaseQuantizeConfig, Quantizer

        options = BaseQuantizeConfig(nbits=bits, group_size=group, axis=1)["weight_quant_params"]
        found, meta = Quantizer.quantize(weight, device="cpu", bitpack=False, **options)
        meta["compute_dtype"] = torch.float32
        return {
            "expected": Quantizer.dequantize(found.float(), meta),
            "codes": found.to(torch.uint8).view_as(weight),
            "scale": meta["scale"].view(len(weight), -1),
            "zero": meta["zero"].view(len(weight), -1),
        }

    return make


# ---- compressed-tensors


def compressed_tensors(**arguments: object) -> Callable[[Tensor], Made]:
    """``QuantizationArgs`` with a scale for each group, or each row; scales in ``scale_dtype``."""

    def make(weight: Tensor) -> Made:
        from compressed_tensors.quantization import QuantizationArgs
        from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
        from compressed_tensors.quantization.utils import calculate_qparams

        args = QuantizationArgs(**arguments)
        groups = weight.unflatten(-1, (-1, args.group_size if args.strategy == "group" else weight.shape[1]))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        codes = quantize(weight, scale, zero, args)
        return {"expected": dequantize(codes, scale, zero, args, dtype=torch.float32)}

    return make


def _integers(bits: int, group: int, symmetric: bool) -> Callable[[Tensor], Made]:
    strategy = {"strategy": "group", "group_size": group} if group > 0 else {"strategy": "channel"}
    return compressed_tensors(
        num_bits=bits, type="int", symmetric=symmetric, scale_dtype=torch.float16, **strategy
    )


def _mx(bits: int) -> Callable[[Tensor], Made]:
    return compressed_tensors(
        num_bits=bits, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8
    )


# ---- transformers, ModelOpt


def transformers_block(weight: Tensor) -> Made:
    """Its fine-grained FP8, 128 x 128; ragged matrices, which it leaves alone, filled up with zeros."""
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    config = SimpleNamespace(weight_block_size=(128, 128), scale_fmt="float")
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % 128, 0, -rows % 128))
    found = Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({"x.weight": padded})
    return {
        "codes": found["x.weight"][:rows, :columns].contiguous().view(torch.uint8),
        "scale": found["x.weight_scale_inv"],
    }


def modelopt_nvfp4(weight: Tensor) -> Made:
    """Its NVFP4QTensor."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    found, inner, outer = NVFP4QTensor.quantize(weight, 16)
    expected = found.dequantize(dtype=torch.float32, scale=inner, double_scale=outer, block_sizes={-1: 16})
    return {"expected": expected}


BF16, F16 = torch.bfloat16, torch.float16
TOOLS: dict[str, dict[str, Case]] = {
    "torchao": {
        "int8wo": Case("int8wo", torchao_config("int8wo"), dtype=BF16),
        "int8wo_f16": Case("int8wo", torchao_config("int8wo"), dtype=F16),
        "int8wo_f32": Case("int8wo", torchao_config("int8wo"), (13, 100)),
        "int8dq": Case("int8dq", torchao_config("int8dq"), dtype=BF16),
        "fp8wo": Case("fp8wo", torchao_config("fp8wo"), (13, 100), dtype=BF16),
        "fp8wo_f16": Case("fp8wo", torchao_config("fp8wo"), dtype=F16),
        "fp8wo_f32": Case("fp8wo", torchao_config("fp8wo")),
        "fp8dq-per_row": Case("fp8dq-per_row", torchao_float8("PerRow"), dtype=BF16),
        "fp8dq-per_tensor": Case("fp8dq-per_tensor", torchao_float8("PerTensor"), dtype=BF16),
        **{
            f"int4wo-{group}": Case(f"int4wo-{group}", torchao_int4(group), (16, 256), BF16)
            for group in (32, 64, 128, 256)
        },
    },
    "bitsandbytes": {
        "nf4": Case("nf4", bitsandbytes_4bit("nf4"), dtype=BF16),
        "nf4_flat": Case("nf4", bitsandbytes_4bit("nf4"), (15, 73)),
        "fp4": Case("fp4", bitsandbytes_4bit("fp4"), dtype=BF16),
        "fp4_flat": Case("fp4", bitsandbytes_4bit("fp4"), (15, 77), F16),
        # 272 blocks: more than one block of the second level
        "nf4_double": Case("nf4:double_quant=true", bitsandbytes_4bit("nf4", True), (34, 512), BF16),
        "fp4_double_flat": Case("fp4:double_quant=true", bitsandbytes_4bit("fp4", True), (15, 77), BF16),
        "int8": Case("bitsandbytes:type=int8", bitsandbytes_int8, dtype=BF16),
        "int8_odd": Case("bitsandbytes:type=int8", bitsandbytes_int8, (13, 99)),
    },
    "hqq": {
        **{f"hqq_{bits}": Case(f"hqq:bits={bits}", hqq(bits, 64)) for bits in (2, 3, 4, 5, 6, 8)},
        "hqq_4_g32": Case("hqq:bits=4,group_size=32", hqq(4, 32), (13, 96), BF16),
    },
    "compressed_tensors": {
        "mxfp4": Case("mxfp4", _mx(4)),
        "mxfp8": Case("mxfp8", _mx(8)),
        "int4_g32": Case("int4:group_size=32,symmetric=true", _integers(4, 32, True)),
        "int4_g128": Case("int4:symmetric=true", _integers(4, 128, True)),
        "int8_row": Case("rtn:bits=8,group_size=-1,symmetric=true", _integers(8, -1, True), (13, 99)),
        "int3_g32": Case("int3:group_size=32,symmetric=true", _integers(3, 32, True)),
        "int4_g32_asym": Case("int4:group_size=32", _integers(4, 32, False)),
        "int8_g64_asym": Case("int8:group_size=64", _integers(8, 64, False)),
        "int2_row_asym": Case("int2:group_size=-1", _integers(2, -1, False), (13, 99)),
    },
    "transformers": {
        "fp8_block": Case("fp8:weights=block", transformers_block, (128, 128), BF16),
        "fp8_block_ragged": Case("fp8:weights=block", transformers_block, (129, 131), BF16),
    },
    "modelopt": {
        "nvfp4": Case("nvfp4", modelopt_nvfp4),
        "nvfp4_odd": Case("nvfp4", modelopt_nvfp4, (17, 48)),
    },
}
# The same for inputs; ``method``: whose activation scheme it is.
ACTIVATIONS = {
    "int8dq": Case("int8dq", torchao_activation("int8", "PerRow"), dtype=BF16),
    "fp8dq-per_row": Case("fp8dq-per_row", torchao_activation("float8", "PerRow"), dtype=BF16),
    "fp8dq-per_tensor": Case("fp8dq-per_tensor", torchao_activation("float8", "PerTensor"), dtype=BF16),
}
PACKAGES = {"compressed_tensors": "compressed-tensors", "modelopt": "nvidia-modelopt"}


def cruel(rows: int, columns: int, dtype: torch.dtype, seed: int = 7) -> Tensor:
    """Ties of every format, rows and groups of unlike sizes, outliers, zeros, -0.0, subnormals."""
    random = torch.randn(max(rows, 4), columns, generator=torch.Generator().manual_seed(seed))
    sizes = torch.logspace(-2, 1.5, -(-columns // 16)).roll(seed).repeat_interleave(16)[:columns]
    weight = random[:rows] * sizes * torch.logspace(-1, 1, rows)[:, None]

    def cycle(*values: float) -> Tensor:
        return torch.tensor(values).repeat(-(-columns // len(values)))[:columns]

    e2m1 = (6.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.75, 2.0, 2.5, 3.5, 5.0)
    nf4 = (1.0, 0.0397901, -0.0455250, 0.1202552, 0.8614784, -0.8480964, 0.5016634)
    left = torch.arange(columns) < columns // 2
    special = [
        torch.zeros(columns),
        cycle(*(step / 2 for step in range(-15, 16))),  # ties under max / 7.5 and (max - min) / 15
        cycle(*(step / 2 for step in range(-6, 25))),  # the same beside a zero point of 3
        cycle(*e2m1, *(-value for value in e2m1)),
        cycle(*nf4),
        random[0] * 1e-6,
        random[1] * torch.where(left, 1e-40, 1e-11),
        torch.where(torch.arange(columns) == columns // 3, -1000.0, random[2] * 0.01),
        torch.where(left, 0.3, random[3] * 3e-4),
        -1 - random[3].abs(),
        cycle(-0.0, 0.0),
        cycle(*(step + 0.5 for step in range(-128, 128, 7)), 127.5),  # ties under max / 127.5
        cycle(448.0, 17.0, -19.0, 21.0, 1.0625, 2.0**-10, -3 * 2.0**-10, 432.0),  # ties of e4m3
    ]
    for row, values in enumerate(special[: max(rows - 2, 0)]):
        weight[row] = values
    weight[-1, left] = 0  # zero groups beside others
    return weight.to(dtype)
