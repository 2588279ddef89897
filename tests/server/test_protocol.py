"""What requests may say: every bound, its message and the field it names."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lowbit.engine.messages import EngineReady, SamplingParams, TokenEvent
from lowbit.server import protocol
from lowbit.server.api_error import ApiError, from_event, to_api_error
from lowbit.server.chat import template_messages
from lowbit.server.completions import encode_prompt
from lowbit.server.generation import Generation, check_fit
from lowbit.server.protocol import ChatRequest, CompletionRequest, GenerateRequest, NativeSampling, read
from lowbit.server.request_values import (
    logit_biases,
    prompts,
    sampling_params,
    seed_of_choice,
    stop_strings,
    tool_list,
)
from lowbit.server.strict_json import parse
from server.fake_text import ByteTokenizer

HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> ChatRequest:
    return read(parse(json.dumps({"messages": HELLO, **fields}).encode()), ChatRequest)


def completion(**fields: Any) -> CompletionRequest:
    return read(parse(json.dumps({"prompt": "x", **fields}).encode()), CompletionRequest)


def refusal(call: Any, *arguments: Any, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call(*arguments, **fields)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('"temperature": NaN', "temperature must be a finite number between 0 and 2; got NaN"),
        ('"temperature": -Infinity', "temperature must be a finite number between 0 and 2; got -Infinity"),
        ('"temperature": 2.5', "temperature must be a finite number between 0 and 2; got 2.5"),
        ('"temperature": true', "temperature must be a finite number between 0 and 2; got true"),
        ('"temperature": "hot"', 'temperature must be a finite number between 0 and 2; got "hot"'),
        ('"top_p": -0.1', "top_p must be a finite number between 0 and 1; got -0.1"),
        ('"min_p": 1.5', "min_p must be a finite number between 0 and 1; got 1.5"),
        ('"top_k": -2', "top_k must be a whole number between -1 and 2 147 483 647; got -2"),
        ('"repetition_penalty": 0', "repetition_penalty must be a finite number between 0.01 and 10; got 0"),
        ('"presence_penalty": 3', "presence_penalty must be a finite number between -2 and 2; got 3"),
        ('"frequency_penalty": -3', "frequency_penalty must be a finite number between -2 and 2; got -3"),
        ('"n": 129', "n must be a whole number between 1 and 128; got 129"),
        ('"n": 1.5', "n must be a whole number between 1 and 128; got 1.5"),
        ('"max_tokens": 0', "max_tokens must be a whole number between 1 and 2 147 483 647; got 0"),
        ('"top_logprobs": 21', "top_logprobs must be a whole number between 0 and 20; got 21"),
        (
            '"seed": 9223372036854775808',
            "seed must be a whole number between -9 223 372 036 854 775 808 and 9 223 372 036 854 775 807; "
            "got 9223372036854775808",
        ),
        ('"logit_bias": {"1": NaN}', "the body contains NaN, which is not JSON"),
        ('"user": NaN', "the body contains NaN, which is not JSON"),
    ],
)
def test_numbers(body: str, message: str) -> None:
    error = refusal(read, parse(f'{{"messages": [], {body}}}'.encode()), ChatRequest)
    assert (error.code, error.message) == ("invalid_number", message)
    assert error.param == (body.split('"')[1] if "must be" in message else None)


def test_whole_floats_count_as_integers() -> None:
    assert chat(max_tokens=16.0, seed=3.0).max_tokens == 16
    assert completion(logprobs=2, max_tokens=0).max_tokens == 0


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"max_token": 5}, "unknown field 'max_token'; did you mean 'max_tokens'?", "max_token"),
        ({"temprature": 5}, "unknown field 'temprature'; did you mean 'temperature'?", "temprature"),
        ({"qqqqqq": 5}, "unknown field 'qqqqqq'", "qqqqqq"),
        ({"a\nb": 5}, "unknown field 'a\\nb'", "a\nb"),
        (
            {"stream_options": {"include_usag": True}},
            "unknown field 'stream_options.include_usag'; did you mean 'include_usage'?",
            "stream_options.include_usag",
        ),
    ],
)
def test_unknown_fields(fields: dict[str, Any], message: str, param: str) -> None:
    error = refusal(chat, **fields)
    assert (error.code, error.message, error.param) == ("unknown_field", message, param)


def test_ignored_and_harmless_fields() -> None:
    fields: dict[str, Any] = dict.fromkeys(protocol.IGNORED, "anything")
    for name, (harmless, _) in protocol.UNSUPPORTED.items():
        fields[name] = harmless[0] if harmless else None
    fields |= {"functions": [], "tools": None, "best_of": 1, "response_format": {"type": "text"}}
    assert chat(**fields).messages == HELLO


# What clients of SGLang 0.5.23 and vLLM 0.33 send when they write out every default that is not null.
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 2**30, "min_p": 0.0, "repetition_penalty": 1.0, "n": 1}
SAMPLING |= {"frequency_penalty": 0.0, "presence_penalty": 0.0, "ignore_eos": False, "no_stop_trim": False}
SAMPLING |= {"skip_special_tokens": True, "spaces_between_special_tokens": True}
SILENT = ("hidden_states", "routed_experts", "prompt_token_ids", "sampling_mask", "flat_raw_top_logprobs")
SILENT += ("flat_raw_output_top_logprobs", "cached_tokens_details", "spec_tokens_details", "token_ids")
SILENT += ("meta_info", "input_ids_in_sglext", "output_ids_in_sglext", "token_offsets", "weight_versions")
SILENT += ("bytes", "entropy", "indexer_topk")
OFF = {f"return_{name}": False for name in SILENT}
OFF |= {"routed_experts_start_len": 0, "routed_experts_prompt_start": 0, "use_audio_in_video": False}
OFF |= {"return_flat_raw_top_logprobs_b64": True}
CHAT_DEFAULTS = {"tool_choice": "auto", "parallel_tool_calls": True, "separate_reasoning": True}
CHAT_DEFAULTS |= {"stream_reasoning": True, "include_reasoning": True, "use_beam_search": False}
CHAT_DEFAULTS |= {"length_penalty": 1.0, "bad_words": [], "echo": False, "add_special_tokens": False}
CHAT_DEFAULTS |= {"priority": 0, "request_id": "r", "mm_payload": "tensors", "top_logprobs": 0}
NATIVE_DEFAULTS = {"background": False, "require_reasoning": False, "no_logs": False, "log_metrics": True}
# llama.cpp's
LLAMA_DEFAULTS = {"cache_prompt": True, "id_slot": -1, "n_predict": -1, "repeat_penalty": 1.0, "mirostat": 0}
LLAMA_DEFAULTS |= {"typical_p": 1.0, "dynatemp_range": 0.0, "xtc_probability": 0.0, "dry_multiplier": 0.0}
LLAMA_DEFAULTS |= {"n_probs": 0, "repeat_last_n": 64, "timings_per_token": False, "n_keep": 0}


def test_defaults_of_other_servers_ask_for_nothing() -> None:
    chat(**SAMPLING, **OFF, **CHAT_DEFAULTS, **LLAMA_DEFAULTS)
    completion(**SAMPLING, **OFF, best_of=1, length_penalty=1.0, use_beam_search=False, max_tokens=16)
    native = {"text": "x", **OFF, **NATIVE_DEFAULTS}
    del native["return_token_ids"]  # /generate always answers with ids
    read(parse(json.dumps(native).encode()), GenerateRequest)
    sampling = {**SAMPLING, "max_new_tokens": 128, "min_new_tokens": 0}
    read(parse(json.dumps(sampling).encode()), NativeSampling)


def test_best_of_as_many_as_are_asked_for_is_no_choice() -> None:
    assert completion(n=3, best_of=3).n == 3
    assert refusal(completion, n=2, best_of=3).param == refusal(completion, best_of=2).param == "best_of"


@pytest.mark.parametrize("name", sorted(protocol.UNSUPPORTED))
def test_unsupported_fields(name: str) -> None:
    error = refusal(chat, **{name: {"type": "something"}})
    assert (error.code, error.param) == ("unsupported_field", name)
    assert "cannot be honoured" in error.message


def test_every_field_has_one_place() -> None:
    honoured = {field.name for schema in (ChatRequest,) for field in protocol.msgspec.structs.fields(schema)}
    assert not honoured & protocol.IGNORED
    assert not honoured & protocol.UNSUPPORTED.keys()
    assert not protocol.IGNORED & protocol.UNSUPPORTED.keys()


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"messages": "hi"}, "messages must be array, not str", "messages"),
        ({"messages": ["hi"]}, "messages[0] must be object, not str", "messages[0]"),
        ({"stream": "yes"}, "stream must be bool, not str", "stream"),
        ({"stop": 5}, "stop must be str or array, not int", "stop"),
        ({"messages": None}, "'messages' is missing", "messages"),
        ({"logit_bias": {"1": "x"}}, "logit_bias[...] must be float, not str", "logit_bias[...]"),
    ],
)
def test_types(fields: dict[str, Any], message: str, param: str) -> None:
    error = refusal(chat, **fields)
    assert (error.message, error.param) == (message, param)


def test_body_must_be_an_object() -> None:
    assert "must be a JSON object" in refusal(read, parse(b"[1]"), ChatRequest).message


def test_null_means_not_given() -> None:
    assert chat(temperature=None, stop=None, tools=None, seed=None, stream_options=None).temperature is None


def test_stops() -> None:
    assert stop_strings("a") == ("a",)
    assert stop_strings(None) == ()
    assert stop_strings(["é" * 128] * 16) == ("é" * 128,) * 16
    assert refusal(stop_strings, ["a"] * 17).message == "17 stop strings; limit 16"
    assert refusal(stop_strings, ["é" * 129]).message == "a stop string of 258 bytes; limit 256"
    assert refusal(stop_strings, [""]).message == "a stop string is empty"
    error = refusal(sampling_params, chat(stop_token_ids=[1] * 257), {}, 300, max_tokens=1, logprobs=None)
    assert error.message == "257 stop_token_ids; limit 256"
    error = refusal(sampling_params, chat(stop_token_ids=[300]), {}, 300, max_tokens=1, logprobs=None)
    assert error.message == "stop_token_ids: 300 is no token id; ids are 0 to 299"


def test_logit_bias() -> None:
    assert logit_biases({"5": -100, "0": 1.5}, 6) == {5: -100, 0: 1.5}
    assert (
        refusal(logit_biases, {str(i): 0 for i in range(1025)}, 5000).message
        == "logit_bias has 1025 entries; limit 1024"
    )
    for key in ("6", "-1", "1.0", "x", "", "٣", "99999999999"):
        assert refusal(logit_biases, {key: 1}, 6).code == "invalid_token_id"
    assert "between -100.0 and 100.0; got 101" in refusal(logit_biases, {"1": 101}, 6).message


def test_prompt_forms() -> None:
    assert prompts("a", 10) == ["a"]
    assert prompts(["a", "b"], 10) == ["a", "b"]
    assert prompts([1, 2], 10) == [(1, 2)]
    assert prompts([[1], [2, 3]], 10) == [(1,), (2, 3)]
    assert refusal(prompts, [], 10).code == "empty_prompt"
    assert refusal(prompts, [1, 10], 10).message == "prompt: 10 is no token id; ids are 0 to 9"
    assert refusal(prompts, [[1], [-1]], 10).message == "prompt[1]: -1 is no token id; ids are 0 to 9"
    assert refusal(prompts, [1, True], 10).code == "invalid_token_id"
    for mixed in (["a", 1], [[1], "a"], ["a", [1]], [{}], [None]):
        assert refusal(prompts, mixed, 10).code == "invalid_type"
    assert refusal(prompts, ["a"] * 2049, 10).message == "2 049 prompts; limit 2 048"


def test_tools() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert tool_list(chat(tools=[tool])) == [tool]
    assert tool_list(chat(tools=[tool], tool_choice="auto")) == [tool]
    assert tool_list(chat(tools=[tool], tool_choice="none")) is None
    assert tool_list(chat()) is None
    assert refusal(tool_list, chat(tools=[tool], tool_choice="required")).message == (
        "tool_choice \"required\" cannot be honoured; use 'auto' or 'none'"
    )
    assert refusal(tool_list, chat(tools=[tool] * 129)).message == "129 tools; limit 128"
    assert refusal(tool_list, chat(tools=[{"type": "x"}])).code == "invalid_type"
    assert refusal(tool_list, chat(tools=[{"type": "function", "function": {}}])).code == "missing_field"
    deep: dict[str, Any] = {}
    for _ in range(32):
        deep = {"a": deep}
    nested = {"type": "function", "function": {"name": "f", "parameters": deep}}
    assert refusal(tool_list, chat(tools=[nested])).message == "tools[0] is nested more than 32 deep"
    wide = {"type": "function", "function": {"name": "f", "description": "x" * 65536}}
    assert "limit 65536" in refusal(tool_list, chat(tools=[wide])).message


def test_sampling_defaults_and_overrides() -> None:
    defaults = {"temperature": 0.6, "top_p": 0.9, "top_k": 20.0, "repetition_penalty": 1.1}
    params = sampling_params(chat(top_p=0.5), defaults, 100, max_tokens=7, logprobs=3)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.6, 0.5, 20, 0.0)
    assert (params.repetition_penalty, params.max_tokens, params.logprobs) == (1.1, 7, 3)
    plain = sampling_params(chat(), {}, 100, max_tokens=None, logprobs=None)
    assert (plain.temperature, plain.top_p, plain.top_k, plain.max_tokens) == (1.0, 1.0, 0, None)
    assert sampling_params(chat(top_k=-1), defaults, 100, max_tokens=None, logprobs=None).top_k == 0
    assert (
        sampling_params(chat(temperature=0), defaults, 100, max_tokens=None, logprobs=None).temperature == 0
    )
    assert 0 < sampling_params(chat(top_p=0), {}, 100, max_tokens=None, logprobs=None).top_p < 1e-5
    assert sampling_params(
        chat(no_stop_trim=True), {}, 100, max_tokens=1, logprobs=None
    ).include_stop_str_in_output
    error = refusal(sampling_params, chat(min_tokens=9), {}, 100, max_tokens=8, logprobs=None)
    assert error.message == "min_tokens 9 is more than max_tokens 8"


def test_seeds_of_choices() -> None:
    assert seed_of_choice(None, 3) is None
    assert seed_of_choice(5, 0) == 5
    assert seed_of_choice(5, 2) == 7
    assert seed_of_choice(2**63 - 1, 1) == -(2**63)


READY = EngineReady(
    model_name="m", context_length=8192, pool_tokens=16384, page_size=16, vocab_size=9, max_running=4
)
SMALL_POOL = EngineReady(
    model_name="m", context_length=99999, pool_tokens=8192, page_size=16, vocab_size=9, max_running=4
)


def test_what_cannot_finish_is_refused() -> None:
    check_fit(READY, 8191, 1, "prompt")
    check_fit(READY, 8191, None, "prompt")
    error = refusal(check_fit, READY, 9120, 512, "messages")
    assert (error.code, error.param) == ("prompt_too_long", "messages")
    assert error.message == (
        "prompt is 9 120 tokens and max_tokens 512: 9 632 > context 8 192; shorten the prompt by 1 440 tokens"
    )
    error = refusal(check_fit, READY, 8000, 512, "messages")
    assert error.message == (
        "prompt is 8 000 tokens and max_tokens 512: 8 512 > context 8 192; "
        "lower max_tokens to 192 or shorten the prompt by 320 tokens"
    )
    error = refusal(check_fit, READY, 37, 10_000, "messages")
    assert error.message == (
        "prompt is 37 tokens and max_tokens 10 000: 10 037 > context 8 192; lower max_tokens to 8 155"
    )
    error = refusal(check_fit, READY, 8192, None, "messages")
    assert error.message == (
        "prompt is 8 192 tokens and at least 1 more: 8 193 > context 8 192; shorten the prompt by 1 token"
    )
    check_fit(SMALL_POOL, 8000, 192, "prompt")
    error = refusal(check_fit, SMALL_POOL, 5440, 4192, "prompt")
    assert error.code == "never_fits"
    assert error.message == (
        "this request needs 602 KV blocks, the server has 512; lower max_tokens to 2 752 "
        "or restart with a larger --max-total-tokens or --mem-fraction-static"
    )
    assert "shorten the prompt" in refusal(check_fit, SMALL_POOL, 8192, 1, "prompt").message
    assert refusal(check_fit, READY, 0, 1, "prompt").code == "empty_prompt"


def test_messages() -> None:
    given = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "provider_specific_fields": {"matched_stop": None},
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
            ],
        },
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]
    assert template_messages(given, knows_developer=True)[0]["role"] == "developer"
    prepared = template_messages(given)
    assert [message["role"] for message in prepared] == ["system", "user", "assistant", "tool"]
    assert prepared[1]["content"] == given[1]["content"]
    assert prepared[2]["content"] == ""
    assert prepared[2]["tool_calls"] == given[2]["tool_calls"]
    assert prepared[3] == {"role": "tool", "content": "2", "tool_call_id": "1"}


def test_an_empty_list_of_calls_is_none() -> None:
    """Clients send back what vLLM answered; templates ask whether there is one."""
    (prepared,) = template_messages([{"role": "assistant", "content": "x", "tool_calls": []}])
    assert prepared == {"role": "assistant", "content": "x"}
    assert "is missing" in refusal(template_messages, [{"role": "assistant", "tool_calls": []}]).message


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "robot", "content": "x"}, "messages[0].role must be one of"),
        ({"content": "x"}, "got null"),
        ({"role": ["user"], "content": "x"}, 'got ["user"]'),
        ({"role": "user"}, "'messages[0].content' is missing"),
        ({"role": "user", "content": "x", "contents": "y"}, "unknown field 'messages[0].contents'"),
        ({"role": "user", "content": 5}, "messages[0].content must be a string or a list of parts"),
        ({"role": "user", "content": ["x"]}, "messages[0].content[0] is of type null"),
        (
            {"role": "user", "content": [{"type": "image_url"}]},
            'is of type "image_url"; this model reads text',
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "'messages[0].content[0].text' is missing"),
        ({"role": "user", "content": "x", "name": 5}, "messages[0].name must be a string"),
        ({"role": "assistant", "tool_calls": "x"}, "must be a list of at most 128 calls"),
        ({"role": "assistant", "tool_calls": [{}]}, "must have a 'function' with a name"),
    ],
)
def test_bad_messages(message: dict[str, Any], said: str) -> None:
    assert said in refusal(template_messages, [message]).message


def test_log_probabilities_of_prompts_are_bounded() -> None:
    """All of a request's are held until it has ended."""
    prompts = [tuple(range(1000))] * 100
    samplings = [SamplingParams(prompt_logprobs=9)] * 100
    assert len(Generation.plan("id", prompts, samplings, 1, "").requests) == 100
    error = refusal(Generation.plan, "id", prompts, samplings, 2, "")
    assert error.code == "too_many_logprobs" and "are 2 000 000; limit 1 048 576" in error.message
    assert len(Generation.plan("id", prompts, [SamplingParams()] * 100, 2, "").requests) == 200


def test_message_count() -> None:
    assert refusal(template_messages, []).code == "empty_messages"
    assert refusal(template_messages, HELLO * 2049).message == "2 049 messages; limit 2 048"


def test_raw_prompts_parse_specials_and_get_one_bos() -> None:
    tokenizer = ByteTokenizer()
    assert encode_prompt(tokenizer, "a<end>") == [256, 97, 257]
    assert encode_prompt(tokenizer, "<bos>a") == [256, 97]
    assert encode_prompt(tokenizer, "<bos><bos>a", add_special=False) == [256, 256, 97]


def test_internal_errors_say_nothing() -> None:
    error = to_api_error(KeyError("/secret/path"), "id7")
    assert (error.status, error.message) == (500, "unexpected error, id id7; see the server log")
    odd = from_event(TokenEvent(id="x", finish_reason="error", error="/secret", error_code="E9999"), "id7")
    assert (odd.status, odd.code) == (500, "internal")
    assert "secret" not in json.dumps(odd.body())
