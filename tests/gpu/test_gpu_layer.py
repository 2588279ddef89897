"""Layers of 8-bit weights and 8-bit inputs: quantizer, product, scales, bias and gate against torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from contract.test_linear_kernels import canonical
from kernels.test_activation_native import broken
from kernels.test_experts import random
from lowbit.errors import LowbitError
from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.activation_state import ActivationState
from lowbit.kernels.elementwise import gated_activation
from lowbit.kernels.gpu import eight_bit, runtime
from lowbit.kernels.gpu.activation_quant import Codes
from lowbit.kernels.gpu.eight_bit import EightBitWeight
from lowbit.kernels.gpu.layer import GpuLayer
from lowbit.kernels.gpu.linear import GpuBlocks
from lowbit.kernels.whole_layer import whole_layer
from lowbit.layers.linear import Linear
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import ActivationScheme, Delay

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INT8, UINT8, E4M3, E5M2, E8M0 = (number_format(n) for n in ("int8", "uint8", "e4m3", "e5m2", "e8m0"))
DELAYED = ActivationScheme(E4M3, (0, 0), "delayed", limit=448.0, delay=Delay(4, 1))
OUT, IN = 70, 256  # whose last tile of rows is short; odd columns are asked for by name


def weight(name: str, group: int = 0, rows: int = 1, shape: tuple[int, int] = (OUT, IN)) -> QuantizedTensor:
    return canonical(name, group, "f32", shape=shape, block_rows=rows)


def given(scheme: ActivationScheme, device: torch.device, **numbers: float) -> InputTransform:
    state = None
    if scheme.delay is not None:
        state = ActivationState.fresh(scheme.delay, scheme.limit, device)
        state.scale.fill_(3.0)
    tensors = {name: torch.tensor(value, device=device) for name, value in numbers.items()}
    return InputTransform(scheme, state=state, **tensors)


def expected(
    stored: QuantizedTensor, transform: InputTransform, bias: Tensor | None, x: Tensor, activation: str | None
) -> Tensor:
    """By the definition, in float64."""
    moved = [transform.static_scale, transform.static_zero, transform.multiplier]
    scale, zero, multiplier = (None if t is None else t.cpu() for t in moved)
    state = transform.state
    if state is not None:
        state = ActivationState(state.delay, state.limit, state.scale.cpu(), state.amax_history.clone().cpu())
    values, factor = InputTransform(transform.scheme, multiplier, scale, zero, state).in_torch(x.cpu())
    y = values.double() @ stored.dequantize().double().T
    if factor is not None:
        y = y * factor.double()
    y = y.float() if bias is None else y.float() + bias.cpu()
    return y if activation is None else gated_activation(y, activation)


def check(
    stored: QuantizedTensor,
    transform: InputTransform,
    x: Tensor,
    device: torch.device,
    *,
    bias: bool = True,
    activation: str | None = None,
    into: torch.dtype | None = None,
) -> None:
    added = random(len(stored.codes), seed=3).to(device) if bias else None
    layer = whole_layer(GpuBlocks().pack(stored, device), transform, added)
    assert isinstance(layer, GpuLayer) and layer.halves
    wanted = expected(stored, transform, added, x, activation)
    x = x.to(device)
    out = None
    if into is not None:
        out = torch.full((len(x), wanted.shape[1] + 5), torch.nan, dtype=into, device=device)[:, 2:-3]
    found = layer(x, out, activation)
    assert found.dtype is (into or x.dtype)
    found = found.cpu()
    assert torch.equal(found.isnan(), wanted.isnan())
    rough = found.dtype is not torch.float32
    size = wanted.nan_to_num().abs().amax(1, keepdim=True).clamp(min=1e-30)
    error = ((found.float() - wanted).nan_to_num() / size).abs().max()
    assert error <= (2**-8 if rough else 3e-6), error


WEIGHTS = {
    "int8": ("int8", 0, 1),
    "int8 per tensor": ("int8", 0, 0),
    "e4m3": ("e4m3", 0, 1),
    "e4m3 per tensor": ("e4m3", 0, 0),
    "e5m2": ("e5m2", 0, 1),
}
DYNAMIC = {
    "int8 per token": ActivationScheme(INT8, (1, 0), limit=127.0),
    "int8 with a zero point": ActivationScheme(INT8, (1, 0), symmetric=False),
    "int8 per tensor": ActivationScheme(INT8, (0, 0), limit=127.0),
    "int8 of torchao": ActivationScheme(
        INT8, (1, 0), limit=127.5, floor=2.0**-23, input="bf16", scale=number_format("bf16"), reciprocal=True
    ),
    "int8 in groups": ActivationScheme(INT8, (1, 64)),
    "fp8 per token": ActivationScheme(E4M3, (1, 0)),
    "fp8 below a bound": ActivationScheme(E4M3, (1, 0), upper_bound=1.5),
    "fp8 per tensor": ActivationScheme(E4M3, (0, 0)),
    "e5m2 per token": ActivationScheme(E5M2, (1, 0)),
    "fp8 in groups": ActivationScheme(E4M3, (1, 128)),
    "fp8 in groups under powers of two": ActivationScheme(E4M3, (1, 64), limit=448.0, scale=E8M0),
    "delayed": DELAYED,
    "int8 beside outliers": ActivationScheme(INT8, (1, 0), outliers=2.0, floor=2.0**-31),
}


@pytest.fixture(params=[False, True], ids=["float16 dots", "fp8 dots"])
def fp8(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Ampere's way, and the later ones'; the interpreter can do both."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(eight_bit, "fp8_dots", lambda _: request.param)
    return bool(request.param)


@pytest.mark.parametrize("asked", DYNAMIC)
def test_a_layer_is_its_definition(asked: str, device: torch.device) -> None:
    scheme = DYNAMIC[asked]
    stored = weight("int8" if scheme.number_format.is_integer else "e4m3")
    check(stored, given(scheme, device), random(5, IN).bfloat16(), device)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name: str, device: torch.device) -> None:
    scheme = DYNAMIC["int8 per token" if name.startswith("int8") else "fp8 per token"]
    check(weight(*WEIGHTS[name]), given(scheme, device), random(2, IN).bfloat16(), device)


@pytest.mark.usefixtures("fp8")
@pytest.mark.parametrize("asked", ["fp8 per token", "fp8 in groups", "e5m2 per token"])
@pytest.mark.parametrize(("rows", "activation"), [(1, None), (16, "silu")])
def test_both_ways_to_multiply_8_bit_floats(
    asked: str, rows: int, activation: str | None, device: torch.device
) -> None:
    stored = weight("e4m3", 128 if rows > 1 else 0, rows, (96, 320))
    check(stored, given(DYNAMIC[asked], device), random(2, 320).bfloat16(), device, activation=activation)


@pytest.mark.usefixtures("fp8")
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("e8m0", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_deepseek_blocks(activation: str | None, e8m0: bool, device: torch.device) -> None:
    """Weights in blocks of 128 x 128, inputs in groups of 128; the last of both are short."""
    scheme = ActivationScheme(E4M3, (1, 128), limit=448.0, scale=E8M0 if e8m0 else number_format("f32"))
    stored = weight("e4m3", 128, 128, (256 if activation else 300, 264))
    check(stored, given(scheme, device), random(4, 264).bfloat16(), device, activation=activation)


@pytest.mark.parametrize("group", [64, 128])
def test_whole_numbers_in_groups(group: int, device: torch.device) -> None:
    stored = weight("int8", group, 1)
    for scheme in (DYNAMIC["int8 in groups"], DYNAMIC["int8 per token"]):
        check(stored, given(scheme, device), random(3, IN).bfloat16(), device)


@pytest.mark.parametrize("zero", [None, -11.0])
def test_static_scales(zero: float | None, device: torch.device) -> None:
    numbers = {"static_scale": 0.02} | ({} if zero is None else {"static_zero": zero})
    scheme = ActivationScheme(INT8, (0, 0), "static", symmetric=zero is None)
    check(weight("int8"), given(scheme, device, **numbers), random(3, IN).bfloat16(), device)
    if zero is None:
        scheme = ActivationScheme(E4M3, (0, 0), "static")
        check(weight("e4m3", 0, 0), given(scheme, device, **numbers), random(3, IN), device)
    unsigned = given(ActivationScheme(UINT8, (0, 0), "static"), device, static_scale=0.02, static_zero=128.0)
    check(weight("int8"), unsigned, random(3, IN).bfloat16(), device)


def product(
    kind: str,
    tokens: int,
    shape: tuple[int, int],
    activation: str | None,
    device: torch.device,
    *,
    zero: bool = False,
    group: int = 0,
) -> tuple[Tensor, Tensor]:
    """A product of codes alone, and what it should be."""
    rows, columns = shape
    dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    x, w = (
        (random(count, columns, seed=count) * 50).clamp(-127, 127).to(dtype).to(device)
        for count in (tokens, rows)
    )
    groups = -(-columns // group) if group else 1
    x_scale, w_scale = random(groups, tokens).to(device), random(-(-rows // 64), groups).to(device)
    if not group:
        x_scale, w_scale = x_scale[0], random(rows, seed=2).to(device)
    zeros = torch.arange(tokens, dtype=torch.int32, device=device) - 3 if zero else None
    weight_ = EightBitWeight(w, w_scale, group, 64 if group else 1, w.float().sum(1).int() if zero else None)
    bias = random(rows, seed=4).to(device)
    width = rows if activation is None else rows // 2
    out = torch.full((tokens, width), torch.nan, device=device)
    eight_bit.multiply(Codes(x, x_scale, zeros, None), group, weight_, bias, None, out, activation)

    values, weights = x.double() - (0 if zeros is None else zeros[:, None]), w.double()
    if group:
        values = values * x_scale.T.repeat_interleave(group, 1)[:, :columns]
        weights = weights * w_scale.repeat_interleave(64, 0)[:rows].repeat_interleave(group, 1)[:, :columns]
    else:
        values, weights = values * x_scale[:, None], weights * w_scale[:, None]
    wanted = (values @ weights.T + bias).float()
    return out, wanted if activation is None else gated_activation(wanted, activation)


@pytest.mark.parametrize(
    "tokens", [1, 65, *(pytest.param(count, marks=pytest.mark.slow) for count in (17, 33, 130))]
)
@pytest.mark.parametrize("kind", ["int8", "e4m3"])
def test_every_tile(kind: str, tokens: int, device: torch.device) -> None:
    for activation, shape in ((None, (140, 128)), ("gelu_tanh", (140, 144)), (None, (30, 37))):
        found, wanted = product(kind, tokens, shape, activation, device)
        assert ((found - wanted).abs().max() / wanted.abs().max()) < 1e-5


@pytest.mark.parametrize("tokens", [1, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("kind", "zero", "group"), [("int8", True, 0), ("e4m3", False, 0), ("e4m3", False, 128)]
)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_columns_in_parts(
    kind: str,
    zero: bool,
    group: int,
    tokens: int,
    activation: str | None,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Few rows of many columns: several programs share an output, and always add in the same order."""
    monkeypatch.setattr(eight_bit, "_splits", lambda tiles, blocks, *_: 3 if blocks > 3 else 1)
    found, wanted = product(kind, tokens, (66, 912), activation, device, zero=zero, group=group)
    assert ((found - wanted).abs().max() / wanted.abs().max()) < 1e-5


