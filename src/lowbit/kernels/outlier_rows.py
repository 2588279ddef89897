"""Outliers of a weight as native code meets them: row by row (csrc/linear_outliers.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.kernels.packed_linear import Description
from lowbit.numerics.quantized_tensor import Outliers
from lowbit.numerics.scheme import Scheme


def nbytes(scheme: Scheme, shape: tuple[int, ...]) -> int:
    """Of ``buffers_of`` a weight of the scheme; 0 where it has no outliers."""
    if scheme.outliers is None:
        return 0
    return 4 * (shape[0] + 1 + round(scheme.outlier_share * shape[0] * shape[1]))


def buffers_of(outliers: Outliers) -> dict[str, Tensor]:
    """int32 "outlier_starts" (out + 1,) and "outliers" (count,), each row's in ascending columns."""
    order = (outliers.rows << 16 | outliers.columns).argsort()
    return {"outlier_starts": outliers.starts.contiguous(), "outliers": outliers.entries[order]}


def point(description: Description, buffers: dict[str, Tensor], columns: int, origin: str) -> None:
    """Tells native code where they lie; ValueError where they cannot be those of the weight."""
    starts, entries = buffers.get("outlier_starts"), buffers.get("outliers")
    if (
        starts is None
        or entries is None
        or not starts.dtype is entries.dtype is torch.int32
        or starts.shape != (description.rows + 1,)
        or int(starts[0]) != 0
        or int(starts[-1]) != len(entries)
        or bool((starts.diff() < 0).any())
    ):
        raise ValueError(f"{origin}: no outliers of {description.rows} rows")
    found = Outliers(starts, entries)
    if bool((found.columns >= columns).any()):
        raise ValueError(f"{origin}: an outlier outside {description.rows} x {columns}")
    if bool(((found.rows << 16 | found.columns).diff() <= 0).any()):
        raise ValueError(f"{origin}: a row's outliers are in no ascending columns")
    description.outlier_starts, description.outliers = starts.data_ptr(), entries.data_ptr()
