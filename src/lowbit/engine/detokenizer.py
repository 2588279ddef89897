"""Tokens -> text as it becomes certain: no split characters, no part of a stop string, O(1) a token.

Two windows over the tokens make this work for every decoder, also those that strip a leading space or clean
up: the text of tokens[a:c] minus the text of tokens[a:b] is what tokens[b:c] added in their context. Text is
held back while it ends in half a character (U+FFFD) or in what may become a stop string.
"""

from __future__ import annotations

from lowbit.engine.messages import SamplingParams
from lowbit.tokenization.tokenizer import Tokenizer

_LONGEST_CHARACTER = 8  # tokens a character may be split over before U+FFFD is taken for what it is


class IncrementalDetokenizer:
    """The text of one sequence's output. ``prompt``: what it follows: a decoder that strips a text's first
    space must not strip the output's."""

    def __init__(
        self, tokenizer: Tokenizer, sampling: SamplingParams, prompt: tuple[int, ...] | list[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = sampling.skip_special_tokens
        self._stop = tuple(text for text in sampling.stop if text)
        self._include_stop = sampling.include_stop_str_in_output
        self._longest_stop = max(map(len, self._stop), default=0)
        self._window = list(prompt[-_LONGEST_CHARACTER:])  # tokens from ``a`` on
        if self._window and self._decode(self._window).endswith("�"):
            self._window = []  # the output's first bytes are no end of the prompt's last character
        self._read = len(self._window)  # b - a: window tokens whose text was taken
        self._held = ""  # text that may still become a stop string

    def add(self, tokens: list[int] | tuple[int, ...], *, stops: bool = True) -> tuple[str, str | None]:
        """(text that became certain, the stop string that was matched). After a match nothing follows.

        ``stops``: whether one that these tokens complete counts; else it is text like any other.
        """
        emitted = ""
        for token in tokens:
            self._window.append(token)
            fresh = self._take(final=False)
            if not fresh:
                continue
            text, matched = self._filter(fresh, stops)
            emitted += text
            if matched is not None:
                return emitted, matched
        return emitted, None

    def finish(self) -> str:
        """What was held back, once no token follows."""
        text, matched = self._filter(self._take(final=True), True)
        if matched is None:
            text += self._held
            self._held = ""
        return text

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special=self._skip_special)

    def _take(self, final: bool) -> str:
        """Text of the window's unread tokens, or "" while a character is incomplete."""
        if self._read == len(self._window):
            return ""
        before = self._decode(self._window[: self._read]) if self._read else ""
        whole = self._decode(self._window)
        incomplete = whole.endswith("�") and len(self._window) - self._read < _LONGEST_CHARACTER
        if incomplete and not final:
            return ""
        fresh = whole[len(before) :]
        # Keep the tokens just read as context: a decoder may treat the first token of a text differently.
        if fresh or len(self._window) > 2 * _LONGEST_CHARACTER:
            self._window = self._window[self._read :]
            self._read = len(self._window)
        return fresh

    def _filter(self, fresh: str, stops: bool) -> tuple[str, str | None]:
        """Release what cannot be part of a stop string; cut at the first one found, where it counts."""
        if not self._stop:
            return fresh, None
        text, held = self._held + fresh, len(self._held)
        # What was complete in the text held back did not count.
        places = ((text.find(stop, max(held - len(stop) + 1, 0)), stop) for stop in self._stop)
        found = [(place, stop) for place, stop in places if place >= 0]
        if found and stops:
            # The one that is complete first; of those, the one that begins first.
            place, stop = min(found, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
            self._held = ""
            return text[: place + len(stop)] if self._include_stop else text[:place], stop
        keep = self._possible_start(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def _possible_start(self, text: str) -> int:
        """The longest end of ``text`` that a stop string begins with."""
        for length in range(min(self._longest_stop - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0
