"""Recurrent layers: a state for each sequence in place of keys and values.

The gated delta rule (Gated DeltaNet: Yang et al., 2024). A token's row ``mixed`` holds q, k, v, z, b and a,
each of all heads in turn. Of value head h, with its key head h // (heads / k_heads):

    c = silu(sum of taps[j] * (q | k | v)[t - taps + 1 + j])     a causal convolution, channel by channel
    q, k, v = c, q and k divided by their lengths, q also by sqrt(k_dim)
    S = exp(decay * softplus(a + bias)) * S                      S (k_dim, v_dim): the state
    S = S + k (sigmoid(b) * (v - k S))                           the delta rule
    out = rms_norm(q S) * norm * silu(z)

A sequence's state lies in a slot that the engine hands out; a chunk that begins at position 0 begins with
zeros, whatever is there. All of it is float32 and goes token by token in the order of positions, so that a
request's bits do not depend on the chunks its prompt was computed in; where a kernel takes tokens together,
its ``unit`` says which chunks those are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from lowbit.kernels import host_memory
from lowbit.kernels.attention import CacheSpec, LayerCache, choose_attention
from lowbit.kernels.forward_batch import ForwardBatch

LENGTH_EPS = 1e-6  # added to the squared length of q and k


@dataclass(frozen=True)
class StateSpec:
    """What one layer keeps of a sequence: the last ``taps`` - 1 inputs of the convolution, and S of each of
    ``heads`` value heads. ``channels``: 2 * k_heads * k_dim + heads * v_dim."""

    k_heads: int
    heads: int
    k_dim: int
    v_dim: int
    taps: int

    @property
    def channels(self) -> int:
        """What the convolution goes over: q, k and v."""
        return 2 * self.k_heads * self.k_dim + self.heads * self.v_dim

    @property
    def width(self) -> int:
        """Of a token's row."""
        return self.channels + self.heads * (self.v_dim + 2)

    def state_bytes(self) -> int:
        """Bytes of a sequence, however long it is."""
        return 4 * (self.channels * (self.taps - 1) + self.heads * self.k_dim * self.v_dim)

    def token_bytes(self) -> int:
        """Nothing is kept for each token."""
        return 0


@dataclass(frozen=True)
class LayerState:
    """The states of one layer. ``inputs``: float32 (slots, taps - 1, channels), ``matrices``: float32 (slots,
    heads, k_dim, v_dim). The last slot is nobody's: rows that pad a batch write there, by slot -1."""

    spec: StateSpec
    kernel: RecurrentKernel
    inputs: Tensor = field(repr=False)
    matrices: Tensor = field(repr=False)


@dataclass(frozen=True)
class DeltaParameters:
    """float32 weights of one layer. ``taps``: (taps, channels), the newest token's last; ``decay``, ``bias``:
    (heads,), of which decay is negative; ``norm``: (v_dim,)."""

    taps: Tensor
    decay: Tensor
    bias: Tensor
    norm: Tensor
    eps: float


class RecurrentKernel(Protocol):
    """Computes the layer between its projections. ``unit``: a prompt that is cut at its multiples has the
    bits of a whole one."""

    name: str
    unit: int

    def refuses(self, spec: StateSpec, device: torch.device) -> str | None:
        """Why this kernel cannot serve the spec, or None."""

    def run(self, mixed: Tensor, state: LayerState, batch: ForwardBatch, weights: DeltaParameters) -> Tensor:
        """mixed (tokens, ``spec.width``) -> (tokens, heads * v_dim) in its dtype; the states of
        ``batch.state_slots`` move on."""


LayerSpec = CacheSpec | StateSpec
LayerMemory = LayerCache | LayerState


def recurrent_kernels() -> list[RecurrentKernel]:
    """All kernels, best first. The reference refuses nothing."""
    from lowbit.kernels.gpu.recurrent import GpuDelta
    from lowbit.kernels.recurrent_cpu import CpuDelta
    from lowbit.kernels.recurrent_reference import ReferenceDelta

    return [GpuDelta(), CpuDelta(), ReferenceDelta()]


def choose_recurrent(spec: StateSpec, device: torch.device) -> RecurrentKernel:
    """The first kernel that does not refuse the spec."""
    return next(kernel for kernel in recurrent_kernels() if kernel.refuses(spec, device) is None)


def prompt_unit(specs: Iterable[LayerSpec], device: torch.device) -> int:
    """At whose multiples prompts should be cut, for bits that do not depend on the cuts; 1: anywhere."""
    return max((choose_recurrent(s, device).unit for s in specs if isinstance(s, StateSpec)), default=1)


def allocate_layer(
    spec: LayerSpec, pages: int, slots: int, page_size: int, device: torch.device, backend: str = "auto"
) -> LayerMemory:
    """A layer's pages, or its states of ``slots`` sequences and the slot that is nobody's."""
    if isinstance(spec, CacheSpec):
        return choose_attention(spec, device, backend).allocate(spec, pages, page_size, device)
    shapes = (slots + 1, spec.taps - 1, spec.channels), (slots + 1, spec.heads, spec.k_dim, spec.v_dim)
    if device.type == "cpu":
        inputs, matrices = (host_memory.zeros(shape, torch.float32) for shape in shapes)
    else:
        inputs, matrices = (torch.zeros(shape, device=device) for shape in shapes)
    return LayerState(spec, choose_recurrent(spec, device), inputs, matrices)


def state_bytes(specs: Iterable[LayerSpec]) -> int:
    """Bytes that the recurrent layers among ``specs`` keep of a sequence; 0: there are none."""
    return sum(spec.state_bytes() for spec in specs if isinstance(spec, StateSpec))
