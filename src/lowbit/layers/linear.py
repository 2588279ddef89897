"""Linear: y = x @ W.T + bias for a weight in any packed form, fused from parts where they are alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.kernels import PackedWeight


@dataclass(frozen=True)
class Part:
    """One stored module that makes up (a slice of the rows of) a Linear.

    ``name``: canonical module name. ``shape``: (out, in). ``rotary_heads``: how many heads its rows are
    rotated in (Q and K projections), so that containers with another rotary row order can be put right.
    ``bias``: whether the config promises one.
    """

    name: str
    shape: tuple[int, int]
    rotary_heads: int = 0
    bias: bool = False


class Linear:
    """A layer of one packed weight, or of several where the parts' schemes differ (GGUF mixes)."""

    def __init__(self, name: str, weights: list[PackedWeight], bias: Tensor | None) -> None:
        self.name = name
        self.weights = weights
        self.bias = bias

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x (tokens, in) -> (tokens, out)."""
        first, *rest = self.weights
        if not rest:
            y = first.kernel.linear(x, first, out)
        else:
            y = torch.cat([w.kernel.linear(x, w) for w in self.weights], dim=1)
        if self.bias is not None:
            y += self.bias
        return y

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        return sum(weight.nbytes for weight in self.weights)


class Embedding:
    """Token embedding and, where tied, the output head: the same packed weight read both ways."""

    def __init__(self, weight: PackedWeight, dtype: torch.dtype) -> None:
        self.weight = weight
        self.dtype = dtype

    def __call__(self, tokens: Tensor) -> Tensor:
        """int32 (tokens,) -> (tokens, hidden) in the activations' dtype."""
        return self.weight.kernel.rows(self.weight, tokens).to(self.dtype)

    def as_head(self) -> Linear:
        """The same matrix as a Linear of (vocabulary, hidden)."""
        return Linear("lm_head", [self.weight], None)
