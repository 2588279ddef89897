"""Planner: the ``WeightLoader`` that only writes down what would be read, for ``lowbit inspect``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.tensor_data import TensorData
from lowbit.formats.kv_scales import KvScales
from lowbit.kernels import LinearKernel, Loser, choose, screened_head
from lowbit.kernels.recurrent import LayerSpec, state_bytes
from lowbit.kernels.timing import COPY
from lowbit.layers.experts import Experts, ExpertsSpec
from lowbit.layers.linear import Embedding, Linear, Part
from lowbit.loading import head_screen
from lowbit.loading.asker import Asker
from lowbit.loading.kernel_choice import Wanted
from lowbit.loading.names import Placed, StoredRows
from lowbit.loading.online import SAMPLE_ROWS, Decision, estimated_error
from lowbit.loading.opened import Opened, Target
from lowbit.models.config import ModelConfig
from lowbit.numerics.cache_format import KvDtype
from lowbit.numerics.cutting import columns_scheme, parted_scheme
from lowbit.numerics.scheme import Scheme

_WORK = 160 << 20  # slices of float32 and what the allocator keeps of them


@dataclass(frozen=True)
class ModulePlan:
    """One stored module: what it is and which kernel will run it. ``refusals``: (kernel, reason).

    ``nbytes``: what it will occupy. When quantizing at load, ``reason``: why it stays plain; ``error``: the
    estimated |Q(w) - w| / |w|. ``losers``: what else would run it; ``by``: what decided between them, where
    it was not the order of preference. ``ratios``: times as fast as bf16, (tokens, ratio), as it was timed.
    ``cut``: how ranks share it, and ``whole`` its shape among all; the rest is of the first rank's part.
    """

    name: str
    shape: tuple[int, ...]
    scheme: Scheme
    kernel: str
    computes: str
    refusals: tuple[tuple[str, str], ...]
    nbytes: int
    reason: str = ""
    error: float | None = None
    losers: tuple[Loser, ...] = ()
    by: str = ""
    ratios: tuple[tuple[int, float], ...] = ()
    cut: str = ""
    whole: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class _Part:
    """A module about to be planned. ``scheme``: with what is done to its input."""

    place: Placed
    scheme: Scheme
    decision: Decision | None
    wanted: Wanted


@dataclass(frozen=True)
class ModelPlan:
    """A model as it would be loaded, from headers alone."""

    architecture: str
    format: str
    described: str  # "gptq, 4-bit, group 128"
    config: ModelConfig
    modules: list[ModulePlan]
    cache_specs: Sequence[LayerSpec]
    device: str
    choice: str  # what --quantization auto chose and why, or ""
    peak_bytes: int  # of memory while loading, about: all packed weights and the largest module unpacked
    screen_bytes: int = 0  # of the output head's screen
    no_screen: str = ""  # why there is none

    @property
    def weight_bytes(self) -> int:
        """Bytes of all planned modules and of the head's screen."""
        return sum(module.nbytes for module in self.modules) + self.screen_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache one token needs over all layers."""
        return sum(spec.token_bytes() for spec in self.cache_specs)

    @property
    def state_bytes(self) -> int:
        """Bytes that recurrent layers keep of a sequence, however long it is."""
        return state_bytes(self.cache_specs)

    @property
    def context_length(self) -> int:
        """The longest sequence the model was made for, in tokens."""
        return self.config.context_length

    @property
    def parameters(self) -> int:
        """Weights in the planned modules (norms not counted)."""
        return sum(module.whole[0] * module.whole[1] for module in self.modules)


class Planner(Asker):
    """``WeightLoader`` that only writes down what would be read."""

    def __init__(
        self, opened: Opened, target: Target, data: TensorData, kv_scales: KvScales, estimate: bool
    ) -> None:
        super().__init__(opened, target)
        self.data = data
        self.estimate = estimate
        self.modules: list[ModulePlan] = []
        self._kv_scales = kv_scales
        self.largest_module = 0
        self._expert_bytes = 0

    def linear(self, name: str, parts: list[Part]) -> Linear:
        """A Linear without weights."""
        self._plan_layer(self.placed(name, parts))
        return Linear(name, [], None)

    def experts(self, name: str, spec: ExpertsSpec) -> Experts:
        """Experts without weights."""
        first = len(self.modules)
        for expert in self.placed_experts(name, spec):
            for places in expert:
                self._plan_layer(places)
        self._expert_bytes += sum(module.nbytes for module in self.modules[first:])
        return Experts(name, [], [])

    def embedding(self, part: Part) -> Embedding:
        """An embedding without its matrix."""
        self._plan_layer(self.placed(part.name, [part]))
        return PlannedEmbedding()

    def matrices(self, part: Part, stacked: int = 0) -> Tensor:
        """A meta tensor of that shape, which takes no memory; the plan counts it as float32."""
        for place in self.placed_stack(part, stacked):
            self._plan_unpacked(place)
        return torch.empty((stacked, *part.shape) if stacked else part.shape, device="meta")

    def vector(self, name: str, *shape: int) -> Tensor:
        """Ones: nothing is computed with them but frequencies nobody uses."""
        self.check_vector(name, *shape)
        return torch.ones(shape)

    def kv_scales(self, attention: str, layer: int) -> tuple[float, float]:
        """Their tensors have a place; their values do not matter here."""
        self._kv_scales.find(self.names, attention)
        return 1.0, 1.0

    def kv_dtype(self, attention: str, layer: int) -> KvDtype:
        """As when loading, but that values are not read: a scale marked as never calibrated counts."""
        known = any(self._kv_scales.find(self.names, attention)) or self._kv_scales.table is not None
        return self.cache_dtype.with_static_scales() if known else self.cache_dtype

    def screen(self, config: ModelConfig, wanted: str) -> tuple[int, str]:
        """Bytes of the output head's screen, or 0 and why there is none; after all else."""
        named = {module.name: module for module in self.modules}
        embedding = named["model.embed_tokens"]
        head = embedding if config.tied_head else named["lm_head"]
        lookup = 0 if config.tied_head else embedding.nbytes
        total = sum(module.nbytes for module in self.modules)
        weights = head_screen.Weights(head.nbytes, lookup, self._expert_bytes, total)
        options = (self.as_run(head.scheme), head.kernel, weights, self.device, self.parallel.size)
        reason = head_screen.refuses(wanted, config, *options)
        return (screened_head.nbytes(head.shape), "") if reason is None else (0, reason)

    @property
    def peak_bytes(self) -> int:
        """Packed weights and the largest module with one byte a code; where it is made here, as parts, fused
        and packed, and what is worked in."""
        packed = sum(module.nbytes for module in self.modules)
        return packed + (self.largest_module if self.online is None else 3 * self.largest_module + _WORK)

    def _plan_layer(self, places: list[Placed]) -> None:
        """Modules of one layer; neighbours that will be one weight are timed and chosen for as one."""
        parts = [self._part(place) for place in places]
        for _, fused in groupby(parts, self._fused_by):
            run = list(fused)
            scheme, shape = self._as_packed(run)
            kernels = self.target.kernels
            choice = kernels.of(run[0].wanted, scheme, shape, self.device)
            ratios = kernels.ratios(choice.kernel, scheme, shape, self.device)
            computes, refusals = choice.kernel.computes, choice.refusals
            if scheme.is_dense and not run[0].scheme.is_dense:  # codebooks, decoded when they are loaded
                computes = f"{scheme.weight.name} copy"
                refusals = choose(run[0].scheme.weight_alone, shape, self.device).refusals
            for part in run:
                self._add(
                    part.place,
                    part.scheme,
                    part.decision,
                    kernel=choice.kernel.name,
                    computes=computes,
                    refusals=refusals,
                    nbytes=self._nbytes(part, choice.kernel),
                    losers=choice.losers,
                    by=choice.by,
                    ratios=ratios,
                )

    def _fused_by(self, part: _Part) -> tuple[object, ...]:
        """What neighbours that will be one weight have in common (``concatenate``)."""
        alone = part.scheme.whole_columns or self.as_run(part.scheme).weight.vectors is not None
        return part.scheme, part.wanted.kernel, part.wanted.rule, part.place.part.name if alone else ""

    def _part(self, place: Placed) -> _Part:
        decision = self.decide(place)
        scheme = self.stored_scheme(place) if decision is None else decision.scheme
        scheme = self.with_inputs(place, scheme)
        if place.product is not None:
            scheme = replace(scheme, blocks=scheme.blocks[1:], scales=scheme.scales[1:])
        elif place.rows and place.picked_rows is None:
            runs = StoredRows.of(place, self.header).runs if self._stays_in_order(place) else place.runs
            scheme = parted_scheme(scheme, place.part.shape, runs)
        elif place.rows and scheme.weight.is_tall:
            scheme = scheme.decoded
        if place.columns is not None:
            scheme = columns_scheme(scheme, place.part.shape[1], place.columns.start, place.columns.stop)
            scheme = replace(scheme, reordered=False)
        return _Part(place, scheme, decision, self.wanted_kernel(place))

    def _as_packed(self, parts: list[_Part]) -> tuple[Scheme, tuple[int, int]]:
        """The scheme and shape of parts fused: scales of a whole column are then a row's."""
        scheme = replace(self.as_run(parts[0].scheme), activation=parts[0].scheme.activation)
        shape = (sum(part.place.shape[0] for part in parts), parts[0].place.shape[1])
        if len(parts) > 1 and not scheme.flattened:
            scheme = replace(scheme, blocks=tuple((rows or 1, columns) for rows, columns in scheme.blocks))
        return scheme, shape

    def _plan_unpacked(self, place: Placed) -> None:
        """What attention folds into others: float32, and nothing quantizes what it multiplies."""
        rows, columns = place.part.shape
        scheme = self.form.scheme_of(place.module)
        quantizes = scheme.activation is not None
        self._add(
            place,
            replace(scheme, activation=None),
            None,
            kernel="unpacked",
            computes="as stored, inputs not quantized" if quantizes else "as stored",
            refusals=(),
            nbytes=4 * rows * columns,
        )

    def _nbytes(self, part: _Part, kernel: LinearKernel) -> int:
        if part.place.elsewhere:
            return 0
        shape, whole = part.place.shape, part.place.part.shape
        if kernel.name == COPY:
            return kernel.nbytes(part.scheme, shape)
        made = part.decision is not None and part.decision.method is not None
        run = self.as_run(part.scheme)
        if run.is_dense and not part.scheme.is_dense:
            return kernel.nbytes(run, shape)
        # Codebooks are stored in less than the matrix decoded from them, scales beside outliers in less.
        if made or part.scheme.is_dense or part.scheme.outliers is not None:
            return round(shape[0] * shape[1] * part.scheme.bits_per_weight(shape) / 8)
        return self.stored_nbytes(part.place) * shape[0] * shape[1] // (whole[0] * whole[1])

    def _add(self, place: Placed, scheme: Scheme, decision: Decision | None, **how: Any) -> None:
        shape, whole = place.shape, place.part.shape
        run = self.as_run(scheme)
        read = scheme if scheme.is_dense or not run.is_dense else run  # codebooks may be decoded
        width = read.weight.bits / 8 if read.is_dense or read.weight.in_bytes else 1
        self.largest_module = max(self.largest_module, int(whole[0] * whole[1] * width))
        self.modules.append(
            ModulePlan(
                name=place.part.name,
                shape=shape,
                scheme=scheme,
                reason="" if decision is None else decision.reason,
                error=self._error(place, decision),
                cut=self.cut_of(place),
                whole=whole,
                **how,
            )
        )

    def _error(self, place: Placed, decision: Decision | None) -> float | None:
        if decision is None or not self.estimate:
            return None
        return estimated_error(decision, self._sample(place, decision))

    def _sample(self, place: Placed, decision: Decision) -> Tensor | None:
        """Some rows of the stored weight; of a hub model only headers are here, the rest reads as zeros."""
        if decision.method is None:
            return None
        weight = self.form.read(place.module, self.data).weight
        rows = weight.rows(0, min(SAMPLE_ROWS, place.part.shape[0])).codes
        return rows if bool(rows.count_nonzero()) else None


class PlannedEmbedding(Embedding):
    """An embedding nobody will look anything up in."""

    def __init__(self) -> None:
        pass

    def as_head(self) -> Linear:
        """A head without weights."""
        return Linear("lm_head", [], None)
