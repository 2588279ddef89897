"""POST /v1/completions: raw prompts, as text (special tokens in it are parsed) or as token ids.

``echo`` puts the prompt before the answer, with ``logprobs`` also the prompt's log-probabilities; with
``max_tokens: 0`` that is all, which is how evaluation harnesses score texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowbit.engine.messages import TokenEvent, TokenLogprob
from lowbit.server import protocol, request_values
from lowbit.server.generation import (
    Generation,
    Output,
    TokenNames,
    check_fit,
    collect,
    created,
    finite,
    relay,
    salt_of,
    with_room,
)
from lowbit.server.http import Exchange
from lowbit.server.protocol import CompletionRequest
from lowbit.tokenization.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lowbit.server.app import App

DEFAULT_TOKENS = 16  # OpenAI's max_tokens of a completion that has none


def encode_prompt(tokenizer: Tokenizer, text: str, add_special: bool = True) -> list[int]:
    """Ids of a raw prompt; one BOS even if the text brings its own."""
    ids = tokenizer.encode(text, add_special=add_special, parse_special=True)
    if (
        tokenizer.bos_id is not None
        and ids[:2] == [tokenizer.bos_id] * 2
        and tokenizer.adds_bos
        and add_special
    ):
        del ids[0]
    return ids


async def completions(app: App, exchange: Exchange) -> None:
    """The endpoint."""
    document = await exchange.read_json()
    request = protocol.read(document, CompletionRequest)
    app.check_model(request.model)
    ready = app.client.require_ready()
    sampling = request_values.sampling_params(
        request,
        app.text.defaults,
        ready.vocab_size,
        max_tokens=request.max_tokens,
        logprobs=request.logprobs,
        prompt_logprobs=request.logprobs if request.echo else None,
    )
    given = request_values.prompts(request.prompt, ready.vocab_size)
    tokenizer, seconds = app.text.tokenizer, app.limits.tokenize_seconds
    prompts, texts = await app.text_work(
        seconds, "tokenizing", lambda: _encode_all(tokenizer, given, request), "prompt"
    )
    for prompt in prompts:
        check_fit(ready, len(prompt), request.max_tokens, "prompt")
    identity = app.new_id("cmpl")
    salt = salt_of(exchange, request.cache_salt)
    samplings = [with_room(sampling, ready, len(prompt), DEFAULT_TOKENS) for prompt in prompts]
    generation = Generation.plan(identity, prompts, samplings, request.n, salt)
    printer = _Printer(request, TokenNames(tokenizer, request.return_tokens_as_token_ids), texts)
    envelope: dict[str, object] = {
        "id": identity,
        "object": "text_completion",
        "created": created(),
        "model": app.model_name,
    }
    if request.stream:
        options = app.stream_options(request)
        await relay(app.client, generation, exchange, printer.chunk, envelope, options)
        return
    await collect(app.client, generation, exchange)
    choices = [printer.choice(index, output) for index, output in enumerate(generation.outputs)]
    await exchange.send_json({**envelope, "choices": choices, "usage": generation.usage()})


def _encode_all(
    tokenizer: Tokenizer, given: list[str | tuple[int, ...]], request: CompletionRequest
) -> tuple[list[tuple[int, ...]], list[str]]:
    """Ids of every prompt, and the text of every prompt where it is echoed."""
    prompts: list[tuple[int, ...]] = []
    texts: list[str] = []
    for prompt in given:
        if isinstance(prompt, str):
            prompts.append(tuple(encode_prompt(tokenizer, prompt, request.add_special_tokens)))
            texts.append(prompt)
        else:
            prompts.append(prompt)
            texts.append(tokenizer.decode(list(prompt), skip_special=False) if request.echo else "")
    return prompts, texts


class _Printer:
    """Choices in the completions' form."""

    def __init__(self, request: CompletionRequest, names: TokenNames, texts: list[str]) -> None:
        self._request = request
        self._names = names
        self._texts = texts  # of the prompts

    def choice(self, index: int, output: Output) -> dict[str, object]:
        """A finished choice."""
        text = "".join(output.text)
        entries: list[TokenLogprob | None] = list(output.logprobs)
        if self._request.echo:
            text = self._texts[index // self._request.n] + text
            entries = [*(output.prompt_logprobs or ()), *entries]
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(entries, output, index)
            if self._request.logprobs is not None
            else None,
            "finish_reason": output.finish_reason,
            "matched_stop": output.matched_stop,
            **self._ids(output.tokens, output.prompt),
        }

    def chunk(self, index: int, event: TokenEvent, output: Output) -> dict[str, object] | None:
        """A piece of a choice; None where there is nothing to tell."""
        tokens, first = list(event.tokens), not output.begun
        if self._request.echo and first:
            if self._waits_for_prompt(event, output):
                return None
            tokens = output.tokens
            text = self._texts[index // self._request.n] + "".join(output.text)
            entries: list[TokenLogprob | None] = [*(output.prompt_logprobs or ()), *output.logprobs]
        else:
            text, entries = event.text, list(event.logprobs)
        if self._request.logprobs is None:
            entries = []
        shows_tokens = bool(entries) or (self._request.return_token_ids and bool(tokens))
        if not text and not shows_tokens and event.finish_reason is None:
            return None
        output.begun = True
        choice: dict[str, object] = {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(entries, output, index) if entries else None,
            "finish_reason": event.finish_reason,
            **self._ids(tokens, output.prompt if first else None),
        }
        if event.finish_reason is not None:
            choice["matched_stop"] = event.matched_stop
        return choice

    def _ids(self, tokens: Sequence[int], prompt: Sequence[int] | None) -> dict[str, object]:
        """``return_token_ids``: of the answer, and of the prompt where it is told."""
        if not self._request.return_token_ids:
            return {}
        told = {} if prompt is None else {"prompt_token_ids": list(prompt)}
        return {"token_ids": list(tokens), **told}

    def _waits_for_prompt(self, event: TokenEvent, output: Output) -> bool:
        """Whether the prompt's log-probabilities are wanted and still to come."""
        wanted = self._request.logprobs is not None and output.prompt_logprobs is None
        return wanted and event.finish_reason is None

    def _logprobs(self, entries: list[TokenLogprob | None], output: Output, index: int) -> dict[str, object]:
        """OpenAI's four parallel lists. None stands for the first prompt token, which nothing predicts."""
        tokens: list[str] = []
        token_logprobs: list[float | None] = []
        top_logprobs: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for entry in entries:
            token = output.prompt[0] if entry is None else entry.token
            tokens.append(self._names.name(token))
            offsets.append(output.text_offset)
            output.text_offset += self._characters(token, output, index)
            output.tokens_printed += 1
            if entry is None:
                token_logprobs.append(None)
                top_logprobs.append(None)
            else:
                token_logprobs.append(finite(entry.logprob))
                top_logprobs.append(self._top(entry))
        return {
            "tokens": tokens,
            "token_logprobs": token_logprobs,
            "top_logprobs": top_logprobs,
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The alternatives and the token itself. Tokens may share a text (parts of characters): the likeliest
        keeps the name."""
        top: dict[str, float] = {}
        for token, logprob in (*entry.top, (entry.token, entry.logprob)):
            top.setdefault(self._names.name(token), finite(logprob))
        return top

    def _characters(self, token: int, output: Output, index: int) -> int:
        """How many characters of the text begin in a token."""
        tokenizer = self._names.tokenizer
        if token not in tokenizer.special_ids:
            return sum(byte & 0xC0 != 0x80 for byte in tokenizer.token_bytes(token))
        shown = tokenizer.token_text(token)
        if not self._request.echo or output.tokens_printed >= len(output.prompt):
            written = not self._request.skip_special_tokens
        elif output.tokens_printed == 0:  # a BOS that the tokenizer put before the text is not in it
            written = self._texts[index // self._request.n].startswith(shown)
        else:
            written = True
        return len(shown) if written else 0
