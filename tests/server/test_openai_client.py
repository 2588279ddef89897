"""The official client drives the API over the fake engine."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from lowbit.errors import LowbitError
from lowbit.server.text import template_variables
from server.fake_text import BOS, answer
from server.harness import ServerThread, http, serving

USER = [{"role": "user", "content": "hello"}]
RENDERED = [BOS, *b"user: hello\nassistant:"]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    with serving() as running:
        yield running


@pytest.fixture
def client(server: ServerThread) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=10) as made:
        yield made
    server.assert_idle()


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert model.id == "tiny"
    assert model.model_extra is not None and model.model_extra["max_model_len"] == 1000
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("org/other")
    assert "model 'org/other' not served here; available: tiny" in str(caught.value)


@pytest.mark.parametrize("model", ["tiny", "default"])
def test_chat(client: openai.OpenAI, model: str) -> None:
    result = client.chat.completions.create(model=model, messages=USER, max_completion_tokens=9)
    [choice] = result.choices
    assert choice.message.content == answer(RENDERED, 9)
    assert (choice.message.role, choice.finish_reason, choice.logprobs) == ("assistant", "length", None)
    assert result.usage is not None
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (len(RENDERED), 9)
    assert result.usage.total_tokens == len(RENDERED) + 9
    assert result.usage.prompt_tokens_details is not None
    assert result.usage.prompt_tokens_details.cached_tokens == 2
    guessed = result.usage.completion_tokens_details
    assert guessed is not None
    assert (guessed.accepted_prediction_tokens, guessed.rejected_prediction_tokens) == (3, 1)
    assert (result.object, result.model) == ("chat.completion", "tiny")
    assert result.id.startswith("chatcmpl-")


def test_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=USER)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert "model 'gpt-4' not served here; available: tiny" in caught.value.message


def test_chat_stream(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=USER, max_tokens=20, stream=True, stream_options={"include_usage": True}
        )
    )
    *pieces, last = chunks
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == answer(RENDERED, 20)
    assert pieces[0].choices[0].delta.role == "assistant"
    assert [piece.choices[0].finish_reason for piece in pieces].count(None) == len(pieces) - 1
    assert pieces[-1].choices[0].finish_reason == "length"
    assert all(piece.usage is None for piece in pieces)
    assert last.choices == [] and last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(RENDERED), 20)
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_chat_stream_helper(client: openai.OpenAI) -> None:
    """The client's own accumulator agrees with the whole answer; it calls "length" an error, so stop."""
    stop = answer(RENDERED, 16, 3)[-4:]
    with client.chat.completions.stream(model="tiny", messages=USER, stop=stop, seed=3) as stream:
        for _ in stream:
            pass
        result = stream.get_final_completion()
    assert result.choices[0].message.content == answer(RENDERED, 12, 3)
    assert result.choices[0].finish_reason == "stop"


def test_continuous_usage(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=USER, max_tokens=6, stream=True, stream_options=options
        )
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage]
    assert len(counts) == len(chunks)
    assert counts == sorted(counts) and counts[-1] == 6


def test_n_choices_differ_by_seed(client: openai.OpenAI) -> None:
    result = client.chat.completions.create(model="tiny", messages=USER, max_tokens=5, n=8, seed=10)
    texts = [choice.message.content for choice in sorted(result.choices, key=lambda choice: choice.index)]
    assert texts == [answer(RENDERED, 5, 10 + index) for index in range(8)]
    assert result.usage is not None
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (len(RENDERED), 40)


def test_many_choices_are_more_than_run_at_once(client: openai.OpenAI) -> None:
    result = client.chat.completions.create(model="tiny", messages=USER, max_tokens=1, n=128, seed=0)
    assert [choice.index for choice in result.choices] == list(range(128))
    with pytest.raises(openai.BadRequestError, match="17 prompts with n 128 are 2 176 choices; limit 2 048"):
        client.completions.create(model="tiny", prompt=["x"] * 17, n=128)


