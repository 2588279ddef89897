"""Sampling on the device against the engine's sampler: the same logits and numbers, the same tokens."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.stand_in import ByteTokenizer
from lowbit.engine import sampler
from lowbit.engine.messages import Request, SamplingParams
from lowbit.engine.sequence import Sequence
from lowbit.kernels.gpu import ratings, runtime, sampling
from lowbit.kernels.gpu.ratings import log_probabilities
from lowbit.kernels.gpu.sampling import sample_rows, survey
from lowbit.kernels.row_peaks import row_peaks as peaks_on_cpu

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
NEAR = 1e-6  # a uniform number so close to a border between two tokens may give either


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several chunks, and few candidates."""
    monkeypatch.setattr(sampling, "CHUNK", 256)
    monkeypatch.setattr(sampling, "CANDIDATES", 64)


class Drawn:
    """Stands for numpy's generator."""

    def __init__(self, number: float) -> None:
        self.number = number

    def random(self) -> float:
        return self.number


def defined(logits: Tensor, options: dict[str, float], uniform: float) -> int:
    """The engine's token of one row, as torch draws it."""
    if options["temperature"] == 0:
        return int(logits.argmax())
    request = Request(id="x", prompt=(1,), sampling=SamplingParams(**options))
    sequence = Sequence.start(request, 1000, frozenset({3}), ByteTokenizer(), None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "Generator", lambda _: Drawn(uniform))
        patch.setattr(sampler, "draw_tokens", lambda *_: None)
        return sampler.sample(logits, sequence, -1)


