"""WeightLoader: how a model family asks for its weights, without knowing files, formats or kernels.

``loading`` implements it twice: once to load, once to plan (``lowbit inspect``); a family's ``build`` is
one description that serves both.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lowbit.kernels.parallel import ALONE, Parallel
from lowbit.kernels.rotation import Rotator
from lowbit.layers.cuts import Cut
from lowbit.layers.experts import Experts, ExpertsSpec
from lowbit.layers.linear import Embedding, Linear, Part
from lowbit.numerics.cache_format import KvDtype

NOT_SHARED = ALONE  # ``parallel`` of a loader for a model in one process


class WeightLoader(Protocol):
    """``activation_dtype``: what goes into matrix products and comes out of them (the residual stream is
    float32); ``cache_dtype``: K and V in the cache, where no scale of theirs is known. ``parallel``: the rank
    the model is for."""

    parallel: Parallel
    device: torch.device
    activation_dtype: torch.dtype
    cache_dtype: KvDtype

    def linear(self, name: str, parts: list[Part]) -> Linear:
        """The parts' rows one below another, fused where their schemes allow it."""

    def inner_cut(self, name: str, into: list[Part], out_of: Part) -> Cut | None:
        """The rank's share of what the parts of layer ``name`` make for ``out_of``: the first's rows and
        the second's columns, cut where their blocks end. None in one process. E0431 where that is not
        possible."""

    def embedding(self, part: Part) -> Embedding:
        """A matrix looked up by row."""

    def vector(self, name: str, *shape: int) -> Tensor:
        """float32 of that shape, mostly (size,): a norm's weight, by its tensor's canonical name. Never
        cut."""

    def experts(self, name: str, spec: ExpertsSpec) -> Experts:
        """The routed experts ``<name>.0.gate_proj`` …, stored one by one or stacked."""

    def has(self, name: str) -> bool:
        """Whether the checkpoint stores a module of this canonical name."""

    def matrices(self, part: Part, stacked: int = 0) -> Tensor:
        """float32 (out, in): the dequantized matrix, for what a family folds into other steps.

        (stacked, out, in) where that many are stored along the first axis. On the meta device when planning.
        """

    def row_norms(self, part: Part) -> Tensor:
        """float32 (out,): the Euclidean norms of all of a stored matrix's rows. Ones where no values are
        read."""

    def kv_scales(self, attention: str, layer: int) -> tuple[float, float]:
        """What K and V of the attention called ``attention`` are divided by in an fp8 cache; else 1, 1."""

    def head_rotations(self, attention: str, head_dim: int) -> tuple[Rotator | None, Rotator | None]:
        """What the heads of Q and of K are rotated by after their rotary embedding; mostly nothing."""

    def kv_dtype(self, attention: str, layer: int) -> KvDtype:
        """How the layer stores K and V: ``cache_dtype``, its fp8 with the scales of ``kv_scales`` if any."""
