"""Linear: y = Q(x) @ W.T + bias for a weight in any packed form, fused from parts where they are alike.

Among several ranks (``kernels.parallel``) a layer may hold some of its rows, and gives those outputs, or
some of its columns, and gives the sum of all ranks' products; or some rows of a matrix that stands between
two transforms, whose products the ranks gather, and gives all outputs or those that are wanted here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lowbit.kernels import PackedWeight
from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.elementwise import affine, gated_activation, gather_columns
from lowbit.kernels.parallel import ALONE, Parallel
from lowbit.kernels.rotation import Rotator
from lowbit.kernels.rounded_output import OutputTransform
from lowbit.kernels.whole_layer import WholeLayer, part_layer, whole_layer
from lowbit.layers.cuts import Cut


@dataclass(frozen=True)
class Part:
    """One stored module that makes up (a slice of the rows of) a Linear.

    ``name``: canonical module name. ``shape``: (out, in). ``rotary_heads``: how many heads its rows are
    rotated in (Q and K projections), so that containers with another rotary row order can be put right.
    ``bias``: whether the config promises one. ``router``: it chooses experts, or gates them or a state, and
    is never quantized at load. ``rows``, ``columns``: which of them a rank has, of rows perhaps for several
    runs of them, one below another; of columns, which of its inputs lie on which rank. ``groups``: its rows
    lie in so many groups, each of runs of ``group_rows`` rows; in the model's order the first run of every
    group comes before the second of any.
    """

    name: str
    shape: tuple[int, int]
    rotary_heads: int = 0
    bias: bool = False
    router: bool = False
    rows: Cut | tuple[Cut, ...] | None = None
    columns: Cut | None = None
    groups: int = 0
    group_rows: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Columns:
    """Of a layer cut in columns: whom its products are summed with, and where its inputs are.

    ``widths``: the inputs of all ranks, which are gathered; none: the rank's inputs are its columns.
    ``picked``: int64, this rank's columns among those of all ranks; None: all. ``sums``: not so where every
    rank has the whole result.
    """

    parallel: Parallel
    widths: tuple[int, ...] = ()
    picked: Tensor | None = None
    sums: bool = True

    def inputs(self, x: Tensor) -> Tensor:
        """x (tokens, the rank's inputs) -> (tokens, the rank's columns)."""
        whole = self.parallel.columns(x, self.widths) if self.widths else x
        return whole if self.picked is None else gather_columns(whole, self.picked)


@dataclass(frozen=True, eq=False)
class Gathered:
    """Of a weight of whose rows, which are to be transformed together, each rank has ``widths``.

    ``after``: the transform. ``picked``: int64, the outputs that are wanted here, in this order; None: all.
    """

    parallel: Parallel
    widths: tuple[int, ...]
    after: Rotator
    picked: Tensor | None = None

    @property
    def size(self) -> int:
        """How many outputs are wanted."""
        return sum(self.widths) if self.picked is None else len(self.picked)

    def __call__(self, part: Tensor) -> Tensor:
        """float32 (tokens, rows here) -> (tokens, size)."""
        whole = self.parallel.columns(part, self.widths)
        self.after.in_place(whole)
        return whole if self.picked is None else gather_columns(whole, self.picked)


class Linear:
    """A layer of one packed weight, or of several where the parts' schemes or inputs differ (GGUF mixes).

    ``inputs[i]`` is what ``weights[i]`` wants done to x; weights that share it share the object. ``order``:
    int64 (out,), where each output lies among the rows, if these could not be moved; the bias is as they are.
    ``columns``: of a layer that is cut in columns. ``outputs[i]``: what is done to ``weights[i]``'s
    results, bias included. ``gathered[i]``: of a weight some of whose rows each rank has.
    """

    def __init__(
        self,
        name: str,
        weights: list[PackedWeight],
        bias: Tensor | None,
        inputs: list[InputTransform | None] | None = None,
        order: Tensor | None = None,
        columns: Columns | None = None,
        outputs: list[OutputTransform | None] | None = None,
        gathered: list[Gathered | None] | None = None,
    ) -> None:
        self.name = name
        self.weights = weights
        self.bias = bias
        self.inputs = inputs if inputs and any(inputs) else None
        self.order = order
        self.columns = columns
        self.outputs = outputs if outputs and any(outputs) else None
        self.gathered = gathered if gathered and any(gathered) else None
        assert self.outputs is None or order is None, "what is changed lies in the model's order"
        assert self.gathered is None or self.inputs is self.outputs is None, "nothing else is done around it"

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x (tokens, in) -> (tokens, out)."""
        if self.columns is None:
            return self._product(x, out)
        if not self.columns.sums:
            return self._product(self.columns.inputs(x), out)
        assert out is None, "no layer that is summed writes into another's place"
        return self.columns.parallel.sum(self.partial(x)).to(x.dtype)

    def partial(self, x: Tensor) -> Tensor:
        """What this rank adds to the layer's result; in one process the result."""
        if self.columns is None:
            return self._product(x)
        x = self.columns.inputs(x)
        if not self.columns.sums:  # the first rank adds it
            whole = self._product(x)
            return whole if self.columns.parallel.rank == 0 else torch.zeros_like(whole)
        # Sums of bfloat16 parts would be rounded twice.
        out = None if x.dtype is torch.float32 else x.new_empty(x.shape[0], self._rows, dtype=torch.float32)
        return self._product(x, out)

    def of_input(self, x: Tensor, factor: Tensor | None) -> Tensor:
        """The product with x as the layer's only transform makes it, and the factor that it gives."""
        [transform] = self.inputs or [None]
        y = x.new_empty(x.shape[0], self._rows)
        self._parts(x, [transform], y, {id(transform): (x, factor)})
        return self._settled(self._finished(y))

    def _product(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return self._settled(self._summed(x, out))

    def _settled(self, y: Tensor) -> Tensor:
        """Rotated or rounded, in place."""
        start = 0
        for weight, output in zip(self.weights, self.outputs or (), strict=False):
            if output is not None:
                output.in_place(y[:, start : start + weight.shape[0]])
            start += weight.shape[0]
        return y

    def _summed(self, x: Tensor, out: Tensor | None) -> Tensor:
        whole = self._whole
        if whole is not None and whole.takes(x, out):
            return whole(x, out)
        if self.gathered is not None:
            y = self._through_ranks(x)
            return self._finished(y if out is None else out.copy_(y))
        if len(self.weights) == 1 and self.inputs is None:
            y = self.weights[0].kernel.linear(x, self.weights[0], out)
        else:
            y = x.new_empty(x.shape[0], self._rows) if out is None else out
            self._parts(x, self.inputs or [None] * len(self.weights), y, {id(None): (x, None)})
        assert out is None or self.order is None, (
            "no layer with an order of its own writes in another's place"
        )
        return self._finished(y)

    def _finished(self, y: Tensor) -> Tensor:
        """The sums with a bias, in the model's order."""
        if self.bias is not None:
            affine(y, bias=self.bias, out=y)
        return y if self.order is None else gather_columns(y, self.order)

    def in_float32(self, x: Tensor) -> Tensor:
        """x (tokens, in) -> float32 (tokens, out): the sums as they are, not rounded to x's dtype."""
        if x.dtype is torch.float32 or self.order is not None:
            return self(x).float()
        return self(x, torch.empty(len(x), self._rows, dtype=torch.float32, device=x.device))

    def gated(self, x: Tensor, activation: str) -> Tensor:
        """x (tokens, in) -> activation(gate) * up (tokens, out / 2); gate rows come first."""
        whole = self._whole if self.outputs is None else None
        if whole is not None and whole.halves and whole.takes(x):
            return whole(x, activation=activation)
        return gated_activation(self(x), activation)

    @cached_property
    def _whole(self) -> WholeLayer | None:
        """The layer in one call, where it is one weight whose kernel does all around it too."""
        if len(self.weights) != 1 or self.order is not None or self.gathered is not None:
            return None
        return whole_layer(self.weights[0], self.inputs[0] if self.inputs else None, self.bias)

    @cached_property
    def _wholes(self) -> list[WholeLayer | None]:
        """Each part in one call without a bias, where that multiplies otherwise than its steps would."""
        return [
            part_layer(weight, transform)
            for weight, transform in zip(self.weights, self.inputs or [None] * len(self.weights), strict=True)
        ]

    def _through_ranks(self, x: Tensor) -> Tensor:
        """Every weight's product, those that are gathered as all ranks have them."""
        parts = []
        for weight, gathered in zip(self.weights, self.gathered or (), strict=True):
            # Sums of bfloat16 parts would be rounded twice.
            part = x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)
            part = weight.kernel.linear(x, weight, part)
            parts.append(part if gathered is None else gathered(part))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).to(x.dtype)

    def _parts(
        self,
        x: Tensor,
        inputs: list[InputTransform | None],
        y: Tensor,
        done: dict[int, tuple[Tensor, Tensor | None]],
    ) -> None:
        """Every weight into its own columns of y; each distinct transform of x runs once, those ``done`` (by
        id: what they gave) never."""
        start = 0
        for weight, transform, whole in zip(self.weights, inputs, self._wholes, strict=True):
            part = y[:, start : start + weight.shape[0]]
            start += weight.shape[0]
            if whole is not None and whole.takes(x, part):
                whole(x, part)
                continue
            if id(transform) not in done:
                assert transform is not None, "None is there from the start"
                changed, factor = transform(x)
                done[id(transform)] = (changed.to(x.dtype), factor)
            changed, factor = done[id(transform)]
            weight.kernel.linear(changed, weight, part)
            if factor is not None:
                affine(part, factor=factor, out=part)

    @property
    def _rows(self) -> int:
        """Outputs."""
        if self.gathered is None:
            return sum(weight.shape[0] for weight in self.weights)
        pairs = zip(self.weights, self.gathered, strict=True)
        return sum(weight.shape[0] if each is None else each.size for weight, each in pairs)

    @property
    def gathers(self) -> bool:
        """Whether ranks tell each other its products."""
        return self.gathered is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        return sum(weight.nbytes for weight in self.weights)


class Embedding:
    """Token embedding and, where tied, the output head: the same packed weight read both ways.

    ``cut``: the rows that this rank of ``parallel`` has; each token's row comes from the one that has it.
    ``inputs``: what is done to the head's.
    """

    def __init__(
        self,
        weight: PackedWeight,
        parallel: Parallel = ALONE,
        cut: Cut | None = None,
        inputs: InputTransform | None = None,
    ) -> None:
        self.weight = weight
        self.parallel = parallel
        self.cut = cut
        self.inputs = inputs

    def __call__(self, tokens: Tensor) -> Tensor:
        """int32 (tokens,) -> float32 (tokens, hidden)."""
        if self.cut is None:
            return self.weight.kernel.rows(self.weight, tokens).float()
        here = (tokens >= self.cut.start) & (tokens < self.cut.stop)
        rows = self.weight.kernel.rows(self.weight, torch.where(here, tokens - self.cut.start, 0))
        # Sums of one row and zeros: no bit changes.
        return self.parallel.sum(rows.float().masked_fill(~here.unsqueeze(1), 0.0))

    def as_head(self) -> Linear:
        """The same matrix as a Linear of (vocabulary, hidden), or of the rank's rows."""
        return Linear("lm_head", [self.weight], None, [self.inputs])
