"""Speculation: draft tokens looked up in a sequence's own text, to be verified in one step.

The last tokens of a sequence are looked for in its prompt and answer; what followed them there is proposed
as a draft (prompt lookup: Saxena, 2023). One step computes the next token and the drafts, and the engine
chooses every token as it always would; a draft that equals what was chosen saves a step, the first that does
not ends the run (Leviathan et al., 2023, with a draft that has no probabilities of its own). So the answer is
the same, token for token.

Drafts cost time, also the wrong ones. A lookup costs next to nothing, so every sequence follows what a draft
*would* have said, and drafts are computed only as far as it was right lately:

    trust    a moving average of how often the token expected came; after r right ones it is near 1
    length   the last draft is right with probability trust^length; as long as that is worth its time

In a text without copies nothing is right, nothing is drafted, and nothing is lost.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from lowbit.errors import LowbitError, printable
from lowbit.settings import Settings, did_you_mean

# Of all sequences in a step with drafts: near there a step's time becomes linear in its tokens, and a draft
# costs as much as a token of one more sequence. One that runs alone may have more: nobody waits for it.
STEP_TOKENS = 16
# What a token more adds to a step, in steps of one token: 0.2 to 0.3 from 2 to 16 tokens, measured with
# Q4_1 and Q6_K weights on one AVX-512 core. Less where memory is the bound; then drafts are a little too few.
DRAFT_COST = 0.3
CANDIDATES = 16  # earlier occurrences that are compared, the latest first
FIRST_TRUST = 0.5  # enough for a draft of one token when a sequence runs alone
TRUST_RATE = 0.25  # weight of the newest token: a run of copied text is known as one after a few tokens


@dataclass(frozen=True)
class Speculation:
    """``most``: drafts of a sequence in a step. A match is ``shortest`` tokens long or more; longer than
    ``longest`` are not told apart."""

    most: int
    shortest: int
    longest: int

    @classmethod
    def by(cls, settings: Settings) -> Speculation | None:
        """What the settings ask for, or None."""
        if settings.speculative_config is not None:
            if settings.speculative_algorithm is not None:
                raise LowbitError(
                    "E0103", "--speculative-config and --speculative-algorithm say the same thing; use one"
                )
            return _from_config(settings.speculative_config, settings)
        if settings.speculative_algorithm is None:
            return None
        shortest = settings.speculative_ngram_min_match_window_size
        longest = settings.speculative_ngram_max_match_window_size
        return cls(settings.speculative_num_draft_tokens, *_window(shortest, longest, _FLAGS))


_FLAGS = ("--speculative-ngram-min-match-window-size", "--speculative-ngram-max-match-window-size")
_KEYS = {
    "num_speculative_tokens": "speculative_num_draft_tokens",
    "prompt_lookup_min": "speculative_ngram_min_match_window_size",
    "prompt_lookup_max": "speculative_ngram_max_match_window_size",
}


def _window(shortest: int, longest: int, names: tuple[str, str]) -> tuple[int, int]:
    if shortest > longest:
        raise LowbitError("E0103", f"{names[0]} {shortest} is over {names[1]} {longest}; make it smaller")
    return shortest, longest


def _from_config(text: str, settings: Settings) -> Speculation:
    """vLLM's JSON object; what it does not say is as the settings have it."""
    try:
        given = json.loads(text)
    except ValueError as error:
        raise LowbitError("E0103", f"--speculative-config is not JSON: {printable(error)}") from None
    if not isinstance(given, dict):
        raise LowbitError("E0103", f"--speculative-config must be a JSON object, got {printable(text)}")
    method = given.pop("method", None)
    if method != "ngram":
        raise LowbitError(
            "E0105", f"--speculative-config: method {printable(json.dumps(method))}: drafts come from the "
            'sequence\'s own text only; use {"method": "ngram", "num_speculative_tokens": 8}, or drop it'
        )  # fmt: skip
    values = {key: getattr(settings, field) for key, field in _KEYS.items()}
    options = Settings.options()
    for key, value in given.items():
        if key not in _KEYS:
            hint = did_you_mean(key, _KEYS)
            raise LowbitError("E0103", f"--speculative-config: unknown key {printable(key)!r}{hint}")
        high = options[_KEYS[key]].maximum
        assert high is not None, "all three have ranges"
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= high:
            text = f"{key} must be a whole number between 1 and {high:g}, got {printable(repr(value))}"
            raise LowbitError("E0103", f"--speculative-config: {text}")
        values[key] = value
    if "prompt_lookup_min" not in given:  # as vLLM: a maximum alone bounds both
        values["prompt_lookup_min"] = min(values["prompt_lookup_min"], values["prompt_lookup_max"])
    if "prompt_lookup_max" not in given:
        values["prompt_lookup_max"] = max(values["prompt_lookup_min"], values["prompt_lookup_max"])
    low, high = _window(
        values["prompt_lookup_min"], values["prompt_lookup_max"], ("prompt_lookup_min", "prompt_lookup_max")
    )
    return Speculation(values["num_speculative_tokens"], low, high)


def worth(sequences: int) -> float:
    """How sure a draft must be in a step of so many decoding sequences.

    A right one saves what a token costs there, a wrong one has cost DRAFT_COST: alone 0.3 will do, beside
    seven others it takes 0.77, because their tokens have already paid for reading the weights.
    """
    cost = DRAFT_COST
    return cost * sequences / (1 - cost + cost * sequences)


class Drafter:
    """What one sequence may say next. ``tokens`` is the sequence's own list, which only grows."""

    def __init__(self, tokens: list[int], rules: Speculation) -> None:
        self._tokens = tokens
        self._rules = rules
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> the place after its latest occurrence
        self._before = [0] * rules.shortest  # place -> that of the occurrence before, 0 where there is none
        self._source = 0  # the place of the token that is expected next; 0: none is
        self.trust = FIRST_TRUST

    def draft(self, most: int, worth: float) -> tuple[int, ...]:
        """At most ``most`` tokens that may follow, each right with probability ``worth`` at least."""
        self._catch_up()
        if not self._source or self.trust < worth or most < 1:
            return ()
        if self.trust**most < worth:
            most = int(math.log(worth) / math.log(self.trust))  # the largest n with trust^n >= worth
        source, period = self._source, len(self._tokens) - self._source
        # Behind the last token the draft goes on with itself: a text that repeats itself has a period.
        return tuple(self._tokens[source + place % period] for place in range(most))

    def _catch_up(self) -> None:
        """Take in the tokens that came since the last call: O(1) each."""
        tokens, shortest = self._tokens, self._rules.shortest
        for place in range(len(self._before), len(tokens)):
            if self._source:
                right = tokens[self._source] == tokens[place]
                self.trust += (right - self.trust) * TRUST_RATE
                self._source = self._source + 1 if right else 0
            key = tuple(tokens[place - shortest : place])
            self._before.append(self._after.get(key, 0))
            self._after[key] = place
        if not self._source:
            self._source = self._lookup()

    def _lookup(self) -> int:
        """The place after the longest earlier occurrence of the last tokens, of equals the latest; or 0."""
        tokens, rules = self._tokens, self._rules
        last = len(tokens) - 1
        place = self._after.get(tuple(tokens[-rules.shortest :]), 0)
        best = length = 0
        for _ in range(CANDIDATES):
            if not place or length == rules.longest:
                break
            matched = rules.shortest
            while (
                matched < min(rules.longest, place) and tokens[place - 1 - matched] == tokens[last - matched]
            ):
                matched += 1
            if matched > length:
                best, length = place, matched
            place = self._before[place]
        return best
