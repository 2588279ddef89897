"""How many KV pages fit: a share of the memory that the weights leave free."""

from __future__ import annotations

from lowbit.errors import LowbitError
from lowbit.kernels.device_memory import free_memory
from lowbit.models.model import Model
from lowbit.settings import Settings

_GIB = 1 << 30


def pool_pages(model: Model, settings: Settings) -> int:
    """Pages of the KV pool: as asked for, or by memory, but no more than all sequences could use."""
    size = settings.page_size
    page_bytes, free = _page_and_free(model, size)
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


def _page_and_free(model: Model, size: int) -> tuple[int, int]:
    """Bytes of a page and of free memory: on a CPU of all ranks that share the model, else where it is
    scarcest."""
    page = sum(spec.token_bytes() for spec in model.cache_specs()) * size
    free = free_memory(model.device, getattr(model, "mapped_bytes", 0))
    others = [(other.token_bytes * size, other.free) for other in getattr(model, "others", ())]
    if model.device.type == "cpu":
        return page + sum(their_page for their_page, _ in others), free
    return min([(page, free), *others], key=lambda one: one[1] / one[0])
