"""The gated delta rule on a CPU: two native calls a layer (``csrc/delta_rule.cpp``), and the sigmoid gate."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels import native
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.gpu import runtime
from lowbit.kernels.recurrent import DeltaParameters, LayerState, StateSpec
from lowbit.kernels.step_plan import Operation

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_NO_MEMORY = 2


class _Layer(ctypes.Structure):
    """lowbit_delta_layer."""

    _fields_ = [
        *((name, _POINTER) for name in ("inputs", "matrices", "taps", "decay", "bias", "norm")),
        ("slots", _LONG),
        *((name, _INT) for name in ("k_heads", "heads", "k_dim", "v_dim", "tap_count")),
        ("eps", ctypes.c_float),
    ]


class _Batch(ctypes.Structure):
    """lowbit_delta_batch."""

    _fields_ = [
        *((name, _POINTER) for name in ("query_lengths", "context_lengths", "slots")),
        ("sequences", _INT),
    ]


@dataclass(frozen=True)
class _Functions:
    """The native functions, with their argument types set."""

    convolve: Operation
    rule: Operation
    gate: Operation


@cache
def _functions() -> _Functions | None:
    library = native.library()
    if library is None:
        return None
    begin = (_POINTER, _POINTER, _POINTER, _LONG)
    return _Functions(
        Operation(library, "delta_convolve", (*begin, _POINTER), _fault),
        Operation(library, "delta_rule", (*begin, _POINTER, _POINTER), _fault),
        Operation(library, "sigmoid_gate", (_POINTER, _LONG, _POINTER, _LONG, _LONG, _INT)),
    )


def _fault(status: int) -> Exception:
    if status == _NO_MEMORY:
        return MemoryError("recurrent layer: no memory for its heads")
    return LowbitError("E0703", "recurrent layer: a sequence's slot is outside the states")


class CpuDelta:
    """See the module docstring."""

    name = "cpu"
    unit = 1

    def refuses(self, spec: StateSpec, device: torch.device) -> str | None:
        """Value heads in sixteens, on a CPU."""
        if device.type != "cpu":
            return f"runs on a CPU, got {device.type}"
        if spec.v_dim % 16:
            return f"needs v_dim % 16 == 0, got {spec.v_dim}"
        return None if native.library() is not None else "the native library is not there"

    def run(self, mixed: Tensor, state: LayerState, batch: ForwardBatch, weights: DeltaParameters) -> Tensor:
        """mixed (tokens, width) -> (tokens, heads * v_dim) in its dtype."""
        functions, spec, slots = _functions(), state.spec, batch.state_slots
        assert functions is not None and slots is not None, "the library is there, and slots are handed out"
        assert mixed.shape[1] == spec.width, f"rows of {mixed.shape[1]} are not {spec}'s"
        for tensor, shape in (
            (weights.taps, (spec.taps, spec.channels)),
            (weights.decay, (spec.heads,)),
            (weights.bias, (spec.heads,)),
            (weights.norm, (spec.v_dim,)),
        ):
            assert tensor.shape == shape and tensor.dtype is torch.float32 and tensor.is_contiguous(), shape
        x = mixed if mixed.dtype is torch.float32 and mixed.stride(1) == 1 else mixed.float().contiguous()
        layer = _Layer(
            state.inputs.data_ptr(),
            state.matrices.data_ptr(),
            weights.taps.data_ptr(),
            weights.decay.data_ptr(),
            weights.bias.data_ptr(),
            weights.norm.data_ptr(),
            len(state.matrices),
            spec.k_heads,
            spec.heads,
            spec.k_dim,
            spec.v_dim,
            spec.taps,
            weights.eps,
        )
        sequences = _Batch(
            batch.query_lengths.data_ptr(),
            batch.context_lengths.data_ptr(),
            slots.data_ptr(),
            len(batch.query_lengths),
        )
        convolved = torch.empty(len(x), spec.channels)
        out = torch.empty(len(x), spec.heads * spec.v_dim)
        begin = (ctypes.byref(layer), ctypes.byref(sequences), x.data_ptr(), x.stride(0))
        functions.convolve(*begin, convolved.data_ptr())
        functions.rule(*begin, convolved.data_ptr(), out.data_ptr())
        return out if mixed.dtype is torch.float32 else out.to(mixed.dtype)


def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """x (tokens, width) times sigmoid(gate), in place; rows of both may lie apart."""
    if runtime.runs_on(x.device):
        from lowbit.kernels.gpu import elementwise

        return elementwise.sigmoid_gate(x, gate)
    functions = _functions() if x.is_cpu else None
    plain = all(t.dtype is torch.float32 and t.dim() == 2 and t.stride(1) == 1 for t in (x, gate))
    if functions is None or not plain:
        return x.copy_(x.float() * torch.sigmoid(gate.float()))
    functions.gate(x.data_ptr(), x.stride(0), gate.data_ptr(), gate.stride(0), *x.shape)
    return x
