"""The interpreter stands for the device: shared functions, and which device takes what."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from lowbit.errors import LowbitError
from lowbit.kernels.device_memory import gpu_fault, has_gpu
from lowbit.kernels.gpu import runtime
from lowbit.kernels.gpu.language import dot


@triton.jit
def _product(x, y, out, columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    rows = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, columns, BLOCK):
        k = start + tl.arange(0, BLOCK)
        a = tl.load(x + rows[:, None] * columns + k[None, :])
        b = tl.load(y + rows[:, None] * columns + k[None, :])
        total = dot(a, tl.trans(b), total)
    tl.store(out + rows[:, None] * BLOCK + rows[None, :], total)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn])
def test_dot_multiplies_values_of_every_type(dtype: torch.dtype, device: torch.device) -> None:
    if dtype is torch.float8_e4m3fn and device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no tensor cores for it")
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(32, 64, generator=generator).to(dtype).to(device) for _ in range(2))
    out = torch.full((32, 32), torch.nan, device=device)
    runtime.launch(_product, (1,), x, y, out, 64, BLOCK=32)  # what products of 8-bit numbers need at least
    torch.testing.assert_close(out, x.float() @ y.float().T, rtol=1e-5, atol=1e-4)


def test_only_inside_interpreting_does_a_cpu_take_triton_kernels(device: torch.device) -> None:
    assert runtime.runs_on(device)
    assert runtime.refuses(torch.device("meta")) == "needs an NVIDIA GPU, got meta"
    runtime._state["interpreting"] = False
    assert not runtime.runs_on(torch.device("cpu"))


def test_a_recorded_launch_says_what_the_compiler_needs(device: torch.device) -> None:
    x = torch.zeros(16, 32, dtype=torch.bfloat16, device=device)
    out = torch.empty(16, 16, device=device)
    with runtime.recording() as launches:
        runtime.launch(_product, (1,), x, x, out, 32, num_warps=8, BLOCK=16)
    (launch,) = launches
    assert dict(launch.types) == {"x": "*bf16D", "y": "*bf16D", "out": "*fp32D", "columns": "i32D"}
    assert (launch.function, launch.constants, launch.num_warps) == ("_product", (("BLOCK", 16),), 8)


def test_triton_that_cannot_compile_is_an_error_of_one_line(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.check(device)

    def fails(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC\nmore")

    monkeypatch.setattr(runtime, "launch", fails)
    with pytest.raises(LowbitError, match="RuntimeError: Failed to find C compiler") as caught:
        runtime.check.__wrapped__(device)
    assert caught.value.code == "E0412" and "\n" not in caught.value.message


def test_a_gpu_that_is_too_old_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert has_gpu() and gpu_fault() == ""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert not has_gpu()
    assert gpu_fault() == "Tesla T4 has compute capability 7.5, kernels need 8.0"
