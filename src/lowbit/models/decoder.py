"""The decoder: blocks of rotary GQA attention and a gated MLP or a mixture of experts.

One class for every family of this shape (``families``); what differs is in ``ModelConfig``: norms before or
after the halves of a block or both, halves one after another or side by side, and constants. Weights
arrive through a ``WeightLoader``, so that one ``build`` serves loading, planning, every format and kernel.
Sources: Touvron et al., 2023 (Llama), Ainslie et al., 2023 (GQA), Su et al., 2021 (RoPE).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kernels.attention import AttentionParameters, CacheSpec, LayerCache
from lowbit.kernels.elementwise import HeadNorms, RotaryTable, add, affine, apply_rotary
from lowbit.kernels.forward_batch import ForwardBatch
from lowbit.kernels.recurrent import LayerMemory
from lowbit.kernels.rotation import Rotator
from lowbit.layers.cuts import Cut
from lowbit.layers.linear import Linear, Part
from lowbit.layers.norm import Norm, head_norms
from lowbit.layers.weight_loader import WeightLoader
from lowbit.models.config import ModelConfig
from lowbit.models.feed_forward import FeedForward, feed_forward, norm_of_inner
from lowbit.models.language_model import Cuts, LanguageModel, norm_of, rotary_tables
from lowbit.numerics.cache_format import KvDtype

ACTIVATIONS = (
    *("silu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "relu2", "swiglu_clamped"),
)


@dataclass(frozen=True)
class Block:
    """The weights of one layer; a norm is None where the family has none there."""

    attention_norm: Norm | None
    qkv: Linear  # (heads + 2 * kv_heads) * head_dim rows, of the heads that are here
    output: Linear
    mlp_norm: Norm | None
    mlp: FeedForward
    rotary: RotaryTable | None
    attention: AttentionParameters
    kv_dtype: KvDtype
    k_scale: float = 1.0  # K and V are stored divided by these (static scales of an fp8 cache)
    v_scale: float = 1.0
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    head_norms: HeadNorms | None = None  # both, where they go with the rotation
    attention_post_norm: Norm | None = None
    mlp_post_norm: Norm | None = None
    output_norm: Norm | None = None  # of what goes into the output projection
    q_rotator: Rotator | None = None  # of each head, after its rotary embedding
    k_rotator: Rotator | None = None


class Decoder(LanguageModel[Block]):
    """A loaded decoder; see ``models.model.Model``."""

    def __init__(self, config: ModelConfig, loader: WeightLoader) -> None:
        if config.activation not in ACTIVATIONS:
            raise LowbitError(
                "E0242",
                f"config.json: activation {config.activation!r} is not supported; "
                f"supported: {', '.join(ACTIVATIONS)}",
            )
        cuts = Cuts.of(config, loader.parallel, config.kv_heads)
        tables = rotary_tables(config, loader)

        def block(layer: int) -> Block:
            rotates = layer not in config.unrotated
            return _block(
                config, loader, cuts, layer, tables[_has_window(config, layer)] if rotates else None
            )

        super().__init__(config, loader, block, cuts)

    def cache_specs(self) -> list[CacheSpec]:
        """Every layer caches all its K/V heads that are here; some look back through a window only."""
        c = self.config
        windows = c.windows or (0,) * c.layers
        return [
            CacheSpec("paged", self.kv_heads, c.head_dim, c.head_dim, block.kv_dtype, window, c.sinks)
            for block, window in zip(self.blocks, windows, strict=True)
        ]

    def enter(self, layer: int, residual: Tensor) -> Tensor:
        """What a block's projections see of the residual stream."""
        norm = self.blocks[layer].attention_norm
        return residual.to(self.activation_dtype) if norm is None else norm(residual)

    def forward_block(
        self, layer: int, hidden: Tensor, residual: Tensor, cache: LayerMemory, batch: ForwardBatch
    ) -> Tensor:
        """See ``LanguageModel``: ``hidden`` is ``residual`` under the attention norm."""
        block = self.blocks[layer]
        last = layer + 1 == len(self.blocks)
        next_norm = self.final_norm if last else self.blocks[layer + 1].attention_norm
        if self.config.parallel:
            between = hidden if block.mlp_norm is None else block.mlp_norm(residual)
            mixed = block.mlp(between)
            add(block.output(self._attend(block, cache, hidden, batch)), residual)
        else:
            attended = block.output(self._attend(block, cache, hidden, batch))
            if block.attention_post_norm is not None:
                attended = block.attention_post_norm(attended)
            mixed = block.mlp(self._add_and_norm(attended, residual, block.mlp_norm))
            if block.mlp_post_norm is not None:
                mixed = block.mlp_post_norm(mixed)
        return self._add_and_norm(mixed, residual, next_norm)

    def _add_and_norm(self, x: Tensor, residual: Tensor, norm: Norm | None) -> Tensor:
        """``residual += x`` in place; what the next half sees of it."""
        if norm is None:
            return add(x, residual).to(self.activation_dtype)
        return norm.of_sum(x, residual)

    def _attend(self, block: Block, cache: LayerMemory, hidden: Tensor, batch: ForwardBatch) -> Tensor:
        """(tokens, heads * head_dim): attention before its output projection, of the heads that are here."""
        assert isinstance(cache, LayerCache), "these layers have keys and values"
        config = self.config
        heads = block.qkv(hidden).view(-1, self.heads + 2 * self.kv_heads, config.head_dim)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if not config.norms_rotated:
            _norm_heads(block, q, k)
        if block.rotary is not None:
            turns_neighbours = config.rotates_neighbours
            apply_rotary(q, k, block.rotary, batch.positions, turns_neighbours, block.head_norms)
        if config.norms_rotated:
            _norm_heads(block, q, k)
        if block.q_rotator is not None:
            block.q_rotator.in_place(q)
        if block.k_rotator is not None:
            block.k_rotator.in_place(k)
        if block.k_scale != 1.0 or block.v_scale != 1.0:
            # K's scale returns through the softmax scale of ``block.attention``.
            cache.kernel.write(cache, _divided(k, block.k_scale), _divided(v, block.v_scale), batch)
            attended = cache.kernel.attend(q, cache, batch, block.attention)
            attended = affine(attended, number=block.v_scale, out=attended)
        else:
            cache.kernel.write(cache, k, v, batch)
            attended = cache.kernel.attend(q, cache, batch, block.attention)
        return attended if block.output_norm is None else block.output_norm(attended, out=attended)