def test_how_many_parts(device: torch.device) -> None:
    """Two programs a multiprocessor, and no part of less than four blocks."""
    assert eight_bit._splits(1, 3, 1, device) == 1
    assert eight_bit._splits(1, 11, 1, device) == 2
    assert eight_bit._splits(10**6, 100, 1, device) == eight_bit._splits(1, 100, 65, device) == 1


def test_results_of_any_type(device: torch.device) -> None:
    x = random(3, IN)
    types = (torch.float32, torch.bfloat16, torch.float16)
    for given_type, into in zip(types, types[1:] + types[:1], strict=True):
        scheme = DYNAMIC["int8 per token"]
        check(weight("int8"), given(scheme, device), x.to(given_type), device, into=into, bias=False)


@pytest.mark.parametrize("asked", DYNAMIC)
def test_broken_rows_fail_alone(asked: str, device: torch.device) -> None:
    """NaN and infinity make NaN where the definition does, and numbers everywhere else."""
    scheme = DYNAMIC[asked]
    stored = weight("int8" if scheme.number_format.is_integer else "e4m3")
    x = broken(IN)[[3, 5, 6, 7]]
    check(stored, given(scheme, device), x.bfloat16(), device, bias=False)


def test_a_multiplier_comes_first(device: torch.device) -> None:
    multiplier = torch.logspace(-1, 1, IN, device=device)
    transform = InputTransform(DYNAMIC["int8 per token"], multiplier)
    check(weight("int8"), transform, random(3, IN).bfloat16(), device)


