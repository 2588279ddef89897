"""Frames between the HTTP process and the engine process: how messages.py's structs cross a socket.

One frame is one message, so a step's events are many frames in one write:

    ┌────────────────────────┬──────────────────────────────┐
    │ length, uint32 little  │ MessagePack of one struct,   │
    │ endian, ≤ MAX_FRAME    │ tagged by its type           │
    └────────────────────────┴──────────────────────────────┘

The schema is fixed on both sides (msgspec checks every field), so a damaged frame is an error and never
code: there is no pickle here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import msgspec

from lowbit.engine.messages import ToEngine

MAX_FRAME = 64 * 1024 * 1024  # prompt log-probabilities of 128 Ki tokens with 20 alternatives are 40 MB
_LENGTH = struct.Struct("<I")
_ENCODER = msgspec.msgpack.Encoder()

Message = TypeVar("Message")


class Start(msgspec.Struct, frozen=True, tag="start"):
    """The first message to a new engine process: the fields of ``Settings`` it needs, by name.

    It travels here and not on the command line, which every user of the machine can read.
    """

    settings: dict[str, str | int | float | bool | None]


class FrameError(Exception):
    """The other side sent something that is no frame: it is broken and cannot be talked to any more."""


def encode_frames(messages: Iterable[object]) -> bytes:
    """The frames of ``messages``, ready to send."""
    parts: list[bytes] = []
    for message in messages:
        body = _ENCODER.encode(message)
        if len(body) > MAX_FRAME:
            raise FrameError(f"a {type(message).__name__} of {len(body)} bytes, limit {MAX_FRAME}")
        parts += (_LENGTH.pack(len(body)), body)
    return b"".join(parts)


ParentMessage = Start | ToEngine


class FrameDecoder(Generic[Message]):
    """Bytes in, messages out; keeps what is not yet a whole frame."""

    def __init__(self, schema: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(schema)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages completed by ``data``."""
        self._buffer += data
        messages: list[Message] = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > MAX_FRAME:
                raise FrameError(f"a frame of {length} bytes, limit {MAX_FRAME}")
            end = start + _LENGTH.size + length
            if end > len(self._buffer):
                break
            body = bytes(self._buffer[start + _LENGTH.size : end])
            start = end
            try:
                messages.append(self._decoder.decode(body))
            except msgspec.DecodeError as error:
                raise FrameError(f"not a message: {error}") from error
        del self._buffer[:start]
        return messages
