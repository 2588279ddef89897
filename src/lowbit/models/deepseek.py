"""DeepSeek's multi-head latent attention.

The cache holds for a token one latent row shared by all heads, its normalized compression (``kv_lora_rank``
values) and a rotated key (``qk_rope_head_dim``): 576 values a layer. ``kv_b_proj`` would expand the latent
to K and V of each head; instead its two halves are folded into the query and the output (absorption), so that
attention runs over the latent rows themselves:

    q_latent = q_nope W_K                      scores = [q_latent, q_rope] . [latent, k_rope]
    output   = (softmax(scores) latent) W_V^T

An fp8 cache holds the row divided by the layer's K scale, rotated key included, as vLLM's latent cache does;
the scale returns in the softmax scale and in what attention yields. V's scale has nothing to divide.

Source: DeepSeek-V2 (2024).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels.attention import AttentionParameters, CacheSpec, LayerCache
from lowbit.kernels.elementwise import RotaryTable, affine, apply_rotary, rms_norm
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.head_products import HeadMatrices
from lowbit.kernels.recurrent import LayerMemory
from lowbit.layers.cuts import Cut
from lowbit.layers.linear import Linear, Part
from lowbit.layers.weight_loader import WeightLoader
from lowbit.models.config import ModelConfig
from lowbit.models.language_model import Cuts, rotary_tables
from lowbit.models.mixer_model import MixerBlock, MixerModel

LATENT_NORM_EPS = 1e-6  # whatever rms_norm_eps is


@dataclass(frozen=True)
class DeepseekConfig(ModelConfig):
    """What latent attention and group routing add. ``q_lora_rank`` 0: queries are not compressed."""

    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    nope_dim: int = 0  # of a head's query and key without rotation
    v_dim: int = 0
    attention_bias: bool = False  # of q_a_proj, kv_a_proj_with_mqa and o_proj

    @property
    def rope_dim(self) -> int:
        """Rotated values of a head's query and of the shared key."""
        return self.rotary_dim


@dataclass(frozen=True)
class LatentAttention:
    """One attention; see the module docstring. Norms are float32."""

    config: DeepseekConfig
    spec: CacheSpec
    heads: int  # that are here
    rotary: RotaryTable
    q: Linear  # from the input, or from the compressed query
    q_a: Linear | None
    q_norm: Tensor | None  # (q_lora_rank,)
    kv_a: Linear  # (kv_lora_rank + rope, hidden)
    kv_norm: Tensor  # (kv_lora_rank,)
    k_up: HeadMatrices  # (heads, nope, kv_lora_rank)
    v_up: HeadMatrices  # (heads, kv_lora_rank, v)
    output: Linear
    parameters: AttentionParameters
    k_scale: float = 1.0  # rows are stored divided by it (fp8 caches)

    def __call__(self, x: Tensor, cache: LayerMemory, batch: ForwardBatch) -> Tensor:
        """x (tokens, hidden) -> (tokens, hidden)."""
        assert isinstance(cache, LayerCache), "these layers have latent rows"
        c = self.config
        compressed = x
        if self.q_a is not None and self.q_norm is not None:
            compressed = rms_norm(self.q_a(x), self.q_norm, LATENT_NORM_EPS)
        q = self.q(compressed).view(-1, self.heads, c.head_dim)
        row = self.kv_a(x)  # (tokens, kv_lora_rank + rope): what is cached, made in place
        latent, k_rope = row.split((c.kv_lora_rank, c.rope_dim), dim=1)
        rms_norm(latent, self.kv_norm, LATENT_NORM_EPS, out=latent)
        q_rope = affine(q.view(-1, c.head_dim)[:, c.nope_dim :])  # (tokens * heads, rope), a copy
        rotated = q_rope.view(-1, self.heads, c.rope_dim)
        apply_rotary(rotated, k_rope.unsqueeze(1), self.rotary, batch.positions, c.rotates_neighbours)
        query = q.new_empty(*q.shape[:2], row.shape[1])
        self.k_up(q[..., : c.nope_dim], out=query[..., : c.kv_lora_rank])
        affine(q_rope, out=query.view(-1, row.shape[1])[:, c.kv_lora_rank :])
        if self.k_scale != 1.0:
            affine(row, divisor=self.k_scale, out=row)  # and the latent, which is a part of it
        cache.kernel.write(cache, row.unsqueeze(1), latent.unsqueeze(1), batch)
        attended = cache.kernel.attend(query, cache, batch, self.parameters)
        if self.k_scale != 1.0:
            attended = affine(attended, number=self.k_scale, out=attended)
        values = self.v_up(attended.view(-1, self.heads, c.kv_lora_rank))
        return self.output(values.flatten(1))


