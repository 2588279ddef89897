"""Several decode steps in one call: the same answers, pages and counters as a step at a time."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from safetensors.numpy import load_file, save_file

from checkpoint import tiny
from engine.stand_in import ByteTokenizer, StandIn
from engine.test_choices import some_sampling
from engine.test_overlap import answers
from lowbit.checkpoint import open_checkpoint
from lowbit.engine import continuous_decode, sampler
from lowbit.engine.engine import Engine, ForcedModes
from lowbit.engine.messages import Request, SamplingParams, TokenEvent
from lowbit.engine.sequence import Sequence
from lowbit.kernels import native
from lowbit.loading import load_model
from lowbit.models.model import Model
from lowbit.settings import Settings

BROKEN = 33  # a token whose embedding is NaN

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native library: nothing is captured")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """torch alone, as beside native kernels."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write_folder(folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][BROKEN] = float("nan")
    save_file(tensors, file)
    return load_model(open_checkpoint(str(folder)), device="cpu", dtype="float32")


def make(model: Model, forced: ForcedModes | None = None, **options: object) -> Engine:
    settings = Settings(**{"device": "cpu", "max_total_tokens": 640, "max_running_requests": 8, **options})
    return Engine(model, ByteTokenizer(), settings, forced=forced or ForcedModes(check=True))


def mixed_requests(count: int) -> list[Request]:
    """Every way to sample and to end, most of them such as can go on by themselves."""
    draw = random.Random(5)
    requests = []
    for index in range(count):
        prompt = tuple(
            draw.choice([t for t in range(4, 40) if t != BROKEN]) for _ in range(draw.randint(1, 40))
        )
        options = some_sampling(draw) if index % 3 == 0 else {"temperature": draw.choice((0.0, 0.9))}
        bias = {token % 40: value for token, value in options.pop("logit_bias", {}).items()}  # type: ignore[attr-defined]
        options |= {
            "logit_bias": bias,
            "seed": index,
            "max_tokens": draw.choice((1, 2, 25)),
            "ignore_eos": draw.random() < 0.5,
            "stop": draw.choice(((), (), ("a",), ("bc", "S"))),
            "stop_token_ids": draw.choice(((), (), (9, 30))),
        }
        requests.append(Request(id=f"r{index}", prompt=prompt, sampling=SamplingParams(**options)))
    return requests


