"""Routing: which experts a token goes to, and with what weight. Pure functions of float32 router logits.

Each takes (tokens, experts) logits and gives int64 (tokens, k) experts and float32 (tokens, k) weights, the
best first; of equals the lower number is taken, NaN counts as the largest, and rows do not see each other.
Native code does it on a CPU, one Triton kernel on a GPU (``kernels.experts.route``). Sources: Mixtral (Jiang
et al., 2024), gpt-oss (OpenAI, 2025), DeepSeek-V2 and -V3 (both 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lowbit.kernels.experts import route


@dataclass(frozen=True, eq=False)
class Route:
    """One rule. Of ``groups`` groups of neighbours ``kept`` take part; ``correction``: float32 (experts,)."""

    rule: str  # kernels.experts.RULES
    k: int
    groups: int = 1
    kept: int = 1
    renormalize: bool = False
    scale: float = 1.0
    correction: Tensor | None = None

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen experts and their weights."""
        found = route(
            logits,
            self.rule,
            self.k,
            groups=self.groups,
            kept=self.kept,
            renormalize=self.renormalize,
            scale=self.scale,
            correction=self.correction,
        )
        return self.in_torch(logits) if found is None else found

    def in_torch(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The definition of a call, in torch on any device."""
        if self.rule == "top_k_softmax":
            largest, chosen = _largest(logits, self.k)
            return chosen, largest.softmax(-1)
        least = 0.0
        if self.rule == "group_sigmoid":
            assert self.correction is not None, "the rule has one"
            scores = _sigmoid(logits)
            corrected = scores + self.correction
            two = _largest(corrected.unflatten(-1, (self.groups, -1)), 2)[0].sum(-1)  # (tokens, groups)
            chosen = _largest(_within(corrected, two, self.kept, float("-inf")), self.k)[1]
            weights, least = scores.gather(1, chosen), 1e-20
        else:
            scores = logits.softmax(-1)
            if self.rule == "group_softmax":
                best = scores.unflatten(-1, (self.groups, -1)).amax(-1)  # (tokens, groups)
                scores = _within(scores, best, self.kept, 0.0)
            weights, chosen = _largest(scores, self.k)
        if self.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + least)
        return chosen, weights * self.scale


def softmax_top_k(k: int, renormalize: bool, scale: float = 1.0) -> Route:
    """Probabilities over all experts, the k largest kept; ``renormalize``: they then sum to 1."""
    return Route("softmax_top_k", k, renormalize=renormalize, scale=scale)


def top_k_softmax(k: int) -> Route:
    """The k largest logits, softmax over these alone (gpt-oss)."""
    return Route("top_k_softmax", k)


def group_limited_softmax(k: int, groups: int, kept: int, renormalize: bool, scale: float) -> Route:
    """DeepSeek-V2: only the ``kept`` groups with the largest single probability take part."""
    return Route("group_softmax", k, groups, kept, renormalize, scale)


def group_limited_sigmoid(
    k: int, groups: int, kept: int, renormalize: bool, scale: float, correction: Tensor
) -> Route:
    """DeepSeek-V3: sigmoid scores; a correction (experts,) helps to choose but is not in the weights.

    A group's score is the sum of its two best corrected scores.
    """
    return Route("group_sigmoid", k, groups, kept, renormalize, scale, correction)


_ALONE = torch.zeros(1)  # made here: a step that makes it cannot be recorded


@cache
def _alone(device: torch.device) -> Tensor:
    return _ALONE if device.type == "cpu" else _ALONE.to(device)


def sigmoid(logits: Tensor) -> Tensor:
    """float32 (tokens,): of logits (tokens, 1), as of the router of a single expert."""
    logits = logits.float()
    found = route(logits, "group_sigmoid", 1, correction=_alone(logits.device))
    return _sigmoid(logits).flatten() if found is None else found[1].flatten()


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
