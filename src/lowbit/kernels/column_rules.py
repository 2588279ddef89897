"""Weights whose scale belongs to one column of several rows, on a CPU and on a GPU alike.

The rows that share their columns' scales are a *group*: neighbours, or where they lie apart those that
``QuantizedTensor.row_groups`` says. Kernels multiply x by a group's scales before it meets codes that have
none of them, or those of groups of the row (SINQ): the ``inner`` weight.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowbit.kernels.packed_linear import SCALE_KINDS
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme


def inner(scheme: Scheme) -> Scheme | str:
    """The scheme of the codes without the columns' scales, or why there is none."""
    if not scheme.scales_columns:
        return "no scale is that of a column of several rows"
    if scheme.offset or scheme.reordered:
        return "scales of columns beside offsets or act-order"
    if len(scheme.blocks) > 2 or any(height > 1 for height, _ in scheme.blocks[:-1]):
        return f"{len(scheme.blocks)} levels of blocks of several rows"
    if scheme.scales[-1].name not in SCALE_KINDS:
        return f"columns' scales are {scheme.scales[-1].name}"
    bare = replace(scheme, scattered=False, blocks=scheme.blocks[:-1], scales=scheme.scales[:-1])
    if bare.blocks:
        return bare
    # A scale of 1 for each row, which the layouts ask for.
    return replace(bare, blocks=((1, 0),), scales=(number_format("f16"),), zero="none")


def inner_weight(weight: QuantizedTensor) -> QuantizedTensor:
    """Its codes without the columns' scales and zero points."""
    bare, single = inner(weight.scheme), len(weight.scales) == 1
    assert not isinstance(bare, str), "refuses() was asked first"
    ones = (torch.ones(weight.shape[0], 1, dtype=torch.float16),)
    return replace(
        weight,
        scheme=bare,
        scales=ones if single else weight.scales[:-1],
        zeros=None if single else weight.zeros,
        row_groups=None,
    )


def has_zeros(scheme: Scheme) -> bool:
    """Whether zero points are the columns', too."""
    return scheme.zero != "none" and len(scheme.blocks) == 1


def numbers(weight: QuantizedTensor) -> dict[str, Tensor]:
    """(groups, columns), of one type: "column_scale" and, where there are, "column_zero".

    int32 (out,), of scattered rows: "row_groups".
    """
    found = {"column_scale": weight.scales[-1]}
    if has_zeros(weight.scheme):
        assert weight.zeros is not None, "its scheme has zero points"
        found["column_zero"] = weight.zeros.to(weight.scales[-1].dtype)
    if weight.row_groups is not None:
        found["row_groups"] = weight.row_groups.to(torch.int32)
    return found


def outer_weight(codes: QuantizedTensor, scheme: Scheme, buffers: dict[str, Tensor]) -> QuantizedTensor:
    """The inverse of ``inner_weight`` and ``numbers``; groups of the row may have been cut."""
    columns, zeros = codes.shape[1], codes.zeros
    if "column_zero" in buffers:
        zeros = buffers["column_zero"][:, :columns]
        zeros = zeros.to(torch.uint8) if scheme.zero == "integer" else zeros
    finer = scheme.blocks[:-1] and codes.scheme.blocks
    groups = buffers.get("row_groups")
    return replace(
        codes,
        scheme=replace(scheme, blocks=(*finer, scheme.blocks[-1])),
        scales=(*(codes.scales if finer else ()), buffers["column_scale"][:, :columns]),
        zeros=zeros,
        row_groups=None if groups is None else groups.long(),
    )


def rows_of_groups(
    scheme: Scheme, rows: int, groups: int, row_groups: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """int64 (groups,): how many rows each has; int64 (out,): rows group by group, None: as they are.

    ValueError where they cannot be.
    """
    height = scheme.blocks[-1][0] or rows
    if not scheme.scattered:
        if groups != -(-rows // height):
            raise ValueError(f"{groups} groups of {rows} rows, {height} each")
        counts = torch.full((groups,), height)
        counts[-1] = rows - (groups - 1) * height
        return counts, None
    if row_groups is None or row_groups.shape != (rows,):
        raise ValueError(f"no groups of {rows} rows")
    if int(row_groups.min()) < 0 or int(row_groups.max()) >= groups:
        raise ValueError(f"rows of other than {groups} groups")
    return torch.bincount(row_groups.long(), minlength=groups), row_groups.long().argsort(stable=True)
