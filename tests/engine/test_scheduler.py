"""Whose tokens a step computes: shares of its prefill budget, who waits for whom, rows of logits."""

from __future__ import annotations

import pytest

from engine.stand_in import StandIn, continuation
from engine.test_engine import make_engine, make_request, run, tokens_of, use_reference
from lowbit.engine.engine import Engine, ForcedModes
from lowbit.engine.messages import Request, TokenEvent
from lowbit.engine.scheduler import LEAST_SHARE, PROMPT_LOGPROB_ROWS


@pytest.fixture(autouse=True)
def plain_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in reads the reference kernel's plain pages."""
    use_reference(monkeypatch)


def prompt_of(length: int, first: int = 0) -> list[int]:
    return [(first + i * i + i) % 60 + 4 for i in range(length)]


def engine_of(budget: int, **options: object) -> Engine:
    values = {"max_total_tokens": 16 * 400, "chunked_prefill_size": budget, **options}
    model = StandIn()
    model.context_length = 4096
    return make_engine(ForcedModes(check=True), model, **values)


def counts(engine: Engine) -> dict[str, int]:
    """Tokens of each sequence in the next step, which runs."""
    scheduler, found = engine._scheduler, {}
    chunks = scheduler.next_chunks

    def noted(**options: bool) -> list:
        listed = chunks(**options)
        found.update({chunk.sequence.id: chunk.count for chunk in listed})
        return listed

    scheduler.next_chunks = noted
    try:
        engine.step()
    finally:
        scheduler.next_chunks = chunks
    return found


def submitted(engine: Engine, *requests: Request) -> None:
    for request in requests:
        engine.submit(request)


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    engine = engine_of(128)
    submitted(engine, make_request(prompt_of(2000), 4, id="long"))
    assert counts(engine) == {"long": 128}  # nobody else wants any
    submitted(engine, make_request(prompt_of(20, 7), 4, id="short"))
    assert counts(engine) == {"long": 108, "short": 20}  # what was left over went back
    assert counts(engine) == {"long": 128, "short": 1}
    submitted(
        engine, make_request(prompt_of(500, 9), 4, id="other"), make_request(prompt_of(9, 3), 4, id="third")
    )
    assert counts(engine) == {"long": 96, "short": 1, "other": 32}
    assert counts(engine)["other"] == LEAST_SHARE


def test_a_prompt_that_fits_is_not_divided() -> None:
    engine = engine_of(128)
    submitted(engine, *(make_request(prompt_of(120, n), 4, id=f"{n}") for n in range(3)))
    assert counts(engine) == {"0": 120, "1": 8}
    assert counts(engine) == {"0": 1, "1": 112, "2": 16}


def test_what_nobody_can_take_is_not_lost() -> None:
    """Who waits for pages, or for a place, leaves the whole budget to others."""
    engine = engine_of(128, max_running_requests=1)
    submitted(engine, *(make_request(prompt_of(1000, n), 4, id=f"{n}") for n in range(2)))
    assert counts(engine) == {"0": 128}
    engine = engine_of(128, max_total_tokens=16 * 64)
    submitted(engine, *(make_request(prompt_of(1000, n), 4, id=f"{n}") for n in range(2)))
    assert counts(engine) == {"0": 128} and counts(engine) == {"0": 128}


def test_who_waits_for_a_prompt_lets_others_pass() -> None:
    """A second choice of a long prompt is held until it can share it; a later request is not."""
    engine = engine_of(128)
    long = prompt_of(1000)
    submitted(engine, *(make_request(long, 4, id=name) for name in ("first", "second", "third")))
    submitted(engine, make_request(prompt_of(20, 7), 4, id="later"))
    assert counts(engine) == {"first": 108, "later": 20}
    assert engine.admitted() == ["first", "later"]
    events: dict[str, list[TokenEvent]] = {}
    while engine.has_work():
        for event in engine.step():
            events.setdefault(event.id, []).append(event)
    for name in ("first", "second", "third"):
        assert tokens_of(events[name]) == continuation(long, 4)
    assert [events[name][0].cached_tokens for name in ("first", "second", "third")] == [0, 992, 992]


def test_admission_is_told_once() -> None:
    engine = engine_of(128, max_running_requests=1)
    submitted(engine, make_request(prompt_of(200), 4, id="a"), make_request(prompt_of(9, 5), 1, id="b"))
    told: list[str] = []
    for step in range(20):
        engine.step()
        told += engine.admitted()
        if step < 2:
            engine._scheduler.retract(engine._scheduler.running[-1])
    assert told == ["a", "b"] and not engine.has_work()


def test_rows_of_log_probabilities_are_bounded_for_all_prompts_together() -> None:
    engine = engine_of(512)
    several = [make_request(prompt_of(300, n), 1, id=f"{n}", prompt_logprobs=1) for n in range(4)]
    submitted(engine, *several, make_request(prompt_of(200, 50), 1, id="plain"))
    while engine.has_work():
        step = counts(engine)
        assert sum(count for name, count in step.items() if name != "plain") <= PROMPT_LOGPROB_ROWS
    again = run(engine, *(make_request(prompt_of(300, n), 1, prompt_logprobs=1) for n in range(4)))
    assert all(len(events[0].prompt_logprobs or ()) == 300 for events in again)


def test_a_prompt_whose_log_probabilities_fail_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowbit.engine import choices

    def fails(*arguments: object) -> object:
        raise MemoryError("no memory to rate")

    engine = engine_of(128)
    monkeypatch.setattr(choices.HostChoices, "logprob", fails)
    rated, other = run(
        engine, make_request(prompt_of(50), 4, prompt_logprobs=2), make_request(prompt_of(9, 3), 4)
    )
    assert rated[-1].finish_reason == "error" and rated[-1].error_code == "internal"
    assert rated[-1].error.startswith("its prompt's log-probabilities failed (MemoryError")
    assert tokens_of(other) == continuation(prompt_of(9, 3), 4)


def test_a_random_seed_is_no_seed_of_every_request() -> None:
    """Equal requests draw differently, and in the same order the same again."""

    def drawn() -> list[list[int]]:
        engine = engine_of(128, random_seed=42)
        same = [make_request(prompt_of(9), 12, temperature=5.0, ignore_eos=True) for _ in range(3)]
        return [tokens_of(events) for events in run(engine, *same)]

    first = drawn()
    assert len({tuple(tokens) for tokens in first}) == 3
    assert drawn() == first
