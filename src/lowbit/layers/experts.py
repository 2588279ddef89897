"""Experts: the routed experts of a mixture-of-experts layer, each two Linears of any packed form.

Sparsely gated mixture of experts (Shazeer et al., 2017; Mixtral: Jiang et al., 2024). The layer is given the
choice of the router; each chosen expert runs once a step, over the tokens that chose it. A token's result is
the sum over its experts in ascending order of their numbers, so it does not depend on its neighbours.

Experts whose weights are all packed by native kernels run in one native call, those on a GPU in a few grouped
launches (``kernels.experts``); others one by one, with the same result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.kernels.elementwise import gated_activation
from lowbit.kernels.experts import together
from lowbit.kernels.parallel import ALONE, Parallel
from lowbit.kernels.step_plan import refuse
from lowbit.layers.linear import Linear


@dataclass(frozen=True)
class ExpertsSpec:
    """``count`` experts of gate and up (intermediate, hidden) and down (hidden, intermediate).

    Sizes are those of the whole model. ``bias``: whether the config promises biases. ``interleaved``: a
    stored ``gate_up_proj`` has gate and up rows in turn (gpt-oss). ``transposed``: plain stacked weights
    lie as (experts, in, out).
    """

    count: int
    hidden: int
    intermediate: int
    bias: bool = False
    interleaved: bool = False
    transposed: bool = False


class Experts:
    """``gate_up[e]``: (2 * intermediate, hidden), gate rows first; ``down[e]``: (hidden, intermediate).

    Of several ranks (``parallel``) each has some of the intermediate entries of every expert.
    """

    def __init__(
        self, name: str, gate_up: list[Linear], down: list[Linear], parallel: Parallel = ALONE
    ) -> None:
        self.name = name
        self.parallel = parallel
        self.gate_up = gate_up
        self.down = down
        self.grouped = together(gate_up, down)  # or why there is no such thing

    def __call__(
        self, x: Tensor, chosen: Tensor, weights: Tensor, activation: str, added: Tensor | None = None
    ) -> Tensor:
        """x (tokens, hidden), chosen int64 (tokens, k), weights float32 (tokens, k) -> (tokens, hidden).

        ``added`` (tokens, hidden) comes on top: the rank's part of it, where there are several. The result
        has x's dtype or is float32.
        """
        mixed = self.partial(x, chosen, weights, activation, added)
        return mixed if self.parallel.size == 1 else self.parallel.sum(mixed)

    def partial(
        self, x: Tensor, chosen: Tensor, weights: Tensor, activation: str, added: Tensor | None = None
    ) -> Tensor:
        """What this rank adds to the layer's result; in one process the result."""
        if not isinstance(self.grouped, str):
            return self.grouped(x, chosen, weights, activation, added)
        refuse(f"{self.name}: {self.grouped}")
        mixed = self.one_by_one(x, chosen, weights, activation)
        return mixed if added is None else mixed + added

    def one_by_one(self, x: Tensor, chosen: Tensor, weights: Tensor, activation: str) -> Tensor:
        """The sum from each expert's own layers, float32."""
        if chosen.shape[0] == 1:
            return self._one_token(x, chosen, weights, activation)
        out = torch.zeros(x.shape, device=x.device)
        # Pairs (token, slot) sorted by expert; stable, so tokens stay in order within an expert.
        experts, order = chosen.flatten().sort(stable=True)
        tokens = order // chosen.shape[1]
        per_expert = torch.bincount(experts, minlength=len(self.gate_up)).tolist()
        factors = weights.flatten()[order].unsqueeze(1)
        start = 0
        for expert, count in enumerate(per_expert):
            if count:
                rows = tokens[start : start + count]
                y = self.down[expert](gated_activation(self.gate_up[expert](x[rows]), activation))
                out.index_add_(0, rows, y * factors[start : start + count])
                start += count
        return out

    def _one_token(self, x: Tensor, chosen: Tensor, weights: Tensor, activation: str) -> Tensor:
        """The same sum without sorting and gathering."""
        out = torch.zeros(x.shape, device=x.device)
        for expert, weight in sorted(zip(chosen[0].tolist(), weights[0].tolist(), strict=True)):
            y = self.down[expert](gated_activation(self.gate_up[expert](x), activation))
            out += y.float() * weight
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        return sum(linear.nbytes for linear in (*self.gate_up, *self.down))
