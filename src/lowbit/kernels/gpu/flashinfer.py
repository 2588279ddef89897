"""gpu_flashinfer: attention by FlashInfer's paged kernels (pip install 'lowbit[flashinfer]'), if asked for.

Pages are (pages, page_size, heads, dim), which FlashInfer calls NHD and the reference kernel has too, so that
``allocate`` and ``write`` are its own. Caches of bf16, fp16 and of e4m3 under a layer's scale, K and V alike;
windows and soft caps; no sinks, no latents, no scales of tokens. Queries are rounded to the cache's type
(beside e4m3: bfloat16).

FlashInfer plans a step on the host: it needs every sequence's lengths there (``ForwardBatch.host_lengths``; a
batch without them is read from the device, which waits for it). One plan serves all layers alike. A recorded
step would run with the plan of the step that was recorded, so there are no CUDA graphs of such steps: reading
the lengths of a static batch fails while one is captured, and the engine runs eagerly, a few launches a layer
at every step.

Steps of one token a sequence run on ``BatchDecodeWithPagedKVCacheWrapper``, all others on
``BatchPrefillWithPagedKVCacheWrapper``. Its samplers are not used: which tokens a request gets is the same on
CPU and GPU here, which other random numbers would not keep. **Nothing here has run on a GPU.**
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels.attention import AttentionParameters, CacheSpec, LayerCache
from lowbit.kernels.attention_reference import ReferenceAttention
from lowbit.kernels.device_memory import upload
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.gpu import trial
from lowbit.numerics.cache_format import CacheFormat

_DIMS = (64, 128, 256)
_WORKSPACE = 128 << 20  # bytes for the partial sums of split contexts, as its authors advise
_TENSOR_CORES = 4  # query heads a K/V head from which decoding uses tensor cores


@dataclass(frozen=True)
class _Plan:
    """A wrapper that is ready for the layers of ``batch``. ``sent``: once its plan has left the host."""

    batch: ForwardBatch
    wrapper: Any
    sent: torch.cuda.Event | None


@dataclass(frozen=True)
class _Pages:
    """A batch's lengths and pages as FlashInfer wants them; all on the host but ``indices``, int32.

    ``query_starts`` and ``page_starts``: (sequences + 1,), running sums. ``indices``: the pages in use.
    """

    query_starts: Tensor
    page_starts: Tensor
    indices: Tensor
    last_lengths: Tensor
    decodes: bool


class FlashInferAttention(ReferenceAttention):
    """See the module docstring."""

    name = "gpu_flashinfer"

    def __init__(self) -> None:
        self._plans: dict[tuple[object, ...], _Plan] = {}
        self._wrappers: dict[tuple[object, ...], Any] = {}
        self._workspaces: dict[torch.device, Tensor] = {}

    def refuses(self, spec: CacheSpec, device: torch.device) -> str | None:
        """Why FlashInfer cannot serve the spec, is not there or fails, or None."""
        if device.type != "cuda":
            return f"needs an NVIDIA GPU, got {device.type}"
        if find_spec("flashinfer") is None:
            return "FlashInfer is not installed (pip install 'lowbit[flashinfer]')"
        if reason := unserved(spec):
            return reason
        small = replace(spec, heads=2, window=20 if spec.window else 0)
        kind = f"{spec.dtype}, heads of {spec.k_dim} channels{' and a window' if spec.window else ''}"
        return trial.fault(self.name, kind, device, lambda: _trial(small, device))

    def attend(
        self, q: Tensor, cache: LayerCache, batch: ForwardBatch, parameters: AttentionParameters
    ) -> Tensor:
        """q (tokens, query heads, k_dim) -> (tokens, query heads * v_dim) in q's dtype."""
        if parameters.sinks is not None:
            raise LowbitError("E0420", f"attention kernel {self.name!r} has no attention sinks")
        multiplied = _multiplied(cache.spec.k_format)
        wrapper = self._planned(q.shape[1], q.device, cache, batch, parameters)
        out: Tensor = wrapper.run(q.to(multiplied), (cache.buffers["k"], cache.buffers["v"]))
        return out.flatten(1).to(q.dtype)

    def _planned(
        self,
        heads: int,
        device: torch.device,
        cache: LayerCache,
        batch: ForwardBatch,
        parameters: AttentionParameters,
    ) -> Any:
        """A wrapper for the batch; layers that are alike share one, and its plan."""
        spec = cache.spec
        key = (device, spec, heads, parameters.scale, parameters.softcap)
        known = self._plans.get(key)
        if known is not None and known.batch is batch:
            return known.wrapper
        if known is not None and known.sent is not None:
            known.sent.synchronize()  # the next plan is written where this one is read from
        pages = pages_of(batch)
        group = heads // spec.heads
        wrapper = self._wrapper((*key, pages.decodes), device, pages.decodes, group)
        shape = (heads, spec.heads, spec.k_dim, cache.page_size)
        options = {
            "pos_encoding_mode": "NONE",
            "window_left": spec.window - 1,  # keys before a query's own; -1: all
            "logits_soft_cap": parameters.softcap,
            "sm_scale": parameters.scale,
            "q_data_type": _multiplied(spec.k_format),
            "kv_data_type": spec.k_format.dtype,
        }
        paged = (pages.page_starts, pages.indices, pages.last_lengths)
        if pages.decodes:
            wrapper.plan(*paged, *shape, **options)
        else:
            wrapper.plan(pages.query_starts, *paged, *shape, causal=True, **options)
        sent = torch.cuda.Event() if device.type == "cuda" else None
        if sent is not None:
            sent.record(torch.cuda.current_stream(device))
        self._plans[key] = _Plan(batch, wrapper, sent)
        return wrapper

    def _wrapper(self, key: tuple[object, ...], device: torch.device, decodes: bool, group: int) -> Any:
        """Made once: each holds a few MiB of its own, and all of a device one workspace."""
        import flashinfer

        if key not in self._wrappers:
            if device not in self._workspaces:
                self._workspaces[device] = torch.zeros(_WORKSPACE, dtype=torch.uint8, device=device)
            workspace = self._workspaces[device]
            self._wrappers[key] = (
                flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                    workspace, "NHD", use_tensor_cores=group >= _TENSOR_CORES
                )
                if decodes
                else flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
            )
        return self._wrappers[key]


