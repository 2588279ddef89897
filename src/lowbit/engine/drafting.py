"""Drafting: which drafts a step carries, and which models can have any.

What a sequence may say next is ``speculation``'s to know; here the drafts of all that decode are fitted into
one step and into free pages, and models whose answers would depend on them are refused.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from lowbit.engine.finish import Counters
from lowbit.engine.sampler import has_penalties
from lowbit.engine.scheduler import Chunk, Scheduler
from lowbit.engine.sequence import Sequence
from lowbit.engine.speculation import STEP_TOKENS, Drafter, Speculation, worth
from lowbit.errors import LowbitError, thousands
from lowbit.kernels.recurrent import state_bytes
from lowbit.models.model import Model
from lowbit.settings import Settings

_log = logging.getLogger("lowbit")


def rules_for(model: Model, settings: Settings) -> Speculation | None:
    """What the settings ask for, where the model's answers do not depend on it; else E0105."""
    rules = Speculation.by(settings)
    if rules is None:
        return None
    if state_bytes(model.cache_specs()):
        raise LowbitError(
            "E0105",
            "--speculative-algorithm: this model has recurrent layers, and a wrong draft would change their "
            "state for good; drop the option",
        )
    if model.spans_tokens:
        raise LowbitError(
            "E0105",
            "--speculative-algorithm: this model's inputs share scales between tokens, so wrong drafts would "
            "change its answers; drop it, or use scales for each token",
        )
    if "reference" in model.kernels:
        _log.warning(
            "lowbit: speculation: some layers run on the reference kernel, whose last bits depend on how "
            "many tokens a step has: with drafts, as in a batch, a close call may go the other way"
        )
    if model.device.type == "cuda":
        _log.warning(
            "lowbit: speculation: on a GPU steps with drafts are no CUDA graphs and do not overlap: it is "
            "faster where answers copy much of their prompts, and slower where they do not"
        )
    return rules


class Drafting:
    """Drafts for the sequences that ``follow`` was told of. ``at_once``: whether all rows of a step are
    chosen from at once, as on a GPU."""

    def __init__(self, rules: Speculation, scheduler: Scheduler, at_once: bool) -> None:
        self._rules = rules
        self._scheduler = scheduler
        self._at_once = at_once

    def follow(self, sequence: Sequence) -> None:
        """Drafts for it from now on."""
        sequence.drafter = Drafter(sequence.tokens, self._rules)

    def added_to(self, chunks: list[Chunk]) -> list[Chunk]:
        """The chunks, those of decoding sequences with what may follow, as far as it is worth its time."""
        rules = self._rules
        decoding = [c.sequence for c in chunks if c.sequence.pending == 1 and c.sequence.output_length > 0]
        left = len(decoding)
        if not 0 < left < STEP_TOKENS:
            return chunks
        room = rules.most if left == 1 else STEP_TOKENS - left
        sure = worth(left)
        drafted = []
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence in decoding:
                assert sequence.drafter is not None, "every sequence of this engine has one"
                # The last token it may have needs no draft: nothing is chosen behind it.
                most = min(rules.most, room // left, sequence.limit - len(sequence.tokens) - 1)
                if self._at_once and has_penalties(sequence):
                    most = 0  # each penalty depends on the row before
                drafts = sequence.drafter.draft(most, sure)
                drafts = drafts[: self._scheduler.room_for_drafts(chunk, len(drafts))]
                chunk = replace(chunk, drafts=drafts)
                left -= 1
                room -= len(drafts)
            drafted.append(chunk)
        return drafted


def log_drafts(counters: Counters) -> None:
    """What drafts came to, where there were any."""
    if counters.drafts:
        _log.info(
            "lowbit: speculation: %s of %s drafts were right, %.1f tokens a step where there were any",
            thousands(counters.accepted_drafts),
            thousands(counters.drafts),
            1 + counters.accepted_drafts / counters.drafted_turns,
        )
