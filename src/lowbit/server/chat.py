"""POST /v1/chat/completions: messages through the checkpoint's template, tokens back as deltas.

What messages contain never becomes a control token: the template's ``render`` sees to that. Its output has
the special tokens already, so nothing adds a second BOS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowbit.engine.messages import TokenEvent, TokenLogprob
from lowbit.errors import printable, thousands
from lowbit.server import protocol, request_values
from lowbit.server.api_error import bad_request
from lowbit.server.generation import (
    Generation,
    Output,
    TokenNames,
    check_fit,
    collect,
    created,
    relay,
    salt_of,
)
from lowbit.server.http import Exchange
from lowbit.server.protocol import ChatRequest, TokenizeRequest
from lowbit.server.text import RESERVED_VARIABLES

if TYPE_CHECKING:
    from lowbit.server.app import App

_ROLES = {"system", "user", "assistant", "tool", "developer"}
_MESSAGE_FIELDS = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning"}
# What clients write when an answer is sent back as history, and SDKs' cache hints.
_MESSAGE_IGNORED = {"refusal", "audio", "annotations", "function_call", "cache_control", "id", "prefix"}
_MESSAGE_IGNORED |= {"parsed", "provider_specific_fields", "reasoning_details", "thinking_blocks"}


def template_messages(
    messages: list[dict[str, Any]], knows_developer: bool = False
) -> list[dict[str, object]]:
    """The messages, checked, in the form templates expect."""
    if not messages:
        raise bad_request("empty_messages", "messages is an empty list", "messages")
    if len(messages) > protocol.MAX_MESSAGES:
        text = f"{thousands(len(messages))} messages; limit {thousands(protocol.MAX_MESSAGES)}"
        raise bad_request("too_many_messages", text, "messages")
    return [
        _message(message, f"messages[{index}]", knows_developer) for index, message in enumerate(messages)
    ]


def _message(message: dict[str, Any], where: str, knows_developer: bool) -> dict[str, object]:
    given = {name: value for name, value in message.items() if value is not None}
    for name in given.keys() - _MESSAGE_FIELDS - _MESSAGE_IGNORED:
        raise bad_request("unknown_field", f"unknown field '{where}.{printable(name)}'", where)
    role = given.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        choices = ", ".join(sorted(_ROLES))
        raise bad_request(
            "invalid_role", f"{where}.role must be one of {choices}; got {protocol.shown(role)}", where
        )
    if "content" not in given and not (role == "assistant" and given.get("tool_calls")):
        raise bad_request("missing_field", f"'{where}.content' is missing", where)
    result: dict[str, object] = {name: given[name] for name in given.keys() & _MESSAGE_FIELDS}
    for name in result.keys() - {"content", "tool_calls"}:
        if not isinstance(result[name], str):
            raise bad_request("invalid_type", f"{where}.{name} must be a string", f"{where}.{name}")
    # The openai client's newer name of the system role; few templates know it.
    result["role"] = "system" if role == "developer" and not knows_developer else role
    result["content"] = _content(given.get("content", ""), f"{where}.content")
    if not given.get("tool_calls"):
        result.pop("tool_calls", None)  # to templates an empty list is a call
    else:
        result["tool_calls"] = _tool_calls(given["tool_calls"], f"{where}.tool_calls")
    return result


def _content(content: Any, where: str) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request("invalid_type", f"{where} must be a string or a list of parts", where)
    parts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            text = f"{where}[{index}] is of type {protocol.shown(kind)}; this model reads text parts only"
            raise bad_request("unsupported_content", text, where)
        if not isinstance(part.get("text"), str):
            raise bad_request("missing_field", f"'{where}[{index}].text' is missing", where)
        parts.append({"type": "text", "text": part["text"]})
    return parts


def _tool_calls(calls: Any, where: str) -> list[dict[str, object]]:
    """Tool calls of an earlier answer, checked for shape; the template reads their arguments."""
    if not isinstance(calls, list) or len(calls) > request_values.MAX_TOOLS:
        text = f"{where} must be a list of at most {request_values.MAX_TOOLS} calls"
        raise bad_request("invalid_type", text, where)
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            text = f"{where}[{index}] must have a 'function' with a name"
            raise bad_request("invalid_type", text, where)
    return calls


async def render(
    app: App, request: ChatRequest | TokenizeRequest, messages: list[dict[str, Any]]
) -> list[int]:
    """Token ids of the conversation."""
    template = app.text.require_template()
    variables = request.chat_template_kwargs
    effort = request.reasoning_effort if isinstance(request, ChatRequest) else None
    if effort is not None and "reasoning_effort" in template.source:
        variables = {"reasoning_effort": effort, **variables}
    for name in variables.keys() & RESERVED_VARIABLES:
        text = f"chat_template_kwargs may not set '{name}'"
        raise bad_request("invalid_request", text, "chat_template_kwargs")
    if request.continue_final_message and messages and messages[-1].get("role") != "assistant":
        text = "continue_final_message needs a last message of role 'assistant'"
        raise bad_request("invalid_request", text, "continue_final_message")
    prepared = template_messages(messages, knows_developer="developer" in template.source)
    tools = request_values.tool_list(request)

    def work() -> list[int]:
        return template.render(
            prepared,
            tools=tools,
            add_generation_prompt=request.add_generation_prompt and not request.continue_final_message,
            continue_final_message=request.continue_final_message,
            variables={**app.text.variables, **variables} or None,
        )

    seconds = app.limits.template_seconds + app.limits.tokenize_seconds
    return await app.text_work(seconds, "the chat template", work, "messages")


async def chat_completions(app: App, exchange: Exchange) -> None:
    """The endpoint."""
    document = await exchange.read_json()
    request = protocol.read(document, ChatRequest)
    app.check_model(request.model)
    ready = app.client.require_ready()
    if request.top_logprobs and not request.logprobs:
        raise bad_request("invalid_request", "top_logprobs needs logprobs: true", "top_logprobs")
    max_tokens = (
        request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    )
    sampling = request_values.sampling_params(
        request,
        app.text.defaults,
        ready.vocab_size,
        max_tokens=max_tokens,
        logprobs=request.top_logprobs if request.logprobs else None,
    )
    ids = await render(app, request, request.messages)
    check_fit(ready, len(ids), max_tokens, "messages")
    identity = app.new_id("chatcmpl")
    salt = salt_of(exchange, request.cache_salt)
    generation = Generation.plan(identity, [tuple(ids)], [sampling], request.n, salt)
    names = TokenNames(app.text.tokenizer, request.return_tokens_as_token_ids)
    envelope: dict[str, object] = {"id": identity, "created": created(), "model": app.model_name}
    if request.stream:
        envelope["object"] = "chat.completion.chunk"
        options = app.stream_options(request)

        def chunk(index: int, event: TokenEvent, output: Output) -> dict[str, object] | None:
            return _chunk(index, event, output, names if request.logprobs else None, request.return_token_ids)

        first: dict[str, object] = {"prompt_token_ids": ids} if request.return_token_ids else {}
        await relay(app.client, generation, exchange, chunk, envelope, options, first)
        return
    await collect(app.client, generation, exchange)
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": "".join(output.text), "refusal": None},
            "logprobs": _logprobs(output.logprobs, names) if request.logprobs else None,
            "finish_reason": output.finish_reason,
            "matched_stop": output.matched_stop,
            **({"token_ids": output.tokens} if request.return_token_ids else {}),
        }
        for index, output in enumerate(generation.outputs)
    ]
    if request.return_token_ids:
        envelope["prompt_token_ids"] = ids
    envelope |= {"object": "chat.completion", "choices": choices, "usage": generation.usage()}
    await exchange.send_json(envelope)


def _chunk(
    index: int, event: TokenEvent, output: Output, names: TokenNames | None, with_ids: bool
) -> dict[str, object] | None:
    """A choice of a chunk; None where there is nothing to tell (half a character is waiting)."""
    delta: dict[str, object] = {}
    if not output.begun:
        output.begun = True
        delta = {"role": "assistant", "content": event.text}
    elif event.text:
        delta = {"content": event.text}
    shows_tokens = (names is not None and bool(event.logprobs)) or (with_ids and bool(event.tokens))
    if not delta and event.finish_reason is None and not shows_tokens:
        return None
    choice: dict[str, object] = {
        "index": index,
        "delta": delta,
        "logprobs": _logprobs(event.logprobs, names) if names is not None and event.logprobs else None,
        "finish_reason": event.finish_reason,
    }
    if event.finish_reason is not None:
        choice["matched_stop"] = event.matched_stop
    if with_ids:
        choice["token_ids"] = list(event.tokens)
    return choice


def _logprobs(
    logprobs: list[TokenLogprob] | tuple[TokenLogprob, ...], names: TokenNames
) -> dict[str, object]:
    content = [
        {
            **names.entry(item.token, item.logprob),
            "top_logprobs": [names.entry(token, logprob) for token, logprob in item.top],
        }
        for item in logprobs
    ]
    return {"content": content, "refusal": None}
