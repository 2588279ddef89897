"""What serving is measured in: one figure a kind of load, taken alike of every target.

*Decode* with several streams counts the tokens that came while all of them decoded: from the moment the last
one had its first token until the first one had its last. *With prefill* counts all tokens until the end.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from targets import Answer, Target

PREFILL_TOKENS = 512
SHORT_PROMPT = 32  # tokens before a decode run: short, so that decode is what is timed
PREFIX_TOKENS = 512
LONG_CONTEXTS = (256, 1024)


@dataclass
class Figure:
    """One row of the table."""

    name: str
    unit: str
    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        return max(self.values) - min(self.values)


class Prompts:
    """Random prompts, the same ones in every run."""

    def __init__(self, largest_id: int) -> None:
        self._random = random.Random(2718)
        self._largest = largest_id

    def take(self, count: int, tokens: int) -> list[list[int]]:
        # Small ids are often control tokens.
        return [[self._random.randint(300, self._largest) for _ in range(tokens)] for _ in range(count)]


def assert_same_alone_and_in_a_batch(target: Target, prompts: Prompts) -> None:
    """No speed is worth reporting if a request's tokens change with its neighbours."""
    batch = prompts.take(8, SHORT_PROMPT)
    together = target.complete(batch, 32)[0]
    alone = target.complete(batch[:1], 32)[0]
    if alone.text != together.text or alone.tokens != 32 or together.tokens != 32:
        raise SystemExit(f"greedy answers differ alone and among eight:\n{alone}\n{together}")


def prefill_rate(answers: list[Answer]) -> dict[str, float]:
    """Prompt tokens a second until the first new one."""
    return {"": PREFILL_TOKENS / answers[0].times[0]}


def decode_rate(answers: list[Answer]) -> dict[str, float]:
    """Tokens a second after the first, one stream."""
    times = answers[0].times
    return {"": (len(times) - 1) / (times[-1] - times[0])}


def decode_window_rate(answers: list[Answer]) -> dict[str, float]:
    """All streams' tokens a second while all of them decode."""
    start = max(answer.times[0] for answer in answers)
    end = min(answer.times[-1] for answer in answers)
    if end <= start:
        raise SystemExit("the streams never decoded together: ask for more --decode-tokens")
    counted = sum(start < time <= end for answer in answers for time in answer.times)
    return {"decode": counted / (end - start)}


def stream_rates(answers: list[Answer]) -> dict[str, float]:
    """``decode_window_rate``, and all tokens over all the time."""
    total = sum(answer.tokens for answer in answers) / max(answer.times[-1] for answer in answers)
    return {**decode_window_rate(answers), "with prefill": total}


@dataclass(frozen=True)
class Regime:
    """A kind of load. ``requests``: new prompts for each repeat, or the same again (``repeated``).

    ``one_token``: of each answer only the first token is asked for. ``warm_up``: a prompt that a target with
    a prefix cache is sent first in every repeat, outside the measured time. ``copied_contexts``: who takes
    long over prompts may compute one and copy it, since only decode is measured.
    """

    key: str
    name: str
    requests: Callable[[Prompts], list[list[int]]]
    rates: Callable[[list[Answer]], dict[str, float]]
    one_token: bool = False
    repeated: bool = False
    copied_contexts: bool = False
    warm_up: Callable[[list[list[int]]], list[int]] | None = None

    def figure_name(self, part: str) -> str:
        return f"{self.name}, {part}" if part else self.name


def long_contexts(prompts: Prompts, count: int) -> list[list[int]]:
    """Prompts of lengths spread evenly over ``LONG_CONTEXTS``."""
    first, last = LONG_CONTEXTS
    lengths = [first + (last - first) * i // max(count - 1, 1) for i in range(count)]
    return [prompts.take(1, length)[0] for length in lengths]


def shared_prefix(prompts: Prompts, count: int) -> list[list[int]]:
    """Prompts with one beginning."""
    prefix = prompts.take(1, PREFIX_TOKENS)[0]
    return [prefix + prompt for prompt in prompts.take(count, SHORT_PROMPT)]


def rival_regimes(streams: list[int]) -> list[Regime]:
    """The rows of a comparison; ``streams``: of the short contexts, the largest number for the others."""
    most = max(streams, default=32)
    return [
        Regime("prefill", "prefill 512", lambda p: p.take(1, PREFILL_TOKENS), prefill_rate, one_token=True),
        Regime("decode", "decode, 1 stream", lambda p: p.take(1, SHORT_PROMPT), decode_rate),
        *(
            Regime(
                f"streams{n}",
                f"{n} streams, short",
                lambda p, n=n: p.take(n, SHORT_PROMPT),  # type: ignore[misc]
                stream_rates,
            )
            for n in streams
        ),
        Regime(
            "long",
            f"{most} streams at {LONG_CONTEXTS[0]}-{LONG_CONTEXTS[1]} tokens",
            lambda p: long_contexts(p, most),
            decode_window_rate,
            repeated=True,
            copied_contexts=True,
        ),
        Regime(
            "prefix",
            f"{most} streams, {PREFIX_TOKENS} tokens shared",
            lambda p: shared_prefix(p, most),
            stream_rates,
            # The prefix has been seen before, as a system prompt has.
            warm_up=lambda requests: requests[0][:PREFIX_TOKENS] + requests[0][-1:],
        ),
    ]


def measure(
    target: Target, prompts: Prompts, streams: list[int], repeats: int, decode_tokens: int
) -> list[Figure]:
    """Every figure of one running target; the first, cold run of each kind is not counted."""
    prefill = Figure("prefill 512, one request", "tok/s")
    decode = Figure(f"decode {decode_tokens}", "tok/s")
    for repeat in range(repeats + 1):
        first = target.complete(prompts.take(1, PREFILL_TOKENS), 1)
        alone = target.complete(prompts.take(1, SHORT_PROMPT), decode_tokens)
        if repeat:
            prefill.values.append(prefill_rate(first)[""])
            times = alone[0].times
            decode.values.append((decode_tokens - 1) / (times[-1] - times[0]))
    first_token = Figure("time to first token, prompt 512", "ms", [512e3 / value for value in prefill.values])
    figures = [prefill, first_token, decode]
    for count in streams:
        total = Figure(f"{count} streams, decode {decode_tokens}, all tokens", "tok/s")
        wait = Figure(f"{count} streams, time to first token (median)", "ms")
        gap = Figure(f"{count} streams, between tokens (99th percentile)", "ms")
        for _ in range(repeats):
            answers = target.complete(prompts.take(count, SHORT_PROMPT), decode_tokens)
            total.values.append(count * decode_tokens / max(answer.times[-1] for answer in answers))
            wait.values.append(1e3 * statistics.median(answer.times[0] for answer in answers))
            gaps = [b - a for answer in answers for a, b in zip(answer.times, answer.times[1:], strict=False)]
            gap.values.append(1e3 * statistics.quantiles(gaps, n=100)[98])
        figures += [total, wait, gap]
    return figures
