"""Sequence: one request on its way. Its state is two counters and what is in flight; the rest is derived."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from lowbit.engine.detokenizer import IncrementalDetokenizer
from lowbit.engine.messages import Request, SamplingParams, TokenLogprob
from lowbit.engine.said_tokens import SaidTokens
from lowbit.engine.speculation import Drafter
from lowbit.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True)
class Flight:
    """A sequence's part of a step that was launched and whose results nobody has looked at.

    ``start``: tokens computed before it; ``row``: of the logits that its next token is chosen from, or -1.
    """

    start: int
    row: int


@dataclass(eq=False)
class Sequence:
    """``tokens``: prompt and output so far. ``computed``: how many tokens have K and V in ``pages``, or will
    have when the steps in ``flights`` are done, oldest first; that may be one more than are known.

    ``limit``: tokens it may reach in all. ``stop_ids``: ids that end it.
    """

    request: Request
    limit: int
    stop_ids: frozenset[int]
    detokenizer: IncrementalDetokenizer
    tokens: list[int]
    seed: int
    computed: int = 0
    flights: list[Flight] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    slot: int = -1  # where recurrent layers keep its state while it runs
    cached_tokens: int = 0  # prompt tokens that came from the prefix cache, when first admitted
    admitted: bool = False
    awaited: Sequence | None = None  # whose prompt it waits for, to share it
    passed: int = 0  # how many later arrivals were admitted before it
    announced: bool = False  # whether its first event is out
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    said: SaidTokens | None = None  # where penalties need it
    drafter: Drafter | None = None  # where drafts are wanted
    drafts: int = 0  # computed so far
    accepted_drafts: int = 0  # of them

    @classmethod
    def start(
        cls, request: Request, limit: int, stop_ids: frozenset[int], tokenizer: Tokenizer, seed: int | None
    ) -> Sequence:
        """A sequence that has computed nothing."""
        sampling = request.sampling
        own = sampling.seed if sampling.seed is not None else seed
        return cls(
            request,
            limit,
            frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else stop_ids),
            IncrementalDetokenizer(tokenizer, sampling, request.prompt),
            list(request.prompt),
            secrets.randbits(63) if own is None else own & (1 << 63) - 1,
        )

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.id

    @property
    def sampling(self) -> SamplingParams:
        """How its tokens are chosen."""
        return self.request.sampling

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def output_length(self) -> int:
        """Tokens generated."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def length(self) -> int:
        """Tokens, those included that steps in flight are choosing."""
        known = len(self.tokens)
        return known + sum(flight.row >= 0 for flight in self.flights) if self.flights else known

    @property
    def pending(self) -> int:
        """Tokens without K and V: 1 while decoding, more while the prompt is computed."""
        return self.length - self.computed

    @property
    def sound(self) -> int:
        """Tokens whose K and V are computed, in steps that somebody has looked at."""
        return min(self.computed, self.flights[0].start) if self.flights else self.computed

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt rows' logits are still needed."""
        return self.sampling.prompt_logprobs is not None and len(self.prompt_logprobs) < self.prompt_length


def mixed(number: int) -> int:
    """A seed of 64 bits that looks drawn, for each number another (SplitMix64: Steele et al., 2014)."""
    whole = (1 << 64) - 1
    z = number * 0x9E3779B97F4A7C15 & whole
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & whole
    z = (z ^ z >> 27) * 0x94D049BB133111EB & whole
    return z ^ z >> 31
