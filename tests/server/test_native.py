"""POST /generate in SGLang's names and shapes, over the fake engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from server.fake_text import BOS, answer
from server.harness import ServerThread, http, serving

PROMPT = [BOS, *b"abc"]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    with serving() as running:
        yield running


def generate(server: ServerThread, **body: Any) -> Any:
    response = http.post(server.url + "/generate", json=body, timeout=10)
    assert response.status_code == 200, response.text
    return response.json()


def refused(server: ServerThread, **body: Any) -> tuple[str, str]:
    response = http.post(server.url + "/generate", json=body, timeout=10)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    return error["code"], error["message"]


def streamed(server: ServerThread, **body: Any) -> list[Any]:
    response = http.post(server.url + "/generate", json={**body, "stream": True}, timeout=10)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, end = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert end == "[DONE]"
    return [json.loads(event) for event in events]


def test_one_prompt(server: ServerThread) -> None:
    asked = {"max_new_tokens": 5, "temperature": 0}
    got = generate(server, text="abcdefgh", sampling_params=asked, rid="mine")
    text = answer([BOS, *b"abcdefgh"], 5)
    assert (got["text"], got["output_ids"]) == (text, [ord(letter) for letter in text])
    meta = got["meta_info"]
    assert meta.pop("e2e_latency") > 0
    assert meta == {
        "id": "mine",
        "finish_reason": {"type": "length", "length": 5},
        "prompt_tokens": 9,
        "completion_tokens": 5,
        "cached_tokens": 2,
    }
    server.assert_idle()


def test_ids_and_stop(server: ServerThread) -> None:
    text = answer([1, 2, 3], 20)
    got = generate(server, input_ids=[1, 2, 3], sampling_params={"stop": text[4:6]})
    assert got["text"] == text[:4]
    assert got["meta_info"]["finish_reason"] == {"type": "stop", "matched": text[4:6]}


def test_seed_has_its_own_name(server: ServerThread) -> None:
    got = generate(server, text="abc", sampling_params={"max_new_tokens": 5, "sampling_seed": 3})
    assert got["text"] == answer(PROMPT, 5, 3)


def test_without_a_length_128_tokens_or_what_fits(server: ServerThread) -> None:
    assert generate(server, text="abc")["meta_info"]["completion_tokens"] == 128
    got = generate(server, input_ids=[5] * 600)  # of a pool of 640
    assert got["meta_info"]["completion_tokens"] == 40
    got = generate(server, text="abc", sampling_params={"min_new_tokens": 200})
    assert got["meta_info"]["completion_tokens"] == 200


def test_several_prompts_and_choices(server: ServerThread) -> None:
    got = generate(server, text=["abc"], sampling_params={"max_new_tokens": 3})
    assert [each["text"] for each in got] == [answer(PROMPT, 3)]
    each = [
        {"max_new_tokens": 2, "n": 2, "sampling_seed": 1},
        {"max_new_tokens": 4, "n": 2, "sampling_seed": 8},
    ]
    got = generate(server, input_ids=[[1], [2, 3]], sampling_params=each, rid=["a", "b"])
    wanted = [([1], 2, 1), ([1], 2, 2), ([2, 3], 4, 8), ([2, 3], 4, 9)]
    assert [one["text"] for one in got] == [answer(*one) for one in wanted]
    assert [one["meta_info"]["id"] for one in got] == ["a", "a", "b", "b"]


def test_log_probabilities(server: ServerThread) -> None:
    asked = {"text": "abc", "sampling_params": {"max_new_tokens": 2}, "return_logprob": True}
    meta = generate(server, **asked)["meta_info"]
    first, second = (ord(letter) for letter in answer(PROMPT, 2))
    assert meta["output_token_logprobs"] == [[-0.25, first, None], [-0.25, second, None]]
    assert meta["input_token_logprobs"] == [] and "output_top_logprobs" not in meta
    more = {"logprob_start_len": 0, "top_logprobs_num": 1, "return_text_in_logprobs": True}
    meta = generate(server, **asked, **more)["meta_info"]
    assert meta["input_token_logprobs"][0] == [None, BOS, "<bos>"]
    assert [entry[1:] for entry in meta["input_token_logprobs"][1:]] == [[97, "a"], [98, "b"], [99, "c"]]
    assert meta["input_top_logprobs"][0] is None and len(meta["input_top_logprobs"]) == 4
    assert meta["output_top_logprobs"][0] == [[-0.25, first, chr(first)]]
    meta = generate(server, **asked, logprob_start_len=2)["meta_info"]
    assert [entry[1] for entry in meta["input_token_logprobs"]] == [98, 99]


def test_logprobs_of_each_prompt(server: ServerThread) -> None:
    wishes: dict[str, Any] = {"logprob_start_len": [-1, 2, 0.0], "top_logprobs_num": [0, 1, 0]}
    asked = {"text": ["ab", "cd", "ef"], "sampling_params": {"max_new_tokens": 1, "n": 2}, **wishes}
    metas = [one["meta_info"] for one in generate(server, **asked, return_logprob=[False, True, True])]
    assert metas[0].keys() == metas[1].keys() and "output_token_logprobs" not in metas[0]
    assert [entry[1] for entry in metas[2]["input_token_logprobs"]] == [100]
    assert len(metas[3]["output_top_logprobs"]) == 1
    assert [entry[1] for entry in metas[4]["input_token_logprobs"]] == [BOS, 101, 102]
    assert "output_top_logprobs" not in metas[5]
    for wrong, told in (
        ({"logprob_start_len": [0]}, "logprob_start_len is a list of 1 for 3 prompts; give one, or one each"),
        (
            {"top_logprobs_num": [0, 21, 0]},
            "top_logprobs_num must be a whole number between 0 and 20; got 21",
        ),
        ({"return_logprob": [True]}, "return_logprob is a list of 1 for 3 prompts; give one, or one each"),
    ):
        assert refused(server, **{**asked, **wrong})[1] == told


def test_stream_holds_all_the_text_so_far(server: ServerThread) -> None:
    events = streamed(server, text="abc", sampling_params={"max_new_tokens": 9})
    texts = [event["text"] for event in events]
    assert texts[-1] == answer(PROMPT, 9)
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    reasons = [event["meta_info"]["finish_reason"] for event in events]
    assert reasons[-1] == {"type": "length", "length": 9} and set(map(str, reasons[:-1])) == {"None"}
    assert len(events[-1]["output_ids"]) == 9 and "index" not in events[-1]


def test_stream_of_several(server: ServerThread) -> None:
    last = {event["index"]: event for event in streamed(server, text=["abc", "xy"])}
    assert [last[index]["text"] for index in (0, 1)] == [answer(PROMPT, 128), answer([BOS, *b"xy"], 128)]


def test_stream_of_what_is_new() -> None:
    with serving(incremental_streaming_output=True) as server:
        events = streamed(server, text="abc", sampling_params={"max_new_tokens": 9})
        whole = generate(server, text="abc", sampling_params={"max_new_tokens": 9})
    assert "".join(event["text"] for event in events) == whole["text"] == answer(PROMPT, 9)
    assert [token for event in events for token in event["output_ids"]] == whole["output_ids"]


@pytest.mark.parametrize(
    "body,code,told",
    [
        ({}, "invalid_request", "give either 'text' or 'input_ids'"),
        ({"text": "a", "input_ids": [1]}, "invalid_request", "give either 'text' or 'input_ids'"),
        ({"text": []}, "empty_prompt", "text is an empty list"),
        ({"input_ids": [9999]}, "invalid_token_id", "input_ids: 9999 is no token id; ids are 0 to 257"),
        ({"text": "a", "max_tokens": 3}, "unknown_field", "unknown field 'max_tokens'"),
        (
            {"text": "a", "sampling_params": {"max_tokens": 3}},
            "unknown_field",
            "unknown field 'max_tokens'; did you mean 'max_new_tokens'?",
        ),
        ({"text": "a", "sampling_params": {"regex": "a"}}, "unsupported_field", "'regex' cannot be honoured"),
        ({"text": "a", "image_data": "x"}, "unsupported_field", "'image_data' cannot be honoured"),
        (
            {"text": "a", "sampling_params": {"max_new_tokens": -1}},
            "invalid_number",
            "max_new_tokens must be a whole number between 0",
        ),
        (
            {"text": "a", "sampling_params": {"max_new_tokens": 2000}},
            "prompt_too_long",
            "prompt is 2 tokens and max_new_tokens 2 000: 2 002 > context 1 000; lower max_new_tokens to 998",
        ),
        ({"text": ["a", "b"], "sampling_params": [{}]}, "invalid_request", "a list of 1 for 2 prompts"),
        ({"text": ["a", "b"], "sampling_params": [{"n": 2}, {}]}, "invalid_request", "n must be the same"),
    ],
)
def test_refusals(server: ServerThread, body: dict[str, Any], code: str, told: str) -> None:
    got = refused(server, **body)
    assert got[0] == code and told in got[1]
    server.assert_idle()
