"""Steps launched before the last one is finished: the same answers as one after another."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoint import tiny
from engine.stand_in import ByteTokenizer, StandIn, continuation, next_copied
from engine.test_choices import some_sampling
from engine.test_engine import prompts, use_reference
from lowbit.checkpoint import open_checkpoint
from lowbit.engine.engine import Engine, ForcedModes
from lowbit.engine.messages import Request, SamplingParams, TokenEvent
from lowbit.engine.scheduler import Chunk
from lowbit.kernels import native
from lowbit.loading import load_model
from lowbit.settings import Settings


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """torch alone, as beside native kernels."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def plain_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    use_reference(monkeypatch)
    yield


def make(forced: ForcedModes, model: StandIn | None = None, **options: object) -> Engine:
    values = {"device": "cpu", "max_total_tokens": 640, "max_running_requests": 8, **options}
    return Engine(model or StandIn(), ByteTokenizer(), Settings(**values), forced=forced)


class Near(float):
    """Equal within what a float32 sum of exponentials is off by."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, float) and abs(float(self) - float(other)) <= 1e-6

    __hash__ = float.__hash__


class Watched:
    """What an engine's runner was given: how many tokens came from the step in flight."""

    def __init__(self, engine: Engine) -> None:
        self.ahead = 0
        self._forward = engine._runner.forward
        engine._runner.forward = self._watch  # type: ignore[method-assign]

    def _watch(
        self, chunks: list[Chunk], rows: list[int], chosen: Tensor | None, *, greedy: bool = False
    ) -> Tensor:
        self.ahead += sum(chunk.source >= 0 for chunk in chunks)
        return self._forward(chunks, rows, chosen, greedy=greedy)


def answers(engine: Engine, requests: list[Request]) -> dict[str, tuple[object, ...]]:
    """All that anybody sees of each request, but for when."""
    events: dict[str, list[TokenEvent]] = {request.id: [] for request in requests}
    waiting = list(requests)
    while waiting or engine.has_work():
        for request in waiting[:3]:
            engine.submit(request)
        del waiting[:3]
        for event in engine.step():
            events[event.id].append(event)
        assert engine.check() == []
    found = {}
    for name, listed in events.items():
        assert [bool(event.finish_reason) for event in listed] == [False] * (len(listed) - 1) + [True]
        last = listed[-1]
        rated = listed[0].prompt_logprobs or ()
        if last.finish_reason == "error":
            rated = ()  # those before the chunk that went wrong, however large chunks were
        found[name] = (
            [token for event in listed for token in event.tokens],
            "".join(event.text for event in listed),
            [entry.token for event in listed for entry in event.logprobs],
            [Near(entry.logprob) for event in listed for entry in event.logprobs],
            [entry and Near(entry.logprob) for entry in rated],
            (last.finish_reason, last.matched_stop, last.error_code, last.error),
            (last.prompt_tokens, last.completion_tokens),
        )
    status = engine.status()
    assert status.pages_free + status.pages_cached == status.pages_total
    return found


def mixed_requests(count: int) -> list[Request]:
    """Every way to sample and to end."""
    draw = random.Random(11)
    requests = []
    for index, prompt in enumerate(prompts(count, seed=12)):
        options = some_sampling(draw)
        bias = {token % 60: value for token, value in options.pop("logit_bias", {}).items()}  # type: ignore[attr-defined]
        options |= {
            "logit_bias": bias,
            "max_tokens": draw.choice((1, 2, 20)),
            "ignore_eos": draw.random() < 0.3,
            "stop": draw.choice(((), (), ("a",), ("bc", "S"))),
            "stop_token_ids": draw.choice(((), (), (9, 30))),
            "prompt_logprobs": draw.choice((None, None, None, 2)),
        }
        echo = index % 7 == 3
        if echo:
            options |= {"max_tokens": None, "prompt_logprobs": 1}
        requests.append(
            Request(id=f"r{index}", prompt=tuple(prompt), sampling=SamplingParams(**options), echo_only=echo)
        )
    return requests


@pytest.mark.usefixtures("plain_attention")
@pytest.mark.parametrize(
    ("forced", "options"),
    [
        ({}, {}),
        ({"chunk": 7, "retract_every": 3}, {}),
        ({"retract_every": 2, "evict_always": True}, {"disable_radix_cache": True}),
        ({}, {"max_total_tokens": 160}),
        ({"chunk": 5}, {"max_running_requests": 2, "schedule_policy": "lpm"}),
    ],
    ids=str,
)
def test_answers_are_the_same(forced: dict[str, int], options: dict[str, object]) -> None:
    requests = mixed_requests(25)
    model = StandIn()
    model.poisoned = {33}
    expected = answers(make(ForcedModes(**forced), model, **options), requests)
    assert {found[5][0] for found in expected.values()} == {"stop", "length", "error"}
    engine = make(ForcedModes(overlap=True, **forced), model, **options)
    watched = Watched(engine)
    found = answers(engine, requests)
    assert found == expected
    assert watched.ahead > 50, "steps were launched on tokens that only the device knew"
    if forced.get("retract_every") or "max_total_tokens" in options:
        assert engine.status().preemptions > 0


