"""Every bound of the server in one place. What a request may say is bounded in protocol.py and
request_values.py.

Tests pass a ``Limits`` with shorter times; ``Settings`` holds those that users change.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.settings import Settings

MiB = 1024 * 1024


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes, times in seconds."""

    header_bytes: int = 32 * 1024  # request line and headers together; more: 431
    header_seconds: float = 10.0  # from the first byte (or the connection) to the blank line
    body_seconds: float = 30.0  # from the blank line to the last byte of the body; more: 408
    body_bytes: int = 8 * MiB
    body_chunks: int = 16_384  # pieces of a chunked body: each costs far more than its bytes
    connections: int = 1024
    keep_alive_seconds: float = 15.0
    linger_seconds: float = 2.0  # reading on after an early refusal, so that the client gets to see it
    queued_bytes: int = 256 * MiB  # bodies of all requests in progress

    tokenize_seconds: float = 5.0
    template_seconds: float = 1.0
    queue_seconds: float = 60.0  # from acceptance to the first token's computation
    request_seconds: float = 600.0
    ping_seconds: float = 15.0  # an SSE comment after this much silence finds dead peers
    send_seconds: float = 60.0  # a client that does not read for so long is given up
    pending_bytes: int = 1 * MiB  # … or one for which so much text waits
    drain_seconds: float = 30.0
    health_seconds: float = 20.0  # for /health_generate

    tick_seconds: float = 1.0  # how often deadlines are looked at and the engine is pinged
    hang_dump_seconds: float = 60.0  # a step that does nothing for so long: stack dump, not ready
    hang_kill_seconds: float = 300.0  # … for so long: kill and restart
    restarts: int = 5  # in restart_window_seconds; one more ends the server
    restart_window_seconds: float = 600.0
    stop_seconds: float = 5.0  # for the engine to leave by itself at the end

    @classmethod
    def from_settings(cls, settings: Settings) -> Limits:
        """The defaults with what the user set."""
        return cls(
            body_bytes=settings.max_body_mb * MiB,
            connections=settings.max_connections,
            queue_seconds=settings.queue_timeout,
            request_seconds=settings.request_timeout,
            drain_seconds=settings.drain_timeout,
            hang_dump_seconds=settings.soft_watchdog_timeout,
            hang_kill_seconds=settings.watchdog_timeout,
        )
