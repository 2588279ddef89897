"""What stands in for CUDA graphs, and for kernels that can be part of them, where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lowbit.kernels.attention import AttentionParameters, LayerCache
from lowbit.kernels.attention_reference import ReferenceAttention
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.recurrent import DeltaParameters, LayerState
from lowbit.kernels.recurrent_reference import ReferenceDelta

_aten = torch.ops.aten
_WAITING = {_aten._local_scalar_dense.default, _aten.nonzero.default}


class _NoWaiting(TorchDispatchMode):
    """Raises where a GPU would have to be waited for."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function in _WAITING:
            raise RuntimeError("called a synchronizing operation")
        return function(*args, **(kwargs or {}))


class StandInRecorder:
    """Keeps the step and runs it again: what a graph would do with the memory the step reads and writes."""

    def __init__(self, *, memory: int = 1 << 30, watches: bool = True) -> None:
        self.captured = 0
        self.watches = watches  # for what waits; Triton's interpreter does
        self.memory = memory  # captures there is room for

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """See ``Recorder``."""
        if self.captured >= self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        with _NoWaiting() if self.watches else nullcontext():
            step()
        self.captured += 1
        return step


class Attention(ReferenceAttention):
    """The reference, which reads lengths on a CPU: allowed here, since a GPU's kernel has no need to wait."""

    def write(self, cache: LayerCache, k: Tensor, v: Tensor, batch: ForwardBatch) -> None:
        """Whatever is watched."""
        with _disable_current_modes():
            super().write(cache, k, v, batch)

    def attend(
        self, q: Tensor, cache: LayerCache, batch: ForwardBatch, parameters: AttentionParameters
    ) -> Tensor:
        """Whatever is watched."""
        with _disable_current_modes():
            return super().attend(q, cache, batch, parameters)


class PaddedAttention(Attention):
    """The same with the contract of padding rows."""

    takes_padding = True

    def write(self, cache: LayerCache, k: Tensor, v: Tensor, batch: ForwardBatch) -> None:
        """Slot -1 is nowhere."""
        with _disable_current_modes():
            real = batch.write_slots >= 0
            kept = ForwardBatch(**{**batch.__dict__, "write_slots": batch.write_slots[real]})
            super().write(cache, k[real], v[real], kept)

    def attend(
        self, q: Tensor, cache: LayerCache, batch: ForwardBatch, parameters: AttentionParameters
    ) -> Tensor:
        """No context: zeros. Sequences that have some come first, as in any padded step."""
        out = torch.zeros(q.shape[0], q.shape[1] * cache.spec.v_dim)
        with _disable_current_modes():
            real = int((batch.context_lengths > 0).sum())
            if real:
                lengths = {name: getattr(batch, name)[:real] for name in ("query_lengths", "context_lengths")}
                kept = ForwardBatch(**{**batch.__dict__, **lengths, "page_table": batch.page_table[:real]})
                tokens = int(lengths["query_lengths"].sum())
                out[:tokens] = super().attend(q[:tokens], cache, kept, parameters)
        return out


class AsOnADevice(ReferenceDelta):
    """All sequences of a step together, without reading a length."""

    def run(self, mixed: Tensor, state: LayerState, batch: ForwardBatch, weights: DeltaParameters) -> Tensor:
        return self.by_rule(mixed, state, batch, weights, True)
