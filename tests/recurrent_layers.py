"""Random layers of the gated delta rule, as tests of its kernels try them."""

from __future__ import annotations

import torch
from torch import Tensor

from forward_helpers import chunk_batch
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.recurrent import DeltaParameters, LayerState, RecurrentKernel, StateSpec

SLOTS = 5  # and one that is nobody's
Parts = list[tuple[int, int, int]]  # (new tokens, tokens before them, slot) of each sequence


class Layer:
    """Random weights and states of a spec, always the same."""

    def __init__(self, spec: StateSpec, device: torch.device) -> None:
        self.spec, self.device = spec, device
        self.random = torch.Generator().manual_seed(3)
        self.weights = DeltaParameters(
            self.normal(spec.taps, spec.channels),
            -self.normal(spec.heads).exp(),
            self.normal(spec.heads) * 4,
            self.normal(spec.v_dim),
            1e-6,
        )
        self.inputs = self.normal(SLOTS + 1, spec.taps - 1, spec.channels)
        self.matrices = self.normal(SLOTS + 1, spec.heads, spec.k_dim, spec.v_dim)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random).to(self.device)

    def state(self, kernel: RecurrentKernel) -> LayerState:
        return LayerState(self.spec, kernel, self.inputs.clone(), self.matrices.clone())


def batch_of(parts: Parts, device: torch.device) -> ForwardBatch:
    rows = [([0] * new, before, [0] * 16) for new, before, _ in parts]
    return chunk_batch(rows, state_slots=[slot for *_, slot in parts]).to(device)


def poisoned(state: LayerState, parts: Parts) -> None:
    """NaN in slots whose sequences begin: what lies there is of no use to them."""
    for _, before, slot in parts:
        if not before:
            state.inputs[slot] = torch.nan
            state.matrices[slot] = torch.nan
