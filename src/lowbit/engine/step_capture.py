"""Captured decode steps: one plan a batch size, recorded when that size is first met.

A decode step has one token of every sequence and wants all their logits. Its inputs are copied into static
tensors, of which the plan of ``n`` sequences reads the first ``n`` rows: there are no padding rows, so
nothing but real tokens ever enters an activation's scale. The page table has a fixed width; where the tables
no longer hold a batch they grow to twice their size, and plans are recorded anew.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.step_plan import Arena, Recorder, StepPlan

_log = logging.getLogger(__name__)

PLANS = 64  # batch sizes kept; the least recently used one goes
ARENA_BYTES = 1 << 28  # for the tensors of a step, all plans together


class _Inputs:
    """Static tensors for up to ``sequences`` sequences of up to ``pages`` pages."""

    def __init__(self, sequences: int, pages: int) -> None:
        self.sequences, self.pages = sequences, pages

        def indices(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32)

        self.tokens, self.positions, self.write_slots = (indices(sequences) for _ in range(3))
        self.context_lengths = indices(sequences)
        self.query_lengths = torch.ones(sequences, dtype=torch.int32)
        self.page_table = indices(sequences, pages)
        self.sample_rows = torch.arange(sequences)

    def fill(self, batch: ForwardBatch) -> ForwardBatch:
        """Copy a decode batch in; the same batch in static tensors."""
        count = len(batch.tokens)
        for name in ("tokens", "positions", "write_slots", "context_lengths"):
            getattr(self, name)[:count] = getattr(batch, name)
        self.page_table[:count, : batch.page_table.shape[1]] = batch.page_table
        return ForwardBatch(
            tokens=self.tokens[:count],
            positions=self.positions[:count],
            write_slots=self.write_slots[:count],
            query_lengths=self.query_lengths[:count],
            context_lengths=self.context_lengths[:count],
            page_table=self.page_table[:count],
            sample_rows=self.sample_rows[:count],
            page_size=batch.page_size,
            max_query=1,
            max_context=self.pages * batch.page_size,  # a kernel must not rely on this step's own
        )


class StepCapture:
    """Runs decode steps, from plans where they can be recorded. ``replayed`` counts those that were."""

    def __init__(
        self, forward: Callable[[ForwardBatch], Tensor], *, plans: int = PLANS, arena_bytes: int = ARENA_BYTES
    ) -> None:
        self._forward = forward
        self._limit = plans
        self._arena = Arena(arena_bytes)
        self._plans: OrderedDict[int, StepPlan] = OrderedDict()
        self._inputs = _Inputs(8, 64)
        self._too_large = 0  # sequences from which on a step needs more memory than plans may take
        self.refusal = ""  # why no step of this model can be captured
        self.replayed = 0

    @property
    def sizes(self) -> list[int]:
        """Batch sizes with a plan, the least recently used first."""
        return list(self._plans)

    def run(self, batch: ForwardBatch) -> Tensor:
        """The logits of a decode step, in memory of their own."""
        count = len(batch.tokens)
        if self.refusal or (self._too_large and count >= self._too_large):
            return self._forward(batch)
        self._grow(count, batch.page_table.shape[1])
        static = self._inputs.fill(batch)
        plan = self._plans.get(count)
        if plan is None:
            return self._record(count, static)
        self._plans.move_to_end(count)
        self.replayed += 1
        return plan.run().clone()

    def _grow(self, sequences: int, pages: int) -> None:
        """Larger static tensors where the batch needs them; plans hold the old ones' addresses."""
        held = self._inputs
        if sequences <= held.sequences and pages <= held.pages:
            return
        wanted = [held.sequences, held.pages]
        for place, needed in enumerate((sequences, pages)):
            if needed > wanted[place]:
                wanted[place] = max(2 * wanted[place], needed)
        self._plans.clear()
        self._inputs = _Inputs(*wanted)

    def _record(self, count: int, static: ForwardBatch) -> Tensor:
        recorder = Recorder(self._arena)
        logits, plan = recorder.record(lambda: self._forward(static))
        if plan is not None:
            self._plans[count] = plan
            if len(self._plans) > self._limit:
                self._plans.popitem(last=False)
        elif self._arena.full:
            self._too_large = count
        else:
            self.refusal = recorder.reason
            _log.warning("lowbit: step capture off: %s; running eagerly", recorder.reason)
        return logits.clone()
