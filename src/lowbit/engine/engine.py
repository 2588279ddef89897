"""Engine: requests in, token events out, one scheduler step at a time.

It owns the page pool, the scheduler and the model's caches, and knows nothing of HTTP or processes: the
engine process (process.py) and ``LLM`` drive it. Every accepted request ends in exactly one event whose
``finish_reason`` is set; an error in one sequence ends that sequence only.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from lowbit.checkpoint.quality import Quality
from lowbit.engine.memory import pool_pages
from lowbit.engine.messages import (
    EngineReady,
    EngineStatus,
    FinishReason,
    MeasuredQuality,
    Request,
    TokenEvent,
    TokenLogprob,
)
from lowbit.engine.page_pool import PagePool
from lowbit.engine.runner import Runner
from lowbit.engine.sampler import log_probabilities, sample
from lowbit.engine.scheduler import Chunk, Scheduler
from lowbit.engine.sequence import Sequence
from lowbit.engine.speculation import STEP_TOKENS, Drafter, Speculation, worth
from lowbit.errors import LowbitError, printable, thousands
from lowbit.kernels.row_peaks import row_peaks
from lowbit.models.model import Model
from lowbit.settings import Settings
from lowbit.tokenization.tokenizer import Tokenizer

Progress = Callable[[int, int, str], None]

_log = logging.getLogger("lowbit")


@dataclass(frozen=True)
class ForcedModes:
    """What tests force, by LOWBIT_TEST_* variables or directly; outputs must not change by it."""

    retract_every: int = 0  # retract the youngest sequence every so many steps
    evict_always: bool = False  # keep no prefix longer than it is used
    chunk: int = 0  # prompt tokens a step, whatever the settings say
    check: bool = False  # check the accounting after every step

    @classmethod
    def from_environment(cls) -> ForcedModes:
        """As the variables say."""
        read = os.environ.get
        return cls(
            retract_every=int(read("LOWBIT_TEST_RETRACT", "0")),
            evict_always=read("LOWBIT_TEST_EVICT") == "always",
            chunk=int(read("LOWBIT_TEST_CHUNK", "0")),
            check=read("LOWBIT_CHECK") == "1",
        )


@dataclass(eq=False)
class _Turn:
    """A sequence's part of a step: the tokens chosen so far. ``row``: of the logits, for the next of them."""

    sequence: Sequence
    drafts: tuple[int, ...]
    row: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def continues(self) -> bool:
        """Whether the last token is the draft computed there, so that the logits behind it are right too."""
        count = len(self.tokens)
        return count <= len(self.drafts) and self.tokens[-1] == self.drafts[count - 1]


