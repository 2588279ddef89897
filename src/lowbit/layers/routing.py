"""Routing: which experts a token goes to, and with what weight. Pure functions of float32 router logits.

Each takes (tokens, experts) logits and gives int64 (tokens, k) experts and float32 (tokens, k) weights, the
best first; of equals the lower number is taken, and rows do not see each other. Sources: Mixtral (Jiang et
al., 2024), gpt-oss (OpenAI, 2025), DeepSeek-V2 and -V3 (both 2024).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Route = Callable[[Tensor], tuple[Tensor, Tensor]]


def softmax_top_k(k: int, renormalize: bool, scale: float = 1.0) -> Route:
    """Probabilities over all experts, the k largest kept; ``renormalize``: they then sum to 1."""

    def route(logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = _largest(logits.softmax(-1), k)
        if renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return chosen, weights * scale

    return route


def top_k_softmax(k: int) -> Route:
    """The k largest logits, softmax over these alone (gpt-oss)."""

    def route(logits: Tensor) -> tuple[Tensor, Tensor]:
        largest, chosen = _largest(logits, k)
        return chosen, largest.softmax(-1)

    return route


def group_limited_softmax(k: int, groups: int, kept: int, renormalize: bool, scale: float) -> Route:
    """DeepSeek-V2: only the ``kept`` groups with the largest single probability take part."""

    def route(logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.softmax(-1)
        best = scores.unflatten(-1, (groups, -1)).amax(-1)  # (tokens, groups)
        weights, chosen = _largest(_within(scores, best, kept, 0.0), k)
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
        scores = _sigmoid(logits)
        corrected = scores + correction
        two = _largest(corrected.unflatten(-1, (groups, -1)), 2)[0].sum(-1)  # (tokens, groups)
        chosen = _largest(_within(corrected, two, kept, float("-inf")), k)[1]
        weights = scores.gather(1, chosen)
        if renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * scale

    return route


def _sigmoid(x: Tensor) -> Tensor:
    """As a softmax over x and 0: bits of ``torch.sigmoid`` depend on how many elements it is given.

    The last few of a run go through another exponential there.
    """
    return torch.stack((x, torch.zeros_like(x)), -1).softmax(-1)[..., 0]


def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of the last axis and where they are. ``topk`` leaves open which of equals it takes."""
    ordered, places = scores.sort(dim=-1, descending=True, stable=True)
    return ordered[..., :k], places[..., :k]


def _within(scores: Tensor, group_scores: Tensor, kept: int, outside: float) -> Tensor:
    """Scores (tokens, experts) with ``outside`` in all groups but the ``kept`` best."""
    best = _largest(group_scores, kept)[1]
    mask = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best, True)
    return scores.masked_fill(~mask.repeat_interleave(scores.shape[1] // mask.shape[1], 1), outside)
