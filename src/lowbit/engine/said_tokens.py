"""SaidTokens: which tokens a sequence holds, each once, and how often its output has it: what penalties ask.

A vocabulary has a hundred times as many tokens as most sequences: only those that occur are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class SaidTokens:
    """Of a prompt and what followed it."""

    def __init__(self, prompt: Iterable[int], output: Iterable[int]) -> None:
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        capacity = 2 * len(self._places) + 64
        self._ids = np.zeros(capacity, dtype=np.int64)
        self._ids[: len(self._places)] = list(self._places)
        self._counts = np.zeros(capacity, dtype=np.int32)
        for token in output:
            self.add(token)

    def add(self, token: int) -> None:
        """It was said once more."""
        place = self._places.get(token)
        if place is None:
            place = self._places[token] = len(self._places)
            if place == len(self._ids):
                self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._ids[place] = token
        self._counts[place] += 1

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 (n,): the tokens of prompt and output; int32 (n,): how often each stands in the output."""
        count = len(self._places)
        return self._ids[:count], self._counts[:count]
