"""Attention kernels and the cache they read: a layer's cache is described by one ``CacheSpec``.

The engine's page pool and prefix tree know pages only by number; how K and V lie inside a page is the
attention kernel's own business. Attention always reads K and V through the cache dtype, also those of the
tokens just computed, in tiles fixed by absolute position: a token's result is bit-equal whether its
context came from this chunk, an earlier one or a shared prefix (PagedAttention: Kwon et al., 2023).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels.forward_batch import ForwardBatch

PAGE_SIZE = 16  # tokens a page: one AVX-512 register of scores, one AMX tile of keys


@dataclass(frozen=True)
class CacheSpec:
    """What one layer keeps for every token. ``window``: 0 = all tokens.

    ``kind`` "paged": K and V heads; "latent": one row of ``k_dim`` whose first ``v_dim`` values are V too
    (MLA).
    """

    kind: Literal["paged", "latent", "recurrent"]
    heads: int
    k_dim: int
    v_dim: int
    dtype: torch.dtype
    window: int = 0

    def token_bytes(self) -> int:
        """Bytes one token occupies in this layer's cache."""
        values = self.k_dim if self.kind == "latent" else self.k_dim + self.v_dim
        return self.heads * values * self.dtype.itemsize


@dataclass(frozen=True)
class LayerCache:
    """One layer's pages: opaque buffers of the attention kernel that allocated them."""

    spec: CacheSpec
    kernel: AttentionKernel
    pages: int
    page_size: int
    buffers: dict[str, Tensor] = field(repr=False)


@dataclass(frozen=True)
class AttentionParameters:
    """What a layer adds to plain scaled-dot-product attention."""

    scale: float
    softcap: float = 0.0  # scores become softcap * tanh(score / softcap) where > 0
    sinks: Tensor | None = None  # float32 (query heads,): a logit each head adds to its softmax sum


class AttentionKernel(Protocol):
    """Writes to a paged cache and attends over it."""

    name: str

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


def attention_kernels() -> list[AttentionKernel]:
    """All attention kernels, best first."""
    from lowbit.kernels.attention_cpu import CpuAttention
    from lowbit.kernels.attention_reference import ReferenceAttention

    return [CpuAttention(), ReferenceAttention()]


def choose_attention(spec: CacheSpec, device: torch.device) -> AttentionKernel:
    """The first kernel that does not refuse the spec."""
    reasons = []
    for kernel in attention_kernels():
        reason = kernel.refuses(spec, device)
        if reason is None:
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
    raise LowbitError("E0420", f"no attention kernel serves {spec}: " + "; ".join(reasons))