def _norm_heads(block: Block, q: Tensor, k: Tensor) -> None:
    """Heads (tokens, heads, head_dim) in place, where their norms do not go with the rotation."""
    if block.q_norm is not None and block.k_norm is not None:
        block.q_norm.of_heads(q)
        block.k_norm.of_heads(k)


def _divided(heads: Tensor, scale: float) -> Tensor:
    """(tokens, heads, head_dim) over a number."""
    return affine(heads.flatten(1), divisor=scale).view(heads.shape)


def build(config: ModelConfig, loader: WeightLoader) -> Decoder:
    """The model, of what ``loader`` gives."""
    return Decoder(config, loader)


def _has_window(config: ModelConfig, layer: int) -> bool:
    return bool(config.windows and config.windows[layer])


def _head_norm(
    config: ModelConfig, loader: WeightLoader, name: str, heads: int, cut: Cut | None
) -> Norm | None:
    """The norm of Q or of K, which has so many heads, those of ``cut`` here."""
    size = config.head_dim
    match config.qk_norm:
        case "":
            return None
        case "layer":
            weights = _weights_of_heads(loader, name, heads, size)
            weights = weights if cut is None else weights[cut.times(size).slice]
            return Norm(weights, config.norm_eps, centred=True)
        case "projection":
            weight = loader.vector(f"{name}.weight", size * heads) + config.norm_offset
            return norm_of_inner(loader, weight, config.norm_eps, None if cut is None else cut.times(size))
    return Norm(loader.vector(f"{name}.weight", size) + config.norm_offset, config.norm_eps)


def _weights_of_heads(loader: WeightLoader, name: str, heads: int, size: int) -> Tensor:
    """(heads * size,), from one matrix or, in StableLM's checkpoints, from a vector a head."""
    if loader.has(f"{name}.norms.0"):
        return torch.cat([loader.vector(f"{name}.norms.{n}.weight", size) for n in range(heads)])
    return loader.vector(f"{name}.weight", heads, size).flatten()


