"""Routing on the device against its definition in torch: ties, NaN, infinities, groups of odd sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.layers.routing import (
    Route,
    group_limited_sigmoid,
    group_limited_softmax,
    sigmoid,
    softmax_top_k,
    top_k_softmax,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# By name: experts and the rule.
ROUTES: dict[str, tuple[int, Route]] = {
    "Mixtral": (8, softmax_top_k(2, renormalize=True)),
    "Qwen3-MoE, scaled": (60, softmax_top_k(8, renormalize=False, scale=16.0)),
    "gpt-oss": (32, top_k_softmax(4)),
    "all experts": (3, top_k_softmax(3)),
    "DeepSeek-V2": (60, group_limited_softmax(6, 6, 2, renormalize=True, scale=16.0)),
    "DeepSeek-V3": (64, group_limited_sigmoid(8, 8, 4, True, 2.5, random(64, seed=9) * 0.3)),
    "one group": (48, group_limited_sigmoid(5, 1, 1, False, 2.5, random(48, seed=8) * 0.3)),
    "a single expert": (1, softmax_top_k(1, renormalize=True)),
}


@pytest.mark.parametrize("name", ROUTES)
def test_equals_the_definition(name: str, device: torch.device) -> None:
    experts, route = ROUTES[name]
    if route.correction is not None:
        route = Route(
            route.rule,
            route.k,
            route.groups,
            route.kept,
            route.renormalize,
            route.scale,
            route.correction.to(device),
        )
    logits = random(9, experts + 3, seed=experts)[:, :experts].to(device) * 3
    logits[1] = 0.5  # all equal
    logits[2] = logits[2].round()  # some equal
    logits[3, experts // 2] = torch.nan
    logits[4, 0] = -0.0
    logits[4, -1] = 0.0
    logits[5, experts // 3] = torch.inf
    logits[6, 0] = -torch.inf
    logits[7] = -torch.inf
    found, wanted = route(logits), route.in_torch(logits)
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], rtol=2e-6, atol=1e-30, equal_nan=True)
    assert found[0].dtype is torch.int64 and found[1].dtype is torch.float32
    assert found[1][0].isfinite().all() and (found[1][0] > 0).all()
    assert route(logits[:0])[0].shape == (0, route.k)


def test_sigmoid_of_a_shared_gate(device: torch.device) -> None:
    logits = torch.tensor([[-200.0], [-3.0], [0.0], [2.5], [90.0]], device=device)
    torch.testing.assert_close(sigmoid(logits), torch.sigmoid(logits[:, 0]), rtol=2e-6, atol=1e-38)
    assert sigmoid(logits.bfloat16()).dtype is torch.float32
