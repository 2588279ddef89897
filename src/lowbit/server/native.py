"""POST /generate: SGLang's own endpoint, with its names and its shapes.

    {"text": "The capital of France is", "sampling_params": {"max_new_tokens": 8, "temperature": 0}}
    {"text": " Paris.", "output_ids": […], "meta_info": {"id": …, "finish_reason": {"type": "length", …}, …}}

Several prompts, or ``n``, give a list. A streamed event holds all the text so far, or what is new of it with
``--incremental-streaming-output``; among several it says whose by ``index``. Log-probabilities are triples of
log-probability, token id, and its text or null.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowbit.engine.messages import EngineReady, SamplingParams, TokenEvent, TokenLogprob
from lowbit.server import protocol, request_values
from lowbit.server.api_error import bad_request
from lowbit.server.completions import encode_prompt
from lowbit.server.generation import (
    Generation,
    Output,
    TokenNames,
    check_fit,
    collect,
    finite,
    relay,
    salt_of,
    with_room,
)
from lowbit.server.http import Exchange, now
from lowbit.server.protocol import (
    LOGPROB_NUMBERS,
    GenerateRequest,
    NativeSampling,
    StreamOptions,
    check_number,
)
from lowbit.server.strict_json import Document

if TYPE_CHECKING:
    from lowbit.server.app import App

DEFAULT_TOKENS = 128  # SGLang's max_new_tokens of a request that has none


async def generate(app: App, exchange: Exchange) -> None:
    """The endpoint."""
    document = await exchange.read_json()
    request = protocol.read(document, GenerateRequest)
    ready = app.client.require_ready()
    if (request.text is None) == (request.input_ids is None):
        raise bad_request("invalid_request", "give either 'text' or 'input_ids'", "text")
    param = "text" if request.input_ids is None else "input_ids"
    asked: str | list[Any] = request.text if request.text is not None else request.input_ids or []
    given = request_values.prompts(asked, ready.vocab_size, param)
    fields = _sampling_fields(request, len(given))
    wishes = _logprob_wishes(request, len(given))
    tokenizer = app.text.tokenizer
    prompts = await app.text_work(
        app.limits.tokenize_seconds,
        "tokenizing",
        lambda: [tuple(encode_prompt(tokenizer, p)) if isinstance(p, str) else p for p in given],
        param,
    )
    samplings = [_sampling(app, each, wish, ready) for each, wish in zip(fields, wishes, strict=True)]
    for prompt, sampling in zip(prompts, samplings, strict=True):
        check_fit(ready, len(prompt), sampling.max_tokens, param, "max_new_tokens")
    samplings = [
        with_room(sampling, ready, len(prompt), DEFAULT_TOKENS)
        for prompt, sampling in zip(prompts, samplings, strict=True)
    ]
    several = fields[0].n > 1 or (isinstance(asked, list) and not isinstance(asked[0], int))
    salt = salt_of(exchange, request.cache_salt)
    generation = Generation.plan(app.new_id("generate"), prompts, samplings, fields[0].n, salt)
    incremental = app.settings.incremental_streaming_output and request.stream
    names = TokenNames(tokenizer, False)
    printer = _Printer(request, generation, wishes, names, several, incremental, now())
    if request.stream:
        await relay(app.client, generation, exchange, printer.chunk, None, StreamOptions())
        return
    await collect(app.client, generation, exchange)
    answers = [printer.answer(index, output) for index, output in enumerate(generation.outputs)]
    await exchange.send_json(answers if several else answers[0])


def _sampling_fields(request: GenerateRequest, prompts: int) -> list[NativeSampling]:
    """``sampling_params`` of each prompt, checked."""
    given = request.sampling_params
    listed = _listed("sampling_params", given, prompts)
    # One reading where all have the same.
    read = {id(each): protocol.read(Document(each, None), NativeSampling) for each in listed}
    fields = [read[id(each)] for each in listed]
    if len({each.n for each in fields}) > 1:
        raise bad_request("invalid_request", "n must be the same for all prompts", "n")
    return fields


@dataclass(frozen=True)
class _LogprobWish:
    """What log-probabilities a prompt's answer shall have: any, of the prompt from where on, alternatives."""

    any: bool
    start: int  # -1: none of the prompt
    top: int


