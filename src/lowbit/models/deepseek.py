"""DeepSeek V2, V3 and R1: multi-head latent attention, and experts chosen by groups.

The cache holds for a token one latent row shared by all heads, its normalized compression (``kv_lora_rank``
values) and a rotated key (``qk_rope_head_dim``): 576 values a layer. ``kv_b_proj`` would expand the latent
to K and V of each head; instead its two halves are folded into the query and the output (absorption), so that
attention runs over the latent rows themselves:

    q_latent = q_nope W_K                      scores = [q_latent, q_rope] . [latent, k_rope]
    output   = (softmax(scores) latent) W_V^T

An fp8 cache holds the row divided by the layer's K scale, rotated key included, as vLLM's latent cache does;
the scale returns in the softmax scale and in what attention yields. V's scale has nothing to divide.

Sources: DeepSeek-V2 (2024), DeepSeek-V3 (2024), YaRN (Peng et al., 2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from torch import Tensor

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError, printable
from lowbit.kernels.activation_state import ActivationStates
from lowbit.kernels.attention import AttentionParameters, CacheSpec, LayerCache
from lowbit.kernels.elementwise import (
    RotaryTable,
    add_rms_norm,
    affine,
    apply_rotary,
    gather_rows,
    rms_norm,
)
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.head_products import HeadMatrices
from lowbit.kernels.recurrent import LayerMemory
from lowbit.layers.cuts import Cut, cut_heads
from lowbit.layers.linear import Embedding, Linear, Part
from lowbit.layers.mlp import GatedMlp, MixtureOfExperts, PlainMlp
from lowbit.layers.rotary import rotary_frequencies
from lowbit.layers.weight_loader import WeightLoader
from lowbit.models.config import (
    ConfigKeys,
    ModelConfig,
    MoeConfig,
    base_config,
    gguf_keys,
    json_keys,
    rope_keys,
)
from lowbit.models.decoder import vocabulary_cut
from lowbit.models.feed_forward import feed_forward
from lowbit.models.gguf_names import GGUF_NAMES
from lowbit.models.registry import Family
from lowbit.numerics.cache_format import KvDtype

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


def read_config(header: CheckpointHeader) -> DeepseekConfig:
    """From config.json or GGUF metadata."""
    base = base_config(header)
    if header.container == "gguf":
        return _from_gguf(base, gguf_keys(header), header)
    return _from_json(base, json_keys(header))


def _with(base: ModelConfig, **more: object) -> DeepseekConfig:
    known = {field.name: getattr(base, field.name) for field in fields(ModelConfig)}
    return DeepseekConfig(**{**known, **more})


def _from_json(base: ModelConfig, keys: ConfigKeys) -> DeepseekConfig:
    nope, rope = keys.size("qk_nope_head_dim"), keys.size("qk_rope_head_dim")
    scoring = keys.text(
        "scoring_func", "sigmoid" if base.architecture.startswith("DeepseekV3") else "softmax"
    )
    method = keys.text("topk_method", "noaux_tc" if scoring == "sigmoid" else "greedy")
    if (scoring, method) not in (
        ("sigmoid", "noaux_tc"),
        ("softmax", "greedy"),
        ("softmax", "group_limited_greedy"),
    ):
        raise LowbitError(
            "E0242",
            f"{keys.place}: routing by {printable(scoring)} and {printable(method)} is not supported; "
            "supported: sigmoid with noaux_tc, softmax with greedy or group_limited_greedy",
        )
    groups = keys.size("n_group", 1) if method != "greedy" else 1
    inner, dense = keys.size("moe_intermediate_size"), keys.count("first_k_dense_replace")
    step = keys.size("moe_layer_freq", 1)
    rope_section = rope_keys(keys)
    return _with(
        base,
        head_dim=nope + rope,
        rotary_dim=rope,
        kv_heads=1,
        attention_scale=_softmax_scale(
            nope + rope, rope_section.number("factor", 1.0), rope_section.number("mscale_all_dim", 0.0)
        ),
        mlp_bias=keys.flag("mlp_bias", False),
        attention_bias=keys.flag("attention_bias", False),
        rotates_neighbours=keys.flag("rope_interleave", True),
        q_lora_rank=keys.size("q_lora_rank") if keys.has("q_lora_rank") else 0,
        kv_lora_rank=keys.size("kv_lora_rank"),
        nope_dim=nope,
        v_dim=keys.size("v_head_dim"),
        moe=MoeConfig(
            keys.size("n_routed_experts"),
            keys.size("num_experts_per_tok"),
            inner,
            frozenset(n for n in range(base.layers) if n >= dense and n % step == 0),
            routing=_routing(scoring == "sigmoid", groups),
            # transformers' V2 never renormalizes; V3 does where the config says so.
            renormalize=scoring == "sigmoid" and keys.flag("norm_topk_prob", True),
            groups=groups,
            kept_groups=keys.size("topk_group", 1) if method != "greedy" else 1,
            scale=keys.number("routed_scaling_factor"),
            shared_size=keys.count("n_shared_experts") * inner,
        ),
    )


def _from_gguf(base: ModelConfig, keys: ConfigKeys, header: CheckpointHeader) -> DeepseekConfig:
    # Files from before the absorbed form give the heads' own sizes under the plain names.
    head = keys.size("attention.key_length_mla", base.head_dim)
    v_dim = keys.size("attention.value_length_mla", keys.size("attention.value_length", head))
    rope = keys.size("rope.dimension_count")
    if rope >= head:
        raise LowbitError("E0216", f"{keys.place}: heads of {head} with {rope} rotated dimensions")
    # ggml keeps 0.1 * mscale_all_dim; cosines and sines then need no factor of their own.
    mscale = keys.number("rope.scaling.yarn_log_multiplier", 0.0) / 0.1
    scaling = base.rope_scaling
    if scaling.kind == "yarn" and mscale:
        scaling = replace(scaling, mscale=mscale, mscale_all_dim=mscale)
    sigmoid, groups = keys.size("expert_gating_func", 1) == 2, keys.size("expert_group_count", 1)
    inner = keys.size("expert_feed_forward_length")
    return _with(
        base,
        head_dim=head,
        rotary_dim=rope,
        kv_heads=1,
        rope_scaling=scaling,
        rotates_neighbours=True,
        attention_scale=_softmax_scale(head, scaling.factor, mscale),
        q_lora_rank=keys.size("attention.q_lora_rank") if keys.has("attention.q_lora_rank") else 0,
        kv_lora_rank=keys.size("attention.kv_lora_rank"),
        nope_dim=head - rope,
        v_dim=v_dim,
        moe=MoeConfig(
            keys.size("expert_count"),
            keys.size("expert_used_count"),
            inner,
            frozenset(range(keys.count("leading_dense_block_count"), base.layers)),
            routing=_routing(sigmoid, groups),
            renormalize=keys.flag("expert_weights_norm", False),
            groups=groups,
            kept_groups=keys.size("expert_group_used_count", 1),
            scale=keys.number("expert_weights_scale", 1.0),
            shared_size=keys.count("expert_shared_count") * inner,
        ),
    )


def _routing(sigmoid: bool, groups: int) -> str:
    if sigmoid:
        return "group_sigmoid"
    return "group_softmax" if groups > 1 else "softmax_top_k"


def _softmax_scale(head_dim: int, factor: float, mscale_all_dim: float) -> float:
    """1 / sqrt(head_dim), with YaRN's temperature on both query and key."""
    mscale = 0.1 * mscale_all_dim * math.log(factor) + 1.0 if mscale_all_dim and factor > 1 else 1.0
    return head_dim**-0.5 * mscale * mscale


