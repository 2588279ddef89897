"""Sampling on the GPU: the draw of a token a row; nothing waits for the device.

The definition is the engine's sampler: temperature, min-p, top-k, top-p, one uniform number against a
cumulative sum, in the order of ids where nothing was cut by rank, else from the likeliest down, equals by id.
Rows do not see each other, and the same numbers give the same token whatever else is in the batch.

A weight is exp(z - largest z) in float32, kept as a whole number of 2^-42: sums of whole numbers have one
result in any order, so partial sums and atomics are exact and the same every time. Up to 2^21 tokens fit in
63 bits. A token more than 29 nats below the likeliest weighs nothing; the border between two tokens is within
about 1e-7 of float64's.

No vocabulary is sorted. Four launches cut a row in chunks of 2,048 logits:

1. ``_peaks`` (``survey``): each chunk's largest logit, its place, how many are no finite numbers, and where
   log-probabilities are asked for (``ratings``) its sum of exponentials;
2. ``_weights``: each chunk's sum of weights, and where something is cut by rank a histogram of how many
   tokens lie how far below the largest, in steps of 1/16 nat;
3. ``_candidates``: tokens of the steps that certainly hold all that is kept, or of as many steps as have
   1,024 tokens, in no order;
4. ``_choose``: a program a row. Uncut rows go through the chunks' sums and one chunk. Candidates are ranked
   by counting what lies above each. Where they are not all that is kept (flat distributions, a top-k of
   thousands), three borders (top-k, top-p, the draw) are found by bisection over the whole row, 32 passes
   each.

Grids follow from shapes alone, so all of it can be captured in a CUDA graph. It has not run on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.gpu import runtime

CHUNK = 2048  # logits a program of the first three kernels reads
CANDIDATES = 1024  # of a row, ranked without a pass over the vocabulary
MOST = 1 << 21  # tokens whose weights' sum fits in 63 bits

_ONE = tl.constexpr(float(1 << 42))  # the largest weight
_STEPS = tl.constexpr(256)  # of the histogram; the last one holds all that is further away
_A_NAT = tl.constexpr(16.0)  # steps
_LEAST = tl.constexpr(-(1 << 31))  # of all keys
NOTHING = tl.constexpr(-(1 << 63))  # where there is no candidate


@triton.jit
def _scaled(logits, temperature):  # type: ignore[no-untyped-def]
    """Logits over the temperature, as float32 divides, and no negative zero: it is equal to zero."""
    z = tl.div_rn(logits, tl.zeros_like(logits) + temperature)
    return tl.where(z == 0.0, 0.0, z)


@triton.jit
def _weight(z, peak, min_p):  # type: ignore[no-untyped-def]
    """int64: exp(z - peak) in units of 2^-42, zero where it is below min-p."""
    relative = tl.where(z == peak, 1.0, tl.exp(z - peak))
    kept = (relative.to(tl.float64) >= min_p) & (relative >= 0.0)  # a NaN weighs nothing
    return tl.where(kept, relative * _ONE, 0.0).to(tl.int64)


@triton.jit
def _key(z):  # type: ignore[no-untyped-def]
    """int32 that orders as float32 z does."""
    bits = z.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def packed(z, column):  # type: ignore[no-untyped-def]
    """int64, larger for the likelier token: by float32 z, which is no negative zero, equals by id."""
    return (_key(z).to(tl.int64) << 32) | (0xFFFFFFFF - column.to(tl.int64))


@triton.jit
def number_of(token):  # type: ignore[no-untyped-def]
    """z of a ``packed`` token."""
    narrow = (token >> 32).to(tl.int32)
    return (narrow ^ ((narrow >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def id_of(token):  # type: ignore[no-untyped-def]
    """The id of a ``packed`` token, int64."""
    return 0xFFFFFFFF - (token & 0xFFFFFFFF)


@triton.jit
def _step(z, peak):  # type: ignore[no-untyped-def]
    """The histogram's step of z: how far it is below the largest."""
    below = tl.minimum((peak - z) * _A_NAT, _STEPS - 1.0)
    return tl.where(z == peak, 0.0, tl.where(below >= 0.0, below, _STEPS - 1.0)).to(tl.int32)


