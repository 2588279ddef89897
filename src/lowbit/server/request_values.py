"""What the fields of a request come to: lists and maps with bounds of their own, and how to sample.

``protocol`` has read the body: types are right, numbers within their bounds. What is checked here takes the
vocabulary, or more than one field.
"""

from __future__ import annotations

import json
import re
from typing import Any

from lowbit.engine.messages import SamplingParams
from lowbit.errors import printable, thousands
from lowbit.server.api_error import bad_request
from lowbit.server.protocol import (
    ChatRequest,
    Range,
    SamplingFields,
    TokenizeRequest,
    check_number,
    shown,
)
from lowbit.server.strict_json import MAX_DEPTH, depth_exceeds
from lowbit.tokenization.generation_config import RECOMMENDED

MAX_PROMPTS = 2048
MAX_RATED = 1 << 20  # log-probabilities of prompt tokens and alternatives, some 120 bytes each
MAX_TOOLS = 128
MAX_TOOL_BYTES = 64 * 1024
MAX_TOOL_DEPTH = 32
MAX_STOPS = 16
MAX_STOP_BYTES = 256
MAX_STOP_IDS = 256
MAX_BIASES = 1024
MAX_BIAS = 100.0

assert MAX_TOOL_DEPTH < MAX_DEPTH


def stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    """``stop`` as a tuple."""
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(strings) > MAX_STOPS:
        raise bad_request("too_many_stops", f"{len(strings)} stop strings; limit {MAX_STOPS}", "stop")
    for string in strings:
        size = len(string.encode())
        if size > MAX_STOP_BYTES:
            raise bad_request(
                "stop_too_long", f"a stop string of {size} bytes; limit {MAX_STOP_BYTES}", "stop"
            )
        if not string:
            raise bad_request("invalid_request", "a stop string is empty", "stop")
    return strings


def logit_biases(biases: dict[str, float], vocab_size: int) -> dict[int, float]:
    """``logit_bias`` by token id."""
    if len(biases) > MAX_BIASES:
        raise bad_request(
            "too_many_biases", f"logit_bias has {len(biases)} entries; limit {MAX_BIASES}", "logit_bias"
        )
    result: dict[int, float] = {}
    for key, bias in biases.items():
        if not re.fullmatch(r"[0-9]{1,9}", key) or int(key) >= vocab_size:
            raise bad_request(
                "invalid_token_id",
                f"logit_bias: '{printable(key, 40)}' is no token id; ids are 0 to {vocab_size - 1}",
                "logit_bias",
            )
        check_number(f"logit_bias['{key}']", bias, Range(-MAX_BIAS, MAX_BIAS))
        result[int(key)] = bias
    return result


def token_ids(ids: list[Any], vocab_size: int, param: str) -> tuple[int, ...]:
    """Ids of a request, each within the vocabulary."""
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise bad_request(
                "invalid_token_id",
                f"{param}: {shown(token)} is no token id; ids are 0 to {vocab_size - 1}",
                param,
            )
    return tuple(ids)


def prompts(prompt: str | list[Any], vocab_size: int, param: str = "prompt") -> list[str | tuple[int, ...]]:
    """``prompt`` in its four forms: text, ids, list of texts, list of ids."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise bad_request("empty_prompt", f"{param} is an empty list", param)
    if type(prompt[0]) is int:
        return [token_ids(prompt, vocab_size, param)]
    if len(prompt) > MAX_PROMPTS:
        raise bad_request(
            "too_many_prompts", f"{thousands(len(prompt))} prompts; limit {thousands(MAX_PROMPTS)}", param
        )
    result: list[str | tuple[int, ...]] = []
    for index, item in enumerate(prompt):
        if isinstance(item, str) and isinstance(prompt[0], str):
            result.append(item)
        elif isinstance(item, list) and isinstance(prompt[0], list):
            result.append(token_ids(item, vocab_size, f"{param}[{index}]"))
        else:
            raise bad_request(
                "invalid_type", f"{param} must be a string, a list of strings, ids, or lists of ids", param
            )
    return result


def tool_list(request: ChatRequest | TokenizeRequest) -> list[dict[str, Any]] | None:
    """The tools the template shows the model; None when there are none or tool_choice is "none"."""
    if request.tool_choice not in (None, "none", "auto"):
        raise bad_request(
            "unsupported_field",
            f"tool_choice {shown(request.tool_choice)} cannot be honoured; use 'auto' or 'none'",
            "tool_choice",
        )
    if len(request.tools) > MAX_TOOLS:
        raise bad_request("too_many_tools", f"{len(request.tools)} tools; limit {MAX_TOOLS}", "tools")
    for index, tool in enumerate(request.tools):
        where = f"tools[{index}]"
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict):
            raise bad_request(
                "invalid_type", f"{where} must have type 'function' and a 'function' object", where
            )
        if not isinstance(function.get("name"), str):
            raise bad_request("missing_field", f"{where}.function.name is missing", where)
        encoded = json.dumps(tool).encode()
        if len(encoded) > MAX_TOOL_BYTES:
            raise bad_request(
                "tool_too_large", f"{where} is {len(encoded)} bytes; limit {MAX_TOOL_BYTES}", where
            )
        if depth_exceeds(encoded, MAX_TOOL_DEPTH):
            raise bad_request("tool_too_deep", f"{where} is nested more than {MAX_TOOL_DEPTH} deep", where)
    return request.tools if request.tools and request.tool_choice != "none" else None


def sampling_params(
    fields: SamplingFields,
    defaults: dict[str, float],
    vocab_size: int,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """How to sample: the request's fields, else the model's generation_config, else OpenAI's defaults."""
    chosen: dict[str, Any] = {}
    for name in RECOMMENDED:
        value = getattr(fields, name)
        value = defaults.get(name) if value is None else value
        if value is not None:
            chosen[name] = value
    chosen["top_k"] = max(0, int(chosen.get("top_k", 0)))  # -1 is vLLM's and SGLang's "all"
    if chosen.get("top_p") == 0:
        chosen["top_p"] = 1e-6  # nothing but the best token, which always stays
    if len(fields.stop_token_ids) > MAX_STOP_IDS:
        raise bad_request(
            "too_many_stops",
            f"{len(fields.stop_token_ids)} stop_token_ids; limit {MAX_STOP_IDS}",
            "stop_token_ids",
        )
    if max_tokens and fields.min_tokens > max_tokens:
        raise bad_request(
            "invalid_number",
            f"min_tokens {fields.min_tokens} is more than max_tokens {max_tokens}",
            "min_tokens",
        )
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=fields.min_tokens,
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        seed=fields.seed,
        logit_bias=logit_biases(fields.logit_bias, vocab_size),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        stop=stop_strings(fields.stop),
        stop_token_ids=token_ids(fields.stop_token_ids, vocab_size, "stop_token_ids"),
        ignore_eos=fields.ignore_eos,
        skip_special_tokens=fields.skip_special_tokens,
        include_stop_str_in_output=fields.include_stop_str_in_output or fields.no_stop_trim,
        **chosen,
    )


def seed_of_choice(seed: int | None, choice: int) -> int | None:
    """Choices of one request draw differently, and each the same every time."""
    return None if seed is None else (seed + choice + 2**63) % 2**64 - 2**63
