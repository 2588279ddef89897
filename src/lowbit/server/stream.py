"""The events of one HTTP request's sequences: n choices, many prompts.

    client.open(requests) ──▶ Stream ──next()──▶ [(index, TokenEvent), …] until ``unfinished`` is 0

A stream holds as many of the engine's places as it may run at once and feeds the rest in as places come
free, so that a list of a thousand prompts neither fills the queue nor is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from lowbit.engine.messages import Cancel, Request, TokenEvent
from lowbit.server.http import now

if TYPE_CHECKING:
    from lowbit.server.engine_client import EngineClient


class Sequence:
    """One request in the engine, or waiting in its stream for a place."""

    __slots__ = ("index", "last_token", "request", "stream", "submitted")

    def __init__(self, stream: Stream, index: int, request: Request) -> None:
        self.stream = stream
        self.index = index
        self.request = request
        self.submitted = 0.0  # when it went to the engine; 0 = not yet
        self.last_token = 0.0


class Stream:
    """The events of one HTTP request's sequences, in the order they happen. One reader."""

    def __init__(self, client: EngineClient, requests: list[Request], places: int) -> None:
        self._client = client
        self._waiting = deque(Sequence(self, index, request) for index, request in enumerate(requests))
        self._running: dict[str, Sequence] = {}
        self._events: deque[tuple[int, TokenEvent]] = deque()
        self._arrived = asyncio.Event()
        self._pending_bytes = 0
        self._on_overflow: Callable[[], None] | None = None
        self.places = places  # of the engine's that this stream holds
        self.unfinished = len(requests)
        self.begun = False  # the engine has begun with one of them
        self.created = now()

    @property
    def has_news(self) -> bool:
        """Whether ``next`` would return at once."""
        return bool(self._events)

    async def next(self, timeout: float) -> list[tuple[int, TokenEvent]]:
        """All (index, event) that are there, after waiting ``timeout`` seconds at most; [] is silence."""
        if not self._events:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._arrived.wait()
        events = list(self._events)
        self._events.clear()
        self._arrived.clear()
        self._pending_bytes = 0
        return events

    def watch_overflow(self, on_overflow: Callable[[], None] | None) -> None:
        """While the reader is busy sending: whom to tell when more than ``pending_bytes`` pile up."""
        self._on_overflow = on_overflow

    def close(self) -> None:
        """Forget everything that is not finished; frees the places."""
        for sequence in list(self._running.values()):
            self._client.send([Cancel(sequence.request.id)])
            self._client.forget(sequence)
        self._running.clear()
        self._waiting.clear()
        self.unfinished = 0
        self._client.release(self)

    def fill(self) -> None:
        """Submit sequences while there are places."""
        while self._waiting and len(self._running) < self.places:
            sequence = self._waiting.popleft()
            self._running[sequence.request.id] = sequence
            self._client.submit(sequence)

    def put(self, sequence: Sequence, event: TokenEvent) -> None:
        """News of one sequence."""
        self._events.append((sequence.index, event))
        self._arrived.set()
        self._pending_bytes += _weight(event)
        if event.finish_reason is not None:
            self._running.pop(sequence.request.id, None)
            self.unfinished -= 1
            self.fill()
            self.places = len(self._running)
        if self._on_overflow and self._pending_bytes > self._client.limits.pending_bytes:
            self._on_overflow()

    def fail(self, code: str, message: str) -> None:
        """End every unfinished sequence with an error event; the engine is told to forget them."""
        sequences = [*self._running.values(), *self._waiting]
        self._client.send([Cancel(request_id) for request_id in self._running])
        self._running.clear()
        self._waiting.clear()
        for sequence in sequences:
            self._client.forget(sequence)
            event = TokenEvent(
                id=sequence.request.id,
                finish_reason="error",
                error=message,
                error_code=code,
                prompt_tokens=len(sequence.request.prompt),
            )
            self.put(sequence, event)


def _weight(event: TokenEvent) -> int:
    """Bytes that an event keeps in memory where its reader is slow, roughly. What is said of its prompt comes
    once, whoever reads."""
    return 64 + len(event.text) + 64 * len(event.logprobs)
