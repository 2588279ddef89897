"""Sequences, batches and pages for attention tests, and attention written from its definition."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lowbit.kernels.attention import PAGE_SIZE, AttentionKernel, AttentionParameters, CacheSpec
from lowbit.kernels.attention_cpu import CpuAttention
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.numerics.cache_format import STATIC_E4M3, KvDtype
from oracles.kv_cache import magnitudes as sizes
from oracles.kv_cache import read_back

CPU = torch.device("cpu")
BF16, F16, F32 = (KvDtype.of(name) for name in ("bf16", "fp16", "f32"))
E4M3 = KvDtype(STATIC_E4M3, STATIC_E4M3)
FLOAT_PRODUCTS = (
    "avx2",
    "avx512_vnni",
    "neon",
    "neon_bf16",
)  # they round neither queries nor softmax weights
NOWHERE = 2**30  # what undefined entries of a page table hold
Sequence = tuple[Tensor, Tensor, Tensor]  # q (tokens, heads, k_dim), k, v of every token
Read = Callable[[np.ndarray, str, str, int], np.ndarray]
Step = list[tuple[int, int, int]]  # (sequence, first new token, end) of one batch


def draw(spec: CacheSpec, group: int, lengths: list[int], seed: int = 0) -> list[Sequence]:
    """Random sequences. q is a bfloat16 number, so that rounding it changes nothing."""
    random_numbers = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random_numbers)

    def sequence(length: int) -> Sequence:
        q = (2 * normal(length, spec.heads * group, spec.k_dim)).bfloat16().float()
        k = normal(length, spec.heads, spec.k_dim)
        if spec.kind == "latent":
            k[..., : spec.v_dim] += 0.5
            return q, k, k[..., : spec.v_dim]
        return q, k, normal(length, spec.heads, spec.v_dim) + 0.5

    return [sequence(length) for length in lengths]


def hand_out_pages(
    lengths: list[int], seed: int = 0, spare: int = 3, page_size: int = PAGE_SIZE
) -> tuple[list[list[int]], int]:
    """Scrambled page numbers for every sequence, and how many pages there are."""
    counts = [-(-length // page_size) for length in lengths]
    numbers = list(range(sum(counts) + spare))
    random.Random(seed).shuffle(numbers)
    return [[numbers.pop() for _ in range(count)] for count in counts], sum(counts) + spare


def make_batch(
    step: Step, pages: list[list[int]], page_size: int = PAGE_SIZE, device: torch.device = CPU
) -> ForwardBatch:
    positions = [position for _, first, end in step for position in range(first, end)]
    owners = [sequence for sequence, first, end in step for _ in range(first, end)]
    slots = [
        pages[owner][position // page_size] * page_size + position % page_size
        for owner, position in zip(owners, positions, strict=True)
    ]
    used = [pages[sequence][: -(-end // page_size)] for sequence, _, end in step]
    width = max(map(len, used)) + 2

    def int32(numbers: list) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    return ForwardBatch(
        tokens=int32(positions),
        positions=int32(positions),
        write_slots=int32(slots),
        query_lengths=int32([end - first for _, first, end in step]),
        context_lengths=int32([end for _, _, end in step]),
        page_table=int32([row + [NOWHERE] * (width - len(row)) for row in used]),
        sample_rows=torch.arange(len(positions), device=device),
        page_size=page_size,
        max_query=max(end - first for _, first, end in step),
        max_context=max(end for _, _, end in step),
    )


def simulate(
    spec: CacheSpec,
    sequences: list[Sequence],
    steps: list[Step],
    parameters: AttentionParameters,
    kernel: AttentionKernel | None = None,
    pages: list[list[int]] | None = None,
    seed: int = 0,
    page_size: int = PAGE_SIZE,
    device: torch.device = CPU,
) -> list[Tensor]:
    """(tokens, heads * v_dim) of every sequence; a slot nobody has written holds NaN."""
    lengths = [len(q) for q, _, _ in sequences]
    if pages is None:
        pages, count = hand_out_pages(lengths, seed, page_size=page_size)
    else:
        count = 1 + max(number for row in pages for number in row)
    kernel = kernel or CpuAttention()
    cache = kernel.allocate(spec, count, page_size, device)
    for buffer in cache.buffers.values():
        buffer.view(torch.uint8).fill_(0xFF)  # NaN in every float format, scales among them
    if parameters.sinks is not None:
        parameters = replace(parameters, sinks=parameters.sinks.to(device))
    outputs = [
        torch.full((len(q), q.shape[1] * spec.v_dim), torch.nan, dtype=q.dtype) for q, _, _ in sequences
    ]
    for step in steps:
        batch = make_batch(step, pages, page_size, device)
        q, k, v = (
            torch.cat([sequences[owner][part][first:end] for owner, first, end in step]).to(device)
            for part in range(3)
        )
        kernel.write(cache, k, v, batch)
        attended = kernel.attend(q, cache, batch, parameters)
        chunks = attended.split([end - first for _, first, end in step])
        for (owner, first, end), chunk in zip(step, chunks, strict=True):
            outputs[owner][first:end] = chunk.cpu()
    return outputs


def whole(sequences: list[Sequence]) -> list[Step]:
    """One batch with all of every sequence."""
    return [[(owner, 0, len(q)) for owner, (q, _, _) in enumerate(sequences)]]


def key_codes(pages: Tensor, dim: int, bits: int = 8) -> Tensor:
    """uint8 (tokens, heads, dim): the codes in native pages (pages, heads, bytes) of narrow keys.

    They lie in quads of 4 dimensions: a pair of them of 4 tokens, the other pair of these, and so four times.
    """
    codes = pages[:, :, : dim * PAGE_SIZE * bits // 8]
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1)
    quads = codes.reshape(*pages.shape[:2], dim // 4, 4, 2, 4, 2)
    return quads.permute(0, 3, 5, 1, 2, 4, 6).reshape(-1, pages.shape[1], dim)


def stored(spec: CacheSpec, k: Tensor, v: Tensor, read_back: Read = read_back) -> tuple[Tensor, Tensor]:
    """float32 K and V as they are read back from the cache."""

    def read(x: Tensor, part: str, static: bool, kind: str) -> Tensor:
        if static:
            return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
        if spec.kind == "latent":  # one row holds both, and no group of channels may span the border
            group = math.gcd(spec.k_dim, spec.v_dim, 16 if kind == "int4" else 0)
            return torch.from_numpy(read_back(k.numpy(), kind, "k", group))[..., : x.shape[-1]]
        return torch.from_numpy(read_back(x.numpy(), kind, part, 0))

    both = spec.dtype.k, spec.dtype.v
    statics = [one.name == "fp8_e4m3" and not one.dynamic for one in both]
    return read(k, "k", statics[0], both[0].name), read(v, "v", statics[1], both[1].name)


def expected(
    spec: CacheSpec, sequence: Sequence, parameters: AttentionParameters, magnitudes: bool = False
) -> Tensor:
    """Attention written from its definition in float64, head by head, K and V as the cache holds them.

    ``magnitudes``: of V's absolute values, what errors of the weights are multiplied with.
    """
    q, k, v = sequence[0].double(), *(part.double() for part in stored(spec, *sequence[1:]))
    if magnitudes:
        v = stored(spec, *sequence[1:], sizes)[1].double().abs()
    tokens, heads, _ = q.shape
    age = torch.arange(tokens)[:, None] - torch.arange(tokens)
    hidden = age < 0
    if spec.window:
        hidden |= age >= spec.window
    out = []
    for head in range(heads):
        kv_head = head // (heads // spec.heads)
        scores = q[:, head] @ k[:, kv_head].T * parameters.scale
        if parameters.softcap:
            scores = parameters.softcap * (scores / parameters.softcap).tanh()
        weights = scores.exp().masked_fill(hidden, 0)
        total = weights.sum(1)
        if parameters.sinks is not None:
            total = total + parameters.sinks[head].double().exp()
        out.append(weights @ v[:, kv_head] / total[:, None])
    return torch.cat(out, 1)


def plain(spec: CacheSpec) -> AttentionParameters:
    return AttentionParameters(scale=spec.k_dim**-0.5)


def spec_of(heads: int, k_dim: int, v_dim: int = 0, dtype: KvDtype = BF16, window: int = 0) -> CacheSpec:
    return CacheSpec("paged", heads, k_dim, v_dim or k_dim, dtype, window)


def latent_of(k_dim: int, v_dim: int, dtype: KvDtype = BF16, window: int = 0) -> CacheSpec:
    return CacheSpec("latent", 1, k_dim, v_dim, dtype, window)


def assert_equal_bits(found: list[Tensor], wanted: list[Tensor]) -> None:
    for number, (left, right) in enumerate(zip(found, wanted, strict=True)):
        assert not left.isnan().any(), f"sequence {number} has NaN"
        differing = (left.view(torch.int32) != right.view(torch.int32)).any(1).nonzero().flatten().tolist()
        assert not differing, f"sequence {number}: tokens {differing[:8]} differ"
