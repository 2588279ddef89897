"""cpu_blocks: weights of 2- to 8-bit codes with scales for each 16, 32 … columns, on AVX2, AVX-512 and NEON.

Takes any canonical scheme whose code values are exact in bfloat16 (integers, small floats, iq4_nl) and GGUF
blocks that expand to one, K-quants with their two levels of scales included; 4-bit tables that are not
(nf4) run in float32. An outer scale for a whole row or tensor (NVFP4) multiplies the result. The input is
rounded to bfloat16 but for the tables in float32; codes are exact, accumulation and scales are float32:
weights are never rounded. Zero points that are no whole numbers (HQQ) are subtracted from the codes as
float16: all that a float16 or bfloat16 holds, but for bfloat16s below 2^-14 of a code, which move by less
than 2^-25 of one. Beside float32 scales they are offsets, -zero * scale, a last bit of float32 away.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from lowbit.kernels import packed_linear
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.kernels.packed_linear import (
    ADDEND_NONE,
    ADDEND_OFFSET,
    ADDEND_ZERO,
    CODES,
    COLUMNS,
    SCALE_DTYPES,
    SCALES_BF16,
    SCALES_E4M3,
    SCALES_F16,
    SCALES_F32,
    SCALES_TWO_LEVEL,
    SUPER,
    Description,
    NativeWeight,
    Parts,
)
from lowbit.numerics.number_formats import NumberFormat, number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

_SCALE_KINDS = {
    "f16": SCALES_F16,
    "bf16": SCALES_BF16,
    "f32": SCALES_F32,
    "e8m0": SCALES_BF16,  # powers of two are exact in bf16
    "e4m3": SCALES_E4M3,
}
_LARGEST_GROWTH = 1.1  # packed bytes to the scheme's own
# GGUF types whose inner scales are small whole numbers and whose outer ones are f16.
_TWO_LEVEL = {f"gguf_{name}" for name in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs")}
_SMALL_FLOATS = {"gguf_mxfp4": "bf16", "gguf_nvfp4": "e4m3"}  # what holds their scales exactly
_ONE_LEVEL = {f"gguf_{name}" for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "tq2_0")}


@cache
def _expanded(scheme: Scheme) -> Scheme | None:
    """The scheme a block format takes apart to, or None where its scales have no native form."""
    name, layout = scheme.weight.name, scheme.weight.block
    if layout is None:
        return scheme
    if name not in _TWO_LEVEL | _ONE_LEVEL and name not in _SMALL_FLOATS:
        return None
    parts = layout.expand(torch.zeros(1, layout.bytes, dtype=torch.uint8))
    inner = _SMALL_FLOATS.get(name, "int8" if name in _TWO_LEVEL else "f16")
    names = (inner, "f16")[: len(parts.columns)]
    return Scheme(
        number_format(parts.number_format),
        tuple((1, columns) for columns in parts.columns),
        tuple(number_format(scale) for scale in names),
        offset=bool(parts.offsets),
        activation=scheme.activation,
    )


@cache
def _code_kind(fmt: NumberFormat) -> str | None:
    """The name in ``CODES`` of how such codes are stored, or None."""
    if fmt.name in ("int8", "uint8", "e4m3"):
        return fmt.name
    if fmt.values is None or not 2 <= fmt.bits <= 7:
        return None
    table = fmt.table()
    if fmt.bits == 7 and not torch.equal(table, table[0] + torch.arange(128)):
        return None  # the native code adds where it has no registers for a table
    if torch.equal(table.bfloat16().float(), table):
        return f"bits{int(fmt.bits)}"
    return "wide4" if fmt.bits == 4 else None


@cache
def _table(fmt: NumberFormat) -> Tensor:
    """bfloat16 (64,): the value of every index the kernel may form, short tables repeated; wide4: float32.

    The values of 7 bits go on as they begin.
    """
    if fmt.bits == 8:
        return torch.zeros(64, dtype=torch.bfloat16)
    if _code_kind(fmt) == "wide4":
        return fmt.table().repeat(2)
    values = fmt.table()[:64].bfloat16()
    return values.repeat(64 // len(values)).contiguous()


def _describe(scheme: Scheme, shape: tuple[int, ...]) -> Description | str:
    """The native description of an expanded scheme, or why there is none."""
    fmt, (out, columns) = scheme.weight, shape[-2:]
    code_kind = _code_kind(fmt)
    if code_kind is None:
        return f"{fmt.name} codes are not exact in bfloat16 or have no packed form"
    if scheme.zero == "float" and scheme.scales[0].name not in ("f16", "bf16"):
        return f"float zero points with {scheme.scales[0].name} scales"
    if scheme.flattened:
        return "blocks run over the flattened matrix"
    if columns % COLUMNS:
        return f"needs in % {COLUMNS} == 0, got {columns}"
    two_level = len(scheme.scales) == 2 and scheme.scales[0].name == "int8" and scheme.blocks[1] == (1, SUPER)
    if len(scheme.scales) != 1 and not two_level and not _has_row_scale(scheme):
        return f"{len(scheme.scales)} levels of scales"
    inner = scheme.scales[0].name
    if not two_level and inner not in _SCALE_KINDS:
        return f"scales are {inner}"
    group = scheme.blocks[0][1] or columns
    if (group != 16 and group % COLUMNS) or columns % group:
        return f"needs groups of 16 or a multiple of {COLUMNS} that divide in, got {group} of {columns}"
    kind = SCALES_TWO_LEVEL if two_level else _SCALE_KINDS[inner]
    if code_kind == "wide4" and (scheme.offset or scheme.zero != "none"):
        return f"{fmt.name} codes with zero points or offsets"
    addend = ADDEND_OFFSET if scheme.offset else ADDEND_ZERO if scheme.zero != "none" else ADDEND_NONE
    return Description(None, None, out, columns, CODES[code_kind], group, kind, addend)


def _is_order(order: Tensor, columns: int) -> bool:
    inside = order.dtype is torch.int64 and order.shape == (columns,)
    return inside and bool((order >= 0).all()) and bool((order < columns).all())


def _has_row_scale(scheme: Scheme) -> bool:
    """Whether the outer level is one float32 for a row, or for all of them."""
    if len(scheme.scales) != 2 or scheme.offset:
        return False
    rows, columns = scheme.blocks[1]
    return scheme.scales[1].name == "f32" and columns == 0 and rows in (0, 1)


def _folded(scheme: Scheme) -> Scheme:
    """The scheme with offsets for float zero points beside float32 scales: both are as exact."""
    if scheme.zero != "float" or tuple(scale.name for scale in scheme.scales) != ("f32",) or scheme.offset:
        return scheme
    return replace(scheme, zero="none", offset=True)


def _fold(weight: QuantizedTensor) -> QuantizedTensor:
    """The weight in ``_folded``, zero points within float16."""
    zeros, scale = weight.zeros, weight.scales[0] if weight.scales else None
    if weight.scheme.zero != "float" or zeros is None or scale is None:
        return weight
    scheme = _folded(weight.scheme)
    if scheme.offset:
        return replace(weight, scheme=scheme, zeros=None, offsets=(-zeros.float() * scale,))
    far = zeros.abs() > torch.finfo(torch.float16).max
    if not bool(far.any()):
        return weight
    # Bfloat16s from 2^16 on, where neighbours are 512 apart: a code of 8 bits is lost beside them, and in
    # bfloat16 arithmetic too. What is left, -zero * scale, has powers of two to move.
    near, exponent = torch.frexp(zeros.float())
    (rows, columns), (out, width) = scheme.blocks[0], weight.shape[-2:]
    spread = far.repeat_interleave(rows or out, 0)[:out].repeat_interleave(columns or width, 1)[:, :width]
    return replace(
        weight,
        codes=weight.codes.masked_fill(spread, 0),
        scales=(torch.where(far, torch.ldexp(scale.float(), exponent), scale.float()).to(scale.dtype),),
        zeros=torch.where(far, near, zeros.float()).to(zeros.dtype),
    )


def _native(scheme: Scheme, shape: tuple[int, ...]) -> Scheme | None:
    """What is packed of a scheme: block formats taken apart, zero points folded, groups that divide a row."""
    expanded = _expanded(scheme)
    return None if expanded is None else _whole_groups(_folded(expanded), shape)


def _whole_groups(scheme: Scheme, shape: tuple[int, ...]) -> Scheme:
    """The scheme with smaller groups where its last one is short, so that groups divide the columns."""
    columns = shape[-1]
    if scheme.flattened or not scheme.blocks or not columns % (scheme.blocks[0][1] or columns):
        return scheme
    rows, group = scheme.blocks[0]
    return replace(scheme, blocks=((rows, math.gcd(group, columns)), *scheme.blocks[1:]))


def _regrouped(weight: QuantizedTensor, scheme: Scheme) -> QuantizedTensor:
    """The weight in ``_whole_groups``: each number of a group repeated for the parts it was cut into."""
    group, part = weight.scheme.blocks[0][1], scheme.blocks[0][1]
    count = weight.shape[-1] // part

    def cut(numbers: Tensor) -> Tensor:
        return numbers.repeat_interleave(group // part, -1)[..., :count]

    return replace(
        weight,
        scheme=scheme,
        scales=(cut(weight.scales[0]), *weight.scales[1:]),
        zeros=None if weight.zeros is None else cut(weight.zeros),
        offsets=tuple(cut(offset) if level == 0 else offset for level, offset in enumerate(weight.offsets)),
    )


class CpuBlocks:
    """See the module docstring."""

    name = "cpu_blocks"
    computes = "as stored"
    layout = 1

    def refuses(self, scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
        """Why the scheme cannot run here, or None."""
        if reason := packed_linear.unusable(device):
            return reason
        if len(shape) != 2:
            return "stacked experts"
        if scheme.is_dense:
            return "weights are not quantized"
        if scheme.activation is not None:
            return f"the scheme quantizes its input ({scheme.activation})"
        native = _native(scheme, shape)
        if native is None:
            return f"no packed layout for {scheme.weight.name}"
        described = _describe(native, shape)
        if isinstance(described, str):
            return described
        # Padding to 16 rows is not growth of the layout: judge a weight of whole blocks.
        tall = (-(-shape[0] // 16) * 16, shape[1])
        own = scheme.bits_per_weight(tall) * tall[0] * tall[1] / 8
        if described.nbytes > _LARGEST_GROWTH * own:
            return f"would take {described.nbytes} bytes, the scheme's own are {own:.0f}"
        return None

    def takes_int8(self, scheme: Scheme, shape: tuple[int, ...]) -> bool:
        """Whether the codes are whole numbers, or halves of them."""
        native = _native(scheme, shape)
        described = "" if native is None else _describe(native, shape)
        if native is None or isinstance(described, str):
            return False
        table = _table(native.weight)
        described.table = table.data_ptr()
        return packed_linear.takes(described, packed_linear.INPUT_GROUPS)

    def pack(self, weight: QuantizedTensor, device: torch.device) -> PackedWeight:
        """Codes, scales and offsets in the kernel's layout."""
        scheme = _native(weight.scheme, weight.shape)
        assert scheme is not None, "refuses() was asked first"
        description = _describe(scheme, weight.shape)
        assert isinstance(description, Description), "refuses() was asked first"
        whole = _fold(weight.expand())
        if scheme.blocks != whole.scheme.blocks:
            whole = _regrouped(whole, scheme)
        parts = _parts(whole, scheme, description)
        buffers = {"data": packed_linear.pack(description, parts), "table": _table(scheme.weight)}
        if weight.column_order is not None:
            buffers["column_order"] = weight.column_order.clone()
        if _has_row_scale(scheme):
            buffers["row_scale"] = weight.scales[1].float().flatten().expand(weight.shape[0]).contiguous()
        return self.restore(weight.scheme, weight.shape, buffers, weight.origin)

    def restore(
        self, scheme: Scheme, shape: tuple[int, ...], buffers: dict[str, Tensor], origin: str
    ) -> PackedWeight:
        """The weight around its buffers."""
        native_scheme = _native(scheme, shape)
        described = "no packed layout" if native_scheme is None else _describe(native_scheme, shape)
        if isinstance(described, str):
            raise ValueError(f"{origin}: {described}")
        row_scale, order = buffers.get("row_scale"), buffers.get("column_order")
        if row_scale is not None and row_scale.numel() != shape[0]:
            raise ValueError(f"{origin}: {row_scale.numel()} scales of {shape[0]} rows")
        if order is not None and not _is_order(order, shape[1]):
            raise ValueError(f"{origin}: no order of {shape[1]} columns")
        return packed_linear.around(self, described, scheme, shape, buffers, origin)

    def unpack(self, packed: PackedWeight) -> QuantizedTensor:
        """The weight again, block formats expanded."""
        assert isinstance(packed, NativeWeight), "packed by this kernel"
        scheme = _native(packed.scheme, packed.shape)
        assert scheme is not None, "it was packed"
        read = packed_linear.unpack(packed)
        assert read.scales is not None, "every scheme here has scales"
        # Blocks of several rows were spread over their rows, exactly.
        scheme = replace(scheme, blocks=tuple((1, columns) for _, columns in scheme.blocks))
        scales = [read.scales] + ([] if read.outer_scales is None else [read.outer_scales])
        if "row_scale" in packed.buffers:
            scales.append(packed.buffers["row_scale"].unsqueeze(1))
        addends = [a for a in (read.addends, read.outer_addends) if a is not None]
        zeros = None if scheme.zero == "none" else addends.pop(0)
        if scheme.zero == "integer":
            zeros = None if zeros is None else zeros.to(torch.uint8)
        return QuantizedTensor(
            scheme,
            packed.shape,
            read.codes,
            tuple(scales),
            zeros,
            tuple(addends),
            packed.buffers.get("column_order"),
            packed.origin,
        )

    def linear(self, x: Tensor, packed: PackedWeight, out: Tensor | None = None) -> Tensor:
        """float32 (tokens, in) -> float32 (tokens, out)."""
        return packed_linear.linear(x, packed, out)

    def rows(self, packed: PackedWeight, ids: Tensor) -> Tensor:
        """float32 (len(ids), in)."""
        return packed_linear.rows(packed, ids)


