"""tokenizer.model, SentencePiece's own file, as the tokenizer keys of GGUF metadata.

The file is a protobuf message, ModelProto (sentencepiece_model.proto):

    1 pieces            a message for each token: 1 piece, 2 score, 3 type (numbered as in GGUF)
    2 trainer_spec      3 model_type (1 unigram, 2 BPE), 24 treat_whitespace_as_suffix,
                        40 to 43 the ids of the unknown token, BOS, EOS and padding
    3 normalizer_spec   2 precompiled_charsmap, 3 add_dummy_prefix, 4 remove_extra_whitespaces,
                        5 escape_whitespaces

A field is its number times 8 plus its kind as a variable-length integer, then what the kind says: such an
integer (0), 8 bytes (1), a length and as many bytes (2) or 4 bytes (5).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

from lowbit.errors import LowbitError, printable

MAX_PIECES = 1 << 20
MAX_PIECE = 512  # bytes; SentencePiece itself makes none longer
_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5
_KINDS = {1: "t5", 2: "llama"}  # model_type -> GGUF's name; words (3) and characters (4) are in no LLM
_IDS = {"unknown": (40, 0), "bos": (41, 1), "eos": (42, 2), "padding": (43, -1)}  # field, its default
_TYPES = range(1, 7)
_NOTHING, _ZERO = b"", struct.pack("<f", 0.0)  # of fields that are not there

Value = int | bytes


def sentencepiece_metadata(data: bytes, place: str) -> dict[str, object]:
    """``tokenizer.ggml.*`` keys; ``place``: the file, for messages."""
    message = _Message(place)
    tokens: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, Value] = {}
    normalizer: dict[int, Value] = {}
    for number, value in message.fields(data):
        if number == 1:
            piece, score, kind = message.piece(value, len(tokens))
            tokens.append(piece)
            scores.append(score)
            types.append(kind)
        elif number == 2:
            trainer |= dict(message.fields(value))
        elif number == 3:
            normalizer |= dict(message.fields(value))
    if not tokens or len(set(tokens)) != len(tokens):
        raise message.fail("no pieces in it" if not tokens else "two pieces have the same text")
    model = _KINDS.get(message.number(trainer, 3, 1))
    plain = message.number(trainer, 24, 0) == 0 and message.number(normalizer, 5, 1) == 1
    if model is None or not plain:
        what = "spaces behind words, or left as they are," if model else "words or characters as tokens"
        raise message.fail(f"a model with {what} is not supported; pass --tokenizer with a tokenizer.json")
    found: dict[str, object] = {
        "model": model,
        "tokens": tokens,
        "scores": scores,
        "token_type": types,
        "add_space_prefix": message.number(normalizer, 3, 1) == 1,
        "remove_extra_whitespaces": message.number(normalizer, 4, 1) == 1,
        "precompiled_charsmap": list(message.part(normalizer.get(2, _NOTHING))),
    }
    for name, (field, absent) in _IDS.items():
        number = message.number(trainer, field, absent)
        if 0 <= number < len(tokens):
            found[f"{name}_token_id"] = number
        elif name == "unknown":
            raise message.fail(f"the unknown token is piece {number} of {len(tokens)}")
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


class _Message:
    """Reads fields, never past the end of what they are in."""

    def __init__(self, place: str) -> None:
        self.place = place

    def fail(self, what: str) -> LowbitError:
        return LowbitError("E0254", f"{self.place}: {what}")

    def fields(self, value: Value) -> Iterator[tuple[int, Value]]:
        """(number, value) of a message's fields; 4 and 8 bytes as they are."""
        data, at = self.part(value), 0
        while at < len(data):
            key, at = self._varint(data, at)
            kind = key & 7
            if kind == _VARINT:
                number, at = self._varint(data, at)
                yield key >> 3, number
                continue
            if kind == _BYTES:
                length, at = self._varint(data, at)
            elif kind in (_EIGHT, _FOUR):
                length = 8 if kind == _EIGHT else 4
            else:
                raise self.fail(f"a field of kind {kind}, unknown in protobuf; it is no SentencePiece model")
            if length > len(data) - at:
                raise self.fail(f"a field of {length} bytes where {len(data) - at} are left; it is damaged")
            yield key >> 3, data[at : at + length]
            at += length

    def _varint(self, data: bytes, at: int) -> tuple[int, int]:
        """The integer at ``at``, and where it ends: 7 bits a byte, the lowest first."""
        if at < len(data) and data[at] < 128:  # as most are
            return data[at], at + 1
        value = 0
        for place in range(at, min(at + 10, len(data))):
            byte = data[place]
            value |= (byte & 127) << (7 * (place - at))
            if byte < 128:
                return value & (1 << 64) - 1, place + 1
        raise self.fail("a number that does not end; the file is damaged")

    def part(self, value: Value) -> bytes:
        if isinstance(value, int):
            raise self.fail("a number where a message or text belongs; it is no SentencePiece model")
        return value

    def number(self, fields: dict[int, Value], field: int, absent: int) -> int:
        """A signed number of 32 bits."""
        value = fields.get(field, absent)
        if not isinstance(value, int):
            raise self.fail(f"field {field} of its settings is no number; it is no SentencePiece model")
        value &= (1 << 32) - 1
        return value - (1 << 32) if value >= 1 << 31 else value

    def piece(self, value: Value, index: int) -> tuple[str, float, int]:
        """Text, score and type of a token."""
        if index >= MAX_PIECES:
            raise self.fail(f"more than {MAX_PIECES} pieces")
        found = dict(self.fields(value))
        raw, score = self.part(found.get(1, _NOTHING)), self.part(found.get(2, _ZERO))
        kind = self.number(found, 3, 1)
        if not 0 < len(raw) <= MAX_PIECE or len(score) != 4 or kind not in _TYPES:
            raise self.fail(f"piece {index} has {len(raw)} bytes, a score of {len(score)} and type {kind}")
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            raise self.fail(f"piece {index} is {printable(repr(raw))}, which is no UTF-8") from None
        (number,) = struct.unpack("<f", score)
        if not math.isfinite(number):
            raise self.fail(f"piece {index}, {printable(repr(text))}, has score {number}")
        return text, number, kind
