"""Triton's small operations against native code's (or torch's) float32: every dtype, odd shapes, strides."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from forward_helpers import prompt_logits
from lowbit.checkpoint import open_checkpoint
from lowbit.kernels import elementwise
from lowbit.kernels.elementwise import HeadNorms, RotaryTable
from lowbit.kernels.gpu import runtime
from lowbit.loading import load_model
from models.test_residual_stream import make_checkpoint

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ROUNDING = {BF16: 2.0**-8, F16: 2.0**-10, F32: 2e-6}
ACTIVATIONS = ["silu", "gelu_tanh", "gelu", "swiglu_clamped", "relu", "relu2"]


@contextmanager
def on_cpu():
    """Native code and torch, as without a GPU."""
    before, runtime._state["interpreting"] = runtime._state["interpreting"], False
    try:
        yield
    finally:
        runtime._state["interpreting"] = before


def wide(x: Any) -> Any:
    """float32 on the CPU, a copy."""
    if isinstance(x, Tensor):
        return x.detach().cpu().float().clone() if x.is_floating_point() else x.cpu()
    if isinstance(x, (RotaryTable, HeadNorms)):
        return type(x)(**{name: wide(value) for name, value in vars(x).items()})
    return x


def expected(function: Callable, *arguments: Any, **named: Any) -> tuple[Any, tuple]:
    """What the function gives of float32 copies on the CPU, and the copies after it."""
    copies = tuple(wide(argument) for argument in arguments)
    with on_cpu():
        return function(*copies, **{name: wide(value) for name, value in named.items()}), copies


def close(actual: Tensor, wanted: Tensor, dtype: torch.dtype | None = None) -> None:
    """Equal within half a step of the result's dtype and float32's noise."""
    assert dtype is None or actual.dtype is dtype
    tolerance = ROUNDING[actual.dtype]
    torch.testing.assert_close(actual.cpu().float(), wanted, rtol=tolerance, atol=max(tolerance / 16, 1e-5))


def normal(*shape: int, dtype: torch.dtype = BF16, device: torch.device, seed: int = 0) -> Tensor:
    """Rows that lie in a wider matrix full of NaN."""
    *outer, width = shape
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2
    inside = torch.full((*outer, width + 8), torch.nan, dtype=dtype, device=device)[..., :width]
    return inside.copy_(values)


@contextmanager
def one_launch():
    with runtime.recording() as launches:
        yield
    assert len(launches) == 1
    # A test that records all launches sees these too.
    if runtime._recorded is not None:
        runtime._recorded.extend(launches)


def poisoned(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.full((x.shape[0], x.shape[1] + 3), torch.nan, dtype=dtype, device=x.device)[:, : x.shape[1]]


@pytest.mark.parametrize("width", [1, 17, 576, 4096])
@pytest.mark.parametrize(("of", "into"), [(F32, BF16), (BF16, BF16), (F16, F32)])
def test_rms_norm(width: int, of: torch.dtype, into: torch.dtype, device: torch.device) -> None:
    x, weight = normal(3, width, dtype=of, device=device), torch.rand(width, device=device) + 0.5
    wanted, _ = expected(elementwise.rms_norm, x, weight, 1e-5)
    out = poisoned(x, into)
    with one_launch():
        assert elementwise.rms_norm(x, weight, 1e-5, out) is out
    close(out, wanted)
    close(elementwise.rms_norm(x, weight, 1e-5, dtype=into), wanted, into)
    close(elementwise.rms_norm(x, weight, 1e-5, out=x), wanted, of)


@pytest.mark.parametrize("width", [576, 40])
@pytest.mark.parametrize(("of", "stream"), [(BF16, F32), (F32, F32), (F16, BF16)])
def test_add_rms_norm(width: int, of: torch.dtype, stream: torch.dtype, device: torch.device) -> None:
    x, weight = normal(5, width, dtype=of, device=device), torch.rand(width, device=device)
    residual = normal(5, width, dtype=stream, device=device, seed=1)
    wanted, (_, total, *_) = expected(elementwise.add_rms_norm, x, residual, weight, 1e-6)
    with one_launch():
        out = elementwise.add_rms_norm(x, residual, weight, 1e-6, BF16)
    close(out, wanted, BF16)
    close(residual, total, stream)
    assert out.is_contiguous()


@pytest.mark.parametrize("centred", [False, True])
def test_norms_of_rows_wider_than_a_tile(
    centred: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowbit.kernels.gpu import elementwise as triton_elementwise

    monkeypatch.setattr(triton_elementwise, "WIDEST", 64)
    x, weight = normal(3, 200, device=device) + 1, torch.rand(200, device=device)
    residual = normal(3, 200, dtype=F32, device=device, seed=1)
    if centred:
        wanted, _ = expected(elementwise.layer_norm, x, weight, weight, 1e-5)
        close(elementwise.layer_norm(x, weight, weight, 1e-5), wanted)
        return
    wanted, (_, total, *_) = expected(elementwise.add_rms_norm, x, residual, weight, 1e-5)
    close(elementwise.add_rms_norm(x, residual, weight, 1e-5, BF16), wanted)
    close(residual, total)
    wanted, _ = expected(elementwise.rms_norm, x, weight, 1e-5)
    close(elementwise.rms_norm(x, weight, 1e-5), wanted)


@pytest.mark.parametrize(("heads", "dim"), [(1, 128), (5, 80), (9, 64), (3, 15)])
def test_rms_norm_of_heads_in_a_fused_output(heads: int, dim: int, device: torch.device) -> None:
    fused = normal(3, (heads + 2) * dim, device=device)
    before = fused.clone()
    view = fused[:, dim : (heads + 1) * dim].unflatten(1, (heads, dim))
    weight = torch.rand(dim, device=device)
    wanted, _ = expected(elementwise.rms_norm_heads, view, weight, 1e-6)
    with one_launch():
        elementwise.rms_norm_heads(view, weight, 1e-6)
    close(view, wanted, BF16)
    assert torch.equal(fused[:, :dim], before[:, :dim])
    assert torch.equal(fused[:, -dim:], before[:, -dim:])


@pytest.mark.parametrize(("groups", "width", "spread"), [(1, 577, False), (4, 32, False), (4, 33, True)])
@pytest.mark.parametrize("biased", [False, True])
def test_layer_norm(groups: int, width: int, spread: bool, biased: bool, device: torch.device) -> None:
    x = normal(3, groups * width, dtype=F32, device=device) + 3
    weight = torch.rand(groups * width if spread else width, device=device)
    bias = torch.rand_like(weight) if biased else None
    wanted, _ = expected(elementwise.layer_norm, x, weight, bias, 1e-5, groups)
    with one_launch():
        out = elementwise.layer_norm(x, weight, bias, 1e-5, groups, dtype=BF16)
    close(out, wanted, BF16)
    close(elementwise.layer_norm(x, weight, bias, 1e-5, groups, out=x), wanted, F32)


@pytest.mark.parametrize("width", [5, 1500])
def test_add(width: int, device: torch.device) -> None:
    x, total = normal(7, width, device=device), normal(7, width, dtype=F32, device=device, seed=1)
    wanted, _ = expected(elementwise.add, x, total)
    with one_launch():
        assert elementwise.add(x, total) is total
    close(total, wanted, F32)


@pytest.mark.parametrize("width", [5, 1100])
@pytest.mark.parametrize("of", [BF16, F32])
def test_affine(width: int, of: torch.dtype, device: torch.device) -> None:
    x = normal(3, width, dtype=of, device=device)
    column, bias = torch.rand(width, device=device), torch.rand(width, dtype=BF16, device=device)
    for more in (
        {},
        {"number": 0.25, "divisor": 3.0, "out": poisoned(x, F32)},
        {"column": column, "bias": bias, "factor": torch.rand(3, 1, device=device), "number": 2.0},
        {"factor": torch.rand(1, device=device), "bias": bias, "out": x},
    ):
        wanted, _ = expected(elementwise.affine, x, **(more | {"out": None}))
        with one_launch():
            out = elementwise.affine(x, **more)
        close(out, wanted, more.get("out", x).dtype)


def test_softcap(device: torch.device) -> None:
    x = normal(3, 1100, dtype=F32, device=device) * 40
    x[0, :4] = torch.tensor([1e30, -1e30, 0.0, 1e-3])
    wanted, _ = expected(elementwise.softcap, x, 30.0)
    with one_launch():
        elementwise.softcap(x, 30.0)
    close(x, wanted)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_gathers(dtype: torch.dtype, device: torch.device) -> None:
    x = normal(5, 70, dtype=dtype, device=device)
    rows, order = torch.tensor([4, 0, 0], device=device), torch.randperm(70).to(device)
    with one_launch():
        taken = elementwise.gather_rows(x, rows)
    with one_launch():
        moved = elementwise.gather_columns(x, order)
    assert torch.equal(taken, x[rows]) and torch.equal(moved, x[:, order])
    assert elementwise.gather_rows(x, rows[:0]).shape == (0, 70)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, device: torch.device) -> None:
    gate_up = normal(3, 2 * 300, device=device) * 3
    wanted, _ = expected(elementwise.gated_activation, gate_up, activation)
    with one_launch():
        close(elementwise.gated_activation(gate_up, activation), wanted, BF16)
    out = poisoned(gate_up[:, :300], F32)
    elementwise.gated_activation(gate_up, activation, out)
    torch.testing.assert_close(out.cpu(), wanted, rtol=1e-5, atol=1e-5)
    if activation != "swiglu_clamped":
        wanted, _ = expected(elementwise.activated, gate_up, activation)
        with one_launch():
            close(elementwise.activated(gate_up, activation), wanted)


def test_a_clamp_keeps_nan(device: torch.device) -> None:
    gate_up = torch.ones(2, 8, dtype=BF16, device=device)
    gate_up[0, 1] = gate_up[1, 6] = torch.nan
    nan = elementwise.gated_activation(gate_up, "swiglu_clamped").isnan()
    assert nan.nonzero().tolist() == [[0, 1], [1, 2]]


ROTARY = [  # heads of q and k, dimensions, turned ones, tokens
    (5, 1, 64, 64, 3),
    (9, 3, 80, 32, 4),
    (1, 1, 128, 64, 1),
    (4, 2, 24, 24, 2),
]


@pytest.mark.parametrize(("q_heads", "k_heads", "dim", "turned", "tokens"), ROTARY)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_rotary(
    q_heads: int,
    k_heads: int,
    dim: int,
    turned: int,
    tokens: int,
    interleaved: bool,
    normed: bool,
    device: torch.device,
) -> None:
    fused = normal(tokens, (q_heads + 2 * k_heads) * dim, device=device)
    heads = fused.unflatten(1, (-1, dim))
    q, k, v = heads.split((q_heads, k_heads, k_heads), 1)
    before = v.clone()
    frequencies = 100.0 ** -(torch.arange(turned // 2) / turned)
    table = RotaryTable.build(frequencies, 50, 1.1, device)
    positions = torch.tensor([7, 49, 0, 3], dtype=torch.int32, device=device)[:tokens]
    norms = None
    if normed:
        norms = HeadNorms(torch.rand(dim, device=device) + 0.5, torch.rand(dim, device=device), 1e-6)
    _, (q_wanted, k_wanted, *_) = expected(
        elementwise.apply_rotary, q, k, table, positions, interleaved, norms
    )
    with one_launch():
        elementwise.apply_rotary(q, k, table, positions, interleaved, norms)
    close(q, q_wanted)
    close(k, k_wanted)
    assert torch.equal(v, before)


def test_nothing_to_do_launches_nothing(device: torch.device) -> None:
    x, weight = torch.empty(0, 8, dtype=BF16, device=device), torch.ones(8, device=device)
    with runtime.recording() as launches:
        assert elementwise.rms_norm(x, weight, 1e-5).shape == (0, 8)
        elementwise.add(x, x)
        elementwise.affine(x)
        elementwise.softcap(x, 1.0)
        elementwise.activated(x, "silu")
        elementwise.gated_activation(x)
    assert not launches


@pytest.mark.parametrize("name", ["Qwen3", "Glm4"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the batches of prompt_logits lie on the CPU")
def test_a_model_whose_small_operations_run_in_triton(name: str, tmp_path: Path) -> None:
    """Strided views of a fused output, in place and in turn, as a forward pass has them."""
    make_checkpoint(name, tmp_path)
    prompts = [[5, 9, 100], [7]]
    with on_cpu():
        model = load_model(open_checkpoint(str(tmp_path)), device="cpu", kv_cache_dtype="f32")
        wanted = torch.cat(prompt_logits(model, prompts)).log_softmax(1)
    with runtime.recording() as launches:
        found = torch.cat(prompt_logits(model, prompts)).log_softmax(1)
    assert {"_norm", "_rotary", "_gather"} <= {launch.function for launch in launches}
    assert (wanted.exp() * (wanted - found)).sum(1).max() < 1e-4
