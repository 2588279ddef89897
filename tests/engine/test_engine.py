"""The engine on a stand-in model: scheduling, sharing, stopping, log-probabilities, failures, accounting."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from engine.stand_in import EOS, VOCABULARY, ByteTokenizer, StandIn, continuation, next_token
from lowbit.engine.engine import Engine, ForcedModes
from lowbit.engine.messages import Request, SamplingParams, TokenEvent
from lowbit.engine.scheduler import PATIENCE
from lowbit.errors import LowbitError
from lowbit.kernels import attention
from lowbit.settings import Settings

NUMBERS = itertools.count()
MODES: dict[str, dict[str, bool]] = {
    "plain": {},
    "on device": {"on_device": True},
    "overlap": {"overlap": True},
    "prompts apart": {},
}
_mode: dict[str, bool] = {}


@pytest.fixture(autouse=True, params=MODES)
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every test here runs with tokens chosen on the device and with steps that overlap, too; and as where
    kernels round weights for prompts."""
    _mode.update(MODES[request.param])
    if request.param == "prompts apart":
        for module in ("engine", "runner"):
            monkeypatch.setattr(f"lowbit.engine.{module}.rounds_prompts", lambda *_: True)
    yield request.param
    _mode.clear()


def make_engine(forced: ForcedModes | None = None, model: StandIn | None = None, **options: object) -> Engine:
    forced = replace(forced or ForcedModes(), **_mode)
    values = {"device": "cpu", "max_total_tokens": 640, "max_running_requests": 8, **options}
    return Engine(model or StandIn(), ByteTokenizer(), Settings(**values), forced=forced)


@pytest.fixture(autouse=True)
def plain_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in reads the reference kernel's plain pages."""
    use_reference(monkeypatch)


def use_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowbit.kernels.attention_reference import ReferenceAttention

    monkeypatch.setattr(attention, "attention_kernels", lambda: [ReferenceAttention()])


def make_request(prompt: list[int], count: int | None = 8, **options: object) -> Request:
    more = {name: options.pop(name) for name in ("cache_salt", "echo_only", "id") if name in options}
    values = {"temperature": 0.0, "max_tokens": count, **options}
    name = f"r{next(NUMBERS)}"
    return Request(**{"id": name, "prompt": tuple(prompt), "sampling": SamplingParams(**values), **more})


def run(engine: Engine, *requests: Request) -> list[list[TokenEvent]]:
    """Each request's events, all submitted at once."""
    events: dict[str, list[TokenEvent]] = {request.id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    for _ in range(10_000):
        if not engine.has_work():
            break
        for event in engine.step():
            events[event.id].append(event)
        assert engine.check() == []
    assert not engine.has_work(), "no end in sight"
    for listed in events.values():
        assert sum(event.finish_reason is not None for event in listed) == 1
        assert listed[-1].finish_reason is not None
    return list(events.values())


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.tokens]


def prompts(count: int, seed: int = 0, longest: int = 90) -> list[list[int]]:
    draw = random.Random(seed)
    made: list[list[int]] = []
    for index in range(count):
        fresh = [draw.randrange(4, VOCABULARY) for _ in range(draw.randint(1, longest))]
        made.append((draw.choice(made) + fresh)[:longest] if index % 3 == 2 else fresh)
    return made


@pytest.mark.parametrize(
    "forced",
    [
        ForcedModes(),
        ForcedModes(chunk=1),
        ForcedModes(chunk=7, retract_every=3),
        ForcedModes(retract_every=2, evict_always=True),
    ],
    ids=str,
)
def test_output_is_what_each_gives_alone(forced: ForcedModes) -> None:
    engine = make_engine(forced)
    listed = prompts(20)
    for prompt, events in zip(listed, run(engine, *(make_request(p, 20) for p in listed)), strict=True):
        expected = continuation(prompt, 20)
        assert tokens_of(events) == expected
        last = events[-1]
        assert last.prompt_tokens == len(prompt) and last.completion_tokens == len(expected)
        assert last.finish_reason == ("stop" if expected[-1] == EOS else "length")
        shown = "".join(event.text for event in events)
        assert shown == ByteTokenizer().decode(expected)
    assert not forced.retract_every or engine.status().preemptions > 0