def build(config: ModelConfig, loader: WeightLoader) -> MixerModel:
    """The model, of what ``loader`` gives; all ranks cache the latent."""
    assert isinstance(config, DeepseekConfig), "read by this family"
    if config.activation != "silu":
        raise LowbitError(
            "E0242", f"config.json: activation {config.activation!r} is not supported; only silu is"
        )
    cuts = Cuts.of(config, loader.parallel, config.heads)
    heads = None if cuts is None else cuts.heads
    rotary, _ = rotary_tables(config, loader)

    def block(layer: int) -> MixerBlock:
        return MixerBlock.of(config, loader, layer, _attention(config, loader, heads, rotary, layer))

    return MixerModel(config, loader, block, cuts)


def _attention(
    config: DeepseekConfig, loader: WeightLoader, heads: Cut | None, rotary: RotaryTable, layer: int
) -> LatentAttention:
    c, hidden, name = config, config.hidden_size, f"model.layers.{layer}.self_attn"

    def linear(
        leaf: str,
        out: int,
        inputs: int,
        bias: bool = False,
        rows: Cut | None = None,
        columns: Cut | None = None,
    ) -> Linear:
        part = Part(f"{name}.{leaf}", (out, inputs), bias=bias, rows=rows, columns=columns)
        return loader.linear(part.name, [part])

    def of_heads(width: int) -> Cut | None:
        return None if heads is None else heads.times(width)

    q_rows, row = c.heads * c.head_dim, c.kv_lora_rank + c.rope_dim
    q_a = q_norm = None
    if c.q_lora_rank:
        q_a = linear("q_a_proj", c.q_lora_rank, hidden, c.attention_bias)
        q_norm = loader.vector(f"{name}.q_a_layernorm.weight", c.q_lora_rank)
        q = linear("q_b_proj", q_rows, c.q_lora_rank, rows=of_heads(c.head_dim))
    else:
        q = linear("q_proj", q_rows, hidden, rows=of_heads(c.head_dim))
    k_up, v_up = _up_projections(config, loader, heads, name)
    k_scale, _ = loader.kv_scales(name, layer)
    assert c.attention_scale is not None, "read_config sets it"
    return LatentAttention(
        config,
        CacheSpec("latent", 1, row, c.kv_lora_rank, loader.kv_dtype(name, layer)),
        c.heads if heads is None else heads.size,
        rotary,
        q,
        q_a,
        q_norm,
        linear("kv_a_proj_with_mqa", row, hidden, c.attention_bias),
        loader.vector(f"{name}.kv_a_layernorm.weight", c.kv_lora_rank),
        k_up,
        v_up,
        linear("o_proj", hidden, c.heads * c.v_dim, c.attention_bias, columns=of_heads(c.v_dim)),
        AttentionParameters(scale=c.attention_scale * k_scale),
        k_scale,
    )


def _up_projections(
    config: DeepseekConfig, loader: WeightLoader, heads: Cut | None, name: str
) -> tuple[HeadMatrices, HeadMatrices]:
    """(heads, nope, rank) and (heads, rank, v), from one matrix or, in newer GGUF files, from two.

    They are read whole, and kept of the heads that are here.
    """
    c, dtype = config, loader.activation_dtype
    here = slice(None) if heads is None else heads.slice
    if loader.has(f"{name}.k_b_proj") and not loader.has(f"{name}.kv_b_proj"):
        k = loader.matrices(Part(f"{name}.k_b_proj", (c.kv_lora_rank, c.nope_dim)), c.heads)
        v = loader.matrices(Part(f"{name}.v_b_proj", (c.v_dim, c.kv_lora_rank)), c.heads)
        return HeadMatrices.pack(k.transpose(1, 2)[here], dtype), HeadMatrices.pack(
            v.transpose(1, 2)[here], dtype
        )
    rows = c.heads * (c.nope_dim + c.v_dim)
    both = loader.matrices(Part(f"{name}.kv_b_proj", (rows, c.kv_lora_rank)))
    k, v = both.view(c.heads, c.nope_dim + c.v_dim, c.kv_lora_rank).split((c.nope_dim, c.v_dim), dim=1)
    return HeadMatrices.pack(k[here], dtype), HeadMatrices.pack(v.transpose(1, 2)[here], dtype)
