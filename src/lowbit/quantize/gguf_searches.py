"""GGUF types whose scales are searched for, in torch: csrc/quantize.cpp does the same with the same bits.

Q2_K, Q4_K, Q5_K   value = scale * code - min: a least-squares fit for each of 16 to 21 step widths, that with
                   the smallest weighted error wins; scales and minimums are then rounded to 4 or 6 bits
                   and the codes made again.
Q3_K               value = scale * code: coordinate descent, five sweeps.
Q6_K               value = scale * code: nineteen step widths.
IQ4_NL, IQ4_XS     value = scale * table[code]: fifteen scales.
MXFP4, NVFP4       the scale follows from the largest weight; the code is the nearest value, first of equals.

A search works on sub-blocks side by side: x is (weights of a sub-block, sub-blocks). Sums run over the first
axis one element after the other, because their rounding decides between neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lowbit.numerics.number_formats import NUMBER_FORMATS
from lowbit.quantize.gguf_pack import (
    half_bytes,
    in_order,
    join_nibbles,
    join_planes,
    largest_magnitude,
    largest_weight,
    nearest,
    nearest_between,
    over,
)

_TINY = 1e-15  # a sub-block whose largest weight is below this is zero


def _float32(number: float) -> float:
    return float(torch.tensor(number, dtype=torch.float32))


def _stored(x: Tensor) -> Tensor:
    """What is left of a number after it was rounded to float16."""
    return x.half().float()


def _largest_first(x: Tensor) -> tuple[Tensor, Tensor]:
    """(n, lanes) -> magnitude and value (lanes,) of the largest weight, the first of equal ones."""
    value = largest_weight(x.t()).squeeze(-1)
    return value.abs(), value


# ---- Scale and minimum ----


@dataclass(frozen=True)
class _OffsetSearch:
    levels: int
    first: float
    step: float
    steps: int
    absolute_error: bool


def _offset_error(
    x: Tensor, weights: Tensor, codes: Tensor, scale: Tensor, low: Tensor, absolute: bool
) -> Tensor:
    off = scale * codes + low - x
    losses = weights * (off.abs() if absolute else off * off)
    return in_order(losses)


def _make_offset_codes(x: Tensor, weights: Tensor, search: _OffsetSearch) -> tuple[Tensor, Tensor, Tensor]:
    """(n, lanes) -> codes (n, lanes), scale and minimum (lanes,): value = scale * code - minimum."""
    low, high = x.aminmax(dim=0)
    low = low.clamp(max=0)
    sum_w = weights[0].clone()
    sum_x = weights[0] * x[0]
    for w, value in zip(weights[1:], x[1:], strict=True):
        sum_w += w
        sum_x += w * value
    flat, first_low = high == low, low

    inverse = over(search.levels, high - low)
    scale = over(1.0, inverse)
    codes = nearest_between(inverse * (x - low), 0, search.levels)
    best = _offset_error(x, weights, codes, scale, low, search.absolute_error)
    for step in range(search.steps + 1):
        numerator = _float32(
            _float32(_float32(search.first) + _float32(_float32(search.step) * step)) + search.levels
        )
        inverse = over(numerator, high - low)
        tried = nearest_between(inverse * (x - low), 0, search.levels)
        weighted = weights * tried
        sum_l, sum_l2, sum_xl = in_order(weighted), in_order(weighted * tried), in_order(weighted * x)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        above = new_low > 0
        new_scale = torch.where(above, sum_xl / sum_l2, new_scale)
        new_low = torch.where(above, torch.zeros_like(new_low), new_low)
        error = _offset_error(x, weights, tried, new_scale, new_low, search.absolute_error)
        better = (determinant > 0) & (error < best)
        codes = torch.where(better, tried, codes)
        best = torch.where(better, error, best)
        scale = torch.where(better, new_scale, scale)
        low = torch.where(better, new_low, low)
    nothing = torch.zeros_like(scale)
    return (
        torch.where(flat, nothing, codes),
        torch.where(flat, nothing, scale),
        -torch.where(flat, first_low, low),
    )


# ---- A scale alone ----


def _scale_sums(x: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Σ w x v and Σ w v v with w = x², in the order Q3_K and Q6_K multiply in."""
    w = x * x
    return in_order(w * x * values), in_order(w * values * values)


