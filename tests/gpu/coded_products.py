"""Products of Triton kernels of codebooks, trellises and the like, as their tests try them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels import LinearKernel
from lowbit.numerics.quantized_tensor import QuantizedTensor


def inputs(tokens: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    x = torch.randn(tokens, columns + 16, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    return x[:, :columns]


def product(kernel: LinearKernel, weight: QuantizedTensor, x: Tensor, device: torch.device) -> Tensor:
    """float64; computed as float32, into a part of something wider that is left alone beside it."""
    packed = kernel.pack(weight, device)
    wide = torch.full((len(x), weight.shape[0] + 3), torch.nan, device=device)
    out = wide[:, : weight.shape[0]]
    assert kernel.linear(x.to(device), packed, out) is out
    assert wide[:, weight.shape[0] :].isnan().all(), "what lies beside the output is not its"
    assert not out.isnan().any(), "poison was left"
    return out.cpu().double()


def error(kernel: LinearKernel, weight: QuantizedTensor, x: Tensor, device: torch.device) -> float:
    """The largest error of a product, in |x| |w| of its row."""
    exact = weight.dequantize().double()
    norms = x.double().norm(dim=1)[:, None] * exact.norm(dim=1)
    return float(((product(kernel, weight, x, device) - x.double() @ exact.T).abs() / norms).max())


def no_tokens_and_no_rows(kernel: LinearKernel, weight: QuantizedTensor, device: torch.device) -> None:
    packed, (rows, columns) = kernel.pack(weight, device), weight.shape
    assert kernel.linear(torch.empty(0, columns, device=device), packed).shape == (0, rows)
    assert kernel.rows(packed, torch.empty(0, dtype=torch.int64, device=device)).shape == (0, columns)
    with pytest.raises(LowbitError, match=f"{columns - 1} columns, weight {columns}"):
        kernel.linear(torch.ones(1, columns - 1, device=device), packed)
