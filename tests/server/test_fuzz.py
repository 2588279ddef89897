"""Seeded nonsense: each answer is a result or a well-formed refusal, never "internal"; nothing is left."""

from __future__ import annotations

import json
import random
from typing import Any

import httpx
import pytest

from lowbit.server.protocol import IGNORED, UNSUPPORTED
from server.harness import quick, serving

CASES = 400
PATHS = {
    "/v1/chat/completions": {
        "model": "tiny",
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": [{"type": "text", "text": "x"}]},
        ],
        "max_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 2,
        "stop": ["a", "b"],
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 2,
        "logit_bias": {"5": 1},
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": "auto",
        "chat_template_kwargs": {"a": 1},
    },
    "/v1/completions": {
        "prompt": ["a", "b"],
        "max_tokens": 2,
        "echo": True,
        "logprobs": 1,
        "seed": 5,
        "stop_token_ids": [1],
        "min_tokens": 1,
        "stream": False,
    },
    "/tokenize": {"prompt": "x", "add_special_tokens": False},
    "/detokenize": {"tokens": [1, 2, 3]},
}
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2**31,
        -(2**63),
        2**64,
        10**31,
        0.5,
        1e308,
        -0.0,
        "",
        "x",
        "\x00",
        "é" * 300,
    ),
    *(
        [],
        {},
        [[]],
        [{}],
        [1, "a"],
        {"a": {}},
        {"1": 1e30},
        [None],
        [[1, 2], [3]],
        "\ud83d\ude00",
        ["x"] * 20,
    ),
    *(
        {"type": "text"},
        [{"role": "user"}],
        {"role": "user", "content": {}},
        "NaN",
        [True],
        [1.5],
        [-5],
        ["\n"],
    ),
]


def mutated(value: Any, source: random.Random) -> Any:
    """``value`` with one place changed."""
    if source.random() < 0.25 or not isinstance(value, (dict, list)) or not value:
        return source.choice(VALUES)
    if isinstance(value, dict):
        name = source.choice(list(value))
        change = source.random()
        rest = {key: item for key, item in value.items() if key != name}
        if change < 0.15:
            return rest
        if change < 0.3:
            return rest | {source.choice([name + "s", *IGNORED, *UNSUPPORTED]): source.choice(VALUES)}
        return rest | {name: mutated(value[name], source)}
    index = source.randrange(len(value))
    return [*value[:index], mutated(value[index], source), *value[index + 1 :]]


def damaged(data: bytes, source: random.Random) -> bytes:
    """Some bytes of ``data`` changed, removed or repeated."""
    result = bytearray(data)
    for _ in range(source.randint(1, 4)):
        place = source.randrange(len(result) or 1)
        match source.randrange(3):
            case 0:
                result[place : place + 1] = bytes([source.randrange(256)])
            case 1:
                del result[place : place + source.randint(1, 8)]
            case _:
                result[place:place] = result[place : place + source.randint(1, 30)]
    return bytes(result)


@pytest.mark.parametrize("path", PATHS)
def test_nonsense(path: str) -> None:
    source = random.Random(path)
    statuses = set()
    with serving(quick(), max_queued_requests=4000) as server, httpx.Client(base_url=server.url) as client:
        pid = server.engine_pid()
        for number in range(CASES // len(PATHS)):
            body = json.dumps(mutated(PATHS[path], source)).encode()
            if number % 3 == 0:
                body = damaged(body, source)
            response = client.post(path, content=body, timeout=20)
            statuses.add(response.status_code)
            assert response.status_code in (200, 400, 404), (body, response.text)
            if response.status_code != 200:
                error = response.json()["error"]
                assert error["code"] not in ("internal", None) and error["message"], body
            elif response.headers["content-type"].startswith("text/event-stream"):
                assert response.text.endswith("data: [DONE]\n\n") and "error" not in response.text, body
        assert server.engine_pid() == pid
        server.assert_idle()
    assert {200, 400} <= statuses