def _make_symmetric_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """(16, lanes) -> codes -32..31, stored + 32, and scales."""
    magnitude, largest = _largest_first(x)

    def tried(numerator: float) -> tuple[Tensor, Tensor, Tensor]:
        codes = nearest_between(over(numerator, largest) * x, -32, 31)
        return codes, *_scale_sums(x, codes)

    codes, sum_xl, sum_l2 = tried(-32.0)
    scale = torch.where(sum_l2 == 0, torch.zeros_like(sum_l2), sum_xl / sum_l2)
    best = scale * sum_xl
    for step in (*range(-9, 0), *range(1, 10)):
        other, sum_xl, sum_l2 = tried(-_float32(32 + _float32(_float32(0.1) * step)))
        better = (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2)
        codes = torch.where(better, other, codes)
        scale = torch.where(better, sum_xl / sum_l2, scale)
        best = torch.where(better, scale * sum_xl, best)
    zero = magnitude < _TINY
    nothing = torch.zeros_like(scale)
    return torch.where(zero, nothing, codes + 32), torch.where(zero, nothing, scale)


def _make_q3_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """(16, lanes) -> codes -4..3, stored + 4, and scales."""
    magnitude, largest = _largest_first(x)
    codes = nearest_between(over(-4.0, largest) * x, -4, 3)
    sum_xl, sum_l2 = _scale_sums(x, codes)
    for _ in range(5):
        changed = False
        for i, value in enumerate(x):
            w, old = value * value, codes[i]
            wx = w * value
            xl, l2 = sum_xl - wx * old, sum_l2 - w * old * old
            positive = xl > 0
            code = nearest_between(value * l2 / xl, -4, 3)
            xl, l2 = xl + wx * code, l2 + w * code * code
            # The same code can change a sum's last bit, and must not: only another code counts.
            better = positive & (code != old) & (l2 > 0) & (xl * xl * sum_l2 > sum_xl * sum_xl * l2)
            if not bool(better.any()):
                continue
            changed = True
            codes[i] = torch.where(better, code, old)
            sum_xl = torch.where(better, xl, sum_xl)
            sum_l2 = torch.where(better, l2, sum_l2)
        if not changed:
            break
    zero = magnitude < _TINY
    nothing = torch.zeros_like(sum_xl)
    scale = torch.where((sum_l2 > 0) & ~zero, sum_xl / sum_l2, nothing)
    return torch.where(zero, nothing, codes + 4), scale


def _non_linear_codes(x: Tensor) -> Tensor:
    """Indices of the nearest entries of IQ4's table; halfway between two, the upper."""
    table = NUMBER_FORMATS["iq4_nl_codes"].table(x.device)
    return torch.bucketize(x, (table[:-1] + table[1:]) / 2, right=True)


def _make_non_linear_scale(x: Tensor) -> Tensor:
    """(32, lanes) -> (lanes,)."""
    magnitude, largest = _largest_first(x)
    table = NUMBER_FORMATS["iq4_nl_codes"].table(x.device)
    w = x * x

    def sums_for(inverse: Tensor) -> tuple[Tensor, Tensor]:
        values = table[_non_linear_codes(inverse * x)]
        weighted = w * values
        return in_order(weighted * x), in_order(weighted * values)

    sum_xl, sum_l2 = sums_for(over(1.0, -largest / torch.full_like(largest, -127)))
    scale = torch.where(sum_l2 > 0, sum_xl / sum_l2, torch.zeros_like(sum_l2))
    best = scale * sum_xl
    for step in range(-7, 8):
        sum_xl, sum_l2 = sums_for(over(step - 127, largest))
        better = (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2)
        scale = torch.where(better, sum_xl / sum_l2, scale)
        best = torch.where(better, scale * sum_xl, best)
    return torch.where(magnitude < _TINY, torch.zeros_like(scale), scale)


# ---- Blocks: float32 (blocks, weights) -> uint8 (blocks, bytes) ----


def _sub_blocks(x: Tensor, size: int) -> Tensor:
    """(blocks, weights) -> (size, all sub-blocks)."""
    return x.reshape(-1, size).t().contiguous()


def _requantized(
    x: Tensor, found: Tensor, scale: Tensor, low: Tensor | float, limits: tuple[int, int]
) -> Tensor:
    """(n, lanes) -> (lanes, n) uint8: codes for the stored scales; the search's where a scale is zero."""
    codes = nearest_between((x + low) / scale, *limits) - limits[0]
    return torch.where(scale == 0, found, codes).t().to(torch.uint8)


def _largest_scale(scales: Tensor) -> Tensor:
    """(blocks, n) -> (blocks, 1), with its sign; 0 where all are."""
    return largest_weight(scales)


