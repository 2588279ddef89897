"""Qwen3-Next and Qwen3.5: blocks whose first half is a gated delta network or attention with an output gate.

Gated DeltaNet (Yang et al., 2024) keeps a state of fixed size for each sequence in place of keys and values;
what it computes between its projections is defined in ``kernels.recurrent``. The output of attention is
multiplied by the sigmoid of a gate, which the query projection makes beside the queries, head by head.

Qwen3.5 has the projections of a gated delta network apart. Its GGUF files have value heads in another order,
all first ones of their key heads, then all second ones: what goes into the recurrence and comes out of it
changes places there.

A rank has whole heads of both: of a gated delta network value heads with their key head, the channels of the
convolution that are theirs, and their states.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels.attention import AttentionParameters, CacheSpec, LayerCache
from lowbit.kernels.elementwise import HeadNorms, RotaryTable, affine, apply_rotary, gather_columns
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.parallel import Parallel
from lowbit.kernels.recurrent import DeltaParameters, LayerMemory, LayerState, StateSpec
from lowbit.kernels.recurrent_cpu import sigmoid_gate
from lowbit.layers.cuts import Cut, cut_heads
from lowbit.layers.linear import Linear, Part
from lowbit.layers.weight_loader import WeightLoader
from lowbit.models.config import ModelConfig
from lowbit.models.language_model import Cuts, rotary_tables
from lowbit.models.mixer_model import MixerBlock, MixerModel
from lowbit.numerics.cache_format import KvDtype


@dataclass(frozen=True)
class QwenNextConfig(ModelConfig):
    """``recurrent``: the layers that are gated delta networks, with states of ``state``. ``gguf``: whether
    vectors lie as in GGUF files; ``tiled``: whether value heads do as in those of Qwen3.5; ``mlx``: as mlx-lm
    writes them, taps before the one input channel and 1 added to all norms but those of these layers."""

    recurrent: frozenset[int] = frozenset()
    state: StateSpec = field(default_factory=lambda: StateSpec(1, 1, 1, 1, 1))
    gguf: bool = False
    tiled: bool = False
    mlx: bool = False


@dataclass(frozen=True)
class DeltaCuts:
    """What a rank has of a gated delta network: value heads, and key heads that are theirs."""

    values: Cut
    keys: Cut

    @staticmethod
    def of(state: StateSpec, parallel: Parallel) -> DeltaCuts | None:
        """None in one process. ``state``: of the whole model."""
        called = ("value heads", "key heads of linear attention")
        found = cut_heads(parallel, state.heads, state.k_heads, called)
        return None if found is None else DeltaCuts(*found)

    def spec(self, state: StateSpec) -> StateSpec:
        """The states that are here."""
        return replace(state, k_heads=self.keys.size, heads=self.values.size)

    def channels(self, state: StateSpec) -> tuple[Cut, Cut, Cut]:
        """Those of q, k and v."""
        keys = self.keys.times(state.k_dim)
        return keys, keys, self.values.times(state.v_dim)


@dataclass(frozen=True)
class DeltaNet:
    """``inner``: q, k, v, z, b and a in one (``recurrent.StateSpec.width`` rows), q, k, v, z of all heads in
    turn; ``spec``: of the heads that are here. ``places``: int64, where each of q to a lies in what ``inner``
    gives, and each of what ``output`` takes in what the recurrence gives, if not just there."""

    spec: StateSpec
    inner: Linear
    output: Linear
    weights: DeltaParameters
    places: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, state: LayerMemory, batch: ForwardBatch) -> Tensor:
        """x (tokens, hidden) -> (tokens, hidden)."""
        assert isinstance(state, LayerState), "a recurrent layer has a state"
        mixed = self.inner(x)
        if self.places is None:
            return self.output(state.kernel.run(mixed, state, batch, self.weights))
        given = state.kernel.run(gather_columns(mixed, self.places[0]), state, batch, self.weights)
        return self.output(gather_columns(given, self.places[1]))


@dataclass(frozen=True)
class GatedAttention:
    """``inner``: queries, their gates, keys and values, ``heads`` of the first two, as many as are here."""

    spec: CacheSpec
    heads: int
    inner: Linear
    output: Linear
    rotary: RotaryTable
    norms: HeadNorms
    parameters: AttentionParameters
    k_scale: float = 1.0  # K and V are stored divided by these (static scales of an fp8 cache)
    v_scale: float = 1.0

    def __call__(self, x: Tensor, cache: LayerMemory, batch: ForwardBatch) -> Tensor:
        """x (tokens, hidden) -> (tokens, hidden)."""
        assert isinstance(cache, LayerCache), "attention has keys and values"
        kv_heads, kernel = self.spec.heads, cache.kernel
        rows = self.inner(x).view(-1, 2 * (self.heads + kv_heads), self.spec.k_dim)
        q, gate, k, v = rows.split((self.heads, self.heads, kv_heads, kv_heads), dim=1)
        apply_rotary(q, k, self.rotary, batch.positions, False, self.norms)
        for heads, scale in ((k, self.k_scale), (v, self.v_scale)):
            if scale != 1.0:
                affine(heads.flatten(1), divisor=scale, out=heads.flatten(1))
        kernel.write(cache, k, v, batch)
        attended = kernel.attend(q, cache, batch, self.parameters)
        if self.v_scale != 1.0:  # K's returns through the softmax scale
            affine(attended, number=self.v_scale, out=attended)
        return self.output(sigmoid_gate(attended, gate.flatten(1)))


def build(config: ModelConfig, loader: WeightLoader) -> MixerModel:
    """The model, of what ``loader`` gives."""
    assert isinstance(config, QwenNextConfig), "read by this family"
    cuts = Cuts.of(config, loader.parallel, config.kv_heads)
    if config.tiled and loader.parallel.size > 1:
        raise LowbitError(
            "E0430",
            f"--tp-size {loader.parallel.size}: in GGUF files of Qwen3.5 the value heads of a key head lie "
            "apart, and ranks cannot share them; use the model's safetensors, or one process",
        )
    delta_cuts = DeltaCuts.of(config.state, loader.parallel) if config.recurrent else None
    rotary, _ = rotary_tables(config, loader)

    def block(layer: int) -> MixerBlock:
        mixer: DeltaNet | GatedAttention
        if layer in config.recurrent:
            mixer = _delta_net(config, loader, delta_cuts, f"model.layers.{layer}.linear_attn")
        else:
            mixer = _attention(config, loader, cuts, rotary, layer)
        return MixerBlock.of(config, loader, layer, mixer)

    return MixerModel(config, loader, block, cuts)


def _delta_net(config: QwenNextConfig, loader: WeightLoader, cuts: DeltaCuts | None, name: str) -> DeltaNet:
    state, hidden = config.state, config.hidden_size
    spec = state if cuts is None else cuts.spec(state)
    each = state.heads // state.k_heads  # value heads of a key head
    values = state.heads * state.v_dim
    channels = here = heads = None
    if cuts is not None:
        channels, heads = cuts.channels(state), cuts.values
        here = cuts.values.times(state.v_dim)
    if loader.has(f"{name}.in_proj_b"):
        apart = (f"{name}.in_proj_b", f"{name}.in_proj_a")
        gates = [Part(one, (state.heads, hidden), router=True, rows=heads) for one in apart]
    else:
        both = None if heads is None else (heads, heads)
        part = Part(f"{name}.in_proj_ba", (2 * state.heads, hidden), router=True, rows=both)
        gates = [replace(part, groups=state.k_heads, group_rows=(each, each))]
    if loader.has(f"{name}.in_proj_qkv"):
        parts = [
            Part(f"{name}.in_proj_qkv", (state.channels, hidden), rows=channels),
            Part(f"{name}.in_proj_z", (values, hidden), rows=here),
        ]
    else:
        runs = (state.k_dim, state.k_dim, each * state.v_dim, each * state.v_dim)
        rows = None if channels is None or here is None else (*channels, here)
        shape = (state.channels + values, hidden)
        parts = [Part(f"{name}.in_proj_qkvz", shape, rows=rows, groups=state.k_heads, group_rows=runs)]
    inner = loader.linear(f"{name}.in_proj", [*parts, *gates])
    output = Part(f"{name}.out_proj", (hidden, values), columns=here)
    weights = _parameters(config, loader, cuts, name)
    places = _places(state, loader.device) if config.tiled else None
    return DeltaNet(spec, inner, loader.linear(output.name, [output]), weights, places)


def _tiled(state: StateSpec, width: int) -> Tensor:
    """int64: where each of the model's value heads, so wide, lies where all first ones come first."""
    each = state.heads // state.k_heads
    return torch.arange(state.heads * width).view(each, state.k_heads, width).transpose(0, 1).flatten()


