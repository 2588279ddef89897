"""The model inside the command's own process, for ``lowbit chat`` and ``lowbit generate``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowbit.errors import LowbitError
from lowbit.settings import Settings

if TYPE_CHECKING:
    from lowbit.engine.messages import SamplingParams, TokenEvent
    from lowbit.llm import LLM


def load(settings: Settings) -> LLM:
    """The model, a progress bar on stderr while it loads."""
    from lowbit.commands.console import progress_line
    from lowbit.llm import LLM

    with progress_line() as on_progress:
        return LLM(settings, on_progress=on_progress)


def terminal_text(text: str) -> str:
    """Text of a model, safe to print: a terminal must not obey escape sequences that it wrote."""
    return "".join(
        character
        if character.isprintable() or character in "\n\t"
        else character.encode("unicode_escape").decode()
        for character in text
    )


@dataclass
class Speed:
    """Tokens a second of one answer; the prompt's time is not in it."""

    tokens: int = 0
    first: float = 0.0
    last: float = 0.0

    def count(self, event: TokenEvent) -> None:
        """Take the tokens of an event, which came just now."""
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.tokens += len(event.tokens)

    @property
    def rate(self) -> float:
        """Tokens a second after the first one; 0 where there is no second."""
        return (self.tokens - 1) / (self.last - self.first) if self.last > self.first else 0.0


def stream(llm: LLM, prompt: list[int], sampling: SamplingParams, speed: Speed) -> Iterator[TokenEvent]:
    """The events of one answer; an error event is raised."""
    try:
        for event in llm.stream(prompt, sampling):
            speed.count(event)
            if event.finish_reason == "error":
                raise LowbitError("E0704", f"the engine ended the request: {event.error}")
            yield event
    except LowbitError as error:
        if error.code in ("prompt_too_long", "empty_prompt"):  # the engine's names are those of the API
            raise LowbitError("E0112", error.message) from None
        raise