def test_stop(client: openai.OpenAI) -> None:
    text = answer(RENDERED, 20)
    result = client.chat.completions.create(model="tiny", messages=USER, max_tokens=20, stop=["?", text[4:6]])
    choice = result.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("stop", text[:4])
    assert choice.model_extra is not None and choice.model_extra["matched_stop"] == text[4:6]


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(client: openai.OpenAI, stream: bool) -> None:
    text = answer(RENDERED, 4)
    result: Any = client.chat.completions.create(
        model="tiny", messages=USER, max_tokens=4, logprobs=True, top_logprobs=3, stream=stream
    )
    if stream:
        content = [entry for chunk in result for entry in (chunk.choices[0].logprobs or NO_LOGPROBS).content]
    else:
        content = result.choices[0].logprobs.content
    assert [entry.token for entry in content] == list(text)
    assert [entry.bytes for entry in content] == [[ord(letter)] for letter in text]
    assert {entry.logprob for entry in content} == {-0.25}
    for entry, letter in zip(content, text, strict=True):
        assert [top.token for top in entry.top_logprobs] == [chr(ord(letter) + step) for step in range(3)]
        assert [top.logprob for top in entry.top_logprobs] == [-0.25, -0.5, -9999.0]  # -inf is no JSON


class NO_LOGPROBS:  # noqa: N801
    content: tuple[Any, ...] = ()


def test_logprobs_without_alternatives(client: openai.OpenAI) -> None:
    result = client.chat.completions.create(model="tiny", messages=USER, max_tokens=2, logprobs=True)
    logprobs = result.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [entry.top_logprobs for entry in logprobs.content] == [[], []]
    with pytest.raises(openai.BadRequestError, match="top_logprobs needs logprobs"):
        client.chat.completions.create(model="tiny", messages=USER, top_logprobs=2)


def test_history_round_trip(client: openai.OpenAI) -> None:
    """An answer's model_dump is good history."""
    first = client.chat.completions.create(model="tiny", messages=USER, max_tokens=3)
    history: Any = [*USER, first.choices[0].message.model_dump(), {"role": "user", "content": "and?"}]
    second = client.chat.completions.create(model="tiny", messages=history, max_tokens=3)
    text = answer(RENDERED, 3)
    rendered = [BOS, *f"user: hello\nassistant: {text}\nuser: and?\nassistant:".encode()]
    assert second.choices[0].message.content == answer(rendered, 3)


def test_message_contents_make_no_control_tokens(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "<end><bos>"}]
    result = client.chat.completions.create(model="tiny", messages=messages, max_tokens=3)
    rendered = [BOS, *b"user: <end><bos>\nassistant:"]
    assert result.choices[0].message.content == answer(rendered, 3)


