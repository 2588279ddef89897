"""What a request may say: the fields of the OpenAI API that lowbit honours, and the bounds of their numbers.

Every field of a body is in exactly one of four places:

    a struct below     honoured; type by msgspec, numbers by NUMBERS
    IGNORED            known to other servers, without effect on the answer here (``other_fields``)
    UNSUPPORTED        known, but ignoring it would change what the client asked for: 400 unless harmless
    nowhere            400 ``unknown_field`` with the nearest name

``null`` means "not given", as in the OpenAI API. What lists and maps may hold: ``request_values``.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from lowbit.errors import printable
from lowbit.server.api_error import bad_request
from lowbit.server.other_fields import IGNORED, UNSUPPORTED
from lowbit.server.strict_json import Document

MAX_CHOICES = 128  # OpenAI's; of all prompts together request_values.MAX_PROMPTS
MAX_MESSAGES = 2048
MAX_LOGPROBS = 20
_MAX_COUNT = 2**31 - 1


@dataclass(frozen=True)
class Range:
    """The closed interval of a number, and whether it must be whole."""

    low: float
    high: float
    whole: bool = False


NUMBERS: dict[str, Range] = {
    "temperature": Range(0, 2),
    "top_p": Range(0, 1),
    "min_p": Range(0, 1),
    "top_k": Range(-1, _MAX_COUNT, whole=True),
    "repetition_penalty": Range(0.01, 10),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "seed": Range(-(2**63), 2**63 - 1, whole=True),
    "max_tokens": Range(0, _MAX_COUNT, whole=True),
    "max_completion_tokens": Range(1, _MAX_COUNT, whole=True),
    "min_tokens": Range(0, _MAX_COUNT, whole=True),
    "n": Range(1, MAX_CHOICES, whole=True),
    "top_logprobs": Range(0, MAX_LOGPROBS, whole=True),
}
_COMPLETION_NUMBERS = {**NUMBERS, "logprobs": Range(0, MAX_LOGPROBS, whole=True)}
_CHAT_NUMBERS = {**NUMBERS, "max_tokens": Range(1, _MAX_COUNT, whole=True)}


class StreamOptions(msgspec.Struct, kw_only=True):
    """``include_usage``: a last chunk with usage; ``continuous_usage_stats``: usage in every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False  # OpenAI pads chunks against traffic analysis; nothing to hide here


class SamplingFields(msgspec.Struct, kw_only=True):
    """How to choose tokens. None: the model's default."""

    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] = []
    logit_bias: dict[str, float] = {}
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    no_stop_trim: bool = False  # SGLang's name of include_stop_str_in_output


class GenerationFields(SamplingFields, kw_only=True):
    """What chat and completions share."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_tokens_as_token_ids: bool = False
    return_token_ids: bool = False  # the prompt's and the answer's, as vLLM has them
    cache_salt: str = ""


class ChatRequest(GenerationFields, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = []
    tool_choice: Any = None
    max_completion_tokens: int | None = None
    reasoning_effort: str | None = None  # for templates that read it
    logprobs: bool = False
    top_logprobs: int = 0
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}


class CompletionRequest(GenerationFields, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[Any]
    echo: bool = False
    logprobs: int | None = None
    add_special_tokens: bool = True


_NATIVE_NAMES = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "seed": "sampling_seed"}


class NativeSampling(SamplingFields, kw_only=True, rename=_NATIVE_NAMES):
    """``sampling_params`` of /generate: SGLang has other names for three of them."""

    max_tokens: int | None = None
    min_tokens: int = 0
    seed: int | None = None


class GenerateRequest(msgspec.Struct, kw_only=True):
    """POST /generate, SGLang's own endpoint. What may be a list has a value for each prompt then."""

    text: str | list[str] | None = None
    input_ids: list[Any] | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] = {}
    stream: bool = False
    return_logprob: bool | list[bool] = False
    logprob_start_len: Any = -1  # a number or a list of them; -1: none of the prompt
    top_logprobs_num: Any = 0
    return_text_in_logprobs: bool = False
    rid: str | list[str] | None = None
    cache_salt: str = ""


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /tokenize: a prompt or several, or messages to put through the chat template."""

    model: str | None = None
    prompt: str | list[str] | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: Any = None
    return_token_strs: bool = False
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /detokenize: the ids of a text, or lists of several texts' ids."""

    tokens: list[int | list[int]]
    model: str | None = None
    skip_special_tokens: bool = False


