"""Rotating activations at run time: in native code (csrc/rotation.cpp), on a GPU in ``gpu.rotation``.

Elsewhere as ``numerics.rotation`` has it. What a layer's input is rotated by goes with its quantization
(``activation_quant``), on a CPU in the same call; what it gives, and the heads of Q and K, are rotated in
place by a call of their own, which steps can replay.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from lowbit.kernels.gpu import runtime
from lowbit.kernels.step_plan import Operation, native_operation, no_memory
from lowbit.numerics.rotation import Rotation


class _Description(ctypes.Structure):
    """lowbit_rotation."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("before", "after", "matrix", "partners", "cosines", "sines")),
        ("size", ctypes.c_int64),
        ("divisor", ctypes.c_float),
        ("wide", ctypes.c_int32),
        ("head", ctypes.c_int32),
        ("steps", ctypes.c_int32),
    )


@cache
def _operation() -> Operation | None:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    arguments = (pointer, pointer, number, number, number, pointer, number)
    return native_operation("rotate", arguments, no_memory("to rotate inputs"))


@dataclass(frozen=True, eq=False)
class Rotator:
    """A rotation that can be run. Its tensors lie where x does."""

    rotation: Rotation

    @cached_property
    def native(self) -> _Description | None:
        """For the native code; None where it cannot have it."""
        rotation, head = self.rotation, self.rotation.head
        tensors = (
            *(rotation.before, rotation.after, rotation.matrix if head is None else head),
            *(rotation.partners, rotation.cosines, rotation.sines),
        )
        if _operation() is None or not all(t is None or (t.is_cpu and t.is_contiguous()) for t in tensors):
            return None
        addresses = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
        blocks = 0 if head is None else len(head)
        steps = 0 if rotation.partners is None else len(rotation.partners)
        return _Description(*addresses, rotation.size, rotation.divisor, rotation.wide, blocks, steps)

    def in_place(self, x: Tensor) -> None:
        """x (rows, width), or heads (rows, heads, head_dim), which lie together: each row is rotated."""
        wide = x.flatten(1) if x.dim() == 2 or x.stride(1) == x.shape[2] else None
        assert wide is not None and wide.data_ptr() == x.data_ptr(), "a row's numbers lie together"
        if self._on_gpu(wide, wide):
            return
        if not self._native(wide, wide):
            wide.copy_(self.rotation(wide))

    def rotated(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x (rows, width) -> the same rotated, of ``dtype``, in memory of its own."""
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        if not self._on_gpu(x, out) and not self._native(x, out):
            out.copy_(self.rotation(x))
        return out

    def _native(self, x: Tensor, out: Tensor) -> bool:
        """Whether native code rotated x (rows, width) into ``out``, which may be x."""
        described, run = self.native, _operation()
        fit = all(t.is_cpu and t.dtype is torch.float32 and t.stride(1) == 1 for t in (x, out))
        if described is None or run is None or not fit:
            return False
        rows, width = x.shape
        run(
            ctypes.byref(described),
            x.data_ptr(),
            x.stride(0),
            rows,
            width,
            out.data_ptr(),
            out.stride(0),
        )
        return True

    def _on_gpu(self, x: Tensor, out: Tensor) -> bool:
        """Whether Triton rotated x into ``out``."""
        if self.rotation.head is not None or not runtime.runs_on(x.device):
            return False
        from lowbit.kernels.gpu import rotation as gpu

        if not gpu.takes(self.rotation, x, out):
            return False
        gpu.rotate(self.rotation, x, out, self.signs)
        return True

    @cached_property
    def signs(self) -> bool:
        """Whether x only changes signs before it is transformed. Asked once: it looks at numbers."""
        before = self.rotation.before
        return before is None or bool((before.abs() == 1).all())

    def same_as(self, other: Rotator) -> bool:
        """Whether both do the same to every x."""
        return self is other or self.rotation.same_as(other.rotation)


def same(a: Rotator | None, b: Rotator | None) -> bool:
    """Whether both do the same, or neither does anything."""
    if a is None or b is None:
        return a is b
    return a.same_as(b)
