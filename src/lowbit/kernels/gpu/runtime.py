"""Where Triton kernels run, and how they are launched.

On a CUDA device whenever Triton is installed. On a CPU only inside ``interpreting()``, in a process that was
started with ``TRITON_INTERPRET=1`` (Triton reads it when a kernel is declared): slow, exact, for tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import LowbitError, printable

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_state = {"interpreting": False}
_recorded: list[Launch] | None = None


@dataclass(frozen=True)
class Launch:
    """What a launch means to the compiler: enough to compile the same kernel for another device.

    ``types``: Triton's spelling of each argument's type by its name ("*bf16", "i32" …), "D" behind it where
    the address or number is a multiple of 16; ``constants``: by name. Equal ones are one compilation.
    """

    module: str
    function: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    num_warps: int
    num_stages: int


@cache
def missing() -> str:
    """Why there are no Triton kernels in this installation; "" where there are."""
    return "" if find_spec("triton") else "Triton is not installed (pip install 'lowbit[cuda]')"


def runs_on(device: torch.device) -> bool:
    """Whether Triton kernels take tensors of this device."""
    if device.type == "cuda":
        return not missing()
    return device.type == "cpu" and _state["interpreting"]


def refuses(device: torch.device) -> str | None:
    """Why Triton kernels do not take tensors of this device, or None."""
    if runs_on(device):
        return None
    return missing() if device.type == "cuda" else f"needs an NVIDIA GPU, got {device.type}"


@cache
def check(device: torch.device) -> None:
    """E0412 where Triton is installed and cannot compile or run a kernel on this device: no other would run.

    What it needs for that no package brings: a C compiler, Python's headers, a folder to write to.
    """
    if missing():
        return
    from lowbit.kernels.gpu.language import one

    out = torch.zeros(1, dtype=torch.int32, device=device)
    try:
        launch(one, (1,), out)
        said = "" if int(out) == 1 else "a kernel that writes 1 did not"
    except Exception as error:  # the compiler's, the driver's and the system's are of many kinds
        lines = [line for line in str(error).splitlines() if line.strip()]
        said = f"{type(error).__name__}: {lines[0] if lines else 'nothing said'}"
    if said:
        raise LowbitError(
            "E0412",
            f"--device {device.type}: Triton cannot run kernels here: {printable(said, 300)}; it needs a C "
            "compiler and Python's headers (apt-get install gcc python3-dev), or use --device cpu",
        )


def keep_sums_whole() -> None:
    """torch's products add up in float32, as ours do: cuBLAS may else add parts of a sum in 16 bits."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


@contextmanager
def interpreting() -> Iterator[None]:
    """Triton's interpreter takes the place of all native kernels, on CPU tensors, inside this block."""
    if not INTERPRETED:
        raise RuntimeError("start the process with TRITON_INTERPRET=1")
    before, _state["interpreting"] = _state["interpreting"], True
    try:
        yield
    finally:
        _state["interpreting"] = before


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Write down every launch inside this block."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def launch(
    kernel: Any,
    grid: tuple[int, ...] | Callable[..., tuple[int, ...]],
    *arguments: Tensor | float | None,
    num_warps: int = 4,
    num_stages: int = 2,
    **constants: object,
) -> None:
    """Run a ``triton.jit`` function: tensors and numbers in the order of its parameters, constants by name.

    None stands for a pointer that the constants say is not read.
    """
    if _recorded is not None:
        _recorded.append(_described(kernel, arguments, constants, num_warps, num_stages))
    kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, **constants)


def _described(
    kernel: Any,
    arguments: tuple[Tensor | float | None, ...],
    constants: dict[str, object],
    num_warps: int,
    num_stages: int,
) -> Launch:
    function = kernel.fn
    plain = (kernel.kwargs["do_not_specialize"] if INTERPRETED else kernel.do_not_specialize) or ()
    types, fixed = [], dict(constants)
    for name, value in zip(kernel.arg_names, arguments, strict=False):
        if name in plain:
            assert value is not None, f"{name} is a number"
            types.append((name, _type_of(value).removesuffix("D")))
        elif value is None or (isinstance(value, int) and value == 1):
            fixed[name] = value  # Triton compiles these in
        else:
            types.append((name, _type_of(value)))
    return Launch(
        function.__module__,
        function.__name__,
        tuple(types),
        tuple(sorted(fixed.items())),
        num_warps,
        num_stages,
    )


_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.uint32: "u32",
    torch.int64: "i64",
    torch.bool: "i1",
}


def _type_of(value: Tensor | float) -> str:
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}" + "D" * (value.data_ptr() % 16 == 0)
    if isinstance(value, float):
        return "fp32"
    return ("i32" if -(1 << 31) <= value < 1 << 31 else "i64") + "D" * (value % 16 == 0)