def sampled(logits: Tensor, options: list[dict[str, float]], uniform: list[float]) -> list[int]:
    def each(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([one[name] for one in options], dtype=dtype, device=logits.device)

    found = sample_rows(
        logits,
        each("temperature", torch.float32),
        each("top_k", torch.int32),
        each("top_p", torch.float64),
        each("min_p", torch.float64),
        torch.tensor(uniform, dtype=torch.float64, device=logits.device),
    )
    assert found.dtype is torch.int64
    return found.tolist()


def check(logits: Tensor, options: list[dict[str, float]], uniform: list[float]) -> list[int]:
    """The engine's tokens, or its tokens of numbers next to the uniform ones."""
    found = sampled(logits, options, uniform)
    for row, (token, option, number) in enumerate(zip(found, options, uniform, strict=True)):
        numbers = (number, max(number - NEAR, 0.0), min(number + NEAR, 1 - 2.0**-53))
        wanted = [defined(logits[row].cpu(), option, one) for one in numbers]
        assert token in wanted, (row, option, number, token, wanted)
    return found


def rows(count: int, width: int, spread: float, device: torch.device, seed: int = 0) -> Tensor:
    """Logits in a wider matrix full of NaN."""
    values = torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * spread
    inside = torch.full((count, width + 5), torch.nan, device=device)[:, :width]
    return inside.copy_(values)


def numbers(count: int, seed: int = 1) -> list[float]:
    return np.random.default_rng(seed).random(count).tolist()


MIXED: list[dict[str, float]] = [
    OFF,
    OFF | {"temperature": 0.0},
    OFF | {"temperature": 0.6},
    OFF | {"min_p": 0.05},
    OFF | {"top_k": 1},
    OFF | {"top_k": 20, "top_p": 0.8, "temperature": 0.7},
    OFF | {"top_p": 0.95},
    OFF | {"top_p": 0.5, "min_p": 0.1},
    OFF | {"top_k": 5, "min_p": 0.02},
    OFF | {"top_p": 1e-9},
    OFF | {"top_k": 100_000, "top_p": 0.9},
    OFF | {"top_k": -1, "temperature": 1e-6},
]


@pytest.mark.parametrize(("width", "spread"), [(1, 1.0), (127, 3.0), (700, 4.0)])
def test_rows_with_settings_of_their_own(width: int, spread: float, device: torch.device) -> None:
    logits = rows(len(MIXED), width, spread, device)
    check(logits, MIXED, numbers(len(MIXED)))


SLOW = (pytest.mark.slow, pytest.mark.timeout(3600))
WIDE: list[dict[str, float]] = [
    OFF | {"top_k": 200, "top_p": 0.903},
    OFF | {"top_k": 150},
    OFF | {"top_p": 0.971},
    OFF | {"top_p": 0.903, "min_p": 0.3},
    OFF | {"top_k": 299, "min_p": 0.5},
    OFF | {"top_p": 0.903, "temperature": 3.0},
]


def test_all_tokens_are_equal_and_more_than_candidates(device: torch.device) -> None:
    """Only ids decide."""
    check(rows(1, 300, 0.0, device), WIDE[:1], [0.7])


@pytest.mark.parametrize("count", [2, pytest.param(len(WIDE), marks=SLOW)])
def test_more_tokens_than_candidates(count: int, device: torch.device) -> None:
    """Flat distributions."""
    for spread in (0.3,) if count == 2 else (0.3, 1.0, 2.0):
        check(rows(count, 300, spread, device), WIDE[:count], numbers(count, 2))


@pytest.mark.parametrize("options", [{"top_k": 6}, {"top_p": 0.7}, {"top_k": 100, "top_p": 0.8}, {}])
def test_equal_tokens_stay_in_the_order_of_their_ids(options: dict[str, float], device: torch.device) -> None:
    """Logits in steps of a half, zero of both signs among them: groups of equals cross every border."""
    logits = (rows(1, 260, 1.5, device) * 2).round() / 2
    logits[0, ::7] *= -1.0
    draws = [1 - 2.0**-53, 0.4] if options.get("top_k") == 100 else [0.0, 1 - 2.0**-53, *numbers(6)]
    found = check(logits.expand(len(draws), -1), [OFF | options] * len(draws), draws)
    assert len(set(found)) >= min(len(draws), 3)


def test_a_token_that_is_forbidden_is_never_drawn(device: torch.device) -> None:
    logits = rows(4, 300, 1.0, device)
    logits[:, 150:] = -math.inf
    logits[:, 0] = -math.inf
    options = [OFF, OFF | {"top_k": 40}, OFF | {"top_p": 0.5}, OFF | {"min_p": 0.01}]
    for number in (0.0, 1 - 2.0**-53):
        found = check(logits, options, [number] * 4)
        assert all(0 < token < 150 for token in found)
    assert 0 < check(logits[:1], [OFF | {"top_k": 200}], [1 - 2.0**-53])[0] < 150


def test_a_row_has_its_token_in_any_company(device: torch.device) -> None:
    logits, uniform = rows(len(MIXED), 400, 2.0, device), numbers(len(MIXED))
    together = sampled(logits, MIXED, uniform)
    for row in (0, 5):
        chosen = slice(row, row + 1)
        assert sampled(logits[chosen], MIXED[chosen], uniform[chosen]) == together[chosen]


def test_nothing_is_read_or_left_from_before(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch memory that holds anything gives the same tokens."""
    options = MIXED[:6]
    logits, uniform = rows(len(options), 300, 4.0, device), numbers(len(options))
    wanted = sampled(logits, options, uniform)
    empty = torch.empty

    def filled(*shape: Any, **options: Any) -> Tensor:
        made = empty(*shape, **options)
        return made.fill_(torch.nan if made.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", filled)
    assert sampled(logits, options, uniform) == wanted


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("width", [1, 300])
def test_peaks(width: int, device: torch.device) -> None:
    logits = rows(6, width, 1.0, device)
    logits[1] = logits[1].max()  # all equal
    logits[2, width // 2] = math.inf
    logits[3] = -math.inf
    logits[4, width // 3] = math.nan
    logits[5, : width // 2] = -math.inf
    found = survey(logits, sums=True)
    values, places = found.values, found.ids
    expected, at = peaks_on_cpu(logits.cpu())
    assert values.cpu().equal(torch.tensor(expected)) or values[4].isnan()
    good = [0, 1, 2, 3, 5]
    assert values.cpu()[good].tolist() == [expected[row] for row in good]
    assert values[4].isnan() and math.isnan(expected[4])
    assert [places.tolist()[row] for row in good] == [at[row] for row in good]
    assert found.broken.tolist() == (~torch.isfinite(logits)).sum(1).tolist()
    tokens = sampled(logits, [OFF | {"top_k": 3}] + [OFF] * 5, [0.5] * 6)
    assert all(0 <= token < width for token in tokens)


def test_real_sizes(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks and a bit, 1,024 candidates, and a row for which they are too few."""
    monkeypatch.undo()
    assert (sampling.CHUNK, sampling.CANDIDATES) == (2048, 1024)
    options = [OFF | {"top_k": 50, "top_p": 0.9}, OFF | {"top_p": 0.95}, OFF]
    check(rows(3, 4500, 3.0, device), options, numbers(3))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(6))
def test_many_rows(seed: int, device: torch.device) -> None:
    random = np.random.default_rng(seed)
    options = [
        {
            "temperature": float(random.choice([0.0, 0.3, 1.0, 1.5])),
            "top_k": int(random.choice([0, 1, 10, 40, 90])),
            "top_p": float(random.choice([1.0, 0.95, 0.8, 0.3])),
            "min_p": float(random.choice([0.0, 0.0, 0.05, 0.2])),
        }
        for _ in range(12)
    ]
    check(rows(12, 517, float(random.uniform(0.2, 6)), device, seed), options, numbers(12, seed))


@pytest.mark.parametrize("most", [1 << 14, 8])
def test_log_probabilities(most: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of some rows, for tokens that were asked for or chosen; also of more alternatives than kernels hold."""
    monkeypatch.setattr(ratings, "_MOST_CANDIDATES", most)
    logits = (rows(4, 300, 2.0, device) * 2).round() / 2  # equals
    logits[0, :40] = -math.inf
    logits[3, 290:] *= -0.0
    before = logits.clone()
    asked = torch.tensor([3, 0, 2], dtype=torch.int32, device=device)
    targets = torch.tensor([0, -1, 17], dtype=torch.int32, device=device)
    tokens = torch.tensor([299, -7, -7, -7], device=device)
    for count in (0, 7, 40) if most > 8 else (7,):
        chosen, ids, values = log_probabilities(
            logits, survey(logits, sums=True), asked, targets, tokens, count
        )
        assert ids.shape == values.shape == (3, count) and chosen.dtype is torch.float64
        for place, (row, token) in enumerate(((3, 0), (0, 299), (2, 17))):
            wanted = sampler.log_probabilities(logits[row].cpu(), token, 300)
            assert chosen[place].item() == pytest.approx(wanted.logprob, abs=2e-6)
            best = wanted.top[:count]
            assert ids[place].tolist() == [token for token, _ in best]
            assert values[place].tolist() == pytest.approx([value for _, value in best], abs=2e-6)
    assert torch.equal(logits, before)


def test_no_more_alternatives_than_tokens(device: torch.device) -> None:
    logits = rows(1, 5, 2.0, device)
    numbers = [torch.tensor([value], dtype=torch.int32, device=device) for value in (0, 3)]
    found = survey(logits, sums=True)
    _, ids, _ = log_probabilities(logits, found, *numbers, found.ids, 9)
    assert ids[0].tolist() == logits[0].argsort(descending=True).tolist()


def test_log_probabilities_of_large_and_broken_logits(device: torch.device) -> None:
    """Sums relative to each chunk's largest; a row that is not finite rates no other."""
    logits = rows(3, 700, 3.0, device)
    logits[:, 600] += 3e4
    logits[1, 300] = math.nan
    numbers = [torch.tensor(values, dtype=torch.int32, device=device) for values in ([0, 1, 2], [600, 5, 3])]
    tokens = torch.zeros(3, dtype=torch.int64, device=device)
    chosen, ids, _ = log_probabilities(logits, survey(logits, sums=True), *numbers, tokens, 2)
    for row, token in ((0, 600), (2, 3)):
        wanted = sampler.log_probabilities(logits[row].cpu(), token, 2)
        assert chosen[row].item() == pytest.approx(wanted.logprob, rel=1e-7, abs=1e-9)
        assert ids[row].tolist() == [best for best, _ in wanted.top]


def test_no_rows_launch_nothing(device: torch.device) -> None:
    logits = torch.empty(0, 10, device=device)
    with runtime.recording() as launches:
        assert sampled(logits, [], []) == []
        assert len(survey(logits).ids) == 0
    assert not launches
