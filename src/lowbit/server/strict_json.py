"""JSON that means the same to everybody: what other readers disagree on is an error here.

Refused: a byte order mark, bad UTF-8, duplicate keys, more than 64 levels, numbers of more than 32
characters, numbers outside the float range, lone surrogates. NaN and Infinity are no JSON either, but they
are let through to the range checks first, so that the message can name the field; ``parse`` reports them.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from lowbit.errors import printable
from lowbit.server.api_error import ApiError, bad_request

MAX_DEPTH = 64
MAX_NUMBER = 32

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_ALIKE = bytes.maketrans(b"{}", b"[]")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


@dataclass(frozen=True)
class Document:
    """A parsed body. ``not_finite``: a NaN or Infinity it spelled, if any."""

    value: Any
    not_finite: str | None

    def reject_not_finite(self) -> None:
        """To be called when the checks that could have named the field are through."""
        if self.not_finite:
            raise bad_request("invalid_number", f"the body contains {self.not_finite}, which is not JSON")


def parse(body: bytes) -> Document:
    """The value of ``body``."""
    if body.startswith(b"\xef\xbb\xbf"):
        raise bad_request("invalid_json", "the body starts with a byte order mark; send plain UTF-8")
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise bad_request("invalid_json", f"the body is not UTF-8 (byte {error.start})") from None
    if depth_exceeds(body, MAX_DEPTH):
        raise _too_deep()
    not_finite: list[str] = []

    def constant(name: str) -> float:
        not_finite.append(name)
        return float(name)

    try:
        value = json.loads(
            text,
            parse_constant=constant,
            parse_int=_integer,
            parse_float=_real,
            object_pairs_hook=_object,
        )
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise bad_request("invalid_json", f"the body is not JSON: {error.msg} at {where}") from None
    except RecursionError:  # unbalanced brackets in great number
        raise _too_deep() from None
    if "\\u" in text:
        _reject_lone_surrogates(value)
    return Document(value, not_finite[0] if not_finite else None)


def _too_deep() -> ApiError:
    return bad_request("invalid_json", f"the body is nested more than {MAX_DEPTH} deep")


def depth_exceeds(body: bytes, limit: int) -> bool:
    """Whether brackets nest deeper than ``limit``, without recursion and in linear time.

    Strings are removed, then everything but brackets, and all brackets made alike; each pass then peels off
    the innermost level: "[[][]]" -> "[]" -> "". What is unbalanced is left to the parser's message.
    """
    if body.count(b"[") + body.count(b"{") <= limit:
        return False
    brackets = _STRING.sub(b"", body).translate(_ALIKE, _NOT_BRACKETS)
    for _ in range(limit):
        if not brackets:
            return False
        brackets = brackets.replace(b"[]", b"")
    return b"[]" in brackets


def _integer(digits: str) -> int:
    if len(digits) > MAX_NUMBER:
        raise bad_request("invalid_number", f"a number of {len(digits)} digits; limit {MAX_NUMBER}")
    return int(digits)


def _real(digits: str) -> float:
    if len(digits) > MAX_NUMBER:
        raise bad_request("invalid_number", f"a number of {len(digits)} characters; limit {MAX_NUMBER}")
    number = float(digits)
    if not math.isfinite(number):
        raise bad_request("invalid_number", f"the number {digits} is too large")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise bad_request("invalid_json", f"the key '{printable(key)}' occurs twice in one object")
            seen.add(key)
    return value


def _reject_lone_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=True).encode()
    except UnicodeEncodeError:
        raise bad_request("invalid_json", "a string contains half a surrogate pair (\\ud800 …)") from None
