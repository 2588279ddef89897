"""Flash attention over paged K and V, for decode and prefill (Triton).

One kernel, ``attend``. The query heads that share a K/V head, of all a sequence's query tokens, are one list
of rows (row r: token r // GROUP, head r % GROUP), cut into tiles of M rows: for one token of a model with
groups of 8 that is half a tile of 16, for a prompt many tiles of 128. A program (tile, K/V head, split) goes
over its share of the keys that the tile's rows see, N at a time, with an online softmax in base 2
(FlashAttention-2: Dao, 2023; Flash-Decoding: Dao et al., 2023); ``merge`` joins the splits. How keys are
shared among splits follows from the context that the device reads: a captured launch stays right while
contexts grow. Sums are in one order, so the same launch gives the same bits.

A vector of DIM channels is handled in two parts of a power of two each, 80 = 64 + 16 or 576 = 512 + 64, so
that little is padded. A latent's values are its first part, which then is loaded once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowbit.kernels.gpu.cache_read import as_type, read
from lowbit.kernels.gpu.language import cast, dot

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _place(  # type: ignore[no-untyped-def]
    program,
    query_lengths,
    sequences,
    tiles,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    ALIKE: tl.constexpr,
    SEQUENCES: tl.constexpr,
):
    """A program's sequence, its tile there, and the batch's row of the sequence's first query.

    ALIKE: every sequence gets as many as ``tiles``, else what it needs. Then tiles are numbered as if
    sequence s began with tile (query rows before it) // M + s, which leaves none too few and at most one too
    many for each. A number, not a constant: it follows from the length of a prompt.
    """
    number = tl.arange(0, SEQUENCES)
    if ALIKE:
        sequence = program // tiles
        tile = program % tiles
        lengths = tl.load(query_lengths + number, number < sequence, 0)
        first = tl.sum(lengths, 0)
    else:
        lengths = tl.load(query_lengths + number, number < sequences, 0)
        firsts = tl.cumsum(lengths, 0) - lengths
        begins = firsts * GROUP // M + number
        sequence = tl.sum(((begins <= program) & (number < sequences)).to(tl.int32), 0) - 1
        first = tl.sum(tl.where(number == sequence, firsts, 0), 0)
        tile = program - tl.sum(tl.where(number == sequence, begins, 0), 0)
    return sequence, tile, first


@triton.jit
def _queries(  # type: ignore[no-untyped-def]
    q, present, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, TYPE: tl.constexpr
):
    """(M, WIDTH) of TYPE, zeros past DIM, from addresses (M,)."""
    channel = START + tl.arange(0, WIDTH)
    loaded = tl.load(q[:, None] + channel[None, :], present[:, None] & (channel < DIM)[None, :], 0.0)
    numbers = loaded.to(tl.float32)
    if TYPE == "fp16":
        numbers = tl.where(numbers > 65504.0, 65504.0, tl.where(numbers < -65504.0, -65504.0, numbers))
    return as_type(numbers, TYPE)


@triton.jit
def _put(  # type: ignore[no-untyped-def]
    place, numbers, present, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr
):
    """Store (M, WIDTH) at addresses (M,)."""
    channel = START + tl.arange(0, WIDTH)
    kept = present[:, None] & (channel < DIM)[None, :]
    tl.store(place[:, None] + channel[None, :], cast(numbers, place.dtype.element_ty), kept)


@triton.jit
def _inverse(total):  # type: ignore[no-untyped-def]
    """1 / total; zero where nothing was seen, which is not where something is NaN."""
    return tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total))


@triton.jit(do_not_specialize=["sequences", "tiles", "table_row", "least", "most", "window"])
def attend(  # type: ignore[no-untyped-def]
    q,
    k,
    k_scales,
    v,
    v_scales,
    page_table,
    query_lengths,
    context_lengths,
    sinks,
    out,
    sums,
    peaks,
    totals,
    q_token,
    q_head,
    table_row,
    sequences,
    tiles,
    least,
    most,
    window,
    scale,
    softcap,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    ALIKE: tl.constexpr,
    SEQUENCES: tl.constexpr,
    SPLIT: tl.constexpr,
    INTERIOR: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    PAGE: tl.constexpr,
    LATENT: tl.constexpr,
    K_DIM: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    K_FORMAT: tl.constexpr,
    K_GROUP: tl.constexpr,
    K_SCALED: tl.constexpr,
    K_TYPE: tl.constexpr,
    V_DIM: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    V_STORED: tl.constexpr,
    V_FORMAT: tl.constexpr,
    V_GROUP: tl.constexpr,
    V_SCALED: tl.constexpr,
    V_TYPE: tl.constexpr,
):
    """q (tokens, heads, K_DIM) over the pages to ``out`` (tokens, heads, V_DIM), or to a split's share.

    Grid: (tiles, K/V heads, splits). Serves sequences of ``least`` to ``most`` query tokens. With SPLIT
    ``sums`` (tiles, K/V heads, splits, M, V_DIM), ``peaks`` and ``totals`` (tiles, K/V heads, splits, M) get
    the numerator, the largest score and the denominator; sums are not written where the denominator is 0.
    LATENT: the values are K's first part. K_SCALED, V_SCALED: one scale for a vector.
    INTERIOR: most keys are seen by all rows of a tile (no WINDOW, no SPLIT).
    """
    # A prompt's last tiles see most keys: they begin first.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    kv_heads = tl.num_programs(1)
    sequence, tile, first = _place(program, query_lengths, sequences, tiles, GROUP, M, ALIKE, SEQUENCES)
    queries = tl.load(query_lengths + sequence)
    if (tile * M >= queries * GROUP) | (queries < least) | (queries > most):
        return
    context = tl.load(context_lengths + sequence)
    row = tile * M + tl.arange(0, M)
    token = row // GROUP
    query_head = head * GROUP + row % GROUP
    present = token < queries
    position = context - queries + token  # negative where a sequence only fills the batch: it sees no key
    addresses = q + (first + token).to(tl.int64) * q_token + query_head * q_head
    q0 = _queries(addresses, present, 0, K0, K_DIM, K_TYPE)
    if K1 > 0:
        q1 = _queries(addresses, present, K0, K1, K_DIM, K_TYPE)

    # Keys that any row of the tile sees: low ... high - 1.
    oldest = context - queries + tile * M // GROUP
    high = tl.maximum(context - queries + tl.minimum((tile * M + M - 1) // GROUP, queries - 1) + 1, 0)
    low = tl.maximum(oldest - window + 1, 0) if WINDOW else 0
    begin = low // N * N
    end = high
    if SPLIT:
        share = tl.cdiv(tl.cdiv(tl.maximum(high - begin, 0), N), tl.num_programs(2)) * N
        begin += tl.program_id(2) * share
        end = tl.minimum(begin + share, high)

    factor = scale if SOFTCAP else scale * LOG2E
    peak = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    sum0 = tl.zeros((M, V0), tl.float32)
    sum1 = tl.zeros((M, V1 if V1 > 0 else 1), tl.float32)
    # Keys below ``clear`` are seen by every row: no mask is made for them.
    clear = tl.maximum((oldest + 1) // N * N, 0) if INTERIOR else 0
    for masked in tl.static_range(0 if INTERIOR else 1, 2):
        for start in range(tl.maximum(begin, clear) if masked else begin, end if masked else clear, N):
            key = start + tl.arange(0, N)
            inside = (key >= low) & (key < end) if masked else tl.full((N,), True, tl.int1)
            page = tl.load(page_table + sequence.to(tl.int64) * table_row + key // PAGE, inside, 0)
            slot = (page.to(tl.int64) * kv_heads + head) * PAGE + key % PAGE
            k0 = read(k, k_scales, slot, inside, 0, K0, K_DIM, K_DIM, K_FORMAT, K_GROUP, K_TYPE)
            scores = dot(q0, tl.trans(k0), tl.zeros((M, N), tl.float32))
            if K1 > 0:
                k1 = read(k, k_scales, slot, inside, K0, K1, K_DIM, K_DIM, K_FORMAT, K_GROUP, K_TYPE)
                scores = dot(q1, tl.trans(k1), scores)
            scores *= factor
            if K_SCALED:
                scores *= tl.load(k_scales + slot, inside, 0.0).to(tl.float32)[None, :]
            if SOFTCAP:
                # softcap * tanh(scores / softcap)
                grown = tl.exp2(scores * (2.0 * LOG2E / softcap))
                scores = (softcap * LOG2E) * (1.0 - 2.0 / (grown + 1.0))
            if masked:
                seen = inside[None, :] & (key[None, :] <= position[:, None])
                if WINDOW:
                    seen = seen & (key[None, :] > position[:, None] - window)
                scores = tl.where(seen, scores, -float("inf"))
            # A row that has seen nothing has no peak: 0 stands for it, as exp2(-inf - 0) is 0.
            higher = tl.maximum(peak, tl.max(scores, 1))
            finite = tl.where(higher == -float("inf"), 0.0, higher)
            kept = tl.exp2(peak - finite)
            weights = tl.exp2(scores - finite[:, None])
            total = total * kept + tl.sum(weights, 1)
            peak = higher
            if V_SCALED:
                v_scale = tl.load(v_scales + slot, inside, 0.0).to(tl.float32)
                weights *= v_scale[None, :]
                if masked:  # a later token's scale may be NaN
                    weights = tl.where(seen, weights, 0.0)
            weights = as_type(weights, V_TYPE)
            if LATENT:
                v0 = k0
            else:
                v0 = read(v, v_scales, slot, inside, 0, V0, V_DIM, V_STORED, V_FORMAT, V_GROUP, V_TYPE)
            sum0 = dot(weights, v0, sum0 * kept[:, None])
            if V1 > 0:
                v1 = read(v, v_scales, slot, inside, V0, V1, V_DIM, V_STORED, V_FORMAT, V_GROUP, V_TYPE)
                sum1 = dot(weights, v1, sum1 * kept[:, None])

    if SPLIT:
        part = (program.to(tl.int64) * kv_heads + head) * tl.num_programs(2) + tl.program_id(2)
        place = part * M + tl.arange(0, M)
        tl.store(peaks + place, peak, present)
        tl.store(totals + place, total, present)
        kept_rows = present & (total != 0)
        _put(sums + place * V_DIM, sum0, kept_rows, 0, V0, V_DIM)
        if V1 > 0:
            _put(sums + place * V_DIM, sum1, kept_rows, V0, V1, V_DIM)
    else:
        if SINKS:
            sink = tl.load(sinks + query_head, present, 0.0) * LOG2E
            higher = tl.maximum(peak, sink)
            kept = tl.exp2(peak - higher)
            total = total * kept + tl.exp2(sink - higher)
            inverse = kept * _inverse(total)
        else:
            inverse = _inverse(total)
        place = out + ((first + token).to(tl.int64) * (kv_heads * GROUP) + query_head) * V_DIM
        _put(place, sum0 * inverse[:, None], present, 0, V0, V_DIM)
        if V1 > 0:
            _put(place, sum1 * inverse[:, None], present, V0, V1, V_DIM)


@triton.jit(do_not_specialize=["sequences", "tiles", "least", "most", "splits"])
def merge(  # type: ignore[no-untyped-def]
    sums,
    peaks,
    totals,
    query_lengths,
    sinks,
    out,
    sequences,
    tiles,
    least,
    most,
    splits,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    ALIKE: tl.constexpr,
    SEQUENCES: tl.constexpr,
    SINKS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    V_DIM: tl.constexpr,
    V_BLOCK: tl.constexpr,
):
    """The splits of one row joined by their largest scores, in ascending order.

    Grid: (tiles, K/V heads, rows of a tile). SPLITS: a power of two no less than ``splits``.
    """
    program, head = tl.program_id(0), tl.program_id(1)
    kv_heads = tl.num_programs(1)
    sequence, tile, first = _place(program, query_lengths, sequences, tiles, GROUP, M, ALIKE, SEQUENCES)
    queries = tl.load(query_lengths + sequence)
    row = tile * M + tl.program_id(2)
    if (row >= queries * GROUP) | (queries < least) | (queries > most):
        return
    token, query_head = row // GROUP, head * GROUP + row % GROUP
    part = (program.to(tl.int64) * kv_heads + head) * splits
    place = part * M + tl.program_id(2)
    all_splits = tl.arange(0, SPLITS)
    total = tl.load(totals + place + all_splits * M, all_splits < splits, 0.0)
    peak = tl.load(peaks + place + all_splits * M, total != 0, -float("inf"))
    highest = tl.max(peak, 0)
    if SINKS:
        sink = tl.load(sinks + query_head) * LOG2E
        highest = tl.maximum(highest, sink)
    highest = tl.where(highest == -float("inf"), 0.0, highest)
    whole = tl.sum(total * tl.exp2(peak - highest), 0)
    channel = tl.arange(0, V_BLOCK)
    joined = tl.zeros((V_BLOCK,), tl.float32)
    for start in range(0, splits, BLOCK):
        number = start + tl.arange(0, BLOCK)
        seen = tl.load(totals + place + number * M, number < splits, 0.0) != 0
        kept = tl.exp2(tl.load(peaks + place + number * M, seen, -float("inf")) - highest)
        present = seen[:, None] & (channel < V_DIM)[None, :]
        shares = tl.load(sums + (place + number * M)[:, None] * V_DIM + channel[None, :], present, 0.0)
        joined += tl.sum(shares * kept[:, None], 0)
    if SINKS:
        whole += tl.exp2(sink - highest)
    result = joined * _inverse(whole)
    place = out + ((first + token).to(tl.int64) * (kv_heads * GROUP) + query_head) * V_DIM
    tl.store(place + channel, cast(result, out.dtype.element_ty), channel < V_DIM)
