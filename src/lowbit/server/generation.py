"""What chat and completions share: from a checked request to sequences, and from their events to an answer.

    requests ──open──▶ Stream of events ──collect──▶ one JSON answer
                                        └─relay────▶ server-sent events, a chunk for each piece of news

A failure before the first event is an HTTP status; after it, when the 200 is already sent, an error event.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from lowbit.engine.messages import EngineReady, Request, SamplingParams, TokenEvent, TokenLogprob
from lowbit.errors import thousands
from lowbit.server.api_error import ApiError, bad_request, from_event
from lowbit.server.engine_client import EngineClient, Stream
from lowbit.server.http import Exchange, now
from lowbit.server.protocol import StreamOptions
from lowbit.server.request_values import MAX_PROMPTS, MAX_RATED, seed_of_choice
from lowbit.tokenization.tokenizer import Tokenizer

_ENCODER = msgspec.json.Encoder()
_LOWEST_LOGPROB = -9999.0  # JSON has no -inf
_MAX_SALT = 256
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


@dataclass
class Output:
    """What one choice has produced so far."""

    prompt: tuple[int, ...]
    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    cached_tokens: int = 0
    counted_tokens: int = 0  # by the engine, at the end
    accepted_drafts: int = 0
    rejected_drafts: int = 0
    finish_reason: str | None = None
    matched_stop: str | int | None = None
    begun: bool = False  # a chunk was sent
    text_offset: int = 0  # characters of text before the next token, for completions' logprobs
    tokens_printed: int = 0  # tokens whose log-probability was printed

    def add(self, event: TokenEvent) -> None:
        """Take in news."""
        self.text.append(event.text)
        self.tokens += event.tokens
        self.logprobs += event.logprobs
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs
        self.cached_tokens = max(self.cached_tokens, event.cached_tokens)
        if event.finish_reason is not None:
            self.finish_reason = event.finish_reason
            self.matched_stop = event.matched_stop
            self.accepted_drafts = event.accepted_drafts
            self.rejected_drafts = event.rejected_drafts
            self.counted_tokens = event.completion_tokens

    @property
    def completion_tokens(self) -> int:
        """Tokens written so far."""
        return max(len(self.tokens), self.counted_tokens)


@dataclass
class Generation:
    """One HTTP request's sequences and their outputs. Choice ``i`` belongs to prompt ``i // n``."""

    requests: list[Request]
    outputs: list[Output]
    n: int

    @classmethod
    def plan(
        cls,
        identity: str,
        prompts: Sequence[tuple[int, ...]],
        samplings: Sequence[SamplingParams],
        n: int,
        cache_salt: str,
    ) -> Generation:
        """A sequence for each choice of each prompt, which has its sampling."""
        if len(prompts) * n > MAX_PROMPTS:
            text = f"{thousands(len(prompts))} prompts with n {n} are {thousands(len(prompts) * n)} choices"
            raise bad_request("too_many_choices", f"{text}; limit {thousands(MAX_PROMPTS)}", "n")
        rated = n * sum(
            len(prompt) * (1 + sampling.prompt_logprobs)
            for prompt, sampling in zip(prompts, samplings, strict=True)
            if sampling.prompt_logprobs is not None
        )
        if rated > MAX_RATED:
            text = (
                f"log-probabilities of all prompt tokens and their alternatives are {thousands(rated)}; "
                f"limit {thousands(MAX_RATED)}: send less at a time, or ask for fewer alternatives"
            )
            raise bad_request("too_many_logprobs", text, "logprobs")
        requests = []
        for index in range(len(prompts) * n):
            sampling = samplings[index // n]
            seed = seed_of_choice(sampling.seed, index % n)
            requests.append(
                Request(
                    id=f"{identity}-{index}",
                    prompt=prompts[index // n],
                    sampling=msgspec.structs.replace(sampling, seed=seed),
                    cache_salt=cache_salt,
                    echo_only=sampling.max_tokens == 0,
                )
            )
        return cls(requests, [Output(request.prompt) for request in requests], n)

    def usage(self) -> dict[str, object]:
        """OpenAI's usage; a prompt counts once, whatever n is. Predictions are drafts of speculation."""
        prompt = sum(len(output.prompt) for output in self.outputs[:: self.n])
        completion = sum(output.completion_tokens for output in self.outputs)
        cached = sum(output.cached_tokens for output in self.outputs[:: self.n])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {
                "accepted_prediction_tokens": sum(output.accepted_drafts for output in self.outputs),
                "rejected_prediction_tokens": sum(output.rejected_drafts for output in self.outputs),
            },
        }

    def add(self, index: int, event: TokenEvent, request_id: str) -> Output:
        """Take in an event; an error event raises its ApiError."""
        if event.finish_reason == "error":
            raise from_event(event, request_id)
        if event.finish_reason == "abort":
            raise ApiError(503, "aborted", "the engine gave this request up; send it again", retry_after=1)
        self.outputs[index].add(event)
        return self.outputs[index]


def salt_of(exchange: Exchange, wanted: str) -> str:
    """The prefix-cache salt: callers with different keys or salts share nothing."""
    if len(wanted) > _MAX_SALT:
        raise bad_request("invalid_request", f"cache_salt is over {_MAX_SALT} characters", "cache_salt")
    if not wanted and not exchange.cache_salt:
        return ""
    return hashlib.sha256(f"{exchange.cache_salt}\0{wanted}".encode()).hexdigest()


def with_room(sampling: SamplingParams, ready: EngineReady, prompt: int, default: int) -> SamplingParams:
    """With ``default`` for max_tokens where the request has none: as much of it as fits behind the prompt."""
    if sampling.max_tokens is not None:
        return sampling
    room = min(ready.context_length, ready.pool_tokens // ready.page_size * ready.page_size) - prompt
    wanted = min(max(default, sampling.min_tokens), room)
    return msgspec.structs.replace(sampling, max_tokens=wanted)


def check_fit(
    ready: EngineReady, prompt: int, max_tokens: int | None, param: str, name: str = "max_tokens"
) -> None:
    """Admit only what can finish: within the context, and within the KV pool when alone there. ``name``: what
    the request calls ``max_tokens``."""
    if prompt == 0:
        raise bad_request("empty_prompt", "the prompt has no tokens", param)
    total = prompt + (1 if max_tokens is None else max_tokens)
    context, page = ready.context_length, ready.page_size
    if total > context:
        wish = "at least 1 more" if max_tokens is None else f"{name} {thousands(max_tokens)}"
        sizes = f"{thousands(total)} > context {thousands(context)}"
        text = f"prompt is {thousands(prompt)} tokens and {wish}: {sizes}"
        over, room = total - context, context - prompt
        ways = [f"lower {name} to {thousands(room)}"] if max_tokens is not None and room > 0 else []
        if over < prompt:
            ways.append(f"shorten the prompt by {thousands(over)} token{'s' * (over > 1)}")
        way_out = " or ".join(ways)
        raise bad_request("prompt_too_long", f"{text}; {way_out}", param)
    blocks, have = -(-total // page), ready.pool_tokens // page
    if blocks > have:
        room = have * page - prompt
        lower = f"lower {name} to {thousands(room)}" if room > 0 else "shorten the prompt"
        raise bad_request(
            "never_fits",
            f"this request needs {thousands(blocks)} KV blocks, the server has {thousands(have)}; "
            f"{lower} or restart with a larger --max-total-tokens or --mem-fraction-static",
            param,
        )


async def collect(client: EngineClient, generation: Generation, exchange: Exchange) -> None:
    """Run to the end, filling the outputs."""
    stream = client.open(generation.requests)
    try:
        async with exchange.cancelled_if_client_leaves():
            while stream.unfinished or stream.has_news:
                for index, event in await stream.next(client.limits.ping_seconds):
                    generation.add(index, event, exchange.request_id)
    finally:
        stream.close()
        _account(exchange, generation)


Chunk = Callable[[int, TokenEvent, Output], dict[str, object] | None]


async def relay(
    client: EngineClient,
    generation: Generation,
    exchange: Exchange,
    chunk: Chunk,
    envelope: dict[str, object] | None,
    options: StreamOptions,
    first: dict[str, object] | None = None,
) -> None:
    """Send server-sent events: ``envelope`` with the choice that ``chunk`` makes of each event, if any; what
    ``chunk`` makes alone where there is no envelope. ``first``: what the first of them holds besides."""
    stream = client.open(generation.requests)
    try:
        async with exchange.cancelled_if_client_leaves():
            ping = client.limits.ping_seconds
            await _relay(stream, generation, exchange, chunk, envelope, options, ping, first or {})
    finally:
        stream.close()
        _account(exchange, generation)


async def _relay(
    stream: Stream,
    generation: Generation,
    exchange: Exchange,
    chunk: Chunk,
    envelope: dict[str, object] | None,
    options: StreamOptions,
    ping_seconds: float,
    first: dict[str, object],
) -> None:
    with_usage = {"usage": None} if options.include_usage else {}
    started = False
    last_sent = now()
    while stream.unfinished or stream.has_news:
        parts: list[bytes] = []
        failure: ApiError | None = None
        for index, event in await stream.next(ping_seconds):
            try:
                output = generation.add(index, event, exchange.request_id)
            except ApiError as error:
                failure = error
                break
            choice = chunk(index, event, output)
            if choice is not None and envelope is None:
                parts.append(sse(choice))
            elif choice is not None and envelope is not None:
                if options.continuous_usage_stats:
                    with_usage["usage"] = generation.usage()  # type: ignore[assignment]
                parts.append(sse({**envelope, "choices": [choice], **with_usage, **first}))
                first = {}
        if failure is not None and not started:
            raise failure  # nothing sent yet: an ordinary error answer
        if not started:
            await exchange.start_stream()
            started = True
        if failure is not None:
            exchange.log["error"] = failure.code
            await exchange.finish_stream(b"".join([*parts, sse(failure.body()), DONE]))
            return
        if parts or now() - last_sent >= ping_seconds:
            await exchange.send_part(b"".join(parts) or PING, stream.watch_overflow)
            last_sent = now()
    last: list[bytes] = []
    if options.include_usage and envelope is not None:
        last = [sse({**envelope, "choices": [], "usage": generation.usage()})]
    await exchange.finish_stream(b"".join([*last, DONE]))


def sse(value: object) -> bytes:
    """A server-sent event."""
    return b"data: " + _ENCODER.encode(value) + b"\n\n"


def _account(exchange: Exchange, generation: Generation) -> None:
    usage = generation.usage()
    exchange.log["prompt_tokens"] = usage["prompt_tokens"]
    exchange.log["completion_tokens"] = usage["completion_tokens"]
    accepted = sum(output.accepted_drafts for output in generation.outputs)
    if drafts := accepted + sum(output.rejected_drafts for output in generation.outputs):
        exchange.log["draft_tokens"], exchange.log["accepted_draft_tokens"] = drafts, accepted


def created() -> int:
    """Seconds since 1970, for the answer's ``created``."""
    return int(time.time())


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, _LOWEST_LOGPROB) if logprob == logprob else _LOWEST_LOGPROB


@dataclass(frozen=True)
class TokenNames:
    """How log-probabilities name tokens: their text, or "token_id:7"."""

    tokenizer: Tokenizer
    as_ids: bool

    def name(self, token: int) -> str:
        """The token's name."""
        return f"token_id:{token}" if self.as_ids else self.tokenizer.token_text(token)

    def entry(self, token: int, logprob: float) -> dict[str, object]:
        """Chat's form of one token."""
        return {
            "token": self.name(token),
            "logprob": finite(logprob),
            "bytes": list(self.tokenizer.token_bytes(token)),
        }
