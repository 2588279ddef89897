"""Paged attention on a CPU, every cache format: native code (csrc/attention.cpp, attention_write.cpp).

A page holds 16 tokens of every K/V head, laid out for the inner loops (csrc/attention_cache.h):

    bfloat16       k (pages, heads, k_dim / 2, 16 tokens, 2)   v (pages, heads, 8, v_dim, 2 tokens)
    float32, 16    k (pages, heads, k_dim, 16 tokens)          v (pages, heads, 16 tokens, v_dim)

Quantized pages are bytes: a head's codes in quads, from which a few instructions make lines of bfloat16
pages, then the head's scales. Codes are exact in bfloat16 and are multiplied as they are; a key's scale meets
the sum over its channels, a value's the softmax weight. A few query rows decode a quad just before its
products, many have a segment widened into a buffer that the core keeps in its own cache, as float16 always
is; the KV cache itself is never unpacked. A latent cache (DeepSeek-V2, 2024) has k alone: a value is the
first v_dim numbers of its key, and is turned into v's layout when it is read.

On AVX-512 queries are rounded to bfloat16 and multiplied in pairs, unless K is float32 or float16, and
softmax weights, times the values' scales, likewise with V (mean KL 0.0001 on the embedded model, two thirds
of it from a bfloat16 cache alone); sums, and all else, are float32. AMX multiplies the same numbers on tiles,
where narrow pages are decoded alike for few rows and many. Keys are processed in segments of 256
tokens at fixed positions, merged in ascending order, so a token's result is bit-equal whatever the batch, the
chunks, the page numbers and the number of threads (FlashAttention-2: Dao, 2023; segments over threads as in
Flash-Decoding: Dao et al., 2023). Where sequences of a batch begin a segment with the same pages, as they do
on a prefix the radix cache gave them, one pass over those pages serves the rows of all: found in the page
table at every call, and with the same bits as on copies of the pages.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels import native
from lowbit.kernels.attention import PAGE_SIZE, AttentionParameters, CacheSpec, LayerCache
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.host_memory import zeros
from lowbit.kernels.step_plan import Operation
from lowbit.numerics.cache_format import CacheFormat

MAX_DIMS = {"k_dim": 576, "v_dim": 512}  # of a head: the work buffers of a thread have these widths
# What attention_cache.h calls them.
_NUMBERS = {"f32": 0, "bf16": 1, "fp16": 2, "fp8_e4m3": 3, "fp8_e5m2": 4, "int8": 5, "int4": 6}
_FAULTS = {
    1: "the lengths do not belong to the tokens",
    2: "the page table names a page that the cache does not have",
    3: "a write slot is outside the cache",
}


class _Cache(ctypes.Structure):
    """lowbit_attention_cache."""

    _fields_ = [
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("pages", ctypes.c_int64),
        ("heads", ctypes.c_int32),
        ("k_dim", ctypes.c_int32),
        ("v_dim", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("k_format", ctypes.c_int32),
        ("v_format", ctypes.c_int32),
        ("k_group", ctypes.c_int32),
        ("v_group", ctypes.c_int32),
        ("latent", ctypes.c_int32),
    ]


class _Batch(ctypes.Structure):
    """lowbit_attention_batch."""

    _fields_ = [
        ("query_lengths", ctypes.c_void_p),
        ("context_lengths", ctypes.c_void_p),
        ("page_table", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("sequences", ctypes.c_int32),
        ("tokens", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class _Functions:
    """The native functions, with their argument types set."""

    write: Operation
    attend: Operation


@cache
def _functions() -> _Functions | None:
    library = native.library()
    if library is None:
        return None
    pointer, stride, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    write = (pointer, pointer, stride, pointer, stride, pointer, ctypes.c_int32)
    attend = (pointer, pointer, pointer, stride, ctypes.c_int32, number, number, pointer, pointer)
    return _Functions(
        Operation(library, "attention_write", write, _error),
        Operation(library, "attention_attend", attend, _error),
    )


@dataclass(frozen=True)
class CpuLayerCache(LayerCache):
    """A LayerCache with what the native code is called with."""

    functions: _Functions
    view: _Cache


class CpuAttention:
    """See the module docstring."""

    name = "cpu"
    takes_padding = False

    def refuses(self, spec: CacheSpec, device: torch.device) -> str | None:
        """Paged and latent caches on a CPU with head sizes, and channels that share a scale, in sixteens."""
        if device.type != "cpu":
            return f"runs on a CPU, got {device.type}"
        if (reason := spec.impossible()) is not None:
            return reason
        for name, dim in (("k_dim", spec.k_dim), ("v_dim", spec.v_dim)):
            if dim % 16 or not 0 < dim <= MAX_DIMS[name]:
                return f"needs {name} % 16 == 0 and {name} <= {MAX_DIMS[name]}, got {dim}"
        if spec.kind == "latent" and spec.v_dim > spec.k_dim:
            return f"a latent's values are part of its key, got v_dim {spec.v_dim} > k_dim {spec.k_dim}"
        for stored, dim in ((spec.k_format, spec.k_dim), (spec.v_format, spec.v_dim)):
            if (group := stored.group_of(dim)) % 16:
                return f"needs scales for 16, 32 … channels, got one for {group}"
        return None if native.library() is not None else "the native library is not there"

    def allocate(self, spec: CacheSpec, pages: int, page_size: int, device: torch.device) -> LayerCache:
        """Zeroed pages."""
        functions = _functions()
        assert functions is not None, "refuses() says so where there is no library"
        if page_size != PAGE_SIZE:
            raise LowbitError(
                "E0420", f"attention kernel {self.name!r} needs pages of {PAGE_SIZE} tokens, got {page_size}"
            )
        latent = spec.kind == "latent"
        k_shape = (spec.k_dim // 2, PAGE_SIZE, 2) if spec.k_format.name == "bf16" else (spec.k_dim, PAGE_SIZE)
        v_shape = (PAGE_SIZE // 2, spec.v_dim, 2) if spec.v_format.name == "bf16" else (PAGE_SIZE, spec.v_dim)
        buffers = {"k": _pages((pages, spec.heads), spec.k_format, spec.k_dim, k_shape)}
        if not latent:
            buffers["v"] = _pages((pages, spec.heads), spec.v_format, spec.v_dim, v_shape)
        view = _Cache(
            buffers["k"].data_ptr(),
            None if latent else buffers["v"].data_ptr(),
            pages,
            spec.heads,
            spec.k_dim,
            spec.v_dim,
            spec.window,
            _NUMBERS[spec.k_format.name],
            _NUMBERS[spec.v_format.name],
            spec.k_format.group_of(spec.k_dim),
            spec.v_format.group_of(spec.v_dim),
            latent,
        )
        return CpuLayerCache(spec, self, pages, page_size, buffers, functions, view)

    def write(self, cache: LayerCache, k: Tensor, v: Tensor, batch: ForwardBatch) -> None:
        """Store k and v in the cache's formats at ``batch.write_slots``."""
        assert isinstance(cache, CpuLayerCache), "a cache is used by the kernel that allocated it"
        spec, tokens = cache.spec, len(batch.write_slots)
        k = _strided(k)
        v = k[..., : spec.v_dim] if spec.kind == "latent" else _strided(v)
        assert k.shape == (tokens, spec.heads, spec.k_dim), f"k {tuple(k.shape)} is not {spec}'s"
        assert v.shape == (tokens, spec.heads, spec.v_dim), f"v {tuple(v.shape)} is not {spec}'s"
        cache.functions.write(
            ctypes.byref(cache.view),
            k.data_ptr(),
            k.stride(0),
            v.data_ptr(),
            v.stride(0),
            batch.write_slots.data_ptr(),
            tokens,
        )

    def attend(
        self, q: Tensor, cache: LayerCache, batch: ForwardBatch, parameters: AttentionParameters
    ) -> Tensor:
        """q (tokens, query heads, k_dim) -> (tokens, query heads * v_dim) in q's dtype."""
        assert isinstance(cache, CpuLayerCache), "a cache is used by the kernel that allocated it"
        spec, queries = cache.spec, _strided(q)
        tokens, heads, dim = queries.shape
        assert dim == spec.k_dim and heads % spec.heads == 0, f"q {tuple(q.shape)} does not fit {spec}"
        sinks = parameters.sinks
        assert sinks is None or (sinks.dtype is torch.float32 and sinks.shape == (heads,)), "one sink a head"
        view = _Batch(
            batch.query_lengths.data_ptr(),
            batch.context_lengths.data_ptr(),
            batch.page_table.data_ptr(),
            batch.page_table.stride(0),
            len(batch.query_lengths),
            tokens,
        )
        out = torch.empty(tokens, heads * spec.v_dim)
        cache.functions.attend(
            ctypes.byref(cache.view),
            ctypes.byref(view),
            queries.data_ptr(),
            queries.stride(0),
            heads,
            parameters.scale,
            parameters.softcap,
            None if sinks is None else sinks.data_ptr(),
            out.data_ptr(),
        )
        return out if q.dtype is torch.float32 else out.to(q.dtype)


def _pages(pages: tuple[int, int], stored: CacheFormat, dim: int, shape: tuple[int, ...]) -> Tensor:
    """(pages, heads, ...): numbers in ``shape``, or the bytes of codes and scales."""
    if stored.bits > 8:
        return zeros((*pages, *shape), stored.dtype)
    return zeros((*pages, PAGE_SIZE * stored.token_bytes(dim)), torch.uint8)


def _strided(x: Tensor) -> Tensor:
    """x (tokens, heads, dim) as float32 with contiguous heads: a view of a fused output stays one."""
    if x.dtype is torch.float32 and x.stride(2) == 1 and x.stride(1) == x.shape[2]:
        return x
    return x.float().contiguous()


def _error(fault: int) -> Exception:
    if fault in _FAULTS:
        return LowbitError("E0703", f"attention: {_FAULTS[fault]}")
    return MemoryError("attention: no memory for the unmerged segments")