def test_whole_sums_do_not_depend_on_tiles(device: torch.device) -> None:
    x, w = (torch.randint(-128, 128, (n, 1312), dtype=torch.int8, device=device) for n in (70, 40))
    scale, weight_ = random(70).to(device), EightBitWeight(w, random(40, seed=1).to(device))

    def multiplied(rows: slice) -> Tensor:
        out = torch.full((len(x[rows]), 40), torch.nan, device=device)
        codes = Codes(x[rows].contiguous(), scale[rows].contiguous(), None, None)
        return eight_bit.multiply(codes, 0, weight_, None, None, out)

    together = multiplied(slice(0, 70))
    for rows in (slice(0, 1), slice(3, 23), slice(10, 50)):
        assert torch.equal(multiplied(rows), together[rows])


def test_no_rows_and_x_of_another_width(device: torch.device) -> None:
    layer = whole_layer(
        GpuBlocks().pack(weight("int8"), device), given(DYNAMIC["int8 per token"], device), None
    )
    assert layer is not None
    assert layer(torch.empty(0, IN, device=device)).shape == (0, OUT)
    with pytest.raises(LowbitError, match=f"input has 60 columns, weight {IN}"):
        layer(torch.zeros(2, 60, device=device))


def test_what_it_leaves_to_its_steps(device: torch.device) -> None:
    int8, fp8 = (given(DYNAMIC[name], device) for name in ("int8 per token", "fp8 per token"))
    mx = given(ActivationScheme(E4M3, (1, 32), scale=E8M0), device)
    outliers = given(ActivationScheme(INT8, (1, 0), outliers=6.0), device)
    multiplied = InputTransform(outliers.scheme, torch.ones(IN, device=device))
    cases = [
        (weight("int8"), None),
        (weight("int8"), fp8),
        (weight("e4m3"), int8),
        (weight("int8"), multiplied),
        (weight("int8", 64), outliers),
        (weight("int4", 32), int8),
        (weight("int8", 32), int8),
        (canonical("e4m3", 32, "e8m0", shape=(OUT, 192)), mx),
        (
            weight("int8"),
            given(ActivationScheme(INT8, (0, 0), "static"), device, static_scale=1.0, static_zero=0.5),
        ),
    ]
    for stored, transform in cases:
        assert GpuLayer.of(GpuBlocks().pack(stored, device), transform, None) is None


