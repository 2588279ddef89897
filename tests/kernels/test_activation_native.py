"""Native input quantization: bit for bit what torch defines, over cruel data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from guard_page import at_guard_page, rows_at_guard_page
from little_memory import memory_error_of
from lowbit.kernels import native
from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.activation_state import ActivationState
from lowbit.numerics.llm_int8 import llm_int8_inputs
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import ActivationScheme, Delay
from sparse_memory import far_apart

pytestmark = pytest.mark.usefixtures("poisoned")

INT8, INT4, E4M3, E5M2, E2M1, E2M3, E3M2, E8M0, BF16 = (
    number_format(name) for name in ("int8", "int4", "e4m3", "e5m2", "e2m1", "e2m3", "e3m2", "e8m0", "bf16")
)
INF, NAN = float("inf"), float("nan")

DYNAMIC = [
    ActivationScheme(INT8, (1, 0), limit=127.0),
    ActivationScheme(INT8, (1, 0), limit=127.5),
    ActivationScheme(INT8, (1, 0), limit=127.0, floor=1e-10 / 127),
    ActivationScheme(INT8, (1, 0), limit=127.5, floor=2.0**-23, input="bf16", scale=BF16, reciprocal=True),
    ActivationScheme(INT4, (1, 0), limit=7.5),
    ActivationScheme(INT8, (1, 0), symmetric=False),
    ActivationScheme(E4M3, (1, 0), limit=448.0),
    ActivationScheme(E4M3, (1, 0), limit=448.0, upper_bound=10.0),
    ActivationScheme(E4M3, (1, 0), limit=448.0, input="bf16", scale=BF16),
    ActivationScheme(E5M2, (1, 0)),
    ActivationScheme(E4M3, (1, 32), limit=448.0),
    ActivationScheme(E4M3, (1, 128), limit=448.0),
    ActivationScheme(E4M3, (1, 128), limit=448.0, scale=E8M0),
    ActivationScheme(E4M3, (1, 32), scale=E8M0),
    ActivationScheme(E4M3, (1, 32), scale=E8M0, round_up=1.75),
    ActivationScheme(E2M1, (1, 32), scale=E8M0),
    ActivationScheme(E2M3, (1, 32), scale=E8M0),
    ActivationScheme(E3M2, (1, 32), scale=E8M0, round_up=1.9375),
    ActivationScheme(E2M1, (1, 16), scale=number_format("e4m3")),
    ActivationScheme(INT8, (1, 128), limit=127.0),
]
OF_A_BATCH = [
    llm_int8_inputs(),
    llm_int8_inputs(0.25),
    ActivationScheme(INT8, (1, 0), limit=127.0, outliers=6.0, reciprocal=True),
    ActivationScheme(INT8, (0, 0), limit=127.0),
    ActivationScheme(E4M3, (0, 0), limit=448.0),
    ActivationScheme(E4M3, (0, 0), limit=448.0, input="bf16", scale=BF16),
]
ON_CPUS = [ActivationScheme(E2M1, (1, 32), scale=E8M0, spread=2.92247856 / 6)]
STATIC = [ActivationScheme(fmt, (0, 0), "static") for fmt in (INT8, E4M3, E2M1)]


def name(scheme: ActivationScheme) -> str:
    return (
        f"{scheme} {scheme.limit:g} {scheme.floor:g} {scheme.input} {scheme.round_up:g} {scheme.reciprocal}"
    )


@pytest.fixture(autouse=True)
def needs_a_library() -> None:
    if native.library() is None:
        pytest.skip("runs on torch here: nothing to compare")


def cruel(columns: int, seed: int = 0) -> Tensor:
    """Rows of every size; zeros of both signs, halves, subnormals, limits, powers of two and more."""
    generator = torch.Generator().manual_seed(seed + columns)
    rows = [
        torch.randn(columns, generator=generator) * 10.0**power for power in (-44, -38, -8, -2, 0, 2, 8, 37)
    ]
    rows += [torch.zeros(columns), -torch.zeros(columns)]
    ties = torch.randint(-300, 300, (columns,), generator=generator) / 2.0
    ties[0] = 127.0
    rows += [ties, ties / 16, torch.randint(-24, 25, (columns,), generator=generator) / 4.0]
    powers = torch.exp2(torch.randint(-20, 20, (columns,), generator=generator).float())
    rows += [powers, powers * (1 + 2**-23), -powers * (1 - 2**-24)]
    rows += [torch.full((columns,), 448.0), torch.linspace(-900, 900, columns)]
    return torch.stack(rows)


def broken(columns: int) -> Tensor:
    """Finite rows, and rows with NaN or infinity somewhere."""
    x = cruel(columns, 7)
    for row, column, value in ((1, 0, NAN), (3, columns - 1, INF), (4, columns // 2, -INF), (6, 0, -NAN)):
        x[row, column] = value
    x[7, 0], x[7, columns - 1] = INF, NAN
    return x


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal bits, signs of zeros too; any NaN is as good as another."""
    if a is None or b is None:
        return a is b
    nan = a.isnan()
    bits = torch.where(nan, 0, a.view(torch.int32)) == torch.where(nan, 0, b.view(torch.int32))
    return torch.equal(nan, b.isnan()) and bool(bits.all())


