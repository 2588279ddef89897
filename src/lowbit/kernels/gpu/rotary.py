"""The rotary embedding of Q and K in Triton, with their norms: one launch, as ``elementwise`` cuts work.

A program has as many heads of one token as make 1,024 numbers. It has not run on a GPU yet.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.elementwise import HeadNorms, RotaryTable
from lowbit.kernels.gpu import runtime
from lowbit.kernels.gpu.elementwise import TILE
from lowbit.kernels.gpu.language import cast


@triton.jit
def _rotary(  # type: ignore[no-untyped-def]
    q,
    q_token,
    q_head,
    q_heads,
    k,
    k_token,
    k_head,
    k_heads,
    q_weight,
    k_weight,
    eps,
    cosines,
    sines,
    positions,
    dim,
    half,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORMED: tl.constexpr,
):
    """A program has one token and ``HEADS`` heads, of Q or of K."""
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = tl.arange(0, HALF)
    row = tl.load(positions + token).to(tl.int64) * half + pair
    cosine = tl.load(cosines + row, mask=pair < half, other=0.0)[None, :]
    sine = tl.load(sines + row, mask=pair < half, other=0.0)[None, :]
    q_blocks = tl.cdiv(q_heads, HEADS)
    if block < q_blocks:
        heads = q + token * q_token
        first = block * HEADS
        _turn(
            heads,
            q_head,
            q_heads,
            first,
            q_weight,
            eps,
            cosine,
            sine,
            dim,
            half,
            HEADS,
            HALF,
            REST,
            INTERLEAVED,
            NORMED,
        )
    else:
        heads = k + token * k_token
        first = (block - q_blocks) * HEADS
        _turn(
            heads,
            k_head,
            k_heads,
            first,
            k_weight,
            eps,
            cosine,
            sine,
            dim,
            half,
            HEADS,
            HALF,
            REST,
            INTERLEAVED,
            NORMED,
        )


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    x,
    step,
    heads,
    first_head,
    weight,
    eps,
    cosine,
    sine,
    dim,
    half,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORMED: tl.constexpr,
):
    """Heads ``first_head`` and following, normalized and then turned, in place."""
    head = (first_head + tl.arange(0, HEADS))[:, None]
    pair = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (pair < half)
    low = 2 * pair if INTERLEAVED else pair
    high = low + 1 if INTERLEAVED else low + half
    place = x + head * step
    first = tl.load(place + low, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + high, mask=inside, other=0.0).to(tl.float32)
    if NORMED:
        squares = tl.sum(first * first + second * second, 1)
        if REST:
            column = 2 * half + tl.arange(0, REST)[None, :]
            behind = (head < heads) & (column < dim)
            rest = tl.load(place + column, mask=behind, other=0.0).to(tl.float32)
            squares += tl.sum(rest * rest, 1)
        factor = tl.rsqrt(squares / dim + eps)[:, None]
        if REST:
            rest *= factor * tl.load(weight + column, mask=column < dim, other=0.0)
            tl.store(place + column, cast(rest, x.dtype.element_ty), mask=behind)
        first *= factor * tl.load(weight + low, mask=pair < half, other=0.0)
        second *= factor * tl.load(weight + high, mask=pair < half, other=0.0)
    tl.store(place + low, cast(first * cosine - second * sine, x.dtype.element_ty), mask=inside)
    tl.store(place + high, cast(second * cosine + first * sine, x.dtype.element_ty), mask=inside)


def apply_rotary(
    q: Tensor,
    k: Tensor,
    table: RotaryTable,
    positions: Tensor,
    interleaved: bool = False,
    norms: HeadNorms | None = None,
) -> None:
    """See ``elementwise.apply_rotary``; a position outside the table is not noticed."""
    tokens, q_heads, dim = q.shape
    half = table.cosines.shape[1]
    assert k.shape[0] == tokens and k.shape[2] == dim and 2 * half <= dim, (
        "q, k and the table belong together"
    )
    assert q.dtype is k.dtype and q.stride(2) == k.stride(2) == 1, "q and k are alike"
    if not tokens:
        return
    together = max(TILE // triton.next_power_of_2(dim), 1)
    runtime.launch(
        _rotary,
        (tokens, triton.cdiv(q_heads, together) + triton.cdiv(k.shape[1], together)),
        q,
        q.stride(0),
        q.stride(1),
        q_heads,
        k,
        k.stride(0),
        k.stride(1),
        k.shape[1],
        None if norms is None else norms.q_weight,
        None if norms is None else norms.k_weight,
        0.0 if norms is None else float(norms.eps),
        table.cosines,
        table.sines,
        positions,
        dim,
        half,
        HEADS=together,
        HALF=triton.next_power_of_2(half),
        REST=0 if 2 * half == dim else triton.next_power_of_2(dim - 2 * half),
        INTERLEAVED=interleaved,
        NORMED=norms is not None,
    )
