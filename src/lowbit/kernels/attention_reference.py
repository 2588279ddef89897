"""Reference attention: gather the pages, mask, softmax in float32. Any device, any format; the oracle.

A buffer is (pages, page_size, heads, ...) with ... a vector's codes, or its scales (cache_format.py), so a
slot is one row of (pages * page_size, heads, ...). On a
CPU each sequence is attended by itself. On other devices sequences are padded to the batch's maxima, which
are host numbers, so that nothing waits for the device; groups of sequences keep the scores small.
Paper: PagedAttention (Kwon et al., 2023); attention sinks as in gpt-oss (one logit a head, no value).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.kernels.attention import AttentionParameters, CacheSpec, LayerCache
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.numerics.cache_format import Stored

GROUP_SCORES = 1 << 26  # scores computed at once on a device: 256 MiB of float32


@dataclass(frozen=True)
class _Group:
    """Sequences attended together: rows of the batch's tables and how far they are padded."""

    sequences: slice
    first_tokens: Tensor  # int64 (sequences,): row of each sequence's first query
    queries: int
    context: int


class ReferenceAttention:
    """See the module docstring."""

    name = "reference"
    takes_padding = False

    def refuses(self, spec: CacheSpec, device: torch.device) -> str | None:
        """What is no cache at all."""
        return spec.impossible()

    def allocate(self, spec: CacheSpec, pages: int, page_size: int, device: torch.device) -> LayerCache:
        """Zeroed pages."""
        buffers = {}
        for name in ("k",) if spec.kind == "latent" else ("k", "v"):
            stored, dim = (spec.k_format, spec.k_dim) if name == "k" else (spec.v_format, spec.v_dim)
            none = stored.encode(torch.zeros(dim, device=device))
            for part, row in ((name, none.codes), (f"{name}_scales", none.scales)):
                if row is not None:
                    buffers[part] = row.new_zeros(pages, page_size, spec.heads, *row.shape)
        return LayerCache(spec, self, pages, page_size, buffers)

    def write(self, cache: LayerCache, k: Tensor, v: Tensor, batch: ForwardBatch) -> None:
        """Store k and v in the cache's formats at ``batch.write_slots``."""
        slots = (batch.write_slots.long(),)
        rows = {"k": cache.spec.k_format.encode(k)}
        if cache.spec.kind != "latent":
            rows["v"] = cache.spec.v_format.encode(v)
        for name, (codes, scales) in rows.items():
            for part, row in ((name, codes), (f"{name}_scales", scales)):
                if row is not None:  # bytes are moved: not every device indexes float8
                    _movable(cache.buffers[part]).flatten(0, 1).index_put_(slots, _movable(row))

    def attend(
        self, q: Tensor, cache: LayerCache, batch: ForwardBatch, parameters: AttentionParameters
    ) -> Tensor:
        """q (tokens, query heads, k_dim) -> (tokens, query heads * v_dim) in q's dtype."""
        attend = self._one_by_one if q.device.type == "cpu" else self._padded
        return attend(q, cache, batch, parameters).flatten(1)

    def _one_by_one(
        self, q: Tensor, cache: LayerCache, batch: ForwardBatch, parameters: AttentionParameters
    ) -> Tensor:
        """(tokens, heads, v_dim), with lengths read on the host."""
        out = q.new_empty(*q.shape[:2], cache.spec.v_dim)
        queries, contexts = batch.query_lengths.tolist(), batch.context_lengths.tolist()
        first = 0
        for row, (count, context) in enumerate(zip(queries, contexts, strict=True)):
            group = _Group(slice(row, row + 1), torch.tensor([first]), count, context)
            out[first : first + count] = self._attend_group(q, cache, batch, parameters, group)[0]
            first += count
        return out

    def _padded(
        self, q: Tensor, cache: LayerCache, batch: ForwardBatch, parameters: AttentionParameters
    ) -> Tensor:
        """The same without reading a length: groups of sequences, padded to the batch's maxima."""
        tokens, heads, _ = q.shape
        lengths = batch.query_lengths.long()
        first_tokens = lengths.cumsum(0) - lengths
        # Every token's sequence and its place there: output_size spares a wait for the sum of lengths.
        rows = torch.arange(len(lengths), device=q.device)
        sequence = rows.repeat_interleave(lengths, output_size=tokens)
        offset = torch.arange(tokens, device=q.device) - first_tokens[sequence]
        size = max(GROUP_SCORES // (heads * batch.max_query * batch.max_context), 1)
        out = q.new_zeros(tokens, heads, cache.spec.v_dim)
        for start in range(0, len(lengths), size):
            chosen = slice(start, start + size)
            group = _Group(chosen, first_tokens[chosen], batch.max_query, batch.max_context)
            attended = self._attend_group(q, cache, batch, parameters, group)
            inside = (sequence >= start) & (sequence < start + size)
            mine = attended[(sequence - start).clamp(0, len(attended) - 1), offset]
            out = torch.where(inside[:, None, None], mine, out)
        return out

    def _attend_group(
        self,
        q: Tensor,
        cache: LayerCache,
        batch: ForwardBatch,
        parameters: AttentionParameters,
        group: _Group,
    ) -> Tensor:
        """(sequences, queries, heads, v_dim) in q's dtype; rows past a sequence's queries are undefined."""
        spec = cache.spec
        context_lengths = batch.context_lengths[group.sequences].long()  # (S,)
        query_lengths = batch.query_lengths[group.sequences].long()
        k, v = self._gather(cache, batch, group, context_lengths)  # (S, kv heads, context, dim)

        row = torch.arange(group.queries, device=q.device)
        rows = (group.first_tokens[:, None] + row).clamp(max=q.shape[0] - 1)  # (S, Q)
        queries = q[rows].float().transpose(1, 2)  # (S, heads, Q, k_dim)
        queries = queries.unflatten(1, (spec.heads, -1)).flatten(2, 3)  # (S, kv heads, group * Q, k_dim)
        scores = (queries @ k.transpose(2, 3)) * parameters.scale
        scores = scores.unflatten(2, (-1, group.queries))  # (S, kv heads, group, Q, context)
        if parameters.softcap > 0:
            scores = parameters.softcap * torch.tanh(scores / parameters.softcap)

        position = (context_lengths - query_lengths)[:, None] + row  # (S, Q)
        key = torch.arange(k.shape[2], device=q.device)
        seen = key <= position[..., None]  # (S, Q, context)
        if spec.window:
            seen &= key > position[..., None] - spec.window
        scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
        probabilities = self._softmax(scores, parameters.sinks)
        attended = probabilities.flatten(2, 3) @ v  # (S, kv heads, group * Q, v_dim)
        attended = attended.unflatten(2, (-1, group.queries)).flatten(1, 2)  # (S, heads, Q, v_dim)
        return attended.transpose(1, 2).to(q.dtype)

    @staticmethod
    def _gather(
        cache: LayerCache, batch: ForwardBatch, group: _Group, context_lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """float32 K and V (S, kv heads, context, dim); zeros past each sequence's context."""
        spec, size = cache.spec, cache.page_size
        key = torch.arange(group.context, device=context_lengths.device)
        written = key < context_lengths[:, None]  # (S, context)
        # Table entries past a sequence's own pages are undefined: they are never used as an index.
        pages = batch.page_table[group.sequences].long()[:, key // size]  # (S, context)
        slots = torch.where(written, pages * size + key % size, 0)
        absent = ~written[..., None, None]

        def rows(name: str) -> Tensor | None:
            buffer = cache.buffers.get(name)
            return None if buffer is None else _movable(buffer).flatten(0, 1)[slots].view(buffer.dtype)

        def gathered(name: str) -> Tensor:
            codes, scales = rows(name), rows(f"{name}_scales")
            assert codes is not None, "allocate() made it"
            stored, dim = (spec.k_format, spec.k_dim) if name == "k" else (spec.v_format, spec.v_dim)
            numbers = stored.decode(Stored(codes, scales), dim)
            return numbers.masked_fill(absent, 0.0).transpose(1, 2)  # (S, heads, context, dim)

        k = gathered("k")
        return k, (k[..., : spec.v_dim] if spec.kind == "latent" else gathered("v"))

    @staticmethod
    def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
        """Over the last axis of (S, kv heads, group, Q, context); a sink takes its share and is dropped."""
        if sinks is None:
            return scores.softmax(-1)
        _, kv_heads, group, _, _ = scores.shape
        column = sinks.float().view(1, kv_heads, group, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, column], -1).softmax(-1)[..., :-1]


def _movable(x: Tensor) -> Tensor:
    """The same bytes in a dtype that every device can index."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x
