"""The native gated delta rule beside its definition in torch: parts of any length, states, rows apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from guard_page import rows_at_guard_page
from little_memory import memory_error_of
from lowbit.errors import LowbitError
from lowbit.kernels import native
from lowbit.kernels.recurrent import LayerState, RecurrentKernel, StateSpec
from lowbit.kernels.recurrent_cpu import CpuDelta, sigmoid_gate
from lowbit.kernels.recurrent_reference import ReferenceDelta
from recurrent_layers import SLOTS, Layer, Parts, batch_of, poisoned

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(native.library() is None, reason="no native library"),
]

CPU = torch.device("cpu")
SPECS = {
    "odd heads": StateSpec(k_heads=2, heads=4, k_dim=20, v_dim=16, taps=4),
    "wide keys, two taps": StateSpec(k_heads=1, heads=3, k_dim=80, v_dim=48, taps=2),
    "a head, no past": StateSpec(k_heads=1, heads=1, k_dim=16, v_dim=32, taps=1),
}
STEPS = {
    "a prompt among others": [(11, 0, 2), (1, 17, 0), (3, 1, 1), (9, 3, 4)],
    "one token each": [(1, 7, 4), (1, 0, 0), (1, 1, 2)],
}


def run(layer: Layer, kernel: RecurrentKernel, parts: Parts) -> tuple[Tensor, LayerState]:
    """The same inputs for each kernel."""
    random, width = torch.Generator().manual_seed(4), layer.spec.width
    mixed = torch.randn(sum(new for new, *_ in parts), width, generator=random)
    state = layer.state(kernel)
    poisoned(state, parts)
    return kernel.run(rows_at_guard_page(mixed, width + 5), state, batch_of(parts, CPU), layer.weights), state


@pytest.mark.parametrize("case", STEPS)
@pytest.mark.parametrize("name", SPECS)
def test_outputs_and_states(case: str, name: str) -> None:
    layer, parts = Layer(SPECS[name], CPU), STEPS[case]
    (out, state), (wanted, wanted_state) = (
        run(layer, kernel, parts) for kernel in (CpuDelta(), ReferenceDelta())
    )
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.inputs, wanted_state.inputs, rtol=0, atol=0)
    torch.testing.assert_close(state.matrices, wanted_state.matrices, rtol=1e-4, atol=1e-5)


def test_slots_outside_the_states_are_refused() -> None:
    with pytest.raises(LowbitError, match="a sequence's slot is outside the states"):
        run(Layer(SPECS["odd heads"], CPU), CpuDelta(), [(2, 3, 1), (1, 1, SLOTS)])


def test_gates_of_rows_that_lie_apart() -> None:
    random = torch.Generator().manual_seed(1)
    x, gate = (torch.randn(5, 37, generator=random) * 8 for _ in range(2))
    out = sigmoid_gate(rows_at_guard_page(x, 41), rows_at_guard_page(gate, 50))
    torch.testing.assert_close(out, x * torch.sigmoid(gate), rtol=1e-5, atol=1e-6)


def test_no_memory_for_heads_is_an_error() -> None:
    """A task's buffers are two of 128 MiB."""
    said = memory_error_of(
        """
import torch
from lowbit.kernels.recurrent import DeltaParameters, LayerState, StateSpec
from lowbit.kernels.recurrent_cpu import CpuDelta
from recurrent_layers import batch_of

spec = StateSpec(k_heads=1, heads=2, k_dim=1 << 20, v_dim=16, taps=1)
vectors = ((1, spec.channels), (2,), (2,), (16,))
weights = DeltaParameters(*(torch.zeros(shape) for shape in vectors), 1e-6)
state = LayerState(spec, CpuDelta(), torch.zeros(2, 0, spec.channels), torch.zeros(2, 2, 1 << 20, 16))
mixed, batch = torch.zeros(1, spec.width), batch_of([(1, 3, 0)], torch.device("cpu"))

def work():
    leave(96 << 20)
    CpuDelta().run(mixed, state, batch, weights)
"""
    )
    assert said == "recurrent layer: no memory for its heads"
