"""ModelConfig: the sizes and constants of a decoder, from config.json or from GGUF metadata.

Sources: transformers' LlamaConfig, the GGUF specification.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from lowbit.checkpoint.header import CheckpointHeader
from lowbit.errors import LowbitError
from lowbit.layers.rotary import RopeScaling
from lowbit.models.config_keys import ConfigKeys, architecture_of, gguf_keys, json_keys
from lowbit.models.rope_scaling import (
    longer,
    rope_keys,
    scaling_from_gguf,
    scaling_from_json,
    served_context,
)


@dataclass(frozen=True)
class MoeConfig:
    """A mixture of experts in place of the MLP. ``layers``: the layers that have one.

    ``routing``: ``softmax_top_k``, ``top_k_softmax``, ``group_softmax`` or ``group_sigmoid`` (DeepSeek-V2's
    and -V3's; ``groups`` and ``kept_groups`` are for them). ``renormalize``: the weights sum to 1, as
    ``top_k_softmax``'s always do; then they are multiplied by ``scale``. ``router``: the router's name under
    the MLP; ``correction``: under it, what ``group_sigmoid`` adds before it chooses, "" where that is the
    router's. ``shared_size``: the width of the MLP beside the experts, ``shared``; where ``shared_gate``
    names a row, times its sigmoid.
    """

    experts: int
    per_token: int
    intermediate_size: int
    layers: frozenset[int]
    routing: str = "softmax_top_k"
    renormalize: bool = True
    router: str = "gate"
    router_bias: bool = False
    correction: str = ""
    groups: int = 1
    kept_groups: int = 1
    scale: float = 1.0
    shared_size: int = 0
    shared: str = "shared_experts"
    shared_gate: str = ""
    expert_bias: bool = False
    interleaved: bool = False  # stacked gate and up rows in turn
    transposed: bool = False  # plain stacked weights as (experts, in, out)

    def __post_init__(self) -> None:
        if not 1 <= self.per_token <= self.experts:
            raise LowbitError(
                "E0216",
                f"the model's config sends each token to {self.per_token} of {self.experts} experts; it is "
                "damaged or of another kind",
            )
        size, left = divmod(self.experts, self.groups)
        pairs = size >= 2 or self.routing != "group_sigmoid"  # a group's score is the sum of two
        if left or self.kept_groups > self.groups or self.per_token > size * self.kept_groups or not pairs:
            raise LowbitError(
                "E0216",
                f"the model's config sends each token to {self.per_token} experts in {self.kept_groups} of "
                f"{self.groups} groups of {self.experts} experts; it is damaged or of another kind",
            )


@dataclass(frozen=True)
class NormNames:
    """What a layer's norms are called in a Hugging Face checkpoint; "" where there is no such norm.

    ``attention`` and ``mlp`` come before the two halves of a block, the others after them, before the
    residual is added. Without ``attention`` the projections see the residual stream itself.
    """

    attention: str = "input_layernorm"
    mlp: str = "post_attention_layernorm"
    attention_post: str = ""
    mlp_post: str = ""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Dimensions in elements, contexts in tokens."""

    architecture: str
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    norm_eps: float
    rope_theta: float
    rotary_dim: int
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    tied_head: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    activation: str = "silu"
    gated: bool = True  # False: an MLP of two matrices
    sub_norms: bool = False  # RMSNorm before the output and the down projection (BitNet)
    norm_head: bool = False  # each row of the head is divided by its norm (Baichuan 2)
    learned_positions: bool = False  # a vector a position is added to the embedding (GPT-2)
    layer_norm: bool = False  # LayerNorm in place of RMSNorm
    norm_bias: bool = False
    norm_names: NormNames = NormNames()
    parallel: bool = False  # attention and MLP both see the block's input, without an MLP norm under one norm
    # A norm of Q and K before the rotation: over each head ("head"), over all of a projection ("projection"),
    # or a LayerNorm over each head with weights of its own ("layer").
    qk_norm: str = ""
    norms_rotated: bool = False  # that norm comes after the rotation (HunYuan)
    rotates_neighbours: bool = False  # dimensions 2j and 2j + 1 turn together, not j and j + half
    unrotated: frozenset[int] = frozenset()  # layers without a rotary embedding
    norm_offset: float = 0.0  # added to every norm weight (Gemma in safetensors stores weight - 1)
    windows: tuple[int, ...] = ()  # tokens each layer sees, 0 = all; empty = all layers see all
    local_rope_theta: float | None = None  # another base for the layers with a window, and another scaling
    local_rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    logit_scale: float = 1.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # on what attention and MLP give, before the residual is added
    sinks: bool = False  # a learned logit for each head in the softmax sum (gpt-oss)
    moe: MoeConfig | None = None

    def __post_init__(self) -> None:
        scalings = (self.rope_scaling, self.local_rope_scaling)
        divisors = max(len(scaling.divisors) for scaling in scalings)
        checks = (
            (divisors in (0, self.rotary_dim // 2), f"{divisors} rope factors"),
            (self.heads % self.kv_heads == 0, f"{self.heads} heads over {self.kv_heads} K/V heads"),
            (self.rotary_dim <= self.head_dim, f"rotary dimension {self.rotary_dim} of {self.head_dim}"),
            (self.rotary_dim % 2 == 0, f"an odd rotary dimension {self.rotary_dim}"),
            (0 < self.norm_eps < 1, f"norm epsilon {self.norm_eps}"),
            (0 < self.rope_theta < 1e12, f"rope_theta {self.rope_theta}"),
            (self.residual_scale > 0, f"a residual multiplier of {self.residual_scale}"),
            (self.logit_scale > 0, f"logits times {self.logit_scale}"),
        )
        for sound, what in checks:
            if not sound:
                raise LowbitError("E0216", f"the model's config has {what}; it is damaged or of another kind")


ConfigT = TypeVar("ConfigT", bound=ModelConfig)


def widened(kind: type[ConfigT], base: ModelConfig, **more: object) -> ConfigT:
    """A family's own kind of config: what ``base`` has, but what ``more`` says."""
    known: dict[str, Any] = {each.name: getattr(base, each.name) for each in fields(ModelConfig)}
    return kind(**{**known, **more})


def extended(config: ModelConfig, context: int) -> ModelConfig:
    """For sequences of up to ``context`` tokens, where that is more than the model's own."""
    if context <= config.context_length:
        return config
    theta = longer(config.rope_scaling, config.rotary_dim, config.rope_theta, context)
    return replace(config, context_length=context, rope_theta=theta)


def base_config(
    header: CheckpointHeader, *, rotated: float = 1.0, theta: float = 10000.0, tied: bool = False
) -> ModelConfig:
    """What all decoders share; a family changes what it does otherwise.

    What a config.json without the key means in this family: ``rotated``: the part of a head that turns;
    ``theta``: the rotary base; ``tied``: whether the head is the embedding.
    """
    return _from_gguf(header) if header.container == "gguf" else _from_json(header, rotated, theta, tied)


def _from_json(header: CheckpointHeader, rotated: float, theta: float, tied: bool) -> ModelConfig:
    keys = json_keys(header)
    hidden, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    if not keys.has("head_dim") and hidden % heads:
        raise LowbitError(
            "E0216", f"{keys.place}: hidden_size {hidden} is no multiple of num_attention_heads {heads}"
        )
    head_dim = keys.size("head_dim", hidden // heads)
    context = keys.size("max_position_embeddings")
    rope = rope_keys(keys)
    partial = rope.number("partial_rotary_factor", keys.number("partial_rotary_factor", rotated))
    architecture, scaling = architecture_of(header), scaling_from_json(rope, keys, context)
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden,
        layers=keys.size("num_hidden_layers"),
        heads=heads,
        kv_heads=keys.size("num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate_size=keys.size("intermediate_size"),
        vocab_size=keys.size("vocab_size"),
        context_length=served_context(rope, keys, scaling, architecture),
        norm_eps=_norm_eps(keys, ("rms_norm_eps", "layer_norm_eps")),
        rope_theta=rope.number("rope_theta", keys.number("rope_theta", theta)),
        rotary_dim=int(head_dim * partial),
        rope_scaling=scaling,
        tied_head=keys.flag("tie_word_embeddings", tied),
        activation=keys.text("hidden_activation", keys.text("hidden_act", "silu")),
    )


def _norm_eps(keys: ConfigKeys, names: tuple[str, ...]) -> float:
    """By the first of these names that is there."""
    return keys.number(next((name for name in names if keys.has(name)), names[0]))


def _from_gguf(header: CheckpointHeader) -> ModelConfig:
    keys = gguf_keys(header)
    hidden, heads = keys.size("embedding_length"), keys.size("attention.head_count")
    if not keys.has("attention.key_length") and hidden % heads:
        raise LowbitError(
            "E0216", f"{keys.place}: embedding_length {hidden} is no multiple of head_count {heads}"
        )
    head_dim = keys.size("attention.key_length", hidden // heads)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise LowbitError("E0209", f"{header.root.name}: no tensor 'token_embd.weight'; not a whole model")
    return ModelConfig(
        architecture=architecture_of(header),
        hidden_size=hidden,
        layers=keys.size("block_count"),
        heads=heads,
        kv_heads=keys.size("attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=keys.size("feed_forward_length"),
        vocab_size=embedding.shape[0],  # vocab_size may be absent, and may differ from the rows
        context_length=keys.size("context_length"),
        norm_eps=_norm_eps(keys, ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")),
        rope_theta=keys.number("rope.freq_base", 10000.0),
        rotary_dim=keys.size("rope.dimension_count", head_dim),
        rope_scaling=scaling_from_gguf(keys, header),
        tied_head="output.weight" not in header.tensors,
        qkv_bias=bool({"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"} & set(header.tensors)),
        output_bias="blk.0.attn_output.bias" in header.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in header.tensors,
    )
