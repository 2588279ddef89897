"""IQ3_S: magnitudes of four weights at a time from a grid of 512 points (ggml's quants).

A sub-block of 32 weights has a scale, signs, and eight grid points of four odd numbers 1 … 15. Nineteen
scales are tried; for each, every four magnitudes are rounded to odd numbers, and where that is no grid point,
the best of the grid points around it is taken: those at the three smallest distances from it (``Tables``).
csrc/quantize_grid.h does the same with the same bits.

ggml has a fault here that lowbit does not copy: after a sub-block of zeros it stores the codes and signs of
the following ones 32 weights too early. Every other block equals ggml's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lowbit.numerics.block_layouts import grid_vectors
from lowbit.quantize.gguf_pack import half_bytes, in_order, join_bits, join_planes, nearest_between, over

_LANES = 16
_FAR = 1e15  # so large a number that it is never the nearest


@dataclass(frozen=True)
class Tables:
    """The grid points near each of the 4096 points (code of number i at bits 3 i), nearest first.

    ``index``: int16 (4096,), where the point is in the grid, or -1. ``near``: int16 (4096, most), its own
    index alone or its neighbours'; ``numbers``: float32 (4, 4096, most), what they stand for, filled up with
    _FAR. For csrc the same in rows of 16: ``starts`` (int32, 4097) says which rows of ``near_rows``
    (rows, 16) and ``number_rows`` (rows, 4, 16) are a point's; a point of the grid has none.
    """

    index: Tensor
    near: Tensor
    numbers: Tensor
    starts: Tensor
    near_rows: Tensor
    number_rows: Tensor


@cache
def tables(device: torch.device) -> Tables:
    """Made from the grid when the first tensor needs them."""
    grid = grid_vectors("IQ3_S", torch.device("cpu")).int()  # (512, 4)
    codes = torch.arange(8**4).unsqueeze(-1) >> torch.tensor([0, 3, 6, 9]) & 7
    distances = (2 * codes + 1 - grid.unsqueeze(1)).square().sum(-1).t()  # (4096, 512)
    ordered, order = distances.sort(dim=-1, stable=True)
    shell = (ordered.diff(dim=-1) != 0).cumsum(-1)  # 0, 1, 2, … as the distance grows
    met = ordered[:, 0] == 0
    counts = torch.where(met, 1, 1 + (shell <= 2).sum(-1))
    rows = -(-int(counts.max()) // _LANES)
    near = order[:, : rows * _LANES].to(torch.int16)
    inside = torch.arange(rows * _LANES) < counts.unsqueeze(-1)
    numbers = torch.where(inside.unsqueeze(-1), grid[near.long()].float(), _FAR)  # (4096, most, 4)

    used = inside.view(-1, rows, _LANES)[..., 0] & ~met.unsqueeze(-1)  # (4096, rows)
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), used.sum(-1).cumsum(0))).int()
    found = Tables(
        index=torch.where(met, order[:, 0], -1).to(torch.int16),
        near=near,
        numbers=numbers.permute(2, 0, 1).contiguous(),
        starts=starts,
        near_rows=near.view(-1, rows, _LANES)[used].contiguous(),
        number_rows=numbers.view(-1, rows, _LANES, 4)[used].transpose(1, 2).contiguous(),
    )
    return Tables(**{name: tensor.to(device) for name, tensor in vars(found).items()})


@cache
def native_tables() -> tuple[Tensor, ...]:
    """What csrc/quantize_grid.h wants: the grid's points, then its Tables."""
    cpu = torch.device("cpu")
    found = tables(cpu)
    points = grid_vectors("IQ3_S", cpu).float().contiguous()
    return points, found.index, found.starts, found.near_rows, found.number_rows


def _point_of(codes: Tensor) -> Tensor:
    """(4, …) codes 0..7 -> the point's number."""
    wide = codes.long()
    return wide[0] | wide[1] << 3 | wide[2] << 6 | wide[3] << 9


