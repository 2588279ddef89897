"""Which weights kernels of vectors that run down a column (VPTQ) can have, on a CPU and on a GPU alike."""

from __future__ import annotations

from lowbit.numerics.number_formats import RowVectorLayout
from lowbit.numerics.scheme import Scheme

_MOST_VECTORS = 1 << 16  # of a codebook: indices have 16 bits


def unfit(scheme: Scheme, columns: int, lengths: range) -> str | None:
    """Why a kernel for vectors of ``lengths`` rows cannot run a weight of so many columns, or None."""
    layout = scheme.weight.vectors
    if not isinstance(layout, RowVectorLayout):
        return "weights are no vectors of rows"
    if layout.length not in lengths:
        return f"vectors of {layout.length} rows"
    if max(layout.centroids, layout.residual) > _MOST_VECTORS:
        return f"codebooks of {max(layout.centroids, layout.residual)} vectors"
    if layout.columns not in (0, columns):
        return f"{columns} columns of {layout.columns}"
    if scheme.zero != "none" or scheme.flattened or scheme.blocks not in ((), ((0, 1),)):
        return "needs nothing, or one scale for all rows of a column"
    return None
