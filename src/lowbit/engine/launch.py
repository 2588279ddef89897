"""Launch: the next step, scheduled and computed or only queued; with less where it finds no memory."""

from __future__ import annotations

import logging

import torch

from lowbit.engine.choices import Choices, DeviceChoices, DeviceSampler, HostChoices
from lowbit.engine.continuous_decode import ContinuousDecode
from lowbit.engine.drafting import Drafting
from lowbit.engine.finish import Finisher
from lowbit.engine.messages import TokenEvent
from lowbit.engine.runner import Runner
from lowbit.engine.sampler import wants_peak_only
from lowbit.engine.scheduler import Chunk, Scheduler
from lowbit.engine.sequence import Flight
from lowbit.engine.step_parts import Part, Step, asks, tokens_of, wanted_rows
from lowbit.errors import printable
from lowbit.kernels.device_memory import release_memory

_log = logging.getLogger("lowbit")


class Launcher:
    """Launches steps. ``has_states``: some layers keep states of sequences, from which nothing leads back."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        sampler: DeviceSampler | None,
        finisher: Finisher,
        drafting: Drafting | None,
        continuous: ContinuousDecode | None,
        device: torch.device,
        has_states: bool,
    ) -> None:
        self.steps = 0
        self._scheduler = scheduler
        self._runner = runner
        self._sampler = sampler
        self._finisher = finisher
        self._drafting = drafting
        self._continuous = continuous
        self._device = device
        self._has_states = has_states

    def launch(self, flying: Step | None) -> tuple[Step | None, list[TokenEvent]]:
        """The next step, None where there is nothing to compute, and the end of a sequence that finds no
        memory. ``flying``: the step that was launched and nobody has looked at."""
        chunks = self._scheduler.next_chunks()
        if self._drafting is not None:
            chunks = self._drafting.added_to(chunks)
        try:
            return self._run(chunks, flying), []
        except torch.OutOfMemoryError as error:
            reason = printable(str(error).partition("\n")[0], 200)
        # Out here nothing of the step is held any more: the error had its frames, and they its tensors.
        chunks = self._with_less(chunks, reason)
        try:
            return self._run(chunks, flying), []
        except torch.OutOfMemoryError as error:
            reason = printable(str(error).partition("\n")[0], 200)
        release_memory(self._device)
        self._start_again(chunks[:-1])
        ended = self._finisher.end(
            chunks[-1].sequence,
            "error",
            "out_of_memory",
            f"out of memory in a step of {tokens_of(chunks)} tokens, twice: {reason}; try again, or "
            "start the server with a lower --mem-fraction-static or --max-running-requests",
        )
        return None, [ended]

    def _with_less(self, chunks: list[Chunk], reason: str) -> list[Chunk]:
        """After a step that was too large: the next one without the youngest sequence. Steps stay smaller.

        What the step wrote is written again: no sequence has counted it.
        """
        release_memory(self._device)
        scheduler = self._scheduler
        tokens = tokens_of(chunks)
        for sequence in scheduler.running:
            scheduler.drop_drafts(sequence)
        if any(chunk.count > 1 for chunk in chunks) and scheduler.prefill_budget > scheduler.page_size:
            scheduler.prefill_budget = max(scheduler.prefill_budget // 2, scheduler.page_size)
        else:
            scheduler.max_running = max(len(scheduler.running) - 1, 1)
        self._start_again(chunks)
        if len(scheduler.running) > 1:
            scheduler.retract(scheduler.running[-1])
        _log.warning(
            "lowbit: out of memory in a step of %d tokens: %s; from now on steps have at most %d prompt "
            "tokens and %d sequences: start with a lower --mem-fraction-static",
            tokens,
            reason,
            scheduler.prefill_budget,
            scheduler.max_running,
        )
        return scheduler.next_chunks(admit=self._has_states)

    def _start_again(self, chunks: list[Chunk]) -> None:
        """After a step that failed: states of some layers may have moved on."""
        if self._has_states:
            for chunk in reversed(chunks):
                self._scheduler.retract(chunk.sequence)

    def _run(self, chunks: list[Chunk], flying: Step | None) -> Step | None:
        """Compute the chunks. Where this fails nothing has changed but what is in their pages."""
        if not chunks:
            return None
        continued = None if self._continuous is None else self._continuous.run(chunks)
        if continued is not None:
            chunks, choices = continued
            return self._launched(wanted_rows(chunks)[1], choices, choices.steps)
        rows, parts = wanted_rows(chunks)
        known = flying.choices if flying is not None else None
        chosen = known.tokens if isinstance(known, DeviceChoices) else None
        greedy = self._sampler is None and all(wants_peak_only(chunk.sequence) for chunk in chunks)
        logits = self._runner.forward(chunks, rows, chosen, greedy=greedy)
        asked = [] if greedy else [ask for part in parts for ask in asks(part)]
        if self._sampler is None:
            return self._launched(parts, HostChoices(logits.cpu(), asked), 1)
        return self._launched(parts, self._sampler.choose(logits, asked), 1)

    def _launched(self, parts: list[Part], choices: Choices, steps: int) -> Step:
        self.steps += steps
        for part in parts:
            sequence = part.chunk.sequence
            sequence.flights.append(Flight(part.start, part.known - 1 if part.chooses else -1))
            sequence.computed += part.chunk.count
        return Step(parts, choices)