def test_tiny_pools_retract_and_still_finish() -> None:
    engine = make_engine(max_total_tokens=96)
    listed = prompts(12, seed=3, longest=20)
    requests = [make_request(p, 60, ignore_eos=True) for p in listed]
    for prompt, events in zip(listed, run(engine, *requests), strict=True):
        assert tokens_of(events) == continuation(prompt, 60, stops=False)
    assert engine.status().preemptions > 0


def test_a_shared_prefix_is_computed_once() -> None:
    engine = make_engine()
    prefix = list(range(4, 52))  # three whole pages
    (first,) = run(engine, make_request([*prefix, 9, 9]))
    assert first[0].cached_tokens == 0
    (second,) = run(engine, make_request([*prefix, 8, 8, 8]))
    assert second[0].cached_tokens == 48
    assert tokens_of(second) == continuation([*prefix, 8, 8, 8], 8)
    (whole,) = run(engine, make_request(prefix))
    assert whole[0].cached_tokens == 32, "the last token is always computed: its logits are needed"
    (other,) = run(engine, make_request(prefix, cache_salt="another key"))
    assert other[0].cached_tokens == 0
    assert engine.flush_cache() > 0
    (after,) = run(engine, make_request(prefix))
    assert after[0].cached_tokens == 0
    off = make_engine(disable_radix_cache=True)
    run(off, make_request(prefix))
    (again,) = run(off, make_request(prefix))
    assert again[0].cached_tokens == 0


def test_a_full_cache_is_not_searched_for_every_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """One eviction frees a share of the pool, and no more."""
    engine = make_engine(max_total_tokens=16 * 256)
    for listed in range(14):
        run(engine, make_request([4 + listed] * 320, 1))
    pool, tree = engine._pool, engine._scheduler.tree
    assert pool.free < 4
    evict, freed = tree.evict, []

    def counted(count: int) -> int:
        freed.append(evict(count))
        return freed[-1]

    monkeypatch.setattr(tree, "evict", counted)
    run(engine, make_request([61] * 10, 100, ignore_eos=True))
    assert freed == [4, 4] and pool.free + pool.idle == pool.total


def test_answers_become_prefixes() -> None:
    engine = make_engine()
    prompt = list(range(4, 24))
    (events,) = run(engine, make_request(prompt, 30, ignore_eos=True))
    whole = prompt + tokens_of(events)
    (follow,) = run(engine, make_request([*whole, 5, 6]))
    assert follow[0].cached_tokens == (len(whole) - 1) // 16 * 16


def test_stop_rules() -> None:
    prompt = [20, 21, 22]
    free = continuation(prompt, 40, stops=False)
    engine = make_engine()
    (events,) = run(engine, make_request(prompt, 40, ignore_eos=True, stop_token_ids=(free[5],)))
    first = free.index(free[5])
    assert tokens_of(events) == free[: first + 1] and events[-1].matched_stop == free[5]
    letters = ByteTokenizer().decode(free, skip_special=False)
    stop = letters[6:9]
    (events,) = run(
        engine, make_request(prompt, 40, ignore_eos=True, stop=(stop,), skip_special_tokens=False)
    )
    assert events[-1].matched_stop == stop and events[-1].finish_reason == "stop"
    assert "".join(event.text for event in events) == letters[: letters.index(stop)]
    (events,) = run(engine, make_request(prompt, 5, ignore_eos=True))
    assert events[-1].finish_reason == "length" and len(tokens_of(events)) == 5