def test_template_options(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "f"}}
    extra = {"chat_template_kwargs": {"style": "x"}, "add_generation_prompt": False}
    result = client.chat.completions.create(
        model="tiny", messages=USER, max_tokens=3, tools=[tool], extra_body=extra
    )
    rendered = [BOS, *f"style=x\ntool {tool}\nuser: hello\n".encode()]
    assert result.choices[0].message.content == answer(rendered, 3)
    result = client.chat.completions.create(
        model="tiny", messages=USER, max_tokens=3, reasoning_effort="high"
    )
    assert result.choices[0].message.content == answer(
        [BOS, *b"reasoning_effort=high\nuser: hello\nassistant:"], 3
    )
    prefill: Any = [*USER, {"role": "assistant", "content": "Well"}]
    result = client.chat.completions.create(
        model="tiny", messages=prefill, max_tokens=3, extra_body={"continue_final_message": True}
    )
    assert result.choices[0].message.content == answer([BOS, *b"user: hello\nassistant: Well"], 3)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"messages": [{"role": "user", "content": "TEMPLATE ERROR"}]}, "roles must alternate"),
        ({"extra_body": {"chat_template_kwargs": {"messages": []}}}, "may not set 'messages'"),
        ({"extra_body": {"continue_final_message": True}}, "needs a last message of role 'assistant'"),
        ({"extra_body": {"max_token": 3}}, "did you mean 'max_tokens'?"),
        ({"response_format": {"type": "json_object"}}, "structured output is not supported yet"),
        ({"temperature": 9}, "temperature must be"),
        ({"extra_body": {"cache_salt": "x" * 257}}, "cache_salt is over 256 characters"),
        (
            {"max_tokens": 990},
            "1 013 > context 1 000; lower max_tokens to 977 or shorten the prompt by 13 tokens",
        ),
        ({"max_tokens": 640}, "this request needs 42 KV blocks, the server has 40; lower max_tokens to 617"),
    ],
)
def test_bad_requests(client: openai.OpenAI, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": USER, **fields})
    assert said in caught.value.message


def test_completion(client: openai.OpenAI) -> None:
    result = client.completions.create(model="tiny", prompt="abc", max_tokens=7)
    assert result.choices[0].text == answer([BOS, *b"abc"], 7)
    assert (result.object, result.choices[0].finish_reason) == ("text_completion", "length")
    result = client.completions.create(model="tiny", prompt=[97, 98], max_tokens=7)
    assert result.choices[0].text == answer([97, 98], 7)  # ids are taken as they are
    result = client.completions.create(
        model="tiny", prompt="<bos>a<end>", max_tokens=7, extra_body={"add_special_tokens": False}
    )
    assert result.choices[0].text == answer([256, 97, 257], 7)


@pytest.mark.parametrize("prompt", [["a", "bb", "ccc"], [[97], [98, 98], [99, 99, 99]]])
def test_many_prompts_and_choices(client: openai.OpenAI, prompt: Any) -> None:
    result = client.completions.create(model="tiny", prompt=prompt, max_tokens=3, n=2, seed=5)
    assert [choice.index for choice in result.choices] == list(range(6))
    bos = [BOS] if isinstance(prompt[0], str) else []
    expected = [answer([*bos, *text], 3, 5 + i) for text in (b"a", b"bb", b"ccc") for i in range(2)]
    assert [choice.text for choice in result.choices] == expected
    assert result.usage is not None
    assert result.usage.prompt_tokens == 6 + 3 * len(bos)
    assert result.usage.completion_tokens == 18


def test_more_prompts_than_places(client: openai.OpenAI, server: ServerThread) -> None:
    """A long list waits for its turn; it is not refused, and does not fill the queue."""
    prompts = [f"prompt {index}" for index in range(600)]
    result = client.completions.create(model="tiny", prompt=prompts, max_tokens=1)
    assert [choice.text for choice in result.choices] == [
        answer([BOS, *text.encode()], 1) for text in prompts
    ]


def test_completion_stream(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="tiny",
            prompt=["x", "y"],
            max_tokens=10,
            stream=True,
            echo=True,
            stream_options={"include_usage": True},
        )
    )
    for index, text in enumerate("xy"):
        pieces = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert "".join(piece.text for piece in pieces) == text + answer([BOS, *text.encode()], 10)
        assert pieces[-1].finish_reason == "length"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 20


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 2])
@pytest.mark.parametrize("prompt", ["é<end>b", [256, 0xC3, 0xA9, 257, 98]])
def test_echo_with_logprobs(client: openai.OpenAI, prompt: Any, max_tokens: int, stream: bool) -> None:
    given: Any = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=max_tokens, echo=True, logprobs=2, stream=stream
    )
    ids = [256, 0xC3, 0xA9, 257, 98]
    produced = answer(ids, max_tokens)
    shown = "é<end>b" if isinstance(prompt, str) else "<bos>é<end>b"
    if stream:
        chunks = [chunk.choices[0] for chunk in given]
        text = "".join(chunk.text for chunk in chunks)
        parts = [chunk.logprobs for chunk in chunks if chunk.logprobs]
    else:
        text, parts = given.choices[0].text, [given.choices[0].logprobs]
        assert given.usage.completion_tokens == max_tokens
    assert text == shown + produced

    def joined(name: str) -> list[Any]:
        return [value for part in parts for value in getattr(part, name)]

    tokens = joined("tokens")
    assert tokens == ["<bos>", "bytes:\\xc3", "bytes:\\xa9", "<end>", "b", *produced]
    assert joined("token_logprobs") == [None, *[-0.25] * (4 + max_tokens)]
    top = joined("top_logprobs")
    assert top[0] is None
    assert top[4] == {"b": -0.25, "c": -0.5}
    assert all(token in alternatives for alternatives, token in zip(top[1:], tokens[1:], strict=True))
    assert top[3] == {
        "\x01": -0.25,
        "\x02": -0.5,
        "<end>": -0.25,
    }  # the token itself, though not among the best
    start = 5 if shown.startswith("<bos>") else 0
    expected = [0, start, start + 1, start + 1, start + 6, *range(start + 7, start + 7 + max_tokens)]
    assert joined("text_offset") == expected


