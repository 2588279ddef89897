"""Engine: requests in, token events out, one scheduler step at a time.

    launch   schedule, forward pass, the choice of tokens; on a GPU all of it is only queued
    finish   look at what was chosen: text, stop rules, events

Where launching returns before the device is done (``--disable-overlap-schedule``), step n + 1 is launched
before step n is finished, with the tokens of step n where only the device knows them. A sequence that turns
out to have ended in step n then has a part in step n + 1: it is dropped unseen, as is that of one that was
retracted and has to compute it again.

It owns the page pool, the scheduler and the model's caches, and knows nothing of HTTP or processes: the
engine process (process.py) and ``LLM`` drive it. Every accepted request ends in exactly one event whose
``finish_reason`` is set; an error in one sequence ends that sequence only.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace

import torch

from lowbit.checkpoint.quality import Quality
from lowbit.engine.choices import Ask, Choices, DeviceChoices, DeviceSampler, HostChoices
from lowbit.engine.cuda_graphs import Progress
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
from lowbit.engine.sampler import has_penalties
from lowbit.engine.scheduler import Chunk, Scheduler
from lowbit.engine.sequence import Flight, Sequence
from lowbit.engine.speculation import STEP_TOKENS, Drafter, Speculation, worth
from lowbit.errors import LowbitError, printable, thousands
from lowbit.kernels.recurrent import state_bytes
from lowbit.models.model import Model
from lowbit.settings import Settings
from lowbit.tokenization.tokenizer import Tokenizer

_log = logging.getLogger("lowbit")


@dataclass(frozen=True)
class ForcedModes:
    """What tests force, by LOWBIT_TEST_* variables or directly; outputs must not change by it."""

    retract_every: int = 0  # retract the youngest sequence every so many steps
    evict_always: bool = False  # keep no prefix longer than it is used
    chunk: int = 0  # prompt tokens a step, whatever the settings say
    check: bool = False  # check the accounting after every step
    on_device: bool = False  # choose tokens as on a GPU
    overlap: bool = False  # launch steps before the last is finished, as on a GPU

    @classmethod
    def from_environment(cls) -> ForcedModes:
        """As the variables say."""
        read = os.environ.get
        return cls(
            retract_every=int(read("LOWBIT_TEST_RETRACT", "0")),
            evict_always=read("LOWBIT_TEST_EVICT") == "always",
            chunk=int(read("LOWBIT_TEST_CHUNK", "0")),
            check=read("LOWBIT_CHECK") == "1",
            overlap=read("LOWBIT_TEST_OVERLAP") == "1",
        )


@dataclass(frozen=True)
class _Part:
    """A chunk's part of a step. Rows ``first`` to ``known`` of the logits are its known tokens' that are
    wanted; its drafts' follow. ``chooses``: whether a token is chosen from row ``known - 1``."""

    chunk: Chunk
    start: int  # tokens computed before
    first: int
    known: int
    chooses: bool


