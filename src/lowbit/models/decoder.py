"""The decoder: pre-norm blocks of rotary GQA attention and a gated MLP or a mixture of experts.

One class for every family of this shape (``families.py``); what differs is in ``ModelConfig``. Weights
arrive through a ``WeightLoader``, so that one ``build`` serves loading, planning, every format and kernel.
Sources: Touvron et al., 2023 (Llama), Ainslie et al., 2023 (GQA), Su et al., 2021 (RoPE).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels.activation_state import ActivationStates
from lowbit.kernels.attention import AttentionParameters, CacheSpec, LayerCache
from lowbit.kernels.elementwise import (
    RotaryTable,
    add_rms_norm,
    affine,
    apply_rotary,
    gather_rows,
    rms_norm,
    rms_norm_heads,
    softcap,
)
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.layers.experts import ExpertsSpec
from lowbit.layers.linear import Embedding, Linear, Part
from lowbit.layers.mlp import GatedMlp, MixtureOfExperts
from lowbit.layers.rotary import RopeScaling, rotary_frequencies
from lowbit.layers.routing import Route, softmax_top_k, top_k_softmax
from lowbit.layers.weight_loader import WeightLoader
from lowbit.models.config import ModelConfig, MoeConfig
from lowbit.numerics.cache_format import KvDtype

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "swiglu_clamped")


@dataclass(frozen=True)
class Block:
    """The weights of one layer. Norms are float32 (hidden,), Q/K norms (head_dim,)."""

    attention_norm: Tensor
    qkv: Linear  # (heads + 2 * kv_heads) * head_dim rows
    output: Linear
    mlp_norm: Tensor
    mlp: GatedMlp | MixtureOfExperts
    rotary: RotaryTable
    attention: AttentionParameters
    kv_dtype: KvDtype
    k_scale: float = 1.0  # K and V are stored divided by these (static scales of an fp8 cache)
    v_scale: float = 1.0
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    attention_post_norm: Tensor | None = None
    mlp_post_norm: Tensor | None = None


class Decoder:
    """A loaded decoder; see ``models.model.Model``."""

    def __init__(
        self,
        config: ModelConfig,
        loader: WeightLoader,
        embedding: Embedding,
        blocks: list[Block],
        final_norm: Tensor,
        head: Linear,
    ) -> None:
        self.config = config
        self.vocab_size = config.vocab_size
        self.context_length = config.context_length
        self.device = loader.device
        self.kernels: frozenset[str] = frozenset()
        self.quantization = ""
        self.weight_bytes = 0
        self.mapped_bytes = 0
        self.spans_tokens = False
        self.states = ActivationStates()
        self.embedding = embedding
        self.blocks = blocks
        self.final_norm = final_norm
        self.head = head

    def cache_specs(self) -> list[CacheSpec]:
        """Every layer caches all its K/V heads; some look back through a window only."""
        c = self.config
        windows = c.windows or (0,) * c.layers
        return [
            CacheSpec("paged", c.kv_heads, c.head_dim, c.head_dim, block.kv_dtype, window)
            for block, window in zip(self.blocks, windows, strict=True)
        ]

    def forward(self, batch: ForwardBatch, caches: list[LayerCache]) -> Tensor:
        """float32 (sample rows, vocabulary)."""
        config = self.config
        residual = self.embed(batch.tokens)
        hidden = rms_norm(residual, self.blocks[0].attention_norm, config.rms_norm_eps)
        for layer, cache in zip(range(len(self.blocks)), caches, strict=True):
            hidden = self.forward_block(layer, hidden, residual, cache, batch)
        logits = self.head(gather_rows(hidden, batch.sample_rows)).float()
        if config.logit_softcap:
            logits = softcap(logits, config.logit_softcap)
        self.states.update()
        return logits

    def embed(self, tokens: Tensor) -> Tensor:
        """(tokens, hidden): the residual stream before the first block."""
        residual = self.embedding(tokens)
        if self.config.embedding_scale != 1.0:
            residual = affine(residual, number=self.config.embedding_scale, out=residual)
        return residual

    def forward_block(
        self, layer: int, hidden: Tensor, residual: Tensor, cache: LayerCache, batch: ForwardBatch
    ) -> Tensor:
        """One block: ``hidden`` is ``residual`` under its attention norm.

        Adds to ``residual`` in place and gives it under the next block's norm, or the final one.
        """
        block, eps = self.blocks[layer], self.config.rms_norm_eps
        last = layer + 1 == len(self.blocks)
        next_norm = self.final_norm if last else self.blocks[layer + 1].attention_norm
        attended = block.output(self._attend(block, cache, hidden, batch))
        if block.attention_post_norm is not None:
            attended = rms_norm(attended, block.attention_post_norm, eps)
        hidden = add_rms_norm(attended, residual, block.mlp_norm, eps)
        mixed = block.mlp(hidden)
        if block.mlp_post_norm is not None:
            mixed = rms_norm(mixed, block.mlp_post_norm, eps)
        return add_rms_norm(mixed, residual, next_norm, eps)

    def _attend(self, block: Block, cache: LayerCache, hidden: Tensor, batch: ForwardBatch) -> Tensor:
        """(tokens, heads * head_dim): attention before its output projection."""
        config = self.config
        heads = block.qkv(hidden).view(-1, config.heads + 2 * config.kv_heads, config.head_dim)
        q, k, v = heads.split((config.heads, config.kv_heads, config.kv_heads), dim=1)
        if block.q_norm is not None and block.k_norm is not None:
            rms_norm_heads(q, block.q_norm, config.rms_norm_eps)
            rms_norm_heads(k, block.k_norm, config.rms_norm_eps)
        apply_rotary(q, k, block.rotary, batch.positions)
        if block.k_scale != 1.0 or block.v_scale != 1.0:
            # K's scale returns through the softmax scale of ``block.attention``.
            cache.kernel.write(cache, _divided(k, block.k_scale), _divided(v, block.v_scale), batch)
            attended = cache.kernel.attend(q, cache, batch, block.attention)
            return affine(attended, number=block.v_scale, out=attended)
        cache.kernel.write(cache, k, v, batch)
        return cache.kernel.attend(q, cache, batch, block.attention)


def _divided(heads: Tensor, scale: float) -> Tensor:
    """(tokens, heads, head_dim) over a number."""
    return affine(heads.flatten(1), divisor=scale).view(heads.shape)


def build(config: ModelConfig, loader: WeightLoader) -> Decoder:
    """Ask ``loader`` for every weight of the model, in the order of the layers."""
    if config.activation not in ACTIVATIONS:
        raise LowbitError(
            "E0242",
            f"config.json: activation {config.activation!r} is not supported; "
            f"supported: {', '.join(ACTIVATIONS)}",
        )
    embedding = loader.embedding(Part("model.embed_tokens", (config.vocab_size, config.hidden_size)))
    tables = _rotary_tables(config, loader)
    blocks = [
        _block(config, loader, n, tables[bool(config.windows and config.windows[n])])
        for n in range(config.layers)
    ]
    final_norm = _norm(config, loader, "model.norm.weight")
    if config.tied_head:
        head = embedding.as_head()
    else:
        head = loader.linear("lm_head", [Part("lm_head", (config.vocab_size, config.hidden_size))])
    return Decoder(config, loader, embedding, blocks, final_norm, head)


def _rotary_tables(config: ModelConfig, loader: WeightLoader) -> tuple[RotaryTable, RotaryTable]:
    """The tables of layers without and with a window."""
    divisors = None
    if config.rope_scaling.kind == "table":
        divisors = loader.vector(config.rope_scaling.tensor, config.rotary_dim // 2)
    frequencies, magnitude = rotary_frequencies(
        config.rotary_dim, config.rope_theta, config.rope_scaling, divisors
    )
    table = RotaryTable.build(frequencies, config.context_length, magnitude, loader.device)
    if config.local_rope_theta is None:
        return table, table
    local, _ = rotary_frequencies(config.rotary_dim, config.local_rope_theta, RopeScaling())
    return table, RotaryTable.build(local, config.context_length, 1.0, loader.device)


def _norm(config: ModelConfig, loader: WeightLoader, name: str, size: int = 0) -> Tensor:
    return loader.vector(name, size or config.hidden_size) + config.norm_offset


def attention_norm_name(layer: int) -> str:
    """The tensor that scales what a layer's Q, K and V projections see."""
    return f"model.layers.{layer}.input_layernorm.weight"


