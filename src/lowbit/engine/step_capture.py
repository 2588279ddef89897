"""Captured decode steps: one plan a batch size, recorded when that size is first met.

A decode step has the newest token of every sequence, and drafts of what may follow where there are any, and
wants all their logits, or only the largest (``ForwardBatch.greedy``), which is a plan of its own. Its size
is (sequences, tokens): how many tokens each sequence has is read when a plan runs. Inputs are copied into
static tensors, of which a plan reads as many rows as its size says: there are no padding rows, so nothing but
real tokens ever enters an activation's scale. The page table has a fixed width; where the tables no longer
hold a batch they grow to twice their size, and plans are recorded anew.
"""

from __future__ import annotations

import logging
import operator
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from lowbit.engine.host_batch import HostBatch
from lowbit.engine.static_batch import StaticBatch
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.step_plan import Arena, Recorder, StepPlan

_log = logging.getLogger(__name__)

Size = tuple[int, int]  # sequences, tokens

_CPU = torch.device("cpu")

PLANS = 192  # sizes kept, the least recently used one goes; 64 without drafts, some 120 with them
ARENA_BYTES = 1 << 28  # for the tensors of a step, all plans together


class StepCapture:
    """Runs decode steps, from plans where they can be recorded. ``replayed`` counts those that were."""

    def __init__(
        self, forward: Callable[[ForwardBatch], Tensor], *, plans: int = PLANS, arena_bytes: int = ARENA_BYTES
    ) -> None:
        self._forward = forward
        self._limit = plans
        self._arena = Arena(arena_bytes)
        self._plans: OrderedDict[tuple[Size, bool], StepPlan] = OrderedDict()
        self._inputs = StaticBatch((8, 16, 64), _CPU)
        self._too_large = 0  # tokens from which on a step needs more memory than plans may take
        self.refusal = ""  # why no step of this model can be captured
        self.replayed = 0

    @property
    def sizes(self) -> list[Size]:
        """Sizes with a plan, the least recently used first."""
        return [size for size, _ in self._plans]

    def replay(self, batch: HostBatch | ForwardBatch) -> Tensor | None:
        """The logits of a decode step, which the next one overwrites; None where it has no plan (yet)."""
        size = (batch.query_lengths.shape[0], batch.tokens.shape[0])
        plan = self._plans.get((size, batch.greedy))
        if plan is None or not self._fits(*size, batch.page_table.shape[1]):
            return None
        self._inputs.fill(batch)
        self._plans.move_to_end((size, batch.greedy))
        self.replayed += 1
        return plan.run()

    def run(self, batch: ForwardBatch) -> Tensor:
        """The logits of a decode step, recorded where it can be; the next one overwrites them."""
        logits = self.replay(batch)
        if logits is not None:
            return logits
        size = (len(batch.query_lengths), len(batch.tokens))
        if self.refusal or (self._too_large and size[1] >= self._too_large):
            return self._forward(batch)
        self._grow(*size, batch.page_table.shape[1])
        self._inputs.fill(batch)
        context = self._inputs.limits[2] * batch.page_size
        static = self._inputs.view(*size, batch.page_size, context, batch.greedy)
        return self._record(size, static)

    def _fits(self, *needed: int) -> bool:
        return all(map(operator.le, needed, self._inputs.limits))

    def _grow(self, *needed: int) -> None:
        """Larger static tensors where the batch needs them; plans hold the old ones' addresses."""
        if self._fits(*needed):
            return
        held = self._inputs.limits
        self._plans.clear()
        sequences, tokens, pages = (h if n <= h else max(2 * h, n) for n, h in zip(needed, held, strict=True))
        self._inputs = StaticBatch((sequences, tokens, pages), _CPU)

    def _record(self, size: Size, static: ForwardBatch) -> Tensor:
        recorder = Recorder(self._arena)
        logits, plan = recorder.record(lambda: self._forward(static))
        if plan is not None:
            self._plans[size, static.greedy] = plan
            if len(self._plans) > self._limit:
                self._plans.popitem(last=False)
        elif self._arena.full:
            self._too_large = size[1]
        else:
            self.refusal = recorder.reason
            _log.warning("lowbit: step capture off: %s; running eagerly", recorder.reason)
        return logits
