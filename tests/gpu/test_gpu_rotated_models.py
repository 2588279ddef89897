"""Whole models that rotate activations, on the GPU's kernels beside the CPU's."""

from __future__ import annotations

import pytest
import torch

from gpu.test_gpu_linear_models import FIXTURES, divergence
from lowbit.kernels import native
from lowbit.kernels.gpu import runtime

pytestmark = [
    pytest.mark.skipif(native.library() is None, reason="the native library was not built"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="one device for both: the interpreter's"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        *(("transforms/quip_w4a16", 2e-3), ("transforms/spinquant_w8a8", 2e-3), ("fp_quant/nvfp4", 6e-3)),
        ("paroquant/g32", 2e-3),
    ],
)
def test_rotated_checkpoints(name: str, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs, outputs and heads are rotated in kernels, with another order of float32 sums; groups under an
    outer scale are rounded to bfloat16 before they are multiplied."""
    with runtime.recording() as launches:
        kl, kernels = divergence(FIXTURES / name, monkeypatch)
    if runtime._recorded is not None:
        runtime._recorded.extend(launches)
    ran = {launch.function for launch in launches}
    inside = [dict(launch.constants)["SIZE"] for launch in launches if launch.function == "quantize"]
    assert ("givens" if name.startswith("paroquant") else "hadamard") in ran or any(inside)
    assert name != "transforms/spinquant_w8a8" or "quantize" in ran
    assert "gpu_blocks" in kernels and not kernels & {"reference", "cpu_blocks", "cpu_dense"}
    assert kl < limit, kl
