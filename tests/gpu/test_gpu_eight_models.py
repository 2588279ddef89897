"""Whole models with 8-bit weights and inputs, every layer on 8-bit products, beside the CPU's kernels."""

from __future__ import annotations

import pytest
import torch

from gpu.test_gpu_linear_models import FIXTURES, divergence
from lowbit.kernels import native
from lowbit.kernels.gpu.layer import GpuLayer
from lowbit.layers.linear import Linear

pytestmark = [
    pytest.mark.skipif(native.library() is None, reason="the native library was not built"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="one device for both: the interpreter's"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
W8A8, STATIC = "compressed_tensors/w8a8_dynamic", "compressed_tensors/w8a8_static_asym"
CHANNELS, BLOCKS = "compressed_tensors/fp8_channel_dynamic", "fp8/block_128"


@pytest.mark.parametrize(
    "name", [W8A8, BLOCKS, *(pytest.param(name, marks=pytest.mark.slow) for name in (STATIC, CHANNELS))]
)
def test_8_bit_checkpoints(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers that quantize inputs all run so; what differs is the order of float32 sums."""
    layers: set[str] = set()
    whole = Linear._whole

    def seen(self: Linear) -> object:
        found = whole.func(self)  # type: ignore[attr-defined]
        if self.inputs is not None and any(w.kernel.name.startswith("gpu") for w in self.weights):
            assert isinstance(found, GpuLayer), self.name
            layers.add(self.name)
        return found

    monkeypatch.setattr(Linear, "_whole", property(seen))
    kl, kernels = divergence(FIXTURES / name, monkeypatch)
    assert "gpu_blocks" in kernels and not kernels & {"reference", "cpu_blocks", "cpu_dense"}
    assert layers and kl < 1e-3, kl
