"""Penalties and biases on the device against the engine's sampler: the same numbers, and logits put back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.test_sampler import sequence
from lowbit.engine import sampler
from lowbit.engine.choices import Ask, DeviceSampler
from lowbit.engine.sequence import Sequence
from lowbit.kernels.gpu import penalties, runtime
from lowbit.kernels.token_lists import PROMPT, Changes, TokenLists

SIZE = 300


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists and biases of several blocks."""
    monkeypatch.setattr(penalties, "_BLOCK", 16)


def logits_of(rows: int, device: torch.device) -> Tensor:
    """Inside a matrix that is otherwise NaN."""
    values = torch.randn(rows, SIZE, generator=torch.Generator().manual_seed(rows)) * 3
    return torch.full((rows, SIZE + 7), torch.nan, device=device)[:, :SIZE].copy_(values)


def defined(logits: Tensor, biases: dict[int, float], spoken: Sequence | None) -> Tensor:
    """By the host's sampler."""
    changed = logits.cpu().clone()
    for token, bias in biases.items():
        changed[token] += bias
    if spoken is not None:
        changes = sampler._changes(spoken, len(spoken.tokens), SIZE)
        assert len(changes.biased) == 0
        changed = sampler._changed(changed, changes)
    return changed


def spoken(output: list[int], prompt: tuple[int, ...], **sampling: Any) -> Sequence:
    made = sequence(prompt, **sampling)
    made.tokens.extend(output)
    return made


LONG = [(7 * n * n + n) % 250 for n in range(60)]  # many tokens more than once
PENALTIES: list[dict[str, float]] = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7, "presence_penalty": 0.9},
    {"frequency_penalty": 0.41},
    {"frequency_penalty": -0.3, "presence_penalty": -0.2, "repetition_penalty": 1.1},
]


def test_changes_are_those_of_the_host_and_are_undone(device: torch.device) -> None:
    """Rows of all kinds among rows without any, biases of tokens that were said and of others."""
    lists = TokenLists(SIZE, device)
    logits = logits_of(9, device)
    before = logits.clone()
    changes, wanted = Changes(), before.cpu().clone()
    for row, numbers in enumerate(PENALTIES, 2):
        said = spoken(LONG[: 15 * row], tuple(range(40, 40 + 3 * row)), **numbers)
        biases = {token: token / 60 - 2 for token in (LONG[0], 41, 299, *range(120, 120 + row % 2 * 40))}
        biases |= {LONG[1]: -math.inf}
        slot = lists.open(said.request.prompt, said.tokens[said.prompt_length :])
        sampling = said.sampling
        three = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        changes.add(row, biases if row != 4 else {}, slot, three)
        wanted[row] = defined(before[row], biases if row != 4 else {}, said)
    changes.add(8, {0: 2.5, 299: -3.0})
    wanted[8] = defined(before[8], {0: 2.5, 299: -3.0}, None)
    with lists.applied(changes, logits) as changed:
        assert changed is logits
        torch.testing.assert_close(changed.cpu(), wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(logits, before)
    base = logits._base
    assert base is not None and base[:, SIZE:].isnan().all()


def test_biases_alone(device: torch.device) -> None:
    logits = logits_of(2, device)
    before, changes = logits.clone(), Changes()
    changes.add(1, {5: 1.5, 250: -math.inf})
    with TokenLists(SIZE, device).applied(changes, logits) as changed:
        assert torch.equal(changed[0], before[0])
        assert changed[1, 5] == before[1, 5] + 1.5 and changed[1, 250] == -math.inf
        assert int((changed != before).sum()) == 2
    assert torch.equal(logits, before)


def test_lists_follow_what_is_chosen(device: torch.device) -> None:
    """Said for the first time, again, and by the prompt; slots of ended sequences begin anew."""
    lists = TokenLists(SIZE, device)
    old = lists.open((1, 2), [3] * 40)
    lists.free(old)
    slots = [lists.open((7, 8), [9, 9, 8]), lists.open((4,), [])]
    assert slots[0] == old
    for chosen in ([9, 5], [10, 5], [7, 4]):
        tokens = torch.tensor([0, chosen[1], 299, chosen[0]], device=device)
        lists.note(tokens, [3, 1], slots)
    tables = [{7: PROMPT + 1, 8: PROMPT + 1, 9: 3, 10: 1}, {4: PROMPT + 1, 5: 2}]
    for slot, table in zip(slots, tables, strict=True):
        row = lists.table[slot].cpu()
        assert {int(token): int(row[token]) for token in row.nonzero()[:, 0]} == table
        length = int(lists.lengths[slot])
        assert sorted(lists.ids[slot, :length].tolist()) == sorted(table)
        assert lists._longest[slot] >= length


def test_more_slots_keep_the_first(device: torch.device) -> None:
    lists = TokenLists(SIZE, device)
    slots = [lists.open((n,), [n, n + 1]) for n in range(9)]
    assert len(set(slots)) == 9
    for n, slot in enumerate(slots):
        assert lists.table[slot, n] == PROMPT + 1 and lists.table[slot, n + 1] == 1
        assert sorted(lists.ids[slot, : int(lists.lengths[slot])].tolist()) == [n, n + 1]


def test_what_a_step_launches(device: torch.device) -> None:
    """Nothing over a vocabulary but the sampler's own passes; rated logits are as they were."""
    asked = [
        spoken([5, 6], (1, 2), temperature=0.0, repetition_penalty=1.2, logprobs=3),
        spoken([5], (1, 2), temperature=0.0, logit_bias={7: 50.0}, logprobs=0),
        spoken([], (3,), temperature=0.0),
    ]
    logits = logits_of(3, device)
    device_sampler = DeviceSampler(SIZE, device)
    asks = [Ask(row, one, len(one.tokens)) for row, one in enumerate(asked)]
    with runtime.recording() as launches:
        found = device_sampler.choose(logits, asks)
    if runtime._recorded is not None:
        runtime._recorded.extend(launches)
    surveyed = ["_peaks", "_row_peaks"]
    rated = ["_best_of_chunks", "_rate", "note"]
    assert [one.function for one in launches] == [*surveyed, "adjust", *surveyed, "adjust", *rated]
    assert found.token(1, asked[1]) == 7
    wanted = sampler.log_probabilities(logits[1].cpu(), 7, 0)
    assert found.logprob(1, 7, 0).logprob == pytest.approx(wanted.logprob, abs=2e-6)
    assert found.token(2, asked[2]) == int(logits[2].argmax())
