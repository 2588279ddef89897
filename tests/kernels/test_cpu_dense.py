"""cpu_dense: a float16 matrix of bfloat16 numbers is the bf16 matrix it was made from."""

from __future__ import annotations

import pytest
import torch

from contract.test_linear_kernels import CPU, needs_native
from lowbit.kernels.cpu_dense import CpuDense
from lowbit.loading.self_check import check_packed
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import dense

pytestmark = [needs_native, pytest.mark.usefixtures("poisoned")]

KERNEL = CpuDense()


def matrix_of(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(37, 100, generator=torch.Generator().manual_seed(5)).to(dtype)


def packed_as(name: str, matrix: torch.Tensor):  # type: ignore[no-untyped-def]
    weight = QuantizedTensor(dense(name), tuple(matrix.shape), matrix, origin="test")
    packed = KERNEL.pack(weight, CPU)
    check_packed(weight, packed)
    return packed


def test_bfloat16_numbers_in_a_float16_matrix_run_as_bf16() -> None:
    matrix = matrix_of(torch.bfloat16)
    matrix[0, :3] = torch.tensor([0.0, 2.0**-24, -(2.0**15)])  # the smallest float16 and a large one
    packed, plain = packed_as("f16", matrix.half()), packed_as("bf16", matrix)
    x = torch.randn(33, 100, generator=torch.Generator().manual_seed(6))
    assert packed.scheme == dense("bf16") and packed.nbytes == KERNEL.nbytes(dense("f16"), packed.shape) + 128
    assert torch.equal(KERNEL.linear(x, packed), KERNEL.linear(x, plain))
    assert torch.equal(KERNEL.unpack(packed).dequantize(), matrix.float())
    restored = KERNEL.restore(packed.scheme, packed.shape, packed.buffers, "test")
    assert torch.equal(KERNEL.linear(x, restored), KERNEL.linear(x, plain))


@pytest.mark.parametrize("number", [1 + 2.0**-10, float("nan")])
def test_one_other_number_keeps_it_float16(number: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.kernels.reference.SLICE_WEIGHTS", 100)  # a row at a time: the last has it
    matrix = matrix_of(torch.bfloat16).half()
    matrix[-1, -1] = number
    packed = packed_as("f16", matrix)
    assert packed.scheme == dense("f16")
    assert torch.equal(KERNEL.unpack(packed).codes.nan_to_num(7), matrix.nan_to_num(7))