@dataclass(frozen=True)
class LatentAttention:
    """The weights of one attention; see the module docstring. Norms are float32."""

    q: Linear  # from the input, or from the compressed query
    q_a: Linear | None
    q_norm: Tensor | None  # (q_lora_rank,)
    kv_a: Linear  # (kv_lora_rank + rope, hidden)
    kv_norm: Tensor  # (kv_lora_rank,)
    k_up: HeadMatrices  # (heads, nope, kv_lora_rank)
    v_up: HeadMatrices  # (heads, kv_lora_rank, v)
    output: Linear
    parameters: AttentionParameters
    kv_dtype: KvDtype
    k_scale: float = 1.0  # rows are stored divided by it (fp8 caches)


@dataclass(frozen=True)
class Block:
    """The weights of one layer."""

    attention_norm: Tensor
    attention: LatentAttention
    mlp_norm: Tensor
    mlp: GatedMlp | PlainMlp | MixtureOfExperts


class Deepseek:
    """A loaded model; see ``models.model.Model``."""

    def __init__(
        self,
        config: DeepseekConfig,
        loader: WeightLoader,
        embedding: Embedding,
        blocks: list[Block],
        rotary: RotaryTable,
        final_norm: Tensor,
        head: Linear,
        heads: Cut | None = None,
        vocabulary: Cut | None = None,
    ) -> None:
        """``heads``, ``vocabulary``: what is here of a model that several ranks share; they all cache the
        latent."""
        self.config = config
        self.vocab_size = config.vocab_size
        self.context_length = config.context_length
        self.device = loader.device
        self.activation_dtype = loader.activation_dtype
        self.kernels: frozenset[str] = frozenset()
        self.quantization = ""
        self.weight_bytes = 0
        self.mapped_bytes = 0
        self.spans_tokens = False
        self.states = ActivationStates()
        self.embedding = embedding
        self.blocks = blocks
        self.rotary = rotary
        self.final_norm = final_norm
        self.head = head
        self.parallel = loader.parallel
        self.vocabulary = vocabulary
        self.heads = config.heads if heads is None else heads.size

    def cache_specs(self) -> list[CacheSpec]:
        """One latent row a token and layer."""
        c = self.config
        row = c.kv_lora_rank + c.rope_dim
        return [
            CacheSpec("latent", 1, row, c.kv_lora_rank, block.attention.kv_dtype) for block in self.blocks
        ]

    def forward(self, batch: ForwardBatch, caches: Sequence[LayerMemory]) -> Tensor:
        """float32 (sample rows, vocabulary)."""
        eps, dtype = self.config.norm_eps, self.activation_dtype
        residual = self.embedding(batch.tokens)  # float32 (tokens, hidden)
        hidden = rms_norm(residual, self.blocks[0].attention_norm, eps, dtype=dtype)
        following = [block.attention_norm for block in self.blocks[1:]] + [self.final_norm]
        for block, cache, next_norm in zip(self.blocks, caches, following, strict=True):
            assert isinstance(cache, LayerCache), "these layers have latent rows"
            attended = self._attend(block.attention, cache, hidden, batch)
            hidden = add_rms_norm(attended, residual, block.mlp_norm, eps, dtype)
            hidden = add_rms_norm(block.mlp(hidden), residual, next_norm, eps, dtype)
        logits = self.head.in_float32(gather_rows(hidden, batch.sample_rows))
        if self.vocabulary is not None:
            logits = self.parallel.columns(logits, self.vocabulary.widths)
        self.states.update()
        return logits

    def _attend(
        self, weights: LatentAttention, cache: LayerCache, hidden: Tensor, batch: ForwardBatch
    ) -> Tensor:
        """(tokens, hidden): attention with its output projection."""
        c = self.config
        compressed = hidden
        if weights.q_a is not None and weights.q_norm is not None:
            compressed = rms_norm(weights.q_a(hidden), weights.q_norm, LATENT_NORM_EPS)
        q = weights.q(compressed).view(-1, self.heads, c.head_dim)
        row = weights.kv_a(hidden)  # (tokens, kv_lora_rank + rope): what is cached, made in place
        latent, k_rope = row.split((c.kv_lora_rank, c.rope_dim), dim=1)
        rms_norm(latent, weights.kv_norm, LATENT_NORM_EPS, out=latent)
        q_rope = affine(q.view(-1, c.head_dim)[:, c.nope_dim :])  # (tokens * heads, rope), a copy
        rotated = q_rope.view(-1, self.heads, c.rope_dim)
        apply_rotary(rotated, k_rope.unsqueeze(1), self.rotary, batch.positions, c.rotates_neighbours)
        query = q.new_empty(*q.shape[:2], row.shape[1])
        weights.k_up(q[..., : c.nope_dim], out=query[..., : c.kv_lora_rank])
        affine(q_rope, out=query.view(-1, row.shape[1])[:, c.kv_lora_rank :])
        if weights.k_scale != 1.0:
            affine(row, divisor=weights.k_scale, out=row)  # and the latent, which is a part of it
        cache.kernel.write(cache, row.unsqueeze(1), latent.unsqueeze(1), batch)
        attended = cache.kernel.attend(query, cache, batch, weights.parameters)
        if weights.k_scale != 1.0:
            attended = affine(attended, number=weights.k_scale, out=attended)
        values = weights.v_up(attended.view(-1, self.heads, c.kv_lora_rank))
        return weights.output(values.flatten(1))