def _places(state: StateSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """``DeltaNet.places`` of files whose value heads are tiled."""
    keys = 2 * state.k_heads * state.k_dim
    runs = [torch.arange(keys)]  # q and k
    for width in (state.v_dim, state.v_dim, 1, 1):  # v, z, b, a
        runs.append(_tiled(state, width) + sum(map(len, runs)))
    back = _tiled(state, state.v_dim).argsort()
    return torch.cat(runs).to(device), back.to(device)


def _parameters(
    config: QwenNextConfig, loader: WeightLoader, cuts: DeltaCuts | None, name: str
) -> DeltaParameters:
    """Of the heads and channels that are here; the tensors are small, and read whole."""
    state = config.state
    shape = (state.channels, state.taps) if config.gguf else (state.channels, 1, state.taps)
    shape = (state.channels, state.taps, 1) if config.mlx else shape
    taps = loader.vector(f"{name}.conv1d.weight", *shape).view(state.channels, state.taps)
    decay = loader.vector(f"{name}.A_log", state.heads)
    bias = loader.vector(f"{name}.dt_bias", state.heads)
    if config.tiled:
        heads, values = (_tiled(state, width).to(decay.device) for width in (1, state.v_dim))
        keys = state.channels - len(values)
        decay, bias = decay[heads], bias[heads]
        taps = torch.cat([taps[:keys], taps[keys:][values]])
    if cuts is not None:
        runs = taps.split([cut.whole for cut in cuts.channels(state)])
        here = zip(runs, cuts.channels(state), strict=True)
        taps = torch.cat([run[cut.slice] for run, cut in here])
        decay, bias = decay[cuts.values.slice], bias[cuts.values.slice]
    return DeltaParameters(
        taps.T.contiguous(),
        decay if config.gguf else -decay.exp(),
        bias,
        loader.vector(f"{name}.norm.weight", state.v_dim),
        config.norm_eps,
    )


def _attention(
    config: QwenNextConfig, loader: WeightLoader, cuts: Cuts | None, rotary: RotaryTable, layer: int
) -> GatedAttention:
    name, hidden, dim, heads = (
        f"model.layers.{layer}.self_attn",
        config.hidden_size,
        config.head_dim,
        config.heads,
    )
    bias, kv_rows = config.qkv_bias, config.kv_heads * config.head_dim
    queries = keys = None
    if cuts is not None:
        queries, keys = cuts.heads.times(dim), cuts.kv_heads.times(dim)
    q_rows = None if queries is None else (queries, queries)
    parts = [
        Part(
            f"{name}.q_proj",
            (2 * heads * dim, hidden),
            bias=bias,
            rows=q_rows,
            groups=heads,
            group_rows=(dim, dim),
        ),
        Part(f"{name}.k_proj", (kv_rows, hidden), bias=bias, rows=keys),
        Part(f"{name}.v_proj", (kv_rows, hidden), bias=bias, rows=keys),
    ]
    output = Part(f"{name}.o_proj", (hidden, heads * dim), bias=config.output_bias, columns=queries)
    norms = [loader.vector(f"{name}.{one}_norm.weight", dim) + config.norm_offset for one in "qk"]
    k_scale, v_scale = loader.kv_scales(name, layer)
    kv_dtype: KvDtype = loader.kv_dtype(name, layer)
    return GatedAttention(
        CacheSpec("paged", config.kv_heads if cuts is None else cuts.kv_heads.size, dim, dim, kv_dtype),
        heads if cuts is None else cuts.heads.size,
        loader.linear(f"{name}.qkv_proj", parts),
        loader.linear(output.name, [output]),
        rotary,
        HeadNorms(norms[0], norms[1], config.norm_eps),
        AttentionParameters(scale=dim**-0.5 * k_scale),
        k_scale,
        v_scale,
    )
