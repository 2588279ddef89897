"""Paged attention on a GPU, every cache format (Triton: paged_attention, cache_write, cache_read).

A page holds PAGE tokens of every K/V head, head by head, so that a tile of one head's keys is contiguous
memory:

    k        (pages, heads, page_size, k_dim)             codes; int4: k_dim / 2 bytes, packed as there
    k_scales (pages, heads, page_size, groups, numbers)   bfloat16, where tokens have scales of their own
    v, v_scales                                           likewise; a latent cache has k alone

8-bit floats lie as bytes. What is stored equals ``numerics.cache_format``'s ``encode``, bit for bit.

*What is multiplied.* K and V of f32 caches as float32, of fp16 caches as float16, of all others as
bfloat16, and queries and softmax weights with them, rounded to that type (queries saturate in float16).
Codes of 8 bits are exact in bfloat16: a token's scale meets the float32 score, or the softmax weight
before it is rounded. Scales of groups of channels (int4, quantized latents) make the number itself, which
is rounded to bfloat16. Scores, softmax and sums are float32.

*Padding.* A step may hold rows that only fill it, as a captured one does: a token whose write slot is -1
(or any slot that the cache does not have) is not stored, and a sequence with ``context_length`` 0 reads no
page and gives zeros for its query rows. A sequence with ``query_length`` 0 has no rows; rows of ``q``
behind the last sequence's are not written, so whoever fills a batch up gives each such row a sequence of
one query and no context.

*Grids* follow from host numbers alone: tokens, sequences, ``max_query`` and ``max_context``, which may be
more than what the device's tensors say, never less. ``page_table`` must be as wide as the contexts that
occur.

*One launch or two.* Sequences with few queries want small tiles and many splits, prompts large tiles.
Where a step may have both, each kind gets a launch, and the programs of the other's sequences end at once:
one launch with a prompt's tiles would read a long context of a decoding sequence in one program, for as
long as the step takes. A step of decodes, or of one sequence, is one launch. Where splits are used
``merge`` follows.

Which rows are computed together, and how many splits there are, follows from the batch: the same step
gives the same bits, a request's last bits may differ from batch to batch. **Nothing here has run on a GPU
yet**: the kernels are proven in Triton's interpreter and compiled for Ampere and Hopper; block sizes are
reasoned, not measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels.attention import AttentionParameters, CacheSpec, LayerCache
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.gpu import runtime
from lowbit.numerics.cache_format import CacheFormat

MOST_DIMS = {"k_dim": 576, "v_dim": 512}  # of a head: what a program's registers hold
FEW_QUERIES = 16  # query tokens of a sequence up to which a step is a decode step, with drafts
LEAST_SPLIT = 128  # keys that are worth a split
MOST_SPLITS = 128
PROGRAMS = 4  # wanted on a multiprocessor
MOST = 2**31 - 1
STAGES = 3
WRITTEN = 2048  # numbers that a program of the writing kernel holds


@dataclass(frozen=True)
class _Device:
    """What block sizes depend on."""

    processors: int
    shared: int  # bytes of shared memory a program may have


@dataclass(frozen=True)
class GpuLayerCache(LayerCache):
    """A LayerCache with the constants its kernels are compiled for."""

    device: _Device
    write_constants: dict[str, object]
    attend_constants: dict[str, object]


@dataclass(frozen=True)
class _Blocks:
    """M rows by N keys, and how a program of them runs. ``interior``: with a loop for keys all rows see."""

    rows: int
    keys: int
    warps: int
    interior: bool = False


@dataclass(frozen=True)
class _Pass:
    """One launch: sequences of ``least`` to ``most`` queries, ``tiles`` each (0: as many as it needs)."""

    least: int
    most: int
    tiles: int
    programs: int
    rows: int  # of a tile that may be used
    blocks: _Blocks


class GpuAttention:
    """See the module docstring."""

    name = "gpu"
    takes_padding = True

    def refuses(self, spec: CacheSpec, device: torch.device) -> str | None:
        """Paged and latent caches where Triton runs, heads of at most 576 and 512 channels."""
        if (reason := runtime.refuses(device) or spec.impossible()) is not None:
            return reason
        for name, dim in (("k_dim", spec.k_dim), ("v_dim", spec.v_dim)):
            if not 0 < dim <= MOST_DIMS[name]:
                return f"needs {name} <= {MOST_DIMS[name]}, got {dim}"
        if spec.kind == "latent" and spec.v_dim > spec.k_dim:
            return f"a latent's values are part of its key, got v_dim {spec.v_dim} > k_dim {spec.k_dim}"
        return None

    def allocate(self, spec: CacheSpec, pages: int, page_size: int, device: torch.device) -> LayerCache:
        """Zeroed pages."""
        if page_size < 8 or page_size & (page_size - 1):
            raise LowbitError(
                "E0420",
                f"attention kernel {self.name!r} needs pages of 8, 16, 32 … tokens, got {page_size}",
            )
        buffers = {}
        for name in ("k",) if spec.kind == "latent" else ("k", "v"):
            stored, dim = (spec.k_format, spec.k_dim) if name == "k" else (spec.v_format, spec.v_dim)
            rows = (pages, spec.heads, page_size)
            dtype = torch.uint8 if stored.name.startswith("fp8") else stored.dtype
            buffers[name] = _zeros((*rows, dim * stored.bits // (8 * dtype.itemsize)), dtype, device)
            if stored.dynamic:
                shape = (-(-dim // stored.group_of(dim)), stored.parameters)
                buffers[f"{name}_scales"] = _zeros((*rows, *shape), torch.bfloat16, device)
        return GpuLayerCache(
            spec,
            self,
            pages,
            page_size,
            buffers,
            _device(device),
            _write_constants(spec, page_size),
            _attend_constants(spec, page_size),
        )

    def write(self, cache: LayerCache, k: Tensor, v: Tensor, batch: ForwardBatch) -> None:
        """Store k and v in the cache's formats at ``batch.write_slots``."""
        from lowbit.kernels.gpu.cache_write import write

        assert isinstance(cache, GpuLayerCache), "a cache is used by the kernel that allocated it"
        spec, tokens = cache.spec, len(batch.write_slots)
        k = _strided(k)
        v = k if spec.kind == "latent" else _strided(v)
        assert k.shape == (tokens, spec.heads, spec.k_dim), f"k {tuple(k.shape)} is not {spec}'s"
        assert spec.kind == "latent" or v.shape == (tokens, spec.heads, spec.v_dim), f"v {tuple(v.shape)}"
        taken = cache.write_constants["TOKENS"]
        assert isinstance(taken, int)
        runtime.launch(
            write,
            (-(-tokens // taken), spec.heads),
            k,
            v,
            cache.buffers["k"],
            cache.buffers.get("k_scales"),
            cache.buffers.get("v"),
            cache.buffers.get("v_scales"),
            batch.write_slots,
            tokens,
            cache.pages * cache.page_size,
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            num_warps=4,
            num_stages=1,
            **cache.write_constants,
        )

    def attend(
        self, q: Tensor, cache: LayerCache, batch: ForwardBatch, parameters: AttentionParameters
    ) -> Tensor:
        """q (tokens, query heads, k_dim) -> (tokens, query heads * v_dim) in q's dtype."""
        assert isinstance(cache, GpuLayerCache), "a cache is used by the kernel that allocated it"
        spec, q = cache.spec, _strided(q)
        tokens, heads, dim = q.shape
        assert dim == spec.k_dim and heads % spec.heads == 0, f"q {tuple(q.shape)} does not fit {spec}"
        sinks = parameters.sinks
        assert sinks is None or (sinks.dtype is torch.float32 and sinks.shape == (heads,)), "one sink a head"
        out = torch.empty(tokens, heads * spec.v_dim, dtype=q.dtype, device=q.device)
        for one in _passes(cache, tokens, batch, heads // spec.heads):
            _launch(one, q, cache, batch, parameters, out)
        return out


def _launch(
    one: _Pass,
    q: Tensor,
    cache: GpuLayerCache,
    batch: ForwardBatch,
    parameters: AttentionParameters,
    out: Tensor,
) -> None:
    from lowbit.kernels.gpu.paged_attention import attend, merge

    spec, buffers, blocks = cache.spec, cache.buffers, one.blocks
    latent, sequences = spec.kind == "latent", len(batch.query_lengths)
    splits = _splits(one.programs * spec.heads, _longest(spec, batch), cache.device)
    parts = (one.programs, spec.heads, splits, blocks.rows)
    sums = peaks = totals = None
    if splits > 1:
        sums = torch.empty(*parts, spec.v_dim, dtype=torch.float32, device=q.device)
        peaks, totals = torch.empty(2, *parts, dtype=torch.float32, device=q.device)
    shape: dict[str, object] = {
        "GROUP": q.shape[1] // spec.heads,
        "M": blocks.rows,
        "ALIKE": one.tiles > 0,
        "SEQUENCES": _block_of_sequences(sequences),
        "SINKS": parameters.sinks is not None,
    }
    runtime.launch(
        attend,
        (one.programs, spec.heads, splits),
        q,
        buffers["k"],
        buffers.get("k_scales"),
        buffers["k" if latent else "v"],
        buffers.get("k_scales" if latent else "v_scales"),
        batch.page_table,
        batch.query_lengths,
        batch.context_lengths,
        parameters.sinks,
        out,
        sums,
        peaks,
        totals,
        q.stride(0),
        q.stride(1),
        batch.page_table.stride(0),
        sequences,
        one.tiles,
        one.least,
        one.most,
        spec.window,
        float(parameters.scale),
        float(parameters.softcap),
        num_warps=blocks.warps,
        num_stages=STAGES,
        N=blocks.keys,
        SPLIT=splits > 1,
        INTERIOR=blocks.interior and splits == 1 and not spec.window,
        SOFTCAP=parameters.softcap > 0,
        **shape,
        **cache.attend_constants,
    )
    if splits > 1:
        runtime.launch(
            merge,
            (one.programs, spec.heads, one.rows),
            sums,
            peaks,
            totals,
            batch.query_lengths,
            parameters.sinks,
            out,
            sequences,
            one.tiles,
            one.least,
            one.most,
            splits,
            num_warps=4,
            num_stages=1,
            SPLITS=MOST_SPLITS,  # whatever there are: one kernel to compile
            BLOCK=16,
            V_DIM=spec.v_dim,
            V_BLOCK=_power_of_two(spec.v_dim),
            **shape,
        )


def _passes(cache: GpuLayerCache, tokens: int, batch: ForwardBatch, group: int) -> list[_Pass]:
    """The launches of a step; see the module docstring."""
    sequences, most = len(batch.query_lengths), batch.max_query
    if most <= FEW_QUERIES or sequences == 1:
        return [_pass_of_equals(cache, 0, MOST, sequences, most * group)]
    few = max(16 // group, 1)  # queries that fill the smallest tile
    blocks = _blocks(cache, most * group)
    # Tiles are numbered with gaps: each sequence's begin one further than they need (``_place``).
    programs = tokens * group // blocks.rows + sequences
    prompts = _Pass(few + 1, MOST, 0, programs, blocks.rows, blocks)
    return [prompts, _pass_of_equals(cache, 0, few, sequences, few * group)]


def _pass_of_equals(cache: GpuLayerCache, least: int, most: int, sequences: int, rows: int) -> _Pass:
    """Every sequence gets the tiles of the longest."""
    blocks = _blocks(cache, rows)
    tiles = -(-rows // blocks.rows)
    return _Pass(least, most, tiles, sequences * tiles, min(rows, blocks.rows), blocks)


def _longest(spec: CacheSpec, batch: ForwardBatch) -> int:
    """Keys that the rows of a tile can see."""
    if not spec.window:
        return batch.max_context
    return min(batch.max_context, spec.window + min(batch.max_query, FEW_QUERIES))


def _splits(programs: int, keys: int, device: _Device) -> int:
    """As many as fill the GPU, where each still has keys worth a program."""
    wanted = -(-PROGRAMS * device.processors // programs)
    return max(min(wanted, -(-keys // LEAST_SPLIT), MOST_SPLITS), 1)


def _blocks(cache: GpuLayerCache, rows: int) -> _Blocks:
    """Tile sizes for up to ``rows`` query rows of a sequence.

    *Rows.* A prompt's tile has 128 where sums of 128 channels are at most 64 registers a thread of 8
    warps, 64 for wider heads, 32 for latents (64 spill 556 bytes on Hopper), 32 or 16 in float32, which is
    multiplied without tensor cores. Fewer rows than that: the next power of two, 16 for tensor cores.

    *Keys.* Decode waits for memory: 64 keys of 64 channels, 32 of more, which is up to 16 KiB of K and V
    loaded while the tile before is computed, in few enough registers for four programs a multiprocessor.
    Prompts: 64, or 32 of heads wider than 128; 16 rows and keys of a latent where shared memory is small
    (Ada).

    *Stages.* Three: page numbers two tiles ahead, K and V one, which is what an address that is itself
    loaded needs.
    """
    constants = cache.attend_constants

    def number(name: str) -> int:
        found = constants[name]
        assert isinstance(found, int)
        return found

    widest = max(number("K0") + number("K1"), number("V0") + number("V1"))
    floats = constants["K_TYPE"] == "f32" or constants["V_TYPE"] == "f32"
    most = 128 if widest <= 128 else 64
    if floats or widest > 256:
        most = 16 if floats and widest > 256 else 32
    small = widest > 256 and cache.device.shared < 128 << 10
    rows = min(max(_power_of_two(rows), 16), 16 if small else most)
    many = widest <= (128 if rows > 32 else 64) and not floats
    warps = 8 if widest > 256 or floats or rows * widest > 128 * 64 else 4
    return _Blocks(rows, 64 if many else 16 if small else 32, warps, interior=rows > 32 and widest <= 256)


def _write_constants(spec: CacheSpec, page_size: int) -> dict[str, object]:
    latent = spec.kind == "latent"
    constants: dict[str, object] = {"PAGE": page_size, "LATENT": latent}
    largest = 0
    for name, stored, dim in (("K", spec.k_format, spec.k_dim), ("V", spec.v_format, spec.v_dim)):
        group = stored.group_of(dim) or dim
        groups = -(-dim // group)
        blocks = _power_of_two(groups), max(_power_of_two(group), 2)
        constants |= {
            f"{name}_FORMAT": stored.name,
            f"{name}_DYNAMIC": stored.dynamic,
            f"{name}_DIM": dim,
            f"{name}_GROUP": group,
            f"{name}_GROUPS": groups,
            f"{name}_GROUPS_BLOCK": blocks[0],
            f"{name}_GROUP_BLOCK": blocks[1],
        }
        largest = max(largest, blocks[0] * blocks[1])
    return constants | {"TOKENS": max(WRITTEN // largest, 1)}


def _attend_constants(spec: CacheSpec, page_size: int) -> dict[str, object]:
    latent = spec.kind == "latent"
    k0, k1 = _parts(spec.k_dim)
    v0, v1 = _parts(spec.v_dim)
    shared = latent and spec.v_dim == v0  # the values are the keys' first part
    if shared:
        k0, k1 = v0, spec.k_dim - v0 and max(_power_of_two(spec.k_dim - v0), 16)
    k_group, k_scaled = _scales(spec.k_format, spec.k_dim)
    v_group, v_scaled = (k_group, k_scaled) if latent else _scales(spec.v_format, spec.v_dim)
    return {
        "PAGE": page_size,
        "WINDOW": spec.window > 0,
        "LATENT": shared,
        "K_DIM": spec.k_dim,
        "K0": k0,
        "K1": k1,
        "K_FORMAT": spec.k_format.name,
        "K_GROUP": k_group,
        "K_SCALED": k_scaled,
        "K_TYPE": _multiplied(spec.k_format),
        "V_DIM": spec.v_dim,
        "V0": v0,
        "V1": v1,
        "V_STORED": spec.k_dim if latent else spec.v_dim,
        "V_FORMAT": spec.v_format.name,
        "V_GROUP": v_group,
        "V_SCALED": v_scaled,
        "V_TYPE": _multiplied(spec.v_format),
    }


def _scales(stored: CacheFormat, dim: int) -> tuple[int, bool]:
    """Channels that share a scale which a tile applies itself, and whether a vector has one scale in all."""
    group = stored.group_of(dim)
    if stored.bits == 8 and group == dim:
        return 0, True
    return group, False


def _multiplied(stored: CacheFormat) -> str:
    return stored.name if stored.name in ("f32", "fp16") else "bf16"


def _parts(dim: int) -> tuple[int, int]:
    """Two powers of two, of at least 16, that hold ``dim`` channels; the second 0 where one does."""
    first = max(1 << (dim.bit_length() - 1), 16)
    if dim <= first:
        return first, 0
    second = max(_power_of_two(dim - first), 16)
    return (2 * first, 0) if second == first else (first, second)


def _block_of_sequences(sequences: int) -> int:
    """A power of four, so that few kernels are compiled."""
    return max(4 ** math.ceil(math.log(sequences, 4)), 16)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


@cache
def _device(device: torch.device) -> _Device:
    if device.type != "cuda":  # the interpreter: as an A100
        return _Device(108, 163 << 10)
    from triton.runtime import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    properties = driver.active.utils.get_device_properties(index)
    return _Device(properties["multiprocessor_count"], properties["max_shared_mem"])


def _strided(x: Tensor) -> Tensor:
    """x (tokens, heads, dim) with contiguous vectors: a view of a fused output stays one."""
    return x if x.stride(2) == 1 else x.contiguous()
