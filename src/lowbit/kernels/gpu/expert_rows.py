"""Which rows meet which expert, and the sum over a token's experts: what lies around grouped products.

A *pair* is a token and one of its k choices: pair p is token p // k. ``sort_pairs`` puts the pairs of each
expert below each other, in ascending order, and fills up to whole blocks of BLOCK_M rows, so that a block has
one expert:

    rows      | pairs of expert 0 … none none | pairs of expert 3 … none | (not written)
    experts   |      0      |        0        |      3      |      3     |   -1   |  …

How many blocks there are only the device knows; the host knows a bound, and blocks behind the last have
expert -1. Nothing waits for the device, and places follow from counts, not from who comes first: a pair's
row, and with it every sum, is the same in each run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.gpu import runtime
from lowbit.kernels.gpu.language import cast

SCAN = 1024  # pairs a program looks at in one step


@dataclass(frozen=True)
class SortedPairs:
    """``rows``: int32 (blocks * block_m,), ``pairs`` where there is none; ``experts``: int32 (blocks,)."""

    rows: Tensor
    experts: Tensor
    block_m: int
    pairs: int

    @property
    def blocks(self) -> int:
        """How many blocks there may be."""
        return len(self.experts)


def most_blocks(pairs: int, experts: int, block_m: int) -> int:
    """Blocks that hold all pairs whatever experts they chose: each expert used wastes block_m - 1 at most."""
    return (pairs + min(pairs, experts) * (block_m - 1)) // block_m


@triton.jit(do_not_specialize=["pairs", "blocks"])
def _sort(  # type: ignore[no-untyped-def]
    chosen,
    rows,
    block_experts,
    pairs,
    experts,
    blocks,
    BLOCK_M: tl.constexpr,
    BINS: tl.constexpr,
    SCAN: tl.constexpr,
):
    """A program is an expert: it counts everybody's pairs to know where its own begin, then places them."""
    expert = tl.program_id(0)
    offsets = tl.arange(0, SCAN)
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, pairs, SCAN):
        at = start + offsets
        found = tl.load(chosen + at, mask=at < pairs, other=experts)
        # In int64, as below: 1 << 40 would be expert 0 here, whose row for it nobody writes.
        counts += tl.histogram(tl.where((found >= 0) & (found < experts), found, experts).to(tl.int32), BINS)
    needed = (counts + BLOCK_M - 1) // BLOCK_M
    first_block = tl.sum(tl.where(bins < expert, needed, 0), 0)
    own_count = tl.sum(tl.where(bins == expert, counts, 0), 0)
    own_blocks = tl.sum(tl.where(bins == expert, needed, 0), 0)
    first_row = first_block * BLOCK_M
    placed = 0
    for start in range(0, pairs, SCAN):
        at = start + offsets
        own = (tl.load(chosen + at, mask=at < pairs, other=-1) == expert).to(tl.int32)
        tl.store(rows + first_row + placed + tl.cumsum(own, 0) - 1, at, mask=own != 0)
        placed += tl.sum(own, 0)
    none = own_count + tl.arange(0, BLOCK_M)
    pad = tl.zeros((BLOCK_M,), tl.int32) + pairs
    tl.store(rows + first_row + none, pad, mask=none < own_blocks * BLOCK_M)
    for start in range(0, own_blocks, SCAN):
        at = start + offsets
        tl.store(block_experts + first_block + at, tl.zeros((SCAN,), tl.int32) + expert, mask=at < own_blocks)
    if expert == experts - 1:
        for start in range(first_block + own_blocks, blocks, SCAN):
            at = start + offsets
            tl.store(block_experts + at, tl.full((SCAN,), -1, tl.int32), mask=at < blocks)


def sort_pairs(chosen: Tensor, experts: int, block_m: int) -> SortedPairs:
    """chosen: int64 (tokens, k)."""
    assert chosen.dtype is torch.int64 and chosen.is_contiguous(), "as the router gives it"
    pairs = chosen.numel()
    blocks = most_blocks(pairs, experts, block_m)
    rows = torch.empty(blocks * block_m, dtype=torch.int32, device=chosen.device)
    block_experts = torch.empty(blocks, dtype=torch.int32, device=chosen.device)
    runtime.launch(
        _sort,
        (experts,),
        chosen,
        rows,
        block_experts,
        pairs,
        experts,
        blocks,
        BLOCK_M=block_m,
        BINS=triton.next_power_of_2(experts + 1),
        SCAN=SCAN,
    )
    return SortedPairs(rows, block_experts, block_m, pairs)


@triton.jit
def _mix(  # type: ignore[no-untyped-def]
    y,
    chosen,
    weights,
    added,
    out,
    hidden,
    added_stride,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    ADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < hidden
    slot = tl.arange(0, SLOTS)
    numbers = tl.load(chosen + token * K + slot, mask=slot < K, other=0)
    # Keys stay positive numbers of 32 bits: their remainder is a slot, whatever expert a router names.
    numbers = tl.minimum(tl.maximum(numbers, 0), 0xFFFFFF).to(tl.int32)
    keys = tl.where(slot < K, numbers * SLOTS + slot, 0x7FFFFFFF)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(K):
        least = tl.min(keys, 0)
        pair = token * K + least % SLOTS
        here = inside & (tl.load(chosen + pair) != -1)
        row = tl.load(y + pair * hidden + columns, mask=here, other=0.0).to(tl.float32)
        total += row * tl.load(weights + pair)
        keys = tl.where(keys == least, 0x7FFFFFFF, keys)
    if ADDED:
        total += tl.load(added + token * added_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + columns, cast(total, out.dtype.element_ty), mask=inside)


def mix(y: Tensor, chosen: Tensor, weights: Tensor, added: Tensor | None, out: Tensor) -> None:
    """out (tokens, hidden): of the pairs' results y (tokens * k, hidden), weights float32 (tokens, k).

    A token's experts are added in ascending order, ``added`` (tokens, hidden) last, in float32. Of expert -1,
    which another rank has, nothing is added.
    """
    (tokens, k), hidden = chosen.shape, y.shape[1]
    assert y.is_contiguous() and out.is_contiguous() and out.shape == (tokens, hidden)
    assert weights.dtype is torch.float32 and weights.is_contiguous() and weights.shape == chosen.shape
    assert added is None or (added.shape == out.shape and added.stride(1) == 1)
    block = min(triton.next_power_of_2(hidden), 1024)
    runtime.launch(
        _mix,
        (tokens, triton.cdiv(hidden, block)),
        y,
        chosen,
        weights,
        added,
        out,
        hidden,
        0 if added is None else added.stride(0),
        K=k,
        SLOTS=triton.next_power_of_2(k),
        ADDED=added is not None,
        BLOCK=block,
    )
