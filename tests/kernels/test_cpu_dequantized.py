"""cpu_dequantized: what cpu_dense makes of the rounded matrix, bit for bit, and when nothing is rounded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from contract.test_linear_kernels import CPU, ROWS_OF_X, WEIGHTS, canonical, dense_weight, needs_native
from lowbit.kernels.cpu_dense import CpuDense
from lowbit.kernels.cpu_dequantized import CpuDequantized
from lowbit.kernels.reference import rows_at_once
from lowbit.loading.self_check import check_packed
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import ActivationScheme, Scheme, dense

pytestmark = [needs_native, pytest.mark.usefixtures("poisoned")]

KERNEL = CpuDequantized()
QUANTIZED = [name for name in WEIGHTS if not name.startswith("dense")]
CUT = ("int4 16x64 blocks", "uint4 g32 f32 zero act-order", "nf4 g64", "gguf q4_k", "e4m3 blocks")


def rounded(weight: QuantizedTensor) -> QuantizedTensor:
    matrix = weight.dequantize().bfloat16()
    return QuantizedTensor(dense("bf16"), weight.shape, matrix, origin="test")


def inputs(weight: QuantizedTensor) -> torch.Tensor:
    return torch.randn(max(ROWS_OF_X), weight.shape[1], generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", QUANTIZED)
def test_it_is_the_dense_kernel_on_the_rounded_matrix(name: str) -> None:
    weight = WEIGHTS[name]()
    assert KERNEL.refuses(weight.scheme, weight.shape, CPU) is None
    packed, plain = KERNEL.pack(weight, CPU), CpuDense().pack(rounded(weight), CPU)
    x, ids = inputs(weight), torch.tensor([5, 0, weight.shape[0] - 1], dtype=torch.int32)
    together = KERNEL.linear(x, packed).nan_to_num()
    assert torch.equal(together, CpuDense().linear(x, plain).nan_to_num())
    assert torch.equal(KERNEL.rows(packed, ids).nan_to_num(), CpuDense().rows(plain, ids).nan_to_num())
    for count in ROWS_OF_X:
        assert torch.equal(KERNEL.linear(x[:count], packed).nan_to_num(), together[:count])
    assert packed.scheme == weight.scheme, "a layer's scheme is what the checkpoint stores"
    again = KERNEL.unpack(packed)
    assert torch.equal(again.codes.nan_to_num(), rounded(weight).codes.nan_to_num())
    assert packed.nbytes == KERNEL.nbytes(weight.scheme, weight.shape) + 128
    buffers = {key: buffer.clone() for key, buffer in packed.buffers.items()}
    restored = KERNEL.restore(weight.scheme, weight.shape, buffers, "test")
    assert torch.equal(KERNEL.linear(x, restored).nan_to_num(), together)
    check_packed(weight, packed)


@pytest.mark.parametrize("name", CUT)
def test_a_slice_at_a_time_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = WEIGHTS[name]()
    whole = KERNEL.pack(weight, CPU).buffers["data"]
    monkeypatch.setattr("lowbit.kernels.reference.SLICE_WEIGHTS", weight.shape[1])
    assert rows_at_once(weight.scheme, weight.shape) < weight.shape[0], "it is cut"
    assert torch.equal(KERNEL.pack(weight, CPU).buffers["data"], whole)


def test_refusals() -> None:
    weight = canonical("int4", 32)
    assert "cuda" in str(KERNEL.refuses(weight.scheme, weight.shape, torch.device("cuda")))
    assert "experts" in str(KERNEL.refuses(weight.scheme, (4, *weight.shape), CPU))
    plain = dense_weight("f32", (8, 32))
    assert KERNEL.refuses(plain.scheme, plain.shape, CPU) == "weights are not quantized"
    assert not KERNEL.takes_int8(weight.scheme, weight.shape)


@pytest.mark.parametrize(
    ("code", "scales", "zero", "exact"),
    [
        ("e2m1", ("e8m0",), "none", True),
        ("e4m3", ("e8m0",), "none", True),
        ("int8", ("e8m0",), "none", True),
        ("uint8", ("e8m0",), "integer", True),
        ("iq4_nl_codes", ("e8m0",), "none", True),
        ("e2m1", ("e4m3",), "none", True),  # 2 bits and 4
        ("e2m1", ("e4m3", "f32"), "none", False),
        ("int4", ("e4m3",), "none", True),  # 3 bits and 4
        ("uint4", ("e4m3",), "integer", True),
        ("int6", ("e4m3",), "none", False),
        ("int2", ("bf16",), "none", True),  # -2 to 1: powers of two
        ("int2", ("f16",), "none", False),
        ("int4", ("bf16",), "none", False),
        ("nf4", ("e8m0",), "none", False),
        ("uint4", ("e8m0",), "float", False),
        ("gguf_q4_0", (), "none", False),
    ],
)
def test_when_nothing_is_rounded(code: str, scales: tuple[str, ...], zero: str, exact: bool) -> None:
    """By the widths of code and scales; where it says so, no weight of that scheme changes."""
    fmt = number_format(code)
    formats = tuple(number_format(scale) for scale in scales)
    scheme = Scheme(fmt, ((1, 32),) * len(scales), formats, zero)  # type: ignore[arg-type]
    assert KERNEL.rounds(scheme) is not exact
    if exact:
        weight = canonical(code, 32, scales[0], zero=zero == "integer", shape=(64, 1024))
        assert torch.equal(weight.dequantize().bfloat16().float(), weight.dequantize())
    assert KERNEL.rounds(replace(scheme, offset=True))
    with_inputs = replace(scheme, activation=ActivationScheme(number_format("int8"), (1, 0)))
    assert KERNEL.rounds(with_inputs) is KERNEL.rounds(scheme)