@triton.jit
def peak_of(peaks, row, chunks, CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest logit of a row, from its chunks' (NaN left out), and the first chunk that has it."""
    chunk = tl.arange(0, CHUNKS)
    values = tl.load(peaks + row * chunks + chunk, mask=chunk < chunks, other=-float("inf"))
    peak = tl.max(tl.where(values == values, values, -float("inf")), 0)
    return peak, tl.min(tl.where((values == peak) & (chunk < chunks), chunk, CHUNKS - 1), 0)


@triton.jit
def _peaks(  # type: ignore[no-untyped-def]
    logits,
    logits_row,
    peaks,
    places,
    broken,
    sums,
    histogram,
    count,
    width,
    chunks,
    CHUNK: tl.constexpr,
    STEPS: tl.constexpr,
    SUMS: tl.constexpr,
    CLEARS: tl.constexpr,
):
    """A chunk's largest logit and its first place p, or -1 - p where there is a NaN, which is no largest.

    ``broken``: how many are NaN or infinite. ``SUMS``: the sum of exp(logit - the chunk's largest), float32.
    ``CLEARS``: the histogram and the count of candidates of its row are set to zero, by the first chunk.
    """
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * logits_row + column, mask=column < width, other=-float("inf"))
    finite = tl.where(x == x, x, -float("inf"))
    peak = tl.max(finite, 0)
    place = tl.min(tl.where((finite == peak) & (column < width), column, width - 1), 0)
    wrong = tl.max((x != x).to(tl.int32), 0)
    tl.store(peaks + row * chunks + chunk, peak)
    tl.store(places + row * chunks + chunk, tl.where(wrong > 0, -1 - place, place))
    size = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    unfit = (column < width) & (size >= 0x7F800000)
    tl.store(broken + row * chunks + chunk, tl.sum(unfit.to(tl.int32), 0))
    if SUMS:
        each = tl.where(finite == peak, 1.0, tl.exp(finite - peak))
        tl.store(sums + row * chunks + chunk, tl.sum(tl.where(column < width, each, 0.0), 0))
    if CLEARS:  # noqa: SIM102 (a constant, and what is not)
        if chunk == 0:
            tl.store(histogram + row * STEPS + tl.arange(0, STEPS), tl.zeros((STEPS,), tl.int32))
            tl.store(count + row, 0)


@triton.jit
def _row_peaks(  # type: ignore[no-untyped-def]
    peaks, places, broken, values, ids, unfit, chunks, CHUNKS: tl.constexpr
):
    """Each row's largest logit, NaN where it holds one, its first place, and how many are not finite."""
    row = tl.program_id(0).to(tl.int64)
    peak, chunk = peak_of(peaks, row, chunks, CHUNKS)
    column = tl.arange(0, CHUNKS)
    wrong = tl.min(tl.load(places + row * chunks + column, mask=column < chunks, other=0), 0) < 0
    place = tl.load(places + row * chunks + chunk)
    tl.store(values + row, tl.where(wrong, float("nan"), peak))
    tl.store(ids + row, tl.where(place < 0, -1 - place, place).to(tl.int64))
    each = tl.load(broken + row * chunks + column, mask=column < chunks, other=0)
    tl.store(unfit + row, tl.sum(each, 0))