def _parts(weight: QuantizedTensor, scheme: Scheme, description: Description) -> Parts:
    """The tensors in the dtypes the native packer reads, one scale for each row and group."""
    two_level = description.scales == SCALES_TWO_LEVEL
    dtype = torch.int8 if two_level else SCALE_DTYPES[description.scales]

    def per_row(tensor: Tensor, level: int, dtype: torch.dtype) -> Tensor:
        rows = scheme.blocks[level][0]
        if rows != 1:
            tensor = tensor.repeat_interleave(rows or weight.shape[0], 0)[: weight.shape[0]]
        # float8 scales go through float32, which holds them exactly
        return (
            (tensor.float() if tensor.dtype.itemsize == 1 and not two_level else tensor)
            .to(dtype)
            .contiguous()
        )

    addend = None
    if weight.zeros is not None:
        addend = per_row(weight.zeros, 0, torch.float16)
    elif weight.offsets:
        addend = per_row(weight.offsets[0], 0, dtype)
    f16 = torch.float16
    return Parts(
        weight.codes.contiguous(),
        per_row(weight.scales[0], 0, dtype),
        addend,
        per_row(weight.scales[1], 1, f16) if two_level else None,
        per_row(weight.offsets[1], 1, f16) if two_level and weight.offsets else None,
    )