def check(transform: InputTransform, x: Tensor) -> None:
    expected = transform.in_torch(x)
    assert transform.native is not None, "there is a native form"
    found = transform(x)
    assert same(found[0], expected[0]), f"values differ at {(found[0] != expected[0]).nonzero()[:5].tolist()}"
    assert same(*(None if pair[1] is None else pair[1].flatten() for pair in (found, expected)))


@pytest.mark.parametrize("columns", [1, 31, 96, 200])
@pytest.mark.parametrize("scheme", DYNAMIC + ON_CPUS + OF_A_BATCH, ids=name)
def test_native_is_torch_bit_for_bit(scheme: ActivationScheme, columns: int) -> None:
    transform = InputTransform(scheme)
    for x in (cruel(columns), broken(columns), cruel(columns)[:1], cruel(columns)[:0]):
        check(transform, x)
    wide = torch.cat((cruel(columns), torch.full((18, 5), NAN)), 1)
    check(transform, wide[:, :columns])  # rows that do not follow each other


@pytest.mark.parametrize("scale", [0.0, 0.37, 2.0**-130])
@pytest.mark.parametrize("zero", [None, 3.0, -17.0])
@pytest.mark.parametrize("scheme", STATIC, ids=str)
def test_static_scales_and_zero_points(scheme: ActivationScheme, zero: float | None, scale: float) -> None:
    transform = InputTransform(
        scheme, static_scale=torch.tensor(scale), static_zero=None if zero is None else torch.tensor(zero)
    )
    for columns in (5, 64):
        check(transform, cruel(columns))
        check(transform, broken(columns))


def test_an_outer_scale_and_a_multiplier() -> None:
    scheme = ActivationScheme(E2M1, (1, 16), scale=number_format("e4m3"))
    powers = ActivationScheme(E2M1, (1, 32), scale=E8M0)
    multiplier = torch.logspace(-2, 2, 72)
    for outer in (0.0, 0.013, 7.0):
        check(InputTransform(scheme, multiplier, static_scale=torch.tensor(outer)), broken(72))
        check(InputTransform(powers, multiplier, static_scale=torch.tensor(outer + 4 / 3)), broken(72))
    check(InputTransform(None, multiplier), broken(72))
    check(InputTransform(ActivationScheme(INT8, (1, 0), limit=127.0), multiplier), cruel(72))


@pytest.mark.parametrize("scheme", DYNAMIC + ON_CPUS, ids=name)
def test_a_token_does_not_see_its_neighbours(scheme: ActivationScheme) -> None:
    x, transform = broken(200), InputTransform(scheme)
    together, factors = transform(x)
    for row in range(len(x)):
        alone, factor = transform(x[row : row + 1])
        assert same(alone[0], together[row])
        assert factors is None or same(factor[0], factors[row])  # type: ignore[index]


@pytest.mark.parametrize("scheme", DYNAMIC + ON_CPUS + OF_A_BATCH, ids=name)
def test_nan_and_infinity_never_become_numbers_nor_touch_other_rows(scheme: ActivationScheme) -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    x[1, 5], x[2, 40] = NAN, INF
    values, factor = InputTransform(scheme)(x)
    values = values if factor is None else values * factor
    assert torch.isfinite(values[[0, 3]]).all()
    assert values[1, 5].isnan(), "NaN stays"
    if scheme.upper_bound == 0 and scheme.scale.name != "e4m3":  # these saturate, by their definition
        assert not torch.isfinite(values[2, 40])


