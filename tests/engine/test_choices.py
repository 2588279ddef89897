"""Tokens chosen for all rows at once, as on a device, against the sampler that takes them row by row."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from engine.test_sampler import sequence
from lowbit.engine.choices import Ask, DeviceSampler, HostChoices
from lowbit.engine.sequence import Sequence
from lowbit.kernels.device_memory import _packed

SIZE = 300  # a vocabulary
CPU = torch.device("cpu")


def some_sampling(draw: random.Random) -> dict[str, object]:
    """Parameters of a request; each is at rest half the time."""
    options: dict[str, object] = {
        "temperature": draw.choice((0.0, 0.7, 1.0, 1.9)),
        "top_k": draw.choice((0, 0, 1, 5, 250, 1000)),
        "top_p": draw.choice((1.0, 1.0, 0.1, 0.8, 0.999)),
        "min_p": draw.choice((0.0, 0.0, 0.05, 0.6)),
        "repetition_penalty": draw.choice((1.0, 1.0, 1.3, 0.8)),
        "presence_penalty": draw.choice((0.0, 0.0, 0.9)),
        "frequency_penalty": draw.choice((0.0, 0.0, 0.4)),
        "min_tokens": draw.choice((0, 0, 3)),
        "logprobs": draw.choice((None, None, 0, 4)),
        "seed": draw.randrange(1 << 63),
    }
    if draw.random() < 0.3:
        options["logit_bias"] = {draw.randrange(SIZE): draw.uniform(-9, 9) for _ in range(3)} | {3: 5.0}
    return options


def asks_of(sequences: list[Sequence]) -> list[Ask]:
    return [Ask(row, chosen, len(chosen.tokens)) for row, chosen in enumerate(sequences)]


def test_every_row_is_what_the_sampler_takes() -> None:
    """Sixty steps of sequences that come and go; a few hundred different sets of parameters."""
    draw = random.Random(3)
    generator = torch.Generator().manual_seed(4)
    sampler = DeviceSampler(SIZE, CPU)
    running: list[Sequence] = []
    kinds = set()
    for _ in range(60):
        while len(running) < 9:
            prompt = tuple(draw.randrange(SIZE) for _ in range(draw.randint(1, 20)))
            running.append(sequence(prompt, **some_sampling(draw)))
        logits = torch.randn(len(running), SIZE, generator=generator) * draw.choice((0.2, 1, 4))
        if draw.random() < 0.3:
            logits = logits.round()  # ties
        before = logits.clone()
        host, device = HostChoices(logits), sampler.choose(logits, asks_of(running))
        assert torch.equal(logits, before), "raw logits are raw"
        for row, chosen in enumerate(running):
            sampling = chosen.sampling
            token = host.token(row, chosen)
            kinds.add((sampling.temperature > 0, sampling.top_k, sampling.top_p, sampling.min_p))
            assert device.token(row, chosen) == token == int(device.tokens[row]), sampling
            assert device.finite(row) and host.finite(row) and device.broken(row) == 0
            if sampling.logprobs is not None:
                found = device.logprob(row, token, sampling.logprobs)
                expected = host.logprob(row, token, sampling.logprobs)
                assert found.token == token and found.logprob == pytest.approx(expected.logprob, abs=1e-6)
                assert [t for t, _ in found.top] == [t for t, _ in expected.top]
                assert [p for _, p in found.top] == pytest.approx([p for _, p in expected.top], abs=1e-6)
            chosen.tokens.append(token)
            if chosen.said is not None:
                chosen.said.add(token)
        for chosen in [chosen for chosen in running if draw.random() < 0.15]:
            running.remove(chosen)
            sampler.forget(chosen)
    assert len(kinds) > 35
    assert len(sampler._lists.table) <= 16, "slots are used again"


def test_a_row_that_is_not_finite_stays_alone() -> None:
    sequences = [sequence(temperature=1.0, seed=1, top_p=0.9), sequence(temperature=0.0), sequence(seed=2)]
    logits = torch.randn(3, SIZE, generator=torch.Generator().manual_seed(1))
    expected = [HostChoices(logits).token(row, sequences[row]) for row in (0, 2)]
    logits[1, 5:8] = math.nan
    logits[1, 9] = math.inf
    found = DeviceSampler(SIZE, CPU).choose(logits, asks_of(sequences))
    assert [found.finite(row) for row in range(3)] == [True, False, True]
    assert found.broken(1) == 4
    assert [found.token(row, sequences[row]) for row in (0, 2)] == expected
    assert 0 <= int(found.tokens[1]) < SIZE, "the next step looks its embedding up"
    for bad in (math.nan, math.inf, -math.inf):
        everything = torch.full((3, SIZE), bad)
        tokens = DeviceSampler(SIZE, CPU).choose(everything, asks_of(sequences)).tokens
        assert bool(((tokens >= 0) & (tokens < SIZE)).all())


def test_prompt_rows_are_rated_for_their_targets() -> None:
    rated = sequence((7, 8, 9), prompt_logprobs=2)
    logits = torch.randn(3, SIZE, generator=torch.Generator().manual_seed(1))
    asks = [Ask(0, rated, 1, 8), Ask(1, rated, 2, 9), Ask(2, rated, 3)]
    found = DeviceSampler(SIZE, CPU).choose(logits, asks)
    for row, target in ((0, 8), (1, 9)):
        expected = HostChoices(logits).logprob(row, target, 2)
        entry = found.logprob(row, target, 2)
        assert entry.logprob == pytest.approx(expected.logprob) and entry.token == target
        assert [token for token, _ in entry.top] == [token for token, _ in expected.top]


def test_a_step_without_rows() -> None:
    found = DeviceSampler(SIZE, CPU).choose(torch.zeros(0, SIZE), [])
    assert len(found.tokens) == 0


def test_many_arrays_go_in_one_copy() -> None:
    arrays = [np.arange(n, dtype=np.int32).reshape(shape) for n, shape in ((5, (5,)), (0, (0,)), (6, (2, 3)))]
    packed, places = _packed(arrays)
    assert [place % 4 for place in places] == [0, 0, 0], "16 bytes"
    for place, array in zip(places, arrays, strict=True):
        assert (packed[place : place + array.size].reshape(array.shape) == array).all()