def test_min_tokens_holds_the_end_back() -> None:
    start = next(s for s in range(4, VOCABULARY) if EOS in continuation([s], 30)[:20])
    natural = continuation([start], 60)
    engine = make_engine()
    (events,) = run(engine, make_request([start], 60, min_tokens=len(natural) + 3))
    assert len(tokens_of(events)) >= len(natural) + 3
    assert tokens_of(events)[: len(natural) - 1] == natural[:-1]


def test_max_tokens_none_runs_to_the_context() -> None:
    engine = make_engine()
    assert engine.context_length == 400
    (events,) = run(engine, make_request([7] * 390, None, ignore_eos=True))
    assert len(tokens_of(events)) == 10 and events[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "options", "code"),
    [
        ([], {}, "empty_prompt"),
        ([1] * 395, {"count": 8}, "prompt_too_long"),
        ([1] * 400, {"count": None}, "prompt_too_long"),
        ([VOCABULARY], {}, "invalid_token"),
        ([-1], {}, "invalid_token"),
    ],
)
def test_what_can_never_run_is_refused(prompt: list[int], options: dict[str, int], code: str) -> None:
    engine = make_engine()
    with pytest.raises(LowbitError) as caught:
        engine.submit(make_request(prompt, **options))
    assert caught.value.code == code
    assert not engine.has_work()


def test_a_pool_smaller_than_the_context_is_the_limit() -> None:
    engine = make_engine(max_total_tokens=64)
    with pytest.raises(LowbitError, match="> context 64"):
        engine.submit(make_request([5] * 50, 20))
    (events,) = run(engine, make_request([5] * 50, None, ignore_eos=True))
    assert len(tokens_of(events)) == 14


def test_two_requests_of_one_name() -> None:
    engine = make_engine()
    engine.submit(make_request([5], id="same"))
    with pytest.raises(LowbitError, match="already running"):
        engine.submit(make_request([5], id="same"))


def test_cancel_at_any_time() -> None:
    engine = make_engine(max_running_requests=2)
    requests = [make_request(p, 30) for p in prompts(5, seed=8)]
    for request in requests:
        engine.submit(request)
    engine.step()
    engine.cancel(requests[0].id)  # runs
    engine.cancel(requests[4].id)  # waits
    engine.cancel("unknown")
    ended: dict[str, str] = {}
    while engine.has_work():
        for event in engine.step():
            if event.finish_reason:
                assert event.id not in ended
                ended[event.id] = event.finish_reason
        assert engine.check() == []
    assert ended[requests[0].id] == ended[requests[4].id] == "abort"
    assert len(ended) == 5


def test_nan_ends_its_own_request_only() -> None:
    model = StandIn()
    engine = make_engine(model=model)
    model.poisoned = {50}
    good, bad = [10, 11, 12], [10, 11, 50]
    one, two = run(engine, make_request(good, 6), make_request(bad, 6))
    assert tokens_of(one)[:1] == [next_token(good)]
    assert two[-1].finish_reason == "error" and two[-1].error_code == "model_numerical_error"
    assert "1 of 64 logits" in two[-1].error
    assert engine.check() == []


def test_logprobs_are_of_the_raw_logits() -> None:
    engine = make_engine()
    prompt = [9, 8, 7]
    (events,) = run(engine, make_request(prompt, 4, logprobs=3, ignore_eos=True, temperature=0.0))
    model = StandIn()
    for index, event in enumerate(events):
        (entry,) = event.logprobs
        context = prompt + tokens_of(events)[:index]
        generator = torch.Generator().manual_seed(sum(context) * 7 + len(context))
        row = torch.rand(model.vocab_size, generator=generator)
        row[next_token(context)] = 5.0
        expected = torch.log_softmax(row.double(), 0)
        assert entry.token == event.tokens[0]
        assert entry.logprob == pytest.approx(float(expected[entry.token]))
        assert [token for token, _ in entry.top] == expected.topk(3).indices.tolist()


