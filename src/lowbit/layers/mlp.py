"""The feed-forward half of a block: an MLP, gated or not, or a router with experts (and a shared one).

GLU variants (Shazeer, 2020); mixture of experts as in Mixtral (Jiang et al., 2024), Qwen3-MoE (Yang et al.,
2025) and gpt-oss (OpenAI, 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lowbit.kernels.elementwise import activated, affine
from lowbit.layers.experts import Experts
from lowbit.layers.linear import Linear
from lowbit.layers.norm import Norm
from lowbit.layers.routing import Route, sigmoid


@dataclass(frozen=True)
class GatedMlp:
    """down(activation(gate(x)) * up(x)); ``gate_up``: (2 * intermediate, hidden), gate rows first.

    ``norm``: of what goes into ``down``. ``partial``: several ranks leave their sum to the caller.
    """

    gate_up: Linear
    down: Linear
    activation: str
    norm: Norm | None = None
    partial: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """x (tokens, hidden) -> (tokens, hidden)."""
        inner = self.gate_up.gated(x, self.activation)
        inner = inner if self.norm is None else self.norm(inner, out=inner)
        return self.down.partial(inner) if self.partial else self.down(inner)


@dataclass(frozen=True)
class PlainMlp:
    """down(activation(up(x)))."""

    up: Linear
    down: Linear
    activation: str

    def __call__(self, x: Tensor) -> Tensor:
        """x (tokens, hidden) -> (tokens, hidden)."""
        return self.down(activated(self.up(x), self.activation))


@dataclass(frozen=True)
class MixtureOfExperts:
    """The sum of a token's chosen experts, weighted, and of the shared one where there is one.

    ``shared_gate``: a single row, whose sigmoid the shared expert is multiplied by (Qwen2-MoE: Yang et al.,
    2024).
    """

    router: Linear
    route: Route
    experts: Experts
    activation: str
    shared: GatedMlp | None = None
    shared_gate: Linear | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x (tokens, hidden) -> (tokens, hidden), in x's dtype or float32."""
        chosen, weights = self.route(self.router.in_float32(x))
        added = None if self.shared is None else self.shared(x)
        if added is not None and self.shared_gate is not None:
            affine(added, factor=sigmoid(self.shared_gate.in_float32(x)), out=added)
        return self.experts(x, chosen, weights, self.activation, added)
