"""A layer of one packed weight in one native call (csrc/linear.cpp): quantizing x, the product, and the rest.

The rest are row scales, factors, a bias and a gate. Each step has the bits it has by itself
(``activation_native``, ``packed_linear``, ``elementwise``); what is saved are the passes over memory between.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from lowbit.kernels.activation_quant import InputTransform
from lowbit.kernels.elementwise import activation_number
from lowbit.kernels.linear_kernel import PackedWeight
from lowbit.kernels.packed_linear import NativeWeight, check_columns
from lowbit.kernels.prompt_rows import first_prompt_row
from lowbit.kernels.step_plan import Operation, native_operation, no_memory

MOST_COLUMNS = 1 << 15  # of x where a layer changes it: MOST_LAYER_COLUMNS of csrc/linear.cpp


class LayerDescription(ctypes.Structure):
    """lowbit_layer_description."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "quantizer", "static_factor", "column_order")),
        *((name, ctypes.c_void_p) for name in ("row_scale", "bias")),
        *((name, ctypes.c_int32) for name in ("factors", "activation")),
    )


@cache
def _operation() -> Operation | None:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    arguments = (pointer, pointer, number, number, number, pointer, number, number)
    return native_operation("layer", arguments, no_memory("for a product's input"))


@dataclass(frozen=True)
class NativeLayer:
    """``weight`` with what its layer does around it, as the native code knows it."""

    weight: NativeWeight
    descriptions: dict[int, LayerDescription] = field(
        repr=False
    )  # by the activation's number, -1 without one
    kept: tuple[object, ...] = field(repr=False)  # what the descriptions point at

    @staticmethod
    def of(weight: PackedWeight, transform: InputTransform | None, bias: Tensor | None) -> NativeLayer | None:
        """None where the steps have to run one by one."""
        if not isinstance(weight, NativeWeight) or _operation() is None:
            return None
        order, row_scale = weight.buffers.get("column_order"), weight.buffers.get("row_scale")
        if (transform is not None or order is not None) and weight.columns > MOST_COLUMNS:
            return None
        quantizer, static_factor = None, None
        if transform is not None:
            quantizer = transform.native
            if quantizer is None or not quantizer.by_rows:
                return None
            static_factor = quantizer.buffers.static_scale if transform.is_static else None
        if bias is not None and not (bias.is_cpu and bias.dtype is torch.float32 and bias.is_contiguous()):
            return None
        addresses = (None if t is None else t.data_ptr() for t in (static_factor, order, row_scale, bias))
        described = LayerDescription(
            weight.address,
            None if quantizer is None else ctypes.addressof(quantizer.description),
            *addresses,
            quantizer is not None and bool(quantizer.factors),
            -1,
        )
        return NativeLayer(weight, {-1: described}, (transform, quantizer, bias))

    def takes(self, x: Tensor, out: Tensor | None = None) -> bool:
        """Whether x and the result lie as the native code reads and writes them."""
        return all(
            t.is_cpu and t.dtype is torch.float32 and t.dim() == 2 and t.stride(1) == 1
            for t in (x, out)
            if t is not None
        )

    @property
    def halves(self) -> bool:
        """Whether its rows can be a gate's and as many others'."""
        return self.weight.halves

    def __call__(self, x: Tensor, out: Tensor | None = None, activation: str | None = None) -> Tensor:
        """x float32 (tokens, in) -> (tokens, out); with an activation activation(gate) * up, half as wide."""
        tokens, columns = x.shape
        check_columns(x, self.weight)
        width: int = self.weight.shape[0]
        number = -1
        if activation is not None:
            assert self.halves, "asked before"
            number, width = activation_number(activation), width // 2
        if out is None:
            out = torch.empty(tokens, width)
        assert out.shape == (tokens, width) and self.takes(x, out), "asked before"
        described = self.descriptions.get(number)
        if described is None:
            described = LayerDescription.from_buffer_copy(self.descriptions[-1])
            described.activation = number
            self.descriptions[number] = described
        run = _operation()
        assert run is not None, "of() asked"
        run(
            ctypes.byref(described),
            x.data_ptr(),
            tokens,
            x.stride(0),
            columns,
            out.data_ptr(),
            out.stride(0),
            first_prompt_row(tokens),
        )
        return out
