"""How many KV pages fit: a share of the memory that is really free, cgroup limits included."""

from __future__ import annotations

from pathlib import Path

import torch

from lowbit.errors import LowbitError
from lowbit.models.model import Model
from lowbit.settings import Settings

_GIB = 1 << 30


def free_memory(device: torch.device) -> int:
    """Bytes this process could still take on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = _available()
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    return free if limit is None or used is None else min(free, max(limit - used, 0))


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 4 * _GIB  # a kernel older than 3.14; a small guess


def _number(file: str) -> int | None:
    """The number in a cgroup file; None where there is none, or it says "max"."""
    try:
        return int(Path(file).read_text())
    except (OSError, ValueError):
        return None


def pool_pages(model: Model, settings: Settings) -> int:
    """Pages of the KV pool: as asked for, or by memory, but no more than all sequences could use."""
    size = settings.page_size
    page_bytes = sum(spec.token_bytes() for spec in model.cache_specs()) * size
    free = free_memory(model.device)
    if settings.max_total_tokens is not None:
        pages = -(-settings.max_total_tokens // size)
        if pages * page_bytes > free:
            raise LowbitError(
                "E0502",
                f"--max-total-tokens {settings.max_total_tokens} needs {pages * page_bytes / _GIB:.1f} GiB "
                f"of KV cache, {free / _GIB:.1f} GiB free: the most that fits is {free // page_bytes * size}",
            )
        return pages
    context = settings.context_length or model.context_length
    useful = settings.max_running_requests * -(-context // size)
    pages = min(int(free * settings.mem_fraction_static) // page_bytes, useful)
    if settings.context_length is not None and pages * size < settings.context_length:
        raise LowbitError(
            "E0502",
            f"--context-length {context} needs {context * page_bytes / size / _GIB:.1f} GiB of KV cache, "
            f"{pages * page_bytes / _GIB:.1f} GiB may be used: largest that fits is {pages * size}",
        )
    if pages < 1:
        raise LowbitError(
            "E0502",
            f"one KV page needs {page_bytes} bytes and {free} are free; use --mem-fraction-static, or a "
            "smaller model",
        )
    return pages