@pytest.mark.parametrize("asked", ["int8 per token", "fp8 per token"])
def test_a_linear_uses_it(asked: str, device: torch.device) -> None:
    transform = given(DYNAMIC[asked], device)
    packed = GpuBlocks().pack(weight("int8" if "int8" in asked else "e4m3"), device)
    linear, bias = Linear("layer", [packed], random(OUT).to(device), [transform]), random(OUT).to(device)
    assert bias.shape == (OUT,)
    x = random(3, IN).bfloat16().to(device)
    with runtime.recording() as launches:
        linear.gated(x, "silu")
    assert [launch.function for launch in launches] == ["quantize", "_multiply"]


# ---- The vendor's products: the calls as torch takes them, on a CPU ----


def test_whole_product_of_torch() -> None:
    x = torch.randint(-128, 128, (32, 64), dtype=torch.int8)
    w = torch.randint(-128, 128, (48, 64), dtype=torch.int8)
    assert torch.equal(eight_bit.whole_product(x, w), x.int() @ w.int().T)


@pytest.mark.parametrize("one", [False, True])
def test_scaled_product_of_torch(one: bool) -> None:
    x, w = (random(rows, 64, seed=rows).to(torch.float8_e4m3fn) for rows in (32, 48))
    x_scale, w_scale = random(32).abs(), random(48, seed=1).abs()
    if one:
        x_scale, w_scale = x_scale[:1].expand(32).contiguous(), w_scale[:1].expand(48).contiguous()
    codes = Codes(x, x_scale, None, x_scale[:1] if one else None)
    weight_ = EightBitWeight(w, w_scale, one_scale=w_scale[:1] if one else None)
    bias, out = random(48).bfloat16(), torch.empty(32, 48, dtype=torch.bfloat16)
    assert eight_bit.scales_rows(x.device)
    eight_bit.scaled_product(codes, weight_, bias, out)
    wanted = (x.float() @ w.float().T) * x_scale[:, None] * w_scale + bias.float()
    torch.testing.assert_close(out.float(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_the_vendors_product_knows_no_gates_and_no_views(
    activation: str | None, device: torch.device
) -> None:
    """They come behind it: half of a block's products are those of gates."""
    x, w = (random(rows, 64, seed=rows).to(torch.float8_e4m3fn).to(device) for rows in (32, 48))
    x_scale, w_scale = random(32).abs().to(device), random(48, seed=1).abs().to(device)
    codes, weight_ = Codes(x, x_scale, None, None), EightBitWeight(w, w_scale, one_scale=None)
    wide = torch.full((32, 64), 7.0, dtype=torch.bfloat16, device=device)
    out = wide[:, 8:56] if activation is None else wide[:, 8:32]
    eight_bit._scaled(codes, weight_, None, out, activation)
    wanted = (x.float() @ w.float().T) * x_scale[:, None] * w_scale
    if activation is not None:
        gate, up = wanted.bfloat16().float().chunk(2, 1)
        wanted = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(out.float(), wanted, rtol=2e-2, atol=2e-2)
    assert (wide[:, :8] == 7).all() and (wide[:, 8 + out.shape[1] :] == 7).all()