def mlp_norm_name(config: ModelConfig, layer: int) -> str:
    """The tensor that scales what a layer's MLP, router and experts see."""
    name = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
    return f"model.layers.{layer}.{name}.weight"


def _block(config: ModelConfig, loader: WeightLoader, layer: int, rotary: RotaryTable) -> Block:
    hidden, prefix = config.hidden_size, f"model.layers.{layer}"
    attention = f"{prefix}.self_attn"
    q_rows = config.heads * config.head_dim

    def head_norm(name: str) -> Tensor | None:
        return (
            _norm(config, loader, f"{attention}.{name}.weight", config.head_dim) if config.qk_norm else None
        )

    def post_norm(name: str) -> Tensor | None:
        return _norm(config, loader, f"{prefix}.{name}.weight") if config.post_norms else None

    k_scale, v_scale = loader.kv_scales(attention, layer)
    return Block(
        attention_norm=_norm(config, loader, attention_norm_name(layer)),
        qkv=loader.linear(f"{attention}.qkv_proj", _qkv_parts(config, attention)),
        output=loader.linear(
            f"{attention}.o_proj",
            [Part(f"{attention}.o_proj", (hidden, q_rows), bias=config.output_bias)],
        ),
        mlp_norm=_norm(config, loader, mlp_norm_name(config, layer)),
        mlp=_mlp(config, loader, layer),
        rotary=rotary,
        attention=AttentionParameters(
            scale=(config.attention_scale or config.head_dim**-0.5) * k_scale,
            softcap=config.attention_softcap,
            sinks=loader.vector(f"{attention}.sinks", config.heads) if config.sinks else None,
        ),
        kv_dtype=loader.kv_dtype(attention, layer),
        k_scale=k_scale,
        v_scale=v_scale,
        q_norm=head_norm("q_norm"),
        k_norm=head_norm("k_norm"),
        attention_post_norm=post_norm("post_attention_layernorm"),
        mlp_post_norm=post_norm("post_feedforward_layernorm"),
    )


