"""Weights that meet int8 inputs: the rule in torch and the product in float64, for every scheme that can.

Sums of whole numbers are exact, so a row is the same in any company here too. Run under every instruction
set by kernels/test_instruction_sets.py.
"""

from __future__ import annotations

import pytest
import torch

from contract.test_linear_kernels import CPU, ROWS_OF_X, WEIGHTS, normal_form
from kernel_inputs import unrounded
from lowbit.kernels import native
from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.cpu_blocks import CpuBlocks
from lowbit.kernels.packed_linear import INPUT_CODES, INPUT_FLOATS, INPUT_GROUPS, NativeWeight, set_input
from lowbit.kernels.settled import settled
from lowbit.numerics.int8_inputs import INT8_GROUPS
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import ActivationScheme

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native library")
BLOCKS = CpuBlocks()
PER_TOKEN = ActivationScheme(number_format("int8"), (1, 0))


def able() -> list[str]:
    """The schemes whose codes are whole numbers."""
    found = []
    for name, make in WEIGHTS.items():
        weight = make()
        if BLOCKS.refuses(weight.scheme, weight.shape, CPU) is None and BLOCKS.takes_int8(
            weight.scheme, weight.shape
        ):
            found.append(name)
    return found


ABLE = able()


def packed_for(name: str, kind: int) -> NativeWeight:
    packed = BLOCKS.pack(WEIGHTS[name](), CPU)
    assert isinstance(packed, NativeWeight)
    if not set_input(packed, kind):
        pytest.skip("8-bit codes meet inputs of -127 … 127 only on this instruction set")
    return packed


def inputs(tokens: int, columns: int) -> torch.Tensor:
    """Numbers of very different sizes, a group of zeros and one of a single spike."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, columns, generator=generator)
    x *= torch.rand(tokens, 1, generator=generator) * 100
    x[:, 32:64] = 0
    x[-1, :32] = 0
    x[-1, 7] = 3e4
    return x


Exact = tuple[torch.Tensor, torch.Tensor]  # float64: what meets whole numbers; outliers, which meet x itself


def close(found: torch.Tensor, seen: torch.Tensor, x: torch.Tensor, exact: Exact) -> None:
    wanted, scale = torch.zeros(found.shape).double(), torch.full(found.shape, 1e-30).double()
    for met, numbers in zip((seen.double(), x.double()), exact, strict=True):
        wanted += met @ numbers.T
        scale += met.abs() @ numbers.abs().T
    assert ((found.double() - wanted).abs() / scale).max() < 2e-6


def sound(name: str) -> Exact:
    weight = WEIGHTS[name]()
    if weight.outliers is not None:
        return unrounded(weight)
    exact = normal_form(weight).double()
    if exact.abs().max() > 1e6:
        pytest.skip("random bytes of this type decode to numbers no model has")
    return exact, torch.zeros_like(exact)


@pytest.mark.parametrize("name", ABLE)
def test_groups_are_rounded_as_the_rule_says(name: str) -> None:
    exact, packed = sound(name), packed_for(name, INPUT_GROUPS)
    order = packed.buffers.get("column_order")
    rule = InputTransform(INT8_GROUPS)
    for tokens in ROWS_OF_X:
        x = inputs(tokens, packed.columns)
        stored = x if order is None else x[:, order]
        seen, factor = rule.in_torch(stored)
        assert factor is None
        logical = seen if order is None else torch.empty_like(seen).index_copy_(1, order, seen)
        out = torch.full((tokens, packed.shape[0]), float("nan"))
        found = packed.kernel.linear(x, packed, out)
        assert not found.isnan().any(), "poison was left"
        close(found, logical, x, exact)


@pytest.mark.parametrize("name", ABLE)
def test_whole_numbers_are_multiplied_as_they_are(name: str) -> None:
    exact, packed = sound(name), packed_for(name, INPUT_CODES)
    for tokens in ROWS_OF_X:
        x = torch.randint(
            -128, 128, (tokens, packed.columns), generator=torch.Generator().manual_seed(tokens)
        )
        x[0, :40] = -128
        close(packed.kernel.linear(x.float(), packed), x, x, exact)


@pytest.mark.parametrize("kind", [INPUT_GROUPS, INPUT_CODES])
@pytest.mark.parametrize("name", ABLE)
def test_a_row_does_not_depend_on_its_company(name: str, kind: int) -> None:
    packed = packed_for(name, kind)
    x = inputs(130, packed.columns).round().clamp(-127, 127)
    together = packed.kernel.linear(x, packed).nan_to_num()
    for row in (0, 1, 63, 64, 129):
        assert torch.equal(packed.kernel.linear(x[row : row + 1], packed)[0].nan_to_num(), together[row])
    assert torch.equal(packed.kernel.linear(x[40:77], packed).nan_to_num(), together[40:77])


@pytest.mark.parametrize("kind", [INPUT_GROUPS, INPUT_CODES])
@pytest.mark.parametrize("fault", [float("nan"), float("inf"), float("-inf")])
def test_faults_end_their_own_row_alone(kind: int, fault: float) -> None:
    packed = packed_for("int4 g32", kind)
    x = inputs(9, packed.columns).round().clamp(-127, 127)
    clean = packed.kernel.linear(x, packed)
    x[3, 200] = fault
    found = packed.kernel.linear(x, packed)
    assert found[3].isnan().all()
    rest = [row for row in range(9) if row != 3]
    assert torch.equal(found[rest], clean[rest])


def test_float_inputs_are_not_rounded() -> None:
    exact, packed = sound("int8 channel f32"), packed_for("int8 channel f32", INPUT_FLOATS)
    for tokens in ROWS_OF_X:
        x = inputs(tokens, packed.columns)
        found = packed.kernel.linear(x, packed)
        close(found, x, x, exact)
        assert torch.equal(packed.kernel.linear(x[-1:], packed)[0], found[-1])
    assert not set_input(BLOCKS.pack(WEIGHTS["int4 g32"](), CPU), INPUT_FLOATS)


def test_the_smallest_numbers_round_to_zero() -> None:
    packed = packed_for("int4 g32", INPUT_GROUPS)
    x = torch.full((1, packed.columns), 1e-40)
    assert (packed.kernel.linear(x, packed) == 0).all()


def test_which_schemes_can() -> None:
    wanted = {"gguf q4_1", "gguf q8_0", "gguf q4_k", "gguf q6_k", "int7 g64", "uint8 g32 zero", "gguf mxfp4"}
    assert wanted <= set(ABLE)
    assert not {"dense bf16", "nf4 g64", "e4m3 channel f32"} & set(ABLE)


def test_what_is_left_of_a_transform() -> None:
    packed = BLOCKS.pack(WEIGHTS["int4 g32"](), CPU)
    assert isinstance(packed, NativeWeight)
    groups, token = InputTransform(INT8_GROUPS), InputTransform(PER_TOKEN)
    assert settled(packed, None) is None and packed.description.input == 0
    assert settled(packed, token) is token and packed.description.input == INPUT_CODES
    assert settled(packed, groups) is None and packed.description.input == INPUT_GROUPS
    asymmetric = InputTransform(ActivationScheme(number_format("int8"), (1, 0), symmetric=False))
    fresh = BLOCKS.pack(WEIGHTS["int4 g32"](), CPU)
    assert isinstance(fresh, NativeWeight)
    assert settled(fresh, asymmetric) is asymmetric and fresh.description.input == 0
    floats = BLOCKS.pack(WEIGHTS["nf4 g64"](), CPU)
    assert settled(floats, groups) is groups, "the rule runs in front of what cannot do it"