def test_tokens_as_ids(client: openai.OpenAI) -> None:
    extra = {"return_tokens_as_token_ids": True}
    result = client.completions.create(
        model="tiny", prompt=[1, 2], max_tokens=1, logprobs=20, echo=True, extra_body=extra
    )
    logprobs = result.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.top_logprobs is not None
    produced = ord(answer([1, 2], 1))
    assert logprobs.tokens == ["token_id:1", "token_id:2", f"token_id:{produced}"]
    assert len(logprobs.top_logprobs[2]) == 20
    chat = client.chat.completions.create(
        model="tiny", messages=USER, max_tokens=1, logprobs=True, extra_body=extra
    )
    assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
    assert chat.choices[0].logprobs.content[0].token == f"token_id:{ord(answer(RENDERED, 1))}"


def test_no_tokens_wanted(client: openai.OpenAI) -> None:
    result = client.completions.create(model="tiny", prompt="abc", max_tokens=0)
    assert (result.choices[0].text, result.choices[0].logprobs) == ("", None)
    assert result.usage is not None and result.usage.completion_tokens == 0


def test_omitted_max_tokens(client: openai.OpenAI) -> None:
    """OpenAI's 16 for completions; chat answers to the end, where the engine stops."""
    for given in ({}, {"max_tokens": None}):
        result = client.completions.create(model="tiny", prompt="abc", **given)
        assert (len(result.choices[0].text), result.choices[0].finish_reason) == (16, "length")
    [choice] = client.completions.create(model="tiny", prompt=[5] * 636).choices  # of a pool of 640
    assert len(choice.text) == 4
    [choice] = client.completions.create(model="tiny", prompt="abc", extra_body={"min_tokens": 20}).choices
    assert len(choice.text) == 20
    chat = client.chat.completions.create(model="tiny", messages=USER)
    assert len(chat.choices[0].message.content or "") == 40


def test_content_parts(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": text} for text in ("a", "b")]}]
    result = client.chat.completions.create(model="tiny", messages=messages, max_tokens=3)
    assert result.choices[0].message.content == answer([BOS, *b"user: a|b\nassistant:"], 3)


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_text_the_tokenizer_refuses(server: ServerThread, path: str) -> None:
    response = http.post(server.url + path, json={"prompt": "BADTEXT"})
    assert response.status_code == 400
    assert response.json()["error"] == {
        "message": "the tokenizer failed on this text",
        "type": "invalid_request_error",
        "param": "prompt",
        "code": "text_refused",
    }


def test_engine_refusals_and_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="the engine refuses this"):
        client.completions.create(model="tiny", prompt="REFUSE", max_tokens=2)
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="tiny", prompt="NAN", max_tokens=2)
    assert caught.value.code == "model_numerical_error"
    assert "NaN in layer 17 mlp.down_proj (int4) at token 42" in caught.value.message
    assert f"report with id {caught.value.response.headers['x-request-id']}" in caught.value.message
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="tiny", prompt="ODDERROR", max_tokens=2)
    assert caught.value.code == "internal" and "secret" not in caught.value.message


def test_errors_of_a_stream_before_its_first_token_are_statuses(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="tiny", prompt="NAN", max_tokens=2, stream=True)
    assert caught.value.code == "model_numerical_error"