@pytest.mark.parametrize("rows", [2, 300])
def test_outlier_columns_on_many_threads(rows: int) -> None:
    """Wide and tall enough for several tasks of rows and of columns; each column's outlier in another row."""
    x = torch.randn(rows, 777, generator=torch.Generator().manual_seed(6)).clamp(-5, 5)
    for column in range(0, 777, 5):
        x[column % rows, column] = 6.0 + column
    x[1, 1] = NAN
    check(InputTransform(llm_int8_inputs()), x)
    check(InputTransform(llm_int8_inputs(), torch.linspace(0.1, 3, 777)), x)


def test_per_tensor_scales_see_all_finite_tokens() -> None:
    x = torch.tensor([[1.0, -2.0], [8.0, 3.0], [100.0, NAN]])
    codes, scale = InputTransform(ActivationScheme(INT8, (0, 0), limit=127.0))(x)
    assert scale is not None and torch.equal(scale, torch.tensor([8.0]) / 127)
    assert codes[:2].tolist() == [[16.0, -32.0], [127.0, 48.0]] and codes[2].isnan().all()


def test_torchao_int8_rounds_its_scale_to_bfloat16() -> None:
    """x, amax and amax / 127.5 in bfloat16, the rest in float32; at least 2^-23."""
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(5)) * torch.tensor(
        [[1.0], [1e-9], [300.0]]
    )
    codes, scale = InputTransform(DYNAMIC[3])(x)
    rounded = x.bfloat16()
    expected = (rounded.abs().amax(1, keepdim=True) / 127.5).clamp(min=2**-23).float()
    assert scale is not None and torch.equal(scale, expected) and scale[1] == 2.0**-23
    steps = rounded.float() * (1.0 / expected)
    assert torch.equal(codes, steps.round().clamp(-128, 127))


@pytest.mark.parametrize("delay", [Delay(1), Delay(5, 1), Delay(16, 0, "most_recent")], ids=str)
def test_delayed_scales_are_the_same_in_torch(delay: Delay) -> None:
    scheme = ActivationScheme(E4M3, (0, 0), "delayed", limit=448.0, delay=delay)
    ours, theirs = (InputTransform(scheme, state=ActivationState.fresh(delay, 448.0)) for _ in range(2))
    assert ours.state is not None and theirs.state is not None
    for step, x in enumerate((cruel(33), cruel(33)[8:10], broken(33), cruel(48)[3:5])):
        ours.state.scale.fill_(0.1 + step)
        theirs.state.scale.fill_(0.1 + step)
        (a, factor), (b, factor_in_torch) = ours(x), theirs.in_torch(x)
        assert same(a, b) and same(factor, factor_in_torch)
        assert same(ours.state.amax_history, theirs.state.amax_history)


@pytest.mark.parametrize("scheme", DYNAMIC + ON_CPUS + OF_A_BATCH, ids=name)
def test_nothing_past_the_end_is_touched(scheme: ActivationScheme) -> None:
    for columns in (*range(1, 36), 127, 129):
        x, multiplier = cruel(columns)[3:9], at_guard_page(torch.linspace(0.5, 2, columns))
        check(InputTransform(scheme, multiplier), rows_at_guard_page(x, columns + 3))


@pytest.mark.parametrize("scheme", DYNAMIC + ON_CPUS + OF_A_BATCH, ids=name)
def test_rows_past_two_to_the_31(scheme: ActivationScheme) -> None:
    check(InputTransform(scheme), far_apart(cruel(40)[3:6]))


@pytest.mark.skipif(native.library() is None, reason="no native library")
def test_no_memory_to_stage_rows_is_an_error() -> None:
    """A rotation of 64 MiB goes through as much memory of a thread's own."""
    said = memory_error_of(
        """
import torch
from lowbit.kernels.activation_native import Buffers, NativeQuantizer
from lowbit.kernels.rotation import Rotator
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.rotation import Rotation
from lowbit.numerics.scheme import ActivationScheme

width = 1 << 24
turns = (torch.zeros(1, width, dtype=torch.int32), torch.zeros(1, width), torch.zeros(1, width))
rotation = Rotation(2, partners=turns[0], cosines=turns[1], sines=turns[2])
scheme = ActivationScheme(number_format("int8"), (1, 0), limit=127.0)
quantizer = NativeQuantizer.of(scheme, Buffers(None, None, None, None, None, Rotator(rotation)), 127.0)
x = torch.zeros(1, width)

def work():
    leave(96 << 20)
    quantizer.stage(x)
"""
    )
    assert said == "no memory to quantize inputs"