def _nearest_points(x: Tensor, weights: Tensor, inverse: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(4, groups, lanes) magnitudes -> grid indices (groups, lanes), and whether rounding met the grid."""
    found = tables(x.device)
    point = _point_of(nearest_between(0.5 * (inverse * x - 1), 0, 7))
    chosen = found.index[point].long()
    met = chosen >= 0
    missed = (~met).nonzero(as_tuple=True)
    if len(missed[0]):
        where = point[missed]
        scales = scale.expand_as(point)[missed].unsqueeze(-1)
        distance = torch.zeros_like(found.numbers[0, where])
        for i in range(4):
            off = scales * found.numbers[i, where] - x[i][missed].unsqueeze(-1)
            distance += weights[i][missed].unsqueeze(-1) * off * off
        best = distance.argmin(-1, keepdim=True)
        chosen[missed] = found.near[where].gather(-1, best).squeeze(-1).long()
    return chosen, met


def _sums(x: Tensor, w: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Σ w x q and Σ w q q over a sub-block's weights, one after the other: (lanes,)."""
    numbers = (
        grid_vectors("IQ3_S", x.device).float()[chosen].permute(0, 2, 1).reshape(32, -1)
    )  # (8, 4, lanes) before
    flat_x, flat_w = (t.transpose(0, 1).reshape(32, -1) for t in (x, w))
    return in_order(flat_w * flat_x * numbers), in_order(flat_w * numbers * numbers)


def encode_iq3_s(blocks: Tensor) -> Tensor:
    """float32 (blocks, 256) -> uint8 (blocks, 110)."""
    return torch.cat([_encode(part) for part in blocks.split(128)])


def _encode(blocks: Tensor) -> Tensor:
    signs = join_bits((blocks < 0).to(torch.uint8))  # (blocks, 32)
    x = blocks.abs().view(-1, 8, 4).permute(2, 1, 0).contiguous()  # (4 numbers, 8 groups, sub-blocks)
    w = x * x
    roots = w.double().sqrt().float()  # torch's float32 square root may be off by its last bit
    largest = x.amax((0, 1))
    nothing = torch.zeros_like(largest)
    scale, best = largest / torch.full_like(largest, 15), nothing
    chosen = torch.zeros(x.shape[1:], dtype=torch.int64, device=x.device)
    met_all = torch.zeros_like(largest, dtype=torch.bool)
    for step in range(-9, 10):
        numerator = torch.tensor(0.2) * step + 15  # float32
        inverse = numerator.to(x.device) / largest
        points, met = _nearest_points(x, roots, inverse, over(1.0, inverse))
        sum_qx, sum_q2 = _sums(x, w, points)
        better = (sum_q2 > 0) & (sum_qx * sum_qx > best * sum_q2)
        scale = torch.where(better, sum_qx / sum_q2, scale)
        best = torch.where(better, scale * sum_qx, best)
        chosen = torch.where(better, points, chosen)
        met_all = torch.where(better, met.all(0), met_all)
    again = ~met_all & (scale > 0)
    points, _ = _nearest_points(x, roots, over(1.0, scale), scale)
    sum_qx, sum_q2 = _sums(x, w, points)
    chosen = torch.where(again, points, chosen)
    scale = torch.where(again & (sum_q2 > 0), sum_qx / sum_q2, scale)
    zero = largest == 0
    scale = torch.where(zero, nothing, scale).view(-1, 8)
    chosen = torch.where(zero, torch.zeros_like(chosen), chosen).t().reshape(-1, 64)

    most = scale.amax(-1, keepdim=True)
    d = most / torch.full_like(most, 31)
    steps = nearest_between(0.5 * (over(1.0, d) * scale - 1), 0, 15)
    steps = torch.where(most == 0, torch.zeros_like(steps), steps).to(torch.uint8)
    scales = join_planes(steps.view(-1, 4, 2).transpose(-1, -2), 4)
    high = join_bits((chosen >> 8).to(torch.uint8))
    return torch.cat((half_bytes(d * 1.033), (chosen & 255).to(torch.uint8), high, signs, scales), -1)
