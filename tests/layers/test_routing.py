"""Routing against the routers of transformers, and its own laws: ties, rows that do not see each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from lowbit.layers.routing import (
    Route,
    group_limited_sigmoid,
    group_limited_softmax,
    softmax_top_k,
    top_k_softmax,
)

EXPERTS = 24
SIZES = {"hidden_size": EXPERTS, "num_attention_heads": 4, "num_experts_per_tok": 5}
V2 = {**SIZES, "n_routed_experts": EXPERTS, "routed_scaling_factor": 16.0}
V3 = {**SIZES, "n_routed_experts": EXPERTS, "routed_scaling_factor": 2.5}
CORRECTION = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(9)) * 0.3
# The route, and transformers' router with its config.
CASES: dict[str, tuple[Route, Any, Any]] = {
    "Mixtral": (
        softmax_top_k(5, renormalize=True),
        MixtralTopKRouter,
        transformers.MixtralConfig(**SIZES, num_local_experts=EXPERTS),
    ),
    "Qwen3-MoE without renormalizing": (
        softmax_top_k(5, renormalize=False),
        Qwen3MoeTopKRouter,
        transformers.Qwen3MoeConfig(**SIZES, num_experts=EXPERTS, norm_topk_prob=False),
    ),
    "gpt-oss": (
        top_k_softmax(5),
        GptOssTopKRouter,
        transformers.GptOssConfig(**SIZES, num_local_experts=EXPERTS),
    ),
    "DeepSeek-V2-Lite": (
        softmax_top_k(5, renormalize=False, scale=16.0),
        DeepseekV2TopkRouter,
        transformers.DeepseekV2Config(**V2, topk_method="greedy"),
    ),
    "DeepSeek-V2": (
        group_limited_softmax(5, 8, 3, renormalize=False, scale=16.0),
        DeepseekV2TopkRouter,
        transformers.DeepseekV2Config(**V2, topk_method="group_limited_greedy", n_group=8, topk_group=3),
    ),
    "DeepSeek-V3": (
        group_limited_sigmoid(5, 8, 4, True, 2.5, CORRECTION),
        DeepseekV3TopkRouter,
        transformers.DeepseekV3Config(**V3, n_group=8, topk_group=4),
    ),
    "DeepSeek-V3 without renormalizing, one group": (
        group_limited_sigmoid(5, 1, 1, False, 2.5, CORRECTION),
        DeepseekV3TopkRouter,
        transformers.DeepseekV3Config(**V3, n_group=1, topk_group=1, norm_topk_prob=False),
    ),
}


def draw(rows: int) -> Tensor:
    return torch.randn(rows, EXPERTS, generator=torch.Generator().manual_seed(rows)) * 2


def spread(chosen: Tensor, weights: Tensor) -> Tensor:
    """(tokens, experts): every expert's weight, 0 where it was not chosen."""
    return torch.zeros(len(chosen), EXPERTS).scatter_(1, chosen, weights)


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str) -> None:
    route, router_class, config = CASES[case]
    router = router_class(config)
    with torch.no_grad():
        router.weight.copy_(torch.eye(EXPERTS))  # so that the logits are the input
        if hasattr(router, "e_score_correction_bias"):
            router.e_score_correction_bias.copy_(CORRECTION)
        logits = draw(500)
        _, weights, chosen = router(logits)
    mine, given = route(logits)
    assert (
        mine.dtype is torch.int64 and given.dtype is torch.float32 and mine.shape == given.shape == (500, 5)
    )
    found, wanted = spread(mine, given), spread(chosen, weights)
    assert (found > 0).equal(wanted > 0)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_rows_do_not_see_each_other(case: str) -> None:
    route, _, _ = CASES[case]
    logits = draw(300)
    chosen, weights = route(logits)
    for first, end in (*((row, row + 1) for row in range(200)), (0, 7), (9, 70), (13, 300)):
        alone, given = route(logits[first:end].clone())
        assert alone.equal(chosen[first:end])
        assert given.view(torch.int32).equal(weights[first:end].view(torch.int32))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["normal", "large", "ties", "level"])
