"""Continuous decode: several decode steps of the same sequences in one call, without Python between them.

Between two steps the next one's numbers are a matter of course, so long as nobody ends or joins: each token
chosen is the next input, one place further on. What Python does there takes 0.3 ms of a small model's 3.6,
because the weights have driven its code and data out of the caches. So tokens of which nothing else is
wanted, no log-probabilities, are chosen in native code, under penalties and biases too, until a sequence
chooses one of its stop tokens; afterwards everything is looked at as drafts that all were right (``finish``).
A stop string may turn up earlier: the steps behind it were in vain, and their tokens are dropped unseen.

Text comes that many tokens at a time, and a new request waits until they are there: together they take no
longer than ``SECONDS``. Large models take a step at a time, and would gain nothing.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch
from torch import Tensor

from lowbit.engine.messages import TokenLogprob
from lowbit.engine.runner import Runner
from lowbit.engine.sampler import plan_draw, wants_peak_only
from lowbit.engine.scheduler import Chunk, Scheduler
from lowbit.engine.sequence import Sequence
from lowbit.kernels.decode_steps import DecodedSteps

SECONDS = 0.016  # what the steps of one call may take together, where their number is not given
MOST = 8  # of them
_FORGET = 0.98  # how soon a slow call is forgotten: each time one step is all that is taken


class ContinuousDecode:
    """``steps``: so many in one call; None: as many as go into ``SECONDS``."""

    def __init__(self, scheduler: Scheduler, runner: Runner, vocabulary: int, steps: int | None) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._vocabulary = vocabulary
        self._steps = steps
        self._seconds: dict[int, float] = {}  # of a step, by sequences

    def run(self, chunks: list[Chunk]) -> tuple[list[Chunk], ContinuedChoices] | None:
        """The chunks with what was decoded behind them, and all that was chosen; None where the next step
        has to be looked at first."""
        if not all(map(_goes_on, chunks)):
            return None
        sequences = [chunk.sequence for chunk in chunks]
        left = min(one.limit - len(one.tokens) for one in sequences)
        steps = min(self._wanted(len(chunks)), left)
        if steps <= 1:
            return None
        try:
            draws = [
                plan_draw(row, one, len(one.tokens), self._vocabulary) for row, one in enumerate(sequences)
            ]
        except Exception:
            return None  # a step by itself ends the sequence that it is of, and no other
        steps = self._scheduler.room_for_steps(chunks, steps)
        if steps <= 1:
            return None
        began = time.perf_counter()
        found = self._runner.decode(
            chunks,
            draws,
            [tuple(one.stop_ids) for one in sequences],
            steps,
            greedy=all(map(wants_peak_only, sequences)),
        )
        if found is None:
            for sequence in sequences:
                self._scheduler.drop_drafts(sequence, kept_tokens=1)
            return None
        decoded, logits = found
        self._seconds[len(chunks)] = (time.perf_counter() - began) / len(decoded.tokens)
        drafts = list(zip(*decoded.tokens[:-1], strict=True)) or [()] * len(chunks)
        continued = [
            replace(chunk, drafts=tokens, chosen=True) for chunk, tokens in zip(chunks, drafts, strict=True)
        ]
        return continued, ContinuedChoices(decoded, logits)

    def _wanted(self, sequences: int) -> int:
        if self._steps is not None:
            return self._steps
        seconds = self._seconds.get(sequences)
        if seconds is None:
            return 2
        wanted = int(SECONDS / max(seconds, 1e-6))
        if wanted <= 1:
            self._seconds[sequences] *= _FORGET
        return min(wanted, MOST)


def _goes_on(chunk: Chunk) -> bool:
    """Whether it is one generated token, behind which more can be chosen without asking anybody."""
    sequence = chunk.sequence
    if chunk.count != 1 or chunk.drafts or chunk.of_prompt or sequence.pending != 1 or sequence.flights:
        return False
    sampling = sequence.sampling
    return sampling.logprobs is None and sampling.min_tokens <= sequence.output_length


class ContinuedChoices:
    """What was chosen step by step: a sequence's rows stand one behind another, as those of drafts do."""

    def __init__(self, decoded: DecodedSteps, logits: Tensor) -> None:
        """``logits``: the last step's."""
        self._decoded = decoded
        self._logits = logits

    @property
    def steps(self) -> int:
        """How many were taken."""
        return len(self._decoded.tokens)

    def finite(self, row: int) -> bool:
        """By the row's largest number: NaN where it holds one."""
        sequence, step = divmod(row, self.steps)
        return math.isfinite(self._decoded.peaks[step][sequence])

    def broken(self, row: int) -> int:
        """Counted in the last step's, behind which nothing was chosen because of it."""
        return int((~torch.isfinite(self._logits[row // self.steps])).sum())

    def token(self, row: int, sequence: Sequence) -> int:
        """Chosen already."""
        place, step = divmod(row, self.steps)
        return self._decoded.tokens[step][place]

    def logprob(self, row: int, token: int, alternatives: int) -> TokenLogprob:
        """Sequences that want any take a step at a time."""
        raise AssertionError("nobody asked for log-probabilities")
