"""LLM.int8 on the GPU: outlier columns found, kept beside codes and multiplied, against the definition."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from contract.test_linear_kernels import canonical
from kernels.test_activation_native import broken
from kernels.test_experts import random
from lowbit.kernels.activation_quant import InputTransform, _seen
from lowbit.kernels.elementwise import gated_activation
from lowbit.kernels.gpu import eight_bit, outlier_columns, runtime
from lowbit.kernels.gpu.layer import GpuLayer
from lowbit.kernels.gpu.linear import GpuBlocks
from lowbit.kernels.parallel import Parallel
from lowbit.kernels.whole_layer import whole_layer
from lowbit.numerics.cutting import cut_columns
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


@dataclass(frozen=True, eq=False)
class Told(Parallel):
    """One of two ranks, which knows what the other one saw."""

    other: Tensor | None = None

    def largest(self, x: Tensor) -> Tensor:
        assert self.other is not None
        return torch.maximum(x, self.other.to(x.device))


def parts_of(x: Tensor) -> list[tuple[slice, InputTransform]]:
    """Columns of two ranks, and what each makes of its own."""
    scheme = llm_int8_inputs()
    halves = slice(0, 72), slice(72, x.shape[1])
    seen = [_seen(x[:, here].float(), scheme) for here in halves]
    told = [Told(rank, 2, other=seen[1 - rank]) for rank in range(2)]
    return [(here, InputTransform(scheme, across=each)) for here, each in zip(halves, told, strict=True)]


def of_ranks(dtype: torch.dtype) -> Tensor:
    """Rows whose outliers, or whose numbers that are not finite, the other rank has; one has neither."""
    x = inputs(6, 200, 5)
    x[1, 150], x[1, 3] = torch.nan, 40.0  # column 3 is no outlier column
    x[2, 5], x[2, 180] = torch.inf, 50.0
    x[3] = x[3].clamp(-4, 4)
    x[4, 100], x[4, 7] = 5.5, -6.0
    return x.to(dtype)


@pytest.mark.parametrize("block", [4096, 32])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_outliers_on_ranks(
    block: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a rank makes of its columns is what one process makes of them, with a launch more."""
    monkeypatch.setattr(outlier_columns, "_MOST_BLOCK", block)
    x = of_ranks(dtype)
    values, factor = InputTransform(llm_int8_inputs()).in_torch(x)
    finite = x.float().isfinite().all(1)
    outliers = (x[finite].float().abs() >= 6).any(0)
    assert not outliers[3] and not outliers[180] and outliers[:72].any() and outliers[72:].any()
    for here, transform in parts_of(x):
        mine = x[:, here].to(device)
        with runtime.recording() as launches:
            found, scale = transform(mine)
        if runtime._recorded is not None:
            runtime._recorded.extend(launches)
        assert [launch.function for launch in launches] == ["see", "mark", "quantize"]
        assert torch.equal(
            found.cpu().float().nan_to_num(99.0), values[:, here].to(dtype).float().nan_to_num(99.0)
        )
        assert (scale is None) == (factor is None)
        assert scale is None or factor is None or torch.equal(scale.cpu()[finite], factor[finite])
        assert transform.gpu is not None
        codes = transform.gpu.codes(mine)
        assert codes.outliers is not None
        listed = codes.outliers.columns[: int(codes.outliers.count)].tolist()
        assert listed == outliers[here].nonzero()[:, 0].tolist()
        assert codes.scales.isnan().tolist() == (~finite).tolist() == [False, True, True, False, False, False]
        assert not codes.codes.cpu()[:, outliers[here]].any()


def test_layers_of_ranks_add_up(device: torch.device) -> None:
    x = of_ranks(BF16)
    stored = canonical("int8", 0, "f32", shape=(70, x.shape[1]), block_rows=1)
    total = torch.zeros(len(x), 70)
    for here, transform in parts_of(x):
        cut = cut_columns(stored, here.start, here.stop)
        layer = whole_layer(GpuBlocks().pack(cut, device), transform, None)
        assert isinstance(layer, GpuLayer)
        total += layer(x[:, here].to(device), torch.empty(len(x), 70, device=device)).cpu()
    values, factor = InputTransform(llm_int8_inputs()).in_torch(x.float())
    assert factor is not None
    wanted = (values.double() @ stored.dequantize().double().T) * factor.double()
    assert torch.equal(total.isnan(), wanted.isnan()) and wanted.isnan().any()
    size = wanted.nan_to_num().abs().amax(1, keepdim=True).clamp(min=1e-30)
    assert ((total - wanted).nan_to_num() / size).abs().max() <= 3e-6


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