class Engine:
    """A loaded model that serves requests."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        settings: Settings,
        *,
        stop_ids: frozenset[int] = frozenset(),
        forced: ForcedModes | None = None,
        details: dict[str, str] | None = None,
        architecture: str = "",
        quality: Quality | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self._forced = forced or ForcedModes.from_environment()
        self._stop_ids = tokenizer.stop_ids | stop_ids
        self._details = details or {}
        self._architecture = architecture
        self._quality = quality
        self._speculation = _speculation(model, settings)
        pages = pool_pages(model, settings)
        self._pool = PagePool(pages)
        self._scheduler = Scheduler(
            self._pool,
            settings.page_size,
            max_running=settings.max_running_requests,
            prefill_budget=self._forced.chunk or self._prefill_budget(pages),
            share_prefixes=not settings.disable_radix_cache,
            policy=settings.schedule_policy,
        )
        self._runner = Runner(model, pages, settings.page_size, capture=not settings.disable_cuda_graph)
        self.pool_tokens = pages * settings.page_size
        self.context_length = min(settings.context_length or model.context_length, self.pool_tokens)
        self._sequences: dict[str, Sequence] = {}
        self._news: list[TokenEvent] = []  # events that did not come from a step
        self._step_began = 0.0
        self._steps = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._generated_tokens = 0
        self._drafts = 0
        self._accepted_drafts = 0
        self._drafted_turns = 0
        self._violations = 0
        self._later: Iterator[None] = iter(())

    def _prefill_budget(self, pages: int) -> int:
        """Prompt tokens a step; -1 asks for whole prompts, and no step can hold more than the pool does."""
        size = self.settings.chunked_prefill_size
        return pages * self.settings.page_size if size < 0 else size

    # ---- requests ------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Accept a request; one that can never run is a LowbitError whose code is the API's."""
        length, sampling = len(request.prompt), request.sampling
        if request.id in self._sequences:
            raise LowbitError("duplicate_id", f"request {printable(request.id)!r} is already running")
        if length == 0:
            raise LowbitError("empty_prompt", "the prompt is empty")
        bad = next((t for t in request.prompt if not 0 <= t < self.model.vocab_size), None)
        if bad is not None:
            raise LowbitError(
                "invalid_token", f"token id {bad} is outside the vocabulary of {self.model.vocab_size}"
            )
        if request.echo_only:
            limit = length
        elif sampling.max_tokens is None:
            limit = self.context_length
        else:
            limit = length + sampling.max_tokens
        if limit > self.context_length or (length >= self.context_length and not request.echo_only):
            wanted = sampling.max_tokens or 0
            raise LowbitError(
                "prompt_too_long",
                f"prompt is {length} tokens and max_tokens {wanted}: {length + wanted} > context "
                f"{self.context_length}; shorten the prompt or lower max_tokens",
            )
        sequence = Sequence.start(request, limit, self._stop_ids, self.tokenizer, self.settings.random_seed)
        if self._speculation is not None:
            sequence.drafter = Drafter(sequence.tokens, self._speculation)
        self._sequences[request.id] = sequence
        self._scheduler.add(sequence)

    def cancel(self, request_id: str) -> None:
        """Forget a request; one that is unknown or has ended is none of our business."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._news.append(self._end(sequence, "abort"))

    def has_work(self) -> bool:
        """Whether ``step`` would do something."""
        return bool(self._sequences or self._news)

    def when_idle(self, work: Iterator[None]) -> None:
        """What can wait until nobody waits for an answer; each of its steps takes a moment."""
        self._later = work

    def idle_step(self) -> bool:
        """A step of ``when_idle``'s work; False: there was none left. What fails there is logged."""
        try:
            next(self._later)
            return True
        except StopIteration:
            return False
        except Exception as error:
            _log.warning("lowbit: what was left for an idle moment failed: %r", error)
            return False

    # ---- steps ---------------------------------------------------------------------------------------

    def step(self) -> list[TokenEvent]:
        """One forward pass over the next batch; its events."""
        events, self._news = self._news, []
        self._step_began = time.monotonic()
        try:
            if self._scheduler.running or self._scheduler.waiting:
                events += self._run(self._with_drafts(self._scheduler.next_chunks()))
        finally:
            self._step_began = 0.0
        if self._forced.check and (found := self.check()):
            raise AssertionError("; ".join(found))
        return events

    def _with_drafts(self, chunks: list[Chunk]) -> list[Chunk]:
        """The chunks, those of decoding sequences with what may follow, as far as it is worth its time."""
        rules = self._speculation
        decoding = [c.sequence for c in chunks if c.sequence.pending == 1 and c.sequence.output_length > 0]
        left = len(decoding)
        if rules is None or not 0 < left < STEP_TOKENS:
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
                drafts = sequence.drafter.draft(most, sure)
                drafts = drafts[: self._scheduler.room_for_drafts(chunk, len(drafts))]
                chunk = replace(chunk, drafts=drafts)
                left -= 1
                room -= len(drafts)
            drafted.append(chunk)
        return drafted

    def _run(self, chunks: list[Chunk]) -> list[TokenEvent]:
        if not chunks:
            return []
        rows, owners = self._wanted_rows(chunks)
        logits = self._runner.forward(chunks, rows)
        peaks, likeliest = row_peaks(logits)
        self._steps += 1
        events: list[TokenEvent] = []
        first = 0
        turns: list[_Turn] = []
        for chunk, count in zip(chunks, owners, strict=True):
            known = first + count - len(chunk.drafts)
            event = self._account(chunk, logits, peaks, first, known)
            if event is not None:
                events.append(event)
            elif chunk.sequence.pending == 0:
                turns.append(_Turn(chunk.sequence, chunk.drafts, known - 1))
                self._note_drafts(chunk)
            first += count
        events += self._choose(turns, logits, peaks, likeliest)
        self._force()
        return events

    def _wanted_rows(self, chunks: list[Chunk]) -> tuple[list[int], list[int]]:
        """(token rows whose logits are needed, how many of them each chunk has)."""
        rows: list[int] = []
        owners: list[int] = []
        first = 0
        for chunk in chunks:
            sequence, last = chunk.sequence, first + chunk.count + len(chunk.drafts) - 1
            completes = sequence.computed + chunk.count == len(sequence.tokens)
            if sequence.wants_prompt_logprobs:
                wanted = list(range(first, last + 1))
            else:
                wanted = list(range(last - len(chunk.drafts), last + 1)) if completes else []
            rows += wanted
            owners.append(len(wanted))
            first = last + 1
        return rows, owners

    def _account(
        self, chunk: Chunk, logits: Tensor, peaks: list[float], first: int, last: int
    ) -> TokenEvent | None:
        """Take note of a computed chunk, whose logits are rows ``first`` to ``last``; an event where it ends
        the sequence (NaN, or only echo)."""
        sequence = chunk.sequence
        start = sequence.computed
        self._prompt_tokens += max(0, min(start + chunk.count, sequence.prompt_length) - start)
        if not all(map(math.isfinite, peaks[first:last])):
            error = self._numerical_error(start, logits[first:last])
            return self._end(sequence, "error", "model_numerical_error", error)
        sequence.computed += chunk.count
        if sequence.wants_prompt_logprobs:
            self._note_prompt_logprobs(sequence, start, logits[first:last])
        if sequence.computed <= sequence.prompt_length:
            self._scheduler.cache_computed(sequence)
        if sequence.pending == 0 and sequence.request.echo_only:
            return self._end(sequence, "length")
        return None

    @staticmethod
    def _numerical_error(start: int, logits: Tensor) -> str:
        bad = int((~torch.isfinite(logits)).any(dim=1).nonzero()[0])
        count = int((~torch.isfinite(logits[bad])).sum())
        return (
            f"{count} of {logits.shape[1]} logits are NaN or infinite near token {start + bad}; "
            "request stopped, others unaffected"
        )

    def _note_prompt_logprobs(self, sequence: Sequence, start: int, logits: Tensor) -> None:
        """Row i predicts token i + 1; the first prompt token has no prediction."""
        alternatives = sequence.sampling.prompt_logprobs or 0
        if not sequence.prompt_logprobs:
            sequence.prompt_logprobs.append(None)
        for offset, row in enumerate(logits):
            target = start + offset + 1
            if len(sequence.prompt_logprobs) <= target < sequence.prompt_length:
                token = sequence.request.prompt[target]
                sequence.prompt_logprobs.append(log_probabilities(row, token, alternatives))

    def _choose(
        self, turns: list[_Turn], logits: Tensor, peaks: list[float], likeliest: list[int]
    ) -> list[TokenEvent]:
        """Choose and append each sequence's next token; again while it is the draft computed there.

        A token is chosen only once those before it are known, as without drafts: penalties, stop rules and
        the draw for its position see what they always would.
        """
        events: list[TokenEvent] = []
        going = turns
        while going:
            continuing: list[_Turn] = []
            for turn in going:
                row = logits[turn.row]
                last = self._append(turn, sample(row, turn.sequence, likeliest[turn.row]), row)
                if last is not None:
                    events.append(last)
                elif not turn.continues:
                    events.append(self._event(turn.sequence, turn))
                elif math.isfinite(peaks[turn.row + 1]):
                    turn.row += 1
                    turn.sequence.computed += 1
                    continuing.append(turn)
                else:
                    error = self._numerical_error(turn.sequence.computed, logits[turn.row + 1 :])
                    events.append(self._event(turn.sequence, turn))
                    events.append(self._end(turn.sequence, "error", "model_numerical_error", error))
            going = continuing
        for turn in turns:
            if turn.drafts and turn.sequence.id in self._sequences:
                self._scheduler.drop_drafts(turn.sequence)
        return events

    def _note_drafts(self, chunk: Chunk) -> None:
        self._drafted_turns += bool(chunk.drafts)
        self._drafts += len(chunk.drafts)
        chunk.sequence.drafts += len(chunk.drafts)

    def _append(self, turn: _Turn, token: int, row: Tensor) -> TokenEvent | None:
        """Add a token; the last event where it ends the sequence."""
        sequence = turn.sequence
        sampling = sequence.sampling
        if turn.drafts[len(turn.tokens) : len(turn.tokens) + 1] == (token,):
            sequence.accepted_drafts += 1
            self._accepted_drafts += 1
        sequence.tokens.append(token)
        turn.tokens.append(token)
        if sequence.counts is not None:
            sequence.counts[token] += 1
        self._generated_tokens += 1
        if sampling.logprobs is not None:
            turn.logprobs.append(log_probabilities(row, token, sampling.logprobs))
        early = sequence.output_length < sampling.min_tokens
        if token in sequence.stop_ids and not early:
            turn.text += sequence.detokenizer.finish()
            return self._end(sequence, "stop", turn=turn, matched=token)
        text, matched = sequence.detokenizer.add([token])
        turn.text += text
        if matched is not None and not early:
            return self._end(sequence, "stop", turn=turn, matched=matched)
        if len(sequence.tokens) >= sequence.limit:
            turn.text += sequence.detokenizer.finish()
            return self._end(sequence, "length", turn=turn)
        return None

    def _event(
        self,
        sequence: Sequence,
        turn: _Turn | None = None,
        *,
        finish_reason: FinishReason | None = None,
        matched: str | int | None = None,
        code: str = "",
        error: str = "",
    ) -> TokenEvent:
        """An event with the tokens of ``turn``; the first of a sequence says what its prompt cost."""
        first, sequence.announced = not sequence.announced, True
        if first:
            self._cached_tokens += sequence.cached_tokens
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

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        code: str = "",
        error: str = "",
        *,
        turn: _Turn | None = None,
        matched: str | int | None = None,
    ) -> TokenEvent:
        """Free what the sequence held; its last event, with the tokens of ``turn``."""
        if reason == "error":
            # Nothing it computed may be shared: its pages hold what went wrong.
            sequence.computed = 0
        self._scheduler.remove(sequence)
        del self._sequences[sequence.id]
        return self._event(sequence, turn, finish_reason=reason, matched=matched, code=code, error=error)

    def _force(self) -> None:
        """What the forced modes ask after a step."""
        forced, scheduler = self._forced, self._scheduler
        if forced.retract_every and self._steps % forced.retract_every == 0 and len(scheduler.running) > 1:
            scheduler.retract(scheduler.running[-1])
        if forced.evict_always:
            scheduler.tree.evict(self._pool.total)

    def close(self) -> None:
        """Keep what the next run goes on from: the states of delayed scales, where a file was named."""
        if self._drafts:
            _log.info(
                "lowbit: speculation: %s of %s drafts were right, %.1f tokens a step where there were any",
                thousands(self._accepted_drafts),
                thousands(self._drafts),
                1 + self._accepted_drafts / self._drafted_turns,
            )
        self.model.states.keep()
        if (ranks := getattr(self.model, "ranks", None)) is not None:
            ranks.close()

    # ---- state ---------------------------------------------------------------------------------------

    def status(self) -> EngineStatus:
        """Counters and gauges."""
        began = self._step_began
        return EngineStatus(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            pages_total=self._pool.total,
            pages_free=self._pool.free,
            pages_cached=self._pool.idle,
            steps=self._steps,
            captured_steps=self._runner.captured_steps,
            prompt_tokens=self._prompt_tokens,
            cached_prompt_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
            draft_tokens=self._drafts,
            accepted_draft_tokens=self._accepted_drafts,
            preemptions=self._scheduler.preemptions,
            invariant_violations=self._violations,
            stepping_seconds=time.monotonic() - began if began else 0.0,
        )

    def ready(self) -> EngineReady:
        """The limits the server admits requests by."""
        return EngineReady(
            model_name=self.settings.served_model_name or self.settings.model,
            context_length=self.context_length,
            pool_tokens=self.pool_tokens,
            page_size=self.settings.page_size,
            vocab_size=self.model.vocab_size,
            max_running=self.settings.max_running_requests,
            architecture=self._architecture,
            quantization=getattr(self.model, "quantization", ""),
            weight_bytes=getattr(self.model, "weight_bytes", 0),
            quality=None if self._quality is None else MeasuredQuality(**asdict(self._quality)),
            details=self._details,
        )

    def flush_cache(self) -> int:
        """Drop every idle prefix page; how many."""
        return self._scheduler.tree.evict(self._pool.total)

    def check(self) -> list[str]:
        """Violations of the accounting invariants (I1-I4); [] when all is right. E0712 where a rank is
        gone."""
        if (ranks := getattr(self.model, "ranks", None)) is not None:
            ranks.check()
        found = self._scheduler.check()
        known = {sequence.id for sequence in (*self._scheduler.running, *self._scheduler.waiting)}
        if known != self._sequences.keys():
            found.append("a request is neither waiting nor running")
        self._violations += bool(found)
        return found


def _speculation(model: Model, settings: Settings) -> Speculation | None:
    """What the settings ask for, where the model's answers do not depend on it."""
    rules = Speculation.by(settings)
    if rules is None:
        return None
    if getattr(model, "spans_tokens", False):
        raise LowbitError(
            "E0105",
            "--speculative-algorithm: this model's inputs share scales between tokens, so wrong drafts would "
            "change its answers; drop it, or use scales for each token",
        )
    if "reference" in getattr(model, "kernels", ()):
        _log.warning(
            "lowbit: speculation: some layers run on the reference kernel, whose last bits depend on how "
            "many tokens a step has: with drafts, as in a batch, a close call may go the other way"
        )
    return rules