@cache
def flashinfer_attention() -> FlashInferAttention:
    """The one of this process: its plans serve all layers of a step."""
    return FlashInferAttention()


def unserved(spec: CacheSpec) -> str | None:
    """What FlashInfer's paged kernels lack for a cache, or None."""
    if spec.kind != "paged":
        return f"serves paged caches, got {spec.kind}"
    if spec.sinks:
        return "has no attention sinks"
    if spec.k_dim != spec.v_dim or spec.k_dim not in _DIMS:
        return f"needs heads of {', '.join(map(str, _DIMS))} channels, got {spec.k_dim} and {spec.v_dim}"
    k, v = spec.k_format, spec.v_format
    if k != v or k.dynamic or k.name not in ("bf16", "fp16", "fp8_e4m3"):
        scales = " with a scale for every token" if k.dynamic else ""
        return f"serves bf16, fp16 and e4m3 under a layer's scale, K and V alike, got {spec.dtype}{scales}"
    return None


def _multiplied(stored: CacheFormat) -> torch.dtype:
    return torch.bfloat16 if stored.bits == 8 else stored.dtype


def pages_of(batch: ForwardBatch) -> _Pages:
    """See ``_Pages``."""
    lengths = batch.host_lengths
    if lengths is None:
        lengths = batch.query_lengths.cpu().numpy(), batch.context_lengths.cpu().numpy()
    queries, contexts = lengths
    counts = -(-contexts // batch.page_size)
    width = batch.page_table.shape[1]
    places = [row * width + np.arange(count) for row, count in enumerate(counts)]
    [used] = upload([np.concatenate(places).astype(np.int32)], batch.page_table.device)

    def sums(numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(np.concatenate([[0], np.cumsum(numbers)]).astype(np.int32))

    return _Pages(
        sums(queries),
        sums(counts),
        batch.page_table.reshape(-1).index_select(0, used),
        torch.from_numpy((contexts - (counts - 1) * batch.page_size).astype(np.int32)),
        bool((queries == 1).all()),
    )


def _trial(spec: CacheSpec, device: torch.device) -> str:
    """Two prompts and then a token of each, beside the reference on the same pages."""
    kernel, reference, draw = FlashInferAttention(), ReferenceAttention(), torch.Generator().manual_seed(1)
    cache = kernel.allocate(spec, 8, 16, device)
    parameters = AttentionParameters(spec.k_dim**-0.5)
    multiplied = _multiplied(spec.k_format)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device, multiplied)

    for starts, ends in (((0, 0), (37, 20)), ((37, 20), (38, 21))):
        batch = _trial_batch(starts, ends, device)
        tokens = len(batch.tokens)
        kernel.write(cache, normal(tokens, 2, spec.k_dim), normal(tokens, 2, spec.v_dim), batch)
        for group in (1, _TENSOR_CORES):
            q = normal(tokens, 2 * group, spec.k_dim)
            found = kernel.attend(q, cache, batch, parameters).float()
            wanted = reference.attend(q, cache, batch, parameters).float()
            if said := trial.differs(found, wanted, wanted.abs().max(), 2e-2):
                return said
    return ""


def _trial_batch(starts: tuple[int, int], ends: tuple[int, int], device: torch.device) -> ForwardBatch:
    table = torch.tensor([[5, 0, 3, 7], [2, 6, 0, 0]], dtype=torch.int32)
    positions = [torch.arange(start, end) for start, end in zip(starts, ends, strict=True)]
    slots = [table[row, at // 16] * 16 + at % 16 for row, at in enumerate(positions)]
    counts = np.array(ends, dtype=np.int32) - np.array(starts, dtype=np.int32)
    tokens = torch.cat(positions).int()
    return ForwardBatch(
        tokens=tokens,
        positions=tokens,
        write_slots=torch.cat(slots).int(),
        query_lengths=torch.from_numpy(counts),
        context_lengths=torch.tensor(ends, dtype=torch.int32),
        page_table=table,
        sample_rows=torch.arange(len(tokens)),
        page_size=16,
        max_query=int(counts.max()),
        max_context=max(ends),
        host_lengths=(counts, np.array(ends, dtype=np.int32)),
    ).to(device)
