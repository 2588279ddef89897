"""Captured decode steps: one plan a batch size, recorded when that size is first met.

A decode step has the newest token of every sequence, and drafts of what may follow where there are any, and
wants all their logits. Its size is (sequences, tokens): how many tokens each sequence has is read when a plan
runs. Inputs are copied into static tensors, of which a plan reads as many rows as its size says: there are no
padding rows, so nothing but real tokens ever enters an activation's scale. The page table has a fixed width;
where the tables no longer hold a batch they grow to twice their size, and plans are recorded anew.
"""

from __future__ import annotations

import logging
import operator
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.step_plan import Arena, Recorder, StepPlan

_log = logging.getLogger(__name__)

Size = tuple[int, int]  # sequences, tokens

PLANS = 192  # sizes kept, the least recently used one goes; 64 without drafts, some 120 with them
ARENA_BYTES = 1 << 28  # for the tensors of a step, all plans together


class _Inputs:
    """Static tensors for up to ``sequences`` sequences of up to ``pages`` pages, and ``tokens`` tokens."""

    def __init__(self, sequences: int, tokens: int, pages: int) -> None:
        self.limits = (sequences, tokens, pages)

        def indices(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32)

        self.tokens, self.positions, self.write_slots = (indices(tokens) for _ in range(3))
        self.query_lengths, self.context_lengths = (indices(sequences) for _ in range(2))
        self.page_table = indices(sequences, pages)
        self.sample_rows = torch.arange(tokens)

    def fill(self, batch: ForwardBatch) -> ForwardBatch:
        """Copy a decode batch in; the same batch in static tensors."""
        sequences, tokens = len(batch.query_lengths), len(batch.tokens)
        for name in ("tokens", "positions", "write_slots"):
            getattr(self, name)[:tokens] = getattr(batch, name)
        for name in ("query_lengths", "context_lengths"):
            getattr(self, name)[:sequences] = getattr(batch, name)
        self.page_table[:sequences, : batch.page_table.shape[1]] = batch.page_table
        return ForwardBatch(
            tokens=self.tokens[:tokens],
            positions=self.positions[:tokens],
            write_slots=self.write_slots[:tokens],
            query_lengths=self.query_lengths[:sequences],
            context_lengths=self.context_lengths[:sequences],
            page_table=self.page_table[:sequences],
            sample_rows=self.sample_rows[:tokens],
            page_size=batch.page_size,
            # The most that any step of this size has: a kernel must not rely on this one's own.
            max_query=tokens - sequences + 1,
            max_context=self.limits[2] * batch.page_size,
        )


class StepCapture:
    """Runs decode steps, from plans where they can be recorded. ``replayed`` counts those that were."""

    def __init__(
        self, forward: Callable[[ForwardBatch], Tensor], *, plans: int = PLANS, arena_bytes: int = ARENA_BYTES
    ) -> None:
        self._forward = forward
        self._limit = plans
        self._arena = Arena(arena_bytes)
        self._plans: OrderedDict[Size, StepPlan] = OrderedDict()
        self._inputs = _Inputs(8, 16, 64)
        self._too_large = 0  # tokens from which on a step needs more memory than plans may take
        self.refusal = ""  # why no step of this model can be captured
        self.replayed = 0

    @property
    def sizes(self) -> list[Size]:
        """Sizes with a plan, the least recently used first."""
        return list(self._plans)

    def run(self, batch: ForwardBatch) -> Tensor:
        """The logits of a decode step, in memory of their own."""
        size = (len(batch.query_lengths), len(batch.tokens))
        if self.refusal or (self._too_large and size[1] >= self._too_large):
            return self._forward(batch)
        self._grow(*size, batch.page_table.shape[1])
        static = self._inputs.fill(batch)
        plan = self._plans.get(size)
        if plan is None:
            return self._record(size, static)
        self._plans.move_to_end(size)
        self.replayed += 1
        return plan.run().clone()

    def _grow(self, *needed: int) -> None:
        """Larger static tensors where the batch needs them; plans hold the old ones' addresses."""
        held = self._inputs.limits
        if all(map(operator.le, needed, held)):
            return
        self._plans.clear()
        self._inputs = _Inputs(*(h if n <= h else max(2 * h, n) for n, h in zip(needed, held, strict=True)))

    def _record(self, size: Size, static: ForwardBatch) -> Tensor:
        recorder = Recorder(self._arena)
        logits, plan = recorder.record(lambda: self._forward(static))
        if plan is not None:
            self._plans[size] = plan
            if len(self._plans) > self._limit:
                self._plans.popitem(last=False)
        elif self._arena.full:
            self._too_large = size[1]
        else:
            self.refusal = recorder.reason
            _log.warning("lowbit: step capture off: %s; running eagerly", recorder.reason)
        return logits.clone()