def attention_norm_name(config: ModelConfig, layer: int) -> str:
    """The tensor that scales what a layer's Q, K and V projections see; "" where none does."""
    name = config.norm_names.attention
    return name and f"model.layers.{layer}.{name}.weight"


def mlp_norm_name(config: ModelConfig, layer: int) -> str:
    """The tensor that scales what a layer's MLP, router and experts see; "" where none of their own does."""
    name = config.norm_names.mlp
    return name and f"model.layers.{layer}.{name}.weight"


def output_norm_name(layer: int) -> str:
    """The tensor that scales what the output projection sees, where there is one."""
    return f"model.layers.{layer}.self_attn.attn_sub_norm.weight"


def _block(
    config: ModelConfig, loader: WeightLoader, cuts: Cuts | None, layer: int, rotary: RotaryTable | None
) -> Block:
    hidden, prefix = config.hidden_size, f"model.layers.{layer}"
    attention = f"{prefix}.self_attn"
    q_rows = config.heads * config.head_dim
    heads, kv_heads = (None, None) if cuts is None else (cuts.heads, cuts.kv_heads)
    inner = None if heads is None else heads.times(config.head_dim)

    def norm(name: str, dtype: torch.dtype | None = None) -> Norm | None:
        return norm_of(config, loader, f"{prefix}.{name}", dtype) if name else None

    output_norm = None
    if config.sub_norms:
        weight = loader.vector(output_norm_name(layer), q_rows)
        output_norm = norm_of_inner(loader, weight, config.norm_eps, inner)
    sinks = loader.vector(f"{attention}.sinks", config.heads) if config.sinks else None
    if sinks is not None and heads is not None:
        sinks = sinks[heads.slice]
    k_scale, v_scale = loader.kv_scales(attention, layer)
    names = config.norm_names
    q_rotator, k_rotator = loader.head_rotations(attention, config.head_dim)
    q_norm = _head_norm(config, loader, f"{attention}.q_norm", config.heads, heads)
    k_norm = _head_norm(config, loader, f"{attention}.k_norm", config.kv_heads, kv_heads)
    apart = rotary is None or config.norms_rotated
    both = None if apart else head_norms(q_norm, k_norm, config.head_dim)
    return Block(
        attention_norm=norm(names.attention),
        qkv=loader.linear(f"{attention}.qkv_proj", _qkv_parts(config, cuts, attention)),
        output=loader.linear(
            f"{attention}.o_proj",
            [Part(f"{attention}.o_proj", (hidden, q_rows), bias=config.output_bias, columns=inner)],
        ),
        mlp_norm=norm(names.mlp),
        mlp=feed_forward(config, loader, layer),
        rotary=rotary,
        attention=AttentionParameters(
            scale=(config.attention_scale or config.head_dim**-0.5) * k_scale,
            softcap=config.attention_softcap,
            sinks=sinks,
        ),
        kv_dtype=loader.kv_dtype(attention, layer),
        k_scale=k_scale,
        v_scale=v_scale,
        q_norm=None if both else q_norm,
        k_norm=None if both else k_norm,
        head_norms=both,
        attention_post_norm=norm(names.attention_post, torch.float32),
        mlp_post_norm=norm(names.mlp_post, torch.float32),
        output_norm=output_norm,
        q_rotator=q_rotator,
        k_rotator=k_rotator,
    )


def _qkv_parts(config: ModelConfig, cuts: Cuts | None, attention: str) -> list[Part]:
    q_rows, kv_rows = config.heads * config.head_dim, config.kv_heads * config.head_dim
    hidden, bias = config.hidden_size, config.qkv_bias
    parts = [
        Part(f"{attention}.q_proj", (q_rows, hidden), rotary_heads=config.heads, bias=bias),
        Part(f"{attention}.k_proj", (kv_rows, hidden), rotary_heads=config.kv_heads, bias=bias),
        Part(f"{attention}.v_proj", (kv_rows, hidden), bias=bias),
    ]
    if cuts is None:
        return parts
    of = [cut.times(config.head_dim) for cut in (cuts.heads, cuts.kv_heads, cuts.kv_heads)]
    return [replace(part, rows=cut) for part, cut in zip(parts, of, strict=True)]
