"""The small files beside the weights: config.json, tokenizer files, templates. Bounded and strict.

JSON with a duplicate key, NaN, Infinity or absurd depth is refused with the file's name: what two parsers
may read differently must not decide what a model is.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from lowbit.checkpoint.file_checks import check_regular_file
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError, printable, thousands

MIB = 1 << 20
_LIMITS = {
    **dict.fromkeys(("tokenizer.json", "vocab.json", "tekken.json"), 256 * MIB),
    **dict.fromkeys(("tokenizer.model", "tokenizer.model.v3"), 16 * MIB),
    **dict.fromkeys(("model.safetensors.index.json", "pytorch_model.bin.index.json"), 64 * MIB),
}
_DEFAULT_LIMIT = 4 * MIB
MAX_DEPTH = 64


def _folder(place: CheckpointHeader | Path) -> Path:
    if isinstance(place, CheckpointHeader):
        return place.folder
    return place


def read_bytes(place: CheckpointHeader | Path, name: str, limit: int | None = None) -> bytes | None:
    """The file's bytes, or None where there is no such file."""
    path = _folder(place) / name
    if not path.exists():
        return None
    size = check_regular_file(path)
    allowed = limit or _LIMITS.get(name, _DEFAULT_LIMIT)
    if size > allowed:
        raise LowbitError(
            "E0227", f"{name} is {thousands(size)} bytes, limit {thousands(allowed)}; it is no model's file"
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise LowbitError("E0301", f"{name}: cannot be read: {error.strerror or error}") from None


def read_text(place: CheckpointHeader | Path, name: str) -> str | None:
    """The file as UTF-8 text, or None where there is no such file."""
    data = read_bytes(place, name)
    if data is None:
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LowbitError("E0227", f"{name}: byte {error.start} is no UTF-8; the file is damaged") from None


def read_json(place: CheckpointHeader | Path, name: str) -> dict[str, object] | None:
    """The file as a JSON object, or None where there is no such file."""
    data = read_bytes(place, name)
    if data is None:
        return None
    value = parse_json(data, name)
    if not isinstance(value, dict):
        raise LowbitError("E0227", f"{name} holds a {type(value).__name__}, an object was expected")
    return value


def parse_json(data: bytes, name: str) -> object:
    """Strict JSON; ``name`` is the file for messages."""
    if _depth(data) > MAX_DEPTH:
        raise LowbitError("E0227", f"{name} nests deeper than {MAX_DEPTH}; it is no model's file")
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise LowbitError("E0227", f"{name} is no valid JSON: {printable(error)}") from None


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is too large for a number")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {printable(key)!r} is there twice")
            seen.add(key)
    return made


def _refuse_constant(text: str) -> object:
    raise ValueError(f"{text} is no JSON number")


# Texts, one that never ends too; and what is no bracket.
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_BETWEEN_BRACKETS = re.compile(rb"[^\[\]{}]+")
_OPEN = b"[{"


def _depth(data: bytes) -> int:
    """The deepest nesting, or the first that is too deep, counted without parsing; of large files 0."""
    deepest = level = 0
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return 0  # it cannot be deeper than it has opening brackets
    if len(data) > 8 * MIB:
        # tokenizer.json: a Python scan would take seconds. json.loads itself recurses in C with a limit and
        # raises RecursionError, which is caught.
        return 0
    for byte in _BETWEEN_BRACKETS.sub(b"", _TEXT.sub(b"", data)):
        level += 1 if byte in _OPEN else -1
        if level > deepest:
            deepest = level
            if deepest > MAX_DEPTH:
                break
    return deepest