def _q2_k(x: Tensor) -> Tensor:
    subs = _sub_blocks(x, 16)
    found, scales, mins = _make_offset_codes(subs, subs.abs(), _OffsetSearch(3, -0.5, 0.1, 15, True))
    scale_codes, d = _offset_scale_codes(scales.view(-1, 16), 15)
    min_codes, dmin = _offset_scale_codes(mins.view(-1, 16), 15)
    packed = (scale_codes | min_codes << 4) & 255
    scale = _stored(d) * (packed & 15)
    low = _stored(dmin) * (packed >> 4)
    codes = _requantized(subs, found, scale.flatten(), low.flatten(), (0, 3))
    planes = join_planes(codes.reshape(-1, 2, 4, 32), 2).flatten(-2)
    return torch.cat((packed.to(torch.uint8), planes, half_bytes(d), half_bytes(dmin)), -1)


def _offset_scale_codes(scales: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """(blocks, n) of numbers >= 0 -> codes 0..levels and the scale of them, (blocks, 1)."""
    largest = scales.amax(-1, keepdim=True).clamp(min=0) + 0.0  # never -0
    inverse = torch.where(largest > 0, over(levels, largest), torch.zeros_like(largest))
    return nearest(inverse * scales), largest / torch.full_like(largest, levels)


def _six_bit_pairs(scales: Tensor, mins: Tensor) -> Tensor:
    """Eight 6-bit scales and eight 6-bit minimums in twelve bytes."""
    first, last = scales.chunk(2, -1)
    first_min, last_min = mins.chunk(2, -1)
    parts = (first | last >> 4 << 6, first_min | last_min >> 4 << 6, last & 15 | (last_min & 15) << 4)
    return torch.cat(parts, -1).to(torch.uint8)


def _q45_k(x: Tensor, search: _OffsetSearch) -> Tensor:
    subs = _sub_blocks(x, 32)
    # Through float64, because torch's float32 square root may be off by its last bit.
    weights = (in_order(subs * subs) / 32).double().sqrt().float() + subs.abs()
    found, scales, mins = _make_offset_codes(subs, weights, search)
    scale_codes, d = _offset_scale_codes(scales.view(-1, 8), 63)
    min_codes, dmin = _offset_scale_codes(mins.view(-1, 8), 63)
    scale_codes, min_codes = (scale_codes & 255).clamp(max=63), (min_codes & 255).clamp(max=63)
    scale, low = _stored(d) * scale_codes, _stored(dmin) * min_codes
    codes = _requantized(subs, found, scale.flatten(), low.flatten(), (0, search.levels)).reshape(-1, 8, 32)
    head = (half_bytes(d), half_bytes(dmin), _six_bit_pairs(scale_codes, min_codes))
    low_bits = join_planes((codes & 15).unflatten(1, (4, 2)), 4).flatten(-2)
    if search.levels == 15:
        return torch.cat((*head, low_bits), -1)
    return torch.cat((*head, join_planes(codes >> 4, 1), low_bits), -1)


def _symmetric_scale_codes(scales: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """(blocks, n) -> codes of which the largest scale has -half, and the scale of them, (blocks, 1)."""
    largest = _largest_scale(scales)
    inverse = over(-half, largest)
    nothing = torch.zeros_like(largest)
    codes = torch.where(largest != 0, nearest(inverse * scales).clamp(max=half - 1), 0)
    return codes, torch.where(largest != 0, over(1.0, inverse), nothing)


def _q3_k(x: Tensor) -> Tensor:
    subs = _sub_blocks(x, 16)
    found, scales = _make_q3_codes(subs)
    steps, d = _symmetric_scale_codes(scales.view(-1, 16), 32)
    # A block of zeros stores zeros, which read as -32 times d = 0.
    stored = torch.where(d == 0, 0, steps.clamp(min=-32) + 32).to(torch.uint8)
    scale = _stored(d) * (stored.int() - 32)
    codes = _requantized(subs, found, scale.flatten(), 0.0, (-4, 3)).reshape(-1, 256)
    high = join_planes((codes >> 2).view(-1, 8, 32), 1)
    low = join_planes((codes & 3).view(-1, 2, 4, 32), 2).flatten(-2)
    low_scales = join_nibbles(stored & 15)
    high_scales = join_planes((stored >> 4).view(-1, 4, 4), 2)
    return torch.cat((high, low, low_scales, high_scales, half_bytes(d)), -1)


def _q6_k(x: Tensor) -> Tensor:
    subs = _sub_blocks(x, 16)
    found, scales = _make_symmetric_codes(subs)
    steps, d = _symmetric_scale_codes(scales.view(-1, 16), 128)
    stored = steps.to(torch.int8)
    scale = _stored(d) * stored
    codes = _requantized(subs, found, scale.flatten(), 0.0, (-32, 31)).reshape(-1, 256)
    low = join_nibbles((codes & 15).view(-1, 2, 128)).flatten(-2)
    high = join_planes((codes >> 4).view(-1, 2, 4, 32), 2).flatten(-2)
    encoded = torch.cat((low, high, stored.view(torch.uint8), half_bytes(d)), -1)
    return torch.where(_largest_scale(scales.view(-1, 16)).abs() < _TINY, torch.zeros_like(encoded), encoded)


def _iq4_nl(x: Tensor) -> Tensor:
    scale = _make_non_linear_scale(x.t().contiguous()).unsqueeze(-1)
    inverse = torch.where(scale == 0, torch.zeros_like(scale), over(1.0, scale))
    codes = _non_linear_codes(inverse * x).to(torch.uint8)
    return torch.cat((half_bytes(scale), join_nibbles(codes)), -1)


def _iq4_xs(x: Tensor) -> Tensor:
    scales = _make_non_linear_scale(_sub_blocks(x, 32)).view(-1, 8)
    d = -_largest_scale(scales) / 32
    nothing = torch.zeros_like(d)
    steps = nearest(torch.where(d == 0, nothing, over(1.0, d)) * scales).clamp(-32, 31)
    scale = d * steps
    inverse = torch.where(scale == 0, torch.zeros_like(scale), over(1.0, scale))
    codes = _non_linear_codes(inverse.unsqueeze(-1) * x.view(-1, 8, 32)).to(torch.uint8)
    stored = (steps + 32).to(torch.uint8)
    low = join_planes((stored & 15).view(-1, 4, 2).transpose(-1, -2), 4)
    high = join_planes((stored >> 4).view(-1, 2, 4).transpose(-1, -2), 2)
    return torch.cat((half_bytes(d), high, low, join_nibbles(codes).flatten(-2)), -1)


# ---- Four-bit floats with a small scale ----


def _nearest_e2m1(x: Tensor, scale: Tensor) -> Tensor:
    """Codes of the nearest values e2m1 * scale, the first of equally near ones."""
    best, codes = x.abs(), torch.zeros_like(x, dtype=torch.uint8)
    # Half the scale times twice the value, as ggml has it: the scale may be where float32 is no longer exact.
    for code, value in enumerate(2 * NUMBER_FORMATS["e2m1"].table(x.device)):
        error = (value * (scale / 2) - x).abs()
        codes = torch.where(error < best, code, codes)
        best = torch.minimum(error, best)
    return codes.to(torch.uint8)


def _mxfp4(x: Tensor) -> Tensor:
    largest = largest_magnitude(x)
    # log2 rounded to float32 before the floor, as log2f gives it: just below a power of two it may round up.
    # Never below 0, where ggml's byte wraps around: 255 is no number.
    exponent = largest.double().log2().float().floor().clamp(min=-125).int() + 125
    stored = torch.where(largest > 0, exponent, 0)
    half_scale = torch.where(stored < 2, 0x200000 << stored.clamp(max=1), stored - 1 << 23).to(torch.int32)
    codes = _nearest_e2m1(x, 2 * half_scale.view(torch.float32))
    return torch.cat((stored.to(torch.uint8), join_nibbles(codes)), -1)


def _ue4m3(x: Tensor) -> Tensor:
    """Codes of e4m3 without a sign, halves up. From 256 on everything is 448: ggml calls that too large."""
    small = (x * 512 + 0.5).int().clamp(max=7)
    code = (x.view(torch.int32) + (1 << 19) >> 20) - (127 - 7 << 3)
    code = torch.where(code < 0x78, code, 0x7E)
    return torch.where(x < 2.0**-6, small, code)


def _nvfp4(x: Tensor) -> Tensor:
    groups = x.reshape(-1, 16)
    largest = largest_magnitude(groups)
    stored = _ue4m3(largest / torch.full_like(largest, 6))
    codes = _nearest_e2m1(groups, NUMBER_FORMATS["e4m3"].table(x.device)[stored])
    return torch.cat((stored.to(torch.uint8).view(-1, 4), join_nibbles(codes).reshape(-1, 32)), -1)


ENCODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": partial(_q45_k, search=_OffsetSearch(15, -1.0, 0.1, 20, False)),
    "Q5_K": partial(_q45_k, search=_OffsetSearch(31, -0.5, 0.1, 15, False)),
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
}
