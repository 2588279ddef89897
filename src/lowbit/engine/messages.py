"""What crosses between the HTTP process and the engine process: fixed-schema structs, no torch, no pickle.

The same structs serve ``LLM`` in one process. Every accepted request ends in exactly one event whose
``finish_reason`` is set.
"""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose tokens. The defaults are OpenAI's; a checkpoint's generation_config may change them.

    ``max_tokens`` None: as many as context and pool leave. ``logprobs``: how many alternatives beside the
    chosen token (None = none at all). ``prompt_logprobs`` likewise, for every prompt token but the first.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0  # 0 = all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False


class Request(msgspec.Struct, frozen=True, kw_only=True, tag="request"):
    """One sequence to continue. ``n`` choices of an HTTP request are ``n`` of these.

    ``cache_salt`` separates prefix-cache entries of different API keys; ``allowed_deadline`` bounds are
    the server's. An empty prompt is not allowed.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    cache_salt: str = ""
    echo_only: bool = False  # max_tokens = 0: prompt log-probabilities and nothing else


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Forget the request; answered by a final event with reason "abort" if it still ran."""

    id: str


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Asks for an ``EngineStatus``."""


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Finish what runs, accept nothing more, then exit."""


class FlushCache(msgspec.Struct, frozen=True, tag="flush_cache"):
    """Drop every unlocked prefix-cache page."""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """A token's log-probability under the model's raw logits, and the best alternatives, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True, tag="tokens"):
    """News of one request: 0..k tokens and the text that became certain with them.

    ``text`` never splits a character and never contains a part of a stop string that was matched. The
    first event of a request carries ``prompt_logprobs`` (None for the first prompt token) where wanted,
    and ``cached_tokens``, how many prompt tokens came from the prefix cache.
    """

    id: str
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    matched_stop: str | int | None = None  # the stop string or stop token id that ended it
    error: str = ""  # with finish_reason "error": the message
    error_code: str = ""  # and its snake_case name: "model_numerical_error", "internal", …
    prompt_tokens: int = 0  # on the final event: what usage reports
    completion_tokens: int = 0
    accepted_drafts: int = 0
    rejected_drafts: int = 0


class Admitted(msgspec.Struct, frozen=True, tag="admitted"):
    """These requests' prompts are being computed, or were taken from the cache: they no longer wait."""

    ids: tuple[str, ...]


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """A step is long, and gets on."""


class MeasuredQuality(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody measured of the served model (checkpoint/quality.py)."""

    mean_kl: float  # nats
    top1_agreement: float  # 0..1
    positions: int
    against: str


class EngineReady(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The engine has loaded and can run; the limits the server admits requests by."""

    model_name: str
    context_length: int  # tokens a sequence may have in all
    pool_tokens: int  # tokens the KV pool holds
    page_size: int
    vocab_size: int
    max_running: int
    architecture: str = ""
    quantization: str = ""  # how the weights are quantized, in words
    weight_bytes: int = 0  # of the packed weights in memory
    quality: MeasuredQuality | None = None  # None: nobody measured it
    details: dict[str, str] = {}  # for /get_model_info and the start-up lines


class EngineProgress(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """Loading news: ``done`` of ``total`` bytes."""

    what: str
    done: int
    total: int


class EngineFailed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The engine could not start or died; a LowbitError's code and message."""

    code: str
    message: str


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True, tag="status"):
    """Counters and gauges for /metrics and /health; counters only ever grow."""

    running: int = 0
    waiting: int = 0
    pages_total: int = 0
    pages_free: int = 0
    pages_cached: int = 0  # in the prefix tree, referenced by nobody
    steps: int = 0
    captured_steps: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    draft_tokens: int = 0  # computed; they count as generated where they were right
    accepted_draft_tokens: int = 0
    preemptions: int = 0
    invariant_violations: int = 0


ToEngine = Request | Cancel | Ping | Drain | FlushCache
FromEngine = TokenEvent | Admitted | Alive | EngineReady | EngineProgress | EngineFailed | EngineStatus