def _logprob_wishes(request: GenerateRequest, prompts: int) -> list[_LogprobWish]:
    """Of each prompt."""
    columns = [_listed("return_logprob", request.return_logprob, prompts)]
    for name, bounds in LOGPROB_NUMBERS.items():
        listed = _listed(name, getattr(request, name), prompts)
        columns.append([check_number(name, number, bounds) for number in listed])
    return [_LogprobWish(*row) for row in zip(*columns, strict=True)]


def _listed(name: str, value: Any, prompts: int) -> list[Any]:
    """A value for each prompt."""
    listed = value if isinstance(value, list) else [value] * prompts
    if len(listed) != prompts:
        text = f"{name} is a list of {len(listed)} for {prompts} prompts; give one, or one each"
        raise bad_request("invalid_request", text, name)
    return listed


def _sampling(app: App, fields: NativeSampling, wish: _LogprobWish, ready: EngineReady) -> SamplingParams:
    alternatives = wish.top if wish.any else None
    return request_values.sampling_params(
        fields,
        app.text.defaults,
        ready.vocab_size,
        max_tokens=fields.max_tokens,
        logprobs=alternatives,
        prompt_logprobs=alternatives if wish.start >= 0 else None,
    )


@dataclass(frozen=True)
class _Printer:
    """Answers and events in SGLang's form."""

    request: GenerateRequest
    generation: Generation
    wishes: list[_LogprobWish]  # of each prompt
    names: TokenNames
    several: bool
    incremental: bool
    began: float

    def answer(self, index: int, output: Output) -> dict[str, object]:
        """All of a choice so far."""
        return {
            "text": "".join(output.text),
            "output_ids": output.tokens,
            "meta_info": self._meta(index, output),
        }

    def chunk(self, index: int, event: TokenEvent, output: Output) -> dict[str, object] | None:
        """An event of a stream; None where there is nothing to tell."""
        if not event.tokens and not event.text and event.finish_reason is None:
            return None
        part = self.answer(index, output)
        if self.incremental:
            part |= {"text": event.text, "output_ids": list(event.tokens)}
        return {**part, "index": index} if self.several else part

    def _meta(self, index: int, output: Output) -> dict[str, object]:
        meta: dict[str, object] = {
            "id": self._id(index),
            "finish_reason": self._finish(output),
            "prompt_tokens": len(output.prompt),
            "completion_tokens": output.completion_tokens,
            "cached_tokens": output.cached_tokens,
        }
        if output.finish_reason is not None:
            meta["e2e_latency"] = now() - self.began
        wish = self.wishes[index // self.generation.n]
        if wish.any:
            start = wish.start
            entries = list(output.prompt_logprobs or ())[start:] if start >= 0 else []
            shown = [self._entry(output.prompt[start + at], entry) for at, entry in enumerate(entries)]
            meta["input_token_logprobs"] = shown
            meta["output_token_logprobs"] = [self._entry(entry.token, entry) for entry in output.logprobs]
            if wish.top:
                meta["input_top_logprobs"] = [self._top(entry) for entry in entries]
                meta["output_top_logprobs"] = [self._top(entry) for entry in output.logprobs]
        return meta

    def _id(self, index: int) -> str:
        rid = self.request.rid
        if isinstance(rid, str):
            return rid if not self.several else f"{rid}_{index}"
        prompt = index // self.generation.n
        return rid[prompt] if rid and prompt < len(rid) else self.generation.requests[index].id

    def _finish(self, output: Output) -> dict[str, object] | None:
        if output.finish_reason == "stop":
            return {"type": "stop", "matched": output.matched_stop}
        if output.finish_reason is None:
            return None
        return {"type": output.finish_reason, "length": output.completion_tokens}

    def _entry(self, token: int, entry: TokenLogprob | None) -> list[object]:
        return self._triple(token, None if entry is None else finite(entry.logprob))

    def _triple(self, token: int, logprob: float | None) -> list[object]:
        return [logprob, token, self.names.name(token) if self.request.return_text_in_logprobs else None]

    def _top(self, entry: TokenLogprob | None) -> list[list[object]] | None:
        return None if entry is None else [self._triple(token, finite(value)) for token, value in entry.top]
