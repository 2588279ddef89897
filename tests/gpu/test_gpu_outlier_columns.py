"""LLM.int8 on the GPU: outlier columns found, kept beside codes and multiplied, against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from contract.test_linear_kernels import canonical
from kernels.test_activation_native import broken
from kernels.test_experts import random
from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.elementwise import gated_activation
from lowbit.kernels.gpu import eight_bit, outlier_columns, runtime
from lowbit.kernels.gpu.layer import GpuLayer
from lowbit.kernels.gpu.linear import GpuBlocks
from lowbit.kernels.whole_layer import whole_layer
from lowbit.numerics.llm_int8 import llm_int8_inputs

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def inputs(tokens: int, columns: int, outliers: int) -> Tensor:
    """Outliers of 6 to 60 in so many columns, mostly of one token each; the first and the last are some."""
    x = random(tokens, columns, seed=columns).clamp(-4, 4)
    for n in range(outliers):
        column = n * (columns - 1) // max(outliers - 1, 1)
        x[n % tokens, column] = (6.0 + 7 * (n % 8)) * (-1) ** n
    return x


def check(
    x: Tensor,
    device: torch.device,
    rows: int = 70,
    activation: str | None = None,
    into: torch.dtype | None = None,
) -> list[str]:
    """A layer beside the definition in float64; what was launched."""
    stored = canonical("int8", 0, "f32", shape=(rows, x.shape[1]), block_rows=1)
    bias = random(rows, seed=3)
    layer = whole_layer(GpuBlocks().pack(stored, device), InputTransform(llm_int8_inputs()), bias.to(device))
    assert isinstance(layer, GpuLayer)
    width = rows if activation is None else rows // 2
    out = torch.full((len(x), width + 8), torch.nan, dtype=into or F32, device=device)[:, 8:]
    with runtime.recording() as launches:
        found = layer(x.to(device), out, activation).cpu()
    if runtime._recorded is not None:
        runtime._recorded.extend(launches)
    values, factor = InputTransform(llm_int8_inputs()).in_torch(x.float())
    assert factor is not None
    wanted = ((values.double() @ stored.dequantize().double().T) * factor.double()).float() + bias
    wanted = wanted if activation is None else gated_activation(wanted, activation)
    assert torch.equal(found.isnan(), wanted.isnan())
    size = wanted.nan_to_num().abs().amax(1, keepdim=True).clamp(min=1e-30)
    error = float(((found.float() - wanted).nan_to_num() / size).abs().max())
    assert error <= (3e-6 if found.dtype is F32 else 2**-8), error
    return [launch.function for launch in launches]


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("outliers", [0, 1, 37])
def test_a_layer_is_its_definition(outliers: int, dtype: torch.dtype, device: torch.device) -> None:
    """None, one, and more than a product takes at a time. 16-bit x is multiplied as it is: no bit is lost."""
    made = check(inputs(5, 200, outliers).to(dtype), device)
    assert made == ["find", "quantize", "_multiply"]


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("tokens", [2, pytest.param(70, marks=pytest.mark.slow)])
def test_columns_in_parts_and_gates(
    tokens: int, activation: str | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(inputs(tokens, 400, 9).bfloat16(), device, activation=activation, into=BF16)
    monkeypatch.setattr(eight_bit, "_splits", lambda tiles, blocks, *_: 3 if blocks > 3 else 1)
    made = check(inputs(tokens, 400, 9).bfloat16(), device, activation=activation)
    assert made == ["find", "quantize", "_multiply", "_finish"]


def test_broken_rows_fail_alone_and_mark_no_column(device: torch.device) -> None:
    x = broken(96)
    check(x, device)
    check(x.bfloat16(), device)


def test_what_is_listed(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns in ascending order over several blocks; codes that are zero there; scales of what is below."""
    monkeypatch.setattr(outlier_columns, "_MOST_BLOCK", 64)
    x = inputs(4, 300, 11)
    x[2, 5] = torch.inf  # its row is not finite: column 5 is no outlier column
    x[3, 7] = -6.0
    transform = InputTransform(llm_int8_inputs())
    assert transform.gpu is not None
    made = transform.gpu.codes(x.bfloat16().to(device))
    assert made.outliers is not None and made.codes.dtype is torch.int8
    seen = x.bfloat16().float()
    finite = torch.isfinite(seen).all(1)
    columns = (seen[finite].abs() >= 6).any(0).nonzero()[:, 0].tolist()
    assert 5 not in columns and 7 in columns and len(columns) > 8
    count = int(made.outliers.count)
    assert made.outliers.columns[:count].tolist() == columns
    values, factor = transform.in_torch(seen)
    assert factor is not None
    codes = made.codes.cpu().float()
    assert not codes[:, columns].any() and not codes[2].any()
    inner = [column for column in range(300) if column not in columns]
    assert torch.equal(codes[finite][:, inner], values[finite][:, inner])
    assert torch.equal(made.scales.cpu()[finite], factor[finite, 0]) and made.scales[2].isnan()


def test_the_same_bits_each_time_and_in_any_tile(device: torch.device) -> None:
    """Columns are added in their order: whatever rows are there, if they mark the same columns."""
    stored = canonical("int8", 0, "f32", shape=(40, 256), block_rows=1)
    layer = whole_layer(GpuBlocks().pack(stored, device), InputTransform(llm_int8_inputs()), None)
    assert layer is not None
    x = inputs(20, 256, 0)
    x[:, [3, 90, 255]] = 9.0
    x = x.bfloat16().to(device)
    together = layer(x)
    assert torch.equal(layer(x), together)
    for rows in (slice(0, 1), slice(7, 12)):
        assert torch.equal(layer(x[rows]), together[rows])
