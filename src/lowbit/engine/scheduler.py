"""Scheduler: which tokens of which sequences run in the next step.

Continuous batching (Orca: Yu et al., 2022) with chunked prefill (Sarathi: Agrawal et al., 2023): every
sequence that decodes contributes its one token, and prompts fill the step's prefill budget, oldest first. One
that will not be done with it leaves a quarter to those behind it: a short question does not wait for all of a
long document. When pages run out, idle cached prefixes are evicted, then the youngest sequence is retracted:
its pages go (into the prefix tree where they are whole) and it waits at the front.

A step may be scheduled while the one before is in flight: a sequence's next token is then known by its place
only, and pages given away are written to after that step has used them, since steps run one after another.

Who of the waiting comes next is the policy's choice. ``fcfs``: first come, first served. ``lpm``: the longest
prefix in the cache first (SGLang: Zheng et al., 2024), so that prompts with a common beginning run while its
pages are there. Alone that could starve a prompt nobody else begins like; so a sequence that PATIENCE later
arrivals have passed goes before all that were not passed as often, and then cannot be passed any more.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import chain, islice

from lowbit.engine.page_pool import PagePool
from lowbit.engine.prefix_tree import PrefixTree
from lowbit.engine.sequence import Sequence

PATIENCE = 16  # later arrivals that may be admitted before a sequence under lpm
LPM_WINDOW = 128  # waiting sequences lpm looks at; those behind them wait their turn
AWAITED_PAGES = 2  # that a running prompt is about to share are worth a step's wait; a step costs about one
EVICTED_SHARE = 64  # of the pool's pages one eviction frees one in so many: it looks through the whole tree
PROMPT_LOGPROB_ROWS = 128  # rows of logits that a step's prompts with log-probabilities may ask for
LEAST_SHARE = 32  # tokens of a step's prefill budget that are not divided further


@dataclass
class _Budget:
    """What is left of a step: ``tokens`` of prompts, ``rows`` of their logits."""

    tokens: int
    rows: int

    def spend(self, sequence: Sequence, count: int) -> None:
        """So many tokens of a sequence are computed, or as many less where ``count`` is negative."""
        if sequence.pending > 1:
            self.tokens -= count
            self.rows -= count * sequence.wants_prompt_logprobs


@dataclass(frozen=True)
class Chunk:
    """``count`` tokens of a sequence, from ``sequence.computed`` on, and ``drafts`` that may follow them.

    ``chosen``: the drafts are what was chosen there, step by step (``continuous_decode``).
    """

    sequence: Sequence
    count: int
    drafts: tuple[int, ...] = ()
    chosen: bool = False

    @property
    def tokens(self) -> list[int]:
        """What is computed; 0 in the place of a token that a step in flight is choosing."""
        start, known = self.sequence.computed, self.sequence.tokens
        if start == len(known):
            return [0]
        return [*known[start : start + self.count], *self.drafts]

    @property
    def source(self) -> int:
        """The row of the step in flight that chooses the token this chunk computes; -1: it is known."""
        sequence = self.sequence
        return sequence.flights[-1].row if sequence.computed == len(sequence.tokens) else -1

    @property
    def of_prompt(self) -> bool:
        """Whether it is part of the prompt; else its tokens were generated."""
        return self.sequence.computed < self.sequence.prompt_length

    @property
    def completes(self) -> bool:
        """Whether all tokens of the sequence are computed then."""
        return self.sequence.computed + self.count == self.sequence.length


class Scheduler:
    """Waiting and running sequences over one page pool."""

    def __init__(
        self,
        pool: PagePool,
        page_size: int,
        *,
        max_running: int,
        prefill_budget: int,
        share_prefixes: bool,
        policy: str = "fcfs",
        unit: int = 1,
        prompts_apart: bool = False,
    ) -> None:
        """``unit``: prompts are cut at its multiples only, where a step may have as many tokens.
        ``prompts_apart``: in a step prompts come last, and a chunk has either tokens of a prompt or generated
        ones.
        """
        self.pool = pool
        self.tree = PrefixTree(pool, page_size)
        self.page_size = page_size
        self.max_running = max_running
        self.prefill_budget = prefill_budget
        self.share_prefixes = share_prefixes
        self._unit = unit
        self._prompts_apart = prompts_apart
        self._longest_first = policy == "lpm" and share_prefixes
        self.waiting: deque[Sequence] = deque()
        self._slots = list(range(max_running))  # free ones, of recurrent layers' states
        self.running: list[Sequence] = []  # oldest first
        self.admitted: list[str] = []  # ids of those admitted for the first time, until somebody clears it
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(sequence)

    def next_chunks(self, *, admit: bool = True) -> list[Chunk]:
        """The next step's work; [] when nothing is left to do. ``admit``: whether who waits may join."""
        left = _Budget(self.prefill_budget, PROMPT_LOGPROB_ROWS)
        chunks: dict[Sequence, Chunk] = {}
        retracted = False
        rivals = sum(sequence.pending > 1 for sequence in self.running)
        rivals += admit and bool(self.waiting) and len(self.running) < self.max_running
        for sequence in list(self.running):
            if sequence not in self.running:
                continue  # retracted for an older one's pages
            rivals -= sequence.pending > 1
            count = self._share(sequence, left, alone=rivals == 0)
            if count == 0:
                continue
            victims = self._make_room(sequence, count)
            for victim in victims:
                chunks.pop(victim, None)
            retracted = retracted or bool(victims)
            if sequence in victims:
                continue
            chunks[sequence] = Chunk(sequence, count)
            left.spend(sequence, count)
        if admit and not retracted:
            self._admit(left, chunks)
        if not retracted:
            self._extend(left, chunks)
        if self._prompts_apart:
            return sorted(chunks.values(), key=lambda chunk: chunk.of_prompt)
        return list(chunks.values())

    def _share(self, sequence: Sequence, left: _Budget, *, alone: bool) -> int:
        """Tokens of the sequence for this step, where others want some of it unless it is ``alone``."""
        whole = self._wanted(sequence, left.tokens, left.rows)
        if alone or whole == sequence.pending:
            return whole
        least = max(LEAST_SHARE, self._unit)
        return self._wanted(sequence, max(left.tokens * 3 // 4, min(least, left.tokens)), left.rows)

    def _wanted(self, sequence: Sequence, tokens: int, rows: int) -> int:
        """Tokens of the sequence for this step, which has room for so many of prompts."""
        if sequence.length >= sequence.limit and not sequence.request.echo_only and sequence.flights:
            return 0  # the step in flight chooses its last one
        if sequence.pending == 1:
            return 1
        count = min(sequence.pending, tokens)
        if self._prompts_apart and sequence.computed < sequence.prompt_length:
            count = min(count, sequence.prompt_length - sequence.computed)
        if sequence.wants_prompt_logprobs:
            count = min(count, rows)
        if count < sequence.pending and self._unit <= self.prefill_budget:
            count -= min((sequence.computed + count) % self._unit, count)
        return count

    def _admit(self, left: _Budget, chunks: dict[Sequence, Chunk]) -> None:
        """Waiting sequences while there is budget and room for all their known tokens."""
        held: set[Sequence] = set()  # those that others are about to share a prompt with
        while left.tokens > 0 and len(self.running) < self.max_running:
            sequence = self._next_waiting(held)
            if sequence is None or sequence.flights:
                return  # retracted since: its next token must be known
            if not self._wanted(sequence, left.tokens, left.rows):
                return  # the next step has room for a whole unit
            if self._awaits(sequence):
                held.add(sequence)
                continue
            matched: list[int] = []
            if self._may_share(sequence):
                most = self._most_shared(sequence)
                matched = self.tree.match(sequence.request.cache_salt, sequence.tokens, most)
                shared, awaited = self._soon_shared(sequence, most)
                if shared - len(matched) >= AWAITED_PAGES:
                    self.pool.release(matched)
                    sequence.awaited = awaited  # as n choices of one prompt do: it is computed once
                    held.add(sequence)
                    continue
            needed = self._pages_for(len(sequence.tokens)) - len(matched)
            if needed > self.pool.free + self.pool.idle:
                self.pool.release(matched)
                return
            self._take_waiting(sequence, held)
            self.running.append(sequence)
            sequence.slot = self._slots.pop()
            sequence.pages = matched
            sequence.computed = len(matched) * self.page_size
            if not sequence.admitted:
                sequence.admitted = True
                sequence.cached_tokens = min(sequence.computed, sequence.prompt_length)
                self.admitted.append(sequence.id)
            more = len(self.waiting) > len(held) and len(self.running) < self.max_running
            count = self._share(sequence, left, alone=not more)
            victims = self._make_room(sequence, count)
            assert not victims, "room was counted before"
            chunks[sequence] = Chunk(sequence, count)
            left.spend(sequence, count)

    def _extend(self, left: _Budget, chunks: dict[Sequence, Chunk]) -> None:
        """What nobody took goes to those who left it, the oldest first, where there are pages for it."""
        for sequence, chunk in chunks.items():
            if left.tokens <= 0:
                return
            if chunk.count == sequence.pending:
                continue
            count = self._wanted(sequence, chunk.count + left.tokens, chunk.count + left.rows)
            needed = self._pages_for(sequence.computed + count) - len(sequence.pages)
            if count <= chunk.count or needed > self.pool.free + self.pool.idle:
                continue
            victims = self._make_room(sequence, count)
            assert not victims, "room was counted before"
            chunks[sequence] = Chunk(sequence, count)
            left.spend(sequence, count - chunk.count)

    def _awaits(self, sequence: Sequence) -> bool:
        """Whether the prompt it waits for is still being computed."""
        other = sequence.awaited
        if other is not None and (other not in self.running or other.sound >= other.prompt_length):
            sequence.awaited = other = None
        return other is not None

    def _soon_shared(self, sequence: Sequence, most: int) -> tuple[int, Sequence | None]:
        """Pages it could take, ``most`` at most, once a prompt being computed is in the cache; and whose."""
        size, shared = self.page_size, 0
        found: Sequence | None = None
        for other in self.running:
            prompt = other.request.prompt
            if other.sound < len(prompt) and other.request.cache_salt == sequence.request.cache_salt:
                pages, same = min(len(prompt) // size, most), 0
                while same < pages and self._equal_page(same, prompt, sequence.tokens):
                    same += 1
                if same > shared:
                    shared, found = same, other
        return shared, found

    def _equal_page(self, page: int, prompt: tuple[int, ...], tokens: list[int]) -> bool:
        part = slice(page * self.page_size, (page + 1) * self.page_size)
        return prompt[part] == tuple(tokens[part])

    def _next_waiting(self, held: set[Sequence]) -> Sequence | None:
        """Whose turn it is by the policy, of those not ``held``. One that does not fit yet keeps its turn:
        nobody slips past it."""
        waiting = (sequence for sequence in self.waiting if sequence not in held)
        first = next(waiting, None)
        # Retracted sequences stand in front, and what was passed over too often cannot be passed again.
        if first is None or not self._longest_first or len(self.waiting) == 1 or first.admitted:
            return first
        best, longest = first, -1
        for sequence in islice(chain((first,), waiting), LPM_WINDOW):
            if sequence.passed >= PATIENCE:
                return sequence
            matched = 0
            if self._may_share(sequence):
                salt, most = sequence.request.cache_salt, self._most_shared(sequence)
                matched = self.tree.matched(salt, sequence.tokens, most)
            if matched > longest:
                best, longest = sequence, matched
        return best

    def _take_waiting(self, sequence: Sequence, held: set[Sequence]) -> None:
        """Out of the queue; those it passes remember, but for who waits for another prompt anyway."""
        for earlier in self.waiting:
            if earlier is sequence:
                break
            earlier.passed += earlier not in held
        self.waiting.remove(sequence)

    def _may_share(self, sequence: Sequence) -> bool:
        return self.share_prefixes and not sequence.wants_prompt_logprobs

    def _most_shared(self, sequence: Sequence) -> int:
        """Pages it may take from the cache: one token at least is computed afresh, for its logits."""
        return (len(sequence.tokens) - 1) // self.page_size

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _make_room(self, sequence: Sequence, count: int) -> list[Sequence]:
        """Give the sequence pages for ``count`` more tokens; who was retracted for it, perhaps itself."""
        needed = self._pages_for(sequence.computed + count) - len(sequence.pages)
        victims: list[Sequence] = []
        while needed > self.pool.free:
            if self.tree.evict(max(needed - self.pool.free, self.pool.total // EVICTED_SHARE)):
                continue
            victim = self.running[-1]
            self.retract(victim)
            victims.append(victim)
            if victim is sequence:
                return victims
        if needed > 0:
            sequence.pages += self.pool.take(needed)
        return victims

    def room_for_drafts(self, chunk: Chunk, count: int) -> int:
        """Give the chunk's sequence pages for ``count`` drafts behind it; how many fit. A draft may be wrong,
        so it takes free pages only: nothing is evicted and nobody is retracted for it."""
        sequence = chunk.sequence
        known = sequence.computed + chunk.count
        count = min(count, (len(sequence.pages) + self.pool.free) * self.page_size - known)
        sequence.pages += self.pool.take(max(self._pages_for(known + count) - len(sequence.pages), 0))
        return count

    def room_for_steps(self, chunks: list[Chunk], steps: int) -> int:
        """Give each chunk's sequence, all of one token, pages for so many steps; how many steps fit. As for
        drafts nobody makes room."""

        def needed(sequence: Sequence, count: int) -> int:
            return max(self._pages_for(sequence.computed + count) - len(sequence.pages), 0)

        while sum(needed(chunk.sequence, steps) for chunk in chunks) > self.pool.free:
            steps -= 1
        for chunk in chunks:
            chunk.sequence.pages += self.pool.take(needed(chunk.sequence, steps))
        return steps

    def drop_drafts(self, sequence: Sequence, kept_tokens: int = 0) -> None:
        """Take back the pages that only wrong drafts are in, not those of ``kept_tokens`` more; K and V of
        drafts in kept pages are overwritten before they are read."""
        kept = self._pages_for(sequence.computed + kept_tokens)
        self.pool.release(sequence.pages[kept:])
        del sequence.pages[kept:]

    def retract(self, sequence: Sequence) -> None:
        """Take a running sequence's pages; it starts again when there is room."""
        self.preemptions += 1
        self._give_up_pages(sequence)
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)

    def cache_computed(self, sequence: Sequence) -> None:
        """Put the whole pages computed so far into the prefix tree, so that others can share them now.

        Not what is in flight: it may be NaN.
        """
        if not self.share_prefixes:
            return
        whole = min(sequence.sound, len(sequence.tokens)) // self.page_size
        kept = self.tree.insert(sequence.request.cache_salt, sequence.tokens, sequence.pages[:whole])
        sequence.pages[:whole] = kept

    def forget_prefix(self, sequence: Sequence) -> None:
        """Share nothing any more of what begins as the sequence does: which of it went wrong is not known."""
        self.tree.forget(sequence.request.cache_salt, sequence.tokens)

    def remove(self, sequence: Sequence) -> None:
        """A sequence that has ended, wherever it is."""
        if sequence in self.running:
            self._give_up_pages(sequence)
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def _give_up_pages(self, sequence: Sequence) -> None:
        self.cache_computed(sequence)
        self.pool.release(sequence.pages)
        sequence.pages = []
        sequence.computed = 0
        self._slots.append(sequence.slot)
        sequence.slot = -1

    def check(self) -> list[str]:
        """Violations of the page accounting."""
        tables = [sequence.pages for sequence in self.running]
        found = self.pool.check(tables, self.tree.pages())
        found += [f"{s.id} waits and holds pages" for s in self.waiting if s.pages or s.slot >= 0]
        if len({s.slot for s in self.running} | set(self._slots)) != len(self.running) + len(self._slots):
            found.append("two sequences have one state slot")
        if not self.running and not self.waiting and self.pool.free + self.pool.idle != self.pool.total:
            found.append(f"idle, but {self.pool.total - self.pool.free - self.pool.idle} pages are used")
        return found
