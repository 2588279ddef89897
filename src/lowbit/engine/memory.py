"""How many KV pages fit.

On a CPU they get a share of the memory that the weights leave free. On a GPU weights and pages together get
a share of all its memory (``--mem-fraction-static``, as SGLang counts), and what is left is for the largest
step (``workspace``, an estimate from the model's dimensions) and for CUDA graphs. What others hold there
counts as used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lowbit.engine.scheduler import PROMPT_LOGPROB_ROWS
from lowbit.errors import LowbitError
from lowbit.kernels.device_memory import free_memory, total_memory
from lowbit.kernels.gpu.linear import MOST_SLICE
from lowbit.kernels.recurrent import state_bytes
from lowbit.kernels.reference import SLICE_WEIGHTS
from lowbit.models.config import ModelConfig
from lowbit.models.model import Model
from lowbit.settings import CPU_FRACTION, GPU_FRACTION, Settings

_GIB = 1 << 30
_FIXED = 1 << 28  # of libraries and kernels, and what lies about unused in torch's cache
_GPU_CHUNKS = ((60, 8192), (35, 4096))  # tokens of a step by GiB of the GPU
_GPU_RUNNING = ((60, 256), (35, 128))  # and sequences
_SLACK = 1.25  # blocks are rounded up, and what is freed cannot always be used at once
_CLAIMED = 1 << 21  # bytes at once: about a millisecond
_MOST_SCRATCH = 1 << 26  # bytes claimed
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_KEPT, _MOST_KEPT = 1 << 25, 1 << 28  # a block that does not get a mapping of its own; freed bytes
_ROW_BYTES = 24  # of a logit: float32, once more with biases or for a graph, and float64 with its logarithms


@dataclass(frozen=True)
class _Room:
    """Bytes for the pool: what it gets by itself, and at most; and how that came about."""

    share: int
    most: int
    origin: str


def pool_pages(model: Model, settings: Settings) -> int:
    """Pages of the KV pool: as asked for, or by memory, but no more than all sequences could use."""
    size = settings.page_size
    page_bytes = _page_bytes(model, size)
    room = _gpu_room(model, settings) if model.device.type == "cuda" else _cpu_room(model, settings)
    room = _beside_states(room, model, settings)
    if settings.max_total_tokens is not None:
        pages = -(-settings.max_total_tokens // size)
        if pages * page_bytes > room.most:
            raise LowbitError(
                "E0502",
                f"--max-total-tokens {settings.max_total_tokens} needs {pages * page_bytes / _GIB:.1f} GiB "
                f"of KV cache, {room.origin}: the most that fits is {room.most // page_bytes * size}",
            )
        return pages
    context = settings.context_length or model.context_length
    useful = settings.running_limit * -(-context // size)
    pages = min(room.share // page_bytes, useful)
    if settings.context_length is not None and pages * size < settings.context_length:
        raise LowbitError(
            "E0502",
            f"--context-length {context} needs {context * page_bytes / size / _GIB:.1f} GiB of KV cache, "
            f"{pages * page_bytes / _GIB:.1f} GiB may be used ({room.origin}): largest that fits is "
            f"{pages * size}; raise --mem-fraction-static, or use a smaller --kv-cache-dtype",
        )
    if pages < 1:
        raise LowbitError(
            "E0502",
            f"one KV page needs {page_bytes} bytes, {room.origin}; use another --mem-fraction-static, lower "
            "--chunked-prefill-size or --max-running-requests, or use a smaller model",
        )
    return pages


def _beside_states(room: _Room, model: Model, settings: Settings) -> _Room:
    """What recurrent layers' states, of all sequences that may run, leave for pages."""
    each, count = _state_bytes(model), settings.running_limit
    states = each * (count + 1)  # one more is nobody's
    if states == 0:
        return room
    if states >= room.share:
        fits = max(room.share // (2 * each) - 1, 0)
        raise LowbitError(
            "E0502",
            f"--max-running-requests {count} needs {states / _GIB:.1f} GiB for states of recurrent layers, "
            f"{room.share / _GIB:.1f} GiB may be used ({room.origin}): use {fits} or fewer"
            if fits
            else f"one state of the recurrent layers needs {each} bytes, {room.share} may be used "
            f"({room.origin}); raise --mem-fraction-static, or use a smaller model",
        )
    origin = f"{room.origin}, {states / _GIB:.1f} GiB of them for states of {count} sequences"
    return _Room(room.share - states, room.most - states, origin)


def _page_bytes(model: Model, size: int) -> int:
    """Of a page here; on a CPU of all ranks that share the model, as they share the memory."""
    page = max(sum(spec.token_bytes() for spec in model.cache_specs()), 1) * size  # or states alone
    if model.device.type == "cpu":
        page += sum(other.token_bytes * size for other in model.others)
    return page


def _state_bytes(model: Model) -> int:
    """Of a sequence here; on a CPU on all ranks that share the model."""
    own = state_bytes(model.cache_specs())
    if model.device.type == "cpu":
        own += sum(other.state_bytes for other in model.others)
    return own


def _cpu_room(model: Model, settings: Settings) -> _Room:
    free = free_memory(model.device, model.mapped_bytes)
    share = int(free * (settings.mem_fraction_static or CPU_FRACTION))
    return _Room(share, free, f"{free / _GIB:.1f} GiB free")


def _gpu_room(model: Model, settings: Settings) -> _Room:
    torch.cuda.empty_cache()  # what loading left behind
    free, total = free_memory(model.device), total_memory(model.device)
    here, states, slots = _page_bytes(model, 1), _state_bytes(model), settings.running_limit + 1
    for other in model.others:  # where it is scarcest for the pages of a rank
        left = max(other.free - slots * other.state_bytes, 0)
        free = min(free, left * here // max(other.token_bytes, 1) + slots * states)
    fraction = settings.mem_fraction_static or GPU_FRACTION
    step = workspace(model, settings)
    most = max(free - step, 0)
    origin = (
        f"{free / _GIB:.1f} of the GPU's {total / _GIB:.1f} GiB are free beside the weights, "
        f"{step / _GIB:.1f} GiB of them for a step of {_step_tokens(model, settings)} tokens, and "
        f"--mem-fraction-static is {fraction:g}"
    )
    return _Room(max(min(free - int(total * (1 - fraction)), most), 0), most, origin)


def running_requests(settings: Settings, device: torch.device, states: bool) -> int:
    """Sequences that run at once: as asked for; else on a GPU as many as one of its size serves, if it need
    not keep the ``states`` of recurrent layers for each."""
    if settings.max_running_requests is None and device.type == "cuda" and not states:
        total = total_memory(device)
        return next((count for least, count in _GPU_RUNNING if total >= least * _GIB), settings.running_limit)
    return settings.running_limit


def prefill_tokens(settings: Settings, device: torch.device) -> int:
    """Prompt tokens a step, -1 for whole prompts: enough that a GPU's products are bound by arithmetic, and
    a step's time by them and not by who launches it."""
    if settings.chunked_prefill_size is not None:
        return settings.chunked_prefill_size
    if device.type != "cuda":
        return 512
    total = total_memory(device)
    return next((tokens for least, tokens in _GPU_CHUNKS if total >= least * _GIB), 2048)


def _step_tokens(model: Model, settings: Settings) -> int:
    """Tokens of the largest step."""
    chunk = prefill_tokens(settings, model.device)
    longest = settings.context_length or model.context_length
    return (longest if chunk < 0 else min(chunk, longest)) + settings.running_limit


def workspace(model: Model, settings: Settings) -> int:
    """Bytes that the largest step may need beside weights and pages, from above."""
    rows = settings.running_limit + PROMPT_LOGPROB_ROWS
    needed = _step_tokens(model, settings) * _token_bytes(model.config)
    needed += rows * model.vocab_size * _ROW_BYTES
    if "gpu_blocks" in model.kernels:
        needed += MOST_SLICE
    if "reference" in model.kernels:
        needed += SLICE_WEIGHTS * 16  # codes, float32 weights on their way and as they are multiplied
    return int(needed * _SLACK) + _FIXED


def claim_scratch(model: Model, tokens: int) -> Iterator[None]:
    """On a CPU: get the memory for the numbers of a step of so many tokens from the system, some at a time.

    The C library is told to keep what is freed, so that no step waits for it again.
    """
    if model.device.type != "cpu" or not _keep_freed():
        return
    held = []
    for _ in range(0, min(tokens * _token_bytes(model.config), _MOST_SCRATCH), _CLAIMED):
        held.append(torch.empty(_CLAIMED, dtype=torch.uint8).zero_())
        yield


def _keep_freed() -> bool:
    """Whether this is the GNU C library: told not to map large blocks one by one, nor to give back each time
    what a step frees."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return False
    return bool(set_option(_M_MMAP_THRESHOLD, _LARGEST_KEPT) and set_option(_M_TRIM_THRESHOLD, _MOST_KEPT))


def _token_bytes(config: ModelConfig) -> int:
    """Of a token's numbers that are there at once: the residual stream, and the larger half of a block."""
    attention = (2 * config.heads + 2 * config.kv_heads) * config.head_dim  # q, k, v and what comes out
    if (state := getattr(config, "state", None)) is not None:
        attention = max(attention, 4 * state.width)  # a row, convolved, in heads, and what comes out
    mlp = 3 * config.intermediate_size  # gate and up, and their product
    if config.moe is not None:
        each = 3 * config.moe.intermediate_size + 2 * config.hidden_size  # also gathered, and weighed
        mlp = max(mlp, config.moe.per_token * each + 3 * config.moe.shared_size)
    # The stream is float32, one copy of it under a norm; all else counts as float32, though most is bfloat16.
    return 4 * (3 * config.hidden_size + max(attention, mlp))