@dataclass(frozen=True)
class _Step:
    """A step that was launched."""

    parts: list[_Part]
    choices: Choices


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
        self._has_states = state_bytes(model.cache_specs()) > 0
        self._speculation = _speculation(model, settings)
        pages = pool_pages(model, settings)
        self._pool = PagePool(pages)
        self._scheduler = Scheduler(
            self._pool,
            settings.page_size,
            max_running=settings.max_running_requests,
            prefill_budget=self._forced.chunk or self._prefill_budget(pages),
            share_prefixes=self._may_share(),
            policy=settings.schedule_policy,
        )
        self.pool_tokens = pages * settings.page_size
        self.context_length = min(settings.context_length or model.context_length, self.pool_tokens)
        self._runner = Runner(model, pages, self.context_length, settings)
        on_gpu = model.device.type == "cuda"
        self._overlaps = self._may_overlap(on_gpu)
        self._sampler: DeviceSampler | None = None
        if on_gpu or self._overlaps or self._forced.on_device:
            self._sampler = DeviceSampler(model.vocab_size, model.device)
        self._flying: _Step | None = None
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

    def prepare(self, progress: Progress | None = None) -> None:
        """What takes time and had better be done before the first request: CUDA graphs."""
        self._runner.prepare(progress)

    def _prefill_budget(self, pages: int) -> int:
        """Prompt tokens a step; -1 asks for whole prompts, and no step can hold more than the pool does."""
        size = self.settings.chunked_prefill_size
        return pages * self.settings.page_size if size < 0 else size

    def _may_share(self) -> bool:
        """Whether sequences may begin with pages that others have computed."""
        if self.settings.disable_radix_cache:
            return False
        if self._has_states:
            _log.info(
                "lowbit: prefixes are not shared: the state of a recurrent layer holds all of a sequence, "
                "and none is kept where prefixes end"
            )
        return not self._has_states

    def _may_overlap(self, on_gpu: bool) -> bool:
        """Whether a step may be launched before the one before is finished."""
        if self.settings.disable_overlap_schedule or not (on_gpu or self._forced.overlap):
            return False
        reason = ""
        if self._speculation is not None:
            reason = "drafts continue tokens that must be known"
        elif getattr(self.model, "spans_tokens", False):
            reason = "this model's inputs share scales between tokens, those of ended sequences included"
        if reason:
            _log.info("lowbit: steps do not overlap: %s", reason)
        return not reason

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
        return bool(self._sequences or self._news or self._flying)

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
        """One forward pass over the next batch, and what became certain: its events, or the last one's."""
        events, self._news = self._news, []
        self._step_began = time.monotonic()
        try:
            step = self._launch() if self._scheduler.running or self._scheduler.waiting else None
            if self._overlaps:
                step, self._flying = self._flying, step
            if step is not None:
                events += self._finish(step)
                self._force()
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
                if self._sampler is not None and has_penalties(sequence):
                    most = 0  # all rows are chosen from at once, and each penalty depends on the row before
                drafts = sequence.drafter.draft(most, sure)
                drafts = drafts[: self._scheduler.room_for_drafts(chunk, len(drafts))]
                chunk = replace(chunk, drafts=drafts)
                left -= 1
                room -= len(drafts)
            drafted.append(chunk)
        return drafted

    def _launch(self) -> _Step | None:
        """Compute the next step, or queue it on the device; None where there is nothing to compute."""
        chunks = self._with_drafts(self._scheduler.next_chunks())
        try:
            return self._run(chunks)
        except torch.OutOfMemoryError as error:
            reason = printable(str(error).partition("\n")[0], 200)
        # Out here nothing of the step is held any more: the error had its frames, and they its tensors.
        chunks = self._with_less(chunks, reason)
        try:
            return self._run(chunks)
        except torch.OutOfMemoryError as error:
            reason = printable(str(error).partition("\n")[0], 200)
        self._release_memory()
        self._start_again(chunks[:-1])
        self._news.append(
            self._end(
                chunks[-1].sequence,
                "error",
                "out_of_memory",
                f"out of memory in a step of {_tokens_of(chunks)} tokens, twice: {reason}; try again, or "
                "start the server with a lower --mem-fraction-static or --max-running-requests",
            )
        )
        return None

    def _with_less(self, chunks: list[Chunk], reason: str) -> list[Chunk]:
        """After a step that was too large: the next one without the youngest sequence. Steps stay smaller.

        What the step wrote is written again: no sequence has counted it.
        """
        self._release_memory()
        scheduler = self._scheduler
        tokens = _tokens_of(chunks)
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
        """After a step that failed: states of some layers may have moved on, and nothing leads back."""
        if self._has_states:
            for chunk in reversed(chunks):
                self._scheduler.retract(chunk.sequence)

    def _release_memory(self) -> None:
        """What torch keeps for later may lie in pieces that are too small."""
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _run(self, chunks: list[Chunk]) -> _Step | None:
        """Compute the chunks. Where this fails nothing has changed but what is in their pages."""
        if not chunks:
            return None
        rows, parts = self._wanted_rows(chunks)
        flying = self._flying.choices if self._flying is not None else None
        chosen = flying.tokens if isinstance(flying, DeviceChoices) else None
        logits = self._runner.forward(chunks, rows, chosen)
        choices: Choices
        if self._sampler is None:
            choices = HostChoices(logits.cpu())
        else:
            choices = self._sampler.choose(logits, [ask for part in parts for ask in _asks(part)])
        self._steps += 1
        for part in parts:
            sequence = part.chunk.sequence
            sequence.flights.append(Flight(part.start, part.known - 1 if part.chooses else -1))
            sequence.computed += part.chunk.count
        return _Step(parts, choices)

    def _wanted_rows(self, chunks: list[Chunk]) -> tuple[list[int], list[_Part]]:
        """The token rows whose logits are needed, and each chunk's part of the step."""
        rows: list[int] = []
        parts: list[_Part] = []
        first = 0
        for chunk in chunks:
            sequence, last = chunk.sequence, first + chunk.count + len(chunk.drafts) - 1
            completes = chunk.completes
            if sequence.wants_prompt_logprobs:
                wanted = list(range(first, last + 1))
            else:
                wanted = list(range(last - len(chunk.drafts), last + 1)) if completes else []
            known = len(rows) + len(wanted) - len(chunk.drafts)
            chooses = completes and not sequence.request.echo_only
            parts.append(_Part(chunk, sequence.computed, len(rows), known, chooses))
            rows += wanted
            first = last + 1
        return rows, parts

    def _finish(self, step: _Step) -> list[TokenEvent]:
        """Look at what a step has computed; its events."""
        events: list[TokenEvent] = []
        turns: list[_Turn] = []
        for part in step.parts:
            sequence = part.chunk.sequence
            del sequence.flights[0]
            if self._sequences.get(sequence.id) is not sequence:
                continue  # it ended after the step was launched
            event = self._account(part, step.choices)
            if event is not None:
                events.append(event)
            elif part.chooses:
                turns.append(_Turn(sequence, part.chunk.drafts, part.known - 1))
                self._note_drafts(part.chunk)
        return events + self._choose(turns, step.choices)

    def _account(self, part: _Part, choices: Choices) -> TokenEvent | None:
        """Take note of a computed chunk; an event where it ends the sequence (NaN, or only echo)."""
        sequence, start = part.chunk.sequence, part.start
        end = start + part.chunk.count
        self._prompt_tokens += max(0, min(end, sequence.prompt_length) - start)
        if not all(map(choices.finite, range(part.first, part.known))):
            error = self._numerical_error(start, choices, range(part.first, part.known))
            return self._end(sequence, "error", "model_numerical_error", error)
        if sequence.wants_prompt_logprobs:
            self._note_prompt_logprobs(part, choices)
        if end <= sequence.prompt_length:
            self._scheduler.cache_computed(sequence)
        if end == len(sequence.tokens) and sequence.request.echo_only:
            return self._end(sequence, "length")
        return None

    def _numerical_error(self, start: int, choices: Choices, rows: range) -> str:
        bad, count = next((n, found) for n, row in enumerate(rows) if (found := choices.broken(row)))
        return (
            f"{count} of {self.model.vocab_size} logits are NaN or infinite near token {start + bad}; "
            "request stopped, others unaffected"
        )

    def _note_prompt_logprobs(self, part: _Part, choices: Choices) -> None:
        """Row i predicts token i + 1; the first prompt token has no prediction."""
        sequence = part.chunk.sequence
        alternatives = sequence.sampling.prompt_logprobs or 0
        if not sequence.prompt_logprobs:
            sequence.prompt_logprobs.append(None)
        for row, target in _targets(part):
            if target >= len(sequence.prompt_logprobs):
                token = sequence.request.prompt[target]
                sequence.prompt_logprobs.append(choices.logprob(row, token, alternatives))

    def _choose(self, turns: list[_Turn], choices: Choices) -> list[TokenEvent]:
        """Append each sequence's next token; again while it is the draft computed there.

        A token is accepted only once those before it are known, as without drafts: penalties, stop rules and
        the draw for its position see what they always would.
        """
        events: list[TokenEvent] = []
        going = turns
        while going:
            continuing: list[_Turn] = []
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

    def _append(self, turn: _Turn, choices: Choices) -> TokenEvent | None:
        """Add the next token; the last event where it ends the sequence."""
        sequence = turn.sequence
        token = choices.token(turn.row, sequence)
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
            turn.logprobs.append(choices.logprob(turn.row, token, sampling.logprobs))
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
        if self._sampler is not None:
            self._sampler.forget(sequence)
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


