"""Every head times a matrix of its own: y[token, head] = x[token, head] @ W[head].

What is left of DeepSeek's ``kv_b_proj`` once it is absorbed into latent attention (DeepSeek-V2, 2024). Sums
are float32; on a CPU with the native library (csrc/head_products.cpp) a row's bits do not depend on the other
rows.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.kernels.step_plan import Operation, native_operation

LANES = 16


class _Job(ctypes.Structure):
    """lowbit_head_products."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("x_token", ctypes.c_int64),
        ("x_head", ctypes.c_int64),
        ("weights", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("y_token", ctypes.c_int64),
        ("y_head", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("heads", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("bfloat", ctypes.c_int32),
    )


@cache
def _native() -> Operation | None:
    return native_operation("multiply_heads", (ctypes.c_void_p,))


@dataclass(frozen=True)
class HeadMatrices:
    """``weights`` (heads, in, out padded to whole vectors with zeros), float32 or ``dtype``."""

    weights: Tensor
    outputs: int

    @staticmethod
    def pack(matrices: Tensor, dtype: torch.dtype = torch.float32) -> HeadMatrices:
        """Of float32 (heads, in, out); ``dtype`` is what x will be.

        Beside a float32 x no value changes: only what is bfloat16 anyway is stored as such.
        """
        weights = matrices.to(dtype)
        if dtype is torch.float32 and matrices.is_cpu:
            rounded = matrices.bfloat16()
            weights = rounded if torch.equal(rounded.float(), matrices) else matrices
        outputs = matrices.shape[2]
        return HeadMatrices(functional.pad(weights, (0, -outputs % LANES)).contiguous(), outputs)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x (tokens, heads, in) -> (tokens, heads, out) in x's dtype. x and ``out`` may be views."""
        tokens, heads, inputs = x.shape
        assert self.weights.shape[:2] == (heads, inputs), "one matrix a head, as high as the head is wide"
        if out is None:
            out = x.new_empty(tokens, heads, self.outputs)
        assert out.shape == (tokens, heads, self.outputs), f"the result has {tuple(out.shape)}"
        multiply = _native() if _fits(x) and _fits(out) and self.weights.is_cpu else None
        if multiply is None:
            weights = self.weights[..., : self.outputs].to(x.dtype)
            return out.copy_(torch.bmm(x.transpose(0, 1), weights).transpose(0, 1))
        job = _Job(
            x.data_ptr(),
            x.stride(0),
            x.stride(1),
            self.weights.data_ptr(),
            out.data_ptr(),
            out.stride(0),
            out.stride(1),
            tokens,
            heads,
            inputs,
            self.outputs,
            self.weights.dtype is torch.bfloat16,
        )
        multiply(ctypes.byref(job))
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of the packed matrices."""
        return self.weights.nbytes


def _fits(x: Tensor) -> bool:
    return x.is_cpu and x.dtype is torch.float32 and x.stride(2) == 1
