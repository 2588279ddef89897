"""Attention kernels and the cache they read: a layer's cache is described by one ``CacheSpec``.

The engine's page pool and prefix tree know pages only by number; how K and V lie inside a page is the
attention kernel's own business. Attention always reads K and V through the cache dtype, also those of the
tokens just computed, in tiles fixed by absolute position: a token's result is bit-equal whether its
context came from this chunk, an earlier one or a shared prefix (PagedAttention: Kwon et al., 2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.host_memory import populate
from lowbit.numerics.cache_format import CacheFormat, KvDtype

PAGE_SIZE = 16  # tokens a page: one AVX-512 register of scores, one AMX tile of keys


@dataclass(frozen=True)
class CacheSpec:
    """What one layer keeps for every token. ``window``: 0 = all tokens. ``sinks``: whether it has any.

    ``kind`` "paged": K and V heads; "latent": one row of ``k_dim`` whose first ``v_dim`` values are V too
    (MLA).
    """

    kind: Literal["paged", "latent", "recurrent"]
    heads: int
    k_dim: int
    v_dim: int
    dtype: KvDtype
    window: int = 0
    sinks: bool = False

    @property
    def k_format(self) -> CacheFormat:
        """How K is stored. The two parts of a latent row, and their sizes, differ: no scale spans both."""
        if self.kind != "latent" or not self.dtype.k.dynamic:
            return self.dtype.k
        group = math.gcd(self.dtype.k.group_of(self.k_dim), self.k_dim, self.v_dim)
        return replace(self.dtype.k, group=group)

    @property
    def v_format(self) -> CacheFormat:
        """How V is stored."""
        return self.k_format if self.kind == "latent" else self.dtype.v

    def token_bytes(self) -> int:
        """Bytes one token occupies in this layer's cache, scales included."""
        v_bytes = 0 if self.kind == "latent" else self.v_format.token_bytes(self.v_dim)
        return self.heads * (self.k_format.token_bytes(self.k_dim) + v_bytes)

    def impossible(self) -> str | None:
        """Why no kernel could serve this, or None."""
        if self.kind not in ("paged", "latent"):
            return f"serves paged and latent caches, got {self.kind!r}"
        if self.kind == "latent" and self.dtype.k.name != self.dtype.v.name:
            return f"the values of a latent cache are part of its keys: one type for both, got {self.dtype}"
        return self.k_format.refuses(self.k_dim) or self.v_format.refuses(self.v_dim)


@dataclass(frozen=True)
class LayerCache:
    """One layer's pages: opaque buffers of the attention kernel that allocated them."""

    spec: CacheSpec
    kernel: AttentionKernel
    pages: int
    page_size: int
    buffers: dict[str, Tensor] = field(repr=False)

    @property
    def page_bytes(self) -> int:
        """Of a page, all buffers together."""
        return sum(buffer.nbytes for buffer in self.buffers.values()) // max(self.pages, 1)

    def populate(self, first: int, last: int) -> Iterator[None]:
        """Have the memory of pages ``first`` to ``last`` there, a moment's work a step."""
        for buffer in self.buffers.values():
            if buffer.device.type == "cpu" and buffer.is_contiguous() and buffer.shape[0] == self.pages:
                yield from populate(buffer[first:last])


@dataclass(frozen=True)
class AttentionParameters:
    """What a layer adds to plain scaled-dot-product attention."""

    scale: float
    softcap: float = 0.0  # scores become softcap * tanh(score / softcap) where > 0
    sinks: Tensor | None = None  # float32 (query heads,): a logit each head adds to its softmax sum


class AttentionKernel(Protocol):
    """Writes to a paged cache and attends over it.

    ``takes_padding``: whether a token with write slot -1 is not stored, a sequence of no context gives zeros,
    and ``batch.max_context`` may be far more than any sequence has.
    """

    name: str
    takes_padding: bool

    def refuses(self, spec: CacheSpec, device: torch.device) -> str | None:
        """Why this kernel cannot serve the spec, or None."""

    def allocate(self, spec: CacheSpec, pages: int, page_size: int, device: torch.device) -> LayerCache:
        """Zeroed pages."""

    def write(self, cache: LayerCache, k: Tensor, v: Tensor, batch: ForwardBatch) -> None:
        """Store k (tokens, kv heads, k_dim) and v (tokens, kv heads, v_dim) at ``batch.write_slots``.

        A latent cache stores k alone: v is part of it.
        """

    def attend(
        self, q: Tensor, cache: LayerCache, batch: ForwardBatch, parameters: AttentionParameters
    ) -> Tensor:
        """Causal attention of q (tokens, query heads, k_dim) -> (tokens, query heads * v_dim), q's dtype.

        Query head h reads K/V head ``h // (query heads / kv heads)``.
        """


BACKENDS = {"triton": "gpu", "flashinfer": "gpu_flashinfer", "reference": "reference"}  # --attention-backend


def attention_kernels() -> list[AttentionKernel]:
    """All attention kernels, best first. The reference refuses no cache; what stands behind it is named."""
    from lowbit.kernels.attention_cpu import CpuAttention
    from lowbit.kernels.attention_reference import ReferenceAttention
    from lowbit.kernels.gpu.attention import GpuAttention
    from lowbit.kernels.gpu.flashinfer import flashinfer_attention

    return [GpuAttention(), CpuAttention(), ReferenceAttention(), flashinfer_attention()]


def choose_attention(spec: CacheSpec, device: torch.device, backend: str = "auto") -> AttentionKernel:
    """The first kernel that does not refuse the spec, or the one that ``--attention-backend`` names."""
    named = BACKENDS.get(backend)
    reasons = []
    for kernel in attention_kernels():
        if named not in (None, kernel.name):
            continue
        reason = kernel.refuses(spec, device)
        if reason is None:
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
    shape = f"{spec.heads} heads, k_dim {spec.k_dim}, v_dim {spec.v_dim}, {spec.dtype}"
    if named is None:  # then the reference refused too, which is for every device: its reason is the spec's
        said = spec.impossible() or "; ".join(reasons)
    else:
        said = f"{'; '.join(reasons)}; or drop --attention-backend {backend}"
    raise LowbitError("E0420", f"no attention kernel serves a {spec.kind} KV cache of {shape}: {said}")
