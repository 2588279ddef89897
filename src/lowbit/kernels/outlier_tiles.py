"""Outliers of a weight as native code meets them: tile by tile (csrc/linear_halves.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.kernels.packed_linear import COLUMNS, ROWS, Description
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import Outliers
from lowbit.numerics.scheme import Scheme

_PLACES = ROWS * COLUMNS


def _tiles(description: Description) -> int:
    """Of all blocks of rows."""
    return -(-description.rows // ROWS) * (description.columns // COLUMNS)


def nbytes(scheme: Scheme, shape: tuple[int, ...], description: Description) -> int:
    """Of ``tiled``'s buffers; 0 where a scheme has no outliers."""
    if scheme.outliers is None:
        return 0
    return 4 * (_tiles(description) + 1 + round(scheme.outlier_share * shape[0] * shape[1]))


def tiled(outliers: Outliers, description: Description) -> dict[str, Tensor]:
    """int32 "outlier_starts" (tiles + 1,) and "outliers" (count,): place in the tile, above it the number."""
    rows, columns = outliers.rows, outliers.columns
    tiles = rows // ROWS * (description.columns // COLUMNS) + columns // COLUMNS
    places = columns % COLUMNS * ROWS + rows % ROWS
    order = (tiles * _PLACES + places).argsort()
    starts = torch.bincount(tiles, minlength=_tiles(description)).cumsum(0)
    return {
        "outlier_starts": torch.nn.functional.pad(starts, (1, 0)).int(),
        "outliers": ((outliers.entries & ~0xFFFF) | places.int())[order],
    }


def point(description: Description, buffers: dict[str, Tensor], columns: int, origin: str) -> None:
    """Tells native code where they lie; ValueError where they cannot be those of the weight."""
    starts, entries = buffers.get("outlier_starts"), buffers.get("outliers")
    if (
        starts is None
        or entries is None
        or not starts.dtype is entries.dtype is torch.int32
        or starts.shape != (_tiles(description) + 1,)
        or int(starts[0]) != 0
        or int(starts[-1]) != len(entries)
        or bool((starts.diff() < 0).any())
    ):
        raise ValueError(f"{origin}: no outliers of {_tiles(description)} tiles")
    if len(entries):
        rows, found, places = _places(description, starts, entries)
        if int(places.max()) >= _PLACES or int(rows.max()) >= description.rows or int(found.max()) >= columns:
            raise ValueError(f"{origin}: an outlier outside {description.rows} x {columns}")
    description.outlier_starts, description.outliers = starts.data_ptr(), entries.data_ptr()


def _places(description: Description, starts: Tensor, entries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int64 (count,): rows, columns, and places in the tile."""
    across, places = description.columns // COLUMNS, entries.long() & 0xFFFF
    tiles = torch.arange(len(starts) - 1).repeat_interleave(starts.diff())
    rows = tiles // across * ROWS + places % ROWS
    return rows, tiles % across * COLUMNS + places // ROWS, places


def untiled(description: Description, buffers: dict[str, Tensor]) -> Outliers:
    """The inverse of ``tiled``."""
    starts, entries = buffers["outlier_starts"], buffers["outliers"]
    rows, columns, _ = _places(description, starts, entries)
    order = (rows * description.columns + columns).argsort()
    values = Outliers(starts, entries).values(number_format("f16"))
    return Outliers.of(rows[order], columns[order], values[order], description.rows)