@pytest.mark.parametrize(
    "forced", [ForcedModes(), ForcedModes(chunk=5), ForcedModes(retract_every=2)], ids=str
)
def test_prompt_logprobs_over_a_prefix_hit(forced: ForcedModes) -> None:
    prompt = prompts(1, seed=5, longest=300)[0] + [9] * 200
    alone = make_engine()
    (expected,) = run(alone, make_request(prompt, 3, prompt_logprobs=2))
    engine = make_engine(forced)
    run(engine, make_request(prompt, 3))  # fills the cache
    found, _ = run(engine, make_request(prompt, 3, prompt_logprobs=2), make_request([5, 6], 9))
    assert found[0].prompt_logprobs == expected[0].prompt_logprobs
    listed = found[0].prompt_logprobs
    assert listed is not None and len(listed) == len(prompt) and listed[0] is None
    assert all(
        entry is not None and entry.token == token
        for entry, token in zip(listed[1:], prompt[1:], strict=True)
    )


def test_echo_without_tokens() -> None:
    engine = make_engine()
    (events,) = run(engine, make_request([4, 5, 6], None, prompt_logprobs=0, echo_only=True))
    assert tokens_of(events) == [] and events[-1].finish_reason == "length"
    assert events[0].prompt_logprobs is not None and len(events[0].prompt_logprobs) == 3


def test_status_counts() -> None:
    engine = make_engine()
    run(engine, *(make_request(p, 5, ignore_eos=True) for p in prompts(6, longest=30)))
    status = engine.status()
    assert (status.running, status.waiting) == (0, 0)
    assert status.generated_tokens == 30
    assert status.pages_free + status.pages_cached == status.pages_total == 40
    assert status.steps > 0 and status.invariant_violations == 0


def order_of_first_tokens(engine: Engine, requests: list[Request]) -> list[str]:
    """Ids in the order they were admitted; everything is submitted at once."""
    for request in requests:
        engine.submit(request)
    seen: dict[str, None] = {}
    while engine.has_work():
        for event in engine.step():
            seen.setdefault(event.id)
    return list(seen)


def test_lpm_runs_the_longest_cached_prefix_first() -> None:
    prefix = list(range(4, 52))  # three pages
    strangers = [make_request([60, *prefix[n:]], id=f"stranger {n}") for n in range(2)]
    short = make_request([*prefix[:16], 60, 61], id="one page")
    salted = make_request(prefix + [60] * 9, id="another key", cache_salt="another key")
    listed = make_request(prefix + [60] * 9, id="log-probabilities", prompt_logprobs=1)
    longest = [make_request([*prefix, 60, n], id=f"three pages {n}") for n in range(2)]
    requests = [strangers[0], short, salted, listed, longest[0], strangers[1], longest[1]]
    for policy in ("fcfs", "lpm"):
        engine = make_engine(max_running_requests=1, schedule_policy=policy)
        run(engine, make_request([*prefix, 9]))
        found = order_of_first_tokens(engine, requests)
        if policy == "fcfs":
            assert found == [request.id for request in requests]
            continue
        assert found[:3] == ["three pages 0", "three pages 1", "one page"]
        # What strangers leave in the cache may match each other; nobody is lost.
        assert sorted(found) == sorted(request.id for request in requests)