def test_tokenize_and_back(server: ServerThread) -> None:
    def post(path: str, body: dict[str, Any]) -> Any:
        return http.post(server.url + path, json=body).json()

    assert post("/tokenize", {"prompt": "é<end>"}) == {
        "count": 4,
        "max_model_len": 1000,
        "tokens": [256, 0xC3, 0xA9, 257],
    }
    assert post("/tokenize", {"prompt": "a", "add_special_tokens": False})["tokens"] == [97]
    assert post("/tokenize", {"messages": USER})["tokens"] == RENDERED
    assert post("/detokenize", {"tokens": [256, 0xC3, 0xA9]})["text"] == "<bos>é"
    assert post("/detokenize", {"tokens": [256, 98], "skip_special_tokens": True})["prompt"] == "b"
    several = post("/tokenize", {"prompt": ["é", ""], "add_special_tokens": False, "return_token_strs": True})
    assert (several["count"], several["tokens"]) == ([2, 0], [[0xC3, 0xA9], []])
    assert several["token_strs"] == [["bytes:\\xc3", "bytes:\\xa9"], []]
    assert post("/tokenize", {"prompt": "a", "return_token_strs": True})["token_strs"] == ["<bos>", "a"]
    assert post("/tokenize", {"prompt": []}) == {"count": [], "max_model_len": 1000, "tokens": []}
    tool = {"type": "function", "function": {"name": "f"}}
    shown, hidden = (
        post("/tokenize", {"messages": USER, "tools": [tool], "tool_choice": choice})["tokens"]
        for choice in ("auto", "none")
    )
    assert len(shown) > len(hidden) and hidden == RENDERED, "as the chat endpoint has it"
    assert post("/detokenize", {"tokens": [[97], [], [98, 99]]})["text"] == ["a", "", "bc"]
    assert post("/detokenize", {"tokens": []})["text"] == ""
    mixed = post("/detokenize", {"tokens": [97, [98]]})["error"]
    assert mixed["message"] == "tokens must be ids, or lists of ids"
    assert "give either" in post("/tokenize", {})["error"]["message"]
    assert "258 is no token id" in post("/detokenize", {"tokens": [258]})["error"]["message"]
    assert "tokens[0] must be int" in post("/detokenize", {"tokens": ["x"]})["error"]["message"]


def test_tokenizer_info(server: ServerThread) -> None:
    info = http.get(server.url + "/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"], info["add_bos_token"]) == ("<bos>", "<end>", True)
    assert (info["chat_template"], info["model_max_length"]) == (
        "lines; reads reasoning_effort",
        1000,
    )
    with serving(model="no-template") as running:
        assert http.get(running.url + "/tokenizer_info").json()["chat_template"] is None


@pytest.mark.parametrize("echo", [False, True])
def test_token_ids(server: ServerThread, client: openai.OpenAI, echo: bool) -> None:
    """As vLLM has them: the prompt's once, and each token of the answer in exactly one chunk."""
    ids: Any = {"return_token_ids": True}
    asked: Any = {"model": "tiny", "prompt": ["ab", "c"], "max_tokens": 7, "echo": echo, "extra_body": ids}
    whole = client.completions.create(**asked, n=2)
    prompts = [[BOS, 97, 98]] * 2 + [[BOS, 99]] * 2
    got: Any = [choice.model_extra for choice in whole.choices]
    assert [one["prompt_token_ids"] for one in got] == prompts
    assert [bytes(one["token_ids"]).decode() for one in got] == [choice.text[-7:] for choice in whole.choices]
    told: dict[int, list[list[int]]] = {}
    streamed: dict[int, list[int]] = {}
    for chunk in client.completions.create(**asked, n=2, stream=True):
        [choice] = chunk.choices
        extra: Any = choice.model_extra
        streamed.setdefault(choice.index, []).extend(extra["token_ids"])
        if "prompt_token_ids" in extra:
            told.setdefault(choice.index, []).append(extra["prompt_token_ids"])
    assert [streamed[index] for index in range(4)] == [one["token_ids"] for one in got]
    assert [told[index] for index in range(4)] == [[prompt] for prompt in prompts]
    plain = client.completions.create(model="tiny", prompt="x", max_tokens=1).choices[0]
    assert not {"token_ids", "prompt_token_ids"} & (plain.model_extra or {}).keys()


def test_token_ids_of_chats(client: openai.OpenAI) -> None:
    asked: Any = {
        "model": "tiny",
        "messages": USER,
        "max_tokens": 7,
        "extra_body": {"return_token_ids": True},
    }
    whole: Any = client.chat.completions.create(**asked)
    assert whole.model_extra["prompt_token_ids"] == RENDERED
    tokens = whole.choices[0].model_extra["token_ids"]
    assert bytes(tokens).decode() == whole.choices[0].message.content
    chunks: Any = list(client.chat.completions.create(**asked, stream=True))
    assert [chunk.model_extra.get("prompt_token_ids") for chunk in chunks] == [RENDERED] + [None] * (
        len(chunks) - 1
    )
    assert [token for chunk in chunks for token in chunk.choices[0].model_extra["token_ids"]] == tokens