def build(config: ModelConfig, loader: WeightLoader) -> Deepseek:
    """Ask ``loader`` for every weight of the model, in the order of the layers."""
    assert isinstance(config, DeepseekConfig), "read by this module"
    if config.activation != "silu":
        raise LowbitError(
            "E0242", f"config.json: activation {config.activation!r} is not supported; only silu is"
        )
    hidden = config.hidden_size
    parallel, matrix = loader.parallel, (config.vocab_size, hidden)
    shared = cut_heads(parallel, config.heads, config.heads)
    heads = None if shared is None else shared[0]
    vocabulary = None if shared is None else vocabulary_cut(config, parallel)
    embedding = loader.embedding(Part("model.embed_tokens", matrix, rows=vocabulary))
    frequencies, magnitude = rotary_frequencies(config.rope_dim, config.rope_theta, config.rope_scaling)
    rotary = RotaryTable.build(frequencies, config.context_length, magnitude, loader.device)
    blocks = [_block(config, loader, heads, n) for n in range(config.layers)]
    final_norm = loader.vector("model.norm.weight", hidden)
    if config.tied_head:
        head = embedding.as_head()
    else:
        head = loader.linear("lm_head", [Part("lm_head", matrix, rows=vocabulary)])
    return Deepseek(config, loader, embedding, blocks, rotary, final_norm, head, heads, vocabulary)


def _block(config: DeepseekConfig, loader: WeightLoader, heads: Cut | None, layer: int) -> Block:
    prefix = f"model.layers.{layer}"
    return Block(
        loader.vector(f"{prefix}.input_layernorm.weight", config.hidden_size),
        _attention(config, loader, heads, layer),
        loader.vector(f"{prefix}.post_attention_layernorm.weight", config.hidden_size),
        feed_forward(config, loader, layer),
    )


def _attention(
    config: DeepseekConfig, loader: WeightLoader, heads: Cut | None, layer: int
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
        q,
        q_a,
        q_norm,
        linear("kv_a_proj_with_mqa", row, hidden, c.attention_bias),
        loader.vector(f"{name}.kv_a_layernorm.weight", c.kv_lora_rank),
        k_up,
        v_up,
        linear("o_proj", hidden, c.heads * c.v_dim, c.attention_bias, columns=of_heads(c.v_dim)),
        AttentionParameters(scale=c.attention_scale * k_scale),
        loader.kv_dtype(name, layer),
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


UNUSED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)  # a buffer old exports kept
FAMILY = Family("deepseek", read_config, build, GGUF_NAMES, False, UNUSED, prediction_layers=True)
