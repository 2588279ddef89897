"""Whole models with 8-bit weights and inputs, every layer on 8-bit products, beside the CPU's kernels."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest
import torch

from gpu.test_gpu_linear_models import FIXTURES, divergence
from lowbit.kernels import native
from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.gpu import eight_bit

pytestmark = [
    pytest.mark.skipif(native.library() is None, reason="the native library was not built"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="one device for both: the interpreter's"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
W8A8, BLOCKS, OUTLIERS = "compressed_tensors/w8a8_dynamic", "fp8/block_128", "bitsandbytes/int8"
MORE = (
    "compressed_tensors/fp8_channel_dynamic",
    "fp8/tensor_static",
)  # the last has parts with their own scales


@pytest.mark.parametrize(
    "name", [W8A8, BLOCKS, OUTLIERS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
)
def test_8_bit_checkpoints(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer that quantizes inputs runs so; what differs is the order of float32 sums."""
    products = []
    multiply = eight_bit.multiply

    def seen(*arguments: Any) -> torch.Tensor:
        products.append(arguments)
        return multiply(*arguments)

    def step(self: InputTransform, x: torch.Tensor) -> NoReturn:
        raise AssertionError(f"{self.scheme} ran as a step of its own")

    monkeypatch.setattr(eight_bit, "multiply", seen)
    monkeypatch.setattr(InputTransform, "_on_gpu", step)
    kl, kernels = divergence(FIXTURES / name, monkeypatch)
    assert "gpu_blocks" in kernels and not kernels & {"reference", "cpu_blocks", "cpu_dense"}
    assert len(products) >= 4
    assert kl < 1e-3, kl