@pytest.mark.parametrize(
    ("forced", "options"),
    [
        ({}, {}),
        ({"retract_every": 2, "evict_always": True}, {"disable_radix_cache": True}),
        ({"chunk": 5}, {"max_total_tokens": 128}),
        ({}, {"max_running_requests": 2, "schedule_policy": "lpm"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [2, 8, None])
def test_answers_are_the_same(
    model: Model, steps: int | None, forced: dict[str, int], options: dict[str, object]
) -> None:
    requests = mixed_requests(30)
    expected_of = make(model, ForcedModes(check=True, **forced), num_continuous_decode_steps=1, **options)
    expected = answers(expected_of, requests)
    assert {found[5][0] for found in expected.values()} == {"stop", "length", "error"}
    engine = make(model, ForcedModes(check=True, **forced), num_continuous_decode_steps=steps, **options)
    together = count_together(engine)
    assert answers(engine, requests) == expected
    assert max(together) > 1, "steps were taken in one call"
    status, before = engine.status(), expected_of.status()
    assert status.generated_tokens == before.generated_tokens
    assert status.draft_tokens == status.accepted_draft_tokens == 0, "nobody guessed"
    assert status.captured_steps <= status.steps


def count_together(engine: Engine) -> list[int]:
    """How many steps each call took."""
    together = [0]
    decode = engine._runner.decode

    def watched(*given: object, **options: object) -> object:
        found = decode(*given, **options)  # type: ignore[arg-type]
        if found is not None:
            together.append(len(found[0].tokens))
        return found

    engine._runner.decode = watched  # type: ignore[assignment, method-assign]
    return together


def run(engine: Engine, *requests: Request) -> list[list[TokenEvent]]:
    """The events of each step."""
    for request in requests:
        engine.submit(request)
    listed = []
    while engine.has_work():
        listed.append(engine.step())
        for sequence in engine._scheduler.running:
            assert len(sequence.pages) == -(-sequence.computed // engine.settings.page_size)
    return listed


def asked(name: str, **options: object) -> Request:
    sampling = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **options})
    return Request(id=name, prompt=(5, 6, 7, 8), sampling=sampling)


def test_a_stop_token_ends_the_call(model: Model) -> None:
    """No step is computed in vain, and who goes on does so from there."""
    engine = make(model, num_continuous_decode_steps=8)
    free = [
        token for events in run(engine, asked("free", max_tokens=24)) for e in events for token in e.tokens
    ]
    place = next(place for place in range(3, 20) if free.index(free[place]) == place)
    steps = engine.status().steps
    events = run(engine, asked("stops", stop_token_ids=(free[place],)))
    assert [token for listed in events for e in listed for token in e.tokens] == free[: place + 1]
    assert events[-1][-1].finish_reason == "stop" and events[-1][-1].matched_stop == free[place]
    assert engine.status().steps == steps + place + 1


def test_a_stop_string_in_the_middle_ends_the_sequence_there(model: Model) -> None:
    engine = make(model, num_continuous_decode_steps=8)
    free = run(engine, asked("free", max_tokens=20))
    text = "".join(event.text for listed in free for event in listed)
    stop = next(text[place] for place in range(3, 15) if text.index(text[place]) == place)
    found = run(engine, asked("stops", max_tokens=20, stop=(stop,)))
    assert "".join(event.text for listed in found for event in listed) == text[: text.index(stop)]
    assert found[-1][-1].finish_reason == "stop" and found[-1][-1].matched_stop == stop
    status = engine.status()
    assert status.pages_free + status.pages_cached == status.pages_total


def test_no_page_is_taken_from_anybody_for_it(model: Model) -> None:
    """Where pages are few, steps are few."""
    engine = make(model, max_total_tokens=48, num_continuous_decode_steps=64)
    together = count_together(engine)
    lengths = [sum(len(e.tokens) for e in listed) for listed in run(engine, asked("a", max_tokens=44))]
    assert sum(lengths) == 44 and engine.status().preemptions == 0
    assert max(together) == max(lengths) > 16


def test_what_needs_a_look_takes_a_step_at_a_time(model: Model) -> None:
    for options in (
        {"logprobs": 1},
        {"temperature": 1.0, "logprobs": 0},
    ):
        engine = make(model, num_continuous_decode_steps=8)
        together = count_together(engine)
        events = run(engine, asked("a", max_tokens=12, **options))
        assert all(len(event.tokens) <= 1 for listed in events for event in listed), options
        assert together == [0]
    engine = make(model, num_continuous_decode_steps=8)
    events = run(engine, asked("a", max_tokens=30, min_tokens=6, ignore_eos=False))
    lengths = [len(event.tokens) for listed in events for event in listed]
    assert lengths[:6] == [1] * 6, "a stop token may not be chosen yet"


def test_the_number_follows_the_time_a_step_takes(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(model)
    together = count_together(engine)
    run(engine, asked("a", max_tokens=60))
    assert together[1] == 2 and max(together) == continuous_decode.MOST
    monkeypatch.setattr(continuous_decode, "SECONDS", 0.0)
    engine = make(model)
    together = count_together(engine)
    run(engine, asked("a", max_tokens=60))
    assert together == [0, 2], "slow steps are taken one at a time"


def test_what_fails_for_one_sequence_is_its_own(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn with others, in a step or in several."""
    changes = sampler._changes

    def failing(sequence: Sequence, *rest: int) -> object:
        if sequence.id == "bad" and sequence.output_length >= 4:
            raise RuntimeError("no such changes")
        return changes(sequence, *rest)

    monkeypatch.setattr(sampler, "_changes", failing)
    for steps in (1, 8):
        engine = make(model, num_continuous_decode_steps=steps)
        bias = {BROKEN: -100.0}
        requests = [asked(name, max_tokens=20, logit_bias=bias) for name in ("good", "bad")]
        last = {event.id: event for listed in run(engine, *requests) for event in listed}
        assert (last["good"].finish_reason, last["bad"].finish_reason) == ("length", "error")
        assert last["bad"].error_code == "internal" and last["bad"].completion_tokens >= 4


def test_where_it_is_off(model: Model) -> None:
    assert make(model)._launcher._continuous is not None
    assert make(model, num_continuous_decode_steps=1)._launcher._continuous is None
    assert make(model, disable_cuda_graph=True)._launcher._continuous is None
    assert make(model, speculative_algorithm="NGRAM")._launcher._continuous is None
    assert make(model, ForcedModes(on_device=True))._launcher._continuous is None
    scaled = StandIn()
    scaled.spans_tokens = True
    assert make(scaled)._launcher._continuous is None  # type: ignore[arg-type]
