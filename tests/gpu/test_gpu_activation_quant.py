"""Inputs quantized by Triton kernels: the numbers of the definition in torch on a CPU, over cruel data."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.test_activation_native import DYNAMIC, OF_A_BATCH, STATIC, broken, cruel, name
from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.activation_state import ActivationState, ActivationStates
from lowbit.kernels.gpu import runtime
from lowbit.kernels.gpu.activation_quant import GpuQuantizer
from lowbit.kernels.parallel import Parallel
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.scheme import ActivationScheme, Delay

# Triton's interpreter computes in numpy, which warns of what is meant here.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INT8, UINT8, E4M3, E5M2, E2M1 = (number_format(n) for n in ("int8", "uint8", "e4m3", "e5m2", "e2m1"))
IN_KERNELS = DYNAMIC + OF_A_BATCH
Make = Callable[[torch.device], InputTransform]


def same(found: Tensor, wanted: Tensor) -> bool:
    """Equal numbers; any NaN is as good as another, and zeros have no sign."""
    return torch.equal(found.cpu().nan_to_num(nan=-7.25), wanted.nan_to_num(nan=-7.25))


class Louder(Parallel):
    """Two ranks, of which the other one has numbers of twice the size."""

    def largest(self, x: Tensor) -> Tensor:
        return 2 * x


OF_RANKS = [
    ActivationScheme(INT8, (1, 0)),
    ActivationScheme(E4M3, (1, 0), limit=448.0),
    ActivationScheme(INT8, (1, 0), symmetric=False),
    ActivationScheme(UINT8, (0, 0)),
    ActivationScheme(E4M3, (0, 0), limit=448.0, input="bf16", scale=number_format("bf16"), reciprocal=True),
]


@pytest.mark.parametrize("columns", [40, 5000])
@pytest.mark.parametrize("scheme", OF_RANKS, ids=name)
def test_scales_of_ranks_are_those_of_whole_rows(
    scheme: ActivationScheme, columns: int, device: torch.device
) -> None:
    """In kernels, between which the ranks tell each other once what they saw of each row."""
    x = torch.randn(4, columns, generator=torch.Generator().manual_seed(1)).to(device)
    x[1, 7], x[3, 9] = torch.nan, torch.inf
    x[0, columns - 1], x[2] = -9.0, 0.0
    transform = InputTransform(scheme, across=Louder(0, 2))
    with runtime.recording() as launches:
        found, factor = transform(x)
    if runtime._recorded is not None:
        runtime._recorded.extend(launches)
    first = "find_peaks" if scheme.symmetric else "find_ends"
    assert [launch.function for launch in launches] == [first, "quantize"]
    wanted, wanted_factor = InputTransform(scheme, across=Louder(0, 2)).in_torch(x.cpu())
    assert factor is not None and wanted_factor is not None and same(factor, wanted_factor)
    assert same(found, wanted) and not torch.equal(found[0], InputTransform(scheme)(x)[0][0])
    assert transform.gpu is not None
    codes = transform.gpu.codes(x)
    values = codes.codes.cpu().float() - (0.0 if codes.zeros is None else codes.zeros.cpu()[:, None])
    broken_rows = wanted.isnan().any(1, keepdim=True)
    worth = torch.where(broken_rows, torch.nan, wanted * wanted_factor)
    assert broken_rows.any() and same(values * codes.scales.cpu()[:, None], worth)


def test_delayed_scales_on_ranks_need_no_other_rank(device: torch.device) -> None:
    scheme = ActivationScheme(E4M3, (0, 0), "delayed", limit=448.0, delay=Delay(4))
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(1)).to(device)
    ranks, alone = Louder(0, 2), Parallel()
    histories, wanted = [], x.abs().amax().cpu()
    for across in (ranks, alone):
        states = ActivationStates()
        transform = InputTransform(scheme, state=states.add("layer", scheme, device, across), across=across)
        with runtime.recording() as launches:
            transform(x)
            assert transform.state is not None and transform.state.amax_history[0].cpu() == wanted
            states.update()
        if runtime._recorded is not None:
            runtime._recorded.extend(launches)
        assert [launch.function for launch in launches] == ["quantize", "update_delayed"]
        histories.append(states.state_dict()["layer.amax_history"])
    assert torch.equal(histories[0], 2 * histories[1]), "they tell each other at the end of a step"


def on(transform: InputTransform, device: torch.device) -> InputTransform:
    def move(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    state = transform.state
    if state is not None:
        state = ActivationState(
            state.delay, state.limit, state.scale.clone().to(device), state.amax_history.clone().to(device)
        )
    return InputTransform(
        transform.scheme,
        move(transform.multiplier),
        move(transform.static_scale),
        move(transform.static_zero),
        state,
    )


def check(transform: InputTransform, x: Tensor, device: torch.device) -> None:
    """What a call gives, and what codes and their scales are worth."""
    there = on(transform, device)
    assert there.gpu is not None, "there are kernels for it"
    found, factor = there(x.to(device))
    wanted, wanted_factor = transform.in_torch(x)
    assert found.dtype is x.dtype or x.numel() == 0
    wanted_x = wanted.to(x.dtype)
    assert same(found, wanted_x), f"differs at {(found.cpu() != wanted_x).nonzero()[:5].tolist()}"
    assert (factor is None) == (wanted_factor is None)
    if factor is not None and wanted_factor is not None:
        assert factor.dtype is torch.float32 and same(factor.flatten(), wanted_factor.float().flatten())


def check_codes(transform: InputTransform, x: Tensor, device: torch.device) -> None:
    there = on(transform, device)
    assert there.gpu is not None and transform.scheme is not None
    made = there.gpu.codes(x.to(device))
    wanted, factor = transform.in_torch(x)
    group = transform.scheme.block[1]
    codes = made.codes.cpu().float()
    if made.zeros is not None:
        codes = codes - made.zeros.cpu()[:, None]
    if group:
        assert made.scales.shape == (-(-x.shape[1] // group), len(x))
        scales = made.scales.cpu().T.repeat_interleave(group, 1)[:, : x.shape[1]]
        nan = wanted.isnan()
        padded = torch.nn.functional.pad(nan, (0, -x.shape[1] % group)).unflatten(1, (-1, group))
        broken_groups = padded.any(-1, keepdim=True).expand_as(padded).flatten(1)[:, : x.shape[1]]
        values = torch.where(broken_groups, torch.nan, wanted)
    else:
        assert factor is not None
        scales = made.scales.cpu()[:, None]
        values = torch.where(wanted.isnan().any(1, keepdim=True), torch.nan, wanted * factor)
    assert same(codes * scales, values)


FEW = [0, 3, 7, 10, 13]  # of cruel's rows: 3 and 7 are broken


@pytest.mark.parametrize("scheme", IN_KERNELS, ids=name)
def test_kernels_are_the_definition(scheme: ActivationScheme, device: torch.device) -> None:
    transform = InputTransform(scheme)
    wide = torch.cat((broken(31), torch.full((18, 5), torch.nan)), 1)
    check(transform, wide[:, :31], device)  # rows that do not follow each other
    check(transform, broken(200)[FEW].bfloat16(), device)
    if scheme.number_format.bits == 8 and not scheme.outliers:
        check_codes(transform, broken(100)[FEW], device)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", IN_KERNELS, ids=name)
def test_16_bit_inputs(scheme: ActivationScheme, device: torch.device) -> None:
    """bfloat16 is what real models have."""
    check(InputTransform(scheme), broken(96)[FEW].bfloat16(), device)
    check(InputTransform(scheme), broken(1)[FEW].half(), device)
    if scheme.number_format.bits == 8 and not scheme.outliers:
        check_codes(InputTransform(scheme), cruel(128)[4:7].bfloat16(), device)


@pytest.mark.parametrize("scale", [0.0, 0.37])
@pytest.mark.parametrize("zero", [None, -17.0])
@pytest.mark.parametrize("scheme", [*STATIC, ActivationScheme(UINT8, (0, 0), "static")], ids=str)
def test_static(scheme: ActivationScheme, zero: float | None, scale: float, device: torch.device) -> None:
    transform = InputTransform(
        scheme, static_scale=torch.tensor(scale), static_zero=None if zero is None else torch.tensor(zero)
    )
    check(transform, broken(37)[FEW], device)
    if scheme.number_format.is_integer:
        check_codes(transform, broken(37)[FEW], device)


def test_an_outer_scale_of_nvfp4_and_a_multiplier(device: torch.device) -> None:
    scheme = ActivationScheme(E2M1, (1, 16), scale=number_format("e4m3"))
    multiplier = torch.logspace(-2, 2, 72)
    for outer in (0.0, 0.013):
        check(InputTransform(scheme, multiplier, static_scale=torch.tensor(outer)), broken(72), device)
    for dtype in (torch.float32, torch.bfloat16):  # whose subnormals Triton's interpreter does not read
        check(InputTransform(None, multiplier), broken(72)[4:].to(dtype), device)
        check(InputTransform(DYNAMIC[0], multiplier), cruel(72)[5:13].to(dtype), device)


def test_rows_of_many_blocks(device: torch.device) -> None:
    x = torch.randn(3, 5000, generator=torch.Generator().manual_seed(1))
    x[1, 4999], x[2, 4097] = 50.0, torch.nan
    for scheme in (DYNAMIC[0], DYNAMIC[5], DYNAMIC[11], OF_A_BATCH[3]):
        check_codes(InputTransform(scheme), x.bfloat16(), device)


def test_no_rows(device: torch.device) -> None:
    for scheme in IN_KERNELS:
        check(InputTransform(scheme), torch.empty(0, 64, dtype=torch.bfloat16), device)


def test_what_stays_in_torch(device: torch.device) -> None:
    outliers = ActivationScheme(INT8, (1, 0), outliers=2.0)
    multiplied = InputTransform(outliers, torch.linspace(0.5, 2, 96, device=device))
    for transform in (multiplied, InputTransform(ActivationScheme(E4M3, (1, 48)))):
        assert GpuQuantizer.of(transform) is None
        x = cruel(96)[4:8]
        assert same(transform(x.to(device))[0], transform.in_torch(x.to(device))[0].cpu())


@pytest.mark.parametrize("delay", [Delay(1), Delay(5, 1), Delay(16, 0, "most_recent")], ids=str)
def test_delayed_scales(delay: Delay, device: torch.device) -> None:
    """Several layers over several steps: codes, the largest |x| seen, and what a step's end makes of it."""
    scheme = ActivationScheme(E4M3, (0, 0), "delayed", limit=448.0, delay=delay)
    ours, theirs = ActivationStates(), ActivationStates()
    pairs = [
        (
            InputTransform(scheme, state=ours.add("layer", scheme, device)),
            InputTransform(scheme, state=theirs.add("layer", scheme, torch.device("cpu"))),
        )
        for _ in range(2)
    ]
    finite = cruel(33)[4:8]
    for step, x in enumerate((finite, cruel(33)[8:10], broken(33), finite * 7, finite.bfloat16())):
        for ours_in, theirs_in in pairs[: 1 if step == 1 else 2]:
            (a, factor), (b, wanted) = ours_in(x.to(device)), theirs_in.in_torch(x)
            assert same(a, b.to(x.dtype)) and factor is not None and wanted is not None
            assert same(factor, wanted)
            assert ours_in.state is not None and theirs_in.state is not None
            assert same(ours_in.state.amax_history, theirs_in.state.amax_history)
        ours.update()
        theirs._update_in_torch()
        for key, wanted_state in theirs.state_dict().items():
            assert same(ours.state_dict()[key], wanted_state), (step, key)


def test_delayed_codes(device: torch.device) -> None:
    delay = Delay(4)
    for fmt in (E4M3, E5M2):
        scheme = ActivationScheme(fmt, (0, 0), "delayed", limit=448.0, delay=delay)
        state = ActivationState.fresh(delay, 448.0)
        state.scale.fill_(3.7)
        check_codes(InputTransform(scheme, state=state), broken(40).bfloat16(), device)


def test_it_is_recorded(device: torch.device) -> None:
    x = cruel(64).bfloat16().to(device)
    with runtime.recording() as launches:
        InputTransform(DYNAMIC[0])(x)
    assert [launch.function for launch in launches] == ["quantize"]
