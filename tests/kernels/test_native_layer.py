"""A layer in one native call against its steps one by one: equal bits, whatever is done around a product."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.test_experts import DELAYED, INPUTS, WEIGHTS, random
from lowbit.errors import LowbitError
from lowbit.kernels import choose, native
from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.activation_state import ActivationState
from lowbit.kernels.elementwise import affine, gated_activation
from lowbit.kernels.native_layer import MOST_COLUMNS, NativeLayer
from lowbit.kernels.packed_linear import INPUT_GROUPS, Description, NativeWeight, set_input
from lowbit.kernels.settled import settled
from lowbit.kernels.step_plan import Arena, Recorder
from lowbit.layers.linear import Linear

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native library")
CPU = torch.device("cpu")
OUT, IN = 96, 64
TOKENS = (1, 7, 9, 64, 70)
TOGETHER = ("fp8 per tensor", "delayed", "outliers of an expert's own rows")
BY_ROWS = [name for name in INPUTS if name not in TOGETHER]


def packed(name: str, shape: tuple[int, int] = (OUT, IN)) -> NativeWeight:
    weight = WEIGHTS[name](shape)
    made = choose(weight.scheme, weight.shape, CPU).kernel.pack(weight, CPU)
    assert isinstance(made, NativeWeight)
    return made


def step_by_step(
    weight: NativeWeight, transform: InputTransform | None, bias: Tensor | None, x: Tensor
) -> Tensor:
    factor = None
    if transform is not None:
        x, factor = transform(x)
    y = weight.kernel.linear(x, weight)
    if factor is not None:
        affine(y, factor=factor, out=y)
    return y if bias is None else affine(y, bias=bias, out=y)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("given", BY_ROWS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_bits_of_its_steps(name: str, given: str, bias: bool) -> None:
    weight = packed(name)
    transform = settled(weight, INPUTS[given](1, IN))
    added = random(OUT, seed=3) if bias else None
    layer = NativeLayer.of(weight, transform, added)
    assert layer is not None and layer.halves
    for tokens in TOKENS:
        x = random(tokens, 2 * IN, seed=tokens)[:, :IN]  # rows further apart than they are long
        wanted = step_by_step(weight, transform, added, x)
        assert torch.equal(layer(x), wanted) and (wanted != 0).any()
        wide = torch.zeros(tokens, OUT + 5)
        layer(x, wide[:, 2 : 2 + OUT])
        assert torch.equal(wide[:, 2 : 2 + OUT], wanted)
        assert not wide[:, :2].any() and not wide[:, 2 + OUT :].any()
        for activation in ("silu", "gelu_tanh", "swiglu_clamped"):
            assert torch.equal(layer(x, activation=activation), gated_activation(wanted, activation))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", ["int4 g32", "uint4 g32 zero", "e2m1 g32 e8m0 (MXFP4)"])
def test_int8_groups_that_the_kernel_rounds(name: str) -> None:
    weight = packed(name)
    assert set_input(weight, INPUT_GROUPS)
    layer = NativeLayer.of(weight, None, None)
    assert layer is not None
    x = random(21, IN)
    x[4, 3] = torch.nan  # whole numbers cannot say it
    found, wanted = layer(x, activation="silu"), gated_activation(weight.kernel.linear(x, weight), "silu")
    assert found[4].isnan().all() and torch.equal(found.nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("given", BY_ROWS)
def test_a_row_does_not_depend_on_its_neighbours(given: str) -> None:
    weight = packed("int8 channel")
    layer = NativeLayer.of(weight, settled(weight, INPUTS[given](0, IN)), random(OUT))
    assert layer is not None
    x = random(65, IN)
    alone = torch.cat([layer(row.unsqueeze(0), activation="gelu") for row in x])
    assert torch.equal(layer(x, activation="gelu"), alone)
    native.set_threads(1)
    one = layer(x, activation="gelu")
    native.set_threads(2)
    assert torch.equal(one, alone)


def test_what_it_leaves_to_its_steps() -> None:
    weight = packed("e4m3 channel")
    for name in ("fp8 per tensor", "delayed"):
        assert NativeLayer.of(weight, INPUTS[name](0, IN), None) is None
    state = ActivationState.fresh(DELAYED.delay, 448.0)
    linear = Linear("layer", [weight], None, [InputTransform(DELAYED, state=state)])
    assert linear.gated(random(3, IN), "silu").shape == (3, OUT // 2)
    assert NativeLayer.of(weight, None, torch.zeros(OUT, dtype=torch.bfloat16)) is None
    wide = replace(weight, columns=MOST_COLUMNS + 1)
    assert NativeLayer.of(wide, None, None) is not None  # x stays as it is
    assert NativeLayer.of(wide, InputTransform(multiplier=torch.ones(MOST_COLUMNS + 1)), None) is None


def test_a_gate_that_is_no_whole_blocks_runs_step_by_step() -> None:
    weight = packed("int4 g32", (80, IN))
    linear = Linear("gate_up", [weight], None)
    x = random(5, IN)
    wanted = gated_activation(weight.kernel.linear(x, weight), "silu")
    assert torch.equal(linear.gated(x, "silu"), wanted)


def test_x_of_another_width_is_an_error() -> None:
    layer = NativeLayer.of(packed("int4 g32"), None, None)
    assert layer is not None
    with pytest.raises(LowbitError, match="input has 60 columns, weight 64"):
        layer(random(2, 60))


def test_it_is_recorded() -> None:
    weight = packed("int8 channel")
    linear = Linear("gate_up", [weight], random(OUT), [settled(weight, INPUTS["int8 per token"](0, IN))])
    x = random(3, IN)
    recorder = Recorder(Arena(1 << 20))
    logits, plan = recorder.record(lambda: linear.gated(x, "silu"))
    assert plan is not None, recorder.reason
    assert [operation.name for operation in plan.operations] == ["layer"]
    x += 1.0
    assert torch.equal(plan.run(), linear.gated(x, "silu"))
    assert Description.from_address(weight.address).rows == OUT and logits.shape == (3, OUT // 2)