@triton.jit
def _weights(  # type: ignore[no-untyped-def]
    logits,
    logits_row,
    peaks,
    temperature,
    top_k,
    top_p,
    min_p,
    sums,
    histogram,
    width,
    chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    STEPS: tl.constexpr,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heat = tl.load(temperature + row)
    if heat > 0.0:
        peak, _ = peak_of(peaks, row, chunks, CHUNKS)
        peak = _scaled(peak, heat)
        column = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits + row * logits_row + column, mask=column < width, other=-float("inf"))
        z = _scaled(x, heat)
        w = tl.where(column < width, _weight(z, peak, tl.load(min_p + row)), 0)
        tl.store(sums + row * chunks + chunk, tl.sum(w, 0))
        k = tl.load(top_k + row)
        if ((k > 0) & (k < width)) | (tl.load(top_p + row) < 1.0):
            counts = tl.histogram(tl.where(column < width, _step(z, peak), STEPS - 1), STEPS)
            step = tl.arange(0, STEPS)
            tl.atomic_add(histogram + row * STEPS + step, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _total(sums, row, chunks, CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """int64: all weights of a row."""
    chunk = tl.arange(0, CHUNKS)
    return tl.sum(tl.load(sums + row * chunks + chunk, mask=chunk < chunks, other=0), 0)


@triton.jit
def _candidates(  # type: ignore[no-untyped-def]
    logits,
    logits_row,
    peaks,
    temperature,
    top_k,
    top_p,
    sums,
    histogram,
    count,
    candidates,
    width,
    chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    STEPS: tl.constexpr,
    MOST: tl.constexpr,
):
    """Keys and ids of the nearest steps' tokens, packed: the larger is the likelier, or the lower id."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heat, k, p = tl.load(temperature + row), tl.load(top_k + row), tl.load(top_p + row)
    ranked = (k > 0) & (k < width)
    if (heat > 0.0) & (ranked | (p < 1.0)):
        step = tl.arange(0, STEPS)
        counts = tl.load(histogram + row * STEPS + step)
        before = tl.cumsum(counts, 0) - counts
        # No token of a step weighs less than at its far end.
        least = (counts.to(tl.float32) * tl.exp(-(step + 1.0) / _A_NAT)).to(tl.float64)
        held = tl.cumsum(least, 0) - least
        border = p * (_total(sums, row, chunks, CHUNKS).to(tl.float64) / _ONE)
        enough = tl.where(ranked, before >= k, held >= border) & (step > 0)
        fits = before + counts <= MOST
        steps = tl.sum(
            (fits & (~enough) & (step < STEPS - 1)).to(tl.int32), 0
        )  # all of them are the first ones

        peak, _ = peak_of(peaks, row, chunks, CHUNKS)
        peak = _scaled(peak, heat)
        column = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits + row * logits_row + column, mask=column < width, other=-float("inf"))
        z = _scaled(x, heat)
        taken = (column < width) & (_step(z, peak) < steps)
        number = tl.sum(taken.to(tl.int32), 0)
        if number > 0:
            first = tl.atomic_add(count + row, number, sem="relaxed")
            place = first + tl.cumsum(taken.to(tl.int32), 0) - 1
            tl.store(candidates + row * MOST + place, packed(z, column), mask=taken & (place < MOST))


@triton.jit
def _above(  # type: ignore[no-untyped-def]
    logits, width, heat, peak, min_p, key, COUNTED: tl.constexpr, BLOCK: tl.constexpr
):
    """int64: how many tokens of a row have at least this key, or what they weigh."""
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < width, other=-float("inf"))
        z = _scaled(x, heat)
        taken = (column < width) & (_key(z) >= key)
        if COUNTED:
            total += taken.to(tl.int64)
        else:
            total += tl.where(taken, _weight(z, peak, min_p), 0)
    return tl.sum(total, 0)


@triton.jit
def _border(  # type: ignore[no-untyped-def]
    logits, width, heat, peak, min_p, wanted, COUNTED: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest key with at least ``wanted`` at and above it; the least one where there is not so much."""
    low, high = tl.full((), _LEAST, tl.int64), _key(peak).to(tl.int64)
    while low < high:
        middle = (low + high + 1) >> 1
        if _above(logits, width, heat, peak, min_p, middle.to(tl.int32), COUNTED, BLOCK) >= wanted:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def _over(  # type: ignore[no-untyped-def]
    logits, width, heat, peak, min_p, key, COUNTED: tl.constexpr, BLOCK: tl.constexpr
):
    """How many tokens have a larger key, or what they weigh; ``key``: int64, at most the peak's."""
    found = _above(logits, width, heat, peak, min_p, (key + 1).to(tl.int32), COUNTED, BLOCK)
    return tl.where(key >= _key(peak).to(tl.int64), 0, found)


@triton.jit
def _weight_of(key, peak, min_p):  # type: ignore[no-untyped-def]
    """The weight of a token of this int64 key."""
    return _weight(number_of(key << 32), peak, min_p)


@triton.jit
def _equal_number(logits, width, heat, key, number, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The id of the ``number``-th token (from 0) that has this key."""
    found, before = tl.full((), 0, tl.int32), tl.full((), 0, tl.int64)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < width, other=-float("inf"))
        equal = (column < width) & (_key(_scaled(x, heat)).to(tl.int64) == key)
        rank = before + tl.cumsum(equal.to(tl.int64), 0) - 1
        found = tl.maximum(found, tl.max(tl.where(equal & (rank <= number), column, 0), 0))
        before += tl.sum(equal.to(tl.int64), 0)
    return found


@triton.jit
def _by_bisection(  # type: ignore[no-untyped-def]
    logits, width, heat, peak, k, p, min_p, uniform, total, BLOCK: tl.constexpr
):
    """The drawn token of a row where any number of tokens may be kept.

    Tokens of a border's key weigh the same: how many of them are kept, the lowest ids, follows by division.
    """
    if (k > 0) & (k < width):
        key = _border(logits, width, heat, peak, min_p, k.to(tl.int64), True, BLOCK)
        equals = k.to(tl.int64) - _over(logits, width, heat, peak, min_p, key, True, BLOCK)
        total = _over(logits, width, heat, peak, min_p, key, False, BLOCK)
        total += equals * _weight_of(key, peak, min_p)
    kept = total
    if p < 1.0:
        # A token stays if what is above it weighs less than this; whole numbers: less than it rounded up.
        limit = tl.maximum(tl.ceil(p * total.to(tl.float64)).to(tl.int64), 1)
        near = _border(logits, width, heat, peak, min_p, limit, False, BLOCK)
        above = _over(logits, width, heat, peak, min_p, near, False, BLOCK)
        each = tl.maximum(_weight_of(near, peak, min_p), 1)
        # All of the border's equals where it is the top-k's own.
        kept = tl.minimum(above + tl.cdiv(limit - above, each) * each, total)
    target = tl.minimum(tl.floor(uniform * kept.to(tl.float64)).to(tl.int64), kept - 1)
    drawn = _border(logits, width, heat, peak, min_p, target + 1, False, BLOCK)
    above = _over(logits, width, heat, peak, min_p, drawn, False, BLOCK)
    number = (target - above) // tl.maximum(_weight_of(drawn, peak, min_p), 1)
    return _equal_number(logits, width, heat, drawn, number, BLOCK)


@triton.jit
def _in_order(  # type: ignore[no-untyped-def]
    logits, sums, width, chunks, heat, peak, min_p, uniform, total, CHUNK: tl.constexpr, CHUNKS: tl.constexpr
):
    """The drawn token of a row of which nothing is cut by rank."""
    target = tl.minimum(tl.floor(uniform * total.to(tl.float64)).to(tl.int64), total - 1)
    chunk = tl.arange(0, CHUNKS)
    each = tl.load(sums + chunk, mask=chunk < chunks, other=0)
    upto = tl.cumsum(each, 0)
    mine = tl.sum((upto <= target).to(tl.int32), 0)
    mine = tl.minimum(mine, chunks - 1)
    before = tl.sum(tl.where(chunk < mine, each, 0), 0)
    column = mine * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + column, mask=column < width, other=-float("inf"))
    w = tl.where(column < width, _weight(_scaled(x, heat), peak, min_p), 0)
    passed = (before + tl.cumsum(w, 0) <= target) & (column < width)
    return mine * CHUNK + tl.sum(passed.to(tl.int32), 0)


@triton.jit
def _choose(  # type: ignore[no-untyped-def]
    logits,
    logits_row,
    peaks,
    places,
    temperature,
    top_k,
    top_p,
    min_p,
    uniform,
    sums,
    count,
    candidates,
    tokens,
    width,
    chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    MOST: tl.constexpr,
    SLICE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_row
    heat, k, p = tl.load(temperature + row), tl.load(top_k + row), tl.load(top_p + row)
    least, number = tl.load(min_p + row), tl.load(uniform + row)
    peak, first = peak_of(peaks, row, chunks, CHUNKS)
    place = tl.load(places + row * chunks + first)
    token = tl.where(place < 0, -1 - place, place)
    if heat > 0.0:
        peak = _scaled(peak, heat)
        total = _total(sums, row, chunks, CHUNKS)
        ranked = (k > 0) & (k < width)
        if ranked | (p < 1.0):
            # Of every candidate: how many are likelier, and what these weigh.
            found = tl.load(count + row)
            lane = tl.arange(0, MOST)
            mine = tl.load(candidates + row * MOST + lane, mask=lane < found, other=NOTHING)
            w = tl.where(lane < found, _weight(number_of(mine), peak, least), 0)
            rank, above = tl.zeros((MOST,), tl.int32), tl.zeros((MOST,), tl.int64)
            for start in range(0, found, SLICE):
                other = start + tl.arange(0, SLICE)
                theirs = tl.load(candidates + row * MOST + other, mask=other < found, other=NOTHING)
                weights = tl.where(other < found, _weight(number_of(theirs), peak, least), 0)
                likelier = theirs[None, :] > mine[:, None]
                rank += tl.sum(likelier.to(tl.int32), 1)
                above += tl.sum(tl.where(likelier, weights[None, :], 0), 1)
            held = tl.sum(w, 0)
            limit = p * total.to(tl.float64)
            if (found > 0) & tl.where(ranked, found >= k, held.to(tl.float64) >= limit):
                kept = lane < found
                if ranked:
                    kept = kept & (rank < k)
                    limit = p * tl.sum(tl.where(kept, w, 0), 0).to(tl.float64)
                if p < 1.0:
                    kept = kept & ((above.to(tl.float64) < limit) | (rank == 0))
                left = tl.sum(tl.where(kept, w, 0), 0)
                target = tl.minimum(tl.floor(number * left.to(tl.float64)).to(tl.int64), left - 1)
                drawn = kept & (above <= target) & (target < above + w)
                token = tl.max(tl.where(drawn, id_of(mine).to(tl.int32), 0), 0)
            else:
                token = _by_bisection(logits, width, heat, peak, k, p, least, number, total, CHUNK)
        else:
            sums += row * chunks
            token = _in_order(logits, sums, width, chunks, heat, peak, least, number, total, CHUNK, CHUNKS)
    tl.store(tokens + row, tl.minimum(token, width - 1).to(tl.int64))


@dataclass(frozen=True)
class Survey:
    """What one pass over the logits found; nothing of it has been read.

    ``values``: float32 (rows,), each row's largest, NaN where it holds one. ``ids``: int64 (rows,), its first
    place. ``broken``: int32 (rows,), how many are NaN or infinite. The rest is of chunks, (rows, chunks):
    ``peaks`` without NaN, ``places``, ``sums`` of exp(logit - peak), float32, if they were asked for.
    ``histogram`` and ``count``: zeros, if tokens will be drawn.
    """

    values: Tensor
    ids: Tensor
    broken: Tensor
    peaks: Tensor
    places: Tensor
    sums: Tensor | None
    histogram: Tensor | None
    count: Tensor | None


def survey(logits: Tensor, *, sums: bool = False, draws: bool = False) -> Survey:
    """Of float32 (rows, vocabulary), on the device. ``sums``: for ``ratings``; ``draws``: for
    ``sample_rows``."""
    rows, width = logits.shape
    assert logits.dtype is torch.float32 and logits.stride(1) == 1 and 0 < width <= MOST, (
        f"logits are float32, a row's one behind another, at most {MOST}"
    )
    chunks, device = triton.cdiv(width, CHUNK), logits.device

    def whole(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    found = Survey(
        whole(rows, dtype=torch.float32),
        whole(rows, dtype=torch.int64),
        whole(rows),
        whole(rows, chunks, dtype=torch.float32),
        whole(rows, chunks),
        whole(rows, chunks, dtype=torch.float32) if sums else None,
        whole(rows, _STEPS.value) if draws else None,
        whole(rows) if draws else None,
    )
    if not rows:
        return found
    broken = whole(rows, chunks)
    runtime.launch(
        _peaks,
        (rows, chunks),
        *(logits, logits.stride(0), found.peaks, found.places, broken, found.sums),
        *(found.histogram, found.count, width, chunks),
        num_warps=8,
        CHUNK=CHUNK,
        STEPS=_STEPS.value,
        SUMS=sums,
        CLEARS=draws,
    )
    runtime.launch(
        _row_peaks,
        (rows,),
        *(found.peaks, found.places, broken, found.values, found.ids, found.broken, chunks),
        num_warps=1,
        CHUNKS=triton.next_power_of_2(chunks),
    )
    return found


def sample_rows(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    found: Survey | None = None,
) -> Tensor:
    """int64 (rows,): the next token of each row of float32 (rows, vocabulary) logits.

    ``temperature``: float32 (rows,); 0 takes the first of the largest. ``top_k``: int32 (rows,); 0, a
    negative number or as many as there are tokens: no limit. ``top_p``, ``min_p`` and ``uniform`` (of
    [0, 1)): float64 (rows,). ``found``: these logits' survey, made for one draw. What is drawn from a row
    that holds a NaN means nothing, but is a token.
    """
    rows, width = logits.shape
    for tensor, dtype in (
        (temperature, torch.float32),
        (top_k, torch.int32),
        *((tensor, torch.float64) for tensor in (top_p, min_p, uniform)),
    ):
        assert tensor.dtype is dtype and tensor.shape == (rows,) and tensor.is_contiguous(), "one a row"
    device = logits.device
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    if not rows:
        return tokens
    if found is None:
        found = survey(logits, draws=True)
    assert found.histogram is not None and found.count is not None, "surveyed for a draw"
    largest, histogram, count = found.peaks, found.histogram, found.count
    chunks, steps = largest.shape[1], _STEPS.value
    candidates = torch.empty(rows, CANDIDATES, dtype=torch.int64, device=device)
    sums = torch.empty(rows, chunks, dtype=torch.int64, device=device)
    row = logits.stride(0)
    cut = {"CHUNK": CHUNK, "CHUNKS": triton.next_power_of_2(chunks)}
    runtime.launch(
        _weights,
        (rows, chunks),
        *(logits, row, largest, temperature, top_k, top_p, min_p, sums, histogram, width, chunks),
        num_warps=8,
        STEPS=steps,
        **cut,
    )
    runtime.launch(
        _candidates,
        (rows, chunks),
        *(logits, row, largest, temperature, top_k, top_p, sums, histogram, count, candidates),
        *(width, chunks),
        num_warps=8,
        STEPS=steps,
        MOST=CANDIDATES,
        **cut,
    )
    runtime.launch(
        _choose,
        (rows,),
        *(logits, row, largest, found.places, temperature, top_k, top_p, min_p, uniform, sums, count),
        *(candidates, tokens, width, chunks),
        num_warps=16,
        MOST=CANDIDATES,
        SLICE=16,
        **cut,
    )
    return tokens
