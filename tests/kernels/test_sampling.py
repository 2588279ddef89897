"""Draws and log-probabilities of the native sampler, against float64 and numpy's generator."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit.engine.sampler import _changed
from lowbit.kernels import native
from lowbit.kernels.sampling import Draw, LogitChanges, draw_tokens, rate_row

pytestmark = pytest.mark.skipif(native.isa() == "scalar", reason="no native library")

NEAR = 1e-6  # of a border between two tokens


def logits_of(rows: int, width: int, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(width + rows)
    return torch.randn(rows, width, generator=generator) * spread


def uniform(draw: Draw) -> float:
    return float(np.random.Generator(np.random.Philox(key=draw.seed, counter=draw.position)).random())


def order_of(row: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """(tokens in the order in which they are drawn from, what each adds), in float64."""
    heat = (row / draw.temperature).double()
    weights = (heat - heat.max()).exp()
    weights[weights < draw.min_p] = 0
    ids = torch.arange(len(row))
    if draw.top_k or draw.top_p < 1:
        ids = torch.argsort(weights, descending=True, stable=True)
        if draw.top_k:
            ids = ids[: draw.top_k]
        before = weights[ids].cumsum(0) - weights[ids]
        ids = ids[: max(int((before < draw.top_p * weights[ids].sum()).sum()), 1)]
    return ids, weights[ids]


def assert_drawn(row: Tensor, draw: Draw, token: int) -> None:
    """The token whose share of [0, 1) holds the uniform number, or one whose share begins or ends there."""
    ids, weights = order_of(row, draw)
    places = (ids == token).nonzero()
    assert len(places) == 1 and weights[places[0, 0]] > 0, (token, draw)
    ends = weights.cumsum(0) / weights.sum()
    place = int(places[0, 0])
    low, high = float(ends[place] - weights[place] / weights.sum()), float(ends[place])
    assert low - NEAR <= uniform(draw) <= high + NEAR, (token, draw)


def drawn(logits: Tensor, draws: list[Draw]) -> list[int]:
    tokens = draw_tokens(logits, logits.amax(dim=1).tolist(), draws)
    assert tokens is not None
    return tokens


RULES = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"top_p": 0.01},
    {"top_p": 0.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 1000},
    {"top_k": 1 << 30},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.01, "temperature": 0.7},
    {"top_k": 5000, "top_p": 0.95},
    {"top_p": 0.95, "temperature": 1.9},
]


@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 127, 128, 129, 1000, 49_152])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_draws_what_the_uniform_number_says(width: int, rule: dict[str, float]) -> None:
    logits = logits_of(4, width)
    base = Draw(0, 0, 0, top_p=1.0, min_p=0.0, temperature=1.0, top_k=0)._replace(**rule)  # type: ignore[arg-type]
    draws = [
        base._replace(row=row, seed=7 * row + seed, position=seed) for row in range(4) for seed in range(6)
    ]
    for draw, token in zip(draws, drawn(logits, draws), strict=True):
        limit = draw.top_k if draw.top_k < width else 0
        assert_drawn(logits[draw.row], draw._replace(top_k=limit), token)


def test_every_token_is_drawn_as_often_as_it_should_be() -> None:
    logits = logits_of(1, 40, 1.0)
    count = 20_000
    draws = [Draw(0, seed, 3, 1.0, 0.0, 1.0, 0) for seed in range(count)]
    found = np.bincount(drawn(logits, draws), minlength=40) / count
    expected = torch.softmax(logits[0].double(), 0).numpy()
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / count)).all()


def test_the_generator_is_numpys() -> None:
    """Two tokens of like weight: which is drawn is one bit of the uniform number, the border any place."""
    borders = torch.linspace(-3, 3, 50)
    logits = torch.stack([torch.tensor([0.0, float(b)]) for b in borders])
    for seed, position in ((0, 0), (1, 0), (2**63 - 1, 5), (123456789, 2**31)):
        draws = [Draw(row, seed, position, 1.0, 0.0, 1.0, 0) for row in range(len(borders))]
        number = uniform(draws[0])
        expected = [int(number >= 1 / (1 + math.exp(float(b)))) for b in borders]
        assert drawn(logits, draws) == expected


def test_equals_go_by_id_and_banned_tokens_are_never_drawn() -> None:
    logits = torch.full((1, 300), -math.inf)
    logits[0, 250:] = 1.5
    for top_k, top_p in ((0, 1.0), (6, 1.0), (0, 0.1), (6, 0.5)):
        draws = [Draw(0, seed, 0, top_p, 0.0, 1.0, top_k) for seed in range(200)]
        kept = {6: 6, 0: 50}[top_k]
        kept = math.ceil(kept * top_p - 1e-9)
        assert set(drawn(logits, draws)) == set(range(250, 250 + kept))


def test_rows_far_apart_and_repeated() -> None:
    logits = logits_of(1, 500).expand(6, -1)
    draws = [Draw(row, 9, 4, 0.9, 0.0, 1.0, 0) for row in range(6)]
    assert len(set(drawn(logits, draws))) == 1
    apart = torch.zeros(3, 777)
    apart[:, :500] = logits_of(3, 500)
    one = [Draw(row, 5, row, 0.9, 0.0, 1.0, 50) for row in range(3)]
    assert drawn(apart[:, :500], one) == drawn(apart[:, :500].contiguous(), one)


def test_what_overflows_is_still_a_token() -> None:
    logits = torch.tensor([[3e38, 1.0, -3e38]])
    for rule in ((1.0, 0), (0.5, 0), (1.0, 2)):
        assert drawn(logits, [Draw(0, 1, 1, rule[0], 0.0, 0.01, rule[1])])[0] in range(3)


def some_changes(generator: np.random.Generator, width: int) -> LogitChanges:
    """Tokens in either list, in both and in none; bans among the biases."""
    biased = generator.permutation(width)[: generator.integers(0, 6)]
    bias = generator.normal(0, 3, len(biased)).astype(np.float32)
    bias[generator.random(len(bias)) < 0.2] = -np.inf
    said = generator.permutation(width)[: generator.integers(0, 40)]
    counts = generator.integers(0, 4, len(said)).astype(np.int32)
    numbers = (generator.choice((1.0, 1.1, 0.7)), generator.choice((0.0, 0.4)), generator.choice((0.0, -0.3)))
    return LogitChanges(biased, bias, said, counts, *map(float, numbers))


@pytest.mark.parametrize("width", [7, 40, 5000])
def test_changes_are_torchs_and_leave_no_trace(width: int) -> None:
    generator = np.random.default_rng(width)
    logits = logits_of(60, width, 1.0)
    logits[:, 2] = -math.inf
    before = logits.clone()
    rules = [(0.0, 1.0, 0), (1.0, 1.0, 0), (0.8, 0.9, 0), (0.8, 0.9, 5)]
    draws = []
    for row in range(60):
        temperature, top_p, top_k = rules[row % 4]
        changes = some_changes(generator, width)
        draws.append(Draw(row, row, 3, top_p, 0.0, temperature, top_k, changes))
    tokens = drawn(logits, draws)
    assert torch.equal(logits, before)
    for draw, token in zip(draws, tokens, strict=True):
        assert draw.changes is not None
        changed = _changed(logits[draw.row], draw.changes)
        if draw.temperature == 0:
            assert token == int((changed == changed.max()).nonzero()[0])
        else:
            assert_drawn(changed, draw, token)
    for bad in (width, -1):
        changes = LogitChanges(
            np.array([bad]), np.zeros(1, np.float32), np.zeros(0, np.int64), np.zeros(0, np.int32)
        )
        assert draw_tokens(logits, [0.0] * 60, [draws[0]._replace(changes=changes)]) is None


@pytest.mark.parametrize("width", [1, 5, 16, 130, 49_152])
@pytest.mark.parametrize("alternatives", [0, 1, 5, 20, 1000])
def test_rates_like_float64(width: int, alternatives: int) -> None:
    row = (logits_of(1, width)[0] * 8).round() / 8  # ties
    row[0] = -0.0
    count = min(alternatives, width)
    found = rate_row(row, float(row.max()), count)
    assert found is not None
    assert found[0] == pytest.approx(float(torch.logsumexp(row.double(), 0)), abs=1e-6)
    order = torch.argsort(row, descending=True, stable=True)
    assert found[1] == order[:count].tolist()


def test_other_tensors_are_left_to_torch() -> None:
    wide = logits_of(2, 64).double()
    assert draw_tokens(wide, [0.0, 0.0], [Draw(0, 1, 1, 1.0, 0.0, 1.0, 0)]) is None
    assert rate_row(logits_of(2, 64).T[0], 0.0, 1) is None


def test_lists_of_unequal_lengths_are_refused() -> None:
    logits, few = logits_of(2, 100), np.zeros(1, dtype=np.int64)
    draw = Draw(0, 1, 0, 1.0, 0.0, 1.0, 0)
    for changes in (
        LogitChanges(np.arange(3), np.ones(2, dtype=np.float32), few, np.ones(1, dtype=np.int32)),
        LogitChanges(few, np.ones(1, dtype=np.float32), np.arange(3), np.ones(1, dtype=np.int32)),
    ):
        with pytest.raises(AssertionError, match="one number a token"):
            drawn(logits, [draw._replace(changes=changes)])
    with pytest.raises(AssertionError):
        draw_tokens(logits, [1.0], [draw])
