"""The Triton kernels of the gated delta rule; ``recurrent`` says what they are for and launches them.

Kept inputs and the state of a sequence are read where it was ``seen`` before; else it begins with zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowbit.kernels.gpu.language import cast
from lowbit.kernels.recurrent import LENGTH_EPS

_EPS = tl.constexpr(LENGTH_EPS)


@triton.jit
def _before(lengths, sequence, SEQUENCES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tokens of all sequences before this one."""
    total = tl.zeros((SEQUENCES,), tl.int32)
    for start in range(0, sequence, SEQUENCES):
        number = start + tl.arange(0, SEQUENCES)
        total += tl.load(lengths + number, mask=number < sequence, other=0)
    return tl.sum(total, 0)


@triton.jit
def _tile(lengths, sequences, tile, TOKENS: tl.constexpr, SEQUENCES: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile's sequence, that one's first row, and the first of its tokens in the tile.

    Tiles are numbered as if sequence s began with tile (tokens before it) // TOKENS + s: none has too few,
    each at most one too many.
    """
    count = tl.full((), 0, tl.int32)
    first = tl.full((), 0, tl.int32)
    begin = tl.full((), 0, tl.int32)
    before = tl.full((), 0, tl.int32)
    for start in range(0, sequences, SEQUENCES):
        number = start + tl.arange(0, SEQUENCES)
        length = tl.load(lengths + number, mask=number < sequences, other=0)
        firsts = before + tl.cumsum(length, 0) - length
        tiles = firsts // TOKENS + number
        mine = (number < sequences) & (tiles <= tile)
        count += tl.sum(mine.to(tl.int32), 0)
        first = tl.maximum(first, tl.max(tl.where(mine, firsts, 0), 0))
        begin = tl.maximum(begin, tl.max(tl.where(mine, tiles, 0), 0))
        before += tl.sum(length, 0)
    return count - 1, first, (tile - begin) * TOKENS


@triton.jit
def _input(  # type: ignore[no-untyped-def]
    mixed, mixed_row, old, channels, at, count, channel, inside, seen, KEPT: tl.constexpr
):
    """float32 (tokens, channels): what the convolution reads at tokens ``at`` of a part of a sequence.

    Before the part's first token that is ``old``, where it was ``seen``, or zeros. ``mixed``: the part's.
    """
    here = ((at >= 0) & (at < count))[:, None] & inside[None, :]
    earlier = (at < 0)[:, None] & inside[None, :] & seen
    new = tl.load(mixed + at.to(tl.int64)[:, None] * mixed_row + channel[None, :], mask=here, other=0.0)
    kept = tl.load(old + (at + KEPT)[:, None] * channels + channel[None, :], mask=earlier, other=0.0)
    return tl.where((at < 0)[:, None], kept, new.to(tl.float32))


@triton.jit
def _move_on(  # type: ignore[no-untyped-def]
    mixed, mixed_row, old, channels, count, channel, inside, seen, slot, KEPT: tl.constexpr, R: tl.constexpr
):
    """The last KEPT inputs of a sequence, from what was kept and its new tokens. R: KEPT, a power of two."""
    row = tl.arange(0, R)
    # Rows behind the last one are none of the part's tokens.
    at = tl.where(row < KEPT, count - KEPT + row, count)
    x = _input(mixed, mixed_row, old, channels, at, count, channel, inside, seen, KEPT)
    tl.debug_barrier()  # all is read before anything is written
    stored = (row < KEPT)[:, None] & inside[None, :] & (slot >= 0)
    tl.store(old + row[:, None] * channels + channel[None, :], x, mask=stored)


@triton.jit(do_not_specialize=["sequences"])
def convolve(  # type: ignore[no-untyped-def]
    mixed,  # (tokens, width)
    mixed_row,
    taps,  # float32 (KEPT + 1, channels)
    inputs,  # float32 (slots, KEPT, channels)
    out,  # float32 (tokens, channels)
    query_lengths,
    context_lengths,
    slots,
    sequences,
    channels,
    k_heads,
    k_dim,
    v_dim,
    q_scale,
    KEPT: tl.constexpr,
    R: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,  # channels of the larger kind of head
    SEQUENCES: tl.constexpr,  # whose lengths are looked at together
    MOVES: tl.constexpr,  # no sequence has more than TOKENS tokens: kept inputs move on here
):
    """Grid: (tiles of tokens, heads of q, k and v)."""
    sequence, first, begin = _tile(query_lengths, sequences, tl.program_id(0), TOKENS, SEQUENCES)
    run = tl.program_id(1)
    count = tl.load(query_lengths + sequence)
    if begin < count:
        slot = tl.load(slots + sequence).to(tl.int64)
        seen = (tl.load(context_lengths + sequence) > count) & (slot >= 0)
        unit = run < 2 * k_heads
        start = tl.where(unit, run * k_dim, 2 * k_heads * k_dim + (run - 2 * k_heads) * v_dim)
        place = tl.arange(0, BLOCK)
        channel = start + place
        inside = place < tl.where(unit, k_dim, v_dim)
        token = begin + tl.arange(0, TOKENS)
        mixed += first.to(tl.int64) * mixed_row
        old = inputs + slot * KEPT * channels
        total = tl.zeros((TOKENS, BLOCK), tl.float32)
        for tap in tl.static_range(KEPT + 1):
            x = _input(
                mixed, mixed_row, old, channels, token - KEPT + tap, count, channel, inside, seen, KEPT
            )
            weight = tl.load(taps + tap * channels + channel, mask=inside, other=0.0)
            total += x * weight[None, :]
        y = total * tl.sigmoid(total)
        length = tl.rsqrt(tl.sum(y * y, 1) + _EPS)[:, None]
        y = y * tl.where(unit, length, 1.0) * tl.where(run < k_heads, q_scale, 1.0)
        stored = (token < count)[:, None] & inside[None, :]
        tl.store(out + (first + token).to(tl.int64)[:, None] * channels + channel[None, :], y, mask=stored)
        if MOVES:
            _move_on(mixed, mixed_row, old, channels, count, channel, inside, seen, slot, KEPT, R)


@triton.jit
def keep(  # type: ignore[no-untyped-def]
    mixed,
    mixed_row,
    inputs,
    query_lengths,
    context_lengths,
    slots,
    channels,
    KEPT: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    SEQUENCES: tl.constexpr,
):
    """Grid: (blocks of channels, sequences)."""
    sequence = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(query_lengths + sequence)
    slot = tl.load(slots + sequence).to(tl.int64)
    seen = (tl.load(context_lengths + sequence) > count) & (slot >= 0)
    mixed += _before(query_lengths, sequence, SEQUENCES).to(tl.int64) * mixed_row
    old = inputs + slot * KEPT * channels
    _move_on(mixed, mixed_row, old, channels, count, channel, channel < channels, seen, slot, KEPT, R)


@triton.jit
def _softplus(x):  # type: ignore[no-untyped-def]
    """log(1 + exp x), also where exp x is far below 1."""
    grown = tl.exp(tl.minimum(x, 20.0))
    more = 1.0 + grown
    # The quotient makes good what 1 + exp x was rounded by.
    near = tl.where(more == 1.0, grown, tl.log(more) * (grown / (more - 1.0)))
    return tl.where(x > 20.0, x, near)


@triton.jit
def _token(  # type: ignore[no-untyped-def]
    convolved, gates, head, heads, key, keys, value, row, row_of_gates, there, k_inside, v_inside
):
    """q, k, v, b and a of one token; zeros where it is not there."""
    at = convolved + row
    q = tl.load(at + key, mask=k_inside & there, other=0.0)
    k = tl.load(at + keys + key, mask=k_inside & there, other=0.0)
    v = tl.load(at + 2 * keys + value, mask=v_inside & there, other=0.0)
    b = tl.load(gates + row_of_gates + head, mask=there, other=0.0).to(tl.float32)
    a = tl.load(gates + row_of_gates + heads + head, mask=there, other=0.0).to(tl.float32)
    return q, k, v, b, a


@triton.jit
def rule(  # type: ignore[no-untyped-def]
    mixed,  # (tokens, width): channels, z, b, a
    mixed_row,
    convolved,  # float32 (tokens, channels)
    matrices,  # float32 (slots, heads, k_dim, v_dim)
    decay,  # float32 (heads,)
    bias,  # float32 (heads,)
    out,  # float32 (tokens, heads * v_dim)
    query_lengths,
    context_lengths,
    slots,
    channels,
    k_heads,
    heads,
    k_dim,
    v_dim,
    K: tl.constexpr,  # k_dim, a power of two
    V: tl.constexpr,  # columns of a strip
    SEQUENCES: tl.constexpr,
):
    """Grid: (strips of a head, heads, sequences)."""
    head, sequence = tl.program_id(1), tl.program_id(2)
    k, v = tl.arange(0, K), tl.program_id(0) * V + tl.arange(0, V)
    k_inside, v_inside = k < k_dim, v < v_dim
    count = tl.load(query_lengths + sequence)
    slot = tl.load(slots + sequence).to(tl.int64)
    seen = (tl.load(context_lengths + sequence) > count) & (slot >= 0)
    inside = v_inside[:, None] & k_inside[None, :]
    place = matrices + (slot * heads + head) * k_dim * v_dim + k[None, :] * v_dim + v[:, None]
    state = tl.load(place, mask=inside & seen, other=0.0)

    first = _before(query_lengths, sequence, SEQUENCES).to(tl.int64)
    key = head // (heads // k_heads) * k_dim + k
    keys, value = k_heads * k_dim, head * v_dim + v
    gates = mixed + channels + heads * v_dim
    rate, shift = tl.load(decay + head), tl.load(bias + head)
    q, key_now, value_now, b, a = _token(
        convolved,
        gates,
        head,
        heads,
        key,
        keys,
        value,
        first * channels,
        first * mixed_row,
        count > 0,
        k_inside,
        v_inside,
    )
    for token in range(count):
        row = first + token
        beta, kept = tl.sigmoid(b), tl.exp(rate * _softplus(a + shift))
        next_q, next_key, next_value, b, a = _token(
            convolved,
            gates,
            head,
            heads,
            key,
            keys,
            value,
            (row + 1) * channels,
            (row + 1) * mixed_row,
            token + 1 < count,
            k_inside,
            v_inside,
        )
        state *= kept
        told = tl.sum(state * key_now[None, :], 1)
        state += (beta * (value_now - told))[:, None] * key_now[None, :]
        made = tl.sum(state * q[None, :], 1)
        tl.store(out + row * (heads * v_dim) + value, made, mask=v_inside)
        q, key_now, value_now = next_q, next_key, next_value
    tl.store(place, state, mask=inside & (slot >= 0))


@triton.jit
def finish(  # type: ignore[no-untyped-def]
    made,  # float32 (tokens, heads * v_dim)
    mixed,
    mixed_row,
    norm,  # float32 (v_dim,)
    out,  # (tokens, heads * v_dim)
    rows,  # tokens * heads
    heads,
    v_dim,
    channels,
    eps,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """rms_norm(made) * norm * silu(z); a program has M heads."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < v_dim)[None, :]
    token, head = (row // heads).to(tl.int64)[:, None], (row % heads)[:, None]
    place = row.to(tl.int64)[:, None] * v_dim + column[None, :]
    y = tl.load(made + place, mask=inside, other=0.0)
    y = y * tl.rsqrt(tl.sum(y * y, 1) / v_dim + eps)[:, None]
    y = y * tl.load(norm + column, mask=column < v_dim, other=0.0)[None, :]
    z = mixed + token * mixed_row + channels + head * v_dim + column[None, :]
    gate = tl.load(z, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, cast(y * (gate * tl.sigmoid(gate)), out.dtype.element_ty), mask=inside)
