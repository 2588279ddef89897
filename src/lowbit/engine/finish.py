"""Finish: what a computed step comes to. Text, stop rules, logprobs, NaN; each sequence's events."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from lowbit.engine.choices import Choices, DeviceSampler
from lowbit.engine.messages import FinishReason, TokenEvent
from lowbit.engine.scheduler import Chunk, Scheduler
from lowbit.engine.sequence import Sequence
from lowbit.engine.step_parts import Part, Step, Turn, targets
from lowbit.errors import printable

_log = logging.getLogger("lowbit")


@dataclass
class Counters:
    """What the engine has done since it started."""

    prompt_tokens: int = 0  # computed
    cached_tokens: int = 0  # of prompts, that came from the prefix cache
    generated_tokens: int = 0
    drafts: int = 0
    accepted_drafts: int = 0
    drafted_turns: int = 0  # a sequence's parts of steps that had drafts


@dataclass(frozen=True)
class _Ending:
    """Why a token is a sequence's last."""

    reason: FinishReason
    matched: str | int | None = None


class Finisher:
    """Looks at finished steps. ``sequences``: the engine's own, by id; those that end are taken out of it."""

    def __init__(
        self,
        scheduler: Scheduler,
        sampler: DeviceSampler | None,
        sequences: dict[str, Sequence],
        vocab_size: int,
    ) -> None:
        self.counters = Counters()
        self._scheduler = scheduler
        self._sampler = sampler
        self._sequences = sequences
        self._vocab_size = vocab_size

    def finish(self, step: Step) -> list[TokenEvent]:
        """Look at what a step has computed; its events."""
        events: list[TokenEvent] = []
        turns: list[Turn] = []
        for part in step.parts:
            sequence = part.chunk.sequence
            del sequence.flights[0]
            if self._sequences.get(sequence.id) is not sequence:
                continue  # it ended after the step was launched
            event = self._account(part, step.choices)
            if event is not None:
                events.append(event)
            elif part.chooses:
                guessed = not part.chunk.chosen
                turns.append(Turn(sequence, part.chunk.drafts, part.known - 1, guessed))
                if guessed:
                    self._note_drafts(part.chunk)
        return events + self._choose(turns, step.choices)

    def _account(self, part: Part, choices: Choices) -> TokenEvent | None:
        """Take note of a computed chunk; an event where it ends the sequence (NaN, or only echo)."""
        sequence, start = part.chunk.sequence, part.start
        end = start + part.chunk.count
        self.counters.prompt_tokens += max(0, min(end, sequence.prompt_length) - start)
        if not all(map(choices.finite, range(part.first, part.known))):
            error = self._numerical_error(start, choices, range(part.first, part.known))
            return self.end(sequence, "error", "model_numerical_error", error)
        if sequence.wants_prompt_logprobs:
            try:
                self._note_prompt_logprobs(part, choices)
            except Exception as error:
                return self._failed(sequence, "its prompt's log-probabilities", error)
        if end <= sequence.prompt_length:
            self._scheduler.cache_computed(sequence)
        if end == len(sequence.tokens) and sequence.request.echo_only:
            return self.end(sequence, "length")
        return None

    def _numerical_error(self, start: int, choices: Choices, rows: range) -> str:
        bad, count = next((n, found) for n, row in enumerate(rows) if (found := choices.broken(row)))
        return (
            f"{count} of {self._vocab_size} logits are NaN or infinite near token {start + bad}; "
            "request stopped, others unaffected"
        )

    def _note_prompt_logprobs(self, part: Part, choices: Choices) -> None:
        """Row i predicts token i + 1; the first prompt token has no prediction."""
        sequence = part.chunk.sequence
        alternatives = sequence.sampling.prompt_logprobs or 0
        if not sequence.prompt_logprobs:
            sequence.prompt_logprobs.append(None)
        for row, target in targets(part):
            if target >= len(sequence.prompt_logprobs):
                token = sequence.request.prompt[target]
                sequence.prompt_logprobs.append(choices.logprob(row, token, alternatives))

    def _choose(self, turns: list[Turn], choices: Choices) -> list[TokenEvent]:
        """Append each sequence's next token; again while it is the draft computed there.

        A token is accepted only once those before it are known, as without drafts: penalties, stop rules and
        the draw for its position see what they always would.
        """
        events: list[TokenEvent] = []
        going = turns
        while going:
            continuing: list[Turn] = []
            for turn in going:
                last = self._append(turn, choices)
                if last is not None:
                    events.append(last)
                elif not turn.continues:
                    events.append(self._event(turn.sequence, turn))
                elif choices.finite(turn.row + 1):
                    turn.row += 1
                    turn.sequence.computed += 1
                    continuing.append(turn)
                else:
                    rows = range(turn.row + 1, turn.row + 2)
                    error = self._numerical_error(turn.sequence.computed, choices, rows)
                    events.append(self._event(turn.sequence, turn))
                    events.append(self.end(turn.sequence, "error", "model_numerical_error", error))
            going = continuing
        for turn in turns:
            if (turn.drafts or not turn.guessed) and turn.sequence.id in self._sequences:
                self._scheduler.drop_drafts(turn.sequence)
        return events

    def _note_drafts(self, chunk: Chunk) -> None:
        self.counters.drafted_turns += bool(chunk.drafts)
        self.counters.drafts += len(chunk.drafts)
        chunk.sequence.drafts += len(chunk.drafts)

    def _append(self, turn: Turn, choices: Choices) -> TokenEvent | None:
        """Add the next token; the last event where it ends the sequence. What fails here is of this sequence
        alone: its sampling, its text."""
        sequence = turn.sequence
        try:
            ending = self._say(turn, choices)
        except Exception as error:
            return self._failed(sequence, "its next token", error, turn)
        return (
            None if ending is None else self.end(sequence, ending.reason, turn=turn, matched=ending.matched)
        )

    def _failed(
        self, sequence: Sequence, what: str, error: Exception, turn: Turn | None = None
    ) -> TokenEvent:
        """The last event of a sequence alone in what went wrong."""
        _log.exception("lowbit: request %s: %s failed", printable(sequence.id), what)
        text = f"{what} failed ({type(error).__name__}, see the log); request stopped, others unaffected"
        return self.end(sequence, "error", "internal", text, turn=turn)

    def _say(self, turn: Turn, choices: Choices) -> _Ending | None:
        """Choose the next token, add it and its text; why it is the last, or None."""
        sequence = turn.sequence
        token = choices.token(turn.row, sequence)
        sampling = sequence.sampling
        if turn.guessed and turn.drafts[len(turn.tokens) : len(turn.tokens) + 1] == (token,):
            sequence.accepted_drafts += 1
            self.counters.accepted_drafts += 1
        sequence.tokens.append(token)
        turn.tokens.append(token)
        if sequence.said is not None:
            sequence.said.add(token)
        self.counters.generated_tokens += 1
        if sampling.logprobs is not None:
            turn.logprobs.append(choices.logprob(turn.row, token, sampling.logprobs))
        early = sequence.output_length < sampling.min_tokens
        if token in sequence.stop_ids and not early:
            turn.text += sequence.detokenizer.finish()
            return _Ending("stop", token)
        text, matched = sequence.detokenizer.add([token], stops=not early)
        turn.text += text
        if matched is not None:
            return _Ending("stop", matched)
        if len(sequence.tokens) >= sequence.limit:
            turn.text += sequence.detokenizer.finish()
            return _Ending("length")
        return None

    def _event(
        self,
        sequence: Sequence,
        turn: Turn | None = None,
        *,
        finish_reason: FinishReason | None = None,
        matched: str | int | None = None,
        code: str = "",
        error: str = "",
    ) -> TokenEvent:
        """An event with the tokens of ``turn``; the first of a sequence says what its prompt cost."""
        first, sequence.announced = not sequence.announced, True
        if first:
            self.counters.cached_tokens += sequence.cached_tokens
        final = finish_reason is not None
        wanted = first and sequence.sampling.prompt_logprobs is not None
        return TokenEvent(
            id=sequence.id,
            tokens=tuple(turn.tokens) if turn else (),
            text=turn.text if turn else "",
            logprobs=tuple(turn.logprobs) if turn else (),
            prompt_logprobs=tuple(sequence.prompt_logprobs) if wanted else None,
            cached_tokens=sequence.cached_tokens if first else 0,
            finish_reason=finish_reason,
            matched_stop=matched,
            error=error,
            error_code=code,
            prompt_tokens=sequence.prompt_length if final else 0,
            completion_tokens=sequence.output_length if final else 0,
            accepted_drafts=sequence.accepted_drafts if final else 0,
            rejected_drafts=sequence.drafts - sequence.accepted_drafts if final else 0,
        )

    def end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        code: str = "",
        error: str = "",
        *,
        turn: Turn | None = None,
        matched: str | int | None = None,
    ) -> TokenEvent:
        """Free what the sequence held; its last event, with the tokens of ``turn``."""
        if reason == "error":
            # Nothing it computed may be shared: its pages hold what went wrong.
            sequence.computed = 0
        if code == "model_numerical_error":
            self._scheduler.forget_prefix(sequence)  # nor what earlier chunks have put into the tree
        self._scheduler.remove(sequence)
        if self._sampler is not None:
            self._sampler.forget(sequence)
        del self._sequences[sequence.id]
        return self._event(sequence, turn, finish_reason=reason, matched=matched, code=code, error=error)