def test_native_code_chooses_as_torch_does(case: str, kind: str) -> None:
    route, _, _ = CASES[case]
    logits = draw(400)
    if kind == "large":
        logits *= 40
    elif kind == "ties":
        logits = (logits * 2).round() / 2
    elif kind == "level":
        logits = torch.zeros(3, EXPERTS)
    for factor in (1.0, -1.0):
        chosen, weights = route(logits * factor)
        wanted, given = route.in_torch(logits * factor)
        # Exponentials below 2^-126 are 0 in native code: then others tie for the last places, without weight.
        torch.testing.assert_close(spread(chosen, weights), spread(wanted, given), rtol=2e-6, atol=1e-36)
        if kind != "large":
            assert torch.equal(chosen, wanted)


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_finite_stays_in_its_row(case: str) -> None:
    route, _, _ = CASES[case]
    logits = draw(8)
    clean_chosen, clean_weights = route(logits)
    logits[0, 7], logits[1, 20], logits[2] = torch.nan, torch.inf, torch.nan
    logits[3], logits[4, 3] = -torch.inf, -torch.inf
    logits[5, [1, 22]] = torch.nan
    for chosen, weights in (route(logits), route.in_torch(logits)):
        assert torch.equal(chosen[6:], clean_chosen[6:])
        torch.testing.assert_close(weights[6:], clean_weights[6:])
        assert (chosen >= 0).all() and (chosen < EXPERTS).all()
        assert all(len(set(row)) == 5 for row in chosen.tolist())
        assert weights[4].isfinite().all()
        assert weights[[0, 2, 5]].isnan().any(1).all()
    assert torch.equal(route(logits)[0][:6], route.in_torch(logits)[0][:6])
    assert torch.equal(route(logits)[1].isnan(), route.in_torch(logits)[1].isnan())


def test_of_equals_the_lower_number() -> None:
    level = torch.zeros(3, EXPERTS)
    for route in (
        softmax_top_k(5, True),
        top_k_softmax(5),
        group_limited_softmax(5, 8, 3, True, 1.0),
        group_limited_sigmoid(5, 8, 3, True, 1.0, torch.zeros(EXPERTS)),
    ):
        chosen, weights = route(level)
        assert chosen.tolist() == [[0, 1, 2, 3, 4]] * 3
        torch.testing.assert_close(weights, torch.full((3, 5), 0.2))
    # Sigmoids that have saturated are equal too.
    saturated = torch.zeros(1, EXPERTS)
    saturated[0, [3, 20, 7]] = torch.tensor([50.0, 60.0, 70.0])
    chosen, _ = group_limited_sigmoid(3, 1, 1, True, 1.0, torch.zeros(EXPERTS))(saturated)
    assert chosen.tolist() == [[3, 7, 20]]


def test_a_correction_chooses_and_does_not_weigh() -> None:
    logits, correction = torch.zeros(1, EXPERTS), torch.zeros(EXPERTS)
    logits[0, 2] = 1.0
    correction[[13, 22]] = 5.0
    chosen, weights = group_limited_sigmoid(3, 1, 1, False, 1.0, correction)(logits)
    assert chosen.tolist() == [[13, 22, 2]]
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.5, 0.7310586]]))


def test_a_group_counts_by_its_best_or_its_two_best() -> None:
    """One strong expert wins V2's group, two good ones win V3's."""
    logits = torch.full((1, EXPERTS), -9.0)
    logits[0, 1], logits[0, [12, 13]] = 2.0, 1.5  # groups 0 and 1 of two
    assert group_limited_softmax(1, 2, 1, True, 1.0)(logits)[0].tolist() == [[1]]
    assert group_limited_sigmoid(1, 2, 1, True, 1.0, torch.zeros(EXPERTS))(logits)[0].tolist() == [[12]]


def test_experts_outside_the_groups_are_not_chosen_below_negative_ones() -> None:
    """Corrections may push scores below zero; what is outside stays out."""
    logits = torch.zeros(1, EXPERTS)
    correction = torch.full((EXPERTS,), -3.0)
    correction[12:] = -2.0
    chosen, _ = group_limited_sigmoid(6, 2, 1, True, 1.0, correction)(logits)
    assert chosen.tolist() == [[12, 13, 14, 15, 16, 17]]
