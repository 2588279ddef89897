"""Sampling: distributions, determinism, penalties, log-probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from engine.stand_in import ByteTokenizer
from lowbit.engine import sampler
from lowbit.engine.messages import Request, SamplingParams
from lowbit.engine.sampler import log_probabilities
from lowbit.engine.sequence import Sequence

SIZE = 50


def sequence(prompt: tuple[int, ...] = (1, 2), output: tuple[int, ...] = (), **options: object) -> Sequence:
    request = Request(id="x", prompt=prompt, sampling=SamplingParams(**options))
    made = Sequence.start(request, 1000, frozenset({3}), ByteTokenizer(), None)
    made.tokens += output
    return made


def sample(logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    """A token of each row."""
    likeliest = logits.argmax(dim=1).tolist()
    return [sampler.sample(*given) for given in zip(logits, sequences, likeliest, strict=True)]


def row(seed: int = 0) -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)) * 2


def draws(logits: torch.Tensor, count: int = 4000, **options: object) -> np.ndarray:
    """How often each token is drawn, one seed for each draw."""
    sequences = [sequence(seed=seed, **options) for seed in range(count)]
    tokens = sample(logits.expand(count, -1), sequences)
    return np.bincount(tokens, minlength=SIZE) / count


def close(found: np.ndarray, expected: torch.Tensor, count: int = 4000) -> None:
    """Five standard deviations for each token; what cannot be drawn is never drawn."""
    wanted = expected.numpy()
    spread = 5 * np.sqrt(wanted * (1 - wanted) / count) + np.where(wanted > 0, 3 / count, 0)  # rare ones
    assert (np.abs(found - wanted) <= spread).all()
    assert (found[wanted == 0] == 0).all()


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = torch.zeros(2, SIZE)
    logits[0, [7, 9]] = 4
    logits[1, 30] = 1
    assert sample(logits, [sequence(temperature=0.0)] * 2) == [7, 30]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_temperature(temperature: float) -> None:
    close(draws(row(), temperature=temperature), torch.softmax(row() / temperature, 0))


@pytest.mark.parametrize("top_k", [1, 3, 20, 1000])
def test_top_k(top_k: int) -> None:
    logits = row()
    kept = torch.full((SIZE,), -torch.inf)
    best = logits.topk(min(top_k, SIZE)).indices
    kept[best] = logits[best]
    close(draws(logits, top_k=top_k), torch.softmax(kept, 0))


def test_top_k_takes_the_lowest_of_equals() -> None:
    logits = torch.zeros(SIZE)
    logits[[40, 45]] = 1.0
    found = draws(logits, count=400, top_k=6)
    assert found.nonzero()[0].tolist() == [0, 1, 2, 3, 40, 45]


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
def test_top_p(top_p: float) -> None:
    probabilities = torch.softmax(row(), 0)
    values, ids = probabilities.sort(descending=True)
    count = int(((values.cumsum(0) - values) < top_p).sum())
    kept = torch.zeros(SIZE)
    kept[ids[:count]] = values[:count]
    close(draws(row(), top_p=top_p), kept / kept.sum())


def test_min_p() -> None:
    probabilities = torch.softmax(row(), 0)
    kept = torch.where(probabilities >= 0.2 * probabilities.max(), probabilities, 0)
    close(draws(row(), min_p=0.2), kept / kept.sum())


def test_seed_and_position_decide() -> None:
    logits = row().expand(1, -1)
    same = [sample(logits, [sequence(seed=5)])[0] for _ in range(3)]
    assert len(set(same)) == 1
    places = {sample(logits, [sequence(output=(4,) * n, seed=5)])[0] for n in range(40)}
    assert len(places) > 5
    # Neighbours change nothing, whatever they are.
    company = [sequence(seed=1, top_k=3), sequence(seed=5), sequence(temperature=0.0), sequence(top_p=0.3)]
    assert sample(row().expand(4, -1), company)[1] == same[0]
    assert sequence().seed != sequence().seed


def test_penalties() -> None:
    logits = torch.zeros(1, SIZE)
    logits[0, 10], logits[0, 11], logits[0, 12] = 3.0, 2.9, 2.0

    def best(**options: object) -> int:
        return sample(logits, [sequence(output=(10, 10, 11), temperature=0.0, **options)])[0]

    assert best() == 10
    assert best(frequency_penalty=0.2) == 11  # 3.0 - 0.4 < 2.9 - 0.2
    assert best(presence_penalty=0.5) == 10  # both were seen: 2.5 and 2.4
    assert best(presence_penalty=1.1) == 12  # 1.9 and 1.8 < 2.0
    assert best(repetition_penalty=2.0) == 12  # 1.5 and 1.45 < 2.0
    logits[0, 12] = -1
    assert sample(logits, [sequence((10, 11), temperature=0.0, repetition_penalty=9.0)])[0] == 10
    # Prompt tokens count for repetition only.
    assert sample(logits, [sequence((10,), temperature=0.0, presence_penalty=2.0)])[0] == 10


def test_bias_and_minimum_length() -> None:
    logits = torch.zeros(1, SIZE)
    logits[0, 3] = 9.0  # the stop token
    logits[0, 8] = 1.0
    assert sample(logits, [sequence(temperature=0.0, min_tokens=1)]) == [8]
    assert sample(logits, [sequence(output=(4,), temperature=0.0, min_tokens=1)]) == [3]
    assert sample(logits, [sequence(temperature=0.0, logit_bias={20: 100.0})]) == [20]
    assert sample(logits, [sequence(temperature=0.0, logit_bias={3: -100.0})]) == [8]


def test_log_probabilities() -> None:
    entry = log_probabilities(row(), 4, 5)
    expected = torch.log_softmax(row().double(), 0)
    assert entry.logprob == pytest.approx(float(expected[4]))
    assert [token for token, _ in entry.top] == expected.topk(5).indices.tolist()
    assert entry.top[0][1] == pytest.approx(float(expected.max()))
    tied = log_probabilities(torch.zeros(SIZE), 0, 4)
    assert len(tied.top) == 4 and tied.logprob == pytest.approx(-math.log(SIZE))
