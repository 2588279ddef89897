"""Captured steps: one plan a batch size, recorded when that size is first met, or of prompts the second time.

A decode step has the newest token of every sequence, and drafts of what may follow where there are any, and
wants all their logits, or only the largest (``ForwardBatch.greedy``), which is a plan of its own. Its size
is (sequences, tokens): how many tokens each sequence has is read when a plan runs. Inputs are copied into
static tensors, of which a plan reads as many rows as its size says: there are no padding rows, so nothing but
real tokens ever enters an activation's scale. The page table has a fixed width; where the tables no longer
hold a batch they grow to twice their size, and plans are recorded anew.

A step with prompts has as many more sizes as prompts have lengths, and most come once. But a long prompt's
chunks are all of one size, and it is those that take long: what a size meets again is worth a plan.
"""

from __future__ import annotations

import logging
import operator
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Listing
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit.engine.host_batch import HostBatch
from lowbit.engine.static_batch import StaticBatch
from lowbit.kernels.decode_steps import DecodedSteps, decode_steps
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.sampling import Draw
from lowbit.kernels.step_plan import Arena, Recorder, StepPlan

_log = logging.getLogger(__name__)

Size = tuple[int, int]  # sequences, tokens


class _Shape(NamedTuple):
    """What a plan was recorded for."""

    size: Size
    greedy: bool
    prompt: tuple[int, int | None] | None = None  # rows of logits, and the first that is a prompt's


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
        self._plans: OrderedDict[_Shape, StepPlan] = OrderedDict()
        self._met: OrderedDict[_Shape, None] = OrderedDict()  # prompts' shapes that came once
        self._inputs = StaticBatch((8, 16, 64), _CPU)
        self._too_large = 0  # tokens from which on a step needs more memory than plans may take
        self.refusal = ""  # why no decode step of this model can be captured
        self.prompt_refusal = ""  # why no step with prompts can
        self.replayed = 0

    @property
    def sizes(self) -> list[Size]:
        """Sizes of decode steps with a plan, the least recently used first."""
        return [shape.size for shape in self._plans if shape.prompt is None]

    def replay(self, batch: HostBatch | ForwardBatch) -> Tensor | None:
        """The logits of a decode step, which the next one overwrites; None where it has no plan (yet)."""
        size = (batch.query_lengths.shape[0], batch.tokens.shape[0])
        return self._replay(_Shape(size, batch.greedy), batch)

    def decode(
        self, batch: HostBatch, draws: list[Draw], stops: Listing[Listing[int]], most: int
    ) -> tuple[DecodedSteps, Tensor] | None:
        """Decode steps one after another (``decode_steps``), each of one token a sequence, and the last one's
        logits; None where their size has no plan (yet)."""
        size = (batch.query_lengths.shape[0], batch.tokens.shape[0])
        pages = -(-(int(batch.context_lengths.max()) + most - 1) // batch.page_size)
        plan = self._plans.get(_Shape(size, batch.greedy))
        assert size[0] == size[1] and pages == batch.page_table.shape[1], "one token, pages for all steps"
        if plan is None or not self._fits(*size, pages):
            return None
        self._inputs.fill(batch)
        self._plans.move_to_end(_Shape(size, batch.greedy))
        found = decode_steps(plan, self._inputs.decode_inputs, batch.page_size, draws, stops, most)
        self.replayed += len(found.tokens)
        return found, plan.result

    def run(self, batch: ForwardBatch) -> Tensor:
        """The logits of a decode step, recorded where it can be; the next one overwrites them."""
        logits = self.replay(batch)
        if logits is not None:
            return logits
        size = (len(batch.query_lengths), len(batch.tokens))
        if self.refusal or (self._too_large and size[1] >= self._too_large):
            return self._forward(batch)
        return self._record(_Shape(size, batch.greedy), batch)

    def run_prompts(self, batch: ForwardBatch) -> Tensor:
        """The same of any other step; where its shape comes the first time it is not recorded."""
        size = (len(batch.query_lengths), len(batch.tokens))
        shape = _Shape(size, batch.greedy, (len(batch.sample_rows), batch.prompt_row))
        logits = self._replay(shape, batch)
        if logits is not None:
            return logits
        if self.prompt_refusal or (self._too_large and size[1] >= self._too_large):
            return self._forward(batch)
        if shape in self._met:
            del self._met[shape]
            return self._record(shape, batch)
        self._met[shape] = None
        if len(self._met) > self._limit:
            self._met.popitem(last=False)
        return self._forward(batch)

    def _replay(self, shape: _Shape, batch: HostBatch | ForwardBatch) -> Tensor | None:
        plan = self._plans.get(shape)
        if plan is None or not self._fits(*shape.size, batch.page_table.shape[1]):
            return None
        self._inputs.fill(batch)
        self._plans.move_to_end(shape)
        self.replayed += 1
        return plan.run()

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

    def _record(self, shape: _Shape, batch: ForwardBatch) -> Tensor:
        self._grow(*shape.size, batch.page_table.shape[1])
        self._inputs.fill(batch)
        context = self._inputs.limits[2] * batch.page_size
        static = self._inputs.view(*shape.size, batch.page_size, context, shape.greedy)
        if shape.prompt is not None:
            rows, first = shape.prompt
            static = replace(static, sample_rows=self._inputs.picked(rows), prompt_row=first)
        recorder = Recorder(self._arena)
        logits, plan = recorder.record(lambda: self._forward(static))
        if plan is not None:
            self._plans[shape] = plan
            if len(self._plans) > self._limit:
                self._plans.popitem(last=False)
        elif self._arena.full:
            self._too_large = shape.size[1]
        elif shape.prompt is not None:
            self.prompt_refusal = recorder.reason
            _log.info("lowbit: capture of prompts' steps off: %s", recorder.reason)
        else:
            self.refusal = recorder.reason
            _log.warning("lowbit: step capture off: %s; running eagerly", recorder.reason)
        return logits
