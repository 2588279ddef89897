"""POST /tokenize and /detokenize: the tokenizer by itself, in the answer shapes of SGLang and vLLM; and GET
/tokenizer_info, as vLLM has it, by which evaluation harnesses do without files of the tokenizer.

    {"prompt": "hello world"}     {"count": 2, "max_model_len": 8192, "tokens": [28120, 905]}
    {"prompt": ["hello", "a b"]}  lists of counts and of tokens, one for each prompt
    {"tokens": [28120, 905]}      {"text": "hello world", "prompt": "hello world"}; lists of both for lists
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowbit.server import protocol, request_values
from lowbit.server.api_error import bad_request
from lowbit.server.chat import render
from lowbit.server.completions import encode_prompt
from lowbit.server.http import Exchange
from lowbit.server.protocol import DetokenizeRequest, TokenizeRequest

if TYPE_CHECKING:
    from lowbit.server.app import App


async def tokenize(app: App, exchange: Exchange) -> None:
    """Ids of raw prompts, or of messages as the chat endpoint would send them to the model."""
    request = protocol.read(await exchange.read_json(), TokenizeRequest)
    app.check_model(request.model)
    tokenizer, prompt = app.text.tokenizer, request.prompt
    if (prompt is None) == (request.messages is None):
        raise bad_request("invalid_request", "give either 'prompt' or 'messages'", "prompt")
    if prompt is None:
        listed = [await render(app, request, request.messages or [])]
    else:
        texts = [prompt] if isinstance(prompt, str) else prompt
        listed = await app.text_work(
            app.limits.tokenize_seconds,
            "tokenizing",
            lambda: [encode_prompt(tokenizer, text, request.add_special_tokens) for text in texts],
            "prompt",
        )
    several = isinstance(prompt, list)
    answer: dict[str, object] = {
        "count": [len(ids) for ids in listed] if several else len(listed[0]),
        "max_model_len": app.client.ready.context_length if app.client.ready else None,
        "tokens": listed if several else listed[0],
    }
    if request.return_token_strs:
        names = [[tokenizer.token_text(token) for token in ids] for ids in listed]
        answer["token_strs"] = names if several else names[0]
    await exchange.send_json(answer)


async def detokenize(app: App, exchange: Exchange) -> None:
    """The text of ids, or the texts of lists of ids."""
    request = protocol.read(await exchange.read_json(), DetokenizeRequest)
    app.check_model(request.model)
    tokenizer = app.text.tokenizer
    several = any(isinstance(item, list) for item in request.tokens)
    if not all(isinstance(item, list) == several for item in request.tokens):
        raise bad_request("invalid_type", "tokens must be ids, or lists of ids", "tokens")
    given: list[Any] = request.tokens if several else [request.tokens]
    listed = [request_values.token_ids(ids, tokenizer.vocab_size, "tokens") for ids in given]
    texts = await app.text_work(
        app.limits.tokenize_seconds,
        "detokenizing",
        lambda: [tokenizer.decode(list(ids), skip_special=request.skip_special_tokens) for ids in listed],
        "tokens",
    )
    text: str | list[str] = texts if several else texts[0]
    await exchange.send_json({"text": text, "prompt": text})


async def tokenizer_info(app: App, exchange: Exchange) -> None:
    """The names of the special tokens, the chat template's source, and the context."""
    tokenizer, template = app.text.tokenizer, app.text.template
    special = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    await exchange.send_json(
        {
            **{name: None if id is None else tokenizer.token_text(id) for name, id in special.items()},
            "add_bos_token": tokenizer.adds_bos,
            "chat_template": None if template is None else template.source,
            "model_max_length": app.client.ready.context_length if app.client.ready else None,
        }
    )