def test_lpm_starves_nobody() -> None:
    """A prompt nobody else begins like, behind an endless stream of ones that hit the cache."""
    engine = make_engine(max_running_requests=1, schedule_policy="lpm")
    prefix = list(range(4, 52))
    run(engine, make_request([*prefix, 9]))
    for n in range(3):
        engine.submit(make_request([*prefix, n], 2, id=f"early {n}"))
    engine.submit(make_request([61, 62, 63], 2, id="lonely"))
    engine.submit(make_request([62, 62, 63], 2, id="lonely too"))
    ended: list[str] = []
    for n in range(3, 200):
        engine.submit(make_request([*prefix, n % 60, n // 60], 2, id=f"late {n}"))
        while not any(event.finish_reason and ended.append(event.id) is None for event in engine.step()):
            pass
        assert engine.check() == []
    assert ended.index("lonely") == 3 + PATIENCE and ended.index("lonely too") == 4 + PATIENCE


def test_the_tree_says_what_it_would_match() -> None:
    engine = make_engine()
    tree = engine._scheduler.tree
    prefix = list(range(4, 60))
    run(engine, make_request([*prefix, 9], 1), make_request([*prefix[:32], *[7] * 20], 1))
    for tokens in (prefix, prefix[:33], prefix[:31], [5, *prefix], prefix[:16] + [1] * 30, [], [7] * 40):
        for most in range(5):
            told = tree.matched("", tokens, most)
            assert tree.matched("other", tokens, most) == 0
            pages = tree.match("", tokens, most)
            assert told == len(pages) == tree.matched("", tokens, most)
            engine._pool.release(pages)


@pytest.mark.parametrize("size", [-1, 100])
def test_whole_prompts_or_chunks(size: int) -> None:
    engine = make_engine(chunked_prefill_size=size)
    listed = prompts(1, seed=5, longest=300)[0] + [9] * 240
    run(engine, make_request(listed, 1), make_request([8] * 250, 1))
    assert engine.status().steps == (1 if size == -1 else -(-(len(listed) + 250) // 100))


def test_an_idle_moment_has_memory_for_the_next_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A little beyond those in use, anew once half of it is used, and before anything else that can wait."""
    from lowbit.engine import idle as module
    from lowbit.kernels.attention import LayerCache

    asked: list[tuple[int, int]] = []

    def populate(cache: LayerCache, first: int, last: int) -> Iterator[None]:
        asked.append((first, last))
        yield

    monkeypatch.setattr(LayerCache, "populate", populate)
    monkeypatch.setattr(module, "READY_TOKENS", 160)
    engine = make_engine(disable_radix_cache=True)
    layers = len(engine.model.cache_specs())
    done: list[int] = []
    engine.when_idle(iter(done.append(1) for _ in range(2)))
    for _ in range(layers + 1):
        assert engine.idle_step() and not done
    assert asked == [(0, 10)] * layers
    assert [engine.idle_step() for _ in range(3)] == [True, True, False] and len(done) == 2
    asked.clear()
    run(engine, make_request([5] * 40, 1))  # 3 of the 10 pages: enough is left
    assert not engine.idle_step()
    run(engine, *(make_request([6] * 40, 1) for _ in range(2)))
    while engine.idle_step():
        pass
    used = engine._pool.used
    assert asked == [(10, used + 10)] * layers and used >= 6
    assert engine.pool_tokens // 16 > used + 10


@pytest.mark.parametrize("chunk", [0, 48])
def test_one_prompt_of_many_requests_is_computed_once(chunk: int) -> None:
    """As those of n choices are, and a common beginning; other salts and others' pages do not wait."""
    engine = make_engine(ForcedModes(chunk=chunk), max_total_tokens=2000, max_running_requests=12)
    prompt = list(range(4, 60)) * 2
    common, tails = [9] * 64, [[tail] * 20 for tail in (20, 30, 40)]
    requests = [make_request(prompt, 6, ignore_eos=True) for _ in range(6)]
    requests += [make_request(common + tail, 6, ignore_eos=True) for tail in tails]
    answers = run(engine, *requests)
    for request, events in zip(requests, answers, strict=True):
        assert tokens_of(events) == continuation(list(request.prompt), 6, stops=False)
    cached = [events[0].cached_tokens for events in answers]
    # In chunks some join a page before the end: a step's wait would cost as much.
    missing = [whole - found for whole, found in zip([0, *[96] * 5, 0, 64, 64], cached, strict=True)]
    assert not any(missing) if not chunk else max(missing) <= 16
    assert engine.status().prompt_tokens == 112 + 16 * 5 + 84 + 20 * 2 + sum(missing)
    salted = make_engine(max_total_tokens=2000)
    run(salted, *(make_request(prompt, 1, cache_salt=str(n)) for n in range(3)))
    assert salted.status().steps == 1