def _mlp(config: ModelConfig, loader: WeightLoader, layer: int) -> GatedMlp | MixtureOfExperts:
    moe, mlp = config.moe, f"model.layers.{layer}.mlp"
    if moe is not None and layer in moe.layers:
        router = Part(
            f"{mlp}.{moe.router}", (moe.experts, config.hidden_size), bias=moe.router_bias, router=True
        )
        spec = ExpertsSpec(
            moe.experts,
            config.hidden_size,
            moe.intermediate_size,
            bias=moe.expert_bias,
            interleaved=moe.interleaved,
            transposed=moe.transposed,
        )
        return MixtureOfExperts(
            loader.linear(router.name, [router]),
            _route(moe),
            loader.experts(f"{mlp}.experts", spec),
            config.activation,
        )
    hidden, inner = config.hidden_size, config.intermediate_size
    return GatedMlp(
        loader.linear(f"{mlp}.gate_up_proj", _gate_up_parts(config, mlp)),
        loader.linear(f"{mlp}.down_proj", [Part(f"{mlp}.down_proj", (hidden, inner), bias=config.mlp_bias)]),
        config.activation,
    )


def _route(moe: MoeConfig) -> Route:
    if moe.routing == "top_k_softmax":
        return top_k_softmax(moe.per_token)
    return softmax_top_k(moe.per_token, moe.renormalize)


def _qkv_parts(config: ModelConfig, attention: str) -> list[Part]:
    q_rows, kv_rows = config.heads * config.head_dim, config.kv_heads * config.head_dim
    hidden, bias = config.hidden_size, config.qkv_bias
    return [
        Part(f"{attention}.q_proj", (q_rows, hidden), rotary_heads=config.heads, bias=bias),
        Part(f"{attention}.k_proj", (kv_rows, hidden), rotary_heads=config.kv_heads, bias=bias),
        Part(f"{attention}.v_proj", (kv_rows, hidden), bias=bias),
    ]


def _gate_up_parts(config: ModelConfig, mlp: str) -> list[Part]:
    inner, hidden = config.intermediate_size, config.hidden_size
    return [
        Part(f"{mlp}.gate_proj", (inner, hidden), bias=config.mlp_bias),
        Part(f"{mlp}.up_proj", (inner, hidden), bias=config.mlp_bias),
    ]