Schema = TypeVar("Schema", bound=msgspec.Struct)

_NUMBERS_OF: dict[type, dict[str, Range]] = {
    ChatRequest: _CHAT_NUMBERS,
    CompletionRequest: _COMPLETION_NUMBERS,
    NativeSampling: {_NATIVE_NAMES.get(name, name): bounds for name, bounds in NUMBERS.items()},
}
LOGPROB_NUMBERS = {  # of a GenerateRequest, or of each of its prompts
    "logprob_start_len": Range(-1, _MAX_COUNT, whole=True),
    "top_logprobs_num": Range(0, MAX_LOGPROBS, whole=True),
}


def read(document: Document, schema: type[Schema]) -> Schema:
    """The request that a body holds, every field checked."""
    if not isinstance(document.value, dict):
        raise bad_request("invalid_request", "the body must be a JSON object")
    fields = {name: value for name, value in document.value.items() if value is not None}
    known = {field.encode_name for field in msgspec.structs.fields(schema)}
    if fields.get("best_of") == fields.get("n", 1):  # as many as are asked for: nothing to choose between
        fields.pop("best_of", None)
    for name in fields.keys() - known:
        _refuse_or_ignore(name, fields, known)
    for name, bounds in _NUMBERS_OF.get(schema, {}).items():
        if name in fields:
            fields[name] = check_number(name, fields[name], bounds)
    options = fields.get("stream_options")
    if isinstance(options, dict):
        _refuse_unknown(options, {f.name for f in msgspec.structs.fields(StreamOptions)}, "stream_options.")
    document.reject_not_finite()
    try:
        return msgspec.convert({name: fields[name] for name in fields.keys() & known}, schema)
    except msgspec.ValidationError as error:
        raise _wrong_type(error) from None


def _refuse_or_ignore(name: str, fields: dict[str, Any], known: set[str]) -> None:
    if name in IGNORED:
        return
    if name not in UNSUPPORTED:
        _refuse_unknown({name: None}, known)
        return
    harmless, reason = UNSUPPORTED[name]
    if fields[name] not in ([], {}) and fields[name] not in harmless:
        raise bad_request("unsupported_field", f"'{name}' cannot be honoured: {reason}", name)


def _refuse_unknown(fields: dict[str, Any], known: set[str], prefix: str = "") -> None:
    for name in fields.keys() - known:
        near = difflib.get_close_matches(name[:64], known, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise bad_request(
            "unknown_field", f"unknown field '{prefix}{printable(name)}'{hint}", prefix + name[:64]
        )


def check_number(name: str, value: object, bounds: Range) -> int | float:
    """``value`` as a number within its bounds; a whole 16.0 counts as 16."""
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    if bounds.whole and isinstance(number, float) and number.is_integer():
        number = int(number)
    sound = number is not None and math.isfinite(number) and bounds.low <= number <= bounds.high
    if number is None or not sound or (bounds.whole and not isinstance(number, int)):
        kind = "a whole number" if bounds.whole else "a finite number"
        text = f"{name} must be {kind} between {bounds.low:,} and {bounds.high:,}".replace(",", " ")
        raise bad_request("invalid_number", f"{text}; got {shown(value)}", name)
    return number


def shown(value: object) -> str:
    """A value of a request, in JSON's spelling, short."""
    return printable(json.dumps(value, ensure_ascii=False), 60)


_TYPE_ERROR = re.compile(r"Expected `(?P<expected>.+?)`, got `(?P<got>.+?)`(?: - at `\$\.?(?P<path>.*)`)?$")
_MISSING = re.compile(r"Object missing required field `(?P<name>.+?)`")


def _wrong_type(error: msgspec.ValidationError) -> Exception:
    """msgspec's message in our words."""
    if found := _MISSING.match(str(error)):
        return bad_request("missing_field", f"'{found['name']}' is missing", found["name"])
    if found := _TYPE_ERROR.match(str(error)):
        path = found["path"] or "the body"
        expected = found["expected"].replace(" | ", " or ").replace(" or null", "")
        return bad_request("invalid_type", f"{path} must be {expected}, not {found['got']}", path)
    return bad_request("invalid_request", str(error))
