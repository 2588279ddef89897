"""Qwen3-Next: blocks whose first half is a gated delta network or attention with an output gate.

Gated DeltaNet (Yang et al., 2024) keeps a state of fixed size for each sequence in place of keys and values;
what it computes between its projections is defined in ``kernels.recurrent``. The output of attention is
multiplied by the sigmoid of a gate, which the query projection makes beside the queries, head by head.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels.attention import AttentionParameters, CacheSpec, LayerCache
from lowbit.kernels.elementwise import HeadNorms, RotaryTable, affine, apply_rotary
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.recurrent import DeltaParameters, LayerMemory, LayerState, StateSpec
from lowbit.kernels.recurrent_cpu import sigmoid_gate
from lowbit.layers.linear import Linear, Part
from lowbit.layers.weight_loader import WeightLoader
from lowbit.models.config import ModelConfig
from lowbit.models.language_model import rotary_tables
from lowbit.models.mixer_model import MixerBlock, MixerModel
from lowbit.numerics.cache_format import KvDtype


@dataclass(frozen=True)
class QwenNextConfig(ModelConfig):
    """``recurrent``: the layers that are gated delta networks, with states of ``state``. ``gguf``: whether
    vectors lie as in GGUF files."""

    recurrent: frozenset[int] = frozenset()
    state: StateSpec = field(default_factory=lambda: StateSpec(1, 1, 1, 1, 1))
    gguf: bool = False


@dataclass(frozen=True)
class DeltaNet:
    """``inner``: q, k, v, z, b and a in one (``recurrent.StateSpec.width`` rows), q, k, v, z of all heads in
    turn."""

    spec: StateSpec
    inner: Linear
    output: Linear
    weights: DeltaParameters

    def __call__(self, x: Tensor, state: LayerMemory, batch: ForwardBatch) -> Tensor:
        """x (tokens, hidden) -> (tokens, hidden)."""
        assert isinstance(state, LayerState), "a recurrent layer has a state"
        return self.output(state.kernel.run(self.inner(x), state, batch, self.weights))


@dataclass(frozen=True)
class GatedAttention:
    """``inner``: queries, their gates, keys and values, ``heads`` heads of the first two."""

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
    if loader.parallel.size > 1:
        raise LowbitError(
            "E0432",
            f"--tp-size {loader.parallel.size}: {config.architecture} has recurrent layers, whose states and "
            "fused projections ranks do not share; use --tp-size 1",
        )
    rotary, _ = rotary_tables(config, loader)

    def block(layer: int) -> MixerBlock:
        mixer: DeltaNet | GatedAttention
        if layer in config.recurrent:
            mixer = _delta_net(config, loader, f"model.layers.{layer}.linear_attn")
        else:
            mixer = _attention(config, loader, rotary, layer)
        return MixerBlock.of(config, loader, layer, mixer)

    return MixerModel(config, loader, block)


def _delta_net(config: QwenNextConfig, loader: WeightLoader, name: str) -> DeltaNet:
    spec, hidden = config.state, config.hidden_size
    each = spec.heads // spec.k_heads  # value heads of a key head
    values = spec.heads * spec.v_dim
    gates = Part(
        f"{name}.in_proj_ba",
        (2 * spec.heads, hidden),
        router=True,
        groups=spec.k_heads,
        group_rows=(each, each),
    )
    if loader.has(f"{name}.in_proj_qkv"):
        parts = [
            Part(f"{name}.in_proj_qkv", (spec.channels, hidden)),
            Part(f"{name}.in_proj_z", (values, hidden)),
        ]
    else:
        runs = (spec.k_dim, spec.k_dim, each * spec.v_dim, each * spec.v_dim)
        rows = (spec.channels + values, hidden)
        parts = [Part(f"{name}.in_proj_qkvz", rows, groups=spec.k_heads, group_rows=runs)]
    inner = loader.linear(f"{name}.in_proj", [*parts, gates])
    shape = (spec.channels, spec.taps) if config.gguf else (spec.channels, 1, spec.taps)
    taps = loader.vector(f"{name}.conv1d.weight", *shape).view(spec.channels, spec.taps)
    decay = loader.vector(f"{name}.A_log", spec.heads)
    weights = DeltaParameters(
        taps.T.contiguous(),
        decay if config.gguf else -decay.exp(),
        loader.vector(f"{name}.dt_bias", spec.heads),
        loader.vector(f"{name}.norm.weight", spec.v_dim),
        config.norm_eps,
    )
    output = Part(f"{name}.out_proj", (hidden, values))
    return DeltaNet(spec, inner, loader.linear(output.name, [output]), weights)


def _attention(
    config: QwenNextConfig, loader: WeightLoader, rotary: RotaryTable, layer: int
) -> GatedAttention:
    name, hidden, dim, heads = (
        f"model.layers.{layer}.self_attn",
        config.hidden_size,
        config.head_dim,
        config.heads,
    )
    bias, kv_rows = config.qkv_bias, config.kv_heads * config.head_dim
    parts = [
        Part(f"{name}.q_proj", (2 * heads * dim, hidden), bias=bias, groups=heads, group_rows=(dim, dim)),
        Part(f"{name}.k_proj", (kv_rows, hidden), bias=bias),
        Part(f"{name}.v_proj", (kv_rows, hidden), bias=bias),
    ]
    output = Part(f"{name}.o_proj", (hidden, heads * dim), bias=config.output_bias)
    norms = [loader.vector(f"{name}.{one}_norm.weight", dim) + config.norm_offset for one in "qk"]
    k_scale, v_scale = loader.kv_scales(name, layer)
    kv_dtype: KvDtype = loader.kv_dtype(name, layer)
    return GatedAttention(
        CacheSpec("paged", config.kv_heads, dim, dim, kv_dtype),
        heads,
        loader.linear(f"{name}.qkv_proj", parts),
        loader.linear(output.name, [output]),
        rotary,
        HeadNorms(norms[0], norms[1], config.norm_eps),
        AttentionParameters(scale=dim**-0.5 * k_scale),
        k_scale,
        v_scale,
    )
