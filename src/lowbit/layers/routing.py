"""Routing: which experts a token goes to, and with what weight. Pure functions of float32 router logits.

Each takes (tokens, experts) logits and gives int64 (tokens, k) experts and float32 (tokens, k) weights; rows
do not see each other. Sources: Mixtral (Jiang et al., 2024), gpt-oss (OpenAI, 2025), DeepSeek-V2 and -V3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Route = Callable[[Tensor], tuple[Tensor, Tensor]]


def softmax_top_k(k: int, renormalize: bool, scale: float = 1.0) -> Route:
    """Probabilities over all experts, the k largest kept; ``renormalize``: they then sum to 1."""

    def route(logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = logits.softmax(-1).topk(k, dim=-1)
        if renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return chosen, weights * scale

    return route


def top_k_softmax(k: int) -> Route:
    """The k largest logits, softmax over these alone (gpt-oss)."""

    def route(logits: Tensor) -> tuple[Tensor, Tensor]:
        largest, chosen = logits.topk(k, dim=-1)
        return chosen, largest.softmax(-1)

    return route


def group_limited_softmax(k: int, groups: int, kept: int, renormalize: bool, scale: float) -> Route:
    """DeepSeek-V2: only the ``kept`` groups with the largest single probability take part."""

    def route(logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.softmax(-1)
        best = scores.unflatten(-1, (groups, -1)).amax(-1)  # (tokens, groups)
        weights, chosen = _within(scores, best, kept, 0.0).topk(k, dim=-1)
        if renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return chosen, weights * scale

    return route


def group_limited_sigmoid(
    k: int, groups: int, kept: int, renormalize: bool, scale: float, correction: Tensor
) -> Route:
    """DeepSeek-V3: sigmoid scores; a correction (experts,) helps to choose but is not in the weights.

    A group's score is the sum of its two best corrected scores.
    """

    def route(logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.sigmoid()
        corrected = scores + correction
        two = corrected.unflatten(-1, (groups, -1)).topk(2, dim=-1)[0].sum(-1)
        chosen = _within(corrected, two, kept, float("-inf")).topk(k, dim=-1)[1]
        weights = scores.gather(1, chosen)
        if renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * scale

    return route


def _within(scores: Tensor, group_scores: Tensor, kept: int, outside: float) -> Tensor:
    """Scores (tokens, experts) with ``outside`` in all groups but the ``kept`` best."""
    best = group_scores.topk(kept, dim=-1)[1]
    mask = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best, True)
    return scores.masked_fill(~mask.repeat_interleave(scores.shape[1] // mask.shape[1], 1), outside)
