"""The Triton kernels of the gated delta rule; ``recurrent`` says what they are for and launches them.

Kept inputs and the state of a sequence are read where it was ``seen`` before; else it begins with zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowbit.kernels.gpu.language import cast, dot
from lowbit.kernels.recurrent import LENGTH_EPS

_EPS = tl.constexpr(LENGTH_EPS)


@triton.jit
def _before(lengths, sequence, UNIT: tl.constexpr, SEQUENCES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whole runs of UNIT tokens of each sequence before this one."""
    total = tl.zeros((SEQUENCES,), tl.int32)
    for start in range(0, sequence, SEQUENCES):
        number = start + tl.arange(0, SEQUENCES)
        total += tl.load(lengths + number, mask=number < sequence, other=0) // UNIT
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
    mixed += _before(query_lengths, sequence, 1, SEQUENCES).to(tl.int64) * mixed_row
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
def _chunk_row(  # type: ignore[no-untyped-def]
    lengths, sequences, chunk, CHUNK: tl.constexpr, SEQUENCES: tl.constexpr
):
    """The first row of a chunk, of those of all sequences; -1: there are not as many."""
    row = tl.full((), -1, tl.int32)
    rows = tl.full((), 0, tl.int32)
    chunks = tl.full((), 0, tl.int32)
    for start in range(0, sequences, SEQUENCES):
        number = start + tl.arange(0, SEQUENCES)
        length = tl.load(lengths + number, mask=number < sequences, other=0)
        whole = length // CHUNK
        begin = chunks + tl.cumsum(whole, 0) - whole
        first = rows + tl.cumsum(length, 0) - length
        mine = (begin <= chunk) & (chunk < begin + whole)
        row = tl.maximum(row, tl.max(tl.where(mine, first + (chunk - begin) * CHUNK, -1), 0))
        rows += tl.sum(length, 0)
        chunks += tl.sum(whole, 0)
    return row


@triton.jit
def _halves(x):  # type: ignore[no-untyped-def]
    """float32 x as a sum of two bfloat16 numbers, within 2^-17 of it."""
    high = cast(x, tl.bfloat16)
    return high, cast(x - high.to(tl.float32), tl.bfloat16)


@triton.jit
def _product(a, a_low, b, b_low, total):  # type: ignore[no-untyped-def]
    """total + (a + a_low) @ (b + b_low), but for a_low @ b_low."""
    return dot(a, b, dot(a_low, b, dot(a, b_low, total)))


