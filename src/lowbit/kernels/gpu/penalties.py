"""Penalties and biases of logits on the GPU, which touch only the tokens that they are about.

A sequence with penalties has a row of ``table``, int32 (slots, vocabulary): how often a token stands in its
output, and a bit for those of its prompt; and the list of its tokens that are not zero there: ``ids``, int32
(slots, vocabulary), of which the first ``lengths[slot]`` count, in any order. ``note`` adds what was chosen
to both, without telling the host, which knows no more than how long a list can be.

``adjust`` changes logits where they lie and keeps what they were; once tokens are chosen it puts that back,
since log-probabilities are of logits as they were. A program has a row's biases that are no listed tokens, or
1,024 of its list. None of it has run on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.gpu import runtime
from lowbit.kernels.token_lists import PROMPT

_COUNT = tl.constexpr(PROMPT - 1)
_BLOCK = 1024


@triton.jit(do_not_specialize=["longest"])
def adjust(  # type: ignore[no-untyped-def]
    logits,
    logits_row,
    rows,  # int32 (changed,)
    slots,  # int32 (changed,), -1: no penalties
    numbers,  # float32 (changed, 4): repetition penalty, its inverse, frequency, presence
    starts,  # int32 (changed + 1,): where each row's biases begin
    bias_ids,  # int32 (biases,), of a row all different
    biases,  # float32 (biases,)
    before_bias,  # float32 (biases,): logits as they were
    before,  # float32 (changed, longest): of listed tokens
    table,
    ids,
    lengths,
    vocabulary,
    longest,
    BACK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    changed, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    logits += tl.load(rows + changed).to(tl.int64) * logits_row
    slot = tl.load(slots + changed).to(tl.int64)
    first, last = tl.load(starts + changed), tl.load(starts + changed + 1)
    table += slot * vocabulary
    ids += slot * vocabulary
    if part == 0:
        for start in range(first, last, BLOCK):
            place = start + tl.arange(0, BLOCK)
            token = tl.load(bias_ids + place, mask=place < last, other=0)
            listed = tl.load(table + token, mask=(place < last) & (slot >= 0), other=0) != 0
            mine = (place < last) & (~listed)
            if BACK:
                tl.store(logits + token, tl.load(before_bias + place, mask=mine), mask=mine)
            else:
                x = tl.load(logits + token, mask=mine)
                tl.store(before_bias + place, x, mask=mine)
                tl.store(logits + token, x + tl.load(biases + place, mask=mine), mask=mine)
    elif slot >= 0:
        at = (part - 1) * BLOCK + tl.arange(0, BLOCK)
        there = at < tl.load(lengths + slot)
        known = tl.load(ids + at, mask=there, other=0)
        kept = before + changed * longest + at
        if BACK:
            tl.store(logits + known, tl.load(kept, mask=there), mask=there)
        else:
            z = tl.load(logits + known, mask=there, other=0.0)
            tl.store(kept, z, mask=there)
            for bias in range(first, last):
                z = tl.where(known == tl.load(bias_ids + bias), z + tl.load(biases + bias), z)
            of_row = numbers + changed * 4
            count = (tl.load(table + known, mask=there, other=0) & _COUNT).to(tl.float32)
            z *= tl.where(z > 0.0, tl.load(of_row + 1), tl.load(of_row))
            z -= count * tl.load(of_row + 2)
            z -= tl.where(count > 0.0, tl.load(of_row + 3), 0.0)
            tl.store(logits + known, z, mask=there)


@triton.jit
def note(tokens, rows, slots, table, ids, lengths, vocabulary):  # type: ignore[no-untyped-def]
    """One more of a row's token in the sequence's table, and if it is the first one in its list."""
    slot = tl.load(slots + tl.program_id(0)).to(tl.int64)
    token = tl.load(tokens + tl.load(rows + tl.program_id(0)))
    held = tl.atomic_add(table + slot * vocabulary + token, 1, sem="relaxed")
    if held == 0:
        place = tl.atomic_add(lengths + slot, 1, sem="relaxed")
        tl.store(ids + slot * vocabulary + place, token.to(tl.int32))


@dataclass(frozen=True)
class Adjustment:
    """A step's changes to logits, on the device; the parameters of ``adjust`` say what each tensor is.

    ``longest``: as long as the longest list can be.
    """

    rows: Tensor
    slots: Tensor
    numbers: Tensor
    starts: Tensor
    bias_ids: Tensor
    biases: Tensor
    before_bias: Tensor
    before: Tensor
    longest: int

    @staticmethod
    def of(
        rows: Tensor,
        slots: Tensor,
        numbers: Tensor,
        starts: Tensor,
        bias_ids: Tensor,
        biases: Tensor,
        longest: int,
    ) -> Adjustment:
        """With room for what was there before."""
        before = torch.empty(len(rows), longest, device=rows.device)
        return Adjustment(
            rows, slots, numbers, starts, bias_ids, biases, torch.empty_like(biases), before, longest
        )

    def __call__(
        self, logits: Tensor, table: Tensor, ids: Tensor, lengths: Tensor, *, back: bool = False
    ) -> None:
        """Change float32 (rows, vocabulary) logits in place, or undo that."""
        assert logits.dtype is torch.float32 and logits.stride(1) == 1, "a row's logits lie together"
        runtime.launch(
            adjust,
            (len(self.rows), 1 + triton.cdiv(self.longest, _BLOCK)),
            *(logits, logits.stride(0), self.rows, self.slots, self.numbers, self.starts, self.bias_ids),
            *(self.biases, self.before_bias, self.before, table, ids, lengths, table.shape[1], self.longest),
            BACK=back,
            BLOCK=_BLOCK,
        )


def note_tokens(
    tokens: Tensor, rows: Tensor, slots: Tensor, table: Tensor, ids: Tensor, lengths: Tensor
) -> None:
    """Add what ``rows``, int32, have of int64 (rows,) ``tokens`` to their sequences' lists."""
    runtime.launch(
        note, (len(rows),), *(tokens, rows, slots, table, ids, lengths, table.shape[1]), num_warps=1
    )
