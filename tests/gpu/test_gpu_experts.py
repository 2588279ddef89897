"""Experts on the device against their own layers one by one; sorting and summing against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.kernels.gpu.expert_rows import mix, most_blocks, sort_pairs


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def choices(tokens: int, experts: int, k: int, seed: int = 0) -> Tensor:
    return random(tokens, experts, seed=seed + tokens).argsort(-1)[:, :k].contiguous()


@pytest.mark.parametrize("tokens", [1, 3, 40, 700])
@pytest.mark.parametrize(("experts", "k"), [(7, 3), (1, 1), (64, 8)])
def test_pairs_lie_expert_by_expert_in_whole_blocks(
    tokens: int, experts: int, k: int, device: torch.device
) -> None:
    chosen = choices(tokens, experts, k)
    if experts == 7:
        chosen[:, 0] = 5  # one with many; with one token most have none
    sorted_ = sort_pairs(chosen.to(device), experts, 16)
    wanted_rows, wanted_experts = [], []
    for expert in range(experts):
        own = (chosen.flatten() == expert).nonzero().flatten().tolist()
        own += [tokens * k] * (-len(own) % 16)
        wanted_rows += own
        wanted_experts += [expert] * (len(own) // 16)
    used = len(wanted_experts)
    assert used <= sorted_.blocks == most_blocks(tokens * k, experts, 16)
    assert sorted_.experts.tolist() == wanted_experts + [-1] * (sorted_.blocks - used)
    assert sorted_.rows[: used * 16].tolist() == wanted_rows


def test_the_bound_on_blocks_is_reached_and_holds() -> None:
    assert most_blocks(8, 128, 16) == 8
    for pairs in range(1, 70):
        for experts in range(1, 9):
            # the worst: single pairs for all experts but one
            alone = min(pairs, experts) - 1
            assert alone + -(-(pairs - alone) // 16) <= most_blocks(pairs, experts, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_more", [False, True])
def test_a_tokens_experts_are_added_in_ascending_order(
    dtype: torch.dtype, with_more: bool, device: torch.device
) -> None:
    tokens, experts, k, hidden = 5, 9, 5, 1100
    chosen, weights = choices(tokens, experts, k), random(tokens, k, seed=1)
    y = (random(tokens * k, hidden, seed=2) * 1000).to(dtype)
    added = random(tokens, hidden + 4, seed=3).to(dtype)[:, 2 : hidden + 2] if with_more else None
    out = torch.full((tokens, hidden), torch.nan, dtype=dtype, device=device)
    mix(y.to(device), chosen.to(device), weights.to(device), None if added is None else added.to(device), out)
    wanted = torch.zeros(tokens, hidden)
    for token in range(tokens):
        for slot in chosen[token].argsort().tolist():
            wanted[token] += y[token * k + slot].float() * weights[token, slot]
    if added is not None:
        wanted += added.float()
    torch.testing.assert_close(out.cpu().float(), wanted.to(dtype).float(), rtol=1e-6, atol=1e-4)
