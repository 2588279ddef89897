"""Special and added tokens as the small files of a folder name them.

    tokenizer_config.json     "bos_token": "<s>" or {"content": "<s>", …}; since 2023 "added_tokens_decoder"
                              {"32000": {"content": …, "special": true, …}, …}
    special_tokens_map.json   the same names, and "additional_special_tokens": [texts]
    added_tokens.json         {"<|im_start|>": 32000, …}, before there was added_tokens_decoder

tokenizer.json lists its added tokens itself.
"""

from __future__ import annotations

import re

from lowbit.checkpoint.documents import read_json
from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError, printable

Json = dict[str, object]


def named_tokens(header: CheckpointHeader) -> dict[str, str]:
    """Name ("bos_token") -> text; where both files have a name, tokenizer_config.json's counts."""
    found: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        values = read_json(header, file) or {}
        extra = values.get("extra_special_tokens")
        for name, value in (values | (extra if isinstance(extra, dict) else {})).items():
            text = _text(value)
            if name.endswith("_token") and text is not None:
                found[name] = text
    return found


def added_tokens(header: CheckpointHeader, vocabulary: Json) -> list[Json]:
    """As tokenizer.json lists them, for a vocabulary (token -> number) that has none of its own.

    A token that has a name is special, and one of ``vocabulary`` keeps the number it has there. One with the
    number of another takes its place: InternLM2's <|im_end|> is one of the vocabulary's unused tokens.
    """
    config = read_json(header, "tokenizer_config.json") or {}
    special = set(named_tokens(header).values())
    for values in (config, read_json(header, "special_tokens_map.json") or {}):
        for listed in (values.get("additional_special_tokens"), values.get("extra_special_tokens")):
            special |= {str(_text(token)) for token in (listed if isinstance(listed, list) else ())}
    found = {text: _entry(text, vocabulary[text]) for text in special & vocabulary.keys()}
    for text, number in (read_json(header, "added_tokens.json") or {}).items():
        found[text] = _entry(text, number)
    decoder = config.get("added_tokens_decoder")
    for key, token in (decoder if isinstance(decoder, dict) else {}).items():
        name = _text(token)
        if name is None or not isinstance(token, dict) or not re.fullmatch("[0-9]{1,9}", key):
            raise LowbitError(
                "E0254",
                f"tokenizer_config.json: added_tokens_decoder: token {printable(key)} is "
                f"{printable(repr(token))}, expected an object with content",
            )
        flags = {flag: token[flag] for flag in _FLAGS if isinstance(token.get(flag), bool)}
        found[name] = _entry(name, int(key)) | flags
    for text, entry in found.items():
        entry["id"] = vocabulary.get(text, entry["id"])
        if text in special:
            entry |= {"special": True, "normalized": False}
    return list(found.values())


_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def _entry(text: str, number: object) -> Json:
    flags = dict.fromkeys(_FLAGS, False) | {"normalized": True}
    return {"id": number, "content": text, **flags}


def _text(value: object) -> str | None:
    """A token written as a string or as {"content": …}."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
