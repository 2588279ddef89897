"""Experts: the routed experts of a mixture-of-experts layer, each two Linears of any packed form.

Sparsely gated mixture of experts (Shazeer et al., 2017; Mixtral: Jiang et al., 2024). The layer is given the
choice of the router; each chosen expert runs once a step, over the tokens that chose it. A token's result is
the sum over its experts in ascending order of their numbers, so it does not depend on its neighbours.

Experts whose weights are all packed by native kernels run in one native call, those on a GPU in a few grouped
launches (``kernels.experts``); others one by one, with the same result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.kernels.activation_quant import Staged
from lowbit.kernels.elementwise import gated_activation
from lowbit.kernels.experts import together
from lowbit.kernels.gpu import runtime
from lowbit.kernels.parallel import ALONE, Parallel
from lowbit.kernels.prompt_rows import as_stored
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

    Of several ranks (``parallel``) each has some of the intermediate entries of every expert, or whole ones:
    those whose numbers are ``here``.
    """

    def __init__(
        self,
        name: str,
        gate_up: list[Linear],
        down: list[Linear],
        parallel: Parallel = ALONE,
        here: range | None = None,
    ) -> None:
        self.name = name
        self.parallel = parallel
        self.here = here
        self.gate_up = gate_up
        self.down = down
        self.grouped = together(gate_up, down)  # or why there is no such thing
        self._asks_once = bool(down) and _asks_once(down)

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
        if self.here is not None:
            return self._whole_ones(x, chosen, weights, activation, added, self.here)
        if not isinstance(self.grouped, str):
            return self.grouped(x, chosen, weights, activation, added)
        refuse(f"{self.name}: {self.grouped}")
        mixed = self.one_by_one(x, chosen, weights, activation)
        return mixed if added is None else mixed + added

    def _whole_ones(
        self,
        x: Tensor,
        chosen: Tensor,
        weights: Tensor,
        activation: str,
        added: Tensor | None,
        here: range,
    ) -> Tensor:
        """What the experts give that are here: each pair of a token and one of them is a row, in ascending
        order of the experts. Grouped on a GPU all pairs stay, those of others as of none, so that the host
        need not know which they are."""
        if not isinstance(self.grouped, str) and runtime.runs_on(x.device):
            own = torch.where((chosen >= here.start) & (chosen < here.stop), chosen - here.start, -1)
            return self.grouped(x, own, weights, activation, added)
        experts, order = chosen.flatten().sort(stable=True)
        order = order[(experts >= here.start) & (experts < here.stop)]
        tokens, factors = order // chosen.shape[1], weights.flatten()[order]
        chosen = chosen.flatten()[order].unsqueeze(1) - here.start
        out = torch.zeros(x.shape, device=x.device) if added is None else added.float()
        if not len(order):
            return out
        rows, factors = x[tokens], factors.unsqueeze(1)
        with as_stored():  # rows of prompts do not come last here
            if isinstance(self.grouped, str):
                refuse(f"{self.name}: {self.grouped}")
                mixed = self._one_by_one(rows, chosen, factors, activation)
            else:
                mixed = self.grouped(rows, chosen, factors, activation)
        return out.index_add(0, tokens, mixed.float())

    def one_by_one(self, x: Tensor, chosen: Tensor, weights: Tensor, activation: str) -> Tensor:
        """The sum from each expert's own layers, float32."""
        with as_stored():
            return self._one_by_one(x, chosen, weights, activation)

    def _one_by_one(self, x: Tensor, chosen: Tensor, weights: Tensor, activation: str) -> Tensor:
        out = torch.zeros(x.shape, device=x.device)
        runs = _runs(chosen, weights, len(self.gate_up))
        inner = (gated_activation(self.gate_up[run.expert](run.of(x)), activation) for run in runs)
        for run, y in zip(runs, self._down(runs, inner), strict=True):
            run.add(y, out)
        return out

    def _down(self, runs: list[_Run], inner: Iterator[Tensor]) -> Iterator[Tensor]:
        """What each expert makes of its rows; ranks tell each other once what they saw of all of them."""
        layers = [self.down[run.expert] for run in runs]
        if not self._asks_once:
            yield from (layer(rows) for layer, rows in zip(layers, inner, strict=True))
            return
        staged = [_staged(layer, rows) for layer, rows in zip(layers, inner, strict=True)]
        seen = self.parallel.largest(torch.cat([each.seen for each in staged]))
        parts = seen.split([len(each.seen) for each in staged])
        for layer, each, part in zip(layers, staged, parts, strict=True):
            yield layer.of_input(*each.finish(part))

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        return sum(linear.nbytes for linear in (*self.gate_up, *self.down))


@dataclass(frozen=True)
class _Run:
    """The tokens of one expert. ``rows``: int64 (tokens,); None: the only one there is."""

    expert: int
    rows: Tensor | None
    factors: Tensor | float  # (tokens, 1)

    def of(self, x: Tensor) -> Tensor:
        """Their rows of x."""
        return x if self.rows is None else x[self.rows]

    def add(self, y: Tensor, out: Tensor) -> None:
        """Add their results, weighted, to those of all tokens."""
        if self.rows is None:
            out += y.float() * self.factors
        else:
            out.index_add_(0, self.rows, y * self.factors)


def _runs(chosen: Tensor, weights: Tensor, experts: int) -> list[_Run]:
    """Ascending by expert, those that are chosen."""
    if len(chosen) == 1:  # no sorting and gathering
        pairs = sorted(zip(chosen[0].tolist(), weights[0].tolist(), strict=True))
        return [_Run(expert, None, weight) for expert, weight in pairs]
    # Pairs (token, slot) sorted by expert; stable, so tokens stay in order within an expert.
    in_order, order = chosen.flatten().sort(stable=True)
    counts = torch.bincount(in_order, minlength=experts).tolist()
    tokens, factors = order // chosen.shape[1], weights.flatten()[order].unsqueeze(1)
    split = zip(tokens.split(counts), factors.split(counts), strict=True)
    return [_Run(expert, *of_it) for expert, of_it in enumerate(split) if len(of_it[0])]


def _staged(down: Linear, x: Tensor) -> Staged:
    assert down.inputs is not None and down.inputs[0] is not None, "it asks ranks"
    return down.inputs[0].stage(x)


def _asks_once(down: list[Linear]) -> bool:
    """Whether all experts find scales from whole rows that lie on several ranks, in the same way. On a GPU
    a transform that asks is a launch less by itself."""
    inputs = [layer.inputs[0] if layer.inputs and len(layer.weights) == 1 else None for layer in down]
    if not all(transform is not None and transform.asks_ranks for transform in inputs):
        return False
    device = next(iter(down[0].weights[0].buffers.values())).device
    alike = len({transform.scheme for transform in inputs if transform is not None}) == 1
    return alike and not runtime.runs_on(device)