def test_template_variables_of_the_server() -> None:
    given = '{"enable_thinking": false, "style": "short"}'
    with serving(default_chat_template_kwargs=given) as running:
        ids = [
            http.post(f"{running.url}/tokenize", json={"messages": USER, "chat_template_kwargs": own}).json()
            for own in ({}, {"style": "long"})
        ]
    for answered, style in zip(ids, ("short", "long"), strict=True):
        shown = bytes(answered["tokens"][1:]).decode()
        assert shown == f"enable_thinking=False\nstyle={style}\nuser: hello\nassistant:"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is not JSON"),
        ("[" * 5000 + "]" * 5000, "is not JSON"),
        ("[1]", "must be a JSON object"),
        ('{"messages": 1}', "may not set 'messages'"),
    ],
    ids=["text", "deep", "list", "reserved"],
)
def test_template_variables_that_make_no_sense(text: str, told: str) -> None:
    with pytest.raises(LowbitError) as caught:
        template_variables(text)
    assert caught.value.code == "E0103" and told in caught.value.message


def test_usage_of_streams_that_do_not_ask() -> None:
    body: dict[str, Any] = {"prompt": "x", "max_tokens": 3, "stream": True}
    with serving(stream_response_default_include_usage=True) as running:
        texts = [
            http.post(f"{running.url}/v1/completions", json={**body, "stream_options": options}).text
            for options in (None, {"include_usage": False}, {"continuous_usage_stats": True})
        ]
    for text in texts:
        *_, last, done, end = text.split("\n\n")
        assert '"choices":[],"usage":{"prompt_tokens":2,"completion_tokens":3' in last
        assert (done, end) == ("data: [DONE]", "")
    assert texts[0].count('"usage":null') == texts[1].count('"usage":null') >= 1
    assert '"usage":null' not in texts[2]


def test_info(server: ServerThread) -> None:
    info = http.get(server.url + "/get_model_info").json()
    assert info["is_generation"] is True
    assert (info["model_path"], info["context_length"], info["kernel"]) == ("tiny", 1000, "none")
    assert info["preferred_sampling_params"] == {"temperature": 0.5, "top_k": 7}
    info = http.get(server.url + "/get_server_info").json()
    assert info["state"] == "ready" and info["max_total_num_tokens"] == 640
    assert "api_key" not in info and "api_key_file" not in info


def test_health(server: ServerThread) -> None:
    assert http.get(server.url + "/health").json() == {"status": "ready"}
    assert http.get(server.url + "/livez").status_code == 200
    assert http.get(server.url + "/health_generate").json() == {"status": "ok"}
    server.assert_idle()


def test_many_clients_at_once(server: ServerThread) -> None:
    """Each gets its own answer, streamed or not."""

    async def one(client: openai.AsyncOpenAI, index: int) -> bool:
        text = f"client {index}"
        expected = answer([BOS, *text.encode()], 20)
        if index % 2:
            result = await client.completions.create(model="tiny", prompt=text, max_tokens=20)
            return result.choices[0].text == expected
        stream = await client.completions.create(model="tiny", prompt=text, max_tokens=20, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream]) == expected

    async def all_of_them() -> list[bool]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            return await asyncio.gather(*(one(client, index) for index in range(48)))

    assert all(asyncio.run(all_of_them()))
    server.assert_idle()


def test_model_without_a_template() -> None:
    with serving(model="no-template") as running:
        response = http.post(f"{running.url}/v1/chat/completions", json={"messages": USER})
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "no_chat_template"
        assert response.json()["error"]["message"] == (
            "this model has no chat template; use /v1/completions or start with --chat-template chatml"
        )


def test_salts_separate_callers() -> None:
    from lowbit.server.generation import salt_of

    class Caller:
        def __init__(self, salt: str) -> None:
            self.cache_salt = salt

    salts = {salt_of(Caller(key), wish) for key in ("", "k1", "k2") for wish in ("", "s1")}  # type: ignore[arg-type]
    assert len(salts) == 6 and "" in salts
    assert all(len(salt) == len(hashlib.sha256().hexdigest()) for salt in salts - {""})