def _tokens_of(chunks: list[Chunk]) -> int:
    return sum(chunk.count + len(chunk.drafts) for chunk in chunks)


def _targets(part: _Part) -> list[tuple[int, int]]:
    """(row of logits, place of the prompt token that it predicts) of a chunk all of whose rows are wanted."""
    rows = range(part.first, part.known)
    places = [(row, part.start + 1 + offset) for offset, row in enumerate(rows)]
    return [(row, target) for row, target in places if target < part.chunk.sequence.prompt_length]


def _asks(part: _Part) -> list[Ask]:
    """What the device is asked of a chunk's rows; a draft's row as if the draft were right."""
    sequence = part.chunk.sequence
    asks = []
    if sequence.wants_prompt_logprobs:
        prompt = sequence.request.prompt
        asks = [Ask(row, sequence, target, prompt[target]) for row, target in _targets(part)]
    if part.chooses:
        length = part.start + part.chunk.count
        rows = range(part.known - 1, part.known + len(part.chunk.drafts))
        asks += [Ask(row, sequence, length + offset) for offset, row in enumerate(rows)]
    return asks


def _speculation(model: Model, settings: Settings) -> Speculation | None:
    """What the settings ask for, where the model's answers do not depend on it."""
    rules = Speculation.by(settings)
    if rules is None:
        return None
    if state_bytes(model.cache_specs()):
        raise LowbitError(
            "E0105",
            "--speculative-algorithm: this model has recurrent layers, and a wrong draft would change their "
            "state for good; drop the option",
        )
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
