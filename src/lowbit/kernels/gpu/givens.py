"""Givens rotations of activations on the GPU: ``numerics.rotation.Rotation``'s steps of pairs of columns.

A step gives every column of a block another one as its partner, and no pair leaves its block. So a program
has whole blocks of some rows in registers, takes all steps one after another, and finds partners among its
own columns: x is read and written once. A step's three tables are 12 bytes a column, shared by a program's
rows: for one token of 4,096 columns and 8 steps they are 384 KiB, a twentieth of a 4-bit weight of as many
rows. Small blocks go together, and a program has no more numbers than registers hold.

Up to 256 columns a warp has a row and its lanes ask each other for a partner. That takes an instruction for
each pair of a lane's numbers, 64 there (and minutes to compile for 4,096 columns): larger blocks, which
nobody's checkpoints have, are exchanged through memory, which is the cache's.

Every step is x cos + y sin in float32, the definition's numbers in its order. In Triton's interpreter they
have its bits; compiled, the sum and one of the products may round once instead of twice, which changes a
number by 2^-24 of its pair's length a step. None of it has run on a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.gpu import runtime
from lowbit.kernels.gpu.language import cast
from lowbit.numerics.rotation import Rotation

LARGEST = 8192  # columns of a block: registers hold no more
_GATHERED = 256  # of one that stays in registers
_COLUMNS = 128  # of small blocks together
_NUMBERS = 2048  # of a program with several rows
_ROWS = 16  # of one at most


@triton.jit(do_not_specialize=["rows"])
def givens(  # type: ignore[no-untyped-def]
    x,  # (rows, width)
    x_row,
    out,  # (rows, width), may be x
    out_row,
    before,  # float32 (width,), or None for ones
    after,
    partners,  # int32 (STEPS, width): columns
    cosines,  # float32 alike
    sines,
    kept,  # float32 (rows, width), written over; None: partners are gathered in registers
    rows,
    width,
    STEPS: tl.constexpr,
    SPAN: tl.constexpr,  # columns of whole blocks that a program has
    M: tl.constexpr,
    N: tl.constexpr,  # SPAN, or the next power of two
):
    """All steps for M rows of SPAN columns."""
    first = tl.program_id(1) * SPAN
    place = tl.arange(0, N)
    column = first + place
    there = (place < SPAN) & (column < width)
    row = tl.program_id(0) * M + tl.arange(0, M)
    inside = (row < rows)[:, None] & there[None, :]
    row = row.to(tl.int64)[:, None]
    values = tl.load(x + row * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if before is not None:
        values *= tl.load(before + column, mask=there, other=0.0)[None, :]
    for step in range(STEPS):
        at = step * width + column
        partner = tl.load(partners + at, mask=there, other=first) - first
        cosine = tl.load(cosines + at, mask=there, other=0.0)[None, :]
        sine = tl.load(sines + at, mask=there, other=0.0)[None, :]
        if kept is None:
            others = tl.gather(values, tl.broadcast_to(partner[None, :], (M, N)), 1)
        else:
            own = kept + row * width + first
            tl.store(own + place[None, :], values, mask=inside)
            tl.debug_barrier()  # all threads have written theirs
            others = tl.load(own + partner[None, :], mask=inside, other=0.0)
            tl.debug_barrier()  # and read, before the next step is written
        values = values * cosine + others * sine
    if after is not None:
        values *= tl.load(after + column, mask=there, other=0.0)[None, :]
    tl.debug_barrier()  # where out is x all of it has been read
    tl.store(out + row * out_row + column[None, :], cast(values, out.dtype.element_ty), mask=inside)


def takes(rotation: Rotation) -> bool:
    """Whether this kernel has it."""
    tensors = (rotation.before, rotation.after, rotation.partners, rotation.cosines, rotation.sines)
    return (
        rotation.partners is not None
        and rotation.size <= LARGEST
        and all(tensor is None or tensor.is_contiguous() for tensor in tensors)
    )


def rotate(rotation: Rotation, x: Tensor, out: Tensor) -> None:
    """x (rows, width) -> out, which may be x."""
    assert rotation.partners is not None, "taken"
    rows, width = x.shape
    steps, size = len(rotation.partners), rotation.size
    columns = triton.next_power_of_2(size)
    span = size
    if columns == size:
        span = columns = max(size, _COLUMNS)
    kept = None
    if columns > _GATHERED:
        kept = torch.empty(rows, width, dtype=torch.float32, device=x.device)
    together = 1 if rows < _ROWS else max(min(_ROWS, _NUMBERS // columns), 1)
    runtime.launch(
        givens,
        (triton.cdiv(rows, together), triton.cdiv(width, span)),
        *(x, x.stride(0), out, out.stride(0), rotation.before, rotation.after),
        *(rotation.partners, rotation.cosines, rotation.sines, kept, rows, width),
        num_warps=min(max(together * columns // 512, 1), 8),
        STEPS=steps,
        SPAN=span,
        M=together,
        N=columns,
    )
