"""The JSON reader refuses what two readers could understand differently."""

from __future__ import annotations

import json
import math
import time

import pytest

from lowbit.server.api_error import ApiError
from lowbit.server.strict_json import MAX_DEPTH, depth_exceeds, parse


@pytest.mark.parametrize(
    "text",
    ['{"a": [1, -2.5e3, "x\\n\\u00e9", true, null], "b": {}}', "[]", '"[[{{"', "12", '{"": {"a": "]"}}'],
)
def test_reads_what_json_reads(text: str) -> None:
    assert parse(text.encode()).value == json.loads(text)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"a": 1, "a": 1}', "'a' occurs twice"),
        (b'{"x": {"b": 1, "c": 2, "b": 3}}', "'b' occurs twice"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b'{"a": "\xff"}', "not UTF-8 (byte 7)"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b"{'a': 1}", "not JSON"),
        (b'{"a": 1,}', "not JSON"),
        (b'{"a": 1} x', "not JSON"),
        (b'{"a": "\n"}', "not JSON"),
        (b"", "not JSON"),
        (b'{"a": 1' + b"0" * 32 + b"}", "33 digits"),
        (b'{"a": 0.' + b"1" * 31 + b"}", "33 characters"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": -1e999}', "too large"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "64 deep"),
        (b'{"a":[' * 33 + b"]}" * 33, "64 deep"),
        (b"[" * 100_000, "deep"),
        (b'{"a":' * 100_000, "deep"),
    ],
)
def test_refuses(body: bytes, said: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse(body)
    assert caught.value.status == 400
    assert said in caught.value.message


@pytest.mark.parametrize(
    "body", [b"[" * 64 + b"]" * 64, b'{"a":[' * 32 + b"]}" * 32, b'"' + b"[" * 500 + b'"']
)
def test_allowed_depth(body: bytes) -> None:
    parse(body)


def test_brackets_and_quotes_in_strings_do_not_count() -> None:
    text = json.dumps(["[{" * 100, '\\"[[[' * 50, "]" * 200] * 3).encode()
    assert not depth_exceeds(text, 2)
    assert depth_exceeds(b"[[" + text + b"]]", 2)


def test_surrogate_pairs_are_characters() -> None:
    assert parse(b'"\\ud83d\\ude00"').value == "\N{GRINNING FACE}"


@pytest.mark.parametrize("name", ["NaN", "Infinity", "-Infinity"])
def test_not_finite_numbers_wait_for_the_field_checks(name: str) -> None:
    document = parse(f'{{"a": {name}}}'.encode())
    assert not math.isfinite(document.value["a"])
    with pytest.raises(ApiError, match=name):
        document.reject_not_finite()


@pytest.mark.parametrize(
    "body", [b"[]," * 1_000_000, b'{"a":' * 1_000_000, b'"\\' * 1_000_000, b'["' + b"\\\\" * 1_000_000]
)
def test_large_nonsense_is_quick(body: bytes) -> None:
    began = time.thread_time()
    with pytest.raises(ApiError):
        parse(body)
    assert time.thread_time() - began < 2  # whatever else the machine does
