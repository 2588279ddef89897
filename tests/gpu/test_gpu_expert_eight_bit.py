"""Experts whose weights and inputs are codes of 8 bits: each product against its layers one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from contract.test_linear_kernels import canonical
from gpu.test_gpu_experts import (
    E4M3,
    EXPERTS,
    INT8,
    WEIGHTS,
    Input,
    K,
    Pair,
    Shape,
    check,
    choices,
    make,
    random,
    static,
)
from gpu.test_gpu_experts import INPUTS as KNOWN_INPUTS
from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.elementwise import gated_activation
from lowbit.kernels.gpu import runtime
from lowbit.kernels.gpu.expert_rows import sort_pairs
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import ActivationScheme

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

Made = Callable[[Shape], QuantizedTensor]


def of(name: str, group: int = 0, rows: int = 1) -> Made:
    return lambda shape: canonical(name, group, "f32", shape=shape, block_rows=rows)


def every(scheme: ActivationScheme) -> Input:
    return lambda expert, columns: InputTransform(scheme)


CASES: dict[str, tuple[Made, Input]] = {
    "int8 by int8": (of("int8"), KNOWN_INPUTS["int8 per token"]),
    "int8 with zero points": (of("int8"), KNOWN_INPUTS["int8 with a zero point"]),
    "int8 in groups": (of("int8", 64), every(ActivationScheme(INT8, (1, 64)))),
    "int8, static scales": (
        of("int8"),
        lambda expert, columns: static(expert, ActivationScheme(INT8, (0, 0), "static")),
    ),
    "fp8 in blocks": (of("e4m3", 64, 64), every(ActivationScheme(E4M3, (1, 128), limit=448.0))),
    "fp8 in narrow blocks": (of("e4m3", 128, 24), every(ActivationScheme(E4M3, (1, 64)))),
    "fp8 by channel": (of("e4m3"), every(ActivationScheme(E4M3, (1, 0)))),
    "fp8 by channel, e5m2": (of("e5m2"), every(ActivationScheme(E4M3, (1, 0)))),
    "fp8, one scale": (WEIGHTS["e4m3 tensor"], KNOWN_INPUTS["one static scale"]),
    "fp8, static scales": (WEIGHTS["e4m3 tensor"], KNOWN_INPUTS["static scales"]),
}


@pytest.fixture(params=[False, True], ids=["float16 dots", "fp8 dots"])
def fp8(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Ampere's way, and the later ones'; the interpreter can do both."""
    if not torch.cuda.is_available():
        monkeypatch.setattr("lowbit.kernels.gpu.expert_eight_bit.fp8_dots", lambda _: request.param)
    return bool(request.param)


