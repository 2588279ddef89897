"""Routing on the device: which experts each token goes to, all rules of ``layers.routing`` in one kernel.

A program is a token. Its scores lie in a tile of (groups, experts a group), both padded to powers of two. A
choice is the largest of 64-bit keys: the score's order above, the expert's number (lower first) below, so
that no two keys are equal and ties and NaN come out as ``Route.in_torch`` has them. Exponentials are the
device's own: weights may differ from torch's in the last bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.gpu import runtime

NEVER = tl.constexpr(-(1 << 63))  # below every key


@triton.jit
def _keys(scores, places):  # type: ignore[no-untyped-def]
    """int64, ordered as scores are, of equals the lower place first; NaN is the largest."""
    bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    order = tl.where(scores != scores, 0x7FFFFFFF, order)
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - places).to(tl.int64)


@triton.jit
def _place(key):  # type: ignore[no-untyped-def]
    """The place that a key was made of."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _route(  # type: ignore[no-untyped-def]
    logits,
    correction,
    chosen,
    weights,
    stride,
    size,
    scale,
    RULE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK_G)
    member = tl.arange(0, BLOCK_S)
    place = group[:, None] * size + member[None, :]
    there = (group[:, None] < GROUPS) & (member[None, :] < size)
    x = tl.load(logits + token * stride + place, mask=there, other=float("-inf"))

    if RULE == "group_sigmoid":
        top = tl.maximum(x, 0.0)  # as a softmax over x and 0
        own = tl.exp(x - top)
        scores = own / (own + tl.exp(-top))
        ranked = scores + tl.load(correction + place, mask=there, other=0.0)
    elif RULE == "top_k_softmax":
        scores = x
        ranked = x
    else:
        largest = tl.max(tl.max(x, 1), 0)
        wide = tl.where(there, tl.exp(x - largest), 0.0)
        scores = wide / tl.sum(tl.sum(wide, 1), 0)
        ranked = scores

    if GROUPS > KEPT:
        keys = tl.where(there, _keys(ranked, place), NEVER)
        best = tl.max(keys, 1)  # (groups,)
        mark = tl.sum(tl.where(keys == best[:, None], ranked, 0.0), 1)
        if RULE == "group_sigmoid":  # a group's score is the sum of its two best
            second = tl.max(tl.where(keys == best[:, None], NEVER, keys), 1)
            mark += tl.sum(tl.where((keys == second[:, None]) & there, ranked, 0.0), 1)
        group_keys = tl.where(group < GROUPS, _keys(mark, group), NEVER)
        inside = group < 0
        for _ in range(KEPT):
            found = tl.max(group_keys, 0)
            inside = inside | (group_keys == found)
            group_keys = tl.where(group_keys == found, NEVER, group_keys)
        ranked = tl.where(inside[:, None], ranked, float("-inf") if RULE == "group_sigmoid" else 0.0)
        if RULE == "group_softmax":
            scores = ranked

    slot = tl.arange(0, SLOTS)
    numbers = tl.zeros((SLOTS,), tl.int32)
    values = tl.full((SLOTS,), float("-inf") if RULE == "top_k_softmax" else 0.0, tl.float32)
    keys = tl.where(there, _keys(ranked, place), NEVER)
    for i in range(K):
        found = tl.max(tl.max(keys, 1), 0)
        numbers = tl.where(slot == i, _place(found), numbers)
        value = tl.sum(tl.sum(tl.where(keys == found, scores, 0.0), 1), 0)
        values = tl.where(slot == i, value, values)
        keys = tl.where(keys == found, NEVER, keys)

    if RULE == "top_k_softmax":
        wide = tl.where(slot < K, tl.exp(values - tl.max(values, 0)), 0.0)
        values = wide / tl.sum(wide, 0)
    else:
        if RENORMALIZE:
            values = values / (tl.sum(values, 0) + (1e-20 if RULE == "group_sigmoid" else 0.0))
        values = values * scale
    tl.store(chosen + token * K + slot, numbers.to(tl.int64), mask=slot < K)
    tl.store(weights + token * K + slot, values, mask=slot < K)


def route(
    logits: Tensor,
    rule: str,
    k: int,
    groups: int,
    kept: int,
    renormalize: bool,
    scale: float,
    correction: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """float32 logits (tokens, experts) -> int64 and float32 (tokens, k): see ``layers.routing``."""
    tokens, experts = logits.shape
    assert logits.dtype is torch.float32 and logits.stride(1) == 1, "router logits are float32 rows"
    assert k <= experts and experts % groups == 0 and kept <= groups, "the config was checked"
    assert correction is None or (correction.dtype is torch.float32 and correction.is_contiguous())
    chosen = torch.empty(tokens, k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, k, dtype=torch.float32, device=logits.device)
    if tokens:
        size = experts // groups
        runtime.launch(
            _route,
            (tokens,),
            logits,
            correction,
            chosen,
            weights,
            logits.stride(0),
            size,
            float(scale),
            num_warps=1 if experts <= 128 else 4,
            RULE=rule,
            RENORMALIZE=renormalize,
            K=k,
            SLOTS=triton.next_power_of_2(k),
            GROUPS=groups,
            KEPT=kept,
            BLOCK_G=triton.next_power_of_2(groups),
            BLOCK_S=triton.next_power_of_2(size),
        )
    return chosen, weights
