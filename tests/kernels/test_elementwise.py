"""Norms, gated activations and rotary embedding against float64, and row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from guard_page import at_guard_page, rows_at_guard_page
from lowbit.errors import LowbitError
from lowbit.kernels import elementwise, native
from lowbit.kernels.elementwise import (
    RotaryTable,
    activated,
    add,
    add_rms_norm,
    affine,
    apply_rotary,
    gated_activation,
    gather_columns,
    gather_rows,
    layer_norm,
    rms_norm,
    rms_norm_heads,
    softcap,
)
from sparse_memory import far_apart

pytestmark = pytest.mark.usefixtures("poisoned")

WIDTHS = [1, 15, 16, 17, 64, 576, 1000, 4099]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}


@pytest.fixture(autouse=True, params=["native", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every test runs on the native library and on torch."""
    if request.param == "torch":
        monkeypatch.setattr(elementwise, "_functions", lambda: None)
    elif native.library() is None:
        pytest.skip("the native library was not built")
    native.set_threads(2)
    yield request.param


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def norm64(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(width: int) -> None:
    x, weight = normal(5, width) * torch.tensor([1e-3, 1.0, 30.0, 1e4, 0.0])[:, None], normal(width, seed=1)
    torch.testing.assert_close(
        rms_norm(x, weight, 1e-5).double(), norm64(x, weight, 1e-5), rtol=1e-6, atol=1e-9
    )
    wanted, place = rms_norm(x, weight, 1e-5), x.clone()
    assert rms_norm(place, weight, 1e-5, out=place) is place
    assert place.equal(wanted)


@pytest.mark.parametrize("width", WIDTHS)
def test_add_rms_norm(width: int) -> None:
    x, residual, weight = normal(3, width), 10 * normal(3, width, seed=1), normal(width, seed=2)
    total = x + residual
    found = add_rms_norm(x, residual, weight, 1e-6)
    assert residual.equal(total)
    torch.testing.assert_close(found.double(), norm64(total, weight, 1e-6), rtol=1e-6, atol=1e-9)


def layer_norm64(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    apart = x.double() - x.double().mean(-1, keepdim=True)
    normed = apart / (apart.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    return normed if bias is None else normed + bias.double()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm(width: int, biased: bool) -> None:
    x = normal(5, width) * torch.tensor([1e-3, 1.0, 30.0, 1e4, 0.0])[:, None] + 3
    weight, bias = normal(width, seed=1), normal(width, seed=2) if biased else None
    wanted = layer_norm64(x, weight, bias, 1e-5)
    found = layer_norm(x, weight, bias, 1e-5)
    # The mean is a float32 number: what it is off by is 1 part in 2^24 of it.
    torch.testing.assert_close(found[1:].double(), wanted[1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[:1].double(), wanted[:1], rtol=1e-3, atol=1e-3)
    place = x.clone()
    assert layer_norm(place, weight, bias, 1e-5, out=place) is place
    assert place.equal(found)


@pytest.mark.parametrize("width", [1, 16, 24])
def test_layer_norm_in_groups(width: int) -> None:
    """A weight for each group, and one for all; rows that are views of wider ones."""
    rows = normal(4, 5 * width + 7)[:, 2 : 2 + 5 * width]
    before = rows.clone()
    weight, bias = normal(5 * width, seed=1), normal(5 * width, seed=2)
    apart = before.view(4, 5, width)
    wanted = layer_norm64(apart, weight.view(5, width), bias.view(5, width), 1e-5)
    found = layer_norm(rows, weight, bias, 1e-5, groups=5)
    torch.testing.assert_close(found.double(), wanted.flatten(1), rtol=1e-5, atol=1e-5)
    wanted = layer_norm64(apart, weight[:width], None, 1e-5).flatten(1)
    torch.testing.assert_close(
        layer_norm(rows, weight[:width].clone(), None, 1e-5, 5, out=rows).double(),
        wanted,
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_add(width: int) -> None:
    x, total = normal(3, width), normal(3, width, seed=1)
    wanted = x + total
    assert add(x, total) is total
    assert total.equal(wanted)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("width", WIDTHS)
def test_gated_activation(name: str, width: int) -> None:
    gate = torch.cat([3 * normal(3, width), torch.linspace(-100, 100, 2 * width).view(2, width)])
    up = normal(5, width, seed=1)
    wanted = ACTIVATIONS[name](gate.double()) * up.double()
    found = gated_activation(torch.cat([gate, up], 1), name)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=1e-6 if "gelu" in name else 1e-9)
    out = torch.full((5, width), torch.nan)
    assert gated_activation(torch.cat([gate, up], 1), name, out=out) is out
    assert out.equal(found)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("width", WIDTHS)
def test_activation_without_a_gate(name: str, width: int) -> None:
    x = torch.cat([3 * normal(3, width), torch.linspace(-100, 100, 2 * width).view(2, width)])
    wanted = ACTIVATIONS[name](x.double())
    inside = torch.full((5, 2 * width), 7.0)
    inside[:, :width] = x
    assert activated(inside[:, :width], name).data_ptr() == inside.data_ptr()
    atol = 1e-6 if "gelu" in name else 1e-9
    torch.testing.assert_close(inside[:, :width].double(), wanted, rtol=2e-6, atol=atol)
    assert bool((inside[:, width:] == 7).all())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_at_the_ends(name: str, path: str) -> None:
    if path == "torch":
        pytest.skip("torch's own gelu of infinity is NaN on some CPUs")
    gate = torch.tensor([[torch.inf, torch.nan, 3e38, -3e38, 0.0]])
    found = gated_activation(torch.cat([gate, torch.ones_like(gate)], 1), name)
    large = torch.inf if name == "relu2" else 3e38
    torch.testing.assert_close(found, torch.tensor([[torch.inf, torch.nan, large, 0.0, 0.0]]), equal_nan=True)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_clamped_activation(width: int) -> None:
    gate = torch.cat([6 * normal(3, width), torch.linspace(-100, 100, 2 * width).view(2, width)])
    up = 6 * normal(5, width, seed=1)
    near, within = gate.double().clamp(max=7), up.double().clamp(-7, 7)
    wanted = (within + 1) * near * torch.sigmoid(1.702 * near)
    found = gated_activation(torch.cat([gate, up], 1), "swiglu_clamped")
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=1e-6)
    nan = torch.tensor([[torch.nan, 1.0, torch.inf, 1.0, torch.nan, -torch.inf]])
    assert gated_activation(nan, "swiglu_clamped").isnan().tolist() == [[True, True, False]]


def test_unknown_activation() -> None:
    with pytest.raises(LowbitError, match=r"'tanh' is not supported; supported: silu, gelu_tanh"):
        gated_activation(normal(1, 4), "tanh")


def rotated64(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """Complex multiplication by e^(i angle): angles (tokens, half)."""
    half, wide = angles.shape[1], x.double().clone()
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # (tokens, 1, half)
    if interleaved:
        first, second = wide[..., 0 : 2 * half : 2], wide[..., 1 : 2 * half : 2]
    else:
        first, second = wide[..., :half], wide[..., half : 2 * half]
    turned = torch.complex(first, second) * turn
    first.copy_(turned.real)
    second.copy_(turned.imag)
    return wide


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "rotary_dim"), [(64, 64), (80, 32), (128, 128), (16, 6), (40, 40)])
def test_rotary_in_views_of_a_fused_output(dim: int, rotary_dim: int, interleaved: bool) -> None:
    heads, kv_heads, tokens = 6, 2, 9
    frequencies = 10000.0 ** (-torch.arange(rotary_dim // 2) / (rotary_dim / 2))
    table = RotaryTable.build(frequencies, 100, 1.0, torch.device("cpu"))
    positions = torch.tensor([0, 1, 2, 50, 99, 7, 7, 63, 98], dtype=torch.int32)
    fused = normal(tokens, heads + 2 * kv_heads, dim)
    before = fused.clone()
    q, k, v = fused.split((heads, kv_heads, kv_heads), dim=1)
    apply_rotary(q, k, table, positions, interleaved)
    angles = (positions[:, None].float() * frequencies).double()
    wanted = rotated64(before[:, : heads + kv_heads], angles, interleaved)
    torch.testing.assert_close(fused[:, : heads + kv_heads].double(), wanted, rtol=1e-6, atol=2e-6)
    assert v.equal(before[:, heads + kv_heads :])


def test_rotary_magnitude() -> None:
    table = RotaryTable.build(torch.tensor([0.5, 0.25]), 8, 1.5, torch.device("cpu"))
    q, k = normal(3, 1, 4), normal(3, 1, 4, seed=1)
    norms = q.norm(dim=-1)
    apply_rotary(q, k, table, torch.tensor([0, 3, 7], dtype=torch.int32))
    torch.testing.assert_close(q.norm(dim=-1), 1.5 * norms)


@pytest.mark.parametrize("position", [-1, 8])
def test_a_position_outside_the_table(position: int, path: str) -> None:
    if path == "torch" and position < 0:
        pytest.skip("torch counts negative indices from the end")
    table = RotaryTable.build(torch.tensor([0.5, 0.25]), 8, 1.0, torch.device("cpu"))
    q, k = normal(3, 1, 4), normal(3, 1, 4)
    with pytest.raises((LowbitError, IndexError), match=r"position|out of bounds"):
        apply_rotary(q, k, table, torch.tensor([0, position, 7], dtype=torch.int32))


def operation(name: str, x: Tensor, weight: Tensor) -> Tensor:
    if name == "rms_norm":
        return rms_norm(x, weight, 1e-5)
    if name == "add_rms_norm":
        return add_rms_norm(x, 2 * x.flip(-1), weight, 1e-5)
    if name == "layer_norm":
        return layer_norm(x, weight, weight, 1e-5)
    if name == "add":
        return add(x, 2 * x.flip(-1))
    return gated_activation(torch.cat([x, weight.expand_as(x)], 1), name)


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "layer_norm", "add", *ACTIVATIONS])
@pytest.mark.parametrize("width", [17, 576])
def test_a_row_does_not_depend_on_the_others(name: str, width: int, path: str) -> None:
    if path == "torch":
        pytest.skip("torch's rows may differ in the last bit")
    x, weight = normal(200, width), normal(width, seed=1)
    together = operation(name, x, weight)
    for rows in (1, 2, 77):
        assert torch.cat([operation(name, part, weight) for part in x.split(rows)]).equal(together)
    native.set_threads(1)
    assert operation(name, x, weight).equal(together)


def test_other_dtypes_and_shapes_run_in_torch() -> None:
    x, weight = normal(2, 3, 64).bfloat16(), normal(64, seed=1)
    found = rms_norm(x, weight, 1e-5)
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found, norm64(x, weight, 1e-5).bfloat16())
    residual = x.clone()
    assert add_rms_norm(x, residual, weight, 1e-5).shape == x.shape
    assert residual.equal(x + x)
    assert gated_activation(x).shape == (2, 3, 32)
    table = RotaryTable.build(torch.ones(32), 4, 1.0, torch.device("cpu"))
    apply_rotary(x, residual, table, torch.tensor([0, 3], dtype=torch.int32))
    torch.testing.assert_close(x[0], normal(2, 3, 64).bfloat16()[0])


def test_strided_rows() -> None:
    wide, weight = normal(6, 200), normal(64, seed=1)
    view, dense = wide[:, 10:74], wide[:, 10:74].contiguous()
    assert rms_norm(view, weight, 1e-5).equal(rms_norm(dense, weight, 1e-5))
    assert gated_activation(view).equal(gated_activation(dense))
    residual = torch.zeros(6, 100)[:, :64]
    assert add_rms_norm(view, residual, weight, 1e-5).equal(rms_norm(dense, weight, 1e-5))


def results(x: Tensor, gate_up: Tensor, heads: Tensor, place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Every operation on x (rows, width), gate_up (rows, 2 width) and heads (rows, 3, 4).

    ``place`` makes an output, a vector or a copy that an operation works on in place.
    """
    rows, width = x.shape
    weight = place(normal(1, width, seed=1))[0]
    unset, short = torch.full_like(x, torch.nan), torch.arange(rows - 1, -1, -1)
    table = RotaryTable.build(torch.tensor([0.5, 0.25]), 8, 1.0, torch.device("cpu"))
    residual, k, factor = place(2 * x.flip(1)), place(heads[:, :1]), normal(rows, seed=5)
    turned, normed, capped = place(heads), place(heads), place(x)
    apply_rotary(turned, k, table, torch.arange(rows, dtype=torch.int32))
    rms_norm_heads(normed, normal(4, seed=3), 1e-5)
    softcap(capped, 0.5)
    return [
        rms_norm(x, weight, 1e-5, out=place(unset)),
        add_rms_norm(x, residual, weight, 1e-5),
        residual,
        layer_norm(x, weight, weight, 1e-5, out=place(unset)),
        add(x, place(2 * x)),
        *(gated_activation(gate_up, name, out=place(unset)) for name in ACTIVATIONS),
        affine(x, column=weight, factor=factor, number=0.7, divisor=3.0, bias=weight, out=place(unset)),
        affine(x, factor=factor[:1]),
        gather_rows(x, short),
        gather_columns(x, torch.arange(width - 1, -1, -1)),
        turned,
        k,
        normed,
        capped,
    ]


@pytest.mark.parametrize("width", [1, 33])
def test_rows_past_two_to_the_31(width: int) -> None:
    """Rows that lie gigabytes apart, of inputs, outputs and what is changed in place."""
    x, gate_up, heads = normal(3, width), normal(3, 2 * width, seed=1), normal(3, 3, 4, seed=2)

    def place(values: Tensor) -> Tensor:
        return values.clone() if len(values) == 1 else far_apart(values)

    found = results(far_apart(x), far_apart(gate_up), far_apart(heads), place)
    for left, right in zip(found, results(x, gate_up, heads, torch.clone), strict=True):
        assert left.isfinite().all() and left.equal(right)


@pytest.mark.parametrize("width", range(1, 36))
def test_nothing_past_the_end_is_touched(width: int) -> None:
    x, gate_up, heads = normal(3, width), normal(3, 2 * width, seed=1), normal(3, 3, 4, seed=2)

    def place(values: Tensor) -> Tensor:
        return rows_at_guard_page(values.flatten(1), values[0].numel() + 5).view(values.shape)

    found = results(place(x), place(gate_up), place(heads), place)
    for left, right in zip(found, results(x, gate_up, heads, torch.clone), strict=True):
        assert left.isfinite().all() and left.equal(right)
    table = RotaryTable(at_guard_page(normal(4, width)), at_guard_page(normal(4, width)))
    k = at_guard_page(normal(3, 1, 2 * width))
    apply_rotary(k.clone(), k, table, at_guard_page(torch.tensor([3, 3, 3], dtype=torch.int32)))


def test_results_of_other_shapes_are_not_written(path: str) -> None:
    """Native code would write past their ends, and read positions that are not there."""
    x, short, weight = normal(4, 64), torch.zeros(4, 48), torch.ones(64)
    table = RotaryTable(torch.ones(9, 8), torch.zeros(9, 8))
    calls: list[Callable[[], object]] = [
        lambda: rms_norm(x, weight, 1e-6, out=short),
        lambda: rms_norm(x, weight, 1e-6, out=torch.zeros(3, 64)),
        lambda: layer_norm(x, weight, None, 1e-6, out=short),
        lambda: affine(x, number=2.0, out=short),
        lambda: gated_activation(x, out=torch.zeros(4, 16)),
        lambda: apply_rotary(normal(4, 2, 16), normal(4, 1, 16), table, torch.zeros(3, dtype=torch.int32)),
    ]
    for call in calls:
        with pytest.raises(AssertionError if path == "native" else RuntimeError):
            call()
    assert not short.any()
