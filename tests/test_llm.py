"""LLM: the engine inside a Python program, on the embedded model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lowbit import LLM, LowbitError, SamplingParams


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("smollm2", max_total_tokens=4096) as made:
        yield made


GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


def test_chat_knows_paris(llm: LLM) -> None:
    answer = llm.chat([{"role": "user", "content": "What is the capital of France?"}], GREEDY)
    assert "Paris" in answer.text and answer.finish_reason == "stop"
    assert answer.prompt_tokens > 10 and answer.tokens[-1] == 2


def test_generate_text_and_ids_together(llm: LLM) -> None:
    text = "The quick brown fox"
    ids = llm.tokenizer.encode(text)
    first, second = llm.generate([text, "Once upon a time"], GREEDY)
    (alone,) = llm.generate(ids, GREEDY)
    assert first.tokens == alone.tokens and first.text == alone.text == llm.tokenizer.decode(first.tokens)
    assert second.tokens != first.tokens and len(second.tokens) == 24


def test_stream_is_the_whole_and_can_be_left(llm: LLM) -> None:
    (whole,) = llm.generate("In the beginning", GREEDY)
    events = list(llm.stream("In the beginning", GREEDY))
    assert "".join(event.text for event in events) == whole.text
    for event in llm.stream("In the beginning", GREEDY):
        if event.tokens:
            break
    assert not llm._engine.has_work() and llm._engine.check() == []


def test_answers_asked_for_inside_each_other(llm: LLM) -> None:
    """The events of one loop are not lost in another's."""
    texts = ["In the beginning", "Once upon a time"]
    whole = [llm.generate(text, GREEDY)[0].text for text in texts]
    shown, inner = ["", ""], []
    for place, events in enumerate(zip(*(llm.stream(text, GREEDY) for text in texts), strict=True)):
        if place == 3:
            inner = llm.generate(texts, GREEDY)
        shown = [text + event.text for text, event in zip(shown, events, strict=True)]
    assert shown == whole == [one.text for one in inner]
    assert not llm._engine.has_work() and not llm._events


def test_logprobs_and_echo(llm: LLM) -> None:
    (scored,) = llm.generate("Hello world", SamplingParams(max_tokens=0, prompt_logprobs=1))
    assert scored.tokens == [] and scored.prompt_logprobs is not None
    assert scored.prompt_logprobs[0] is None and all(
        entry.logprob < 0 for entry in scored.prompt_logprobs[1:]
    )
    (again,) = llm.generate("Hello world", SamplingParams(max_tokens=2, temperature=0.0, logprobs=3))
    assert len(again.logprobs) == 2 and len(again.logprobs[0].top) == 3
    assert again.logprobs[0].top[0][0] == again.tokens[0]


def test_errors_are_lines(llm: LLM) -> None:
    with pytest.raises(LowbitError, match="context") as caught:
        llm.generate([[5, 6], [5] * 5000], GREEDY)
    assert caught.value.code == "prompt_too_long"
    assert not llm._engine.has_work(), "who was asked beside it goes on with nobody waiting"
    with pytest.raises(LowbitError, match="no model 'smolm'"):
        LLM("smolm")
