"""What native code is told of a weight that ``cpu_blocks`` packs, and the tensors it packs."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.kernels.code_tables import code_kind, factor_of
from lowbit.kernels.gguf_blocks import NIBBLES
from lowbit.kernels.packed_linear import (
    ADDEND_NONE,
    ADDEND_OFFSET,
    ADDEND_ZERO,
    CODES,
    COLUMNS,
    INPUT_BFLOAT,
    SCALE_DTYPES,
    SCALES_BF16,
    SCALES_E4M3,
    SCALES_F16,
    SCALES_F32,
    SCALES_NIBBLES,
    SCALES_ODD_NIBBLES,
    SCALES_TWO_LEVEL,
    SUPER,
    Description,
    Parts,
)
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

_SCALE_KINDS = {
    "f16": SCALES_F16,
    "bf16": SCALES_BF16,
    "f32": SCALES_F32,
    "e8m0": SCALES_BF16,  # powers of two are exact in bf16
    "e4m3": SCALES_E4M3,
}
_BYTE_FLOATS = ("e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz")
_IN_EIGHTS = (*_BYTE_FLOATS, "bits2", "bits3", "bits4", "int8", "uint8")  # have a form in groups of 8 columns


def describe(scheme: Scheme, shape: tuple[int, ...]) -> Description | str:
    """The native description of an expanded scheme, or why there is none."""
    fmt, (out, columns) = scheme.weight, shape[-2:]
    stored = code_kind(fmt)
    if scheme.outliers is not None:
        kinds = (fmt.name, *(scale.name for scale in scheme.scales), scheme.outliers.name)
        if (kinds, scheme.blocks, scheme.zero) != (("uint3", "f16", "f16"), ((1, 16),), "float"):
            return "outliers stand beside 3-bit codes in groups of 16 with f16 scales and zero points only"
    if stored is None:
        return f"{fmt.name} codes are not exact in bfloat16 or have no packed form"
    if stored in _BYTE_FLOATS and (scheme.offset or scheme.zero != "none"):
        return f"{fmt.name} codes with zero points or offsets"
    if scheme.zero == "float" and scheme.scales[0].name not in ("f16", "bf16"):
        return f"float zero points with {scheme.scales[0].name} scales"
    if scheme.zero == "float" and scheme.scales[0].name == "bf16" and not bool((fmt.table() == 0).any()):
        return f"float zero points with bf16 scales of {fmt.name} codes, none of which is 0"
    two_level = (
        len(scheme.scales) == 2 and _inner_level(scheme) is not None and scheme.blocks[1] == (1, SUPER)
    )
    if len(scheme.scales) != 1 and not two_level and not has_row_scale(scheme):
        return f"{len(scheme.scales)} levels of scales"
    inner = scheme.scales[0].name
    if not two_level and inner not in _SCALE_KINDS:
        return f"scales are {inner}"
    group = scheme.blocks[0][1]
    if group % COLUMNS and group not in (8, 16, columns):
        return f"needs groups of a multiple of 8 columns, got {group}"
    if group == 8 and group != columns and (two_level or stored not in _IN_EIGHTS):
        return f"{fmt.name} codes need groups of 16 or a multiple of {COLUMNS}, got 8"
    step = COLUMNS if group in (0, 8, 16, columns) else group
    padded = -(-columns // step) * step
    # A single group of 16 stays one: what inputs are quantized in is told by it.
    group = padded if group == 0 or (group == columns and group != 16) else group
    kind = _inner_level(scheme) if two_level else _SCALE_KINDS[inner]
    assert kind is not None, "two levels have an inner one"
    addend = ADDEND_OFFSET if scheme.offset else ADDEND_ZERO if scheme.zero != "none" else ADDEND_NONE
    return Description(
        None, None, out, padded, CODES[stored], group, kind, addend, INPUT_BFLOAT, factor_of(fmt)
    )


def _inner_level(scheme: Scheme) -> int | None:
    """The kind of scale that stands below one f16 for 256 columns, or None."""
    inner = scheme.scales[0]
    if inner.name == "int8":
        return SCALES_TWO_LEVEL
    if inner.name.removesuffix(" scales") not in NIBBLES or inner.values is None:
        return None
    return SCALES_ODD_NIBBLES if inner.values[0] else SCALES_NIBBLES


def has_row_scale(scheme: Scheme) -> bool:
    """Whether the outer level is one float32 for a row, or for all of them."""
    if len(scheme.scales) != 2 or scheme.offset:
        return False
    rows, columns = scheme.blocks[1]
    return scheme.scales[1].name == "f32" and columns == 0 and rows in (0, 1)


def parts_of(weight: QuantizedTensor, scheme: Scheme, description: Description) -> Parts:
    """The tensors in the dtypes the native packer reads, one scale for each row and group."""
    two_level = description.super_size > 0
    dtype = torch.uint8 if description.nibbles else torch.int8 if two_level else None
    dtype = dtype or SCALE_DTYPES[description.scales]
    groups = description.columns // description.group

    def per_row(tensor: Tensor, level: int, dtype: torch.dtype) -> Tensor:
        rows = scheme.blocks[level][0]
        if rows != 1:
            tensor = tensor.repeat_interleave(rows or weight.shape[0], 0)[: weight.shape[0]]
        # float8 scales go through float32, which holds them exactly
        wide = tensor.float() if tensor.dtype.itemsize == 1 and not two_level else tensor
        if level == 0 and tensor.shape[1] < groups:
            wide = torch.nn.functional.pad(wide, (0, groups - tensor.shape[1]))
        return wide.to(dtype).contiguous()

    addend = None
    if weight.zeros is not None:
        addend = per_row(weight.zeros, 0, torch.float16)
    elif weight.offsets:
        addend = per_row(-weight.offsets[0] if description.nibbles else weight.offsets[0], 0, dtype)
    f16, scale = torch.float16, weight.scales[0]
    if description.nibbles:
        first, second = (scheme.scales[0].values or ())[:2]
        scale = (scale - first) / (second - first)
    return Parts(
        weight.codes.contiguous(),
        per_row(scale, 0, dtype),
        addend,
        per_row(weight.scales[1], 1, f16) if two_level else None,
        per_row(weight.offsets[1], 1, f16) if two_level and weight.offsets else None,
    )
