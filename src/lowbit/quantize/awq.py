"""AWQ (Lin et al., 2023): activation-aware scales and clipping in front of rounding to nearest.

A few inputs of a layer are much larger than the others, and errors of the weights they meet cost the most.
Multiplying these columns of W by s and dividing the inputs by s leaves the product as it is, but makes the
columns large in their groups, and so relatively better rounded:

    W x = (W diag(s)) (x / s)        s = mean|x|^a, over sqrt(max s min s);  a from a grid over 0 … 1

``search_scales`` takes the a for which the outputs of all Linears that share x change least. The division is
*folded* into whatever gives x (``Fold``): a norm's weight, rows of V for the output projection, rows of the
up projection for the down projection; nothing is left to do at run time. ``search_clip`` then looks, group by
group, for a smaller largest weight that rounds to a smaller change of the group's output.

All functions are pure; errors are over a sample of inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.quantize.integer_grid import IntegerGrid, fake_quantize, in_groups

_LIMITS = (1e-4, 1e4)  # of a scale: an input that is almost never there must not blow up its neighbour


@dataclass(frozen=True)
class Fold:
    """Consumers' columns are multiplied by scales, what gives their input is divided by them.

    ``producer``: the name of a vector (a norm's weight), or with ``rows`` of a Linear whose rows
    ``rows[0]`` … ``rows[1] - 1``, biases included, give the input. ``repeat``: the consumers see each head of
    ``head_dim`` values so many times in a row (grouped-query attention): one scale serves all of them.
    """

    consumers: tuple[str, ...]
    producer: str
    rows: tuple[int, int] | None = None
    repeat: int = 1
    head_dim: int = 0

    def for_consumers(self, scales: Tensor) -> Tensor:
        """The producer's scales as the consumers' columns see them."""
        if self.repeat == 1:
            return scales
        return scales.view(-1, 1, self.head_dim).expand(-1, self.repeat, -1).flatten()

    def for_producer(self, columns: Tensor) -> Tensor:
        """Magnitudes of the consumers' columns, averaged over those that share a scale."""
        if self.repeat == 1:
            return columns
        return columns.view(-1, self.repeat, self.head_dim).mean(1).flatten()


def search_scales(
    fold: Fold,
    consumers: Sequence[tuple[Tensor, Tensor]],
    magnitude: Tensor,
    grid: IntegerGrid,
    group: int,
    steps: int = 20,
) -> Tensor:
    """float32 scales of the producer's values: ones where no exponent is better than doing nothing.

    ``consumers``: (weight (out, in), sample of its inputs (rows, in)) each; ``magnitude`` (in,): mean |x|.
    """
    usual = fold.for_producer(magnitude)
    roots = [_root(sample) for _, sample in consumers]
    best, least = torch.ones_like(usual), float("inf")
    for step in range(steps):
        scales = _scales(usual, step / steps)
        columns = fold.for_consumers(scales)
        change = 0.0
        for (weight, _), root in zip(consumers, roots, strict=True):
            error = (fake_quantize(weight * columns, grid, group) / columns).sub_(weight)
            change += float((root @ error.T).square().sum(dtype=torch.float64))
        if change < least:
            best, least = scales, change
    return best


def _scales(magnitude: Tensor, exponent: float) -> Tensor:
    """mean|x|^a over sqrt(max min); 1 for an input that never is."""
    live = magnitude > 0
    if exponent == 0 or not bool(live.any()):
        return torch.ones_like(magnitude)
    powers = magnitude[live].double().pow(exponent)
    scales = torch.ones_like(magnitude)
    scales[live] = (powers / (powers.max() * powers.min()).sqrt()).clamp(*_LIMITS).float()
    return scales


def _root(sample: Tensor) -> Tensor:
    """A matrix R (at most in rows) with RᵀR = XᵀX: as good as the sample for sums of squared outputs."""
    if sample.shape[0] <= sample.shape[1]:
        return sample
    root: Tensor = torch.linalg.qr(sample, mode="r")[1]
    return root


def search_clip(
    weight: Tensor, sample: Tensor, grid: IntegerGrid, group: int, steps: int = 10, shrink: float = 0.5
) -> Tensor:
    """float32 (out, groups): the largest |weight| to keep in each group, from max|w| to ``shrink`` of it."""
    groups = in_groups(weight, group).transpose(0, 1)  # (groups, out, group)
    inputs = in_groups(sample, group).transpose(0, 1)  # (groups, rows, group)
    gram = inputs.transpose(1, 2) @ inputs  # (groups, group, group)
    largest = groups.abs().amax(-1)  # (groups, out)
    limits, least = largest.clone(), torch.full_like(largest, float("inf"))
    for step in range(steps):
        limit = largest * (1 - (1 - shrink) * step / steps)
        clipped = groups.clamp(-limit.unsqueeze(-1), limit.unsqueeze(-1))
        scale, zero = (number.unsqueeze(-1) for number in grid.fit(clipped))
        error = grid.decode(grid.encode(clipped, scale, zero), scale, zero).sub_(groups)
        change = ((error @ gram) * error).sum(-1)
        better = change < least
        least = torch.where(better, change, least)
        limits = torch.where(better, limit, limits)
    return limits.T.contiguous()


def clip(weight: Tensor, limits: Tensor, group: int) -> Tensor:
    """``weight`` (out, in) with every group kept within its limit."""
    groups, bounds = in_groups(weight, group), limits.unsqueeze(-1)
    return groups.clamp(-bounds, bounds).flatten(1)[:, : weight.shape[1]]