def first_products(pair: Pair, x: Tensor, block_m: int, activation: str | None) -> tuple[Tensor, Tensor]:
    """Gate and up of each pair of token and expert, and the layers' own."""
    device = pair.grouped.gate_up[0].weights[0].buffers["codes"].device
    mixture = pair.grouped.grouped
    assert all(part.eight_bit is not None for part in mixture.gate_up.parts)
    chosen = choices(len(x), EXPERTS, K)
    sorted_ = sort_pairs(chosen.to(device), EXPERTS, block_m)
    found = mixture.gate_up(x.to(device), K, chosen.to(device).flatten(), sorted_, activation)
    layers = pair.oracle.gate_up
    wanted = torch.cat([layers[e](x[p // K : p // K + 1].float()) for p, e in enumerate(chosen.flatten())])
    return found.cpu(), wanted if activation is None else gated_activation(wanted, activation)


def compare(found: Tensor, wanted: Tensor, within: float) -> None:
    assert torch.equal(found.isnan(), wanted.isnan())
    size = wanted.nan_to_num().abs().amax(1, keepdim=True).clamp(min=1e-30)
    error = ((found.float() - wanted).nan_to_num() / size).abs().max()
    assert error <= within, error


def products(name: str, tokens: int, block_m: int, activation: str | None, device: torch.device) -> None:
    weight, given = CASES[name]
    pair = make(device, weight, given, bias=True, hidden=192, inner=64)
    found, wanted = first_products(pair, random(tokens, 192).bfloat16().float(), block_m, activation)
    compare(found, wanted, 1e-5)


@pytest.mark.usefixtures("fp8")
@pytest.mark.parametrize("name", ["fp8 in blocks", "fp8 by channel, e5m2"])
def test_a_gated_product_of_floats(name: str, device: torch.device) -> None:
    products(name, 3, 16, "silu", device)


@pytest.mark.parametrize("name", ["fp8 in narrow blocks", "fp8, one scale", "fp8, static scales"])
def test_scales_of_floats(name: str, device: torch.device) -> None:
    products(name, 3, 16, None, device)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("int8")])
def test_a_gated_product_of_whole_numbers(name: str, device: torch.device) -> None:
    products(name, 3, 16, "silu", device)


def test_gates_get_taller_tiles_where_there_are_enough(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 rows, as fp8 instructions take; where there are too few programs, 32."""
    if device.type == "cuda":
        pytest.skip("shapes follow from the device")
    monkeypatch.setattr("lowbit.kernels.gpu.expert_eight_bit.fp8_dots", lambda _: True)
    heights = []
    for processors in (4, 1000):
        monkeypatch.setattr(
            "lowbit.kernels.gpu.expert_eight_bit.multiprocessors", lambda _, count=processors: count
        )
        with runtime.recording() as launches:
            products("fp8 in blocks", 3, 16, "silu", device)
        heights += [dict(one.constants)["BLOCK_N"] for one in launches if one.function == "_multiply"]
    assert heights == [64, 32]


@pytest.mark.slow
@pytest.mark.usefixtures("fp8")
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("block_m", [32, 64, 128])
@pytest.mark.parametrize("name", CASES)
def test_every_block(name: str, block_m: int, activation: str | None, device: torch.device) -> None:
    products(name, 40, block_m, activation, device)


@pytest.mark.parametrize("name", ["int8 by int8", "fp8 by channel"])
def test_whole_mixtures_of_odd_sizes(name: str, device: torch.device) -> None:
    """40 columns of the second product: rows of no whole number of 16 bytes, and short tiles of outputs."""
    weight, given = CASES[name]
    pair = make(device, weight, given, bias=True, hidden=48, inner=40)
    mixture = pair.grouped.grouped
    assert all(part.eight_bit is not None for part in (*mixture.gate_up.parts, *mixture.down.parts))
    check(pair, 3, device, torch.bfloat16, within=0.03, again=True)


@pytest.mark.parametrize("name", ["int8, static scales", "fp8 in blocks"])
def test_nan_stays_in_its_token(name: str, device: torch.device) -> None:
    weight, given = CASES[name]
    pair = make(device, weight, given, hidden=192, inner=64)
    x = random(3, 192).bfloat16().float()
    x[1, 5] = torch.nan
    found, wanted = first_products(pair, x, 16, "silu")
    assert wanted[K : 2 * K].isnan().any(), "by the definition"
    assert found[K : 2 * K].isnan().all() and found[:K].isfinite().all() and found[2 * K :].isfinite().all()


def test_parts_of_unlike_kinds(device: torch.device) -> None:
    """Gate and up of their own: one meets codes of 8 bits, the other's act-order does not."""
    uneven = lambda shape: canonical("uint4", 32, zero=True, order=True, shape=shape)  # noqa: E731
    pair = make(device, [uneven, of("int8")], KNOWN_INPUTS["int8 per token"], hidden=96, inner=64)
    assert [part.eight_bit is None for part in pair.grouped.grouped.gate_up.parts] == [True, False]
    check(pair, 3, device, within=0.02)


@pytest.mark.parametrize(
    ("weight", "given"),
    [
        (of("int8"), every(ActivationScheme(E4M3, (1, 0)))),
        (of("e4m3"), KNOWN_INPUTS["int8 per token"]),
        (of("e4m3", 32, 32), every(ActivationScheme(E4M3, (1, 32)))),
        (of("e4m3"), KNOWN_INPUTS["multipliers"]),
        (of("int8"), KNOWN_INPUTS["static zeros"]),
        (of("e4m3"), every(ActivationScheme(number_format("e2m1"), (1, 16)))),
        (of("int8"), KNOWN_INPUTS["as they are"]),
    ],
)
def test_what_is_multiplied_as_bfloat16(weight: Made, given: Input, device: torch.device) -> None:
    pair = make(device, weight, given)
    assert all(part.eight_bit is None for part in pair.grouped.grouped.gate_up.parts)
