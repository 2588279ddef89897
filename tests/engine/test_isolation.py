"""What is wrong with one request is that request's alone: its numbers, its text, its pages."""

from __future__ import annotations

import math

import pytest
from torch import Tensor

from engine.stand_in import StandIn, continuation
from engine.test_engine import make_engine, make_request, mode, plain_attention, run, tokens_of
from lowbit.engine.engine import ForcedModes
from lowbit.engine.sequence import Sequence
from lowbit.errors import LowbitError
from lowbit.kernels.attention import LayerCache
from lowbit.kernels.forward_batch import ForwardBatch

__all__ = ["mode", "plain_attention"]  # fixtures of every test here, too

WRONG = [
    ("temperature", math.nan, "temperature must be finite and 0 or more, got nan"),
    ("temperature", -1.0, "temperature must be finite and 0 or more, got -1.0"),
    ("top_p", 1.5, "top_p must be finite and between 0 and 1, got 1.5"),
    ("min_p", -0.5, "min_p must be"),
    ("repetition_penalty", 0.0, "repetition_penalty must be"),
    ("presence_penalty", math.inf, "presence_penalty must be"),
    ("logprobs", -1, "logprobs must be"),
    ("min_tokens", -1, "min_tokens must be"),
    ("logit_bias", {64: 1.0}, "logit_bias: token id 64 is outside the vocabulary of 64"),
    ("logit_bias", {-1: 1.0}, "logit_bias: token id -1 is outside"),
    ("logit_bias", {5: math.nan}, r"logit_bias of token 5 must be between -1e\+09 and 1e\+09, got nan"),
    ("logit_bias", {5: -1e39}, "logit_bias of token 5 must be between"),  # infinite as float32
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG, ids=[f"{w[0]} {w[1]}" for w in WRONG])
def test_numbers_that_no_sampler_can_follow_are_refused(name: str, value: object, message: str) -> None:
    engine = make_engine()
    with pytest.raises(LowbitError, match=message):
        engine.submit(make_request([5, 6], **{name: value}))
    assert not engine.has_work()


@pytest.mark.parametrize("temperature", [1e-45, 1e-39])
def test_a_temperature_next_to_nothing_is_greedy(temperature: float) -> None:
    """Logits over it are infinite as float32, and their softmax is NaN."""
    engine = make_engine()
    (events,) = run(engine, make_request([5, 6], 6, temperature=temperature, seed=3))
    assert tokens_of(events) == continuation([5, 6], 6)


def test_a_stop_string_by_itself_is_one() -> None:
    engine = make_engine()
    free = "".join(chr(48 + token) for token in continuation([20, 21, 22], 20, stops=False))
    options = {"stop": free[3:6], "skip_special_tokens": False, "ignore_eos": True}
    (events,) = run(engine, make_request([20, 21, 22], 20, **options))
    assert "".join(event.text for event in events) == free[:3] and events[-1].matched_stop == free[3:6]


@pytest.mark.parametrize("what", ["text", "token"])
def test_a_token_that_fails_ends_its_own_request(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    requests = [make_request([10 + n, 11], 8, id=str(n), ignore_eos=True) for n in range(3)]
    for request in requests:
        engine.submit(request)
    sequence: Sequence = engine._sequences["1"]
    if what == "text":
        failing, add = sequence.detokenizer, sequence.detokenizer.add

        def fails(tokens: list[int], *, stops: bool) -> tuple[str, str | None]:
            if sequence.output_length == 4:
                raise ValueError("no such piece")
            return add(tokens, stops=stops)

        monkeypatch.setattr(failing, "add", fails)
    else:
        sequence.stop_ids = None  # type: ignore[assignment]
    tokens: dict[str, list[int]] = {"0": [], "1": [], "2": []}
    ends = {}
    while engine.has_work():
        for event in engine.step():
            tokens[event.id] += event.tokens
            if event.finish_reason:
                ends[event.id] = event
                assert event.completion_tokens == len(tokens[event.id])
        assert engine.check() == []
    assert ends["1"].finish_reason == "error" and ends["1"].error_code == "internal"
    assert "request stopped, others unaffected" in ends["1"].error
    for name in ("0", "2"):
        expected = continuation([10 + int(name), 11], 8, stops=False)
        assert ends[name].finish_reason == "length" and tokens[name] == expected


class Flickering(StandIn):
    """NaN in every row while ``broken``: a fault of the moment."""

    broken = False

    def forward(self, batch: ForwardBatch, caches: list[LayerCache]) -> Tensor:
        logits = super().forward(batch, caches)
        return logits * math.nan if self.broken else logits


def test_pages_of_a_prompt_that_came_to_nan_are_not_shared() -> None:
    """Nor those of its earlier chunks, which nobody has seen the logits of."""
    model = Flickering()
    engine = make_engine(ForcedModes(chunk=16), model=model)
    prompt, other = list(range(4, 60)), list(range(59, 3, -1))
    (kept,) = run(engine, make_request(other, 4))
    model.broken = True
    (failed,) = run(engine, make_request(prompt, 4))
    model.broken = False
    assert failed[-1].error_code == "model_numerical_error"
    again, beside = run(engine, make_request(prompt, 4), make_request(other, 4))
    assert again[0].cached_tokens == 0 and tokens_of(again) == continuation(prompt, 4)
    assert beside[0].cached_tokens == 48 and tokens_of(beside) == tokens_of(kept)
    engine.flush_cache()
    assert engine.status().pages_free == engine.status().pages_total


def test_pages_that_are_forgotten_stay_with_who_holds_them() -> None:
    engine = make_engine()
    prompt = list(range(4, 60))
    engine.submit(make_request(prompt, 20, id="goes on", ignore_eos=True))
    engine.step()
    engine.step()
    engine._scheduler.tree.forget("", prompt)
    assert engine.check() == []
    tokens = []
    while engine.has_work():
        tokens += [token for event in engine.step() for token in event.tokens]
        assert engine.check() == []
    assert tokens == continuation(prompt, 20, stops=False)[-len(tokens) :] and len(tokens) >= 18


@pytest.mark.parametrize("length", [5, 40])
def test_salts_that_nothing_is_cached_under_take_no_memory(length: int) -> None:
    engine = make_engine(max_total_tokens=160)
    roots = engine._scheduler.tree._roots
    for number in range(20):
        run(engine, make_request([4 + number] * length, 2, cache_salt=str(number)))
    assert len(roots) <= 5
    engine.flush_cache()
    assert not roots and engine._scheduler.tree._roots is roots, "all are gone through for each that goes"


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_before_min_tokens_is_text_like_any_other(include: bool) -> None:
    engine = make_engine()
    prompt = [20, 21, 22]
    free = continuation(prompt, 30, stops=False)
    letters = "".join(chr(48 + token) for token in free)
    early, late = letters[2:4], letters[20:22]
    assert early not in letters[3:22] and late not in letters[:20]
    options = {"stop": (early, late), "include_stop_str_in_output": include, "skip_special_tokens": False}
    (events,) = run(engine, make_request(prompt, 30, ignore_eos=True, min_tokens=10, **options))
    shown = "".join(event.text for event in events)
    assert shown == letters[: 22 if include else 20] and events[-1].matched_stop == late