@triton.jit
def _merge(place, SIZE: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The lower left block of an inverse, where its diagonal blocks of SIZE are inverted at ``place``."""
    spot = place + tl.arange(0, SIZE)[:, None] * CHUNK + tl.arange(0, SIZE)[None, :]
    nothing = tl.zeros((SIZE, SIZE), tl.float32)
    given, given_low = _halves(tl.load(spot + SIZE * CHUNK))
    upper, upper_low = _halves(tl.load(spot))
    across, across_low = _halves(_product(given, given_low, upper, upper_low, nothing))
    lower, lower_low = _halves(tl.load(spot + SIZE * (CHUNK + 1)))
    merged = _product(lower, lower_low, across, across_low, nothing)
    tl.debug_barrier()
    tl.store(spot + SIZE * CHUNK, -merged)


@triton.jit
def _invert(place, system, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """1 / (1 + system) at ``place``, of a strictly lower triangle (CHUNK, CHUNK), CHUNK 64.

    Forward substitution in the four diagonal blocks of 16 at once, column by column; then blocks of two
    become one twice.
    """
    tl.static_assert(CHUNK == 64)
    row, column = tl.arange(0, CHUNK), tl.arange(0, CHUNK)
    tl.store(place + row[:, None] * CHUNK + column[None, :], system)
    tl.debug_barrier()
    block = tl.arange(0, 4)[:, None, None] * 16
    r, c = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    spot = place + (block + r) * CHUNK + block + c
    given = tl.load(spot)
    solved = tl.where((r == c) & (block >= 0), 1.0, 0.0)
    for step in range(15):
        factor = tl.sum(tl.where(c == step, given, 0.0), 2)
        known = tl.sum(tl.where(r == step, solved, 0.0), 1)
        solved -= factor[:, :, None] * known[:, None, :]
    tl.debug_barrier()
    tl.store(spot, solved)
    tl.debug_barrier()
    _merge(place, 16, CHUNK)
    _merge(place + 32 * (CHUNK + 1), 16, CHUNK)
    tl.debug_barrier()
    _merge(place, 32, CHUNK)
    tl.debug_barrier()


@triton.jit
def _store_halves(place, x, size):  # type: ignore[no-untyped-def]
    """Both halves of x, the second one ``size`` numbers behind the first."""
    high, low = _halves(x)
    tl.store(place, high)
    tl.store(place + size, low)


@triton.jit(do_not_specialize=["sequences", "each"])
def chunk_systems(  # type: ignore[no-untyped-def]
    mixed,
    mixed_row,
    convolved,
    decay,
    bias,
    vectors,  # bfloat16 (chunks, key heads, 2 halves, q and k, CHUNK, K)
    scores,  # bfloat16 (chunks, heads, 2 halves, CHUNK, CHUNK)
    inverses,  # bfloat16 (chunks, heads, 2 halves, CHUNK, CHUNK)
    scratch,  # float32 (chunks, heads, CHUNK, CHUNK): the same memory
    factors,  # float32 (chunks, heads, 3, CHUNK): beta, and the decays up to a token and behind it
    query_lengths,
    sequences,
    channels,
    k_heads,
    each,  # value heads of a key head
    k_dim,
    v_dim,
    CHUNK: tl.constexpr,
    K: tl.constexpr,  # k_dim, a power of two
    PIECE: tl.constexpr,  # of it at once
    SEQUENCES: tl.constexpr,
):
    """What the tokens of a chunk are to each other. Grid: (chunks, key heads)."""
    chunk, key_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = _chunk_row(query_lengths, sequences, tl.program_id(0), CHUNK, SEQUENCES)
    if first >= 0:
        token = tl.arange(0, CHUNK)
        row = (first + token).to(tl.int64)
        square = token[:, None] * CHUNK + token[None, :]
        tile = (chunk * k_heads + key_head) * 4 * CHUNK * K
        alike = tl.zeros((CHUNK, CHUNK), tl.float32)
        asked = tl.zeros((CHUNK, CHUNK), tl.float32)
        for start in range(0, K, PIECE):
            k = start + tl.arange(0, PIECE)
            place = convolved + row[:, None] * channels + (key_head * k_dim + k)[None, :]
            inside = (k < k_dim)[None, :]
            q, q_low = _halves(tl.load(place, mask=inside, other=0.0))
            key, key_low = _halves(tl.load(place + k_heads * k_dim, mask=inside, other=0.0))
            kept = vectors + tile + token[:, None] * K + k[None, :]
            tl.store(kept, q)
            tl.store(kept + CHUNK * K, key)
            tl.store(kept + 2 * CHUNK * K, q_low)
            tl.store(kept + 3 * CHUNK * K, key_low)
            alike = _product(key, key_low, tl.trans(key), tl.trans(key_low), alike)
            asked = _product(q, q_low, tl.trans(key), tl.trans(key_low), asked)
        heads = k_heads * each
        later = token[:, None] > token[None, :]
        for own in range(each):
            head = key_head * each + own
            gates = mixed + row * mixed_row + channels + heads * v_dim + head
            beta = tl.sigmoid(tl.load(gates).to(tl.float32))
            a = tl.load(gates + heads).to(tl.float32)
            log = tl.load(decay + head) * _softplus(a + tl.load(bias + head))
            # Added up between each two tokens: differences of sums would keep a large decay's rounding.
            since = tl.where(later, log[:, None], 0.0)
            left = tl.exp(tl.cumsum(since, 0))
            number = chunk * heads + head
            vector = factors + number * 3 * CHUNK + token
            tl.store(vector, beta)
            tl.store(vector + CHUNK, tl.exp(tl.cumsum(log, 0)))
            tl.store(vector + 2 * CHUNK, tl.exp(tl.sum(since, 0)))
            score = tl.where(token[:, None] >= token[None, :], left * asked, 0.0)
            _store_halves(scores + number * 2 * CHUNK * CHUNK + square, score, CHUNK * CHUNK)
            system = tl.where(later, beta[:, None] * left * alike, 0.0)
            place = scratch + number * CHUNK * CHUNK
            _invert(place, system, CHUNK)
            inverse = tl.load(place + square)
            tl.debug_barrier()
            _store_halves(inverses + number * 2 * CHUNK * CHUNK + square, inverse, CHUNK * CHUNK)


@triton.jit
def chunk_states(  # type: ignore[no-untyped-def]
    convolved,
    matrices,
    vectors,
    scores,
    inverses,
    factors,
    out,
    query_lengths,
    context_lengths,
    slots,
    channels,
    k_heads,
    heads,
    k_dim,
    v_dim,
    CHUNK: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    SEQUENCES: tl.constexpr,
):
    """A strip of a head's state through the chunks of a sequence. Grid: (strips, heads, sequences)."""
    head, sequence = tl.program_id(1), tl.program_id(2)
    count = tl.load(query_lengths + sequence)
    if count >= CHUNK:
        token, k, v = tl.arange(0, CHUNK), tl.arange(0, K), tl.program_id(0) * V + tl.arange(0, V)
        v_inside = v < v_dim
        slot = tl.load(slots + sequence).to(tl.int64)
        seen = (tl.load(context_lengths + sequence) > count) & (slot >= 0)
        inside = (k < k_dim)[:, None] & v_inside[None, :]
        place = matrices + (slot * heads + head) * k_dim * v_dim + k[:, None] * v_dim + v[None, :]
        state = tl.load(place, mask=inside & seen, other=0.0)

        chunk = _before(query_lengths, sequence, CHUNK, SEQUENCES).to(tl.int64)
        row = _before(query_lengths, sequence, 1, SEQUENCES).to(tl.int64)
        key_head, value = head // (heads // k_heads), head * v_dim + v
        values = token[:, None] * channels + (2 * k_heads * k_dim + value)[None, :]
        outs = token[:, None] * (heads * v_dim) + value[None, :]
        tile = tl.arange(0, 2 * CHUNK)[:, None] * K + k[None, :]
        turned = token[None, :] * K + k[:, None]
        square = token[:, None] * CHUNK + token[None, :]
        for _ in range(count // CHUNK):
            number = chunk * heads + head
            vector = factors + number * 3 * CHUNK + token
            own = vectors + (chunk * k_heads + key_head) * 4 * CHUNK * K
            pair = number * 2 * CHUNK * CHUNK + square
            grown = tl.load(vector + CHUNK)[:, None]
            high, low = _halves(state)
            both, both_low = tl.load(own + tile), tl.load(own + 2 * CHUNK * K + tile)
            both = _product(both, both_low, high, low, tl.zeros((2 * CHUNK, V), tl.float32))
            made, told = tl.split(tl.permute(tl.reshape(both, (2, CHUNK, V)), (1, 2, 0)))

            wanted = tl.load(convolved + row * channels + values, mask=v_inside[None, :], other=0.0)
            wanted, wanted_low = _halves(tl.load(vector)[:, None] * (wanted - grown * told))
            inverse, inverse_low = tl.load(inverses + pair), tl.load(inverses + pair + CHUNK * CHUNK)
            nothing = tl.zeros((CHUNK, V), tl.float32)
            written = _product(inverse, inverse_low, wanted, wanted_low, nothing)

            score, score_low = tl.load(scores + pair), tl.load(scores + pair + CHUNK * CHUNK)
            new, new_low = _halves(written)
            made = _product(score, score_low, new, new_low, grown * made)
            tl.store(out + row * (heads * v_dim) + outs, made, mask=v_inside[None, :])

            kept, kept_low = _halves(tl.load(vector + 2 * CHUNK)[:, None] * written)
            state *= tl.load(factors + number * 3 * CHUNK + 2 * CHUNK - 1)
            key, key_low = tl.load(own + CHUNK * K + turned), tl.load(own + 3 * CHUNK * K + turned)
            state = _product(key, key_low, kept, kept_low, state)
            row += CHUNK
            chunk += 1
        tl.store(place, state, mask=inside & (slot >= 0))


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
    CHUNK: tl.constexpr,  # whole chunks of so many tokens are done; 0: none is
    SEQUENCES: tl.constexpr,
):
    """Grid: (strips of a head, heads, sequences)."""
    head, sequence = tl.program_id(1), tl.program_id(2)
    k, v = tl.arange(0, K), tl.program_id(0) * V + tl.arange(0, V)
    k_inside, v_inside = k < k_dim, v < v_dim
    count = tl.load(query_lengths + sequence)
    slot = tl.load(slots + sequence).to(tl.int64)
    done = 0
    if CHUNK:
        done = count // CHUNK * CHUNK
    seen = ((tl.load(context_lengths + sequence) > count) | (done > 0)) & (slot >= 0)
    inside = v_inside[:, None] & k_inside[None, :]
    place = matrices + (slot * heads + head) * k_dim * v_dim + k[None, :] * v_dim + v[:, None]
    state = tl.load(place, mask=inside & seen, other=0.0)

    first = _before(query_lengths, sequence, 1, SEQUENCES).to(tl.int64) + done
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
        done < count,
        k_inside,
        v_inside,
    )
    for token in range(count - done):
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
            token + 1 < count - done,
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


@triton.jit(do_not_specialize=["rows"])
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
