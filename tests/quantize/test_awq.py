"""AWQ's searches against brute force in numpy, and folds that change nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit.quantize.awq import Fold, clip, search_clip, search_scales
from lowbit.quantize.block import FloatBlock, FloatLinear, apply_fold
from lowbit.quantize.calibration import InputStatistics
from lowbit.quantize.integer_grid import IntegerGrid

ROWS, COLUMNS, GROUP = 9, 36, 8  # the last group has 4 columns


def inputs(tokens: int, seed: int) -> Tensor:
    """Correlated inputs; three loud ones, one that never is."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)
    x[:, [2, 11, 33]] *= 30
    x[:, 20] = 0
    return x


def weights(rows: int, seed: int) -> Tensor:
    """Long tails, every row another size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, COLUMNS, generator=generator)
    return weight.pow(3) * (1 + torch.arange(rows))[:, None]


def rounded(groups: np.ndarray, bits: int, symmetric: bool) -> np.ndarray:
    """Round-to-nearest of (rows, columns) with one scale a row, in float64."""
    top = 2**bits - 1
    low, high = np.minimum(groups.min(1), 0), np.maximum(groups.max(1), 0)
    reach = 2 * np.maximum(-low, high) if symmetric else high - low
    scale = (reach / top).astype(np.float16).astype(np.float64)
    scale[reach == 0] = 1
    zero = np.full(len(groups), 2 ** (bits - 1)) if symmetric else np.clip(np.round(-low / scale), 0, top)
    codes = np.clip(np.round(groups / scale[:, None]) + zero[:, None], 0, top)
    return (codes - zero[:, None]) * scale[:, None]


def rounded_in_groups(weight: np.ndarray, bits: int, symmetric: bool) -> np.ndarray:
    parts = [weight[:, start : start + GROUP] for start in range(0, COLUMNS, GROUP)]
    return np.concatenate([rounded(part, bits, symmetric) for part in parts], axis=1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("tokens", [20, 200])  # fewer and more than columns
def test_scales_are_the_best_of_the_grid(symmetric: bool, tokens: int) -> None:
    linears = [(weights(ROWS, 1), inputs(tokens, 2)), (weights(4, 3), inputs(tokens, 4))]
    magnitude = torch.cat([x for _, x in linears]).abs().mean(0)
    found = search_scales(Fold(("a", "b"), "norm"), linears, magnitude, IntegerGrid(3, symmetric), GROUP, 10)
    usual, live = magnitude.double().numpy(), magnitude.numpy() > 0
    best, least = np.ones(COLUMNS), np.inf
    for step in range(10):
        scales = np.ones(COLUMNS)
        powers = usual[live] ** (step / 10)
        scales[live] = powers / np.sqrt(powers.max() * powers.min())
        change = 0.0
        for weight, x in linears:
            wide = weight.double().numpy()
            error = rounded_in_groups(wide * scales, 3, symmetric) / scales - wide
            change += np.square(x.double().numpy() @ error.T).sum()
        if change < least:
            best, least = scales, change
    assert least < np.inf and not np.allclose(best, 1)
    assert np.allclose(found.numpy(), best, rtol=1e-5)
    assert found[20] == 1


def test_scales_are_ones_where_nothing_is_better() -> None:
    """All inputs equally loud: every exponent gives ones. No input at all: ones too."""
    x = inputs(50, 1).sign()
    for magnitude in (torch.ones(COLUMNS), torch.zeros(COLUMNS)):
        found = search_scales(
            Fold(("a",), "norm"), [(weights(3, 1), x)], magnitude, IntegerGrid(4, True), GROUP
        )
        assert torch.equal(found, torch.ones(COLUMNS))


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_is_the_best_of_the_grid_for_every_group(symmetric: bool) -> None:
    weight, x = weights(ROWS, 5), inputs(80, 6)
    found = search_clip(weight, x, IntegerGrid(3, symmetric), GROUP, steps=8, shrink=0.4)
    wide, sample = weight.double().numpy(), x.double().numpy()
    shrunk = 0
    for group in range(-(-COLUMNS // GROUP)):
        columns = slice(group * GROUP, (group + 1) * GROUP)
        part, largest = wide[:, columns], np.abs(wide[:, columns]).max(1)
        costs, limits = [], []
        for step in range(8):
            limit = largest * (1 - 0.6 * step / 8)
            error = rounded(np.clip(part, -limit[:, None], limit[:, None]), 3, symmetric) - part
            costs.append(np.square(sample[:, columns] @ error.T).sum(0))
            limits.append(limit)
        best = np.argmin(costs, axis=0)
        expected = np.array(limits)[best, np.arange(ROWS)]
        shrunk += int((best > 0).sum())
        assert np.allclose(found[:, group].numpy(), expected, rtol=1e-5), group
    assert shrunk > 5
    clipped = clip(weight, found, GROUP)
    assert clipped.shape == weight.shape
    bound = found.repeat_interleave(GROUP, 1)[:, :COLUMNS]
    assert torch.equal(clipped, weight.clamp(-bound, bound))


def test_query_heads_that_share_a_value_head_share_its_scales() -> None:
    fold = Fold(("o",), "v", (0, 4), repeat=3, head_dim=2)
    scales = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert fold.for_consumers(scales).tolist() == [1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4]
    columns = torch.tensor([1.0, 10, 2, 20, 3, 30, 4, 40, 5, 50, 6, 60])
    assert fold.for_producer(columns).tolist() == [2, 20, 5, 50]


def test_folds_change_no_product() -> None:
    """With powers of two the outputs are equal to the bit, biases of the producer included."""
    generator = torch.Generator().manual_seed(1)

    def linear(name: str, rows: int, columns: int) -> FloatLinear:
        statistics = InputStatistics(columns, gram=True, sample_rows=8)
        weight, bias = torch.randn(rows, columns, generator=generator), torch.randn(rows, generator=generator)
        return FloatLinear(name, ((name, rows),), weight, bias, statistics)

    up, down, gate = linear("up", 10, 4), linear("down", 5, 6), linear("gate", 3, 4)
    folds = [Fold(("up", "gate"), "norm"), Fold(("down",), "up", (3, 9))]
    block = FloatBlock({"up": up, "down": down, "gate": gate}, {"norm": torch.randn(4)}, folds)
    x = torch.randn(20, 4)

    def run() -> tuple[Tensor, Tensor]:
        normed = x * block.vectors["norm"]
        inner = normed @ up.weight.T + up.bias
        return inner[:, 3:9] @ down.weight.T, normed @ gate.weight.T

    before = run()
    for fold in folds:
        size = 4 if fold.rows is None else 6
        apply_fold(block, fold, 2.0 ** torch.arange(size).sub(2))
    assert all(torch.equal(a, b) for a, b in zip(before, run(), strict=True))
    assert up.scaled and down.scaled and gate.scaled


def test_statistics_follow_a_scale() -> None:
    x, scales = inputs(40, 9), 2.0 ** (torch.arange(COLUMNS) % 5)
    before, after = (InputStatistics(COLUMNS, gram=True, sample_rows=16) for _ in range(2))
    before.add(x)
    before.divide(scales)
    after.add(x / scales)
    assert torch.equal(before.sample, after.sample)
    assert torch.allclose(before.magnitude, after.magnitude)
    assert before.gram is not None and after.gram is not None
    assert torch.allclose(before.gram, after.gram, rtol=1e-4, atol=1e-3)
