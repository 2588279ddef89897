"""POST /tokenize and /detokenize: the tokenizer by itself, in the answer shapes of SGLang and vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowbit.server import protocol, request_values
from lowbit.server.api_error import bad_request
from lowbit.server.chat import render
from lowbit.server.completions import encode_prompt
from lowbit.server.http import Exchange
from lowbit.server.protocol import DetokenizeRequest, TokenizeRequest

if TYPE_CHECKING:
    from lowbit.server.app import App


async def tokenize(app: App, exchange: Exchange) -> None:
    """Ids of a raw prompt, or of messages as the chat endpoint would send them to the model."""
    request = protocol.read(await exchange.read_json(), TokenizeRequest)
    app.check_model(request.model)
    text, prompt = app.text, request.prompt
    if (prompt is None) == (request.messages is None):
        raise bad_request("invalid_request", "give either 'prompt' or 'messages'", "prompt")
    if prompt is None:
        ids = await render(app, request, request.messages or [])
    else:
        ids = await app.text_work(
            app.limits.tokenize_seconds,
            "tokenizing",
            lambda: encode_prompt(text.tokenizer, prompt, request.add_special_tokens),
            "prompt",
        )
    context = app.client.ready.context_length if app.client.ready else None
    await exchange.send_json({"count": len(ids), "max_model_len": context, "tokens": ids})


async def detokenize(app: App, exchange: Exchange) -> None:
    """The text of ids."""
    request = protocol.read(await exchange.read_json(), DetokenizeRequest)
    app.check_model(request.model)
    tokenizer = app.text.tokenizer
    ids = request_values.token_ids(request.tokens, tokenizer.vocab_size, "tokens")
    text = await app.text_work(
        app.limits.tokenize_seconds,
        "detokenizing",
        lambda: tokenizer.decode(list(ids), skip_special=request.skip_special_tokens),
        "tokens",
    )
    await exchange.send_json({"text": text, "prompt": text})
