"""The largest logits of an output head, exactly, without reading most of it (csrc/screened_head.cpp).

For a greedy token only the largest logit matters. Beside a head of 16 or 32 bits a weight stands a screen:
the same matrix as int8 in groups of 32 columns, and for each row how far it is from the head's. The product
with the screen bounds every logit; only blocks of 16 rows that may hold a largest one meet the head itself,
by the kernel that would have computed all of it, to the same bits. All others come out as minus infinity, so
that the first of the largest logits, and whether any is NaN, is what it would have been: the bounds are
rigorous, and where they cannot be (NaN, infinite or huge inputs) or leave too much (flat distributions), the
whole head is computed.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from lowbit.kernels import packed_linear
from lowbit.kernels.cpu_blocks import CpuBlocks
from lowbit.kernels.encode import encode
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.kernels.native_layer import MOST_COLUMNS, NativeLayer
from lowbit.kernels.packed_linear import DENSE_CODES, INPUT_GROUPS, NativeWeight
from lowbit.kernels.step_plan import Operation, native_operation, no_memory
from lowbit.numerics.number_formats import number_format
from lowbit.numerics.quantized_tensor import QuantizedTensor
from lowbit.numerics.scheme import Scheme

GROUP = 32
SCHEME = Scheme(number_format("int8"), ((1, GROUP),), (number_format("f16"),), zero="none")
_ROWS = 4096  # made at once
# Norms are float32 sums of MOST_COLUMNS squares at most, none of which is below 2^-126 but by less than that.
_NORM_UP, _NORM_LOST = 1 + 2.0**-8, 2.0**-50


class HeadDescription(ctypes.Structure):
    """lowbit_screened_head."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("head", "screen", "deviation", "norm")),
        *((name, ctypes.c_float) for name in ("largest_norm", "largest_bias", "scale", "cap")),
        *((name, ctypes.c_int32) for name in ("rounds", "rest")),
        *((name, ctypes.c_int64) for name in ("screened", "blocks", "whole")),
    )


@cache
def _operation() -> Operation | None:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    arguments = (pointer, pointer, number, number, number, pointer, number)
    return native_operation("screened_logits", arguments, no_memory("for a product's input"))


def refuses(scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
    """Why a head of such weights can have no screen, or None."""
    if reason := packed_linear.unusable(device):
        return reason
    if not scheme.is_dense:
        bits = scheme.bits_per_weight((shape[0], shape[1]))
        own = nbytes(shape) * 8 / math.prod(shape)
        return f"the head has {bits:.4g} bits a weight, a screen would have {own:.4g}"
    if shape[1] % GROUP or shape[1] > MOST_COLUMNS:
        return f"the head has {shape[1]} columns, a screen takes multiples of {GROUP} up to {MOST_COLUMNS}"
    return None


def nbytes(shape: tuple[int, ...]) -> int:
    """Bytes of the screen of a head."""
    return CpuBlocks().nbytes(SCHEME, shape) + 2 * 4 * shape[0]


def make_screen(head: PackedWeight) -> PackedWeight | None:
    """The screen of a head, with "deviation" and "norm" of its rows among its buffers; None where a weight is
    NaN, infinite or so large that a float32 has no square of it."""
    rows, columns = head.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scales = torch.empty(rows, columns // GROUP, dtype=torch.float16)
    deviation, norm = torch.empty(rows), torch.empty(rows)
    for first in range(0, rows, _ROWS):
        here = slice(first, min(first + _ROWS, rows))
        matrix = head.kernel.rows(head, torch.arange(here.start, here.stop))
        largest = matrix.abs().view(len(matrix), -1, GROUP).amax(2)
        scales[here] = (largest / 127).half()
        codes[here] = encode(matrix, scales[here].float(), GROUP, SCHEME.weight)
        made = QuantizedTensor(SCHEME, tuple(matrix.shape), codes[here], (scales[here],)).dequantize()
        norm[here] = torch.maximum(matrix.norm(dim=1), made.norm(dim=1))
        deviation[here] = torch.linalg.vector_norm(matrix - made, dim=1)
    # Rounded up; what overflowed is not finite any more.
    norm, deviation = norm * _NORM_UP + _NORM_LOST, deviation * _NORM_UP + _NORM_LOST
    if not bool(torch.isfinite(norm).all() and torch.isfinite(deviation).all()):
        return None
    kernel = CpuBlocks()
    packed = kernel.pack(
        QuantizedTensor(SCHEME, head.shape, codes, (scales,), origin=head.origin), torch.device("cpu")
    )
    buffers = {**packed.buffers, "deviation": deviation, "norm": norm}
    return kernel.restore(SCHEME, head.shape, buffers, head.origin)


@dataclass(frozen=True)
class ScreenedHead:
    """A head with its screen, as the native code knows them."""

    layer: NativeLayer = field(repr=False)
    screen: PackedWeight
    description: HeadDescription = field(repr=False)

    @staticmethod
    def of(
        head: PackedWeight, bias: Tensor | None, screen: PackedWeight, *, scale: float = 1.0, cap: float = 0.0
    ) -> ScreenedHead | None:
        """``scale``: what all logits are multiplied with afterwards; ``cap``: what they are capped at then,
        0: not at all. None where the head is not one plain product, or not by a kernel of dense weights."""
        layer = NativeLayer.of(head, None, bias)
        dense = isinstance(head, NativeWeight) and head.description.codes in DENSE_CODES.values()
        if layer is None or not dense or not 0 < scale < math.inf or not 0 <= cap < math.inf:
            return None
        if bias is not None and not bool(torch.isfinite(bias).all()):
            return None
        packed_linear.check_buffers(
            screen.buffers,
            dict.fromkeys(("deviation", "norm"), ((head.shape[0],), torch.float32)),
            screen.origin,
        )
        met = packed_linear.set_input(screen, INPUT_GROUPS)
        assert met and isinstance(screen, NativeWeight), (
            "int8 codes meet int8 inputs on every instruction set"
        )
        deviation, norm = screen.buffers["deviation"], screen.buffers["norm"]
        description = HeadDescription(
            ctypes.addressof(layer.descriptions[-1]),
            screen.address,
            deviation.data_ptr(),
            norm.data_ptr(),
            float(norm.max()),
            0.0 if bias is None else float(bias.abs().max()),
            scale,
            cap,
            layer.weight.description.codes == DENSE_CODES["bf16"],
        )
        return ScreenedHead(layer, screen, description)

    def __call__(self, x: Tensor) -> Tensor:
        """x float32 (tokens, in) -> float32 (tokens, out): of each row the largest logits, before scale and
        cap; others are what they are or minus infinity."""
        packed_linear.check_columns(x, self.layer.weight)
        out = torch.empty(x.shape[0], self.screen.shape[0])
        assert self.layer.takes(x, out), "a CPU's residual stream is float32"
        run = _operation()
        assert run is not None, "of() had a native weight"
        run(
            ctypes.byref(self.description),
            x.data_ptr(),
            x.shape[0],
            x.stride(0),
            x.shape[1],
            out.data_ptr(),
            out.stride(0),
        )
        return out

    @property
    def steps(self) -> tuple[int, int, int]:
        """Calls that went by the screen, blocks of 16 rows of the head read in them, and calls that read all
        of it."""
        described = self.description
        return described.screened, described.blocks, described.whole
