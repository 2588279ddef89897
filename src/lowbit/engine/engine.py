"""Engine: requests in, token events out, one scheduler step at a time.

    launch   schedule, forward pass, the choice of tokens; on a GPU all of it is only queued (launch.py)
    finish   look at what was chosen: text, stop rules, events (finish.py)

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
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import msgspec

from lowbit.checkpoint.quality import Quality
from lowbit.engine.choices import DeviceSampler
from lowbit.engine.continuous_decode import ContinuousDecode
from lowbit.engine.cuda_graphs import Progress
from lowbit.engine.drafting import Drafting, log_drafts, rules_for
from lowbit.engine.finish import Finisher
from lowbit.engine.idle import IdleWork
from lowbit.engine.launch import Launcher
from lowbit.engine.memory import claim_scratch, pool_pages, prefill_tokens
from lowbit.engine.messages import (
    EngineReady,
    EngineStatus,
    MeasuredQuality,
    Request,
    SamplingParams,
    TokenEvent,
)
from lowbit.engine.page_pool import PagePool
from lowbit.engine.prompts import rounds_prompts
from lowbit.engine.runner import Runner
from lowbit.engine.sampler import checked
from lowbit.engine.scheduler import Scheduler
from lowbit.engine.sequence import Sequence, mixed
from lowbit.engine.step_parts import Step
from lowbit.errors import LowbitError, printable
from lowbit.kernels.recurrent import prompt_unit, state_bytes
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
        speculation = rules_for(model, settings)
        pages = pool_pages(model, settings)
        self._pool = PagePool(pages)
        self._scheduler = Scheduler(
            self._pool,
            settings.page_size,
            max_running=settings.running_limit,
            prefill_budget=self._forced.chunk or self._prefill_budget(pages),
            share_prefixes=self._may_share(),
            policy=settings.schedule_policy,
            unit=prompt_unit(model.cache_specs(), model.device),
            prompts_apart=rounds_prompts(settings, model.device.type),
        )
        self.pool_tokens = pages * settings.page_size
        self.context_length = min(settings.context_length or model.context_length, self.pool_tokens)
        self._runner = Runner(model, pages, self.context_length, settings)
        on_gpu = model.device.type == "cuda"
        self._overlaps = self._may_overlap(on_gpu, speculation is not None)
        self._sampler: DeviceSampler | None = None
        if on_gpu or self._overlaps or self._forced.on_device:
            ranks = getattr(model, "ranks", None)
            watch = None if ranks is None else ranks.check
            self._sampler = DeviceSampler(model.vocab_size, model.device, watch)
        self._drafting: Drafting | None = None
        if speculation is not None:
            self._drafting = Drafting(speculation, self._scheduler, at_once=self._sampler is not None)
        self._flying: Step | None = None
        self._sequences: dict[str, Sequence] = {}
        self._finisher = Finisher(self._scheduler, self._sampler, self._sequences, model.vocab_size)
        continuous: ContinuousDecode | None = None
        if self._may_continue():
            steps = settings.num_continuous_decode_steps
            continuous = ContinuousDecode(self._scheduler, self._runner, model.vocab_size, steps)
        self._launcher = Launcher(
            self._scheduler,
            self._runner,
            self._sampler,
            self._finisher,
            self._drafting,
            continuous,
            model.device,
            self._has_states,
        )
        self._idle = IdleWork(self._pool, self._runner, settings.page_size)
        self._news: list[TokenEvent] = []  # events that did not come from a step
        self._violations = 0
        self._seeded = 0  # sequences that brought no seed of their own

    def prepare(self, progress: Progress | None = None) -> None:
        """What takes time and had better be done before the first request: a GPU's kernels and graphs."""
        if self._sampler is not None and self.model.device.type == "cuda":
            self._sampler.warm_up()
        largest = min(self._prefill_budget(self._pool.total), self.context_length)
        self._runner.prepare(largest, progress)

    def claim_scratch(self) -> Iterator[None]:
        """Get from the system, a moment's work a step, the memory that a first long prompt computes in."""
        tokens = min(self._prefill_budget(self._pool.total), self.context_length)
        yield from claim_scratch(self.model, tokens)

    def _prefill_budget(self, pages: int) -> int:
        """Prompt tokens a step; -1 asks for whole prompts, and no step can hold more than the pool does."""
        size = prefill_tokens(self.settings, self.model.device)
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

    def _may_overlap(self, on_gpu: bool, drafts: bool) -> bool:
        """Whether a step may be launched before the one before is finished."""
        if self.settings.disable_overlap_schedule or not (on_gpu or self._forced.overlap):
            return False
        reason = ""
        if drafts:
            reason = "drafts continue tokens that must be known"
        elif self.model.spans_tokens:
            reason = "this model's inputs share scales between tokens, those of ended sequences included"
        if reason:
            _log.info("lowbit: steps do not overlap: %s", reason)
        return not reason

    def _may_continue(self) -> bool:
        """Whether several decode steps may be taken in one call. Steps behind a stop string would count
        where inputs share scales between tokens."""
        return (
            self.settings.num_continuous_decode_steps != 1
            and self._runner.replays_on_host
            and self._sampler is None
            and self._drafting is None
            and not self.model.spans_tokens
        )

    # ---- requests ------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Accept a request; one that can never run is a LowbitError whose code is the API's."""
        sampling = checked(request.sampling, self.model.vocab_size)
        request, length = msgspec.structs.replace(request, sampling=sampling), len(request.prompt)
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
            wanted = sampling.max_tokens
            asked = f" and max_tokens {wanted}: {length + wanted} > context" if wanted else ", the context is"
            raise LowbitError(
                "prompt_too_long",
                f"prompt is {length} tokens{asked} {self.context_length}; shorten the prompt or lower "
                "max_tokens",
            )
        sequence = Sequence.start(request, limit, self._stop_ids, self.tokenizer, self._next_seed(sampling))
        if self._drafting is not None:
            self._drafting.follow(sequence)
        self._sequences[request.id] = sequence
        self._scheduler.add(sequence)

    def _next_seed(self, sampling: SamplingParams) -> int | None:
        """Where the sequence brings none. ``--random-seed`` begins a row of seeds: equal requests draw
        differently, and the same ones in the same order as before."""
        first = self.settings.random_seed
        if sampling.seed is not None or first is None:
            return None
        self._seeded += 1
        return mixed(first + self._seeded)

    def cancel(self, request_id: str) -> None:
        """Forget a request; one that is unknown or has ended is none of our business."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._news.append(self._finisher.end(sequence, "abort"))

    def has_work(self) -> bool:
        """Whether ``step`` would do something."""
        return bool(self._sequences or self._news or self._flying)

    def when_idle(self, work: Iterator[None]) -> None:
        """What can wait until nobody waits for an answer; each of its steps takes a moment."""
        self._idle.later = work

    def idle_step(self) -> bool:
        """A moment of what waits until nobody waits for an answer; False: there was none left."""
        return self._idle.step()

    # ---- steps ---------------------------------------------------------------------------------------

    def step(self) -> list[TokenEvent]:
        """One forward pass over the next batch, and what became certain: its events, or the last one's."""
        events, self._news = self._news, []
        self._scheduler.admitted.clear()
        step: Step | None = None
        if self._scheduler.running or self._scheduler.waiting:
            step, ended = self._launcher.launch(self._flying)
            self._news += ended
        if self._overlaps:
            step, self._flying = self._flying, step
        if step is not None:
            events += self._finisher.finish(step)
            self._force()
        if self._forced.check and (found := self.check()):
            raise AssertionError("; ".join(found))
        return events

    def admitted(self) -> list[str]:
        """Ids of the requests whose prompts the last step began with."""
        return self._scheduler.admitted

    def progress(self) -> int:
        """Grows while a step computes; another thread may ask."""
        return self._runner.progress

    def _force(self) -> None:
        """What the forced modes ask after a step."""
        forced, scheduler = self._forced, self._scheduler
        if (
            forced.retract_every
            and self._launcher.steps % forced.retract_every == 0
            and len(scheduler.running) > 1
        ):
            scheduler.retract(scheduler.running[-1])
        if forced.evict_always:
            scheduler.tree.evict(self._pool.total)

    def close(self) -> None:
        """Keep what the next run goes on from: the states of delayed scales, where a file was named."""
        log_drafts(self._finisher.counters)
        self.model.states.keep()
        if (ranks := getattr(self.model, "ranks", None)) is not None:
            self._runner.forget_graphs()  # NCCL waits for graphs that hold its operations
            ranks.close()

    # ---- state ---------------------------------------------------------------------------------------

    def status(self) -> EngineStatus:
        """Counters and gauges."""
        counters = self._finisher.counters
        return EngineStatus(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            pages_total=self._pool.total,
            pages_free=self._pool.free,
            pages_cached=self._pool.idle,
            steps=self._launcher.steps,
            captured_steps=self._runner.captured_steps,
            prompt_tokens=counters.prompt_tokens,
            cached_prompt_tokens=counters.cached_tokens,
            generated_tokens=counters.generated_tokens,
            draft_tokens=counters.drafts,
            accepted_draft_tokens=counters.accepted_drafts,
            preemptions=self._scheduler.preemptions,
            invariant_violations=self._violations,
        )

    def ready(self) -> EngineReady:
        """The limits the server admits requests by."""
        return EngineReady(
            model_name=self.settings.served_model_name or self.settings.model,
            context_length=self.context_length,
            pool_tokens=self.pool_tokens,
            page_size=self.settings.page_size,
            vocab_size=self.model.vocab_size,
            max_running=self.settings.running_limit,
            architecture=self._architecture,
            quantization=self.model.quantization,
            weight_bytes=self.model.weight_bytes,
            quality=None if self._quality is None else MeasuredQuality(**asdict(self._quality)),
            details=self._details,
        )

    def flush_cache(self) -> int:
        """Drop every idle prefix page; how many."""
        return self._scheduler.tree.evict(self._pool.total)

    def check(self) -> list[str]:
        """Violations of the accounting of pages and slots; [] when all is right. E0712 where a rank is
        gone."""
        if (ranks := getattr(self.model, "ranks", None)) is not None:
            ranks.check()
        found = self._scheduler.check()
        known = {sequence.id for sequence in (*self._scheduler.running, *self._scheduler.waiting)}
        if known != self._sequences.keys():
            found.append("a request is neither waiting nor running")
        self._violations += bool(found)
        return found