@pytest.mark.usefixtures("plain_attention")
def test_a_sequence_that_ended_has_one_more_token_computed_and_dropped() -> None:
    engine = make(ForcedModes(overlap=True))
    prompt = [20, 21, 22]
    free = continuation(prompt, 9, stops=False)
    sampling = SamplingParams(temperature=0.0, ignore_eos=True, stop_token_ids=(free[4],))
    engine.submit(Request(id="a", prompt=tuple(prompt), sampling=sampling))
    events: list[TokenEvent] = []
    while not events or events[-1].finish_reason is None:
        events += engine.step()
    assert engine.has_work(), "a step is in flight"
    assert engine.status().pages_free == engine.status().pages_total, "its pages are free already"
    steps = engine.status().steps
    assert engine.step() == [] and not engine.has_work() and engine.status().steps == steps
    tokens = [token for event in events for token in event.tokens]
    assert tokens == free[: free.index(free[4]) + 1]
    assert steps == len(tokens) + 1
    # One that ends by its length is not computed further.
    engine.submit(Request(id="b", prompt=(5,), sampling=SamplingParams(max_tokens=6, ignore_eos=True)))
    while engine.has_work():
        engine.step()
    assert engine.status().steps == steps + 6


@pytest.mark.usefixtures("plain_attention")
def test_cancelling_with_a_step_in_flight() -> None:
    engine = make(ForcedModes(overlap=True), max_running_requests=2)
    listed = prompts(5, seed=8)
    for index, prompt in enumerate(listed):
        sampling = SamplingParams(temperature=0.0, max_tokens=30)
        engine.submit(Request(id=str(index), prompt=tuple(prompt), sampling=sampling))
    engine.step()
    engine.cancel("0")
    engine.cancel("4")
    # The name is free at once, and what is still computed under it is not the new one's.
    sampling = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    engine.submit(Request(id="0", prompt=tuple(listed[0]), sampling=sampling))
    ended: dict[str, list[str]] = {}
    tokens: list[int] = []
    while engine.has_work():
        for event in engine.step():
            if event.finish_reason:
                ended.setdefault(event.id, []).append(event.finish_reason)
            if event.id == "0":
                tokens += event.tokens
        assert engine.check() == []
    assert sorted(ended["0"]) == ["abort", "length"] and ended["4"] == ["abort"]
    assert tokens == continuation(listed[0], 5, stops=False)


@pytest.mark.usefixtures("plain_attention")
def test_what_keeps_steps_apart(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lowbit")
    assert make(ForcedModes(overlap=True))._overlaps
    assert not make(ForcedModes())._overlaps, "a CPU computes while it launches"
    assert not make(ForcedModes(overlap=True), disable_overlap_schedule=True)._overlaps
    assert not caplog.text
    assert not make(ForcedModes(overlap=True), speculative_algorithm="NGRAM")._overlaps
    assert "drafts continue tokens" in caplog.text
    model = StandIn()
    model.spans_tokens = True
    assert not make(ForcedModes(overlap=True), model)._overlaps
    assert "share scales between tokens" in caplog.text


@pytest.mark.usefixtures("plain_attention")
def test_drafts_with_tokens_chosen_on_the_device() -> None:
    """All rows are chosen from at once, those behind wrong drafts for nothing."""
    draw = random.Random(3)
    requests = mixed_requests(6)
    for index, prompt in enumerate(prompts(6, seed=4, longest=30)):
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=60,
            ignore_eos=True,
            logprobs=index,
            frequency_penalty=draw.choice((0.0, 0.5)),
        )
        requests.append(Request(id=f"copies {index}", prompt=tuple(prompt), sampling=sampling))
    expected = answers(make(ForcedModes(), StandIn(next_copied)), requests)
    engine = make(ForcedModes(on_device=True), StandIn(next_copied), speculative_algorithm="NGRAM")
    assert answers(engine, requests) == expected
    assert engine.status().accepted_draft_tokens > 0


def test_a_real_model(tmp_path: Path) -> None:
    """Bit for bit the logits of steps in order, so the same tokens, captured steps included."""
    tiny.write_folder(tmp_path)
    model = load_model(open_checkpoint(str(tmp_path)), device="cpu", dtype="bfloat16")
    draw = random.Random(2)
    requests = []
    for index in range(6):
        prompt = tuple(draw.randrange(model.vocab_size) for _ in range(draw.randint(1, 40)))
        sampling = SamplingParams(
            temperature=index % 2 * 0.8, max_tokens=12, seed=index, logprobs=2, ignore_eos=True
        )
        requests.append(Request(id=str(index), prompt=prompt, sampling=sampling))
    found = []
    for overlap in (False, True):
        settings = Settings(device="cpu", max_total_tokens=512)
        forced = ForcedModes(overlap=overlap)
        engine = Engine(model, ByteTokenizer(), settings, forced=forced)
        found.append(answers(engine, requests))
        assert native.library() is None or engine.status().captured_steps > 5
    assert found[0] == found[1]
