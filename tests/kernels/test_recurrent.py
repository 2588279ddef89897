"""The native gated delta rule beside its definition in torch: parts of any length, states, rows apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from forward_helpers import chunk_batch
from guard_page import rows_at_guard_page
from lowbit.errors import LowbitError
from lowbit.kernels import native
from lowbit.kernels.recurrent import DeltaParameters, LayerState, RecurrentKernel, StateSpec
from lowbit.kernels.recurrent_cpu import CpuDelta, sigmoid_gate
from lowbit.kernels.recurrent_reference import ReferenceDelta

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(native.library() is None, reason="no native library"),
]

SLOTS = 5  # and one that is nobody's
SPECS = {
    "odd heads": StateSpec(k_heads=2, heads=4, k_dim=20, v_dim=16, taps=4),
    "wide keys, two taps": StateSpec(k_heads=1, heads=3, k_dim=80, v_dim=48, taps=2),
    "a head, no past": StateSpec(k_heads=1, heads=1, k_dim=16, v_dim=32, taps=1),
}
# (new tokens, tokens before them, slot) of each sequence
STEPS = {
    "a prompt among others": [(11, 0, 2), (1, 17, 0), (3, 1, 1), (9, 3, 4)],
    "one token each": [(1, 7, 4), (1, 0, 0), (1, 1, 2)],
}


class Layer:
    """Random weights, inputs and states, the same for each kernel."""

    def __init__(self, spec: StateSpec, parts: list[tuple[int, int, int]]) -> None:
        self.spec, self.random = spec, torch.Generator().manual_seed(3)
        self.weights = DeltaParameters(
            self.normal(spec.taps, spec.channels),
            -self.normal(spec.heads).exp(),
            self.normal(spec.heads) * 4,
            self.normal(spec.v_dim),
            1e-6,
        )
        self.inputs = self.normal(SLOTS + 1, spec.taps - 1, spec.channels)
        self.matrices = self.normal(SLOTS + 1, spec.heads, spec.k_dim, spec.v_dim)
        for _, before, slot in parts:  # a sequence that begins has no use for what lies there
            if not before:
                self.inputs[slot] = self.matrices[slot] = torch.nan
        rows = [([0] * new, before, [0] * 16) for new, before, _ in parts]
        self.batch = chunk_batch(rows, state_slots=[slot for *_, slot in parts])
        self.mixed = rows_at_guard_page(self.normal(len(self.batch.tokens), spec.width), spec.width + 5)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    def run(self, kernel: RecurrentKernel) -> tuple[Tensor, LayerState]:
        state = LayerState(self.spec, kernel, self.inputs.clone(), self.matrices.clone())
        return kernel.run(self.mixed, state, self.batch, self.weights), state


@pytest.mark.parametrize("case", STEPS)
@pytest.mark.parametrize("name", SPECS)
def test_outputs_and_states(case: str, name: str) -> None:
    layer = Layer(SPECS[name], STEPS[case])
    (out, state), (wanted, wanted_state) = layer.run(CpuDelta()), layer.run(ReferenceDelta())
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.inputs, wanted_state.inputs, rtol=0, atol=0)
    torch.testing.assert_close(state.matrices, wanted_state.matrices, rtol=1e-4, atol=1e-5)


def test_slots_outside_the_states_are_refused() -> None:
    with pytest.raises(LowbitError, match="a sequence's slot is outside the states"):
        Layer(SPECS["odd heads"], [(2, 3, 1), (1, 1, SLOTS)]).run(CpuDelta())


def test_gates_of_rows_that_lie_apart() -> None:
    random = torch.Generator().manual_seed(1)
    x, gate = (torch.randn(5, 37, generator=random) * 8 for _ in range(2))
    out = sigmoid_gate(rows_at_guard_page(x, 41), rows_at_guard_page(gate, 50))
    torch.testing.assert_close(out, x * torch.sigmoid(gate), rtol=1e-5, atol=1e-6)
